"""Polls: a page is made of sections, each with a mark of what it showed.

A poll brings the marks back and is answered with the sections that look different now, or with 204.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.utils.cache import patch_vary_headers


def seen(request: HttpRequest) -> dict[str, str]:
    """The marks that a poll brings back: `seen=name:mark`, one for each section."""
    pairs = (text.partition(":") for text in request.GET.getlist("seen"))
    return {name: mark for name, _, mark in pairs}


def section(request: HttpRequest, template: str, name: str, context: dict[str, Any]) -> dict[str, str]:
    """A part of a page, drawn, with its mark."""
    html = render_to_string(template, context, request=request)
    # The token in a form is another one in every answer, and means the same.
    bare = re.sub(r'name="csrfmiddlewaretoken" value="[^"]*"', "", html)
    return {"name": name, "html": html, "mark": hashlib.sha256(bare.encode()).hexdigest()[:10]}


def answer(pieces: Sequence[str], *, settled: bool) -> HttpResponse:
    """The answer to a poll. When `settled`, the page hears that there is nothing left to wait for."""
    response = HttpResponse("\n".join(pieces), status=200 if pieces else 204)
    if settled:
        response["HX-Trigger"] = "kangaroo:settled"
    response["Cache-Control"] = "no-store"
    patch_vary_headers(response, ["HX-Request"])
    return response
