"""What a model is worth on held-out text: loss, accuracy, samples, and what growth did to it.

Letters: B windows in a batch, T tokens in a window, d d_model, V d_vocab, n = B * T.

Windows do not overlap; each predicts all of its T tokens, so the first ones have little context: the same for every
model that is compared. The head is applied to a few hundred positions at a time, so that [n, V] logits never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.processes import Processes

#: Positions whose logits exist at once.
HEAD_CHUNK = 512
#: Windows in a batch of evaluation; the speed is the same from 8 to 64.
BATCH = 16

Windows = np.ndarray[Any, np.dtype[np.int64]]  # [n_windows, T + 1]


def windows(tokens: np.ndarray[Any, Any], n_ctx: int, limit: int) -> Windows:
    """Up to `limit` tokens' worth of windows, [n_windows, n_ctx + 1], spread evenly over the split.

    A split shorter than one window gives one window of what there is.
    """
    available = (len(tokens) - 1) // n_ctx
    if available < 1:
        return np.asarray(tokens, np.int64)[None, :]
    wanted = min(available, max(1, limit // n_ctx))
    chosen = np.linspace(0, available - 1, wanted).round().astype(np.int64)
    return np.stack([tokens[i * n_ctx : i * n_ctx + n_ctx + 1] for i in chosen]).astype(np.int64)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 when `precision` says so; weights stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def evaluate(
    model: Any, held_out: Windows, *, precision: str, bytes_per_token: float, processes: Processes | None = None
) -> dict[str, float | int]:
    """Cross-entropy (nats a token), perplexity, bits per byte and next-token accuracy over `held_out`.

    Bits per byte divides by the split's bytes a token, which makes models with different tokenizers comparable. Several
    processes share the windows, and all get the same figures.
    """
    device, processes = model.device, processes or Processes()
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for batch in _batches(held_out[processes.rank :: processes.count], device):
        with autocast(device, precision):
            for logits, targets in _logits(model, batch):
                total += F.cross_entropy(logits, targets, reduction="sum").double()
                right += (logits.argmax(-1) == targets).sum()
    processes.total(total)
    processes.total(right)
    n_tokens = held_out.shape[0] * (held_out.shape[1] - 1)
    cross_entropy = total.item() / n_tokens
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "bits_per_byte": cross_entropy / math.log(2) / bytes_per_token,
        "accuracy": right.item() / n_tokens,
        "n_tokens": n_tokens,
    }


@torch.inference_mode()
def compare(parent: Any, child: Any, held_out: Windows) -> dict[str, float | int]:
    """What growth did: both models on the same held-out tokens, in float32, no step taken between.

    max_logit_difference is over all positions and the whole vocabulary, logit_scale the parent's largest |logit| there;
    kl_divergence is KL(parent || child) in nats a token. A child's further tokens are left out of all of it: the
    parent's vocabulary is what both have.
    """
    device = child.device
    before, after, kl = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    largest, scale = (torch.zeros((), device=device) for _ in range(2))
    for batch in _batches(held_out, device):
        both = zip(_logits(parent.eval(), batch), _logits(child.eval(), batch), strict=True)
        for (old, targets), (whole, _) in both:
            new = whole[:, : old.shape[1]]
            old_log, new_log = old.log_softmax(-1), new.log_softmax(-1)
            before += F.nll_loss(old_log, targets, reduction="sum").double()
            after += F.nll_loss(new_log, targets, reduction="sum").double()
            kl += F.kl_div(new_log, old_log, reduction="sum", log_target=True).double()
            largest = torch.maximum(largest, (old - new).abs().max())
            scale = torch.maximum(scale, old.abs().max())
    n_tokens = held_out.shape[0] * (held_out.shape[1] - 1)
    return {
        "cross_entropy_before": before.item() / n_tokens,
        "cross_entropy_after": after.item() / n_tokens,
        "max_logit_difference": largest.item(),
        "logit_scale": scale.item(),
        "kl_divergence": max(0.0, kl.item() / n_tokens),
        "n_tokens": n_tokens,
    }


@torch.inference_mode()
def samples(
    model: Any, tokenizer: Any, held_out: Windows, end_of_text: int, *, n: int = 3, prompt_tokens: int = 24
) -> Iterator[dict[str, str]]:
    """Continuations of the first tokens of `n` held-out windows: the same prompts for every model of an experiment.

    Drawn at temperature 0.8 from the 50 likeliest tokens, with a fixed seed.
    """
    n_ctx = held_out.shape[1] - 1
    prompt_tokens = max(1, min(prompt_tokens, n_ctx // 2))
    prompts = [w[:prompt_tokens] for w in held_out[np.linspace(0, len(held_out) - 1, n).round().astype(int)]]
    ids = torch.from_numpy(np.stack(prompts)).to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        drawn = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(64, n_ctx - prompt_tokens)),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    for prompt, whole in zip(prompts, drawn.tolist(), strict=True):
        continuation = whole[len(prompt) :]
        if end_of_text in continuation:
            continuation = continuation[: continuation.index(end_of_text)]
        yield {"prompt": tokenizer.decode(prompt.tolist()), "text": tokenizer.decode(continuation)}


def _batches(held_out: Windows, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(held_out), BATCH):
        yield torch.from_numpy(held_out[start : start + BATCH]).to(device)  # [B, T + 1]


def _logits(model: Any, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of (logits [c, V] in float32, targets [c]) that together cover the batch [B, T + 1]."""
    hidden = model.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)  # [n, d]
    targets = batch[:, 1:].flatten()  # [n]
    head, cap = model.get_output_embeddings(), logit_cap(model)
    for start in range(0, len(targets), HEAD_CHUNK):
        piece = slice(start, start + HEAD_CHUNK)
        logits = head(hidden[piece]).float()
        yield logits if cap is None else logits.div_(cap).tanh_().mul_(cap), targets[piece]


def logit_cap(model: Any) -> float | None:
    """What a model keeps its logits x within, by cap * tanh(x / cap); None: nothing (only Gemma 2 has a cap)."""
    return getattr(model.config, "final_logit_softcapping", None)
