"""Growth operators as plans over named axes."""

from __future__ import annotations

from typing import Any

from trainer.spec import GrowInit, Shape


class GrowthError(ValueError):
    def __init__(self, field: str, message: str, value: Any = None):
        self.field, self.message, self.value = field, message, value
        super().__init__(message)


def check(family: str, parent: Shape, child: Shape, init: GrowInit) -> None:
    """Raise GrowthError if the child cannot be grown so from the parent."""
