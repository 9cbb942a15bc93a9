"""Kill -9 in the middle of a run: nothing is lost, nothing comes twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from django.conf import settings
from django.utils import timezone

from experiments import broker, jobs
from experiments.models import Experiment, ModelRun, Reason, State
from tests.live import (
    Live,
    a_spec,
    children,
    environment,
    eventually,
    kill,
    settled,
    start_broker,
    states,
    told_by_file,
    told_by_rows,
)
from trainer import agent

pytestmark = pytest.mark.django_db(transaction=True)

embedded = pytest.mark.skipif(bool(os.environ.get("REDIS_URL")), reason="the server of REDIS_URL is not ours to kill")


def half_way(run: ModelRun) -> bool:
    run.refresh_from_db()
    return run.state == State.RUNNING and run.step > 20


def nothing_lost_nothing_twice(experiment: Experiment) -> None:
    assert {state for state, _ in states(experiment).values()} == {State.SUCCEEDED}, states(experiment)
    for run in experiment.runs.all():
        assert told_by_rows(run) == told_by_file(run)
        assert run.offset == (run.directory / "events.jsonl").stat().st_size
        assert run.notes.filter(kind="started").count() == 1, "the trainer was started once"
        steps = list(run.points.filter(split="train").values_list("step", flat=True))
        assert steps == list(range(1, run.step + 1))


@pytest.fixture
def experiment(live: Live) -> Experiment:
    return jobs.create(None, a_spec(steps=300))


def test_a_work_horse_is_killed(live: Live, experiment: Experiment) -> None:
    worker, run = live.worker(), experiment.runs.get(name="small")
    live.worker()
    for _ in range(2):
        eventually(lambda: half_way(run))
        horse = eventually(lambda: children(worker.pid))
        kill(horse[0])
        eventually(lambda horse=horse: children(worker.pid) not in ([], horse), what="for another to take its place")
    eventually(lambda: settled(experiment), seconds=120)
    nothing_lost_nothing_twice(experiment)
    assert worker.poll() is None


def test_a_worker_is_killed(live: Live, experiment: Experiment) -> None:
    worker, run = live.worker(), experiment.runs.get(name="small")
    eventually(lambda: half_way(run))
    horse = children(worker.pid)[0]
    worker.kill()
    worker.wait()
    eventually(lambda: agent.started_at(horse) is None, what="for its work-horse to die with it")
    live.worker()
    live.worker()
    eventually(lambda: settled(experiment), seconds=120)
    nothing_lost_nothing_twice(experiment)


def test_a_worker_that_is_told_to_end_lets_go_of_its_run_at_once(live: Live, experiment: Experiment) -> None:
    worker, run = live.worker(), experiment.runs.get(name="small")
    eventually(lambda: half_way(run))
    worker.terminate()
    assert worker.wait(30) == 0
    run.refresh_from_db()
    assert run.state == State.RUNNING
    assert agent.status(run.directory)["alive"]
    assert run.job_id in broker.queue().job_ids, "its job is back in the queue, for whoever comes next"
    live.worker()
    eventually(lambda: settled(experiment), seconds=120)
    nothing_lost_nothing_twice(experiment)


@embedded
def test_the_broker_is_killed(live: Live, experiment: Experiment, queue: Any) -> None:
    workers, run = [live.worker(), live.worker()], experiment.runs.get(name="small")
    live.reconciler()
    eventually(lambda: half_way(run))
    server = broker.connection().info("server")["process_id"]
    kill(server)
    eventually(lambda: not broker.answers())
    before = run.offset
    eventually(lambda: half_way(run) and run.offset > before, what="for events that came without a broker")
    again = start_broker()
    try:
        # In the site the supervisor would do this; a worker may have ended for want of a broker.
        def watched() -> bool:
            for n, worker in enumerate(workers):
                if worker.poll() is not None:
                    workers[n] = live.worker()
            return settled(experiment)

        eventually(watched, seconds=120)
    finally:
        again.kill()
        again.wait()
    nothing_lost_nothing_twice(experiment)


def test_the_queue_is_lost_whole(live: Live, experiment: Experiment) -> None:
    live.worker()
    live.worker()
    run = experiment.runs.get(name="small")
    eventually(lambda: half_way(run))
    broker.connection().flushdb()
    live.reconciler()
    eventually(lambda: settled(experiment), seconds=120)
    nothing_lost_nothing_twice(experiment)


def test_a_broker_that_was_down_on_submission_is_made_up_for(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(settings.RQ_QUEUES["default"], "URL", "unix:///nowhere/broker.sock")
        experiment = jobs.create(None, a_spec())
    assert broker.queue().job_ids == []
    live.worker()
    live.reconciler()
    eventually(lambda: settled(experiment))
    nothing_lost_nothing_twice(experiment)


def test_everything_is_killed_and_started_anew(live: Live, experiment: Experiment) -> None:
    run = experiment.runs.get(name="small")
    live.worker()
    live.worker()
    live.reconciler()
    eventually(lambda: half_way(run))
    for process in live.processes:
        process.kill()
        process.wait()
    broker.connection().flushdb()
    eventually(lambda: not agent.status(run.directory)["alive"], what="for training that nobody watches")
    live.worker()
    live.worker()
    live.reconciler()
    eventually(lambda: settled(experiment), seconds=120)
    nothing_lost_nothing_twice(experiment)


def test_a_run_without_a_follower_is_rung_for_and_one_with_a_follower_is_not(queue: Any) -> None:
    experiment = jobs.create(None, a_spec())
    followed, left = experiment.runs.get(name="small"), experiment.runs.get(name="large")
    queue.connection.flushdb()
    followed.move(State.RUNNING, Reason.TRAINING, last_seen=timezone.now())
    left.move(State.RUNNING, Reason.TRAINING, last_seen=timezone.now() - timezone.timedelta(seconds=2 * jobs.STALE))
    jobs.reconcile()
    jobs.reconcile()
    assert queue.job_ids == [left.job_id], "once, however often we look"


def test_a_job_that_the_queue_has_forgotten_half_is_rung_for(queue: Any) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    queue.connection.delete(queue.key)  # its job still says that it is queued
    jobs.reconcile()
    assert queue.job_ids == [run.job_id]


def test_children_of_a_run_that_ended_unseen_are_cancelled_by_the_reconciler(queue: Any) -> None:
    experiment = jobs.create(None, a_spec())
    ModelRun.objects.filter(name="small").update(state=State.FAILED, reason=Reason.LOST)
    jobs.reconcile()
    assert states(experiment)["scaled"] == (State.CANCELLED, Reason.PARENT_ENDED)


def test_a_plain_rq_worker_takes_jobs_too(live: Live, experiment: Experiment) -> None:
    command = [sys.executable, "-m", "rq.cli", "worker", "--url", broker.url(), "--burst", "default"]
    with open(live.folder / "plain.log", "wb") as log:
        worker = subprocess.Popen(command, cwd=settings.BASE_DIR, env=environment(), stdout=log, stderr=log)
    live.processes.append(worker)
    eventually(lambda: settled(experiment), seconds=120)
    nothing_lost_nothing_twice(experiment)


def test_a_worker_that_waits_holds_no_torch(live: Live, experiment: Experiment) -> None:
    worker, run = live.worker(), experiment.runs.get(name="small")
    eventually(lambda: half_way(run))
    for pid in (worker.pid, *children(worker.pid)):
        with open(f"/proc/{pid}/maps") as maps:
            assert "libtorch" not in maps.read()


def test_an_interrupt_on_the_workers_terminal_ends_no_training(live: Live) -> None:
    run = jobs.create(None, a_spec(steps=3000, models=("small",))).runs.get()
    worker = live.worker()
    eventually(lambda: half_way(run))
    os.killpg(worker.pid, signal.SIGINT)
    worker.wait(30)
    assert agent.status(run.directory)["alive"]
