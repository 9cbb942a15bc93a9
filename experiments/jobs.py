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

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.cache import cache
from django.db import InterfaceError, OperationalError, connections, transaction
from django.db.models import Q
from django.utils import timezone

from accounts.models import User
from experiments import line, mirror
from experiments.ingest import ingest, rebuild
from experiments.line import ring_line
from experiments.models import ACTIVE, RESUMABLE, Experiment, Growth, Host, ModelRun, Reason, Removal, State
from experiments.templatetags.figures import filesize_short
from experiments.transport import HostProblem, Status, Transport, for_host
from trainer.spec import ExperimentSpec

log = logging.getLogger(__name__)

#: Seconds that a stopping trainer has to write its checkpoint before it is killed.
GRACE = 60.0
#: A running run whose follower has not shown itself for so many seconds has none.
STALE = 20.0
#: How long it is tried to clear up on a host that was given up.
REMOVAL_PATIENCE = timedelta(days=7)
#: Seconds between two attempts to reach a host that does not answer, at most.
LONGEST_PAUSE = 10.0


class LimitReached(Exception):
    """A user's limit stands in the way; the message says which, and what would help."""


# Asked for by people --------------------------------------------------------------------------------------------------


def create(
    owner: User | None,
    spec: ExperimentSpec,
    notes: str = "",
    host: Host | None = None,
    *,
    hosts: Mapping[str, Host] | None = None,
    gpus: int = 1,
    id: UUID | None = None,
    is_public: bool = False,
) -> Experiment:
    """An experiment with a row for each model of `spec`, submitted. Raises :class:`LimitReached`.

    Each trains on `host`, unless `hosts` names another for it, with `gpus` GPUs where there are some.
    """
    host = host or Host.local()
    with transaction.atomic():
        if owner is not None:
            check_limits(owner, len(spec.models))
        experiment = Experiment(
            owner=owner,
            name=spec.name,
            notes=notes,
            spec_json=spec.model_dump(mode="json"),
            host=host,
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
                host=(hosts or {}).get(name, host),
                gpus_wanted=gpus,
                position=list(spec.models).index(name),
                parent=rows[parent] if parent else None,
                reason=Reason.WAITING_FOR_PARENT if parent else Reason.WAITING_FOR_SLOT,
                queued_at=experiment.created,
            )
        submit(experiment)
    return experiment


def submit(experiment: Experiment) -> None:
    """Once the transaction stands, one job for each queued run; a child's job depends on its parent's."""
    transaction.on_commit(lambda: line.ring_for(experiment.pk))


def request_stop(target: Experiment | ModelRun) -> None:
    """Stop a run, or all of an experiment: queued ones are cancelled now, running ones write a checkpoint and leave."""
    for run in (
        _runs(target).filter(state__in=ACTIVE).order_by("-pk")
    ):  # children first: they too are stopped on request
        ModelRun.objects.filter(pk=run.pk, state__in=ACTIVE).update(stop_requested=True)
        if run.state == State.QUEUED and _settle(run, State.CANCELLED, Reason.STOPPED):
            transaction.on_commit(lambda run=run: line.forget(run))  # type: ignore[misc]
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
    experiment = target if isinstance(target, Experiment) else target.experiment
    for run in wanted.values():
        if not run.host.serves(experiment.owner):
            raise LimitReached(f"{run.host} is not there for you any more: start the experiment anew on another host.")
    resumed = []
    with transaction.atomic():
        if experiment.owner is not None and wanted:
            check_limits(experiment.owner, len(wanted))
        for run in wanted.values():
            moved = run.move(
                State.QUEUED,
                Reason.WAITING_FOR_PARENT if line.waits_for_parent(run) else Reason.WAITING_FOR_SLOT,
                attempt=run.attempt + 1,
                stop_requested=False,
                queued_at=timezone.now(),
                ended_at=None,
                gpus=[],
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
    for child in run.children.select_related("host").filter(state=State.CANCELLED, reason=Reason.PARENT_ENDED):
        yield child
        yield from _waiting_descendants(child)


def delete(experiment: Experiment) -> None:
    """Kill what trains for it, delete its rows and its run directories. Needs no worker."""
    runs = list(experiment.runs.all())
    experiment.delete()
    for run in runs:  # the admin deletes in a transaction, which must not wait for the broker
        transaction.on_commit(lambda run=run: line.forget(run))  # type: ignore[misc]


def remove_directories(experiment: Experiment, hosts: Iterable[Host]) -> None:
    """What is to follow the deletion of an experiment's row, whoever deleted it: an owner, an account, an admin.

    The row goes first: a follower that finds it gone starts nothing, and undoes what it has just started. A host that
    is reached over SSH may not answer now: what is wanted of it stands in a row until it has been done.
    """
    identity, hosts = experiment.pk, list(hosts)
    for host in hosts:
        if host.is_remote:
            Removal.objects.get_or_create(experiment_id=identity, host=host)

    def remove() -> None:
        # What was brought from a GPU host, its events and log, stands here as well.
        for host in {*(host for host in hosts if not host.is_remote), Host.local()}:
            try:
                for_host(host).remove(identity)
            except OSError:
                log.exception("the directory of experiment %s could not be removed; it will be tried again", identity)
        for host in hosts:
            ring_line(host)

    transaction.on_commit(remove)


def check_limits(owner: User, more: int, size: int = 0) -> None:
    """Refuse `owner` so many `more` runs or growths, which will take `size` bytes as far as is known.

    Within the transaction that makes them. Raises :class:`LimitReached`.
    """
    User.objects.select_for_update().get(pk=owner.pk)  # one submission of a user at a time
    runs = ModelRun.objects.filter(experiment__owner=owner)
    active = runs.active().count() + Growth.objects.owned_by(owner).active().count()
    most = settings.MAX_ACTIVE_RUNS_PER_USER
    if most and active + more > most:
        raise LimitReached(
            f"This would make {active + more} models waiting, training or growing at once; {most} are allowed. "
            "Wait until some have finished, or stop them."
        )
    free, least = shutil.disk_usage(settings.VAR).free / 1e9, settings.MIN_FREE_DISK_GB
    if size and free - size / 1e9 < least:
        raise LimitReached(
            f"It takes {filesize_short(size)}, and the disk of this site has {free:.1f} GB left, of which {least:g} GB "
            "stay free. A smaller target would fit; or tell the administrator."
        )
    if free < least:
        raise LimitReached(
            f"The disk of this site has {free:.1f} GB left; below {least:g} GB nothing new is begun. Delete what is "
            "no longer needed, or tell the administrator."
        )
    used, disk = mirror.bytes_here(owner), settings.MAX_DISK_GB_PER_USER
    if disk and used + size >= disk * 10**9:
        with_it = f"With its {filesize_short(size)} your" if size else "Your"
        raise LimitReached(
            f"{with_it} experiments and growths take {(used + size) / 1e9:.1f} GB of disk; {disk} GB are allowed. "
            "Delete some of them first."
        )


def _runs(target: Experiment | ModelRun) -> Any:
    runs = ModelRun.objects.select_related("parent__host", "host", "experiment__owner").order_by("position")
    return runs.filter(experiment=target) if isinstance(target, Experiment) else runs.filter(pk=target.pk)


# Following: the job ---------------------------------------------------------------------------------------------------


def follow(run_id: int, attempt: int, *, detached: Callable[[], bool] = lambda: False) -> bool:
    """The job of one attempt of one run: start it or attach to it, take its events in, settle its row.

    A run on a host that is reached over SSH is only given its place here: :func:`collect` does the rest, in the
    process that holds the connection. Returns False if it was `detached` before the end: the training goes on, and
    somebody is to follow it again. Survives a database that is away for a while; needs no broker.
    """
    return while_the_database_is_away(lambda: _follow(run_id, attempt, detached), f"run {run_id}")


def collect(run_id: int, attempt: int, *, detached: Callable[[], bool] = lambda: False) -> bool:
    """As :func:`follow`, for a run that has its place on a host reached over SSH; tries again while that is away.

    What the host does not say is not concluded: until it answers, the run is running.
    """
    return while_the_database_is_away(lambda: _collect(run_id, attempt, detached), f"run {run_id}")


def while_the_database_is_away(work: Callable[[], bool], what: str) -> bool:
    """Do `work`, and again whenever the database went away meanwhile."""
    wait = 1.0
    while True:
        try:
            return work()
        except (OperationalError, InterfaceError) as error:
            log.warning("the database does not answer (%s); following %s again in %.0f s", error, what, wait)
            connections.close_all()
            time.sleep(wait)
            wait = min(2 * wait, 30.0)


def _row(run_id: int, attempt: int) -> ModelRun | None:
    """None: deleted, or resumed under another number."""
    found = ModelRun.objects.select_related("experiment__owner", "host", "parent__host")
    return found.filter(pk=run_id, attempt=attempt).first()


def _follow(run_id: int, attempt: int, detached: Callable[[], bool]) -> bool:
    run = _row(run_id, attempt)
    if run is None or (run.state == State.QUEUED and not _begin(run)):
        return True
    if run.state != State.RUNNING or run.host.is_remote:
        return True
    return _attend(run, detached)


def _collect(run_id: int, attempt: int, detached: Callable[[], bool]) -> bool:
    pause = 0.5
    while (run := _row(run_id, attempt)) is not None and run.state == State.RUNNING:
        began = time.monotonic()
        try:
            return _attend(run, detached)
        except HostProblem as problem:
            log.info("run %s on %s: %s", run.pk, run.host, problem.message)
        finally:
            mirror.clear_up(run)
        if time.monotonic() - began > LONGEST_PAUSE:
            pause = 0.5  # it had been reached
        if _waited(pause, detached):
            return False
        pause = min(2 * pause, LONGEST_PAUSE)
    return True


def _waited(seconds: float, detached: Callable[[], bool]) -> bool:
    """Wait; whether we were asked to leave meanwhile."""
    until = time.monotonic() + seconds
    while not (gone := detached()) and time.monotonic() < until:
        time.sleep(0.1)
    return gone


def _attend(run: ModelRun, detached: Callable[[], bool]) -> bool:
    """From a place on the host to the end; False if detached before that. Raises HostProblem."""
    transport = for_host(run.host)
    try:
        if not _is_there(run, transport):
            return True
        # Before the first event there is nothing to read, and after it a trainer of an earlier attempt may still be
        # on its way out: only when this attempt is there has it been started.
        while transport.start(run) == "already" and transport.status(run)["attempt"] != run.attempt:
            if detached():
                return False
            if not _still_wanted(run, transport):
                return True
            transport.stop(run, 0)
            time.sleep(0.2)
    except HostProblem:
        raise
    except (OSError, ValueError) as error:
        status = transport.status(run)
        if status["attempt"] != run.attempt or status["pid"] is None:  # else it has begun, and is to be followed
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            reason = Reason.DISK_FULL if full else Reason.ERROR
            _settle(run, State.FAILED, reason, detail=f"could not be started: {error}")
            return True
    except ModelRun.DoesNotExist:
        return True
    try:
        return _read(run, transport, detached)
    except ModelRun.DoesNotExist:  # deleted meanwhile; whatever we have just started must go too
        try:
            transport.remove(run.experiment_id)
        except HostProblem:
            Removal.objects.get_or_create(experiment_id=run.experiment_id, host=run.host)
        return True


def _is_there(run: ModelRun, transport: Transport) -> bool:
    """Whether the run directory is what the rows say, so that the attempt may be started in it, or attached to."""
    if not run.offset and not run.stop_requested:
        return True
    reached = transport.status(run)["attempt"]
    if run.stop_requested and reached != run.attempt:  # it had its place, but never began
        _settle(run, State.CANCELLED, Reason.STOPPED)
        return False
    if run.offset and reached == 0:
        began = run.notes.filter(kind="started").order_by("-seq").first()
        if began is not None and began.data.get("attempt") == run.attempt:
            _settle(run, State.FAILED, Reason.LOST, detail="Its folder is no longer on the host.")
            return False
        rebuild(run, b"")  # resumed after that: there is nothing to go on from, so it begins anew
        mirror.forget(run)
    return True


def _begin(run: ModelRun) -> bool:
    """From queued to running, if nothing stands in the way."""
    if run.stop_requested:
        _settle(run, State.CANCELLED, Reason.STOPPED)
    elif run.parent is not None and run.parent.state in RESUMABLE:
        _settle(run, State.CANCELLED, Reason.PARENT_ENDED, detail=_parent_ended(run.parent))
    elif not run.host.serves(run.experiment.owner):
        _settle(run, State.FAILED, Reason.ERROR, detail=f"{run.host} is not there for its owner any more.")
    elif line.waits_for_parent(run):
        ModelRun.objects.filter(pk=run.pk, state=State.QUEUED).update(reason=Reason.WAITING_FOR_PARENT)
    elif (most := line.most_gpus(run.host)) is not None and run.gpus_wanted > most:
        wants = f"It wants {run.gpus_wanted} GPUs, and {run.host} has {most} to give."
        _settle(run, State.FAILED, Reason.ERROR, detail=f"{wants} Start it anew with fewer, or on another host.")
    elif not line.claim(run):
        ring_line(run.host)  # for those that stand before it
    else:
        return True
    return False


def _read(run: ModelRun, transport: Transport, detached: Callable[[], bool]) -> bool:
    """Follow the stream to its end and settle; False if detached from it before."""
    looked = 0.0
    is_remote = run.host.is_remote
    stream = transport.tail(run, run.offset)
    while (frame := next(stream, None)) is not None:
        if frame.kind == "D":
            if is_remote and frame.offset + len(frame.data) > mirror.MOST_EVENTS:
                transport.stop(run, 0)
                detail = f"It told more than {mirror.MOST_EVENTS >> 20} MB of events; no more are taken in."
                _settle(run, State.FAILED, Reason.ERROR, detail=detail)
                return True
            if is_remote:
                mirror.keep(run, "events.jsonl", frame.offset, frame.data)
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
            if is_remote:
                mirror.keep_log(run, transport)
    if is_remote:
        mirror.keep_log(run, transport)
        mirror.want_model(run, transport)
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
        reason, detail = why(status)
        _settle(run, State.FAILED, reason, detail=detail)


def why(status: Status) -> tuple[Reason, str]:
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
        for child in run.children.select_related("host").filter(state=State.QUEUED):
            _settle(child, State.CANCELLED, Reason.PARENT_ENDED, detail=_parent_ended(run))
    hosts = {run.host, *(child.host for child in run.children.select_related("host"))}

    def ring() -> None:
        for host in hosts:
            ring_line(host)

    transaction.on_commit(ring)
    return True


def _parent_ended(parent: ModelRun) -> str:
    return f"{parent.name}: {Reason(parent.reason).label}"


# Putting right what died in between -----------------------------------------------------------------------------------


def reconcile() -> None:
    """One look at everything that is wanted: who has nobody to follow it is rung for. Safe at any time, anywhere."""
    for run in _active(State.QUEUED).filter(Q(parent__state__in=RESUMABLE) | Q(stop_requested=True)):
        _begin(run)
    stale = timezone.now() - timedelta(seconds=STALE)
    unfollowed = Q(last_seen=None) | Q(last_seen__lt=stale)
    line.ring(_active(State.RUNNING).filter(unfollowed).exclude(host__kind=Host.Kind.SSH), anew=True)
    for host in Host.objects.filter(runs__state=State.QUEUED).distinct():
        ring_line(host)
    _sweep()
    if cache.add("retired-hosts-forgotten", True, 60):
        _forget_retired()
    if cache.add("guests-purged", True, 24 * 3600):
        from accounts import guests
        from experiments import textcache

        guests.purge()
        textcache.sweep()


def _forget_retired() -> None:
    """Hosts that were given up, by hand or with their owner's account: once nothing is left to do there, what opened
    them is erased, and the row too where no experiment speaks of it."""
    retired = Host.objects.filter(kind=Host.Kind.SSH).exclude(retired_at=None)
    for host in retired.exclude(runs__state__in=ACTIVE):
        in_vain = timezone.now() - REMOVAL_PATIENCE
        host.removals.filter(Q(created__lt=in_vain) | Q(host__credential="")).delete()
        if host.removals.exists():
            continue
        if host.credential:
            host.private_key = host.passphrase = host.credential = ""
            host.save(update_fields=["private_key", "passphrase", "credential"])
        if not (host.runs.exists() or host.experiments.exists() or host.reached_through_it.exists()):
            host.delete()


def _active(state: State) -> Any:
    return ModelRun.objects.select_related("experiment__owner", "host", "parent__host").filter(state=state)


def _sweep() -> None:
    """Finish removals that were cut short. Only those: another database's run directories are not ours to judge."""
    transport = for_host(Host.local())
    for identity in transport.half_removed():
        transport.remove(identity)
