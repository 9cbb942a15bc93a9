"""What a host says, brought into known shapes before anything relies on it or a database keeps it.

    plain(answer)       of any answer: what both databases and every page can hold
    facts(answer)       trainer.machine.facts()
    readings(answer)    trainer.machine.readings()
    ended(answer)       how a process ended, in an agent's status

A host is its owner's, who may make it say anything. What is not of the kind that it should be is taken for unknown; a
page, the line of runs and the reconciler, which serve everybody, never meet it.
"""

from __future__ import annotations

import math
from typing import Any

from experiments.transport.base import Exit

_MOST_DEPTH = 12
_MOST_GPUS = 64
_MOST_INTEGER = 1 << 63
#: Characters of a word that a host says of itself; of its last lines of output.
_MOST_TEXT, _MOST_LOG = 500, 20_000

_TEXTS = ("hostname", "system", "machine", "cpu", "python", "executable", "transformers", "driver", "gpu_problem")
_AMOUNTS = ("cores", "memory_bytes", "memory_free_bytes", "disk_free_bytes", "disk_total_bytes", "load", "time")


def plain(value: Any, depth: int = 0) -> Any:
    """JSON without what a database refuses: NUL, halves of characters, NaN, numbers without bounds, endless nesting."""
    if isinstance(value, str):
        return value.replace("\0", "�").encode("utf-8", "replace").decode()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < _MOST_INTEGER else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth >= _MOST_DEPTH:
        return None
    if isinstance(value, list):
        return [plain(each, depth + 1) for each in value]
    return {plain(key): plain(each, depth + 1) for key, each in value.items()}


def facts(answer: Any) -> dict[str, Any]:
    """Of a machine. Every key is there, None or "" where the host did not say."""
    said = answer if isinstance(answer, dict) else {}
    torch = said.get("torch")
    return {
        **_machine(said),
        "torch": {
            "version": _text(torch.get("version")),
            "cuda": _text(torch.get("cuda")),
            "cuda_available": torch.get("cuda_available") is True,
            "problem": _text(torch.get("problem")),
        }
        if isinstance(torch, dict)
        else None,
        "lingers": said["lingers"] if isinstance(said.get("lingers"), bool) else None,
        "linger_remedy": _text(said.get("linger_remedy")) or "",
    }


def readings(answer: Any) -> dict[str, Any]:
    return _machine(answer if isinstance(answer, dict) else {})


def ended(answer: Any) -> Exit | None:
    """How an attempt ended; None where nothing is said of it."""
    if not isinstance(answer, dict):
        return None
    log = answer.get("log")
    found: dict[str, Any] = {"log": log[-_MOST_LOG:] if isinstance(log, str) else ""}
    for name in ("attempt", "code", "signal"):
        value = answer.get(name)
        found[name] = value if isinstance(value, int) and abs(value) < 1 << 31 else None
    for name in ("out_of_memory", "lost", "rebooted"):
        found[name] = answer.get(name) is True
    return found  # type: ignore[return-value]


def _machine(said: dict[str, Any]) -> dict[str, Any]:
    gpus = said.get("gpus")
    return {
        **{name: _text(said[name]) for name in _TEXTS if name in said},
        **{name: _amount(said[name]) for name in _AMOUNTS if name in said},
        "gpus": [_gpu(gpu) for gpu in (gpus if isinstance(gpus, list) else [])[:_MOST_GPUS] if _is_named(gpu)],
    }


def _is_named(gpu: Any) -> bool:
    return isinstance(gpu, dict) and bool(_text(gpu.get("uuid")))


def _gpu(gpu: dict[str, Any]) -> dict[str, Any]:
    index, processes = _amount(gpu.get("index")), gpu.get("processes")
    return {
        "index": None if index is None else int(index),
        "uuid": (_text(gpu.get("uuid")) or "")[:80],
        "name": (_text(gpu.get("name")) or "GPU")[:80],
        "memory_bytes": _amount(gpu.get("memory_bytes")) or 0,
        "memory_used_bytes": _amount(gpu.get("memory_used_bytes")) or 0,
        **{name: _amount(gpu.get(name)) for name in ("use", "temperature", "power", "power_limit")},
        "processes": [
            pid for pid in (processes if isinstance(processes, list) else [])[:1000] if type(pid) is int and pid > 0
        ],
    }


def _text(value: Any) -> str | None:
    return "".join(c if c.isprintable() else " " for c in value[:_MOST_TEXT]) if isinstance(value, str) else None


def _amount(value: Any) -> float | None:
    """A number that a machine may have of something: none has 10^18 of anything."""
    return value if type(value) in (int, float) and abs(value) < 10**18 else None
