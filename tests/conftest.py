"""What several test files share: a tiny config, a tiny text, a prepared data set."""

import dataclasses
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from alike import HARD
from hypothesis import HealthCheck, settings

from data.build import TRAIN_VAL_TEST, TextSpec, prepare_dataset
from run import update
from run.settings import Config

ROOT = Path(__file__).resolve().parents[1]
EVERY_TIME = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    dropout=0.0,
    device="cpu",
    max_iters=20,
    eval_interval=10,
    eval_iters=2,
    inference_samples=0,
    log_interval=5,
    warmup_iters=4,
    learning_rate=1e-2,
    min_lr=1e-3,
)


def tiny(**changes):
    """A Config small enough for milliseconds; what could not be configured is an error here too."""
    config = dataclasses.replace(Config(), **{**TINY, **changes})
    problems = [message for _, message in config.problems()]
    assert not problems, problems
    return config


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


def thorough(short, soak):
    """Decorates a test of `n` cases, mutations or kills: `short` of them each time, `soak` of them with pytest -m soak,
    which has no time limit."""
    long = pytest.param(soak, marks=pytest.mark.soak, id="soak")
    return pytest.mark.parametrize("n", [pytest.param(short, id="short"), long])


def soaked(*values):
    """A case of a parametrized test that only pytest -m soak runs."""
    return pytest.param(*values, marks=pytest.mark.soak)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip)


# ---------------------------------------------------------------------------------------------------------------------
# Prepared texts, and runs on them

WORDS = (
    "the of and to in that is was he for it with as his on be at by had not are but from or have they which one you "
    "were all her she there would their we him been has when who will no more if out so said what up its about into "
    "than them"
).split()


def english(n_words, seed):
    """Sentences of common words, with capitals, digits and newlines: a text that a tiny model can learn something
    about."""
    generator = np.random.default_rng(seed)
    lines = []
    while n_words > 0:
        count = int(generator.integers(4, 12))
        words = [str(word) for word in generator.choice(WORDS, count)]
        lines.append(f"{len(lines) % 100}. {' '.join(words).capitalize()}.")
        n_words -= count
    return "\n".join(lines) + "\n"


def prepare_text(folder, text, unit="character", splits=TRAIN_VAL_TEST):
    """The folder of a data set that data.build made of `text`."""
    folder.mkdir(parents=True)
    (folder / "raw.txt").write_text(text, encoding="utf-8")
    spec = TextSpec(name="words", unit=unit, filenames=("raw.txt",), splits=splits)
    prepare_dataset(spec, home=folder, folder=folder / "words", source=str(folder / "raw.txt"))
    return folder / "words"


def train_tiny(dataset, out_dir, *arguments, **changes):
    """train.main in this process, on the TINY config with changes. -> its exit code"""
    import train

    options = {**TINY, "dataset": dataset, "out_dir": out_dir, **changes}
    return train.main([*arguments, *(f"--{key}={value}" for key, value in options.items())])


@pytest.fixture(scope="session")
def forkserver():
    """A context whose processes have torch imported when they begin."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context.set_forkserver_preload(["train", "torch._dynamo"])  # the optimiser imports the second, which takes long
    context.Process(target=int).start()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A prepared data set of 20 kB with train, val and test splits."""
    return prepare_text(tmp_path_factory.mktemp("data") / "characters", english(4500, seed=1))


@pytest.fixture(scope="session")
def byte_words(tmp_path_factory):
    """The same as bytes, with characters of two and three bytes in it."""
    text = english(4500, seed=1).replace("all", "été").replace("more", "œuvre").replace("The", "“The”")
    return prepare_text(tmp_path_factory.mktemp("data") / "bytes", text, unit="byte")


@pytest.fixture(scope="session")
def dense_run(words, tmp_path_factory):
    """The out_dir of a complete dense run. To be read only: copy it to change it."""
    out_dir = tmp_path_factory.mktemp("runs") / "dense"
    assert train_tiny(words, out_dir) == 0
    return out_dir


@pytest.fixture(scope="session")
def moe_run(words, tmp_path_factory):
    """The same of 4 experts, top-2, with tokens dropped."""
    out_dir = tmp_path_factory.mktemp("runs") / "moe"
    assert train_tiny(words, out_dir, n_expert=4, expert_top_k=2, capacity_factor=0.5) == 0
    return out_dir


@pytest.fixture(scope="session")
def uninterrupted(words, tmp_path_factory):
    """The out_dir of a complete HARD run."""
    out_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train_tiny(words, out_dir, **HARD) == 0
    return out_dir


@pytest.fixture
def at_step(monkeypatch):
    """A function that lets something happen at the beginning of given updates, once each."""

    def happen(action, *steps):
        happened, original = set(), update.learning_rate

        def rate(step, config):
            if step in steps and step not in happened:
                happened.add(step)
                action()
            return original(step, config)

        monkeypatch.setattr(update, "learning_rate", rate)

    return happen


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_script(monkeypatch, *arguments, script="train.py"):
    """train.py (or another) as __main__, in this process. -> its exit code"""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:  # the second one would end all of pytest
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert caught.type is SystemExit, "a traceback instead of an exit code"
    return caught.value.code


# ---------------------------------------------------------------------------------------------------------------------
# Whatever machine it is

# Tiny models gain nothing from a second thread, and on busy cores the threads only wait for each other: a hundredfold
# slower. The variable is for processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Servers here are on the loopback, and repositories where the test says, also within a hook of git.
for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"):
    os.environ.pop(name, None)

settings.register_profile("short", derandomize=True, **EVERY_TIME)
settings.register_profile("soak", **EVERY_TIME)
settings.load_profile("short")
