"""The one error of growth: a request that cannot be met, and which field of the child asks for it."""

from __future__ import annotations

from typing import Any


class GrowthError(ValueError):
    """`field` is relative to the child's model spec ("shape.d_model", "init.width"); `message` says what is right."""

    def __init__(self, field: str, message: str, value: Any = None):
        self.field, self.message, self.value = field, message, value
        shown = "" if value is None else f" {value!r}"
        super().__init__(f"{field}{shown}: {message}")
