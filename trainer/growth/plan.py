"""A growth plan: what a width rule and a depth rule mean for two given shapes, and what that preserves.

Torch-free, so the web page and `trainer plan` can say it before anything runs; :mod:`trainer.growth.apply` turns a plan
into weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.families import Parameter, get_family
from trainer.growth.depth import DEPTH_RULES, Block
from trainer.growth.errors import GrowthError
from trainer.growth.exactness import broken, joined
from trainer.growth.maps import AxisMap, identity
from trainer.growth.width import FIELD_AXES, WIDTH_RULES, size_of
from trainer.shape import GrowInit, Shape


@dataclass(frozen=True)
class GrowthPlan:
    """From `parent` to `child`. `preserves`: the child's logits are the parent's, up to rounding, before training."""

    family: str
    parent: Shape
    child: Shape
    init: GrowInit
    n_positions: int
    d_vocab: int
    tied: bool
    maps: Mapping[str, AxisMap] = field(repr=False)  # axis -> map
    blocks: tuple[Block, ...]  # of the child, lowest first
    preserves: bool
    because: str
    warnings: list[str]

    @property
    def final_norm_scale(self) -> float:
        """What the final norm's gain and bias are multiplied by.

        A tied output head reads with the table W E^T, not W R: its logits come out times kappa = sum of the squared
        writes of a channel's copies, which the norm before it takes back.
        """
        embed = self.maps["embed"]
        if not self.tied or embed.is_identity:
            return 1.0
        return 1 / sum(w * w for s, w in zip(embed.source_index, embed.write, strict=True) if s == 0)

    def parameters(self) -> list[tuple[Parameter, Parameter | None, Block]]:
        """The child's parameters, each with the parent's that it is made from (None: all new) and its block's rule."""
        family = get_family(self.family)
        old, new = (
            family.parameters(shape, self.n_positions, self.d_vocab, self.tied) for shape in (self.parent, self.child)
        )
        outside = {p.name: p for p in old if p.layer is None}
        in_block: dict[int, list[Parameter]] = {}
        for parameter in old:
            if parameter.layer is not None:
                in_block.setdefault(parameter.layer, []).append(parameter)
        place_in_block = [0] * self.child.n_layers
        pairs: list[tuple[Parameter, Parameter | None, Block]] = []
        for parameter in new:
            if parameter.layer is None:
                pairs.append((parameter, outside[parameter.name], Block(None)))
                continue
            block = self.blocks[parameter.layer]
            source = None if block.source is None else in_block[block.source][place_in_block[parameter.layer]]
            place_in_block[parameter.layer] += 1
            pairs.append((parameter, source, block))
        return pairs


def check(family: str, parent: Shape, child: Shape, init: GrowInit) -> None:
    """Raise :class:`GrowthError` if `child` cannot be grown from `parent` by these rules."""
    architecture = get_family(family)
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
    architecture = get_family(family)
    maps = WIDTH_RULES[init.width].maps(architecture, parent, child)
    maps |= {"vocab": identity(d_vocab), "position": identity(n_positions)}
    blocks = DEPTH_RULES[init.depth].blocks(parent.n_layers, child.n_layers)
    reasons = broken(architecture, parent, child, maps, blocks)
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
        preserves=not reasons,
        because=_because_it_is_lost(reasons) if reasons else _because_it_is_kept(parent, child),
        warnings=_warnings(parent, child, init, maps, architecture.rotary),
    )


def _because_it_is_lost(reasons: list[str]) -> str:
    text = joined(reasons)
    return f"{text[0].upper()}{text[1:]}, so the grown model does not compute what its parent does."


def _grown(parent: Shape, child: Shape) -> list[str]:
    pairs = [(name, size_of(parent, name), size_of(child, name)) for name in FIELD_AXES]
    if parent.kv_heads == parent.n_heads and child.kv_heads == child.n_heads:
        pairs = [p for p in pairs if p[0] != "n_kv_heads"]
    return [f"{name} ({small} to {large})" for name, small, large in pairs if small != large]


def _because_it_is_kept(parent: Shape, child: Shape) -> str:
    grown, new = _grown(parent, child), child.n_layers - parent.n_layers
    clauses = []
    if grown:
        clauses.append(f"what is new along {joined(grown)} is read so that it adds up to the parent's values")
    if new:
        blocks = f"the {new} new blocks write" if new > 1 else "the new block writes"
        clauses.append(f"{blocks} nothing to the residual stream yet")
    if not clauses:
        return "No dimension changes, so every weight is copied as it is and the grown model is its parent."
    text = joined(clauses)
    return f"{text[0].upper()}{text[1:]}, so the grown model computes what its parent does."


def _warnings(parent: Shape, child: Shape, init: GrowInit, maps: Mapping[str, AxisMap], rotary: bool) -> list[str]:
    found = []
    copied = any(max(m.multiplicity) > 1 for m in maps.values())
    if copied and init.noise == 0:
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
