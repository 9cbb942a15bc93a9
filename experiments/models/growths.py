"""A checkpoint grown by itself: no experiment, no training, a Hugging Face folder that can be downloaded.

As with model runs, what is *wanted* is written by the site and what is *known* by the one job that follows the process.
Its states are those of a run, and change in the same way.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, ClassVar

from django.conf import settings
from django.db import models
from django.utils import timezone

from accounts.models import User
from experiments.models.runs import ACTIVE, RESUMABLE, ModelRun, Reason, State, move
from trainer.growth import GrowthPlan, plan
from trainer.shape import GrowInit, Shape


class GrowthQuerySet(models.QuerySet["Growth"]):
    def owned_by(self, user: Any) -> GrowthQuerySet:
        """Those of `user`, newest first; none for somebody who is not signed in."""
        return self.filter(owner=user) if user.is_authenticated else self.none()

    def visible_to(self, user: Any) -> GrowthQuerySet:
        """Those that `user` may look at: their own; for staff, everybody's."""
        return self if user.is_authenticated and user.is_staff else self.owned_by(user)

    def active(self) -> GrowthQuerySet:
        return self.filter(state__in=ACTIVE)


class Growth(models.Model):
    """One checkpoint grown into a larger one."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="growths")
    name = models.CharField(max_length=160)
    created = models.DateTimeField(default=timezone.now, db_index=True)

    # What is wanted: written by the site.
    source = models.CharField(max_length=1000, help_text="A name on the Hub, or the path of a folder on this machine.")
    source_name = models.CharField(max_length=300, help_text="What people call it.")
    source_run = models.ForeignKey(ModelRun, models.SET_NULL, null=True, blank=True, related_name="+")
    seed = models.PositiveBigIntegerField(default=0)
    dtype = models.CharField(max_length=4, blank=True, help_text="What weights are written as; empty: as they are.")
    measures = models.BooleanField(default=True, help_text="Both models are measured on a text, too.")
    planned = models.JSONField(help_text="The plan that was shown: family, parent, child, init, what it preserves.")
    stop_requested = models.BooleanField(default=False)
    attempt = models.PositiveIntegerField(default=1)

    # What is known: written by the job that follows it.
    state = models.CharField(max_length=10, choices=State, default=State.QUEUED, db_index=True)
    reason = models.CharField(max_length=24, choices=Reason, default=Reason.WAITING_FOR_SLOT)
    detail = models.TextField(blank=True, help_text="More than the reason says: a message, the last lines of the log.")
    phase = models.CharField(max_length=40, blank=True, help_text="What is being done: fetching, writing, verifying.")
    bytes_done = models.BigIntegerField(default=0)
    bytes_total = models.BigIntegerField(null=True, blank=True)
    certificate = models.JSONField(null=True, blank=True, help_text="What was grown, and what was found of it.")
    disk_bytes = models.BigIntegerField(default=0)
    queued_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    last_seen = models.DateTimeField(null=True, blank=True, help_text="When its process was last seen alive.")

    objects: ClassVar[Any] = GrowthQuerySet.as_manager()

    class Meta:
        ordering = ("-created",)
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["owner", "-created"])]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        from django.urls import reverse

        return reverse("growth", args=[self.pk])

    @property
    def directory(self) -> Path:
        return settings.GROWTHS_DIR / str(self.pk)

    @property
    def work(self) -> Path:
        """The agent's folder of this attempt: who grows, what was printed, how it ended."""
        return self.directory / f"attempt-{self.attempt}"

    @property
    def model(self) -> Path:
        """The grown Hugging Face folder: whole, or not there."""
        return self.directory / "model"

    @property
    def job_id(self) -> str:
        return f"growth-{self.pk}-{self.attempt}"

    @property
    def plan(self) -> GrowthPlan:
        """The plan that was shown. Raises :class:`trainer.growth.GrowthError` where the rules have changed since."""
        held = self.planned
        return plan(
            held["family"],
            Shape.model_validate(held["parent"]["shape"]),
            Shape.model_validate(held["child"]["shape"]),
            GrowInit.model_validate(held["init"]),
            n_positions=held["parent"]["n_positions"],
            d_vocab=held["parent"]["d_vocab"],
            tied=held["tied"],
        )

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def is_resumable(self) -> bool:
        return self.state in RESUMABLE

    @property
    def share(self) -> float | None:
        """Of the present phase, 0 to 1; None while it is unknown how much there is."""
        return min(1.0, self.bytes_done / self.bytes_total) if self.bytes_total else None

    def may_change(self, user: User) -> bool:
        return user.is_authenticated and (self.owner_id == user.pk or user.is_staff)

    def move(self, to: State, reason: Reason, *, detail: str = "", **fields: Any) -> bool:
        """Compare-and-set, as :meth:`ModelRun.move`."""
        return move(self, to, reason, detail=detail, **fields)
