"""How a machine stands: its row as what pages say of it.

host_standings(hosts, user)    state, GPUs, runs and task of each, in a fixed number of queries

What a machine says of itself comes from outside: it is brought into known types and cut here, and escaped by templates.
Somebody who may only train on a machine hears that it cannot be used, not why: that may name what is the owner's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

from django.db.models import Count, Q
from django.utils import timezone

from accounts.models import User
from experiments.models import Host, HostTask, ModelRun, State

#: Characters of a task's log that a page shows.
LOG_TAIL = 12_000
#: Readings that are older say so.
FRESH = timedelta(seconds=60)
ACTIVE_TASKS = (HostTask.State.WANTED, HostTask.State.RUNNING)

Problem = Host.Problem


class HostState(NamedTuple):
    """A machine's state: its colour, a word for the badge, what that means, and the page that leads on."""

    colour: str  # as a run of that state has
    word: str
    sentence: str
    action: str = ""  # the name of an address
    label: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU as it was last read. None where the driver did not say."""

    index: int | None
    uuid: str
    name: str
    memory_bytes: float | None
    memory_used_bytes: float | None
    use: float | None
    temperature: float | None
    power: float | None
    power_limit: float | None
    processes: int
    runs: list[ModelRun]  # that train on it and that the reader may see

    @property
    def memory_share(self) -> float | None:
        if not self.memory_bytes or self.memory_used_bytes is None:
            return None
        return min(1.0, max(0.0, self.memory_used_bytes / self.memory_bytes))


class Step(NamedTuple):
    """A step of a task, cut to what a page can hold."""

    key: str
    title: str
    state: str
    text: str
    remedy: str


STEP_STATES = ("waiting", "running", "done", "failed", "warning")


@dataclass
class HostStanding:
    """A machine as it stands for one reader."""

    host: Host
    is_mine: bool
    running: int = 0
    waiting: int = 0
    task: HostTask | None = None  # the newest; its owner's to see
    gpu_runs: dict[str, list[ModelRun]] = field(default_factory=dict)  # by the UUID of the GPU they were given

    @property
    def is_live(self) -> bool:
        """Whether what a page shows of it may change by itself."""
        return bool(self.running or self.waiting or self.host.unreachable_since or self.is_busy)

    @property
    def is_busy(self) -> bool:
        return self.task is not None and self.task.is_active

    @cached_property
    def state(self) -> HostState:
        state = _state(self)
        return state if self.is_mine else _for_others(state)

    @property
    def key_has_changed(self) -> bool:
        return bool(self.host.host_key) and self.host.problem == Problem.KEY_CHANGED

    @cached_property
    def unreachable_since(self) -> Any:
        """For the badge: a state that another one hides is not said."""
        return self.host.unreachable_since if self.state.word == UNREACHABLE else None

    @cached_property
    def gpus(self) -> list[Gpu]:
        source = self.host.readings or self.host.facts
        found = _part(source, "gpus", list) or []
        return [_gpu(gpu, self.gpu_runs) for gpu in found[:64] if isinstance(gpu, dict)]

    @property
    def has_no_gpu(self) -> bool:
        """Known to have none, which is not the same as knowing of none."""
        return bool(self.host.facts or self.host.readings) and not self.gpus

    @property
    def disk_free(self) -> float | None:
        free = amount(_part(self.host.readings, "disk_free_bytes", object))
        return free if free is not None else amount(_part(self.host.facts, "disk_free_bytes", object))

    @property
    def readings_are_old(self) -> bool:
        at = self.host.readings_at
        return at is not None and timezone.now() - at > FRESH

    @cached_property
    def steps(self) -> list[Step]:
        found = self.task.steps if self.task is not None and isinstance(self.task.steps, list) else []
        return [_step(step) for step in found[:40] if isinstance(step, dict)]

    @property
    def wants_reading(self) -> bool:
        """Whether the steps are news: they go on, have ended just now, or found something to be dealt with."""
        task = self.task
        if task is None or task.ended_at is None or task.state != HostTask.State.SUCCEEDED or self.remarks:
            return True
        return timezone.now() - task.ended_at < FRESH

    @property
    def remarks(self) -> int:
        return sum(step.state in ("warning", "failed") for step in self.steps)

    @property
    def log(self) -> str:
        """The end of the task's log, each line as a terminal would show it."""
        if self.task is None:
            return ""
        text = self.task.log
        lines = [line.rsplit("\r", 1)[-1] for line in text[-LOG_TAIL:].replace("\r\n", "\n").split("\n")]
        return "\n".join(lines[1:] if len(text) > LOG_TAIL else lines).strip("\n")

    @cached_property
    def facts(self) -> list[tuple[str, str, Any]]:
        """What the last look found: what it is, how to write it, and the value."""
        facts = self.host.facts if isinstance(self.host.facts, dict) else {}
        torch = _part(facts, "torch", dict)
        rows: list[tuple[str, str, Any]] = [
            ("hostname", "text", text(facts.get("hostname"))),
            ("system", "text", " ".join(filter(None, [text(facts.get("system")), text(facts.get("machine"))]))),
            ("processor", "text", text(facts.get("cpu"))),
            ("cores", "count", amount(facts.get("cores"))),
            ("memory", "bytes", amount(facts.get("memory_bytes"))),
            ("disk", "bytes", amount(facts.get("disk_total_bytes"))),
            ("driver", "text", text(facts.get("driver"))),
            ("Python", "text", text(facts.get("python"))),
        ]
        if torch:
            cuda = f", CUDA {text(torch.get('cuda'))}" if torch.get("cuda") else ", without CUDA"
            rows.append(("torch", "text", f"{text(torch.get('version'))}{cuda}"))
        rows.append(("transformers", "text", text(facts.get("transformers"))))
        return [row for row in rows if row[2] not in ("", None)]

    @property
    def linger_remedy(self) -> str:
        """What to do where training would end with the connection; "" where it would not, or nobody knows."""
        facts = self.host.facts if isinstance(self.host.facts, dict) else {}
        if facts.get("lingers") is not False:
            return ""
        return text(facts.get("linger_remedy"), 500) or "Ask its administrator to let your processes outlive a logout."


UNREACHABLE = "unreachable"
_WORDS: dict[str, str] = {
    Problem.LOGIN_REFUSED: "refused the login",
    Problem.ADDRESS_REFUSED: "address refused",
    Problem.NO_PYTHON: "no Python found",
    Problem.UNUSABLE: "cannot be used",
}
_REMEDIES: dict[str, tuple[str, str]] = {
    Problem.LOGIN_REFUSED: ("host_credential", "See the credential"),
    Problem.ADDRESS_REFUSED: ("host_edit", "Change the address"),
    Problem.NO_PYTHON: ("host_edit", "Name a Python"),
    Problem.UNUSABLE: ("host_edit", "Change how it is used"),
}


def _state(standing: HostStanding) -> HostState:
    """What stands in the way comes first, in the order in which a person must deal with it."""
    host = standing.host
    said = text(host.problem_text, 500)
    if standing.key_has_changed:
        return HostState(
            "failed",
            "its host key has changed",
            "What answers at this address shows another host key than the one that was confirmed. Either the machine "
            "was set up anew, or something else answers in its place. Kangaroo does not sign in there until you have "
            "looked into it; what trains there goes on.",
            "host_confirm",
            "Compare the two keys",
        )
    if not host.host_key:
        return HostState(
            "queued",
            "not confirmed",
            said
            if host.problem == Problem.ADDRESS_REFUSED
            else "Nobody has confirmed yet that this is the right machine. Until then Kangaroo does not sign in there.",
            "host_confirm",
            "Confirm its host key",
        )
    if not host.credential:
        return HostState(
            "queued",
            "no credential",
            "Kangaroo has no key to sign in with yet.",
            "host_credential",
            "Give it a way in",
        )
    if standing.is_busy and standing.task is not None:
        is_probe = standing.task.kind == HostTask.Kind.PROBE
        return HostState(
            "running",
            "being looked at" if is_probe else "being set up",
            "Kangaroo is looking at it now." if is_probe else "Kangaroo is setting it up now; this takes some minutes.",
        )
    if host.problem == Problem.UNREACHABLE or (host.unreachable_since and not host.problem):
        return HostState(
            "cancelled",
            UNREACHABLE,
            said or "It does not answer now. Kangaroo goes on trying; what trains there goes on, and nothing is lost.",
        )
    if host.problem:
        action, label = _REMEDIES[host.problem]
        return HostState("failed", _WORDS[host.problem], said or "It cannot be used as it stands.", action, label)
    if not host.env_python:
        return HostState(
            "queued",
            "not set up",
            "It has no Python with torch that Kangaroo knows of. Set one up there, or name one that it has."
            if host.probed_at
            else "It was not looked at yet.",
        )
    blind = standing.gpus and (_part(host.facts, "torch", dict) or {}).get("cuda_available") is False
    return HostState(
        "succeeded",
        "ready",
        "Runs can train here, but on its cores: its torch does not see the GPUs." if blind else "Runs can train here.",
    )


def _for_others(state: HostState) -> HostState:
    if state.colour == "succeeded":
        return state
    if state.word == UNREACHABLE:
        return HostState(state.colour, state.word, "It does not answer now; what trains there goes on.")
    return HostState("queued", "not available", "It cannot be used now. Its owner can see why.")


def host_standings(hosts: Iterable[Host], user: User) -> list[HostStanding]:
    found = {host.pk: HostStanding(host, host.may_change(user)) for host in hosts}
    counts = ModelRun.objects.active().filter(host__in=found).values("host").order_by("host")
    for row in counts.annotate(running=Count("pk", Q(state=State.RUNNING)), waiting=Count("pk", Q(state=State.QUEUED))):
        found[row["host"]].running, found[row["host"]].waiting = row["running"], row["waiting"]
    mine = [pk for pk, standing in found.items() if standing.is_mine]
    for task in HostTask.objects.filter(host__in=mine, state__in=ACTIVE_TASKS).defer("log"):
        found[task.host_id].task = task
    for run in (
        ModelRun.objects.filter(host__in=found, state=State.RUNNING).visible_to(user).select_related("experiment")
    ):
        for uuid in run.gpus if isinstance(run.gpus, list) else []:
            found[run.host_id].gpu_runs.setdefault(str(uuid), []).append(run)
    return list(found.values())


# What a machine says, brought into known types ------------------------------------------------------------------------


def text(value: Any, most: int = 120) -> str:
    """Printable and not too long; "" for what is no text."""
    if not isinstance(value, str):
        return ""
    cut = "".join(c if c.isprintable() else " " for c in value[: most + 1])
    return cut[: most - 1] + "…" if len(cut) > most else cut.strip()


def amount(value: Any) -> float | None:
    """A number that can be shown; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 and math.isfinite(value) else None


def _part(source: Any, name: str, kind: type) -> Any:
    value = source.get(name) if isinstance(source, dict) else None
    return value if isinstance(value, kind) else None


def _gpu(gpu: dict[str, Any], runs: dict[str, list[ModelRun]]) -> Gpu:
    index, use, uuid = amount(gpu.get("index")), amount(gpu.get("use")), text(gpu.get("uuid"))
    return Gpu(
        index=None if index is None else int(index),
        uuid=uuid,
        name=text(gpu.get("name"), 60) or "GPU",
        memory_bytes=amount(gpu.get("memory_bytes")),
        memory_used_bytes=amount(gpu.get("memory_used_bytes")),
        use=None if use is None else min(1.0, max(0.0, use)),
        temperature=amount(gpu.get("temperature")),
        power=amount(gpu.get("power")),
        power_limit=amount(gpu.get("power_limit")),
        processes=len(_part(gpu, "processes", list) or []),
        runs=runs.get(uuid, []),
    )


def _step(step: dict[str, Any]) -> Step:
    state = text(step.get("state"))
    return Step(
        key=text(step.get("key"), 40),
        title=text(step.get("title"), 80),
        state=state if state in STEP_STATES else "waiting",
        text=text(step.get("text"), 600),
        remedy=text(step.get("remedy"), 600),
    )
