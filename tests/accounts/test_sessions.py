"""Where somebody is signed in, and how that ends."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from allauth.usersessions.models import UserSession
from django.contrib.sessions.models import Session
from django.test import Client
from django.utils import timezone

from accounts import guests
from accounts.middleware import SEEN
from accounts.models import User
from accounts.templatetags.sessions import browser
from tests.accounts.conftest import PASSWORD

Who = Callable[[Client], int | None]
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
SAFARI = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 "
    "Mobile/15E148 Safari/604.1"
)
NEW = {"oldpassword": PASSWORD, "password1": "harbour-plum-77", "password2": "harbour-plum-77"}


def sign_in(user: User, agent: str, ip: str = "192.0.2.7") -> Client:
    client = Client(headers={"user-agent": agent}, REMOTE_ADDR=ip)
    assert client.post("/accounts/login/", {"login": user.email, "password": PASSWORD}).status_code == 302
    return client


@pytest.fixture
def here(ada: User) -> Client:
    return sign_in(ada, FIREFOX)


@pytest.fixture
def elsewhere(ada: User) -> Client:
    return sign_in(ada, SAFARI, "198.51.100.9")


def test_the_list_says_where_the_account_is_open_and_which_one_this_is(here: Client, elsewhere: Client) -> None:
    page = " ".join(here.get("/accounts/sessions/").content.decode().split())
    mine, other = page.index("Firefox on Linux"), page.index("Safari on an iPhone")
    assert page.count("this one</span>") == 1
    assert mine < page.index("this one</span>") < other
    assert "198.51.100.9" in page
    assert "2 <a" in " ".join(here.get("/accounts/settings/").content.decode().split())


def test_the_others_are_ended_and_this_one_stays(here: Client, elsewhere: Client, ada: User, who: Who) -> None:
    bob = sign_in(User.objects.create_user("bob@example.org", PASSWORD), FIREFOX)
    page = here.post("/accounts/sessions/", follow=True).content.decode()
    assert "All other sessions are ended." in page
    assert "Safari" not in page
    assert "End all others" not in page
    assert elsewhere.get("/accounts/settings/").status_code == 302
    assert (who(here), who(elsewhere)) == (ada.pk, None)
    assert who(bob) is not None


def test_a_new_password_ends_all_sessions_but_this_one(here: Client, elsewhere: Client, who: Who) -> None:
    here.post("/accounts/password/change/", NEW)
    assert here.get("/accounts/settings/").status_code == 200
    assert elsewhere.get("/accounts/settings/").status_code == 302
    page = here.get("/accounts/sessions/").content.decode()
    assert "Firefox on Linux" in page
    assert "Safari" not in page


def test_being_here_is_noted_now_and_then_with_the_session(here: Client, ada: User) -> None:
    long_ago = timezone.now() - timedelta(hours=3)
    UserSession.objects.update(last_seen_at=long_ago)
    here.get("/")
    assert UserSession.objects.get().last_seen_at == long_ago, "it was seen just now; not with every request"
    session = here.session
    session[SEEN] = long_ago.timestamp()
    session.save()
    here.get("/", REMOTE_ADDR="192.0.2.99")
    seen = UserSession.objects.get()
    assert timezone.now() - seen.last_seen_at < timedelta(minutes=1)
    assert seen.ip == "192.0.2.99"


def test_a_session_from_before_it_was_noted_is_noted_when_it_comes_back(ada: User) -> None:
    client = Client()
    client.force_login(ada)
    session = client.session
    del session[SEEN]
    session.save()
    client.get("/")
    assert UserSession.objects.get().user == ada


def test_of_guests_nothing_is_noted(as_guest: Client, guest: User) -> None:
    User.objects.update(last_active=timezone.now() - timedelta(days=1))
    as_guest.get("/")
    assert not UserSession.objects.exists()
    for response in (as_guest.get("/accounts/sessions/"), as_guest.post("/accounts/sessions/")):
        assert response.headers["Location"] == "/accounts/signup/"


def test_what_was_noted_goes_with_the_session(here: Client) -> None:
    Session.objects.update(expire_date=timezone.now() - timedelta(days=1))
    guests.purge()
    assert not UserSession.objects.exists()


def test_a_session_deleted_in_the_admin_is_signed_out(admin_client: Client, here: Client, who: Who) -> None:
    session = UserSession.objects.get(session_key=here.session.session_key)
    listed = admin_client.get("/admin/usersessions/usersession/?q=ada@").content.decode()
    assert "192.0.2.7" in listed
    assert here.session.session_key not in listed
    admin_client.post(f"/admin/usersessions/usersession/{session.pk}/delete/", {"post": "yes"})
    assert here.get("/accounts/settings/").status_code == 302


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        (FIREFOX, "Firefox on Linux"),
        (SAFARI, "Safari on an iPhone"),
        ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) Chrome/144.0 Safari/537.36 Edg/144.0", "Edge on Windows"),
        ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) Chrome/144.0 Safari/537.36", "Chrome on macOS"),
        ("python-requests/2.32", "A Python program"),
        ("", "An unknown browser"),
    ],
)
def test_a_browser_is_called_what_a_person_calls_it(agent: str, name: str) -> None:
    assert browser(agent) == name
