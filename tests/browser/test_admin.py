"""The administrator, made by a command, in Django's admin."""

from __future__ import annotations

import uuid

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Site

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


def test_an_administrator_made_by_the_command_finds_experiments_runs_hosts_users_and_queues(
    page: Page, site: Site
) -> None:
    email = f"{uuid.uuid4().hex[:12]}@example.org"
    site.manage("createsuperuser", "--no-input", "--email", email, DJANGO_SUPERUSER_PASSWORD="a long enough passphrase")
    page.goto("/admin/")
    page.fill("[name=login]", email)
    page.fill("[name=password]", "a long enough passphrase")
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.get_by_role("link", name="Model runs")).to_be_visible()
    for path in ("experiments/experiment", "experiments/modelrun", "experiments/host", "accounts/user"):
        response = page.goto(f"/admin/{path}/")
        assert response is not None
        assert response.status == 200, path
    response = page.goto("/admin/django_rq/dashboard/")
    assert response is not None
    assert response.status == 200
    expect(page.get_by_text("default").first).to_be_visible()
