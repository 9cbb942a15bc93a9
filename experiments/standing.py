"""How an experiment stands: its rows as what pages say of them.

standings(experiments)    state, progress, time left, runtime of each, in a fixed number of queries
compared(experiment, ...) the rows and curves as :mod:`experiments.compare` wants them
promise(run)              whether growth kept what its plan promised
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from django.utils import timezone

from experiments import compare, line, sources
from experiments.curves import Key, Series
from experiments.models import Experiment, Host, ModelRun, Reason, State, Transfer
from experiments.templatetags import figures
from trainer.shape import GrowInit
from trainer.spec import ExperimentSpec, ModelSpec, TrainSpec

#: Which of its runs speaks for an experiment: what needs attention first.
_SPEAKS = (State.RUNNING, State.QUEUED, State.FAILED, State.CANCELLED, State.SUCCEEDED)
_OWN_COLOURS = frozenset({"small", "scaled", "large"})

#: What a person can do about a failure.
ADVICE: dict[str, str] = {
    Reason.DIVERGED: "Try a lower learning rate or a longer warm-up in a new experiment that starts from this one.",
    Reason.OUT_OF_MEMORY: "Try a smaller batch or context, or stop other runs on this host; then resume.",
    Reason.KILLED: "Resume it: it goes on from its last checkpoint.",
    Reason.LOST: "Resume it: it goes on from its last checkpoint.",
    Reason.DISK_FULL: "Delete experiments that are no longer needed; then resume.",
    Reason.BAD_DATA: "Check the text's name or file, its column and the tokenizer, in a new experiment that starts "
    "from this one.",
    Reason.BAD_CHECKPOINT: "Check the checkpoint's path or name, in a new experiment that starts from this one.",
    Reason.PARENT_ENDED: "Resume the experiment: the model it is grown from is queued with it.",
    Reason.STOPPED: "Resume it: it goes on from its last checkpoint.",
    Reason.ERROR: "The log says more. Resume it once the cause is gone.",
}


class Away(NamedTuple):
    """A host that does not answer as it should. It says nothing of the run, which may well go on there."""

    since: datetime | None
    what: str
    meanwhile: str
    why: str


@dataclass
class RunStanding:
    """One model run as it stands. Times are in seconds; None where nothing is known."""

    run: ModelRun
    total: int | None
    colour: str  # of its line, everywhere: model-<colour> in the style sheet
    parent: str = ""
    place: int | None = None  # in its host's line
    spark: str = ""
    parent_is_done: bool = False

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def said(self) -> str:
        """What the trainer said about how the run ended."""
        return sources.with_short_names(self.run.detail)

    @property
    def share(self) -> float | None:
        """0 to 1; None while it is unknown how long the run is."""
        if self.run.state == State.SUCCEEDED:
            return 1.0
        return min(1.0, self.run.step / self.total) if self.total else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None while nothing is heard of it."""
        run = self.run
        if self.away or run.state != State.RUNNING or not run.step or not run.train_seconds or not self.total:
            return None
        return (self.total - run.step) * run.train_seconds / run.step if run.step < self.total else None

    @property
    def words(self) -> str:
        """Its reason, and what that needs to be understood."""
        run = self.run
        if run.state == State.QUEUED and self.place is not None:
            place = "GPU" if run.reason == Reason.WAITING_FOR_GPU else "place"
            return f"waiting for a free {place} on {_the(run.host)}: number {self.place} in line"
        if run.state == State.QUEUED and run.reason == Reason.WAITING_FOR_PARENT and self.parent:
            over = " to come over from its host" if self.parent_is_done else ""
            return f"waiting for {self.parent}{over}"
        if run.reason == Reason.TRAINING and self.total and run.step >= self.total:
            return "evaluating on the test split"
        if run.reason == Reason.PREPARING and run.preparing:
            return _preparing(run.preparing)
        return Reason(run.reason).label

    @property
    def away(self) -> Away | None:
        """What stands between the site and the host of a run that waits or trains there; for as long as it does."""
        host = self.run.host
        if not self.run.is_active or not host.is_remote or not host.problem:
            return None
        if host.problem == Host.Problem.UNREACHABLE:
            return Away(host.unreachable_since, f"{host} unreachable", "still trying", host.problem_text)
        if host.problem == Host.Problem.KEY_CHANGED:
            said = "Its host key has changed: Kangaroo does not sign in there until you have compared the two keys."
            return Away(host.unreachable_since, f"{host} stopped", "what trains there goes on", said)
        return Away(host.unreachable_since, f"{host} cannot be used", "still trying", host.problem_text)

    @property
    def parts(self) -> list[str]:
        """Where it stands, in a few words each."""
        run = self.run
        found = [self.words] if run.state != State.SUCCEEDED else []
        if run.step:
            found.append(f"step {run.step:,} of {self.total:,}" if self.total else f"step {run.step:,}")
            if run.tokens_per_second:
                found.append(f"{run.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            found.append(f"about {figures.duration(self.seconds_left)} left")
        elif run.ended_at and self.runtime is not None:
            found.append(f"ran {figures.duration(self.runtime)}")
        return found

    @property
    def advice(self) -> str:
        return ADVICE.get(self.run.reason, "") if self.run.state in (State.FAILED, State.CANCELLED) else ""

    @property
    def runtime(self) -> float | None:
        return _seconds(self.run.started_at, self.run.ended_at)


@dataclass
class Standing:
    """An experiment as it stands."""

    experiment: Experiment
    runs: list[RunStanding]
    # For a page that shows them: models on their way here, and how the machines stand.
    transfers: list[Transfer] = field(default_factory=list)
    shows_machines: bool = False

    @cached_property
    def speaker(self) -> ModelRun | None:
        """The run whose state and reason stand for the whole."""
        return min((each.run for each in self.runs), key=lambda run: _SPEAKS.index(State(run.state)), default=None)

    @property
    def speaks(self) -> RunStanding | None:
        return next((each for each in self.runs if each.run is self.speaker), None)

    @property
    def hosts(self) -> list[Host]:
        """Where its models train, each once."""
        return list(dict.fromkeys(run.host for run in self._runs)) or [self.experiment.host]

    @property
    def is_live(self) -> bool:
        """Whether what a page shows of it may still change by itself."""
        return self.is_active or any(transfer.is_moving for transfer in self.transfers)

    @property
    def has_curves(self) -> bool:
        return any(each.spark for each in self.runs)

    @property
    def is_active(self) -> bool:
        return any(each.run.is_active for each in self.runs)

    @property
    def is_resumable(self) -> bool:
        """Something can be resumed, and nothing is on its way to a stop: that would not be taken along."""
        stopping = any(each.run.is_active and each.run.stop_requested for each in self.runs)
        return not stopping and any(each.run.is_resumable for each in self.runs)

    @property
    def has_steps(self) -> bool:
        """Whether there is a checkpoint to resume from: what failed before its first step only begins again."""
        return any(each.run.step for each in self.runs if each.run.is_resumable)

    @property
    def is_stopping(self) -> bool:
        active = [each.run for each in self.runs if each.run.is_active]
        return bool(active) and all(run.stop_requested for run in active)

    @property
    def share(self) -> float | None:
        """Of all steps of all models, each step weighed by its model's FLOPs once all of them are known."""
        shares = [each.share for each in self.runs]
        known = [share for share in shares if share is not None]
        if len(known) < len(shares) or not known:
            return None
        flops = [self._flops_a_step(each) for each in self.runs]
        weights: list[float] = [each.total or 1 for each in self.runs]
        if all(flops):
            weights = [weight * (each or 0) for weight, each in zip(weights, flops, strict=True)]
        return sum(share * weight for share, weight in zip(known, weights, strict=True)) / sum(weights)

    @property
    def seconds_left(self) -> float | None:
        """Until the last model is done, if all goes on at the pace of those that train now; rough.

        A model that waits begins when its parent is done. None while a pace is unknown, or nothing is heard of one.
        """
        if any(each.away for each in self.runs):
            return None
        paces = [run.flops / run.train_seconds for run in self._runs if run.train_seconds and run.flops]
        if not self.is_active or not paces:
            return None
        pace = sum(paces) / len(paces)
        ends: dict[int | None, float] = {None: 0.0}
        for each in sorted(self.runs, key=lambda each: (each.run.parent_id is not None, each.run.position)):
            run = each.run
            if not run.is_active:
                ends[run.pk] = 0.0
            elif each.seconds_left is not None:
                ends[run.pk] = each.seconds_left
            elif run.step and run.step == each.total:
                ends[run.pk] = 0.0
            elif each.total and (weight := self._flops_a_step(each)):
                ends[run.pk] = ends.get(run.parent_id, 0.0) + (each.total - run.step) * weight / pace
            else:
                return None
        return max(ends.values()) or None

    @property
    def runtime(self) -> float | None:
        starts = [run.started_at for run in self._runs if run.started_at]
        ends = [run.ended_at for run in self._runs if run.ended_at]
        if not starts:
            return None
        return _seconds(min(starts), None if self.is_active or not ends else max(ends))

    @property
    def disk_bytes(self) -> int:
        return sum(run.disk_bytes for run in self._runs)

    @cached_property
    def version(self) -> str:
        """Changes whenever anything that a page shows of the experiment does."""
        seen: list[Any] = [self.experiment.pk, self.experiment.name, self.experiment.notes, self.experiment.is_public]
        for each in self.runs:
            run = each.run
            seen.append((run.state, run.reason, run.detail, run.last_seq, run.attempt, run.stop_requested))
            seen.append((run.disk_bytes, each.place, each.away))
            if self.shows_machines and run.is_active:
                seen.append(run.host.readings_at)
        seen += [(each.pk, each.state, each.bytes_done) for each in self.transfers]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:12]

    @property
    def _runs(self) -> list[ModelRun]:
        return [each.run for each in self.runs]

    def _flops_a_step(self, each: RunStanding) -> float | None:
        prepared = each.run.prepared or {}
        if prepared.get("flops_per_token") and prepared.get("tokens_per_step"):
            return float(prepared["flops_per_token"] * prepared["tokens_per_step"])
        shape = self.experiment.spec_json["models"].get(each.name, {}).get("shape")
        twin = next((other for other in self.runs if other.run.prepared and self._shape(other) == shape), None)
        return self._flops_a_step(twin) if twin and shape else None

    def _shape(self, each: RunStanding) -> Any:
        return self.experiment.spec_json["models"].get(each.name, {}).get("shape")


def standings(experiments: Iterable[Experiment]) -> list[Standing]:
    """Each experiment with its runs, which should have been prefetched. One query, and only if something is queued."""
    found = []
    for experiment in experiments:
        runs = sorted(experiment.runs.all(), key=lambda run: run.position)
        names = {run.pk: run.name for run in runs}
        others = [run.name for run in runs if run.name not in _OWN_COLOURS]
        standing = Standing(experiment, [])
        for run in runs:
            colour = run.name if run.name in _OWN_COLOURS else f"other-{others.index(run.name) % 5 + 1}"
            parent = names.get(run.parent_id or 0, "")
            done = any(other.pk == run.parent_id and other.state == State.SUCCEEDED for other in runs)
            standing.runs.append(RunStanding(run, total_steps(experiment, run), colour, parent, parent_is_done=done))
        found.append(standing)
    queued = [each for standing in found for each in standing.runs if each.run.state == State.QUEUED]
    if queued:
        hosts = {each.run.host_id for each in queued}
        places = _places(hosts)
        for each in queued:
            each.place = places.get(each.run.pk)
    return found


def total_steps(experiment: Experiment, run: ModelRun) -> int | None:
    """Steps of the whole run: as its trainer said, else as the spec says without knowing the data's size."""
    if run.total_steps is not None:
        return run.total_steps
    own = experiment.spec_json.get("models", {}).get(run.name, {}).get("train") or {}
    train = {**experiment.spec_json.get("train", {}), **own}
    most = train.get("max_steps", TrainSpec.model_fields["max_steps"].default)
    return most if train.get("num_epochs") is None else None


def _places(hosts: Iterable[int]) -> dict[int, int]:
    """The place in its host's line of every run that only waits for one, by the run's key."""
    waiting = (
        ModelRun.objects.filter(line.ready(), host__in=hosts).order_by("queued_at", "pk").values_list("pk", "host_id")
    )
    counts: dict[int, int] = {}
    found = {}
    for pk, host in waiting:
        counts[host] = counts.get(host, 0) + 1
        found[pk] = counts[host]
    return found


def compared(
    spec: ExperimentSpec, runs: Sequence[ModelRun], validation: dict[Key, Series], eval_tokens: dict[str, int | None]
) -> list[compare.Model]:
    """The models of an experiment for :func:`experiments.compare.verdicts`.

    `validation` holds every evaluation, unless there are more than one in a bucket of the chart: then the lowest and
    highest of each, so that a crossing may lie one bucket off.
    """
    found = []
    for run in runs:
        model = spec.models[run.name]
        prepared = run.prepared or {}
        curve = validation.get((run.name, "validation"))
        found.append(
            compare.Model(
                name=run.name,
                state=run.state,  # type: ignore[arg-type]
                init=model.init.kind,
                parent=model.init.parent if isinstance(model.init, GrowInit) else None,
                shape=_form(model) or run.name,
                evaluations=[
                    compare.Evaluation(compare.Cost(at.step, at.tokens, at.flops, at.seconds), at.loss)
                    for at in (curve.points if curve else ())
                ],
                cost=compare.Cost(run.step, run.tokens, run.flops, run.train_seconds),
                settings=spec.train_of(run.name).model_dump(),
                why=Reason(run.reason).label,
                fingerprint=prepared.get("data_fingerprint"),
                eval_tokens=eval_tokens.get(run.name),
                device=prepared.get("device_name") or prepared.get("device"),
                precision=prepared.get("precision"),
            )
        )
    return found


def _form(model: ModelSpec) -> tuple[object, ...] | None:
    """Equal for models of the same family and shape, however that was written."""
    if model.shape is None:
        return None
    written = model.shape.model_dump() | {"n_kv_heads": model.shape.kv_heads}
    return (model.family, model.tie_embeddings, *sorted(written.items()))


@dataclass(frozen=True)
class Promise:
    """What growth did at step 0, held against what its plan promised for these shapes."""

    kept: bool | None  # None: nothing was promised
    relative: float | None  # largest logit difference over the largest logit
    tolerance: float
    words: str


def promise(grown: dict[str, Any], device: str | None) -> Promise:
    """A preserving plan must leave the logits as they were, up to rounding: 1e-4 of the largest logit in float32.

    On a GPU, whose float32 products may be rounded to TF32's 11 bits on the way, 1e-2.
    """
    tolerance = 1e-2 if device == "cuda" else 1e-4
    difference, scale = grown.get("max_logit_difference"), grown.get("logit_scale")
    relative = difference / scale if difference is not None and scale else None
    if not grown.get("preserves"):
        return Promise(None, relative, tolerance, "These rules promise nothing for these shapes.")
    if relative is None:
        return Promise(None, relative, tolerance, "It was promised to preserve the function, but was not measured.")
    if relative <= tolerance:
        return Promise(True, relative, tolerance, "Promised to preserve the function, and did.")
    return Promise(
        False,
        relative,
        tolerance,
        "Promised to preserve the function, and did not: the logits differ by more than rounding.",
    )


def _the(host: Host) -> str:
    return host.name if host.is_remote else "the host"


def _preparing(event: dict[str, Any]) -> str:
    what, done, total = event.get("what", "preparing"), event.get("done"), event.get("total")
    if done is not None and total:
        return f"{what}: {done:,} of {total:,}"
    return f"{what}: {done:,}" if done is not None else str(what)


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return max(0.0, ((end or timezone.now()) - start).total_seconds()) if start else None
