"""Authenticator app, recovery codes, and what guards them. Passkeys need a browser: tests/browser/test_passkeys.py."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value
from cryptography.fernet import Fernet
from django.core import mail
from django.core.cache import cache
from django.db import connection
from django.test import Client
from pytest_django import Settings

from accounts import ring, second_factor
from accounts.models import User
from experiments.models import Experiment, Host
from tests.accounts.conftest import PASSWORD

Who = Callable[[Client], int | None]
AT = "/accounts/second-factor/"
PAGES = [
    "app/activate/", "app/deactivate/", "codes/", "codes/new/", "codes/download/", "passkeys/", "passkeys/add/",
    "passkeys/1/rename/", "passkeys/1/remove/", "passkeys/reauthenticate/", "reauthenticate/",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _a_code_may_be_half_a_minute_old(settings: Settings) -> None:
    """So that no test fails because it ran across the moment when codes change."""
    settings.MFA_TOTP_TOLERANCE = 1


def code_of(secret: str) -> str:
    """What an app would show now; each code is taken once, so what was used before is forgotten."""
    cache.clear()
    return str(format_hotp_value(hotp_value(secret, int(time.time()) // 30)))


def confirm(client: Client, **by: str) -> None:
    path = "/accounts/reauthenticate/" if "password" in by else f"{AT}reauthenticate/"
    assert client.post(path, by | {"next": "/accounts/settings/"}).headers["Location"] == "/accounts/settings/"


def activate(client: Client) -> str:
    """Set the app up; the secret."""
    confirm(client, password=PASSWORD)
    page = client.get(f"{AT}app/activate/").content.decode()
    assert "data:image/svg+xml" in page
    found = re.search(r'<code class="secret">([A-Z2-7]+)</code>', page)
    assert found
    done = client.post(f"{AT}app/activate/", {"code": code_of(found[1])})
    assert done.headers["Location"] == f"{AT}codes/"
    return found[1]


def codes(client: Client) -> list[str]:
    return re.findall(r"<li>(\d{8})</li>", client.get(f"{AT}codes/").content.decode())


def first_step(user: User, client: Client | None = None) -> Client:
    """The password, of somebody whose account asks for more."""
    client = client or Client()
    response = client.post("/accounts/login/", {"login": user.email, "password": PASSWORD})
    assert response.headers["Location"] == f"{AT}authenticate/"
    return client


def test_once_the_app_is_set_up_signing_in_takes_its_code(signed_in: Client, ada: User, who: Who) -> None:
    secret = activate(signed_in)
    signed_in.post("/accounts/logout/")

    client = first_step(ada)
    assert who(client) is None, "the password alone no longer signs in"
    assert client.get("/accounts/settings/").status_code == 302
    assert "Incorrect code" in client.post(f"{AT}authenticate/", {"code": "000000"}).content.decode()
    assert who(client) is None
    client.post(f"{AT}authenticate/", {"code": code_of(secret)})
    assert who(client) == ada.pk


def test_a_code_is_taken_once(signed_in: Client, ada: User, who: Who) -> None:
    code = code_of(activate(signed_in))
    first_step(ada).post(f"{AT}authenticate/", {"code": code})
    seen_over_the_shoulder = first_step(ada)
    seen_over_the_shoulder.post(f"{AT}authenticate/", {"code": code})
    assert who(seen_over_the_shoulder) is None


def test_a_recovery_code_signs_in_once(signed_in: Client, ada: User, who: Who) -> None:
    activate(signed_in)
    shown = codes(signed_in)
    assert len(set(shown)) == 10
    assert shown[3] in signed_in.get(f"{AT}codes/download/").content.decode()

    client = first_step(ada)
    client.post(f"{AT}authenticate/", {"code": shown[3]})
    assert who(client) == ada.pk
    again = first_step(ada)
    assert "Incorrect code" in again.post(f"{AT}authenticate/", {"code": shown[3]}).content.decode()
    assert who(again) is None
    assert "9 of 10 left" in signed_in.get("/accounts/settings/").content.decode()


def test_new_recovery_codes_end_the_old_ones(signed_in: Client, ada: User, who: Who) -> None:
    activate(signed_in)
    old = codes(signed_in)
    signed_in.post(f"{AT}codes/new/")
    new = codes(signed_in)
    assert len(new) == 10
    assert not set(old) & set(new)
    client = first_step(ada)
    client.post(f"{AT}authenticate/", {"code": old[0]})
    assert who(client) is None
    client.post(f"{AT}authenticate/", {"code": new[0]})
    assert who(client) == ada.pk


def test_guessing_codes_is_limited(signed_in: Client, ada: User, who: Who) -> None:
    secret = activate(signed_in)
    cache.clear()
    client = first_step(ada)
    for _ in range(6):
        page = client.post(f"{AT}authenticate/", {"code": "000000"}).content.decode()
    assert "Too many failed" in page
    right = format_hotp_value(hotp_value(secret, int(time.time()) // 30))
    client.post(f"{AT}authenticate/", {"code": right})
    assert who(client) is None, "not even the right one, for five minutes"


def test_switched_off_the_password_alone_signs_in_again_and_no_code_is_left(
    signed_in: Client, ada: User, who: Who
) -> None:
    activate(signed_in)
    page = signed_in.post(f"{AT}app/deactivate/", follow=True).content.decode()
    assert "The authenticator app is switched off." in page
    assert "Off. With one" in page
    assert not Authenticator.objects.exists()
    client = Client()
    client.post("/accounts/login/", {"login": ada.email, "password": PASSWORD})
    assert who(client) == ada.pk


def test_a_stolen_session_can_neither_set_up_nor_see_nor_switch_off_without_saying_who_it_is(
    signed_in: Client, ada: User
) -> None:
    for path in ("app/activate/", "passkeys/add/"):
        for response in (signed_in.get(AT + path), signed_in.post(AT + path, {"code": "1", "credential": "{}"})):
            assert response.headers["Location"].startswith("/accounts/reauthenticate/"), path
    secret = activate(signed_in)

    thief = first_step(ada)
    thief.post(f"{AT}authenticate/", {"code": code_of(secret)})  # a session as if it had been taken over
    for path in ("app/deactivate/", "codes/", "codes/new/", "codes/download/"):
        for response in (thief.get(AT + path), thief.post(AT + path)):
            assert response.status_code in (302, 405), path
            assert response.status_code == 405 or response.headers["Location"].startswith("/accounts/reauthenticate/")
    thief.post("/accounts/reauthenticate/", {"password": "wrong", "next": f"{AT}app/deactivate/"})
    thief.post(f"{AT}app/deactivate/")
    assert second_factor.of(ada).totp is not None

    confirm(thief, code=code_of(secret))
    thief.post(f"{AT}app/deactivate/")
    assert second_factor.of(ada).totp is None, "and with the code it can be, as with the password"


def test_the_question_says_why_it_is_asked_and_what_else_would_do(signed_in: Client) -> None:
    activate(signed_in)
    page = signed_in.get("/accounts/reauthenticate/?next=/accounts/email/").content.decode()
    assert "A browser that was left open must not be enough" in " ".join(page.split())
    assert f'href="{AT}reauthenticate/?next=/accounts/email/"' in page.replace("%2F", "/")


def test_nothing_in_the_database_opens_without_the_ring(signed_in: Client) -> None:
    secret = activate(signed_in)
    shown = codes(signed_in)
    app = Authenticator.objects.get(type="totp").data["secret"]
    seed = Authenticator.objects.get(type="recovery_codes").data["seed"]
    assert app.startswith("f1:gAAAA")
    assert seed.startswith("f1:gAAAA")
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')
            everything = repr(cursor.fetchall())
            assert secret not in everything, table
            assert not [code for code in shown if code in everything], table


def test_secrets_are_closed_anew_with_a_newer_key(signed_in: Client, ada: User, settings: Settings, who: Who) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    settings.CREDENTIAL_KEYS = [old]
    secret = activate(signed_in)
    settings.CREDENTIAL_KEYS = [new, old]
    assert second_factor.rotate() == 2
    settings.CREDENTIAL_KEYS = [new]
    client = first_step(ada)
    client.post(f"{AT}authenticate/", {"code": code_of(secret)})
    assert who(client) == ada.pk
    assert len(codes(signed_in)) == 10


def test_with_the_ring_lost_the_page_says_whom_to_ask(
    signed_in: Client, ada: User, settings: Settings, who: Who, caplog: pytest.LogCaptureFixture
) -> None:
    secret = activate(signed_in)
    settings.CREDENTIAL_KEYS = [Fernet.generate_key().decode()]
    client = first_step(ada)
    page = client.post(f"{AT}authenticate/", {"code": code_of(secret)}).content.decode()
    assert "has lost the key to your second factor" in page
    assert who(client) is None
    assert "none of the ring" in caplog.text
    assert signed_in.get("/accounts/settings/").status_code == 200


def test_a_secret_closed_for_something_else_is_not_opened(signed_in: Client, ada: User) -> None:
    activate(signed_in)
    row = Authenticator.objects.get(type="totp")
    row.data["secret"] = "f1:" + ring.ring().encrypt(b'["experiments.Host", "private_key", "JBSWY3DP"]').decode()
    row.save()
    page = first_step(ada).post(f"{AT}authenticate/", {"code": "123456"}).content.decode()
    assert "has lost the key" in page


def test_a_guests_work_moves_along_once_both_steps_are_done(
    as_guest: Client, guest: User, signed_in: Client, ada: User, who: Who
) -> None:
    secret = activate(signed_in)
    work = Experiment.objects.create(owner=guest, name="Theirs", spec_json={}, host=Host.local())
    first_step(ada, as_guest)
    work.refresh_from_db()
    assert work.owner == guest
    as_guest.post(f"{AT}authenticate/", {"code": code_of(secret)})
    assert who(as_guest) == ada.pk
    work.refresh_from_db()
    assert work.owner == ada


@pytest.mark.parametrize("path", PAGES)
def test_a_guest_is_asked_to_sign_up_and_a_stranger_to_sign_in(as_guest: Client, path: str) -> None:
    for response in (as_guest.get(AT + path, follow=True), as_guest.post(AT + path, follow=True)):
        assert response.redirect_chain == [("/accounts/signup/", 302)]
    assert "/login/" in Client().get(AT + path).headers["Location"]


def test_each_page_stands_in_our_frame(signed_in: Client) -> None:
    activate(signed_in)
    for path in ("app/deactivate/", "codes/", "codes/new/", "passkeys/", "passkeys/add/", "reauthenticate/"):
        response = signed_in.get(AT + path)
        page = response.content.decode()
        assert response.status_code == 200, path
        assert "kangaroo.css" in page, path
        assert "style=" not in page.replace('"style="', ""), path
        assert "<noscript>This functionality" not in page, path


def test_nobody_renames_or_removes_the_passkey_of_another(signed_in: Client) -> None:
    bob = User.objects.create_user("bob@example.org", PASSWORD)
    his = Authenticator.objects.create(user=bob, type="webauthn", data={"name": "His", "credential": {}})
    confirm(signed_in, password=PASSWORD)
    for path in ("rename", "remove"):
        assert signed_in.post(f"{AT}passkeys/{his.pk}/{path}/", {"name": "Mine"}).status_code == 404
    his.refresh_from_db()
    assert his.data["name"] == "His"


@pytest.mark.django_db(transaction=True)
def test_the_owner_of_the_address_hears_of_each_change(signed_in: Client, ada: User) -> None:
    activate(signed_in)
    signed_in.post(f"{AT}codes/new/")
    signed_in.post(f"{AT}app/deactivate/")
    assert [message.subject for message in mail.outbox] == [
        "Kangaroo: An authenticator app was set up",
        "Kangaroo: New recovery codes were made",
        "Kangaroo: The authenticator app was switched off",
    ]
    assert all(message.to == [ada.email] for message in mail.outbox)
    assert "If that was not you, change your password at once" in str(mail.outbox[0].body)


def test_where_addresses_must_be_confirmed_that_comes_first(signed_in: Client, ada: User, settings: Settings) -> None:
    settings.MFA_ALLOW_UNVERIFIED_EMAIL = False
    ada.emailaddress_set.update(verified=False)  # type: ignore[attr-defined]
    page = signed_in.get(f"{AT}app/activate/", follow=True).content.decode()
    assert "until you have verified your email address" in page


def test_an_administrator_signs_in_with_both_steps(client: Client, who: Who) -> None:
    root = User.objects.create_superuser("root@example.org", PASSWORD)
    client.post("/accounts/login/", {"login": root.email, "password": PASSWORD})
    secret = activate(client)
    other = Client()
    at = other.get("/admin/", follow=True).redirect_chain[-1][0]
    response = other.post(at, {"login": root.email, "password": PASSWORD, "next": "/admin/"})
    assert response.headers["Location"] == f"{AT}authenticate/"
    assert other.get("/admin/").status_code == 302
    response = other.post(f"{AT}authenticate/", {"code": code_of(secret)})
    assert response.headers["Location"] == "/admin/"
    assert other.get("/admin/").status_code == 200


def test_an_administrator_takes_the_second_factor_off_an_account(admin_client: Client, ada: User, who: Who) -> None:
    mine = Client()
    mine.post("/accounts/login/", {"login": ada.email, "password": PASSWORD})
    activate(mine)
    for path in ("mfa/authenticator/", f"mfa/authenticator/{Authenticator.objects.earliest('pk').pk}/change/"):
        page = admin_client.get(f"/admin/{path}").content.decode()
        assert ada.email is not None
        assert str(ada) in page
        assert "gAAAA" not in page, "not even closed"
    action = {"action": "remove_second_factor", "_selected_action": [ada.pk]}
    page = admin_client.post("/admin/accounts/user/", action, follow=True).content.decode()
    assert "Removed from Ada" in page
    assert not Authenticator.objects.exists()
    client = Client()
    client.post("/accounts/login/", {"login": ada.email, "password": PASSWORD})
    assert who(client) == ada.pk
    assert "Second factor removed." in admin_client.get(f"/admin/accounts/user/{ada.pk}/history/").content.decode()


# The ring ------------------------------------------------------------------------------------------------------------


def test_the_ring_is_made_once_for_this_user_alone(settings: Settings, tmp_path: Path) -> None:
    settings.CREDENTIAL_KEYS, settings.CREDENTIAL_KEYS_FILE = [], tmp_path / "credential-keys"
    closed = ring.ring().encrypt(b"x")
    assert ring.ring().decrypt(closed) == b"x"
    assert settings.CREDENTIAL_KEYS_FILE.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["credential-keys"]
    ring.write_keys(settings.CREDENTIAL_KEYS_FILE, [Fernet.generate_key().decode()], replace=False)
    assert ring.ring().decrypt(closed) == b"x", "what stands is never overwritten by a second start"


@pytest.mark.parametrize(("content", "said"), [("", "holds no key"), ("abc\n", "Key 1 of .* is not a Fernet key")])
def test_a_ring_that_is_none_is_refused_and_not_shown(
    settings: Settings, tmp_path: Path, content: str, said: str
) -> None:
    settings.CREDENTIAL_KEYS, settings.CREDENTIAL_KEYS_FILE = [], tmp_path / "credential-keys"
    settings.CREDENTIAL_KEYS_FILE.write_text(content)
    with pytest.raises(ring.KeyRingError, match=said) as refused:
        ring.ring()
    assert "abc" not in str(refused.value)
