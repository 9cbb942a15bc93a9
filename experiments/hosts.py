"""What is done on a host while its owner watches: a look at it (probe), and its set-up. Done by the collector.

    perform(task)     takes a HostTask to its end; each step is written as it is reached, so that the page shows it

A look goes from the outside in, and stops where the next step would have nothing to stand on. Each step that fails says
in a sentence what to do. What the host says is kept as text, and cut.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

from django.db.models.functions import Coalesce, Now
from django.utils import timezone

from experiments.credentials import fingerprint
from experiments.models import Host, HostTask
from experiments.transport import HostProblem, answers
from experiments.transport.client import call
from experiments.transport.package import requirements

log = logging.getLogger(__name__)

#: What a look finds out, in this order.
PROBE_STEPS = {
    "reach": "It can be reached",
    "key": "It is the machine that was confirmed",
    "login": "It lets Kangaroo in",
    "python": "Python",
    "package": "The trainer and its folder",
    "torch": "torch and what else training needs",
    "gpus": "GPUs",
    "room": "Cores, memory, disk",
    "linger": "Training outlives the connection",
    "clock": "Clock",
    "trip": "Round trip",
}
SET_UP_STEPS = {"environment": "A virtual environment with what training needs"}

#: Modules that the trainer imports; torch and transformers are asked for by their versions.
MODULES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "pydantic", "numpy", "filelock", "tqdm")
#: A clock that is further off (seconds) is worth a word: times on the pages are the host's own.
CLOCK = 5.0
#: Bytes of a set-up's log that are kept; after how many more it is not read on. Tasks of a host that are remembered.
MOST_LOG, MOST_READ, TASKS_KEPT = 200_000, 50_000_000, 10
#: Pieces of it that are read at a time.
PIECES = 50
#: How the set-up's last word begins, a JSON object behind it.
ENVIRONMENT = "KANGAROO-ENV "

_CHECK = (
    "import importlib.util as u, json, sys; "
    "print('\\n==', json.dumps([m for m in sys.argv[1:] if u.find_spec(m) is None]))"
)


class _Failed(Exception):
    """A step has failed and been written; nothing that follows can be done."""


def perform(task: HostTask, leaving: Callable[[], bool] = lambda: False) -> None:
    """Do what `task` asks for. Begun again where an earlier collector was killed over it."""
    active = HostTask.objects.filter(pk=task.pk, state__in=[HostTask.State.WANTED, HostTask.State.RUNNING])
    if not active.update(state=HostTask.State.RUNNING, started_at=task.started_at or timezone.now()):
        return
    steps = _Steps(task, SET_UP_STEPS | PROBE_STEPS if task.kind == HostTask.Kind.SET_UP else PROBE_STEPS)
    state = HostTask.State.SUCCEEDED
    standing = {"problem": "", "problem_text": ""}
    try:
        if task.kind == HostTask.Kind.SET_UP and not _set_up(task, steps, leaving):
            return  # the next collector goes on with it
        _probe(task.host, steps)
    except _Failed:
        state = HostTask.State.FAILED
    except _Cancelled:
        steps.fail_current("Cancelled.", "")
        state = HostTask.State.CANCELLED
    except HostProblem as problem:
        steps.fail_current(problem.message, "")
        state = HostTask.State.FAILED
        standing = {"problem": problem.kind, "problem_text": problem.message[:500]}
    except OSError as error:
        steps.fail_current(f"The host answered with an error: {_cut(str(error))}", "Look again; the log may say more.")
        state = HostTask.State.FAILED
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        log.info("host %s answered what cannot be", task.host_id, exc_info=True)
        steps.fail_current("The host gave an answer that cannot be.", "Look again; its trainer may be damaged.")
        state = HostTask.State.FAILED
    if state == HostTask.State.SUCCEEDED or standing["problem"]:
        # The keeper notes it too, but perhaps only after the page has seen the end and asks no more.
        since = Coalesce("unreachable_since", Now()) if standing["problem"] else None
        Host.objects.filter(pk=task.host_id).update(**standing, unreachable_since=since)
    active.update(state=state, ended_at=timezone.now())
    kept = task.host.tasks.order_by("-created").values_list("pk", flat=True)[:TASKS_KEPT]
    HostTask.objects.filter(host=task.host_id, ended_at__isnull=False).exclude(pk__in=list(kept)).delete()


class _Cancelled(Exception):
    pass


class _Steps:
    """The steps of a task, written to its row as they change."""

    def __init__(self, task: HostTask, titles: dict[str, str]) -> None:
        self.task = task
        self.steps = [
            {"key": key, "title": title, "state": "waiting", "text": "", "remedy": ""} for key, title in titles.items()
        ]
        self.current: dict[str, str] | None = None

    def begin(self, key: str) -> None:
        if HostTask.objects.filter(pk=self.task.pk, cancel_requested=True).exists():
            raise _Cancelled
        self.current = next(step for step in self.steps if step["key"] == key)
        self._write("running", "")

    def say(self, text: str) -> None:
        self._write("running", text)

    def done(self, text: str) -> None:
        self._write("done", text)

    def warn(self, text: str, remedy: str) -> None:
        self._write("warning", text, remedy)

    def fail(self, text: str, remedy: str) -> None:
        self._write("failed", text, remedy)
        raise _Failed

    def fail_current(self, text: str, remedy: str) -> None:
        if self.current is None:
            self.current = self.steps[0]
        self._write("failed", text, remedy)

    def _write(self, state: str, text: str, remedy: str = "") -> None:
        assert self.current is not None
        self.current.update(state=state, text=_cut(text), remedy=remedy)
        HostTask.objects.filter(pk=self.task.pk).update(steps=self.steps)


# The look -------------------------------------------------------------------------------------------------------------


def _probe(host: Host, steps: _Steps) -> None:
    steps.begin("reach")
    seen, _ = call(host.pk, "keeper.scan")
    steps.done(f"{host.address} answers on port {host.port}, after {seen['seconds'] * 1000:.0f} ms.")

    steps.begin("key")
    host.refresh_from_db()
    if not host.host_key:
        Host.objects.filter(pk=host.pk).update(seen_key=seen["key"])
        steps.fail("Nobody has confirmed yet that it is the right machine.", "Compare its fingerprint and confirm it.")
    call(host.pk, "keeper.close")  # what was changed since is to count
    try:
        login, _ = call(host.pk, "keeper.connect")
    except HostProblem:
        if seen["key"] == host.host_key:
            steps.done(f"Its key is {fingerprint(host.host_key)}, as confirmed.")
            steps.begin("login")
        raise
    steps.done(f"Its key is {fingerprint(host.host_key)}, as confirmed.")
    steps.begin("login")
    steps.done(f"Signed in as {host.username}, after {login['seconds'] * 1000:.0f} ms.")

    steps.begin("python")
    try:
        hello, _ = call(host.pk, "hello", timeout=120)
    except HostProblem as problem:
        if problem.kind != Host.Problem.NO_PYTHON:
            steps.done("Not asked.")
            steps.begin("package")
        raise
    steps.done(f"Python {hello['python']}, {hello['executable']}.")
    steps.begin("package")
    steps.done(f"In {hello['root']}, version {hello['package'][:12]}.")

    steps.begin("torch")
    before = time.time()
    facts = answers.facts(call(host.pk, "facts", timeout=300)[0])
    missing = _missing(host, hello["executable"])
    python = "" if missing else str(hello["executable"])
    Host.objects.filter(pk=host.pk).update(facts=facts, probed_at=timezone.now(), env_python=python)
    if missing:
        steps.warn(
            f"{hello['executable']} has no {', '.join(missing)}.",
            "Set up this host: that makes an environment of its own in the working folder. Or name, as its Python, an "
            "interpreter that has them.",
        )
    else:
        torch = facts["torch"] or {}
        cuda = f"CUDA {torch['cuda']}" if torch.get("cuda") else "without CUDA"
        steps.done(f"torch {torch.get('version') or '?'}, {cuda}; transformers {facts.get('transformers') or '?'}.")

    steps.begin("gpus")
    _say_gpus(facts, steps)

    steps.begin("room")
    free = (facts.get("disk_free_bytes") or 0) / 1e9
    memory = (facts.get("memory_bytes") or 0) / 1e9
    room = f"{facts.get('cores') or '?'} cores, {memory:.0f} GB of memory, {free:.0f} GB of disk free."
    if free < 5:
        steps.warn(room, "A model and its checkpoints may not fit: make room, or name a working folder elsewhere.")
    else:
        steps.done(room)

    steps.begin("linger")
    if facts["lingers"] is False:
        steps.warn("This machine ends a user's processes when they log out.", facts["linger_remedy"])
    else:
        steps.done("Processes go on after a logout.")

    steps.begin("clock")
    hello, _ = call(host.pk, "hello")
    offset = hello["time"] - time.time()
    if abs(offset) > CLOCK:
        which = "ahead of" if offset > 0 else "behind"
        steps.warn(
            f"Its clock is {abs(offset):.0f} s {which} this site's.",
            "Training is not harmed, but times of its events are off by that: turn time synchronisation on there.",
        )
    else:
        steps.done(f"Within {max(1.0, abs(offset)):.0f} s of this site's.")
    log.debug("looked at host %s in %.1f s", host.pk, time.time() - before)

    steps.begin("trip")
    trips = [call(host.pk, "keeper.ping")[0]["seconds"] for _ in range(5)]
    steps.done(f"{statistics.median(trips) * 1000:.0f} ms there and back.")
    readings = answers.readings(call(host.pk, "readings")[0])
    Host.objects.filter(pk=host.pk).update(readings=readings, readings_at=timezone.now())


def _missing(host: Host, executable: str) -> list[str]:
    """Modules that the interpreter lacks."""
    answer, _ = call(host.pk, "keeper.exec", argv=[executable, "-c", _CHECK, *MODULES], timeout=60)
    _, found, rest = str(answer["out"]).rpartition("\n== ")
    try:
        names = json.loads(rest) if found else list(MODULES)
    except ValueError:
        return list(MODULES)
    return [name for name in MODULES if name in names]


def _say_gpus(facts: dict[str, Any], steps: _Steps) -> None:
    gpus = facts["gpus"]
    torch = facts["torch"] or {}
    if not gpus:
        if facts.get("gpu_problem"):
            steps.warn(f"Its GPUs cannot be asked: {facts['gpu_problem']}", "Mend the driver there, then look again.")
        else:
            steps.done("No GPU: it trains on its cores.")
        return
    names = "; ".join(
        f"{gpu['index']}: {gpu['name']}, {gpu['memory_bytes'] / 1e9:.0f} GB "
        f"({gpu['memory_used_bytes'] / 1e9:.0f} in use)"
        for gpu in gpus
    )
    text = f"{names}. Driver {facts.get('driver') or '?'}."
    if torch and not torch.get("cuda_available"):
        steps.warn(
            text + " But its torch does not see them.",
            "Its torch is built without CUDA, or for a newer driver: update the driver, or set up this host anew.",
        )
    else:
        steps.done(text)


# The set-up -----------------------------------------------------------------------------------------------------------


def _set_up(task: HostTask, steps: _Steps, leaving: Callable[[], bool]) -> bool:
    """Make the environment; False if told to leave before its end: it goes on there meanwhile."""
    host = task.host
    steps.begin("environment")
    if host.env_python:
        # The interpreter that the environment is made with, not one of the environment itself.
        Host.objects.filter(pk=host.pk).update(env_python="")
        call(host.pk, "keeper.close")
    hello, _ = call(host.pk, "hello", timeout=120)
    command = ["python", "-m", "trainer.set_up", "--root", hello["root"]]
    for requirement in requirements():
        command += ["--requirement", requirement]
    held = _size(host, "tasks/set-up/log.txt")  # an earlier set-up's
    begun, _ = call(host.pk, "begin", name="set-up", command=command, env={}, attempt=task.pk)
    if begun["outcome"] != "started":
        held = 0  # we come back to it
    task.log, read = "", 0
    while True:
        try:
            status, _ = call(host.pk, "task", name="set-up")
            for _ in range(PIECES):  # no more before it is looked whether somebody cancelled
                data = call(host.pk, "read", path="tasks/set-up/log.txt", offset=held, limit=65_536)[1]
                held, read = held + len(data), read + len(data)
                task.log = (task.log + data.decode("utf-8", "replace").replace("\0", "�"))[-MOST_LOG:]
                if not data or read > MOST_READ:
                    break
            HostTask.objects.filter(pk=task.pk).update(log=task.log)
            if not status["alive"] and (not data or read > MOST_READ):
                break
        except HostProblem as problem:
            if problem.kind != Host.Problem.UNREACHABLE:
                raise
            steps.say(f"{problem.message} It goes on there meanwhile; still trying.")
        if HostTask.objects.filter(pk=task.pk, cancel_requested=True).exists():
            call(host.pk, "end", name="set-up")
            raise _Cancelled
        if leaving():
            return False
        time.sleep(1.0)
    made = next((line for line in reversed(task.log.splitlines()) if line.startswith(ENVIRONMENT)), "")
    if (status["exit"] or {}).get("code") != 0 or not made:
        last = next((line for line in reversed(task.log.splitlines()) if line.strip()), "it said nothing")
        steps.fail(last, "The log below says more. Set it up again once that is mended: it goes on where it was.")
    found = json.loads(made.removeprefix(ENVIRONMENT))
    versions = found.get("versions") or {}
    Host.objects.filter(pk=host.pk).update(env_python=_cut(str(found["executable"]), 300))
    text = (
        f"{found['executable']}: torch {versions.get('torch', '?')}, transformers {versions.get('transformers', '?')}."
    )
    if found.get("warning"):
        steps.warn(text, _cut(str(found["warning"])))
    else:
        steps.done(text)
    call(host.pk, "keeper.close")  # from here on by that interpreter
    host.refresh_from_db()
    return True


def _size(host: Host, path: str) -> int:
    try:
        return int(call(host.pk, "read", path=path, offset=0, limit=0)[0]["total"])
    except FileNotFoundError:
        return 0


def _cut(text: str, most: int = 500) -> str:
    """Text from outside, on a page: printable, and not endless."""
    clean = "".join(char if char.isprintable() else " " for char in text)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"
