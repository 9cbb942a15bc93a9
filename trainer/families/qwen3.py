"""Qwen3: Qwen2 without its biases, and with an RMSNorm on each head's query and key, before they are rotated.

    q_norm, k_norm (d = d_head)     one gain for all heads; each head is normed by itself

So a copy of a head is normed as the head is. How a head grows wider: :class:`trainer.growth.width.Duplicate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.base import Described, require
from trainer.families.qwen2 import Qwen2
from trainer.shape import Shape


class Qwen3(Qwen2):
    name = "qwen3"
    title = "Qwen3"
    architecture = "Qwen3ForCausalLM"
    biases = False
    qk_norm = "head"
    assumed = {**Qwen2.assumed, "head_dim": 128}

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        return {**super().fixed(shape, n_positions), "attention_bias": False}

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        require(config, "attention_bias", (False, None), "biases in attention are not carried by growth")
        return super().shape_of(config)
