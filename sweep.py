"""Run every row of a table with several seeds on this machine, leaving out what is already recorded.

    python sweep.py B                           5 seeds; at the papers' size on a GPU, else CPU size
    python sweep.py B A C --budget_minutes=60   three tables, for an hour; to go on, repeat it
    python sweep.py all                         every table
    python sweep.py B --list                    the state of each run, and the time left
    python sweep.py B --print_commands          a shell line for each missing run
    python sweep.py B --device=cuda:1           keys of the machine go to train.py
    python sweep.py B --jobs=4                  four runs at once on one device: losses count, times do not
    python sweep.py plan --list                 what to spend a GPU's minutes on, and what each run decides
    python sweep.py plan --budget_minutes=9 --jobs=4 --pack=made.tar

All rows get their first seed before any gets a second. A run (one row with one seed) is finished when
results/ holds its record from the same kind of machine, in any table's folder: a run that several
tables share is made once. Records of extended runs do not count. train.py runs in out/RUN, or in a
folder beside it where another run is there, and its output goes to out/RUN.log; its record is copied
to results/TABLE/RUN.json. Ctrl-C saves the current run and ends; the same command continues.
Several sweeps can share the work: none starts a run that another process is running. A run whose loss or
gradient was not finite is not tried again.

"plan" goes through papers/priorities.py from the top. With a budget it starts no run that cannot end within
it, by the time of those that it has made, else of records, else by a guess. --pack keeps one tar of the
records and of the metrics, of unfinished runs too, up to date after every evaluation: if the machine goes
away, it has what was made. Where the machine compiles, runs share what was compiled in out/compile_cache.

Exit codes: 0 done, or out of time; 1 a run failed or cannot be run; 2 a mistake in the command;
128 + n stopped by signal n (130 SIGINT, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP).
"""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from papers import TABLES, planned_runs, running
from papers.estimates import GUESS_SECONDS, Forecast, rates_of
from papers.pack import Pack
from papers.planned_runs import KINDS, Setup, from_root, record_path
from papers.priorities import PRIORITIES
from papers.table import FIRST_SEED, SCALES, SEEDS_FOR_A_VERDICT
from run import records
from run.settings import Config
from support import configurator, console, files
from support.files import ROOT, shown_path
from support.options import MACHINE, ConfigError, option, options_of

PLAN = "plan"  # beside the names of tables
SET_HERE = ("out_dir", "init_from", "overwrite", "eval_only", "title")  # keys of the machine that are not passed on
# Each runs in a process of its own: a CUDA context of ours would be memory that others hold, to the runs that we
# measure, and importing train loads the code that trains, and not that of tables and sweeps.
MACHINE_OF_TRAINING = """import json, sys; from support import machines
print(json.dumps(machines.describe(machines.choose(*json.loads(sys.argv[1])))))"""
CODE_OF_TRAINING = "import json, train; from support import machines; print(json.dumps(machines.git_state()))"


@dataclass(frozen=True)
class SweepOptions:
    """Keys that may follow the names of tables; further keys are train.py's."""

    seeds: int = option(SEEDS_FOR_A_VERDICT, f"number of seeds, counted from {FIRST_SEED}", at_least=1, at_most=1000)
    scale: Literal["auto", "paper", "cpu"] = option("auto", "auto: paper on a CUDA device, else cpu")
    budget_minutes: float = option(0.0, "after so many minutes, save what runs and end; 0: no limit", at_least=0)
    jobs: int = option(
        1, "runs at once on one device; their times do not count, so they write no texts", at_least=1, at_most=64
    )
    pack: str = option("", "a tar to keep up to date with all records and metrics made here; empty: none", is_path=True)
    list: bool = option(False, "show the state of every run and the time left, and run nothing")
    print_commands: bool = option(False, "print one shell line for each missing run, and run nothing")
    out: str = option("", "folder of the runs; empty: out/ of this project", is_path=True)
    results: str = option("", "folder of the records; empty: results/ of this project", is_path=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_command(argv):
    """(names of tables, scale, options, Setup)"""
    names, ours, passed_on = split_words(argv)
    options = configurator.parse(
        SweepOptions,
        ours,
        usage="python sweep.py TABLE … | plan [--key=value …] [-- --key=value of train.py …]",
        description=f"{__doc__.rstrip()}\n\nTables: {', '.join(TABLES)}, or all",
    )
    out, results = (Path(getattr(options, name) or ROOT / name).resolve() for name in ("out", "results"))
    changes = changes_of(passed_on)
    machine = machine_here(changes)
    if machine["compile"]:
        # Asked for, a failure to compile ends a run at its start: else it would be one of another kind of machine.
        asked = {"compile": True, "compile_cache": from_root(ROOT / "out" / "compile_cache")}
        passed_on += [f"--{key}={value}" for key, value in asked.items() if key not in changes]
    if options.jobs > 1 and "inference_samples" not in changes:
        passed_on.append("--inference_samples=0")
    setup = Setup(out, results, passed_on, changes_of(passed_on), machine)
    scale = options.scale if options.scale != "auto" else "paper" if machine["device_type"] == "cuda" else "cpu"
    check_tables(names, scale)
    if PLAN in names and any(word.startswith("--seeds=") for word in ours):
        raise ConfigError(["--seeds: the plan names the seeds of its runs (papers/priorities.py)"])
    return names, scale, options, setup


def split_words(argv):
    """(names of tables, words for sweep.py, words for train.py)"""
    cut = argv.index("--") if "--" in argv else len(argv)
    names, ours, theirs = [], [], argv[cut + 1 :]
    for word in argv[:cut]:
        is_theirs = word.startswith("--") and word[2:].partition("=")[0] in options_of(Config)
        (theirs if is_theirs else ours if word.startswith("-") else names).append(word)
    return list(dict.fromkeys(names)), ours, theirs


def changes_of(words):
    """{key: value} set by words for train.py. ConfigError for keys that would change the experiment."""
    options = options_of(Config)
    allowed = [name for name, option in options.items() if option.scope == MACHINE and name not in SET_HERE]
    keys = {word: word[2:].partition("=")[0] for word in words}
    problems = [
        f"{word}: would make another run than the table's; keys that are passed on: {', '.join(allowed)}"
        for word, key in keys.items()
        if not word.startswith("--") or (key in options and key not in allowed)
    ]
    if problems:
        raise ConfigError(problems)
    asked = configurator.parse(Config, words)
    return {key: getattr(asked, key) for key in keys.values()}


def check_tables(names, scale):
    """ConfigError for an unknown table, or one that has no rows at this scale, or a table beside the plan."""
    unknown = [f"{name}: no such table" for name in names if name not in (*TABLES, "all", PLAN)]
    if unknown or not names:
        what = "; ".join(unknown) or "which table?"
        expected = f"some of {', '.join(TABLES)}, or all; or python sweep.py plan"
        raise ConfigError([f"{what}; expected python sweep.py TABLE …, {expected}"])
    if PLAN in names and len(names) > 1:
        others = ", ".join(name for name in names if name != PLAN)
        raise ConfigError([f"plan goes alone, for it has an order of its own; leave out {others}, or plan"])
    for name in names:
        if name in TABLES and not TABLES[name].rows_at(scale):
            other = next(other for other in SCALES if TABLES[name].rows_at(other))
            raise ConfigError([f"table {name} has no rows at scale {scale}; it has some with --scale={other}"])


def machine_here(changes):
    """The description of the machine that train.py would choose with these changes."""
    keys = [changes.get(key, "auto") for key in ("device", "dtype", "compile")]
    return output_of(MACHINE_OF_TRAINING, json.dumps(keys))


def git_of_training():
    """machines.git_state() of the code that trains: what the records of the runs will say."""
    return output_of(CODE_OF_TRAINING)


def output_of(code, *arguments):
    """The JSON that the code prints in a process of its own. ConfigError where it fails."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        kind, _, problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].partition(": ")
        raise ConfigError([f"train.py would not start here: {problem or kind}"])
    return json.loads(done.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def how_many(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def totals(states):
    """Counts by kind, as in '15 runs: 6 finished, 1 cut, 8 missing'."""
    kinds = Counter(state.kind for state in states.values())
    return f"{how_many(len(states), 'run')}: " + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])


def warn_of_records(states, kept):
    """Names the records in results/ that enter no mean, or belong to other machines."""
    for line in kept.left_out:
        print(f"left out: {line}", file=sys.stderr)
    unclean = sum(not records.is_clean(kept.counted[run.key][1]) for run in states if run.key in kept.counted)
    if unclean:
        told = "finished with uncommitted changes, so in no mean; --list names them; to make one again, delete its"
        print(f"{how_many(unclean, 'run')} {told} record and its folder", file=sys.stderr)
    run_ids = {run.config.run_id for run in states}
    others = [key[1] for key in kept.counted.keys() - {run.key for run in states} if key[0] in run_ids]
    if others:
        names = "; ".join(sorted({*others}))
        print(f"in tables of their own: {how_many(len(others), 'record')} of other machines ({names})", file=sys.stderr)


def print_reasons(states, file):
    """Why runs failed or cannot be run: one line for each reason, which many runs may share."""
    names = {}
    for run, state in states.items():
        if state.kind in ("failed", "cannot be run"):
            names.setdefault((state.kind, state.text), []).append(run.name)
    for (kind, reason), (name, *others) in names.items():
        print(f"{kind}: {name}{f' and {len(others)} more' if others else ''}: {reason}", file=file, flush=True)


def print_list(states, kept, scale, decides):
    """decides: {run: its Priority}, a heading over the runs that share it; empty for tables."""
    rates = rates_of(states, kept, TABLES.values(), scale)
    forecast, times, width = Forecast(rates, 1, {}), [], max(len(run.name) for run in states)
    unfinished = [run for run, state in states.items() if state.kind in ("cut", "missing")]
    heading = None
    for run, state in states.items():
        if decides and decides[run] is not heading:
            heading = decides[run]
            print(heading.decides)
        line = f"{'  ' if decides else ''}{run.name:<{width}}  {state.kind if state.kind == 'cannot be run' else state}"
        if run in unfinished and not forecast.is_guess:
            times.append(forecast.seconds(run, state))
            basis = "as measured" if run.config.hash() in rates else "by its FLOPs"
            line += f", {console.duration(times[-1])} {basis}"
        print(f"{line}{', next' if decides and run in unfinished[:1] else ''}")
    print_reasons(states, sys.stdout)
    unknown = f"{how_many(len(unfinished), 'run')} of unknown length" if unfinished else "nothing"
    left = console.duration(sum(times)) if times else unknown
    print(f"{totals(states)}; left: {left}, on {'; '.join(sorted({run.machine for run in states}))}")


def print_commands(states):
    """Prints the commands alone to stdout, and the rest to stderr."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    for run, state in states.items():
        if state.kind in ("missing", "cut", "to be copied"):
            path = record_path(run)
            parts = [] if Path.cwd() == ROOT else [["cd", str(ROOT)]]
            parts += [] if state.kind == "to be copied" else [running.command_of(run, state, python)]
            parts += [["mkdir", "-p", from_root(path.parent)]]
            parts += [["cp", from_root(run.folder / "summary.json"), from_root(path)]]
            print(" && ".join(shlex.join(part) for part in parts))
    print_reasons(states, sys.stderr)
    print(totals(states), file=sys.stderr)


class Overview:
    """Progress: on a terminal a bar over the steps of all runs; elsewhere a line when a run starts or ends."""

    def __init__(self, states):
        self.title = {run: f"[{i}/{len(states)}] {run.name}" for i, run in enumerate(states, 1)}
        self.steps = {run: state.step for run, state in states.items() if state.kind != "cannot be run"}
        self.bar = tqdm(
            total=sum(run.config.max_iters for run in self.steps),
            initial=sum(self.steps.values()),
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, text):
        self.bar.write(text)
        sys.stdout.flush()

    def start(self, run, state):
        self.bar.set_postfix_str(run.name)
        if self.bar.disable:
            self.say(f"{self.title[run]}: {f'goes on at {state.text}' if state.step else 'started'}")

    def update(self, run, step, loss):
        """step, loss: from the last line that the run has logged."""
        if loss is not None:
            self.bar.set_postfix_str(f"{run.name}, loss {loss:.3f} nats", refresh=False)
        self.bar.update(step - self.steps[run])
        self.steps[run] = step

    def end(self, run, state):
        self.update(run, state.step, None)
        self.say(f"{self.title[run]}: {state}")


# ---------------------------------------------------------------------------------------------------------------------
# Running


def check_can_run(setup, pack):
    if files.fcntl is None:
        raise ConfigError(["sweep.py needs file locks, which Windows lacks; --print_commands works there"])
    for key, folder in (("out", setup.out), ("results", setup.results)):
        with files.writing(folder, way_out=f"--{key}=… names another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    if pack:
        with files.writing(pack.path, way_out="--pack=… gives it another place"):
            tempfile.TemporaryFile(dir=pack.path.parent).close()


def run_all(states, options, pack, rates, is_plan, deadline, argv):
    """Runs what can be run, and prints the outcome. rates: of estimates.rates_of; deadline: of time.monotonic().
    -> exit code"""
    screen = Overview(states)
    dirty = git_of_training()["dirty"]
    if dirty is not False:
        why = "There are uncommitted changes" if dirty else "git knows no commit of this code"
        print(f"{why}: records made now are shown in tables, but count in no mean.")
    print(totals(states), flush=True)
    print_reasons(states, sys.stderr)
    with console.StopSignals(second_ends=False) as stopping, screen.bar:
        signals = stopping.caught
        runner = running.Runner(states, screen, signals, options.jobs, deadline, pack)
        if is_plan and options.budget_minutes:
            forecast = Forecast(rates, options.jobs, runner.seconds)
            runner.fits = lambda run, state, seconds: forecast.seconds(run, state) <= seconds
            if forecast.is_guess:
                alone = console.duration(GUESS_SECONDS)
                screen.say(f"no record tells how long a run takes here: guessing {alone} for one at paper size, alone")
        runner.run()
    elsewhere = [run for run, state in states.items() if state.kind == "running elsewhere"]  # when it was looked at
    if elsewhere:
        states.update(planned_runs.states_of(elsewhere, planned_runs.read_results(elsewhere[0].home.parent)))
    kinds = {state.kind for state in states.values()}
    print(totals(states))
    if kinds & {"cut", "missing", "to be copied"}:
        why = f"Stopped by {signal.Signals(signals[0]).name}" if signals else "The time is over"
        if is_plan and not signals and time.monotonic() < deadline:
            why = f"No further run would end within the {console.duration(deadline - time.monotonic())} left"
        print(f"{why}. To go on: {shlex.join(['python', os.path.relpath(__file__), *argv])}", flush=True)
    print_reasons(states, sys.stderr)
    if signals:
        return 128 + signals[0]
    return 1 if kinds & {"failed", "cannot be run"} else 0


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    names, scale, options, setup = parse_command(argv)
    deadline = time.monotonic() + 60 * options.budget_minutes if options.budget_minutes else math.inf
    kept, is_plan = planned_runs.read_results(setup.results), names == [PLAN]
    decides = planned_runs.by_priority(TABLES, PRIORITIES, scale, setup) if is_plan else {}
    runs = list(decides) or planned_runs.plan(TABLES, names, scale, options.seeds, setup, kept)
    states = planned_runs.states_of(runs, kept)
    warn_of_records(states, kept)
    about = f"{', '.join(names)} at scale {scale}"
    about += "" if is_plan else f", {how_many(options.seeds, 'seed')} from {FIRST_SEED}"
    about += f": runs in {shown_path(setup.out)}, records in {shown_path(setup.results)}"
    print(about, file=sys.stderr if options.print_commands else sys.stdout, flush=True)
    if options.list:
        print_list(states, kept, scale, decides)
        return 0
    if options.print_commands:
        print_commands(states)
        return 0
    pack = Pack(Path(options.pack).absolute(), tqdm.write) if options.pack else None
    check_can_run(setup, pack)
    while True:
        code = run_all(states, options, pack, rates_of(states, kept, TABLES.values(), scale), is_plan, deadline, argv)
        # What has run may tell which candidates of a tuned row come next.
        kept, known = planned_runs.read_results(setup.results), {run.key for run in states}
        runs = [] if is_plan or code else planned_runs.plan(TABLES, names, scale, options.seeds, setup, kept)
        if all(run.key in known for run in runs) or time.monotonic() > deadline:
            return code
        states = planned_runs.states_of(runs, kept)


if __name__ == "__main__":
    console.run(main)
