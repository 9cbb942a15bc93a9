"""How one axis grows: a write map E (large x small) and a read map R (small x large) with R E = I.

Where the parent has an activation x on an axis, the child has E x; what reads it uses R. A logical matrix W (out x in)
becomes W' = E_out W R_in + N (I - E_in R_in), with any N, and the child computes what the parent does if
W' E_in = E_out W for every matrix and the norms and the softmax agree (:mod:`trainer.growth.exactness`).

Every map here is a *selection with coefficients*: each large index has one source or none, so E and R are kept as
three sequences and never as matrices. Torch-free and numpy-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import sqrt
from typing import Literal, TypeVar

#: In `source_index`: this large index has no source.
NEW = -1

Fill = Literal["zero", "random"]
#: `mean`: the mean of all old channels, which a LayerNorm that follows takes away again.
WriteFill = Literal["zero", "random", "mean"]

_F = TypeVar("_F", bound=str)


@dataclass(frozen=True)
class AxisMap:
    """One axis from `small` to `large` indices.

    source_index  for each large index, the small index that it copies, or NEW
    write         for each large index j, E[j, source_index[j]]; of no meaning where NEW
    read          for each large index j, R[source_index[j], j]; likewise
    new_write     what is written to a NEW index: zero, random entries (with zero biases and unit gains), or the mean
    new_read      the entries that read a NEW index

    Nothing of a NEW index is seen as long as one of the two is zero; with both at zero, neither would ever learn.
    """

    small: int
    large: int
    source_index: Sequence[int]
    write: Sequence[float]
    read: Sequence[float]
    new_write: WriteFill | Sequence[WriteFill] = "zero"  # one for all, or one for each large index
    new_read: Fill | Sequence[Fill] = "random"

    def __post_init__(self) -> None:
        assert len(self.source_index) == len(self.write) == len(self.read) == self.large

    @cached_property
    def multiplicity(self) -> Sequence[int]:
        """For each small index, how many large ones copy it."""
        if self.is_identity:
            return (1,) * self.small
        counts = Counter(self.source_index)
        return tuple(counts[i] for i in range(self.small))

    @cached_property
    def is_identity(self) -> bool:
        """Nothing changes on this axis."""
        return self.small == self.large and (
            isinstance(self.source_index, range)
            or (all(i == j for i, j in enumerate(self.source_index)) and {*self.write, *self.read} == {1.0})
        )

    @property
    def has_new(self) -> bool:
        return not isinstance(self.source_index, range) and NEW in self.source_index

    @staticmethod
    def fill_at(at: int, fills: _F | Sequence[_F]) -> _F:
        """What is at large index `at`, of one fill for all or one for each."""
        return fills if isinstance(fills, str) else fills[at]

    @cached_property
    def power(self) -> Sequence[float]:
        """For each small index, the sum of its squared writes: the diagonal of E^T E."""
        if self.is_identity:
            return (1.0,) * self.small
        total = [0.0] * self.small
        for source, write in zip(self.source_index, self.write, strict=True):
            if source != NEW:
                total[source] += write * write
        return tuple(total)

    @cached_property
    def has_unit_writes(self) -> bool:
        """What has a source is written as it is."""
        return all(w == 1 for s, w in zip(self.source_index, self.write, strict=True) if s != NEW)

    @cached_property
    def reads_what_it_wrote(self) -> bool:
        """R E = I."""
        if self.is_identity:
            return True
        total = [0.0] * self.small
        for source, write, read in zip(self.source_index, self.write, self.read, strict=True):
            if source != NEW:
                total[source] += write * read
        return all(abs(t - 1) < 1e-12 for t in total)


@lru_cache(maxsize=64)
def identity(size: int) -> AxisMap:
    """E = R = I."""
    ones = (1.0,) * size
    return AxisMap(size, size, range(size), ones, ones)


def copies(small: int, sources: Sequence[int]) -> AxisMap:
    """Large index j copies `sources[j]`; readers share each value evenly among its copies."""
    counts = Counter(sources)
    return AxisMap(small, len(sources), tuple(sources), (1.0,) * len(sources), tuple(1 / counts[s] for s in sources))


def weighted(small: int, sources: Sequence[int]) -> AxisMap:
    """Copies of unlike number whose squares add up alike: a_j = sqrt(large / small / count), E^T E = (large / small) I.

    So a mean square over the axis stays what it was, at any ratio. Readers use R = small / large E^T.
    """
    counts, ratio = Counter(sources), len(sources) / small
    write = tuple(sqrt(ratio / counts[s]) for s in sources)
    return AxisMap(small, len(sources), tuple(sources), write, tuple(w / ratio for w in write))


def cyclic(small: int, large: int) -> tuple[int, ...]:
    """0 1 2 0 1: sources of `large` indices that take turns."""
    return tuple(j % small for j in range(large))


def tile(small: int, times: int) -> AxisMap:
    """0 1 2 0 1 2: whole copies one after the other."""
    return identity(small) if times == 1 else copies(small, tuple(range(small)) * times)


def place(
    small: int,
    large: int,
    at: Sequence[int],
    *,
    scale: float = 1.0,
    new_write: WriteFill = "zero",
    new_read: Fill = "random",
) -> AxisMap:
    """Small index i goes to `at[i]`, written times `scale`; every other large index is NEW."""
    sources = [NEW] * large
    for i, j in enumerate(at):
        sources[j] = i
    return AxisMap(small, large, tuple(sources), (scale,) * large, (1 / scale,) * large, new_write, new_read)


def corner(small: int, large: int) -> AxisMap:
    """0 1 2 - - -: the old indices first, then new ones, written and read at random."""
    return identity(small) if small == large else place(small, large, range(small), new_write="random")


def product(outer: AxisMap, inner: AxisMap) -> AxisMap:
    """The map of two axes laid out in one dimension, `outer` outermost: E = E_outer (x) E_inner.

    What is NEW on the outer axis is filled as that says, whatever the inner one does.
    """
    if outer.is_identity and inner.is_identity:
        return identity(outer.small * inner.small)
    sources, write, read = [], [], []
    new_write: list[WriteFill] = []
    new_read: list[Fill] = []
    for i, (outer_source, outer_write, outer_read) in enumerate(
        zip(outer.source_index, outer.write, outer.read, strict=True)
    ):
        for j, (inner_source, inner_write, inner_read) in enumerate(
            zip(inner.source_index, inner.write, inner.read, strict=True)
        ):
            new = NEW in (outer_source, inner_source)
            sources.append(NEW if new else outer_source * inner.small + inner_source)
            write.append(outer_write * inner_write)
            read.append(outer_read * inner_read)
            filled, at = (outer, i) if outer_source == NEW else (inner, j)
            new_write.append(filled.fill_at(at, filled.new_write))
            new_read.append(filled.fill_at(at, filled.new_read))
    return AxisMap(
        outer.small * inner.small,
        outer.large * inner.large,
        tuple(sources),
        tuple(write),
        tuple(read),
        new_write=tuple(new_write),
        new_read=tuple(new_read),
    )
