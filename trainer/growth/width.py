"""Width rules: a map for every axis that the family's tensors have.

A rule is pure: shapes in, maps out. What it really preserves is computed from the maps (:mod:`.exactness`), so a rule
carries no such label. `maps` may rely on what `refuse` has let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import ClassVar, NamedTuple, Protocol

from trainer.families import Family
from trainer.growth.errors import GrowthError
from trainer.growth.maps import AxisMap, copies, corner, identity, place, tile
from trainer.shape import Shape


class Operator(NamedTuple):
    """A rule, described for a person."""

    key: str
    title: str
    line: str
    citation: str
    url: str


class WidthRule(Protocol):
    @property
    def about(self) -> Operator: ...

    def refuse(self, family: Family, parent: Shape, child: Shape) -> None:
        """Raise :class:`GrowthError` where this rule cannot lead from `parent` to `child`."""

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        """A map for each axis that may change; `vocab` and `position` never do."""


#: The axes that a field of the shape sets the size of.
FIELD_AXES: Mapping[str, tuple[str, ...]] = {
    "d_model": ("embed",),
    "n_heads": ("q_head",),
    "n_kv_heads": ("kv_head",),
    "d_head": ("q_dim", "k_dim", "v_dim"),
    "d_mlp": ("mlp",),
}


def size_of(shape: Shape, field: str) -> int:
    """A width of the shape; n_kv_heads as it is meant where it was left out."""
    return shape.kv_heads if field == "n_kv_heads" else int(getattr(shape, field))


class RandomPad:
    """The original Kangaroo rule: the old block in the corner of every tensor, the rest N(0, init_range).

        W' = [[W, N], [N, N]]     b' = [b, 0]     g' = [g, 1]

    with the corner taken on each named axis, so heads stay whole. Old channels read new ones from the first step on,
    and norms now average over noise: the parent's function is lost as soon as any width changes.
    """

    about: ClassVar[Operator] = Operator(
        "random_pad",
        "Random padding",
        "Copies each old matrix into a corner of the new one and draws the rest at random: any size, function lost.",
        "Kangaroo's original rule; compare G_random in Du et al. 2024, Stacking Your Transformers",
        "https://arxiv.org/abs/2405.15319",
    )

    def refuse(self, family: Family, parent: Shape, child: Shape) -> None:
        """Any size that is not smaller will do."""

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        normed = {axis: corner(parent.d_head, child.d_head) for axis in ("q_normed", "k_normed") if family.qk_norm}
        return normed | {
            axis: corner(size_of(parent, field), size_of(child, field))
            for field, axes in FIELD_AXES.items()
            for axis in axes
        }


class Duplicate:
    """Every channel, unit and head is copied a whole number of times; what reads n copies reads each at 1/n.

        E = [I; ...; I]     R = [I ... I] / n     W' = E_out W R_in + N (I - E_in R_in)

    exact for any N, since E_in x has nothing that I - E_in R_in lets through; N keeps the copies from staying alike
    for ever (`GrowInit.noise` is its size against the copied weights). Norms see the same mean and mean square. Four
    things need more than tiling:

    * heads: copies of a query head stay in the group of their key/value head, whose copies lie side by side;
    * a tied output head reads with E where it should read with R: the final norm's gain and bias are divided by n;
    * d_head: 1 / sqrt(d_head) changes, so queries are multiplied by sqrt(d' / d); with RoPE old pair i of channels
      becomes pair i d' / d, whose frequency is the same. New queries are random and meet zero keys, new values are
      random and are read by zeros: zero on both sides would never learn;
    * d_head under norms of queries and keys: zeros, or random entries, would change the mean square that the norms
      divide by, and eps could not make up for it, being one for the whole model. So each channel is copied d' / d
      times (old pair i to the pairs from i d' / d on), which keeps mean square and eps, and the gains do the rest:
      sqrt(d' / d) times the old one for queries; for keys the old one at pair i d' / d, whose frequency is the same,
      and zero at the other copies, which are so unseen until these gains learn.
    """

    about: ClassVar[Operator] = Operator(
        "duplicate",
        "Duplication",
        "Copies every channel, unit and head a whole number of times: the large model computes what the small does.",
        "Samragh et al. 2024, HyperCloning; Chen et al. 2021, bert2BERT (arXiv 2110.07143)",
        "https://arxiv.org/abs/2409.12903",
    )

    def refuse(self, family: Family, parent: Shape, child: Shape) -> None:
        for field in FIELD_AXES:
            small, large = size_of(parent, field), size_of(child, field)
            if large % small == 0 or (field == "d_head" and not family.rotary and not family.qk_norm):
                continue
            times = large // small
            raise GrowthError(
                f"shape.{field}",
                f"duplicate makes whole copies of the parent's {small}: {times * small} or {(times + 1) * small} would "
                f"be right (random_pad takes any size)",
                large,
            )

    def maps(self, family: Family, parent: Shape, child: Shape) -> dict[str, AxisMap]:
        q_head, kv_head = self._heads(parent, child)
        return {
            "embed": tile(parent.d_model, child.d_model // parent.d_model),
            "mlp": tile(parent.d_mlp, child.d_mlp // parent.d_mlp),
            "q_head": q_head,
            "kv_head": kv_head,
        } | (self._normed_channels if family.qk_norm else self._channels)(parent.d_head, child.d_head, family.rotary)

    def _heads(self, parent: Shape, child: Shape) -> tuple[AxisMap, AxisMap]:
        """New key/value head g' copies g = g' // a. Its query heads copy those of g in turn, so that over the `a`
        copies of a group each of its query heads appears equally often."""
        if (parent.n_heads, parent.kv_heads) == (child.n_heads, child.kv_heads):
            return identity(parent.n_heads), identity(parent.kv_heads)
        a = child.kv_heads // parent.kv_heads
        members, new_members = parent.n_heads // parent.kv_heads, child.n_heads // child.kv_heads
        q_sources = []
        for new_group in range(child.kv_heads):
            group, copy = divmod(new_group, a)
            q_sources += [group * members + (copy * new_members + j) % members for j in range(new_members)]
        kv_sources = [new_group // a for new_group in range(child.kv_heads)]
        return copies(parent.n_heads, q_sources), copies(parent.kv_heads, kv_sources)

    def _channels(self, d: int, large: int, rotary: bool) -> dict[str, AxisMap]:
        if d == large:
            return dict.fromkeys(("q_dim", "k_dim", "v_dim"), identity(d))
        at = [i * (large // d) for i in range(d // 2)]
        at = [*at, *(i + large // 2 for i in at)] if rotary else list(range(d))
        return {
            "q_dim": place(d, large, at, scale=sqrt(large / d), new_write="random"),
            "k_dim": place(d, large, at),
            "v_dim": place(d, large, range(d), new_write="random", new_read="zero"),
        }

    def _normed_channels(self, d: int, large: int, rotary: bool) -> dict[str, AxisMap]:
        axes = ("q_dim", "k_dim", "q_normed", "k_normed")
        if d == large:
            return dict.fromkeys((*axes, "v_dim"), identity(d))
        times = large // d
        runs = [range(d // 2), range(d // 2, d)] if rotary else [range(d)]
        sources = [i for run in runs for i in run for _ in range(times)]
        seen = [float(j % times == 0) for j in range(large)]  # the first copy of each, as a run's length is a multiple
        copied, scale = copies(d, sources), sqrt(times)
        queries = AxisMap(d, large, sources, (scale,) * large, [s / scale for s in seen])
        keys = AxisMap(d, large, sources, seen, seen)
        values = self._channels(d, large, rotary)["v_dim"]
        return dict(zip(axes, (copied, copied, queries, keys), strict=True)) | {"v_dim": values}


WIDTH_RULES: dict[str, WidthRule] = {rule.about.key: rule for rule in (Duplicate(), RandomPad())}
