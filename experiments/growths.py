"""What happens to a growth between its form and its download.

    create -> [RQ] follow -> settle          the way of a growth that nothing befalls
    request_stop, retry, delete              what people may ask for meanwhile
    reconcile                                puts right what died in between, again and again

The means are those of runs: the agent starts `python -m trainer grow` in a session of its own, the job is "start or
attach, read what it reports, settle the row", and may be killed, doubled or lost at any moment. A growth reads and
writes as fast as the disk does, so one grows at a time, on the machine of the site's workers; the others wait in line.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from redis.exceptions import RedisError

from accounts.models import User
from experiments import broker, jobs, line, sources
from experiments.models import Growth, Host, Reason, State
from experiments.transport.local import Local
from trainer import agent
from trainer.shape import Shape

log = logging.getLogger(__name__)

#: The job that RQ calls, by name.
GROW = "experiments.worker.grow"
#: Seconds that a stopping growth has to clear up what it has begun to write.
GRACE = 10.0
#: What both models are measured on: real text that every machine has, about two thousand tokens of it.
TEXT = Path(fnmatch.__file__)
#: Bytes of a file that are hashed at a time.
_BLOCK = 1 << 22


# Asked for by people --------------------------------------------------------------------------------------------------


def create(owner: User, id: UUID, **fields: Any) -> Growth:
    """A growth in line. Raises :class:`experiments.jobs.LimitReached`."""
    with transaction.atomic():
        jobs.check_limits(owner, 1, fields["planned"]["bytes"])
        growth: Growth = Growth.objects.create(owner=owner, id=id, **fields)
        transaction.on_commit(_ring_next)
    return growth


def request_stop(growth: Growth) -> None:
    """One in line is cancelled now; one that grows ends and leaves nothing behind."""
    Growth.objects.filter(pk=growth.pk).update(stop_requested=True)
    if growth.state == State.QUEUED and _settle(growth, State.CANCELLED, Reason.STOPPED):
        transaction.on_commit(lambda: line.take_out("default", growth.job_id))
    # The follower of one that grows looks for the wish every second.


def retry(growth: Growth) -> bool:
    """Put what failed or was stopped in line again, to begin anew; what failed while it was measured is not measured
    again. Raises :class:`experiments.jobs.LimitReached`."""
    with transaction.atomic():
        jobs.check_limits(growth.owner, 1, growth.planned["bytes"])
        moved = growth.move(
            State.QUEUED,
            Reason.WAITING_FOR_SLOT,
            attempt=growth.attempt + 1,
            measures=growth.measures and not (growth.state == State.FAILED and growth.phase == "measuring"),
            stop_requested=False,
            queued_at=timezone.now(),
            started_at=None,
            ended_at=None,
            phase="",
            bytes_done=0,
            bytes_total=None,
        )
        transaction.on_commit(_ring_next)
    return moved


def remove_directory(growth: Growth) -> None:
    """What is to follow the deletion of a row, whoever deleted it: an owner, an account, an admin."""
    directory, job = growth.directory, growth.job_id

    def remove() -> None:
        try:
            agent.remove(directory)
        except OSError:
            log.exception("%s could not be removed; it will be tried again", directory)
        line.take_out("default", job)
        _ring_next()

    transaction.on_commit(remove)


def place_in_line(growth: Growth) -> int | None:
    """1 for the next one; None if it does not wait."""
    return int(_before(growth).count()) + 1 if growth.state == State.QUEUED else None


def _before(growth: Growth) -> Any:
    earlier = Q(queued_at__lt=growth.queued_at) | Q(queued_at=growth.queued_at, pk__lt=growth.pk)
    return Growth.objects.filter(earlier, state=State.QUEUED)


def _ring_next() -> None:
    """A job for the first in line, if it can begin."""
    if not Growth.objects.filter(state=State.RUNNING).exists():
        _ring(Growth.objects.filter(state=State.QUEUED).order_by("queued_at", "pk")[:1])


def _ring(growths: Iterable[Growth], *, anew: bool = False) -> None:
    try:
        queue = broker.queue()
        for growth in growths:
            if not line.has_job(queue, growth.job_id, anew):
                about = f"growth {growth.pk}, attempt {growth.attempt}"
                line.enqueue(queue, GROW, growth.job_id, (str(growth.pk), growth.attempt), about)
    except (RedisError, OSError) as error:
        log.warning("the broker does not answer (%s); the reconciler will ring again", error)


# Following: the job ---------------------------------------------------------------------------------------------------


def follow(pk: str, attempt: int, *, detached: Callable[[], bool] = lambda: False) -> bool:
    """The job of one attempt: start it or attach to it, tell how far it is, settle its row.

    False if it was `detached` before the end: the process goes on, and somebody is to follow it again.
    """
    return jobs.while_the_database_is_away(lambda: _follow(pk, attempt, detached), f"growth {pk}")


def _follow(pk: str, attempt: int, detached: Callable[[], bool]) -> bool:
    growth = Growth.objects.select_related("owner").filter(pk=pk, attempt=attempt).first()
    if growth is None or (growth.state == State.QUEUED and not _begin(growth)) or growth.state != State.RUNNING:
        return True
    try:
        _clear_earlier(growth)
        agent.start(growth.work, growth.attempt, env=_environment(), command=command(growth))
    except OSError as error:
        reason = Reason.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.ERROR
        _settle(growth, State.FAILED, reason, detail=f"could not be started: {error}")
        return True
    reports, told = _Reports(growth.work / "log.txt"), 0.0
    while True:
        alive = agent.status(growth.work)["alive"]  # before reading: the other way round, the last words would be lost
        reports.read()
        if not alive or time.monotonic() - told >= 1.0:
            told = time.monotonic()
            if not _tell(growth, reports.progress):
                return True
        if not alive:
            break
        if detached():
            return False
        time.sleep(0.2)
    return _conclude(growth, reports, detached)


def command(growth: Growth) -> list[str]:
    """What the agent runs. Every argument is a number, a key, a Hub's name or an absolute path: none is an option."""
    init, child, parent = (growth.planned[name] for name in ("init", "child", "parent"))
    grown = Shape.model_validate(child["shape"])
    sizes = grown.model_dump(exclude={"layer_norm_eps"}) | {"n_kv_heads": grown.kv_heads}
    shape = ",".join(f"{field}={value}" for field, value in sizes.items())
    said = [sys.executable, "-m", "trainer", "grow", growth.source, "--json", "--out", str(growth.model)]
    said += ["--shape", shape, "--width", init["width"], "--depth", init["depth"], "--split", init["split"]]
    noise = "none" if init["snr_db"] is None else init["snr_db"]
    said += ["--init-range", str(init["init_range"]), f"--snr-db={noise}", "--seed", str(growth.seed)]
    for option, size in (("--vocab", "d_vocab"), ("--positions", "n_positions")):
        said += [option, str(child[size])] if child[size] != parent[size] else []
    said += ["--dtype", growth.dtype] if growth.dtype else []
    said += ["--text", str(TEXT)] if growth.measures else []
    return said


def _environment() -> dict[str, str]:
    """A trainer's, with its share of the cores told to the libraries that count."""
    env = Local(Host.local()).environment()
    return env | {"OMP_NUM_THREADS": env["KANGAROO_THREADS"], "PYTHONUNBUFFERED": "1"}


def _begin(growth: Growth) -> bool:
    """From the line to growing, if nothing stands in the way. However many workers try, one grows at a time."""
    if growth.stop_requested:
        _settle(growth, State.CANCELLED, Reason.STOPPED)
        return False
    try:
        sources.checkpoint(growth.source, growth.owner, gguf=True)
    except ValidationError as error:
        detail = f"{growth.source_name} is not there any more, or not yours to use: {error.message}."
        _settle(growth, State.FAILED, Reason.BAD_CHECKPOINT, detail=detail)
        return False
    with transaction.atomic():
        Host.objects.select_for_update().get(pk=Host.local().pk)
        if _before(growth).exists() or Growth.objects.filter(state=State.RUNNING).exists():
            transaction.on_commit(_ring_next)
            return False
        now = timezone.now()
        # What it will take counts from now on, so that nobody is promised the same room.
        wanted = growth.planned["bytes"]
        return growth.move(State.RUNNING, Reason.GROWING, started_at=now, last_seen=now, disk_bytes=wanted)


def _clear_earlier(growth: Growth) -> None:
    """Attempts before this one: their processes, which may be on their way out, and what they have printed."""
    for folder in growth.directory.glob("attempt-*"):
        if folder != growth.work:
            agent.stop(folder, 0, wait=True)
            shutil.rmtree(folder, ignore_errors=True)


class _Reports:
    """The lines of JSON among what a growth prints: how far it is, and in the end what came of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.progress: dict[str, Any] = {}
        self.outcome: dict[str, Any] | None = None
        self.words: list[str] = []  # what else it printed

    def read(self) -> None:
        for text in self._lines():
            try:
                report = json.loads(text)
            except ValueError:
                report = None
            if not isinstance(report, dict):
                self.words.append(text)
            elif report.get("kind") == "progress":
                self.progress = report
            elif report.get("kind") in ("grown", "failed"):
                self.outcome = report

    def _lines(self) -> Iterator[str]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                for text in file:
                    if not text.endswith(b"\n"):
                        return  # it is still being written
                    self.offset += len(text)
                    yield text.decode("utf-8", "replace").rstrip()
        except FileNotFoundError:
            return


def _tell(growth: Growth, progress: dict[str, Any]) -> bool:
    """Show how far it is and that it is followed; carry a wish to stop. False if it is no more to be followed."""
    row = Growth.objects.filter(pk=growth.pk)
    known = row.values("state", "attempt", "stop_requested").first()
    if known is None:  # deleted; what we may have started since must go too
        agent.remove(growth.directory)
        return False
    if (known["state"], known["attempt"]) != (State.RUNNING, growth.attempt):
        return False
    changes = {
        "phase": str(progress.get("what", ""))[:40],
        "bytes_done": progress.get("done") or 0,
        "bytes_total": progress.get("total"),
        "last_seen": timezone.now(),
    }
    if known["stop_requested"]:
        agent.stop(growth.work, GRACE)
        changes["reason"] = Reason.STOPPING
    row.filter(state=State.RUNNING, attempt=growth.attempt).update(**changes)
    return True


# Settling: how it ended -----------------------------------------------------------------------------------------------


def _conclude(growth: Growth, reports: _Reports, detached: Callable[[], bool]) -> bool:
    """Settle a growth whose process has ended, by its last word, or without one by how the process ended."""
    outcome = reports.outcome or {}
    growth.refresh_from_db(fields=["stop_requested", "state"])
    if growth.state != State.RUNNING:
        return True
    if outcome.get("kind") == "grown" and growth.model.is_dir():
        files = _digests(growth, detached)
        if files is None:
            return False
        _settle(growth, State.SUCCEEDED, Reason.FINISHED, certificate=_certificate(growth, outcome, files))
    elif growth.stop_requested:
        _settle(growth, State.CANCELLED, Reason.STOPPED)
    elif outcome.get("kind") == "failed":
        _settle(growth, State.FAILED, _why(outcome), detail=str(outcome["message"]))
    else:
        status = agent.status(growth.work)
        if status["exit"]:
            status["exit"]["log"] = "\n".join(reports.words[-20:])
        reason, detail = jobs.why(status)  # type: ignore[arg-type]
        _settle(growth, State.FAILED, reason, detail=detail)
    return True


def _why(failed: dict[str, Any]) -> Reason:
    if os.strerror(errno.ENOSPC) in failed["message"] or " are free" in failed["message"]:
        return Reason.DISK_FULL
    return Reason.BAD_CHECKPOINT if failed.get("field") == "source" else Reason.ERROR


def _settle(growth: Growth, state: State, reason: Reason, **fields: Any) -> bool:
    """The end of an attempt, and who comes next. False if somebody else has settled it."""
    if state != State.SUCCEEDED:  # a process that was killed may leave what it had written, or was converting
        for left in [growth.model, *growth.directory.glob(".*")]:
            shutil.rmtree(left, ignore_errors=True)
    size = agent.disk_bytes(growth.directory)
    moved = growth.move(state, reason, ended_at=timezone.now(), disk_bytes=size, **fields)
    if moved:
        log.info("growth %s: %s, %s", growth.pk, state, reason)
        transaction.on_commit(_ring_next)
    return moved


def _digests(growth: Growth, detached: Callable[[], bool]) -> list[dict[str, Any]] | None:
    """Name, bytes and SHA-256 of every file that was written; None if told to leave meanwhile."""
    files = []
    paths = sorted(path for path in growth.model.rglob("*") if path.is_file())
    total, done, told = sum(path.stat().st_size for path in paths), 0, 0.0
    for path in paths:
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                sha.update(block)
                done += len(block)
                if detached():
                    return None
                if time.monotonic() - told > 1:
                    told = time.monotonic()
                    if not _tell(growth, {"what": "hashing", "done": done, "total": total}):
                        return None
        name = str(path.relative_to(growth.model))
        files.append({"name": name, "bytes": path.stat().st_size, "sha256": sha.hexdigest()})
    return files


def _certificate(growth: Growth, outcome: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any]:
    """What certificate.json holds: what was asked for, what was found, and of which files it speaks."""
    held = growth.planned
    return {
        "certificate": "kangaroo growth 1",
        "made": timezone.now().isoformat(timespec="seconds"),
        "source": growth.source_name,
        "family": held["family"],
        "parent": held["parent"],
        "child": held["child"],
        "init": held["init"],
        "seed": growth.seed,
        "dtype": growth.dtype or None,
        "preserves": outcome.get("preserves", held["preserves"]),
        "because": outcome.get("because", held["because"]),
        "warnings": outcome.get("warnings", held["warnings"]),
        "residual": outcome.get("residual"),
        "tolerance": outcome.get("tolerance"),
        "tensors": outcome.get("tensors") or {},
        "measured": outcome.get("measured"),
        "not_measured": outcome.get("not_measured"),
        "text": TEXT.name if outcome.get("measured") else None,
        "seconds": outcome.get("seconds"),
        "files": files,
    }


# Putting right what died in between -----------------------------------------------------------------------------------


def reconcile() -> None:
    """One look at everything that is wanted: what has nobody to follow it is rung for. Safe at any time."""
    for growth in Growth.objects.filter(state=State.QUEUED, stop_requested=True):
        _begin(growth)
    stale = timezone.now() - timedelta(seconds=jobs.STALE)
    unfollowed = Q(last_seen=None) | Q(last_seen__lt=stale)
    _ring(Growth.objects.filter(unfollowed, state=State.RUNNING), anew=True)
    _ring_next()
    for name in agent.half_removed(settings.GROWTHS_DIR):
        agent.remove(settings.GROWTHS_DIR / name)
