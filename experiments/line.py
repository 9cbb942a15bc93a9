"""Who comes next: the line in which runs wait for a place on their host, and the ringing of the queue for them.

A place is one of a host's slots, or, on a machine with GPUs, as many of its GPUs as the run wants: those that no run of
ours has, and on which nobody else computes. First come, first served; a run that wants more than are free is not
overtaken by those behind it, or it might wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Exists, F, Max, OuterRef, Q, Sum
from django.utils import timezone
from redis.exceptions import RedisError
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job, JobStatus

from experiments import broker
from experiments.models import Host, ModelRun, Reason, State, Transfer
from trainer.machine import free_gpus

log = logging.getLogger(__name__)

#: What is known of a host's GPUs for longer is not how they stand now.
FRESH = timedelta(seconds=30)
#: The job that RQ calls, by name: a worker needs nothing of it before the job begins.
FOLLOW = "experiments.worker.follow"


# The line -------------------------------------------------------------------------------------------------------------


def ready() -> Q:
    """Queued runs that only wait for a place: what they grow from is done, and where they can reach it."""
    came_over = Transfer.objects.filter(run=OuterRef("parent"), name="model", state=Transfer.State.DONE)
    at_hand = Q(parent__host=F("host")) | ~Q(parent__host__kind=Host.Kind.SSH) | Q(Exists(came_over))
    grown = Q(parent__state=State.SUCCEEDED) & at_hand
    waiting = Q(state=State.QUEUED, stop_requested=False)
    return waiting & (Q(parent=None) | grown)


def waits_for_parent(run: ModelRun) -> bool:
    """Whether what it grows from is still trained, or on its way from the host that trained it."""
    if run.parent is None:
        return False
    if run.parent.state != State.SUCCEEDED:
        return True
    if run.parent.host_id == run.host_id or not run.parent.host.is_remote:
        return False
    return not run.parent.transfers.filter(name="model", state=Transfer.State.DONE).exists()


def place_in_line(run: ModelRun) -> int | None:
    """1 for the run that gets the next free place on its host; None if it is not waiting for one."""
    if run.state != State.QUEUED or waits_for_parent(run):
        return None
    return int(_before(run).count()) + 1


def _before(run: ModelRun) -> Any:
    """Ready runs on the host of `run` that have waited for longer."""
    earlier = Q(queued_at__lt=run.queued_at) | Q(queued_at=run.queued_at, pk__lt=run.pk)
    return ModelRun.objects.filter(ready() & earlier, host=run.host_id)


def claim(run: ModelRun) -> bool:
    """Take a place on the host for `run`: whether it got one. However many workers try, no place is given twice."""
    gpus = _gpus(run.host)
    with transaction.atomic():
        host = Host.objects.select_for_update().get(pk=run.host_id)
        running = list(ModelRun.objects.filter(host=host, state=State.RUNNING).values_list("gpus", flat=True))
        given: list[str] | None = []
        if gpus is not None:
            given = _given(host, run, gpus, Counter(uuid for uuids in running for uuid in uuids))
        # This machine lends its cores too; on another with GPUs, they alone count.
        if (gpus is None or not host.is_remote) and len(running) + _before(run).count() >= host.slots:
            given = None
        if given is None:
            reason = Reason.WAITING_FOR_SLOT if gpus is None else Reason.WAITING_FOR_GPU
            ModelRun.objects.filter(pk=run.pk, state=State.QUEUED).update(reason=reason)
            return False
        now = timezone.now()
        started = run.started_at or now
        return run.move(State.RUNNING, Reason.STARTING, started_at=started, last_seen=now, gpus=given)


def most_gpus(host: Host) -> int | None:
    """How many GPUs a run may be given there; None where none was found, or nobody has looked."""
    known = (host.readings or host.facts or {}).get("gpus") or []
    return len(_chosen(host, known)) or None


def _gpus(host: Host) -> list[dict[str, Any]] | None:
    """The GPUs of the host as they are now, none where it does not answer; None if it is known to have none."""
    if most_gpus(host) is None:
        return None
    # Read by the collector, every few seconds while something trains or waits there. No worker, which serves everybody,
    # is to wait for a host that does not answer, or takes its time; the collector rings when it has.
    if host.problem or host.readings_at is None or timezone.now() - host.readings_at > FRESH:
        return []
    # While a run of ours had a GPU, nobody could tell who else was on it.
    ended = ModelRun.objects.filter(host=host.pk).aggregate(Max("ended_at"))["ended_at__max"]
    if ended is not None and host.readings_at < ended:
        return []
    return _chosen(host, (host.readings or {}).get("gpus") or [])


def _chosen(host: Host, gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of `gpus`, as the host names them, that its owner lets Kangaroo use."""
    wanted = {part.strip() for part in host.gpu_choice.split(",") if part.strip()}
    named = [gpu for gpu in gpus if isinstance(gpu, dict) and isinstance(gpu.get("uuid"), str)]
    return [gpu for gpu in named if not wanted or str(gpu.get("index")) in wanted or gpu["uuid"] in wanted]


def _given(host: Host, run: ModelRun, gpus: list[dict[str, Any]], taken: Counter[str]) -> list[str] | None:
    """The GPUs for `run`, once those before it in the line have theirs; None if there are too few."""
    idle = set(free_gpus(gpus))
    # A GPU on which only runs of ours compute has room up to runs_per_gpu; one that others use has none.
    room = {
        gpu["uuid"]: host.runs_per_gpu - taken[gpu["uuid"]] for gpu in gpus if taken[gpu["uuid"]] or gpu["uuid"] in idle
    }
    first = int(_before(run).aggregate(Sum("gpus_wanted"))["gpus_wanted__sum"] or 0)
    if first + run.gpus_wanted > sum(left for left in room.values() if left > 0):
        return None
    found = sorted((uuid for uuid, left in room.items() if left > 0), key=lambda uuid: taken[uuid])
    return found[: run.gpus_wanted] if len(found) >= run.gpus_wanted else None


def ring_line(host: Host) -> None:
    """Ring for as many of the waiting runs of `host` as it may have free places."""
    running = ModelRun.objects.filter(host=host, state=State.RUNNING).count()
    places = (most_gpus(host) or 0) * host.runs_per_gpu if host.is_remote else 0
    waiting = ModelRun.objects.select_related("host", "parent__host").filter(ready(), host=host)
    ring(waiting.order_by("queued_at", "pk")[: max(0, (places or host.slots) - running)])


# Ringing: the queue ---------------------------------------------------------------------------------------------------


def ring_for(experiment: UUID) -> None:
    """A job for each queued run of an experiment."""
    ring(ModelRun.objects.select_related("host", "parent__host").filter(experiment=experiment, state=State.QUEUED))


def ring(runs: Iterable[ModelRun], *, anew: bool = False) -> None:
    """A job for each of `runs` that has none. `anew`: whatever the queue believes of the job it has.

    A broker that is down is no error: the database holds what is wanted, and the reconciler rings again.
    """
    try:
        for run in sorted(runs, key=lambda run: (run.queued_at, run.parent_id is not None, run.pk)):
            queue = broker.queue(run.host.queue)
            if not has_job(queue, run.job_id, anew, deferred=partial(_still_waits, run, queue)):
                _enqueue(queue, run)
    except (RedisError, OSError) as error:
        log.warning("the broker does not answer (%s); the reconciler will ring again", error)


def _enqueue(queue: Queue, run: ModelRun) -> None:
    about = f"{run.name} of experiment {run.experiment_id}, attempt {run.attempt}"
    if not waits_for_parent(run):
        enqueue(queue, FOLLOW, run.job_id, (run.pk, run.attempt), about)
        return
    assert run.parent is not None
    # The job of a parent on a GPU host ends when that run begins, so it would say nothing: its child is rung for when
    # the parent has succeeded.
    if not run.parent.host.is_remote and Job.exists(run.parent.job_id, connection=queue.connection):
        enqueue(queue, FOLLOW, run.job_id, (run.pk, run.attempt), about, depends_on=run.parent.job_id)


def _still_waits(run: ModelRun, queue: Queue) -> bool:
    parent = run.parent.job_id if run.parent else ""
    return waits_for_parent(run) or Job.exists(parent, connection=queue.connection)


def enqueue(
    queue: Queue, function: str, job_id: str, args: tuple[Any, ...], description: str, depends_on: str = ""
) -> None:
    """A job that follows a process for as long as it takes: it holds nothing, so it may be killed and doubled."""
    options: dict[str, Any] = {"depends_on": depends_on} if depends_on else {"unique": True}
    with contextlib.suppress(DuplicateJobError):  # somebody else rang in the same moment
        queue.enqueue_call(
            function,
            args=args,
            job_id=job_id,
            description=description,
            timeout=-1,
            result_ttl=0,  # a job that has ended leaves nothing in the way of the next with its id
            failure_ttl=24 * 3600,
            retry=Retry(max=1000),  # a follower that was killed is followed by the next one at once
            **options,
        )


def has_job(queue: Queue, job_id: str, anew: bool, deferred: Callable[[], bool] = lambda: False) -> bool:
    """Whether the queue will see to it by itself; a job that is stuck is taken out of the way.

    `anew`: whatever the queue believes of a job that it has begun. `deferred`: whether one may still wait for another.
    """
    try:
        job = Job.fetch(job_id, connection=queue.connection)
    except NoSuchJobError:
        return False
    match job.get_status():
        case JobStatus.QUEUED:
            lists = (queue.key, queue.intermediate_queue.key)
            good = any(queue.connection.lpos(name, job.id) is not None for name in lists)
        case JobStatus.STARTED:
            good = not anew and job.id in queue.started_job_registry.get_job_ids(cleanup=False)
        case JobStatus.DEFERRED:
            good = deferred()
        case JobStatus.SCHEDULED | JobStatus.READY_TO_ENQUEUE:
            good = not anew
        case _:
            good = False
    if not good:
        broker.delete(job)
    return good


def forget(run: ModelRun) -> None:
    """Take a run's job out of the queue. Left there it would do nothing, but would be in sight."""
    take_out(run.host.queue, run.job_id)


def take_out(queue_name: str, job_id: str) -> None:
    """Take out of its queue a job that has not begun."""
    try:
        queue = broker.queue(queue_name)
        job = Job.fetch(job_id, connection=queue.connection)
        if job.get_status() != JobStatus.STARTED:
            broker.delete(job)
    except NoSuchJobError:
        pass
    except (RedisError, OSError) as error:
        log.warning("the broker does not answer (%s)", error)
