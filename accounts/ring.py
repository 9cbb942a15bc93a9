"""The ring of keys under which this site keeps other people's secrets, outside the database.

Keys come from CREDENTIAL_KEYS, or from a file of `var/` made when the first secret is kept and readable by this user
alone; a copy of the database opens nothing. The newest key encrypts, each of them decrypts, so that a key can be
replaced without losing what older ones closed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cryptography.fernet import Fernet, MultiFernet
from django.conf import settings


class KeyRingError(Exception):
    """The ring cannot be had: a key is not one, or the file cannot be read."""


#: Each says whether something in the database waits for the ring. If so, a file that is not there was lost: a new one
#: would only hide that. An app whose rows are encrypted adds its own when it is ready.
waiting: list[Callable[[], bool]] = []


def ring() -> MultiFernet:
    """The ring, newest key first. Read anew each time: a key added by a rotation counts at once in every process."""
    return MultiFernet([Fernet(key) for key in keys()])


def keys() -> list[str]:
    """The keys in use, newest first."""
    found: list[str] = list(settings.CREDENTIAL_KEYS) or _kept(settings.CREDENTIAL_KEYS_FILE)
    for number, key in enumerate(found, 1):
        try:
            Fernet(key)
        except ValueError:  # which must not say what the key was
            raise KeyRingError(
                f"Key {number} of {'CREDENTIAL_KEYS' if settings.CREDENTIAL_KEYS else settings.CREDENTIAL_KEYS_FILE} "
                "is not a Fernet key: 32 bytes in URL-safe base64, 44 characters."
            ) from None
    return found


def _kept(path: Path) -> list[str]:
    try:
        found = path.read_text().split()
    except FileNotFoundError:
        if any(waits() for waits in waiting):
            raise KeyRingError(
                f"The key ring {path} is gone, and what is stored encrypted cannot be opened without it. Put the file "
                "back from a copy. If there is none, `manage.py rotate_credentials --forget-unreadable` begins a new "
                "ring and forgets what the old one closed; the owners of hosts then store their credentials anew."
            ) from None
        write_keys(path, [Fernet.generate_key().decode()], replace=False)
        found = path.read_text().split()
    except OSError as error:
        raise KeyRingError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise KeyRingError(
            f"{path} holds no key. Bring it back from a copy; what it closed cannot be opened without it."
        )
    return found


def write_keys(path: Path, found: list[str], *, replace: bool = True) -> None:
    """Keep these keys in a file of mode 0600, whole or not at all; without `replace` a file that stands is left."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # of mode 0600 from the start
    with os.fdopen(descriptor, "w") as file:
        file.write("".join(f"{key}\n" for key in found))
        file.flush()
        os.fsync(file.fileno())
    try:
        if replace:
            os.replace(name, path)
        else:
            with contextlib.suppress(FileExistsError):  # another process was first: its keys are the keys
                os.link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
