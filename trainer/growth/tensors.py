"""One tensor of the child from one of the parent: W' = E_out W R_in + N (I - E_in R_in), a block of rows at a time.

Entry (o, i) of the child, by what its two indices are (an index with a source is *old*):

    o         i     entry
    old, mean old   E_out W R_in, shared among the copies of an input as `split` says, plus noise that sums to zero
    old, mean new   zero or drawn, as the input's `new_read` says
    new       any   zero or drawn, as the output's `new_write` says

Everything is computed in float64, as stored: (out, in), or (in, out) where the architecture keeps it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.families import Axes, Parameter
from trainer.growth.maps import NEW, product
from trainer.growth.plan import GrowthPlan, Origin
from trainer.growth.weights import Array, Tensor

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
    averaged: NDArray[np.bool_]  # new, and written with the mean of what is old
    drawn_from: NDArray[np.bool_]  # new, and read at random
    write: Floats
    read: Floats

    @cached_property
    def unchanged(self) -> bool:
        return self.small == len(self.source) and bool((self.source == np.arange(self.small)).all())

    def spread(self, block: Array) -> Array:
        """A block's columns (rows, small) as the child has them (rows, large); those of new ones are of no meaning."""
        if self.unchanged:
            return block
        if self._runs is None:
            return block.take(self.source, axis=1)
        wide = np.empty((len(block), len(self.source)), block.dtype)
        for start, stop, source in self._runs:
            wide[:, start:stop] = block[:, source : source + stop - start]
        return wide

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]] | None:
        """Columns that lie side by side in the parent too: from, to, source of the first. None where they are short."""
        cuts = np.flatnonzero(np.diff(self.source) != 1) + 1
        starts, stops = [0, *cuts.tolist()], [*cuts.tolist(), len(self.source)]
        if 16 * len(starts) > len(self.source):
            return None
        return [(start, stop, int(self.source[start])) for start, stop in zip(starts, stops, strict=True)]

    @cached_property
    def copies(self) -> Copies:
        return Copies(self)

    @cached_property
    def rank(self) -> NDArray[np.intp]:
        """Which of the copies of its source each index is: 0 for the first; 0 where new."""
        copies = self.copies
        rank = np.zeros(len(self.source), np.intp)
        rank[copies.order] = np.arange(len(copies.order)) - np.repeat(copies.starts, copies.counts)
        return rank


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

    @cached_property
    def turns(self) -> list[NDArray[np.intp] | slice] | None:
        """The first copy of every small index, then the second of each, and so on; None where some have more."""
        n = int(self.counts[0])
        if (self.counts != n).any():
            return None
        return [_progression(members) for members in self.order.reshape(-1, n).T]

    def summed(self, columns: Floats) -> Floats:
        """Sums over the copies of each small index: (rows, large) to (rows, small)."""
        if self.turns is None:
            return np.add.reduceat(columns.take(self.order, axis=1), self.starts, axis=1)
        first, *others = (columns[:, turn] for turn in self.turns)
        if not others:
            return first
        total = first + others[0]
        for other in others[1:]:
            total += other
        return total


def _progression(indices: NDArray[np.intp]) -> NDArray[np.intp] | slice:
    """The same as a slice, where it is one: many times as fast to take."""
    if len(indices) < 2:
        return indices
    step = int(indices[1] - indices[0])
    if step < 1 or (np.diff(indices) != step).any():
        return indices
    return slice(int(indices[0]), int(indices[-1]) + 1, step)


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
        drawn=(new & np.concatenate([_is(m.new_write, "random", m.large) for m in maps]))[stored],
        averaged=(new & np.concatenate([_is(m.new_write, "mean", m.large) for m in maps]))[stored],
        drawn_from=(new & np.concatenate([_is(m.new_read, "random", m.large) for m in maps]))[stored],
        write=np.concatenate([np.asarray(m.write, np.float64) for m in maps])[stored],
        read=np.concatenate([np.asarray(m.read, np.float64) for m in maps])[stored],
    )


def _is(fills: str | Sequence[str], fill: str, large: int) -> NDArray[np.bool_]:
    return np.broadcast_to(np.asarray(fills) == fill, large)


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


def grown(
    old: Tensor, origin: Origin, plan: GrowthPlan, rng: np.random.Generator, following: Tensor | None = None
) -> Iterator[Floats]:
    """The child's parameter of `origin` from the parent's tensors, in blocks of stored rows."""
    if origin.block.silent and origin.new.writes_residual:
        yield from silent(origin.new)
    elif origin.new.into:
        yield from _matrix(old, origin.new, plan, rng, following)
    else:
        yield vector(old, origin.new, plan, following)


def silent(new: Parameter) -> Iterator[Floats]:
    """A parameter that keeps its block from writing anything: zeros, or a gain of zero."""
    if not new.into:
        yield np.full(new.shape, new.silent)
        return
    for rows in row_blocks(new.shape):
        yield np.full((rows.stop - rows.start, new.shape[1]), new.silent)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, BLOCK_ENTRIES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


#: The axes before the norms of queries and keys, by those after.
_BEFORE_NORM = {"q_normed": "q_dim", "k_normed": "k_dim"}


def given_to_norm(gain: Parameter) -> tuple[Axes, ...]:
    """The axes of what is normed, where the gain `rescales`: they lead to its own."""
    return tuple(tuple(_BEFORE_NORM.get(axis, axis) for axis in axes) for axes in gain.out)


def vector(old: Tensor, new: Parameter, plan: GrowthPlan, following: Tensor | None = None) -> Floats:
    """A bias or a norm's gain or bias, whole."""
    out = side_of(plan, new.out, new.interleaved)
    values = old[:][out.source]
    if following is not None:
        values = np.where(out.rank > 0, following[:][out.source], values)
    if new.from_one:
        values = values + 1.0
    if new.kind == "norm_gain":
        # A gain acts on each channel by itself, so copies have their source's, whatever was written there.
        if new.rescales:
            values = values * (out.write / side_of(plan, given_to_norm(new), new.interleaved).write)
    else:
        values = values * out.write
    if new.final_norm:
        values = values * plan.final_norm_scale
    values[out.new] = 1.0 if new.kind == "norm_gain" else 0.0
    if out.averaged.any() and new.kind == "bias":
        values[out.averaged] = (old[:].mean() * out.write)[out.averaged]
    return values - 1.0 if new.from_one else values


def _matrix(
    old: Tensor, new: Parameter, plan: GrowthPlan, rng: np.random.Generator, following: Tensor | None
) -> Iterator[Floats]:
    out, into = side_of(plan, new.out, new.interleaved), side_of(plan, (new.into,))
    rows, columns = (into, out) if new.in_first else (out, into)
    write, read = np.where(out.new & ~out.averaged, 1.0, out.write), into.read
    if new.into == ("vocab",):
        write = write * plan.table_scale
    split = plan.split if into.copies.several else "even"
    share = Shares(into, out, split)
    if split != "even":
        read = np.ones_like(read)  # the shares have it
    row_scale, column_scale = (read, write) if new.in_first else (write, read)
    noise = plan.init.noise if into.copies.several else 0.0
    some_new = bool(rows.new.any() or columns.new.any())
    # Streams of their own, each drawn row by row, so that the size of a block changes nothing.
    for_noise, for_new, for_shares = rng.spawn(3)
    averaged = bool(out.averaged.any())
    mean = mean_of_rows(old) if averaged and not new.in_first else None
    shares_apart = Apart(into, len(out.source), _shares_of_copies, for_shares)

    def copied(part: slice) -> Floats:
        """E_out W R_in with its shares, before what is drawn."""
        values = old[rows.source[part]]
        if averaged and new.in_first:
            of_each_row = values.mean(axis=1, keepdims=True)
        if mean is not None:
            values[rows.averaged[part]] = mean
        if following is not None and not new.in_first:
            above = rows.rank[part] > 0
            values[above] = following[rows.source[part][above]]
        values = columns.spread(values)
        if following is not None and new.in_first:
            above = columns.rank > 0
            values[:, above] = following[rows.source[part]].take(columns.source[above], axis=1)
        if averaged and new.in_first:
            values[:, columns.averaged] = of_each_row
        for scale in (row_scale[part, None], column_scale):
            if not (scale == 1).all():
                values *= scale
        if split == "diagonal":
            values *= share.of(slice(None), part, for_shares).T if new.in_first else share.of(part, None, for_shares)
        elif split == "uneven":
            values *= shares_apart.rows(part) if new.in_first else share.of(part, None, for_shares)
        return values

    if noise and new.in_first:
        size = noise * _root_mean_square(copied(part)[~into.new[part]] for part in row_blocks(new.shape))
        noise_apart = Apart(into, len(out.source), _noise_of_copies, for_noise)
    for part in row_blocks(new.shape):
        values = copied(part)
        if noise and new.in_first:
            drawn = noise_apart.rows(part)
            drawn *= size
            values += drawn
        elif noise:
            _add_noise(values, into, noise, for_noise)
        if some_new:
            along_rows, along_columns = (part, None), (slice(None),)
            o, i = (along_columns, along_rows) if new.in_first else (along_rows, along_columns)
            drawn = for_new.normal(0, plan.init.init_range, values.shape)
            made = np.where(into.new[i], np.where(into.drawn_from[i], drawn, 0.0), values)
            values = np.where((out.new & ~out.averaged)[o], np.where(out.drawn[o], drawn, 0.0), made)
        yield values


def _root_mean_square(blocks: Iterable[Floats]) -> Floats:
    """Of each column, over the rows of all blocks."""
    total, rows = np.zeros(1), 0
    for block in blocks:
        total = total + np.einsum("ij,ij->j", block, block)
        rows += len(block)
    return np.sqrt(total / rows)


class Apart:
    """What is drawn for a matrix stored (in, out), where the copies of an input depend on one another and lie apart.

    Drawn for CHUNK of the parent's inputs at a time, with all of their copies, from a stream of the chunk's own: so
    any block of rows can be made by itself, and memory is for a chunk, at the price of drawing it again for other rows.
    `draw(rng, write, counts, n)` gives (copies of all inputs side by side, n).
    """

    CHUNK = 16

    def __init__(self, into: Side, n_out: int, draw: Draw, rng: np.random.Generator):
        self.into, self.n_out, self.draw = into, n_out, draw
        self.key = rng.integers(2**32, size=4).tolist()

    def rows(self, part: slice) -> Floats:
        """(rows, outputs); rows without a source are ones."""
        copies, rows = self.into.copies, np.ones((part.stop - part.start, self.n_out))
        for chunk in np.unique(self.into.source[part][~self.into.new[part]] // self.CHUNK).tolist():
            inputs = slice(chunk * self.CHUNK, (chunk + 1) * self.CHUNK)
            counts = copies.counts[inputs]
            members = copies.order[copies.starts[inputs.start] :][: counts.sum()]
            wanted = (part.start <= members) & (members < part.stop)
            drawn = self.draw(np.random.default_rng([*self.key, chunk]), self.into.write[members], counts, self.n_out)
            rows[members[wanted] - part.start] = drawn[wanted]
        return rows


Draw = Callable[[np.random.Generator, Floats, NDArray[np.intp], int], Floats]


def _noise_of_copies(rng: np.random.Generator, write: Floats, counts: NDArray[np.intp], n: int) -> Floats:
    """Of variance one, and nothing in the sum over an input's copies of what each writes; zero where there is one."""
    if (counts == 2).all() and (write == 1).all():  # one free direction: what one copy gets the other loses
        one: Floats = rng.standard_normal((len(counts), 1, n))
        return np.concatenate([one, -one], axis=1).reshape(-1, n)
    return _unseen(rng.standard_normal((len(write), n)), write, counts, axis=0)


def _unseen(drawn: Floats, write: Floats, counts: NDArray[np.intp], axis: Literal[0, 1]) -> Floats:
    """Normal numbers for copies side by side along `axis`, less their projection on what the copies of each write."""
    write, starts = (write[:, None] if axis == 0 else write), np.concatenate([[0], np.cumsum(counts)[:-1]])
    along = np.add.reduceat(drawn * write, starts, axis=axis) / np.add.reduceat(write * write, starts, axis=0)
    drawn -= np.repeat(along, counts, axis=axis) * write
    # That took one direction in n, and all of it where there is one copy.
    left = np.repeat(1 / np.sqrt(np.where(counts > 1, 1 - 1 / counts, np.inf)), counts)
    drawn *= left[:, None] if axis == 0 else left
    return drawn


def _shares_of_copies(rng: np.random.Generator, write: Floats, counts: NDArray[np.intp], n: int) -> Floats:
    """Uniform over all with sum_j share_j write_j = 1: Dirichlet(1, ..., 1), as exponentials over their sum."""
    drawn = rng.exponential(size=(len(write), n))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    drawn /= np.repeat(np.add.reduceat(drawn, starts, axis=0), counts, axis=0)
    drawn /= write[:, None]
    return drawn


def mean_of_rows(tensor: Tensor) -> Floats:
    """The mean over a stored matrix's rows."""
    total = np.zeros(tensor.shape[1])
    for rows in row_blocks(tensor.shape):
        total += tensor[rows].sum(axis=0)
    return total / tensor.shape[0]


class Shares:
    """How much of an input each of its copies gives each output: sum_j share_j write_j = 1 over the copies j."""

    def __init__(self, into: Side, out: Side, split: str):
        self.into, self.out, self.split = into, out, split

    def of(self, outputs: slice, inputs: slice | None, rng: np.random.Generator) -> Floats:
        """(outputs, inputs); None: all inputs, which uneven shares need."""
        into, copies = self.into, self.into.copies
        at = inputs or slice(None)
        known = np.where(into.new[at], 1.0, into.write[at])  # what reads a NEW index is overwritten afterwards
        if self.split == "diagonal":
            counts = copies.counts[into.source[at]]
            chosen = self.out.rank[outputs, None] % counts == into.rank[at]
            return np.where(chosen | into.new[at], 1 / known, 0.0)
        # As _shares_of_copies. A share depends on nothing but its row, so rows may come in blocks.
        n_outputs = len(self.out.source[outputs])
        drawn = rng.exponential(size=(n_outputs, len(copies.order)))
        drawn /= np.repeat(np.add.reduceat(drawn, copies.starts, axis=1), copies.counts, axis=1)
        shares = np.ones((n_outputs, len(into.source)))
        shares[:, copies.order] = drawn
        return shares / known


def _add_noise(matrix: Floats, into: Side, noise: float, rng: np.random.Generator) -> None:
    """Add to each row of `matrix` (out, in), in place, what no parent's activation can see.

    Over the copies j of an input, sum_j noise_j write_j is zero; its root mean square is `noise` times that of the row.
    """
    copies = into.copies
    old = matrix[:, copies.order] if into.new.any() else matrix
    size = noise * np.sqrt(np.einsum("ij,ij->i", old, old) / old.shape[1])[:, None]
    if copies.turns is not None and (into.write[copies.order] == 1).all():
        n = len(copies.turns)
        if n == 2:  # one free direction: what one copy gets the other loses
            drawn = rng.standard_normal((len(matrix), into.small))
            drawn *= size
            matrix[:, copies.turns[0]] += drawn
            matrix[:, copies.turns[1]] -= drawn
            return
        each = rng.standard_normal((len(matrix), n, into.small))
        each -= each.mean(axis=1, keepdims=True)
        each *= (size / np.sqrt(1 - 1 / n))[:, None]  # taking the mean away took one direction in n
        for i, turn in enumerate(copies.turns):
            matrix[:, turn] += each[:, i]
        return
    drawn = rng.standard_normal((len(matrix), len(copies.order)))  # the copies of each input side by side
    drawn = _unseen(drawn, into.write[copies.order], copies.counts, axis=1)
    drawn *= size
    matrix[:, copies.order] += drawn
