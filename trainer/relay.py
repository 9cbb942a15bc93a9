"""The site's hand on a host: answers requests over stdin and stdout for as long as the connection lives.

    python -m trainer.relay --root FOLDER

All that is asked of a host goes through one such process, one for a connection, however many runs there are: messages
of :mod:`trainer.wire`, each request answered by a thread of its own, so that a long poll holds nothing up. Standard
library only, for any Python from 3.9. It keeps nothing to itself: trainers are detached (:mod:`trainer.agent`), files
are on the disk, and when stdin ends, so does the relay, at once.

Its first line is `agent.SENTINEL`: whatever a login shell has printed before it is not ours. What stands below the
working folder FOLDER, to which every path is relative, and out of which none leads, by ".." or by a link:

    package/DIGEST/trainer/    this program
    env/                       the virtual environment that `trainer.set_up` makes
    experiments/UUID/NAME/     run directories
    data/                      prepared text
    files/SHA256/NAME          what was sent for runs to read
    tasks/NAME/                what is run beside the trainers, set-up for instance

What goes wrong is answered with the exception's type, errno and words, and the next request is read.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import inspect
import json
import os
import platform
import re
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from trainer import agent, machine, wire

VERSION = 1
#: Requests that are answered at once; more wait in the pipe.
_MOST_AT_ONCE = 128
#: Seconds from one look at a run's events to the next.
_POLL = 0.15
_CHUNK = 1 << 20

Answer = tuple[Any, bytes]


class Relay:
    """The operations. A name without underscore is one, its parameters are the request's, its result the answer."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def hello(self) -> Answer:
        """Who answers. Raises OSError if nothing can be written in the working folder."""
        self._root.mkdir(parents=True, exist_ok=True)
        if not os.access(self._root, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._root))
        package = agent.ROOT.name if agent.ROOT.parent.name == "package" else ""
        return {
            "version": VERSION,
            "python": platform.python_version(),
            "executable": sys.executable,
            "hostname": platform.node(),
            "user": machine.user(),
            "home": str(Path.home()),
            "root": str(self._root),
            "boot_id": agent.boot_id(),
            "time": time.time(),
            "package": package,
        }, b""

    # Processes

    def start(
        self,
        run: str,
        attempt: int,
        spec: str,
        env: dict[str, str] | None = None,
        gpus: list[str] | None = None,
        processes: int = 1,
    ) -> Answer:
        """Start the trainer of a run, which sees the given GPUs alone: none for [], all for None."""
        directory = self._run(run)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "spec.json").exists():
            written = directory / f".spec.json.{os.getpid()}.{threading.get_ident()}"
            written.write_text(spec, encoding="utf-8")
            written.replace(directory / "spec.json")
        more = dict(env or {})
        if gpus is not None:
            more["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if processes > 1:
            more["KANGAROO_PROCESSES"] = str(processes)
        outcome = agent.start(directory, attempt, env={**os.environ, **more}, launcher=machine.launcher())
        return {"outcome": outcome}, b""

    def status(self, run: str) -> Answer:
        return agent.status(self._run(run)), b""

    def stop(self, run: str, grace: float) -> Answer:
        return {"gone": agent.stop(self._run(run), grace)}, b""

    def tail(self, run: str, offset: int, wait: float) -> Answer:
        """The next frame of a run's events: lines as soon as there are any, a sign of life after `wait` seconds."""
        frames = agent.tail(self._run(run), offset, poll=min(_POLL, max(wait, 0.01)), heartbeat=wait)
        frame = next(frames)
        return {"kind": frame.kind, "offset": frame.offset}, frame.data

    def begin(self, name: str, command: list[str], attempt: int, env: dict[str, str] | None = None) -> Answer:
        """Start a command as a task, watched as a trainer is. "python" stands for the interpreter of the relay."""
        if not command:
            raise ValueError("no command to begin")
        if command[0] == "python":
            command = [sys.executable, *command[1:]]
        env = {**os.environ, **(env or {})}
        outcome = agent.start(self._task(name), attempt, env=env, command=command, launcher=machine.launcher())
        return {"outcome": outcome}, b""

    def task(self, name: str) -> Answer:
        return agent.status(self._task(name)), b""

    def end(self, name: str) -> Answer:
        """Stop a task, in a few seconds by force."""
        return {"gone": agent.stop(self._task(name), 5.0)}, b""

    # Files

    def read(self, path: str, offset: int, limit: int) -> Answer:
        with _open(self._inside(path)) as file:
            total = os.fstat(file.fileno()).st_size
            file.seek(offset)
            return {"total": total}, file.read(max(0, min(limit, wire.MOST_PAYLOAD)))

    def files(self, path: str) -> Answer:
        """Every file below a folder, by its path from there. A link is none, and leads nowhere."""
        top = self._inside(path)
        found: list[tuple[str, int]] = []
        for parent, _, names in os.walk(top):
            for name in names:
                file = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    info = file.lstat()
                    if stat.S_ISREG(info.st_mode):
                        found.append((file.relative_to(top).as_posix(), info.st_size))
        return sorted(found), b""

    def digest(self, path: str) -> Answer:
        digest, size = _sha256(self._inside(path))
        return {"sha256": digest, "size": size}, b""

    def write(self, path: str, offset: int, payload: bytes = b"") -> Answer:
        """Put bytes into the part of a file that comes bit by bit; what the part has behind them is cut off."""
        part = self._part(path)
        _make_private(part.parent)
        with open(part, "r+b" if part.exists() else "w+b") as file:
            size = file.seek(0, os.SEEK_END)
            if not 0 <= offset <= size:
                raise ValueError(f"{path} has {size} bytes so far; nothing can be written at byte {offset}")
            file.truncate(offset)
            file.seek(offset)
            file.write(payload)
        return {"size": offset + len(payload)}, b""

    def part(self, path: str) -> Answer:
        part = self._part(path)
        return {"size": part.stat().st_size if part.exists() else 0, "whole": self._inside(path).is_file()}, b""

    def finish(self, path: str, sha256: str) -> Answer:
        """Make the part the file, if it is what was meant. Asked once more after that, it has nothing to do."""
        whole, part = self._inside(path), self._part(path)
        if not part.exists() and whole.is_file() and _sha256(whole)[0] == sha256:
            return {}, b""
        digest, size = _sha256(part)
        if digest != sha256:
            part.unlink()
            raise ValueError(f"{path} did not come over as it is: {size} bytes of digest {digest}, not {sha256}")
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(whole)
        return {}, b""

    def disk_bytes(self, run: str) -> Answer:
        return {"bytes": agent.disk_bytes(self._run(run))}, b""

    def remove(self, experiment: str) -> Answer:
        if not re.fullmatch(r"[0-9a-f-]{36}", experiment):
            raise ValueError(f"no experiment: {experiment!r}")
        agent.remove(self._inside(f"experiments/{experiment}"))
        return {}, b""

    def half_removed(self) -> Answer:
        return agent.half_removed(self._root / "experiments"), b""

    # The machine

    def facts(self) -> Answer:
        return machine.facts(self._root), b""

    def readings(self) -> Answer:
        return machine.readings(self._root), b""

    # Paths

    def _run(self, run: str) -> Path:
        if not re.fullmatch(r"[0-9a-f-]{36}/[A-Za-z0-9_-]{1,64}", run):
            raise ValueError(f"no run: {run!r}")
        return self._inside(f"experiments/{run}")

    def _task(self, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ValueError(f"no task: {name!r}")
        return self._inside(f"tasks/{name}")

    def _part(self, path: str) -> Path:
        if not Path(path).name:
            raise PermissionError(errno.EACCES, f"{path!r} is no file below the working folder")
        return self._inside(f"{Path(path)}.part")

    def _inside(self, path: str) -> Path:
        """The path of something below the working folder, links followed."""
        if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise PermissionError(errno.EACCES, f"{path!r} is no path below the working folder")
        found = (self._root / path).resolve()
        if found != self._root and self._root not in found.parents:
            raise PermissionError(errno.EACCES, f"{path!r} leads out of the working folder")
        return found


def _open(path: Path) -> BinaryIO:
    """A regular file: anything else might make us wait for ever."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "no file", str(path))
    return open(file, "rb")


def _sha256(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with _open(path) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are not there, all for their owner alone."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


# Messages -------------------------------------------------------------------------------------------------------------


def serve(relay: Relay, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end. Raises nothing, whatever comes."""
    writing = threading.Lock()
    room = threading.BoundedSemaphore(_MOST_AT_ONCE)
    operations = {name: getattr(relay, name) for name in dir(relay) if not name.startswith("_")}

    def answer(header: dict[str, Any], payload: bytes) -> None:
        try:
            message = _packed(header.get("id"), *_ask(operations, header, payload))
        except BaseException as error:  # the relay must outlive any request
            if not isinstance(error, (OSError, ValueError)):
                traceback.print_exc()
            message = wire.pack({"id": header.get("id"), "error": describe(error)})
        send(message)

    def send(message: bytes) -> None:
        try:
            with writing:
                answers.write(message)
                answers.flush()
        except OSError:  # nobody listens any more
            os._exit(1)

    def answer_in_its_turn(header: dict[str, Any], payload: bytes) -> None:
        try:
            answer(header, payload)
        finally:
            room.release()

    while True:
        try:
            message = wire.read(requests)
        except wire.WireError as error:
            send(wire.pack({"id": None, "error": describe(error)}))
            continue
        if message is None:
            return
        room.acquire()
        try:
            threading.Thread(target=answer_in_its_turn, args=message, daemon=True).start()
        except RuntimeError as error:  # the host has no thread left for its user
            room.release()
            send(wire.pack({"id": message[0].get("id"), "error": {**describe(error), "type": "OSError"}}))


def _ask(operations: dict[str, Callable[..., Answer]], header: dict[str, Any], payload: bytes) -> Answer:
    operation = operations.get(str(header.get("op")))
    if operation is None:
        raise ValueError(f"this relay (version {VERSION}) knows no request {str(header.get('op'))[:40]!r}")
    arguments = {name: value for name, value in header.items() if name not in ("id", "op", "size")}
    if payload:
        arguments["payload"] = payload
    try:
        inspect.signature(operation).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{header['op']}: {error}") from None
    return operation(**arguments)


def _packed(number: Any, answer: Any, payload: bytes) -> bytes:
    header = {"id": number, "ok": answer}
    if len(payload) > wire.MOST_PAYLOAD or len(json.dumps(header)) >= wire.MOST_HEADER - 100:
        raise OSError(f"the answer is too long: {len(payload)} bytes and {len(json.dumps(header))} before them")
    return wire.pack(header, payload)


def describe(error: BaseException) -> dict[str, Any]:
    """An exception for the other side, which raises its like."""
    words = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        words = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    kind = "ValueError" if isinstance(error, (ValueError, TypeError)) else type(error).__name__
    return {"type": kind, "errno": getattr(error, "errno", None), "message": words[:1000]}


# Command line ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer relay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, metavar="FOLDER")
    root = parser.parse_args(arguments).root.expanduser().resolve()
    # What is kept here is its owner's alone, also on a machine with other users.
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The two pipes are for messages alone: nothing that runs in here, or is started from here, comes upon them.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    answers.write(agent.SENTINEL.encode() + b"\n")
    answers.flush()
    serve(Relay(root), requests, answers)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(0)  # without waiting for the threads: nobody listens to what they would say


if __name__ == "__main__":
    sys.exit(main())
