"""The main job as people do it: sign up, submit, close the page, watch, compare, stop, resume, sign out."""

from __future__ import annotations

import csv
import re
import uuid
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Site

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

PASSWORD = "correct horse battery staple"
#: Long enough for a small real training on a busy machine.
TRAINED = 180_000


def sign_up(page: Page) -> str:
    email = f"{uuid.uuid4().hex[:12]}@example.org"
    page.goto("/accounts/signup/")
    page.fill("[name=email]", email)
    page.fill("[name=password1]", PASSWORD)
    page.fill("[name=password2]", PASSWORD)
    page.get_by_role("button", name="Sign up").click()
    page.wait_for_url("**/profile/")
    return email


def some_text(folder: Path) -> Path:
    """Real text of a size that is tokenised in a moment: some of the standard library's sources."""
    import argparse
    import asyncio
    import json

    path = folder / "sources.txt"
    packages = (Path(module.__file__).parent for module in (asyncio, json))
    sources = [file for package in packages for file in sorted(package.glob("*.py"))] + [Path(argparse.__file__)]
    path.write_text("\n\n".join(file.read_text() for file in sources))
    return path


def submit(page: Page, text: Path, name: str, steps: int, eval_every: int = 20) -> str:
    """Fill in the Train page with a tiny pair and start it; the experiment's address."""
    page.goto("/train/")
    page.fill("[name=name]", name)
    shapes = {"small": (32, 2, 16, 64, 1), "large": (64, 4, 16, 128, 2)}
    for role, sizes in shapes.items():
        for field, value in zip(("d_model", "n_heads", "d_head", "d_mlp", "n_layers"), sizes, strict=True):
            page.fill(f"[name={role}_{field}]", str(value))
    page.check("[name=source][value=upload]")
    page.set_input_files("[name=upload]", text)
    page.fill("[name=d_vocab]", "512")
    page.fill("[name=n_ctx]", "64")
    page.fill("[name=max_steps]", str(steps))
    page.fill("[name=warmup_steps]", "10")
    page.evaluate("document.querySelectorAll('form details').forEach(each => { each.open = true })")
    page.fill("[name=eval_every]", str(eval_every))
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile(r"/experiments/[0-9a-f-]{36}/$"))
    return page.url


def test_a_researcher_submits_closes_the_page_and_compares(context: BrowserContext, site: Site, tmp_path: Path) -> None:
    page = context.new_page()
    sign_up(page)
    expect(page.get_by_text("Nothing here yet")).to_be_visible()

    address = submit(page, some_text(tmp_path), "A pair on Python's own sources", steps=120)
    page.close()

    page = context.new_page()
    page.goto("/profile/")
    card = page.get_by_role("article")
    expect(card.get_by_role("link", name="A pair on Python's own sources")).to_be_visible()
    # Watched live: the details that were opened stay open and nothing is loaded again while it goes on.
    page.evaluate("window.sameDocument = true")
    card.get_by_text("Hyper-parameters").click()
    expect(card.locator(".state").first).to_have_text("Succeeded", timeout=TRAINED)
    assert page.evaluate("window.sameDocument") is True
    expect(card.locator("details.hyper")).to_have_attribute("open", "")
    for name in ("small", "scaled", "large"):
        row = card.locator(".card-figures tr").filter(has=page.get_by_text(name, exact=True))
        assert len(re.findall(r"\d+\.\d+", row.inner_text())) == 3  # training loss, validation loss, perplexity

    page.goto(address)
    expect(page.locator(".verdict-sentence")).to_contain_text(re.compile(r"scaled (reached|never reached)", re.I))
    expect(page.locator("#chart canvas")).to_be_visible()
    expect(page.locator("#comparison")).to_contain_text("scaled")
    expect(page.locator("#section-growth")).to_contain_text("grown from small")
    page.locator("#show-data summary").click()
    expect(page.locator("#data-table")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV of all points").click()
    with Path(download.value.path()).open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"small", "scaled", "large"}

    page.locator("details.menu summary").click()
    page.get_by_role("button", name="Sign out").click()
    assert context.request.get(address).status == 404


def test_a_run_is_stopped_and_resumed_and_ends_as_one_that_never_stopped(
    page: Page, complaints: list[str], tmp_path: Path
) -> None:
    sign_up(page)
    submit(page, some_text(tmp_path), "To be stopped", steps=600, eval_every=50)
    expect(page.locator("#section-progress")).to_contain_text(re.compile(r"step [1-9]"), timeout=TRAINED)
    page.get_by_role("button", name="Stop, keeping a checkpoint").click()
    expect(page.locator(".standing-line .state")).to_have_text("Cancelled", timeout=TRAINED)
    expect(page.locator("#section-progress")).to_contain_text("stopped on request")
    page.locator("#resume").click()
    expect(page.locator(".standing-line .state")).to_have_text(re.compile("Queued|Running"))
    expect(page.locator(".standing-line .state")).to_have_text("Succeeded", timeout=2 * TRAINED)
    # No step is missing and none is there twice.
    page.locator("#show-data summary").click()
    steps = page.locator("#data-table tbody th").all_inner_texts()
    assert len(steps) == len(set(steps)) > 10


def test_a_guest_who_signs_up_keeps_the_work(page: Page, tmp_path: Path) -> None:
    address = submit(page, some_text(tmp_path), "A guest's pair", steps=20)
    expect(page.get_by_text("You are working as a guest")).to_be_visible()
    sign_up(page)
    expect(page.get_by_role("link", name="A guest's pair")).to_be_visible()
    expect(page.get_by_text("You are working as a guest")).to_have_count(0)
    response = page.goto(address)
    assert response is not None
    assert response.status == 200


def test_an_error_stands_beside_its_field_and_nothing_typed_is_lost(page: Page) -> None:
    page.goto("/train/")
    page.fill("[name=name]", "Wrong on purpose")
    page.fill("[name=small_d_head]", "33")
    page.fill("[name=notes]", "kept")
    page.get_by_role("button", name="Start training").click()
    field = page.locator("[name=small_d_head]")
    expect(field).to_have_attribute("aria-invalid", "true")
    described = field.get_attribute("aria-describedby") or ""
    errors = [page.locator(f"#{each}").inner_text() for each in described.split() if each.endswith("_error")]
    assert any("33" in error and "even" in error for error in errors)
    assert page.input_value("[name=notes]") == "kept"
    assert page.input_value("[name=name]") == "Wrong on purpose"


def test_the_estimate_follows_what_is_typed(page: Page) -> None:
    page.goto("/train/")
    before = page.locator("#sheet table").inner_text()
    with page.expect_response("**/train/estimate/"):
        page.fill("[name=large_n_layers]", "8")
    expect(page.locator("#sheet table")).not_to_have_text(before)
