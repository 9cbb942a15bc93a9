"""Does LARGE compute what SMALL does? For any two Hugging Face folders of one family, whoever made LARGE.

    find_plan     which pair of rules, without noise, made each tensor of LARGE from one of SMALL; no forward pass
    measure       both models on a text: largest difference of a logit, KL, loss. The only part that needs torch
    judge         from both, a verdict: "kept", "changed" or "unknown"

A plan *explains* LARGE where the tensors hold what it says they copy. It *proves* LARGE where every tensor is also held
by the certificate, the plan preserves, and the configs say the same of everything but the shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from trainer.growth import GrowthError, GrowthPlan, plan
from trainer.growth.apply import Source, named_weights, open_source
from trainer.growth.certificate import largest, residual, spread
from trainer.growth.depth import DEPTH_RULES
from trainer.growth.weights import EPSILON, Tensor
from trainer.growth.width import WIDTH_RULES
from trainer.shape import GrowInit

Verdict = Literal["kept", "changed", "unknown"]

#: Tokens of the text that are measured, in windows of at most so many.
TOKENS, N_CTX = 8192, 512

#: Config fields that change nothing in what a model computes in evaluation, by name or beginning.
_NO_FUNCTION = frozenset(
    "_name_or_path architectures bos_token_id classifier_dropout dtype eos_token_id initializer_range pad_token_id "  # noqa: SIM905
    "task_specific_params torch_dtype transformers_version use_cache is_decoder".split()
)


class VerifyError(ValueError):
    """Two folders that cannot be compared; the message says why."""


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of LARGE against the plan. `source`: the tensor of SMALL it is held to."""

    name: str
    source: str
    residual: float
    tolerance: float
    dtype: str
    copied: bool  # what the plan copies is there, whatever reads what is random

    @property
    def holds(self) -> bool:
        return isfinite(self.residual) and self.residual <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    family: str
    verdict: Verdict
    because: str
    plan: GrowthPlan | None
    tensors: list[TensorCheck]
    config: list[str]  # fields that differ and are not the shape's
    measured: dict[str, float | int] | None = field(default=None)

    @property
    def broken(self) -> list[TensorCheck]:
        return [check for check in self.tensors if not check.holds]

    def plain(self) -> dict[str, Any]:
        """As JSON; of the plan what a reader wants, not the maps."""
        made = self.plan
        return {
            "family": self.family,
            "verdict": self.verdict,
            "because": self.because,
            "plan": made
            and {
                "width": made.init.width,
                "depth": made.init.depth,
                "preserves": made.preserves,
                "because": made.because,
            },
            "broken": [check.name for check in self.broken],
            "tensors": [{**asdict(check), "holds": check.holds} for check in self.tensors],
            "config": self.config,
            "measured": self.measured,
        }


def verify(small: Path, large: Path, text: Path | None = None) -> Comparison:
    """Everything there is to say of the two; with `text` also what was measured on it.

    Raises :class:`VerifyError`, or what opening a checkpoint raises.
    """
    old, new = open_source(small), open_source(large)
    if old.family is not new.family:
        raise VerifyError(f"{large} is a {new.family.title}, {small} a {old.family.title}: nothing to hold one to.")
    made, checks = find_plan(old, new)
    config = differing(old, new, made)
    measured = None if text is None else measure(small, large, text)
    verdict, because = judge(made, checks, config, measured, {check.dtype for check in named_weights(new).values()})
    return Comparison(old.family.name, verdict, because, made, checks, config, measured)


def find_plan(old: Source, new: Source) -> tuple[GrowthPlan | None, list[TensorCheck]]:
    """The plan that explains most tensors of `new`, and each of them; None where no plan explains half of the matrices.

    A matrix that two plans take from the same tensor by the same width rule is read once.
    """
    shape, n_positions, d_vocab, tied = old.described
    if tied != new.described.tied:
        return None, []  # no rule here unties
    parent, child = named_weights(old), named_weights(new)
    known: dict[tuple[str, str, str, bool], TensorCheck] = {}
    best: tuple[tuple[int, int, bool], GrowthPlan, list[TensorCheck]] | None = None
    for width in WIDTH_RULES:
        for depth in DEPTH_RULES:
            init = GrowInit(
                parent="small",
                width=width,
                depth=depth,
                snr_db=None,
                d_vocab=new.described.d_vocab,
                n_positions=new.described.n_positions,
            )
            try:
                made = plan(
                    old.family.name,
                    shape,
                    new.described.shape,
                    init,
                    n_positions=n_positions,
                    d_vocab=d_vocab,
                    tied=tied,
                )
            except GrowthError:
                continue
            checks = _checks(parent, child, made, known)
            matrices = {p.name for p, source, *_ in made.parameters() if source is not None and p.kind == "matrix"}
            copied = sum(check.copied for check in checks if check.name in matrices)
            # Random blocks claim nothing, so what a plan claims wrongly counts against it. Of two plans that hold alike
            # the one that preserves is meant; but one tensor that breaks it is an accident, more are a rule.
            holding = sum(check.holds for check in checks)
            meant = made.preserves == (holding >= len(checks) - 1)
            score = (2 * copied - len(matrices), holding, meant)
            if 2 * copied > len(matrices) and (best is None or score > best[0]):
                best = score, made, checks
    return (None, []) if best is None else best[1:]


def _checks(
    parent: Mapping[str, Tensor],
    child: Mapping[str, Tensor],
    made: GrowthPlan,
    known: dict[tuple[str, str, str, bool], TensorCheck],
) -> list[TensorCheck]:
    checks = []
    for origin in made.parameters():
        new, old, block, _ = origin
        if old is None:
            continue
        silent = block.silent and new.writes_residual
        key = (made.init.width, new.name, old.name, silent)
        if key not in known:
            source, grown = parent[old.name], child[new.name]
            # Each copy was rounded by itself, at the size that noise, if there is any, gave it.
            size = max(1.0, largest(grown) / (largest(source) or 1.0))
            bound = 4 * EPSILON[grown.dtype] * spread(made) * size
            full = residual(source, grown, origin, made)
            copied = full <= bound or residual(source, grown, origin, made, only_copied=True) <= bound
            known[key] = TensorCheck(new.name, old.name, full, bound, grown.dtype, copied)
        checks.append(known[key])
    return checks


def differing(old: Source, new: Source, made: GrowthPlan | None = None) -> list[str]:
    """Fields of the two configs that are neither the shape's nor without a part in what is computed."""
    # Both through the family, so that what a config leaves out of its shape is not taken for a difference.
    right = old.family.resized(old.config, new.described.shape) if made is None else made.child_config(old.config)
    given = new.family.resized(new.config, new.described.shape)
    found = []
    for name in sorted((right.keys() | given.keys()) - _NO_FUNCTION):
        ours, theirs = right.get(name), given.get(name)
        if name.endswith(("pdrop", "dropout")) or ours == theirs or not (ours or theirs):
            continue
        found.append(f"{name}: {theirs!r}, where {ours!r} would keep the function")
    return found


def judge(
    made: GrowthPlan | None,
    checks: list[TensorCheck],
    config: list[str],
    measured: Mapping[str, float | int] | None,
    dtypes: set[str],
) -> tuple[Verdict, str]:
    """The verdict and its reason. What was measured has the last word, but for tensors that break a kept promise."""
    broken = [check.name for check in checks if not check.holds]
    proven = made is not None and made.preserves and not broken and not config
    # Noise that is unseen in exact arithmetic makes rounding larger: by as much as the entries, at most.
    larger = max((check.tolerance / (4 * EPSILON[check.dtype]) for check in checks), default=1.0) if proven else 1.0
    allowed = 0.0 if measured is None else larger * rounding(measured["logit_scale"], dtypes)
    if measured is not None and not measured["max_logit_difference"] <= allowed:
        against = " although the certificate holds" if proven else ""
        return "changed", f"On the text, logits differ by more than rounding{against}."
    if proven:
        seen = "" if measured is None else ", and on the text logits differ by rounding alone"
        return "kept", f"Every tensor holds what keeps the function{seen}."
    if made is not None and made.preserves and broken:
        return "changed", f"{len(broken)} of {len(checks)} tensors break what would keep the function."
    if measured is not None:
        return "kept", "On the text, logits differ by rounding alone; no certificate says so of every text."
    if made is None:
        return "unknown", "No plan of these rules explains it, and without a text nothing was measured: give --text."
    if config and made.preserves:
        return "unknown", "Every tensor holds, but the configs differ, and without a text nothing was measured."
    return "changed", made.because


def rounding(scale: float, dtypes: set[str]) -> float:
    """The difference of logits up to `scale` that rounding may leave: of float32 arithmetic, and of what is stored."""
    stored = max(EPSILON[dtype] for dtype in dtypes)
    return scale * (512 * EPSILON["F32"] + (16 * stored if stored > EPSILON["F32"] else 0.0))


def measure(small: Path, large: Path, text: Path) -> dict[str, float | int]:
    """Both models on the first tokens of `text`, in float32: what :func:`trainer.evaluate.compare` says.

    Raises :class:`VerifyError` where one cannot be loaded or the text not be read.
    """
    import numpy as np
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from trainer import evaluate
    from trainer.endings import CheckpointError
    from trainer.models import load_model

    disable_progress_bar()
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VerifyError(f"--text {text}: cannot be read as UTF-8 text ({error})") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(small.absolute()), local_files_only=True)
        tokens = np.asarray(tokenizer(content[: 16 * TOKENS], verbose=False).input_ids, np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise VerifyError(f"{small} has no tokenizer that can be loaded ({str(error).splitlines()[0]})") from None
    try:
        models = [load_model(folder.absolute(), torch.device("cpu")) for folder in (small, large)]
    except CheckpointError as error:
        raise VerifyError(str(error)) from None
    n_ctx = min(N_CTX, *(model.config.max_position_embeddings for model in models))
    d_vocab = min(model.config.vocab_size for model in models)
    if len(tokens) < 2 or tokens.max() >= d_vocab or models[0].config.vocab_size != models[1].config.vocab_size:
        raise VerifyError("the models' vocabularies, the tokenizer and the text do not go together")
    return evaluate.compare(models[0], models[1], evaluate.windows(tokens[: TOKENS + 1], n_ctx, TOKENS))


def table(comparison: Comparison, every: bool = False) -> str:
    """What was found, for a person: the verdict, the plan, the worst tensors, and what was measured."""
    lines = [f"{comparison.verdict.upper()}: {comparison.because}", ""]
    if comparison.plan is None:
        lines += ["No plan of these rules explains LARGE: there is no certificate.", ""]
    else:
        init = comparison.plan.init
        lines += [f"Nearest plan: width {init.width}, depth {init.depth}. {comparison.plan.because}", ""]
        worst = sorted(comparison.tensors, key=lambda check: -check.residual / check.tolerance)
        shown = worst if every else worst[: max(5, min(20, len(comparison.broken)))]
        wide = max(len(check.name) for check in shown)
        lines.append(f"{'tensor':{wide}}  {'residual':>9}  {'allowed':>9}")
        for check in shown:
            mark = "" if check.holds else "  breaks the promise" if check.copied else "  is not what the plan copies"
            lines.append(f"{check.name:{wide}}  {check.residual:9.2e}  {check.tolerance:9.2e}{mark}")
        lines.append(f"{len(comparison.tensors) - len(comparison.broken)} of {len(comparison.tensors)} tensors hold.")
        lines.append("")
    lines += [f"config.json: {difference}" for difference in comparison.config]
    if comparison.measured is not None:
        m = comparison.measured
        lines += [
            f"On {m['n_tokens']:,} tokens, in float32:",
            f"  largest difference of a logit  {m['max_logit_difference']:.3g} (logits up to {m['logit_scale']:.3g})",
            f"  KL divergence                  {m['kl_divergence']:.3g} nats a token",
            f"  loss before and after          {m['cross_entropy_before']:.6f}  {m['cross_entropy_after']:.6f}",
        ]
    return "\n".join(lines).rstrip()
