"""What the site needs of a machine that trains. Everything behind it is :mod:`trainer.agent`, run there."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, TypedDict
from uuid import UUID

from experiments.models import Host, ModelRun
from trainer.agent import Frame

__all__ = ["Exit", "File", "Frame", "HostProblem", "Outcome", "Status", "Transport"]

Outcome = Literal["started", "already", "finished"]


class HostProblem(ConnectionError):
    """The host cannot be worked with now. That says nothing of what trains there: whoever follows a run tries again.

    `kind` is one of Host.Problem; the message is a sentence or two for people: what is wrong, and what to do.
    """

    def __init__(self, kind: Host.Problem | str, message: str):
        super().__init__(message)
        self.kind = Host.Problem(kind)
        self.message = message


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


class File(NamedTuple):
    """A file of a run directory: its path from there, and its size in bytes."""

    path: str
    size: int


class Transport(Protocol):
    """Run directories on one host. Every call may be repeated; any raises OSError when the host cannot do it.

    :class:`HostProblem`, an OSError too, says that the host could not even be asked.
    """

    def __init__(self, host: Host) -> None: ...

    def start(self, run: ModelRun) -> Outcome:
        """Start the trainer of `run`'s attempt, detached, unless one is alive or this attempt has ended.

        What it needs and the host has not (the trainer itself, a user's text, the model it grows from) is sent first.
        """
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

    def files(self, run: ModelRun, folder: str) -> list[File]:
        """The files below a folder of the run directory, sorted; none where there is no such folder. No links."""
        ...

    def read(self, run: ModelRun, name: str, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of a file from `offset`; b"" at its end. FileNotFoundError as for `open_file`."""
        ...

    def pieces(self, run: ModelRun, name: str, offset: int, size: int) -> Generator[bytes, None, None]:
        """A file of `size` bytes from `offset`, in pieces, asked for ahead of their use. FileNotFoundError as above."""
        ...

    def digest(self, run: ModelRun, name: str) -> str:
        """The SHA-256 of a file of the run directory, in hexadecimal."""
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

    def readings(self) -> dict[str, Any]:
        """How the machine stands now, its GPUs among it: :func:`trainer.machine.readings`."""
        ...
