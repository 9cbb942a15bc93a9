"""Phi-3, Phi-3.5 and Phi-4-mini: Llama, with fused matrices and heads that may be rotated in part.

Per block (T tokens, D = d_model, H = n_heads, K = n_kv_heads, d = d_head, F = d_mlp):

    qkv_proj ((H + 2 K) d x D: q | k | v)  -> attention, RoPE on the first R of each d channels  -> o_proj  += residual
    gate_up_proj (2 F x D: gate | up)      -> silu(gate) * up                                 -> down_proj  += residual

A wider head keeps R, hence each pair and its frequency, whatever kind of RoPE it is (longrope has a factor for each
pair); further channels are not rotated, and the share (`partial_rotary_factor`) is written anew.

transformers counts the factors of longrope against d_model / n_heads, so there d_model must be n_heads x d_head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.families import rope
from trainer.families.base import Layout
from trainer.families.errors import FamilyError
from trainer.families.llama import Llama
from trainer.shape import Shape

#: The context that Phi-3 was trained with, and longrope starts from, where config.json does not say it.
TRAINED = {"original_max_position_embeddings": 4096}


class Phi3(Llama):
    name = "phi3"
    title = "Phi-3"
    architecture = "Phi3ForCausalLM"
    rotary = False
    rotates_first = True
    fused = True
    possible_ropes = frozenset({"default", "longrope"})
    whole_heads = False
    assumed = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}

    def _attention(self, add: Layout, attention: str, layer: int) -> None:
        out = ("q_head", "v_dim")
        qkv = (("q_head", "q_dim"), ("kv_head", "k_dim"), ("kv_head", "v_dim"))
        add.matrix(f"{attention}.o_proj.weight", ("embed",), out, layer=layer, writes_residual=True)
        add.matrix(f"{attention}.qkv_proj.weight", qkv, ("embed",), layer=layer)

    def _mlp(self, add: Layout, mlp: str, layer: int) -> None:
        add.matrix(f"{mlp}.gate_up_proj.weight", (("mlp",), ("mlp",)), ("embed",), layer=layer)
        add.matrix(f"{mlp}.down_proj.weight", ("embed",), ("mlp",), layer=layer, writes_residual=True)

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        not_fields = {"attention_bias", "mlp_bias"}
        kept = {field: value for field, value in super().fixed(shape, n_positions).items() if field not in not_fields}
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return {**kept, **dropouts, "original_max_position_embeddings": n_positions, "sliding_window": None}

    def rope_kinds(self, config: Mapping[str, Any]) -> set[str]:
        # Its first files call longrope by other names.
        return {"longrope" if kind in ("su", "yarn") else kind for kind in super().rope_kinds(config)}

    def _possible_share(self, config: Mapping[str, Any]) -> None:
        rotated_share(config)

    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        sized = super().resized(config, shape, sources)
        if shape.d_model == shape.n_heads * shape.d_head:
            sized.pop("head_dim")  # not a field of its own: what follows from the others need not be said
        elif "longrope" in self.rope_kinds(config):
            raise FamilyError(
                f"config.json: rope_type longrope: transformers wants d_model ({shape.d_model}) = n_heads "
                f"({shape.n_heads}) x d_head: {shape.n_heads * shape.d_head} would be right"
            )
        if "hidden_size" not in config:
            return sized  # of a new model: nothing was rotated yet
        d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if d_head == shape.d_head:
            return sized
        rotated = int(d_head * rotated_share(config))
        return rope.with_rotated_share(sized, "partial_rotary_factor", rope.share_of(rotated, shape.d_head))

    def extended(
        self, config: Mapping[str, Any], *, n_positions: int, d_vocab: int, rope_power: float = 1.0
    ) -> dict[str, Any]:
        stated = TRAINED | dict(config) if "longrope" in self.rope_kinds(config) else config
        return super().extended(stated, n_positions=n_positions, d_vocab=d_vocab, rope_power=rope_power)


def rotated_share(config: Mapping[str, Any]) -> float:
    """The share of a head's channels that RoPE rotates."""
    return rope.rotated_share(config, "partial_rotary_factor", 1.0)
