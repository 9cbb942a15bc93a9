"""One growth by itself: find the source, say the plan, grow, say what came of it. `python -m trainer grow` is this.

With `--json` every line is an object: `progress` (done, total, what), and at the end `grown` or `failed`; with
`--dry-run` a `plan` alone. Imports torch for a GGUF file only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from pydantic import ValidationError

from trainer.families import FamilyError, family_of
from trainer.growth import GrowthError, GrowthPlan, plan, resolve_shape
from trainer.growth.apply import grow_checkpoint, named_weights, open_source, parameter_counts
from trainer.growth.certificate import tolerance
from trainer.growth.sources import Located, locate
from trainer.growth.weights import EPSILON, NAMES, SourceError, itemsize
from trainer.shape import GrowInit
from trainer.spec import problems_of

#: An object of JSON.
Fields = Mapping[str, Any]

#: The options by the fields that errors name.
_OPTIONS = {"init.parent": "SOURCE", "init.d_vocab": "--vocab", "init.n_positions": "--positions"}


def main(given: argparse.Namespace) -> int:
    """Exit code 0 when grown, 1 when it began and failed or was stopped, 2 when what was asked for cannot be."""
    teller: Teller = JsonLines(given.dry_run) if given.json else Sentences()
    try:
        with _interrupted_by_sigterm():
            return _grow(given, teller)
    except ValidationError as error:
        for problem in problems_of(error):
            teller.failed(f"init.{problem.field}", problem.message, problem.value)
        return 2
    except GrowthError as error:
        teller.failed(error.field, error.message, error.value)
        return 2
    except FileExistsError as error:
        teller.failed("out", str(error))
        return 2
    except (FamilyError, SourceError) as error:
        teller.failed("source", str(error))
        return 2
    except KeyboardInterrupt:
        teller.failed(None, "Stopped; nothing was kept.")
        return 1
    except BrokenPipeError:  # whoever was reading has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        teller.failed(None, f"{where}{error.strerror or error}; nothing was kept.")
        return 1


def _grow(given: argparse.Namespace, teller: Teller) -> int:
    init = GrowInit(
        parent="source",
        width=given.width,
        depth=given.depth,
        init_range=given.init_range,
        split=given.split,
        snr_db=given.snr_db,
        d_vocab=given.vocab,
        n_positions=given.positions,
    )
    located = locate(given.source)
    changes = {field: size for part in given.shape for field, size in part.items()}
    growth, sheet = _planned(located, changes, init, given.dtype, given.out)
    teller.planned(sheet)
    if given.dry_run:
        return 0
    out: Path = given.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # said before anything is fetched
        raise FileExistsError(f"{out} is there already; name a folder that is not, or that is empty")
    with located.folder(out.absolute().parent, teller.progress) as folder:
        outcome = grow_checkpoint(
            folder,
            out,
            growth,
            given.seed,
            progress=teller.progress,
            max_shard_bytes=given.max_shard_size,
            dtype=given.dtype,
        )
        measured = _measured(folder, out, given.text, growth, teller) if given.text else {"measured": None}
    said = {"because": growth.because, "warnings": list(growth.warnings), "out": str(out), "not_measured": None}
    teller.grown(outcome | said | measured)
    return 0


def _measured(small: Path, large: Path, text: Path, growth: GrowthPlan, teller: Teller) -> dict[str, Any]:
    """Both models on a text, with the difference of logits that rounding may leave (`allowed`); or why not: the grown
    one is there all the same."""
    from trainer.verify import VerifyError, measure, rounding

    teller.progress(0, 1, "measuring")
    try:
        found = measure(small, large, text)
    except VerifyError as error:
        return {"measured": None, "not_measured": str(error)}
    dtypes = {tensor.dtype for tensor in named_weights(open_source(large)).values()}
    # Copies are summed, and noise that is unseen in exact arithmetic makes each as much larger.
    larger = max(tolerance(dtype, growth) / (4 * EPSILON[dtype]) for dtype in dtypes)
    return {"measured": {**found, "allowed": larger * rounding(found["logit_scale"], dtypes)}}


def _planned(
    located: Located, changes: dict[str, str], init: GrowInit, dtype: str | None, out: Path | None
) -> tuple[GrowthPlan, Fields]:
    """The plan, and what there is to say of it before it is carried out."""
    config = located.config()
    family = family_of(config)
    parent, n_positions, d_vocab, tied = family.shape_of(config)
    child = resolve_shape(family.name, parent, changes)
    growth = plan(family.name, parent, child, init, n_positions=n_positions, d_vocab=d_vocab, tied=tied)
    before, after = parameter_counts(growth)
    stored = NAMES[dtype] if dtype else str(config.get("dtype") or config.get("torch_dtype") or "float32")
    size = itemsize(next((short for short, name in NAMES.items() if name == stored.removeprefix("torch.")), "F32"))
    return growth, {
        "family": family.name,
        "title": family.title,
        "width": init.width,
        "depth": init.depth,
        "parent": parent.model_dump(),
        "child": growth.child.model_dump(),
        "parent_d_vocab": d_vocab,
        "d_vocab": growth.child_vocab,
        "parent_n_positions": n_positions,
        "n_positions": growth.child_positions,
        "parent_parameters": before,
        "parameters": after,
        "dtype": stored,
        "bytes": after * size,
        "free_bytes": None if out is None else _free(out),
        "preserves": growth.preserves,
        "because": growth.because,
        "warnings": list(growth.warnings),
    }


def _free(out: Path) -> int:
    at = out.absolute()
    return shutil.disk_usage(next(folder for folder in (at, *at.parents) if folder.exists())).free


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a growth as Ctrl-C does: with nothing half-made left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- Telling ----------------------------------------------------------------------------------------------------------


class Teller(Protocol):
    """Says how a growth goes."""

    def planned(self, sheet: Fields) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...

    def grown(self, outcome: Fields) -> None: ...

    def failed(self, field: str | None, message: str, value: Any = None) -> None: ...


class JsonLines:
    """One object a line, for a program."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def planned(self, sheet: Fields) -> None:
        if self.dry_run:
            _line({"kind": "plan", **sheet})

    def progress(self, done: int, total: int, what: str) -> None:
        _line({"kind": "progress", "done": done, "total": total, "what": what})

    def grown(self, outcome: Fields) -> None:
        _line({"kind": "grown", **outcome})

    def failed(self, field: str | None, message: str, value: Any = None) -> None:
        _line({"kind": "failed", "message": message, "field": field, "value": value})


def _line(fields: Fields) -> None:
    print(json.dumps(fields), flush=True)


class Sentences:
    """For a person: the plan, a bar on a terminal, the outcome."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def planned(self, sheet: Fields) -> None:
        print(plan_sentences(sheet), flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if what != self._what:
            self._close()
            self._bar = tqdm(
                desc=what, total=total, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, file=sys.stderr
            )
            self._what = what
        self._bar.update(done - self._bar.n)

    def grown(self, outcome: Fields) -> None:
        self._close()
        print(outcome_sentences(outcome))

    def failed(self, field: str | None, message: str, value: Any = None) -> None:
        self._close()
        shown = "" if value is None else f" {value!r}"
        print(message if field in (None, "source") else f"{option(field)}{shown}: {message}", file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar, self._what = None, ""


def option(field: str) -> str:
    """The command line's option for a field that an error names: `--shape d_model` for shape.d_model."""
    if field in _OPTIONS:
        return _OPTIONS[field]
    group, _, name = field.rpartition(".")
    return f"--shape {name}" if group == "shape" else f"--{name.replace('_', '-')}"


def plan_sentences(sheet: Fields) -> str:
    """A plan, for a person."""
    before, after = sheet["parent_parameters"], sheet["parameters"]
    changes = [
        f"{field} {sheet['parent'][field]} to {size}"
        for field, size in sheet["child"].items()
        if size != sheet["parent"][field] and size is not None
    ]
    sizes = {"d_vocab": "parent_d_vocab", "n_positions": "parent_n_positions"}
    changes += [f"{new} {sheet[old]:,} to {sheet[new]:,}" for new, old in sizes.items() if sheet[new] != sheet[old]]
    keeps = "keeps" if sheet["preserves"] else "does not keep"
    free = "" if sheet["free_bytes"] is None else f"; {sheet['free_bytes'] / 1e9:.2f} GB are free"
    return "\n".join(
        [
            f"{sheet['title']}, {before:,} to {after:,} parameters: {', '.join(changes) or 'no other shape'}.",
            f"{sheet['width']} and {sheet['depth']}: {keeps} what the parent computes. {sheet['because']}",
            *(f"  {warning}" for warning in sheet["warnings"]),
            f"{sheet['bytes'] / 1e9:.2f} GB of {sheet['dtype']}{free}.",
        ]
    )


def outcome_sentences(outcome: Fields) -> str:
    """What came of a growth, for a person."""
    rate = outcome["bytes"] / 1e6 / max(outcome["seconds"], 1e-9)
    lines = [
        f"{outcome['out']}: {outcome['parameters']:,} parameters, {outcome['bytes'] / 1e9:.2f} GB in "
        f"{outcome['seconds']:.1f} s ({rate:,.0f} MB/s)."
    ]
    if outcome["tensors"]:
        lines.append(
            f"Certificate: all {len(outcome['tensors'])} tensors keep the parent's function; the largest residual is "
            f"{outcome['residual']:.2g}, of {outcome['tolerance']:.2g} that rounding may leave."
        )
    if measured := outcome["measured"]:
        lines.append(
            f"On {measured['n_tokens']:,} tokens: largest difference of a logit {measured['max_logit_difference']:.3g} "
            f"(logits up to {measured['logit_scale']:.3g}), loss {measured['cross_entropy_before']:.6f} before, "
            f"{measured['cross_entropy_after']:.6f} after."
        )
    if outcome["not_measured"]:
        lines.append(f"Not measured: {outcome['not_measured']}")
    return "\n".join(lines)
