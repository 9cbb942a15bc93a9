"""One SSH connection to one host: its address judged, its key checked, logged in; and what is run in its shell.

    scan      the host key that a machine shows, without a login
    log_in    a Session: a connection whose host key is the one that was confirmed
    Session.execute, Session.install_key    single commands
    Session.begin_relay                     a Relay: `python -m trainer.relay` there, which answers requests

Only what stands in the row is used: no configuration, agent, key or known host of the user who runs the site. Nothing
that a host says is trusted: it is bounded, cut, and never raises anything but :class:`HostProblem`, which holds no
credential.

Login shells differ (sh, bash, zsh, fish, csh) and print things. The command that they get is therefore always the same
one line; it prints a sentinel, before which everything is ignored, and reads from its standard input the script to run.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import inspect
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import asyncssh

from experiments.credentials import fingerprint
from experiments.models import Host
from experiments.transport import addresses, bootstrap
from experiments.transport.base import HostProblem
from trainer import wire
from trainer.agent import SENTINEL

#: Seconds for the connection, for the login, and for the shell with the lines before and the relay's start.
CONNECT_TIMEOUT, LOGIN_TIMEOUT, SHELL_TIMEOUT = 10.0, 15.0, 60.0
#: A connection that has been silent for 5 s is asked for a sign of life; after three questions without one it is dead.
KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 5, 3
#: Requests that a host is given at once.
MOST_REQUESTS = 100
#: Answers in a row that nobody waits for (any more), after which a host is not listened to.
MOST_STRAYS = 1000
#: Bytes that a host may send before we have taken them in: what is on its way on a line that is long and wide.
WINDOW = 8 << 20
#: What a login shell may print before our sentinel; what is kept of what a program prints.
MOST_NOISE, MOST_OUTPUT = 64 << 10, 4096
_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10", "python3.9", "python3")
#: Single quotes, no exclamation mark, no backslash: means the same in every login shell.
_COMMAND = f"""/bin/sh -c 'echo "{SENTINEL}"; read -r x; eval "$(echo "$x" | base64 -d)"'"""
_ALGORITHMS = {
    "ssh-ed25519": ["ssh-ed25519"],
    **{f"ecdsa-sha2-nistp{bits}": [f"ecdsa-sha2-nistp{bits}"] for bits in (256, 384, 521)},
    "ssh-rsa": ["rsa-sha2-512", "rsa-sha2-256"],
}

# Below a warning it tells of users, addresses and algorithms, and on request of everything that is sent.
logging.getLogger("asyncssh").setLevel(logging.WARNING)
asyncssh.set_debug_level(1)


@dataclass(frozen=True)
class Place:
    """What a connection is made from: a Host's row, read once. Its key is decrypted here and nowhere else."""

    pk: int
    name: str
    address: str
    port: int
    username: str
    folder: str
    python: str
    before: str
    host_key: str
    jump: int | None
    owner: int | None
    key: asyncssh.SSHKey | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.address if self.port == 22 else f"{self.address} port {self.port}"


class KeyChanged(HostProblem):
    """The host shows another key than the one that was confirmed."""

    def __init__(self, place: Place, seen: str) -> None:
        self.seen = seen
        super().__init__(
            Host.Problem.KEY_CHANGED,
            f"{place} shows another host key than the one that was confirmed: {fingerprint(seen)} instead of "
            f"{fingerprint(place.host_key)}. Either the machine was set up anew, or somebody stands between. Nothing "
            "is sent there until its owner has compared and confirmed the new key.",
        )


def cut(text: str, most: int = 200) -> str:
    """What a machine said, as it may be shown: printable, on one line, and not too much of it."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


# Reaching it ----------------------------------------------------------------------------------------------------------


async def scan(place: Place, via: Session | None = None) -> str:
    """The host key that a machine shows now, "ssh-ed25519 AAAA...". Nobody is logged in."""
    client = _Client()
    with contextlib.suppress(asyncssh.HostKeyNotVerifiable), _problems(place, client):
        await _connected(place, client, via, known_hosts=([], [], []), client_keys=None, username="nobody")
    if not client.seen:
        raise HostProblem(Host.Problem.UNUSABLE, f"{place} showed no host key.")
    return client.seen


async def log_in(place: Place, via: Session | None = None, *, password: str = "") -> Session:
    """A connection to the machine with the confirmed host key, by the row's key, or by a password if one is given."""
    if not place.host_key:
        raise HostProblem(Host.Problem.UNUSABLE, f"The host key of {place} has not been confirmed yet.")
    methods: dict[str, Any]
    if password:
        methods = {"preferred_auth": ["password", "keyboard-interactive"], "password": password, "client_keys": None}
    elif place.key is not None:
        methods = {"preferred_auth": ["publickey"], "client_keys": [place.key]}
    else:
        raise HostProblem(Host.Problem.LOGIN_REFUSED, f"There is no credential for {place}; add one.")
    client, began = _Client(), time.monotonic()
    try:
        with _problems(place, client, by_password=bool(password)):
            pinned = asyncssh.import_public_key(place.host_key)
            methods |= {"known_hosts": ([pinned], [], []), "username": place.username}
            connection = await _connected(place, client, via, **methods)
    except asyncssh.HostKeyNotVerifiable:
        raise KeyChanged(place, client.seen) from None
    return Session(place, connection, time.monotonic() - began, client.banner)


class _Client(asyncssh.SSHClient):
    """Remembers what the host showed: a key that is not the confirmed one, a banner."""

    def __init__(self) -> None:
        self.seen = ""
        self.banner = ""

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.seen = " ".join(key.export_public_key().decode().split()[:2])
        return False

    def auth_banner_received(self, msg: str, lang: str) -> None:
        self.banner = cut(self.banner + " " + msg[:1000])


async def _connected(
    place: Place, client: _Client, via: Session | None, **options: Any
) -> asyncssh.SSHClientConnection:
    # The kind of the confirmed key first, then the others: a host that has another kind alone has changed.
    first = place.host_key.partition(" ")[0]
    algorithms = [name for kind in sorted(_ALGORITHMS, key=lambda kind: kind != first) for name in _ALGORITHMS[kind]]
    options |= {
        "client_factory": lambda: client,
        "server_host_key_algs": algorithms,
        "config": None,
        "agent_path": None,
        "agent_forwarding": False,
        "pkcs11_provider": None,
        "gss_host": None,
        "gss_kex": False,
        "gss_auth": False,
        "host_based_auth": False,
        "x509_trusted_certs": None,
        "x509_trusted_cert_paths": None,
        "env": None,
        "send_env": None,
        "connect_timeout": LOGIN_TIMEOUT,
        "login_timeout": LOGIN_TIMEOUT,
        "keepalive_interval": KEEPALIVE_INTERVAL,
        "keepalive_count_max": KEEPALIVE_COUNT,
    }
    if via is not None:
        # The jump host resolves the name and connects: it is in its network that the address means something.
        options["connect_timeout"] = CONNECT_TIMEOUT + LOGIN_TIMEOUT
        return await asyncssh.connect(place.address, place.port, tunnel=via.connection, **options)
    connection = await _socket(place)
    try:
        return await asyncssh.connect(sock=connection, **options)
    except BaseException:
        connection.close()
        raise


async def _socket(place: Place) -> socket.socket:
    """Connected to the address that was judged. Raises TimeoutError."""
    async with asyncio.timeout(CONNECT_TIMEOUT):
        ip = await asyncio.to_thread(addresses.resolve, place.address, place.port)
        connection = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(connection, (ip, place.port))
        except BaseException:
            connection.close()
            raise
        return connection


@contextlib.contextmanager
def _problems(place: Place, client: _Client, *, by_password: bool = False) -> Iterator[None]:
    """Whatever goes wrong on the way to a machine, as a sentence. HostKeyNotVerifiable passes."""
    unreachable, unusable, refused = Host.Problem.UNREACHABLE, Host.Problem.UNUSABLE, Host.Problem.LOGIN_REFUSED
    try:
        yield
        return
    except (HostProblem, asyncssh.HostKeyNotVerifiable):
        raise
    except TimeoutError:
        problem = HostProblem(
            unreachable,
            f"{place} does not answer. Check that the machine is on, that the address and port are right, and that no "
            "firewall stands between.",
        )
    except asyncssh.PermissionDenied:
        said = f" It says: “{client.banner}”" if client.banner else ""
        problem = HostProblem(
            refused,
            f"{place} refused the password of {place.username}, or takes none at all; then add the line by hand.{said}"
            if by_password
            else f"{place} refused the login of {place.username} with this key. Check the user's name, and that the "
            f"key's line stands in that user's ~/.ssh/authorized_keys.{said}",
        )
    except asyncssh.PasswordChangeRequired:
        problem = HostProblem(
            refused, f"The password of {place.username} on {place} has expired; change it there first."
        )
    except asyncssh.KeyExchangeFailed:
        problem = HostProblem(
            unusable, f"{place} offers no method of encryption that is safe today; its SSH server has to be updated."
        )
    except asyncssh.ProtocolError:
        problem = HostProblem(unusable, f"What answers at {place} is not an SSH server. Check the port.")
    except asyncssh.ChannelOpenError as error:
        problem = HostProblem(unreachable, _no_tunnel(place, error))
    except asyncssh.ConnectionLost as error:
        silent = "timeout" in str(error).lower()
        problem = HostProblem(
            unreachable,
            f"{place} takes connections, but nothing answers them; the machine may be overloaded or stopped."
            if silent
            else f"{place} closed the connection before the login. It may take no more logins at the moment.",
        )
    except asyncssh.DisconnectError as error:
        problem = HostProblem(unreachable, f"{place} ended the connection: “{cut(error.reason)}”")
    except (asyncssh.Error, ValueError) as error:
        problem = HostProblem(unusable, f"No connection to {place} can be made ({type(error).__name__}).")
    except OSError as error:
        problem = HostProblem(unreachable, _no_connection(place, error))
    raise problem from None


def _no_connection(place: Place, error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return f"{place} refuses connections: no SSH server listens there. Start it, or check the port."
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL):
        return f"There is no way from this site to {place}: check the address, or name a jump host."
    if error.errno in (errno.ECONNRESET, errno.EPIPE):
        return f"{place} closed the connection before the login. It may take no more logins at the moment."
    return f"{place} cannot be reached: {os.strerror(error.errno) if error.errno else type(error).__name__}."


def _no_tunnel(place: Place, error: asyncssh.ChannelOpenError) -> str:
    if error.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
        return (
            "The jump host does not pass connections on. Its SSH server must allow it, and the line in its "
            "authorized_keys must say port-forwarding."
        )
    return f"The jump host finds no way to {place}: check the address as it is called from there, and the port."


# What runs there ------------------------------------------------------------------------------------------------------


class Session:
    """A connection to a host, logged in."""

    def __init__(self, place: Place, connection: asyncssh.SSHClientConnection, seconds: float, banner: str) -> None:
        self.place = place
        self.connection = connection
        self.seconds = seconds
        self.banner = banner

    async def closed(self) -> None:
        """Returns when the connection is no more."""
        await self.connection.wait_closed()

    def close(self) -> None:
        self.connection.close()

    def abort(self) -> None:
        self.connection.abort()

    async def execute(self, argv: list[str]) -> dict[str, Any]:
        """Run a command after the host's lines; its exit code, and the beginning of what it printed."""
        async with self._shell(f"exec {shlex.join(argv)} </dev/null", before=True) as shell:
            out = await shell.output.everything(MOST_OUTPUT)
            await shell.process.wait_closed()
            err = shell.errors.text
        code = shell.process.exit_status
        return {"code": -1 if code is None else code, "out": out.decode("utf-8", "replace"), "err": err[:MOST_OUTPUT]}

    async def install_key(self, script: str) -> None:
        """Run the lines that put our key's line into authorized_keys."""
        async with self._shell(f"( {script} ) </dev/null && echo installed", before=False) as shell:
            out = await shell.output.everything(MOST_OUTPUT)
            await shell.process.wait_closed()
        if b"installed" not in out:
            raise HostProblem(
                Host.Problem.UNUSABLE,
                f"The login by password worked, but the key's line could not be written on {self.place}: "
                f"“{cut(shell.errors.text)}”. Add it by hand.",
            )

    async def begin_relay(self, digest: str, archive: bytes) -> Relay:
        """The relay of this version of the trainer, whose archive is sent if the host has not got it."""
        place = self.place
        stack = contextlib.AsyncExitStack()
        try:
            shell = await stack.enter_async_context(
                self._shell(_start_script(place, digest, len(archive)), before=True)
            )
            async with asyncio.timeout(SHELL_TIMEOUT):
                said = await shell.message()
                if said.get("need"):
                    await shell.write(archive)
                    said = await shell.message()
                if "error" in said:
                    await shell.last_words()
                    raise _no_relay(place, said["error"], shell.errors.text)
                await shell.sentinel()  # of the relay itself
        except TimeoutError:
            await stack.aclose()
            raise HostProblem(
                Host.Problem.UNUSABLE,
                f"{place} did not start Kangaroo's program within {SHELL_TIMEOUT:.0f} s. Its disk may be very slow, or "
                "a line that is run before waits for something.",
            ) from None
        except (asyncssh.Error, OSError) as error:
            await stack.aclose()
            raise error if isinstance(error, HostProblem) else self._lost(error) from None
        except BaseException:
            await stack.aclose()
            raise
        return Relay(place, shell, stack)

    @contextlib.asynccontextmanager
    async def _shell(self, script: str, *, before: bool) -> Any:
        """A shell on the host that has begun to run `script`."""
        if before and self.place.before.strip():
            script = _after(self.place.before, script)
        try:
            process: asyncssh.SSHClientProcess[bytes] = await self.connection.create_process(
                _COMMAND, encoding=None, window=WINDOW
            )
        except (asyncssh.Error, OSError) as error:
            raise self._lost(error) from None
        shell = _Shell(self.place, self.connection, process)
        try:
            async with asyncio.timeout(SHELL_TIMEOUT):
                await shell.sentinel()
                await shell.write(base64.b64encode(script.encode()) + b"\n")
            yield shell
        except TimeoutError:
            raise HostProblem(
                Host.Problem.UNUSABLE,
                f"The login shell of {self.place.username} on {self.place} does not come to running anything; look for "
                "what waits in its start-up files (.bashrc, .profile).",
            ) from None
        except (asyncssh.Error, ConnectionError) as error:
            raise error if isinstance(error, HostProblem) else self._lost(error) from None
        finally:
            shell.errors.stop()
            process.close()

    def _lost(self, error: Exception) -> HostProblem:
        if isinstance(error, asyncssh.ChannelOpenError):
            return HostProblem(
                Host.Problem.UNUSABLE,
                f"{self.place} opens no more sessions on our connection: “{cut(error.reason)}”. Its SSH server limits "
                "them (MaxSessions).",
            )
        return HostProblem(Host.Problem.UNREACHABLE, f"The connection to {self.place} broke; it is made anew.")


class _Shell:
    """A process on the host, from its first line of output on."""

    def __init__(
        self,
        place: Place,
        connection: asyncssh.SSHClientConnection,
        process: asyncssh.SSHClientProcess[bytes],
    ) -> None:
        self.place = place
        self.connection = connection
        self.process = process
        self.output = _Pipe(process.stdout)
        self.errors = _Errors(process.stderr)

    async def write(self, data: bytes) -> None:
        self.process.stdin.write(data)
        await self.process.stdin.drain()

    async def sentinel(self) -> None:
        """Skip what start-up files print."""
        noise = b""
        while True:
            line = await self.output.line(MOST_NOISE)
            if line.endswith(SENTINEL.encode() + b"\n"):
                return
            noise += line
            if not line.endswith(b"\n") or len(noise) > MOST_NOISE:
                raise await self._ended(noise)

    async def message(self) -> dict[str, Any]:
        """A line of JSON."""
        line = await self.output.line(MOST_NOISE)
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise await self._ended(line)
        return said

    async def last_words(self) -> None:
        """Wait a little for the errors that a shell which is ending has printed: they may still be on their way."""
        with contextlib.suppress(TimeoutError, asyncssh.Error):
            async with asyncio.timeout(1):
                await self.errors.end()

    async def _ended(self, printed: bytes) -> HostProblem:
        if len(printed) > MOST_NOISE:
            said = f"prints more than {MOST_NOISE >> 10} KB before it runs anything; quieten its start-up files."
            return HostProblem(Host.Problem.UNUSABLE, f"The login shell of {self.place.username} {said}")
        await self.last_words()
        if self.connection.is_closed():
            return HostProblem(Host.Problem.UNREACHABLE, f"The connection to {self.place} broke; it is made anew.")
        words = cut(f"{printed.decode('utf-8', 'replace')} {self.errors.text}")
        hint = "Check the user's shell and its start-up files"
        if self.place.before.strip():
            hint += ", and that none of the lines to run before ends it"
        return HostProblem(
            Host.Problem.UNUSABLE,
            f"The shell of {self.place.username} on {self.place} ended before it ran what it should"
            f"{f': “{words}”' if words else '.'} {hint}.",
        )


class _Pipe:
    """What a process prints, in lines and pieces, no more of it in memory than is asked for."""

    def __init__(self, reader: asyncssh.SSHReader[bytes]) -> None:
        self._reader = reader
        self._held = bytearray()

    async def line(self, most: int) -> bytes:
        """Up to and with the next newline; without one where the stream ends, or after `most` bytes."""
        searched = 0
        while (end := self._held.find(b"\n", searched) + 1) == 0:
            searched = len(self._held)
            if searched > most or not await self._more():
                return self._take(len(self._held))
        return self._take(end)

    async def exactly(self, count: int) -> bytes:
        while len(self._held) < count:
            if not await self._more():
                raise wire.WireError("the stream ended in the middle of a message")
        return self._take(count)

    async def everything(self, most: int) -> bytes:
        """The first `most` bytes; the rest is read and forgotten."""
        kept = b""
        while self._held or await self._more():
            kept = (kept + self._take(len(self._held)))[:most]
        return kept

    async def _more(self) -> bool:
        data = await self._reader.read(1 << 16)
        self._held += data
        return bool(data)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken


class _Errors:
    """The last of what a process prints on standard error, read all the time so that it never waits for us."""

    def __init__(self, reader: asyncssh.SSHReader[bytes]) -> None:
        self._tail = b""
        self._task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncssh.SSHReader[bytes]) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            while data := await reader.read(1 << 14):
                self._tail = (self._tail + data)[-MOST_OUTPUT:]

    async def end(self) -> None:
        await asyncio.shield(self._task)

    def stop(self) -> None:
        self._task.cancel()

    @property
    def text(self) -> str:
        return self._tail.decode("utf-8", "replace")


class Relay:
    """The program on the host that answers requests, any number at a time."""

    def __init__(self, place: Place, shell: _Shell, stack: contextlib.AsyncExitStack) -> None:
        self.place = place
        self._shell = shell
        self._stack = stack
        self._asked: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._last = 0
        self._writing = asyncio.Lock()
        self._room = asyncio.Semaphore(MOST_REQUESTS)
        self._problem: HostProblem | None = None
        self._reading = asyncio.create_task(self._read())

    @property
    def is_open(self) -> bool:
        return self._problem is None

    async def ask(self, op: str, arguments: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The answer's header and what comes with it. Who goes away before it is there has still asked."""
        async with self._room:
            if self._problem is not None:
                raise HostProblem(self._problem.kind, self._problem.message)
            self._last += 1
            number = self._last
            answer = self._asked[number] = asyncio.get_running_loop().create_future()
            try:
                async with self._writing:
                    await self._shell.write(wire.pack({**arguments, "id": number, "op": op}, payload))
                found: tuple[dict[str, Any], bytes] = await answer
                return found
            except (asyncssh.Error, BrokenPipeError):
                raise HostProblem(Host.Problem.UNREACHABLE, f"The connection to {self.place} broke.") from None
            finally:
                self._asked.pop(number, None)

    async def close(self) -> None:
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        try:
            self._problem = await self._answers()
        except wire.WireError:
            self._problem = HostProblem(
                Host.Problem.UNUSABLE, f"What came from {self.place} is not what Kangaroo's program says."
            )
        except (asyncssh.Error, OSError):
            self._problem = HostProblem(Host.Problem.UNREACHABLE, f"The connection to {self.place} broke.")
        finally:
            self._problem = self._problem or HostProblem(
                Host.Problem.UNREACHABLE, f"The connection to {self.place} was closed."
            )
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(HostProblem(self._problem.kind, self._problem.message))
            await self._stack.aclose()

    async def _answers(self) -> HostProblem:
        """Hand on what comes until nothing does; why not."""
        strays = 0
        while line := await self._shell.output.line(wire.MOST_HEADER):
            if not line.endswith(b"\n"):
                break
            header, size = wire.parse(line)
            payload = await self._shell.output.exactly(size)
            answer = self._asked.get(header["id"]) if isinstance(header.get("id"), int) else None
            if answer is not None and not answer.done():
                answer.set_result((header, payload))
                strays = 0
            elif (strays := strays + 1) > MOST_STRAYS:
                raise wire.WireError("answers to what nobody has asked")
        await asyncio.sleep(0.1)  # for the rest of its complaint, or the news that the connection is gone
        if self._shell.connection.is_closed():
            return HostProblem(Host.Problem.UNREACHABLE, f"The connection to {self.place} broke.")
        last = cut(self._shell.errors.text.strip().rpartition("\n")[2])
        return HostProblem(
            Host.Problem.UNUSABLE,
            f"Kangaroo's program on {self.place} has ended{f': “{last}”' if last else '.'} It is started anew.",
        )


# The scripts ----------------------------------------------------------------------------------------------------------


def _encoded(script: str) -> str:
    return f'"$(echo {base64.b64encode(script.encode()).decode()} | base64 -d)"'


def _after(before: str, script: str) -> str:
    """Run the owner's lines, in a login shell of bash where there is bash, then `script`.

    They neither read what is meant for the script nor print into its answer, and leave no `set -e` behind.
    """
    inner = (  # decoded beforehand: the lines may leave another PATH
        f"kangaroo_before={_encoded(before)}; kangaroo_script={_encoded(script)}; "
        'eval "$kangaroo_before"; set +eu; exec 0<&3 1>&4 3<&- 4>&-; eval "$kangaroo_script"'
    )
    return (
        "exec 3<&0 4>&1 </dev/null >&2\n"
        f"if command -v bash >/dev/null; then exec bash -lc {shlex.quote(inner)}; fi\n"
        f"{inner}\n"
    )


def _start_script(place: Place, digest: str, size: int) -> str:
    """Find a Python, and let it unpack and run the relay (:mod:`experiments.transport.bootstrap`)."""
    if place.python.startswith("~/"):
        pythons = '"$HOME"/' + shlex.quote(place.python[2:])
    else:
        pythons = shlex.quote(place.python) if place.python else " ".join(_PYTHONS)
    arguments = shlex.join([digest, str(size), place.folder])
    return (
        f"for p in {pythons}; do\n"
        '  command -v "$p" >/dev/null 2>&1 || continue\n'
        """  "$p" -c 'import sys; sys.exit(sys.version_info < (3, 9))' </dev/null >&2 || continue\n"""
        f'  exec "$p" -c {shlex.quote(inspect.getsource(bootstrap))} {arguments}\n'
        "done\n"
        """echo '{"error": {"type": "NoPython"}}'\n"""
    )


def _no_relay(place: Place, error: Any, printed: str) -> HostProblem:
    """What the start script, or the bootstrap, could not do."""
    error = error if isinstance(error, dict) else {}
    number, path = error.get("errno"), cut(str(error.get("path") or place.folder))
    if error.get("type") == "NoPython":
        said = f" It says: “{cut(printed)}”" if printed.strip() else ""
        if place.python:
            sentence = f"{cut(place.python)} on {place} is not there, does not start, or is older than Python 3.9."
            return HostProblem(Host.Problem.NO_PYTHON, f"{sentence} Name another, or set the host up again.{said}")
        return HostProblem(
            Host.Problem.NO_PYTHON,
            f"No Python of version 3.9 or newer is found on {place}. Install one, or name it in the host's settings: "
            f"the path of a python3, or lines that bring it onto PATH.{said}",
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return HostProblem(Host.Problem.UNUSABLE, f"The disk of {place} is full: there is no room left in {path}.")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HostProblem(
            Host.Problem.UNUSABLE,
            f"{place.username} may not write in {path} on {place}. Choose another working folder, or change its "
            "permissions.",
        )
    if number in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
        return HostProblem(Host.Problem.UNUSABLE, f"{path} on {place} is no folder. Choose another working folder.")
    what = f"{cut(str(error.get('type', '')), 40)}: {cut(str(error.get('message', '')))}"
    return HostProblem(Host.Problem.UNUSABLE, f"Kangaroo's program could not be put on {place}. It says: “{what}”")
