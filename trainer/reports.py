"""Work that takes a while, in a thread of its own, so that a run can tell how far it is and still be stopped."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

#: Told what is being done, how much of it is, and of how much in all, in the unit that `what` implies.
Report = Callable[[str, int | None, int | None], None]

#: Seconds that a piece of work has to clear up after itself, once it was told to stop.
PATIENCE = 5.0


def reported(
    work: Callable[[Report], T], stop: Callable[[], bool], stopped: Exception
) -> Generator[dict[str, Any], None, T]:
    """`preparing` events of `work`, at most one a second for each thing that it does; returns what it returned.

    Once `stop()` is true its next report raises `stopped`, and so does this. What else it raises is raised here.
    """
    reports: queue.SimpleQueue[tuple[str, int | None, int | None] | None] = queue.SimpleQueue()
    outcome: list[tuple[T | None, BaseException | None]] = []
    leaving = threading.Event()

    def report(what: str, done: int | None, total: int | None) -> None:
        if leaving.is_set():
            raise stopped
        reports.put((what, done, total))

    def run() -> None:
        try:
            outcome.append((work(report), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            reports.put(None)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    said, at = "", 0.0
    try:
        while True:
            if stop():
                leaving.set()
                worker.join(PATIENCE)
                raise stopped
            try:
                news = reports.get(timeout=0.2)
            except queue.Empty:
                continue
            if news is None:
                break
            what, done, total = news
            if what != said or done == total or time.monotonic() - at > 1.0:
                said, at = what, time.monotonic()
                yield {"kind": "preparing", "what": what, "done": done, "total": total}
    finally:
        leaving.set()  # also where nobody wants to hear the rest
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
