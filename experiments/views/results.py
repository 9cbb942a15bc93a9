"""What came of it: Profile, an experiment's page, its figures as JSON and CSV, its files, and what may be done to it.

A page is made of sections. Each carries a mark of what it showed; a poll brings the marks back and is answered with the
sections that look different now, or with 204. Whoever may not see an experiment is told that there is none.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

from django import forms
from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Exists, F, Min, OuterRef, Prefetch, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.cache import get_conditional_response
from django.utils.http import quote_etag
from django.utils.safestring import SafeString
from django.views.decorators.http import require_POST, require_safe

from experiments import jobs
from experiments.curves import Memory, curves, increment, parse_place, place, sparks
from experiments.host_standing import host_standings
from experiments.models import ACTIVE, RESUMABLE, Experiment, ModelRun, Point, State, Transfer
from experiments.report import Report
from experiments.standing import Standing, standings
from experiments.transport.local import Local
from experiments.views import downloads, polls
from experiments.views.downloads import download

PAGE_SIZE = 20
#: The runs of experiments, and where each trains, in one query.
_RUNS = Prefetch("runs", ModelRun.objects.select_related("host"))
#: Bytes of a log that a page shows.
LOG_TAIL = 12_000
#: Checkpoints that a trainer keeps.
KEPT_CHECKPOINTS = 2

SORTS = {
    "newest": ("Newest", ("-created",)),
    "oldest": ("Oldest", ("created",)),
    "name": ("Name", ("name", "-created")),
    "loss": ("Lowest validation loss", (F("best").asc(nulls_last=True), "-created")),
}
STATES = {
    "running": ("Waiting or running", Q(runs__state__in=ACTIVE)),
    "finished": ("Finished", ~Q(runs__state__in=[*ACTIVE, *RESUMABLE])),
    "ended": ("Failed or stopped", Q(runs__state__in=RESUMABLE)),
}


class _Filter(forms.Form):
    q = forms.CharField(required=False)
    state = forms.ChoiceField(required=False, choices=[("", "All"), *((k, v[0]) for k, v in STATES.items())])
    sort = forms.ChoiceField(required=False, choices=[(k, v[0]) for k, v in SORTS.items()])


class _NameForm(forms.ModelForm):  # type: ignore[type-arg]  # generic for the type checker alone
    class Meta:
        model = Experiment
        fields = ("name", "notes")


# Profile --------------------------------------------------------------------------------------------------------------


@require_safe
def profile(request: HttpRequest) -> HttpResponse:
    """The user's experiments, those that wait or run on top. A poll (with `seen` marks) is answered in pieces."""
    if not request.user.is_authenticated:
        return render(request, "experiments/profile.html", {"signed_out": True})
    mine = Experiment.objects.owned_by(request.user).select_related("host").prefetch_related(_RUNS)
    if "HX-Request" in request.headers:
        return _profile_poll(request, mine)
    wanted = _Filter(request.GET)
    chosen = wanted.cleaned_data if wanted.is_valid() else {}
    page = Paginator(_filtered(mine, chosen), PAGE_SIZE).get_page(request.GET.get("page"))
    query = request.GET.copy()
    query.pop("page", None)
    context = {
        "page": page,
        "cards": _cards(page.object_list),
        "is_live": any(run.is_active for experiment in page.object_list for run in experiment.runs.all()),
        "filter": {name: chosen.get(name, "") for name in ("q", "state", "sort")},
        "is_filtered": any(chosen.get(name) for name in ("q", "state")),
        "states": [("", "All"), *((key, words) for key, (words, _) in STATES.items())],
        "sorts": [(key, words) for key, (words, _) in SORTS.items()],
        "query": query.urlencode(),
    }
    return render(request, "experiments/profile.html", context)


def _filtered(mine: QuerySet[Experiment], chosen: dict[str, str]) -> QuerySet[Experiment]:
    if words := chosen.get("q"):
        mine = mine.filter(Q(name__icontains=words) | Q(notes__icontains=words))
    if chosen.get("state"):
        # By key, so that joining the runs neither doubles a row nor hides a run of one that stays.
        matching = Experiment.objects.filter(STATES[chosen["state"]][1])
        mine = mine.filter(pk__in=matching.values("pk"))
    order = SORTS.get(chosen.get("sort") or "newest", SORTS["newest"])[1]
    if chosen.get("sort") == "loss":
        mine = mine.annotate(best=Min("runs__validation_cross_entropy"))
    active = ModelRun.objects.filter(experiment=OuterRef("pk"), state__in=ACTIVE)
    return mine.annotate(active_now=Exists(active)).order_by("-active_now", *order)


#: Cards of experiments that are over, drawn, by what they show: most of a profile stays as it is.
_CARDS: Memory[SafeString] = Memory(1000)


def _cards(experiments: Iterable[Experiment]) -> list[SafeString]:
    """The drawn card of each experiment."""
    found = standings(experiments)
    known = {standing.version: _CARDS.get((standing.experiment.pk, standing.version)) for standing in found}
    _add_sparks([standing for standing in found if known[standing.version] is None])
    drawn = []
    for standing in found:
        card = known[standing.version] or render_to_string("experiments/profile.html#card", {"card": standing})
        if not standing.is_active:  # one that goes on also says for how long it has
            _CARDS.put((standing.experiment.pk, standing.version), card)
        drawn.append(card)
    return drawn


def _add_sparks(found: list[Standing]) -> None:
    totals = {each.run.pk: each.total for standing in found for each in standing.runs}
    lines = sparks([[each.run for each in standing.runs] for standing in found], totals)
    for standing in found:
        for each in standing.runs:
            each.spark = lines.get(each.run.pk, "")


def _profile_poll(request: HttpRequest, mine: QuerySet[Experiment]) -> HttpResponse:
    seen = {pk: mark for text, mark in polls.seen(request).items() if (pk := _uuid(text)) is not None}
    found = standings(mine.filter(pk__in=list(seen)[:PAGE_SIZE]))
    changed = [standing for standing in found if seen[standing.experiment.pk] != standing.version]
    _add_sparks(changed)
    pieces = [render_to_string("experiments/profile.html#live", {"card": card, "oob": True}) for card in changed]
    return polls.answer(pieces, settled=not any(standing.is_active for standing in found))


# An experiment --------------------------------------------------------------------------------------------------------


@require_safe
def experiment(request: HttpRequest, pk: UUID) -> HttpResponse:
    """An experiment's page. A poll (with `seen` marks) is answered with the sections that changed."""
    return _experiment_page(request, _visible(request, pk))


def _experiment_page(
    request: HttpRequest, experiment: Experiment, form: _NameForm | None = None, status: int = 200
) -> HttpResponse:
    (standing,) = standings([experiment])
    standing.shows_machines = True
    if any(each.run.host.is_remote for each in standing.runs):
        standing.transfers = list(Transfer.objects.filter(run__experiment=experiment))
    seen = polls.seen(request)
    if seen.get("all") == standing.version:
        return polls.answer([], settled=not standing.is_live)
    report = Report(standing, split=request.GET.get("split", ""))
    context = {
        "experiment": experiment,
        "standing": standing,
        "report": report,
        "may_change": experiment.may_change(request.user),  # type: ignore[arg-type]
        "logs": _logs(standing),
        "files": _files(standing),
        "machines": _machines(request, standing),
    }
    page = "experiments/experiment.html"
    sections = {name: polls.section(request, f"{page}#{name}", name, context) for name in Report.SECTIONS}
    if "seen" in request.GET:
        pieces = [
            render_to_string("experiments/experiment.html#piece", section, request=request)
            for name, section in sections.items()
            if seen.get(name) != section["mark"]
        ]
        pieces.append(render_to_string("experiments/experiment.html#version", {"standing": standing, "oob": True}))
        return polls.answer(pieces, settled=not standing.is_live)
    context |= {
        "sections": sections,
        "form": form or _NameForm(instance=experiment),
        "asks_delete": "delete" in request.GET,
        "chart": _chart_settings(request),
    }
    return render(request, "experiments/experiment.html", context, status=status)


def _chart_settings(request: HttpRequest) -> dict[str, Any]:
    """What the address says of the chart; anything unknown falls back to what a first visit shows."""
    get = request.GET

    def one_of(name: str, *allowed: str) -> str:
        return get[name] if get.get(name) in allowed else allowed[0]

    return {
        "y": one_of("y", *(name for name, _ in Report.FIGURES)),
        "split": one_of("split", *Report.SPLITS),
        "x": one_of("x", *(name for name, _ in Report.AXES)),
        "charge": "charge" in get,
        "logx": "logx" in get,
        "logy": "logy" in get,
        "smooth": get["smooth"] if re.fullmatch(r"0(\.\d{1,2})?", get.get("smooth", "")) else "",
    }


def _machines(request: HttpRequest, standing: Standing) -> list[dict[str, Any]]:
    """The machines on which runs of the experiment train now, and how they stand: for who trains there alone."""
    if not standing.experiment.may_change(request.user):  # type: ignore[arg-type]
        return []
    hosts = {each.run.host.pk: each.run.host for each in standing.runs if each.run.is_active and each.run.host.readings}
    found = []
    for machine in host_standings(hosts.values(), request.user):  # type: ignore[arg-type]
        runs = [each for each in standing.runs if each.run.host_id == machine.host.pk]
        price = machine.host.price_per_hour
        hours = sum(each.runtime or 0.0 for each in runs) / 3600
        cost = None if price is None else round(float(price) * hours, 2)
        found.append({"standing": machine, "runs": runs, "cost": cost})
    return found


def _logs(standing: Standing) -> list[dict[str, str]]:
    """The end of each model's log, as far as this machine can read it."""
    found = []
    for each in standing.runs:
        text = _tail(each.run, LOG_TAIL)
        if text:
            found.append({"name": each.name, "text": text})
    return found


def _tail(run: ModelRun, most: int) -> str:
    try:
        with Local(run.host).open_file(run, "log.txt") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - most))
            text = file.read(most).decode(errors="replace")
    except OSError:
        return ""
    # A progress bar rewrites its line with carriage returns; what was last on the line is what a person would see.
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines[1:] if size > most else lines).strip("\n")


def _files(standing: Standing) -> list[dict[str, Any]]:
    """Final models and checkpoints, the newest of a model first: those that stand here, and those still on a host."""
    transfers = {(transfer.run_id, transfer.name): transfer for transfer in standing.transfers}
    found = []
    for each in standing.runs:
        steps = {path.name for path in each.run.directory.glob("checkpoints/step-*")} | _on_host(each.run)
        for name in ["model", *sorted(steps, reverse=True)]:
            about = {"model": each.name, "run": each.run.pk, "colour": each.colour, "name": name, "host": each.run.host}
            if (folder := _checkpoint(each.run, name)) is not None:
                found.append({**about, "bytes": downloads.bytes_of(folder), "is_here": True})
            elif each.run.host.is_remote and (name != "model" or each.run.state == State.SUCCEEDED):
                found.append({**about, "transfer": transfers.get((each.run.pk, name)), "is_here": False})
    return found


def _on_host(run: ModelRun) -> set[str]:
    """Names of the checkpoints that a run's host should have: the trainer keeps its newest."""
    if not run.host.is_remote:
        return set()
    notes = run.notes.filter(kind="checkpoint").order_by("-seq").values_list("data__step", flat=True)
    return {f"step-{step:06d}" for step in notes[:KEPT_CHECKPOINTS] if isinstance(step, int)}


def _checkpoint(run: ModelRun, name: str) -> Path | None:
    """The folder of a checkpoint (`step-000400`) or of the final `model`; None if the run directory has none."""
    if not re.fullmatch(r"model|step-\d+", name):
        return None
    folder = run.directory / ("model" if name == "model" else f"checkpoints/{name}")
    inside = run.directory.resolve() / folder.relative_to(run.directory)
    return folder if folder.is_dir() and folder.resolve() == inside else None  # a link leads elsewhere


# Figures --------------------------------------------------------------------------------------------------------------


@require_safe
def metrics(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Curves for the chart. `after` is the place an earlier answer gave; unchanged since is answered with 304."""
    experiment = _visible(request, pk)
    (standing,) = standings([experiment])
    known = request.GET.get("after", "")
    etag = quote_etag(hashlib.sha256(f"{experiment.pk} {standing.version} {known}".encode()).hexdigest()[:20])
    if (unchanged := get_conditional_response(request, etag=etag)) is not None:
        return unchanged
    body = _BODIES.get(etag) or _metrics_body(standing, known)
    _BODIES.put(etag, body)
    response = HttpResponse(body, content_type="application/json")
    response["ETag"] = etag
    response["Cache-Control"] = "private, no-cache"
    return response


#: By their tags, so that many readers of one curve, or one who comes back, cost its making once.
_BODIES: Memory[bytes] = Memory(32)


def _metrics_body(standing: Standing, known: str) -> bytes:
    runs = [each.run for each in standing.runs]
    series = curves(runs, {each.name: each.total for each in standing.runs})
    reader = parse_place(known)
    models = []
    for each in standing.runs:
        run, parts = each.run, {}
        for split in Report.SPLITS:
            curve = series[run.name, split]
            start, points = increment(curve, reader.get((run.name, split)))
            parts[split] = {"from": start, "total": curve.total, "shown": len(curve.points), **_columns(points)}
        cost = {"step": run.step, "tokens": run.tokens, "flops": run.flops, "seconds": round(run.train_seconds, 2)}
        about = {"name": run.name, "parent": each.parent or None, "colour": each.colour, "state": run.state}
        models.append({**about, "cost": cost, "series": parts})
    answer = {"place": place(series), "active": standing.is_active, "models": models}
    return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()


def _columns(points: Any) -> dict[str, list[Any]]:
    """Points by column; a column that holds nothing is left out."""
    columns: dict[str, list[Any]] = {
        "step": [point.step for point in points],
        "tokens": [point.tokens for point in points],
        "flops": [float(f"{point.flops:.5g}") for point in points],
        "seconds": [round(point.seconds, 2) for point in points],
        "loss": [None if point.loss is None else round(point.loss, 5) for point in points],
    }
    for name in ("accuracy", "bits_per_byte"):
        values = [getattr(point, name) for point in points]
        if any(value is not None for value in values):
            columns[name] = [None if value is None else round(value, 5) for value in values]
    return columns


_CSV = ("split", "step", "tokens", "flops", "train_seconds", "cross_entropy", "bits_per_byte", "accuracy", "n_tokens")


@require_safe
def metrics_csv(request: HttpRequest, pk: UUID) -> HttpResponseBase:
    """Every scalar of every model in one table, nothing left out."""
    experiment = _visible(request, pk)
    names = dict(experiment.runs.values_list("pk", "name"))
    columns = (*_CSV, "lr", "grad_norm")

    def rows() -> Generator[str, None, None]:
        line = io.StringIO()
        write = csv.writer(line).writerow
        write(("model", *columns))
        points = Point.objects.filter(run__in=names).order_by("run__position", "split", "step")
        for run, *values in points.values_list("run", *columns).iterator(chunk_size=5000):
            write((names[run], *values))
            if line.tell() > 32_000:
                yield line.getvalue()
                line.seek(0)
                line.truncate()
        yield line.getvalue()

    return download(rows(), "text/csv; charset=utf-8", f"kangaroo-{experiment.pk}.csv")


@require_safe
def spec_json(request: HttpRequest, pk: UUID) -> HttpResponse:
    """The spec, ready for `python -m trainer run`."""
    experiment = _visible(request, pk)
    response = HttpResponse(json.dumps(experiment.spec_json, indent=1) + "\n", content_type="application/json")
    response["Content-Disposition"] = f'attachment; filename="kangaroo-{experiment.pk}.json"'
    return response


# Files ----------------------------------------------------------------------------------------------------------------


@require_safe
def log(request: HttpRequest, pk: UUID, name: str) -> HttpResponse:
    """The last megabyte of a model's log, as plain text."""
    run = _run(request, pk, name)
    return HttpResponse(_tail(run, 2**20) or "No log yet.", content_type="text/plain; charset=utf-8")


@require_safe
def checkpoint(request: HttpRequest, pk: UUID, name: str, checkpoint: str) -> HttpResponseBase:
    """A checkpoint, or the final model, as a zip file: a Hugging Face folder. Made while it is sent."""
    run = _run(request, pk, name)
    folder = _checkpoint(run, checkpoint)
    if folder is None:
        raise Http404("No such checkpoint")
    title = f"{run.name}-{checkpoint}"
    return download(downloads.zipped(folder, title), "application/zip", f"{title}.zip")


# What may be done to it -----------------------------------------------------------------------------------------------


@require_POST
def edit(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Another name or other notes."""
    experiment = _own(request, pk)
    form = _NameForm(request.POST, instance=experiment)
    if not form.is_valid():
        return _experiment_page(request, _own(request, pk), form, status=422)
    experiment.save(update_fields=["name", "notes"])
    return redirect(experiment)


@require_POST
def stop(request: HttpRequest, pk: UUID) -> HttpResponse:
    experiment = _own(request, pk)
    jobs.request_stop(experiment)
    messages.info(request, "What trains writes a checkpoint and ends; what waits is cancelled. Both can be resumed.")
    return redirect(experiment)


@require_POST
def resume(request: HttpRequest, pk: UUID) -> HttpResponse:
    experiment = _own(request, pk)
    try:
        resumed = jobs.resume(experiment)
    except jobs.LimitReached as limit:
        messages.error(request, str(limit))
    else:
        names = ", ".join(run.name for run in resumed)
        messages.info(request, f"Queued again: {names}." if names else "Nothing to resume.")
    return redirect(experiment)


@require_POST
def fetch(request: HttpRequest, pk: UUID, name: str, checkpoint: str) -> HttpResponse:
    """Ask for a model or checkpoint that stands on a GPU host; the collector brings it."""
    experiment = _own(request, pk)
    run = get_object_or_404(experiment.runs.select_related("host"), name=name)
    if not run.host.is_remote or checkpoint not in {"model"} | _on_host(run):
        raise Http404("No such checkpoint")
    wanted = {"state": Transfer.State.WANTED, "error": "", "ended_at": None, "created": timezone.now()}
    transfer, made = Transfer.objects.get_or_create(run=run, name=checkpoint, defaults=wanted)
    if not made and transfer.state in (Transfer.State.FAILED, Transfer.State.DONE):
        Transfer.objects.filter(pk=transfer.pk, state=transfer.state).update(**wanted)
    return redirect(f"{experiment.get_absolute_url()}#section-files")


@require_POST
def delete(request: HttpRequest, pk: UUID) -> HttpResponse:
    experiment = _own(request, pk)
    name = experiment.name
    jobs.delete(experiment)
    messages.info(request, f"“{name}” is deleted, with its curves, checkpoints and models.")
    return redirect("profile")


# Who may see what -----------------------------------------------------------------------------------------------------


def _visible(request: HttpRequest, pk: UUID) -> Experiment:
    visible = Experiment.objects.visible_to(request.user).select_related("host", "owner").prefetch_related(_RUNS)
    return get_object_or_404(visible, pk=pk)


def _own(request: HttpRequest, pk: UUID) -> Experiment:
    """An experiment that the person may change. One shown to all is no other's to change: for them it is not there."""
    experiment = _visible(request, pk)
    if not experiment.may_change(request.user):  # type: ignore[arg-type]
        raise Http404("No such experiment")
    return experiment


def _run(request: HttpRequest, pk: UUID, name: str) -> ModelRun:
    runs = ModelRun.objects.visible_to(request.user).select_related("host", "experiment")
    return get_object_or_404(runs, experiment=pk, name=name)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
