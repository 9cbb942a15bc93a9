"""Which text and which checkpoints a user may name, and where the files that they send are kept.

A name is a Hub name or a path. A path must lie, symbolic links followed, in a folder that the operator opened to all
users (LOCAL_DATA_DIRS), among the user's own uploads, or in the folder of an experiment or growth that they may see.
Everything here raises :class:`django.core.exceptions.ValidationError` that says what would be right; the form puts
the field and the value before it.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction

from accounts.models import User
from experiments.models import Experiment, Growth
from trainer.spec import is_path

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".parquet")
#: What the trainer reads from a folder of the operator's; uploads are text files alone.
LOCAL_SUFFIXES = (*TEXT_SUFFIXES, ".py")
#: As the Hub spells its names: `name` or `owner/name`.
HUB_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_CONFIG = re.compile(r"[\w.+-]{0,96}", re.ASCII)
#: How much of a file is looked at to tell text from something else, and to find its columns.
HEAD_BYTES = 1 << 20


def hub_name(name: str) -> str:
    if not HUB_NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise ValidationError("a name on the Hub is written name or owner/name, with letters, digits, - _ and . alone")
    return name


def hub_config(name: str) -> str:
    if not HUB_CONFIG.fullmatch(name):
        raise ValidationError("a config's name has letters, digits, - _ + and . alone")
    return name


def text_path(text: str, user: Any) -> Path:
    """A file or folder of text that `user` may train on. A relative path is looked for in the operator's folders."""
    path = _allowed(text, user)
    if path.is_file() and path.suffix.lower() not in LOCAL_SUFFIXES:
        raise ValidationError(f"a file must be one of {', '.join(LOCAL_SUFFIXES)}")
    return path


def checkpoint(name: str, user: Any, *, gguf: bool = False) -> str:
    """A Hub name, or the resolved path of a Hugging Face folder that `user` may read, or with `gguf` of such a file."""
    if not is_path(name):
        return hub_name(name)
    path = _allowed(name, user, "give a name on the Hub")
    if gguf and path.suffix == ".gguf" and path.is_file():
        return str(path)
    if not (path / "config.json").is_file():
        raise ValidationError("a checkpoint is a folder with config.json and safetensors files in it")
    return str(path)


def tokenizer(name: str, user: Any) -> str:
    """A Hub name, or the resolved path of a folder with a tokenizer that `user` may read."""
    if not is_path(name):
        return hub_name(name)
    path = _allowed(name, user, "give a name on the Hub")
    if not (path / "tokenizer.json").is_file():
        raise ValidationError("a tokenizer is a folder with tokenizer.json in it")
    return str(path)


def _allowed(text: str, user: Any, instead: str = "upload the file") -> Path:
    for candidate in _candidates(text):
        try:
            path = candidate.resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # not there, a NUL byte, a loop of links
            continue
        if _may_read(path, user):
            return path
    # One sentence for "not there" and "not yours": the difference would tell what lies on this machine.
    if not settings.LOCAL_DATA_DIRS:
        raise ValidationError(
            "there is no such path among those you may use; this site's operator opened no folder (LOCAL_DATA_DIRS), "
            f"so {instead} instead"
        )
    folders = ", ".join(map(str, settings.LOCAL_DATA_DIRS))
    raise ValidationError(f"there is no such file or folder in {folders}")


def _candidates(text: str) -> list[Path]:
    if text.startswith("~"):
        return []
    path = Path(text)
    return [path] if path.is_absolute() else [Path(folder) / path for folder in settings.LOCAL_DATA_DIRS]


def _may_read(path: Path, user: Any) -> bool:
    """`path` is resolved. Kangaroo's own files are opened one owner at a time, even inside an opened folder."""
    # An operator may have put these on another disk, with a link in their place.
    uploads, runs, var = settings.UPLOADS_DIR.resolve(), settings.RUNS_DIR.resolve(), settings.VAR.resolve()
    growths = settings.GROWTHS_DIR.resolve()
    if path.is_relative_to(uploads):
        return may_use_upload(str(path.relative_to(uploads)), user)
    if path.is_relative_to(runs):
        return _sees(Experiment, path.relative_to(runs), user)
    if path.is_relative_to(growths):
        return _sees(Growth, path.relative_to(growths), user)
    if path.is_relative_to(var) or any(kept.is_relative_to(path) for kept in (var, uploads, runs, growths)):
        return False
    return any(path.is_relative_to(folder) for folder in settings.LOCAL_DATA_DIRS)


def _sees(kind: type[Experiment | Growth], relative: Path, user: Any) -> bool:
    try:
        pk = UUID(relative.parts[0])
    except (IndexError, ValueError):
        return False
    return bool(kind.objects.visible_to(user).filter(pk=pk).exists())


# Uploads --------------------------------------------------------------------------------------------------------------


def may_use_upload(relative: str, user: Any) -> bool:
    """Whether the file at `relative` to UPLOADS_DIR is there and is the user's.

    Theirs are the files that they sent, and those that an experiment of theirs was trained on: a guest's experiments
    move to another account on sign-in, and their text must go with them.
    """
    root = settings.UPLOADS_DIR.resolve()
    try:
        path = (root / relative).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return False
    if not user.is_authenticated or not path.is_relative_to(root) or not path.is_file():
        return False
    owner = path.relative_to(root).parts[0]
    return owner == str(user.pk) or bool(
        Experiment.objects.owned_by(user)
        .filter(spec_json__data__source__in=[str(path), str(settings.UPLOADS_DIR / relative)])
        .exists()
    )


def check_upload(file: UploadedFile[Any]) -> None:
    """Refuse, before it is kept, a file that could not be trained on."""
    name, size = file.name or "", file.size or 0
    suffix = Path(name).suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        raise ValidationError(f"must be one of {', '.join(TEXT_SUFFIXES)}")
    if size > settings.MAX_UPLOAD_MB * 1_000_000:
        raise ValidationError(f"has {math.ceil(size / 1e6)} MB; at most {settings.MAX_UPLOAD_MB} MB can be uploaded")
    if not size:
        raise ValidationError("the file is empty")
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if suffix == ".parquet":
        if not head.startswith(b"PAR1"):
            raise ValidationError("this is not a parquet file")
        return
    try:
        # Of a longer file, the head may end in the middle of a character.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=size <= HEAD_BYTES)
    except UnicodeDecodeError as error:
        raise ValidationError(f"must be text in UTF-8; byte {error.start} is not") from None
    if b"\0" in head:
        raise ValidationError("must be text; it holds zero bytes")


def with_short_names(text: str) -> str:
    """`text` with uploaded files by their names alone: where they lie is the operator's affair."""
    for root in {str(settings.UPLOADS_DIR), str(settings.UPLOADS_DIR.resolve())}:
        text = re.sub(rf"{re.escape(root)}/\d+/\w+/", "", text)
    return text


def keep_upload(file: UploadedFile[Any], user: User) -> str:
    """Store a checked file; its path relative to UPLOADS_DIR. The same content twice is kept once."""
    file.seek(0)
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    relative = Path(str(user.pk)) / digest.hexdigest()[:16] / _safe_name(file.name or "")
    target = settings.UPLOADS_DIR / relative
    if not target.exists():
        used = uploaded_bytes(user) + (file.size or 0)
        if settings.MAX_DISK_GB_PER_USER and used > settings.MAX_DISK_GB_PER_USER * 1e9:
            raise ValidationError(
                f"with it your uploads take {used / 1e9:.1f} GB; at most {settings.MAX_DISK_GB_PER_USER} GB may be kept"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free - (file.size or 0)
        if free < settings.MIN_FREE_DISK_GB * 1e9:
            raise ValidationError("this site's disk is nearly full: nothing more can be kept; tell the administrator")
        _write(file, target)
    return str(relative)


def _write(file: UploadedFile[Any], target: Path) -> None:
    """Whole or not at all; two clicks may send the same file at once, so each has an unfinished one of its own."""
    number, unfinished = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
    try:
        with open(number, "wb") as out:
            for chunk in file.chunks():
                out.write(chunk)
        Path(unfinished).replace(target)
    except OSError as error:
        Path(unfinished).unlink(missing_ok=True)
        raise ValidationError(f"could not be kept here: {error.strerror}") from error


def uploaded_bytes(user: User) -> int:
    total = 0
    for path in (settings.UPLOADS_DIR / str(user.pk)).rglob("*"):
        with suppress(FileNotFoundError):  # an unfinished one, finished meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def remove_uploads(gone: User | Experiment) -> None:
    """After a user or an experiment was deleted: remove the files that nobody has any more.

    The files of a guest whose work went to an account are that account's, for as long as an experiment is trained on
    them; those of a user who is there stay, since the next experiment may want them.
    """
    if isinstance(gone, User):
        owner = str(gone.pk)
    else:
        source = Path(gone.spec_json.get("data", {}).get("source", ""))
        if not source.is_relative_to(settings.UPLOADS_DIR):
            return
        owner = source.relative_to(settings.UPLOADS_DIR).parts[0]
    transaction.on_commit(lambda: _remove_files_of_nobody(owner))


def _remove_files_of_nobody(owner: str) -> None:
    if not owner.isdecimal() or User.objects.filter(pk=int(owner)).exists():
        return
    for path in (settings.UPLOADS_DIR / owner).glob("*/*"):
        if not Experiment.objects.filter(spec_json__data__source=str(path)).exists():
            path.unlink(missing_ok=True)
    for folder in [*(settings.UPLOADS_DIR / owner).glob("*"), settings.UPLOADS_DIR / owner]:
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()


def _safe_name(name: str) -> str:
    """The last part of `name` with nothing in it that a shell, a log or a file system could trip over."""
    stem, suffix = Path(name).stem, Path(name).suffix.lower()
    return (re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "text")[:80] + suffix


def columns(path: Path) -> list[str] | None:
    """The columns of a csv or jsonl file, from its first line; None for other files: the trainer looks for itself."""
    if not path.is_file() or path.suffix.lower() not in (".csv", ".jsonl"):
        return None
    with open(path, "rb") as file:
        line = file.readline(HEAD_BYTES).decode("utf-8-sig", "replace")
    if path.suffix.lower() == ".csv":
        try:
            return [str(name) for name in next(csv.reader(io.StringIO(line)), [])]
        except csv.Error as error:
            raise ValidationError(f"the file's first line is no row of column names: {error}") from None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValidationError("the file's first line is not JSON; a .jsonl file has one object a line") from None
    if not isinstance(row, dict):
        raise ValidationError('the file has one object a line, such as {"text": ...}; its first line is another thing')
    return list(map(str, row))


def check_column(path: Path, column: str) -> None:
    """Refuse a text column that the file has not."""
    found = columns(path)
    if found is not None and column not in found:
        raise ValidationError(f"there is no such column; there is {_either(found)}")


def _either(names: Sequence[str]) -> str:
    """A file may claim to have any number of columns, under names of any length."""
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:20]]
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join(shown + more) or "none"
