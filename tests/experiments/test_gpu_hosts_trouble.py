"""What a machine itself can have wrong with it, each with its sentence: in a look at it, at its set-up, in a run."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connections

from accounts.models import User
from experiments import hosts, jobs
from experiments.models import Host, HostTask, Reason, State
from experiments.transport.client import hang_up
from tests.experiments.test_gpu_hosts_gpus import BOTH
from tests.hosted import SLOWLY, a_run, comes_to, ended, page_of, succeeded, there
from tests.live import Live, eventually
from tests.sshd import Sshd

pytestmark = pytest.mark.django_db(transaction=True)

Steps = dict[str, dict[str, str]]


def perform(host: Host, kind: str = HostTask.Kind.PROBE) -> tuple[HostTask, Steps]:
    """Do a task as the collector does, whose keeper runs here."""
    task = HostTask.objects.create(host=host, kind=kind)
    hosts.perform(task)
    task.refresh_from_db()
    host.refresh_from_db()
    return task, {step["key"]: step for step in task.steps}


# A look ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keeper")
def test_a_look_says_what_is_there(sshd: Sshd, owner: User) -> None:
    sshd.login.write(".bashrc", "echo welcome; printf 'no newline'; echo of a kind >&2\n")
    sshd.login.write("skew/sitecustomize.py", "import time\nnow = time.time\ntime.time = lambda: now() + 3600\n")
    before = f'{sshd.fake_gpus(BOTH)}\nexport PYTHONPATH="$HOME/skew"'
    task, steps = perform(host := sshd.host(owner, before=before))
    assert task.state == HostTask.State.SUCCEEDED, steps
    assert list(steps) == list(hosts.PROBE_STEPS)
    states = {key: step["state"] for key, step in steps.items()}
    assert {key for key, state in states.items() if state != "done"} <= {"gpus", "clock", "room", "linger"}, steps
    assert f"answers on port {sshd.port}" in steps["reach"]["text"]
    assert "SHA256:" in steps["key"]["text"]
    assert f"Signed in as {sshd.login.name}" in steps["login"]["text"]
    assert str(sshd.root) in steps["package"]["text"]
    assert "torch 2" in steps["torch"]["text"]
    assert "0: NVIDIA H100 80GB HBM3, 86 GB (0 in use); 1: NVIDIA H100" in steps["gpus"]["text"]
    assert "its torch does not see them" in steps["gpus"]["text"]
    assert states["clock"] == "warning"
    assert "Its clock is 3600 s ahead of this site's." in steps["clock"]["text"]
    assert "ms there and back" in steps["trip"]["text"]
    assert host.facts is not None
    assert host.readings is not None
    assert len(host.facts["gpus"]) == len(host.readings["gpus"]) == 2
    assert host.env_python == sshd.python


def wrong_key(sshd: Sshd, host: Host) -> None:
    sshd.revoke_all()


def changed_key(sshd: Sshd, host: Host) -> None:
    sshd.new_host_key()
    sshd.start()


def unconfirmed(sshd: Sshd, host: Host) -> None:
    Host.objects.filter(pk=host.pk).update(host_key="")


def no_server(sshd: Sshd, host: Host) -> None:
    sshd.stop()


def no_python(sshd: Sshd, host: Host) -> None:
    Host.objects.filter(pk=host.pk).update(python="/nowhere/python3", env_python="")


def no_permission(sshd: Sshd, host: Host) -> None:
    sshd.root.mkdir(mode=0o500)
    sshd.login.own(sshd.root)


@pytest.mark.usefixtures("keeper")
@pytest.mark.parametrize(
    ("spoil", "step", "sentence"),
    [
        (no_server, "reach", "no SSH server listens there"),
        (unconfirmed, "key", "Nobody has confirmed yet"),
        (changed_key, "key", "another host key than the one that was confirmed"),
        (wrong_key, "login", "refused the login"),
        (no_python, "python", "/nowhere/python3 on 127.0.0.1"),
        (no_permission, "package", "may not write in"),
    ],
)
def test_a_look_stops_at_what_is_wrong(
    sshd: Sshd, owner: User, spoil: Callable[[Sshd, Host], None], step: str, sentence: str
) -> None:
    host = sshd.host(owner)
    spoil(sshd, host)
    task, steps = perform(host)
    assert task.state == HostTask.State.FAILED
    order = list(steps)
    for key in order[: order.index(step)]:
        assert steps[key]["state"] == "done", steps[key]
    assert steps[step]["state"] == "failed"
    assert sentence in steps[step]["text"], steps[step]
    for key in order[order.index(step) + 1 :]:
        assert steps[key]["state"] == "waiting", steps[key]


@pytest.mark.usefixtures("keeper")
def test_a_python_without_torch_is_to_be_set_up(sshd: Sshd, owner: User) -> None:
    bare = sshd.login.home / "bare"
    subprocess.run([sshd.python, "-m", "venv", "--without-pip", str(bare)], check=True)
    task, steps = perform(host := sshd.host(owner, env_python="", python=str(bare / "bin" / "python")))
    assert task.state == HostTask.State.SUCCEEDED
    assert steps["torch"]["state"] == "warning"
    assert "has no torch, transformers" in steps["torch"]["text"]
    assert "Set up this host" in steps["torch"]["remedy"]
    assert not host.env_python
    assert not host.is_ready


# The set-up -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something little to install that passes for all that training needs."""
    path = sshd.login.home / "everything-1.0-py3-none-any.whl"
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: everything\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as file:
        for module in ("everything", *hosts.MODULES):
            file.writestr(f"{module}.py", "")
        for name, text in info.items():
            file.writestr(f"everything-1.0.dist-info/{name}", text)
    path.chmod(0o644)
    monkeypatch.setattr(hosts, "requirements", lambda: [f"everything @ file://{path}"])
    return path


@pytest.mark.usefixtures("keeper")
def test_a_set_up_makes_an_environment(sshd: Sshd, owner: User, wheel: Path) -> None:
    host = sshd.host(owner, env_python="", python=sshd.python)
    task, steps = perform(host, HostTask.Kind.SET_UP)
    assert task.state == HostTask.State.SUCCEEDED, (steps, task.log)
    assert steps["environment"]["state"] == "done", steps
    assert host.env_python == str(sshd.root / "env" / "bin" / "python")
    assert host.env_python in steps["torch"]["text"] or steps["torch"]["state"] == "done"
    assert host.is_ready
    assert "1 of 3" in task.log
    assert "everything" in task.log
    assert hosts.ENVIRONMENT in task.log
    assert (sshd.root / "env").stat().st_uid == sshd.login.uid
    # Once more completes what is there, and its log is its own.
    again, steps = perform(host, HostTask.Kind.SET_UP)
    assert again.state == HostTask.State.SUCCEEDED, (steps, again.log)
    assert again.log.count("1 of 3") == 1
    assert host.env_python == str(sshd.root / "env" / "bin" / "python")


@pytest.mark.usefixtures("keeper")
def test_a_set_up_is_cancelled_and_one_that_fails_says_why(
    sshd: Sshd, owner: User, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = sshd.host(owner, env_python="", python=sshd.python)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/{wheel.name}"
        monkeypatch.setattr(hosts, "requirements", lambda: [f"everything @ {address}"])
        task = HostTask.objects.create(host=host, kind=HostTask.Kind.SET_UP)

        def work() -> None:
            hosts.perform(task)
            hang_up()
            connections.close_all()

        working = threading.Thread(target=work)
        working.start()
        eventually(lambda: "2 of 3" in HostTask.objects.get(pk=task.pk).log, what="for the log")
        HostTask.objects.filter(pk=task.pk).update(cancel_requested=True)
        working.join()
    task.refresh_from_db()
    assert task.state == HostTask.State.CANCELLED
    assert task.steps[0]["text"] == "Cancelled."
    eventually(lambda: not _installs(sshd), what="for the end of the installation")
    monkeypatch.setattr(hosts, "requirements", lambda: [f"everything @ file://{wheel}.not-there"])
    task, steps = perform(host, HostTask.Kind.SET_UP)
    assert task.state == HostTask.State.FAILED
    assert steps["environment"]["state"] == "failed"
    assert "could not be installed" in steps["environment"]["text"]
    assert not host.is_ready


def _installs(sshd: Sshd) -> bool:
    commands = [Path(f"/proc/{pid}/cmdline") for pid in sshd.login.processes()]
    return any(b"everything @" in path.read_bytes() for path in commands if path.exists())


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_that_can_go_on_when_there_is_room(site: Live, sshd: Sshd, owner: User) -> None:
    with sshd.small_disk("4m") as disk:
        host = sshd.host(owner, folder=str(disk / "work"), before=sshd.lines(**SLOWLY))
        run = a_run(owner, host, steps=120)
        comes_to(run, 15)
        ballast = disk / "ballast"
        fill(ballast)
        assert (ended(run).state, run.reason) == (State.FAILED, Reason.DISK_FULL), run.detail
        assert "No space left on device" in run.detail
        # One that is to begin now cannot, for the same reason.
        late = ended(a_run(owner, host))
        assert (late.state, late.reason) == (State.FAILED, Reason.DISK_FULL), late.detail
        assert "the disk is full" in page_of(late)
        ballast.unlink()
        for failed in (run, late):
            jobs.resume(failed)
            failed.refresh_from_db()
            assert ended(failed).state == State.SUCCEEDED, failed.detail
        steps = list(run.points.filter(split="train").values_list("step", flat=True))
        assert steps == list(range(1, 121))


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_folder_without_permission_holds_a_run_up_and_ends_none(site: Live, sshd: Sshd, owner: User) -> None:
    sshd.login.write(".bashrc", "echo welcome; printf 'no newline'; echo of a kind >&2\n")
    host = sshd.host(owner)
    sshd.root.mkdir(mode=0o500)
    sshd.login.own(sshd.root)
    run = a_run(owner, host)
    eventually(lambda: Host.objects.get(pk=host.pk).problem == Host.Problem.UNUSABLE, what="for the news")
    page = page_of(run)
    assert f"{host.name} cannot be used" in page
    assert "may not write in" in page
    run.refresh_from_db()
    assert run.state == State.RUNNING
    os.chmod(sshd.root, 0o700)
    succeeded(sshd, run)
    assert "cannot be used" not in page_of(run)


def test_what_stands_in_the_way_of_a_look_ends_no_run(site: Live, sshd: Sshd, owner: User) -> None:
    run = a_run(owner, sshd.host(owner, before=sshd.lines(**SLOWLY)), steps=100)
    comes_to(run, 10)
    for name in ("run.lock", "process.json"):
        os.chmod(there(sshd, run) / name, 0)
        sshd.cut()  # so that it is looked for anew
        before = run.step
        if name == "run.lock":  # which is needed to start it, not to follow it
            comes_to(run, before + 10)
        else:
            time.sleep(3)
        os.chmod(there(sshd, run) / name, 0o600)
    succeeded(sshd, run)
