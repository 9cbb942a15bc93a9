"""What a run on a GPU host leaves here: its events and log as they come, its models when they are wanted.

They stand where a local run would have written them, so pages, downloads and a child that trains here find them at the
same place, also while the host is away. A file is taken over at the byte where ours ends; a model is whole or absent,
every file of it checked by its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone

from accounts.models import User
from experiments.models import Experiment, Growth, Host, ModelRun, Transfer
from experiments.transport import File, Transport, for_host

#: Bytes asked for at once.
CHUNK = 1 << 20
#: Bytes of a log that are brought here, at most: what comes first says what went wrong, but a loop can print for days.
MOST_LOG = 20 << 20
#: Bytes of events that a run on a host may tell: a million steps. What tells more is not a trainer of ours.
MOST_EVENTS = 256 << 20
#: Files that a model may have; each is opened when it is downloaded. Their names end in other people's file systems.
MOST_FILES = 200
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._ +=-]{1,100}(/(?!\.)[A-Za-z0-9._ +=-]{1,100}){0,4}")


class Unwanted(Exception):
    """Whoever wanted it does not any more."""


class Damaged(OSError):
    """What came is not what the host has."""


def keep(run: ModelRun, name: str, offset: int, data: bytes) -> None:
    """Write `data` at `offset` of our copy of a file. Repeating it changes nothing; a gap before it is left alone."""
    run.directory.mkdir(parents=True, exist_ok=True)
    with open(os.open(run.directory / name, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        if offset <= file.seek(0, os.SEEK_END):
            file.seek(offset)
            file.write(data)


def keep_log(run: ModelRun, transport: Transport) -> None:
    """What the trainer has printed since."""
    with contextlib.suppress(FileNotFoundError):
        path = run.directory / "log.txt"
        held = path.stat().st_size if path.exists() else 0
        while held < MOST_LOG and (data := transport.read(run, "log.txt", held, CHUNK)):
            keep(run, "log.txt", held, data)
            held += len(data)


def clear_up(run: ModelRun) -> None:
    """Remove what was still written here of an experiment that was deleted meanwhile."""
    if not Experiment.objects.filter(pk=run.experiment_id).exists():
        for_host(Host.local()).remove(run.experiment_id)


def forget(run: ModelRun) -> None:
    """Our copies, where the host's folder is gone and the run begins anew."""
    shutil.rmtree(run.directory, ignore_errors=True)


def want_model(run: ModelRun, transport: Transport) -> None:
    """Ask for the finished model, where it is small enough to come unasked, or a child on another host needs it."""
    size = sum(file.size for file in transport.files(run, "model"))
    needed = run.children.exclude(host=run.host_id).exists()
    if size and (needed or size <= settings.FETCH_MODELS_GB * 1e9):
        with transaction.atomic():
            ModelRun.objects.select_for_update().get(pk=run.pk)  # not for one that was deleted meanwhile
            Transfer.objects.get_or_create(run=run, name="model", defaults={"bytes_total": size})


def folder_of(name: str) -> str:
    """Where a checkpoint (`step-000400`) or the `model` stands in its run directory."""
    return name if name == "model" else f"checkpoints/{name}"


def fetch(transfer: Transfer, transport: Transport, leaving: Callable[[], bool]) -> bool:
    """Bring a model or checkpoint here, going on where an earlier try was broken off; False if told to leave.

    Raises FileNotFoundError if the host has it no more, :class:`Damaged` if a file came over with another digest,
    :class:`Unwanted` if its run was deleted, HostProblem if the host is away.
    """
    run, folder = transfer.run, folder_of(transfer.name)
    final = run.directory / folder
    if final.is_dir():
        return True
    files = transport.files(run, folder)
    if not files:
        raise FileNotFoundError(f"The host has no {transfer.name} any more; only the newest checkpoints are kept.")
    if len(files) > MOST_FILES or not all(_NAME.fullmatch(file.path.removeprefix(f"{folder}/")) for file in files):
        raise Damaged(f"What the host calls {transfer.name} is none: too many files, or names that none has.")
    incoming = run.directory / f".{transfer.name}.incoming"
    progress = _Progress(transfer, sum(file.size for file in files))
    _check_room(transfer, progress.total)
    _clear_unlisted(incoming, {str(Path(file.path).relative_to(folder)) for file in files})
    for file in files:
        inside = Path(file.path).relative_to(folder)
        if not _bring(run, transport, file, incoming / inside, progress, leaving):
            return False
    progress.tell()
    final.parent.mkdir(parents=True, exist_ok=True)
    incoming.rename(final)
    return True


def _clear_unlisted(incoming: Path, listed: set[str]) -> None:
    """Of an earlier try, forget what the host no longer lists, so that no more stands here than is counted."""
    for path in incoming.rglob("*"):
        if path.is_file() and str(path.relative_to(incoming)).removesuffix(".part") not in listed:
            path.unlink()


def bytes_here(owner: User) -> int:
    """What the experiments and growths of `owner` take on this machine's disk; a host's is its owner's affair."""
    runs = ModelRun.objects.filter(experiment__owner=owner)
    away = runs.filter(host__kind=Host.Kind.SSH)
    used = [
        runs.exclude(host__kind=Host.Kind.SSH).aggregate(bytes=Sum("disk_bytes")),
        away.aggregate(bytes=Sum("offset")),
        Transfer.objects.filter(run__in=away).aggregate(bytes=Sum("bytes_done")),
        Growth.objects.owned_by(owner).aggregate(bytes=Sum("disk_bytes")),
    ]
    return sum(each["bytes"] or 0 for each in used)


def _check_room(transfer: Transfer, size: int) -> None:
    """Refuse what the site has no room for, or its owner no more of it. No more comes than the host has announced."""
    more = size - transfer.bytes_done
    free = shutil.disk_usage(settings.VAR).free - more
    if free < settings.MIN_FREE_DISK_GB * 1e9:
        raise OSError(f"This site's disk has no room for another {more / 1e9:.1f} GB; tell the administrator.")
    owner, most = transfer.run.experiment.owner, settings.MAX_DISK_GB_PER_USER
    if owner is not None and most and bytes_here(owner) + more > most * 1e9:
        raise OSError(
            f"With its {size / 1e9:.1f} GB your experiments would take more than {most} GB of this site's disk, which "
            "is what is allowed. Delete some of them first."
        )


def _bring(
    run: ModelRun, transport: Transport, there: File, to: Path, progress: _Progress, leaving: Callable[[], bool]
) -> bool:
    """One file; it has its final name once it is whole."""
    if to.exists():
        progress.add(to.stat().st_size)
        return True
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f"{to.name}.part")
    sha = hashlib.sha256()
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        while held := file.read(CHUNK):
            sha.update(held)
            progress.add(len(held))
        with contextlib.closing(transport.pieces(run, there.path, file.tell(), there.size)) as pieces:
            for data in pieces:
                file.write(data)
                sha.update(data)
                progress.add(len(data))
                if leaving():
                    return False
        file.flush()
        os.fsync(file.fileno())
    if sha.hexdigest() != transport.digest(run, there.path):
        part.unlink()
        raise Damaged(f"{there.path} did not come over as it stands on the host; ask for it once more.")
    os.chmod(part, 0o644)
    part.rename(to)
    return True


class _Progress:
    """How far a transfer is, told to its row once a second."""

    def __init__(self, transfer: Transfer, total: int) -> None:
        self.transfer, self.total, self.done, self.told = transfer, total, 0, 0.0

    def add(self, size: int) -> None:
        self.done += size
        if time.monotonic() - self.told >= 1.0:
            self.tell()

    def tell(self) -> None:
        self.told = time.monotonic()
        row = Transfer.objects.filter(pk=self.transfer.pk)
        if not row.update(bytes_done=self.done, bytes_total=self.total):
            raise Unwanted(f"{self.transfer.name} is not wanted any more")


def settle(transfer: Transfer, error: str = "") -> None:
    """The end of a transfer, whole or with an error."""
    state = Transfer.State.FAILED if error else Transfer.State.DONE
    changes = {"state": state, "error": error, "ended_at": timezone.now()}
    Transfer.objects.filter(pk=transfer.pk).update(**changes)
