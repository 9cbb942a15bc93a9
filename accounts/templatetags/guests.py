"""What templates say about guests."""

from django import template
from django.conf import settings

register = template.Library()


@register.simple_tag
def guest_idle_days() -> int:
    """After how many idle days a guest and their work are removed."""
    return int(settings.GUEST_IDLE_DAYS)
