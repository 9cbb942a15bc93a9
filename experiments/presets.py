"""Experiments to start from, as cards on the Train page. Each is a whole spec, checked when this module is imported."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.spec import ExperimentSpec, parse_spec


class Preset(NamedTuple):
    key: str
    title: str
    line: str  # what it is for, in a sentence
    cost: str  # what it takes
    spec: ExperimentSpec


def _shape(d_model: int, n_heads: int, d_head: int, d_mlp: int, n_layers: int) -> dict[str, Any]:
    return {"d_model": d_model, "n_heads": n_heads, "d_head": d_head, "d_mlp": d_mlp, "n_layers": n_layers}


def _spec(
    name: str,
    small: dict[str, Any],
    large: dict[str, Any],
    *,
    width: str,
    depth: str,
    family: str = "llama",
    data: dict[str, Any],
    train: dict[str, Any],
) -> ExperimentSpec:
    model = {"family": family, "shape": large}
    return parse_spec(
        {
            "name": name,
            "data": data,
            "train": train,
            "models": {
                "small": {"family": family, "shape": small, "init": {"kind": "random"}},
                "scaled": model | {"init": {"kind": "grow", "parent": "small", "width": width, "depth": depth}},
                "large": model | {"init": {"kind": "random"}},
            },
        }
    )


FIRST_LOOK = Preset(
    key="first-look",
    title="First look",
    line="Two tiny models on Python source, small enough to watch.",
    cost="minutes on two cores",
    spec=_spec(
        "First look",
        _shape(128, 2, 64, 512, 2),
        _shape(256, 4, 64, 1024, 4),
        width="duplicate",
        depth="identity",
        data={"source": "python-stdlib", "tokenizer": {"kind": "bpe", "d_vocab": 2048}},
        train={"n_ctx": 128, "batch_size": 8, "max_steps": 300, "lr": 1e-3, "warmup_steps": 30, "eval_every": 25},
    ),
)

PRESERVING = Preset(
    key="preserving",
    title="Function-preserving pair",
    line="Twice as wide and deep; scaled begins by computing what small does.",
    cost="an hour or two on two cores",
    spec=_spec(
        "Function-preserving pair",
        _shape(256, 4, 64, 1024, 4),
        _shape(512, 8, 64, 2048, 8),
        width="duplicate",
        depth="identity",
        data={"source": "python-stdlib", "tokenizer": {"kind": "bpe", "d_vocab": 4096}},
        train={"n_ctx": 256, "batch_size": 8, "max_steps": 1000, "lr": 6e-4, "warmup_steps": 100, "eval_every": 50},
    ),
)

ORIGINAL = Preset(
    key="original",
    title="The original Kangaroo's",
    line="Its shapes, text, batch and steps. n_ctx, vocabulary and learning rate are our choice.",
    cost="days on two cores, hours on a GPU",
    spec=_spec(
        "The original Kangaroo's",
        _shape(256, 4, 64, 512, 2),
        _shape(512, 4, 64, 1024, 4),
        width="random_pad",
        depth="append_random",
        data={
            "source": "wikitext",
            "config": "wikitext-103-raw-v1",
            "tokenizer": {"kind": "bpe", "d_vocab": 16_384},
        },
        train={
            "n_ctx": 256,
            "batch_size": 8,
            "max_steps": 25_000,
            "lr": 1e-3,
            "warmup_steps": 500,
            "eval_every": 500,
            "checkpoint_every": 2500,
        },
    ),
)

GPU = Preset(
    key="gpu",
    title="GPU-sized",
    line="GPT-2's size made twice as wide and deep, on WikiText-103.",
    cost="hours on one large GPU",
    spec=_spec(
        "GPU-sized",
        _shape(768, 12, 64, 3072, 12),
        _shape(1536, 24, 64, 6144, 24),
        width="duplicate",
        depth="stack",
        data={
            "source": "wikitext",
            "config": "wikitext-103-raw-v1",
            "tokenizer": {"kind": "bpe", "d_vocab": 32_768},
        },
        train={
            "n_ctx": 1024,
            "batch_size": 8,
            "max_steps": 20_000,
            "lr": 3e-4,
            "warmup_steps": 500,
            "eval_every": 250,
            "eval_tokens": 262_144,
            "checkpoint_every": 1000,
        },
    ),
)

PRESETS = {preset.key: preset for preset in (FIRST_LOOK, PRESERVING, ORIGINAL, GPU)}
