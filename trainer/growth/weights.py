"""Reading and writing safetensors a block of rows at a time, so that growth needs memory for one tensor at most.

The format is a little-endian length, a JSON header, then the bytes of every tensor. The safetensors library itself can
only write tensors that are all in memory, and numpy has no bfloat16: hence this module. Never reads a pickle.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: safetensors' names for the dtypes that weights come in, as numpy reads them from the file. BF16 as raw bits.
_STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

#: Relative size of a rounding error in each of them.
EPSILON = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}


class SourceError(ValueError):
    """A folder that is no readable Hugging Face checkpoint; the message names the file and what would be right."""


def itemsize(dtype: str) -> int:
    return _STORED[dtype].itemsize


def widen(raw: Array, dtype: str) -> NDArray[np.float64]:
    """Stored bits as float64; exact for every dtype here."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def narrow(values: NDArray[np.float64], dtype: str) -> Array:
    """float64 as stored bits, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(_STORED[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


class Tensor:
    """One stored tensor, memory-mapped."""

    def __init__(self, raw: Array, dtype: str, mapped: mmap.mmap):
        self.raw, self.dtype, self._mapped = raw, dtype, mapped

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def __getitem__(self, rows: slice | Array) -> NDArray[np.float64]:
        """Some rows (entries of a vector), as float64."""
        taken = self.raw[rows] if isinstance(rows, slice) else self.raw.take(rows, axis=0)
        return widen(taken, self.dtype)

    def release(self) -> None:
        """Done with for now: pages of the file no longer count as this process's memory."""
        if hasattr(self._mapped, "madvise"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Weights:
    """All tensors of a Hugging Face folder: `model.safetensors`, or the shards that its index names."""

    def __init__(self, folder: Path):
        self.tensors: dict[str, Tensor] = {}
        for path in _files(folder):
            for name, tensor in self._read(path):
                if name in self.tensors:
                    raise SourceError(f"{path}: holds {name}, which another shard holds too")
                self.tensors[name] = tensor

    def _read(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise SourceError(f"{path}: is not a whole safetensors file")
            try:
                header = json.loads(file.read(length))
            except ValueError:
                raise SourceError(f"{path}: its header is not JSON; is it a safetensors file?") from None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            except (KeyError, TypeError, ValueError):
                raise SourceError(f"{path}: says nothing readable about {name}") from None
            if dtype not in _STORED:
                continue  # masks and counters; a weight that is missed for it is named by the reader
            if end - start != prod(shape) * itemsize(dtype) or not 0 <= start <= end <= size - 8 - length:
                raise SourceError(f"{path}: {name} reaches past the file; is the download complete?")
            raw = np.frombuffer(mapped, _STORED[dtype], prod(shape), 8 + length + start).reshape(shape)
            yield name, Tensor(raw, dtype, mapped)


def _files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
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
    if any(folder.glob("*.bin")):
        raise SourceError(
            f"{folder}: holds pickled weights (.bin), which can run code when read; save the model with safetensors"
        )
    raise SourceError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")


def write_safetensors(
    path: Path, layout: Iterable[tuple[str, str, tuple[int, ...]]], blocks: Iterator[Array], metadata: dict[str, str]
) -> int:
    """Write the tensors of `layout` (name, dtype, shape), whose bytes `blocks` yields in that order.

    Returns the file's size. The file is flushed to the disk.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape in layout:
        end = at + prod(shape) * itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map tensors in place, so they are to be aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        written = sum(_write(file, block) for block in blocks)
        assert written == at, f"{path}: {written} bytes of tensors, where the header says {at}"
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(encoded) + at


def _write(file: BinaryIO, block: Array) -> int:
    return file.write(np.ascontiguousarray(block).data)
