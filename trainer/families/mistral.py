"""Mistral: Llama, with attention that may look back no further than a window.

The window is the same in every block and counts tokens, so it does not change with any width or depth: growth keeps
`sliding_window` as it is, and equal logits stay equal on both sides of it. A new model has none.
"""

from __future__ import annotations

from typing import Any

from trainer.families.llama import Llama
from trainer.shape import Shape


class Mistral(Llama):
    name = "mistral"
    title = "Mistral"
    architecture = "MistralForCausalLM"
    whole_heads = False
    assumed = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        unbiased = {"attention_bias", "mlp_bias"}  # not fields of this architecture
        kept = {field: value for field, value in super().fixed(shape, n_positions).items() if field not in unbiased}
        return {**kept, "sliding_window": None}
