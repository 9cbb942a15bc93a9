"""Attention for short contexts on a CPU in bfloat16: two to five times as fast there as torch's own.

torch's fused kernel wins where [T, T] scores are large, and on GPUs; at T = 128 and 256 its backward pass on a CPU
takes several times as long as a few small matrix products. Elsewhere this hands over to it (`sdpa`), so a model that
uses it is the same model.

Letters: B windows in a batch, H query heads, K key/value heads, T tokens in a window, d d_head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

#: The name by which a model is told to use it; it is not written into a checkpoint's config.
NAME = "kangaroo"
#: The longest context at which it is used: measured at 128, 256, 384 (2 to 5 times as fast), 512 and 1024 (slower).
LONGEST = 384


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T scale) v under a causal mask, for q, k, v [N, T, d]: N = B * H.

    The scores are made in float32: rounded to bfloat16, sharp attention would lose several times as much as it does in
    torch's own kernel, and the product is small. All else is in the inputs' type; torch's softmax backward computes in
    float32 whatever comes in.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        t = q.shape[-2]
        wide = torch.promote_types(q.dtype, torch.float32)
        mask = torch.full((t, t), -torch.inf, dtype=wide).triu_(1)
        p = torch.baddbmm(mask, q.to(wide), k.to(wide).mT, alpha=scale).softmax(-1).to(q.dtype)  # [N, T, T]
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return p @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        d_scores = torch._softmax_backward_data(grads[0] @ v.mT, p, -1, p.dtype)
        return (d_scores @ k).mul_(ctx.scale), (d_scores.mT @ q).mul_(ctx.scale), p.mT @ grads[0], None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, H, T, d], key and value [B, K, T, d]; returns [B, T, H, d]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    short = query.shape[2] == key.shape[2] <= LONGEST
    if not (query.device.type == "cpu" and half and short and causal and attention_mask is None and not dropout):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    whole = (query, repeat_kv(key, groups), repeat_kv(value, groups))
    q, k, v = (x.to(torch.bfloat16).flatten(0, 1) for x in whole)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _CausalAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return out.view(query.shape[0], query.shape[1], *out.shape[1:]).transpose(1, 2).contiguous(), None


def use_in(model: Any) -> None:
    """Make a transformers model use it, unless it caps its scores, which takes every score by itself."""
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # which is None where causal is all there is to say
    model.set_attn_implementation(NAME)
