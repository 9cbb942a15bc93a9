"""The dimensions of a model, and where its first weights come from: what families and growth need of a spec.

Below :mod:`trainer.spec`, which holds a whole experiment and checks it with the help of both.
"""

from __future__ import annotations

from math import log10
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["even", "uneven", "diagonal"]
OptimizerState = Literal["fresh", "grown"]

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


class Rung(Spec):
    """A model on the way to the one that is wanted: its shape, and how many steps it is trained before it grows on."""

    shape: Shape
    steps: Annotated[int, Field(ge=1, le=2_000_000_000)]


class GrowInit(Spec):
    """Weights grown from `parent`, another model of the experiment, by a width rule and a depth rule.

    What a pair really preserves depends on the shapes; :func:`trainer.growth.plan` computes it.

    width, depth  keys of :data:`trainer.growth.OPERATORS`
    init_range    the spread of entries that are drawn at random
    split         how a reader shares a value among its copies: evenly; unevenly, entry by entry; or wholly to the copy
                  that belongs to the reader's own (block-diagonal matrices)
    snr_db        size of the copied weights against the noise that is added where no activation can show it, in dB, so
                  that copies do not stay alike for ever: 0 is as large as the weights, 20 a tenth; null is none
    d_vocab       rows of the token table where it is to grow too; null keeps the parent's
    n_positions   the longest context where it is to grow too; null keeps the parent's
    learn_steps   steps of training the maps themselves on the data before they are applied (LiGO); 0 is none
    learn_lr      learning rate of that
    optimizer     AdamW's two moments: fresh, or grown from the parent's as its weights are
    lr_by_width   divides the learning rate of a matrix by how often its inputs were copied, so that what it computes
                  moves as fast as the parent's
    ladder        shapes to go through first, smallest first; each growth is by the same rules
    """

    kind: Literal["grow"] = "grow"
    parent: str
    width: str = "duplicate"
    depth: str = "identity"
    init_range: Annotated[float, Field(gt=0, le=1)] = 0.02
    split: Split = "even"
    snr_db: Annotated[float, Field(ge=-20, le=100)] | None = 0.0
    d_vocab: Annotated[int, Field(ge=1, le=2_000_000_000)] | None = None
    n_positions: Annotated[int, Field(ge=1, le=2_000_000_000)] | None = None
    learn_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    learn_lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    optimizer: OptimizerState = "fresh"
    lr_by_width: bool = False
    ladder: tuple[Rung, ...] = ()

    @property
    def noise(self) -> float:
        """The noise's root mean square against that of the weights it is added to."""
        return 0.0 if self.snr_db is None else 10 ** (-self.snr_db / 20)

    @model_validator(mode="before")
    @classmethod
    def _noise_was_a_ratio(cls, data: Any) -> Any:
        """Specs that were stored before noise was given in dB."""
        if isinstance(data, dict) and "noise" in data and "snr_db" not in data:
            data = {**data}
            noise = data.pop("noise")
            data["snr_db"] = -20 * log10(noise) if isinstance(noise, int | float) and noise > 0 else None
        return data


Init = Annotated[RandomInit | CheckpointInit | GrowInit, Field(discriminator="kind")]
