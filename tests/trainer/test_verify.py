"""`python -m trainer verify`: pairs of checkpoints, grown here, spoilt, or made by something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.pico import D_VOCAB, PARENT, child, grow, save
from tests.trainer.texts import trainer
from trainer.growth import plan
from trainer.growth.apply import grow_checkpoint, open_source
from trainer.shape import Shape
from trainer.verify import VerifyError, judge, verify

WIDER: dict[str, dict[str, int]] = {
    "gpt2": {"d_model": 24, "n_heads": 6, "d_mlp": 40},
    "gpt_neox": {"d_model": 72, "n_heads": 6, "d_head": 12, "d_mlp": 40},
    "llama": {"d_model": 24, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 60},
}


def pair(folder: Path, family: str, to: Shape, width: str = "duplicate", depth: str = "identity", **how: Any) -> Any:
    """SMALL, LARGE and a text, in `folder`."""
    small, large = folder / "small", folder / "large"
    save(small, family, PARENT[family], tied=how.pop("tied", True), dtype=how.pop("dtype", "float32"))
    write_tokenizer(small)
    shape, n_positions, d_vocab, tied = open_source(small).described
    init = grow(width, depth, **how)
    made = plan(family, shape, to, init, n_positions=n_positions, d_vocab=d_vocab, tied=tied)
    grow_checkpoint(small, large, made, seed=0)
    (folder / "text.txt").write_text("".join(chr(97 + i * i % 26) + " " * (i % 3 == 0) for i in range(400)))
    return small, large, folder / "text.txt"


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(97 + i): i for i in range(26)} | {" ": 26}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def spoil(folder: Path, name: str, by: float = 0.05) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name].flat[0] += by
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("family", WIDER)
def test_what_was_grown_here_is_proven_and_measured(family: str, noise: float, tmp_path: Path) -> None:
    small, large, text = pair(tmp_path, family, child(family, **WIDER[family], n_layers=3), noise=noise)
    found = verify(small, large, text)

    assert found.verdict == "kept"
    assert found.plan is not None
    assert (found.plan.init.width, found.plan.init.depth) == ("duplicate", "identity")
    assert (found.broken, found.config) == ([], [])
    assert found.measured is not None
    assert found.measured["max_logit_difference"] < 1e-3
    assert verify(small, large).verdict == "kept", "without a forward pass too"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_held_to_its_own_rounding(dtype: str, tmp_path: Path) -> None:
    assert verify(*pair(tmp_path, "llama", child("llama", d_mlp=60), dtype=dtype)).verdict == "kept"


@pytest.mark.parametrize("depth", ["stack", "interleave", "solar", "append_random"])
def test_the_depth_rule_is_found_and_what_it_loses_said(depth: str, tmp_path: Path) -> None:
    small, large, text = pair(tmp_path, "gpt_neox", child("gpt_neox", n_layers=3), depth=depth)
    found = verify(small, large)

    assert found.plan is not None
    assert found.verdict == "changed"
    assert {c.source for c in found.tensors} <= {c.name for c in found.tensors}
    expected = plan_blocks(depth)
    assert [b.source for b in found.plan.blocks] == expected
    assert verify(small, large, text).verdict == "changed"


def plan_blocks(depth: str) -> list[int | None]:
    return {"stack": [0, 1, 1], "interleave": [0, 0, 1], "solar": [0, 1, 1], "append_random": [0, 1, None]}[depth]


def test_random_padding_is_known_by_its_corners_and_its_readers_break_the_promise(tmp_path: Path) -> None:
    found = verify(*pair(tmp_path, "llama", child("llama", d_mlp=40), width="random_pad")[:2])

    assert found.plan is not None
    assert found.plan.init.width == "random_pad"
    assert {c.name for c in found.broken} == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all(c.copied for c in found.broken)
    assert found.verdict == "changed"


def test_a_single_wrong_weight_is_named(tmp_path: Path) -> None:
    small, large, text = pair(tmp_path, "gpt_neox", child("gpt_neox", **WIDER["gpt_neox"]))
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    spoil(large, name)
    done = trainer("verify", small, large, "--text", text)

    assert [c.name for c in verify(small, large).broken] == [name]
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("CHANGED: ")
    [line] = [line for line in done.stdout.splitlines() if line.startswith(name)]
    assert "is not what the plan copies" in line
    assert "loss before and after" in done.stdout


def test_a_config_that_says_something_else_is_no_proof(tmp_path: Path) -> None:
    small, large, text = pair(tmp_path, "gpt2", child("gpt2", d_mlp=40))
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    found = verify(small, large)

    assert (found.verdict, found.broken) == ("unknown", [])
    assert found.config[0].startswith("activation_function: 'relu'")
    assert verify(small, large, text).verdict == "changed"


def test_a_model_that_no_rule_explains_is_measured_only(tmp_path: Path) -> None:
    small, _, text = pair(tmp_path, "llama", child("llama", d_mlp=40))
    save(tmp_path / "other", "llama", child("llama", d_mlp=41))
    spoil(tmp_path / "other", "model.embed_tokens.weight")
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    other = load_file(tmp_path / "other/model.safetensors")
    save_file({n: rng.normal(0, 0.4, v.shape).astype(np.float32) for n, v in other.items()},
              tmp_path / "other/model.safetensors", {"format": "pt"})  # fmt: skip

    assert verify(small, tmp_path / "other").verdict == "unknown"
    found = verify(small, tmp_path / "other", text)
    assert (found.plan, found.tensors, found.verdict) == (None, [], "changed")
    assert trainer("verify", small, tmp_path / "other").returncode == 2


def test_an_untied_copy_of_a_tied_model_is_kept_by_measure(tmp_path: Path) -> None:
    """As some tools leave it: no rule here unties."""
    from safetensors.numpy import load_file, save_file

    small, large, text = pair(tmp_path, "gpt2", PARENT["gpt2"])
    tensors = load_file(large / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    found = verify(small, large, text)

    assert (found.plan, found.verdict) == (None, "kept")
    assert verify(small, large).verdict == "unknown"


def test_the_json_has_every_tensor_and_needs_no_torch_without_a_text(tmp_path: Path) -> None:
    small, large, _ = pair(tmp_path, "llama", child("llama", n_layers=3))
    code = (
        "import sys; from trainer.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "verify", str(small), str(large), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)

    assert done.stderr == "[]\n"
    assert found["verdict"] == "kept"
    assert found["plan"] | {"because": ""} == {
        "width": "duplicate",
        "depth": "identity",
        "preserves": True,
        "because": "",
    }
    assert len(found["tensors"]) == 3 * 9 + 2
    assert (found["broken"], found["measured"]) == ([], None)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    small, large, text = pair(tmp_path, "llama", child("llama", d_mlp=40))
    save(tmp_path / "other", "gpt2", PARENT["gpt2"])
    with pytest.raises(VerifyError, match="GPT-2"):
        verify(small, tmp_path / "other")
    with pytest.raises(VerifyError, match="cannot be read"):
        verify(small, large, tmp_path / "nowhere")
    with pytest.raises(VerifyError, match="has no tokenizer"):
        verify(tmp_path / "bare", large, text) if save(tmp_path / "bare", "llama", PARENT["llama"]) else None
    done = trainer("verify", small, tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be read" in done.stderr


def test_logits_that_are_no_numbers_are_a_change() -> None:
    measured = {"max_logit_difference": float("nan"), "logit_scale": 1.0}
    assert judge(None, [], [], measured, {"F32"})[0] == "changed"
    assert D_VOCAB > 27
