"""Plans: the maps of each rule, what they preserve, what is refused. No weights here: test_apply has them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.trainer.pico import D_VOCAB, KEEPING_DEPTHS, LIKE_LLAMA, LOSING_WIDTHS, N_POSITIONS, PARENT, child, grow
from trainer.families import get_family
from trainer.growth import OPERATORS, GrowthError, GrowthPlan, check, plan, resolve_shape
from trainer.growth.depth import DEPTH_RULES, AtMostTwice, Block
from trainer.growth.exactness import broken
from trainer.growth.maps import NEW, copies, corner, cyclic, place, product, tile, weighted
from trainer.growth.width import WIDTH_RULES
from trainer.shape import GrowInit, Shape


def planned(family: str, to: Shape, init: GrowInit, tied: bool = True) -> GrowthPlan:
    return plan(family, PARENT[family], to, init, n_positions=N_POSITIONS, d_vocab=D_VOCAB, tied=tied)


# Maps


def test_a_tile_is_read_back_at_an_even_share() -> None:
    axis = tile(2, 3)

    assert list(axis.source_index) == [0, 1, 0, 1, 0, 1]
    assert list(axis.multiplicity) == [3, 3]
    assert set(axis.read) == {1 / 3}
    assert axis.reads_what_it_wrote


def test_an_uneven_share_that_does_not_add_up_is_seen() -> None:
    axis = copies(2, [0, 1, 0])
    wrong = type(axis)(2, 3, axis.source_index, axis.write, (0.5, 0.5, 0.5))

    assert axis.reads_what_it_wrote
    assert not wrong.reads_what_it_wrote


def test_a_corner_of_the_same_size_is_the_identity() -> None:
    assert corner(5, 5).is_identity
    assert tile(5, 1).is_identity
    assert not corner(5, 6).is_identity
    assert not copies(3, [0, 2, 1]).is_identity


def test_a_product_of_maps_is_the_map_of_two_axes_laid_out_together() -> None:
    both = product(tile(2, 2), place(2, 4, [0, 2], scale=3.0))

    assert both.small == 4
    assert list(both.source_index) == [0, NEW, 1, NEW, 2, NEW, 3, NEW] * 2
    assert {w for s, w in zip(both.source_index, both.write, strict=True) if s != NEW} == {3.0}
    assert both.reads_what_it_wrote


# Rules


def test_every_rule_of_a_spec_exists_and_is_described() -> None:
    for operator in (*OPERATORS["width"], *OPERATORS["depth"]):
        assert operator.title
        assert operator.line.endswith(".")
        assert operator.citation
        assert operator.url.startswith("https://arxiv.org/abs/")
    assert [half[0].key for half in OPERATORS.values()] == [GrowInit(parent="x").width, GrowInit(parent="x").depth]


@pytest.mark.parametrize(
    ("rule", "depths", "sources"),
    [
        ("stack", (2, 4), [0, 1, 0, 1]),
        ("stack", (4, 6), [0, 1, 2, 3, 2, 3]),
        ("stack", (3, 7), [0, 1, 2, 0, 1, 2, 2]),
        ("interleave", (2, 4), [0, 0, 1, 1]),
        ("interleave", (3, 4), [0, 0, 1, 2]),
        ("solar", (4, 6), [0, 1, 2, 1, 2, 3]),
        ("solar", (5, 8), [0, 1, 2, 3, 1, 2, 3, 4]),
        ("solar", (4, 7), [0, 1, 2, 3, 1, 2, 3]),
        ("solar", (32, 48), [*range(24), *range(8, 32)]),
        ("midas", (3, 4), [0, 1, 1, 2]),
        ("midas", (4, 6), [0, 1, 0, 1, 2, 3]),
        ("midas", (6, 8), [0, 1, 2, 3, 2, 3, 4, 5]),
        ("midas", (8, 10), [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]),
        ("midas", (5, 7), [0, 1, 2, 1, 2, 3, 4]),
        ("midas", (2, 4), [0, 1, 0, 1]),
        ("append_random", (2, 4), [0, 1, None, None]),
        ("identity", (2, 4), [0, 0, 1, 1]),
    ],
)
def test_a_depth_rule_takes_each_block_from_where_it_says(
    rule: str, depths: tuple[int, int], sources: list[int | None]
) -> None:
    assert [block.source for block in DEPTH_RULES[rule].blocks(*depths)] == sources


@given(parent=st.integers(1, 12), more=st.integers(0, 30))
def test_identity_blocks_keep_the_old_ones_in_order_and_silence_all_others(parent: int, more: int) -> None:
    blocks = DEPTH_RULES["identity"].blocks(parent, parent + more)

    assert len(blocks) == parent + more
    assert [b.source for b in blocks if not b.silent] == list(range(parent))
    runs = [sum(b.source == i for b in blocks) for i in range(parent)]
    assert max(runs) - min(runs) <= 1, "spread evenly"


@given(parent=st.integers(1, 12), more=st.integers(0, 30), rule=st.sampled_from(sorted(DEPTH_RULES)))
def test_a_depth_rule_gives_the_wanted_depth_and_leaves_no_block_out(parent: int, more: int, rule: str) -> None:
    if rule not in ANY_DEPTH:
        more = min(more, parent)
    DEPTH_RULES[rule].refuse(parent, parent + more)
    blocks = DEPTH_RULES[rule].blocks(parent, parent + more)

    assert len(blocks) == parent + more
    assert {b.source for b in blocks} - {None} == set(range(parent))
    if more == 0:
        assert blocks == tuple(Block(i) for i in range(parent))


@pytest.mark.parametrize("rule", ["solar", "midas"])
def test_a_rule_that_runs_the_middle_twice_refuses_more_than_twice_the_depth(rule: str) -> None:
    assert not planned("llama", child("llama", n_layers=4), grow(depth=rule)).preserves
    assert planned("llama", child("llama", d_mlp=40), grow(depth=rule)).preserves
    with pytest.raises(GrowthError) as caught:
        check("llama", PARENT["llama"], child("llama", n_layers=5), grow(depth=rule))
    assert (caught.value.field, caught.value.value) == ("shape.n_layers", 5)
    assert "2 to 4 would be right" in caught.value.message


@given(groups=st.integers(1, 4), members=st.integers(1, 4), a=st.integers(1, 3), c=st.integers(1, 4))
def test_copies_of_a_query_head_stay_with_their_key_value_head(groups: int, members: int, a: int, c: int) -> None:
    parent = Shape(d_model=240, n_heads=groups * members, n_kv_heads=groups, d_head=4, d_mlp=8, n_layers=1)
    assume((parent.n_heads * c) % (groups * a) == 0)
    to = parent.model_copy(update={"n_heads": parent.n_heads * c, "n_kv_heads": groups * a})
    maps = WIDTH_RULES["duplicate"].maps(get_family("llama"), parent, to)
    q, kv = maps["q_head"], maps["kv_head"]

    per_group = q.large // kv.large
    assert all(kv.source_index[h // per_group] == source // members for h, source in enumerate(q.source_index))
    assert set(q.multiplicity) == {c}
    assert set(kv.multiplicity) == {a}
    assert broken(get_family("llama"), parent, to, maps, [Block(0)]) == []


def test_only_key_value_heads_grow_and_queries_stay_where_they_are() -> None:
    maps = WIDTH_RULES["duplicate"].maps(get_family("llama"), PARENT["llama"], child("llama", n_kv_heads=6))

    assert list(maps["q_head"].source_index) == list(range(6))
    assert list(maps["kv_head"].source_index) == [0, 0, 0, 1, 1, 1]


# What is preserved

ratios = st.integers(1, 3)
#: The rules that lead to any depth; the others at most double it.
ANY_DEPTH = [key for key, rule in DEPTH_RULES.items() if not isinstance(rule, AtMostTwice)]


@st.composite
def whole_growths(draw: st.DrawFn) -> tuple[str, Shape]:
    """A family and a child that duplicate can reach."""
    family = draw(st.sampled_from(["gpt2", "llama", *LIKE_LLAMA]))
    parent = PARENT[family]
    heads, d_head, mlp, layers = (draw(ratios) for _ in range(4))
    changes = {
        "n_heads": parent.n_heads * heads,
        "d_head": parent.d_head * d_head,
        "d_mlp": parent.d_mlp * mlp,
        "n_layers": parent.n_layers + layers - 1,
    }
    if family == "gpt2":
        return family, child(family, d_model=changes["n_heads"] * changes["d_head"], **changes)
    kv = draw(st.sampled_from([k for k in (2, 4, 6, 12, 18) if changes["n_heads"] % k == 0]))
    return family, child(family, d_model=parent.d_model * heads * draw(ratios), n_kv_heads=kv, **changes)


@given(growth=whole_growths(), tied=st.booleans())
def test_duplicate_with_identity_preserves_at_every_whole_ratio(growth: tuple[str, Shape], tied: bool) -> None:
    made = planned(*growth, grow(), tied)

    assert made.preserves
    assert all(axis.reads_what_it_wrote for axis in made.maps.values())
    assert made.because.endswith("its parent does.") or made.because.endswith("is its parent.")


@given(growth=whole_growths(), width=st.sampled_from(sorted(WIDTH_RULES)), depth=st.sampled_from(ANY_DEPTH))
def test_what_is_preserved_is_computed_from_what_changes(growth: tuple[str, Shape], width: str, depth: str) -> None:
    family, to = growth
    made = planned(family, to, grow(width, depth))
    same_depth = to.n_layers == PARENT[family].n_layers
    same_width = to.model_copy(update={"n_layers": 2}) == PARENT[family]

    keeps = width not in LOSING_WIDTHS
    if get_family(family).qk_norm == "all":
        assume(width not in ("pad", "net2net"))  # heads that are not copied equally often change a norm over all
    assert made.preserves == ((keeps or same_width) and (depth in KEEPING_DEPTHS or same_depth))


@given(growth=whole_growths(), width=st.sampled_from(sorted(WIDTH_RULES)), depth=st.sampled_from(ANY_DEPTH))
def test_each_parameter_of_the_child_has_a_source_of_its_kind(
    growth: tuple[str, Shape], width: str, depth: str
) -> None:
    family, to = growth
    made = planned(family, to, grow(width, depth))
    new_table = get_family(family).parameters(to, N_POSITIONS, D_VOCAB, True)

    assert [new.name for new, *_ in made.parameters()] == [p.name for p in new_table]
    for new, old, block, _ in made.parameters():
        if old is None:
            assert block.source is None
            assert new.layer is not None
            continue
        assert (old.out, old.into, old.kind) == (new.out, new.into, new.kind)
        assert old.name == new.name.replace(f".{new.layer}.", f".{block.source}.", 1)


def test_random_pad_preserves_where_no_width_changes() -> None:
    assert planned("llama", PARENT["llama"], grow("random_pad", "stack")).preserves
    deeper = planned("llama", child("llama", n_layers=3), grow("random_pad", "identity"))
    assert deeper.preserves
    assert deeper.because.startswith("The new block writes nothing")


@pytest.mark.parametrize(
    ("changes", "init", "said"),
    [
        ({"d_mlp": 40}, grow("random_pad"), "the new part of d_mlp (20 to 40) is random"),
        ({"n_layers": 4}, grow(depth="stack"), "2 blocks of the parent run a second time"),
        ({"n_layers": 3}, grow(depth="append_random"), "1 new random block writes to the residual stream"),
        ({"layer_norm_eps": 1e-6}, grow(), "layer_norm_eps 1e-05 to 1e-06 changes every norm"),
    ],
)
def test_a_lost_function_is_explained_for_these_very_shapes(changes: dict[str, Any], init: GrowInit, said: str) -> None:
    made = planned("llama", child("llama", **changes), init)

    assert not made.preserves
    assert said.lower() in made.because.lower()
    assert made.because.endswith("so the grown model does not compute what its parent does.")


def test_the_fields_that_grew_are_named_with_their_sizes() -> None:
    made = planned("llama", child("llama", d_model=24, d_mlp=40, n_layers=4), grow())

    assert "d_model (12 to 24) and d_mlp (20 to 40)" in made.because
    assert "2 new blocks" in made.because
    assert "n_heads" not in made.because


# The conditions themselves: a broken map is seen, whatever rule it came from


def conditions(family: str, to: Shape, **changed: Any) -> list[str]:
    maps = WIDTH_RULES["duplicate"].maps(get_family(family), PARENT[family], to) | changed
    return broken(get_family(family), PARENT[family], to, maps, [Block(0), Block(1)])


def test_heads_tiled_across_groups_are_seen() -> None:
    to = child("llama", n_heads=12)
    assert conditions("llama", to) == []
    assert "another key/value head" in conditions("llama", to, q_head=tile(6, 2))[0]


def test_channels_copied_unequally_often_are_seen_by_both_norms() -> None:
    uneven = copies(12, [*range(12), *range(6)])
    for family in ("gpt2", "llama"):
        assert "mean square" in conditions(family, child(family), embed=uneven)[0]


def test_weighted_copies_keep_a_mean_square_but_not_a_mean() -> None:
    mixed = weighted(12, cyclic(12, 18))

    assert mixed.reads_what_it_wrote
    assert mixed.power == pytest.approx((1.5,) * 12)
    assert conditions("llama", child("llama"), embed=mixed) == []
    assert "mean changes" in conditions("gpt2", child("gpt2"), embed=mixed)[0]


def test_a_pad_is_made_up_for_by_the_size_of_the_rest_and_under_a_layer_norm_holds_the_mean() -> None:
    zeros, means = (place(12, 18, range(12), scale=1.5**0.5, new_write=fill) for fill in ("zero", "mean"))
    assert conditions("llama", child("llama"), embed=zeros) == []
    assert "mean square" in conditions("llama", child("llama"), embed=place(12, 18, range(12)))[0]
    assert "mean that no norm takes away" in conditions("llama", child("llama"), embed=means)[0]
    assert conditions("gpt2", child("gpt2"), embed=means) == []
    assert "do not hold the mean" in conditions("gpt2", child("gpt2"), embed=zeros)[0]


@given(growth=whole_growths(), more=st.integers(0, 7))
def test_duplicate_preserves_at_any_ratio(growth: tuple[str, Shape], more: int) -> None:
    family, to = growth
    to = to.model_copy(update={"d_mlp": to.d_mlp + more})
    if family == "gpt2":
        heads = to.n_heads + more
        to = to.model_copy(update={"n_heads": heads, "d_model": heads * to.d_head})
    else:
        to = to.model_copy(update={"d_model": to.d_model + more * to.n_heads, "d_head": to.d_head + 2 * more})
    made = planned(family, to, grow())
    assert made.preserves, made.because


def test_scaled_units_of_the_mlp_are_seen() -> None:
    scaled = place(20, 20, range(20), scale=2.0)
    assert "before their nonlinearity" in conditions("llama", child("llama"), mlp=scaled)[0]


def test_a_head_padded_across_rotated_pairs_is_seen() -> None:
    to = child("llama", d_head=8)
    q, k = place(4, 8, range(4), scale=2**0.5, new_write="random"), place(4, 8, range(4))
    assert conditions("llama", to) == []
    assert "RoPE" in conditions("llama", to, q_dim=q, k_dim=k)[0]


def test_a_norm_of_queries_and_keys_wants_whole_copies_of_channels() -> None:
    to = child("qwen3", d_head=8)
    assert conditions("qwen3", to) == []
    zeros = place(4, 8, [0, 2, 4, 6])
    assert "norms of queries and keys change" in conditions("qwen3", to, k_dim=zeros)[0]
    random = place(4, 8, [0, 2, 4, 6], new_write="random")
    assert "d_head (4 to 8) is random" in conditions("qwen3", to, q_dim=random)[0]
    turned = copies(4, [0, 1, 2, 3] * 2)
    assert "belong to other channels" in conditions("qwen3", to, q_dim=turned)[0]
    assert "scaled by another number" in conditions("qwen3", to, q_normed=copies(4, [0, 0, 1, 1, 2, 2, 3, 3]))[0]
    unrotated = type(turned)(4, 8, [0, 0, 1, 1, 2, 2, 3, 3], (0.0, 1.0) * 4, (0.0, 1.0) * 4)
    assert "RoPE" in conditions("qwen3", to, k_normed=unrotated)[0]


def test_a_norm_over_all_heads_wants_them_copied_equally_often() -> None:
    uneven = copies(6, [0, 0, 0, 0, 1, 2, 3, 3, 4, 4, 5, 5])
    for family in ("llama", "qwen3", "olmo2"):
        assert conditions(family, child(family, n_heads=12)) == []
        found = conditions(family, child(family, n_heads=12), q_head=uneven)
        assert (["heads are not copied equally often" in clause for clause in found] == [True]) == (family == "olmo2")


def test_a_block_with_norms_after_its_layers_is_silenced_by_their_gains() -> None:
    table = get_family("olmo2").parameters(PARENT["olmo2"], N_POSITIONS, D_VOCAB, True)
    names = [p.name.removeprefix("model.layers.0.") for p in table if p.layer == 0 and p.writes_residual]
    assert names == ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]


def test_an_attention_scale_that_is_not_made_up_for_is_seen() -> None:
    to = child("gpt2", d_model=24, d_head=8)
    assert conditions("gpt2", to) == []
    assert "scaled by another number" in conditions("gpt2", to, q_dim=place(4, 8, range(4)))[0]


def test_random_keys_against_random_queries_are_seen() -> None:
    to = child("gpt2", d_model=24, d_head=8)
    assert "d_head (4 to 8) is random" in conditions("gpt2", to, k_dim=place(4, 8, range(4), new_write="random"))[0]


def test_random_values_that_are_read_are_seen() -> None:
    to = child("llama", d_head=8)
    read = place(4, 8, range(4), new_write="random")
    assert "d_head (4 to 8) is random" in conditions("llama", to, v_dim=read)[0]


def test_copies_that_do_not_add_up_are_seen() -> None:
    doubled = tile(20, 2)
    wrong = type(doubled)(20, 40, doubled.source_index, doubled.write, doubled.write)
    assert "do not add up" in conditions("llama", child("llama"), mlp=wrong)[0]


# Refusals


@pytest.mark.parametrize(
    ("family", "changes", "field", "value", "right"),
    [
        ("llama", {"n_heads": 6, "n_kv_heads": 3}, "shape.n_heads", 6, "at least 9"),
        ("llama", {"d_mlp": 10}, "shape.d_mlp", 10, "at least 20"),
        ("llama", {"n_layers": 1}, "shape.n_layers", 1, "at least 2"),
        ("llama", {"n_heads": 3, "n_kv_heads": None}, "shape.n_heads", 3, "at least 6"),
        ("gpt2", {"d_model": 24}, "shape.d_head", 4, "n_heads 6"),
    ],
)
def test_a_growth_that_cannot_be_names_field_value_and_what_would_be_right(
    family: str, changes: dict[str, Any], field: str, value: int, right: str
) -> None:
    with pytest.raises(GrowthError) as caught:
        check(family, PARENT[family], child(family, **changes), grow())

    assert (caught.value.field, caught.value.value) == (field, value)
    assert right in caught.value.message
    assert str(caught.value).startswith(f"{field} {value}: ")


@given(more=st.integers(0, 40), extra=st.integers(0, 50))
def test_random_pad_takes_any_size_that_is_not_smaller(more: int, extra: int) -> None:
    to = child("llama", d_model=12 + 6 * more, d_mlp=20 + extra)
    assert planned("llama", to, grow("random_pad", "append_random")).preserves == (more == extra == 0)


def test_a_gpt2_head_may_grow_by_any_ratio() -> None:
    assert planned("gpt2", child("gpt2", d_model=36, d_head=6, n_heads=6), grow()).preserves


# Warnings


def test_exact_copies_without_noise_are_warned_of() -> None:
    wider = child("llama", d_mlp=40)
    assert planned("llama", wider, grow(snr_db=None)).warnings
    assert "above the last one" in planned("llama", wider, grow("aki", snr_db=None)).warnings[0]
    assert planned("llama", wider, grow(split="uneven", snr_db=None)).warnings == []
    assert planned("llama", wider, grow()).warnings == []
    assert planned("llama", child("llama", n_layers=4), grow(snr_db=None)).warnings == []


def test_random_pad_warns_where_it_tears_heads_apart() -> None:
    assert "RoPE" in planned("llama", child("llama", d_head=8), grow("random_pad")).warnings[0]
    assert "groups" in planned("llama", child("llama", n_heads=12), grow("random_pad")).warnings[0]
    assert planned("gpt2", child("gpt2", d_model=24, d_head=8), grow("random_pad")).warnings == []


# A shape from its changes


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"d_model": 24, "n_layers": "2x"}, {"d_model": 24, "n_layers": 4}),
        ("llama", {"d_model": "2x"}, {"d_model": 24}),
        ("llama", {"n_heads": "12"}, {"n_heads": 12}),
        ("llama", {"n_kv_heads": "3x"}, {"n_kv_heads": None}),
        ("gpt2", {"d_model": "2x"}, {"d_model": 24, "n_heads": 6}),
        ("gpt2", {"n_heads": 9}, {"d_model": 36, "n_heads": 9}),
        ("gpt2", {"d_head": "2x"}, {"d_model": 24, "d_head": 8}),
        ("gpt2", {"d_model": 24, "n_heads": 3}, {"d_model": 24, "d_head": 8}),
        ("gpt2", {"layer_norm_eps": "1e-6"}, {"layer_norm_eps": 1e-6}),
    ],
)
def test_what_is_left_out_of_a_shape_stays_or_follows(
    family: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert resolve_shape(family, PARENT[family], changes) == child(family, **expected)


def test_as_many_key_value_heads_as_query_heads_stay_as_many() -> None:
    assert resolve_shape("llama", child("llama", n_kv_heads=None), {"n_heads": 12}).kv_heads == 12


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"width": 3}, "shape.width", "is not a field"),
        ({"d_mlp": "wide"}, "shape.d_mlp", "must be a number"),
        ({"d_mlp": "nan"}, "shape.d_mlp", "whole number"),
        ({"d_mlp": "inf"}, "shape.d_mlp", "whole number"),
        ({"d_mlp": "1.33x"}, "shape.d_mlp", "comes to 26.6"),
        ({"d_mlp": 0}, "shape.d_mlp", "greater than or equal to 1"),
        ({"n_kv_heads": 4}, "shape.n_kv_heads", "1, 2, 3, 6"),
    ],
)
def test_changes_that_give_no_shape_are_refused(changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(GrowthError, match=said) as caught:
        resolve_shape("llama", PARENT["llama"], changes)
    assert caught.value.field == field
