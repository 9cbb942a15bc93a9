"""What happens to an experiment between the Train page and its curves.

    create -> submit -> [RQ] follow -> settle        the way of a run that nothing befalls
    request_stop, resume, delete                     what people may ask for meanwhile
    reconcile                                        puts right what died in between, again and again

The database says what is wanted and known, the run directory says what happened, and the queue only rings: a job is
"start or attach, read the events from where the database stands, settle the row", so it may be killed, doubled or lost
at any moment. Every change of a row's state is a compare-and-set (:meth:`ModelRun.move`). Whatever rings late is rung
for by :func:`reconcile`. Jobs carry ids, never content: whoever can read the queue learns nothing from it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.cache import cache
from django.db import InterfaceError, OperationalError, connections, transaction
from django.db.models import Q, Sum
from django.utils import timezone
from redis.exceptions import RedisError
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job, JobStatus

from accounts.models import User
from experiments import broker
from experiments.ingest import ingest
from experiments.models import ACTIVE, RESUMABLE, Experiment, Host, ModelRun, Reason, State
from experiments.transport import Status, Transport, for_host
from trainer.spec import ExperimentSpec

log = logging.getLogger(__name__)

#: Seconds that a stopping trainer has to write its checkpoint before it is killed.
GRACE = 60.0
#: A running run whose follower has not shown itself for so many seconds has none.
STALE = 20.0
#: The job that RQ calls, by name: a worker needs nothing of it before the job begins.
FOLLOW = "experiments.worker.follow"


class LimitReached(Exception):
    """A user's limit stands in the way; the message says which, and what would help."""


# Asked for by people --------------------------------------------------------------------------------------------------


def create(
    owner: User | None,
    spec: ExperimentSpec,
    notes: str = "",
    host: Host | None = None,
    *,
    id: UUID | None = None,
    is_public: bool = False,
) -> Experiment:
    """An experiment with a row for each model of `spec`, submitted. Raises :class:`LimitReached`."""
    with transaction.atomic():
        if owner is not None:
            _check_limits(owner, len(spec.models))
        experiment = Experiment(
            owner=owner,
            name=spec.name,
            notes=notes,
            spec_json=spec.model_dump(mode="json"),
            host=host or Host.local(),
            is_public=is_public,
        )
        if id is not None:
            experiment.id = id
        experiment.save(force_insert=True)
        rows: dict[str, ModelRun] = {}
        for name in spec.order():
            parent = spec.models[name].parent
            rows[name] = ModelRun.objects.create(
                experiment=experiment,
                name=name,
                position=list(spec.models).index(name),
                parent=rows[parent] if parent else None,
                reason=Reason.WAITING_FOR_PARENT if parent else Reason.WAITING_FOR_SLOT,
                queued_at=experiment.created,
            )
        submit(experiment)
    return experiment


def submit(experiment: Experiment) -> None:
    """Once the transaction stands, one job for each queued run; a child's job depends on its parent's."""
    transaction.on_commit(lambda: _ring_for(experiment.pk))


def request_stop(target: Experiment | ModelRun) -> None:
    """Stop a run, or all of an experiment: queued ones are cancelled now, running ones write a checkpoint and leave."""
    for run in (
        _runs(target).filter(state__in=ACTIVE).order_by("-pk")
    ):  # children first: they too are stopped on request
        ModelRun.objects.filter(pk=run.pk, state__in=ACTIVE).update(stop_requested=True)
        if run.state == State.QUEUED and _settle(run, State.CANCELLED, Reason.STOPPED):
            transaction.on_commit(lambda run=run: _forget(run))  # type: ignore[misc]
        # The follower of a running one looks for the wish every second.


def resume(target: Experiment | ModelRun) -> list[ModelRun]:
    """Queue what failed or was cancelled once more, from its last checkpoint; returns those runs.

    A run takes along the parents that never finished, and the children that were cancelled because of it. Raises
    :class:`LimitReached`.
    """
    wanted = {run.pk: run for run in _runs(target).filter(state__in=RESUMABLE)}
    for run in list(wanted.values()):
        for other in [*_unfinished_ancestors(run), *_waiting_descendants(run)]:
            wanted.setdefault(other.pk, other)
    resumed = []
    with transaction.atomic():
        experiment = target if isinstance(target, Experiment) else target.experiment
        if experiment.owner is not None and wanted:
            _check_limits(experiment.owner, len(wanted))
        for run in wanted.values():
            moved = run.move(
                State.QUEUED,
                Reason.WAITING_FOR_PARENT if _waits_for_parent(run) else Reason.WAITING_FOR_SLOT,
                attempt=run.attempt + 1,
                stop_requested=False,
                queued_at=timezone.now(),
                ended_at=None,
            )
            if moved:
                resumed.append(run)
        submit(experiment)
    return resumed


def _unfinished_ancestors(run: ModelRun) -> Iterable[ModelRun]:
    while run.parent is not None and run.parent.state in RESUMABLE:
        run = run.parent
        yield run


def _waiting_descendants(run: ModelRun) -> Iterable[ModelRun]:
    for child in run.children.filter(state=State.CANCELLED, reason=Reason.PARENT_ENDED):
        yield child
        yield from _waiting_descendants(child)


def delete(experiment: Experiment) -> None:
    """Kill what trains for it, delete its rows and its run directories. Needs no worker."""
    runs = list(experiment.runs.all())
    experiment.delete()
    for run in runs:  # the admin deletes in a transaction, which must not wait for the broker
        transaction.on_commit(lambda run=run: _forget(run))  # type: ignore[misc]


def remove_directory(experiment: Experiment) -> None:
    """What is to follow the deletion of an experiment's row, whoever deleted it: an owner, an account, an admin.

    The row goes first: a follower that finds it gone starts nothing, and undoes what it has just started.
    """
    identity, host = experiment.pk, experiment.host

    def remove() -> None:
        try:
            for_host(host).remove(identity)
        except OSError:
            log.exception("the directory of experiment %s could not be removed; it will be tried again", identity)
        ring_line(host)

    transaction.on_commit(remove)


def place_in_line(run: ModelRun) -> int | None:
    """1 for the run that gets the next free place on its host; None if it is not waiting for one."""
    if run.state != State.QUEUED or _waits_for_parent(run):
        return None
    return int(_before(run).count()) + 1


def _check_limits(owner: User, more: int) -> None:
    User.objects.select_for_update().get(pk=owner.pk)  # one submission of a user at a time
    runs = ModelRun.objects.filter(experiment__owner=owner)
    active, most = runs.active().count(), settings.MAX_ACTIVE_RUNS_PER_USER
    if most and active + more > most:
        raise LimitReached(
            f"This would make {active + more} models waiting or training at once; {most} are allowed. "
            "Wait until some have finished, or stop them."
        )
    free, least = shutil.disk_usage(settings.VAR).free / 1e9, settings.MIN_FREE_DISK_GB
    if free < least:
        raise LimitReached(
            f"The disk of this site has {free:.1f} GB left; below {least:g} GB nothing new is begun. Delete what is "
            "no longer needed, or tell the administrator."
        )
    used, disk = runs.aggregate(Sum("disk_bytes"))["disk_bytes__sum"] or 0, settings.MAX_DISK_GB_PER_USER
    if disk and used >= disk * 10**9:
        raise LimitReached(
            f"Your experiments take {used / 1e9:.1f} GB of disk; {disk} GB are allowed. Delete some of them first."
        )


def _runs(target: Experiment | ModelRun) -> Any:
    runs = ModelRun.objects.select_related("parent", "experiment__host", "experiment__owner").order_by("position")
    return runs.filter(experiment=target) if isinstance(target, Experiment) else runs.filter(pk=target.pk)


# The line: which run comes next on a host -----------------------------------------------------------------------------


def _ready() -> Q:
    """Queued runs that only wait for a place."""
    return Q(state=State.QUEUED, stop_requested=False) & (Q(parent=None) | Q(parent__state=State.SUCCEEDED))


def _waits_for_parent(run: ModelRun) -> bool:
    return run.parent is not None and run.parent.state != State.SUCCEEDED


def _before(run: ModelRun) -> Any:
    """Ready runs on the host of `run` that have waited for longer."""
    earlier = Q(queued_at__lt=run.queued_at) | Q(queued_at=run.queued_at, pk__lt=run.pk)
    return ModelRun.objects.filter(_ready() & earlier, experiment__host=run.experiment.host_id)


def _claim(run: ModelRun) -> bool:
    """Take a place on the host for `run`: whether it got one. However many workers try, no place is given twice."""
    with transaction.atomic():
        host = Host.objects.select_for_update().get(pk=run.experiment.host_id)
        training = ModelRun.objects.filter(experiment__host=host, state=State.RUNNING).count()
        if training + _before(run).count() >= host.slots:
            ModelRun.objects.filter(pk=run.pk, state=State.QUEUED).update(reason=Reason.WAITING_FOR_SLOT)
            return False
        now = timezone.now()
        return run.move(State.RUNNING, Reason.STARTING, started_at=run.started_at or now, last_seen=now)


def ring_line(host: Host) -> None:
    """Ring for as many of the waiting runs of `host` as it has free places."""
    training = ModelRun.objects.filter(experiment__host=host, state=State.RUNNING).count()
    waiting = ModelRun.objects.filter(_ready(), experiment__host=host).order_by("queued_at", "pk")
    _ring(waiting[: max(0, host.slots - training)])


# Ringing: the queue ---------------------------------------------------------------------------------------------------


def _ring_for(experiment: UUID) -> None:
    _ring(_runs(Experiment(pk=experiment)).filter(state=State.QUEUED))


def _ring(runs: Iterable[ModelRun], *, anew: bool = False) -> None:
    """A job for each of `runs` that has none. `anew`: whatever the queue believes of the job it has.

    A broker that is down is no error: the database holds what is wanted, and the reconciler rings again.
    """
    try:
        for run in sorted(runs, key=lambda run: (run.queued_at, run.parent_id is not None, run.pk)):
            queue = broker.queue(run.experiment.host.queue)
            if not _has_job(queue, run, anew):
                _enqueue(queue, run)
    except (RedisError, OSError) as error:
        log.warning("the broker does not answer (%s); the reconciler will ring again", error)


def _enqueue(queue: Queue, run: ModelRun) -> None:
    options: dict[str, Any] = {
        "args": (run.pk, run.attempt),
        "job_id": run.job_id,
        "description": f"{run.name} of experiment {run.experiment_id}, attempt {run.attempt}",
        "timeout": -1,
        "result_ttl": 0,  # a job that has ended leaves nothing in the way of the next with its id
        "failure_ttl": 24 * 3600,
        "retry": Retry(max=1000),  # a follower that was killed is followed by the next one at once
    }
    if _waits_for_parent(run):
        parent = _job_of_parent(run)
        if Job.exists(parent, connection=queue.connection):  # else it is rung for when its parent has succeeded
            queue.enqueue_call(FOLLOW, depends_on=parent, **options)
    else:
        with contextlib.suppress(DuplicateJobError):  # somebody else rang in the same moment
            queue.enqueue_call(FOLLOW, unique=True, **options)


def _has_job(queue: Queue, run: ModelRun, anew: bool) -> bool:
    """Whether the queue will see to `run` by itself; a job that is stuck is taken out of the way."""
    try:
        job = Job.fetch(run.job_id, connection=queue.connection)
    except NoSuchJobError:
        return False
    match job.get_status():
        case JobStatus.QUEUED:
            lists = (queue.key, queue.intermediate_queue.key)
            good = any(queue.connection.lpos(name, job.id) is not None for name in lists)
        case JobStatus.STARTED:
            good = not anew and job.id in queue.started_job_registry.get_job_ids(cleanup=False)
        case JobStatus.DEFERRED:
            good = _waits_for_parent(run) or Job.exists(_job_of_parent(run), connection=queue.connection)
        case JobStatus.SCHEDULED | JobStatus.READY_TO_ENQUEUE:
            good = not anew
        case _:
            good = False
    if not good:
        broker.delete(job)
    return good


def _job_of_parent(run: ModelRun) -> str:
    assert run.parent is not None
    return run.parent.job_id


def _forget(run: ModelRun) -> None:
    """Take a run's job out of the queue. Left there it would do nothing, but would be in sight."""
    try:
        queue = broker.queue(run.experiment.host.queue)
        job = Job.fetch(run.job_id, connection=queue.connection)
        if job.get_status() != JobStatus.STARTED:
            broker.delete(job)
    except NoSuchJobError:
        pass
    except (RedisError, OSError) as error:
        log.warning("the broker does not answer (%s)", error)


# Following: the job ---------------------------------------------------------------------------------------------------


def follow(run_id: int, attempt: int, *, detached: Callable[[], bool] = lambda: False) -> bool:
    """The job of one attempt of one run: start it or attach to it, take its events in, settle its row.

    Returns False if it was `detached` before the end: the training goes on, and somebody is to follow it again.
    Survives a database that is away for a while; needs no broker.
    """
    wait = 1.0
    while True:
        try:
            return _follow(run_id, attempt, detached)
        except (OperationalError, InterfaceError) as error:
            log.warning("the database does not answer (%s); following run %s again in %.0f s", error, run_id, wait)
            connections.close_all()
            time.sleep(wait)
            wait = min(2 * wait, 30.0)


def _follow(run_id: int, attempt: int, detached: Callable[[], bool]) -> bool:
    run = ModelRun.objects.select_related("experiment__host", "parent").filter(pk=run_id, attempt=attempt).first()
    if run is None:
        return True  # deleted, or resumed under another number
    if run.state == State.QUEUED and not _begin(run):
        return True
    if run.state != State.RUNNING:
        return True
    transport = for_host(run.experiment.host)
    try:
        # Before the first event there is nothing to read, and after it a trainer of an earlier attempt may still be
        # on its way out: only when this attempt is there has it been started.
        while transport.start(run) == "already" and transport.status(run)["attempt"] != attempt:
            if detached():
                return False
            transport.stop(run, 0)
            time.sleep(0.2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _settle(run, State.FAILED, Reason.DISK_FULL if full else Reason.ERROR, detail=f"could not be started: {error}")
        return True
    try:
        return _read(run, transport, detached)
    except ModelRun.DoesNotExist:  # deleted meanwhile; whatever we have just started must go too
        transport.remove(run.experiment_id)
        return True


def _begin(run: ModelRun) -> bool:
    """From queued to running, if nothing stands in the way."""
    if run.stop_requested:
        _settle(run, State.CANCELLED, Reason.STOPPED)
    elif run.parent is not None and run.parent.state in RESUMABLE:
        _settle(run, State.CANCELLED, Reason.PARENT_ENDED, detail=_parent_ended(run.parent))
    elif _waits_for_parent(run):
        ModelRun.objects.filter(pk=run.pk, state=State.QUEUED).update(reason=Reason.WAITING_FOR_PARENT)
    elif not _claim(run):
        ring_line(run.experiment.host)  # for those that stand before it
    else:
        return True
    return False


def _read(run: ModelRun, transport: Transport, detached: Callable[[], bool]) -> bool:
    """Follow the stream to its end and settle; False if detached from it before."""
    looked = 0.0
    stream = transport.tail(run, run.offset)
    while (frame := next(stream, None)) is not None:
        if frame.kind == "D":
            reached = ingest(run, frame.data, frame.offset)
            if reached != frame.offset + len(frame.data):  # somebody else was quicker, or the rows are being rebuilt
                stream = transport.tail(run, reached)
            if b'"checkpoint"' in frame.data:
                ModelRun.objects.filter(pk=run.pk).update(disk_bytes=transport.disk_bytes(run))
        if frame.kind == "E":
            break
        if detached():
            return False
        if time.monotonic() - looked >= 1.0:
            looked = time.monotonic()
            if not _still_wanted(run, transport):
                return True
    ModelRun.objects.filter(pk=run.pk).update(disk_bytes=transport.disk_bytes(run))
    _conclude(run, transport.status(run))
    return True


def _still_wanted(run: ModelRun, transport: Transport) -> bool:
    """Show ourselves, and carry a wish to stop to the trainer. False if somebody else has settled the run."""
    now = ModelRun.objects.values("attempt", "state", "stop_requested", "reason", "last_seen").get(pk=run.pk)
    if now["attempt"] != run.attempt or now["state"] != State.RUNNING:
        return False
    changes: dict[str, Any] = {}
    if now["stop_requested"]:
        if now["reason"] != Reason.STOPPING:
            changes["reason"] = Reason.STOPPING
        transport.stop(run, GRACE)
    if now["last_seen"] is None or timezone.now() - now["last_seen"] > timedelta(seconds=STALE / 4):
        changes["last_seen"] = timezone.now()
    if changes:
        ModelRun.objects.filter(pk=run.pk, state=State.RUNNING, attempt=run.attempt).update(**changes)
    return True


# Settling: how a run ended --------------------------------------------------------------------------------------------


def _conclude(run: ModelRun, status: Status) -> None:
    """Settle a run whose process has ended, by its last word, or without one by how the process ended."""
    run.refresh_from_db(fields=["stop_requested", "state"])  # not the attempt: we speak of the one we have followed
    if run.state != State.RUNNING:
        return
    started = run.notes.filter(kind="started").order_by("-seq").first()
    last = run.notes.filter(kind__in=("finished", "failed", "stopped")).order_by("-seq").first()
    if last is not None and last.kind != "finished":
        spoke = started is not None and started.data["attempt"] == run.attempt and last.seq > started.seq
        last = last if spoke else None  # else that word is of an earlier attempt
    kind = last.kind if last else None
    if last and kind == "finished":
        _settle(run, State.SUCCEEDED, Reason.FINISHED)
    elif last and kind == "failed":
        _settle(run, State.FAILED, Reason(last.data["reason"]), detail=last.data["message"])
    elif kind == "stopped" or run.stop_requested:
        by_whom = (
            "" if run.stop_requested else "The process was asked to end from outside, as when a machine shuts down."
        )
        _settle(run, State.CANCELLED, Reason.STOPPED, detail=by_whom)
    else:
        reason, detail = _why(status)
        _settle(run, State.FAILED, reason, detail=detail)


def _why(status: Status) -> tuple[Reason, str]:
    """Why a trainer that ended without a word did so, and what is known of it."""
    ended = status["exit"]
    if ended is None:
        return Reason.LOST, "No process was ever started in the run directory."
    lines = ended.get("log", "")
    if ended.get("lost"):
        return Reason.KILLED, _with(
            "The process and its supervisor are gone and left no word of how they ended.", lines
        )
    if ended.get("out_of_memory"):
        return Reason.OUT_OF_MEMORY, _with("The system killed the process because memory had run out.", lines)
    if ended.get("signal"):
        return Reason.KILLED, _with(f"The process was ended by signal {ended['signal']}.", lines)
    if "No space left on device" in lines or "Disk quota exceeded" in lines:
        return Reason.DISK_FULL, lines
    if "MemoryError" in lines or "out of memory" in lines or "can't allocate memory" in lines:
        return Reason.OUT_OF_MEMORY, lines
    if ended.get("code") == 0:
        return Reason.ERROR, _with("The process ended well but did not say that the run had finished.", lines)
    return Reason.ERROR, _with(f"The process ended with code {ended.get('code')}.", lines)


def _with(sentence: str, lines: str) -> str:
    return f"{sentence}\n{lines}" if lines else sentence


def _settle(run: ModelRun, state: State, reason: Reason, *, detail: str = "") -> bool:
    """The end of an attempt: the row's state, then whom it concerns. False if somebody else has settled it."""
    if not run.move(state, reason, detail=detail, ended_at=timezone.now()):
        return False
    log.info("run %s (%s of experiment %s): %s, %s", run.pk, run.name, run.experiment_id, state, reason)
    if state != State.SUCCEEDED:
        for child in run.children.filter(state=State.QUEUED):
            _settle(child, State.CANCELLED, Reason.PARENT_ENDED, detail=_parent_ended(run))
    host = run.experiment.host
    transaction.on_commit(lambda: ring_line(host))
    return True


def _parent_ended(parent: ModelRun) -> str:
    return f"{parent.name}: {Reason(parent.reason).label}"


# Putting right what died in between -----------------------------------------------------------------------------------


def reconcile() -> None:
    """One look at everything that is wanted: who has nobody to follow it is rung for. Safe at any time, anywhere."""
    for run in _active(State.QUEUED).filter(Q(parent__state__in=RESUMABLE) | Q(stop_requested=True)):
        _begin(run)
    stale = timezone.now() - timedelta(seconds=STALE)
    _ring(_active(State.RUNNING).filter(Q(last_seen=None) | Q(last_seen__lt=stale)), anew=True)
    for host in Host.objects.all():
        ring_line(host)
    _sweep()
    if cache.add("guests-purged", True, 24 * 3600):
        from accounts import guests
        from experiments import textcache

        guests.purge()
        textcache.sweep()


def _active(state: State) -> Any:
    return ModelRun.objects.select_related("experiment__host", "parent").filter(state=state)


def _sweep() -> None:
    """Finish removals that were cut short. Only those: another database's run directories are not ours to judge."""
    transport = for_host(Host.local())
    for identity in transport.half_removed():
        transport.remove(identity)
