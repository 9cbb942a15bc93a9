"""Gemma: Llama, with gains that are stored from one, and a token table that is scaled by sqrt(d_model) when looked up.

    x (T, D) = sqrt(D) embed[token]     norm(x) = x / rms(x) * (1 + w)     gelu(gate) * up

`d_head` is 256 in all published sizes, whatever d_model / n_heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.base import Described, require
from trainer.families.llama import Llama
from trainer.shape import Shape


class Gemma(Llama):
    name = "gemma"
    title = "Gemma"
    architecture = "GemmaForCausalLM"
    whole_heads = False
    gain_from_one = True
    scales_embedding = True
    activation = ("hidden_act", "gelu_pytorch_tanh")
    assumed = {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    }

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        return {field: value for field, value in super().fixed(shape, n_positions).items() if field != "mlp_bias"}

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        require(config, "use_bidirectional_attention", (None, False), "what is grown here predicts the next token")
        return super().shape_of(config)
