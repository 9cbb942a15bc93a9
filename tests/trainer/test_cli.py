"""`python -m trainer`, from outside."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.texts import LARGE, command, events, experiment, last, losses, trainer, write
from trainer.__main__ import cores, main
from trainer.events import parse_event
from trainer.run import run
from trainer.spec import ExperimentSpec, parse_spec


def trained(spec: ExperimentSpec, out: Path, cache: Path, *names: str) -> None:
    """Models that a test needs and is not about, trained in this process: a new one takes seconds to import torch."""
    for name in names:
        assert list(run(spec, name, out / name, cache=cache, threads=1))[-1].kind == "finished"


def test_an_experiment_runs_from_its_file_to_three_models(text: Path, tmp_path: Path, cache: Path) -> None:
    spec = write(experiment(text), tmp_path / "spec.json")
    out = tmp_path / "out"
    done = trainer("run", spec, "--out", out, "--cache", cache, "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(dict.fromkeys(line["run"] for line in lines)) == ["small", "scaled", "large"]
    for name in ("small", "scaled", "large"):
        ours = [line for line in lines if line["run"] == name]
        assert [parse_event(json.dumps(line)) for line in ours] == [
            parse_event(line) for line in (out / name / "events.jsonl").read_text().splitlines()
        ]
        assert ours[-1]["kind"] == "finished"
        assert (out / name / "model" / "model.safetensors").exists()
        assert parse_spec((out / name / "spec.json").read_text()) == experiment(text)
        assert events(out / name, "prepared")[0]["threads"] == 1
    # Run again: everything is there, nothing is done.
    again = trainer("run", spec, "--out", out, "--cache", cache)
    assert (again.returncode, again.stdout) == (0, "")


def test_a_table_is_read_while_a_new_process_still_imports(tmp_path: Path) -> None:
    """`datasets` looks into transformers as it reads: a run that reads a table while importing it fails every time."""
    table = tmp_path / "rows.jsonl"
    table.write_text(
        "".join(json.dumps({"text": f"row {i} of the table: {'word ' * (i % 9)}"}) + "\n" for i in range(2000))
    )
    spec = write(experiment(table, max_steps=2), tmp_path / "spec.json")
    done = trainer("run", spec, "--out", tmp_path / "out", "--only", "small", "--cache", tmp_path / "cache")
    assert (done.returncode, json.loads(done.stdout.splitlines()[-1])["kind"]) == (0, "finished")


def on_a_terminal(*arguments: object) -> tuple[int, str]:
    """Exit code and what was drawn, with a terminal as output."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    with subprocess.Popen(command(*arguments), stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side has closed
                break
            if not piece:
                break
            drawn += piece
    os.close(ours)
    return process.returncode, drawn.decode()


def test_a_terminal_shows_bars_and_at_the_end_the_comparison(text: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    held = experiment(text).model_dump(mode="json")
    del held["models"]["large"]
    spec = write(parse_spec(held), tmp_path / "spec.json")
    code, drawn = on_a_terminal("run", spec, "--out", out, "--cache", cache, "--threads", 1)
    assert code == 0
    assert "small: 100%" in drawn
    assert "12/12" in drawn
    assert "scaled: Step 0: grown from small by duplicate and identity to" in drawn
    assert '"kind"' not in drawn
    table = drawn.replace("\r", "").rstrip().splitlines()[-3:]
    assert table[0].split()[:3] == ["model", "parameters", "test"]
    for row, name in zip(table[1:], ("small", "scaled"), strict=True):
        figure = next(e for e in events(out / name, "eval") if e["split"] == "test")
        assert row.split()[0] == name
        assert row.split()[2] == f"{figure['cross_entropy']:.4f}"


def test_a_failed_parent_leaves_out_its_children_and_no_one_else(text: Path, tmp_path: Path, cache: Path) -> None:
    held = experiment(text).model_dump(mode="json")
    held["data"]["tokenizer"] = {"kind": "pretrained", "name": str(tmp_path / "tokenizer")}
    held["models"]["small"] |= {"init": {"kind": "checkpoint", "path": str(tmp_path / "nowhere")}}
    # The tokenizer of a run of the same text.
    trained(experiment(text), tmp_path / "a", cache, "small")
    (tmp_path / "a" / "small" / "model").rename(tmp_path / "tokenizer")
    out = tmp_path / "out"
    done = trainer("run", write(parse_spec(held), tmp_path / "b.json"), "--out", out, "--cache", cache)
    assert done.returncode == 1
    assert "scaled is left out: small failed." in done.stderr
    assert last(out / "small")["reason"] == "bad_checkpoint"
    assert not (out / "scaled").exists()
    assert last(out / "large")["kind"] == "finished"


def test_a_spec_is_refused_with_one_problem_a_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text('{"name": "x", "train": {"lr": 7, "batch_size": 0}, "models": {"small": {"family": "gpt5"}}}')
    for what in (("run", path, "--out", tmp_path / "out"), ("plan", path)):
        done = trainer(*what)
        assert done.returncode == 2
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert "train.lr 7: must be at most 1.0" in lines
        assert "train.batch_size 0: must be at least 1" in lines
        assert any(line.startswith("models.small.family 'gpt5': must be '") for line in lines)
    assert not (tmp_path / "out").exists()
    done = trainer("plan", tmp_path / "missing.json")
    assert (done.returncode, done.stderr) == (
        2,
        f"{tmp_path}/missing.json: cannot be read: No such file or directory\n",
    )


def test_only_names_a_model_of_the_spec(text: Path, tmp_path: Path) -> None:
    done = trainer("run", write(experiment(text), tmp_path / "s.json"), "--out", tmp_path, "--only", "middle")
    assert done.returncode == 2
    assert done.stderr == "--only 'middle': there is no such model; there is small, scaled, large\n"


def test_the_number_of_threads_comes_from_the_option_else_the_environment(
    text: Path, tmp_path: Path, cache: Path
) -> None:
    spec = write(experiment(text, max_steps=1, warmup_steps=0), tmp_path / "spec.json")
    arguments = ("run", spec, "--only", "small", "--cache", cache, "--out")
    assert trainer(*arguments, tmp_path / "a", "--threads", 2, KANGAROO_THREADS="1").returncode == 0
    assert trainer(*arguments, tmp_path / "b", KANGAROO_THREADS="1", KANGAROO_ATTEMPT="7").returncode == 0
    assert trainer(*arguments, tmp_path / "c").returncode == 0
    threads = [events(tmp_path / out / "small", "prepared")[0]["threads"] for out in "abc"]
    assert threads == [2, 1, cores()]
    assert events(tmp_path / "b" / "small", "started")[0]["attempt"] == 7
    refused = trainer(*arguments, tmp_path / "d", KANGAROO_THREADS="many")
    assert (refused.returncode, refused.stderr) == (
        2, "KANGAROO_THREADS: threads 'many': must be a whole number, at least 1\n",
    )  # fmt: skip


def test_cores_are_those_this_process_may_use() -> None:
    code = "from trainer.__main__ import cores; print(cores())"
    first = min(os.sched_getaffinity(0))
    said = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{first}]); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == "1\n"


def test_a_reader_that_goes_away_ends_the_run_with_a_checkpoint(text: Path, tmp_path: Path, cache: Path) -> None:
    spec = experiment(text, max_steps=100_000, eval_every=100_000, checkpoint_every=100_000)
    arguments = command("run", write(spec, tmp_path / "s.json"), "--out", tmp_path, "--only", "small", "--cache", cache)
    with subprocess.Popen([*arguments, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["kind"] == "train":
                break
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""
    assert last(tmp_path / "small")["kind"] == "stopped"
    assert last(tmp_path / "small")["checkpoint"]


def test_in_its_own_log_a_run_writes_sentences(text: Path, tmp_path: Path, cache: Path) -> None:
    spec = write(experiment(text), tmp_path / "spec.json")
    log = tmp_path / "small" / "log.txt"
    log.parent.mkdir()
    with log.open("ab") as file:
        arguments = command("run", spec, "--out", tmp_path, "--only", "small", "--cache", cache, "--threads", 1)
        subprocess.run(arguments, stdout=file, stderr=file, check=True)
    lines = log.read_text().splitlines()
    assert "Attempt 1, process" in lines[0]
    assert any("Step 5: validation loss" in line for line in lines)
    assert lines[-1][20:].startswith("Finished at step 12,")
    assert not any("{" in line for line in lines if "Sample" not in line)


# --- plan and grow ----------------------------------------------------------------------------------------------------


def test_a_plan_says_what_each_model_costs_without_torch_or_anything_heavy(text: Path, tmp_path: Path) -> None:
    spec = write(experiment(text), tmp_path / "spec.json")
    code = (
        "import sys; from trainer.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'numpy', 'safetensors'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan", str(spec)], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    head, *rows = done.stdout.splitlines()[:4]
    assert head.split()[:3] == ["model", "parameters", "non-embedding"]
    assert [row.split()[0] for row in rows] == ["small", "scaled", "large"]
    assert "scaled keeps what its parent computes." in done.stdout

    figures = json.loads(trainer("plan", spec, "--json").stdout)
    assert list(figures) == ["small", "scaled", "large"]
    assert figures["small"]["steps"] == 12
    assert figures["small"]["tokens"] == 12 * 4 * 32
    assert [growth["preserves"] for growth in figures["scaled"]["growths"]] == [True]
    assert figures["large"]["growths"] == []


def test_what_was_planned_is_what_is_built(text: Path, tmp_path: Path, cache: Path) -> None:
    spec = experiment(text, "gpt2")
    figures = json.loads(trainer("plan", write(spec, tmp_path / "spec.json"), "--json").stdout)
    trained(spec, tmp_path, cache, *spec.order())
    from transformers import AutoModelForCausalLM

    for name, planned in figures.items():
        prepared = events(tmp_path / name, "prepared")[0]
        for key in ("parameters", "non_embedding_parameters", "flops_per_token"):
            assert prepared[key] == planned[key]
        assert last(tmp_path / name)["flops"] == planned["flops"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        assert sum(p.numel() for p in model.parameters()) == planned["parameters"]


def test_grow_makes_a_checkpoint_that_says_what_its_source_says(
    text: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained(experiment(text), tmp_path, cache, "small")
    source, out = tmp_path / "small" / "model", tmp_path / "grown"
    shape = ",".join(f"{field}={value}" for field, value in LARGE.items())
    arguments = ("grow", source, "--shape", shape, "--width", "duplicate", "--depth", "identity")

    def grow(*further: object) -> tuple[int, dict[str, Any]]:
        code = main([str(argument) for argument in (*arguments, *further, "--json")])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    done = trainer(*arguments, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "duplicate and identity: keeps what the parent computes." in done.stdout
    assert re.search(r"Certificate: all \d+ tensors keep the parent's function; the largest residual is ", done.stdout)
    code, said = grow("--vocab", 330, "--dry-run")
    assert (code, said["kind"], said["preserves"], said["parent_d_vocab"], said["d_vocab"]) == (
        0,
        "plan",
        True,
        320,
        330,
    )
    code, report = grow("--out", tmp_path / "half", "--dtype", "bf16", "--max-shard-size", "20KB", "--text", __file__)
    assert (code, report["kind"], report["preserves"]) == (0, "grown", True)
    assert report["residual"] == max(report["tensors"].values())
    assert report["measured"]["n_tokens"] > 1000
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    code, report = grow("--out", tmp_path / "other", "--vocab", 330, "--text", __file__)
    assert (code, report["parameters"], report["measured"]) == (0, said["parameters"], None)
    assert "vocabularies" in report["not_measured"]
    code, report = grow("--out", tmp_path / "other")
    assert (code, report["kind"], report["field"]) == (2, "failed", "out")
    ids = AutoTokenizer.from_pretrained(out)("def main():\n    return", return_tensors="pt").input_ids
    with torch.no_grad():
        old, new = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, out))
    torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)

    for shape, message in {
        "d_model=8": "is smaller than the parent's 16",
        "d_mode=32": "d_mode",
        "d_model": "write FIELD=NUMBER",
    }.items():
        refused = trainer("grow", source, "--shape", shape, "--out", tmp_path / "no")
        assert refused.returncode == 2, shape
        assert message in refused.stderr
    refused = trainer("grow", source, "--shape", "d_model=32,n_heads=4,d_mlp=64", "--out", out)
    assert refused.returncode == 2
    assert "is there already" in refused.stderr


def test_the_agent_is_reached_without_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys; from trainer.__main__ import main; main(['agent', 'status', sys.argv[1]]); "
        "print(sorted({'pydantic', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [(), ("run",), ("run", "x.json"), ("fly",)])
def test_what_is_missing_from_the_command_line_is_said(arguments: tuple[str, ...]) -> None:
    done = trainer(*arguments)
    assert done.returncode == 2
    assert "usage: python -m trainer" in done.stderr


def test_a_resumed_experiment_goes_on_where_it_stopped(text: Path, tmp_path: Path, cache: Path) -> None:
    held = experiment(text, max_steps=300, eval_every=300, checkpoint_every=300).model_dump(mode="json")
    del held["models"]["large"]
    spec = parse_spec(held)
    arguments = ("run", write(spec, tmp_path / "s.json"), "--out", tmp_path, "--cache", cache, "--threads", 1)
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["kind"] == "eval":  # at step 0: nearly all of it is still to come
                process.terminate()  # forwarded to the model's own process
                break
        process.stdout.read()
        assert process.wait(timeout=60) == 0
    assert last(tmp_path / "small")["kind"] == "stopped"
    assert not (tmp_path / "scaled").exists()
    assert trainer(*arguments).returncode == 1  # begun before: it must be said that it should go on
    assert trainer(*arguments, "--resume").returncode == 0
    assert all(last(tmp_path / name)["kind"] == "finished" for name in spec.models)
    assert len(losses(tmp_path / "small")) == 300 + 3
