"""What can be grown: a folder, a name on the Hub, a GGUF file; and how the rest is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.hub import hub
from tests.trainer.pico import D_VOCAB, PARENT, logits, save
from trainer.families import FamilyError
from trainer.growth.apply import SourceError, named_weights, open_source
from trainer.growth.sources import locate


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = save(tmp_path_factory.mktemp("parent") / "llama", "llama", PARENT["llama"], tied=False)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Of single characters, and one pair of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [*"abcdefghijklmnopqrstuvwxyzĠ.,:;!?()[]{}0123456789<>"][: D_VOCAB - 2]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, "ab", "</s>"])}, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="</s>")


# Folders


def test_a_name_is_a_path_by_its_spelling_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    assert locate("./llama").config() == locate(str(llama)).config()
    with locate("./llama").folder(llama) as folder:
        assert folder == llama
    with pytest.raises(SourceError, match=r"^llama: there is a file or folder of that name here; write ./llama for it"):
        locate("llama")
    with pytest.raises(SourceError, match="no such file or folder"):
        locate("./llama2")
    with pytest.raises(SourceError, match=r"is a file; the folder that has it, with config.json, would be right"):
        locate("./llama/model.safetensors")


def test_pickles_are_refused_with_a_command_that_converts_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(llama, tmp_path / "pickled")
    torch.save(load_file(llama / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"holds pickled weights, which can run code") as refused:
        named_weights(open_source(tmp_path / "pickled"))
    with pytest.raises(SourceError) as of_the_file:
        locate(str(tmp_path / "pickled" / "pytorch_model.bin"))
    for said in (str(refused.value), str(of_the_file.value)):
        program = re.search(r'python -c "(.*)"$', said)
        assert program is not None
        monkeypatch.chdir(tmp_path)
        shutil.rmtree("pickled-safetensors", ignore_errors=True)
        exec(program[1], {})
        assert (logits(tmp_path / "pickled-safetensors") - logits(llama)).abs().max() == 0
        assert (tmp_path / "pickled-safetensors" / "tokenizer.json").is_file()


def test_a_folder_needs_neither_torch_nor_the_hubs_library(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.growth.sources import locate; at = locate(sys.argv[1]); "
        "at.config(); at.folder(Path('.')).__enter__(); "
        "print(sorted({'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The Hub


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serves files as the model some/one to this process."""
    from contextlib import ExitStack

    from huggingface_hub import constants

    with ExitStack() as stack:

        def serve(files: dict[str, bytes]) -> set[str]:
            fetched: set[str] = set()
            address = stack.enter_context(hub(files, fetched, kind="models"))
            # HF_ENDPOINT was read when the library was loaded, and another process for each of these would take long.
            monkeypatch.setattr(constants, "ENDPOINT", address)
            url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
            return fetched

        yield serve


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_of_a_model_on_the_hub_only_what_growing_needs_is_fetched_and_once(
    llama: Path, on_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("pytorch_model.bin", "modeling_llama.py", "consolidated.safetensors", "onnx/model.onnx", "README.md")
    fetched = on_hub(contents(llama) | dict.fromkeys(more, b"x" * 1000))
    told: list[tuple[int, int, str]] = []
    source = locate("some/one")
    assert source.config() == locate(str(llama)).config()
    assert fetched == {"config.json"}
    with source.folder(tmp_path, lambda *report: told.append(report)) as folder:
        assert contents(folder) == contents(llama)
        assert named_weights(open_source(folder)).keys() == named_weights(open_source(llama)).keys()
    assert fetched == set(contents(llama))
    size = sum(len(content) for name, content in contents(llama).items() if name != "config.json")
    assert told == [(0, size, "fetching"), (size, size, "fetching")]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with locate("some/one").folder(tmp_path, lambda *report: told.append(report)) as folder:
        assert contents(folder) == contents(llama)
    assert len(told) == 2, "nothing was fetched again"


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"config.json": b'{"model_type": "bloom"}'}, "model_type 'bloom': no family"),
        ({"pytorch_model.bin": b"x"}, r"has only pickled weights.*python -c .*from_pretrained\('some/one'"),
        ({"q4.gguf": b"x"}, "hf download some/one q4.gguf --local-dir one"),
        ({}, "has no model.safetensors and no"),
    ],
)
def test_a_model_on_the_hub_that_cannot_be_grown_is_refused_before_it_is_fetched(
    replaced: dict[str, bytes], said: str, llama: Path, on_hub: Any, tmp_path: Path
) -> None:
    files = contents(llama) | replaced
    if "config.json" not in replaced:
        del files["model.safetensors"]
    fetched = on_hub(files)
    with pytest.raises((FamilyError, SourceError), match=said), locate("some/one").folder(tmp_path):
        pass
    assert not {name for name in fetched if name.endswith((".safetensors", ".bin", ".gguf"))}


def test_a_hub_that_does_not_have_it_is_said_in_a_sentence(on_hub: Any) -> None:
    on_hub({})
    for name, said in {
        "no/such": "Error",
        "some/one/more": "Repo id must",
        "some/one": "config.json: cannot be",
    }.items():
        with pytest.raises((FamilyError, SourceError), match=said):
            locate(name).config()


# GGUF


def as_gguf(folder: Path, path: Path, architecture: str = "llama", **more: Any) -> Path:
    """A Llama as llama.cpp has it: its own names, and the rows of each head's queries and keys in pairs."""
    from gguf import GGUFWriter, RopeScalingType, TokenType
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(more.get("theta", config["rope_parameters"]["rope_theta"]))
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    if "scaling" in more:
        writer.add_rope_scaling_type(RopeScalingType(more["scaling"]))
    names = {
        "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.": "attn_",
        "o_proj": "output", "mlp.": "ffn_", "_proj": "", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "layers": "blk", "model.": "",
    }  # fmt: skip
    for name, values in load_file(folder / "model.safetensors").items():
        for part, other in {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.items():
            if part in name:
                heads = values.reshape(config[other], 2, config["head_dim"] // 2, -1)
                values = heads.swapaxes(1, 2).reshape(values.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_it_was_made_from(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "folder").mkdir()
    file = as_gguf(llama, tmp_path / "folder" / "pico.gguf")
    for name in (file, file.parent):
        assert locate(str(name)) == locate(str(file))
    described = open_source(llama).described
    with locate(str(file)).folder(tmp_path / "scratch") as folder:
        found = open_source(folder)
        eps = found.described.shape.layer_norm_eps  # stored in float32
        assert eps == pytest.approx(described.shape.layer_norm_eps)
        assert found.described._replace(shape=described.shape) == described
        assert found.described.shape == described.shape.model_copy(update={"layer_norm_eps": eps})
        assert (logits(folder) - logits(llama)).abs().max() < 1e-5
        ids = [AutoTokenizer.from_pretrained(at)("a fox, a dog.").input_ids for at in (folder, llama)]
        assert ids[0][-13:] == ids[1][-13:]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_gguf_file_that_would_be_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"GGML" + bytes(100))
    for path, said in {
        tmp_path / "not.gguf": "cannot be read as GGUF",
        as_gguf(llama, tmp_path / "falcon.gguf", "falcon"): "architecture 'falcon': can be grown are",
        as_gguf(llama, tmp_path / "olmo2.gguf", "olmo2"): "architecture olmo2 is not supported yet",
        as_gguf(llama, tmp_path / "scaled.gguf", scaling="yarn"): "its RoPE is scaled",
        as_gguf(llama, tmp_path / "theta.gguf", "starcoder2", theta=500.0): "does not read its rope_theta, 500; use",
    }.items():
        with pytest.raises((FamilyError, SourceError), match=said):
            locate(str(path)).config()
    with pytest.raises(SourceError, match=r"holds 5 GGUF files; name one of them, such as .*falcon.gguf"):
        locate(str(tmp_path))
