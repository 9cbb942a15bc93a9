"""The Train page's form: what it reads, what it refuses, and what it never loses."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser
from django.core.files.uploadedfile import SimpleUploadedFile
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from accounts.guests import claim
from accounts.models import User
from experiments import sources
from experiments.forms import ExperimentForm
from experiments.models import Experiment, Host
from experiments.presets import FIRST_LOOK, PRESETS
from experiments.values import MOST_RUNGS, document_of, field_of, left_out, values_of
from tests.experiments.factories import make_experiment, make_user
from trainer.families import get_family
from trainer.shape import GrowInit, Shape
from trainer.spec import ExperimentSpec, TrainSpec, parse_spec

pytestmark = pytest.mark.django_db  # the form asks where one may train

NOBODY = AnonymousUser()


def posted(spec: ExperimentSpec, **changes: Any) -> dict[str, str]:
    """What a browser sends for the form that shows `spec`: text alone, and nothing for an empty box."""
    form = ExperimentForm(initial=values_of(spec), user=NOBODY)
    shown = {name: form[name].value() for name in form.fields} | changes
    return {name: "" if v is None else "on" if v is True else str(v) for name, v in shown.items() if v is not False}


def first_look(**changes: Any) -> dict[str, str]:
    return posted(FIRST_LOOK.spec, **changes)


def errors_of(user: Any = NOBODY, files: Any = None, **changes: Any) -> dict[str, str]:
    form = ExperimentForm(first_look(**changes), files, user=user, owner=lambda: user)
    form.is_valid()
    return {field: " ".join(map(str, messages)) for field, messages in form.errors.items()}


# Form <-> spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.key)
def test_a_preset_comes_back_from_the_form_as_it_went_in(preset: Any) -> None:
    form = ExperimentForm(posted(preset.spec), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec == preset.spec
    assert left_out(preset.spec) == []


small_floats = st.floats(1e-7, 0.09, allow_subnormal=False)
words = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=40)
names = st.builds(" ".join, st.lists(words, min_size=1, max_size=3)).filter(lambda name: len(name) <= 120)


@st.composite
def standard_specs(draw: st.DrawFn) -> ExperimentSpec:
    """Standard experiments: small, scaled grown from it by whole multiples, large of scaled's shape or left out."""
    family, eps = draw(st.sampled_from(["gpt2", "llama"])), draw(small_floats)
    kv_heads = draw(st.integers(1, 3)) if family == "llama" else None
    n_heads = draw(st.integers(1, 3)) * (kv_heads or 1)
    d_head = 2 * draw(st.integers(1, 16))
    small = {
        "d_model": n_heads * (d_head if family == "gpt2" else draw(st.integers(1, 100))),
        "n_heads": n_heads,
        "n_kv_heads": kv_heads,
        "d_head": d_head,
        "d_mlp": draw(st.integers(1, 500)),
        "n_layers": draw(st.integers(1, 4)),
        "layer_norm_eps": eps,
    }
    ratio = draw(st.integers(1, 3))
    large = {name: value if value is None else value * ratio for name, value in small.items()}
    large |= {"d_head": d_head, "layer_norm_eps": draw(small_floats)}
    tied = draw(st.booleans())
    model = {"family": family, "tie_embeddings": tied}
    max_steps = draw(st.none() | st.integers(100, 10**9))
    rung = {"shape": {**large, "n_layers": small["n_layers"], "layer_norm_eps": draw(small_floats)}}
    rungs = [rung | {"steps": draw(st.integers(1, 10))} for _ in range(draw(st.integers(0, 2)) if max_steps else 0)]
    growth = {
        "kind": "grow",
        "parent": "small",
        "width": draw(st.sampled_from(["duplicate", "random_pad"])),
        "depth": draw(st.sampled_from(["append_random", "stack", "interleave", "identity"])),
        "init_range": draw(small_floats),
        "snr_db": draw(st.sampled_from([None, 10.0, 0.0])),
        "split": draw(st.sampled_from(["even", "uneven", "diagonal"])),
        "n_positions": draw(st.none() | st.integers(4096, 9999)),
        "d_vocab": draw(st.none() | st.just(300_000)),
        "learn_steps": draw(st.integers(0, 3)),
        "learn_lr": draw(small_floats),
        "optimizer": draw(st.sampled_from(["fresh", "grown"])),
        "lr_by_width": draw(st.booleans()),
        "ladder": rungs,
    }
    models = {
        "small": {**model, "shape": small, "init": {"kind": "random", "init_range": draw(small_floats)}},
        "scaled": {**model, "shape": large, "init": growth},
    }
    if draw(st.booleans()):
        models["large"] = {**model, "shape": large, "init": {"kind": "random", "init_range": draw(small_floats)}}
    train = {
        "n_ctx": draw(st.integers(8, 4096)),
        "batch_size": draw(st.integers(1, 512)),
        "max_steps": max_steps,
        "num_epochs": draw(st.floats(0.01, 100)) if max_steps is None else draw(st.none() | st.floats(0.01, 100)),
        "lr": draw(small_floats),
        "weight_decay": draw(st.floats(0, 1)),
        "warmup_steps": draw(st.integers(0, 100)),
        "schedule": draw(st.sampled_from(["cosine", "linear", "constant"])),
        "grad_clip": draw(st.none() | st.floats(0.01, 10)),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "precision": draw(st.sampled_from(["auto", "fp32", "bf16"])),
        "compile": draw(st.booleans()),
    }
    tokenizer = draw(
        st.builds(lambda n: {"kind": "bpe", "d_vocab": n}, st.integers(260, 262_144))
        | st.builds(
            lambda n: {"kind": "pretrained", "name": "openai-community/gpt2", "d_vocab": n}, st.none() | st.just(9)
        )
    )
    source = draw(st.sampled_from([("python-stdlib", None), ("wikitext", "wikitext-2-v1"), ("roneneldan/x.Y_z", None)]))
    data = {
        "source": source[0],
        "config": source[1],
        "text_column": draw(st.none() | st.just("text")),
        "tokenizer": tokenizer,
        "validation_fraction": draw(st.floats(0.001, 0.4)),
    }
    return parse_spec({"name": draw(names), "data": data, "train": train, "models": models})


@given(standard_specs())
@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_standard_experiment_comes_back_from_the_form_as_it_went_in(spec: ExperimentSpec) -> None:
    form = ExperimentForm(posted(spec), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec == spec
    assert left_out(spec) == []


def test_what_the_form_has_no_place_for_is_named() -> None:
    document = FIRST_LOOK.spec.model_dump(mode="json")
    document["models"]["scaled"]["train"] = {"lr": 5e-4}
    document["models"]["second"] = document["models"]["large"]
    assert left_out(parse_spec(document)) == ["models.second", "models.scaled.train.lr"]


def test_an_experiment_of_one_model_fills_the_form() -> None:
    document = FIRST_LOOK.spec.model_dump(mode="json")
    document["models"] = {"alone": document["models"]["small"]}
    values = values_of(parse_spec(document))
    assert values["small_d_model"] == 128
    assert "models.alone" in left_out(parse_spec(document))


def test_every_field_of_a_spec_has_a_place_in_the_form() -> None:
    """A field added to the spec and forgotten here would be lost by `Use as a start`."""
    leaves = {f"train.{name}" for name in TrainSpec.model_fields}
    leaves |= {f"models.large.shape.{name}" for name in Shape.model_fields}
    leaves |= {f"models.scaled.init.{name}" for name in GrowInit.model_fields if name != "kind"}
    leaves |= {f"models.scaled.init.ladder.0.shape.{name}" for name in Shape.model_fields}
    leaves.add("models.scaled.init.ladder.0.steps")
    form = ExperimentForm({"rungs": "1"}, user=NOBODY)
    assert not [leaf for leaf in leaves if field_of(leaf, {"growth_init_range": "1"}) not in form.fields]


def test_more_stages_than_there_are_rows_for_are_named() -> None:
    document = FIRST_LOOK.spec.model_dump(mode="json")
    rung = {"shape": document["models"]["small"]["shape"], "steps": 1}
    document["models"]["scaled"]["init"]["ladder"] = [rung] * (MOST_RUNGS + 1)
    assert left_out(parse_spec(document)) == ["models.scaled.init.ladder"]


# Errors ---------------------------------------------------------------------------------------------------------------


def stage(**changes: str) -> dict[str, str]:
    """A ladder of one shape, small's with three blocks, for First look."""
    row = {"steps": "100", "d_model": "128", "n_heads": "2", "n_kv_heads": "", "d_head": "64", "d_mlp": "512"}
    row |= {"n_layers": "3", "layer_norm_eps": "1e-5"}
    return {"rungs": "1"} | {f"rung1_{name}": value for name, value in (row | changes).items()}


def test_the_rows_of_a_ladder_are_read() -> None:
    form = ExperimentForm(first_look(**stage()), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec
    init = form.spec.models["scaled"].init
    assert isinstance(init, GrowInit)
    assert [(rung.steps, rung.shape.n_layers) for rung in init.ladder] == [(100, 3)]


def test_what_is_out_of_sight_stops_nobody() -> None:
    form = ExperimentForm(first_look(learn_steps="many", learn_lr="fast"), user=NOBODY)
    assert form.is_valid(), form.errors


@pytest.mark.parametrize("rungs", ["-1", "many", "9999999999"])
def test_no_number_of_stages_makes_more_rows_than_there_may_be(rungs: str) -> None:
    assert len(ExperimentForm(first_look(rungs=rungs), user=NOBODY).stages()) <= MOST_RUNGS


def test_a_wrong_stage_hides_no_other_figure() -> None:
    form = ExperimentForm(first_look(**stage(d_mlp="100", steps="0")), user=NOBODY)
    assert not form.is_valid()
    assert form.readable
    assert set(form.readable.models) == {"small", "scaled", "large"}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"name": ""}, "name", "Name: must not be empty"),
        ({"name": "n" * 121}, "name", "at most 120"),
        ({"small_d_model": "wide"}, "small_d_model", "d_model wide: must be a whole number"),
        ({"small_d_model": ""}, "small_d_model", "d_model: must be a whole number"),
        ({"small_d_model": "0"}, "small_d_model", "d_model 0: must be at least 1"),
        ({"large_d_model": "64.5"}, "large_d_model", "must be a whole number"),
        ({"large_d_model": "64"}, "large_d_model", "64"),
        ({"large_d_model": "301"}, "large_d_model", "301"),
        ({"small_d_head": "63"}, "small_d_head", "d_head 63: "),
        ({"large_n_layers": "999999999"}, "large_n_layers", "at most 2000"),
        ({"small_init_range": "0"}, "small_init_range", "more than 0"),
        ({"large_init_range": "2"}, "large_init_range", "init_range 2: must be at most 1"),
        ({"large_init_range": "2", "train_large": False}, "large_init_range", "at most 1"),
        ({"growth_init_range": "2"}, "growth_init_range", "at most 1"),
        ({"growth_snr_db": "-21"}, "growth_snr_db", "noise (dB) -21: must be at least -20"),
        ({"growth_snr_db": "loud"}, "growth_snr_db", "noise (dB) loud: must be a number"),
        ({"growth_split": "thirds"}, "growth_split", "thirds"),
        (
            {"growth_optimizer": "grown", "max_steps": "0", "warmup_steps": "0"},
            "growth_optimizer",
            "no moments to grow",
        ),
        ({"growth_d_vocab": "100"}, "growth_d_vocab", "d_vocab of scaled 100: is less than the parent's 2048"),
        ({"growth_n_positions": "8"}, "growth_n_positions", "n_positions of scaled 8: is less than the parent's 128"),
        ({"learn": "on", "learn_steps": ""}, "learn_steps", "learn_steps: must be at least 1"),
        ({"learn": "on", "learn_steps": "0"}, "learn_steps", "learn_steps 0: must be at least 1"),
        ({"learn": "on", "learn_lr": "2"}, "learn_lr", "learn_lr 2: must be at most 1"),
        (stage(steps=""), "rung1_steps", "steps of stage 1: must be a whole number"),
        (stage(steps="300"), "rung1_steps", "training ends after 300"),
        (stage(d_mlp="wide"), "rung1_d_mlp", "d_mlp of stage 1 wide: must be a whole number"),
        (stage(d_mlp="100"), "rung1_d_mlp", "d_mlp of stage 1 100: is smaller than the parent's 512"),
        (stage(d_head="63"), "rung1_d_head", "d_head of stage 1 63: "),
        (stage(n_layers="5"), "large_n_layers", "n_layers 4: is smaller than the parent's 5"),
        ({"large_layer_norm_eps": "1"}, "large_layer_norm_eps", "less than 0.1"),
        ({"width": "teleport"}, "width", "teleport"),
        ({"lr": "fast"}, "lr", "lr fast: must be a number"),
        ({"lr": ""}, "lr", "must be a number"),
        ({"lr": "nan"}, "lr", "must be a finite number"),
        ({"lr": "1e999"}, "lr", "must be a finite number"),
        ({"max_steps": "1e999"}, "max_steps", "must be a whole number"),
        ({"max_steps": "", "num_epochs": ""}, "max_steps", "training must end somewhere"),
        ({"warmup_steps": "301"}, "warmup_steps", "at most 300"),
        ({"grad_clip": "0"}, "grad_clip", "more than 0"),
        ({"seed": "-1"}, "seed", "at least 0"),
        ({"seed": "99999999999999999999"}, "seed", "seed 99999999999999999999: must be less than"),
        ({"validation_fraction": "0.5"}, "validation_fraction", "less than 0.5"),
        ({"d_vocab": "255"}, "d_vocab", "at least 260"),
        ({"tokenizer_kind": "pretrained", "tokenizer_name": ""}, "tokenizer_name", "must not be empty"),
        (
            {"tokenizer_kind": "pretrained", "tokenizer_name": "gpt2", "tokenizer_d_vocab": "0"},
            "tokenizer_d_vocab",
            "1",
        ),
        ({"source": "hub", "hub_name": ""}, "hub_name", "Dataset: must not be empty"),
        ({"source": "hub", "hub_name": "not a name"}, "hub_name", "Dataset not a name: a name on the Hub is written"),
        ({"source": "hub", "hub_name": "wikitext", "hub_config": "a/b"}, "hub_config", "letters"),
        ({"source": "upload"}, "upload", "File: choose one"),
        ({"source": "elsewhere"}, "source", "elsewhere"),
        ({"small_source": "checkpoint", "small_checkpoint": ""}, "small_checkpoint", "must not be empty"),
        ({"small_source": "checkpoint", "small_checkpoint": "/no"}, "small_checkpoint", "give a name on the Hub"),
        ({"small_source": "checkpoint", "small_checkpoint": "openai-community/gpt2"}, "tokenizer_kind", "pretrained"),
    ],
)
def test_an_error_stands_beside_its_field(changes: dict[str, Any], field: str, words: str) -> None:
    errors = errors_of(**changes)
    assert list(errors) == [field]
    assert words in errors[field]


def test_an_empty_file_is_refused_with_one_message(user: User) -> None:
    form = upload(user, {"upload": SimpleUploadedFile("empty.txt", b"")})
    assert form.errors["upload"] == ["File: is empty; choose one with text"]


def test_the_list_of_problems_says_whose_dimension_is_wrong() -> None:
    form = ExperimentForm(first_look(small_d_head="7", large_d_head="9"), user=NOBODY)
    form.is_valid()
    assert [problem.message.split(": ")[:2] for problem in form.summary] == [
        ["small", "d_head 7"],
        ["large", "d_head 9"],
    ]


def test_all_that_is_wrong_is_said_at_once() -> None:
    errors = errors_of(name="", lr="fast", max_steps="", small_d_head="63", large_d_mlp="0", hub_name="", source="hub")
    assert set(errors) == {"name", "lr", "max_steps", "small_d_head", "large_d_mlp", "hub_name"}


def test_impossible_growth_is_found_beside_other_errors() -> None:
    assert set(errors_of(name="", large_d_mlp="500")) == {"name", "large_d_mlp"}


def test_a_number_may_be_written_with_spaces_or_as_a_power() -> None:
    form = ExperimentForm(first_look(max_steps="25 000", eval_every="1_000", checkpoint_every="2.5e3"), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec
    assert (form.spec.train.max_steps, form.spec.train.eval_every, form.spec.train.checkpoint_every) == (
        25_000,
        1000,
        2500,
    )


def test_what_was_typed_is_shown_again_as_it_was_typed() -> None:
    form = ExperimentForm(first_look(lr="fast", name="  A <b> name"), user=NOBODY)
    form.is_valid()
    assert form["lr"].value() == "fast"
    assert 'value="fast"' in str(form["lr"])
    assert "A &lt;b&gt; name" in str(form["name"])


@pytest.mark.parametrize("value", [0.1, 1e-5, 3e-4, 1 / 3, 123456.789, 1e22, 5e-324])
def test_a_number_is_shown_so_that_reading_it_gives_it_back(value: float) -> None:
    form = ExperimentForm(initial={"lr": value}, user=NOBODY)
    assert float(form["lr"].value()) == value


def test_the_same_form_names_the_same_experiment_and_a_changed_one_another() -> None:
    def identity(**changes: Any) -> Any:
        form = ExperimentForm(first_look(key="7d7a6dd0-1d0a-4d6c-9f10-0d3f6f0c2f11") | changes, user=NOBODY)
        assert form.is_valid(), form.errors
        return form.experiment_id()

    assert identity() == identity()
    assert len({identity(), identity(seed="1"), identity(notes="why"), identity(key="")}) == 4


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path, settings: Any) -> Path:
    """A folder that the operator opened, beside one that nobody opened."""
    folder = tmp_path / "opened"
    (folder / "books").mkdir(parents=True)
    (folder / "books" / "one.txt").write_text("Call me Ishmael.")
    (folder / "program.exe").write_bytes(b"MZ")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "one.txt").write_text("secret")
    (folder / "way-out").symlink_to(tmp_path / "secret")
    (folder / "way-out.txt").symlink_to(tmp_path / "secret" / "one.txt")
    settings.LOCAL_DATA_DIRS = [folder]
    settings.VAR = tmp_path / "var"
    settings.UPLOADS_DIR = settings.VAR / "uploads"
    settings.RUNS_DIR = settings.VAR / "experiments"
    return folder


@pytest.mark.parametrize("path", ["books", "books/one.txt", "./books/one.txt", "books/../books"])
def test_a_path_in_an_opened_folder_is_taken_and_resolved(opened: Path, path: str) -> None:
    form = ExperimentForm(first_look(source="local", local_path=path), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec
    assert form.spec.data.source == str((opened / path).resolve())
    assert form.spec.data.kind == "local"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "/etc",
        "/",
        "..",
        "../secret/one.txt",
        "books/../../secret/one.txt",
        "way-out",
        "way-out/one.txt",
        "way-out.txt",
        "~",
        "~root/.bashrc",
        "nothing-here",
        "books/one.txt\0.txt",
        "program.exe",
    ],
)
def test_a_path_that_leaves_the_opened_folders_is_refused(opened: Path, path: str) -> None:
    assert list(errors_of(source="local", local_path=path)) == ["local_path"]


def test_a_path_that_is_not_there_and_one_that_is_not_ours_read_the_same(opened: Path) -> None:
    there, not_there = (errors_of(source="local", local_path=f"../secret/{name}") for name in ("one.txt", "two.txt"))
    assert there["local_path"].replace("one", "two") == not_there["local_path"]


def test_without_an_opened_folder_local_text_is_not_offered(settings: Any) -> None:
    settings.LOCAL_DATA_DIRS = []
    assert "local" not in dict(ExperimentForm(user=NOBODY).fields["source"].choices)
    assert "local_path" in errors_of(source="local", local_path="/etc/hostname")


@pytest.mark.parametrize("name", ["../gpt2", "/etc", "a/b/c", "a b", "gpt2;rm", "a..b", "-x", "https://x.org/y", "~/m"])
def test_neither_a_checkpoint_nor_a_tokenizer_nor_a_dataset_may_be_named_so(name: str) -> None:
    pretrained = {"tokenizer_kind": "pretrained", "tokenizer_name": "gpt2"}
    assert "small_checkpoint" in errors_of(small_source="checkpoint", small_checkpoint=name, **pretrained)
    assert "tokenizer_name" in errors_of(tokenizer_kind="pretrained", tokenizer_name=name)
    assert "hub_name" in errors_of(source="hub", hub_name=name)


# Checkpoints ----------------------------------------------------------------------------------------------------------

SMALL = Shape(d_model=128, n_heads=2, d_head=64, d_mlp=512, n_layers=2)
EMPTY = dict.fromkeys(("small_d_model", "small_n_heads", "small_d_head", "small_d_mlp", "small_n_layers"), "")


@pytest.fixture
def checkpoint(opened: Path) -> Path:
    folder = opened / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(get_family("llama").config(SMALL, 256, 4096, True)))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def from_checkpoint(path: Path | str, **changes: Any) -> dict[str, Any]:
    return {"small_source": "checkpoint", "small_checkpoint": str(path), "tokenizer_kind": "pretrained", **changes}


def test_a_checkpoint_in_an_opened_folder_says_what_small_is(checkpoint: Path) -> None:
    form = ExperimentForm(first_look(**from_checkpoint(checkpoint, **EMPTY)), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec
    assert form.spec.models["small"].shape
    assert form.spec.models["small"].shape.d_mlp == 512
    assert form.spec.models["small"].init.path == str(checkpoint)  # type: ignore[union-attr]
    assert form.spec.data.tokenizer.name == str(checkpoint)  # type: ignore[union-attr]
    assert parse_spec(document_of(values_of(form.spec))) == form.spec


def test_dimensions_that_are_not_the_checkpoints_are_refused_beside_their_field(checkpoint: Path) -> None:
    errors = errors_of(**from_checkpoint(checkpoint, small_d_mlp="256"))
    assert errors == {"small_d_mlp": "d_mlp 256: the checkpoint's is 512"}


def test_a_checkpoint_of_another_family_is_refused_beside_the_family(checkpoint: Path) -> None:
    errors = errors_of(**from_checkpoint(checkpoint, family="gpt2", **EMPTY))
    assert "llama" in errors["family"]


@pytest.mark.parametrize("config", ["not json", "[]", '{"model_type": "mamba"}', '{"model_type": "llama"}'])
def test_a_checkpoint_whose_config_cannot_be_used_is_refused(checkpoint: Path, config: str) -> None:
    (checkpoint / "config.json").write_text(config)
    assert "small_checkpoint" in errors_of(**from_checkpoint(checkpoint, **EMPTY))


def test_a_checkpoint_on_the_hub_may_leave_its_dimensions_open() -> None:
    form = ExperimentForm(first_look(**from_checkpoint("owner/model", **EMPTY)), user=NOBODY)
    assert form.is_valid(), form.errors
    assert form.spec
    assert form.spec.models["small"].shape is None


def test_of_a_checkpoints_dimensions_all_or_none_are_given() -> None:
    errors = errors_of(**from_checkpoint("owner/model", small_d_mlp=""))
    assert list(errors) == ["small_d_mlp"]


@pytest.mark.django_db
def test_a_model_that_was_trained_here_can_be_grown_by_those_who_may_see_it(checkpoint: Path, settings: Any) -> None:
    ada, eve = make_user(), make_user("eve@example.org")
    experiment = make_experiment(ada, points=0)
    model = settings.RUNS_DIR / str(experiment.pk) / "small" / "model"
    model.parent.mkdir(parents=True)
    checkpoint.rename(model)
    assert errors_of(ada, **from_checkpoint(model, **EMPTY)) == {}
    assert "small_checkpoint" in errors_of(eve, **from_checkpoint(model, **EMPTY))
    assert "small_checkpoint" in errors_of(NOBODY, **from_checkpoint(model, **EMPTY))


def test_without_a_checkpoint_its_tokenizer_is_not_asked_for_too() -> None:
    assert list(errors_of(**from_checkpoint("", tokenizer_name=""))) == ["small_checkpoint"]


# Uploads --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def user(opened: Path, db: None) -> User:
    return make_user()


def a_file(name: str = "My book.txt", content: bytes = b"Call me Ishmael.") -> dict[str, SimpleUploadedFile]:
    return {"upload": SimpleUploadedFile(name, content)}


def upload(user: User, files: Any = None, **changes: Any) -> ExperimentForm:
    form = ExperimentForm(first_look(source="upload", **changes), files, user=user, owner=lambda: user)
    form.is_valid()
    return form


def test_an_upload_is_kept_for_its_owner_alone(user: User, settings: Any) -> None:
    form = upload(user, a_file())
    assert not form.errors
    assert form.spec
    path = Path(form.spec.data.source)
    assert path.read_bytes() == b"Call me Ishmael."
    assert path.is_relative_to(settings.UPLOADS_DIR / str(user.pk))
    assert path.name == "My-book.txt"
    again = values_of(form.spec)
    assert (again["source"], again["local_path"]) == ("upload", "")
    eve = make_user("eve@example.org")
    assert "upload" in upload(eve, uploaded=again["uploaded"]).errors
    assert "upload" in upload(NOBODY, uploaded=again["uploaded"]).errors  # type: ignore[arg-type]


def test_an_upload_survives_errors_elsewhere(user: User) -> None:
    form = upload(user, a_file(), name="")
    assert list(form.errors) == ["name"]
    kept = form["uploaded"].value()
    assert form.uploaded_name == "My-book.txt"
    second = upload(user, uploaded=kept)
    assert not second.errors


def test_the_same_file_twice_is_kept_once(user: User, settings: Any) -> None:
    upload(user, a_file())
    upload(user, a_file())
    assert len([f for f in settings.UPLOADS_DIR.rglob("*") if f.is_file()]) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.bin", b"x", "must be one of .txt"),
        ("empty.txt", b"", "empty"),
        ("latin.txt", "Café".encode("latin-1"), "UTF-8; byte 3"),
        ("zero.txt", b"a\0b", "zero bytes"),
        ("table.parquet", b"not parquet", "not a parquet file"),
        ("big.txt", b"x" * 1_000_001, "at most 1 MB"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused(
    user: User, settings: Any, name: str, content: bytes, words: str
) -> None:
    settings.MAX_UPLOAD_MB = 1
    form = upload(user, a_file(name, content))
    assert words in str(form.errors["upload"])
    assert not settings.UPLOADS_DIR.exists()


def test_a_character_cut_in_two_at_the_end_of_the_head_is_no_error() -> None:
    content = "é".encode() * sources.HEAD_BYTES
    sources.check_upload(SimpleUploadedFile("long.txt", b"x" + content))


@pytest.mark.parametrize("name", ["../../../escape.txt", "..\\..\\escape.txt", "/etc/cron.d/x.txt", "-rf.txt", ".txt"])
def test_an_uploads_name_leads_nowhere_else(user: User, settings: Any, name: str) -> None:
    form = upload(user, a_file(name))
    for file in settings.UPLOADS_DIR.parent.rglob("*"):
        assert file.is_dir() or file.is_relative_to(settings.UPLOADS_DIR / str(user.pk))
        assert not file.name.startswith("-")
    assert not form.errors or name == ".txt"


@pytest.mark.parametrize("relative", ["../secret", "/etc/passwd", "{pk}/../../../opened/books/one.txt", "{pk}", ""])
def test_the_hidden_name_of_an_upload_is_no_way_out(user: User, settings: Any, relative: str) -> None:
    (settings.UPLOADS_DIR / str(user.pk)).mkdir(parents=True)
    assert "upload" in upload(user, uploaded=relative.format(pk=user.pk)).errors


def test_an_upload_cannot_be_named_as_a_local_path_by_another(user: User, settings: Any) -> None:
    form = upload(user, a_file())
    assert form.spec
    settings.LOCAL_DATA_DIRS = [settings.VAR.parent]  # an operator who opened too much
    eve = make_user("eve@example.org")
    assert "local_path" in errors_of(eve, source="local", local_path=form.spec.data.source)
    assert errors_of(user, source="local", local_path=form.spec.data.source) == {}


def test_a_guests_upload_goes_along_when_their_work_is_claimed(user: User) -> None:
    guest = User.objects.create_guest()
    form = upload(guest, a_file())
    assert form.spec
    Experiment.objects.create(owner=guest, name="x", spec_json=form.spec.model_dump(mode="json"), host=Host.local())
    kept = values_of(form.spec)["uploaded"]
    assert "upload" in upload(user, uploaded=kept).errors
    claim(guest, user)
    assert not upload(user, uploaded=kept).errors


@pytest.mark.django_db(transaction=True)
def test_the_files_of_a_user_go_when_nobody_has_them_any_more(opened: Path, settings: Any) -> None:
    user, guest = make_user(), User.objects.create_guest()
    used, unused = upload(guest, a_file("used.txt", b"one")), upload(guest, a_file("unused.txt", b"two"))
    assert used.spec
    assert unused.spec
    spec = used.spec.model_dump(mode="json")
    experiment = Experiment.objects.create(owner=guest, name="x", spec_json=spec, host=Host.local())
    claim(guest, user)
    assert Path(used.spec.data.source).exists()
    assert not Path(unused.spec.data.source).exists()
    experiment.delete()
    assert list(settings.UPLOADS_DIR.iterdir()) == []
    mine = upload(user, a_file())
    assert mine.spec
    assert Path(mine.spec.data.source).exists()
    user.delete()
    assert list(settings.UPLOADS_DIR.iterdir()) == []


def test_more_than_a_users_share_of_the_disk_is_refused(user: User, settings: Any) -> None:
    settings.MAX_DISK_GB_PER_USER = 1e-8
    assert "GB" in str(upload(user, a_file()).errors["upload"])


def test_nothing_is_kept_on_a_disk_that_is_nearly_full(user: User, settings: Any) -> None:
    settings.MIN_FREE_DISK_GB = 1e9
    assert "disk is nearly full" in str(upload(user, a_file()).errors["upload"])
    assert [f for f in settings.UPLOADS_DIR.rglob("*") if f.is_file()] == []


@pytest.mark.parametrize(
    ("name", "content"), [("t.csv", b"title,body\n1,2\n"), ("t.jsonl", b'{"title": "a", "body": "b"}\n')]
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(user: User, name: str, content: bytes) -> None:
    form = upload(user, a_file(name, content), text_column="text")
    assert "there is title, body" in str(form.errors["text_column"])
    assert not upload(user, a_file(name, content), text_column="body").errors


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"a" * 200_000 + b"\n", "no row of column names: field larger than"),
        ("t.csv", b"a\rb\n", "no row of column names"),
        ("t.jsonl", b"[" * 100_000 + b"\n", "is not JSON"),
        ("t.csv", b",".join(b"c%d" % i for i in range(50_000)) + b"\n", "c18, c19, and 49980 more"),
    ],
)
def test_a_first_line_that_is_made_to_choke_on_is_refused_in_a_sentence(
    user: User, name: str, content: bytes, words: str
) -> None:
    errors = upload(user, a_file(name, content), text_column="text").errors
    assert words in str(errors["text_column"])
    assert len(str(errors["text_column"])) < 1000


def test_two_clicks_that_send_the_same_file_at_once_both_keep_it(user: User, settings: Any) -> None:
    class Slow(SimpleUploadedFile):
        """In the middle of its being kept, the other click's file is kept too."""

        reads = 0

        def chunks(self, chunk_size: int | None = None) -> Any:
            yield b"Call me "
            self.reads += 1
            if self.reads == 2:  # the first time it is only hashed
                sources.keep_upload(SimpleUploadedFile("book.txt", b"Call me Ishmael."), user)
            yield b"Ishmael."

    relative = sources.keep_upload(Slow("book.txt", b"Call me Ishmael."), user)
    files = [f for f in settings.UPLOADS_DIR.rglob("*") if f.is_file()]
    assert [f.read_bytes() for f in files] == [b"Call me Ishmael."]
    assert files == [settings.UPLOADS_DIR / relative]


def test_a_full_disk_is_said_beside_the_file_and_leaves_nothing(
    user: User, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, chunk_size: int | None = None) -> Any:
        if (settings.UPLOADS_DIR / str(user.pk)).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        yield b"Call me Ishmael."

    monkeypatch.setattr(SimpleUploadedFile, "chunks", full)
    assert "could not be kept here: No space left on device" in str(upload(user, a_file()).errors["upload"])
    assert [f for f in settings.UPLOADS_DIR.rglob("*") if f.is_file()] == []


def test_run_directories_on_another_disk_stay_their_owners(user: User, settings: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "runs").mkdir(parents=True)
    settings.RUNS_DIR.parent.mkdir(parents=True, exist_ok=True)
    settings.RUNS_DIR = settings.VAR / "linked"
    settings.RUNS_DIR.symlink_to(disk / "runs")
    experiment = Experiment.objects.create(owner=user, name="x", spec_json={}, host=Host.local())
    log = experiment.directory / "small" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("what it printed")
    settings.LOCAL_DATA_DIRS = [disk]  # an operator who opened the whole disk
    for path in (log, disk / "runs", disk):
        assert "local_path" in errors_of(make_user(f"{path.name}@example.org"), source="local", local_path=str(path))
    assert errors_of(user, source="local", local_path=str(log)) == {}
