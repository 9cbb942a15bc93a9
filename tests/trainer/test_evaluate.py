from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.trainer import pico
from trainer.evaluate import compare, evaluate, samples, windows
from trainer.families import build_model, get_family


def model_of(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = build_model(get_family(family).config(pico.PARENT[family], pico.N_POSITIONS, pico.D_VOCAB, True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def held_out(n: int = 40) -> Any:
    rng = np.random.default_rng(0)
    return rng.integers(0, pico.D_VOCAB, (n, pico.N_POSITIONS + 1))


def test_windows_follow_one_another_and_are_spread_over_the_whole_split() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    everything = windows(tokens, 100, 10**6)
    assert everything.shape == (10, 101)
    assert (everything[:, 0] == np.arange(0, 1000, 100)).all()
    assert everything[-1, -1] == 1000
    some = windows(tokens, 100, 350)
    assert some[:, 0].tolist() == [0, 400, 900]
    assert windows(tokens, 5000, 10).shape == (1, 1001)  # shorter than a window: what there is
    assert windows(tokens, 100, 1).shape == (1, 101)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_figures_are_those_of_the_plain_way(family: str) -> None:
    model, tokens = model_of(family), held_out()
    figures = evaluate(model, tokens, precision="fp32", bytes_per_token=3.0)
    with torch.no_grad():
        ids = torch.from_numpy(tokens)
        logits = model(ids[:, :-1]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        accuracy = (logits.argmax(-1) == ids[:, 1:]).float().mean().item()
    assert figures["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(expected / math.log(2) / 3, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(accuracy)
    assert figures["n_tokens"] == 40 * pico.N_POSITIONS


def test_bfloat16_changes_the_loss_little() -> None:
    model, tokens = model_of("llama"), held_out()
    exact, half = (evaluate(model, tokens, precision=p, bytes_per_token=1.0)["cross_entropy"] for p in ("fp32", "bf16"))
    assert exact != half
    assert half == pytest.approx(exact, rel=0.01)


def test_a_model_compared_with_itself_has_not_changed() -> None:
    model = model_of("gpt2")
    figures = compare(model, model, held_out())
    assert figures["cross_entropy_before"] == figures["cross_entropy_after"]
    assert figures["max_logit_difference"] == figures["kl_divergence"] == 0
    assert figures["logit_scale"] > 0


def test_what_growth_did_is_measured_as_the_plain_way_measures_it() -> None:
    parent, child = model_of("llama", 0), model_of("llama", 1)
    tokens = held_out()
    figures = compare(parent, child, tokens)
    with torch.no_grad():
        ids = torch.from_numpy(tokens)
        old, new = (m(ids[:, :-1]).logits.flatten(0, 1) for m in (parent, child))
        targets = ids[:, 1:].flatten()
    p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
    assert figures["cross_entropy_before"] == pytest.approx(F.nll_loss(p, targets).item(), rel=1e-5)
    assert figures["cross_entropy_after"] == pytest.approx(F.nll_loss(q, targets).item(), rel=1e-5)
    assert figures["kl_divergence"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert figures["max_logit_difference"] == pytest.approx((old - new).abs().max().item(), rel=1e-5)
    assert figures["logit_scale"] == pytest.approx(old.abs().max().item(), rel=1e-5)


class Numbers:
    """A tokenizer that spells each token as its number."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_samples_have_the_same_prompts_for_every_model_and_repeat_themselves() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = list(samples(model_of("llama", 0), Numbers(), held_out(), end_of_text=0))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    again = list(samples(model_of("llama", 0), Numbers(), held_out(), end_of_text=0))
    other = list(samples(model_of("llama", 1), Numbers(), held_out(), end_of_text=0))
    assert first == again
    assert [s["prompt"] for s in first] == [s["prompt"] for s in other]
    assert first != other
    assert len(first) == 3
    assert not any("0" in s["text"].split() for s in first)
