"""A growth plan: what a width rule and a depth rule mean for two given shapes, and what that preserves.

Torch-free, so the web page and `trainer plan` can say it before anything runs; :mod:`trainer.growth.apply` turns a plan
into weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import sqrt
from typing import Any, NamedTuple

from trainer.families import Parameter, get_family
from trainer.growth.axes import FIELD_AXES, size_of
from trainer.growth.depth import DEPTH_RULES, Block
from trainer.growth.errors import GrowthError
from trainer.growth.exactness import broken_by_depth, broken_by_width, joined
from trainer.growth.maps import AxisMap, identity, place
from trainer.growth.width import WIDTH_RULES
from trainer.shape import GrowInit, Shape, Split


class Origin(NamedTuple):
    """A parameter of the child and what it is made from."""

    new: Parameter
    old: Parameter | None  # the parent's; None: all new
    block: Block
    following: Parameter | None = None  # the parent's same parameter one block up, where copies come from there


@dataclass(frozen=True)
class GrowthPlan:
    """From `parent` to `child`. `preserves`: the child's logits are the parent's, up to rounding, before training.

    `n_positions`, `d_vocab` and `tied` are the parent's.
    """

    family: str
    parent: Shape
    child: Shape
    init: GrowInit
    n_positions: int
    d_vocab: int
    tied: bool
    maps: Mapping[str, AxisMap] = field(repr=False)  # axis -> map
    blocks: tuple[Block, ...]  # of the child, lowest first
    rope_power: float  # rope_theta is raised to it
    preserves: bool
    because: str
    warnings: list[str]

    @property
    def child_vocab(self) -> int:
        return self.maps["vocab"].large

    @property
    def child_positions(self) -> int:
        return self.maps["position"].large

    @property
    def split(self) -> Split:
        """How readers share a value among its copies."""
        return WIDTH_RULES[self.init.width].split or self.init.split

    @property
    def table_scale(self) -> float:
        """What the token table is multiplied by: sqrt(D / D') where the model multiplies it by sqrt(D')."""
        embed = self.maps["embed"]
        return sqrt(embed.small / embed.large) if get_family(self.family).scales_embedding else 1.0

    @property
    def final_norm_scale(self) -> float:
        """What the final norm's gain and bias are multiplied by.

        A tied output head reads with the table W E^T, not W R: its logits come out times kappa, where E^T E = kappa I,
        and times the table's scale; the norm before it takes both back.
        """
        embed = self.maps["embed"]
        if not self.tied or embed.is_identity:
            return 1.0
        return 1 / (embed.power[0] * self.table_scale)

    def child_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The child's config.json, from the parent's."""
        family, last = get_family(self.family), self.parent.n_layers - 1
        sources = [min(at, last) if block.source is None else block.source for at, block in enumerate(self.blocks)]
        return family.extended(
            family.resized(config, self.child, sources),
            n_positions=self.child_positions,
            d_vocab=self.child_vocab,
            rope_power=self.rope_power,
        )

    def parameters(self) -> list[Origin]:
        """The child's parameters, in the model's order, each with what it is made from."""
        family = get_family(self.family)
        old = family.parameters(self.parent, self.n_positions, self.d_vocab, self.tied)
        new = family.parameters(self.child, self.child_positions, self.child_vocab, self.tied)
        outside = {p.name: p for p in old if p.layer is None}
        in_block: dict[int, list[Parameter]] = {}
        for parameter in old:
            if parameter.layer is not None:
                in_block.setdefault(parameter.layer, []).append(parameter)
        from_above = WIDTH_RULES[self.init.width].from_above
        place_in_block = [0] * self.child.n_layers
        origins: list[Origin] = []
        for parameter in new:
            if parameter.layer is None:
                origins.append(Origin(parameter, outside[parameter.name], Block(None)))
                continue
            block, at = self.blocks[parameter.layer], place_in_block[parameter.layer]
            place_in_block[parameter.layer] += 1
            if block.source is None:
                origins.append(Origin(parameter, None, block))
                continue
            above = in_block[min(block.source + 1, self.parent.n_layers - 1)][at] if from_above else None
            origins.append(Origin(parameter, in_block[block.source][at], block, above))
        return origins


def check(family: str, parent: Shape, child: Shape, init: GrowInit) -> None:
    """Raise :class:`GrowthError` if `child` cannot be grown from `parent` by these rules."""
    architecture = get_family(family)
    for half, rules in (("width", WIDTH_RULES), ("depth", DEPTH_RULES)):
        if getattr(init, half) not in rules:
            raise GrowthError(f"init.{half}", f"must be one of {', '.join(rules)}", getattr(init, half))
    for name in (*FIELD_AXES, "n_layers"):
        small, large = size_of(parent, name), size_of(child, name)
        if large < small:
            raise GrowthError(
                f"shape.{name}", f"is smaller than the parent's {small}, and growth only adds: at least {small}", large
            )
    for name, message in architecture.problems(child):
        raise GrowthError(f"shape.{name}", message, getattr(child, name))
    WIDTH_RULES[init.width].refuse(architecture, parent, child)
    DEPTH_RULES[init.depth].refuse(parent.n_layers, child.n_layers)


def plan(
    family: str, parent: Shape, child: Shape, init: GrowInit, *, n_positions: int, d_vocab: int, tied: bool
) -> GrowthPlan:
    """The plan of growing `parent` to `child`. Positions, vocabulary and tie are the parent's.

    Raises :class:`GrowthError` as :func:`check` does.
    """
    check(family, parent, child, init)
    for name, small in (("d_vocab", d_vocab), ("n_positions", n_positions)):
        large = getattr(init, name)
        if large is not None and large < small:
            raise GrowthError(f"init.{name}", f"is less than the parent's {small}: at least {small}", large)
    maps, rope_power = _widened(family, init.width, parent, child)
    blocks = DEPTH_RULES[init.depth].blocks(parent.n_layers, child.n_layers)
    reasons = [*_broken(family, init.width, parent, child), *broken_by_depth(parent.n_layers, blocks)]
    maps = {**maps, "vocab": _extended(d_vocab, init.d_vocab), "position": _extended(n_positions, init.n_positions)}
    return GrowthPlan(
        family=family,
        parent=parent,
        child=child,
        init=init,
        n_positions=n_positions,
        d_vocab=d_vocab,
        tied=tied,
        maps=maps,
        blocks=blocks,
        rope_power=rope_power,
        preserves=not reasons,
        because=_because_it_is_lost(reasons) if reasons else _because_it_is_kept(parent, child, maps),
        warnings=_warnings(parent, child, init, maps, get_family(family).rotary),
    )


@lru_cache(maxsize=128)
def _widened(family: str, width: str, parent: Shape, child: Shape) -> tuple[dict[str, AxisMap], float]:
    """Maps and power of rope_theta: they depend on nothing else, and a page asks for them often."""
    architecture, rule = get_family(family), WIDTH_RULES[width]
    return rule.maps(architecture, parent, child), rule.rope_power(architecture, parent, child)


@lru_cache(maxsize=128)
def _broken(family: str, width: str, parent: Shape, child: Shape) -> tuple[str, ...]:
    maps, rope_power = _widened(family, width, parent, child)
    found = broken_by_width(get_family(family), parent, child, maps, rope_power)
    if WIDTH_RULES[width].from_above and any(max(m.multiplicity) > 1 for m in maps.values()):
        found.append("copies of outputs are taken from the block above")
    return tuple(found)


def _extended(small: int, large: int | None) -> AxisMap:
    """Further tokens or positions. No old text has any, so they may be read at random; an output head of its own gives
    new tokens a logit of zero."""
    return identity(small) if large is None or large == small else place(small, large, range(small))


def _because_it_is_lost(reasons: list[str]) -> str:
    text = joined(reasons)
    return f"{text[0].upper()}{text[1:]}, so the grown model does not compute what its parent does."


def _grown(parent: Shape, child: Shape) -> list[str]:
    pairs = [(name, size_of(parent, name), size_of(child, name)) for name in FIELD_AXES]
    if parent.kv_heads == parent.n_heads and child.kv_heads == child.n_heads:
        pairs = [p for p in pairs if p[0] != "n_kv_heads"]
    return [f"{name} ({small} to {large})" for name, small, large in pairs if small != large]


def _because_it_is_kept(parent: Shape, child: Shape, maps: Mapping[str, AxisMap]) -> str:
    grown, new = _grown(parent, child), child.n_layers - parent.n_layers
    clauses = []
    if grown:
        clauses.append(f"what is new along {joined(grown)} is read so that it adds up to the parent's values")
    if new:
        blocks = f"the {new} new blocks write" if new > 1 else "the new block writes"
        clauses.append(f"{blocks} nothing to the residual stream yet")
    further = maps["vocab"].large - maps["vocab"].small
    added = f" The {further:,} further tokens take their share of its probabilities." if further else ""
    if not clauses:
        same = "No width and no depth changes" if further or maps["position"].has_new else "No dimension changes"
        return f"{same}, so every weight is copied as it is and the grown model is its parent.{added}"
    text = joined(clauses)
    return f"{text[0].upper()}{text[1:]}, so the grown model computes what its parent does.{added}"


def _warnings(parent: Shape, child: Shape, init: GrowInit, maps: Mapping[str, AxisMap], rotary: bool) -> list[str]:
    found = []
    copied = any(max(m.multiplicity) > 1 for m in maps.values())
    rule = WIDTH_RULES[init.width]
    # Copies of one source that are read alike get equal gradients, and so do those that read each its own kind alone.
    alike = init.noise == 0 and (rule.split or init.split) != "uneven"
    if copied and alike and rule.from_above:
        found.append("No block is above the last one, so without noise its copies are alike and may stay so for ever.")
    elif copied and alike:
        found.append(
            "Without noise, copies get equal gradients and may stay copies for ever: the extra width learns nothing."
        )
    if init.width == "random_pad" and rotary and parent.d_head != child.d_head:
        found.append(
            f"RoPE rotates channels i and i + d_head / 2 together, so d_head {parent.d_head} to {child.d_head} tears "
            "the old pairs apart: grow n_heads instead."
        )
    if init.width == "random_pad" and parent.n_heads // parent.kv_heads != child.n_heads // child.kv_heads:
        found.append("The old query heads are spread over other groups, so some read a new key/value head.")
    return found
