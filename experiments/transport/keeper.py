"""The keeper: one connection to each GPU host, held for everybody, in the collector's process.

    any process --client.call--> unix socket --Keeper--> Session + Relay (link) --> python -m trainer.relay on the host

A connection is made when something is asked of a host, is shared by all who ask, and is closed after a while without
questions. Who asks while one is being made waits for it too. After a failure there is a pause, growing and jittered, in
which everybody is told at once what was wrong; only where a person waits (keeper.connect, keeper.scan) is it tried
anyway. A host key that is not the confirmed one ends all tries until another is confirmed.

A host with a jump host is reached through that one's own connection, which has its own key, credential and address. The
operator's address policy is applied to what this site itself connects to, so to the jump host; where the host behind it
lies is a matter of the jump host's network, and is resolved there.

What stands in a host's row about reaching it (last_seen, unreachable_since, problem, problem_text, seen_key) is written
here alone. What is asked about hosts themselves, without their relay, is `keeper.*`; all else goes to the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shlex
import socket
import stat
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import asyncssh
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connections
from django.db.models import Value
from django.db.models.functions import Coalesce
from django.utils import timezone

from accounts.ring import KeyRingError
from experiments import credentials
from experiments.models import Host
from experiments.transport import answers, link, package
from experiments.transport.base import HostProblem
from experiments.transport.link import KeyChanged, Place, Relay, Session
from trainer import wire

log = logging.getLogger(__name__)

#: Seconds without a question after which a connection is closed.
IDLE = 60.0
#: Seconds between two tries to reach a host: the first, and the longest. A refused login is tried less often, since
#: many of them lock the user out.
FIRST_PAUSE, LONGEST_PAUSE, PAUSE_AFTER_REFUSAL = 0.2, 15.0, 60.0
#: Seconds between two notes in the database that a host was seen.
SEEN_EVERY = 10.0
#: Looks at machines that one owner may ask for within a minute.
MOST_LOOKS = 30
#: Commands of a probe that run on one host at once; its SSH server limits the sessions of a connection, usually to ten.
MOST_COMMANDS = 3

_T = TypeVar("_T")
_ERRORS = {"FileNotFoundError", "PermissionError", "FileExistsError", "IsADirectoryError", "NotADirectoryError"}


class Keeper:
    """Answers on the socket until it is stopped."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._looks: defaultdict[int | None, deque[float]] = defaultdict(deque)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._failure: BaseException | None = None

    # Its life

    def start(self) -> None:
        """Serve in a thread of its own; returns when it listens, and raises if it cannot."""
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()
        self._listening.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Close all connections and return when all is over. From any thread but its own."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed already
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self.serve())
        except Exception as failure:
            self._failure = failure
            log.exception("the keeper has ended")
        finally:
            self._listening.set()

    async def serve(self) -> None:
        """Listen and answer, until cancelled or stopped."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        path = _own_socket_path()
        server = await asyncio.start_unix_server(self._converse, path=path, limit=wire.MOST_HEADER)
        os.chmod(path, 0o600)
        sweeper = asyncio.create_task(self._sweep())
        self._listening.set()
        try:
            await self._stop.wait()
        finally:
            server.close()
            sweeper.cancel()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(sweeper, *self._tasks, return_exceptions=True)
            await asyncio.gather(*(line.close() for line in self._lines.values()), return_exceptions=True)
            self._writer.shutdown()
            await asyncio.sleep(0.05)  # what was closed is gone after another turn of the loop
            path.unlink(missing_ok=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, IDLE / 4))
            for line in list(self._lines.values()):
                if line.is_idle():
                    await line.close()

    def line(self, host: int) -> _Line:
        if host not in self._lines:
            self._lines[host] = _Line(self, host)
        return self._lines[host]

    def spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task that ends with the keeper, whether or not somebody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    # Its clients

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while True:
                header, size = wire.parse(await reader.readuntil(b"\n"))
                payload = await reader.readexactly(size)
                number = header.get("id")
                answer, more = await self._answer(header, payload)
                writer.write(wire.pack({**answer, "id": number}, more))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # it went away, or spoke nonsense: WireError is one of these
        except asyncio.CancelledError:
            if self._stop is None or not self._stop.is_set():
                raise
        finally:
            writer.close()

    async def _answer(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        arguments = {key: value for key, value in header.items() if key not in ("id", "size")}
        header.clear()  # a password among the arguments is to be held by whoever uses it, and by nothing else
        host, op, timeout = arguments.pop("host", None), str(arguments.pop("op", "")), arguments.pop("timeout", 60)
        try:
            async with asyncio.timeout(float(timeout)):
                if op.startswith("keeper."):
                    return {"ok": await self._own(self.line(host), op, arguments)}, b""
                answer, more = await self.line(host).ask(op, arguments, payload)
                return _checked(answer), more
        except HostProblem as problem:
            return _told(problem), b""
        except TimeoutError:
            sentence = f"The host has not answered within {float(timeout):.0f} s; it is tried again."
            return _told(HostProblem(Host.Problem.UNREACHABLE, sentence)), b""
        except DatabaseError:
            sentence = "The site's database does not answer at the moment; it is tried again."
            return _told(HostProblem(Host.Problem.UNREACHABLE, sentence)), b""
        except Exception:
            log.exception("the keeper could not do %s for host %s", op, host)
            return {
                "error": {"type": "OSError", "message": "The site's collector met an error; its log says which."}
            }, b""

    async def _own(self, line: _Line, op: str, arguments: dict[str, Any]) -> Any:
        match op:
            case "keeper.scan":
                return await line.scan()
            case "keeper.connect":
                session = await line.session(urgent=True)
                return {"seconds": session.seconds, "banner": session.banner}
            case "keeper.install_key":
                await line.install_key(str(arguments.pop("password", "")))
                return {}
            case "keeper.exec":
                return await line.execute([str(part) for part in arguments["argv"]])
            case "keeper.ping":
                began = time.monotonic()
                await line.ask("hello", {})
                return {"seconds": time.monotonic() - began}
            case "keeper.close":
                await line.close()
                return {}
        raise HostProblem(Host.Problem.UNUSABLE, "The site's collector is of another version; restart it.")

    def count_look(self, owner: int | None) -> None:
        """Whoever adds machines must not use this site to look through a network."""
        looks, now = self._looks[owner], time.monotonic()
        while looks and looks[0] < now - 60:
            looks.popleft()
        if len(looks) >= MOST_LOOKS:
            raise HostProblem(
                Host.Problem.UNREACHABLE, f"{MOST_LOOKS} looks at machines a minute are allowed; wait a little."
            )
        looks.append(now)

    def note(self, host: int, write: Callable[[], Any]) -> None:
        """Write to a host's row, after what was to be written before. What cannot be written is not missed."""

        def written() -> None:
            try:
                write()
            except DatabaseError as error:
                log.warning("how host %s was seen could not be noted (%s)", host, type(error).__name__)
            finally:
                connections.close_all()

        if self._loop is not None:
            self._loop.run_in_executor(self._writer, written)


class _Tries(Generic[_T]):
    """One try at a time, whose outcome all share; after one that failed, a pause."""

    def __init__(self, keeper: Keeper, what: Callable[[bool], Coroutine[Any, Any, _T]]) -> None:
        self._keeper = keeper
        self._what = what
        self._task: asyncio.Task[_T] | None = None
        self._problem: HostProblem | None = None
        self._pause = 0.0
        self._again = 0.0

    async def result(self, *, urgent: bool = False) -> _T:
        if self._task is None:
            if self._problem is not None and not urgent and time.monotonic() < self._again:
                raise HostProblem(self._problem.kind, self._problem.message)
            self._task = self._keeper.spawn(self._try(urgent))
        task = self._task
        try:
            return await asyncio.shield(task)  # whoever asked first may go away meanwhile; the others still wait
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise HostProblem(
                Host.Problem.UNREACHABLE, "What is known of the host was changed meanwhile; it is tried again."
            ) from None

    async def _try(self, urgent: bool) -> _T:
        try:
            value = await self._what(urgent)
        except HostProblem as problem:
            refused = problem.kind == Host.Problem.LOGIN_REFUSED
            longest = PAUSE_AFTER_REFUSAL if refused else LONGEST_PAUSE
            self._pause = min(longest, max(FIRST_PAUSE, 2 * self._pause))
            self._again = time.monotonic() + self._pause * random.uniform(0.5, 1.0)  # noqa: S311
            self._problem = problem
            raise
        else:
            self.forget()
            return value
        finally:
            self._task = None

    def forget(self) -> None:
        """Try at once when next asked."""
        self._problem, self._pause = None, 0.0

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class _Line:
    """What there is to one host: perhaps a connection, perhaps a relay on it, or why not."""

    def __init__(self, keeper: Keeper, pk: int) -> None:
        self._keeper = keeper
        self._pk = pk
        self._session: Session | None = None
        self._relay: Relay | None = None
        self._logins = _Tries(keeper, self._log_in)
        self._starts = _Tries(keeper, self._start_relay)
        self._changed: tuple[str, str] | None = None  # the pinned key that the host did not show, and what was said
        self._asking = 0
        self._used = time.monotonic()
        self._seen = 0.0
        self._lost: Any = None
        self._commands = asyncio.Semaphore(MOST_COMMANDS)

    # What is asked

    async def ask(self, op: str, arguments: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        with self._in_use():
            relay = self._relay
            if relay is None or not relay.is_open:
                relay = await self._starts.result()
            answer = await relay.ask(op, arguments, payload)
        if time.monotonic() - self._seen >= SEEN_EVERY:
            self._note_seen()
        return answer

    async def session(self, *, urgent: bool = False) -> Session:
        if self._session is not None:
            return self._session
        if urgent:
            self._keeper.count_look((await _read(self._pk)).owner)
        return await self._logins.result(urgent=urgent)

    async def scan(self) -> dict[str, Any]:
        place = await _read(self._pk)
        self._keeper.count_look(place.owner)
        async with self._way(place, urgent=True) as via:
            began = time.monotonic()
            key = await link.scan(place, via)
        seconds = time.monotonic() - began
        return {"key": key, "fingerprint": credentials.fingerprint(key), "seconds": seconds}

    async def install_key(self, password: str) -> None:
        place = await _read(self._pk)
        self._keeper.count_look(place.owner)
        if not password:
            raise HostProblem(Host.Problem.LOGIN_REFUSED, "No password was given.")
        script = await _in_thread(lambda: _install_script(_row(self._pk)))
        async with self._way(place, urgent=True) as via:
            session = await self._noting(link.log_in(place, via, password=password), place)
            try:
                await session.install_key(script)
            finally:
                session.close()
        self._logins.forget()
        self._starts.forget()

    async def execute(self, argv: list[str]) -> dict[str, Any]:
        with self._in_use():
            session = await self.session()
            async with self._commands:
                return await session.execute(argv)

    def is_idle(self) -> bool:
        open_for = time.monotonic() - self._used
        return self._session is not None and not self._asking and open_for > IDLE

    async def close(self) -> None:
        """Drop the connection, and what is known of earlier tries."""
        self._logins.cancel()
        self._starts.cancel()
        self._logins.forget()
        self._starts.forget()
        self._changed = None
        relay, self._relay = self._relay, None
        session, self._session = self._session, None
        if relay is not None:
            await relay.close()
        if session is not None:
            session.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await session.closed()
            session.abort()

    @contextlib.contextmanager
    def _in_use(self) -> Any:
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._used = time.monotonic()

    # How it comes to be

    async def _log_in(self, urgent: bool) -> Session:
        place = await _read(self._pk, with_key=True)
        if self._changed is not None and self._changed[0] == place.host_key and not urgent:
            raise HostProblem(Host.Problem.KEY_CHANGED, self._changed[1])  # without a packet sent
        ways = contextlib.AsyncExitStack()
        try:
            via = await ways.enter_async_context(self._way(place, urgent=urgent))
            session = await self._noting(link.log_in(place, via), place)
        except BaseException:
            await ways.aclose()
            raise
        self._session, self._changed, self._used = session, None, time.monotonic()
        self._starts.forget()
        self._keeper.spawn(self._watch(session, ways))
        problems = [Host.Problem.UNREACHABLE, Host.Problem.KEY_CHANGED, Host.Problem.LOGIN_REFUSED]
        self._note_cleared([*problems, Host.Problem.ADDRESS_REFUSED, ""])
        return session

    async def _start_relay(self, urgent: bool) -> Relay:
        session = await self.session()
        try:
            digest, archive = await asyncio.to_thread(package.archive)
            relay = await session.begin_relay(digest, archive)
        except HostProblem as problem:
            if problem.kind == Host.Problem.UNREACHABLE:
                session.abort()  # half dead
            else:
                self._note_problem(problem)
            raise
        self._relay = relay
        self._note_cleared(None)
        return relay

    @contextlib.asynccontextmanager
    async def _way(self, place: Place, *, urgent: bool) -> Any:
        """The jump host's session, kept open meanwhile; None where there is no jump host."""
        if place.jump is None:
            yield None
            return
        jump = self._keeper.line(place.jump)
        with jump._in_use():
            try:
                via = await asyncio.wait_for(jump.session(urgent=urgent), 2 * link.LOGIN_TIMEOUT)
            except (HostProblem, TimeoutError) as problem:
                why = (
                    problem.message
                    if isinstance(problem, HostProblem)
                    else "it does not answer in time, or leads back to this host."
                )
                raise HostProblem(
                    Host.Problem.UNREACHABLE, f"{place} is reached through a jump host, which is not reached: {why}"
                ) from None
            yield via

    async def _watch(self, session: Session, ways: contextlib.AsyncExitStack) -> None:
        """Forget a connection that has ended."""
        try:
            await session.closed()
            if self._session is session:
                self._session, self._lost = None, timezone.now()
        finally:
            await ways.aclose()

    # What is noted of it

    async def _noting(self, login: Awaitable[Session], place: Place) -> Session:
        try:
            return await login
        except KeyChanged as problem:
            self._changed = place.host_key, problem.message
            self._note_problem(problem, seen_key=problem.seen)
            raise
        except HostProblem as problem:
            self._note_problem(problem)
            raise

    def _note_problem(self, problem: HostProblem, **more: Any) -> None:
        pk, since = self._pk, self._lost or timezone.now()
        fields = {"problem": problem.kind, "problem_text": problem.message[:500], **more}

        def write() -> None:
            first = Coalesce("unreachable_since", Value(since))
            Host.objects.filter(pk=pk).update(**fields, unreachable_since=first)

        self._keeper.note(pk, write)

    def _note_cleared(self, problems: list[str] | None) -> None:
        """It works again, as far as these problems go."""
        pk, now = self._pk, timezone.now()
        self._lost, self._seen = None, time.monotonic()

        def write() -> None:
            Host.objects.filter(pk=pk).update(last_seen=now)
            standing = Host.objects.filter(pk=pk)
            if problems is not None:
                standing = standing.filter(problem__in=problems)
            standing.update(problem="", problem_text="", unreachable_since=None)

        self._keeper.note(pk, write)

    def _note_seen(self) -> None:
        pk, now = self._pk, timezone.now()
        self._seen = time.monotonic()
        self._keeper.note(pk, lambda: Host.objects.filter(pk=pk).update(last_seen=now))


# Rows -----------------------------------------------------------------------------------------------------------------


async def _in_thread(read: Callable[[], _T]) -> _T:
    def closing() -> _T:
        try:
            return read()
        finally:
            connections.close_all()

    return await asyncio.to_thread(closing)


def _row(pk: int) -> Host:
    host: Host | None = Host.objects.filter(pk=pk, kind=Host.Kind.SSH).first()
    if host is None:
        raise HostProblem(Host.Problem.UNUSABLE, "This host has been deleted.")
    return host


async def _read(pk: int, *, with_key: bool = False) -> Place:
    return await _in_thread(lambda: _place(_row(pk), with_key))


def _place(host: Host, with_key: bool) -> Place:
    return Place(
        pk=host.pk,
        name=host.name,
        address=host.address,
        port=host.port,
        username=host.username,
        folder=host.folder,
        python=host.env_python or host.python,
        before=host.before,
        host_key=host.host_key,
        jump=host.jump_id,
        owner=host.owner_id,
        key=_key(host) if with_key and host.private_key else None,
    )


def _key(host: Host) -> asyncssh.SSHKey:
    """The row's private key, opened. No exception from here holds anything of it."""
    try:
        return asyncssh.import_private_key(host.private_key.reveal(host), host.passphrase.reveal(host) or None)
    except (credentials.Tampered, KeyRingError) as error:
        why = f"The stored key of {host.name} cannot be opened: {error}."
    except Exception as error:
        why = f"The stored key of {host.name} is no key that can be used ({type(error).__name__}). Store it once more."
    raise HostProblem(Host.Problem.LOGIN_REFUSED, why) from None


def _install_script(host: Host) -> str:
    """Puts our line into authorized_keys, once, in the place of an older one with the same key."""
    if not host.public_key:
        raise HostProblem(Host.Problem.LOGIN_REFUSED, f"There is no key for {host.name} yet; make one first.")
    keys = "~/.ssh/authorized_keys"
    line, blob = shlex.quote(credentials.authorized_line(host)), shlex.quote(host.public_key.split()[1])
    return (
        f"grep -qxF {line} {keys} 2>/dev/null || {{ "
        f"if grep -qF {blob} {keys} 2>/dev/null; then {credentials.revoke_command(host)}; fi; "
        f"{credentials.install_command(host)}; }}"
    )


# Messages -------------------------------------------------------------------------------------------------------------


def _told(problem: HostProblem) -> dict[str, Any]:
    return {"error": {"type": "HostProblem", "kind": str(problem.kind), "message": problem.message}}


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """A host's answer as it may be handed on: an error of a host's is a file that is not there, not one of ours."""
    error = answer.get("error")
    if error is None:
        return {"ok": answers.plain(answer.get("ok"))}
    error = error if isinstance(error, dict) else {}
    kind, number = error.get("type"), error.get("errno")
    return {
        "error": {
            "type": kind if kind in _ERRORS or kind == "ValueError" else "OSError",
            "errno": number if isinstance(number, int) and 0 < number < 200 else None,
            "message": link.cut(str(error.get("message", "")), 500),
        }
    }


def _own_socket_path() -> Path:
    """The socket's path, in a folder that is ours alone, where nobody listens."""
    path: Path = settings.KEEPER_SOCKET
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = path.parent.lstat()
    if not stat.S_ISDIR(kept.st_mode) or kept.st_uid != os.getuid():
        raise RuntimeError(f"{path.parent} belongs to somebody else; remove it, or set KANGAROO_VAR to a shorter path.")
    os.chmod(path.parent, 0o700)  # whoever can ask the keeper can train on every host
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return path
    raise RuntimeError(f"Another collector runs already: it listens at {path}.")
