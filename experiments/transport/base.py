"""What the site needs of a machine that trains. Everything behind it is :mod:`trainer.agent`, run there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Literal, Protocol, TypedDict
from uuid import UUID

from experiments.models import Host, ModelRun
from trainer.agent import Frame

__all__ = ["Exit", "Frame", "Outcome", "Status", "Transport"]

Outcome = Literal["started", "already", "finished"]


class Exit(TypedDict, total=False):
    """How an attempt ended: its exit code or signal, and the last lines it printed."""

    attempt: int
    code: int | None
    signal: int | None
    out_of_memory: bool
    at: float
    log: str
    lost: bool  # nobody was left to write how it ended
    rebooted: bool  # lost because the machine was started anew


class Status(TypedDict):
    attempt: int  # 0: never started
    alive: bool
    pid: int | None
    at: float | None
    exit: Exit | None


class Transport(Protocol):
    """Run directories on one host. Every call may be repeated; any raises OSError when the host cannot do it."""

    def __init__(self, host: Host) -> None: ...

    def start(self, run: ModelRun) -> Outcome:
        """Start the trainer of `run`'s attempt, detached, unless one is alive or this attempt has ended."""
        ...

    def status(self, run: ModelRun) -> Status: ...

    def stop(self, run: ModelRun, grace: float) -> bool:
        """Ask the trainer to leave, after `grace` seconds by force. Returns at once: whether it is gone."""
        ...

    def tail(self, run: ModelRun, offset: int) -> Iterator[Frame]:
        """The event stream from byte `offset`: lines, a sign of life every second or so, and the end."""
        ...

    def open_file(self, run: ModelRun, name: str) -> BinaryIO:
        """A file of the run directory by its relative path. FileNotFoundError, also for a path that leads outside."""
        ...

    def disk_bytes(self, run: ModelRun) -> int:
        """What the run directory takes on the host's disk."""
        ...

    def remove(self, experiment: UUID) -> None:
        """Kill what still trains for an experiment, and delete its directory."""
        ...

    def half_removed(self) -> list[UUID]:
        """Experiments whose removal was begun on this host and cut short."""
        ...
