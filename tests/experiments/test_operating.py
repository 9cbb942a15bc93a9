"""What docs/operating.md promises, and the commands that it names."""

from __future__ import annotations

import io
import json
import os
import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from django.conf import settings
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.utils import timezone

from accounts.models import User
from experiments import jobs
from experiments.management.commands.states import diagram
from experiments.models import TRANSITIONS, Host, Point, State
from tests.live import Live, a_spec, eventually, settled, states, told_by_file, told_by_rows
from trainer import agent

pytestmark = pytest.mark.django_db(transaction=True)


def test_the_diagram_in_the_docs_is_the_one_that_holds() -> None:
    assert f"```mermaid\n{diagram()}\n```" in (settings.BASE_DIR / "docs" / "operating.md").read_text()
    for state in State:
        assert all(f"{state} --> {to}" in diagram() for to in TRANSITIONS[state])


def test_an_administrator_is_made_by_the_command_that_the_docs_name(db: None) -> None:
    os.environ["DJANGO_SUPERUSER_PASSWORD"] = "correct horse"
    try:
        call_command("createsuperuser", email="Ada@Example.org", interactive=False, verbosity=0)
    finally:
        del os.environ["DJANGO_SUPERUSER_PASSWORD"]
    ada = User.objects.get(email="ada@example.org")
    assert ada.is_staff
    assert ada.is_superuser
    assert ada.check_password("correct horse")


def test_rows_are_rebuilt_from_the_run_directory(queue: Any, trainers: None) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    jobs.follow(run.pk, 1)
    Point.objects.all().delete()
    call_command("rebuild", str(run.pk), stdout=(out := io.StringIO()))
    assert "45 points, 7 other events" in out.getvalue()
    assert told_by_rows(run) == told_by_file(run)
    run.refresh_from_db()
    assert run.state == State.SUCCEEDED
    with pytest.raises(CommandError, match="there is no model run 4711"):
        call_command("rebuild", "4711")


def test_a_host_with_a_worker_of_its_own_has_its_own_queue_and_places(live: Live) -> None:
    machine = Host.objects.create(name="gpu1", kind=Host.Kind.WORKER, slots=1)
    here, there = jobs.create(None, a_spec(), host=None), jobs.create(None, a_spec(), host=machine)
    live.start("work", "host-gpu1")
    eventually(lambda: settled(there))
    assert {state for state, _ in states(there).values()} == {State.SUCCEEDED}
    assert {state for state, _ in states(here).values()} == {State.QUEUED}
    begun = there.runs.order_by("started_at")
    assert all(first.ended_at <= second.started_at for first, second in pairwise(begun))


def test_the_work_of_guests_who_are_long_gone_is_removed_by_the_reconciler(queue: Any, trainers: None) -> None:
    guest = User.objects.create_guest()
    experiment = jobs.create(guest, a_spec(models=("small",)))
    jobs.follow(experiment.runs.get().pk, 1)
    directory = experiment.directory
    User.objects.filter(pk=guest.pk).update(last_active=timezone.now() - timedelta(days=settings.GUEST_IDLE_DAYS + 1))
    cache.delete("guests-purged")
    jobs.reconcile()
    assert not User.objects.filter(pk=guest.pk).exists()
    assert not directory.exists()


def test_what_trains_on_another_machine_is_left_for_that_machine_to_remove(queue: Any, trainers: None) -> None:
    experiment = jobs.create(None, a_spec(models=("small",)))
    run = experiment.runs.get()
    jobs.follow(run.pk, 1)
    directory, of_run = experiment.directory, run.directory
    process = of_run / "process.json"
    (run.directory / "exit.json").unlink()
    process.write_text(json.dumps({**json.loads(process.read_text()), "hostname": "gpu1"}))
    os.utime(run.directory / "run.lock")
    assert agent.belongs_elsewhere(run.directory)
    jobs.delete(experiment)
    assert (directory / ".removed").exists()
    assert of_run.exists()
    os.utime(of_run / "run.lock", (time.time() - 1000,) * 2)  # nobody has touched it for long
    jobs.reconcile()
    assert not directory.exists()
