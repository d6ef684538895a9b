"""Random values for the tests of bad input, and the rule for a refusal.

The short form draws the same few examples each time; with -m soak there are many, and others each time.
"""

import contextlib
import copy
import json
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.common import DataError
from run.settings import Config
from sample import SampleConfig
from support.options import LARGEST_FLOAT, LARGEST_INT, SMALLEST_FLOAT, ConfigError, choices_of, options_of

LONGEST = 2000  # characters of a problem
PATIENCE = 200  # seconds; what takes longer hangs, on any machine: nothing here needs more than one
OPTIONS = {**options_of(Config), **options_of(SampleConfig)}


@pytest.fixture(autouse=True)
def examples(request):
    """The profiles are in conftest.py."""
    settings.load_profile("soak" if request.node.get_closest_marker("soak") else "short")
    yield
    settings.load_profile("short")


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


def json_of(value):
    return json.dumps(value).encode()
