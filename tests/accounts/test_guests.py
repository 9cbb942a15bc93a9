"""Work without an account, and what becomes of it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from allauth.account.models import EmailAddress
from allauth.core.exceptions import ImmediateHttpResponse
from django.contrib.auth.models import AnonymousUser
from django.contrib.sessions.backends.db import SessionStore
from django.core.management import call_command
from django.http import HttpRequest
from django.test import Client, RequestFactory
from django.utils import timezone
from pytest_django import Settings

from accounts import guests
from accounts.models import User
from experiments.models import Experiment, Host
from tests.accounts.conftest import PASSWORD

Who = Callable[[Client], int | None]
OnDisk = Callable[[Experiment], Path]
SIGN_UP = {"email": "new@example.org", "password1": PASSWORD, "password2": PASSWORD}


def a_post(ip: str = "192.0.2.1") -> HttpRequest:
    request = RequestFactory().post("/train/", REMOTE_ADDR=ip)
    request.user = AnonymousUser()
    request.session = SessionStore()
    return request


def work_of(user: User) -> Experiment:
    return Experiment.objects.create(owner=user, name="Their work", spec_json={}, host=Host.local())


@pytest.fixture
def on_disk() -> Iterator[Callable[[Experiment], Path]]:
    """Put something into an experiment's directory, and take it away again if nobody else did."""
    made: list[Path] = []

    def on_disk(experiment: Experiment) -> Path:
        directory = experiment.directory
        directory.mkdir(parents=True)
        (directory / "spec.json").write_text("{}")
        made.append(directory)
        return directory

    yield on_disk
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


def test_the_first_post_that_needs_an_owner_makes_a_guest_and_the_next_finds_it() -> None:
    request = a_post()
    guest = guests.ensure_user(request)
    assert guest.is_guest
    assert not guest.has_usable_password()
    assert guest.email is None
    assert guests.ensure_user(request) == guest
    assert User.objects.count() == 1


def test_looking_around_makes_no_guest(client: Client) -> None:
    for path in ("/", "/docs/", "/accounts/login/"):
        client.get(path)
    assert not User.objects.exists()


def test_one_address_can_make_only_so_many_guests_an_hour(settings: Settings) -> None:
    settings.ACCOUNT_RATE_LIMITS = {"guest": "3/h/ip"}
    for _ in range(3):
        guests.ensure_user(a_post())
    with pytest.raises(ImmediateHttpResponse) as refused:
        guests.ensure_user(a_post())
    assert refused.value.response.status_code == 429
    assert User.objects.count() == 3
    assert guests.ensure_user(a_post(ip="192.0.2.2")).is_guest, "others are not held up"


def test_a_guest_who_signs_up_becomes_the_account_in_place(as_guest: Client, guest: User, who: Who) -> None:
    work = work_of(guest)
    as_guest.post("/accounts/signup/", SIGN_UP)
    guest.refresh_from_db()
    assert (guest.email, guest.is_guest) == ("new@example.org", False)
    assert guest.check_password(PASSWORD)
    assert who(as_guest) == guest.pk
    work.refresh_from_db()
    assert work.owner == guest
    assert EmailAddress.objects.get(user=guest).email == "new@example.org"
    assert User.objects.count() == 1


def test_a_sign_up_that_is_refused_leaves_the_guest_as_they_were(as_guest: Client, guest: User, who: Who) -> None:
    page = as_guest.post("/accounts/signup/", SIGN_UP | {"password2": "other"})
    assert page.status_code == 200
    guest.refresh_from_db()
    assert (guest.email, guest.is_guest) == (None, True)
    assert who(as_guest) == guest.pk


def test_a_guest_cannot_take_over_an_account_by_signing_up_with_its_address(
    as_guest: Client, guest: User, ada: User
) -> None:
    as_guest.post("/accounts/signup/", SIGN_UP | {"email": ada.email})
    guest.refresh_from_db()
    ada.refresh_from_db()
    assert guest.is_guest
    assert ada.check_password(PASSWORD)


@pytest.mark.django_db(transaction=True)
def test_signing_in_moves_all_of_the_guests_work_and_removes_the_empty_guest(
    as_guest: Client, guest: User, ada: User, who: Who, on_disk: OnDisk
) -> None:
    theirs, hers = work_of(guest), work_of(ada)
    directory = on_disk(theirs)
    as_guest.post("/accounts/login/", {"login": ada.email, "password": PASSWORD})
    assert who(as_guest) == ada.pk
    assert set(Experiment.objects.filter(owner=ada)) == {theirs, hers}
    assert not User.objects.filter(pk=guest.pk).exists()
    assert directory.exists(), "nobody left, so nothing may be cleaned up"


def test_a_wrong_password_moves_nothing(as_guest: Client, guest: User, ada: User) -> None:
    work = work_of(guest)
    as_guest.post("/accounts/login/", {"login": ada.email, "password": "wrong"})
    work.refresh_from_db()
    assert work.owner == guest


def test_an_address_that_is_not_confirmed_moves_nothing_until_it_is(
    as_guest: Client, guest: User, ada: User, settings: Settings
) -> None:
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    EmailAddress.objects.update(verified=False)
    work = work_of(guest)
    as_guest.post("/accounts/login/", {"login": ada.email, "password": PASSWORD})
    work.refresh_from_db()
    assert work.owner == guest


def test_somebody_who_signs_in_to_another_account_takes_nothing_along(signed_in: Client, ada: User, who: Who) -> None:
    work = work_of(ada)
    bob = User.objects.create_user("bob@example.org", PASSWORD)
    signed_in.post("/accounts/login/", {"login": bob.email, "password": PASSWORD})
    assert who(signed_in) == bob.pk
    work.refresh_from_db()
    assert work.owner == ada


@pytest.mark.parametrize("path", ["email", "password/change", "password/set", "reauthenticate"])
def test_a_guest_who_opens_a_page_about_e_mail_or_password_is_asked_to_sign_up(as_guest: Client, path: str) -> None:
    for response in (as_guest.get(f"/accounts/{path}/", follow=True), as_guest.post(f"/accounts/{path}/", follow=True)):
        assert response.redirect_chain == [("/accounts/signup/", 302)]
        assert "Sign up to get them" in response.content.decode()


@pytest.mark.parametrize("path", ["settings", "logout", "delete", "login", "signup", "password/reset"])
def test_the_pages_open_to_a_guest_say_what_a_guest_needs_to_know(as_guest: Client, path: str) -> None:
    page = as_guest.get(f"/accounts/{path}/").content.decode()
    assert "You are working as a guest" in page
    assert "30 idle days" in page


@pytest.mark.django_db(transaction=True)
def test_only_guests_who_stayed_away_for_long_are_purged_and_their_disk_is_freed(ada: User, on_disk: OnDisk) -> None:
    old = timezone.now() - timedelta(days=31)
    idle, lately = User.objects.create_guest(), User.objects.create_guest()
    work, kept = on_disk(work_of(idle)), on_disk(work_of(lately))
    User.objects.filter(pk__in=[idle.pk, ada.pk]).update(last_active=old)
    User.objects.filter(pk=lately.pk).update(last_active=timezone.now() - timedelta(days=29))
    said = io.StringIO()
    call_command("purge_guests", stdout=said)
    assert said.getvalue() == "1 guest removed who was idle for more than 30 days\n"
    assert set(User.objects.all()) == {ada, lately}
    assert Experiment.objects.count() == 1
    assert (work.exists(), kept.exists()) == (False, True)


def test_being_here_is_noted_once_an_hour(as_guest: Client, guest: User) -> None:
    long_ago = timezone.now() - timedelta(days=20)
    User.objects.filter(pk=guest.pk).update(last_active=long_ago)
    as_guest.get("/")
    guest.refresh_from_db()
    first = guest.last_active
    assert timezone.now() - first < timedelta(minutes=1)
    as_guest.get("/")
    guest.refresh_from_db()
    assert guest.last_active == first


def test_a_guests_session_lasts_as_long_as_their_work_and_begins_anew_with_use(as_guest: Client, guest: User) -> None:
    User.objects.filter(pk=guest.pk).update(last_active=timezone.now() - timedelta(days=29))
    cookie = as_guest.get("/").cookies["sessionid"]
    assert int(cookie["max-age"]) > 30 * 24 * 3600
    assert "sessionid" not in as_guest.get("/").cookies, "once an hour, not with every request"


@pytest.mark.django_db(transaction=True)
def test_an_account_is_deleted_with_all_its_work_once_the_password_is_given(
    signed_in: Client, ada: User, who: Who, on_disk: OnDisk
) -> None:
    directory = on_disk(work_of(ada))
    page = signed_in.get("/accounts/delete/").content.decode()
    assert "all experiments" in page
    assert "Nobody can bring any of it back" in page
    refused = signed_in.post("/accounts/delete/", {"password": "wrong"})
    assert "not the password of this account" in refused.content.decode()
    assert User.objects.filter(pk=ada.pk).exists()
    assert directory.exists()

    response = signed_in.post("/accounts/delete/", {"password": PASSWORD}, follow=True)
    assert "The account and everything in it are deleted" in response.content.decode()
    assert not User.objects.exists()
    assert not Experiment.objects.exists()
    assert not directory.exists()
    assert who(signed_in) is None


def test_guessing_the_password_on_the_deletion_page_is_limited(signed_in: Client, ada: User) -> None:
    answers = [signed_in.post("/accounts/delete/", {"password": "wrong"}).status_code for _ in range(11)]
    assert answers == [200] * 10 + [429]
    assert signed_in.post("/accounts/delete/", {"password": PASSWORD}).status_code == 429
    assert User.objects.filter(pk=ada.pk).exists()


def test_a_guest_deletes_their_work_without_a_password(as_guest: Client, guest: User) -> None:
    work_of(guest)
    as_guest.post("/accounts/delete/")
    assert not User.objects.exists()
    assert not Experiment.objects.exists()
