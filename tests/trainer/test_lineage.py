"""What a lineage says of each tensor is what the tensor turns out to be made of."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, grow
from trainer.growth import GrowthPlan, plan
from trainer.growth.lineage import Lineage, Run, TensorLineage, lineage, runs
from trainer.growth.maps import NEW
from trainer.growth.tensors import fresh, grown
from trainer.growth.width import WIDTH_RULES

#: A larger shape of each family: some whole ratios, some not.
LARGER = {
    "gpt2": {"d_model": 20, "n_heads": 5, "d_mlp": 31},
    "gpt_neox": {"d_model": 48, "n_heads": 6, "d_mlp": 31},
    "llama": {"d_model": 24, "n_heads": 12, "n_kv_heads": 2, "d_head": 6, "d_mlp": 31},
    "qwen3": {"d_model": 24, "n_heads": 12, "n_kv_heads": 4, "d_head": 8, "d_mlp": 31},
}


def planned(family: str, n_layers: int = 4, *, tied: bool = False, **settings: Any) -> GrowthPlan:
    return plan(
        family,
        PARENT[family],
        child(family, n_layers=n_layers, **LARGER[family]),
        grow(**settings),
        n_positions=N_POSITIONS,
        d_vocab=D_VOCAB,
        tied=tied,
    )


def made(plan: GrowthPlan, seed: int) -> dict[str, NDArray[np.float64]]:
    """Every tensor of the child, of a parent in which no number is zero or one."""
    rng = np.random.default_rng(7)
    parent = {origin.old.name: origin.old for origin in plan.parameters() if origin.old}
    parent |= {origin.following.name: origin.following for origin in plan.parameters() if origin.following}
    weights: dict[str, Any] = {name: rng.normal(0.3, 1.0, old.shape) for name, old in parent.items()}
    found = {}
    for origin in plan.parameters():
        rng = np.random.default_rng([seed, len(found)])
        if origin.old is None:
            blocks = fresh(origin.new, plan.init.init_range, rng)
        else:
            above = weights[origin.following.name] if origin.following else None
            blocks = grown(weights[origin.old.name], origin, plan, rng, above)
        found[origin.new.name] = np.concatenate(list(blocks))
    return found


def of_each_tensor(told: Lineage) -> dict[str, TensorLineage]:
    found = {}
    for tensor in told.tensors:
        for first, last in tensor.blocks or ((0, 0),):
            found |= {tensor.name.replace("*", str(layer)): tensor for layer in range(first, last + 1)}
    return found


@pytest.mark.parametrize("depth", ["identity", "append_random"])
@pytest.mark.parametrize("width", WIDTH_RULES)
@pytest.mark.parametrize("family", LARGER)
def test_each_tensor_is_made_of_what_its_lineage_says(family: str, width: str, depth: str) -> None:
    plan = planned(family, width=width, depth=depth, snr_db=None, d_vocab=D_VOCAB + 4)
    told = of_each_tensor(lineage(plan))
    once, again = made(plan, seed=1), made(plan, seed=2)

    assert told.keys() == once.keys()
    for name, tensor in told.items():
        assert sum(tensor.shares.values()) == pytest.approx(1)
        of = {kind: tensor.shares.get(kind, 0.0) for kind in ("zero", "silent", "one", "random")}
        assert np.mean(once[name] == 0) == pytest.approx(of["zero"] + of["silent"]), name
        assert np.mean(once[name] == 1) == pytest.approx(of["one"]), name
        assert np.mean(once[name] != again[name]) == pytest.approx(of["random"]), name


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_noise_is_where_a_lineage_says(family: str) -> None:
    plan = planned(family, snr_db=10.0)
    once, again = made(plan, seed=1), made(plan, seed=2)

    for name, tensor in of_each_tensor(lineage(plan)).items():
        drawn = tensor.shares.get("random", 0.0)
        assert np.mean(once[name] != again[name]) == pytest.approx(drawn + tensor.noise), name
    assert lineage(plan).snr_db == 10.0


def test_copies_from_the_block_above_are_counted() -> None:
    plan, plain = planned("llama", width="aki", snr_db=None), planned("llama", width="duplicate", snr_db=None)
    above, own = made(plan, seed=1), made(plain, seed=1)

    for name, tensor in of_each_tensor(lineage(plan)).items():
        if "layers.0." in name:  # of which there is a block above
            assert np.mean(above[name] != own[name]) == pytest.approx(tensor.above), name


def test_a_mean_of_all_channels_is_told_of() -> None:
    told = of_each_tensor(lineage(planned("gpt2", snr_db=None)))

    assert told["transformer.h.0.mlp.c_proj.bias"].shares == {"copied": 12 / 20, "averaged": 8 / 20}
    assert told["transformer.wte.weight"].shares == {"copied": 12 / 20, "averaged": 8 / 20}


def test_a_block_is_told_of_by_what_it_does() -> None:
    def kinds(depth: str) -> list[tuple[str, int | None]]:
        return [(block.kind, block.source) for block in lineage(planned("llama", 3, depth=depth)).blocks]

    assert kinds("identity") == [("copied", 0), ("silent", 0), ("copied", 1)]
    assert kinds("stack") == [("copied", 0), ("copied", 1), ("repeated", 1)]
    assert kinds("append_random") == [("copied", 0), ("copied", 1), ("random", None)]


def expanded(found: list[Run]) -> list[int]:
    indices: list[int] = []
    for run in found:
        if run.source is None:
            indices += [NEW] * run.count
        else:
            for i in range(run.count):
                indices += [run.source + i] * run.each + [NEW] * run.gap
    return indices


@given(st.lists(st.integers(NEW, 3), max_size=12))
def test_runs_tell_every_index(sources: list[int]) -> None:
    found = list(runs(sources))

    assert expanded(found) == sources
    assert sum(run.length for run in found) == len(sources)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (range(5), 1),
        ([*range(5)] * 3, 3),
        ([0, 0, 1, 1, 2, 2], 1),
        ([0, NEW, 1, NEW, 2, NEW], 1),
        ([0, 1, 2, NEW, NEW, NEW], 2),
    ],
)
def test_what_rules_make_takes_few_runs(sources: list[int], expected: int) -> None:
    assert len(list(runs(sources))) == expected


def test_a_hundred_blocks_take_little_room_and_come_back_from_json() -> None:
    told = lineage(planned("llama", 100, width="net2net", depth="stack"))
    text = json.dumps(told.plain())

    assert len(text) < 16_000
    assert Lineage.model_validate_json(text) == told
    assert told.entries == sum(origin.new.size for origin in planned("llama", 100).parameters())
    assert sum(told.shares.values()) == pytest.approx(1)
