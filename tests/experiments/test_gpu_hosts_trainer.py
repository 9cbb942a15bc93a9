"""The real trainer on a host, with real text: its losses are those of this machine, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from accounts.models import User
from experiments import jobs
from experiments.models import Experiment, Host, Reason, State, Transfer
from tests.hosted import all_arrived_once, ended, process_of, there
from tests.live import SHAPES, Live, eventually, kill, told_by_rows
from tests.sshd import Sshd
from trainer.spec import ExperimentSpec, parse_spec

pytestmark = pytest.mark.django_db(transaction=True)

STEPS = 120
MODELS: dict[str, dict[str, Any]] = {
    "small": {"shape": SHAPES["little"]},
    "scaled": {"shape": SHAPES["big"], "init": {"kind": "grow", "parent": "small"}},
    "large": {"shape": SHAPES["big"]},
    "deeper": {"shape": {**SHAPES["big"], "n_layers": 3}, "init": {"kind": "grow", "parent": "scaled"}},
}


def a_spec(text: Path, *models: str) -> ExperimentSpec:
    return parse_spec(
        {
            "name": "test",
            "data": {"source": str(text), "tokenizer": {"kind": "bpe", "d_vocab": 300}},
            "train": {
                "n_ctx": 32,
                "batch_size": 2,
                "max_steps": STEPS,
                "warmup_steps": 2,
                "eval_every": 40,
                "eval_tokens": 256,
                "checkpoint_every": 20,
            },
            "models": {name: MODELS[name] for name in models},
        }
    )


def losses(experiment: Experiment) -> dict[str, list[tuple[str, int, float]]]:
    return {run.name: told_by_rows(run) for run in experiment.runs.all()}


def test_losses_are_those_of_a_local_run_also_after_a_kill_and_across_hosts(
    live: Live, sshd: Sshd, owner: User, tmp_path: Path
) -> None:
    text = tmp_path / "kangaroos.jsonl"
    documents = ["".join(f"Kangaroo {n} took {n * m % 97} leaps.\n" for m in range(60)) for n in range(40)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    here = Host.local()
    Host.objects.filter(pk=here.pk).update(slots=settings.CORES)  # one thread a run, as on the host
    there_ = sshd.host(owner, slots=4, before=sshd.lines(KANGAROO_TRAINER=""))
    for _ in range(2):
        live.worker(KANGAROO_TRAINER="")
    live.reconciler()
    live.start("collect")

    remote = jobs.create(owner, a_spec(text, "small", "scaled", "large"), host=there_)
    small = remote.runs.get(name="small")
    process = process_of(sshd, small)
    stream = there(sshd, small) / "events.jsonl"
    eventually(lambda: stream.exists() and b'"checkpoint"' in stream.read_bytes(), what="for a checkpoint")
    kill(process["trainer"]["pid"])
    assert (ended(small).state, small.reason) == (State.FAILED, Reason.KILLED)
    jobs.resume(remote)
    local = jobs.create(owner, a_spec(text, "small", "scaled", "large", "deeper"))
    mixed = jobs.create(
        owner, a_spec(text, "small", "scaled", "deeper"), hosts={"small": there_, "scaled": here, "deeper": there_}
    )
    for experiment in (remote, local, mixed):
        for run in experiment.runs.all():
            ended(run)
            assert run.state == State.SUCCEEDED, (run.host.name, run.name, run.detail)
            if run.host.is_remote:
                all_arrived_once(sshd, run, starts=2 if run == small else 1)

    resumed = small.notes.filter(kind="prepared").order_by("seq").last()
    assert resumed is not None
    assert resumed.data["resumed_from"] >= 20
    expected = losses(local)
    assert [step for split, step, _ in expected["small"] if split == "train"] == list(range(1, STEPS + 1))
    for experiment in (remote, mixed):
        for name, points in losses(experiment).items():
            assert points == expected[name], f"{name} of {experiment}"
    # What scaled grew from came here of itself; what deeper grew from was sent there.
    assert Transfer.objects.get(run__experiment=mixed, run__name="small").state == Transfer.State.DONE
    sent = there(sshd, mixed.runs.get(name="scaled")) / "model"
    assert (sent / "model.safetensors").read_bytes() == (
        mixed.runs.get(name="scaled").directory / "model" / "model.safetensors"
    ).read_bytes()
    assert [path.name for path in (sshd.root / "files").glob("*/*")] == [text.name], "the text was sent once"
