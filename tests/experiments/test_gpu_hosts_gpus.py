"""Who gets which GPU of a host: free ones, one run each, in order; nothing where somebody else computes."""

from __future__ import annotations

from typing import Any

import pytest

from accounts.models import User
from experiments import jobs, line
from experiments.models import Host, ModelRun, Reason, State
from tests.hosted import SLOWLY, a_run, comes_to, ended, environment_of, page_of, submit, succeeded
from tests.live import Live, eventually
from tests.sshd import Sshd
from trainer import machine

pytestmark = pytest.mark.django_db(transaction=True)

FIRST, SECOND = "GPU-4f1b6a0e-0c1c-8a55-9d5e-1f0a5b7d2c31", "GPU-9a3c77d2-52be-6e0f-3b7e-6a0e0c9d8f12"
BOTH = (
    f"0, {FIRST}, NVIDIA H100 80GB HBM3, 81559, 4, 0, 31, 70.21, 700.00, 570.195.03\n"
    f"1, {SECOND}, NVIDIA H100 80GB HBM3, 81559, 4, 0, 33, 68.02, 700.00, 570.195.03\n"
)
SMI = """\
#!/bin/sh
case "$1" in
    --query-gpu=*) cat "$HOME/gpus" ;;
    --query-compute-apps=*) cat "$HOME/apps" ;;
esac
"""


class Cards:
    """The host's two GPUs, as its nvidia-smi speaks of them."""

    def __init__(self, sshd: Sshd) -> None:
        self.login = sshd.login
        self.login.write("bin/nvidia-smi", SMI, 0o755)
        self.login.write("gpus", BOTH)
        self.used_by("")

    def used_by(self, processes: str) -> None:
        self.login.write("apps", processes)

    def host(self, sshd: Sshd, owner: User, **fields: Any) -> Host:
        """The host, with what a look at it has found."""
        before = sshd.lines(**SLOWLY) + f'\nexport PATH="{self.login.home}/bin:$PATH"'
        gpus, driver, _ = machine.parse_gpus(BOTH)
        return sshd.host(owner, before=before, facts={"gpus": gpus, "driver": driver}, **fields)


@pytest.fixture
def cards(sshd: Sshd) -> Cards:
    return Cards(sshd)


def waits_for_a_gpu(run: ModelRun, place: int) -> None:
    def said() -> bool:
        run.refresh_from_db()
        return (run.state, run.reason) == (State.QUEUED, Reason.WAITING_FOR_GPU)

    eventually(said, what=f"for {run} to wait")
    assert line.place_in_line(run) == place
    assert f"number {place} in line" in page_of(run)


def test_each_run_has_a_free_gpu_and_the_next_waits_in_line(site: Live, sshd: Sshd, owner: User, cards: Cards) -> None:
    host = cards.host(sshd, owner)
    one, other, third = [a_run(owner, host, steps=150) for _ in range(3)]
    fourth = a_run(owner, host, steps=10)
    for run in (one, other):
        comes_to(run, 5)
    assert {tuple(one.gpus), tuple(other.gpus)} == {(FIRST,), (SECOND,)}
    for run in (one, other):
        assert environment_of(sshd, run)["CUDA_VISIBLE_DEVICES"] == run.gpus[0]
    waits_for_a_gpu(third, 1)
    waits_for_a_gpu(fourth, 2)
    # When a place is free but its GPU is not: somebody else has begun to compute there.
    cards.used_by(f"{other.gpus[0]}, 953998\n")
    jobs.request_stop(other)
    ended(other)
    waits_for_a_gpu(third, 1)
    # A host that does not answer gives no place, and takes none away.
    sshd.stop()
    jobs.reconcile()
    assert not line.claim(third)
    sshd.start()
    cards.used_by("")
    comes_to(third, 5)
    assert third.gpus == other.gpus
    for run in (one, third):
        jobs.request_stop(run)
    succeeded(sshd, fourth)


def test_a_gpu_on_which_somebody_computes_is_not_given(site: Live, sshd: Sshd, owner: User, cards: Cards) -> None:
    cards.used_by(f"{FIRST}, 953998\n")
    host = cards.host(sshd, owner)
    two = submit(owner, host, steps=10, models=("small",), gpus=2).runs.get()
    waits_for_a_gpu(two, 1)
    behind = a_run(owner, host, steps=10)
    waits_for_a_gpu(behind, 2)  # it could have the other one, but would overtake
    cards.used_by("")
    succeeded(sshd, two, behind)
    assert sorted(two.gpus) == sorted([FIRST, SECOND])
    greedy = ended(submit(owner, host, models=("small",), gpus=3).runs.get())
    assert (greedy.state, greedy.reason) == (State.FAILED, Reason.ERROR)
    assert f"It wants 3 GPUs, and {host} has 2 to give." in page_of(greedy)
    # Its owner's choice, and more than one run on a GPU.
    Host.objects.filter(pk=host.pk).update(gpu_choice="1", runs_per_gpu=2)
    host.refresh_from_db()
    pair = [a_run(owner, host, steps=60) for _ in range(2)]
    last = a_run(owner, host, steps=10)
    for run in pair:
        comes_to(run, 5)
        assert environment_of(sshd, run)["CUDA_VISIBLE_DEVICES"] == SECOND
    waits_for_a_gpu(last, 1)
    succeeded(sshd, *pair, last)
    assert last.gpus == [SECOND]
