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

from trainer.families import Parameter
from trainer.growth.depth import Block
from trainer.growth.plan import GrowthPlan
from trainer.growth.tensors import BLOCK_ENTRIES, Floats, Side, side_of
from trainer.growth.weights import EPSILON, Tensor


def certificate(parent: Mapping[str, Tensor], child: Mapping[str, Tensor], plan: GrowthPlan) -> dict[str, float]:
    """The residual of each tensor of the child, by name.

    What a silent block writes is held to zero, and so is what reads a random input; a random block has nothing to be
    held to and is left out; so are random outputs, since they are seen by what reads them.
    """
    residuals = {}
    for new, old, block in plan.parameters():
        if old is None:
            continue
        residuals[new.name] = residual(parent[old.name], child[new.name], new, block, plan)
    return residuals


def residual(
    source: Tensor, grown: Tensor, new: Parameter, block: Block, plan: GrowthPlan, *, only_copied: bool = False
) -> float:
    """Of one tensor. `only_copied` passes over what reads a random input: is the rest what the plan copies?"""
    size = largest(source) or 1.0
    if block.silent and new.writes_residual:
        found = largest(grown)
    elif new.into:
        found = _matrix(source, grown, new, plan, only_copied)
    else:
        found = _vector(source, grown, new, plan)
    source.release()
    grown.release()
    return found / size


def tolerance(dtype: str, plan: GrowthPlan) -> float:
    """The residual that rounding to a stored dtype may leave.

    Each of n copies is rounded by itself, at the size that noise gives it: eight standard deviations at most.
    """
    copies = max(max(axis_map.multiplicity) for axis_map in plan.maps.values())
    return EPSILON[dtype] * copies * (4 + 8 * plan.init.noise)


def largest(tensor: Tensor) -> float:
    """The largest |entry|."""
    rows = max(1, BLOCK_ENTRIES // max(1, *tensor.shape[1:], 1))
    blocks = (tensor[start : start + rows] for start in range(0, tensor.shape[0], rows))
    return max((float(np.abs(block).max(initial=0.0)) for block in blocks), default=0.0)


def _vector(source: Tensor, grown: Tensor, new: Parameter, plan: GrowthPlan) -> float:
    out = side_of(plan, new.out, new.interleaved)
    expected = source[:][out.source]
    if new.kind == "bias" or new.rescales:
        expected *= out.write
    elif new.final_norm:
        expected *= plan.final_norm_scale
    expected[out.new] = 0.0
    return _worst(grown[:] - expected, ~out.drawn)


def _matrix(source: Tensor, grown: Tensor, new: Parameter, plan: GrowthPlan, only_copied: bool) -> float:
    out, into = side_of(plan, new.out, new.interleaved), side_of(plan, (new.into,))
    stored = _in_first if new.in_first else _out_first
    return max(stored(source, grown, out, into, only_copied))


def _out_first(source: Tensor, grown: Tensor, out: Side, into: Side, only_copied: bool) -> list[float]:
    """Stored (out, in): blocks of outputs, all inputs."""
    copies, worst = into.copies, [0.0]
    step = max(1, BLOCK_ENTRIES // len(into.source))
    for start in range(0, len(out.source), step):
        rows = slice(start, start + step)
        block = grown[rows]
        if not only_copied:
            worst.append(_worst(block[:, into.drawn], ~out.drawn[rows]))
        read = copies.summed(block * into.write)  # W' E_in: (block of outputs, small inputs)
        expected = source[out.source[rows]] * np.where(out.new, 0.0, out.write)[rows, None]
        worst.append(_worst(read - expected, ~out.drawn[rows]))
    return worst


def _in_first(source: Tensor, grown: Tensor, out: Side, into: Side, only_copied: bool) -> list[float]:
    """Stored (in, out): blocks of the parent's inputs, each with all of its copies."""
    copies, worst = into.copies, [0.0]
    step = max(1, BLOCK_ENTRIES // len(out.source))
    random_inputs = np.flatnonzero(into.drawn & (not only_copied))
    for start in range(0, len(random_inputs), step):
        worst.append(_worst(grown[random_inputs[start : start + step]].T, ~out.drawn))
    step = max(1, BLOCK_ENTRIES // (len(out.source) * int(copies.counts.max())))
    for start in range(0, into.small, step):
        starts, counts = copies.starts[start : start + step], copies.counts[start : start + step]
        members = copies.order[starts[0] : starts[-1] + counts[-1]]
        read = grown[members] * into.write[members, None]
        read = np.add.reduceat(read, starts - starts[0], axis=0)  # (W' E_in)^T: (block of small inputs, outputs)
        expected = source[start : start + step][:, out.source] * np.where(out.new, 0.0, out.write)
        worst.append(_worst((read - expected).T, ~out.drawn))
    return worst


def _worst(differences: Floats, judged: NDArray[np.bool_]) -> float:
    """The largest |difference| over the outputs (first dimension) that are judged; NaN is the worst of all."""
    held = np.abs(differences[judged])
    return float("inf") if np.isnan(held).any() else float(held.max(initial=0.0))
