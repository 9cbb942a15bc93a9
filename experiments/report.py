"""What an experiment's page says, section by section: figures already written, so that the template only lays them out.

Everything is computed when first asked for and in a fixed number of queries, however many models there are.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from django.db.models import Max, Q

from experiments import compare, lineages, sources
from experiments.curves import Key, Series, curves
from experiments.lineages import Picture
from experiments.models import Note, Point
from experiments.parting import Parting, parting
from experiments.standing import Promise, RunStanding, Standing, compared, promise
from experiments.templatetags import figures
from trainer.shape import GrowInit
from trainer.spec import ExperimentSpec, ModelSpec

#: Rows of the table that stands for a chart.
TABLE_ROWS = 40
#: Samples and warnings that a page looks at: the newest.
NOTES = 1000
#: Growths and measurements of copies that it looks at.
GROWTH_NOTES = 5000


class Row(NamedTuple):
    """A line of a table: what, its unit, and a cell for each model."""

    what: str
    unit: str
    cells: list[str]


class Group(NamedTuple):
    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Making:
    """How a model was made, or will be: its growths, none where they are not known yet."""

    name: str
    colour: str
    parent_colour: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Growth:
    """What a growth did, measured; the last one of a model with what became of the copies."""

    name: str
    colour: str
    event: dict[str, Any]
    promise: Promise
    parting: Parting | None = None


@dataclass(frozen=True)
class Sample:
    prompt: str
    texts: list[tuple[RunStanding, int, str]]  # model, step, continuation


@dataclass(frozen=True)
class Table:
    """The curves of one split as figures: for each step, a loss and a perplexity for each model."""

    split: str
    models: list[RunStanding]
    rows: list[tuple[int, int, list[tuple[str, str]]]]  # step, tokens, cells
    shown: int
    total: int


class Report:
    SPLITS = ("validation", "train", "test")
    FIGURES = (
        ("loss", "loss"),
        ("perplexity", "perplexity"),
        ("bits_per_byte", "bits per byte"),
        ("accuracy", "accuracy"),
    )
    AXES = (("step", "steps"), ("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "training seconds"))
    SECTIONS = (
        "head",
        "verdict",
        "progress",
        "machines",
        "table",
        "making",
        "growth",
        "samples",
        "data",
        "setup",
        "log",
        "files",
    )

    def __init__(self, standing: Standing, split: str = "") -> None:
        self.standing = standing
        self.models = standing.runs
        self.split = split if split in self.SPLITS else "validation"

    @cached_property
    def spec(self) -> ExperimentSpec:
        return self.standing.experiment.spec

    @property
    def charged(self) -> str:
        """Whose cost "charge" counts, in words: those that others were grown from."""
        parents = list(dict.fromkeys(each.parent for each in self.models if each.parent))
        return f"{parents[0]}’s" if len(parents) == 1 else ""

    @cached_property
    def series(self) -> dict[Key, Series]:
        return curves([each.run for each in self.models], {each.name: each.total for each in self.models})

    # Verdict ----------------------------------------------------------------------------------------------------------

    @cached_property
    def verdicts(self) -> list[compare.Verdict]:
        runs = [each.run for each in self.models]
        tokens = {name: point.n_tokens for (name, split), point in self._last.items() if split == "validation"}
        return compare.verdicts(compared(self.spec, runs, self.series, tokens))

    # Comparison -------------------------------------------------------------------------------------------------------

    @cached_property
    def _last(self) -> dict[Key, Point]:
        """The newest evaluation of each model on each split."""
        keys = {each.run.pk: each.name for each in self.models}
        newest = (
            Point.objects.filter(run__in=keys, split__in=("validation", "test"))
            .order_by()
            .values_list("run", "split")
            .annotate(step=Max("step"))
        )
        wanted = Q(pk__in=())
        for run, split, step in newest:
            wanted |= Q(run=run, split=split, step=step)
        return {(keys[point.run_id], point.split): point for point in Point.objects.filter(wanted)}

    @cached_property
    def comparison(self) -> list[Group]:
        groups = [
            Group("On the test split, at the end", self._quality("test")),
            Group("On the validation split, newest", self._quality("validation")),
            Group("What it took", self._costs()),
        ]
        known = [
            Group(title, [row for row in rows if any(cell != figures.MISSING for cell in row.cells)])
            for title, rows in groups
        ]
        return [group for group in known if group.rows]

    def _quality(self, split: str) -> list[Row]:
        def row(what: str, unit: str, field: str, write: Callable[[Any], str]) -> Row:
            points = [self._last.get((each.name, split)) for each in self.models]
            return Row(what, unit, [write(getattr(point, field)) if point else figures.MISSING for point in points])

        return [
            row("Cross-entropy", "nats a token", "cross_entropy", figures.loss),
            row("Perplexity", "", "cross_entropy", figures.perplexity),
            row("Bits per byte", "", "bits_per_byte", figures.loss),
            row("Next-token accuracy", "", "accuracy", lambda share: figures.percent(share)),
            row("Computed on", "tokens", "n_tokens", figures.count),
        ]

    def _costs(self) -> list[Row]:
        def row(what: str, unit: str, field: str, write: Callable[[Any], str], *, zero: bool = False) -> Row:
            values = [getattr(each.run, field) for each in self.models]
            return Row(what, unit, [write(value) if value or zero else figures.MISSING for value in values])

        return [
            row("Parameters", "", "parameters", figures.si),
            row("Without embeddings", "", "non_embedding_parameters", figures.si),
            row("Steps", "", "step", figures.count),
            row("Tokens", "", "tokens", figures.si),
            row("Compute", "FLOPs", "flops", figures.flops),
            row("Training time", "", "train_seconds", figures.duration),
            Row("Evaluation time", "", [self._finished(each, "eval_seconds") for each in self.models]),
            Row("Set-up time", "", [self._finished(each, "setup_seconds") for each in self.models]),
            row("Speed", "tokens/s", "tokens_per_second", figures.count),
            row("Peak memory", "", "peak_memory_bytes", figures.filesize_short),
        ]

    @staticmethod
    def _finished(each: RunStanding, field: str) -> str:
        return figures.duration((each.run.finished or {}).get(field))

    # Growth, samples, warnings ----------------------------------------------------------------------------------------

    @cached_property
    def making(self) -> list[Making]:
        planned = lineages.pictures(self.spec)
        colours = {each.name: each.colour for each in self.models}
        return [
            Making(
                each.name,
                each.colour,
                colours.get(each.parent, each.colour),
                planned.get(each.name) or lineages.of_events(each.name, self._grown(each)),
            )
            for each in self.models
            if self.spec.models[each.name].parent
        ]

    @cached_property
    def growth(self) -> list[Growth]:
        found = []
        for each in self.models:
            grown = self._grown(each)
            device = (each.run.prepared or {}).get("device")
            found += [Growth(each.name, each.colour, event, promise(event, device)) for event in grown]
            if grown:
                found[-1] = replace(found[-1], parting=parting(self._measured(each)))
        return found

    def _grown(self, each: RunStanding) -> list[dict[str, Any]]:
        """What was said of its growths, in order; of one that was repeated after a resume, what was said last."""
        said = [note.data for note in self._growth_notes if note.kind == "grown" and note.run_id == each.run.pk]
        by_step = {event.get("step", 0): event for event in said or [each.run.grown or {}] if event}
        return [by_step[step] for step in sorted(by_step)]

    def _measured(self, each: RunStanding) -> list[tuple[int, list[dict[str, Any]]]]:
        return [
            (note.data.get("step", 0), note.data["symmetry"])
            for note in self._growth_notes
            if note.run_id == each.run.pk and note.data.get("symmetry")
        ]

    @cached_property
    def _growth_notes(self) -> list[Note]:
        runs = [each.run.pk for each in self.models if each.run.grown]
        if not runs:
            return []
        notes = Note.objects.filter(run__in=runs, kind__in=("grown", "symmetry"))
        return sorted(notes.order_by("-seq")[:GROWTH_NOTES], key=lambda note: note.seq)

    @cached_property
    def _notes(self) -> list[Note]:
        runs = [each.run.pk for each in self.models]
        notes = Note.objects.filter(run__in=runs, kind__in=("sample", "warning"))
        newest = list(notes.select_related("run").order_by("-at", "-seq")[:NOTES])
        return sorted(newest, key=lambda note: (note.run.position, note.seq))

    @cached_property
    def samples(self) -> list[Sample]:
        """The newest continuation of each prompt by each model, side by side."""
        by_run = {each.run.pk: each for each in self.models}
        newest: dict[str, dict[int, tuple[int, str]]] = {}
        for note in self._notes:
            if note.kind == "sample":
                newest.setdefault(note.data["prompt"], {})[note.run_id] = (note.data["step"], note.data["text"])
        return [
            Sample(prompt, [(by_run[run], step, text) for run, (step, text) in texts.items()])
            for prompt, texts in newest.items()
        ]

    @cached_property
    def warnings(self) -> list[tuple[str, str]]:
        names = {each.run.pk: each.name for each in self.models}
        return [(names[note.run_id], note.data["message"]) for note in self._notes if note.kind == "warning"]

    # The chart as a table ---------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> Table:
        split = {each.name: self.series[each.name, self.split] for each in self.models}
        longest = max(split.values(), key=lambda curve: len(curve.points), default=None)
        steps = _thinned([point.step for point in longest.points] if longest else [], TABLE_ROWS)
        stride = (steps[1] - steps[0]) if len(steps) > 1 else 1
        rows = []
        for step in steps:
            found = [_nearest(split[each.name], step, stride / 2) for each in self.models]
            tokens = next((point.tokens for point in found if point), 0)
            rows.append((step, tokens, [_cell(point) for point in found]))
        shown = sum(len(curve.points) for curve in split.values())
        return Table(self.split, self.models, rows, shown, sum(curve.total for curve in split.values()))

    # Set-up -----------------------------------------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> list[Row]:
        models = [self.spec.models[each.name] for each in self.models]
        rows = [
            Row("family", "", [model.family for model in models]),
            Row("first weights", "", [_first_weights(model) for model in models]),
        ]
        fields = ("d_model", "n_layers", "n_heads", "kv_heads", "d_head", "d_mlp", "layer_norm_eps")
        for field in fields:
            shown = [f"{getattr(m.shape, field):g}" if m.shape else "–" for m in models]
            rows.append(Row("n_kv_heads" if field == "kv_heads" else field, "", shown))
        rows.append(Row("init_range", "", [f"{getattr(model.init, 'init_range', '–')}" for model in models]))
        rows.append(Row("tied embeddings", "", ["yes" if model.tie_embeddings else "no" for model in models]))
        for field in sorted({field for model in models for field in model.train}):
            own = [self.spec.train_of(each.name).model_dump()[field] for each in self.models]
            rows.append(Row(field, "", [_plain(value) for value in own]))
        return rows

    @cached_property
    def settings(self) -> list[tuple[str, str]]:
        data, train = self.spec.data, self.spec.train.model_dump()
        tokenizer = data.tokenizer
        named = f"byte-level BPE, d_vocab {tokenizer.d_vocab:,}" if tokenizer.kind == "bpe" else tokenizer.name
        found = [
            ("source", sources.with_short_names(data.source)),
            ("config", data.config),
            ("text_column", data.text_column),
        ]
        found += [("tokenizer", named), ("validation_fraction", f"{data.validation_fraction:g}")]
        found += [("test_fraction", f"{data.test_fraction:g}")]
        found += [(name, _plain(value)) for name, value in train.items()]
        return [(name, value) for name, value in found if value is not None]

    @cached_property
    def versions(self) -> list[tuple[str, str]]:
        """Where and with what it ran, as the trainers said; more than one value if they differ."""
        facts: dict[str, list[str]] = {}
        for each in self.models:
            prepared = each.run.prepared or {}
            pairs = [(name, str(value)) for name, value in (prepared.get("versions") or {}).items()]
            for name in ("device_name", "precision", "threads", "seed", "data_fingerprint", "train_tokens"):
                if prepared.get(name) is not None:
                    pairs.append((name, _plain(prepared[name])))
            for name, value in pairs:
                if value not in facts.setdefault(name, []):
                    facts[name].append(value)
        return [(name, ", ".join(values)) for name, values in facts.items()]


def _thinned(steps: list[int], most: int) -> list[int]:
    """At most about `most` of `steps`, evenly, the last one among them."""
    stride = max(1, -(-len(steps) // most))
    kept = steps[::stride]
    return kept if not steps or kept[-1] == steps[-1] else [*kept, steps[-1]]


def _nearest(curve: Series, step: int, within: float) -> Any:
    points = curve.points
    at = bisect.bisect_left(points, step, key=lambda point: point.step)
    near = [point for point in points[max(0, at - 1) : at + 1] if abs(point.step - step) <= within]
    return min(near, key=lambda point: abs(point.step - step), default=None)


def _cell(point: Any) -> tuple[str, str]:
    if point is None:
        return figures.MISSING, figures.MISSING
    if point.loss is None:
        return "not finite", "not finite"
    return figures.loss(point.loss), figures.perplexity(point.loss)


def _first_weights(model: ModelSpec) -> str:
    init = model.init
    if isinstance(init, GrowInit):
        return f"grown from {init.parent}: {init.width}, {init.depth}"
    return "random" if init.kind == "random" else f"checkpoint {init.path}"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figures.learning_rate(value) if 0 < abs(value) < 0.01 else f"{value:g}"
    return ", ".join(map(_plain, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
