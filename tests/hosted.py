"""A whole site whose runs train behind a real SSH server: what tests of that share.

    def test_it(site, sshd, owner):
        run = a_run(owner, sshd.host(owner), steps=600)
        eventually(lambda: settled(run.experiment))
        all_arrived_once(sshd, run)

The trainer is the fake one, unless a test says otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from accounts.models import User
from experiments import jobs
from experiments.models import Experiment, Host, ModelRun, State
from tests.live import Live, a_spec, eventually, told_by_rows
from tests.sshd import Sshd

#: So that a run is not over before something could befall it.
SLOWLY = {"FAKE_STEP_SECONDS": "0.03"}


@pytest.fixture
def site(live: Live, sshd: Sshd) -> Live:
    """The site's processes: a worker, the reconciler, the collector."""
    live.worker()
    live.reconciler()
    live.start("collect")
    return live


def submit(owner: User | None, host: Host, steps: int = 40, **options: Any) -> Experiment:
    models = options.pop("models", ("small", "scaled", "large"))
    return jobs.create(owner, a_spec(steps, models), host=host, **options)


def a_run(owner: User | None, host: Host, steps: int = 40, **options: Any) -> ModelRun:
    """Of an experiment of its own."""
    run: ModelRun = submit(owner, host, steps, models=("small",), **options).runs.get()
    return run


def there(sshd: Sshd, run: ModelRun) -> Path:
    """Its run directory on the host."""
    return sshd.root / "experiments" / str(run.experiment_id) / run.name


def process_of(sshd: Sshd, run: ModelRun) -> dict[str, Any]:
    """Who trains it on the host: `trainer` and `supervisor`, each with its `pid`."""

    def told() -> Any:
        path = there(sshd, run) / "process.json"
        process = json.loads(path.read_text()) if path.exists() else {}
        return process if process.get("trainer") and process["attempt"] == run.attempt else None

    found: dict[str, Any] = eventually(told, what="for a trainer on the host")
    return found


def environment_of(sshd: Sshd, run: ModelRun) -> dict[str, str]:
    """The environment of its trainer, as the kernel knows it."""
    pid = process_of(sshd, run)["trainer"]["pid"]
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def comes_to(run: ModelRun, step: int, seconds: float = 60) -> None:
    """Wait until a running run has taken so many steps, as far as the site knows."""

    def reached() -> bool:
        run.refresh_from_db()
        assert run.is_active, (run.state, run.reason, run.detail)
        return run.step >= step

    eventually(reached, seconds, f"for step {step}")


def ended(run: ModelRun, seconds: float = 120) -> ModelRun:
    """The run, as it has ended."""

    def settled() -> bool:
        run.refresh_from_db()
        return not run.is_active

    eventually(settled, seconds, f"for the end of {run.name}")
    return run


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def all_arrived_once(sshd: Sshd, run: ModelRun, starts: int = 1) -> None:
    """Every event on the host is here, once: as rows, and as the copy of the stream. The trainer was started once."""
    run.refresh_from_db()
    stream = there(sshd, run) / "events.jsonl"
    assert (run.directory / "events.jsonl").read_bytes() == stream.read_bytes()
    assert run.offset == stream.stat().st_size
    told = events(stream)
    assert [event["seq"] for event in told] == list(range(len(told)))
    points = {
        (event.get("split", "train"), event["step"]): event["cross_entropy"]
        for event in told
        if event["kind"] in ("train", "eval")
    }
    assert told_by_rows(run) == sorted((*key, value) for key, value in points.items())
    noted = [
        event["seq"]
        for event in told
        if event["kind"] not in ("train", "eval", "preparing")
        or any(row["layer"] is None for row in event.get("symmetry") or ())  # whether copies have parted
    ]
    assert list(run.notes.order_by("seq").values_list("seq", flat=True)) == noted
    assert sum(event["kind"] == "started" for event in told) == starts


def succeeded(sshd: Sshd, *runs: ModelRun, starts: int = 1) -> None:
    """Wait for the end of `runs`, which is a good one, with nothing lost and nothing twice."""
    for run in runs:
        ended(run)
        assert run.state == State.SUCCEEDED, (run.name, run.reason, run.detail)
        all_arrived_once(sshd, run, starts)


def page_of(run: ModelRun) -> str:
    """The experiment's page, as its owner reads it."""
    reader = Client()
    if run.experiment.owner is not None:
        reader.force_login(run.experiment.owner)
    answer = reader.get(run.experiment.get_absolute_url())
    assert answer.status_code == 200
    return " ".join(answer.content.decode().split())
