"""Where runs train: this machine, a machine with a worker of its own, or a user's machine reached over SSH.

What a host is and what is wanted of it is written by the site. What is known of it (its facts, how it was last seen,
what stands in the way) is written by the collector alone (:mod:`experiments.collector`). What a machine says of itself
comes from outside: it is shown escaped and cut.
"""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone

from accounts.models import User
from experiments.credentials import EncryptedField


class HostQuerySet(models.QuerySet["Host"]):
    def visible_to(self, user: Any) -> HostQuerySet:
        """Hosts that `user` may look at: their own, and those offered to all. Not for guests."""
        if not user.is_authenticated or user.is_guest:
            return self.none()
        return self.filter(kind=Host.Kind.SSH, retired_at=None).filter(Q(owner=user) | Q(offered=True))

    def owned_by(self, user: Any) -> HostQuerySet:
        """Hosts that `user` may change."""
        return self.visible_to(user).filter(owner=user)

    def usable_by(self, user: Any) -> HostQuerySet:
        """Where `user` may train: this machine, the operator's workers, and their confirmed machines."""
        ours = Q(kind__in=[Host.Kind.LOCAL, Host.Kind.WORKER])
        if not user.is_authenticated or user.is_guest:
            return self.filter(ours)
        theirs = Q(kind=Host.Kind.SSH) & ~Q(host_key="") & (Q(owner=user) | Q(offered=True))
        return self.filter(ours | theirs, retired_at=None)


class Host(models.Model):
    """Where runs train."""

    class Kind(models.TextChoices):
        LOCAL = "local", "this machine"
        WORKER = "worker", "a machine with a worker of its own"
        SSH = "ssh", "a machine reached over SSH"

    class Credential(models.TextChoices):
        GENERATED = "generated", "a key that Kangaroo made for this host"
        OWN = "own", "a private key of its owner's"

    class Problem(models.TextChoices):
        """What stands in the way, as far as a program needs to know; `problem_text` is for people."""

        UNREACHABLE = "unreachable"
        KEY_CHANGED = "key_changed"
        LOGIN_REFUSED = "login_refused"
        ADDRESS_REFUSED = "address_refused"
        NO_PYTHON = "no_python"
        UNUSABLE = "unusable"  # it answers, but not as it must: a folder that cannot be written, a broken shell

    identity = models.UUIDField(default=uuid.uuid4, editable=False, help_text="Ciphertext is bound to it.")
    name = models.CharField(max_length=80)
    kind = models.CharField(max_length=8, choices=Kind, default=Kind.LOCAL)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.SET_NULL, null=True, blank=True, related_name="hosts")
    offered = models.BooleanField(default=False, help_text="Every user may train on it.")
    slots = models.PositiveSmallIntegerField(
        default=1,
        validators=[MinValueValidator(1), MaxValueValidator(64)],
        help_text="How many runs train there at once, where there is no GPU.",
    )
    created = models.DateTimeField(auto_now_add=True)
    retired_at = models.DateTimeField(null=True, blank=True, help_text="Deleted, but experiments were trained there.")

    # How it is reached
    address = models.CharField(max_length=253, blank=True)
    port = models.PositiveIntegerField(default=22, validators=[MinValueValidator(1), MaxValueValidator(65535)])
    username = models.CharField("user", max_length=64, blank=True)
    jump = models.ForeignKey("self", models.RESTRICT, null=True, blank=True, related_name="reached_through_it")
    forwards = models.BooleanField(default=False, help_text="Others may be reached through it (a jump host).")

    # What is done there
    folder = models.CharField("working folder", max_length=200, default="kangaroo")
    python = models.CharField("Python", max_length=200, blank=True)
    before = models.TextField("lines to run before", max_length=2000, blank=True)
    price_per_hour = models.DecimalField(max_digits=8, decimal_places=2, null=True, blank=True)
    runs_per_gpu = models.PositiveSmallIntegerField(default=1, validators=[MinValueValidator(1), MaxValueValidator(16)])
    gpu_choice = models.CharField("GPUs to use", max_length=100, blank=True, help_text="0,1 for instance. Empty: all.")

    # The credential. Never shown, never logged; only the collector's process reads the encrypted two.
    credential = models.CharField(max_length=10, choices=Credential, blank=True)
    public_key = models.TextField(blank=True)
    private_key = EncryptedField(blank=True)
    passphrase = EncryptedField(blank=True)
    credential_changed = models.DateTimeField(null=True, blank=True)

    # The host key, "ssh-ed25519 AAAA...": the one that was confirmed, and one that was seen and is not confirmed yet
    host_key = models.TextField(blank=True)
    seen_key = models.TextField(blank=True)

    # What is known
    facts = models.JSONField(null=True, blank=True, help_text="What the last probe found: trainer.machine.facts().")
    probed_at = models.DateTimeField(null=True, blank=True)
    env_python = models.CharField(max_length=300, blank=True, help_text="The interpreter there that has torch.")
    readings = models.JSONField(null=True, blank=True, help_text="The newest trainer.machine.readings().")
    readings_at = models.DateTimeField(null=True, blank=True)
    last_seen = models.DateTimeField(null=True, blank=True)
    unreachable_since = models.DateTimeField(null=True, blank=True)
    problem = models.CharField(max_length=16, choices=Problem, blank=True)
    problem_text = models.CharField(max_length=500, blank=True)

    objects: ClassVar[Any] = HostQuerySet.as_manager()

    class Meta:
        ordering = ("name",)
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["owner", "name"],
                condition=Q(retired_at=None),
                name="a_host_name_once",
                violation_error_message="You have a host of this name already.",
            ),
            models.UniqueConstraint(
                fields=["name"], condition=Q(owner=None, retired_at=None), name="an_operators_host_name_once"
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        from django.urls import reverse

        return reverse("host", args=[self.pk])

    @property
    def is_remote(self) -> bool:
        return self.kind == self.Kind.SSH

    @property
    def queue(self) -> str:
        """The RQ queue of this host's jobs: those of a worker's machine are followed there, all others here."""
        return f"host-{self.name}" if self.kind == self.Kind.WORKER else "default"

    @property
    def is_ready(self) -> bool:
        """Whether a run can begin there: its key is confirmed, and a Python with torch was found or made."""
        return not self.is_remote or bool(self.host_key and self.env_python and not self.retired_at)

    def may_change(self, user: User) -> bool:
        return self.is_remote and user.is_authenticated and not user.is_guest and self.owner_id == user.pk

    def serves(self, user: User | None) -> bool:
        """Whether runs of `user` may begin there, as far as its owner goes: it may have been offered, and no longer."""
        owner = None if user is None else user.pk
        return not self.is_remote or (self.retired_at is None and (self.offered or self.owner_id == owner))

    @classmethod
    def local(cls) -> Host:
        return cls.objects.get_or_create(
            kind=cls.Kind.LOCAL, defaults={"name": "this machine", "slots": settings.LOCAL_SLOTS}
        )[0]


class HostKeyPin(models.Model):
    """A host key that somebody confirmed: who trusted what, and when. Never changed."""

    host = models.ForeignKey(Host, models.CASCADE, related_name="pins")
    key = models.TextField()
    previous = models.TextField(blank=True, help_text="The key that was trusted before.")
    by = models.ForeignKey(settings.AUTH_USER_MODEL, models.SET_NULL, null=True, related_name="+")
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ("-at",)

    def __str__(self) -> str:
        return f"{self.host} at {self.at:%Y-%m-%d %H:%M}"


class HostTask(models.Model):
    """Something that is done on a host while somebody watches. Asked for by the site, done by the collector.

    `steps` is a list of {"key", "title", "state": "waiting" | "running" | "done" | "failed" | "warning", "text",
    "remedy"}, in the order of doing.
    """

    class Kind(models.TextChoices):
        PROBE = "probe", "look at it"
        SET_UP = "set_up", "set it up"

    class State(models.TextChoices):
        WANTED = "wanted"
        RUNNING = "running"
        SUCCEEDED = "succeeded"
        FAILED = "failed"
        CANCELLED = "cancelled"

    host = models.ForeignKey(Host, models.CASCADE, related_name="tasks")
    kind = models.CharField(max_length=8, choices=Kind)
    state = models.CharField(max_length=10, choices=State, default=State.WANTED)
    steps = models.JSONField(default=list, blank=True)
    log = models.TextField(blank=True)
    asked_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.SET_NULL, null=True, related_name="+")
    cancel_requested = models.BooleanField(default=False)
    created = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-created",)
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["host"], condition=Q(state__in=["wanted", "running"]), name="one_task_a_host_at_a_time"
            )
        ]

    def __str__(self) -> str:
        return f"{self.get_kind_display()}: {self.host}"

    @property
    def is_active(self) -> bool:
        return self.state in (self.State.WANTED, self.State.RUNNING)
