"""One run in several processes of one machine, as torchrun starts them: who each is, and what they tell each other.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m trainer run SPEC.json --out DIR --only NAME

Each takes its share of every batch, on a GPU of its own where there are GPUs, and DistributedDataParallel averages the
gradients, so all have the same weights at all times. The first process also does what is to be done once: it prepares
the text, grows, writes events, checkpoints and the model. The others read what it wrote, and say nothing unless they
fail.

Two ways to speak: collectives (NCCL on GPUs, gloo without), which all enter at the same point or wait for ever; and
torchrun's key-value store, by which the first process is heard while others may still be busy, and a failure told.
Imports torch only where it is needed: the first event comes before.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.endings import StopRequested

if TYPE_CHECKING:
    import torch

#: How long a process waits for another in a collective, as while the first writes a checkpoint to a slow disk. That one
#: has died is noticed by torchrun, at once.
PATIENCE = timedelta(minutes=30)
#: Seconds that a process which was told to stop waits for a word from the first, before they begin to train.
LAST_WORD = 5.0
#: What of an error's text shows that the other side of a collective has gone.
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class LostError(Exception):
    """Another process of the run has ended; this one cannot go on."""


class Processes:
    """The processes of a run, as this one, `rank` of `count`, sees them. One alone needs nobody: nothing is sent."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count
        self._kept: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    def share(self, total: int) -> slice:
        """Which of `total` things, a multiple of `count`, are this process's."""
        part = total // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    # Before and after training: the store --------------------------------------------------------------------------

    def from_first(self, what: str, value: Any, stop: Callable[[], bool]) -> Any:
        """The first process's `value`, in each. The others wait as long as it takes, and leave when it leaves."""
        if self.alone:
            return value
        if self.first:
            self._store.set(what, json.dumps(value))
            return value
        told: float | None = None
        while not self._store.check([what]):
            if self._store.check(["over"]):
                raise StopRequested(0, None)
            if stop():
                told = told or time.monotonic()
                if time.monotonic() - told > LAST_WORD:
                    raise LostError("The first process has gone without a word.")
            time.sleep(0.05)
        return json.loads(self._store.get(what))

    def fail(self, fields: dict[str, Any]) -> bool:
        """Tell the first process why this one ends. Whether that is news: most failures are of another's making."""
        mine = json.dumps(fields)
        return not self._store.check(["over"]) and self._store.compare_set("failed", "", mine) == mine.encode()

    def failure(self) -> dict[str, Any] | None:
        """Why the one that failed first did, if it has told."""
        if not self._store.check(["failed"]):
            return None
        return json.loads(self._store.get("failed"))  # type: ignore[no-any-return]

    def leave(self, *, well: bool) -> None:
        """The end. Where all goes `well` they leave together, so the others wait until the first has done its part."""
        if self.alone:
            return
        import torch.distributed as dist

        if self.first:
            self._store.set("over", "")
        while well and not self._store.check(["over"]):
            time.sleep(0.05)
        if well and dist.is_initialized():  # after a failure it might wait for those who do not come
            dist.destroy_process_group()

    @property
    def _store(self) -> Any:
        if self._kept is None:
            from torch.distributed.distributed_c10d import PrefixStore
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
            self._kept = PrefixStore("kangaroo", store)
        return self._kept

    # While training: collectives -----------------------------------------------------------------------------------

    def begin(self, device: torch.device) -> None:
        """Meet the others; until then, none of what follows works."""
        if self.alone:
            return
        import torch.distributed as dist

        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.count,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )

    def wait(self) -> None:
        """Until all have come here."""
        if not self.alone:
            import torch.distributed as dist

            dist.barrier()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `values`, in the same memory."""
        if not self.alone:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def averaging(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` with the first process's weights, whose gradients are averaged as they are made."""
        if self.alone:
            return module
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the new name is not in every torch yet
            return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def here() -> Processes:
    """This process's place among those that torchrun started; alone where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process is not there any more."""
    return isinstance(error, LostError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
    )
