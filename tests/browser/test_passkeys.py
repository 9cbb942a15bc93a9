"""Passkeys, with a real browser and an authenticator that the browser makes up."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, CDPSession, Page, expect

from tests.browser.conftest import Site
from tests.browser.test_main_job import PASSWORD, sign_up

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


class Authenticator:
    """A device that keeps passkeys and checks who holds it, as a phone does."""

    def __init__(self, cdp: CDPSession) -> None:
        self.cdp = cdp
        cdp.send("WebAuthn.enable")
        options = {
            "protocol": "ctap2",
            "transport": "internal",
            "hasResidentKey": True,
            "hasUserVerification": True,
            "isUserVerified": True,
            "automaticPresenceSimulation": True,
        }
        self.id = cdp.send("WebAuthn.addVirtualAuthenticator", {"options": options})["authenticatorId"]

    def credentials(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.cdp.send("WebAuthn.getCredentials", {"authenticatorId": self.id})[
            "credentials"
        ]
        return found

    def is_held_by(self, owner: bool) -> None:
        """Whether the finger is the owner's."""
        self.cdp.send("WebAuthn.setUserVerified", {"authenticatorId": self.id, "isUserVerified": owner})


@pytest.fixture
def device(context: BrowserContext, page: Page) -> Authenticator:
    return Authenticator(context.new_cdp_session(page))


def say_who(page: Page) -> None:
    page.fill("[name=password]", PASSWORD)
    page.get_by_role("button", name="Continue").click()


def add(page: Page, name: str) -> None:
    page.goto("/accounts/second-factor/passkeys/add/")
    if "reauthenticate" in page.url:
        say_who(page)
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Add the passkey").click()


def add_the_first(page: Page, name: str) -> None:
    add(page, name)
    expect(page.get_by_role("heading", name="Recovery codes")).to_be_visible()


def sign_out(page: Page) -> None:
    page.locator("details.menu summary").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("link", name="Sign in")).to_be_visible()


def test_a_passkey_signs_in_alone_and_is_a_second_step_after_the_password(page: Page, device: Authenticator) -> None:
    email = sign_up(page)
    add_the_first(page, "Laptop")
    (kept,) = device.credentials()
    assert kept["isResidentCredential"] is True
    assert kept["rpId"] == "localhost"

    sign_out(page)
    page.goto("/accounts/login/?next=/train/")
    page.get_by_role("button", name="Sign in with a passkey").click()
    page.wait_for_url("**/train/")
    expect(page.locator("header .name")).to_have_text(email)

    sign_out(page)
    page.goto("/accounts/login/")
    page.fill("[name=login]", email)
    page.fill("[name=password]", PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.get_by_role("heading", name="Second step")).to_be_visible()
    page.get_by_role("button", name="Use a passkey").click()
    page.wait_for_url("**/profile/")


def test_a_passkey_is_named_anew_and_removed_and_says_who_one_is(page: Page, device: Authenticator) -> None:
    sign_up(page)
    add_the_first(page, "Laptop")
    add(page, "Laptop again")
    expect(page.locator("#passkey-problem")).to_have_text("There is a passkey for this account in this place already.")

    page.goto("/accounts/settings/")
    page.get_by_role("link", name="Manage").click()
    page.get_by_role("link", name="Rename Laptop").click()
    page.get_by_label("Name").fill("Desk")
    page.get_by_role("button", name="Save the name").click()
    expect(page.locator(".rows")).to_contain_text("Desk")
    sign_out(page)
    page.goto("/accounts/login/")
    page.get_by_role("button", name="Sign in with a passkey").click()
    page.wait_for_url("**/profile/")
    page.goto("/accounts/second-factor/passkeys/")
    expect(page.locator(".rows")).to_contain_text("last used")

    # A session that has not said who it is lately: by the passkey itself.
    page.get_by_role("link", name="Remove Desk").click()
    page.get_by_role("link", name="a passkey").click()
    page.get_by_role("button", name="Continue with a passkey").click()
    page.get_by_role("button", name="Remove the passkey").click()
    expect(page.get_by_text("There is none yet")).to_be_visible()

    sign_out(page)
    page.goto("/accounts/login/")
    page.get_by_role("button", name="Sign in with a passkey").click()
    expect(page.get_by_role("alert").filter(has_text="This passkey does not sign in here")).to_be_visible()


def test_a_found_device_does_not_open_the_account(page: Page, device: Authenticator) -> None:
    sign_up(page)
    add_the_first(page, "Laptop")
    sign_out(page)
    device.is_held_by(False)
    page.goto("/accounts/login/")
    page.get_by_role("button", name="Sign in with a passkey").click()
    expect(page.locator("#passkey-problem")).to_contain_text("No passkey was given")
    expect(page.get_by_role("link", name="Sign in")).to_be_visible()


def test_at_an_ip_address_the_page_says_where_passkeys_work(browser: Browser, site: Site) -> None:
    context = browser.new_context(base_url=f"http://127.0.0.1:{site.port}")
    page = context.new_page()
    page.goto("/accounts/login/")
    expect(page.get_by_role("button", name="Sign in", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Sign in with a passkey")).to_be_hidden()
    sign_up(page)
    page.goto("/accounts/second-factor/passkeys/add/")
    say_who(page)
    expect(page.get_by_text(f"Open the site as http://localhost:{site.port}/ instead.")).to_be_visible()
    expect(page.get_by_role("button", name="Add the passkey")).to_be_hidden()
    context.close()
