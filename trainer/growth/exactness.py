"""When does the grown model compute what its parent computes? Answered from the maps, not from a rule's name.

Let the child's activation be x' = E x on every axis. By induction along the graph this holds, and the logits are equal,
if each of these does; `broken` names those that do not:

    every axis     R E = I, and nothing that is read holds random entries
    embed          one E for the whole residual stream, E^T E = (D' / D) I, so that gain and eps stay; for LayerNorm all
                   coefficients alike, and the mean of the old channels, not zero, in new ones, so that the mean stays
    mlp            E has unit coefficients: the nonlinearity acts on each unit
    heads          a query head's copy reads a copy of the same key/value head; copies are exact
    q_dim, k_dim   E_q^T E_k = sqrt(d' / d) I, since the softmax divides by sqrt(d), or I where it does not; with RoPE
                   each pair of channels keeps its speed; if only the first ones are rotated they stay where they are
    q_normed,      where queries and keys are normed, it is these that must meet so; before the norm, E^T E = (d' / d) I
    k_normed       (and each head copied equally often as it is, if the norm takes all heads together), so that mean
                   square and eps stay, and gains are those of the channel that each copies
    layers         the old blocks once each and in order, all others silent
    eps            unchanged
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose, sqrt

from trainer.families import Family
from trainer.growth.axes import FIELD_AXES, size_of
from trainer.growth.depth import Block
from trainer.growth.maps import NEW, AxisMap
from trainer.shape import Shape


def broken(
    family: Family,
    parent: Shape,
    child: Shape,
    maps: Mapping[str, AxisMap],
    blocks: Sequence[Block],
    rope_power: float = 1.0,
) -> list[str]:
    """Clauses that say what keeps the child from computing what the parent does; empty if nothing does."""
    return broken_by_width(family, parent, child, maps, rope_power) + broken_by_depth(parent.n_layers, blocks)


def broken_by_width(
    family: Family, parent: Shape, child: Shape, maps: Mapping[str, AxisMap], rope_power: float = 1.0
) -> list[str]:
    """What of that lies in the maps."""
    found = [*_random_axes(family, parent, child, maps)]
    if not found:  # with random entries the finer conditions add nothing a reader needs
        found += _residual_stream(family, maps["embed"])
        found += _units(maps["mlp"])
        found += _heads(maps["q_head"], maps["kv_head"])
        found += _query_key_norms(family, maps) or _head_channels(family, maps, rope_power)
        found += [
            f"copies on axis {axis} do not add up to what they copy"
            for axis, axis_map in maps.items()
            if not axis_map.reads_what_it_wrote
        ]
    if parent.layer_norm_eps != child.layer_norm_eps:
        found.append(f"layer_norm_eps {parent.layer_norm_eps:g} to {child.layer_norm_eps:g} changes every norm")
    return found


def broken_by_depth(depth: int, blocks: Sequence[Block]) -> list[str]:
    """What of that lies in the blocks."""
    heard = [b.source for b in blocks if not b.silent]
    if heard == list(range(depth)):
        return []
    new = sum(b.source is None for b in blocks)
    if new:
        return [f"{new} new random block{'s write' if new > 1 else ' writes'} to the residual stream"]
    return [f"{len(heard) - depth} block{'s' if len(heard) - depth > 1 else ''} of the parent run a second time"]


def _random_axes(family: Family, parent: Shape, child: Shape, maps: Mapping[str, AxisMap]) -> list[str]:
    def is_seen(axis: str) -> bool:
        if axis in ("q_dim", "k_dim"):  # no matrix reads them: they meet each other, and zero hides the other
            other = maps["k_dim" if axis == "q_dim" else "q_dim"]
            return family.qk_norm is not None or other.new_write == "random" or not _same_new(maps[axis], other)
        return maps[axis].new_read == "random"

    fields = [
        f"{field} ({size_of(parent, field)} to {size_of(child, field)})"
        for field, axes in FIELD_AXES.items()
        if any(maps[a].has_new and maps[a].new_write == "random" and is_seen(a) for a in axes)
        and not (field == "n_kv_heads" and parent.n_heads == parent.kv_heads and child.n_heads == child.kv_heads)
    ]
    return [f"the new part of {joined(fields)} is random and is read at once"] if fields else []


def _same_new(a: AxisMap, b: AxisMap) -> bool:
    return [s == NEW for s in a.source_index] == [s == NEW for s in b.source_index]


def _residual_stream(family: Family, embed: AxisMap) -> list[str]:
    if embed.is_identity:
        return []
    if not _keeps_mean_square(embed):
        return ["the norms' mean square changes, since channels of d_model are not copied equally often"]
    if family.mean_centred and embed.has_new and embed.new_write != "mean":
        return ["the norms' mean changes, since new channels of d_model do not hold the mean of the old ones"]
    if family.mean_centred and len({*embed.write}) > 1:
        return ["the norms' mean changes, since channels of d_model are copied at unlike sizes"]
    if not family.mean_centred and embed.has_new and embed.new_write == "mean":
        return ["new channels of d_model hold a mean that no norm takes away"]
    return []


def _units(mlp: AxisMap) -> list[str]:
    return [] if mlp.has_unit_writes else ["units of the MLP are scaled before their nonlinearity"]


def _heads(q_head: AxisMap, kv_head: AxisMap) -> list[str]:
    members, new_members = q_head.small // kv_head.small, q_head.large // kv_head.large
    for new, source in enumerate(q_head.source_index):
        if source != NEW and kv_head.source_index[new // new_members] != source // members:
            return ["a copied query head reads another key/value head than the one it was trained with"]
    return []


def _query_key_norms(family: Family, maps: Mapping[str, AxisMap]) -> list[str]:
    if not family.qk_norm:
        return []
    for head, given, normed in (("q_head", "q_dim", "q_normed"), ("kv_head", "k_dim", "k_normed")):
        for axis in (given, head) if family.qk_norm == "all" else (given,):
            if not _keeps_mean_square(maps[axis]) or (axis == head and not maps[axis].has_unit_writes):
                what = "heads" if axis == head else "channels of d_head"
                return [f"the norms of queries and keys change, since {what} are not copied equally often"]
        if list(maps[given].source_index) != list(maps[normed].source_index):
            return ["the norms' gains of queries and keys belong to other channels"]
    return []


def _keeps_mean_square(axis: AxisMap) -> bool:
    """E^T E = (large / small) I."""
    return all(isclose(power, axis.large / axis.small) for power in axis.power)


def _head_channels(family: Family, maps: Mapping[str, AxisMap], rope_power: float) -> list[str]:
    q, k = (maps["q_normed"], maps["k_normed"]) if family.qk_norm else (maps["q_dim"], maps["k_dim"])
    if q.is_identity and k.is_identity:
        return []
    met, place = [0.0] * q.small, dict[int, int]()
    both = zip(q.source_index, k.source_index, q.write, k.write, strict=True)
    for new, (q_source, k_source, q_write, k_write) in enumerate(both):
        if NEW in (q_source, k_source) or q_write * k_write == 0:
            continue
        if q_source != k_source:
            return ["channels of queries and keys no longer meet"]
        met[q_source] += q_write * k_write
        place[q_source] = new
    wanted = 1.0 if family.fixed_scale else sqrt(q.large / q.small)
    if not all(isclose(m, wanted) for m in met):
        return ["attention is scaled by another number than the parent's"]
    if family.rotates_first and any(s not in (NEW, new) for m in (q, k) for new, s in enumerate(m.source_index)):
        return ["channels of a head that RoPE rotates move away from their frequencies"]
    if family.rotary:
        half, new_half = q.small // 2, q.large // 2
        # theta^(-i / half) = (theta^power)^(-place / new_half), and i + half goes with i
        if any(
            not isclose(i * new_half, rope_power * place[i] * half) or place[i + half] != place[i] + new_half
            for i in range(half)
        ):
            return ["channels of a head are rotated by RoPE at other frequencies than they were trained with"]
    return []


def joined(items: Sequence[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
