"""Did growing pay? From the curves of an experiment's models to a verdict that says only what holds.

A *pair* is a grown model and a model of the same family and shape trained from scratch. For each pair:

**Target.** The last validation loss of the scratch model, once that has trained to its end.

**Crossing.** Where the grown model's validation loss first reaches the target. Evaluations are noisy, so one at or
below the target counts only if the next one is there too; the last evaluation of a finished curve has no next one and
counts by itself. Between the evaluation before and the one that counts, the loss is taken to be a straight line over
the axis in question (tokens, FLOPs or seconds). Evaluations that are not finite are skipped, and confirm nothing.

**Share.** The axis at the crossing over the scratch model's whole; *charged* adds what all ancestors of the grown model
cost, each trained to its end. Under 1 something was saved.

**Gap.** Grown loss less scratch loss where both had used the same amount, charged or not: the last amount that both
curves cover. Negative: the grown model is better.

**Fairness.** What must be equal between the two for all this to mean anything, each with words: equal, not equal, or
not known yet.

Pure functions over plain values; any graph of models, not just small, scaled, large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = Literal["steps", "tokens", "flops", "seconds"]
AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds")
AXIS_WORDS: dict[str, str] = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "training seconds"}

#: Training settings that both models of a pair must share, and the words for them.
_TUNING = (
    "lr",
    "schedule",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
    "max_steps",
    "num_epochs",
)


@dataclass(frozen=True)
class Cost:
    """What training took: optimizer steps, tokens seen, training FLOPs, seconds in training steps."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )

    def on(self, axis: Axis) -> float:
        return float(getattr(self, axis))


@dataclass(frozen=True)
class Evaluation:
    """A validation loss in nats a token, and what training had cost by then. `loss` may be None or not finite."""

    at: Cost
    loss: float | None


@dataclass(frozen=True)
class Model:
    """One model of an experiment, as far as it has come."""

    name: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    init: Literal["random", "checkpoint", "grow"] = "random"
    parent: str | None = None
    shape: Any = None  # anything that is equal for models of the same family and shape, and only for them
    evaluations: Sequence[Evaluation] = ()
    cost: Cost = Cost()
    settings: Mapping[str, Any] = field(default_factory=dict)  # of training, this model's overrides applied
    why: str = ""  # why it failed or was stopped, in words
    fingerprint: str | None = None  # of the data
    eval_tokens: int | None = None  # that each validation loss was computed on
    device: str | None = None
    precision: str | None = None

    @property
    def finite(self) -> list[tuple[Cost, float]]:
        return [(e.at, e.loss) for e in self.evaluations if e.loss is not None and math.isfinite(e.loss)]

    @property
    def first_not_finite(self) -> Cost | None:
        return next((e.at for e in self.evaluations if e.loss is None or not math.isfinite(e.loss)), None)


@dataclass(frozen=True)
class Crossing:
    """What the grown model had used when it reached the target, and what of the scratch model's whole that is."""

    axis: Axis
    own: float
    charged: float | None  # None: an ancestor's cost is not known
    own_share: float | None  # None: the scratch model used nothing on this axis
    charged_share: float | None

    @property
    def words(self) -> str:
        return AXIS_WORDS[self.axis]

    @property
    def saving(self) -> float | None:
        return None if self.own_share is None else 1 - self.own_share

    @property
    def charged_saving(self) -> float | None:
        return None if self.charged_share is None else 1 - self.charged_share


@dataclass(frozen=True)
class Gap:
    """Losses where both models had used `at`. `difference` is grown less scratch: negative is better."""

    axis: Axis
    charged: bool
    at: float
    grown: float
    scratch: float

    @property
    def difference(self) -> float:
        return self.grown - self.scratch

    @property
    def words(self) -> str:
        return AXIS_WORDS[self.axis]


@dataclass(frozen=True)
class Check:
    """One line of the fairness ledger. `equal` is None while it is not known."""

    what: str
    equal: bool | None
    words: str

    @property
    def mark(self) -> str:
        return {True: "✓", False: "✗", None: "?"}[self.equal]


Outcome = Literal["reached", "never", "early", "none"]


@dataclass(frozen=True)
class Verdict:
    """What holds of one pair. `outcome` "none": no statement is possible, and `sentence` says why."""

    grown: str
    scratch: str | None
    outcome: Outcome
    sentence: str
    target: float | None = None
    crossings: tuple[Crossing, ...] = ()
    gaps: tuple[Gap, ...] = ()
    checks: tuple[Check, ...] = ()
    caveats: tuple[str, ...] = ()

    @property
    def is_fair(self) -> bool | None:
        """True if all that must be equal is, False if something is not, None while something is not known."""
        found = {check.equal for check in self.checks}
        return False if False in found else None if None in found or not found else True

    @property
    def unequal(self) -> list[Check]:
        return [check for check in self.checks if check.equal is False]


def verdicts(models: Sequence[Model]) -> list[Verdict]:
    """A verdict for each pair, in the order of the models.

    A grown model without a partner, such as a rung of a ladder, has none; if no grown model has one, each says so.
    """
    grown = [model for model in models if model.init == "grow"]
    found = [
        _verdict(model, other, models)
        for model in grown
        for other in models
        if other.init != "grow" and other.shape == model.shape
    ]
    return found or [_alone(model) for model in grown]


def ancestors(name: str, models: Sequence[Model]) -> list[Model]:
    """The models that `name` was grown from, nearest first. An unknown parent or a circle ends the list."""
    by_name = {model.name: model for model in models}
    found: list[Model] = []
    at = by_name[name].parent
    while at in by_name and at != name and all(at != model.name for model in found):
        assert at is not None
        found.append(by_name[at])
        at = by_name[at].parent
    return found


def ancestors_cost(name: str, models: Sequence[Model]) -> tuple[Cost, bool]:
    """What all ancestors cost together, and whether that is everything.

    It is not where one began from a checkpoint, whose own training nobody here paid for or measured.
    """
    found = ancestors(name, models)
    return sum((model.cost for model in found), Cost()), all(model.init != "checkpoint" for model in found)


def crossing(curve: Sequence[Evaluation], target: float, axis: Axis, *, ended: bool = True) -> float | None:
    """Where on `axis` the curve first reaches `target`, by the rule in this module's docstring; None if nowhere.

    `ended` says that no evaluation follows the last one, which then needs no confirmation.
    """
    before: tuple[float, float] | None = None
    for i, evaluation in enumerate(curve):
        loss = evaluation.loss
        if loss is None or not math.isfinite(loss):
            continue
        x = evaluation.at.on(axis)
        if loss <= target:
            following = curve[i + 1].loss if i + 1 < len(curve) else (target if ended else None)
            if following is not None and math.isfinite(following) and following <= target:
                if before is None or before[1] <= target:
                    return x
                return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = x, loss
    return None


def loss_at(model: Model, x: float, axis: Axis, *, shift: float = 0.0) -> float | None:
    """The loss at `x`, on a straight line between evaluations; None outside of them. `shift` moves the curve."""
    before: tuple[float, float] | None = None
    for at, loss in model.finite:
        here = at.on(axis) + shift
        if here == x:
            return loss
        if here > x:
            return None if before is None else before[1] + (loss - before[1]) * (x - before[0]) / (here - before[0])
        before = here, loss
    return None


def gap(grown: Model, scratch: Model, axis: Axis, charge: float | None = None) -> Gap | None:
    """Losses at the last amount on `axis` that both curves cover; `charge` is what the grown one's ancestors used."""
    shift = charge or 0.0
    ours, theirs = [at.on(axis) + shift for at, _ in grown.finite], [at.on(axis) for at, _ in scratch.finite]
    if not ours or not theirs:
        return None
    x = min(ours[-1], theirs[-1])
    a, b = loss_at(grown, x, axis, shift=shift), loss_at(scratch, x, axis)
    if a is None or b is None:
        return None
    return Gap(axis, charge is not None, x, a, b)


def _alone(grown: Model) -> Verdict:
    return Verdict(
        grown.name,
        None,
        "none",
        f"Nothing to hold {grown.name} against: no model of the same shape is trained from scratch here.",
    )


def _verdict(grown: Model, scratch: Model, models: Sequence[Model]) -> Verdict:
    charge, charge_known = ancestors_cost(grown.name, models)
    family = ancestors(grown.name, models)
    checks = fairness(grown, scratch)
    caveats = tuple(_caveats(grown, scratch, family))
    gaps = tuple(
        found
        for axis in AXES
        for by in ((None, charge.on(axis)) if charge_known and _settled(family) else (None,))
        if (found := gap(grown, scratch, axis, by)) is not None
    )

    def say(outcome: Outcome, sentence: str, **more: Any) -> Verdict:
        return Verdict(grown.name, scratch.name, outcome, sentence, gaps=gaps, checks=checks, caveats=caveats, **more)

    a, b = grown.name, scratch.name
    if scratch.state in ("failed", "cancelled"):
        return say("none", f"No verdict: {b} {_ended(scratch)}, so it has no final loss to be reached.")
    if scratch.state != "succeeded":
        return say("early", f"Too early to say: {b} {_still(scratch)}.{_so_far(grown, scratch)}")
    if not scratch.finite:
        return say("none", f"No verdict: {b} finished without a finite validation loss.")
    if not scratch.evaluations or scratch.finite[-1][0] != scratch.evaluations[-1].at:
        return say("none", f"No verdict: {b}'s last validation loss is not finite.")
    target = scratch.finite[-1][1]
    ended = grown.state not in ("queued", "running")
    crossings = []
    for axis in AXES:
        own = crossing(grown.evaluations, target, axis, ended=ended)
        if own is not None:
            crossings.append(_crossing(axis, own, charge if charge_known else None, scratch.cost))
    if crossings:
        return say(
            "reached",
            _reached(grown, scratch, crossings, family, charge_known, target),
            target=target,
            crossings=tuple(crossings),
        )
    if not ended:
        return say("early", f"Too early to say: {a} {_still(grown)}.{_so_far(grown, scratch)}", target=target)
    if not grown.finite:
        return say("none", f"No verdict: {a} {_ended(grown)} without a finite validation loss.", target=target)
    last = grown.finite[-1][1]
    if grown.state != "succeeded":
        return say("none", f"No verdict: {a} {_ended(grown)} before it reached {b}'s final loss.", target=target)
    return say(
        "never",
        f"{a} never reached {b}'s final loss: it ended at {last:.3f}, {b} at {target:.3f}.",
        target=target,
    )


def _crossing(axis: Axis, own: float, charge: Cost | None, whole: Cost) -> Crossing:
    total = whole.on(axis)
    charged = None if charge is None else own + charge.on(axis)
    return Crossing(
        axis,
        own,
        charged,
        own / total if total > 0 else None,
        charged / total if total > 0 and charged is not None else None,
    )


def _reached(
    grown: Model, scratch: Model, crossings: Sequence[Crossing], family: Sequence[Model], known: bool, target: float
) -> str:
    """Own cost in tokens; charged in FLOPs, because a small model's token costs less than a large one's."""
    by = {found.axis: found for found in crossings}
    a, b = grown.name, scratch.name
    tokens, flops = by["tokens"], by["flops"]
    share = tokens.own_share
    if tokens.own <= 0:
        sentence = f"{a} was at {b}'s final loss before its first step"
    elif share is None:
        sentence = f"{a} reached {b}'s final loss"
    else:
        sentence = f"{a} reached {b}'s final loss after {_percent(share)} of its tokens"
    whose = _possessive([model.name for model in family])
    if not known:
        sentence += f"; {whose} cost is not known, so it is not counted"
    elif not _settled(family):
        sentence += f"; {whose} cost is not final"
    elif flops.charged_share is not None and family:
        sentence += f"; {_percent(flops.charged_share)} of its FLOPs with {whose} cost counted"
        if flops.charged_share > 1:
            sentence += f", more than {b} took itself"
    if grown.state == "running":
        sentence += f". {a} is still training"
    elif grown.state != "succeeded":
        sentence += f". {a} {_ended(grown)} later"
    elif grown.finite[-1][1] > target:
        sentence += f". It did not stay there: it ended at {grown.finite[-1][1]:.3f}, {b} at {target:.3f}"
    return sentence + "."


def _caveats(grown: Model, scratch: Model, family: Sequence[Model]) -> Iterator[str]:
    for model in (grown, scratch):
        if (bad := model.first_not_finite) is not None:
            yield f"{model.name}'s validation loss was not finite at step {bad.steps:,}; such evaluations are left out."
    if scratch.state == "succeeded" and scratch.finite:
        best = min(loss for _, loss in scratch.finite)
        if scratch.finite[-1][1] > best * 1.005:
            yield (
                f"{scratch.name}'s loss rose at the end: best {best:.3f}, final {scratch.finite[-1][1]:.3f}. "
                "Its final loss is easier to reach than its best."
            )
    for model in family:
        if model.init == "checkpoint":
            yield f"{model.name} began from a checkpoint; what that cost to train is not counted."
    if len(grown.finite) < 5 or len(scratch.finite) < 5:
        yield "There are few evaluations, so the crossing is coarse."
    yield "One seed each: how much of the difference is luck is not known."


def fairness(grown: Model, scratch: Model) -> tuple[Check, ...]:
    """What must be equal for the comparison to mean something, and whether it is."""
    a, b = grown.settings, scratch.settings

    def same(what: str, left: Any, right: Any, equal: str, unequal: str = "{0} against {1}") -> Check:
        if left is None or right is None:
            return Check(what, None, "not known yet")
        if left == right:
            return Check(what, True, equal.format(_shown(left)))
        return Check(what, False, unequal.format(_shown(left), _shown(right)))

    batches = tuple(a.get(k) for k in ("n_ctx", "batch_size", "seed"))
    others = tuple(b.get(k) for k in ("n_ctx", "batch_size", "seed"))
    tuned = [key for key in _TUNING if a.get(key) != b.get(key)]
    done = grown.state == scratch.state == "succeeded"
    return (
        same("data", grown.fingerprint, scratch.fingerprint, "same text, split and tokens", "different data"),
        Check("batches", True, "same batches in the same order")
        if batches == others
        else Check("batches", False, "different batches, or in another order"),
        same("seed", a.get("seed"), b.get("seed"), "both {0}"),
        same("evaluation", grown.eval_tokens, scratch.eval_tokens, "both on {0} tokens", "on {0} and {1} tokens"),
        same("steps", grown.cost.steps, scratch.cost.steps, "both {0}")
        if done
        else Check("steps", None, "not known until both have finished"),
        Check("tuning", True, f"same learning rate ({_shown(a.get('lr'))}), schedule and optimizer settings")
        if not tuned
        else Check("tuning", False, "; ".join(f"{k} {_shown(a.get(k))} against {_shown(b.get(k))}" for k in tuned)),
        same("precision", grown.precision, scratch.precision, "both {0}"),
        same("device", grown.device, scratch.device, "both on {0}", "{0} against {1}: compare no seconds"),
    )


def _settled(models: Sequence[Model]) -> bool:
    return all(model.state == "succeeded" for model in models)


def _still(model: Model) -> str:
    return "has not started" if model.state == "queued" else "is still training"


def _ended(model: Model) -> str:
    steps = f" at step {model.cost.steps:,}" if model.cost.steps else ""
    verb = {"failed": "failed", "cancelled": "was stopped", "succeeded": "finished"}[model.state]
    return f"{verb}{steps}" + (f" ({model.why})" if model.why and model.state == "failed" else "")


def _so_far(grown: Model, scratch: Model) -> str:
    found = gap(grown, scratch, "tokens")
    if found is None or found.at <= 0:
        return ""
    if f"{found.grown:.3f}" == f"{found.scratch:.3f}":
        return f" So far both are at {found.grown:.3f} after the same tokens."
    better = grown.name if found.difference < 0 else scratch.name
    return (
        f" So far {better} is ahead after the same tokens: "
        f"{grown.name} {found.grown:.3f}, {scratch.name} {found.scratch:.3f}."
    )


def _percent(share: float) -> str:
    """Two digits or so, and never a rounded "100 %" or "0 %" for what is not that."""
    percent = share * 100
    if percent < 10 or 99 < percent < 101:
        return f"{percent:.1f} %"
    return f"{percent:.0f} %"


def _possessive(names: Sequence[str]) -> str:
    named = [f"{name}'s" for name in names]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1] if named else "its parent's"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
