"""A page that loses the site says so, keeps what it shows, and goes on by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.test_main_job import TRAINED, sign_up, some_text, submit

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


def test_the_experiment_page_copes_with_a_lost_connection_and_keeps_its_zoom(
    page: Page, context: BrowserContext, complaints: list[str], tmp_path: Path
) -> None:
    sign_up(page)
    submit(page, some_text(tmp_path), "Watched through a bad line", steps=1200, eval_every=50)
    expect(page.locator("#section-progress")).to_contain_text("step ", timeout=TRAINED)
    expect(page.locator("#chart canvas")).to_be_visible()
    area = page.locator("#chart .u-over")
    expect(area).to_be_visible()
    # Of whichever chart stands there: new losses may replace it between two questions.
    box = area.evaluate("area => area.getBoundingClientRect().toJSON()")
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.7, steps=5)
    page.mouse.up()
    expect(page.locator("#reset-zoom")).to_be_enabled()

    context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible(timeout=60_000)
    expect(page.locator("#comparison, #section-table").first).to_be_attached()
    context.set_offline(False)
    expect(page.locator("#offline")).to_be_hidden(timeout=60_000)

    expect(page.locator(".standing-line .state")).to_have_text("Succeeded", timeout=TRAINED)
    expect(page.locator("#reset-zoom")).to_be_enabled()  # still zoomed
    complaints[:] = [each for each in complaints if "ERR_INTERNET_DISCONNECTED" not in each]
