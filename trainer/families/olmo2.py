"""OLMo 2: Llama, with its norms after attention and MLP, and an RMSNorm on queries and on keys, all heads together.

Per block (T tokens, D = d_model, H = n_heads, K = n_kv_heads, d = d_head):

    q (H d x D), k (K d x D)  -> q_norm over H d, k_norm over K d -> RoPE, attention with v -> o -> norm  += residual
    gate, up (F x D)          -> silu(gate) * up -> down                                      -> norm  += residual

What a block writes is what its norms give, so a block is silent when those two gains are zero. With o and down at zero
instead, the norms would stand at zero, where their slope is 1 / sqrt(eps): the first gradient would be hundreds of
times as large as any other. Queries and keys keep their mean square as long as all heads are copied equally often.
"""

from __future__ import annotations

from typing import Any

from trainer.families.llama import Llama
from trainer.shape import Shape


class Olmo2(Llama):
    name = "olmo2"
    title = "OLMo 2"
    architecture = "Olmo2ForCausalLM"
    whole_heads = False
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    post_norms = norms
    qk_norm = "all"
    assumed = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}

    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        return {field: value for field, value in super().fixed(shape, n_positions).items() if field != "mlp_bias"}
