"""Curves as the charts want them: few enough points to draw, no spike lost, cheap to ask for again and again.

Steps are cut into buckets of a fixed width, a power of two chosen so that a whole run has at most BUCKETS of them. Of
each bucket the points with the lowest and the highest loss are kept, in order, and the last point of the curve. A loss
that is not finite is kept as such, to be marked. Edges do not move while a run goes on, so a bucket that is passed
stays as it is: it is compressed once a process and remembered (CLOSED), and a poll sends only what comes after it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

from django.db.models import Q

from experiments.models import ModelRun, Point

BUCKETS = 800
SPLITS = tuple(Point.Split.values)


class Sight(NamedTuple):
    """One kept point. `loss` is None where it was not finite."""

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float | None
    accuracy: float | None
    bits_per_byte: float | None


_COLUMNS = ("step", "tokens", "flops", "train_seconds", "cross_entropy", "accuracy", "bits_per_byte")
Key = tuple[str, str]  # (model name, split)


@dataclass(frozen=True)
class Series:
    """A model's curve on one split. `points` are those kept of `total`, in order of their steps."""

    width: int
    points: tuple[Sight, ...]
    total: int

    @property
    def last_step(self) -> int:
        return self.points[-1].step if self.points else -1

    def since(self, step: int) -> tuple[Sight, ...]:
        return tuple(point for point in self.points if point.step >= step)


@dataclass(frozen=True)
class _Closed:
    """Buckets that no further event can change: all before step `edge`."""

    edge: int = 0
    points: tuple[Sight, ...] = ()
    total: int = 0
    seq: int = -1


V = TypeVar("V")


class Memory(Generic[V]):
    """The most recently used of what took time to make, bounded. Shared by threads; what it holds is never changed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: OrderedDict[object, V] = OrderedDict()
        self.lock = Lock()

    def get(self, key: object) -> V | None:
        with self.lock:
            if key not in self.kept:
                return None
            self.kept.move_to_end(key)
            return self.kept[key]

    def put(self, key: object, value: V) -> None:
        with self.lock:
            self.kept[key] = value
            self.kept.move_to_end(key)
            while len(self.kept) > self.limit:
                self.kept.popitem(last=False)


#: A curve of 20,000 points takes about 300 kB here.
CLOSED: Memory[_Closed] = Memory(120)


def width_for(total_steps: int) -> int:
    """Steps in a bucket: the smallest power of two that gives a run of `total_steps` at most BUCKETS buckets."""
    return 1 << max(0, math.ceil(math.log2(max(1, total_steps) / BUCKETS)))


def compress(points: Iterable[Sight], width: int) -> list[Sight]:
    """Of each bucket of `width` steps the lowest and the highest loss, and all that are not finite; in order.

    `points` may be any tuples that begin with Sight's fields: naming 60,000 of them only to drop most would take longer
    than all the rest.
    """
    kept: list[Sight] = []
    low = high = None  # of the bucket at hand
    lowest = highest = 0.0
    bucket = -1

    def close() -> None:
        if low is not None and high is not None:
            kept.extend([low] if low is high else [low, high])

    for point in points:
        if point[0] // width != bucket:
            close()
            bucket, low, high = point[0] // width, None, None
        loss = point[4]
        if loss is None or not math.isfinite(loss):
            kept.append(_sight(point)._replace(loss=None))
        elif low is None:
            low = high = point
            lowest = highest = loss
        elif loss < lowest:
            low, lowest = point, loss
        elif loss > highest:
            high, highest = point, loss
    close()
    return sorted(map(_sight, kept), key=lambda point: point.step)


def curves(
    runs: Sequence[ModelRun], totals: dict[str, int | None], splits: Sequence[str] = SPLITS
) -> dict[Key, Series]:
    """The series of each run and split, in one query for what is not remembered.

    `totals` gives each model's number of steps where it is known; without one the steps so far are taken.
    """
    widths = {run.pk: width_for(max(totals.get(run.name) or 0, run.total_steps or 0, run.step)) for run in runs}
    closed: dict[tuple[int, str], _Closed] = {}
    wanted = Q(pk__in=())
    for run in runs:
        for split in splits:
            known = CLOSED.get((run.experiment_id, run.name, split, widths[run.pk])) or _Closed()
            if known.seq > run.last_seq:  # the rows were rebuilt from the start
                known = _Closed()
            closed[run.pk, split] = known
            wanted |= Q(run=run.pk, split=split, step__gte=known.edge)
    rows = Point.objects.filter(wanted).order_by("run_id", "split", "step").values_list(*_COLUMNS, "run_id", "split")
    grouped = itertools.groupby(rows.iterator(chunk_size=20_000), key=itemgetter(-2, -1))
    fresh: dict[tuple[int, str], list[Any]] = {key: list(group) for key, group in grouped}
    found = {}
    for run in runs:
        for split in splits:
            key = (run.experiment_id, run.name, split, widths[run.pk])
            found[run.name, split] = _joined(key, closed[run.pk, split], fresh.get((run.pk, split), ()), run.last_seq)
    return found


def _joined(key: tuple[object, ...], closed: _Closed, fresh: Sequence[Any], seq: int) -> Series:
    """What was remembered and what came since; passed buckets among the latter are remembered from now on."""
    width = key[-1]
    assert isinstance(width, int)
    if not fresh:
        return Series(width, closed.points, closed.total)
    edge = fresh[-1][0] // width * width
    passed = fresh[: bisect_left(fresh, edge, key=itemgetter(0))]
    if passed:
        closed = _Closed(edge, closed.points + tuple(compress(passed, width)), closed.total + len(passed), seq)
        CLOSED.put(key, closed)
    still_open = fresh[len(passed) :]
    points = compress(still_open, width)
    if points[-1].step != fresh[-1][0]:
        points.append(_sight(fresh[-1]))  # where the curve stands now
    return Series(width, closed.points + tuple(points), closed.total + len(still_open))


def _sight(row: Sequence[Any]) -> Sight:
    return Sight._make(row[: len(Sight._fields)])


# A reader's place in the curves: what a poll says it has already ------------------------------------------------------


def place(series: dict[Key, Series]) -> str:
    """Where a reader of these series stands: `model.split.width.step`, one for each curve, joined by commas."""
    return ",".join(
        f"{name}.{split}.{curve.width}.{curve.last_step}" for (name, split), curve in series.items() if curve.points
    )


def parse_place(text: str) -> dict[Key, tuple[int, int]]:
    """What `place` wrote: width and last step of each curve. Anything else is taken for knowing nothing."""
    found: dict[Key, tuple[int, int]] = {}
    for part in text.split(",") if text else ():
        match part.split("."):
            case [name, split, width, step] if width.isdecimal() and step.isdecimal() and int(width) > 0:
                found[name, split] = int(width), int(step)
    return found


def increment(curve: Series, known: tuple[int, int] | None) -> tuple[int, tuple[Sight, ...]]:
    """What a reader lacks who stands at `known`: the step from which to replace what they have, and the points.

    They replace from the edge of the bucket they stood in, which may have filled since; from 0 if the width changed or
    the curve was begun again.
    """
    if known is None or known[0] != curve.width or known[1] > curve.last_step:
        return 0, curve.points
    start = known[1] // curve.width * curve.width
    return start, curve.since(start)


# Sparklines -----------------------------------------------------------------------------------------------------------

SPARK_WIDTH, SPARK_HEIGHT, SPARK_POINTS = 160, 44, 48


def sparks(experiment_runs: Iterable[Sequence[ModelRun]], totals: dict[int, int | None]) -> dict[int, str]:
    """The `points` of an SVG polyline for each run (by its key): validation loss over steps, one scale an experiment.

    `totals` gives each run's steps. One query at most, for any number of experiments.
    """
    groups = [list(runs) for runs in experiment_runs]
    every = [run for runs in groups for run in runs]
    begun = [run for run in every if run.step]
    losses = _thinned(begun, totals) if begun else {}
    found: dict[int, str] = {}
    for runs in groups:
        curves_here = {run.pk: losses.get(run.pk, []) for run in runs}
        values = [loss for curve in curves_here.values() for _, loss in curve]
        if not values:
            continue
        # The first losses are far above all that matters; the top of the picture is where the curves have settled.
        low, high = min(values), sorted(values)[int(len(values) * 0.9)]
        spread = (high - low) or 1.0
        longest = max(step for curve in curves_here.values() for step, _ in curve) or 1
        longest = max(longest, *(totals.get(run.pk) or 0 for run in runs))
        for pk, curve in curves_here.items():
            found[pk] = " ".join(
                f"{2 + (SPARK_WIDTH - 4) * step / longest:.1f},"
                f"{SPARK_HEIGHT - 3 - (SPARK_HEIGHT - 6) * min(1.0, (loss - low) / spread):.1f}"
                for step, loss in curve
            )
    return found


def _thinned(runs: Sequence[ModelRun], totals: dict[int, int | None]) -> dict[int, list[tuple[int, float]]]:
    """At most about SPARK_POINTS validation losses of each run: (step, loss)."""
    strides = {run.pk: max(1, (totals.get(run.pk) or run.step) // SPARK_POINTS) for run in runs}
    found: dict[int, list[tuple[int, float]]] = {}
    rows = (
        Point.objects.filter(run__in=strides, split=Point.Split.VALIDATION, cross_entropy__isnull=False)
        .order_by("run", "step")
        .values_list("run_id", "step", "cross_entropy")
    )
    for run_id, step, loss in rows:
        curve = found.setdefault(run_id, [])
        assert loss is not None
        if not curve or step - curve[-1][0] >= strides[run_id]:
            curve.append((step, loss))
    return found
