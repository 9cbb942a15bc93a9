"""Small pictures of what a growth rule does, drawn from the rule's own maps and blocks: SVG for the cards of a page.

A shade stands for a place in the small model, so what is copied from one place has one shade; what is random is dotted,
what is zero is empty, what comes from the block above has the other colour. Colours are static/css/train.css's. Only an
image: whoever shows it says beside it what the rule does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from django.utils.html import format_html
from django.utils.safestring import SafeString, mark_safe

from trainer.families import get_family
from trainer.growth.depth import DEPTH_RULES, Block
from trainer.growth.errors import GrowthError
from trainer.growth.maps import NEW, AxisMap
from trainer.growth.width import WIDTH_RULES
from trainer.shape import Shape, Split

CELL = 8  # of a matrix
BLOCK, GAP = 13, 3  # a block of a model, and what is between two
SHADES = 7
#: More blocks than this are too small to be told apart: then a small example of the same ratio is drawn.
MOST_BLOCKS = 16


class Cell(NamedTuple):
    """A place in a picture, and what is there: `old 3`, `above 3` (by shade), `silent 3`, `random` or `zero`."""

    x: int
    y: int
    look: str


# Width ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def width_picture(family: str, rule: str, ratio: float, split: Split = "even") -> SafeString:
    """A matrix of 4 by 4 that reads hidden units and writes the residual stream, and the one that it becomes."""
    small = 4 if ratio <= 2.5 else 2
    large = max(small + 1, min(round(small * ratio), 10))
    cells = matrix(family, rule, small, large, split)
    side, top = CELL * large, CELL * (large - small)
    old = [Cell(x, y, f"old {_shade(x + y, 2 * small - 2)}") for y in range(small) for x in range(small)]
    at = CELL * small + 18
    return _svg(
        at + side,
        side,
        _drawn(old, CELL, 0, top // 2),
        _arrow(CELL * small + 4, side // 2),
        _drawn(cells, CELL, at, 0),
    )


def matrix(family: str, rule: str, small: int, large: int, split: Split = "even") -> list[Cell]:
    """What the rule makes of a small x small matrix from units to channels, entry by entry."""
    chosen = WIDTH_RULES[rule]
    parent, child = (Shape(d_model=n, n_heads=1, d_head=2, d_mlp=n, n_layers=1) for n in (small, large))
    maps = chosen.maps(get_family(family), parent, child)
    out, into = maps["embed"], maps["mlp"]
    diagonal = (chosen.split or split) == "diagonal"
    out_rank, into_rank = _ranks(out), _ranks(into)
    cells = []
    for y in range(large):
        for x in range(large):
            row, column = out.source_index[y], into.source_index[x]
            if row == NEW:
                look = "random" if _fill(out.new_write, y) == "random" else "zero"
            elif column == NEW:
                look = "random" if _fill(into.new_read, x) == "random" else "zero"
            elif diagonal and out_rank[y] % into.multiplicity[column] != into_rank[x]:
                look = "zero"
            else:
                above = chosen.from_above and out_rank[y] > 0
                look = f"{'above' if above else 'old'} {_shade(row + column, 2 * small - 2)}"
            cells.append(Cell(x, y, look))
    return cells


def _ranks(axis: AxisMap) -> list[int]:
    """Which of the copies of its source each index is."""
    seen: Counter[int] = Counter()
    ranks = []
    for source in axis.source_index:
        ranks.append(seen[source])
        seen[source] += 1
    return ranks


def _fill(fills: object, at: int) -> object:
    """One word for all, or a word for each index."""
    return fills if isinstance(fills, str) else fills[at]  # type: ignore[index]


# Depth ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def depth_picture(rule: str, parent: int, child: int) -> SafeString:
    """The small model's blocks, lowest first, and under them those of the large one."""
    parent, child, blocks = shown_blocks(rule, parent, child)
    step = BLOCK + GAP
    above = [Cell(x, 0, f"old {_shade(x, parent - 1)}") for x in range(parent)]
    below = [Cell(x, 1, _look(block, parent)) for x, block in enumerate(blocks)]
    return _svg(
        step * child - GAP, 2 * BLOCK + 2 * GAP, _drawn(above, step, 0, 0, BLOCK), _drawn(below, step, 0, 2, BLOCK)
    )


def shown_blocks(rule: str, parent: int, child: int) -> tuple[int, int, tuple[Block, ...]]:
    """The two depths where they can be drawn and the rule leads from one to the other, else 4 to a like multiple."""
    if child == parent or child > MOST_BLOCKS:
        child = max(5, min(round(4 * child / parent), MOST_BLOCKS)) if child > parent else 8
        parent = 4
    try:
        DEPTH_RULES[rule].refuse(parent, child)
    except GrowthError:
        parent, child = 4, 8
    return parent, child, DEPTH_RULES[rule].blocks(parent, child)


def _look(block: Block, parent: int) -> str:
    if block.source is None:
        return "random"
    return f"{'silent' if block.silent else 'old'} {_shade(block.source, parent - 1)}"


# Learned --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def learned_picture() -> SafeString:
    """A write map, the old matrix and a read map, side by side: E W R, of which E and R are trained."""
    n, large = 3, 6
    old = [Cell(x, y, f"old {_shade(x + y, 2 * n - 2)}") for y in range(n) for x in range(n)]
    write = [Cell(x, y, f"above {_shade(abs(y % n - x) * 2, 4)}") for y in range(large) for x in range(n)]
    read = [Cell(x, y, f"above {_shade(abs(x % n - y) * 2, 4)}") for y in range(n) for x in range(large)]
    middle = CELL * (large - n) // 2
    return _svg(
        CELL * (n + n + large) + 12,
        CELL * large,
        _drawn(write, CELL, 0, 0),
        _drawn(old, CELL, CELL * n + 6, middle),
        _drawn(read, CELL, CELL * 2 * n + 12, middle),
    )


# Drawing --------------------------------------------------------------------------------------------------------------


def _shade(at: int, most: int) -> int:
    return round(at * (SHADES - 1) / most) if most else SHADES - 1


def _drawn(cells: Iterable[Cell], step: int, left: int, top: int, size: int | None = None) -> SafeString:
    """A path for all cells that look alike."""
    size = size or step - 1
    paths: dict[str, list[str]] = defaultdict(list)
    for x, y, look in cells:
        at_x, at_y = left + x * step, top + y * step
        if look == "random":
            middle = size // 2
            paths[look].append(f"M{at_x + middle} {at_y + middle}h.01")
        if not look.startswith(("old", "above")):  # an outline lies inside
            paths["outline" if look in ("random", "zero") else look].append(
                f"M{at_x + 0.5:g} {at_y + 0.5:g}h{size - 1}v{size - 1}h-{size - 1}z"
            )
        else:
            paths[look].append(f"M{at_x} {at_y}h{size}v{size}h-{size}z")
    return mark_safe(  # noqa: S308 - numbers and our own words
        "".join(f'<path class="{_classes(look)}" d="{"".join(d)}"/>' for look, d in sorted(paths.items()))
    )


def _classes(look: str) -> str:
    kind, _, shade = look.partition(" ")
    return f"{kind} shade-{shade}" if shade else kind


def _arrow(x: int, y: int) -> SafeString:
    return format_html('<path class="arrow" d="M{} {}h9m-3-3l3 3l-3 3"/>', x, y)


def _svg(width: int, height: int, *parts: SafeString) -> SafeString:
    return format_html(
        '<svg class="rule-picture" viewBox="0 0 {} {}" width="{}" height="{}" aria-hidden="true">{}</svg>',
        width,
        height,
        width,
        height,
        mark_safe("".join(parts)),  # noqa: S308 - made above
    )


def swatch(look: str) -> SafeString:
    """One cell, for a legend."""
    return _svg(BLOCK, BLOCK, _drawn([Cell(0, 0, look)], BLOCK, 0, 0, BLOCK))


#: What the looks mean, for who sees them for the first time.
LEGEND = tuple(
    (swatch(look), text)
    for look, text in (
        ("old 5", "from small; like shades are copies"),
        ("above 5", "from the block above, or trained"),
        ("silent 5", "a copy that writes nothing yet"),
        ("random", "random"),
        ("zero", "zero"),
    )
)
