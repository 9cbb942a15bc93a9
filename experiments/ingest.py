"""Events become rows, once each.

A chunk of events.jsonl is taken in by compare-and-swap on the run's byte offset, inside the transaction that writes its
rows: whoever comes second with the same bytes, or with bytes from the wrong place, changes nothing and learns where the
file stands. A step that is trained again after a resume repeats its values, so a point is overwritten rather than
doubled; every other event is kept once, by its sequence number. The rows can be thrown away and read again: `rebuild`.
"""

from __future__ import annotations

import json
import math
from typing import Any

from django.db import transaction
from django.utils import timezone
from pydantic import ValidationError

from experiments.models import ModelRun, Note, Point, Reason, State
from trainer.events import Event, parse_event

#: Bytes of a line; a longer one is no event of ours.
MOST_LINE = 64 << 10
#: Kinds that are points on a curve, or (preparing) only worth their newest.
_NOT_NOTED = frozenset({"train", "preparing"})
_POINT_FIELDS = [
    field.name for field in Point._meta.concrete_fields if field.name not in ("id", "run", "split", "step")
]


def ingest(run: ModelRun, chunk: bytes, offset: int) -> int:
    """Take in the complete lines of `chunk`, which begins at byte `offset` of the run's events.jsonl.

    Returns the offset up to which the file is in the database now: the end of the chunk's last complete line, or, if
    `offset` is not where the database stands, that place, and nothing was changed. Raises ModelRun.DoesNotExist if the
    run was deleted.
    """
    chunk = chunk[: chunk.rfind(b"\n") + 1]
    if not chunk:
        return _offset(run)
    points: dict[tuple[str, int], Point] = {}
    notes: list[Note] = []
    known: dict[str, Any] = {"offset": offset + len(chunk)}
    at = offset
    for line in chunk.splitlines(keepends=True):
        if line.strip():
            event = _parse(line)
            if event is None:
                notes.append(_unreadable(run, line, at))
            else:
                known.update(_known(event))
                if event.kind == "train" or (event.kind == "eval" and event.split != "train"):
                    point = _point(run, event)
                    points[point.split, point.step] = point  # PostgreSQL refuses one row twice in a statement
                    notes += _symmetry(run, event)
                elif event.kind not in _NOT_NOTED:
                    notes.append(Note(run=run, seq=event.seq, at=event.at, kind=event.kind, data=_plain(event)))
        at += len(line)
    reason = known.pop("reason", None)
    with transaction.atomic():
        if not ModelRun.objects.filter(pk=run.pk, offset=offset).update(**known):
            return _offset(run)
        if reason:  # of a run that is asked to stop, "stopping" is what people want to read
            ModelRun.objects.filter(pk=run.pk, state=State.RUNNING, stop_requested=False).update(reason=reason)
        Point.objects.bulk_create(
            points.values(),
            update_conflicts=True,
            unique_fields=["run", "split", "step"],
            update_fields=_POINT_FIELDS,
        )
        Note.objects.bulk_create(notes, ignore_conflicts=True)
    for field, value in known.items():
        setattr(run, field, value)
    return int(known["offset"])


def rebuild(run: ModelRun, events: bytes) -> None:
    """Forget what the rows say of `run` and read `events`, the whole of its events.jsonl, again."""
    fresh = ModelRun()
    with transaction.atomic():
        run.points.all().delete()
        run.notes.all().delete()
        known = {field: getattr(fresh, field) for field in _REBUILT}
        ModelRun.objects.filter(pk=run.pk).update(**known)
        ingest(run, events, 0)
    run.refresh_from_db()


_REBUILT = (
    "offset",
    "last_seq",
    "step",
    "total_steps",
    "tokens",
    "flops",
    "train_seconds",
    "tokens_per_second",
    "parameters",
    "non_embedding_parameters",
    "train_cross_entropy",
    "validation_cross_entropy",
    "test_cross_entropy",
    "peak_memory_bytes",
    "preparing",
    "prepared",
    "grown",
    "finished",
    "last_event_at",
)


def _offset(run: ModelRun) -> int:
    return ModelRun.objects.values_list("offset", flat=True).get(pk=run.pk)


def _parse(line: bytes) -> Event | None:
    event = _event(line) if len(line) <= MOST_LINE else None
    return event if event is not None and _can_be(event) else None


def _event(line: bytes) -> Event | None:
    try:
        return parse_event(line)
    except ValidationError:
        pass
    try:  # JSON has no NaN; a figure that was none is written as null
        fields = json.loads(line)
        return parse_event(json.dumps({k: math.nan if v is None else v for k, v in fields.items()}))
    except (ValidationError, ValueError, AttributeError, RecursionError):
        return None


def _can_be(event: Event) -> bool:
    """Whether a trainer of ours may have said so, and columns can hold it: users' machines may say anything."""
    for name, value in event:
        if isinstance(value, int) and not -1 <= value < (1 << 31 if name in ("step", "total_steps") else 1 << 62):
            return False
        if isinstance(value, float) and math.isfinite(value) and abs(value) > 1e100 and name != "perplexity":
            return False
    step = getattr(event, "step", None)
    return (step is None or step >= 0) and event.at.tzinfo is not None and 2000 <= event.at.year < 2200


def _unreadable(run: ModelRun, line: bytes, offset: int) -> Note:
    """A line that is no event is shown, not stumbled over. Its place in the file is its number, below all real ones."""
    text = line.decode("utf-8", "replace").strip()[:500].replace("\0", "�")
    data = {"message": f"a line of events.jsonl could not be read: {text}", "offset": offset}
    return Note(run=run, seq=-1 - offset, at=timezone.now(), kind="warning", data=data)


def _plain(event: Event) -> dict[str, Any]:
    """The event as JSON that both databases hold: no NaN, and no NUL in texts, which PostgreSQL refuses."""
    text = event.model_dump_json()
    return json.loads(text.replace("\\u0000", "\\ufffd") if "\\u0000" in text else text)  # type: ignore[no-any-return]


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _point(run: ModelRun, event: Any) -> Point:
    return Point(
        run=run,
        split=Point.Split.TRAIN if event.kind == "train" else event.split,
        step=event.step,
        tokens=event.tokens,
        flops=_number(event.flops) or 0.0,
        train_seconds=_number(event.train_seconds) or 0.0,
        cross_entropy=_number(event.cross_entropy),
        accuracy=_number(getattr(event, "accuracy", None)),
        bits_per_byte=_number(getattr(event, "bits_per_byte", None)),
        n_tokens=getattr(event, "n_tokens", None),
        lr=_number(getattr(event, "lr", None)),
        grad_norm=_number(getattr(event, "grad_norm", None)),
    )


def _symmetry(run: ModelRun, event: Any) -> list[Note]:
    """How far the copies of a grown model had parted at an evaluation: of whole axes, not of each block."""
    axes = [row.model_dump(mode="json") for row in getattr(event, "symmetry", None) or () if row.layer is None]
    data = {"step": event.step, "symmetry": axes}
    return [Note(run=run, seq=event.seq, at=event.at, kind="symmetry", data=data)] if axes else []


def _known(event: Any) -> dict[str, Any]:
    """What the newest event of each kind says of the run as a whole."""
    known: dict[str, Any] = {"last_seq": event.seq, "last_event_at": event.at}
    match event.kind:
        case "started":
            known |= {"reason": Reason.PREPARING}
        case "preparing":
            known |= {"preparing": _plain(event), "reason": Reason.PREPARING}
        case "prepared":
            known |= {
                "prepared": _plain(event),
                "total_steps": event.total_steps,
                "parameters": event.parameters,
                "non_embedding_parameters": event.non_embedding_parameters,
                "reason": Reason.TRAINING,
            }
        case "grown":
            # Where each tensor comes from is long, and is kept in the note alone.
            grown = {name: value for name, value in _plain(event).items() if name != "lineage"}
            known |= {"grown": grown, "reason": Reason.TRAINING}  # a model that grew on the way trains on
        case "train":
            known |= _progress(event) | {
                "train_cross_entropy": _number(event.cross_entropy),
                "tokens_per_second": _number(event.tokens_per_second),
            }
        case "eval":
            known |= _progress(event)
            if event.split != Point.Split.TRAIN:
                known[f"{event.split}_cross_entropy"] = _number(event.cross_entropy)
        case "finished":
            known |= _progress(event) | {
                "finished": _plain(event),
                "tokens_per_second": _number(event.tokens_per_second),
                "peak_memory_bytes": event.peak_memory_bytes,
            }
    return known


def _progress(event: Any) -> dict[str, Any]:
    return {
        "step": event.step,
        "tokens": event.tokens,
        "flops": _number(event.flops) or 0.0,
        "train_seconds": _number(event.train_seconds) or 0.0,
    }
