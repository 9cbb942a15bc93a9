"""Gemma: caps on scores and logits; a text model beside a vision tower. All else is tested with the other families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.trainer import pico
from trainer import evaluate
from trainer.attention import use_in
from trainer.families import FamilyError, build_model, family_of, get_family
from trainer.train import Objective


def gemma2(**config: Any) -> Any:
    """One whose caps are felt: logits and scores are far beyond them."""
    made = get_family("gemma2").config(pico.PARENT["gemma2"], pico.N_POSITIONS, pico.D_VOCAB, True)
    torch.manual_seed(0)
    model = build_model(made | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.double()


def test_the_loss_and_its_gradients_are_those_of_capped_logits() -> None:
    model, ids = gemma2(), torch.randint(0, pico.D_VOCAB, (2, pico.N_POSITIONS + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = model(inputs).logits
    assert 2 < logits.abs().max() < 3

    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(theirs, list(model.parameters()))
    use_in(model)
    ours = Objective(model, compiled=False)(inputs, targets)
    got = torch.autograd.grad(ours, list(model.parameters()))

    torch.testing.assert_close(ours, theirs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_evaluation_caps_logits_too() -> None:
    model, ids = gemma2().float(), np.arange(2 * pico.N_POSITIONS).reshape(2, -1) % pico.D_VOCAB
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[:, :-1])).logits
    expected = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())

    measured = evaluate.evaluate(model, ids, precision="fp32", bytes_per_token=1.0)
    assert measured["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_text_model_is_parted_from_its_vision_tower_as_the_docs_say(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    with pytest.raises(FamilyError, match="vision tower; save its text model by itself"):
        family_of({"model_type": "gemma3"})
    text = get_family("gemma3_text").config(pico.PARENT["gemma3_text"], pico.N_POSITIONS, 60, True)
    sight = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sight |= {"image_size": 4, "patch_size": 2}
    both = Gemma3Config(
        text_config=text, vision_config=sight, image_token_index=59, boi_token_index=58, eoi_token_index=57
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(both).save_pretrained(tmp_path / "both")

    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "both", dtype="auto")
    parted = Gemma3ForCausalLM(whole.config.text_config)
    parted.model = whole.model.language_model
    parted.tie_weights()
    parted.save_pretrained(tmp_path / "text")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert family_of(model.config.to_dict()).name == "gemma3_text"
