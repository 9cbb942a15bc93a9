"""How requests and answers go through a pipe: a JSON object on a line, then as many bytes as its `size` says.

    {"id": 7, "op": "read", "path": "...", "offset": 0, "limit": 65536}\\n
    {"id": 7, "ok": {"total": 52817}, "size": 65536}\\n<65536 bytes>
    {"id": 8, "error": {"type": "FileNotFoundError", "errno": 2, "message": "..."}}\\n

Answers may come in another order than their requests; `id` says whose they are. Standard library only.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

#: A header longer than this, or a payload, is not ours: the other end is broken, or hostile.
MOST_HEADER = 1 << 20
MOST_PAYLOAD = 8 << 20


class WireError(ConnectionError):
    """What came is no message."""


def pack(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """A message as bytes."""
    if payload:
        header = {**header, "size": len(payload)}
    return json.dumps(header, separators=(",", ":")).encode() + b"\n" + payload


def parse(line: bytes) -> tuple[dict[str, Any], int]:
    """A header, and how many bytes follow it. Raises :class:`WireError`."""
    try:
        header = json.loads(line)
        size = header.get("size", 0)
    except (ValueError, AttributeError, RecursionError):
        raise WireError(f"no message: {line[:80]!r}") from None
    if not isinstance(size, int) or not 0 <= size <= MOST_PAYLOAD:
        raise WireError(f"a message of {size!r} bytes")
    return header, size


def read(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None at the end of the stream. Raises :class:`WireError`, also where it ends in the middle."""
    line = pipe.readline(MOST_HEADER)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise WireError("the stream ended in the middle of a message")
    header, size = parse(line)
    payload = b""
    while len(payload) < size:
        more = pipe.read(size - len(payload))
        if not more:
            raise WireError("the stream ended in the middle of a message")
        payload += more
    return header, payload
