"""Gemma 2: Gemma, with norms on both sides of attention and MLP, and windows in every other block.

Per block (T tokens, D = d_model):

    x (T, D)  -> norm -> attention, over a window in blocks 0, 2, ...  -> norm  += residual
              -> norm -> gelu(gate) * up -> down                       -> norm  += residual

What a block writes is what the norms after its sub-layers give, so it is silent when those two gains are zero: stored,
minus one. Scores are divided by sqrt(query_pre_attn_scalar), whatever d_head is. Scores and logits are capped,
cap * tanh(x / cap): entry by entry, so equal ones stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.families.gemma import Gemma
from trainer.families.llama import FULL, SLIDING
from trainer.shape import Shape


class Gemma2(Gemma):
    name = "gemma2"
    title = "Gemma 2"
    architecture = "Gemma2ForCausalLM"
    whole_heads = True
    fixed_scale = True
    caps_scores = True
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    post_norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    assumed = {**Gemma.assumed, "num_key_value_heads": 4, "sliding_window": 4096}
    #: Where config.json does not list the blocks with a window: all have one but each of this number.
    window_every: ClassVar[int] = 2
    caps: ClassVar[Mapping[str, float]] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        own = {"query_pre_attn_scalar": shape.d_head, "sliding_window": 4096, **self.caps}
        return super().fixed(shape, n_positions) | own

    def layer_types(self, config: Mapping[str, Any], n_layers: int) -> list[str]:
        return [SLIDING if (i + 1) % self.window_every else FULL for i in range(n_layers)]
