"""Shapes that nobody wants to work out by hand: one of so many times the parameters, and those on the way to one.

    shape_for         "twice the parameters, in width and depth": a whole shape, heads whole and d_head kept
    shapes_between    what a model goes through that is grown in stages

Torch-free, and quick enough to be asked for while somebody waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil, floor, log
from typing import Literal, NamedTuple

from pydantic import ValidationError

from trainer.families import Family, get_family
from trainer.growth.advice import recommend
from trainer.growth.errors import GrowthError
from trainer.growth.plan import check
from trainer.shape import GrowInit, Shape

By = Literal["both", "width", "depth"]
Staging = Literal["even", "gradual"]

#: Beyond this, the small model's share of what the large one is to learn says little (about 2 to 4 is usual).
MOST_TIMES = 16.0
#: How far from what was asked for a proposal may lie, where the family permits.
TOLERANCE = 0.05


class Target(NamedTuple):
    """A proposed shape. `multiple` is what it really comes to; `counted` tells whether the embeddings are in it."""

    shape: Shape
    parameters: int
    multiple: float
    preserves: bool  # by the growth that is recommended for it
    counted: Literal["all", "non-embedding"]


class _Count(NamedTuple):
    """Parameters of a family's models of one width, for any depth and any d_mlp."""

    outside: int
    block: int  # without what d_mlp is multiplied by
    per_unit: int  # of d_mlp, in a block

    def of(self, n_layers: int, d_mlp: int) -> int:
        return self.outside + n_layers * (self.block + d_mlp * self.per_unit)


class _Candidate(NamedTuple):
    shape: Shape
    parameters: int
    miss: float  # |log(reached / wanted)|
    cost: float  # what speaks against it beside that


@lru_cache(maxsize=256)
def shape_for(
    family: str, parent: Shape, multiple: float, by: By, *, n_positions: int, d_vocab: int | None, tied: bool
) -> Target:
    """A shape of about `multiple` times the parent's parameters, larger in width, in depth, or in both in proportion.

    d_head stays, and so does the number of query heads to a key/value head, but that a single one stays single; d_model
    grows with the heads, and d_mlp too, but for what it takes to come nearer. Of shapes that are near enough, those are
    preferred that growth can reach without losing the function, then those in proportion, then whole ratios. `d_vocab`
    None: not known, so that embeddings are not counted. Raises :class:`GrowthError` with the field "multiple".
    """
    if not 1 < multiple <= MOST_TIMES:
        raise GrowthError("multiple", f"must be more than 1 and at most {MOST_TIMES:g}", multiple)
    architecture = get_family(family)
    have = _total(architecture, parent, n_positions, d_vocab, tied)
    candidates = sorted(
        _candidates(architecture, parent, have * multiple, by, n_positions, d_vocab, tied),
        key=lambda c: (c.miss > TOLERANCE, c.miss if c.miss > TOLERANCE else c.cost, c.miss),
    )
    if not candidates:
        raise GrowthError("multiple", f"no {architecture.title} of that size is larger in {_IN[by]} alone", multiple)
    near = [c for c in candidates if c.miss <= TOLERANCE] or candidates[:1]
    best = next((c for c in near if _keeps(family, parent, _heads_of(c.shape))), near[0])
    preserves = recommend(family, parent, best.shape).preserves
    counted: Literal["all", "non-embedding"] = "non-embedding" if d_vocab is None else "all"
    return Target(best.shape, best.parameters, best.parameters / have, preserves, counted)


def _heads_of(shape: Shape) -> tuple[int, int, int | None]:
    return shape.d_model, shape.n_heads, shape.n_kv_heads


@lru_cache(maxsize=256)
def _keeps(family: str, parent: Shape, heads: tuple[int, int, int | None]) -> bool:
    """Whether some growth keeps the function. d_mlp and depth can always grow so, hence are left out."""
    d_model, n_heads, n_kv_heads = heads
    child = parent.model_copy(update={"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads})
    try:
        return recommend(family, parent, child).preserves
    except GrowthError:
        return False


_IN: dict[By, str] = {"both": "width and depth", "width": "width", "depth": "depth"}


def _candidates(
    family: Family, parent: Shape, want: float, by: By, n_positions: int, d_vocab: int | None, tied: bool
) -> Iterator[_Candidate]:
    for width in [parent] if by == "depth" else _widths(family, parent):
        count = _count(family, width, n_positions, d_vocab, tied)
        if count.of(parent.n_layers, parent.d_mlp) > want * (1 + TOLERANCE):
            return  # and wider ones all the more
        ratio = width.n_heads / parent.n_heads
        for n_layers in _depths(parent, count, width, want, by, ratio):
            tuned = (want - count.of(n_layers, 0)) / (n_layers * count.per_unit)
            for d_mlp in {width.d_mlp} if by == "depth" else {width.d_mlp, _sensible(parent.d_mlp, tuned)}:
                wider, deeper = ratio > 1 or d_mlp > parent.d_mlp, n_layers > parent.n_layers
                if d_mlp < parent.d_mlp or wider == (by == "depth") or deeper == (by == "width"):
                    continue
                if (shape := _valid(family, width, n_layers=n_layers, d_mlp=d_mlp)) is None:
                    continue
                total = count.of(n_layers, d_mlp)
                miss = abs(log(total / want))
                yield _Candidate(shape, total, miss, _against(parent, shape, by, miss))


def _against(parent: Shape, shape: Shape, by: By, miss: float) -> float:
    """What speaks against a shape: out of proportion, no whole ratio, further from what was asked for."""
    wide, deep = shape.n_heads / parent.n_heads, shape.n_layers / parent.n_layers
    mlp = shape.d_mlp / parent.d_mlp / wide
    uneven = (abs(log(deep / wide)) if by == "both" else 0.0) + abs(log(mlp)) + (0.05 if mlp != 1 else 0.0)
    return uneven + 0.05 * ((wide % 1 > 0) + (deep % 1 > 0)) + 2 * max(0.0, miss - 0.01)


def _widths(family: Family, parent: Shape) -> Iterator[Shape]:
    """Shapes of the parent's depth with more and more heads, the parent first: d_model and d_mlp in proportion."""
    members = 1 if parent.kv_heads == 1 else parent.n_heads // parent.kv_heads
    n_heads = parent.n_heads
    while n_heads <= parent.n_heads * MOST_TIMES:
        kv_heads = 1 if parent.n_kv_heads == 1 else n_heads // members
        scaled, rest = divmod(parent.d_model * n_heads, parent.n_heads)
        changes = {
            "d_model": scaled,
            "n_heads": n_heads,
            "n_kv_heads": None if kv_heads == n_heads else kv_heads,
            "d_mlp": _sensible(parent.d_mlp, parent.d_mlp * n_heads / parent.n_heads),
        }
        if rest == 0 and (shape := _valid(family, parent, **changes)) is not None:
            yield shape
        n_heads += members


def _depths(parent: Shape, count: _Count, width: Shape, want: float, by: By, ratio: float) -> set[int]:
    """Depths that are worth a look at this width: the nearest, and the one in proportion."""
    if by == "width":
        return {parent.n_layers}
    exact = (want - count.outside) / (count.block + width.d_mlp * count.per_unit)
    found = {floor(exact), ceil(exact), round(exact / parent.n_layers) * parent.n_layers}
    if by == "both":
        found |= {floor(parent.n_layers * ratio), ceil(parent.n_layers * ratio)}
    return {n for n in found if parent.n_layers < n} or {parent.n_layers + 1}


def _sensible(d_mlp: int, wanted: float) -> int:
    """`wanted`, to the power of two that divides d_mlp as well: at most 256, and at most a sixteenth of it."""
    step = min(d_mlp & -d_mlp, 256, 1 << max(0, (d_mlp // 16).bit_length() - 1))
    return max(step, round(wanted / step) * step)


def _valid(family: Family, shape: Shape, **changes: int | None) -> Shape | None:
    try:
        found = Shape.model_validate(shape.model_dump() | changes)
    except ValidationError:
        return None
    return None if family.problems(found) else found


def _count(family: Family, shape: Shape, n_positions: int, d_vocab: int | None, tied: bool) -> _Count:
    def table(d_mlp: int) -> tuple[int, int]:
        one = shape.model_copy(update={"n_layers": 1, "d_mlp": d_mlp})
        parameters = family.parameters(one, n_positions, d_vocab or 1, tied)
        counted = [p for p in parameters if d_vocab is not None or not p.is_embedding]
        block = sum(p.size for p in counted if p.layer is not None)
        return sum(p.size for p in counted) - block, block

    (outside, one), (_, two) = table(1), table(2)
    return _Count(outside, 2 * one - two, two - one)


def _total(family: Family, shape: Shape, n_positions: int, d_vocab: int | None, tied: bool) -> int:
    return _count(family, shape, n_positions, d_vocab, tied).of(shape.n_layers, shape.d_mlp)


# Stages ---------------------------------------------------------------------------------------------------------------


def shapes_between(family: str, parent: Shape, child: Shape, growths: int, staging: Staging = "even") -> list[Shape]:
    """The shapes between two, for so many growths in all: each growth by about the same factor, or

    gradual   the whole width at the first growth, and then as many blocks at each (gradual stacking: Gong et al. 2019,
              StackBERT; Reddi et al. 2023)

    Fewer than asked for where there is nothing in between. Raises :class:`GrowthError` with the field "stages".
    """
    if growths < 2:
        raise GrowthError("stages", "must be at least 2: grown once is grown at once", growths)
    if staging == "gradual" and child.n_layers - parent.n_layers < 2:
        raise GrowthError("stages", "gradual stacking adds blocks at each growth, so n_layers must grow by 2 at least")
    architecture, found = get_family(family), [parent]
    for at in range(1, growths):
        share = at / growths
        if staging == "gradual":
            n_layers = parent.n_layers + round((child.n_layers - parent.n_layers) * share)
            shape = child.model_copy(update={"n_layers": n_layers})
        else:
            shape = _between(architecture, parent, child, found[-1], share)
        if shape not in (found[-1], child):
            found.append(shape)
    if len(found) == 1:
        raise GrowthError("stages", "there is no shape between small and large", growths)
    return found[1:]


def _between(family: Family, parent: Shape, child: Shape, last: Shape, share: float) -> Shape:
    """About (child / parent) ** share of every dimension; where that is no model, the last width at that depth."""

    def part(small: int, large: int, step: int = 1) -> int:
        wanted: float = small * (large / small) ** share
        return min(large, max(small, round(wanted / step) * step))

    n_layers = part(parent.n_layers, child.n_layers)
    deeper = last.model_copy(update={"n_layers": n_layers, "layer_norm_eps": child.layer_norm_eps})
    members = parent.n_heads // parent.kv_heads
    if members != child.n_heads // child.kv_heads or parent.d_head != child.d_head:
        return deeper  # what has its own rules changes once, at the end
    kv_heads = part(parent.kv_heads, child.kv_heads)
    n_heads = kv_heads * members
    d_model = part(parent.d_model, child.d_model, n_heads)
    if parent.d_model * child.n_heads == child.d_model * parent.n_heads:  # then at every stage, as square families must
        d_model = parent.d_model * n_heads // parent.n_heads
    d_mlp = min(child.d_mlp, max(parent.d_mlp, _sensible(parent.d_mlp, part(parent.d_mlp, child.d_mlp))))
    n_kv_heads = None if kv_heads == n_heads else kv_heads
    shape = _valid(family, deeper, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, d_mlp=d_mlp)
    if shape is None:
        return deeper
    try:
        for a, b in ((last, shape), (shape, child)):
            check(family.name, a, b, GrowInit(parent="small"))
    except GrowthError:
        return deeper
    return shape
