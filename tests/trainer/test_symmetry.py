"""Copies that part and copies that do not, on pico models that are really trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, grow, save
from trainer.growth import GrowthPlan, plan
from trainer.growth.apply import grow_checkpoint
from trainer.symmetry import Measure, Symmetry, warning, whole_axes

#: Every width twice, one block more.
LARGER = {"d_model": 2, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 2}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parents")
    return {family: save(folder / family, family, PARENT[family]) for family in ("gpt2", "gpt_neox", "llama")}


def grown(parent: Path, family: str, out: Path, **settings: Any) -> tuple[Any, GrowthPlan]:
    from transformers import AutoModelForCausalLM

    small = PARENT[family]
    sizes = {field: getattr(small, field) * n for field, n in LARGER.items() if getattr(small, field) is not None}
    made = plan(
        family,
        small,
        child(family, n_layers=3, **sizes),
        grow(**settings),
        n_positions=N_POSITIONS,
        d_vocab=D_VOCAB,
        tied=True,
    )
    grow_checkpoint(parent, out / "child", made, seed=0)
    return AutoModelForCausalLM.from_pretrained(out / "child", dtype=torch.float32), made


def train(model: Any, steps: int = 3) -> None:
    tokens = torch.randint(0, D_VOCAB, (4, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def widths(rows: list[Measure]) -> dict[str, tuple[int, int]]:
    return {row["axis"]: (row["effective_width"], row["width"]) for row in whole_axes(rows)}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_equal_copies_stay_the_parents_width_however_long_they_train(
    family: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    model, made = grown(parents[family], family, tmp_path, snr_db=None)
    symmetry, small = Symmetry(model, made), PARENT[family]

    train(model)
    rows = symmetry.measure()

    assert widths(rows) == {
        "embed": (small.d_model, 2 * small.d_model),
        "mlp": (3 * small.d_mlp, 6 * small.d_mlp),
        "q_head": (3 * small.n_heads, 6 * small.n_heads),
        "kv_head": (3 * small.kv_heads, 6 * small.kv_heads),
    }
    assert all(row["distance"] < 1e-5 for row in rows)
    assert [row["layer"] for row in rows if row["axis"] == "mlp"] == [0, 1, 2, None]
    assert "embed" in (warning(rows) or "")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_noise_as_large_as_the_weights_parts_all_copies_before_the_first_step(
    family: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    model, made = grown(parents[family], family, tmp_path, snr_db=0.0)

    rows = Symmetry(model, made).measure()

    assert {row["axis"] for row in rows} == {"embed", "mlp", "q_head", "kv_head"}
    assert all(row["effective_width"] == row["width"] for row in rows), rows  # silent blocks too
    assert all(row["distance"] > 0.1 for row in rows)
    assert warning(rows) is None


@pytest.mark.parametrize("split", ["diagonal", "uneven"])
def test_copies_that_are_wired_apart_but_act_alike_are_not_taken_for_different_ones(
    split: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    """Side by side, two copies of the parent share no weight and no gradient tells them apart; uneven shares do."""
    model, made = grown(parents["llama"], "llama", tmp_path, snr_db=None, split=split)

    train(model)
    rows = whole_axes(Symmetry(model, made).measure())

    field = "least_width" if split == "diagonal" else "width"
    assert [row["effective_width"] for row in rows] == [row[field] for row in rows]


def test_effective_width_counts_the_copies_that_have_parted(parents: dict[str, Path], tmp_path: Path) -> None:
    model, made = grown(parents["llama"], "llama", tmp_path, snr_db=None, depth="stack")
    small = PARENT["llama"].d_mlp
    with torch.no_grad():  # of the copies of the first five units one turns round
        model.model.layers[1].mlp.up_proj.weight[small : small + 5] *= -1

    in_block = {row["layer"]: row for row in Symmetry(model, made).measure() if row["axis"] == "mlp"}

    assert in_block[1]["effective_width"] == small + 5
    assert in_block[0]["effective_width"] == in_block[2]["effective_width"] == in_block[0]["least_width"] == small
    assert in_block[None]["effective_width"] == 3 * small + 5
    assert in_block[1]["least_distance"] == 0
    assert in_block[1]["distance"] > 0.1


def test_a_copy_of_a_copy_is_a_copy(parents: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, first = grown(parents["llama"], "llama", tmp_path, snr_db=None)
    larger = first.child.model_copy(update={"d_model": 48, "d_mlp": 80})
    sizes: Any = {"n_positions": N_POSITIONS, "d_vocab": D_VOCAB, "tied": True}
    second = plan("llama", first.child, larger, grow(snr_db=None), **sizes)
    grow_checkpoint(tmp_path / "child", tmp_path / "grandchild", second, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grandchild", dtype=torch.float32)

    rows = whole_axes(Symmetry(model, second, [first]).measure())

    small = PARENT["llama"]
    assert {row["axis"]: (row["least_width"], row["effective_width"], row["width"]) for row in rows} == {
        "embed": (small.d_model, small.d_model, 48),
        "mlp": (3 * small.d_mlp, 3 * small.d_mlp, 3 * 80),
        "q_head": (3 * small.n_heads, 3 * small.n_heads, 6 * small.n_heads),  # of the first growth alone
        "kv_head": (3 * small.kv_heads, 3 * small.kv_heads, 6 * small.kv_heads),
    }


def test_a_sample_of_a_wide_axis_says_what_the_whole_does(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = grown(parents["gpt2"], "gpt2", tmp_path, snr_db=20.0, width="duplicate")
    whole = widths(Symmetry(model, made).measure())
    monkeypatch.setattr("trainer.symmetry.MOST_SOURCES", 2)
    monkeypatch.setattr("trainer.symmetry.MOST_ENTRIES", 64)

    assert widths(Symmetry(model, made).measure()) == whole
