"""Width rules: a map for every axis that the family's tensors have.

A rule is pure: shapes in, maps out. What it really preserves is computed from the maps (:mod:`.exactness`), so a rule
carries no such label. `maps` may rely on what `refuse` has let through. Adding one: docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from trainer.families import Family
from trainer.growth import axes
from trainer.growth.axes import FIELD_AXES, size_of
from trainer.growth.maps import AxisMap, corner, cyclic
from trainer.shape import Shape, Split

__all__ = ["FIELD_AXES", "WIDTH_RULES", "Operator", "WidthRule", "size_of"]


class Operator(NamedTuple):
    """A rule, described for a person."""

    key: str
    title: str
    line: str
    citation: str
    url: str


class WidthRule:
    """What a rule may say; the least is `about` and `maps`."""

    about: ClassVar[Operator]
    #: How copies share what reads them, where the rule leaves no choice.
    split: ClassVar[Split | None] = None
    #: Second and later copies of an output come from the block above (AKI).
    from_above: ClassVar[bool] = False

    def refuse(self, family: Family, parent: Shape, child: Shape) -> None:
        """Raise `GrowthError` where this rule cannot lead from `parent` to `child`. Any larger size will do."""

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        """A map for each axis that a field of the shape sets the size of."""
        raise NotImplementedError

    def rope_power(self, family: Family, parent: Shape, child: Shape) -> float:
        """What rope_theta is raised to."""
        return axes.rope_power(family, parent, child)


class Duplicate(WidthRule):
    """Every channel, unit and head is copied, and what reads its copies reads each at its share.

        W' = E_out W R_in + N (I - E_in R_in)      at a whole ratio n: E = [I; ...; I], R = [I ... I] / n

    exact for any N, since E_in x has nothing that I - E_in R_in lets through; N keeps the copies from staying alike
    for ever (`GrowInit.snr_db` is its size). Any ratio: :mod:`.axes` has the argument for each axis. A tied output head
    reads with E where it should read with R: the final norm's gain and bias are divided by D' / D.
    """

    about = Operator(
        "duplicate",
        "Duplication",
        "Copies every channel, unit and head, any number of times: the large model computes what the small one does.",
        "Samragh et al. 2024, HyperCloning; Chen et al. 2021, bert2BERT (arXiv 2110.07143)",
        "https://arxiv.org/abs/2409.12903",
    )

    @staticmethod
    def choose(small: int, large: int) -> Sequence[int]:
        """Sources of heads and units: all in turn."""
        return cyclic(small, large)

    def refuse(self, family: Family, parent: Shape, child: Shape) -> None:
        axes.refuse_heads(parent, child)

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        q_head, kv_head = axes.copied_heads(parent, child, self.choose)
        return {
            "embed": axes.copied_residual(parent.d_model, child.d_model, family.mean_centred),
            "mlp": axes.copied_units(parent.d_mlp, child.d_mlp, self.choose),
            "q_head": q_head,
            "kv_head": kv_head,
        } | axes.channels(family, parent.d_head, child.d_head)


class Net2Net(Duplicate):
    """Duplication of units and heads that are chosen at random, instead of all in turn (Net2WiderNet).

    Channels of the residual stream are copied in turn nevertheless: chosen at random, the norms would see another mean
    square, and the function would be lost.
    """

    about = Operator(
        "net2net",
        "Random duplication",
        "Copies units and heads chosen at random: the large model computes what the small one does.",
        "Chen, Goodfellow & Shlens 2015, Net2Net",
        "https://arxiv.org/abs/1511.05641",
    )

    @staticmethod
    def choose(small: int, large: int) -> Sequence[int]:
        return axes.at_random(small, large)


class BlockDiagonal(Duplicate):
    """Duplication in which each copy reads its own kind alone: W' = [[W, 0], [0, W]], two models side by side.

    The point N of the same affine space at which copies exchange nothing (staged training's growth operator).
    """

    about = Operator(
        "block_diagonal",
        "Side by side",
        "Sets copies of the small model side by side, each reading itself alone: the same function, no exchange yet.",
        "Shen et al. 2022, Staged Training for Transformer Language Models",
        "https://arxiv.org/abs/2203.06211",
    )
    split = "diagonal"


class Pad(WidthRule):
    """The old model in one corner, new channels, units and heads beside it that say nothing yet.

        W' = [[W, N], [0, N]]     embed: new channels hold 0 (under LayerNorm: the mean); read at random
        W' = [[W, 0], [N, 0]]     units, heads, values: random, read by zeros

    with what is written to the old channels times sqrt(D' / D), so that gains and eps stay. No copies, so nothing to
    tell apart; but what is written by zeros gets its first gradient through what is random behind it: a slow start.
    """

    about = Operator(
        "pad",
        "Silent padding",
        "Adds new channels, units and heads that say nothing yet: the large model computes what the small one does.",
        "Gesmundo & Maile 2023, Composable Function-preserving Expansions; Wang et al. 2023, LEMON (arXiv 2310.07999)",
        "https://arxiv.org/abs/2308.06103",
    )

    def refuse(self, family: Family, parent: Shape, child: Shape) -> None:
        axes.refuse_heads(parent, child)

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        q_head, kv_head = axes.padded_heads(parent, child)
        return {
            "embed": axes.padded_residual(parent.d_model, child.d_model, family.mean_centred),
            "mlp": axes.padded_units(parent.d_mlp, child.d_mlp),
            "q_head": q_head,
            "kv_head": kv_head,
        } | axes.channels(family, parent.d_head, child.d_head)


class Aki(Duplicate):
    """Advanced knowledge initialisation: the copies of an output are taken from the next block up.

    Inputs are read as in duplication; of outputs, what is not the first copy comes from block l + 1 (the last block's
    from itself). Copies differ from the start and the function is lost; training was found to go faster for it.
    """

    about = Operator(
        "aki",
        "Knowledge from above",
        "Duplication whose copies are taken from the next block up, so that they differ: the function changes.",
        "Chen et al. 2021, bert2BERT: AKI",
        "https://arxiv.org/abs/2110.07143",
    )
    from_above = True


class RandomPad(WidthRule):
    """The original Kangaroo rule: the old block in the corner of every tensor, the rest N(0, init_range).

        W' = [[W, N], [N, N]]     b' = [b, 0]     g' = [g, 1]

    with the corner taken on each named axis, so heads stay whole. Old channels read new ones from the first step on,
    and norms now average over noise: the parent's function is lost as soon as any width changes.
    """

    about = Operator(
        "random_pad",
        "Random padding",
        "Copies each old matrix into a corner of the new one and draws the rest at random: any size, function lost.",
        "Kangaroo's original rule; compare G_random in Du et al. 2024, Stacking Your Transformers",
        "https://arxiv.org/abs/2405.15319",
    )

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        normed = {axis: corner(parent.d_head, child.d_head) for axis in ("q_normed", "k_normed") if family.qk_norm}
        return normed | {
            axis: corner(size_of(parent, field), size_of(child, field))
            for field, axes_of_field in FIELD_AXES.items()
            for axis in axes_of_field
        }

    def rope_power(self, family: Family, parent: Shape, child: Shape) -> float:
        return 1.0


WIDTH_RULES: dict[str, WidthRule] = {
    rule.about.key: rule for rule in (Duplicate(), Pad(), Net2Net(), BlockDiagonal(), Aki(), RandomPad())
}
