"""Guests: work without an account, and what becomes of it.

A guest is a real `User` row from the first POST that needs an owner; reading never makes one. Signing up turns that
very row into an account (`accounts.adapter.Adapter.new_user`), so the work, its runs and the session stay where they
are. Signing in to an account that exists moves the guest's work into it (`claim`). A guest who stays away for
GUEST_IDLE_DAYS is removed with their work (`purge`).
"""

from __future__ import annotations

import logging
from datetime import timedelta

from allauth.core import ratelimit
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.usersessions.models import UserSession
from django.conf import settings
from django.contrib.auth import login
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.db import transaction
from django.http import HttpRequest
from django.utils import timezone

from accounts.models import User

logger = logging.getLogger(__name__)


def ensure_user(request: HttpRequest) -> User:
    """The signed-in user, or a new guest signed in from here on.

    Answers 429 (by way of allauth's middleware) where one address has made too many guests in an hour: see "guest" in
    ACCOUNT_RATE_LIMITS.
    """
    if request.user.is_authenticated:
        return request.user
    if not ratelimit.consume(request, action="guest"):
        raise ImmediateHttpResponse(ratelimit.respond_429(request))
    guest = User.objects.create_guest()
    login(request, guest, backend="django.contrib.auth.backends.ModelBackend")
    return guest


def claim(guest: User, user: User) -> None:
    """Move all that belongs to `guest` to `user`, then remove the empty guest.

    Whatever points at a user is moved, so that no app has to remember to take part.
    """
    with transaction.atomic():
        User.objects.select_for_update().get(
            pk=guest.pk
        )  # a submission in another tab comes before or after, not between
        for relation in User._meta.related_objects:
            if relation.one_to_many and relation.related_model is not None:
                field = relation.field.name
                relation.related_model._base_manager.filter(**{field: guest}).update(**{field: user})
        guest.delete()
    logger.info("the work of guest %s now belongs to user %s", guest.pk, user.pk)


def purge() -> int:
    """Remove guests idle for longer than GUEST_IDLE_DAYS, their work with them; how many were removed.

    Sessions that have ended go too, and what was noted of where they were: nobody else clears them up.
    """
    SessionStore.clear_expired()
    UserSession.objects.exclude(session_key__in=Session.objects.values("session_key")).delete()
    idle_since = timezone.now() - timedelta(days=settings.GUEST_IDLE_DAYS)
    removed = 0
    for guest in User.objects.filter(is_guest=True, last_active__lt=idle_since):
        # One at a time, asked again just before: a guest may have come back or signed up meanwhile.
        with transaction.atomic():
            if User.objects.select_for_update().filter(pk=guest.pk, is_guest=True, last_active__lt=idle_since).exists():
                guest.delete()
                removed += 1
    return removed
