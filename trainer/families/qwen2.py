"""Qwen2 and Qwen2.5: Llama, with biases on queries, keys and values, and none after attention.

With `use_sliding_window`, blocks from `max_window_layers` on attend through a window; newer configs list each block's
kind in `layer_types`, and so does every grown one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.llama import FULL, SLIDING, Llama
from trainer.shape import Shape


class Qwen2(Llama):
    name = "qwen2"
    title = "Qwen2"
    architecture = "Qwen2ForCausalLM"
    biases = True
    whole_heads = False
    assumed = {"max_position_embeddings": 32768, "num_key_value_heads": 32}

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        not_fields = {"attention_bias", "mlp_bias"}
        kept = {field: value for field, value in super().fixed(shape, n_positions).items() if field not in not_fields}
        return {**kept, "use_sliding_window": False}

    def window(self, config: Mapping[str, Any]) -> int | None:
        return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None

    def layer_types(self, config: Mapping[str, Any], n_layers: int) -> list[str]:
        full = n_layers if self.window(config) is None else min(config.get("max_window_layers", 28), n_layers)
        return [FULL] * full + [SLIDING] * (n_layers - full)
