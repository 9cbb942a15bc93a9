"""People for the tests of accounts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from allauth.account.models import EmailAddress
from django.core.cache import cache
from django.test import Client

from accounts.models import User

PASSWORD = "kettle-brink-42"


@pytest.fixture(autouse=True)
def _no_limits_used_up(db: None) -> None:
    cache.clear()


@pytest.fixture
def ada() -> User:
    user = User.objects.create_user("ada@example.org", PASSWORD, name="Ada")
    EmailAddress.objects.create(user=user, email=user.email, primary=True, verified=True)
    return user


@pytest.fixture
def signed_in(ada: User) -> Client:
    client = Client()
    assert client.post("/accounts/login/", {"login": ada.email, "password": PASSWORD}).status_code == 302
    return client


@pytest.fixture
def guest() -> User:
    return User.objects.create_guest()


@pytest.fixture
def as_guest(guest: User) -> Client:
    client = Client()
    client.force_login(guest)
    return client


@pytest.fixture
def who() -> Callable[[Client], int | None]:
    """Whose session it is."""

    def who(client: Client) -> int | None:
        pk = client.session.get("_auth_user_id")
        return int(pk) if pk else None

    return who
