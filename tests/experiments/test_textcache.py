"""Prepared text goes when nobody uses it, and only then."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import textcache
from tests.experiments.factories import make_experiment, make_user
from trainer.data import prepare
from trainer.spec import DataSpec

pytestmark = pytest.mark.django_db


@pytest.fixture
def text(tmp_path: Path, settings: Any) -> DataSpec:
    settings.DATA_CACHE = tmp_path / "cache"
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of a book.\n" for i in range(2000)))
    return DataSpec.model_validate({"source": str(tmp_path / "book.txt"), "tokenizer": {"kind": "bpe", "d_vocab": 300}})


def age(folder: Path, days: float) -> None:
    then = time.time() - days * 24 * 3600
    for path in (folder / "prepared.json", folder):
        if path.exists():
            os.utime(path, (then, then))


def test_text_that_no_run_has_used_for_long_is_removed_and_can_be_prepared_again(text: DataSpec, settings: Any) -> None:
    first = prepare(text, settings.DATA_CACHE)
    assert textcache.sweep() == 0
    age(first.folder, 29)
    assert textcache.sweep() == 0
    age(first.folder, 31)
    half_made = settings.DATA_CACHE / ".building-0-1"
    half_made.mkdir()
    age(half_made, 31)
    assert textcache.sweep() == 2
    assert [path.suffix for path in settings.DATA_CACHE.rglob("*") if path.is_file()] == [".lock"]
    assert prepare(text, settings.DATA_CACHE) == first


def test_a_run_that_takes_prepared_text_keeps_it_for_others(text: DataSpec, settings: Any) -> None:
    age(prepare(text, settings.DATA_CACHE).folder, 31)
    prepare(text, settings.DATA_CACHE)
    assert textcache.sweep() == 0


def test_text_stays_while_an_experiment_that_is_trained_on_it_goes_on(text: DataSpec, settings: Any) -> None:
    prepared = prepare(text, settings.DATA_CACHE)
    age(prepared.folder, 300)
    experiment = make_experiment(make_user(), points=0)
    small, scaled, _ = experiment.runs.order_by("position")
    small.prepared = {"data_fingerprint": prepared.fingerprint}
    small.save()
    scaled.state = "queued"
    scaled.save()
    assert textcache.sweep() == 0
    scaled.state = "succeeded"
    scaled.save()
    assert textcache.sweep() == 1
