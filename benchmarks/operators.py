"""Growth operators side by side on real text: equal compute, learning rates tuned alike, several seeds.

    python -m benchmarks operators --books FOLDER [--seeds 0 1 2] [--arms NAME ...] [--out var/benchmarks/operators]

small 64 / 2 heads of 32 / 96 / 2 layers (0.14M parameters) is trained for 800 steps; every arm then gets the compute
of 300 steps of large, 128 / 4 heads of 32 / 192 / 4 layers (0.69M; llama family, tied head, vocabulary 1,024, batches
of 8 x 128 tokens). A token of small costs a fifth, so small continued makes five times as many steps; what learning the
maps costs is taken off the steps of the arm that learns them. From scratch there are two arms: with that compute too,
so that small is not charged to the others, and with that of small's training on top, so that it is.

Equal for all arms: text, order of batches, AdamW and its settings, warm-up of 30 steps, cosine schedule down to a
tenth, and how the learning rate was found: the best of the same three on a seed of its own, by validation loss. Grown
arms see the first batches of the order again, which small has seen. A seed sets small's and large's first weights, the
order of batches and what growth draws. Runs go through the command line, one at a time; what is finished is not run
again, and `--report` prints what there is.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _machine as machine
from benchmarks.books import events_of, shelf_of
from trainer import budget
from trainer.growth import learned, plan
from trainer.shape import GrowInit, Shape
from trainer.spec import parse_spec

SMALL = Shape(d_model=64, n_heads=2, d_head=32, d_mlp=96, n_layers=2)
LARGE = Shape(d_model=128, n_heads=4, d_head=32, d_mlp=192, n_layers=4)
FAMILY, D_VOCAB, N_CTX, BATCH = "llama", 1024, 128, 8
SMALL_STEPS, STEPS, LEARN_STEPS, WARMUP = 800, 300, 30, 30
LRS = (1e-3, 3e-3, 9e-3)
TUNING_SEED = 100


class Arm(NamedTuple):
    title: str
    shape: Shape = LARGE
    init: dict[str, Any] | None = None  # of growth; None: random
    steps: int = STEPS


def flops_per_token(shape: Shape) -> float:
    return budget.flops_per_token(FAMILY, shape, N_CTX, D_VOCAB, True)


def steps_for(flops: float, shape: Shape) -> int:
    """How many steps that much compute is, at least."""
    return math.floor(flops / (flops_per_token(shape) * BATCH * N_CTX))


EXTRA = STEPS * BATCH * N_CTX * flops_per_token(LARGE)
OF_SMALL = SMALL_STEPS * BATCH * N_CTX * flops_per_token(SMALL)
STACKED = {"width": "duplicate", "depth": "stack", "snr_db": 0.0}
LEARNING = learned.flops(
    plan(FAMILY, SMALL, LARGE, GrowInit(parent="small", **STACKED), n_positions=N_CTX, d_vocab=D_VOCAB, tied=True),
    LEARN_STEPS,
    BATCH * N_CTX,
    N_CTX,
)

ARMS = {
    "continued": Arm("small, continued", SMALL, {}, steps_for(EXTRA, SMALL)),
    "scratch": Arm("large from scratch, equal extra compute"),
    "scratch-charged": Arm("large from scratch, equal total compute", steps=steps_for(EXTRA + OF_SMALL, LARGE)),
    "original": Arm("random_pad + append_random", init={"width": "random_pad", "depth": "append_random"}),
    "equal": Arm("duplicate, no noise + identity", init={"snr_db": None}),
    "noise-10db": Arm("duplicate, 10 dB + identity", init={"snr_db": 10.0}),
    "noise-0db": Arm("duplicate, 0 dB + identity", init={"snr_db": 0.0}),
    "by-width": Arm("duplicate, 0 dB + identity, rates by width", init={"snr_db": 0.0, "lr_by_width": True}),
    "interleave": Arm("duplicate, 0 dB + interleave", init={"depth": "interleave", "snr_db": 0.0}),
    "stack": Arm("duplicate, 0 dB + stack", init=STACKED),
    "learned": Arm(
        f"duplicate, 0 dB + stack, maps learned for {LEARN_STEPS} steps (LiGO)",
        init={**STACKED, "learn_steps": LEARN_STEPS},
        steps=steps_for(EXTRA - LEARNING, LARGE),
    ),
}

#: The arm that the others are compared with seed by seed: how good small became differs more than the arms do.
BESIDE = "noise-0db"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, help="a folder of .md or .txt files, one a book")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("var/benchmarks/operators"))
    parser.add_argument("--cache", type=Path, default=Path("var/benchmarks/data"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.report:
        if not options.books:
            parser.error("--books is needed to run anything")
        for _ in runs(options, shelf_of(options.books, options.out)):
            (options.out / "report.md").write_text(report(options))
    print(report(options))


# --- Runs -------------------------------------------------------------------------------------------------------------


def runs(options: argparse.Namespace, shelf: Path) -> Iterator[None]:
    """All that are not finished: small's learning rate, the arms', then the seeds, arm after arm."""
    tuning = options.out / "tuning-small"
    for lr in LRS:
        yield train(options, tuning, spec(shelf, TUNING_SEED, {at(lr): small(lr)}), at(lr))
    tuning, of_small = options.out / "tuning", best(tuning, "")
    tuned = {"small": small(of_small)} | {
        f"{name}-{at(lr)}": grown(arm, lr) for name, arm in ARMS.items() for lr in LRS
    }
    for name in ["small", *(f"{arm}-{at(lr)}" for arm in options.arms for lr in LRS)]:
        yield train(options, tuning, spec(shelf, TUNING_SEED, tuned), name)
    chosen = {name: best(tuning, f"{name}-") for name in options.arms}
    for seed in options.seeds:
        for name in ["small", *options.arms]:
            models = {"small": small(of_small)} | ({name: grown(ARMS[name], chosen[name])} if name in ARMS else {})
            yield train(options, options.out / f"seed-{seed}", spec(shelf, seed, models), name)


def at(lr: float) -> str:
    return f"lr-{lr * 1e4:.0f}e-4"


def small(lr: float) -> dict[str, Any]:
    return {"family": FAMILY, "shape": SMALL.model_dump(), "train": {"lr": lr, "max_steps": SMALL_STEPS}}


def grown(arm: Arm, lr: float) -> dict[str, Any]:
    init = {"kind": "random"} if arm.init is None else {"kind": "grow", "parent": "small", **arm.init}
    train = {"lr": lr, "max_steps": arm.steps}
    return {"family": FAMILY, "shape": arm.shape.model_dump(), "init": init, "train": train}


def spec(shelf: Path, seed: int, models: dict[str, Any]) -> str:
    return parse_spec(
        {
            "name": f"Growth operators, seed {seed}",
            "data": {
                "source": str(shelf),
                "tokenizer": {"kind": "bpe", "d_vocab": D_VOCAB},
                "validation_fraction": 0.06,
                "test_fraction": 0.06,
            },
            "train": {
                "n_ctx": N_CTX, "batch_size": BATCH, "warmup_steps": WARMUP, "eval_every": 100, "eval_tokens": 32768,
                "checkpoint_every": 100_000, "seed": seed,
            },
            "models": models,
        }
    ).to_json()  # fmt: skip


def train(options: argparse.Namespace, folder: Path, text: str, name: str) -> None:
    """One model, if it is not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(text)
    command = [sys.executable, "-m", "trainer", "run", str(path), "--out", str(folder), "--only", name, "--resume"]
    command += ["--threads", str(options.threads), "--cache", str(options.cache.absolute())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# --- What came out ----------------------------------------------------------------------------------------------------


def best(folder: Path, prefix: str) -> float:
    """The learning rate with the lowest last validation loss."""
    return min(LRS, key=lambda lr: validation(folder / f"{prefix}{at(lr)}")[-1])


def validation(run: Path) -> list[float]:
    return [e["cross_entropy"] for e in events_of(run, "eval") if e["split"] == "validation"]


def test(run: Path) -> float:
    return float(next(e["cross_entropy"] for e in events_of(run, "eval") if e["split"] == "test"))


def finished(run: Path) -> bool:
    return (run / "events.jsonl").exists() and bool(events_of(run, "finished"))


def mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def report(options: argparse.Namespace) -> str:
    """The table, of the arms and seeds that are finished."""
    seeds = {
        name: [seed for seed in options.seeds if finished(options.out / f"seed-{seed}" / name)]
        for name in ["small", *ARMS]
    }

    def run(name: str, seed: int) -> Path:
        return options.out / f"seed-{seed}" / name

    def less(name: str, other: str) -> str:
        both = [seed for seed in seeds[name] if seed in seeds[other]]
        return mean([test(run(name, seed)) - test(run(other, seed)) for seed in both]) if both else ""

    lines = [
        "| model | steps | compute | with small's | validation at step 0 | test loss | less scratch, small not charged "
        f"| less scratch, small charged | less {ARMS[BESIDE].title} |",
        "|---" * 9 + "|",
    ]
    for name in ["small", *ARMS]:
        if not seeds[name]:
            continue
        runs = [run(name, seed) for seed in seeds[name]]
        flops, steps = (events_of(runs[0], "finished")[0][field] for field in ("flops", "step"))
        of_small = 0.0 if name in ("small", "scratch", "scratch-charged") else OF_SMALL
        # Small is no rival, and what a column measures by is not measured by it.
        against = [
            "" if name in ("small", "scratch", "scratch-charged", other) else less(name, other)
            for other in ("scratch", "scratch-charged", BESIDE)
        ]
        cells = [
            ARMS[name].title if name in ARMS else "small",
            f"{steps:,}",
            f"{flops / 1e12:.2f}",
            f"{(flops + of_small) / 1e12:.2f}",
            mean([validation(each)[0] for each in runs]),
            mean([test(each) for each in runs]),
            *against,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    count = max(map(len, seeds.values()))
    below = [
        f"{ARMS[name].title} ({len(found)})" for name, found in seeds.items() if name in ARMS and len(found) < count
    ]
    return "\n".join(
        [
            f"Up to {count} seeds; mean ± standard deviation, differences seed by seed.",
            "Losses in nats a token, compute in TFLOPs.",
            *([f"Fewer seeds: {', '.join(below)}."] if below else []),
            "",
            *lines,
            "",
            "Last validation loss by learning rate, on the seed that it was chosen with:",
            "",
            *tuning(options.out / "tuning"),
            "",
            f"{machine.line(options.threads)}.",
            "",
        ]
    )


def tuning(folder: Path) -> list[str]:
    lines = [f"| model | {' | '.join(f'{lr:g}' for lr in LRS)} |", "|---" * (1 + len(LRS)) + "|"]
    for name, arm in ARMS.items():
        runs = [folder / f"{name}-{at(lr)}" for lr in LRS]
        if all(map(finished, runs)):
            losses = [validation(run)[-1] for run in runs]
            cells = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
            lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
