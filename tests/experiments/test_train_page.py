"""The Train page: what it shows, what it starts, and that it starts it once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile, TemporaryUploadedFile
from django.db import IntegrityError
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import User
from experiments import estimate as estimates
from experiments import jobs, looks
from experiments.forms import ExperimentForm
from experiments.models import Experiment, Host, ModelRun, State
from experiments.presets import FIRST_LOOK, ORIGINAL, PRESETS
from experiments.templatetags.figures import count, flops, si
from tests.experiments.factories import make_experiment, make_user
from tests.experiments.test_forms import EMPTY, first_look, from_checkpoint, posted, stage
from trainer.budget import parameters, sheet
from trainer.families import get_family
from trainer.shape import Shape

pytestmark = pytest.mark.django_db

TRAIN = "/train/"


class Page(HTMLParser):
    """A page's elements with their attributes, for tests that follow what points at what."""

    def __init__(self, response: Any):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(response.content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def by_id(self, id: str) -> dict[str, str]:
        (found,) = [attrs for _, attrs in self.elements if attrs.get("id") == id]
        return found

    @property
    def ids(self) -> set[str]:
        return {attrs["id"] for _, attrs in self.elements if "id" in attrs}


@pytest.fixture
def owner(client: Client) -> User:
    user = make_user()
    client.force_login(user)
    return user


# Looking at it --------------------------------------------------------------------------------------------------------


def test_looking_at_the_page_makes_no_guest_and_no_session(client: Client) -> None:
    assert client.get(TRAIN).status_code == 200
    assert "sessionid" not in client.cookies
    assert not User.objects.exists()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.key)
def test_a_preset_fills_the_form_by_a_link_alone(client: Client, preset: Any) -> None:
    page = Page(client.get(TRAIN, {"preset": preset.key}))
    assert page.by_id("id_name")["value"] == preset.spec.name
    assert page.by_id("id_large_d_model")["value"] == str(preset.spec.models["large"].shape.d_model)
    chosen = [a["href"] for a in page.all("a") if a.get("aria-current") == "true"]
    assert chosen == [f"?preset={preset.key}"]
    assert {a["href"] for a in page.all("a")} >= {f"?preset={key}" for key in PRESETS}


def test_a_preset_that_does_not_exist_is_the_first_look(client: Client) -> None:
    assert Page(client.get(TRAIN, {"preset": "nope"})).by_id("id_name")["value"] == FIRST_LOOK.spec.name


def test_the_original_is_what_it_was() -> None:
    small, large = (ORIGINAL.spec.models[name].shape for name in ("small", "large"))
    assert small
    assert (small.d_model, small.n_heads, small.d_head, small.d_mlp, small.n_layers) == (256, 4, 64, 512, 2)
    assert large
    assert (large.d_model, large.n_heads, large.d_head, large.d_mlp, large.n_layers) == (512, 4, 64, 1024, 4)
    assert (ORIGINAL.spec.train.batch_size, ORIGINAL.spec.train.max_steps) == (8, 25_000)
    assert (ORIGINAL.spec.data.source, ORIGINAL.spec.data.config) == ("wikitext", "wikitext-103-raw-v1")


def test_the_page_needs_nothing_that_its_security_policy_refuses(client: Client) -> None:
    response = client.get(TRAIN)
    assert "unsafe" not in response["Content-Security-Policy"]
    for tag, attrs in Page(response).elements:
        assert "style" not in attrs
        assert not [name for name in attrs if name.startswith(("on", "hx-on"))]
        assert tag != "style"
        assert tag != "script" or "src" in attrs
        assert "js:" not in "".join(attrs.values())


def test_whatever_points_at_another_element_finds_it(client: Client) -> None:
    for response in (client.get(TRAIN), client.post(TRAIN, first_look(lr="fast", small_d_head="63", width="no"))):
        page = Page(response)
        for _, attrs in page.elements:
            for name in ("aria-describedby", "aria-labelledby", "for"):
                assert set(attrs.get(name, "").split()) <= page.ids, attrs
            if attrs.get("href", "").startswith("#"):
                assert attrs["href"][1:] in page.ids
        ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
        assert len(ids) == len(set(ids))


# Use as a start -------------------------------------------------------------------------------------------------------


def test_an_experiment_of_ones_own_fills_the_form(client: Client, owner: User) -> None:
    experiment = make_experiment(owner, name="Mine", points=0)
    page = Page(client.get(TRAIN, {"from": str(experiment.pk)}))
    assert page.by_id("id_name")["value"] == "Mine"
    assert page.by_id("id_small_d_model")["value"] == "64"


def test_a_renamed_experiment_fills_the_form_under_its_new_name(client: Client, owner: User) -> None:
    experiment = make_experiment(owner, name="Old", points=0)
    Experiment.objects.filter(pk=experiment.pk).update(name="New")
    assert Page(client.get(TRAIN, {"from": str(experiment.pk)})).by_id("id_name")["value"] == "New"


def test_a_public_experiment_fills_the_form_of_anybody(client: Client) -> None:
    experiment = make_experiment(None, name="Shown to all", points=0, is_public=True)
    assert Page(client.get(TRAIN, {"from": str(experiment.pk)})).by_id("id_name")["value"] == "Shown to all"


def test_a_stranger_cannot_start_from_an_experiment(client: Client, owner: User) -> None:
    experiment = make_experiment(make_user("bob@example.org"), points=0)
    assert client.get(TRAIN, {"from": str(experiment.pk)}).status_code == 404
    assert Client().get(TRAIN, {"from": str(experiment.pk)}).status_code == 404


@pytest.mark.parametrize("name", ["", "1", "no-such-id", str(uuid.UUID(int=0))])
def test_an_experiment_that_does_not_exist_is_not_found(client: Client, name: str) -> None:
    assert client.get(TRAIN, {"from": name}).status_code == 404


def test_what_the_form_leaves_out_of_an_experiment_is_said(client: Client, owner: User) -> None:
    spec = FIRST_LOOK.spec.model_dump(mode="json")
    spec["models"]["scaled"]["train"] = {"lr": 0.01}
    experiment = make_experiment(owner, points=0, spec=spec)
    assert b"models.scaled.train.lr" in client.get(TRAIN, {"from": str(experiment.pk)}).content


def test_the_text_of_somebody_else_is_not_handed_on(client: Client, settings: Any) -> None:
    spec = FIRST_LOOK.spec.model_dump(mode="json")
    spec["data"]["source"] = str(settings.UPLOADS_DIR / "99" / "abc" / "diary.txt")
    experiment = make_experiment(None, points=0, spec=spec, is_public=True)
    response = client.get(TRAIN, {"from": str(experiment.pk)})
    assert b"diary" not in response.content
    assert "file of its owner" in response.content.decode()


# Starting -------------------------------------------------------------------------------------------------------------


def test_a_guest_is_made_when_an_experiment_is_started(client: Client) -> None:
    response = client.post(TRAIN, first_look(notes="Does it save anything?"))
    experiment = Experiment.objects.get()
    assert response.status_code == 302
    assert response["Location"] == reverse("experiment", args=[experiment.pk])
    assert experiment.owner == User.objects.get()
    assert experiment.owner.is_guest
    assert client.session["_auth_user_id"] == str(experiment.owner.pk)
    assert experiment.notes == "Does it save anything?"
    assert experiment.spec == FIRST_LOOK.spec
    assert [(run.name, run.state) for run in experiment.runs.all()] == [
        (name, State.QUEUED) for name in ("small", "scaled", "large")
    ]


def test_a_double_click_makes_one_experiment(client: Client, owner: User) -> None:
    form = first_look()
    first, second = client.post(TRAIN, form), client.post(TRAIN, form)
    assert first["Location"] == second["Location"]
    assert Experiment.objects.count() == 1


def test_the_double_click_of_a_visitor_makes_one_guest_see_one_experiment() -> None:
    """Both requests leave the browser before either brought the session back."""
    form, first, second = first_look(), Client(), Client()
    one, other = first.post(TRAIN, form), second.post(TRAIN, form)
    assert one["Location"] == other["Location"]
    experiment = Experiment.objects.get()
    for client in (first, second):
        assert client.session["_auth_user_id"] == str(experiment.owner_id)


def test_two_clicks_at_the_same_instant_make_one_experiment(
    client: Client, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = jobs.create

    def overtaken(*args: Any, **kwargs: Any) -> Experiment:
        create(*args, **kwargs)
        raise IntegrityError("UNIQUE constraint failed")

    monkeypatch.setattr(jobs, "create", overtaken)
    response = client.post(TRAIN, first_look())
    assert response["Location"] == Experiment.objects.get().get_absolute_url()


def test_the_second_of_two_clicks_that_reach_a_limit_is_the_first_ones_experiment(
    client: Client, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = jobs.create

    def overtaken(*args: Any, **kwargs: Any) -> Experiment:
        create(*args, **kwargs)
        raise jobs.LimitReached("3 are waiting, 3 are allowed")

    monkeypatch.setattr(jobs, "create", overtaken)
    assert client.post(TRAIN, first_look())["Location"] == Experiment.objects.get().get_absolute_url()


def test_a_form_that_was_changed_after_going_back_makes_another_experiment(client: Client, owner: User) -> None:
    form = first_look()
    client.post(TRAIN, form)
    client.post(TRAIN, form | {"seed": "1"})
    assert Experiment.objects.count() == 2


def test_knowing_a_form_does_not_sign_anybody_in_as_its_owner(client: Client, owner: User) -> None:
    form, visitor = first_look(), Client()
    client.post(TRAIN, form)
    response = visitor.post(TRAIN, form)
    assert "_auth_user_id" not in visitor.session
    assert visitor.get(response["Location"]).status_code == 404


def test_the_key_of_a_form_is_never_the_same_twice(client: Client) -> None:
    keys = {Page(client.get(TRAIN)).by_id("id_key")["value"] for _ in range(3)}
    assert len(keys) == 3


def test_large_may_be_left_out(client: Client, owner: User) -> None:
    client.post(TRAIN, first_look(train_large=False))
    assert [run.name for run in ModelRun.objects.all()] == ["small", "scaled"]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_an_error_stands_beside_its_field_and_loses_nothing(client: Client) -> None:
    response = client.post(TRAIN, first_look(lr="fast", name="Kept", notes="kept too", train_large=False))
    page = Page(response)
    assert response.status_code == 422
    assert not Experiment.objects.exists()
    assert not User.objects.exists()  # nothing to own yet
    field = page.by_id("id_lr")
    assert (field["value"], field["aria-invalid"]) == ("fast", "true")
    assert "id_lr_error" in field["aria-describedby"].split()
    assert (
        "lr fast: must be a number" in re.search(r'id="id_lr_error">(.*?)</p>', response.content.decode(), re.DOTALL)[1]
    )  # type: ignore[index]
    assert page.by_id("id_name")["value"] == "Kept"
    assert b"kept too" in response.content
    assert "checked" not in page.by_id("id_train_large")
    summary = page.by_id("summary")
    assert "autofocus" in summary
    assert summary["role"] == "alert"
    assert {"href": "#id_lr"} in page.all("a")


def test_a_folded_field_with_an_error_is_unfolded(client: Client) -> None:
    assert all("open" not in details for details in Page(client.get(TRAIN)).all("details"))
    page = Page(client.post(TRAIN, first_look(beta2="1")))
    assert any("open" in details for details in page.all("details"))


def test_a_limit_is_said_on_the_page_and_nothing_is_lost(client: Client, owner: User, settings: Any) -> None:
    settings.MAX_ACTIVE_RUNS_PER_USER = 2
    response = client.post(TRAIN, first_look(name="Too much"))
    assert response.status_code == 422
    assert "2 are allowed" in response.content.decode()
    assert Page(response).by_id("id_name")["value"] == "Too much"
    settings.MAX_ACTIVE_RUNS_PER_USER = 3
    assert client.post(TRAIN, first_look(name="Too much")).status_code == 302


def test_the_form_can_be_checked_without_starting_anything(client: Client) -> None:
    response = client.post(TRAIN, first_look(large_n_layers="6") | {"check": "1"})
    assert response.status_code == 200
    assert not Experiment.objects.exists()
    assert not User.objects.exists()
    assert Page(response).by_id("id_large_n_layers")["value"] == "6"


def test_an_upload_is_kept_over_an_error_and_trained_on_afterwards(
    client: Client, tmp_path: Path, settings: Any
) -> None:
    settings.UPLOADS_DIR = tmp_path / "uploads"
    file = SimpleUploadedFile("book.txt", b"Call me Ishmael.")
    response = client.post(TRAIN, first_look(source="upload", name="") | {"upload": file})
    assert response.status_code == 422
    kept = Page(response).by_id("id_uploaded")["value"]
    assert "book.txt" in response.content.decode()
    response = client.post(TRAIN, first_look(source="upload", name="Named", uploaded=kept))
    assert response.status_code == 302
    source = Path(Experiment.objects.get().spec.data.source)
    assert source.read_text() == "Call me Ishmael."
    again = Page(client.get(TRAIN, {"from": str(Experiment.objects.get().pk)}))
    assert again.by_id("id_uploaded")["value"] == kept


def test_of_a_file_that_is_too_large_no_more_is_written_than_may_be_uploaded(
    client: Client, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.MAX_UPLOAD_MB = 3  # larger than what Django keeps in memory
    written: list[int] = []

    class Counting(TemporaryUploadedFile):
        def close(self) -> None:
            written.append(Path(self.temporary_file_path()).stat().st_size)
            super().close()

    monkeypatch.setattr("django.core.files.uploadhandler.TemporaryUploadedFile", Counting)
    files = {name: SimpleUploadedFile(f"{name}.txt", b"x" * 5_000_000) for name in ("upload", "another", "third")}
    response = client.post(TRAIN, first_look(source="upload", name="Long work") | files)
    assert response.status_code == 422
    assert "has 5 MB; at most 3 MB can be uploaded" in response.content.decode()
    assert Page(response).by_id("id_name")["value"] == "Long work"
    assert (len(written), sum(written)) == (3, 3_000_000)
    assert not User.objects.exists()


def test_a_file_as_large_as_may_be_uploaded_is_taken_whole(client: Client, settings: Any, tmp_path: Path) -> None:
    settings.UPLOADS_DIR = tmp_path / "uploads"
    settings.MAX_UPLOAD_MB = 3
    file = SimpleUploadedFile("book.txt", b"x" * 3_000_000)
    assert client.post(TRAIN, first_look(source="upload") | {"upload": file}).status_code == 302
    assert Path(Experiment.objects.get().spec.data.source).stat().st_size == 3_000_000


@pytest.mark.parametrize("path", [TRAIN, "/train/estimate/"])
def test_no_other_site_can_send_the_form_for_somebody(path: str) -> None:
    stranger = Client(enforce_csrf_checks=True)
    stranger.force_login(make_user())
    assert stranger.post(path, first_look()).status_code == 403
    assert not Experiment.objects.exists()


# The sheet ------------------------------------------------------------------------------------------------------------


def ask(client: Client, form: dict[str, str]) -> str:
    response = client.post("/train/estimate/", form)
    assert response.status_code == 200
    assert not User.objects.filter(is_guest=True).exists()
    return str(response.content.decode())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.key)
def test_the_sheet_says_what_the_budget_says(client: Client, preset: Any) -> None:
    text = ask(client, posted(preset.spec))
    for budget in sheet(preset.spec).values():
        assert f'title="{count(budget.parameters)}"' in text
        assert f'title="{count(budget.non_embedding_parameters)}"' in text
        assert f">{flops(budget.flops)}<" in text
    assert "problem" not in text


def test_the_sheet_is_on_the_page_without_javascript(client: Client) -> None:
    assert count(sheet(FIRST_LOOK.spec)["large"].parameters) in client.get(TRAIN).content.decode()


def test_the_estimate_takes_no_get(client: Client) -> None:
    assert client.get("/train/estimate/").status_code == 405


def test_growth_is_judged_for_these_very_shapes(client: Client) -> None:
    text = ask(client, first_look())
    assert "Growth keeps the function for these shapes." in text
    changed = ask(client, first_look(width="random_pad"))
    assert "Growth changes the function." in changed
    impossible = ask(client, first_look(large_n_layers="6", depth="solar"))
    assert 'href="#id_large_n_layers"' in impossible
    solar, midas = (card(impossible, f"depth_{rule}") for rule in ("solar", "midas"))
    for text in (solar, midas):
        assert "Cannot be used." in text
        assert 'hx-swap-oob="true"' in text
    # What is chosen stays so, with its problem; of the others, what leads nowhere cannot be chosen.
    assert "data-closed" not in solar
    assert "data-closed" in midas
    assert "data-closed" not in card(impossible, "depth_stack")


def card(text: str, key: str) -> str:
    found = re.search(rf'<div class="choice-body" id="card_{key}".*?</div>\s*</div>', text, re.DOTALL)
    assert found
    return found[0]


def test_a_rule_that_leads_nowhere_cannot_be_chosen_on_the_page(client: Client) -> None:
    page = Page(client.post(TRAIN, first_look(large_n_layers="6", check="1")))
    radios = {attrs["value"]: attrs for attrs in page.all("input") if attrs.get("name") == "depth"}
    assert {value for value, attrs in radios.items() if "disabled" in attrs} == {"solar", "midas"}
    page = Page(client.post(TRAIN, first_look(large_n_layers="6", depth="solar", check="1")))
    radios = {attrs["value"]: attrs for attrs in page.all("input") if attrs.get("name") == "depth"}
    assert {value for value, attrs in radios.items() if "disabled" in attrs} == {"midas"}


def test_what_is_recommended_is_said_with_its_reason_and_marked(client: Client) -> None:
    text = ask(client, first_look())
    assert "Chosen, as recommended for these shapes: Duplication, Identity blocks, noise at 0 dB." in text
    assert "recommended" in card(text, "width_duplicate")
    assert "recommended" not in card(text, "width_pad")
    other = ask(client, first_look(width="random_pad"))
    assert "Recommended for these shapes: Duplication, Identity blocks" in other
    assert 'value="growth"' in other
    nothing = ask(client, first_look(large_d_mlp="8"))
    assert "What suits is said once" in nothing


def test_a_growth_in_stages_is_judged_stage_by_stage(client: Client) -> None:
    assert "So do all 2 growths." in ask(client, first_look(**stage()))
    text = ask(client, first_look(**stage(n_layers="2"), depth="stack"))
    assert "Growth 2 of 2: 2 blocks of the parent run a second time." in text


def test_learned_maps_are_said_to_change_the_function_and_what_they_cost(client: Client) -> None:
    text = ask(client, first_look(learn="on", learn_steps="50"))
    assert "Growth changes the function." in text
    assert "trained before they are applied" in text
    assert re.search(r'id="learning_cost"[^>]*>About \d\.\de\d+ FLOPs, charged to scaled', text)
    assert "charged to scaled" not in ask(client, first_look())


def test_what_growing_costs_is_said_half_by_half(client: Client) -> None:
    text = ask(client, first_look())
    small, large = (sheet(FIRST_LOOK.spec)[name].parameters for name in ("small", "large"))
    assert small
    assert large
    assert f"Growing adds {si(large - small)} parameters" in text
    assert "Costs nothing here" not in text
    assert "Costs nothing here" in card(ask(client, first_look(large_n_layers="2")), "depth_identity")


def test_how_long_growing_takes_is_known_from_the_last_growths(client: Client, owner: User) -> None:
    def seconds() -> float | None:
        return estimates.estimate(ExperimentForm(first_look(), user=owner)).growing_seconds

    large = sheet(FIRST_LOOK.spec)["large"].parameters
    assert large
    assert seconds() == pytest.approx(large / estimates.GUESSED_GROWN_PER_SECOND)
    run = make_experiment(owner, points=0).runs.filter(name="scaled")
    run.update(grown={"seconds": 4.0}, prepared={"parameters": 8_000_000, "d_vocab": 4096})
    make_experiment(owner, points=0).runs.filter(name="scaled").update(grown={}, prepared=None)
    assert seconds() == pytest.approx(large / 2e6)


# Proposals ------------------------------------------------------------------------------------------------------------


def filled(response: Any) -> dict[str, str]:
    page = Page(response)
    values = {a["name"]: a.get("value", "") for a in page.all("input") if a.get("type") in ("text", "hidden")}
    return values | {a["name"]: a["value"] for a in page.all("input") if a.get("type") == "radio" and "checked" in a}


def test_a_multiple_becomes_a_shape_that_can_be_edited_and_keeps_what_was_typed(client: Client) -> None:
    form = first_look(target_multiple="4", name="Kept", lr="fast")
    response = client.post(TRAIN, form | {"propose": "target"})
    values = filled(response)
    assert (values["target_multiple"], values["name"], values["lr"]) == ("4", "Kept", "fast")
    shape = Shape.model_validate({name: values[f"large_{name}"] or None for name in Shape.model_fields})
    counted = parameters("llama", shape, 128, 2048, True).total
    assert counted / sheet(FIRST_LOOK.spec)["small"].parameters == pytest.approx(4, rel=0.05)  # type: ignore[operator]
    assert f"{count(counted)} parameters" in response.content.decode()
    assert not Experiment.objects.exists()
    assert not User.objects.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_multiple": ""}, "give a number"),
        ({"target_multiple": "many"}, "must be a number"),
        ({"target_multiple": "100"}, "must be more than 1 and at most 16"),
        ({"target_multiple": "2", "small_d_head": ""}, "filled in"),
    ],
)
def test_a_multiple_that_is_none_is_refused_beside_its_field(
    client: Client, changes: dict[str, str], words: str
) -> None:
    text = client.post(TRAIN, first_look(**changes, propose="target")).content.decode()
    error = re.search(r'id="id_target_multiple_error">(.*?)</p>', text, re.DOTALL)
    assert error
    assert words in error[1]
    assert filled(client.post(TRAIN, first_look(**changes, propose="target")))["large_d_model"] == "256"


def test_a_checkpoint_on_the_hub_is_asked_what_it_is(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    known = looks.Look(pending=True)

    def look(source: str, *, ask: bool = False) -> looks.Look:
        asked.append(ask)
        return known

    monkeypatch.setattr("experiments.forms.look", look)
    monkeypatch.setattr("experiments.proposals.look", look)
    form = first_look(**from_checkpoint("owner/model", **EMPTY), propose="target", target_multiple="2")
    assert "being read from owner/model" in client.post(TRAIN, form).content.decode()
    assert asked == [False, True, False]  # only the button sends somebody to look
    known = looks.Look(problem="there is none of that name")
    assert "there is none of that name" in client.post(TRAIN, form).content.decode()
    shape = FIRST_LOOK.spec.models["small"].shape
    assert shape
    known = looks.Look(get_family("llama").config(shape, 128, 2048, True))
    text = client.post(TRAIN, form).content.decode()
    assert re.search(r"\d parameters: ", text)  # with its vocabulary
    assert filled(client.post(TRAIN, form))["large_d_model"] != "256"


def test_without_a_vocabulary_a_multiple_is_of_what_is_not_embeddings(client: Client) -> None:
    form = first_look(tokenizer_kind="pretrained", tokenizer_name="gpt2", propose="target")
    assert "parameters without embeddings" in client.post(TRAIN, form).content.decode()


def test_stages_are_proposed_edited_removed_and_started(client: Client, owner: User) -> None:
    form = first_look(large_n_layers="8", growths="3", staging="gradual")
    values = filled(client.post(TRAIN, form | {"propose": "stages"}))
    assert (values["rungs"], values["depth"]) == ("2", "stack")
    assert [(values[f"rung{i}_n_layers"], values[f"rung{i}_steps"]) for i in (1, 2)] == [("4", "100"), ("6", "100")]
    rows = {name: value for name, value in values.items() if name.startswith("rung")}
    values = filled(client.post(TRAIN, form | rows | {"rung2_steps": "50", "propose": "without 1"}))
    assert (values["rungs"], values["growths"], values["rung1_n_layers"], values["rung1_steps"]) == (
        "1",
        "2",
        "6",
        "50",
    )
    rows = {name: value for name, value in values.items() if name.startswith("rung")}
    client.post(TRAIN, form | rows)
    ladder = Experiment.objects.get().spec.models["scaled"].init.ladder  # type: ignore[union-attr]
    assert [(rung.steps, rung.shape.n_layers) for rung in ladder] == [(50, 6)]
    again = filled(client.get(TRAIN, {"from": str(Experiment.objects.get().pk)}))
    assert (again["rungs"], again["rung1_n_layers"]) == ("1", "6")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"growths": "12"}, "must be 1 to 9"),
        ({"growths": "2", "large_d_mlp": "many"}, "once both shapes are right"),
        ({"growths": "2", "staging": "gradual", "large_n_layers": "3"}, "n_layers must grow"),
    ],
)
def test_stages_that_there_are_not_are_refused_beside_their_field(
    client: Client, changes: dict[str, str], words: str
) -> None:
    text = client.post(TRAIN, first_look(**changes, propose="stages")).content.decode()
    error = re.search(r'id="id_growths_error">(.*?)</p>', text, re.DOTALL)
    assert error
    assert words in error[1]


def test_what_is_recommended_is_chosen_at_a_click(client: Client) -> None:
    form = first_look(width="random_pad", depth="append_random", growth_snr_db="", propose="growth")
    values = filled(client.post(TRAIN, form))
    assert (values["width"], values["depth"], values["growth_snr_db"]) == ("duplicate", "identity", "0")


@pytest.mark.parametrize("kind", ["", "nothing", "without x", "without 9"])
def test_what_nobody_proposes_changes_nothing(client: Client, kind: str) -> None:
    form = first_look(**stage(), growths="2")
    values = filled(client.post(TRAIN, form | {"propose": kind}))
    assert {name: values[name] for name in values if name in form and name != "key"}.items() <= form.items()


def test_what_can_be_counted_is_counted_beside_errors(client: Client) -> None:
    text = ask(client, first_look(name="", lr="fast", small_d_head="63"))
    assert f'title="{count(sheet(FIRST_LOOK.spec)["large"].parameters)}"' in text
    assert text.count("model-small") == 0
    assert "3 problems" in text
    assert 'href="#id_small_d_head"' in text


@pytest.mark.parametrize("field", ["n_ctx", "batch_size", "d_vocab"])
def test_no_figure_is_made_up_for_a_value_that_cannot_be_read(client: Client, field: str) -> None:
    assert "The figures appear once" in ask(client, first_look(**{field: "many"}))


def test_without_a_readable_length_the_size_is_still_shown(client: Client) -> None:
    text = ask(client, first_look(max_steps=""))
    assert f'title="{count(sheet(FIRST_LOOK.spec)["small"].parameters)}"' in text
    assert "All have finished" not in text


def test_what_a_checkpoint_leaves_open_is_said(client: Client) -> None:
    form = first_look(**from_checkpoint("owner/model", **EMPTY))
    text = ask(client, form)
    assert "problem" not in text
    assert "with its d_vocab they are counted now" in text
    text = ask(client, form | {"tokenizer_d_vocab": "50304"})
    assert "known once the checkpoint was read" in text
    text = ask(client, first_look(**from_checkpoint("owner/model", tokenizer_d_vocab="50304")))
    assert "known once" not in text


def test_time_is_a_guess_until_something_was_measured(client: Client, owner: User) -> None:
    assert "low guess" in ask(client, first_look())
    experiment = make_experiment(owner, points=0)
    experiment.runs.update(flops=3e12, train_seconds=10.0)
    experiment.runs.filter(name="large").update(flops=9e12, train_seconds=0.5)  # too short to say anything
    experiment.runs.filter(name="scaled").update(flops=5e12)
    speed = estimates.speed_of(estimates.measured(), None)
    assert speed[:2] == (4e11, 2)
    text = ask(client, first_look())
    assert "Time from the 2 newest runs of a like size here: 4.0e11 FLOPs a second" in text.replace("\n", " ")


def test_the_speed_of_pico_models_says_nothing_of_large_ones(owner: User) -> None:
    for _ in range(5):
        runs = make_experiment(owner, points=0).runs
        runs.update(flops=1e9, step=100, train_seconds=10.0)
    for _ in range(4):
        make_experiment(owner, points=0).runs.update(flops=1e14, step=100, train_seconds=1000.0)
    runs = estimates.measured()
    assert len(runs) == 27
    assert estimates.speed_of(runs, 2e12).flops_per_second == pytest.approx(1e11)
    assert estimates.speed_of(runs, 3e7).flops_per_second == pytest.approx(1e8)


def test_the_time_a_run_takes_beside_its_steps_counts(client: Client, owner: User) -> None:
    """A pico model trains for a second and starts for ten."""
    now = timezone.now()
    experiment = make_experiment(owner, points=0)
    experiment.runs.update(flops=3e12, train_seconds=10.0, started_at=now - timedelta(seconds=18), ended_at=now)
    assert estimates.speed_of(estimates.measured(), None).besides == pytest.approx(8.0)
    form = ExperimentForm(first_look(), user=owner)
    found = estimates.estimate(form)
    small, scaled = found.models[0].seconds, found.models[1].seconds
    assert small
    assert scaled
    assert found.seconds == pytest.approx(small + scaled + 2 * 8.0)


def test_epochs_are_counted_once_the_text_was_read(client: Client, owner: User) -> None:
    form = first_look(max_steps="", num_epochs="2", warmup_steps="0")
    assert "once the text was read" in ask(client, form)
    spec = FIRST_LOOK.spec.model_dump(mode="json")
    make_experiment(owner, points=0, spec=spec)  # its `prepared` says 5,000,000 tokens
    assert "10.0" in ask(client, form)


def test_a_model_that_does_not_fit_into_memory_is_warned_of(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sheet(FIRST_LOOK.spec)["large"].memory_bytes
    assert needed
    assert "this machine has" not in ask(client, first_look())
    monkeypatch.setattr(estimates, "memory_bytes", lambda host: needed - 1)
    text = ask(client, first_look())
    assert "large needs about" in text
    assert "small needs about" not in text
    monkeypatch.setattr(estimates, "memory_bytes", lambda host: needed + 1)
    assert "train at once need about" in ask(client, first_look())


def test_the_machine_says_how_much_memory_it_has() -> None:
    found = estimates.memory_bytes()
    if not Path("/proc/meminfo").exists():
        assert found is None
    else:
        assert found
        assert 1e8 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("slots", "factor"), [(1, 3), (2, 2), (3, 2)])
def test_the_last_model_ends_when_its_parent_and_a_free_place_allow(slots: int, factor: int) -> None:
    budgets = {name: replace(budget, seconds=60.0) for name, budget in sheet(FIRST_LOOK.spec).items()}
    assert estimates._until_finished(FIRST_LOOK.spec, budgets, besides=5.0, places=slots) == 65.0 * factor


def test_a_field_that_differs_between_the_two_shapes_is_marked(client: Client) -> None:
    text = client.get(TRAIN).content.decode()
    marked = {name for differs, name in re.findall(r'class="shape-row([^"]*)" data-row="(\w+)"', text) if differs}
    assert marked == {"d_model", "n_heads", "d_mlp", "n_layers"}


# The process ----------------------------------------------------------------------------------------------------------


def test_serving_the_page_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import django, sys
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
import kangaroo_site.wsgi
from django.test import Client
client = Client()
assert client.get("/train/", HTTP_HOST="localhost").status_code == 200
assert client.post("/train/estimate/", {"name": "x"}, HTTP_HOST="localhost").status_code == 200
print(*sorted({"torch", "transformers", "datasets", "tokenizers", "numpy", "pyarrow"} & set(sys.modules)))
"""
    environment = os.environ | {
        "KANGAROO_VAR": str(tmp_path),
        "DJANGO_SETTINGS_MODULE": "kangaroo_site.settings",
        "DEBUG": "1",
        "DATABASE_URL": f"sqlite:///{tmp_path / 'db.sqlite3'}",
    }
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


# A machine of one's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_host(member: User) -> Host:
    gpu = {"index": 0, "name": "NVIDIA A100", "memory_bytes": 40_000_000_000, "memory_used_bytes": 0, "processes": []}
    gpus = [{**gpu, "index": number, "uuid": f"GPU-{number}"} for number in range(2)]
    return Host.objects.create(  # type: ignore[no-any-return]
        name="gpu1",
        kind=Host.Kind.SSH,
        owner=member,
        address="gpu1.example.org",
        host_key="ssh-ed25519 AAAA",
        env_python="/usr/bin/python3",
        facts={"gpus": gpus, "cores": 8, "memory_bytes": 64_000_000_000},
        price_per_hour=2,
    )


@pytest.fixture
def member() -> User:
    return make_user("member@example.org")


@pytest.fixture
def inside(client: Client, member: User) -> Client:
    client.post(reverse("account_login"), {"login": member.email, "password": "correct horse"})
    return client


def test_ones_own_machine_is_chosen_for_all_models_or_for_one(inside: Client, gpu_host: Host) -> None:
    text = inside.get(TRAIN).content.decode()
    assert "gpu1: 2 x NVIDIA A100" in text
    inside.post(TRAIN, first_look(host=str(gpu_host.pk), small_host="local", gpus="2"))
    (experiment,) = Experiment.objects.all()
    assert experiment.host == gpu_host
    where = {run.name: (run.host.name, run.gpus_wanted) for run in experiment.runs.select_related("host")}
    assert where == {"small": ("this machine", 2), "scaled": ("gpu1", 2), "large": ("gpu1", 2)}
    for query in ({"from": str(experiment.pk)}, {"host": str(gpu_host.pk)}):
        assert f'<option value="{gpu_host.pk}" selected' in inside.get(TRAIN, query).content.decode()


def test_a_machine_that_is_not_ones_own_cannot_be_chosen(client: Client, gpu_host: Host) -> None:
    client.force_login(make_user("stranger@example.org"))
    assert "gpu1" not in client.get(TRAIN).content.decode()
    assert client.post(TRAIN, first_look(host=str(gpu_host.pk))).status_code == 422
    assert not Experiment.objects.exists()
    Host.objects.update(offered=True)
    assert "gpu1" in client.get(TRAIN).content.decode()


@pytest.mark.parametrize(
    ("changes", "fields", "says"),
    [
        ({"env_python": ""}, {}, "gpu1: is not set up yet"),
        ({"problem": "key_changed"}, {}, "gpu1: its host key has changed"),
        ({}, {"gpus": "4"}, "GPUs a model 4: gpu1 has 2"),
        ({}, {"gpus": "3"}, "must divide batch_size"),
        ({}, {"gpus": "0"}, "must be 1 to"),
        ({"gpu_choice": "0"}, {"gpus": "2"}, "GPUs a model 2: gpu1 has 1"),
        ({"retired_at": "2026-01-01T00:00Z"}, {}, "not one of the available choices"),
    ],
)
def test_a_machine_that_cannot_be_used_is_refused_beside_its_field(
    inside: Client, gpu_host: Host, changes: dict[str, str], fields: dict[str, str], says: str
) -> None:
    Host.objects.filter(pk=gpu_host.pk).update(**changes)
    answer = inside.post(TRAIN, first_look(host=str(gpu_host.pk), **fields))
    assert answer.status_code == 422
    assert says in answer.content.decode()
    assert not Experiment.objects.exists()


def test_the_sheet_speaks_of_the_machine_that_was_chosen(inside: Client, gpu_host: Host) -> None:
    text = ask(inside, first_look(host=str(gpu_host.pk)))
    assert "is known once something has trained there" in text
    experiment = make_experiment(gpu_host.owner, name="earlier")
    experiment.runs.update(host=gpu_host)
    text = ask(inside, first_look(host=str(gpu_host.pk)))
    assert "of a like size on gpu1" in text
    assert "at 2.00 an hour" in text
    Host.objects.update(facts={"gpus": [{"uuid": "GPU-0", "index": 0, "name": "tiny", "memory_bytes": 1_000_000}]})
    assert ": gpu1 has" in ask(inside, first_look(host=str(gpu_host.pk)))


def test_training_on_ones_own_machine_wants_a_recent_sign_in_and_loses_nothing(
    inside: Client, gpu_host: Host, settings: Any
) -> None:
    settings.HOST_SIGN_IN_SECONDS = 0
    answer = inside.post(TRAIN, first_look(host=str(gpu_host.pk), name="Kept"))
    assert answer.status_code == 302
    assert "reauthenticate" in answer["Location"]
    settings.HOST_SIGN_IN_SECONDS = 3600
    answer = inside.post(answer["Location"], {"password": "correct horse"}, follow=True)
    assert Experiment.objects.get().name == "Kept"
