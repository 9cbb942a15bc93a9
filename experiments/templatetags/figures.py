"""How figures are written, everywhere: `{% load figures %}`.

    {{ n|count }}          1,234,567                whole things, exact
    {{ n|si }}             5.5 M                    parameters, tokens: two significant digits under 10, else three
    {{ f|flops }}          1.1e14                   floating-point operations (the unit stands in the column's head)
    {{ x|loss }}           3.974                    cross-entropy, nats a token
    {{ x|perplexity }}     53.20                    e to the cross-entropy: give it the *cross-entropy*
    {{ x|ppl }}            53.20                    a number that is a perplexity already
    {{ x|percent }}        38 %                     of a fraction
    {{ s|duration }}       3 min 02 s
    {{ b|filesize_short }} 12.4 MB                  powers of 1000
    {{ t|when }}           <time datetime="...">    relative in the browser, exact on hover
    {{ r|learning_rate }}  1e-3

A figure that is not there (None, "") or not a number is a dash; infinity is said in words.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString

register = template.Library()

MISSING = "–"
#: Between a number and its unit: they never part at the end of a line.
NBSP = "\u00a0"


def _number(value: Any) -> float | str:
    """`value` as a finite number, or what to write in its place."""
    if value is None or value == "" or isinstance(value, bool):
        return MISSING
    try:
        number = float(value)
    except (TypeError, ValueError):
        return MISSING
    if math.isnan(number):
        return MISSING
    return ("infinite" if number > 0 else "-infinite") if math.isinf(number) else number


def _short(number: float) -> str:
    """Two significant digits under 10, none after the point from 100 on: 5.5, 12.4, 124."""
    return f"{number:.1f}" if abs(number) < 99.95 else f"{number:.0f}"


@register.filter
def count(value: Any) -> str:
    """1234567 -> 1,234,567"""
    number = _number(value)
    return number if isinstance(number, str) else f"{round(number):,}"


@register.filter
def si(value: Any) -> str:
    """5498368 -> 5.5 M; 812 -> 812"""
    number = _number(value)
    if isinstance(number, str):
        return number
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,960 would otherwise be written "1000 k".
        if abs(number) >= size * 0.9995:
            return f"{_short(number / size)}{NBSP}{unit}"
    return f"{number:.0f}" if number == int(number) else _short(number)


@register.filter
def flops(value: Any) -> str:
    """1.08e14 -> 1.1e14"""
    number = _number(value)
    if isinstance(number, str):
        return number
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@register.filter
def loss(value: Any) -> str:
    """3.97431 -> 3.974"""
    number = _number(value)
    return number if isinstance(number, str) else f"{number:.3f}"


@register.filter
def ppl(value: Any) -> str:
    """53.1954 -> 53.20; from 1000 on without decimals: 4,096"""
    number = _number(value)
    if isinstance(number, str):
        return number
    return f"{number:.2f}" if number < 999.995 else f"{number:,.0f}" if number < 1e7 else flops(number)


@register.filter
def perplexity(cross_entropy: Any) -> str:
    """A cross-entropy of 3.9740 nats -> 53.20"""
    number = _number(cross_entropy)
    if isinstance(number, str):
        return number
    try:
        return ppl(math.exp(number))
    except OverflowError:
        return "infinite"


@register.filter
def percent(fraction: Any) -> str:
    """0.382 -> 38 %; under a tenth with one decimal: 0.034 -> 3.4 %"""
    number = _number(fraction)
    if isinstance(number, str):
        return number
    digits = 1 if 0 < abs(number) < 0.0995 else 0
    return f"{number * 100:.{digits}f}{NBSP}%"


@register.filter
def duration(seconds: Any) -> str:
    """0.42 -> 0.4 s; 9.4 -> 9.4 s; 182 -> 3 min 02 s; 7260 -> 2 h 01 min; 190000 -> 2 d 05 h"""
    number = _number(seconds)
    if isinstance(number, str):
        return number
    if number < 0:
        return MISSING
    if number < 9.95:
        return f"{number:.1f}{NBSP}s"
    whole = round(number)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min{NBSP}{whole % 60:02d}{NBSP}s"
    minutes = round(number / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}{NBSP}h{NBSP}{minutes % 60:02d}{NBSP}min"
    hours = round(number / 3600)
    return f"{hours // 24}{NBSP}d{NBSP}{hours % 24:02d}{NBSP}h"


@register.filter
def filesize_short(value: Any) -> str:
    """12400000 -> 12.4 MB, in powers of 1000"""
    number = _number(value)
    if isinstance(number, str):
        return number
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= size * 0.9995:
            return f"{_short(number / size)}{NBSP}{unit}"
    return f"{number:.0f}{NBSP}B"


@register.filter
def learning_rate(value: Any) -> str:
    """0.001 -> 1e-3; 0.00025 -> 2.5e-4"""
    number = _number(value)
    if isinstance(number, str):
        return number
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


@register.filter
def clock(moment: datetime | None) -> SafeString | str:
    """A <time> element with a time of day, put into the reader's zone by static/js/base.js."""
    return _time(moment, "%H:%M UTC", SafeString(" data-of-day"))


@register.filter
def when(moment: datetime | None) -> SafeString | str:
    """A <time> element: exact here, made relative by static/js/base.js with the exact time on hover."""
    return _time(moment, "%-d %b %Y, %H:%M UTC")


def _time(moment: datetime | None, written: str, mark: str = "") -> SafeString | str:
    if moment is None:
        return MISSING
    utc = moment.astimezone(UTC)
    return format_html(
        '<time{} datetime="{}">{}</time>', mark, utc.isoformat(timespec="seconds"), utc.strftime(written)
    )
