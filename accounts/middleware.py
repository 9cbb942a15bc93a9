"""Remember when somebody was last here: only guests who stay away are purged, and only their sessions end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.contrib.auth.signals import user_logged_in
from django.dispatch import receiver
from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from accounts.models import User

#: Not with every request: a page that refreshes itself would write to the database every two seconds.
TOUCH_EVERY = timedelta(minutes=10)
SEEN = "seen"


class LastActiveMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.user.is_authenticated:
            self.touch(request, request.user)
        return self.get_response(request)

    def touch(self, request: HttpRequest, user: User) -> None:
        """Note the time with the user and with this one of their sessions, unless that was done lately."""
        now = timezone.now()
        lately = now - TOUCH_EVERY
        if user.last_active >= lately and request.session.get(SEEN, 0) >= lately.timestamp():
            return
        User.objects.filter(pk=user.pk).update(last_active=now)
        request.session[SEEN] = now.timestamp()  # which saves the session: its time begins anew
        if not user.is_guest:
            from allauth.usersessions.models import UserSession

            UserSession.objects.create_from_request(request)


@receiver(user_logged_in)
def begin(request: HttpRequest, **more: Any) -> None:
    """A session that begins has just been seen."""
    request.session[SEEN] = timezone.now().timestamp()
