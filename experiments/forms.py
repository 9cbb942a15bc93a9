"""The Train page's form: reads what was typed, and puts what is wrong with it beside its field.

How fields become a spec and back is in experiments.values; what is right is said once, in trainer.spec. A value that
cannot be read is shown again as it was typed.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.forms import BoundField

from accounts.models import User
from experiments import sources
from experiments.line import most_gpus
from experiments.looks import look
from experiments.models import Experiment, Host
from experiments.values import (
    DIMENSIONS,
    RUNG_FIELDS,
    TRAIN_FIELDS,
    document_of,
    field_of,
    rung,
    rungs_of,
    set_aside,
)
from trainer.families import FAMILIES, Described, FamilyError, family_of, read_config
from trainer.growth import OPERATORS
from trainer.growth.targets import By, Staging
from trainer.shape import OptimizerState, Split
from trainer.spec import ExperimentSpec, Problem, SpecError, TrainSpec, is_path, parse_spec

#: What of growth is folded away, beside the stages.
GROWTH_ADVANCED = (
    "growth_snr_db",
    "growth_split",
    "growth_init_range",
    "growth_optimizer",
    "growth_d_vocab",
    "growth_n_positions",
)
#: Of the learning of maps, which is open where it is asked for.
LEARNING = ("learn_steps", "learn_lr")
#: The numbers and choices of the section Training, and those that are folded away there.
TRAINING = ("max_steps", "num_epochs", "n_ctx", "batch_size", "lr", "warmup_steps", "weight_decay", "seed")
#: And where: a host, and how many of its GPUs.
PLACE = ("host", "gpus")
#: Where a model trains that does not train where the others do.
HOST_OF = {"small_host": "small", "scaled_host": "scaled", "large_host": "large"}
ADVANCED = (
    "schedule",
    "min_lr_ratio",
    "grad_clip",
    "beta1",
    "beta2",
    "precision",
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "validation_fraction",
    "test_fraction",
)

# The form -------------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> Any:
    """A number as a person writes it: 0.001, 1e-5. Reading it back gives the same number."""
    if not isinstance(value, float):
        return value
    text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", text)


class NumberField(forms.Field):
    """A number typed as text, so that what cannot be read is shown again as it was typed. Empty: None."""

    kind = "a number"
    inputmode = "decimal"

    def __init__(self, **kwargs: Any):
        attrs = {"class": "form-control", "inputmode": self.inputmode, "autocomplete": "off", "spellcheck": "false"}
        super().__init__(required=False, widget=forms.TextInput(attrs=attrs), **kwargs)

    def prepare_value(self, value: Any) -> Any:
        return _shown(value)

    def to_python(self, value: Any) -> int | float | None:
        text = re.sub(r"[\s_]", "", "" if value is None else str(value))
        if not text:
            return None
        try:
            return self.parse(text)
        except (ValueError, OverflowError):
            raise ValidationError(_sentence(str(self.label), str(value).strip(), f"must be {self.kind}")) from None

    def parse(self, text: str) -> int | float:
        return float(text)


class WholeField(NumberField):
    kind = "a whole number"
    inputmode = "numeric"

    def parse(self, text: str) -> int:
        if re.fullmatch(r"[+-]?\d{1,40}", text):
            return int(text)
        number = float(text)  # 25e3
        if not number.is_integer():
            raise ValueError(text)
        return int(number)


class Box(BoundField):
    """A field whose help may stand elsewhere: once for the two fields of a row, small's and large's."""

    @property
    def aria_describedby(self) -> str | None:
        role, _, dimension = self.name.partition("_")
        parts = [super().aria_describedby or ""]
        if role in ("small", "large") and dimension in DIMENSIONS:
            parts.insert(0, f"help_{dimension}")
        return " ".join(filter(None, parts)) or None


class CardSelect(forms.RadioSelect):
    """Radio buttons, each described by the element `about_<name>_<value>` that the page puts beside it."""

    def create_option(self, name: str, value: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        option = super().create_option(name, value, *args, **kwargs)
        option["attrs"]["aria-describedby"] = f"about_{name}_{value}"
        return option


class Row(NamedTuple):
    """A dimension of the two shapes, side by side."""

    name: str
    help: str
    small: BoundField
    large: BoundField
    ratio: str


class Stage(NamedTuple):
    """A shape on the way to scaled: a row of the ladder."""

    at: int  # from 1
    steps: BoundField
    dimensions: list[BoundField]
    layer_norm_eps: BoundField  # scaled's, unless an experiment that was copied says otherwise


class Wrong(NamedTuple):
    """An error, and where it stands on the page."""

    field: str
    id: str
    message: str


def _text(**kwargs: Any) -> forms.CharField:
    attrs = {"class": "form-control", "autocomplete": "off", "spellcheck": "false"}
    return forms.CharField(required=False, widget=forms.TextInput(attrs=attrs), **kwargs)


#: What the host fields call this machine.
LOCAL = "local"
#: More GPUs than one machine has.
MOST_GPUS = 64


def host_key(host: Host) -> str:
    """What the host fields call `host`."""
    return LOCAL if host.kind == Host.Kind.LOCAL else str(host.pk)


def _described(host: Host | None) -> str:
    """A host and what it has, in a choice."""
    if host is None or host.kind == Host.Kind.LOCAL:
        return "this machine"
    gpus = (host.facts or {}).get("gpus") or []
    if not host.is_remote or not host.facts:
        return host.name
    kinds = sorted({str(gpu["name"]) for gpu in gpus})
    return f"{host.name}: {len(gpus)} x {', '.join(kinds)}" if gpus else f"{host.name}: no GPU"


def _select(choices: Any, **kwargs: Any) -> forms.ChoiceField:
    return forms.ChoiceField(choices=choices, widget=forms.Select(attrs={"class": "form-select"}), **kwargs)


def _radio(choices: Any, widget: type[forms.RadioSelect] = forms.RadioSelect, **kwargs: Any) -> forms.ChoiceField:
    return forms.ChoiceField(choices=choices, widget=widget(attrs={"class": "form-check-input"}), **kwargs)


def _check(**kwargs: Any) -> forms.BooleanField:
    return forms.BooleanField(required=False, widget=forms.CheckboxInput(attrs={"class": "form-check-input"}), **kwargs)


def _choices_of(literal: Any, said: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    return [(value, (said or {}).get(value, value)) for value in get_args(literal)]


_BY = {"both": "width and depth", "width": "width alone", "depth": "depth alone"}
_STAGING = {"even": "width and depth together", "gradual": "width first, then blocks (gradual stacking)"}
_SPLIT = {"even": "evenly", "uneven": "unevenly, at random", "diagonal": "its own copy alone"}
_OPTIMIZER = {"fresh": "fresh", "grown": "grown from small's"}


class ExperimentForm(forms.Form):
    """`owner` is called when there is something of the user's to keep, a file or an experiment: it may make a guest."""

    bound_field_class = Box
    use_required_attribute = False  # the browser's own bubbles would hide all errors but the first
    error_css_class = "is-invalid"

    key = forms.UUIDField(required=False, widget=forms.HiddenInput, initial=uuid.uuid4)
    name = forms.CharField(
        label="Name",
        required=False,
        widget=forms.TextInput(attrs={"class": "form-control", "autocomplete": "off"}),
    )
    notes = forms.CharField(
        label="Notes",
        required=False,
        max_length=Experiment._meta.get_field("notes").max_length,
        widget=forms.Textarea(attrs={"class": "form-control", "rows": 2}),
        help_text="What you want to find out. Only for people.",
    )
    family = _select([(name, family.title) for name, family in FAMILIES.items()], help_text="Of all models here.")
    tie_embeddings = _check(help_text="The output layer is the embedding table.")
    small_source = _radio(
        [("random", "trained here, from random weights"), ("checkpoint", "a pre-trained checkpoint")], label="small is"
    )
    small_checkpoint = _text(
        label="Checkpoint", help_text="A name on the Hub, such as openai-community/gpt2, or a folder on this machine."
    )
    width = _radio([(rule.key, rule.title) for rule in OPERATORS["width"]], CardSelect, label="Width rule")
    depth = _radio([(rule.key, rule.title) for rule in OPERATORS["depth"]], CardSelect, label="Depth rule")
    target_multiple = NumberField(label="Parameters, × small's")
    target_by = _select(_choices_of(By, _BY), label="Larger in", required=False)
    growth_snr_db = NumberField(
        label="noise (dB)",
        help_text="Weights over noise that no activation shows, so that copies part. 0: as large as the weights. "
        "Empty: none; copies may stay alike for ever.",
    )
    growth_split = _select(
        _choices_of(Split, _SPLIT),
        label="split",
        help_text="How a reader shares a value among its copies.",
        required=False,
    )
    growth_init_range = NumberField(
        label="init_range of new weights", help_text="Of weights that growth draws at random. Empty: large's."
    )
    growth_optimizer = _select(
        _choices_of(OptimizerState, _OPTIMIZER),
        label="optimizer",
        help_text="AdamW's moments of scaled.",
        required=False,
    )
    lr_by_width = _check(
        label="lr by width",
        help_text="Divides the learning rate of a matrix by how often its inputs were copied: under AdamW, what it "
        "computes would else move that much faster than in small.",
    )
    growth_d_vocab = WholeField(label="d_vocab of scaled", help_text="Rows of its token table. Empty: small's.")
    growth_n_positions = WholeField(label="n_positions of scaled", help_text="Its longest context. Empty: small's.")
    learn = forms.BooleanField(
        required=False,
        widget=forms.CheckboxInput(attrs={"class": "form-check-input", "aria-describedby": "about_learn"}),
    )
    learn_steps = WholeField(help_text="Batches that the maps are trained on. Their cost is charged to scaled.")
    learn_lr = NumberField(help_text="Of that, and of the maps alone.")
    growths = WholeField(label="Growths in all")
    staging = _select(_choices_of(Staging, _STAGING), label="Each adds", required=False)
    rungs = forms.CharField(required=False, widget=forms.HiddenInput, initial=0)
    train_large = _check(
        label="Train large too",
        help_text="The same shape from scratch: without it nothing says whether growing saved anything.",
    )

    source = _radio(
        [
            ("built-in", "The Python standard library's sources"),
            ("hub", "A dataset on the Hugging Face Hub"),
            ("local", "A file or folder on this machine"),
            ("upload", "A file of yours"),
        ],
        label="Source",
    )
    hub_name = _text(label="Dataset", max_length=96)
    hub_config = _text(label="Config", max_length=96, help_text="Empty if it has none.")
    local_path = _text(label="Path", max_length=1000)
    upload = forms.FileField(
        required=False,
        label="File",
        error_messages={"empty": "File: is empty; choose one with text"},
        widget=forms.FileInput(attrs={"class": "form-control", "accept": ",".join(sources.TEXT_SUFFIXES)}),
    )
    uploaded = forms.CharField(required=False, widget=forms.HiddenInput)
    text_column = _text(max_length=200, help_text="Of jsonl, csv, parquet and Hub datasets. Empty: found out.")
    tokenizer_kind = _radio(
        [("bpe", "Byte-level BPE, trained on this text"), ("pretrained", "A pre-trained one")], label="Tokenizer"
    )
    d_vocab = WholeField(help_text="Tokens in the vocabulary.")
    tokenizer_name = _text(
        label="Name of the tokenizer", help_text="On the Hub, such as gpt2, or a folder. With a checkpoint: its own."
    )
    tokenizer_d_vocab = WholeField(label="Its d_vocab", help_text="Only to count parameters before it was fetched.")
    validation_fraction = NumberField(help_text="Of the documents, held out to watch training.")
    test_fraction = NumberField(help_text="Of the documents, held out to the end.")

    n_ctx = WholeField(help_text="Tokens in one sequence.")
    batch_size = WholeField(help_text="Sequences in one step.")
    max_steps = WholeField(help_text="Empty: as num_epochs says.")
    num_epochs = NumberField(help_text="Passes over the text. Empty: as max_steps says.")
    lr = NumberField(help_text="Peak learning rate of AdamW.")
    weight_decay = NumberField(help_text="On matrices only.")
    warmup_steps = WholeField(help_text="Steps from 0 to lr.")
    schedule = _select(_choices_of(TrainSpec.model_fields["schedule"].annotation), help_text="After the warm-up.")
    min_lr_ratio = NumberField(help_text="The schedule ends at this share of lr.")
    beta1 = NumberField(help_text="AdamW's first moment.")
    beta2 = NumberField(help_text="AdamW's second moment.")
    grad_clip = NumberField(help_text="Largest gradient norm. Empty: none.")
    eval_every = WholeField(help_text="Steps between evaluations.")
    eval_tokens = WholeField(help_text="Tokens of one evaluation during training.")
    checkpoint_every = WholeField(help_text="Steps between checkpoints.")
    seed = WholeField(help_text="Of weights and order of batches.")
    precision = _select(
        _choices_of(TrainSpec.model_fields["precision"].annotation), help_text="auto: the fastest safe."
    )
    compile = _check(label="torch.compile", help_text="Slower to start, faster to train on a GPU.")
    host = _select([], help_text="Where it trains.")
    gpus = WholeField(label="GPUs a model", help_text="On a host that has some. Several share each batch.")
    small_host = _select([], label="small on", required=False)
    scaled_host = _select([], label="scaled on", required=False)
    large_host = _select([], label="large on", required=False)

    def __init__(
        self,
        data: Any = None,
        files: Any = None,
        *,
        user: Any,
        owner: Callable[[], User] | None = None,
        **kwargs: Any,
    ):
        # A copy, so that an upload which was accepted can be noted for the next time the form is shown.
        super().__init__(data.copy() if data is not None else None, files, **kwargs)
        self.user, self.owner = user, owner
        self.spec: ExperimentSpec | None = None
        #: Where this user may train, by what the fields call it.
        self.hosts = {LOCAL: None} | {host_key(host): host for host in Host.objects.usable_by(user).order_by("pk")}
        offered = [(key, _described(host)) for key, host in self.hosts.items()]
        self.fields["host"].choices = offered  # type: ignore[attr-defined]
        for name in HOST_OF:
            self.fields[name].choices = [("", "as above"), *offered]  # type: ignore[attr-defined]
        # For the sheet alone: what is right of a spec that is not, and the values before wrong ones were taken out.
        self.readable: ExperimentSpec | None = None
        self.typed: dict[str, Any] = {}
        #: What the checkpoint that was named says of itself, where that is known.
        self.described: Described | None = None
        for role in ("small", "large"):
            for name in (*DIMENSIONS, "init_range"):
                kind = NumberField if name in ("layer_norm_eps", "init_range") else WholeField
                self.fields[f"{role}_{name}"] = kind(label=name)
                self.fields[f"{role}_{name}"].widget.attrs["aria-label"] = f"{name} of {role}"
        for at in range(rungs_of({"rungs": self["rungs"].value()})):
            for name in RUNG_FIELDS:
                label = f"{name} of stage {at + 1}"
                number = NumberField(label=label) if name == "layer_norm_eps" else WholeField(label=label)
                number.widget.attrs["aria-label"] = label
                self.fields[rung(at, name)] = number
            self.fields[rung(at, "layer_norm_eps")].widget = forms.HiddenInput()
        self.fields["upload"].widget.attrs["data-max-mb"] = settings.MAX_UPLOAD_MB
        for name, field in self.fields.items():
            field.label = field.label or name  # the spec's own word, not "N ctx"
        if not settings.LOCAL_DATA_DIRS:
            self.fields["small_checkpoint"].help_text = "A name on the Hub, such as openai-community/gpt2."
            self.fields["tokenizer_name"].help_text = "On the Hub, such as gpt2. With a checkpoint: its own."
        if not settings.LOCAL_DATA_DIRS and self["source"].value() != "local":
            choices = self.fields["source"].choices  # type: ignore[attr-defined]
            self.fields["source"].choices = [c for c in choices if c[0] != "local"]  # type: ignore[attr-defined]

    # Shown

    def rows(self) -> list[Row]:
        """The two shapes side by side; weights' init_range last."""
        described = DIMENSIONS | {"init_range": "standard deviation of first weights"}
        return [
            Row(name, text, self[f"small_{name}"], self[f"large_{name}"], self._ratio(name))
            for name, text in described.items()
        ]

    def _ratio(self, name: str) -> str:
        """How large's value stands to small's: "2", "1.5"; empty where they are the same or one is not a number."""
        try:
            small, large = (float(self[f"{role}_{name}"].value()) for role in ("small", "large"))
        except (TypeError, ValueError):
            return ""
        return "" if small == large or not small else f"{large / small:.3g}"

    def stages(self) -> list[Stage]:
        """The rows of the ladder."""
        dimensions = [name for name in DIMENSIONS if name != "layer_norm_eps"]
        return [
            Stage(
                at + 1,
                self[rung(at, "steps")],
                [self[rung(at, name)] for name in dimensions],
                self[rung(at, "layer_norm_eps")],
            )
            for at in range(rungs_of({"rungs": self["rungs"].value()}))
        ]

    def growth_advanced(self) -> list[BoundField]:
        return [self[name] for name in GROWTH_ADVANCED]

    def learning(self) -> list[BoundField]:
        return [self[name] for name in LEARNING]

    @property
    def growth_has_errors(self) -> bool:
        """Of what is folded away there."""
        folded = (*GROWTH_ADVANCED, "lr_by_width", "growths", "staging")
        return any(name in folded or name.startswith("rung") for name in self.errors)

    @property
    def growth_is_set(self) -> bool:
        """Something that is folded away there is not as it is usually."""
        usual = {"growth_snr_db": (0, "0"), "growth_split": ("even",), "growth_optimizer": ("fresh",)}
        values = {name: self[name].value() for name in (*GROWTH_ADVANCED, "lr_by_width")}
        return bool(self.stages()) or any(
            value not in usual.get(name, (None, "", False)) for name, value in values.items()
        )

    def training(self) -> list[BoundField]:
        some_have_gpus = any(host is not None and most_gpus(host) for host in self.hosts.values())
        place = PLACE if some_have_gpus or "gpus" in self.errors else PLACE[:1]
        return [self[name] for name in (*TRAINING, *place)]

    def places(self) -> list[BoundField]:
        """Where single models train; only for who has the choice."""
        return [self[name] for name in HOST_OF] if len(self.hosts) > 1 else []

    def advanced(self) -> list[BoundField]:
        return [self[name] for name in ADVANCED]

    @property
    def advanced_has_errors(self) -> bool:
        return any(name in self.errors for name in (*ADVANCED, *HOST_OF, "tie_embeddings", "compile"))

    @property
    def summary(self) -> list[Wrong]:
        """Each error with the element that it stands beside, in the order of the page; what belongs to none first."""
        return [Wrong("", "", str(message)) for message in self.non_field_errors()] + [
            Wrong(name, str(self[name].auto_id), f"{self._role(name)}{message}")
            for name in self.fields
            for message in self.errors.get(name, [])
        ]

    def _role(self, name: str) -> str:
        """Whose dimension a field is, where its message alone does not say: both columns have a d_model."""
        role, _, dimension = name.partition("_")
        return f"{role}: " if role in ("small", "large") and dimension in (*DIMENSIONS, "init_range") else ""

    @property
    def uploaded_name(self) -> str:
        return Path(str(self["uploaded"].value() or "")).name

    # Read

    def clean(self) -> dict[str, Any]:
        self._clean_text()
        self._clean_checkpoint()
        self._clean_tokenizer()
        self._clean_hosts()
        self._clean_learning()
        self.typed = dict(self.cleaned_data)
        self.readable = self._read_spec()
        if not self.errors:
            self.spec = self.readable
        return self.cleaned_data

    def _read_spec(self) -> ExperimentSpec | None:
        """The spec, each of its problems shown and set aside until the rest can be read; None if too little is left.

        A spec is checked from its parts to the whole, so a wrong learning rate would hide that growth is impossible.
        """
        document = document_of(self.cleaned_data)
        # What could not be read is not in the document, where the spec's own default would quietly take its place.
        unread = [f"train.{name}" for name in TRAIN_FIELDS if name in self.errors]
        unread += ["data.source" for name in ("hub_name", "local_path", "upload") if name in self.errors]
        if self.cleaned_data.get("tokenizer_kind") == "pretrained" and not self.cleaned_data.get("tokenizer_name"):
            unread.append("data.tokenizer.name")
        unread += ["data.tokenizer.d_vocab" for name in ("d_vocab", "tokenizer_d_vocab") if name in self.errors]
        if not all(set_aside(document, location) for location in unread):
            return None
        while True:
            try:
                return parse_spec(document)
            except SpecError as error:
                for problem in error.problems:
                    self._show(problem)
                if not all(set_aside(document, problem.field) for problem in error.problems):
                    return None

    @contextmanager
    def _beside(self, field: str, value: Any = None) -> Iterator[None]:
        """What is refused inside is said beside `field`, after its name and what was typed there."""
        value = self.cleaned_data.get(field) if value is None else value
        try:
            yield
        except (ValidationError, FamilyError) as error:
            message = error.messages[0] if isinstance(error, ValidationError) else str(error)
            self.add_error(field, _sentence(str(self.fields[field].label), value, message))

    def _given(self, field: str) -> str:
        if not (value := self.cleaned_data.get(field, "")):
            raise ValidationError("must not be empty")
        return str(value)

    def _clean_text(self) -> None:
        values = self.cleaned_data
        path: Path | None = None
        match values.get("source"):
            case "hub":
                with self._beside("hub_name"):
                    sources.hub_name(self._given("hub_name"))
                with self._beside("hub_config"):
                    sources.hub_config(values.get("hub_config", ""))
            case "local":
                with self._beside("local_path"):
                    path = sources.text_path(self._given("local_path"), self.user)
                    values["local_path"] = str(path)
            case "upload" if "upload" not in self.errors:
                with self._beside("upload", getattr(values.get("upload"), "name", "")):
                    path = self._keep_upload()
        if path and values.get("text_column"):
            with self._beside("text_column"):
                sources.check_column(path, values["text_column"])

    def _keep_upload(self) -> Path:
        """The file that was sent now, or one that was sent before; kept even when other fields have errors."""
        values, shown = self.cleaned_data, cast(dict[str, Any], self.data)
        if values.get("upload") and self.owner:
            sources.check_upload(values["upload"])
            self.user = self.owner()
            values["uploaded"] = shown["uploaded"] = sources.keep_upload(values["upload"], self.user)
        relative = values.get("uploaded", "")
        if not relative:
            raise ValidationError("choose one: txt, md, jsonl, csv or parquet")
        if not sources.may_use_upload(relative, self.user):
            shown["uploaded"] = ""
            raise ValidationError(f"{Path(relative).name} is not among your files here any more: choose it again")
        return Path(settings.UPLOADS_DIR / relative)

    def _clean_checkpoint(self) -> None:
        if self.cleaned_data.get("small_source") != "checkpoint":
            return
        with self._beside("small_checkpoint"):
            name = self.cleaned_data["small_checkpoint"] = sources.checkpoint(
                self._given("small_checkpoint"), self.user
            )
            if is_path(name):
                self._compare_with(read_config(Path(name)))
            elif (config := look(name).config) is not None:  # somebody asked for it before
                self._compare_with(config)

    def _compare_with(self, config: dict[str, Any]) -> None:
        """A checkpoint whose config is known says what small is; fields left empty are filled, others must agree."""
        values, family = self.cleaned_data, family_of(config)
        if family.name != values.get("family"):
            self.add_error("family", _sentence("family", values.get("family"), f"the checkpoint's is {family.name}"))
            return
        self.described = family.shape_of(config)
        shape, tied = self.described.shape, self.described.tied
        if values.get("tie_embeddings") != tied:
            self.add_error("tie_embeddings", f"the checkpoint's embeddings are {'tied' if tied else 'not tied'}")
        empty = all(values.get(f"small_{name}") is None for name in DIMENSIONS if name != "layer_norm_eps")
        for name in DIMENSIONS:
            field, right = f"small_{name}", getattr(shape, name)
            if empty:
                values[field] = right
            elif field in values and values[field] != right and (name != "n_kv_heads" or values[field] is not None):
                self.add_error(field, _sentence(name, values[field], f"the checkpoint's is {_shown(right)}"))

    def _clean_tokenizer(self) -> None:
        values = self.cleaned_data
        if values.get("tokenizer_kind") != "pretrained":
            return
        if values.get("small_source") == "checkpoint" and not values.get("tokenizer_name"):
            if "small_checkpoint" in self.errors:
                return
            values["tokenizer_name"] = values["small_checkpoint"]
        with self._beside("tokenizer_name"):
            values["tokenizer_name"] = sources.tokenizer(self._given("tokenizer_name"), self.user)

    def _clean_learning(self) -> None:
        if not self.cleaned_data.get("learn"):
            for name in LEARNING:  # out of sight
                self.errors.pop(name, None)
        elif self.cleaned_data.get("learn_steps", 1) in (0, None):
            with self._beside("learn_steps"):
                raise ValidationError("must be at least 1")

    def _clean_hosts(self) -> None:
        values = self.cleaned_data
        values["gpus"] = gpus = 1 if values.get("gpus") is None else values["gpus"]
        if not 1 <= gpus <= MOST_GPUS:
            self.add_error("gpus", _sentence("GPUs a model", gpus, f"must be 1 to {MOST_GPUS}"))
            return
        batch_size = values.get("batch_size")
        if batch_size and batch_size % gpus:
            near = max(gpus, batch_size // gpus * gpus)
            message = f"must divide batch_size, {batch_size}; {near} for instance could be shared among {gpus}"
            self.add_error("gpus", _sentence("GPUs a model", gpus, message))
        for name in ("host", *HOST_OF):
            host = self.hosts.get(values.get(name, ""))
            if host is None or not host.is_remote:
                continue
            if host.problem == Host.Problem.KEY_CHANGED:
                self.add_error(name, f"{host}: its host key has changed; see to that under Hosts first")
            elif not host.is_ready:
                self.add_error(name, f"{host}: is not set up yet; set it up under Hosts first")
            elif gpus > (most_gpus(host) or 1):
                self.add_error("gpus", _sentence("GPUs a model", gpus, f"{host} has {most_gpus(host) or 'no GPU'}"))

    @property
    def goes_to_own_machines(self) -> bool:
        """Whether a stored credential will be used for it."""
        assert self.spec is not None
        return any(self.host_of(name).is_remote for name in self.spec.models)

    def host_of(self, name: str) -> Host:
        """Where the model `name` of the spec is to train."""
        values = self.cleaned_data
        own = next((values.get(field) for field, model in HOST_OF.items() if model == name), "")
        return self.hosts.get(own or values["host"]) or Host.local()

    def _show(self, problem: Problem) -> None:
        """Put what trainer.spec found beside the field it belongs to, once."""
        field = field_of(problem.field, self.data)
        if field is None:
            self.add_error(None, str(problem))
            return
        if field in self.errors:  # it could not be read, or large's problem is scaled's too
            return
        label = str(self.fields[field].label or field)
        self.add_error(field, _sentence(label, problem.value, problem.message))

    def experiment_id(self) -> uuid.UUID:
        """The same for the same form sent twice, another once anything in it was changed."""
        assert self.spec is not None
        where = [str(self.cleaned_data.get(name, "")) for name in ("host", *HOST_OF, "gpus")]
        content = hashlib.sha256(
            "".join((self.spec.to_json(), self.cleaned_data["notes"], *where)).encode()
        ).hexdigest()
        return uuid.uuid5(self.cleaned_data["key"] or uuid.uuid4(), content)


def _sentence(label: str, value: Any, message: str) -> str:
    """What every error looks like: "d_head 48: with RoPE it must be even"."""
    shown = "" if value is None or isinstance(value, bool | dict | list) or value == "" else f" {_shown(value)}"
    return f"{label}{shown}: {message}"
