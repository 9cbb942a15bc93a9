"""The form of the Grow page: a checkpoint, where it is to grow to and by which rules; and the plan that follows.

What is wrong stands beside its field, as on the Train page, whose fields these are. Names of dimensions are the spec's.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from pydantic import ValidationError as Invalid

from experiments import sources
from experiments.estimate import Chosen, memory_bytes
from experiments.forms import CardSelect, NumberField, WholeField, Wrong
from experiments.looks import Look, look
from experiments.models import Growth, ModelRun, State
from experiments.templatetags import figures
from experiments.values import DIMENSIONS
from trainer.budget import parameters
from trainer.families import Described, Family, FamilyError, family_of
from trainer.growth import OPERATORS, GrowthError, GrowthPlan, plan, resolve_shape
from trainer.growth.targets import By, shape_for
from trainer.shape import GrowInit, Split
from trainer.spec import is_path

#: Fields of a shape that may be set, in the order of the page.
SHAPE = tuple(name for name in DIMENSIONS if name != "layer_norm_eps")
#: What is folded away.
ADVANCED = ("d_vocab", "n_positions", "snr_db", "split", "init_range", "dtype", "seed")
#: Bytes of a number by its name in a config.
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "F32": 4, "F16": 2, "BF16": 2}
#: More models of one's own than these are named by their path.
MOST_MINE = 200
_SPLITS = {
    "even": "even: each copy the same share",
    "uneven": "uneven: shares at random",
    "diagonal": "diagonal: its own copy alone",
}


class Source(NamedTuple):
    """A checkpoint to grow from, and what its config says of it."""

    at: str  # a name on the Hub, or a resolved path
    name: str  # what people call it
    look: Look
    run: ModelRun | None = None
    family: Family | None = None
    described: Described | None = None
    parameters: int = 0
    bytes_each: float = 4.0  # of a parameter, as it is stored


@dataclass(frozen=True)
class Owned:
    """A model of one's own that can be grown."""

    key: str
    name: str
    folder: Path
    run: ModelRun | None
    more: str

    @property
    def label(self) -> str:
        return f"{self.name} ({self.more})"


def owned_by(user: Any) -> list[Owned]:
    """The finished models of a user's runs that stand here, and what they have grown, the newest first."""
    if not user.is_authenticated:
        return []
    runs = ModelRun.objects.filter(experiment__owner=user, state=State.SUCCEEDED).select_related("experiment")
    found = []
    for run in runs.order_by("-ended_at")[:MOST_MINE]:
        folder = run.directory / "model"
        if (folder / "config.json").is_file():
            name = f"{run.name} of {run.experiment.name}"
            found.append(Owned(run_key(run), name, folder, run, figures.si(run.parameters)))
    grown = Growth.objects.owned_by(user).filter(state=State.SUCCEEDED).defer("certificate")
    for growth in grown[:MOST_MINE]:
        found.append(Owned(f"growth-{growth.pk}", growth.name, growth.model, None, "grown"))
    return found


def run_key(run: ModelRun) -> str:
    """What the field `mine` calls the finished model of a run."""
    return f"run-{run.pk}"


def _attrs(**more: str) -> dict[str, str]:
    return {"class": "form-control", "autocomplete": "off", "spellcheck": "false", **more}


def _radio(choices: Any, widget: type[forms.RadioSelect] = forms.RadioSelect, **kwargs: Any) -> forms.ChoiceField:
    return forms.ChoiceField(choices=choices, widget=widget(attrs={"class": "form-check-input"}), **kwargs)


def _select(choices: Any, **kwargs: Any) -> forms.ChoiceField:
    return forms.ChoiceField(
        choices=choices, required=False, widget=forms.Select(attrs={"class": "form-select"}), **kwargs
    )


class GrowthForm(forms.Form):
    """`plan` and `source` are there as far as they could be worked out, errors elsewhere or not."""

    use_required_attribute = False
    error_css_class = "is-invalid"

    key = forms.UUIDField(required=False, widget=forms.HiddenInput, initial=uuid.uuid4)
    source_kind = _radio(
        [("mine", "a model of mine"), ("named", "a checkpoint by its name")], required=False, label="Grow"
    )
    mine = _select([], label="Model", help_text="Finished models of your experiments, and what you have grown.")
    checkpoint = forms.CharField(
        label="Checkpoint",
        required=False,
        max_length=1000,
        strip=True,
        widget=forms.TextInput(attrs=_attrs()),
        help_text="A name on the Hub, such as openai-community/gpt2, or a folder or GGUF file on this machine.",
    )
    target_kind = _radio(
        [("multiple", "so many times the parameters"), ("shape", "a shape of my own")], required=False, label="Target"
    )
    multiple = NumberField(label="Times", help_text="2 is twice the parameters, as nearly as the shape permits.")
    by = _select([("both", "wider and deeper"), ("width", "wider only"), ("depth", "deeper only")], label="By being")
    width = _radio([(rule.key, rule.title) for rule in OPERATORS["width"]], CardSelect, label="Width rule")
    depth = _radio([(rule.key, rule.title) for rule in OPERATORS["depth"]], CardSelect, label="Depth rule")
    d_vocab = WholeField(label="d_vocab", help_text="Rows of the token table. Empty: as many as now.")
    n_positions = WholeField(label="n_positions", help_text="The longest context. Empty: as now.")
    snr_db = NumberField(
        label="noise (dB)",
        help_text="Signal to noise of what is added where no activation shows it. 0: as large as the weights. Empty: "
        "none, and copies may stay alike when it is trained.",
    )
    split = _select(
        [(value, _SPLITS[value]) for value in get_args(Split)],
        label="split",
        help_text="How a reader shares a value among its copies.",
    )
    init_range = NumberField(label="init_range", help_text="Standard deviation of what is drawn at random.")
    dtype = _select(
        [("", "as the checkpoint has them"), ("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")],
        label="dtype",
        help_text="How weights are written.",
    )
    seed = WholeField(label="seed", help_text="Of what is drawn at random.")
    measures = forms.BooleanField(
        required=False,
        label="Measure both models on a text",
        widget=forms.CheckboxInput(attrs={"class": "form-check-input"}),
        help_text="Loads both after growing and compares their logits on about two thousand tokens of Python source.",
    )

    def __init__(self, data: Any = None, *, user: Any, ask: bool = False, **kwargs: Any):
        super().__init__(data, **kwargs)
        self.user, self.ask = user, ask
        self.source: Source | None = None
        self.plan: GrowthPlan | None = None
        for name in SHAPE:
            self.fields[name] = forms.CharField(
                label=name, required=False, max_length=20, widget=forms.TextInput(attrs=_attrs())
            )
        self.owned = owned_by(user)
        self.fields["mine"].choices = [(each.key, each.label) for each in self.owned]  # type: ignore[attr-defined]
        if not settings.LOCAL_DATA_DIRS:
            self.fields["checkpoint"].help_text = "A name on the Hub, such as openai-community/gpt2."

    @staticmethod
    def usual() -> dict[str, Any]:
        """What a first visit shows."""
        rules = {kind: rules[0].key for kind, rules in OPERATORS.items()}
        more = {"source_kind": "named", "target_kind": "multiple", "multiple": 2, "by": "both", "measures": True}
        return {**rules, **more, "snr_db": 0, "split": "even", "init_range": 0.02, "seed": 0}

    # Read

    def clean(self) -> dict[str, Any]:
        values = self.cleaned_data
        self._clean_source(values)
        if self.source is not None and self.source.described is not None:
            self._clean_plan(values, self.source)
        return values

    @contextmanager
    def _beside(self, name: str, value: Any) -> Iterator[None]:
        """What is refused within stands beside the field `name`, after its label and value."""
        try:
            yield
        except ValidationError as error:
            self.add_error(name, _sentence(str(self.fields[name].label), value, str(error.message)))

    def _clean_source(self, values: dict[str, Any]) -> None:
        if values.get("source_kind") == "mine" and self.owned:
            found = next((each for each in self.owned if each.key == values.get("mine")), None)
            if found is None:
                self.add_error("mine", "Model: choose one")
                return
            path = str(found.folder)
            self.source = self._described("mine", Source(path, found.name, look(path), found.run))
            return
        name = values.get("checkpoint", "")
        if not name:
            self.add_error("checkpoint", "Checkpoint: give a name or a path")
            return
        with self._beside("checkpoint", name):
            at = sources.checkpoint(name, self.user, gguf=True)
            self.source = self._described("checkpoint", Source(at, name, look(at, ask=self.ask)))

    def _described(self, field: str, source: Source) -> Source:
        if source.look.problem:
            self.add_error(field, _sentence(str(self.fields[field].label), source.name, source.look.problem))
        config = source.look.config
        if config is None:
            return source
        try:
            family = family_of(config)
            found = family.shape_of(config)
        except FamilyError as error:
            self.add_error(field, _sentence(str(self.fields[field].label), source.name, str(error)))
            return source
        count = parameters(family.name, found.shape, found.n_positions, found.d_vocab, found.tied).total
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        bytes_each = _stored_bytes(source.at) / count or float(_BYTES.get(stored, 4))
        return source._replace(family=family, described=found, parameters=count, bytes_each=bytes_each)

    def _clean_plan(self, values: dict[str, Any], source: Source) -> None:
        assert source.family is not None
        assert source.described is not None
        family, (parent, n_positions, d_vocab, tied) = source.family.name, source.described
        sizes: dict[str, Any] = {"n_positions": n_positions, "d_vocab": d_vocab, "tied": tied}
        if any(name in self.errors for name in ("width", "depth", "multiple", *SHAPE, *ADVANCED)):
            return
        try:
            if values.get("target_kind") == "shape":
                child = resolve_shape(family, parent, {name: values[name] for name in SHAPE if values[name]})
            else:
                by: By = values["by"] or "both"
                child = shape_for(family, parent, float(values["multiple"] or 2), by, **sizes).shape
            self.plan = plan(family, parent, child, self._init(values), **sizes)
        except GrowthError as error:
            name = error.field.rpartition(".")[2]
            shown = name if name in self.fields else None
            self.add_error(shown, _sentence(name, error.value, error.message))
        except Invalid as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            self.add_error(name if name in self.fields else None, _sentence(name, first["input"], first["msg"]))

    def _init(self, values: dict[str, Any]) -> GrowInit:
        given = {name: values[name] for name in ("width", "depth", "snr_db", "d_vocab", "n_positions")}
        for name in ("split", "init_range"):
            if values[name] not in (None, ""):
                given[name] = values[name]
        return GrowInit.model_validate({"parent": "source", **given})

    # Shown

    @property
    def names_a_source(self) -> bool:
        """Whether one was typed or chosen yet."""
        return bool(self.source or self.errors.keys() & {"mine"} or self["checkpoint"].value())

    @property
    def summary(self) -> list[Wrong]:
        """Every error, with the id of the element that it stands beside."""
        found = []
        for name, messages in self.errors.items():
            at = self[name].auto_id if name in self.fields else ""
            found += [Wrong(name, at or "", str(message)) for message in messages]
        return found

    def shape(self) -> list[tuple[Any, str, Any]]:
        """The fields of a shape, what each is, and what it is now."""
        now = self.source.described.shape if self.source and self.source.described else None
        held = {} if now is None else now.model_dump() | {"n_kv_heads": now.kv_heads}
        return [(self[name], DIMENSIONS[name], held.get(name)) for name in SHAPE]

    def advanced(self) -> list[Any]:
        return [self[name] for name in ADVANCED]

    @property
    def advanced_is_open(self) -> bool:
        """Something there is wrong, or not as it is usually."""
        usual = self.usual()
        shown = {name: str(usual.get(name, "")) for name in ADVANCED}
        return any(name in self.errors or str(self[name].value() or "") not in ("", shown[name]) for name in ADVANCED)

    @property
    def chosen(self) -> Chosen | None:
        """As the Train page's cards want it."""
        made = self.plan
        return Chosen(made.family, made.tied, made.parent, made.child, made.init) if made else None

    # Kept

    def planned(self) -> dict[str, Any]:
        """The plan as a row keeps it. After a look that found one."""
        made, source = self.plan, self.source
        assert made is not None
        assert source is not None
        parent = {"n_positions": made.n_positions, "d_vocab": made.d_vocab, "parameters": source.parameters}
        grown = parameters(made.family, made.child, made.child_positions, made.child_vocab, made.tied).total
        child = {"n_positions": made.child_positions, "d_vocab": made.child_vocab, "parameters": grown}
        return {
            "family": made.family,
            "tied": made.tied,
            "parent": {"shape": made.parent.model_dump(), **parent},
            "child": {"shape": made.child.model_dump(), **child},
            "init": made.init.model_dump(mode="json"),
            "preserves": made.preserves,
            "because": made.because,
            "warnings": list(made.warnings),
            "bytes": self.bytes_on_disk(grown),
        }

    def bytes_on_disk(self, grown: int) -> int:
        """What so many parameters take on the disk."""
        assert self.source is not None
        dtype = self.cleaned_data.get("dtype")
        return round(grown * (_BYTES[dtype] if dtype else self.source.bytes_each))

    def fits(self, grown: int) -> bool:
        """Whether both models, in float32, have room in half of this machine's memory."""
        assert self.source is not None
        memory = memory_bytes()
        return memory is None or 4 * (grown + self.source.parameters) <= memory / 2

    def fields_of_row(self) -> dict[str, Any]:
        """For :func:`experiments.growths.create`. Of a valid form with a plan."""
        assert self.source is not None
        planned = self.planned()
        grown = planned["child"]["parameters"]
        short = self.source.name.rstrip("/").rpartition("/")[2] or self.source.name
        return {
            "name": f"{short[:120]} to {figures.si(grown)}",
            "source": self.source.at,
            "source_name": self.source.name[:300],
            "source_run": self.source.run,
            "seed": self.cleaned_data["seed"] or 0,
            "dtype": self.cleaned_data["dtype"],
            "measures": bool(self.cleaned_data["measures"]) and self.fits(grown),
            "planned": planned,
        }

    def growth_id(self) -> uuid.UUID:
        """The same for the same form sent twice, another once anything in it was changed."""
        row = self.fields_of_row()
        content = repr(sorted((name, str(value)) for name, value in row.items()))
        return uuid.uuid5(self.cleaned_data["key"] or uuid.uuid4(), content)


def _stored_bytes(at: str) -> int:
    """Of a folder's weights; 0 of what is not here."""
    return sum(path.stat().st_size for path in Path(at).glob("*.safetensors")) if is_path(at) else 0


def _sentence(label: str, value: Any, message: str) -> str:
    shown = "" if value in (None, "") else f" {value}"
    return f"{label}{shown}: {message}"
