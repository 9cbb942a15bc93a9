"""Learned growth (LiGO): the maps of a plan, trained on the data before they are applied.

    Theta'_l = sum_k Lambda_lk E_out W_k R_in + C

For each axis that grows a dense write map E (large x small) and a dense read map R (small x large), shared by all
tensors with that axis; for each kind of parameter a depth map Lambda (child's blocks x parent's). They start as the
plan's maps, and C, which stays as it is, is what those do not give: noise, random entries, random blocks. So at step 0
the child is the plan's child, whatever its rules. Then the maps alone are trained, by Adam, on the language-model loss
of the child, and fold into plain weights.

* Axes that lie along one dimension (heads x d_head) have a map each; their Kronecker product is never made.
* Biases take the write map. Gains and biases of norms keep the plan's selection, since a norm acts on each channel by
  itself, and have a depth map only.
* Tokens and positions are not mixed with each other. An axis that does not grow keeps the identity.
* Equal copies would get equal gradients for ever. So E and R start with a spread, which C takes back.

Wang et al. 2023, https://arxiv.org/abs/2303.00980, who share the maps in the same way. What is learned does not keep
the parent's function. What it costs: :func:`trainer.growth.learned.flops`.

Letters: B windows in a batch, T tokens in a window; L, L' blocks of the parent and the child.
"""

from __future__ import annotations

import math
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import attention, budget
from trainer.endings import Diverged
from trainer.evaluate import autocast
from trainer.families import Parameter, build_model, get_family
from trainer.growth.learned import is_mixed_along_axes, kind_of, map_flops, mixes
from trainer.growth.maps import NEW, AxisMap
from trainer.growth.plan import GrowthPlan
from trainer.train import Objective

#: Norm of what is added to a row of E and a column of R, root mean square, where that of a copied channel has 1.
SPREAD = 0.1
#: The learning rate rises over this share of the steps, then falls to zero, both in a straight line.
WARMUP = 0.1
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class Learned:
    """What came out, and what it cost.

    state       the child's weights, with the names, dtypes and devices of the state that was given
    losses      of each step's batch, nats a token; the first is that of the plan's child
    seconds     wall time
    flops       of the child's and the maps' matrix products, forward and backward, and of folding the maps
    peak_bytes  the most memory until then: of the GPU's what torch has taken, else this process's resident size
    """

    state: dict[str, Tensor]
    losses: list[float]
    seconds: float
    flops: float
    peak_bytes: int


def learn(
    parent_model: Any,
    plan: GrowthPlan,
    grown_state: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int, float], None] | None = None,
    precision: str = "fp32",
) -> Learned:
    """Train the maps of `plan` on `steps` batches, from the child that the plan made.

    parent_model  a transformers model             grown_state  the plan's child, as its `state_dict()` is
    batches       (inputs, targets), int64 [B, T]  progress     told (step, steps, the loss of its batch)
    seed          of the maps' spread              precision    of the child's passes: "fp32" or "bf16"

    Takes memory for the child's weights about five times, for its activations, and for the maps four times. Raises
    :class:`Diverged`, and ValueError where there are fewer batches than steps.
    """
    began = time.perf_counter()
    new = [origin.new for origin in plan.parameters()]
    old = get_family(plan.family).parameters(plan.parent, plan.n_positions, plan.d_vocab, plan.tied)
    given = _by_parameter(grown_state, new, plan, device)
    maps = Maps(plan, _by_parameter(parent_model.state_dict(), old, plan, device), seed)
    with torch.no_grad():
        start = dict(maps())  # C is `given` less this; kept apart, so that step 0 is exact to the bit

    def weights() -> Iterator[tuple[str, Tensor]]:
        return ((name, given[name] + (made - start[name])) for name, made in maps())

    objective = _Loss(_child(parent_model, plan, device)).eval()
    inside = {name: f"model.{held}" for name, held in _names(dict(objective.model.named_parameters()), new, plan)}
    for name, held in inside.items():
        objective.get_parameter(held).data = given[name]

    optimizer = torch.optim.Adam(maps.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    cost, flops, losses = map_flops(plan), 0.0, list[float]()
    for inputs, targets in islice(batches, steps):
        with autocast(device, precision):
            loss = torch.func.functional_call(
                objective,
                {inside[name]: weight for name, weight in weights()},
                (inputs.to(device), targets.to(device)),
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(maps.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(len(losses), "The loss of learned growth")
        per_token = budget.flops_per_token(plan.family, plan.child, inputs.shape[1], plan.child_vocab, plan.tied)
        flops += per_token * inputs.numel() + cost.step
        if progress:
            progress(len(losses), steps, losses[-1])
    if len(losses) < steps:
        raise ValueError(f"{steps} batches were wanted, but there were {len(losses)}")

    with torch.no_grad():
        state = _as_given(dict(weights()), grown_state, new, plan)
    return Learned(
        state=state,
        losses=losses,
        seconds=time.perf_counter() - began,
        flops=flops + cost.forward,
        peak_bytes=_peak_bytes(device),
    )


def _pace(step: int, steps: int) -> float:
    """What the learning rate of step `step` + 1 is multiplied with."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


# --- The maps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """Parameters that are made alike: those of one name in all blocks, or one outside of them."""

    like: Parameter  # one of the child's
    names: list[str]  # the child's, lowest block first
    parent: list[Tensor]  # for each segment [L (or 1), *sizes of its axes, *sizes of the axes of `into`]


class Maps(torch.nn.Module):
    """The child's weights, as far as the maps give them, from the parent's (by the family's names, float32)."""

    def __init__(self, plan: GrowthPlan, parent: Mapping[str, Tensor], seed: int):
        super().__init__()
        self.plan = plan
        self.write, self.read, self.depth = (torch.nn.ParameterDict() for _ in range(3))
        device = next(iter(parent.values())).device
        self.kinds = {kind.replace(".", "/"): stacked for kind, stacked in _kinds(plan, parent).items()}
        for name, kind in self.kinds.items():
            if kind.like.layer is not None:
                self.depth[name] = torch.zeros(plan.child.n_layers, plan.parent.n_layers, device=device)
        with torch.no_grad():
            for new, _, block, _ in plan.parameters():
                if block.source is not None and not (block.silent and new.writes_residual):
                    self.depth[kind_of(new).replace(".", "/")][new.layer, block.source] = 1.0
        for kind in self.kinds.values():
            if is_mixed_along_axes(kind.like):
                for axis in (axis for axes in kind.like.out for axis in axes):
                    if mixes(plan, axis) and axis not in self.write:
                        self.write[axis] = _first_write(plan.maps[axis], axis, seed).to(device)
                for axis in kind.like.into:
                    if mixes(plan, axis) and axis not in self.read:
                        self.read[axis] = _first_read(plan.maps[axis], axis, seed).to(device)
        self._selections = {axis: _selection(m, device) for axis, m in plan.maps.items() if not m.is_identity}

    def forward(self) -> Iterator[tuple[str, Tensor]]:
        """The name and the weight, as stored, of each of the child's parameters."""
        for name, kind in self.kinds.items():
            write: Mapping[str, Tensor] = dict(self.write) if is_mixed_along_axes(kind.like) else {}
            grown = []
            for axes, x in zip(kind.like.out, kind.parent, strict=True):
                if name in self.depth:
                    x = torch.tensordot(self.depth[name], x, dims=1)  # (L', L) (L, ...)
                for dim, axis in enumerate(axes, start=1):
                    x = _product(x, dim, write[axis].T) if axis in write else self._selected(x, dim, axis)
                for dim, axis in enumerate(kind.like.into, start=1 + len(axes)):
                    x = _product(x, dim, self.read[axis]) if axis in self.read else self._selected(x, dim, axis)
                grown.append(x * self.plan.table_scale if kind.like.into == ("vocab",) else x)
            yield from zip(kind.names, _stored(grown, kind.like).unbind(), strict=True)

    def _selected(self, x: Tensor, dim: int, axis: str) -> Tensor:
        """`x` with its dimension `dim`, an axis that is not mixed, grown as the plan copies it: zero where new."""
        if axis not in self._selections:
            return x
        source, old = self._selections[axis]
        return x.index_select(dim, source) * old.view([-1 if d == dim else 1 for d in range(x.dim())])


def _kinds(plan: GrowthPlan, parent: Mapping[str, Tensor]) -> dict[str, _Kind]:
    sizes = {axis: axis_map.small for axis, axis_map in plan.maps.items()}
    segments: dict[str, list[list[Tensor]]] = {}
    for old in get_family(plan.family).parameters(plan.parent, plan.n_positions, plan.d_vocab, plan.tied):
        weight = parent[old.name] + 1 if old.from_one else parent[old.name]  # the gain itself
        segments.setdefault(kind_of(old), []).append(_segments(weight, old, sizes))
    kinds: dict[str, _Kind] = {}
    for origin in plan.parameters():
        kind = kind_of(origin.new)
        if kind not in kinds:
            stacks = [torch.stack(blocks) for blocks in zip(*segments.pop(kind), strict=True)]
            kinds[kind] = _Kind(origin.new, [], stacks)
        kinds[kind].names.append(origin.new.name)
    return kinds


def _product(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """`x` with its dimension `dim`, of the parent's size, multiplied by `matrix` (small, large)."""
    return (x.movedim(dim, -1) @ matrix).movedim(-1, dim)


def _first_write(axis: AxisMap, name: str, seed: int) -> Tensor:
    """E and its spread, (large, small)."""
    matrix = _dense(axis, axis.write)
    if axis.new_write == "mean":
        new = torch.tensor(axis.source_index) == NEW
        matrix[new] = torch.tensor(axis.write)[new, None] / axis.small
    return matrix + _spread(axis, f"{seed} {name} write")


def _first_read(axis: AxisMap, name: str, seed: int) -> Tensor:
    """R and its spread, (small, large)."""
    return (_dense(axis, axis.read) + _spread(axis, f"{seed} {name} read") * (axis.small / axis.large)).T.contiguous()


def _dense(axis: AxisMap, coefficients: Sequence[float]) -> Tensor:
    """(large, small)"""
    source = np.asarray(axis.source_index)
    old = np.flatnonzero(source != NEW)
    matrix = np.zeros((axis.large, axis.small), np.float32)
    matrix[old, source[old]] = np.asarray(coefficients)[old]
    return torch.from_numpy(matrix)


def _spread(axis: AxisMap, name: str) -> Tensor:
    """(large, small); by name, so that an axis's does not depend on what else grows."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(axis.large, axis.small, generator=generator) * (SPREAD / math.sqrt(axis.small))


def _selection(axis: AxisMap, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each large index its source, and 1 or 0: whether it has one."""
    source = torch.tensor(axis.source_index, device=device)
    return source.clamp(min=0), (source != NEW).float()


# --- Stored tensors and their axes ------------------------------------------------------------------------------------


def _segments(stored: Tensor, parameter: Parameter, sizes: Mapping[str, int]) -> list[Tensor]:
    """A stored tensor as its logical matrices (or vectors), a dimension for each axis: [*out, *into]."""
    whole = stored.T if parameter.in_first else stored
    into = [sizes[axis] for axis in parameter.into]
    out = [[sizes[axis] for axis in axes] for axes in parameter.out]
    if parameter.interleaved:  # segments take turns along their first axes
        whole = whole.reshape(out[0][0], -1, *whole.shape[1:])
        pieces = torch.split(whole, [math.prod(axes[1:]) for axes in out], dim=1)
    else:
        pieces = torch.split(whole, [math.prod(axes) for axes in out])
    return [piece.reshape(*axes, *into) for piece, axes in zip(pieces, out, strict=True)]


def _stored(segments: list[Tensor], parameter: Parameter) -> Tensor:
    """The inverse, for all blocks at once: from [L', *out, *into] each to [L', *as stored]."""
    blocks, *_ = segments[0].shape
    turns = segments[0].shape[1:2] if parameter.interleaved else ()
    columns = [math.prod(segments[0].shape[-len(parameter.into) :])] if parameter.into else []
    pieces = [segment.reshape(blocks, *turns, -1, *columns) for segment in segments]
    whole = torch.cat(pieces, dim=1 + len(turns)).reshape(blocks, -1, *columns)
    return whole.mT if parameter.in_first else whole


# --- Models and their states ------------------------------------------------------------------------------------------


class _Loss(torch.nn.Module):
    """The objective of training as `functional_call` can have it, which needs one way to each module: in an
    :class:`Objective` the model's body has two, and what is put back after a call would be wrong."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return Objective(self.model, compiled=False)(inputs, targets)  # type: ignore[no-any-return]


def _child(parent_model: Any, plan: GrowthPlan, device: torch.device) -> Any:
    """A model of the child's shape; its weights are of no meaning."""
    child = build_model(plan.child_config(parent_model.config.to_dict())).to(device).requires_grad_(False)
    attention.use_in(child)
    return child


def _names(held: Mapping[str, Tensor], table: Iterable[Parameter], plan: GrowthPlan) -> Iterator[tuple[str, str]]:
    """The family's name for each parameter and the one that `held` has it by: models and files may use others."""
    family = get_family(plan.family)
    for parameter in table:
        bare = parameter.name.removeprefix(family.prefix)
        names = (parameter.name, family.also_named.get(parameter.name, bare), bare)
        yield parameter.name, next(name for name in names if name in held)


def _by_parameter(
    state: Mapping[str, Tensor], table: Iterable[Parameter], plan: GrowthPlan, device: torch.device
) -> dict[str, Tensor]:
    return {name: state[held].to(device, torch.float32) for name, held in _names(state, table, plan)}


def _as_given(
    weights: Mapping[str, Tensor], given: Mapping[str, Tensor], table: Sequence[Parameter], plan: GrowthPlan
) -> dict[str, Tensor]:
    """All that was given, with these weights in their places; where a tied table stands twice, in both."""
    held = dict(_names(given, table, plan))
    state = dict(given)
    for parameter in table:
        before = given[held[parameter.name]]
        weight = weights[parameter.name].to(before).contiguous()
        names = [held[parameter.name]]
        if parameter.reads_vocab:
            others = given.keys() - held.values()
            names += [name for name in others if given[name].shape == before.shape and given[name].equal(before)]
        state |= dict.fromkeys(names, weight)
    return state


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
