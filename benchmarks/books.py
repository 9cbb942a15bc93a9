"""The original Kangaroo's pair on a folder of books: its own growth rule beside the function-preserving one.

    python -m benchmarks books --books FOLDER [--steps 300] [--seeds 0 1 2] [--out var/benchmarks/books]

small 256 / 4 heads of 64 / 512 / 2 layers; large 512 / 4 heads of 64 / 1024 / 4 layers (llama family, tied head).
Four models a seed: small; the large shape from scratch; grown from small by `random_pad` + `append_random` (the
original's rule); grown by `duplicate` + `identity` (function-preserving). All see the same batches, with the same
settings and step count; a seed sets weights and batch order. A document is a book: no book is in two splits. Runs go
through the command line, seeds in turn; what is already finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.spec import parse_spec

SMALL = {"d_model": 256, "n_heads": 4, "d_head": 64, "d_mlp": 512, "n_layers": 2}
LARGE = {"d_model": 512, "n_heads": 4, "d_head": 64, "d_mlp": 1024, "n_layers": 4}
TITLES = {
    "small": "small",
    "large": "large, from scratch",
    "scaled-original": "scaled, random_pad + append_random",
    "scaled-preserving": "scaled, duplicate + identity",
}


def spec_for(books: Path, steps: int, seed: int) -> dict[str, Any]:
    def grown(width: str, depth: str) -> dict[str, Any]:
        return {"shape": LARGE, "init": {"kind": "grow", "parent": "small", "width": width, "depth": depth}}

    return {
        "name": f"The original pair on books, seed {seed}",
        "data": {
            "source": str(books),
            "tokenizer": {"kind": "bpe", "d_vocab": 4096},
            "validation_fraction": 0.06,
            "test_fraction": 0.06,
        },
        "train": {
            "n_ctx": 256, "batch_size": 8, "max_steps": steps, "lr": 1e-3, "weight_decay": 0.1,
            "warmup_steps": steps // 10, "eval_every": max(1, steps // 6), "eval_tokens": 32768,
            "checkpoint_every": steps, "seed": seed,
        },
        "models": {
            "small": {"shape": SMALL},
            "large": {"shape": LARGE},
            "scaled-original": grown("random_pad", "append_random"),
            "scaled-preserving": grown("duplicate", "identity"),
        },
    }  # fmt: skip


def shelf_of(books: Path, out: Path) -> Path:
    """A folder in `out` of only the books: what describes their folder is not part of the corpus."""
    shelf = (out / "shelf").absolute()
    shelf.mkdir(parents=True, exist_ok=True)
    for book in sorted(books.iterdir()):
        if book.suffix in (".md", ".txt") and book.stem.upper() not in ("README", "SOURCE"):
            link = shelf / book.name
            if not link.exists():
                link.symlink_to(book.resolve())
    return shelf


def events_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="a folder of .md or .txt files, one a book")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("var/benchmarks/books"))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()

    shelf = shelf_of(arguments.books, arguments.out)
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        spec = folder / "spec.json"
        spec.write_text(parse_spec(spec_for(shelf, arguments.steps, seed)).to_json())
        command = [sys.executable, "-m", "trainer", "run", str(spec), "--out", str(folder), "--resume", *threads]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL if not sys.stdout.isatty() else None)

    def mean(values: list[float], digits: int) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    print(f"\n{len(arguments.seeds)} seeds, {arguments.steps} steps of 8 x 256 tokens; mean ± standard deviation\n")
    print("| model | test cross-entropy | test perplexity | validation at step 0 | largest logit change at growth |")
    print("|---|---|---|---|---|")
    for name, title in TITLES.items():
        runs = [arguments.out / f"seed-{seed}" / name for seed in arguments.seeds]
        tests = [next(e for e in events_of(run, "eval") if e["split"] == "test") for run in runs]
        first = [next(e for e in events_of(run, "eval") if e["split"] == "validation") for run in runs]
        grown = [e["max_logit_difference"] for run in runs for e in events_of(run, "grown")]
        print(
            f"| {title} | {mean([e['cross_entropy'] for e in tests], 3)} | {mean([e['perplexity'] for e in tests], 2)} "
            f"| {mean([e['cross_entropy'] for e in first], 3)} | {f'{max(grown):.2g}' if grown else ''} |"
        )


if __name__ == "__main__":
    main()
