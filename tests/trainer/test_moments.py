"""AdamW's state and rates over a growth: exact where growth is, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.trainer import pico
from trainer import train
from trainer.families import get_family
from trainer.growth import GrowthPlan, plan
from trainer.growth.apply import grow_checkpoint
from trainer.growth.moments import OPTIMIZER_FILE, LrScale, grow_moments, lr_scales, new_entries
from trainer.growth.weights import SourceError
from trainer.shape import GrowInit, Shape
from trainer.spec import TrainSpec

#: All widths twice or three times; heads, groups and members of groups too.
CHILD = {
    "gpt2": {"d_model": 24, "n_heads": 6, "d_mlp": 60},
    "gpt_neox": {"d_model": 48, "n_heads": 6, "d_mlp": 60},
    "llama": {"d_model": 36, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 40},
    "gemma": {"d_model": 24, "n_heads": 12, "n_kv_heads": 2, "d_mlp": 40},
    "qwen3": {"d_model": 24, "n_heads": 12, "n_kv_heads": 2, "d_mlp": 40},
}

SETTINGS = TrainSpec(
    n_ctx=pico.N_POSITIONS, batch_size=4, max_steps=25, lr=2e-3, warmup_steps=0, schedule="constant", grad_clip=None,
    beta2=0.99, weight_decay=0.2, eval_every=1000, precision="fp32",
)  # fmt: skip


def planned(family: str, child: Shape, tied: bool, **init: Any) -> GrowthPlan:
    init = {"split": "even", "snr_db": None} | init
    sizes: Any = {"n_positions": pico.N_POSITIONS, "d_vocab": pico.D_VOCAB, "tied": tied}
    return plan(family, pico.PARENT[family], child, GrowInit.model_validate({"parent": "small", **init}), **sizes)


@pytest.fixture
def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, pico.D_VOCAB, 4000).astype(np.uint16)


def rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """As transformers has it, which computes it in float32."""
    from_one = not hasattr(module, "variance_epsilon")  # Gemma's norms, which call it eps
    eps = module.eps if from_one else module.variance_epsilon
    normed: torch.Tensor = (from_one + module.weight) * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return normed


def load(folder: Path) -> Any:
    """In float64 throughout, but for RoPE's angles."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def go_on(tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Train from one step to another; the losses. With `stage_end` a checkpoint is written there."""
    monkeypatch.setattr(train, "FLUSH_SECONDS", 0.0)

    def go_on(model: Any, optimizer: Any, begin: int, end: int) -> list[float]:
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        task = train.Task(
            settings=SETTINGS,
            directory=tmp_path,
            tokenizer=tmp_path / "tokenizer",
            tokens=tokens,
            held_out=tokens[None, : pico.N_POSITIONS + 1].astype(np.int64),
            bytes_per_token=1.0,
            batch_seed=0,
            total_steps=25,
            flops_per_token=1.0,
            precision="fp32",
            stage_end=end,
        )
        fields = train.train(model, optimizer, task, train.State(step=begin, stage_step=begin), lambda: False)
        return [event["cross_entropy"] for event in fields if event["kind"] == "train"]

    return go_on


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("llama", False), ("gpt2", True), ("gpt_neox", False), ("qwen3", True), ("gemma", True)],
)
def test_a_grown_run_is_the_small_one_going_on(family: str, tied: bool, tmp_path: Path, go_on: Any) -> None:
    """Duplicated evenly, with grown moments and rates by width: the same losses, until rounding parts them."""
    small = load(pico.save(tmp_path / "small", family, pico.PARENT[family], tied=tied, dtype="float64"))
    optimizer = train.make_optimizer(small, SETTINGS)
    go_on(small, optimizer, 0, 5)
    held = tmp_path / train.checkpoint_path(5)
    growth = planned(family, pico.child(family, **CHILD[family]), tied)
    grow_checkpoint(held, tmp_path / "grown", growth, 0)

    def losses(scales: dict[str, LrScale] | None) -> list[float]:
        model = load(tmp_path / "grown")
        by_model = dict(model.named_parameters())
        names = {o.new.name: o.new.name if o.new.name in by_model else "lm_head.weight" for o in growth.parameters()}
        named = None if scales is None else {names[name]: scale for name, scale in scales.items()}
        grown = train.make_optimizer(model, SETTINGS, named)
        moments = [(place.partition("/"), torch.from_numpy(array)) for place, array in grow_moments(held, growth)]
        train.fill_optimizer(grown, model, ((f"{key}/{names[name]}", array) for (key, _, name), array in moments))
        found: list[float] = go_on(model, grown, 5, 25)
        return found

    going_on = go_on(small, optimizer, 5, 25)
    assert len(going_on) == 20
    assert losses(lr_scales(growth)) == pytest.approx(going_on, abs=1e-12)
    one_rate = losses(None)
    assert one_rate[0] == pytest.approx(going_on[0], abs=1e-12)
    assert max(abs(a - b) for a, b in zip(one_rate, going_on, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("family", "tied", "changes", "init"),
    [
        ("llama", True, {"d_model": 18, "d_mlp": 30}, {}),
        ("llama", False, {"n_heads": 18, "n_kv_heads": 6, "d_model": 36}, {}),
        ("llama", True, {"d_head": 8, "n_layers": 3}, {}),
        ("llama", True, {"d_model": 18, "d_mlp": 30, "d_head": 6, "n_heads": 9, "n_kv_heads": 3}, {"width": "pad"}),
        ("gpt2", True, {"d_mlp": 30}, {}),
        ("gemma", True, {"d_model": 18, "d_mlp": 30}, {}),
        ("olmo2", False, {"d_model": 24, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 40}, {"depth": "identity"}),
    ],
)  # fmt: skip
def test_moments_grow_as_gradients_do(
    family: str, tied: bool, changes: dict[str, Any], init: dict[str, Any], tokens: Any, tmp_path: Path
) -> None:
    """At any ratio: the gradients of the grown model, by autograd, are those that the maps make of the parent's."""
    growth = planned(family, pico.child(family, **changes), tied, **init)
    assert growth.preserves
    pico.save(tmp_path / "small", family, pico.PARENT[family], tied=tied, dtype="float64")
    grow_checkpoint(tmp_path / "small", tmp_path / "large", growth, 0)
    ids = torch.from_numpy(tokens[: 4 * pico.N_POSITIONS].astype(np.int64)).view(4, -1)
    gradients = []
    for name in ("small", "large"):
        model = load(tmp_path / name)
        model(ids, labels=ids).loss.backward()
        gradients.append({path: parameter.grad for path, parameter in model.named_parameters()})
    old, new = gradients
    grown = moments_of(old, tmp_path / "small", growth)
    kept = moments_of({name: torch.ones_like(gradient) for name, gradient in old.items()}, tmp_path / "small", growth)
    silent = {o.new.name for o in growth.parameters() if o.block.silent}
    new_entries_of = dict(new_entries(growth))
    assert {name.partition("/")[2] for name in grown} == new.keys() - silent
    for name, gradient in new.items():
        if name in silent:
            continue
        first, second, known = grown[f"exp_avg/{name}"], grown[f"exp_avg_sq/{name}"], kept[f"exp_avg/{name}"] != 0
        assert grown[f"step/{name}"] == 5
        # RoPE's angles, and those of other pairs, are float32.
        np.testing.assert_allclose(first[known], gradient.numpy()[known], rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(second[known], first[known] ** 2, rtol=1e-8, atol=1e-20, err_msg=name)
        assert not first[~known].any()
        assert not second[~known].any()
        np.testing.assert_array_equal(new_entries_of.get(name, np.zeros(known.shape, bool)), ~known, err_msg=name)


def moments_of(gradients: dict[str, torch.Tensor], folder: Path, growth: GrowthPlan) -> dict[str, Any]:
    """What is grown of AdamW's state if the first moments are these, and the second their squares."""
    held = {f"exp_avg/{name}": g.contiguous() for name, g in gradients.items()}
    held |= {f"exp_avg_sq/{name}": (g * g).contiguous() for name, g in gradients.items()}
    held |= {f"step/{name}": torch.tensor(5.0) for name in gradients}
    save_file(held, folder / OPTIMIZER_FILE)
    return dict(grow_moments(folder, growth))


def test_new_blocks_and_copies_from_above(tmp_path: Path) -> None:
    """A block drawn at random begins afresh; where copies come from the block above (AKI), so do their moments."""
    parent = pico.PARENT["llama"]
    table = get_family("llama").parameters(parent, pico.N_POSITIONS, pico.D_VOCAB, True)
    gradients = {p.name: torch.full(p.shape, 1.0 + (p.layer or 0), dtype=torch.float64) for p in table}
    (tmp_path / "small").mkdir()

    child = pico.child("llama", n_layers=3)
    grown = moments_of(gradients, tmp_path / "small", planned("llama", child, True, depth="append_random"))
    assert not any(".layers.2." in name for name in grown)
    assert {name.partition("/")[2] for name in grown} == gradients.keys()

    above = planned("llama", pico.child("llama", d_mlp=40), True, width="aki")
    grown = moments_of(gradients, tmp_path / "small", above)
    up = grown["exp_avg/model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_allclose(up[:20], 0.5)
    np.testing.assert_allclose(up[20:], 1.0, err_msg="half of the block above's")

    (tmp_path / "small" / OPTIMIZER_FILE).unlink()
    with pytest.raises(SourceError, match=r"has no optimizer\.safetensors"):
        dict(grow_moments(tmp_path / "small", above))


def test_rates_go_down_with_the_copies_of_inputs_and_no_other(tmp_path: Path) -> None:
    growth = planned("llama", pico.child("llama", d_model=24, d_mlp=60), True)
    scales = lr_scales(growth)
    block = "model.layers.1"
    assert scales["model.embed_tokens.weight"] == LrScale(1, 1, 1 / 2)
    assert scales[f"{block}.self_attn.q_proj.weight"] == LrScale(1 / 2, 2, 1)
    assert scales[f"{block}.mlp.up_proj.weight"] == pytest.approx(LrScale(1 / 2, 2, 1 / 3))
    assert scales[f"{block}.mlp.down_proj.weight"] == pytest.approx(LrScale(1 / 3, 3, 1 / 2))
    assert scales[f"{block}.input_layernorm.weight"] == LrScale(1, 1, 1 / 2)
    assert scales["model.norm.weight"] == LrScale(1 / 2, 2, 1), "divided by kappa, for the tied head"
    head = lr_scales(planned("llama", pico.child("llama", d_model=24), False))["lm_head.weight"]
    assert head == LrScale(1 / 2, 2, 1)

    # A second growth: new blocks have the scales of their kind, and both growths' together.
    deeper = plan(
        "llama", growth.child, pico.child("llama", d_model=72, d_mlp=60, n_layers=3),
        GrowInit(parent="small", depth="append_random"), n_positions=pico.N_POSITIONS, d_vocab=pico.D_VOCAB, tied=True,
    )  # fmt: skip
    again = lr_scales(deeper, scales)
    for layer in (0, 2):
        assert again[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(LrScale(1 / 6, 6, 1 / 3))


def test_an_optimizers_groups_follow_the_scales_and_the_matrices_come_first(tmp_path: Path) -> None:
    growth = planned("llama", pico.child("llama", d_model=24), True)
    grow_checkpoint(pico.save(tmp_path / "s", "llama", pico.PARENT["llama"]), tmp_path / "l", growth, 0)
    model = load(tmp_path / "l")
    groups = train.make_optimizer(model, SETTINGS, lr_scales(growth)).param_groups
    found = [(g["params"][0].dim(), g["lr_scale"], g["weight_decay"], g["eps"]) for g in groups]
    assert found == [(2, 1.0, 0.2, 5e-9), (2, 0.5, 0.4, 1e-8), (1, 1.0, 0.0, 5e-9), (1, 0.5, 0.0, 1e-8)]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_what_is_new_under_an_old_count_of_steps_sets_out_slowly_and_goes_on_at_the_usual_pace(beta2: float) -> None:
    new = torch.zeros(6, 6, dtype=torch.bool)
    new[:, 3:] = True
    largest = {}
    for begun in (True, False):
        module = torch.nn.Linear(6, 6, bias=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, betas=(0.9, beta2), weight_decay=0.0, fused=True)
        weight, random = module.weight, torch.Generator().manual_seed(0)
        second = torch.where(new, 0.0, 1.0)
        optimizer.state[weight] = {"step": torch.tensor(1e5), "exp_avg": torch.zeros(6, 6), "exp_avg_sq": second}
        newcomers = train.Newcomers(module, optimizer, [("weight", new)] if begun else [])
        moved = []
        for step in range(30):
            before = weight.detach().clone()
            # Nothing for two steps, then gradients far below those of the old entries, with a direction and noise.
            weight.grad = torch.where(new, 1e-3 * (1 + torch.randn(6, 6, generator=random)), 1.0)
            if step < 2:
                weight.grad[new] = 0.0
            newcomers.begin(step)
            optimizer.step()
            moved.append((weight.detach() - before)[new].square().mean().sqrt().item())
        assert moved[:2] == [0.0, 0.0]
        largest[begun] = max(moved)
        if begun:
            assert moved[2] == pytest.approx(0.1, rel=0.1)
            assert 0.5 < moved[-1] < 1.1
    assert largest[True] < 1.1
    assert (largest[False] > 2.5) == (beta2 == 0.999)
