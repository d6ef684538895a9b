"""Resume after a kill is bit-identical: weights, optimiser, random state, metrics and record are those of the run that
nobody killed. Real processes, SIGKILL at any moment, everything random switched on."""

import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time

import pytest
from alike import HARD, STATEFUL, assert_same_run, record_of
from conftest import TINY, thorough

KINDS = {
    "hard": dict(save_minutes=1e-9, log_interval=3) | HARD,  # saves before every update
    **{
        name: dict(n_expert=4, dropout=0.1, max_iters=12, eval_interval=6, log_interval=4) | STATEFUL[name]
        for name in STATEFUL
    },
    "background": dict(save_in_background=True, save_minutes=1e-9, log_interval=3) | HARD,
}


# ---------------------------------------------------------------------------------------------------------------------
# In the process that is killed


class Reaper:
    """Kills its own process at the n-th announced moment (never if n is None), and counts the moments. pause: seconds
    in which the loop goes on while a thread saves; then only moments of that thread count."""

    def __init__(self, n, is_power_cut, pause):
        self.n, self.is_power_cut, self.pause, self.count, self.files = n, is_power_cut, pause, 0, []
        self.lock = threading.Lock()

    def moment(self):
        if self.pause:
            if threading.current_thread() is threading.main_thread():
                return
            time.sleep(self.pause)
        with self.lock:
            self.count += 1
            if self.count == self.n:
                self.kill()

    def kill(self):
        if self.is_power_cut:  # what was not synchronised to the disk is lost
            for file in self.files:
                if not file.closed:
                    os.truncate(file.fileno(), file.durable)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        def call(*arguments, **options):
            self.moment()
            result = function(*arguments, **options)
            self.moment()
            return result

        return call

    def watch(self):
        """Announce a moment before and after each file operation and batch, and in the middle of each write."""
        from data.common import Dataset
        from run import run_folder
        from support import files

        reaper, fsync = self, os.fsync

        class Torn(io.FileIO):
            def write(self, content):
                half = len(content) // 2
                super().write(content[:half])
                reaper.moment()
                return half + super().write(content[half:])

        def opened(path, mode, buffering=-1):
            if mode == "rb":
                return open(path, mode)
            file = Torn(path, mode.removesuffix("b"))
            file.durable = os.path.getsize(path)
            reaper.files.append(file)
            return file

        def synced(descriptor):
            fsync(descriptor)
            for file in reaper.files:
                if not file.closed and file.fileno() == descriptor:
                    file.durable = os.fstat(descriptor).st_size

        files.open = run_folder.open = opened
        os.fsync = self.around(synced)
        for name in ("replace", "link", "unlink"):
            setattr(os, name, self.around(getattr(os, name)))
        Dataset.batch = self.around(Dataset.batch)


def child(options, n, is_power_cut, pause, log):
    """Run train.py with these options and kill it at its n-th moment. A survivor writes their number to `log`."""
    import torch

    import train

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a")
    reaper = Reaper(n, is_power_cut, pause)
    reaper.watch()
    code = train.main([f"--{key}={value}" for key, value in options.items()])
    print(json.dumps(reaper.count), flush=True)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# In the test


@pytest.fixture(scope="module")
def runner(forkserver, words, tmp_path_factory):
    """A function that runs a KIND in a process, to its end or until a kill. -> (exit code, moments, seconds)"""
    log = tmp_path_factory.mktemp("logs") / "log"

    def run(kind, out_dir, n=None, after=None, is_power_cut=False, pause=0, **changes):
        options = {
            **TINY,
            "dataset": words,
            "out_dir": out_dir,
            "init_from": "auto",
            **KINDS[kind],
            **changes,
        }
        log.write_text("")
        started = time.monotonic()
        process = forkserver.Process(target=child, args=(options, n, is_power_cut, pause, log))
        process.start()
        process.join(after)
        if after is not None and process.exitcode is None:
            process.kill()
        process.join(60)
        seconds = time.monotonic() - started
        if process.exitcode not in (0, -signal.SIGKILL):
            pytest.fail(f"exit code {process.exitcode}: {log.read_text()[-2000:]}")
        lines = log.read_text().split()
        return process.exitcode, int(lines[-1]) if process.exitcode == 0 else None, seconds

    return run


@pytest.fixture(scope="module")
def uninterrupted(runner, tmp_path_factory):
    """A function: kind -> (out_dir of the complete run, its moments, its seconds)."""
    known = {}

    def of(kind):
        if kind not in known:
            out_dir = tmp_path_factory.mktemp("whole") / "run"
            code, moments, seconds = runner(kind, out_dir)
            assert code == 0
            known[kind] = out_dir, moments, seconds
        return known[kind]

    return of


def kinds(n):
    names = list(KINDS)
    return [names[i % len(names)] for i in range(n)]


def complete(runner, kind, out_dir, whole):
    """Resume to the end, and compare with the run that nobody killed."""
    code, *_ = runner(kind, out_dir)
    assert code == 0
    assert_same_run(whole, out_dir)
    assert not [path for path in out_dir.iterdir() if "partial" in path.name or "previous" in path.name]
    shutil.rmtree(out_dir)


def generator(n):
    """Random kills: the same ones in the short form, new ones in each long form."""
    seed = 0 if n < 40 else random.SystemRandom().randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


@thorough(2, 200)
def test_resume_after_a_kill_at_any_time_is_bit_identical(runner, uninterrupted, tmp_path, n):
    times = generator(n)
    for kind in kinds(n):
        whole, _, seconds = uninterrupted(kind)
        runner(kind, tmp_path / "run", after=times.uniform(0, seconds))
        complete(runner, kind, tmp_path / "run", whole)


@thorough(len(KINDS), 400)
def test_resume_after_a_kill_within_any_file_operation_is_bit_identical(runner, uninterrupted, tmp_path, n):
    """Half of the kills also lose what was not yet synchronised to the disk, as a power cut does."""
    moments = generator(n)
    for i, kind in enumerate(kinds(n)):
        whole, count, _ = uninterrupted(kind)
        code, *_ = runner(kind, tmp_path / "run", n=moments.randint(1, count), is_power_cut=i % 2 == 0)
        assert code == -signal.SIGKILL
        complete(runner, kind, tmp_path / "run", whole)


@pytest.mark.soak
@pytest.mark.parametrize("is_power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("kind", ["hard", "background"])
def test_resume_after_a_kill_at_every_moment_is_bit_identical(runner, uninterrupted, tmp_path, kind, is_power_cut):
    whole, count, _ = uninterrupted(kind)
    for n in range(1, count + 1):
        code, *_ = runner(kind, tmp_path / "run", n=n, is_power_cut=is_power_cut)
        assert code == -signal.SIGKILL
        complete(runner, kind, tmp_path / "run", whole)


@thorough(2, 400)
def test_resume_after_a_kill_at_each_stage_of_a_save_in_the_background_is_bit_identical(runner, tmp_path, n):
    """Meanwhile the loop has gone on."""
    options, whole = dict(pause=0.01, save_minutes=0), tmp_path / "whole"
    code, count, _ = runner("background", whole, **options)
    assert code == 0 and count >= 50
    kills = generator(n).sample(range(1, count + 1), min(n, count))
    for i, moment in enumerate(kills):
        code, *_ = runner("background", tmp_path / "run", n=moment, is_power_cut=i % 2 == 0, **options)
        assert code == -signal.SIGKILL
        code, *_ = runner("background", tmp_path / "run", **options)
        assert code == 0
        assert_same_run(whole, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


@thorough(1, 40)
def test_resume_after_many_kills_is_bit_identical(runner, uninterrupted, tmp_path, n):
    moments, resumed = generator(n), 0
    for kind in ["hard", *kinds(n)][:n]:
        whole, count, _ = uninterrupted(kind)
        kills = 0
        while kills < 8:
            code, *_ = runner(kind, tmp_path / "run", n=moments.randint(1, count // 2))
            if code == 0:
                break
            kills += 1
        assert kills >= 2
        code, *_ = runner(kind, tmp_path / "run")
        assert code == 0
        resumed += record_of(tmp_path / "run")["resumed"]
        complete(runner, kind, tmp_path / "run", whole)
    assert resumed >= n / 2  # the others never lived to their first checkpoint
