from typing import Any

from django.core.management.base import BaseCommand

from experiments.models import TRANSITIONS, State


def diagram() -> str:
    """The states of a run and every change between them, as a Mermaid diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.QUEUED}"]
    for state in State:
        following = sorted(TRANSITIONS[state]) or ["[*]"]
        lines += [f"    {state} --> {to}" for to in following]
    return "\n".join(lines)


class Command(BaseCommand):
    help = "Print the states of a run and the changes between them, as docs/operating.md shows them."
    requires_system_checks = []

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(diagram())
