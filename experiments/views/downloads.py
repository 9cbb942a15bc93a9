"""Files on their way out: made or read while they are sent, whatever their size, and never too many at once."""

from __future__ import annotations

import contextlib
import io
import os
import time
import weakref
import zipfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from django.http import HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

#: Bytes that are sent at a time.
_BLOCK = 2**20


def members(folder: Path) -> list[Path]:
    """The files of a checkpoint; none if it was replaced by a newer one while we looked."""
    try:
        return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    except FileNotFoundError:
        return []


def bytes_of(folder: Path) -> int:
    total = 0
    for path in members(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def zipped(folder: Path, title: str, more: Mapping[str, bytes] | None = None) -> Generator[bytes, None, None]:
    """The files under `folder`, and those of `more` by their names, as a zip, in pieces. Stored, not deflated: weights
    do not compress."""
    out = _Pipe()
    with contextlib.ExitStack() as opened, zipfile.ZipFile(out, "w") as archive:
        # All are opened first: those of a checkpoint that is deleted meanwhile can still be read to their end.
        files = [(path, opened.enter_context(path.open("rb"))) for path in members(folder)]
        for name, content in (more or {}).items():
            archive.writestr(zipfile.ZipInfo(f"{title}/{name}", time.localtime()[:6]), content)
        for path, source in files:
            member = zipfile.ZipInfo(f"{title}/{path.relative_to(folder)}", time.localtime()[:6])
            # It must know its size: one beyond 2 GB is written in another way.
            member.file_size = os.fstat(source.fileno()).st_size
            with archive.open(member, "w") as target:
                while block := source.read(_BLOCK):
                    target.write(block)
                    yield out.take()
    yield out.take()


class _Pipe(io.RawIOBase):
    """What is written, to be taken out again: a file that cannot be sought, for zipfile to write to."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken = b"".join(self.parts)
        self.parts.clear()
        return taken


#: Long answers that one web process sends at once. Each takes a thread for as long as its reader likes, and the pages
#: need the others.
DOWNLOADS = 4
_places = BoundedSemaphore(DOWNLOADS)


def download(pieces: Generator[Any, None, None], content_type: str, name: str) -> HttpResponseBase:
    """A file made while it is sent; 503 when too many are being sent already."""
    if not _places.acquire(blocking=False):
        words = "Too many files are being downloaded from here at once. Try again in a minute.\n"
        return HttpResponse(words, "text/plain; charset=utf-8", 503, headers={"Retry-After": "60"})
    response = StreamingHttpResponse(_Sent(pieces), content_type=content_type)
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


class _Sent:
    """The pieces of a download, and its place, given back however it ends: a reader may not even begin to read."""

    def __init__(self, pieces: Generator[Any, None, None]) -> None:
        self.pieces = pieces
        self.give_back = weakref.finalize(self, _places.release)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.pieces)

    def close(self) -> None:
        self.pieces.close()
        self.give_back()
