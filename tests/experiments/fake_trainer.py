"""A trainer that trains nothing, in milliseconds: it speaks the event stream and keeps the run directory's rules.

    python fake_trainer.py run SPEC.json --out DIR --only NAME --resume

`test_trainer_contract.py` holds it and the real trainer to the same promises. Tests bend it with the environment:

    FAKE_STEP_SECONDS   how long a step takes (0.01)
    FAKE_FAULT          what goes wrong at FAKE_FAULT_STEP (20), in the models named by FAKE_FAULT_MODEL (all):
                        exit | diverged | disk_full | memory | garbage | hang, which ignores every wish to stop
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0.01"))
FAULT = os.environ.get("FAKE_FAULT", "")
FAULT_STEP = int(os.environ.get("FAKE_FAULT_STEP", "20"))
FAULT_MODELS = os.environ.get("FAKE_FAULT_MODEL", "")
CHECKPOINT_EVERY = 10
EVAL_EVERY = 10
TOKENS = 64


class Stream:
    def __init__(self, path: Path) -> None:
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self.file.truncate(len(whole))
        self.file.seek(len(whole))
        self.events = [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        self.seq = max((event["seq"] for event in self.events), default=-1) + 1

    def __call__(self, kind: str, **fields: Any) -> None:
        event = {"seq": self.seq, "at": datetime.now(UTC).isoformat(), "kind": kind, **fields}
        self.file.write(json.dumps(event).encode() + b"\n")
        self.file.flush()
        self.seq += 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run"])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", required=True)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    return run(json.loads(given.spec.read_text()), given.only, given.out / given.only)


def run(spec: dict[str, Any], name: str, directory: Path) -> int:
    emit = Stream(directory / "events.jsonl")
    if any(event["kind"] == "finished" for event in emit.events):
        return 0
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    total = spec["models"][name].get("train", {}).get("max_steps") or spec["train"]["max_steps"]
    emit(
        "started",
        attempt=int(os.environ.get("KANGAROO_ATTEMPT", "1")),
        pid=os.getpid(),
        hostname="fake",
        versions={"environment": json.dumps(sorted(os.environ))},
    )
    emit("preparing", what="corpus", done=1, total=1)
    checkpoints = sorted((directory / "checkpoints").glob("step-*"))
    first = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    emit("prepared", **prepared(total, first))
    init = spec["models"][name]["init"]
    if init["kind"] == "grow" and not first:
        if not (directory.parent / init["parent"] / "model").is_dir():
            emit("failed", reason="bad_checkpoint", message=f"{init['parent']} has no model", step=0)
            return 1
        emit("grown", **grown(init))
    fault = FAULT if not FAULT_MODELS or name in FAULT_MODELS.split(",") else ""
    for step in range(first + 1, total + 1):
        time.sleep(STEP_SECONDS)
        if fault and step == FAULT_STEP and (code := go_wrong(fault, emit, step)):
            return code
        emit("train", **progress(step), cross_entropy=loss(step), lr=1e-3, grad_norm=1.0, tokens_per_second=1000.0)
        if step % EVAL_EVERY == 0:
            emit("eval", **evaluation("validation", step))
        if step % CHECKPOINT_EVERY == 0:
            save(emit, directory, step)
        if asked or (directory / "stop").exists():
            path = save(emit, directory, step)
            emit("stopped", step=step, checkpoint=path)
            return 0
    emit("eval", **evaluation("test", total))
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "model.safetensors").write_bytes(b"weights")
    more = {"eval_seconds": 0.1, "setup_seconds": 0.1, "tokens_per_second": 1000.0, "peak_memory_bytes": 1000}
    emit("finished", **progress(total), **more, model="model")
    return 0


def go_wrong(fault: str, emit: Stream, step: int) -> int:
    if fault == "exit":
        print("Traceback (most recent call last):\nValueError: the fake trainer was told to fail", flush=True)
        return 3
    if fault == "memory":
        print("MemoryError", flush=True)
        return 1
    if fault == "disk_full":
        print("OSError: [Errno 28] No space left on device", flush=True)
        return 1
    if fault == "diverged":
        nan = {**progress(step), "cross_entropy": None, "lr": 1e-3, "grad_norm": None, "tokens_per_second": 1000.0}
        emit("train", **nan)
        emit("failed", reason="diverged", message=f"the loss was not a number at step {step}", step=step)
        return 1
    if fault == "garbage":
        emit.file.write(b"\xff\x00 this is no event\n")
        emit.file.flush()
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        emit("warning", message="hangs")
        time.sleep(3600)
    return 0


def save(emit: Stream, directory: Path, step: int) -> str:
    path = directory / "checkpoints" / f"step-{step:06d}"
    if not path.exists():
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"weights" * 1000)
        emit("checkpoint", step=step, path=f"checkpoints/{path.name}", bytes=7000, seconds=0.01)
    return f"checkpoints/{path.name}"


def loss(step: int) -> float:
    return 2.0 + 8.0 / (1 + step)


def progress(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * TOKENS, "flops": step * 1e6, "train_seconds": step * 0.01}


def evaluation(split: str, step: int) -> dict[str, Any]:
    entropy = loss(step)
    figures = {"cross_entropy": entropy, "perplexity": math.exp(entropy), "bits_per_byte": entropy / 3}
    return {**progress(step), **figures, "split": split, "accuracy": 0.3, "n_tokens": 1000, "eval_seconds": 0.01}


def prepared(total: int, first: int) -> dict[str, Any]:
    return {
        "parameters": 2000,
        "non_embedding_parameters": 1000,
        "d_vocab": 300,
        "train_tokens": 10_000,
        "validation_tokens": 1000,
        "test_tokens": 1000,
        "bytes_per_token": 3.0,
        "data_fingerprint": "fake",
        "total_steps": total,
        "tokens_per_step": TOKENS,
        "flops_per_token": 1e6 / TOKENS,
        "device": "cpu",
        "device_name": "fake",
        "precision": "fp32",
        "threads": int(os.environ.get("KANGAROO_THREADS", "1")),
        "seed": 0,
        "resumed_from": first or None,
        "setup_seconds": 0.1,
        "versions": {},
    }


def grown(init: dict[str, Any]) -> dict[str, Any]:
    measured = {"cross_entropy_before": 2.5, "cross_entropy_after": 2.5, "max_logit_difference": 0.0}
    more = {"logit_scale": 10.0, "kl_divergence": 0.0, "n_tokens": 1000, "seconds": 0.1, "new_parameters": 1000}
    rules = {"parent": init["parent"], "width": init["width"], "depth": init["depth"], "preserves": True}
    return {**rules, **measured, **more}


if __name__ == "__main__":
    sys.exit(main())
