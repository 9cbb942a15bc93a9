"""How figures are written."""

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from experiments.templatetags import figures


def plain(text: str) -> str:
    return text.replace(figures.NBSP, " ")


@pytest.mark.parametrize(
    ("filter_name", "value", "written"),
    [
        ("count", 1_234_567, "1,234,567"),
        ("count", 0, "0"),
        ("si", 5_498_368, "5.5 M"),
        ("si", 124_439_808, "124 M"),
        ("si", 12_400, "12.4 k"),
        ("si", 999_960, "1.0 M"),
        ("si", 99_960, "100 k"),
        ("si", 812, "812"),
        ("si", 0, "0"),
        ("si", 7_600_000_000, "7.6 B"),
        ("si", -1500, "-1.5 k"),
        ("flops", 1.08e14, "1.1e14"),
        ("flops", 9.96e14, "1.0e15"),
        ("flops", 0, "0"),
        ("loss", 3.97431, "3.974"),
        ("loss", "4.2", "4.200"),
        ("perplexity", 3.974, "53.20"),
        ("perplexity", 4.203, "66.89"),
        ("perplexity", 8.0, "2,981"),
        ("perplexity", 1e6, "infinite"),
        ("ppl", 53.195, "53.20"),
        ("ppl", 66.948, "66.95"),
        ("percent", 0.382, "38 %"),
        ("percent", 0.034, "3.4 %"),
        ("percent", 1.2, "120 %"),
        ("percent", 0, "0 %"),
        ("duration", 0.42, "0.4 s"),
        ("duration", 9.96, "10 s"),
        ("duration", 59.6, "1 min 00 s"),
        ("duration", 182, "3 min 02 s"),
        ("duration", 3599.7, "1 h 00 min"),
        ("duration", 7260, "2 h 01 min"),
        ("duration", 190_000, "2 d 05 h"),
        ("filesize_short", 12_400_000, "12.4 MB"),
        ("filesize_short", 812, "812 B"),
        ("filesize_short", 999_999, "1.0 MB"),
        ("learning_rate", 0.001, "1e-3"),
        ("learning_rate", 0.00025, "2.5e-4"),
    ],
)
def test_a_figure_is_written_in_its_own_way(filter_name: str, value: object, written: str) -> None:
    assert plain(getattr(figures, filter_name)(value)) == written


ALL = ["count", "si", "flops", "loss", "ppl", "perplexity", "percent", "duration", "filesize_short", "learning_rate"]


@pytest.mark.parametrize("filter_name", ALL)
@pytest.mark.parametrize("nothing", [None, "", math.nan, "no number", True])
def test_a_figure_that_is_not_there_is_a_dash(filter_name: str, nothing: object) -> None:
    assert getattr(figures, filter_name)(nothing) == figures.MISSING


@pytest.mark.parametrize("filter_name", ALL)
def test_infinity_is_said_in_words(filter_name: str) -> None:
    assert getattr(figures, filter_name)(math.inf) == "infinite"


def test_a_number_never_parts_from_its_unit() -> None:
    assert " " not in figures.duration(182) + figures.si(5e6) + figures.filesize_short(5e6)


def test_a_time_is_given_in_utc_for_the_browser_to_put_into_the_readers_words() -> None:
    moment = datetime(2026, 11, 24, 13, 5, tzinfo=timezone(timedelta(hours=1)))
    assert figures.when(moment) == '<time datetime="2026-11-24T12:05:00+00:00">24 Nov 2026, 12:05 UTC</time>'
    assert figures.when(datetime(2026, 1, 1, tzinfo=UTC)).startswith("<time")
    assert figures.when(None) == figures.MISSING
