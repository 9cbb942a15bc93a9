"""The keeper against a real SSH server: one connection a host, its key pinned, a sentence for whatever goes wrong."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from django.conf import settings
from django.db import OperationalError, connections

from accounts.models import User
from experiments.credentials import authorized_line, read_private_key
from experiments.models import Experiment, Host, ModelRun
from experiments.transport import keeper as keeper_module
from experiments.transport import link
from experiments.transport.base import HostProblem
from experiments.transport.client import call, hang_up
from experiments.transport.keeper import Keeper
from experiments.transport.ssh import Ssh
from tests.live import a_spec, eventually, kill
from tests.sshd import AS_ROOT, Sshd

pytestmark = pytest.mark.usefixtures("keeper")
by_root = pytest.mark.skipif(not AS_ROOT, reason="only root can make a user, and an sshd that checks passwords")


def problem(host: Host, op: str = "hello", **arguments: Any) -> HostProblem:
    """What is said where `op` cannot be done."""
    with pytest.raises(HostProblem) as caught:
        call(host.pk, op, **arguments)
    return caught.value


def noted(host: Host, what: Callable[[Host], Any]) -> Host:
    """The row, once the keeper has noted `what` there."""

    def found() -> Host | None:
        host.refresh_from_db()
        return host if what(host) else None

    return eventually(found, what="for a note in the row")  # type: ignore[no-any-return]


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count

    def one(number: int) -> None:
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error
        finally:
            hang_up()
            connections.close_all()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def logins(sshd: Sshd) -> int:
    return sshd.log().count("Accepted publickey")


def attempts(sshd: Sshd) -> int:
    return sshd.log().count("Connection from ")


# Reached --------------------------------------------------------------------------------------------------------------


def test_a_host_is_reached(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    hello = call(host.pk, "hello")[0]
    assert hello["user"] == sshd.login.name
    assert hello["root"] == str(sshd.root)
    assert hello["executable"] == sshd.python
    assert noted(host, lambda row: row.last_seen).problem == ""
    assert call(host.pk, "keeper.ping")[0]["seconds"] < 10


def test_all_share_one_connection_and_one_relay(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    answers = in_threads(25, lambda _: call(host.pk, "hello")[0]["user"])
    assert answers == [sshd.login.name] * 25
    assert logins(sshd) == len(sshd.connections()) == 1
    assert sshd.log().count("Starting session") == 1


def test_twenty_runs_train_over_one_connection(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    spec = a_spec(60, models=("small",)).model_dump(mode="json")
    runs = []
    for _ in range(20):
        experiment = Experiment.objects.create(name="test", spec_json=spec, host=host)
        runs.append(ModelRun.objects.create(experiment=experiment, name="small", host=host))

    def follow(number: int) -> bytes:
        transport = Ssh(host)
        transport.start(runs[number])
        return b"".join(frame.data for frame in transport.tail(runs[number], 0))

    for run, told in zip(runs, in_threads(20, follow), strict=True):
        assert told == (sshd.root / "experiments" / str(run.experiment_id) / "small" / "events.jsonl").read_bytes()
        assert json.loads(told.splitlines()[-1])["kind"] == "finished"
    assert logins(sshd) == len(sshd.connections()) == 1
    assert sshd.log().count("Starting session") == 1


def test_the_package_is_sent_once_a_version(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    digest = call(host.pk, "hello")[0]["package"]
    made = (sshd.root / "package" / digest).stat()
    assert (sshd.root / "package" / digest / "trainer" / "relay.py").exists()
    assert sshd.root.stat().st_mode & 0o777 == 0o700
    call(host.pk, "keeper.close")
    call(host.pk, "hello")
    assert (sshd.root / "package" / digest).stat() == made
    assert [path.name for path in (sshd.root / "package").iterdir()] == [digest]


def test_what_an_interrupted_transfer_of_the_package_left_is_cleared_away(sshd: Sshd, owner: User) -> None:
    packages = sshd.root / "package"
    for name, age in (("aaaa.tmp-1", 7200), ("bbbb.tmp-2", 60)):
        sshd.login.write(f"kangaroo/package/{name}/trainer/half.py", "")
        os.utime(packages / name, (time.time() - age, time.time() - age))
    sshd.login.own(sshd.root, packages, packages / "aaaa.tmp-1", packages / "bbbb.tmp-2")
    digest = call(sshd.host(owner).pk, "hello")[0]["package"]
    assert {path.name for path in packages.iterdir()} == {digest, "bbbb.tmp-2"}, "the younger may be on its way"


def test_a_package_that_comes_damaged_is_not_unpacked(sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module.package, "archive", lambda: ("0" * 64, b"what is not of this digest"))
    said = problem(sshd.host(owner))
    assert said.kind == Host.Problem.UNUSABLE
    assert "the archive came damaged" in said.message
    assert list((sshd.root / "package").iterdir()) == []


def test_a_connection_without_questions_is_closed(
    sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch, keeper: Keeper
) -> None:
    host = sshd.host(owner)
    call(host.pk, "hello")
    monkeypatch.setattr(keeper_module, "IDLE", 0.1)
    eventually(lambda: not sshd.connections(), what="for the end of an idle connection")
    assert call(host.pk, "hello")[0]["user"] == sshd.login.name
    assert logins(sshd) == 2


def test_more_commands_than_the_server_has_sessions(sshd: Sshd, owner: User) -> None:
    """MaxSessions is 10."""
    host = sshd.host(owner)
    call(host.pk, "hello")
    answers = in_threads(20, lambda number: call(host.pk, "keeper.exec", argv=["echo", f"it's {number}"])[0])
    assert [answer["out"] for answer in answers] == [f"it's {number}\n" for number in range(20)]
    assert logins(sshd) == 1
    assert call(host.pk, "keeper.exec", argv=["sh", "-c", "echo no >&2; exit 7"])[0] == {
        "code": 7,
        "out": "",
        "err": "no\n",
    }
    long = call(host.pk, "keeper.exec", argv=["seq", "100000"])[0]
    assert len(long["out"]) == link.MOST_OUTPUT


def test_looking_at_a_host_says_how_long_it_took(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, host_key="")
    scan = call(host.pk, "keeper.scan")[0]
    assert scan["key"] == sshd.host_key
    assert scan["fingerprint"].startswith("SHA256:")
    assert "Accepted" not in sshd.log(), "nobody logs in at a machine that is not confirmed"
    assert "has not been confirmed" in problem(host).message
    Host.objects.filter(pk=host.pk).update(host_key=scan["key"])
    assert call(host.pk, "keeper.connect")[0]["seconds"] > 0


def test_looks_at_machines_are_counted(sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MOST_LOOKS", 3)
    host, other = sshd.host(owner), sshd.host(owner)
    for each in (host, other, host):
        call(each.pk, "keeper.scan")
    assert "3 looks at machines a minute" in problem(other, "keeper.scan").message


# Host keys ------------------------------------------------------------------------------------------------------------


def test_another_host_key_stops_everything_until_it_is_confirmed(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    call(host.pk, "hello")
    old = sshd.host_key
    sshd.new_host_key()
    sshd.start()
    said = eventually(lambda: _if(problem(host), Host.Problem.KEY_CHANGED))
    for key in (old, sshd.host_key):
        assert _fingerprint(key) in said.message
    row = noted(host, lambda row: row.problem)
    assert (row.problem, row.problem_text) == ("key_changed", said.message)
    assert row.unreachable_since
    assert row.seen_key == sshd.host_key
    before = attempts(sshd)
    eventually(lambda: problem(host).kind == Host.Problem.KEY_CHANGED)
    time.sleep(0.5)  # longer than the pause after the first failure
    assert problem(host).kind == Host.Problem.KEY_CHANGED
    assert attempts(sshd) == before, "nothing is sent there"
    assert logins(sshd) == 1
    Host.objects.filter(pk=host.pk).update(host_key=sshd.host_key)
    eventually(lambda: _answers(host))
    assert noted(host, lambda row: not row.problem).unreachable_since is None


def test_a_host_that_has_no_key_of_the_confirmed_kind_is_another_one(sshd: Sshd, owner: User) -> None:
    other = asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_public_key().decode()
    host = sshd.host(owner, host_key=" ".join(other.split()[:2]))
    assert problem(host).kind == Host.Problem.KEY_CHANGED


def _fingerprint(key: str) -> str:
    return asyncssh.import_public_key(key).get_fingerprint()


# Logins ---------------------------------------------------------------------------------------------------------------


def test_a_refused_key_says_what_to_do(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, authorized=False)
    said = problem(host)
    assert said.kind == Host.Problem.LOGIN_REFUSED
    assert "authorized_keys" in said.message
    assert noted(host, lambda row: row.problem).problem == Host.Problem.LOGIN_REFUSED
    sshd.authorize(host)
    assert call(host.pk, "keeper.connect")[0]["seconds"] > 0, "where a person waits it is tried at once"
    assert noted(host, lambda row: not row.problem).unreachable_since is None
    assert _answers(host)


def test_a_revoked_key_is_refused_at_the_next_login(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    call(host.pk, "hello")
    sshd.revoke_all()
    sshd.cut()
    eventually(lambda: _if(problem(host), Host.Problem.LOGIN_REFUSED))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_key_of_the_owners_with_a_passphrase_logs_in(sshd: Sshd, owner: User, tmp_path: Path, kind: str) -> None:
    command = ["ssh-keygen", "-q", "-t", kind, "-N", "a secret phrase", "-f", str(tmp_path / "key")]
    subprocess.run(command, check=True)
    private, public = read_private_key((tmp_path / "key").read_text(), "a secret phrase")
    host = sshd.host(owner, authorized=False, credential=Host.Credential.OWN, public_key=public)
    host.private_key, host.passphrase = private, "a secret phrase"
    host.save()
    sshd.authorize(host)
    assert _answers(host)


def test_a_key_that_was_moved_from_another_row_is_not_used(sshd: Sshd, owner: User) -> None:
    host, other = sshd.host(owner), sshd.host(owner)
    Host.objects.filter(pk=host.pk).update(private_key=Host.objects.get(pk=other.pk).private_key)
    said = problem(host)
    assert said.kind == Host.Problem.LOGIN_REFUSED
    assert "cannot be opened" in said.message
    assert attempts(sshd) == 1, "the one that waited for the server"


@by_root
def test_a_password_installs_the_key_once(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, authorized=False, name="my gpu")
    assert problem(host).kind == Host.Problem.LOGIN_REFUSED
    keys = sshd.login.write(".ssh/authorized_keys", "ssh-ed25519 AAAA somebody-else", 0o600)  # no newline at its end
    call(host.pk, "keeper.install_key", password=sshd.login.password)
    assert _answers(host)
    once = keys.read_text()
    assert "ssh-ed25519 AAAA somebody-else\n" in once
    call(host.pk, "keeper.install_key", password=sshd.login.password)
    assert keys.read_text() == once
    host.forwards = True
    host.save()
    call(host.pk, "keeper.install_key", password=sshd.login.password)
    lines = [line for line in keys.read_text().splitlines() if line]
    assert lines == ["ssh-ed25519 AAAA somebody-else", authorized_line(host)]
    assert keys.stat().st_mode & 0o777 == 0o600
    assert keys.parent.stat().st_mode & 0o777 == 0o700


@by_root
def test_a_wrong_password_installs_nothing_and_is_not_repeated_to_anybody(
    sshd: Sshd, owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    host = sshd.host(owner, authorized=False)
    said = problem(host, "keeper.install_key", password="my-wrong-password")
    assert said.kind == Host.Problem.LOGIN_REFUSED
    assert "password" in said.message
    noted(host, lambda row: row.problem)
    for text in (said.message, host.problem_text, caplog.text):
        assert "my-wrong-password" not in text
    assert not (sshd.login.home / ".ssh").exists()


def test_nothing_secret_is_logged_or_shown(sshd: Sshd, owner: User, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    host = sshd.host(owner)
    call(host.pk, "hello")
    body = "".join(host.private_key.reveal(host).splitlines()[1:-1])
    place = keeper_module._place(host, with_key=True)
    assert place.key is not None
    said = caplog.text + repr(place) + str(place)
    assert body[20:60] not in said.replace("\n", "")
    assert base64.b64encode(body.encode()).decode()[:40] not in said
    assert [record for record in caplog.records if record.name.startswith("asyncssh")] == []


# Shells and Pythons ---------------------------------------------------------------------------------------------------


@by_root
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "fish", "csh", "tcsh", "ksh"])
@pytest.mark.parametrize("before", [True, False])
def test_every_login_shell_will_do(sshd: Sshd, owner: User, shell: str, before: bool) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell} here")
    sshd.login.shell(program)
    lines = 'export GREETING="it\'s $USER"\necho noise' if before else ""
    host = sshd.host(owner, before=lines, folder="a folder's name")
    assert call(host.pk, "hello")[0]["root"] == str(sshd.login.home / "a folder's name")
    said = call(host.pk, "keeper.exec", argv=["sh", "-c", 'echo "$GREETING"'])[0]["out"]
    assert said == (f"it's {sshd.login.name}\n" if before else "\n")


@by_root
@pytest.mark.parametrize("lines", ["echo hello", "seq 10000; printf 'no newline at the end'", "printf '\\377\\000'"])
def test_what_start_up_files_print_is_ignored(sshd: Sshd, owner: User, lines: str) -> None:
    for name in (".bashrc", ".profile"):
        sshd.login.write(name, lines + "\n")
    host = sshd.host(owner)
    assert _answers(host)
    assert call(host.pk, "keeper.exec", argv=["echo", "ours"])[0]["out"] == "ours\n"


@by_root
def test_start_up_files_that_print_without_end_are_named(sshd: Sshd, owner: User) -> None:
    sshd.login.write(".bashrc", "yes | head -c 1000000\n")
    said = problem(sshd.host(owner))
    assert said.kind == Host.Problem.UNUSABLE
    assert "prints more than 64 KB" in said.message


@by_root
def test_a_user_without_a_shell_is_told_so_in_its_words(sshd: Sshd, owner: User) -> None:
    sshd.login.shell("/usr/sbin/nologin")
    said = problem(sshd.host(owner))
    assert said.kind == Host.Problem.UNUSABLE
    assert "“This account is currently not available.”" in said.message


def test_lines_that_end_the_shell_are_named(sshd: Sshd, owner: User) -> None:
    said = problem(sshd.host(owner, before="echo oh no\nexit 3"))
    assert said.kind == Host.Problem.UNUSABLE
    assert "lines to run before" in said.message


@pytest.mark.parametrize("lines", ["set -e", "set -euo pipefail", "if then fi (", "cat", "false", "exec 2>/dev/null"])
def test_lines_that_go_wrong_stand_in_nobodys_way(sshd: Sshd, owner: User, lines: str) -> None:
    assert _answers(sshd.host(owner, before=lines))


def test_a_python_that_is_not_there_is_named(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, env_python="", python="/nowhere/python3")
    said = problem(host)
    assert said.kind == Host.Problem.NO_PYTHON
    assert "/nowhere/python3" in said.message
    assert noted(host, lambda row: row.problem).problem == Host.Problem.NO_PYTHON
    assert call(host.pk, "keeper.connect")[0]["seconds"] > 0, "the login works"


@by_root
def test_a_python_that_does_not_start_says_why(sshd: Sshd, owner: User) -> None:
    program = sshd.login.write("bin/python3", "#!/bin/sh\necho 'libfoo is missing' >&2\nexit 127\n", 0o755)
    said = problem(sshd.host(owner, env_python="", python="~/bin/python3", before=""))
    assert program.exists()
    assert said.kind == Host.Problem.NO_PYTHON
    assert "libfoo is missing" in said.message


def test_a_host_without_python_is_told_so(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, env_python="", before="export PATH=/nowhere")
    said = problem(host)
    assert said.kind == Host.Problem.NO_PYTHON
    assert "No Python of version 3.9 or newer" in said.message
    Host.objects.filter(pk=host.pk).update(before="", env_python=sshd.python)
    call(host.pk, "keeper.close")
    assert _answers(host)
    assert noted(host, lambda row: not row.problem).unreachable_since is None


# Folders --------------------------------------------------------------------------------------------------------------


@by_root
@pytest.mark.parametrize("folder", ["/opt/not-yours", "~/locked/kangaroo"])
def test_a_folder_that_may_not_be_written_is_named(sshd: Sshd, owner: User, folder: str) -> None:
    (sshd.login.home / "locked").mkdir(mode=0o500)
    host = sshd.host(owner, folder=folder)
    said = problem(host)
    assert said.kind == Host.Problem.UNUSABLE
    assert f"{sshd.login.name} may not write in {folder.replace('~', str(sshd.login.home))}" in said.message
    assert noted(host, lambda row: row.problem).problem_text == said.message


def test_a_folder_that_is_a_file_is_named(sshd: Sshd, owner: User) -> None:
    sshd.login.write("kangaroo", "a file")
    assert "is no folder" in problem(sshd.host(owner)).message


def test_a_full_disk_is_named(sshd: Sshd, owner: User) -> None:
    with sshd.small_disk("64k") as disk:
        host = sshd.host(owner, folder=str(disk))
        said = problem(host)
        assert said.kind == Host.Problem.UNUSABLE
        assert "is full" in said.message
        assert list((disk / "package").iterdir()) == [], "half of a package is worth nothing"
        call(host.pk, "keeper.close")


# Addresses ------------------------------------------------------------------------------------------------------------


def test_a_refused_address_is_not_connected_to(sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "HOSTS_ALLOW", ["public"])
    host = sshd.host(owner)
    for op in ("hello", "keeper.scan", "keeper.connect"):
        assert problem(host, op).kind == Host.Problem.ADDRESS_REFUSED
    assert attempts(sshd) == 1, "the one that waited for the server"


def test_where_nothing_listens_it_is_said_so(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, port=_free_port())
    assert "refuses connections" in problem(host).message
    row = noted(host, lambda row: row.unreachable_since)
    assert row.problem == Host.Problem.UNREACHABLE
    since = row.unreachable_since
    eventually(lambda: problem(host, "keeper.connect"))
    assert noted(host, lambda row: row.problem).unreachable_since == since, "since the first time"


def test_a_name_that_means_nothing_is_unreachable(sshd: Sshd, owner: User) -> None:
    said = problem(sshd.host(owner, address="gpu.invalid"))
    assert said.kind == Host.Problem.UNREACHABLE
    assert "gpu.invalid" in said.message


def test_what_is_no_ssh_server_is_told_apart(sshd: Sshd, owner: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            peer, _ = other.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200)

        threading.Thread(target=speak, daemon=True).start()
        said = problem(sshd.host(owner, port=other.getsockname()[1]))
    assert said.kind in (Host.Problem.UNUSABLE, Host.Problem.UNREACHABLE)


def test_failures_are_told_at_once_until_it_is_tried_again(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, authorized=False)
    problem(host)
    tried = attempts(sshd)
    for _ in range(20):
        assert problem(host).kind == Host.Problem.LOGIN_REFUSED
    assert attempts(sshd) <= tried + 2


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


# Jump hosts -----------------------------------------------------------------------------------------------------------


def test_a_host_is_reached_through_another(sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    jump = sshd.host(owner, forwards=True, address="127.0.0.1")
    host = sshd.host(owner, jump=jump, address="localhost")
    monkeypatch.setattr(settings, "HOSTS_ALLOW", ["127.0.0.1"])
    assert call(host.pk, "keeper.scan")[0]["key"] == sshd.host_key
    assert _answers(host)
    assert len(sshd.connections()) == 2
    sshd.cut()
    eventually(lambda: _answers(host))
    call(host.pk, "keeper.close")
    eventually(lambda: len(sshd.connections()) == 1)


def test_a_jump_host_that_fails_is_named(sshd: Sshd, owner: User) -> None:
    jump = sshd.host(owner, authorized=False)
    said = problem(sshd.host(owner, jump=jump))
    assert said.kind == Host.Problem.UNREACHABLE
    assert "through a jump host, which is not reached" in said.message
    assert noted(jump, lambda row: row.problem).problem == Host.Problem.LOGIN_REFUSED


def test_jump_hosts_that_lead_in_a_circle_are_named(sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "LOGIN_TIMEOUT", 0.5)
    one, other = sshd.host(owner), sshd.host(owner)
    Host.objects.filter(pk=one.pk).update(jump=other)
    Host.objects.filter(pk=other.pk).update(jump=one)
    assert "leads back to this host" in problem(one).message


def test_a_jump_host_that_does_not_forward_is_named(sshd: Sshd, owner: User) -> None:
    jump = sshd.host(owner)  # its line says `restrict`
    assert "must say port-forwarding" in problem(sshd.host(owner, jump=jump)).message


def test_a_host_behind_a_jump_host_has_its_own_key(sshd: Sshd, owner: User) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    jump = sshd.host(owner, forwards=True)
    host = sshd.host(owner, jump=jump, host_key=" ".join(other.split()[:2]))
    assert problem(host).kind == Host.Problem.KEY_CHANGED
    assert noted(host, lambda row: row.seen_key).seen_key == sshd.host_key
    jump.refresh_from_db()
    assert jump.problem == ""


# Lines that break -----------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_run(sshd: Sshd, owner: User) -> ModelRun:
    host = sshd.host(owner, before=sshd.lines(FAKE_STEP_SECONDS="0.02"))
    spec = a_spec(400, models=("small",)).model_dump(mode="json")
    experiment = Experiment.objects.create(name="test", spec_json=spec, host=host)
    run: ModelRun = ModelRun.objects.create(experiment=experiment, name="small", host=host)
    Ssh(host).start(run)
    return run


def test_cut_connections_lose_no_event_and_double_none(sshd: Sshd, slow_run: ModelRun) -> None:
    transport, told, cuts = Ssh(slow_run.host), b"", 0
    kinds: set[str] = set()
    last, over = time.monotonic(), False
    while not over:
        try:
            for frame in transport.tail(slow_run, len(told)):
                told += frame.data
                over = frame.kind == "E"
                if not over and time.monotonic() - last > 0.7:
                    sshd.cut()
                    last, cuts = time.monotonic(), cuts + 1
        except HostProblem as broken:
            kinds.add(broken.kind)
            time.sleep(0.05)
    assert kinds == {Host.Problem.UNREACHABLE}
    assert cuts >= 5
    path = sshd.root / "experiments" / str(slow_run.experiment_id) / "small" / "events.jsonl"
    assert told == path.read_bytes()
    events = [json.loads(line) for line in told.splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert events[-1]["kind"] == "finished"
    assert sum(event["kind"] == "started" for event in events) == 1


def test_a_silent_line_is_given_up_and_made_anew(sshd: Sshd, slow_run: ModelRun) -> None:
    host = slow_run.host
    transport = Ssh(host)
    sshd.freeze()
    began = time.monotonic()
    assert problem(host, "status", run=f"{slow_run.experiment_id}/small", timeout=90).kind == Host.Problem.UNREACHABLE
    assert time.monotonic() - began < 60
    assert problem(host, timeout=90).kind == Host.Problem.UNREACHABLE  # nor is a new one made
    row = noted(host, lambda row: row.unreachable_since)
    assert row.problem == Host.Problem.UNREACHABLE
    sshd.resume()
    eventually(lambda: _answers(host), seconds=90)
    assert noted(host, lambda row: not row.problem).unreachable_since is None
    frames = list(transport.tail(slow_run, 0))
    path = sshd.root / "experiments" / str(slow_run.experiment_id) / "small" / "events.jsonl"
    assert b"".join(frame.data for frame in frames) == path.read_bytes()


def test_a_relay_that_is_killed_is_started_anew(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    call(host.pk, "hello")
    relays = [pid for pid in sshd.login.processes() if b"trainer.relay" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(relays) == 1
    kill(relays[0])
    eventually(lambda: _answers(host))
    assert logins(sshd) == 1, "on the same connection"


@pytest.mark.parametrize(
    "garbage",
    ["yes '{}'", "head -c 3000000 /dev/zero", """echo '{"id": 1, "size": 99999999}'""", "echo '[[[[' ; sleep 60"],
)
def test_a_host_that_talks_nonsense_is_given_up(sshd: Sshd, owner: User, garbage: str) -> None:
    """A Python that starts nothing of ours, and prints what ours never would."""
    program = sshd.login.write(
        "liar",
        f"""\
        #!/bin/sh
        case "$2" in "import sys;"*) exit 0;; esac
        echo '{{"need": false}}'
        echo '{link.SENTINEL}'
        {garbage}
        """,
        0o755,
    )
    host = sshd.host(owner, env_python=str(program))
    assert problem(host, timeout=10).kind in (Host.Problem.UNUSABLE, Host.Problem.UNREACHABLE)


def test_an_error_of_a_host_is_a_file_that_is_missing_and_nothing_else(sshd: Sshd, owner: User) -> None:
    checked = keeper_module._checked(
        {"error": {"type": "HostProblem", "kind": "key_changed", "errno": "x", "message": "a\x1b[31m\nb" + "c" * 999}}
    )["error"]
    assert checked["type"] == "OSError"
    assert checked["errno"] is None
    assert "\x1b" not in checked["message"]
    assert len(checked["message"]) == 500
    with pytest.raises(ValueError, match="no run"):
        call(sshd.host(owner).pk, "status", run="../../etc")


# The collector's own life ---------------------------------------------------------------------------------------------


def test_without_a_collector_it_is_said_so(sshd: Sshd, owner: User, keeper: Keeper) -> None:
    host = sshd.host(owner)
    call(host.pk, "hello")
    keeper.stop()
    assert "collector" in problem(host).message
    said = problem(host)
    assert said.kind == Host.Problem.UNREACHABLE
    assert "collector is not running" in said.message
    another = Keeper()
    another.start()
    try:
        assert _answers(host)
        second = Keeper()
        with pytest.raises(RuntimeError, match="Another collector"):
            second.start()
    finally:
        hang_up()
        another.stop()


def test_a_thread_goes_on_with_the_collector_that_comes_after(sshd: Sshd, owner: User, keeper: Keeper) -> None:
    host = sshd.host(owner)
    call(host.pk, "hello")
    keeper.stop()
    another = Keeper()
    another.start()
    try:
        assert call(host.pk, "hello")[0]["user"] == sshd.login.name, "without an error in between"
    finally:
        hang_up()
        another.stop()


def test_a_database_that_is_away_is_no_end_of_the_keeper(
    sshd: Sshd, owner: User, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host = sshd.host(owner)

    def away(*_: Any, **__: Any) -> Any:
        raise OperationalError("no database")

    with monkeypatch.context() as without:
        without.setattr(Host.objects, "filter", away)
        said = problem(host)
        assert said.kind == Host.Problem.UNREACHABLE
        assert "database does not answer" in said.message
    assert _answers(host)
    with monkeypatch.context() as without:
        without.setattr(Host.objects, "filter", away)
        call(host.pk, "keeper.close")
        monkeypatch.setattr(keeper_module, "_read", _from(keeper_module._place(host, with_key=True)))
        assert _answers(host), "what cannot be noted is not missed"
        eventually(lambda: "could not be noted" in caplog.text)


def _from(place: link.Place) -> Callable[..., Any]:
    async def read(*_: Any, **__: Any) -> link.Place:
        return place

    return read


def test_a_host_that_was_deleted_is_not_reached(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner)
    pk = host.pk
    host.delete()
    host.pk = pk
    assert "deleted" in problem(host).message


def test_who_is_not_answered_in_time_is_told_so(sshd: Sshd, owner: User) -> None:
    host = sshd.host(owner, before="sleep 5")
    assert "within" in problem(host, timeout=0.5).message
    assert call(host.pk, "hello", timeout=60)[0]["user"] == sshd.login.name
    assert logins(sshd) == 1, "who went away has begun it"


def test_the_socket_is_the_sites_alone(keeper: Keeper) -> None:
    folder = Path(settings.KEEPER_SOCKET).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()
    assert Path(settings.KEEPER_SOCKET).stat().st_mode & 0o777 == 0o600


def test_the_clients_nonsense_is_no_end_of_the_keeper(sshd: Sshd, owner: User) -> None:
    for sent in (b"hello\n", b"x" * 3_000_000, b'{"size": -1}\n', b'{"host": null, "op": "hello"}\n', b"{}\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(settings.KEEPER_SOCKET))
            try:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except ConnectionError:
                pass
    assert _answers(sshd.host(owner))


def _answers(host: Host) -> bool:
    try:
        return bool(call(host.pk, "hello")[0]["user"])
    except HostProblem:
        return False


def _if(said: HostProblem, kind: str) -> HostProblem | None:
    return said if said.kind == kind else None
