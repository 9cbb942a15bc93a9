"""An experiment's page: what it says, what a poll brings, who may see it, and what may be done to it."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import quote

import pytest
from django.core.signals import request_finished
from django.db import close_old_connections, connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import User
from experiments import jobs
from experiments.models import Experiment, ModelRun, Reason, State
from experiments.standing import promise
from experiments.views import downloads
from tests.experiments.factories import add_note, make_experiment, make_spec, make_user
from tests.experiments.test_profile import inline_parts, marks

pytestmark = pytest.mark.django_db


@pytest.fixture
def ada(client: Client) -> User:
    user = make_user()
    client.force_login(user)
    return user


@pytest.fixture(autouse=True)
def _runs_dir(settings: Any, tmp_path: Path) -> None:
    settings.RUNS_DIR = tmp_path


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of each test's own: a download that a test did not close gives its back when the garbage is collected."""
    monkeypatch.setattr(downloads, "_places", BoundedSemaphore(downloads.DOWNLOADS))


def page(client: Client, experiment: Experiment, **query: str) -> str:
    answer = client.get(experiment.get_absolute_url(), query)
    assert answer.status_code == 200
    return answer.content.decode()


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).replace("\N{NO-BREAK SPACE}", " ")


def poll(client: Client, experiment: Experiment, seen: list[str]) -> Any:
    return client.get(experiment.get_absolute_url(), {"seen": seen}, headers={"HX-Request": "true"})


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_with_what_makes_it_fair(client: Client, ada: User) -> None:
    html = page(client, make_experiment(ada))
    assert re.search(r"scaled reached large&#x27;s final loss after \d+ % of its tokens; \d+ % of its FLOPs", html)
    assert "A fair comparison: same data, batches, seed, evaluation, steps, tuning, precision, device." in html
    assert html.index("verdict-sentence") < html.index("Curves") < html.index("Comparison")


def test_an_unfair_comparison_says_what_was_not_equal(client: Client, ada: User) -> None:
    spec = make_spec()
    spec["models"]["large"]["train"] = {"lr": 3e-4}
    html = page(client, make_experiment(ada, spec=spec))
    assert "Not equal:" in html
    assert "lr 0.001 against 0.0003" in html


@pytest.mark.parametrize(
    ("states", "sentence"),
    [
        ({"large": "running"}, "Too early to say: large is still training."),
        ({"large": "failed"}, "No verdict: large failed at step 200 (out of memory)"),
    ],
)
def test_no_verdict_before_its_time(client: Client, ada: User, states: dict[str, str], sentence: str) -> None:
    assert sentence in page(client, make_experiment(ada, states=states, until=0.5))


def test_the_comparison_has_every_figure_of_every_model(client: Client, ada: User) -> None:
    text = text_of(page(client, make_experiment(ada)))
    assert "Cross-entropy nats a token 4.730 3.930 4.230" in text
    assert "Perplexity 113.30 50.91 68.72" in text
    assert "Bits per byte 1.892 1.572 1.692" in text
    assert "Next-token accuracy 31 % 31 % 31 %" in text
    assert "Computed on tokens 65,536 65,536 65,536" in text
    assert "Parameters 350 k 1.3 M 1.3 M" in text
    assert "Tokens 205 k 205 k 205 k" in text
    assert "Compute FLOPs 4.3e11 1.6e12 1.6e12" in text
    assert "Training time 8.0 s 8.0 s 8.0 s" in text
    assert "Speed tokens/s 25,600 25,600 25,600" in text
    assert "Peak memory 600 MB 600 MB 600 MB" in text


def test_growth_is_held_against_its_promise(client: Client, ada: User) -> None:
    experiment = make_experiment(ada)
    assert "Promised to preserve the function, and did." in page(client, experiment)
    run = experiment.runs.get(name="scaled")
    ModelRun.objects.filter(pk=run.pk).update(grown={**run.grown, "max_logit_difference": 0.5})
    assert "Promised to preserve the function, and did not" in page(client, experiment)
    ModelRun.objects.filter(pk=run.pk).update(grown={**run.grown, "preserves": False})
    html = page(client, experiment)
    assert "These rules promise nothing for these shapes." in html
    assert "allowed 1e-04" not in html


@pytest.mark.parametrize(
    ("difference", "scale", "preserves", "device", "kept"),
    [
        (1e-3, 20.0, True, "cpu", True),
        (1e-2, 20.0, True, "cpu", False),
        (1e-1, 20.0, True, "cuda", True),
        (1e-1, 20.0, False, "cpu", None),
        (1e-3, 0.0, True, "cpu", None),
    ],
)
def test_rounding_is_no_broken_promise(
    difference: float, scale: float, preserves: bool, device: str, kept: bool | None
) -> None:
    event = {"max_logit_difference": difference, "logit_scale": scale, "preserves": preserves}
    assert promise(event, device).kept is kept


def test_newest_samples_stand_side_by_side_and_warnings_are_said(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=4)
    large = experiment.runs.get(name="large")
    add_note(large, "sample", step=100, prompt="def", text="an early one")
    add_note(large, "sample", step=400, prompt="def", text="a late one")
    add_note(experiment.runs.get(name="small"), "sample", step=400, prompt="def", text="a small one")
    add_note(large, "warning", message="The validation split is small.")
    html = page(client, experiment)
    assert "a late one" in html
    assert "a small one" in html
    assert "an early one" not in html
    assert "The validation split is small." in html


def test_a_shape_is_the_same_however_it_was_written(client: Client, ada: User) -> None:
    spec = make_spec()
    spec["models"]["large"]["shape"] = {**spec["models"]["large"]["shape"], "n_kv_heads": 4}
    assert "scaled reached large" in page(client, make_experiment(ada, spec=spec))


def test_a_failure_says_what_happened_and_what_to_do(client: Client, ada: User) -> None:
    html = page(client, make_experiment(ada, states={"scaled": "failed"}, until=0.5))
    assert "tried to allocate 2.00 GiB" in html
    assert "Try a smaller batch or context" in html
    assert "Resume from the last checkpoint" in html


def test_what_failed_before_its_first_step_says_why_at_once_and_is_tried_again(client: Client, ada: User) -> None:
    states = {"small": "failed", "scaled": "cancelled", "large": "failed"}
    html = page(client, make_experiment(ada, states=states, points=0, until=0.0))
    assert '<details id="detail-small" open>' in html
    assert "Resume from the last checkpoint" not in html
    assert "Try again" in html


def test_an_uploaded_file_is_shown_by_its_name_alone(client: Client, ada: User, settings: Any) -> None:
    path = settings.UPLOADS_DIR / "1" / "edc4364e8c428cae" / "rows.jsonl"
    spec = make_spec()
    spec["data"]["source"] = str(path)
    experiment = make_experiment(ada, spec=spec, state="failed")
    experiment.runs.update(detail=f"{path} cannot be read as jsonl: trailing data.")
    html = page(client, experiment)
    assert "<pre>rows.jsonl cannot be read as jsonl: trailing data.</pre>" in html
    assert str(settings.UPLOADS_DIR) not in html


def test_the_configuration_can_be_repeated_elsewhere(client: Client, ada: User) -> None:
    experiment = make_experiment(ada)
    html = page(client, experiment)
    text = text_of(html)
    assert f"python -m trainer run kangaroo-{experiment.pk}.json --out runs/{experiment.pk}" in html
    assert "d_model 64 128 128" in text
    assert "first weights random grown from small: duplicate, identity random" in text
    assert "torch 2.13.0" in text
    assert "seed 0" in text
    assert "data_fingerprint f00dfeed" in text
    answer = client.get(f"/experiments/{experiment.pk}/spec.json")
    assert json.loads(answer.content) == experiment.spec_json
    assert answer["Content-Disposition"].startswith("attachment")


def test_the_chart_has_a_table_that_follows_the_split_without_javascript(client: Client, ada: User) -> None:
    experiment = make_experiment(ada)
    text = text_of(page(client, experiment))
    assert "Validation split, 9 rows of 27 points in all" in text
    assert "400 205 k 4.720 112.17 3.920 50.40 4.220 68.03" in text
    assert "Train split, 40 rows of 120 points in all" in text_of(page(client, experiment, split="train"))
    assert "Test split, 1 rows of 3 points in all" in text_of(page(client, experiment, split="test"))


def test_a_loss_that_is_not_finite_is_said_in_the_table(client: Client, ada: User) -> None:
    experiment = make_experiment(ada)
    experiment.runs.get(name="scaled").points.filter(split="validation", step=200).update(cross_entropy=None)
    html = page(client, experiment)
    assert "not finite" in html
    assert "scaled&#x27;s validation loss was not finite at step 200" in html


def test_the_address_says_what_the_chart_shows(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=4)
    query = {"x": "flops", "y": "perplexity", "charge": "on", "logx": "on", "smooth": "0.9"}
    html = page(client, experiment, **query)
    assert '<option value="flops" selected>' in html
    assert '<option value="perplexity" selected>' in html
    assert re.search(r'name="charge" checked', html)
    assert re.search(r'name="logx" checked', html)
    assert not re.search(r'name="logy" checked', html)
    assert 'data-given="0.9"' in html
    html = page(client, experiment, x="nonsense", smooth='"><script>', split="nonsense")
    assert '<option value="step" selected>' in html
    assert 'data-given=""' in html


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "failed", "cancelled"])
def test_the_page_stands_in_every_state_with_and_without_curves(client: Client, ada: User, state: str) -> None:
    for points in (0, 10):
        html = page(client, make_experiment(ada, state=state, until=0.3, points=points))
        assert ("Stop, keeping a checkpoint" in html) is (state in ("queued", "running"))
        assert ("Resume from the last checkpoint" in html) is (state in ("failed", "cancelled"))
        assert inline_parts(html) == []


def test_a_ladder_and_a_single_model_have_pages_too(client: Client, ada: User) -> None:
    spec = make_spec()
    middle = {**spec["models"]["scaled"]}
    spec["models"] = {
        "small": spec["models"]["small"],
        "middle": middle,
        "top": {**middle, "init": {**middle["init"], "parent": "middle"}},
        "large": spec["models"]["large"],
        "large-2": {**spec["models"]["large"], "train": {"seed": 1}},
    }
    html = page(client, make_experiment(ada, spec=spec))
    assert html.count("verdict-sentence") == 4  # two grown, two from scratch
    assert "model-other-1" in html
    spec["models"] = {"only": spec["models"]["small"]}
    assert "nothing to judge" in page(client, make_experiment(ada, spec=spec))


# Polls ----------------------------------------------------------------------------------------------------------------


def test_a_poll_without_news_swaps_nothing(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    answer = poll(client, experiment, marks(page(client, experiment)))
    assert answer.status_code == 204
    assert answer.content == b""


def test_a_poll_brings_the_sections_that_changed_and_no_other(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    seen = marks(page(client, experiment))
    ModelRun.objects.filter(experiment=experiment, name="large").update(step=210, last_seq=210)
    html = poll(client, experiment, seen).content.decode()
    assert 'id="section-progress"' in html
    assert "step 210 of 400" in html
    assert 'id="section-table"' in html
    for unchanged in ("head", "growth", "samples", "setup", "log", "files", "data"):
        assert f'id="section-{unchanged}"' not in html
    assert "<h1" not in html
    answer = poll(client, experiment, [*marks(html), *seen])
    assert answer.status_code == 200  # the old mark of the whole was last; any old mark asks again
    assert poll(client, experiment, [*seen, *marks(html)]).status_code == 204


def test_polling_is_told_to_end_when_nothing_runs(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    seen = marks(page(client, experiment))
    assert "data-poll" in page(client, experiment)
    for run in experiment.runs.all():
        run.move(State.SUCCEEDED, Reason.FINISHED, ended_at=timezone.now())
    answer = poll(client, experiment, seen)
    assert answer["HX-Trigger"] == "kangaroo:settled"
    assert "Succeeded" in answer.content.decode()
    assert "data-poll" not in page(client, experiment)


def test_the_page_and_its_polls_cost_a_fixed_number_of_queries(
    client: Client, ada: User, django_assert_max_num_queries: Any
) -> None:
    experiment = make_experiment(ada, state="running", until=0.5)
    html = page(client, experiment)
    with django_assert_max_num_queries(9):
        page(client, experiment)
    with django_assert_max_num_queries(4):
        assert poll(client, experiment, marks(html)).status_code == 204
    spec = make_spec()
    spec["models"] |= {f"large-{i}": spec["models"]["large"] for i in range(9)}
    many = make_experiment(ada, spec=spec)
    page(client, many)
    with django_assert_max_num_queries(9):
        page(client, many)


# Files ----------------------------------------------------------------------------------------------------------------


def write_files(experiment: Experiment, name: str = "scaled") -> Path:
    folder = experiment.directory / name
    for part in ("model", "checkpoints/step-000400"):
        (folder / part).mkdir(parents=True)
        (folder / part / "model.safetensors").write_bytes(b"weights" * 400_000)
        (folder / part / "config.json").write_text("{}")
    (folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(5000)) + " 1%\r 50%\r100%\nthe end\n")
    return folder


def test_checkpoints_and_models_are_listed_and_come_as_zip_files(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    write_files(experiment)
    html = page(client, experiment)
    assert "step-000400, zip" in html
    for name in ("model", "step-000400"):
        address = f"/experiments/{experiment.pk}/scaled/checkpoint/{name}/"
        assert f'href="{address}"' in html
        answer = client.get(address)
        assert answer["Content-Disposition"] == f'attachment; filename="scaled-{name}.zip"'
        pieces = list(answer.streaming_content)  # type: ignore[attr-defined]
        assert len(pieces) > 2  # streamed, not made in memory first
        archive = zipfile.ZipFile(io.BytesIO(b"".join(pieces)))
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == [f"scaled-{name}/config.json", f"scaled-{name}/model.safetensors"]
        assert archive.read(f"scaled-{name}/model.safetensors") == b"weights" * 400_000


def test_a_file_too_large_for_the_plain_kind_of_zip_is_downloaded_whole(
    client: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1_000_000)  # 2 GB in truth
    experiment = make_experiment(ada, points=0)
    write_files(experiment)
    answer = client.get(f"/experiments/{experiment.pk}/scaled/checkpoint/model/")
    archive = zipfile.ZipFile(io.BytesIO(b"".join(answer.streaming_content)))  # type: ignore[attr-defined]
    assert archive.read("scaled-model/model.safetensors") == b"weights" * 400_000


def test_a_checkpoint_that_is_deleted_meanwhile_is_downloaded_to_its_end(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    folder = write_files(experiment)
    answer = client.get(f"/experiments/{experiment.pk}/scaled/checkpoint/step-000400/")
    pieces = iter(answer.streaming_content)  # type: ignore[attr-defined]
    first = next(pieces)
    shutil.rmtree(folder / "checkpoints" / "step-000400")
    archive = zipfile.ZipFile(io.BytesIO(first + b"".join(pieces)))
    assert archive.read("scaled-step-000400/model.safetensors") == b"weights" * 400_000


def test_a_page_stands_while_a_checkpoint_is_replaced_under_it(
    client: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_experiment(ada, points=0)
    folder = write_files(experiment)
    members = downloads.members

    def then_gone(checkpoint: Path) -> list[Path]:
        found = members(checkpoint)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return found

    monkeypatch.setattr(downloads, "members", then_gone)
    assert client.get(experiment.get_absolute_url()).status_code == 200


def test_downloads_leave_threads_to_the_pages_and_give_their_places_back(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    write_files(experiment)
    address = f"/experiments/{experiment.pk}/scaled/checkpoint/model/"
    for _ in range(2):
        slow = [client.get(address) for _ in range(downloads.DOWNLOADS)]
        assert [answer.status_code for answer in slow] == [200] * downloads.DOWNLOADS
        refused = client.get(f"/experiments/{experiment.pk}/metrics.csv")
        assert (refused.status_code, refused["Retry-After"]) == (503, "60")
        assert "Try again in a minute" in refused.content.decode()
        assert client.get(experiment.get_absolute_url()).status_code == 200
        b"".join(slow.pop().streaming_content)  # type: ignore[attr-defined]
        request_finished.disconnect(close_old_connections)  # the test's own
        for answer in slow:
            answer.close()  # nobody has begun to read them
        request_finished.connect(close_old_connections)


@pytest.mark.parametrize("name", ["step-000999", "log", "model-x", "checkpoints"])
def test_what_is_no_checkpoint_is_not_given_out(client: Client, ada: User, name: str) -> None:
    experiment = make_experiment(ada, points=0)
    write_files(experiment)
    assert client.get(f"/experiments/{experiment.pk}/scaled/checkpoint/{name}/").status_code == 404


def test_links_out_of_a_run_directory_are_not_followed(client: Client, ada: User, tmp_path: Path) -> None:
    experiment = make_experiment(ada, points=0)
    folder = write_files(experiment)
    secret = tmp_path.parent / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "key").write_text("secret")
    (folder / "checkpoints" / "step-000500").symlink_to(secret)
    (folder / "model" / "link.txt").symlink_to(secret / "key")
    (folder / "log.txt").unlink()
    (folder / "log.txt").symlink_to(secret / "key")
    assert client.get(f"/experiments/{experiment.pk}/scaled/checkpoint/step-000500/").status_code == 404
    answer = client.get(f"/experiments/{experiment.pk}/scaled/checkpoint/model/")
    assert b"link.txt" not in b"".join(answer.streaming_content)  # type: ignore[attr-defined]
    assert b"secret" not in client.get(f"/experiments/{experiment.pk}/scaled/log/").content
    html = page(client, experiment)
    assert "secret" not in html
    assert "step-000500" not in html


def test_the_end_of_the_log_is_on_the_page_and_more_of_it_as_plain_text(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    write_files(experiment)
    html = page(client, experiment)
    assert "line 4999\n100%\nthe end" in html
    assert "line 100\n" not in html
    answer = client.get(f"/experiments/{experiment.pk}/scaled/log/")
    assert answer["Content-Type"] == "text/plain; charset=utf-8"
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert answer.content.decode().startswith("line 0\n")
    assert client.get(f"/experiments/{experiment.pk}/large/log/").content == b"No log yet."


# Actions --------------------------------------------------------------------------------------------------------------


def test_name_and_notes_can_be_changed(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    url = f"/experiments/{experiment.pk}/edit/"
    answer = client.post(url, {"name": "Another", "notes": "For the paper."})
    assert answer.headers["Location"] == experiment.get_absolute_url()
    experiment.refresh_from_db()
    assert (experiment.name, experiment.notes) == ("Another", "For the paper.")
    assert "For the paper." in page(client, experiment)


def test_notes_have_an_end(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    answer = client.post(f"{experiment.get_absolute_url()}edit/", {"name": "x", "notes": "n" * 20_001})
    assert answer.status_code == 422
    assert "at most 20000 characters" in answer.content.decode()
    experiment.refresh_from_db()
    assert len(experiment.notes) < 20_000


def test_an_empty_name_is_refused_and_what_was_typed_stays(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, points=0)
    answer = client.post(f"/experiments/{experiment.pk}/edit/", {"name": " ", "notes": "typed already"})
    html = answer.content.decode()
    assert answer.status_code == 422
    assert "typed already" in html
    assert 'id="name-error"' in html
    assert '<details class="rename" id="rename" open>' in html
    experiment.refresh_from_db()
    assert experiment.name


def test_stopping_is_a_wish_for_what_runs_and_the_end_for_what_waits(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, state="running", states={"scaled": "queued"}, until=0.5)
    answer = client.post(f"/experiments/{experiment.pk}/stop/", follow=True)
    runs = {run.name: run for run in experiment.runs.all()}
    assert runs["large"].stop_requested
    assert runs["large"].state == State.RUNNING
    assert runs["scaled"].state == State.CANCELLED
    assert ">Stopping</button>" in answer.content.decode()


def test_resuming_queues_what_did_not_finish(client: Client, ada: User) -> None:
    experiment = make_experiment(ada, states={"scaled": "failed", "large": "cancelled"}, until=0.5)
    answer = client.post(f"/experiments/{experiment.pk}/resume/", follow=True)
    assert "Queued again: scaled, large." in answer.content.decode()
    assert {run.name: run.state for run in experiment.runs.all()} == {
        "small": State.SUCCEEDED,
        "scaled": State.QUEUED,
        "large": State.QUEUED,
    }


def test_a_limit_in_the_way_of_resuming_is_said(client: Client, ada: User, settings: Any) -> None:
    settings.MAX_ACTIVE_RUNS_PER_USER = 1
    experiment = make_experiment(ada, state="cancelled", until=0.5)
    html = client.post(f"/experiments/{experiment.pk}/resume/", follow=True).content.decode()
    assert "1 are allowed" in html


def test_deleting_asks_first_in_words_and_takes_everything(
    client: Client, ada: User, django_capture_on_commit_callbacks: Any
) -> None:
    experiment = make_experiment(ada)
    directory = experiment.directory
    write_files(experiment)
    assert not re.search(r"<dialog[^>]* open", page(client, experiment))
    html = page(client, experiment, delete="")
    assert re.search(r"<dialog[^>]* open", html)
    assert "This cannot be undone." in html
    assert client.get(f"/experiments/{experiment.pk}/delete/").status_code == 405
    assert Experiment.objects.filter(pk=experiment.pk).exists()
    with django_capture_on_commit_callbacks(execute=True):
        answer = client.post(f"/experiments/{experiment.pk}/delete/", follow=True)
    assert "is deleted" in answer.content.decode()
    assert not Experiment.objects.filter(pk=experiment.pk).exists()
    assert client.get(experiment.get_absolute_url()).status_code == 404
    assert not directory.exists()


# Who may see what -----------------------------------------------------------------------------------------------------

PAGES = [
    "",
    "metrics.json",
    "metrics.csv",
    "spec.json",
    "small/log/",
    "small/checkpoint/model/",
]
ACTIONS = ["edit/", "stop/", "resume/", "delete/"]


@pytest.fixture
def theirs() -> Experiment:
    return make_experiment(make_user("eve@example.org"), state="running", until=0.5, points=4)


@pytest.mark.parametrize("signed_in", [True, False])
@pytest.mark.parametrize("part", PAGES)
def test_a_stranger_cannot_see_an_experiment(client: Client, theirs: Experiment, part: str, signed_in: bool) -> None:
    write_files(theirs, "small")
    if signed_in:
        client.force_login(make_user())
    assert client.get(f"{theirs.get_absolute_url()}{part}").status_code == 404


@pytest.mark.parametrize("is_public", [True, False])
@pytest.mark.parametrize("signed_in", [True, False])
@pytest.mark.parametrize("part", ACTIONS)
def test_a_stranger_cannot_change_an_experiment(
    client: Client, theirs: Experiment, part: str, signed_in: bool, is_public: bool
) -> None:
    Experiment.objects.filter(pk=theirs.pk).update(is_public=is_public)
    if signed_in:
        client.force_login(make_user())
    assert client.post(f"{theirs.get_absolute_url()}{part}", {"name": "Mine now"}).status_code == 404
    again = Experiment.objects.get(pk=theirs.pk)
    assert again.name == theirs.name
    assert not again.runs.filter(stop_requested=True).exists()


@pytest.mark.parametrize("signed_in", [True, False])
@pytest.mark.parametrize("part", PAGES)
def test_what_is_shown_to_all_can_be_read_by_all(
    client: Client, theirs: Experiment, part: str, signed_in: bool
) -> None:
    Experiment.objects.filter(pk=theirs.pk).update(is_public=True)
    write_files(theirs, "small")
    if signed_in:
        client.force_login(make_user())
    answer = client.get(f"{theirs.get_absolute_url()}{part}")
    assert answer.status_code == 200
    if not part:
        html = answer.content.decode()
        assert "read-only" in html
        assert 'method="post" action="/experiments' not in html
        assert "<dialog" not in html


def test_an_administrator_may_change_what_belongs_to_nobody(client: Client) -> None:
    client.force_login(make_user("root@example.org", is_staff=True))
    experiment = make_experiment(None, is_public=True, points=0)
    assert client.post(f"{experiment.get_absolute_url()}edit/", {"name": "Renamed"}).status_code == 302


@pytest.mark.parametrize(
    "part", ["", "metrics.json", "metrics.csv", "spec.json", "scaled/log/", "scaled/checkpoint/model/", "?delete"]
)
def test_looking_changes_nothing(client: Client, ada: User, part: str) -> None:
    experiment = make_experiment(ada, points=5)
    write_files(experiment)
    with CaptureQueriesContext(connection) as queries:
        answer = client.get(f"{experiment.get_absolute_url()}{part}")
        assert answer.status_code == 200
        b"".join(answer)
    reads = ("SELECT", "DECLARE")  # PostgreSQL reads what may be much through a cursor
    assert not [query["sql"] for query in queries if not query["sql"].startswith(reads)]


def test_nothing_that_people_or_trainers_write_becomes_markup(client: Client, ada: User) -> None:
    hostile = """<img src=x onerror=alert(1)>'"><script>alert(1)</script><a hx-get=/x hx-trigger=load>{{ 7|add:7 }}"""
    spec = make_spec()
    spec["data"] |= {"config": hostile, "text_column": hostile}
    experiment = make_experiment(ada, points=5)
    experiment.name, experiment.notes, experiment.spec_json = hostile[:120], hostile, spec
    experiment.save()
    experiment.runs.update(
        detail=hostile, state=State.FAILED, prepared={"device_name": hostile, "versions": {"x": hostile}}
    )
    run = experiment.runs.get(name="scaled")
    add_note(run, "sample", step=400, prompt=hostile, text=hostile)
    add_note(run, "warning", message=hostile)
    (write_files(experiment) / "log.txt").write_text(hostile)
    ada.name = hostile[:120]
    ada.is_staff = ada.is_superuser = True
    ada.save()
    for path in (
        experiment.get_absolute_url(),
        f"{experiment.get_absolute_url()}?delete",
        f"{experiment.get_absolute_url()}?seen=head:x",
        "/profile/",
        f"/train/?from={experiment.pk}",
        f"/profile/?q={quote(hostile)}",
        f"/admin/experiments/experiment/{experiment.pk}/change/",
        f"/admin/experiments/modelrun/{run.pk}/change/",
        f"/admin/experiments/modelrun/?q={quote(hostile)}",
    ):
        html = client.get(path).content.decode()
        assert "onerror" in html, path
        assert not re.search(r"<img src=x|<script>alert|<a hx-get=/x|[^&;]'\"><script", html), path
        assert "14" not in re.findall(r"hx-trigger=load&gt;(..)", html), path
    client.post(f"{experiment.get_absolute_url()}delete/")
    assert "<img src=x" not in client.get("/profile/").content.decode()


@pytest.mark.parametrize("part", ACTIONS)
def test_actions_answer_to_post_alone(client: Client, ada: User, part: str) -> None:
    experiment = make_experiment(ada, points=0)
    assert client.get(f"{experiment.get_absolute_url()}{part}").status_code == 405


def test_actions_need_the_pages_token(ada: User) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(ada)
    experiment = make_experiment(ada, points=0)
    assert strict.post(f"{experiment.get_absolute_url()}delete/").status_code == 403
    assert jobs.resume(experiment) == []
