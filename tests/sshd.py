"""A real OpenSSH server for tests, on loopback: its own configuration, host key and user, nothing left at the end.

    def test_it(sshd, keeper, owner):
        host = sshd.host(owner)          a row with a confirmed key and a credential that logs in
        call(host.pk, "hello")

Run by root (as in containers and CI) it logs in a user of its own, who exists for the tests alone and has a password.
Otherwise it logs in whoever runs the tests, by key alone: sshd can only check the passwords of others as root.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from accounts.models import User
from experiments import credentials
from experiments.models import Host
from experiments.transport import client
from experiments.transport.keeper import Keeper
from tests.live import FAKE_TRAINER, children, eventually

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:" + os.environ.get("PATH", ""))
AS_ROOT = os.geteuid() == 0
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")


class Login:
    """Somebody who may log in, and their home."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.home = base / "home"
        self.password = secrets.token_urlsafe(12) if AS_ROOT else ""
        self.name = f"kangaroo-test-{_WORKER}".strip("-")[:31] if AS_ROOT else pwd.getpwuid(os.geteuid()).pw_name
        if AS_ROOT:
            self.remove()
            command = ["useradd", "--system", "--home-dir", str(self.home), "--shell", "/bin/bash", self.name]
            # Another process of the tests may hold the file of users.
            eventually(lambda: subprocess.run(command, capture_output=True).returncode == 0, what="for useradd")
            subprocess.run(["chpasswd"], input=f"{self.name}:{self.password}\n", text=True, check=True)
        self.uid, self.gid = pwd.getpwnam(self.name)[2:4]
        self.clear()

    def clear(self) -> None:
        """A new home, and nothing that still runs."""
        self.end_processes()
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(mode=0o700)
        self.own(self.home)

    def own(self, *paths: Path) -> None:
        if AS_ROOT:
            for path in paths:
                os.chown(path, self.uid, self.gid)

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """A file in the home, of the user's own."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        path.chmod(mode)
        self.own(path.parent, path)
        return path

    def shell(self, program: str) -> None:
        subprocess.run(["usermod", "--shell", program, self.name], check=True, capture_output=True)

    def processes(self) -> list[int]:
        """All that the user runs; where that is also us, what runs in the home."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if entry.stat().st_uid != self.uid:
                    continue
                if AS_ROOT or os.readlink(entry / "cwd").startswith(str(self.home)):
                    found.append(int(entry.name))
        return found

    def end_processes(self) -> None:
        def none_left() -> bool:
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not [pid for pid in left if not _is_zombie(pid)]

        eventually(none_left, what="for the end of what runs on the host")

    def remove(self) -> None:
        with contextlib.suppress(KeyError):
            self.uid = pwd.getpwnam(self.name).pw_uid
            self.end_processes()
            subprocess.run(["userdel", "--force", self.name], check=False, capture_output=True)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class Sshd:
    """A server, and its user's home as a host's disk."""

    def __init__(self, login: Login, folder: Path) -> None:
        self.login = login
        self.folder = folder
        self.python = sys.executable
        self.authorized = folder / "authorized_keys"  # beside ~/.ssh/authorized_keys, which a test may fill itself
        self.authorized.write_text("")
        self.authorized.chmod(0o644)
        self.options: dict[str, str] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.server: subprocess.Popen[bytes] | None = None
        self.new_host_key()

    # The server

    def start(self, **options: str) -> None:
        """Start it, anew if it runs, with more lines in its configuration: start(MaxSessions="2")."""
        self.stop()
        self.options |= options
        config = {
            "Port": str(self.port),
            "ListenAddress": "127.0.0.1",
            "HostKey": str(self.folder / "host_key"),
            "PidFile": "none",
            "AuthorizedKeysFile": f"{self.authorized} .ssh/authorized_keys",
            "PasswordAuthentication": "yes" if AS_ROOT else "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PrintMotd": "no",
            "LogLevel": "VERBOSE",
            **self.options,
        }
        path = self.folder / "sshd_config"
        path.write_text("".join(f"{name} {value}\n" for name, value in config.items()))
        if AS_ROOT:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it separates its privileges
        with open(self.folder / "sshd.log", "ab") as log:
            self.server = subprocess.Popen(
                [str(SSHD), "-D", "-e", "-f", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        eventually(self.listens, what="for sshd")

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.server is not None:
            self.resume()
            self.cut()
            self.server.kill()
            self.server.wait()
            self.server = None

    def connections(self) -> list[int]:
        """A process for each connection."""
        return children(self.server.pid) if self.server else []

    def _all(self) -> list[int]:
        """The server and everything that it has begun, the user's shells and relays among it."""
        found = [self.server.pid] if self.server else []
        for pid in found:
            with contextlib.suppress(OSError):
                found += children(pid)
        return found

    def cut(self) -> None:
        """Break every connection."""
        for pid in self._all()[1:]:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/exe").endswith("sshd"):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self) -> None:
        """Swallow everything and answer nothing, as a machine does whose network has gone."""
        for pid in self._all():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in reversed(self._all()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    # Keys

    def new_host_key(self) -> None:
        """Another host key; a running server shows it after `start`."""
        key = self.folder / "host_key"
        for path in (key, key.with_suffix(".pub")):
            path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self.host_key = " ".join(key.with_suffix(".pub").read_text().split()[:2])

    def authorize(self, host: Host) -> None:
        with self.authorized.open("a") as file:
            file.write(credentials.authorized_line(host) + "\n")

    def revoke_all(self) -> None:
        self.authorized.write_text("")

    # Rows

    def host(self, owner: User | None, *, authorized: bool = True, **fields: Any) -> Host:
        """A row with the confirmed host key and a generated credential, which logs in if `authorized`."""
        private, public = credentials.new_pair("kangaroo")
        host: Host = Host(
            **{
                "name": f"gpu{Host.objects.count()}",
                "kind": Host.Kind.SSH,
                "owner": owner,
                "address": "127.0.0.1",
                "port": self.port,
                "username": self.login.name,
                "credential": Host.Credential.GENERATED,
                "public_key": public,
                "host_key": self.host_key,
                "folder": "kangaroo" if AS_ROOT else str(self.root),  # not in the home of whoever runs the tests
                "env_python": self.python,
                "before": self.lines(),
                **fields,
            }
        )
        host.private_key = private
        host.save()
        if authorized:
            self.authorize(host)
        return host

    def lines(self, **env: str) -> str:
        """Lines to run before: the fake trainer in the real one's place, and more variables."""
        trainer = self.login.home / "fake_trainer.py"
        if not trainer.exists():
            shutil.copy(FAKE_TRAINER, trainer)
            self.login.own(trainer)
        given = {"KANGAROO_TRAINER": str(trainer), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
        return "\n".join(f"export {name}='{value}'" for name, value in given.items())

    def fake_gpus(self, output: str) -> str:
        """A line to run before that puts an `nvidia-smi` onto PATH which prints `output`, whatever it is asked."""
        self.login.write("bin/nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n", 0o755)
        return f'export PATH="{self.login.home}/bin:$PATH"'

    # Its disk

    @property
    def root(self) -> Path:
        """The working folder of a host that says nothing else."""
        return self.login.home / "kangaroo"

    @contextlib.contextmanager
    def small_disk(self, size: str = "1m") -> Iterator[Path]:
        """A folder in the home on a disk of its own that is soon full."""
        if not AS_ROOT:
            pytest.skip("a small disk can only be mounted by root")
        folder = self.login.home / "small"
        folder.mkdir()
        options = f"size={size},uid={self.login.uid},gid={self.login.gid},mode=0700"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
        try:
            yield folder
        finally:
            self.login.end_processes()
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


# A Python that the user can run, with all that this one has ---------------------------------------------------------


def _can_run(login: Login, python: str) -> bool:
    if not AS_ROOT:
        return True
    code = (
        "import importlib.util, sys; sys.exit(not (importlib.util.find_spec('torch') and sys.version_info >= (3, 11)))"
    )
    tried = subprocess.run(
        [python, "-c", code], user=login.uid, group=login.gid, extra_groups=[], cwd="/", env={}, capture_output=True
    )
    return tried.returncode == 0


def _python_for(login: Login) -> str:
    """The interpreter of the tests, or, where the user may not go there (a Python below /root), a copy of it.

    Packages are not copied: the folder they are in must be open to the user, or the tests that log in are skipped.
    """
    with contextlib.suppress(PermissionError):
        if _can_run(login, sys.executable):
            return sys.executable
    copy = (
        Path(tempfile.gettempdir()) / f"kangaroo-tests-python-{os.getuid()}-{sys.version_info[0]}{sys.version_info[1]}"
    )
    copy.mkdir(mode=0o755, exist_ok=True)
    python = copy / "bin" / "python3"
    with open(copy / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not python.exists():
            _copy_python(copy)
            python.symlink_to(Path(sys.executable).resolve().name)
    packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (copy / "lib" / f"python3.{sys.version_info[1]}" / "site-packages" / "tests.pth").write_text(f"{packages}\n")
    if not _can_run(login, str(python)):
        pytest.skip(
            f"{login.name} can run no Python with torch: neither {sys.executable} nor {packages} is open to others"
        )
    return str(python)


def _copy_python(to: Path) -> None:
    name = f"python3.{sys.version_info[1]}"
    base = Path(sys.base_prefix)
    unneeded = shutil.ignore_patterns("test", "site-packages", "idlelib", "tkinter", "lib2to3", "config-*", "ensurepip")
    shutil.copytree(base / "lib" / name, to / "lib" / name, symlinks=True, ignore=unneeded, dirs_exist_ok=True)
    (to / "lib" / name / "site-packages").mkdir(exist_ok=True)
    for library in (base / "lib").glob("libpython3*.so*"):
        shutil.copy(library, to / "lib")
    (to / "bin").mkdir(exist_ok=True)
    program = to / "bin" / Path(sys.executable).resolve().name
    shutil.copy(Path(sys.executable).resolve(), program)
    if list((to / "lib").glob("libpython3*.so*")):  # it was linked to look for its library where it was installed
        real = program.with_name(f"{program.name}.real")
        program.rename(real)
        program.write_text(f'#!/bin/bash\nLD_LIBRARY_PATH="{to}/lib" exec -a "$0" "{real}" "$@"\n')
        program.chmod(0o755)


# Fixtures -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Login]:
    if SSHD is None:
        pytest.skip("there is no sshd (Debian: openssh-server)")
    # Not below pytest's own folder, which is closed to others.
    base = Path(tempfile.mkdtemp(prefix="kangaroo-sshd-"))
    base.chmod(0o755)
    user = Login(base)
    yield user
    user.end_processes()
    if AS_ROOT:
        user.remove()
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def python_there(login: Login) -> str:
    return _python_for(login)


@pytest.fixture
def sshd(
    login: Login, python_there: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Sshd]:
    """The server, running; loopback is allowed, in this process and in those that a test starts."""
    allowed = ["public", "private", "loopback"]
    monkeypatch.setattr(settings, "HOSTS_ALLOW", allowed)
    monkeypatch.setenv("HOSTS_ALLOW", ",".join(allowed))
    login.clear()
    folder = Path(tempfile.mkdtemp(prefix="server-", dir=login.base))
    folder.chmod(0o755)
    server = Sshd(login, folder)
    server.python = python_there
    server.start()
    yield server
    server.stop()
    login.clear()
    if AS_ROOT:
        login.shell("/bin/bash")
    print(server.log()[-4000:])  # shown where the test has failed
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def keeper(transactional_db: None) -> Iterator[Keeper]:
    """A keeper in this process, as the collector has one."""
    running = Keeper()
    running.start()
    yield running
    client.hang_up()
    running.stop()


@pytest.fixture
def owner(transactional_db: None) -> User:
    return User.objects.create_user("owner@example.org", "correct horse battery")


__all__ = ["Login", "Sshd", "keeper", "login", "owner", "python_there", "sshd"]
