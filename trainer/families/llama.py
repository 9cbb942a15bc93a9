"""Llama: rotary positions, RMSNorm before each sub-layer, a gated MLP, grouped key/value heads, no biases.

Per block (T tokens, D = d_model, H = n_heads, K = n_kv_heads, d = d_head, F = d_mlp):

    q (H d x D), k, v (K d x D)     -> attention, RoPE on q and k   -> o (D x H d)    += residual (T, D)
    gate, up (F x D)                -> silu(gate) * up              -> down (D x F)   += residual (T, D)

`d_head` is free of `d_model / n_heads`, though transformers wants d_model to be a multiple of n_heads.

A block may attend through a window where config.json says so of that block (`layer_types`, or an older rule by its
place): a window counts tokens, so no width changes it, and a block that is moved or copied takes its kind along.

Architectures that differ from this one in a few facts are subclasses, each in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trainer.families import rope
from trainer.families.base import Described, Family, Layout, Parameter, axis_sizes, require, whole
from trainer.families.errors import FamilyError
from trainer.shape import Shape

#: Kinds of attention, as `layer_types` in config.json names them: all that came before, or the last few tokens.
FULL, SLIDING = "full_attention", "sliding_attention"


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
    #: A block's norms, in the model's order, and those of them that stand after attention and MLP, not before.
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    post_norms: ClassVar[tuple[str, ...]] = ()
    epsilon: ClassVar[str] = "rms_norm_eps"  # the field of config.json with the norms' eps
    whole_heads: ClassVar[bool] = True  # transformers wants d_model to be a multiple of n_heads
    #: What transformers takes a field for that a config.json leaves out.
    assumed: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 2048}
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")  # of a new model's MLP, and the field that says so

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
                    f"transformers' {self.title} wants a multiple of n_heads ({shape.n_heads}): {near}",
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
            self._mlp(add, f"{block}.mlp", i)
            for norm in self.norms:
                self._norm(add, f"{block}.{norm}", layer=i, writes_residual=norm in self.post_norms)
        self._norm(add, "model.norm", final_norm=True)
        if not tied:
            add.matrix("lm_head.weight", ("vocab",), embed)
        return tuple(add.parameters)

    def _norm(self, add: Layout, norm: str, **tags: Any) -> None:
        """The parameters of a norm of the residual stream."""
        add.vector(f"{norm}.weight", "norm_gain", ("embed",), **tags)
        if self.mean_centred:
            add.vector(f"{norm}.bias", "norm_bias", ("embed",), **tags)

    def _attention(self, add: Layout, attention: str, layer: int) -> None:
        """The parameters of a block's attention."""
        for name, axes in (("q", ("q_head", "q_dim")), ("k", ("kv_head", "k_dim")), ("v", ("kv_head", "v_dim"))):
            add.matrix(f"{attention}.{name}_proj.weight", axes, ("embed",), layer=layer)
            if self.biases:
                add.vector(f"{attention}.{name}_proj.bias", "bias", axes, layer=layer)
        out = ("q_head", "v_dim")
        add.matrix(f"{attention}.o_proj.weight", ("embed",), out, layer=layer, writes_residual=not self.post_norms)
        for name, head in (("q", "q_head"), ("k", "kv_head")):
            if self.qk_norm:
                over = (f"{name}_normed",) if self.qk_norm == "head" else (head, f"{name}_normed")
                add.vector(f"{attention}.{name}_norm.weight", "norm_gain", over, layer=layer, rescales=True)

    def _mlp(self, add: Layout, mlp: str, layer: int) -> None:
        """The parameters of a block's MLP."""
        add.matrix(f"{mlp}.gate_proj.weight", ("mlp",), ("embed",), layer=layer)
        add.matrix(f"{mlp}.up_proj.weight", ("mlp",), ("embed",), layer=layer)
        add.matrix(f"{mlp}.down_proj.weight", ("embed",), ("mlp",), layer=layer, writes_residual=not self.post_norms)

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "max_position_embeddings": n_positions,
            self.activation[0]: self.activation[1],
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
            layer_norm_eps=config.get(self.epsilon, 1e-6),
        )
        self.known_ropes(config)
        self._possible_share(config)
        self._possible_windows(config, shape.n_layers)
        return Described(
            self.possible(shape),
            whole(config, "max_position_embeddings"),
            whole(config, "vocab_size"),
            bool(config.get("tie_word_embeddings", False)),
        )

    def _possible_share(self, config: Mapping[str, Any]) -> None:
        """Raise :class:`FamilyError` where a part of each head is to be rotated, and the architecture rotates all."""
        if (share := rope.rotated_share(config, "partial_rotary_factor", 1.0)) != 1:
            raise FamilyError(
                f"config.json: partial_rotary_factor {share}: {self.title} rotates whole heads; 1 would be right"
            )

    def window(self, config: Mapping[str, Any]) -> int | None:
        """How many tokens a block with a window looks back; None: there are no windows."""
        stated = {"sliding_window": None, **self.assumed, **config}
        return None if stated["sliding_window"] is None else whole(stated, "sliding_window")

    def layer_types(self, config: Mapping[str, Any], n_layers: int) -> list[str] | None:
        """Each block's kind of attention where config.json does not list them; None: one kind for all."""
        return None

    def _possible_windows(self, config: Mapping[str, Any], n_layers: int) -> None:
        """Raise :class:`FamilyError` for kinds of attention that are not known, or not one for each block."""
        kinds = config.get("layer_types")
        if kinds is None:
            return
        if len(kinds) != n_layers:
            raise FamilyError(f"config.json: layer_types names {len(kinds)} blocks, where {n_layers} would be right")
        if other := {*kinds} - {FULL, SLIDING}:
            raise FamilyError(f"config.json: layer_types {min(other)!r}: growth knows {FULL} and {SLIDING}")
        if SLIDING in kinds and self.window(config) is None:
            raise FamilyError(f"config.json: layer_types has {SLIDING}, but there is no sliding_window")

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        sized = {
            **config,
            "hidden_size": shape.d_model,
            "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.d_head,
            "intermediate_size": shape.d_mlp,
            "num_hidden_layers": shape.n_layers,
            self.epsilon: shape.layer_norm_eps,
        }
        if kinds := self._moved(config, shape.n_layers, sources):
            sized["layer_types"] = kinds
        return sized

    def _moved(self, config: Mapping[str, Any], n_layers: int, sources: Sequence[int] | None) -> list[str] | None:
        """Each block's kind of attention in a model of `n_layers`, whose blocks continue `sources`."""
        by_rule = self.layer_types(config, n_layers)
        if "num_hidden_layers" not in config:
            return by_rule  # a new model
        depth = config["num_hidden_layers"]
        old = config.get("layer_types") or self.layer_types(config, depth)
        if old is None or (sources is None and n_layers == depth):
            return old
        if sources is not None:
            return [old[source] for source in sources]
        return by_rule if by_rule is not None and len({*old}) > 1 else old[:1] * n_layers
