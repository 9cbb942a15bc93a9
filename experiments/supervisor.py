"""`manage.py up`: everything that the site consists of, started, kept alive, and ended together.

    broker      the embedded queue server, unless REDIS_URL names another
    worker 1..  as many as runs may train at once, one for what grows alone, and one for whatever is quick
    collector   holds the connections to GPU hosts, and follows what trains there
    reconciler  rings for what was forgotten
    web         gunicorn

What dies is started again, after a pause that grows while it keeps dying. The services end with the supervisor, even
when it is killed; training does not: it belongs to the agent of its run directory, and the next start attaches to it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from django.conf import settings

from experiments import broker
from trainer import agent

#: Seconds a service has to end by itself.
GRACE = 8.0
#: Seconds of life after which a service counts as sound again.
SOUND = 30.0
LONGEST_PAUSE = 30.0


class CannotStart(Exception):
    """Why the site cannot be started, and what to do about it, in a sentence or two."""


@dataclass
class Service:
    """One process of the site. `once`: it ends by itself, and is not started again."""

    name: str
    command: list[str]
    once: bool = False
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    due: float = 0.0  # when to start it (again)
    identity: dict[str, Any] = field(default_factory=dict)
    rest: bytes = b""  # of its output: a line not yet complete


def services(address: tuple[str, int], workers: int) -> list[Service]:
    """What the site consists of, in the order of starting. Raises :class:`broker.NoBroker`."""
    manage = [sys.executable, str(settings.BASE_DIR / "manage.py")]
    host, port = address
    web = [sys.executable, "-m", "gunicorn", "kangaroo_site.wsgi:application", "--no-control-socket"]
    web += ["--bind", f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "--worker-class", "gthread"]
    web += ["--workers", "2", "--threads", "8", "--graceful-timeout", "3", "--log-level", "warning"]
    if Path("/dev/shm").is_dir():  # noqa: S108  gunicorn's own advice: its heartbeat must not wait for a busy disk
        web += ["--worker-tmp-dir", "/dev/shm"]  # noqa: S108
    return [
        *([] if settings.REDIS_URL else [Service("broker", broker.command())]),
        *(Service(f"worker {n}", [*manage, "work"]) for n in range(1, workers + 1)),
        Service("collector", [*manage, "collect"]),
        Service("reconciler", [*manage, "reconcile", "--every", "5"]),
        Service("web", web),
    ]


class Supervisor:
    """Runs services until it is told to end (SIGINT, SIGTERM, or SIGHUP: its terminal is gone)."""

    def __init__(self, services: list[Service], out: IO[str]) -> None:
        self.services = services
        self.out = out
        self.ending = 0  # how often we were asked
        self.selector = selectors.DefaultSelector()
        self.width = max(len(service.name) for service in services)

    def run(self, ready: Callable[[], bool], on_ready: Callable[[Supervisor], None]) -> None:
        """Until told to end. `on_ready` is called once, as soon as `ready` holds."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks of us
                signal.signal(number, self._ask)
        look = 0.0  # when to look whether the site answers; for ever later once it does
        try:
            while not self.ending:
                for service in self.services:
                    self._keep(service)
                if time.monotonic() >= look:
                    look = time.monotonic() + 0.3
                    if ready():
                        look = float("inf")
                        on_ready(self)
                self._pass_on(0.2)
        finally:
            self._end()

    def add(self, service: Service) -> None:
        self.services.append(service)

    def _ask(self, *_: Any) -> None:
        self.ending += 1

    def _keep(self, service: Service) -> None:
        """Start what should run and does not."""
        now = time.monotonic()
        if service.process is not None:
            code = service.process.poll()
            if code is None:
                if service.failures and now - service.started > SOUND:
                    service.failures = 0
                return
            self._pass_on(0)
            service.process = None
            if service.once:
                service.due = float("inf")
                return
            pause = min(0.5 * 2**service.failures, LONGEST_PAUSE)
            service.failures += 1
            service.due = now + pause
            how = f"signal {-code}" if code < 0 else f"code {code}"
            where = f" ({settings.BROKER_DIR / 'broker.log'} says why)" if service.name == "broker" else ""
            self.say(f"{service.name} ended with {how}{where}; starting it again in {pause:g} s")
        if now >= service.due:
            self._start(service)

    def _start(self, service: Service) -> None:
        service.process = subprocess.Popen(
            service.command,
            cwd=settings.BASE_DIR,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=None if service.once else subprocess.PIPE,  # what runs once has something to show
            stderr=None if service.once else subprocess.STDOUT,
            process_group=0,  # Ctrl-C on the terminal is for us; we end them in order
            preexec_fn=_end_with(os.getpid()),
        )
        service.started = time.monotonic()
        service.identity = agent.identity(service.process.pid)
        if service.process.stdout is not None:
            os.set_blocking(service.process.stdout.fileno(), False)
            self.selector.register(service.process.stdout, selectors.EVENT_READ, service)
        _children_file().write_text(json.dumps([s.identity for s in self.services if s.process is not None]))

    def _pass_on(self, timeout: float) -> None:
        """Their output, a line at a time, under their names."""
        if not self.selector.get_map():
            time.sleep(timeout)
            return
        for key, _ in self.selector.select(timeout):
            service, pipe = key.data, key.fileobj
            data = os.read(pipe.fileno(), 65_536)  # type: ignore[union-attr]
            if not data:
                self.selector.unregister(pipe)
                pipe.close()  # type: ignore[union-attr]
            *lines, service.rest = (service.rest + data).split(b"\n") if data else (service.rest, b"")
            for line in lines:
                if text := line.decode("utf-8", "replace").rstrip():
                    self.say(f"{service.name:<{self.width}} | {text}")

    def say(self, text: str) -> None:
        # On a terminal a progress bar may stand in the line.
        clear = "\r\x1b[K" if self.out.isatty() else ""
        try:
            self.out.write(f"{clear}{text}\n")
            self.out.flush()
        except OSError:
            pass  # nobody reads any more; that is no reason to end

    def _end(self) -> None:
        """In the reverse order, the broker last: workers put their jobs back first."""
        asked = self.ending
        for services in (
            [s for s in self.services if s.name != "broker"][::-1],
            [s for s in self.services if s.name == "broker"],
        ):
            living = [s for s in services if s.process is not None and s.process.poll() is None]
            for service in living:
                _signal(service, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
            while any(s.process and s.process.poll() is None for s in living):
                if time.monotonic() > deadline or self.ending > asked:  # asked again: at once
                    for service in living:
                        _signal(service, signal.SIGKILL)
                self._pass_on(0.05)
        self._pass_on(0)
        _children_file().unlink(missing_ok=True)


def _signal(service: Service, number: int) -> None:
    assert service.process is not None
    if service.process.poll() is None:
        # Only gunicorn's master is told to end; its workers are its own. Killing takes the whole group.
        if number == signal.SIGKILL:
            os.killpg(service.process.pid, number)
        else:
            service.process.send_signal(number)


def _end_with(parent: int) -> Callable[[], None]:
    """What a child does before it begins: it asks the kernel (Linux) for a SIGTERM when the supervisor dies."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def ask() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return ask


# Before the start -----------------------------------------------------------------------------------------------------


def _children_file() -> Path:
    return Path(settings.VAR / "up.json")


def take_lock() -> IO[str]:
    """One supervisor a folder; held until the returned file is closed. Raises :class:`CannotStart`."""
    lock = open(settings.VAR / "up.lock", "a+")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise CannotStart(
            f"Kangaroo already runs in {settings.VAR} ({lock.read().strip() or 'just starting'}). End it there with "
            "Ctrl-C, or set KANGAROO_VAR to another folder to run a second one."
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    return lock


def end_leftovers() -> int:
    """End services of a supervisor that was killed, where they did not end with it. Returns how many there were."""
    try:
        left = [who for who in json.loads(_children_file().read_text()) if agent.is_alive(who)]
    except (OSError, ValueError):
        return 0
    for who in left:
        os.kill(who["pid"], signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while any(agent.is_alive(who) for who in left):
        if time.monotonic() > deadline:
            for who in left:
                if agent.is_alive(who):
                    os.kill(who["pid"], signal.SIGKILL)
        time.sleep(0.05)
    return len(left)


def check_port(host: str, port: int) -> None:
    """Raises :class:`CannotStart` where nothing can listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotStart(
                f"The site cannot listen on {host} port {port}: {error.strerror}. End what uses it, or choose another "
                f'port: make run ARGS="--port {port + 1}"'
            ) from None


def static_files_changed(remember: bool = False) -> bool:
    """Whether there are other static files than at the last collectstatic; `remember`: these are collected now."""
    from django.contrib.staticfiles.finders import get_finders

    digest = hashlib.sha256()
    for finder in get_finders():
        for path, storage in finder.list([]):
            info = os.stat(storage.path(path))
            digest.update(f"{path} {info.st_size} {info.st_mtime_ns}\n".encode())
    stamp = settings.STATIC_ROOT / ".collected"
    if remember:
        stamp.write_text(digest.hexdigest())
    return not stamp.exists() or stamp.read_text() != digest.hexdigest()


def answers(host: str, port: int) -> bool:
    """Whether the site answers there, whatever it says."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    web = http.client.HTTPConnection(reached, port, timeout=2)
    try:
        web.request("GET", "/docs/", headers={"Host": "localhost"})
        web.getresponse()
        return True
    except (OSError, http.client.HTTPException):
        return False
    finally:
        web.close()
