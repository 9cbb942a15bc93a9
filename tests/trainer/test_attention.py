from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.trainer import pico
from trainer.attention import LONGEST, _CausalAttention, use_in
from trainer.families import build_model, get_family


def test_attention_and_its_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    shape = (3, 4, 37, 8)
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    upstream = torch.randn(shape, dtype=torch.float64)
    out = _CausalAttention.apply(*(x.flatten(0, 1) for x in ours), 0.3).unflatten(0, shape[:2])  # type: ignore[no-untyped-call]
    out.backward(upstream)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True, scale=0.3)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def outcome(family: str, ours: bool, half: bool, t: int) -> tuple[Any, dict[str, Any]]:
    """Hidden states and gradients of a model with grouped key/value heads."""
    torch.manual_seed(0)
    model = build_model(get_family(family).config(pico.PARENT[family], 2 * LONGEST, pico.D_VOCAB, True))
    if ours:
        use_in(model)
    ids = torch.randint(0, pico.D_VOCAB, (2, t))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.float().pow(2).mul(torch.linspace(0, 1, hidden.shape[-1])).sum().backward()
    return hidden.detach().float(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("half", "t"), [(False, 24), (True, LONGEST + 1)])
def test_where_torchs_own_is_better_it_is_torchs_own(family: str, half: bool, t: int) -> None:
    ours, theirs = outcome(family, True, half, t), outcome(family, False, half, t)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_bfloat16_a_model_is_as_near_to_float32_as_with_torchs_own(family: str) -> None:
    exact = outcome(family, False, False, 24)
    ours, theirs = outcome(family, True, True, 24), outcome(family, False, True, 24)
    assert not torch.equal(ours[0], theirs[0])  # it is another computation

    def error(got: tuple[Any, dict[str, Any]]) -> list[float]:
        pairs = [(got[0], exact[0]), *((got[1][name], exact[1][name]) for name in exact[1])]
        return [((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs]

    assert max(error(ours)) < 2 * max(error(theirs)) + 1e-3
    assert error(ours)[0] < 0.01


@pytest.mark.parametrize("window", [8, 24])
def test_a_sliding_window_is_attended_through(window: int) -> None:
    said = []
    for ours in (False, True):
        torch.manual_seed(0)
        config = get_family("mistral").config(pico.PARENT["mistral"], 64, pico.D_VOCAB, True, init_range=0.5)
        model = build_model(config | {"sliding_window": window}).eval()
        if ours:
            use_in(model)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            said.append(model(torch.arange(24)[None]).logits.float())
    assert (said[0] - said[1]).norm() < 0.02 * said[0].norm()


def test_generating_with_a_cache_says_the_same() -> None:
    said = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = build_model(get_family("llama").config(pico.PARENT["llama"], 64, pico.D_VOCAB, True)).eval()
        if ours:
            use_in(model)
        ids = torch.arange(10)[None]
        said.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False))
    assert torch.equal(*said)


def test_how_a_model_attends_is_not_written_into_its_config(tmp_path: Any) -> None:
    model = build_model(get_family("llama").config(pico.PARENT["llama"], 64, pico.D_VOCAB, True))
    use_in(model)
    model.save_pretrained(tmp_path)
    assert "kangaroo" not in (tmp_path / "config.json").read_text()
