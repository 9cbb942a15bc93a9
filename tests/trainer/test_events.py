from __future__ import annotations

import json
from datetime import datetime
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import ValidationError

from trainer import events
from trainer.events import parse_event

KINDS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(events.Event)[0])}


def example(model: Any) -> dict[str, Any]:
    """An event, or a part of one, with something in every field."""
    held: dict[str, Any] = {"seq": 7, "at": "2026-11-24T10:00:00.123Z"} if "seq" in model.model_fields else {}
    return {name: value(field.annotation) for name, field in model.model_fields.items()} | held


def value(annotation: Any) -> Any:
    """Something that a field of this type may hold, and not None."""
    choices, origin = get_args(annotation), get_origin(annotation)
    if origin in (Union, UnionType):
        return value(choices[0])
    if origin is Literal:
        return choices[0]
    if origin is list:
        return [value(choices[0])]
    if origin is dict:
        return {"torch": "2"}
    simple = {int: 3, float: 0.1, str: "é\n", bool: True}
    return simple[annotation] if annotation in simple else example(annotation) if annotation is not datetime else None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_goes_through_its_line_unchanged(kind: str) -> None:
    event = parse_event(json.dumps(example(KINDS[kind])))
    line = event.model_dump_json()
    assert "\n" not in line
    assert parse_event(line) == event
    assert event.kind == kind


def test_what_a_newer_trainer_says_more_is_passed_over() -> None:
    held = example(KINDS["train"]) | {"temperature": 3}
    assert not hasattr(parse_event(json.dumps(held)), "temperature")


@pytest.mark.parametrize(
    "line", ["", "{}", '{"kind":"train"}', '{"kind":"unknown","seq":1,"at":"2026-11-24T10:00:00Z"}', '{"seq":1,']
)
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValidationError):
        parse_event(line)
