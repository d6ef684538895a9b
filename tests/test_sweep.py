"""sweep.py makes every missing run once, whatever its folder holds and whoever else runs a sweep. In most tests a
pretended train.py runs in place of the real one."""

import contextlib
import dataclasses
import fcntl
import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import types
from pathlib import Path

import pytest
from conftest import TINY

import sweep
from data.common import DataError, find_dataset
from papers import estimates, planned_runs, running
from papers import pack as pack_of
from papers.priorities import Priority
from papers.table import Row, Table
from run import records
from support import configurator, console, machines
from support.files import ROOT, FileError
from support.options import ConfigError

# Stands in for train.py: notes that it was called, takes its time, and copies the record of a real run.
PRETENDER = """
    import json
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    sys.path.insert(0, {root!r})
    from support import configurator
    from run.settings import Config

    here, started = Path(__file__).parent, time.time()
    config = configurator.parse(Config, sys.argv[1:])
    folder = Path(config.out_dir)
    orders = json.loads((here / "orders.json").read_text()).get(folder.name, {{}})
    with open(here / "calls", "a") as file:
        file.write(json.dumps([folder.name, os.getpid(), sys.argv[1:]]) + "\\n")
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    print("trained a little", flush=True)
    if "exit" in orders:
        print("the reason")
        sys.exit(orders["exit"])
    if "kill" in orders:
        os.kill(os.getpid(), signal.SIGKILL)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    resumed = config.init_from == "resume"
    first = int((folder / "ckpt.pt").read_text()) if resumed else 0
    for step in range(first, config.max_iters + 1):
        with open(folder / "metrics.jsonl", "a") as file:
            if step % config.eval_interval == 0:
                file.write(json.dumps({{"kind": "eval", "step": step, "clean": {{"nats": 2.5}}}}) + "\\n")
            file.write(json.dumps({{"kind": "train", "step": step, "loss": 2.5}}) + "\\n")
        (folder / "ckpt.pt").write_text(str(step))
        while step == orders.get("hold") and not stopped and not (here / "go").exists():
            time.sleep(0.01)
        if stopped and "deaf" not in orders:
            sys.exit(143)
        time.sleep(orders.get("pause", 0))
    record = json.loads((here / "record.json").read_text())
    record |= {{"config": config.to_dict(), "run_id": config.run_id, "title": config.title, "resumed": int(resumed)}}
    record["inference"] = {{"samples": 10, "tokens_per_second": 99.0}}
    (folder / "summary.json").write_text(json.dumps(record))
    with open(here / "spans", "a") as file:
        file.write(json.dumps([folder.name, started, time.time()]) + "\\n")
"""


MACHINE_HERE = sweep.machine_here
NO_RECORDS = planned_runs.KeptRecords({}, {}, [])


class Place:
    """A folder in which main runs, with the runs and records that it makes."""

    def __init__(self, folder):
        self.folder, self.out, self.results = folder, folder / "o u t", folder / "results"
        self.order()

    def order(self, **orders):
        """What the pretender does in a run: exit=3, kill=True, pause=0.1 a step, deaf=True to a signal."""
        (self.folder / "orders.json").write_text(json.dumps({f"{k}": v for k, v in orders.items()}))

    def words(self, *words):
        return ["--scale=cpu", f"--out={self.out}", f"--results={self.results}", *words]

    def main(self, *words):
        return sweep.main(self.words(*words))

    def begin(self, *words):
        """main in a process of its own, as a second user would have it."""
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(self.main(*words)))
        process.start()
        return process

    def first_run(self):
        machine = json.loads((self.folder / "record.json").read_text())["machine"]
        setup = planned_runs.Setup(self.out, self.results, [], {}, machine)
        return planned_runs.plan(sweep.TABLES, ["T"], "cpu", 1, setup, NO_RECORDS)[0]

    def calls(self):
        return self.lines("calls")

    def lines(self, name):
        with contextlib.suppress(OSError):
            return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
        return []

    def most_at_once(self):
        """The most complete runs of the pretender that went on at one time."""
        spans = self.lines("spans")
        return max(sum(start <= at < end for _, start, end in spans) for _, at, _ in spans)

    def names(self):
        return [name for name, _, _ in self.calls()]

    def kept(self):
        return sorted(path.relative_to(self.results).as_posix() for path in self.results.glob("*/*.json"))


def row(name, words, **changes):
    machine = {"device", "inference_samples", "log_interval"}
    options = {key: value for key, value in TINY.items() if key not in machine}
    return Row(name, name, "shakespeare_dense", {**options, "dataset": str(words), **changes})


def table(name, *rows):
    return Table(name, name, "", "", rows, ())


@pytest.fixture
def place(tmp_path, words, dense_run, monkeypatch):
    """Two tables of two rows, of which one is in both; runs pretend."""
    first, second, third = (row(name, words, beta2=b) for name, b in (("one", 0.9), ("two", 0.91), ("three", 0.92)))
    twin = row("twin", words, beta2=0.91)
    tables = {"T": table("T", first, second), "U": table("U", twin, third)}
    monkeypatch.setattr(sweep, "TABLES", tables)
    monkeypatch.setattr(running, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(running, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(running, "SECONDS_BETWEEN_STARTS", 0.05)
    monkeypatch.setattr(sweep, "PRIORITIES", ())
    (tmp_path / "train.py").write_text(textwrap.dedent(PRETENDER.format(root=str(ROOT))))
    shutil.copy(dense_run / "summary.json", tmp_path / "record.json")
    machine = json.loads((tmp_path / "record.json").read_text())["machine"]
    monkeypatch.setattr(sweep, "machine_here", lambda changes: machine)
    monkeypatch.setattr(sweep, "git_of_training", lambda: {"commit": "0" * 40, "dirty": False})
    return Place(tmp_path)


def record_of(place, of_row, seed, dirty=True, seconds=None, device=None):
    """What the pretender would have written."""
    config = of_row.config_at("cpu", seed)
    record = json.loads((place.folder / "record.json").read_text())
    record |= {"config": config.to_dict(), "run_id": config.run_id, "title": config.title}
    record["git"] = {"commit": "0" * 40, "dirty": dirty}
    record["inference"] = {"samples": 10, "tokens_per_second": 99.0}
    if seconds:
        record["seconds"]["total"] = seconds
    if device:
        record["machine"]["device"] = device
    return record


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def over_when(monkeypatch, is_over):
    """The sweep's clock jumps over every deadline as soon as is_over()."""
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6 * bool(is_over()))
    monkeypatch.setattr(running, "time", clock)
    monkeypatch.setattr(sweep, "time", clock)


ROWS = {name: index for index, name in enumerate(("one", "two"))}


def a_row(name):
    return sweep.TABLES["T"].rows[ROWS[name]]


# ---------------------------------------------------------------------------------------------------------------------
# Which runs are made, and in which order


def test_every_row_gets_its_first_seed_before_any_gets_a_second(place, capfd):
    assert place.main("T", "--seeds=2") == 0
    order = ["one-cpu-s1337", "two-cpu-s1337", "one-cpu-s1338", "two-cpu-s1338"]
    assert place.names() == order
    assert place.kept() == sorted(f"T/{name}.json" for name in order)
    assert not records.read_all(place.results)[1]
    shown = capfd.readouterr().out
    assert (
        "[1/4] one-cpu-s1337: started" in shown and "[4/4] two-cpu-s1338: finished: " in shown and " nats in " in shown
    )
    assert "4 runs: 4 finished" in shown


def test_finished_runs_are_not_run_again(place):
    """Not a record in another table's folder under another name, and not a complete run whose record was not copied."""
    write(place.results / "elsewhere" / "my-own-s1337.json", record_of(place, a_row("one"), 1337))
    summary = write(place.out / "two-cpu-s1337" / "summary.json", record_of(place, a_row("two"), 1337))
    assert place.main("T", "--seeds=1") == 0
    assert place.calls() == []
    assert (place.results / "T" / "two-cpu-s1337.json").read_bytes() == summary.read_bytes()
    assert place.kept() == ["T/two-cpu-s1337.json", "elsewhere/my-own-s1337.json"]


def test_a_row_of_several_tables_is_run_once(place):
    assert place.main("U", "--seeds=1") == 0
    assert place.main("all", "--seeds=1") == 0
    assert place.names() == ["two-cpu-s1337", "three-cpu-s1337", "one-cpu-s1337"]
    assert place.kept() == ["T/one-cpu-s1337.json", "U/three-cpu-s1337.json", "U/two-cpu-s1337.json"]


@pytest.mark.parametrize(
    "asked, rows, shown",
    [(["U", "T", "T"], ["two", "three", "one"], "U, T"), (["U", "all"], ["one", "two", "three"], "U, all")],
)
def test_several_tables_get_a_seed_of_every_row_before_the_next_seed(place, capfd, asked, rows, shown):
    assert place.main(*asked, "--seeds=2", "--list") == 0
    told, *listed = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[:6]] == [f"{name}-cpu-s{seed}" for seed in (1337, 1338) for name in rows]
    assert told.startswith(f"{shown} at scale cpu, 2 seeds")


def test_a_tuned_row_runs_its_candidates_then_the_best_two_and_then_the_best_on_fresh_seeds(place, words, monkeypatch):
    """All candidates have one loss here, so the first ones are the best."""
    record = json.loads((place.folder / "record.json").read_text())
    write(place.folder / "record.json", record | {"git": {"commit": "0" * 40, "dirty": False}})
    candidates = tuple(row(name, words, beta2=beta2) for name, beta2 in (("a", 0.9), ("b", 0.91), ("c", 0.92)))
    tuned = dataclasses.replace(candidates[0], name="tuned", candidates=candidates)
    monkeypatch.setattr(sweep, "TABLES", {"V": table("V", tuned)})
    assert place.main("V", "--seeds=2") == 0
    stages = [("abc", [1337]), ("ab", [1338, 1339]), ("a", [1340, 1341])]
    assert place.names() == [f"{name}-cpu-s{seed}" for names, seeds in stages for seed in seeds for name in names]
    assert place.main("V", "--seeds=2") == 0 and len(place.names()) == 9
    for path in place.results.glob("V/*.json"):  # a choice by records of another machine is not made again
        record = json.loads(path.read_text())
        write(path, record | {"machine": record["machine"] | {"device": "Another CPU"}})
    shutil.rmtree(place.out)
    assert place.main("V", "--seeds=2") == 0
    assert place.names()[9:] == ["a-cpu-s1340", "a-cpu-s1341"]


@pytest.mark.parametrize(
    "dirty, told",
    [(True, "There are uncommitted changes: "), (None, "git knows no commit of this code: "), (False, "")],
)
def test_uncommitted_code_is_reported_before_runs_are_made(place, monkeypatch, capfd, dirty, told):
    git = {"commit": None if dirty is None else "0" * 40, "dirty": dirty}
    monkeypatch.setattr(sweep, "git_of_training", lambda: git)
    assert place.main("T", "--seeds=1") == 0
    shown = capfd.readouterr().out
    assert told in shown and ("count in no mean" in shown) == bool(told)


def test_keys_of_the_machine_are_passed_on_to_train(place):
    assert place.main("T", "--seeds=1", "--log_interval=3", "--", "--device=cpu") == 0
    assert all({"--log_interval=3", "--device=cpu"} <= {*words} for _, _, words in place.calls())


SPOILT = {
    "a run that can go on": (["config.json", "ckpt.pt"], "one", "cut", ("--init_from=resume",)),
    "a run cut before it had saved": (["config.json", "metrics.jsonl"], "one", "missing", ("--overwrite=True",)),
    "nothing but an empty log": (["metrics.jsonl"], "one", "missing", ("--overwrite=True",)),
    "a best.pt that somebody keeps": (["config.json", "best.pt"], "one", "cannot be run", ()),
    "another experiment": (["config.json", "ckpt.pt"], "two", "cannot be run", ()),
    "a complete run": (["config.json", "ckpt.pt", "summary.json"], "one", "to be copied", ()),
    "another complete experiment": (["config.json", "ckpt.pt", "summary.json"], "two", "cannot be run", ()),
    "no config": (["ckpt.pt"], "one", "cannot be run", ()),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_is_resumed_or_left_alone_and_never_destroyed(place, case):
    held, name, kind, words = SPOILT[case]
    run = place.first_run()
    folder = place.out / run.name
    for file in held:
        write(folder / file, "")
    if "config.json" in held:
        write(folder / "config.json", a_row(name).config_at("cpu").to_dict())
    if "summary.json" in held:
        write(folder / "summary.json", record_of(place, a_row(name), 1337))
    state = planned_runs.state_of_folder(run)
    assert (state.kind, state.words) == (kind, words), state
    assert kind != "cannot be run" or "move it away" in state.text


def extended(place):
    changed = {"straight": False, "stretches": [{"step": 10, "changed": {"max_iters": [10, 20]}}], "resumed": 1}
    record = record_of(place, a_row("one"), 1337) | changed
    record["config"]["init_from"] = "resume"
    return record


@pytest.mark.parametrize("left", ["another length", "extended", "extended and cut"])
def test_a_folder_of_another_or_an_extended_run_is_kept_and_the_row_is_run_beside_it(place, left):
    """As train.py leaves it in the folder that the row would have."""
    record, folder = extended(place), place.out / "one-cpu-s1337"
    if left == "another length":
        options = {**a_row("one").options, "max_iters": 10}
        config = Row("one", "one", "shakespeare_dense", options).config_at("cpu")
        record |= {"config": config.to_dict()}
    if left == "extended":
        write(folder / "summary.json", record)
    write(folder / "config.json", {**record["config"], "straight": left == "another length"})
    write(folder / "ckpt.pt", "10")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert place.main("T", "--seeds=1") == 0
    assert place.names() == ["one-cpu-2-s1337", "two-cpu-s1337"]
    assert place.kept() == ["T/one-cpu-s1337.json", "T/two-cpu-s1337.json"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert place.main("T", "--seeds=1") == 0 and len(place.calls()) == 2


def test_a_record_of_an_extended_run_is_named_and_the_row_is_run(place, capfd):
    write(place.results / "T" / "one-cpu-s1337.json", extended(place))
    assert place.main("T", "--seeds=1") == 0
    assert place.names() == ["one-cpu-s1337", "two-cpu-s1337"]
    assert place.kept() == ["T/one-cpu-2-s1337.json", "T/one-cpu-s1337.json", "T/two-cpu-s1337.json"]
    told = "left out: results/T/one-cpu-s1337.json: not a straight run of its config (max_iters was 10 up to step 10"
    assert told in capfd.readouterr().err


def test_a_complete_run_with_a_damaged_record_is_kept(place, capfd):
    damaged = write(place.out / "one-cpu-s1337" / "summary.json", '{"format": "charmoe record 2"')
    assert place.main("T", "--seeds=1") == 1
    assert place.names() == ["two-cpu-s1337"] and damaged.exists()
    assert "holds a complete run whose record cannot be used" in capfd.readouterr().err


def test_a_bad_file_in_results_is_reported_and_left_alone(place, capfd):
    bad = write(place.results / "T" / "one-cpu-s1337.json", "{}")
    assert place.main("T", "--seeds=1") == 0
    assert bad.read_text() == "{}"
    assert place.kept() == ["T/one-cpu-2-s1337.json", "T/one-cpu-s1337.json", "T/two-cpu-s1337.json"]
    shown = capfd.readouterr()
    assert "left out: results/T/one-cpu-s1337.json" in shown.err and "T/one-cpu-2-s1337.json" in shown.out
    assert place.main("T", "--seeds=1") == 0 and len(place.calls()) == 2


def test_no_third_record_joins_two_that_contradict_each_other(place, capfd):
    for number, name in enumerate(("one-cpu-s1337", "one-cpu-2-s1337")):
        write(place.results / "T" / f"{name}.json", record_of(place, a_row("one"), 1337, seconds=1.0 + number))
    assert place.main("T", "--seeds=1") == 1
    assert place.names() == ["two-cpu-s1337"]
    told = capfd.readouterr().err
    assert (
        "different records of one run" in told
        and "cannot be run: one-cpu-s1337: " in told
        and "left out; keep one" in told
    )


def test_a_run_with_a_misnamed_record_is_not_run_again(place, capfd):
    write(place.results / "T" / "mine.json", record_of(place, a_row("one"), 1337))
    assert place.main("T", "--seeds=1") == 1
    assert place.names() == ["two-cpu-s1337"]
    assert "T/mine.json: left out; keep one, named …-s1337.json" in capfd.readouterr().err


def test_an_unprepared_data_set_is_reported_and_the_rest_is_run(place, capfd, monkeypatch):
    def find(dataset):
        if dataset == "enwik8_head":
            raise DataError("unknown")

    tables = {"T": table("T", row("head", "enwik8_head"), a_row("one"))}
    monkeypatch.setattr(sweep, "TABLES", tables)
    monkeypatch.setattr(planned_runs, "find_dataset", find)
    assert place.main("T", "--seeds=2") == 1
    assert place.names() == ["one-cpu-s1337", "one-cpu-s1338"]
    command = "python data/enwik8/prepare.py --source FILE --allow-partial --out data/enwik8_head"
    told = capfd.readouterr().err.splitlines()[-1]
    assert "head-cpu-s1337 and 1 more: data/enwik8_head is not prepared" in told and told.endswith(command)


def test_with_prepare_false_an_unprepared_data_set_is_reported_and_not_started(place, monkeypatch, capfd, tmp_path):
    (tmp_path / "enwik8").mkdir()
    tables = {"T": table("T", row("large", "enwik8"), a_row("one"))}
    monkeypatch.setattr(sweep, "TABLES", tables)
    found = lambda dataset: tmp_path / "enwik8" if dataset == "enwik8" else find_dataset(dataset)  # noqa: E731
    monkeypatch.setattr(planned_runs, "find_dataset", found)
    assert place.main("T", "--seeds=1", "--prepare=False") == 1
    assert place.names() == ["one-cpu-s1337"]
    assert "large-cpu-s1337: enwik8 is not prepared, and --prepare=False was given" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Failures and mistakes


def test_a_diverged_run_is_failed_and_not_tried_again(place, capfd):
    """Also where it diverged before its first checkpoint. After a change of its config it is another run."""
    folder = place.out / "one-cpu-s1337"
    config = a_row("one").config_at("cpu").to_dict()
    write(folder / "config.json", config)
    write(folder / "metrics.jsonl", '{"kind": "train", "step": 10, "loss": 2.0}\n')
    diverged = write(folder / "diverged.json", {"reason": "the loss at step 12", "config": config})
    for held in ([], ["ckpt.pt"]):
        for name in held:
            write(folder / name, "10")
        assert place.main("T", "--seeds=1") == 1
        assert place.names() == ["two-cpu-s1337"]
        told = capfd.readouterr().err
        assert "failed: one-cpu-s1337: the loss at step 12 is not finite, in an earlier try with the same" in told
        assert f"remove {diverged} to try it again" in told
    assert place.main("T", "--seeds=1", "--list") == 0
    assert "failed: the loss at step 12" in capfd.readouterr().out
    write(diverged, {"reason": "the loss at step 12", "config": {**config, "learning_rate": 0.5}})
    assert place.main("T", "--seeds=1") == 0 and place.names()[1:] == ["one-cpu-s1337"]


def test_a_failed_run_does_not_stop_the_rest_and_is_not_repeated(place, capfd):
    place.order(**{"one-cpu-s1337": {"exit": 3}, "two-cpu-s1337": {"exit": 2}, "one-cpu-s1338": {"kill": True}})
    assert place.main("T", "--seeds=2") == 1
    assert place.names() == ["one-cpu-s1337", "two-cpu-s1337", "one-cpu-s1338", "two-cpu-s1338"]
    assert place.kept() == ["T/two-cpu-s1338.json"]
    failed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed: ")]
    meanings = ("exit code 3; ", "exit code 2; ", "killed by SIGKILL; ")
    last_lines = ("the reason", "the reason", "trained a little")
    for line, name, meaning, last_line in zip(failed, place.names(), meanings, last_lines, strict=False):
        assert name in line and meaning in line and line.endswith(f"{name}.log: {last_line}")
    assert len(failed) == 3


def test_a_run_without_a_record_has_failed_even_with_exit_code_0(place, capfd):
    place.order(**{"one-cpu-s1337": {"exit": 0}})
    assert place.main("T", "--seeds=1") == 1
    assert "exit code 0, no summary.json; " in capfd.readouterr().err


BAD_WORDS = {
    "no table": ([], "which table?"),
    "an unknown table": (["t"], "t: no such table"),
    "a known table and two unknown ones": (["T", "V", "config/cpu.py"], "V: no such table; config/cpu.py: no such"),
    "no seeds": (["T", "--seeds=0"], "an integer from 1"),
    "a space": (["T", "--seeds", "3"], "expected --seeds=VALUE"),
    "a negative budget": (["T", "--budget_minutes=-1"], "a number from 0"),
    "a misspelt key": (["T", "--sedes=3"], "nearest key: seeds"),
    "another experiment": (["T", "--n_layer=3"], "--n_layer=3: would make another run than the table's"),
    "another experiment behind --": (["T", "--", "--max_iters=3"], "--max_iters=3: would make another run"),
    "another seed": (["T", "--seed=3"], "keys that are passed on: "),
    "another folder": (["T", "--out_dir=x"], "would make another run"),
    "a config file": (["T", "--", "config/cpu.py"], "would make another run"),
    "a bad value": (["T", "--device=gpu"], "expected auto, cpu"),
    "no jobs": (["T", "--jobs=0"], "an integer from 1"),
    "the plan and a table": (["plan", "T"], "plan goes alone, for it has an order of its own; leave out T, or plan"),
    "the plan with seeds": (["plan", "--seeds=3"], "the plan names the seeds of its runs"),
    "a pack in no folder": (["T", "--pack=/not/there/x.tar"], "--pack=/not/there/x.tar: there is no folder /not/there"),
    "a pack that is a folder": (["T", "--pack=/"], "--pack=/: is there and no tar"),
    "a pack that is another file": (["T", f"--pack={__file__}"], "test_sweep.py: is there and no tar"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_a_mistake_is_reported_before_anything_is_done(place, case):
    words, message = BAD_WORDS[case]
    with pytest.raises(ConfigError) as caught:
        place.main(*words)
    assert message in str(caught.value) and len(caught.value.problems) == 1
    assert not place.out.exists() and not place.results.exists()


def test_a_table_without_rows_at_this_scale_names_the_other_scale(place, monkeypatch):
    paper_only = Row("one", "one", "shakespeare_dense", scales=("paper",))
    monkeypatch.setattr(sweep, "TABLES", {"T": table("T", paper_only)})
    with pytest.raises(ConfigError, match="no rows at scale cpu; it has some with --scale=paper"):
        place.main("T")


@pytest.mark.parametrize("key", ["out", "results"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_run(place, key):
    write(getattr(place, key), "a file")
    with pytest.raises(FileError, match=f"could not be written: .*--{key}=… names another folder"):
        place.main("T")
    assert place.calls() == []


def test_without_file_locks_nothing_is_run(place, monkeypatch, capfd):
    monkeypatch.setattr(sweep.files, "fcntl", None)
    with pytest.raises(ConfigError, match="Windows"):
        place.main("T")
    assert place.main("T", "--list") == 0 and place.calls() == []


def test_the_help_page_names_the_tables_and_the_options(place):
    with pytest.raises(configurator.Message) as caught:
        sweep.main(["--help"])
    assert all(text in str(caught.value) for text in ("TABLE", "T, U, or all", "--budget_minutes", "--print_commands"))


# ---------------------------------------------------------------------------------------------------------------------
# Other machines


def test_records_of_another_machine_do_not_count_and_are_reported(place, capfd):
    """Nor does one with the same numbers under the name that ours would have."""
    theirs = write(place.results / "T" / "one-cpu-s1337.json", record_of(place, a_row("one"), 1337, device="Other CPU"))
    before = theirs.read_bytes()
    assert place.main("T", "--seeds=1") == 0
    assert place.names() == ["one-cpu-s1337", "two-cpu-s1337"] and theirs.read_bytes() == before
    assert place.kept() == ["T/one-cpu-2-s1337.json", "T/one-cpu-s1337.json", "T/two-cpu-s1337.json"]
    assert "in tables of their own: 1 record of other machines (Other CPU, " in capfd.readouterr().err
    assert place.main("T", "--seeds=1") == 0 and len(place.calls()) == 2
    assert not records.read_all(place.results)[1]


def test_a_complete_run_of_another_machine_is_left_alone(place, capfd):
    summary = record_of(place, a_row("one"), 1337, device="Other CPU")
    path = write(place.out / "one-cpu-s1337" / "summary.json", summary)
    assert place.main("T", "--seeds=1") == 1
    assert place.names() == ["two-cpu-s1337"] and json.loads(path.read_text()) == summary
    assert "holds a run of another machine (Other CPU, " in capfd.readouterr().err


def test_a_cut_run_of_another_machine_is_not_resumed_here(place, capfd):
    """Its record would not be straight, and so enter no mean."""
    folder = place.out / "one-cpu-s1337"
    write(folder / "config.json", {**a_row("one").config_at("cpu").to_dict(), "machine": "Other CPU", "straight": True})
    write(folder / "ckpt.pt", "10")
    assert place.main("T", "--seeds=1") == 1 and place.names() == ["two-cpu-s1337"]
    assert "holds a run of another machine (Other CPU)" in capfd.readouterr().err


def test_a_passed_on_backend_is_part_of_the_machine(place, words, monkeypatch):
    moe = row("moe", words, n_expert=2)
    monkeypatch.setattr(sweep, "TABLES", {"T": table("T", a_row("one"), moe)})
    machine = record_of(place, moe, 1337)["machine"]
    changes = sweep.changes_of(["--moe_backend=masked"])
    setup = planned_runs.Setup(place.out, place.results, ["--moe_backend=masked"], changes, machine)
    dense_run, moe_run = planned_runs.plan(sweep.TABLES, ["T"], "cpu", 1, setup, NO_RECORDS)
    assert moe_run.machine == f"{dense_run.machine}, masked backend"
    assert moe_run.config.hash() == moe.config_at("cpu").hash() and "--moe_backend=masked" in moe_run.arguments


@pytest.mark.parametrize(
    "device, dense, with_experts", [("cpu", "", ""), ("cuda", ", fused update", ", fused update, routing kernels")]
)
def test_kernels_asked_for_are_expected_of_the_machine(place, words, monkeypatch, device, dense, with_experts):
    """Only on CUDA, and routing in kernels only of models with experts."""
    moe = row("moe", words, n_expert=2)
    monkeypatch.setattr(sweep, "TABLES", {"T": table("T", a_row("one"), moe)})
    machine = record_of(place, moe, 1337)["machine"] | {"device_type": device}
    changes = sweep.changes_of(["--fused_update=True", "--routing_kernels=True"])
    for asked, expected in (({}, ["", ""]), (changes, [dense, with_experts])):
        setup = planned_runs.Setup(place.out, place.results, [], asked, machine)
        runs = planned_runs.plan(sweep.TABLES, ["T"], "cpu", 1, setup, NO_RECORDS)
        plain = records.machine_of({"machine": machine})
        assert [run.machine for run in runs] == [plain + names for names in expected]


def test_the_machine_is_the_one_that_train_would_choose():
    asked = MACHINE_HERE({"device": "cpu", "compile": True})
    assert asked["device_type"] == "cpu" and asked["compile"] is True and asked["cores"] == machines.core_count()


def test_a_missing_device_is_reported_in_one_line():
    with pytest.raises(ConfigError, match="device='cuda:99'") as caught:
        MACHINE_HERE({"device": "cuda:99"})
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
def test_a_sweep_creates_no_cuda_context(tmp_path):
    words = ["B", "--list", f"--out={tmp_path}", f"--results={tmp_path}"]
    code = f"import sweep, torch; sweep.main({words}); assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "B at scale paper" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


def test_two_sweeps_make_each_run_once(place):
    place.order(**{f"{name}-cpu-s{seed}": {"pause": 0.01} for name in ROWS for seed in range(1337, 1340)})
    sweeps = [place.begin("T", "--seeds=3") for _ in range(2)]
    for process in sweeps:
        process.join()
    assert [process.exitcode for process in sweeps] == [0, 0]
    assert len(place.calls()) == len(set(place.names())) == len(place.kept()) == 6


def test_a_run_that_outlives_its_sweep_stays_locked(place, capfd):
    place.order(**{"one-cpu-s1337": {"hold": 3}})
    killed = place.begin("T", "--seeds=1")
    wait_for(place.calls)
    killed.kill()
    killed.join()
    assert place.main("T", "--seeds=1") == 0
    assert place.names() == ["one-cpu-s1337", "two-cpu-s1337"]
    assert "one-cpu-s1337: running elsewhere: step" in capfd.readouterr().out
    assert place.main("T", "--seeds=1", "--list") == 0
    assert "one-cpu-s1337  running elsewhere" in capfd.readouterr().out
    (place.folder / "go").touch()
    wait_for((place.out / "one-cpu-s1337" / "summary.json").exists)
    wait_for(lambda: not planned_runs.is_locked(place.out / "one-cpu-s1337.lock"))
    assert place.main("T", "--seeds=1") == 0
    assert len(place.calls()) == 2 and len(place.kept()) == 2


def test_a_run_that_another_process_has_finished_meanwhile_is_counted_so_when_a_sweep_is_stopped(place, capfd):
    place.order(**{"two-cpu-s1337": {"pause": 0.05}})
    with open(write(place.out / "one-cpu-s1337.lock", ""), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = place.begin("T", "--seeds=1")
        wait_for((place.out / "two-cpu-s1337" / "ckpt.pt").exists)
        write(place.results / "T" / "one-cpu-s1337.json", record_of(place, a_row("one"), 1337))
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert "2 runs: 1 finished, 1 cut" in capfd.readouterr().out


def test_a_run_started_by_hand_is_not_disturbed(place, capfd):
    """train.py locks its metrics.jsonl."""
    metrics = write(place.out / "one-cpu-s1337" / "metrics.jsonl", "")
    with open(metrics, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert place.main("T", "--seeds=1") == 0
    assert place.names() == ["two-cpu-s1337"]
    assert "one-cpu-s1337: running elsewhere: step 0" in capfd.readouterr().out


@pytest.mark.parametrize("jobs, most", [(1, 1), (2, 2), (3, 3)])
def test_so_many_jobs_run_at_once_and_the_next_fills_the_place_of_one_that_ends(place, capfd, jobs, most):
    place.order(**{f"{name}-cpu-s{seed}": {"pause": 0.02} for name in ROWS for seed in (1337, 1338)})
    assert place.main("T", "--seeds=2", f"--jobs={jobs}") == 0
    assert place.most_at_once() == most and len(place.calls()) == len(place.kept()) == 4
    shown = capfd.readouterr().out
    assert "4 runs: 4 finished" in shown and all(f"[{i}/4]" in shown for i in range(1, 5))
    assert all(("--inference_samples=0" in words[-1:]) == (jobs > 1) for _, _, words in place.calls())


def test_a_failure_leaves_the_jobs_beside_it_alone(place, capfd):
    place.order(**{"one-cpu-s1337": {"exit": 3}, "two-cpu-s1337": {"pause": 0.05}, "one-cpu-s1338": {"kill": True}})
    assert place.main("T", "--seeds=2", "--jobs=3") == 1
    assert place.kept() == ["T/two-cpu-s1337.json", "T/two-cpu-s1338.json"] and len(place.calls()) == 4
    told = capfd.readouterr().err
    assert "failed: one-cpu-s1337: exit code 3; " in told and "failed: one-cpu-s1338: killed by SIGKILL; " in told


def test_one_signal_saves_and_ends_all_jobs(place, capfd):
    names = ["one-cpu-s1337", "two-cpu-s1337"]
    place.order(**{name: {"pause": 0.05} for name in names})
    process = place.begin("T", "--seeds=2", "--jobs=2")
    wait_for(lambda: all((place.out / name / "ckpt.pt").exists() for name in names))
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and sorted(place.names()) == names
    for _, pid, _ in place.calls():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    shown = capfd.readouterr().out
    assert all(f"stopping {name}, which saves" in shown for name in names)
    assert "4 runs: 2 cut, 2 missing" in shown
    place.order()
    assert place.main("T", "--seeds=2", "--jobs=2") == 0
    assert sorted("--init_from=resume" in words for _, _, words in place.calls()) == [False] * 4 + [True] * 2


def test_an_error_of_the_sweep_saves_and_ends_its_jobs(place, monkeypatch):
    """As where the disk of results/ is full."""
    place.order(**{"one-cpu-s1337": {"pause": 0.05}, "two-cpu-s1337": {"pause": 0.5}})

    def full(path, content):
        raise FileError("the disk is full")

    monkeypatch.setattr(running.files, "write_atomically", full)
    with pytest.raises(FileError, match="the disk is full"):
        place.main("T", "--seeds=1", "--jobs=2")
    with pytest.raises(ProcessLookupError):
        os.kill(place.calls()[1][1], 0)
    assert not planned_runs.is_locked(place.out / "two-cpu-s1337.lock")


def test_compilers_of_several_jobs_share_the_cores(place, monkeypatch):
    monkeypatch.setattr(running, "core_count", lambda: 8)
    monkeypatch.setattr(running.subprocess, "Popen", lambda words, **options: environments.append(options["env"]))
    environments = []
    for jobs in (1, 3):
        runner = running.Runner({}, types.SimpleNamespace(start=lambda run, state: None), [], jobs)
        place.out.mkdir(exist_ok=True)
        with open(place.folder / "lock", "ab") as lock:
            runner.start(place.first_run(), planned_runs.State("missing"), lock)
    assert [environment.get("TORCHINDUCTOR_COMPILE_THREADS") for environment in environments] == [None, "2"]


# ---------------------------------------------------------------------------------------------------------------------
# --pack


def packed(path):
    """The members of a tar, by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def metrics_in(pack, name):
    return [json.loads(line) for line in gzip.decompress(packed(pack)[f"{name}.metrics.jsonl.gz"]).splitlines()]


def test_a_pack_holds_what_was_made_and_what_was_there(place, monkeypatch):
    monkeypatch.setattr(running, "SECONDS_TO_START", 0)
    pack = place.folder / "made.tar"
    with tarfile.open(pack, "w") as tar:
        tar.add(write(place.folder / "before.json", "{}"), "before.json")
    place.order(**{"two-cpu-s1337": {"pause": 0.2}, "two-cpu-s1338": {"exit": 3}})
    write(place.results / "T" / "one-cpu-s1337.json", record_of(place, a_row("one"), 1337))
    assert place.main("T", "--seeds=2", "--jobs=3", "--budget_minutes=0.05", f"--pack={pack}") == 1
    names = ["before.json", "one-cpu-s1338.json", "one-cpu-s1338.metrics.jsonl.gz", "two-cpu-s1337.metrics.jsonl.gz"]
    assert sorted(packed(pack)) == [*names, "two-cpu-s1338.log"], "what was finished before is not in it"
    assert packed(pack)["one-cpu-s1338.json"] == (place.results / "T" / "one-cpu-s1338.json").read_bytes()
    assert packed(pack)["two-cpu-s1338.log"].endswith(b"the reason\n")
    whole = (place.out / "two-cpu-s1337" / "metrics.jsonl").read_text().splitlines()
    assert metrics_in(pack, "two-cpu-s1337") == [json.loads(line) for line in whole] and len(whole) < 20
    assert not list(place.folder.glob("*.partial"))


@pytest.mark.parametrize("damage", ["a pipe", "cut", "cut between files", "a damaged name", "compressed"])
def test_a_pack_of_which_something_would_be_lost_is_refused(place, damage):
    path = place.folder / "made.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.json", "b.json"):
            tar.add(write(place.folder / name, "{}"), name)
    whole = path.read_bytes()
    block = tarfile.BLOCKSIZE  # a.json, its content, b.json, its content
    contents = {
        "cut": whole[: 3 * block],
        "cut between files": whole[: 2 * block],
        "a damaged name": whole[: 2 * block] + b"x" + whole[2 * block + 1 :],
        "compressed": gzip.compress(whole),
    }
    path.unlink()
    path.write_bytes(contents[damage]) if damage in contents else os.mkfifo(path)
    with pytest.raises(ConfigError, match="made.tar: is there and no tar that is whole and uncompressed"):
        place.main("T", f"--pack={path}")


def test_a_machine_that_goes_away_leaves_a_pack_of_the_last_evaluation(place, monkeypatch):
    monkeypatch.setattr(pack_of, "PACK_SECONDS", 0)
    place.order(**{"one-cpu-s1337": {"pause": 0.1}})
    pack = place.folder / "made.tar"
    process = place.begin("T", "--seeds=1", f"--pack={pack}")
    evaluations = lambda: [line["step"] for line in metrics_in(pack, "one-cpu-s1337") if line["kind"] == "eval"]  # noqa: E731
    wait_for(lambda: pack.exists() and packed(pack) and evaluations() == [0, 10])
    process.kill()
    process.join()
    os.kill(place.calls()[0][1], signal.SIGKILL)
    assert evaluations() == [0, 10]


def test_a_pack_is_written_at_most_once_in_a_few_seconds(place, monkeypatch):
    times = []
    monkeypatch.setattr(pack_of, "write_atomically", lambda path, content: times.append(time.monotonic()))
    monkeypatch.setattr(pack_of, "PACK_SECONDS", 0.3)
    place.order(**{"one-cpu-s1337": {"pause": 0.05}})
    monkeypatch.setattr(pack_of, "EVALUATION", b"kind")  # as though each line were one
    assert place.main("T", "--seeds=1", f"--pack={place.folder / 'made.tar'}") == 0
    while_it_ran = times[: len(times) // 2]
    assert len(times) > 3 and all(b - a >= 0.3 for a, b in zip(while_it_ran, while_it_ran[1:], strict=False))


def test_a_pack_that_cannot_be_written_is_told_once_and_stops_nothing(place, monkeypatch, capfd):
    def full(path, content):
        raise FileError(f"{path} could not be written: the disk is full")

    monkeypatch.setattr(pack_of, "write_atomically", full)
    assert place.main("T", "--seeds=1", f"--pack={place.folder / 'made.tar'}") == 0
    assert len(place.kept()) == 2 and capfd.readouterr().out.count("the disk is full") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.fixture
def priorities(place, monkeypatch):
    """Row "three" is only in table U."""
    plan = (
        Priority(("two", "one"), (1337, 1338), "which of both is better"),
        Priority(("three",), (1341,), "whether three is"),
        Priority(("one", "absent"), (1338, 1339), "nothing new"),
    )
    monkeypatch.setattr(sweep, "PRIORITIES", plan)
    return ["two-cpu-s1337", "one-cpu-s1337", "two-cpu-s1338", "one-cpu-s1338", "three-cpu-s1341", "one-cpu-s1339"]


def test_the_plan_is_run_from_the_top_and_its_records_go_to_their_tables(place, priorities):
    write(place.results / "elsewhere" / "x-s1337.json", record_of(place, a_row("one"), 1337))
    assert place.main("plan") == 0
    assert place.names() == [name for name in priorities if name != "one-cpu-s1337"]
    homes = {"two": "T", "one": "T", "three": "U", "x": "elsewhere"}
    assert {name.rpartition("/")[2].split("-")[0]: name.partition("/")[0] for name in place.kept()} == homes
    assert place.main("plan") == 0 and len(place.calls()) == 5


def test_the_list_of_the_plan_tells_what_comes_next_and_what_each_run_decides(place, priorities, capfd):
    write(place.results / "T" / "two-cpu-s1337.json", record_of(place, a_row("two"), 1337, dirty=False, seconds=100.0))
    assert place.main("plan", "--list") == 0 and place.calls() == []
    _, *lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines[:-1] if not line.startswith(" ")] == [e.decides for e in sweep.PRIORITIES]
    assert [line.split()[0] for line in lines if line.startswith(" ")] == priorities
    assert lines[1].startswith("  two-cpu-s1337    finished: ")
    assert [line.split()[0] for line in lines if line.endswith(", next")] == ["one-cpu-s1337"]
    assert "  one-cpu-s1337    missing, 2 min 41 s by its FLOPs, next" in lines


@pytest.mark.parametrize("alone, jobs, started", [(False, 2, True), (True, 1, True), (True, 2, False)])
def test_with_a_budget_the_plan_starts_no_run_that_could_not_end(place, priorities, capfd, alone, jobs, started):
    """A record of a run that was alone counts for as many jobs as there are."""
    record = record_of(place, a_row("one"), 1340, dirty=False, seconds=100.0)
    record["others"] = {"cpu_share": 0.0 if alone else 0.5, "device_bytes": None}
    record["exclusive"] = alone
    write(place.results / "T" / "one-cpu-s1340.json", record)
    seconds = 100 + 10 * 500 / 99 + estimates.START_SECONDS
    assert place.main("plan", f"--budget_minutes={(seconds + 20) / 60}", f"--jobs={jobs}") == 0
    assert bool(place.calls()) == started
    told = capfd.readouterr().out
    assert ("No further run would end within the 3 min " in told) != started
    assert "no record tells" not in told


def test_the_plan_learns_from_its_own_runs_and_takes_a_shorter_run_where_a_longer_has_no_room(place, monkeypatch):
    made, long = place.first_run(), place.first_run()
    short = dataclasses.replace(long, config=dataclasses.replace(long.config, max_iters=2))
    missing = planned_runs.State("missing")
    forecast = estimates.Forecast({}, 2, seconds := {})
    assert forecast.is_guess and forecast.seconds(long, missing) < estimates.START_SECONDS + 1
    seconds[made] = 40.0
    assert forecast.seconds(long, missing) == pytest.approx(40 + estimates.START_SECONDS)
    assert forecast.seconds(short, missing) == pytest.approx(4 + estimates.START_SECONDS)
    other = dataclasses.replace(long, config=dataclasses.replace(long.config, weight_decay=0.3))
    seconds[other] = 90.0
    assert forecast.seconds(long, missing) == pytest.approx(40 + estimates.START_SECONDS), "of its own config"
    del seconds[other]
    halfway = planned_runs.State("cut", step=10)
    assert forecast.seconds(long, halfway) == pytest.approx(20 + estimates.START_SECONDS)
    runner = running.Runner({long: missing, short: missing}, None, [], deadline=time.monotonic() + 30)
    runner.fits = lambda run, state, left: forecast.seconds(run, state) <= left
    assert runner.next_of([long, short]) is short


def test_what_the_budget_leaves_of_the_plan_is_cut_and_packed(place, priorities, monkeypatch, capfd):
    monkeypatch.setattr(estimates, "START_SECONDS", 0)
    place.order(**{name: {"hold": 3} for name in priorities})
    over_when(monkeypatch, lambda: all((place.out / name / "ckpt.pt").exists() for name in priorities[:2]))
    pack = place.folder / "made.tar"
    assert place.main("plan", "--budget_minutes=600", "--jobs=2", f"--pack={pack}") == 0
    shown = capfd.readouterr().out
    assert "no record tells how long a run takes here: guessing 1 min 0 s for one at paper size, alone" in shown
    assert "6 runs: 2 cut, 4 missing" in shown and "The time is over. To go on: " in shown
    assert sorted(packed(pack)) == [f"{name}.metrics.jsonl.gz" for name in sorted(priorities[:2])]


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_a_run_stopped_by_the_budget_is_resumed_by_the_next_sweep(place, capfd, monkeypatch):
    monkeypatch.setattr(running, "SECONDS_TO_START", 0)
    place.order(**{"one-cpu-s1337": {"hold": 3}})
    over_when(monkeypatch, (place.out / "one-cpu-s1337" / "ckpt.pt").exists)
    assert place.main("T", "--seeds=1", "--budget_minutes=600") == 0
    shown = capfd.readouterr().out
    assert "cut: step" in shown and "2 runs: 1 cut, 1 missing" in shown and "The time is over. To go on: " in shown
    place.order()
    assert place.main("T", "--seeds=1") == 0
    assert place.names() == ["one-cpu-s1337", "one-cpu-s1337", "two-cpu-s1337"]
    assert "--init_from=resume" in place.calls()[1][2]
    assert records.read(place.results / "T" / "one-cpu-s1337.json")["resumed"] == 1
    assert "one-cpu-s1337: goes on at step" in capfd.readouterr().out


def test_no_run_is_started_in_the_last_minute(place):
    assert place.main("T", "--budget_minutes=0.9") == 0
    assert place.calls() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_it_has_saved(place, number, capfd):
    place.order(**{"one-cpu-s1337": {"pause": 0.05}})
    process = place.begin("T", "--seeds=1")
    wait_for((place.out / "one-cpu-s1337" / "ckpt.pt").exists)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number and place.names() == ["one-cpu-s1337"]
    with pytest.raises(ProcessLookupError):
        os.kill(place.calls()[0][1], 0)
    assert f"Stopped by {number.name}. To go on: " in capfd.readouterr().out


def test_a_second_signal_kills_a_run_that_does_not_stop(place, capfd):
    place.order(**{"one-cpu-s1337": {"pause": 5, "deaf": True}})
    process = place.begin("T", "--seeds=1")
    wait_for((place.out / "one-cpu-s1337" / "ckpt.pt").exists)
    os.kill(process.pid, signal.SIGINT)
    said = []
    wait_for(lambda: said.append(capfd.readouterr().out) or "stopping one-cpu-s1337" in "".join(said))
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(place.calls()[0][1], 0)


def test_a_real_run_is_stopped_resumed_and_recorded(place, words, monkeypatch, capfd):
    """With the real train.py, on the machine that the sweep foresees."""
    machine = MACHINE_HERE({"device": "cpu"})
    monkeypatch.setattr(sweep, "machine_here", lambda changes: machine)
    monkeypatch.setattr(running, "TRAIN", ROOT / "train.py")
    monkeypatch.setattr(sweep, "TABLES", {"T": table("T", row("real", words, max_iters=200, eval_interval=200))})
    passed_on = ["--device=cpu", "--inference_samples=0", "--log_interval=5"]
    process = place.begin("T", "--seeds=1", *passed_on)
    metrics = place.out / "real-cpu-s1337" / "metrics.jsonl"
    wait_for(lambda: planned_runs.last_logged(metrics)[0] >= 5)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and not (place.out / "real-cpu-s1337" / "summary.json").exists()
    assert place.main("T", "--seeds=1", "--list", *passed_on) == 0
    assert "real-cpu-s1337  cut: step " in capfd.readouterr().out
    assert place.main("T", "--seeds=1", *passed_on) == 0
    pairs, left_out = records.read_all(place.results)
    assert [path.name for path, _ in pairs] == ["real-cpu-s1337.json"] and not left_out
    assert pairs[0][1]["resumed"] == 1 and pairs[0][1]["iterations"] == 200


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def test_the_list_shows_states_and_time_left(place, capfd):
    write(place.results / "T" / "one-cpu-s1337.json", record_of(place, a_row("one"), 1337, dirty=False, seconds=100.0))
    write(place.results / "T" / "two-cpu-s1337.json", record_of(place, a_row("two"), 1337, dirty=True, seconds=900.0))
    folder = place.out / "one-cpu-s1338"
    write(folder / "config.json", a_row("one").config_at("cpu", 1338).to_dict())
    write(folder / "ckpt.pt", "")
    write(folder / "metrics.jsonl", '{"kind": "train", "step": 10, "loss": 2.0}\n{"kind": "tra')
    before = sorted(place.folder.rglob("*"))
    assert place.main("T", "--seeds=2", "--list") == 0
    assert sorted(place.folder.rglob("*")) == before
    shown = capfd.readouterr()
    assert "1 run finished with uncommitted changes, so in no mean" in shown.err
    lines = shown.out.splitlines()[1:]
    assert lines[0].startswith("one-cpu-s1337  finished: ") and lines[0].endswith("results/T/one-cpu-s1337.json")
    assert lines[1].endswith(" (uncommitted changes)")
    writing = 10 * 500 / 99  # seconds that the record's total does not have in it
    start = estimates.START_SECONDS
    times = [console.duration((100 + writing) * part + starts * start) for part, starts in ((0.5, 1), (1, 1), (1.5, 2))]
    assert lines[2] == f"one-cpu-s1338  cut: step 10 of 20, {times[0]} as measured"
    assert lines[3] == f"two-cpu-s1338  missing, {times[1]} by its FLOPs"
    assert lines[4] == f"4 runs: 2 finished, 1 cut, 1 missing; left: {times[2]}, on {place.first_run().machine}"


def test_the_list_estimates_nothing_from_another_machine_or_an_unclean_record(place, capfd):
    """One row, one seed: of it there are a clean record of another machine and an unclean one of ours."""
    for device, dirty in (("Other CPU", False), (None, True)):
        record = record_of(place, a_row("one"), 1337, dirty=dirty, seconds=100.0, device=device)
        write(place.results / f"T{dirty}" / "one-cpu-s1337.json", record)
    assert place.main("T", "--seeds=1", "--list") == 0
    assert "2 runs: 1 finished, 1 missing; left: 1 run of unknown length, on " in capfd.readouterr().out


def test_printed_commands_make_the_same_records(place, capfd):
    """One that is missing, one to go on with, one only to be copied; none for what is finished."""
    write(place.results / "T" / "one-cpu-s1337.json", record_of(place, a_row("one"), 1337))
    write(place.out / "two-cpu-s1337" / "summary.json", record_of(place, a_row("two"), 1337))
    write(place.out / "one-cpu-s1338" / "config.json", a_row("one").config_at("cpu", 1338).to_dict())
    write(place.out / "one-cpu-s1338" / "ckpt.pt", "10")
    assert place.main("T", "--seeds=2", "--print_commands", "--device=cpu") == 0
    printed = capfd.readouterr().out
    assert len(printed.splitlines()) == 3 and place.calls() == []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-e"], input=printed, text=True, check=True, cwd=ROOT, env={**os.environ, "PATH": path})
    assert place.names() == ["one-cpu-s1338", "two-cpu-s1338"] and "--init_from=resume" in place.calls()[0][2]
    pairs, left_out = records.read_all(place.results)
    assert not left_out and {record["run_id"] for _, record in pairs} == {
        a_row(name).config_at("cpu", seed).run_id for name in ROWS for seed in (1337, 1338)
    }
    assert place.main("T", "--seeds=2") == 0 and len(place.calls()) == 2


def test_a_terminal_shows_a_bar_over_the_whole_table(place, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    place.order(**{"two-cpu-s1337": {"pause": 0.02}})
    write(place.results / "T" / "one-cpu-s1337.json", record_of(place, a_row("one"), 1337))
    assert place.main("T", "--seeds=1") == 0
    shown = sys.stderr.getvalue()
    assert "20/40" in shown and "40/40" in shown and "two-cpu-s1337, loss 2.500 nats" in shown


def test_planned_runs_of_all_tables_have_unique_names_that_records_may_have(dense_run):
    machine = json.loads((dense_run / "summary.json").read_text())["machine"]
    setup = planned_runs.Setup(Path("out"), Path("results"), [], {}, machine)
    runs = planned_runs.plan(sweep.TABLES, ["all"], "cpu", 2, setup, NO_RECORDS)
    assert len({run.name for run in runs}) == len({run.key for run in runs}) == len(runs)
    assert all(run.name.endswith(f"-s{run.config.seed}") for run in runs)
