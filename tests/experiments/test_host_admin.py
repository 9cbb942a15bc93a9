"""Hosts in the administrator's pages: how they stand, who may do what, and no credential anywhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission
from django.test import Client

from accounts.models import User
from experiments import credentials
from experiments.models import Host, HostKeyPin, HostTask, Removal, Transfer
from tests.experiments.factories import make_experiment, make_user

pytestmark = pytest.mark.django_db

PASSPHRASE = "a passphrase that nobody sees"
NOON = datetime(2026, 11, 24, 12, 2, tzinfo=UTC)
GPU = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H100"}


@pytest.fixture
def root() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root@example.org", "correct horse"))
    return client


def make_host(owner: User | None = None, name: str = "workstation", **more: Any) -> Host:
    pem, public = credentials.new_pair(name)
    ready = {
        "kind": Host.Kind.SSH,
        "address": "gpu.example.org",
        "port": 2222,
        "username": "ada",
        "credential": Host.Credential.GENERATED,
        "private_key": pem,
        "public_key": public,
        "passphrase": PASSPHRASE,
        "host_key": credentials.new_pair("host")[1],
        "env_python": "kangaroo/env/bin/python",
        "before": "export WANDB_API_KEY=not-for-others",
        "facts": {"hostname": "<b>box</b>", "gpus": [GPU, GPU, {**GPU, "name": "NVIDIA A100"}]},
    }
    return Host.objects.create(name=name, owner=owner or make_user(f"{name}@example.org"), **ready | more)


def page(client: Client, path: str) -> str:
    response = client.get(f"/admin/experiments/{path}")
    assert response.status_code == 200, path
    return response.content.decode()


def act(client: Client, action: str, *hosts: Host) -> str:
    data = {"action": action, "_selected_action": [str(host.pk) for host in hosts]}
    response = client.post("/admin/experiments/host/", data, follow=True)
    assert response.status_code == 200
    return response.content.decode()


def change(client: Client, host: Host, **data: str) -> int:
    empty = {
        f"{inline}-{key}": "0"
        for inline in ("pins", "tasks")
        for key in ("TOTAL_FORMS", "INITIAL_FORMS", "MIN_NUM_FORMS", "MAX_NUM_FORMS")
    }
    return client.post(f"/admin/experiments/host/{host.pk}/change/", empty | data).status_code


def inputs(text: str) -> set[str]:
    main = text[text.index('id="content-main"') :]
    found = re.findall(r'<(?:input|select|textarea)(?![^>]*type="(?:hidden|submit)")[^>]*name="([^"]+)"', main)
    return set(found)


STATES = [
    ({}, "ready"),
    ({"host_key": ""}, "not confirmed"),
    ({"env_python": "", "probed_at": NOON}, "not set up"),
    ({"unreachable_since": NOON, "problem": "unreachable"}, "unreachable since 2026-11-24 12:02"),
    ({"problem": "key_changed"}, "its host key has changed"),
    ({"retired_at": NOON}, "retired"),
    ({"problem": "login_refused"}, "refused the login"),
]


@pytest.mark.parametrize(("more", "word"), STATES, ids=[word for _, word in STATES])
def test_a_host_is_listed_with_its_owner_place_state_gpus_and_load(root: Client, more: Any, word: str) -> None:
    host = make_host(**more)
    experiment = make_experiment(make_user(), states={"small": "running"}, state="queued", until=0.1, points=0)
    experiment.runs.update(host=host)
    listed = page(root, "host/")
    assert re.search(rf'<span class="state state-\w+">{word}</span>', listed)
    for shown in ("workstation@example.org", "ada@gpu.example.org:2222", "2 × NVIDIA H100, 1 × NVIDIA A100"):
        assert shown in listed
    assert '<td class="field-training">1</td>' in listed
    assert '<td class="field-waiting">2</td>' in listed
    assert re.search(rf'<span class="state state-\w+">{word}</span>', page(root, f"host/{host.pk}/change/"))


def test_hosts_are_searched_and_filtered(root: Client) -> None:
    make_host(name="alpha", address="alpha.lab")
    make_host(name="beta", address="10.1.2.3", problem="unusable", offered=True)
    make_experiment(None, points=0)
    for query, found in (
        ("q=alph", {"alpha"}),
        ("q=10.1.2", {"beta"}),
        ("q=beta@example", {"beta"}),
        ("kind__exact=ssh", {"alpha", "beta"}),
        ("kind__exact=local", {"this machine"}),
        ("offered__exact=1", {"beta"}),
        ("problem__exact=unusable", {"beta"}),
        ("retired_at__isempty=1", {"alpha", "beta", "this machine"}),
    ):
        listed = page(root, f"host/?{query}")
        assert set(re.findall(r'/host/\d+/change/[^"]*">([^<]+)</a></th>', listed)) == found, query


def test_a_list_of_hosts_takes_few_queries(root: Client, django_assert_max_num_queries: Callable[..., Any]) -> None:
    for number in range(8):
        make_host(name=f"h{number}")
    with django_assert_max_num_queries(14):
        page(root, "host/")


def test_a_host_is_shown_whole_with_its_fingerprint_pins_and_tasks(root: Client) -> None:
    host = make_host(seen_key=credentials.new_pair("other")[1], last_seen=NOON)
    admin = User.objects.get(email="root@example.org")
    HostKeyPin.objects.create(host=host, key=host.host_key, previous=host.seen_key, by=admin)
    task = HostTask.objects.create(
        host=host,
        kind="probe",
        state="failed",
        steps=[{"key": "reach", "title": "<i>reach</i>", "state": "failed"}],
        log="<script>alert(1)</script>",
        asked_by=admin,
    )
    shown = page(root, f"host/{host.pk}/change/")
    assert shown.count(credentials.fingerprint(host.host_key)) == 2, "beside the host and in the pin"
    assert shown.count(credentials.fingerprint(host.seen_key)) == 2
    assert "&lt;b&gt;box&lt;/b&gt;" in shown
    assert "<b>box" not in shown
    assert f"/admin/experiments/hosttask/{task.pk}/change/" in shown
    shown = page(root, f"hosttask/{task.pk}/change/")
    assert "&lt;script&gt;alert(1)" in shown
    assert "&lt;i&gt;reach" in shown
    assert "<script>alert" not in shown


def test_a_host_that_says_nonsense_of_itself_is_shown_all_the_same(root: Client) -> None:
    for number, facts in enumerate(([1], "x", {"gpus": 3}, {"gpus": [3, {"name": 7}]})):
        host = make_host(name=f"h{number}", facts=facts, host_key="nonsense")
        assert "not a key" in page(root, f"host/{host.pk}/change/")
    page(root, "host/")


def test_runs_are_shown_on_the_host_where_each_trains(root: Client) -> None:
    host = make_host()
    experiment = make_experiment(make_user(), state="running", until=0.1, points=0)
    run = experiment.runs.get(name="large")
    type(run).objects.filter(pk=run.pk).update(host=host, gpus=["GPU-1", "GPU-2"])
    assert "workstation" in page(root, f"modelrun/?host__id__exact={host.pk}")
    shown = page(root, f"modelrun/{run.pk}/change/")
    assert "GPU-1, GPU-2" in shown
    assert "workstation" in shown
    assert "workstation" in page(root, f"experiment/{experiment.pk}/change/")


def test_transfers_and_removals_are_shown_and_not_changed(root: Client) -> None:
    host = make_host()
    run = make_experiment(make_user(), points=0).runs.get(name="small")
    transfer = Transfer.objects.create(run=run, name="model", bytes_done=5, bytes_total=10)
    removal = Removal.objects.create(host=host, experiment_id=run.experiment_id)
    task = HostTask.objects.create(host=host, kind="set_up")
    for model, row in (("transfer", transfer), ("removal", removal), ("hosttask", task)):
        page(root, f"{model}/")
        assert not inputs(page(root, f"{model}/{row.pk}/change/"))
        assert root.get(f"/admin/experiments/{model}/add/").status_code == 403
        assert root.post(f"/admin/experiments/{model}/{row.pk}/change/", {"state": "done"}).status_code == 403
        assert root.post(f"/admin/experiments/{model}/{row.pk}/delete/", {"post": "yes"}).status_code == 403
    transfer.refresh_from_db()
    assert transfer.state == "wanted"


# What an administrator may do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["another's", "their own"])
def test_nothing_but_the_offer_can_be_changed(root: Client, whose: str) -> None:
    host = make_host(User.objects.get(email="root@example.org") if whose == "their own" else None)
    assert inputs(page(root, f"host/{host.pk}/change/")) == {"offered"}
    before = Host.objects.values().get(pk=host.pk)
    data = {"name": "x", "address": "evil.example", "port": "1", "username": "root", "private_key": "x", "before": "x"}
    assert change(root, host, **data, host_key="x", public_key="x", owner="", env_python="x", offered="on") == 302
    after = Host.objects.values().get(pk=host.pk)
    assert after.pop("offered")
    assert not before.pop("offered")
    for name in ("private_key", "passphrase"):
        assert before.pop(name)._stored == after.pop(name)._stored
    assert after == before


def test_saving_leaves_what_the_collector_writes_meanwhile(root: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host()
    from experiments.admin import HostAdmin

    save = HostAdmin.save_model

    def late(self: Any, request: Any, obj: Host, form: Any, changed: bool) -> None:
        Host.objects.filter(pk=host.pk).update(problem="unusable", last_seen=NOON)
        save(self, request, obj, form, changed)

    monkeypatch.setattr(HostAdmin, "save_model", late)
    change(root, host, offered="on")
    host.refresh_from_db()
    assert (host.offered, host.problem, host.last_seen) == (True, "unusable", NOON)


def test_a_host_is_offered_to_all_and_taken_back(root: Client) -> None:
    host = make_host()
    stranger = make_user("stranger@example.org")
    assert "Offered to all: workstation." in act(root, "offer", host)
    assert host in Host.objects.usable_by(stranger)
    act(root, "take_back", host)
    assert host not in Host.objects.usable_by(stranger)
    change(root, host, offered="on")
    assert host in Host.objects.usable_by(stranger)
    change(root, host)
    assert host not in Host.objects.usable_by(stranger)


def test_a_host_is_retired_once_nothing_runs_there(root: Client) -> None:
    host = make_host(offered=True)
    experiment = make_experiment(make_user(), state="queued", points=0)
    experiment.runs.update(host=host)
    assert "3 runs wait or train there; stop them first." in act(root, "retire", host)
    host.refresh_from_db()
    assert host.retired_at is None
    experiment.runs.update(state="cancelled")
    assert "Retired: workstation." in act(root, "retire", host)
    host.refresh_from_db()
    assert host.retired_at is not None
    assert not host.offered
    assert host not in Host.objects.usable_by(host.owner)
    assert "it is retired" in act(root, "offer", host)
    assert not inputs(page(root, f"host/{host.pk}/change/"))


def test_a_jump_host_is_not_retired_under_another(root: Client) -> None:
    jump = make_host(name="jump")
    make_host(name="inner", jump=jump)
    assert "Nothing was done with jump: inner is reached through it." in act(root, "retire", jump)


def test_a_host_is_not_deleted_here_and_this_machine_is_neither_offered_nor_retired(root: Client) -> None:
    host = make_host()
    assert root.post(f"/admin/experiments/host/{host.pk}/delete/", {"post": "yes"}).status_code == 403
    assert "delete_selected" not in page(root, "host/")
    act(root, "delete_selected", host)
    assert Host.objects.filter(pk=host.pk).exists()
    local = Host.local()
    for action in ("offer", "retire"):
        assert "it belongs to this installation" in act(root, action, local)
    assert inputs(page(root, f"host/{local.pk}/change/")) == {"name", "slots"}
    assert root.post(f"/admin/experiments/host/{local.pk}/change/", {"name": "here", "slots": "5"}).status_code == 302
    local.refresh_from_db()
    assert (local.name, local.slots, local.offered) == ("here", 5, False)


# Who may look, and what nobody sees -----------------------------------------------------------------------------------


def staff(*permissions: str) -> Client:
    user = make_user("staff@example.org", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


def test_staff_who_may_view_change_nothing(django_user_model: Any) -> None:
    host = make_host()
    client = staff("view_host")
    assert not inputs(page(client, f"host/{host.pk}/change/"))
    assert change(client, host, offered="on") == 403
    act(client, "offer", host)
    host.refresh_from_db()
    assert not host.offered
    for model in ("hosttask", "transfer", "removal", "modelrun"):
        assert client.get(f"/admin/experiments/{model}/").status_code == 403


def test_staff_without_a_permission_see_no_host() -> None:
    host = make_host()
    client = staff("view_experiment")
    assert client.get("/admin/experiments/host/").status_code == 403
    assert client.get(f"/admin/experiments/host/{host.pk}/change/").status_code == 403


@pytest.mark.parametrize("who", ["superuser", "staff"])
def test_no_page_holds_a_credential_in_clear_or_as_it_is_stored(root: Client, who: str) -> None:
    host = make_host(User.objects.get(email="root@example.org"))
    pem = host.private_key.reveal(host)
    task = HostTask.objects.create(host=host, kind="probe", state="succeeded")
    HostKeyPin.objects.create(host=host, key=host.host_key)
    client = root if who == "superuser" else staff("view_host", "change_host", "view_hosttask", "view_hostkeypin")
    act(client, "offer", host)
    act(client, "retire", host)
    assert LogEntry.objects.count() >= 2
    wanted = [
        "host/",
        f"host/{host.pk}/change/",
        f"host/{host.pk}/history/",
        "hosttask/",
        f"hosttask/{task.pk}/change/",
        "host/?q=workstation",
    ]
    text = "".join(page(client, path) for path in wanted) + client.get("/admin/").content.decode()
    text += "".join(f"{entry.change_message}{entry.object_repr}" for entry in LogEntry.objects.all())
    body = "".join(pem.splitlines()[1:-1])
    never = [PASSPHRASE, base64.b64encode(PASSPHRASE.encode()).decode(), "PRIVATE KEY", "not-for-others", "f1:gAAAA"]
    never += [host.private_key._stored, host.passphrase._stored]
    never += [body[at : at + 20] for at in range(60, len(body) - 20, 7)]
    for secret in never:
        assert secret not in text
    for name in ("private_key", "passphrase"):
        assert f'name="{name}"' not in text
        assert f"field-{name}" not in text


def test_columns_cannot_be_used_to_guess_a_credential(root: Client) -> None:
    host = make_host()
    for lookup in (
        "private_key__startswith=f1",
        "private_key=x",
        "passphrase__contains=a",
        "owner__password__startswith=p",
    ):
        response = root.get(f"/admin/experiments/host/?{lookup}")
        assert response.status_code in (302, 400), lookup
    response = root.get("/admin/experiments/modelrun/?host__private_key__startswith=f1")
    assert response.status_code in (302, 400)
    assert host.pk
