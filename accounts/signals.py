"""How a user leaves. Accounts know nothing of experiments, so whoever keeps something for a user listens here."""

from __future__ import annotations

from django.dispatch import Signal

from accounts.models import User

#: Sent with `user` before that user's row is deleted, outside of any transaction: end their processes, free their disk.
leaving = Signal()


def remove(user: User) -> None:
    """Delete `user` and all that is theirs: first what lives outside the database, then the rows."""
    leaving.send(sender=User, user=user)
    user.delete()
