"""Growth at any size: files as transformers writes them, bounded memory, other dtypes, and nothing half-made."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.pico import D_VOCAB, N_POSITIONS, PARENT, child, grow, logits, save
from trainer.families import get_family, read_config
from trainer.growth import GrowthError, GrowthPlan, plan
from trainer.growth.apply import grow_checkpoint, named_weights, open_source
from trainer.growth.copying import copied
from trainer.growth.tensors import grown
from trainer.growth.weights import INDEX, Entry, Shards, Weights, itemsize, narrow
from trainer.shape import GrowInit, Shape

ROOT = Path(__file__).resolve().parents[2]


def made_up(folder: Path, family: str, shape: Shape, dtype: str = "F32", d_vocab: int = D_VOCAB) -> Path:
    """A checkpoint of random numbers, also tiny and huge ones, without torch."""
    folder.mkdir(parents=True)
    described = get_family(family)
    (folder / "config.json").write_text(json.dumps(described.config(shape, N_POSITIONS, d_vocab, False)))
    parameters = described.parameters(shape, N_POSITIONS, d_vocab, False)
    rng = np.random.default_rng(0)
    with Shards(folder, [Entry(p.name, dtype, p.shape) for p in parameters], 5_000_000_000) as shards:
        for parameter in parameters:
            values = rng.standard_normal(parameter.shape, dtype=np.float32)
            if parameter.into:
                values.flat[:2] = (1e-7, -6e4) if dtype == "F16" else (3e-45, 3e38)
            shards.write(parameter.name, narrow(values, dtype))
    return folder


def planned(source: Path, to: Shape, init: GrowInit) -> GrowthPlan:
    opened = open_source(source)
    shape, n_positions, d_vocab, tied = opened.described
    return plan(opened.family.name, shape, to, init, n_positions=n_positions, d_vocab=d_vocab, tied=tied)


def bits(folder: Path) -> dict[str, bytes]:
    return {name: tensor.stored(slice(None)).tobytes() for name, tensor in Weights(folder).tensors.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("parent") / "llama", "llama", PARENT["llama"])


# Files


def test_shards_and_their_index_are_what_transformers_would_have_written(llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    made = planned(llama, child("llama", d_model=24, n_layers=3), grow())
    grow_checkpoint(llama, tmp_path / "whole", made, seed=0)
    told: list[tuple[int, int, str]] = []
    grow_checkpoint(
        llama, tmp_path / "ours", made, seed=0, max_shard_bytes=7000, progress=lambda *report: told.append(report)
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "theirs", max_shard_size=7000)

    ours, theirs = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("ours", "theirs"))
    assert len(set(ours["weight_map"].values())) > 3
    assert ours == theirs
    for name in set(ours["weight_map"].values()):
        right = load_file(tmp_path / "theirs" / name)
        for tensor, values in load_file(tmp_path / "ours" / name).items():
            np.testing.assert_array_equal(values, right.pop(tensor))
        assert not right
    assert bits(tmp_path / "whole") == bits(tmp_path / "ours")
    assert (logits(tmp_path / "ours") - logits(tmp_path / "whole")).abs().max() == 0
    total = ours["metadata"]["total_size"]
    assert {what for *_, what in told} == {"writing", "verifying"}
    assert told[-1] == (total, total, "verifying")
    assert all(0 <= done <= of == total for done, of, _ in told)


def test_tensors_of_unlike_dtypes_are_each_aligned(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    entries = [Entry("odd", "F16", (3,)), Entry("wide", "F64", (2, 2)), Entry("single", "F32", (5,))]
    with Shards(tmp_path, entries, 10**9) as shards:
        for entry in reversed(entries):
            shards.write(entry.name, narrow(np.ones(entry.shape), entry.dtype))
    held = load_file(tmp_path / "model.safetensors")
    assert {name: (values.dtype.name, values.sum()) for name, values in held.items()} == {
        "odd": ("float16", 3), "wide": ("float64", 4), "single": ("float32", 5),
    }  # fmt: skip
    for entry, tensor in ((e, Weights(tmp_path).tensors[e.name]) for e in entries):
        assert tensor._start % itemsize(entry.dtype) == 0


def test_any_number_of_threads_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    made = planned(llama, child("llama", d_mlp=40, n_layers=3), grow("duplicate", "append_random"))
    for threads in (1, 4):
        grow_checkpoint(llama, tmp_path / str(threads), made, seed=1, threads=threads)
    assert bits(tmp_path / "1") == bits(tmp_path / "4")


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    values = np.arange(600, dtype=np.float32).reshape(200, 3)
    with Shards(tmp_path, [Entry("a", "F32", values.shape)], 10**9) as shards:
        shards.write("a", values[:70])
        shards.write("a", values[70:])
    tensor = Weights(tmp_path).tensors["a"]
    rng = np.random.default_rng(0)
    for rows in ([], [7], [3, 4, 5], [5, 4, 3], [0, 199, 0], [0, 1, 2, 0, 1, 2], rng.integers(0, 200, 300)):
        np.testing.assert_array_equal(tensor[np.asarray(rows, np.intp)], values[np.asarray(rows, np.intp)])
    np.testing.assert_array_equal(tensor[150:], values[150:])


# Copies


#: Growths of which all, some or no matrices are copies of the parent's entries times powers of two.
COPIES = {
    "stack": ({"n_layers": 4}, {"depth": "stack"}),
    "silent blocks": ({"n_layers": 3}, {}),
    "twice as wide": ({"d_mlp": 40}, {"snr_db": None}),
    "four times": ({"d_mlp": 80}, {"snr_db": None, "split": "even"}),
    "three times": ({"d_mlp": 60}, {"snr_db": None}),
    "counted copies": ({"d_mlp": 30}, {"snr_db": None}),
    "zeros and random": ({"d_mlp": 30}, {"width": "pad"}),
    "with noise": ({"d_mlp": 40}, {}),
    "further tokens": ({}, {"d_vocab": 60}),
}


@pytest.mark.parametrize("what", COPIES)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])  # stored (in, out); interleaved; grouped heads
def test_copies_are_to_the_bit_what_the_rule_gives_rounded(family: str, what: str, tmp_path: Path) -> None:
    changes, settings = COPIES[what]
    seen = set()
    for dtype in ("F32", "BF16", "F16", "F64"):
        source = made_up(tmp_path / dtype, family, PARENT[family], dtype)
        made = planned(source, child(family, **changes), grow(**settings))
        weights = named_weights(open_source(source))
        for origin in made.parameters():
            if origin.old is None:
                continue
            for to in {dtype, "F32", "BF16"}:
                as_stored = copied(weights[origin.old.name], origin, made, to)
                seen.add(as_stored is not None)
                if as_stored is not None:
                    rounded = [
                        narrow(rows, to)
                        for rows in grown(weights[origin.old.name], origin, made, np.random.default_rng(0))
                    ]
                    assert _bytes(as_stored) == _bytes(rounded), (origin.new.name, dtype, to)
    assert seen == {True, False}  # vectors are never copied this way


def _bytes(blocks: Any) -> bytes:
    return b"".join(block.tobytes() for block in blocks)


# Memory


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "d_mlp": 3072}),
        ("gpt2", {"d_model": 512, "n_heads": 8, "d_mlp": 3072}),  # stored (in, out): copies of an input lie apart
    ],
)
def test_memory_is_for_blocks_of_rows_whatever_a_tensor_has(
    family: str, changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Shape(d_model=256, n_heads=4, d_head=64, d_mlp=1536, n_layers=1)
    source = made_up(tmp_path / "parent", family, small, d_vocab=1000)
    for module in ("tensors", "certificate"):
        monkeypatch.setattr(f"trainer.growth.{module}.BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr("trainer.growth.tensors.Apart.CHUNK", 8)
    made = planned(source, small.model_copy(update=changes), grow())
    tracemalloc.start()
    try:
        grow_checkpoint(source, tmp_path / "child", made, seed=0, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(tensor.nbytes for tensor in Weights(tmp_path / "child").tensors.values())
    assert largest > 6_000_000
    assert peak < largest / 2  # and a quarter of what it has in float64


# Dtypes


def test_another_dtype_is_written_and_said(llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    made = planned(llama, child("llama", d_model=24, n_layers=3), grow(snr_db=None))
    grow_checkpoint(llama, tmp_path / "F32", made, seed=0)
    for dtype, name in {"BF16": "bfloat16", "F16": "float16"}.items():
        grow_checkpoint(llama, tmp_path / dtype, made, seed=0, dtype=dtype)
        assert read_config(tmp_path / dtype)["dtype"] == name
        right = AutoModelForCausalLM.from_pretrained(tmp_path / "F32").to(getattr(torch, name)).state_dict()
        for key, values in AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto").state_dict().items():
            assert torch.equal(values, right[key]), key
    back = planned(tmp_path / "BF16", child("llama", d_model=48, n_layers=3), grow())
    grow_checkpoint(tmp_path / "BF16", tmp_path / "up", back, seed=0, dtype="F32")
    assert {tensor.dtype for tensor in Weights(tmp_path / "up").tensors.values()} == {"F32"}
    assert (logits(tmp_path / "BF16") - logits(tmp_path / "up")).abs().max() < 2e-4
    with pytest.raises(GrowthError, match="must be F32, F16, BF16"):
        grow_checkpoint(llama, tmp_path / "no", made, seed=0, dtype="F8")


@pytest.mark.parametrize("noise", [None, 0.0])
def test_what_a_dtype_cannot_hold_is_refused_by_its_tensors_name(noise: float | None, tmp_path: Path) -> None:
    source = made_up(tmp_path / "parent", "llama", PARENT["llama"])
    made = planned(source, child("llama", d_mlp=40), grow(snr_db=noise))
    with pytest.raises(GrowthError, match=r"^dtype: model\.\S+: .* is too large for F16; BF16 or F32 would be right"):
        grow_checkpoint(source, tmp_path / "child", made, seed=0, dtype="F16", verify=False)
    # Both double a matrix: one that is copied in the bits it is stored in, and one that has random entries too.
    for name, to, width in (("embed_tokens", {"d_model": 48}, "pad"), (r"\S+\.q_proj", {"d_head": 16}, "duplicate")):
        made = planned(source, child("llama", **to), grow(width, snr_db=noise))
        with pytest.raises(GrowthError, match=rf"^dtype: model\.{name}\.weight: .* too large for F32$"):
            grow_checkpoint(source, tmp_path / "child", made, seed=0, verify=False, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_what_is_not_a_number_stays_so_and_nothing_becomes_infinite() -> None:
    import torch

    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.3e38, 1e-40, -0.0])
    payload = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    for values in (odd, payload):
        ours = narrow(values, "BF16").view(np.int16)
        theirs = torch.from_numpy(values).float().bfloat16()
        assert torch.equal(torch.from_numpy(ours).view(torch.bfloat16).isnan(), theirs.isnan())
        kept = ~np.isnan(values)
        np.testing.assert_array_equal(ours[kept], theirs.view(torch.int16).numpy()[kept])
    for dtype, value in {"F16": 65520.0, "BF16": 3.4e38, "F32": 3.5e38}.items():
        with pytest.raises(OverflowError, match=f"is too large for {dtype}"):
            narrow(np.array([1.0, -value]), dtype)


# Nothing half-made


def test_a_report_that_raises_stops_the_growth_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    made = planned(llama, child("llama", d_mlp=40), grow())
    for last in ("writing", "verifying"):

        def stop(done: int, total: int, what: str, last: str = last) -> None:
            if what == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            grow_checkpoint(llama, tmp_path / "child", made, seed=0, progress=stop)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def files_end_at() -> Iterator[Any]:
    """A limit on the size of this process's files: writing beyond it fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_half_way_leaves_nothing(llama: Path, tmp_path: Path, files_end_at: Any) -> None:
    made = planned(llama, child("llama", d_mlp=40), grow())
    files_end_at(20_000)
    with pytest.raises(OSError, match="File too large"):
        grow_checkpoint(llama, tmp_path / "child", made, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_has_no_room_for_is_not_begun(llama: Path, tmp_path: Path) -> None:
    made = planned(llama, child("llama", d_mlp=1_000_000, n_layers=2000), grow(snr_db=None, depth="stack"))
    with pytest.raises(OSError, match=r"GB will be written, and .* GB are free"):
        grow_checkpoint(llama, tmp_path / "child", made, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_leaves_nothing_and_the_next_growth_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    small = Shape(d_model=512, n_heads=8, d_head=64, d_mlp=2048, n_layers=4)
    source = made_up(tmp_path / "parent", "llama", small)
    command = [sys.executable, "-m", "trainer", "grow", str(source), "--shape", "d_model=2x,d_mlp=2x", "--json"]
    place = tmp_path / "grown"

    def ended_by(number: int) -> tuple[int, list[dict[str, Any]]]:
        with subprocess.Popen(
            [*command, "--out", str(place / "child")], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = [json.loads(process.stdout.readline())]
            process.send_signal(number)
            said += [json.loads(line) for line in process.stdout]
            return process.wait(timeout=60), said

    code, said = ended_by(signal.SIGKILL)
    assert (code, {report["kind"] for report in said}) == (-signal.SIGKILL, {"progress"})
    left = [path.name for path in place.iterdir()]
    assert [name.partition("unfinished")[0] for name in left] == [".child."]
    code, said = ended_by(signal.SIGTERM)
    assert code == 1
    assert said[-1] == {"kind": "failed", "message": "Stopped; nothing was kept.", "field": None, "value": None}
    assert list(place.iterdir()) == []
