"""The committed table of growths says what comes out when they are made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.families import FAMILIES, get_family
from trainer.growth import OPERATORS
from trainer.growth.table import DEPTH_RULES, LOST, PATH, ROUNDING, WIDTH_RULES, Bench, Cell, label, widths_of

TEXT = PATH.read_text(encoding="utf-8")
#: As 24 roundings of logits that reach 10 can be off in float32, several times over.
ROUNDING_IN_FLOAT32 = 1e-3


def committed(section: str, row: str, column: str) -> str:
    """A cell of the table under a heading."""
    lines = TEXT.split(f"# {section}\n", 1)[1].split("\n#", 1)[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return next(cells for cells in table if cells[0] == row)[table[0].index(column)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("column", ["duplicate", "pad", "random_pad"])
@pytest.mark.parametrize(
    ("family", "what"), [("gpt2", "odd sizes"), ("llama", "d_head x1.5"), ("gemma2", "all x1.5"), ("phi3", "all x2")]
)
def test_a_growth_in_width_is_as_the_table_says(family: str, what: str, column: str, bench: Bench) -> None:
    changes = widths_of(family)[what]
    measured = bench.measure(family, changes, WIDTH_RULES[column])

    compare(measured, committed(get_family(family).title, label(family, what, changes), column))
    assert measured.preserves == (column != "random_pad")


@pytest.mark.parametrize("column", ["identity, 2 to 3", "stack, 2 to 4"])
def test_a_growth_in_depth_is_as_the_table_says(column: str, bench: Bench) -> None:
    init, changes = DEPTH_RULES[column]

    compare(bench.measure("qwen3", changes, init), committed("Depth", "qwen3", column))


def compare(measured: Cell, cell: str) -> None:
    if not measured.preserves:
        lost = float(cell.strip("*"))
        assert cell == f"*{cell.strip('*')}*"
        assert lost > LOST
        assert measured.differences["float64"] == pytest.approx(lost, rel=0.06)  # two digits are given
        return
    exact, usual = map(float, cell.split(" · "))
    assert max(exact, measured.differences["float64"]) < ROUNDING
    assert max(usual, measured.differences["float32"]) < ROUNDING_IN_FLOAT32


def test_every_family_and_every_rule_is_in_the_table() -> None:
    assert all(committed("In short", family, "lost") for family in FAMILIES)
    for family in FAMILIES:
        for what, changes in widths_of(family).items():
            for rule in OPERATORS["width"]:
                assert committed(get_family(family).title, label(family, what, changes), rule.key)
    assert all(committed("Depth", "llama", f"{rule.key}, 2 to 4") for rule in OPERATORS["depth"])


def test_a_plan_that_is_wrong_of_what_it_preserves_makes_no_table(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.growth.table.LOST", 1e6)
    with pytest.raises(ValueError, match="preserves is False"):
        bench.measure("llama", {"d_mlp": 48}, {"width": "random_pad"})
