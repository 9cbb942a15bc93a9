"""What a family is: the axes of every parameter of a Hugging Face architecture, and its config as a shape.

A family says nothing about growth and nothing about torch. It says, for each stored tensor, which named axes run along
it; growth rules are written on the axes alone and so work for every family. How to add one: docs/extending.md.

    axis      one index is                          size
    embed     a channel of the residual stream      d_model
    q_head    a query head                          n_heads       h reads kv_head h // (n_heads / n_kv_heads)
    kv_head   a key/value head (a group of q_heads) n_kv_heads
    q_dim     a channel of one head's query         d_head        three axes of one size: queries and keys meet in a
    k_dim     a channel of one head's key           d_head        dot product (RoPE, a scale), values do not, so
    v_dim     a channel of one head's value         d_head        each grows by its own map
    q_normed  a channel of a query after its norm   d_head        where queries and keys have norms (`qk_norm`), these
    k_normed  a channel of a key after its norm     d_head        are what meets, and the gain leads to them from q_dim
    mlp       a hidden unit of the MLP              d_mlp
    vocab     a token                               d_vocab
    position  a learned position                    n_positions
    layer     a block                               n_layers      not an axis of a tensor: `Parameter.layer`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

from trainer.families import rope
from trainer.families.errors import FamilyError
from trainer.shape import Shape

#: Several axes of one dimension, outermost first: a query projection writes ("q_head", "q_dim").
Axes = tuple[str, ...]

Kind = Literal["matrix", "bias", "norm_gain", "norm_bias"]


@dataclass(frozen=True)
class Parameter:
    """One stored tensor.

    A matrix is `out x in`. `out` is a tuple of segments that lie side by side: one, or several where an architecture
    fuses matrices (GPT-2's c_attn is queries, keys, values), so that a fused tensor is a view over logical axes.
    `interleaved` segments take turns along their first axes, which are of one size (GPT-NeoX: q, k, v of each head).
    `into` is empty for a vector. An embedding table is the matrix from a one-hot token (`vocab`) to `embed`.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]  # as stored
    out: tuple[Axes, ...]
    into: Axes = ()
    in_first: bool = False  # stored (in, out): embedding tables and GPT-2's Conv1D
    interleaved: bool = False
    layer: int | None = None
    writes_residual: bool = False  # with all of these `silent`, a block adds nothing to the residual stream
    final_norm: bool = False
    rescales: bool = False  # a gain that leads from one axis (q_dim) to another (q_normed): copies may have other ones
    from_one: bool = False  # a gain that is stored as its difference from one
    looked_up: bool = False  # a table whose rows are picked, not multiplied: costs no FLOPs
    reads_vocab: bool = False  # a tied table: also the output head

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_embedding(self) -> bool:
        """Counted out of `non-embedding parameters`: token and position tables, and an output head of its own."""
        axes = {*self.into, *(axis for segment in self.out for axis in segment)}
        return not axes.isdisjoint({"vocab", "position"})

    @property
    def fresh(self) -> Literal["normal", "zeros", "ones"]:
        """What it holds in a new model: N(0, init_range) for matrices, zero for biases, a gain of one for norms."""
        return "zeros" if self.from_one else _FRESH[self.kind]

    @property
    def silent(self) -> float:
        """The stored value that makes it give nothing."""
        return -1.0 if self.from_one else 0.0


_FRESH: dict[Kind, Literal["normal", "zeros", "ones"]] = {
    "matrix": "normal",
    "bias": "zeros",
    "norm_gain": "ones",
    "norm_bias": "zeros",
}


class Described(NamedTuple):
    """What a config says: the shape, and the three sizes that growth leaves alone."""

    shape: Shape
    n_positions: int
    d_vocab: int
    tied: bool


def axis_sizes(shape: Shape, n_positions: int, d_vocab: int) -> dict[str, int]:
    """The size of every axis of a model of this shape."""
    return {
        "embed": shape.d_model,
        "q_head": shape.n_heads,
        "kv_head": shape.kv_heads,
        "q_dim": shape.d_head,
        "k_dim": shape.d_head,
        "v_dim": shape.d_head,
        "q_normed": shape.d_head,
        "k_normed": shape.d_head,
        "mlp": shape.d_mlp,
        "vocab": d_vocab,
        "position": n_positions,
    }


class Family(ABC):
    """One Hugging Face architecture. Subclasses fill in names, axes and config fields; see docs/extending.md."""

    name: ClassVar[str]  # `model_type` in config.json
    title: ClassVar[str]
    prefix: ClassVar[str]  # of the base model inside the causal LM; checkpoints of the base model lack it
    rotary: ClassVar[bool]  # queries and keys are rotated in pairs (i, i + d_head / 2)
    #: Not so, but the first channels of a head are, and as many of a wider head: old channels must stay where they are.
    rotates_first: ClassVar[bool] = False
    #: RMSNorm on queries and keys: over the channels of each head, or over those of all heads together.
    qk_norm: ClassVar[Literal["head", "all"] | None] = None
    mean_centred: ClassVar[bool]  # LayerNorm, which also takes the mean away; not RMSNorm
    square: ClassVar[bool]  # insists on d_model = n_heads x d_head
    gated_mlp: ClassVar[bool]
    parallel: ClassVar[bool] = False  # in a new model attention and MLP read the same residual, side by side
    fused: ClassVar[bool]  # queries, keys and values are one matrix
    #: A norm multiplies by 1 + its stored gain, not by the gain.
    gain_from_one: ClassVar[bool] = False
    #: What is looked up in the token table is multiplied by sqrt(d_model).
    scales_embedding: ClassVar[bool] = False
    #: Attention divides by a number of the config, not by sqrt(d_head).
    fixed_scale: ClassVar[bool] = False
    #: Attention's scores are capped, which torch's fused kernels cannot do: every score is computed and kept.
    caps_scores: ClassVar[bool] = False
    #: RoPE's base where config.json has none, by the top-level field that old ones have it in; empty: no RoPE.
    thetas: ClassVar[Mapping[str, float]] = {"rope_theta": 10000.0}
    #: The kinds of RoPE that this architecture can have in transformers.
    possible_ropes: ClassVar[frozenset[str]] = rope.KINDS
    #: The field of config.json with the longest context.
    positions: ClassVar[str] = "max_position_embeddings"
    #: Tensors that old checkpoints carry and no model needs (masks, rotary tables): a regular expression.
    not_weights: ClassVar[str]
    #: Other names under which files hold a parameter.
    also_named: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def problems(self, shape: Shape) -> list[tuple[str, str]]:
        """What keeps this architecture from having `shape`: (field of the shape, what would be right)."""

    def possible(self, shape: Shape) -> Shape:
        """The shape of a config. Raises :class:`FamilyError` where this architecture cannot have it."""
        for field, message in self.problems(shape):
            raise FamilyError(f"config.json: {field} {getattr(shape, field)}: {message}")
        return shape

    @abstractmethod
    def parameters(self, shape: Shape, n_positions: int, d_vocab: int, tied: bool) -> tuple[Parameter, ...]:
        """Every stored tensor, in the model's own order. A tied output head is not stored, so not listed."""

    @abstractmethod
    def fixed(self, shape: Shape, n_positions: int) -> dict[str, Any]:
        """What a new model's config.json holds beside the shape's own fields and what every family's does."""

    def config(
        self,
        shape: Shape,
        n_positions: int,
        d_vocab: int,
        tied: bool,
        *,
        init_range: float = 0.02,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> dict[str, Any]:
        """The content of config.json for a new model."""
        every = {
            "model_type": self.name,
            "vocab_size": d_vocab,
            "tie_word_embeddings": tied,
            "initializer_range": init_range,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "use_cache": True,
            "dtype": "float32",
        }
        return self.resized(every | self.fixed(shape, n_positions), shape)

    @abstractmethod
    def shape_of(self, config: Mapping[str, Any]) -> Described:
        """What a config.json says. Raises :class:`FamilyError` where it asks for something that growth cannot carry."""

    @abstractmethod
    def resized(self, config: Mapping[str, Any], shape: Shape, sources: Sequence[int] | None = None) -> dict[str, Any]:
        """`config` with the shape's fields replaced and everything else (activation, RoPE, token ids) kept.

        `sources`: for each block of the new model the block of the old one that it continues, or stands in for, so that
        what a config says block by block (kinds of attention) goes along; None where no block moved.
        """

    def extended(
        self, config: Mapping[str, Any], *, n_positions: int, d_vocab: int, rope_power: float = 1.0
    ) -> dict[str, Any]:
        """`config` for another vocabulary and another longest context, with each of RoPE's bases theta raised to
        `rope_power`, so that the first pairs of heads that much wider rotate as those of the narrower ones did.

        What a kind of RoPE scaling takes from the longest context is stated as it was, so that frequencies stay.
        """
        longer = rope.lengthened(config, self.positions, n_positions)
        return rope.raised(longer, rope_power, self.thetas) | {"vocab_size": d_vocab}

    def rope_kinds(self, config: Mapping[str, Any]) -> set[str]:
        """The kinds of RoPE in use: `default`, or of scaling for longer contexts; empty without RoPE."""
        if not self.thetas:
            return set()
        return {rope.kind_of(each) for each in rope.ropes(config)} or {"default"}

    def torn_ropes(self, config: Mapping[str, Any], rope_power: float) -> set[str]:
        """The kinds in use under which pairs of a wider head turn at other speeds, though theta is raised so."""
        return {kind for kind in self.rope_kinds(config) if self.rotary and not rope.follows(kind, rope_power)}

    def known_ropes(self, config: Mapping[str, Any]) -> None:
        """Raise :class:`FamilyError` where a config uses a kind of RoPE that this architecture does not have."""
        if unknown := self.rope_kinds(config) - self.possible_ropes:
            raise FamilyError(
                f"config.json: rope_type {min(unknown)!r}: {self.title} has {', '.join(sorted(self.possible_ropes))}"
            )


class Layout:
    """Builds a family's parameter list: sizes come from the axes, so no shape is written twice."""

    def __init__(self, sizes: Mapping[str, int], gain_from_one: bool = False):
        self.sizes = sizes
        self.gain_from_one = gain_from_one
        self.parameters: list[Parameter] = []

    def matrix(
        self, name: str, out: Axes | tuple[Axes, ...], into: Axes, *, in_first: bool = False, **tags: Any
    ) -> None:
        segments = _segments(out)
        rows, columns = sum(map(self._size, segments)), self._size(into)
        shape = (columns, rows) if in_first else (rows, columns)
        self.parameters.append(Parameter(name, "matrix", shape, segments, into, in_first, **tags))

    def vector(self, name: str, kind: Kind, out: Axes | tuple[Axes, ...], **tags: Any) -> None:
        segments = _segments(out)
        tags.setdefault("from_one", self.gain_from_one and kind == "norm_gain")
        self.parameters.append(Parameter(name, kind, (sum(map(self._size, segments)),), segments, **tags))

    def _size(self, axes: Axes) -> int:
        return prod(self.sizes[axis] for axis in axes)


def _segments(out: Axes | tuple[Axes, ...]) -> tuple[Axes, ...]:
    return (out,) if isinstance(out[0], str) else out


def require(config: Mapping[str, Any], field: str, allowed: tuple[Any, ...], why: str) -> None:
    """Refuse a config field that growth would silently get wrong."""
    value = config.get(field, allowed[0])
    if value not in allowed:
        right = " or ".join(repr(a) for a in allowed)
        raise FamilyError(f"config.json: {field} {value!r}: {why}; {right} would be right")


def square_problems(title: str, shape: Shape) -> list[tuple[str, str]]:
    """What keeps an architecture of full attention with d_model = n_heads x d_head from having `shape`."""
    found = []
    if shape.n_kv_heads is not None and shape.n_kv_heads != shape.n_heads:
        found.append(("n_kv_heads", f"{title} has one key/value head for each query head; leave it out"))
    if shape.d_model != shape.n_heads * shape.d_head:
        right = []
        if shape.d_model % shape.n_heads == 0:
            right.append(f"d_head {shape.d_model // shape.n_heads}")
        if shape.d_model % shape.d_head == 0:
            right.append(f"n_heads {shape.d_model // shape.d_head}")
        right.append(f"d_model {shape.n_heads * shape.d_head}")
        needed = f"{title} needs d_model ({shape.d_model}) = n_heads ({shape.n_heads}) x d_head: "
        found.append(("d_head", needed + " or ".join(right)))
    return found


def whole(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A positive whole number from a config. Raises :class:`FamilyError`."""
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FamilyError(f"config.json: {field} {value!r}: must be a whole number, at least 1")
    return value
