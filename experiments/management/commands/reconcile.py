import logging
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import Error, connections

from experiments import growths, jobs

log = logging.getLogger(__name__)


class Command(BaseCommand):
    help = "Ring for all that is wanted and has nobody to follow it. Once, or with --every, again and again."
    requires_system_checks = []  # it serves no pages; `up` has checked

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--every", type=float, metavar="SECONDS", help="repeat for ever")

    def handle(self, *args: Any, **options: Any) -> None:
        every = options["every"]
        while True:
            try:
                jobs.reconcile()
                growths.reconcile()
            except (Error, OSError):
                if not every:
                    raise
                log.exception("could not reconcile; trying again")
                connections.close_all()
            if not every:
                return
            time.sleep(every)
