"""Real processes for tests: a broker, workers, run directories, each gone when the test is over.

A test of live processes wants rows that other processes can see: `pytest.mark.django_db(transaction=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.conf import settings
from django.db import connection

from experiments import broker, jobs
from experiments.models import Experiment, ModelRun, Point
from trainer import agent
from trainer.spec import ExperimentSpec, parse_spec

FAKE_TRAINER = Path(__file__).parent / "experiments" / "fake_trainer.py"
SHAPES: dict[str, dict[str, int]] = {
    "little": {"d_model": 64, "n_heads": 2, "d_head": 32, "d_mlp": 128, "n_layers": 1},
    "big": {"d_model": 128, "n_heads": 4, "d_head": 32, "d_mlp": 256, "n_layers": 2},
}


def a_spec(
    steps: int = 40, models: tuple[str, ...] = ("small", "scaled", "large"), name: str = "test"
) -> ExperimentSpec:
    """The standard three, of which only `models` are asked for."""
    known: dict[str, Any] = {
        "small": {"shape": SHAPES["little"]},
        "scaled": {"shape": SHAPES["big"], "init": {"kind": "grow", "parent": "small"}},
        "large": {"shape": SHAPES["big"]},
    }
    train = {"n_ctx": 32, "batch_size": 2, "max_steps": steps, "warmup_steps": 2, "eval_every": 10}
    return parse_spec({"name": name, "train": train, "models": {model: known[model] for model in models}})


def eventually(true: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Wait for a condition; its value. The deadline is generous, since it only ends a test that has failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {seconds:.0f} s in vain {what}")


def settled(experiment: Experiment) -> bool:
    return not experiment.runs.active().exists()


def states(experiment: Experiment) -> dict[str, tuple[str, str]]:
    return {run.name: (run.state, run.reason) for run in experiment.runs.all()}


def told_by_file(run: ModelRun) -> list[tuple[str, int, float]]:
    """Every point that events.jsonl speaks of, once."""
    found = {}
    for line in (run.directory / "events.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        if event["kind"] in ("train", "eval"):
            found[event.get("split", "train"), event["step"]] = event["cross_entropy"]
    return sorted((*key, value) for key, value in found.items())


def told_by_rows(run: ModelRun) -> list[tuple[str, int, float]]:
    return sorted(Point.objects.filter(run=run).values_list("split", "step", "cross_entropy"))


def environment(**more: str) -> dict[str, str]:
    """Of a process that works on the test's database, folder and broker."""
    given = connection.settings_dict
    if connection.vendor == "sqlite":
        database = f"sqlite:///{given['NAME']}"
    else:
        password = f":{quote(given['PASSWORD'])}" if given["PASSWORD"] else ""
        host = f"{quote(given['HOST'], safe='')}:{given['PORT']}" if given["PORT"] else quote(given["HOST"], safe="")
        database = f"postgres://{given['USER']}{password}@{host}/{given['NAME']}"
    return {
        **os.environ,
        "DATABASE_URL": database,
        "KANGAROO_VAR": str(settings.VAR),
        "REDIS_URL": broker.url(),
        "DJANGO_SETTINGS_MODULE": "kangaroo_site.settings",
        "KANGAROO_TRAINER": str(FAKE_TRAINER),
        "LOCAL_SLOTS": str(settings.LOCAL_SLOTS),
        **more,
    }


class Live:
    """Processes of one test, by name; a name is started anew with :meth:`start` after :meth:`kill`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{len(self.processes)}-{command[0]}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "manage.py", *command],
                cwd=settings.BASE_DIR,
                env=environment(**env),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def worker(self, **env: str) -> subprocess.Popen[bytes]:
        return self.start("work", **env)

    def reconciler(self, **env: str) -> subprocess.Popen[bytes]:
        return self.start("reconcile", "--every", "0.5", **env)

    def log(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def end_trainers() -> None:
    for process in settings.RUNS_DIR.glob("*/*/process.json"):
        agent.stop(process.parent, 0, wait=True)
    shutil.rmtree(settings.RUNS_DIR, ignore_errors=True)


def start_broker() -> subprocess.Popen[bytes]:
    server = subprocess.Popen(broker.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually(broker.answers, what="for the broker")
    return server


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The default queue on an empty broker: the server of REDIS_URL, or else the embedded one."""
    url = os.environ.get("REDIS_URL", "")
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    server = None
    if url:  # a database of that server for each of the processes that run tests
        separator = "&" if "?" in url else "?"
        monkeypatch.setitem(settings.RQ_QUEUES["default"], "URL", f"{url}{separator}db={int(number) + 1}")
    else:
        server = start_broker()
    broker.connection().flushdb()
    yield broker.queue()
    if server:
        server.kill()  # a test may have done so before
        server.wait()
    else:
        broker.connection().flushdb()


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run directories that nobody else uses, with the fake trainer in them."""
    monkeypatch.setenv("KANGAROO_TRAINER", str(FAKE_TRAINER))
    end_trainers()
    yield
    end_trainers()


@pytest.fixture
def live(tmp_path: Path, queue: Any, trainers: None, transactional_db: None) -> Iterator[Live]:
    processes = Live(tmp_path)
    yield processes
    processes.end()
    print(processes.log())  # shown where the test has failed


__all__ = ["jobs", "live", "queue", "trainers"]
