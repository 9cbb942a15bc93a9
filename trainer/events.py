"""What a model run tells the world: one JSON object a line, in `events.jsonl`.

`seq` counts from 0 without a gap over all attempts of a run; `step`, `tokens`, `flops` and `train_seconds` are totals
since the run's first step, so a resumed run continues them and a step that is trained again repeats the same values.
Reading a line twice must change nothing. Imports no torch.

    started -> preparing* -> prepared -> (grown | train | eval | sample | checkpoint | warning)* -> finished
                                                                                                  |  failed | stopped

A model that is grown before its first step says so at step 0; one that grows on the way, once for each growth.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Split = Literal["train", "validation", "test"]
FailureReason = Literal["diverged", "out_of_memory", "disk_full", "bad_data", "bad_checkpoint", "error"]


class _Event(BaseModel):
    # A newer trainer may say more than an older site understands; what is unknown is kept out of the way, not refused.
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="null")

    seq: int
    at: datetime


class _Progress(_Event):
    """Where the run stood: optimizer steps, tokens seen, training FLOPs, seconds in training steps alone."""

    step: int
    tokens: int
    flops: float
    train_seconds: float


class Started(_Event):
    """The process is alive. Written before torch is imported."""

    kind: Literal["started"] = "started"
    attempt: int
    pid: int
    hostname: str
    versions: dict[str, str]


class Preparing(_Event):
    """Data or weights are being made ready; `done` of `total`, in the unit that `what` implies (may be unknown)."""

    kind: Literal["preparing"] = "preparing"
    what: str
    done: int | None = None
    total: int | None = None


class Prepared(_Event):
    """Data and model stand; training is about to begin (or to go on from `resumed_from`).

    Of a model that grows on the way, parameters and d_vocab are those that it will have at its end, and flops_per_token
    is the mean over all steps. What it has on the way, its `grown` events say.
    """

    kind: Literal["prepared"] = "prepared"
    parameters: int
    non_embedding_parameters: int
    d_vocab: int
    train_tokens: int  # in the training split
    validation_tokens: int
    test_tokens: int
    bytes_per_token: float  # of the validation split, for bits per byte
    data_fingerprint: str
    total_steps: int
    tokens_per_step: int
    flops_per_token: float
    device: str  # "cpu" or "cuda"
    device_name: str  # "2 x NVIDIA H100" where each of two processes has its own
    processes: int = 1  # that share each batch
    precision: Literal["fp32", "bf16"]
    threads: int  # of each process
    seed: int
    resumed_from: int | None = None
    setup_seconds: float
    versions: dict[str, str]


class _Part(BaseModel):
    """A part of an event."""

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="null")


class Measure(_Part):
    """How far the copies on one axis have parted, of one block or (`layer` None) of the model; see trainer.symmetry."""

    axis: str
    layer: int | None
    width: int
    effective_width: int
    least_width: int  # the effective width if all copies were equal
    distance: float | None  # mean over pairs of copies, relative to what is copied
    least_distance: float | None


class Learned(_Part):
    """What it took to train the maps of a growth (LiGO), before they were applied; counted in the run's totals."""

    steps: int
    tokens: int  # seen for it, from the training split; not in the run's totals, which count steps of training
    loss_before: float | None  # of the first step's batch, and of the last's
    loss_after: float | None
    flops: float
    seconds: float
    peak_memory_bytes: int


class Grown(_Event):
    """What growth did, measured on the same held-out tokens before (parent) and after (child), no step taken between.

    Over the parent's vocabulary, where the child has a larger one.
    """

    kind: Literal["grown"] = "grown"
    step: int = 0  # that it came after
    parent: str  # the model's own name where it grew on the way
    width: str
    depth: str
    preserves: bool  # what the plan promises for these shapes
    cross_entropy_before: float
    cross_entropy_after: float
    max_logit_difference: float
    logit_scale: float  # largest |logit| of the parent there: what the difference is to be held against
    kl_divergence: float  # KL(parent || child), nats a token
    n_tokens: int
    seconds: float
    new_parameters: int
    parameters: int | None = None  # in all, from here on
    optimizer: Literal["fresh", "grown"] | None = None  # AdamW's state
    learned: Learned | None = None
    lineage: dict[str, Any] | None = None  # trainer.growth.lineage: where every tensor comes from
    symmetry: list[Measure] | None = None


class Train(_Progress):
    """Mean over the steps since the last such event; lr and grad_norm are of the last step."""

    kind: Literal["train"] = "train"
    cross_entropy: float
    lr: float
    grad_norm: float
    tokens_per_second: float


class Eval(_Progress):
    kind: Literal["eval"] = "eval"
    split: Split
    cross_entropy: float  # nats a token
    perplexity: float
    bits_per_byte: float
    accuracy: float  # of the next token, 0 to 1
    n_tokens: int
    eval_seconds: float
    symmetry: list[Measure] | None = None  # of a grown model's copies, on the validation split


class Checkpoint(_Event):
    """`path` is relative to the run directory."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float


class Sample(_Event):
    kind: Literal["sample"] = "sample"
    step: int
    prompt: str
    text: str


class Warning_(_Event):
    kind: Literal["warning"] = "warning"
    message: str


class Finished(_Progress):
    kind: Literal["finished"] = "finished"
    eval_seconds: float
    setup_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    model: str = "model"


class Failed(_Event):
    kind: Literal["failed"] = "failed"
    reason: FailureReason
    message: str
    step: int | None = None


class Stopped(_Event):
    """The run was asked to stop, wrote a checkpoint, and ended; it can be resumed."""

    kind: Literal["stopped"] = "stopped"
    step: int
    checkpoint: str | None


Event = Annotated[
    Started
    | Preparing
    | Prepared
    | Grown
    | Train
    | Eval
    | Checkpoint
    | Sample
    | Warning_
    | Finished
    | Failed
    | Stopped,
    Field(discriminator="kind"),
]

_ADAPTER: TypeAdapter[Any] = TypeAdapter(Event)


def parse_event(line: str | bytes) -> Event:
    """One line of `events.jsonl`. Raises :class:`pydantic.ValidationError`."""
    return _ADAPTER.validate_json(line)  # type: ignore[no-any-return]
