"""Seconds from the start of a process to its first training step, and to its first answered request.

    python -m benchmarks startup [--repeats 5] [--threads N]

The trainer: `python -m trainer run --only` of a small GPT-2 on Python's standard library, prepared before, with the
events that it writes as marks. Beside it the shortest script that does the same with the Hugging Face Trainer: the same
tokens from the same file, a model of the same shape, one step of the same batch size (`hugging_face` below). Both are
told their threads by OMP_NUM_THREADS. Before its first step a run measures its model's validation loss, which the
Trainer does not: the last row of the run is without that.

The site: `import kangaroo_site.wsgi` in a new process, and gunicorn, as `manage.py up` starts it, to its first answered
request of the home page, with an empty database. All processes alternate; a row is the median of the repeats, least and
most in brackets. CPU seconds are of all threads, and of gunicorn's children too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import _machine as machine
from benchmarks import pages
from benchmarks.pages import ROOT, migrated

Taken = dict[str, tuple[float, float]]  # what -> wall and CPU seconds

SHAPE = {"d_model": 256, "n_heads": 4, "d_head": 64, "d_mlp": 1024, "n_layers": 4}
N_CTX, BATCH, D_VOCAB = 256, 8, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=Path("var/benchmarks/data"))
    parser.add_argument("--hugging-face", type=Path, help=argparse.SUPPRESS)  # the process of the peer
    options = parser.parse_args()
    if options.hugging_face:
        hugging_face(options.hugging_face)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="kangaroo-startup-") as scratch_, machine.watch() as others:
        scratch = Path(scratch_)
        tokens = prepared(options.cache, scratch)
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        site = migrated(scratch / "site")
        for repeat in range(options.repeats + 1):
            measured: Taken = {}
            measured |= kangaroo(scratch, options.cache, environment)
            measured |= peer(tokens, environment)
            measured |= wsgi(site)
            measured |= gunicorn(site)
            if repeat:  # the first round brings files into the page cache and does not count
                for what, seconds in measured.items():
                    taken[what].append(seconds)

    print(f"{options.repeats} repeats, seconds\n\n| from the start of the process | wall | CPU |\n|---|---|---|")
    for what, pairs in taken.items():
        wall, cpu = zip(*pairs, strict=True)
        print(f"| {what} | {machine.spread(wall)} | {machine.spread(cpu)} |")
    print(f"\n{machine.line(options.threads)}. Others used {others.cores:.2f} cores meanwhile.")


# --- A training process -----------------------------------------------------------------------------------------------


def prepared(cache: Path, scratch: Path) -> Path:
    """The file of training tokens, and spec.json in `scratch`. Prepares the text if no run has."""
    from trainer.data import prepare
    from trainer.spec import parse_spec

    spec = parse_spec(
        {
            "name": "One step",
            "data": {"source": "python-stdlib", "tokenizer": {"kind": "bpe", "d_vocab": D_VOCAB}},
            "train": {"n_ctx": N_CTX, "batch_size": BATCH, "max_steps": 1, "warmup_steps": 0},
            "models": {"small": {"family": "gpt2", "shape": SHAPE}},
        }
    )
    (scratch / "spec.json").write_text(spec.to_json())
    return prepare(spec.data, cache, lambda what, done, total: None).train.path


def kangaroo(scratch: Path, cache: Path, environment: dict[str, str]) -> Taken:
    out = scratch / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "trainer", "run", str(scratch / "spec.json"), "--out", str(out)]
    command += ["--only", "small", "--cache", str(cache.absolute())]  # as the site starts it: one model, one process
    marks: dict[str, tuple[float, float]] = {}  # the first event of each kind: wall and CPU seconds
    measuring = 0.0
    began = time.time()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            at = datetime.fromisoformat(event["at"]).timestamp()
            marks.setdefault(event["kind"], (at - began, cpu_seconds(process.pid)))
            measuring += event.get("eval_seconds", 0.0)
            if event["kind"] == "train":
                break
        else:
            raise SystemExit(f"the run ended before its first step; it wrote {', '.join(marks)}")
        process.kill()
    wall, cpu = marks["train"]
    return {
        "Kangaroo: `started` is written": marks["started"],
        "Kangaroo: the tokens, torch and the model are there": marks["prepared"],
        "Kangaroo: the untrained model is measured": marks["eval"],
        "Kangaroo: first step": (wall, cpu),
        "Kangaroo: first step, without that measurement": (
            wall - measuring,
            cpu - (marks["eval"][1] - marks["prepared"][1]),
        ),
    }


def peer(tokens: Path, environment: dict[str, str]) -> Taken:
    command = [sys.executable, "-m", "benchmarks.startup", "--hugging-face", str(tokens.absolute())]
    environment = environment | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    began = time.time()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not any(line.strip() == "first step" for line in process.stdout):
            raise SystemExit("the Trainer ended before its first step")
        seconds = time.time() - began
        cpu = cpu_seconds(process.pid)
        process.kill()
    return {"Hugging Face Trainer: first step": (seconds, cpu)}


def hugging_face(tokens: Path) -> None:
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Says(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            print("first step", flush=True)

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        held = np.memmap(tokens, dtype=np.uint16, mode="r")

        def __len__(self) -> int:
            return len(self.held) // N_CTX

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            row = torch.from_numpy(self.held[i * N_CTX : (i + 1) * N_CTX].astype(np.int64))
            return {"input_ids": row, "labels": row}

    config = GPT2Config(
        vocab_size=D_VOCAB, n_positions=N_CTX, n_embd=SHAPE["d_model"], n_layer=SHAPE["n_layers"],
        n_head=SHAPE["n_heads"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            per_device_train_batch_size=BATCH,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Rows(), callbacks=[Says()]).train()


# --- The site ---------------------------------------------------------------------------------------------------------


def wsgi(environment: dict[str, str]) -> Taken:
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", "import kangaroo_site.wsgi"], cwd=ROOT, env=environment, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"the site: `import kangaroo_site.wsgi`, whole process": (time.perf_counter() - began, cpu)}


def gunicorn(environment: dict[str, str]) -> Taken:
    began = time.perf_counter()
    with pages.gunicorn(environment) as (process, port):
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.005)
            finally:
                connection.close()
        return {"the site: gunicorn's first answer": (time.perf_counter() - began, cpu_seconds(process.pid))}


def cpu_seconds(pid: int) -> float:
    """Of a living process, with all its threads, and its living and ended children (Linux)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(int(field) for field in after_name[11:15]) / os.sysconf("SC_CLK_TCK")  # utime stime cutime cstime
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_seconds(int(child)) for child in children)


if __name__ == "__main__":
    main()
