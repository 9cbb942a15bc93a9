import signal
from typing import Any

from django.core.management.base import BaseCommand

from experiments.collector import Collector


class Command(BaseCommand):
    help = "Hold the connections to GPU hosts, follow what trains there, and look at them, until told to end."
    requires_system_checks = []  # it serves no pages; `up` has checked

    def handle(self, *args: Any, **options: Any) -> None:
        collector = Collector()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, collector.leave)
        collector.run()
