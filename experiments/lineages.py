"""How a larger model was made, as a picture: what a :class:`trainer.growth.lineage.Lineage` says, laid out to be drawn.

pictures(spec)          for each grown model, one picture for each growth that it goes through; before anything runs
drawn(lineage, ...)     one picture, of a lineage from wherever

Everything is in numbers and words; the templates set them down. Kinds differ in pattern, not in colour alone: solid is
the parent's, stripes are copies, dots are new, an outline alone is silent or a constant.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from experiments.curves import Memory
from trainer import budget
from trainer.growth.lineage import AxisLineage, BlockKind, Kind, Lineage, TensorLineage, lineage
from trainer.spec import ExperimentSpec

#: Units of a drawing: its width, and the two columns of blocks; the child's is COLUMN wide.
WIDTH, LEFT, RIGHT, COLUMN = 360.0, 40.0, 208.0, 112.0
#: A block is at most so high, and all of them together.
BLOCK, HEIGHT, EDGE = 22.0, 560.0, 6.0
#: Links that are drawn, rows of blocks that are listed, pieces of a bar.
MOST_LINKS, MOST_ROWS, MOST_PIECES = 200, 200, 24

PATTERNS: dict[str, str] = {
    "copied": "solid",
    "repeated": "stripes",
    "split": "stripes",
    "averaged": "grid",
    "random": "dots",
    "silent": "dashed",
    "zero": "outline",
    "one": "outline",
}

BLOCK_WORDS: dict[BlockKind, str] = {
    "copied": "continues the parent’s block",
    "repeated": "the same block once more",
    "silent": "a copy that writes nothing yet",
    "random": "new, drawn at random",
}

#: What a share of all parameters is; constants are told of together.
KIND_WORDS: dict[str, str] = {
    "copied": "copied",
    "split": "copied, and shared among copies by what reads them",
    "averaged": "mean of what is old",
    "random": "drawn at random",
    "silent": "zero, to keep a new block silent",
    "constant": "zero, or one for the gain of a norm",
}

#: The short word for each kind in a table.
KIND_NAMES: dict[Kind, str] = {
    "copied": "copied",
    "split": "split",
    "averaged": "mean",
    "zero": "zero",
    "one": "one",
    "random": "random",
    "silent": "silent",
}

#: Axes by a word or two, and by what one index is.
AXIS_NAMES: dict[str, str] = {
    "embed": "d_model",
    "mlp": "d_mlp",
    "q_head": "query heads",
    "kv_head": "key/value heads",
    "q_dim": "d_head (queries)",
    "k_dim": "d_head (keys)",
    "v_dim": "d_head (values)",
}
AXIS_WORDS: dict[str, str] = {
    "embed": "channels of the residual stream (d_model)",
    "mlp": "hidden units of each MLP (d_mlp)",
    "q_head": "query heads",
    "kv_head": "key/value heads",
    "q_dim": "channels of a query (d_head)",
    "k_dim": "channels of a key (d_head)",
    "v_dim": "channels of a value (d_head)",
    "q_normed": "channels of a query after its norm",
    "k_normed": "channels of a key after its norm",
    "vocab": "tokens",
    "position": "learned positions",
}

_WRITTEN = {"zero": "hold zeros", "random": "are drawn at random", "mean": "hold the mean of the old ones"}
_READ = {"zero": "read by zeros", "random": "read at random"}


class Piece(NamedTuple):
    """A stretch of a bar; `at` and `long` in percent of its length."""

    pattern: str
    at: float
    long: float
    old: bool = False  # what the parent has


@dataclass(frozen=True)
class Bar:
    """One axis, from the parent's size to the child's."""

    title: str
    small: int
    large: int
    words: str
    pieces: tuple[Piece, ...]


class Label(NamedTuple):
    x: float
    y: float
    text: str
    end: bool  # set flush with its end


class Shapes(NamedTuple):
    """All blocks, or all links, of one kind, as one path."""

    kind: BlockKind
    pattern: str
    path: str


@dataclass(frozen=True)
class Blocks:
    """The parent's blocks beside the child's, lowest at the bottom, joined by links."""

    height: float
    parent: str  # a path
    child: tuple[Shapes, ...]
    links: tuple[Shapes, ...]
    labels: tuple[Label, ...]
    all_links: bool
    dense: bool  # blocks so low that their edges must be thin


class BlockRow(NamedTuple):
    """Blocks of the child in a row that continue blocks of the parent in a row."""

    blocks: str
    source: str
    words: str


class Part(NamedTuple):
    """What a share of the parameters is."""

    pattern: str
    words: str
    share: float


@dataclass(frozen=True)
class TensorRow:
    name: str
    blocks: str
    shape: str
    source: str
    made_of: tuple[tuple[str, float], ...]  # kind, share
    noise: float
    above: float


@dataclass(frozen=True)
class Picture:
    """One growth."""

    key: str  # for ids
    parent: str  # names
    child: str
    step: int  # of training of the child, before which it grows
    lineage: Lineage
    says: str
    blocks: Blocks
    block_kinds: tuple[tuple[str, str], ...]  # pattern, words
    rows: tuple[BlockRow, ...]
    rows_left_out: int
    bars: tuple[Bar, ...]
    bar_kinds: tuple[tuple[str, str], ...]
    unchanged: str
    parts: tuple[Part, ...]
    whole: tuple[Piece, ...]
    noise: float  # the share of all parameters to which noise was added
    tensors: tuple[TensorRow, ...]

    @property
    def title(self) -> str:
        return f"{self.child} grows after {self.step:,} steps" if self.step else f"{self.child} from {self.parent}"

    @property
    def parameters(self) -> int:
        return self.lineage.entries


_MADE: Memory[dict[str, tuple[Picture, ...]]] = Memory(64)


def pictures(spec: ExperimentSpec) -> dict[str, tuple[Picture, ...]]:
    """For each grown model, by name, its growths in order; none where sizes are known only once something was read."""
    asked = [spec.model_dump(mode="json", include={"models", "train", "data"})]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    known = _MADE.get(key)
    if known is None:
        known, all_known = {}, True
        for name, model in budget.sheet(spec).items():
            parent = spec.models[name].parent
            if parent is None:
                continue
            steps = [stage.begin for stage in budget.stages(spec.models[name], 0)]
            all_known &= len(model.growths) == len(steps)
            known[name] = tuple(
                drawn(lineage(plan), name, parent if at == 0 else name, steps[at], at)
                for at, plan in enumerate(model.growths)
                if plan.d_vocab > 1  # what is not known is taken for one
            )
            all_known &= len(known[name]) == len(steps)
        if all_known:
            _MADE.put(key, known)
    return known


def of_events(name: str, events: Iterable[dict[str, Any]]) -> tuple[Picture, ...]:
    """From what `grown` events of the model `name` said, which a trainer elsewhere may have written."""
    found = list[Picture]()
    for event in events:
        try:
            told = Lineage.model_validate(event.get("lineage"))
        except ValidationError:
            continue
        found.append(drawn(told, name, str(event.get("parent", "")), int(event.get("step", 0)), len(found)))
    return tuple(found)


def drawn(told: Lineage, child: str, parent: str, step: int = 0, at: int = 0) -> Picture:
    """The picture of one growth: number `at` of the model `child`, after `step` steps of its training."""
    rows = list(_rows(told))
    kinds = dict.fromkeys(block.kind for block in told.blocks)
    parts = _parts(told)
    bars = [_bar(axis) for axis in told.axes if axis.small != axis.large]
    entries = told.entries
    return Picture(
        key=f"{re.sub('[^a-z0-9_-]+', '-', child.lower())}-{at}",  # ids are listed with spaces between
        parent=parent,
        child=child,
        step=step,
        lineage=told,
        says=_says(told),
        blocks=_drawn_blocks(told),
        block_kinds=tuple((PATTERNS[kind], BLOCK_WORDS[kind]) for kind in BLOCK_WORDS if kind in kinds),
        rows=tuple(rows[:MOST_ROWS]),
        rows_left_out=max(0, len(rows) - MOST_ROWS),
        bars=tuple(bars),
        bar_kinds=tuple(
            (pattern, words)
            for pattern, words in (("solid", "old"), ("stripes", "copies"), ("dots", "new"))
            if any(piece.pattern == pattern for bar in bars for piece in bar.pieces)
        ),
        unchanged=_unchanged(told),
        parts=parts,
        whole=_in_a_row([(part.pattern, part.share, False) for part in parts]),
        noise=sum(tensor.noise * tensor.entries for tensor in told.tensors) / entries if entries else 0.0,
        tensors=tuple(_tensor(tensor) for tensor in told.tensors),
    )


# Blocks ---------------------------------------------------------------------------------------------------------------


def _drawn_blocks(told: Lineage) -> Blocks:
    small, large = told.parent.n_layers, len(told.blocks)
    unit = min(BLOCK, HEIGHT / max(small, large, 1))
    gap = 3.0 if unit >= 12 else 1.5 if unit >= 4 else 0.0
    height = unit * max(small, large) + 2 * EDGE
    narrow = max(COLUMN * min(1.0, told.parent.d_model / told.child.d_model), 16.0)

    def top(block: int) -> float:
        return height - EDGE - (block + 1) * unit + gap / 2

    def rectangle(x: float, wide: float, block: int) -> str:
        return f"M{x:.1f} {top(block):.1f}h{wide:.1f}v{unit - gap:.1f}h{-wide:.1f}z"

    shapes: dict[BlockKind, list[str]] = {}
    links: dict[BlockKind, list[str]] = {}
    stride = -(-large // MOST_LINKS)
    middle = (unit - gap) / 2
    start, end = LEFT + narrow + 3, RIGHT - 3
    bend = (start + end) / 2
    for block, (kind, source) in enumerate((b.kind, b.source) for b in told.blocks):
        shapes.setdefault(kind, []).append(rectangle(RIGHT, COLUMN, block))
        if source is not None and source < small and block % stride == 0:
            y, to = top(source) + middle, top(block) + middle
            links.setdefault(kind, []).append(
                f"M{start:.1f} {y:.1f}C{bend:.1f} {y:.1f} {bend:.1f} {to:.1f} {end:.1f} {to:.1f}"
            )
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n * unit >= 12)
    labels = [Label(LEFT - 5, top(b) + middle, str(b), True) for b in range(0, small, every)]
    labels += [Label(RIGHT + COLUMN + 5, top(b) + middle, str(b), False) for b in range(0, large, every)]
    return Blocks(
        height=round(height, 1),
        parent="".join(rectangle(LEFT, narrow, block) for block in range(small)),
        child=tuple(Shapes(kind, PATTERNS[kind], "".join(paths)) for kind, paths in shapes.items()),
        links=tuple(Shapes(kind, PATTERNS[kind], "".join(paths)) for kind, paths in links.items()),
        labels=tuple(labels),
        all_links=stride == 1,
        dense=unit < 12,
    )


def _rows(told: Lineage) -> Iterable[BlockRow]:
    first = 0
    blocks = told.blocks
    for at in range(1, len(blocks) + 1):
        before = blocks[at - 1]
        if at < len(blocks):
            here = blocks[at]
            follows = here.source == (None if before.source is None else before.source + 1)
            if here.kind == before.kind and follows:
                continue
        begin = blocks[first].source
        source = "none" if begin is None or before.source is None else _span(begin, before.source)
        yield BlockRow(_span(first, at - 1), source, BLOCK_WORDS[before.kind])
        first = at


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _says(told: Lineage) -> str:
    """What happens to the blocks, in a sentence."""
    small, large = told.parent.n_layers, len(told.blocks)
    if small == large and all(block.kind == "copied" for block in told.blocks):
        return f"All {small:,} blocks are kept; each becomes wider." if _widens(told) else f"All {small:,} blocks stay."
    counts = {kind: sum(block.kind == kind for block in told.blocks) for kind in BLOCK_WORDS}
    parts = [
        _counted(counts["repeated"], "runs once more", "run once more"),
        _counted(counts["silent"], "is a copy that writes nothing yet", "are copies that write nothing yet"),
        _counted(counts["random"], "is drawn at random", "are drawn at random"),
    ]
    kept = _counted(counts["copied"], "continues the parent’s", "continue the parent’s")
    listed = ", ".join(part for part in [kept, *parts] if part)
    return f"{small:,} {'blocks become' if small > 1 else 'block becomes'} {large:,}: {listed}."


def _counted(n: int, one: str, several: str) -> str:
    return f"{n:,} {one if n == 1 else several}" if n else ""


def _widens(told: Lineage) -> bool:
    return any(axis.small != axis.large for axis in told.axes)


# Axes -----------------------------------------------------------------------------------------------------------------


def _bar(axis: AxisLineage) -> Bar:
    return Bar(AXIS_WORDS.get(axis.axis, axis.axis), axis.small, axis.large, _axis_words(axis), _pieces(axis))


def _axis_words(axis: AxisLineage) -> str:
    found = []
    if axis.copied:
        found.append(f"{axis.copied:,} further {'copies' if axis.copied > 1 else 'copy'}{_how_often(axis)}")
    if axis.new:
        written, read = _WRITTEN.get(axis.new_write, axis.new_write), _READ.get(axis.new_read, axis.new_read)
        found.append(f"{axis.new:,} new, which {written} and are {read}")
    return "; ".join(found)


def _how_often(axis: AxisLineage) -> str:
    """In words, where all have equally many copies and the runs tell so."""
    times = axis.large // max(1, axis.small)
    tiled = all(run.source == 0 and run.count == axis.small and run.gap == 0 for run in axis.runs)
    if axis.new or axis.left_out or not tiled or axis.large != times * axis.small:
        return ""
    return f": each stands there {'twice' if times == 2 else f'{times} times'}"


def _pieces(axis: AxisLineage) -> tuple[Piece, ...]:
    """Where old ones, copies and new ones lie along the axis; each kind in one piece where there are too many."""
    found: list[tuple[str, float, bool]] = []
    seen = 0  # sources up to here have come; by every rule they come in order first
    for run in axis.runs:
        if run.source is None:
            found.append(("dots", run.count, False))
        elif run.each == 1 and run.gap == 0:
            old = max(0, run.source + run.count - max(seen, run.source))
            found += [("stripes", run.count - old, False), ("solid", old, True)]
            seen = max(seen, run.source + run.count)
        else:
            break
        if len(found) > 2 * MOST_PIECES:
            break
    merged: list[tuple[str, float, bool]] = []
    for piece in found:
        if piece[1] and merged and merged[-1][0] == piece[0]:
            merged[-1] = (piece[0], merged[-1][1] + piece[1], piece[2])
        elif piece[1]:
            merged.append(piece)
    sums = {pattern: sum(n for p, n, _ in merged if p == pattern) for pattern in ("solid", "stripes", "dots")}
    true = {"solid": axis.large - axis.copied - axis.new, "stripes": axis.copied, "dots": axis.new}
    if sums != true or len(merged) > MOST_PIECES:
        merged = [(pattern, n, pattern == "solid") for pattern, n in true.items() if n]
    return _in_a_row([(pattern, n / max(1, axis.large), old) for pattern, n, old in merged])


def _in_a_row(lengths: Sequence[tuple[str, float, bool]]) -> tuple[Piece, ...]:
    found, at = [], 0.0
    for pattern, long, old in lengths:
        found.append(Piece(pattern, round(100 * at, 3), round(100 * long, 3), old))
        at += long
    return tuple(found)


def _unchanged(told: Lineage) -> str:
    named = [(AXIS_WORDS.get(axis.axis, axis.axis), axis) for axis in told.axes if axis.small == axis.large]
    heads = ("q_dim", "k_dim", "v_dim", "q_normed", "k_normed", "position")
    listed = [f"{AXIS_NAMES.get(axis.axis, words)} {axis.large:,}" for words, axis in named if axis.axis not in heads]
    if told.parent.d_head == told.child.d_head:
        listed.append(f"d_head {told.child.d_head:,}")
    return ", ".join(listed)


def _parts(told: Lineage) -> tuple[Part, ...]:
    shares: dict[str, float] = dict(told.shares.items())
    constant = shares.pop("zero", 0.0) + shares.pop("one", 0.0)
    found = [Part(PATTERNS[kind], words, shares[kind]) for kind, words in KIND_WORDS.items() if kind in shares]
    return tuple([*found, Part("outline", KIND_WORDS["constant"], constant)] if constant else found)


# Tensors --------------------------------------------------------------------------------------------------------------


def _tensor(tensor: TensorLineage) -> TensorRow:
    return TensorRow(
        name=tensor.name,
        blocks=", ".join(_span(first, last) for first, last in tensor.blocks[:12])
        + (", ..." if len(tensor.blocks) > 12 else ""),
        shape=" × ".join(f"{length:,}" for length in tensor.shape),
        source=tensor.source or "",
        made_of=tuple((KIND_NAMES[kind], share) for kind, share in tensor.shares.items()),
        noise=tensor.noise,
        above=tensor.above,
    )
