"""Remember when somebody was last here: only guests who stay away are purged, and only their sessions end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from accounts.models import User

#: Not with every request: a page that refreshes itself would write to the database every two seconds.
TOUCH_EVERY = timedelta(hours=1)


class LastActiveMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        user = request.user
        now = timezone.now()
        if user.is_authenticated and user.last_active < now - TOUCH_EVERY:
            User.objects.filter(pk=user.pk).update(last_active=now)
            request.session.modified = True  # its time begins anew
        return self.get_response(request)
