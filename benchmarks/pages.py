"""Latencies of the pages that people keep open, under several clients at once.

    python -m benchmarks pages [--clients 8] [--requests 40] [--experiments 200] [--points 20000]

A site of its own in a temporary folder: SQLite, static files collected, gunicorn on loopback as `manage.py up` starts
it (2 processes of 8 threads). One user has 200 finished experiments, one that runs, and one of three models with 20,000
training points each. Every client sends its requests one after the other on one connection; a page without its static
files. `first` is what each path took when nobody had asked for it since the server started, `alone` the median of ten
requests of a single client after that. Rows are made with
tests/experiments/factories.py; nothing is trained. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_rows(experiments: int, points: int) -> dict[str, str]:
    """Fill the database named by KANGAROO_VAR; addresses by what they are, and the user's session."""
    import django

    django.setup()
    from django.test import Client

    from tests.experiments.factories import make_experiment, make_user

    user = make_user("bench@example.org")
    for i in range(experiments):
        make_experiment(user, name=f"Experiment {i}", steps=400, points=20)
    running = make_experiment(user, name="Running", state="running", until=0.5)
    long = make_experiment(user, name="Long", steps=points, points=points, eval_every=max(1, points // 200))
    client = Client()
    client.force_login(user)
    poll = client.get("/profile/", headers={"host": "localhost"}).content.decode()
    marks = [part.split('"')[0] for part in poll.split('name="seen" value="')[1:]]
    return {
        "session": client.cookies["sessionid"].value,
        "Profile, 20 of 202 experiments": "/profile/",
        "Profile, searched": "/profile/?q=Experiment+1&sort=loss",
        "Profile, a poll without news": "/profile/?" + "&".join(f"seen={mark}" for mark in marks),
        f"experiment page, 3 x {points:,} points": long.get_absolute_url(),
        "experiment page, running": running.get_absolute_url(),
        f"metrics.json, 3 x {points:,} points": f"{long.get_absolute_url()}metrics.json",
        "metrics.json, an increment": f"{long.get_absolute_url()}metrics.json?after=" + _place_of(client, long),
    }


def _place_of(client: object, experiment: object) -> str:
    answer = client.get(f"{experiment.get_absolute_url()}metrics.json", headers={"host": "localhost"})  # type: ignore[attr-defined]
    return str(json.loads(answer.content)["place"])


def migrated(var: Path) -> dict[str, str]:
    """The environment of a new site in the folder `var`: SQLite, static files collected, no rows."""
    var.mkdir(exist_ok=True)
    vendor = Path(os.environ.get("KANGAROO_VAR", ROOT / "var")) / "vendor"
    (var / "vendor").symlink_to(vendor.resolve())
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    environment |= {
        "KANGAROO_VAR": str(var),
        "DJANGO_SETTINGS_MODULE": "kangaroo_site.settings",
        "LOG_LEVEL": "ERROR",
    }
    for command in (["migrate", "-v0"], ["createcachetable", "-v0"], ["collectstatic", "-v0", "--noinput"]):
        subprocess.run([sys.executable, "manage.py", *command], cwd=ROOT, env=environment, check=True)
    return environment


@contextmanager
def gunicorn(env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A gunicorn for the installation in `env`, which has just been started, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "kangaroo_site.wsgi:application", "--no-control-socket"]
    command += ["--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--workers", "2", "--threads", "8"]
    process = subprocess.Popen([*command, "--log-level", "error"], cwd=ROOT, env=env)
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait(20)


def wait_for(port: int) -> None:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("gunicorn does not listen")


def ask(port: int, session: str, path: str, times: int) -> list[float]:
    """Milliseconds of each of `times` requests on one connection."""
    headers = {"Cookie": f"sessionid={session}", "Host": "localhost"} | (
        {"HX-Request": "true"} if "seen=" in path else {}
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response.read()
        taken.append((time.perf_counter() - began) * 1000)
        if response.status not in (200, 204):
            raise SystemExit(f"{path}: {response.status}")
    connection.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=40, help="of each client, for each path")
    parser.add_argument("--experiments", type=int, default=200)
    parser.add_argument("--points", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kangaroo-pages-") as var:
        os.environ |= migrated(Path(var))
        os.environ.pop("DATABASE_URL", None)
        paths = make_rows(options.experiments, options.points)
        session = paths.pop("session")
        with gunicorn(dict(os.environ)) as (_, port):
            wait_for(port)
            ask(port, session, "/profile/?q=nothing", 4)  # templates and connections, not curves
            print(f"{options.clients} clients, {options.requests} requests each; milliseconds\n")
            print(f"{'':<40}{'first':>8}{'alone':>8}{'p50':>8}{'p95':>8}{'requests/s':>12}")
            for what, path in paths.items():
                first = ask(port, session, path, 1)[0]
                alone = statistics.median(ask(port, session, path, 10))
                began = time.perf_counter()
                with ThreadPoolExecutor(options.clients) as pool:
                    jobs = [pool.submit(ask, port, session, path, options.requests) for _ in range(options.clients)]
                    taken = sorted(one for job in jobs for one in job.result())
                rate = len(taken) / (time.perf_counter() - began)
                p95 = taken[min(len(taken) - 1, round(len(taken) * 0.95))]
                print(f"{what:<40}{first:>8.0f}{alone:>8.0f}{statistics.median(taken):>8.0f}{p95:>8.0f}{rate:>12.0f}")


if __name__ == "__main__":
    main()
