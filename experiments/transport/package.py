"""The trainer as an archive: what is put on a host, once a version, and what has to be installed beside it there."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import tarfile
import tomllib

from django.conf import settings


@functools.cache
def archive() -> tuple[str, bytes]:
    """The SHA-256 of the trainer's archive, and the archive. The same files make the same archive."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted((settings.BASE_DIR / "trainer").rglob("*.py")):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(settings.BASE_DIR).as_posix())
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    packed = gzip.compress(plain.getvalue(), mtime=0)
    return hashlib.sha256(packed).hexdigest(), packed


@functools.cache
def requirements() -> list[str]:
    """What the trainer needs, pinned: the dependencies that pyproject.toml lists under "# The trainer"."""
    text = (settings.BASE_DIR / "pyproject.toml").read_text()
    every: list[str] = tomllib.loads(text)["project"]["dependencies"]
    _, found, section = text.partition("    # The trainer\n")
    # Comments are no part of TOML's data, so the section is found in the text, and what it lists in the data.
    listed = [dependency for dependency in every if f'"{dependency}"' in section.partition("\n]")[0]]
    if not found or not listed:
        raise ValueError("pyproject.toml has no section of dependencies named “The trainer”")
    return listed
