"""The collector: the one process that holds connections to GPU hosts, and does whatever has to do with them.

    manage.py collect      what `manage.py up` starts

    the keeper             one SSH connection a host, in a thread of its own; others reach it by a socket
    a thread a run         that has its place on such a host: jobs.collect
    a thread a task        a look at a host, or its set-up: experiments.hosts
    a thread a transfer    a model on its way here: experiments.mirror
    readings, removals     every few seconds

What is to be done stands in rows, which it looks for every half second; so it may be killed and started at any moment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from django.db import Error as DatabaseError
from django.db import close_old_connections, connections
from django.utils import timezone

from experiments import hosts, jobs, mirror
from experiments.line import ring_line
from experiments.models import ACTIVE, Host, HostTask, ModelRun, Reason, Removal, State, Transfer
from experiments.transport import HostProblem, for_host
from experiments.transport.client import hang_up
from experiments.transport.keeper import Keeper

log = logging.getLogger(__name__)

#: Seconds between two looks at what is to be done.
EVERY = 0.5
#: Seconds between two readings of a host on which runs train or wait.
READ_EVERY = 5.0
#: The same while runs wait for a GPU there.
READ_EAGERLY = 1.0
#: Transfers from one host at a time; the others wait.
TRANSFERS = 2
#: Seconds before what has failed again and again is tried once more, at most.
LONGEST_PAUSE = 300.0


class Collector:
    """Everything above, until :meth:`leave` is called."""

    def __init__(self) -> None:
        self._leaving = threading.Event()
        self._threads: dict[tuple[str, Any], threading.Thread] = {}
        self._not_before: dict[tuple[str, Any], float] = {}
        self._failures: dict[tuple[str, Any], int] = {}
        self._read_at: dict[int, float] = {}

    def leave(self, *_: Any) -> None:
        self._leaving.set()

    def run(self) -> None:
        keeper = Keeper()
        keeper.start()
        try:
            while not self._leaving.wait(EVERY):
                close_old_connections()
                try:
                    self._look()
                except DatabaseError as error:
                    log.warning("the database does not answer (%s)", error)
                    connections.close_all()
                    self._leaving.wait(2.0)
        finally:
            self._leaving.set()
            for thread in list(self._threads.values()):
                thread.join(timeout=3)
            keeper.stop()

    def _look(self) -> None:
        running = ModelRun.objects.filter(state=State.RUNNING, host__kind=Host.Kind.SSH)
        for key in running.values_list("pk", "attempt"):
            self._do("run", key, partial(self._follow, *key))
        tasks = HostTask.objects.filter(state__in=[HostTask.State.WANTED, HostTask.State.RUNNING])
        for pk in tasks.values_list("pk", flat=True):
            self._do("task", pk, partial(self._task, pk))
        transfers = Transfer.objects.filter(state__in=[Transfer.State.WANTED, Transfer.State.RUNNING])
        of_host: Counter[int] = Counter()
        for pk, host in transfers.order_by("created", "pk").values_list("pk", "run__host"):
            of_host[host] += 1
            if of_host[host] <= TRANSFERS:
                self._do("transfer", pk, partial(self._transfer, pk))
        for host in Removal.objects.order_by().values_list("host", flat=True).distinct():
            self._do("removals", host, partial(self._remove, host))
        busy = Host.objects.filter(runs__state__in=ACTIVE).exclude(kind=Host.Kind.WORKER).distinct()
        waited_for = set(ModelRun.objects.filter(state=State.QUEUED, reason=Reason.WAITING_FOR_GPU).values_list("host"))
        for pk in busy.values_list("pk", flat=True):
            every = READ_EAGERLY if (pk,) in waited_for else READ_EVERY
            if time.monotonic() - self._read_at.get(pk, -every) >= every:
                self._read_at[pk] = time.monotonic()
                self._do("readings", pk, partial(self._read, pk))

    def _do(self, what: str, key: Any, work: Callable[[], float | None]) -> None:
        """Do `work` in a thread, unless it is being done. It returns in how many seconds it may be tried again."""
        name = (what, key)
        thread = self._threads.get(name)
        if (thread is not None and thread.is_alive()) or time.monotonic() < self._not_before.get(name, 0.0):
            return

        def guarded() -> None:
            again = 2.0
            try:
                again = work() or 0.0
                self._failures.pop(name, None)
            except HostProblem as problem:
                log.info("%s %s: %s", what, key, problem.message)
            except Exception:
                # What fails every time must neither do so many times a second nor fill the log.
                self._failures[name] = failures = self._failures.get(name, 0) + 1
                again = min(LONGEST_PAUSE, 2.0**failures)
                log.exception("%s %s", what, key)
            finally:
                self._not_before[name] = time.monotonic() + again
                hang_up()
                connections.close_all()

        self._threads = {key: each for key, each in self._threads.items() if each.is_alive()}
        self._not_before = {key: at for key, at in self._not_before.items() if at > time.monotonic()}
        self._threads[name] = threading.Thread(target=guarded, name=f"{what} {key}", daemon=True)
        self._threads[name].start()

    # What is done

    def _follow(self, pk: int, attempt: int) -> None:
        jobs.collect(pk, attempt, detached=self._leaving.is_set)

    def _task(self, pk: int) -> None:
        task = HostTask.objects.select_related("host").filter(pk=pk).first()
        if task is not None and task.is_active:
            hosts.perform(task, leaving=self._leaving.is_set)

    def _transfer(self, pk: int) -> float | None:
        transfer = Transfer.objects.select_related("run__host", "run__experiment").filter(pk=pk).first()
        if transfer is None:
            return None
        Transfer.objects.filter(pk=pk).update(state=Transfer.State.RUNNING)
        try:
            if not mirror.fetch(transfer, for_host(transfer.run.host), self._leaving.is_set):
                return None
            mirror.settle(transfer)
        except HostProblem:
            return 3.0  # it goes on when the host is back
        except mirror.Unwanted:
            return None
        except (OSError, ValueError) as error:
            mirror.settle(transfer, error=str(error))
        finally:
            mirror.clear_up(transfer.run)
        for child in transfer.run.children.select_related("host"):
            ring_line(child.host)
        return None

    def _remove(self, host: int) -> float | None:
        again = None
        for removal in Removal.objects.select_related("host").filter(host=host).order_by("created"):
            try:
                for_host(removal.host).remove(removal.experiment_id)
            except HostProblem:
                return 3.0
            except (OSError, ValueError) as error:
                log.info("experiment %s on %s is not removed yet: %s", removal.experiment_id, removal.host, error)
                again = 30.0
                continue
            removal.delete()
        return again

    def _read(self, pk: int) -> None:
        host = Host.objects.filter(pk=pk).first()
        if host is not None:
            at = timezone.now()  # what happens while it answers is not in them
            readings = for_host(host).readings()
            Host.objects.filter(pk=pk).update(readings=readings, readings_at=at)
            if host.runs.filter(state=State.QUEUED).exists():
                host.refresh_from_db()
                ring_line(host)  # they wait for GPUs that nobody has looked at until now
