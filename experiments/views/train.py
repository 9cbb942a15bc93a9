"""The Train page: an experiment put together, seen through beforehand, and started."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple
from uuid import UUID

from django.conf import settings
from django.contrib.auth import login
from django.db import IntegrityError
from django.forms.boundfield import BoundField, BoundWidget
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST, require_safe

from accounts.guests import ensure_user
from experiments import jobs, sources
from experiments.estimate import Verdict, estimate
from experiments.forms import ExperimentForm, host_key
from experiments.models import Experiment, Host
from experiments.presets import FIRST_LOOK, PRESETS
from experiments.values import left_out, values_of
from experiments.views.hosts import require_recent
from trainer.growth import OPERATORS, Operator


def train(request: HttpRequest) -> HttpResponse:
    """The form: filled from a preset or an earlier experiment on GET, started on POST."""
    if request.method == "POST":
        return _start(request)
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
    wanted = request.GET.get("host", "")
    if wanted.isdecimal() and Host.objects.usable_by(request.user).filter(pk=wanted).exists():
        values["host"] = wanted
    if values["uploaded"] and not sources.may_use_upload(values["uploaded"], request.user):
        values["uploaded"] = ""  # another's file: theirs alone
        context["text_is_anothers"] = True
    return _page(request, ExperimentForm(initial=values, user=request.user), **context)


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
        "growth": [_cards(form, kind, sheet["rules"]) for kind in OPERATORS],
        "max_upload_mb": settings.MAX_UPLOAD_MB,
        "local_dirs": settings.LOCAL_DATA_DIRS,
    }
    return render(request, "experiments/train.html", context, status=status)


def _sheet(form: ExperimentForm) -> dict[str, Any]:
    """What the side sheet shows. `rules` has every rule, so that a verdict which no longer holds is taken away."""
    found = estimate(form)
    every = {f"{kind}_{rule.key}": None for kind, rules in OPERATORS.items() for rule in rules}
    return {"estimate": found, "rules": every | found.rules, "problems": form.summary}


class Card(NamedTuple):
    """A growth rule as a radio button with what it does."""

    radio: BoundWidget
    rule: Operator
    key: str  # of its verdict in `rules`
    verdict: Verdict | None


def _cards(
    form: ExperimentForm, kind: Literal["width", "depth"], rules: dict[str, Verdict | None]
) -> tuple[BoundField, list[Card]]:
    field = form[kind]
    keys = [f"{kind}_{rule.key}" for rule in OPERATORS[kind]]
    return field, [
        Card(radio, rule, key, rules[key]) for radio, rule, key in zip(field, OPERATORS[kind], keys, strict=True)
    ]
