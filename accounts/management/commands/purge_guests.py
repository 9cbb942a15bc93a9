"""Remove guests who have been idle for longer than GUEST_IDLE_DAYS, with their work."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from accounts.guests import purge


class Command(BaseCommand):
    help = __doc__ or ""

    def handle(self, *args: Any, **options: Any) -> None:
        n = purge()
        who = "guest removed who was" if n == 1 else "guests removed who were"
        self.stdout.write(f"{n} {who} idle for more than {settings.GUEST_IDLE_DAYS} days")
