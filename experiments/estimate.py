"""What an experiment would take, said before it starts: the side sheet of the Train page.

Counts come from trainer.budget. Time comes from what this installation measured: FLOPs per second of newest
finished runs of a like size; until there is one, from a low guess that says so. Imports no torch.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from django.conf import settings
from django.db.models import Q

from experiments.forms import ExperimentForm
from experiments.line import most_gpus
from experiments.models import Host, ModelRun, State
from experiments.templatetags.figures import filesize_short, percent
from experiments.values import document_of
from trainer.budget import ModelBudget, flops_per_token, parameters, sheet
from trainer.growth import OPERATORS, GrowthError, GrowthPlan, learned, plan
from trainer.growth.advice import Advice, reason, recommend
from trainer.shape import GrowInit, Shape
from trainer.spec import DataSpec, ExperimentSpec, ModelSpec

#: Training FLOPs per second of one core before anything was measured: what small models reach on an old laptop's.
GUESSED_FLOPS_PER_CORE = 2e10
#: Seconds a run takes beside its steps, before anything was measured.
GUESSED_BESIDES = 10.0
#: A run shorter than this says more about starting than about training.
SHORTEST_MEASURED_SECONDS = 2.0
#: Parameters that growth writes and checks in a second, before anything was measured: a slow disk's pace.
GUESSED_GROWN_PER_SECOND = 2e7
#: Of so many newest runs, so many that are nearest in size speak: pico models run at a fraction of a large one's rate.
RECENT_RUNS, MEASURED_RUNS = 60, 9


class Speed(NamedTuple):
    flops_per_second: float  # of one run
    runs: int  # measured on; 0: a guess
    besides: float  # seconds a run takes beside its steps: to start, to read the text, to evaluate


class Measured(NamedTuple):
    """What one finished run took."""

    flops_per_step: float
    flops_per_second: float
    besides: float | None


def measured(host: Host | None = None) -> list[Measured]:
    """The newest finished runs there (None: here) that trained for long enough to say anything."""
    there = Q(host=host) if host else Q(host__kind=Host.Kind.LOCAL)
    finished = (
        ModelRun.objects.filter(
            there,
            state=State.SUCCEEDED,
            flops__gt=0,
            step__gt=0,
            train_seconds__gte=SHORTEST_MEASURED_SECONDS,
            ended_at__isnull=False,
        )
        .order_by("-ended_at")
        .values_list("flops", "step", "train_seconds", "started_at", "ended_at")[:RECENT_RUNS]
    )
    return [
        Measured(
            flops / step,
            flops / seconds,
            # of a resumed run they are its last attempt's, and `seconds` all attempts' together
            max(0.0, (ended - started).total_seconds() - seconds) if started and ended else None,
        )
        for flops, step, seconds, started, ended in finished
    ]


def speed_of(runs: list[Measured], flops_per_step: float | None) -> Speed:
    """The median over the runs nearest in size, so that one run beside a busy machine does not count for all."""
    if flops_per_step:
        runs = sorted(runs, key=lambda run: abs(math.log(run.flops_per_step / flops_per_step)))
    near = runs[:MEASURED_RUNS]
    if near:
        besides = [run.besides for run in near if run.besides is not None]
        rate = statistics.median(run.flops_per_second for run in near)
        return Speed(rate, len(near), statistics.median(besides or [GUESSED_BESIDES]))
    cores = max(1, settings.CORES // max(1, settings.LOCAL_SLOTS))
    return Speed(GUESSED_FLOPS_PER_CORE * cores, 0, GUESSED_BESIDES)


def known_text(data: DataSpec) -> dict[str, Any]:
    """The `prepared` event of an earlier run on this very text and tokenizer; empty if there was none."""
    # Not of runs on other users' machines, whose owners may make them say anything.
    trusted = ~Q(host__kind=Host.Kind.SSH) | Q(host__offered=True)
    earlier = ModelRun.objects.filter(trusted, experiment__spec_json__data=data.model_dump(mode="json"))
    earlier = earlier.filter(prepared__isnull=False)
    return earlier.order_by("-started_at").values_list("prepared", flat=True).first() or {}


def memory_bytes(host: Host | None = None) -> int | None:
    """What a process may use: a GPU's memory, or the machine's, or less if a container says so. None: not known."""
    if host is not None:
        facts = host.facts or {}
        gpus = [gpu.get("memory_bytes") for gpu in facts.get("gpus") or []]
        known = [size for size in gpus or [facts.get("memory_bytes")] if isinstance(size, int | float)]
        return int(min(known)) if known else None
    found = []
    try:
        with open("/proc/meminfo") as file:
            found.append(int(file.readline().split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        found.append(int(limit) if limit != "max" else found[0])
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


class Verdict(NamedTuple):
    """What growth, or a rule of it, does to these very shapes."""

    kind: str  # "keeps", "changes" or "impossible"
    text: str  # why

    @property
    def word(self) -> str:
        return {
            "keeps": "keeps the function for these shapes",
            "changes": "changes the function",
            "impossible": "cannot be used for these shapes",
        }[self.kind]

    @property
    def short(self) -> str:
        """Where it is said already that it is these shapes."""
        return {
            "keeps": "keeps the function",
            "changes": "changes the function",
            "impossible": "cannot be used",
        }[self.kind]


class Cost(NamedTuple):
    """What growing in one half adds, width or depth, and then what both do."""

    parameters: int | None  # None: not counted before the vocabulary is known
    flops_ratio: float | None  # of training on a token, large's to small's


class Chosen(NamedTuple):
    """The two shapes and the growth between them, as far as each can be read."""

    family: str
    tied: bool
    small: Shape
    large: Shape
    init: GrowInit

    @property
    def growths(self) -> list[tuple[Shape, Shape]]:
        """One after the other, on the ladder if there is one."""
        shapes = [self.small, *(rung.shape for rung in self.init.ladder), self.large]
        return list(itertools.pairwise(shapes))

    @property
    def wide(self) -> Shape:
        """As wide as large and as deep as small."""
        return self.large.model_copy(update={"n_layers": self.small.n_layers})

    @property
    def deep(self) -> Shape:
        return self.small.model_copy(update={"n_layers": self.large.n_layers})


@dataclass
class Estimate:
    models: list[ModelBudget] = field(default_factory=list)
    growth: Verdict | None = None
    rules: dict[str, Verdict] = field(default_factory=dict)  # "width_duplicate" -> what it does by itself
    chosen: Chosen | None = None
    advice: Advice | None = None
    costs: dict[str, Cost] = field(default_factory=dict)  # "width", "depth", "both"
    growing_seconds: float | None = None
    learning_flops: float | None = None  # of training the maps, where that is asked for
    warnings: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    speed: Speed | None = None
    unknown: str = ""  # why figures are missing, and what would help
    seconds: float | None = None  # until the last model has finished
    memory: int | None = None
    host: Host | None = None  # another machine than this one
    cost: float | None = None  # of all models, where the host has a price


def estimate(form: ExperimentForm) -> Estimate:
    """What can be said of a bound form, errors and all: of the models and settings that can be read."""
    form.is_valid()
    spec = form.readable
    if spec is None:
        return Estimate()
    d_vocab_is_open = spec.data.tokenizer.d_vocab is None
    known = known_text(spec.data) if d_vocab_is_open or spec.train.num_epochs is not None else {}
    if known and d_vocab_is_open:
        tokenizer = spec.data.tokenizer.model_copy(update={"d_vocab": known["d_vocab"]})
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"tokenizer": tokenizer})})
    host = form.hosts.get(form.typed.get("host") or "")
    host = None if host is None or host.kind == Host.Kind.LOCAL else host
    memory, runs = memory_bytes(host), measured(host)
    budgets = sheet(spec, train_tokens=known.get("train_tokens"))
    speed = None
    if runs or host is None:  # of another machine nothing can be guessed
        budgets = {name: _timed(budget, speed_of(runs, _flops_per_step(budget))) for name, budget in budgets.items()}
        speed = speed_of(runs, max((_flops_per_step(budget) or 0.0 for budget in budgets.values()), default=0.0))
    places = ((most_gpus(host) or 0) * host.runs_per_gpu or host.slots) if host else settings.LOCAL_SLOTS
    shown = [budgets[name] for name in spec.models]
    chosen = chosen_growth(form)
    return Estimate(
        models=shown,
        growth=chosen and _growth(chosen, spec),
        rules=rules_of(chosen) if chosen else {},
        chosen=chosen,
        advice=chosen and advice_of(chosen),
        costs=costs_of(chosen, spec.train.n_ctx, spec.data.tokenizer.d_vocab) if chosen else {},
        growing_seconds=_growing_seconds(budgets, host),
        learning_flops=_learning_flops(chosen, spec) if chosen else None,
        warnings=_memory_warnings(shown, memory, host, places) + _plan_warnings(shown),
        hints=_ratios(shown),
        unknown=_unknown(spec, shown),
        speed=speed,
        seconds=_until_finished(spec, budgets, speed.besides, places) if speed else None,
        memory=memory,
        host=host,
        cost=_cost(host, shown, speed),
    )


# Growth ---------------------------------------------------------------------------------------------------------------


def chosen_growth(form: ExperimentForm) -> Chosen | None:
    """Small and the shape to grow it to, as far as each is right by itself: growth between them may be impossible."""
    document = document_of(form.typed)["models"]
    grow = document["scaled"].pop("init")
    try:
        small = ModelSpec.model_validate(document["small"])
        large = ModelSpec.model_validate(document["scaled"])
        init = GrowInit.model_validate(grow)
    except ValueError:
        return None
    if small.shape is None or large.shape is None or "width" not in form.typed or "depth" not in form.typed:
        return None
    return Chosen(small.family, small.tie_embeddings, small.shape, large.shape, init)


def _growth(chosen: Chosen, spec: ExperimentSpec) -> Verdict:
    """What the growth that was chosen does to these shapes, all its stages together."""
    judged = [_verdict(chosen, a, b, chosen.init, spec) for a, b in chosen.growths]
    for kind in ("impossible", "changes"):
        for number, verdict in enumerate(judged, start=1):
            if verdict.kind == kind:
                where = f"Growth {number} of {len(judged)}: " if len(judged) > 1 else ""
                return Verdict(kind, f"{where}{verdict.text}")
    if chosen.init.learn_steps:
        return Verdict("changes", "The maps begin as those of the two rules, and are trained before they are applied.")
    return judged[0] if len(judged) == 1 else Verdict("keeps", f"So do all {len(judged)} growths.")


def rules_of(chosen: Chosen) -> dict[str, Verdict]:
    """Each rule by itself: a width rule at small's depth, a depth rule at small's width."""
    found = {}
    for kind, target in (("width", chosen.wide), ("depth", chosen.deep)):
        for rule in OPERATORS[kind]:  # type: ignore[index]
            init = GrowInit.model_validate({"parent": "small", kind: rule.key})
            found[f"{kind}_{rule.key}"] = _verdict(chosen, chosen.small, target, init)
    return found


def _verdict(
    chosen: Chosen, parent: Shape, child: Shape, init: GrowInit, spec: ExperimentSpec | None = None
) -> Verdict:
    try:
        found = _plan(chosen, parent, child, init, spec)
    except GrowthError as error:
        return Verdict("impossible", f"{error.message[:1].upper()}{error.message[1:]}.")
    return Verdict("keeps" if found.preserves else "changes", reason(found))


def _plan(chosen: Chosen, parent: Shape, child: Shape, init: GrowInit, spec: ExperimentSpec | None) -> GrowthPlan:
    d_vocab = spec.data.tokenizer.d_vocab if spec else None
    if d_vocab is None:  # how many tokens there are changes nothing but what is said of further ones
        init = init.model_copy(update={"d_vocab": None})
    n_positions = spec.train.n_ctx if spec else 1
    sizes: dict[str, Any] = {"n_positions": n_positions, "d_vocab": d_vocab or 1, "tied": chosen.tied}
    return plan(chosen.family, parent, child, init if spec else init.model_copy(update={"n_positions": None}), **sizes)


def advice_of(chosen: Chosen) -> Advice | None:
    """What is recommended for these shapes; None where nothing grows one into the other."""
    try:
        return recommend(chosen.family, chosen.small, chosen.large)
    except GrowthError:
        return None


def costs_of(chosen: Chosen, n_ctx: int, d_vocab: int | None) -> dict[str, Cost]:
    """What wider, deeper, and both add to small; nothing for a half that does not grow."""
    found = {}
    for half, shape in (("width", chosen.wide), ("depth", chosen.deep), ("both", chosen.large)):
        if all(getattr(shape, name) == getattr(chosen.small, name) for name in Shape.model_fields if "eps" not in name):
            continue
        if d_vocab is None:
            found[half] = Cost(None, None)
            continue
        small, grown = (
            (
                parameters(chosen.family, each, n_ctx, d_vocab, chosen.tied).total,
                flops_per_token(chosen.family, each, n_ctx, d_vocab, chosen.tied),
            )
            for each in (chosen.small, shape)
        )
        found[half] = Cost(grown[0] - small[0], grown[1] / small[1])
    return found


def _learning_flops(chosen: Chosen, spec: ExperimentSpec) -> float | None:
    if not chosen.init.learn_steps or spec.data.tokenizer.d_vocab is None:
        return None
    try:
        plans = [_plan(chosen, a, b, chosen.init, spec) for a, b in chosen.growths]
    except GrowthError:
        return None
    steps, train = chosen.init.learn_steps, spec.train
    return sum(learned.flops(each, steps, train.tokens_per_step, train.n_ctx) for each in plans)


def _growing_seconds(budgets: dict[str, ModelBudget], host: Host | None) -> float | None:
    """Of growing scaled, without learning: by what the newest growths took there, or a guess."""
    scaled = budgets.get("scaled")
    if scaled is None or scaled.parameters is None:
        return None
    there = Q(host=host) if host else Q(host__kind=Host.Kind.LOCAL)
    newest = ModelRun.objects.filter(there, grown__isnull=False, prepared__isnull=False).order_by("-started_at")
    paces = [
        prepared["parameters"] / grown["seconds"]
        for grown, prepared in newest.values_list("grown", "prepared")[:MEASURED_RUNS]
        if grown and prepared and grown.get("seconds") and prepared.get("parameters")
    ]
    return scaled.parameters / (statistics.median(paces) if paces else GUESSED_GROWN_PER_SECOND)


def _flops_per_step(budget: ModelBudget) -> float | None:
    return budget.flops / budget.steps if budget.flops and budget.steps else None


def _timed(budget: ModelBudget, speed: Speed) -> ModelBudget:
    seconds = None if budget.flops is None else budget.flops / speed.flops_per_second
    return replace(budget, seconds=seconds)


# Warnings, ratios, time -----------------------------------------------------------------------------------------------


def _cost(host: Host | None, budgets: list[ModelBudget], speed: Speed | None) -> float | None:
    """Each run for its time at the host's price; those that train at once are not cheaper for that."""
    if host is None or host.price_per_hour is None or speed is None:
        return None
    seconds = [budget.seconds for budget in budgets]
    if any(each is None for each in seconds):
        return None
    return float(host.price_per_hour) * sum((each or 0.0) + speed.besides for each in seconds) / 3600


def _memory_warnings(budgets: list[ModelBudget], memory: int | None, host: Host | None, places: int) -> list[str]:
    if not memory:
        return []
    where = f"{host} has" if host else "this machine has"
    on_gpus = host is not None and most_gpus(host) is not None
    too_large = [b for b in budgets if (b.memory_bytes or 0) > memory]
    if too_large:
        return [
            f"{b.name} needs about {filesize_short(b.memory_bytes)}: {where} {filesize_short(memory)}. "
            "A smaller batch_size, n_ctx or shape would fit."
            for b in too_large
        ]
    together = sum(sorted((b.memory_bytes or 0 for b in budgets), reverse=True)[:places])
    if together > memory and not on_gpus:  # each has a GPU of its own
        return [
            f"Runs that train at once need about {filesize_short(together)} together: {where} {filesize_short(memory)}."
        ]
    return []


def _plan_warnings(budgets: list[ModelBudget]) -> list[str]:
    return [f"{b.name}: {warning}" for b in budgets if b.growth for warning in b.growth.warnings]


def _unknown(spec: ExperimentSpec, budgets: list[ModelBudget]) -> str:
    if all(budget.parameters for budget in budgets):
        return ""
    if spec.data.tokenizer.d_vocab is None:
        return "Sizes are known once the tokenizer was fetched; with its d_vocab they are counted now."
    return "What is missing is known once the checkpoint was read; with small's dimensions it is said now."


def _ratios(budgets: list[ModelBudget]) -> list[str]:
    """How the models stand to each other: what an honest comparison has to know."""
    by_name = {b.name: b for b in budgets}
    small = by_name.get("small")
    large = by_name.get("large") or by_name.get("scaled")
    if not small or not large or not small.parameters or not large.parameters:
        return []
    hint = f"{large.name} is {large.parameters / small.parameters:.1f} × small"
    if small.non_embedding_parameters and large.non_embedding_parameters:
        hint += f" ({large.non_embedding_parameters / small.non_embedding_parameters:.1f} × without embeddings)"
    hints = [f"{hint}."]
    if small.flops and large.flops:
        hints.append(f"Training small costs {percent(small.flops / large.flops)} of {large.name}'s FLOPs.")
    return hints


def _until_finished(spec: ExperimentSpec, budgets: dict[str, ModelBudget], besides: float, places: int) -> float | None:
    """Seconds until the last model has finished: so many at a time as there are places, a child after its parent."""
    ends: dict[str, float] = {}
    free = [0.0] * max(1, places)
    for name in spec.order():
        seconds = budgets[name].seconds
        if seconds is None:
            return None
        parent = spec.models[name].parent
        start = max(heapq.heappop(free), ends[parent] if parent else 0.0)
        ends[name] = start + besides + seconds
        heapq.heappush(free, ends[name])
    return max(ends.values(), default=None)
