import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cryptography.fernet import Fernet
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts import ring, second_factor
from experiments import credentials


class Command(BaseCommand):
    help = "Encrypt what is stored encrypted anew, with the newest key of the ring."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--new-key", action="store_true", help="make a new key first; the older ones stay, to open")
        parser.add_argument(
            "--drop-old", action="store_true", help="afterwards keep the newest key alone; best while nobody saves"
        )
        parser.add_argument(
            "--forget-unreadable", action="store_true", help="empty those credentials that no key of the ring opens"
        )

    def handle(self, *args: Any, new_key: bool, drop_old: bool, forget_unreadable: bool, **options: Any) -> None:
        path = settings.CREDENTIAL_KEYS_FILE
        if settings.CREDENTIAL_KEYS and (new_key or drop_old):
            raise CommandError(
                "The ring is in CREDENTIAL_KEYS, which only you can change. Put a new key first there (`openssl rand "
                "-base64 32 | tr +/ -_`), start the site anew, run this without options; then take the old keys out."
            )
        with _alone():
            try:
                if forget_unreadable and not settings.CREDENTIAL_KEYS and not path.exists():
                    ring.write_keys(path, [_a_key()], replace=False)
                keys = ring.keys()
                if new_key:
                    keys = [_a_key(), *keys]
                    ring.write_keys(path, keys)  # before anything is encrypted with it
                count = credentials.renew(keys)
            except ring.KeyRingError as error:
                raise CommandError(str(error)) from None
            self.stdout.write(f"{count} credentials encrypted anew.")
            if forget_unreadable:
                forgotten = sum(credentials.replace(field, row, "") for field, row in credentials.unreadable())
                self.stdout.write(f"{forgotten} that could not be opened forgotten.")
            closed = self.renew_second_factors() + self.name_unreadable()
            if drop_old:
                if closed:
                    raise CommandError("Some cannot be opened: no key was dropped.")
                ring.write_keys(path, keys[:1])
                self.stdout.write(f"{len(keys) - 1} older keys dropped.")

    def name_unreadable(self) -> int:
        closed = credentials.unreadable()
        for field, row in closed:
            self.stderr.write(f"Cannot be opened: {field.name} of {row._meta.verbose_name} {row.pk}.")
        return len(closed)

    def renew_second_factors(self) -> int:
        try:
            self.stdout.write(f"{second_factor.rotate()} second factors encrypted anew.")
        except ValidationError:
            self.stderr.write("A second factor cannot be opened. Take it off its account, in the admin.")
            return 1
        return 0


@contextmanager
def _alone() -> Iterator[None]:
    """Of two who add a key at once, the second must not write over the first one's."""
    with open(settings.CREDENTIAL_KEYS_FILE.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _a_key() -> str:
    return Fernet.generate_key().decode()
