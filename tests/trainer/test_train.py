from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer import pico
from trainer.endings import Diverged
from trainer.families import build_model, get_family
from trainer.spec import TrainSpec
from trainer.train import (
    LOSS_CHUNK,
    MOST_TRAIN_EVENTS,
    Batches,
    Meter,
    State,
    Task,
    choose_precision,
    learning_rate,
    linear_cross_entropy,
    make_optimizer,
)

CPU = torch.device("cpu")


# --- Loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, LOSS_CHUNK, 2 * LOSS_CHUNK + 77])
def test_the_chunked_loss_and_both_its_gradients_are_those_of_plain_cross_entropy(n: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(n, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (n,))
    (plain := F.cross_entropy(hidden @ weight.T, targets)).mul(3).backward()
    expected = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    (ours := linear_cross_entropy(hidden, weight, targets)).mul(3).backward()
    # The logits are brought to float32, as after a product in bfloat16.
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=1e-6)
    for got, wanted in zip([hidden.grad, weight.grad], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradients_are_those_of_transformers_own_loss(family: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = build_model(get_family(family).config(pico.PARENT[family], pico.N_POSITIONS, pico.D_VOCAB, tied))
    ids = torch.randint(0, pico.D_VOCAB, (3, pico.N_POSITIONS))
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    linear_cross_entropy(hidden.flatten(0, 1), model.get_output_embeddings().weight, ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_in_bfloat16_the_gradients_are_close_and_the_weights_gradient_is_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1500, 32), torch.randn(100, 32) * 0.3
    targets = torch.randint(0, 100, (1500,))
    grads = []
    for enabled in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(h, w, targets)
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        assert w.grad.dtype == torch.float32
        grads.append((loss.detach(), h.grad, w.grad))
    for exact, half in zip(*grads, strict=True):
        assert (exact - half).norm() < 0.01 * exact.norm()
        assert not torch.equal(exact, half)


# --- Batches ----------------------------------------------------------------------------------------------------------


def starts(batches: Batches, step: int) -> list[int]:
    """Where each window of a batch begins: the tokens are 0, 1, 2 ..."""
    inputs, targets = batches.at(step, CPU)
    assert torch.equal(inputs + 1, targets)
    return [int(row[0]) for row in inputs]


def test_an_epoch_sees_every_window_once_and_the_next_one_other_windows_in_another_order() -> None:
    batches = Batches(np.arange(1000, dtype=np.uint16), n_ctx=10, batch_size=9, seed=3)
    assert batches.per_epoch == 99
    epochs = [[s for step in range(e * 11, e * 11 + 11) for s in starts(batches, step)] for e in range(3)]
    assert sorted(epochs[0]) == list(range(0, 990, 10))
    for epoch in epochs:
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 990, 10))
        assert max(epoch) + 11 <= 1000
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])


@given(n_tokens=st.integers(9, 200), n_ctx=st.integers(8, 60), step=st.integers(0, 40), seed=st.integers(0, 5))
def test_a_batch_depends_on_seed_and_step_alone(n_tokens: int, n_ctx: int, step: int, seed: int) -> None:
    if n_tokens < n_ctx + 1:
        return
    tokens = np.arange(n_tokens, dtype=np.uint16)
    at_once = starts(Batches(tokens, n_ctx, 3, seed), step)
    batches = Batches(tokens, n_ctx, 3, seed)
    assert [starts(batches, s) for s in range(step + 1)][-1] == at_once
    assert max(at_once) + n_ctx + 1 <= n_tokens


def test_another_seed_gives_another_order() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    assert starts(Batches(tokens, 10, 20, 0), 0) != starts(Batches(tokens, 10, 20, 1), 0)


# --- Optimizer --------------------------------------------------------------------------------------------------------


def test_weight_decay_is_for_matrices_and_every_parameter_is_trained() -> None:
    model = build_model(get_family("gpt2").config(pico.PARENT["gpt2"], 24, 53, True))
    decayed, spared = make_optimizer(model, TrainSpec(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule: Any) -> None:
    settings = TrainSpec(lr=0.5, warmup_steps=10, schedule=schedule, min_lr_ratio=0.2)
    rates = [learning_rate(step, settings, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.05 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(0.5)
    if schedule == "constant":
        assert set(rates[10:]) == {0.5}
    else:
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))
        assert learning_rate(60, settings, 110) == pytest.approx((0.5 + 0.1) / 2)
        assert learning_rate(110, settings, 110) == pytest.approx(0.1)


def test_precision_is_what_was_asked_for_and_auto_takes_one_of_the_two() -> None:
    assert [choose_precision(p, 64, CPU) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert choose_precision("auto", 64, CPU) in ("fp32", "bf16")


# --- Measuring --------------------------------------------------------------------------------------------------------


def task(total: int) -> Task:
    return Task(
        settings=TrainSpec(n_ctx=8, batch_size=2, max_steps=total, warmup_steps=0),
        directory=Path(),
        tokenizer=Path(),
        tokens=np.arange(100),
        held_out=np.zeros((1, 9), np.int64),
        bytes_per_token=1.0,
        batch_seed=0,
        total_steps=total,
        flops_per_token=10.0,
        precision="fp32",
    )


def steps(meter: Meter, losses: list[float], norm: float = 1.0) -> list[dict[str, Any]]:
    found = []
    for loss in losses:
        meter.start()
        found += meter.stepped(torch.tensor(loss), torch.tensor(norm), 0.1)
    return [*found, *meter.flush()]


def test_a_long_run_reports_means_and_stays_within_its_number_of_events() -> None:
    total = 5 * MOST_TRAIN_EVENTS + 3
    meter = Meter(State(), task(total), every=6)
    found = steps(meter, [float(i) for i in range(total)])
    assert len(found) <= MOST_TRAIN_EVENTS
    assert [e["step"] for e in found] == [*range(6, total + 1, 6), total]
    assert found[1]["cross_entropy"] == sum(range(6, 12)) / 6
    assert found[-1]["cross_entropy"] == sum(range(total // 6 * 6, total)) / (total % 6)
    assert found[-1]["tokens"] == total * 16
    assert found[-1]["flops"] == total * 160


@given(cut=st.integers(0, 20), every=st.integers(1, 7))
def test_a_meter_that_is_taken_up_again_reports_what_it_would_have(cut: int, every: int) -> None:
    values = [math.sin(i) for i in range(20)]
    keys = ("step", "tokens", "flops", "cross_entropy", "lr", "grad_norm")
    whole = [{k: e[k] for k in keys} for e in steps(Meter(State(), task(20), every), values)]
    first = Meter(State(), task(20), every)
    found = steps(first, values[:cut])
    found += steps(Meter(first.state(), task(20), every), values[cut:])
    assert [{k: e[k] for k in keys} for e in found] == whole


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_reported_with_its_step_after_those_before_it(bad: float) -> None:
    meter = Meter(State(), task(20), 1)
    found: list[int] = []

    def run() -> None:
        for loss in (3.0, 2.0, 1.0, bad, bad):
            meter.start()
            found.extend(e["step"] for e in meter.stepped(torch.tensor(loss), torch.tensor(1.0), 0.1))
        found.extend(e["step"] for e in meter.flush())

    with pytest.raises(Diverged, match="The loss is not a finite number at step 4") as caught:
        run()
    assert caught.value.step == 4
    assert found == [1, 2, 3]


def test_a_gradient_that_is_no_number_is_reported_too() -> None:
    with pytest.raises(Diverged, match="The gradient is not a finite number at step 1"):
        steps(Meter(State(), task(20), 1), [1.0], norm=math.inf)


def test_a_state_goes_through_json_unchanged() -> None:
    state = State(3, 48, 480.0, 0.1 + 0.2, 1e-17, 2.0, [1 / 3, 5e-324])
    assert State(**json.loads(json.dumps(dataclasses.asdict(state)))) == state
