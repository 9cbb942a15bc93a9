"""Qwen2 and Qwen2.5: Llama, with biases on queries, keys and values, and none after attention.

Some blocks may attend through a window, by their place in the stack (`use_sliding_window`, `layer_types`): growth moves
blocks, so a config that does so is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.families.base import Described, FamilyError, require
from trainer.families.llama import Llama
from trainer.shape import Shape

FULL = "full_attention"


class Qwen2(Llama):
    name = "qwen2"
    title = "Qwen2"
    architecture = "Qwen2ForCausalLM"
    biases = True
    whole_heads = False
    assumed = {"max_position_embeddings": 32768, "num_key_value_heads": 32}

    def fixed(self, n_positions: int) -> dict[str, Any]:
        not_fields = {"attention_bias", "mlp_bias"}
        kept = {field: value for field, value in super().fixed(n_positions).items() if field not in not_fields}
        return {**kept, "use_sliding_window": False}

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        require(
            config, "use_sliding_window", (False, None), "a block's place says if it has a window, and growth moves it"
        )
        if other := {*(config.get("layer_types") or ())} - {FULL}:
            raise FamilyError(
                f"config.json: layer_types {min(other)!r}: a block's kind of attention goes by its place, which growth "
                f"moves; {FULL!r} in all of them would be right"
            )
        return super().shape_of(config)

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        return {**super().resized(config, shape, sources), "layer_types": [FULL] * shape.n_layers}
