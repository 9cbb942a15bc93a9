"""Growing a checkpoint by itself: the form with its plan, one's growths, and one with its certificate and files.

Whoever may not see a growth is told that there is none.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from allauth.core import ratelimit
from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.db import IntegrityError
from django.http import Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.views.decorators.http import require_POST, require_safe

from accounts.guests import ensure_user
from experiments import growths as growing
from experiments import mirror
from experiments.estimate import Estimate, advice_of, costs_of, rules_of
from experiments.growth_forms import GrowthForm, owned_by
from experiments.jobs import LimitReached
from experiments.lineages import drawn
from experiments.models import Growth, Reason, State
from experiments.pictures import LEGEND
from experiments.views import downloads, polls
from experiments.views.downloads import download
from experiments.views.train import cards, half
from trainer.growth import OPERATORS, GrowthError
from trainer.growth.lineage import lineage

PAGE_SIZE = 20
SECTIONS = ("head", "progress", "result", "files")
#: Tensors of a certificate that a page lists: those with the largest residuals.
SHOWN_TENSORS = 20

#: What a person can do about a failure.
ADVICE: dict[str, str] = {
    Reason.BAD_CHECKPOINT: "Check the checkpoint's name or folder, and begin again with the right one.",
    Reason.DISK_FULL: "Delete what is no longer needed, or choose a smaller target; then try again.",
    Reason.OUT_OF_MEMORY: "Growing needs little memory, measuring has both models in it: tried again, it is not "
    "measured.",
    Reason.KILLED: "Try again: nothing half-made was kept, and it begins anew.",
    Reason.LOST: "Try again: nothing half-made was kept, and it begins anew.",
    Reason.ERROR: "If what was said names a setting, begin again with another; else try again.",
}
#: What is being done, for people.
PHASES = {
    "": "starting",
    "fetching": "fetching the checkpoint from the Hub",
    "converting": "converting the checkpoint",
    "writing": "writing the grown weights",
    "verifying": "holding every tensor to the certificate",
    "measuring": "measuring both models on a text",
    "hashing": "taking the files' digests",
}


# The form -------------------------------------------------------------------------------------------------------------


def grow(request: HttpRequest) -> HttpResponse:
    """The form, filled in for what the address names on GET; put in line on POST."""
    if request.method == "POST":
        return _start(request)
    return _fresh(request)


@require_safe
def _fresh(request: HttpRequest) -> HttpResponse:
    values = GrowthForm.usual()
    wanted = {f"{kind}-{request.GET[kind]}" for kind in ("run", "growth") if kind in request.GET}
    if key := next((each.key for each in owned_by(request.user) if each.key in wanted), None):
        values |= {"source_kind": "mine", "mine": key}
    if "checkpoint" in request.GET:
        values |= {"source_kind": "named", "checkpoint": request.GET["checkpoint"]}
    return _page(request, GrowthForm(initial=values, user=request.user))


def _start(request: HttpRequest) -> HttpResponse:
    anonymous = not request.user.is_authenticated
    wants_to_look = "look" in request.POST or not _is_only_check(request)
    form = GrowthForm(request.POST, user=request.user, ask=wants_to_look and _may_look(request))
    if form.is_valid() and not _is_only_check(request):
        if form.plan is None:
            form.add_error(
                "checkpoint", f"{form['checkpoint'].label}: it is being looked up; begin once its plan is there"
            )
        else:
            try:
                return redirect(_create_once(request, form, anonymous))
            except LimitReached as error:
                form.add_error(None, str(error))
    return _page(request, form, status=200 if _is_only_check(request) else 422)


def _is_only_check(request: HttpRequest) -> bool:
    return "check" in request.POST or "look" in request.POST


def _may_look(request: HttpRequest) -> bool:
    """A look-up starts a process: one address may have so many."""
    return bool(ratelimit.consume(request, action="look"))


def _create_once(request: HttpRequest, form: GrowthForm, anonymous: bool) -> Growth:
    """The growth of this very form. Its id follows from the form's key and content, so a double click makes one."""
    pk = form.growth_id()
    known: Growth | None = Growth.objects.owned_by(request.user).filter(pk=pk).first()
    if known is None:
        owner = ensure_user(request)
        try:
            return growing.create(owner, pk, **form.fields_of_row())
        except (IntegrityError, LimitReached):
            known = Growth.objects.owned_by(owner).filter(pk=pk).first()
            if known is None:
                raise
    return known


@require_POST
def grow_plan(request: HttpRequest) -> HttpResponse:
    """The plan of what stands in the form now. Keeps nothing and makes no guest."""
    form = GrowthForm(request.POST, user=request.user, ask="look" in request.POST and _may_look(request))
    form.is_valid()
    return render(request, "experiments/grow.html#sheet", _sheet(form) | {"live": True})


def _page(request: HttpRequest, form: GrowthForm, status: int = 200) -> HttpResponse:
    judged = form
    if not form.is_bound:
        judged = GrowthForm(form.initial, user=request.user)
        judged.is_valid()
    mine = Growth.objects.owned_by(request.user)
    context = _sheet(judged) | ({"problems": form.summary} if form.is_bound else {})
    context |= {
        "form": form,
        "judged": judged,
        "local_dirs": settings.LOCAL_DATA_DIRS,
        "count": mine.count(),
    }
    return render(request, "experiments/grow.html", context, status=status)


def _estimate(form: GrowthForm) -> Estimate:
    """What the cards of the rules want to know."""
    chosen = form.chosen
    if chosen is None or form.plan is None:
        return Estimate()
    costs = costs_of(chosen, form.plan.n_positions, form.plan.d_vocab)
    return Estimate(chosen=chosen, rules=rules_of(chosen), advice=advice_of(chosen), costs=costs)


class Size(NamedTuple):
    """A row of the plan: what, now, and grown."""

    name: str
    before: Any
    after: Any

    @property
    def grows(self) -> bool:
        return bool(self.before != self.after)


def _sheet(form: GrowthForm) -> dict[str, Any]:
    """What the side sheet shows."""
    source, made, found = form.source, form.plan, _estimate(form)
    context: dict[str, Any] = {
        "source": source,
        "plan": made,
        "problems": form.summary if form.names_a_source else [],
        "shape": form.shape(),
        "growth": [half(form, kind, cards(form, kind, found)) for kind in OPERATORS],
        "legend": LEGEND,
        "picture": made and drawn(lineage(made), "the grown model", "the checkpoint"),
    }
    if source is not None and made is not None:
        planned = form.planned()
        context |= {
            "planned": planned,
            "rows": _rows(planned),
            "before_bytes": round(source.parameters * source.bytes_each),
            "measures": form.cleaned_data.get("measures"),
            "fits": form.fits(planned["child"]["parameters"]),
        }
    return context


def _rows(planned: dict[str, Any]) -> list[Size]:
    """Every size, before and after."""
    before, after = planned["parent"], planned["child"]
    names = [name for name in before["shape"] if name != "layer_norm_eps"]
    found = [Size(name, _size(before["shape"], name), _size(after["shape"], name)) for name in names]
    return found + [Size(name, before[name], after[name]) for name in ("d_vocab", "n_positions")]


def _size(shape: dict[str, Any], name: str) -> Any:
    return shape["n_heads"] if name == "n_kv_heads" and shape[name] is None else shape[name]


# One's growths --------------------------------------------------------------------------------------------------------


@require_safe
def growths(request: HttpRequest) -> HttpResponse:
    """The user's growths, the newest first. A poll (with `seen` marks) is answered with the rows that changed."""
    mine = Growth.objects.owned_by(request.user).defer("certificate")
    if "seen" in request.GET:
        seen = polls.seen(request)
        found = [growth for growth in mine[: 5 * PAGE_SIZE] if str(growth.pk) in seen]
        rows = [_row(request, growth) for growth in found]
        changed = [row for row in rows if seen[row["name"]] != row["mark"]]
        return polls.answer(_pieces_of(changed), settled=not any(growth.is_active for growth in found))
    page = Paginator(mine, PAGE_SIZE).get_page(request.GET.get("page"))
    context = {
        "page": page,
        "rows": [_row(request, growth) for growth in page.object_list],
        "is_live": any(growth.is_active for growth in page.object_list),
        "signed_out": not request.user.is_authenticated,
    }
    if request.user.is_authenticated:
        context |= {"used": mirror.bytes_here(request.user), "most": settings.MAX_DISK_GB_PER_USER * 10**9}
    return render(request, "experiments/growths.html", context)


def _row(request: HttpRequest, growth: Growth) -> dict[str, str]:
    return polls.section(request, "experiments/growths.html#row", str(growth.pk), {"growth": growth, **_words(growth)})


@require_safe
def growth(request: HttpRequest, pk: UUID) -> HttpResponse:
    """A growth's page. A poll (with `seen` marks) is answered with the sections that changed."""
    found = _visible(request, pk)
    may_change = found.may_change(request.user)  # type: ignore[arg-type]
    context: dict[str, Any] = {
        "growth": found,
        "may_change": may_change,
        "rows": _rows(found.planned),
        **_words(found),
        **_result(found),
    }
    page = "experiments/growth.html"
    sections = {name: polls.section(request, f"{page}#{name}", name, context) for name in SECTIONS}
    if "seen" in request.GET:
        seen = polls.seen(request)
        changed = [section for name, section in sections.items() if seen.get(name) != section["mark"]]
        return polls.answer(_pieces_of(changed), settled=not found.is_active)
    context |= {"sections": sections, "asks_delete": "delete" in request.GET}
    with suppress(GrowthError):  # the rules have changed since
        context["picture"] = drawn(lineage(found.plan), "the grown model", found.source_name)
    return render(request, page, context)


def _pieces_of(sections: Iterable[dict[str, str]]) -> list[str]:
    return [render_to_string("experiments/experiment.html#piece", section) for section in sections]


def _words(growth: Growth) -> dict[str, Any]:
    """What is said of how it stands."""
    place = growing.place_in_line(growth)
    words = Reason(growth.reason).label
    if place is not None:
        words = "next in line" if place == 1 else f"number {place} in line"
    elif growth.state == State.RUNNING:
        words = "ending" if growth.reason == Reason.STOPPING else PHASES.get(growth.phase, growth.phase)
    return {"words": words, "advice": ADVICE.get(growth.reason, "") if growth.is_resumable else ""}


def _result(growth: Growth) -> dict[str, Any]:
    """Its certificate as a page wants it, and its files."""
    held = growth.certificate
    if growth.state != State.SUCCEEDED or held is None:
        return {}
    tensors = sorted(held["tensors"].items(), key=lambda each: (-each[1], each[0]))
    measured = held["measured"]
    return {
        "certificate": held,
        "tensors": tensors[:SHOWN_TENSORS],
        "measured_kept": bool(measured) and measured["max_logit_difference"] <= measured["allowed"],
        "is_there": growth.model.is_dir(),
        "small": str(growth.model),
    }


# Files ----------------------------------------------------------------------------------------------------------------


@require_safe
def growth_zip(request: HttpRequest, pk: UUID) -> HttpResponseBase:
    """The grown folder and its certificate as a zip file, made while it is sent."""
    found = _finished(request, pk)
    title = f"grown-{found.pk}"
    more = {"certificate.json": _certificate_text(found)}
    return download(downloads.zipped(found.model, title, more), "application/zip", f"{title}.zip")


@require_safe
def growth_file(request: HttpRequest, pk: UUID, name: str) -> HttpResponseBase:
    """One file of the grown folder, its size told beforehand."""
    found = _finished(request, pk)
    path = next((path for path in downloads.members(found.model) if path.name == name), None)
    if path is None:
        raise Http404("No such file")
    response = download(_pieces(path), "application/octet-stream", name)
    if response.status_code == 200:
        response["Content-Length"] = str(path.stat().st_size)
    return response


def _pieces(path: Path) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block


@require_safe
def growth_certificate(request: HttpRequest, pk: UUID) -> HttpResponse:
    """certificate.json: what was asked for, each tensor's residual, what was measured, and the files' digests."""
    found = _finished(request, pk)
    response = HttpResponse(_certificate_text(found), content_type="application/json")
    response["Content-Disposition"] = f'attachment; filename="certificate-{found.pk}.json"'
    return response


def _certificate_text(growth: Growth) -> bytes:
    return (json.dumps(growth.certificate, indent=1) + "\n").encode()


def _finished(request: HttpRequest, pk: UUID) -> Growth:
    found = _visible(request, pk)
    if found.state != State.SUCCEEDED or not found.model.is_dir():
        raise Http404("Nothing to download")
    return found


# What may be done to it -----------------------------------------------------------------------------------------------


@require_POST
def growth_stop(request: HttpRequest, pk: UUID) -> HttpResponse:
    found = _own(request, pk)
    if found.is_active:
        growing.request_stop(found)
        messages.info(request, "Cancelled: what was written of it is removed.")
    return redirect(found)


@require_POST
def growth_retry(request: HttpRequest, pk: UUID) -> HttpResponse:
    found = _own(request, pk)
    if found.is_resumable:
        try:
            growing.retry(found)
        except LimitReached as limit:
            messages.error(request, str(limit))
    return redirect(found)


@require_POST
def growth_delete(request: HttpRequest, pk: UUID) -> HttpResponse:
    found = _own(request, pk)
    name = found.name
    found.delete()
    messages.info(request, f"“{name}” is deleted, with its files.")
    return redirect("growths")


# Who may see what -----------------------------------------------------------------------------------------------------


def _visible(request: HttpRequest, pk: UUID) -> Growth:
    visible = Growth.objects.visible_to(request.user).select_related("owner", "source_run__experiment")
    return get_object_or_404(visible, pk=pk)


def _own(request: HttpRequest, pk: UUID) -> Growth:
    found = _visible(request, pk)
    if not found.may_change(request.user):  # type: ignore[arg-type]
        raise Http404("No such growth")
    return found
