"""What a model costs, by arithmetic: parameters, tokens, FLOPs, memory, time. Imports no torch, and takes milliseconds.

Everything is summed from the family's parameter table, so a new family is counted without a line here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.families import Family, FamilyError, get_family, read_config
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
#: LayerNorm is one operation; RMSNorm and RoPE are chains of them, in fp32.
HOLES = {"LayerNorm": 1.1, "RMSNorm": 1.5}


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
    growth: GrowthPlan | None
    problem: Problem | None = None  # only a checkpoint that could not be looked at when the spec was checked


def sheet(
    spec: ExperimentSpec, flops_per_second: float | None = None, train_tokens: int | None = None
) -> dict[str, ModelBudget]:
    """The budget of every model, by name. `seconds` needs the speed of the machine, epochs the number of tokens."""
    known = {name: _known(spec, model) for name, model in spec.models.items()}
    return {name: _budget(spec, name, known, flops_per_second, train_tokens) for name in spec.models}


def parameters(family: str, shape: Shape, n_positions: int, d_vocab: int, tied: bool) -> Parameters:
    """Parameters in all, and without the embeddings."""
    table = get_family(family).parameters(shape, n_positions, d_vocab, tied)
    return Parameters(sum(p.size for p in table), sum(p.size for p in table if not p.is_embedding))


def flops_per_token(family: str, shape: Shape, n_ctx: int, d_vocab: int, tied: bool) -> float:
    """FLOPs of training on one token: forward, and twice as much backward.

        3 (2 M + 2 L T a)      M  entries of all matrices that are multiplied: each block's, and the output head once,
                                  tied or not; no look-up of an embedding
                               L  n_layers    T  n_ctx    a = n_heads d_head

    2 M is a multiplication and an addition an entry. Attention is 2 a T for scores and 2 a T for the mix of values, at
    half, since a token sees only what stands before it. For GPT-2, M = L (4 D^2 + 2 D F) + D V; grouped heads and
    gated MLPs change M alone. Norms, softmax and biases are left out, as is usual: Kaplan et al. 2020
    (https://arxiv.org/abs/2001.08361, table 1; there with attention in full), Hoffmann et al. 2022
    (https://arxiv.org/abs/2203.15556, appendix F).
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
    kept = round(kept * HOLES["LayerNorm" if architecture.mean_centred else "RMSNorm"])
    head = 4 * d_vocab * shape.d_model + 12 * LOSS_CHUNK * d_vocab
    return round(MEMORY_MARGIN * (BASE_BYTES + 16 * total + kept + (2 * blocks if half else 0) + head))


def activation_bytes(family: Family, shape: Shape, n_ctx: int, half: bool) -> int:
    """Bytes that autograd keeps for the backward pass, a token and block; measured, tensor by tensor, in the tests.

    The residual stream is fp32; with `half`, what goes into a matrix product or comes out of one is bf16.
    """
    d, f = shape.d_model, shape.d_mlp
    q, kv = shape.n_heads * shape.d_head, shape.kv_heads * shape.d_head
    one_block = family.parameters(shape.model_copy(update={"n_layers": 1}), 1, 1, True)
    n_norms = sum(p.layer is not None and p.kind == "norm_gain" and p.out == (("embed",),) for p in one_block)
    # The input of each norm, one where two read the same; RMSNorm, built of single operations, keeps the normalised too.
    norms = 4 * (1 if family.parallel else n_norms) * d * (1 if family.mean_centred else 2)
    # The output of each norm, cast once for each matrix that reads it (q, k, v, gate, up; c_attn, c_fc).
    # Queries and keys as given and as normed, in fp32; norms of single heads round before their gain, but Gemma's after.
    rounds = half and family.qk_norm == "head" and not family.gain_from_one
    norms += (q + kv) * (6 if rounds else 8) if family.qk_norm else 0
    products = 5 * d if half and not family.fused else 2 * d
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


class _Known(NamedTuple):
    """What can be said of a model now: a spec leaves the shape to a checkpoint, and the vocabulary to a tokenizer."""

    shape: Shape | None
    n_positions: int
    d_vocab: int | None
    tied: bool


def _known(spec: ExperimentSpec, model: ModelSpec) -> _Known:
    root = model
    while isinstance(root.init, GrowInit):
        root = spec.models[root.init.parent]
    stated = _Known(model.shape, spec.train.n_ctx, spec.data.tokenizer.d_vocab, model.tie_embeddings)
    if not isinstance(root.init, CheckpointInit):
        return stated
    try:
        config = read_config(_checkpoint_folder(root.init.path))
        shape, n_positions, d_vocab, tied = get_family(model.family).shape_of(config)
    except FamilyError:
        return stated
    return _Known(shape if root is model else model.shape, n_positions, d_vocab, tied)


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
    family, train = spec.models[name].family, spec.train_of(name)
    shape, n_positions, d_vocab, tied = known[name]
    steps = training_steps(train, train_tokens)
    tokens = None if steps is None else steps * train.tokens_per_step
    counted = per_token = memory = None
    if shape is not None and d_vocab is not None:
        counted = parameters(family, shape, n_positions, d_vocab, tied)
        per_token = flops_per_token(family, shape, train.n_ctx, d_vocab, tied)
        memory = memory_bytes(family, shape, train, n_positions, d_vocab, tied)
    flops = per_token * tokens if per_token is not None and tokens is not None else None
    growth, problem = _growth(spec, name, known)
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
        growth=growth,
        problem=problem,
    )


def _growth(spec: ExperimentSpec, name: str, known: Mapping[str, _Known]) -> tuple[GrowthPlan | None, Problem | None]:
    init = spec.models[name].init
    if not isinstance(init, GrowInit):
        return None, None
    parent, child = known[init.parent], known[name]
    if parent.shape is None or child.shape is None:
        return None, None
    sizes: dict[str, Any] = {"n_positions": parent.n_positions, "d_vocab": parent.d_vocab or 1, "tied": parent.tied}
    try:
        return plan(spec.models[name].family, parent.shape, child.shape, init, **sizes), None
    except GrowthError as error:
        return None, Problem(f"models.{name}.{error.field}", error.value, error.message)
