"""A whole session with real machines, and then a search for every credential that was used: it is nowhere.

Three machines are added, each in another way, looked at and trained on, with wrong credentials and failures on the way.
Whatever that leaves behind is searched: database, queue, logs, run directories here and there, every response with its
headers, every log record and error page; in clear, in the encodings that text meets, and for pieces of private keys.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import logging
import re
import socket
import subprocess
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from django.conf import settings
from django.core import mail
from django.core.cache import cache
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.core.signals import got_request_exception
from django.db import connection
from django.test import Client

from accounts.models import User
from experiments import broker, credentials
from experiments.models import Experiment, Host, HostTask
from experiments.transport import client
from tests.experiments.test_forms import first_look
from tests.live import Live, eventually, settled, states
from tests.sshd import AS_ROOT, Sshd

# How a secret may look ------------------------------------------------------------------------------------------------


def disguises(secret: bytes) -> set[bytes]:
    """The forms in which `secret` is looked for."""
    forms = {secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()}
    for alphabet in (base64.b64encode, base64.urlsafe_b64encode):
        for shift in range(3):  # inside something longer it begins at any of three places
            found = alphabet(bytes(shift) + secret)
            forms.add(found[-(-shift * 8 // 6) : len(found) - 4 if len(found) > 24 else len(found)].rstrip(b"="))
    try:
        text = secret.decode()
    except UnicodeDecodeError:
        return forms
    texts = {
        quote(text),
        quote(text, safe=""),
        quote_plus(text),
        html.escape(text),
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        repr(text)[1:-1],
        text.encode("ascii", "xmlcharrefreplace").decode(),
    }
    return forms | {each.encode() for each in texts}


def pieces(pem: str) -> set[bytes]:
    """The private part of an ed25519 key in OpenSSH's format: itself, and any 20 characters of the file from it."""
    seed = bytes(load_ssh_private_key(pem.encode(), None).private_bytes_raw())  # type: ignore[union-attr]
    body = "".join(pem.split("\n")[1:-2])
    at = base64.b64decode(body).index(seed)
    first, last = at * 8 // 6 + 1, (at + len(seed)) * 8 // 6
    return disguises(seed) | {body[i : i + 20].encode() for i in range(first, last - 20)}


def locked_pieces(pem: str) -> set[bytes]:
    body = "".join(pem.split("\n")[1:-2])
    return {body[i : i + 20].encode() for i in range(len(body) - 170, len(body) - 20)}


def whole(pem: str) -> set[bytes]:
    return {pem.strip().encode(), pem.strip().replace("\n", "\r\n").encode(), json.dumps(pem.strip())[1:-1].encode()}


@pytest.mark.parametrize("wrapped", ["{}", "user:{}", "ab{}cd", "x{}"])
def test_the_search_finds_what_it_looks_for(wrapped: str) -> None:
    secret = "p&ss wörd/%?-of some length"
    around = wrapped.format(secret)
    for leak in (
        around.encode(),
        base64.b64encode(around.encode()),
        base64.urlsafe_b64encode(around.encode()),
        around.encode().hex().encode(),
        quote(around).encode(),
        quote_plus(around).encode(),
        json.dumps({"a": around}).encode(),
        html.escape(around).encode(),
        repr({"a": around}).encode(),
        repr(around.encode()).encode(),
    ):
        assert any(form in leak for form in disguises(secret.encode())), leak
    pem, public = credentials.new_pair("x")
    assert not any(form in public.encode() for form in pieces(pem)), "the public half is no secret"
    for leak in (pem, pem.replace("\n", ""), base64.b64encode(pem.encode()).decode()):
        assert any(form in leak.encode() for form in pieces(pem) | disguises(pem.encode())), leak


# What is searched -----------------------------------------------------------------------------------------------------


class Recorder(logging.Handler):
    """All that the site says: responses, log records, tracebacks, and the error pages that would be shown of them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[tuple[str, bytes]] = []

    def note(self, where: str, what: bytes | str) -> None:
        self.said.append((where, what.encode(errors="surrogateescape") if isinstance(what, str) else what))

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter().format(record)  # with the traceback
        self.note(f"log record of {record.name}", f"{text} {record.args!r}")

    def exception(self, **_: Any) -> None:
        self.note("traceback", traceback.format_exc())


class Browser(Client):
    """A client whose every answer is noted."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(raise_request_exception=False)
        self.recorder = recorder

    def request(self, **request: Any) -> Any:
        response = super().request(**request)
        body = b"".join(response) if response.streaming else response.content  # type: ignore[attr-defined]
        if response.streaming:
            response.streaming_content = iter([body])  # type: ignore[attr-defined]
        where = f"response to {request.get('REQUEST_METHOD')} {request.get('PATH_INFO')}"
        self.recorder.note(where, f"{response.headers!r} {response.cookies.output()}")
        self.recorder.note(where, body)
        return response


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    loggers = [
        logging.getLogger(name) for name in ("", "django", "django.request", "experiments", "accounts", "rq.worker")
    ]
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(recorder)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    got_request_exception.connect(recorder.exception)
    yield recorder
    got_request_exception.disconnect(recorder.exception)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    loggers[0].removeHandler(recorder)


def database() -> Iterator[tuple[str, bytes]]:
    if connection.vendor == "sqlite":
        for end in ("", "-wal", "-shm"):
            path = Path(f"{connection.settings_dict['NAME']}{end}")
            if path.exists():
                yield f"database file {path.name}", path.read_bytes()
        return
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names():
            cursor.execute(f'SELECT t::text FROM "{table}" t')
            yield f"table {table}", "\n".join(row[0] for row in cursor.fetchall()).encode()


def redis() -> Iterator[tuple[str, bytes]]:
    """Every key, read by its kind: jobs are kept compressed."""
    server = broker.connection()
    read: dict[str, Callable[[bytes], Any]] = {
        "hash": server.hgetall,
        "list": lambda key: server.lrange(key, 0, -1),
        "set": server.smembers,
        "zset": lambda key: server.zrange(key, 0, -1),
        "string": server.get,
        "stream": server.xrange,
    }

    def flat(value: Any) -> Iterator[bytes]:
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, list | set | tuple):
            for each in value:
                yield from flat(each)
        elif isinstance(value, bytes):
            yield value
            with contextlib.suppress(zlib.error):
                yield zlib.decompress(value)

    for key in server.scan_iter():
        yield f"redis key {key!r}", key + b"\n" + b"\n".join(flat(read[server.type(key).decode()](key)))


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path != settings.CREDENTIAL_KEYS_FILE:
            yield f"file {path}", path.read_bytes()


def processes(pids: list[int]) -> Iterator[tuple[str, bytes]]:
    """Command lines and environments, which others of the machine may read."""
    for pid in pids:
        for what in ("cmdline", "environ"):
            try:
                yield f"{what} of process {pid}", Path(f"/proc/{pid}/{what}").read_bytes()
            except OSError:
                continue


# The session ----------------------------------------------------------------------------------------------------------

SIGN_IN = "kettle & brink-42 of ada"
PASSPHRASE = "öpen / sesame? & 7 more%"
WRONG = "a wrong pass/phrase & more%"


class Session:
    def __init__(self, browser: Browser, sshd: Sshd) -> None:
        self.browser = browser
        self.sshd = sshd

    def get(self, path: str, status: int = 200) -> str:
        response = self.browser.get(path)
        assert response.status_code == status, (path, response.status_code)
        return str(response.content.decode())

    def post(self, path: str, data: dict[str, Any], status: int = 302) -> str:
        response = self.browser.post(path, data)
        assert response.status_code == status, (path, response.status_code, response.content.decode()[:3000])
        return str(response.content.decode())

    def add(self, name: str) -> Host:
        """Give its place, and confirm its key."""
        where = {"name": name, "address": "127.0.0.1", "port": str(self.sshd.port), "username": self.sshd.login.name}
        how = {"folder": "kangaroo", "python": self.sshd.python, "before": self.sshd.lines()}
        self.post("/hosts/add/", where | how)
        host: Host = Host.objects.get(name=name)
        shown = self.get(f"/hosts/{host.pk}/confirm/")
        fingerprint = credentials.fingerprint(self.sshd.host_key)
        assert fingerprint in shown
        self.post(f"/hosts/{host.pk}/confirm/", {"fingerprint": fingerprint})
        self.get(f"/hosts/{host.pk}/credential/")
        return host

    def looked_at(self, host: Host) -> Host:
        def ended() -> HostTask | None:
            return host.tasks.exclude(state__in=["wanted", "running"]).first()

        task = eventually(ended, 120, what="for the end of the look")
        assert task.state == "succeeded", task.steps
        shown: Host = Host.objects.get(pk=host.pk)
        assert shown.is_ready
        return shown

    def look_at_every_page(self, host: Host) -> None:
        for page in ("", "edit/", "confirm/", "credential/", "delete/"):
            self.get(f"/hosts/{host.pk}/{page}")

    def train(self, host: Host) -> Experiment:
        self.post("/train/", first_look(host=str(host.pk)))
        experiment: Experiment = Experiment.objects.latest("created")
        assert {run.host for run in experiment.runs.all()} == {host}
        return experiment


def keeper_listens() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(settings.KEEPER_SOCKET)) == 0


def a_locked_key() -> tuple[str, str, bytes]:
    """A key of one's own: its text, its public line, and what it is made of."""
    key = ed25519.Ed25519PrivateKey.generate()
    lock = BestAvailableEncryption(PASSPHRASE.encode())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, lock).decode()
    return text, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(), key.private_bytes_raw()


@pytest.mark.skipif(not AS_ROOT, reason="sshd checks the passwords of others only as root")
def test_no_credential_is_found_anywhere_after_a_whole_session(
    live: Live, sshd: Sshd, recorder: Recorder, settings: Any
) -> None:
    settings.DEBUG = True  # error pages that tell as much as there is to tell, and every query in the log
    cache.clear()
    owner = User.objects.create_user("ada@example.org", SIGN_IN, is_staff=True, is_superuser=True)
    browser = Browser(recorder)
    session = Session(browser, sshd)
    collector = live.start("collect", LOG_LEVEL="DEBUG")
    worker = live.start("work", LOG_LEVEL="DEBUG")
    eventually(keeper_listens, what="for the collector")
    session.post("/accounts/login/", {"login": owner.email, "password": SIGN_IN})

    # A key that is made here; its line is pasted on the machine.
    generated = session.add("generated")
    command = html.unescape(session.get(f"/hosts/{generated.pk}/credential/"))
    generated.refresh_from_db()
    assert credentials.install_command(generated) in command
    pasted = ["setpriv", f"--reuid={sshd.login.uid}", f"--regid={sshd.login.gid}", "--clear-groups", "sh"]
    home = {"HOME": str(sshd.login.home), "PATH": "/usr/bin:/bin"}
    text = credentials.install_command(generated) + "\n"
    subprocess.run(pasted, input=text, text=True, env=home, cwd="/", check=True)
    session.post(f"/hosts/{generated.pk}/credential/", {"way": "line"})
    session.looked_at(generated)

    # A password, used once to put that line there; a wrong one first.
    by_password = session.add("by-password")
    way = f"/hosts/{by_password.pk}/credential/"
    session.post(way, {"way": "password", "password": WRONG}, 422)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(client, "_is_open", lambda: 1 / 0)  # a mistake of our own, with the password under way
        assert "ZeroDivisionError" in session.post(way, {"way": "password", "password": sshd.login.password}, 500)
    session.post(way, {"way": "password", "password": sshd.login.password})
    session.looked_at(by_password)

    # A key of one's own: with a wrong passphrase, as a public key, while the ring is broken, and then well.
    own_key, own_public, own_seed = a_locked_key()
    with sshd.authorized.open("a") as file:
        file.write(f"{own_public}\n")
    own = session.add("own")
    before = own.private_key.reveal(own) if (own := Host.objects.get(pk=own.pk)).private_key else ""
    way = f"/hosts/{own.pk}/credential/"
    session.post(way, {"way": "own", "private_key": own_key, "passphrase": WRONG}, 422)
    session.post(way, {"way": "own", "private_key": own_key[:200], "passphrase": PASSPHRASE}, 422)
    session.post(way, {"way": "own", "private_key": own_public, "passphrase": PASSPHRASE}, 422)
    settings.CREDENTIAL_KEYS = ["no key at all"]
    page = session.post(way, {"way": "own", "private_key": own_key, "passphrase": PASSPHRASE}, 500)
    assert "KeyRingError" in page
    assert "Traceback" in page
    settings.CREDENTIAL_KEYS = []
    file = SimpleUploadedFile("id_ed25519", own_key.encode())
    session.post(way, {"way": "own", "file": file, "passphrase": PASSPHRASE})
    session.looked_at(own)

    # Training on each of them, and everything that can be looked at.
    hosts = [generated, by_password, own]
    experiments = [session.train(host) for host in hosts]
    running = list(processes([collector.pid, worker.pid, *sshd.login.processes()]))
    for host in hosts:
        session.look_at_every_page(host)
        for page in ("change", "history"):
            session.get(f"/admin/experiments/host/{host.pk}/{page}/")
    for experiment in experiments:
        eventually(lambda experiment=experiment: settled(experiment), 120, what="for the end of training")
        assert {state for state, _ in states(experiment).values()} == {"succeeded"}, states(experiment)
        session.get(f"/experiments/{experiment.pk}/")
        session.get(f"/experiments/{experiment.pk}/small/log/")
        session.get(f"/experiments/{experiment.pk}/spec.json")
    for path in (
        "/hosts/",
        "/profile/",
        "/train/",
        "/admin/experiments/host/",
        "/admin/experiments/hosttask/",
        "/admin/",
    ):
        session.get(path)
    running += processes([collector.pid, worker.pid, *sshd.login.processes()])
    for options in (("--new-key",), ("--drop-old",)):
        out = io.StringIO()
        call_command("rotate_credentials", *options, stdout=out, stderr=out)
        recorder.note("rotation", out.getvalue())
    out = io.StringIO()
    call_command("dumpdata", "accounts", "experiments", "mfa", "sessions", stdout=out)
    recorder.note("dumpdata", out.getvalue())

    # The machine is not let in any more, and another one answers in its place.
    sshd.revoke_all()
    sshd.new_host_key()
    sshd.start()
    session.post(f"/hosts/{own.pk}/look/", {})
    eventually(lambda: own.tasks.filter(state="failed").exists(), 120, what="for the failed look")
    session.get(f"/hosts/{own.pk}/")
    kept = Host.objects.get(pk=own.pk)
    assert kept.private_key.reveal(kept) == own_key
    assert kept.passphrase.reveal(kept) == PASSPHRASE
    made = [host.private_key.reveal(host) for host in Host.objects.filter(name__in=["generated", "by-password"])]

    never: dict[str, set[bytes]] = {
        "the sign-in password": disguises(SIGN_IN.encode()),
        "the password": disguises(sshd.login.password.encode()),
        "the passphrase": disguises(PASSPHRASE.encode()),
        "a wrong password": disguises(WRONG.encode()),
        "the key of one's own": whole(own_key) | locked_pieces(own_key) | disguises(own_seed),
    }
    for number, pem in enumerate([*made, *([before] if before else [])]):
        never[f"generated key {number}"] = whole(pem) | pieces(pem)
    found = [
        (where, name)
        for places in (recorder.said, database(), redis(), files(settings.VAR), files(live.folder), running)
        for where, what in places
        for name, forms in never.items()
        if any(form in what for form in forms)
    ]
    found += [
        (where, name)
        for where, what in files(sshd.login.home)
        for name, forms in never.items()
        if any(form in what for form in forms)
    ]
    found += [
        ("mail", name)
        for name, forms in never.items()
        for each in mail.outbox
        if any(f in each.body.encode() for f in forms)
    ]
    assert not found
    assert any(where.startswith("log record of django.db") for where, _ in recorder.said), "queries were recorded"
    assert b"DEBUG" in b"".join(what for _, what in files(live.folder)), "the collector told what it had to tell"
    assert sum("response" in where for where, _ in recorder.said) > 60
    assert re.search(rb"f1:gAAAA", b"".join(what for _, what in database())), "what is stored was searched"
