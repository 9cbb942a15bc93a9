"""GPT-NeoX: what no other family has. Its table, growths and certificates are tested with all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, grow, logits, save
from tests.trainer.texts import events, experiment
from trainer.budget import sheet
from trainer.families import get_family, read_config
from trainer.families.gpt_neox import rotated_share
from trainer.families.rope import share_of
from trainer.growth import plan
from trainer.growth.apply import certificate, grow_checkpoint, named_weights, open_source
from trainer.growth.certificate import tolerance
from trainer.growth.depth import Block
from trainer.growth.exactness import broken
from trainer.growth.maps import place
from trainer.growth.width import WIDTH_RULES
from trainer.run import run
from trainer.shape import Shape

PICO = PARENT["gpt_neox"]
#: Every axis, d_head by a ratio that is not whole.
LARGER = child("gpt_neox", d_model=72, n_heads=6, d_head=12, d_mlp=60, n_layers=3)


def grown(source: Path, out: Path, to: Shape = LARGER) -> Any:
    opened = open_source(source)
    shape, n_positions, d_vocab, tied = opened.described
    made = plan("gpt_neox", shape, to, grow(), n_positions=n_positions, d_vocab=d_vocab, tied=tied)
    grow_checkpoint(source, out, made, seed=0)
    return made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "one after the other"])
@pytest.mark.parametrize("share", [0.25, 0.4, 1.0])
def test_the_function_is_kept_to_float64_rounding(share: float, parallel: bool, tied: bool, tmp_path: Path) -> None:
    """With d_head at 1.5 times, whatever share of it is rotated: a quarter, 3 of 8, all."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": share}
    settings = {"rope_parameters": rope, "use_parallel_residual": parallel}
    save(tmp_path / "parent", "gpt_neox", PICO, tied=tied, dtype="float64", **settings)
    made = grown(tmp_path / "parent", tmp_path / "child")

    before, after = (logits64(tmp_path / name) for name in ("parent", "child"))
    assert made.preserves
    assert before.std() > 1
    assert (before - after).abs().max() < 1e-11
    assert read_config(tmp_path / "child")["use_parallel_residual"] is parallel


def logits64(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    tokens = torch.randint(0, D_VOCAB, (2, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def test_a_wider_head_rotates_as_many_channels_as_it_did(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(tmp_path / "parent", "gpt_neox", PICO)
    grown(tmp_path / "parent", tmp_path / "child")
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("parent", "child"))

    assert new.gpt_neox.layers[0].attention.rotary_ndims == old.gpt_neox.layers[0].attention.rotary_ndims == 2
    assert new.gpt_neox.layers[0].attention.head_size == 12
    np.testing.assert_array_equal(new.gpt_neox.rotary_emb.inv_freq, old.gpt_neox.rotary_emb.inv_freq)


@given(rotated=st.integers(0, 512), more=st.integers(0, 2000))
def test_a_share_comes_to_the_channels_that_it_is_made_for(rotated: int, more: int) -> None:
    d_head = max(1, rotated + more)
    assert int(d_head * share_of(rotated, d_head)) == rotated


def test_the_old_spelling_of_the_share_is_read_and_written() -> None:
    family = get_family("gpt_neox")
    config = family.config(PICO, N_POSITIONS, D_VOCAB, tied=False) | {"rotary_pct": 0.5, "rope_parameters": None}
    wider = child("gpt_neox", d_model=48, d_head=16)

    assert rotated_share(config) == 0.5
    assert family.resized(config, wider)["rotary_pct"] == 0.25
    assert family.resized(config, child("gpt_neox", d_mlp=40))["rotary_pct"] == 0.5
    assert rotated_share(family.resized({**config, "rotary_pct": None} | {"rotary_pct": 0.25}, wider)) == 0.125


def test_rotated_channels_that_move_are_seen() -> None:
    family, to = get_family("gpt_neox"), child("gpt_neox", d_model=48, d_head=16)
    maps = WIDTH_RULES["duplicate"].maps(family, PICO, to)
    spread = [2 * i for i in range(8)]
    moved = {"q_dim": place(8, 16, spread, scale=2**0.5, new_write="random"), "k_dim": place(8, 16, spread)}

    assert broken(family, PICO, to, maps, [Block(0), Block(1)]) == []
    assert "move away from their frequencies" in broken(family, PICO, to, maps | moved, [Block(0), Block(1)])[0]


def test_each_head_keeps_its_queries_keys_and_values_together(tmp_path: Path) -> None:
    """Copies are whole heads: new head h copies old head h % 3, which a cut into thirds would tear apart."""
    source = save(tmp_path / "parent", "gpt_neox", PICO)
    opened = open_source(source)
    to = child("gpt_neox", d_model=48, n_heads=6)
    made = plan("gpt_neox", PICO, to, grow(snr_db=None), n_positions=N_POSITIONS, d_vocab=D_VOCAB, tied=True)
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    name = "gpt_neox.layers.1.attention.query_key_value.bias"
    old = named_weights(opened)[name][:].reshape(3, 3, 8)
    new = named_weights(open_source(tmp_path / "child"))[name][:].reshape(6, 3, 8)

    sources = [int(np.flatnonzero((old == head).all(axis=(1, 2)))[0]) for head in new]
    assert sorted(sources) == [0, 0, 1, 1, 2, 2]


def test_a_head_cut_as_if_it_were_not_interleaved_breaks_the_certificate(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = save(tmp_path / "parent", "gpt_neox", PICO, tied=False)
    made = grown(source, tmp_path / "child")
    file = tmp_path / "child/model.safetensors"
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensors = load_file(file)
    side_by_side = tensors[name].reshape(6, 3, 12, 72).transpose(1, 0, 2, 3).reshape(216, 72)
    save_file(tensors | {name: np.ascontiguousarray(side_by_side)}, file)
    residuals = certificate(named_weights(open_source(source)), named_weights(open_source(tmp_path / "child")), made)

    assert {n for n, r in residuals.items() if r > tolerance("F32", made)} == {name}


def test_an_old_checkpoints_masks_and_tables_are_left_behind(tmp_path: Path) -> None:
    """As the first Pythia files have them: masks of each block, half-precision -1e9, RoPE's inverse frequencies."""
    from safetensors.numpy import load_file, save_file

    source = save(tmp_path / "parent", "gpt_neox", PICO, tied=False)
    shutil.copytree(source, tmp_path / "old")
    extra = {}
    for i in range(2):
        attention = f"gpt_neox.layers.{i}.attention"
        extra[f"{attention}.bias"] = np.tril(np.ones((1, 1, N_POSITIONS, N_POSITIONS), np.float16))
        extra[f"{attention}.masked_bias"] = np.float32([-1e9])
        extra[f"{attention}.rotary_emb.inv_freq"] = np.float32([1.0])
    save_file(load_file(source / "model.safetensors") | extra, tmp_path / "old/model.safetensors")
    config = read_config(source)
    config["rotary_pct"] = config.pop("rope_parameters")["partial_rotary_factor"]
    (tmp_path / "old/config.json").write_text(json.dumps(config | {"rotary_emb_base": 10000}))
    grown(tmp_path / "old", tmp_path / "child")

    assert (logits(source) - logits(tmp_path / "child")).abs().max() < 2e-4
    assert not any("masked" in name or "inv_freq" in name for name in load_file(tmp_path / "child/model.safetensors"))


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_the_output_head_is_known_by_both_of_its_names(head: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = save(tmp_path / "parent", "gpt_neox", PICO, tied=False)
    before, tensors = logits(source), load_file(source / "model.safetensors")
    tensors[head] = tensors.pop("embed_out.weight")
    save_file(tensors, source / "model.safetensors")
    grown(source, tmp_path / "child")

    assert (before - logits(tmp_path / "child")).abs().max() < 2e-4


def test_an_experiment_of_a_gpt_neox_runs_and_its_growth_is_exact(text: Path, tmp_path: Path, cache: Path) -> None:
    spec = experiment(text, "gpt_neox")
    planned = sheet(spec)
    for name in spec.order():
        said = list(run(spec, name, tmp_path / "out" / name, cache=cache, threads=1))
        assert said[-1].kind == "finished"
        assert events(tmp_path / "out" / name, "prepared")[0]["parameters"] == planned[name].parameters
    [growth] = events(tmp_path / "out/scaled", "grown")
    assert growth["preserves"]
    assert growth["max_logit_difference"] < 1e-4
