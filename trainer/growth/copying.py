"""The matrices that are the parent's entries again, at most times powers of two: made in the bits they are stored in.

That is every matrix of a deeper model, and of a wider one without noise at a ratio that is a power of two. What comes
out is to the bit what :func:`trainer.growth.tensors.grown` gives once it is rounded, at several times its speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.growth.plan import GrowthPlan, Origin
from trainer.growth.tensors import Floats, Side, row_blocks, side_of
from trainer.growth.weights import Array, Tensor, narrow, widen32


def copied(old: Tensor, origin: Origin, plan: GrowthPlan, dtype: str) -> Iterator[Array] | None:
    """The child's matrix of `origin` in blocks of rows, as stored in `dtype`; None where it is more than a copy."""
    new = origin.new
    if not new.into or origin.following is not None or (origin.block.silent and new.writes_residual):
        return None
    out, into = side_of(plan, new.out, new.interleaved), side_of(plan, (new.into,))
    if into.copies.several and (plan.init.noise or plan.split != "even"):
        return None
    if out.averaged.any() or out.drawn.any() or into.drawn_from.any():
        return None
    write = out.write * plan.table_scale if new.into == ("vocab",) else out.write
    rows, columns = (into, out) if new.in_first else (out, into)
    row_scale, column_scale = (into.read, write) if new.in_first else (write, into.read)
    scale = _by_source(columns, column_scale)
    # One of the two is the same for all, so that they are one number an entry: what is rounded twice may differ.
    if scale is None or not (_is_one_value(scale) or _is_one_value(row_scale[~rows.new])):
        return None
    if not _powers_of_two(scale) or not _powers_of_two(row_scale[~rows.new]):
        return None
    unscaled = bool((scale == 1).all() and (row_scale[~rows.new] == 1).all())
    if old.dtype == "F64" and not (unscaled and dtype == "F64"):
        return None  # what follows is done in float32
    return _blocks(old, new.shape, rows, columns, row_scale, scale, dtype, as_it_is=unscaled and old.dtype == dtype)


def _blocks(
    old: Tensor,
    shape: tuple[int, ...],
    rows: Side,
    columns: Side,
    row_scale: Floats,
    scale: Floats,
    dtype: str,
    *,
    as_it_is: bool,
) -> Iterator[Array]:
    for part in row_blocks(shape):
        block = old.stored(rows.source[part])
        if not as_it_is:
            values = widen32(block) if old.dtype == "BF16" else block.astype(np.float32)
            # One of the two is one number throughout.
            factor = row_scale[part, None] * scale.flat[0] if _is_one_value(scale) else scale * row_scale[~rows.new][0]
            try:
                with np.errstate(over="raise"):
                    values *= factor.astype(np.float32)
            except FloatingPointError:
                raise OverflowError(f"an entry is too large for {dtype}") from None
            block = narrow(values, dtype)
        block = columns.spread(block)
        block[:, columns.new] = 0
        block[rows.new[part]] = 0
        yield block


def _by_source(columns: Side, scale: Floats) -> Floats | None:
    """The scales by small index, (1, small); None where copies of one source have unlike ones."""
    old = ~columns.new
    by_source = np.ones(columns.small)
    by_source[columns.source[old]] = scale[old]
    return by_source[None, :] if (by_source[columns.source[old]] == scale[old]).all() else None


def _is_one_value(scale: Floats) -> bool:
    return bool((scale == scale.flat[0]).all()) if scale.size else True


def _powers_of_two(scale: Floats) -> bool:
    return bool((np.frexp(scale)[0] == 0.5).all())
