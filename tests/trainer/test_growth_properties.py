"""Growths of random shapes by random rules, in every family: what the plan says, the proof finds, a forward pass sees.

KANGAROO_EXAMPLES=200 tries that many of each family, new ones each time; without it a few that are always the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.trainer.pico import D_VOCAB, LOSING_WIDTHS, N_POSITIONS, exact_logits, save
from trainer.families import FAMILIES, get_family
from trainer.growth import OPERATORS, GrowthPlan, plan
from trainer.growth.apply import certificate, grow_checkpoint, named_weights, open_source
from trainer.growth.certificate import tolerance
from trainer.growth.tensors import side_of
from trainer.shape import GrowInit, Shape

EXAMPLES = int(os.environ.get("KANGAROO_EXAMPLES", "0"))
SETTINGS: dict[str, Any] = {
    "max_examples": EXAMPLES or 5,
    "derandomize": not EXAMPLES,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}

#: Of logits in float64: where the function is lost, much of it is.
ROUNDING, LOST = 1e-10, 1e-4


class Growth(NamedTuple):
    family: str
    parent: Shape
    child: Shape
    init: GrowInit
    tied: bool

    def plan(self) -> GrowthPlan:
        family, parent, child, init, tied = self
        return plan(family, parent, child, init, n_positions=N_POSITIONS, d_vocab=D_VOCAB, tied=tied)


WIDTHS, DEPTHS = ([rule.key for rule in OPERATORS[half]] for half in ("width", "depth"))


@st.composite
def growths(draw: st.DrawFn, family: str, widths: list[str], depths: list[str]) -> Growth:
    """Any parent of two blocks, and any child that is not smaller, by one of these rules each."""
    square = get_family(family).square
    groups, members = draw(st.integers(1, 3)), 1 if square else draw(st.integers(1, 3))
    d_head = 8 if family == "gpt_neox" else 2 * draw(st.integers(1, 3))  # of which a NeoX rotates a quarter, in pairs
    d_mlp = draw(st.integers(3, 9))
    heads = groups * members
    new_groups, new_members = groups + draw(st.integers(0, 3)), members + (0 if square else draw(st.integers(0, 2)))
    new_heads, new_d_head = new_groups * new_members, d_head + 2 * draw(st.integers(0, 3))
    # Llama wants a multiple of its heads; the others take it.
    d_model, new_d_model = heads * d_head, new_heads * new_d_head
    if not square:
        d_model = heads * draw(st.integers(2, 4))
        new_d_model = new_heads * (-(-d_model // new_heads) + draw(st.integers(0, 3)))
    parent = {"d_model": d_model, "n_heads": heads, "d_head": d_head, "d_mlp": d_mlp, "n_layers": 2}
    child = {
        "d_model": new_d_model,
        "n_heads": new_heads,
        "d_head": new_d_head,
        "d_mlp": d_mlp + draw(st.integers(0, 10)),
        "n_layers": 2 + draw(st.integers(0, 2)),
    }
    if not square:
        parent["n_kv_heads"], child["n_kv_heads"] = groups, new_groups
    width = draw(st.sampled_from(widths))
    # What AKI takes from above may stay unread where each copy reads its own kind alone, and the plan claims nothing.
    splits = ["even", "uneven"] if width == "aki" else ["even", "uneven", "diagonal"]
    init = GrowInit(
        parent="small",
        width=width,
        depth=draw(st.sampled_from(depths)),
        split=draw(st.sampled_from(splits)),
        snr_db=draw(st.sampled_from([None, 0.0, 10.0])),
        init_range=0.3,
        d_vocab=D_VOCAB + draw(st.integers(0, 3)),
        n_positions=N_POSITIONS + draw(st.integers(0, 3)),
    )
    return Growth(family, Shape.model_validate(parent), Shape.model_validate(child), init, draw(st.booleans()))


def on_disk(growth: Growth, folder: Path) -> tuple[Path, Path]:
    """Parent and child, in float64."""
    parent = save(folder / "parent", growth.family, growth.parent, tied=growth.tied, dtype="float64")
    grow_checkpoint(parent, folder / "child", growth.plan(), seed=0, verify=False, threads=1)
    return parent, folder / "child"


def residuals(parent: Path, child: Path, made: GrowthPlan) -> dict[str, float]:
    return certificate(named_weights(open_source(parent)), named_weights(open_source(child)), made)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_parents_exactly_where_the_plan_preserves_and_the_proof_holds(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(**SETTINGS)
    @given(growth=growths(family, WIDTHS, ["identity"] * len(DEPTHS) + DEPTHS))  # the function is often kept
    def holds(growth: Growth) -> None:
        made = growth.plan()
        note(made.because)
        parent, child = on_disk(growth, tmp_path_factory.mktemp("growth"))
        difference = (exact_logits(parent) - exact_logits(child)[..., :D_VOCAB]).abs().max().item()

        assert difference < ROUNDING if made.preserves else difference > LOST
        if made.preserves:
            assert max(residuals(parent, child, made).values()) <= tolerance("F64", made)

    holds()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_wrong_entry_breaks_the_proof_of_its_tensor_alone(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(**SETTINGS)
    @given(growth=growths(family, sorted({*WIDTHS} - LOSING_WIDTHS), ["identity"]), data=st.data())
    def breaks(growth: Growth, data: st.DataObject) -> None:
        made = growth.plan()
        assume(made.preserves)  # OLMo 2, which norms all heads together, wants them copied alike
        parent, child = on_disk(growth, tmp_path_factory.mktemp("growth"))
        origin = data.draw(st.sampled_from(made.parameters()))
        sides = [side_of(made, origin.new.out, origin.new.interleaved)]
        if origin.new.into:
            sides.append(side_of(made, (origin.new.into,)))
        # What is new may hold anything, if what reads it hides it.
        at = tuple(data.draw(st.sampled_from(np.flatnonzero(~side.new).tolist())) for side in sides)
        at = at[::-1] if origin.new.in_first else at
        tensors = load_file(child / "model.safetensors")
        held = next(name for name in (origin.new.name, *get_family(family).also_named) if name in tensors)
        tensors[held][at] += 0.05
        save_file(tensors, child / "model.safetensors", {"format": "pt"})

        wrong = {name for name, found in residuals(parent, child, made).items() if found > tolerance("F64", made)}

        assert wrong == {origin.new.name}

    breaks()
