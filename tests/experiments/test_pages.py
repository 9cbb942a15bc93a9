"""Home, Docs, and the pages that say that something is wrong."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from django.conf import settings
from django.template.loader import render_to_string
from django.test import Client
from django.urls import reverse

from accounts.models import User
from experiments import documentation
from tests.experiments.factories import make_experiment, make_user

pytestmark = pytest.mark.django_db


class Found(HTMLParser):
    """Every id, link, heading and style attribute of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.inline: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.inline += [name for name in given if name == "style" or name.startswith(("on", "hx-on"))]
        if tag in ("style", "script") and not given.get("src"):
            self.inline.append(tag)


def test_home_says_what_the_original_reached_and_leads_to_train(client: Client) -> None:
    page = client.get("/").content.decode()
    for figure in ("66.948", "59.258", "53.195", "4.203", "4.081", "3.974", "25,000", "WikiText-103"):
        assert figure in page
    assert f'href="{reverse("train")}"' in page
    assert "See an experiment" not in page
    assert Found(page).inline == []


def test_home_shows_the_public_first_experiment_and_no_other(client: Client) -> None:
    make_experiment(make_user(), name="Private", points=0)
    first = make_experiment(None, name="The first experiment", points=0, is_public=True)
    page = client.get("/").content.decode()
    assert f'href="{first.get_absolute_url()}"' in page
    assert "Private" not in page


def test_every_page_forbids_inline_script_and_style(client: Client) -> None:
    policy = client.get("/").headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy


PAGES = [page.name for page in documentation.pages()]


def test_the_pages_of_our_own_are_there_in_order() -> None:
    assert [name for name in PAGES if name in ("guide", "fields", "figures")] == ["guide", "fields", "figures"]
    assert [name for name in documentation.PAGES if name in PAGES] == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_docs_page_renders_with_one_heading_on_top_and_no_inline_style(client: Client, name: str) -> None:
    response = client.get(f"/docs/{name}/")
    found = Found(response.content.decode())
    assert response.status_code == 200
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(found.headings)), "no level is skipped"
    assert len(found.ids) == len(set(found.ids))
    assert found.inline == []


@pytest.mark.parametrize("name", PAGES)
def test_no_link_of_a_docs_page_is_dead(client: Client, name: str) -> None:
    address = f"/docs/{name}/"
    found = Found(client.get(address).content.decode())
    for link in found.links:
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        if not path:
            assert anchor in found.ids, link
            continue
        assert path.startswith("/"), f"{link} leads nowhere on the site"
        there = client.get(path, follow=True)
        assert there.status_code == 200, link
        if anchor:
            assert anchor in Found(there.content.decode()).ids, link


@pytest.mark.parametrize("name", PAGES)
def test_a_docs_pages_links_lead_somewhere_in_the_repository_too(name: str) -> None:
    folder = settings.BASE_DIR / "docs"
    text = (folder / f"{name}.md").read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "#", "/")):
            assert (folder / link.partition("#")[0]).exists(), link


def test_the_docs_list_every_page_and_each_page_leads_to_its_neighbours(client: Client) -> None:
    index = client.get("/docs/").content.decode()
    assert all(f'href="/docs/{name}/"' in index for name in PAGES)
    for here, after in pairwise(PAGES):
        assert f'rel="next" href="/docs/{after}/"' in client.get(f"/docs/{here}/").content.decode()
        assert f'rel="prev" href="/docs/{here}/"' in client.get(f"/docs/{after}/").content.decode()


def test_tables_in_the_docs_align_their_numbers_without_inline_style(client: Client) -> None:
    page = client.get("/docs/fields/").content.decode()
    assert 'class="num"' in page
    assert 'style="' not in page


@pytest.mark.parametrize("path", ["/docs/nonsense/", "/nonsense/", "/docs/settings/"])
def test_an_address_that_leads_nowhere_says_so_in_our_frame(client: Client, path: str) -> None:
    response = client.get(path)
    page = response.content.decode()
    assert response.status_code == 404
    assert "Nothing here" in page
    assert path in page
    assert "kangaroo.css" in page


def test_work_of_somebody_else_does_not_exist_for_a_stranger_or_a_guest(client: Client) -> None:
    theirs = make_experiment(make_user(), points=0)
    for user in (None, User.objects.create_guest(), make_user("bob@example.org")):
        if user:
            client.force_login(user)
        assert client.get(f"/experiments/{theirs.pk}/").status_code == 404


def test_a_form_from_another_site_is_refused_with_words() -> None:
    client = Client(enforce_csrf_checks=True)
    response = client.post("/accounts/login/", {"login": "ada@example.org", "password": "x"})
    assert response.status_code == 403
    assert "Nothing\n        was changed" in response.content.decode()


def test_a_page_for_others_says_as_whom_one_is_signed_in(client: Client) -> None:
    client.force_login(make_user())
    response = client.get("/admin/login/")
    assert response.status_code == 403
    assert "ada@example.org, which may not open this page" in response.content.decode()


def test_the_page_for_an_error_of_our_own_needs_nothing_that_could_be_broken_too() -> None:
    page = render_to_string("500.html")
    assert "Training goes on" in page
    assert "/static/" not in page
    assert "{%" not in page
    assert Found(page).inline == []


def test_a_broken_page_answers_with_it(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.documentation.pages", lambda: 1 / 0)
    client.raise_request_exception = False
    response = client.get("/docs/")
    assert response.status_code == 500
    assert "Something broke" in response.content.decode()


def test_a_guest_is_told_how_to_keep_their_work_and_others_are_not(client: Client) -> None:
    assert "working as a guest" not in client.get("/").content.decode()
    client.force_login(User.objects.create_guest())
    page = client.get("/").content.decode()
    assert "Sign up to keep this work" in page
    assert "30 idle days" in page
    client.force_login(make_user())
    assert "working as a guest" not in client.get("/").content.decode()
