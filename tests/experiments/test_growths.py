"""Checkpoints grown by themselves: the plan, the way of a growth, its certificate and files, and who sees it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from django.core.exceptions import ValidationError
from django.test import Client
from django.urls import reverse
from pytest_django import Settings
from rq.job import Job
from safetensors.numpy import load, save_file
from tokenizers import ByteLevelBPETokenizer

from accounts.models import User
from experiments import growths, jobs, looks, mirror, sources
from experiments.growth_forms import GrowthForm
from experiments.growths import follow
from experiments.models import Growth, Reason, State
from tests.experiments.factories import make_experiment, make_user
from tests.trainer.hub import hub
from trainer import agent
from trainer.families import get_family
from trainer.shape import Shape

pytestmark = pytest.mark.django_db

D_VOCAB, N_POSITIONS = 320, 64
SMALL = Shape(d_model=16, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=40, n_layers=2)


def write_checkpoint(folder: Path, shape: Shape = SMALL, tokenizer: bool = False) -> Path:
    """A Llama of random numbers, as any checkpoint is; with a tokenizer whose vocabulary is its own."""
    family, random = get_family("llama"), np.random.default_rng(3)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family.config(shape, N_POSITIONS, D_VOCAB, True)))
    table = family.parameters(shape, N_POSITIONS, D_VOCAB, True)
    tensors = {p.name: random.normal(0, 0.3, p.shape).astype(np.float32) for p in table}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if tokenizer:
        byte_level = ByteLevelBPETokenizer()
        byte_level.train_from_iterator(["the quick brown fox"], vocab_size=D_VOCAB, show_progress=False)
        byte_level.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, settings: Settings) -> Path:
    """A checkpoint in a folder that the operator opened, and nobody's processes left when the test is over."""
    settings.LOCAL_DATA_DIRS = [tmp_path / "opened"]
    return write_checkpoint(tmp_path / "opened" / "small")


@pytest.fixture(autouse=True)
def clear(settings: Settings) -> Iterator[None]:
    yield
    for process in settings.GROWTHS_DIR.glob("*/*/process.json"):
        agent.stop(process.parent, 0, wait=True)
    shutil.rmtree(settings.GROWTHS_DIR, ignore_errors=True)


def filled(checkpoint: Path | str, **more: Any) -> dict[str, Any]:
    """The form as a first visit shows it, for a checkpoint; not measured unless that is asked for."""
    values = GrowthForm.usual() | {"measures": "", "checkpoint": str(checkpoint), **more}
    return {name: value for name, value in values.items() if value is not None}


def make_growth(owner: User, checkpoint: Path, **more: Any) -> Growth:
    form = GrowthForm(filled(checkpoint, **more), user=owner)
    assert form.is_valid(), form.errors
    return growths.create(owner, uuid4(), **form.fields_of_row())


def signed_in(owner: User) -> Client:
    client = Client()
    client.force_login(owner)
    return client


@pytest.fixture
def ada() -> User:
    return make_user()


# The form and its plan ------------------------------------------------------------------------------------------------


def test_the_page_shows_the_plan_of_what_stands_in_the_form_and_makes_no_guest(
    client: Client, checkpoint: Path
) -> None:
    page = client.get(reverse("grow")).content.decode()
    assert "The plan appears here once a checkpoint is chosen." in page
    shape = {"target_kind": "shape", "d_model": "2x", "n_layers": "3"}
    sheet = client.post(reverse("grow_plan"), filled("./small", **shape)).content.decode()
    assert "Keeps the function." in sheet
    assert "Size on disk" in sheet
    sizes = get_family("llama").parameters(SMALL.model_copy(update={"d_model": 32, "n_layers": 3}), 64, D_VOCAB, True)
    assert f'title="{sum(p.size for p in sizes):,}"' in sheet
    assert 'id="making"' in sheet, "the picture of the growth"
    changed = client.post(reverse("grow_plan"), filled("./small", **shape, depth="stack")).content.decode()
    assert "Changes the function." in changed
    assert not User.objects.exists()


def test_a_multiple_becomes_a_shape(ada: User, checkpoint: Path) -> None:
    form = GrowthForm(filled(checkpoint, multiple="3", by="depth"), user=ada)
    assert form.is_valid()
    assert form.plan is not None
    assert form.plan.child.d_model == SMALL.d_model
    planned = form.planned()
    assert planned["child"]["parameters"] / planned["parent"]["parameters"] == pytest.approx(3, rel=0.15)
    assert planned["bytes"] == pytest.approx(4 * planned["child"]["parameters"], rel=0.05)


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"checkpoint": ""}, "checkpoint", "give a name or a path"),
        ({"checkpoint": "/etc"}, "checkpoint", "there is no such file or folder in"),
        ({"target_kind": "shape", "d_model": "8"}, "d_model", "d_model 8: "),
        ({"target_kind": "shape", "n_layers": "two"}, "n_layers", "must be a number, or a factor"),
        ({"multiple": "99"}, "multiple", "at most 16"),
        ({"d_vocab": "10"}, "d_vocab", "d_vocab 10: "),
        ({"width": "magic"}, "width", "magic"),
    ],
)
def test_what_is_wrong_stands_beside_its_field(
    ada: User, checkpoint: Path, given: dict[str, str], field: str, said: str
) -> None:
    form = GrowthForm(filled(**{"checkpoint": checkpoint, **given}), user=ada)
    assert not form.is_valid()
    assert said in str(form.errors[field])
    page = signed_in(ada).post(reverse("grow"), form.data)
    assert page.status_code == 422
    assert not Growth.objects.exists()


def test_an_architecture_that_cannot_be_grown_is_named(ada: User, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "mamba"}')
    form = GrowthForm(filled(checkpoint), user=ada)
    assert "mamba" in str(form.errors["checkpoint"])


def test_one_grows_the_finished_models_of_ones_own_runs_and_growths(ada: User, checkpoint: Path) -> None:
    experiment = make_experiment(ada, points=0)
    small = experiment.runs.get(name="small")
    shutil.copytree(checkpoint, small.directory / "model")
    try:
        page = signed_in(ada).get(f"{reverse('grow')}?run={small.pk}").content.decode()
        assert f'<option value="run-{small.pk}" selected>small of {experiment.name}' in page
        assert "Keeps the function." in page
        form = GrowthForm(filled("", source_kind="mine", mine=f"run-{small.pk}"), user=ada)
        assert form.is_valid()
        assert form.fields_of_row()["source_run"] == small
        other = GrowthForm(filled("", source_kind="mine", mine=f"run-{small.pk}"), user=make_user("bob@example.org"))
        assert not other.is_valid()
    finally:
        shutil.rmtree(experiment.directory)


@pytest.mark.django_db(transaction=True)
def test_a_name_on_the_hub_is_looked_up_by_a_worker_when_that_is_asked_for(
    client: Client, checkpoint: Path, queue: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    form = filled("some/one")
    assert "Look it up" in client.post(reverse("grow_plan"), form).content.decode()
    assert not queue.jobs
    assert "Looking up some/one" in client.post(reverse("grow_plan"), form | {"look": "1"}).content.decode()
    assert [job.args for job in queue.jobs] == [("some/one",)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    fetched: set[str] = set()
    with hub({path.name: path.read_bytes() for path in checkpoint.iterdir()}, fetched, kind="models") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        looks.find_out("some/one")
    assert fetched == {"config.json"}, "no weights before it is grown"
    assert "Keeps the function." in client.post(reverse("grow_plan"), form).content.decode()


@pytest.mark.django_db(transaction=True)
def test_a_name_that_cannot_be_looked_up_says_why(client: Client, queue: Any) -> None:
    looks.find_out("no/such-model")  # offline
    said = client.post(reverse("grow_plan"), filled("no/such-model")).content.decode()
    assert "Checkpoint no/such-model: no/such-model: cannot be fetched from the Hub" in said
    assert "Look it up" not in said


# The way of a growth --------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_guest_grows_a_checkpoint_and_takes_it_along(
    client: Client, queue: Any, tmp_path: Path, settings: Settings
) -> None:
    settings.LOCAL_DATA_DIRS = [tmp_path / "opened"]
    small = write_checkpoint(tmp_path / "opened" / "small", tokenizer=True)
    sent = filled(small, target_kind="shape", d_model="24", n_layers="2x", measures="on", key=str(uuid4()))
    page = client.post(reverse("grow"), sent)
    growth = Growth.objects.get()
    assert page["Location"] == growth.get_absolute_url()
    assert client.post(reverse("grow"), sent)["Location"] == page["Location"], "a double click makes one"
    assert Job.fetch(growth.job_id, queue.connection).args == (str(growth.pk), 1), "ids, never content"
    assert growth.owner.is_guest

    assert follow(str(growth.pk), 1)
    growth.refresh_from_db()
    assert (growth.state, growth.reason, growth.detail) == (State.SUCCEEDED, Reason.FINISHED, "")
    assert growth.disk_bytes >= growth.planned["bytes"]
    assert mirror.bytes_here(growth.owner) == growth.disk_bytes
    held = growth.certificate
    assert held["preserves"]
    assert held["tensors"].keys() >= {"model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight"}
    assert max(held["tensors"].values()) == held["residual"] <= held["tolerance"] < 1e-4
    assert held["measured"]["max_logit_difference"] <= held["measured"]["allowed"]
    assert held["measured"]["cross_entropy_after"] == pytest.approx(held["measured"]["cross_entropy_before"], abs=1e-4)

    html = client.get(growth.get_absolute_url()).content.decode()
    assert f"Every one of its {len(held['tensors'])} tensors that come from {small} holds" in html
    assert "tokens the logits of the two differ by rounding alone" in html
    answer = client.get(reverse("growth_zip", args=[growth.pk]))
    pieces = list(answer.streaming_content)  # type: ignore[attr-defined]
    archive = zipfile.ZipFile(io.BytesIO(b"".join(pieces)))
    contents = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert json.loads(contents.pop("certificate.json")) == held
    assert {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()} == {
        file["name"]: file["sha256"] for file in held["files"]
    }
    assert load(contents["model.safetensors"])["model.embed_tokens.weight"].shape == (D_VOCAB, 24)
    one = client.get(reverse("growth_file", args=[growth.pk, "model.safetensors"]))
    assert b"".join(one.streaming_content) == contents["model.safetensors"]  # type: ignore[attr-defined]
    assert one["Content-Length"] == str(len(contents["model.safetensors"]))
    assert client.get(reverse("growth_file", args=[growth.pk, "process.json"])).status_code == 404

    train = client.get(f"{reverse('train')}?checkpoint={growth.model}").content.decode()
    assert f'name="small_checkpoint" value="{growth.model}"' in train
    assert '<input type="text" name="large_d_model" value="' in train
    assert sources.checkpoint(str(growth.model), growth.owner) == str(growth.model)
    assert f"growth-{growth.pk}" in client.get(f"{reverse('grow')}?growth={growth.pk}").content.decode()

    directory = growth.directory
    client.post(reverse("growth_delete", args=[growth.pk]))
    assert not directory.exists()
    assert not mirror.bytes_here(growth.owner)


@pytest.mark.django_db(transaction=True)
def test_what_changes_the_function_says_so_and_is_certified_of_nothing(ada: User, checkpoint: Path, queue: Any) -> None:
    growth = make_growth(ada, checkpoint, multiple="2", width="random_pad", depth="append_random", dtype="BF16")
    follow(str(growth.pk), 1)
    growth.refresh_from_db()
    assert growth.state == State.SUCCEEDED
    weights = next(file for file in growth.certificate["files"] if file["name"] == "model.safetensors")
    assert weights["bytes"] == pytest.approx(2 * growth.planned["child"]["parameters"], abs=5000)
    assert not growth.certificate["tensors"]
    page = signed_in(ada).get(growth.get_absolute_url()).content.decode()
    assert "It does not compute what" in page
    assert "Not measured" in page
    assert "certificate-kept" not in page


@pytest.mark.django_db(transaction=True)
def test_one_that_fails_says_why_keeps_nothing_and_can_be_tried_again(ada: User, checkpoint: Path, queue: Any) -> None:
    growth = make_growth(ada, checkpoint)
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    follow(str(growth.pk), 1)
    growth.refresh_from_db()
    assert (growth.state, growth.reason) == (State.FAILED, Reason.BAD_CHECKPOINT)
    assert "model.safetensors" in growth.detail
    assert {path.name for path in growth.directory.iterdir()} == {"attempt-1"}
    client = signed_in(ada)
    page = client.get(growth.get_absolute_url()).content.decode()
    assert "The checkpoint could not be used" in page
    assert "begin again with the right one" in page
    assert client.get(reverse("growth_zip", args=[growth.pk])).status_code == 404

    weights.write_bytes(whole)
    client.post(reverse("growth_retry", args=[growth.pk]))
    assert follow(str(growth.pk), 1)  # a job that was left of the first attempt
    assert Growth.objects.get().state == State.QUEUED
    follow(str(growth.pk), 2)
    growth.refresh_from_db()
    assert (growth.state, growth.attempt) == (State.SUCCEEDED, 2)


@pytest.mark.django_db(transaction=True)
def test_a_source_that_was_taken_away_meanwhile_is_not_read(ada: User, checkpoint: Path, settings: Settings) -> None:
    growth = make_growth(ada, checkpoint)
    settings.LOCAL_DATA_DIRS = []
    follow(str(growth.pk), 1)
    growth.refresh_from_db()
    assert growth.reason == Reason.BAD_CHECKPOINT
    assert "not there any more, or not yours to use" in growth.detail
    assert not growth.work.exists()


# A process that takes its time: it reports, and ends when it is asked to, as the trainer does.
SLOW = """
import json, time
while True:
    print(json.dumps({"kind": "progress", "what": "writing", "done": 30, "total": 120}), flush=True)
    time.sleep(0.1)
"""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growths, "command", lambda growth: [sys.executable, "-c", SLOW])


def detach_when(reached: Any, seconds: float = 30) -> Any:
    """For `detached`: lets go once `reached` holds."""
    deadline = time.monotonic() + seconds

    def ask() -> bool:
        assert time.monotonic() < deadline
        return bool(reached())

    return ask


@pytest.mark.django_db(transaction=True)
def test_it_goes_on_without_its_follower_shows_its_progress_and_is_cancelled(
    ada: User, checkpoint: Path, queue: Any, slow: None
) -> None:
    growth, client = make_growth(ada, checkpoint), signed_in(ada)
    told = Growth.objects.filter(pk=growth.pk, phase="writing")
    assert not follow(str(growth.pk), 1, detached=detach_when(told.exists))
    status = agent.status(growth.work)
    assert status["alive"], "the growth belongs to no worker"
    page = client.get(growth.get_absolute_url()).content.decode()
    assert "Writing the grown weights: 30\xa0B of 120\xa0B" in page
    assert 'value="0.2500"' in page
    seen = [part.split('"')[0] for part in page.split('name="seen" value="')[1:]]
    poll = client.get(growth.get_absolute_url(), {"seen": seen}, headers={"HX-Request": "true"})
    assert poll.status_code == 204, "nothing has changed since"

    client.post(reverse("growth_stop", args=[growth.pk]))
    assert follow(str(growth.pk), 1)
    assert agent.status(growth.work)["pid"] == status["pid"], "attached to, not started again"
    growth.refresh_from_db()
    assert (growth.state, growth.reason) == (State.CANCELLED, Reason.STOPPED)
    assert "Try again" in client.get(growth.get_absolute_url()).content.decode()


@pytest.mark.django_db(transaction=True)
def test_one_that_is_killed_says_so(ada: User, checkpoint: Path, queue: Any, slow: None) -> None:
    growth = make_growth(ada, checkpoint)
    told = Growth.objects.filter(pk=growth.pk, phase="writing")
    assert not follow(str(growth.pk), 1, detached=detach_when(told.exists))
    agent.stop(growth.work, 0, wait=True)
    follow(str(growth.pk), 1)
    growth.refresh_from_db()
    assert (growth.state, growth.reason) == (State.FAILED, Reason.KILLED)


@pytest.mark.django_db(transaction=True)
def test_one_grows_at_a_time_the_others_wait_in_line(ada: User, checkpoint: Path, queue: Any, slow: None) -> None:
    first, second, third = (make_growth(ada, checkpoint) for _ in range(3))
    assert [job.id for job in queue.jobs] == [first.job_id], "rung for when it can begin"
    told = Growth.objects.filter(pk=first.pk, phase="writing")
    assert not follow(str(first.pk), 1, detached=detach_when(told.exists))
    assert follow(str(second.pk), 1)
    second.refresh_from_db()
    assert (second.state, growths.place_in_line(second), growths.place_in_line(third)) == (State.QUEUED, 1, 2)
    growths.request_stop(second)
    second.refresh_from_db()
    assert second.state == State.CANCELLED
    Growth.objects.get(pk=first.pk).delete()
    assert not first.directory.exists(), "and its process is gone with it"
    growths.reconcile()
    assert third.job_id in [job.id for job in queue.jobs]


@pytest.mark.django_db(transaction=True)
def test_one_that_nobody_follows_is_rung_for(ada: User, checkpoint: Path, queue: Any) -> None:
    growth = make_growth(ada, checkpoint)
    queue.connection.flushdb()
    growths.reconcile()
    assert [job.id for job in queue.jobs] == [growth.job_id]
    queue.connection.flushdb()
    Growth.objects.update(state=State.RUNNING, last_seen=None)
    growths.reconcile()
    assert [job.id for job in queue.jobs] == [growth.job_id]


# Limits, and who may see it -------------------------------------------------------------------------------------------


def test_a_growth_that_would_pass_the_users_share_of_the_disk_is_refused(
    ada: User, checkpoint: Path, settings: Settings
) -> None:
    other = make_growth(ada, checkpoint)
    Growth.objects.filter(pk=other.pk).update(state=State.SUCCEEDED, disk_bytes=10**9 - 1000)
    settings.MAX_DISK_GB_PER_USER = 1
    page = signed_in(ada).post(reverse("grow"), filled(checkpoint))
    assert page.status_code == 422
    assert "your experiments and growths take 1.0 GB of disk; 1 GB are allowed" in page.content.decode()
    assert Growth.objects.count() == 1


def test_growths_count_among_what_may_be_active_at_once(ada: User, checkpoint: Path, settings: Settings) -> None:
    settings.MAX_ACTIVE_RUNS_PER_USER = 1
    make_growth(ada, checkpoint)
    with pytest.raises(jobs.LimitReached, match="2 models waiting, training or growing at once; 1 are allowed"):
        make_growth(ada, checkpoint)


def test_a_stranger_is_told_that_there_is_no_such_growth(client: Client, ada: User, checkpoint: Path) -> None:
    growth = make_growth(ada, checkpoint)
    growth.model.mkdir(parents=True)
    (growth.model / "config.json").write_text("{}")
    Growth.objects.update(state=State.SUCCEEDED, certificate={"files": [], "tensors": {}, "measured": None})
    bob = make_user("bob@example.org")
    for stranger in (client, signed_in(bob)):
        for name in ("growth", "growth_zip", "growth_certificate"):
            assert stranger.get(reverse(name, args=[growth.pk])).status_code == 404
        assert stranger.get(reverse("growth_file", args=[growth.pk, "config.json"])).status_code == 404
        for name in ("growth_stop", "growth_retry", "growth_delete"):
            assert stranger.post(reverse(name, args=[growth.pk])).status_code == 404
        assert growth.name not in stranger.get(reverse("growths")).content.decode()
    with pytest.raises(ValidationError):
        sources.checkpoint(str(growth.model), bob)
    assert f"growth-{growth.pk}" not in signed_in(bob).get(f"{reverse('grow')}?growth={growth.pk}").content.decode()
    assert signed_in(ada).get(reverse("growth_certificate", args=[growth.pk])).status_code == 200


def test_the_list_is_polled_row_by_row(ada: User, checkpoint: Path) -> None:
    client = signed_in(ada)
    assert "Nothing here yet." in client.get(reverse("growths")).content.decode()
    first, second = make_growth(ada, checkpoint), make_growth(ada, checkpoint)
    page = client.get(reverse("growths")).content.decode()
    seen = [part.split('"')[0] for part in page.split('name="seen" value="')[1:]]
    assert client.get(reverse("growths"), {"seen": seen}).status_code == 204
    Growth.objects.filter(pk=first.pk).update(state=State.FAILED, reason=Reason.DISK_FULL)
    poll = client.get(reverse("growths"), {"seen": seen}).content.decode()
    assert str(first.pk) in poll
    assert "the disk is full" in poll
    assert client.get(reverse("growths"), {"seen": seen}).headers.get("HX-Trigger") is None, "one still waits"
    assert str(second.pk) in poll, "it has moved up in the line"


def test_an_account_that_goes_takes_its_growths_along(
    ada: User, checkpoint: Path, django_capture_on_commit_callbacks: Any
) -> None:
    growth = make_growth(ada, checkpoint)
    growth.model.mkdir(parents=True)
    with django_capture_on_commit_callbacks(execute=True):
        ada.delete()
    assert not Growth.objects.exists()
    assert not growth.directory.exists()


def test_an_administrator_sees_stops_and_deletes_growths(
    ada: User, checkpoint: Path, django_capture_on_commit_callbacks: Any
) -> None:
    root = signed_in(User.objects.create_superuser("root@example.org", "correct horse"))
    growth = make_growth(ada, checkpoint)
    growth.model.mkdir(parents=True)
    address = "/admin/experiments/growth/"
    assert growth.name in root.get(f"{address}?q={ada.email}").content.decode()
    assert "duplicate" in root.get(f"{address}{growth.pk}/change/").content.decode()
    act = {"_selected_action": str(growth.pk)}
    assert "1 of them asked to end." in root.post(address, act | {"action": "stop"}, follow=True).content.decode()
    assert "1 run queued again." in root.post(address, act | {"action": "resume"}, follow=True).content.decode()
    growth.refresh_from_db()
    assert (growth.state, growth.attempt) == (State.QUEUED, 2)
    with django_capture_on_commit_callbacks(execute=True):
        root.post(f"{address}{growth.pk}/delete/", {"post": "yes"})
    assert not Growth.objects.exists()
    assert not growth.directory.exists()
