"""Where allauth's sign-up and sign-in meet our guests."""

from __future__ import annotations

from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.internal.flows.login import record_authentication
from django.http import HttpRequest
from django.urls import reverse

from accounts.guests import claim
from accounts.models import User

SAYING = {
    "reauthenticate": "Your password",
    "mfa_reauthenticate": "A code",
    "mfa_reauthenticate:webauthn": "A passkey",
}


class Adapter(DefaultAccountAdapter):  # type: ignore[misc]
    def new_user(self, request: HttpRequest) -> User:
        """The guest who signs up becomes the account: same row, same work."""
        user = request.user
        if user.is_authenticated and user.is_guest:
            # A fresh copy: a form that turns out invalid must not change who is signed in.
            return User.objects.get(pk=user.pk)
        return User()

    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        user.is_guest = False
        return super().save_user(request, user, form, commit)  # type: ignore[no-any-return]

    def post_login(self, request: HttpRequest, user: User, *, signup: bool, **kwargs: Any) -> Any:
        """Who has just chosen a password need not give it again at the next step; allauth only notes that of others."""
        if signup:
            record_authentication(request, user, method="password", email=user.email)
        return super().post_login(request, user, signup=signup, **kwargs)

    def get_reauthentication_methods(self, user: User) -> list[dict[str, str]]:
        """By what else somebody may say that it is them."""
        methods: list[dict[str, str]] = super().get_reauthentication_methods(user)
        return [method | {"description": SAYING[method["id"]]} for method in methods]

    def get_password_change_redirect_url(self, request: HttpRequest) -> str:
        """Back to the account's page: an empty form again would look as if nothing had happened."""
        return reverse("account_settings")

    def login(self, request: HttpRequest, user: User) -> None:
        """Only here, when nothing can refuse the sign-in any more, does a guest's work change hands."""
        guest: Any = getattr(request, "guest", request.user)
        super().login(request, user)
        if guest.is_authenticated and guest.is_guest and guest.pk != user.pk:
            claim(guest, user)
