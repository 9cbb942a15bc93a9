"""Profile: what stands there, what a poll brings, and how much it costs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import User
from experiments.models import Experiment, Host, ModelRun, Reason, State
from tests.experiments.factories import make_experiment, make_user

pytestmark = pytest.mark.django_db
URL = "/profile/"


@pytest.fixture
def ada(client: Client) -> User:
    user = make_user()
    client.force_login(user)
    return user


def names(html: str) -> list[str]:
    """Names of the experiments on the page, from the top."""
    return re.findall(r'<h2 id="name-[^"]*"><a [^>]*>([^<]*)</a>', html)


def marks(html: str) -> list[str]:
    return re.findall(r'name="seen" value="([^"]*)"', html)


def poll(client: Client, seen: list[str]) -> Any:
    return client.get(URL, {"seen": seen}, headers={"HX-Request": "true"})


def test_somebody_not_signed_in_is_told_what_stands_here_and_where_to_begin(client: Client) -> None:
    html = client.get(URL).content.decode()
    assert "You can start one without an account" in html
    assert f'href="{reverse("train")}"' in html
    assert f"{reverse('account_login')}?next={URL}" in html


def test_an_empty_profile_has_one_button(client: Client, ada: User) -> None:
    html = client.get(URL).content.decode()
    assert "Nothing here yet" in html
    assert html.count("btn btn-primary") == 1


def test_other_peoples_experiments_are_not_here(client: Client, ada: User) -> None:
    make_experiment(make_user("eve@example.org"), name="Of Eve", is_public=True, points=0)
    assert "Of Eve" not in client.get(URL).content.decode()


def test_running_ones_stand_on_top_then_the_newest(client: Client, ada: User) -> None:
    for name, state in (("first", "running"), ("second", "succeeded"), ("third", "failed"), ("fourth", "queued")):
        make_experiment(ada, name=name, state=state, until=0.5, points=0)
    assert names(client.get(URL).content.decode()) == ["fourth", "first", "third", "second"]


def test_a_card_has_the_figures_of_its_models(client: Client, ada: User) -> None:
    make_experiment(ada)
    html = client.get(URL).content.decode()
    assert ">4.700<" in html  # small's training loss
    assert ">3.920<" in html  # scaled's validation loss
    assert ">68.03<" in html  # e to large's 4.22
    assert html.count("<polyline") == 3
    assert "grown from small: duplicate, identity" in html
    assert re.search(r"<dt>lr</dt>|<dt>max_steps</dt>", html)


def test_a_running_card_has_progress_and_time_left(client: Client, ada: User) -> None:
    make_experiment(ada, state="running", until=0.25)
    html = client.get(URL).content.decode()
    # 300 of 400 steps left, 0.02 s each.
    assert "25\N{NO-BREAK SPACE}%, about 6.0\N{NO-BREAK SPACE}s left" in html
    assert 'value="0.2500"' in html


@pytest.mark.parametrize("problem", ["unreachable", "key_changed"])
def test_nothing_is_said_of_the_time_left_while_nothing_is_heard_of_a_run(
    client: Client, ada: User, problem: str
) -> None:
    experiment = make_experiment(ada, state="running", until=0.25)
    host = Host.objects.create(name="gpu1", kind=Host.Kind.SSH, owner=ada, problem=problem)
    experiment.runs.update(host=host)
    for address in (URL, experiment.get_absolute_url()):
        html = client.get(address).content.decode()
        assert "25\N{NO-BREAK SPACE}%" in html
        assert "s left" not in html
    assert f'href="{host.get_absolute_url()}">See gpu1</a>' in html
    Host.objects.filter(pk=host.pk).update(problem="")
    assert "s left" in client.get(URL).content.decode()


def test_a_run_whose_steps_are_done_is_not_said_to_train(client: Client, ada: User) -> None:
    make_experiment(ada, states={"large": "running"}, until=1.0, points=4)
    html = client.get(URL).content.decode()
    assert "large: evaluating on the test split" in html
    assert " left" not in html


def test_waiting_runs_say_for_what_and_their_place_in_line(client: Client, ada: User) -> None:
    make_experiment(make_user("eve@example.org"), state="queued", points=0)
    make_experiment(ada, state="queued", points=0)
    html = client.get(URL).content.decode()
    assert "waiting for small" in html
    # Eve's small and large come before.
    assert "waiting for a free place on the host: number 3 in line" in html


def test_a_failure_says_what_failed(client: Client, ada: User) -> None:
    make_experiment(ada, states={"scaled": "failed"}, until=0.5)
    assert "scaled: out of memory" in client.get(URL).content.decode()


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"q": "BOOKS"}, ["about books"]),
        ({"q": "noted"}, ["other"]),
        ({"state": "running"}, ["about books"]),
        ({"state": "finished"}, ["other"]),
        ({"state": "ended"}, ["broken"]),
        ({"sort": "name"}, ["about books", "broken", "other"]),
        ({"sort": "oldest"}, ["about books", "other", "broken"]),
        ({"sort": "loss"}, ["about books", "other", "broken"]),
        ({"sort": "nonsense", "state": "nonsense"}, ["about books", "broken", "other"]),
    ],
)
def test_filter_and_sort(client: Client, ada: User, query: dict[str, str], found: list[str]) -> None:
    # Those that run stay on top whatever the order.
    make_experiment(ada, name="about books", state="running", until=0.1, points=0)
    make_experiment(ada, name="other", notes="noted", points=0)
    make_experiment(ada, name="broken", state="failed", until=0.5, points=0)
    assert names(client.get(URL, query).content.decode()) == found


def test_what_has_no_loss_yet_comes_after_what_has(client: Client, ada: User) -> None:
    make_experiment(ada, name="has one", points=0)
    make_experiment(ada, name="has none", state="failed", until=0.0, points=0)
    assert names(client.get(URL, {"sort": "loss"}).content.decode()) == ["has one", "has none"]


def test_a_filter_without_a_match_leads_back(client: Client, ada: User) -> None:
    make_experiment(ada, points=0)
    html = client.get(URL, {"q": "zebra"}).content.decode()
    assert "No experiment of yours matches" in html
    assert "Nothing here yet" not in html


def test_pages_hold_twenty_and_keep_the_filter(client: Client, ada: User) -> None:
    for i in range(21):
        make_experiment(ada, name=f"number {i}", points=0)
    first = client.get(URL, {"q": "number"}).content.decode()
    assert len(names(first)) == 20
    assert "1 to 20 of 21" in first
    assert 'href="?q=number&amp;page=2"' in first
    assert names(client.get(URL, {"q": "number", "page": 2}).content.decode()) == ["number 0"]


def test_a_poll_without_news_swaps_nothing(client: Client, ada: User) -> None:
    make_experiment(ada, state="running", until=0.5)
    seen = marks(client.get(URL).content.decode())
    answer = poll(client, seen)
    assert answer.status_code == 204
    assert answer.content == b""
    assert "HX-Trigger" not in answer


def test_a_poll_brings_only_the_cards_that_changed(client: Client, ada: User) -> None:
    still = make_experiment(ada, state="running", until=0.5)
    moving = make_experiment(ada, state="running", until=0.5)
    seen = marks(client.get(URL).content.decode())
    ModelRun.objects.filter(experiment=moving, name="large").update(step=300, last_seq=300)
    html = poll(client, seen).content.decode()
    assert f'id="live-{moving.pk}"' in html
    assert str(still.pk) not in html
    assert 'hx-swap-oob="true"' in html
    # What comes back is known from then on.
    unchanged = [mark for mark in seen if str(still.pk) in mark]
    assert poll(client, unchanged + marks(html)).status_code == 204


def test_an_identifier_may_be_written_in_capitals(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    assert poll(client, [f"{str(experiment.pk).upper()}:old"]).status_code == 200


def test_two_experiments_that_look_the_same_keep_their_own_cards(client: Client, ada: User) -> None:
    twins = [make_experiment(ada, points=4) for _ in range(2)]
    for _ in range(2):  # drawn, then remembered
        html = client.get(URL).content.decode()
        assert all(f'id="live-{twin.pk}"' in html for twin in twins)


def test_a_card_that_is_remembered_follows_its_experiment(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=4)
    client.get(URL)
    Experiment.objects.filter(pk=experiment.pk).update(name="Renamed meanwhile")
    assert "Renamed meanwhile" in client.get(URL).content.decode()


def test_polling_is_told_to_end_when_nothing_runs(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    seen = marks(client.get(URL).content.decode())
    for run in experiment.runs.all():
        run.move(State.SUCCEEDED, Reason.FINISHED, ended_at=timezone.now())
    answer = poll(client, seen)
    assert answer["HX-Trigger"] == "kangaroo:settled"
    assert marks(answer.content.decode()) == []
    assert "Succeeded" in answer.content.decode()


def test_finished_cards_are_not_polled(client: Client, ada: User) -> None:
    make_experiment(ada)
    html = client.get(URL).content.decode()
    assert marks(html) == []
    assert "data-poll" not in html
    answer = poll(client, [])
    assert answer.status_code == 204
    assert answer["HX-Trigger"] == "kangaroo:settled"


def test_a_poll_tells_nothing_of_other_peoples_experiments(client: Client, ada: User) -> None:
    theirs = make_experiment(make_user("eve@example.org"), name="Of Eve", state="running", until=0.5)
    answer = poll(client, [f"{theirs.pk}:old", "not-a-uuid:x", ":", "x"])
    assert answer.status_code == 204
    assert Experiment.objects.filter(pk=theirs.pk).exists()


def test_the_number_of_queries_does_not_grow_with_experiments(
    client: Client, ada: User, django_assert_max_num_queries: Any
) -> None:
    for state in ("running", "succeeded", "failed", "queued"):
        make_experiment(ada, state=state, until=0.5)
    client.get(URL)
    # Session, user, count, page, runs, line, curves; the same for four and for forty.
    with django_assert_max_num_queries(7):
        client.get(URL)
    for i in range(36):
        make_experiment(ada, name=f"more {i}", states={"large": "queued"}, points=4)
    with django_assert_max_num_queries(7):
        client.get(URL)


def test_a_poll_without_news_costs_five_queries_at_most(
    client: Client, ada: User, django_assert_max_num_queries: Any
) -> None:
    for _ in range(5):
        make_experiment(ada, state="running", until=0.5)
    seen = marks(client.get(URL).content.decode())
    with django_assert_max_num_queries(5):
        assert poll(client, seen).status_code == 204


class _Inline(HTMLParser):
    found: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inline = [name for name, _ in attrs if name == "style" or name.startswith(("on", "hx-on"))]
        if inline or (tag == "script" and not dict(attrs).get("src")) or tag == "style":
            self.found.append(f"{tag} {attrs}")


def inline_parts(html: str) -> list[str]:
    parser = _Inline()
    parser.found = []
    parser.feed(html)
    return parser.found


def test_nothing_on_the_page_needs_the_policy_loosened(client: Client, ada: User) -> None:
    make_experiment(ada, state="running", until=0.5)
    answer = client.get(URL)
    assert inline_parts(answer.content.decode()) == []
    assert "unsafe" not in answer["Content-Security-Policy"]


def test_names_are_escaped(client: Client, ada: User) -> None:
    make_experiment(ada, name='<b onclick="x">bold</b>', notes="<script>1</script>", state="running", until=0.5)
    html = client.get(URL).content.decode()
    assert "<b onclick" not in html
    assert "<script>1" not in html
