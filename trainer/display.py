"""How runs look to the one who started them: a bar on a terminal, JSON lines on a pipe, sentences in a log.

Also the tables that `plan` and `run` print. Imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trainer.budget import ModelBudget

#: An event as its JSON says it.
Fields = Mapping[str, Any]

#: Seconds between two lines about training in a log.
LOG_SECONDS = 15.0


class Display(Protocol):
    def show(self, name: str, event: Fields) -> None:
        """Show an event of the run `name`."""

    def close(self) -> None: ...


class JsonLines:
    """One event a line. With `named`, each says which run it is of."""

    def __init__(self, out: IO[str], named: bool):
        self.out, self.named = out, named

    def show(self, name: str, event: Fields) -> None:
        self.out.write(json.dumps(({"run": name} if self.named else {}) | dict(event)) + "\n")
        self.out.flush()

    def close(self) -> None:
        pass


class Log:
    """Sentences, with the time."""

    def __init__(self, out: IO[str]):
        self.out = out
        self._last = 0.0

    def show(self, name: str, event: Fields) -> None:
        if event["kind"] in ("train", "preparing"):
            if time.monotonic() - self._last < LOG_SECONDS:
                return
            self._last = time.monotonic()
        self.out.write(f"{event['at'][:19].replace('T', ' ')} {sentence(event)}\n")
        self.out.flush()

    def close(self) -> None:
        pass


class Bar:
    """A progress bar for each run, with the loss; what is worth keeping is written above it."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._bar: Any = None
        self._name = ""

    def show(self, name: str, event: Fields) -> None:
        if name != self._name:
            self.close()
            self._bar = self._tqdm(desc=name, unit="step", dynamic_ncols=True, total=0, leave=True)
            self._name = name
        kind = event["kind"]
        if kind == "prepared":
            self._bar.reset(total=event["total_steps"])
            self._bar.update((event["resumed_from"] or 0) - self._bar.n)
            self._bar.set_postfix_str("")
        elif kind == "preparing":
            self._bar.set_postfix_str(_progress(event))
        elif kind == "train":
            self._bar.set_postfix_str(f"loss {event['cross_entropy']:.3f}", refresh=False)
            self._bar.update(event["step"] - self._bar.n)
        elif kind == "eval" and event["split"] == "validation":
            self._bar.set_postfix_str(f"validation loss {event['cross_entropy']:.3f}")
        elif kind in ("grown", "warning", "failed", "stopped"):
            self._tqdm.write(f"{name}: {sentence(event)}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def display_for(out: IO[str], log: Path | None, *, named: bool) -> Display:
    """The display that fits where `out` leads: a terminal, the run's own log, or anything else."""
    if out.isatty():
        return Bar()
    if log is not None and log.exists() and os.path.samestat(os.fstat(out.fileno()), log.stat()):
        return Log(out)
    return JsonLines(out, named)


def sentence(event: Fields) -> str:
    """An event in words."""
    kind = event["kind"]
    if kind == "started":
        return f"Attempt {event['attempt']}, process {event['pid']} on {event['hostname']}."
    if kind == "preparing":
        return _progress(event)
    if kind == "prepared":
        begin = f"going on from step {event['resumed_from']}" if event["resumed_from"] is not None else "from step 0"
        return (
            f"{event['parameters']:,} parameters, {event['train_tokens']:,} training tokens; {begin} to "
            f"{event['total_steps']} in {event['precision']} on {event['device_name']}, {event['threads']} thread(s)."
        )
    if kind == "grown":
        learned = event.get("learned")
        cost = f", maps learned in {learned['steps']:,} steps and {learned['seconds']:.1f} s" if learned else ""
        return (
            f"Step {event['step']}: grown from {event['parent']} by {event['width']} and {event['depth']} to "
            f"{event['parameters']:,} parameters{cost}: held-out loss {event['cross_entropy_before']:.4f} before, "
            f"{event['cross_entropy_after']:.4f} after; largest logit difference "
            f"{event['max_logit_difference']:.2g} of {event['logit_scale']:.3g}."
        )
    if kind == "train":
        rate = f"{event['tokens_per_second']:,.0f} tokens a second"
        return f"Step {event['step']}: loss {event['cross_entropy']:.4f}, {rate}."
    if kind == "eval":
        return (
            f"Step {event['step']}: {event['split']} loss {event['cross_entropy']:.4f}, perplexity "
            f"{event['perplexity']:.2f}, {event['bits_per_byte']:.4f} bits a byte, accuracy {event['accuracy']:.4f}."
        )
    if kind == "checkpoint":
        return f"Step {event['step']}: checkpoint {event['path']} ({event['bytes'] / 1e6:.1f} MB)."
    if kind == "sample":
        return f"Sample: {event['prompt']!r} -> {event['text']!r}"
    if kind == "finished":
        return f"Finished at step {event['step']}, {event['train_seconds']:.1f} s of training."
    if kind == "stopped":
        where = f"; it can go on from {event['checkpoint']}" if event["checkpoint"] else ""
        return f"Stopped at step {event['step']}{where}."
    if kind == "failed":
        return f"Failed ({event['reason'].replace('_', ' ')}): {event['message']}"
    return str(event.get("message", kind))


def _progress(event: Fields) -> str:
    done = "" if event.get("done") is None else f" {event['done']:,}"
    total = "" if event.get("total") is None else f" of {event['total']:,}"
    return f"{event['what']}{done}{total}"


def comparison(runs: Mapping[str, Iterable[Fields]]) -> str:
    """The table at the end: each run's size, test figures and cost, from its events."""
    head = ("model", "parameters", "test loss", "perplexity", "bits/byte", "accuracy", "tokens", "FLOPs", "seconds")
    rows: list[Sequence[str]] = [(*head, "tokens/s")]
    for name, events in runs.items():
        at = {event["kind"] + ("/" + event["split"] if event["kind"] == "eval" else ""): event for event in events}
        size = f"{at['prepared']['parameters']:,}" if "prepared" in at else "-"
        if "finished" not in at:
            last = at.get("failed") or at.get("stopped")
            rows.append((name, size, last["kind"] if last else "-", *[""] * 7))
            continue
        test, end = at["eval/test"], at["finished"]
        rows.append(
            (
                name,
                size,
                f"{test['cross_entropy']:.4f}",
                f"{test['perplexity']:.2f}",
                f"{test['bits_per_byte']:.4f}",
                f"{test['accuracy']:.4f}",
                f"{end['tokens']:,}",
                f"{end['flops']:.2e}",
                f"{end['train_seconds']:.1f}",
                f"{end['tokens_per_second']:,.0f}",
            )
        )
    return table(rows)


def plan_table(budgets: Mapping[str, ModelBudget]) -> str:
    """What each model will cost, and what its growth will preserve."""
    rows: list[Sequence[str]] = [
        ("model", "parameters", "non-embedding", "steps", "tokens", "FLOPs/token", "FLOPs", "memory")
    ]
    for name, b in budgets.items():
        rows.append(
            (
                name,
                "?" if b.parameters is None else f"{b.parameters:,}",
                "?" if b.non_embedding_parameters is None else f"{b.non_embedding_parameters:,}",
                "?" if b.steps is None else f"{b.steps:,}",
                "?" if b.tokens is None else f"{b.tokens:,}",
                "?" if b.flops_per_token is None else f"{b.flops_per_token:.2e}",
                "?" if b.flops is None else f"{b.flops:.2e}",
                "?" if b.memory_bytes is None else f"{b.memory_bytes / 1e6:,.0f} MB",
            )
        )
    grown = [
        f"{name}{_growth_of(i, len(b.growths))} {'keeps' if growth.preserves else 'does not keep'} what its parent "
        f"computes. {growth.because}" + "".join(f"\n  {warning}" for warning in growth.warnings)
        for name, b in budgets.items()
        for i, growth in enumerate(b.growths, start=1)
    ]
    wrong = [f"{budget.problem}" for budget in budgets.values() if budget.problem is not None]
    return "\n".join([table(rows), *([""] if grown or wrong else []), *grown, *wrong])


def _growth_of(number: int, count: int) -> str:
    return f", growth {number} of {count}," if count > 1 else ""


def _figure(n: float | None, form: str) -> str:
    return "?" if n is None else format(n, form)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an `events.jsonl`; none if there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
