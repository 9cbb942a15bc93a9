"""Learned growth (LiGO) without torch: what it is, which maps it has, and what they cost. :mod:`.learn` trains them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from trainer import budget
from trainer.families import Parameter
from trainer.growth.plan import GrowthPlan
from trainer.growth.width import Operator

#: No rule of its own: `GrowInit.learn_steps` says for how long the maps of any two rules are trained.
ABOUT = Operator(
    "learned",
    "Learned growth",
    "Trains the maps from small to large weights on the data for some steps, beginning with the two rules chosen: "
    "a lower loss at the start for a little compute, function lost.",
    "Wang et al. 2023, Learning to Grow Pretrained Models for Efficient Transformer Training (LiGO)",
    "https://arxiv.org/abs/2303.00980",
)


class MapFlops(NamedTuple):
    """FLOPs of the maps' matrix products."""

    forward: float  # of making the child's weights once
    step: float  # of that and its backward pass


def mixes(plan: GrowthPlan, axis: str) -> bool:
    """Whether the axis has dense maps of its own: where it grows, and its indices are no names (tokens, positions)."""
    return axis not in ("vocab", "position") and not plan.maps[axis].is_identity


def is_mixed_along_axes(parameter: Parameter) -> bool:
    """Not so the gains and biases of norms, since a norm acts on each channel by itself."""
    return parameter.kind in ("matrix", "bias")


def kind_of(parameter: Parameter) -> str:
    """The name that a parameter shares with those of the other blocks."""
    at = f".{parameter.layer}."
    return parameter.name if parameter.layer is None else parameter.name.replace(at, ".*.", 1)


def map_flops(plan: GrowthPlan) -> MapFlops:
    """What the maps cost, a step of learning.

    A product of a map with x costs as much again, backward, for the map's gradient, and as much for that of x if x was
    made by another map. Entry by entry it is 2 (a multiplication and an addition), as everywhere in
    :mod:`trainer.budget`.
    """
    kinds = {kind_of(origin.new): origin.new for origin in plan.parameters()}
    products = [product for parameter in kinds.values() for product in _products(parameter, plan)]
    return MapFlops(sum(f for f, _ in products), sum(f * (3 if made else 2) for f, made in products))


def flops(plan: GrowthPlan, steps: int, tokens_per_step: int, n_ctx: int) -> float:
    """FLOPs of learning for `steps`: the child's training on their tokens, the maps', and folding them."""
    maps = map_flops(plan)
    per_token = budget.flops_per_token(plan.family, plan.child, n_ctx, plan.child_vocab, plan.tied)
    return steps * (per_token * tokens_per_step + maps.step) + maps.forward


def _products(parameter: Parameter, plan: GrowthPlan) -> Iterator[tuple[float, bool]]:
    """Of one kind of parameter in all blocks: FLOPs of each product, and whether what it multiplies was made."""
    layered = parameter.layer is not None
    for axes in parameter.out:
        sizes = [plan.maps[axis].small for axis in (*axes, *parameter.into)]
        entries, made = prod(sizes), False
        if layered:
            entries, made = entries * plan.child.n_layers, True
            yield 2.0 * entries * plan.parent.n_layers, False
        for axis in (*axes, *parameter.into):  # in the order in which they are grown
            axis_map = plan.maps[axis]
            if is_mixed_along_axes(parameter) and mixes(plan, axis):
                yield 2.0 * entries * axis_map.large, made
                made = True
            entries = entries // axis_map.small * axis_map.large
