import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from experiments import first_experiment


class Command(BaseCommand):
    help = "Submit the public first experiment, once on this installation, and show how it goes."
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--address", default="http://localhost:8000/", help="of the site, to say where to look")

    def handle(self, *args: Any, **options: Any) -> None:
        experiment = first_experiment.submit()
        if not first_experiment.show(experiment, sys.stdout, options["address"]):
            raise CommandError("the first experiment did not finish")
