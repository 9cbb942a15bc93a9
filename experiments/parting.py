"""Have the copies of a grown model parted? Its measurements over its steps as a small chart, a table and a sentence.

A measurement is what :class:`trainer.events.Measure` says of each copied axis; `parting` takes those of one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.lineages import AXIS_NAMES

#: The chart: its size, and the room at its left and bottom for figures.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360.0, 140.0, 44.0, 20.0, 8.0
#: Points of a line, and lines.
MOST_POINTS, MOST_AXES = 80, 7
#: No model is wider; a host may say anything.
MOST_WIDTH = 1 << 50
#: Up to so many points each is marked.
MARKED = 12


class Line(NamedTuple):
    """One axis: its newest measurement, and its effective width over all steps as points of a polyline."""

    title: str
    dash: int
    width: int
    effective_width: int
    first: int  # the effective width at the first measurement
    distance: float | None
    points: str
    marks: tuple[tuple[float, float], ...]

    @property
    def share(self) -> float:
        return self.effective_width / self.width


@dataclass(frozen=True)
class Parting:
    lines: tuple[Line, ...]
    step: int  # of the newest measurement
    low: float  # the share at the foot of the chart: what the narrowest axis has if all its copies are equal
    equal: tuple[str, ...]  # axes of which no copy has parted
    is_whole: bool  # on every axis the effective width is the width

    width, height, left, bottom, top = WIDTH, HEIGHT, LEFT, HEIGHT - BOTTOM, TOP


def parting(measured: Iterable[tuple[int, Sequence[Mapping[str, Any]]]]) -> Parting | None:
    """From (step, its measures); of a step that was measured twice the later counts. None if there are none."""
    by_step = {step: axes for step, rows in measured if (axes := _axes(rows))}
    if not by_step:
        return None
    steps = sorted(by_step)
    newest = by_step[steps[-1]]
    names = list(newest)[:MOST_AXES]
    low = min(row["least_width"] / row["width"] for row in newest.values())
    stride = -(-len(steps) // MOST_POINTS)
    shown = sorted({*steps[::stride], steps[-1]})
    lines = []
    for at, name in enumerate(names):
        row = newest[name]
        curve = [
            (_x(step, steps[-1]), _y(each["effective_width"] / each["width"], low))
            for step in shown
            if (each := by_step[step].get(name))
        ]
        lines.append(
            Line(
                title=AXIS_NAMES.get(name, name),
                dash=at,
                width=row["width"],
                effective_width=row["effective_width"],
                first=next(each[name] for step in steps if name in (each := by_step[step]))["effective_width"],
                distance=row.get("distance"),
                points=" ".join(f"{x:.1f},{y:.1f}" for x, y in curve),
                marks=tuple((round(x, 1), round(y, 1)) for x, y in curve) if len(curve) <= MARKED else (),
            )
        )
    return Parting(
        lines=tuple(lines),
        step=steps[-1],
        low=low,
        equal=tuple(
            AXIS_NAMES.get(name, name)
            for name in names
            if newest[name]["effective_width"] <= newest[name]["least_width"]
        ),
        is_whole=all(row["effective_width"] >= row["width"] for row in newest.values()),
    )


def _axes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of whole axes, those that have copies."""
    return {
        str(row["axis"]): row
        for row in rows
        if row.get("layer") is None
        and 0 < row["least_width"] < row["width"] < MOST_WIDTH
        and row["effective_width"] >= 0
    }


def _x(step: int, last: int) -> float:
    return LEFT + (WIDTH - LEFT - 6) * step / max(1, last)


def _y(share: float, low: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, (share - low) / (1 - low))))
