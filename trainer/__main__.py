"""The command line: `python -m trainer run | plan | grow | verify | agent`.

    run SPEC.json --out DIR [--only NAME] [--resume]   train an experiment's models, parents first
    plan SPEC.json [--json]                            what each model will cost, and what growth will preserve
    grow SOURCE --shape d_model=512,n_layers=4 --out DIR   grow a checkpoint and nothing else
    verify SMALL LARGE [--text FILE] [--json]          does LARGE, however it was made, compute what SMALL does?
    agent start|status|stop|tail DIR                   a run that outlives whoever started it

Several processes train one model together, each on its share of every batch, when torchrun starts them:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m trainer run SPEC.json --out DIR --only NAME

Exits with 0 when done, or stopped with a checkpoint; 1 when a run failed; 2 when what was asked for cannot be.
`verify`: 0 where the function is preserved to rounding, 1 where it is not, 2 where that cannot be judged.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.agent import cores
from trainer.processes import here

if TYPE_CHECKING:
    from trainer.spec import ExperimentSpec

#: The variables by which the libraries underneath learn how many threads to use; read when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["agent"]:
        from trainer import agent

        return agent.main(arguments[1:])
    given = _parser().parse_args(arguments)
    from trainer.spec import SpecError

    try:
        return int(given.command(given))
    except SpecError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="run | plan | grow | verify | agent")

    run = commands.add_parser("run", help="train an experiment's models, parents first")
    run.add_argument("spec", type=Path, metavar="SPEC.json")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="each model gets a folder in it")
    run.add_argument("--only", metavar="NAME", help="train this model alone; its parent must be there")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint where there is one")
    run.add_argument("--cache", type=Path, metavar="DIR", help="for prepared text (else $KANGAROO_DATA_CACHE)")
    run.add_argument("--threads", type=_threads, metavar="N", help="else $KANGAROO_THREADS, else every core it has")
    run.set_defaults(command=_run)

    plan = commands.add_parser("plan", help="what each model will cost, and what growth will preserve")
    plan.add_argument("spec", type=Path, metavar="SPEC.json")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(command=_plan)

    grow = commands.add_parser("grow", help="grow a checkpoint and nothing else")
    grow.add_argument("source", metavar="SOURCE", help="a folder or GGUF file (./NAME or /NAME), or a name on the Hub")
    grow.add_argument(
        "--shape",
        type=_changes,
        action="append",
        default=[],
        metavar="FIELD=N,...",
        help="as in d_model=512,n_layers=2x; may be given several times",
    )
    grow.add_argument("--width", default="duplicate", metavar="RULE")
    grow.add_argument("--depth", default="identity", metavar="RULE")
    grow.add_argument("--init-range", type=float, default=0.02, metavar="STD", help="of what is drawn anew")
    grow.add_argument("--split", default="even", metavar="even|uneven|diagonal", help="of a value among its copies")
    grow.add_argument("--snr-db", type=_decibels, default=0.0, metavar="DB", help="of unseen noise, or `none`")
    grow.add_argument("--vocab", type=int, metavar="N", help="tokens of the larger model")
    grow.add_argument("--positions", type=int, metavar="N", help="its longest context")
    grow.add_argument("--seed", type=int, default=0)
    grow.add_argument("--out", type=Path, metavar="DIR")
    grow.add_argument("--dtype", type=_dtype, metavar="F32|F16|BF16", help="else each tensor keeps its own")
    grow.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    grow.add_argument("--text", type=Path, metavar="FILE", help="also measure both models on it (needs torch)")
    grow.add_argument("--dry-run", action="store_true", help="say the plan and leave it at that")
    grow.add_argument("--json", action="store_true", help="a line of JSON for each report of progress, and at the end")
    grow.set_defaults(command=_grow)

    verify = commands.add_parser("verify", help="does one checkpoint compute what another does?")
    verify.add_argument("small", type=Path, metavar="SMALL", help="a Hugging Face folder with safetensors")
    verify.add_argument("large", type=Path, metavar="LARGE", help="another of the same family, made by any tool")
    verify.add_argument("--text", type=Path, metavar="FILE", help="also measure both on it (needs torch)")
    verify.add_argument("--json", action="store_true")
    verify.set_defaults(command=_verify)

    commands.add_parser("agent", help="start, watch and stop a run that outlives whoever started it", add_help=False)
    return parser


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"threads {text!r}: must be a whole number, at least 1")
    return int(text)


def _decibels(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of decibels, or `none`") from None


def _changes(text: str) -> dict[str, str]:
    """`d_model=512,n_layers=2x` as a mapping."""
    changes = {}
    for change in text.split(","):
        field, equals, value = change.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(
                f"{change!r}: write FIELD=NUMBER or FIELD=TIMESx, as in d_model=512,n_layers=2x"
            )
        changes[field.strip()] = value.strip()
    return changes


def _dtype(text: str) -> str:
    """safetensors' name of a dtype, by that, torch's, or the usual short one."""
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp32": "F32", "fp16": "F16"}.get(
        text.lower(), text.upper()
    )
    if name not in ("F32", "F16", "BF16"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be F32, F16 or BF16")
    return name


def _bytes(text: str) -> int:
    """`5GB` as a number of bytes; units are powers of a thousand, as the Hub's are."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a size such as 5GB or 500MB")
    return size


# --- run --------------------------------------------------------------------------------------------------------------


def _run(given: argparse.Namespace) -> int:
    from trainer.spec import Problem, SpecError, load_spec

    spec = load_spec(given.spec)
    if given.only is None:
        if not here().alone:
            raise SpecError([Problem("--only", None, "several processes train one model; name it")])
        return _run_all(given, spec)
    if given.only not in spec.models:
        raise SpecError([Problem("--only", given.only, f"there is no such model; there is {', '.join(spec.models)}")])
    return _run_one(given, spec, given.only)


def _run_one(given: argparse.Namespace, spec: ExperimentSpec, name: str) -> int:
    """Train one model in this process, or this process's share of it."""
    try:
        threads = given.threads or _threads(os.environ.get("KANGAROO_THREADS") or str(cores()))
    except argparse.ArgumentTypeError as error:
        print(f"KANGAROO_THREADS: {error}", file=sys.stderr)
        return 2
    processes = here()
    _set_threads(threads // processes.count or 1)
    stop = _StopOnSignal()
    if not processes.alone:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the first, which makes the tokens while the others wait
        # Killed, torchrun takes none of its own with it, and the next attempt may not find them still at work.
        _once_orphaned(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif parent := os.environ.get("KANGAROO_PARENT"):
        _once_orphaned(int(parent), stop.ask)
    from trainer.display import display_for
    from trainer.run import RunError, follow, run

    directory = given.out / name
    how = {"cache": given.cache, "threads": threads // processes.count or 1, "stop": stop}
    if not processes.first:
        _leave(0 if follow(spec, name, directory, **how) else 1)
    display = display_for(sys.stdout, directory / "log.txt", named=False)
    last = "finished"
    try:
        attempt = int(os.environ.get("KANGAROO_ATTEMPT") or 1)
        for event in run(spec, name, directory, resume=given.resume, attempt=attempt, **how):
            last = event.kind
            try:
                display.show(name, event.model_dump(mode="json"))
            except BrokenPipeError:  # whoever was reading has gone: stop, with a checkpoint
                stop.ask()
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                display = display_for(sys.stdout, None, named=False)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        display.close()
    code = 1 if last == "failed" else 0
    if not processes.alone:
        _leave(code)
    return code


def _once_orphaned(parent: int, act: Callable[[], None]) -> None:
    """`act`, in a thread, when the process `parent` that started this one is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        act()

    threading.Thread(target=watch, daemon=True).start()


def _leave(code: int) -> NoReturn:
    """End one of several processes, whatever the threads of its collectives are still waiting for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_all(given: argparse.Namespace, spec: ExperimentSpec) -> int:
    """Train every model, each in a process of its own, so that one's memory is free before the next begins."""
    from trainer.display import comparison, display_for, read_events

    display = display_for(sys.stdout, None, named=True)
    stop = _StopOnSignal()
    failed: set[str] = set()
    for name in spec.order():
        if stop():
            break
        if lost := failed & set(spec.ancestors(name)):
            print(f"{name} is left out: {', '.join(sorted(lost))} failed.", file=sys.stderr)
            failed.add(name)
            continue
        directory = given.out / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "stop").unlink(missing_ok=True)  # a wish of last time
        command = [sys.executable, "-m", "trainer", "run", str(given.spec), "--out", str(given.out), "--only", name]
        command += ["--resume"] if given.resume else []
        command += ["--cache", str(given.cache)] if given.cache else []
        command += ["--threads", str(given.threads)] if given.threads else []
        with (directory / "log.txt").open("ab") as log:
            environment = os.environ | {"KANGAROO_PARENT": str(os.getpid())}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
            stop.forward_to = process
            assert process.stdout is not None
            for line in process.stdout:
                display.show(name, json.loads(line))
            code = process.wait()
            stop.forward_to = None
        if code:
            failed.add(name)
            events = read_events(directory / "events.jsonl")
            if not events or events[-1]["kind"] != "failed":  # it said nothing itself
                display.close()
                tail = (directory / "log.txt").read_text(errors="replace").splitlines()[-5:]
                print(f"{name} ended with code {code}:", *tail, sep="\n  ", file=sys.stderr)
    display.close()
    if sys.stdout.isatty():
        print(comparison({name: read_events(given.out / name / "events.jsonl") for name in spec.order()}))
        if stop():
            print("Stopped. Go on with --resume.")
    return 1 if failed else 0


class _StopOnSignal:
    """True once SIGTERM or Ctrl-C has come; a second Ctrl-C does not wait for the checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        self.forward_to: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        return self.asked

    def ask(self) -> None:
        self.asked = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self.forward_to is not None:
            self.forward_to.terminate()


def _set_threads(threads: int) -> None:
    """Before torch and its libraries are loaded: afterwards it is too late for some of them."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    # How long a thread that waits for the others spins before it sleeps. By default so long that, where anyone else
    # uses the cores, a step takes ten times as long: 4 to 6 s instead of 0.5 s, two threads on two busy cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


# --- plan and grow ----------------------------------------------------------------------------------------------------


def _plan(given: argparse.Namespace) -> int:
    from trainer.budget import sheet
    from trainer.display import plan_table
    from trainer.spec import load_spec

    budgets = sheet(load_spec(given.spec))
    if given.json:
        print(json.dumps({name: _plain(budget) for name, budget in budgets.items()}, indent=1))
    else:
        print(plan_table(budgets))
    return 0


def _plain(budget: Any) -> dict[str, Any]:
    """A budget as JSON; of its growths what a reader wants, not the maps."""
    held = {key: value for key, value in vars(budget).items() if key not in ("growths", "problem")}
    held["problem"] = budget.problem and str(budget.problem)
    held["growths"] = [
        {"preserves": growth.preserves, "because": growth.because, "warnings": list(growth.warnings)}
        for growth in budget.growths
    ]
    return held


def _grow(given: argparse.Namespace) -> int:
    from trainer import grow

    if given.out is None and not given.dry_run:
        print("--out DIR: says where the larger model goes", file=sys.stderr)
        return 2
    return grow.main(given)


def _verify(given: argparse.Namespace) -> int:
    from trainer.families import FamilyError
    from trainer.growth.apply import SourceError
    from trainer.verify import VerifyError, table, verify

    try:
        found = verify(given.small, given.large, given.text)
    except (FamilyError, SourceError, VerifyError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found.plain(), indent=1) if given.json else table(found))
    return {"kept": 0, "changed": 1, "unknown": 2}[found.verdict]


if __name__ == "__main__":
    # torch and the model classes are a million objects that stay. Looking for garbage among them takes a second of the
    # four that a run needs to begin, and another one as the interpreter ends.
    gc.set_threshold(10_000)
    code = main()
    gc.freeze()
    sys.exit(code)
