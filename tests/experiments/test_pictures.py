"""The pictures of growth rules: drawn from what the rules really do."""

from __future__ import annotations

import re

import pytest

from experiments.pictures import depth_picture, matrix, shown_blocks, width_picture
from trainer.growth import OPERATORS

SMALL = ("old 0", "old 3", "old 3", "old 6")


def rows(rule: str, large: int, family: str = "llama") -> list[list[str]]:
    cells = matrix(family, rule, 2, large)
    return [[cell.look for cell in cells[y * large : (y + 1) * large]] for y in range(large)]


def test_a_width_rule_is_drawn_entry_by_entry() -> None:
    a, b, c, d = SMALL
    assert rows("duplicate", 4) == [[a, b, a, b], [c, d, c, d]] * 2
    zeros = ["zero"] * 4
    assert rows("pad", 4) == [[a, b, "zero", "zero"], [c, d, "zero", "zero"], zeros, zeros]
    assert rows("block_diagonal", 4)[0] == [a, b, "zero", "zero"]
    assert rows("block_diagonal", 4)[2] == ["zero", "zero", a, b]
    assert rows("random_pad", 3) == [[a, b, "random"], [c, d, "random"], ["random"] * 3]
    assert rows("aki", 4)[2] == ["above 0", "above 3", "above 0", "above 3"]


def test_a_depth_rule_is_drawn_with_these_very_depths_where_there_is_room() -> None:
    assert shown_blocks("stack", 3, 6)[:2] == (3, 6)
    assert shown_blocks("stack", 32, 48)[:2] == (4, 6)
    assert shown_blocks("stack", 4, 4)[:2] == (4, 8)
    assert shown_blocks("solar", 2, 12)[:2] == (4, 8)  # which leads nowhere
    assert depth_picture("identity", 2, 4).count("silent") == 2
    assert "random" in depth_picture("append_random", 2, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", [rule.key for rule in OPERATORS["width"]])
@pytest.mark.parametrize("ratio", [1.1, 1.5, 2, 16])
def test_every_picture_stays_small_and_needs_no_style(family: str, rule: str, ratio: float) -> None:
    picture = width_picture(family, rule, ratio)
    width, height = map(int, re.findall(r'(?:width|height)="(\d+)"', picture))
    assert width <= 130
    assert height <= 80
    assert "style" not in picture
    assert "NaN" not in picture
