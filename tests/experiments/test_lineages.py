"""How a larger model was made, on its experiment's page; and whether its copies have parted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import Client

from accounts.models import User
from experiments.ingest import ingest
from experiments.lineages import drawn, pictures
from experiments.models import Experiment, ModelRun
from experiments.parting import parting
from tests.experiments.factories import SHAPES, add_note, make_experiment, make_spec, make_user
from tests.experiments.test_experiment_page import marks, page, poll, text_of
from trainer.growth import plan
from trainer.growth.lineage import lineage
from trainer.shape import GrowInit, Shape
from trainer.spec import parse_spec


@pytest.fixture
def ada(client: Client) -> User:
    user = make_user()
    client.force_login(user)
    return user


def spec_of(init: dict[str, Any], little: dict[str, Any] | None = None, **big: Any) -> dict[str, Any]:
    spec = make_spec()
    spec["models"]["small"]["shape"] = SHAPES["little"] | (little or {})
    spec["models"]["scaled"] = {"shape": SHAPES["big"] | big, "init": {"kind": "grow", "parent": "small", **init}}
    return spec


def measure(axis: str, width: int, effective: int, *, layer: int | None = None) -> dict[str, Any]:
    return {
        "axis": axis,
        "layer": layer,
        "width": width,
        "effective_width": effective,
        "least_width": width // 2,
        "distance": 0.5,
        "least_distance": 0.1,
    }


# The picture ----------------------------------------------------------------------------------------------------------


def test_a_picture_has_every_block_and_says_what_each_is() -> None:
    (picture,) = pictures(parse_spec(spec_of({"width": "duplicate", "depth": "identity"})))["scaled"]

    assert [(row.blocks, row.source, row.words) for row in picture.rows] == [
        ("0", "0", "continues the parent’s block"),
        ("1", "0", "a copy that writes nothing yet"),
        ("2", "1", "continues the parent’s block"),
        ("3", "1", "a copy that writes nothing yet"),
    ]
    drawn_blocks = {shapes.pattern: shapes.path.count("z") for shapes in picture.blocks.child}
    assert drawn_blocks == {"solid": 2, "dashed": 2}
    assert sum(shapes.path.count("C") for shapes in picture.blocks.links) == 4
    assert picture.says.startswith("2 blocks become 4: ")
    assert {bar.title: (bar.small, bar.large) for bar in picture.bars} == {
        "channels of the residual stream (d_model)": (64, 128),
        "hidden units of each MLP (d_mlp)": (256, 512),
        "query heads": (2, 4),
        "key/value heads": (2, 4),
    }


@pytest.mark.parametrize("width", ["duplicate", "net2net", "pad", "random_pad"])
def test_bars_and_parts_are_whole(width: str) -> None:
    init, little = {"width": width, "depth": "stack"}, {"n_heads": 4, "n_kv_heads": 2, "d_model": 96}
    (picture,) = pictures(parse_spec(spec_of(init, little, n_heads=6, n_kv_heads=2, d_mlp=333, d_model=120)))["scaled"]

    assert len(picture.bars) == 3
    for bar in picture.bars:
        assert sum(piece.long for piece in bar.pieces) == pytest.approx(100, abs=0.1)
        old = sum(piece.long for piece in bar.pieces if piece.old)
        assert old == pytest.approx(100 * bar.small / bar.large, abs=0.1) or width == "net2net"
    assert sum(part.share for part in picture.parts) == pytest.approx(1)


def test_a_hundred_blocks_fit_the_page() -> None:
    small, large = Shape(**SHAPES["little"]), Shape(**SHAPES["big"] | {"n_layers": 100})
    made = plan("llama", small, large, GrowInit(parent="small", depth="stack"), n_positions=64, d_vocab=4096, tied=True)

    picture = drawn(lineage(made), "the grown model", "the checkpoint")

    blocks = picture.blocks
    assert " " not in picture.key, "ids are made of it"
    assert blocks.height < 600
    assert len(blocks.labels) < 60
    assert sum(shapes.path.count("z") for shapes in blocks.child) == 100


@pytest.mark.django_db
def test_the_picture_is_there_before_anything_runs(client: Client, ada: User) -> None:
    html = page(client, make_experiment(ada, state="queued", points=0))

    section = html.partition('id="section-making"')[2].partition("</section>\n")[0]
    assert "2 blocks become 4" in text_of(section)
    assert 'role="img"' in section
    assert "model.layers.*.self_attn.q_proj.weight" in section


@pytest.mark.django_db
def test_a_ladder_has_a_picture_for_each_growth(client: Client, ada: User) -> None:
    rung = SHAPES["little"] | {"d_model": 96, "n_heads": 3}
    html = page(client, make_experiment(ada, spec=spec_of({"ladder": [{"shape": rung, "steps": 100}]})))

    titles = [text_of(part.partition("</h3>")[0]) for part in html.split('<h3 id="lineage-title-')[1:]]
    assert [title.partition(">")[2].strip() for title in titles] == [
        "scaled from small",
        "scaled grows after 100 steps",
    ]


@pytest.mark.django_db
def test_what_a_checkpoint_was_grown_to_is_known_once_the_trainer_has_said_so(client: Client, ada: User) -> None:
    spec = spec_of({})
    spec["data"]["tokenizer"] = {"kind": "pretrained", "name": "nobody/nothing"}
    spec["models"]["small"] = {"init": {"kind": "checkpoint", "path": "nobody/nothing"}}
    experiment = make_experiment(ada, spec=spec)
    run = experiment.runs.get(name="scaled")
    assert "How scaled is made is known once its parent has been read." in text_of(page(client, experiment))

    add_note(run, "grown", **run.grown, lineage={"blocks": "a lie"})
    assert "How scaled is made is known once its parent has been read." in text_of(page(client, experiment))

    small, big = Shape(**SHAPES["little"]), Shape(**SHAPES["big"])
    made = plan("llama", small, big, GrowInit(parent="small"), n_positions=64, d_vocab=4096, tied=True)
    add_note(run, "grown", **run.grown, lineage=lineage(made).plain())
    assert "2 blocks become 4" in text_of(page(client, experiment))


# What became of the copies --------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_of_a_measurement_what_belongs_to_whole_axes_is_kept(ada: User) -> None:
    run: ModelRun = make_experiment(ada, state="queued", points=0).runs.get(name="scaled")
    at = {"at": "2026-11-24T10:00:00Z", "tokens": 1, "flops": 1.0, "train_seconds": 1.0}
    figures = {"cross_entropy": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5, "accuracy": 0.3, "n_tokens": 9}
    rows = [measure("mlp", 512, 300, layer=0), measure("mlp", 512, 300)]
    grown = {**(make_experiment(ada).runs.get(name="scaled").grown or {}), "lineage": {"blocks": []}, "symmetry": rows}
    events = [
        {"kind": "grown", "seq": 0, **at, **grown},
        {"kind": "eval", "seq": 1, "step": 50, "split": "validation", "eval_seconds": 1.0, **at, **figures}
        | {"symmetry": rows},
    ]
    ingest(run, "".join(json.dumps(event) + "\n" for event in events).encode(), 0)

    assert run.notes.get(kind="symmetry").data == {"step": 50, "symmetry": rows[1:]}
    assert run.notes.get(kind="grown").data["lineage"] == {"blocks": []}
    run.refresh_from_db()
    assert run.grown is not None
    assert "lineage" not in run.grown
    assert run.points.count() == 1


def with_copies(user: User, *shares: float) -> Experiment:
    """A finished experiment in which so much of each axis was effective at each evaluation."""
    experiment = make_experiment(user)
    run = experiment.runs.get(name="scaled")
    for at, share in enumerate(shares):
        rows = [measure("embed", 128, round(128 * share)), measure("mlp", 2048, round(2048 * share))]
        add_note(run, "symmetry", step=50 * at, symmetry=rows)
    return experiment


@pytest.mark.django_db
def test_copies_that_never_part_are_warned_of_with_a_way_out(client: Client, ada: User) -> None:
    experiment = with_copies(ada, 0.5, 0.5, 0.5)
    html = page(client, experiment)

    said = text_of(html.partition('id="section-growth"')[2])
    assert "Not on d_model, d_mlp, after 100 steps." in said
    assert "with noise (0 to 20 dB; the function is kept) or with an uneven split" in said
    assert f'id="part-scaled" href="/train/?from={experiment.pk}"' in html


@pytest.mark.django_db
def test_copies_that_have_parted_are_told_of_as_they_go(client: Client, ada: User) -> None:
    experiment = with_copies(ada, 0.5, 0.75)
    html = page(client, experiment)
    assert "Some have, after 50 steps" in text_of(html)
    seen = marks(html)

    run = experiment.runs.get(name="scaled")
    rows = [measure("embed", 128, 128), measure("mlp", 2048, 2048)]
    add_note(run, "symmetry", step=100, symmetry=rows)
    ModelRun.objects.filter(pk=run.pk).update(last_seq=run.last_seq + 1)

    answer = poll(client, experiment, seen).content.decode()
    assert "Yes: on each axis the effective width is the whole width, after 100 steps." in text_of(answer)
    assert 'id="section-making"' not in answer


def test_a_chart_runs_from_all_copies_equal_to_none() -> None:
    found = parting([(0, [measure("mlp", 100, 50)]), (10, [measure("mlp", 100, 75)]), (20, [measure("mlp", 100, 100)])])

    assert found is not None
    (line,) = found.lines
    heights = [float(point.split(",")[1]) for point in line.points.split()]
    assert heights[0] == found.bottom
    assert heights[2] == found.top
    assert heights[1] == pytest.approx((found.bottom + found.top) / 2)
    assert (line.first, line.effective_width, found.is_whole, found.low) == (50, 100, True, 0.5)


def test_a_model_without_copies_has_no_chart() -> None:
    assert parting([]) is None
    assert parting([(0, [])]) is None
