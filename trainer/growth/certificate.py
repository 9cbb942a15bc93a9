"""A proof without a forward pass: for each tensor, how far the child is from computing what the parent does.

The child's activations are E x wherever the parent's are x if W' E_in = E_out W for every matrix, with the conditions
on norms, heads and blocks that :mod:`.exactness` has checked on the maps. So

    residual = max |W' E_in - E_out W| / max |W|

at rounding level for every tensor, of a plan that `preserves`, proves the whole child. Only E is used: R and the noise
are what is being checked, and a single wrong entry shows, with its tensor's name.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.growth.plan import GrowthPlan, Origin
from trainer.growth.tensors import BLOCK_ENTRIES, Floats, Side, mean_of_rows, side_of, vector
from trainer.growth.weights import EPSILON, Tensor


def certificate(parent: Mapping[str, Tensor], child: Mapping[str, Tensor], plan: GrowthPlan) -> dict[str, float]:
    """The residual of each tensor of the child, by name.

    What a silent block writes is held to zero, and so is what reads a random input; a random block has nothing to be
    held to and is left out; so are random outputs, since they are seen by what reads them.
    """
    return {
        origin.new.name: residual(parent[origin.old.name], child[origin.new.name], origin, plan)
        for origin in plan.parameters()
        if origin.old is not None
    }


def residual(source: Tensor, grown: Tensor, origin: Origin, plan: GrowthPlan, *, only_copied: bool = False) -> float:
    """Of one tensor. `only_copied` passes over what reads a random input: is the rest what the plan copies?

    Copies that come from the block above are not held to anything: nothing is preserved there.
    """
    new, block = origin.new, origin.block
    size = largest(source) or 1.0
    if block.silent and new.writes_residual:
        found = largest(grown, new.silent)
    elif new.into:
        found = _matrix(source, grown, origin, plan, only_copied)
    else:
        found = _vector(source, grown, origin, plan)
    return found / size


def tolerance(dtype: str, plan: GrowthPlan) -> float:
    """The residual that rounding to a stored dtype may leave.

    Each of n copies is rounded by itself, at the size that noise gives it: eight standard deviations at most.
    """
    return EPSILON[dtype] * spread(plan) * (4 + 8 * plan.init.noise)


def spread(plan: GrowthPlan) -> float:
    """How many entries, at what size, stand for one of the parent's at most."""
    grown = (m for m in plan.maps.values() if not m.is_identity)
    return max((max(m.multiplicity) * max(1.0, *m.write) for m in grown), default=1.0)


def largest(tensor: Tensor, beside: float = 0.0) -> float:
    """The largest |entry - beside|."""
    rows = max(1, BLOCK_ENTRIES // max(1, *tensor.shape[1:], 1))
    found = 0.0
    for start in range(0, tensor.shape[0], rows):
        block = tensor[start : start + rows]
        if beside:
            block -= beside
        found = max(found, _size(block))
    return found


def _vector(source: Tensor, grown: Tensor, origin: Origin, plan: GrowthPlan) -> float:
    out = side_of(plan, origin.new.out, origin.new.interleaved)
    return _worst(grown[:] - vector(source, origin.new, plan), _judged(out, origin))


def _judged(out: Side, origin: Origin) -> NDArray[np.bool_]:
    """The outputs that are held to something."""
    return ~out.drawn if origin.following is None else ~out.drawn & (out.rank == 0)


def _matrix(source: Tensor, grown: Tensor, origin: Origin, plan: GrowthPlan, only_copied: bool) -> float:
    new = origin.new
    out, into = side_of(plan, new.out, new.interleaved), side_of(plan, (new.into,))
    write = np.where(out.new & ~out.averaged, 0.0, out.write)
    if new.into == ("vocab",):
        write = write * plan.table_scale
    stored = _in_first if new.in_first else _out_first
    return max(stored(source, grown, out, into, write, _judged(out, origin), only_copied))


def _out_first(
    source: Tensor, grown: Tensor, out: Side, into: Side, write: Floats, judged: NDArray[np.bool_], only_copied: bool
) -> list[float]:
    """Stored (out, in): blocks of outputs, all inputs."""
    copies, worst = into.copies, [0.0]
    mean = mean_of_rows(source) if out.averaged.any() else None
    weighted = bool((into.write[~into.new] != 1).any())
    some_drawn = not only_copied and bool(into.drawn.any())
    step = max(1, BLOCK_ENTRIES // len(into.source))
    for start in range(0, len(out.source), step):
        rows = slice(start, start + step)
        block = grown[rows]
        if some_drawn:
            worst.append(_worst(block[:, into.drawn], judged[rows]))
        if weighted:
            block *= into.write
        difference = copies.summed(block)  # W' E_in: (block of outputs, small inputs)
        expected = source[out.source[rows]]
        if mean is not None:
            expected[out.averaged[rows]] = mean
        if not (write[rows] == 1).all():
            expected *= write[rows, None]
        difference -= expected
        worst.append(_worst(difference, judged[rows]))
    return worst


def _in_first(
    source: Tensor, grown: Tensor, out: Side, into: Side, write: Floats, judged: NDArray[np.bool_], only_copied: bool
) -> list[float]:
    """Stored (in, out): blocks of the parent's inputs, each with all of its copies."""
    copies, worst = into.copies, [0.0]
    step = max(1, BLOCK_ENTRIES // len(out.source))
    random_inputs = np.flatnonzero(into.drawn & (not only_copied))
    for start in range(0, len(random_inputs), step):
        worst.append(_worst(grown[random_inputs[start : start + step]].T, judged))
    step = max(1, BLOCK_ENTRIES // (len(out.source) * int(copies.counts.max())))
    for start in range(0, into.small, step):
        starts, counts = copies.starts[start : start + step], copies.counts[start : start + step]
        members = copies.order[starts[0] : starts[-1] + counts[-1]]
        read = grown[members]
        if not (into.write[members] == 1).all():
            read *= into.write[members, None]
        if copies.several:
            read = np.add.reduceat(read, starts - starts[0], axis=0)  # (W' E_in)^T: (block of small inputs, outputs)
        block = source[start : start + step]
        expected = out.spread(block)
        if out.averaged.any():
            expected[:, out.averaged] = block.mean(axis=1, keepdims=True)
        if not (write == 1).all():
            expected = expected * write  # a new array: where nothing is spread, it is the parent's block
        read -= expected
        worst.append(_worst(read.T, judged))
    return worst


def _worst(differences: Floats, judged: NDArray[np.bool_]) -> float:
    """The largest |difference| over the outputs (first dimension) that are judged."""
    return _size(differences if judged.all() else differences[judged])


def _size(values: Floats) -> float:
    """The largest |entry|; NaN is the largest of all."""
    found = float(max(values.max(initial=0.0), -values.min(initial=0.0)))
    return float("inf") if np.isnan(values.max(initial=0.0)) else found
