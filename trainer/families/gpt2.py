"""GPT-2: learned positions, LayerNorm before each sub-layer, a two-matrix MLP, biases everywhere.

Matrices are Conv1D, stored (in, out); queries, keys and values are fused in c_attn. Per block (D = d_model = H d,
F = d_mlp):

    c_attn (D x 3 D: q | k | v, each (H, d))  -> attention  -> attn.c_proj (H d x D)  += residual (T, D)
    mlp.c_fc (D x F)                          -> gelu       -> mlp.c_proj (F x D)     += residual (T, D)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.families.base import Described, Family, Layout, Parameter, axis_sizes, require, square_problems, whole
from trainer.shape import Shape


class Gpt2(Family):
    name = "gpt2"
    title = "GPT-2"
    prefix = "transformer."
    rotary = False
    mean_centred = True
    square = True
    gated_mlp = False
    fused = True
    thetas = {}
    positions = "n_positions"
    not_weights = r"\.attn\.(bias|masked_bias)$"

    def problems(self, shape: Shape) -> list[tuple[str, str]]:
        return square_problems("GPT-2", shape)

    def parameters(self, shape: Shape, n_positions: int, d_vocab: int, tied: bool) -> tuple[Parameter, ...]:
        add = Layout(axis_sizes(shape, n_positions, d_vocab))
        embed = ("embed",)
        qkv = (("q_head", "q_dim"), ("kv_head", "k_dim"), ("kv_head", "v_dim"))
        add.matrix("transformer.wte.weight", embed, ("vocab",), in_first=True, looked_up=not tied, reads_vocab=tied)
        add.matrix("transformer.wpe.weight", embed, ("position",), in_first=True, looked_up=True)
        for i in range(shape.n_layers):
            block = f"transformer.h.{i}"
            add.vector(f"{block}.ln_1.weight", "norm_gain", embed, layer=i)
            add.vector(f"{block}.ln_1.bias", "norm_bias", embed, layer=i)
            add.matrix(f"{block}.attn.c_attn.weight", qkv, embed, in_first=True, layer=i)
            add.vector(f"{block}.attn.c_attn.bias", "bias", qkv, layer=i)
            add.matrix(
                f"{block}.attn.c_proj.weight", embed, ("q_head", "v_dim"), in_first=True, layer=i, writes_residual=True
            )
            add.vector(f"{block}.attn.c_proj.bias", "bias", embed, layer=i, writes_residual=True)
            add.vector(f"{block}.ln_2.weight", "norm_gain", embed, layer=i)
            add.vector(f"{block}.ln_2.bias", "norm_bias", embed, layer=i)
            add.matrix(f"{block}.mlp.c_fc.weight", ("mlp",), embed, in_first=True, layer=i)
            add.vector(f"{block}.mlp.c_fc.bias", "bias", ("mlp",), layer=i)
            add.matrix(f"{block}.mlp.c_proj.weight", embed, ("mlp",), in_first=True, layer=i, writes_residual=True)
            add.vector(f"{block}.mlp.c_proj.bias", "bias", embed, layer=i, writes_residual=True)
        add.vector("transformer.ln_f.weight", "norm_gain", embed, final_norm=True)
        add.vector("transformer.ln_f.bias", "norm_bias", embed, final_norm=True)
        if not tied:
            add.matrix("lm_head.weight", ("vocab",), embed)
        return tuple(add.parameters)

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": n_positions,
            # One fused operation; "gelu_new" is the same function in a chain of them. A checkpoint keeps its own.
            "activation_function": "gelu_pytorch_tanh",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        per_layer = "the scale of attention would change with a block's place, which growth moves"
        require(config, "scale_attn_by_inverse_layer_idx", (False,), per_layer)
        require(config, "scale_attn_weights", (True,), "attention without its scale is not carried by growth")
        require(config, "add_cross_attention", (False,), "cross-attention is not carried by growth")
        d_model, n_heads = whole(config, "n_embd", 768), whole(config, "n_head", 12)
        shape = Shape(
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_model // n_heads,
            d_mlp=whole(config, "n_inner", 4 * d_model),
            n_layers=whole(config, "n_layer", 12),
            layer_norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )
        return Described(
            self.possible(shape),
            whole(config, "n_positions", 1024),
            whole(config, "vocab_size", 50257),
            bool(config.get("tie_word_embeddings", True)),
        )

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        return {
            **config,
            "n_embd": shape.d_model,
            "n_head": shape.n_heads,
            "n_inner": shape.d_mlp,
            "n_layer": shape.n_layers,
            "layer_norm_epsilon": shape.layer_norm_eps,
        }

    def extended(
        self, config: Mapping[str, Any], *, n_positions: int, d_vocab: int, rope_power: float = 1.0
    ) -> dict[str, Any]:
        longer = super().extended(config, n_positions=n_positions, d_vocab=d_vocab, rope_power=rope_power)
        return longer | ({"n_ctx": n_positions} if "n_ctx" in config else {})  # of the first files; says it twice
