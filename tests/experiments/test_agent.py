"""The agent on real processes: started once, seen alive or dead, stopped, read to the last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.live import FAKE_TRAINER, eventually, kill
from trainer import agent


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run directory of 30 quick steps; nothing trains in it any more when the test is over."""
    monkeypatch.setenv("KANGAROO_TRAINER", str(FAKE_TRAINER))
    made = tmp_path / "experiment" / "small"
    made.mkdir(parents=True)
    want(made, steps=30)
    yield made
    agent.stop(made, 0, wait=True)


def want(directory: Path, steps: int) -> None:
    spec = {"train": {"max_steps": steps}, "models": {"small": {"init": {"kind": "random"}}}}
    (directory / "spec.json").write_text(json.dumps(spec))


def events(directory: Path) -> list[dict[str, Any]]:
    path = directory / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def kinds(directory: Path) -> list[str]:
    return [event["kind"] for event in events(directory)]


def ended(directory: Path) -> dict[str, Any]:
    return eventually(lambda: agent.status(directory)["exit"], what="for the end of the trainer")  # type: ignore[no-any-return]


def process(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "process.json").read_text())  # type: ignore[no-any-return]


def test_a_run_that_was_never_started_is_not_alive(tmp_path: Path) -> None:
    assert agent.status(tmp_path) == {"attempt": 0, "alive": False, "pid": None, "at": None, "exit": None}
    assert [frame.kind for frame in agent.tail(tmp_path)] == ["E"]
    assert agent.stop(tmp_path)


def test_a_trainer_runs_in_a_session_of_its_own_and_ends_well(directory: Path) -> None:
    assert agent.start(directory, 1) == "started"
    pid = agent.status(directory)["pid"]
    assert agent.status(directory)["alive"]
    assert os.getsid(pid) == pid
    assert ended(directory)["code"] == 0
    assert kinds(directory)[-1] == "finished"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told whom to kill first")
def test_where_memory_runs_out_the_trainer_goes_first(directory: Path) -> None:
    want(directory, steps=200)
    agent.start(directory, 1)
    trainer, supervisor = agent.status(directory)["pid"], process(directory)["supervisor"]["pid"]
    assert Path(f"/proc/{trainer}/oom_score_adj").read_text().strip() == "500"
    assert int(Path(f"/proc/{supervisor}/oom_score_adj").read_text()) < 500


def test_starting_twice_starts_once(directory: Path) -> None:
    want(directory, steps=200)
    outcomes: list[str] = []
    threads = [threading.Thread(target=lambda: outcomes.append(agent.start(directory, 1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["already"] * 5 + ["started"]
    eventually(lambda: "train" in kinds(directory))
    agent.stop(directory, 0, wait=True)
    assert kinds(directory).count("started") == 1


def test_an_attempt_that_has_ended_is_not_run_again_but_the_next_one_is(directory: Path) -> None:
    agent.start(directory, 1)
    ended(directory)
    assert agent.start(directory, 1) == "finished"
    assert agent.start(directory, 2) == "started"
    assert ended(directory)["attempt"] == 2
    assert kinds(directory).count("finished") == 1


def test_the_stream_is_read_whole_in_complete_lines(directory: Path) -> None:
    agent.start(directory, 1)
    frames = list(agent.tail(directory, 0, poll=0.01, heartbeat=0.02))
    data = [frame for frame in frames if frame.kind == "D"]
    assert all(frame.data.endswith(b"\n") for frame in data)
    assert [frame.offset for frame in data] == [sum(len(d.data) for d in data[:n]) for n in range(len(data))]
    assert b"".join(frame.data for frame in data) == (directory / "events.jsonl").read_bytes()
    assert frames[-1] == agent.Frame("E", (directory / "events.jsonl").stat().st_size)


def test_the_stream_can_be_taken_up_in_the_middle(directory: Path) -> None:
    agent.start(directory, 1)
    ended(directory)
    whole = (directory / "events.jsonl").read_bytes()
    middle = whole.index(b"\n", len(whole) // 2) + 1
    assert b"".join(frame.data for frame in agent.tail(directory, middle)) == whole[middle:]


def test_a_torn_last_line_is_held_back(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"a": 1}\n{"a": ')
    assert list(agent.tail(tmp_path)) == [agent.Frame("D", 0, b'{"a": 1}\n'), agent.Frame("E", 9)]


def test_a_line_longer_than_a_chunk_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "CHUNK", 10)
    lines = b"x" * 95 + b"\n" + b"y\n" * 20
    (tmp_path / "events.jsonl").write_bytes(lines)
    assert b"".join(frame.data for frame in agent.tail(tmp_path)) == lines


def test_a_silent_trainer_is_heard_alive(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "hang")
    agent.start(directory, 1)
    stream = agent.tail(directory, 0, poll=0.01, heartbeat=0.05)
    eventually(lambda: next(stream).kind == "H")


def test_a_stopped_trainer_writes_a_checkpoint_and_goes_on_from_there(directory: Path) -> None:
    want(directory, steps=3000)
    agent.start(directory, 1)
    eventually(lambda: (directory / "checkpoints").exists())
    assert agent.stop(directory, 60, wait=True)
    last = events(directory)[-1]
    assert last["kind"] == "stopped"
    assert (directory / last["checkpoint"]).is_dir()
    assert ended(directory)["code"] == 0
    want(directory, steps=last["step"] + 5)
    assert agent.start(directory, 2) == "started"
    assert not (directory / "stop").exists(), "the wish was for the attempt before"
    ended(directory)
    assert [event["resumed_from"] for event in events(directory) if event["kind"] == "prepared"] == [None, last["step"]]
    assert [event["seq"] for event in events(directory)] == list(range(len(events(directory))))
    assert kinds(directory)[-1] == "finished"


def test_a_trainer_that_will_not_stop_is_killed_when_its_time_is_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", "hang")
    agent.start(directory, 1)
    eventually(lambda: "warning" in kinds(directory))
    assert not agent.stop(directory, 0.3), "asked, and not gone yet"
    assert ended(directory)["signal"] == signal.SIGKILL, "by the supervisor: nobody has called again"


def test_a_wish_to_stop_is_carried_out_without_a_supervisor(directory: Path) -> None:
    want(directory, steps=3000)
    agent.start(directory, 1)
    eventually(lambda: (directory / "checkpoints").exists())
    kill(process(directory)["supervisor"]["pid"])
    eventually(lambda: not agent.is_alive(process(directory)["supervisor"]))
    assert agent.status(directory)["alive"]
    assert agent.stop(directory, 60, wait=True)
    assert kinds(directory)[-1] == "stopped"


def test_an_orphan_keeps_its_directory_to_itself(directory: Path) -> None:
    want(directory, steps=300)
    agent.start(directory, 1)
    kill(process(directory)["supervisor"]["pid"])
    eventually(lambda: not agent.is_alive(process(directory)["supervisor"]))
    assert agent.start(directory, 1) == "already"
    assert agent.start(directory, 2) == "already"
    assert ended(directory)["lost"], "nobody was left to write how it ended"
    assert kinds(directory).count("started") == 1
    assert kinds(directory)[-1] == "finished"
    assert agent.start(directory, 1) == "finished"


def test_a_killed_trainer_is_reported_with_its_signal(directory: Path) -> None:
    want(directory, steps=3000)
    agent.start(directory, 1)
    kill(agent.status(directory)["pid"])
    assert (ended(directory)["signal"], ended(directory)["code"]) == (signal.SIGKILL, None)


def test_a_failed_trainer_is_reported_with_its_last_lines(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "exit")
    agent.start(directory, 1)
    assert ended(directory)["code"] == 3
    assert ended(directory)["log"].endswith("ValueError: the fake trainer was told to fail")


def test_a_trainer_that_cannot_be_started_says_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_TRAINER", '["/nowhere/python"]')
    agent.start(directory, 1)
    assert ended(directory)["code"] == 127
    assert "/nowhere/python" in ended(directory)["log"]


def test_a_machine_that_was_started_anew_takes_the_attempt_up_again(directory: Path) -> None:
    want(directory, steps=3000)
    agent.start(directory, 1)
    eventually(lambda: (directory / "checkpoints").exists())
    record = process(directory)
    for who in ("supervisor", "trainer"):
        kill(record[who]["pid"])
    for who in ("supervisor", "trainer"):
        eventually(lambda who=who: not agent.is_alive(record[who]))
    assert agent.status(directory)["exit"]["lost"]
    assert not agent.status(directory)["exit"]["rebooted"]
    (directory / "process.json").write_text(json.dumps({**record, "boot_id": "the boot before"}))
    assert agent.status(directory)["exit"]["rebooted"]
    want(directory, steps=int(max((directory / "checkpoints").iterdir()).name[-6:]) + 5)
    assert agent.start(directory, 1) == "started"
    ended(directory)
    assert kinds(directory)[-1] == "finished"


def test_a_pid_that_belongs_to_somebody_else_by_now_is_not_the_trainer() -> None:
    mine = agent.identity(os.getpid())
    assert agent.is_alive(mine)
    assert not agent.is_alive({**mine, "started": "1"})


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    who = agent.identity(child.pid)
    assert agent.is_alive(who)
    os.kill(child.pid, signal.SIGKILL)
    eventually(lambda: not agent.is_alive(who))  # nobody has waited for it yet
    child.wait()


def test_the_last_lines_of_a_progress_bar_are_what_it_showed_last(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("one\n 10 %\r 20 %\r 30 %\nthree\n")
    assert agent.last_lines(log, 2) == " 30 %\nthree"
    assert agent.last_lines(tmp_path / "none") == ""


def test_the_command_line_speaks_after_its_sentinel(directory: Path) -> None:
    def call(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "trainer.agent", *arguments]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=agent.ROOT).stdout.splitlines()
        assert lines[0] == agent.SENTINEL
        return lines[1:]

    assert json.loads(call("start", str(directory), "--attempt", "1")[0])["outcome"] == "started"
    stream = call("tail", str(directory), "0")
    assert stream[0].startswith("D 0 ")
    assert stream[-1] == f"E {(directory / 'events.jsonl').stat().st_size}"
    assert json.loads(call("status", str(directory))[0])["exit"]["code"] == 0
    assert json.loads(call("stop", str(directory), "--grace", "1")[0]) == {"gone": True}


def test_the_agent_needs_nothing_but_the_standard_library() -> None:
    code = "import sys; import trainer.agent; print(*sys.modules)"
    isolated = [sys.executable, "-S", "-c", code]  # -S: no site-packages
    loaded = subprocess.run(isolated, capture_output=True, text=True, check=True, cwd=agent.ROOT).stdout.split()
    assert "trainer.agent" in loaded


def test_the_supervisor_leaves_a_sign_of_life(directory: Path) -> None:
    want(directory, steps=3000)
    agent.start(directory, 1)
    before = (directory / "run.lock").stat().st_mtime
    eventually(lambda: (directory / "run.lock").stat().st_mtime > before)
    assert time.time() - before < 60
