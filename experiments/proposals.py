"""What the Train page fills in when it is asked to: a shape for a multiple, stages on the way to one, the rules to use.

Each takes what stands in the form, and gives values for its fields; what does not work is said beside the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.estimate import chosen_growth, known_text
from experiments.forms import ExperimentForm
from experiments.looks import look
from experiments.templatetags.figures import count
from experiments.values import DIMENSIONS, MOST_RUNGS, RUNG_FIELDS, rung, rungs_of
from trainer.growth import GrowthError
from trainer.growth.advice import recommend
from trainer.growth.targets import Staging, shape_for, shapes_between
from trainer.shape import Shape
from trainer.spec import ModelSpec


class Proposal(NamedTuple):
    kind: str  # what was asked for: "target", "stages", "growth", "without 2"
    values: dict[str, Any] = {}  # by field
    said: str = ""  # what it comes to
    errors: dict[str, str] = {}  # by field


def proposed(form: ExperimentForm, kind: str, *, may_look: Callable[[], bool]) -> Proposal:
    """What `kind` asks for, worked out from what can be read of a form that was validated.

    `may_look`: whether a checkpoint on the Hub may be asked for its dimensions, asked only where they are wanted.
    """
    match kind.split(" "):
        case ["target"]:
            return _target(form, may_look)
        case ["stages"]:
            return _stages(form)
        case ["growth"]:
            return _growth(form)
        case ["without", at] if at.isdecimal():
            return _without(form, int(at))
    return Proposal(kind)


def _target(form: ExperimentForm, may_look: Callable[[], bool]) -> Proposal:
    """A shape for large."""
    values = form.typed
    multiple = values.get("target_multiple")
    small = _small(form)
    if "target_multiple" in form.errors:
        return Proposal("target")
    if multiple is None:
        return Proposal("target", errors={"target_multiple": "Parameters, × small's: give a number, such as 2"})
    if small is None or small.shape is None:
        message = f"Parameters, × small's {multiple:g}: {_why_small_is_unknown(form, may_look)}"
        return Proposal("target", errors={"target_multiple": message})
    try:
        found = shape_for(
            small.family,
            small.shape,
            float(multiple),
            values.get("target_by") or "both",
            n_positions=values.get("n_ctx") or 256,
            d_vocab=_d_vocab(form),
            tied=small.tie_embeddings,
        )
    except GrowthError as error:
        return Proposal("target", errors={"target_multiple": f"Parameters, × small's {multiple:g}: {error.message}"})
    shape = found.shape.model_dump()
    without = "" if found.counted == "all" else " without embeddings"
    said = f"{count(found.parameters)} parameters{without}: {found.multiple:.2f} × small's."
    if abs(found.multiple / multiple - 1) > 0.05:
        said += f" Nothing nearer to {multiple:g} is a {small.family} with whole heads."
    filled = {f"large_{name}": _text(shape[name]) for name in DIMENSIONS if name != "layer_norm_eps"}
    return Proposal("target", filled, said)


def _why_small_is_unknown(form: ExperimentForm, may_look: Callable[[], bool]) -> str:
    """What is missing of small; a checkpoint on the Hub is asked."""
    checkpoint = form.typed.get("small_checkpoint")
    if form.typed.get("small_source") != "checkpoint" or not checkpoint or "small_checkpoint" in form.errors:
        return "is worked out once small's dimensions are filled in"
    found = look(checkpoint, ask=may_look())
    if found.problem:
        return f"small's dimensions cannot be read from {checkpoint}: {found.problem}"
    if found.pending:
        return f"small's dimensions are being read from {checkpoint}; try again in a moment"
    return "is worked out once small's dimensions are filled in: nobody can look them up for you just now"


def _d_vocab(form: ExperimentForm) -> int | None:
    """As the checkpoint says, as typed, or as an earlier run on this text found it."""
    if form.described is not None:
        return form.described.d_vocab
    if form.typed.get("tokenizer_kind") != "pretrained":
        return form.typed.get("d_vocab")
    if (typed := form.typed.get("tokenizer_d_vocab")) is not None:
        return int(typed)
    return known_text(form.readable.data).get("d_vocab") if form.readable else None


def _small(form: ExperimentForm) -> ModelSpec | None:
    shape = {name: form.typed.get(f"small_{name}") for name in DIMENSIONS}
    try:
        return ModelSpec(
            family=form.typed["family"],
            shape=Shape.model_validate(shape),
            tie_embeddings=bool(form.typed.get("tie_embeddings")),
        )
    except (KeyError, ValueError):
        return None


def _stages(form: ExperimentForm) -> Proposal:
    """Rows of the ladder, as many steps at each."""
    growths = form.typed.get("growths")
    if "growths" in form.errors:
        return Proposal("stages")
    if growths in (None, 1):
        return Proposal("stages", {"rungs": "0"})
    if not 1 <= growths <= MOST_RUNGS + 1:
        message = f"Growths in all {growths}: must be 1 to {MOST_RUNGS + 1}"
        return Proposal("stages", errors={"growths": message})
    chosen = chosen_growth(form)
    if chosen is None:
        message = f"Growths in all {growths}: stages are worked out once both shapes are right"
        return Proposal("stages", errors={"growths": message})
    staging: Staging = form.typed.get("staging") or "even"
    try:
        shapes = shapes_between(chosen.family, chosen.small, chosen.large, growths, staging)
    except GrowthError as error:
        return Proposal("stages", errors={"growths": f"Growths in all {growths}: {error.message}"})
    steps = form.typed.get("max_steps")
    each = max(1, steps // (len(shapes) + 1)) if steps else None
    values = {"rungs": str(len(shapes))}
    for at, shape in enumerate(shapes):
        row = shape.model_dump() | {"steps": each}
        values |= {rung(at, name): _text(row[name]) for name in RUNG_FIELDS}
    if staging == "gradual":
        values["depth"] = "stack"
    return Proposal("stages", values)


def _without(form: ExperimentForm, number: int) -> Proposal:
    """The ladder without one of its rows, whatever stands in the others."""
    rungs = rungs_of({"rungs": form["rungs"].value()})
    kept = [at for at in range(rungs) if at != number - 1]
    values = {rung(to, name): form[rung(at, name)].value() or "" for to, at in enumerate(kept) for name in RUNG_FIELDS}
    return Proposal("stages", values | {"rungs": str(len(kept)), "growths": str(len(kept) + 1)})


def _growth(form: ExperimentForm) -> Proposal:
    """The rules that are recommended, with their noise."""
    chosen = chosen_growth(form)
    if chosen is None:
        return Proposal("growth")
    try:
        advice = recommend(chosen.family, chosen.small, chosen.large)
    except GrowthError:
        return Proposal("growth")
    values = {"width": advice.width, "depth": advice.depth}
    if advice.snr_db is not None:
        values["growth_snr_db"] = f"{advice.snr_db:g}"
    return Proposal("growth", values)


def _text(value: Any) -> str:
    """As a browser would send it."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
