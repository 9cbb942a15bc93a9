"""A whole target shape from the few fields that someone asked to change."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from trainer.families import get_family
from trainer.growth.errors import GrowthError
from trainer.growth.width import size_of
from trainer.shape import Shape

_FIELDS = tuple(Shape.model_fields)


def resolve_shape(family: str, parent: Shape, changes: Mapping[str, int | float | str]) -> Shape:
    """The parent's shape with `changes`; a value may be a number or a factor such as "2x".

    What is left out stays, but for what the architecture ties to it: n_kv_heads follows n_heads where they were equal,
    and where d_model must be n_heads x d_head the one of the three that was not named (first n_heads, then d_model)
    follows. Raises :class:`GrowthError` with a field such as "shape.d_model".
    """
    given: dict[str, int | float] = {}
    for field, value in changes.items():
        if field not in _FIELDS:
            raise GrowthError(f"shape.{field}", f"is not a field of a shape; these are: {', '.join(_FIELDS)}")
        given[field] = _number(parent, field, value)
    if parent.kv_heads == parent.n_heads and "n_kv_heads" not in given:
        given["n_kv_heads"] = given.get("n_heads", parent.n_heads)
    merged = parent.model_dump() | given
    if get_family(family).square and merged["d_model"] != merged["n_heads"] * merged["d_head"]:
        if "n_heads" not in given and merged["d_model"] % merged["d_head"] == 0:
            merged["n_heads"] = merged["n_kv_heads"] = merged["d_model"] // merged["d_head"]
        elif "d_head" not in given and "d_model" in given and merged["d_model"] % merged["n_heads"] == 0:
            merged["d_head"] = merged["d_model"] // merged["n_heads"]
        elif "d_model" not in given:
            merged["d_model"] = merged["n_heads"] * merged["d_head"]
    if merged["n_kv_heads"] == merged["n_heads"]:
        merged["n_kv_heads"] = None
    try:
        shape = Shape.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        raise GrowthError(f"shape.{first['loc'][0]}", first["msg"], first["input"]) from None
    for field, message in get_family(family).problems(shape):
        raise GrowthError(f"shape.{field}", message, size_of(shape, field))
    return shape


def _number(parent: Shape, field: str, value: int | float | str) -> int | float:
    if not isinstance(value, str):
        return value
    try:
        number = float(value.removesuffix("x"))
    except ValueError:
        raise GrowthError(f"shape.{field}", 'must be a number, or a factor such as "2x"', value) from None
    if value.endswith("x"):
        number *= parent.layer_norm_eps if field == "layer_norm_eps" else size_of(parent, field)
    if field == "layer_norm_eps":
        return number
    if not number.is_integer():
        raise GrowthError(f"shape.{field}", f"comes to {number:g}, and must be a whole number", value)
    return int(number)
