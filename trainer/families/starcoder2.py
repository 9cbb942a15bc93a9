"""StarCoder2: Llama's attention with LayerNorm, a two-matrix MLP, and biases everywhere.

Per block (T tokens, D = d_model, H = n_heads, K = n_kv_heads, d = d_head, F = d_mlp):

    q (H d x D), k, v (K d x D)   -> attention, RoPE on q and k   -> o (D x H d)        += residual (T, D)
    c_fc (F x D)                  -> gelu                         -> c_proj (D x F)     += residual (T, D)

All blocks attend through one `sliding_window`, or none, as Mistral's do. `d_head` is no field of its own: transformers
takes it for d_model / n_heads, but reads a `head_dim` where config.json has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.families.base import Described, Layout, require
from trainer.families.llama import Llama
from trainer.shape import Shape


class Starcoder2(Llama):
    name = "starcoder2"
    title = "StarCoder2"
    architecture = "Starcoder2ForCausalLM"
    mean_centred = True
    gated_mlp = False
    biases = True
    whole_heads = False
    epsilon = "norm_epsilon"
    activation = ("hidden_act", "gelu_pytorch_tanh")
    assumed = {
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }

    def _attention(self, add: Layout, attention: str, layer: int) -> None:
        super()._attention(add, attention, layer)
        add.vector(f"{attention}.o_proj.bias", "bias", ("embed",), layer=layer, writes_residual=True)

    def _mlp(self, add: Layout, mlp: str, layer: int) -> None:
        add.matrix(f"{mlp}.c_fc.weight", ("mlp",), ("embed",), layer=layer)
        add.vector(f"{mlp}.c_fc.bias", "bias", ("mlp",), layer=layer)
        add.matrix(f"{mlp}.c_proj.weight", ("embed",), ("mlp",), layer=layer, writes_residual=True)
        add.vector(f"{mlp}.c_proj.bias", "bias", ("embed",), layer=layer, writes_residual=True)

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        not_fields = {"attention_bias", "mlp_bias"}
        kept = {field: value for field, value in super().fixed(shape, n_positions).items() if field not in not_fields}
        dropouts = {"residual_dropout": 0.0, "embedding_dropout": 0.0}
        return {**kept, **dropouts, "use_bias": True, "sliding_window": None}

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        require(config, "use_bias", (True,), "a model without its biases is not carried by growth")
        return super().shape_of(config)

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        sized = super().resized(config, shape, sources)
        if shape.d_model == shape.n_heads * shape.d_head:
            sized.pop("head_dim")  # what follows from the others need not be said
        return sized
