"""System checks of what credentials rest on: the key ring is this user's alone, well formed, and the one that fits."""

from __future__ import annotations

import stat
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.db import OperationalError, ProgrammingError

from accounts import ring
from experiments import credentials


@register(Tags.security)
def the_key_ring_is_sound(**_: Any) -> list[CheckMessage]:
    """In every mode, since who develops on a shared machine has credentials too. Makes no ring, and shows no key."""
    path = settings.CREDENTIAL_KEYS_FILE
    if not settings.CREDENTIAL_KEYS:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            return []  # made with the first secret, if none waits for it
        if mode & 0o077:
            return [
                Error(
                    f"The key ring {path} is open to other users of this machine (mode {mode:o}).",
                    hint=f"chmod 600 {path}; if it was read: manage.py rotate_credentials --new-key --drop-old",
                    id="experiments.E001",
                )
            ]
    try:
        ring.keys()
    except ring.KeyRingError as error:
        return [Error(str(error), id="experiments.E002")]
    return []


@register(Tags.database)
def the_key_ring_opens_what_is_stored(databases: Any = None, **_: Any) -> list[CheckMessage]:
    """A ring that is lost, or another installation's, is noticed at the start and not when a host is wanted."""
    if "default" not in (databases or ()):
        return []
    try:
        if not credentials.are_stored():
            return []
        ring.keys()
        closed = credentials.unreadable()
    except (OperationalError, ProgrammingError):
        return []  # not migrated yet
    except ring.KeyRingError as error:
        return [Error(str(error), id="experiments.E003")]
    if not closed:
        return []
    which = ", ".join(f"{field.name} of {row._meta.verbose_name} {row.pk}" for field, row in closed[:10])
    return [
        Error(
            f"{len(closed)} of the stored credentials cannot be opened with the key ring: {which}"
            f"{', ...' if len(closed) > 10 else ''}.",
            hint="Put back the ring that belongs to this database, in CREDENTIAL_KEYS or "
            f"{settings.CREDENTIAL_KEYS_FILE}. If it is lost: manage.py rotate_credentials --forget-unreadable; the "
            "owners then store theirs anew.",
            id="experiments.E004",
        )
    ]
