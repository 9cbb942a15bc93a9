"""A growth plan into weights: a Hugging Face folder into a larger one, streamed.

The child appears at its place whole or not at all; memory is bounded by one tensor, mostly by a block of its rows; the
same source, plan and seed give the same bytes; dtypes are kept. Needs numpy, not torch; runs no code of a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.families import Described, Family, family_of, get_family, read_config
from trainer.growth.certificate import certificate, tolerance
from trainer.growth.errors import GrowthError
from trainer.growth.plan import GrowthPlan
from trainer.growth.tensors import fresh, grown
from trainer.growth.weights import Array, SourceError, Tensor, Weights, narrow, write_safetensors

__all__ = ["Source", "SourceError", "certificate", "grow_checkpoint", "named_weights", "open_source"]

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

#: RoPE kinds whose frequencies do not depend on d_head other than through a pair's place in it.
_ROPE_THAT_GROWS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be grown: its family, and what its config says."""

    folder: Path
    family: Family
    config: dict[str, Any]
    described: Described


def open_source(folder: Path) -> Source:
    """What stands in a Hugging Face folder; reads config.json alone. Raises :class:`FamilyError`."""
    config = read_config(folder)
    family = family_of(config)
    return Source(folder, family, config, family.shape_of(config))


def grow_checkpoint(source: Path, out: Path, plan: GrowthPlan, seed: int, *, verify: bool = True) -> dict[str, Any]:
    """Grow the checkpoint in `source` into a new folder `out`, as `plan` says.

    Where the plan preserves the function, and unless `verify` is off, what was written is read again and held to the
    certificate before it is put in place. Returns parameters, new_parameters, bytes, seconds, preserves, and the
    largest residual (None where nothing was verified).

    Raises :class:`FamilyError` or :class:`SourceError` for a source that cannot be read, :class:`GrowthError` for a
    plan that is not for this source, FileExistsError where `out` holds something.
    """
    began = time.perf_counter()
    opened = open_source(source)
    _check_plan_is_for(opened, plan)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; name a folder that is not, or that is empty")
    weights = named_weights(opened)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        size = _write_weights(unfinished / "model.safetensors", weights, plan, seed)
        config = plan.child_config(opened.config)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
        residual = _verified(weights, unfinished, plan) if verify and plan.preserves else None
        unfinished.chmod(0o755)  # mkdtemp's own 0700 would keep other users of the machine out
        _sync(unfinished, *unfinished.iterdir())
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    before, after = _parameters(plan, plan.parent), _parameters(plan, plan.child)
    return {
        "parameters": after,
        "new_parameters": after - before,
        "bytes": size,
        "seconds": time.perf_counter() - began,
        "preserves": plan.preserves,
        "residual": residual,
    }


def named_weights(source: Source) -> dict[str, Tensor]:
    """The weights by the family's names; each present, of the right shape, and none that growth would lose.

    Raises :class:`SourceError`.
    """
    family, (shape, n_positions, d_vocab, tied) = source.family, source.described
    stored = dict(Weights(source.folder).tensors)
    found: dict[str, Tensor] = {}
    for parameter in family.parameters(shape, n_positions, d_vocab, tied):
        # Checkpoints of the base model, such as the original GPT-2's, have names without its prefix.
        bare = parameter.name.removeprefix(family.prefix)
        other = family.also_named.get(parameter.name, bare)
        tensor = stored.pop(parameter.name, None) or stored.pop(bare, None) or stored.pop(other, None)
        if tensor is None:
            raise SourceError(f"{source.folder}: has no {parameter.name}, or not as floating-point numbers")
        if tensor.shape != parameter.shape:
            raise SourceError(
                f"{source.folder}: {parameter.name} is {tensor.shape}, where config.json says {parameter.shape}"
            )
        found[parameter.name] = tensor
    if tied:
        for head in ("lm_head.weight", *family.also_named):
            stored.pop(head, None)  # some checkpoints hold the table a second time
    if unknown := [name for name in stored if not re.search(family.not_weights, name)]:
        raise SourceError(
            f"{source.folder}: holds {', '.join(sorted(unknown)[:3])}, which {family.title} has no place for; "
            "growing would lose it"
        )
    return found


def _check_plan_is_for(source: Source, plan: GrowthPlan) -> None:
    shape, n_positions, d_vocab, tied = source.described
    holds = {"family": source.family.name, **_plain(shape)}
    holds |= {"n_positions": n_positions, "d_vocab": d_vocab, "tied": tied}
    wants = {"family": plan.family, **_plain(plan.parent)}
    wants |= {"n_positions": plan.n_positions, "d_vocab": plan.d_vocab, "tied": plan.tied}
    for field, value in holds.items():
        if value != wants[field]:
            raise GrowthError(
                "init.parent", f"{source.folder} has {field} {value}, where the plan was made for {wants[field]}"
            )
    rope = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    wider = source.family.rotary and plan.parent.d_head != plan.child.d_head
    if plan.preserves and wider and kind not in _ROPE_THAT_GROWS:
        raise GrowthError(
            "shape.d_head",
            f"the checkpoint's RoPE ({kind}) sets its frequencies by d_head, so only {plan.parent.d_head} keeps them",
            plan.child.d_head,
        )


def _plain(shape: Any) -> dict[str, Any]:
    return {**shape.model_dump(), "n_kv_heads": shape.kv_heads}


def _parameters(plan: GrowthPlan, shape: Any) -> int:
    table = get_family(plan.family).parameters(shape, plan.n_positions, plan.d_vocab, plan.tied)
    return sum(parameter.size for parameter in table)


def _write_weights(path: Path, weights: Mapping[str, Tensor], plan: GrowthPlan, seed: int) -> int:
    origins = plan.parameters()
    usual = next(iter(weights.values())).dtype
    dtypes = [weights[origin.old.name].dtype if origin.old else usual for origin in origins]
    layout = [(origin.new.name, dtype, origin.new.shape) for origin, dtype in zip(origins, dtypes, strict=True)]

    def blocks() -> Iterator[Array]:
        for origin, dtype in zip(origins, dtypes, strict=True):
            new, old, _, following = origin
            # By name, not in turn: a tensor's random entries do not depend on what else the model has.
            rng = np.random.default_rng([seed, zlib.crc32(new.name.encode())])
            if old is None:
                values = fresh(new, plan.init.init_range, rng)
            else:
                values = grown(weights[old.name], origin, plan, rng, weights[following.name] if following else None)
            for rows in values:
                yield narrow(rows, dtype)
            for parameter in (old, following):
                if parameter is not None:
                    weights[parameter.name].release()

    return write_safetensors(path, layout, blocks(), {"format": "pt"})


def _verified(weights: Mapping[str, Tensor], folder: Path, plan: GrowthPlan) -> float:
    """The largest residual of what was written. Raises :class:`GrowthError` where it is more than rounding."""
    written = named_weights(open_source(folder))
    residuals = certificate(weights, written, plan)
    for name, residual in residuals.items():
        if not residual <= tolerance(written[name].dtype, plan):
            raise GrowthError(
                "init", f"{name} came out {residual:.2g} away from what keeps the parent's function; nothing was kept"
            )
    return max(residuals.values())


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
