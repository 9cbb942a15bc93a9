"""Growing a checkpoint from disk to disk: time and peak memory of each route beside a plain copy of what it wrote.

    python -m benchmarks growth [--rounds 3] [--layers 12] [--dtype F32] [--hypercloning CHECKOUT]
    python -m benchmarks growth --large 8

A synthetic Llama (d_model 768, vocabulary 32,000) becomes twice as wide, and twice as deep. A route is a process of its
own, whole, from its start until what it wrote is flushed to the disk; its memory is the largest resident size that the
system saw of it. Routes take turns with `cp` of the same output, flushed likewise: a ratio is of one round's two times,
median, least and most over the rounds. Files are in the page cache.

Peers: mergekit's passthrough, which repeats blocks, is installed by its name into a folder of this benchmark's own, and
uses the transformers and torch that are here; what it writes is held to what we write. apple/ml-hypercloning, which
copies widths, is on no package index: `--hypercloning` names a checkout of it. A peer that cannot be had or does not
run is said to be so.

`--large N`: once, a Llama of N GB in bfloat16, sharded, to more than twice as much, with what is at work by default:
noise, silent blocks and the certificate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import _machine as machine
from trainer.families import get_family
from trainer.growth import plan
from trainer.growth.apply import grow_checkpoint, named_weights, open_source
from trainer.growth.weights import Array, Entry, Shards, itemsize, narrow
from trainer.shape import GrowInit, Shape

ROOT = Path(__file__).resolve().parent.parent
D_VOCAB, N_POSITIONS = 32_000, 2048
WIDER = ("d_model", "n_heads", "d_mlp")

#: What mergekit needs that is not here already; torch, transformers and the rest are ours.
MERGEKIT = (
    "mergekit==0.1.5", "immutables==0.21", "peft==0.21.2", "accelerate==1.15.0", "scipy==1.17.1",
    "sentencepiece==0.2.3", "protobuf==7.36.2",
)  # fmt: skip


class Route(NamedTuple):
    title: str
    command: Callable[[Path, Path], list[str]]  # of source and output
    environment: dict[str, str] = {}


class Run(NamedTuple):
    seconds: float
    peak: int  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of the small model")
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="F32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--hypercloning", type=Path, metavar="CHECKOUT", help="of apple/ml-hypercloning")
    parser.add_argument("--large", type=float, metavar="GB", help="grow a model of this size once, and nothing else")
    parser.add_argument("--scratch", type=Path, help="where the models lie meanwhile (else the system's)")
    parser.add_argument("--grow", nargs=3, metavar=("HOW", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--clone", nargs=3, metavar=("CHECKOUT", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        grow(options.grow[0], Path(options.grow[1]), Path(options.grow[2]))
        return
    if options.clone:
        clone(*options.clone)
        return
    with tempfile.TemporaryDirectory(prefix="kangaroo-growth-", dir=options.scratch) as scratch:
        if options.large:
            large(options.large, Path(scratch), options.threads)
        else:
            compare(options, Path(scratch))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    shape = Shape(d_model=768, n_heads=12, d_head=64, d_mlp=2048, n_layers=options.layers)
    source = synthetic(scratch / "source", shape, options.dtype)
    notes: list[str] = []
    print(f"Llama, {size_of(source) / 1e9:.2f} GB in {options.dtype}; {options.rounds} rounds\n")
    print("| case | route | GB | seconds | to `cp` | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    with machine.watch() as others:
        wider = [ours("wider"), ours("wider, certified"), ours("wider, noise"), ours("wider, noise, certified")]
        rows("twice as wide", source, [*wider, *hypercloning(options.hypercloning, notes)], scratch, options, notes)
        deeper = [ours("deeper"), ours("deeper, silent"), *mergekit(options.layers, scratch, notes)]
        rows("twice as deep", source, deeper, scratch, options, notes)
    print("", *notes, sep="\n")
    print(f"{machine.line(options.threads)}. Others used {others.cores:.2f} cores meanwhile.")


def rows(
    case: str, source: Path, routes: list[Route], scratch: Path, options: argparse.Namespace, notes: list[str]
) -> None:
    """Run every route once a round, each followed by a copy of what it wrote, and print them."""
    runs: dict[str, list[Run]] = defaultdict(list)
    copies: dict[str, list[Run]] = defaultdict(list)
    sizes: dict[str, int] = {}
    out, copy = scratch / "out", scratch / "copy"
    for _ in range(options.rounds):
        for route in list(routes):
            run = measured(route.command(source, out), out, options.threads, route.environment)
            if isinstance(run, str):
                notes.append(f"{route.title} does not run here (transformers {version('transformers')}): {run}")
                routes.remove(route)
            else:
                runs[route.title].append(run)
                sizes[route.title] = size_of(out)
                if route.title.startswith("mergekit"):
                    same_as_ours(source, out, scratch, notes)
                copied = measured(["cp", "-r", str(out), str(copy)], copy, options.threads, {})
                assert isinstance(copied, Run), copied
                copies[route.title].append(copied)
            for folder in (out, copy):
                shutil.rmtree(folder, ignore_errors=True)
    for title, taken in runs.items():
        ratios = [run.seconds / copied.seconds for run, copied in zip(taken, copies[title], strict=True)]
        seconds = machine.spread([run.seconds for run in taken])
        peak = statistics.median(run.peak for run in taken) / 1e6
        print(f"| {case} | {title} | {sizes[title] / 1e9:.2f} | {seconds} | {machine.spread(ratios)} | {peak:,.0f} |")
    every = [run for held in copies.values() for run in held]
    seconds = machine.spread([run.seconds for run in every])
    print(
        f"| {case} | `cp` | | {seconds} | 1 | {statistics.median(run.peak for run in every) / 1e6:,.0f} |", flush=True
    )


#: Starts a command and says its largest resident size, in KB. A process of its own, with nothing loaded: until a new
#: process becomes its program it is as large as the one that it was begun by, and that counts.
LAUNCHER = """if True:
    import os, sys
    process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(process, 0)
    print(usage.ru_maxrss)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(command: list[str], out: Path, threads: int, environment: dict[str, str]) -> Run | str:
    """A process and the flushing of what it wrote; the last line of its complaint where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
    began = time.perf_counter()
    launched = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launched, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {done.returncode}"
    for path in sorted(out.iterdir()):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return Run(time.perf_counter() - began, int(done.stdout) * 1024)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# --- Routes -----------------------------------------------------------------------------------------------------------


def ours(how: str) -> Route:
    title = "Kangaroo" + "".join(f", {part}" for part in how.split(", ")[1:])
    return Route(
        title, lambda source, out: [sys.executable, "-m", "benchmarks.growth", "--grow", how, *map(str, (source, out))]
    )


def grow(how: str, source: Path, out: Path) -> None:
    """The process of one of our routes."""
    opened = open_source(source)
    shape, n_positions, d_vocab, tied = opened.described
    larger = {field: 2 * getattr(shape, field) for field in (WIDER if "wider" in how else ("n_layers",))}
    depth = "identity" if "silent" in how else "stack"
    init = GrowInit(parent="source", depth=depth, snr_db=0.0 if "noise" in how else None)
    made = plan(
        "llama", shape, shape.model_copy(update=larger), init, n_positions=n_positions, d_vocab=d_vocab, tied=tied
    )
    grow_checkpoint(source, out, made, 0, verify="certified" in how)


def mergekit(layers: int, scratch: Path, notes: list[str]) -> Iterator[Route]:
    """The whole stack twice, by a passthrough merge."""
    folder = ROOT / "var/benchmarks/mergekit"
    if not (folder / "mergekit").is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*install, "--target", str(folder), *MERGEKIT], capture_output=True, text=True, check=False
        )
        if done.returncode:
            notes.append(f"mergekit cannot be had: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            return
    config = scratch / "passthrough.yml"

    def command(source: Path, out: Path) -> list[str]:
        twice = f"\n  - sources: [{{model: {source}, layer_range: [0, {layers}]}}]" * 2
        config.write_text(f"slices:{twice}\nmerge_method: passthrough\n")
        script = "from mergekit.scripts.run_yaml import main; main()"
        return [sys.executable, "-c", script, str(config), str(out), "--no-copy-tokenizer", "--clone-tensors"]

    yield Route(f"{MERGEKIT[0].replace('==', ' ')} passthrough", command, {"PYTHONPATH": str(folder)})


def same_as_ours(source: Path, out: Path, scratch: Path, notes: list[str]) -> None:
    """Say, once, whether a stack that another tool made is the one that we make."""
    grow("deeper", source, scratch / "ours")
    ours, theirs = (named_weights(open_source(folder)) for folder in (scratch / "ours", out))
    same = all((tensor.stored(slice(None)) == theirs[name].stored(slice(None))).all() for name, tensor in ours.items())
    shutil.rmtree(scratch / "ours")
    said = f"mergekit's stack is {'to the bit' if same else 'NOT'} ours."
    notes += [] if said in notes else [said]


def hypercloning(checkout: Path | None, notes: list[str]) -> Iterator[Route]:
    if checkout is None:
        notes.append("apple/ml-hypercloning is on no package index; --hypercloning CHECKOUT runs it.")
        return

    def command(source: Path, out: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.growth", "--clone", *map(str, (checkout.absolute(), source, out))]

    yield Route("apple/ml-hypercloning", command)


def clone(checkout: str, source: str, out: str) -> None:
    """The process of apple/ml-hypercloning, as its README says."""
    sys.path.insert(0, checkout)
    from hypercloning import cloneModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    cloneModel(model, embedding_dim_multiplier=2, up_project_multiplier=2).save_pretrained(out)


# --- A large one ------------------------------------------------------------------------------------------------------


def large(gigabytes: float, scratch: Path, threads: int) -> None:
    """The command line, once, on a model of about so many GB; and a copy of what came out."""
    d_model = 4096 if gigabytes >= 4 else 1024
    block = Shape(d_model=d_model, n_heads=d_model // 128, d_head=128, d_mlp=11 * d_model // 4, n_layers=1)
    each = get_family("llama").parameters(block, N_POSITIONS, D_VOCAB, False)
    per_layer = sum(p.size for p in each if p.layer is not None) * itemsize("BF16")
    layers = max(3, round((gigabytes * 1e9 - 2 * 2 * D_VOCAB * d_model) / per_layer))
    source = synthetic(scratch / "source", block.model_copy(update={"n_layers": layers}), "BF16")
    command = [
        sys.executable,
        "-m",
        "trainer",
        "grow",
        str(source),
        "--shape",
        f"d_mlp=2x,n_layers={-(-layers * 4 // 3)}",
    ]
    with machine.watch() as others:
        run = measured([*command, "--out", str(scratch / "out")], scratch / "out", threads, {})
        assert isinstance(run, Run), run
        copied = measured(["cp", "-r", str(scratch / "out"), str(scratch / "copy")], scratch / "copy", threads, {})
        assert isinstance(copied, Run), copied
    files = len(list((scratch / "out").glob("*.safetensors")))
    print(
        f"Llama, {layers} blocks of d_model {d_model}, {size_of(source) / 1e9:.2f} GB in bfloat16 to "
        f"{size_of(scratch / 'out') / 1e9:.2f} GB in {files} files, with noise, silent blocks and the certificate: "
        f"{run.seconds:.0f} s, {run.peak / 1e6:,.0f} MB of memory; `cp` of that {copied.seconds:.0f} s."
    )
    print(f"{machine.line(threads)}. Others used {others.cores:.2f} cores meanwhile.")


def synthetic(folder: Path, shape: Shape, dtype: str) -> Path:
    """An untied Llama of random numbers, written block by block."""
    folder.mkdir()
    llama = get_family("llama")
    config = llama.config(shape, N_POSITIONS, D_VOCAB, False) | {"dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype]}
    (folder / "config.json").write_text(json.dumps(config))
    parameters = llama.parameters(shape, N_POSITIONS, D_VOCAB, False)
    rng = np.random.default_rng(0)
    with Shards(folder, [Entry(p.name, dtype, p.shape) for p in parameters], 5_000_000_000) as shards:
        for parameter in parameters:
            for block in _blocks(parameter.shape, rng):
                shards.write(parameter.name, narrow(block, dtype))
    return folder


def _blocks(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Array]:
    step = max(1, (1 << 20) // int(np.prod(shape[1:], initial=1)))
    for start in range(0, shape[0], step):
        yield rng.standard_normal((min(step, shape[0] - start), *shape[1:]), np.float32) * np.float32(0.02)


if __name__ == "__main__":
    main()
