"""What an experiment is, as data.

An :class:`ExperimentSpec` says which models are trained, from which first weights, on which text, and how. It is
validated once, at the edge; everything behind it may rely on what is promised here. It imports neither torch nor
transformers, so the web site, the command line and the trainer read the same definition.

    ExperimentSpec
      data    DataSpec     source -> documents -> tokenizer -> splits
      train   TrainSpec    how every model is trained (a model may override parts of it)
      models  name -> ModelSpec(family, shape, init)    a graph: `grow` names its parent

Words: see :class:`Shape` for the dimensions, :class:`GrowInit` for the growth operators.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trainer.families import FAMILIES, get_family
from trainer.growth import GrowthError, check
from trainer.growth.depth import DEPTH_RULES
from trainer.growth.width import WIDTH_RULES
from trainer.shape import Dimension, GrowInit, Init, RandomInit, Rung, Shape, Spec

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]

#: The built-in corpus: the Python standard library's own sources, present wherever Python is.
BUILT_IN_SOURCE = "python-stdlib"

#: A model's name is also its folder, so it is kept to letters that are safe everywhere.
MODEL_NAME = r"^[a-z][a-z0-9_-]{0,31}$"

PositiveInt = Annotated[int, Field(ge=1, le=2_000_000_000)]


def is_path(name: str) -> bool:
    """Whether a dataset, checkpoint or tokenizer is named by a path; anything else is a name on the Hub.

    By its spelling alone: what happens to lie in the current folder must not turn a Hub name into a path.
    """
    return name.startswith(("/", "./", "../", "~"))


def for_transformers(name: str) -> str:
    """What to hand to a `from_pretrained`, which takes a folder that is there before a name on the Hub.

    Raises ValueError where it would take a Hub name for a folder: whoever typed it may have no right to that.
    """
    if is_path(name):
        return str(Path(name).expanduser().absolute())
    if os.path.lexists(name):
        raise ValueError(f"there is a file or folder of that name here; write ./{name} for it.")
    return name


class Problem(NamedTuple):
    """One thing wrong with a spec: where, what was given, and what would be right."""

    field: str  # dotted, as in the JSON: "models.small.shape.d_head"
    value: Any
    message: str

    def __str__(self) -> str:
        shown = "" if self.value is None or isinstance(self.value, dict | list) else f" {self.value!r}"
        return f"{self.field}{shown}: {self.message}"


class SpecError(ValueError):
    """A spec that cannot be run; `problems` holds every :class:`Problem` found."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class BpeTokenizer(Spec):
    """A byte-level BPE trained on the training split."""

    kind: Literal["bpe"] = "bpe"
    d_vocab: Annotated[int, Field(ge=260, le=262_144)] = 4096


class PretrainedTokenizer(Spec):
    """A tokenizer by Hub name or folder (see :func:`is_path`).

    `d_vocab` is only needed to count parameters before it was fetched.
    """

    kind: Literal["pretrained"] = "pretrained"
    name: Annotated[str, Field(min_length=1)]
    d_vocab: PositiveInt | None = None


Tokenizer = Annotated[BpeTokenizer | PretrainedTokenizer, Field(discriminator="kind")]


class DataSpec(Spec):
    """Where the text comes from and how it becomes tokens.

    `source` is `python-stdlib`, a file or folder (txt, md, py, jsonl, csv, parquet; written with a leading `/`, `./`,
    `../` or `~`), or the name of a dataset on the Hub with its `config`. Documents are split into train, validation
    and test before anything else looks at them.
    """

    source: Annotated[str, Field(min_length=1)] = BUILT_IN_SOURCE
    config: str | None = None
    text_column: str | None = None
    tokenizer: Tokenizer = BpeTokenizer()
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05

    @property
    def kind(self) -> Literal["built-in", "local", "hub"]:
        if self.source == BUILT_IN_SOURCE:
            return "built-in"
        return "local" if is_path(self.source) else "hub"


class TrainSpec(Spec):
    """How a model is trained. Training ends at `max_steps` or after `num_epochs`, whichever comes first.

    One step sees batch_size x n_ctx tokens. AdamW; weight decay on matrices only; linear warm-up to `lr`, then
    `schedule` down to `min_lr_ratio * lr`.
    """

    n_ctx: Annotated[int, Field(ge=8, le=131_072)] = 256
    batch_size: Dimension = 8
    num_epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    max_steps: Annotated[int, Field(ge=0, le=2_000_000_000)] | None = 400
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    warmup_steps: Annotated[int, Field(ge=0, le=2_000_000_000)] = 40
    schedule: Schedule = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    eval_every: PositiveInt = 50
    eval_tokens: PositiveInt = 65_536
    checkpoint_every: PositiveInt = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Precision = "auto"
    compile: bool = False

    @model_validator(mode="after")
    def _ends(self) -> TrainSpec:
        if self.num_epochs is None and self.max_steps is None:
            raise _error("max_steps", "give max_steps, num_epochs or both: training must end somewhere")
        if self.max_steps and self.warmup_steps > self.max_steps:
            raise _error(
                "warmup_steps", f"{self.warmup_steps} is more than max_steps; at most {self.max_steps} would be right"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.n_ctx


#: What a single model may set for itself. Not n_ctx or batch_size: all models see the same batches in the same order.
OVERRIDABLE = frozenset(TrainSpec.model_fields) - {"n_ctx", "batch_size", "precision"}


class ModelSpec(Spec):
    """One model of an experiment. `shape` may be left out for a checkpoint, whose config gives it."""

    family: str = "llama"
    shape: Shape | None = None
    init: Init = RandomInit()
    tie_embeddings: bool = True
    train: dict[str, Any] = Field(default_factory=dict)

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        if value not in FAMILIES:
            raise PydanticCustomError("family", "must be {names}", {"names": ", ".join(map(repr, FAMILIES))})
        return value

    @field_validator("init")
    @classmethod
    def _known_rules(cls, value: Init) -> Init:
        if isinstance(value, GrowInit):
            for half, rules in (("width", WIDTH_RULES), ("depth", DEPTH_RULES)):
                if getattr(value, half) not in rules:
                    raise _error(half, f"must be {', '.join(map(repr, rules))}", getattr(value, half))
        return value

    @field_validator("train")
    @classmethod
    def _known_overrides(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if unknown := sorted(set(value) - OVERRIDABLE):
            raise PydanticCustomError(
                "override",
                "{unknown} cannot be set for one model; these can: {allowed}",
                {"unknown": ", ".join(unknown), "allowed": ", ".join(sorted(OVERRIDABLE))},
            )
        return value

    @model_validator(mode="after")
    def _shape_fits_family(self) -> ModelSpec:
        if self.shape is None:
            if self.init.kind != "checkpoint":
                raise _error("shape", "a shape is needed unless the model is read from a checkpoint")
            return self
        for field, message in get_family(self.family).problems(self.shape):
            raise _error(f"shape.{field}", message, getattr(self.shape, field))
        return self

    @property
    def parent(self) -> str | None:
        return self.init.parent if isinstance(self.init, GrowInit) else None


class ExperimentSpec(Spec):
    """One question: a set of models, trained on the same batches of the same text, to be compared."""

    name: Annotated[str, Field(min_length=1, max_length=120)]
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    models: Annotated[dict[str, ModelSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _models_form_a_graph(self) -> ExperimentSpec:
        for name, model in self.models.items():
            at = f"models.{name}"
            if not re.match(MODEL_NAME, name):
                raise _error(
                    at, "a model's name has small letters, digits, - and _, begins with a letter, at most 32 long", name
                )
            if model.train:
                try:
                    TrainSpec.model_validate(self.train.model_dump() | model.train)
                except ValidationError as error:
                    problem = problems_of(error)[0]
                    raise _error(f"{at}.train.{problem.field}", problem.message, problem.value) from None
            if model.parent is not None and model.parent not in self.models:
                others = ", ".join(n for n in self.models if n != name) or "no other model"
                raise _error(f"{at}.init.parent", f"there is no such model here; there is {others}", model.parent)
            if model.init.kind == "checkpoint" and self.data.tokenizer.kind != "pretrained":
                raise _error(
                    "data.tokenizer.kind",
                    f"{name} is read from a checkpoint, so its own tokenizer must be used: kind 'pretrained' with the "
                    f"name {model.init.path!r}",
                    self.data.tokenizer.kind,
                )
        for name in self.models:
            seen: list[str] = []
            at_name: str | None = name
            while at_name is not None:
                if at_name in seen:
                    raise _error(f"models.{name}.init.parent", "is grown from itself: " + " <- ".join([*seen, at_name]))
                seen.append(at_name)
                at_name = self.models[at_name].parent
        for name, model in self.models.items():
            if isinstance(model.init, GrowInit):
                self._check_growth(name, model, self.models[model.init.parent])
        return self

    def _check_growth(self, name: str, model: ModelSpec, parent: ModelSpec) -> None:
        at = f"models.{name}"
        if model.family != parent.family:
            raise _error(f"{at}.family", f"must be its parent's, {parent.family!r}", model.family)
        if model.tie_embeddings != parent.tie_embeddings:
            raise _error(f"{at}.tie_embeddings", f"must be its parent's, {parent.tie_embeddings}", model.tie_embeddings)
        assert isinstance(model.init, GrowInit)
        assert model.shape is not None
        if model.init.optimizer == "grown" and self.train_of(model.init.parent).max_steps == 0:
            made = "read from a checkpoint" if parent.init.kind == "checkpoint" else "not trained"
            raise _error(
                f"{at}.init.optimizer",
                f"{model.init.parent} is {made} and takes no training steps, so AdamW has no moments to grow: 'fresh' "
                "would be right",
                model.init.optimizer,
            )
        self._check_steps(name, model.init.ladder)
        before = parent.shape  # None: a checkpoint's, which the trainer checks once it was read
        steps = [(f"init.ladder.{i}.shape", rung.shape) for i, rung in enumerate(model.init.ladder)]
        for place, shape in [*steps, ("shape", model.shape)]:
            try:
                check(model.family, before or shape, shape, model.init)
            except GrowthError as error:
                field = re.sub("^shape", place, error.field)
                raise _error(f"{at}.{field}", error.message, error.value) from None
            before = shape
        self._check_tables(name, model.init)

    def _check_steps(self, name: str, ladder: tuple[Rung, ...]) -> None:
        at, max_steps, begin = f"models.{name}.init.ladder", self.train_of(name).max_steps, 0
        if ladder and max_steps is None:
            field = f"models.{name}.train.max_steps" if "max_steps" in self.models[name].train else "train.max_steps"
            raise _error(field, f"is needed, since {name} has a ladder, which grows it at given steps")
        for i, rung in enumerate(ladder):
            begin += rung.steps
            if begin >= (max_steps or 0):
                raise _error(
                    f"{at}.{i}.steps",
                    f"the growth after it would be after {begin} steps in all, and training ends after {max_steps}",
                    rung.steps,
                )

    def _check_tables(self, name: str, init: GrowInit) -> None:
        """The vocabulary and the longest context, where the parent's are known: it has no checkpoint above it."""
        above = [self.models[each].init for each in self.ancestors(name)]
        if any(each.kind == "checkpoint" for each in above):
            return
        for field, first in (("d_vocab", self.data.tokenizer.d_vocab), ("n_positions", self.train.n_ctx)):
            wanted = getattr(init, field)
            past = next((size for each in above if (size := getattr(each, field, None)) is not None), first)
            if wanted is not None and past is not None and wanted < past:
                raise _error(
                    f"models.{name}.init.{field}", f"is less than the parent's {past}: at least {past}", wanted
                )

    def train_of(self, name: str) -> TrainSpec:
        """The training settings of one model, its overrides applied."""
        return TrainSpec.model_validate(self.train.model_dump() | self.models[name].train)

    def order(self) -> list[str]:
        """Model names, parents before children, otherwise as written."""
        done: list[str] = []
        while len(done) < len(self.models):
            for name, model in self.models.items():
                if name not in done and (model.parent is None or model.parent in done):
                    done.append(name)
        return done

    def ancestors(self, name: str) -> list[str]:
        """The models that `name` was grown from, nearest first."""
        found: list[str] = []
        while (parent := self.models[name].parent) is not None:
            found.append(parent)
            name = parent
        return found

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def parse_spec(data: str | bytes | Mapping[str, Any]) -> ExperimentSpec:
    """An :class:`ExperimentSpec` from JSON text or a mapping.

    Raises :class:`SpecError`, whose problems name each field.
    """
    try:
        if isinstance(data, str | bytes):
            return ExperimentSpec.model_validate_json(data)
        return ExperimentSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError(problems_of(error)) from None


def load_spec(path: str | Path) -> ExperimentSpec:
    """As :func:`parse_spec`, from a file."""
    try:
        return parse_spec(Path(path).read_bytes())
    except OSError as error:
        raise SpecError([Problem(str(path), None, f"cannot be read: {error.strerror}")]) from None


def problems_of(error: ValidationError) -> list[Problem]:
    """pydantic's errors as problems: dotted names as in the JSON, and a sentence that says what is right."""
    return [Problem(*_located(item)) for item in error.errors()]


def _located(item: Any) -> Iterator[Any]:
    context = item.get("ctx") or {}
    # Unions put the chosen variant's tag into the location; the JSON has no such level.
    parts = [str(p) for p in item["loc"]]
    parts = [p for i, p in enumerate(parts) if not (p in _TAGS and i and parts[i - 1] in ("init", "tokenizer"))]
    if item["type"] == "spec":
        yield ".".join([*parts, context["field"]])
        yield context["value"]
        yield context["message"]
        return
    if item["type"] == "union_tag_invalid":
        yield ".".join([*parts, "kind"])
        yield context["tag"]
        yield f"must be {context['expected_tags']}"
        return
    yield ".".join(parts) or "spec"
    yield item["input"] if item["type"] != "missing" else None
    yield _MESSAGES.get(item["type"], lambda c, m: m)(context, item["msg"])


_TAGS = frozenset({"random", "checkpoint", "grow", "bpe", "pretrained"})

_MESSAGES: dict[str, Any] = {
    "missing": lambda c, m: "is missing",
    "extra_forbidden": lambda c, m: "is not a field of a spec",
    "int_parsing": lambda c, m: "must be a whole number",
    "int_type": lambda c, m: "must be a whole number",
    "int_from_float": lambda c, m: "must be a whole number",
    "float_parsing": lambda c, m: "must be a number",
    "float_type": lambda c, m: "must be a number",
    "finite_number": lambda c, m: "must be a finite number",
    "greater_than_equal": lambda c, m: f"must be at least {c['ge']}",
    "greater_than": lambda c, m: f"must be more than {c['gt']}",
    "less_than_equal": lambda c, m: f"must be at most {c['le']}",
    "less_than": lambda c, m: f"must be less than {c['lt']}",
    "literal_error": lambda c, m: f"must be {c['expected']}",
    "union_tag_not_found": lambda c, m: "needs a kind",
    "string_too_short": lambda c, m: "must not be empty",
    "string_too_long": lambda c, m: f"must have at most {c['max_length']} characters",
}


def _error(field: str, message: str, value: Any = None) -> PydanticCustomError:
    return PydanticCustomError("spec", "{message}", {"field": field, "message": message, "value": value})
