"""A machine reached over SSH: what `local` does by calling the agent, done by asking the relay that runs there.

Nothing here opens a connection: every request goes through :func:`experiments.transport.client.call`. What a run needs
and the host has not is sent before it is started: files go in pieces, one that was interrupted is taken up where it
broke, and gets its name only when its SHA-256 is right. Under the host's working folder:

    experiments/ID/MODEL/      run directories, as on the local machine
    files/SHA256/NAME          texts, tokenizers and checkpoints that were sent, once for all runs
    data/                      tokenised corpora

What a host answers comes from outside: shapes are checked here, and no path of its making leads anywhere on this side.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from uuid import UUID

from django.conf import settings

from experiments.models import Host, ModelRun
from experiments.transport import answers
from experiments.transport.base import File, Frame, HostProblem, Outcome, Status
from experiments.transport.client import ahead, call
from trainer.shape import CheckpointInit
from trainer.spec import ExperimentSpec, PretrainedTokenizer, is_path

#: Bytes asked for at a time, several times at once; bytes sent at a time, one after the other.
CHUNK, SENT = 1 << 20, 4 << 20
#: Seconds that the host holds a request for events open until there are some; seconds between two requests, at least.
WAIT, PACE = 1.0, 0.1
_MOST_FILES, _LARGEST = 10_000, 1 << 45
#: What of a checkpoint is large, and nothing that its tokenizer needs.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"}

#: Told the bytes that have been sent and those there are to send, of one file or folder.
Progress = Callable[[int, int], None]

#: One at a time sends to a host: two runs often need the same file.
_sending: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)


class Ssh:
    def __init__(self, host: Host) -> None:
        self.host = host

    def ask(self, op: str, payload: bytes = b"", **arguments: Any) -> Any:
        """One request to the host, and its answer without what came with it."""
        return call(self.host.pk, op, payload, **arguments)[0]

    # A run and its process -------------------------------------------------------------------------------------------

    def start(self, run: ModelRun, progress: Progress | None = None) -> Outcome:
        spec = run.experiment.spec
        # Once this attempt has begun there, so has everything it needs.
        if self.status(run)["attempt"] != run.attempt:
            with _sending[self.host.pk]:
                spec = self._send_what_it_needs(run, progress)
        gpus = (self.host.facts or {}).get("gpus")
        outcome = self.ask(
            "start",
            run=_name(run),
            attempt=run.attempt,
            spec=spec.to_json(),
            env=self.environment(),
            gpus=run.gpus if gpus else None,
            processes=max(1, len(run.gpus)),
        )
        return cast(Outcome, _member(outcome, "outcome", str))

    def environment(self) -> dict[str, str]:
        """Of the trainer, beside what its host gives it. Of the site's own environment, and its secrets, nothing."""
        env = {"KANGAROO_DATA_CACHE": f"{self.root}/data", "KANGAROO_MAX_TEXT_GB": str(settings.MAX_TEXT_GB)}
        facts = self.host.facts or {}
        if facts.get("cores") and not facts.get("gpus"):  # runs share the cores
            env["KANGAROO_THREADS"] = str(max(1, int(facts["cores"]) // max(1, self.host.slots)))
            if self.host.slots > 1:
                env["OMP_WAIT_POLICY"] = "passive"  # threads that spin while waiting would take the other run's cores
        return env

    @functools.cached_property
    def root(self) -> str:
        """The working folder, as an absolute path on the host."""
        root: str = _member(self.ask("hello"), "root", str)
        return root

    def status(self, run: ModelRun) -> Status:
        status = self.ask("status", run=_name(run))
        return {
            "attempt": _member(status, "attempt", int),
            "alive": _member(status, "alive", bool),
            "pid": status.get("pid") if isinstance(status.get("pid"), int) else None,
            "at": status["at"] if isinstance(status.get("at"), float) else None,
            "exit": answers.ended(status.get("exit")),
        }

    def stop(self, run: ModelRun, grace: float) -> bool:
        gone: bool = _member(self.ask("stop", run=_name(run), grace=grace), "gone", bool)
        return gone

    def tail(self, run: ModelRun, offset: int) -> Iterator[Frame]:
        while True:
            asked = time.monotonic()
            found, data = call(self.host.pk, "tail", run=_name(run), offset=offset, wait=WAIT)
            frame = Frame(_member(found, "kind", str), _member(found, "offset", int), data)
            whole = data.endswith(b"\n") if frame.kind == "D" else not data
            if frame.offset != offset or not whole:
                raise _nonsense(f"events from byte {frame.offset} where {offset} was asked for")
            yield frame
            if frame.kind == "E":
                return
            offset += len(data)
            if len(data) < CHUNK // 8:  # there is nothing to catch up on, whatever the hurry of the host
                time.sleep(max(0.0, asked + PACE - time.monotonic()))

    # Its files -------------------------------------------------------------------------------------------------------

    def open_file(self, run: ModelRun, name: str) -> BinaryIO:
        first = self.read(run, name, 0, CHUNK)
        return io.BufferedReader(cast(io.RawIOBase, _Remote(self, run, name, first)), CHUNK)

    def read(self, run: ModelRun, name: str, offset: int, limit: int) -> bytes:
        path = _inside(run, name)
        try:
            return call(self.host.pk, "read", path=path, offset=offset, limit=min(limit, CHUNK))[1][:limit]
        except (PermissionError, NotADirectoryError):  # it leads outside, or nowhere
            raise FileNotFoundError(errno.ENOENT, "there is no such file", name) from None

    def pieces(self, run: ModelRun, name: str, offset: int, size: int) -> Generator[bytes, None, None]:
        path, places = _inside(run, name), range(offset, size, CHUNK)
        requests = ({"path": path, "offset": place, "limit": min(CHUNK, size - place)} for place in places)
        try:
            with contextlib.closing(ahead(self.host.pk, "read", requests)) as pieces:
                for place, (_, data) in zip(places, pieces, strict=True):
                    yield data[: size - place]
        except (PermissionError, IsADirectoryError):  # it leads outside
            raise FileNotFoundError(errno.ENOENT, "there is no such file", name) from None

    def files(self, run: ModelRun, folder: str) -> list[File]:
        try:
            listed = self.ask("files", path=_inside(run, folder))
        except (FileNotFoundError, PermissionError):
            return []
        if not isinstance(listed, list) or len(listed) > _MOST_FILES:
            raise _nonsense("its list of files")
        files = []
        for entry in listed:
            path, size = entry if isinstance(entry, list) and len(entry) == 2 else ("", 0)
            is_file = isinstance(path, str) and isinstance(size, int) and 0 <= size < _LARGEST
            if not is_file or not _is_plain(path):
                raise _nonsense("its list of files")
            files.append(File(f"{folder}/{path}", size))
        return sorted(files)

    def digest(self, run: ModelRun, name: str) -> str:
        try:
            digest: str = _member(self.ask("digest", path=_inside(run, name), timeout=1800), "sha256", str)
        except PermissionError:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", name) from None
        return digest

    def disk_bytes(self, run: ModelRun) -> int:
        size: int = _member(self.ask("disk_bytes", run=_name(run)), "bytes", int)
        return max(0, size)

    # The host itself -------------------------------------------------------------------------------------------------

    def remove(self, experiment: UUID) -> None:
        self.ask("remove", experiment=str(experiment))

    def half_removed(self) -> list[UUID]:
        names = self.ask("half_removed")
        if not isinstance(names, list):
            raise _nonsense("its list of experiments")
        return [UUID(str(name)) for name in names]

    def readings(self) -> dict[str, Any]:
        return answers.readings(self.ask("readings"))

    # Sending ---------------------------------------------------------------------------------------------------------

    def _send_what_it_needs(self, run: ModelRun, progress: Progress | None) -> ExperimentSpec:
        """Put the run's files on the host; the spec as it is to be read there."""
        spec = run.experiment.spec
        data, models = spec.data, dict(spec.models)
        if data.kind == "local":
            data = data.model_copy(update={"source": self._shared(data.source, progress)})
        if isinstance(data.tokenizer, PretrainedTokenizer) and is_path(data.tokenizer.name):
            name = self._shared(data.tokenizer.name, progress, weights=False)
            data = data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={"name": name})})
        for name, model in spec.models.items():
            if isinstance(model.init, CheckpointInit) and is_path(model.init.path):
                path = self._shared(model.init.path, progress, weights=name == run.name)
                models[name] = model.model_copy(update={"init": model.init.model_copy(update={"path": path})})
        if run.parent is not None and run.parent.host_id != run.host_id:
            grown_from = run.parent.directory / "model"
            if not grown_from.is_dir():
                raise FileNotFoundError(errno.ENOENT, f"{run.parent.name} has no finished model here yet")
            there = f"experiments/{run.experiment_id}/{run.parent.name}/model"
            for inside, file in _files_below(grown_from):
                self.send(file, f"{there}/{inside}", progress)
        return spec.model_copy(update={"data": data, "models": models})

    def _shared(self, name: str, progress: Progress | None, *, weights: bool = True) -> str:
        """Send a file or folder of ours to the host's `files`, perhaps without weights; its path there."""
        source = Path(name).expanduser().resolve(strict=True)
        files = _files_below(source) if source.is_dir() else [("", source)]
        digests = [(inside, _digest(path)) for inside, path in files]
        digest = digests[0][1] if source.is_file() else hashlib.sha256(repr(digests).encode()).hexdigest()
        there = f"files/{digest}/{source.name}"
        for inside, path in files:
            if weights or path.suffix not in _WEIGHTS:
                self.send(path, f"{there}/{inside}" if inside else there, progress)
        return f"{self.root}/{there}"

    def send(self, path: Path, to: str, progress: Progress | None = None) -> None:
        """Copy a file of ours to `to` in the working folder, unless it stands there already."""
        digest = _digest(path)
        try:
            self._send(path, to, digest, progress)
        except ValueError:  # of a part that an earlier version of the file, or a fault, has left
            self._send(path, to, digest, progress)

    def _send(self, path: Path, to: str, digest: str, progress: Progress | None) -> None:
        there = self.ask("part", path=to)
        if there.get("whole") and self.ask("digest", path=to, timeout=1800).get("sha256") == digest:
            return
        total = path.stat().st_size
        with path.open("rb") as file:
            begun = _member(there, "size", int)
            offset = file.seek(begun if 0 < begun <= total else 0)
            while (chunk := file.read(SENT)) or offset == 0:
                self.ask("write", chunk, path=to, offset=offset)
                offset += len(chunk)
                if progress is not None:
                    progress(offset, total)
                if not chunk:
                    break
        self.ask("finish", path=to, sha256=digest, timeout=1800)


class _Remote(io.RawIOBase):
    """A file of a run directory, read piece by piece."""

    def __init__(self, ssh: Ssh, run: ModelRun, name: str, first: bytes) -> None:
        self._ssh, self._run, self._name = ssh, run, name
        self._offset, self._held = 0, first

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._held[: len(buffer)] or self._ssh.read(self._run, self._name, self._offset, len(buffer))
        self._held = self._held[len(data) :]
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


def _name(run: ModelRun) -> str:
    return f"{run.experiment_id}/{run.name}"


def _inside(run: ModelRun, name: str) -> str:
    """The path of something in a run directory, from the working folder."""
    if not _is_plain(name):
        raise FileNotFoundError(errno.ENOENT, "there is no such file", name)
    return f"experiments/{_name(run)}/{name}"


def _is_plain(name: str) -> bool:
    """Whether a relative path stays below where it starts."""
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _files_below(folder: Path) -> list[tuple[str, Path]]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")]
    return sorted((path.relative_to(folder).as_posix(), path) for path in files)


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _member(answer: Any, name: str, kind: type) -> Any:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise _nonsense(f"its {name}")
    return value


def _nonsense(what: str) -> HostProblem:
    return HostProblem(Host.Problem.UNUSABLE, f"The host gave an answer that cannot be: {what}.")
