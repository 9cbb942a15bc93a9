"""The worker: it takes jobs from the queue, and each job only follows a training process that runs by itself.

    manage.py work [QUEUE]      what `manage.py up` starts
    rq worker QUEUE             RQ's own worker does too, from a checkout with the same settings: this module sets up
                                Django; it only notices the death of others later

Holds no torch: following is reading a file. When a worker dies its jobs are taken up by another within seconds; when
the broker goes away its follower goes on, since following needs the database alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import django
from django.apps import apps

if not apps.ready:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "kangaroo_site.settings")
    django.setup()

from django.db import connections
from redis.exceptions import ConnectionError as BrokerGone
from redis.exceptions import TimeoutError as BrokerSlow
from rq import Queue, Retry, get_current_job
from rq import Worker as RqWorker
from rq.executions import Execution
from rq.job import Job

from experiments import broker, growths, jobs, looks

_detached = False


def follow(run_id: int, attempt: int) -> Retry | None:
    """The job, as RQ calls it in a process of its own. A Retry puts it back into the queue."""
    connections.close_all()  # those of the process that we were forked from are not ours
    try:
        ended = jobs.follow(run_id, attempt, detached=lambda: _detached)
    except Exception:
        time.sleep(2)  # RQ tries again at once: what fails every time must not do so a thousand times a second
        raise
    _take_leave()
    return None if ended else Retry(max=10**6)


def grow(pk: str, attempt: int) -> Retry | None:
    """As :func:`follow`, of a checkpoint that is grown by itself."""
    connections.close_all()
    try:
        ended = growths.follow(pk, attempt, detached=lambda: _detached)
    except Exception:
        time.sleep(2)
        raise
    _take_leave()
    return None if ended else Retry(max=10**6)


def look(source: str) -> None:
    """What a checkpoint says of itself, for whoever asks next."""
    connections.close_all()
    looks.find_out(source)


def _take_leave() -> None:
    """A job that ended while the broker is away would count as lost, and be done once more."""
    job = get_current_job()
    assert job is not None
    for _ in range(600):
        try:
            broker.forget_dead_executions(job)
            return
        except (BrokerGone, BrokerSlow):
            if _detached:
                return
            time.sleep(1)


def die_with_parent(sig: int = signal.SIGKILL) -> None:
    """Let the kernel send us `sig` when our parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, sig)  # PR_SET_PDEATHSIG


class Worker(RqWorker):
    """RQ's worker, with its times cut down to jobs that hold no state: a dead one is noticed in about ten seconds."""

    max_connection_wait_time = 5.0

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"worker_ttl": 20, "job_monitoring_interval": 3, "maintenance_interval": 5}
        super().__init__(*args, **options)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return 13

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        try:
            super().maintain_heartbeats(job, execution)
        except (BrokerGone, BrokerSlow) as error:
            self.log.warning("the broker does not answer (%s); the job goes on without it", error)

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        parent = os.getppid()
        die_with_parent()
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
        super().main_work_horse(job, queue)

    def setup_work_horse_signals(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _detach)

    def handle_warm_shutdown_request(self) -> None:
        """Asked to end, a worker does not wait for its run, which may take days: the follower lets go of it."""
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]
        if self.horse_pid:
            self.kill_horse(signal.SIGTERM)


def _detach(signum: int, frame: FrameType | None) -> None:
    global _detached
    _detached = True
