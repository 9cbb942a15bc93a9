"""The first experiment of an installation: real text, three small models, a few minutes, and the table at its end."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from pathlib import Path
from typing import IO

from django.conf import settings
from django.db import IntegrityError
from django.utils import timezone

from experiments import jobs
from experiments.models import Experiment, ModelRun, Reason, State
from trainer.spec import load_spec

SPEC = Path(__file__).parent / "first_experiment.json"
#: Always this one, so that it cannot be submitted twice, whoever tries at once.
ID = uuid.uuid5(uuid.NAMESPACE_URL, "kangaroo:first-experiment")
_NOTES = "Submitted by Kangaroo itself on its first start, to show what to expect."
#: Seconds between two lines of progress where there is no terminal to draw a bar on.
_EVERY = 10.0
#: Characters of a bar, where there is room.
_WIDTH = 24


def was_submitted() -> bool:
    """Once is enough: also if somebody has deleted it since."""
    return _mark().exists() or Experiment.objects.filter(pk=ID).exists()


def submit() -> Experiment:
    """The first experiment, submitted now unless it was before."""
    experiment: Experiment | None = Experiment.objects.filter(pk=ID).first()
    if experiment is None:
        try:
            experiment = jobs.create(None, load_spec(SPEC), notes=_NOTES, id=ID, is_public=True)
        except IntegrityError:  # another process was quicker
            experiment = Experiment.objects.get(pk=ID)
    _mark().touch()
    return experiment


def _mark() -> Path:
    return Path(settings.VAR / "first-experiment-submitted")


def show(experiment: Experiment, out: IO[str], address: str) -> bool:
    """Write progress until the experiment has ended, then its table. Returns whether all of it succeeded."""
    url = address.rstrip("/") + experiment.get_absolute_url()
    begun, said = time.monotonic(), -math.inf
    out.write(f"First experiment: {experiment.name}\n  {url}\n")
    while True:
        runs = list(experiment.runs.order_by("position"))
        if not runs:
            out.write("\nThe first experiment was deleted.\n")
            return False
        over = not any(run.is_active for run in runs)
        if out.isatty():
            # A line that wraps could not be drawn over.
            room = (shutil.get_terminal_size().columns - 1) // len(runs)
            out.write("\r\x1b[K" + " ".join(_bar(run, room - 1) for run in runs))
        elif over or time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            out.write(f"  {said - begun:4.0f} s  " + " · ".join(_line(run) for run in runs) + "\n")
        out.flush()
        if over:
            break
        time.sleep(0.5)
    out.write(f"\n\n{table(runs)}\n\nCurves, verdict and checkpoints: {url}\n")
    out.flush()
    return all(run.state == State.SUCCEEDED for run in runs)


def _share(run: ModelRun) -> float:
    return 1.0 if run.state == State.SUCCEEDED else run.step / run.total_steps if run.total_steps else 0.0


def _bar(run: ModelRun, room: int) -> str:
    width = max(1, min(_WIDTH, room - len(f"{run.name} [] {_loss(run)}")))
    full = round(_share(run) * width)
    return f"{run.name} [{'█' * full}{'░' * (width - full)}] {_loss(run)}"


def _line(run: ModelRun) -> str:
    if run.state == State.RUNNING and run.total_steps:
        return f"{run.name} step {run.step}/{run.total_steps} loss {_loss(run)}"
    return f"{run.name} {Reason(run.reason).label}"


def _loss(run: ModelRun) -> str:
    return "    -" if run.train_cross_entropy is None else f"{run.train_cross_entropy:.3f}"


def table(runs: list[ModelRun]) -> str:
    """Small, scaled, large: what each is, what it cost and how well it ended (on the test split)."""
    rows: list[tuple[str, ...]] = [("", "parameters", "tokens", "FLOPs", "time", "loss", "perplexity")]
    rows += [_row(run) for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    failed = [f"{run.name}: {Reason(run.reason).label}. {run.detail}" for run in runs if run.state != State.SUCCEEDED]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *failed])


def _row(run: ModelRun) -> tuple[str, ...]:
    loss = run.test_cross_entropy
    took = ((run.ended_at or timezone.now()) - run.started_at).total_seconds() if run.started_at else None
    return (
        run.name,
        "-" if run.parameters is None else f"{run.parameters:,}",
        f"{run.tokens:,}",
        f"{run.flops:.2e}",
        "-" if took is None else f"{took:.0f} s",
        "-" if loss is None else f"{loss:.3f}",
        "-" if loss is None else f"{math.exp(loss):.2f}",
    )
