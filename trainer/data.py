"""From any source of text to files of tokens: :func:`prepare`.

    source -> documents -> split -> tokenizer -> tokens, packed, in files that training maps into memory

What it promises:

* Documents are split into train, validation and test before anything else looks at them, by a hash of their content:
  the same documents always fall the same way, and two equal documents fall together. No split is ever empty.
* The tokenizer, when it is trained here, has seen the training split alone.
* Prepared text is kept in a cache under a fingerprint of content, split and tokenizer. A second run finds it by the
  files' names, sizes and times, importing neither `datasets` nor `tokenizers`; a changed file is read again. A dataset
  of the Hub is fetched once and stays as it was then, so that all models of an experiment see the same text.
* Two runs may prepare the same text at once: one works, the other waits. A killed run leaves nothing half done.

    cache/index/<hash of names, sizes, times>.json   -> the fingerprint
    cache/<fingerprint>/  prepared.json  train.bin validation.bin test.bin  tokenizer/

A token file is a flat array of uint16 (uint32 above 65,536 tokens): documents one after the other, each followed by
the end-of-text token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sysconfig
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from trainer.endings import DataError
from trainer.events import Split
from trainer.spec import BpeTokenizer, DataSpec, PretrainedTokenizer, for_transformers, is_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: (what is being done, done, total); the unit is in the words, either number may be unknown.
Report = Callable[[str, int | None, int | None], None]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"

#: A change here makes every cached text be prepared again.
VERSION = 1
#: Mixed into each document's hash, so that our split is not by accident that of someone else's hash.
SALT = b"kangaroo split 1"

TEXT_FILES = (".txt", ".md", ".py")
TABLE_FILES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
#: Columns taken for the text when none is named, in this order.
TEXT_COLUMNS = ("text", "content", "document", "body", "sentence")

#: Names the environment's variable with the most text that may be prepared, in GB (1e9 bytes of UTF-8); unset: any.
MAX_TEXT_GB = "KANGAROO_MAX_TEXT_GB"

#: Readers of `datasets` that may read a Hub dataset's files, by name; the last one reads what was fetched before.
HUB_READERS = ("parquet", "json", "csv", "text", "arrow", "cache")

#: With fewer documents, or one that is more than half of the text, documents are cut into this many pieces in all.
FEW_DOCUMENTS, PIECES = 10, 200
#: A BPE learns nothing new from more text than this.
TOKENIZER_BYTES = 200_000_000
#: Characters handed to the tokenizer at once: enough to keep all cores busy, little enough to stay small.
BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Tokens:
    """One split: a flat array in a file."""

    path: Path
    dtype: str  # "uint16" or "uint32"
    n_tokens: int
    n_bytes: int  # of UTF-8 text, end-of-text tokens not counted
    n_documents: int

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / self.n_tokens

    def array(self) -> np.ndarray[Any, Any]:
        """The tokens, [n_tokens], mapped into memory and read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r")


@dataclass(frozen=True)
class Prepared:
    """Text, ready to be trained on."""

    fingerprint: str
    folder: Path
    d_vocab: int  # of the tokenizer; ids are below it
    end_of_text: int
    train: Tokens
    validation: Tokens
    test: Tokens
    notes: tuple[str, ...]  # what the reader of results should know, in sentences

    @property
    def tokenizer(self) -> Path:
        """A folder for `AutoTokenizer.from_pretrained`."""
        return self.folder / "tokenizer"

    def split(self, name: Split) -> Tokens:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def default_cache() -> Path:
    """$KANGAROO_DATA_CACHE, else ~/.cache/kangaroo/data."""
    return Path(os.environ.get("KANGAROO_DATA_CACHE") or Path.home() / ".cache" / "kangaroo" / "data").expanduser()


def prepare(data: DataSpec, cache: Path, report: Report = lambda what, done, total: None) -> Prepared:
    """The text that `data` names, split and tokenized, from the cache if it is there.

    Raises :class:`DataError` when the text cannot be had or used.
    """
    index = cache / "index" / f"{_index_key(data)}.json"
    if found := _cached(index, cache):
        return found
    (cache / "index").mkdir(parents=True, exist_ok=True)
    with _lock(index.with_suffix(".lock"), report):
        if found := _cached(index, cache):  # another run prepared it while this one waited
            return found
        fingerprint = _build(data, cache, report)
        _write_atomically(index, json.dumps({"fingerprint": fingerprint}))
    found = _cached(index, cache)
    assert found is not None
    return found


# --- The cache -------------------------------------------------------------------------------------------------------


def _cached(index: Path, cache: Path) -> Prepared | None:
    try:
        folder = cache / json.loads(index.read_text())["fingerprint"]
        found = _load(folder)
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(folder / "prepared.json")  # the day it was last used, for whoever clears up
        return found
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _load(folder: Path) -> Prepared:
    """Raises FileNotFoundError when the folder is not whole."""
    held = json.loads((folder / "prepared.json").read_text())
    splits = {}
    for name in SPLITS:
        splits[name] = Tokens(path=folder / f"{name}.bin", **held["splits"][name])
        expected = splits[name].n_tokens * np.dtype(splits[name].dtype).itemsize
        if (folder / f"{name}.bin").stat().st_size != expected:
            raise FileNotFoundError(folder / f"{name}.bin")
    return Prepared(
        fingerprint=held["fingerprint"],
        folder=folder,
        d_vocab=held["d_vocab"],
        end_of_text=held["end_of_text"],
        notes=tuple(held["notes"]),
        **splits,
    )


def _index_key(data: DataSpec) -> str:
    """A hash of what can be known without reading the text: it changes whenever a file does."""
    key: dict[str, Any] = {"version": VERSION, "data": data.model_dump(mode="json")}
    if data.kind != "hub":
        # ctime as well: a program may set a file's mtime back, but not its ctime.
        key["files"] = [
            [str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f in source_files(data) for s in [f.stat()]
        ]
    if isinstance(data.tokenizer, PretrainedTokenizer) and is_path(data.tokenizer.name):
        folder = Path(data.tokenizer.name).expanduser()
        stats = [(f.name, f.stat()) for f in sorted(folder.glob("*token*"))]
        key["tokenizer_files"] = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()


def _lock(path: Path, report: Report) -> FileLock:
    """The lock, held; the operating system lets go of it when its holder dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another run that prepares the same text", None, None)
        lock.acquire()
    return lock


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


# --- Building ---------------------------------------------------------------------------------------------------------


def _build(data: DataSpec, cache: Path, report: Report) -> str:
    """Read, split, tokenize and store. Returns the fingerprint, under which the folder then stands."""
    if data.kind == "hub":
        report(f"fetching {data.source} from the Hub", None, None)
    pieces = _Documents(data)
    scan = _scan(pieces, report)
    notes: list[str] = []
    if not pieces.own_splits and (scan.n < FEW_DOCUMENTS or scan.largest > scan.n_bytes / 2) and scan.n:
        pieces.piece_size = max(1024, scan.n_bytes // PIECES)
        documents = "one document" if scan.n == 1 else f"{scan.n} documents"
        scan = _scan(pieces, report)
        notes.append(
            f"The text has {documents}, too few to be split by document: cut into {scan.n} pieces of about "
            f"{pieces.piece_size:,} characters."
        )
    if not scan.n:
        raise DataError(f"{data.source} holds no text.")

    splits = scan.own if pieces.own_splits else assign(scan.keys, scan.sizes, data)
    missing = [SPLITS[i] for i in range(3) if not np.any(splits == i)]
    if missing:
        raise DataError(
            f"{data.source} is too short ({scan.n_bytes:,} bytes of text): nothing is left for {' and '.join(missing)}."
        )

    fingerprint = hashlib.blake2b(digest_size=16)
    fingerprint.update(scan.digest)
    fingerprint.update(splits.tobytes())
    fingerprint.update(json.dumps([VERSION, data.tokenizer.model_dump(mode="json")]).encode())
    if isinstance(data.tokenizer, PretrainedTokenizer):
        report("loading the tokenizer", None, None)
        tokenizer, end_of_text, save = _pretrained_tokenizer(data.tokenizer)
        fingerprint.update(tokenizer.to_str().encode())
    name = fingerprint.hexdigest()
    folder = cache / name
    try:
        _load(folder)
        return name  # only names or times of the files had changed
    except (FileNotFoundError, ValueError, KeyError):
        pass

    if isinstance(data.tokenizer, BpeTokenizer):
        report("training the tokenizer", None, None)
        texts = (text for i, (text, _) in enumerate(pieces) if splits[i] == 0)
        tokenizer, end_of_text, save = _train_tokenizer(texts, data.tokenizer.d_vocab)
        if tokenizer.get_vocab_size() < data.tokenizer.d_vocab:
            notes.append(
                f"The training text gave a vocabulary of {tokenizer.get_vocab_size():,}, not the "
                f"{data.tokenizer.d_vocab:,} asked for: it has no more that repeats."
            )

    for left in cache.glob(".building-*"):  # by a process that was killed
        if left.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(left, ignore_errors=True)
    building = cache / f".building-{name}-{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        save(building / "tokenizer")
        held = _tokenize(pieces, splits, scan.n_bytes, tokenizer, end_of_text, building, report)
        description = {
            "fingerprint": name,
            "d_vocab": tokenizer.get_vocab_size(),
            "end_of_text": end_of_text,
            "splits": {split: {k: v for k, v in asdict(t).items() if k != "path"} for split, t in held.items()},
            "notes": notes,
            "source": data.model_dump(mode="json"),
        }
        (building / "prepared.json").write_text(json.dumps(description, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # one that _load found not to be whole
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run, from the same text under other names, was first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return name


@dataclass
class _Scan:
    """What a first reading tells: of each document a hash and a size; of all, a digest."""

    keys: np.ndarray[Any, np.dtype[np.uint64]]  # [n]
    sizes: np.ndarray[Any, np.dtype[np.uint64]]  # [n] bytes
    own: np.ndarray[Any, np.dtype[np.uint8]]  # [n] index into SPLITS, as the source says
    digest: bytes

    @property
    def n(self) -> int:
        return len(self.keys)

    @property
    def n_bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def largest(self) -> int:
        return int(self.sizes.max(initial=0))


def _scan(documents: _Documents, report: Report) -> _Scan:
    keys, sizes, own = array("Q"), array("Q"), array("B")
    whole = hashlib.blake2b(digest_size=32)
    n_bytes = 0
    for text, split in documents:
        content = text.encode()
        n_bytes += len(content)
        _check_size(documents.data, n_bytes)  # a small parquet file may hold any amount of text
        digest = hashlib.blake2b(content, digest_size=32, key=SALT).digest()
        whole.update(digest)
        keys.append(int.from_bytes(digest[:8], "big"))
        sizes.append(len(content))
        own.append(SPLITS.index(split) if split else 0)
        if len(keys) % 1000 == 0:
            report("reading documents", len(keys), None)
    report("reading documents", len(keys), len(keys))
    return _Scan(np.array(keys, np.uint64), np.array(sizes, np.uint64), np.array(own, np.uint8), whole.digest())


def _check_size(data: DataSpec, n_bytes: int) -> None:
    most = float(os.environ.get(MAX_TEXT_GB) or 0)
    if most and n_bytes > most * 1e9:
        raise DataError(f"{data.source} has more than {most:g} GB of text, the most that may be trained on here.")


def assign(
    keys: np.ndarray[Any, np.dtype[np.uint64]], sizes: np.ndarray[Any, np.dtype[np.uint64]], data: DataSpec
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Which split each document falls into: [n] indices into SPLITS, from each one's hash and its size in bytes.

    In the order of their hashes, documents go to test until it has its share of the bytes, then to validation, and
    the rest to train. A document larger than the smaller share comes last in that order, so that one long book does
    not become the whole test set. With three different documents or more, every split has at least one.
    """
    unique, group = np.unique(keys, return_inverse=True)
    group_sizes = np.bincount(group, weights=sizes, minlength=len(unique))
    total = float(group_sizes.sum())
    share = min(data.test_fraction, data.validation_fraction) * total
    order = np.lexsort((unique, group_sizes > share))
    before = np.concatenate([[0.0], np.cumsum(group_sizes[order])[:-1]])
    n_test = int(np.searchsorted(before, data.test_fraction * total))
    n_test = min(max(n_test, 1), len(unique) - 2)
    after_test = before[n_test] if n_test < len(unique) else total
    n_held = int(np.searchsorted(before, after_test + data.validation_fraction * total))
    n_held = min(max(n_held, n_test + 1), len(unique) - 1)
    of_group = np.zeros(len(unique), np.uint8)
    if len(unique) >= 3:
        of_group[order[:n_test]] = SPLITS.index("test")
        of_group[order[n_test:n_held]] = SPLITS.index("validation")
    return of_group[group]


def _tokenize(
    documents: _Documents,
    splits: np.ndarray[Any, np.dtype[np.uint8]],
    n_bytes: int,
    tokenizer: Tokenizer,
    end_of_text: int,
    folder: Path,
    report: Report,
) -> dict[Split, Tokens]:
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 65_536 else np.uint32)
    # Text that happens to spell the end-of-text token is text, not the token.
    tokenizer.encode_special_tokens = True
    counts = {split: [0, 0, 0] for split in SPLITS}  # tokens, bytes, documents
    done = 0
    files = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
    try:
        for batch in _batches(zip(documents, splits, strict=True)):
            encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (text, split), encoding in zip(batch, encodings, strict=True):
                ids = np.array([*encoding.ids, end_of_text], dtype)
                ids.tofile(files[split])
                size = len(text.encode())
                done += size
                for i, amount in enumerate((len(ids), size, 1)):
                    counts[split][i] += amount
            report("tokenizing text, in bytes", done, n_bytes)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return {split: Tokens(folder / f"{split}.bin", dtype.name, *counts[split]) for split in SPLITS}


def _batches(documents: Iterable[tuple[tuple[str, Any], Any]]) -> Iterator[list[tuple[str, Split]]]:
    batch: list[tuple[str, Split]] = []
    size = 0
    for (text, _), split in documents:
        batch.append((text, SPLITS[int(split)]))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- Tokenizers -------------------------------------------------------------------------------------------------------

_Ready = tuple["Tokenizer", int, Callable[[Path], None]]  # tokenizer, id of end-of-text, how to save its folder


def _train_tokenizer(texts: Iterable[str], d_vocab: int) -> _Ready:
    """A byte-level BPE, as GPT-2's (Radford et al. 2019; Sennrich et al. 2016, https://arxiv.org/abs/1508.07909)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def enough() -> Iterator[str]:
        seen = 0
        for text in texts:
            yield text
            seen += len(text)
            if seen >= TOKENIZER_BYTES:
                return

    tokenizer.train_from_iterator(enough(), trainer)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None

    def save(folder: Path) -> None:
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))

    return tokenizer, end_of_text, save


def _pretrained_tokenizer(spec: PretrainedTokenizer) -> _Ready:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(for_transformers(spec.name), trust_remote_code=False)
    except Exception as error:
        raise DataError(f"The tokenizer {spec.name!r} cannot be loaded: {_first_line(error)}") from error
    if not getattr(loaded, "is_fast", False):
        raise DataError(f"The tokenizer {spec.name!r} has no tokenizer.json, which is needed.")
    if loaded.eos_token_id is None:
        raise DataError(f"The tokenizer {spec.name!r} has no end-of-text token to join documents with.")

    def save(folder: Path) -> None:
        loaded.save_pretrained(folder)

    return loaded.backend_tokenizer, loaded.eos_token_id, save


# --- Sources ----------------------------------------------------------------------------------------------------------


class _Documents:
    """The documents of a source, each with its split if the source has its own; may be read again and again."""

    def __init__(self, data: DataSpec):
        self.data = data
        self.piece_size: int | None = None  # when set, documents are cut into pieces of about this many characters
        self.hub = _load_from_hub(data) if data.kind == "hub" else None
        self.own_splits = self.hub is not None and set(SPLITS) <= set(self.hub)

    def __iter__(self) -> Iterator[tuple[str, Split | None]]:
        for text, split in self._whole():
            if not text.strip():
                continue
            if self.piece_size is None:
                yield text, split
            else:
                yield from ((piece, split) for piece in pieces_of(text, self.piece_size))

    def _whole(self) -> Iterator[tuple[str, Split | None]]:
        if self.hub is not None:
            for name, rows in self.hub.items():
                if self.own_splits and name not in SPLITS:
                    continue
                columns = {column: str(getattr(kind, "dtype", "list")) for column, kind in rows.features.items()}
                column = text_column(f"{self.data.source} ({name})", columns, self.data.text_column)
                for row in rows.select_columns([column]):
                    yield row[column] or "", name if self.own_splits else None
            return
        for path in source_files(self.data):
            if path.suffix in TABLE_FILES:
                yield from ((text, None) for text in _read_table(path, self.data.text_column))
            else:
                yield _read_text(path), None


def source_files(data: DataSpec) -> list[Path]:
    """The files of a built-in or local source, sorted. Raises :class:`DataError` if there are none."""
    if data.kind == "built-in":
        root = Path(sysconfig.get_path("stdlib"))
        # The standard library's own tests would be two thirds of the text, much of it tables of cases.
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        return sorted(f for f in _walk(root, skip) if f.suffix == ".py")
    root = Path(data.source).expanduser()
    known = (*TEXT_FILES, *TABLE_FILES)
    if root.is_file():
        if root.suffix not in known:
            raise DataError(f"{root} ends in {root.suffix or 'nothing'}; what can be read ends in {', '.join(known)}.")
        return [root.resolve()]
    if not root.is_dir():
        raise DataError(f"There is no file or folder {root}.")
    found = sorted(f.resolve() for f in _walk(root, set()) if f.suffix in known)
    if not found:
        raise DataError(f"The folder {root} holds no file that ends in {', '.join(known)}.")
    return found


def _walk(root: Path, skip: set[str]) -> Iterator[Path]:
    """Files below `root`, hidden ones and those in folders named in `skip` left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    # A stray character of another encoding is let pass; a file that is not text at all is not.
    if text.count("\ufffd") > 2 + len(text) // 100 or "\0" in text[:8192]:
        raise DataError(f"{path} is not text in UTF-8.")
    return text


def _read_table(path: Path, column: str | None) -> Iterator[str]:
    import datasets

    kind = path.suffix[1:]
    try:
        rows = datasets.load_dataset(TABLE_FILES[path.suffix], data_files=str(path), split="train", streaming=True)
        first: dict[str, list[Any]] = next(rows.iter(batch_size=100), {})
        found = text_column(str(path), {name: _kind(values) for name, values in first.items()}, column)
        for row in rows:
            yield str(row[found] or "")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as {kind}: {_cause(error)}") from error


def _kind(values: list[Any]) -> str:
    """What a column holds, in a word."""
    kinds = {type(value).__name__ for value in values if value is not None}
    return "string" if kinds == {"str"} else " or ".join(sorted(kinds)) or "empty"


def text_column(where: str, columns: dict[str, str], wanted: str | None) -> str:
    """The column that holds the text: `wanted`, else a usual name, else the only column of strings."""
    strings = [name for name, kind in columns.items() if kind in ("string", "large_string")]
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "no columns"
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"{where} has no column {wanted!r}; it has {listed}.")
        if wanted not in strings:
            raise DataError(f"The column {wanted!r} of {where} is {columns[wanted]}, not text; it has {listed}.")
        return wanted
    for name in TEXT_COLUMNS:
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise DataError(f"{where} has no column of text; it has {listed}.")
    raise DataError(f"Which column of {where} is the text? It has {listed}; name one as text_column.")


def _load_from_hub(data: DataSpec) -> Any:
    """Splits by name, each a `datasets.Dataset`."""
    import datasets

    datasets.disable_progress_bars()
    asked = f"{data.source!r}" + (f" (config {data.config!r})" if data.config else "")
    try:
        builder = datasets.load_dataset_builder(f"hf://datasets/{data.source}", data.config)
        _check_from_hub(builder, asked)
        if os.environ.get(MAX_TEXT_GB):
            _check_size(data, _download_size(builder))
        builder.download_and_prepare()
        return builder.as_dataset()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"The dataset {asked} cannot be loaded from the Hub: {_first_line(error)} A local path would begin "
            "with /, ./, ../ or ~."
        ) from error


def _check_from_hub(builder: Any, asked: str) -> None:
    """Refuse a dataset that is, or that leads to, something else than text files on the Hub. Nothing was read yet.

    `text` or `csv` name the readers of `datasets` itself, which take what lies in the current folder; and a dataset's
    card may list paths and addresses, which would be read from this machine and from the network that it stands in.
    """
    reader = type(builder).__module__.split(".")[-1]
    if reader not in HUB_READERS:
        kinds = ", ".join(HUB_READERS[:-1])
        raise DataError(f"The dataset {asked} has files of the kind {reader}; text is read from {kinds}.")
    for files in (builder.config.data_files or {}).values():
        for file in files:
            # "zip://name::hf://..." is a file in an archive: what counts is where the archive is.
            if not str(file).rpartition("::")[2].startswith("hf://datasets/"):
                raise DataError(f"The dataset {asked} leads to {file}, which is not on the Hub.")


def _download_size(builder: Any) -> int:
    """Bytes of a Hub dataset's files; 0 where they are here already."""
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    files = {str(file).rpartition("::")[2] for files in (builder.config.data_files or {}).values() for file in files}
    return sum(int(hub.info(file)["size"] or 0) for file in files)


def pieces_of(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of about `size` characters, each ending with a line where lines are short enough."""
    start = 0
    while start < len(text):
        end = start + size
        newline = text.find("\n", end, end + size)
        end = newline + 1 if newline >= 0 else end
        yield text[start:end]
        start = end


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if line.endswith((".", "!", "?")) else line + "."


def _cause(error: BaseException) -> str:
    """The deepest error that says something: libraries wrap what happened in several layers."""
    while (inner := error.__cause__ or error.__context__) is not None and str(inner).strip():
        error = inner
    return _first_line(error)
