"""What a model costs, by arithmetic: parameters, tokens, FLOPs, memory, time. Imports no torch, and takes milliseconds.

Everything is summed from the family's parameter table, so a new family is counted without a line here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from trainer.families import Described, Family, FamilyError, get_family, read_config
from trainer.growth import GrowthError, GrowthPlan, plan
from trainer.shape import CheckpointInit, GrowInit, Shape
from trainer.spec import ExperimentSpec, ModelSpec, Problem, TrainSpec

#: Positions whose logits exist at once in training.
LOSS_CHUNK = 512
#: Resident memory of a training process before it has a model: Python, torch, the model classes, and their pools.
BASE_BYTES = 439_000_000
#: Shown on top of the estimate, which was 11 % below to 3 % above what was measured.
MEMORY_MARGIN = 1.1
#: How much of what is kept the allocator needs on top, for temporaries and the holes that they leave: fitted, on CPU.
#: LayerNorm is one operation; RMSNorm and RoPE are chains of them, in fp32. Phi-3 took more.
HOLES = {"LayerNorm": 1.1, "LayerNorm, RoPE": 1.3, "RMSNorm": 1.5, "RMSNorm, fused bf16": 2.1}


class Parameters(NamedTuple):
    """How many numbers a model holds; a tied table counts once."""

    total: int
    non_embedding: int  # without token and position tables and the output head


@dataclass(frozen=True)
class ModelBudget:
    """What one model of an experiment costs. None: not known before text, tokenizer or checkpoint has been read."""

    name: str
    parameters: int | None
    non_embedding_parameters: int | None
    steps: int | None
    tokens: int | None
    flops_per_token: float | None
    flops: float | None
    memory_bytes: int | None
    seconds: float | None
    growths: tuple[GrowthPlan, ...]  # in their order; () where the model is not grown, or it is not known
    problem: Problem | None = None  # only a checkpoint that could not be looked at when the spec was checked

    @property
    def growth(self) -> GrowthPlan | None:
        """The first: from the parent."""
        return self.growths[0] if self.growths else None


def sheet(
    spec: ExperimentSpec, flops_per_second: float | None = None, train_tokens: int | None = None
) -> dict[str, ModelBudget]:
    """The budget of every model, by name. `seconds` needs the speed of the machine, epochs the number of tokens."""
    known = {name: _known(spec, model) for name, model in spec.models.items()}
    return {name: _budget(spec, name, known, flops_per_second, train_tokens) for name in spec.models}


@lru_cache(maxsize=256)  # a page asks for the same shapes at every keystroke
def parameters(family: str, shape: Shape, n_positions: int, d_vocab: int, tied: bool) -> Parameters:
    """Parameters in all, and without the embeddings."""
    table = get_family(family).parameters(shape, n_positions, d_vocab, tied)
    return Parameters(sum(p.size for p in table), sum(p.size for p in table if not p.is_embedding))


@lru_cache(maxsize=256)
def flops_per_token(family: str, shape: Shape, n_ctx: int, d_vocab: int, tied: bool) -> float:
    """FLOPs of training on one token: forward, and twice as much backward.

        3 (2 M + 2 L T a)      M  entries of all matrices that are multiplied: each block's, and the output head once,
                                  tied or not; no look-up of an embedding
                               L  n_layers    T  n_ctx    a = n_heads d_head

    2 M is a multiplication and an addition an entry. Attention is 2 a T for scores and 2 a T for the mix of values, at
    half, since a token sees only what stands before it; a window counts as if it reached back to the beginning. For
    GPT-2, M = L (4 D^2 + 2 D F) + D V; grouped heads and gated MLPs change M alone. Norms, softmax and biases are
    left out, as is usual: Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, table 1; there with attention in full),
    Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, appendix F).
    """
    table = get_family(family).parameters(shape, n_ctx, d_vocab, tied)
    multiplied = sum(p.size for p in table if p.kind == "matrix" and not p.looked_up)
    attention = 2 * shape.n_layers * n_ctx * shape.n_heads * shape.d_head
    return float(3 * (2 * multiplied + attention))


def memory_bytes(family: str, shape: Shape, train: TrainSpec, n_positions: int, d_vocab: int, tied: bool) -> int:
    """Peak resident bytes of training on a CPU, with a margin of a tenth.

        base + 16 N                 weights, gradients and AdamW's two moments in fp32
        + n L A h                   what the backward pass needs of each of n = batch_size x n_ctx tokens in each block
        + 2 M                       the blocks' matrices in bf16
        + 4 V D + 12 c V            the output head's gradient, and the logits of c = 512 positions

    A, bytes a token and block, counts what autograd keeps (`activation_bytes`), h the holes between. In fp32 there is
    no second copy of the matrices, and what was kept in bf16 takes twice the room. A GPU's allocator and kernels
    differ: there, take it as a rough guide.
    """
    architecture = get_family(family)
    table = architecture.parameters(shape, n_positions, d_vocab, tied)
    total = sum(p.size for p in table)
    blocks = sum(p.size for p in table if p.layer is not None and p.kind == "matrix")
    half = train.precision != "fp32"  # `auto` may turn out either way: the recipe where bf16 is fast
    kept = train.tokens_per_step * shape.n_layers * activation_bytes(architecture, shape, train.n_ctx, half)
    norm = (
        "LayerNorm, RoPE"
        if architecture.mean_centred and architecture.rotary
        else "LayerNorm"
        if architecture.mean_centred
        else "RMSNorm, fused bf16"
        if architecture.fused and half
        else "RMSNorm"
    )
    kept = round(kept * HOLES[norm])
    head = 4 * d_vocab * shape.d_model + 12 * LOSS_CHUNK * d_vocab
    return round(MEMORY_MARGIN * (BASE_BYTES + 16 * total + kept + (2 * blocks if half else 0) + head))


def activation_bytes(family: Family, shape: Shape, n_ctx: int, half: bool) -> int:
    """Bytes that autograd keeps for the backward pass, a token and block; measured, tensor by tensor, in the tests.

    The residual stream is fp32; with `half`, what goes into a matrix product or comes out of one is bf16.
    """
    d, f = shape.d_model, shape.d_mlp
    q, kv = shape.n_heads * shape.d_head, shape.kv_heads * shape.d_head
    one_block = family.parameters(shape.model_copy(update={"n_layers": 1}), 1, 1, True)
    reading = sum(p.kind == "matrix" and p.into == ("embed",) for p in one_block)
    n_norms = sum(p.layer is not None and p.kind == "norm_gain" and p.out == (("embed",),) for p in one_block)
    # The input of each norm, one where two read the same; RMSNorm, built of single operations, keeps the normed too.
    norms = 4 * (1 if family.parallel else n_norms) * d * (1 if family.mean_centred else 2)
    # The output of each norm, cast once for each matrix that reads it (q, k, v, gate, up).
    # Queries and keys as given and as normed, in fp32; of single heads rounded before their gain, Gemma's after.
    rounds = half and family.qk_norm == "head" and not family.gain_from_one
    norms += (q + kv) * (6 if rounds else 8) if family.qk_norm else 0
    products = reading * d if half else 2 * d
    products += 2 * q + 2 * kv  # queries, keys, values, and what attention gives
    if family.fused and family.rotates_first:
        products += 2 * q + kv  # rotated ones are new, values keep all three alive; what attention gives is copied
    scores = 0
    if family.caps_scores:  # no fused kernel: keys and values once for each query head; tanh and softmax of all scores
        products += 2 * (q - kv)
        scores = 8 * shape.n_heads * n_ctx
    products += 4 * f if family.gated_mlp else 2 * f  # (gate, up, silu(gate), their product) or (before, after gelu)
    return norms + scores + products * (2 if half else 4)


def training_steps(train: TrainSpec, train_tokens: int | None) -> int | None:
    """Optimizer steps until max_steps or num_epochs, whichever is first; None where only epochs end it and the number
    of tokens is not known."""
    ends = [] if train.max_steps is None else [train.max_steps]
    if train.num_epochs is not None and train_tokens is not None:
        ends.append(max(1, round(train.num_epochs * train_tokens / train.tokens_per_step)))
    return min(ends, default=None)


class Stage(NamedTuple):
    """The steps that a model is trained at one shape: those after `begin` up to `end`."""

    shape: Shape | None  # None: a checkpoint's, before it has been read
    begin: int
    end: int


def stages(model: ModelSpec, total_steps: int) -> list[Stage]:
    """The sizes that a model goes through on its ladder, the last its own; one where it does not grow on the way."""
    rungs = model.init.ladder if isinstance(model.init, GrowInit) else ()
    found, begin = list[Stage](), 0
    for rung in rungs:
        found.append(Stage(rung.shape, begin, begin + rung.steps))
        begin += rung.steps
    return [*found, Stage(model.shape, begin, total_steps)]


def mean_flops_per_token(family: str, sizes: Sequence[Described], stages: Sequence[Stage], n_ctx: int) -> float:
    """FLOPs of training on one token, the mean over all steps of stages with these sizes."""
    each = [flops_per_token(family, size.shape, n_ctx, size.d_vocab, size.tied) for size in sizes]
    steps = [stage.end - stage.begin for stage in stages]
    if len(each) == 1 or not sum(steps):
        return each[-1]
    return sum(flops * n for flops, n in zip(each, steps, strict=True)) / sum(steps)


class _Known(NamedTuple):
    """What can be said of a model now: a spec leaves the shape to a checkpoint, and the vocabulary to a tokenizer."""

    shape: Shape | None
    n_positions: int
    d_vocab: int | None
    tied: bool


def _known(spec: ExperimentSpec, model: ModelSpec) -> _Known:
    line = [model]
    while isinstance(line[-1].init, GrowInit):
        line.append(spec.models[line[-1].init.parent])
    root = line[-1]
    n_positions, d_vocab, tied = spec.train.n_ctx, spec.data.tokenizer.d_vocab, model.tie_embeddings
    shape = model.shape
    if isinstance(root.init, CheckpointInit):
        with contextlib.suppress(FamilyError):
            config = read_config(_checkpoint_folder(root.init.path))
            found, n_positions, d_vocab, tied = get_family(model.family).shape_of(config)
            shape = found if root is model else model.shape
    for each in reversed(line):
        if isinstance(each.init, GrowInit):
            n_positions, d_vocab = each.init.n_positions or n_positions, each.init.d_vocab or d_vocab
    return _Known(shape, n_positions, d_vocab, tied)


def _checkpoint_folder(path: str) -> Path:
    """A local folder, or where the Hub's cache keeps a model of that name if it was fetched before."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{path.replace('/', '--')}"
    try:
        return hub / "snapshots" / (hub / "refs" / "main").read_text().strip()
    except OSError:
        return folder


def _budget(
    spec: ExperimentSpec,
    name: str,
    known: Mapping[str, _Known],
    flops_per_second: float | None,
    train_tokens: int | None,
) -> ModelBudget:
    model, train = spec.models[name], spec.train_of(name)
    steps = training_steps(train, train_tokens)
    tokens = None if steps is None else steps * train.tokens_per_step
    growths, problem = _growths(spec, name, known)
    counted = per_token = memory = None
    shape, n_positions, d_vocab, tied = known[name]
    if shape is not None and d_vocab is not None:
        counted = parameters(model.family, shape, n_positions, d_vocab, tied)
        memory = memory_bytes(model.family, shape, train, n_positions, d_vocab, tied)
        on_the_way = stages(model, steps or 0)
        sizes = [Described(stage.shape or shape, n_positions, d_vocab, tied) for stage in on_the_way]
        if len(on_the_way) == 1 or steps is not None:
            per_token = mean_flops_per_token(model.family, sizes, on_the_way, train.n_ctx)
    flops = per_token * tokens if per_token is not None and tokens is not None else None
    if isinstance(model.init, GrowInit) and model.init.learn_steps and counted is not None:
        learning = [_learning(growth, model.init, train) for growth in growths]
        known_to_cost = flops is not None and len(learning) == len(model.init.ladder) + 1
        flops = (flops or 0.0) + sum(each.flops for each in learning) if known_to_cost else None
        memory = max([memory or 0, *(each.memory_bytes for each in learning)])
    return ModelBudget(
        name=name,
        parameters=counted and counted.total,
        non_embedding_parameters=counted and counted.non_embedding,
        steps=steps,
        tokens=tokens,
        flops_per_token=per_token,
        flops=flops,
        memory_bytes=memory,
        seconds=flops / flops_per_second if flops is not None and flops_per_second else None,
        growths=growths,
        problem=problem,
    )


def _growths(
    spec: ExperimentSpec, name: str, known: Mapping[str, _Known]
) -> tuple[tuple[GrowthPlan, ...], Problem | None]:
    model = spec.models[name]
    if not isinstance(model.init, GrowInit):
        return (), None
    shape, n_positions, d_vocab, tied = known[model.init.parent]
    d_vocab, found = d_vocab or 1, list[GrowthPlan]()
    if shape is None:
        return (), None
    for stage in stages(model, 0):
        assert stage.shape is not None
        # A vocabulary that is not known has no part in what a plan says.
        init = model.init if d_vocab > 1 else model.init.model_copy(update={"d_vocab": None})
        try:
            made = plan(model.family, shape, stage.shape, init, n_positions=n_positions, d_vocab=d_vocab, tied=tied)
        except GrowthError as error:
            return (), Problem(f"models.{name}.{error.field}", error.value, error.message)
        shape, n_positions, d_vocab = stage.shape, made.child_positions, made.child_vocab
        found.append(made)
    return tuple(found), None


class _Learning(NamedTuple):
    flops: float
    memory_bytes: int


def _learning(growth: GrowthPlan, init: GrowInit, train: TrainSpec) -> _Learning:
    """What it costs to train the maps of one growth.

    Memory: training the child, for all its activations and gradients, and beside it the parent's weights, the child as
    the plan made it and as the maps did, and the maps with their gradients and moments.
    """
    from trainer.growth import learned  # which counts by this module

    small, large = (
        parameters(growth.family, shape, n_positions, d_vocab, growth.tied).total
        for shape, n_positions, d_vocab in (
            (growth.parent, growth.n_positions, growth.d_vocab),
            (growth.child, growth.child_positions, growth.child_vocab),
        )
    )
    maps = sum(2 * m.small * m.large for axis, m in growth.maps.items() if learned.mixes(growth, axis))
    training = memory_bytes(growth.family, growth.child, train, growth.child_positions, growth.child_vocab, growth.tied)
    return _Learning(
        learned.flops(growth, init.learn_steps, train.tokens_per_step, train.n_ctx),
        training + round(MEMORY_MARGIN * (4 * small + 4 * large + 16 * maps)),
    )
