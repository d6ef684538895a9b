"""The runs that tables ask for, and the state of each: finished, interrupted, missing, running in another process.

    setup = Setup(ROOT / "out", ROOT / "results", [], {}, machine)
    kept = read_results(setup.results)
    runs = plan(TABLES, ["B"], "cpu", 5, setup, kept)
    states = states_of(runs, kept)

A planned run is one row of a table with one seed. It is finished when results/ holds its record, made on the same kind
of machine, in whichever table's folder. Nothing here starts a run; sweep.py does. Only what draws must do without
torch: this module imports data.common, which needs it.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.common import DataError, find_dataset, is_prepared, prepare_command
from papers import tuning
from papers.priorities import Priority
from papers.table import FIRST_SEED
from run import checkpoint, identity, records, run_folder
from run.records import RecordError
from run.settings import Config
from support import files
from support.files import ROOT, shown_path

# "to be copied": complete in out/, but its record is not in results/ yet. "cannot be run": its data set is not
# prepared, or running it would destroy another run. "failed": also where its loss is known to become not finite.
KINDS = ("finished", "to be copied", "running elsewhere", "cut", "missing", "failed", "cannot be run")
WORTH_TRYING = ("to be copied", "running elsewhere", "cut", "missing")


class Setup(NamedTuple):
    """What all planned runs share."""

    out: Path  # folder of the runs
    results: Path  # folder of the records
    words: list[str]  # further arguments of train.py
    changes: dict  # what these words change in a Config
    machine: dict  # from machines.describe


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One row of a table with one seed."""

    name: str  # of its folder and of its record
    folder: Path
    home: Path  # the folder of its record
    arguments: list[str]  # of train.py, without those in State.words
    config: Config
    machine: str  # the kind of machine that would run it now, see records.machine_of

    @property
    def key(self):
        return self.config.run_id, self.machine

    @property
    def lock(self):
        return self.folder.with_name(f"{self.name}.lock")


class State(NamedTuple):
    """The state of a planned run."""

    kind: str  # one of KINDS
    text: str = ""  # where its record is, how far it is, or why it cannot be run
    step: int = 0  # updates made
    words: tuple[str, ...] = ()  # arguments for train.py to continue or replace the run in its folder

    def __str__(self):
        return f"{self.kind}: {self.text}" if self.text else self.kind


class KeptRecords(NamedTuple):
    """The records in results/, by (run_id, kind of machine)."""

    counted: dict[tuple, tuple[Path, dict]]
    aside: dict[tuple, list[Path]]  # records that read_all leaves out: misnamed, or contradicting each other
    left_out: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def distinct_rows(tables, scale):
    """{hash of a config: (table's name, row)}. Where rows share a run, the first one stands."""
    rows = {}
    for table in tables:
        for row in table.experiments_at(scale):
            rows.setdefault(row.config_at(scale).hash(), (table.name, row))
    return rows


def plan(tables, names, scale, seeds, setup, kept) -> list[PlannedRun]:
    """The runs of the named tables ("all" for all of `tables`), first seeds first.

    A run that several rows share is planned once, under the name of the first such row in `tables`. kept: of
    setup.results; a tuned row asks for more as its candidates' losses become known.
    """
    everywhere = distinct_rows(tables.values(), scale)
    named = tables.values() if "all" in names else [tables[name] for name in names]
    homes = everywhere if "all" in names else distinct_rows(named, scale)
    needed = {}  # (seed, hash of a config) -> whether the run must be made on this machine
    for table in named:
        for row in table.rows_at(scale):
            pairs, losses = itertools.product([row.name], range(FIRST_SEED, FIRST_SEED + seeds)), {}
            if row.candidates:
                losses = losses_of(row, scale, kept)
                pairs = tuning.asked(losses, row.reserve.get(scale, 0), seeds)
            hash_of = {experiment.name: experiment.config_at(scale).hash() for experiment in row.experiments_at(scale)}
            for name, seed in pairs:
                is_known = seed in losses.get(name, {})  # the machine does not matter to a choice
                key = seed, hash_of[name]
                needed[key] = needed.get(key, False) or not is_known
    runs = {
        planned_run(everywhere[hash][1], homes[hash][0], scale, seed, setup): here
        for (seed, hash), here in sorted(needed.items(), key=lambda item: item[0][0])
    }
    return [run for run, here in runs.items() if here or run.key in kept.counted]


def losses_of(row, scale, kept) -> tuning.Losses:
    """The losses of a tuned row's candidates on the seeds by which one is chosen, from the records of any machine."""
    losses = {}
    for candidate in row.experiments_at(scale):
        run_ids = {candidate.config_at(scale, seed).run_id: seed for seed in tuning.CHOOSING}
        found = {}
        for (run_id, _), (_, record) in kept.counted.items():
            if run_id in run_ids and records.is_clean(record):
                found.setdefault(run_ids[run_id], []).append(record["clean"]["best"]["nats"])
        losses[candidate.name] = {seed: statistics.fmean(nats) for seed, nats in found.items()}
    return losses


def by_priority(tables, priorities, scale, setup) -> dict[PlannedRun, Priority]:
    """The runs of a list of priorities in its order, each with the first entry that asks for it.

    Rows are those of `tables`, and records belong to the table that has the row first; rows without this scale are
    left out.
    """
    everywhere = distinct_rows(tables.values(), scale)
    hash_of = {row.name: hash for hash, (_, row) in everywhere.items()}
    asked = {}
    for priority in priorities:
        for seed, name in itertools.product(priority.seeds, priority.rows):
            if name in hash_of:
                asked.setdefault((hash_of[name], seed), priority)
    runs = {}
    for (hash, seed), priority in asked.items():
        home, row = everywhere[hash]
        runs[planned_run(row, home, scale, seed, setup)] = priority
    return runs


def planned_run(row, home, scale, seed, setup) -> PlannedRun:
    """home: the name of the table whose folder gets the record."""
    config = dataclasses.replace(row.config_at(scale), seed=seed, **setup.changes)
    name = row.cell(scale, seed)
    folder = free_folder(setup.out / name, config)
    arguments = [*row.arguments(scale, seed), f"--out_dir={from_root(folder)}", *setup.words]
    machine = records.machine_of({"machine": setup.machine, "config": config.to_dict()})
    return PlannedRun(name, folder, setup.results / home, arguments, config, machine)


def free_folder(folder, config):
    """The folder, or the first one like it with a number that holds no other run than this one."""
    return next(path for path in numbered(folder) if not holds_another(path, config))


def holds_another(folder, config):
    """Whether a folder holds another experiment, or a run of this one that is not straight."""
    held = {name for name in checkpoint.RUN_FILES if (folder / name).exists()}
    try:
        if "summary.json" in held:
            record = records.read(folder / "summary.json")
            return record["run_id"] != config.run_id or not records.is_straight(record)
        if held & {"ckpt.pt", "ckpt.previous.pt", "best.pt"}:
            found = identity.read(folder / "config.json")
            return found.config.run_id != config.run_id or not found.straight
    except (OSError, ValueError):
        pass  # state_of_folder says why it cannot be used
    return False


def numbered(path):
    """A path named …-s<seed>, and then the same with a number before the seed: a-s1, a-2-s1, a-3-s1, …"""
    yield path
    start, _, end = path.name.rpartition("-s")
    for number in itertools.count(2):
        yield path.with_name(f"{start}-{number}-s{end}")


def from_root(path):
    """A path as a command in the project's root takes it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def record_path(run):
    """An unused path for the run's record: a damaged file, or a record of another machine, keeps its name."""
    return next(path for path in numbered(run.home / f"{run.name}.json") if not path.exists())


# ---------------------------------------------------------------------------------------------------------------------
# States


def read_results(folder) -> KeptRecords:
    pairs, left_out = records.read_all(folder)
    pairs.sort(key=lambda pair: records.is_clean(pair[1]))  # of two records of one run, a clean one comes last and wins
    bent = [(path, record) for path, record in pairs if not records.is_straight(record)]
    left_out += [f"{path.relative_to(folder.parent)}: {records.why_not_straight(record)}" for path, record in bent]
    aside = {}
    for path in sorted({*folder.glob("*/*.json")} - {path for path, _ in pairs}):
        with contextlib.suppress(RecordError):
            aside.setdefault(record_key(records.read(path)), []).append(path)
    pairs = [pair for pair in pairs if records.is_straight(pair[1])]
    return KeptRecords({record_key(record): (path, record) for path, record in pairs}, aside, left_out)


def record_key(record):
    return record["run_id"], records.machine_of(record)


def states_of(runs, kept) -> dict[PlannedRun, State]:
    """The state of each run, including those that another process is running."""
    states = {}
    for run in runs:
        states[run] = state_of(run, kept)
        if states[run].kind != "finished" and is_locked(run.lock):
            states[run] = running_elsewhere(run)
    return states


def state_of(run, kept) -> State:
    """The state of a run, from results/ and its folder."""
    if run.key in kept.counted:
        path, record = kept.counted[run.key]
        unclean = "" if records.is_clean(record) else " (uncommitted changes)"
        return State("finished", shown_path(path) + unclean, run.config.max_iters)
    if run.key in kept.aside:  # one more record would not tell which of them counts
        names = ", ".join(map(shown_path, kept.aside[run.key]))
        return State("cannot be run", f"{names}: left out; keep one, named …-s{run.config.seed}.json")
    state = state_of_folder(run)
    problem = state.kind in ("missing", "cut") and data_problem(run.config)
    return State("cannot be run", problem, state.step) if problem else state


def state_of_folder(run) -> State:
    """The state of a run, from its folder alone. "cannot be run" where running it would destroy another run."""

    def holds(what):
        text = f"its folder in {shown_path(run.folder.parent)} holds {what}; move it away, or give another --out=…"
        return State("cannot be run", text)

    held = {name for name in checkpoint.RUN_FILES if (run.folder / name).exists()}
    if is_locked(run.folder / "metrics.jsonl"):
        return running_elsewhere(run)
    if "summary.json" in held:
        try:
            record = records.read(run.folder / "summary.json")
        except RecordError as error:
            return holds(f"a complete run whose record cannot be used ({error})")
        run_id, machine = record_key(record)
        if run_id == run.config.run_id and not records.is_straight(record):
            return holds(records.why_not_straight(record))
        if (run_id, machine) == run.key:
            return State("to be copied", step=run.config.max_iters)
        is_ours = run_id == run.config.run_id
        return holds(f"a run of another machine ({machine})" if is_ours else f"another experiment ({run_id})")
    try:
        reason = run_folder.last_divergence(run.folder, run.config)
    except (OSError, ValueError, KeyError, TypeError):
        return holds("a diverged.json that cannot be read")
    if reason:
        step, _ = last_logged(run.folder / "metrics.jsonl")
        again = f"remove {shown_path(run.folder / 'diverged.json')} to try it again"
        return State("failed", f"{reason} is not finite, in an earlier try with the same settings; {again}", step)
    if not held & {"ckpt.pt", "ckpt.previous.pt", "best.pt"}:  # stopped before its first checkpoint: nothing is lost
        return State("missing", words=("--overwrite=True",) if held else ())
    try:
        found = identity.read(run.folder / "config.json")
    except (OSError, ValueError):
        return holds("another experiment (its config.json cannot be read)")
    if found.config.run_id != run.config.run_id:
        return holds(f"another experiment ({found.config.run_id})")
    if not found.straight:
        return holds("a run that is not straight")
    if found.machine not in (None, run.machine):
        return holds(f"a run of another machine ({found.machine})")
    if not held & {"ckpt.pt", "ckpt.previous.pt"}:
        return holds("a best.pt, but no ckpt.pt to resume from")
    step, _ = last_logged(run.folder / "metrics.jsonl")
    return State("cut", f"step {step:,} of {run.config.max_iters:,}", step, ("--init_from=resume",))


def running_elsewhere(run) -> State:
    step, _ = last_logged(run.folder / "metrics.jsonl")
    return State("running elsewhere", f"step {step:,}", step)


def last_logged(metrics):
    """(step, loss in nats) of the last complete line of a metrics.jsonl that may be growing; (0, None) without one."""
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError:  # also where it goes between two looks
        lines = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            return values["step"], values["loss"] if values["kind"] == "train" else values["clean"]["nats"]
    return 0, None


def data_problem(config):
    """Why train.py could not open its data set, or "". It prepares those with a prepare.py, if config.prepare."""
    dataset = config.dataset
    try:
        folder = find_dataset(dataset)
    except DataError as error:
        if not dataset.endswith("_head"):
            return str(error)
        return f"data/{dataset} is not prepared; prepare it with: {prepare_command(ROOT / 'data' / dataset)}"
    return "" if config.prepare or is_prepared(folder) else f"{dataset} is not prepared, and --prepare=False was given"


# ---------------------------------------------------------------------------------------------------------------------
# Locks


def is_locked(path):
    """Whether a sweep, or a run, holds a lock on the file."""
    if not path.exists():
        return False
    with open(path, "rb") as file:  # shared, so that two processes that look do not collide
        return files.lock(file, is_shared=True) is False


def take_lock(path):
    """The open lock file of a run, or None where another process holds it.

    train.py inherits the file, and the lock lasts until both have closed it: a run that outlives its sweep stays
    locked. Lock files are never removed, for then two sweeps could each hold a lock of the same name.
    """
    file = open(path, "ab")
    if files.lock(file) is not False:
        return file
    file.close()
