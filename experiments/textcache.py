"""The cache of prepared text (:mod:`trainer.data`), kept from growing for ever.

The text of an upload lies there as tokens. It is removed once no run has asked for it for DATA_CACHE_DAYS; a run that
wants it again prepares it again, to the same tokens.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from django.conf import settings

from experiments.models import ACTIVE, ModelRun

log = logging.getLogger(__name__)


def sweep() -> int:
    """Remove what was not used for long, and what a killed run left half made; how many folders went."""
    removed = 0
    for folder in _unused():
        gone = folder.with_name(f".gone-{folder.name}")
        with suppress(OSError):
            folder.rename(gone)  # in one step: no run may find it in part
            shutil.rmtree(gone)
            removed += 1
    for entry in (settings.DATA_CACHE / "index").glob("*.json"):
        with suppress(OSError, ValueError, KeyError):
            if not (settings.DATA_CACHE / json.loads(entry.read_text())["fingerprint"]).exists():
                entry.unlink()
    if removed:
        log.info("%s prepared texts were removed that no run had used for %s days", removed, settings.DATA_CACHE_DAYS)
    return removed


def _unused() -> Iterator[Path]:
    if not settings.DATA_CACHE_DAYS or not settings.DATA_CACHE.is_dir():
        return
    oldest = time.time() - settings.DATA_CACHE_DAYS * 24 * 3600
    prepared = ModelRun.objects.filter(experiment__runs__state__in=ACTIVE).values_list("prepared", flat=True)
    in_use = {held["data_fingerprint"] for held in prepared if held and "data_fingerprint" in held}
    for folder in settings.DATA_CACHE.iterdir():
        mark = folder / "prepared.json"  # touched by each run that takes it
        with suppress(OSError):
            used = (mark if mark.exists() else folder).stat().st_mtime
            if folder.is_dir() and folder.name not in in_use | {"index"} and used < oldest:
                yield folder
