"""The training loop: :func:`train`, told from the top; below it, each piece that it uses.

What it promises:

* Batches are a function of (seed, step) and the training tokens alone: every model of an experiment sees the same ones.
* The same seed gives the same losses, and a run that was stopped and resumed gives those of one that was not, to the
  last bit on one machine with the same number of threads.
* A model that grows on the way is trained a stretch at a time, one call of :func:`train` for each size, with one count
  of steps, one order of batches and one schedule over all of them.
* Several processes share each batch of one run (:mod:`trainer.processes`) and give the losses of one process, but for
  the rounding of sums in another order. It may be resumed with another number of them.
* Checkpoints are whole or absent, hold no pickled code, and are folders that `AutoModelForCausalLM` loads.

Where the speed comes from: matrix products in bfloat16 where the machine does those faster; a loss that never holds
[n, V] logits and has its gradients ready after the forward pass; attention that suits the machine
(:mod:`trainer.attention`); a fused optimizer; tokens mapped from a file.

Letters: B windows in a batch, T tokens in a window, n = B * T, d d_model, V d_vocab, c a chunk of positions.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.endings import CheckpointError, Diverged, StopRequested
from trainer.evaluate import Windows, autocast, evaluate, logit_cap
from trainer.growth.moments import OPTIMIZER_FILE, LrScale
from trainer.processes import Processes
from trainer.spec import TrainSpec

#: An event's fields, its kind included; :mod:`trainer.run` gives it a number and a time.
Fields = dict[str, Any]

#: `train` events of a run, at most; a longer run reports the mean over several steps.
MOST_TRAIN_EVENTS = 2000
#: Losses stay on the device and are read together, this often; several processes then also tell each other of a wish to
#: stop.
FLUSH_SECONDS = 1.0
#: Positions whose logits exist at once.
LOSS_CHUNK = 512
#: bfloat16 must be this much faster to be worth its rounding.
BF16_GAIN = 1.5

#: AdamW's epsilon.
EPS = 1e-8

KEEP_CHECKPOINTS = 2
STATE_FILE = "kangaroo.json"


@dataclass(frozen=True)
class State:
    """Where a run stands. Totals since its first step; `pending` are the losses not yet in a `train` event.

    A run whose model grows on the way is in its stage number `stage`, which began after `stage_step` steps. FLOPs are
    counted from `stage_flops`, those until then: a token costs each size of the model something else.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    setup_seconds: float = 0.0
    pending: list[float] = field(default_factory=list)
    stage: int = 0
    stage_step: int = 0
    stage_flops: float = 0.0
    peak_bytes: int = 0  # the most memory that anything took of which this process does not know

    def progress(self) -> Fields:
        return {"step": self.step, "tokens": self.tokens, "flops": self.flops, "train_seconds": self.train_seconds}


@dataclass(frozen=True)
class Task:
    """What a run trains on and how: everything the loop needs beside the model."""

    settings: TrainSpec
    directory: Path  # the run directory
    tokenizer: Path  # a folder, copied into each checkpoint
    tokens: np.ndarray[Any, Any]  # [n_tokens] of the training split
    held_out: Windows  # of the validation split
    bytes_per_token: float  # of the validation split
    batch_seed: int  # the experiment's, not the model's: all its models see the same batches
    total_steps: int  # that the schedule is over
    flops_per_token: float
    precision: str  # "fp32" or "bf16"
    identity: Fields = field(default_factory=dict)  # what a checkpoint must agree on to be resumed from
    processes: Processes = field(default_factory=Processes)
    stage_end: int | None = None  # the step after which the model grows; None where it is trained to the end
    newcomers: Newcomers | None = None
    growth: Fields = field(default_factory=dict)  # what a checkpoint says of how the model came about, as JSON

    @property
    def end(self) -> int:
        return self.total_steps if self.stage_end is None else self.stage_end


def train(
    model: Any, optimizer: torch.optim.Optimizer, task: Task, state: State, stop: Callable[[], bool]
) -> Generator[Fields, None, State]:
    """Train `model` from `state` to `task.end`. Yields the fields of events; returns where the run stands then.

    The last event is an evaluation; where the model is to grow it is a checkpoint, to grow from. Raises
    :class:`Diverged`, or :class:`StopRequested` after writing a checkpoint. Of several processes all yield the same,
    but only the first saves.
    """
    settings, device, processes = task.settings, model.device, task.processes
    batches = Batches(
        task.tokens, settings.n_ctx, settings.batch_size, task.batch_seed, processes.share(settings.batch_size)
    )
    objective = processes.averaging(Objective(model, settings.compile))
    parameters = list(model.parameters())
    report_every = max(1, math.ceil(task.total_steps / MOST_TRAIN_EVENTS))
    meter = Meter(state, task, report_every, stop)
    resumed_from = state.step if state.step else None

    while True:
        step = meter.step
        due = step % settings.eval_every == 0 or step == task.end
        if due and step != resumed_from:
            yield from meter.flush()
            yield {"kind": "eval", "split": "validation", **meter.evaluate(model)}
        if step == task.end:
            yield from meter.flush()
            if task.stage_end is not None and step != resumed_from and processes.first:
                yield save_checkpoint(model, optimizer, task, meter.state())
            return meter.state()
        stopping = meter.stopping()
        if step != resumed_from and step and (stopping or step % settings.checkpoint_every == 0):
            yield from meter.flush()
            if processes.first:
                yield save_checkpoint(model, optimizer, task, meter.state())
        if stopping:
            yield from meter.flush()
            raise StopRequested(step, str(checkpoint_path(step)) if step else None)

        model.train()
        meter.start()
        lr = learning_rate(step, settings, task.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        inputs, targets = batches.at(step, device)  # [B, T] each
        with autocast(device, task.precision):
            loss = objective(inputs, targets)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.grad_clip, norm)
        if task.newcomers is not None:
            task.newcomers.begin(step - state.stage_step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield from meter.stepped(loss, norm, lr)


# --- Batches ----------------------------------------------------------------------------------------------------------


class Batches:
    """Windows of the training tokens, [B, T + 1], in an order that depends on (seed, step) alone.

    An epoch sees every window once, in a new order, the windows' borders shifted by a new offset; the first epoch's
    begin at the first token. Of each batch only the rows of `share` are made.
    """

    def __init__(
        self, tokens: np.ndarray[Any, Any], n_ctx: int, batch_size: int, seed: int, share: slice = slice(None)
    ):
        self.tokens, self.n_ctx, self.batch_size, self.seed = tokens, n_ctx, batch_size, seed
        self.rows = range(batch_size)[share]
        self.spare = min(n_ctx, len(tokens) - n_ctx)  # how many different offsets an epoch can have
        self.per_epoch = (len(tokens) - self.spare) // n_ctx
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def at(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [B, T] each, of the batch that step `step` + 1 is made with."""
        starts = [self._start(step * self.batch_size + i) for i in self.rows]
        rows = np.stack([self.tokens[s : s + self.n_ctx + 1] for s in starts]).astype(np.int64)
        batch = torch.from_numpy(rows)
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=(self.seed, epoch)))
            offset = int(random.integers(self.spare)) if epoch else 0
            self._starts = random.permutation(self.per_epoch) * self.n_ctx + offset
            self._epoch = epoch
        return int(self._starts[place])


# --- Loss -------------------------------------------------------------------------------------------------------------


class Objective(torch.nn.Module):
    """The loss of a batch as a module of its own: what averages gradients must see every parameter, the head's too."""

    def __init__(self, model: Any, compiled: bool):
        super().__init__()
        self.model = model
        self.body = torch.compile(model.base_model, dynamic=False) if compiled else model.base_model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Of inputs and targets [B, T]."""
        hidden = self.body(input_ids=inputs, use_cache=False).last_hidden_state  # [B, T, d]
        weight = self.model.get_output_embeddings().weight
        return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), logit_cap(self.model))


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T` against targets, and both gradients, made in the forward pass.

    Only [c, V] logits exist at a time, where the plain way keeps [n, V] several times over; the gradient of the weight
    is summed over the chunks in float32, or in what the model is in if that is wider. (The idea is Liger-Kernel's, https://arxiv.org/abs/2410.10989.)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, dtype: torch.dtype
    ) -> Tensor:
        n = hidden.shape[0]
        h_all, w = hidden.to(dtype), weight.to(dtype)  # [n, d], [V, d]
        d_hidden = torch.empty_like(h_all)
        wide = torch.promote_types(dtype, torch.float32)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, n, LOSS_CHUNK):
            h, t = h_all[start : start + LOSS_CHUNK], targets[start : start + LOSS_CHUNK, None]
            logits = (h @ w.T).to(wide)  # [c, V]
            if cap is not None:
                within = logits.div_(cap).tanh_()
                logits = within * cap
            log_p = logits.log_softmax(-1)
            loss -= log_p.gather(1, t).sum()
            # d loss / d logits = (softmax - one-hot) / n, in the same memory
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, t, d_logits.new_full(t.shape, -1.0))
            if cap is not None:
                d_logits.mul_(within.square_().neg_().add_(1))
            g = d_logits.div_(n).to(dtype)
            d_hidden[start : start + LOSS_CHUNK] = g @ w
            d_weight += g.T @ h
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        return loss / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], d_weight * grads[0], None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Mean cross-entropy, nats: hidden [n, d], weight [V, d] (tied to the embedding or not), targets [n].

    With a `cap`, logits x are cap * tanh(x / cap).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, cap, dtype)  # type: ignore[no-any-return, no-untyped-call]


# --- Optimizer --------------------------------------------------------------------------------------------------------


def make_optimizer(model: Any, settings: TrainSpec, scales: Mapping[str, LrScale] | None = None) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices (embeddings too), not on biases and gains.

    `scales`, where given, has for every parameter what its learning rate, weight decay and epsilon are multiplied with
    (:func:`trainer.growth.moments.lr_scales`). A group is of parameters that are treated alike, matrices first; in its
    `lr_scale` stands what the schedule's rate is multiplied with.
    """
    groups: dict[tuple[bool, LrScale], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = LrScale() if scales is None else scales[name]
        groups.setdefault((parameter.dim() >= 2, scale), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[matrices, scale],
                "lr": settings.lr * scale.lr,
                "lr_scale": scale.lr,
                "weight_decay": settings.weight_decay * scale.weight_decay if matrices else 0.0,
                "eps": EPS * scale.eps,
            }
            for matrices, scale in sorted(groups, key=lambda group: not group[0])
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


class Newcomers:
    """What is new in tensors whose AdamW state was grown: its second moment begins with its first gradient.

    A tensor has one count of steps. It goes on over a growth, and bias correction with it; so an entry that begins with
    m = v = 0 would take steps of (1 - beta1^k) / sqrt(1 - beta2^k) times lr, alike gradients taken: at most 1.1 with
    beta2 0.95, but 6.6 with 0.999. A mean of the old entries' v is no way out: gradients of new entries can be far
    smaller, and they would hardly learn. So v of all new entries of a tensor begins with the mean square of their
    first gradient. As m rises from zero, they set out at (1 - beta1) lr, and go on as if AdamW were fresh.

    Behind new units that nothing reads yet there is no gradient at first, hence STEPS steps in which to begin.
    """

    STEPS = 20

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, new: Iterable[tuple[str, Tensor]]):
        """`new`: by the names of parameters, which of their entries are new (bool, of the parameter's shape)."""
        parameters = dict(model.named_parameters())
        self._waiting = []
        for name, entries in new:
            parameter = parameters[name]
            entries, second = entries.to(parameter.device), optimizer.state[parameter]["exp_avg_sq"]
            if not second[entries].any():  # else it has begun, and the run was resumed since
                self._waiting.append((parameter, second, entries))

    def begin(self, steps: int) -> None:
        """Before an optimizer's step, `steps` after the growth."""
        waiting, self._waiting = self._waiting, []
        for parameter, second, entries in waiting if steps < self.STEPS else []:
            gradient = parameter.grad[entries]
            if gradient.any():
                second[entries] = gradient.square().mean()
            else:
                self._waiting.append((parameter, second, entries))


def learning_rate(step: int, settings: TrainSpec, total: int) -> float:
    """The rate that step `step` + 1 is made with: linear warm-up, then the schedule down to min_lr_ratio * lr."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)


def choose_precision(wanted: str, d_model: int, device: torch.device) -> str:
    """ "fp32" or "bf16"; `auto` times both on a layer of this width and takes bf16 if it is worth it."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(2048, d_model, dtype=dtype), torch.ones(4 * d_model, d_model, dtype=dtype)
        F.linear(x, w)  # the first call chooses a kernel
        times = []
        for _ in range(3):
            start = time.perf_counter()
            F.linear(x, w)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bf16" if seconds[torch.float32] > BF16_GAIN * seconds[torch.bfloat16] else "fp32"


# --- Measuring --------------------------------------------------------------------------------------------------------


class Meter:
    """Totals, and the `train` events: each the mean over the `every` steps before it.

    Which steps have an event depends on the step alone, so a step that is trained again reports the same values.

    Several processes speak to each other in :meth:`flush` alone, which all must call after the same steps. So the clock
    of one is followed: it says, at each flush, how many steps lie before the next.
    """

    def __init__(self, state: State, task: Task, every: int, stop: Callable[[], bool] = lambda: False):
        self.base, self.task, self.every, self._stop = state, task, every, stop
        self.processes = task.processes
        self.step = state.step
        self.train_seconds, self.eval_seconds = state.train_seconds, state.eval_seconds
        self.pending = list(state.pending)
        self._unread: list[tuple[int, Tensor, Tensor, float, float]] = []  # step, loss, norm, lr, train_seconds
        self._started: float | None = None
        self._flushed = time.perf_counter()
        self._reported = (state.step, state.train_seconds)
        self._flush_at = state.step + 1  # by several processes
        self._agreed = False  # to stop, by several processes

    def stopping(self) -> bool:
        """Whether to stop before the next step; the same in all processes."""
        return self._stop() if self.processes.alone else self._agreed

    def start(self) -> None:
        """The clock of training runs until the next flush."""
        if self._started is None:
            self._started = time.perf_counter() - self.train_seconds

    def stepped(self, loss: Tensor, norm: Tensor, lr: float) -> Iterator[Fields]:
        assert self._started is not None
        now = time.perf_counter()
        self.step += 1
        self.train_seconds = now - self._started
        self._unread.append((self.step, loss.detach(), norm.detach(), lr, self.train_seconds))
        if now - self._flushed >= FLUSH_SECONDS if self.processes.alone else self.step >= self._flush_at:
            yield from self.flush()

    def flush(self) -> Iterator[Fields]:
        """Read the losses from the device (which waits for it), and stop the clock."""
        if self._unread:
            values = self._read()
            assert self._started is not None
            self.train_seconds = time.perf_counter() - self._started
        else:
            values = []
        self._started = None
        for (step, _, _, lr, seconds), (loss, norm) in zip(self._unread, values, strict=True):
            if not math.isfinite(loss):
                raise Diverged(step, "The loss")
            if not math.isfinite(norm):
                raise Diverged(step, "The gradient")
            self.pending.append(loss)
            if step % self.every == 0 or step == self.task.total_steps:
                steps, since = step - self._reported[0], seconds - self._reported[1]
                rate = steps * self.task.settings.tokens_per_step / since if since > 0 else 0.0
                yield {
                    "kind": "train",
                    **replace(self.state(), step=step, train_seconds=seconds).progress(),
                    **self._totals(step),
                    "cross_entropy": math.fsum(self.pending) / len(self.pending),
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens_per_second": rate,
                }
                self.pending.clear()
                self._reported = (step, seconds)
        self._unread.clear()
        self._flushed = time.perf_counter()

    def _read(self) -> list[list[float]]:
        """Loss and norm of the gradient of each step since the last flush: the means over all processes."""
        values = torch.stack([torch.stack((loss, norm.to(loss))) for _, loss, norm, _, _ in self._unread])
        if self.processes.alone:
            return values.tolist()
        # All that is to be told in one sum. A second's worth of steps is not known before there were some.
        steps, seconds = len(self._unread), time.perf_counter() - self._flushed
        ahead = max(1, min(2 * steps, int(steps * FLUSH_SECONDS / seconds)))
        word = values.new_tensor([self._stop(), ahead if self.processes.first else 0], dtype=torch.float64)
        told = self.processes.total(torch.cat((values.double().flatten(), word)))
        *_, wishes, ahead = told.tolist()
        self._agreed, self._flush_at = wishes > 0, self.step + int(ahead)
        return (told[:-2].view(-1, 2) / self.processes.count).tolist()

    def evaluate(self, model: Any) -> Fields:
        start = time.perf_counter()
        figures = evaluate(
            model,
            self.task.held_out,
            precision=self.task.precision,
            bytes_per_token=self.task.bytes_per_token,
            processes=self.processes,
        )
        if not math.isfinite(figures["cross_entropy"]):
            raise Diverged(self.step, "The validation loss")
        seconds = time.perf_counter() - start
        self.eval_seconds += seconds
        self._flushed = time.perf_counter()
        return {**self.state().progress(), **figures, "eval_seconds": seconds}

    def state(self) -> State:
        return State(
            step=self.step,
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            setup_seconds=self.base.setup_seconds,
            pending=list(self.pending),
            stage=self.base.stage,
            stage_step=self.base.stage_step,
            stage_flops=self.base.stage_flops,
            peak_bytes=self.base.peak_bytes,
            **self._totals(self.step),
        )

    def _totals(self, step: int) -> Fields:
        """From the stage's first step on, not the process's: a resumed run comes to the same, to the last bit."""
        each, since = self.task.settings.tokens_per_step, step - self.base.stage_step
        return {"tokens": step * each, "flops": self.base.stage_flops + since * each * self.task.flops_per_token}


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_path(step: int) -> Path:
    """Relative to the run directory."""
    return Path("checkpoints") / f"step-{step:06d}"


def save_checkpoint(model: Any, optimizer: torch.optim.Optimizer, task: Task, state: State) -> Fields:
    """Write a checkpoint and forget all but the last two. Returns the fields of its event."""
    start = time.perf_counter()
    path = checkpoint_path(state.step)

    def rest(folder: Path) -> None:
        save_optimizer(optimizer, model, folder)
        held = {"state": asdict(state), "precision": task.precision, "identity": task.identity, "growth": task.growth}
        (folder / STATE_FILE).write_text(json.dumps(held, indent=1))

    size = save_model(model, task.tokenizer, task.directory / path, rest)
    for old in checkpoints(task.directory)[:-KEEP_CHECKPOINTS]:
        shutil.rmtree(old)
    seconds = time.perf_counter() - start
    return {"kind": "checkpoint", "step": state.step, "path": str(path), "bytes": size, "seconds": seconds}


def save_model(model: Any, tokenizer: Path, folder: Path, rest: Callable[[Path], None] = lambda folder: None) -> int:
    """A Hugging Face folder, whole or not at all. `rest` may add files to it. Returns its size in bytes."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        for file in sorted(tokenizer.iterdir()):
            shutil.copyfile(file, temporary / file.name)
        rest(temporary)
        files = sorted(temporary.iterdir())
        for file in files:
            _sync(file)
        _sync(temporary)
        size = sum(file.stat().st_size for file in files)
        if folder.exists():  # a step that was trained again
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync(folder.parent)
        return size
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((directory / "checkpoints").glob("step-*"))


def load_state(folder: Path, identity: Fields) -> tuple[State, str, Fields]:
    """State, precision and growth of a checkpoint. Raises :class:`CheckpointError` if it is of something else."""
    try:
        held = json.loads((folder / STATE_FILE).read_text())
        state, precision = State(**held["state"]), str(held["precision"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of a run: {error}") from error
    for what, value in identity.items():
        if held["identity"].get(what) != value:
            raise CheckpointError(
                f"The run cannot go on from {folder.name}: {what} was {held['identity'].get(what)} then and is {value} "
                "now. Start a new run."
            )
    return state, precision, held.get("growth", {})


def save_optimizer(optimizer: torch.optim.Optimizer, model: Any, folder: Path) -> None:
    """AdamW's state, by the names of the parameters: step/NAME, exp_avg/NAME, exp_avg_sq/NAME."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"{key}/{names[p]}": value for p, held in optimizer.state.items() for key, value in held.items()}
    save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(optimizer: torch.optim.Optimizer, model: Any, folder: Path) -> None:
    """AdamW's state from a checkpoint."""
    fill_optimizer(optimizer, model, load_file(folder / OPTIMIZER_FILE).items())


def fill_optimizer(optimizer: torch.optim.Optimizer, model: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """AdamW's state from tensors by their names in a checkpoint. A parameter that none is of begins afresh."""
    parameters = dict(model.named_parameters())
    for place, held in tensors:
        key, _, name = place.partition("/")
        # A copy: memory mapped from a file is not aligned as torch's own, and may be summed in another order.
        optimizer.state[parameters[name]][key] = held.to(parameters[name].device, copy=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
