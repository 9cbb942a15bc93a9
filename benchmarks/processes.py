"""Training and evaluation by one process of N threads and by N processes of one, as a ratio.

    python -m benchmarks processes [--n 2] [--rounds 5] [--steps 40]

Both are `python -m trainer run --only` of a small GPT-2 on the same batches of Python's standard library, the second
started by torchrun, with gloo. A round runs each once, one after the other; its figures are the run's own: the time
between the fifth step and the last, and that of the test evaluation. Ratios are medians over the rounds, least and most
in brackets. The losses of the two must agree.

It shows what averaging gradients costs where both use the same cores; what a second GPU brings it cannot show.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _machine as machine
from benchmarks.pages import ROOT
from benchmarks.startup import BATCH, D_VOCAB, N_CTX, SHAPE
from trainer.display import read_events
from trainer.spec import parse_spec

WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=len(os.sched_getaffinity(0)), help="processes, or threads of the one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=Path("var/benchmarks/data"))
    options = parser.parse_args()
    spec = parse_spec(
        {
            "name": "Processes",
            "data": {"source": "python-stdlib", "tokenizer": {"kind": "bpe", "d_vocab": D_VOCAB}},
            "train": {
                "n_ctx": N_CTX, "batch_size": BATCH, "max_steps": options.steps, "warmup_steps": 0,
                "eval_every": options.steps, "eval_tokens": 4 * BATCH * N_CTX, "precision": "fp32",
            },
            "models": {"small": {"family": "gpt2", "shape": SHAPE}},
        }
    )  # fmt: skip
    rates: dict[int, list[float]] = {1: [], options.n: []}
    evaluations: dict[int, list[float]] = {1: [], options.n: []}
    losses: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="kangaroo-processes-") as scratch, machine.watch() as others:
        path = Path(scratch, "spec.json")
        path.write_text(spec.to_json())
        for i in range(options.rounds):
            for count in rates:
                events = run(path, Path(scratch, f"{i}-{count}"), count, options)
                steps = [event for event in events if event["kind"] == "train"]
                begun, end = steps[WARM_UP - 1], steps[-1]
                seconds = end["train_seconds"] - begun["train_seconds"]
                rates[count].append((end["tokens"] - begun["tokens"]) / seconds)
                test = next(event for event in events if event["kind"] == "eval" and event["split"] == "test")
                evaluations[count].append(test["n_tokens"] / test["eval_seconds"])
                losses[count] = test["cross_entropy"]

    print(f"{options.rounds} rounds, {BATCH} x {N_CTX} tokens a step, fp32\n")
    print(f"| | training, tokens a second | evaluation | {options.n} processes to 1: training | evaluation |")
    print("|---|---|---|---|---|")
    for count, title in ((1, f"1 process of {options.n} threads"), (options.n, f"{options.n} processes of 1 thread")):
        ratios = [
            machine.spread([ours / base for ours, base in zip(held[count], held[1], strict=True)])
            for held in (rates, evaluations)
        ]
        figures = [machine.spread(held[count], 0) for held in (rates, evaluations)]
        print(f"| {title} | {' | '.join([*figures, *ratios])} |")
    print(f"\nTest losses {losses[1]:.6f} and {losses[options.n]:.6f}.")
    print(f"{machine.line()}. Others used {others.cores:.2f} cores meanwhile.")


def run(spec: Path, out: Path, count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The events of a run by `count` processes that have `options.n` threads in all."""
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    command = [sys.executable, *(["-m", *torchrun] if count > 1 else []), "-m", "trainer", "run", str(spec)]
    command += ["--out", str(out), "--only", "small", "--cache", str(options.cache.absolute())]
    command += ["--threads", str(options.n)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.n // count)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return read_events(out / "small" / "events.jsonl")


if __name__ == "__main__":
    main()
