"""A machine is added as a person does it, against a real SSH server: confirmed, let in, looked at, ready; then lost."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.conftest import Site
from tests.browser.test_accessibility import check
from tests.browser.test_main_job import PASSWORD, sign_up
from tests.sshd import AS_ROOT, Sshd, login, python_there, sshd

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

#: A look imports torch there, on a machine that may be busy.
LOOKED_AT = 180_000


def go(page: Page, path: str) -> None:
    """Open a page that may ask for the password first."""
    page.goto(path)
    if "reauthenticate" in page.url:
        page.fill("[name=password]", PASSWORD)
        page.get_by_role("button", name="Continue").click()
        page.wait_for_url(f"**{path}")


def add(page: Page, sshd: Sshd, name: str) -> None:
    """The first two steps: where it is, and that it is the right one."""
    go(page, "/hosts/add/")
    page.fill("[name=name]", name)
    page.fill("[name=address]", "127.0.0.1")
    page.fill("[name=port]", str(sshd.port))
    page.fill("[name=username]", sshd.login.name)
    page.get_by_text("Jump host, folder, Python").click()
    page.fill("[name=python]", sshd.python)
    page.fill("[name=before]", "export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Is {name} the right machine?")
    for _ in range(20):  # the collector of a site that has just been started may not be there yet
        if page.locator("#seen").count():
            break
        page.wait_for_timeout(3_000)
        page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#seen")).to_have_text(re.compile("^SHA256:"))


def in_the_shell(sshd: Sshd, command: str) -> None:
    """What a person pastes into the shell of the machine."""
    user: dict[str, Any] = {"user": sshd.login.uid, "group": sshd.login.gid, "extra_groups": []} if AS_ROOT else {}
    env = {"HOME": str(sshd.login.home), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", command], check=True, cwd=sshd.login.home, env=env, **user)


def test_a_machine_is_added_confirmed_let_in_and_ready(context: BrowserContext, sshd: Sshd) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    sign_up(page)
    page.get_by_role("link", name="Hosts").click()
    expect(page.get_by_text("Machines with GPUs")).to_be_visible()

    add(page, sshd, "under the table")
    printed = subprocess.run(
        ["ssh-keygen", "-lf", str(sshd.folder / "host_key.pub")], capture_output=True, text=True, check=True
    ).stdout
    expect(page.locator("#seen")).to_have_text(printed.split()[1])
    page.get_by_role("button", name="Yes, it is the same").click()

    expect(page.get_by_role("heading", name="The way into under the table")).to_be_visible()
    page.get_by_role("button", name="Copy the command").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#command").inner_text()
    in_the_shell(sshd, command)
    page.get_by_role("button", name="The line is there").click()

    # The look begins by itself and is watched on the same page.
    page.evaluate("window.sameDocument = true")
    state = page.locator("#section-state .state")
    expect(page.locator(".look-step-done").first).to_be_visible(timeout=LOOKED_AT)
    expect(state).to_have_text("ready", timeout=LOOKED_AT)
    assert page.evaluate("window.sameDocument") is True
    expect(page.locator("#section-facts")).to_contain_text("torch")
    for step in page.locator(".look-step").all():
        assert re.search("look-step-(done|warning)", step.get_attribute("class") or ""), step.inner_text()
    # It does not ask for ever.
    page.wait_for_load_state("networkidle")

    page.get_by_role("link", name="Hosts").click()
    card = page.get_by_role("article").filter(has_text="under the table")
    expect(card.locator(".state")).to_have_text("ready")

    # A line that is taken out locks Kangaroo out, which the page says, with what to do.
    card.get_by_role("link", name="under the table").click()
    page.get_by_role("heading", name="Credential").click()
    in_the_shell(sshd, page.locator("#revoke").inner_text())
    page.get_by_role("button", name="Look again").click()
    if "reauthenticate" in page.url:  # on a slow machine it is long since the last sign-in
        page.fill("[name=password]", PASSWORD)
        page.get_by_role("button", name="Continue").click()
    expect(state).to_have_text("refused the login", timeout=LOOKED_AT)
    expect(page.get_by_role("link", name="See the credential")).to_be_visible()


def test_a_machine_that_shows_another_key_is_not_signed_in_to(context: BrowserContext, sshd: Sshd) -> None:
    page = context.new_page()
    sign_up(page)
    add(page, sshd, "rented")
    old = page.locator("#seen").inner_text()
    page.get_by_role("button", name="Yes, it is the same").click()
    sshd.new_host_key()
    sshd.start()
    page.get_by_role("button", name="The line is there").click()
    state = page.locator("#section-state")
    expect(state.locator(".state")).to_have_text("its host key has changed", timeout=LOOKED_AT)
    expect(state).to_contain_text(old)
    page.get_by_role("link", name="Compare the two keys").click()
    new = page.locator("#seen").inner_text()
    assert new != old
    page.get_by_label("The last four characters").fill(old[-4:])
    page.get_by_role("button", name="trust the new key").click()
    expect(page.locator(".field-error")).to_contain_text("must be the last 4 characters")
    page.get_by_label("The last four characters").fill(new[-4:])
    page.get_by_role("button", name="trust the new key").click()
    expect(page.get_by_role("heading", name="The way into rented")).to_be_visible()
    page.get_by_role("link", name="go to the page of rented").click()
    page.get_by_role("heading", name="Host key").click()
    expect(page.get_by_role("region", name="Host keys that were confirmed")).to_contain_text("in place of another")


@pytest.fixture(params=["light", "dark"])
def themed(request: pytest.FixtureRequest, browser: Browser, site: Site) -> Iterator[Page]:
    context = browser.new_context(base_url=site.url, color_scheme=request.param, bypass_csp=True)
    yield context.new_page()
    context.close()


def test_every_page_of_a_machine_can_be_read_by_all(themed: Page, sshd: Sshd) -> None:
    page = themed
    sign_up(page)
    page.goto("/hosts/")
    check(page)
    go(page, "/hosts/add/")
    page.get_by_role("button", name="Go on").click()
    check(page)  # with errors
    add(page, sshd, "gpu1")
    check(page)
    page.get_by_role("button", name="Yes, it is the same").click()
    page.evaluate("document.querySelectorAll('main details').forEach(each => { each.open = true })")
    check(page)
    page.get_by_role("button", name="Keep this key").click()
    check(page)  # with an error
    page.get_by_role("button", name="The line is there").click()
    expect(page.locator("#section-state .state")).to_have_text("refused the login", timeout=LOOKED_AT)
    page.evaluate("document.querySelectorAll('main details').forEach(each => { each.open = true })")
    check(page)
    address = page.url.removesuffix("/")
    for path in ("/edit/", "/delete/", "/confirm/", "/credential/"):
        go(page, address + path)
        check(page)
    page.goto("/hosts/")
    check(page)


__all__ = ["login", "python_there", "sshd"]
