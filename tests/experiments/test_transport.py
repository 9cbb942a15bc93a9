"""What every transport promises, held by each of them: runs on this machine, and on one behind a real SSH server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.db import connections

from accounts.models import User
from experiments.models import Experiment, Host, ModelRun
from experiments.transport import Transport, package
from experiments.transport.base import File
from experiments.transport.client import call, hang_up
from experiments.transport.local import Local
from experiments.transport.ssh import Ssh
from tests.live import a_spec, eventually, kill
from tests.sshd import Sshd
from trainer import agent

pytestmark = pytest.mark.django_db(transaction=True)


class Machine:
    """A host, the transport that reaches it, and the host's disk as the test sees it."""

    def __init__(self, transport: Transport, root: Path, set_env: Callable[..., None]) -> None:
        self.transport = transport
        self.root = root
        self.set_env = set_env

    @property
    def host(self) -> Host:
        return self.transport.host  # type: ignore[attr-defined,no-any-return]

    def run(self, steps: int = 30, name: str = "small", experiment: Experiment | None = None) -> ModelRun:
        if experiment is None:
            spec = a_spec(steps)
            experiment = Experiment.objects.create(name="test", spec_json=spec.model_dump(mode="json"), host=self.host)
        run: ModelRun = ModelRun.objects.create(experiment=experiment, name=name, host=self.host)
        return run

    def folder(self, run: ModelRun) -> Path:
        return self.root / str(run.experiment_id) / run.name

    def events(self, run: ModelRun) -> bytes:
        path = self.folder(run) / "events.jsonl"
        return path.read_bytes() if path.exists() else b""

    def ended(self, run: ModelRun) -> Any:
        return eventually(lambda: self.transport.status(run)["exit"], what="for the end of the trainer")


@pytest.fixture(params=["local", "ssh"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    if request.param == "local":
        request.getfixturevalue("trainers")

        def set_env(**env: str) -> None:
            for name, value in env.items():
                monkeypatch.setenv(name, value)

        yield Machine(Local(Host.local()), settings.RUNS_DIR, set_env)
        return
    sshd: Sshd = request.getfixturevalue("sshd")
    request.getfixturevalue("keeper")
    host = sshd.host(request.getfixturevalue("owner"))

    def set_lines(**env: str) -> None:
        Host.objects.filter(pk=host.pk).update(before=sshd.lines(**env))
        call(host.pk, "keeper.close")

    yield Machine(Ssh(host), sshd.root / "experiments", set_lines)


# A run and its process ------------------------------------------------------------------------------------------------


def test_a_run_that_was_never_started_is_not_alive(machine: Machine) -> None:
    run = machine.run()
    assert machine.transport.status(run) == {"attempt": 0, "alive": False, "pid": None, "at": None, "exit": None}
    assert [frame.kind for frame in machine.transport.tail(run, 0)] == ["E"]
    assert machine.transport.stop(run, 1)


def test_a_run_is_started_once_and_ends_well(machine: Machine) -> None:
    run = machine.run(steps=200)
    assert machine.transport.start(run) == "started"
    assert machine.transport.start(run) == "already"
    status = machine.transport.status(run)
    assert status["attempt"] == 1
    assert status["alive"]
    assert machine.ended(run)["code"] == 0
    assert machine.transport.start(run) == "finished"
    run.attempt = 2
    assert machine.transport.start(run) == "started"
    assert machine.ended(run)["attempt"] == 2
    assert machine.events(run).count(b'"kind": "finished"') == 1


def test_starts_at_once_start_once(machine: Machine) -> None:
    run = machine.run(steps=300)
    outcomes: list[str] = []

    def start() -> None:
        outcomes.append(machine.transport.start(run))
        hang_up()
        connections.close_all()

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["already"] * 4 + ["started"]
    eventually(lambda: machine.events(run))
    machine.transport.stop(run, 0)
    machine.ended(run)
    assert machine.events(run).count(b'"kind": "started"') == 1


def test_events_come_whole_and_once_from_any_byte_on(machine: Machine) -> None:
    run = machine.run(steps=60)
    machine.transport.start(run)
    told, expected = b"", 0
    for frame in machine.transport.tail(run, 0):
        assert frame.offset == expected
        assert frame.kind != "D" or frame.data.endswith(b"\n")
        told, expected = told + frame.data, expected + len(frame.data)
    assert frame.kind == "E"
    whole = machine.events(run)
    assert told == whole
    middle = whole.index(b"\n", len(whole) // 2) + 1
    assert b"".join(frame.data for frame in machine.transport.tail(run, middle)) == whole[middle:]
    assert [frame.kind for frame in machine.transport.tail(run, len(whole))] == ["E"]


def test_a_silent_trainer_is_heard_alive(machine: Machine) -> None:
    machine.set_env(FAKE_FAULT="hang")
    run = machine.run(steps=100)
    machine.transport.start(run)
    stream = machine.transport.tail(run, 0)
    eventually(lambda: next(stream).kind == "H")
    machine.transport.stop(run, 0)
    assert machine.ended(run)["signal"] == 9


def test_a_stopped_trainer_writes_a_checkpoint_and_goes_on_from_there(machine: Machine) -> None:
    run = machine.run(steps=5000)
    machine.transport.start(run)
    eventually(lambda: machine.transport.files(run, "checkpoints"))
    eventually(lambda: machine.transport.stop(run, 60))
    assert machine.ended(run)["code"] == 0
    assert b'"kind": "stopped"' in machine.events(run).splitlines()[-1]
    run.attempt = 2
    assert machine.transport.start(run) == "started"
    eventually(lambda: b'"resumed_from": ' in machine.events(run).rpartition(b'"kind": "prepared"')[2])
    machine.transport.stop(run, 0)
    assert machine.ended(run)["attempt"] == 2


def test_a_trainer_that_will_not_stop_is_killed_when_its_time_is_over(machine: Machine) -> None:
    machine.set_env(FAKE_FAULT="hang")
    run = machine.run(steps=100)
    machine.transport.start(run)
    eventually(lambda: b'"warning"' in machine.events(run))
    assert not machine.transport.stop(run, 0.3), "asked, and not gone yet"
    assert machine.ended(run)["signal"] == 9


def test_a_killed_trainer_is_reported_with_its_signal(machine: Machine) -> None:
    run = machine.run(steps=5000)
    machine.transport.start(run)
    pid = machine.transport.status(run)["pid"]
    assert pid
    kill(pid)
    assert machine.ended(run)["signal"] == 9
    assert not machine.transport.status(run)["alive"]


def test_a_run_of_whose_end_nobody_could_tell_is_lost(machine: Machine) -> None:
    run = machine.run(steps=5000)
    machine.transport.start(run)
    record = agent._read(machine.folder(run) / "process.json")
    assert record
    for who in ("supervisor", "trainer"):
        kill(record[who]["pid"])
    assert machine.ended(run)["lost"]


def test_a_failed_trainer_is_reported_with_its_last_lines(machine: Machine) -> None:
    machine.set_env(FAKE_FAULT="exit")
    run = machine.run(steps=100)
    machine.transport.start(run)
    ended = machine.ended(run)
    assert ended["code"] == 3
    assert ended["log"].endswith("ValueError: the fake trainer was told to fail")


def test_the_trainer_inherits_no_secret_of_the_site(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECRET_KEY", "DATABASE_URL", "HF_TOKEN", "CREDENTIAL_KEYS"):
        monkeypatch.setenv(name, "not for trainers")
    run = machine.run()
    machine.transport.start(run)
    machine.ended(run)
    first = machine.events(run).splitlines()[0].decode()
    assert "KANGAROO_DATA_CACHE" in first
    for name in ("SECRET_KEY", "DATABASE_URL", "HF_TOKEN", "CREDENTIAL_KEYS"):
        assert f'\\"{name}\\"' not in first


# Its files ------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_run_are_listed_read_and_checked(machine: Machine) -> None:
    run = machine.run()
    machine.transport.start(run)
    machine.ended(run)
    content = os.urandom(3_000_000)
    (machine.folder(run) / "model" / "deep").mkdir()
    (machine.folder(run) / "model" / "deep" / "weights").write_bytes(content)
    (machine.folder(run) / "model" / "empty").touch()
    (machine.folder(run) / "model" / "link").symlink_to("deep/weights")
    transport = machine.transport
    assert transport.files(run, "model") == [
        File("model/deep/weights", 3_000_000),
        File("model/empty", 0),
        File("model/model.safetensors", 7),
    ]
    with transport.open_file(run, "model/deep/weights") as file:
        assert file.read(10) == content[:10]
        assert file.read() == content[10:]
    with transport.open_file(run, "model/empty") as file:
        assert file.read() == b""
    assert transport.read(run, "model/deep/weights", 2_999_000, 5000) == content[2_999_000:]
    assert transport.read(run, "model/deep/weights", 3_000_000, 5000) == b""
    assert transport.read(run, "model/deep/weights", 7, 11) == content[7:18]
    for offset in (0, 2_999_000, 3_000_000):
        assert b"".join(transport.pieces(run, "model/deep/weights", offset, 3_000_000)) == content[offset:]
    assert transport.digest(run, "model/deep/weights") == hashlib.sha256(content).hexdigest()
    assert transport.disk_bytes(run) > 3_000_000


def test_what_is_not_there_is_not_found(machine: Machine) -> None:
    run = machine.run()
    machine.transport.start(run)
    machine.ended(run)
    for name in ("nothing", "model", "model/nothing", "model/model.safetensors/below"):
        with pytest.raises(FileNotFoundError):
            machine.transport.open_file(run, name)
    with pytest.raises(FileNotFoundError):
        machine.transport.read(run, "nothing", 0, 10)
    with pytest.raises(FileNotFoundError):
        next(machine.transport.pieces(run, "nothing", 0, 10))
    with pytest.raises(FileNotFoundError):
        machine.transport.digest(run, "nothing")
    assert machine.transport.files(run, "nothing") == []


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "link", "folder/outside", "model/../../../outside"])
def test_no_path_leads_outside(machine: Machine, name: str) -> None:
    run = machine.run()
    machine.transport.start(run)
    machine.ended(run)
    folder, outside = machine.folder(run), machine.root / "outside"
    outside.write_text("not yours")
    (folder / "link").symlink_to("/etc/hostname")
    (folder / "folder").symlink_to("/")
    for ask in (
        lambda: machine.transport.open_file(run, name),
        lambda: machine.transport.read(run, name, 0, 10),
        lambda: machine.transport.digest(run, name),
    ):
        with pytest.raises(FileNotFoundError):
            ask()


def test_a_removed_experiment_leaves_nothing(machine: Machine) -> None:
    run = machine.run(steps=5000)
    other = machine.run(steps=5000, name="large", experiment=run.experiment)
    for each in (run, other):
        machine.transport.start(each)
    pids = [machine.transport.status(each)["pid"] for each in (run, other)]
    machine.transport.remove(run.experiment_id)
    assert not machine.folder(run).parent.exists()
    eventually(lambda: not any(pid and agent.started_at(pid) for pid in pids))
    machine.transport.remove(run.experiment_id)  # once more, of what is gone
    machine.transport.remove(uuid.uuid4())
    assert machine.transport.half_removed() == []


def test_a_removal_that_was_cut_short_is_found_again(machine: Machine) -> None:
    run = machine.run()
    machine.transport.start(run)
    machine.ended(run)
    mark = machine.folder(run).parent / ".removed"
    mark.touch()
    os.chown(mark, mark.parent.stat().st_uid, -1)
    assert machine.transport.half_removed() == [run.experiment_id]
    machine.transport.remove(run.experiment_id)
    assert machine.transport.half_removed() == []


# The machine ----------------------------------------------------------------------------------------------------------


def test_the_machine_says_how_it_stands(machine: Machine) -> None:
    machine.transport.status(machine.run())
    readings = machine.transport.readings()
    assert readings["disk_free_bytes"] > 0
    assert readings["memory_free_bytes"] > 0
    assert isinstance(readings["gpus"], list)


# What is sent (SSH alone) ---------------------------------------------------------------------------------------------


@pytest.fixture
def remote(sshd: Sshd, keeper: object, owner: User) -> Ssh:
    return Ssh(sshd.host(owner))


def test_a_text_of_the_site_is_sent_once_and_read_from_there(remote: Ssh, sshd: Sshd, tmp_path: Path) -> None:
    text = tmp_path / "some text.txt"
    text.write_bytes(b"once upon a time " * 300_000)
    machine = Machine(remote, sshd.root / "experiments", lambda **_: None)
    spec = a_spec(30, models=("small",)).model_dump(mode="json")
    spec["data"]["source"] = str(text)
    progress: list[tuple[int, int]] = []
    for _ in range(2):
        experiment = Experiment.objects.create(name="text", spec_json=spec, host=remote.host)
        run = machine.run(experiment=experiment)
        assert remote.start(run, lambda done, total: progress.append((done, total))) == "started"
        machine.ended(run)
        read = (machine.folder(run) / "spec.json").read_text()
        there = sshd.root / "files" / hashlib.sha256(text.read_bytes()).hexdigest() / text.name
        assert str(there) in read
        assert there.read_bytes() == text.read_bytes()
    assert progress == [(4 << 20, 5_100_000), (5_100_000, 5_100_000)], "sent once, in pieces"


def test_a_folder_is_sent_with_what_is_in_it(remote: Ssh, sshd: Sshd, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "more").mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "more" / "empty").touch()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    spec = a_spec(30, models=("small", "large")).model_dump(mode="json")
    spec["data"]["tokenizer"] = {"kind": "pretrained", "name": str(checkpoint)}
    spec["models"]["small"] |= {"init": {"kind": "checkpoint", "path": str(checkpoint)}}
    experiment = Experiment.objects.create(name="checkpoint", spec_json=spec, host=remote.host)
    machine = Machine(remote, sshd.root / "experiments", lambda **_: None)
    for name, weights in (("large", False), ("small", True)):  # the first needs its tokenizer alone
        run = machine.run(name=name, experiment=experiment)
        remote.start(run)
        machine.ended(run)
        there = next((sshd.root / "files").glob("*/checkpoint"))
        assert (there / "config.json").read_text() == "{}"
        assert (there / "more" / "empty").read_bytes() == b""
        assert (there / "model.safetensors").exists() == weights
        spec = json.loads((machine.folder(run) / "spec.json").read_text())
        assert spec["data"]["tokenizer"]["name"] == spec["models"]["small"]["init"]["path"] == str(there)


def test_a_parent_that_was_trained_elsewhere_is_sent(remote: Ssh, sshd: Sshd, trainers: None) -> None:
    here, there = (
        Machine(Local(Host.local()), settings.RUNS_DIR, print),
        Machine(remote, sshd.root / "experiments", print),
    )
    parent = here.run()
    child = there.run(name="scaled", experiment=parent.experiment)
    child.parent = parent
    with pytest.raises(FileNotFoundError, match="small has no finished model here yet"):
        remote.start(child)
    here.transport.start(parent)
    here.ended(parent)
    remote.start(child)
    assert there.ended(child)["code"] == 0
    assert (there.root / str(parent.experiment_id) / "small" / "model" / "model.safetensors").read_bytes() == b"weights"


def test_a_transfer_that_was_broken_off_goes_on_where_it_was(remote: Ssh, sshd: Sshd, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    remote.ask("write", content[: 2 << 20], path="files/x/file", offset=0)
    sshd.cut()
    progress: list[int] = []
    eventually(lambda: _sent(remote, path, progress))
    assert progress == [3 << 20]
    assert (sshd.root / "files" / "x" / "file").read_bytes() == content
    assert not (sshd.root / "files" / "x" / "file.part").exists()


def test_a_part_of_something_else_is_not_built_upon(remote: Ssh, sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"the right content")
    remote.ask("write", b"wrong", path="files/x/file", offset=0)
    remote.send(path, "files/x/file")
    assert (sshd.root / "files" / "x" / "file").read_bytes() == b"the right content"
    path.write_bytes(b"another content")
    remote.send(path, "files/x/file")
    assert (sshd.root / "files" / "x" / "file").read_bytes() == b"another content"


# The package ----------------------------------------------------------------------------------------------------------


def test_the_package_is_the_trainer_and_nothing_else() -> None:
    digest, packed = package.archive()
    assert digest == hashlib.sha256(packed).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        names = tar.getnames()
    assert {"trainer/__init__.py", "trainer/relay.py", "trainer/families/gpt2.py"} <= set(names)
    assert all(name.startswith("trainer/") and name.endswith(".py") for name in names)
    package.archive.cache_clear()
    assert package.archive() == (digest, packed)


def test_what_the_trainer_needs_is_pinned() -> None:
    names = [requirement.partition("==")[0] for requirement in package.requirements()]
    assert {"torch", "transformers", "pydantic", "tqdm"} <= set(names)
    assert not {"django", "asyncssh", "cryptography"} & set(names)
    assert all("==" in requirement for requirement in package.requirements())


def _sent(remote: Ssh, path: Path, progress: list[int]) -> bool:
    try:
        remote.send(path, "files/x/file", lambda done, _: progress.append(done))
    except ConnectionError:
        return False
    return True
