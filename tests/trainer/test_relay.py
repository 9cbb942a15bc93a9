"""The relay as a real process on two pipes: every request, many at once, and whatever else may come."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.live import FAKE_TRAINER, children, eventually, kill
from trainer import agent, wire

EXPERIMENT = "0b5c2f4e-0000-4000-8000-00000000000a"
RUN = f"{EXPERIMENT}/small"


class Refused(Exception):
    """The relay's answer is an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.type, self.errno, self.message = error["type"], error["errno"], error["message"]


class Client:
    """The other end of a relay's pipes, for any number of threads."""

    def __init__(self, root: Path, python: str = sys.executable, **env: str) -> None:
        self.process = subprocess.Popen(
            [python, "-m", "trainer.relay", "--root", str(root)],
            cwd=agent.ROOT,
            env={**os.environ, "KANGAROO_TRAINER": json.dumps([sys.executable, str(FAKE_TRAINER)]), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == agent.SENTINEL.encode() + b"\n"
        self.numbers = itertools.count(1)
        self.writing = threading.Lock()
        self.answers: dict[Any, tuple[dict[str, Any], bytes]] = {}
        self.come = threading.Condition()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        while message := wire.read(self.process.stdout):  # type: ignore[arg-type]
            with self.come:
                self.answers[message[0]["id"]] = message
                self.come.notify_all()

    def send(self, data: bytes) -> None:
        with self.writing:
            assert self.process.stdin is not None
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def answer(self, number: Any) -> tuple[dict[str, Any], bytes]:
        with self.come:
            assert self.come.wait_for(lambda: number in self.answers, timeout=60), "no answer"
            return self.answers.pop(number)

    def __call__(self, op: str, payload: bytes = b"", **arguments: Any) -> tuple[Any, bytes]:
        number = next(self.numbers)
        self.send(wire.pack({"id": number, "op": op, **arguments}, payload))
        header, data = self.answer(number)
        if "error" in header:
            raise Refused(header["error"])
        return header["ok"], data

    def end(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(60)
        self.reader.join()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.stderr.close()  # type: ignore[union-attr]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "kangaroo"
    yield folder
    for process in folder.glob("*/*/*/process.json"):
        agent.stop(process.parent, 0, wait=True)
    for process in folder.glob("tasks/*/process.json"):
        agent.stop(process.parent, 0, wait=True)


@pytest.fixture
def relay(root: Path) -> Iterator[Client]:
    client = Client(root)
    yield client
    client.end()


def a_spec(steps: int = 30) -> str:
    return json.dumps({"train": {"max_steps": steps}, "models": {"small": {"init": {"kind": "random"}}}})


def start(relay: Client, run: str = RUN, steps: int = 30, **more: Any) -> str:
    return str(relay("start", run=run, attempt=1, spec=a_spec(steps), **more)[0]["outcome"])


def ended(relay: Client, run: str = RUN) -> dict[str, Any]:
    return eventually(lambda: relay("status", run=run)[0]["exit"])  # type: ignore[no-any-return]


def story(relay: Client, run: str = RUN, offset: int = 0) -> bytes:
    """All of a run's events, by long polls from `offset`."""
    data = b""
    while True:
        frame, lines = relay("tail", run=run, offset=offset + len(data), wait=2)
        assert frame["offset"] == offset + len(data)
        data += lines
        if frame["kind"] == "E":
            return data


# Who answers ----------------------------------------------------------------------------------------------------------


def test_a_relay_says_who_it_is(relay: Client, root: Path) -> None:
    said, _ = relay("hello")
    assert said["version"] == 1
    assert (said["root"], said["executable"], said["package"]) == (str(root), sys.executable, "")
    assert said["boot_id"] == agent.boot_id()
    assert abs(said["time"] - time.time()) < 60
    assert root.stat().st_mode & 0o777 == 0o700, "what is kept there is its owner's alone"


def test_a_relay_knows_the_package_it_runs_from(tmp_path: Path) -> None:
    package = tmp_path / "kangaroo" / "package" / "abc123"
    package.mkdir(parents=True)
    (package / "trainer").symlink_to(agent.ROOT / "trainer")
    code = "import trainer.agent, pathlib, sys; trainer.agent.ROOT = pathlib.Path(sys.argv[1]);"
    code += "from trainer.relay import Relay; print(Relay(pathlib.Path(sys.argv[2])).hello()[0]['package'])"
    command = [sys.executable, "-c", code, str(package), str(tmp_path / "kangaroo")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=agent.ROOT).stdout == "abc123\n"


def test_a_relay_says_what_the_machine_is_and_how_it_stands(relay: Client) -> None:
    assert relay("facts")[0]["cores"] == agent.cores()
    assert relay("readings")[0]["memory_free_bytes"] > 0


def old_pythons() -> list[str]:
    found = Path.home().glob(".pyenv/versions/3.9.*/bin/python")
    return [str(path) for path in [*found, Path("/usr/bin/python3.9")] if path.exists()][:1]


@pytest.mark.skipif(not old_pythons(), reason="there is no Python 3.9 here")
def test_a_relay_runs_under_an_old_python_without_any_package(root: Path) -> None:
    relay = Client(root, old_pythons()[0])
    assert relay("hello")[0]["python"].startswith("3.9.")
    assert start(relay) == "started"
    assert ended(relay)["code"] == 0
    assert relay("facts")[0]["torch"] is None
    relay.end()


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_is_started_once_watched_and_read_to_its_end(relay: Client, root: Path) -> None:
    assert start(relay) == "started"
    assert start(relay, steps=99) in ("already", "finished")
    directory = root / "experiments" / RUN
    events = story(relay)
    assert events == (directory / "events.jsonl").read_bytes()
    assert json.loads(events.splitlines()[-1])["kind"] == "finished"
    assert relay("status", run=RUN)[0]["exit"]["code"] == 0
    assert start(relay) == "finished"
    assert (directory / "spec.json").read_text() == a_spec(30), "written once"
    assert relay("disk_bytes", run=RUN)[0]["bytes"] == agent.disk_bytes(directory) > 7000


def test_a_run_gets_what_the_site_gives_it_and_what_the_relay_has(root: Path) -> None:
    relay = Client(root, FROM_THE_LOGIN_SHELL="yes")
    gpus = ["GPU-aaaa", "GPU-bbbb"]
    start(relay, env={"FAKE_STEP_SECONDS": "0.001"}, gpus=gpus, processes=2)
    started = json.loads(story(relay).splitlines()[0])
    names = json.loads(started["versions"]["environment"])
    wanted = {"FROM_THE_LOGIN_SHELL", "FAKE_STEP_SECONDS", "CUDA_VISIBLE_DEVICES", "KANGAROO_PROCESSES", "PATH"}
    assert wanted <= set(names)
    relay.end()


@pytest.mark.parametrize(("gpus", "seen"), [(["GPU-a", "GPU-b"], "GPU-a,GPU-b"), ([], ""), (None, None)])
def test_a_run_sees_the_gpus_that_it_was_given(root: Path, gpus: list[str] | None, seen: str | None) -> None:
    code = "import json, os; print('SEEN', json.dumps(os.environ.get('CUDA_VISIBLE_DEVICES')), flush=True)"
    relay = Client(root, KANGAROO_TRAINER=json.dumps([sys.executable, "-c", code]), CUDA_VISIBLE_DEVICES="7")
    start(relay, gpus=gpus)
    assert ended(relay)["log"] == f"SEEN {json.dumps('7' if gpus is None else seen)}"
    relay.end()


def test_a_run_is_stopped_with_a_checkpoint(relay: Client, root: Path) -> None:
    start(relay, steps=3000)
    eventually(lambda: (root / "experiments" / RUN / "checkpoints").exists())
    eventually(lambda: relay("stop", run=RUN, grace=60)[0]["gone"])
    assert json.loads(story(relay).splitlines()[-1])["kind"] == "stopped"


def test_a_long_poll_ends_with_a_sign_of_life(root: Path) -> None:
    relay = Client(root, FAKE_FAULT="hang")
    start(relay)
    offset = 0
    while (frame := relay("tail", run=RUN, offset=offset, wait=0.2))[0]["kind"] == "D":
        offset += len(frame[1])
    assert frame == ({"kind": "H", "offset": offset}, b"")
    assert not relay("stop", run=RUN, grace=0)[0]["gone"] or relay("status", run=RUN)[0]["exit"]
    assert ended(relay)["signal"] == signal.SIGKILL
    relay.end()


def test_twenty_runs_are_read_at_once_while_others_ask(relay: Client, root: Path) -> None:
    runs = [f"{EXPERIMENT[:-2]}{number:02d}/small" for number in range(20)]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lambda run: start(relay, run), runs)) == ["started"] * 20
        stories = pool.map(lambda run: story(relay, run), runs)
        asked = [relay("part", path="data/none")[0]["size"] for _ in range(50)]
        for run, events in zip(runs, stories, strict=True):
            assert events == (root / "experiments" / run / "events.jsonl").read_bytes()
            assert json.loads(events.splitlines()[-1])["kind"] == "finished"
    assert asked == [0] * 50


def test_long_polls_hold_nothing_up(root: Path) -> None:
    relay = Client(root, FAKE_FAULT="hang", FAKE_FAULT_STEP="1")
    start(relay)
    end = eventually(lambda: agent.status(root / "experiments" / RUN)["alive"] and len(story_so_far(relay)))
    for number in range(100):
        relay.send(wire.pack({"id": f"poll {number}", "op": "tail", "run": RUN, "offset": end, "wait": 3600}))
    assert relay("part", path="data/none")[0]["size"] == 0
    relay.end()  # at once, though a hundred still wait


def story_so_far(relay: Client) -> bytes:
    data = b""
    while (frame := relay("tail", run=RUN, offset=len(data), wait=1))[0]["kind"] == "D":
        data += frame[1]
    return data


def test_a_trainer_outlives_its_relay(root: Path) -> None:
    relay = Client(root)
    start(relay, steps=300)
    relay.end()
    assert relay.process.returncode == 0
    assert agent.status(root / "experiments" / RUN)["alive"]
    relay = Client(root)
    assert json.loads(story(relay).splitlines()[-1])["kind"] == "finished"
    relay.end()


def test_a_relay_that_is_killed_takes_no_trainer_along(root: Path) -> None:
    relay = Client(root)
    start(relay, steps=3000)
    kill(relay.process.pid)
    relay.end()
    assert agent.status(root / "experiments" / RUN)["alive"]


def test_an_experiment_is_removed_with_what_trains_for_it(relay: Client, root: Path) -> None:
    start(relay, steps=3000)
    pid = relay("status", run=RUN)[0]["pid"]
    (root / "experiments" / EXPERIMENT / ".removed").touch()
    assert relay("half_removed")[0] == [EXPERIMENT]
    relay("remove", experiment=EXPERIMENT)
    assert agent.started_at(pid) is None
    assert not (root / "experiments" / EXPERIMENT).exists()
    assert relay("half_removed")[0] == []
    relay("remove", experiment=EXPERIMENT)  # again: nothing to do


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_a_task_is_run_and_watched_as_a_trainer_is(relay: Client, root: Path) -> None:
    code = "import os, sys; print(sys.executable, os.environ['WORD'])"
    asked = {"name": "set-up", "command": ["python", "-c", code], "env": {"WORD": "hello"}, "attempt": 1}
    assert relay("begin", **asked)[0]["outcome"] == "started"
    end = eventually(lambda: relay("task", name="set-up")[0]["exit"])
    assert (end["code"], end["log"]) == (0, f"{sys.executable} hello")
    assert relay("begin", **asked)[0]["outcome"] == "finished"
    assert relay("read", path="tasks/set-up/log.txt", offset=0, limit=100)[1].endswith(b" hello\n")
    with pytest.raises(Refused, match="no command"):
        relay("begin", name="set-up", command=[], attempt=2)


def test_a_task_can_be_ended(relay: Client) -> None:
    asked = {"name": "set-up", "command": ["python", "-c", "import time; time.sleep(3600)"], "attempt": 1}
    relay("begin", **asked)
    eventually(lambda: relay("end", name="set-up")[0]["gone"])
    assert relay("task", name="set-up")[0]["exit"]["signal"] == signal.SIGTERM


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_comes_over_in_parts_and_is_checked(relay: Client, root: Path) -> None:
    data = os.urandom(3_000_000)
    path = f"files/{hashlib.sha256(data).hexdigest()}/text.txt"
    assert relay("part", path=path)[0] == {"size": 0, "whole": False}
    assert relay("write", data[:1_000_000], path=path, offset=0)[0] == {"size": 1_000_000}
    assert relay("part", path=path)[0] == {"size": 1_000_000, "whole": False}
    # The line broke and the sender is not sure what came: it sends from an earlier byte.
    assert relay("write", data[500_000:600_000], path=path, offset=500_000)[0] == {"size": 600_000}
    with pytest.raises(Refused, match="600000 bytes so far"):
        relay("write", b"x", path=path, offset=600_001)
    relay("write", data[600_000:], path=path, offset=600_000)
    assert not (root / path).exists()
    digest = hashlib.sha256(data).hexdigest()
    for _ in range(2):  # the answer to the first may have been lost
        relay("finish", path=path, sha256=digest)
    assert (root / path).read_bytes() == data
    assert (root / path).parent.stat().st_mode & 0o777 == 0o700
    assert relay("part", path=path)[0] == {"size": 0, "whole": True}
    assert relay("digest", path=path)[0] == {"sha256": digest, "size": len(data)}
    assert relay("read", path=path, offset=2_999_999, limit=10) == ({"total": 3_000_000}, data[-1:])
    assert relay("read", path=path, offset=3_000_000, limit=10) == ({"total": 3_000_000}, b"")


def test_a_file_that_did_not_come_over_as_it_is_is_thrown_away(relay: Client, root: Path) -> None:
    relay("write", b"garbled", path="files/a", offset=0)
    with pytest.raises(Refused, match="did not come over") as refused:
        relay("finish", path="files/a", sha256="0" * 64)
    assert refused.value.type == "ValueError"
    assert relay("files", path="files")[0] == []
    with pytest.raises(Refused) as refused:
        relay("finish", path="files/a", sha256="0" * 64)
    assert (refused.value.type, refused.value.errno) == ("FileNotFoundError", errno.ENOENT)


def test_an_empty_file_comes_over(relay: Client, root: Path) -> None:
    relay("write", path="files/empty", offset=0)
    relay("finish", path="files/empty", sha256=hashlib.sha256().hexdigest())
    assert (root / "files/empty").read_bytes() == b""


def test_files_are_listed_without_links(relay: Client, root: Path) -> None:
    assert relay("files", path="experiments")[0] == []
    folder = root / "experiments" / RUN / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.json").write_text("12")
    (folder / "a.safetensors").write_text("123")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "away").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    assert relay("files", path=f"experiments/{RUN}/model")[0] == [["a.safetensors", 3], ["deep/b.json", 2]]


OUTSIDE = ["../secret", "/etc/passwd", "files/../../secret", "link", "away/secret", "away/deeper/secret", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("op", ["read", "write", "digest", "files", "part", "finish"])
def test_no_path_leads_out_of_the_working_folder(root: Path, op: str, path: str) -> None:
    """On the class itself: a process a case would take minutes."""
    from trainer.relay import Relay

    root.mkdir()
    (root.parent / "secret").write_text("secret")
    (root / "link").symlink_to(root.parent / "secret")
    (root / "link.part").symlink_to(root.parent / "secret")
    (root / "away").symlink_to(root.parent)
    arguments: dict[str, dict[str, Any]] = {
        "read": {"offset": 0, "limit": 10},
        "write": {"offset": 0, "payload": b"x"},
        "finish": {"sha256": hashlib.sha256(b"secret").hexdigest()},
    }
    with pytest.raises(PermissionError):
        getattr(Relay(root.resolve()), op)(path=path, **arguments.get(op, {}))
    assert (root.parent / "secret").read_text() == "secret"
    assert sorted(path.name for path in root.parent.iterdir()) == ["kangaroo", "secret"]


@pytest.mark.parametrize("run", ["..", "../..", f"{EXPERIMENT}/..", f"{EXPERIMENT}/a/b", EXPERIMENT, f"{RUN}\n", 7])
def test_what_names_no_run_is_refused(relay: Client, run: Any) -> None:
    for op, more in (("status", {}), ("stop", {"grace": 1}), ("disk_bytes", {}), ("tail", {"offset": 0, "wait": 0})):
        with pytest.raises(Refused) as refused:
            relay(op, run=run, **more)
        assert refused.value.type == "ValueError"


def test_what_names_no_experiment_is_not_removed(relay: Client, root: Path) -> None:
    relay("hello")
    for name in ("..", ".", "", "x" * 36, f"{EXPERIMENT}/small", "-" * 35 + "\n"):
        with pytest.raises(Refused):
            relay("remove", experiment=name)
    assert root.exists()


def test_only_a_regular_file_is_read(relay: Client, root: Path) -> None:
    root.mkdir(exist_ok=True)
    os.mkfifo(root / "pipe")
    for path in ("pipe", ".", "none"):
        with pytest.raises(Refused):
            relay("read", path=path, offset=0, limit=1)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_broken_request_is_answered_and_the_next_one_too(relay: Client) -> None:
    for broken in (b"rubbish\n", b"[1, 2]\n", b'{"size": -1}\n', b'{"size": 99999999999}\n', b"\xff\xfe\n", b"\n"):
        relay.send(broken)
        header, _ = relay.answer(None)
        assert header["error"]["type"] == "WireError"
    for wrong in (
        {"op": "nothing"},
        {"op": "_inside", "path": "x"},
        {"op": "__init__", "root": "/"},
        {"op": ["read"]},
        {},
        {"op": "read"},
        {"op": "read", "path": 7, "offset": 0, "limit": 1},
        {"op": "read", "path": "x", "offset": "zero", "limit": None},
        {"op": "hello", "surplus": 1},
        {"op": "start", "run": RUN, "attempt": 1, "spec": None},
    ):
        relay.send(wire.pack({"id": "wrong", **wrong}))
        assert "error" in relay.answer("wrong")[0], wrong
    assert relay("hello")[0]["version"] == 1


def test_what_is_too_long_for_an_answer_is_refused(relay: Client, root: Path) -> None:
    folder = root / "files"
    folder.mkdir(parents=True)
    for number in range(6000):
        (folder / f"{number:0200d}").touch()
    with pytest.raises(Refused, match="too long"):
        relay("files", path="files")
    big = folder / "big"
    with big.open("wb") as file:
        file.truncate(wire.MOST_PAYLOAD * 2)
    assert len(relay("read", path="files/big", offset=0, limit=1 << 40)[1]) == wire.MOST_PAYLOAD


def test_a_supervisor_that_cannot_begin_is_an_error_with_its_words(root: Path) -> None:
    relay = Client(root, KANGAROO_TRAINER='["/nowhere/python"]')
    assert start(relay) == "started"
    assert ended(relay)["code"] == 127
    relay.end()


def test_a_folder_without_permission_is_an_error_with_its_number(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code = "from trainer.relay import main; import os; os.getuid() or os.setuid(65534); main()"  # root may do anything
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--root", str(locked)],
        cwd=agent.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == agent.SENTINEL.encode() + b"\n"
    asked: list[dict[str, Any]] = [
        {"op": "hello"},
        {"op": "write", "path": "files/a", "offset": 0},
        {"op": "start", "run": RUN, "attempt": 1, "spec": "{}"},
        {"op": "begin", "name": "set-up", "command": ["python"], "attempt": 1},
    ]
    for request in asked:
        process.stdin.write(wire.pack({"id": 1, **request}))
        process.stdin.flush()
        answer = wire.read(process.stdout)  # type: ignore[arg-type]
        assert answer is not None
        error = answer[0]["error"]
        assert (error["type"], error["errno"]) == ("PermissionError", errno.EACCES)
        assert error["message"].startswith(f"Permission denied: {locked}")
    process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    for process in disk.glob("experiments/*/*/process.json"):
        agent.stop(process.parent, 0, wait=True)
    # A supervisor that has told how its trainer ended needs another moment to end itself.
    eventually(lambda: subprocess.run(["umount", str(disk)], capture_output=True).returncode == 0)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_full_disk_is_an_error_with_its_number(small_disk: Path) -> None:
    relay = Client(small_disk)
    assert relay("hello")
    fill(small_disk)
    for ask in (
        lambda: relay("write", os.urandom(100_000), path="files/a", offset=0),
        lambda: start(relay),
    ):
        with pytest.raises(Refused) as refused:
            ask()
        assert refused.value.errno == errno.ENOSPC
        assert "No space left on device" in refused.value.message
    (small_disk / "filler").unlink()
    assert start(relay) == "started"
    assert ended(relay)["code"] == 0
    relay.end()


def test_a_disk_that_fills_while_a_run_trains_is_told_and_the_run_can_be_stopped(small_disk: Path) -> None:
    relay = Client(small_disk)
    start(relay, steps=100_000)
    directory = small_disk / "experiments" / RUN
    eventually(lambda: (directory / "checkpoints").exists())
    fill(small_disk)
    end = ended(relay)
    assert end["code"] == 1
    assert "No space left on device" in end["log"]
    relay.end()


def test_a_run_on_a_full_disk_can_be_stopped(small_disk: Path) -> None:
    relay = Client(small_disk, FAKE_FAULT="hang", FAKE_FAULT_STEP="1")
    start(relay)
    eventually(lambda: story_so_far(relay))
    fill(small_disk)
    relay("stop", run=RUN, grace=60)
    eventually(lambda: relay("stop", run=RUN, grace=0)[0]["gone"])
    assert ended(relay)["signal"] == signal.SIGKILL
    relay.end()


# Several processes ----------------------------------------------------------------------------------------------------


WORKER = """
import json, os, pathlib, sys, time
directory = pathlib.Path(sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--only") + 1])
(directory / ("rank-" + os.environ["RANK"])).write_text(str(os.getpid()))
while not (directory / "stop").exists():
    time.sleep(0.05)
time.sleep(1)  # it writes its checkpoint
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "left well", flush=True)
"""


@pytest.fixture
def several(tmp_path: Path) -> Iterator[tuple[Path, list[int]]]:
    """The directory of a run of two processes under torchrun that heed the stop file, and their pids."""
    package, directory = tmp_path / "package", tmp_path / "experiment" / "small"
    (package / "trainer").mkdir(parents=True)
    for name in ("__init__.py", "agent.py"):
        (package / "trainer" / name).write_bytes((agent.ROOT / "trainer" / name).read_bytes())
    (package / "trainer" / "__main__.py").write_text(WORKER)
    command = [sys.executable, "-m", "trainer.agent", "start", str(directory)]
    env = {**os.environ, "KANGAROO_PROCESSES": "2"}
    env.pop("KANGAROO_TRAINER", None)
    subprocess.run(command, cwd=package, env=env, check=True, stdout=subprocess.DEVNULL)
    ranks = [directory / "rank-0", directory / "rank-1"]
    eventually(lambda: all(rank.exists() and rank.read_text() for rank in ranks), 120)
    yield directory, [int(rank.read_text()) for rank in ranks]
    agent.stop(directory, 0, wait=True)


def test_several_processes_are_asked_by_the_file_and_left_in_peace(several: tuple[Path, list[int]]) -> None:
    directory, _ = several
    agent.stop(directory, 60, wait=True)
    end = agent.status(directory)["exit"]
    assert end["code"] == 0
    assert {line for line in end["log"].splitlines() if "left well" in line} == {
        "rank 0 of 2 left well",
        "rank 1 of 2 left well",
    }
    assert not json.loads((directory / "stop").read_text()).get("signalled")


@pytest.mark.parametrize("supervised", [True, False])
def test_several_processes_are_killed_with_torchrun(several: tuple[Path, list[int]], supervised: bool) -> None:
    directory, pids = several
    process = json.loads((directory / "process.json").read_text())
    assert all(os.getsid(pid) != os.getsid(process["trainer"]["pid"]) for pid in pids), "torchrun's own doing"
    if not supervised:
        kill(process["supervisor"]["pid"])
        eventually(lambda: not agent.is_alive(process["supervisor"]))
    agent.stop(directory, 0, wait=True)
    eventually(lambda: not any(agent.started_at(pid) for pid in pids))


def test_children_of_a_dead_trainer_in_sessions_of_their_own_are_killed(root: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'], start_new_session=True)\n"
        "time.sleep(3600)\n"
    )
    relay = Client(root, KANGAROO_TRAINER=json.dumps([sys.executable, "-c", code]))
    start(relay)
    trainer = relay("status", run=RUN)[0]["pid"]
    [worker] = eventually(lambda: children(trainer))
    kill(trainer)
    assert ended(relay)["signal"] == signal.SIGKILL
    assert agent.started_at(worker) is None
    relay.end()
