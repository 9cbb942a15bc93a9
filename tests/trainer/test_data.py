from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.hub import hub
from tests.trainer.texts import CORPORA, write_modules
from trainer.data import SPLITS, Prepared, _check_from_hub, assign, pieces_of, prepare, text_column
from trainer.endings import DataError
from trainer.spec import DataSpec


def data(source: object, **fields: Any) -> DataSpec:
    return DataSpec.model_validate(
        {"source": str(source), "tokenizer": {"kind": "bpe", "d_vocab": 320}, "validation_fraction": 0.1} | fields
    )


def documents(prepared: Prepared, split: Any) -> list[str]:
    """The documents of a split, read back from its tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json"))
    ids = prepared.split(split).array().astype(int)
    assert ids[-1] == prepared.end_of_text
    cuts = np.flatnonzero(ids == prepared.end_of_text)
    return [tokenizer.decode(part[part != prepared.end_of_text].tolist()) for part in np.split(ids, cuts + 1)[:-1]]


def test_every_document_falls_whole_into_one_split_and_can_be_read_back(text: Path, cache: Path) -> None:
    prepared = prepare(data(text), cache)
    found = [document for split in SPLITS for document in documents(prepared, split)]
    assert sorted(found) == sorted(f.read_text() for f in text.iterdir())
    for split in SPLITS:
        tokens = prepared.split(split)
        held = documents(prepared, split)
        assert tokens.n_documents == len(held) > 0
        assert tokens.n_bytes == sum(len(document.encode()) for document in held)
        assert tokens.bytes_per_token == tokens.n_bytes / len(tokens.array())


def test_the_tokenizer_has_seen_the_training_split_alone(text: Path, cache: Path) -> None:
    from trainer.data import _train_tokenizer

    prepared = prepare(data(text), cache)
    alone, _, _ = _train_tokenizer(documents(prepared, "train"), 320)
    everything, _, _ = _train_tokenizer([f.read_text() for f in sorted(text.iterdir())], 320)
    held = json.loads((prepared.tokenizer / "tokenizer.json").read_text())
    assert held["model"] == json.loads(alone.to_str())["model"]
    assert held["model"] != json.loads(everything.to_str())["model"]


def test_the_tokenizer_folder_loads_in_transformers(text: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    prepared = prepare(data(text), cache)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    assert len(tokenizer) == prepared.d_vocab == 320
    assert tokenizer.eos_token_id == prepared.end_of_text
    assert tokenizer.decode(tokenizer("def  f(x):\n\treturn 'é'").input_ids) == "def  f(x):\n\treturn 'é'"


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=60),
    fractions=st.tuples(st.floats(0.001, 0.49), st.floats(0.001, 0.49)),
)
def test_no_split_is_ever_empty(sizes: list[int], fractions: tuple[float, float]) -> None:
    rng = np.random.default_rng(len(sizes))
    keys = rng.choice(2**60, len(sizes), replace=False).astype(np.uint64)
    spec = data("./x", validation_fraction=fractions[0], test_fraction=fractions[1])
    splits = assign(keys, np.array(sizes, np.uint64), spec)
    assert set(splits.tolist()) == {0, 1, 2}
    order = rng.permutation(len(sizes))
    assert (assign(keys[order], np.array(sizes, np.uint64)[order], spec) == splits[order]).all()


def test_splits_take_about_their_share_and_equal_documents_stay_together() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, 1000).astype(np.uint64)
    keys[500:600] = keys[400:500]
    sizes = np.full(1000, 100, np.uint64)
    splits = assign(keys, sizes, data("./x", validation_fraction=0.1, test_fraction=0.2))
    assert Counter(splits.tolist()) == pytest.approx({0: 700, 1: 100, 2: 200}, abs=5)
    assert (splits[500:600] == splits[400:500]).all()


def test_a_long_document_is_not_made_the_test_set_while_there_are_others() -> None:
    keys = np.arange(100, dtype=np.uint64)
    sizes = np.full(100, 1000, np.uint64)
    sizes[0] = 60_000  # the smallest hash would be taken first
    assert assign(keys, sizes, data("./x"))[0] == SPLITS.index("train")


def test_a_single_document_is_cut_into_pieces_and_the_run_says_so(tmp_path: Path, text: Path) -> None:
    whole = "".join(f.read_text() for f in sorted(text.iterdir()))
    (tmp_path / "one.txt").write_text(whole)
    prepared = prepare(data(tmp_path / "one.txt"), tmp_path / "cache")
    assert "one document" in prepared.notes[0]
    pieces = [piece for split in SPLITS for piece in documents(prepared, split)]
    assert sum(map(len, pieces)) == len(whole)
    assert all(piece.endswith("\n") for piece in pieces)
    assert prepared.validation.n_bytes == pytest.approx(0.1 * len(whole), rel=0.15)


@given(st.text(max_size=300), st.integers(1, 40))
def test_pieces_join_to_the_whole(text: str, size: int) -> None:
    pieces = list(pieces_of(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line, and that is all")
    with pytest.raises(DataError, match=r"a\.txt is too short \(25 bytes of text\)"):
        prepare(data(tmp_path / "a.txt"), tmp_path / "cache")
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match="holds no text"):
        prepare(data(tmp_path / "a.txt"), tmp_path / "cache")


def test_a_small_vocabulary_is_said_where_the_text_gives_no_more(tmp_path: Path, text: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(5000)))
    prepared = prepare(data(tmp_path / "a.txt", tokenizer={"kind": "bpe", "d_vocab": 50_000}), tmp_path / "cache")
    assert any("not the 50,000 asked for" in note for note in prepared.notes)


def test_text_that_spells_the_end_of_text_token_is_text(tmp_path: Path) -> None:
    folder = write_modules(tmp_path / "text")
    sneaky = "before <|endoftext|> after\n" * 50
    for i in range(3):
        (folder / f"sneaky{i}.txt").write_text(sneaky + str(i))
    prepared = prepare(data(folder), tmp_path / "cache")
    ends = sum(int((prepared.split(s).array() == prepared.end_of_text).sum()) for s in SPLITS)
    assert ends == sum(prepared.split(s).n_documents for s in SPLITS) == len(list(folder.iterdir()))


# --- The cache --------------------------------------------------------------------------------------------------------


def test_the_second_time_needs_neither_datasets_nor_tokenizers(text: Path, cache: Path) -> None:
    prepare(data(text), cache)
    code = (
        "import sys; from pathlib import Path; from trainer.data import prepare; from trainer.spec import DataSpec\n"
        f"prepare(DataSpec.model_validate_json({data(text).model_dump_json()!r}), Path({str(cache)!r}), print)\n"
        "print(sorted({'datasets', 'tokenizers', 'transformers', 'torch', 'pyarrow'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"  # and nothing was reported: nothing was done


def test_a_changed_file_is_seen_even_at_the_same_size_and_time(tmp_path: Path) -> None:
    folder = write_modules(tmp_path / "text")
    first = prepare(data(folder), tmp_path / "cache")
    file = folder / "heapq.txt"
    before = file.stat()
    file.write_text(file.read_text().replace("heap", "peah"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = prepare(data(folder), tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert any("peah" in document for split in SPLITS for document in documents(second, split))


def test_what_a_killed_process_left_long_ago_is_cleared_away(tmp_path: Path, text: Path) -> None:
    old, young = tmp_path / ".building-a-1", tmp_path / ".building-b-2"
    for folder in (old, young):
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"half")
    os.utime(old, (0, 0))
    prepare(data(text), tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_the_same_text_elsewhere_has_the_same_fingerprint(tmp_path: Path, text: Path, cache: Path) -> None:
    said: list[str] = []
    first = prepare(data(text), cache)
    moved = shutil.copytree(text, tmp_path / "elsewhere")
    second = prepare(data(moved), cache, lambda what, done, total: said.append(what))
    assert second == first
    assert not any("tokeniz" in what for what in said)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": {"kind": "bpe", "d_vocab": 330}}, {"test_fraction": 0.2}, {"validation_fraction": 0.2}],
)
def test_another_tokenizer_or_split_is_another_fingerprint(text: Path, cache: Path, change: dict[str, Any]) -> None:
    assert prepare(data(text, **change), cache).fingerprint != prepare(data(text), cache).fingerprint


def test_what_a_crash_left_half_is_made_again(tmp_path: Path, text: Path) -> None:
    first = prepare(data(text), tmp_path)
    size = first.train.path.stat().st_size
    os.truncate(first.train.path, size // 2)
    assert prepare(data(text), tmp_path).train.path.stat().st_size == size


PREPARE = """
import sys
from pathlib import Path
from trainer.data import prepare
from trainer.spec import DataSpec
done = prepare(DataSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2]), lambda *r: print(*r, flush=True))
print(done.fingerprint)
"""


def test_two_processes_that_prepare_the_same_text_at_once_both_get_it(tmp_path: Path, text: Path) -> None:
    arguments = [sys.executable, "-c", PREPARE, data(text).model_dump_json(), str(tmp_path)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert len({lines[-1] for lines in said}) == 1
    trained = [lines for lines in said if any("training the tokenizer" in line for line in lines)]
    assert len(trained) == 1  # one worked, the others waited or came after
    assert {path.name for path in tmp_path.iterdir()} == {"index", said[0][-1]}


def test_a_process_killed_while_it_prepares_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):  # enough that tokenizing takes a while
        (folder / f"{i}.txt").write_text("".join(f"{i * j * j} word {j % 97}\n" for j in range(20_000)))
    arguments = [sys.executable, "-c", PREPARE, data(folder).model_dump_json(), str(tmp_path / "cache")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("training the tokenizer"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    said: list[str] = []
    prepared = prepare(data(folder), tmp_path / "cache", lambda what, done, total: said.append(what))
    assert not any("waiting" in what for what in said)  # the dead one's lock is not in the way
    assert sum(prepared.split(s).n_documents for s in SPLITS) == 12


# --- Sources ----------------------------------------------------------------------------------------------------------

ROWS = [{"id": i, "title": f"row {i}", "body_text": f"The text of row {i}.\n" * 20} for i in range(40)]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_are_read_by_their_text_column(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"table{suffix}", ROWS)
    cache = tmp_path / "cache"
    named = prepare(data(path, text_column="body_text"), cache)
    found = sorted(document for split in SPLITS for document in documents(named, split))
    assert found == sorted(row["body_text"] for row in ROWS)

    with pytest.raises(
        DataError, match=r"has no column 'text'; it has id \(int.*\), title \(string\), body_text \(string\)"
    ):
        prepare(data(path, text_column="text"), cache)
    with pytest.raises(DataError, match=r"column 'id' of .* is int.*, not text"):
        prepare(data(path, text_column="id"), cache)
    with pytest.raises(DataError, match=r"Which column of .* is the text\?.*name one as text_column"):
        prepare(data(path), cache)


def test_a_table_without_text_says_so() -> None:
    with pytest.raises(DataError, match=r"^x has no column of text; it has id \(int64\)\.$"):
        text_column("x", {"id": "int64"}, None)


def test_the_text_column_is_found_by_its_usual_name_or_as_the_only_text() -> None:
    assert text_column("x", {"url": "string", "text": "string"}, None) == "text"
    assert text_column("x", {"id": "int64", "verse": "large_string"}, None) == "verse"


@pytest.mark.parametrize(
    ("name", "content"),
    [("bad.jsonl", '{"text": "a"\n{"te'), ("bad.parquet", "this is no parquet"), ("bad.csv", 'text\n"a\n')],
)
def test_a_broken_table_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read as {name[4:]}: \w+"):
        prepare(data(tmp_path / name), tmp_path / "cache")


def test_a_folder_may_mix_files_and_hides_what_is_hidden(tmp_path: Path) -> None:
    folder = write_modules(tmp_path / "text")
    write_table(folder / "rows.jsonl", [{"text": row["body_text"]} for row in ROWS])
    (folder / ".hidden.txt").write_text("not this")
    (folder / "image.png").write_bytes(b"\x89PNG")
    prepared = prepare(data(folder), tmp_path / "cache")
    assert sum(prepared.split(s).n_documents for s in SPLITS) == len(ROWS) + 24


def test_sources_that_are_not_there_or_not_text_are_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "text.doc").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, message in {
        "missing.txt": "There is no file or folder .*missing.txt",
        "picture.txt": "picture.txt is not text in UTF-8",
        "text.doc": r"ends in \.doc; what can be read ends in \.txt",
        "empty": "holds no file that ends in",
    }.items():
        with pytest.raises(DataError, match=message):
            prepare(data(tmp_path / source), cache)


def test_a_hub_that_cannot_be_reached_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The dataset 'no/such' \(config 'raw'\) cannot be loaded from the Hub: "):
        prepare(data("no/such", config="raw"), tmp_path)


def from_hub(tmp_path: Path, files: dict[str, bytes], **environment: str) -> tuple[str, set[str]]:
    """What a process says that prepares these files of a dataset on the Hub, and those that it fetched."""
    code = """if True:
        import sys
        from pathlib import Path
        from trainer.data import prepare
        from trainer.endings import DataError
        from trainer.spec import DataSpec
        try:
            print(prepare(DataSpec(source="some/one"), Path(sys.argv[1])).train.n_documents)
        except DataError as error:
            print(error)
    """
    fetched: set[str] = set()
    with hub(files, fetched) as address:
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | environment
        command = [sys.executable, "-c", code, str(tmp_path / "cache")]
        said = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True).stdout
    return said.strip(), fetched


LINES = {"lines.txt": "".join(f"line {i} of it\n" for i in range(300)).encode()}


def test_a_dataset_of_the_hub_is_fetched_and_split(tmp_path: Path) -> None:
    said, fetched = from_hub(tmp_path, LINES)
    assert 200 < int(said) < 300
    assert "lines.txt" in fetched


def test_a_dataset_of_the_hub_that_is_larger_than_allowed_is_not_even_fetched(tmp_path: Path) -> None:
    said, fetched = from_hub(tmp_path, LINES, KANGAROO_MAX_TEXT_GB="1e-6")
    assert said == "some/one has more than 1e-06 GB of text, the most that may be trained on here."
    assert "lines.txt" not in fetched


@pytest.mark.parametrize("target", ["{folder}/secret.txt", "file://{folder}/secret.txt", "http://127.0.0.1:1/x.txt"])
def test_the_card_of_a_hub_dataset_cannot_lead_to_this_machine(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret.txt").write_text("a secret\n" * 100)
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {target.format(folder=tmp_path)}\n---\n"
    said, _ = from_hub(tmp_path, LINES | {"README.md": card.encode()})
    assert re.search(r"cannot be loaded from the Hub|which is not on the Hub", said)


def test_a_small_parquet_file_with_more_text_than_allowed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["the same again " * 1000] * 5000}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    monkeypatch.setenv("KANGAROO_MAX_TEXT_GB", "0.01")
    with pytest.raises(DataError, match=r"bomb.parquet has more than 0.01 GB of text"):
        prepare(data(tmp_path / "bomb.parquet"), tmp_path / "cache")
    monkeypatch.setenv("KANGAROO_MAX_TEXT_GB", "0.1")
    with pytest.raises(DataError, match="too short"):  # all of it is one text
        prepare(data(tmp_path / "bomb.parquet"), tmp_path / "cache")


@pytest.mark.parametrize("name", ["text", "pandas", "mine", "some/one"])
def test_the_name_of_a_hub_dataset_never_reads_what_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path("mine"), Path("some/one")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "secret.txt").write_text("".join(f"a secret {i}\n\n" for i in range(100)))
    with pytest.raises(DataError, match=r"cannot be loaded from the Hub|which is not on the Hub|of the kind pandas"):
        prepare(data(name), tmp_path / "cache")


def test_a_hub_dataset_cannot_lead_to_files_of_this_machine_or_to_other_addresses(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "secret.txt").write_text("a secret")
    builder = datasets.load_dataset_builder("text", data_files=str(tmp_path / "secret.txt"))
    with pytest.raises(DataError, match=r"leads to .*secret.txt, which is not on the Hub"):
        _check_from_hub(builder, "'some/one'")
    for file in ("http://169.254.169.254/latest", "zip://a.txt::/etc/a.zip", "hf://datasets/a/b/c::file:///etc/passwd"):
        builder.config.data_files = {"train": [file]}
        with pytest.raises(DataError, match="which is not on the Hub"):
            _check_from_hub(builder, "'some/one'")
    builder.config.data_files = {"train": ["hf://datasets/a/b@main/c.txt", "zip://c.txt::hf://datasets/a/b@main/c.zip"]}
    _check_from_hub(builder, "'some/one'")


def test_a_folder_does_not_stand_in_for_a_tokenizer_on_the_hub(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word_tokenizer(tmp_path / "mine", 500, eos_token="[end]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'mine' cannot be loaded: there is a file or folder .*write ./mine for it"):
        prepare(data(text, tokenizer={"kind": "pretrained", "name": "mine"}), tmp_path / "cache")
    assert prepare(data(text, tokenizer={"kind": "pretrained", "name": "./mine"}), tmp_path / "cache").d_vocab > 500


def test_the_standard_library_is_there_without_its_tests() -> None:
    from trainer.data import source_files

    files = source_files(DataSpec())
    names = {file.name for file in files}
    assert {"argparse.py", "heapq.py"} <= names
    assert not any({"test", "site-packages"} & set(file.parts) for file in files)


# --- Pretrained tokenizers --------------------------------------------------------------------------------------------


def word_tokenizer(folder: Path, n_words: int, **config: Any) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[unk]": 0, "[end]": 1} | {f"w{i}": i + 2 for i in range(n_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return folder


def test_a_pretrained_tokenizer_is_used_as_it_is_and_needs_four_bytes_when_it_is_large(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tokenizer", 70_000, eos_token="[end]")
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"w69999 w{i} nothing")
    spec = data(tmp_path, tokenizer={"kind": "pretrained", "name": str(tokenizer)})
    prepared = prepare(spec, tmp_path / "cache")
    assert prepared.d_vocab == 70_002
    assert prepared.train.dtype == "uint32"
    assert prepared.train.array()[0] == 70_001
    assert prepared.end_of_text == 1
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(prepared.tokenizer)("w5").input_ids == [7]


def test_tokenizers_that_cannot_serve_are_named(tmp_path: Path, text: Path) -> None:
    endless = word_tokenizer(tmp_path / "endless", 10)
    for name, message in {str(endless): "has no end-of-text token", "no/such": "'no/such' cannot be loaded"}.items():
        with pytest.raises(DataError, match=message):
            prepare(data(text, tokenizer={"kind": "pretrained", "name": name}), tmp_path / "cache")


@pytest.mark.corpora
@pytest.mark.skipif(not CORPORA.exists(), reason=f"no corpora at {CORPORA}")
def test_books_are_split_by_book(tmp_path: Path) -> None:
    books = sorted((CORPORA / "classic-books").glob("*.md"), key=lambda f: f.stat().st_size)[1:14]
    for book in books:
        (tmp_path / book.name).symlink_to(book)
    prepared = prepare(data(tmp_path, test_fraction=0.1), tmp_path / "cache")
    assert prepared.notes == ()
    assert sum(prepared.split(s).n_documents for s in SPLITS) == len(books)
    total = sum(prepared.split(s).n_bytes for s in SPLITS)
    assert 0.05 < prepared.test.n_bytes / total < 0.2
