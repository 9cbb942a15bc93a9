from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.reports import Report, reported


def test_work_tells_how_far_it_is_and_gives_what_it_made() -> None:
    def work(report: Report) -> str:
        for done in range(1, 4):
            report("counting", done, 3)
        return "made"

    made = []

    def whole() -> Iterator[dict[str, Any]]:
        made.append((yield from reported(work, lambda: False, KeyError())))

    told = list(whole())
    assert made == ["made"]
    assert [(e["kind"], e["what"], e["done"], e["total"]) for e in told] == [
        ("preparing", "counting", 1, 3),
        ("preparing", "counting", 3, 3),
    ], "the first of its kind and the last, and between them one a second"


def test_work_that_is_stopped_clears_up_and_what_goes_wrong_in_it_is_raised() -> None:
    cleared = []

    def endless(report: Report) -> None:
        try:
            while True:
                report("going on", None, None)
                time.sleep(0.01)
        finally:
            cleared.append(True)

    with pytest.raises(KeyError, match="stopped"):
        list(reported(endless, lambda: True, KeyError("stopped")))
    assert cleared

    def broken(report: Report) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        list(reported(broken, lambda: False, KeyError()))
