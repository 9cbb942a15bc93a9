"""Rotary position embeddings as config.json says them, in today's form and in older ones.

A channel pair i of the first R channels of a head is rotated by theta^(-2 i / R) a position; a kind of scaling changes
these frequencies for longer contexts. Where a config says so:

    rope_parameters   one RoPE, or one for each kind of attention, by its name; with `rope_theta` and `rope_type`
    rope_scaling      the same under transformers 4, which had theta at the top level; where both are given, this counts
    rope_theta, rope_local_base_freq, rotary_emb_base     theta at the top level

Every function takes a config's content and leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, nextafter
from typing import Any

from trainer.families.errors import FamilyError

Config = Mapping[str, Any]
Rope = Mapping[str, Any]

FIELDS = ("rope_parameters", "rope_scaling")
#: Kinds that transformers has for these architectures.
KINDS = frozenset({"default", "linear", "llama3", "yarn", "dynamic", "longrope"})
#: Kinds whose frequencies are set by the context they were trained with, which is the config's own where not stated.
_BY_CONTEXT = ("llama3", "yarn", "longrope")
#: Kinds that change a frequency by what it is, and so alike for a pair that was moved but turns as fast.
_BY_FREQUENCY = frozenset({"default", "linear", "llama3"})
#: Those that may change it by a pair's place as well: YaRN's ramp ends at places d log(...) / (2 log theta), which stay
#: when theta is raised to d' / d.
_BY_PLACE = _BY_FREQUENCY | {"yarn"}
#: Kinds that take what is missing of `factor` from how much longer the context became.
_BY_RATIO = ("yarn", "longrope")


def ropes(config: Config) -> list[Rope]:
    """Each RoPE that a config states; none where all is left to the architecture."""
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [rope for rope in stated.values() if isinstance(rope, Mapping)]
    return nested or ([stated] if stated else [])


def kind_of(rope: Rope) -> str:
    """`default`, `linear`, `llama3`, `yarn`, `dynamic`, `longrope`, or what else stands there."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def follows(kind: str, power: float) -> bool:
    """Whether all old pairs of a wider head turn as fast as they did. They have their places if theta was raised.

    Not so under dynamic scaling, whose power of theta has d in it once the context is exceeded, and longrope, which has
    a factor for each pair.
    """
    return kind in (_BY_FREQUENCY if power == 1.0 else _BY_PLACE)


def rotated_share(config: Config, field: str, default: float) -> float:
    """The share of a head's channels that is rotated; `field` has it at the top level. Raises :class:`FamilyError`."""
    stated = [rope["partial_rotary_factor"] for rope in ropes(config) if "partial_rotary_factor" in rope]
    share = stated[0] if stated else config.get(field, default)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise FamilyError(f"config.json: {field} {share!r}: must be a share of d_head, from 0 to 1")
    return float(share)


def with_rotated_share(config: Config, field: str, share: float) -> dict[str, Any]:
    """The config with another share of rotated channels, written where it has one, else at the top level."""

    def restate(rope: Rope) -> dict[str, Any]:
        return {**rope, "partial_rotary_factor": share} if "partial_rotary_factor" in rope else dict(rope)

    changed = _with_each(config, restate)
    stated = any("partial_rotary_factor" in rope for rope in ropes(config))
    return changed | ({field: share} if field in config or not stated else {})


def share_of(rotated: int, d_head: int) -> float:
    """The share that makes transformers' int(d_head x share) come to `rotated`."""
    share = rotated / d_head
    while int(d_head * share) < rotated:
        share = nextafter(share, inf)
    return share


def raised(config: Config, power: float, thetas: Mapping[str, float]) -> dict[str, Any]:
    """The config with every theta raised to `power`. `thetas`: an architecture's own, by their top-level fields."""
    if power == 1.0:
        return dict(config)
    stated = ropes(config)
    if not stated or any(rope.get("rope_theta") is None for rope in stated):
        config = {**thetas, **config}

    def raise_one(rope: Rope) -> dict[str, Any]:
        theta = rope.get("rope_theta")
        return dict(rope) if theta is None else {**rope, "rope_theta": theta**power}

    tops = {field: config[field] ** power for field in thetas if config.get(field) is not None}
    return _with_each(config, raise_one) | tops


def lengthened(config: Config, field: str, n_positions: int) -> dict[str, Any]:
    """The config with a longest context (`field`) of `n_positions`, and the frequencies of the old one."""
    old = config.get(field)

    def keep(rope: Rope) -> dict[str, Any]:
        if old in (None, n_positions) or kind_of(rope) not in _BY_CONTEXT:
            return dict(rope)
        # A context that stands outside, as Phi-3's does, goes before one that stands here.
        trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or old
        kept = {**rope, "original_max_position_embeddings": trained}
        if kind_of(rope) in _BY_RATIO and rope.get("factor") is None:
            kept["factor"] = old / trained
        return kept

    return _with_each(config, keep) | {field: n_positions}


def _with_each(config: Config, change: Callable[[Rope], dict[str, Any]]) -> dict[str, Any]:
    """The config with each of its RoPEs changed."""
    changed = dict(config)
    for field in FIELDS:
        if stated := config.get(field):
            nested = {name: change(rope) for name, rope in stated.items() if isinstance(rope, Mapping)}
            changed[field] = {**stated, **nested} if nested else change(stated)
    return changed
