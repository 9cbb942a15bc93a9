"""The fake trainer is held to the promises of the real one, so that tests with it say something about the site."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import FAKE_TRAINER, a_spec, eventually
from trainer import agent
from trainer.events import Event, parse_event

PROGRAMS = {"fake": [sys.executable, str(FAKE_TRAINER)], "real": [sys.executable, "-m", "trainer"]}


@pytest.fixture(params=list(PROGRAMS))
def program(request: pytest.FixtureRequest) -> list[str]:
    return PROGRAMS[request.param]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus and its tokens, made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def out(tmp_path: Path, cache: Path) -> Path:
    corpus = cache / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for n in range(40):
            (corpus / f"{n}.txt").write_text("".join(f"The kangaroo number {n} took {m} leaps.\n" for m in range(60)))
    for name in ("small", "scaled"):
        spec = a_spec(20, ("small", "scaled")).model_dump(mode="json")
        spec["data"]["source"] = str(corpus)
        spec["data"]["tokenizer"]["d_vocab"] = 300
        spec["train"] |= {"checkpoint_every": 10, "eval_tokens": 256}
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(json.dumps(spec))
    return tmp_path


def run(program: list[str], out: Path, cache: Path, name: str, attempt: int = 1) -> subprocess.Popen[bytes]:
    command = [*program, "run", str(out / name / "spec.json"), "--out", str(out), "--only", name, "--resume"]
    env = {**os.environ, "KANGAROO_ATTEMPT": str(attempt), "KANGAROO_DATA_CACHE": str(cache), "KANGAROO_THREADS": "1"}
    env["FAKE_STEP_SECONDS"] = "0.01"
    with open(out / name / "log.txt", "ab") as log:
        return subprocess.Popen(command, cwd=agent.ROOT, env=env, stdout=log, stderr=log)


def events(out: Path, name: str) -> list[Event]:
    return [parse_event(line) for line in (out / name / "events.jsonl").read_bytes().splitlines()]


def test_the_stream_keeps_its_promises(program: list[str], out: Path, cache: Path) -> None:
    assert run(program, out, cache, "small").wait() == 0, (out / "small" / "log.txt").read_text()
    told = events(out, "small")
    kinds = [event.kind for event in told]
    assert [event.seq for event in told] == list(range(len(told)))
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert kinds.index("prepared") < kinds.index("train")
    assert {"train", "eval", "checkpoint"} <= set(kinds)
    assert {event.split for event in told if event.kind == "eval"} == {"validation", "test"}
    prepared, finished = told[kinds.index("prepared")], told[-1]
    assert prepared.total_steps == finished.step == 20
    assert prepared.threads == 1
    assert told[0].attempt == 1
    steps = [event.step for event in told if event.kind in ("train", "eval")]
    assert steps == sorted(steps)
    assert (out / "small" / "model").is_dir()
    # Finished is finished: a second call does nothing, well.
    before = (out / "small" / "events.jsonl").read_bytes()
    assert run(program, out, cache, "small", attempt=2).wait() == 0
    assert (out / "small" / "events.jsonl").read_bytes() == before
    # And its child finds it.
    assert run(program, out, cache, "scaled").wait() == 0, (out / "scaled" / "log.txt").read_text()
    assert "grown" in [event.kind for event in events(out, "scaled")]


@pytest.mark.parametrize("how", ["file", "signal"])
def test_a_wish_to_stop_is_answered_with_a_checkpoint_and_taken_up_again(
    program: list[str], out: Path, cache: Path, how: str
) -> None:
    spec = json.loads((out / "small" / "spec.json").read_text())
    spec["train"]["max_steps"] = 5000
    (out / "small" / "spec.json").write_text(json.dumps(spec))
    process = run(program, out, cache, "small")
    stream = out / "small" / "events.jsonl"
    eventually(lambda: stream.exists() and b'"train"' in stream.read_bytes(), seconds=120)
    if how == "file":
        (out / "small" / "stop").touch()
    else:
        process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    (out / "small" / "stop").unlink(missing_ok=True)
    stopped = events(out, "small")[-1]
    assert stopped.kind == "stopped"
    assert stopped.checkpoint is not None
    assert (out / "small" / stopped.checkpoint).is_dir()
    with open(stream, "ab") as torn:
        torn.write(b'{"seq": 99, "ki')
    process = run(program, out, cache, "small", attempt=2)
    eventually(lambda: stream.read_bytes().count(b'"prepared"') == 2, seconds=120)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    told = events(out, "small")
    assert [event.seq for event in told] == list(range(len(told)))
    assert [event.resumed_from for event in told if event.kind == "prepared"] == [None, stopped.step]
    assert [event.attempt for event in told if event.kind == "started"] == [1, 2]


def test_a_child_without_its_parents_weights_fails_with_a_reason(program: list[str], out: Path, cache: Path) -> None:
    assert run(program, out, cache, "scaled").wait() == 1
    failed = events(out, "scaled")[-1]
    assert (failed.kind, failed.reason) == ("failed", "bad_checkpoint")
