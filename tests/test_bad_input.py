"""Random command lines and configs are accepted or refused; an accepted config can be trained and sampled.

A refusal is one printable line with the reason; never a traceback, a hang, or half a file.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import thorough, tiny
from hypothesis import strategies as st
from random_values import (
    ANY_KEYS,
    JUNK,
    KEYS,
    NUMBERS,
    TEXTS,
    altered,
    command_lines,
    damaged,
    examples,  # noqa: F401, a fixture
    files_in,
    fitting,
    for_all,
    misspelt,
    outcome,
    patience,
    written,
)

import balance
from model import GPT
from run import accounting
from run.settings import Config
from sample import SampleConfig
from speed import decoding
from support import machines
from support.configurator import Message, parse
from support.files import ROOT
from support.options import ConfigError, choices_of, options_of

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
            again = parse(cls, [str(page)])
            assert again == dataclasses.replace(config, title=config.title or "page")  # a file without a docstring

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
    {"n_expert": 4, "aux_loss": "none", "router": "hash_gated", "gate": "sigmoid"},
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
