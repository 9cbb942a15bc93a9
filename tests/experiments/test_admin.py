"""The administrator's pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.db import connection
from django.test import Client

from accounts.models import User
from experiments import line
from experiments.models import Experiment, ModelRun, Point, State
from tests.experiments.factories import add_note, make_experiment, make_user

pytestmark = pytest.mark.django_db


@pytest.fixture
def root() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root@example.org", "correct horse"))
    return client


def act(client: Client, model: str, action: str, *pks: Any) -> str:
    """Choose rows in a list, do `action`; the page that follows."""
    data = {"action": action, "_selected_action": [str(pk) for pk in pks]}
    response = client.post(f"/admin/{model}/", data, follow=True)
    assert response.status_code == 200
    return response.content.decode()


def test_the_admin_is_reached_through_the_sites_own_sign_in(client: Client) -> None:
    response = client.get("/admin/", follow=True)
    assert response.redirect_chain[-1][0].startswith("/accounts/login/?next=")
    client.force_login(make_user())
    assert client.get("/admin/").status_code == 302
    assert client.get("/admin/", follow=True).status_code == 403, "an account is not enough"


LISTS = [
    f"/admin/{model._meta.app_label}/{model._meta.model_name}/"
    for model in admin.site._registry
    if model._meta.app_label != "django_rq"
]


def test_every_row_that_a_person_may_look_for_is_in_the_admin() -> None:
    assert {"/admin/experiments/experiment/", "/admin/experiments/modelrun/", "/admin/experiments/host/"} < set(LISTS)
    assert "/admin/accounts/user/" in LISTS
    assert not admin.site.is_registered(Point), "points are the follower's alone"


@pytest.mark.parametrize("path", LISTS)
def test_a_list_renders_and_can_be_searched(root: Client, path: str) -> None:
    make_experiment(make_user(), points=0)
    assert root.get(path).status_code == 200
    assert root.get(f"{path}?q=ada").status_code in (200, 302)


def test_a_list_of_experiments_takes_few_queries(
    root: Client, django_assert_max_num_queries: Callable[..., Any]
) -> None:
    for n in range(12):
        make_experiment(make_user(f"user{n}@example.org"), points=0)
    for model in ("experiment", "modelrun"):
        with django_assert_max_num_queries(16):
            assert root.get(f"/admin/experiments/{model}/").status_code == 200


@pytest.mark.parametrize("state", State.values)
def test_experiments_and_runs_are_filtered_by_state_and_shown_with_owner_and_host(root: Client, state: str) -> None:
    make_experiment(make_user(), name="Wanted", state=state, points=0)
    other = "failed" if state != "failed" else "queued"
    make_experiment(make_user("bob@example.org"), name="Other", state=other, points=0)
    for address in (f"experiment/?runs__state__exact={state}", f"modelrun/?state__exact={state}"):
        page = root.get(f"/admin/experiments/{address}").content.decode()
        assert "Wanted" in page
        assert ">Other<" not in page
        assert "ada@example.org" in page
        assert "this machine" in page


@pytest.mark.parametrize("state", State.values)
def test_an_experiment_and_its_runs_are_shown_whole(root: Client, state: str) -> None:
    experiment = make_experiment(make_user(), state=state, points=4, until=0.5)
    run = experiment.runs.get(name="scaled")
    add_note(run, "warning", message="the tokenizer is small")
    page = root.get(f"/admin/experiments/experiment/{experiment.pk}/change/").content.decode()
    assert "python-stdlib" in page
    assert f"/admin/experiments/modelrun/{run.pk}/change/" in page
    page = root.get(f"/admin/experiments/modelrun/{run.pk}/change/").content.decode()
    assert "the tokenizer is small" in page
    assert run.job_id in page


def test_nothing_that_the_follower_writes_can_be_edited(root: Client) -> None:
    run = make_experiment(make_user(), state="running", until=0.5, points=0).runs.get(name="small")
    page = root.get(f"/admin/experiments/modelrun/{run.pk}/change/").content.decode()
    main = page[page.index('id="content-main"') :]
    assert not re.search(r'<(input|select|textarea)(?![^>]*type="hidden")[^>]*name="(?!q)', main)
    assert 'name="_save"' not in page
    root.post(f"/admin/experiments/modelrun/{run.pk}/change/", {"state": "succeeded", "step": "7", "attempt": "9"})
    kept = ModelRun.objects.get(pk=run.pk)
    assert (kept.state, kept.step, kept.attempt) == ("running", run.step, 1)


def test_name_notes_owner_and_public_are_the_administrators_to_change_and_the_spec_is_not(root: Client) -> None:
    experiment = make_experiment(make_user(), points=0)
    change = {"name": "New name", "notes": "n", "is_public": "on", "spec_json": "{}", "owner": str(experiment.owner_id)}
    empty = {f"runs-{key}": "0" for key in ("TOTAL_FORMS", "INITIAL_FORMS", "MIN_NUM_FORMS", "MAX_NUM_FORMS")}
    response = root.post(f"/admin/experiments/experiment/{experiment.pk}/change/", change | empty)
    assert response.status_code == 302
    kept = Experiment.objects.get(pk=experiment.pk)
    assert (kept.name, kept.is_public) == ("New name", True)
    assert kept.spec_json == experiment.spec_json


@pytest.mark.parametrize("model", ["experiment", "modelrun", "host"])
def test_rows_come_from_the_train_page_not_from_here(root: Client, model: str) -> None:
    assert root.get(f"/admin/experiments/{model}/add/").status_code == 403


def test_stop_cancels_what_waits_and_asks_what_runs(root: Client) -> None:
    experiment = make_experiment(
        make_user(), states={"small": "running", "large": "succeeded"}, state="queued", points=0
    )
    page = act(root, "experiments/experiment", "stop", experiment.pk)
    assert "2 runs asked to stop." in page
    runs = {run.name: run for run in experiment.runs.all()}
    assert (runs["small"].state, runs["small"].stop_requested) == ("running", True)
    assert runs["scaled"].state == "cancelled"
    assert (runs["large"].state, runs["large"].stop_requested) == ("succeeded", False)
    assert "None of these is queued or running." in act(root, "experiments/modelrun", "stop", runs["large"].pk)


def test_resume_queues_what_failed_under_a_new_attempt(root: Client) -> None:
    experiment = make_experiment(make_user(), states={"large": "failed"}, points=0)
    page = act(root, "experiments/modelrun", "resume", experiment.runs.get(name="large").pk)
    assert "1 run queued again." in page
    run = experiment.runs.get(name="large")
    assert (run.state, run.attempt) == ("queued", 2)
    done = experiment.runs.get(name="small")
    assert "None of these has failed or was stopped." in act(root, "experiments/modelrun", "resume", done.pk)


def test_resume_says_when_a_limit_of_the_owner_stands_in_the_way(root: Client, settings: Any) -> None:
    settings.MAX_ACTIVE_RUNS_PER_USER = 2
    experiment = make_experiment(make_user(), state="failed", points=0)
    assert "2 are allowed" in act(root, "experiments/experiment", "resume", experiment.pk)
    assert not experiment.runs.exclude(state="failed").exists()


def test_requeue_looks_after_what_waits(root: Client) -> None:
    experiment = make_experiment(make_user(), state="queued", points=0)
    assert "3 runs looked after." in act(root, "experiments/experiment", "requeue", experiment.pk)


def test_deleting_asks_first_in_a_line_and_then_takes_the_run_directories_too(
    root: Client, django_capture_on_commit_callbacks: Callable[..., Any]
) -> None:
    experiment = make_experiment(make_user(), points=40)
    experiment.directory.mkdir(parents=True)
    (experiment.directory / "spec.json").write_text("{}")
    path = f"/admin/experiments/experiment/{experiment.pk}/delete/"
    asked = root.get(path).content.decode()
    assert "their curves and run directories" in asked
    assert len(asked) < 20_000, "not a line for each point"
    with django_capture_on_commit_callbacks(execute=True):
        root.post(path, {"post": "yes"})
    assert not Experiment.objects.exists()
    assert not experiment.directory.exists()


def test_many_experiments_are_deleted_in_the_same_way(
    root: Client, django_capture_on_commit_callbacks: Callable[..., Any]
) -> None:
    experiments = [make_experiment(None, points=0) for _ in range(2)]
    for experiment in experiments:
        experiment.directory.mkdir(parents=True)
    data = {"action": "delete_selected", "_selected_action": [str(e.pk) for e in experiments], "post": "yes"}
    with django_capture_on_commit_callbacks(execute=True):
        root.post("/admin/experiments/experiment/", data)
    assert not Experiment.objects.exists()
    assert not any(experiment.directory.exists() for experiment in experiments)


@pytest.mark.django_db(transaction=True)
def test_a_deletion_waits_for_the_broker_only_after_its_transaction(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    monkeypatch.setattr(line, "forget", lambda run: inside.append(connection.in_atomic_block))
    experiment = make_experiment(make_user(), points=0)
    root.post(f"/admin/experiments/experiment/{experiment.pk}/delete/", {"post": "yes"})
    assert inside == [False] * 3


def _admin_paths(patterns: Any = None, before: str = "/admin/") -> Iterator[str]:
    for pattern in admin.site.get_urls() if patterns is None else patterns:
        path = before + re.sub(r"<(path|int|uuid):.*?>|<.*?>|\(\?P.*?\)", "1", str(pattern.pattern)).strip("^$")
        if hasattr(pattern, "url_patterns"):
            yield from _admin_paths(pattern.url_patterns, path)
        else:
            yield path


@pytest.mark.parametrize("path", sorted(set(_admin_paths()) - {"/admin/logout/", "/admin/login/"}))
def test_nothing_of_the_admin_answers_to_an_ordinary_account(client: Client, path: str) -> None:
    client.force_login(make_user())
    for answer in (client.get(path), client.post(path)):
        assert answer.status_code in (301, 302, 401, 403, 404)
        if answer.status_code in (301, 302):
            assert re.match(r"/admin/login/|/accounts/login/|/admin/", answer["Location"])


def test_people_are_found_made_and_deleted(root: Client) -> None:
    guest = User.objects.create_guest()
    make_experiment(guest, points=40)
    assert f"guest {guest.pk}" in root.get("/admin/accounts/user/?is_guest__exact=1").content.decode()
    new = {
        "email": "new@example.org",
        "usable_password": "true",
        "password1": "kettle-brink",
        "password2": "kettle-brink",
    }
    root.post("/admin/accounts/user/add/", new)
    made = User.objects.get(email="new@example.org")
    assert made.check_password("kettle-brink")
    assert root.get(f"/admin/accounts/user/{made.pk}/change/").status_code == 200
    assert root.get(f"/admin/accounts/user/{guest.pk}/change/").status_code == 200
    assert "everything that belongs to it" in root.get(f"/admin/accounts/user/{guest.pk}/delete/").content.decode()
    root.post(f"/admin/accounts/user/{guest.pk}/delete/", {"post": "yes"})
    assert not Experiment.objects.exists()


def test_two_guests_have_no_address_without_being_in_each_others_way(root: Client) -> None:
    for guest in (User.objects.create_guest(), User.objects.create_guest()):
        data = {"email": "", "name": "Somebody", "is_active": "on"}
        assert root.post(f"/admin/accounts/user/{guest.pk}/change/", data).status_code == 302
    assert User.objects.filter(email=None, name="Somebody").count() == 2


def test_a_hosts_places_can_be_changed_and_its_load_is_shown(root: Client) -> None:
    experiment = make_experiment(make_user(), states={"small": "running"}, state="queued", until=0.1, points=0)
    page = root.get("/admin/experiments/host/").content.decode()
    assert '<td class="field-training">1</td>' in page
    assert '<td class="field-waiting">2</td>' in page
    root.post(f"/admin/experiments/host/{experiment.host_id}/change/", {"name": "this machine", "slots": "3"})
    experiment.host.refresh_from_db()
    assert experiment.host.slots == 3


def test_the_queues_dashboard_is_in_the_admin(root: Client, queue: Any) -> None:
    assert "/admin/django_rq/dashboard/" in root.get("/admin/").content.decode()
    job = queue.enqueue("experiments.worker.follow", 1, 1)
    one = f"queues/0/{job.id}/"
    for page in ("", "queues/0/", "queues/0/details/", "queues/0/failed/", "workers/0/", one, f"{one}delete/"):
        response = root.get(f"/admin/django_rq/dashboard/{page}")
        assert response.status_code == 200, page
        refused = re.search(r"<style|style=|onclick|<script[^>]*>[^<]", response.content.decode())
        assert not refused, f"the site's policy refuses {refused} of {page}"
