"""Pico models: a whole transformer in a few thousand numbers, saved as any checkpoint is. Never downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.families import build_model, get_family
from trainer.shape import GrowInit, Shape

N_POSITIONS, D_VOCAB = 24, 53

#: The parent of most tests, by family; each axis has its own size, so that a mixed-up axis cannot pass unseen.
PARENT = {
    "gpt2": Shape(d_model=12, n_heads=3, d_head=4, d_mlp=20, n_layers=2),
    "gpt_neox": Shape(d_model=24, n_heads=3, d_head=8, d_mlp=20, n_layers=2),
    "llama": Shape(d_model=12, n_heads=6, n_kv_heads=2, d_head=4, d_mlp=20, n_layers=2),
}
#: Families with Llama's axes, which differ in what stands on them: they grow from and to Llama's shapes.
LIKE_LLAMA = ("gemma", "gemma2", "gemma3_text", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2")
PARENT |= dict.fromkeys(LIKE_LLAMA, PARENT["llama"])

#: What rules promise, which plans and forward passes are held to: widths that lose the function, depths that keep it.
LOSING_WIDTHS, KEEPING_DEPTHS = {"aki", "random_pad"}, {"identity"}


def child(family: str, **changes: Any) -> Shape:
    return Shape.model_validate(PARENT[family].model_dump() | changes)


def grow(width: str = "duplicate", depth: str = "identity", **settings: Any) -> GrowInit:
    return GrowInit.model_validate({"parent": "small", "width": width, "depth": depth, **settings})


def save(folder: Path, family: str, shape: Shape, *, tied: bool = True, dtype: str = "float32", **config: Any) -> Path:
    """A checkpoint whose every number matters: no bias is zero, no gain one, attention is far from uniform."""
    import torch

    torch.manual_seed(7)
    model = build_model(get_family(family).config(shape, N_POSITIONS, D_VOCAB, tied) | config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def exact_logits(folder: Path) -> Any:
    """:func:`logits` in float64 throughout, which transformers' norms and rotations are not by themselves."""
    import torch

    from trainer.growth.table import EXACT, load

    tokens = torch.randint(0, D_VOCAB, (2, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load(folder, EXACT)(tokens).logits


def logits(folder: Path, dtype: str = "float32") -> Any:
    """What the checkpoint in `folder` says to some fixed tokens, (2, N_POSITIONS, D_VOCAB); no code of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokens = torch.randint(0, D_VOCAB, (2, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits.float()
