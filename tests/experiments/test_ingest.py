"""Events become rows once each, whoever sends them, however often, in whatever pieces."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import connection

from experiments import jobs
from experiments.ingest import ingest, rebuild
from experiments.models import ModelRun, Note, Point, Reason, State
from tests.experiments.fake_trainer import evaluation, grown, prepared, progress
from tests.live import a_spec

pytestmark = pytest.mark.django_db
AT = datetime(2026, 11, 24, 10, 0, tzinfo=UTC).isoformat()


@pytest.fixture
def run(db: None) -> ModelRun:
    made: ModelRun = jobs.create(None, a_spec(models=("small",))).runs.get()
    made.move(State.RUNNING, Reason.STARTING)
    return made


def lines(*events: dict[str, Any], first: int = 0) -> bytes:
    return b"".join(
        json.dumps({"seq": first + n, "at": AT, **event}).encode() + b"\n" for n, event in enumerate(events)
    )


def train(step: int, loss: float | None = 3.0, **more: Any) -> dict[str, Any]:
    figures = {"cross_entropy": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 500.0}
    return {"kind": "train", **progress(step), **figures, **more}


STARTED = {"kind": "started", "attempt": 1, "pid": 1, "hostname": "here", "versions": {}}


def rows() -> list[tuple[Any, ...]]:
    points = Point.objects.order_by("split", "step").values_list("split", "step", "cross_entropy", "tokens", "lr")
    notes = Note.objects.order_by("seq").values_list("seq", "kind", "data")
    return [*points, *((seq, kind, json.dumps(data, sort_keys=True)) for seq, kind, data in notes)]


def test_a_run_is_told_from_beginning_to_end(run: ModelRun) -> None:
    more = {"eval_seconds": 1.0, "setup_seconds": 2.0, "tokens_per_second": 700.0, "peak_memory_bytes": 9000}
    chunk = lines(
        STARTED,
        {"kind": "preparing", "what": "tokens", "done": 1, "total": 2},
        {"kind": "prepared", **prepared(30, 0)},
        {"kind": "grown", **grown({"parent": "small", "width": "duplicate", "depth": "identity"})},
        train(10, 3.0),
        {"kind": "eval", **evaluation("validation", 10)},
        train(30, 2.5),
        {"kind": "eval", **evaluation("test", 30)},
        {"kind": "finished", **progress(30), **more},
    )
    assert ingest(run, chunk, 0) == len(chunk)
    run.refresh_from_db()
    assert (run.offset, run.last_seq, run.reason) == (len(chunk), 8, Reason.TRAINING)
    assert (run.step, run.total_steps, run.tokens, run.flops) == (30, 30, 30 * 64, 30e6)
    assert (run.train_cross_entropy, run.tokens_per_second, run.peak_memory_bytes) == (2.5, 700.0, 9000)
    assert run.validation_cross_entropy == evaluation("validation", 10)["cross_entropy"]
    assert run.test_cross_entropy == evaluation("test", 30)["cross_entropy"]
    assert (run.parameters, run.non_embedding_parameters) == (2000, 1000)
    assert run.grown["parent"] == "small"
    assert run.preparing["what"] == "tokens"
    assert run.finished["peak_memory_bytes"] == 9000
    assert list(run.notes.values_list("kind", flat=True)) == ["started", "prepared", "grown", "finished"]
    point = run.points.get(split="validation")
    assert (point.step, point.accuracy, point.n_tokens, point.lr) == (10, 0.3, 1000, None)


def test_a_model_that_grew_on_the_way_is_known_as_it_is_now_and_trains_on(run: ModelRun) -> None:
    rules = {"parent": "small", "width": "duplicate", "depth": "identity"}
    cost = {"steps": 5, "tokens": 320, "flops": 1e9, "seconds": 2.5, "peak_memory_bytes": 1 << 20}
    learned = cost | {"loss_before": 4.5, "loss_after": 4.0}
    chunk = lines(
        {"kind": "prepared", **prepared(30, 0)},
        {"kind": "grown", **grown(rules)},
        train(10),
        {"kind": "preparing", "what": "writing the grown model, in bytes", "done": 1, "total": 2},
        {"kind": "grown", **grown(rules), "step": 10, "parameters": 4000, "optimizer": "grown", "learned": learned},
    )
    assert ingest(run, chunk, 0) == len(chunk)
    run.refresh_from_db()
    assert run.reason == Reason.TRAINING
    assert (run.grown["step"], run.grown["parameters"], run.grown["learned"]) == (10, 4000, learned)
    assert [note.data["step"] for note in run.notes.filter(kind="grown").order_by("seq")] == [0, 10]


def test_the_same_bytes_twice_change_nothing(run: ModelRun) -> None:
    chunk = lines(STARTED, train(1), train(2))
    ingest(run, chunk, 0)
    before = rows()
    assert ingest(run, chunk, 0) == len(chunk), "the answer is where the database stands"
    assert rows() == before


def test_bytes_from_the_wrong_place_are_refused(run: ModelRun) -> None:
    assert ingest(run, lines(train(1)), 100) == 0
    assert rows() == []


def test_half_a_line_waits_for_its_other_half(run: ModelRun) -> None:
    whole = lines(train(1), train(2))
    middle = whole.index(b"\n") + 20
    reached = ingest(run, whole[:middle], 0)
    assert reached == whole.index(b"\n") + 1
    assert ingest(run, b"no line yet", reached) == reached
    assert ingest(run, whole[reached:], reached) == len(whole)
    assert [step for _, step, *_ in rows()] == [1, 2]


def test_a_step_trained_again_takes_the_place_of_its_first_telling(run: ModelRun) -> None:
    first = lines(train(1, 3.0), train(2, 2.9), train(3, 2.8))
    reached = ingest(run, first, 0)
    ingest(run, lines(train(2, 2.7), train(3, 2.6), train(3, 2.5), first=3), reached)
    assert [(step, loss) for _, step, loss, *_ in rows()] == [(1, 3.0), (2, 2.7), (3, 2.5)]


def test_a_line_that_is_no_event_is_kept_as_a_warning_and_passed(run: ModelRun) -> None:
    chunk = lines(train(1)) + b"\xff\x00 what is this\n" + b'{"seq": 7}\n[1, 2]\n\n' + lines(train(2), first=1)
    assert ingest(run, chunk, 0) == len(chunk)
    assert run.points.count() == 2
    warnings = run.notes.filter(kind="warning")
    assert warnings.count() == 3
    assert any("what is this" in note.data["message"] for note in warnings)


@pytest.mark.parametrize("nothing", ["null", "NaN", "Infinity"])
def test_a_figure_that_is_none_is_kept_as_none(run: ModelRun, nothing: str) -> None:
    chunk = lines(train(5, loss=12345.0)).replace(b"12345.0", nothing.encode())
    ingest(run, chunk, 0)
    assert run.points.get().cross_entropy is None
    run.refresh_from_db()
    assert (run.step, run.train_cross_entropy) == (5, None)


def test_a_sample_with_a_nul_in_it_can_be_kept(run: ModelRun) -> None:
    ingest(run, lines({"kind": "sample", "step": 1, "prompt": "a\0b", "text": "c\0"}), 0)
    assert run.notes.get().data["prompt"] == "a�b"


def test_an_event_says_more_than_we_know_and_is_kept(run: ModelRun) -> None:
    ingest(run, lines({"kind": "warning", "message": "hm", "from_the_future": 1}), 0)
    assert run.notes.get().data["message"] == "hm"


def test_a_run_that_is_asked_to_stop_keeps_saying_so(run: ModelRun) -> None:
    ModelRun.objects.filter(pk=run.pk).update(stop_requested=True, reason=Reason.STOPPING)
    ingest(run, lines({"kind": "prepared", **prepared(30, 0)}), 0)
    run.refresh_from_db()
    assert run.reason == Reason.STOPPING


def test_reading_the_file_again_gives_the_same_rows(run: ModelRun) -> None:
    chunk = lines(STARTED, {"kind": "prepared", **prepared(3, 0)}, train(1), train(2)) + b"garbage\n"
    ingest(run, chunk, 0)
    run.refresh_from_db()
    known, before = (run.step, run.total_steps, run.offset, run.last_seq, run.tokens), rows()
    Point.objects.filter(run=run, step=1).delete()
    Note.objects.filter(run=run, kind="started").delete()
    ModelRun.objects.filter(pk=run.pk).update(step=99, tokens=0)
    rebuild(run, chunk)
    assert rows() == before
    assert (run.step, run.total_steps, run.offset, run.last_seq, run.tokens) == known


@pytest.mark.django_db(transaction=True)
def test_senders_that_race_send_everything_once(transactional_db: None) -> None:
    run = jobs.create(None, a_spec(models=("small",))).runs.get()
    chunks = [lines(*(train(10 * n + m) for m in range(10)), first=10 * n) for n in range(40)]
    whole = b"".join(chunks)
    ends = {sum(len(c) for c in chunks[:n]): chunk for n, chunk in enumerate(chunks)}
    failures: list[BaseException] = []

    def send() -> None:
        mine, reached = ModelRun.objects.get(pk=run.pk), 0
        try:
            while reached < len(whole):
                reached = ingest(mine, ends[reached], reached)
        except BaseException as error:
            failures.append(error)
        finally:
            connection.close()

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert not failures
    run.refresh_from_db()
    assert run.offset == len(whole)
    assert list(run.points.order_by("step").values_list("step", flat=True)) == list(range(400))
