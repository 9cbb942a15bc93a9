"""The index of what happens in run directories: experiments, their model runs, points on their curves.

A run directory is the truth; these rows can be rebuilt from it. What is *wanted* (run, stop; which attempt) is written
by the site; what is *known* (state, offset, metrics) is written by the one job that follows the run.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

from accounts.models import User
from experiments.models.hosts import Host
from trainer.spec import ExperimentSpec, ModelSpec, parse_spec


class State(models.TextChoices):
    """What the machine does next."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: Every change of state there is. FAILED and CANCELLED runs can be resumed.
TRANSITIONS: dict[str, frozenset[str]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}
ACTIVE = (State.QUEUED, State.RUNNING)
RESUMABLE = (State.FAILED, State.CANCELLED)


class Reason(models.TextChoices):
    """What the person reads: why a run is in its state."""

    WAITING_FOR_SLOT = "waiting_for_slot", "waiting for a free place on the host"
    WAITING_FOR_GPU = "waiting_for_gpu", "waiting for a free GPU on the host"
    WAITING_FOR_PARENT = "waiting_for_parent", "waiting for the model it is grown from"
    SENDING = "sending", "sending what it needs to the host"
    STARTING = "starting", "starting"
    PREPARING = "preparing", "preparing data"
    TRAINING = "training", "training"
    GROWING = "growing", "growing"
    STOPPING = "stopping", "writing a checkpoint, then stopping"
    FINISHED = "finished", "finished"
    STOPPED = "stopped", "stopped on request"
    PARENT_ENDED = "parent_ended", "the model it is grown from did not finish"
    DIVERGED = "diverged", "the loss diverged"
    OUT_OF_MEMORY = "out_of_memory", "out of memory"
    KILLED = "killed", "the training process was killed"
    DISK_FULL = "disk_full", "the disk is full"
    BAD_DATA = "bad_data", "the text or its tokenizer could not be used"
    BAD_CHECKPOINT = "bad_checkpoint", "the checkpoint could not be used"
    LOST = "lost", "the host has no record of the process"
    ERROR = "error", "the trainer ended with an error"


def move(row: Any, to: State, reason: Reason, *, detail: str = "", **fields: Any) -> bool:
    """:meth:`ModelRun.move`, of any row that has a state, a reason, a detail and an attempt."""
    if to not in TRANSITIONS[row.state]:
        raise ValueError(f"a run that is {row.state} cannot become {to}")
    changes = {"state": to, "reason": reason, "detail": detail, **fields}
    moved = type(row).objects.filter(pk=row.pk, state=row.state, attempt=row.attempt).update(**changes)
    if moved:
        for field, value in changes.items():
            setattr(row, field, value)
    return bool(moved)


class ExperimentQuerySet(models.QuerySet["Experiment"]):
    def owned_by(self, user: Any) -> ExperimentQuerySet:
        """Those of `user`, newest first; none for somebody who is not signed in."""
        if not user.is_authenticated:
            return self.none()
        return self.filter(owner=user)

    def visible_to(self, user: Any) -> ExperimentQuerySet:
        """Those that `user` may look at: their own, and the ones shown to all."""
        if not user.is_authenticated:
            return self.filter(is_public=True)
        if user.is_staff:
            return self
        return self.filter(Q(owner=user) | Q(is_public=True))

    def active(self) -> ExperimentQuerySet:
        return self.filter(runs__state__in=ACTIVE).distinct()


class Experiment(models.Model):
    """One question, with the spec that asks it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, null=True, related_name="experiments")
    name = models.CharField(max_length=120)
    notes = models.TextField(blank=True, max_length=20_000)
    spec_json = models.JSONField()
    host = models.ForeignKey(Host, models.RESTRICT, related_name="experiments", help_text="Where its runs train.")
    is_public = models.BooleanField(default=False, help_text="Shown, read-only, to everybody.")
    created = models.DateTimeField(default=timezone.now, db_index=True)

    objects: ClassVar[Any] = ExperimentQuerySet.as_manager()

    class Meta:
        ordering = ("-created",)
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["owner", "-created"])]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        from django.urls import reverse

        return reverse("experiment", args=[self.pk])

    @property
    def spec(self) -> ExperimentSpec:
        return parse_spec(self.spec_json)

    @property
    def directory(self) -> Path:
        return settings.RUNS_DIR / str(self.pk)

    def may_change(self, user: User) -> bool:
        return user.is_authenticated and (self.owner_id == user.pk or user.is_staff)


class ModelRunQuerySet(models.QuerySet["ModelRun"]):
    def active(self) -> ModelRunQuerySet:
        return self.filter(state__in=ACTIVE)

    def visible_to(self, user: Any) -> ModelRunQuerySet:
        return self.filter(experiment__in=Experiment.objects.visible_to(user))


class ModelRun(models.Model):
    """One model of an experiment being initialised and trained."""

    experiment = models.ForeignKey(Experiment, models.CASCADE, related_name="runs")
    name = models.CharField(max_length=32, help_text="Its role: small, scaled, large, or another name in the spec.")
    position = models.PositiveSmallIntegerField(default=0)
    parent = models.ForeignKey("self", models.CASCADE, null=True, blank=True, related_name="children")

    # What is wanted: written by the site.
    host = models.ForeignKey(Host, models.RESTRICT, related_name="runs")
    gpus_wanted = models.PositiveSmallIntegerField(default=1, help_text="How many GPUs, on a host that has some.")
    stop_requested = models.BooleanField(default=False)
    attempt = models.PositiveIntegerField(default=1)

    # What is known: written by the job that follows the run.
    state = models.CharField(max_length=10, choices=State, default=State.QUEUED, db_index=True)
    reason = models.CharField(max_length=24, choices=Reason, default=Reason.WAITING_FOR_SLOT)
    detail = models.TextField(blank=True, help_text="More than the reason says: a message, the last lines of the log.")
    offset = models.BigIntegerField(default=0, help_text="Bytes of events.jsonl that are in the database.")
    last_seq = models.BigIntegerField(default=-1)
    step = models.PositiveIntegerField(default=0)
    total_steps = models.PositiveIntegerField(null=True, blank=True)
    tokens = models.BigIntegerField(default=0)
    flops = models.FloatField(default=0)
    train_seconds = models.FloatField(default=0)
    tokens_per_second = models.FloatField(null=True, blank=True)
    parameters = models.BigIntegerField(null=True, blank=True)
    non_embedding_parameters = models.BigIntegerField(null=True, blank=True)
    train_cross_entropy = models.FloatField(null=True, blank=True)
    validation_cross_entropy = models.FloatField(null=True, blank=True)
    test_cross_entropy = models.FloatField(null=True, blank=True)
    peak_memory_bytes = models.BigIntegerField(null=True, blank=True)
    preparing = models.JSONField(null=True, blank=True, help_text="The newest `preparing` event.")
    prepared = models.JSONField(null=True, blank=True, help_text="The `prepared` event: data, device, versions.")
    grown = models.JSONField(null=True, blank=True, help_text="The `grown` event: what growth did at step 0.")
    finished = models.JSONField(null=True, blank=True, help_text="The `finished` event.")
    disk_bytes = models.BigIntegerField(default=0)
    gpus = models.JSONField(default=list, blank=True, help_text="UUIDs of the GPUs it has been given.")

    queued_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    last_event_at = models.DateTimeField(null=True, blank=True)
    last_seen = models.DateTimeField(null=True, blank=True, help_text="When its process was last seen alive.")

    objects: ClassVar[Any] = ModelRunQuerySet.as_manager()

    class Meta:
        ordering = ("experiment", "position")
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["experiment", "name"], name="a_name_once_an_experiment")
        ]

    def __str__(self) -> str:
        return f"{self.experiment}: {self.name}"

    @property
    def spec(self) -> ModelSpec:
        return self.experiment.spec.models[self.name]

    @property
    def directory(self) -> Path:
        return self.experiment.directory / self.name

    @property
    def job_id(self) -> str:
        return f"run-{self.pk}-{self.attempt}"

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def is_resumable(self) -> bool:
        return self.state in RESUMABLE

    def move(self, to: State, reason: Reason, *, detail: str = "", **fields: Any) -> bool:
        """Compare-and-set: True if this process made the change, False if the row had moved on meanwhile.

        Raises ValueError for a change that is not in TRANSITIONS.
        """
        return move(self, to, reason, detail=detail, **fields)


class Point(models.Model):
    """One point on a curve: a step's training loss, or an evaluation on a split."""

    class Split(models.TextChoices):
        TRAIN = "train"
        VALIDATION = "validation"
        TEST = "test"

    run = models.ForeignKey(ModelRun, models.CASCADE, related_name="points")
    split = models.CharField(max_length=10, choices=Split)
    step = models.PositiveIntegerField()
    tokens = models.BigIntegerField()
    flops = models.FloatField()
    train_seconds = models.FloatField()
    cross_entropy = models.FloatField(null=True)
    accuracy = models.FloatField(null=True)
    bits_per_byte = models.FloatField(null=True)
    n_tokens = models.BigIntegerField(null=True)
    lr = models.FloatField(null=True)
    grad_norm = models.FloatField(null=True)

    class Meta:
        ordering = ("run", "split", "step")
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["run", "split", "step"], name="a_point_once")
        ]

    def __str__(self) -> str:
        return f"{self.split} at step {self.step}"


class Note(models.Model):
    """An event that is not a point: growth, checkpoint, sample, warning, failure. Kept whole."""

    run = models.ForeignKey(ModelRun, models.CASCADE, related_name="notes")
    seq = models.BigIntegerField()
    at = models.DateTimeField()
    kind = models.CharField(max_length=16)
    data = models.JSONField()

    class Meta:
        ordering = ("run", "seq")
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["run", "seq"], name="an_event_once")
        ]

    def __str__(self) -> str:
        return f"{self.kind}, event {self.seq}"


class Transfer(models.Model):
    """A finished model or a checkpoint on its way from a host to this machine's copy of the run directory."""

    class State(models.TextChoices):
        WANTED = "wanted"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"

    run = models.ForeignKey(ModelRun, models.CASCADE, related_name="transfers")
    name = models.CharField(max_length=40, help_text="model, or step-000400.")
    state = models.CharField(max_length=8, choices=State, default=State.WANTED)
    bytes_done = models.BigIntegerField(default=0)
    bytes_total = models.BigIntegerField(null=True)
    error = models.TextField(blank=True)
    created = models.DateTimeField(default=timezone.now)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("created",)
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["run", "name"], name="a_transfer_once")
        ]

    def __str__(self) -> str:
        return f"{self.name} of {self.run}"

    @property
    def is_moving(self) -> bool:
        return self.state in (self.State.WANTED, self.State.RUNNING)

    @property
    def share(self) -> float | None:
        """0 to 1; None while it is unknown how much there is."""
        return min(1.0, self.bytes_done / self.bytes_total) if self.bytes_total else None


class Removal(models.Model):
    """The folder of a deleted experiment, still to be removed from a host: it may not answer now."""

    experiment_id = models.UUIDField()
    host = models.ForeignKey(Host, models.CASCADE, related_name="removals")
    created = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["experiment_id", "host"], name="a_removal_once")
        ]

    def __str__(self) -> str:
        return f"experiment {self.experiment_id} on {self.host}"
