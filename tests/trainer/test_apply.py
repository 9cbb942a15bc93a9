"""Plans into weights: from disk to disk, and read back by transformers with no code of ours."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.pico import (
    D_VOCAB,
    KEEPING_DEPTHS,
    LIKE_LLAMA,
    N_POSITIONS,
    PARENT,
    child,
    exact_logits,
    grow,
    logits,
    save,
)
from trainer.families import FAMILIES, Parameter, axis_sizes, get_family, read_config
from trainer.growth import GrowthError, GrowthPlan, plan
from trainer.growth import apply as apply_module
from trainer.growth.apply import certificate, grow_checkpoint, named_weights, open_source
from trainer.growth.certificate import tolerance
from trainer.growth.depth import DEPTH_RULES
from trainer.growth.weights import EPSILON, SourceError, Weights, narrow, widen
from trainer.growth.width import WIDTH_RULES
from trainer.shape import GrowInit, Shape

#: Of logits whose spread is 2 to 6. An inexact growth is off by 0.1 and more.
ROUNDING = 2e-4


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """A checkpoint of every family, tied and not."""
    folder = tmp_path_factory.mktemp("parents")
    return {
        (family, tied): save(folder / f"{family}-{tied}", family, PARENT[family], tied=tied)
        for family in FAMILIES
        for tied in (True, False)
    }


def plan_for(source: Path, to: Shape, init: GrowInit) -> GrowthPlan:
    opened = open_source(source)
    shape, n_positions, d_vocab, tied = opened.described
    return plan(opened.family.name, shape, to, init, n_positions=n_positions, d_vocab=d_vocab, tied=tied)


def weights(folder: Path) -> dict[str, Any]:
    return {name: tensor[:] for name, tensor in named_weights(open_source(folder)).items()}


GROWTHS: dict[str, dict[str, dict[str, Any]]] = {
    "width x2": {
        "gpt2": {"d_model": 24, "n_heads": 6, "d_mlp": 40},
        "gpt_neox": {"d_model": 48, "n_heads": 6, "d_mlp": 40},
        "llama": {"d_model": 24, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 40},
    },
    "width x3": {
        "gpt2": {"d_model": 36, "n_heads": 9, "d_mlp": 60},
        "gpt_neox": {"d_model": 72, "n_heads": 9, "d_mlp": 60},
        "llama": {"d_model": 36, "n_heads": 18, "n_kv_heads": 6, "d_mlp": 60},
    },
    "depth x2": {"gpt2": {"n_layers": 4}, "gpt_neox": {"n_layers": 4}, "llama": {"n_layers": 4}},
    "depth 2 to 3": {"gpt2": {"n_layers": 3}, "gpt_neox": {"n_layers": 3}, "llama": {"n_layers": 3}},
    "width and depth": {
        "gpt2": {"d_model": 24, "n_heads": 6, "d_mlp": 60, "n_layers": 5},
        "gpt_neox": {"d_model": 48, "n_heads": 6, "d_mlp": 60, "n_layers": 5},
        "llama": {"d_model": 36, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 40, "n_layers": 5},
    },
    "mlp alone": {"gpt2": {"d_mlp": 40}, "gpt_neox": {"d_mlp": 40}, "llama": {"d_mlp": 60}},
    "heads within their groups": {"llama": {"n_heads": 12}},
    "heads and groups at different ratios": {"llama": {"n_heads": 12, "n_kv_heads": 6}},
    "grouped heads to full": {"llama": {"n_kv_heads": None}},
    "residual stream alone": {"llama": {"d_model": 24}},
    "head width": {
        "gpt2": {"d_model": 24, "d_head": 8},
        "gpt_neox": {"d_model": 48, "d_head": 16},
        "llama": {"d_head": 12},
    },
    "no whole ratio": {
        "gpt2": {"d_model": 28, "n_heads": 4, "d_head": 7, "d_mlp": 33, "n_layers": 3},
        "gpt_neox": {"d_model": 40, "n_heads": 4, "d_head": 10, "d_mlp": 33, "n_layers": 3},
        "llama": {"d_model": 18, "d_head": 6, "d_mlp": 33, "n_layers": 3},
    },
    "heads at no whole ratio": {
        "gpt2": {"d_model": 16, "n_heads": 4},
        "gpt_neox": {"d_model": 40, "n_heads": 5},
        "llama": {"d_model": 15, "n_heads": 15, "n_kv_heads": 5},
    },
    "head width and all else": {
        "gpt2": {"d_model": 36, "n_heads": 6, "d_head": 6, "d_mlp": 40, "n_layers": 4},
        "gpt_neox": {"d_model": 72, "n_heads": 6, "d_head": 12, "d_mlp": 40, "n_layers": 4},
        "llama": {"d_model": 24, "n_heads": 12, "n_kv_heads": 4, "d_head": 8, "d_mlp": 40, "n_layers": 4},
    },
}
for each in GROWTHS.values():
    each |= dict.fromkeys(LIKE_LLAMA, each["llama"])
#: Llama's kin differ from it in what stands on the axes, not in the axes: of them, what grows everything.
EVERYTHING = ("width and depth", "head width and all else", "no whole ratio")
CASES = [
    pytest.param(f, to, id=f"{f}-{what}")
    for what, each in GROWTHS.items()
    for f, to in each.items()
    if f not in LIKE_LLAMA or what in EVERYTHING
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["equal", "noisy"])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_preserving_growth_gives_the_parents_logits_from_disk(
    family: str, changes: dict[str, int], noise: float, tied: bool, parents: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source, to = parents[family, tied], child(family, **changes)
    made = plan_for(source, to, grow(noise=noise))
    report = grow_checkpoint(source, tmp_path / "child", made, seed=0)

    before, after = logits(source), logits(tmp_path / "child")
    assert before.std() > 1, "a test that could fail"
    assert (before - after).abs().max() < ROUNDING

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert model.num_parameters() == report["parameters"]
    assert get_family(family).shape_of(model.config.to_dict()) == (to, N_POSITIONS, D_VOCAB, tied)
    assert report["preserves"]
    assert report["residual"] < 1e-6


#: Every width rule of every family, and every depth rule of those whose tables are not Llama's: the halves of an
#: operator are independent, but for one pair that is random in both.
RULES = [
    *((family, width, "identity") for family in FAMILIES for width in WIDTH_RULES),
    *((f, "duplicate", depth) for f in FAMILIES if f not in LIKE_LLAMA for depth in DEPTH_RULES if depth != "identity"),
    *((family, "random_pad", "append_random") for family in FAMILIES if family not in LIKE_LLAMA),
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "width", "depth"), RULES)
def test_a_plan_preserves_exactly_where_a_forward_pass_in_float64_does(
    family: str, width: str, depth: str, tied: bool, tmp_path: Path
) -> None:
    source = save(tmp_path / "parent", family, PARENT[family], tied=tied, dtype="float64")
    before, seen = exact_logits(source), set()
    everything = GROWTHS["head width and all else"][family]
    for fields in (everything.keys(), {"n_layers"}, {"n_layers", "d_mlp"}, {"n_layers", "n_heads"}, {"d_head"}):
        to = child(family, **{field: everything[field] for field in fields})
        if get_family(family).problems(to):
            continue
        made = plan_for(source, to, grow(width, depth))
        out = tmp_path / "-".join(fields)
        grow_checkpoint(source, out, made, seed=0)
        difference = (before - exact_logits(out)).abs().max()
        assert difference < 1e-9 if made.preserves else difference > 1e-4, (fields, made.because)
        seen.add(made.preserves)
    # Without depth alone, d_head alone remains, where the architecture has it.
    assert (True in seen) == (depth in KEEPING_DEPTHS or (width != "random_pad" and not get_family(family).square))


@pytest.mark.parametrize("depth", sorted(set(DEPTH_RULES) - KEEPING_DEPTHS))
@pytest.mark.parametrize("family", FAMILIES)
def test_other_depth_rules_change_the_function_as_their_plan_says(
    family: str, depth: str, parents: Any, tmp_path: Path
) -> None:
    source = parents[family, True]
    made = plan_for(source, child(family, n_layers=4), grow(depth=depth))
    report = grow_checkpoint(source, tmp_path / "child", made, seed=0)

    difference = (logits(source) - logits(tmp_path / "child")).abs().max()
    assert difference > 1000 * ROUNDING if depth != "append_random" else difference > ROUNDING
    assert not made.preserves
    assert report["residual"] is None


@pytest.mark.parametrize("depth", ["stack", "interleave", "solar", "midas", "identity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copied_blocks_are_copies_and_no_tensor_is_shared(
    family: str, depth: str, parents: Any, tmp_path: Path
) -> None:
    source = parents[family, True]
    made = plan_for(source, child(family, n_layers=4), grow(depth=depth))
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    old, new = weights(source), weights(tmp_path / "child")

    for parameter, origin, block, _ in made.parameters():
        assert origin is not None
        silent = block.silent and parameter.writes_residual
        expected = np.full_like(old[origin.name], parameter.silent) if silent else old[origin.name]
        np.testing.assert_array_equal(new[parameter.name], expected)


def segments(parameter: Parameter, shape: Shape) -> list[tuple[slice, ...]]:
    """Where the matrices lie that are fused in a stored tensor, side by side."""
    sizes = axis_sizes(shape, N_POSITIONS, D_VOCAB)
    if len(parameter.out) == 1 or parameter.interleaved:
        return [tuple(slice(0, size) for size in parameter.shape)]
    ends = np.cumsum([0, *(prod(sizes[axis] for axis in axes) for axes in parameter.out)])
    parts = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    into = slice(0, parameter.shape[0 if parameter.in_first else -1])
    if not parameter.into:
        return [(part,) for part in parts]
    return [(into, part) if parameter.in_first else (part, into) for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_pad_puts_the_old_block_in_the_corner_and_draws_the_rest(
    family: str, parents: Any, tmp_path: Path
) -> None:
    source = parents[family, False]
    many = {} if PARENT[family].n_kv_heads is None else {"n_kv_heads": 10}
    to = child(family, d_model=30 * PARENT[family].d_head, n_heads=30, d_mlp=140, **many)
    made = plan_for(source, to, grow("random_pad", "append_random", init_range=0.05))
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    old, new = weights(source), weights(tmp_path / "child")

    held = {p.name: p for p in get_family(family).parameters(PARENT[family], N_POSITIONS, D_VOCAB, False)}
    drawn = []
    for parameter in get_family(family).parameters(to, N_POSITIONS, D_VOCAB, False):
        before, after = old[parameter.name], new[parameter.name]
        if parameter.into == ("vocab",) and made.table_scale != 1:  # so that sqrt(d_model) times it is what it was
            before = (before * made.table_scale).astype(np.float32)
        rest = np.ones(after.shape, bool)
        for old_part, part in zip(segments(held[parameter.name], PARENT[family]), segments(parameter, to), strict=True):
            corner = tuple(slice(s.start, s.start + o.stop - o.start) for o, s in zip(old_part, part, strict=True))
            np.testing.assert_array_equal(after[corner], before[old_part], err_msg=parameter.name)
            rest[corner] = False
        if parameter.kind == "matrix":
            drawn.append(after[rest])
            assert abs(drawn[-1].std() / 0.05 - 1) < 0.06, parameter.name
        else:
            assert set(after[rest].tolist()) <= {float(parameter.fresh == "ones")}
    everything = np.concatenate(drawn)
    assert abs(everything.std() / 0.05 - 1) < 0.01
    assert abs(everything.mean()) < 0.001


@pytest.mark.parametrize("family", FAMILIES)
def test_appended_blocks_are_fresh(family: str, parents: Any, tmp_path: Path) -> None:
    made = plan_for(parents[family, True], child(family, n_layers=4), grow(depth="append_random", init_range=0.03))
    grow_checkpoint(parents[family, True], tmp_path / "child", made, seed=0)
    new = weights(tmp_path / "child")

    fresh = [(p, new[p.name]) for p, old, *_ in made.parameters() if old is None]
    assert {p.layer for p, _ in fresh} == {2, 3}
    for parameter, values in fresh:
        if parameter.kind == "matrix":
            assert abs(values.std() / 0.03 - 1) < 0.25
        else:
            assert set(values.tolist()) == {float(parameter.fresh == "ones")}


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_tells_copies_apart_and_without_it_they_are_alike(family: str, parents: Any, tmp_path: Path) -> None:
    source = parents[family, True]
    to = child(family, d_mlp=40)
    for noise in (0.0, 1.0):
        grow_checkpoint(source, tmp_path / str(noise), plan_for(source, to, grow(noise=noise)), seed=0)
    table = get_family(family).parameters(to, N_POSITIONS, D_VOCAB, True)
    down = next(p for p in table if p.layer == 0 and p.into == ("mlp",))
    equal, noisy = (weights(tmp_path / str(noise))[down.name] for noise in (0.0, 1.0))
    if not down.in_first:
        equal, noisy = equal.T, noisy.T  # (mlp, embed)

    np.testing.assert_array_equal(equal[:20], equal[20:])
    np.testing.assert_allclose(noisy[:20] + noisy[20:], 2 * equal[:20], atol=1e-6)
    ratio = (noisy - equal).std() / equal.std()
    assert 0.85 < ratio < 1.15, "noise 1 is as large as the weights it is added to"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_new_direction_gets_a_gradient(family: str, parents: Any, tmp_path: Path) -> None:
    """A matrix whose new part is zero on both sides would never learn; a silent block wakes at the second step."""
    import torch
    from transformers import AutoModelForCausalLM

    source, to = parents[family, True], child(family, **GROWTHS["head width and all else"][family])
    grow_checkpoint(source, tmp_path / "child", plan_for(source, to, grow()), seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    tokens = torch.randint(0, D_VOCAB, (4, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    for _ in range(6):  # a copied key's gain that is stored from one wakes once its step is more than rounding
        optimizer.zero_grad()
        logits = model(tokens).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            reached[name] |= parameter.grad != 0
        optimizer.step()

    unreached = {name: (~entries).sum().item() for name, entries in reached.items() if not entries.all()}
    seen = set(tokens.flatten().tolist())
    for name in [name for name in unreached if "wpe" in name or "wte" in name or "embed" in name]:
        assert reached[name].any(dim=1).sum() >= min(len(seen), N_POSITIONS - 1)
        del unreached[name]  # a last position predicts nothing here
    assert unreached == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(family: str, parents: Any, tmp_path: Path) -> None:
    source = parents[family, True]
    made = plan_for(source, child(family, d_mlp=40, n_layers=3), grow("duplicate", "append_random"))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        grow_checkpoint(source, tmp_path / name, made, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")

    assert a == b
    assert a != c


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_a_block_of_rows_changes_nothing(
    family: str, parents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parents[family, False]
    to = child(family, **GROWTHS["head width and all else"][family])
    init = grow("duplicate", "append_random")
    grow_checkpoint(source, tmp_path / "whole", plan_for(source, to, init), seed=0)
    monkeypatch.setattr("trainer.growth.tensors.BLOCK_ENTRIES", 50)
    monkeypatch.setattr("trainer.growth.certificate.BLOCK_ENTRIES", 50)
    grow_checkpoint(source, tmp_path / "rows", plan_for(source, to, grow()), seed=0)
    grow_checkpoint(source, tmp_path / "rows too", plan_for(source, to, init), seed=0)

    whole, rows = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "rows too"))
    assert whole == rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_dtype_is_kept(family: str, dtype: str, tmp_path: Path) -> None:
    source = save(tmp_path / "parent", family, PARENT[family], dtype=dtype)
    to = child(family, **GROWTHS["width x2"][family], n_layers=4)
    grow_checkpoint(source, tmp_path / "child", plan_for(source, to, grow(snr_db=None)), seed=0)

    kept = {tensor.dtype for tensor in Weights(tmp_path / "child").tensors.values()}
    assert kept == {tensor.dtype for tensor in Weights(source).tensors.values()}
    assert read_config(tmp_path / "child")["dtype"] == dtype
    # Halving is exact in every one of them; what is added to one, or multiplied by a root, is rounded.
    rounded = 64 * EPSILON[kept.pop()] if get_family(family).gain_from_one else 0
    assert (logits(source) - logits(tmp_path / "child")).abs().max() < ROUNDING + rounded


def test_narrowing_to_bfloat16_rounds_as_torch_does() -> None:
    import torch

    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 1000), [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-9]])
    ours = widen(narrow(values, "BF16"), "BF16")
    theirs = torch.tensor(values, dtype=torch.float32).bfloat16().double().numpy()

    np.testing.assert_array_equal(ours, theirs)


# The certificate


@pytest.mark.parametrize("family", FAMILIES)
def test_the_certificate_names_a_single_corrupted_weight(family: str, parents: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source, out = parents[family, False], tmp_path / "child"
    to = child(family, **GROWTHS["head width and all else"][family])
    made = plan_for(source, to, grow())
    grow_checkpoint(source, out, made, seed=0)
    parent = named_weights(open_source(source))
    sound = load_file(out / "model.safetensors")

    assert max(certificate(parent, named_weights(open_source(out)), made).values()) < tolerance("F32", made)
    for name, values in sound.items():
        corrupted = values.copy()
        corrupted.flat[0] += 0.05  # the first entry is old on every axis
        save_file(sound | {name: corrupted}, out / "model.safetensors")
        residuals = certificate(parent, named_weights(open_source(out)), made)
        assert {n for n, r in residuals.items() if r > tolerance("F32", made)} == {name}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_certificate_sees_a_missing_tie_correction_and_a_silent_block_that_speaks(
    family: str, parents: Any, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    source, out = parents[family, True], tmp_path / "child"
    made = plan_for(source, child(family, **GROWTHS["width and depth"][family]), grow())
    grow_checkpoint(source, out, made, seed=0)
    parent, sound = named_weights(open_source(source)), load_file(out / "model.safetensors")
    final = [p.name for p, *_ in made.parameters() if p.final_norm]
    silent = [p.name for p, _, block, _ in made.parameters() if block.silent and p.writes_residual]

    for name in [*final, *silent]:
        changed = sound[name] / made.final_norm_scale if name in final else sound[name] + 0.01
        save_file(sound | {name: changed}, out / "model.safetensors")
        residual = certificate(parent, named_weights(open_source(out)), made)[name]
        assert residual > tolerance("F32", made)


def test_the_certificate_of_a_random_pad_shows_what_is_lost(parents: Any, tmp_path: Path) -> None:
    source = parents["llama", True]
    made = plan_for(source, child("llama", d_mlp=40), grow("random_pad"))
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    residuals = certificate(named_weights(open_source(source)), named_weights(open_source(tmp_path / "child")), made)

    lost = {name for name, residual in residuals.items() if residual > tolerance("F32", made)}
    assert lost == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}, "what reads the random units"


def test_a_wrong_write_is_never_put_in_place(parents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_module, "narrow", lambda values, dtype: narrow(values * 1.001, dtype))
    source = parents["llama", True]
    made = plan_for(source, child("llama", d_model=24), grow())

    with pytest.raises(GrowthError, match="away from what keeps the parent's function"):
        grow_checkpoint(source, tmp_path / "child", made, seed=0)
    assert list(tmp_path.iterdir()) == []


# Checkpoints as they come


def test_shards_are_read_through_their_index(tmp_path: Path, parents: Any) -> None:
    from transformers import AutoModelForCausalLM

    whole = parents["llama", False]
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    made = plan_for(whole, child("llama", d_mlp=40), grow())
    grow_checkpoint(whole, tmp_path / "a", made, seed=0)
    grow_checkpoint(tmp_path / "shards", tmp_path / "b", made, seed=0)

    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_base_models_names_and_masks_are_understood(tmp_path: Path, parents: Any) -> None:
    """As the original GPT-2 checkpoint has them: no prefix, and each block's causal mask."""
    from safetensors.numpy import load_file, save_file

    whole = parents["gpt2", True]
    shutil.copytree(whole, tmp_path / "bare")
    tensors = load_file(whole / "model.safetensors")
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    mask = np.tril(np.ones((1, 1, N_POSITIONS, N_POSITIONS), np.float32))
    save_file(bare | {"h.0.attn.bias": mask, "h.1.attn.bias": mask}, tmp_path / "bare/model.safetensors")
    made = plan_for(whole, child("gpt2", d_mlp=40), grow())
    grow_checkpoint(tmp_path / "bare", tmp_path / "child", made, seed=0)

    assert (logits(whole) - logits(tmp_path / "child")).abs().max() < ROUNDING


def test_an_imported_activation_and_the_rope_are_kept(tmp_path: Path) -> None:
    gpt2 = save(tmp_path / "gpt2", "gpt2", PARENT["gpt2"], activation_function="gelu_new")
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 2.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 12}
    llama = save(tmp_path / "llama", "llama", PARENT["llama"], rope_parameters=rope)
    for source, field in ((gpt2, "activation_function"), (llama, "rope_parameters")):
        to = child(source.name, **GROWTHS["head width"][source.name])
        grow_checkpoint(source, tmp_path / f"{source.name}-child", plan_for(source, to, grow()), seed=0)

        assert read_config(tmp_path / f"{source.name}-child")[field] == read_config(source)[field]
        assert (logits(source) - logits(tmp_path / f"{source.name}-child")).abs().max() < ROUNDING


def test_a_rope_that_depends_on_d_head_refuses_a_wider_head(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 12}
    source = save(tmp_path / "parent", "llama", PARENT["llama"], rope_parameters=rope)

    with pytest.raises(GrowthError, match="yarn") as caught:
        grow_checkpoint(source, tmp_path / "child", plan_for(source, child("llama", d_head=8), grow()), seed=0)
    assert (caught.value.field, caught.value.value) == ("shape.d_head", 8)
    grow_checkpoint(source, tmp_path / "child", plan_for(source, child("llama", d_model=24), grow()), seed=0)
    assert (logits(source) - logits(tmp_path / "child")).abs().max() < ROUNDING


def test_a_sliding_window_is_kept_and_so_is_what_is_said_beyond_it(tmp_path: Path) -> None:
    source = save(tmp_path / "parent", "mistral", PARENT["mistral"], sliding_window=5)
    without = save(tmp_path / "without", "mistral", PARENT["mistral"])
    to = child("mistral", **GROWTHS["head width and all else"]["mistral"])
    grow_checkpoint(source, tmp_path / "child", plan_for(source, to, grow()), seed=0)

    assert read_config(tmp_path / "child")["sliding_window"] == 5
    assert (logits(source) - logits(without)).abs().max() > 0.1, "a window that matters"
    assert (logits(source) - logits(tmp_path / "child")).abs().max() < ROUNDING


def test_a_grown_checkpoint_can_be_grown_again(tmp_path: Path, parents: Any) -> None:
    source = parents["llama", True]
    first = child("llama", d_model=24, n_layers=3)
    grow_checkpoint(source, tmp_path / "first", plan_for(source, first, grow()), seed=0)
    second = child("llama", d_model=48, n_layers=5, d_mlp=40)
    grow_checkpoint(tmp_path / "first", tmp_path / "second", plan_for(tmp_path / "first", second, grow()), seed=1)

    assert (logits(source) - logits(tmp_path / "second")).abs().max() < ROUNDING


def test_tokenizer_and_generation_settings_come_along_and_nothing_else_does(tmp_path: Path, parents: Any) -> None:
    source = tmp_path / "parent"
    shutil.copytree(parents["llama", True], source)
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 5}')
    (source / "modeling_custom.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"pickle")
    grow_checkpoint(source, tmp_path / "child", plan_for(source, child("llama", d_mlp=40), grow()), seed=0)

    assert sorted(p.name for p in (tmp_path / "child").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "child/generation_config.json").read_text() == '{"eos_token_id": 5}'
    assert (tmp_path / "child").stat().st_mode & 0o077 == 0o055


def test_a_folder_in_use_is_not_written_over(tmp_path: Path, parents: Any) -> None:
    source = parents["llama", True]
    (tmp_path / "child").mkdir()
    (tmp_path / "child/notes.txt").write_text("mine")
    made = plan_for(source, child("llama", d_mlp=40), grow())

    with pytest.raises(FileExistsError):
        grow_checkpoint(source, tmp_path / "child", made, seed=0)
    (tmp_path / "child/notes.txt").unlink()
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    assert (tmp_path / "child/config.json").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, parents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_room)
    made = plan_for(parents["llama", True], child("llama", d_mlp=40), grow())
    with pytest.raises(OSError, match="No space left"):
        grow_checkpoint(parents["llama", True], tmp_path / "child", made, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_parent_is_refused(tmp_path: Path, parents: Any) -> None:
    made = plan("llama", child("llama", d_mlp=10), child("llama"), grow(), n_positions=24, d_vocab=D_VOCAB, tied=True)
    with pytest.raises(GrowthError, match="has d_mlp 20, where the plan was made for 10"):
        grow_checkpoint(parents["llama", True], tmp_path / "child", made, seed=0)


def broken_checkpoint(folder: Path, how: str) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    match how:
        case "missing":
            tensors.pop("model.norm.weight")
        case "more":
            tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
        case "shape":
            tensors["model.norm.weight"] = np.zeros(13, np.float32)
        case "integers":
            tensors["model.norm.weight"] = np.zeros(12, np.int8)
    save_file(tensors, file)
    match how:
        case "cut off":
            file.write_bytes(file.read_bytes()[:-8])
        case "empty":
            file.write_bytes(b"")
        case "not safetensors":
            file.write_bytes((2).to_bytes(8, "little") + b"\xff\xff" + bytes(100))
        case "header":
            header = json.dumps({"x": {"dtype": "F32"}}).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header)
        case "pickle":
            file.rename(folder / "pytorch_model.bin")
        case "nothing":
            file.unlink()
        case "escape" | "index":
            file.unlink()
            index = {"weight_map": {"a": "../secret.safetensors"}} if how == "escape" else []
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "has no model.norm.weight"),
        ("more", "q_proj.bias, which Llama has no place for"),
        ("shape", r"model.norm.weight is \(13,\), where config.json says \(12,\)"),
        ("integers", "has no model.norm.weight, or not as floating-point"),
        ("cut off", "reaches past the file"),
        ("empty", "not a whole safetensors file"),
        ("not safetensors", "its header is not JSON"),
        ("header", "nothing readable about x"),
        ("pickle", "pickled weights"),
        ("nothing", "neither model.safetensors nor"),
        ("escape", "names ../secret.safetensors"),
        ("index", "no weight_map"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_and_says_why(
    how: str, said: str, tmp_path: Path, parents: Any
) -> None:
    source = tmp_path / "parent"
    shutil.copytree(parents["llama", True], source)
    made = plan_for(source, child("llama", d_mlp=40), grow())
    broken_checkpoint(source, how)

    with pytest.raises(SourceError, match=said):
        grow_checkpoint(source, tmp_path / "child", made, seed=0)
    assert not (tmp_path / "child").exists()


def test_rounding_is_what_the_dtypes_say() -> None:
    for dtype, epsilon in EPSILON.items():
        one = narrow(np.array([1 + 0.99 * epsilon, 1 + 1.01 * epsilon]), dtype)
        assert list(widen(one, dtype) > 1) == [False, True], dtype


# --- What the rules put where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["uneven", "diagonal"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text", "qwen3"])
def test_every_way_to_share_among_copies_is_exact(family: str, split: str, tmp_path: Path) -> None:
    source = save(tmp_path / "parent", family, PARENT[family], dtype="float64")
    for what in ("no whole ratio", "width and depth"):
        made = plan_for(source, child(family, **GROWTHS[what][family]), grow(split=split, snr_db=10))
        report = grow_checkpoint(source, tmp_path / what, made, seed=0)
        assert made.preserves
        assert report["residual"] < 1e-13
        # transformers has cosines and sines in float32, and another theta gives others.
        rounding = 1e-9 if made.rope_power == 1 else 1e-6
        assert (exact_logits(source) - exact_logits(tmp_path / what)).abs().max() < rounding


def test_side_by_side_is_two_models_that_exchange_nothing(parents: Any, tmp_path: Path) -> None:
    source = parents["llama", False]
    made = plan_for(source, child("llama", d_model=24, d_mlp=40), grow("block_diagonal", snr_db=None))
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    name = "model.layers.0.mlp.gate_proj.weight"
    old, new = weights(source)[name], weights(tmp_path / "child")[name]

    np.testing.assert_array_equal(new, np.block([[old, np.zeros_like(old)], [np.zeros_like(old), old]]))


def test_uneven_shares_add_up_entry_by_entry(parents: Any, tmp_path: Path) -> None:
    source = parents["llama", False]
    made = plan_for(source, child("llama", d_mlp=50), grow(split="uneven", snr_db=None))
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    name = "model.layers.0.mlp.down_proj.weight"
    old, new = weights(source)[name], weights(tmp_path / "child")[name]

    shares = new / old[:, np.arange(50) % 20]
    assert shares.min() > -1e-6
    assert shares[:, :10].std() > 0.15
    np.testing.assert_allclose(sum(shares[:, at : at + 10] for at in (0, 20, 40)), 1, atol=1e-5)
    np.testing.assert_allclose(shares[:, 10:20] + shares[:, 30:40], 1, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_copies_come_from_the_block_above(family: str, parents: Any, tmp_path: Path) -> None:
    source = parents[family, False]
    to = child(family, d_mlp=40)
    grow_checkpoint(source, tmp_path / "child", plan_for(source, to, grow("aki", snr_db=None)), seed=0)
    old, new = weights(source), weights(tmp_path / "child")
    table = {p.name: p for p in get_family(family).parameters(to, N_POSITIONS, D_VOCAB, False)}
    first = next(p for p in table.values() if p.layer == 0 and p.out == (("mlp",),) and p.kind == "matrix")

    def units(held: dict[str, Any], name: str) -> Any:
        return held[name].T if first.in_first else held[name]

    above = first.name.replace(".0.", ".1.")
    np.testing.assert_array_equal(units(new, first.name)[:20], units(old, first.name))
    np.testing.assert_array_equal(units(new, first.name)[20:], units(old, above))
    np.testing.assert_array_equal(units(new, above)[20:], units(old, above), err_msg="the last has none above it")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma"])
def test_further_tokens_and_positions_leave_the_old_ones_as_they_were(family: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save(tmp_path / "parent", family, PARENT[family], tied=tied, dtype="float64")
    to = child(family, **GROWTHS["width and depth"][family])
    made = plan_for(source, to, grow(d_vocab=D_VOCAB + 11, n_positions=2 * N_POSITIONS))
    grow_checkpoint(source, tmp_path / "child", made, seed=0)
    before, after = exact_logits(source), exact_logits(tmp_path / "child")

    assert made.preserves
    assert "11 further tokens" in made.because
    assert (before - after[..., :D_VOCAB]).abs().max() < 1e-9
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "child").config
    assert (config.vocab_size, config.max_position_embeddings) == (D_VOCAB + 11, 2 * N_POSITIONS)


def test_fewer_tokens_or_positions_are_refused(parents: Any) -> None:
    for field, parent in (("d_vocab", D_VOCAB), ("n_positions", N_POSITIONS)):
        with pytest.raises(GrowthError, match=f"at least {parent}") as caught:
            plan_for(parents["llama", True], PARENT["llama"], grow(**{field: parent - 1}))
        assert caught.value.field == f"init.{field}"
