"""What a figure was measured on, and who else was there."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Others:
    """Cores that processes other than this one and its ended children kept busy, on average."""

    cores = 0.0


@contextmanager
def watch() -> Iterator[Others]:
    """Filled in at the end. Needs Linux's /proc/stat; 0 elsewhere is not known."""
    others = Others()
    began, machine, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    try:
        yield others
    finally:
        busy = (_busy_seconds() - machine) - (_own_seconds() - own)
        others.cores = max(0.0, busy / (time.perf_counter() - began))


def _busy_seconds() -> float:
    """CPU seconds of the whole machine: user, nice, system, irq, softirq, and what the host took (steal)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _waiting, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def matmul_peak(dtype: torch.dtype, clock: Callable[[], float], n: int = 2048, times: int = 12) -> float:
    """FLOP/s of the fastest of `times` products of two [n, n] matrices, with torch's present number of threads."""
    import torch

    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    seconds = []
    for _ in range(times):
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return 2 * n**3 / min(seconds)


def line(threads: int | None = None) -> str:
    """The machine in a line: processor, cores, threads used, versions."""
    cpu = platform.processor() or platform.machine()
    try:
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                cpu = row.partition(":")[2].strip()
                break
    except OSError:
        pass
    used = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    return f"{cpu}, {os.cpu_count()} cores{used}; Python {platform.python_version()}, torch {version('torch')}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most: `1.05 (0.98–1.07)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
