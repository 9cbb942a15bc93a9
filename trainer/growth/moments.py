"""What training carries over a growth beside the weights: AdamW's moments, and rates that suit copied inputs.

Where the parent has an activation x the child has E x, and where it has a gradient g with respect to x the child has
R^T g: what reads n copies reads each at 1 / n. So the gradient of a matrix W' = E_out W R_in is

    G' = R_out^T G E_in^T      hence      m' = R_out^T m E_in^T,    v' = (R_out^2)^T v (E_in^2)^T

with squares entry by entry, since AdamW's moments are means of G and of its square. A tensor that growth also
multiplied by c has its gradient divided by c. Two things follow for a whole growth with even shares and no noise:

* with moments grown so and the rates of :func:`lr_scales`, AdamW takes the steps that it would have taken with the
  parent: W' stays E_out W R_in, and the losses are those of the parent going on (without clipping of gradients, whose
  norm is another one in the child);
* with one rate for all it does not: an entry of W' moves by about lr whatever its gradient, and what W' computes sums
  over n copies of its input, so it moves n times as fast. This is the 1 / width rule of muP (Yang et al. 2022,
  https://arxiv.org/abs/2203.03466). A comparison that ignores it compares learning rates.

For shares that are not even, noise, channels that hold a mean, and rules that preserve nothing, the maps above are an
approximation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from trainer.families import Parameter, get_family
from trainer.growth.plan import GrowthPlan, Origin
from trainer.growth.tensors import Floats, Side, given_to_norm, row_blocks, side_of
from trainer.growth.weights import SourceError

#: Beside a model's weights, AdamW's state by the names of the parameters: step/NAME, exp_avg/NAME, exp_avg_sq/NAME.
OPTIMIZER_FILE = "optimizer.safetensors"

Array = NDArray[np.floating[Any]]


class LrScale(NamedTuple):
    """What a parameter's learning rate, weight decay and AdamW's epsilon are multiplied with."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


# --- Moments ----------------------------------------------------------------------------------------------------------


def grow_moments(folder: Path, plan: GrowthPlan) -> Iterator[tuple[str, Array]]:
    """The child's AdamW state, a tensor at a time, from the parent's in `folder`: step/NAME, exp_avg/NAME, ...

    The step goes along, so that bias correction goes on where it was. What is new in an old tensor begins at zero, and
    needs care, since it can have no step of its own: see :class:`trainer.train.Newcomers`, and :func:`new_entries`.

    Of a parameter that is new as a whole, or in a block that was silenced (whose gradients are none of its source's),
    nothing is yielded: its state is to begin afresh. Raises :class:`SourceError` where the folder has no such state.
    """
    path = folder / OPTIMIZER_FILE
    if not path.exists():
        raise SourceError(f"{folder}: has no {OPTIMIZER_FILE}, the optimizer's state that is to be grown with it")
    with safe_open(path, "np") as held:
        known, also_named = set(held.keys()), get_family(plan.family).also_named

        def read(key: str, parameter: Parameter) -> Array:
            for name in (parameter.name, also_named.get(parameter.name)):
                if f"{key}/{name}" in known:
                    return held.get_tensor(f"{key}/{name}")  # type: ignore[no-any-return]
            raise SourceError(f"{path}: has no {key} of {parameter.name}")

        for origin in plan.parameters():
            if origin.old is None or origin.block.silent:
                continue
            yield f"step/{origin.new.name}", read("step", origin.old)
            for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                above = read(key, origin.following) if origin.following else None
                yield f"{key}/{origin.new.name}", _grown(read(key, origin.old), above, origin, plan, power)


def _grown(old: Array, above: Array | None, origin: Origin, plan: GrowthPlan, power: int) -> Array:
    """One tensor's first (`power` 1) or second (2) moments."""
    new = origin.new
    sides, scales = _gradients(new, plan)
    rows, row_scale = sides[0], scales[0] ** power
    known_rows = ~rows.new & (row_scale > 0)
    if len(sides) == 1:
        values = old[rows.source]
        if above is not None:
            values = np.where(rows.rank > 0, above[rows.source], values)
        return np.where(known_rows, values * row_scale, 0.0).astype(old.dtype)
    columns, column_scale = sides[1], scales[1] ** power
    known_columns = ~columns.new & (column_scale > 0)
    made = np.empty(new.shape, old.dtype)
    for part in row_blocks(new.shape):
        kept = old[rows.source[part]]
        kept = kept if columns.unchanged else kept.take(columns.source, axis=1)
        if above is not None:
            outputs = columns.rank[None, :] if new.in_first else rows.rank[part, None]
            kept = np.where(outputs > 0, above[rows.source[part]].take(columns.source, axis=1), kept)
        known = known_rows[part, None] & known_columns
        made[part] = np.where(known, kept * row_scale[part, None] * column_scale, 0.0)
    return made


def new_entries(plan: GrowthPlan) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Of each parameter of which some entries alone are new, which ones, in its stored shape."""
    for new, old, block, _ in plan.parameters():
        if old is None or block.silent:
            continue
        known = [~side.new & (scale > 0) for side, scale in zip(*_gradients(new, plan), strict=True)]
        if not all(along.all() for along in known):
            yield new.name, ~reduce(np.logical_and.outer, known)


def _gradients(new: Parameter, plan: GrowthPlan) -> tuple[list[Side], list[Floats]]:
    """For each stored dimension of a parameter, where it comes from and what its gradient is multiplied with."""
    out = side_of(plan, new.out, new.interleaved)
    if new.into:
        into = side_of(plan, (new.into,))
        scale = 1 / _multiplied(new, plan)
        sides, scales = [out, into], [out.read * scale, into.write]
        return (sides[::-1], scales[::-1]) if new.in_first else (sides, scales)
    if new.rescales:
        return [out], [out.read * side_of(plan, given_to_norm(new), new.interleaved).write]
    # A norm's output is E times the parent's, and so is what it is given, once normed.
    through = out.write if new.kind == "norm_gain" else 1.0
    return [out], [out.read * through / _multiplied(new, plan)]


def _multiplied(new: Parameter, plan: GrowthPlan) -> float:
    """What growth multiplied the parameter with beside its maps' coefficients."""
    scale = 1.0
    if new.into == ("vocab",):
        scale *= plan.table_scale
    if new.final_norm:
        scale *= plan.final_norm_scale
    return scale


# --- Rates ------------------------------------------------------------------------------------------------------------


def lr_scales(plan: GrowthPlan, before: Mapping[str, LrScale] | None = None) -> dict[str, LrScale]:
    """By the child's parameters, what AdamW needs to move what they compute as fast as the parent's did.

        learning rate    c / n         n      how often an input is copied
        weight decay     n / c         c      what weights were multiplied with
        epsilon          1 / n_out     n_out  how often an output is copied

    so the rate of a matrix is divided by how often its inputs are copied, an output head's too. Tables (also one that
    is tied to the head), biases and gains have no copied inputs, and keep theirs where c is 1: it is not where the plan
    scales what it copies (queries of a wider head, channels at ratios that are not whole, the final norm before a tied
    head). The product of rate and decay stays. Epsilon goes with the size of the gradient, which the copies of an
    output share; a head has none. Where copies differ in number or weight, all three are means over a tensor.

    `before`: the parent's own scales, where it was itself trained with such; the child's are relative to them.
    """
    past = {} if before is None else {_role(o.old): before[o.old.name] for o in plan.parameters() if o.old}
    known: dict[str, LrScale] = {}
    for new, *_ in plan.parameters():
        weight, gradient, was = _weight(new, plan), _gradient(new, plan), past.get(_role(new), LrScale())
        known[new.name] = LrScale(was.lr * weight, was.weight_decay / weight, was.eps * gradient)
    return known


def _weight(new: Parameter, plan: GrowthPlan) -> float:
    """What the parent's weights were multiplied with, and so a step of the parent's is, in the mean over a tensor."""
    out = side_of(plan, new.out, new.interleaved)
    written = out.write
    if new.kind == "norm_gain":
        written = written / (side_of(plan, given_to_norm(new), new.interleaved).write if new.rescales else written)
    weight = _multiplied(new, plan) * _mean(written, out)
    if new.into:
        into = side_of(plan, (new.into,))
        # What an input's copies give together, were each read alike.
        weight /= float(np.bincount(into.source[~into.new], into.write[~into.new], into.small).mean())
    return weight


def _gradient(new: Parameter, plan: GrowthPlan) -> float:
    """What the parent's gradients were multiplied with, in the mean over a tensor."""
    return prod(_mean(scale, side) for side, scale in zip(*_gradients(new, plan), strict=True))


def _mean(values: Floats, side: Side) -> float:
    """Over what has a source and is not zero."""
    return float(values[~side.new & (values > 0)].mean())


def _role(parameter: Parameter) -> str:
    """A name for what all blocks have: growth treats them alike."""
    return parameter.name.replace(f".{parameter.layer}.", ".*.", 1)
