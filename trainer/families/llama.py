"""Llama: rotary positions, RMSNorm before each sub-layer, a gated MLP, grouped key/value heads, no biases.

Per block (T tokens, D = d_model, H = n_heads, K = n_kv_heads, d = d_head, F = d_mlp):

    q (H d x D), k, v (K d x D)     -> attention, RoPE on q and k   -> o (D x H d)    += residual (T, D)
    gate, up (F x D)                -> silu(gate) * up              -> down (D x F)   += residual (T, D)

`d_head` is free of `d_model / n_heads`, though transformers wants d_model to be a multiple of n_heads.

Architectures that differ from this one in a few facts are subclasses, each in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trainer.families.base import Described, Family, FamilyError, Layout, Parameter, axis_sizes, require, whole
from trainer.shape import Shape


class Llama(Family):
    name = "llama"
    title = "Llama"
    prefix = "model."
    rotary = True
    mean_centred = False
    square = False
    gated_mlp = True
    fused = False
    not_weights = r"rotary_emb\.inv_freq$"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    biases: ClassVar[bool] = False  # of queries, keys and values
    #: Of a block's two norms, in the model's order; `post_norm`: they stand after attention and MLP, not before.
    norms: ClassVar[tuple[str, str]] = ("input_layernorm", "post_attention_layernorm")
    post_norm: ClassVar[bool] = False
    whole_heads: ClassVar[bool] = True  # transformers wants d_model to be a multiple of n_heads
    #: What transformers takes a field for that a config.json leaves out.
    assumed: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 2048}

    def problems(self, shape: Shape) -> list[tuple[str, str]]:
        found = []
        if shape.d_head % 2:
            near = f"{shape.d_head - 1} or {shape.d_head + 1}" if shape.d_head > 1 else "2"
            found.append(("d_head", f"RoPE rotates channels in pairs, so it must be even: {near}"))
        if shape.n_kv_heads is not None and shape.n_heads % shape.n_kv_heads:
            divisors = [k for k in range(1, shape.n_heads + 1) if shape.n_heads % k == 0]
            found.append(
                (
                    "n_kv_heads",
                    f"the {shape.n_heads} query heads must split evenly over the "
                    f"key/value heads: one of {', '.join(map(str, divisors))}",
                )
            )
        if self.whole_heads and shape.d_model % shape.n_heads:
            below = shape.d_model // shape.n_heads * shape.n_heads
            near = f"{below} or {below + shape.n_heads}" if below else str(shape.n_heads)
            found.append(
                (
                    "d_model",
                    f"transformers' Llama wants a multiple of n_heads ({shape.n_heads}): {near}",
                )
            )
        return found

    def parameters(self, shape: Shape, n_positions: int, d_vocab: int, tied: bool) -> tuple[Parameter, ...]:
        add = Layout(axis_sizes(shape, n_positions, d_vocab), self.gain_from_one)
        embed = ("embed",)
        add.matrix("model.embed_tokens.weight", embed, ("vocab",), in_first=True, looked_up=not tied, reads_vocab=tied)
        for i in range(shape.n_layers):
            block = f"model.layers.{i}"
            self._attention(add, f"{block}.self_attn", i)
            add.matrix(f"{block}.mlp.gate_proj.weight", ("mlp",), embed, layer=i)
            add.matrix(f"{block}.mlp.up_proj.weight", ("mlp",), embed, layer=i)
            add.matrix(f"{block}.mlp.down_proj.weight", embed, ("mlp",), layer=i, writes_residual=not self.post_norm)
            for norm in self.norms:
                add.vector(f"{block}.{norm}.weight", "norm_gain", embed, layer=i, writes_residual=self.post_norm)
        add.vector("model.norm.weight", "norm_gain", embed, final_norm=True)
        if not tied:
            add.matrix("lm_head.weight", ("vocab",), embed)
        return tuple(add.parameters)

    def _attention(self, add: Layout, attention: str, layer: int) -> None:
        """The parameters of a block's attention."""
        for name, axes in (("q", ("q_head", "q_dim")), ("k", ("kv_head", "k_dim")), ("v", ("kv_head", "v_dim"))):
            add.matrix(f"{attention}.{name}_proj.weight", axes, ("embed",), layer=layer)
            if self.biases:
                add.vector(f"{attention}.{name}_proj.bias", "bias", axes, layer=layer)
        out = ("q_head", "v_dim")
        add.matrix(f"{attention}.o_proj.weight", ("embed",), out, layer=layer, writes_residual=not self.post_norm)
        for name, head in (("q", "q_head"), ("k", "kv_head")):
            if self.qk_norm:
                over = (f"{name}_normed",) if self.qk_norm == "head" else (head, f"{name}_normed")
                add.vector(f"{attention}.{name}_norm.weight", "norm_gain", over, layer=layer, rescales=True)

    def fixed(self, n_positions: int) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "max_position_embeddings": n_positions,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        }

    def shape_of(self, config: Mapping[str, Any]) -> Described:
        require(config, "attention_bias", (False, None), "biases in attention are not carried by growth")
        require(config, "mlp_bias", (False, None), "biases in the MLP are not carried by growth")
        config = {**self.assumed, **config}
        d_model, n_heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
        kv_heads = whole(config, "num_key_value_heads", n_heads)
        shape = Shape(
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=None if kv_heads == n_heads else kv_heads,
            d_head=whole(config, "head_dim", d_model // n_heads),
            d_mlp=whole(config, "intermediate_size"),
            n_layers=whole(config, "num_hidden_layers"),
            layer_norm_eps=config.get("rms_norm_eps", 1e-6),
        )
        for field, message in self.problems(shape):
            raise FamilyError(f"config.json: {field} {getattr(shape, field)}: {message}")
        return Described(
            shape,
            whole(config, "max_position_embeddings"),
            whole(config, "vocab_size"),
            bool(config.get("tie_word_embeddings", False)),
        )

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        return {
            **config,
            "hidden_size": shape.d_model,
            "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.d_head,
            "intermediate_size": shape.d_mlp,
            "num_hidden_layers": shape.n_layers,
            "rms_norm_eps": shape.layer_norm_eps,
        }
