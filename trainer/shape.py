"""The dimensions of a model, and where its first weights come from: what families and growth need of a spec.

Below :mod:`trainer.spec`, which holds a whole experiment and checks it with the help of both.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

WidthRule = Literal["random_pad", "duplicate"]
DepthRule = Literal["append_random", "stack", "interleave", "solar", "midas", "identity"]

#: Limits far above any model that exists, so that no spec makes a count or a plan run for ever.
Dimension = Annotated[int, Field(ge=1, le=1_000_000)]
Layers = Annotated[int, Field(ge=1, le=2_000)]


class Spec(BaseModel):
    """What every part of a spec is: frozen, finite, and without fields that are not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Shape(Spec):
    """The dimensions of a transformer.

    d_model      width of the residual stream          n_heads     attention (query) heads
    d_mlp        width of the MLP's hidden layer       n_kv_heads  key/value heads; null: as many as n_heads
    d_head       width of one head                     n_layers    blocks
    """

    d_model: Dimension
    n_heads: Dimension
    n_kv_heads: Dimension | None = None
    d_head: Dimension
    d_mlp: Dimension
    n_layers: Layers
    layer_norm_eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


class RandomInit(Spec):
    """Every matrix from N(0, init_range), biases zero, norm gains one."""

    kind: Literal["random"] = "random"
    init_range: Annotated[float, Field(gt=0, le=1)] = 0.02


class CheckpointInit(Spec):
    """A pre-trained checkpoint: a Hugging Face folder (:func:`trainer.spec.is_path`) or a name on the Hub."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Annotated[str, Field(min_length=1)]


class GrowInit(Spec):
    """Weights grown from `parent`, another model of the experiment, by a width rule and a depth rule.

    What a pair really preserves depends on the shapes; :func:`trainer.growth.plan` computes it. `init_range` is the
    spread of entries that are drawn at random; `noise` is what `duplicate` adds where it cannot be seen, against the
    size of the copied weights, so that copies do not stay alike for ever.
    """

    kind: Literal["grow"] = "grow"
    parent: str
    width: WidthRule = "duplicate"
    depth: DepthRule = "identity"
    init_range: Annotated[float, Field(gt=0, le=1)] = 0.02
    noise: Annotated[float, Field(ge=0, le=10)] = 1.0


Init = Annotated[RandomInit | CheckpointInit | GrowInit, Field(discriminator="kind")]
