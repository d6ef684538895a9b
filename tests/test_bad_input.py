"""Random bad input: command lines, configs, data sets, checkpoints, records and prompts are accepted or refused.

A refusal is one printable line with the reason; never a traceback, a hang, or half a file. The short form draws the
same few examples each time; with -m soak there are many, and others each time.
"""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import thorough, tiny, train_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import balance
import plot_results
import sample
from data.build import TRAIN_VAL, TextSpec, prepare
from data.common import DataError, Dataset, Vocabulary, find
from model import GPT
from papers import experiments
from report import cells
from run import accounting, checkpoint, records, screen_report
from run.checkpoint import CheckpointError
from run.records import RecordError
from run.settings import Config
from sample import SampleConfig
from speed import bench_records, decoding
from support import machines
from support.configurator import Message, parse
from support.files import ROOT, is_utf8
from support.options import LARGEST_FLOAT, LARGEST_INT, SMALLEST_FLOAT, ConfigError, choices_of, options_of

LONGEST = 2000  # characters of a problem
PATIENCE = 20  # seconds; what takes longer hangs
OPTIONS = {**options_of(Config), **options_of(SampleConfig)}


EVERY_TIME = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("short", derandomize=True, **EVERY_TIME)
settings.register_profile("soak", **EVERY_TIME)


@pytest.fixture(autouse=True)
def examples(request):
    settings.load_profile("soak" if request.node.get_closest_marker("soak") else "short")
    yield
    settings.load_profile("default")


def for_all(n, **strategies):
    """Call the decorated function with n random examples."""
    return lambda holds: settings(max_examples=n)(given(**strategies)(holds))()


class Hang(BaseException):
    """A call took too long. Not an OSError, which the code under test might catch."""


@contextlib.contextmanager
def patience():
    """Raise Hang when the code inside takes too long."""

    def give_up(number, frame):
        raise Hang(f"more than {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call, *refusals):
    """(what `call` returns, "") or (None, why it refused). A message must be printable and short."""
    with patience():
        try:
            return call(), ""
        except refusals as error:
            lines = error.problems if isinstance(error, ConfigError) else [str(error)]
            lines = str(error).split("\n") if isinstance(error, DataError) else lines  # of what was tried
    assert lines
    for line in lines:
        assert line.strip() and line.isprintable() and len(line) <= LONGEST, line
    return None, "\n".join(lines)


def files_in(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Random values

WORDS = ["", " ", "\n", "\0", "\x1b[31m", "\ud800", "\udcff", "é", "🙂", "٣", "nan", "inf", "-inf", "1e400", "1e-400",
         "0x10", "1_000", "True", "None", "''", "$x$", "$\\frac{", "<b>", "a|b", "../..", "~nobody/x", "9" * 5000,
         "x" * 100_000, "-1", "2**3", "1e5", "0.5", "auto", "cuda:99999999999999999999", "cpu:7", "FILE:"]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(st.characters(), max_size=20))
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([10**9, 10**12, 2**31, 2**53, 2**63 - 1, 2**63, 2**70, 10**400, -(10**400)]),
    st.floats(),
    st.floats(0, 2),
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=6,
)


def fitting(option):
    """Values that the option accepts."""
    largest = LARGEST_FLOAT if float in option.kinds else LARGEST_INT
    low, high = option.at_least or 0, largest if option.at_most is None else option.at_most
    below = option.below is not None
    floats = st.floats(low, 1) | st.floats(low, option.below if below else high, exclude_max=below)
    by_kind = {
        bool: st.booleans(),
        str: st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
        int: st.integers(low, min(high, low + 9)) | st.integers(low, high),
        float: floats.filter(lambda x: x == 0 or x >= SMALLEST_FLOAT),
    }
    found = [by_kind[kind] for kind in option.kinds if kind in by_kind]
    return st.one_of(*found, *([st.sampled_from(choices_of(option))] if choices_of(option) else []))


def misspelt(name):
    places = st.integers(0, len(name) - 1)
    dropped = places.map(lambda i: name[:i] + name[i + 1 :])
    return st.one_of(dropped, places.map(lambda i: name[:i] + name[i] + name[i:]), st.just(name.upper()))


def written(value):
    """A value as text; str refuses integers of more than 4300 digits."""
    return f"10**{len(hex(value))}" if isinstance(value, int) and abs(value) > 10**300 else repr(value)


KEYS = st.sampled_from(list(OPTIONS))
ANY_KEYS = st.one_of(KEYS, KEYS, KEYS.flatmap(misspelt), TEXTS)


def command_lines(cls):
    keys = st.sampled_from(list(options_of(cls)))
    good = keys.flatmap(lambda key: fitting(options_of(cls)[key]).map(lambda value: f"--{key}={value}"))
    bad = st.builds(lambda key, value: f"--{key}={value}", keys | ANY_KEYS, TEXTS | NUMBERS.map(written))
    odd = st.one_of(ANY_KEYS.map(lambda key: f"--{key}"), TEXTS)
    return st.tuples(st.just(cls), st.lists(good, max_size=4) | st.lists(good | good | bad | odd, max_size=4))


@st.composite
def damaged(draw, content):
    """The content with one to three stretches of bytes changed, removed, inserted, repeated, or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(1, 8) | st.integers(1, max(1, len(content))))
        how = draw(st.sampled_from(["bit", "bytes", "out", "in", "again", "cut", "end"]))
        if how == "bit" and content:
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "bytes":
            new = draw(st.binary(min_size=1, max_size=8))
            content[start : start + len(new)] = new
        elif how == "out":
            del content[start : start + length]
        elif how == "in":
            content[start:start] = draw(st.one_of(st.binary(min_size=1, max_size=8), TEXTS.map(as_bytes)))
        elif how == "again":
            content[start:start] = content[start : start + length]
        elif how == "cut":
            del content[start:]
        else:
            content += draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


def as_bytes(text):
    return text[:200].encode("utf-8", errors="surrogatepass")


def places(value, path=()):
    """The path of each value in nested objects and lists, as a tuple of names and numbers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [below for key, inner in items for below in places(inner, (*path, key))]


@st.composite
def altered(draw, value, junk=JUNK):
    """A copy with one to three of its values removed, renamed, repeated or replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        paths = places(value)
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent = value
        for part in path[:-1]:
            parent = parent[part]
        key, old = path[-1], parent[path[-1]]
        how = draw(st.sampled_from(["gone", "again", "renamed", "junk", "junk", "junk", "near", "near"]))
        if how == "gone":
            del parent[key]
        elif how == "again" and isinstance(parent, list):
            parent.insert(key, old)
        elif how == "renamed" and isinstance(parent, dict) and isinstance(key, str) and key:
            parent[draw(misspelt(key))] = parent.pop(key)
        elif how == "near" and type(old) in (bool, int, float) and abs(old) < 10**300:
            parent[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 2, float(old), str(old), not old]))
        elif how == "near" and isinstance(old, str) and old:
            parent[key] = draw(st.one_of(misspelt(old), st.just(old + "\n"), st.just([old])))
        else:
            parent[key] = draw(junk)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Command lines, config files and recorded configs


def assert_is_a_config(config):
    """Every value is of its key's type and in its range, and survives the way to a record and back."""
    cls, values = type(config), dataclasses.asdict(config)
    for key, option in options_of(cls).items():
        value = values[key]
        assert any(type(value) is kind for kind in option.kinds) or value in choices_of(option), key
        if type(value) in (int, float):
            assert abs(value) < (2**63 if type(value) is int else 2**128)
            assert option.at_least is None or value >= option.at_least
            assert option.at_most is None or value <= option.at_most
            assert option.below is None or value < option.below
        if isinstance(value, str):
            assert "\0" not in value and (cls is SampleConfig or value.encode() is not None)
    if cls is Config:
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert re.fullmatch("[0-9a-f]{10}-s[0-9]+", config.run_id)


def printed_config(cls, argv):
    try:
        parse(cls, [*argv, "--print-config"])
    except Message as message:
        return message.text


@thorough(100, 25_000)
def test_a_random_command_line_is_parsed_exactly_or_refused(n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken_or_not = Counter()

    @for_all(n, command_line=command_lines(Config) | command_lines(SampleConfig))
    def holds(command_line):
        cls, argv = command_line
        asked_for_help = "--help" in argv or "-h" in argv
        try:
            config, why = outcome(lambda: parse(cls, argv), ConfigError)
        except Message as message:
            assert asked_for_help or "--print-config" in argv
            assert message.text and len(message.text) < 300_000
            return
        assert not asked_for_help
        taken_or_not[config is not None] += 1
        if config is None:
            return
        assert_is_a_config(config)
        page = Path("page.py")
        if cls is Config:
            page.write_text(printed_config(cls, argv), encoding="utf-8")
            assert parse(cls, [str(page)]) == config

    assert (
        taken_or_not[True] > n / 20
        and taken_or_not[False] > n / 20
        and files_in(tmp_path).keys() <= {tmp_path / "page.py"}
    )


@thorough(100, 15_000)
def test_a_random_value_on_the_command_line_is_kept_or_refused_by_name(n):
    @for_all(n, key=KEYS, value=st.one_of(TEXTS, NUMBERS.map(written)))
    def holds(key, value):
        cls = Config if key in options_of(Config) else SampleConfig
        config, why = outcome(lambda: parse(cls, [f"--{key}={value}"]), ConfigError)
        if config is None:
            assert key in why
            return
        assert_is_a_config(config)
        found = getattr(config, key)
        if type(found) in (int, float):
            assert found == float(value) or found == int(value)


@thorough(50, 10_000)
def test_a_misspelt_key_is_refused_by_name(n):
    classes, values = st.sampled_from([Config, SampleConfig]), st.sampled_from(["", "=1", "=x"])

    @for_all(n, cls=classes, key=KEYS.flatmap(misspelt), value=values)
    def holds(cls, key, value):
        if key not in options_of(cls):
            _, why = outcome(lambda: parse(cls, [f"--{key}{value}"]), ConfigError)
            assert "unknown key" in why or "expected --key=value" in why
            assert key in why


@thorough(60, 15_000)
def test_a_random_value_in_a_config_file_is_kept_or_refused(n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = st.one_of(
        JUNK.map(repr).filter(lambda text: "inf" not in text and "nan" not in text),
        NUMBERS.map(written),
        st.sampled_from(["10**5000", "-10**5000", "1e999", "float('nan')", "[[" * 40 + "]]" * 40, "b'x'", "{1}", "max",
                         "object()", "...", "1j", "True", "range(10**12)", "'x' * 10**6", "'\\ud800'", "__file__"]),
    )  # fmt: skip

    @for_all(n, key=ANY_KEYS.filter(str.isidentifier), value=values)
    def holds(key, value):
        Path("a.py").write_text(f"{key} = {value}\n", encoding="utf-8", errors="backslashreplace")
        config, why = outcome(lambda: parse(Config, ["a.py"]), ConfigError)
        if config is not None:
            assert_is_a_config(config)
        else:
            assert "a.py" in why


@thorough(50, 15_000)
def test_a_damaged_config_file_is_parsed_or_refused(n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = (ROOT / "config" / "cpu.py").read_bytes() + (ROOT / "config" / "shakespeare_dense.py").read_bytes()

    @for_all(n, content=st.one_of(damaged(plain), damaged(plain).map(lambda b: b"# coding: utf-16\n" + b)))
    def holds(content):
        Path("a.py").write_bytes(content)
        config, _ = outcome(lambda: parse(Config, ["a.py"]), ConfigError)
        if config is not None:
            assert_is_a_config(config)


@pytest.mark.parametrize(
    "content",
    [
        b"n_layer = " + b"(" * 100_000,
        b"n_layer = 1" + b" + 1" * 100_000,
        b"n_layer = x = [1]\nx.append(x)\n",
        b"n_layer = " + b"9" * 10_000,
        b"seed = -(10**5000)",
        b"\0" * 1000,
        b"# coding: no-such-coding\nn_layer = 1",
        b"n_layer = '\xff'",
        b"raise Exception('\\x1b[31m\\ud800' + 'x' * 10**6)",
        b"from config.\xc3\xa9 import *",
        b"globals()['\\ud800\\n'] = 1",
        b"def f(): f()\nf()",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_an_absurd_config_file_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_bytes(content)
    config, why = outcome(lambda: parse(Config, ["a.py"]), ConfigError)
    assert config is None and why.startswith("a.py")


@thorough(50, 10_000)
def test_a_recorded_config_is_restored_or_refused(n):
    plain = Config(n_expert=4, expert_top_k=2).to_dict()

    @for_all(n, values=st.one_of(altered(plain), JUNK, st.dictionaries(ANY_KEYS, JUNK)))
    def holds(values):
        config, _ = outcome(lambda: Config.from_dict(values), ConfigError)
        if config is not None:
            assert_is_a_config(config)
            assert all(getattr(config, key) == value for key, value in values.items())


@pytest.mark.parametrize("value", [10**9, 2**63 - 1, 2**70])
def test_a_huge_size_is_answered_at_once(value):
    for key in (key for key, option in options_of(Config).items() if int in option.kinds):
        for others in ([], ["--n_expert=4", "--n_expert_by_block=4,4"]):
            config, why = outcome(lambda: parse(Config, [*others, f"--{key}={value}"]), ConfigError)  # noqa: B023
            assert (getattr(config, key) == value < 2**63) if config else why


# ---------------------------------------------------------------------------------------------------------------------
# What a config allows can be built

SYMBOLS = 7
SIZES = dict(
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([1, 2]),
    n_embd=st.sampled_from([4, 8, 16]),
    block_size=st.integers(1, 9),
    batch_size=st.integers(1, 3),
    max_iters=st.integers(1, 10),
    mlp_hidden=st.integers(0, 9),
    n_expert=st.integers(0, 5),
    n_expert_by_block=st.sampled_from(["", "", "2,2", "4,0", "0,3,1", "3", "2,4,4"]),
    expert_top_k=st.integers(0, 5),
    expert_hidden=st.sampled_from([0, 0, 1, 3, 8]),
    n_shared_expert=st.integers(0, 2),
    segment_size=st.integers(1, 10),
    n_expert_group=st.integers(1, 4),
    router_ngram=st.integers(1, 10),
)
MOE_KEYS = {
    key: SIZES[key] if key in SIZES else fitting(option)
    for key, option in options_of(Config).items()
    if option.group == "Mixture of experts" or key in (*SIZES, "seed", "dropout", "bias")
}


BASES = [
    {},
    {"n_expert": 4, "expert_top_k": 2},
    {"n_expert": 4, "expert_top_k": 2, "capacity_factor": 0.7},
    {"n_expert": 3, "expert_top_k": 1, "capacity_factor": 1.0, "router": "expert_choice", "aux_loss": "none"},
    {"n_expert": 4, "expert_top_k": 1, "router": "two_level"},
    *({"n_expert": 4, "aux_loss": "none", "router": name} for name in ("frozen", "random", "hash", "ngram_hash")),
]


@st.composite
def configs(draw):
    """Configs without `problems`; keys that a problem names go back to their defaults."""
    base = draw(st.sampled_from(BASES))
    keys = draw(st.lists(st.sampled_from(list(MOE_KEYS)), max_size=10, unique=True))
    sizes = {key: draw(SIZES[key]) for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
    changes = {**sizes, "router_ngram": 2, **base, **{key: draw(MOE_KEYS[key]) for key in keys}}
    while True:
        config = dataclasses.replace(tiny(), **changes)
        keys, message = next(config.problems(), ((), ""))
        if not keys:
            return config
        blamed = [key for key in keys if key in changes and changes[key] != getattr(tiny(), key)]
        assert blamed, message
        del changes[draw(st.sampled_from([key for key in blamed if key not in base] or blamed))]


@thorough(100, 6_000)
def test_an_accepted_config_can_be_trained_and_sampled(n):
    machine = machines.choose("cpu", "float32", compile=False)

    @for_all(n, config=configs(), step=st.integers(0, 10))
    def holds(config, step):
        with patience():
            assert_can_be_trained_and_sampled(config, step, machine)


def assert_can_be_trained_and_sampled(config, step, machine):
    torch.manual_seed(config.seed)
    model = GPT(config, SYMBOLS, torch.arange(SYMBOLS))
    model.set_step(step)
    assert min(accounting.count_parameters(model).values()) >= 0 and accounting.training_flops_per_token(model) > 0
    x = torch.randint(SYMBOLS, (config.batch_size, config.block_size))
    for mode in (model.train, model.eval):
        out = mode()(x, x)
        assert out.loss.isfinite() and out.objective.isfinite() and out.logits.isfinite().all()
        for stats in out.stats:
            summary = balance.summarize(stats, in_detail=True)
            assert math.isfinite(sum(summary["load"])) and 0 <= summary["drop_rate"] <= 1
    model.train()(x, x).objective.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.update_biases([layer.load for layer in out.stats])
    if config.is_causal:
        decoder = decoding.fastest(model.eval(), 1, machine, temperature=0.8, top_k=3)
        tokens = [step.tokens.item() for step in decoder.write(x[:1], config.block_size + 3)]
        assert len(tokens) == config.block_size + 3 and 0 <= min(tokens) <= max(tokens) < SYMBOLS


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
        "metrics": (tmp_path / "run" / "metrics.jsonl", lambda: plot_results.read_run(tmp_path / "run")),
        "recorded config": (tmp_path / "run" / "config.json", lambda: plot_results.read_run(tmp_path / "run")),
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
    return prepare(spec, home=folder, folder=folder / "own", source=str(source))


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


def json_of(value):
    return json.dumps(value).encode()


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
    ids = st.one_of(JUNK, st.lists(st.integers(-1, 4), max_size=5), st.lists(st.lists(st.integers(0, 2)), max_size=3))

    @for_all(n, values=values, text=texts, ids=ids)
    def holds(values, text, ids):
        vocabulary, _ = outcome(lambda: Vocabulary.from_dict(values), DataError)
        vocabulary = vocabulary or Vocabulary.from_dict(plain[0])
        assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
        encoded, why = outcome(lambda: vocabulary.encode(text), DataError)
        if encoded is None:
            assert "vocabulary" in why or "UTF-8" in why
        elif is_utf8(text):
            assert vocabulary.decode(encoded) == text
        decoded, _ = outcome(lambda: vocabulary.decode(ids), DataError)
        if decoded is not None:
            decoded.encode()


@thorough(30, 5_000)
def test_a_random_dataset_name_is_found_or_refused(n):
    names = st.one_of(TEXTS, TEXTS.map(lambda text: f"{text}/x"), st.sampled_from(["shakespeare", "~nobody/x", ".."]))

    @for_all(n, name=names)
    def holds(name):
        folder, why = outcome(lambda: find(name), DataError)
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
    torch.tensor(3), torch.zeros(0), torch.ones(2, 2), torch.full((16, 16), math.nan), torch.ones(65, 16).double(),
    torch.ones(3, dtype=torch.complex64), torch.eye(16).to_sparse(), torch.full((16,), math.inf),
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
    assert screen_report.final_report(record).encode() and records.machine_of(record)
    for table in experiments.TABLES.values():
        for comparison in experiments.gather(table, experiments.in_cells(table, [record], []), "cpu"):
            for view in table.views:
                grid = cells.grid_of(comparison, view)
                assert cells.markdown(grid).encode() and cells.latex(grid).encode()
            assert cells.csv_of([comparison]).encode()


def benches_shown_everywhere(record):
    told = [
        *bench_records.slower(BENCH, record),
        *bench_records.not_compared(BENCH, record),
        *bench_records.doubts(record),
        bench_records.headline(record),
    ]
    assert not any("\n" in line for line in told)
    for grid in cells.speed_grids(record):
        assert cells.markdown(grid).encode() and cells.latex(grid).encode()
    assert cells.speed_csv([record]).encode()


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
