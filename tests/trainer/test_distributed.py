"""One run in several processes: real torchrun, gloo, pico models. A GPU and NCCL are not tested here."""

from __future__ import annotations

import contextlib
import itertools
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

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.trainer import pico
from tests.trainer.test_evaluate import held_out, model_of
from tests.trainer.texts import SMALL, begin, events, experiment, last, losses, wait_for, write
from trainer.evaluate import evaluate
from trainer.processes import Processes
from trainer.run import run
from trainer.spec import ExperimentSpec, parse_spec
from trainer.train import Batches, Meter, State

#: In float32, as far as sums in another order may differ after a dozen steps.
CLOSE = 1e-5


@pytest.fixture
def torchrun(cache: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Begin a run by several processes; its output goes to `said`. What is left at the end is killed."""
    begun: list[subprocess.Popen[bytes]] = []

    def torchrun(spec: ExperimentSpec, name: str, out: Path, n: int = 2, **environment: str) -> subprocess.Popen[bytes]:
        command: list[object] = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
        ]
        command += ["--nproc-per-node", n, "-m", "trainer", "run", write(spec, tmp_path / "spec.json"), "--out", out]
        command += ["--only", name, "--resume", "--cache", cache, "--threads", n]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(
                list(map(str, command)), stdout=said, stderr=said, env=environment, start_new_session=True
            )
        begun.append(process)
        return process

    yield torchrun
    for process in begun:
        for pid in [process.pid, *ranks(process)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        process.wait()


def ranks(torchrun: subprocess.Popen[bytes]) -> list[int]:
    """The process ids of a living torchrun's processes, in the order of their ranks."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def ended(torchrun: subprocess.Popen[bytes], said: Path) -> int:
    try:
        return torchrun.wait(timeout=120)
    except subprocess.TimeoutExpired:
        raise AssertionError(said.read_text()) from None


def alone(spec: ExperimentSpec, name: str, out: Path, cache: Path, stop_after: int | None = None) -> None:
    """The same by one process, this one; `stop_after` so many steps if told."""
    asked = itertools.count()

    def stop() -> bool:
        return stop_after is not None and bool(events(out / name, "prepared")) and next(asked) >= stop_after

    last = list(run(spec, name, out / name, cache=cache, threads=1, resume=True, stop=stop))[-1]
    assert last.kind == ("finished" if stop_after is None else "stopped")


def untied(spec: ExperimentSpec) -> ExperimentSpec:
    held = spec.model_dump(mode="json")
    for model in held["models"].values():
        model["tie_embeddings"] = False
    return parse_spec(held)


def same(found: Path, expected: Path, kinds: tuple[str, ...] = ("train", "eval")) -> None:
    """Whether two runs report the same of all that does not depend on the clock, but for rounding."""
    clocks = ("seq", "at", "train_seconds", "eval_seconds", "tokens_per_second")
    for kind in kinds:
        ours, theirs = events(found, kind), events(expected, kind)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            for key in one.keys() - set(clocks) - {"symmetry"}:
                assert one[key] == (other[key] if isinstance(other[key], str) else pytest.approx(other[key], rel=CLOSE))
            widths = [[row["effective_width"] for row in event.get("symmetry") or []] for event in (one, other)]
            assert widths[0] == widths[1]


# --- The same losses --------------------------------------------------------------------------------------------------


def test_two_processes_report_what_one_does(text: Path, tmp_path: Path, cache: Path, torchrun: Any) -> None:
    spec = experiment(text, "gpt2")
    process = torchrun(spec, "small", tmp_path / "two")
    alone(spec, "small", tmp_path / "one", cache)
    assert ended(process, tmp_path / "said") == 0
    one, two = tmp_path / "one" / "small", tmp_path / "two" / "small"
    same(two, one)
    assert [e["text"] for e in events(two, "sample")] == [e["text"] for e in events(one, "sample")]
    assert [e["path"] for e in events(two, "checkpoint")] == [e["path"] for e in events(one, "checkpoint")]
    for key in ("step", "tokens", "flops"):
        assert last(two)[key] == last(one)[key]
    said, theirs = events(two, "prepared")[0], events(one, "prepared")[0]
    assert (said["processes"], said["threads"], theirs["processes"]) == (2, 1, 1)
    assert said["tokens_per_step"] == theirs["tokens_per_step"]
    lines = (two / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(len(lines)))
    shown = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert shown == [json.loads(line) for line in lines]  # nothing more, and nothing twice


def test_a_run_of_one_process_goes_on_with_two_and_with_one_again(
    text: Path, tmp_path: Path, cache: Path, torchrun: Any
) -> None:
    spec = untied(experiment(text, "gpt2"))
    alone(spec, "small", tmp_path / "parts", cache, stop_after=3)
    process = torchrun(spec, "small", tmp_path / "parts")
    alone(spec, "small", tmp_path / "whole", cache)
    assert ended(process, tmp_path / "said") == 0
    parts, whole = tmp_path / "parts" / "small", tmp_path / "whole" / "small"
    same(parts, whole)
    assert [e["resumed_from"] for e in events(parts, "prepared")] == [None, 3]
    shutil.rmtree(parts / "model")
    lines = (parts / "events.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line).get("path") == "checkpoints/step-000010")
    (parts / "events.jsonl").write_text("".join(lines[: at + 1]))  # as if it had ended there
    alone(spec, "small", tmp_path / "parts", cache)
    assert events(parts, "prepared")[-1]["resumed_from"] == 10
    same(parts, whole)


def test_a_model_is_grown_twice_and_trained_by_two(text: Path, tmp_path: Path, cache: Path, torchrun: Any) -> None:
    """From its parent, and once more on the way: each process has the same weights, moments and rates after it."""
    held = untied(experiment(text, "llama")).model_dump(mode="json")
    rung = {"shape": SMALL | {"d_mlp": 64}, "steps": 4}
    held["models"]["scaled"]["init"] |= {"ladder": [rung], "optimizer": "grown", "lr_by_width": True}
    spec = parse_spec(held)
    alone(spec, "small", tmp_path / "one", cache)
    shutil.copytree(tmp_path / "one" / "small" / "model", tmp_path / "two" / "small" / "model")
    process = torchrun(spec, "scaled", tmp_path / "two")
    alone(spec, "scaled", tmp_path / "one", cache)
    assert ended(process, tmp_path / "said") == 0
    same(tmp_path / "two" / "scaled", tmp_path / "one" / "scaled")
    both = [events(tmp_path / out / "scaled", "grown") for out in ("two", "one")]
    assert [e["step"] for e in both[0]] == [0, 4]
    for ours, theirs in zip(*both, strict=True):
        for key in ("cross_entropy_before", "cross_entropy_after", "new_parameters", "n_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=CLOSE)
    assert not (tmp_path / "two" / "scaled" / ".grown").exists()


# --- Ends and losses of processes -------------------------------------------------------------------------------------


def test_a_lost_process_ends_the_run_and_it_goes_on_until_it_is_stopped(
    text: Path, tmp_path: Path, cache: Path, torchrun: Any
) -> None:
    spec = experiment(text, max_steps=100_000, eval_every=100_000, checkpoint_every=50, lr=1e-3)
    directory = tmp_path / "out" / "small"

    # A process is killed: the other one notices, and the whole ends.
    process = torchrun(spec, "small", tmp_path / "out")
    wait_for(directory, "checkpoint")
    os.kill(ranks(process)[1], signal.SIGKILL)
    assert ended(process, tmp_path / "said") != 0
    assert (last(directory)["kind"], last(directory)["reason"]) == ("failed", "error")
    assert last(directory)["message"] == "One of the run's 2 processes was lost; its log may say why."

    # torchrun itself is killed, which leaves its processes to themselves: they end.
    begun = len(events(directory, "checkpoint"))
    process = torchrun(spec, "small", tmp_path / "out")
    left = until(lambda: len(events(directory, "checkpoint")) > begun and ranks(process))
    process.kill()
    until(lambda: not any(Path(f"/proc/{pid}/environ").exists() for pid in left))

    # TERM to its process group, as the agent sends it: a checkpoint, and the end. Its own code torchrun gives itself.
    process = torchrun(spec, "small", tmp_path / "out")
    until(lambda: len(events(directory, "prepared")) == 3 and last(directory)["kind"] in ("train", "checkpoint"))
    os.killpg(process.pid, signal.SIGTERM)
    ended(process, tmp_path / "said")
    stopped = last(directory)
    assert stopped["kind"] == "stopped"
    assert stopped["checkpoint"] == f"checkpoints/step-{stopped['step']:06d}"
    assert (directory / stopped["checkpoint"] / "model.safetensors").exists()

    # A stop file: the same, and all is well.
    process = torchrun(spec, "small", tmp_path / "out")
    until(lambda: len(events(directory, "prepared")) == 4 and last(directory)["kind"] in ("train", "checkpoint"))
    (directory / "stop").touch()
    assert ended(process, tmp_path / "said") == 0
    assert last(directory)["kind"] == "stopped"
    assert last(directory)["step"] > stopped["step"] == events(directory, "prepared")[3]["resumed_from"]

    # Steps that were made twice gave the same both times (`losses` sees to it), and those of an uninterrupted run.
    alone(spec, "small", tmp_path / "alone", cache, stop_after=120)
    found, expected = losses(directory), losses(tmp_path / "alone" / "small")
    assert len(expected) > 2
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_processes_that_begin_with_a_checkpoint_notice_alike_what_is_no_longer_a_number(
    text: Path, tmp_path: Path, cache: Path, torchrun: Any
) -> None:
    alone(experiment(text), "small", tmp_path, cache)
    source = tmp_path / "small" / "model"
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(3e38)  # at the edge of what a float32 holds
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    held = experiment(text).model_dump(mode="json")
    held["data"]["tokenizer"] = {"kind": "pretrained", "name": str(source)}
    held["models"] = {"base": {"init": {"kind": "checkpoint", "path": str(source)}}}
    process = torchrun(parse_spec(held), "base", tmp_path)
    assert ended(process, tmp_path / "said") == 1
    failed = last(tmp_path / "base")
    assert (failed["kind"], failed["reason"], failed["step"]) == ("failed", "diverged", 1)
    assert failed["message"].startswith("The gradient is not a finite number at step 1.")


def test_an_experiment_that_is_killed_does_not_leave_its_training_behind(
    text: Path, tmp_path: Path, cache: Path
) -> None:
    # So many steps that a training event, which would find its reader gone, is hours away.
    endless = 2_000_000_000
    spec = experiment(text, max_steps=endless, eval_every=endless, checkpoint_every=endless)
    path, out = write(spec, tmp_path / "spec.json"), tmp_path / "out"
    process = begin("run", path, "--out", out, "--cache", cache, "--threads", 1, out=tmp_path / "said")
    wait_for(out / "small", "eval")
    process.kill()
    process.wait()
    until(lambda: last(out / "small")["kind"] == "stopped")
    assert (out / "small" / last(out / "small")["checkpoint"]).is_dir()


def until(holds: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait until it does; what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not in {seconds} s")


def test_what_went_wrong_in_another_process_is_the_runs_failure(text: Path, tmp_path: Path, torchrun: Any) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import numpy\n"
        "    def stack(*arrays): raise MemoryError('no room for the windows')\n"
        "    numpy.stack = stack\n"
    )
    process = torchrun(experiment(text), "small", tmp_path / "out", PYTHONPATH=str(tmp_path / "broken"))
    assert ended(process, tmp_path / "said") != 0
    failed = last(tmp_path / "out" / "small")
    assert (failed["kind"], failed["reason"]) == ("failed", "out_of_memory")
    assert failed["message"] == "There was not enough memory: no room for the windows"
    said = (tmp_path / "said").read_text()
    assert "Process 1 of 2: There was not enough memory: no room for the windows" in said
    assert "sitecustomize.py" in said  # where it happened


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_done(
    text: Path, tmp_path: Path, torchrun: Any
) -> None:
    process = torchrun(experiment(text, batch_size=4), "small", tmp_path / "out", n=3)
    assert ended(process, tmp_path / "said") != 0
    lines = (tmp_path / "out" / "small" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["started", "failed"]
    failed = last(tmp_path / "out" / "small")
    assert failed["reason"] == "error"
    assert failed["message"] == (
        "train.batch_size 4: 3 processes share each batch in equal parts; 3 or 6 would be right, or another number of "
        "processes."
    )


# --- Shares -----------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 5), each=st.integers(1, 4), step=st.integers(0, 30))
def test_the_shares_of_all_processes_are_the_batch(count: int, each: int, step: int) -> None:
    tokens, size = np.arange(300, dtype=np.uint16), count * each
    whole, _ = Batches(tokens, 10, size, 0).at(step, torch.device("cpu"))
    shares = [Processes(rank, count).share(size) for rank in range(count)]
    parts = [Batches(tokens, 10, size, 0, share).at(step, torch.device("cpu"))[0] for share in shares]
    assert torch.equal(torch.cat(parts), whole)
    assert {len(part) for part in parts} == {each}


class Summed(Processes):
    """One of several whose figures are added up one process after the other: `sums` holds those of the ones before."""

    def __init__(self, rank: int, count: int, sums: list[torch.Tensor]):
        super().__init__(rank, count)
        self.sums, self.at = sums, itertools.count()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        place = next(self.at)
        if place == len(self.sums):
            self.sums.append(torch.zeros_like(values))
        self.sums[place] += values
        values.copy_(self.sums[place])
        return values


@pytest.mark.parametrize("windows", [40, 2])
def test_an_evaluation_that_is_shared_gives_the_figures_of_one_that_is_not(windows: int) -> None:
    model, tokens = model_of("llama"), held_out(windows)
    whole = evaluate(model, tokens, precision="fp32", bytes_per_token=3.0)
    sums: list[torch.Tensor] = []
    for rank in range(3):
        shared = evaluate(model, tokens, precision="fp32", bytes_per_token=3.0, processes=Summed(rank, 3, sums))
    assert shared == pytest.approx(whole, rel=1e-6)
    assert shared["n_tokens"] == windows * pico.N_POSITIONS


def test_a_loss_is_the_mean_of_all_processes_and_one_wish_to_stop_is_everybodys() -> None:
    from tests.trainer.test_train import task

    sums: list[torch.Tensor] = []
    for rank, wish in ((0, False), (1, True), (2, False)):
        meter = Meter(State(), task(20), 1, lambda wish=wish: wish)  # type: ignore[misc]
        meter.processes = Summed(rank, 3, sums)
        meter.start()
        found = list(meter.stepped(torch.tensor(float(rank)), torch.tensor(2.0), 0.1))
    assert [e["cross_entropy"] for e in found] == [1.0]
    assert [e["grad_norm"] for e in found] == [2.0]
    assert meter.stopping()
