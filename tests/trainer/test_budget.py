"""Counts by arithmetic, held to real models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, save
from trainer.budget import activation_bytes, flops_per_token, memory_bytes, parameters, sheet, training_steps
from trainer.families import FAMILIES, build_model, get_family
from trainer.shape import Shape
from trainer.spec import ExperimentSpec, TrainSpec, parse_spec


def experiment(family: str = "llama", **top: Any) -> ExperimentSpec:
    small = PARENT[family].model_dump()
    large = child(family, d_mlp=40, n_layers=4).model_dump()
    models: dict[str, Any] = {
        "small": {"family": family, "shape": small},
        "scaled": {"family": family, "shape": large, "init": {"kind": "grow", "parent": "small"}},
        "large": {"family": family, "shape": large, "train": {"max_steps": 70}},
    }
    data = {"tokenizer": {"kind": "bpe", "d_vocab": 300}}
    train = {"n_ctx": 16, "batch_size": 4, "max_steps": 100, "warmup_steps": 10}
    return parse_spec({"name": "pico", "data": data, "train": train, "models": models} | top)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family: str, tied: bool) -> None:
    shape = PARENT[family]
    model = build_model(get_family(family).config(shape, N_POSITIONS, D_VOCAB, tied))
    counted = parameters(family, shape, N_POSITIONS, D_VOCAB, tied)

    assert counted.total == model.num_parameters()
    tables = D_VOCAB * shape.d_model * (1 if tied else 2)
    tables += N_POSITIONS * shape.d_model if family == "gpt2" else 0
    assert counted.non_embedding == model.num_parameters() - tables


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_matrix_products_that_torch_counts(family: str, tied: bool) -> None:
    """Attention is counted at half here (causal), where torch's counter takes it in full."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shape, n_ctx = PARENT[family], 16
    config = get_family(family).config(shape, n_ctx, D_VOCAB, tied)
    model = build_model(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros((1, n_ctx), dtype=torch.long))
    attention = 2 * shape.n_layers * n_ctx * shape.n_heads * shape.d_head
    forward = counter.get_total_flops() / n_ctx - attention

    assert flops_per_token(family, shape, n_ctx, D_VOCAB, tied) == 3 * forward


def test_the_flops_of_a_gpt2_are_the_written_formula() -> None:
    d, f, layers, t, v = 256, 1024, 4, 256, 4096
    shape = Shape(d_model=d, n_heads=4, d_head=64, d_mlp=f, n_layers=layers)
    expected = 3 * (2 * layers * (4 * d * d + 2 * d * f) + 2 * layers * t * d + 2 * d * v)

    assert flops_per_token("gpt2", shape, t, v, True) == expected
    assert expected == pytest.approx(26.7e6, rel=0.01), "the figure that training on this shape was measured with"


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_the_tensors_that_autograd_keeps(family: str, half: bool) -> None:
    import torch

    def kept(n_layers: int) -> int:
        shape = child(family, d_model=96, n_heads=12, d_head=8, d_mlp=200, n_layers=n_layers)
        model = build_model(get_family(family).config(shape, 64, D_VOCAB, True))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                stored[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address stays its own
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=half):
            model.base_model(input_ids=torch.zeros((2, 64), dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())

    shape = child(family, d_model=96, n_heads=12, d_head=8, d_mlp=200)
    matrices = sum(
        p.size for p in get_family(family).parameters(shape, 1, 1, True) if p.layer == 0 and p.kind == "matrix"
    )
    in_a_block = (kept(3) - kept(1)) // 2 - (2 * matrices if half else 0)

    assert activation_bytes(get_family(family), shape, 64, half) == pytest.approx(
        in_a_block / 128, rel=0.03
    )  # softmax statistics, biases


MEASURED_PEAKS = [  # family, d_model, n_kv_heads, d_mlp, n_layers, d_vocab, batch_size, precision, MB
    ("gpt2", 256, None, 1024, 4, 4096, 8, "bf16", 619),
    ("gpt2", 512, None, 2048, 8, 4096, 8, "bf16", 1256),
    ("gpt2", 384, None, 1536, 6, 4096, 16, "bf16", 1114),
    ("gpt2", 384, None, 1536, 6, 4096, 8, "fp32", 1013),
    ("llama", 256, None, 1024, 4, 4096, 8, "bf16", 762),
    ("llama", 512, 2, 1408, 8, 4096, 8, "bf16", 1555),
    ("llama", 384, None, 1024, 6, 4096, 16, "bf16", 1631),
    ("llama", 384, None, 1024, 6, 4096, 8, "fp32", 1266),
    ("gemma", 384, None, 1024, 6, 4096, 8, "bf16", 1202),
    ("gemma2", 512, None, 1408, 8, 4096, 8, "bf16", 2385),
    ("gemma2", 384, None, 1024, 6, 4096, 8, "fp32", 1707),
    ("gemma3_text", 512, None, 1408, 8, 4096, 8, "bf16", 2314),
    ("phi3", 256, None, 1024, 4, 4096, 8, "bf16", 825),
    ("phi3", 384, None, 1024, 6, 4096, 16, "bf16", 1905),
    ("phi3", 512, None, 1408, 8, 4096, 8, "bf16", 2004),
    ("phi3", 384, None, 1024, 6, 4096, 8, "fp32", 1391),
    ("starcoder2", 384, 2, 1536, 6, 4096, 8, "fp32", 1106),
]


@pytest.mark.parametrize("measured", MEASURED_PEAKS, ids=lambda m: "-".join(map(str, m)))
def test_memory_is_about_what_runs_of_the_trainer_took(measured: tuple[Any, ...]) -> None:
    family, d_model, n_kv_heads, d_mlp, n_layers, d_vocab, batch_size, precision, peak = measured
    shape = Shape(
        d_model=d_model, n_heads=d_model // 64, n_kv_heads=n_kv_heads, d_head=64, d_mlp=d_mlp, n_layers=n_layers
    )
    train = TrainSpec(n_ctx=256, batch_size=batch_size, precision=precision)

    assert 0.97 < memory_bytes(family, shape, train, 256, d_vocab, True) / (peak * 1e6) < 1.15


def test_fp32_needs_more_memory_than_bf16() -> None:
    shape = Shape(d_model=512, n_heads=8, d_head=64, d_mlp=2048, n_layers=8)
    by_precision = {
        p: memory_bytes("llama", shape, TrainSpec(precision=p, batch_size=16), 256, 4096, True)
        for p in ("auto", "bf16", "fp32")
    }
    assert by_precision["auto"] == by_precision["bf16"] < by_precision["fp32"]


@pytest.mark.parametrize(
    ("settings", "train_tokens", "steps"),
    [
        ({"max_steps": 100}, None, 100),
        ({"max_steps": 0, "warmup_steps": 0}, None, 0),
        ({"max_steps": None, "num_epochs": 2}, None, None),
        ({"max_steps": None, "num_epochs": 2}, 64_000, 2000),
        ({"max_steps": 100, "num_epochs": 2}, 64_000, 100),
        ({"max_steps": 5000, "num_epochs": 0.5}, 64_000, 500),
        ({"max_steps": None, "num_epochs": 0.001}, 100, 1),
    ],
)
def test_training_ends_at_steps_or_epochs_whichever_is_first(
    settings: dict[str, Any], train_tokens: int | None, steps: int | None
) -> None:
    train = TrainSpec.model_validate({"n_ctx": 16, "batch_size": 4} | settings)
    assert training_steps(train, train_tokens) == steps


def test_a_sheet_has_every_model_with_its_own_settings() -> None:
    budgets = sheet(experiment(), flops_per_second=1e9)

    assert list(budgets) == ["small", "scaled", "large"]
    small, scaled, large = budgets.values()
    assert (small.steps, scaled.steps, large.steps) == (100, 100, 70)
    assert large.tokens == 70 * 4 * 16
    assert (
        scaled.parameters
        == large.parameters
        == parameters("llama", child("llama", d_mlp=40, n_layers=4), 16, 300, True)[0]
    )
    assert large.flops == large.tokens * large.flops_per_token  # type: ignore[operator]
    assert large.seconds == large.flops / 1e9
    assert small.growth is None
    assert scaled.growth is not None
    assert scaled.growth.preserves


def test_what_is_not_known_is_none() -> None:
    tokenizer = {"kind": "pretrained", "name": "somebody/tokenizer"}
    unknown = sheet(experiment(data={"tokenizer": tokenizer}))["scaled"]
    assert (unknown.parameters, unknown.flops_per_token, unknown.memory_bytes, unknown.seconds) == (None,) * 4
    assert unknown.steps == 100
    assert unknown.growth is not None, "the vocabulary has no part in it"

    counted = sheet(experiment(data={"tokenizer": tokenizer | {"d_vocab": 500}}))["scaled"]
    assert counted.parameters is not None
    assert counted.seconds is None, "without a speed"


def from_checkpoint(path: str, shape: Shape, family: str) -> ExperimentSpec:
    grown = {"family": family, "shape": shape.model_dump(), "init": {"kind": "grow", "parent": "small"}}
    small = {"family": family, "init": {"kind": "checkpoint", "path": path}}
    tokenizer = {"kind": "pretrained", "name": path}
    return experiment(family, models={"small": small, "scaled": grown}, data={"tokenizer": tokenizer})


def test_a_local_checkpoint_is_counted_from_its_config(tmp_path: Path) -> None:
    save(tmp_path, "gpt2", PARENT["gpt2"])
    small, scaled = sheet(from_checkpoint(str(tmp_path), child("gpt2", d_mlp=40), "gpt2")).values()

    assert small.parameters == parameters("gpt2", PARENT["gpt2"], N_POSITIONS, D_VOCAB, True).total
    assert scaled.parameters == parameters("gpt2", child("gpt2", d_mlp=40), N_POSITIONS, D_VOCAB, True).total
    assert scaled.growth is not None
    assert scaled.growth.n_positions == N_POSITIONS
    assert scaled.problem is None


def test_a_checkpoint_that_cannot_grow_so_is_a_problem_with_its_field(tmp_path: Path) -> None:
    save(tmp_path, "gpt2", PARENT["gpt2"])
    scaled = sheet(from_checkpoint(str(tmp_path), child("gpt2", d_mlp=16), "gpt2"))["scaled"]

    assert scaled.growth is None
    assert scaled.problem is not None
    assert (scaled.problem.field, scaled.problem.value) == ("models.scaled.shape.d_mlp", 16)
    assert "at least 20" in scaled.problem.message


def test_a_checkpoint_of_the_hub_is_counted_once_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = from_checkpoint("somebody/small", child("llama", d_mlp=40), "llama")
    before = sheet(spec)
    assert (before["small"].parameters, before["scaled"].growth) == (None, None)

    cached = tmp_path / "models--somebody--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc123")
    (cached / "snapshots/abc123").mkdir(parents=True)
    config = get_family("llama").config(PARENT["llama"], 64, D_VOCAB, True)
    (cached / "snapshots/abc123/config.json").write_text(json.dumps(config))

    after = sheet(spec)
    assert after["small"].parameters == parameters("llama", PARENT["llama"], 64, D_VOCAB, True).total
    assert after["scaled"].growth is not None


def test_a_sheet_of_the_largest_shapes_takes_no_time() -> None:
    small = Shape(d_model=4096, n_heads=32, n_kv_heads=8, d_head=128, d_mlp=14336, n_layers=32)
    large = Shape(d_model=8192, n_heads=64, n_kv_heads=8, d_head=128, d_mlp=28672, n_layers=80)
    models = {
        "small": {"family": "llama", "shape": small.model_dump()},
        "scaled": {"family": "llama", "shape": large.model_dump(), "init": {"kind": "grow", "parent": "small"}},
    }
    spec = experiment(models=models)
    began = time.process_time()
    sheet(spec)
    assert time.process_time() - began < 0.5
