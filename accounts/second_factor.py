"""The second factor: what an account has of it, how its secrets are kept, and how it is taken away.

The steps themselves are allauth's. Authenticator apps' secrets and the seeds of recovery codes are encrypted with the
ring of `accounts.ring`; a passkey's public key is no secret. Ciphertext is bound to being a second factor's, not to its
row: whoever can write rows could as well remove one.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from allauth.mfa import app_settings
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.mfa.models import Authenticator
from cryptography.fernet import InvalidToken
from django.contrib.auth.models import AnonymousUser
from django.db import transaction

from accounts.models import User
from accounts.ring import KeyRingError, ring

logger = logging.getLogger(__name__)

PREFIX = "f1:"
PURPOSE = "second factor"
#: Which of an authenticator's data is secret.
SECRETS = ("secret", "seed")


class Adapter(DefaultMFAAdapter):  # type: ignore[misc]
    error_messages = DefaultMFAAdapter.error_messages | {
        "sealed": "This site has lost the key to your second factor. Ask its administrator to take the second factor "
        "off your account.",
    }

    def encrypt(self, text: str) -> str:
        return PREFIX + ring().encrypt(json.dumps([PURPOSE, text]).encode()).decode()

    def decrypt(self, encrypted_text: str) -> str:
        try:
            *purpose, text = json.loads(ring().decrypt(encrypted_text.removeprefix(PREFIX)))
            if purpose == [PURPOSE]:
                return str(text)
            logger.error("a second factor's secret was closed for something else")
        except (InvalidToken, KeyRingError) as error:
            logger.error("a second factor's secret cannot be opened: %s", str(error) or "none of the ring's keys fits")
        raise self.validation_error("sealed")

    def get_public_key_credential_rp_entity(self) -> dict[str, str]:
        """The site as the browser names it: for good, so without the port that it happens to have."""
        site: dict[str, str] = super().get_public_key_credential_rp_entity()
        return site | {"name": app_settings.TOTP_ISSUER}

    def generate_authenticator_name(self, user: User, type: str) -> str:
        """A name to begin with, one that the account does not have yet."""
        taken = {str(each) for each in Authenticator.objects.filter(user=user, type=type)}
        number = next(n for n in range(1, len(taken) + 2) if f"Passkey {n}" not in taken)
        return f"Passkey {number}"


@dataclass(frozen=True)
class SecondFactor:
    """What an account has."""

    totp: Authenticator | None
    passkeys: list[Authenticator]
    #: None where there are no codes.
    codes_left: int | None
    codes: int

    @property
    def on(self) -> bool:
        """Whether the password alone no longer signs in."""
        return self.totp is not None or bool(self.passkeys)


def of(user: User | AnonymousUser) -> SecondFactor:
    """What `user` has; opens no secret, so that the account's page comes up even where the ring is lost."""
    found = list(Authenticator.objects.filter(user_id=user.pk).order_by("created_at"))
    passkeys = [each for each in found if each.type == Authenticator.Type.WEBAUTHN]
    others = {each.type: each for each in found}
    codes = others.get(Authenticator.Type.RECOVERY_CODES)
    count = app_settings.RECOVERY_CODE_COUNT
    return SecondFactor(
        totp=others.get(Authenticator.Type.TOTP),
        passkeys=passkeys,
        codes_left=count - int(codes.data["used_mask"]).bit_count() if codes else None,
        codes=count,
    )


def remove(user: User) -> bool:
    """Take all of it off, recovery codes too, for somebody who lost theirs; whether there was any."""
    deleted, _ = Authenticator.objects.filter(user=user).delete()
    return bool(deleted)


def waits() -> bool:
    """Whether anything is stored that only the ring opens."""
    return bool(_sealed().exists())


def _sealed() -> Any:
    return Authenticator.objects.filter(type__in=[Authenticator.Type.TOTP, Authenticator.Type.RECOVERY_CODES])


def rotate() -> int:
    """Encrypt every secret anew, with the ring's newest key; how many authenticators that were."""
    adapter = Adapter()
    with transaction.atomic():
        sealed = _sealed().select_for_update()
        for authenticator in sealed:
            for name in SECRETS:
                if name in authenticator.data:
                    authenticator.data[name] = adapter.encrypt(adapter.decrypt(authenticator.data[name]))
            authenticator.save(update_fields=["data"])
    return len(sealed)
