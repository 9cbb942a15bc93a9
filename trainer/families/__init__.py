"""The architectures that can be grown."""

from __future__ import annotations

from trainer.spec import Shape


class Family:
    def problems(self, shape: Shape) -> list[tuple[str, str]]:
        return []


def get_family(name: str) -> Family:
    return Family()
