"""Families: the Hugging Face architectures that can be grown. Imports neither torch nor transformers.

`get_family(name)` gives the axes of every parameter and the way between a shape and a config.json; `build_model` turns
such a config into a model. A new family is one module and one line in FAMILIES: docs/extending.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.families.base import Axes, Described, Family, Parameter, axis_sizes
from trainer.families.errors import FamilyError
from trainer.families.gemma import Gemma
from trainer.families.gemma2 import Gemma2
from trainer.families.gemma3_text import Gemma3Text
from trainer.families.gpt2 import Gpt2
from trainer.families.gpt_neox import GptNeoX
from trainer.families.llama import Llama
from trainer.families.mistral import Mistral
from trainer.families.olmo2 import Olmo2
from trainer.families.phi3 import Phi3
from trainer.families.qwen2 import Qwen2
from trainer.families.qwen3 import Qwen3
from trainer.families.starcoder2 import Starcoder2

__all__ = [
    "FAMILIES",
    "Axes",
    "Described",
    "Family",
    "FamilyError",
    "Parameter",
    "axis_sizes",
    "build_model",
    "family_of",
    "get_family",
    "read_config",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Gemma(),
        Gemma2(),
        Gemma3Text(),
        Gpt2(),
        GptNeoX(),
        Llama(),
        Mistral(),
        Olmo2(),
        Phi3(),
        Qwen2(),
        Qwen3(),
        Starcoder2(),
    )
}


def get_family(name: str) -> Family:
    """The family of that name. Raises :class:`FamilyError`."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise FamilyError(f"family {name!r}: must be one of {', '.join(FAMILIES)}") from None


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json's content. Raises :class:`FamilyError`, also for weights that are quantised."""
    model_type = config.get("model_type")
    if model_type == "gemma3":
        raise FamilyError(
            "config.json: model_type 'gemma3': growth has no place for its vision tower; save its text model by itself "
            "(docs/extending.md says how), whose model_type is 'gemma3_text'"
        )
    if model_type not in FAMILIES:
        raise FamilyError(
            f"config.json: model_type {model_type!r}: no family says which axes its tensors have; there are "
            f"{', '.join(FAMILIES)}, and docs/extending.md says how to add one"
        )
    if config.get("quantization_config"):
        raise FamilyError("config.json: quantization_config: quantised weights cannot be grown; use the original ones")
    return FAMILIES[model_type]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises :class:`FamilyError`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise FamilyError(f"{path}: cannot be read ({error.strerror}); a Hugging Face folder has one") from None
    except ValueError:
        raise FamilyError(f"{path}: is not JSON") from None
    if not isinstance(config, dict):
        raise FamilyError(f"{path}: must hold an object")
    return config


def build_model(config: Mapping[str, Any]) -> Any:
    """A transformers model with fresh weights, for a config.json's content. Imports torch and transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
