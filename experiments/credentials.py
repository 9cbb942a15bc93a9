"""Secrets at rest: an encrypted model field, and the ring of keys that opens it.

The keys stand outside the database, in the environment (CREDENTIAL_KEYS) or in a file of `var/` that only this user may
read; a copy of the database opens nothing. What is encrypted is bound to its place (model and field) and row, so that
ciphertext moved elsewhere is refused. Who holds no right to decrypt gets a :class:`Secret`, whose text is not shown.
"""

from __future__ import annotations

from typing import Any

from django.db import models


class EncryptedField(models.TextField):  # type: ignore[type-arg]
    """Text, encrypted in the database."""

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "experiments.credentials.EncryptedField", args, kwargs
