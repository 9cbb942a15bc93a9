"""The way of an experiment through real workers, a real queue and real processes that train (nothing, quickly)."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from rq.job import Job, JobStatus

from accounts.models import User
from experiments import broker, jobs, line
from experiments.models import TRANSITIONS, Experiment, Host, ModelRun, Reason, State
from experiments.transport import for_host
from tests.live import Live, a_spec, eventually, kill, settled, states, told_by_file, told_by_rows
from trainer import agent

pytestmark = pytest.mark.django_db(transaction=True)


def trains(run: ModelRun) -> bool:
    run.refresh_from_db()
    return run.state == State.RUNNING and run.step > 0


# From beginning to end ------------------------------------------------------------------------------------------------


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
    small, scaled, _ = experiment.runs.all()
    assert small.ended_at <= scaled.started_at
    eventually(lambda: not broker.connection().keys("rq:job:*"), what="for the queue to hold nothing any more")


def test_the_job_of_a_child_depends_on_that_of_its_parent(queue: Any) -> None:
    experiment = jobs.create(None, a_spec())
    small, scaled, large = experiment.runs.all()
    assert Job.fetch(small.job_id, queue.connection).get_status() == JobStatus.QUEUED
    assert Job.fetch(large.job_id, queue.connection).get_status() == JobStatus.QUEUED
    waiting = Job.fetch(scaled.job_id, queue.connection)
    assert waiting.get_status() == JobStatus.DEFERRED
    assert list(waiting._dependency_ids) == [small.job_id]
    assert waiting.args == (scaled.pk, 1), "ids, never content"
    assert [run.reason for run in (small, scaled, large)] == [
        Reason.WAITING_FOR_SLOT,
        Reason.WAITING_FOR_PARENT,
        Reason.WAITING_FOR_SLOT,
    ]


def test_the_trainer_gets_its_share_of_the_cores_and_no_secrets(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "CORES", 8)
    monkeypatch.setenv("SECRET_KEY", "x" * 50)
    monkeypatch.setenv("EMAIL_URL", "smtp://user:password@mail.example")
    monkeypatch.setenv("DATABASE_URL", "postgres://user:password@db.example/x")
    monkeypatch.setenv("REDIS_URL", "redis://:password@redis.example")
    monkeypatch.setenv("HF_HOME", "/models")
    more = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "GITHUB_TOKEN", "SENTRY_DSN", "OPENAI_API_KEY", "PGPASSWORD")
    for name in (*more, "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "x")
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    Host.objects.update(slots=4)
    jobs.follow(run.pk, run.attempt)  # in this very process
    run.refresh_from_db()
    assert run.state == State.SUCCEEDED
    seen = json.loads(run.notes.get(kind="started").data["versions"]["environment"])
    assert {"HF_HOME", "KANGAROO_ATTEMPT", "KANGAROO_DATA_CACHE", "OMP_WAIT_POLICY", "PATH"} <= set(seen)
    assert not {"SECRET_KEY", "DATABASE_URL", "REDIS_URL", "EMAIL_URL", "DJANGO_SETTINGS_MODULE"} & set(seen)
    assert not set(more) & set(seen)
    assert {"TOKENIZERS_PARALLELISM", "KANGAROO_MAX_TEXT_GB", "HF_HUB_DISABLE_IMPLICIT_TOKEN"} <= set(seen)
    assert run.prepared["threads"] == 2


def test_the_operator_may_share_the_hubs_token_with_the_trainers(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SHARE_HF_TOKEN", True)
    monkeypatch.setenv("HF_TOKEN", "x")
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    jobs.follow(run.pk, run.attempt)
    seen = json.loads(run.notes.get(kind="started").data["versions"]["environment"])
    assert "HF_TOKEN" in seen
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" not in seen


# The ways a run can fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        ("exit", Reason.ERROR, "ValueError: the fake trainer was told to fail"),
        ("memory", Reason.OUT_OF_MEMORY, "MemoryError"),
        ("disk_full", Reason.DISK_FULL, "No space left on device"),
        ("diverged", Reason.DIVERGED, "the loss was not a number at step 20"),
    ],
)
def test_a_run_that_fails_says_why(
    live: Live, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str, told: str
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    jobs.follow(run.pk, run.attempt)
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.FAILED, reason)
    assert told in run.detail
    assert run.ended_at is not None


def test_a_killed_trainer_is_noticed_and_can_be_resumed(live: Live) -> None:
    experiment = jobs.create(None, a_spec(steps=400, models=("small",)))
    run = experiment.runs.get()
    live.worker()
    eventually(lambda: (run.directory / "checkpoints").exists())
    kill(agent.status(run.directory)["pid"])
    eventually(lambda: settled(experiment))
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.FAILED, Reason.KILLED)
    assert "signal 9" in run.detail
    assert [resumed.pk for resumed in jobs.resume(experiment)] == [run.pk]
    eventually(lambda: settled(experiment))
    run.refresh_from_db()
    assert (run.state, run.attempt, run.step) == (State.SUCCEEDED, 2, 400)
    assert run.prepared["resumed_from"] > 0
    assert told_by_rows(run) == told_by_file(run)
    assert list(run.points.filter(split="train").values_list("step", flat=True)) == list(range(1, 401))


def test_a_trainer_and_its_supervisor_killed_together_are_noticed(live: Live) -> None:
    experiment = jobs.create(None, a_spec(steps=4000, models=("small",)))
    run = experiment.runs.get()
    live.worker()
    eventually(lambda: trains(run))
    record = json.loads((run.directory / "process.json").read_text())
    kill(record["supervisor"]["pid"])
    kill(record["trainer"]["pid"])
    eventually(lambda: settled(experiment))
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.FAILED, Reason.KILLED)
    assert "left no word" in run.detail


def test_a_run_whose_supervisor_was_killed_still_succeeds(live: Live) -> None:
    experiment = jobs.create(None, a_spec(steps=300, models=("small",)))
    run = experiment.runs.get()
    live.worker()
    eventually(lambda: trains(run))
    kill(json.loads((run.directory / "process.json").read_text())["supervisor"]["pid"])
    eventually(lambda: settled(experiment))
    assert states(experiment) == {"small": (State.SUCCEEDED, Reason.FINISHED)}
    assert told_by_rows(run) == told_by_file(run)


def test_a_host_that_cannot_write_says_so(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    settings.RUNS_DIR.mkdir(parents=True)
    (settings.RUNS_DIR / str(run.experiment_id)).write_text("a file where a folder should be")
    jobs.follow(run.pk, run.attempt)
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.FAILED, Reason.ERROR)
    assert "could not be started" in run.detail
    (settings.RUNS_DIR / str(run.experiment_id)).unlink()


def test_the_children_of_a_failed_run_are_cancelled_and_resumed_with_it(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = jobs.create(None, a_spec())
    first = live.worker(FAKE_FAULT="exit", FAKE_FAULT_MODEL="small")
    eventually(lambda: settled(experiment))
    assert states(experiment) == {
        "small": (State.FAILED, Reason.ERROR),
        "scaled": (State.CANCELLED, Reason.PARENT_ENDED),
        "large": (State.SUCCEEDED, Reason.FINISHED),
    }
    assert experiment.runs.get(name="scaled").detail.startswith("small: ")
    first.kill()
    live.worker()
    small = experiment.runs.get(name="small")
    assert {run.name for run in jobs.resume(small)} == {"small", "scaled"}
    eventually(lambda: settled(experiment))
    assert {state for state, _ in states(experiment).values()} == {State.SUCCEEDED}
    assert experiment.runs.get(name="large").attempt == 1, "what had succeeded was left alone"


# Stop, resume, delete -------------------------------------------------------------------------------------------------


def test_a_queued_run_is_stopped_at_once(queue: Any) -> None:
    experiment = jobs.create(None, a_spec())
    jobs.request_stop(experiment)
    assert states(experiment) == dict.fromkeys(("small", "scaled", "large"), (State.CANCELLED, Reason.STOPPED))
    assert queue.connection.keys("rq:job:*") == []


def test_stopping_a_parent_that_waits_cancels_its_children(queue: Any) -> None:
    experiment = jobs.create(None, a_spec())
    jobs.request_stop(experiment.runs.get(name="small"))
    assert states(experiment) == {
        "small": (State.CANCELLED, Reason.STOPPED),
        "scaled": (State.CANCELLED, Reason.PARENT_ENDED),
        "large": (State.QUEUED, Reason.WAITING_FOR_SLOT),
    }


def test_a_running_run_writes_a_checkpoint_before_it_stops_and_is_resumed_from_it(live: Live) -> None:
    experiment = jobs.create(None, a_spec(steps=600, models=("small",)))
    run = experiment.runs.get()
    live.worker()
    eventually(lambda: trains(run))
    jobs.request_stop(experiment)
    eventually(lambda: settled(experiment))
    run.refresh_from_db()
    assert (run.state, run.reason, run.detail) == (State.CANCELLED, Reason.STOPPED, "")
    stopped = run.notes.get(kind="stopped")
    assert (run.directory / stopped.data["checkpoint"]).is_dir()
    jobs.resume(experiment)
    eventually(lambda: settled(experiment))
    run.refresh_from_db()
    assert (run.state, run.attempt, run.step) == (State.SUCCEEDED, 2, 600)
    assert run.prepared["resumed_from"] == stopped.data["step"]
    assert told_by_rows(run) == told_by_file(run)


def test_a_stop_and_a_resume_in_quick_succession_end_well(live: Live) -> None:
    """The trainer of the first attempt may still be on its way out when the second is wanted."""
    experiment = jobs.create(None, a_spec(steps=300, models=("small",)))
    run = experiment.runs.get()
    live.worker()
    eventually(lambda: trains(run))
    ModelRun.objects.filter(pk=run.pk).update(state=State.CANCELLED, reason=Reason.STOPPED)
    jobs.resume(experiment)
    eventually(lambda: settled(experiment))
    run.refresh_from_db()
    assert (run.state, run.attempt) == (State.SUCCEEDED, 2)
    assert told_by_rows(run) == told_by_file(run)


def test_what_has_succeeded_is_not_resumed(queue: Any, trainers: None) -> None:
    experiment = jobs.create(None, a_spec(models=("small",)))
    run = experiment.runs.get()
    jobs.follow(run.pk, 1)
    assert jobs.resume(experiment) == []
    run.refresh_from_db()
    assert (run.state, run.attempt) == (State.SUCCEEDED, 1)


def test_deleting_an_experiment_ends_its_training_and_frees_its_disk(live: Live) -> None:
    experiment = jobs.create(None, a_spec(steps=4000))
    small = experiment.runs.get(name="small")
    worker = live.worker()
    eventually(lambda: trains(small))
    pid, directory = agent.status(small.directory)["pid"], experiment.directory
    jobs.delete(experiment)
    assert not Experiment.objects.exists()
    assert not ModelRun.objects.exists()
    assert agent.started_at(pid) is None
    assert not directory.exists()
    eventually(lambda: broker.queue().started_job_registry.count == 0, what="for the follower to let go")
    assert worker.poll() is None
    assert not directory.exists(), "no follower has brought it back"


def test_deleting_works_with_every_worker_and_the_broker_dead(live: Live) -> None:
    experiment = jobs.create(None, a_spec(steps=4000, models=("small",)))
    run = experiment.runs.get()
    worker = live.worker()
    eventually(lambda: trains(run))
    worker.kill()
    worker.wait()
    pid, directory = agent.status(run.directory)["pid"], experiment.directory
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.RQ_QUEUES["default"], "URL", "unix:///nowhere/broker.sock")
        jobs.delete(experiment)
    assert agent.started_at(pid) is None
    assert not directory.exists()


def test_deleting_an_account_ends_its_training(live: Live) -> None:
    owner = User.objects.create_user("ada@example.org", "correct horse")
    experiment = jobs.create(owner, a_spec(steps=4000, models=("small",)))
    run = experiment.runs.get()
    live.worker()
    eventually(lambda: trains(run))
    pid, directory = agent.status(run.directory)["pid"], experiment.directory
    owner.delete()
    assert agent.started_at(pid) is None
    assert not directory.exists()


def test_a_removal_that_was_cut_short_is_finished_later(queue: Any, trainers: None) -> None:
    experiment = jobs.create(None, a_spec(models=("small",)))
    jobs.follow(experiment.runs.get().pk, 1)
    other = jobs.create(None, a_spec(models=("small",)))
    jobs.follow(other.runs.get().pk, 1)
    (experiment.directory / ".removed").touch()
    jobs.reconcile()
    assert not experiment.directory.exists()
    assert other.directory.exists()


def test_a_follower_that_comes_too_late_starts_nothing(queue: Any, trainers: None) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    assert jobs.follow(run.pk + 1, 1), "there is no such run"
    assert jobs.follow(run.pk, 2), "nor such an attempt"
    jobs.request_stop(run)
    assert jobs.follow(run.pk, 1)
    assert not settings.RUNS_DIR.exists()


def test_files_of_a_run_are_read_and_nothing_else(queue: Any, trainers: None) -> None:
    experiment = jobs.create(None, a_spec(models=("small",)))
    run = experiment.runs.get()
    jobs.follow(run.pk, 1)
    transport = for_host(experiment.host)
    with transport.open_file(run, "model/model.safetensors") as file:
        assert file.read() == b"weights"
    (run.directory / "leads-out").symlink_to("/etc/passwd")
    for name in ("../../../secret-key", "/etc/passwd", "leads-out", "model", "none.txt"):
        with pytest.raises(FileNotFoundError):
            transport.open_file(run, name)


# Places and limits ----------------------------------------------------------------------------------------------------


def test_no_more_runs_train_at_once_than_the_host_has_places(live: Live) -> None:
    Host.local()
    Host.objects.update(slots=2)
    experiments = [jobs.create(None, a_spec(steps=60, models=("small", "large"))) for _ in range(3)]
    for _ in range(4):
        live.worker()
    most, lines = 0, set()

    def all_settled() -> bool:
        nonlocal most
        most = max(most, ModelRun.objects.filter(state=State.RUNNING).count())
        lines.add(line.place_in_line(ModelRun.objects.select_related("parent__host", "host").last()))
        return all(settled(experiment) for experiment in experiments)

    eventually(all_settled)
    assert most == 2
    assert {state for e in experiments for state, _ in states(e).values()} == {State.SUCCEEDED}
    assert lines >= {None}
    assert max(line or 0 for line in lines) >= 2
    begun = list(ModelRun.objects.order_by("started_at").values_list("pk", flat=True))
    for place, pk in enumerate(sorted(begun)):
        assert abs(begun.index(pk) - place) < 2, "first come, first served; two places may be taken in either order"


def test_a_place_is_not_given_twice(live: Live) -> None:
    host = Host.local()
    Host.objects.update(slots=2)
    runs = [jobs.create(None, a_spec(models=("small",))).runs.get() for _ in range(6)]
    won: list[bool] = []

    def claim(pk: int) -> None:
        run = ModelRun.objects.select_related("host", "parent__host").get(pk=pk)
        won.append(line.claim(run))
        connection.close()

    for _ in range(3):
        threads = [threading.Thread(target=claim, args=(run.pk,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ModelRun.objects.filter(state=State.RUNNING, host=host).count() == 2
    assert sum(won) == 2


def test_the_place_in_line_counts_those_that_wait_for_one(queue: Any) -> None:
    first, second = jobs.create(None, a_spec()), jobs.create(None, a_spec())
    places = [line.place_in_line(run) for e in (first, second) for run in e.runs.order_by("position")]
    assert places == [1, None, 2, 3, None, 4]


def test_a_user_cannot_have_more_runs_than_allowed(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MAX_ACTIVE_RUNS_PER_USER", 4)
    owner = User.objects.create_user("ada@example.org", "correct horse")
    other = User.objects.create_user("bob@example.org", "correct horse")
    mine = jobs.create(owner, a_spec())
    with pytest.raises(jobs.LimitReached, match=r"6 models .* 4 are allowed"):
        jobs.create(owner, a_spec())
    assert owner.experiments.count() == 1
    jobs.create(other, a_spec())
    jobs.request_stop(mine)
    jobs.create(owner, a_spec())
    with pytest.raises(jobs.LimitReached):
        jobs.resume(mine)


def test_a_user_cannot_take_more_disk_than_allowed(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MAX_DISK_GB_PER_USER", 2)
    owner = User.objects.create_user("ada@example.org", "correct horse")
    experiment = jobs.create(owner, a_spec())
    experiment.runs.filter(name="small").update(disk_bytes=2_500_000_000)
    with pytest.raises(jobs.LimitReached, match=r"take 2\.5 GB of disk; 2 GB are allowed"):
        jobs.create(owner, a_spec())
    jobs.delete(experiment)
    jobs.create(owner, a_spec())


def test_nothing_new_is_begun_on_a_disk_that_is_nearly_full(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = User.objects.create_user("ada@example.org", "correct horse")
    mine = jobs.create(owner, a_spec())
    jobs.request_stop(mine)
    monkeypatch.setattr(settings, "MIN_FREE_DISK_GB", 1e9)
    for begin in (lambda: jobs.create(owner, a_spec()), lambda: jobs.resume(mine)):
        with pytest.raises(jobs.LimitReached, match=r"GB left; below 1e\+09 GB nothing new is begun"):
            begin()


# States ---------------------------------------------------------------------------------------------------------------


def test_a_change_of_state_is_made_once(queue: Any) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    other = ModelRun.objects.get()
    assert run.move(State.RUNNING, Reason.STARTING)
    assert not other.move(State.CANCELLED, Reason.STOPPED)
    assert ModelRun.objects.get().state == State.RUNNING


def test_a_change_that_is_not_foreseen_is_refused(queue: Any) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    for state, following in TRANSITIONS.items():
        for to in set(State) - set(following):
            run.state = state
            with pytest.raises(ValueError, match="cannot become"):
                run.move(to, Reason.ERROR)
