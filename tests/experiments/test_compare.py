"""Verdicts from curves whose crossings were worked out by hand."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import compare
from experiments.compare import Cost, Evaluation, Model, crossing, verdicts

SETTINGS = {"n_ctx": 64, "batch_size": 8, "seed": 0, "lr": 1e-3, "schedule": "cosine", "max_steps": 400}


def curve(*losses: float | None, every: int = 100, flops: float = 6.0, seconds: float = 0.01) -> list[Evaluation]:
    """Evaluations from step 0 on, `every` steps apart; ten tokens a step, `flops` a token."""
    return [
        Evaluation(Cost(i * every, i * every * 10, i * every * 10 * flops, i * every * seconds), loss)
        for i, loss in enumerate(losses)
    ]


def model(name: str, *losses: float | None, flops: float = 6.0, **more: object) -> Model:
    evaluations = curve(*losses, flops=flops)
    fields: dict[str, object] = {
        "state": "succeeded",
        "shape": "big",
        "evaluations": evaluations,
        "cost": evaluations[-1].at if evaluations else Cost(),
        "settings": SETTINGS,
        "fingerprint": "f00d",
        "eval_tokens": 65_536,
        "device": "cpu",
        "precision": "fp32",
    }
    return Model(name, **(fields | more))  # type: ignore[arg-type]


SMALL = model("small", 8.0, 6.0, 5.0, 4.8, 4.7, flops=1.5, shape="little")
SCALED = model("scaled", 5.0, 4.4, 4.0, 3.8, 3.7, init="grow", parent="small")
LARGE = model("large", 8.0, 5.5, 4.6, 4.3, 4.2)


def only(*models: Model) -> compare.Verdict:
    (verdict,) = verdicts(models)
    return verdict


def test_the_crossing_lies_on_the_line_between_two_evaluations() -> None:
    # 4.4 at 1000 tokens, 4.0 at 2000: 4.2 half way between.
    verdict = only(SMALL, SCALED, LARGE)
    assert verdict.outcome == "reached"
    tokens, flops, seconds = verdict.crossings
    assert tokens.own == pytest.approx(1500)
    assert tokens.own_share == pytest.approx(1500 / 4000)
    assert tokens.saving == pytest.approx(0.625)
    assert seconds.own == pytest.approx(1.5)
    # small used 4000 tokens of 1.5 FLOPs: 6000; scaled 1500 of 6: 9000; large 24,000 in all.
    assert flops.charged == pytest.approx(15_000)
    assert flops.charged_share == pytest.approx(0.625)
    assert verdict.sentence == (
        "scaled reached large's final loss after 38 % of its tokens; 62 % of its FLOPs with small's cost counted."
    )


def test_reaching_the_target_only_with_a_cost_above_the_whole_is_said() -> None:
    dear = replace(SMALL, cost=Cost(400, 4000, 20_000, 4.0))
    assert only(dear, SCALED, LARGE).sentence.endswith(
        "121 % of its FLOPs with small's cost counted, more than large took itself."
    )


def test_never_reached_is_said_with_both_losses() -> None:
    scaled = model("scaled", 5.0, 4.9, 4.8, 4.7, 4.6, init="grow", parent="small")
    verdict = only(SMALL, scaled, LARGE)
    assert verdict.outcome == "never"
    assert verdict.crossings == ()
    assert verdict.sentence == "scaled never reached large's final loss: it ended at 4.600, large at 4.200."


def test_one_lucky_evaluation_is_no_crossing() -> None:
    lucky = curve(5.0, 4.1, 4.6, 4.0, 3.9)
    # 4.1 at 1000 is followed by 4.6; 4.6 at 2000 and 4.0 at 3000 give 4.2 at 2000 + 1000 * 0.4 / 0.6.
    assert crossing(lucky, 4.2, "tokens") == pytest.approx(2000 + 1000 * 0.4 / 0.6)


def test_the_last_evaluation_counts_only_when_none_can_follow() -> None:
    late = curve(5.0, 4.6, 4.1)
    assert crossing(late, 4.2, "tokens", ended=False) is None
    assert crossing(late, 4.2, "tokens", ended=True) == pytest.approx(1800)


def test_a_grown_model_already_there_at_step_0_crosses_at_0() -> None:
    scaled = model("scaled", 4.1, 4.0, 3.9, 3.8, 3.7, init="grow", parent="small")
    verdict = only(SMALL, scaled, LARGE)
    assert verdict.crossings[0].own == 0
    assert verdict.sentence.startswith("scaled was at large's final loss before its first step; 25 % of its FLOPs")


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_evaluations_that_are_not_finite_confirm_nothing(bad: float | None) -> None:
    assert crossing(curve(5.0, 4.1, bad, 4.0, 3.9), 4.2, "tokens") == pytest.approx(3000)
    assert crossing(curve(5.0, 4.4, 4.1, bad), 4.2, "tokens") is None


def test_a_curve_that_rises_again_is_not_said_to_have_stayed() -> None:
    scaled = model("scaled", 5.0, 4.1, 4.0, 4.3, 4.5, init="grow", parent="small")
    assert "It did not stay there: it ended at 4.500, large at 4.200." in only(SMALL, scaled, LARGE).sentence


@pytest.mark.parametrize(
    ("scaled", "large", "outcome", "sentence"),
    [
        ("running", "running", "early", "Too early to say: large is still training. So far scaled is ahead"),
        ("queued", "queued", "early", "Too early to say: large has not started."),
        ("succeeded", "failed", "none", "No verdict: large failed at step 400 (out of memory)"),
        ("succeeded", "cancelled", "none", "No verdict: large was stopped at step 400, so it has no final loss"),
        ("running", "succeeded", "reached", "scaled reached large's final loss after 38 % of its tokens"),
        ("failed", "succeeded", "reached", "scaled reached large's final loss after 38 % of its tokens"),
    ],
)
def test_no_more_is_claimed_than_the_states_allow(scaled: str, large: str, outcome: str, sentence: str) -> None:
    verdict = only(
        SMALL,
        replace(SCALED, state=scaled, why="out of memory"),  # type: ignore[arg-type]
        replace(LARGE, state=large, why="out of memory"),  # type: ignore[arg-type]
    )
    assert verdict.outcome == outcome
    assert verdict.sentence.startswith(sentence)
    if scaled == "running" and large == "succeeded":
        assert "scaled is still training" in verdict.sentence
    if scaled == "failed":
        assert "scaled failed at step 400 (out of memory) later" in verdict.sentence


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_grown_model_that_ended_early_has_not_never_reached_it(state: str) -> None:
    scaled = model("scaled", 5.0, 4.9, 4.8, init="grow", parent="small", state=state)
    verdict = only(SMALL, scaled, LARGE)
    assert verdict.outcome == "none"
    assert "before it reached large's final loss" in verdict.sentence


def test_a_grown_model_still_above_the_target_is_too_early_to_judge() -> None:
    scaled = model("scaled", 5.0, 4.9, init="grow", parent="small", state="running")
    verdict = only(SMALL, scaled, LARGE)
    assert verdict.outcome == "early"
    assert "scaled is still training" in verdict.sentence


def test_without_a_partner_of_the_same_shape_nothing_is_compared() -> None:
    verdict = only(SMALL, SCALED)
    assert verdict.outcome == "none"
    assert verdict.scratch is None
    assert "no model of the same shape" in verdict.sentence


def test_an_experiment_without_growth_has_no_verdicts() -> None:
    assert verdicts([SMALL, LARGE]) == []
    assert verdicts([]) == []


@pytest.mark.parametrize("losses", [(8.0, 5.0, None), (8.0, 5.0, math.nan)])
def test_a_target_that_is_not_finite_gives_no_verdict(losses: tuple[float | None, ...]) -> None:
    verdict = only(SMALL, SCALED, model("large", *losses))
    assert verdict.outcome == "none"
    assert verdict.sentence == "No verdict: large's last validation loss is not finite."
    assert any("not finite at step 200" in caveat for caveat in verdict.caveats)


def test_a_ladder_charges_every_ancestor() -> None:
    middle = model("middle", 5.0, 4.6, flops=3.0, init="grow", parent="small", shape="middling")
    top = replace(SCALED, parent="middle")
    verdict = only(SMALL, middle, top, LARGE)
    flops = next(found for found in verdict.crossings if found.axis == "flops")
    assert flops.charged == pytest.approx(9000 + 3000 + 6000)
    assert "middle's and small's cost counted" in verdict.sentence


def test_several_operators_each_get_a_verdict() -> None:
    other = replace(SCALED, name="padded")
    assert [v.grown for v in verdicts([SMALL, SCALED, other, LARGE])] == ["scaled", "padded"]


def test_a_checkpoint_as_ancestor_leaves_its_cost_uncounted_and_says_so() -> None:
    verdict = only(replace(SMALL, init="checkpoint"), SCALED, LARGE)
    assert all(found.charged is None and found.charged_saving is None for found in verdict.crossings)
    assert "small's cost is not known, so it is not counted" in verdict.sentence
    assert any("began from a checkpoint" in caveat for caveat in verdict.caveats)


def test_the_gap_is_taken_where_both_curves_still_reach() -> None:
    verdict = only(SMALL, SCALED, LARGE)
    own = next(g for g in verdict.gaps if g.axis == "flops" and not g.charged)
    assert (own.at, own.grown, own.scratch) == (24_000, 3.7, 4.2)
    assert own.difference == pytest.approx(-0.5)
    # Charged with 6000 FLOPs, scaled stands at 18,000 of its own when large stands at 24,000.
    charged = next(g for g in verdict.gaps if g.axis == "flops" and g.charged)
    assert (charged.at, charged.grown) == (24_000, pytest.approx(3.8))


def test_the_ledger_marks_what_is_not_equal() -> None:
    other = {**SETTINGS, "lr": 3e-4, "seed": 1}
    checks = {c.what: c for c in only(SMALL, SCALED, replace(LARGE, settings=other, device="cuda")).checks}
    assert checks["tuning"].equal is False
    assert checks["tuning"].words == "lr 0.001 against 0.0003"
    assert (checks["seed"].equal, checks["seed"].words) == (False, "0 against 1")
    assert checks["batches"].equal is False
    assert checks["device"].words == "cpu against cuda: compare no seconds"
    assert (checks["data"].equal, checks["data"].mark) == (True, "✓")


def test_the_ledger_says_what_is_not_known_yet() -> None:
    verdict = only(SMALL, replace(SCALED, fingerprint=None, state="running"), LARGE)
    checks = {c.what: c for c in verdict.checks}
    assert (checks["data"].equal, checks["data"].mark) == (None, "?")
    assert checks["steps"].equal is None
    assert verdict.is_fair is None


def test_all_equal_is_fair() -> None:
    assert only(SMALL, SCALED, LARGE).is_fair is True
    assert only(SMALL, replace(SCALED, eval_tokens=1), LARGE).is_fair is False


def test_comparing_needs_neither_django_nor_torch() -> None:
    tree = ast.parse(Path(compare.__file__).read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"__future__", "math", "collections", "dataclasses", "typing"}
