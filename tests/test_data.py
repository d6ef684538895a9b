"""data/common.py: batches are pure functions of the seed, windows cover a split, a damaged data set is refused."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import CONTENT, OWN, change, prepared

from data.common import DataError, Dataset, Vocabulary, find_dataset, window_starts
from support.files import ROOT


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return prepared(tmp_path / "toy")


@pytest.fixture(scope="module")
def toy_dataset(tmp_path_factory) -> Dataset:
    return Dataset.open(prepared(tmp_path_factory.mktemp("toy")))


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_text_survives_encoding_and_decoding(unit):
    text = "héllo €uro 🙂\n"
    symbols = sorted(set(text)) if unit == "character" else sorted(set(text.encode()))
    vocabulary = Vocabulary(unit, tuple(symbols))
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int64 and vocabulary.decode(ids) == text
    assert vocabulary.decode(ids.tolist()) == vocabulary.decode(torch.from_numpy(ids)) == text
    assert vocabulary.encode("").shape == (0,) and vocabulary.decode([]) == ""
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_the_streaming_decoder_gives_whole_characters_and_loses_none(unit):
    text = "aé€🙂z"
    vocabulary = Vocabulary(unit, tuple(sorted(set(text)) if unit == "character" else sorted(set(text.encode()))))
    decode = vocabulary.decoder()
    pieces = [decode([i]) for i in vocabulary.encode(text)]
    assert "".join(pieces) + decode([], final=True) == text and all("\ufffd" not in piece for piece in pieces)


def test_the_streaming_decoder_ends_an_unfinished_character():
    decode = Vocabulary("byte", tuple(range(256))).decoder()
    assert decode([0xE2, 0x82]) == "" and decode([], final=True) == "\ufffd"


def test_unknown_symbols_are_listed_with_their_positions():
    vocabulary = Vocabulary("character", ("\n", "a", "b"))
    with pytest.raises(DataError, match=r"'é' at 1, 'Z' at 2; it has 3 characters: '\\nab'"):
        vocabulary.encode("aéZéb")
    with pytest.raises(DataError, match=r"'L' at 11, and|'H' at 7 and 2 more"):
        vocabulary.encode("ABCDEFGHIJ")
    with pytest.raises(DataError, match=r"b'\\xc3' at 1, b'\\xa9' at 2"):
        Vocabulary("byte", (97, 98)).encode("aé")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"unit": "word", "vocabulary": ["a"], "vocab_size": 1},
        {"unit": "byte", "vocabulary": [256], "vocab_size": 1},
        {"unit": "byte", "vocabulary": [False, True], "vocab_size": 2},
        {"unit": "byte", "vocabulary": ["a"], "vocab_size": 1},
        {"unit": "character", "vocabulary": ["ab"], "vocab_size": 1},
        {"unit": "character", "vocabulary": ["b", "a"], "vocab_size": 2},
        {"unit": "character", "vocabulary": ["a", "a"], "vocab_size": 2},
        {"unit": "character", "vocabulary": [], "vocab_size": 0},
        {"unit": "character", "vocabulary": "ab", "vocab_size": 2},
        {"unit": "character", "vocabulary": ["a"], "vocab_size": 2},
        {"unit": "character", "vocabulary": ["a"], "vocab_size": True},
        {"unit": "character", "vocabulary": ["\ud800"], "vocab_size": 1},
    ],
)
def test_a_nonsense_vocabulary_is_refused(values):
    with pytest.raises(DataError, match="vocabulary"):
        Vocabulary.from_dict(values)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and windows


def test_a_batch_depends_on_its_arguments_alone_and_leaves_global_random_state_alone(toy_dataset):
    first = toy_dataset.batch("train", 1, 5, 8, 16)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    toy_dataset.batch("val", 9, 9, 3, 4)
    again = toy_dataset.batch("train", 1, 5, 8, 16)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (("train", 2, 5, 8, 16), ("train", 1, 6, 8, 16), ("val", 1, 5, 8, 16)):
        assert not torch.equal(first[0], toy_dataset.batch(*other)[0])


def test_batch_rows_do_not_depend_on_the_batch_size(toy_dataset):
    large, small = toy_dataset.batch("train", 3, 0, 12, 10), toy_dataset.batch("train", 3, 0, 5, 10)
    assert torch.equal(large[0][:5], small[0]) and torch.equal(large[1][:5], small[1])


def test_window_starts_are_those_of_past_runs():
    """If this fails, seeds mean something else than in committed records: mend the code, not the numbers."""
    assert window_starts("train", 1337, 0, 4, 1_003_598).tolist() == [720011, 940031, 187240, 776619]
    assert window_starts("train", 1337, 0, 4, 1_003_598).dtype == np.int64


def test_batch_targets_are_the_next_tokens_and_every_start_can_be_drawn(tmp_path):
    content = bytes(range(65, 65 + 20))
    data = Dataset.open(prepared(tmp_path, content, OWN))  # 18 training tokens, all different
    x, y = data.batch("train", 0, 0, 500, 16)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (500, 16)
    assert torch.equal(y, x + 1) and set(x[:, 0].tolist()) == {0, 1}
    x, y = data.batch("train", 0, 0, 3, 17)
    assert torch.equal(x[0], torch.arange(17)) and torch.equal(y[0], torch.arange(1, 18))
    with pytest.raises(DataError, match="too few for block_size 18"):
        data.batch("train", 0, 0, 3, 18)
    with pytest.raises(DataError, match="no 'test' split; it has train, val"):
        data.batch("test", 0, 0, 1, 1)


@pytest.mark.parametrize("block_size, batch_size", [(1, 1), (7, 3), (64, 5), (5000, 2), (6000, 1), (4999, 1)])
def test_windows_predict_each_symbol_once_in_constant_shapes(toy_dataset, block_size, batch_size):
    tokens = toy_dataset.vocabulary.encode(CONTENT[90_000:95_000].decode())
    batches = list(toy_dataset.windows("val", block_size, batch_size))
    assert {tuple(t.shape) for batch in batches for t in batch} == {(batch_size, block_size)}
    x, y = (torch.cat([batch[i] for batch in batches]).flatten() for i in (0, 1))
    assert y[y >= 0].tolist() == tokens[1:].tolist() and x[y >= 0].tolist() == tokens[:-1].tolist()
    assert (y[len(tokens) - 1 :] == -1).all() and (x[len(tokens) - 1 :] == 0).all()
    assert len(batches) == -(-(len(tokens) - 1) // (block_size * batch_size))


@pytest.mark.parametrize(
    "unit, content",
    [("character", CONTENT), ("character", "".join(map(chr, range(200, 900))).encode() * 3), ("byte", CONTENT)],
)
def test_resident_and_mapped_tokens_give_the_same_batches(tmp_path, unit, content):
    folder = prepared(tmp_path, content, replace(OWN, unit=unit))
    resident, mapped = Dataset.open(folder, resident=True), Dataset.open(folder, resident=False)
    assert resident.resident and not mapped.resident and Dataset.open(folder).resident
    for a, b in [(resident.batch("train", 0, 1, 4, 9), mapped.batch("train", 0, 1, 4, 9))] + list(
        zip(resident.windows("val", 9, 4), mapped.windows("val", 9, 4))
    ):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].dtype == b[0].dtype == torch.int64


@pytest.mark.cuda
@pytest.mark.parametrize("resident", [True, False])
def test_batches_on_cuda_are_those_on_the_cpu_and_wait_for_nothing(toy, resident):
    data = Dataset.open(toy, "cuda", resident)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, y = data.batch("train", 0, 0, 8, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Dataset.open(toy).batch("train", 0, 0, 8, 32)
    assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])
    for a, b in zip(data.windows("val", 64, 5), Dataset.open(toy).windows("val", 64, 5)):
        assert torch.equal(a[0].cpu(), b[0]) and torch.equal(a[1].cpu(), b[1])


def test_train_on_first_draws_only_from_the_first_tokens(words):
    whole = Dataset.open(words)
    head = whole.train_on_first(100)
    text = head._tokens["train"]
    assert head.sizes == {**whole.sizes, "train": 100} and head.describe()["splits"]["train"] == 100
    assert torch.equal(text, whole._tokens["train"][:100])
    x, y = head.batch("train", 0, 0, 500, 90)
    assert {tuple(row.tolist()) for row in x} <= {tuple(text[i : i + 90].tolist()) for i in range(10)}
    assert torch.equal(head.batch("val", 0, 0, 4, 16)[0], whole.batch("val", 0, 0, 4, 16)[0])
    assert whole.train_on_first(0) is whole
    with pytest.raises(DataError, match="fewer than train_characters=1,000,000"):
        whole.train_on_first(10**6)


# ---------------------------------------------------------------------------------------------------------------------
# Opening a prepared folder


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "damage, problem",
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(b""), "cut short or too long: 0 bytes, meta.json expects 10,000"),
        (shorten, "cut short or too long: 9,998 bytes, meta.json expects 10,000"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "cut short or too long: 20,000 bytes"),
        (change, "its SHA-256 is .* meta.json expects .*: changed, or of another data set"),
    ],
)
def test_a_damaged_bin_is_refused(toy, damage, problem):
    damage(toy / "val.bin")
    with pytest.raises(DataError, match=f"val.bin: {problem}.*again with python .*prepare.py"):
        Dataset.open(toy)


def edit_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_ids_beyond_the_vocabulary_are_refused(toy):
    tokens = np.fromfile(toy / "val.bin", "<u2")
    tokens[-1] = 26
    tokens.tofile(toy / "val.bin")
    splits = json.loads((toy / "meta.json").read_text())["splits"]
    splits["val"]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    edit_meta(toy, splits=splits)
    with pytest.raises(DataError, match=r"val.bin: holds id 26, the vocabulary has 26 symbols \(0 to 25\)"):
        Dataset.open(toy)


def test_another_vocabulary_of_the_same_size_is_refused(toy):
    """Bins know ids alone: with one symbol changed for another, all of the text would be another."""
    edit_meta(toy, vocabulary=[chr(97 + i) for i in range(25)] + ["~"])
    with pytest.raises(DataError, match="its vocabulary and the bins make a text with SHA-256"):
        Dataset.open(toy)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"canonical": 1}, "canonical is 1; expected true or false"),
        ({"name": ""}, "name is ''; expected a line of text"),
        ({"unit": "word"}, "unit is 'word'"),
        ({"vocabulary": []}, "vocabulary"),
        ({"vocab_size": 27}, "vocab_size is 27"),
        ({"source": {"bytes": 100_000}}, "missing field 'sha256' in source"),
        ({"source": {"bytes": 5, "sha256": "0" * 64}}, "its source has 000"),
        ({"splits": {"train": {"tokens": 1, "sha256": "0" * 64}}}, "missing field 'val' in splits"),
        ({"splits": {"train": 5, "val": 5}}, "splits.train is 5"),
        ({"splits": {"train": {"tokens": -2, "sha256": "0" * 64}, "val": {}}}, "tokens is -2"),
    ],
)
def test_a_nonsense_meta_is_refused(toy, changes, problem):
    edit_meta(toy, **changes)
    with pytest.raises(DataError, match=f"meta.json: .*{problem}.*again with python"):
        Dataset.open(toy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_meta_that_is_not_json_is_refused(toy, content):
    (toy / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match="meta.json: .*; make it again with python"):
        Dataset.open(toy)


def test_an_unprepared_folder_is_refused_with_the_command_that_prepares_it(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="not prepared yet"):
        Dataset.open(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        DataError, match="nanoGPT's meta.pkl but no meta.json .pickles are never opened here.; run python"
    ):
        Dataset.open(tmp_path)


def test_data_sets_are_found_by_name_or_path_with_a_hint_for_a_misspelt_one(tmp_path):
    names = ("shakespeare_char", "enwik8", "text8")
    assert [find_dataset(name) for name in names] == [ROOT / "data" / name for name in names]
    assert find_dataset(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="did you mean shakespeare_char"):
        find_dataset("shakespere_char")
    for wrong in ("..", "", "__pycache__", "openwebtext"):
        with pytest.raises(DataError, match="unknown under"):
            find_dataset(wrong)
    with pytest.raises(DataError, match="no such folder"):
        find_dataset(str(tmp_path / "nothing"))


def test_what_is_here_but_no_data_set_of_this_name_is_told_with_the_right_words(toy, tmp_path, monkeypatch):
    """A folder without its ./, a text that is not prepared, and a file of a prepared folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_bytes(CONTENT)
    with pytest.raises(DataError, match="dataset 'toy': unknown under .*; the folder that is here is --dataset=./toy$"):
        find_dataset("toy")
    for name in ("my text.txt", "./my text.txt", str(tmp_path / "my text.txt")):
        with pytest.raises(
            DataError, match="a file; prepare it: python .*prepare.py '.*my text.txt' '--name=my text' and"
        ):
            find_dataset(name)
    for name in ("./toy/train.bin", "toy/meta.json"):
        with pytest.raises(DataError, match="a file; the data set is its folder: --dataset=toy/$"):
            find_dataset(name)
