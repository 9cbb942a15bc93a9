"""`manage.py up`, as a person runs it on a fresh machine: one process, from which everything comes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from experiments import first_experiment
from tests.live import FAKE_TRAINER, children, eventually, kill
from trainer import agent

pytestmark = pytest.mark.xdist_group("up")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """An installation in a folder of its own, on the embedded broker and SQLite."""

    def __init__(self, folder: Path) -> None:
        self.var = folder / "var"
        self.log = folder / "up.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.env = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
        self.env |= {
            "DJANGO_SETTINGS_MODULE": "kangaroo_site.settings",
            "KANGAROO_VAR": str(self.var),
            "KANGAROO_TRAINER": str(FAKE_TRAINER),
            "LOCAL_SLOTS": "2",
        }

    def up(self, *options: str, **env: str) -> None:
        command = [sys.executable, "manage.py", "up", "--port", str(self.port), *options]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=settings.BASE_DIR, env={**self.env, **env}, stdout=log, stderr=log
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(60)

    def says(self, text: str) -> bool:
        assert self.process is not None
        assert self.process.poll() is None or text in self.output(), self.output()
        return text in self.output()

    def output(self) -> str:
        return self.log.read_text()

    def ready(self) -> None:
        eventually(lambda: self.says("Kangaroo is ready"), what="for the site")

    def get(self, path: str = "/docs/") -> int:
        web = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            web.request("GET", path, headers={"Host": "localhost"})
            return web.getresponse().status
        except OSError:
            return 0
        finally:
            web.close()

    def rows(self, query: str) -> list[Any]:
        with sqlite3.connect(f"file:{self.var / 'kangaroo.sqlite3'}?mode=ro", uri=True) as database:
            rows = database.execute(query).fetchall()
        database.close()
        return rows

    def states(self) -> dict[str, str]:
        return dict(self.rows("select name, state from experiments_modelrun"))

    def trainers(self) -> list[Path]:
        return [path.parent for path in self.var.glob("experiments/*/*/process.json")]

    def services(self) -> dict[str, int]:
        """Pids of what the supervisor has started, by a word of their command line."""
        assert self.process is not None
        words = {"gunicorn": "web", "reconcile": "reconciler", "work": "worker", "valkey-server": "broker"}
        found = {}
        for pid in children(self.process.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").split()
            except OSError:
                continue
            for word, name in words.items():
                if any(part == word or part.endswith(f"/{word}") for part in command):
                    found[name] = pid
        return found

    def leftovers(self) -> list[str]:
        """Command lines of processes that work in this installation, trainers and their supervisors aside."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"KANGAROO_VAR={self.var}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        if command and "trainer" not in command:
                            found.append(command)
                except OSError:
                    continue
        return found

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        for directory in self.trainers():
            agent.stop(directory, 0, wait=True)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.end()
    if made.log.exists():
        print(made.output())


def test_the_first_start_runs_an_experiment_and_the_second_does_not(site: Site) -> None:
    site.up(FAKE_STEP_SECONDS="0.001")
    eventually(lambda: site.says("Curves, verdict and checkpoints: "), what="for the table")
    output = site.output()
    address = f"http://localhost:{site.port}/"
    assert f"Kangaroo is ready: {address}" in output
    assert f"{address}experiments/{first_experiment.ID}/" in output
    assert "parameters" in output
    assert "perplexity" in output
    for name in ("small", "scaled", "large"):
        assert f"\n{name} " in output, "a row of the table"
    assert set(site.states().values()) == {"succeeded"}
    assert site.get() == 200
    site.process.send_signal(signal.SIGINT)
    assert site.wait() == 0
    assert site.leftovers() == []

    site.up()
    site.ready()
    eventually(lambda: site.get() == 200)
    assert "First experiment" not in site.output()
    assert site.rows("select count(*) from experiments_experiment") == [(1,)]


def test_ending_the_site_ends_no_training_and_the_next_start_takes_it_up(site: Site) -> None:
    site.up(FAKE_STEP_SECONDS="0.05")
    eventually(lambda: "running" in site.states().values() if site.says("First experiment") else False)
    eventually(lambda: len(site.trainers()) == 2)
    site.process.terminate()
    assert site.wait() == 0
    assert site.leftovers() == []
    assert all(agent.status(directory)["alive"] for directory in site.trainers())
    assert sorted(site.states().values()) == ["queued", "running", "running"], "nothing was lost"
    site.up(FAKE_STEP_SECONDS="0.001")
    eventually(lambda: set(site.states().values()) == {"succeeded"}, seconds=120)
    assert site.rows("select count(*) from experiments_note where kind = 'started'") == [(3,)], "each started once"


def test_a_killed_supervisor_leaves_nothing_behind_but_training(site: Site) -> None:
    site.up(FAKE_STEP_SECONDS="0.05")
    eventually(lambda: len(site.trainers()) == 2, what="for training")
    kill(site.process.pid)
    site.wait()
    eventually(lambda: site.leftovers() == [], what="for its services to end with it")
    assert all(agent.status(directory)["alive"] for directory in site.trainers())
    site.up(FAKE_STEP_SECONDS="0.001")
    site.ready()
    eventually(lambda: set(site.states().values()) == {"succeeded"}, seconds=120)
    for name, offset in site.rows("select name, offset from experiments_modelrun"):
        (stream,) = site.var.glob(f"experiments/*/{name}/events.jsonl")
        assert offset == stream.stat().st_size


def test_whatever_is_killed_comes_back(site: Site) -> None:
    site.up(FAKE_STEP_SECONDS="0.05")
    eventually(lambda: len(site.trainers()) == 2, what="for training")
    before = eventually(lambda: services if len(services := site.services()) == 4 else None)
    for pid in before.values():
        kill(pid)

    def all_back() -> bool:
        now = site.services()
        return len(now) == 4 and not set(now.values()) & set(before.values()) and site.get() == 200

    eventually(all_back, what="for the four to be started again")
    assert site.says("web ended with signal 9")
    eventually(lambda: set(site.states().values()) == {"succeeded"}, seconds=180)
    assert site.rows("select count(*) from experiments_note where kind = 'started'") == [(3,)], "each started once"


def test_a_port_in_use_is_named_with_a_way_out(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", site.port))
        taken.listen()
        site.up()
        assert site.wait() == 1
    assert f"cannot listen on 127.0.0.1 port {site.port}: Address already in use" in site.output()
    assert f"--port {site.port + 1}" in site.output()
    assert "Traceback" not in site.output()


def test_a_second_supervisor_in_the_same_folder_is_refused(site: Site, tmp_path: Path) -> None:
    site.up("--no-first-experiment")
    site.ready()
    (tmp_path / "second").mkdir()
    second = Site(tmp_path / "second")
    second.env["KANGAROO_VAR"] = str(site.var)
    second.up()
    assert second.wait() == 1
    assert f"already runs in {site.var} (process {site.process.pid})" in second.output()
    assert "First experiment" not in site.output()


def test_a_folder_that_cannot_be_written_is_named_with_a_way_out(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    site.up(KANGAROO_VAR=str(tmp_path / "file" / "var"))
    assert site.wait() != 0
    assert "KANGAROO_VAR" in site.output()
    assert "cannot be written" in site.output()
    assert "Traceback" not in site.output()


def test_the_table_says_what_went_wrong(db: None) -> None:
    from experiments.models import ModelRun, Reason, State

    good = ModelRun(name="small", state=State.SUCCEEDED, parameters=1234567, tokens=1000, flops=2e9)
    good.test_cross_entropy = 1.0
    bad = ModelRun(name="large", state=State.FAILED, reason=Reason.OUT_OF_MEMORY, detail="There was too little.")
    table = first_experiment.table([good, bad]).splitlines()
    assert table[2].split() == ["small", "1,234,567", "1,000", "2.00e+09", "-", "1.000", "2.72"]
    assert table[-1] == "large: out of memory. There was too little."


@pytest.mark.django_db
def test_the_first_experiment_is_submitted_once(queue: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "VAR", tmp_path)
    assert not first_experiment.was_submitted()
    experiment = first_experiment.submit()
    assert first_experiment.submit() == experiment
    assert (experiment.is_public, experiment.owner, experiment.pk) == (True, None, uuid.UUID(str(first_experiment.ID)))
    experiment.delete()
    assert first_experiment.was_submitted(), "somebody has deleted it: that is no reason to run it again"
