import sys
from argparse import BooleanOptionalAction
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections
from django.db.migrations.executor import MigrationExecutor

from experiments import broker, first_experiment, supervisor
from experiments.models import Host
from experiments.supervisor import CannotStart, Service, Supervisor


class Command(BaseCommand):
    help = "Start the whole site: database, broker, workers, reconciler, web server. Ctrl-C ends it; training goes on."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0: all of this machine's)")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument("--workers", type=int, default=settings.LOCAL_SLOTS + 2)
        parser.add_argument(
            "--first-experiment",
            action=BooleanOptionalAction,
            default=True,
            help="run the public first experiment once, and show how it goes",
        )

    def handle(self, *args: Any, host: str, port: int, workers: int, **options: Any) -> None:
        try:
            with supervisor.take_lock():
                if left := supervisor.end_leftovers():
                    self.stdout.write(f"Ended {left} processes of an earlier start that was killed.")
                supervisor.check_port(host, port)
                self.prepare()
                services = supervisor.services((host, port), workers)
                Supervisor(services, sys.stdout).run(
                    ready=lambda: supervisor.answers(host, port),
                    on_ready=lambda site: self.welcome(site, host, port, options["first_experiment"]),
                )
        except (CannotStart, broker.NoBroker) as error:
            raise CommandError(str(error)) from None
        self.stdout.write("Ended. Training that was under way goes on; the next start shows it.")

    def prepare(self) -> None:
        executor = MigrationExecutor(connections["default"])
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            call_command("migrate", verbosity=0)
        if supervisor.static_files_changed():
            call_command("collectstatic", interactive=False, clear=True, verbosity=0)
            supervisor.static_files_changed(remember=True)
        Host.objects.filter(pk=Host.local().pk).update(slots=settings.LOCAL_SLOTS)
        for problem in checks.run_checks(tags=[checks.Tags.database], databases=["default"]):
            self.stdout.write(str(problem))  # such as credentials that cannot be opened; the rest goes on
        connections.close_all()  # the services have their own

    def welcome(self, site: Supervisor, host: str, port: int, first: bool) -> None:
        address = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}/"  # noqa: S104
        site.say(f"Kangaroo is ready: {address}   (Ctrl-C ends it)")
        if first and not first_experiment.was_submitted():
            command = [sys.executable, str(settings.BASE_DIR / "manage.py"), "first_experiment", "--address", address]
            site.add(Service("first experiment", command, once=True))
