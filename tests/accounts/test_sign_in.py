"""Signing up and in, e-mail addresses and passwords: allauth's flows, as this site is set up."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlencode

import pytest
from allauth.account.models import EmailAddress
from django.core import mail
from django.test import Client
from pytest_django import Settings

from accounts.models import User
from tests.accounts.conftest import PASSWORD

SIGN_UP = {"email": "new@example.org", "password1": PASSWORD, "password2": PASSWORD}
Who = Callable[[Client], int | None]


def link_in(message: mail.EmailMessage) -> str:
    found = re.search(r"http://testserver(/\S+)", str(message.body))
    assert found, message.body
    return found[1]


def test_signing_up_makes_an_account_signs_in_and_sends_a_link_to_confirm_the_address(client: Client, who: Who) -> None:
    response = client.post("/accounts/signup/", SIGN_UP)
    assert (response.status_code, response.url) == (302, "/profile/")  # type: ignore[attr-defined]
    user = User.objects.get(email="new@example.org")
    assert who(client) == user.pk
    assert not user.is_guest
    assert not user.is_staff, "an administrator is made by a command, never by being first"

    (message,) = mail.outbox
    assert message.to == ["new@example.org"]
    assert message.subject == "Kangaroo: Confirm your e-mail address"
    assert "Hello" not in message.body
    link = link_in(message)
    assert "new@example.org" in client.get(link).content.decode()
    assert not EmailAddress.objects.get(user=user).verified, "looking at the link confirms nothing: mail scanners do"
    client.post(link)
    assert EmailAddress.objects.get(user=user).verified
    assert "no longer valid" in Client().get("/accounts/confirm-email/nonsense/").content.decode()


def test_where_verification_is_mandatory_nobody_is_signed_in_before_it(
    client: Client, settings: Settings, who: Who
) -> None:
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    response = client.post("/accounts/signup/", SIGN_UP, follow=True)
    assert "A mail with a link is on its way" in response.content.decode()
    assert who(client) is None
    other = Client()
    other.post("/accounts/login/", {"login": SIGN_UP["email"], "password": PASSWORD})
    assert who(other) is None
    other.post(link_in(mail.outbox[0]))
    other.post("/accounts/login/", {"login": SIGN_UP["email"], "password": PASSWORD})
    assert who(other) is not None


def test_where_verification_is_off_no_mail_is_sent(client: Client, settings: Settings, who: Who) -> None:
    settings.ACCOUNT_EMAIL_VERIFICATION = "none"
    client.post("/accounts/signup/", SIGN_UP)
    assert who(client) is not None
    assert mail.outbox == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"email": "no address"}, "Enter a valid email address"),
        ({"password1": "password", "password2": "password"}, "too common"),
        ({"password2": "something-else-9"}, "same password"),
    ],
)
def test_a_sign_up_that_is_refused_says_why_beside_the_field_and_keeps_the_address(
    client: Client, change: dict[str, str], said: str
) -> None:
    page = client.post("/accounts/signup/", SIGN_UP | change).content.decode()
    assert said in page
    assert f'value="{(SIGN_UP | change)["email"]}"' in page
    assert 'aria-invalid="true"' in page
    assert not User.objects.exists()


def test_e_mail_addresses_are_one_whatever_their_case(client: Client, ada: User, who: Who) -> None:
    client.post("/accounts/login/", {"login": "ADA@Example.org", "password": PASSWORD})
    assert who(client) == ada.pk


def test_a_wrong_password_is_refused_and_too_many_of_them_are_not_even_tried(client: Client, ada: User) -> None:
    wrong = {"login": ada.email, "password": "not-it"}
    assert "not correct" in client.post("/accounts/login/", wrong).content.decode()
    for _ in range(6):
        response = client.post("/accounts/login/", wrong)
    assert "Too many failed login attempts" in response.content.decode()
    right = client.post("/accounts/login/", wrong | {"password": PASSWORD})
    assert right.status_code == 200, "not even the right one, for five minutes"


def test_signing_out_needs_a_post(signed_in: Client, who: Who) -> None:
    assert "Runs go on while you are away" in signed_in.get("/accounts/logout/").content.decode()
    assert who(signed_in) is not None
    response = signed_in.post("/accounts/logout/")
    assert response.url == "/"  # type: ignore[attr-defined]
    assert who(signed_in) is None


def test_a_forgotten_password_is_reset_by_mail(client: Client, ada: User, who: Who) -> None:
    response = client.post("/accounts/password/reset/", {"email": ada.email}, follow=True)
    assert "a mail with a link is on its way" in response.content.decode()
    (message,) = mail.outbox
    assert message.subject == "Kangaroo: Choose a new password"

    page = client.get(link_in(message), follow=True)
    form_at = page.redirect_chain[-1][0]
    new = {"password1": "harbour-plum-77", "password2": "harbour-plum-77"}
    page = client.post(form_at, new, follow=True)
    assert "The password is set" in page.content.decode()
    client.logout()
    client.post("/accounts/login/", {"login": ada.email, "password": "harbour-plum-77"})
    assert who(client) == ada.pk
    again = Client().get(link_in(message), follow=True)
    assert "no longer valid" in again.content.decode(), "a link works once"


def test_asking_for_a_reset_does_not_tell_who_has_an_account(client: Client, ada: User) -> None:
    known = client.post("/accounts/password/reset/", {"email": ada.email}, follow=True)
    unknown = client.post("/accounts/password/reset/", {"email": "nobody@example.org"}, follow=True)
    assert known.redirect_chain == unknown.redirect_chain
    assert mail.outbox[1].subject == "Kangaroo: No account has this address"


def test_a_password_is_changed_with_the_old_one(signed_in: Client, ada: User) -> None:
    new = {"password1": "harbour-plum-77", "password2": "harbour-plum-77"}
    page = signed_in.post("/accounts/password/change/", {"oldpassword": "wrong", **new})
    assert "Please type your current password" in page.content.decode()
    done = signed_in.post("/accounts/password/change/", {"oldpassword": PASSWORD, **new})
    assert done.headers["Location"] == "/accounts/settings/"
    ada.refresh_from_db()
    assert ada.check_password("harbour-plum-77")
    assert mail.outbox[-1].to == [ada.email], "and whoever owns the address hears of it"


def test_a_new_address_holds_once_the_password_was_given_again_and_the_address_is_confirmed(
    signed_in: Client, ada: User
) -> None:
    asked = signed_in.post("/accounts/email/", {"email": "ada@new.example", "action_add": ""}, follow=True)
    assert "say once more that it is you" in asked.content.decode(), "an open session alone may not take it over"
    assert mail.outbox == []
    refused = signed_in.post("/accounts/reauthenticate/", {"password": "wrong", "next": "/accounts/email/"})
    assert "Incorrect password" in refused.content.decode()
    # What was asked for goes on by itself.
    page = signed_in.post("/accounts/reauthenticate/", {"password": PASSWORD, "next": "/accounts/email/"}, follow=True)
    assert "waits to be confirmed" in page.content.decode()

    ada.refresh_from_db()
    assert ada.email == "ada@example.org"
    signed_in.post(link_in(next(m for m in mail.outbox if m.to == ["ada@new.example"])))
    ada.refresh_from_db()
    assert ada.email == "ada@new.example"
    assert [a.email for a in EmailAddress.objects.filter(user=ada)] == ["ada@new.example"]


def test_a_change_of_address_can_be_taken_back(signed_in: Client, ada: User) -> None:
    signed_in.post("/accounts/email/", {"email": "ada@new.example", "action_add": ""})
    signed_in.post("/accounts/reauthenticate/", {"password": PASSWORD, "next": "/accounts/email/"}, follow=True)
    signed_in.post("/accounts/email/", {"email": "ada@new.example", "action_remove": ""})
    assert [a.email for a in EmailAddress.objects.filter(user=ada)] == ["ada@example.org"]


def test_an_administrator_made_by_the_command_can_sign_in_and_give_the_password_again(client: Client) -> None:
    User.objects.create_superuser("root@example.org", PASSWORD)
    client.post("/accounts/login/", {"login": "root@example.org", "password": PASSWORD})
    assert client.get("/admin/").status_code == 200
    client.post("/accounts/email/", {"email": "root@new.example", "action_add": ""})
    page = client.post("/accounts/reauthenticate/", {"password": PASSWORD, "next": "/accounts/email/"}, follow=True)
    assert "root@new.example" in page.content.decode()


def test_an_account_that_is_switched_off_cannot_sign_in(client: Client, ada: User, who: Who) -> None:
    User.objects.filter(pk=ada.pk).update(is_active=False)
    client.post("/accounts/login/", {"login": ada.email, "password": PASSWORD})
    assert who(client) is None
    assert "switched off" in client.get("/accounts/inactive/").content.decode()


@pytest.mark.parametrize(
    "path", ["login", "signup", "password/reset", "password/reset/done", "confirm-email", "logout"]
)
def test_each_page_for_somebody_who_is_not_signed_in_stands_in_our_frame(client: Client, path: str) -> None:
    response = client.get(f"/accounts/{path}/", follow=True)
    page = response.content.decode()
    assert response.status_code == 200
    assert "kangaroo.css" in page
    assert 'id="live"' in page
    assert "style=" not in page


@pytest.mark.parametrize("path", ["settings", "email", "password/change", "delete", "reauthenticate", "logout"])
def test_each_page_of_an_account_stands_in_our_frame(signed_in: Client, path: str) -> None:
    response = signed_in.get(f"/accounts/{path}/")
    page = response.content.decode()
    assert response.status_code == 200
    assert "kangaroo.css" in page
    assert "style=" not in page


def test_a_name_is_changed_and_shown(signed_in: Client, ada: User) -> None:
    page = signed_in.post("/accounts/settings/", {"name": "Ada L."}, follow=True).content.decode()
    assert "Name changed." in page
    ada.refresh_from_db()
    assert ada.name == "Ada L."
    assert '<span class="name">Ada L.</span>' in page


def test_the_account_page_asks_a_stranger_to_sign_in(client: Client) -> None:
    assert client.get("/accounts/settings/").url == "/accounts/login/?next=/accounts/settings/"  # type: ignore[attr-defined]
    assert client.get("/accounts/delete/").url == "/accounts/login/?next=/accounts/delete/"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "address",
    ["https://evil.example/", "//evil.example", "/\\evil.example", "http:evil.example", "javascript:alert(1)"],
)
def test_no_link_to_sign_in_sign_up_or_out_leads_to_another_site(ada: User, address: str) -> None:
    for path, form in {
        "login": {"login": ada.email, "password": PASSWORD},
        "signup": SIGN_UP,
        "logout": {},
    }.items():
        client = Client()
        if path == "logout":
            client.force_login(ada)
        response = client.post(f"/accounts/{path}/?{urlencode({'next': address})}", form | {"next": address})
        assert response.status_code == 302
        assert response["Location"] in ("/profile/", "/")


def test_who_has_just_signed_up_is_not_asked_for_the_password_again(client: Client) -> None:
    client.post("/accounts/signup/", SIGN_UP)
    assert client.get("/accounts/email/").status_code == 200
    assert client.get("/hosts/add/").status_code == 200
