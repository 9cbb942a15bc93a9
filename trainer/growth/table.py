"""Every family, rule and ratio, grown, read back and measured: `python -m trainer.growth.table` writes the table.

A cell is a growth of a tiny model with random weights, large enough ones that attention is far from uniform, no bias is
zero and no gain one. Parent and child go through the disk and are run by transformers on the same tokens; the child is
saved by transformers and read once more. Needs torch; minutes for all of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trainer.families import FAMILIES, build_model, get_family, read_config
from trainer.growth import OPERATORS, GrowthError, plan
from trainer.growth.apply import grow_checkpoint
from trainer.shape import GrowInit, Shape

COMMAND = "python -m trainer.growth.table"
PATH = Path(__file__).resolve().parents[2] / "docs" / "growth-table.md"

D_VOCAB, N_POSITIONS, SEED = 53, 24, 0
GPT2 = Shape(d_model=16, n_heads=4, d_head=4, d_mlp=24, n_layers=2)
NEOX = Shape(d_model=32, n_heads=4, d_head=8, d_mlp=24, n_layers=2)
LLAMA = Shape(d_model=16, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=24, n_layers=2)
PARENTS = {"gpt2": GPT2, "gpt_neox": NEOX}

Changes = Mapping[str, int]

WIDTHS: dict[str, dict[str, Changes]] = {
    "gpt2": {
        "all x2": {"d_model": 32, "n_heads": 8, "d_mlp": 48},
        "all x3": {"d_model": 48, "n_heads": 12, "d_mlp": 72},
        "all x1.5": {"d_model": 24, "n_heads": 6, "d_mlp": 36},
        "odd sizes": {"d_model": 30, "n_heads": 5, "d_head": 6, "d_mlp": 29},
        "d_model and heads": {"d_model": 20, "n_heads": 5},
        "d_model and d_head": {"d_model": 24, "d_head": 6},
        "d_mlp": {"d_mlp": 29},
    },
    "gpt_neox": {
        "all x2": {"d_model": 64, "n_heads": 8, "d_mlp": 48},
        "all x3": {"d_model": 96, "n_heads": 12, "d_mlp": 72},
        "all x1.5": {"d_model": 48, "n_heads": 6, "d_mlp": 36},
        "odd sizes": {"d_model": 60, "n_heads": 5, "d_head": 12, "d_mlp": 29},
        "d_model and heads": {"d_model": 40, "n_heads": 5},
        "d_model and d_head": {"d_model": 48, "d_head": 12},
        "d_mlp": {"d_mlp": 29},
    },
    "llama": {
        "all x2": {"d_model": 32, "n_heads": 8, "n_kv_heads": 4, "d_mlp": 48},
        "all x3": {"d_model": 48, "n_heads": 12, "n_kv_heads": 6, "d_mlp": 72},
        "all x1.5": {"d_model": 24, "n_heads": 6, "n_kv_heads": 3, "d_mlp": 36},
        "odd sizes": {"d_model": 18, "n_heads": 6, "d_head": 6, "d_mlp": 29},
        "d_model": {"d_model": 20},
        "heads": {"n_heads": 8},
        "key/value heads": {"n_kv_heads": 4},
        "d_head x2": {"d_head": 8},
        "d_head x1.5": {"d_head": 6},
        "d_mlp": {"d_mlp": 29},
    },
}

#: Columns of the widths' tables.
WIDTH_RULES: dict[str, dict[str, Any]] = {
    "duplicate": {"width": "duplicate"},
    "duplicate, uneven": {"width": "duplicate", "split": "uneven"},
} | {rule.key: {"width": rule.key} for rule in OPERATORS["width"] if rule.key != "duplicate"}

#: Columns of the depths' table: the rule, and the depth that the parent's two blocks become.
DEPTH_RULES: dict[str, tuple[dict[str, Any], Changes]] = {
    "identity, 2 to 3": ({"depth": "identity"}, {"n_layers": 3}),
    **{f"{rule.key}, 2 to 4": ({"depth": rule.key}, {"n_layers": 4}) for rule in OPERATORS["depth"]},
}

#: In float64, logits of kept functions differ by less than the first, of lost ones by more than the second.
ROUNDING, LOST = 1e-10, 1e-5

USUAL, EXACT, HALF = "float32", "float64", "bfloat16"


def widths_of(family: str) -> dict[str, Changes]:
    return WIDTHS.get(family, WIDTHS["llama"])


#: Columns of the third table: the rule, the changes, and the dtypes.
FURTHER: dict[str, tuple[dict[str, Any], str, Changes, tuple[str, ...]]] = {
    "all x2 and 2 to 4 blocks": ({"width": "duplicate"}, "all x2", {"n_layers": 4}, (EXACT, USUAL)),
    "all x2, no noise": ({"width": "duplicate", "snr_db": None}, "all x2", {}, (EXACT, USUAL)),
    "the same in bfloat16": ({"width": "duplicate", "snr_db": None}, "all x2", {}, (HALF,)),
    "8 tokens and 16 positions more": (
        {"d_vocab": D_VOCAB + 8, "n_positions": N_POSITIONS + 16},
        "",
        {"n_layers": 2},
        (EXACT, USUAL),
    ),
}


class Cell(NamedTuple):
    """A growth, tied and untied: the worse figure of the two where the function is kept, the better one where not."""

    preserves: bool  # as the plan says
    differences: dict[str, float]  # the largest |logit difference|, by dtype
    residual: float | None = None  # the certificate's largest, in float32
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return "–"
        if not self.preserves:
            return f"*{self.differences[EXACT]:.2g}*"
        return " · ".join(
            number(self.differences[dtype]) for dtype in (EXACT, USUAL, HALF) if dtype in self.differences
        )


def number(value: float) -> str:
    """One digit: the second of a rounding error is another one on another machine."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


class Bench:
    """Measures cells; parents and children lie in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._logits: dict[Path, Any] = {}

    def measure(
        self, family: str, changes: Changes, init: Mapping[str, Any], dtypes: tuple[str, ...] = (EXACT, USUAL)
    ) -> Cell:
        """Where the function is lost, float64 is enough. Raises ValueError where the plan is wrong of that."""
        preserves, differences, residual = True, dict[str, float](), None
        for tied in (True, False):
            for dtype in dtypes:
                parent = self.parent(family, tied, dtype)
                shape, n_positions, d_vocab, _ = get_family(family).shape_of(read_config(parent))
                to, wish = Shape(**{**shape.model_dump(), **changes}), GrowInit(parent="small", **init)
                try:
                    growth = plan(family, shape, to, wish, n_positions=n_positions, d_vocab=d_vocab, tied=tied)
                except GrowthError as error:
                    return Cell(False, {}, refused=str(error))
                preserves = growth.preserves
                if dtype == USUAL and not preserves:
                    continue
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    report = grow_checkpoint(parent, Path(scratch) / "child", growth, SEED, threads=1)
                    found = self.difference(parent, Path(scratch) / "child", dtype)
                if dtype == EXACT and (found > ROUNDING if preserves else found < LOST):
                    raise ValueError(
                        f"{family} {dict(changes)} {dict(init)}: preserves is {preserves}, but {found:.1e}"
                    )
                differences[dtype] = (max if preserves else min)(found, differences.get(dtype, found))
                if dtype == USUAL:
                    residual = max(report["residual"], residual or 0.0)
        return Cell(preserves, differences, residual)

    def parent(self, family: str, tied: bool, dtype: str) -> Path:
        out = self.folder / f"{family}-{tied}-{dtype}"
        if not out.exists():
            make_parent(out, family, tied, dtype)
        return out

    def difference(self, parent: Path, child: Path, dtype: str) -> float:
        """The largest |logit difference|, of the child as it was written and as transformers writes it again."""
        if parent not in self._logits:
            self._logits[parent] = logits(load(parent, dtype))
        model, again = load(child, dtype), child.with_name("again")
        model.save_pretrained(again)
        both = (logits(model), logits(load(again, dtype)))
        return max(float((self._logits[parent] - after).abs().max()) for after in both)


def make_parent(out: Path, family: str, tied: bool, dtype: str) -> None:
    """A model whose every number matters, of the same numbers in each dtype."""
    import torch

    torch.manual_seed(7)
    config = get_family(family).config(PARENTS.get(family, LLAMA), N_POSITIONS, D_VOCAB, tied)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(out)


def load(folder: Path, dtype: str) -> Any:
    """By transformers. Its norms and rotations compute in float32 always: in float64, by ones that do not."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    for module in model.modules() if dtype == EXACT else ():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = partial(_rotations, module, module.forward)
    return model


def _rms_norm(module: Any, x: Any) -> Any:
    from_one = not hasattr(module, "variance_epsilon")  # Gemma's norms, which call it eps
    eps = module.eps if from_one else module.variance_epsilon
    return (from_one + module.weight) * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def _rotations(module: Any, usual: Any, x: Any, position_ids: Any, layer_type: str | None = None) -> Any:
    """cos and sin of p theta^(-i / n) for each position p and pair i of n, twice side by side."""
    import torch

    kinds = module.config.rope_parameters
    rope = kinds if layer_type is None else kinds[layer_type]
    if rope["rope_type"] != "default":
        return usual(x, position_ids, *([] if layer_type is None else [layer_type]))
    pairs = len(module.inv_freq if layer_type is None else getattr(module, f"{layer_type}_inv_freq"))
    speeds = rope["rope_theta"] ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = (position_ids[..., None] * speeds).repeat(1, 1, 2)
    return angles.cos().to(x), angles.sin().to(x)


def logits(model: Any) -> Any:
    """[2, N_POSITIONS, D_VOCAB]: of a larger vocabulary the old tokens'."""
    import torch

    tokens = torch.randint(0, D_VOCAB, (2, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits[..., :D_VOCAB].double()


# --- The page ---------------------------------------------------------------------------------------------------------

ABOUT = """# Growth table

Every family, rule and ratio that [growth operators](growth.md) speaks of, grown and measured. This page is written by

    {command}

and says what came out of it. A model of two blocks and a few thousand random numbers (weights from N(0, 0.4), no bias
zero, no gain one; logits spread over 1 to 6) goes to disk, is grown there, and both are run by plain transformers
{transformers} on the same tokens; then the large one is saved by transformers, loaded and run once more. A cell has the
largest difference of a logit, over all positions, the whole vocabulary, tied and untied, and before and after saving
(of lost ones the smaller of tied and untied):

* **2e-14 · 5e-6**: the function is kept. First in float64, then in float32; both are rounding.
* *4.1*: the function is lost, as the plan said before anything ran.
* –: refused; the reason stands below.

What the plan says of preserving was right in every cell, or there would be no page. Copies have noise as large as the
weights (0 dB), but where it says otherwise. *Certificate* is the largest residual max |W' E - E W| / max |W| of all
tensors of a family's exact growths in float32, where one rounding is {epsilon}.

transformers computes an RMSNorm, and the cosines of RoPE, in float32 whatever the model's dtype: for the float64
figures both were replaced by ones that do not. As they are, they leave up to 1e-5 there.

Left out is what Kangaroo does not offer since it is known to be wrong: copies of unlike number without weights, zeros
under LayerNorm, a tied head without its correction, heads copied out of their groups, `layer_norm_eps` or RoPE's base
left as they were. Learned growth starts from any of these and keeps nothing.

"""


NOTES = """
Doubling divides by two, which rounds no number: in bfloat16 too the logits are the parent's to the bit. Not so under
Gemma, which multiplies its table by the root of d_model: there the figure is what bfloat16 itself costs. Further tokens
leave the old ones' logits as they are; the figures are of those.
"""


def page(families: Iterable[str], bench: Bench) -> str:
    """The table, as Markdown."""
    from importlib.metadata import version

    cells: dict[str, list[Cell]] = {}
    reasons: list[str] = []

    def cell(family: str, *wanted: Any) -> str:
        found = bench.measure(family, *wanted)
        cells.setdefault(family, []).append(found)
        if found.refused and found.refused not in reasons:
            reasons.append(found.refused)
        return str(found)

    widths, depths, further = list[str](), list[str](), list[str]()
    for family in families:
        widths += [f"### {get_family(family).title}", "", *_head("growth", WIDTH_RULES)]
        for what, changes in widths_of(family).items():
            row = [cell(family, changes, init) for init in WIDTH_RULES.values()]
            widths.append(_row(label(family, what, changes), *row))
        widths.append("")
        depths.append(_row(family, *(cell(family, changes, init) for init, changes in DEPTH_RULES.values())))
        row = [
            cell(family, {**widths_of(family).get(what, {}), **changes}, init, dtypes)
            for init, what, changes, dtypes in FURTHER.values()
        ]
        further.append(_row(family, *row))
    return "\n".join(
        [
            ABOUT.format(command=COMMAND, transformers=version("transformers"), epsilon=number(2.0**-24)),
            "## In short\n",
            *_head("family", ["kept", "worst in float64", "in float32", "certificate", "lost", "least lost"]),
            *(_row(family, *_summary(found)) for family, found in cells.items()),
            "\n## Depth\n",
            *_head("family", DEPTH_RULES),
            *depths,
            "\nA silent block adds zeros to the residual stream, hence exact to the bit.\n\n## Both, and more\n",
            *_head("family", FURTHER),
            *further,
            NOTES,
            "## Width\n",
            *widths,
            *([f"Refused: {'; '.join(reasons)}.\n"] if reasons else []),
        ]
    )


def label(family: str, what: str, changes: Changes) -> str:
    """all x2: 16 to 32, 4 to 8 ..."""
    parent = PARENTS.get(family, LLAMA)
    sizes = ", ".join(f"{field} {getattr(parent, field)} to {size}" for field, size in changes.items())
    return f"**{what}**: {sizes}"


def _summary(cells: list[Cell]) -> Iterator[str]:
    kept = [cell for cell in cells if cell.preserves]
    lost = [cell.differences[EXACT] for cell in cells if cell.differences and not cell.preserves]
    yield str(len(kept))
    for dtype in (EXACT, USUAL):
        yield number(max(cell.differences.get(dtype, 0.0) for cell in kept))
    yield number(max(cell.residual or 0.0 for cell in kept))
    yield str(len(lost))
    yield f"{min(lost):.2g}"


def _head(first: str, columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [_row(first, *columns), "|---" * (1 + len(columns)) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # of so small models, more would wait for one another
    with tempfile.TemporaryDirectory(prefix="kangaroo-table-") as folder:
        text = page(options.families, Bench(Path(folder)))
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
