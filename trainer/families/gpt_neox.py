"""GPT-NeoX (Pythia): LayerNorm, partly rotated heads, attention and MLP side by side, biases everywhere.

Queries, keys and values are fused head by head in query_key_value. Per block (D = d_model = H d, F = d_mlp):

    query_key_value (3 D x D: for each head q (d), k (d), v (d))  -> attention, RoPE on the first R of each d channels
                                                                  -> attention.dense (D x H d)    += residual (T, D)
    dense_h_to_4h (F x D)   -> gelu                               -> dense_4h_to_h (D x F)        += residual (T, D)

With `use_parallel_residual` both read the same residual, each through its own norm; without, the MLP reads what
attention wrote. Growth is the same for either: one map for the residual stream, and a block is silent if both write
nothing.

RoPE rotates channels i and i + R / 2 of a head, for i < R / 2, by base^(-2 i / R) a position, and passes the others on;
config.json has not R but its share of d_head. A wider head keeps R, hence each pair and its frequency: further channels
are not rotated, and the share is written anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.families import rope
from trainer.families.base import Described, Family, Layout, Parameter, axis_sizes, require, square_problems, whole
from trainer.shape import Shape

#: Pythia's share of the rotated channels; also what a config means that says nothing.
ROTATED = 0.25


class GptNeoX(Family):
    name = "gpt_neox"
    title = "GPT-NeoX (Pythia)"
    prefix = "gpt_neox."
    rotary = False
    rotates_first = True
    parallel = True
    mean_centred = True
    square = True
    gated_mlp = False
    fused = True
    thetas = {"rotary_emb_base": 10000.0}
    not_weights = r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$"
    also_named = {"embed_out.weight": "lm_head.weight"}  # as the model of transformers 5 calls it, but never its files

    def problems(self, shape: Shape) -> list[tuple[str, str]]:
        return square_problems("GPT-NeoX", shape)

    def parameters(self, shape: Shape, n_positions: int, d_vocab: int, tied: bool) -> tuple[Parameter, ...]:
        add = Layout(axis_sizes(shape, n_positions, d_vocab))
        embed = ("embed",)
        qkv = (("q_head", "q_dim"), ("kv_head", "k_dim"), ("kv_head", "v_dim"))
        add.matrix("gpt_neox.embed_in.weight", embed, ("vocab",), in_first=True, looked_up=not tied, reads_vocab=tied)
        for i in range(shape.n_layers):
            block = f"gpt_neox.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                add.vector(f"{block}.{norm}.weight", "norm_gain", embed, layer=i)
                add.vector(f"{block}.{norm}.bias", "norm_bias", embed, layer=i)
            add.matrix(f"{block}.attention.query_key_value.weight", qkv, embed, interleaved=True, layer=i)
            add.vector(f"{block}.attention.query_key_value.bias", "bias", qkv, interleaved=True, layer=i)
            add.matrix(f"{block}.attention.dense.weight", embed, ("q_head", "v_dim"), layer=i, writes_residual=True)
            add.vector(f"{block}.attention.dense.bias", "bias", embed, layer=i, writes_residual=True)
            add.matrix(f"{block}.mlp.dense_h_to_4h.weight", ("mlp",), embed, layer=i)
            add.vector(f"{block}.mlp.dense_h_to_4h.bias", "bias", ("mlp",), layer=i)
            add.matrix(f"{block}.mlp.dense_4h_to_h.weight", embed, ("mlp",), layer=i, writes_residual=True)
            add.vector(f"{block}.mlp.dense_4h_to_h.bias", "bias", embed, layer=i, writes_residual=True)
        add.vector("gpt_neox.final_layer_norm.weight", "norm_gain", embed, final_norm=True)
        add.vector("gpt_neox.final_layer_norm.bias", "norm_bias", embed, final_norm=True)
        if not tied:
            add.matrix("embed_out.weight", ("vocab",), embed)
        return tuple(add.parameters)

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "max_position_embeddings": n_positions,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": ROTATED},
            "use_parallel_residual": True,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        require(config, "attention_bias", (True,), "attention without biases is not carried by growth")
        d_model, n_heads = whole(config, "hidden_size", 6144), whole(config, "num_attention_heads", 64)
        shape = Shape(
            d_model=d_model,
            n_heads=n_heads,
            d_head=max(1, d_model // n_heads),
            d_mlp=whole(config, "intermediate_size", 24576),
            n_layers=whole(config, "num_hidden_layers", 44),
            layer_norm_eps=config.get("layer_norm_eps", 1e-5),
        )
        self.possible(shape)
        self.known_ropes(config)
        require(config, "head_dim", (None, shape.d_head), "GPT-NeoX rotates heads of another width than it has")
        rotated_share(config)
        return Described(
            shape,
            whole(config, "max_position_embeddings", 2048),
            whole(config, "vocab_size", 50432),
            bool(config.get("tie_word_embeddings", False)),
        )

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        sized = {
            **config,
            "hidden_size": shape.d_model,
            "num_attention_heads": shape.n_heads,
            "intermediate_size": shape.d_mlp,
            "num_hidden_layers": shape.n_layers,
            "layer_norm_eps": shape.layer_norm_eps,
        }
        if config.get("head_dim") is not None:
            sized["head_dim"] = shape.d_head
        if "hidden_size" not in config or "num_attention_heads" not in config:
            return sized  # of a new model: nothing was rotated yet
        d_head = config["hidden_size"] // config["num_attention_heads"]
        if d_head == shape.d_head:
            return sized
        rotated = int(d_head * rotated_share(config))
        return rope.with_rotated_share(sized, "rotary_pct", rope.share_of(rotated, shape.d_head))


def rotated_share(config: Mapping[str, Any]) -> float:
    """The share of a head's channels that RoPE rotates; transformers 4 called it rotary_pct."""
    return rope.rotated_share(config, "rotary_pct", ROTATED)
