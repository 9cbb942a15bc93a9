from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_delete


class ExperimentsConfig(AppConfig):
    name = "experiments"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # A signal, because an account that is deleted takes its experiments along without asking anybody here.
        post_delete.connect(_remove_directory, sender="experiments.Experiment")
        post_delete.connect(_remove_uploads, sender="experiments.Experiment")
        post_delete.connect(_remove_uploads, sender="accounts.User")


def _remove_directory(instance: Any, **_: Any) -> None:
    from experiments.jobs import remove_directory

    remove_directory(instance)


def _remove_uploads(instance: Any, **_: Any) -> None:
    from experiments.sources import remove_uploads

    remove_uploads(instance)
