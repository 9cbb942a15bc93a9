"""How each axis can grow so that nothing changes: what the width rules are put together from.

Each function gives the maps of one kind of axis for two sizes, at any ratio that can be exact; the argument for its
exactness is in its docstring, and :mod:`.exactness` holds the maps to it.

Sources: Chen et al. 2021, bert2BERT (arXiv 2110.07143); Wang et al. 2023, LEMON (2310.07999); Gesmundo & Maile 2023,
Composable Function-preserving Expansions (2308.06103); Samragh et al. 2024, HyperCloning (2409.12903).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from random import Random

from trainer.families import Family
from trainer.growth.errors import GrowthError
from trainer.growth.maps import NEW, AxisMap, WriteFill, copies, cyclic, identity, place, tile, weighted
from trainer.shape import Shape

#: The axes that a field of the shape sets the size of.
FIELD_AXES: Mapping[str, tuple[str, ...]] = {
    "d_model": ("embed",),
    "n_heads": ("q_head",),
    "n_kv_heads": ("kv_head",),
    "d_head": ("q_dim", "k_dim", "v_dim"),
    "d_mlp": ("mlp",),
}

#: Chooses the sources of `large` indices among `small`, each at least once.
Choose = Callable[[int, int], Sequence[int]]


def size_of(shape: Shape, field: str) -> int:
    """A width of the shape; n_kv_heads as it is meant where it was left out."""
    return shape.kv_heads if field == "n_kv_heads" else int(getattr(shape, field))


def at_random(small: int, large: int) -> tuple[int, ...]:
    """The old ones, then copies chosen at random (Net2WiderNet); the choice depends on the two sizes alone."""
    rng = Random(f"{small} to {large}")  # noqa: S311 - nothing secret
    return (*range(small), *(rng.randrange(small) for _ in range(large - small)))


# --- d_model ----------------------------------------------------------------------------------------------------------


def copied_residual(small: int, large: int, mean_centred: bool) -> AxisMap:
    """Channels of the residual stream, copied so that norms see the same.

    A norm divides by the root of the mean square and eps, so every map here has E^T E = (D' / D) I: the mean square
    stays, and with it each gain and eps. At a whole ratio all channels are tiled. Else

    * RMSNorm: copies of unlike number are weighted (:func:`trainer.growth.maps.weighted`);
    * LayerNorm takes away the mean first, which weights would move: floor(D' / D) whole copies, all written at one
      size, and further channels that hold the mean of the old ones (LEMON). So the mean stays the mean, the pads are
      zero once it is taken away, and what reads them is free, hence random.
    """
    if large % small == 0:
        return tile(small, large // small)
    if not mean_centred:
        return weighted(small, cyclic(small, large))
    return _with_pads(small, large, large // small, "mean")


def padded_residual(small: int, large: int, mean_centred: bool) -> AxisMap:
    """The old channels once, then new ones that hold nothing a norm lets through: zeros, or under LayerNorm the mean.

    LEMON writes the old channels as they are and multiplies every gain by sqrt(D / D'), eps by D / D'. Here they are
    written at sqrt(D' / D) instead, which is the same function with gains and eps as they were: norms of queries and
    keys, which have the same eps in the config, need it so.
    """
    return identity(small) if small == large else _with_pads(small, large, 1, "mean" if mean_centred else "zero")


def _with_pads(small: int, large: int, times: int, pad: WriteFill) -> AxisMap:
    sources = (*cyclic(small, times * small), *(NEW,) * (large - times * small))
    write = sqrt(large / (times * small))
    return AxisMap(small, large, sources, (write,) * large, (1 / (times * write),) * large, new_write=pad)


# --- Heads ------------------------------------------------------------------------------------------------------------


def refuse_heads(parent: Shape, child: Shape) -> None:
    """Raise :class:`GrowthError` where a group of query heads has no room beside a copy of its key/value head."""
    members, new_members = parent.n_heads // parent.kv_heads, child.n_heads // child.kv_heads
    if child.kv_heads // parent.kv_heads * new_members < members:
        right = child.kv_heads * -(-members // (child.kv_heads // parent.kv_heads))
        raise GrowthError(
            "shape.n_heads",
            f"{child.kv_heads} key/value heads would have {new_members} query heads each, and the parent's have "
            f"{members}: at least {right} would be right, or {parent.kv_heads} key/value heads",
            child.n_heads,
        )


def copied_heads(parent: Shape, child: Shape, choose: Choose = cyclic) -> tuple[AxisMap, AxisMap]:
    """Maps of query and key/value heads: copies of a query head stay with copies of its key/value head.

    Copies of a key/value head lie side by side; over all of them, each of its query heads appears at least once, and as
    evenly often as the numbers allow. A head is read at one over its number of copies.
    """
    if (parent.n_heads, parent.kv_heads) == (child.n_heads, child.kv_heads):
        return identity(parent.n_heads), identity(parent.kv_heads)
    members, new_members = parent.n_heads // parent.kv_heads, child.n_heads // child.kv_heads
    kv_sources = sorted(cyclic(parent.kv_heads, child.kv_heads))  # as evenly as can be: each group needs its room
    q_sources: list[int] = []
    for group in range(parent.kv_heads):
        slots = kv_sources.count(group) * new_members
        # Taking turns over all copies of the group, or the chosen ones, the old order first.
        q_sources += [group * members + member for member in choose(members, slots)]
    return copies(parent.n_heads, q_sources), copies(parent.kv_heads, kv_sources)


def padded_heads(parent: Shape, child: Shape) -> tuple[AxisMap, AxisMap]:
    """New heads are random, and read by zeros: in each old group after its own heads, and in new groups.

    Where groups get smaller there is no room for that, and heads are copied.
    """
    if (parent.n_heads, parent.kv_heads) == (child.n_heads, child.kv_heads):
        return identity(parent.n_heads), identity(parent.kv_heads)
    members, new_members = parent.n_heads // parent.kv_heads, child.n_heads // child.kv_heads
    if new_members < members:
        return copied_heads(parent, child)
    at = [group * new_members + j for group in range(parent.kv_heads) for j in range(members)]
    q_head = place(parent.n_heads, child.n_heads, at, new_write="random", new_read="zero")
    kv_head = place(parent.kv_heads, child.kv_heads, range(parent.kv_heads), new_write="random", new_read="zero")
    return (
        identity(parent.n_heads) if parent.n_heads == child.n_heads else q_head,
        identity(parent.kv_heads) if parent.kv_heads == child.kv_heads else kv_head,
    )


# --- d_head -----------------------------------------------------------------------------------------------------------


def rope_power(family: Family, parent: Shape, child: Shape) -> float:
    """What rope_theta is raised to: d' / d where the old pairs keep their places, else 1.

    Pair i turns by theta^(-2 i / d). At a whole ratio pair i goes to i d' / d and theta stays; at any other it stays
    at i, and theta^(d' / d) gives it the speed that it had.
    """
    return child.d_head / parent.d_head if family.rotary and child.d_head % parent.d_head else 1.0


def channels(family: Family, d: int, large: int) -> dict[str, AxisMap]:
    """Maps of the channels of a head.

    Scores are divided by sqrt(d), so queries are multiplied by sqrt(d' / d), but where the scale stands in the config.
    Under RoPE each old pair keeps its speed (:func:`rope_power`). New queries are random and meet zero keys, new values
    are random and are read by zeros: zero on both sides would never learn.
    """
    axes = ("q_dim", "k_dim", "v_dim", "q_normed", "k_normed") if family.qk_norm else ("q_dim", "k_dim", "v_dim")
    if d == large:
        return dict.fromkeys(axes, identity(d))
    values = {"v_dim": place(d, large, range(d), new_write="random", new_read="zero")}
    scale = 1.0 if family.fixed_scale else sqrt(large / d)
    if family.qk_norm:
        return values | _normed_channels(d, large, family.rotary, scale)
    at = list(range(d))
    if family.rotary:
        step = large // d if large % d == 0 else 1
        at = [i * step for i in range(d // 2)]
        at += [i + large // 2 for i in at]
    return values | {
        "q_dim": place(d, large, at, scale=scale, new_write="random"),
        "k_dim": place(d, large, at),
    }


def _normed_channels(d: int, large: int, rotary: bool, scale: float) -> dict[str, AxisMap]:
    """Channels of queries and keys that are normed: zeros or random entries would change the mean square.

    So each is copied, weighted where the ratio is not whole, which keeps mean square and eps, and the gains do the
    rest: `scale` for queries, and for keys 1 at one copy of each, the one with the old speed under RoPE, and zero at
    the others, which are so unseen until these gains learn.
    """
    half, new_half = (d // 2, large // 2) if rotary else (d, large)
    whole = large % d == 0
    run = [j // (large // d) for j in range(new_half)] if whole else list(cyclic(half, new_half))
    sources = run + [i + half for i in run] if rotary else run
    first = [run.index(i) for i in range(half)]
    first = first + [i + new_half for i in first] if rotary else first
    seen = [float(j in set(first)) for j in range(large)]
    given = copies(d, sources) if whole else weighted(d, sources)
    return {
        "q_dim": given,
        "k_dim": given,
        "q_normed": AxisMap(d, large, tuple(sources), (scale,) * large, tuple(s / scale for s in seen)),
        "k_normed": AxisMap(d, large, tuple(sources), tuple(seen), tuple(seen)),
    }


# --- d_mlp ------------------------------------------------------------------------------------------------------------


def padded_units(small: int, large: int) -> AxisMap:
    """New hidden units are random, and read by zeros."""
    if small == large:
        return identity(small)
    return place(small, large, range(small), new_write="random", new_read="zero")


def copied_units(small: int, large: int, choose: Choose = cyclic) -> AxisMap:
    """Units copied any number of times, each read at one over that (Net2Net)."""
    return identity(small) if small == large else copies(small, choose(small, large))
