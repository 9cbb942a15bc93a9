from typing import Any, BinaryIO

from django.core.management.base import BaseCommand, CommandError, CommandParser

from experiments.ingest import rebuild
from experiments.models import ModelRun
from experiments.transport import HostProblem, for_host
from experiments.transport.local import Local


def _opened(run: ModelRun) -> BinaryIO:
    """From where it was trained; from the copy that stands here while that machine is away."""
    try:
        return for_host(run.host).open_file(run, "events.jsonl")
    except HostProblem:
        return Local(run.host).open_file(run, "events.jsonl")


class Command(BaseCommand):
    help = "Forget what the database says of model runs and read their events.jsonl again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("run", nargs="+", type=int, help="number of a model run, as the admin shows it")

    def handle(self, *args: Any, **options: Any) -> None:
        for number in options["run"]:
            run = ModelRun.objects.select_related("host", "experiment").filter(pk=number).first()
            if run is None:
                raise CommandError(f"there is no model run {number}")
            try:
                with _opened(run) as events:
                    rebuild(run, events.read())
            except FileNotFoundError:
                raise CommandError(f"run {number} has no events.jsonl: it was never started") from None
            self.stdout.write(f"{run}: {run.points.count()} points, {run.notes.count()} other events")
