"""What may befall a run on a GPU host: lines that break, a silent machine, processes that are killed on either side.

Whatever it is, the trainer is started once for each attempt, no event is lost, and none counts twice.
"""

from __future__ import annotations

import os
import threading
import time

import pytest

from accounts.models import User
from experiments import broker, jobs
from experiments.models import Host, HostKeyPin, Reason, State
from experiments.transport.client import call, hang_up
from tests.hosted import (
    SLOWLY,
    a_run,
    all_arrived_once,
    comes_to,
    ended,
    events,
    page_of,
    process_of,
    submit,
    succeeded,
    there,
)
from tests.live import Live, eventually, kill, start_broker
from tests.sshd import Sshd
from trainer import agent

pytestmark = pytest.mark.django_db(transaction=True)

embedded = pytest.mark.skipif(bool(os.environ.get("REDIS_URL")), reason="the server of REDIS_URL is not ours to kill")


# The way there --------------------------------------------------------------------------------------------------------


def test_a_line_that_breaks_every_two_seconds_loses_nothing(site: Live, sshd: Sshd, owner: User) -> None:
    run = a_run(owner, sshd.host(owner, before=sshd.lines(FAKE_STEP_SECONDS="0.02")), steps=600)
    over, cuts = threading.Event(), 0

    def scissors() -> None:
        nonlocal cuts
        while not over.wait(2.0):
            cuts += bool(sshd.connections())
            sshd.cut()

    cutting = threading.Thread(target=scissors)
    cutting.start()
    try:
        ended(run)
    finally:
        over.set()
        cutting.join()
    succeeded(sshd, run)
    assert cuts >= 5
    assert len(events(there(sshd, run) / "events.jsonl")) >= 600


def test_a_silent_host_is_called_unreachable_and_nothing_worse(site: Live, sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, before=sshd.lines(FAKE_STEP_SECONDS="0.1"))
    run = a_run(owner, host, steps=400)
    comes_to(run, 10)
    assert "still trying" not in page_of(run)
    sshd.freeze()

    def known() -> bool:
        host.refresh_from_db()
        return host.unreachable_since is not None

    eventually(known, what="for somebody to notice")
    run.refresh_from_db()
    assert run.state == State.RUNNING
    step = run.step
    page = page_of(run)
    assert f"{host.name} unreachable" in page
    assert "still trying" in page
    assert f"{host.unreachable_since:%Y-%m-%dT%H:%M:%S}" in page
    time.sleep(1)
    assert len(events(there(sshd, run) / "events.jsonl")) > step + 50, "it has trained on all the while"
    sshd.resume()
    eventually(lambda: not known(), what="for the news that it is back")
    assert "still trying" not in page_of(run)
    assert host.problem == host.problem_text == ""
    succeeded(sshd, run)


def test_another_host_key_stops_all_until_it_is_confirmed(site: Live, sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, slots=2, before=sshd.lines(FAKE_STEP_SECONDS="0.02"))
    runs = [a_run(owner, host, steps=200) for _ in range(2)]
    for run in runs:
        comes_to(run, 10)
    sshd.new_host_key()
    sshd.start()
    eventually(lambda: Host.objects.get(pk=host.pk).problem == Host.Problem.KEY_CHANGED, what="for the news")
    host.refresh_from_db()
    assert host.seen_key == sshd.host_key != host.host_key
    for run in runs:
        folder = there(sshd, run)
        eventually(lambda folder=folder: agent.status(folder)["exit"], what="for training that nobody watches")  # type: ignore[misc]
        run.refresh_from_db()
        assert (run.state, run.step < 200) == (State.RUNNING, True)
        assert "host key has changed" in page_of(run)
    assert sshd.log().rpartition("Server listening")[2].count("Accepted") == 0
    tries = len(sshd.log())
    time.sleep(2)
    assert len(sshd.log()) == tries, "not a packet is sent there"
    HostKeyPin.objects.create(host=host, key=sshd.host_key, previous=host.host_key, by=owner)
    Host.objects.filter(pk=host.pk).update(host_key=sshd.host_key, seen_key="", problem="", problem_text="")
    call(host.pk, "keeper.close")
    hang_up()
    succeeded(sshd, *runs)
    assert "host key" not in page_of(runs[0])


# Processes of the site ------------------------------------------------------------------------------------------------


@embedded
def test_the_sites_processes_are_killed_one_after_the_other(live: Live, sshd: Sshd, owner: User) -> None:
    start = {"work": live.worker, "reconcile": live.reconciler, "collect": lambda: live.start("collect")}
    running = {name: start[name]() for name in start}
    host = sshd.host(owner, slots=2, before=sshd.lines(FAKE_STEP_SECONDS="0.02"))
    experiment = submit(owner, host, steps=400)

    def goes_on() -> None:
        before = sum(run.step for run in experiment.runs.all())
        eventually(lambda: sum(run.step for run in experiment.runs.all()) >= before + 20, what="for more events")

    goes_on()
    broker_again = None
    try:
        for victim in ("collect", "broker", "work", "reconcile", "collect", "collect"):
            if victim == "broker":
                kill(broker.connection().info("server")["process_id"])
                eventually(lambda: not broker.answers())
                goes_on()  # which needs no broker
                broker_again = start_broker()
            else:
                running[victim].kill()
                running[victim].wait()
                running[victim] = start[victim]()
                goes_on()
        succeeded(sshd, *experiment.runs.all())
    finally:
        if broker_again:
            broker_again.kill()
            broker_again.wait()


# Processes of the host ------------------------------------------------------------------------------------------------


def test_a_trainer_that_is_killed_is_said_so_and_goes_on_from_its_checkpoint(
    site: Live, sshd: Sshd, owner: User
) -> None:
    host = sshd.host(owner, slots=2, before=sshd.lines(**SLOWLY))
    killed, orphan = a_run(owner, host, steps=100), a_run(owner, host, steps=100)
    for run in (killed, orphan):
        comes_to(run, 25)
    # One dies alone; the other with its supervisor, while the host is away, and is lost for nobody before it is back.
    with open(there(sshd, killed) / "log.txt", "a") as log:
        log.write("its last words\n")
    kill(process_of(sshd, killed)["trainer"]["pid"])
    assert (ended(killed).state, killed.reason) == (State.FAILED, Reason.KILLED)
    assert killed.detail == "The process was ended by signal 9.\nits last words"
    assert (killed.directory / "log.txt").read_text() == "its last words\n"
    all_arrived_once(sshd, killed)
    sshd.stop()
    eventually(lambda: Host.objects.get(pk=host.pk).unreachable_since, what="for the news that it is away")
    process = process_of(sshd, orphan)
    kill(process["supervisor"]["pid"])
    kill(process["trainer"]["pid"])
    time.sleep(2)
    orphan.refresh_from_db()
    assert orphan.state == State.RUNNING, "nobody can know"
    sshd.start()
    assert (ended(orphan).state, orphan.reason) == (State.FAILED, Reason.KILLED)
    assert "left no word" in orphan.detail
    all_arrived_once(sshd, orphan)
    for run in (killed, orphan):
        step = run.step
        jobs.resume(run)
        run.refresh_from_db()
        ended(run)
        resumed = run.notes.filter(kind="prepared").order_by("seq").last()
        assert resumed is not None
        assert 0 < resumed.data["resumed_from"] <= step
        succeeded(sshd, run, starts=2)
        steps = list(run.points.filter(split="train").values_list("step", flat=True))
        assert steps == list(range(1, 101)), "as if nothing had been"


def test_a_trainer_that_fails_says_why_in_its_last_words(site: Live, sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, before=sshd.lines(FAKE_FAULT="exit"))
    run = ended(a_run(owner, host))
    assert (run.state, run.reason) == (State.FAILED, Reason.ERROR)
    assert "the fake trainer was told to fail" in run.detail
    assert "the fake trainer was told to fail" in page_of(run)
    assert "told to fail" in (run.directory / "log.txt").read_text()
    all_arrived_once(sshd, run)


def test_a_folder_that_has_gone_is_a_lost_run_and_can_begin_anew(site: Live, sshd: Sshd, owner: User) -> None:
    run = a_run(owner, sshd.host(owner, before=sshd.lines(**SLOWLY)), steps=40)
    comes_to(run, 10)
    agent.remove(there(sshd, run).parent)
    assert (ended(run).state, run.reason) == (State.FAILED, Reason.LOST), run.detail
    jobs.resume(run)
    run.refresh_from_db()
    succeeded(sshd, run)
    assert run.step == 40
