"""Windows and RoPE: how far a block of a grown model looks back, and how it tells one place from another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import pico
from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, exact_logits, grow
from trainer.families import FamilyError, build_model, get_family, read_config
from trainer.growth import GrowthError, GrowthPlan, plan
from trainer.growth.apply import grow_checkpoint, open_source
from trainer.shape import Shape

SLIDING, FULL = "sliding_attention", "full_attention"
#: Shorter than the text by far.
WINDOW = 4


def save(folder: Path, family: str, shape: Shape, **config: Any) -> Path:
    """In float64, so that no rounding hides what growth does."""
    return pico.save(folder, family, shape, dtype="float64", **config)


def grown(source: Path, to: Shape, depth: str = "identity") -> tuple[GrowthPlan, Path]:
    opened = open_source(source)
    shape, n_positions, d_vocab, tied = opened.described
    made = plan(opened.family.name, shape, to, grow(depth=depth), n_positions=n_positions, d_vocab=d_vocab, tied=tied)
    grow_checkpoint(source, source.with_name("child"), made, seed=0)
    return made, source.with_name("child")


def rewrite(folder: Path, without: Iterable[str] = (), **fields: Any) -> None:
    """Give a checkpoint's config other fields, as other versions of transformers wrote it."""
    config = {name: value for name, value in read_config(folder).items() if name not in without} | fields
    (folder / "config.json").write_text(json.dumps(config))


# --- Windows ----------------------------------------------------------------------------------------------------------

#: What a config says of its windows, and the kinds of its two blocks.
WINDOWED: dict[str, tuple[dict[str, Any], list[str] | None]] = {
    "mistral": ({}, None),
    "phi3": ({}, None),
    "starcoder2": ({}, None),
    "qwen2": ({"use_sliding_window": True, "max_window_layers": 1}, [FULL, SLIDING]),
    "qwen3": ({"use_sliding_window": True, "layer_types": [SLIDING, FULL]}, [SLIDING, FULL]),
    "gemma2": ({}, [SLIDING, FULL]),
    "gemma3_text": ({"sliding_window_pattern": 2}, [SLIDING, FULL]),
}


@pytest.mark.parametrize("family", WINDOWED)
def test_blocks_keep_their_windows_when_others_come_between_them(family: str, tmp_path: Path) -> None:
    stated, kinds = WINDOWED[family]
    source = save(
        tmp_path / "parent", family, PARENT[family], **{"sliding_window": WINDOW, "layer_types": kinds, **stated}
    )
    if "layer_types" not in stated:
        rewrite(source, without=["layer_types", "_sliding_window_pattern"], **stated)
    made, out = grown(source, child(family, d_model=24, n_layers=4))

    before, after = exact_logits(source), exact_logits(out)
    assert made.preserves
    assert (before - after).abs().max() < 1e-10
    assert read_config(out).get("layer_types") == (kinds and [kind for kind in kinds for _ in range(2)])
    assert read_config(out)["sliding_window"] == WINDOW

    rewrite(source, sliding_window=N_POSITIONS)
    assert (exact_logits(source) - before).abs().max() > 0.1, "windows that are felt"


def test_a_block_that_runs_again_has_the_same_window_again(tmp_path: Path) -> None:
    source = save(tmp_path / "parent", "gemma2", PARENT["gemma2"], layer_types=[FULL, SLIDING])
    _, out = grown(source, child("gemma2", n_layers=4), depth="stack")

    assert read_config(out)["layer_types"] == [FULL, SLIDING, FULL, SLIDING]


def test_without_sources_kinds_stay_or_are_the_architectures_own() -> None:
    gemma2, qwen3 = get_family("gemma2"), get_family("qwen3")
    config = gemma2.config(PARENT["gemma2"], N_POSITIONS, D_VOCAB, True) | {"layer_types": [FULL, SLIDING]}

    assert gemma2.resized(config, child("gemma2", d_mlp=40))["layer_types"] == [FULL, SLIDING]
    assert gemma2.resized(config, child("gemma2", n_layers=3))["layer_types"] == [SLIDING, FULL, SLIDING]
    assert qwen3.resized(config | {"layer_types": [FULL] * 2}, child("qwen3", n_layers=3))["layer_types"] == [FULL] * 3


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("qwen2", {"layer_types": [SLIDING, FULL]}, "has sliding_attention, but there is no sliding_window"),
        ("gemma2", {"layer_types": [SLIDING, "chunked_attention"]}, "'chunked_attention': growth knows"),
        ("gemma2", {"layer_types": [SLIDING]}, "names 1 blocks, where 2 would be right"),
        ("gemma2", {"sliding_window": "4"}, "sliding_window '4': must be a whole number"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ],
)
def test_windows_that_growth_cannot_carry_are_refused(family: str, config: dict[str, Any], said: str) -> None:
    described = get_family(family)
    with pytest.raises(FamilyError, match=said):
        described.shape_of(described.config(PARENT[family], N_POSITIONS, D_VOCAB, True) | config)


# --- RoPE -------------------------------------------------------------------------------------------------------------

FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
#: Each kind of RoPE; the text is three times as long as what the scaled ones were trained with.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": N_POSITIONS // 3,
    },
    "yarn": {"factor": 3.0, "beta_fast": 2.0, "beta_slow": 0.1, "original_max_position_embeddings": N_POSITIONS // 3},
    "dynamic": {"factor": 3.0},
    "longrope": {"original_max_position_embeddings": N_POSITIONS // 3, **FACTORS},
}
ROPES = {kind: {"rope_type": kind, "rope_theta": 50.0, **settings} for kind, settings in ROPES.items()}


def speeds(config: dict[str, Any], text: int = N_POSITIONS) -> tuple[torch.Tensor, float]:
    """A model's radians a position (R / 2) on a text of that many tokens, and what cos and sin are multiplied with."""
    rotary = build_model(json.loads(json.dumps(config))).model.rotary_emb
    rotary(torch.zeros(1), torch.arange(text)[None])
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", k) for k in ROPES), ("phi3", "longrope"), ("starcoder2", "yarn")]
)
def test_every_kind_of_rope_is_carried_along_where_d_head_stays(family: str, kind: str, tmp_path: Path) -> None:
    """To float64 rounding: speeds and text are the same to the last bit."""
    square = {"d_model": 24} if family == "phi3" else {}
    parent = child(family, **square)
    own = {"max_position_embeddings": N_POSITIONS // 3} if kind == "dynamic" else {}
    own |= {"original_max_position_embeddings": N_POSITIONS // 3} if kind == "longrope" else {}
    source = save(tmp_path / "parent", family, parent, rope_parameters=ROPES[kind], **own)
    to = parent.model_copy(update={"d_model": 48, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 33, "n_layers": 3})
    made, out = grown(source, to)

    assert made.preserves
    before = exact_logits(source)
    assert (before - exact_logits(out)).abs().max() < 1e-10
    if kind != "default":
        rewrite(source, rope_parameters=ROPES["default"])
        assert (before - exact_logits(source)).abs().max() > 0.01, "a scaling that is felt"


@pytest.mark.parametrize("kind", ROPES)
def test_a_longer_context_leaves_speeds_as_they_were(kind: str) -> None:
    """On texts that the parent could read. Where the trained context is not stated, it is the old longest one."""
    family = get_family("llama")
    rope = {name: value for name, value in ROPES[kind].items() if kind != "llama3" or not name.startswith("original")}
    if kind == "yarn":
        rope["factor"] = None
    config = family.config(PARENT["llama"], N_POSITIONS, D_VOCAB, True) | {"rope_parameters": rope}
    longer = family.extended(config, n_positions=5 * N_POSITIONS, d_vocab=D_VOCAB)

    for text in (N_POSITIONS // 4, N_POSITIONS):
        (old, old_scale), (new, new_scale) = speeds(config, text), speeds(longer, text)
        assert torch.equal(old, new)
        assert old_scale == new_scale


@pytest.mark.parametrize("kind", ROPES)
def test_pairs_of_a_wider_head_turn_as_they_did_or_it_is_refused(kind: str, tmp_path: Path) -> None:
    rope = ROPES[kind] | ({"short_factor": [1.0] * 2, "long_factor": [2.0] * 2} if kind == "longrope" else {})
    source = save(tmp_path / "parent", "llama", PARENT["llama"], rope_parameters=rope)
    stays = {"default", "linear", "llama3", "yarn"}  # with theta raised; where pairs move instead, YaRN's ramp does not
    for d_head, kept in ((6, stays), (8, stays - {"yarn"})):
        shape = child("llama", d_head=d_head)
        if kind not in kept:
            with pytest.raises(GrowthError, match=rf"RoPE \({kind}\) sets its frequencies by d_head"):
                grown(source, shape)
            continue
        made, out = grown(source, shape)
        places = [0, 1] if d_head == 6 else [0, 2]

        torch.testing.assert_close(
            speeds(read_config(out))[0][places], speeds(read_config(source))[0], rtol=1e-6, atol=0
        )
        assert made.preserves
        assert (exact_logits(source) - exact_logits(out)).abs().max() < 1e-5  # speeds are in float32
        for path in [*out.iterdir()]:
            path.unlink()


def test_a_wider_head_of_phi3_rotates_the_channels_that_it_did(tmp_path: Path) -> None:
    """Whatever the kind: longrope has a factor for each pair, and there are as many as before."""
    rope = ROPES["longrope"] | {"short_factor": [1.0], "long_factor": [2.0], "partial_rotary_factor": 0.5}
    parent = child("phi3", d_model=24)
    settings = {"rope_parameters": rope, "original_max_position_embeddings": N_POSITIONS // 3}
    source = save(tmp_path / "parent", "phi3", parent, **settings)
    made, out = grown(source, parent.model_copy(update={"d_model": 36, "d_head": 6}))

    assert made.preserves
    assert torch.equal(speeds(read_config(source))[0], speeds(read_config(out))[0])
    assert (exact_logits(source) - exact_logits(out)).abs().max() < 1e-10
    assert "head_dim" not in read_config(out)
    with pytest.raises(FamilyError, match=r"n_heads \(6\) x d_head: 36 would be right"):
        get_family("phi3").resized(read_config(source), parent.model_copy(update={"d_head": 6}))


def test_both_ropes_of_gemma3_are_carried_and_raised(tmp_path: Path) -> None:
    ropes = {FULL: ROPES["linear"], SLIDING: ROPES["default"] | {"rope_theta": 10.0}}
    settings = {"rope_parameters": ropes, "layer_types": [SLIDING, FULL], "sliding_window": WINDOW}
    source = save(tmp_path / "parent", "gemma3_text", PARENT["gemma3_text"], **settings)
    made, out = grown(source, child("gemma3_text", d_head=6, n_layers=3))

    assert made.preserves
    assert (exact_logits(source) - exact_logits(out)).abs().max() < 1e-5  # speeds are in float32
    thetas = {kind: rope["rope_theta"] for kind, rope in read_config(out)["rope_parameters"].items()}
    assert thetas == {FULL: 50.0**1.5, SLIDING: 10.0**1.5}


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional"}},
            "rope_type 'proportional': Llama has default, dyn",
        ),
        ("phi3", {"rope_scaling": {"type": "linear"}}, "rope_type 'linear': Phi-3 has default, longrope"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: Llama rotates whole heads"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 2}}, "must be a share of d_head"),
    ],
)
def test_a_rope_that_the_architecture_does_not_have_is_refused(family: str, config: dict[str, Any], said: str) -> None:
    described = get_family(family)
    with pytest.raises(FamilyError, match=said):
        described.shape_of(described.config(PARENT[family], N_POSITIONS, D_VOCAB, True) | config)


def test_the_first_files_of_phi3_call_longrope_by_other_names() -> None:
    for name in ("su", "yarn"):
        assert get_family("phi3").rope_kinds({"rope_scaling": {"type": name}}) == {"longrope"}
