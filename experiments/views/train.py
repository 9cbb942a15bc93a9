"""The Train page: an experiment put together, seen through beforehand, and started."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple
from uuid import UUID

from allauth.core import ratelimit
from django.conf import settings
from django.contrib.auth import login
from django.core.exceptions import ValidationError
from django.db import IntegrityError
from django.forms import Form
from django.forms.boundfield import BoundField, BoundWidget
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.safestring import SafeString
from django.views.decorators.http import require_POST, require_safe

from accounts.guests import ensure_user
from experiments import jobs, sources
from experiments.estimate import Chosen, Cost, Estimate, Verdict, estimate
from experiments.forms import ExperimentForm, host_key
from experiments.looks import look
from experiments.models import Experiment, Host
from experiments.pictures import LEGEND, depth_picture, learned_picture, width_picture
from experiments.presets import FIRST_LOOK, PRESETS
from experiments.proposals import proposed
from experiments.values import DIMENSIONS, left_out, values_of
from experiments.views.hosts import require_recent
from trainer.families import FamilyError, family_of
from trainer.growth import OPERATORS, GrowthError, Operator
from trainer.growth.learned import ABOUT as LEARNED
from trainer.growth.targets import shape_for

#: Rules of each half that are in sight: one row.
CARDS_SHOWN = 3


def train(request: HttpRequest) -> HttpResponse:
    """The form: filled from a preset or an earlier experiment on GET, started on POST, or filled in further."""
    if request.method == "POST":
        return _propose(request) if "propose" in request.POST else _start(request)
    return _fresh(request)


@require_safe
def _fresh(request: HttpRequest) -> HttpResponse:
    context: dict[str, Any] = {}
    preset = PRESETS.get(request.GET.get("preset", ""), FIRST_LOOK)
    spec = preset.spec
    if "from" in request.GET:
        origin = _origin(request)
        spec = origin.spec
        context |= {"origin": origin, "left_out": left_out(spec)}
    else:
        context["preset"] = preset
    values = values_of(spec)
    if "origin" in context:
        origin = context["origin"]
        values["name"] = origin.name  # it may have been renamed since
        if Host.objects.usable_by(request.user).filter(pk=origin.host_id).exists():
            values["host"] = host_key(origin.host)
    if "checkpoint" in request.GET:
        values |= _from_checkpoint(request.GET["checkpoint"], request.user)
    wanted = request.GET.get("host", "")
    if wanted.isdecimal() and Host.objects.usable_by(request.user).filter(pk=wanted).exists():
        values["host"] = wanted
    if values["uploaded"] and not sources.may_use_upload(values["uploaded"], request.user):
        values["uploaded"] = ""  # another's file: theirs alone
        context["text_is_anothers"] = True
    return _page(request, ExperimentForm(initial=values, user=request.user), **context)


def _from_checkpoint(name: str, user: Any) -> dict[str, Any]:
    """Values for an experiment whose small model is that checkpoint, and whose large one is twice as large."""
    values: dict[str, Any] = {"small_source": "checkpoint", "small_checkpoint": name, "tokenizer_kind": "pretrained"}
    values |= {f"small_{dimension}": "" for dimension in DIMENSIONS}
    try:
        config = look(sources.checkpoint(name, user)).config or {}
        family = family_of(config)
        small, n_positions, d_vocab, tied = family.shape_of(config)
        large = shape_for(family.name, small, 2.0, "both", n_positions=n_positions, d_vocab=d_vocab, tied=tied).shape
    except (ValidationError, FamilyError, GrowthError):
        return values  # the form says what is wrong, if it is still so when it is sent
    sizes = {f"large_{dimension}": getattr(large, dimension) for dimension in DIMENSIONS}
    own = {"family": family.name, "tie_embeddings": tied, "tokenizer_d_vocab": d_vocab}
    return values | own | sizes


def _origin(request: HttpRequest) -> Experiment:
    try:
        pk = UUID(request.GET["from"])
    except ValueError:
        raise Http404("an experiment is named by its id") from None
    return get_object_or_404(Experiment.objects.visible_to(request.user), pk=pk)


def _start(request: HttpRequest) -> HttpResponse:
    anonymous = not request.user.is_authenticated
    form = ExperimentForm(request.POST, request.FILES, user=request.user, owner=partial(ensure_user, request))
    only_check = "check" in request.POST
    if form.is_valid() and not only_check:
        if form.goes_to_own_machines and (first := require_recent(request, within=settings.HOST_SIGN_IN_SECONDS)):
            return first  # which leads back here, with all that was filled in
        try:
            return redirect(_create_once(request, form, anonymous))
        except jobs.LimitReached as error:
            form.add_error(None, str(error))
    return _page(request, form, status=200 if only_check else 422)


def _propose(request: HttpRequest) -> HttpResponse:
    """The form again, with what was asked for filled in: a shape, stages, or the rules that are recommended."""
    owner = partial(ensure_user, request)
    form = ExperimentForm(request.POST, request.FILES, user=request.user, owner=owner)
    form.is_valid()
    may_look = partial(ratelimit.consume, request, action="look")
    proposal = proposed(form, request.POST["propose"], may_look=lambda: bool(may_look()))
    filled = form.data.copy()  # type: ignore[attr-defined]
    for field, value in proposal.values.items():
        filled[field] = value
    again = ExperimentForm(filled, user=form.user, owner=owner)
    again.is_valid()
    for field, message in proposal.errors.items():
        again.add_error(field, message)
    return _page(request, again, proposal=proposal)


def _create_once(request: HttpRequest, form: ExperimentForm, anonymous: bool) -> Experiment:
    """The experiment of this very form. Its id follows from the form's key and content, so a double click makes one."""
    assert form.spec is not None
    pk = form.experiment_id()
    experiment = Experiment.objects.filter(pk=pk).first()
    if experiment is None:
        owner = ensure_user(request)
        try:
            hosts = {name: form.host_of(name) for name in form.spec.models}
            notes, gpus = form.cleaned_data["notes"], form.cleaned_data["gpus"]
            return jobs.create(owner, form.spec, notes, form.host_of(""), hosts=hosts, gpus=gpus, id=pk)
        except (IntegrityError, jobs.LimitReached):
            experiment = Experiment.objects.filter(pk=pk).first()
            if experiment is None:
                raise
            # else the other click was quicker
    if anonymous and experiment.owner is not None and experiment.owner.is_guest and experiment.owner != request.user:
        # Both clicks came before there was a guest. Who knows the form's key, which no other page shows, is that guest.
        login(request, experiment.owner, backend="django.contrib.auth.backends.ModelBackend")
    return experiment


@require_POST
def train_estimate(request: HttpRequest) -> HttpResponse:
    """The side sheet for what stands in the form now. Keeps nothing and makes no guest."""
    form = ExperimentForm(request.POST, user=request.user)
    sheet = _sheet(form)
    # The file itself does not travel with every keystroke, so whether there is one cannot be judged here.
    sheet["problems"] = [problem for problem in sheet["problems"] if problem.field != "upload"]
    return render(request, "experiments/train.html#sheet", sheet | {"live": True})


def _page(request: HttpRequest, form: ExperimentForm, status: int = 200, **context: Any) -> HttpResponse:
    sheet = _sheet(form if form.is_bound else ExperimentForm(form.initial, user=request.user))
    context |= sheet | {
        "form": form,
        "presets": PRESETS.values(),
        "growth": [half(form, kind, sheet["cards"][kind]) for kind in OPERATORS],
        "learned": LEARNED,
        "learned_picture": learned_picture(),
        "legend": LEGEND,
        "max_upload_mb": settings.MAX_UPLOAD_MB,
        "local_dirs": settings.LOCAL_DATA_DIRS,
    }
    return render(request, "experiments/train.html", context, status=status)


def _sheet(form: ExperimentForm) -> dict[str, Any]:
    """What the side sheet shows, and every rule's card, so that a verdict which no longer holds is taken away."""
    found = estimate(form)
    return {
        "estimate": found,
        "cards": {kind: cards(form, kind, found) for kind in OPERATORS},
        "advised": _advised(found),
        "problems": form.summary,
    }


class Advised(NamedTuple):
    """What is recommended, in words."""

    rules: list[str]
    snr_db: float | None
    why: str
    is_chosen: bool


def _advised(found: Estimate) -> Advised | None:
    if found.advice is None or found.chosen is None:
        return None
    advice, init = found.advice, found.chosen.init
    rules = {half: next(rule for rule in OPERATORS[half] if rule.key == getattr(advice, half)) for half in OPERATORS}
    return Advised(
        [rules[half].title for half in rules if half in found.costs] or [rules["width"].title],
        advice.snr_db,
        advice.why,
        all(getattr(init, half) == rules[half].key for half in rules) and advice.snr_db in (None, init.snr_db),
    )


class Card(NamedTuple):
    """A growth rule as a radio button with what it does."""

    radio: BoundWidget
    rule: Operator
    key: str
    picture: SafeString
    recommended: bool
    verdict: Verdict | None  # None: nothing can be said
    cost: Cost | None
    closed: bool  # cannot be chosen: leads nowhere for these shapes


def cards(form: Form, kind: Literal["width", "depth"], found: Estimate) -> list[Card]:
    """A card for every rule of width or depth; `form` has a field of that name."""
    chosen = form[kind].value()
    return [_card(radio, rule, kind, chosen, found) for radio, rule in zip(form[kind], OPERATORS[kind], strict=True)]


def _card(radio: BoundWidget, rule: Operator, kind: Literal["width", "depth"], chosen: str, found: Estimate) -> Card:
    verdict = found.rules.get(f"{kind}_{rule.key}")
    closed = verdict is not None and verdict.kind == "impossible" and rule.key != chosen
    if closed:
        radio.data["attrs"]["disabled"] = True
    return Card(
        radio=radio,
        rule=rule,
        key=f"{kind}_{rule.key}",
        picture=_picture(kind, rule.key, found.chosen),
        recommended=found.advice is not None and getattr(found.advice, kind) == rule.key,
        verdict=verdict,
        cost=found.costs.get(kind),
        closed=closed,
    )


class Half(NamedTuple):
    """The rules of width or of depth: those that are in sight, and those that are folded away unless one is chosen."""

    field: BoundField
    shown: list[Card]
    folded: list[Card]
    is_open: bool


def half(form: Form, kind: Literal["width", "depth"], cards: list[Card]) -> Half:
    shown, folded = cards[:CARDS_SHOWN], cards[CARDS_SHOWN:]
    return Half(form[kind], shown, folded, any(c.recommended or c.rule.key == form[kind].value() for c in folded))


def _picture(kind: Literal["width", "depth"], rule: str, chosen: Chosen | None) -> SafeString:
    if kind == "depth":
        return depth_picture(rule, *((chosen.small.n_layers, chosen.large.n_layers) if chosen else (4, 8)))
    if chosen is None:
        return width_picture("llama", rule, 2.0)
    ratio = chosen.large.d_model / chosen.small.d_model
    return width_picture(chosen.family, rule, round(ratio, 1) if ratio > 1 else 2.0, chosen.init.split)
