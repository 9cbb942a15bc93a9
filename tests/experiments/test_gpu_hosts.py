"""Runs on a machine that is reached over SSH: a real server, real processes, and what may befall them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accounts.models import User
from experiments import jobs
from experiments.models import Experiment, Host, HostTask, ModelRun, Removal, State, Transfer
from tests.live import Live, a_spec, eventually, settled, states, told_by_rows
from tests.sshd import Sshd

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def site(live: Live, sshd: Sshd) -> Live:
    """The site's processes: two workers, the reconciler, the collector."""
    for _ in range(2):
        live.worker()
    live.reconciler()
    live.start("collect")
    return live


def ready(host: Host) -> Host:
    """Looked at, as a probe leaves it."""
    task = HostTask.objects.create(host=host, kind=HostTask.Kind.PROBE)
    eventually(lambda: not HostTask.objects.get(pk=task.pk).is_active, what="for the look at the host")
    task.refresh_from_db()
    assert task.state == HostTask.State.SUCCEEDED, task.steps
    host.refresh_from_db()
    assert host.is_ready
    return host


def submit(owner: User, host: Host, steps: int = 40, **options: Any) -> Experiment:
    return jobs.create(owner, a_spec(steps), host=host, **options)


def told_by_host(sshd: Sshd, run: ModelRun) -> list[tuple[str, int, float]]:
    """Every point that the stream on the host speaks of, once."""
    found = {}
    path = sshd.root / "experiments" / str(run.experiment_id) / run.name / "events.jsonl"
    for line in path.read_bytes().splitlines():
        event = json.loads(line)
        if event["kind"] in ("train", "eval"):
            found[event.get("split", "train"), event["step"]] = event["cross_entropy"]
    return sorted((*key, value) for key, value in found.items())


def test_three_models_train_there_and_come_back(site: Live, sshd: Sshd, owner: User) -> None:
    host = ready(sshd.host(owner, slots=2))
    experiment = submit(owner, host)
    eventually(lambda: settled(experiment), seconds=120)
    assert {state for state, _ in states(experiment).values()} == {State.SUCCEEDED}, states(experiment)
    for run in experiment.runs.all():
        assert told_by_rows(run) == told_by_host(sshd, run)
        assert (run.directory / "events.jsonl").read_bytes() == (
            sshd.root / "experiments" / str(experiment.pk) / run.name / "events.jsonl"
        ).read_bytes()
    brought = Transfer.objects.filter(run__experiment=experiment)
    eventually(lambda: brought.filter(state=Transfer.State.DONE).count() == 3, what="for the models")
    for run in experiment.runs.all():
        there = sshd.root / "experiments" / str(experiment.pk) / run.name / "model"
        here = run.directory / "model"
        assert _contents(here) == _contents(there)
    jobs.delete(experiment)
    eventually(lambda: not Removal.objects.exists(), what="for the removal")
    assert not (sshd.root / "experiments" / str(experiment.pk)).exists()
    assert not experiment.directory.exists()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
