"""The Docs pages: docs/*.md, which are the same files that a reader finds in the repository.

`PAGES` says which there are and in which order. A link from one to another is written as in the repository
(`figures.md#perplexity`) and becomes the site's own address; headings get GitHub's anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from django.conf import settings
from django.templatetags.static import static
from django.urls import reverse
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

#: Name of the page and what it is for, in reading order. Those whose file is not there are left out.
PAGES: dict[str, str] = {
    "guide": "From an empty page to a verdict, step by step.",
    "fields": "What each field of the Train page and of a spec means, and which values make sense.",
    "figures": "What each figure means, how it is computed, and what makes a comparison fair.",
    "growth": "The growth operators: what each does to the weights, and when it keeps the function.",
    "growth-table": "Every family, rule and ratio, grown and measured: what is kept to rounding, and what is lost.",
    "hosts": "Training on machines of your own: adding one, what is done there, how it is kept safe, how to lock it.",
    "families": "The architectures that can be grown, and what of each is kept or refused.",
    "extending": "Adding a family, a width rule or a depth rule: one class and one line.",
    "operating": "Running a site: settings, PostgreSQL, Redis, more workers, what survives a crash.",
}


@dataclass(frozen=True)
class Page:
    name: str
    summary: str
    title: str
    html: str
    #: (anchor, heading) of the page's sections
    sections: tuple[tuple[str, str], ...]


def pages() -> list[Page]:
    """Every page that is there, in reading order."""
    return [_page(name, path.stat().st_mtime_ns) for name in PAGES if (path := _path(name)).is_file()]


def _path(name: str) -> Path:
    return Path(settings.BASE_DIR) / "docs" / f"{name}.md"


@lru_cache(maxsize=32)
def _page(name: str, changed: int) -> Page:
    """The page as it was at `changed`, rendered once."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").use(anchors_plugin, max_level=4)
    tokens = markdown.parse(_path(name).read_text(encoding="utf-8"))
    title, sections = name, []
    for token, inside in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(t.content for t in inside.children or [] if t.type in ("text", "code_inline"))
            if token.tag == "h1":
                title = text
            if token.tag == "h2":
                sections.append((str(token.attrGet("id")), text))
    _fit_in(tokens)
    html = markdown.renderer.render(tokens, markdown.options, {})
    return Page(name, PAGES[name], title, html, tuple(sections))


def _fit_in(tokens: list[Token]) -> None:
    """Make links the site's, and let tables scroll and align by class: the page's policy refuses style attributes."""
    for token in tokens:
        if token.attrGet("style") == "text-align:right":
            token.attrJoin("class", "num")
        token.attrs.pop("style", None)
        if token.type == "table_open":
            token.attrJoin("class", "table table-scroll")
        if token.type == "code_block":
            token.type = "fence"  # the renderer puts a fence's attributes on <code>, where it scrolls
        if token.type in ("table_open", "fence"):
            token.attrSet("tabindex", "0")  # wide ones scroll, which the keyboard must be able to do
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("href", _address(str(child.attrGet("href"))))
            if child.type == "image":  # docs/img, which is among the static files
                child.attrSet("src", static(str(child.attrGet("src")).replace("img/", "docs/", 1)))


def _address(href: str) -> str:
    """figures.md#perplexity -> /docs/figures/#perplexity; what is no page of ours stays as it is."""
    file, hash, anchor = href.partition("#")
    name = file.removesuffix(".md")
    return reverse("docs_page", args=[name]) + hash + anchor if file.endswith(".md") and name in PAGES else href
