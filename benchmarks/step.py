"""Training tokens a second beside the Hugging Face Trainer and nanoGPT's loop, as ratios to a plain loop.

    python -m benchmarks step [--d-model 256] [--layers 4] [--rounds 9] [--threads N] [--clock wall]

Every loop trains a model of GPT-2's shape on the same batches of Python's standard library, all in one process. A round
gives each loop one block of 2 to 4 steps, in a new order; a row is the median over the rounds, least and most in
brackets. Ratios hold where seconds do not: what disturbs the machine disturbs all rows of a round. `plain loop, again`
shows how far two equal loops came apart. A round in which other processes used more than a tenth of a core does not
count, whatever came of it: two threads wait for each other, so a guest on one core costs both. Is the machine always
shared, take one thread and `--clock cpu`.

The loops:

    plain loop   GPT2LMHeadModel as it comes, labels=, AdamW, clipping, float32
    Trainer      transformers.Trainer's own loop, put to sleep between two steps; sampler sequential, so that it sees
                 the same batches; dropout 0 as everywhere here; otherwise its defaults, then bf16=True
    nanoGPT      a model and a step written like those of https://github.com/karpathy/nanoGPT: fused query-key-value,
                 torch's attention, exact GELU, float32 on a CPU; then with autocast, which it does not have there
    Kangaroo     `trainer.train.train`, an event a step, in both precisions
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import trainer.train
from benchmarks import _machine as machine
from trainer import attention, budget
from trainer.data import prepare
from trainer.evaluate import windows
from trainer.families import build_model, get_family
from trainer.spec import DataSpec, Shape, TrainSpec

try:
    import accelerate  # noqa: F401  the Trainer does not start without it
    from greenlet import getcurrent, greenlet
except ImportError as error:
    sys.exit(f"{error}: pip install -c constraints.txt '.[bench]' (`make bench` does it)")

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MOST_STEPS_IN_A_BLOCK = 4
TRIES = 8  # rounds tried for each that counts
WARM_UP = 2


@dataclass
class Loop:
    """Something that trains: each `next(steps)` is one step and gives its loss."""

    title: str
    dtype: torch.dtype  # of its matrix products
    model: Any
    steps: Iterator[Any]
    wall: list[float] = field(default_factory=list)  # seconds a step, one of each round
    cpu: list[float] = field(default_factory=list)
    loss: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the ratios are of")
    parser.add_argument("--quiet", type=float, help="a round counts if others used at most so many cores; wall: 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the blocks' order and lengths")
    parser.add_argument("--cache", type=Path, default=Path("var/benchmarks/data"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # the Trainer's default, told on a CPU each time

    data = DataSpec.model_validate({"source": "python-stdlib", "tokenizer": {"kind": "bpe", "d_vocab": options.vocab}})
    tokens = prepare(data, options.cache, lambda what, done, total: None).train.array()
    shape = Shape(
        d_model=options.d_model,
        n_heads=options.d_model // 64,
        d_head=64,
        d_mlp=4 * options.d_model,
        n_layers=options.layers,
    )
    settings = TrainSpec(
        n_ctx=options.ctx, batch_size=options.batch, max_steps=trainer.train.MOST_TRAIN_EVENTS, lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1], warmup_steps=0, schedule="constant",
        grad_clip=CLIP, eval_every=10**9, checkpoint_every=10**9,
    )  # fmt: skip
    flops_per_token = budget.flops_per_token("gpt2", shape, options.ctx, options.vocab, tied=True)
    clock = CLOCKS[options.clock]
    quiet = (0.1 if options.clock == "wall" else float("inf")) if options.quiet is None else options.quiet

    with tempfile.TemporaryDirectory(prefix="kangaroo-step-") as scratch:
        rows = enough_rows(tokens, settings, WARM_UP + options.rounds * TRIES * MOST_STEPS_IN_A_BLOCK)
        loops = make_loops(rows, tokens, shape, settings, options.vocab, Path(scratch))
        warm_up(loops)
        peaks = {dtype: machine.matmul_peak(dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
        others, aside = measure(loops, options.rounds, random.Random(options.seed), quiet)
        peaks = {dtype: max(peak, machine.matmul_peak(dtype, clock)) for dtype, peak in peaks.items()}

    chosen = trainer.train.choose_precision("auto", options.d_model, torch.device("cpu"))
    parameters = sum(p.numel() for p in loops[0].model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters: d {options.d_model}, L {options.layers}, vocabulary {options.vocab}, "
        f"{options.batch} x {options.ctx} tokens a step, {options.rounds} rounds, ratios of {options.clock} time\n"
    )
    report(loops, options.clock, settings.tokens_per_step, flops_per_token, peaks)
    peak = f"{peaks[torch.float32] / 1e9:,.0f} GFLOP/s fp32, {peaks[torch.bfloat16] / 1e9:,.0f} bf16"
    losses = [loop.loss for loop in loops]
    print(f"\n{machine.line(options.threads)}, transformers {transformers.__version__}.")
    print(f"Products of 2048 x 2048 matrices: {peak}; Kangaroo's `auto` takes {chosen} here.")
    print(f"Others used {others:.2f} cores meanwhile; rounds set aside because they used more than {quiet}: {aside}.")
    print(f"The losses, all after as many steps: {min(losses):.3f} to {max(losses):.3f}.")


def make_loops(
    rows: Tensor, tokens: np.ndarray[Any, Any], shape: Shape, settings: TrainSpec, d_vocab: int, scratch: Path
) -> list[Loop]:
    """All loops, the base first. `rows` are the windows, [n, T + 1], in the order of `trainer.train`."""
    fp32, bf16 = torch.float32, torch.bfloat16
    config = GPT2Config(
        vocab_size=d_vocab, n_positions=settings.n_ctx, n_embd=shape.d_model, n_layer=shape.n_layers,
        n_head=shape.n_heads, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    batch = settings.batch_size

    def plain(title: str) -> Loop:
        model = seeded(lambda: GPT2LMHeadModel(config))
        return Loop(title, fp32, model, plain_loop(model, rows, batch))

    def hugging_face(title: str, dtype: torch.dtype) -> Loop:
        model = seeded(lambda: GPT2LMHeadModel(config))
        return Loop(title, dtype, model, trainer_loop(model, rows, batch, dtype == bf16, scratch / title))

    def nanogpt(title: str, dtype: torch.dtype) -> Loop:
        model = seeded(lambda: NanoGPT(shape, settings.n_ctx, d_vocab))
        return Loop(title, dtype, model, nanogpt_loop(model, rows, batch, dtype == bf16))

    def kangaroo(title: str, dtype: torch.dtype) -> Loop:
        content = get_family("gpt2").config(shape, settings.n_ctx, d_vocab, True, bos_token_id=0, eos_token_id=0)
        model = seeded(lambda: build_model(content))
        attention.use_in(model)
        task = trainer.train.Task(
            settings=settings,
            directory=scratch,
            tokenizer=scratch,
            tokens=tokens,
            held_out=windows(tokens, settings.n_ctx, settings.n_ctx),
            bytes_per_token=1.0,
            batch_seed=settings.seed,
            total_steps=trainer.train.MOST_TRAIN_EVENTS,  # not more, or several steps would share an event
            flops_per_token=0.0,
            precision="bf16" if dtype == bf16 else "fp32",
        )
        return Loop(title, dtype, model, kangaroo_loop(model, task))

    return [
        plain("plain loop"),
        plain("plain loop, again"),
        hugging_face("Trainer", fp32),
        hugging_face("Trainer, bf16", bf16),
        nanogpt("nanoGPT", fp32),
        nanogpt("nanoGPT, autocast bf16", bf16),
        kangaroo("Kangaroo, fp32", fp32),
        kangaroo("Kangaroo, bf16", bf16),
    ]


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


def enough_rows(tokens: np.ndarray[Any, Any], settings: TrainSpec, steps: int) -> Tensor:
    """The windows of the first `steps` batches, [steps * B, T + 1]."""
    batches = trainer.train.Batches(tokens, settings.n_ctx, settings.batch_size, settings.seed)
    made = [batches.at(step, torch.device("cpu")) for step in range(steps + 2)]  # the Trainer fetches one ahead
    return torch.cat([torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in made])


# --- Measuring --------------------------------------------------------------------------------------------------------


def warm_up(loops: list[Loop]) -> None:
    """Steps that do not count; in the last, each loop's products must be of the type that its row says."""
    for round_ in range(WARM_UP):
        for loop in loops:
            seen: set[torch.dtype] = set()
            layer = next(m for m in loop.model.modules() if isinstance(m, nn.Linear | Conv1D))
            hook = layer.register_forward_hook(lambda module, given, made, seen=seen: seen.add(made.dtype))
            next(loop.steps)
            hook.remove()
            if round_ == WARM_UP - 1 and seen != {loop.dtype}:
                raise SystemExit(f"{loop.title}: products in {seen}, not in {loop.dtype}")
    if len({sum(p.numel() for p in loop.model.parameters()) for loop in loops}) > 1:
        raise SystemExit("the loops' models differ in size")


def measure(loops: list[Loop], rounds: int, random_: random.Random, quiet: float) -> tuple[float, int]:
    """The cores that others used on average in the rounds that count, and how many rounds were set aside."""
    used: list[float] = []
    for tried in range(rounds * TRIES):
        n = random_.randint(2, MOST_STEPS_IN_A_BLOCK)  # the same for all of a round: their losses stay comparable
        seconds: dict[str, tuple[float, float]] = {}
        with machine.watch() as others:
            for loop in random_.sample(loops, len(loops)):
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(n):
                    loss = next(loop.steps)
                seconds[loop.title] = (time.perf_counter() - wall) / n, (time.process_time() - cpu) / n
                loop.loss = float(loss)
        if others.cores > quiet:
            continue
        used.append(others.cores)
        for loop in loops:
            loop.wall.append(seconds[loop.title][0])
            loop.cpu.append(seconds[loop.title][1])
        if len(used) == rounds:
            return statistics.mean(used), tried + 1 - rounds
    raise SystemExit(
        f"Others used more than {quiet} cores in all but {len(used)} of {rounds * TRIES} rounds. Try again, or with "
        "--threads 1 --clock cpu."
    )


def report(
    loops: list[Loop], clock: str, tokens_per_step: int, flops_per_token: float, peaks: dict[torch.dtype, float]
) -> None:
    second = "second" if clock == "wall" else "CPU second"
    print(f"| loop | speed, plain loop = 1 | tokens a {second} | cores used | share of peak | Kangaroo, bf16, to it |")
    print("|---|---|---|---|---|---|")
    base, ours = getattr(loops[0], clock), getattr(loops[-1], clock)
    for loop in loops:
        own = getattr(loop, clock)
        ratios = [b / o for b, o in zip(base, own, strict=True)]
        rate = tokens_per_step / statistics.median(own)
        ratio = "1" if loop is loops[0] else machine.spread(ratios)
        share = rate * flops_per_token / peaks[loop.dtype]
        lead = "1" if loop is loops[-1] else machine.spread([o / u for o, u in zip(own, ours, strict=True)])
        cores = sum(loop.cpu) / sum(loop.wall)
        print(f"| {loop.title} | {ratio} | {rate:,.0f} | {cores:.2f} | {share:.0%} | {lead} |")


# --- The loops --------------------------------------------------------------------------------------------------------


def plain_loop(model: Any, rows: Tensor, batch: int) -> Iterator[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    model.train()
    for windows_ in rows.split(batch):
        ids = windows_[:, :-1]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def trainer_loop(model: Any, rows: Tensor, batch: int, bf16: bool, scratch: Path) -> Iterator[Tensor]:
    """The Trainer's loop runs in a greenlet, which gives way after each step: same thread, same pool of threads."""
    losses: list[Tensor] = []

    class GivesWay(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            getcurrent().parent.switch()

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    arguments = transformers.TrainingArguments(
        str(scratch),
        bf16=bf16,
        use_cpu=True,
        per_device_train_batch_size=batch,
        max_steps=len(rows) // batch,
        learning_rate=LEARNING_RATE,
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    examples = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]
    loop = greenlet(Trainer(model, arguments, train_dataset=examples, callbacks=[GivesWay()]).train)
    while True:
        loop.switch()
        if loop.dead:
            return
        yield losses.pop()


def kangaroo_loop(model: Any, task: trainer.train.Task) -> Iterator[float]:
    trainer.train.FLUSH_SECONDS = 0.0  # an event each step, instead of a second's together: no cheaper
    optimizer = trainer.train.make_optimizer(model, task.settings)
    events = trainer.train.train(model, optimizer, task, trainer.train.State(), lambda: False)
    while True:
        torch.set_float32_matmul_precision("high")  # as trainer.run does; the other loops' is torch's default
        event = next(event for event in events if event["kind"] == "train")
        torch.set_float32_matmul_precision("highest")
        yield event["cross_entropy"]


def nanogpt_loop(model: NanoGPT, rows: Tensor, batch: int, bf16: bool) -> Iterator[Tensor]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)  # it takes the fused one on GPUs alone
    model.train()
    for windows_ in rows.split(batch):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(windows_[:, :-1], windows_[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach()


class NanoGPT(nn.Module):
    """GPT-2 in nanoGPT's way: one matrix for queries, keys and values, biases kept, head tied to the embedding."""

    def __init__(self, shape: Shape, n_ctx: int, d_vocab: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(d_vocab, shape.d_model), nn.Embedding(n_ctx, shape.d_model)
        self.blocks = nn.ModuleList(NanoBlock(shape) for _ in range(shape.n_layers))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, d_vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, 0.0, 0.02 / (2 * shape.n_layers) ** 0.5 if residual else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:  # [B, T] each
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class NanoBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        d = shape.d_model
        self.n_heads = shape.n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, shape.d_mlp), nn.Linear(shape.d_mlp, d)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        parts = self.qkv(self.norm_1(x)).split(x.shape[-1], dim=2)
        q, k, v = (part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in parts)  # [B, H, T, d_head]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.gelu(self.up(self.norm_2(x))))


if __name__ == "__main__":
    main()
