"""Reading and writing safetensors a block of rows at a time: memory is for some blocks, whatever a model's size.

The format is a little-endian length, a JSON header, then the bytes of every tensor. The safetensors library itself can
only write tensors that are all in memory, and numpy has no bfloat16: hence this module. Never reads a pickle.

    Weights(folder)[name][rows]            read rows as float64; `.stored(rows)` as the file has them
    with Shards(folder, entries, n) as s:  the files, as large as they will be, before any tensor is known
        s.write(name, block)               the next rows of a tensor, in any order of tensors, from any thread
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: safetensors' names for the dtypes that weights come in, as numpy reads them from the file. BF16 as raw bits.
STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

#: The same by the names that a config.json has for them.
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Relative size of a rounding error in each of them.
EPSILON = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}

INDEX = "model.safetensors.index.json"

#: Bytes: where the runs of rows that are wanted are shorter, they are read with what lies between them.
_PIECE = 1 << 12


class SourceError(ValueError):
    """A source that is no checkpoint which can be read; the message names it and says what would be right."""


class Stopped(Exception):
    """Reading or writing was given up by another thread."""


def itemsize(dtype: str) -> int:
    return STORED[dtype].itemsize


def widen(raw: Array, dtype: str) -> NDArray[np.float64]:
    """Stored bits as float64; exact for every dtype here."""
    if dtype == "BF16":
        return widen32(raw).astype(np.float64)
    return raw.astype(np.float64)


def widen32(raw: Array) -> NDArray[np.float32]:
    """bfloat16's bits as float32, of which they are the upper half."""
    bits = raw.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def narrow(values: Array, dtype: str) -> Array:
    """float64 or float32 as stored bits, rounded to the nearest, ties to even. NaN and infinities stay what they are.

    Raises OverflowError where a finite value is too large for `dtype`.
    """
    try:
        with np.errstate(over="raise"):
            if dtype != "BF16":
                return values.astype(STORED[dtype])
            floats = values.astype(np.float32)
    except FloatingPointError:
        raise OverflowError(f"{np.abs(values[np.isfinite(values)]).max():.3g} is too large for {dtype}") from None
    bits = floats.view(np.uint32)
    # From here on rounding would carry into the exponent of infinity, or out of a NaN.
    special = int((bits & np.uint32(0x7FFFFFFF)).max(initial=0)) >= 0x7F7F8000
    rounded = bits + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    if special:
        finite = np.isfinite(floats)
        if (too_large := finite & (rounded & 0x7F80 == 0x7F80)).any():
            raise OverflowError(f"{np.abs(floats[too_large]).max():.3g} is too large for BF16")
        quiet = np.where(np.isnan(floats), np.uint32(0x40), np.uint32(0))
        rounded = np.where(finite, rounded, (bits >> np.uint32(16)) | quiet)
    return rounded.astype(np.uint16)


# --- Reading ----------------------------------------------------------------------------------------------------------


class Tensor:
    """One stored tensor. Rows are read when they are asked for, and nothing of them is kept."""

    def __init__(self, file: _File, start: int, dtype: str, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self._file, self._start = file, start
        self._row = shape[1:]
        self._row_bytes = prod(self._row) * itemsize(dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    def stop(self) -> None:
        """Whoever still reads from this tensor's file, in another thread, gets :class:`Stopped`."""
        self._file.stopped = True

    def __getitem__(self, rows: slice | Array) -> NDArray[np.float64]:
        """Some rows (entries of a vector), as float64."""
        return widen(self.stored(rows), self.dtype)

    def stored(self, rows: slice | Array) -> Array:
        """Some rows as the file has them (BF16 as bits). A new array. Raises :class:`SourceError`."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.shape[0])
            assert step == 1, "rows are read in their order"
            return self._read(start, max(0, stop - start))
        if len(rows) == 0:
            return self._read(0, 0)
        cuts = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        if not cuts:
            return self._read(int(rows[0]), len(rows))
        first, last = int(rows.min()), int(rows.max())
        scattered = len(rows) * self._row_bytes < _PIECE * len(cuts)
        if scattered and last - first < 4 * len(rows):
            return self._read(first, last - first + 1).take(rows - first, axis=0)
        taken = np.empty((len(rows), *self._row), STORED[self.dtype])
        for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            self._fill(taken[start:stop], int(rows[start]))
        return taken

    def _read(self, first: int, rows: int) -> Array:
        taken = np.empty((rows, *self._row), STORED[self.dtype])
        self._fill(taken, first)
        return taken

    def _fill(self, into: Array, first: int) -> None:
        self._file.read(into.reshape(-1).view(np.uint8).data, self._start + first * self._row_bytes)


class _File:
    """An open file, closed when nothing refers to it any more; read at any place, from any thread."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self.stopped = False

    def read(self, into: memoryview, at: int) -> None:
        if self.stopped:
            raise Stopped
        while len(into):
            # Not mapped into memory: what was read would count as ours, and a file that shrinks would end the process.
            done = os.preadv(self._descriptor, [into], at)
            if not done:
                raise SourceError(f"{self.path}: ends before its header says so; is it being written?")
            into, at = into[done:], at + done


class Weights:
    """All tensors of a Hugging Face folder: `model.safetensors`, or the shards that its index names."""

    def __init__(self, folder: Path):
        self.tensors: dict[str, Tensor] = {}
        for path in _files(folder):
            for name, tensor in _tensors(_File(path)):
                if name in self.tensors:
                    raise SourceError(f"{path}: holds {name}, which another shard holds too")
                self.tensors[name] = tensor


def _tensors(file: _File) -> Iterator[tuple[str, Tensor]]:
    path, size = file.path, file.size
    length_bytes = bytearray(8)
    if size >= 8:
        file.read(memoryview(length_bytes), 0)
    length = int.from_bytes(length_bytes, "little")
    if not 2 <= length <= size - 8:
        raise SourceError(f"{path}: is not a whole safetensors file")
    encoded = bytearray(length)
    file.read(memoryview(encoded), 8)
    try:
        header = json.loads(encoded)
    except ValueError:
        raise SourceError(f"{path}: its header is not JSON; is it a safetensors file?") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{path}: says nothing readable about {name}") from None
        if dtype not in STORED:
            continue  # masks and counters; a weight that is missed for it is named by the reader
        if end - start != prod(shape) * itemsize(dtype) or not 0 <= start <= end <= size - 8 - length:
            raise SourceError(f"{path}: {name} reaches past the file; is the download complete?")
        yield name, Tensor(file, 8 + length + start, dtype, shape)


def _files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(f"{index}: has no weight_map of tensors to files") from None
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise SourceError(f"{index}: names {shard}, which is not in the folder")
        return [folder / shard for shard in shards]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise SourceError(f"{folder}: holds pickled weights, which can run code when read. {unpickling(str(folder))}")
    raise SourceError(f"{folder}: has neither model.safetensors nor {INDEX}")


def unpickling(name: str) -> str:
    """How pickled weights of a folder, or a name on the Hub, become a folder with safetensors."""
    into = f"{Path(name).name}-safetensors"
    classes = "AutoModelForCausalLM as M, AutoTokenizer as T"
    saved = f"M.from_pretrained({name!r}, dtype='auto').save_pretrained({into!r})"
    tokenizer = f"T.from_pretrained({name!r}).save_pretrained({into!r})"
    return (
        "If you trust whoever made them, write them as safetensors and grow that folder: "
        f'python -c "from transformers import {classes}; {saved}; {tokenizer}"'
    )


# --- Writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


def _by_parts(entry: Entry) -> list[tuple[int, int, str]]:
    """transformers' order: part by part of the name, numbers by their size and before words."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in entry.name.split(".")]


class Shards:
    """A model's files in `folder`, named and split as transformers does, filled tensor by tensor.

    One `model.safetensors` where `max_shard_bytes` suffice; else `model-00001-of-0000N.safetensors` and so on, each
    tensor whole in one of them, and their index. A shard is flushed to the disk once its last tensor is there.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_shard_bytes: int):
        from huggingface_hub import split_state_dict_into_shards_factory

        by_name = {entry.name: entry for entry in sorted(entries, key=_by_parts)}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        self.total = sum(entry.nbytes for entry in entries)
        self.written = 0
        self.stopped = False
        self._lock = threading.Lock()
        self._shards = [
            _Shard(folder / file, [by_name[name] for name in names])
            for file, names in split.filename_to_tensors.items()
        ]
        self._of = {name: shard for shard in self._shards for name in shard.left}
        self.bytes = sum(shard.size for shard in self._shards)
        if split.is_sharded:
            parameters = sum(prod(entry.shape) for entry in entries)
            index = {
                "metadata": {"total_parameters": parameters, "total_size": self.total},
                "weight_map": split.tensor_to_filename,
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for shard in self._shards:
            shard.close()
        if kind is None:
            unfinished = [name for shard in self._shards for name, left in shard.left.items() if left]
            assert not unfinished, f"not all of {unfinished[0]} was written"

    def write(self, name: str, block: Array) -> None:
        """The next rows of a tensor, in its dtype's bits. One thread a tensor; raises :class:`Stopped` after `stop`."""
        if self.stopped:
            raise Stopped
        self._of[name].write(name, block)
        with self._lock:
            self.written += block.nbytes

    def stop(self) -> None:
        self.stopped = True


class _Shard:
    def __init__(self, path: Path, entries: Sequence[Entry]):
        # The library's order: larger numbers first, so that each tensor is aligned to its own.
        entries = sorted(entries, key=lambda entry: -itemsize(entry.dtype))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.nbytes],
            }
            at += entry.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # readers map tensors in place, so they are to be aligned
        self._begin = len(encoded).to_bytes(8, "little") + encoded
        self.path, self.size = path, len(self._begin) + at
        self.left = {entry.name: entry.nbytes for entry in entries}
        self._next = {entry.name: len(self._begin) + header[entry.name]["data_offsets"][0] for entry in entries}
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(self, name: str, block: Array) -> None:
        block = np.ascontiguousarray(block)
        assert block.nbytes <= self.left[name], f"{name}: more rows than its shape has"
        _write_at(self._opened(), block.reshape(-1).view(np.uint8).data, self._next[name])
        self._next[name] += block.nbytes
        with self._lock:
            self.left[name] -= block.nbytes
            done = not any(self.left.values())
        if done:
            self.close(flush=True)

    def _opened(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                _write_at(self._descriptor, memoryview(self._begin), 0)
            return self._descriptor

    def close(self, flush: bool = False) -> None:
        with self._lock:
            if self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                try:
                    if flush:
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def _write_at(descriptor: int, content: memoryview, at: int) -> None:
    while len(content):
        done = os.pwrite(descriptor, content, at)
        content, at = content[done:], at + done
