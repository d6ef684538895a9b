"""Random and damaged files are read exactly or refused: data sets, prompts, checkpoints, runs, records.

A refusal is one printable line with the reason; never a traceback, a hang, or half a file.
"""

import copy
import gzip
import io
import itertools
import json
import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import thorough, train_tiny
from hypothesis import strategies as st
from random_values import (
    JUNK,
    TEXTS,
    altered,
    damaged,
    examples,  # noqa: F401, a fixture
    files_in,
    for_all,
    json_of,
    outcome,
)

import plot_results
import sample
from data.build import TRAIN_VAL, TextSpec, prepare_dataset
from data.common import DataError, Dataset, Vocabulary, find_dataset
from papers import TABLES
from papers.table import gather
from report import cells, latest, speed_cells
from run import checkpoint, records, screen_report
from run.checkpoint import CheckpointError
from run.records import RecordError
from run.settings import Config
from speed import bench_records
from support.configurator import parse
from support.files import ROOT, is_utf8
from support.options import ConfigError, options_of

# ---------------------------------------------------------------------------------------------------------------------
# Paths that are no files


def make_fifo(path):
    os.mkfifo(path)


def make_huge(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


NO_FILES = {
    "a pipe": make_fifo,
    "a folder": Path.mkdir,
    "a device that never ends": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a terabyte": make_huge,
    "nothing": lambda path: None,
    "an empty file": Path.touch,
}


@pytest.fixture
def as_file(tmp_path, dense_run, words):
    """{the purpose of a file: (its path, a function that reads it)}"""
    shutil.copytree(words, tmp_path / "words")
    shutil.copytree(dense_run, tmp_path / "run")
    (tmp_path / "results" / "B").mkdir(parents=True)
    run, prompt = f"--out_dir={tmp_path / 'run'}", tmp_path / "prompt.txt"
    return {
        "config": (tmp_path / "a.py", lambda: parse(Config, [str(tmp_path / "a.py"), "--n_head=5"])),
        "meta": (tmp_path / "words" / "meta.json", lambda: Dataset.open(tmp_path / "words")),
        "bin": (tmp_path / "words" / "val.bin", lambda: Dataset.open(tmp_path / "words")),
        "record": (tmp_path / "results" / "B" / "a-s1.json", lambda: records.read(tmp_path / "results/B/a-s1.json")),
        "bench": (tmp_path / "bench.json", lambda: bench_records.read(tmp_path / "bench.json")),
        "checkpoint": (tmp_path / "run" / "best.pt", lambda: sample.main([run, "--device=cpu"])),
        "prompt": (prompt, lambda: sample.main([run, "--device=cpu", "--max_new_tokens=1", f"--start=FILE:{prompt}"])),
        "metrics": (tmp_path / "run" / "metrics.jsonl", lambda: latest.read_run(tmp_path / "run", [])),
        "recorded config": (tmp_path / "run" / "config.json", lambda: latest.read_run(tmp_path / "run", [])),
        "text": (tmp_path / "raw.txt", lambda: prepared(tmp_path, tmp_path / "raw.txt")),
    }


REFUSALS = (ConfigError, DataError, CheckpointError, RecordError, OSError)


@pytest.mark.parametrize(
    "purpose",
    ["config", "meta", "bin", "record", "bench", "checkpoint", "prompt", "metrics", "recorded config", "text"],
)
def test_a_path_that_is_no_file_is_refused_at_once(purpose, as_file, capsys):
    path, read = as_file[purpose]
    for kind, make in NO_FILES.items():
        if os.path.lexists(path):
            path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        if (purpose, kind) != ("prompt", "an empty file"):  # an empty prompt is allowed
            found, why = outcome(read, *REFUSALS)
            assert found is None and why, kind


# ---------------------------------------------------------------------------------------------------------------------
# Texts, bins, meta.json and vocabularies


def prepared(folder, source, unit="character"):
    spec = TextSpec(name="own", unit=unit, filenames=("input.txt",), splits=TRAIN_VAL)
    return prepare_dataset(spec, home=folder, folder=folder / "own", source=str(source))


def text_of(dataset):
    ids = [dataset._stretch(split, 0, size) for split, size in dataset.sizes.items()]
    return dataset.vocabulary.decode(torch.cat(ids))


def zipped(content, name="input.txt", **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@thorough(40, 6_000)
def test_a_random_text_is_prepared_exactly_or_refused(n, tmp_path):
    plain = st.one_of(st.binary(max_size=60), st.text(min_size=5, max_size=60).map(str.encode))
    packed = st.sampled_from([gzip.compress(b"hello world" * 9, mtime=0), zipped(b"hello world" * 9)]).flatmap(damaged)
    source = tmp_path / "source"

    @for_all(n, content=st.one_of(plain, packed), unit=st.sampled_from(["character", "byte"]))
    def holds(content, unit):
        source.write_bytes(content)
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        meta, why = outcome(lambda: prepared(tmp_path, source, unit), DataError)
        if meta is None:
            assert str(source) in why and files_in(tmp_path).keys() == {source}
            return
        dataset = Dataset.open(tmp_path / "own")
        assert dataset.source_sha256 == meta["source"]["sha256"]
        if content[:2] not in (b"PK", b"\x1f\x8b"):
            assert text_of(dataset) == content.decode(errors="replace")


def opened(folder):
    """The data set, after reading all of it."""
    dataset = Dataset.open(folder)
    for split in dataset.sizes:
        dataset.batch(split, 1, 2, 3, 4)
        for _ in dataset.windows(split, 64, 8):
            pass
    return dataset


@thorough(80, 10_000)
def test_a_changed_data_set_is_refused_or_reads_the_same(n, words, byte_words, tmp_path):
    wholes = {name: opened(folder) for name, folder in (("words", words), ("byte_words", byte_words))}
    texts = {name: text_of(whole) for name, whole in wholes.items()}
    for name, folder in (("words", words), ("byte_words", byte_words)):
        shutil.copytree(folder, tmp_path / name)
    contents = {path.relative_to(tmp_path): content for path, content in files_in(tmp_path).items()}
    refused = Counter()

    @st.composite
    def changes(draw):
        """A file, and what it holds now."""
        path = draw(st.sampled_from([path for path in contents if path.suffix in (".bin", ".json")]))
        others = [content for other, content in contents.items() if other.suffix == path.suffix]
        ways = [damaged(contents[path]), st.sampled_from(others)]
        if path.suffix == ".json":
            meta = json.loads(contents[path])
            symbols = st.lists(st.sampled_from(meta["vocabulary"]) | JUNK, max_size=3)
            of_meta = altered(meta).map(json_of)
            ways += [
                of_meta,
                of_meta,
                symbols.map(lambda some: json_of({**meta, "vocabulary": some})),
            ]
            ways.append(st.integers(0, len(meta["vocabulary"]) - 1).map(lambda i: json_of(neighbour(meta, i))))
        return path, draw(st.one_of(ways))

    @for_all(n, change=changes())
    def holds(change):
        path, content = change
        (tmp_path / path).write_bytes(content)
        name = path.parts[0]
        try:
            dataset, why = outcome(lambda: opened(tmp_path / name), DataError)
        finally:
            (tmp_path / path).write_bytes(contents[path])
        refused[dataset is None] += 1
        if dataset is None:
            assert path.name in why or "meta.json" in why
        else:
            unproved = {"name": "", "canonical": True}  # a changed name cannot be noticed
            assert dataset.describe() | unproved == wholes[name].describe() | unproved
            assert dataset.vocabulary == wholes[name].vocabulary and text_of(dataset) == texts[name]
            assert dataset.name.strip() and dataset.name.encode()

    assert refused[True] > n / 2


def neighbour(meta, i):
    """The meta with one symbol replaced by the next code point: the vocabulary is still sorted and distinct."""
    symbols = list(meta["vocabulary"])
    symbols[i] = symbols[i] + 1 if isinstance(symbols[i], int) else chr(ord(symbols[i]) + 1)
    return {**meta, "vocabulary": symbols}


@thorough(50, 10_000)
def test_a_random_vocabulary_is_restored_or_refused(n):
    plain = [Vocabulary("character", ("\n", "a", "é")).to_dict(), Vocabulary("byte", (10, 97, 255)).to_dict()]
    values = st.one_of(st.sampled_from(plain).flatmap(altered), JUNK)
    texts = st.one_of(TEXTS, st.text(st.sampled_from("\naé"), max_size=9))

    @for_all(n, values=values, text=texts)
    def holds(values, text):
        vocabulary, _ = outcome(lambda: Vocabulary.from_dict(values), DataError)
        vocabulary = vocabulary or Vocabulary.from_dict(plain[0])
        assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
        encoded, why = outcome(lambda: vocabulary.encode(text), DataError)
        if encoded is None:
            assert "vocabulary" in why or "UTF-8" in why
        elif is_utf8(text):
            assert vocabulary.decode(encoded) == text


@thorough(30, 5_000)
def test_a_random_dataset_name_is_found_or_refused(n):
    names = st.one_of(TEXTS, TEXTS.map(lambda text: f"{text}/x"), st.sampled_from(["shakespeare", "~nobody/x", ".."]))

    @for_all(n, name=names)
    def holds(name):
        folder, why = outcome(lambda: find_dataset(name), DataError)
        assert why or folder.is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and checkpoints


@pytest.fixture(scope="session")
def byte_run(byte_words, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("runs") / "bytes"
    assert train_tiny(byte_words, out_dir, max_iters=1) == 0
    return out_dir


@thorough(25, 4_000)
def test_a_random_prompt_is_continued_or_refused(n, dense_run, moe_run, byte_run, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    starts = st.one_of(TEXTS, st.text(st.sampled_from("the \n.09TÉ"), max_size=40), st.just(f"FILE:{file}"))
    options = st.fixed_dictionaries(
        {"start": starts, "max_new_tokens": st.integers(1, 40)},
        optional={
            "temperature": st.sampled_from([0, 1e-300, 1e-38, 1e-3, 1.0, 1e30, 1e38, 1e300]),
            "top_k": st.sampled_from([0, 1, 5, 10**18]),
            "seed": st.integers(0, 2**32 - 1),
            "show_experts": st.booleans(),
            "layer": st.integers(-1, 3),
            "checkpoint": st.sampled_from(["best", "last"]),
            "device": st.sampled_from(["auto", "cpu:0", "cpu:7", "cuda:5", "mps", "meta", "\udcff", "x" * 9999]),
            "num_samples": st.sampled_from([1, 1, 2]),
        },
    )
    contents = st.one_of(st.binary(max_size=30), st.text(st.sampled_from("the \n\r.09T"), max_size=40).map(str.encode))

    @for_all(n, run=st.sampled_from([dense_run, moe_run, byte_run]), options=options, content=contents)
    def holds(run, options, content):
        file.write_bytes(content)
        argv = [f"--out_dir={run}", "--device=cpu", *(f"--{key}={value}" for key, value in options.items())]
        before = files_in(run)
        capsys.readouterr()
        code, why = outcome(lambda: sample.main(argv), ConfigError, DataError, CheckpointError, OSError)
        out, err = capsys.readouterr()
        assert files_in(run) == before and err == ""
        if code is None:
            assert out == ""
            return
        assert code == 0
        if not options.get("show_experts") and run != byte_run and options.get("num_samples", 1) == 1:
            prompt = (
                content.decode().replace("\r\n", "\n") if options["start"].startswith("FILE:") else options["start"]
            )
            quoted = options["start"] in ("''", '""')
            assert len(out) == (len(prompt) or 1 if not quoted else 1) + options["max_new_tokens"] + 1


def assert_same(a, b):
    """Nested dicts, lists, tensors and numbers, to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b or a != a


@thorough(50, 8_000)
def test_a_damaged_checkpoint_is_refused_or_loads_the_same(n, tmp_path):
    state = {"model": {"a": torch.arange(40.0), "b": torch.ones(3, 2)}, "step": 7, "names": ["x", None, 0.5, True]}
    checkpoint.save(tmp_path / "a.pt", state)
    whole, content = checkpoint.load(tmp_path / "a.pt"), (tmp_path / "a.pt").read_bytes()

    @for_all(n, content=damaged(content))
    def holds(content):
        (tmp_path / "a.pt").write_bytes(content)
        found, why = outcome(lambda: checkpoint.load(tmp_path / "a.pt"), CheckpointError)
        assert "a.pt" in why if found is None else assert_same(found, whole) is None


TENSORS = st.sampled_from([
    torch.tensor(3), torch.zeros(0), torch.ones(2, 2), torch.ones(65, 16).double(),
    torch.ones(3, dtype=torch.complex64), torch.eye(16).to_sparse(),
    torch.arange(9), torch.ones(5, dtype=torch.bool), torch.ones(4).bfloat16(),
])  # fmt: skip


@thorough(25, 4_000)
def test_a_checkpoint_with_changed_content_is_refused_or_can_be_sampled(n, dense_run, moe_run, words, tmp_path, capsys):
    hashed = tmp_path / "hashed"
    assert train_tiny(words, hashed, n_expert=4, router="hash", aux_loss="none", max_iters=1) == 0
    states = {}
    for name, run in (("dense", dense_run), ("moe", moe_run), ("hash", hashed)):
        state = checkpoint.load(run / "best.pt")
        states[name] = {key: state[key] for key in ("config", "vocabulary", "model")}
    huge = st.builds(
        lambda key, value: {key: value},
        st.sampled_from([key for key, option in options_of(Config).items() if int in option.kinds]),
        st.sampled_from([2, 8, 1000, 10**5, 10**9, 10**12, 2**62, 2**70]),
    )
    folder = tmp_path / "run"
    folder.mkdir()

    @for_all(
        n,
        name=st.sampled_from(list(states)),
        change=st.data(),
        sizes=st.one_of(st.none(), huge, st.just({"router": "random"}), st.just({"router": "hash"})),
    )
    def holds(name, change, sizes):
        state = copy.deepcopy(states[name])
        if sizes:
            state["config"].update(sizes)
        else:
            state = change.draw(altered(state, st.one_of(JUNK, TENSORS)))
        checkpoint.save(folder / "best.pt", state)
        capsys.readouterr()
        options = [f"--out_dir={folder}", "--device=cpu", "--max_new_tokens=3", "--top_k=5"]
        code, why = outcome(lambda: sample.main(options), ConfigError, DataError, CheckpointError)
        assert why if code is None else code == 0 and len(capsys.readouterr().out) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Records


def shown_everywhere(record):
    """Draw everything that shows a single record, except figures."""
    assert screen_report.final_report(record, "out").encode() and records.machine_of(record)
    for table in TABLES.values():
        for comparison in gather(table, [record] if table.of == "records" else [], "cpu"):
            for view in table.views:
                grid = cells.grid_of(comparison, view)
                assert cells.markdown(grid).encode() and cells.latex(grid).encode()
            lines = [cells.line_of(comparison, row, {}) for row in cells.rows_with_records(comparison)]
            "".join([*lines, *cells.notes_of(comparison), *cells.notes_on_missing(comparison)]).encode()
            assert cells.csv_of([comparison]).encode()


def benches_shown_everywhere(record):
    told = [
        *itertools.chain(*bench_records.compare(BENCH, record)),
        *bench_records.doubts(record),
        speed_cells.bench_headline(record),
    ]
    assert not any("\n" in line for line in told)
    for grid in speed_cells.speed_grids(record):
        assert cells.markdown(grid).encode() and cells.latex(grid).encode()
    assert speed_cells.speed_csv([record]).encode()


RECORD = json.loads((ROOT / "results" / "B" / "shakespeare_top2_cap05-cpu-s1337.json").read_text())
DENSE_RECORD = json.loads((ROOT / "results" / "B" / "shakespeare_dense-cpu-s1337.json").read_text())
BENCH = json.loads((ROOT / "results" / "bench" / "amd-epyc-2-cpu.json").read_text())


@thorough(60, 15_000)
@pytest.mark.parametrize("kind", ["run", "bench"])
def test_a_changed_record_is_refused_or_can_be_drawn(n, kind, tmp_path):
    wholes = [RECORD, DENSE_RECORD] if kind == "run" else [BENCH]
    read, show = (records.read, shown_everywhere) if kind == "run" else (bench_records.read, benches_shown_everywhere)
    path = tmp_path / "a-s1337.json"
    values = st.sampled_from(wholes).flatmap(altered).map(json_of)
    contents = st.one_of(values, values, st.sampled_from(wholes).map(json_of).flatmap(damaged), JUNK.map(json_of))

    @for_all(n, content=contents)
    def holds(content):
        path.write_bytes(content)
        record, why = outcome(lambda: read(path), RecordError)
        if record is None:
            assert str(path) in why
        else:
            show(record)


@thorough(2, 150)
def test_a_folder_with_damaged_records_is_drawn(n, tmp_path, capsys):
    """Damaged records beside sound ones, under file names that no page can show."""
    names = st.sampled_from(
        ["a-s1.json", "\udcff-s1337.json", "\n<b>|$x$-s1337.json", "\x1b[31m.json", "x" * 240 + ".json"]
    )
    contents = st.one_of(
        st.sampled_from([RECORD, DENSE_RECORD, BENCH]).flatmap(altered).map(json_of),
        st.sampled_from([RECORD, BENCH]).map(json_of),
        st.binary(max_size=9),
    )
    folders = st.sampled_from(["B", "bench", "A", "deep/er", "."])
    results = tmp_path / "results"

    @for_all(n, files=st.dictionaries(st.tuples(folders, names), contents, min_size=1, max_size=4))
    def holds(files):
        shutil.rmtree(results, ignore_errors=True)
        for (folder, name), content in files.items():
            (results / folder).mkdir(parents=True, exist_ok=True)
            (results / folder / name).write_bytes(content)
        before = files_in(results)
        assert outcome(lambda: plot_results.main(["--results", str(results)]))[0] == 0
        after = files_in(results)
        assert before.items() <= after.items()
        for name in ("summary.md", "report.html"):
            assert (results / name).read_text(encoding="utf-8")
        assert outcome(lambda: plot_results.main(["--results", str(results), "--check"]))[0] in (0, 1)
        assert files_in(results) == after
        capsys.readouterr()


@thorough(6, 800)
def test_a_damaged_run_is_drawn_or_refused(n, moe_run, tmp_path, capsys):
    shutil.copytree(moe_run, tmp_path / "run")
    contents = {name: (moe_run / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    lines = [json.loads(line) for line in contents["metrics.jsonl"].splitlines()]
    config = json.loads(contents["config.json"])
    titles = TEXTS.map(lambda title: json_of({**config, "title": title}))
    changes = {
        "config.json": st.one_of(titles, damaged(contents["config.json"]), altered(config).map(json_of)),
        "metrics.jsonl": st.one_of(
            damaged(contents["metrics.jsonl"]),
            altered(lines).map(lambda some: b"\n".join(map(json_of, some))),
            st.just(b"[" * 100_000),
        ),
    }
    picture = tmp_path / "curves.png"

    @for_all(n, change=st.sampled_from(list(changes)).flatmap(lambda name: st.tuples(st.just(name), changes[name])))
    def holds(change):
        name, content = change
        picture.unlink(missing_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
        argv = ["--latest", str(tmp_path / "run"), "--output", str(picture)]
        code, _ = outcome(lambda: plot_results.main(argv), RecordError)
        (tmp_path / "run" / name).write_bytes(contents[name])
        assert picture.is_file() == (code == 0)
        capsys.readouterr()
