from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_delete, pre_delete
from django.utils import timezone


class ExperimentsConfig(AppConfig):
    name = "experiments"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from accounts import ring
        from experiments import checks, credentials  # noqa: F401  # the checks register themselves

        ring.waiting.append(credentials.are_stored)
        # Signals, because an account that is deleted takes its experiments along without asking anybody here.
        pre_delete.connect(_lock_runs, sender="experiments.Experiment")
        pre_delete.connect(_retire_hosts, sender="accounts.User")
        post_delete.connect(_remove_directory, sender="experiments.Experiment")
        post_delete.connect(_remove_growth, sender="experiments.Growth")
        post_delete.connect(_remove_uploads, sender="experiments.Experiment")
        post_delete.connect(_remove_uploads, sender="accounts.User")


def _lock_runs(instance: Any, **_: Any) -> None:
    """A follower may be adding points; it takes the run's row first, and so do we, in the transaction that deletes."""
    list(instance.runs.select_for_update().values_list("pk"))
    hosts = {run.host for run in instance.runs.select_related("host")}
    instance.hosts_used = {*hosts, instance.host}  # afterwards nothing tells


def _remove_directory(instance: Any, **_: Any) -> None:
    from experiments.jobs import remove_directories

    remove_directories(instance, instance.hosts_used)


def _remove_growth(instance: Any, **_: Any) -> None:
    from experiments.growths import remove_directory

    remove_directory(instance)


def _retire_hosts(instance: Any, **_: Any) -> None:
    """Machines of an account that goes: nothing new begins there; the collector clears up there, then forgets them."""
    instance.hosts.filter(retired_at=None).update(retired_at=timezone.now(), offered=False)


def _remove_uploads(instance: Any, **_: Any) -> None:
    from experiments.sources import remove_uploads

    remove_uploads(instance)
