"""Learned growth: it begins as the plan's child, whatever the family and the rules, and learns on real text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, grow, save
from tests.trainer.texts import MODULES, write_modules
from trainer.endings import Diverged
from trainer.families import build_model, get_family
from trainer.growth import GrowthPlan, plan
from trainer.growth import learn as learning
from trainer.growth.apply import grow_checkpoint
from trainer.growth.learn import Learned, Maps, learn
from trainer.growth.learned import ABOUT, flops, is_mixed_along_axes, map_flops
from trainer.shape import GrowInit, Shape
from trainer.train import Batches, Objective

CPU = torch.device("cpu")

#: Every axis that can be copied grows, units and Llama's channels not by a whole ratio.
WIDER = {
    "gpt2": {"d_model": 24, "n_heads": 6, "d_mlp": 50, "n_layers": 4},
    "gpt_neox": {"d_model": 48, "n_heads": 6, "d_mlp": 50, "n_layers": 4},
}
LIKE_LLAMA = {"d_model": 18, "n_heads": 18, "n_kv_heads": 6, "d_mlp": 50, "n_layers": 4}


class Pair(NamedTuple):
    parent: Any
    plan: GrowthPlan
    child: Any  # as the plan makes it

    def state(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self.child.state_dict().items()}

    def learn(self, steps: int, **settings: Any) -> Learned:
        settings = {"lr": 1e-2, "seed": 0, "batches": random_batches()} | settings
        return learn(self.parent, self.plan, self.state(), steps=steps, device=CPU, **settings)


def grown_pair(folder: Path, family: str, to: Shape, init: GrowInit, tied: bool) -> Pair:
    source = save(folder / "parent", family, PARENT[family], tied=tied)
    made = plan(family, PARENT[family], to, init, n_positions=N_POSITIONS, d_vocab=D_VOCAB, tied=tied)
    grow_checkpoint(source, folder / "child", made, seed=3)
    return Pair(load(source), made, load(folder / "child"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    while True:
        tokens = torch.randint(0, D_VOCAB, (4, N_POSITIONS), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def plain_loss(model: Any, batch: tuple[Tensor, Tensor]) -> float:
    """By transformers alone."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()


def llama(folder: Path, init: GrowInit, **changes: Any) -> Pair:
    return grown_pair(folder, "llama", child("llama", **(changes or LIKE_LLAMA)), init, tied=True)


# What it begins with, and what comes out


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", PARENT)
def test_the_maps_begin_as_the_plans_and_end_as_plain_weights(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = child(family, **WIDER.get(family, LIKE_LLAMA))
    pair = grown_pair(tmp_path, family, to, grow(snr_db=None, init_range=1e-9), tied)
    first, second = itertools.islice(random_batches(), 2)

    learned, further = pair.learn(1), pair.learn(2)
    assert learned.losses[0] == pytest.approx(plain_loss(pair.child, first), abs=1e-5)

    # Without the spread nothing is left for the constant part: the maps give all that the plan copies or averages.
    monkeypatch.setattr(learning, "SPREAD", 0.0)
    new = {origin.new.name: origin.new for origin in pair.plan.parameters()}
    given = learning._by_parameter(pair.state(), new.values(), pair.plan, CPU)
    old = get_family(family).parameters(pair.plan.parent, N_POSITIONS, D_VOCAB, tied)
    maps = Maps(pair.plan, learning._by_parameter(pair.parent.state_dict(), old, pair.plan, CPU), seed=0)
    for name, weight in maps():
        if is_mixed_along_axes(new[name]):
            torch.testing.assert_close(weight, given[name], rtol=1e-5, atol=1e-6, msg=name)

    pair.child.load_state_dict(learned.state)
    pair.child.save_pretrained(tmp_path / "learned")
    assert further.losses[0] == learned.losses[0]
    assert plain_loss(load(tmp_path / "learned"), second) == pytest.approx(further.losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("family", "width", "depth", "split"),
    [
        ("gpt2", "random_pad", "append_random", "even"),
        ("gpt_neox", "pad", "stack", "even"),
        ("llama", "block_diagonal", "identity", "even"),
        ("olmo2", "duplicate", "identity", "uneven"),
        ("qwen3", "aki", "interleave", "even"),
        ("gemma3_text", "net2net", "midas", "even"),
    ],
)
def test_before_the_first_step_it_is_the_plans_child_by_any_rule(
    family: str, width: str, depth: str, split: str, tmp_path: Path
) -> None:
    to = child(family, **WIDER.get(family, LIKE_LLAMA))
    pair = grown_pair(tmp_path, family, to, grow(width, depth, split=split), tied=True)

    before, learned = pair.learn(0), pair.learn(1)

    assert before.state.keys() == pair.child.state_dict().keys()
    assert all(torch.equal(before.state[name], weight) for name, weight in pair.child.state_dict().items())
    assert learned.losses[0] == pytest.approx(plain_loss(pair.child, next(random_batches())), abs=1e-5)


# Learning


class Text(NamedTuple):
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    held_out: tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Python's sources, byte by byte, and a module that is not among what is learned on."""
    folder = write_modules(tmp_path_factory.mktemp("words"), MODULES[:8])
    *train, last = (np.frombuffer(f.read_bytes(), np.uint8) % 128 for f in sorted(folder.iterdir()))
    held = torch.from_numpy(last[: 64 * 33].astype(np.int64)).view(64, 33)
    tokens = np.concatenate(train)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = Batches(tokens, 32, 16, seed)
        return (drawn.at(step, CPU) for step in itertools.count())

    return Text(batches, (held[:, :-1], held[:, 1:]))


def test_the_loss_on_unseen_text_falls_below_that_of_the_plans_child(words: Text, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = Shape(d_model=16, n_heads=2, d_head=8, d_mlp=32, n_layers=2)
    large = Shape(d_model=32, n_heads=4, d_head=8, d_mlp=64, n_layers=4)
    parent = build_model(get_family("llama").config(small, 32, 128, True))
    optimizer, objective = torch.optim.AdamW(parent.parameters(), lr=1e-2), Objective(parent, compiled=False)
    for batch in itertools.islice(words.batches(0), 150):
        objective(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    parent.save_pretrained(tmp_path / "parent")
    made = plan("llama", small, large, grow(depth="stack"), n_positions=32, d_vocab=128, tied=True)
    grow_checkpoint(tmp_path / "parent", tmp_path / "child", made, seed=0)
    pair = Pair(parent, made, load(tmp_path / "child"))
    planned = plain_loss(pair.child, words.held_out)
    told: list[tuple[int, int, float]] = []

    learned = pair.learn(30, lr=3e-3, batches=words.batches(1), progress=lambda *report: told.append(report))

    pair.child.load_state_dict(learned.state)
    assert plain_loss(parent, words.held_out) < 3.5, "of log 128 = 4.9: the parent has learned something"
    assert plain_loss(pair.child, words.held_out) < planned - 0.1
    assert told == [(step, 30, loss) for step, loss in enumerate(learned.losses, start=1)]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path) -> None:
    pair = llama(tmp_path, grow())
    once, again, other = (pair.learn(3, seed=seed).state for seed in (0, 0, 1))

    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)


def test_equal_copies_part_though_nothing_but_the_maps_is_learned(tmp_path: Path) -> None:
    pair = llama(tmp_path, grow(snr_db=None), d_mlp=40)
    name = "model.layers.0.mlp.up_proj.weight"
    above, below = pair.learn(3).state[name].chunk(2)

    assert torch.equal(*pair.state()[name].chunk(2))
    assert (above - below).norm() > 1e-3 * above.norm()


def test_what_does_not_converge_is_told_and_so_are_missing_batches(tmp_path: Path) -> None:
    pair = llama(tmp_path, grow())
    with pytest.raises(ValueError, match="3 batches were wanted, but there were 2"):
        pair.learn(3, batches=itertools.islice(random_batches(), 2))

    torch.nn.init.constant_(pair.child.get_input_embeddings().weight, torch.inf)
    with pytest.raises(Diverged, match="learned growth"):
        pair.learn(1)


# What it costs


@pytest.mark.parametrize(
    "changes",
    [LIKE_LLAMA, {"n_layers": 3}, {"d_model": 24, "d_head": 8, "d_mlp": 40}],
    ids=["width and depth", "depth", "head width"],
)
def test_the_flops_of_the_maps_are_those_that_torch_counts(changes: dict[str, int], tmp_path: Path) -> None:
    pair = llama(tmp_path, grow(), **changes)
    maps = Maps(pair.plan, pair.parent.state_dict(), seed=0)
    with FlopCounterMode(display=False) as forward:
        weights = [weight for _, weight in maps()]
    with FlopCounterMode(display=False) as backward:
        sum(weight.sum() for weight in weights).backward()

    assert forward.get_total_flops() == map_flops(pair.plan).forward
    assert forward.get_total_flops() + backward.get_total_flops() == map_flops(pair.plan).step
    tokens = 4 * (N_POSITIONS - 1)
    assert pair.learn(2).flops == pytest.approx(flops(pair.plan, 2, tokens, N_POSITIONS - 1), rel=1e-12)
    assert pair.learn(2).peak_bytes > 1e8, "torch alone takes more"


def test_it_is_described_for_a_person() -> None:
    assert ABOUT.url == "https://arxiv.org/abs/2303.00980"
    assert ABOUT.line.endswith(".")
