"""A growth plan into weights: a Hugging Face folder into a larger one, streamed.

The child appears at its place whole or not at all; memory is for some blocks of rows, whatever the sizes; the same
source, plan, dtype and seed give the same bytes, by any number of threads. Needs numpy, not torch; runs no code of a
checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trainer.agent import cores
from trainer.families import Described, Family, family_of, get_family, read_config
from trainer.growth.certificate import certificate, residual, tolerance
from trainer.growth.copying import copied
from trainer.growth.errors import GrowthError
from trainer.growth.plan import GrowthPlan, Origin
from trainer.growth.tensors import fresh, grown
from trainer.growth.weights import NAMES, Array, Entry, Shards, SourceError, Tensor, Weights, narrow

__all__ = [
    "DTYPES",
    "Source",
    "SourceError",
    "certificate",
    "grow_checkpoint",
    "named_weights",
    "open_source",
    "parameter_counts",
]

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

#: What weights may be written as, when not as the source has them.
DTYPES = ("F32", "F16", "BF16")

#: Bytes of a file beyond which weights are split; huggingface_hub's own limit.
MAX_SHARD_BYTES = 5_000_000_000

#: Called with bytes done, bytes in all, and what is being done with them, in the thread that grows.
Progress = Callable[[int, int, str], None]

#: Seconds between two of its calls.
REPORT_SECONDS = 0.25

#: More threads than this wait for the disk, and each has blocks of its own in memory.
MOST_THREADS = 4


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


def grow_checkpoint(
    source: Path,
    out: Path,
    plan: GrowthPlan,
    seed: int,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Grow the checkpoint in `source` into a new folder `out`, as `plan` says.

    Where the plan preserves the function, and unless `verify` is off, what was written is read again and held to the
    certificate before it is put in place. `dtype` (one of :data:`DTYPES`) converts; None keeps that of each tensor.
    `progress` is called a few times a second; what it raises stops the growth. `threads`: else as many as numerical
    libraries were told, or the process has cores, :data:`MOST_THREADS` at most.

    Returns parameters, new_parameters, bytes (of the weights' files), seconds, preserves, tensors (the residual of each
    by its name), the largest residual, and the tolerance that rounding got; {} and None where nothing was verified.

    Raises :class:`FamilyError` or :class:`SourceError` for a source that cannot be read, :class:`GrowthError` for a
    plan that is not for this source or a value that `dtype` cannot hold, FileExistsError where `out` holds something,
    OSError where the disk has no room. Nothing is left of `out` then.
    """
    began = time.perf_counter()
    opened = open_source(source)
    _check_plan_is_for(opened, plan)
    if dtype is not None and dtype not in DTYPES:
        raise GrowthError("dtype", f"must be {', '.join(DTYPES)}", dtype)
    weights = named_weights(opened)
    threads = threads or min(MOST_THREADS, _threads())
    with _new_folder(out) as folder:
        config = plan.child_config(opened.config)
        if dtype is not None:
            config.pop("torch_dtype", None)  # its name in older configs
            config["dtype"] = NAMES[dtype]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        size = _write_weights(folder, weights, plan, seed, dtype, max_shard_bytes, threads, progress)
        residuals = _verified(weights, folder, plan, threads, progress) if verify and plan.preserves else {}
    before, after = parameter_counts(plan)
    usual = dtype or _usual(weights)
    return {
        "parameters": after,
        "new_parameters": after - before,
        "bytes": size,
        "seconds": time.perf_counter() - began,
        "preserves": plan.preserves,
        "residual": max(residuals.values(), default=None),
        "tolerance": tolerance(usual, plan) if residuals else None,
        "tensors": residuals,
    }


def parameter_counts(plan: GrowthPlan) -> tuple[int, int]:
    """The parent's parameters and the child's; a tied table counts once."""
    family = get_family(plan.family)
    parent = family.parameters(plan.parent, plan.n_positions, plan.d_vocab, plan.tied)
    child = family.parameters(plan.child, plan.child_positions, plan.child_vocab, plan.tied)
    return sum(parameter.size for parameter in parent), sum(parameter.size for parameter in child)


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
    torn = source.family.torn_ropes(source.config, plan.rope_power)
    if plan.preserves and plan.parent.d_head != plan.child.d_head and torn:
        raise GrowthError(
            "shape.d_head",
            f"the checkpoint's RoPE ({', '.join(sorted(torn))}) sets its frequencies by d_head, so only "
            f"{plan.parent.d_head} keeps them",
            plan.child.d_head,
        )


def _plain(shape: Any) -> dict[str, Any]:
    return {**shape.model_dump(), "n_kv_heads": shape.kv_heads}


# --- Writing and reading again ----------------------------------------------------------------------------------------


def _usual(weights: Mapping[str, Tensor]) -> str:
    return next(iter(weights.values())).dtype


def _entries(weights: Mapping[str, Tensor], origins: Iterable[Origin], dtype: str | None) -> list[Entry]:
    usual = _usual(weights)
    return [
        Entry(new.name, dtype or (weights[old.name].dtype if old else usual), new.shape) for new, old, *_ in origins
    ]


def _write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    plan: GrowthPlan,
    seed: int,
    dtype: str | None,
    max_shard_bytes: int,
    threads: int,
    progress: Progress | None,
) -> int:
    origins = plan.parameters()
    entries = _entries(weights, origins, dtype)
    _check_room(folder, sum(entry.nbytes for entry in entries))

    def write(shards: Shards, origin: Origin, entry: Entry) -> None:
        try:
            for rows in _rows(weights, origin, plan, seed, entry.dtype):
                shards.write(entry.name, rows)
        except OverflowError as error:
            wider = {"F16": "; BF16 or F32 would be right", "BF16": "; F32 would be right"}.get(entry.dtype, "")
            raise GrowthError("dtype", f"{entry.name}: {error}{wider}") from None

    with Shards(folder, entries, max_shard_bytes) as shards:
        tasks = [partial(write, shards, origin, entry) for origin, entry in zip(origins, entries, strict=True)]

        def tick() -> None:
            if progress is not None:
                progress(shards.written, shards.total, "writing")

        for _ in _side_by_side(tasks, threads, tick, shards.stop):
            pass
    return shards.bytes


def _rows(weights: Mapping[str, Tensor], origin: Origin, plan: GrowthPlan, seed: int, dtype: str) -> Iterator[Array]:
    """A tensor of the child in blocks of rows, as stored. Raises OverflowError."""
    new, old, _, following = origin
    if old is not None and (as_stored := copied(weights[old.name], origin, plan, dtype)) is not None:
        yield from as_stored
        return
    # By name, not in turn: a tensor's random entries do not depend on what else the model has.
    rng = np.random.default_rng([seed, zlib.crc32(new.name.encode())])
    if old is None:
        values = fresh(new, plan.init.init_range, rng)
    else:
        values = grown(weights[old.name], origin, plan, rng, weights[following.name] if following else None)
    for rows in values:
        yield narrow(rows, dtype)


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC, f"{wanted / 1e9:.2f} GB will be written, and {free / 1e9:.2f} GB are free", str(folder.parent)
        )


def _verified(
    weights: Mapping[str, Tensor], folder: Path, plan: GrowthPlan, threads: int, progress: Progress | None
) -> dict[str, float]:
    """The residual of each tensor that was written. Raises :class:`GrowthError` where one is more than rounding."""
    written = named_weights(open_source(folder))
    origins = [origin for origin in plan.parameters() if origin.old is not None]
    total = sum(written[origin.new.name].nbytes for origin in origins)
    residuals: dict[str, float] = {}

    def check(origin: Origin) -> tuple[str, float]:
        assert origin.old is not None
        name, tensor = origin.new.name, written[origin.new.name]
        found = residual(weights[origin.old.name], tensor, origin, plan)
        if not found <= tolerance(tensor.dtype, plan):
            raise GrowthError(
                "init", f"{name} came out {found:.2g} away from what keeps the parent's function; nothing was kept"
            )
        return name, found

    def tick() -> None:
        if progress is not None:
            progress(sum(written[name].nbytes for name in residuals), total, "verifying")

    def stop() -> None:
        for tensor in written.values():
            tensor.stop()

    for name, found in _side_by_side([partial(check, origin) for origin in origins], threads, tick, stop):
        residuals[name] = found
    tick()
    return residuals


T = TypeVar("T")


def _side_by_side(
    tasks: Sequence[Callable[[], T]], threads: int, tick: Callable[[], None], stop: Callable[[], None]
) -> Iterator[T]:
    """What `tasks` return, in the order in which they end, several at once; `tick` now and then and at the end.

    numpy gives way to other threads in all that takes long. With the first error, of a task, of `tick` or a signal, the
    rest is told to `stop` and waited for.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="growth") as pool:
        pending = {pool.submit(task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, timeout=REPORT_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    yield future.result()
                tick()
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise


def _threads() -> int:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else cores()


# --- The folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes `out`'s place when the block ends, and is removed when it does not end well.

    What a process that was killed has left behind is removed by the next one that wants the same place: a lock, which
    ends with its process, tells the two apart.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; name a folder that is not, or that is empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.unfinished-*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    try:
        with _locked(unfinished):
            yield unfinished
            unfinished.chmod(0o755)  # mkdtemp's own 0700 would keep other users of the machine out
            _sync(*(path for path in unfinished.iterdir() if path.suffix != ".safetensors"), unfinished)
            if out.exists():
                out.rmdir()
            unfinished.rename(out)
            _sync(out.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
