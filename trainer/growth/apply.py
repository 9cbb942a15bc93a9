"""A growth plan into weights: a Hugging Face folder into a larger one, streamed.

For each stored tensor of the child, a block of rows at a time: gather the parent's entries by the axes' source indices,
multiply by the coefficients in float64, fill what is new, cast to the stored dtype, write. Memory is bounded by one
tensor. The child appears at its place whole or not at all, and the same source, plan and seed give the same bytes.

Needs numpy, not torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.families import Axes, Described, Family, Parameter, family_of, read_config
from trainer.growth.errors import GrowthError
from trainer.growth.maps import NEW, product
from trainer.growth.plan import GrowthPlan
from trainer.growth.weights import EPSILON, Array, CheckpointError, Tensor, Weights, narrow, write_safetensors

Floats = NDArray[np.float64]

#: Rows are taken together until they make about this many entries.
BLOCK_ENTRIES = 1 << 20

#: What is taken along unread: the tokenizer, its template, and how to generate.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be grown: its family, and what its config says."""

    folder: Path
    family: Family
    config: dict[str, Any]
    described: Described


def open_source(folder: Path) -> Source:
    """What stands in a Hugging Face folder. Raises :class:`FamilyError`; reads config.json alone."""
    config = read_config(folder)
    family = family_of(config)
    return Source(folder, family, config, family.shape_of(config))


def grow_checkpoint(source: Path, out: Path, plan: GrowthPlan, seed: int, *, verify: bool = True) -> dict[str, Any]:
    """Grow the checkpoint in `source` into a new folder `out`, as `plan` says.

    With `verify`, the written file is held to the certificate (:func:`certificate`) before it is put in place. Returns
    parameters, new_parameters, bytes, seconds, preserves and the largest residual (None where not verified).

    Raises :class:`FamilyError` or :class:`CheckpointError` for a source that cannot be read, :class:`GrowthError` for a
    plan that is not for this source, FileExistsError where `out` holds something.
    """
    began = time.perf_counter()
    opened = open_source(source)
    _fits(opened, plan)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; name a folder that is not, or that is empty")
    weights = named_weights(opened)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        size = _write_model(unfinished / "model.safetensors", weights, plan, seed)
        config = opened.family.resized(opened.config, plan.child)
        _write_text(unfinished / "config.json", json.dumps(config, indent=2) + "\n")
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
        residual = None
        if verify:
            residual = _verified(weights, named_weights(open_source(unfinished)), plan)
        unfinished.chmod(0o755)  # mkdtemp's own 0700 would keep other users of the machine out
        _sync(unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    old, new = (sum(p.size for p in table) for table in _old_and_new(opened.family, plan))
    return {
        "parameters": new,
        "new_parameters": new - old,
        "bytes": size,
        "seconds": time.perf_counter() - began,
        "preserves": plan.preserves,
        "residual": residual,
    }


def named_weights(source: Source) -> dict[str, Tensor]:
    """The weights by the family's names; each present, of the right shape, and none that growth would lose.

    Raises :class:`CheckpointError`.
    """
    family, (shape, n_positions, d_vocab, tied) = source.family, source.described
    stored = dict(Weights(source.folder).tensors)
    found: dict[str, Tensor] = {}
    for parameter in family.parameters(shape, n_positions, d_vocab, tied):
        bare = parameter.name.removeprefix(family.prefix)
        tensor = stored.pop(parameter.name, None) or stored.pop(bare, None)
        if tensor is None:
            raise CheckpointError(f"{source.folder}: has no {parameter.name}, or not as floating-point numbers")
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{source.folder}: {parameter.name} is {tensor.shape}, where config.json says {parameter.shape}"
            )
        found[parameter.name] = tensor
    if tied:
        stored.pop("lm_head.weight", None)  # some checkpoints hold the table a second time
    if unknown := [name for name in stored if not re.search(family.not_weights, name)]:
        raise CheckpointError(
            f"{source.folder}: holds {', '.join(sorted(unknown)[:3])}, which {family.title} has no place for; "
            "growing would lose it"
        )
    return found


def _fits(source: Source, plan: GrowthPlan) -> None:
    shape, n_positions, d_vocab, tied = source.described
    said = (source.family.name, shape.model_copy(update={"n_kv_heads": shape.kv_heads}), n_positions, d_vocab, tied)
    parent = plan.parent.model_copy(update={"n_kv_heads": plan.parent.kv_heads})
    planned = (plan.family, parent, plan.n_positions, plan.d_vocab, plan.tied)
    if said != planned:
        raise GrowthError("init.parent", f"{source.folder} is {said}, and the plan is for {planned}")
    rope = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if plan.parent.d_head != plan.child.d_head and kind not in ("default", "linear", "llama3"):
        raise GrowthError(
            "shape.d_head",
            f"the checkpoint's RoPE ({kind}) scales its frequencies by d_head; keep {plan.parent.d_head}",
            plan.child.d_head,
        )


def _old_and_new(family: Family, plan: GrowthPlan) -> list[tuple[Parameter, ...]]:
    return [family.parameters(s, plan.n_positions, plan.d_vocab, plan.tied) for s in (plan.parent, plan.child)]


# One tensor


def _write_model(path: Path, weights: dict[str, Tensor], plan: GrowthPlan, seed: int) -> int:
    pairs = plan.parameters()
    default = next(iter(weights.values())).dtype
    dtypes = [weights[old.name].dtype if old else default for _, old, _ in pairs]
    layout = [(new.name, dtype, new.shape) for (new, _, _), dtype in zip(pairs, dtypes, strict=True)]

    def blocks() -> Iterator[Array]:
        for (new, old, block), dtype in zip(pairs, dtypes, strict=True):
            rng = np.random.default_rng([seed, zlib.crc32(new.name.encode())])
            tensor = weights[old.name] if old and not (block.silent and new.writes_residual) else None
            if old and tensor is None:
                made: Iterator[Floats] = iter([np.zeros(new.shape)])
            elif tensor is None:
                made = _fresh(new, plan.init.init_range, rng)
            elif new.into:
                made = _grown_matrix(tensor, new, plan, rng)
            else:
                made = iter([_grown_vector(tensor, new, plan)])
            for values in made:
                yield narrow(values, dtype)

    return write_safetensors(path, layout, blocks(), {"format": "pt"})


def _fresh(parameter: Parameter, init_range: float, rng: np.random.Generator) -> Iterator[Floats]:
    if parameter.fresh == "normal":
        rows, columns = parameter.shape
        for start, stop in _row_blocks(rows, columns):
            yield rng.normal(0, init_range, (stop - start, columns))
    else:
        yield np.full(parameter.shape, 1.0 if parameter.fresh == "ones" else 0.0)


def _row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_ENTRIES // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@dataclass(frozen=True)
class _Side:
    """An axis map laid out along one dimension of a stored tensor; segments lie side by side."""

    source: NDArray[np.intp]  # where NEW, 0: look at `new`
    new: NDArray[np.bool_]
    write: Floats
    read: Floats
    random: NDArray[np.bool_]  # new, and filled with random entries

    @property
    def unchanged(self) -> bool:
        return bool((self.source == np.arange(len(self.source))).all()) and not self.new.any()


def _side(plan: GrowthPlan, segments: tuple[Axes, ...]) -> _Side:
    maps = [reduce(product, [plan.maps[axis] for axis in axes]) for axes in segments]
    offsets = np.cumsum([0, *(m.small for m in maps)])
    source = np.concatenate([np.asarray(m.source_index, np.intp) for m in maps])
    new = source == NEW
    source = source + np.repeat(offsets[:-1], [m.large for m in maps])
    source[new] = 0
    fill = np.repeat([m.fill == "random" for m in maps], [m.large for m in maps])
    write, read = (
        np.concatenate([np.asarray(getattr(m, side), np.float64) for m in maps]) for side in ("write", "read")
    )
    return _Side(source, new, write, read, new & fill)


def _grown_vector(old: Tensor, new: Parameter, plan: GrowthPlan) -> Floats:
    out = _side(plan, new.out)
    values = old[:][out.source]
    if new.kind == "bias":
        values = values * out.write
    elif new.final_norm:
        values = values * plan.final_norm_scale
    values[out.new] = 1.0 if new.fresh == "ones" else 0.0
    return values


def _grown_matrix(old: Tensor, new: Parameter, plan: GrowthPlan, rng: np.random.Generator) -> Iterator[Floats]:
    """W' = E_out W R_in + N (I - E_in R_in), as stored, in blocks of stored rows."""
    out, into = _side(plan, new.out), _side(plan, (new.into,))
    rows, columns = (into, out) if new.in_first else (out, into)
    row_factor, column_factor = (into.read, out.write) if new.in_first else (out.write, into.read)
    copies = _Copies(into) if plan.init.noise and plan.init.width == "duplicate" else None
    if copies is not None and not copies.any:
        copies = None
    # Copies of an input must be seen together to share out noise among them: stored in_first, that is the whole tensor.
    whole = copies is not None and new.in_first
    blocks = [(0, new.shape[0])] if whole else _row_blocks(*new.shape)
    plain_columns = columns.unchanged
    for start, stop in blocks:
        part = slice(start, stop)
        values = old[rows.source[part]]
        if not plain_columns:
            values = values[:, columns.source]
        values *= row_factor[part, None]
        values *= column_factor
        row_new, column_new = rows.new[part, None], columns.new
        if copies is not None:
            matrix = values.T if new.in_first else values
            out_new = column_new if new.in_first else row_new[:, 0]
            copies.add_noise(matrix, ~out_new, plan.init.noise, rng)
        if row_new.any() or column_new.any():
            out_new, in_new = (column_new, row_new) if new.in_first else (row_new, column_new)
            out_random = columns.random if new.in_first else rows.random[part, None]
            drawn = rng.normal(0, plan.init.init_range, values.shape)
            # What is written to a new index follows its fill; what reads one is free, so it is drawn.
            values = np.where(out_new, np.where(out_random, drawn, 0.0), np.where(in_new, drawn, values))
        yield values


class _Copies:
    """Which inputs are copies of one another: noise that sums to zero over them is never seen."""

    def __init__(self, into: _Side):
        where = np.flatnonzero(~into.new)
        self.order = where[np.argsort(into.source[where], kind="stable")]
        sources = into.source[self.order]
        self.starts = np.flatnonzero(np.r_[True, sources[1:] != sources[:-1]])
        self.counts = np.diff(np.r_[self.starts, len(sources)])
        self.any = bool((self.counts > 1).any())
        # Taking the mean away takes 1 / n of the power: given back, so that `noise` is what it says.
        with np.errstate(divide="ignore"):
            self.gain = np.where(self.counts > 1, np.sqrt(self.counts / np.maximum(self.counts - 1, 1)), 0.0)

    def add_noise(self, matrix: Floats, heard: NDArray[np.bool_], noise: float, rng: np.random.Generator) -> None:
        """Add to each row of `matrix` (out, in), in place: zero-mean over copies, `noise` times the row's own size."""
        drawn = rng.standard_normal((len(matrix), len(self.order)))
        means = np.add.reduceat(drawn, self.starts, axis=1) / self.counts
        drawn -= np.repeat(means, self.counts, axis=1)
        drawn *= np.repeat(self.gain, self.counts)
        size = np.sqrt(np.mean(matrix[:, self.order] ** 2, axis=1)) * heard
        matrix[:, self.order] += drawn * (noise * size)[:, None]


# The certificate


def certificate(parent: dict[str, Tensor], child: dict[str, Tensor], plan: GrowthPlan) -> dict[str, float]:
    """For each tensor of the child, max |W' E_in - E_out W|: zero up to rounding where it keeps the parent's function.

    No forward pass, and from E alone: R and the noise are what is being checked. A silent block's output matrices are
    held to zero, a random block has nothing to be held to and is left out. Relative to the tensor's largest entry.
    With a plan that `preserves`, residuals at rounding level prove that the child computes what the parent does.
    """
    residuals = {}
    for new, old, block in plan.parameters():
        if old is None:
            continue
        grown, source = child[new.name], parent[old.name]
        scale = max(float(np.abs(source[:]).max(initial=0.0)), 1e-30)
        if block.silent and new.writes_residual:
            residuals[new.name] = float(np.abs(grown[:]).max(initial=0.0)) / scale
        else:
            residuals[new.name] = _residual(source[:], grown[:], new, plan) / scale
    return residuals


def _residual(source: Floats, grown: Floats, new: Parameter, plan: GrowthPlan) -> float:
    out = _side(plan, new.out)
    if not new.into:
        write = (
            out.write if new.kind == "bias" else np.full(len(grown), plan.final_norm_scale if new.final_norm else 1.0)
        )
        expected = np.where(out.new, 0.0, source[out.source] * write)
        judged = ~out.new if new.kind != "bias" else ~out.random
        return float(np.abs(grown - expected)[judged].max(initial=0.0))
    into = _side(plan, (new.into,))
    if new.in_first:
        source, grown = source.T, grown.T
    read = np.zeros((len(grown), source.shape[1]))
    for j in np.flatnonzero(~into.new):  # W' E_in: add up the columns of each input's copies
        read[:, into.source[j]] += grown[:, j] * into.write[j]
    expected = np.where(out.new[:, None], 0.0, source[out.source] * out.write[:, None])
    # Random outputs are judged by exactness.broken: only query channels that meet zero keys may be.
    return float(np.abs(read - expected)[~out.random].max(initial=0.0))


def _verified(parent: dict[str, Tensor], child: dict[str, Tensor], plan: GrowthPlan) -> float | None:
    """The largest residual, held to what rounding to the stored dtype can make; None where nothing is promised."""
    if not plan.preserves:
        return None
    residuals = certificate(parent, child, plan)
    for name, residual in residuals.items():
        if not residual <= _tolerance(child[name].dtype, plan):
            raise GrowthError(
                "init", f"{name} came out {residual:.2g} away from what preserves the function; nothing was written"
            )
    return max(residuals.values(), default=0.0)


def _tolerance(dtype: str, plan: GrowthPlan) -> float:
    # Each copy is rounded on its own, at the size that noise gives it (in five standard deviations).
    copies = max(max(m.multiplicity) for m in plan.maps.values())
    return EPSILON[dtype] * (4 + 8 * plan.init.noise) * copies


# Files


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
