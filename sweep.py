"""Run what is missing of a table of experiments.py: every row with every seed, on this machine.

    python sweep.py B                           5 seeds; at the papers' size on a GPU, else CPU size
    python sweep.py all --budget_minutes=60     every table, for an hour; the same command goes on
    python sweep.py B --list                    what is finished, cut, missing; how long it takes
    python sweep.py B --print_commands          a shell line a missing run, as for GNU parallel
    python sweep.py B --device=cuda:1           keys of the machine are handed on to train.py

One seed of every row is run before the second of any. A cell, which is a row with a seed, is
finished when results/ holds its record, in whichever table's folder: a run that several tables
share is made once. A run is train.py's, in out/CELL, with its output in out/CELL.log; its record is
copied to results/TABLE/CELL.json. Ctrl-C saves and ends, and the same command goes on. Any number
of sweeps can share the work: none runs what another one is running.

Exit codes: 0 done, or the budget is over; 1 a run failed or cannot be made; 2 a mistake in what was
asked; 130 / 143 stopped by SIGINT / SIGTERM.
"""

import contextlib
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

import torch
from tqdm import tqdm

import checkpoint
import configurator
import machine as machines
import model
import records
from checkpoint import CheckpointError
from configurator import MACHINE, ROOT, ConfigError, nearest, option, options_of, shown_path
from data.common import DataError, find
from experiments import FIRST_SEED, SCALES, SEEDS_FOR_A_VERDICT, TABLES, Row
from records import RecordError
from settings import Config

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two sweeps apart
    fcntl = None

TRAIN = ROOT / "train.py"
SET_HERE = ("out_dir", "init_from", "overwrite", "eval_only", "title")  # keys of the machine that are not handed on
POLL_SECONDS = 0.5
SECONDS_TO_START = 60  # with less than this left of the budget, a run would hardly get beyond its start
TAIL_BYTES = 2**18  # of a metrics.jsonl: more than its longest line
# complete: in out/, but its record is not in results/ yet; impossible: it cannot be run, or would destroy another run
KINDS = ("finished", "complete", "running", "cut", "missing", "failed", "impossible")
EXIT_CODES = {
    1: "an error in the program",
    2: "a mistake in what was asked",
    3: "loss or gradient not finite",
    128 + signal.SIGINT: "stopped by SIGINT",
    128 + signal.SIGTERM: "stopped by SIGTERM",
}


@dataclass(frozen=True)
class Options:
    """What follows the table's name; further keys are train.py's."""

    seeds: int = option(SEEDS_FOR_A_VERDICT, f"how many, counted from {FIRST_SEED}", at_least=1, at_most=1000)
    scale: Literal["auto", "paper", "cpu"] = option("auto", "auto: paper where there is a CUDA device, else cpu")
    budget_minutes: float = option(
        0.0, "after so long, save the run that is being made and end; 0 = no limit", at_least=0
    )
    list: bool = option(False, "show every cell and how long the rest takes, and run nothing")
    print_commands: bool = option(False, "print a shell line a missing run, and run nothing")
    out: str = option("", "folder of the runs; empty = out/ of this project")
    results: str = option("", "folder of the records; empty = results/ of this project")

    def problems(self):
        if self.list and self.print_commands:
            yield ("list", "print_commands"), "--list and --print_commands are two answers; choose one"


class Places(NamedTuple):
    out: Path
    results: Path
    handed_on: list[str]  # words for train.py


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a table."""

    name: str  # of its folder under out/, and of its record
    table: str  # its record's folder under results/
    row: Row
    scale: str
    seed: int
    config: Config  # but for the seed
    run_id: str


class State(NamedTuple):
    """How a cell stands."""

    kind: str  # of KINDS
    text: str = ""  # where, or why
    step: int = 0  # updates made
    words: tuple[str, ...] = ()  # what train.py must be told of a run that is there


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for


def divided(argv):
    """(the table's name or None, words for us, words for train.py)"""
    cut = argv.index("--") if "--" in argv else len(argv)
    names = [word for word in argv[:cut] if not word.startswith("-")]
    tables = [name for name in names if name in (*TABLES, "all")]
    if len(tables) > 1:
        raise ConfigError([f"{' '.join(tables)}: expected one table, or all of them: python sweep.py all"])
    table = (tables or names or [None])[0]
    ours, theirs = [], argv[cut + 1 :]
    for word in argv[:cut]:
        is_theirs = word.startswith("--") and word[2:].partition("=")[0] in options_of(Config)
        (theirs if is_theirs else ours).append(word)
    if table is not None:
        ours.remove(table)
    return table, ours, theirs


def check_handed_on(words):
    """The Config that they make, which names the machine. Refuses what would make another experiment of a row."""
    problems, keys = [], options_of(Config)
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--"):
            problems.append(f"{word}: expected --key=value; a row's config files are the table's")
        elif name == "seed":
            problems.append(f"{word}: the seeds are {FIRST_SEED} and on; --seeds=N says how many")
        elif name in SET_HERE:
            problems.append(f"{word}: sweep.py sets {name} itself; leave it out")
        elif name in keys and keys[name].scope != MACHINE:
            problems.append(
                f"{word}: {name} would make another experiment than the table's; only keys of the machine are handed "
                "on to train.py (device, dtype, compile, inference_samples, …)"
            )
    if problems:
        raise ConfigError(problems)
    return configurator.parse(Config, words)


def check_table(name, scale):
    """Refuses a name that is no table's, and a table that has nothing to run at the scale."""
    known = f"tables: {', '.join(TABLES)}, or all"
    if name is None:
        raise ConfigError([f"which table? expected python sweep.py TABLE; {known}"])
    if name not in (*TABLES, "all"):
        by_lower_case = {other.lower(): other for other in (*TABLES, "all")}
        guess = nearest(name.lower(), by_lower_case)
        raise ConfigError([f"{name}: no such table; {known}" + (f"; nearest: {by_lower_case[guess]}" if guess else "")])
    if name != "all" and not TABLES[name].rows_at(scale):
        other = next(other for other in SCALES if TABLES[name].rows_at(other))
        raise ConfigError([f"table {name} has no rows at scale {scale}; it has some with --scale={other}"])


def cells_of(table, scale, seeds):
    """In the order in which they are run. A run that rows of several names share has the name of the first."""
    first, home = {}, {}  # the hash of a row's config -> the first such row of all tables, the first table asked for
    for other in TABLES.values():
        for row in other.rows_at(scale):
            hash = row.config_at(scale).hash()
            first.setdefault(hash, row)
            if table in (other.name, "all"):
                home.setdefault(hash, other.name)
    cells = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for hash, folder in home.items():
            row = first[hash]
            cells.append(Cell(row.cell(scale, seed), folder, row, scale, seed, row.config_at(scale), f"{hash}-s{seed}"))
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# How cells stand


def by_run(pairs):
    """{run_id: (path, record)}; of several, which are of other machines or unclean, a clean one."""
    return {record["run_id"]: (path, record) for path, record in sorted(pairs, key=lambda p: records.is_clean(p[1]))}


def states_of(cells, places, found, left_out):
    """{cell: State}, with what others are running."""
    states = {}
    for cell in cells:
        states[cell] = look(cell, places, found, left_out)
        if states[cell].kind != "finished" and is_held(places.out / f"{cell.name}.lock"):
            states[cell] = running(places.out / cell.name)
    return states


def look(cell, places, found, left_out):
    """The State of a cell, as results/ and its folder tell."""
    if cell.run_id in found:
        path, record = found[cell.run_id]
        unclean = "" if records.is_clean(record) else " (uncommitted changes)"
        return State("finished", f"{shown_path(path)}{unclean}", cell.config.max_iters)
    for line in left_out:
        if f"({cell.run_id}" in line:  # several records that differ: one more would not tell which of them counts
            return State("impossible", line)
    state = look_at_folder(cell, places.out / cell.name)
    problem = data_problem(cell.config.dataset) if state.kind in ("missing", "cut") else ""
    return State("impossible", problem, state.step) if problem else state


def look_at_folder(cell, folder):
    """The State of a cell, as its folder tells; impossible where its run would destroy something."""

    def holds(what):
        return State("impossible", f"{shown_path(folder)} holds {what}; move it away, or give another --out=…")

    held = {name for name in checkpoint.RUN_FILES if (folder / name).exists()}
    if not held:
        return State("missing")
    if is_held(folder / "metrics.jsonl"):
        return running(folder)
    if "summary.json" in held:
        try:
            run_id = records.read(folder / "summary.json")["run_id"]
        except RecordError as error:
            return holds(f"a complete run whose record is of no use ({error})")
        if run_id != cell.run_id:
            return holds(f"another experiment ({run_id}, expected {cell.run_id})")
        return State("complete", shown_path(folder), cell.config.max_iters)
    step, _ = last_of(folder / "metrics.jsonl")
    if held == {"metrics.jsonl"} and not step:  # train.py begins with it
        return State("missing", words=("--overwrite=True",))
    run_id = run_id_of(folder / "config.json")
    if run_id is None:
        return holds("a run without a config.json that could be read")
    if run_id != cell.run_id:
        return holds(f"another experiment ({run_id}, expected {cell.run_id})")
    if "ckpt.pt" in held:
        return State("cut", f"at step {step:,} of {cell.config.max_iters:,}", step, ("--init_from=resume",))
    if "best.pt" in held:
        return holds("a best.pt, but no ckpt.pt to go on from")
    return State("missing", words=("--overwrite=True",))  # cut before its first checkpoint: nothing is lost


def running(folder):
    return State("running", step=last_of(folder / "metrics.jsonl")[0])


def run_id_of(path):
    """Of the run whose config.json this is; None where it cannot be read."""
    try:
        return Config.from_dict(json.loads(path.read_text())).run_id
    except (OSError, ValueError):
        return None


def last_of(metrics):
    """(step, loss) of the last whole line of a metrics.jsonl, which may be growing; (0, None) where there is none."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            return values["step"], values["loss"] if values["kind"] == "train" else values["clean"]["nats"]
    return 0, None


def data_problem(dataset):
    """Why train.py could not have this data set, or ""; it prepares those itself that have a prepare.py."""
    try:
        find(dataset)
    except DataError as error:
        base = dataset.removesuffix("_head")
        if base == dataset:
            return str(error)
        command = f"python data/{base}/prepare.py --source FILE --allow-partial --out data/{dataset}"
        return f"data/{dataset} is not prepared; prepare it with: {command}"
    return ""


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
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


# ---------------------------------------------------------------------------------------------------------------------
# --list and --print_commands


def print_list(states, pairs, asked):
    """asked: a Config with the keys of the machine."""
    machine = machines.describe(machines.choose(asked.device, asked.dtype, asked.compile))
    here = records.machine_of({"machine": machine})
    times, known, unknown = estimates(list(states), pairs, here), [], 0
    width = max(len(cell.name) for cell in states)
    for cell, state in states.items():
        line = f"{cell.name:<{width}}  {text_of(state)}"
        if state.kind in ("cut", "missing"):
            seconds, how = times[cell.config]
            if seconds is None:
                unknown += 1
            else:
                known.append(seconds * (1 - state.step / cell.config.max_iters))
                line += f", {records.duration(known[-1])} {how}"
        print(line)
    print_impossible(states, sys.stdout)
    left = [records.duration(sum(known))] if known else []
    left += [f"{unknown} {'run' if unknown == 1 else 'runs'} of unknown length"] if unknown else []
    print(f"{counted(states)}; left: {' and '.join(left) or 'nothing'}, on {here}")


def estimates(cells, pairs, here):
    """{config: (seconds of a whole run, how that is known)}, seconds None where it is not, from the clean records of
    this kind of machine: those of the same config; else those of the same scale, in proportion to training FLOPs."""
    totals, scale, times = {}, cells[0].scale, {}
    for _, record in pairs:
        if records.is_clean(record) and records.machine_of(record) == here:
            totals.setdefault(record["run_id"].partition("-")[0], []).append(record["seconds"]["total"])
    means = {hash: statistics.mean(seconds) for hash, seconds in totals.items()}
    configs = [row.config_at(scale) for table in TABLES.values() for row in table.rows_at(scale)]
    of_scale = {config.hash(): config for config in configs}
    rates = [means[hash] / training_flops(config) for hash, config in of_scale.items() if hash in means]
    for hash, config in {cell.config.hash(): cell.config for cell in cells}.items():
        if hash in means:
            times[config] = means[hash], "as measured"
        elif rates:
            times[config] = statistics.mean(rates) * training_flops(config), "by its FLOPs"
        else:
            times[config] = None, ""
    return times


def training_flops(config):
    """Of a whole run, but for those of the output layer, which depend on the text."""
    tokens = config.max_iters * config.batch_size * config.gradient_accumulation_steps * config.block_size
    return model.skeleton(config).flops_per_token() * tokens


def text_of(state):
    texts = {
        "finished": f"finished: {state.text}",
        "complete": f"finished in {state.text}, its record not copied yet",
        "cut": f"cut {state.text}",
        "running": f"running elsewhere, at step {state.step:,}",
        "impossible": "cannot be run, see below",
    }
    return texts.get(state.kind, state.kind)


def counted(states):
    """'15 runs: 6 finished, 1 cut, 8 missing'"""
    words = {"complete": "to be copied", "running": "running elsewhere", "impossible": "that cannot be run"}
    kinds = Counter(state.kind for state in states.values())
    return f"{len(states)} runs: " + ", ".join(
        f"{kinds[kind]} {words.get(kind, kind)}" for kind in KINDS if kinds[kind]
    )


def print_impossible(states, file):
    """A line a reason, for many cells may share one."""
    names = {}
    for cell, state in states.items():
        if state.kind == "impossible":
            names.setdefault(state.text, []).append(cell.name)
    for reason, (name, *others) in names.items():
        more = f" and {len(others)} more" if others else ""
        print(f"cannot be run: {name}{more}: {reason}", file=file, flush=True)


def print_commands(states, places):
    """On stdout nothing but the commands."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    for cell, state in states.items():
        if state.kind in ("missing", "cut", "complete"):
            path = record_path(cell, places)
            parts = [] if Path.cwd() == ROOT else [["cd", str(ROOT)]]
            parts += [] if state.kind == "complete" else [command_of(cell, state, places, python)]
            parts += [["mkdir", "-p", from_root(path.parent)]]
            parts += [["cp", from_root(places.out / cell.name / "summary.json"), from_root(path)]]
            print(" && ".join(shlex.join(part) for part in parts))
    print_impossible(states, sys.stderr)
    print(counted(states), file=sys.stderr)


def command_of(cell, state, places, python):
    """To be run from the project's root."""
    out_dir = f"--out_dir={from_root(places.out / cell.name)}"
    arguments = cell.row.arguments(cell.scale, cell.seed)
    return [python, from_root(TRAIN), *arguments, out_dir, *state.words, *places.handed_on]


def from_root(path):
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def record_path(cell, places):
    """Where the record of a cell goes: never over a file that is there, which is damaged or of another experiment."""
    path, number = places.results / cell.table / f"{cell.name}.json", 2
    while path.exists():
        path, number = path.with_name(f"{cell.row.stem(cell.scale)}-{number}-s{cell.seed}.json"), number + 1
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Screen:
    """On a terminal a bar, in steps over the whole table, and a line when a cell ends; elsewhere one when it starts
    as well."""

    def __init__(self, states):
        self.title = {cell: f"[{i}/{len(states)}] {cell.name}" for i, cell in enumerate(states, 1)}
        self.steps = {cell: state.step for cell, state in states.items() if state.kind != "impossible"}
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
        self.began = None
        self.bar.set_postfix_str(cell.name)
        if self.bar.disable:
            self.say(f"{self.title[cell]}: {f'goes on {state.text}' if state.step else 'started'}")

    def update(self, cell, step, loss):
        """step, loss: of the last line that the cell's run has logged."""
        if step != self.steps[cell] and self.began is None:
            self.began, self.first_step = time.monotonic(), step  # from here on, for starting is not training
        elif self.began is not None and step > self.first_step:
            seconds = (time.monotonic() - self.began) / (step - self.first_step) * (cell.config.max_iters - step)
            text = f"{cell.name}, loss {loss:.3f} nats, {records.duration(seconds)} left"
            self.bar.set_postfix_str(text, refresh=False)
        self.advance(cell, step)

    def advance(self, cell, step):
        self.bar.update(step - self.steps[cell])
        self.steps[cell] = step

    def end(self, cell, state):
        self.advance(cell, state.step)
        texts = {
            "cut": f"stopped {state.text}",
            "missing": "stopped before its first checkpoint",
            "running": "is run elsewhere",
            "impossible": f"cannot be run: {state.text}",
            "failed": f"failed: {state.text}",
        }
        self.say(f"{self.title[cell]} … {texts.get(state.kind, state.text)}")


@contextlib.contextmanager
def noted_signals():
    """A list that SIGINT and SIGTERM are added to inside, and do nothing else."""
    signals, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sweep(states, places, deadline, signals):
    """Runs what can be run, until the deadline or a signal, and keeps `states` up to date."""
    queue = [cell for cell, state in states.items() if state.kind not in ("finished", "impossible")]
    postponed = set()
    screen = Screen(states)
    with screen.bar:
        while queue and not signals and time.monotonic() < deadline - SECONDS_TO_START:
            cell = queue.pop(0)
            states[cell] = attempt(cell, places, screen, deadline, signals)
            if states[cell].kind == "running" and cell not in postponed:
                postponed.add(cell)
                queue.append(cell)  # to look again at the end: it may be finished by then, or cut
                continue
            screen.end(cell, states[cell])
            dataset = cell.config.dataset
            if states[cell].kind == "failed" and not (find(dataset) / "train.bin").exists():
                text = f"{dataset} could not be prepared, as {shown_path(places.out / cell.name)}.log says"
                for other in [other for other in queue if other.config.dataset == dataset]:  # each would try in vain
                    states[other] = State("impossible", text)
                    queue.remove(other)


def attempt(cell, places, screen, deadline, signals):
    """Runs a cell unless another does, or has done meanwhile. -> its State"""
    lock = take_lock(places.out / f"{cell.name}.lock")
    if lock is None:
        return running(places.out / cell.name)
    with lock:
        pairs, left_out = records.read_all(places.results)
        state = look(cell, places, by_run(pairs), left_out)
        if state.kind == "finished":
            return state._replace(text=f"finished meanwhile: {state.text}")
        if state.kind in ("missing", "cut"):
            state = run(cell, state, places, lock, screen, deadline, signals)
        return keep_record(cell, places) if state.kind == "complete" else state


def run(cell, state, places, lock, screen, deadline, signals):
    """One train.py, to its end. -> the State that it leaves"""
    folder, log = places.out / cell.name, places.out / f"{cell.name}.log"
    screen.start(cell, state)
    with open(log, "ab") as output:
        # In a session of its own: Ctrl-C then reaches only us, and train.py gets one signal, for a second one would end
        # it before it has saved.
        process = subprocess.Popen(
            command_of(cell, state, places, sys.executable),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    is_stopped = follow(process, cell, folder / "metrics.jsonl", screen, deadline, signals)
    code, left = process.returncode, look_at_folder(cell, folder)
    if code == 0 and left.kind == "complete":
        return left
    if is_stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
        return left
    if code < 0:
        meaning = f"killed by {signal.Signals(-code).name}"
    else:
        meaning = EXIT_CODES.get(code) or left.text or "no summary.json"
    text = f"exit code {code} ({meaning}); the last line of {shown_path(log)}: {last_line(log)}"
    return State("failed", text, left.step)


def follow(process, cell, metrics, screen, deadline, signals):
    """Waits for train.py, and stops it at the deadline or on a signal. -> whether it was stopped"""
    is_stopped = False
    while True:
        try:
            process.wait(POLL_SECONDS)
            return is_stopped
        except subprocess.TimeoutExpired:
            screen.update(cell, *last_of(metrics))
        if len(signals) > 1:
            process.kill()
        elif not is_stopped and (signals or time.monotonic() > deadline):
            screen.say(f"stopping {cell.name}, which saves" + ("; a second signal ends it at once" if signals else ""))
            process.terminate()
            is_stopped = True


def last_line(log):
    lines = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "(it is empty)")


def keep_record(cell, places):
    """Copies the record of a complete run to results/. -> the cell's State"""
    source, path = places.out / cell.name / "summary.json", record_path(cell, places)
    record = records.read(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(path, source.read_bytes())
    text = f"{record['clean']['best']['nats']:.4f} nats in {records.duration(record['seconds']['total'])}"
    if path.stem != cell.name:
        text += f"; kept as {shown_path(path)}, for {cell.name}.json is there and is not its record"
    return State("finished", text, cell.config.max_iters)


def check_writable(places):
    for key in ("out", "results"):
        folder = getattr(places, key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            message = f"{shown_path(folder)} cannot be written ({error.strerror}); --{key}=… names another folder"
            raise ConfigError([message]) from None


def conclude(states, signals, argv):
    """Tells what came of it. -> exit code"""
    kinds = {state.kind for state in states.values()}
    elsewhere = [cell.name for cell, state in states.items() if state.kind == "running"]
    print(counted(states))
    if elsewhere:
        print(f"run by another sweep, or by hand: {', '.join(elsewhere)}")
    if kinds & {"cut", "missing", "complete"}:
        why = f"Stopped by {signal.Signals(signals[0]).name}" if signals else "The time is over"
        print(f"{why}. To go on: {shlex.join(['python', os.path.relpath(__file__), *argv])}", flush=True)
    for cell, state in states.items():
        if state.kind == "failed":
            print(f"failed: {cell.name}: {state.text}", file=sys.stderr)
    print_impossible(states, sys.stderr)
    if signals:
        return 128 + signals[0]
    return 1 if kinds & {"failed", "impossible"} else 0


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    table, ours, handed_on = divided(argv)
    options = configurator.parse(
        Options,
        ours,
        usage="python sweep.py TABLE [--key=value …] [-- --key=value of train.py …]",
        description=f"{__doc__.rstrip()}\n\nTables: {', '.join(TABLES)}, or all",
    )
    # To ask makes no CUDA context; a context of ours would be memory that others hold, to the runs that we measure.
    has_cuda = torch.cuda.is_available()
    scale = options.scale if options.scale != "auto" else "paper" if has_cuda else "cpu"
    check_table(table, scale)
    asked = check_handed_on(handed_on)
    out = Path(options.out).resolve() if options.out else ROOT / "out"
    results = Path(options.results).resolve() if options.results else ROOT / "results"
    places = Places(out, results, handed_on)

    pairs, left_out = records.read_all(results)
    found = by_run(pairs)
    states = states_of(cells_of(table, scale, options.seeds), places, found, left_out)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    unclean = [cell for cell in states if cell.run_id in found and not records.is_clean(found[cell.run_id][1])]
    if unclean:
        print(
            f"finished with uncommitted changes, so that they count in no mean: {unclean[0].name}"
            + (f" and {len(unclean) - 1} more" if len(unclean) > 1 else "")
            + f"; to make them again, delete their records and their folders in {shown_path(out)}",
            file=sys.stderr,
        )
    why = "asked for" if options.scale != "auto" else f"there is {'a' if has_cuda else 'no'} CUDA device"
    seeds = f"seeds {FIRST_SEED} to {FIRST_SEED + options.seeds - 1}" if options.seeds > 1 else f"seed {FIRST_SEED}"
    about = f"{table} at scale {scale} ({why}), {seeds}: runs in {shown_path(out)}, records in {shown_path(results)}"
    print(about, file=sys.stderr if options.print_commands else sys.stdout, flush=True)
    if options.list:
        print_list(states, pairs, asked)
        return 0
    if options.print_commands:
        print_commands(states, places)
        return 0

    if fcntl is None:
        raise ConfigError(["sweep.py runs nothing on Windows, for want of file locks; --print_commands works there"])
    check_writable(places)
    if machines.git_state()["dirty"]:
        print("There are uncommitted changes: records made now are shown in tables, but count in no mean.")
    print(counted(states), flush=True)
    print_impossible(states, sys.stderr)
    deadline = time.monotonic() + 60 * options.budget_minutes if options.budget_minutes else math.inf
    with noted_signals() as signals:
        sweep(states, places, deadline, signals)
    return conclude(states, signals, argv)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except configurator.Message as message:
        print(message)
    except (ConfigError, CheckpointError, RecordError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"sweep.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sweep.py: stopped before the first run", file=sys.stderr)
        sys.exit(130)
