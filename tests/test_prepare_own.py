"""data/prepare.py: a text of one's own becomes a data set of its own name, and every printed command runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import english
from toy import files

from data.common import DataError, Dataset, meta_of, prepare_command
from data.names import is_kept
from data.prepare import main
from run.dataset import open_dataset
from run.records import claims_published, is_comparable
from support.files import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Your own text")[2]
TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --max_iters=2 --warmup_iters=1".split()
TINY += "--eval_interval=1 --log_interval=1 --eval_iters=1 --device=cpu --inference_samples=0".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare(content, *options) -> what the script prints; the text is my.txt, the data set tmp_path/mine."""
    monkeypatch.chdir(tmp_path)

    def run(content, *options):
        (tmp_path / "my.txt").write_bytes(content)
        main(["my.txt", "--name=./mine", *options], print)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(prepare, capsys):
    """refused(content, *options) -> the message with which the script ends."""

    def run(content, *options):
        with pytest.raises(SystemExit) as caught:
            prepare(content, *options)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return run


def run(command, folder):
    """Run a printed command in a folder; returns what it prints."""
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_commands_of_the_page_and_of_the_screen_run_as_printed_from_another_folder(tmp_path):
    """Prepare, train, break, repair and train again, in a copy of the project."""
    left_out = shutil.ignore_patterns(".*", "results", "tests", "out", "docs", "*.bin", "meta.json", "__pycache__")
    project, here = tmp_path / "it's a project", tmp_path / "here"
    shutil.copytree(ROOT, project, ignore=left_out)
    here.mkdir()
    (here / "my.txt").write_text(english(300, seed=1))
    first, second = re.search(r"```sh\n(.*)\n(.*)\n```", PAGE).groups()
    from_here = re.sub(r"\b(data/prepare|train|config/\w+)\.py", rf'"{project}/\g<0>"', first)
    code, told = run(from_here, here)
    assert code == 0 and told.startswith("read my.txt\nmine (your own text)\n"), told
    train = re.search("train on it: (.*)", told)[1]
    assert [os.path.basename(word) for word in shlex.split(train)] == [os.path.basename(w) for w in shlex.split(second)]
    train = shlex.join([*shlex.split(train), *TINY])
    code, told = run(train, here)
    assert code == 0 and "mine, seed 1337" in told and "†" not in told and "not the published" not in told, told
    record = json.loads(next(here.rglob("summary.json")).read_text())
    assert (record["dataset"]["name"], record["dataset"]["canonical"]) == ("mine", False)
    assert is_comparable(record) and not claims_published(record)

    before = files(project / "data" / "mine")
    (project / "data" / "mine" / "val.bin").unlink()
    code, told = run(f"{train} --out_dir=again", here)
    assert code == 2, told
    code, again = run(re.search("make it again with (.*)", told)[1], here)
    assert code == 0 and files(project / "data" / "mine") == before, again


def test_unit_splits_and_name_are_as_asked(prepare, tmp_path):
    prepare("é".encode() * 100)
    data = Dataset.open(tmp_path / "mine")
    assert (data.name, data.canonical, data.unit, data.sizes) == ("mine", False, "character", {"train": 90, "val": 10})
    told = prepare("é".encode() * 100, "--unit=byte", "--splits=80,15,5")
    data = Dataset.open(tmp_path / "mine")
    assert (data.unit, data.sizes) == ("byte", {"train": 160, "val": 30, "test": 10})
    assert "this replaces" not in told
    assert "this replaces the text in " in prepare(b"another one " * 9)


def test_a_byte_order_mark_is_no_character_but_bytes_like_others(prepare, tmp_path):
    text = "Ein Müller. " * 20
    assert "byte-order mark" not in prepare(text.encode())
    plain = files(tmp_path / "mine")
    assert "its byte-order mark is left out" in prepare(text.encode("utf-8-sig"))
    assert files(tmp_path / "mine") == plain, "one text, one identity"
    prepare(("\ufeff" + text).encode("utf-8-sig"))
    assert "\ufeff" in Dataset.open(tmp_path / "mine").vocabulary.symbols, "a second one is of the text"
    assert "byte-order mark" not in prepare(text.encode("utf-8-sig"), "--unit=byte")
    assert 0xEF in Dataset.open(tmp_path / "mine").vocabulary.symbols


def test_a_text_too_short_for_a_block_is_refused_with_the_longest_block(prepare, tmp_path):
    prepare(b"abcd" * 50, "--unit=byte")
    config = SimpleNamespace(dataset=f"{tmp_path}/mine", train_characters=0, block_size=20)
    with pytest.raises(DataError, match="val split of mine has 20 bytes: too few .*; choose --block_size=19 or less"):
        open_dataset(config, "cpu")
    config.block_size = 19
    assert open_dataset(config, "cpu").sizes == {"train": 180, "val": 20}


@pytest.mark.parametrize(
    "splits", ["90", "90,20", "90,5,4", "100,0", "90,10,0", "50,20,20,10", "a,b", "90.5,9.5", "-10,110", ""]
)
def test_splits_that_make_no_sense_are_refused(refused, splits):
    assert "expected two or three whole numbers from 1 that add up to 100" in refused(
        b"a b " * 99, f"--splits={splits}"
    )


@pytest.mark.parametrize(
    "name",
    ["text8", "./text8", "./shakespeare_char-altered-8K", "./enwik8_mine", "./wiki-head-4M", "", "..", "/", "./a\nb"],
)
def test_names_of_published_texts_and_unprintable_names_are_refused(refused, name, tmp_path):
    before = files(tmp_path)
    message = refused(b"a b " * 99, f"--name={name}")
    assert "choose another name" in message or "choose one like mine" in message
    assert set(files(tmp_path)) - set(before) == {"my.txt"}


TEXT = "Ein Müller, größer als das Mühlrad. " * 20


@pytest.mark.parametrize("encoding, named", [("latin-1", "ISO-8859-1"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"),
                                             ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32")])  # fmt: skip
def test_advice_for_another_encoding_runs_as_printed(prepare, refused, tmp_path, encoding, named):
    message = refused(TEXT.encode(encoding))
    assert "spec" not in message and "--unit=byte" in message and f"iconv -f {named} " in message
    if shutil.which("iconv"):
        subprocess.run(re.search("convert it: (iconv .*);", message)[1], shell=True, check=True, cwd="/")
        main(["my.txt.utf8", "--name=./mine"], print)
        assert meta_of(tmp_path / "mine")["source"]["bytes"] == len(TEXT.encode())
    prepare(TEXT.encode(encoding), "--unit=byte")
    assert Dataset.open(tmp_path / "mine").unit == "byte"


def test_too_many_characters_are_refused_with_advice(refused):
    text = "".join(chr(code) for code in range(1, 70_000) if not 0xD800 <= code < 0xE000)
    message = refused(text.encode())
    assert "67,951 distinct characters" in message and "--unit=byte" in message and "the spec" not in message


def test_a_missing_text_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing.txt"), f"--name={tmp_path}/mine"], print)
    assert f"{tmp_path}/nothing.txt: there is no such file or folder" in capsys.readouterr().err


def test_a_part_is_made_again_by_the_script_of_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = os.path.relpath(ROOT / "data" / "text8" / "prepare.py")
    expected = ["python", script, "--source", "FILE", "--allow-partial", "--out"]
    assert shlex.split(prepare_command(tmp_path / "text8_head")) == [*expected, str(tmp_path / "text8_head")]
    assert shlex.split(prepare_command(tmp_path / "text8")) == ["python", script, "--out", str(tmp_path / "text8")]


def test_the_words_in_a_forged_meta_lead_to_no_other_script(prepare, tmp_path):
    prepare(b"a b " * 99)
    meta = json.loads((tmp_path / "mine" / "meta.json").read_text())
    script = os.path.relpath(ROOT / "data" / "prepare.py")
    for changes in ({"name": "../../elsewhere"}, {"again": ["; rm -rf x", "`id`"]}, {"again": [1]}, {"again": "words"}):
        (tmp_path / "mine" / "meta.json").write_text(json.dumps(meta | changes))
        words = shlex.split(prepare_command(tmp_path / "mine"))
        assert words[:2] == ["python", script] and words[-1] == f"--name={tmp_path / 'mine'}"
        assert words[2:-1] in (changes.get("again"), ["TEXT"], meta["again"])


def test_a_dagger_is_for_texts_under_the_name_of_a_published_one():
    def run(name, dataset, canonical=False):
        return {"dataset": {"name": name, "canonical": canonical}, "config": {"dataset": dataset}}

    assert not claims_published(run("mine", "mine")) and not claims_published(run("mine", "/texts/mine/"))
    assert not claims_published(run("text8", "text8", canonical=True))
    assert claims_published(run("text8-head-6.8M", "text8_head"))
    assert claims_published(run("shakespeare_char-altered-8K", "mine"))
    assert claims_published(run("mine", "shakespeare_char")), "another text in the published one's folder"


def test_every_published_text_keeps_its_name():
    scripts = [path for path in (ROOT / "data").glob("*/prepare.py") if "sha256=" in path.read_text()]
    assert len(scripts) >= 3 and all(is_kept(path.parent.name) for path in scripts)
