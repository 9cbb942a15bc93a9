"""Whole model runs, pico-sized, on real text."""

from __future__ import annotations

import errno
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import texts
from tests.trainer.texts import begin, events, experiment, interrupt, last, losses, wait_for, write
from trainer.data import prepare
from trainer.endings import ending
from trainer.events import Event, parse_event
from trainer.families import FAMILIES
from trainer.run import EventLog, RunError, run
from trainer.spec import ExperimentSpec, parse_spec


@pytest.fixture
def go(cache: Path) -> Callable[..., list[Event]]:
    """Run one model to its end, in this process."""

    def go(spec: ExperimentSpec, name: str, out: Path, **how: Any) -> list[Event]:
        return list(run(spec, name, out / name, cache=cache, threads=1, **how))

    return go


def changed(spec: ExperimentSpec, name: str, **fields: Any) -> ExperimentSpec:
    """`spec` with one model's fields replaced."""
    held = spec.model_dump(mode="json")
    held["models"][name] |= fields
    return parse_spec(held)


def after(steps: int) -> Callable[[], bool]:
    """A stop that is asked for after so many steps: training asks once a step."""
    asked = itertools.count()
    return lambda: next(asked) > steps


# --- From spec to model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_small_scaled_and_large_are_trained_and_scaled_begins_where_small_ended(
    family: str, text: Path, tmp_path: Path, go: Any
) -> None:
    spec = experiment(text, family)
    for name in spec.order():
        said = go(spec, name, tmp_path)
        kinds = [kind for kind, _ in itertools.groupby(event.kind for event in said)]
        assert [k for k in kinds if k not in ("train", "eval", "checkpoint", "preparing")] == [
            "started", "prepared", *(["grown"] if name == "scaled" else []), "sample", "finished",
        ]  # fmt: skip
        assert [event.seq for event in said] == list(range(len(said)))
        lines = (tmp_path / name / "events.jsonl").read_bytes().splitlines()
        assert [parse_event(line) for line in lines] == said
        steps = [e.step for e in said if e.kind == "eval" and e.split == "validation"]
        assert steps == [0, 5, 10, 12]
        found = losses(tmp_path / name)
        assert found["validation", 12] < found["validation", 0]

    grown = events(tmp_path / "scaled", "grown")[0]
    assert grown["preserves"]
    assert grown["max_logit_difference"] < 1e-5 * grown["logit_scale"]
    assert grown["kl_divergence"] < 1e-7
    ended, began = losses(tmp_path / "small")["validation", 12], losses(tmp_path / "scaled")["validation", 0]
    assert began == pytest.approx(ended, abs=1e-5)
    assert began < losses(tmp_path / "large")["validation", 0] - 0.1
    prepared = {name: events(tmp_path / name, "prepared")[0] for name in spec.models}
    assert grown["new_parameters"] == prepared["scaled"]["parameters"] - prepared["small"]["parameters"]
    assert len({p["data_fingerprint"] for p in prepared.values()}) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_saved_loads_in_transformers_alone_and_says_the_same(
    family: str, text: Path, tmp_path: Path, cache: Path, go: Any
) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = experiment(text, family)
    go(spec, "small", tmp_path)
    folder = tmp_path / "small" / "model"
    assert not [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    for path in (folder, *sorted((tmp_path / "small" / "checkpoints").iterdir())):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.config.model_type == family
        assert AutoTokenizer.from_pretrained(path)("import os\n").input_ids
        with safe_open(path / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118

    # The last figure, computed by transformers' own loss from the folder and the token file.
    tokens = prepare(spec.data, cache).test.array().astype("int64")
    n_ctx = spec.train.n_ctx
    figure = next(e for e in events(tmp_path / "small", "eval") if e["split"] == "test")
    assert figure["n_tokens"] == min(4 * spec.train.eval_tokens, (len(tokens) - 1) // n_ctx * n_ctx)
    from trainer.evaluate import windows

    ids = torch.from_numpy(windows(tokens, n_ctx, 4 * spec.train.eval_tokens))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert figure["cross_entropy"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_weights_are_drawn_as_the_spec_says(family: str, text: Path, tmp_path: Path, go: Any) -> None:
    from transformers import AutoModelForCausalLM

    shape = {"d_model": 64, "n_heads": 2, "d_head": 32, "d_mlp": 256, "n_layers": 3}
    spec = experiment(text, family, max_steps=0, warmup_steps=0)
    spec = changed(spec, "large", shape=shape, init={"kind": "random", "init_range": 0.05})
    go(spec, "large", tmp_path)
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "large" / "model").named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.005, name
        else:
            assert set(parameter.tolist()) == ({0.0} if name.endswith("bias") else {1.0}), name


def test_a_checkpoint_is_taken_up_with_its_shape_and_its_tokenizer(text: Path, tmp_path: Path, go: Any) -> None:
    spec = experiment(text)
    go(spec, "small", tmp_path)
    source = tmp_path / "small" / "model"
    held = spec.model_dump(mode="json")
    held["data"]["tokenizer"] = {"kind": "pretrained", "name": str(source)}
    held["models"] = {
        "base": {"init": {"kind": "checkpoint", "path": str(source)}},
        "grown": {"shape": texts.LARGE, "init": {"kind": "grow", "parent": "base"}},
    }
    second = parse_spec(held)
    for name in ("base", "grown"):
        assert go(second, name, tmp_path / "second")[-1].kind == "finished"
    assert losses(tmp_path / "second" / "base")["validation", 0] == losses(tmp_path / "small")["validation", 12]
    assert (
        events(tmp_path / "second" / "base", "prepared")[0]["parameters"]
        == (events(tmp_path / "small", "prepared")[0]["parameters"])
    )

    held["models"] = {"base": {"family": "gpt2", "init": {"kind": "checkpoint", "path": str(source)}}}
    failed = go(parse_spec(held), "base", tmp_path / "third")[-1]
    assert (failed.kind, failed.reason) == ("failed", "bad_checkpoint")
    assert "models.base.family is 'gpt2', the checkpoint's 'llama'" in failed.message

    held["models"] = {"base": {"shape": texts.LARGE, "init": {"kind": "checkpoint", "path": str(source)}}}
    failed = go(parse_spec(held), "base", tmp_path / "fourth")[-1]
    assert "models.base.shape is not the checkpoint's" in failed.message


def test_a_folder_does_not_stand_in_for_a_checkpoint_on_the_hub(
    text: Path, tmp_path: Path, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(experiment(text), "small", tmp_path)
    monkeypatch.chdir(tmp_path)
    held = experiment(text).model_dump(mode="json")
    held["data"]["tokenizer"] = {"kind": "pretrained", "name": str(tmp_path / "small" / "model")}
    held["models"] = {"base": {"init": {"kind": "checkpoint", "path": "small/model"}}}
    failed = go(parse_spec(held), "base", tmp_path / "second")[-1]
    assert failed.reason == "bad_checkpoint"
    assert "small/model cannot be loaded: there is a file or folder of that name here" in failed.message
    held["models"]["base"]["init"]["path"] = "./small/model"
    assert go(parse_spec(held), "base", tmp_path / "third")[-1].kind == "finished"


def test_a_checkpoint_with_holes_is_refused(text: Path, tmp_path: Path, go: Any) -> None:
    from safetensors.torch import load_file, save_file

    go(experiment(text), "small", tmp_path)
    source = tmp_path / "small" / "model"
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    held = experiment(text).model_dump(mode="json")
    held["data"]["tokenizer"] = {"kind": "pretrained", "name": str(source)}
    for path, message in {
        str(source): "lacks the weights model.norm.weight",
        "no/such": "no/such cannot be loaded",
    }.items():
        held["models"] = {"base": {"init": {"kind": "checkpoint", "path": path}}}
        spec = parse_spec(held)
        failed = go(spec, "base", tmp_path / path.replace("/", "-"))[-1]
        assert failed.reason == "bad_checkpoint"
        assert message in failed.message


# --- The same again ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(text: Path, tmp_path: Path, go: Any) -> None:
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        go(experiment(text, seed=seed), "small", tmp_path / out)
    a, b, c = (losses(tmp_path / out / "small") for out in "abc")
    assert a == b
    assert all(a[key] != c[key] for key in a)


def test_all_models_of_an_experiment_see_the_same_batches(text: Path, tmp_path: Path, go: Any) -> None:
    # At step 1, models whose weights are nearly nothing all score ln(V) but for what the batch itself does to it; the
    # same batch under the same weights gives the same loss. A model's own seed changes its weights alone.
    spec = experiment(text, seed=4)
    spec = changed(spec, "large", shape=texts.SMALL)
    spec = changed(spec, "scaled", shape=texts.SMALL, init={"kind": "random"}, train={"seed": 5})
    for name in ("small", "large", "scaled"):
        go(spec, name, tmp_path)
    small, large, other = (losses(tmp_path / name) for name in ("small", "large", "scaled"))
    assert small == large
    assert other["batch", 1] != small["batch", 1]


@pytest.mark.parametrize("at", [3, 5, 11])
def test_a_run_that_was_stopped_and_resumed_has_the_losses_of_one_that_was_not(
    at: int, text: Path, tmp_path: Path, go: Any
) -> None:
    spec = experiment(text)
    go(spec, "small", tmp_path / "whole")
    # Preparation asks as well; a stop file is what a person would use, so steps are counted from the first event.
    directory = tmp_path / "parts" / "small"
    said = []
    for event in run(spec, "small", directory, cache=tmp_path / "cache", threads=1, stop=lambda: False):
        said.append(event)
        if event.kind == "prepared":
            break
    assert said[-1].kind == "prepared"

    stopped = go(spec, "small", tmp_path / "parts", resume=True, stop=_stop_at(directory, at))
    assert stopped[-1].kind == "stopped"
    assert stopped[-1].step == at
    assert (directory / str(stopped[-1].checkpoint)).is_dir()
    finished = go(spec, "small", tmp_path / "parts", resume=True, attempt=2)
    assert finished[-1].kind == "finished"
    assert next(e for e in finished if e.kind == "prepared").resumed_from == at
    assert losses(directory) == losses(tmp_path / "whole" / "small")
    a, b = ((tmp_path / w / "small" / "model" / "model.safetensors").read_bytes() for w in ("whole", "parts"))
    assert a == b
    ours, theirs = (events(out, "sample") for out in (directory, tmp_path / "whole" / "small"))
    assert [e["text"] for e in ours] == [e["text"] for e in theirs]
    numbers = [json.loads(line)["seq"] for line in (directory / "events.jsonl").read_text().splitlines()]
    assert numbers == list(range(len(numbers)))


def _stop_at(directory: Path, step: int) -> Callable[[], bool]:
    """A stop that is asked for just before the step after `step`: once training has begun it is asked once a step."""
    asked = itertools.count()
    return lambda: bool(events(directory, "prepared")[1:]) and next(asked) >= step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_was_ended_by_a_signal_can_be_resumed_to_the_same_losses(
    number: signal.Signals, text: Path, tmp_path: Path, cache: Path, go: Any
) -> None:
    spec = experiment(text, max_steps=400, eval_every=50, checkpoint_every=20)
    go(spec, "small", tmp_path / "whole")
    path = write(spec, tmp_path / "spec.json")
    directory = tmp_path / "parts" / "small"
    arguments = ("run", path, "--out", tmp_path / "parts", "--only", "small", "--cache", cache, "--threads", 1)
    process = begin(*arguments, out=tmp_path / "said")
    wait_for(directory, "checkpoint")
    code = interrupt(process, number)
    assert code == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    ended = last(directory)
    assert (ended["kind"] == "stopped") == (number != signal.SIGKILL)
    assert not any(f.name.startswith(".") for f in (directory / "checkpoints").iterdir()) or number == signal.SIGKILL
    assert go(spec, "small", tmp_path / "parts", resume=True)[-1].kind == "finished"
    assert losses(directory) == losses(tmp_path / "whole" / "small")


def test_a_stop_file_ends_a_run_with_a_checkpoint(text: Path, tmp_path: Path, cache: Path) -> None:
    spec = experiment(text, max_steps=100_000, eval_every=100_000, checkpoint_every=100_000)
    directory = tmp_path / "small"
    process = begin(
        "run", write(spec, tmp_path / "spec.json"), "--out", tmp_path, "--only", "small", "--cache", cache,
        "--threads", 1, out=tmp_path / "said",
    )  # fmt: skip
    wait_for(directory, "train")
    (directory / "stop").touch()
    assert process.wait(timeout=60) == 0
    ended = last(directory)
    assert ended["kind"] == "stopped"
    assert ended["checkpoint"] == f"checkpoints/step-{ended['step']:06d}"
    assert (directory / ended["checkpoint"] / "model.safetensors").exists()


def test_only_the_last_two_checkpoints_are_kept(text: Path, tmp_path: Path, go: Any) -> None:
    go(experiment(text, max_steps=20, checkpoint_every=4), "small", tmp_path)
    directory = tmp_path / "small"
    assert [e["step"] for e in events(directory, "checkpoint")] == [4, 8, 12, 16]
    assert sorted(f.name for f in (directory / "checkpoints").iterdir()) == ["step-000012", "step-000016"]
    for event in events(directory, "checkpoint")[-2:]:
        assert event["bytes"] == sum(f.stat().st_size for f in (directory / event["path"]).iterdir())


def test_a_finished_run_is_left_alone_and_a_begun_one_wants_resume(text: Path, tmp_path: Path, go: Any) -> None:
    spec = experiment(text)
    stopped = go(spec, "small", tmp_path, stop=_stop_at(tmp_path / "small", 0) and (lambda: True))
    assert (stopped[-1].kind, stopped[-1].checkpoint) == ("stopped", None)
    with pytest.raises(RunError, match="begun before; go on with it by --resume"):
        go(spec, "small", tmp_path)
    with pytest.raises(RunError, match=r"spec\.json is of another experiment"):
        go(experiment(text, lr=0.5), "small", tmp_path, resume=True)
    assert go(spec, "small", tmp_path, resume=True)[-1].kind == "finished"
    before = (tmp_path / "small" / "events.jsonl").read_bytes()
    assert go(spec, "small", tmp_path) == go(spec, "small", tmp_path, resume=True) == []
    assert (tmp_path / "small" / "events.jsonl").read_bytes() == before


def test_a_torn_last_line_is_taken_away_and_the_numbers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    fields = {"kind": "warning", "message": "é"}
    with EventLog(path) as log:
        whole = [log.write(fields).model_dump_json().encode() + b"\n" for _ in range(3)]
    for torn in (b'{"seq":3,"at":"20', b'{"seq":3}', b'{"seq":3,"kind":"finished"}', b"\xc3", b"nonsense\n"):
        path.write_bytes(b"".join(whole) + torn)
        with EventLog(path) as again:
            assert not again.finished
            assert again.write(fields).seq == 3
        assert [parse_event(line).seq for line in path.read_bytes().splitlines()] == [0, 1, 2, 3]


def test_a_second_trainer_is_kept_out_of_a_run_directory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    fields = {"kind": "warning", "message": "the only one"}
    with EventLog(path) as log:
        log.write(fields)
        with pytest.raises(RunError, match="another process trains in"):
            EventLog(path)
        log.write(fields)
    with EventLog(path) as again:
        assert again.events == 2


# --- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "step", "what"),
    [("model.norm.weight", 0, "The validation loss"), ("model.embed_tokens.weight", 1, "The gradient")],
)
def test_what_is_no_longer_a_number_ends_the_run_with_its_step(
    weight: str, step: int, what: str, text: Path, tmp_path: Path, go: Any
) -> None:
    from safetensors.torch import load_file, save_file

    go(experiment(text), "small", tmp_path)
    source = tmp_path / "small" / "model"
    weights = load_file(source / "model.safetensors")
    weights[weight].fill_(3e38)  # at the edge of what a float32 holds
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    held = experiment(text).model_dump(mode="json")
    held["data"]["tokenizer"] = {"kind": "pretrained", "name": str(source)}
    held["models"] = {"base": {"init": {"kind": "checkpoint", "path": str(source)}}}
    ended = go(parse_spec(held), "base", tmp_path / "second")[-1]
    assert (ended.kind, ended.reason, ended.step) == ("failed", "diverged", step)
    assert ended.message.startswith(f"{what} is not a finite number at step {step}.")
    assert not (tmp_path / "second" / "base" / "model").exists()
    assert not list((tmp_path / "second" / "base").glob("checkpoints/*"))


def test_bad_text_ends_the_run_with_a_sentence_and_without_torch(tmp_path: Path) -> None:
    spec = experiment(tmp_path / "missing")
    done = texts.trainer("run", write(spec, tmp_path / "spec.json"), "--out", tmp_path / "out", "--only", "small")
    assert done.returncode == 1
    ended = last(tmp_path / "out" / "small")
    assert (ended["kind"], ended["reason"]) == ("failed", "bad_data")
    assert ended["message"] == f"There is no file or folder {tmp_path / 'missing'}."
    assert done.stderr == ""


def test_a_hub_that_cannot_be_reached_ends_the_run_as_bad_data(tmp_path: Path, go: Any) -> None:
    held = experiment("no-such-owner/no-such-dataset").model_dump(mode="json")
    ended = go(parse_spec(held), "small", tmp_path)[-1]
    assert (ended.kind, ended.reason) == ("failed", "bad_data")
    assert "'no-such-owner/no-such-dataset' cannot be loaded from the Hub" in ended.message


def test_too_little_text_for_one_window_is_said(tmp_path: Path, go: Any) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a short text\n" for i in range(400)))
    ended = go(experiment(tmp_path / "a.txt", n_ctx=65_536), "small", tmp_path)[-1]
    assert ended.reason == "bad_data"
    assert "n_ctx 65536 needs at least 65,537" in ended.message


def test_a_child_without_its_parent_says_what_to_do(text: Path, tmp_path: Path, go: Any) -> None:
    ended = go(experiment(text), "scaled", tmp_path)[-1]
    assert ended.reason == "bad_checkpoint"
    assert ended.message.startswith("scaled is grown from small, which has no finished model in")


def test_a_parent_of_another_text_is_refused(tmp_path: Path, go: Any) -> None:
    folder = texts.write_modules(tmp_path / "text")
    spec = experiment(folder)
    go(spec, "small", tmp_path)
    for file in sorted(folder.iterdir())[:20]:
        file.write_text(file.read_text().replace("e", "q"))
    ended = go(spec, "scaled", tmp_path)[-1]
    assert ended.reason == "bad_checkpoint"
    assert "the text has changed since" in ended.message


def test_a_run_does_not_go_on_with_other_text(tmp_path: Path, go: Any) -> None:
    folder = texts.write_modules(tmp_path / "text")
    spec = experiment(folder)
    directory = tmp_path / "small"
    events_before: Iterator[Event] = run(spec, "small", directory, cache=tmp_path / "cache", threads=1)
    for event in events_before:
        if event.kind == "checkpoint":
            break
    events_before.close()  # type: ignore[attr-defined]
    (folder / "abc.txt").write_text("changed")
    ended = go(spec, "small", tmp_path, resume=True)[-1]
    assert ended.reason == "bad_checkpoint"
    assert "cannot go on from step-000005: the text was" in ended.message


def test_a_full_disk_is_recognised() -> None:
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "w") as full:
        full.write("x" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    said = ending(caught.value, 7)
    assert (said["kind"], said["reason"], said["step"]) == ("failed", "disk_full", 7)
    assert said["message"] == "The disk is full: [Errno 28] No space left on device"


def test_a_table_of_endless_columns_is_refused_in_few_words(tmp_path: Path, text: Path, go: Any) -> None:
    (tmp_path / "wide.csv").write_text(",".join(f"c{i}" for i in range(5000)) + "\n" + ",".join(["x"] * 5000) + "\n")
    held = experiment(text).model_dump(mode="json")
    held["data"]["source"] = str(tmp_path / "wide.csv")
    failed = go(parse_spec(held), "small", tmp_path / "run")[-1]
    assert failed.reason == "bad_data"
    assert failed.message.startswith("Which column of ")
    assert len(failed.message) < 2100


def test_memory_that_is_not_there_is_recognised() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    said = ending(caught.value, 7)
    assert (said["kind"], said["reason"], said["step"]) == ("failed", "out_of_memory", 7)
    assert ending(MemoryError(), 7)["reason"] == "out_of_memory"


def test_any_other_error_is_named_and_its_place_is_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        {}["missing"]
    except KeyError as error:
        said = ending(error, None)
    assert said == {"kind": "failed", "reason": "error", "message": "KeyError: 'missing'", "step": None}
    assert "test_run.py" in capsys.readouterr().err
