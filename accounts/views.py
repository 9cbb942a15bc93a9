"""The account page: who you are here, and how to leave. Everything about passwords and e-mail is allauth's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from allauth.core import ratelimit
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render

from accounts.forms import DeleteForm, NameForm
from accounts.models import User


class SignedInRequest(HttpRequest):
    """What a view behind `login_required` gets."""

    user: User


def members_only(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """A guest has neither e-mail nor password to manage: they are asked to sign up instead."""

    @wraps(view)
    def wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if request.user.is_authenticated and request.user.is_guest:
            messages.info(request, "A guest has no e-mail address and no password yet. Sign up to get them.")
            return redirect("account_signup")
        return view(request, *args, **kwargs)

    return wrapper


@login_required
def settings(request: SignedInRequest) -> HttpResponse:
    """Change the name; links to e-mail, password and deletion."""
    form = NameForm(request.POST or None, instance=request.user)
    if request.method == "POST" and form.is_valid():
        form.save()
        messages.info(request, "Name changed.")
        return redirect("account_settings")
    return render(request, "account/settings.html", {"form": form})


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
