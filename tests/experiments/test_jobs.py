"""The way of an experiment through real workers, a real queue and real (fake) trainers."""

from __future__ import annotations

from typing import Any

import pytest
from rq.job import Job, JobStatus

from experiments import jobs
from experiments.models import ModelRun, Reason, State
from tests.live import Live, a_spec, eventually, settled, states, told_by_file, told_by_rows

pytestmark = pytest.mark.django_db(transaction=True)


def test_an_experiment_runs_to_its_end(live: Live) -> None:
    experiment = jobs.create(None, a_spec())
    live.worker()
    live.worker()
    eventually(lambda: settled(experiment))
    assert states(experiment) == dict.fromkeys(("small", "scaled", "large"), (State.SUCCEEDED, Reason.FINISHED))
    for run in experiment.runs.all():
        assert told_by_rows(run) == told_by_file(run)
        assert run.offset == (run.directory / "events.jsonl").stat().st_size
        assert (run.step, run.total_steps) == (40, 40)
        assert run.disk_bytes > 0
        assert run.started_at < run.ended_at


def test_the_job_of_a_child_depends_on_that_of_its_parent(queue: Any) -> None:
    experiment = jobs.create(None, a_spec())
    small, scaled, large = experiment.runs.all()
    assert Job.fetch(small.job_id, queue.connection).get_status() == JobStatus.QUEUED
    assert Job.fetch(large.job_id, queue.connection).get_status() == JobStatus.QUEUED
    waiting = Job.fetch(scaled.job_id, queue.connection)
    assert waiting.get_status() == JobStatus.DEFERRED
    assert [as_text for as_text in waiting._dependency_ids] == [small.job_id]
    assert list(ModelRun.objects.values_list("reason", flat=True)) == [
        Reason.WAITING_FOR_SLOT,
        Reason.WAITING_FOR_PARENT,
        Reason.WAITING_FOR_SLOT,
    ]
