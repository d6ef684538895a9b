"""Run what is missing of tables of experiments.py: every row with every seed, on this machine.

    python sweep.py B                           5 seeds; at the papers' size on a GPU, else CPU size
    python sweep.py B A C --budget_minutes=60   these tables, for an hour; the same command goes on
    python sweep.py all                         every table
    python sweep.py B --list                    what is finished, cut, missing; how long it takes
    python sweep.py B --print_commands          a shell line a missing run, as for GNU parallel
    python sweep.py B --device=cuda:1           keys of the machine are handed on to train.py

Every row of them gets its first seed before any gets a second. A cell, which is a row with a seed, is
finished when results/ holds its record, made on this kind of machine (tables never mix two), in
whichever table's folder: a run that several tables share is made once. A run is train.py's, in
out/CELL, with its output in out/CELL.log; its record is copied to results/TABLE/CELL.json. Ctrl-C
saves and ends, and the same command goes on. Any number of sweeps can share the work: none runs
what another one is running.

Exit codes: 0 done, or the budget is over; 1 a run failed or cannot be made; 2 a mistake in what was
asked; 128 + n stopped by signal n (130 SIGINT, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP).
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from data.common import DataError, find, is_prepared
from papers.experiments import FIRST_SEED, SCALES, SEEDS_FOR_A_VERDICT, TABLES
from run import accounting, checkpoint, records
from run.records import RecordError
from run.settings import Config
from support import configurator, console, files, machines
from support.files import ROOT, FileError, shown_path
from support.options import MACHINE, ConfigError, option, options_of

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two sweeps apart
    fcntl = None

TRAIN = ROOT / "train.py"
SET_HERE = ("out_dir", "init_from", "overwrite", "eval_only", "title")  # keys of the machine that are not handed on
POLL_SECONDS = 0.5
SECONDS_TO_START = 60  # with less than this left of the budget, a run would hardly get beyond its start
CHARACTERS_WRITTEN = 500  # of each text of inference_samples
# to be copied: in out/, but not in results/ yet; cannot be run: has no data, or would destroy another run
KINDS = ("finished", "to be copied", "running elsewhere", "cut", "missing", "failed", "cannot be run")
# Run in a process of its own: a CUDA context of ours would be memory that others hold, to the runs that we measure.
DESCRIBE = """
import json
import sys
from support import machines

try:
    print(json.dumps(machines.describe(machines.choose(*json.loads(sys.argv[1])))))
except (ValueError, RuntimeError) as error:
    sys.exit(str(error).partition("\\n")[0])
"""


@dataclass(frozen=True)
class Options:
    """What follows the tables' names; further keys are train.py's."""

    seeds: int = option(SEEDS_FOR_A_VERDICT, f"how many, counted from {FIRST_SEED}", at_least=1, at_most=1000)
    scale: Literal["auto", "paper", "cpu"] = option("auto", "auto: paper on a CUDA device, else cpu")
    budget_minutes: float = option(0.0, "then save the run that is being made and end; 0 = no limit", at_least=0)
    list: bool = option(False, "show every cell and how long the rest takes, and run nothing")
    print_commands: bool = option(False, "print a shell line a missing run, and run nothing")
    out: str = option("", "folder of the runs; empty = out/ of this project")
    results: str = option("", "folder of the records; empty = results/ of this project")


class Here(NamedTuple):
    """What all cells share."""

    out: Path
    results: Path
    words: list[str]  # for train.py
    changes: dict  # of its Config, that they make
    machine: dict  # as machines.describe does it


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a table."""

    name: str  # of its folder and of its record
    folder: Path
    home: Path  # its record's folder
    arguments: list[str]  # of train.py, but for a State's
    config: Config
    machine: str  # the kind that would make its run now

    @property
    def key(self):
        return self.config.run_id, self.machine

    @property
    def lock(self):
        return self.folder.with_name(f"{self.name}.lock")


class State(NamedTuple):
    """How a cell stands."""

    kind: str  # of KINDS
    text: str = ""  # where, or why
    step: int = 0  # updates made
    words: tuple[str, ...] = ()  # what train.py must be told of a run that is there

    def __str__(self):
        return f"{self.kind}: {self.text}" if self.text else self.kind


class Kept(NamedTuple):
    """What results/ holds; a key is (run_id, machine)."""

    counted: dict[tuple, tuple[Path, dict]]
    aside: dict[tuple, list[Path]]  # records that read_all leaves out: misnamed ones, and those that differ
    left_out: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for


def asked_for(argv):
    """(names of tables, scale, options, Here)"""
    names, ours, handed_on = divided(argv)
    options = configurator.parse(
        Options,
        ours,
        usage="python sweep.py TABLE … [--key=value …] [-- --key=value of train.py …]",
        description=f"{__doc__.rstrip()}\n\nTables: {', '.join(TABLES)}, or all",
    )
    out = Path(options.out).resolve() if options.out else ROOT / "out"
    results = Path(options.results).resolve() if options.results else ROOT / "results"
    changes = changes_of(handed_on)
    here = Here(out, results, handed_on, changes, machine_here(changes))
    scale = options.scale if options.scale != "auto" else "paper" if here.machine["device_type"] == "cuda" else "cpu"
    check_tables(names, scale)
    return names, scale, options, here


def divided(argv):
    """(names of tables, words for us, words for train.py)"""
    cut = argv.index("--") if "--" in argv else len(argv)
    names, ours, theirs, before = [], [], argv[cut + 1 :], ""
    for word in argv[:cut]:
        # "--seeds 3", of which the configurator complains; a flag such as --list takes no value
        key = options_of(Options).get(before.removeprefix("--"))
        may_be_value = before.startswith("-") and "=" not in before and not (key and bool in key.kinds)
        if word in (*TABLES, "all") or not (word.startswith("-") or may_be_value):
            names.append(word)
        else:
            is_theirs = word.startswith("--") and word[2:].partition("=")[0] in options_of(Config)
            (theirs if is_theirs else ours).append(word)
        before = word
    return list(dict.fromkeys(names)), ours, theirs


def changes_of(words):
    """{key: value} of train.py's words. Refuses those that would make another experiment of a row."""
    options = options_of(Config)
    allowed = [name for name, option in options.items() if option.scope == MACHINE and name not in SET_HERE]
    keys = {word: word[2:].partition("=")[0] for word in words}
    problems = [
        f"{word}: would make another run than the table's; handed on are {', '.join(allowed)}"
        for word, key in keys.items()
        if not word.startswith("--") or (key in options and key not in allowed)
    ]
    if problems:
        raise ConfigError(problems)
    asked = configurator.parse(Config, words)
    return {key: getattr(asked, key) for key in keys.values()}


def check_tables(names, scale):
    """Refuses a name that is no table's, and a table that has nothing to run at the scale."""
    unknown = [f"{name}: no such table" for name in names if name not in (*TABLES, "all")]
    if unknown or not names:
        what = "; ".join(unknown) or "which table?"
        raise ConfigError([f"{what}; expected python sweep.py TABLE …, some of {', '.join(TABLES)}, or all"])
    for name in names:
        if name != "all" and not TABLES[name].rows_at(scale):
            other = next(other for other in SCALES if TABLES[name].rows_at(other))
            raise ConfigError([f"table {name} has no rows at scale {scale}; it has some with --scale={other}"])


def machine_here(changes):
    """The description of the machine that train.py would choose with these changes."""
    keys = json.dumps([changes.get(key, "auto") for key in ("device", "dtype", "compile")])
    done = subprocess.run([sys.executable, "-c", DESCRIBE, keys], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError([f"what train.py would run on: {problem}"])
    return json.loads(done.stdout)


def runs_of(tables, scale):
    """{hash of a config: (table's name, row)}; of those that share a run, the first."""
    runs = {}
    for table in tables:
        for row in table.rows_at(scale):
            runs.setdefault(row.config_at(scale).hash(), (table.name, row))
    return runs


def cells_of(names, scale, seeds, here):
    """In the order in which they are run. A run that rows of several names share has the name of the first of all."""
    everywhere = runs_of(TABLES.values(), scale)
    homes = everywhere if "all" in names else runs_of([TABLES[name] for name in names], scale)
    cells = []
    for seed, (hash, (home, _)) in itertools.product(range(FIRST_SEED, FIRST_SEED + seeds), homes.items()):
        _, row = everywhere[hash]
        config = dataclasses.replace(row.config_at(scale), seed=seed, **here.changes)
        name = row.cell(scale, seed)
        arguments = [*row.arguments(scale, seed), f"--out_dir={from_root(here.out / name)}", *here.words]
        machine = records.machine_of({"machine": here.machine, "config": config.to_dict()})
        cells.append(Cell(name, here.out / name, here.results / home, arguments, config, machine))
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# How cells stand


def read_results(folder):
    pairs, left_out = records.read_all(folder)
    pairs.sort(key=lambda pair: records.is_clean(pair[1]))  # of a clean record and one that is not, the clean one
    aside = {}
    for path in sorted({*folder.glob("*/*.json")} - {path for path, _ in pairs}):
        with contextlib.suppress(RecordError):
            aside.setdefault(key_of(records.read(path)), []).append(path)
    return Kept({key_of(record): (path, record) for path, record in pairs}, aside, left_out)


def key_of(record):
    return record["run_id"], records.machine_of(record)


def states_of(cells, kept):
    """{cell: State}, with what others are running."""
    states = {}
    for cell in cells:
        states[cell] = look(cell, kept)
        if states[cell].kind != "finished" and is_held(cell.lock):
            states[cell] = running(cell)
    return states


def look(cell, kept):
    """The State of a cell, as results/ and its folder tell."""
    if cell.key in kept.counted:
        path, record = kept.counted[cell.key]
        unclean = "" if records.is_clean(record) else " (uncommitted changes)"
        return State("finished", f"{shown_path(path)}{unclean}", cell.config.max_iters)
    if cell.key in kept.aside:  # one more would not tell which of them counts
        names = ", ".join(map(shown_path, kept.aside[cell.key]))
        return State("cannot be run", f"{names}: left out; keep one, named …-s{cell.config.seed}.json")
    state = look_at_folder(cell)
    problem = data_problem(cell.config) if state.kind in ("missing", "cut") else ""
    return State("cannot be run", problem, state.step) if problem else state


def look_at_folder(cell):
    """The State of a cell, as its folder tells; one that cannot be run where that would destroy something."""

    def holds(what):
        text = f"its folder in {shown_path(cell.folder.parent)} holds {what}; move it away, or give another --out=…"
        return State("cannot be run", text)

    held = {name for name in checkpoint.RUN_FILES if (cell.folder / name).exists()}
    if is_held(cell.folder / "metrics.jsonl"):
        return running(cell)
    if "summary.json" in held:
        try:
            run_id, machine = key_of(records.read(cell.folder / "summary.json"))
        except RecordError as error:
            return holds(f"a complete run whose record is of no use ({error})")
        if (run_id, machine) == cell.key:
            return State("to be copied", step=cell.config.max_iters)
        is_ours = run_id == cell.config.run_id
        return holds(f"a run of another machine ({machine})" if is_ours else f"another experiment ({run_id})")
    if not held & {"ckpt.pt", "ckpt.previous.pt", "best.pt"}:  # cut before its first checkpoint: nothing is lost
        return State("missing", words=("--overwrite=True",) if held else ())
    run_id = run_id_of(cell.folder / "config.json")
    if run_id != cell.config.run_id:
        return holds(f"another experiment ({run_id or 'its config.json cannot be read'})")
    if not held & {"ckpt.pt", "ckpt.previous.pt"}:
        return holds("a best.pt, but no ckpt.pt to go on from")
    step, _ = last_of(cell.folder / "metrics.jsonl")
    return State("cut", f"step {step:,} of {cell.config.max_iters:,}", step, ("--init_from=resume",))


def running(cell):
    step, _ = last_of(cell.folder / "metrics.jsonl")
    return State("running elsewhere", f"step {step:,}", step)


def run_id_of(path):
    """Of the run whose config.json this is; None where it cannot be read."""
    try:
        return Config.from_dict(json.loads(path.read_text())).run_id
    except (OSError, ValueError):
        return None


def last_of(metrics):
    """(step, loss) of the last whole line of a metrics.jsonl, which may be growing; (0, None) where there is none."""
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            return values["step"], values["loss"] if values["kind"] == "train" else values["clean"]["nats"]
    return 0, None


def data_problem(config):
    """Why train.py could not have its data set, or ""; it prepares one that has a prepare.py, if config.prepare."""
    dataset = config.dataset
    try:
        folder = find(dataset)
    except DataError as error:
        base = dataset.removesuffix("_head")
        if base == dataset:
            return str(error)
        command = f"python data/{base}/prepare.py --source FILE --allow-partial --out data/{dataset}"
        return f"data/{dataset} is not prepared; prepare it with: {command}"
    return "" if config.prepare or is_prepared(folder) else f"{dataset} is not prepared, and --prepare=False was said"


def is_held(path):
    """Whether a sweep, or a run, has the file locked."""
    if fcntl is None or not path.exists():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two who look do not see each other
        except BlockingIOError:
            return True
    return False


def take_lock(path):
    """An open file that holds a cell, or None where another has it. Held until train.py, which inherits it, has closed
    it too: a run that outlives its sweep keeps its cell.

    Lock files are left where they are: were one removed, one sweep could hold the old file and another a new one.
    """
    file = open(path, "ab")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def how_many(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def counted(states):
    """'15 runs: 6 finished, 1 cut, 8 missing'"""
    kinds = Counter(state.kind for state in states.values())
    return f"{how_many(len(states), 'run')}: " + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])


def tell_of_records(states, kept):
    """What in results/ needs a word."""
    for line in kept.left_out:
        print(f"left out: {line}", file=sys.stderr)
    unclean = sum(not records.is_clean(kept.counted[cell.key][1]) for cell in states if cell.key in kept.counted)
    if unclean:
        print(
            f"{how_many(unclean, 'run')} finished with uncommitted changes, so in no mean; --list names them; to make "
            "one again, delete its record and its folder",
            file=sys.stderr,
        )
    run_ids = {cell.config.run_id for cell in states}
    others = [key[1] for key in kept.counted.keys() - {cell.key for cell in states} if key[0] in run_ids]
    if others:
        names = "; ".join(sorted({*others}))
        print(f"in tables of their own: {how_many(len(others), 'record')} of other machines ({names})", file=sys.stderr)


def print_reasons(states, file):
    """Why cells failed or cannot be run: a line a reason, for many cells may share one."""
    names = {}
    for cell, state in states.items():
        if state.kind in ("failed", "cannot be run"):
            names.setdefault((state.kind, state.text), []).append(cell.name)
    for (kind, reason), (name, *others) in names.items():
        print(f"{kind}: {name}{f' and {len(others)} more' if others else ''}: {reason}", file=file, flush=True)


def print_list(states, kept, scale):
    times, unknown, width = estimates(states, kept, scale), 0, max(len(cell.name) for cell in states)
    for cell, state in states.items():
        line = f"{cell.name:<{width}}  {state.kind if state.kind == 'cannot be run' else state}"
        if cell in times:
            line += f", {console.duration(times[cell][0])} {times[cell][1]}"
        elif state.kind in ("cut", "missing"):
            unknown += 1
        print(line)
    print_reasons(states, sys.stdout)
    left = [console.duration(sum(seconds for seconds, _ in times.values()))] if times else []
    left += [f"{how_many(unknown, 'run')} of unknown length"] if unknown else []
    kinds_of_machine = "; ".join(sorted({cell.machine for cell in states}))
    print(f"{counted(states)}; left: {' and '.join(left) or 'nothing'}, on {kinds_of_machine}")


def estimates(states, kept, scale):
    """{cell: (seconds to its end, how that is known)} of those cut or missing, in proportion to training FLOPs, from
    clean records of these machines: that of the same config, else all of the scale."""
    here, runs, rates = {cell.machine for cell in states}, runs_of(TABLES.values(), scale), {}
    for (run_id, machine), (_, record) in kept.counted.items():
        hash = run_id.partition("-")[0]
        if hash in runs and machine in here and records.is_clean(record):
            rate = seconds_of(record) / training_flops(runs[hash][1].config_at(scale))
            rates.setdefault(hash, []).append(rate)
    overall, times = [statistics.median(of_one) for of_one in rates.values()], {}
    for cell, state in states.items():
        if overall and state.kind in ("cut", "missing"):
            own = rates.get(cell.config.hash())
            seconds = statistics.median(own or overall) * training_flops(cell.config)  # busy hours say little
            left = 1 - state.step / cell.config.max_iters
            times[cell] = seconds * left, "as measured" if own else "by its FLOPs"
    return times


def seconds_of(record):
    """Of a whole run, with the texts that it writes at its end, which its total does not have in it."""
    samples, speed = record["inference"]["samples"], record["inference"]["tokens_per_second"]
    return record["seconds"]["total"] + (samples * CHARACTERS_WRITTEN / speed if speed else 0)


def training_flops(config):
    """Of a whole run, but for those of the output layer, which depend on the text."""
    tokens = config.max_iters * config.batch_size * config.gradient_accumulation_steps * config.block_size
    return accounting.training_flops_per_token(accounting.model_without_memory(config)) * tokens


def print_commands(states):
    """On stdout nothing but the commands."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    for cell, state in states.items():
        if state.kind in ("missing", "cut", "to be copied"):
            path = record_path(cell)
            parts = [] if Path.cwd() == ROOT else [["cd", str(ROOT)]]
            parts += [] if state.kind == "to be copied" else [command_of(cell, state, python)]
            parts += [["mkdir", "-p", from_root(path.parent)]]
            parts += [["cp", from_root(cell.folder / "summary.json"), from_root(path)]]
            print(" && ".join(shlex.join(part) for part in parts))
    print_reasons(states, sys.stderr)
    print(counted(states), file=sys.stderr)


def command_of(cell, state, python):
    """To be run from the project's root."""
    return [python, from_root(TRAIN), *cell.arguments, *state.words]


def from_root(path):
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def record_path(cell):
    """Where its record goes: never over a file that is there, which is damaged, or of another experiment or machine."""
    stem, _, seed = cell.name.rpartition("-s")
    path, number = cell.home / f"{cell.name}.json", 2
    while path.exists():
        path, number = cell.home / f"{stem}-{number}-s{seed}.json", number + 1
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Running


def check_can_run(here):
    if fcntl is None:
        raise ConfigError(["sweep.py runs nothing on Windows, for want of file locks; --print_commands works there"])
    for key, folder in (("out", here.out), ("results", here.results)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            message = f"{shown_path(folder)} cannot be written ({error.strerror}); --{key}=… names another folder"
            raise ConfigError([message]) from None


def run_all(states, budget_minutes, argv):
    """-> exit code"""
    dirty = machines.git_state()["dirty"]
    if dirty is not False:
        why = "There are uncommitted changes" if dirty else "git knows no commit of this code"
        print(f"{why}: records made now are shown in tables, but count in no mean.")
    print(counted(states), flush=True)
    print_reasons(states, sys.stderr)
    deadline = time.monotonic() + 60 * budget_minutes if budget_minutes else math.inf
    with noted_signals() as signals:
        sweep(states, deadline, signals)
    return conclude(states, signals, argv)


class Screen:
    """On a terminal a bar, in steps over the whole table, and a line when a cell ends; elsewhere one when it starts
    as well."""

    def __init__(self, states):
        self.title = {cell: f"[{i}/{len(states)}] {cell.name}" for i, cell in enumerate(states, 1)}
        self.steps = {cell: state.step for cell, state in states.items() if state.kind != "cannot be run"}
        self.bar = tqdm(
            total=sum(cell.config.max_iters for cell in self.steps),
            initial=sum(self.steps.values()),
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, text):
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def start(self, cell, state):
        self.bar.set_postfix_str(cell.name)
        if self.bar.disable:
            self.say(f"{self.title[cell]}: {f'goes on at {state.text}' if state.step else 'started'}")

    def update(self, cell, step, loss):
        """step, loss: of the last line that the cell's run has logged."""
        if loss is not None:
            self.bar.set_postfix_str(f"{cell.name}, loss {loss:.3f} nats", refresh=False)
        self.bar.update(step - self.steps[cell])
        self.steps[cell] = step

    def end(self, cell, state):
        self.update(cell, state.step, None)
        self.say(f"{self.title[cell]}: {state}")


@contextlib.contextmanager
def noted_signals():
    """A list that console.stopping_signals are added to inside, and do nothing else."""
    signals = []
    with contextlib.ExitStack() as stack:
        for number in console.stopping_signals():
            before = signal.signal(number, lambda number, frame: signals.append(number))
            stack.callback(signal.signal, number, before)
        yield signals


def sweep(states, deadline, signals):
    """Runs what can be run, until the deadline or a signal, and keeps `states` up to date."""
    queue = [cell for cell, state in states.items() if state.kind not in ("finished", "cannot be run")]
    postponed = []  # what another is running is looked at again at the end: it may be finished by then, or cut
    screen = Screen(states)
    with screen.bar:
        for cell in itertools.chain(queue, postponed):
            if signals or time.monotonic() > deadline - SECONDS_TO_START:
                break
            states[cell] = attempt(cell, screen, deadline, signals)
            if states[cell].kind == "running elsewhere" and cell not in postponed:
                postponed.append(cell)
            else:
                screen.end(cell, states[cell])


def attempt(cell, screen, deadline, signals):
    """Runs a cell unless another does, or has done meanwhile. -> its State"""
    lock = take_lock(cell.lock)
    if lock is None:
        return running(cell)
    with lock:
        state = look(cell, read_results(cell.home.parent))
        if state.kind in ("missing", "cut"):
            state = run(cell, state, lock, screen, deadline, signals)
        return keep_record(cell) if state.kind == "to be copied" else state


def run(cell, state, lock, screen, deadline, signals):
    """One train.py, to its end. -> the State that it leaves"""
    screen.start(cell, state)
    log = cell.folder.with_name(f"{cell.name}.log")
    with open(log, "ab") as output:
        # In a session of its own: Ctrl-C then reaches only us, and train.py gets one signal, for a second one would end
        # it before it has saved.
        process = subprocess.Popen(
            command_of(cell, state, sys.executable),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    is_stopped = follow(process, cell, screen, deadline, signals)
    code, left = process.returncode, look_at_folder(cell)
    if code == 0 and left.kind == "to be copied":
        return left
    if is_stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
        return left
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    why = f", {left.text or 'no summary.json'}" if code == 0 else ""
    lines = log.read_text(errors="replace").strip().splitlines() or ["(it is empty)"]
    return State("failed", f"{how}{why}; the last line of {shown_path(log)}: {lines[-1].strip()}", left.step)


def follow(process, cell, screen, deadline, signals):
    """Waits for train.py, and stops it at the deadline or on a signal. -> whether it was stopped"""
    is_stopped = False
    while True:
        try:
            process.wait(POLL_SECONDS)
            return is_stopped
        except subprocess.TimeoutExpired:
            screen.update(cell, *last_of(cell.folder / "metrics.jsonl"))
        if len(signals) > 1:
            process.kill()
        elif not is_stopped and (signals or time.monotonic() > deadline):
            screen.say(f"stopping {cell.name}, which saves" + ("; a second signal ends it at once" if signals else ""))
            process.terminate()
            is_stopped = True


def keep_record(cell):
    """Copies the record of a complete run to results/. -> the cell's State"""
    source, path = cell.folder / "summary.json", record_path(cell)
    record = records.read(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, source.read_bytes())
    text = f"{record['clean']['best']['nats']:.4f} nats in {console.duration(record['seconds']['total'])}"
    return State("finished", f"{text}, kept as {shown_path(path)}", cell.config.max_iters)


def conclude(states, signals, argv):
    """Tells what came of it. -> exit code"""
    kinds = {state.kind for state in states.values()}
    print(counted(states))
    if kinds & {"cut", "missing", "to be copied"}:
        why = f"Stopped by {signal.Signals(signals[0]).name}" if signals else "The time is over"
        print(f"{why}. To go on: {shlex.join(['python', os.path.relpath(__file__), *argv])}", flush=True)
    print_reasons(states, sys.stderr)
    if signals:
        return 128 + signals[0]
    return 1 if kinds & {"failed", "cannot be run"} else 0


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    names, scale, options, here = asked_for(argv)
    kept = read_results(here.results)
    states = states_of(cells_of(names, scale, options.seeds, here), kept)
    tell_of_records(states, kept)
    about = f"{', '.join(names)} at scale {scale}, {how_many(options.seeds, 'seed')} from {FIRST_SEED}"
    about += f": runs in {shown_path(here.out)}, records in {shown_path(here.results)}"
    print(about, file=sys.stderr if options.print_commands else sys.stdout, flush=True)
    if options.list:
        print_list(states, kept, scale)
    elif options.print_commands:
        print_commands(states)
    else:
        check_can_run(here)
        return run_all(states, options.budget_minutes, argv)
    return 0


if __name__ == "__main__":
    console.run(main, (ConfigError, FileError, RecordError))
