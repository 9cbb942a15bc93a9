"""The account page: who you are here, and how to leave. Everything about passwords and e-mail is allauth's."""

from __future__ import annotations

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from accounts.forms import NameForm


@login_required
def settings(request: HttpRequest) -> HttpResponse:
    """Change the name; links to e-mail, password and deletion."""
    form = NameForm(request.POST or None, instance=request.user)
    if request.method == "POST" and form.is_valid():
        form.save()
        messages.info(request, "Name changed.")
        return redirect("account_settings")
    return render(request, "account/settings.html", {"form": form})
