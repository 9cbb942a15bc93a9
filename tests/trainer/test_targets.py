"""Proposed shapes: near what was asked for, models of their family, in reach of growth that keeps the function."""

from __future__ import annotations

from itertools import pairwise

import pytest

from trainer.budget import parameters
from trainer.families import FAMILIES, get_family
from trainer.growth import GrowthError, check, plan
from trainer.growth.advice import recommend
from trainer.growth.axes import FIELD_AXES, size_of
from trainer.growth.targets import shape_for, shapes_between
from trainer.shape import GrowInit, Shape

REAL = {
    "gpt2": (Shape(d_model=768, n_heads=12, d_head=64, d_mlp=3072, n_layers=12), 50_257),
    "gpt_neox": (Shape(d_model=512, n_heads=8, d_head=64, d_mlp=2048, n_layers=6), 50_304),
    "llama": (Shape(d_model=576, n_heads=9, n_kv_heads=3, d_head=64, d_mlp=1536, n_layers=30), 49_152),
    "mistral": (Shape(d_model=4096, n_heads=32, n_kv_heads=8, d_head=128, d_mlp=14_336, n_layers=32), 32_000),
    "olmo2": (Shape(d_model=2048, n_heads=16, d_head=128, d_mlp=8192, n_layers=16), 100_352),
    "gemma3_text": (Shape(d_model=640, n_heads=4, n_kv_heads=1, d_head=256, d_mlp=2048, n_layers=18), 262_144),
    "phi3": (Shape(d_model=3072, n_heads=32, d_head=96, d_mlp=8192, n_layers=32), 32_064),
    "qwen3": (Shape(d_model=1024, n_heads=16, n_kv_heads=8, d_head=128, d_mlp=3072, n_layers=28), 151_936),
}


@pytest.mark.parametrize("by", ["both", "width", "depth"])
@pytest.mark.parametrize("multiple", [1.5, 2, 4])
@pytest.mark.parametrize("family", REAL)
def test_a_multiple_is_reached_within_five_percent_by_a_shape_that_growth_can_keep_whole(
    family: str, multiple: float, by: str
) -> None:
    parent, d_vocab = REAL[family]
    found = shape_for(family, parent, multiple, by, n_positions=1024, d_vocab=d_vocab, tied=True)
    have = parameters(family, parent, 1024, d_vocab, True).total
    assert found.parameters == parameters(family, found.shape, 1024, d_vocab, True).total
    assert found.multiple == found.parameters / have == pytest.approx(multiple, rel=0.05)
    assert get_family(family).problems(found.shape) == []
    assert found.shape.d_head == parent.d_head
    if parent.kv_heads == 1:
        assert found.shape.kv_heads == 1
    else:
        assert found.shape.n_heads / found.shape.kv_heads == parent.n_heads / parent.kv_heads
    wider = [f for f in FIELD_AXES if size_of(found.shape, f) > size_of(parent, f)]
    assert bool(wider) == (by != "depth")
    assert (found.shape.n_layers > parent.n_layers) == (by != "width")
    assert found.preserves
    sizes = {"n_positions": 1024, "d_vocab": d_vocab, "tied": True}
    assert plan(family, parent, found.shape, GrowInit(parent="p"), **sizes).preserves  # type: ignore[arg-type]


def test_a_whole_ratio_is_preferred_to_a_nearer_miss() -> None:
    parent, d_vocab = REAL["mistral"]
    found = shape_for("mistral", parent, 4, "width", n_positions=1, d_vocab=d_vocab, tied=False)
    assert (found.shape.d_model, found.shape.n_heads, found.shape.d_mlp) == (8192, 64, 28_672)


def test_where_heads_must_be_copied_equally_often_the_rest_grows_instead() -> None:
    """OLMo 2 norms all heads together, so 16 heads can become 32 and nothing in between."""
    parent, d_vocab = REAL["olmo2"]
    found = shape_for("olmo2", parent, 2, "both", n_positions=1, d_vocab=d_vocab, tied=True)
    assert found.shape.n_heads % parent.n_heads == 0


def test_without_a_vocabulary_the_embeddings_are_not_counted() -> None:
    parent, _ = REAL["llama"]
    found = shape_for("llama", parent, 2, "depth", n_positions=64, d_vocab=None, tied=True)
    assert found.counted == "non-embedding"
    assert found.parameters == parameters("llama", found.shape, 64, 1, True).non_embedding
    assert found.shape.n_layers == 60


def test_a_tiny_model_gets_the_nearest_that_there_is() -> None:
    parent = Shape(d_model=8, n_heads=2, d_head=4, d_mlp=16, n_layers=1)
    found = shape_for("llama", parent, 1.2, "depth", n_positions=8, d_vocab=16, tied=True)
    assert found.shape.n_layers == 2
    assert found.multiple > 1.5


@pytest.mark.parametrize("multiple", [1, 0.5, 17, float("nan")])
def test_a_multiple_that_is_no_growth_is_refused(multiple: float) -> None:
    with pytest.raises(GrowthError) as error:
        shape_for("llama", REAL["llama"][0], multiple, "both", n_positions=8, d_vocab=9, tied=True)
    assert error.value.field == "multiple"


# Stages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growths", [2, 3, 5])
@pytest.mark.parametrize("family", REAL)
def test_stages_grow_from_one_to_the_next(family: str, growths: int) -> None:
    parent, d_vocab = REAL[family]
    child = shape_for(family, parent, 4, "both", n_positions=64, d_vocab=d_vocab, tied=True).shape
    found = shapes_between(family, parent, child, growths)
    assert 1 <= len(found) < growths
    steps = [parent, *found, child]
    assert len(set(steps)) == len(steps)
    for one, next_one in pairwise(steps):
        check(family, one, next_one, GrowInit(parent="p"))
        assert next_one.d_model * parent.n_heads == parent.d_model * next_one.n_heads
    sizes = [parameters(family, shape, 64, d_vocab, True).total for shape in steps]
    assert sizes == sorted(sizes)


def test_stages_are_about_equal_factors() -> None:
    parent, d_vocab = REAL["gpt2"]
    child = shape_for("gpt2", parent, 4, "both", n_positions=64, d_vocab=d_vocab, tied=True).shape
    steps = [parent, *shapes_between("gpt2", parent, child, 3), child]
    sizes = [parameters("gpt2", shape, 64, d_vocab, True).non_embedding for shape in steps]
    factors = [b / a for a, b in pairwise(sizes)]
    assert max(factors) / min(factors) < 1.3


def test_gradual_stacking_widens_first_and_then_adds_as_many_blocks_at_each_growth() -> None:
    parent = Shape(d_model=64, n_heads=2, d_head=32, d_mlp=128, n_layers=3)
    child = Shape(d_model=128, n_heads=4, d_head=32, d_mlp=256, n_layers=12)
    found = shapes_between("llama", parent, child, 3, "gradual")
    assert [(s.d_model, s.n_layers) for s in found] == [(128, 6), (128, 9)]


def test_what_has_no_stages_is_refused() -> None:
    small = Shape(d_model=64, n_heads=2, d_head=32, d_mlp=128, n_layers=3)
    for child, growths, staging in (
        (small, 3, "even"),
        (small.model_copy(update={"n_layers": 4}), 3, "even"),
        (small.model_copy(update={"n_layers": 4}), 3, "gradual"),
        (small.model_copy(update={"n_layers": 6}), 1, "even"),
    ):
        with pytest.raises(GrowthError) as error:
            shapes_between("llama", small, child, growths, staging)  # type: ignore[arg-type]
        assert error.value.field == "stages"


# Advice ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recommended_keeps_the_function_with_noise_where_there_are_copies(family: str) -> None:
    parent = Shape(d_model=32, n_heads=2, d_head=16, d_mlp=64, n_layers=2)
    child = Shape(d_model=64, n_heads=4, d_head=16, d_mlp=128, n_layers=3)
    advice = recommend(family, parent, child)
    assert advice.preserves
    assert (advice.width, advice.depth, advice.snr_db) == ("duplicate", "identity", 0.0)
    assert "computing exactly" in advice.why
    deeper = recommend(family, parent, parent.model_copy(update={"n_layers": 3}))
    assert deeper.snr_db is None
    assert "Only depth grows" in deeper.why


def test_advice_says_why_where_nothing_keeps_the_function() -> None:
    parent = Shape(d_model=32, n_heads=2, d_head=16, d_mlp=64, n_layers=2)
    child = parent.model_copy(update={"d_model": 48, "n_heads": 3, "n_kv_heads": None})
    advice = recommend("olmo2", parent, child)
    assert not advice.preserves
    assert advice.why.startswith("No rule keeps the function for these shapes. ")
    assert "heads are not copied equally often" in advice.why


def test_there_is_no_advice_for_what_cannot_be_grown() -> None:
    parent = Shape(d_model=32, n_heads=2, d_head=16, d_mlp=64, n_layers=2)
    with pytest.raises(GrowthError):
        recommend("llama", parent, parent.model_copy(update={"d_mlp": 32}))
