"""Hosts: what stands there, who may see it, what each form takes and refuses, and that no secret is shown again."""

from __future__ import annotations

import base64
import html as html_module
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import User
from experiments import credentials
from experiments.models import Experiment, Host, HostKeyPin, HostTask, ModelRun
from experiments.transport import HostProblem
from experiments.transport.client import call
from experiments.transport.keeper import Keeper
from tests.experiments.factories import make_experiment, make_user
from tests.experiments.test_profile import inline_parts, marks
from tests.live import eventually
from tests.sshd import AS_ROOT, Sshd

pytestmark = pytest.mark.django_db

PASSWORD = "correct horse"
GPUS = [
    {
        "index": 0,
        "uuid": "GPU-0000",
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 85_520_809_984,
        "memory_used_bytes": 21_380_202_496,
        "use": 0.42,
        "temperature": 61,
        "power": 402.5,
        "power_limit": 700.0,
        "processes": [4242],
    },
    {"index": 1, "uuid": "GPU-1111", "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_520_809_984},
]
FACTS = {
    "hostname": "gpu1",
    "system": "Linux 6.1",
    "machine": "x86_64",
    "cpu": "Xeon",
    "cores": 16,
    "memory_bytes": 128_000_000_000,
    "disk_free_bytes": 64_000_000_000,
    "disk_total_bytes": 640_000_000_000,
    "python": "3.12.3",
    "torch": {"version": "2.13.0", "cuda": "13.0", "cuda_available": True},
    "transformers": "5.24.0",
    "driver": "580.65",
    "lingers": True,
    "linger_remedy": "",
    "gpus": GPUS,
}


def a_key() -> str:
    """A host key's line."""
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def a_private_key(passphrase: str = "") -> str:
    lock = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, lock).decode()


def make_host(owner: User | None, name: str = "gpu1", **fields: Any) -> Host:
    """A machine that is confirmed, has a key, was looked at, and is ready."""
    pem, public = credentials.new_pair(f"kangaroo:{name}")
    values: dict[str, Any] = {
        "kind": Host.Kind.SSH,
        "address": "gpu1.example.org",
        "username": "ada",
        "credential": Host.Credential.GENERATED,
        "public_key": public,
        "private_key": pem,
        "credential_changed": timezone.now(),
        "host_key": a_key(),
        "env_python": "/home/ada/kangaroo/env/bin/python",
        "facts": FACTS,
        "readings": {"gpus": GPUS, "disk_free_bytes": 60_000_000_000},
        "readings_at": timezone.now(),
        "probed_at": timezone.now(),
        "last_seen": timezone.now(),
    }
    return Host.objects.create(owner=owner, name=name, **(values | fields))


def sign_in(client: Client, email: str = "ada@example.org") -> None:
    """By the page, as a person does: that is what counts as a recent sign-in."""
    answer = client.post(reverse("account_login"), {"login": email, "password": PASSWORD})
    assert answer.status_code == 302, answer.content.decode()


def a_while_passes(client: Client, seconds: float = 3600) -> None:
    session = client.session
    for record in session["account_authentication_methods"]:
        record["at"] -= seconds
    session.save()


@pytest.fixture
def ada(client: Client) -> User:
    user = make_user()
    sign_in(client)
    return user


@pytest.fixture
def eve() -> User:
    return make_user("eve@example.org")


def page(answer: Any) -> str:
    return str(answer.content.decode())


def said(client: Client, address: str) -> str:
    """The text of a page, its entities resolved, as far as tests want them."""
    return page(client.get(address)).replace("&#x27;", "'").replace("&quot;", '"').replace("&amp;", "&")


ADDRESSES = {
    "host": "get",
    "host_edit": "get",
    "host_confirm": "get",
    "host_credential": "get",
    "host_delete": "get",
    "host_look": "post",
    "host_set_up": "post",
    "host_offer": "post",
}


def each_address(host: Host) -> Iterator[tuple[str, str]]:
    for name, method in ADDRESSES.items():
        yield method, reverse(name, args=[host.pk])
        if name in ("host_edit", "host_confirm", "host_credential", "host_delete"):
            yield "post", reverse(name, args=[host.pk])
    task = HostTask.objects.create(host=host, kind="probe", state="succeeded")
    yield "post", reverse("host_task_cancel", args=[host.pk, task.pk])


# Who may see what -----------------------------------------------------------------------------------------------------


def test_another_user_gets_404_on_each_address(client: Client, ada: User, eve: User) -> None:
    theirs = make_host(eve)
    for method, address in each_address(theirs):
        assert getattr(client, method)(address).status_code == 404, address
    theirs.refresh_from_db()
    assert theirs.retired_at is None
    assert "gpu1" not in page(client.get(reverse("hosts")))


def test_an_administrator_sees_other_peoples_machines_in_the_admin_alone(client: Client, eve: User) -> None:
    make_user("root@example.org", is_staff=True, is_superuser=True)
    sign_in(client, "root@example.org")
    for method, address in each_address(make_host(eve)):
        assert getattr(client, method)(address).status_code == 404, address


def test_a_guest_gets_404_on_each_address(client: Client, eve: User) -> None:
    guest = User.objects.create_guest()
    client.force_login(guest)
    of_all = make_host(eve, offered=True)
    for method, address in [("get", reverse("hosts")), ("get", reverse("host_add")), *each_address(of_all)]:
        assert getattr(client, method)(address).status_code == 404, address
    assert 'href="/hosts/"' not in page(client.get("/"))


def test_a_stranger_is_asked_to_sign_in_whether_there_is_a_machine_or_not(client: Client, eve: User) -> None:
    host = make_host(eve, offered=True)
    for method, address in each_address(host):
        answer = getattr(client, method)(address)
        assert answer.status_code == 302, address
        assert answer["Location"].startswith(reverse("account_login"))
        nowhere = re.sub(r"^/hosts/\d+/", "/hosts/999999/", address)
        assert getattr(client, method)(nowhere).status_code == 302
    assert client.get(reverse("host", args=[host.pk]), headers={"HX-Request": "true"}).status_code == 404


def test_a_machine_offered_to_all_shows_neither_credential_nor_address(client: Client, ada: User, eve: User) -> None:
    host = make_host(eve, username="tinker", offered=True, problem="unusable", problem_text="/scratch is full")
    HostTask.objects.create(host=host, kind="set_up", steps=[{"key": "x", "title": "secret step"}], log="secret log")
    shown = page(client.get(reverse("hosts"))) + page(client.get(reverse("host", args=[host.pk])))
    assert "H100" in shown
    blob = host.public_key.split()[1]
    for hidden in ("gpu1.example.org", "tinker", blob, "authorized_keys", "scratch", "secret", "Edit", "Delete"):
        assert hidden not in shown, hidden
    for method, address in each_address(host):
        if address != reverse("host", args=[host.pk]):
            assert getattr(client, method)(address).status_code == 404, address


def test_a_retired_machine_is_gone(client: Client, ada: User) -> None:
    host = make_host(ada, retired_at=timezone.now())
    for method, address in each_address(host):
        assert getattr(client, method)(address).status_code == 404, address
    assert "gpu1" not in page(client.get(reverse("hosts")))


def test_an_administrator_offers_a_machine_and_takes_it_back(client: Client, ada: User, eve: User) -> None:
    host = make_host(ada)
    address = reverse("host_offer", args=[host.pk])
    assert client.post(address, {"offered": "1"}).status_code == 404
    User.objects.filter(pk=ada.pk).update(is_staff=True)
    client.post(address, {"offered": "1"})
    assert Host.objects.visible_to(eve).filter(pk=host.pk).exists()
    client.post(address)
    assert not Host.objects.visible_to(eve).filter(pk=host.pk).exists()


def test_an_owner_takes_back_what_an_administrator_has_offered(client: Client, ada: User, eve: User) -> None:
    host = make_host(ada, offered=True)
    assert "Offer it no longer" in page(client.get(reverse("host", args=[host.pk])))
    client.post(reverse("host_offer", args=[host.pk]))
    assert not Host.objects.visible_to(eve).filter(pk=host.pk).exists()


# A recent sign-in -----------------------------------------------------------------------------------------------------


def test_what_uses_a_credential_asks_for_a_recent_sign_in(client: Client, ada: User) -> None:
    host = make_host(ada)
    a_while_passes(client)
    for method, address in each_address(host):
        if "cancel" in address or address == reverse("host", args=[host.pk]):
            continue
        answer = getattr(client, method)(address)
        assert answer.status_code == 302, address
        assert answer["Location"].startswith(reverse("account_reauthenticate")), address
    assert client.get(reverse("host_add"))["Location"].startswith(reverse("account_reauthenticate"))
    assert not HostTask.objects.exclude(state="succeeded").exists()
    # Looking on needs none.
    assert client.get(reverse("hosts")).status_code == 200
    assert client.get(reverse("host", args=[host.pk])).status_code == 200


def test_a_filled_form_survives_the_question_for_the_password(client: Client, ada: User) -> None:
    client.get(reverse("host_add"))
    a_while_passes(client)
    asked = client.post(reverse("host_add"), {"name": "gpu7", "address": "192.0.2.7", "username": "ada"})
    assert not Host.objects.filter(name="gpu7").exists()
    client.post(asked["Location"], {"password": PASSWORD, "next": reverse("host_add")})
    assert Host.objects.get(name="gpu7").address == "192.0.2.7"


@pytest.mark.parametrize("way", ["password", "own"])
def test_a_secret_is_never_put_into_the_session(client: Client, ada: User, way: str) -> None:
    host = make_host(ada)
    a_while_passes(client)
    given = {"way": way, "password": "hunter2hunter2", "passphrase": "hunter2hunter2", "private_key": "hunter2hunter2"}
    answer = client.post(reverse("host_credential", args=[host.pk]), given)
    assert answer["Location"].startswith(reverse("account_reauthenticate"))
    assert "hunter2" not in str(dict(client.session))
    assert base64.b64encode(b"hunter2")[:8].decode() not in str(dict(client.session))
    client.post(answer["Location"], {"password": PASSWORD, "next": reverse("host_credential", args=[host.pk])})
    assert "not kept" in page(client.get(reverse("host_credential", args=[host.pk])))


# The list -------------------------------------------------------------------------------------------------------------


def test_an_empty_list_says_what_hosts_are_and_has_one_button(client: Client, ada: User) -> None:
    html = page(client.get(reverse("hosts")))
    assert html.count("btn btn-primary") == 1
    assert "Machines with GPUs" in html
    assert 'href="/hosts/" aria-current="page"' in html


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "ready"),
        ({"host_key": ""}, "not confirmed"),
        ({"credential": ""}, "no credential"),
        ({"env_python": ""}, "not set up"),
        ({"problem": "key_changed"}, "its host key has changed"),
        ({"problem": "login_refused", "problem_text": "It says no."}, "refused the login"),
        ({"problem": "no_python"}, "no Python found"),
        ({"problem": "address_refused"}, "address refused"),
        ({"problem": "unusable"}, "cannot be used"),
        ({"problem": "unreachable"}, "unreachable"),
    ],
)
def test_a_state_is_a_word_in_a_badge(client: Client, ada: User, fields: dict[str, str], word: str) -> None:
    host = make_host(ada, **fields)
    for address in (reverse("hosts"), reverse("host", args=[host.pk])):
        html = page(client.get(address))
        assert re.search(rf'<span class="state state-\w+"><span>{word}', html), address
        if "problem_text" in fields:
            assert fields["problem_text"] in html


def test_an_unreachable_machine_says_since_when_and_that_it_is_tried(client: Client, ada: User) -> None:
    make_host(ada, unreachable_since=timezone.now(), problem="unreachable")
    html = page(client.get(reverse("hosts")))
    assert re.search(r"unreachable since <time data-of-day datetime=\"20[^\"]+\">[^<]+</time>, still trying", html)


def test_a_machine_whose_torch_sees_no_gpu_says_so_beside_ready(client: Client, ada: User) -> None:
    host = make_host(ada, facts=FACTS | {"torch": {"version": "2.13.0+cpu", "cuda_available": False}})
    assert "on its cores: its torch does not see the GPUs" in said(client, reverse("host", args=[host.pk]))
    Host.objects.filter(pk=host.pk).update(facts=FACTS)
    assert "does not see the GPUs" not in said(client, reverse("host", args=[host.pk]))


def test_a_machine_without_torch_can_be_set_up_or_told_which_python_has_it(client: Client, ada: User) -> None:
    host = make_host(ada, env_python="")
    html = page(client.get(reverse("host", args=[host.pk])))
    assert "Set up this host" in html
    assert 'href="#id_python"' in html
    assert 'id="id_python"' in html


def test_a_machine_never_confirmed_is_not_said_to_keep_anything(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="")
    address = reverse("host_delete", args=[host.pk])
    assert "left nothing" in said(client, address)
    assert "What stays" not in said(client, address)
    HostKeyPin.objects.create(host=host, key=a_key(), by=ada)  # so it was, at an address that it had before
    assert "What stays" in said(client, address)


def test_gpus_have_bars_and_their_age(client: Client, ada: User) -> None:
    make_host(ada)
    html = page(client.get(reverse("hosts")))
    assert 'value="0.420"' in html
    assert 'value="0.250"' in html
    assert "21.4\N{NO-BREAK SPACE}GB of 85.5\N{NO-BREAK SPACE}GB" in html
    assert re.search(r"Read <time", html)


def test_a_machine_without_gpu_says_so_plainly(client: Client, ada: User) -> None:
    make_host(ada, facts=FACTS | {"gpus": []}, readings=None)
    assert "No GPU" in page(client.get(reverse("hosts")))


def test_what_a_machine_says_is_escaped_and_cut(client: Client, ada: User) -> None:
    evil = "<script>alert(1)</script>\x1b[31m" + "x" * 5000
    host = make_host(
        ada,
        facts={"gpus": [{"name": evil, "use": "no number"}, "nonsense"], "hostname": evil, "torch": 7, "cores": [1]},
        readings={"gpus": [{"name": evil, "memory_bytes": float(10**40), "use": 7}], "disk_free_bytes": "plenty"},
        problem="unusable",
        problem_text=evil[:500],
    )
    steps = [{"key": evil, "title": evil, "state": evil, "text": evil, "remedy": evil}, "nonsense"]
    HostTask.objects.create(host=host, kind="set_up", state="failed", steps=steps, log=evil * 10)
    for address in (reverse("hosts"), reverse("host", args=[host.pk])):
        html = page(client.get(address))
        assert "<script>alert" not in html
        assert "\x1b" not in html.replace(re.search(r'<pre class="log".*?</pre>|$', html, re.DOTALL)[0], "")  # type: ignore[index]
        assert len(html) < 60_000
        assert inline_parts(html) == []


def test_runs_are_counted_for_all_and_listed_for_who_may_see_them(client: Client, ada: User, eve: User) -> None:
    host = make_host(ada, offered=True)
    mine = make_experiment(ada, name="Of Ada", states={"small": "running"}, state="queued", until=0.5, points=0)
    theirs = make_experiment(eve, name="Of Eve", state="queued", points=0)
    ModelRun.objects.filter(experiment__in=[mine, theirs]).update(host=host)
    ModelRun.objects.filter(experiment=mine, name="small").update(gpus=["GPU-0000"])
    assert "1 training, 5 waiting" in page(client.get(reverse("hosts")))
    html = page(client.get(reverse("host", args=[host.pk])))
    assert "Of Ada: small" in html
    assert "Of Eve" not in html
    assert "3 runs of other people wait or train there" in html


def test_a_poll_without_news_swaps_nothing_and_ends_when_nothing_goes_on(client: Client, ada: User) -> None:
    host = make_host(ada)
    for address in (reverse("hosts"), reverse("host", args=[host.pk])):
        html = page(client.get(address))
        assert "data-poll" not in html
        answer = client.get(address, {"seen": marks(html)}, headers={"HX-Request": "true"})
        assert answer.status_code == 204
        assert answer["HX-Trigger"] == "kangaroo:settled"


def test_a_poll_brings_the_steps_of_a_look_as_they_come(client: Client, ada: User) -> None:
    host = make_host(ada)
    address = reverse("host", args=[host.pk])
    steps = [{"key": "reach", "title": "It can be reached", "state": "running", "text": "", "remedy": ""}]
    task = HostTask.objects.create(host=host, kind="probe", state="running", steps=steps, started_at=timezone.now())
    html = page(client.get(address))
    assert "data-poll" in html
    steps[0] |= {"state": "failed", "text": "Nobody answers.", "remedy": "Turn it on."}
    HostTask.objects.filter(pk=task.pk).update(steps=steps)
    answer = client.get(address, {"seen": marks(html)}, headers={"HX-Request": "true"})
    assert 'id="section-task"' in page(answer)
    assert 'id="section-facts"' not in page(answer)
    assert "Turn it on." in page(answer)
    assert "HX-Trigger" not in answer


def test_the_number_of_queries_does_not_grow_with_machines(
    client: Client, ada: User, django_assert_max_num_queries: Any
) -> None:
    for i in range(12):
        make_host(ada, name=f"gpu{i}")
    with django_assert_max_num_queries(7):
        client.get(reverse("hosts"))


# Where it is ----------------------------------------------------------------------------------------------------------

FILLED = {"name": "gpu2", "address": "gpu2.example.org", "port": "2222", "username": "ada"}


def test_adding_makes_a_key_and_goes_on_to_the_host_key(client: Client, ada: User) -> None:
    answer = client.post(reverse("host_add"), FILLED)
    host = Host.objects.get(name="gpu2")
    assert answer["Location"] == reverse("host_confirm", args=[host.pk])
    assert (host.kind, host.owner, host.port, host.folder) == ("ssh", ada, 2222, "kangaroo")
    assert host.credential == Host.Credential.GENERATED
    assert credentials.read_private_key(host.private_key.reveal(host), "")[1].split()[1] == host.public_key.split()[1]
    # No collector runs here, and the page says that and how to go on.
    html = said(client, reverse("host_confirm", args=[host.pk]))
    assert "collector is not running" in html
    assert "Ask again" in html


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("name", "", "Name: give it one"),
        ("name", "gpu1", "you have a machine of this name already"),
        ("name", "a\x07b", "one line of printable characters"),
        ("address", "", "Address: say where the machine is"),
        ("address", "ada@gpu2", "the user has a field of its own"),
        ("address", "ssh gpu2", "without the ssh command"),
        ("address", "https://gpu2", "not a web address"),
        ("address", "gpu2:22", "the port has a field of its own"),
        ("address", "-oProxyCommand=x", "must be a name such as"),
        ("address", "gpu2;reboot", "must be a name such as"),
        ("port", "70000", "Port: must be a whole number from 1 to 65535."),
        ("port", "ssh", "Port: must be a whole number"),
        ("username", "", "User: say who you are"),
        ("username", "-l root", "as `whoami` prints it"),
        ("folder", "/", "must be a folder of its own"),
        ("folder", "~", "must be a folder of its own"),
        ("folder", "../else", "must be a folder of its own"),
        ("python", "rm -rf", "must be a path such as"),
        ("before", "echo \x1b[2J", "cannot be typed in a shell"),
        ("price_per_hour", "cheap", "must be a number"),
        ("price_per_hour", "-1", "must not be below 0"),
        ("slots", "0", "a GPU: must be a whole number from 1 to 64."),
        ("runs_per_gpu", "99", "Runs a GPU: must be a whole number from 1 to 16."),
        ("gpu_choice", "all of them", "must be their numbers"),
        ("jump", "999999", "one of your confirmed machines"),
    ],
)
def test_each_error_stands_beside_its_field_and_nothing_is_lost(
    client: Client, ada: User, field: str, value: str, error: str
) -> None:
    make_host(ada)
    given = {**FILLED, "price_per_hour": "1.25", "folder": "/scratch/ada/kangaroo", "before": "module load cuda"}
    answer = client.post(reverse("host_add"), given | {field: value})
    assert answer.status_code == 422
    html = page(answer).replace("&#x27;", "'").replace("&quot;", '"')
    beside = re.search(rf'id="id_{field}_error">(.*?)</div>', html, re.DOTALL)
    assert beside is not None
    assert error in beside[1]
    assert re.search(rf'name="{field}"[^>]*aria-describedby="[^"]*id_{field}_error', html)
    for name, kept in (given | {field: value}).items():
        if name != field and name not in ("before", "jump"):
            assert f'value="{kept}"' in html, name
    if field != "before":
        assert "module load cuda" in html
    assert not Host.objects.filter(name="gpu2").exists()


def test_a_jump_host_is_one_of_ones_own_that_is_confirmed(client: Client, ada: User, eve: User) -> None:
    jump = make_host(ada, name="gate")
    make_host(ada, name="unconfirmed", host_key="")
    foreign = make_host(eve, name="foreign", offered=True)
    html = page(client.get(reverse("host_add")))
    assert ">gate<" in html
    assert ">unconfirmed<" not in html
    assert ">foreign<" not in html
    assert client.post(reverse("host_add"), FILLED | {"jump": foreign.pk}).status_code == 422
    client.post(reverse("host_add"), FILLED | {"jump": jump.pk})
    jump.refresh_from_db()
    assert jump.forwards
    assert Host.objects.get(name="gpu2").jump == jump
    assert "restrict,port-forwarding" in page(client.get(reverse("host_credential", args=[jump.pk])))


def test_another_address_must_be_confirmed_again(client: Client, ada: User) -> None:
    host = make_host(ada, unreachable_since=timezone.now(), problem="unreachable")
    edited = {"name": "gpu1", "address": "gpu1b.example.org", "port": "22", "username": "ada", "folder": "kangaroo"}
    assert "must be confirmed again" in page(client.get(reverse("host_edit", args=[host.pk])))
    answer = client.post(reverse("host_edit", args=[host.pk]), edited)
    assert answer["Location"] == reverse("host_confirm", args=[host.pk])
    host.refresh_from_db()
    assert (host.host_key, host.unreachable_since, host.problem, host.readings) == ("", None, "", None)
    assert host.private_key


def test_another_name_keeps_the_host_key(client: Client, ada: User) -> None:
    host = make_host(ada)
    given = {"name": "rack", "address": "gpu1.example.org", "port": "22", "username": "ada", "folder": "kangaroo"}
    client.post(reverse("host_edit", args=[host.pk]), given)
    host.refresh_from_db()
    assert host.name == "rack"
    assert host.host_key
    assert not HostTask.objects.exists()


def test_another_python_is_looked_at_before_it_trains(client: Client, ada: User) -> None:
    host = make_host(ada)
    given = {"name": "gpu1", "address": host.address, "port": "22", "username": "ada", "python": "/opt/py/bin/python3"}
    client.post(reverse("host_edit", args=[host.pk]), given)
    host.refresh_from_db()
    assert (host.python, host.env_python) == ("/opt/py/bin/python3", "")
    assert HostTask.objects.get().kind == HostTask.Kind.PROBE


def test_the_folder_stays_while_runs_are_in_it(client: Client, ada: User) -> None:
    host = make_host(ada)
    experiment = make_experiment(ada, state="running", until=0.1, points=0)
    ModelRun.objects.filter(experiment=experiment).update(host=host)
    given = {"name": "gpu1", "address": host.address, "port": "22", "username": "ada", "folder": "elsewhere"}
    answer = client.post(reverse("host_edit", args=[host.pk]), given)
    assert "runs are active in it" in page(answer)


# Is it the right machine ----------------------------------------------------------------------------------------------


def test_the_fingerprint_stands_beside_the_command_that_prints_it(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="", seen_key=a_key())
    html = said(client, reverse("host_confirm", args=[host.pk]))
    assert f">{credentials.fingerprint(host.seen_key)}<" in html
    assert credentials.fingerprint_command(host.seen_key) in html
    assert re.search(r"MD5(:[0-9a-f]{2}){16}", html)
    assert "Yes, it is the same" in html


def test_confirming_pins_the_key_that_was_shown_and_records_it(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="", seen_key=a_key(), probed_at=None)
    shown = credentials.fingerprint(host.seen_key)
    answer = client.post(reverse("host_confirm", args=[host.pk]), {"fingerprint": shown})
    assert answer["Location"] == reverse("host_credential", args=[host.pk])
    pin = HostKeyPin.objects.get()
    assert (pin.host, pin.key, pin.previous, pin.by) == (host, host.seen_key, "", ada)
    seen = host.seen_key
    host.refresh_from_db()
    assert (host.host_key, host.seen_key) == (seen, "")


def test_a_fingerprint_that_was_not_shown_last_is_refused(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="", seen_key=a_key())
    for given in ({"fingerprint": credentials.fingerprint(a_key())}, {"fingerprint": ""}, {}):
        answer = client.post(reverse("host_confirm", args=[host.pk]), given)
        assert answer.status_code == 422
    host.refresh_from_db()
    assert host.host_key == ""
    assert not HostKeyPin.objects.exists()


def test_nothing_is_pinned_before_the_machine_was_seen(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="")
    assert client.post(reverse("host_confirm", args=[host.pk]), {"fingerprint": ""}).status_code == 422
    host.refresh_from_db()
    assert host.host_key == ""


def test_a_changed_key_is_shown_with_the_old_one_and_trusted_only_on_purpose(client: Client, ada: User) -> None:
    host = make_host(ada, seen_key=a_key(), problem="key_changed", problem_text="It changed.")
    HostKeyPin.objects.create(host=host, key=host.host_key, by=ada)
    address = reverse("host_confirm", args=[host.pk])
    old, new = credentials.fingerprint(host.host_key), credentials.fingerprint(host.seen_key)
    assert address in page(client.get(reverse("host", args=[host.pk])))
    for place in (reverse("host", args=[host.pk]), address):
        html = said(client, place)
        assert old in html
        assert new in html
    for typed in ("", new[-3:], "zzzz", old[-4:]):
        answer = client.post(address, {"fingerprint": new, "typed": typed})
        assert answer.status_code == 422
        assert "must be the last 4 characters" in page(answer)
    host.refresh_from_db()
    assert credentials.fingerprint(host.host_key) == old

    client.post(address, {"fingerprint": new, "typed": new[-4:]})
    host.refresh_from_db()
    assert credentials.fingerprint(host.host_key) == new
    assert host.problem == ""
    pin = HostKeyPin.objects.first()
    assert pin is not None
    assert (credentials.fingerprint(pin.key), credentials.fingerprint(pin.previous), pin.by) == (new, old, ada)
    assert HostTask.objects.get().kind == HostTask.Kind.PROBE
    history = page(client.get(reverse("host", args=[host.pk])))
    assert old in history
    assert "in place of another" in history


def test_another_machine_at_another_address_is_known_by_nothing(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="", seen_key=a_key())
    HostKeyPin.objects.create(host=host, key=a_key(), by=ada)
    client.post(reverse("host_confirm", args=[host.pk]), {"fingerprint": credentials.fingerprint(host.seen_key)})
    host.refresh_from_db()
    assert (host.env_python, host.facts, host.probed_at) == ("", None, None)


def test_the_same_machine_at_another_address_is_known_again(client: Client, ada: User) -> None:
    key = a_key()
    host = make_host(ada, host_key="", seen_key=key)
    HostKeyPin.objects.create(host=host, key=key, by=ada)
    client.post(reverse("host_confirm", args=[host.pk]), {"fingerprint": credentials.fingerprint(key)})
    host.refresh_from_db()
    assert host.is_ready


# The way in -----------------------------------------------------------------------------------------------------------


def test_the_line_and_the_command_can_be_copied(client: Client, ada: User) -> None:
    host = make_host(ada)
    html = said(client, reverse("host_credential", args=[host.pk]))
    assert f">{credentials.authorized_line(host)}<" in html
    assert credentials.install_command(host).replace(">>", "&gt;&gt;") in html.replace("&", "&").replace(
        "&gt;&gt;", "&gt;&gt;"
    )
    assert html.count("data-copy=") == 2


def test_there_is_no_way_in_before_the_key_is_confirmed(client: Client, ada: User) -> None:
    host = make_host(ada, host_key="")
    address = reverse("host_credential", args=[host.pk])
    for answer in (client.get(address), client.post(address, {"way": "password", "password": "hunter2hunter2"})):
        assert answer["Location"] == reverse("host_confirm", args=[host.pk])
    assert not HostTask.objects.exists()


def test_the_line_being_there_begins_a_look(client: Client, ada: User) -> None:
    host = make_host(ada)
    answer = client.post(reverse("host_credential", args=[host.pk]), {"way": "line"})
    assert answer["Location"] == reverse("host", args=[host.pk])
    task = HostTask.objects.get()
    assert (task.kind, task.state, task.asked_by) == ("probe", "wanted", ada)


def test_a_private_key_is_kept_encrypted_and_never_shown(client: Client, ada: User) -> None:
    host = make_host(ada, problem="login_refused", problem_text="It refused the old key.")
    key = a_private_key("open sesame")
    answer = client.post(
        reverse("host_credential", args=[host.pk]), {"way": "own", "private_key": key, "passphrase": "open sesame"}
    )
    assert answer["Location"] == reverse("host", args=[host.pk])
    host.refresh_from_db()
    assert host.credential == Host.Credential.OWN
    assert host.private_key.reveal(host).split() == key.split()
    assert host.passphrase.reveal(host) == "open sesame"
    assert host.problem == ""
    for address in (reverse("host", args=[host.pk]), reverse("host_credential", args=[host.pk])):
        html = page(client.get(address))
        assert "sesame" not in html
        assert key.splitlines()[1] not in html


def test_a_private_key_can_come_as_a_file(client: Client, ada: User) -> None:
    host = make_host(ada)
    key = a_private_key()
    file = SimpleUploadedFile("id_ed25519", key.encode())
    client.post(reverse("host_credential", args=[host.pk]), {"way": "own", "file": file})
    host.refresh_from_db()
    assert host.private_key.reveal(host).split() == key.split()


@pytest.mark.parametrize(
    ("given", "field", "error"),
    [
        ({}, "private_key", "paste it, or choose its file"),
        ({"private_key": "hunter2 is no key", "passphrase": "hunter2pass"}, "private_key", "Private key"),
        ({"private_key": "locked", "passphrase": ""}, "passphrase", "Passphrase"),
        ({"private_key": "locked", "passphrase": "hunter2pass"}, "passphrase", "Passphrase"),
        ({"file": "hunter2 is no key" * 3000}, "file", "too long to be a private key"),
        ({"file": "hunter2 is no key"}, "private_key", "Private key"),
    ],
)
def test_a_key_that_cannot_be_read_says_why_and_is_not_shown_again(
    client: Client, ada: User, given: dict[str, str], field: str, error: str
) -> None:
    host = make_host(ada)
    public = host.public_key
    data: dict[str, Any] = dict(given)
    if data.get("private_key") == "locked":
        data["private_key"] = a_private_key("open sesame")
    if "file" in data:
        data["file"] = SimpleUploadedFile("key", data["file"].encode())
    answer = client.post(reverse("host_credential", args=[host.pk]), data | {"way": "own"})
    assert answer.status_code == 422
    html = page(answer)
    beside = re.search(rf'id="id_{field}_error">(.*?)</div>', html, re.DOTALL)
    assert beside is not None
    assert error in beside[1]
    assert "hunter2" not in html
    assert "BEGIN OPENSSH PRIVATE KEY-----\n" not in html
    assert '<details id="own-key" open>' in html
    host.refresh_from_db()
    assert host.public_key == public


def test_a_password_is_never_shown_again(client: Client, ada: User) -> None:
    host = make_host(ada)
    # No collector runs here, so the login cannot be.
    answer = client.post(reverse("host_credential", args=[host.pk]), {"way": "password", "password": "hunter2hunter2"})
    assert answer.status_code == 422
    html = page(answer)
    assert "collector is not running" in html
    assert "hunter2" not in html
    assert 'autocomplete="off"' in re.search(r'<input type="password" name="password"[^>]*>', html)[0]  # type: ignore[index]
    assert not HostTask.objects.exists()
    assert client.post(reverse("host_credential", args=[host.pk]), {"way": "password"}).status_code == 422


def test_a_new_key_takes_the_place_of_ones_own(client: Client, ada: User) -> None:
    host = make_host(ada, credential="own", passphrase="open sesame")
    assert "data-copy" not in page(client.get(reverse("host_credential", args=[host.pk])))
    client.post(reverse("host_credential", args=[host.pk]), {"way": "new"})
    before = host.public_key
    host.refresh_from_db()
    assert host.credential == Host.Credential.GENERATED
    assert host.public_key != before
    assert not host.passphrase


# What is done with it -------------------------------------------------------------------------------------------------


def test_one_thing_is_done_at_a_time(client: Client, ada: User) -> None:
    host = make_host(ada)
    client.post(reverse("host_look", args=[host.pk]))
    answer = client.post(reverse("host_set_up", args=[host.pk]), follow=True)
    assert "being done there already" in page(answer)
    assert HostTask.objects.get().kind == HostTask.Kind.PROBE


@pytest.mark.parametrize("fields", [{"host_key": ""}, {"credential": ""}])
def test_nothing_is_done_on_a_machine_that_is_not_confirmed(client: Client, ada: User, fields: dict[str, str]) -> None:
    host = make_host(ada, **fields)
    for name in ("host_look", "host_set_up"):
        client.post(reverse(name, args=[host.pk]))
    assert not HostTask.objects.exists()


def test_an_existing_environment_is_looked_at_first(client: Client, ada: User) -> None:
    host = make_host(ada)
    address = reverse("host_set_up", args=[host.pk])
    for wrong in ("", "python3", "~other/bin/python"):
        assert client.post(address, {"python": wrong}).status_code == 422
    client.post(address, {"python": "~/miniconda3/envs/train/bin/python"})
    host.refresh_from_db()
    assert (host.python, host.env_python) == ("~/miniconda3/envs/train/bin/python", "")
    assert HostTask.objects.get().kind == HostTask.Kind.PROBE


def test_a_set_up_shows_its_log(client: Client, ada: User) -> None:
    host = make_host(ada)
    log = "\n".join(f"line {i}" for i in range(5000)) + "\nCollecting torch 10%\rCollecting torch 100%\n"
    HostTask.objects.create(host=host, kind="set_up", state="running", log=log, started_at=timezone.now())
    html = page(client.get(reverse("host", args=[host.pk])))
    assert "Collecting torch 100%" in html
    assert "torch 10%" not in html
    assert "line 1\n" not in html


def test_a_task_can_be_cancelled(client: Client, ada: User) -> None:
    host = make_host(ada)
    wanted = HostTask.objects.create(host=host, kind="probe")
    client.post(reverse("host_task_cancel", args=[host.pk, wanted.pk]))
    wanted.refresh_from_db()
    assert wanted.state == HostTask.State.CANCELLED
    running = HostTask.objects.create(host=host, kind="set_up", state="running")
    client.post(reverse("host_task_cancel", args=[host.pk, running.pk]))
    running.refresh_from_db()
    assert (running.state, running.cancel_requested) == ("running", True)
    other = make_host(ada, name="other")
    assert client.post(reverse("host_task_cancel", args=[other.pk, running.pk])).status_code == 404


def test_machines_are_not_asked_without_end(client: Client, ada: User, settings: Any) -> None:
    settings.ACCOUNT_RATE_LIMITS = settings.ACCOUNT_RATE_LIMITS | {"host": "2/m/user"}
    host = make_host(ada, host_key="")
    for _ in range(2):
        answer = client.post(reverse("host_confirm", args=[host.pk]), {"scan": "1"}, follow=True)
        assert "collector is not running" in said_by(answer)
    answer = client.post(reverse("host_confirm", args=[host.pk]), {"scan": "1"}, follow=True)
    assert "asked too often" in said_by(answer)
    host.host_key = a_key()
    host.save()
    answer = client.post(reverse("host_look", args=[host.pk]), follow=True)
    assert "asked too often" in said_by(answer)
    assert not HostTask.objects.exists()


def said_by(answer: Any) -> str:
    return page(answer).replace("&#x27;", "'")


# Letting go -----------------------------------------------------------------------------------------------------------


def trained_there(host: Host, owner: User, **fields: Any) -> Experiment:
    experiment = make_experiment(owner, points=0, **fields)
    ModelRun.objects.filter(experiment=experiment).update(host=host)
    return experiment


def test_a_machine_that_nothing_was_trained_on_is_deleted(client: Client, ada: User) -> None:
    host = make_host(ada)
    html = said(client, reverse("host_delete", args=[host.pk]))
    assert credentials.revoke_command(host) in html
    assert "kangaroo</code>" in html
    assert 'name="name"' not in html
    client.post(reverse("host_delete", args=[host.pk]))
    assert not Host.objects.filter(pk=host.pk).exists()


def test_a_machine_that_was_used_is_retired_once_its_name_is_typed(client: Client, ada: User) -> None:
    host = make_host(ada, passphrase="open sesame", offered=True)
    experiment = trained_there(host, ada)
    address = reverse("host_delete", args=[host.pk])
    for typed in ("", "gpu2"):
        assert client.post(address, {"name": typed}).status_code == 422
    client.post(address, {"name": "gpu1"})
    host.refresh_from_db()
    assert host.retired_at is not None
    assert not host.private_key
    assert not host.passphrase
    assert not host.offered
    assert client.get(experiment.get_absolute_url()).status_code == 200
    # The name is free again.
    assert client.post(reverse("host_add"), FILLED | {"name": "gpu1"}).status_code == 302


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_machine_with_runs_is_not_deleted(client: Client, ada: User, state: str) -> None:
    host = make_host(ada)
    trained_there(host, ada, state=state, until=0.5)
    address = reverse("host_delete", args=[host.pk])
    assert "3 runs are waiting or training on gpu1" in page(client.get(address))
    assert client.post(address, {"name": "gpu1"}).status_code == 422
    host.refresh_from_db()
    assert host.retired_at is None
    assert host.private_key


def test_a_machine_that_others_are_reached_through_is_not_deleted(client: Client, ada: User) -> None:
    gate = make_host(ada, name="gate")
    make_host(ada, name="inner", jump=gate)
    answer = client.post(reverse("host_delete", args=[gate.pk]))
    assert "inner is reached through gate" in page(answer)
    assert Host.objects.filter(pk=gate.pk).exists()


def test_a_machine_that_is_being_set_up_is_not_deleted(client: Client, ada: User) -> None:
    host = make_host(ada)
    HostTask.objects.create(host=host, kind="set_up", state="running")
    assert "Cancel that first" in page(client.post(reverse("host_delete", args=[host.pk])))
    assert Host.objects.filter(pk=host.pk).exists()


# The page as such -----------------------------------------------------------------------------------------------------


def test_nothing_on_the_pages_needs_the_policy_loosened_and_no_page_holds_a_secret(client: Client, ada: User) -> None:
    host = make_host(ada, seen_key=a_key(), problem="key_changed")
    secret = "".join(host.private_key.reveal(host).splitlines()[1:-1])
    places = [reverse("hosts"), reverse("host_add")]
    places += [address for method, address in each_address(host) if method == "get"]
    for address in places:
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert inline_parts(page(answer)) == [], address
        assert secret[40:100] not in page(answer)
        assert page(answer).count("<h1") == 1


def test_a_recent_sign_in_is_recent_for_as_long_as_is_asked(client: Client, ada: User) -> None:
    records = client.session["account_authentication_methods"]
    assert time.time() - records[-1]["at"] < 60
    a_while_passes(client, seconds=200)
    assert client.get(reverse("host_add")).status_code == 200
    a_while_passes(client, seconds=200)
    assert client.get(reverse("host_add")).status_code == 302


# With a real SSH server and a real keeper -----------------------------------------------------------------------------


def seen_and_confirmed(client: Client, host: Host) -> Host:
    """As a person does it: the fingerprint that the page shows is sent back."""
    html = page(client.get(reverse("host_confirm", args=[host.pk])))
    shown = re.search(r'name="fingerprint" value="(SHA256:[^"]+)"', html)
    assert shown is not None, html
    client.post(reverse("host_confirm", args=[host.pk]), {"fingerprint": shown[1]})
    host.refresh_from_db()
    return host


@pytest.fixture
def added(sshd: Sshd, keeper: Keeper, client: Client, transactional_db: None) -> Host:
    """A machine added by the page, not confirmed."""
    make_user()
    sign_in(client)
    given = {"name": "gpu9", "address": "127.0.0.1", "port": str(sshd.port), "username": sshd.login.name}
    answer = client.post(reverse("host_add"), given)
    assert answer.status_code == 302, page(answer)
    return Host.objects.get(name="gpu9")


def test_the_fingerprint_shown_is_the_servers(client: Client, sshd: Sshd, added: Host) -> None:
    html = page(client.get(reverse("host_confirm", args=[added.pk])))
    printed = subprocess.run(
        ["ssh-keygen", "-lf", str(sshd.folder / "host_key.pub")], capture_output=True, text=True, check=True
    ).stdout
    md5 = subprocess.run(
        ["ssh-keygen", "-E", "md5", "-lf", str(sshd.folder / "host_key.pub")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split()[1] in html
    assert md5.split()[1] in html
    assert "Accepted" not in sshd.log()
    host = seen_and_confirmed(client, added)
    assert host.host_key == sshd.host_key
    assert "Accepted" not in sshd.log()  # nobody signs in before that


def test_a_server_that_shows_another_key_is_noticed_and_pinned_on_purpose(
    client: Client, sshd: Sshd, added: Host
) -> None:
    host = seen_and_confirmed(client, added)
    old = sshd.host_key
    sshd.new_host_key()
    sshd.start()
    confirm = reverse("host_confirm", args=[host.pk])
    html = page(client.post(confirm, {"scan": "1"}, follow=True))
    old_print, new_print = credentials.fingerprint(old), credentials.fingerprint(sshd.host_key)
    assert old_print in html
    assert new_print in html
    client.post(confirm, {"fingerprint": new_print, "typed": new_print[-6:]})
    host.refresh_from_db()
    assert host.host_key == sshd.host_key
    assert [pin.previous for pin in host.pins.all()] == [old, ""]


def test_a_server_that_shows_the_confirmed_key_again_is_looked_at_again(
    client: Client, sshd: Sshd, added: Host
) -> None:
    host = seen_and_confirmed(client, added)
    Host.objects.filter(pk=host.pk).update(seen_key=a_key(), problem="key_changed")
    answer = client.post(reverse("host_confirm", args=[host.pk]), {"scan": "1"})
    assert answer["Location"] == reverse("host", args=[host.pk])
    host.refresh_from_db()
    assert (host.host_key, host.seen_key) == (sshd.host_key, "")
    assert HostTask.objects.get().kind == HostTask.Kind.PROBE


@pytest.mark.skipif(not AS_ROOT, reason="only root's sshd can check a password")
def test_a_password_installs_the_line_once_and_is_forgotten(client: Client, sshd: Sshd, added: Host) -> None:
    host = seen_and_confirmed(client, added)
    address = reverse("host_credential", args=[host.pk])
    wrong = client.post(address, {"way": "password", "password": "hunter2hunter2"})
    assert wrong.status_code == 422
    assert "hunter2" not in page(wrong)
    assert re.search(r'id="id_password_error"><p>[^<]+</p>', page(wrong))

    for _ in range(2):  # the line is not put there twice
        answer = client.post(address, {"way": "password", "password": sshd.login.password})
        assert answer["Location"] == reverse("host", args=[host.pk])
    lines = (sshd.login.home / ".ssh/authorized_keys").read_text().split("\n")
    assert [line for line in lines if line] == [credentials.authorized_line(host)]
    assert HostTask.objects.get().state == HostTask.State.WANTED
    host.refresh_from_db()
    assert sshd.login.password not in "".join(str(value) for value in Host.objects.values_list().get(pk=host.pk))
    assert sshd.login.password not in str(dict(client.session))


def test_a_line_that_is_pasted_lets_kangaroo_in_and_the_revoking_command_out(
    client: Client, sshd: Sshd, added: Host
) -> None:
    host = seen_and_confirmed(client, added)
    html = html_module.unescape(page(client.get(reverse("host_credential", args=[host.pk]))))
    command = re.search(r'<pre id="command"[^>]*><code>(.*?)</code>', html, re.DOTALL)
    assert command is not None
    in_the_home(sshd, command[1])
    assert call(host.pk, "keeper.connect")[0]["seconds"] >= 0

    html = html_module.unescape(page(client.get(reverse("host", args=[host.pk]))))
    revoke = re.search(r'<pre id="revoke"[^>]*><code>(.*?)</code>', html, re.DOTALL)
    assert revoke is not None
    in_the_home(sshd, revoke[1])
    call(host.pk, "keeper.close")
    with pytest.raises(HostProblem) as refused:
        call(host.pk, "keeper.connect")
    assert refused.value.kind == Host.Problem.LOGIN_REFUSED


def in_the_home(sshd: Sshd, command: str) -> None:
    """What a person runs in the shell there."""
    login = sshd.login
    as_them: dict[str, Any] = {"user": login.uid, "group": login.gid, "extra_groups": []} if AS_ROOT else {}
    subprocess.run(
        ["bash", "-c", command],
        check=True,
        cwd=login.home,
        env={"HOME": str(login.home), "PATH": "/usr/bin:/bin"},
        **as_them,
    )


def test_a_change_of_address_ends_the_connection(client: Client, sshd: Sshd, added: Host) -> None:
    host = seen_and_confirmed(client, added)
    sshd.authorize(host)
    call(host.pk, "keeper.connect")
    eventually(sshd.connections, what="for the connection")
    given = {"name": "gpu9", "address": "localhost", "port": str(sshd.port), "username": sshd.login.name}
    answer = client.post(reverse("host_edit", args=[host.pk]), given)
    assert answer["Location"] == reverse("host_confirm", args=[host.pk])
    eventually(lambda: not sshd.connections(), what="for its end")
    with pytest.raises(HostProblem):
        call(host.pk, "keeper.connect")
    assert seen_and_confirmed(client, host).host_key == sshd.host_key
    call(host.pk, "keeper.connect")
