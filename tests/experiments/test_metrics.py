"""Curves on their way to the chart: compression, increments, conditional answers, the CSV file."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from typing import Any

import pytest
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st

from accounts.models import User
from experiments.curves import (
    BUCKETS,
    Memory,
    Series,
    Sight,
    compress,
    curves,
    increment,
    parse_place,
    place,
    width_for,
)
from experiments.models import Experiment, ModelRun, Point
from tests.experiments.factories import make_experiment, make_user


def sight(step: int, loss: float | None) -> Sight:
    return Sight(step, step * 8, step * 48.0, step * 0.1, loss, None, None)


# Compression ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "width"), [(0, 1), (1, 1), (800, 1), (801, 2), (1600, 2), (20_000, 32), (10**6, 2048)]
)
def test_the_width_of_a_bucket_is_a_power_of_two_that_gives_at_most_800(steps: int, width: int) -> None:
    assert width_for(steps) == width
    assert steps / width <= BUCKETS


def test_a_bucket_keeps_its_lowest_and_its_highest() -> None:
    losses = [5.0, 4.0, 9.0, 4.5, 3.0, 3.1, 3.2, 2.9]
    kept = compress([sight(i, loss) for i, loss in enumerate(losses)], 4)
    assert [(point.step, point.loss) for point in kept] == [(1, 4.0), (2, 9.0), (6, 3.2), (7, 2.9)]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_losses_that_are_not_finite_are_all_kept_as_none(bad: float | None) -> None:
    kept = compress([sight(0, 1.0), sight(1, bad), sight(2, 2.0), sight(3, bad), sight(4, 1.5)], 8)
    assert [(point.step, point.loss) for point in kept] == [(0, 1.0), (1, None), (2, 2.0), (3, None)]


@given(st.lists(st.one_of(st.none(), st.floats(-5, 20)), max_size=300), st.sampled_from([1, 2, 8, 64]))
def test_no_spike_is_lost_and_no_bucket_keeps_more_than_two(losses: list[float | None], width: int) -> None:
    points = [sight(i, loss) for i, loss in enumerate(losses)]
    kept = compress(points, width)
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    assert set(kept) <= set(points)
    for start in range(0, len(points), width):
        bucket = [p.loss for p in points[start : start + width] if p.loss is not None]
        mine = [p.loss for p in kept if start <= p.step < start + width and p.loss is not None]
        assert len(mine) <= 2
        if bucket:
            assert (min(mine), max(mine)) == (min(bucket), max(bucket))


# A reader's place -----------------------------------------------------------------------------------------------------


def test_a_place_is_read_as_it_was_written() -> None:
    series = {("small", "train"): Series(32, (sight(0, 1.0), sight(640, 2.0)), 641), ("a-b", "test"): Series(1, (), 0)}
    assert parse_place(place(series)) == {("small", "train"): (32, 640)}


@pytest.mark.parametrize("text", ["", "small", "small.train.x.1", "small.train.0.1", "a.b.1.2.3", ",,", "a.b.-1.4"])
def test_a_place_that_makes_no_sense_is_that_of_a_new_reader(text: str) -> None:
    assert parse_place(text) == {}


def test_an_increment_replaces_the_bucket_the_reader_stood_in() -> None:
    curve = Series(4, tuple(sight(step, 1.0) for step in (1, 2, 5, 6, 9)), 10)
    start, points = increment(curve, (4, 6))
    assert (start, [point.step for point in points]) == (4, [5, 6, 9])


@pytest.mark.parametrize("known", [None, (8, 6), (4, 100)])
def test_a_reader_of_another_curve_starts_over(known: tuple[int, int] | None) -> None:
    curve = Series(4, tuple(sight(step, 1.0) for step in (1, 5)), 6)
    assert increment(curve, known) == (0, curve.points)


# The endpoint ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ada(client: Client) -> User:
    user = make_user()
    client.force_login(user)
    return user


def ask(client: Client, experiment: Experiment, after: str = "", etag: str = "") -> Any:
    headers = {"If-None-Match": etag} if etag else {}
    return client.get(f"/experiments/{experiment.pk}/metrics.json", {"after": after}, headers=headers)


def add_train_points(run: ModelRun, steps: range, loss: float = 4.0) -> None:
    Point.objects.bulk_create(
        Point(run=run, split="train", step=s, tokens=s * 512, flops=s * 1e6, train_seconds=s * 0.02, cross_entropy=loss)
        for s in steps
    )
    ModelRun.objects.filter(pk=run.pk).update(step=steps[-1], last_seq=steps[-1])


@pytest.mark.django_db
def test_all_models_and_splits_are_there_with_what_they_cost(client: Client, ada: User) -> None:
    experiment = make_experiment(ada)
    data = ask(client, experiment).json()
    assert [model["name"] for model in data["models"]] == ["small", "scaled", "large"]
    small, scaled, _ = data["models"]
    assert scaled["parent"] == "small"
    assert small["cost"] == {"step": 400, "tokens": 204_800, "flops": pytest.approx(4.3008e11), "seconds": 8.0}
    validation = scaled["series"]["validation"]
    assert (validation["shown"], validation["total"]) == (9, 9)
    assert validation["step"] == list(range(0, 401, 50))
    assert validation["loss"][-1] == 3.92
    assert validation["accuracy"][0] == 0.31
    assert scaled["series"]["train"]["total"] == 40
    assert "accuracy" not in scaled["series"]["train"]
    assert data["active"] is False


@pytest.mark.django_db
def test_an_unchanged_answer_is_304_and_a_change_is_not(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    etag = ask(client, experiment)["ETag"]
    assert ask(client, experiment, etag=etag).status_code == 304
    ModelRun.objects.filter(experiment=experiment, name="large").update(last_seq=999)
    assert ask(client, experiment, etag=etag).status_code == 200


@pytest.mark.django_db
def test_an_increment_holds_what_came_since_and_adds_up_to_the_whole(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5, steps=4000, points=4000)
    first = ask(client, experiment).json()
    run = experiment.runs.get(name="large")
    add_train_points(run, range(2001, 2012), loss=99.0)
    second = ask(client, experiment, after=first["place"]).json()
    old, new = (answer["models"][2]["series"]["train"] for answer in (first, second))
    assert new["from"] == 2000
    assert len(new["step"]) < 10
    assert second["models"][0]["series"]["train"]["step"] == [2000]  # the bucket small stands in
    kept = [step for step in old["step"] if step < new["from"]]
    whole = ask(client, experiment).json()["models"][2]["series"]["train"]
    assert kept + new["step"] == whole["step"]
    assert 99.0 in whole["loss"]


@pytest.mark.django_db
def test_a_spike_among_20_000_points_is_shown_and_counted(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, steps=20_000, points=20_000, eval_every=1000)
    run = experiment.runs.get(name="scaled")
    run.points.filter(split="train", step=12_345).update(cross_entropy=42.0)
    part = ask(client, experiment).json()["models"][1]["series"]["train"]
    assert part["total"] == 20_000
    assert part["shown"] == len(part["step"]) <= 2 * BUCKETS + 1
    assert part["loss"][part["step"].index(12_345)] == 42.0
    assert part["step"][-1] == 20_000


@pytest.mark.django_db
def test_passed_buckets_are_read_once(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5, steps=4000, points=4000)
    runs = list(experiment.runs.all())
    totals = {run.name: 4000 for run in runs}
    before = curves(runs, totals)
    Point.objects.filter(run__in=runs, step__lt=1000).delete()  # nobody does this; it shows what is read again
    assert curves(runs, totals) == before


@pytest.mark.django_db
def test_rows_that_were_rebuilt_from_the_start_are_read_again(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5, steps=4000, points=4000)
    assert ask(client, experiment).json()["models"][0]["series"]["train"]["total"] == 2000
    Point.objects.filter(run__experiment=experiment).delete()
    ModelRun.objects.filter(experiment=experiment).update(last_seq=3, step=0)
    assert ask(client, experiment).json()["models"][0]["series"]["train"]["total"] == 0


def test_memory_of_passed_buckets_is_bounded() -> None:
    memory: Memory[int] = Memory(3)
    for i in range(10):
        memory.put(i, i)
        memory.get(0)
    assert sorted(memory.kept) == [0, 8, 9]  # 0 was asked for again and again
    assert memory.get(1) is None


@pytest.mark.django_db
def test_a_loss_that_is_not_finite_is_told_as_null(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=4)
    run = experiment.runs.get(name="scaled")
    run.points.filter(split="train", step=300).update(cross_entropy=None)
    answer = ask(client, experiment)
    part = json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["models"][1]
    assert part["series"]["train"]["loss"][2] is None
    assert part["series"]["train"]["step"][2] == 300


@pytest.mark.django_db
def test_curves_cost_a_fixed_number_of_queries(client: Client, ada: User, django_assert_max_num_queries: Any) -> None:
    experiment = make_experiment(ada)
    ask(client, experiment)
    with django_assert_max_num_queries(5):  # session, user, experiment, runs, points
        assert ask(client, experiment).status_code == 200
    etag = ask(client, experiment)["ETag"]
    with django_assert_max_num_queries(4):
        assert ask(client, experiment, etag=etag).status_code == 304


@pytest.mark.django_db
def test_sixty_thousand_points_answer_in_well_under_a_second(client: Client, ada: User) -> None:
    # A guard against reading all of them for every answer; benchmarks/pages.py has the real figures.
    experiment = make_experiment(ada, steps=20_000, points=20_000, eval_every=1000)
    ask(client, experiment)
    began = time.perf_counter()
    assert ask(client, experiment).status_code == 200
    assert time.perf_counter() - began < 0.5


@pytest.mark.django_db
def test_the_csv_file_has_every_scalar_of_every_model(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, steps=3000, points=3000)
    answer = client.get(f"/experiments/{experiment.pk}/metrics.csv")
    assert answer["Content-Type"] == "text/csv; charset=utf-8"
    assert f"kangaroo-{experiment.pk}.csv" in answer["Content-Disposition"]
    text = b"".join(answer.streaming_content).decode()  # type: ignore[attr-defined]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == Point.objects.filter(run__experiment=experiment).count() == 3 * (3000 + 61 + 1)
    assert {row["model"] for row in rows} == {"small", "scaled", "large"}
    point = Point.objects.get(run__experiment=experiment, run__name="scaled", split="validation", step=150)
    row = next(r for r in rows if (r["model"], r["split"], r["step"]) == ("scaled", "validation", "150"))
    for name in ("tokens", "flops", "train_seconds", "cross_entropy", "bits_per_byte", "accuracy", "n_tokens"):
        assert float(row[name]) == getattr(point, name)
    assert set(row) >= {"lr", "grad_norm"}
