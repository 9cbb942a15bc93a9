"""Machines whose owners make them say anything: their own runs may fail by it, and nothing of anybody else's."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import LazySettings
from django.db import connections
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import User
from experiments import hosts, jobs, mirror
from experiments.collector import TRANSFERS, Collector
from experiments.estimate import known_text
from experiments.host_forms import HostForm
from experiments.ingest import MOST_LINE, ingest
from experiments.models import Experiment, Host, HostTask, ModelRun, Note, Reason, Removal, State, Transfer
from experiments.transport import HostProblem, answers
from experiments.transport import ssh as ssh_module
from experiments.transport.base import File, Frame
from experiments.transport.ssh import Ssh
from tests.experiments.factories import make_user
from tests.experiments.fake_trainer import evaluation, prepared
from tests.experiments.test_hosts_pages import sign_in
from tests.experiments.test_ingest import AT, STARTED, lines, train
from tests.live import a_spec, eventually
from tests.sshd import Sshd

pytestmark = pytest.mark.django_db

HUGE = 10**18
DEEP: Any = json.loads("[" * 500 + "]" * 500)
#: What may come in the place of anything.
LIES: list[Any] = [
    None,
    True,
    -1,
    HUGE,
    10**400,
    1e308,
    float("nan"),
    "\0\ud800<b>\x1b[2J",
    [],
    {},
    [[]],
    DEEP,
    "9" * 9999,
]


@pytest.fixture
def ada(db: None) -> User:
    return make_user()


def a_host(owner: User | None, **fields: Any) -> Host:
    known = {"kind": Host.Kind.SSH, "address": "192.0.2.7", "host_key": "ssh-ed25519 AAAA", "env_python": "/python"}
    host: Host = Host.objects.create(**{"name": f"gpu{Host.objects.count()}", "owner": owner, **known, **fields})
    return host


def a_run(owner: User, host: Host, **fields: Any) -> ModelRun:
    experiment = jobs.create(owner, a_spec(models=("small",)), host=host)
    run: ModelRun = experiment.runs.select_related("experiment__owner", "host", "parent").get()
    ModelRun.objects.filter(pk=run.pk).update(**fields)
    run.refresh_from_db()
    return run


# What it says ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie)[:20])
def test_whatever_it_says_of_itself_is_kept_and_shown(ada: User, client: Client, lie: Any) -> None:
    gpu = dict.fromkeys(("index", "name", "memory_bytes", "memory_used_bytes", "use", "power", "processes"), lie)
    machine = dict.fromkeys(("hostname", "cores", "memory_bytes", "disk_free_bytes", "torch", "lingers", "driver"), lie)
    for said in (
        lie,
        {**machine, "gpus": lie},
        {**machine, "gpus": [lie, {**gpu, "uuid": "a"}], "torch": {"cuda": lie}},
    ):
        said = answers.plain(said)
        host = a_host(ada, facts=answers.facts(said), readings=answers.readings(said), readings_at=timezone.now())
        run = a_run(ada, host, state=State.QUEUED)
        jobs.reconcile()
        jobs.follow(run.pk, run.attempt)
        client.force_login(ada)
        for page in (host.get_absolute_url(), "/hosts/", "/train/", run.experiment.get_absolute_url()):
            assert client.get(page, follow=True).status_code == 200


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie)[:20])
def test_a_look_at_a_host_that_lies_ends(ada: User, monkeypatch: pytest.MonkeyPatch, lie: Any) -> None:
    lie = answers.plain(lie)

    def call(_: int, op: str, *args: Any, **more: Any) -> tuple[Any, bytes]:
        if op == "keeper.scan":
            return {"key": "ssh-ed25519 AAAA", "seconds": 0.1}, b""
        if op in ("keeper.connect", "keeper.ping"):
            return {"seconds": 0.1}, b""
        return {"keeper.close": {}, "keeper.exec": {"code": 0, "out": "\n== []"}}.get(op, lie), b""

    monkeypatch.setattr(hosts, "call", call)
    for kind in HostTask.Kind:
        task = HostTask.objects.create(host=a_host(ada), kind=kind)
        hosts.perform(task)
        task.refresh_from_db()
        assert task.state == HostTask.State.FAILED
        assert any(step["state"] == "failed" and step["text"] for step in task.steps)


def test_a_log_without_end_is_not_read_for_ever(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "MOST_READ", 1_000_000)

    def call(_: int, op: str, *args: Any, **more: Any) -> tuple[Any, bytes]:
        said = {"hello": {"root": "/r"}, "begin": {"outcome": "started"}, "task": {"alive": False, "exit": None}}
        return said.get(op, {"total": 0}), b"x" * 65_536 if op == "read" else b""

    monkeypatch.setattr(hosts, "call", call)
    monkeypatch.setattr("time.sleep", lambda _: None)
    task = HostTask.objects.create(host=a_host(ada), kind=HostTask.Kind.SET_UP)
    hosts.perform(task)
    task.refresh_from_db()
    assert task.state == HostTask.State.FAILED
    assert len(task.log) <= hosts.MOST_LOG


def test_tasks_of_the_past_are_forgotten(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise HostProblem(Host.Problem.UNREACHABLE, "It does not answer.")

    monkeypatch.setattr(hosts, "call", refused)
    host = a_host(ada)
    for _ in range(hosts.TASKS_KEPT + 5):
        hosts.perform(HostTask.objects.create(host=host, kind=HostTask.Kind.PROBE))
    assert host.tasks.count() == hosts.TASKS_KEPT


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie)[:20])
def test_an_end_that_cannot_be_is_an_end(ada: User, monkeypatch: pytest.MonkeyPatch, lie: Any) -> None:
    lie = answers.plain(lie)
    run = a_run(ada, a_host(ada), state=State.RUNNING)
    for said in (lie, dict.fromkeys(("attempt", "code", "signal", "log", "lost", "out_of_memory", "at"), lie)):
        status = {"attempt": 1, "alive": False, "pid": lie, "at": lie, "exit": said}
        monkeypatch.setattr(ssh_module, "call", lambda *_, status=status, **__: (status, b""))
        jobs._conclude(run, Ssh(run.host).status(run))
        run.refresh_from_db()
        assert run.state == State.FAILED
        ModelRun.objects.filter(pk=run.pk).update(state=State.RUNNING)
        run.refresh_from_db()


# Its events -----------------------------------------------------------------------------------------------------------

FIGURES = ("seq", "step", "tokens", "flops", "train_seconds", "cross_entropy", "accuracy", "n_tokens", "total_steps")


@pytest.mark.parametrize("lie", [*LIES, -(10**40), "9" * 4000], ids=lambda lie: repr(lie)[:20])
def test_no_event_stops_the_others_or_a_page(ada: User, client: Client, lie: Any) -> None:
    run = a_run(ada, a_host(ada), state=State.RUNNING)
    events = [
        STARTED,
        {"kind": "prepared", **prepared(30, 0)},
        train(3),
        {"kind": "eval", **evaluation("validation", 3)},
        {"kind": "preparing", "what": "x", "done": 1, "total": 2},
        {"kind": "checkpoint", "step": 1, "path": "x", "bytes": 1, "seconds": 1.0},
        {"kind": "sample", "step": 1, "prompt": "x", "text": "y"},
        {"kind": "failed", "reason": "error", "message": "z", "step": 1},
    ]
    chunk = b""
    for event in events:
        for name in (*FIGURES, *event, "at"):
            chunk += lines({**event, name: lie})
    chunk += lines(train(7, 1.5), first=50)
    assert ingest(run, chunk, 0) == len(chunk)
    run.refresh_from_db()
    assert run.points.filter(step=7, cross_entropy=1.5).exists()
    client.force_login(ada)
    for page in ("", "metrics.json", "metrics.csv"):
        answer = client.get(f"{run.experiment.get_absolute_url()}{page}")
        assert answer.status_code == 200
        assert b"<b>" not in answer.getvalue().replace(b"<b>Kangaroo", b"")
    assert client.get("/profile/").status_code == 200


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-01-01T00:00:00"])
def test_times_that_no_database_holds_are_refused(ada: User, at: str) -> None:
    run = a_run(ada, a_host(ada), state=State.RUNNING)
    chunk = lines({**STARTED, "at": at})
    assert ingest(run, chunk, 0) == len(chunk)
    assert "could not be read" in Note.objects.get().data["message"]


def test_lines_that_are_too_long_or_too_deep_are_refused(ada: User) -> None:
    run = a_run(ada, a_host(ada), state=State.RUNNING)
    warning = {"seq": 1, "at": AT, "kind": "warning"}
    long = json.dumps({**warning, "message": "x" * MOST_LINE}).encode() + b"\n"
    deep = json.dumps(warning)[:-1].encode() + b', "message": ' + b"[" * 30_000 + b"\n"
    assert ingest(run, long + deep, 0) == len(long + deep)
    assert all(len(note.data["message"]) < 600 for note in Note.objects.all())


class Telling:
    """A transport whose host says what a test wants."""

    def __init__(self, **said: Any) -> None:
        self.said = said
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(*_: Any, **__: Any) -> Any:
            self.asked.append(name)
            found = self.said[name]
            return found(*_) if callable(found) else found

        return answer


def test_events_without_end_are_an_end(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "MOST_EVENTS", 100_000)
    run = a_run(ada, a_host(ada), state=State.RUNNING)

    def tail(run: ModelRun, offset: int) -> Iterator[Any]:
        while True:
            data = lines(*(train(step) for step in range(200)))
            yield Frame("D", offset, data)
            offset += len(data)

    host = Telling(tail=tail, stop=True, files=[], disk_bytes=0, read=b"")
    assert jobs._read(run, host, lambda: False)
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.FAILED, Reason.ERROR)
    assert (run.directory / "events.jsonl").stat().st_size <= 100_000
    assert "stop" in host.asked


def test_a_host_that_answers_at_once_is_not_asked_without_a_pause(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(ssh_module, "call", lambda *_, **__: ({"kind": "H", "offset": 0}, b""))
    monkeypatch.setattr("experiments.transport.ssh.time.sleep", pauses.append)
    run = a_run(ada, a_host(ada))
    frames = Ssh(run.host).tail(run, 0)
    for _ in range(4):
        next(frames)
    assert len(pauses) == 3
    assert min(pauses) > 0.05


def test_signs_of_life_carry_nothing(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_module, "call", lambda *_, **__: ({"kind": "H", "offset": 0}, b"more"))
    run = a_run(ada, a_host(ada))
    with pytest.raises(HostProblem):
        next(Ssh(run.host).tail(run, 0))


def test_who_follows_a_run_that_never_begins_hears_of_its_deletion(ada: User) -> None:
    run = a_run(ada, a_host(ada), state=State.RUNNING)
    status = {"attempt": 0, "alive": True, "pid": None, "at": None, "exit": None}
    host = Telling(start="already", status=status, stop=False, remove=None)
    asked = 0

    def detached() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            Experiment.objects.get(pk=run.experiment_id).delete()
        assert asked < 10, "it goes on for ever"
        return False

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "for_host", lambda _: host)
        assert jobs._attend(run, detached)


def test_a_file_that_never_comes_over_whole_is_not_sent_for_ever(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(ada, a_host(ada), state=State.RUNNING)

    def start(*_: Any) -> Any:
        raise ValueError("it did not come over as it is")

    status = {"attempt": 0, "alive": False, "pid": None, "at": None, "exit": None}
    monkeypatch.setattr(jobs, "for_host", lambda _: Telling(start=start, status=status))
    assert jobs._attend(run, lambda: False)
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.FAILED, Reason.ERROR)
    assert "did not come over" in run.detail


# Its files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed",
    [
        [["../../../etc/cron.d/x", 1]],
        [["/etc/passwd", 1]],
        [["a", -1]],
        [["a", HUGE]],
        [["a", None]],
        [["a", True, 1]],
        [[["a"], 1]],
        "abc",
        [["a", 1]] * 10_001,
    ],
    ids=lambda listed: repr(listed)[:20],
)
def test_a_list_of_files_that_cannot_be_is_refused(ada: User, monkeypatch: pytest.MonkeyPatch, listed: Any) -> None:
    monkeypatch.setattr(ssh_module, "call", lambda *_, **__: (listed, b""))
    run = a_run(ada, a_host(ada))
    with pytest.raises(HostProblem, match="list of files"):
        Ssh(run.host).files(run, "model")


def a_transfer(run: ModelRun, name: str = "model", **fields: Any) -> Transfer:
    transfer: Transfer = Transfer.objects.create(run=run, name=name, **fields)
    return transfer


@pytest.mark.parametrize("name", [".", "..\\..\\evil", "a\nb", "\x1b[2J", ".hidden", "x" * 200, "a/.b", "a//b", "é"])
def test_names_that_no_model_has_do_not_come_here(ada: User, name: str) -> None:
    run = a_run(ada, a_host(ada), state=State.SUCCEEDED)
    with pytest.raises(mirror.Damaged):
        mirror.fetch(a_transfer(run), Telling(files=[File(f"model/{name}", 1)]), lambda: False)
    assert not list(run.directory.glob("*"))


def test_no_model_has_so_many_files_that_its_download_opens_all_there_are(ada: User) -> None:
    run = a_run(ada, a_host(ada), state=State.SUCCEEDED)
    many = [File(f"model/{number}", 1) for number in range(mirror.MOST_FILES + 1)]
    with pytest.raises(mirror.Damaged):
        mirror.fetch(a_transfer(run), Telling(files=many), lambda: False)


def test_what_a_user_may_have_here_counts_for_what_comes_from_hosts(ada: User, settings: LazySettings) -> None:
    settings.MAX_DISK_GB_PER_USER = 1
    run = a_run(ada, a_host(ada), state=State.SUCCEEDED)
    a_transfer(run, "step-000100", state=Transfer.State.DONE, bytes_done=600_000_000)
    files = Telling(files=[File("model/model.safetensors", 500_000_000)])
    with pytest.raises(OSError, match="allowed"):
        mirror.fetch(a_transfer(run), files, lambda: False)
    a_transfer(run, "step-000200", state=Transfer.State.DONE, bytes_done=600_000_000)
    with pytest.raises(jobs.LimitReached):
        jobs.create(ada, a_spec(models=("small",)))


def test_what_stands_on_a_host_of_ones_own_is_no_ones_limit(ada: User, settings: LazySettings) -> None:
    settings.MAX_DISK_GB_PER_USER = 1
    a_run(ada, a_host(ada), state=State.SUCCEEDED, disk_bytes=10**12)
    assert jobs.create(ada, a_spec(models=("small",)))


def test_nothing_comes_where_the_disk_is_full(ada: User, settings: LazySettings) -> None:
    run = a_run(ada, a_host(None, offered=True), state=State.SUCCEEDED)
    settings.MIN_FREE_DISK_GB = 10**9
    with pytest.raises(OSError, match="no room"):
        mirror.fetch(a_transfer(run), Telling(files=[File("model/a", 1)]), lambda: False)


def test_no_more_comes_than_was_announced(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(ada, a_host(ada), state=State.SUCCEEDED)

    def ahead(*_: Any, **__: Any) -> Iterator[Any]:
        yield {}, b"x" * (8 << 20)

    monkeypatch.setattr(ssh_module, "ahead", ahead)
    assert sum(map(len, Ssh(run.host).pieces(run, "model/a", 0, 10))) == 10


def test_files_that_a_host_no_longer_lists_do_not_pile_up(ada: User) -> None:
    run = a_run(ada, a_host(ada), state=State.SUCCEEDED)
    transfer = a_transfer(run)
    for name in ("a", "b"):
        host = Telling(
            files=[File(f"model/{name}", 8)], pieces=lambda *_: (data for data in [b"12345678"]), digest=lambda *_: "no"
        )
        assert not mirror.fetch(transfer, host, lambda: True)
    assert [path.name for path in (run.directory / ".model.incoming").iterdir()] == ["b.part"]


# The collector --------------------------------------------------------------------------------------------------------


def test_one_host_has_few_threads_however_much_is_wanted(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, Any]] = []
    host = a_host(ada)
    for _ in range(20):
        run = a_run(ada, host, state=State.SUCCEEDED)
        a_transfer(run)
        Removal.objects.create(experiment_id=run.experiment_id, host=host)
    collector = Collector()
    monkeypatch.setattr(collector, "_do", lambda what, key, work: begun.append((what, key)))
    collector._look()
    assert [what for what, _ in begun].count("transfer") == TRANSFERS
    assert [key for what, key in begun if what == "removals"] == [host.pk]


def test_what_fails_every_time_is_tried_ever_less_often(caplog: pytest.LogCaptureFixture) -> None:
    collector = Collector()

    def fails() -> None:
        raise TypeError("a lie")

    def pause() -> float:
        collector._not_before.clear()
        collector._do("run", 1, fails)
        thread = collector._threads["run", 1]
        thread.join()
        return collector._not_before["run", 1]

    first = pause()
    for _ in range(12):
        last = pause()
    assert last - first > 100


def test_no_worker_waits_for_a_host(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: Any, **__: Any) -> Any:
        raise AssertionError("a host is asked")

    monkeypatch.setattr(ssh_module, "call", waits)
    gpu = {"uuid": "GPU-1", "memory_bytes": 1 << 34, "memory_used_bytes": 0, "processes": []}
    host = a_host(ada, facts=answers.facts({"gpus": [gpu]}))
    run = a_run(ada, host)
    jobs.follow(run.pk, run.attempt)
    run.refresh_from_db()
    assert (run.state, run.reason) == (State.QUEUED, Reason.WAITING_FOR_GPU)
    Host.objects.filter(pk=host.pk).update(readings=answers.readings({"gpus": [gpu]}), readings_at=timezone.now())
    jobs.follow(run.pk, run.attempt)
    run.refresh_from_db()
    assert (run.state, run.gpus) == (State.RUNNING, ["GPU-1"])


# Others ---------------------------------------------------------------------------------------------------------------


def test_nothing_goes_on_where_it_is_not_welcome_any_more(ada: User) -> None:
    bob = make_user("bob@example.org")
    host = a_host(ada, offered=True)
    run = a_run(bob, host, state=State.FAILED)
    waiting = a_run(bob, host)
    Host.objects.filter(pk=host.pk).update(offered=False)
    with pytest.raises(jobs.LimitReached, match=host.name):
        jobs.resume(ModelRun.objects.get(pk=run.pk))
    jobs.follow(waiting.pk, waiting.attempt)
    waiting.refresh_from_db()
    assert (waiting.state, host.name in waiting.detail) == (State.FAILED, True)
    mine = a_run(ada, host, state=State.FAILED)
    Host.objects.filter(pk=host.pk).update(retired_at=timezone.now())
    with pytest.raises(jobs.LimitReached, match=host.name):
        jobs.resume(ModelRun.objects.get(pk=mine.pk))


def test_no_machine_of_one_user_speaks_of_anothers_text(ada: User) -> None:
    lie = a_run(ada, a_host(ada), prepared={"train_tokens": HUGE})
    assert known_text(lie.experiment.spec.data) == {}
    Host.objects.filter(pk=lie.host_id).update(offered=True)
    assert known_text(lie.experiment.spec.data) == {"train_tokens": HUGE}


def test_only_what_a_trainer_told_of_is_fetched(ada: User, client: Client) -> None:
    run = a_run(ada, a_host(ada), state=State.FAILED)
    client.force_login(ada)

    def fetch(name: str) -> int:
        return client.post(reverse("fetch", args=[run.experiment_id, "small", name])).status_code

    assert fetch("step-000999") == 404
    Note.objects.create(run=run, seq=1, at=timezone.now(), kind="checkpoint", data={"step": 999})
    assert fetch("step-000999") == 302


def test_there_is_an_end_to_machines(ada: User, client: Client, settings: LazySettings) -> None:
    settings.MAX_HOSTS_PER_USER = 1
    a_host(ada)
    form = HostForm({"name": "two", "address": "192.0.2.8", "username": "ada"}, owner=ada, instance=Host(owner=ada))
    assert not form.is_valid()
    assert "allowed" in str(form.non_field_errors())


def test_a_machine_that_does_not_answer_keeps_one_page_waiting(
    ada: User, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = a_host(ada)
    asked: list[str] = []
    sign_in(client)
    other = Client()
    sign_in(other)
    page = reverse("host_confirm", args=[host.pk])

    def call(pk: int, op: str, **_: Any) -> Any:
        asked.append(op)
        answer = other.post(page, {"scan": "1"}, follow=True)  # while this one waits
        assert "wait until it is done" in answer.content.decode()
        raise HostProblem(Host.Problem.UNREACHABLE, "It does not answer.")

    monkeypatch.setattr(sys.modules["experiments.views.hosts"], "call", call)
    for _ in range(2):
        assert "It does not answer" in client.post(page, {"scan": "1"}, follow=True).content.decode()
    assert len(asked) == 2


# The whole way --------------------------------------------------------------------------------------------------------

LIAR = """\
#!{python}
import json, sys
if sys.argv[1:2] == ["-c"] and sys.argv[2].startswith("import sys;"):
    sys.exit(0)
print(json.dumps({{"need": False}}), flush=True)
print({sentinel!r}, flush=True)
hello = {{"version": 1, "root": "/r", "executable": "/bin/x", "python": "3", "package": "p" * 20, "time": 0}}
said = {{
    "hello": hello, "start": {{"outcome": "started"}},
    "facts": {{"gpus": 5, "cores": float("nan"), "torch": "\\x00", "hostname": "\\ud800"}},
    "readings": {{"gpus": [[], {{"uuid": 7}}], "load": 1e400}},
    "status": {{"attempt": 1, "alive": False, "exit": []}},
    "tail": {{"kind": "E", "offset": 0}}, "files": 7, "disk_bytes": {{"bytes": -1}},
}}
for line in sys.stdin.buffer:
    asked = json.loads(line)
    sys.stdin.buffer.read(asked.get("size", 0))
    print(json.dumps({{"id": asked["id"], "ok": said.get(asked["op"], [])}}), flush=True)
"""


@pytest.mark.django_db(transaction=True)
def test_a_lying_machine_fails_its_own_look_and_leaves_the_collector_alone(
    sshd: Sshd, owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    program = sshd.login.write("liar", LIAR.format(python=sshd.python, sentinel="== kangaroo agent 1 =="), 0o755)
    lying, honest = sshd.host(owner, env_python=str(program), python=str(program)), sshd.host(owner)
    collector = Collector()

    def collect() -> None:
        try:
            collector.run()
        finally:
            connections.close_all()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        tasks = [HostTask.objects.create(host=host, kind=HostTask.Kind.PROBE) for host in (lying, honest)]
        eventually(lambda: not any(HostTask.objects.get(pk=task.pk).is_active for task in tasks), seconds=90)
        assert [HostTask.objects.get(pk=task.pk).state for task in tasks][1] == HostTask.State.SUCCEEDED
        lying.refresh_from_db()
        assert lying.facts is None or lying.facts["gpus"] == []
    finally:
        collector.leave()
        thread.join()
    assert "Traceback" not in caplog.text
