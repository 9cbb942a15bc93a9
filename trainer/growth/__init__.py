"""Growth as plans over named axes. Imports neither torch nor transformers.

check(...)      may this child be grown from this parent?        maps.py       one axis: E, R
plan(...)       what will that do, and what does it preserve?    width.py      a map for every axis
resolve_shape   a whole shape from the parts that change         depth.py      a source for every block
OPERATORS       the rules, described for a person                exactness.py  what the maps preserve
                                                                 apply.py      a plan into weights (numpy)
"""

from __future__ import annotations

from typing import Literal

from trainer.growth.depth import DEPTH_RULES, Block
from trainer.growth.errors import GrowthError
from trainer.growth.maps import AxisMap
from trainer.growth.plan import GrowthPlan, check, plan
from trainer.growth.resolve import resolve_shape
from trainer.growth.width import WIDTH_RULES, Operator

__all__ = [
    "OPERATORS",
    "AxisMap",
    "Block",
    "GrowthError",
    "GrowthPlan",
    "Operator",
    "check",
    "plan",
    "resolve_shape",
]

#: The rules for each half of a growth operator, the default first.
OPERATORS: dict[Literal["width", "depth"], tuple[Operator, ...]] = {
    "width": tuple(rule.about for rule in WIDTH_RULES.values()),
    "depth": tuple(rule.about for rule in DEPTH_RULES.values()),
}
