"""axe-core on every page, in both themes, wide and narrow; no serious violation, and nothing scrolls sideways."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import ROOT, Site
from tests.browser.test_main_job import PASSWORD, TRAINED, sign_up, some_text, submit

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

AXE = ROOT / "node_modules/axe-core/axe.min.js"
FOR_ALL = [
    "/",
    "/docs/",
    "/docs/guide/",
    "/docs/fields/",
    "/docs/figures/",
    "/docs/growth/",
    "/docs/hosts/",
    "/no-such-page/",
]
SIGNED_OUT = ["/train/", "/profile/", "/accounts/login/", "/accounts/signup/", "/accounts/password/reset/"]
SIGNED_IN = ["/train/", "/profile/", "/hosts/", "/accounts/email/", "/accounts/password/change/", "/accounts/settings/"]
MEMBERS = ["/accounts/sessions/", "/accounts/reauthenticate/"]
SECOND_FACTOR = [
    f"/accounts/second-factor/{path}/"
    for path in ("codes", "codes/new", "app/deactivate", "passkeys", "passkeys/add", "reauthenticate")
]


@pytest.fixture(params=["light", "dark"])
def themed(request: pytest.FixtureRequest, browser: Browser, site: Site) -> Iterator[Page]:
    # The policy that the site sends would keep axe out, so it is not held to here; the other tests are.
    context = browser.new_context(base_url=site.url, color_scheme=request.param, bypass_csp=True)
    yield context.new_page()
    context.close()


def violations(page: Page) -> list[str]:
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{each['id']}: {node['html'][:200]} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


#: What makes the page scroll sideways, the innermost first.
STICKS_OUT = """() => {
  if (document.documentElement.scrollWidth <= innerWidth) return [];
  const out = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5);
  return out.reverse().slice(0, 8).map(e => e.outerHTML.slice(0, 160));
}"""


def check(page: Page) -> None:
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert violations(page) == [], f"{page.url} at {width}"
        assert page.evaluate(STICKS_OUT) == [], f"{page.url} at {width}"


def test_every_page_of_a_stranger(themed: Page) -> None:
    for path in FOR_ALL + SIGNED_OUT:
        themed.goto(path)
        check(themed)


def test_every_page_of_somebody_signed_in(themed: Page, tmp_path: Path) -> None:
    sign_up(themed)
    for path in SIGNED_IN:
        response = themed.goto(path)
        assert response is not None
        assert response.status == 200, path
        check(themed)
    themed.goto("/train/")
    themed.fill("[name=small_d_head]", "33")
    themed.get_by_role("button", name="Start training").click()
    check(themed)  # with errors

    address = submit(themed, some_text(tmp_path), "Looked at while it runs", steps=30, eval_every=10)
    check(themed)
    themed.goto("/profile/")
    check(themed)
    themed.goto(address)
    expect(themed.locator(".standing-line .state")).to_have_text("Succeeded", timeout=TRAINED)
    themed.evaluate("document.querySelectorAll('main details').forEach(each => { each.open = true })")
    check(themed)
    themed.goto("/profile/")
    check(themed)


def code_of(secret: str) -> str:
    """What an authenticator app shows, once it will show it long enough to be typed."""
    left = 30 - time.time() % 30
    if left < 10:
        time.sleep(left)
    return str(format_hotp_value(hotp_value(secret, int(time.time()) // 30)))


def test_every_page_of_signing_in_with_two_steps(themed: Page) -> None:
    email = sign_up(themed)
    for path in MEMBERS:
        themed.goto(path)
        check(themed)
    themed.goto("/accounts/second-factor/app/activate/")
    themed.get_by_label("Password").fill(PASSWORD)
    themed.get_by_role("button", name="Continue").click()
    secret = themed.locator("code.secret").inner_text()
    check(themed)
    themed.get_by_label("Code").fill("0")
    themed.get_by_role("button", name="Switch it on").click()
    check(themed)  # with an error
    themed.get_by_label("Code").fill(code_of(secret))
    themed.get_by_role("button", name="Switch it on").click()
    themed.wait_for_url("**/codes/")
    for path in ["/accounts/settings/", *SECOND_FACTOR]:
        themed.goto(path)
        check(themed)
    themed.context.clear_cookies()
    themed.goto("/accounts/login/")
    themed.fill("[name=login]", email)
    themed.fill("[name=password]", PASSWORD)
    themed.get_by_role("button", name="Sign in", exact=True).click()
    themed.wait_for_url("**/authenticate/")
    check(themed)
