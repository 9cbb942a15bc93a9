"""Hosts: machines of one's own, added in three steps, looked at, set up, and let go.

Whoever may not see a machine is told that there is none; guests, who may store no credential, see none at all. What
asks for a credential or uses one wants a recent sign-in. A secret that somebody types is used in the request that
brings it: it is not put into the session, not shown again, and forgotten when the request is over, unless it is the
private key that they asked to be kept, encrypted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from allauth.account import app_settings
from allauth.account.adapter import get_adapter
from allauth.account.internal.flows import login as logins
from allauth.account.internal.flows import reauthentication
from allauth.core import ratelimit
from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.core.cache import cache
from django.db import IntegrityError, transaction
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.http import urlencode
from django.views.decorators.debug import sensitive_post_parameters, sensitive_variables
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts.models import User
from accounts.views import SignedInRequest
from experiments import credentials
from experiments.host_forms import ConfirmForm, DeleteForm, HostForm, InterpreterForm, OwnKeyForm, PasswordForm
from experiments.host_standing import ACTIVE_TASKS, host_standings, text
from experiments.models import ACTIVE, Host, HostKeyPin, HostTask, ModelRun
from experiments.transport import HostProblem
from experiments.transport.client import call
from experiments.views import polls

View = Callable[..., HttpResponse]
SECTIONS = ("state", "task", "gpus", "runs", "facts")
#: Runs that a machine's page lists.
RUNS_SHOWN = 12
#: A machine that does not answer keeps a page waiting for so long at most.
SCAN_SECONDS = 25
INSTALL_SECONDS = 40

# Who may come in ------------------------------------------------------------------------------------------------------


def _members(view: View) -> View:
    """For those with an account. For guests there is nothing here; others are asked to sign in, whatever they name."""

    @wraps(view)
    def wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not request.user.is_authenticated:
            if "HX-Request" in request.headers:
                raise Http404("signed out")  # the page that polls loads itself anew
            back = request.get_full_path() if request.method in ("GET", "HEAD") else reverse("hosts")
            return redirect_to_login(back)
        if request.user.is_guest:
            raise Http404("guests have no hosts")
        return view(request, *args, **kwargs)

    return wrapper


def _recently(view: View) -> View:
    """After a recent sign-in. A POST is kept and done afterwards, so none that carries a secret may come this way."""

    @wraps(view)
    def wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        return require_recent(request) or view(request, *args, **kwargs)

    return wrapper


def require_recent(request: HttpRequest, *, within: float | None = None, instead: str = "") -> HttpResponse | None:
    """None for somebody who has proved within so many seconds who they are; for others, the way to do so now.

    Afterwards they are led back, and a POST is done as it was sent. Where a request carries a secret, name the page to
    be led to `instead`: then nothing of the request is kept.
    """
    limit = app_settings.REAUTHENTICATION_TIMEOUT if within is None else within
    records = logins.get_authentication_records(request, request.user)
    if records and time.time() - records[-1]["at"] < limit:
        return None
    methods = get_adapter().get_reauthentication_methods(request.user)
    if not methods:
        return None  # there is nothing that they could be asked for
    if instead:
        return redirect(f"{methods[0]['url']}?{urlencode({'next': instead})}")
    return reauthentication.suspend_request(request, methods[0]["url"])  # type: ignore[no-any-return]


def _visible(request: HttpRequest, pk: int) -> Host:
    host: Host = get_object_or_404(Host.objects.visible_to(request.user).select_related("jump", "owner"), pk=pk)
    return host


def _own(request: HttpRequest, pk: int) -> Host:
    """A machine that the person may change. One offered to all is no other's to change: for them it is not there."""
    host: Host = get_object_or_404(Host.objects.owned_by(request.user).select_related("jump"), pk=pk)
    return host


# The list -------------------------------------------------------------------------------------------------------------


@require_safe
@_members
def hosts(request: SignedInRequest) -> HttpResponse:
    """A card a machine: one's own, then those offered to all. A poll is answered with the cards that changed."""
    found = host_standings(Host.objects.visible_to(request.user), request.user)
    known = polls.seen(request)
    cards = [
        (each, polls.section(request, "experiments/hosts.html#live", str(each.host.pk), {"each": each}))
        for each in found
    ]
    settled = not any(each.is_live for each in found)
    if "HX-Request" in request.headers:
        pieces = [
            render_to_string("experiments/hosts.html#piece", card)
            for _, card in cards
            if card["name"] in known and known[card["name"]] != card["mark"]
        ]
        return polls.answer(pieces, settled=settled)
    context = {
        "mine": [card for card in cards if card[0].is_mine],
        "offered": [card for card in cards if not card[0].is_mine],
        "is_live": not settled,
    }
    return render(request, "experiments/hosts.html", context)


# Step 1: where it is --------------------------------------------------------------------------------------------------


@require_http_methods(["GET", "POST"])
@_members
@_recently
def host_add(request: SignedInRequest) -> HttpResponse:
    """Where it is and who one is there. A key pair is made at once, and not used before the host key is confirmed."""
    host = Host(kind=Host.Kind.SSH, owner=request.user)
    form = HostForm(request.POST or None, instance=host, owner=request.user)
    if request.method == "POST" and _saved(form):
        _make_pair(host)
        _let_through(request, host)
        _scan(request, host)
        return redirect("host_confirm", host.pk)
    return render(
        request, "experiments/host_form.html", {"form": form}, status=422 if request.method == "POST" else 200
    )


@require_http_methods(["GET", "POST"])
@_members
@_recently
def host_edit(request: SignedInRequest, pk: int) -> HttpResponse:
    host = _own(request, pk)
    name = host.name  # the form writes what was typed into the row, right or wrong
    form = HostForm(request.POST if request.method == "POST" else None, instance=host, owner=request.user)
    if request.method == "POST" and _saved(form):
        changed = set(form.changed_data)
        if changed & HostForm.PLACE:
            _forget_place(host)
        if "python" in changed and host.env_python:
            host.env_python = ""  # the next look finds out whether the new one has what training needs
            host.save(update_fields=["env_python"])
        if changed & HostForm.CONNECTION:
            _close(host.pk)
        if "jump" in changed:
            _let_through(request, host)
        messages.info(request, f"{host.name} is changed." if changed else "Nothing was changed.")
        if changed & HostForm.PLACE:
            _scan(request, host)
            return redirect("host_confirm", host.pk)
        if changed & HostForm.CONNECTION and host.probed_at:
            _ask(request, host, HostTask.Kind.PROBE)
        return redirect(host)
    context = {"form": form, "host": host, "name": name}
    return render(request, "experiments/host_form.html", context, status=422 if request.method == "POST" else 200)


def _saved(form: HostForm) -> bool:
    if not form.is_valid():
        return False
    try:
        with transaction.atomic():
            form.save()
    except IntegrityError:  # the same name came from another tab meanwhile
        form.add_error("name", f"Name {form.cleaned_data['name']}: you have a machine of this name already.")
        return False
    return True


def _forget_place(host: Host) -> None:
    """What was known of the machine at the old address: its key is not trusted at the new one."""
    host.host_key = host.seen_key = host.problem = host.problem_text = ""
    host.readings = host.readings_at = host.unreachable_since = host.last_seen = None
    fields = ("host_key", "seen_key", "problem", "problem_text", "readings", "readings_at", "unreachable_since")
    host.save(update_fields=[*fields, "last_seen"])


def _let_through(request: HttpRequest, host: Host) -> None:
    """Kangaroo's line on a jump host must allow a connection onwards, which it does not by itself."""
    jump = host.jump
    if jump is not None and not jump.forwards:
        jump.forwards = True
        jump.save(update_fields=["forwards"])
        if jump.credential == Host.Credential.GENERATED:
            messages.warning(
                request,
                f"{jump.name} must let connections through to {host.name}: run the command there that its page “Change "
                "credential” shows now. It puts a new line in the place of Kangaroo's old one.",
            )


# Step 2: is it the right machine --------------------------------------------------------------------------------------


@require_http_methods(["GET", "POST"])
@_members
@_recently
def host_confirm(request: SignedInRequest, pk: int) -> HttpResponse:
    """Its host key is shown, compared by a person, and pinned. A POST of `scan` asks the machine for its key again."""
    host = _own(request, pk)
    if "scan" in request.POST:
        _scan(request, host)
        if host.host_key and host.seen_key == host.host_key:
            return _as_confirmed(request, host)
        return redirect("host_confirm", host.pk)
    form = ConfirmForm(request.POST if request.method == "POST" else None, host=host)
    is_known = bool(host.host_key) and host.last_seen is not None
    if request.method == "POST" and form.is_valid():
        if _pin(host, request.user):
            _close(host.pk)
            if is_known or host.probed_at:
                _ask(request, host, HostTask.Kind.PROBE)
                return redirect(host)
            return redirect("host_credential", host.pk)
        form.add_error("fingerprint", "The machine was asked again meanwhile: compare once more.")
    context = {
        "host": host,
        "form": form,
        "seen": _key(form.seen_line),
        "pinned": _key(host.host_key),
        "pin": host.pins.select_related("by").first(),
    }
    return render(request, "experiments/host_confirm.html", context, status=422 if form.errors else 200)


def _scan(request: HttpRequest, host: Host) -> None:
    """Ask the machine for its host key, without signing in. What stands in the way is said in a message."""
    if not ratelimit.consume(request, action="host"):
        messages.error(request, TOO_OFTEN)
        return
    try:
        with _one_at_a_time(request):
            found, _ = call(host.pk, "keeper.scan", timeout=SCAN_SECONDS)
    except (OSError, ValueError) as problem:
        messages.error(request, f"{host.name} did not show its host key. {_said(problem)}")
        return
    host.seen_key = str(found["key"])
    host.save(update_fields=["seen_key"])


def _as_confirmed(request: SignedInRequest, host: Host) -> HttpResponse:
    """The machine shows the key that is trusted. If it did not before, the keeper has stopped and may go on."""
    host.seen_key = ""
    host.save(update_fields=["seen_key"])
    messages.info(request, f"{host.name} shows the host key that was confirmed.")
    if host.problem == Host.Problem.KEY_CHANGED:
        _close(host.pk)
        _ask(request, host, HostTask.Kind.PROBE)
    return redirect(host)


def _pin(host: Host, user: User) -> bool:
    """Trust the key that was seen. False if another one was seen or trusted since `host` was read."""
    last = host.pins.first()
    cleared: dict[str, Any] = {"seen_key": "", "problem": "", "problem_text": "", "unreachable_since": None}
    if not host.host_key and last is not None and last.key != host.seen_key:
        # At another address, with another key: what was found on the former machine says nothing of this one.
        cleared |= {"facts": None, "probed_at": None, "env_python": "", "readings": None, "readings_at": None}
    with transaction.atomic():
        same = Host.objects.filter(pk=host.pk, host_key=host.host_key, seen_key=host.seen_key)
        if not same.update(host_key=host.seen_key, **cleared):
            return False
        previous = host.host_key or (last.key if last is not None else "")
        HostKeyPin.objects.create(host=host, key=host.seen_key, previous=previous, by=user)
    host.refresh_from_db()
    return True


def _key(line: str) -> dict[str, str] | None:
    """A host key as people compare it: the fingerprint in both notations, and the command that prints it there."""
    if not line:
        return None
    digest = hashlib.md5(base64.b64decode(line.split()[1]), usedforsecurity=False).hexdigest()
    command = credentials.fingerprint_command(line)
    return {
        "kind": line.split()[0],
        "fingerprint": credentials.fingerprint(line),
        "md5": "MD5:" + ":".join(digest[i : i + 2] for i in range(0, 32, 2)),
        "command": command,
        "md5_command": command.replace("ssh-keygen -l", "ssh-keygen -E md5 -l"),
    }


# Step 3: the way in ---------------------------------------------------------------------------------------------------


@sensitive_post_parameters()
@require_http_methods(["GET", "POST"])
@_members
def host_credential(request: SignedInRequest, pk: int) -> HttpResponse:
    """A key that Kangaroo makes, a password used once to install it, or a key of one's own; then a look at it."""
    host = _own(request, pk)
    here = reverse("host_credential", args=[host.pk])
    if (asked := require_recent(request, instead=here)) is not None:
        if request.method == "POST":
            messages.info(
                request, "Your last sign-in was too long ago. What you had typed was not kept: type it again."
            )
        return asked
    if not host.host_key:
        messages.info(request, f"Confirm first that {host.name} is the right machine: nothing is sent there before.")
        return redirect("host_confirm", host.pk)
    way = request.POST.get("way", "")
    if request.method == "POST" and way in _WAYS:
        return _WAYS[way](request, host)
    return _credential_page(request, host)


def _credential_page(
    request: HttpRequest, host: Host, password: PasswordForm | None = None, own: OwnKeyForm | None = None
) -> HttpResponse:
    refused = password is not None or own is not None
    context: dict[str, Any] = {
        "host": host,
        "password": password or PasswordForm(),
        "own": own or OwnKeyForm(),
        "tried": "password" if password is not None else "own" if own is not None else "",
        "is_first": host.last_seen is None,
    }
    if host.credential == Host.Credential.GENERATED:
        context |= {"line": credentials.authorized_line(host), "command": credentials.install_command(host)}
    return render(request, "experiments/host_credential.html", context, status=422 if refused else 200)


def _new_key(request: SignedInRequest, host: Host) -> HttpResponse:
    _make_pair(host)
    _close(host.pk)
    messages.info(request, "A new key is made; the old one is forgotten. Put its line on the machine.")
    return redirect("host_credential", host.pk)


def _line_is_there(request: SignedInRequest, host: Host) -> HttpResponse:
    _close(host.pk)  # so that it signs in anew, with the line as it is now
    _ask(request, host, HostTask.Kind.PROBE)
    return redirect(host)


@sensitive_variables()
def _by_password(request: SignedInRequest, host: Host) -> HttpResponse:
    form = PasswordForm(request.POST)
    if form.is_valid():
        if host.credential != Host.Credential.GENERATED:
            _make_pair(host)
        if not ratelimit.consume(request, action="host"):
            form.add_error("password", TOO_OFTEN)
        else:
            try:
                with _one_at_a_time(request):
                    call(host.pk, "keeper.install_key", password=form.cleaned_data["password"], timeout=INSTALL_SECONDS)
            except (OSError, ValueError) as problem:
                form.add_error("password", _said(problem))
    if form.errors:
        return _credential_page(request, host, password=form)
    messages.info(request, "Kangaroo's line stands on the machine now. The password was used once and is forgotten.")
    return _line_is_there(request, host)


@sensitive_variables()
def _own_key(request: SignedInRequest, host: Host) -> HttpResponse:
    form = OwnKeyForm(request.POST, request.FILES)
    if not form.is_valid():
        return _credential_page(request, host, own=form.bare())
    pem, public = form.pair
    _keep(host, Host.Credential.OWN, pem, public, form.cleaned_data["passphrase"])
    messages.info(request, "Your key is kept, encrypted.")
    return _line_is_there(request, host)


#: What the three forms of the page ask for.
_WAYS: dict[str, Callable[[SignedInRequest, Host], HttpResponse]] = {
    "new": _new_key,
    "line": _line_is_there,
    "password": _by_password,
    "own": _own_key,
}


def _make_pair(host: Host) -> None:
    pem, public = credentials.new_pair(f"kangaroo:{host.name}")
    _keep(host, Host.Credential.GENERATED, pem, public)


@sensitive_variables()
def _keep(host: Host, kind: Host.Credential, pem: str, public: str, passphrase: str = "") -> None:
    host.credential, host.public_key = kind, public
    host.private_key, host.passphrase = pem, passphrase
    host.credential_changed = timezone.now()
    fields = ["credential", "public_key", "private_key", "passphrase", "credential_changed"]
    if host.problem == Host.Problem.LOGIN_REFUSED:  # said of the former credential
        host.problem = host.problem_text = ""
        fields += ["problem", "problem_text"]
    host.save(update_fields=fields)


# A machine ------------------------------------------------------------------------------------------------------------


@require_safe
@_members
def host(request: SignedInRequest, pk: int) -> HttpResponse:
    """A machine's page. A poll (with `seen` marks) is answered with the sections that changed."""
    return _host_page(request, _visible(request, pk))


def _host_page(request: SignedInRequest, host: Host, form: InterpreterForm | None = None) -> HttpResponse:
    (standing,) = host_standings([host], request.user)
    if standing.is_mine and standing.task is None:
        standing.task = host.tasks.first()  # the newest, to say how it went
    context: dict[str, Any] = {"host": host, "standing": standing, **_runs(host, request.user)}
    if standing.is_mine:
        context |= {"pinned": _key(host.host_key), "seen": _key(host.seen_key)}
    names = SECTIONS if standing.is_mine else tuple(name for name in SECTIONS if name != "task")
    sections = {name: polls.section(request, f"experiments/host.html#{name}", name, context) for name in names}
    if "HX-Request" in request.headers:
        known = polls.seen(request)
        pieces = [
            render_to_string("experiments/host.html#piece", section)
            for name, section in sections.items()
            if known.get(name) != section["mark"]
        ]
        return polls.answer(pieces, settled=not standing.is_live)
    context["sections"] = sections
    if standing.is_mine:
        context |= {
            "form": form or InterpreterForm(initial={"python": host.env_python}),
            "pins": [(pin, credentials.fingerprint(pin.key)) for pin in host.pins.select_related("by")[:20]],
            "line": credentials.authorized_line(host) if host.public_key else "",
            "revoke": credentials.revoke_command(host) if host.public_key else "",
        }
    return render(request, "experiments/host.html", context, status=422 if form is not None else 200)


def _runs(host: Host, user: User) -> dict[str, Any]:
    """The runs there that the person may see, those that go on first; how many of others there are."""
    runs = ModelRun.objects.filter(host=host).select_related("experiment")
    visible = runs.visible_to(user)
    active = list(visible.active().order_by("-state", "queued_at")[:RUNS_SHOWN])  # running before queued
    ended = visible.exclude(state__in=ACTIVE).order_by("-ended_at", "-pk")[: RUNS_SHOWN - len(active)]
    others = runs.active().exclude(pk__in=visible.values("pk")).count()
    return {"runs": [*active, *ended], "others": others}


# What is done with it -------------------------------------------------------------------------------------------------

TOO_OFTEN = "Machines were asked too often in a short time from your account. Wait a minute, then try again."


@require_POST
@_members
@_recently
def host_look(request: SignedInRequest, pk: int) -> HttpResponse:
    host = _own(request, pk)
    _ask(request, host, HostTask.Kind.PROBE)
    return redirect(host)


@require_POST
@_members
@_recently
def host_set_up(request: SignedInRequest, pk: int) -> HttpResponse:
    """Make an environment there, or take the interpreter that is named in `python`."""
    host = _own(request, pk)
    if "python" not in request.POST:
        _ask(request, host, HostTask.Kind.SET_UP)
        return redirect(host)
    form = InterpreterForm(request.POST)
    if not form.is_valid():
        return _host_page(request, host, form)
    # The look finds out whether it has what training needs; until then there is no environment.
    host.python, host.env_python = form.cleaned_data["python"], ""
    host.save(update_fields=["python", "env_python"])
    _close(host.pk)
    _ask(request, host, HostTask.Kind.PROBE)
    return redirect(host)


def _ask(request: SignedInRequest, host: Host, kind: HostTask.Kind) -> None:
    """Put down what is wanted; the collector does it. What stands in the way is said in a message."""
    if not host.host_key or not host.credential:
        messages.error(request, f"{host.name} needs a confirmed host key and a way in first.")
    elif not ratelimit.consume(request, action="host"):
        messages.error(request, TOO_OFTEN)
    else:
        try:
            with transaction.atomic():
                HostTask.objects.create(host=host, kind=kind, asked_by=request.user)
        except IntegrityError:
            messages.info(request, "Something is being done there already; it is shown below.")


@require_POST
@_members
def host_task_cancel(request: SignedInRequest, pk: int, task: int) -> HttpResponse:
    """One that nobody has begun is over at once; of one that goes on, its end is asked for."""
    host = _own(request, pk)
    wanted = get_object_or_404(HostTask, pk=task, host=host)
    waiting = HostTask.objects.filter(pk=wanted.pk, state=HostTask.State.WANTED)
    if not waiting.update(state=HostTask.State.CANCELLED, ended_at=timezone.now()):
        HostTask.objects.filter(pk=wanted.pk, state=HostTask.State.RUNNING).update(cancel_requested=True)
    return redirect(host)


@require_POST
@_members
@_recently
def host_offer(request: SignedInRequest, pk: int) -> HttpResponse:
    """Offer a machine to all, or no longer: an administrator's to say; its owner may take it back."""
    host = _visible(request, pk)
    offered = "offered" in request.POST
    if not request.user.is_staff and (offered or not host.may_change(request.user)):
        raise Http404("staff alone")
    Host.objects.filter(pk=host.pk).update(offered=offered)
    messages.info(
        request, f"Every user may train on {host.name} now." if offered else f"{host.name} is its owner's alone now."
    )
    return redirect("host", host.pk) if host.may_change(request.user) or offered else redirect("hosts")


@require_http_methods(["GET", "POST"])
@_members
@_recently
def host_delete(request: SignedInRequest, pk: int) -> HttpResponse:
    """Ask, and let it go. A machine where experiments were trained leaves its name to them, and nothing else."""
    host = _own(request, pk)
    was_used = _was_used(host)
    form = DeleteForm(request.POST if request.method == "POST" else None, host=host, was_used=was_used)
    hindrance = _hindrance(host)
    if request.method == "POST" and not hindrance and form.is_valid():
        hindrance = _let_go(host)
        if not hindrance:
            messages.info(request, f"{host.name} is deleted here, with the key that Kangaroo had for it.")
            return redirect("hosts")
    context = {
        "host": host,
        "form": form,
        "was_used": was_used,
        "hindrance": hindrance,
        "revoke": credentials.revoke_command(host) if host.public_key else "",
    }
    return render(request, "experiments/host_delete.html", context, status=422 if request.method == "POST" else 200)


def _was_used(host: Host) -> bool:
    return host.runs.exists() or host.experiments.exists()


def _hindrance(host: Host) -> str:
    """Why it cannot be deleted now; "" if it can."""
    if count := host.runs.filter(state__in=ACTIVE).count():
        runs = "1 run is" if count == 1 else f"{count} runs are"
        return f"{runs} waiting or training on {host.name}. Stop them first, or wait for their end."
    reached = host.reached_through_it.filter(retired_at=None).first()
    if reached is not None:
        return f"{reached.name} is reached through {host.name}. Change or delete that machine first."
    if host.tasks.filter(state__in=ACTIVE_TASKS).exists():
        return f"{host.name} is being looked at or set up. Cancel that first, or wait for its end."
    return ""


def _let_go(host: Host) -> str:
    """Delete it, or what opens it. The reason if something came in between."""
    pk = host.pk
    with transaction.atomic():
        host = Host.objects.select_for_update().get(pk=pk)
        if hindrance := _hindrance(host):
            return hindrance
        host.removals.all().delete()  # nobody can sign in there any more
        if _was_used(host) or host.reached_through_it.exists():
            host.retired_at = timezone.now()
            host.private_key = host.passphrase = host.credential = ""
            host.offered, host.jump = False, None
            host.save(update_fields=["retired_at", "private_key", "passphrase", "credential", "offered", "jump"])
        else:
            host.delete()
    _close(pk)
    return ""


# The keeper -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_at_a_time(request: HttpRequest) -> Iterator[None]:
    """A page waits for a machine here. Nobody's machines may keep so many waiting that none is left for others."""
    name = f"asks-a-machine-{request.user.pk}"
    if not cache.add(name, True, 2 * INSTALL_SECONDS):
        raise HostProblem(Host.Problem.UNREACHABLE, "Another of your machines is being asked; wait until it is done.")
    try:
        yield
    finally:
        cache.delete(name)


def _close(host: int) -> None:
    """The next connection is made with what holds now. Where there is no keeper there is none to close."""
    with contextlib.suppress(OSError, ValueError):
        call(host, "keeper.close", timeout=5)


def _said(problem: Exception) -> str:
    """What a machine or the keeper said, cut: a part of it may come from outside."""
    return text(problem.message if isinstance(problem, HostProblem) else str(problem), 400) or "It said no more."
