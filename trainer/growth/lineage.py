"""Where each number of a grown model comes from, as data: small, whatever the model's size, and known before it grows.

    axes      for each named axis, which index of the child comes from where
    blocks    for each block of the child, the parent's block that it continues
    tensors   for each kind of tensor, from which of the parent's, and what share of its entries is
                copied    an entry of the parent's, perhaps times one factor for the whole tensor
                split     likewise, but read from one of several copies, which share the value among them
                averaged  the mean of all that was written before (a LayerNorm takes it away again)
                zero, one set to that
                random    drawn
                silent    of a block that writes nothing yet: zero
              and, beside that, to what share noise was added, and what came from the block above

Everything is counted from the plan's maps (:mod:`.tensors` says by which rules), so nothing is measured and no weight
is read. Blocks that are made alike are told of once. Imports neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from trainer.families import Axes, Parameter
from trainer.growth.depth import Block
from trainer.growth.maps import NEW, AxisMap, product
from trainer.growth.plan import GrowthPlan, Origin
from trainer.shape import Shape

Kind = Literal["copied", "split", "averaged", "zero", "one", "random", "silent"]
KINDS: tuple[Kind, ...] = ("copied", "split", "averaged", "zero", "one", "random", "silent")

BlockKind = Literal["copied", "repeated", "silent", "random"]

#: Runs of an axis that are told of; sources chosen at random would make as many as there are indices.
MOST_RUNS = 64

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Run(_Plain):
    """Indices in a row: `count` times `each` copies of a source, followed by `gap` new ones; the source goes up by one.

    Without a source: `count` new indices.
    """

    count: Annotated[int, Field(ge=1)]
    source: Count | None = None
    each: Annotated[int, Field(ge=1)] = 1
    gap: Count = 0

    @property
    def length(self) -> int:
        return self.count if self.source is None else self.count * (self.each + self.gap)


class AxisLineage(_Plain):
    """One axis. Of its `large` indices `small` are the old ones, `copied` are further copies, the rest is new."""

    axis: str
    small: Count
    large: Count
    copied: Count
    new: Count
    new_write: str  # what is written to new indices: zero, random or mean
    new_read: str  # and what reads them: zero or random
    runs: tuple[Run, ...]  # lowest index first
    left_out: Count = 0  # indices after the last run


class BlockLineage(_Plain):
    """A block. `repeated`: the parent's block has been run before, further down."""

    kind: BlockKind
    source: Count | None = None


class TensorLineage(_Plain):
    """One tensor, or the same one of several blocks; in names `*` stands for the number of the block."""

    name: str
    source: str | None  # of the parent; its block is that of `blocks`
    blocks: tuple[tuple[int, int], ...] = ()  # of the child, from and to; empty outside the blocks
    shape: tuple[int, ...]
    shares: dict[Kind, Share]
    noise: Share = 0.0  # of the entries, those to which noise was added
    above: Share = 0.0  # of the entries, those that the parent's next block up gave

    @property
    def entries(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size * (sum(last - first + 1 for first, last in self.blocks) or 1)


class Lineage(_Plain):
    """Of one growth."""

    family: str
    parent: Shape
    child: Shape
    width: str
    depth: str
    split: str
    snr_db: float | None
    learn_steps: int = 0  # of training the maps, which began with those told of here
    preserves: bool
    because: str
    axes: tuple[AxisLineage, ...]
    blocks: tuple[BlockLineage, ...]
    tensors: tuple[TensorLineage, ...]

    @property
    def entries(self) -> int:
        """Parameters of the child."""
        return sum(tensor.entries for tensor in self.tensors)

    @property
    def shares(self) -> dict[Kind, float]:
        """Of all entries, those of each kind there is."""
        total = Counter[Kind]()
        for tensor in self.tensors:
            for kind, share in tensor.shares.items():
                total[kind] += share * tensor.entries  # type: ignore[assignment]
        return {kind: total[kind] / self.entries for kind in KINDS if total[kind]}

    def plain(self) -> dict[str, Any]:
        """As JSON, without what is as usual. Lineage.model_validate reads it again."""
        return self.model_dump(mode="json", exclude_defaults=True)


def lineage(plan: GrowthPlan) -> Lineage:
    """Of what `plan` will make, or has made."""
    return Lineage(
        family=plan.family,
        parent=plan.parent,
        child=plan.child,
        width=plan.init.width,
        depth=plan.init.depth,
        split=plan.split,
        snr_db=plan.init.snr_db,
        learn_steps=plan.init.learn_steps,
        preserves=plan.preserves,
        because=plan.because,
        axes=tuple(_axis(axis, axis_map) for axis, axis_map in plan.maps.items()),
        blocks=tuple(_blocks(plan.blocks)),
        tensors=tuple(_tensors(plan)),
    )


# --- Axes and blocks --------------------------------------------------------------------------------------------------


def _axis(axis: str, axis_map: AxisMap) -> AxisLineage:
    found, left_out = list[Run](), axis_map.large
    for run in runs(axis_map.source_index):
        if len(found) == MOST_RUNS:
            break
        found.append(run)
        left_out -= run.length
    sources = sum(n > 0 for n in axis_map.multiplicity)
    new = sum(source == NEW for source in axis_map.source_index) if axis_map.has_new else 0
    return AxisLineage(
        axis=axis,
        small=axis_map.small,
        large=axis_map.large,
        copied=axis_map.large - sources - new,
        new=new,
        new_write=str(axis_map.new_write) if new else "",
        new_read=str(axis_map.new_read) if new else "",
        runs=tuple(found),
        left_out=left_out,
    )


def runs(sources: Sequence[int]) -> Iterable[Run]:
    """Run-length encoding of an axis map's `source_index`."""
    if isinstance(sources, range):
        yield Run(count=len(sources), source=0)
        return
    at, end = 0, len(sources)
    while at < end:
        if sources[at] == NEW:
            count = _length(sources, at, NEW)
            yield Run(count=count)
            at += count
            continue
        each = _length(sources, at, sources[at])
        gap = _length(sources, at + each, NEW)
        if not _goes_on(sources, at + each + gap, sources[at] + 1, each, gap):
            gap = 0  # what is new after the last of several is a run of its own
        count = 1
        while _goes_on(sources, at + count * (each + gap), sources[at] + count, each, gap):
            count += 1
        yield Run(count=count, source=sources[at], each=each, gap=gap)
        at += count * (each + gap)


def _length(sources: Sequence[int], at: int, source: int) -> int:
    """How often `source` stands in a row from `at` on."""
    end = at
    while end < len(sources) and sources[end] == source:
        end += 1
    return end - at


def _goes_on(sources: Sequence[int], at: int, source: int, each: int, gap: int) -> bool:
    """Whether `each` copies of `source`, and at least `gap` new ones, stand at `at`."""
    return _length(sources, at, source) == each and _length(sources, at + each, NEW) >= gap


def _blocks(blocks: Sequence[Block]) -> Iterable[BlockLineage]:
    heard = set[int]()
    for source, silent in blocks:
        if source is None:
            yield BlockLineage(kind="random")
        elif silent:
            yield BlockLineage(kind="silent", source=source)
        else:
            yield BlockLineage(kind="repeated" if source in heard else "copied", source=source)
            heard.add(source)


# --- Tensors ----------------------------------------------------------------------------------------------------------


class _Outputs(NamedTuple):
    """Indices that are written, by what is written to them."""

    old: int
    later: int  # of those, the ones that are not the first copy
    averaged: int
    random: int
    zero: int


class _Inputs(NamedTuple):
    """Indices that are read, by what reads them."""

    single: int
    several: int  # with a source that has more copies
    chosen: int  # of those, the ones that a reader reads which reads one copy alone
    random: int
    zero: int


def _tensors(plan: GrowthPlan) -> Iterable[TensorLineage]:
    made: dict[tuple[Any, ...], tuple[dict[Kind, float], float, float]] = {}
    layers: dict[tuple[Any, ...], list[int]] = {}
    first: dict[tuple[Any, ...], Origin] = {}
    counts = _Counts(plan)
    for origin in plan.parameters():
        new = origin.new
        silent = origin.block.silent and new.writes_residual
        key = (_pattern(new), origin.old is None, silent, origin.following is not None)
        if key not in made:
            made[key] = counts.of(origin, silent)
            first[key], layers[key] = origin, []
        if new.layer is not None:
            layers[key].append(new.layer)
    order = list(dict.fromkeys(key[0] for key in made))
    for key in sorted(made, key=lambda key: order.index(key[0])):
        (shares, noise, above), origin = made[key], first[key]
        yield TensorLineage(
            name=key[0],
            source=None if origin.old is None else _pattern(origin.old),
            blocks=tuple(_ranges(layers[key])),
            shape=origin.new.shape,
            shares=shares,
            noise=noise,
            above=above,
        )


def _pattern(parameter: Parameter) -> str:
    return parameter.name if parameter.layer is None else re.sub(r"\.\d+\.", ".*.", parameter.name, count=1)


def _ranges(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    first = last = None
    for number in numbers:
        if first is not None and last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last


class _Counts:
    """Entries of each kind in a plan's tensors. A tensor's are products of how many indices of each sort its two sides
    have, so none is looked at twice."""

    def __init__(self, plan: GrowthPlan):
        self.plan = plan
        self._maps: dict[Axes, AxisMap] = {}
        self._written: dict[Axes, _Outputs] = {}
        self._read: dict[Axes, _Inputs] = {}

    def of(self, origin: Origin, silent: bool) -> tuple[dict[Kind, float], float, float]:
        """Shares by kind, with noise, from the block above."""
        new = origin.new
        if silent:
            return {"silent": 1.0}, 0.0, 0.0
        if origin.old is None:
            kind: dict[str, Kind] = {"normal": "random", "zeros": "zero", "ones": "one"}
            return {"one" if new.kind == "norm_gain" else kind[new.fresh]: 1.0}, 0.0, 0.0
        out = _summed(self._outputs(axes) for axes in new.out)
        if not new.into:
            return self._vector(out, origin)
        into = self._inputs(new.into)
        alone = self.plan.split == "diagonal"
        unread = into.several - into.chosen if alone else 0
        n_inputs = into.single + into.several + into.random + into.zero
        written = out.old + out.averaged
        total: Counter[str] = Counter()
        total["copied"] = out.old * (into.single + (into.chosen if alone else 0))
        total["split"] = out.old * (0 if alone else into.several)
        total["averaged"] = out.averaged * (into.single + into.several - unread)
        total["random"] = written * into.random + out.random * n_inputs
        total["zero"] = written * (into.zero + unread) + out.zero * n_inputs
        size = new.size
        noisy = written * into.several if self.plan.init.noise else 0
        above = out.later * (into.single + into.several) if origin.following else 0
        return _shares(total, size), noisy / size, above / size

    def _vector(self, out: _Outputs, origin: Origin) -> tuple[dict[Kind, float], float, float]:
        new = origin.new
        unseen = 0
        if new.rescales:  # a gain of zero hides a copy
            for axes in new.out:
                axis_map = self._map(axes)
                pairs = zip(axis_map.source_index, axis_map.write, strict=True)
                unseen += sum(source != NEW and write == 0 for source, write in pairs)
        total: Counter[str] = Counter(copied=out.old - unseen, zero=unseen)
        if new.kind == "norm_gain":
            total["one"] += out.averaged + out.random + out.zero
        else:
            total["averaged" if new.kind == "bias" else "zero"] += out.averaged
            total["zero"] += out.random + out.zero
        above = out.later if origin.following else 0
        return _shares(total, new.size), 0.0, above / new.size

    def _map(self, axes: Axes) -> AxisMap:
        if axes not in self._maps:
            self._maps[axes] = reduce(product, [self.plan.maps[axis] for axis in axes])
        return self._maps[axes]

    def _outputs(self, axes: Axes) -> _Outputs:
        if axes not in self._written:
            axis_map = self._map(axes)
            new = _new_by(axis_map, axis_map.new_write)
            old = axis_map.large - new.total()
            later = old - sum(n > 0 for n in axis_map.multiplicity)
            self._written[axes] = _Outputs(old, later, new["mean"], new["random"], new["zero"])
        return self._written[axes]

    def _inputs(self, axes: Axes) -> _Inputs:
        if axes not in self._read:
            axis_map = self._map(axes)
            new = _new_by(axis_map, axis_map.new_read)
            several = [n for n in axis_map.multiplicity if n > 1]
            single = sum(n == 1 for n in axis_map.multiplicity)
            self._read[axes] = _Inputs(single, sum(several), len(several), new["random"], new["zero"])
        return self._read[axes]


def _new_by(axis_map: AxisMap, fills: str | Sequence[str]) -> Counter[str]:
    """How many new indices are filled with what: one word for all, or one for each index."""
    if not axis_map.has_new:
        return Counter()
    if isinstance(fills, str):
        return Counter({fills: sum(source == NEW for source in axis_map.source_index)})
    return Counter(fill for source, fill in zip(axis_map.source_index, fills, strict=True) if source == NEW)


def _summed(sides: Iterable[_Outputs]) -> _Outputs:
    return _Outputs(*(sum(counts) for counts in zip(*sides, strict=True)))


def _shares(total: Mapping[str, int], size: int) -> dict[Kind, float]:
    return {kind: total[kind] / size for kind in KINDS if total.get(kind)}
