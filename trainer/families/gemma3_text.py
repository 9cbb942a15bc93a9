"""Gemma 3, the text model: Gemma 2 without its caps, with a norm on each head's query and key, and two RoPEs.

Blocks with a window rotate by theta 10,000, those without by theta 1,000,000; all but each sixth block have one. A
block's kind goes along when it is moved, and with it its RoPE.

A checkpoint with a vision tower has `model_type` gemma3: :func:`trainer.families.family_of` says how to part them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.gemma2 import Gemma2
from trainer.families.llama import FULL, SLIDING
from trainer.shape import Shape


class Gemma3Text(Gemma2):
    name = "gemma3_text"
    title = "Gemma 3 (text)"
    architecture = "Gemma3ForCausalLM"
    qk_norm = "head"
    caps_scores = False
    assumed = {**Gemma2.assumed, "max_position_embeddings": 131072}
    thetas = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    window_every = 6
    caps = {}

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        ropes = {
            FULL: {"rope_type": "default", "rope_theta": self.thetas["rope_theta"]},
            SLIDING: {"rope_type": "default", "rope_theta": self.thetas["rope_local_base_freq"]},
        }
        return super().fixed(shape, n_positions) | {"rope_parameters": ropes}

    def layer_types(self, config: Mapping[str, Any], n_layers: int) -> list[str]:
        every = config.get("sliding_window_pattern", self.window_every)
        return [SLIDING if (i + 1) % every else FULL for i in range(n_layers)]
