"""Real text in small helpings, and experiments of a few seconds on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from trainer.display import read_events
from trainer.spec import ExperimentSpec, parse_spec

#: Modules of the standard library that every Python has: about half a megabyte in 24 documents.
MODULES = tuple(
    "abc argparse ast bisect calendar cmd codecs configparser copy csv dataclasses difflib dis enum fractions "  # noqa: SIM905
    "functools heapq inspect ipaddress locale optparse pathlib pickle random".split()
)

#: The corpora that lie beside a developer's checkout; tests that want them are marked `corpora`.
CORPORA = Path(__file__).resolve().parents[3] / "shared" / "data"

SMALL = {"d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 32, "n_layers": 1}
LARGE = {"d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_layers": 2}


def write_modules(folder: Path, modules: tuple[str, ...] = MODULES) -> Path:
    """A folder of `modules`, as .txt files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in modules:
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        if not source.exists():  # a package in some versions
            source = Path(sysconfig.get_path("stdlib"), name, "__init__.py")
        (folder / f"{name}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def experiment(source: Path | str, family: str = "llama", **train: Any) -> ExperimentSpec:
    """small, scaled and large, of a few thousand parameters, 12 steps each unless told otherwise."""
    settings = {
        "n_ctx": 32, "batch_size": 4, "max_steps": 12, "lr": 1e-2, "warmup_steps": 2, "eval_every": 5,
        "eval_tokens": 512, "checkpoint_every": 5, "precision": "fp32",
    }  # fmt: skip
    return parse_spec(
        {
            "name": "pico",
            "data": {"source": str(source), "tokenizer": {"kind": "bpe", "d_vocab": 320}},
            "train": settings | train,
            "models": {
                "small": {"family": family, "shape": SMALL},
                "scaled": {"family": family, "shape": LARGE, "init": {"kind": "grow", "parent": "small"}},
                "large": {"family": family, "shape": LARGE},
            },
        }
    )


def write(spec: ExperimentSpec, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(spec.to_json())
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "trainer", *map(str, arguments)]


def trainer(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m trainer ...`, its output read through pipes."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=os.environ | environment, timeout=300, check=False
    )


def begin(*arguments: object, out: Path) -> subprocess.Popen[bytes]:
    """The same, left running, its output in a file."""
    with out.open("wb") as file:
        return subprocess.Popen(command(*arguments), stdout=file, stderr=subprocess.STDOUT)


def wait_for(directory: Path, kind: str, step: int = 0, seconds: float = 120) -> None:
    """Until the run in `directory` has written an event of that kind, at that step or later."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(e["kind"] == kind and e.get("step", 0) >= step for e in read_events(directory / "events.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no event {kind} at step {step} in {seconds} s: {read_events(directory / 'events.jsonl')}")


def interrupt(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    process.send_signal(number)
    return process.wait(timeout=120)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(directory / "events.jsonl") if event["kind"] == kind]


def losses(directory: Path) -> dict[tuple[str, int], float]:
    """Every loss of a run, by kind and step; a step that was trained twice must have given the same one."""
    found: dict[tuple[str, int], float] = {}
    for event in read_events(directory / "events.jsonl"):
        if event["kind"] in ("train", "eval"):
            key = (event.get("split", "batch"), event["step"])
            assert found.setdefault(key, event["cross_entropy"]) == event["cross_entropy"], key
    return found


def last(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "events.jsonl").read_text().splitlines()[-1])  # type: ignore[no-any-return]
