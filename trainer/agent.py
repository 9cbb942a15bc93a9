"""Start, watch and stop a detached training process in its run directory, on whatever machine this file is run.

    agent start DIR --attempt N    start the trainer of DIR unless it is alive, or this attempt has already ended
    agent status DIR               is it alive, and if not, how did it end
    agent stop DIR --grace S       ask it to write a checkpoint and leave; after S seconds it is killed
    agent tail DIR OFFSET          stream DIR/events.jsonl from a byte offset until the process has ended

Standard library only, so that it runs under any Python from 3.9 on any host. Each command prints a sentinel line first:
whatever a login shell has printed before it is not ours.

The trainer belongs to nobody who may die. `start` leaves a small supervisor behind in a session of its own, which runs
the trainer in another, waits for it and writes how it ended. Both hold a lock on the run directory for as long as they
live, so a trainer whose supervisor was killed still cannot be started a second time. What the agent keeps there:

    run.lock      held by supervisor and trainer; touched every few seconds as a sign of life
    process.json  who they are: pid, start time, boot id (a pid alone may be somebody else's by now), attempt, command
    exit.json     how the attempt ended: code or signal, time, the last lines of the log, and whether memory ran out
    stop          a wish to stop: since when, and how many seconds until force
    log.txt       what the trainer printed
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SENTINEL = "== kangaroo agent 1 =="
ROOT = Path(__file__).resolve().parent.parent
#: Seconds a stopping trainer has for its checkpoint before it is killed.
GRACE = 60.0
#: Bytes of events read at a time.
CHUNK = 256 * 1024
_LOG_LINES = 20
#: A lock that was not touched for so many seconds has lost the supervisor that touches it.
_SIGN_OF_LIFE = 120.0
#: A disk with fewer bytes left is full.
_FULL = 1 << 20
#: In the environment of all that a trainer starts: its run directory. Who leaves its process group is found by it.
_MARK = "KANGAROO_RUN"
#: In an experiment's directory whose removal has begun.
_REMOVED = ".removed"


# Who is who: a pid means something only with its start time and the boot it belongs to --------------------------------


def boot_id() -> str:
    """Changes whenever the machine starts, or the container, whose processes all end with it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return _output("sysctl", "-n", "kern.boottime")


def started_at(pid: int) -> str | None:
    """When process `pid` started, as its kernel says it; None if there is none, or only its zombie."""
    if Path("/proc/self/stat").exists():
        try:
            # The second field is the command's name in parentheses and may itself hold spaces and parentheses.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    line = _output("ps", "-o", "stat=,lstart=", "-p", str(pid)).split(None, 1)
    return None if len(line) < 2 or line[0].startswith("Z") else line[1]


def identity(pid: int) -> dict[str, Any]:
    return {"pid": pid, "started": started_at(pid)}


def is_alive(who: Mapping[str, Any] | None) -> bool:
    """Whether the very process of an :func:`identity` still runs."""
    return who is not None and who["started"] is not None and started_at(who["pid"]) == who["started"]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


# Start ----------------------------------------------------------------------------------------------------------------


def start(
    directory: str | Path,
    attempt: int,
    *,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    launcher: Sequence[str] = (),
) -> str:
    """Start the trainer of `directory`; safe to call any number of times, from anywhere, at once.

    `command` is run in its place, where given, and watched and recorded in the same way. `launcher` is a command that
    runs the supervisor's, which it gets as its arguments.

    Returns "started"; "already" if a trainer is alive there (of this attempt or of an earlier one); "finished" if this
    attempt has ended. An attempt whose machine was started anew meanwhile is simply started again: it goes on from its
    checkpoint. Raises OSError if the directory cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not _locked(lock):
            if status(directory)["alive"]:
                return "already"
            time.sleep(0.05)  # another start, or an end, is under way; both are quick
        known = status(directory)
        if known["alive"]:
            return "already"
        if known["attempt"] == attempt and known["exit"] and not known["exit"].get("rebooted"):
            if known["exit"].get("lost"):
                _write(directory / "exit.json", known["exit"])  # so that nobody needs to conclude it again
            return "finished"
        _kill_strays(directory)
        for stale in ("stop", "exit.json", "process.json"):
            with contextlib.suppress(FileNotFoundError):
                (directory / stale).unlink()
        env = {**(os.environ if env is None else env), "KANGAROO_ATTEMPT": str(attempt)}
        env.pop(_MARK, None)  # of the run that has started this one
        if threads:
            env["KANGAROO_THREADS"] = str(threads)
        _leave_supervisor(directory, attempt, lock, env, command, launcher)
        return "started"
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave_supervisor(
    directory: Path,
    attempt: int,
    lock: int,
    env: Mapping[str, str],
    command: Sequence[str] | None,
    launcher: Sequence[str],
) -> None:
    # A fresh interpreter rather than a fork of the caller: it holds none of the caller's memory, threads or
    # connections. It forks once more and so belongs to init; the pipe says when process.json stands.
    ready, told = os.pipe()
    try:
        supervisor = [*launcher, sys.executable, "-m", "trainer.agent", "supervise", str(directory.resolve())]
        supervisor += ["--attempt", str(attempt), "--lock", str(lock), "--ready", str(told)]
        supervisor += ["--instead", json.dumps(list(command))] if command is not None else []
        with open(directory / "log.txt", "ab") as log:
            subprocess.run(
                supervisor,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock, told),
                start_new_session=True,
                check=False,
            )
        os.close(told)
        told = -1
        answer = os.read(ready, 16)
        if answer.isdigit():
            raise OSError(int(answer), os.strerror(int(answer)), str(directory))
        if answer != b"ready":
            raise OSError(f"the supervisor of {directory} ended at once; log.txt there says why")
    finally:
        os.close(ready)
        if told >= 0:
            os.close(told)


def _supervise(directory: Path, attempt: int, lock: int, ready: int, instead: list[str] | None) -> None:
    """Run the trainer, wait for it, write how it ended. Leads its own session; its parent is gone."""
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes = 1 if instead or os.environ.get("KANGAROO_TRAINER") else int(os.environ.get("KANGAROO_PROCESSES") or 1)
    command = instead if instead is not None else _command(directory, processes)
    record: dict[str, Any] = {
        "attempt": attempt,
        "boot_id": boot_id(),
        "hostname": os.uname().nodename,
        "command": command,
        "processes": processes,
        "at": time.time(),
        "supervisor": identity(os.getpid()),
        "trainer": None,
    }
    with _telling(ready):
        _write(directory / "process.json", record)
        room = _Room(directory)
    oom_kills = _oom_kills()
    try:
        trainer = subprocess.Popen(  # a session of its own, so that its whole group can be stopped
            command,
            cwd=ROOT,
            env={**os.environ, _MARK: str(directory)},
            stdin=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,
        )
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", flush=True)
        room.write("exit.json", _exit(directory, attempt, 127, False))
        os.write(ready, b"ready")
        return
    with contextlib.suppress(OSError):  # where memory runs out, what can be resumed goes before what serves the site
        Path(f"/proc/{trainer.pid}/oom_score_adj").write_text("500")
    record["trainer"] = identity(trainer.pid)
    with _telling(ready):
        try:
            _write(directory / "process.json", record)
        except OSError:
            _kill(directory, trainer.pid)
            raise
    os.write(ready, b"ready")
    os.close(ready)

    beats = 0
    while True:
        try:
            code = trainer.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            beats += 1
            _act_on_stop(directory, record)
            if beats % 10 == 0:
                os.utime(lock)
                oom_kills = _oom_kills()
    _kill(directory, trainer.pid)  # whatever it left behind
    # Of several processes it is one of the workers that the kernel kills, and torchrun that ends with a code.
    killed = code == -signal.SIGKILL or (processes > 1 and code != 0)
    room.write("exit.json", _exit(directory, attempt, code, killed and _oom_kills() > oom_kills))


@contextlib.contextmanager
def _telling(ready: int) -> Iterator[None]:
    """Tell whoever wanted the start what stands in its way: a full disk, most likely."""
    try:
        yield
    except OSError as error:
        os.write(ready, str(error.errno).encode())
        raise


def _command(directory: Path, processes: int) -> list[str]:
    if override := os.environ.get("KANGAROO_TRAINER"):  # tests put a quicker trainer in its place
        program = json.loads(override) if override.startswith("[") else [sys.executable, override]
    elif processes > 1:
        # The machine's own name may lead nowhere; and torchrun must not kill before the trainer had its time.
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(GRACE)))
        torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        torchrun += ["--nproc-per-node", str(processes)]
        program = [sys.executable, "-m", *torchrun, "-m", "trainer"]
    else:
        program = [sys.executable, "-m", "trainer"]
    spec, out = str(directory / "spec.json"), str(directory.parent)
    return [*program, "run", spec, "--out", out, "--only", directory.name, "--resume"]


class _Room:
    """Room on the disk for a few words to come: how a trainer ended must be told also where it has filled the disk."""

    _BYTES = 128 * 1024

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".room"
        self._path.write_bytes(bytes(self._BYTES))

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        with open(self._path, "r+b") as file:  # over the zeros, whose blocks it has
            file.write(json.dumps(value).encode())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._path, self._path.with_name(name))


def _exit(directory: Path, attempt: int, code: int, out_of_memory: bool) -> dict[str, Any]:
    log = last_lines(directory / "log.txt")
    disk = os.statvfs(directory)
    if code and disk.f_bavail * disk.f_frsize < _FULL and (full := os.strerror(errno.ENOSPC)) not in log:
        log += f"\n{full}: {directory}"  # where there is no room, there was none for the trainer's last words either
    return {
        "attempt": attempt,
        "code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "out_of_memory": out_of_memory,
        "at": time.time(),
        "log": log.lstrip("\n"),
    }


def last_lines(path: Path, count: int = _LOG_LINES) -> str:
    """The last `count` lines of a text file, "" if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16_384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    # A progress bar overwrites its line; only what it showed last counts.
    return "\n".join([line.rpartition("\r")[2] for line in text.rstrip().split("\n")][-count:])


def cores() -> int:
    """The cores this process may use: its affinity, and the quota of its control group where one is set."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return available
    return available if quota == "max" else max(1, min(available, int(quota) // int(period)))


def _oom_kills() -> int:
    """How often the kernel has killed a process for want of memory, in our cgroup or (without one) at all."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        group = Path("/proc/self/cgroup").read_text().split("0::", 1)[1].split("\n")[0].lstrip("/")
        return _counter(Path("/sys/fs/cgroup") / group / "memory.events")
    with contextlib.suppress(OSError, ValueError):
        return _counter(Path("/proc/vmstat"))
    return 0


def _counter(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    raise ValueError(f"{path} does not count oom_kill")


# Status ---------------------------------------------------------------------------------------------------------------


def status(directory: str | Path) -> dict[str, Any]:
    """What is known of a run directory's process.

    Returns attempt (0 if there was never one), alive, pid, at, and exit: None, or how that attempt ended. `exit` has
    `lost` where neither process is there any more and none could write how it ended, and `rebooted` if that is because
    the machine was started anew.
    """
    directory = Path(directory)
    process = _read(directory / "process.json")
    if process is None:
        return {"attempt": 0, "alive": False, "pid": None, "at": None, "exit": _read(directory / "exit.json")}
    same_boot = process["boot_id"] == boot_id()
    trainer, supervisor = process["trainer"], process["supervisor"]
    alive = same_boot and (is_alive(trainer) or is_alive(supervisor))
    # Read after looking who lives: the other way round, a process that ends in between would seem lost.
    ended = _read(directory / "exit.json")
    if ended and ended["attempt"] != process["attempt"]:
        ended = None
    if ended is None and not alive:
        ended = {"attempt": process["attempt"], "code": None, "signal": None, "out_of_memory": False, "lost": True}
        ended.update(rebooted=not same_boot, at=time.time(), log=last_lines(directory / "log.txt"))
    return {
        "attempt": process["attempt"],
        "alive": alive and ended is None,
        "pid": trainer and trainer["pid"],
        "at": process["at"],
        "exit": ended,
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # what else goes wrong says nothing of what was written
        return None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all, also through a loss of power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(temporary, "w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def belongs_elsewhere(directory: str | Path) -> bool:
    """Whether another machine, by a shared disk, trains in `directory`: only that one can tell and stop its process."""
    directory = Path(directory)
    process = _read(directory / "process.json")
    if process is None or process["hostname"] == os.uname().nodename or (directory / "exit.json").exists():
        return False
    with contextlib.suppress(OSError):
        return time.time() - (directory / "run.lock").stat().st_mtime < _SIGN_OF_LIFE
    return False


# Stop -----------------------------------------------------------------------------------------------------------------


def stop(directory: str | Path, grace: float = GRACE, *, wait: bool = False) -> bool:
    """Ask the trainer to write a checkpoint and leave; `grace` seconds after the first request it is killed.

    The request is a file that the supervisor acts on, so it is carried out whether or not the caller lives on. Where
    the supervisor is dead, each call does what is due. A shorter grace than the one asked for before takes its place.
    Returns whether the process is gone; `wait` waits for that.
    """
    directory = Path(directory)
    if not status(directory)["alive"]:
        return True
    asked = _read(directory / "stop")
    if asked is None or asked.get("grace", GRACE) > grace:
        try:
            _write(directory / "stop", {"at": asked["at"] if asked else time.time(), "grace": grace})
        except OSError:  # a full disk has room for a name, still
            (directory / "stop").touch()
    while True:
        process = _read(directory / "process.json")
        if process and grace <= 0 and is_alive(process["trainer"]):
            _kill(directory, process["trainer"]["pid"])
        elif process and not is_alive(process["supervisor"]):
            _act_on_stop(directory, process)
        gone = not status(directory)["alive"]
        if gone or not wait:
            return gone
        time.sleep(0.1)


def _act_on_stop(directory: Path, process: Mapping[str, Any]) -> None:
    path, trainer = directory / "stop", process["trainer"]
    if trainer is None or not path.exists() or not is_alive(trainer):
        return
    asked = _read(path) or {"at": path.stat().st_mtime, "grace": GRACE}
    waited, grace = time.time() - asked["at"], asked["grace"]
    # torchrun, at SIGTERM, gives its workers 30 s and then kills them in the middle of their checkpoint. All of them
    # heed the file, so where there are several, the signal comes late, for those that do not come to look at it.
    patience = max(grace / 2, grace - 30) if process.get("processes", 1) > 1 else 0
    with contextlib.suppress(OSError):  # gone meanwhile, or no room to write
        if waited >= grace:
            _kill(directory, trainer["pid"])
        elif waited >= patience and not asked.get("signalled"):
            os.killpg(trainer["pid"], signal.SIGTERM)
            _write(path, {**asked, "signalled": True})


def _kill(directory: Path, pid: int) -> None:
    """Kill a trainer, or what is left of it: its process group, and those that torchrun gave a session of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _kill_strays(directory)


def _kill_strays(directory: Path) -> None:
    mark = b"\0%s=%s\0" % (_MARK.encode(), os.fsencode(directory.resolve()))
    for _ in range(10):  # one that is being forked just now is seen the next time
        found = False
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                if mark in b"\0" + environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return
        time.sleep(0.01)


# Remove ---------------------------------------------------------------------------------------------------------------


def remove(experiment: str | Path) -> None:
    """Kill what still trains in an experiment's directory, and delete it; cut short, it can be taken up again."""
    experiment = Path(experiment)
    try:
        (experiment / _REMOVED).touch()
        runs = [path for path in experiment.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return
    if any(belongs_elsewhere(run) for run in runs):
        return  # its follower there does it, or whoever sweeps there
    deadline = time.monotonic() + 10
    while runs and time.monotonic() < deadline:
        for run in runs:
            # Not before all is dead: a kill takes a moment, and a supervisor still writes how its trainer ended.
            if stop(run, 0):
                shutil.rmtree(run, ignore_errors=True)
        runs = [run for run in runs if run.exists()]
        if runs:
            time.sleep(0.02)
    while experiment.exists():
        with contextlib.suppress(FileNotFoundError):  # somebody else removes it in the same moment
            shutil.rmtree(experiment)


def half_removed(experiments: str | Path) -> list[str]:
    """The names of the directories whose removal was begun and cut short."""
    return sorted(mark.parent.name for mark in Path(experiments).glob(f"*/{_REMOVED}"))


def disk_bytes(directory: str | Path) -> int:
    """What a directory takes on the disk."""
    total = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # an older checkpoint, deleted meanwhile
    return total


# Tail -----------------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A piece of the event stream: "D" lines from `offset`, "H" still alive, "E" ended and everything was read."""

    kind: str
    offset: int
    data: bytes = b""

    def encode(self) -> bytes:
        if self.kind == "D":
            return b"D %d %d\n%s" % (self.offset, len(self.data), self.data)
        return b"%s %d\n" % (self.kind.encode(), self.offset)


def tail(directory: str | Path, offset: int = 0, *, poll: float = 0.25, heartbeat: float = 5.0) -> Iterator[Frame]:
    """Frames of events.jsonl from byte `offset`, complete lines only, until the process has ended."""
    path = Path(directory) / "events.jsonl"
    last = time.monotonic()
    while True:
        # Alive before reading: the other way round, what it writes last would be lost.
        alive = status(directory)["alive"]
        data = _lines(path, offset)
        if data:
            yield Frame("D", offset, data)
            offset += len(data)
            last = time.monotonic()
        elif not alive:
            yield Frame("E", offset)
            return
        else:
            if time.monotonic() - last >= heartbeat:
                yield Frame("H", offset)
                last = time.monotonic()
            time.sleep(poll)


def _lines(path: Path, offset: int) -> bytes:
    """Complete lines from `offset`, about CHUNK bytes of them, at least one line if there is one."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = b""
            while b"\n" not in data:
                more = file.read(CHUNK)
                if not more:
                    return b""
                data += more
    except FileNotFoundError:
        return b""
    return data[: data.rindex(b"\n") + 1]


# Command line ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer agent", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("start", "status", "stop", "tail", "supervise"):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path)
        if name in ("start", "supervise"):
            command.add_argument("--attempt", type=int, default=1)
        if name == "start":
            command.add_argument("--threads", type=int)
        if name == "supervise":
            command.add_argument("--lock", type=int, required=True)
            command.add_argument("--ready", type=int, required=True)
            command.add_argument("--instead", type=json.loads)
        if name == "stop":
            command.add_argument("--grace", type=float, default=GRACE)
        if name == "tail":
            command.add_argument("offset", type=int, nargs="?", default=0)
    given = parser.parse_args(arguments)
    if given.command == "supervise":
        _supervise(given.directory, given.attempt, given.lock, given.ready, given.instead)
        return 0
    print(SENTINEL, flush=True)
    if given.command == "start":
        outcome = start(given.directory, given.attempt, threads=given.threads)
        print(json.dumps({"outcome": outcome, **status(given.directory)}))
    elif given.command == "status":
        print(json.dumps(status(given.directory)))
    elif given.command == "stop":
        print(json.dumps({"gone": stop(given.directory, given.grace, wait=True)}))
    else:
        for frame in tail(given.directory, given.offset):
            sys.stdout.buffer.write(frame.encode())
            sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
