"""The chart in a real browser: live without losing zoom, by keyboard, as a picture; an address that shows the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.conftest import Site

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

#: Rows as they stand in the middle of a run, whose last sign of life is far off: no follower touches them.
MAKE = """
import json, uuid
from datetime import timedelta
from django.test import Client
from django.utils import timezone
from tests.experiments.factories import *
user = make_user(uuid.uuid4().hex + "@example.org")
experiment = make_experiment(user, name="In the middle", state="running", until=0.5)
experiment.runs.update(last_seen=timezone.now() + timedelta(hours=1))
client = Client()
client.force_login(user)
print(json.dumps([str(experiment.pk), client.cookies["sessionid"].value]))
"""
ADVANCE = """
from experiments.models import *
for run in ModelRun.objects.filter(experiment="{pk}"):
    at = dict(tokens=250 * 512, flops=1e12, train_seconds=5.0, n_tokens=65536, accuracy=0.3, bits_per_byte=1.5)
    Point.objects.create(run=run, split="validation", step=250, cross_entropy=4.0, **at)
    ModelRun.objects.filter(pk=run.pk).update(step=250, last_seq=run.last_seq + 1)
"""
END = """
from experiments.models import *
from django.utils import timezone
for run in ModelRun.objects.filter(experiment="{pk}", state="running"):
    run.move("succeeded", "finished", ended_at=timezone.now())
"""


@pytest.fixture
def running(site: Site, context: BrowserContext) -> Iterator[str]:
    pk, session = json.loads(site.manage("shell", "-v0", "-c", MAKE).strip().splitlines()[-1])
    context.add_cookies([{"name": "sessionid", "value": session, "url": site.url}])
    yield str(pk)
    site.manage("shell", "-v0", "-c", END.format(pk=pk))  # or it would hold a place that later tests wait for


def drag(page: Page) -> None:
    """Choose the first half of the chart."""
    over = page.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80, steps=5)
    page.mouse.up()
    page.mouse.move(5, 5)


def value(page: Page, model: str) -> str:
    row = page.locator(".values-table tbody tr").filter(has_text=model)
    return row.locator("td").nth(1).inner_text()


def test_zoom_and_what_was_open_outlast_live_updates(
    page: Page, site: Site, running: str, complaints: list[str]
) -> None:
    page.goto(f"/experiments/{running}/")
    expect(page.locator("#chart canvas")).to_be_visible()
    drag(page)
    expect(page.locator("#reset-zoom")).to_be_enabled()
    page.locator("#why-scaled-large summary").click()
    page.locator("#stop").focus()
    assert value(page, "scaled") == "200"
    site.manage("shell", "-v0", "-c", ADVANCE.format(pk=running))
    expect(page.locator("#section-progress")).to_contain_text("step 250 of 400")
    expect(page.locator(".values-table tbody tr").filter(has_text="scaled")).to_contain_text("250")
    expect(page.locator("#reset-zoom")).to_be_enabled()
    expect(page.locator("#why-scaled-large")).to_have_attribute("open", "")
    assert page.evaluate("document.activeElement.id") == "stop"
    site.manage("shell", "-v0", "-c", END.format(pk=running))
    expect(page.locator(".verdict-sentence")).to_contain_text("scaled reached large's final loss")
    expect(page.locator("#live")).to_have_text("In the middle: succeeded")
    expect(page.locator("#stop")).to_have_count(0)
    # Nothing is left to wait for, so nothing is asked for any more.
    page.wait_for_load_state("networkidle")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(5000)
    assert asked == []
    assert complaints == []


def test_the_chart_is_walked_by_keyboard_and_saved_as_a_picture(page: Page, running: str, tmp_path: Path) -> None:
    page.goto(f"/experiments/{running}/")
    expect(page.locator("#chart canvas")).to_be_visible()
    page.locator(".chart-area").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#live")).to_contain_text("Steps 100: small 5.7")
    page.keyboard.press("+")
    expect(page.locator("#reset-zoom")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator("#reset-zoom")).to_be_disabled()
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    picture = tmp_path / "chart.png"
    download.value.save_as(picture)
    assert download.value.suggested_filename == "in-the-middle-loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_address_shows_the_same_view_again(page: Page, context: BrowserContext, running: str) -> None:
    page.goto(f"/experiments/{running}/")
    page.select_option("[name=x]", "flops")
    page.select_option("[name=split]", "train")
    page.check("[name=charge]")
    page.check("[name=logy]")
    expect(page.locator("#section-data")).to_contain_text("Train split")
    other = context.new_page()
    other.goto(page.url)
    expect(other.locator(".legend-x")).to_have_text("Training FLOPs")
    expect(other.locator("#chart figcaption")).to_contain_text("on the train split")
    for name in ("charge", "logy"):
        expect(other.locator(f"[name={name}]")).to_be_checked()
    assert value(other, "scaled") == value(page, "scaled")


def test_a_lost_connection_is_said_and_found_again(
    page: Page, context: BrowserContext, site: Site, running: str, complaints: list[str]
) -> None:
    page.goto(f"/experiments/{running}/")
    expect(page.locator("#chart canvas")).to_be_visible()
    context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    site.manage("shell", "-v0", "-c", ADVANCE.format(pk=running))
    context.set_offline(False)
    expect(page.locator("#section-progress")).to_contain_text("step 250 of 400")
    expect(page.locator("#offline")).to_be_hidden()
    # The browser says so itself for each poll that did not get through.
    complaints[:] = [each for each in complaints if "ERR_INTERNET_DISCONNECTED" not in each and "htmx:" not in each]


def test_without_javascript_the_figures_are_there(
    browser: Browser, site: Site, context: BrowserContext, running: str
) -> None:
    plain = browser.new_context(base_url=site.url, java_script_enabled=False)
    (session,) = (cookie["value"] for cookie in context.cookies() if cookie["name"] == "sessionid")
    plain.add_cookies([{"name": "sessionid", "value": session, "url": site.url}])
    page = plain.new_page()
    page.goto(f"/experiments/{running}/?split=train")
    expect(page.locator("#chart")).to_be_hidden()
    page.locator("#show-data summary").click()
    expect(page.locator("#data-table")).to_contain_text("Train split")
    page.locator("#ask-delete").click()
    expect(page.locator("#delete-dialog")).to_be_visible()
    page.get_by_role("link", name="Keep it").click()
    expect(page.locator("#delete-dialog")).to_be_hidden()
    plain.close()
