"""Credentials at rest: where their clear text is not found, what opens them, and the keys that people bring."""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import pickle
import pprint
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncssh
import pytest
from cryptography.fernet import Fernet
from django.core import serializers
from django.core.checks import run_checks
from django.core.exceptions import FieldError
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.db.models import Case, F, Value, When
from django.db.models.functions import Concat, Upper
from django.forms import modelform_factory
from django.forms.models import model_to_dict
from django.template import Context, Template
from django.test import RequestFactory
from django.views.debug import technical_500_response

from accounts.ring import KeyRingError
from experiments import credentials
from experiments.credentials import Secret, Tampered
from experiments.models import Host
from tests.experiments.factories import make_user

CLEAR = "-----BEGIN never shown clear text END-----"
OTHER = "another clear text"

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def ring(settings: Any, tmp_path: Path) -> Path:
    settings.CREDENTIAL_KEYS = []
    folder = tmp_path / "var"
    folder.mkdir()
    settings.CREDENTIAL_KEYS_FILE = folder / "credential-keys"
    return folder / "credential-keys"


@pytest.fixture
def host() -> Host:
    return make_host()


def make_host(name: str = "workstation", **more: Any) -> Host:
    owner = make_user(f"{name}@example.org")
    more = {"private_key": CLEAR, "passphrase": OTHER} | more
    return Host.objects.create(name=name, kind=Host.Kind.SSH, owner=owner, **more)


def again(host: Host) -> Host:
    return Host.objects.get(pk=host.pk)


def column(host: Host, name: str = "private_key") -> str:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {name} FROM experiments_host WHERE id = %s", [host.pk])
        return str(cursor.fetchone()[0])


def put(host: Host, text: str, name: str = "private_key") -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE experiments_host SET {name} = %s WHERE id = %s", [text, host.pk])


def keys(ring: Path) -> list[str]:
    return ring.read_text().split()


def rotate(*options: str) -> tuple[str, str]:
    out, err = StringIO(), StringIO()
    call_command("rotate_credentials", *options, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue()


def messages(*, database: bool = False) -> dict[str, str]:
    found = run_checks(databases=["default"] if database else None)
    return {message.id or "": f"{message.msg} {message.hint}" for message in found}


# The field ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_again_and_stands_encrypted_in_the_database(host: Host) -> None:
    assert column(host).startswith("f1:")
    assert CLEAR not in column(host)
    assert again(host).private_key.reveal(host) == CLEAR
    assert again(host).passphrase.reveal(host) == OTHER


def test_nothing_stored_is_false_and_needs_no_ring(ring: Path) -> None:
    host = make_host(private_key="", passphrase="")
    assert not host.private_key
    assert again(host).private_key.reveal(host) == ""
    assert column(host) == ""
    assert not ring.exists()


def test_an_instance_holds_a_secret_from_the_assignment_on_and_opens_it_before_it_is_saved() -> None:
    host = Host(name="new", private_key=CLEAR)
    assert isinstance(host.private_key, Secret)
    host.passphrase = OTHER
    assert isinstance(host.passphrase, Secret)
    assert host.private_key.reveal(host) == CLEAR
    assert host.passphrase.reveal(host) == OTHER
    assert CLEAR not in str(vars(host))


def test_the_same_text_is_never_the_same_ciphertext() -> None:
    assert column(make_host("one")) != column(make_host("two"))


def test_text_that_looks_like_ciphertext_is_encrypted_all_the_same(host: Host) -> None:
    host.private_key = "f1:looks like it"
    host.save()
    assert again(host).private_key.reveal(host) == "f1:looks like it"


def test_ciphertext_moved_to_another_row_is_refused(host: Host) -> None:
    other = make_host("other")
    put(other, column(host))
    with pytest.raises(Tampered, match="another field or row"):
        again(other).private_key.reveal(other)
    other.private_key = host.private_key  # in memory it is the same
    with pytest.raises(Tampered):
        other.private_key.reveal(other)


def test_ciphertext_moved_to_another_field_is_refused(host: Host) -> None:
    put(host, column(host, "passphrase"))
    with pytest.raises(Tampered, match="another field or row"):
        again(host).private_key.reveal(host)
    with pytest.raises(TypeError):
        host.private_key = host.passphrase


def test_a_rows_ciphertext_does_not_open_under_a_new_identity(host: Host) -> None:
    host.identity = uuid4()
    with pytest.raises(Tampered):
        host.private_key.reveal(host)


def test_clear_text_in_the_column_and_changed_ciphertext_are_refused(host: Host) -> None:
    stored = column(host)
    put(host, CLEAR)
    with pytest.raises(Tampered, match="not encrypted"):
        again(host).private_key.reveal(host)
    put(host, stored[:60] + ("A" if stored[60] != "A" else "B") + stored[61:])
    with pytest.raises(KeyRingError, match="no key of the ring opens"):
        again(host).private_key.reveal(host)


def test_a_secret_shows_itself_nowhere(host: Host) -> None:
    secret = host.private_key
    stored = column(host)
    for shown in (
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>30}",
        f"{secret!r}",
        "%s %r" % (secret, secret),  # noqa: UP031
        pprint.pformat(vars(host)),
        repr(copy.copy(secret)),
        repr(copy.deepcopy(host).private_key),
        repr(list(Host.objects.values())),
        repr(list(Host.objects.values_list("private_key", "passphrase"))),
        repr(dir(secret)),
        repr(model_to_dict(host)),
        Template("{{ host.private_key }} {{ host.private_key.reveal }} {{ host.passphrase|length }}").render(
            Context({"host": host})
        ),
    ):
        assert CLEAR not in shown
        assert stored not in shown
    with pytest.raises(TypeError):
        json.dumps(secret)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(host, protocol)
    with pytest.raises(TypeError):
        vars(secret)


def test_a_deep_copy_opens_too(host: Host) -> None:
    twin = copy.deepcopy(host)
    assert twin.private_key.reveal(twin) == CLEAR


def test_deferred_and_refreshed_secrets_are_secrets(host: Host) -> None:
    row = Host.objects.defer("private_key").get(pk=host.pk)
    assert row.private_key.reveal(row) == CLEAR
    row = Host.objects.only("private_key").get(pk=host.pk)
    assert row.private_key.reveal(row) == CLEAR
    row.refresh_from_db(fields=["private_key"])
    assert row.private_key.reveal(row) == CLEAR


def test_a_dump_holds_ciphertext_and_can_be_loaded_again(host: Host) -> None:
    for format in ("json", "xml", "jsonl"):
        dump = serializers.serialize(format, [host])
        assert CLEAR not in dump
        assert OTHER not in dump
        again(host).delete()
        for loaded in serializers.deserialize(format, dump):
            loaded.save()
        assert again(host).private_key.reveal(host) == CLEAR
    out = StringIO()
    call_command("dumpdata", "experiments.Host", stdout=out)
    assert CLEAR not in out.getvalue()


def test_no_form_shows_or_takes_it(host: Host) -> None:
    assert "private_key" not in modelform_factory(Host, fields="__all__", exclude=())(instance=host).fields
    with pytest.raises(FieldError):
        modelform_factory(Host, fields=["private_key"])
    host.full_clean()
    assert host.private_key.reveal(host) == CLEAR


@pytest.mark.parametrize(
    "lookup",
    ["contains", "icontains", "startswith", "regex", "iexact", "in", "gt", "length", "range"],
)
def test_its_text_cannot_be_searched(lookup: str) -> None:
    with pytest.raises(FieldError):
        Host.objects.filter(**{f"private_key__{lookup}": [CLEAR]}).exists()


def test_it_can_be_asked_whether_something_is_stored_and_whether_it_is_still_the_same(host: Host) -> None:
    empty = make_host("empty", private_key="")
    assert list(Host.objects.filter(private_key="")) == [empty]
    assert list(Host.objects.exclude(private_key="").filter(private_key__isnull=False)) == [host]
    assert Host.objects.filter(private_key=host.private_key).get() == host
    with pytest.raises(TypeError, match="is encrypted") as refused:
        Host.objects.filter(private_key=CLEAR).exists()
    assert CLEAR not in str(refused.value)
    with pytest.raises(TypeError):
        Host.objects.filter(private_key=host.passphrase).exists()


@pytest.mark.parametrize(
    "value",
    [
        CLEAR,
        Value(CLEAR),
        Concat(Value("a"), Value(CLEAR)),
        Upper(Value(CLEAR)),
        Case(When(name="x", then=Value(CLEAR)), default=F("private_key")),
    ],
)
def test_an_update_takes_no_clear_text(host: Host, value: Any) -> None:
    stored = column(host)
    with pytest.raises(TypeError, match="is encrypted") as refused, transaction.atomic():
        Host.objects.update(private_key=value)
    assert CLEAR not in str(refused.value)
    assert column(host) == stored
    with pytest.raises(TypeError):
        host.private_key = Value(CLEAR)  # type: ignore[assignment]


def test_an_update_can_empty_it_or_put_a_secret_of_the_row_back(host: Host) -> None:
    Host.objects.update(private_key="")
    assert not again(host).private_key
    Host.objects.filter(pk=host.pk).update(private_key=host.private_key)
    assert again(host).private_key.reveal(host) == CLEAR


def test_rows_made_and_changed_in_bulk_are_encrypted_each_for_itself() -> None:
    owner = make_user()
    hosts = Host.objects.bulk_create(
        [Host(name=f"h{n}", kind=Host.Kind.SSH, owner=owner, private_key=CLEAR) for n in range(3)]
    )
    assert len({column(host) for host in hosts}) == 3
    assert not any(CLEAR in column(host) for host in hosts)
    for number, host in enumerate(hosts):
        host.private_key = f"{CLEAR} {number}"
    Host.objects.bulk_update(hosts, ["private_key"])
    for number, host in enumerate(hosts):
        assert CLEAR not in column(host)
        assert again(host).private_key.reveal(host) == f"{CLEAR} {number}"


def test_get_or_create_and_update_or_create_encrypt() -> None:
    for more in ({"private_key": CLEAR}, {"private_key": OTHER}):
        host, _ = Host.objects.update_or_create(name="n", defaults=more)
        assert column(host).startswith("f1:")
    assert again(host).private_key.reveal(host) == OTHER


# Error pages and logs -------------------------------------------------------------------------------------------------


def _fails(host: Host, **clear: Any) -> None:
    box = host.private_key
    private_key = box.reveal(host)
    data = {"name": "n", "private_key": private_key, "nested": {"passphrase": OTHER}}
    raise RuntimeError("something went wrong", len(data))


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("accept", ["text/html", "text/plain"])
def test_no_error_page_shows_a_credential(host: Host, settings: Any, debug: bool, accept: str) -> None:
    settings.DEBUG = debug
    data = {"private_key": CLEAR, "passphrase": OTHER, "password": CLEAR, "name": "name of the box"}
    request = RequestFactory().post("/hosts/new/", data, headers={"accept": accept})
    try:
        _fails(host, private_key=CLEAR, password=CLEAR)
    except RuntimeError:
        page = technical_500_response(request, *sys.exc_info()).content.decode()
    assert "something went wrong" in page
    if accept == "text/html":
        assert "&lt;secret&gt;" in page, "the frame's variables are there"
        assert "name of the box" in page
    for text in (CLEAR, OTHER, column(host)):
        assert text not in page


def test_a_failure_while_encrypting_shows_nothing_either(host: Host, settings: Any, ring: Path) -> None:
    settings.DEBUG = True
    ring.unlink()
    request = RequestFactory().get("/")
    for fails in (
        lambda: setattr(host, "private_key", OTHER),
        lambda: Host(private_key=OTHER),
        lambda: host.passphrase.reveal(host),
        lambda: Host.objects.create(name="n", private_key=OTHER),
    ):
        try:
            fails()
        except KeyRingError:
            error = sys.exc_info()
        page = technical_500_response(request, *error).content.decode()
        assert "credential-keys is gone" in page
        assert OTHER not in page


def test_a_log_record_with_a_host_shows_nothing(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").error("%s %r %s", host, host.private_key, vars(host))
    assert "<secret>" in caplog.text
    assert CLEAR not in caplog.text
    assert column(host) not in caplog.text


# The ring -------------------------------------------------------------------------------------------------------------


def test_the_ring_is_made_with_the_first_secret_and_is_this_users_alone(ring: Path, host: Host) -> None:
    assert stat.S_IMODE(ring.stat().st_mode) == 0o600
    assert [len(key) for key in keys(ring)] == [44]
    assert sorted(path.name for path in ring.parent.iterdir()) == ["credential-keys"], "nothing is left beside it"


def test_a_ring_of_other_keys_opens_nothing_and_says_so(ring: Path, host: Host) -> None:
    key = keys(ring)[0]
    ring.write_text(Fernet.generate_key().decode())
    with pytest.raises(KeyRingError, match=r"no key of the ring opens experiments\.Host\.private_key") as refused:
        again(host).private_key.reveal(host)
    assert refused.value.__suppress_context__
    assert key not in str(refused.value)
    assert "1 of" not in messages()
    found = messages(database=True)["experiments.E004"]
    assert f"2 of the stored credentials cannot be opened with the key ring: private_key of host {host.pk}" in found
    again(host).save()  # everything else of the row can be saved meanwhile
    ring.write_text(key)
    assert again(host).private_key.reveal(host) == CLEAR


def test_a_lost_ring_is_not_replaced_silently(ring: Path, host: Host) -> None:
    key = ring.read_text()
    ring.unlink()
    for use in (lambda: again(host).private_key.reveal(host), lambda: make_host("another")):
        with pytest.raises(KeyRingError, match=r"is gone.*Put the file back.*--forget-unreadable"):
            use()
    assert "is gone" in messages(database=True)["experiments.E003"]
    with pytest.raises(CommandError, match=r"is gone"):
        rotate("--new-key")
    assert not ring.exists()
    ring.write_text(key)
    ring.chmod(0o600)
    assert again(host).private_key.reveal(host) == CLEAR
    assert not messages(database=True)


def test_after_a_loss_the_unreadable_can_be_forgotten(ring: Path, host: Host) -> None:
    ring.unlink()
    out, _ = rotate("--forget-unreadable")
    assert "2 that could not be opened forgotten" in out
    assert not again(host).private_key
    assert make_host("another").private_key
    assert not messages(database=True)


def test_forgetting_leaves_what_can_be_opened_and_takes_what_was_moved(host: Host) -> None:
    other = make_host("other")
    put(other, column(host))
    assert f"private_key of host {other.pk}" in messages(database=True)["experiments.E004"]
    out, _ = rotate("--forget-unreadable")
    assert "1 that could not be opened forgotten" in out
    assert not again(other).private_key
    assert again(host).private_key.reveal(host) == CLEAR


def test_keys_from_the_environment_come_first_and_make_no_file(ring: Path, settings: Any) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    settings.CREDENTIAL_KEYS = [old]
    host = make_host()
    settings.CREDENTIAL_KEYS = [new, old]
    assert again(host).private_key.reveal(host) == CLEAR
    assert "2 credentials encrypted anew" in rotate()[0]
    settings.CREDENTIAL_KEYS = [new]
    assert again(host).private_key.reveal(host) == CLEAR
    assert not ring.exists()
    for option in ("--new-key", "--drop-old"):
        with pytest.raises(CommandError, match="CREDENTIAL_KEYS, which only you can change"):
            rotate(option)


@pytest.mark.parametrize("key", ["short", "x" * 44, "é" * 44, "=" * 44, ""])
def test_a_malformed_ring_says_which_key_and_not_what_it_holds(ring: Path, settings: Any, key: str) -> None:
    good = Fernet.generate_key().decode()
    settings.CREDENTIAL_KEYS = [good, key]
    assert "Key 2 of CREDENTIAL_KEYS" in (found := messages()["experiments.E002"])
    assert good not in found
    assert not key or key not in found
    settings.CREDENTIAL_KEYS = []
    ring.write_text(f"{good}\n{key}\n")
    ring.chmod(0o600)
    found = messages()
    assert ("experiments.E002" in found) is bool(key)
    assert good not in str(found)


def test_an_empty_ring_is_an_error(ring: Path) -> None:
    ring.write_text("\n")
    ring.chmod(0o600)
    assert "holds no key" in messages()["experiments.E002"]


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_ring_that_others_may_read_is_an_error_in_every_mode(
    ring: Path, host: Host, settings: Any, debug: bool, mode: int
) -> None:
    settings.DEBUG = debug
    assert not messages()
    ring.chmod(mode)
    found = messages()["experiments.E001"]
    assert f"mode {mode:o}" in found
    assert f"chmod 600 {ring}" in found
    assert keys(ring)[0] not in found


def test_a_check_makes_no_ring(ring: Path) -> None:
    assert not messages(database=True)
    assert not ring.exists()


def test_a_ring_that_cannot_be_read_says_why(ring: Path, host: Host) -> None:
    ring.unlink()
    ring.mkdir(mode=0o700)
    with pytest.raises(KeyRingError, match="cannot be read: Is a directory"):
        host.private_key.reveal(host)


def test_many_who_make_the_ring_at_once_share_one(ring: Path) -> None:
    code = (
        "import sys, pathlib; from django.conf import settings;"
        "settings.configure(CREDENTIAL_KEYS=[], CREDENTIAL_KEYS_FILE=pathlib.Path(sys.argv[1]));"
        "from accounts.ring import keys; print(keys())"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", code, str(ring)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert len({maker.communicate()[0] for maker in makers}) == 1
    assert len(keys(ring)) == 1


# Rotation -------------------------------------------------------------------------------------------------------------


def test_rotation_makes_a_key_and_encrypts_everything_with_it(ring: Path, host: Host) -> None:
    others = [make_host(f"h{n}", passphrase="") for n in range(3)]
    (old,) = keys(ring)
    before = column(host)
    out, err = rotate("--new-key")
    assert "5 credentials encrypted anew" in out
    new, kept = keys(ring)
    assert kept == old
    assert stat.S_IMODE(ring.stat().st_mode) == 0o600
    assert not {old, new} & set(f"{out} {err}".split())
    assert column(host) != before
    ring.write_text(new)
    for each in (host, *others):
        assert again(each).private_key.reveal(each) == CLEAR
    assert "0 credentials" in rotate()[0], "what is encrypted with the newest is left"


def test_old_keys_are_dropped_once_nothing_needs_them(ring: Path, host: Host) -> None:
    rotate("--new-key")
    rotate("--new-key")
    assert len(keys(ring)) == 3
    newest = keys(ring)[0]
    assert "2 older keys dropped" in rotate("--drop-old")[0]
    assert keys(ring) == [newest]
    assert again(host).private_key.reveal(host) == CLEAR


def test_no_key_is_dropped_while_something_cannot_be_opened(ring: Path, host: Host) -> None:
    put(host, "f1:nonsense", "passphrase")
    with pytest.raises(CommandError, match="no key was dropped"):
        rotate("--new-key", "--drop-old")
    assert len(keys(ring)) == 2
    assert again(host).private_key.reveal(host) == CLEAR


def test_a_credential_that_is_changed_meanwhile_is_not_lost(
    ring: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = Secret.renewed
    stale = [*keys(ring)]

    def slowly(secret: Secret, with_keys: list[str]) -> Secret:
        if stale and with_keys[0] not in stale:  # its owner stores another one, in a process with the old ring
            stale.clear()
            mine = again(host)
            mine.private_key = "newer"
            put(host, mine.private_key._stored)
        return renewed(secret, with_keys)

    monkeypatch.setattr(Secret, "renewed", slowly)
    rotate("--new-key")
    assert again(host).private_key.reveal(host) == "newer"


def test_a_row_read_before_a_rotation_does_not_bring_the_old_key_back(ring: Path, host: Host) -> None:
    stale = again(host)
    rotate("--new-key")
    stale.name = "renamed"
    stale.save()
    newest = keys(ring)[0]
    ring.write_text(newest)
    assert again(host).private_key.reveal(host) == CLEAR
    assert again(host).name == "renamed"


# Key pairs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """A key as ssh-keygen makes it: its text, and fingerprint."""
    folder = tmp_path_factory.mktemp("keys")

    def make(*options: str, passphrase: str = "") -> tuple[str, str]:
        name = folder / uuid4().hex
        command = ["ssh-keygen", "-q", "-N", passphrase, "-C", "somebody@somewhere", "-f", str(name), *options]
        subprocess.run(command, check=True, capture_output=True)
        told = subprocess.run(["ssh-keygen", "-lf", f"{name}.pub"], check=True, capture_output=True, text=True)
        return name.read_text(), told.stdout.split()[1]

    return make


KINDS = [
    ("-t", "ed25519"),
    ("-t", "rsa", "-b", "2048"),
    ("-t", "rsa", "-b", "3072", "-m", "PEM"),
    ("-t", "rsa", "-b", "2048", "-m", "PKCS8"),
    ("-t", "ecdsa", "-b", "256"),
    ("-t", "ecdsa", "-b", "384", "-m", "PEM"),
    ("-t", "ecdsa", "-b", "521", "-m", "PKCS8"),
]


@pytest.mark.parametrize("options", KINDS, ids=" ".join)
def test_a_private_key_of_ones_own_is_read_with_the_line_of_its_public_one(made: Any, options: Any) -> None:
    text, fingerprint = made(*options)
    for pasted in (text, text.replace("\n", "\r\n"), f"\n  {text}\n\n", text.strip(), text.replace("\n", "  \n")):
        pem, line = credentials.read_private_key(pasted, "not needed")
        assert credentials.fingerprint(line) == fingerprint
        assert asyncssh.import_private_key(pem).get_fingerprint() == fingerprint


@pytest.mark.parametrize("options", [kind for kind in KINDS if "PKCS8" not in kind], ids=" ".join)
def test_a_locked_key_wants_its_passphrase(made: Any, options: Any) -> None:
    text, fingerprint = made(*options, passphrase="open sesame")
    with pytest.raises(ValueError, match=r"^Passphrase: this key is locked; give its passphrase"):
        credentials.read_private_key(text)
    with pytest.raises(ValueError, match=r"^Passphrase: it does not open this key") as refused:
        credentials.read_private_key(text, "open barley")
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
    pem, line = credentials.read_private_key(text, "open sesame")
    assert credentials.fingerprint(line) == fingerprint
    assert asyncssh.import_private_key(pem, "open sesame").get_fingerprint() == fingerprint


def test_a_key_that_would_take_minutes_to_unlock_is_not_tried(made: Any) -> None:
    text, _ = made("-t", "ed25519", "-a", "1", passphrase="open sesame")
    credentials.read_private_key(text, "open sesame")
    body = "".join(text.splitlines()[1:-1])
    blob = bytearray(base64.b64decode(body))
    at = blob.index(b"\0\0\0\x10", 30) + 20  # after the salt of 16 bytes
    assert blob[at : at + 4] == b"\0\0\0\x01"
    blob[at : at + 4] = b"\0\xff\xff\xff"
    slow = (
        "-----BEGIN OPENSSH PRIVATE KEY-----\n"
        + base64.b64encode(blob).decode()
        + "\n-----END OPENSSH PRIVATE KEY-----"
    )
    with pytest.raises(ValueError, match=r"^Private key: it is locked with 16777215 rounds"):
        credentials.read_private_key(slow, "open sesame")
    pkcs8, _ = made("-t", "rsa", "-b", "2048", "-m", "PKCS8", passphrase="open sesame")
    with pytest.raises(ValueError, match=r"^Private key: this file is locked in the PKCS #8 format"):
        credentials.read_private_key(pkcs8, "open sesame")


DSA = """-----BEGIN DSA PRIVATE KEY-----
MIIBuwIBAAKBgQD9f1OBHXUSKVLfSpwu7OTn9hG3UjzvRADDHj+AtlEmaUVdQCJR
-----END DSA PRIVATE KEY-----
"""
BROKEN = """-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZWQyNTUx
-----END OPENSSH PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Private key: paste the whole file"),
        ("hunter2 is my password", "Private key: paste the whole file"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "Private key: paste the whole file"),
        ("x" * 30_000, "Private key: paste the whole file"),
        ("ssh-ed25519 AAAAC3Nza somebody", "Private key: this is a public key"),
        ("ecdsa-sha2-nistp256 AAAAC3Nza somebody", "Private key: this is a public key"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "Private key: this is a public key"),
        ("---- BEGIN SSH2 PUBLIC KEY ----\nAAAA", "Private key: this is a public key"),
        (
            "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none",
            r"Private key: this is a PuTTY key .*puttygen key\.ppk",
        ),
        (DSA, "Private key: DSA keys are not secure"),
        (BROKEN, "Private key: it is damaged"),
        (BROKEN.replace("OPENSSH", "RSA"), "Private key: it is damaged"),
        (BROKEN.replace("b3B", "***"), "Private key: it is damaged"),
        (BROKEN.replace("OPENSSH", "EC"), "Private key: it is damaged"),
    ],
)
def test_what_is_no_private_key_is_refused_in_a_sentence_that_names_the_field(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as refused:
        credentials.read_private_key(text, "a passphrase")
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None or refused.value.__suppress_context__
    assert "hunter2" not in str(refused.value)
    assert "AAAA" not in str(refused.value)


def test_short_rsa_keys_and_kinds_that_ssh_does_not_know_are_refused(made: Any) -> None:
    with pytest.raises(ValueError, match=r"^Private key: an RSA key of 1024 bits is too short; 2048 is the least"):
        credentials.read_private_key(made("-t", "rsa", "-b", "1024")[0])
    for kind in (["ED448"], ["EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"]):
        text = subprocess.run(["openssl", "genpkey", "-algorithm", *kind], check=True, capture_output=True, text=True)
        with pytest.raises(ValueError, match=r"^Private key: .*Use an Ed25519, ECDSA or RSA key"):
            credentials.read_private_key(text.stdout)


def test_a_new_pair_is_an_ed25519_key_that_openssh_reads(tmp_path: Path) -> None:
    pem, line = credentials.new_pair("kangaroo; rm -rf /")
    file = tmp_path / "key"
    file.write_text(pem)
    file.chmod(0o600)
    told = subprocess.run(["ssh-keygen", "-yf", str(file)], check=True, capture_output=True, text=True)
    assert line.startswith("ssh-ed25519 AAAA")
    assert told.stdout.split()[:2] == line.split()[:2]
    assert line.endswith(" kangaroo-rm--rf")
    assert credentials.read_private_key(pem)[1].split() == line.split()[:2]
    assert credentials.new_pair("x")[0] != pem


# What is pasted on the host -------------------------------------------------------------------------------------------

SHELLS = [
    shell
    for shell in ("sh", "bash", "zsh", "dash")
    if subprocess.run(["which", shell], capture_output=True).returncode == 0
]


def paired(name: str = "workstation", **more: Any) -> Host:
    pem, line = credentials.new_pair(name)
    return Host(name=name, private_key=pem, public_key=line, **more)


def paste(shell: str, home: Path, command: str) -> None:
    """As if typed: over standard input, so that the shell itself reads the line."""
    assert "\n" not in command
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    subprocess.run([shell], input=f"{command}\n", text=True, check=True, env=environment, capture_output=True)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("before", ["", "ssh-ed25519 AAAAother me@here", "ssh-ed25519 AAAAother me@here\n", None])
def test_the_commands_put_the_line_in_and_take_it_out(tmp_path: Path, shell: str, before: str | None) -> None:
    host = paired("O'Brien's \"box\" $(touch x) `id` ; é !! \\")
    keys = tmp_path / ".ssh" / "authorized_keys"
    if before is not None:
        keys.parent.mkdir()
        keys.write_text(before)
        keys.chmod(0o644)
    paste(shell, tmp_path, credentials.install_command(host))
    lines = [line for line in keys.read_text().splitlines() if line]
    assert lines == [*(before or "").split("\n")[: 1 if before else 0], credentials.authorized_line(host)]
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.parent.stat().st_mode) == 0o700
    paste(shell, tmp_path, credentials.revoke_command(host))
    assert [line for line in keys.read_text().splitlines() if line] == ([before.strip()] if before else [])
    assert [path.name for path in keys.parent.iterdir()] == ["authorized_keys"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ssh", "var"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_line_of_a_jump_host_takes_the_place_of_its_older_one(tmp_path: Path, shell: str) -> None:
    host = paired("gate")
    keys = tmp_path / ".ssh" / "authorized_keys"
    paste(shell, tmp_path, credentials.install_command(host))
    with keys.open("a") as file:
        file.write("ssh-ed25519 AAAAother me@here\n")
    host.forwards = True
    for _ in range(2):
        paste(shell, tmp_path, credentials.install_command(host))
        lines = [line for line in keys.read_text().splitlines() if line]
        assert lines == ["ssh-ed25519 AAAAother me@here", credentials.authorized_line(host)]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_jump_host_may_get_its_line_as_its_first(tmp_path: Path, shell: str) -> None:
    host = paired("gate")
    host.forwards = True
    paste(shell, tmp_path, credentials.install_command(host))
    keys = tmp_path / ".ssh" / "authorized_keys"
    assert keys.read_text().split("\n") == ["", credentials.authorized_line(host), ""]
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600


def test_the_line_restricts_what_the_key_may_do_and_holds_no_foreign_character() -> None:
    host = paired("Ada's\nbox")
    kind, blob = host.public_key.split()[:2]
    assert credentials.authorized_line(host) == f"restrict {kind} {blob} kangaroo:Ada-s-box"
    host.forwards = True
    assert credentials.authorized_line(host).startswith("restrict,port-forwarding ssh-ed25519 ")
    assert credentials.authorized_line(paired("日本")).endswith(" kangaroo:host")
    assert host.private_key.reveal(host).split("\n")[1] not in credentials.install_command(host)
    assert shlex.split(credentials.install_command(host))


@pytest.mark.parametrize("options", [("-t", "ed25519"), ("-t", "rsa", "-b", "2048"), ("-t", "ecdsa", "-b", "384")])
def test_the_fingerprint_is_ssh_keygens_own(made: Any, options: Any) -> None:
    text, fingerprint = made(*options)
    line = credentials.read_private_key(text)[1]
    assert credentials.fingerprint(line) == fingerprint
    assert credentials.fingerprint(f"{line} with a comment") == fingerprint
    assert credentials.fingerprint_command(line) == f"ssh-keygen -lf /etc/ssh/ssh_host_{options[1]}_key.pub"


def test_a_line_that_is_no_key_has_no_fingerprint() -> None:
    for line in ("", "ssh-ed25519", "ssh-ed25519 !!!!", "ssh-ed25519 AAA"):
        with pytest.raises(ValueError, match="no line of a public key"):
            credentials.fingerprint(line)
    assert credentials.fingerprint_command("$(reboot) AAAA").startswith("for key in /etc/ssh/ssh_host_*_key.pub;")
