"""The Train page's fields as values <-> ExperimentSpec.

    values_of(spec) -> values        what each field shows
    document_of(values) -> document  the spec as JSON, for parse_spec
    field_of(location, values)       the field that a problem of the spec belongs to
    set_aside(document, location)    a document with that problem taken out, so that the rest can be read
    left_out(spec)                   what of a spec the fields cannot hold

Pure functions, and lossless for the standard experiment: small, scaled grown from it, large of the same shape or left
out. What else a spec may hold, `left_out` names, so that the page can say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from django.conf import settings

from trainer.shape import CheckpointInit, GrowInit, RandomInit, Shape
from trainer.spec import BUILT_IN_SOURCE, ExperimentSpec, ModelSpec, PretrainedTokenizer, TrainSpec

Values = Mapping[str, Any]

DIMENSIONS = {
    "d_model": "width of the residual stream",
    "n_heads": "attention heads",
    "n_kv_heads": "key/value heads; empty: as many as n_heads",
    "d_head": "width of one head",
    "d_mlp": "hidden width of the MLP",
    "n_layers": "blocks",
    "layer_norm_eps": "epsilon of the norms",
}
TRAIN_FIELDS = tuple(TrainSpec.model_fields)
#: The form's fields for what a GrowInit says, but for the ladder, by their name there.
GROWTH = {
    "width": "width",
    "depth": "depth",
    "split": "growth_split",
    "snr_db": "growth_snr_db",
    "init_range": "growth_init_range",
    "d_vocab": "growth_d_vocab",
    "n_positions": "growth_n_positions",
    "learn_steps": "learn_steps",
    "learn_lr": "learn_lr",
    "optimizer": "growth_optimizer",
    "lr_by_width": "lr_by_width",
}
#: Shapes on the way to scaled that the form has rows for; each has a dimension's fields and `steps`, by :func:`rung`.
MOST_RUNGS = 8
RUNG_FIELDS = ("steps", *DIMENSIONS)
#: What learning the maps begins with, where it is not asked for yet (LiGO's own number).
USUAL_LEARN_STEPS = 100


def rung(at: int, name: str) -> str:
    """The form's field for a dimension, or the steps, of the shape `at` (from 0) of the ladder."""
    return f"rung{at + 1}_{name}"


# Both ways ------------------------------------------------------------------------------------------------------------


def values_of(spec: ExperimentSpec) -> dict[str, Any]:
    """What each field of the form shows for `spec`."""
    small, scaled, large = _roles(spec)
    grow = scaled.init if scaled and isinstance(scaled.init, GrowInit) else GrowInit(parent="small")
    big = scaled or large or small
    big_range = large.init.init_range if large and isinstance(large.init, RandomInit) else grow.init_range
    from_checkpoint = isinstance(small.init, CheckpointInit)
    return {
        "name": spec.name,
        "family": small.family,
        "tie_embeddings": small.tie_embeddings,
        "small_source": small.init.kind,
        "small_checkpoint": small.init.path if isinstance(small.init, CheckpointInit) else "",
        "small_init_range": 0.02 if from_checkpoint else getattr(small.init, "init_range", 0.02),
        "large_init_range": big_range,
        **{field: getattr(grow, name) for name, field in GROWTH.items()},
        "growth_init_range": None if grow.init_range == big_range else grow.init_range,
        "learn": grow.learn_steps > 0,
        "learn_steps": grow.learn_steps or USUAL_LEARN_STEPS,
        **_ladder_values(grow),
        "target_multiple": 2,
        "target_by": "both",
        "train_large": large is not None,
        **_shape_values("small", small.shape),
        **_shape_values("large", big.shape or small.shape),
        **_data_values(spec),
        **spec.train.model_dump(),
        "host": "local",
        "gpus": 1,
    }


def _roles(spec: ExperimentSpec) -> tuple[ModelSpec, ModelSpec | None, ModelSpec | None]:
    """The models that the form's small, scaled and large stand for: by name, else by what they are."""
    models = spec.models
    scaled = models.get("scaled") or next((m for m in models.values() if m.parent), None)
    small = models.get("small") or (models[scaled.parent] if scaled and scaled.parent else None)
    small = small or next((m for m in models.values() if not m.parent), next(iter(models.values())))
    large = models.get("large") or next(
        (m for m in models.values() if scaled and not m.parent and m is not small and m.shape == scaled.shape), None
    )
    return small, scaled, large


def _shape_values(role: str, shape: Shape | None) -> dict[str, Any]:
    return {
        f"{role}_{name}": getattr(shape, name)
        if shape
        else Shape.model_fields[name].get_default()
        if not Shape.model_fields[name].is_required()
        else None
        for name in DIMENSIONS
    }


def _ladder_values(grow: GrowInit) -> dict[str, Any]:
    ladder = grow.ladder[:MOST_RUNGS]
    values: dict[str, Any] = {"rungs": len(ladder), "growths": len(ladder) + 1, "staging": "even"}
    for at, step in enumerate(ladder):
        shape = step.shape.model_dump()
        values |= {rung(at, name): step.steps if name == "steps" else shape[name] for name in RUNG_FIELDS}
    return values


def _data_values(spec: ExperimentSpec) -> dict[str, Any]:
    data, tokenizer = spec.data, spec.data.tokenizer
    kind: str = data.kind
    relative = ""
    if kind == "local" and Path(data.source).is_relative_to(settings.UPLOADS_DIR):
        kind, relative = "upload", str(Path(data.source).relative_to(settings.UPLOADS_DIR))
    pretrained = isinstance(tokenizer, PretrainedTokenizer)
    return {
        "source": kind,
        "hub_name": data.source if kind == "hub" else "wikitext",
        "hub_config": (data.config or "") if kind == "hub" else "wikitext-103-raw-v1",
        "local_path": data.source if kind == "local" else "",
        "uploaded": relative,
        "text_column": data.text_column or "",
        "validation_fraction": data.validation_fraction,
        "test_fraction": data.test_fraction,
        "tokenizer_kind": tokenizer.kind,
        "d_vocab": 4096 if pretrained else tokenizer.d_vocab,
        "tokenizer_name": tokenizer.name if isinstance(tokenizer, PretrainedTokenizer) else "",
        "tokenizer_d_vocab": tokenizer.d_vocab if pretrained else None,
    }


def document_of(values: Values) -> dict[str, Any]:
    """The spec that the values stand for, as JSON. A value that is not there is left out; None stays None."""
    large_shape = _shape_document("large", values)
    model = _present(values, family="family", tie_embeddings="tie_embeddings")
    models: dict[str, Any] = {
        "small": {
            **model,
            "shape": _shape_document("small", values),
            "init": _present(values, init_range="small_init_range"),
        }
    }
    models["small"]["init"]["kind"] = "random"
    if values.get("small_source") == "checkpoint":
        models["small"]["init"] = {"kind": "checkpoint", **_present(values, path="small_checkpoint")}
        if all(value is None for name, value in models["small"]["shape"].items() if name != "layer_norm_eps"):
            models["small"]["shape"] = None
    models["scaled"] = {**model, "shape": large_shape, "init": _growth_document(values)}
    if values.get("train_large"):
        init = {"kind": "random", **_present(values, init_range="large_init_range")}
        models["large"] = {**model, "shape": large_shape, "init": init}
    return {
        **_present(values, name="name"),
        "data": _data_document(values),
        "train": _present(values, **{name: name for name in TRAIN_FIELDS}),
        "models": models,
    }


def _growth_document(values: Values) -> dict[str, Any]:
    chosen = {name: value for name, value in _present(values, **GROWTH).items() if value != ""}
    growth = {"kind": "grow", "parent": "small", **chosen}
    if values.get("growth_init_range") is None:
        growth |= _present(values, init_range="large_init_range")
    if not values.get("learn"):
        growth["learn_steps"] = 0
    growth["ladder"] = [
        {"steps": values.get(rung(at, "steps")), "shape": _present(values, **{n: rung(at, n) for n in DIMENSIONS})}
        for at in range(rungs_of(values))
    ]
    return growth


def rungs_of(values: Values) -> int:
    """How many shapes on the way to scaled there are rows for."""
    try:
        return min(MOST_RUNGS, max(0, int(values.get("rungs") or 0)))
    except ValueError:
        return 0


def _shape_document(role: str, values: Values) -> dict[str, Any]:
    return _present(values, **{name: f"{role}_{name}" for name in DIMENSIONS})


def _data_document(values: Values) -> dict[str, Any]:
    data = _present(values, validation_fraction="validation_fraction", test_fraction="test_fraction")
    data["text_column"] = values.get("text_column") or None
    match values.get("source"):
        case "hub":
            data |= _present(values, source="hub_name") | {"config": values.get("hub_config") or None}
        case "local":
            data |= _present(values, source="local_path")
        case "upload":
            data["source"] = str(settings.UPLOADS_DIR / values["uploaded"]) if values.get("uploaded") else ""
        case _:
            data["source"] = BUILT_IN_SOURCE
    if values.get("tokenizer_kind") == "pretrained":
        data["tokenizer"] = {
            "kind": "pretrained",
            **_present(values, name="tokenizer_name", d_vocab="tokenizer_d_vocab"),
        }
    else:
        data["tokenizer"] = {"kind": "bpe", **_present(values, d_vocab="d_vocab")}
    return data


def _present(values: Values, **fields: str) -> dict[str, Any]:
    return {key: values[field] for key, field in fields.items() if field in values}


def left_out(spec: ExperimentSpec) -> list[str]:
    """What of `spec` the form cannot hold, as dotted names: none for the standard experiment."""
    whole = dict(_leaves(spec.model_dump(mode="json")))
    held = dict(_leaves(document_of(values_of(spec))))
    lost = [name for name, value in whole.items() if held.get(name) != value]
    extra = [f"models.{name}" for name in spec.models if not any(n.startswith(f"models.{name}.") for n in held)]
    return extra + [name for name in lost if not any(name.startswith(f"{e}.") for e in extra)]


def _leaves(document: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


# Problems -------------------------------------------------------------------------------------------------------------

_TOKENIZER = {"kind": "tokenizer_kind", "name": "tokenizer_name", "d_vocab": "d_vocab"}
_DATA = {"config": "hub_config", "text_column": "text_column"}
_SOURCE = {"hub": "hub_name", "local": "local_path", "upload": "upload"}
_MODEL = {"family": "family", "tie_embeddings": "tie_embeddings", "init.kind": "small_source"}


def field_of(location: str, values: Values) -> str | None:
    """The form's field for a dotted location in the spec, given what is chosen; None where there is none."""
    match location.split("."):
        case ["name"]:
            return "name"
        case ["train", name] if name in TRAIN_FIELDS:
            return name
        case ["data", "source"]:
            return _SOURCE.get(values.get("source", ""), "source")
        case ["data", "tokenizer", "d_vocab"] if values.get("tokenizer_kind") == "pretrained":
            return "tokenizer_d_vocab"
        case ["data", "tokenizer", name]:
            return _TOKENIZER.get(name)
        case ["data", name]:
            return _DATA.get(name, name if name.endswith("_fraction") else None)
        case ["models", role, "shape", name] if name in DIMENSIONS:
            return f"{'small' if role == 'small' else 'large'}_{name}"
        case ["models", "small", "shape"]:
            return "small_d_model"
        case ["models", "small", "init", "path"]:
            return "small_checkpoint"
        case ["models", "scaled", "init", "init_range"] if not values.get("growth_init_range"):
            return "large_init_range"
        case ["models", "scaled", "init", name] if name in GROWTH:
            return GROWTH[name]
        case ["models", "scaled", "init", "parent"]:
            return "width"
        case ["models", "scaled", "init", "ladder"]:
            return "growths"
        case ["models", "scaled", "init", "ladder", at, *_, name] if name in RUNG_FIELDS and at.isdecimal():
            return rung(int(at), name)
        case ["models", _, "train", name] if name in TRAIN_FIELDS:
            return name
        case ["models", role, "init", "init_range"]:
            return f"{role}_init_range"
        case ["models", _, *rest]:
            return _MODEL.get(".".join(rest))
    return None


#: What growth does without: its default stands in.
_OPTIONAL = set(GROWTH) - {"width", "depth", "init_range"}


def set_aside(document: dict[str, Any], location: str) -> bool:
    """Take what is wrong out of the document, leaving or putting there what parses; False if nothing is left to read.

    Nothing is put in the place of what the counts of the sheet rest on.
    """
    train, data, models = document["train"], document["data"], document["models"]
    match location.split("."):
        case ["name"]:
            document["name"] = "untitled"
        case ["models", name, "init", "ladder", *_] if name in models:
            models[name]["init"]["ladder"] = []
        case ["models", name, "train", "max_steps"] if name in models:  # which a ladder needs
            models[name]["init"]["ladder"] = []
        case ["models", name, "init", field] if name in models and field in _OPTIONAL:
            models[name]["init"].pop(field, None)
        case ["models", name, *_] if name in models:
            for lost in [name, *(n for n, m in models.items() if m["init"].get("parent") == name)]:
                models.pop(lost, None)
            return bool(models)
        case ["train", "max_steps" | "num_epochs"]:
            train |= {"max_steps": None, "num_epochs": 1, "warmup_steps": 0}  # an epoch: of unknown length
        case ["train", "warmup_steps"]:
            train["warmup_steps"] = 0
        case ["train", name] if name not in ("n_ctx", "batch_size"):
            train.pop(name, None)
        case ["data", "source"]:
            data["source"] = "/unknown"
        case ["data", "tokenizer", "name" | "kind"]:
            data["tokenizer"] = {"kind": "pretrained", "name": "unknown", "d_vocab": data["tokenizer"].get("d_vocab")}
        case ["data", name] if name != "tokenizer":
            data.pop(name, None)
        case _:
            return False
    return True
