"""The account page: who you are here, and how to leave. The rest is allauth's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from allauth.core import ratelimit
from allauth.usersessions.models import UserSession
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render

from accounts import second_factor
from accounts.forms import DeleteForm, NameForm
from accounts.models import User


class SignedInRequest(HttpRequest):
    """What a view behind `login_required` gets."""

    user: User


def members_only(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """A guest has neither e-mail nor password to manage, nor a second factor: they are asked to sign up instead."""

    @wraps(view)
    def wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if request.user.is_authenticated and request.user.is_guest:
            messages.info(request, "A guest has no e-mail address and no password yet. Sign up to get them.")
            return redirect("account_signup")
        return view(request, *args, **kwargs)

    return wrapper


def guest_as_stranger(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """allauth lets nobody who is signed in take a step of signing in. A guest is signed in, and may.

    The adapter finds the guest in `request.guest` when the last step is done.
    """

    @wraps(view)
    def wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if request.user.is_authenticated and request.user.is_guest:
            request.guest = request.user  # type: ignore[attr-defined]
            request.user = AnonymousUser()
        return view(request, *args, **kwargs)

    return wrapper


@login_required
def settings(request: SignedInRequest) -> HttpResponse:
    """Change the name; what there is to sign in with, and links to change it; deletion."""
    form = NameForm(request.POST or None, instance=request.user)
    if request.method == "POST" and form.is_valid():
        form.save()
        messages.info(request, "Name changed.")
        return redirect("account_settings")
    context = {"form": form, "factor": second_factor.of(request.user)}
    if not request.user.is_guest:
        context["sessions"] = UserSession.objects.purge_and_list(request.user)
    return render(request, "account/settings.html", context)


@login_required
def delete(request: SignedInRequest) -> HttpResponse:
    """Remove the account with everything in it, after the password was given once more."""
    form = DeleteForm(request.POST if request.method == "POST" else None, user=request.user)
    if request.method == "POST":
        # The same limit as for other pages that ask for the password of somebody who is signed in.
        if not ratelimit.consume(request, action="reauthenticate"):
            return ratelimit.respond_429(request)  # type: ignore[no-any-return]
        if form.is_valid():
            user = User.objects.get(pk=request.user.pk)
            logout(request)
            user.delete()  # whoever keeps something for a user hears of it by Django's signals
            messages.info(request, "The account and everything in it are deleted.")
            return redirect("home")
    return render(request, "account/delete.html", {"form": form})
