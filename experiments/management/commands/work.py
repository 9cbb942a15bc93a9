from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from redis import Redis

from experiments import broker
from experiments.worker import Worker


class Command(BaseCommand):
    help = "Take jobs from the queue and follow the runs they name, until told to end."
    requires_system_checks = []  # it serves no pages; `up` has checked

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("queues", nargs="*", default=["default"], metavar="QUEUE")

    def handle(self, *args: Any, **options: Any) -> None:
        Worker(options["queues"], connection=Redis.from_url(broker.url())).work(logging_level="WARNING")
