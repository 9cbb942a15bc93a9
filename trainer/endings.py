"""How a run can end before its last step: the exceptions, and the event that each becomes. Imports no torch."""

from __future__ import annotations

import errno
import traceback
from typing import Any

#: Characters of a message.
LONGEST = 2000


class Diverged(Exception):
    """The loss or its gradient is no longer a number."""

    def __init__(self, step: int, what: str):
        self.step = step
        super().__init__(f"{what} is not a finite number at step {step}. A smaller lr or a longer warm-up may help.")


class StopRequested(Exception):
    """Someone asked the run to stop; `checkpoint` is where it can go on from, if any step was taken."""

    def __init__(self, step: int, checkpoint: str | None):
        self.step, self.checkpoint = step, checkpoint
        super().__init__(f"stopped at step {step}")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which and why."""


class DataError(Exception):
    """The text cannot be used; the message says which file, column or name, and what would be right."""


def ending(error: BaseException, step: int | None) -> dict[str, Any]:
    """The fields of the event that ends a run, which had come to `step`, with `error`.

    An error that is not one of ours is also printed, with where it happened.
    """
    if isinstance(error, StopRequested):
        return {"kind": "stopped", "step": error.step, "checkpoint": error.checkpoint}
    if isinstance(error, KeyboardInterrupt):
        return {"kind": "stopped", "step": step or 0, "checkpoint": None}
    if isinstance(error, Diverged):
        return _failed("diverged", str(error), error.step)
    if isinstance(error, DataError):
        return _failed("bad_data", str(error), step)
    if isinstance(error, CheckpointError):
        return _failed("bad_checkpoint", str(error), step)
    traceback.print_exception(error)
    if _is_out_of_memory(error):
        return _failed("out_of_memory", f"There was not enough memory: {_first_line(error)}", step)
    if _is_disk_full(error):
        return _failed("disk_full", f"The disk is full: {_first_line(error)}", step)
    return _failed("error", f"{type(error).__name__}: {_first_line(error)}", step)


def _failed(reason: str, message: str, step: int | None) -> dict[str, Any]:
    if len(message) > LONGEST:  # a file may have a million columns, and a page shows all that is said
        message = message[:LONGEST] + " …"
    return {"kind": "failed", "reason": reason, "message": message, "step": step}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's own class, known by its name so that torch need not be imported; its CPU allocator raises a RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _is_disk_full(error: BaseException) -> bool:
    # safetensors raises an error of its own, with the system's words.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
