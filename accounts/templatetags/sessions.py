"""`{{ session.user_agent|browser }}`: what a person would call the program behind a session."""

from __future__ import annotations

from django import template

register = template.Library()

# The first that is found: many say that they are others too.
BROWSERS = {
    "Edg": "Edge", "OPR/": "Opera", "Firefox": "Firefox", "Chrome": "Chrome", "Safari": "Safari", "curl": "curl",
    "python": "a Python program",
}  # fmt: skip
SYSTEMS = {
    "Android": "Android", "iPhone": "an iPhone", "iPad": "an iPad", "Windows": "Windows", "Mac OS": "macOS",
    "CrOS": "ChromeOS", "Linux": "Linux",
}  # fmt: skip


@register.filter
def browser(user_agent: str) -> str:
    """Firefox on Linux; roughly, since programs say of themselves what they like."""
    name = next((name for mark, name in BROWSERS.items() if mark in user_agent), "An unknown browser")
    system = next((system for mark, system in SYSTEMS.items() if mark in user_agent), "")
    return f"{name[:1].upper()}{name[1:]} on {system}" if system else f"{name[:1].upper()}{name[1:]}"
