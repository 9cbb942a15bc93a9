"""Which rules to begin with, for two shapes: worked out, with the reason in a sentence."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from trainer.growth.axes import FIELD_AXES, size_of
from trainer.growth.errors import GrowthError
from trainer.growth.plan import GrowthPlan, plan
from trainer.growth.width import WIDTH_RULES
from trainer.shape import GrowInit, Shape


class Advice(NamedTuple):
    width: str
    depth: str
    snr_db: float | None  # of the noise that lets copies part; None where there are none
    preserves: bool
    why: str  # a sentence or two


@lru_cache(maxsize=256)
def recommend(family: str, parent: Shape, child: Shape) -> Advice:
    """Rules that keep the function, if any do for these shapes: copies before padding, since copies all take part from
    the first step on. New blocks are silent. Raises :class:`GrowthError` where nothing grows one into the other.
    """
    widths = ["duplicate", "pad", *(key for key in WIDTH_RULES if key not in ("duplicate", "pad"))]
    plans: dict[str, GrowthPlan] = {}
    refused: GrowthError | None = None
    for width in widths:
        init = GrowInit(parent="parent", width=width, depth="identity")
        try:
            found = plan(family, parent, child, init, n_positions=1, d_vocab=1, tied=True)
        except GrowthError as error:
            refused = refused or error
            continue
        plans[width] = found
        if found.preserves:
            return _advice(width, found, plans, refused)
    if refused is not None and not plans:
        raise refused
    width = next(iter(plans))
    return _advice(width, plans[width], plans, refused)


def _advice(width: str, best: GrowthPlan, tried: dict[str, GrowthPlan], refused: GrowthError | None) -> Advice:
    copies = any(max(m.multiplicity) > 1 for m in best.maps.values())
    wider = any(size_of(best.parent, f) != size_of(best.child, f) for f in FIELD_AXES)
    deeper = best.child.n_layers > best.parent.n_layers
    if not best.preserves:
        why = f"No rule keeps the function for these shapes. {reason(best)} It still begins with all that was learned."
    elif not wider and not deeper:
        why = "Nothing grows: every weight is copied as it is."
    elif not wider:
        why = "Only depth grows, and blocks that write nothing yet leave the function as it is."
    else:
        why = "It begins by computing exactly what the smaller one does."
        if width != "duplicate":
            lost = f"{refused.message}" if refused else reason(tried["duplicate"])
            why += f" Duplication would not: {lost[0].lower()}{lost[1:]}{'' if lost.endswith('.') else '.'}"
        if copies:
            why += " Noise that no activation shows lets copies part at the first step."
    return Advice(width, "identity", 0.0 if copies else None, best.preserves, why)


def reason(found: GrowthPlan) -> str:
    """Why a plan keeps the function or does not, without the conclusion, which a page says by other means."""
    return f"{found.because.partition(', so the grown model ')[0].rstrip('.')}."
