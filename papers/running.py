"""Make planned runs with train.py, one after the other or several at once on one device.

    runner = Runner(states, screen, signals, jobs=4)
    runner.run()        # until everything is tried, the deadline is over, or a signal came; keeps `states` up to date

Each run is a process of its own, which inherits the lock of its run. `screen` shows progress: its start, update, end
and say are called. The caller prints; nothing here does.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from papers import planned_runs
from papers.planned_runs import PlannedRun, State, from_root, last_logged, record_path
from run import records
from support import console, files
from support.files import ROOT, shown_path
from support.machines import core_count

TRAIN = ROOT / "train.py"
POLL_SECONDS = 0.5
SECONDS_BETWEEN_STARTS = 2  # of runs that go on at once: they load their text and measure the device one by one
SECONDS_TO_START = 60  # with less of the budget left, a run would hardly get beyond its start


def command_of(run: PlannedRun, state: State, python: str = sys.executable) -> list[str]:
    """The words of a train.py command, for the project's root."""
    return [python, from_root(TRAIN), *run.arguments, *state.words]


@dataclass
class Job:
    """A run that train.py makes now."""

    run: PlannedRun
    process: subprocess.Popen
    lock: IO
    log: Path
    started: float  # time.monotonic()
    is_new: bool  # starts at step 0
    is_stopped: bool = False  # was asked to save and end


class Runner:
    """Runs everything that can be run, and keeps `states` up to date.

    states: {PlannedRun: State}; signals: numbers of the stopping signals that came so far, a list that grows;
    deadline: of time.monotonic(); pack: a papers.pack.Pack or None. The attribute `fits`, a function of run, state and
    seconds, says whether a run may start with so many seconds left.
    """

    def __init__(self, states, screen, signals, jobs=1, deadline=math.inf, pack=None):
        self.states, self.screen, self.signals, self.pack = states, screen, signals, pack
        self.most, self.deadline = jobs, deadline
        self.fits = lambda run, state, seconds: seconds >= SECONDS_TO_START
        self.jobs: list[Job] = []
        self.last_start = -math.inf
        self.seconds = {}  # run -> how long it took, of runs that were made here from start to end

    def run(self):
        waiting = deque(run for run, state in self.states.items() if state.kind in planned_runs.WORTH_TRYING)
        postponed = deque()  # runs of other processes get a second look at the end: they may be finished, or cut
        is_second_look = False
        try:
            while True:
                self.end_jobs()
                if self.signals or time.monotonic() > self.deadline:
                    waiting.clear()
                    postponed.clear()
                    self.stop_jobs()
                run = self.next_of(waiting)
                if not run and not self.jobs and postponed:
                    waiting, postponed, is_second_look = postponed, deque(), True
                    run = self.next_of(waiting)
                if run:
                    waiting.remove(run)
                    state = self.attempt(run)
                    if state and state.kind == "running elsewhere" and not is_second_look:
                        self.states[run] = state
                        postponed.append(run)
                    elif state:
                        self.end(run, state)
                elif self.jobs:
                    self.wait()
                else:
                    return
        finally:
            self.abandon_jobs()
            self.update_pack(at_once=True)

    def next_of(self, waiting):
        """The first run that may start now, or None."""
        now = time.monotonic()
        if len(self.jobs) >= self.most or (self.jobs and now - self.last_start < SECONDS_BETWEEN_STARTS):
            return None
        return next((run for run in waiting if self.fits(run, self.states[run], self.deadline - now)), None)

    def attempt(self, run) -> State | None:
        """Start a run unless another process is at it now, or has made it. -> None where it was started"""
        lock = planned_runs.take_lock(run.lock)
        if lock is None:
            return planned_runs.running_elsewhere(run)
        state = planned_runs.state_of(run, planned_runs.read_results(run.home.parent))
        if state.kind in ("missing", "cut"):
            self.jobs.append(self.start(run, state, lock))
            return None
        with lock:
            return self.kept(run) if state.kind == "to be copied" else state

    def start(self, run, state, lock) -> Job:
        self.screen.start(run, state)
        log = run.folder.with_name(f"{run.name}.log")
        # Several compile at once: their compilers share the cores.
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, core_count() // self.most))} if self.most > 1 else {}
        with open(log, "ab") as output:
            # A session of its own keeps the terminal's Ctrl-C from train.py, which a second signal would end unsaved.
            process = subprocess.Popen(
                command_of(run, state),
                cwd=ROOT,
                env={**threads, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        self.last_start = time.monotonic()
        return Job(run, process, lock, log, self.last_start, is_new=not state.step)

    def wait(self):
        """Let some time pass; shorter if the oldest job ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.jobs[0].process.wait(POLL_SECONDS)
        for job in self.jobs:
            self.screen.update(job.run, *last_logged(job.run.folder / "metrics.jsonl"))
        self.update_pack()

    def stop_jobs(self):
        """Ask every job to save and end; after a second signal, end it at once."""
        for job in self.jobs:
            if len(self.signals) > 1:
                job.process.kill()
            elif not job.is_stopped:
                at_once = "; a second signal ends it at once" if self.signals else ""
                self.screen.say(f"stopping {job.run.name}, which saves{at_once}")
                job.process.terminate()
            job.is_stopped = True

    def end_jobs(self):
        """Note what the jobs left that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            with job.lock:
                state = self.outcome(job)
                if state.kind == "to be copied":
                    state = self.kept(job.run)
            if state.kind == "finished" and job.is_new:
                self.seconds[job.run] = time.monotonic() - job.started
            self.end(job.run, state)
            if self.pack and state.kind != "finished":  # then `kept` has packed it
                self.pack.add(job.run, log=job.log if state.kind == "failed" else None)

    def end(self, run, state):
        self.states[run] = state
        self.screen.end(run, state)

    def outcome(self, job) -> State:
        """The State that a job left."""
        code, left = job.process.returncode, planned_runs.state_of_folder(job.run)
        if code == 0 and left.kind == "to be copied":
            return left
        if job.is_stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
            return left
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = f", {left.text or 'no summary.json'}" if code == 0 else ""
        lines = job.log.read_text(errors="replace").strip().splitlines() or ["(it is empty)"]
        return State("failed", f"{how}{why}; the last line of {shown_path(job.log)}: {lines[-1].strip()}", left.step)

    def kept(self, run) -> State:
        """Copy the record of a complete run to results/."""
        source, path = run.folder / "summary.json", record_path(run)
        record = records.read(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, source.read_bytes())
        if self.pack:
            self.pack.add(run)
        text = f"{record['clean']['best']['nats']:.4f} nats in {console.duration(record['seconds']['total'])}"
        return State("finished", f"{text}, kept as {shown_path(path)}", run.config.max_iters)

    def update_pack(self, at_once=False):
        if self.pack:
            for job in self.jobs:
                self.pack.watch(job.run)
            self.pack.write(at_once)

    def abandon_jobs(self):
        """Where an error ends the sweep: let the jobs save and end, which then go on another time."""
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            job.process.wait()
            job.lock.close()
