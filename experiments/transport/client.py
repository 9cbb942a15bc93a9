"""Asking a host something, from any process of the site: by the socket of the keeper, which holds the connections.

`call` blocks until the answer is there. Each thread has a connection to the keeper of its own. `ahead` asks for more
before the first answer has come.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from django.conf import settings

from experiments.models import Host
from experiments.transport.base import HostProblem
from trainer import wire

#: The keeper ends a request that takes too long; this many seconds later it is taken for dead itself.
_PATIENCE = 5.0


class _Line(threading.local):
    """This thread's connection. A forked process inherits it and must not use it: its parent does."""

    pid = 0
    connection: socket.socket | None = None
    reader: BinaryIO | None = None


_line = _Line()


def call(host: int, op: str, payload: bytes = b"", *, timeout: float = 60, **arguments: Any) -> tuple[Any, bytes]:
    """Ask the host of this primary key for `op`, within `timeout` seconds: the answer, and the bytes that came with it.

    Raises :class:`HostProblem` where the host cannot be asked; OSError of the fitting kind, or ValueError, where it
    could not do it.
    """
    message = wire.pack({"id": 0, "host": host, "op": op, "timeout": timeout, **arguments}, payload)
    try:
        with _problems():
            found = _exchange(message, timeout + _PATIENCE)
    except HostProblem:
        hang_up()
        raise
    return _content(*found)


def ahead(
    host: int, op: str, requests: Iterable[Mapping[str, Any]], *, most: int = 4, timeout: float = 60
) -> Generator[tuple[Any, bytes], None, None]:
    """The answers to one request for each arguments of `requests`, in their order. Raises as :func:`call`.

    `most` of them are under way at once, so that a host which is far away is not waited for after each.
    """
    with contextlib.ExitStack() as opened:
        asked: deque[tuple[socket.socket, BinaryIO]] = deque()
        for arguments in requests:
            if len(asked) < most:
                connection = opened.enter_context(_connect())
                reader: BinaryIO = opened.enter_context(connection.makefile("rb"))
                line = connection, reader
            else:
                line = asked.popleft()
                yield _answer(line, timeout)
            with _problems():
                line[0].sendall(wire.pack({"id": 0, "host": host, "op": op, "timeout": timeout, **arguments}))
            asked.append(line)
        while asked:
            yield _answer(asked.popleft(), timeout)


def _answer(line: tuple[socket.socket, BinaryIO], timeout: float) -> tuple[Any, bytes]:
    line[0].settimeout(timeout + _PATIENCE)
    with _problems():
        answer = wire.read(line[1])
        if answer is None:
            raise ConnectionResetError
    return _content(*answer)


def _content(header: dict[str, Any], answer: bytes) -> tuple[Any, bytes]:
    if "error" in header:
        raise _error(header["error"])
    return header.get("ok"), answer


@contextlib.contextmanager
def _problems() -> Iterator[None]:
    """What may befall us on the way to the keeper, as a sentence."""
    try:
        yield
        return
    except HostProblem:
        raise
    except TimeoutError:
        sentence = "The site's collector does not answer; it is tried again."
    except (OSError, wire.WireError):
        sentence = "The site's collector ended before it had an answer; it is tried again."
    raise HostProblem(Host.Problem.UNREACHABLE, sentence) from None


def _exchange(message: bytes, patience: float) -> tuple[dict[str, Any], bytes]:
    for reused in ([True] if _is_open() else []) + [False]:
        connection, reader = _connected()
        connection.settimeout(patience)
        try:
            connection.sendall(message)
            if answer := wire.read(reader):
                return answer
        except TimeoutError:
            raise
        except OSError:
            if not reused:
                raise
        # The keeper was started anew since this thread last spoke to it. Whatever was asked may be asked twice.
        hang_up()
    raise ConnectionResetError


def _is_open() -> bool:
    return _line.connection is not None and _line.pid == os.getpid()


def _connected() -> tuple[socket.socket, BinaryIO]:
    if not _is_open():
        connection = _connect()
        _line.pid, _line.connection, _line.reader = os.getpid(), connection, connection.makefile("rb")
    assert _line.connection is not None
    assert _line.reader is not None
    return _line.connection, _line.reader


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(settings.KEEPER_SOCKET))
    except OSError:
        connection.close()
        raise HostProblem(
            Host.Problem.UNREACHABLE,
            "The site's collector is not running; without it no host is reached. The operator starts it with "
            "`manage.py up` or `manage.py collect`.",
        ) from None
    return connection


def hang_up() -> None:
    """Give this thread's connection up."""
    with contextlib.suppress(OSError):
        if _line.reader is not None:
            _line.reader.close()
        if _line.connection is not None:
            _line.connection.close()
    _line.reader = _line.connection = None


def _error(said: dict[str, Any]) -> Exception:
    """What the far side raised, as one of a few kinds; its text is the far side's."""
    kind, message, number = said.get("type"), str(said.get("message", "")), said.get("errno")
    if kind == "HostProblem":
        return HostProblem(said["kind"], message)
    if kind == "ValueError":
        return ValueError(message)
    if isinstance(number, int):
        return OSError(number, message)
    known = getattr(builtins, str(kind), None)
    if isinstance(known, type) and issubclass(known, OSError):
        return known(message)
    return OSError(f"{kind}: {message}")
