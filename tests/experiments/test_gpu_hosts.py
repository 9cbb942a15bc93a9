"""Runs on a machine that is reached over SSH: a real server, real processes, the whole way of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from django.core.cache import cache

from accounts.models import User
from experiments import jobs
from experiments.models import Experiment, Host, HostTask, Reason, Removal, State, Transfer
from tests.hosted import SLOWLY, a_run, all_arrived_once, comes_to, ended, process_of, submit, succeeded, there
from tests.live import Live, eventually, settled, states
from tests.sshd import Sshd
from trainer import agent

pytestmark = pytest.mark.django_db(transaction=True)


def ready(host: Host) -> Host:
    """Looked at, as a probe leaves it."""
    task = HostTask.objects.create(host=host, kind=HostTask.Kind.PROBE)
    eventually(lambda: not HostTask.objects.get(pk=task.pk).is_active, what="for the look at the host")
    task.refresh_from_db()
    assert task.state == HostTask.State.SUCCEEDED, task.steps
    host.refresh_from_db()
    assert host.is_ready
    return host


def test_three_models_train_there_and_come_back(site: Live, sshd: Sshd, owner: User) -> None:
    host = ready(sshd.host(owner, slots=2))
    experiment = submit(owner, host)
    eventually(lambda: settled(experiment), seconds=120)
    assert {state for state, _ in states(experiment).values()} == {State.SUCCEEDED}, states(experiment)
    for run in experiment.runs.all():
        all_arrived_once(sshd, run)
    brought = Transfer.objects.filter(run__experiment=experiment)
    eventually(lambda: brought.filter(state=Transfer.State.DONE).count() == 3, what="for the models")
    for run in experiment.runs.all():
        assert _contents(run.directory / "model") == _contents(there(sshd, run) / "model")
    jobs.delete(experiment)
    eventually(lambda: not Removal.objects.exists(), what="for the removal")
    assert not (sshd.root / "experiments" / str(experiment.pk)).exists()
    assert not experiment.directory.exists()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_twenty_runs_share_one_connection(site: Live, sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, slots=20, before=sshd.lines(FAKE_STEP_SECONDS="0.05"))
    runs = [a_run(owner, host, steps=100) for _ in range(20)]
    most_connections, most_at_once = 0, 0

    def over() -> bool:
        nonlocal most_connections, most_at_once
        most_connections = max(most_connections, len(sshd.connections()))
        active = [state for run in runs for state, _ in states(run.experiment).values()]
        most_at_once = max(most_at_once, active.count(State.RUNNING))
        return not {State.QUEUED, State.RUNNING} & set(active)

    eventually(over, seconds=180, what="for twenty runs")
    succeeded(sshd, *runs)
    assert most_at_once == 20
    assert most_connections == 1
    assert sshd.log().count("Accepted publickey") == 1


# Stopping and deleting ------------------------------------------------------------------------------------------------


def test_a_stop_leaves_a_checkpoint_from_which_it_goes_on(site: Live, sshd: Sshd, owner: User) -> None:
    run = a_run(owner, sshd.host(owner, before=sshd.lines(**SLOWLY)), steps=150)
    comes_to(run, 15)
    jobs.request_stop(run)
    assert (ended(run).state, run.reason) == (State.CANCELLED, Reason.STOPPED)
    assert (there(sshd, run) / "checkpoints" / f"step-{run.step:06d}").is_dir()
    assert run.step < 150
    all_arrived_once(sshd, run)
    jobs.resume(run)
    run.refresh_from_db()
    succeeded(sshd, run, starts=2)
    assert run.step == 150


def test_what_is_wanted_while_the_host_is_away_is_done_when_it_is_back(site: Live, sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, slots=3, before=sshd.lines(**SLOWLY))
    stopped, deleted = a_run(owner, host, steps=2000), a_run(owner, host, steps=2000)
    for run in (stopped, deleted):
        comes_to(run, 10)
    pid = process_of(sshd, deleted)["trainer"]["pid"]
    sshd.stop()
    eventually(lambda: Host.objects.get(pk=host.pk).unreachable_since, what="for the news that it is away")
    late = a_run(owner, host)  # it gets its place, and can not begin
    eventually(lambda: states(late.experiment)["small"][0] == State.RUNNING)
    jobs.request_stop(stopped)
    jobs.request_stop(late)
    folder, here = there(sshd, deleted).parent, deleted.experiment.directory
    jobs.delete(deleted.experiment)
    assert Removal.objects.count() == 1
    assert not here.exists()
    assert states(stopped.experiment)["small"][0] == State.RUNNING
    assert agent.started_at(pid)
    sshd.start()
    assert (ended(stopped).state, stopped.reason) == (State.CANCELLED, Reason.STOPPED)
    all_arrived_once(sshd, stopped)
    assert (ended(late).state, late.reason) == (State.CANCELLED, Reason.STOPPED)
    assert not there(sshd, late).exists(), "it never began"
    eventually(lambda: not Removal.objects.exists(), what="for the removal")
    assert agent.started_at(pid) is None
    assert not folder.exists()
    assert not here.exists(), "its last follower has put nothing back"


def test_an_experiment_that_trains_is_deleted(site: Live, sshd: Sshd, owner: User) -> None:
    run = a_run(owner, sshd.host(owner, before=sshd.lines(**SLOWLY)), steps=2000)
    comes_to(run, 10)
    process, folder, here = process_of(sshd, run), there(sshd, run).parent, run.experiment.directory
    jobs.delete(run.experiment)
    eventually(lambda: not Removal.objects.exists(), what="for the removal")
    eventually(lambda: not folder.exists())
    for who in ("trainer", "supervisor"):
        eventually(lambda who=who: not agent.is_alive(process[who]))
    eventually(lambda: not here.exists(), what="for the end of what was brought here")


def test_an_account_that_goes_leaves_nothing_there(site: Live, sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, slots=2, before=sshd.lines(**SLOWLY))
    run, done = a_run(owner, host, steps=2000), a_run(owner, host, steps=10)
    comes_to(run, 10)
    succeeded(sshd, done)
    process = process_of(sshd, run)
    owner.delete()
    assert not Experiment.objects.exists()
    assert Host.objects.get(pk=host.pk).private_key, "which it still takes to clear up there"
    eventually(lambda: not Removal.objects.exists(), what="for the removals")
    assert not agent.is_alive(process["trainer"])
    assert os.listdir(sshd.root / "experiments") == []
    cache.delete("retired-hosts-forgotten")  # it looks once a minute
    jobs.reconcile()
    assert not Host.objects.filter(pk=host.pk).exists()
