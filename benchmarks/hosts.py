"""Training on a GPU host over SSH: latency, start, bytes moved, ingestion, transfers.

    python -m benchmarks hosts [--only latency --only submit --only bytes --only ingest --only transfer]

A real OpenSSH server on loopback with a user of its own (tests/sshd.py), and a site of its own in a temporary folder:
SQLite, broker, workers, reconciler, collector, gunicorn. What trains is a program that speaks the trainer's events and
computes nothing (tests/experiments/fake_trainer.py), except where it says "real trainer". Peers, in the same run: the
site's own way without SSH (a local run), and what OpenSSH's own clients do (`tail -F`, scp, sftp).

    latency    from the moment that an event names to its row in the database, as another process reads it, and to the
               answer of metrics.json to a page that asks two seconds after the last answer, as a browser does
    submit     from the submission to the trainer's first event and first step
    bytes      between site and sshd, counted by a proxy in front of sshd
    ingest     streams that were written beforehand appear all at once; events a second until the last one is a row
    transfer   a checkpoint of random bytes, from the wish to the file in its place with its digest checked; directly,
               and through a proxy that makes a round trip of 50 ms

Site, server, trainers and peers share this machine's cores. Takes about 15 minutes. Wants an sshd; run by root it adds
a user for the time being.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import queue
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import _machine, pages

ROOT = Path(__file__).resolve().parent.parent
TAKEN = ("latency", "submit", "bytes", "ingest", "transfer")

#: Does what the name of the experiment says: "pace 0.1" (seconds a step), "flood", "silent", "real".
TRAINER = """
import os, runpy, shutil, sys, time
from pathlib import Path
here = Path(__file__).parent
sys.path.insert(0, str(here))
import fake_trainer, json

spec, name = json.loads(Path(sys.argv[2]).read_text()), sys.argv[sys.argv.index("--only") + 1]
directory = Path(sys.argv[sys.argv.index("--out") + 1]) / name
what, _, pace = spec["name"].partition(" ")
if what == "real":
    os.execv(sys.executable, [sys.executable, "-m", "trainer", *sys.argv[1:]])
if what == "pace":
    fake_trainer.STEP_SECONDS, fake_trainer.CHECKPOINT_EVERY = float(pace), 100
    sys.exit(fake_trainer.run(spec, name, directory))
if what == "silent":
    emit = fake_trainer.Stream(directory / "events.jsonl")
    emit("started", attempt=1, pid=os.getpid(), hostname="fake", versions={})
    while not (directory / "stop").exists():
        time.sleep(0.2)
    emit("stopped", step=0, checkpoint=None)
if what == "flood":
    while not (here / "go").exists():
        time.sleep(0.02)
    shutil.copy(here / "stream.jsonl", directory / "events.part")
    os.rename(directory / "events.part", directory / "events.jsonl")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=TAKEN, help="one of the measurements; may be repeated")
    parser.add_argument("--seconds", type=float, default=40, help="that the runs of `latency` take")
    parser.add_argument("--runs", type=int, default=20, help="at once, where there are many")
    parser.add_argument("--repeats", type=int, default=5, help="of `submit`")
    parser.add_argument("--rounds", type=int, default=3, help="of `transfer`")
    parser.add_argument("--events", type=int, default=5000, help="of each run of `ingest`")
    parser.add_argument("--megabytes", type=int, default=200, help="of the checkpoint of `transfer`")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    measures = {"latency": latency, "submit": submit, "bytes": volume, "ingest": ingest, "transfer": transfer}
    with a_site(options.runs) as site:
        print(f"{_machine.line()}; {openssh()}")
        for name in options.only or TAKEN:
            with _machine.watch() as others:
                time.sleep(5)  # the site itself, idle, is among the others
            print(f"\n{name}: before it, {others.cores:.2f} cores were busy, load {os.getloadavg()[0]:.1f}\n")
            measures[name](site, options)


def openssh() -> str:
    return subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.split(",")[0]


# The site and its host ------------------------------------------------------------------------------------------------


class Site:
    """Processes of an installation, one host reached over SSH, and this machine."""

    def __init__(self, live: Any, sshd: Any, port: int, session: str) -> None:
        from django.conf import settings

        from experiments.models import Host

        self.live, self.sshd, self.port, self.session = live, sshd, port, session
        self.database = str(settings.DATABASES["default"]["NAME"])
        self.home = sshd.login.home / "bench"
        self.remote = sshd.host(None, slots=64, before=f"export KANGAROO_TRAINER='{self.home}/trainer.py'")
        Host.local()
        Host.objects.filter(kind=Host.Kind.LOCAL).update(slots=64)
        self.local = Host.local()

    def begin(self, host: Any, what: str, steps: int = 10, source: Path | None = None) -> Any:
        """Submit an experiment of one model; the row of its run."""
        from experiments import jobs
        from tests.live import a_spec
        from tests.trainer import texts

        if source is None:
            spec = a_spec(steps, ("small",), what)
        else:
            standard = texts.experiment(source, max_steps=steps)
            spec = standard.model_copy(update={"name": what, "models": {"small": standard.models["small"]}})
        return jobs.create(None, spec, host=host, is_public=True).runs.get()

    def wait(self, runs: Sequence[Any], true: Callable[[Any], bool], seconds: float = 150) -> None:
        from experiments.models import ModelRun

        def done() -> bool:
            return all(true(run) for run in ModelRun.objects.filter(pk__in=[run.pk for run in runs]))

        deadline = time.monotonic() + seconds
        while not done():
            self.check(deadline)
            time.sleep(0.1)

    def check(self, deadline: float) -> None:
        ended = [process.args for process in self.live.processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise SystemExit(f"{self.live.log()[-8000:]}\nWaited in vain. Ended meanwhile: {ended}")

    def ended(self, runs: Sequence[Any]) -> None:
        self.wait(runs, lambda run: run.state not in ("queued", "running"))

    def events(self, run: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.directory / "events.jsonl").read_bytes().splitlines()]

    def reach(self, **fields: Any) -> None:
        """Reach the host in another way from now on, on a new connection."""
        from experiments.models import Host
        from experiments.transport.client import call

        Host.objects.filter(pk=self.remote.pk).update(**fields)
        self.remote.refresh_from_db()
        call(self.remote.pk, "keeper.close")

    @contextlib.contextmanager
    def more_workers(self, count: int) -> Iterator[None]:
        """A worker follows one local run at a time."""
        before = len(self.live.processes)
        for _ in range(count):
            self.worker()
        time.sleep(1 + count)
        yield
        for process in self.live.processes[before:]:
            process.terminate()
        for process in self.live.processes[before:]:
            process.wait()
        del self.live.processes[before:]

    def worker(self) -> None:
        self.live.worker(KANGAROO_TRAINER=str(self.home / "trainer.py"))


@contextlib.contextmanager
def a_site(runs: int) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        var = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kangaroo-hosts-")))
        os.environ |= pages.migrated(var / "var") | {
            "HOSTS_ALLOW": "public,private,loopback",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTEST_XDIST_WORKER": "bench",  # part of the name of the user who is made
        }
        for name in ("DATABASE_URL", "REDIS_URL"):
            os.environ.pop(name, None)
        import django

        django.setup()
        from django.test import Client

        from tests import live, sshd
        from tests.experiments.factories import make_user

        if sshd.SSHD is None:
            raise SystemExit("There is no sshd here; Debian's package is openssh-server.")
        base = Path(tempfile.mkdtemp(prefix="kangaroo-sshd-"))
        base.chmod(0o755)
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        login = sshd.Login(base)
        stack.callback(login.remove if sshd.AS_ROOT else login.end_processes)
        server = sshd.Sshd(login, base)
        server.python = sshd._python_for(login)
        server.start(Subsystem="sftp internal-sftp")
        stack.callback(server.stop)
        login.write("bench/trainer.py", TRAINER)
        login.write("bench/fake_trainer.py", live.FAKE_TRAINER.read_text())

        broker = live.start_broker()
        stack.callback(broker.wait)
        stack.callback(broker.kill)
        stack.callback(live.end_trainers)
        (var / "logs").mkdir()
        processes = live.Live(var / "logs")
        stack.callback(processes.end)
        client = Client()
        client.force_login(make_user("bench@example.org"))
        _, port = stack.enter_context(pages.gunicorn(dict(os.environ)))
        pages.wait_for(port)
        site = Site(processes, server, port, client.cookies["sessionid"].value)
        for _ in range(4):
            site.worker()
        processes.reconciler()
        processes.start("collect")
        time.sleep(4)
        look_at(site)
        yield site


def look_at(site: Site) -> None:
    """The probe, as it comes before the first run."""
    from experiments.models import HostTask

    task = HostTask.objects.create(host=site.remote, kind=HostTask.Kind.PROBE)
    deadline = time.monotonic() + 120
    while task.is_active:
        site.check(deadline)
        time.sleep(0.2)
        task.refresh_from_db()
    if task.state != HostTask.State.SUCCEEDED:
        raise SystemExit(f"The probe failed: {task.steps}\n{site.live.log()[-4000:]}")
    site.remote.refresh_from_db()


def at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(len(values) * 0.95))]


# Watching -------------------------------------------------------------------------------------------------------------


class Rows(threading.Thread):
    """When which event of which run is in the database, looked at 500 times a second."""

    def __init__(self, site: Site, runs: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.site = site
        self.seen: dict[int, list[tuple[float, int]]] = {run.pk: [] for run in runs}
        self.leave = threading.Event()

    def run(self) -> None:
        database = sqlite3.connect(f"file:{self.site.database}?mode=ro", uri=True)
        chosen = ",".join(map(str, self.seen))
        known, version = dict.fromkeys(self.seen, -1), None
        while not self.leave.wait(0.002):
            (now_version,) = database.execute("PRAGMA data_version").fetchone()
            if now_version == version:
                continue
            version = now_version
            query = f"SELECT id, last_seq FROM experiments_modelrun WHERE id IN ({chosen})"
            rows, now = database.execute(query).fetchall(), time.time()
            for pk, seq in rows:
                if seq > known[pk]:
                    known[pk] = seq
                    self.seen[pk].append((now, seq))
        database.close()

    def when(self, run: Any, seq: int) -> float:
        return next(moment for moment, reached in self.seen[run.pk] if reached >= seq)


class Page(threading.Thread):
    """An experiment page that somebody has open: it asks for its curves two seconds after the last answer."""

    def __init__(self, site: Site, run: Any) -> None:
        super().__init__(daemon=True)
        self.site, self.path = site, f"{run.experiment.get_absolute_url()}metrics.json"
        self.seen: list[tuple[float, int]] = []
        self.leave = threading.Event()

    def run(self) -> None:
        headers = {"Cookie": f"sessionid={self.site.session}", "Host": "localhost"}
        connection, place = http.client.HTTPConnection("127.0.0.1", self.site.port, timeout=60), ""
        wait = random.uniform(0, 2)
        while not self.leave.wait(wait):
            wait = 2.0
            connection.request("GET", f"{self.path}?after={place}" if place else self.path, headers=headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
            place = answer["place"]
            self.seen.append((time.time(), answer["models"][0]["cost"]["step"]))
            connection.close()  # gunicorn keeps one for two seconds, and might close it in this very moment

    def when(self, step: int) -> float | None:
        return next((moment for moment, reached in self.seen if reached >= step), None)


class Openssh:
    """OpenSSH's own client, logging in with the same key, over one connection that is kept open."""

    def __init__(self, site: Site, port: int | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ssh-", dir=os.environ["KANGAROO_VAR"]))
        key = self.folder / "key"
        key.touch(0o600)
        key.write_text(site.remote.private_key.reveal(site.remote))
        port = port or site.sshd.port
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {site.sshd.host_key}\n")
        self.config = self.folder / "config"
        self.config.write_text(
            f"Host there\n HostName 127.0.0.1\n Port {port}\n User {site.sshd.login.name}\n IdentityFile {key}\n"
            f" IdentitiesOnly yes\n UserKnownHostsFile {self.folder}/known_hosts\n StrictHostKeyChecking yes\n"
            f" BatchMode yes\n ControlPath {self.folder}/control\n"
        )
        self.master = subprocess.Popen(["ssh", "-F", str(self.config), "-M", "-N", "there"], stdin=subprocess.DEVNULL)
        while not (self.folder / "control").exists():
            time.sleep(0.05)

    def close(self) -> None:
        self.master.terminate()
        self.master.wait()
        shutil.rmtree(self.folder)


class Tail(threading.Thread):
    """`ssh host tail -F` of some files: the floor. What it prints is read at once."""

    def __init__(self, client: Openssh, paths: Sequence[Path], lines: str = "0") -> None:
        super().__init__(daemon=True)
        command = ["ssh", "-F", str(client.config), "there", "tail", "-q", "-n", lines, "-F", *map(str, paths)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.taken: list[float] = []
        self.bytes = 0

    def run(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            now = time.time()
            self.bytes += len(line)
            event = json.loads(line)
            if event["kind"] in ("train", "eval"):
                self.taken.append(now - at(event))

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.join()


class Proxy:
    """Passes connections on to a port of this machine, counts their bytes, and may take its time."""

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.target, self.delay = port, delay
        self.up = self.down = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def bytes(self) -> int:
        return self.up + self.down

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pass(near, far, "up")
                self._pass(far, near, "down")

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        if not self.delay:
            threading.Thread(target=self._copy, args=(source, sink.sendall, way, sink), daemon=True).start()
            return
        late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def put(data: bytes) -> None:
            late.put((time.monotonic() + self.delay, data))

        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, data = late.get()
                    time.sleep(max(0.0, due - time.monotonic()))
                    sink.sendall(data)

        threading.Thread(target=send, daemon=True).start()
        threading.Thread(target=self._copy, args=(source, put, way, sink), daemon=True).start()

    def _copy(self, source: socket.socket, put: Callable[[bytes], None], way: str, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                setattr(self, way, getattr(self, way) + len(data))
                put(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


# Latency --------------------------------------------------------------------------------------------------------------


@dataclass
class Latencies:
    database: list[float] = field(default_factory=list)
    page: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)


def latency(site: Site, options: argparse.Namespace) -> None:
    print("| events | way | in the database, p50 / p95 | on the page | `tail -F`, the same events |")
    print("|---|---|---|---|---|")
    for count, pace in ((1, 0.1), (options.runs, 0.5)):
        found = {}
        for way, host in (("SSH", site.remote), ("local", site.local)):
            with site.more_workers(max(0, count - 4) if way == "local" else 0):
                found[way] = _latencies(site, host, count, pace, options.seconds)
        for way, each in found.items():
            what = f"{count} run{'s' * (count > 1)}, {1 / pace:g} steps a second each"
            print(f"| {what} | {way} | {_ms(each.database)} | {_ms(each.page)} | {_ms(each.tail)} |")
        there, here = found["SSH"], found["local"]
        medians = [statistics.median(one) for one in (there.database, here.database, there.tail, there.page, here.page)]
        print(
            f"| | SSH to local | {medians[0] / medians[1]:.2f} | {medians[3] / medians[4]:.2f} | "
            f"database to `tail -F`: {medians[0] / medians[2]:.1f} |"
        )


def _latencies(site: Site, host: Any, count: int, pace: float, seconds: float) -> Latencies:
    runs = [site.begin(host, f"pace {pace}", int(seconds / pace)) for _ in range(count)]
    rows, shown = Rows(site, runs), [Page(site, run) for run in runs]
    rows.start()
    for page in shown:
        page.start()
    tail, client = None, None
    if host == site.remote:
        site.wait(runs, lambda run: run.step > 0)
        client = Openssh(site)
        files = [site.sshd.root / "experiments" / str(run.experiment_id) / run.name / "events.jsonl" for run in runs]
        tail = Tail(client, files)
        tail.start()
    site.ended(runs)
    time.sleep(4)
    for thread in (rows, *shown):
        thread.leave.set()
    if tail and client:
        tail.end()
        client.close()
    found = Latencies(tail=tail.taken if tail else [])
    for run, page in zip(runs, shown, strict=True):
        for event in site.events(run):
            if event["kind"] == "train":
                found.database.append(rows.when(run, event["seq"]) - at(event))
                if (moment := page.when(event["step"])) is not None:
                    found.page.append(moment - at(event))
    return found


def _ms(values: Sequence[float]) -> str:
    digits = 1 if statistics.median(values or [1]) < 0.01 else 0
    return f"{statistics.median(values) * 1000:,.{digits}f} / {p95(values) * 1000:,.{digits}f} ms" if values else ""


# From the submission to the first step --------------------------------------------------------------------------------


def submit(site: Site, options: argparse.Namespace) -> None:
    from tests.trainer import texts

    text = texts.write_modules(Path(os.environ["KANGAROO_VAR"]) / "text")
    kinds: dict[str, tuple[Any, bool, Path | None, int]] = {
        "local": (site.local, False, None, options.repeats),
        "SSH, the connection stands": (site.remote, False, None, options.repeats),
        "SSH, no connection yet": (site.remote, True, None, options.repeats),
        "local, real trainer": (site.local, False, text, 3),
        "SSH, real trainer": (site.remote, False, text, 3),
    }
    taken: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for host in (site.local, site.remote):  # the text is sent and prepared once
        site.ended([site.begin(host, "real", 4, text)])
    for number in range(options.repeats):
        for kind, (host, cold, source, times) in kinds.items():
            if number < times:
                if cold:
                    site.reach()
                taken[kind].append(_started(site, host, source))
    print("| seconds from the submission | first event | first step | its row |\n|---|---|---|---|")
    for kind, rows in taken.items():
        print(f"| {kind} | {' | '.join(_machine.spread(column) for column in zip(*rows, strict=True))} |")
    for kind, base in (("SSH, the connection stands", "local"), ("SSH, real trainer", "local, real trainer")):
        ratios = [
            statistics.median(a) / statistics.median(b)
            for a, b in zip(zip(*taken[kind], strict=True), zip(*taken[base], strict=True), strict=True)
        ]
        print(f"| {kind} to {base} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


def _started(site: Site, host: Any, source: Path | None) -> tuple[float, float, float]:
    began = time.time()
    run = site.begin(host, "real" if source else "pace 0.05", 4, source)
    rows = Rows(site, [run])
    rows.start()
    site.ended([run])
    rows.leave.set()
    time.sleep(2 * random.random())
    events = site.events(run)
    step = next(event for event in events if event["kind"] == "train")
    return at(events[0]) - began, at(step) - began, rows.when(run, step["seq"]) - began


# Bytes ----------------------------------------------------------------------------------------------------------------


def volume(site: Site, options: argparse.Namespace) -> None:
    from experiments import jobs
    from experiments.transport import package
    from experiments.transport.client import call

    proxy = Proxy(site.sshd.port)
    said: list[tuple[str, str]] = []

    def reached(**fields: Any) -> int:
        site.reach(**fields)
        before = proxy.bytes
        call(site.remote.pk, "hello")
        return proxy.bytes - before

    def over(seconds: float) -> int:
        before = proxy.bytes
        time.sleep(seconds)
        return round((proxy.bytes - before) / seconds * 60)

    with_package = reached(port=proxy.port, folder="kangaroo-bytes")
    without = reached()
    archive = len(package.archive()[1])
    said.append(("a connection, login and relay", _kb(without)))
    said.append((f"the trainer's package ({_kb(archive)}), once a version", _kb(with_package - without)))
    said.append(("a minute with the connection open and nothing to do", _kb(over(45))))
    run = site.begin(site.remote, "silent")
    site.wait([run], lambda run: run.last_seq >= 0)
    time.sleep(2)
    said.append(("a minute of a run that says nothing", _kb(over(45))))
    jobs.request_stop(run.experiment)
    site.ended([run])
    for pace, steps in ((0.01, 2000), (0.2, 200)):
        said.append(_stream(site, proxy, pace, steps))
    site.reach(port=site.sshd.port, folder="kangaroo")
    proxy.close()
    print("| what | between site and sshd |\n|---|---|")
    for what, count in said:
        print(f"| {what} | {count} |")


def _stream(site: Site, proxy: Proxy, pace: float, steps: int) -> tuple[str, str]:
    """A run's bytes, and those of `tail -F` of the same events over a connection of its own."""
    beside = Proxy(site.sshd.port)
    client = Openssh(site, beside.port)
    time.sleep(1)
    before, before_tail = proxy.bytes, beside.bytes
    run = site.begin(site.remote, f"pace {pace}", steps)
    site.wait([run], lambda run: run.step > 0)
    there = site.sshd.root.parent / "kangaroo-bytes/experiments" / str(run.experiment_id) / run.name / "events.jsonl"
    tail = Tail(client, [there], lines="+1")
    tail.start()
    site.ended([run])
    time.sleep(1)
    tail.end()
    client.close()
    files = (run.directory / "events.jsonl").stat().st_size  # its log is empty
    moved, peer = proxy.bytes - before, beside.bytes - before_tail
    beside.close()
    count = len(site.events(run))
    return (
        f"a run of {count:,} events, {1 / pace:g} steps a second: {_kb(files)}",
        f"{_kb(moved)}, {moved / files:.2f} x the file; `tail -F`: {peer / tail.bytes:.2f} x",
    )


def _kb(count: float) -> str:
    return f"{count / 1000:,.1f} KB" if count < 1e5 else f"{count / 1000:,.0f} KB"


# Ingestion ------------------------------------------------------------------------------------------------------------


def ingest(site: Site, options: argparse.Namespace) -> None:
    rates: dict[str, float] = {}
    for what, host, count, events in (
        ("local, 1 run", site.local, 1, options.events * 4),
        ("SSH, 1 run", site.remote, 1, options.events * 4),
        (f"SSH, {options.runs} runs, one collector", site.remote, options.runs, options.events),
    ):
        stream = _a_stream(site, events)
        go = site.home / "go"
        go.unlink(missing_ok=True)
        runs = [site.begin(host, "flood") for _ in range(count)]
        site.wait(runs, lambda run: run.state == "running")
        time.sleep(3 + count / 4)  # all trainers wait, all are followed
        rows = Rows(site, runs)
        rows.start()
        began = time.time()
        go.touch()
        site.ended(runs)
        rows.leave.set()
        rates[what] = count * stream / (max(rows.when(run, stream - 1) for run in runs) - began)
    print("| | events a second | to local |\n|---|---|---|")
    for what, rate in rates.items():
        print(f"| {what} | {rate:,.0f} | {rate / rates['local, 1 run']:.2f} |")


def _a_stream(site: Site, events: int) -> int:
    """Write what a run of so many events says; their number."""
    from tests.experiments import fake_trainer

    path = site.home / "stream.jsonl"
    path.unlink(missing_ok=True)
    emit = fake_trainer.Stream(path)
    steps = events * 10 // 11
    emit("started", attempt=1, pid=1, hostname="fake", versions={})
    emit("prepared", **fake_trainer.prepared(steps, 0))
    for step in range(1, steps + 1):
        more = {"cross_entropy": fake_trainer.loss(step), "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000.0}
        emit("train", **fake_trainer.progress(step), **more)
        if step % 10 == 0:
            emit("eval", **fake_trainer.evaluation("validation", step))
    costs = {"eval_seconds": 0.1, "setup_seconds": 0.1, "tokens_per_second": 1000.0, "peak_memory_bytes": 1000}
    emit("finished", **fake_trainer.progress(steps), **costs)
    emit.file.close()
    site.sshd.login.own(path)
    return int(emit.seq)


# Transfers ------------------------------------------------------------------------------------------------------------


def transfer(site: Site, options: argparse.Namespace) -> None:
    run = site.begin(site.remote, "pace 0.01", 10)
    site.ended([run])
    there = site.sshd.root / "experiments" / str(run.experiment_id) / run.name / "checkpoints/step-000010"
    there.mkdir(parents=True)
    file = there / "model.safetensors"
    with file.open("wb") as out:
        for _ in range(options.megabytes):
            out.write(os.urandom(10**6))
    site.sshd.login.own(there.parent, there, file)
    print("| MB/s | Kangaroo | scp | sftp | Kangaroo to scp |\n|---|---|---|---|---|")
    for what, delay in (("loopback", 0.0), ("round trip of 50 ms", 0.025)):
        proxy = Proxy(site.sshd.port, delay) if delay else None
        port = proxy.port if proxy else site.sshd.port
        site.reach(port=port)
        client = Openssh(site, port)
        rates: dict[str, list[float]] = {"Kangaroo": [], "scp": [], "sftp": []}
        for _ in range(options.rounds):
            rates["Kangaroo"].append(options.megabytes / _fetched(site, run))
            for program in ("scp", "sftp"):
                rates[program].append(options.megabytes / _copied(client, program, file))
        client.close()
        if proxy:
            proxy.close()
        ratio = statistics.median(rates["Kangaroo"]) / statistics.median(rates["scp"])
        print(f"| {what} | {' | '.join(_machine.spread(each, 0) for each in rates.values())} | {ratio:.2f} |")
    site.reach(port=site.sshd.port)


def _fetched(site: Site, run: Any) -> float:
    from experiments.models import Transfer

    shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)
    began = time.time()
    wanted = Transfer.objects.create(run=run, name="step-000010")
    while wanted.state in (Transfer.State.WANTED, Transfer.State.RUNNING):
        time.sleep(0.05)
        wanted.refresh_from_db()
    if wanted.state != Transfer.State.DONE:
        raise SystemExit(f"The transfer failed: {wanted.error}")
    taken: float = wanted.ended_at.timestamp() - began
    wanted.delete()
    return taken


def _copied(client: Openssh, program: str, file: Path) -> float:
    to = Path(os.environ["KANGAROO_VAR"]) / "copied"
    began = time.monotonic()
    subprocess.run([program, "-q", "-F", str(client.config), f"there:{file}", str(to)], check=True)
    taken = time.monotonic() - began
    to.unlink()
    return taken


if __name__ == "__main__":
    sys.exit(main())
