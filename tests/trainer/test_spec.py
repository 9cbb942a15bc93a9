from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.families import FAMILIES
from trainer.spec import OVERRIDABLE, SpecError, TrainSpec, load_spec, parse_spec

SHAPE = {"d_model": 64, "n_heads": 2, "d_head": 32, "d_mlp": 128, "n_layers": 2}
STANDARD: dict[str, Any] = {
    "name": "standard",
    "models": {
        "large": {"shape": SHAPE | {"d_model": 128, "n_heads": 4}},
        "scaled": {"shape": SHAPE | {"d_model": 128, "n_heads": 4}, "init": {"kind": "grow", "parent": "small"}},
        "small": {"shape": SHAPE},
    },
}

RUNG = {"shape": SHAPE, "steps": 10}
NO_STEPS = {"max_steps": 0, "warmup_steps": 0}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The standard spec with one field set, by its dotted name."""
    held = copy.deepcopy(STANDARD)
    *way, field = path.split(".")
    place = held
    for step in way:
        place = place.setdefault(step, {})
    place[field] = value
    return held


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.lr", -1, "train.lr -1: must be more than 0"),
        ("train.lr", float("nan"), "train.lr nan: must be a finite number"),
        ("train.max_steps", 1.5, "train.max_steps 1.5: must be a whole number"),
        ("train.schedule", "step", "train.schedule 'step': must be 'cosine', 'linear' or 'constant'"),
        ("train.speed", 9, "train.speed 9: is not a field of a spec"),
        ("train.max_steps", None, "train.max_steps: give max_steps, num_epochs or both: training must end somewhere"),
        ("train.warmup_steps", 500, "train.warmup_steps: 500 is more than max_steps; at most 400 would be right"),
        ("models.small.shape.d_model", 0, "models.small.shape.d_model 0: must be at least 1"),
        ("models.small.shape.d_head", 31, "models.small.shape.d_head 31: RoPE rotates channels in pairs"),
        ("models.small.family", "gpt5", f"models.small.family 'gpt5': must be {next(iter(FAMILIES))!r}, "),
        ("models.small.shape", None, "models.small.shape: a shape is needed unless"),
        ("models.small.init", {"kind": "magic"}, "models.small.init.kind 'magic': must be 'random'"),
        ("models.small.init", {}, "models.small.init: needs a kind"),
        ("models.small.init", {"kind": "grow", "parent": "tiny"}, "models.small.init.parent 'tiny': there is no"),
        ("models.small.init", {"kind": "grow", "parent": "scaled"}, "is grown from itself"),
        ("models.small.train", {"batch_size": 4}, "models.small.train: batch_size cannot be set for one model"),
        ("models.small.train", {"lr": 5}, "models.small.train.lr 5: must be at most 1"),
        ("models.scaled.family", "gpt2", "models.scaled.family 'gpt2': must be its parent's, 'llama'"),
        ("models.scaled.tie_embeddings", False, "models.scaled.tie_embeddings False: must be its parent's, True"),
        ("models.scaled.shape.d_model", 32, "models.scaled.shape.d_model 32: is smaller than the parent's 64"),
        ("models.Small", {"shape": SHAPE}, "models.Small 'Small': a model's name has small letters"),
        ("models.x/y", {"shape": SHAPE}, "models.x/y 'x/y': a model's name has small letters"),
        ("models.base", {"init": {"kind": "checkpoint", "path": "gpt2"}}, "data.tokenizer.kind 'bpe': base is read"),
        ("models", {}, "models: "),
        ("name", "", "name '': must not be empty"),
        ("data.tokenizer", {"kind": "bpe", "d_vocab": 100}, "data.tokenizer.d_vocab 100: must be at least 260"),
        ("data.test_fraction", 0.9, "data.test_fraction 0.9: must be less than 0.5"),
    ],
)  # fmt: skip
def test_a_bad_spec_is_refused_with_field_value_and_what_would_be_right(path: str, value: Any, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(with_value(path, value))
    assert any(expected in str(problem) for problem in caught.value.problems), str(caught.value)


def test_every_problem_of_a_spec_is_told_at_once() -> None:
    held = with_value("train.lr", 7)
    held["train"]["batch_size"] = 0
    held["data"] = {"source": ""}
    with pytest.raises(SpecError) as caught:
        parse_spec(held)
    assert {problem.field for problem in caught.value.problems} == {"train.lr", "train.batch_size", "data.source"}


def test_parents_come_before_their_children_in_the_order_of_training() -> None:
    held = copy.deepcopy(STANDARD)
    held["models"] = {
        "third": {"shape": SHAPE | {"n_layers": 8}, "init": {"kind": "grow", "parent": "second"}},
        "second": {"shape": SHAPE | {"n_layers": 4}, "init": {"kind": "grow", "parent": "first"}},
        "alone": {"shape": SHAPE},
        "first": {"shape": SHAPE},
    }
    spec = parse_spec(held)
    assert spec.order() == ["alone", "first", "second", "third"]
    assert spec.ancestors("third") == ["second", "first"]
    assert parse_spec(STANDARD).order() == ["large", "small", "scaled"]


def test_a_model_may_set_its_own_training_but_not_what_makes_batches() -> None:
    spec = parse_spec(with_value("models.scaled.train", {"lr": 0.5, "max_steps": 50, "seed": 3}))
    assert (spec.train_of("scaled").lr, spec.train_of("scaled").max_steps) == (0.5, 50)
    assert spec.train_of("small") == spec.train == TrainSpec()
    assert {"n_ctx", "batch_size"}.isdisjoint(OVERRIDABLE)


@given(
    lr=st.floats(1e-12, 1),
    steps=st.integers(40, 10**6),
    width=st.sampled_from(["random_pad", "duplicate"]),
    depth=st.sampled_from(["append_random", "stack", "interleave", "solar", "midas", "identity"]),
    name=st.text(min_size=1, max_size=120),
)
def test_a_spec_goes_through_json_unchanged(lr: float, steps: int, width: str, depth: str, name: str) -> None:
    held = with_value("train", {"lr": lr, "max_steps": steps})
    held["name"] = name
    held["models"]["scaled"]["init"] |= {"width": width, "depth": depth}
    spec = parse_spec(held)
    assert parse_spec(spec.to_json()) == spec
    assert parse_spec(json.loads(spec.to_json())) == spec
    assert (spec.train.lr, spec.train.max_steps, spec.name) == (lr, steps, name)


def test_text_that_is_no_json_is_refused(tmp_path: Any) -> None:
    (tmp_path / "spec.json").write_text("{'name': ")
    with pytest.raises(SpecError, match="JSON"):
        load_spec(tmp_path / "spec.json")


@pytest.mark.parametrize(
    ("source", "kind"),
    [("python-stdlib", "built-in"), ("/a/b", "local"), ("./a", "local"), ("~/a", "local"), ("wikitext", "hub")],
)
def test_a_source_is_told_by_its_spelling(source: str, kind: str) -> None:
    assert parse_spec(with_value("data.source", source)).data.kind == kind


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ladder": [RUNG | {"shape": SHAPE | {"d_mlp": 64}}]}, "init.ladder.0.shape.d_mlp 64: is smaller than"),
        ({"ladder": [RUNG, RUNG | {"shape": SHAPE | {"n_layers": 1}}]}, "init.ladder.1.shape.n_layers 1: is smaller"),
        ({"ladder": [RUNG | {"shape": SHAPE | {"n_heads": 16}}]}, "shape.n_heads 4: is smaller than the parent's 16"),
        ({"ladder": [RUNG | {"shape": SHAPE | {"d_head": 31}}]}, "init.ladder.0.shape.d_head 31: is smaller"),
        ({"ladder": [RUNG, RUNG | {"steps": 390}]}, "init.ladder.1.steps 390: the growth after it would be after 400"),
        ({"ladder": [RUNG | {"steps": 0}]}, "init.ladder.0.steps 0: must be at least 1"),
        ({"d_vocab": 300}, "init.d_vocab 300: is less than the parent's 4096"),
        ({"n_positions": 128}, "init.n_positions 128: is less than the parent's 256"),
    ],
)
def test_a_growth_that_cannot_be_names_its_field(fields: dict[str, Any], expected: str) -> None:
    held = copy.deepcopy(STANDARD)
    held["models"]["scaled"]["init"] |= fields
    with pytest.raises(SpecError) as caught:
        parse_spec(held)
    assert str(caught.value).startswith(f"models.scaled.{expected}")


def test_a_ladder_grows_at_steps_so_epochs_alone_do_not_do() -> None:
    held = copy.deepcopy(STANDARD)
    held["models"]["scaled"]["init"] |= {"ladder": [RUNG]}
    held["train"] = {"max_steps": None, "num_epochs": 2}
    with pytest.raises(SpecError, match=r"^train\.max_steps: is needed, since scaled has a ladder"):
        parse_spec(held)
    held["models"]["scaled"]["train"] = {"max_steps": 11, "warmup_steps": 0}
    assert parse_spec(held).models["scaled"].shape is not None


@pytest.mark.parametrize("trained", [True, False])
def test_moments_are_grown_only_from_a_parent_that_has_some(trained: bool) -> None:
    held = copy.deepcopy(STANDARD)
    held["data"] = {"tokenizer": {"kind": "pretrained", "name": "./base"}}
    held["models"]["small"] = {"init": {"kind": "checkpoint", "path": "./base"}, "train": {} if trained else NO_STEPS}
    held["models"]["scaled"]["init"]["optimizer"] = "grown"
    if trained:
        assert parse_spec(held)
        return
    with pytest.raises(
        SpecError, match=r"models\.scaled\.init\.optimizer 'grown': small is read from a checkpoint and"
    ):
        parse_spec(held)
