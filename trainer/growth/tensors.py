"""One tensor of the child from one of the parent: W' = E_out W R_in + N (I - E_in R_in), a block of rows at a time.

Entry (o, i) of the child, by what its two indices are (an index with a source is *old*):

    o     i     entry
    old   old   E_out W R_in, plus noise that sums to zero over the copies of an input
    old   new   zero or drawn, as the input's `new_read` says
    new   any   zero or drawn, as the output's `new_write` says

Everything is computed in float64, as stored: (out, in), or (in, out) where the architecture keeps it so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from trainer.families import Axes, Parameter
from trainer.growth.maps import NEW, product
from trainer.growth.plan import GrowthPlan
from trainer.growth.weights import Tensor

Floats = NDArray[np.float64]

#: Rows are taken together until they make about this many entries.
BLOCK_ENTRIES = 1 << 19


@dataclass(frozen=True)
class Side:
    """An axis map laid out along one dimension of a stored tensor, its segments side by side."""

    small: int
    source: NDArray[np.intp]  # where `new`, 0
    new: NDArray[np.bool_]
    drawn: NDArray[np.bool_]  # new, and written at random
    drawn_from: NDArray[np.bool_]  # new, and read at random
    write: Floats
    read: Floats

    @cached_property
    def unchanged(self) -> bool:
        return self.small == len(self.source) and bool((self.source == np.arange(self.small)).all())

    @cached_property
    def copies(self) -> Copies:
        return Copies(self)


class Copies:
    """The large indices with a source, those of one source together.

    `order[starts[i]:starts[i] + counts[i]]` are the copies of small index i.
    """

    def __init__(self, side: Side):
        self.large = len(side.source)
        old = np.flatnonzero(~side.new)
        self.order = old[np.argsort(side.source[old], kind="stable")]
        self.counts = np.bincount(side.source[old], minlength=side.small)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    @cached_property
    def several(self) -> bool:
        return bool((self.counts > 1).any())

    def summed(self, columns: Floats) -> Floats:
        """Sums over the copies of each small index: (rows, large) to (rows, small)."""
        together = self.side_by_side(columns)
        n = int(self.counts[0])
        if (self.counts == n).all():
            return together.reshape(len(columns), -1, n).sum(axis=2) if n > 1 else together
        return np.add.reduceat(together, self.starts, axis=1)

    def side_by_side(self, columns: Floats) -> Floats:
        """The columns with a source, those of one source together."""
        return columns if self._in_order else columns.take(self.order, axis=1)

    @cached_property
    def _in_order(self) -> bool:
        return len(self.order) == self.large and bool((self.order == np.arange(self.large)).all())

    @cached_property
    def back(self) -> NDArray[np.intp] | None:
        """Where each large index stands in `order`; None where some have no source."""
        return np.argsort(self.order) if len(self.order) == self.large else None


def side_of(plan: GrowthPlan, segments: tuple[Axes, ...], interleaved: bool = False) -> Side:
    """The maps of `segments` along one dimension: axes of a segment multiply, segments follow one another.

    Those of an `interleaved` parameter then take turns along their first axes, as the parameter is stored.
    """
    maps = [reduce(product, [plan.maps[axis] for axis in axes]) for axes in segments]
    larges = [m.large for m in maps]
    source = np.concatenate([np.asarray(m.source_index, np.intp) for m in maps])
    new = source == NEW
    source += np.repeat(np.cumsum([0, *(m.small for m in maps[:-1])]), larges)
    source[new] = 0
    stored: NDArray[np.intp] | slice = slice(None)
    if interleaved:
        firsts = [plan.maps[axes[0]] for axes in segments]
        in_parent = _taking_turns([m.small for m in firsts], [m.small for m in maps])
        stored = _taking_turns([m.large for m in firsts], larges)
        source = np.argsort(in_parent)[source]  # where the parent stores it
    return Side(
        small=sum(m.small for m in maps),
        source=source[stored],
        new=new[stored],
        drawn=(new & np.repeat([m.new_write == "random" for m in maps], larges))[stored],
        drawn_from=(new & np.repeat([m.new_read == "random" for m in maps], larges))[stored],
        write=np.concatenate([np.asarray(m.write, np.float64) for m in maps])[stored],
        read=np.concatenate([np.asarray(m.read, np.float64) for m in maps])[stored],
    )


def _taking_turns(turns: list[int], sizes: list[int]) -> NDArray[np.intp]:
    """For each stored index, the index if segments of these sizes lay one after the other; each has as many turns."""
    assert len(set(turns)) == 1, "interleaved segments have first axes of one size"
    starts = np.cumsum([0, *sizes[:-1]])
    pieces = [np.arange(s, s + n, dtype=np.intp).reshape(turns[0], -1) for s, n in zip(starts, sizes, strict=True)]
    return np.concatenate(pieces, axis=1).ravel()


def fresh(parameter: Parameter, init_range: float, rng: np.random.Generator) -> Iterator[Floats]:
    """A parameter of a new block: N(0, init_range) for matrices, zero for biases, one for gains."""
    if parameter.fresh == "normal":
        for rows in row_blocks(parameter.shape):
            yield rng.normal(0, init_range, (rows.stop - rows.start, parameter.shape[1]))
    else:
        yield np.full(parameter.shape, 1.0 if parameter.fresh == "ones" else 0.0)


def grown(old: Tensor, new: Parameter, plan: GrowthPlan, rng: np.random.Generator) -> Iterator[Floats]:
    """The parameter `new` of the child from the parent's tensor, in blocks of stored rows."""
    if new.into:
        yield from _matrix(old, new, plan, rng)
    else:
        yield _vector(old, new, plan)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, BLOCK_ENTRIES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _vector(old: Tensor, new: Parameter, plan: GrowthPlan) -> Floats:
    out = side_of(plan, new.out, new.interleaved)
    values = old[:][out.source]
    if new.kind == "bias" or new.rescales:
        values = values * out.write  # other norms act on each channel by itself, so their copies are as they were
    elif new.final_norm:
        values = values * plan.final_norm_scale
    values[out.new] = 1.0 if new.fresh == "ones" else 0.0
    return values


def _matrix(old: Tensor, new: Parameter, plan: GrowthPlan, rng: np.random.Generator) -> Iterator[Floats]:
    out, into = side_of(plan, new.out, new.interleaved), side_of(plan, (new.into,))
    rows, columns = (into, out) if new.in_first else (out, into)
    row_scale, column_scale = (into.read, out.write) if new.in_first else (out.write, into.read)
    noise = plan.init.noise if into.copies.several else 0.0
    some_new = bool(rows.new.any() or columns.new.any())
    # Two streams, each drawn row by row, so that the size of a block changes nothing.
    for_noise, for_new = rng.spawn(2)
    # Noise sums to zero over the copies of an input, which must be at hand together: stored (in, out), all rows.
    together = noise and new.in_first
    for part in [slice(0, new.shape[0])] if together else row_blocks(new.shape):
        values = old[rows.source[part]]
        if not columns.unchanged:
            values = values.take(columns.source, axis=1)
        for scale in (row_scale[part, None], column_scale):
            if not (scale == 1).all():
                values *= scale
        if noise:
            by_output = values.T if new.in_first else values
            _add_noise(by_output, into.copies, noise, for_noise)
        if some_new:
            along_rows, along_columns = (part, None), (slice(None),)
            o, i = (along_columns, along_rows) if new.in_first else (along_rows, along_columns)
            drawn = for_new.normal(0, plan.init.init_range, values.shape)
            read = np.where(into.new[i], np.where(into.drawn_from[i], drawn, 0.0), values)
            values = np.where(out.new[o], np.where(out.drawn[o], drawn, 0.0), read)
        yield values


def _add_noise(matrix: Floats, copies: Copies, noise: float, rng: np.random.Generator) -> None:
    """Add to each row of `matrix` (out, in), in place, what no parent's activation can see.

    Its mean over the copies of an input is zero, its root mean square `noise` times that of the row.
    """
    sources = len(copies.counts)
    drawn = rng.standard_normal((len(matrix), len(copies.order)))  # the copies of each input side by side
    n = int(copies.counts[0])
    if (copies.counts == n).all():
        grouped = drawn.reshape(len(matrix), sources, n)
        grouped -= grouped.mean(axis=2, keepdims=True)
    else:
        drawn -= np.repeat(np.add.reduceat(drawn, copies.starts, axis=1) / copies.counts, copies.counts, axis=1)
    # Taking the mean away took 1 / n of the power, and all of it where there is one copy.
    kept = np.where(copies.counts > 1, 1 - 1 / copies.counts, 1.0)
    drawn *= np.repeat(noise / np.sqrt(kept), copies.counts)
    drawn *= np.sqrt(np.mean(copies.side_by_side(matrix) ** 2, axis=1, keepdims=True))
    if copies.back is None:
        matrix[:, copies.order] += drawn
    else:
        matrix += drawn.take(copies.back, axis=1)
