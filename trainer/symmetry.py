"""How far the copies of a grown model have parted: distance between copies, and effective width.

A unit is an index of a copied axis: a channel of the residual stream, a hidden unit of one block's MLP, a head. Its
vector is what is written to it and what reads it: its rows and columns in every matrix that has the axis, each matrix
scaled to a root mean square of one over the units, so that all count alike. (Not biases: the gradient of a key's bias,
say, is rounding alone, which Adam makes as large as any.) For two copies u, v of one source

    distance         |u - v| / sqrt((|u|^2 + |v|^2) / 2)     0: equal, sqrt(2): unrelated
    effective width  units without a source, plus, of each source's copies, those that are more than TOLERANCE away from
                     every copy before them (the first always counts)

Copies with equal incoming and outgoing weights get equal gradients, so under a deterministic optimizer they stay equal
for ever and the larger model computes what a narrower one could (arXiv 2602.02472, 2602.10545); duplication without
noise (HyperCloning, 2409.12903) begins there.

Equal weights are not all that ties copies: of two copies that are wired to different copies of what they read
(block-diagonal matrices), no weight is shared, and yet they move in lockstep. Whoever reads copies that act alike sees
the sum of their weights alone. So vectors are first compared with the copies of every other axis summed, and only where
copies of an axis are found apart are those taken one by one, until that finds no more. (These are the classes of an
equitable partition, found by refining the coarsest.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.families import Axes, Parameter, get_family
from trainer.growth.maps import NEW, AxisMap
from trainer.growth.plan import GrowthPlan

#: Two copies are apart when their relative distance is more than this.
TOLERANCE = 0.01

#: Sources whose copies are compared, and copies of each; entries of a matrix that are looked at.
MOST_SOURCES, MOST_COPIES, MOST_ENTRIES = 128, 8, 1 << 18

Indices = NDArray[np.intp]


class Measure(TypedDict):
    """What was found on one axis: of one block, or (`layer` None) of the model."""

    axis: str
    layer: int | None
    width: int
    effective_width: int
    least_width: int  # the effective width if all copies were equal
    distance: float  # mean over pairs of copies
    least_distance: float


class Key(NamedTuple):
    axis: str
    layer: int | None  # None: the residual stream, which all blocks share


class Symmetry:
    """Of a model that was grown as `plan` says, in training: `model` is a transformers model on any device.

    Where it was grown before that too, `earlier` has those plans, first growth first: a copy of a copy is a copy.

    Bounded work: of a wide axis a fixed sample of sources is compared, of a large matrix a fixed sample of entries.
    """

    def __init__(self, model: torch.nn.Module, plan: GrowthPlan, earlier: Sequence[GrowthPlan] = ()):
        line = [*(each.maps for each in earlier), plan.maps]
        self.axes = {
            axis: _Copied([maps[axis] for maps in line])
            for axis in plan.maps
            if any(max(maps[axis].multiplicity) > 1 for maps in line)
        }
        self._sizes = {axis: axis_map.large for axis, axis_map in plan.maps.items()}
        self._parts: dict[Key, list[_Part]] = {}
        self._classes: dict[Any, tuple[Tensor, Tensor, int]] = {}
        family, weights = get_family(plan.family), dict(model.named_parameters())
        table = family.parameters(plan.child, plan.maps["position"].large, plan.maps["vocab"].large, plan.tied)
        for parameter in table:
            if not parameter.into:
                continue
            weight = weights.get(parameter.name)
            if weight is None:
                weight = weights[family.also_named[parameter.name]]
            for axis in self.axes:
                if axis == "embed":
                    key = Key(axis, None)
                elif parameter.layer is not None and plan.blocks[parameter.layer].source is not None:
                    key = Key(axis, parameter.layer)
                else:
                    continue  # in a block that was drawn, nothing is a copy
                if parts := self._parts_of(parameter, axis, weight):
                    self._parts.setdefault(key, []).extend(parts)

    @torch.no_grad()
    def measure(self) -> list[Measure]:
        """For each copied axis its blocks, lowest first, then the whole (`layer` None): sums of widths, mean distance.

        Empty where nothing was copied.
        """
        lockstep, found = set(self._parts), dict[Key, _Found]()
        while True:
            found = {key: self._compare(key, lockstep) for key in self._parts}
            apart = {key for key in lockstep if found[key].distance > TOLERANCE}
            if not apart:
                break
            lockstep -= apart
        rows: list[Measure] = []
        for axis in self.axes:
            of_axis = [self._row(key, each) for key, each in found.items() if key.axis == axis]
            rows += of_axis
            if axis != "embed" and of_axis:
                rows.append(_whole(axis, of_axis))
        return rows

    def _row(self, key: Key, found: _Found) -> Measure:
        copied = self.axes[key.axis]
        return {
            "axis": key.axis,
            "layer": key.layer,
            "width": copied.width,
            "effective_width": copied.least + round(found.apart * (copied.width - copied.least)),
            "least_width": copied.least,
            "distance": found.distance,
            "least_distance": found.least,
        }

    def _parts_of(self, parameter: Parameter, axis: str, weight: Tensor) -> list[_Part]:
        sides = [_Side(parameter.out, parameter.interleaved), _Side((parameter.into,), False)]
        if parameter.in_first:
            sides.reverse()
        parts = []
        for dimension, side in enumerate(sides):
            parts += [_Part(weight, dimension, at, sides[1 - dimension]) for at in side.units(axis, self._sizes)]
        return parts

    def _compare(self, key: Key, lockstep: set[Key]) -> _Found:
        copied = self.axes[key.axis]
        summed = {k.axis for k in lockstep if k.layer in (None, key.layer)} - {key.axis}
        if key.layer is None:  # its tensors lie in all blocks: what is in lockstep in one may not be in another
            blocks = {k.layer for k in self._parts if k.layer is not None}
            summed = {a for a in self.axes if a != "embed" and all(Key(a, b) in lockstep for b in blocks)}
        device = self._parts[key][0].weight.device
        first, second = (torch.from_numpy(side).to(device) for side in copied.pairs.T)
        apart = torch.zeros(len(first), dtype=torch.float64, device=device)
        size = torch.zeros(len(copied.sampled), dtype=torch.float64, device=device)
        for part in self._parts[key]:
            vectors = self._vectors(part, copied, summed)
            own = vectors.square().sum(1).double()
            scale = own.mean()
            scale = torch.where(scale > 0, scale, torch.inf)  # a matrix of zeros says nothing
            size += own / scale
            apart += (vectors[first] - vectors[second]).square().sum(1).double() / scale
        distances = (apart / ((size[first] + size[second]) / 2).clamp_min(1e-300)).sqrt()
        nearest = torch.full_like(size, torch.inf).scatter_reduce_(0, second, distances, "amin")
        later = torch.isfinite(nearest)
        far = (nearest > TOLERANCE) & later
        return _Found(
            distance=float(distances.mean()), least=float(distances.min()), apart=float(far.sum() / later.sum())
        )

    def _vectors(self, part: _Part, copied: _Copied, summed: set[str]) -> Tensor:
        """(sampled units, entries), float32."""
        weight, device = part.weight.detach(), part.weight.device
        units = part.units[copied.sampled]  # (units, members, rest)
        n_units, members, rest = units.shape
        rows = weight.index_select(part.dimension, torch.from_numpy(units.ravel()).to(device))
        keep, into, count = self._classes_of(part.other, summed, MOST_ENTRIES // units.size, device)
        rows = rows.index_select(1 - part.dimension, keep).float()
        if part.dimension == 1:
            rows = rows.T
        if count < len(keep):
            rows = rows.new_zeros(len(rows), count).index_add_(1, into, rows)
        return rows.reshape(n_units, members, rest * count).sum(1)

    def _classes_of(self, side: _Side, summed: set[str], most: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """:meth:`_Side.classes`, once for all blocks."""
        key = (side.segments, side.interleaved, frozenset(summed), most)
        if key not in self._classes:
            keep, into, count = side.classes(summed, self.axes, self._sizes, most)
            self._classes[key] = torch.from_numpy(keep).to(device), torch.from_numpy(into).to(device), count
        return self._classes[key]


class _Found(NamedTuple):
    distance: float
    least: float
    apart: float  # the share of second and later copies that count


@dataclass(frozen=True)
class _Part:
    """A matrix, and where along one of its dimensions each unit of an axis stands: (units, members, rest)."""

    weight: Tensor
    dimension: int
    units: Indices
    other: _Side  # what runs along the other dimension


class _Copied:
    """An axis with copies, and which of them are compared."""

    def __init__(self, maps: Sequence[AxisMap]):
        """`maps` of all growths, the first first."""
        self.width = maps[-1].large
        #: Equal for copies of one source, and for nothing else.
        self.classes = _first_sources(maps)
        copies: dict[int, list[int]] = {}
        for unit, source in enumerate(self.classes.tolist()):
            copies.setdefault(source, []).append(unit)
        self.least = len(copies)  # units without a source, and one of each source
        several = _spread([units for units in copies.values() if len(units) > 1], MOST_SOURCES)
        sampled: list[int] = []
        pairs: list[tuple[int, int]] = []
        for every in several:
            start, units = len(sampled), _spread(every, MOST_COPIES)
            sampled += units
            pairs += [(start + a, start + b) for b in range(len(units)) for a in range(b)]
        self.sampled = np.asarray(sampled, np.intp)
        #: Pairs of copies of one source as places in `sampled`, the earlier copy first: (pairs, 2).
        self.pairs = np.asarray(pairs, np.intp)


def _first_sources(maps: Sequence[AxisMap]) -> Indices:
    """For each index of the last map, a number for what it came from at first: another one for each such origin."""
    own = np.arange(maps[0].small)
    for axis_map in maps:
        source = np.asarray(axis_map.source_index, np.intp)
        own = np.where(source == NEW, own.max() + 1 + np.arange(axis_map.large), own[source])
    return np.unique(own, return_inverse=True)[1].astype(np.intp)


class _Side:
    """One stored dimension of a tensor: segments of axes, side by side or taking turns."""

    def __init__(self, segments: tuple[Axes, ...], interleaved: bool):
        self.segments, self.interleaved = segments, interleaved

    def units(self, axis: str, sizes: Mapping[str, int]) -> list[Indices]:
        """Where each unit of `axis` stands: (units, members, rest) for each segment that has it.

        The query heads that read a key/value head are what reads it: `members`, to be summed.
        """
        found = []
        for at, axes in zip(self._positions(sizes), self.segments, strict=True):
            if axis in axes:
                shaped = np.moveaxis(at.reshape([sizes[each] for each in axes]), axes.index(axis), 0)
                found.append(shaped.reshape(sizes[axis], 1, -1))
            elif axis == "kv_head" and axes[0] == "q_head":
                found.append(at.reshape(sizes[axis], sizes["q_head"] // sizes[axis], -1))
        return found

    def classes(
        self, summed: set[str], copied: Mapping[str, _Copied], sizes: Mapping[str, int], most: int
    ) -> tuple[Indices, Indices, int]:
        """At most about `most` indices that are looked at, the class of each, and how many classes.

        Copies of one source on the axes `summed` are of one class; else each index is one by itself.
        """
        total = sum(int(np.prod([sizes[axis] for axis in axes])) for axes in self.segments)
        label = np.empty(total, np.intp)
        offset = 0
        for at, axes in zip(self._positions(sizes), self.segments, strict=True):
            own = np.zeros(1, np.intp)
            for axis in axes:
                classes = copied[axis].classes if axis in summed else np.arange(sizes[axis])
                own = (own[:, None] * sizes[axis] + classes).ravel()
            label[at] = own + offset
            offset += int(own.max()) + 1
        labels = np.unique(label)
        kept = np.asarray(_spread(labels.tolist(), max(64, most)))
        keep = np.flatnonzero(np.isin(label, kept))
        return keep, np.searchsorted(kept, label[keep]), len(kept)

    def _positions(self, sizes: Mapping[str, int]) -> list[Indices]:
        """For each segment, where its indices stand, in the order of its axes."""
        lengths = [int(np.prod([sizes[axis] for axis in axes])) for axes in self.segments]
        if not self.interleaved:
            starts = np.cumsum([0, *lengths[:-1]])
            return [np.arange(start, start + n, dtype=np.intp) for start, n in zip(starts, lengths, strict=True)]
        turns = sizes[self.segments[0][0]]
        inner = [n // turns for n in lengths]
        stored = np.arange(sum(lengths), dtype=np.intp).reshape(turns, sum(inner))
        return [part.ravel() for part in np.split(stored, np.cumsum(inner)[:-1], axis=1)]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, the first among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _whole(axis: str, rows: Sequence[Measure]) -> Measure:
    return {
        "axis": axis,
        "layer": None,
        "width": sum(row["width"] for row in rows),
        "effective_width": sum(row["effective_width"] for row in rows),
        "least_width": sum(row["least_width"] for row in rows),
        "distance": sum(row["distance"] for row in rows) / len(rows),
        "least_distance": min(row["least_distance"] for row in rows),
    }


def whole_axes(rows: Sequence[Measure]) -> list[Measure]:
    """Of a measurement what is said of whole axes: few rows, whatever the depth."""
    return [row for row in rows if row["layer"] is None]


def warning(rows: Sequence[Measure]) -> str | None:
    """Of a measurement after some steps: a sentence about the axes whose copies have not parted at all, or None."""
    equal = [row for row in whole_axes(rows) if row["effective_width"] == row["least_width"]]
    if not equal:
        return None
    axes = ", ".join(f"{row['axis']} ({row['effective_width']:,} of {row['width']:,})" for row in equal)
    return (
        f"Copies are still within {TOLERANCE:.0%} of each other, so the extra width learns nothing. Effective width: "
        f"{axes}. Noise (snr_db) or an uneven split at growth parts them."
    )
