"""Credentials of hosts: an encrypted model field, the key pairs that are kept in it, and what is pasted on the host.

What encrypts is the ring of :mod:`accounts.ring`, outside the database. Each ciphertext is bound to its field and row:
moved elsewhere it is refused.

Clear text is encrypted when it is assigned. An instance therefore never holds it, nor does a queryset, a form, a dump
or an error page: all they meet is a :class:`Secret`, which opens for one who calls `reveal` with the row it belongs to.
That is the collector's process alone.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from django.apps import apps
from django.db import models
from django.db.models.expressions import Value
from django.db.models.query_utils import DeferredAttribute
from django.views.debug import SafeExceptionReporterFilter
from django.views.decorators.debug import sensitive_variables

from accounts.ring import KeyRingError, keys, ring

if TYPE_CHECKING:
    from experiments.models import Host


class Tampered(Exception):
    """Ciphertext that stands where it was not written."""


# The field ------------------------------------------------------------------------------------------------------------

_PREFIX = "f1:"


class Secret:
    """A credential that is not shown: it holds ciphertext, and its place. False if there is none."""

    __slots__ = ("_place", "_stored")

    def __init__(self, place: tuple[str, str], stored: str) -> None:
        self._place = place  # label of the model, name of the field
        self._stored = stored

    @classmethod
    @sensitive_variables()
    def of(cls, place: tuple[str, str], instance: models.Model, text: str) -> Secret:
        if not text:
            return cls(place, "")
        data = json.dumps([*place, _identity(instance), text]).encode()
        return cls(place, _PREFIX + ring().encrypt(data).decode())

    @sensitive_variables()
    def reveal(self, instance: models.Model) -> str:
        """The clear text, for the row `instance` alone. Raises Tampered or KeyRingError."""
        if not self._stored:
            return ""
        if not self._stored.startswith(_PREFIX):
            raise Tampered(f"{self._where} holds text that was not encrypted")
        *place, text = json.loads(self._decrypted(ring()))
        if place != [*self._place, _identity(instance)]:
            raise Tampered(f"{self._where} holds what was encrypted for another field or row")
        return str(text)

    reveal.alters_data = True  # type: ignore[attr-defined]  # templates do not call it

    def renewed(self, keys: list[str]) -> Secret:
        """The same, encrypted with the newest of `keys`; itself, if it is already."""
        if not self._stored or self.is_opened_by(keys[:1]):
            return self
        token = _PREFIX + _cipher(keys[:1]).encrypt(self._decrypted(_cipher(keys))).decode()
        return Secret(self._place, token)

    def is_opened_by(self, keys: list[str]) -> bool:
        try:
            self._decrypted(_cipher(keys))
        except KeyRingError:
            return False
        return True

    def _decrypted(self, cipher: MultiFernet) -> bytes:
        try:
            return cipher.decrypt(self._stored.removeprefix(_PREFIX).encode())
        except InvalidToken:
            raise KeyRingError(
                f"no key of the ring opens {self._where}: the ring is not the one that it was encrypted with, or it "
                "was changed since"
            ) from None

    @property
    def _where(self) -> str:
        return ".".join(self._place)

    def __bool__(self) -> bool:
        return bool(self._stored)

    def __repr__(self) -> str:
        return "<secret>" if self._stored else "<no secret>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: Any) -> Secret:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a secret is not pickled: hand on the row's key, and read it where it is used")


def _cipher(keys: list[str]) -> MultiFernet:
    return MultiFernet([Fernet(key) for key in keys])


def _identity(instance: Any) -> str:
    return str(instance.identity)


class _SecretAttribute(DeferredAttribute):
    """What an instance holds is a Secret, from the moment that something is assigned."""

    field: EncryptedField

    @sensitive_variables()
    def __set__(self, instance: models.Model, value: Secret | str | None) -> None:
        place = self.field.place
        if value is None or isinstance(value, str):
            value = Secret.of(place, instance, value or "")
        elif not isinstance(value, Secret) or value._place != place:
            raise TypeError(f"{'.'.join(place)} takes text or a secret of its own")
        instance.__dict__[self.field.attname] = value


class EncryptedField(models.TextField):  # type: ignore[type-arg]
    """Text, encrypted in the database, of a model with an `identity` that is declared before it.

    In queries it can be compared with "" (nothing is stored) and with a Secret that was read (nothing has changed). It
    has no form field: forms take a credential, and never give one back.
    """

    _pyi_private_set_type: str | Secret  # type: ignore[assignment]
    _pyi_private_get_type: Secret  # type: ignore[assignment]
    _pyi_lookup_exact_type: str | Secret
    descriptor_class = _SecretAttribute

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"editable": False}))

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        kwargs.pop("editable", None)
        return name, "experiments.credentials.EncryptedField", args, kwargs

    @property
    def place(self) -> tuple[str, str]:
        return self.model._meta.label, self.name

    def from_db_value(self, value: str | None, *_: Any) -> Secret | None:
        return None if value is None else Secret(self.place, value)

    def to_python(self, value: Any) -> Any:
        """Of a fixture: ciphertext, as it was dumped. Whether it belongs there is seen when it is opened."""
        return Secret(self.place, value) if isinstance(value, str) and value.startswith(_PREFIX) else value

    def value_to_string(self, obj: models.Model) -> str:
        return str(self.get_prep_value(self.value_from_object(obj)))

    def pre_save(self, model_instance: models.Model, add: bool) -> Secret:
        """An instance may have been read before a rotation; it must not bring an older key's ciphertext back."""
        secret: Secret = super().pre_save(model_instance, add)
        if secret:
            with contextlib.suppress(KeyRingError):  # whoever opens it will hear of it; other fields can be saved
                secret = secret.renewed(keys())
                setattr(model_instance, self.attname, secret)
        return secret

    @sensitive_variables()
    def get_prep_value(self, value: Any) -> Any:
        if isinstance(value, Secret) and value._place == self.place:
            return value._stored
        if value is None or value == "" or hasattr(value, "resolve_expression"):
            return value
        raise TypeError(f"{'.'.join(self.place)} is encrypted: assign to it and save the row")

    def get_placeholder(self, value: Any, compiler: Any, connection: Any) -> str:
        """Refuses clear text inside an expression of an update."""
        for part in value.flatten() if hasattr(value, "flatten") else ():
            if isinstance(part, Value):
                self.get_prep_value(part.value)
        return "%s"

    def get_lookup(self, lookup_name: str) -> Any:
        return super().get_lookup(lookup_name) if lookup_name in ("exact", "isnull") else None

    def get_transform(self, lookup_name: str) -> None:
        return None


def encrypted_fields() -> Iterator[tuple[type[models.Model], EncryptedField]]:
    """Every encrypted field there is, with its model."""
    for model in apps.get_models():
        for field in model._meta.local_fields:
            if isinstance(field, EncryptedField):
                yield model, field


def stored() -> Iterator[tuple[EncryptedField, models.Model]]:
    """Every credential there is: its field, and its row, of which no more is read."""
    for model, field in encrypted_fields():
        rows = model._base_manager.exclude(**{field.name: ""}).only("pk", "identity", field.name)
        for row in rows.order_by("pk"):
            yield field, row


def are_stored() -> bool:
    """Whether there is any credential, and so a ring without which nothing opens them."""
    return any(True for _ in stored())


def unreadable() -> list[tuple[EncryptedField, models.Model]]:
    """Those that the ring does not open, or that do not belong where they stand."""
    return [(field, row) for field, row in stored() if not _is_readable(getattr(row, field.attname), row)]


def renew(keys: list[str]) -> int:
    """Encrypt every readable credential with the newest of `keys`; how many were not yet."""
    renewed = 0
    for field, row in list(stored()):
        while _is_readable(old := getattr(row, field.attname), row):
            new = old.renewed(keys)
            if new is old:
                break
            if replace(field, row, new):
                renewed += 1
                break
            row.refresh_from_db(fields=[field.name])  # its owner was faster
    return renewed


def replace(field: EncryptedField, row: models.Model, new: Secret | str) -> bool:
    """Put `new` in the place of what `row` was read with; False, and nothing, if something else stands there by now."""
    rows = type(row)._base_manager.filter(pk=row.pk, **{field.name: getattr(row, field.attname)})
    return bool(rows.update(**{field.name: new}))


def _is_readable(secret: Secret, row: models.Model) -> bool:
    try:
        return bool(secret.reveal(row))
    except (Tampered, KeyRingError):
        return False


# Key pairs ------------------------------------------------------------------------------------------------------------

#: A locked key says itself how long unlocking takes; ssh-keygen's default is 16 or 24 rounds.
_MOST_ROUNDS = 256
_PUTTY = (
    "Private key: this is a PuTTY key (.ppk). Convert it first: `puttygen key.ppk -O private-openssh -o key`, or "
    "Conversions > Export OpenSSH key in PuTTYgen; then paste the content of the new file."
)
_PUBLIC = (
    "Private key: this is a public key. The private one is in the file of the same name without .pub, and begins with "
    "-----BEGIN."
)
_WRONG = "Passphrase: it does not open this key."
_KINDS = "Use an Ed25519, ECDSA or RSA key; `ssh-keygen -t ed25519` makes one."


def new_pair(comment: str) -> tuple[str, str]:
    """A new ed25519 pair: the private key (OpenSSH's format) and the line of the public one."""
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    return pem, f"{_public_line(key)} {_plain(comment)}"


@sensitive_variables()
def read_private_key(text: str, passphrase: str = "") -> tuple[str, str]:
    """A private key as somebody pasted it, locked if it was, and the line of its public key.

    Raises ValueError with a sentence for the form that names the field; nothing of the key is in it.
    """
    text = "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"
    if text.startswith("PuTTY-User-Key-File"):
        raise ValueError(_PUTTY)
    if re.match(r"(ssh-|ecdsa-|sk-|-----BEGIN (RSA )?PUBLIC KEY|---- BEGIN SSH2 PUBLIC KEY)", text):
        raise ValueError(_PUBLIC)
    whole = re.fullmatch(r"-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----\n.+\n-----END \1PRIVATE KEY-----\n", text, re.DOTALL)
    if len(text) > 20_000 or whole is None:
        raise ValueError(
            "Private key: paste the whole file, from -----BEGIN to the end of -----END ... PRIVATE KEY-----, with all "
            "lines between."
        )
    kind = whole[1].strip()
    if kind == "DSA":
        raise ValueError(f"Private key: DSA keys are not secure, and SSH servers refuse them. {_KINDS}")
    if kind == "ENCRYPTED":  # PKCS #8: how long unlocking takes is for the file to say, and has no bound
        raise ValueError(
            "Private key: this file is locked in the PKCS #8 format. Run `ssh-keygen -p -f` with its name, which "
            "writes it in OpenSSH's own; then paste its content."
        )
    key = _loaded(text, kind, passphrase)
    if isinstance(key, dsa.DSAPrivateKey):
        raise ValueError(f"Private key: DSA keys are not secure, and SSH servers refuse them. {_KINDS}")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < 2048:
        raise ValueError(f"Private key: an RSA key of {key.key_size} bits is too short; 2048 is the least. {_KINDS}")
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise ValueError(f"Private key: keys of this kind cannot be used. {_KINDS}")
    try:
        return text, _public_line(key)
    except ValueError:  # a curve that SSH does not know
        raise ValueError(f"Private key: SSH does not know this curve. {_KINDS}") from None


@sensitive_variables()
def _loaded(text: str, kind: str, passphrase: str) -> Any:
    """The key, or a ValueError for a person."""
    openssh = kind == "OPENSSH"
    locked = _lock_of(text) if openssh else "Proc-Type: 4,ENCRYPTED" in text
    if locked and not passphrase:
        raise ValueError("Passphrase: this key is locked; give its passphrase.")
    password = passphrase.encode() if locked else None  # one that is not needed is no mistake worth a word
    problem = _WRONG if locked else f"Private key: it is damaged, or of a kind that is not known here. {_KINDS}"
    try:
        return (load_ssh_private_key if openssh else load_pem_private_key)(text.encode(), password)
    except UnsupportedAlgorithm:
        problem = f"Private key: keys of this kind cannot be used. {_KINDS}"
    except (ValueError, TypeError):
        pass
    raise ValueError(problem)


@sensitive_variables()
def _lock_of(text: str) -> bool:
    """Whether a key in OpenSSH's format is locked; refuses one that would take too long to open."""
    try:
        blob = base64.b64decode("".join(text.splitlines()[1:-1]), validate=True)
        magic, blob = blob[:15], blob[15:]
        cipher, blob = _string(blob)
        _, blob = _string(blob)
        options, _ = _string(blob)
        rounds = int.from_bytes(_string(options)[1][:4]) if options else 0
    except ValueError:
        magic = b""
    if magic != b"openssh-key-v1\0":
        raise ValueError("Private key: it is damaged; paste the whole file once more.")
    if rounds > _MOST_ROUNDS:
        raise ValueError(
            f"Private key: it is locked with {rounds} rounds, and {_MOST_ROUNDS} are the most that are taken here. "
            "`ssh-keygen -p -a 24 -f` with its name locks it anew."
        )
    return cipher != b"none"


def _string(blob: bytes) -> tuple[bytes, bytes]:
    """The first string of SSH's encoding, and what follows it."""
    end = 4 + int.from_bytes(blob[:4])
    if len(blob) < end or len(blob) < 4:
        raise ValueError("cut short")
    return blob[4:end], blob[end:]


def _public_line(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


# What a person pastes into the host's shell ---------------------------------------------------------------------------


def authorized_line(host: Host) -> str:
    """The line of authorized_keys that lets Kangaroo in, and lets it do as little as it needs."""
    options = "restrict,port-forwarding" if host.forwards else "restrict"
    return f"{options} {' '.join(host.public_key.split()[:2])} kangaroo:{_plain(host.name)}"


def install_command(host: Host) -> str:
    """Adds that line. The file may lack its last newline, hence the first of ours; empty lines mean nothing there.

    A jump host's takes the place of the one that the machine got before it was a jump host: of two lines with the same
    key, the SSH server heeds the first.
    """
    keys = "~/.ssh/authorized_keys"
    instead = f"touch {keys} && {revoke_command(host)} && " if host.forwards else ""
    return (
        f"mkdir -p ~/.ssh && chmod 700 ~/.ssh && {instead}"
        f"printf '\\n%s\\n' {shlex.quote(authorized_line(host))} >> {keys} && chmod 600 {keys}"
    )


def revoke_command(host: Host) -> str:
    """Takes it out again, by the key itself, whatever options and name the line has by then."""
    keys = "~/.ssh/authorized_keys"
    _, blob, *_ = host.public_key.split()
    this_line = shlex.quote(f"\\|{blob}|d")
    return f"sed -i.before {this_line} {keys} && rm {keys}.before"


def fingerprint(key_line: str) -> str:
    """SHA256:... of a public key's line, as ssh and ssh-keygen show it."""
    try:
        _, blob, *_ = key_line.split()
        digest = hashlib.sha256(base64.b64decode(blob, validate=True)).digest()
    except (ValueError, binascii.Error):
        raise ValueError("this is no line of a public key") from None
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def fingerprint_command(key_line: str) -> str:
    """Prints, on the host itself, what :func:`fingerprint` says of its key."""
    kind = re.match(r"(?:ssh-)?(ed25519|ecdsa|rsa)", key_line)
    if kind is None:
        return "for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf $key; done"
    return f"ssh-keygen -lf /etc/ssh/ssh_host_{kind[1]}_key.pub"


def _plain(name: str) -> str:
    """A name as it may stand in a shell's line and in authorized_keys."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "host"


# Error pages ----------------------------------------------------------------------------------------------------------


class ReportFilter(SafeExceptionReporterFilter):
    """What an error page leaves out, with DEBUG too: whatever is named like a key, a password or a secret."""

    def is_active(self, request: Any) -> bool:
        return True

    def get_post_parameters(self, request: Any) -> Any:
        return self.cleanse_setting("", dict(super().get_post_parameters(request)))

    def get_traceback_frame_variables(self, request: Any, tb_frame: Any) -> Any:
        if tb_frame.f_code is models.Model.__init__.__code__:
            return []  # it calls every field's value by one name
        variables = super().get_traceback_frame_variables(request, tb_frame)
        return [(str(name), self.cleanse_setting(name, value)) for name, value in variables]
