"""The axes of every parameter, and the way between a shape and config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child
from trainer.families import (
    FAMILIES,
    FamilyError,
    axis_sizes,
    build_model,
    family_of,
    get_family,
    read_config,
)
from trainer.shape import Shape

SHAPES = [
    ("gpt2", PARENT["gpt2"]),
    ("gpt2", child("gpt2", d_model=16, n_heads=2, d_head=8, n_layers=3)),
    ("gpt_neox", PARENT["gpt_neox"]),
    ("gpt_neox", child("gpt_neox", d_model=16, n_heads=2, n_layers=3)),
    ("llama", PARENT["llama"]),
    ("llama", child("llama", n_kv_heads=None, n_layers=1)),
    ("llama", child("llama", d_model=18, d_head=10, d_mlp=7)),
    ("mistral", PARENT["mistral"]),
    ("mistral", child("mistral", d_model=14, d_head=10, n_kv_heads=None, n_layers=3)),
    ("olmo2", PARENT["olmo2"]),
    ("olmo2", child("olmo2", d_model=14, d_head=10, n_kv_heads=None, n_layers=3)),
    ("qwen2", PARENT["qwen2"]),
    ("qwen2", child("qwen2", d_model=14, d_head=10, n_kv_heads=None, n_layers=3)),
    ("qwen3", PARENT["qwen3"]),
    ("qwen3", child("qwen3", d_model=14, d_head=10, n_kv_heads=None, n_layers=3)),
    ("gemma", PARENT["gemma"]),
    ("gemma", child("gemma", d_model=14, d_head=10, n_kv_heads=None, n_layers=3)),
    ("gemma2", PARENT["gemma2"]),
    ("gemma2", child("gemma2", d_model=18, d_head=10, n_kv_heads=None, n_layers=3)),
    ("gemma3_text", PARENT["gemma3_text"]),
    ("gemma3_text", child("gemma3_text", d_model=18, d_head=10, n_kv_heads=None, n_layers=7)),
    ("phi3", PARENT["phi3"]),
    ("phi3", child("phi3", d_model=60, d_head=10, n_kv_heads=None, n_layers=3)),
    ("starcoder2", PARENT["starcoder2"]),
    ("starcoder2", child("starcoder2", d_model=60, d_head=10, n_kv_heads=None, n_layers=3)),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_the_table_has_the_names_shapes_and_order_of_the_real_model(family: str, shape: Shape, tied: bool) -> None:
    described = get_family(family)
    model = build_model(described.config(shape, N_POSITIONS, D_VOCAB, tied))

    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = described.parameters(shape, N_POSITIONS, D_VOCAB, tied)
    table = {described.also_named.get(p.name, p.name): p.shape for p in stored}

    assert table == real
    assert list(table) == list(real)


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_each_parameter_is_as_large_as_its_axes(family: str, shape: Shape) -> None:
    sizes = axis_sizes(shape, N_POSITIONS, D_VOCAB)
    for parameter in get_family(family).parameters(shape, N_POSITIONS, D_VOCAB, tied=False):
        out = 0
        for segment in parameter.out:
            width = 1
            for axis in segment:
                width *= sizes[axis]
            out += width
        into = 1
        for axis in parameter.into:
            into *= sizes[axis]
        assert parameter.size == out * into, parameter.name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_a_config_gives_its_shape_back(family: str, shape: Shape, tied: bool) -> None:
    described = get_family(family)
    config = described.config(shape, N_POSITIONS, D_VOCAB, tied, eos_token_id=3)

    assert described.shape_of(config) == (shape, N_POSITIONS, D_VOCAB, tied)
    assert family_of(config) is described


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_transformers_reads_the_config_as_it_was_meant(family: str, shape: Shape, tmp_path: Path) -> None:
    from transformers import AutoConfig

    described = get_family(family)
    config = described.config(shape, N_POSITIONS, D_VOCAB, True, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)

    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 3)
    assert described.shape_of(read.to_dict()) == (shape, N_POSITIONS, D_VOCAB, True)
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    assert described.shape_of(read_config(tmp_path)) == (shape, N_POSITIONS, D_VOCAB, True)


def test_a_gpt2_made_here_has_no_dropout_and_the_one_op_activation() -> None:
    config = build_model(get_family("gpt2").config(PARENT["gpt2"], N_POSITIONS, D_VOCAB, True)).config

    assert config.activation_function == "gelu_pytorch_tanh"
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0, 0, 0)


def test_another_size_keeps_everything_else_of_a_config() -> None:
    config = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 2,
        "task_specific_params": {"a": 1},
    }
    resized = get_family("gpt2").resized(config, child("gpt2", n_layers=5))

    assert resized["activation_function"] == "gelu_new"
    assert resized["task_specific_params"] == {"a": 1}
    assert resized["n_layer"] == 5


@pytest.mark.parametrize(
    ("family", "changes", "field", "right"),
    [
        ("llama", {"d_head": 47}, "d_head", "46 or 48"),
        ("llama", {"n_kv_heads": 4}, "n_kv_heads", "1, 2, 3, 6"),
        ("llama", {"d_model": 100}, "d_model", "96 or 102"),
        ("gpt2", {"d_head": 5}, "d_head", "d_head 4 or d_model 15"),
        ("gpt2", {"n_heads": 4}, "d_head", "d_head 3 or n_heads 3 or d_model 16"),
        ("gpt2", {"n_kv_heads": 1}, "n_kv_heads", "leave it out"),
        ("gpt_neox", {"n_kv_heads": 1}, "n_kv_heads", "leave it out"),
        ("gpt_neox", {"d_head": 5}, "d_head", "d_head 8 or d_model 15"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_what_would_be_right(
    family: str, changes: dict[str, Any], field: str, right: str
) -> None:
    [(named, message)] = get_family(family).problems(child(family, **changes))

    assert named == field
    assert right in message


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_suggested_is_right(family: str) -> None:
    assert get_family(family).problems(PARENT[family]) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "bert"},
            "model_type 'bert': no family says which axes its tensors have; there are gemma, .* how to add one",
        ),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "llama", "hidden_size": "64"}, "hidden_size '64'"),
        (
            {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "attention_bias": True},
            "attention_bias",
        ),
        (
            {"model_type": "olmo2", "hidden_size": 64, "num_attention_heads": 4, "attention_bias": True},
            "attention_bias True: biases in attention",
        ),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "d_head 3"),
        ({"model_type": "gpt_neox", "attention_bias": False}, "attention_bias False"),
        ({"model_type": "gpt_neox", "rotary_pct": 1.5}, "rotary_pct 1.5: must be a share"),
        ({"model_type": "gpt_neox", "head_dim": 64}, "head_dim 64"),
        ({"model_type": "starcoder2", "use_bias": False}, "use_bias False"),
    ],
)
def test_a_config_that_growth_cannot_carry_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(FamilyError, match=said):
        family_of(config).shape_of(config)


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "an object")])
def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FamilyError, match=said):
        read_config(tmp_path)


def test_fields_that_a_config_leaves_out_are_what_transformers_takes_them_for() -> None:
    from transformers import AutoConfig

    for family in FAMILIES:
        silent = {"model_type": family}
        heard = AutoConfig.for_model(**silent).to_dict()
        sizes = get_family(family).resized({}, get_family(family).shape_of(heard).shape)
        # Sizes that every checkpoint's config has; the rest may be left out.
        stated: dict[str, Any] = {
            field: sizes[field] for field in ("hidden_size", "num_attention_heads") if field in sizes
        }
        stated |= {field: heard[field] for field in ("intermediate_size", "num_hidden_layers") if field in sizes}
        said = AutoConfig.for_model(**silent, **stated, vocab_size=53).to_dict()
        assert get_family(family).shape_of(silent | stated | {"vocab_size": 53}) == get_family(family).shape_of(said)


@pytest.mark.parametrize(
    ("family", "config", "longer"),
    [
        ("gpt2", {"n_positions": 24, "n_ctx": 24}, {"n_positions": 48, "n_ctx": 48}),
        ("gpt_neox", {"rotary_emb_base": 10000}, {"rotary_emb_base": 1e8}),
        ("llama", {}, {"rope_theta": 1e8}),
        ("llama", {"rope_theta": 100.0, "rope_scaling": {"type": "linear"}}, {"rope_theta": 1e4}),
        ("llama", {"rope_parameters": {"rope_theta": 100.0}}, {"rope_parameters": {"rope_theta": 1e4}}),
        (
            "llama",  # where the context that it was trained with was the longest one
            {"max_position_embeddings": 24, "rope_parameters": {"rope_theta": 100.0, "rope_type": "llama3"}},
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "llama3",
                    "original_max_position_embeddings": 24,
                }
            },
        ),
        (
            "llama",
            {
                "max_position_embeddings": 24,
                "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 12},
            },
            {
                "rope_theta": 1e8,
                "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 12, "factor": 2.0},
            },
        ),
    ],
)
def test_a_longer_context_and_another_theta_leave_everything_else_of_a_rope(
    family: str, config: dict[str, Any], longer: dict[str, Any]
) -> None:
    described = get_family(family)
    sized = {described.positions: 48, "vocab_size": 60}

    assert described.extended(config, n_positions=48, d_vocab=60, rope_power=2.0) == config | sized | longer
    assert described.extended(config, n_positions=24, d_vocab=60, rope_power=1.0) == config | {
        described.positions: 24,
        "vocab_size": 60,
    } | ({"n_ctx": 24} if "n_ctx" in config else {})


def test_a_family_says_which_kinds_of_rope_a_config_uses() -> None:
    def kinds(family: str, **config: Any) -> set[str]:
        return get_family(family).rope_kinds(config)

    assert kinds("gpt2") == set()
    assert kinds("llama") == kinds("gpt_neox", rope_parameters={"rope_theta": 1e4}) == {"default"}
    assert kinds("llama", rope_scaling={"type": "linear", "factor": 2.0}) == {"linear"}
    assert kinds("llama", rope_parameters={"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}) == {
        "yarn",
        "default",
    }


#: What config.json of published checkpoints holds beside their sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Gemma 2B": {"model_type": "gemma", "hidden_act": "gelu", "rope_theta": 10000.0, "rope_scaling": None},
    "Gemma 2 2B": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "cache_implementation": "hybrid",
        "rope_theta": 10000.0,
        "sliding_window": 4,
    },
    "Gemma 3 1B": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "Phi-4 mini": {
        "model_type": "phi3",
        "hidden_size": 24,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 8,
        "sliding_window": 262144,
    },
    "Qwen2.5 7B 1M": {
        "model_type": "qwen2",
        "rope_theta": 10000000.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
    },
    "StarCoder2 3B": {
        "model_type": "starcoder2",
        "rope_theta": 999999.4420358813,
        "norm_epsilon": 1e-05,
        "layer_norm_epsilon": 1e-05,
        "residual_dropout": 0.1,
        "sliding_window": 4096,
        "use_bias": True,
    },
    "Pythia": {
        "model_type": "gpt_neox",
        "num_attention_heads": 3,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
}


#: What says nothing of the function: who wrote it, what a list that stands there was once made from.
UNHEARD = ("transformers_version", "_sliding_window_pattern", "cache_implementation", "partial_rotary_factor")


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_config_of_transformers_4_grows_as_the_same_one_of_transformers_5(model: str, tmp_path: Path) -> None:
    """Each grown as it was published, and as transformers 5 writes it: it reads both as one model."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    sizes |= {"intermediate_size": 20, "num_hidden_layers": 4, "vocab_size": D_VOCAB, "max_position_embeddings": 24}
    old = sizes | PUBLISHED[model]
    if old["model_type"] in ("phi3", "gpt_neox", "starcoder2"):
        del old["head_dim"]
    AutoConfig.for_model(**json.loads(json.dumps(old))).save_pretrained(tmp_path)
    new = read_config(tmp_path)
    family = family_of(old)
    described = family.shape_of(old)
    assert described == family.shape_of(new)

    # Every head twice as wide, or half as many again; blocks in another order; a longer context, theta squared.
    shape = described.shape
    wider = {"d_head": 2 * shape.d_head, "d_model": 2 * shape.d_model, "n_layers": 3}
    grown = []
    for config in (old, new):
        sized = family.resized(config, shape.model_copy(update=wider), sources=[1, 1, 2])
        longer = family.extended(sized, n_positions=96, d_vocab=60, rope_power=2.0)
        heard = AutoConfig.for_model(**json.loads(json.dumps(longer))).to_dict()
        grown.append({name: value for name, value in heard.items() if name not in UNHEARD})
    assert grown[0] == grown[1]


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(FamilyError, match="'mamba': must be one of gemma, gemma2"):
        get_family("mamba")


def test_families_growth_plans_and_budgets_need_no_torch() -> None:
    code = (
        "import sys, trainer.families, trainer.growth, trainer.budget; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
