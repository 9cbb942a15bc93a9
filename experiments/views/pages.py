"""Home and Docs: pages that say what Kangaroo is."""

from __future__ import annotations

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render

from experiments import documentation
from experiments.models import Experiment

#: What the original Kangaroo reported: perplexity and cross-entropy (nats a token) after 25,000 iterations at batch 8.
ORIGINAL = (
    ("small", 66.948, 4.203),
    ("large", 59.258, 4.081),
    ("scaled", 53.195, 3.974),
)


def home(request: HttpRequest) -> HttpResponse:
    """What Kangaroo is, a picture of it, the result it began with, and the way to Train."""
    shown = Experiment.objects.filter(is_public=True).order_by("created").first()
    return render(request, "home.html", {"original": ORIGINAL, "shown": shown})


def docs(request: HttpRequest, page: str | None = None) -> HttpResponse:
    """The list of pages, or one of them with its neighbours."""
    pages = documentation.pages()
    if page is None:
        return render(request, "docs.html", {"pages": pages})
    at = next((i for i, candidate in enumerate(pages) if candidate.name == page), None)
    if at is None:
        raise Http404(f"there is no page {page!r}; there are {', '.join(p.name for p in pages)}")
    context = {
        "pages": pages,
        "page": pages[at],
        "before": pages[at - 1] if at else None,
        "after": pages[at + 1] if at + 1 < len(pages) else None,
    }
    return render(request, "docs.html", context)
