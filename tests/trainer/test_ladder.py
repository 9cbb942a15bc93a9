"""Models that grow on the way, and what training carries over a growth. Pico-sized, on real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.texts import LARGE, SMALL, events, experiment, last, losses
from trainer import budget, train
from trainer.events import Event
from trainer.families import read_config
from trainer.run import run
from trainer.shape import Shape
from trainer.spec import ExperimentSpec, parse_spec

MIDDLE = SMALL | {"d_mlp": 64, "n_layers": 2}


def laddered(text: Path, *, train: dict[str, Any] | None = None, **init: Any) -> ExperimentSpec:
    """small, and scaled that is grown from it by way of MIDDLE, which it has for four of its ten steps."""
    held = experiment(text, max_steps=10, **(train or {})).model_dump(mode="json")
    held["models"]["scaled"]["init"] |= {"ladder": [{"shape": MIDDLE, "steps": 4}], "optimizer": "grown"} | init
    del held["models"]["large"]
    return parse_spec(held)


@pytest.fixture
def go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Event]]:
    """Run one model, in this process, to its end, until so many steps are done, or until it says what it prepares."""
    monkeypatch.setattr(train, "FLUSH_SECONDS", 0.0)  # an event each step, as it is made

    def go(spec: ExperimentSpec, name: str, out: Path, until: int | str | None = None) -> list[Event]:
        done: list[Event] = []

        def stop() -> bool:
            if isinstance(until, str):
                return any(event.kind == "preparing" and event.what.startswith(until) for event in done)
            return any(event.kind == "train" and event.step == until for event in done)

        for event in run(spec, name, out / name, cache=cache, threads=1, resume=True, stop=stop):
            done.append(event)
        return done

    return go


def test_a_model_goes_up_its_ladder_and_each_step_costs_what_its_size_costs(
    text: Path, tmp_path: Path, go: Any
) -> None:
    spec = laddered(text)
    for name in spec.models:
        assert go(spec, name, tmp_path)[-1].kind == "finished"
    directory = tmp_path / "scaled"
    first, second = events(directory, "grown")
    assert (first["step"], first["parent"], second["step"], second["parent"]) == (0, "small", 4, "scaled")
    middle, large = (
        budget.parameters("llama", Shape.model_validate(shape), 32, 320, True).total for shape in (MIDDLE, LARGE)
    )
    assert (first["parameters"], second["parameters"], second["new_parameters"]) == (middle, large, large - middle)
    assert events(directory, "prepared")[0]["parameters"] == large
    assert not events(directory, "warning")
    assert (first["optimizer"], first["learned"], second["lineage"]["width"]) == ("grown", None, "duplicate")
    (embed,) = (row for row in second["symmetry"] if row["axis"] == "embed")
    assert (embed["width"], embed["least_width"], embed["effective_width"]) == (32, 16, 32)
    for grown in (first, second):
        assert grown["preserves"]
        assert grown["cross_entropy_after"] == pytest.approx(grown["cross_entropy_before"], abs=1e-5)

    each = 4 * 32  # tokens of a step
    small_step, large_step = (
        each * budget.flops_per_token("llama", Shape.model_validate(shape), 32, 320, True) for shape in (MIDDLE, LARGE)
    )
    flops = {e["step"]: e["flops"] for e in events(directory, "train")}
    assert flops == {step: min(step, 4) * small_step + max(0, step - 4) * large_step for step in range(1, 11)}
    assert {e["step"]: e["tokens"] for e in events(directory, "train")} == {s: s * each for s in range(1, 11)}
    planned = budget.sheet(spec)["scaled"]
    assert planned.flops == pytest.approx(last(directory)["flops"], rel=1e-12)
    assert planned.flops_per_token == events(directory, "prepared")[0]["flops_per_token"]
    assert [growth.child.d_mlp for growth in planned.growths] == [64, 64]
    rates = [e["lr"] for e in events(directory, "train")]
    assert rates == [train.learning_rate(step, spec.train, 10) for step in range(10)], "one schedule over the whole"


def test_a_ladder_that_is_stopped_before_at_and_after_a_growth_ends_as_one_that_is_not(
    text: Path, tmp_path: Path, go: Any
) -> None:
    spec = laddered(text, width="pad", depth="stack", lr_by_width=True)
    go(spec, "small", tmp_path / "parts")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "small").symlink_to(tmp_path / "parts" / "small")
    go(spec, "scaled", tmp_path / "whole")
    for until in (2, 4, 5, 6):
        stopped = go(spec, "scaled", tmp_path / "parts", until)[-1]
        assert (stopped.kind, stopped.step) == ("stopped", until)
    assert go(spec, "scaled", tmp_path / "parts")[-1].kind == "finished"
    parts, whole = tmp_path / "parts" / "scaled", tmp_path / "whole" / "scaled"
    assert [e["resumed_from"] for e in events(parts, "prepared")] == [None, 2, 4, 5, 6]
    assert losses(parts) == losses(whole)
    assert [e["step"] for e in events(parts, "grown")] == [0, 4], "stopped at 4 it had not grown yet"
    assert last(parts)["flops"] == last(whole)["flops"]
    a, b = ((out / "model" / "model.safetensors").read_bytes() for out in (parts, whole))
    assert a == b


def test_a_grown_model_goes_on_as_its_parent_would_if_rates_and_moments_are_grown_with_it(
    text: Path, tmp_path: Path, go: Any
) -> None:
    """The child of a ladder sees the batches that come next: the one comparison in which nothing but growth differs."""
    held = experiment(
        text, max_steps=30, schedule="constant", warmup_steps=0, grad_clip=None, lr=3e-3, eval_every=10
    ).model_dump(mode="json")
    wide = LARGE | {"n_layers": SMALL["n_layers"]}
    grow = {"kind": "grow", "parent": "small", "snr_db": None, "optimizer": "grown"}
    ladder = [{"shape": SMALL, "steps": 10}]
    held["models"] = {
        "small": {"shape": SMALL, "train": {"max_steps": 5}},
        "going_on": {"shape": SMALL, "init": grow},
        "by_width": {"shape": wide, "init": grow | {"ladder": ladder, "lr_by_width": True}},
        "one_rate": {"shape": wide, "init": grow | {"ladder": ladder}},
        "fresh": {"shape": wide, "init": grow | {"ladder": ladder, "lr_by_width": True, "optimizer": "fresh"}},
        "further": {"shape": SMALL, "init": grow | {"parent": "going_on"}, "train": {"max_steps": 5}},
        "wide_further": {
            "shape": wide, "init": grow | {"parent": "by_width", "lr_by_width": True}, "train": {"max_steps": 5},
        },
    }  # fmt: skip
    spec = parse_spec(held)
    found = {}
    for name in spec.models:
        go(spec, name, tmp_path)
        found[name] = {step: loss for (split, step), loss in losses(tmp_path / name).items() if split == "batch"}
    going_on = found["going_on"]
    assert len(going_on) == 30
    assert found["by_width"] == pytest.approx(going_on, rel=2e-5)
    assert found["wide_further"] == pytest.approx(found["further"], rel=2e-5), "rates are relative to the parent's own"
    # Alike for ever: with nothing to part them, copies get equal gradients.
    notes = {name: events(tmp_path / name, "warning") for name in found if not name.endswith("further")}
    assert {name for name, said in notes.items() if said} == {"by_width", "one_rate", "fresh"}
    assert len(notes["by_width"]) == 1
    assert "extra width learns nothing" in notes["by_width"][0]["message"]
    measured = {e["step"]: e["symmetry"] for e in events(tmp_path / "by_width", "eval") if e["split"] == "validation"}
    assert measured[0] == measured[10] == []
    assert {row["axis"]: row["effective_width"] for row in measured[30]}["embed"] == SMALL["d_model"]
    for other in ("one_rate", "fresh"):
        assert max(abs(found[other][step] - going_on[step]) for step in range(11, 31)) > 1e-2


def test_what_learning_the_maps_costs_is_its_models_and_the_tables_may_grow_too(
    text: Path, tmp_path: Path, go: Any
) -> None:
    held = laddered(text).model_dump(mode="json")
    held["models"]["scaled"]["init"] |= {"ladder": [], "learn_steps": 3, "d_vocab": 336, "n_positions": 48}
    spec = parse_spec(held)
    directory = tmp_path / "scaled"
    assert go(spec, "small", tmp_path)[-1].kind == "finished"
    stopped = go(spec, "scaled", tmp_path, "learning the maps")[-1]
    assert (stopped.kind, stopped.checkpoint, list(directory.glob(".grown*"))) == ("stopped", None, [])
    assert go(spec, "scaled", tmp_path)[-1].kind == "finished"
    (grown,) = events(directory, "grown")
    learned, tokens = grown["learned"], 4 * 32
    assert (learned["steps"], learned["tokens"], grown["preserves"]) == (3, 3 * tokens, False)
    assert learned["loss_after"] != learned["loss_before"]

    large = Shape.model_validate(LARGE)
    per_token = budget.flops_per_token("llama", large, 32, 336, True)
    first, *_, final = (e for e in events(directory, "eval") if e["split"] == "validation")
    assert (first["step"], first["tokens"], first["flops"]) == (0, 0, learned["flops"])
    assert first["train_seconds"] == learned["seconds"]
    assert final["flops"] == learned["flops"] + 10 * tokens * per_token
    assert last(directory)["peak_memory_bytes"] >= learned["peak_memory_bytes"]

    prepared, planned = events(directory, "prepared")[0], budget.sheet(spec)["scaled"]
    size = budget.parameters("llama", large, 48, 336, True).total
    assert (prepared["d_vocab"], prepared["parameters"], planned.parameters) == (336, size, size)
    assert planned.flops == pytest.approx(final["flops"], rel=1e-12)
    bare = budget.sheet(parse_spec(held | {"models": held["models"] | {"scaled": unlearned(held)}}))["scaled"]
    assert bare.memory_bytes is not None
    assert planned.memory_bytes is not None
    assert planned.memory_bytes > bare.memory_bytes
    assert read_config(directory / "model")["max_position_embeddings"] == 48


def unlearned(held: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = held["models"]["scaled"]
    return model | {"init": model["init"] | {"learn_steps": 0}}
