"""Rows for tests and benchmarks: experiments as they stand when queued, running, finished or failed.

experiment = make_experiment(owner)                            small, scaled, large: all finished, with curves
experiment = make_experiment(owner, state="running", until=0.4)    40 % of the way
experiment = make_experiment(owner, points=0)                  rows without curves
"""

from __future__ import annotations

import math
import random
from datetime import timedelta
from typing import Any

from django.utils import timezone

from accounts.models import User
from experiments.models import Experiment, Host, ModelRun, Note, Point, Reason, State

SHAPES: dict[str, dict[str, Any]] = {
    "little": {"d_model": 64, "n_heads": 2, "d_head": 32, "d_mlp": 256, "n_layers": 2},
    "big": {"d_model": 128, "n_heads": 4, "d_head": 32, "d_mlp": 512, "n_layers": 4},
}
#: First loss, last loss, parameters and FLOPs a token of the standard three.
CURVES: dict[str, tuple[float, float, int, float]] = {
    "small": (8.32, 4.70, 350_000, 2.1e6),
    "scaled": (4.70, 3.90, 1_300_000, 7.8e6),
    "large": (8.32, 4.20, 1_300_000, 7.8e6),
}
REASONS = {
    "queued": Reason.WAITING_FOR_SLOT,
    "running": Reason.TRAINING,
    "succeeded": Reason.FINISHED,
    "failed": Reason.OUT_OF_MEMORY,
    "cancelled": Reason.STOPPED,
}


def make_user(email: str = "ada@example.org", **fields: Any) -> User:
    return User.objects.create_user(email, "correct horse", **fields)


def make_spec(name: str = "Sources, 0.4M to 1.3M", *, steps: int = 400, eval_every: int = 50) -> dict[str, Any]:
    return {
        "name": name,
        "data": {"source": "python-stdlib", "tokenizer": {"kind": "bpe", "d_vocab": 4096}},
        "train": {"n_ctx": 64, "batch_size": 8, "max_steps": steps, "eval_every": eval_every, "seed": 0},
        "models": {
            "small": {"shape": SHAPES["little"]},
            "scaled": {
                "shape": SHAPES["big"],
                "init": {"kind": "grow", "parent": "small", "width": "duplicate", "depth": "identity"},
            },
            "large": {"shape": SHAPES["big"]},
        },
    }


def make_experiment(
    owner: User | None,
    *,
    name: str = "Sources, 0.4M to 1.3M",
    state: str = "succeeded",
    states: dict[str, str] | None = None,
    until: float = 1.0,
    steps: int = 400,
    points: int = 40,
    eval_every: int = 50,
    spec: dict[str, Any] | None = None,
    **fields: Any,
) -> Experiment:
    """An experiment with a row a model.

    `states` gives single models another state than `state`; `until` says how far those that began have come; a whole
    curve has `points` training points, and a validation point every `eval_every` steps.
    """
    spec = spec or make_spec(name, steps=steps, eval_every=eval_every)
    experiment: Experiment = Experiment.objects.create(
        owner=owner, name=name, spec_json=spec, host=Host.local(), **fields
    )
    runs: dict[str, ModelRun] = {}
    for position, (model, part) in enumerate(spec["models"].items()):
        runs[model] = make_run(
            experiment,
            model,
            position=position,
            parent=runs.get(part.get("init", {}).get("parent")),
            state=(states or {}).get(model, state),
            until=until,
            steps=steps,
            points=points,
            eval_every=eval_every,
        )
    return experiment


def make_run(
    experiment: Experiment,
    name: str,
    *,
    position: int,
    parent: ModelRun | None,
    state: str,
    until: float,
    steps: int,
    points: int,
    eval_every: int,
) -> ModelRun:
    now = timezone.now()
    first, last, parameters, flops_per_token = CURVES.get(name, CURVES["large"])
    done = 0 if state == "queued" else round(steps * (1.0 if state == "succeeded" else until))
    tokens_per_step = 64 * 8
    began = state != "queued"
    ended = state in ("succeeded", "failed", "cancelled")
    versions = {"kangaroo": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.24.0"}
    run: ModelRun = ModelRun.objects.create(
        experiment=experiment,
        name=name,
        host=experiment.host,
        position=position,
        parent=parent,
        state=state,
        reason=REASONS[state] if not (state == "queued" and parent) else Reason.WAITING_FOR_PARENT,
        detail="torch.OutOfMemoryError: tried to allocate 2.00 GiB" if state == "failed" else "",
        step=done,
        total_steps=steps if began else None,
        tokens=done * tokens_per_step,
        flops=done * tokens_per_step * flops_per_token,
        train_seconds=done * 0.02,
        tokens_per_second=tokens_per_step / 0.02 if began else None,
        parameters=parameters if began else None,
        non_embedding_parameters=parameters // 2 if began else None,
        train_cross_entropy=_loss(first, last, done / steps) if done else None,
        validation_cross_entropy=_loss(first, last, done / steps) + 0.02 if done else None,
        test_cross_entropy=last + 0.03 if state == "succeeded" else None,
        peak_memory_bytes=600_000_000 if state == "succeeded" else None,
        prepared={
            "data_fingerprint": "f00dfeed",
            "d_vocab": 4096,
            "train_tokens": 5_000_000,
            "device": "cpu",
            "device_name": "a processor",
            "precision": "fp32",
            "threads": 2,
            "seed": 0,
            "flops_per_token": flops_per_token,
            "tokens_per_step": tokens_per_step,
            "versions": versions,
        }
        if began
        else None,
        grown={
            "parent": parent.name,
            "width": "duplicate",
            "depth": "identity",
            "preserves": True,
            "cross_entropy_before": 4.7213,
            "cross_entropy_after": 4.7213,
            "max_logit_difference": 3.1e-5,
            "logit_scale": 21.4,
            "kl_divergence": 1.2e-9,
            "n_tokens": 8192,
            "seconds": 0.6,
            "new_parameters": 950_000,
        }
        if began and parent
        else None,
        finished={"eval_seconds": 3.0, "setup_seconds": 5.0, "model": "model"} if state == "succeeded" else None,
        started_at=now - timedelta(seconds=done * 0.03 + 5) if began else None,
        ended_at=now if ended else None,
        last_event_at=now if began else None,
        last_seen=now if began else None,
        last_seq=done,
        disk_bytes=25_000_000 if began else 0,
    )
    if points:
        add_points(run, first, last, done, steps, points, eval_every, tokens_per_step, flops_per_token)
    return run


def add_points(
    run: ModelRun,
    first: float,
    last: float,
    done: int,
    steps: int,
    points: int,
    eval_every: int,
    tokens_per_step: int,
    flops_per_token: float,
) -> None:
    noise = random.Random(run.name)
    rows = []

    def row(split: str, step: int, value: float, **more: Any) -> Point:
        tokens = step * tokens_per_step
        return Point(
            run=run,
            split=split,
            step=step,
            tokens=tokens,
            flops=tokens * flops_per_token,
            train_seconds=step * 0.02,
            cross_entropy=value,
            **more,
        )

    every = max(1, steps // points)
    for step in range(every, done + 1, every):
        value = _loss(first, last, step / steps) + noise.gauss(0, 0.05)
        rows.append(row("train", step, value, lr=1e-3, grad_norm=1.0))
    measures = {"accuracy": 0.31, "n_tokens": 65_536}
    for step in range(0, done + 1, eval_every):
        value = _loss(first, last, step / steps) + 0.02
        rows.append(row("validation", step, value, bits_per_byte=value / 2.5, **measures))
    if run.state == State.SUCCEEDED:
        rows.append(row("test", done, last + 0.03, bits_per_byte=(last + 0.03) / 2.5, **measures))
    Point.objects.bulk_create(rows, batch_size=5000)


def add_note(run: ModelRun, kind: str, **data: Any) -> Note:
    seq = run.notes.count()
    return Note.objects.create(run=run, seq=seq, at=timezone.now(), kind=kind, data=data)


def _loss(first: float, last: float, share: float) -> float:
    """Falls fast, then slowly; at `last` when share is 1."""
    return last + (first - last) * (math.exp(-5 * share) - math.exp(-5)) / (1 - math.exp(-5))
