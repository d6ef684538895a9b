"""Several processes train like one: the same sequences, and the same curve within rounding. The first one writes, all
stop together, and resume is bit-identical. Mostly two processes with gloo, on the CPU."""

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from alike import HARD, assert_same_run, lines_of, record_of, weights_of
from conftest import ROOT, TINY, soaked, tiny, train_tiny

from run import checkpoint
from run.processes import Processes
from support.options import ConfigError

# One process or two: what is random within a step (dropout, noise) would differ.
SHARED = dict(dropout=0.0, batch_size=4, max_iters=20, n_embd=24)
MODELS = {
    "dense": dict(),
    "switch loss": dict(n_expert=4, aux_loss_coef=0.5),
    "cv2 loss": dict(n_expert=4, expert_top_k=2, aux_loss="cv2", aux_loss_coef=0.5),
    "balanced by a bias": dict(n_expert=4, expert_top_k=2, aux_loss="none", router_bias_rate=0.01, gate="sigmoid"),
    "capacity, z-loss": dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, z_loss_coef=0.1),
    "random router": dict(n_expert=4, router="random", aux_loss="none"),
}
WHOLE, PARTS = 2, 1  # gradient_accumulation_steps by which two processes share whole micro-batches, or parts of each


# ---------------------------------------------------------------------------------------------------------------------
# Who does what


@pytest.mark.parametrize("count, batch_size, accumulated", [(1, 3, 5), (2, 4, 1), (2, 3, 2), (3, 6, 2), (4, 2, 8)])
def test_each_sequence_belongs_to_one_process(count, batch_size, accumulated):
    config = tiny(batch_size=batch_size, gradient_accumulation_steps=accumulated)
    rows = torch.arange(batch_size * accumulated)
    shares = [Processes(number, count).own_batches(rows, config) for number in range(count)]
    assert sorted(torch.cat([part for share in shares for part in share]).tolist()) == rows.tolist()
    assert len({tuple(map(len, share)) for share in shares}) == 1  # all do as much
    if accumulated % count == 0:  # and micro-batches stay whole
        assert all(len(part) == batch_size for share in shares for part in share)


@pytest.mark.parametrize(
    "count, changes, words",
    [
        (3, dict(), ["3 processes", "gradient_accumulation_steps = 1", "batch_size = 4", "multiple"]),
        (2, dict(device="cuda:1"), ["cuda:1", "one device for 2 processes"]),
        (2, dict(eval_only=True), ["eval_only", "one process"]),
        (2, dict(n_expert=2, capacity_factor=1.0, capacity_group="batch"), ["capacity_group=batch"]),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(count, changes, words):
    with pytest.raises(ConfigError) as caught:
        Processes(0, count).check(tiny(**changes))
    assert len(caught.value.problems) == 1 and all(word in str(caught.value) for word in words)
    Processes().check(tiny(**changes))  # one process can


def test_processes_that_cannot_meet_are_one_message(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="cannot meet"):
        train_tiny(tmp_path, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Real processes


def child(number, count, port, options, log, dies_at, number_to_raise):
    """Process `number` of train.py's `count`. dies_at, number_to_raise: an update before which it gets this signal."""
    import train
    from run import update

    about = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count}
    os.environ.update(
        {name: str(value) for name, value in about.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a")
    learning_rate = update.learning_rate

    def rate(step, config):
        if step == dies_at:
            os.kill(os.getpid(), number_to_raise)
        return learning_rate(step, config)

    update.learning_rate = rate
    torch.compile = functools.partial(torch.compile, backend="eager")  # graphs are made, code is not
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in options.items())]
    train.console.run(train.main)


@pytest.fixture(scope="module")
def together(forkserver, words, tmp_path_factory):
    """A function that runs train.py in `count` processes. -> [(exit code, output) of each]"""
    folder = tmp_path_factory.mktemp("logs")

    def run(out_dir, count=2, dies=None, at=None, by=signal.SIGTERM, **changes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {**TINY, "dataset": words, "out_dir": out_dir, **changes}
        logs = [folder / f"log{number}" for number in range(count)]
        family = []
        for number, log in enumerate(logs):
            log.write_text("")
            arguments = (number, count, port, options, log, at if number == dies else None, by)
            family.append(forkserver.Process(target=child, args=arguments))
            family[-1].start()
        for process in family:
            process.join(300)
            assert process.exitcode is not None, [log.read_text() for log in logs]
        return [(process.exitcode, log.read_text()) for process, log in zip(family, logs)]

    return run


def assert_alike(one, other, tolerance=2e-4):
    """The curves and the weights of two runs, within the rounding of 20 updates."""
    for a, b in zip(lines_of(one), lines_of(other), strict=True):
        assert a["step"] == b["step"]
        numbers = {("clean", "nats"), ("paper", "train"), ("paper", "val"), ("paper", "val_with_aux")}
        keys = [(key,) for key in ("loss", "objective", "gradient_norm", "aux_switch", "aux_cv2", "aux_z")]
        for path in (*numbers, *keys):
            x, y = a, b
            for key in path:
                x, y = (value.get(key) if isinstance(value, dict) else None for value in (x, y))
            assert (x is None and y is None) or y == pytest.approx(x, rel=tolerance, abs=1e-5), (a["step"], path)
        for x, y in zip(a["routing"], b["routing"], strict=True):
            assert x["tokens"] == y["tokens"] and y["load"] == pytest.approx(x["load"], abs=0.02)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], value, rtol=1e-2, atol=2e-3, msg=name)


# Losses and capacities over a whole batch are what parts of it must reproduce; whole micro-batches are simpler.
SHORT = [("switch loss", PARTS), ("capacity, z-loss", PARTS), ("balanced by a bias", WHOLE)]


@pytest.mark.parametrize(
    "model, accumulated",
    [*SHORT, *(soaked(*case) for case in itertools.product(MODELS, (WHOLE, PARTS)) if case not in SHORT)],
)
def test_two_processes_train_like_one(words, tmp_path, together, model, accumulated):
    options = SHARED | MODELS[model] | dict(gradient_accumulation_steps=accumulated)
    assert train_tiny(words, tmp_path / "one", **options) == 0
    (code, said), (silent_code, silence) = together(tmp_path / "two", **options)
    assert code == silent_code == 0, said + silence
    assert silence == "" and "best validation" in said
    assert_alike(tmp_path / "one", tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    record = record_of(tmp_path / "two")
    assert record["machine"]["processes"] == 2 and record["tokens"] == record_of(tmp_path / "one")["tokens"]


def test_the_first_evaluation_of_two_processes_is_bit_identical_to_that_of_one(words, tmp_path, together):
    """Same weights, same batches, added up in the same order."""
    options = dict(max_iters=1, eval_iters=3, n_expert=4)
    train_tiny(words, tmp_path / "one", **options)
    together(tmp_path / "two", **options)
    one, two = (lines_of(tmp_path / name, "eval")[0] for name in ("one", "two"))
    assert (one["clean"], one["paper"]) == (two["clean"], two["paper"])


@pytest.fixture(scope="module")
def uninterrupted_by_two(together, tmp_path_factory):
    """A function: options -> the out_dir of a complete HARD run of two processes. To be read only."""
    known = {}

    def of(**options):
        key = tuple(options.items())
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole") / "run"
            assert [code for code, _ in together(known[key], **HARD | options)] == [0, 0]
        return known[key]

    return of


@pytest.mark.parametrize("stopped, accumulated", [(1, WHOLE), soaked(0, WHOLE), soaked(0, PARTS), soaked(1, PARTS)])
def test_a_signal_to_one_stops_all_and_resume_is_bit_identical(
    tmp_path, together, uninterrupted_by_two, stopped, accumulated
):
    """Each process has dropout and jitter of its own; the stop is between two log lines."""
    options = HARD | dict(gradient_accumulation_steps=accumulated)
    changes = dict(dies=stopped, at=12, by=signal.SIGUSR1, save_in_background=True)
    (code, said), (other_code, _) = together(tmp_path / "cut", **changes, **options)
    assert code == other_code == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 after step" in said and "torchrun --nproc_per_node=2" in said
    assert [code for code, _ in together(tmp_path / "cut", init_from="resume", **options)] == [0, 0]
    assert_same_run(uninterrupted_by_two(gradient_accumulation_steps=accumulated), tmp_path / "cut")


@pytest.mark.parametrize("dead", [0, soaked(1)])
def test_a_process_that_dies_ends_the_others_and_resume_is_bit_identical(
    tmp_path, together, uninterrupted_by_two, dead
):
    started = time.monotonic()
    ends = together(tmp_path / "cut", dies=dead, at=13, by=signal.SIGKILL, **HARD)
    assert time.monotonic() - started < 600, "it waited for the time limit of a library"
    code, said = ends[1 - dead]
    assert ends[dead][0] == -signal.SIGKILL and code == 4
    assert said.count("has ended, or is lost") == 1 and "--init_from=resume" in said and "Traceback" not in said
    assert checkpoint.load(tmp_path / "cut" / "ckpt.pt")["progress"]["step"] == 10
    assert [code for code, _ in together(tmp_path / "cut", init_from="resume", **HARD)] == [0, 0]
    assert_same_run(uninterrupted_by_two(gradient_accumulation_steps=WHOLE), tmp_path / "cut")


def test_resume_by_three_processes_is_bit_identical(tmp_path, together):
    """Sums of three numbers depend on their order."""
    options = HARD | dict(gradient_accumulation_steps=3, batch_size=2, max_iters=15, eval_interval=15)
    assert [code for code, _ in together(tmp_path / "whole", count=3, **options)] == [0] * 3
    assert [code for code, _ in together(tmp_path / "cut", count=3, dies=1, at=12, **options)] == [143] * 3
    assert [code for code, _ in together(tmp_path / "cut", count=3, init_from="resume", **options)] == [0] * 3
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="module")
def uninterrupted_by_one(words, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(words, out_dir, **SHARED, **MODELS["switch loss"]) == 0
    return out_dir


# SIGTERM: resumed between two log lines; SIGKILL: resumed from an evaluation.
@pytest.mark.parametrize(
    "first, second, by",
    [
        (2, 1, signal.SIGTERM),
        *(soaked(*case) for case in ((1, 2, signal.SIGTERM), (1, 2, signal.SIGKILL), (2, 1, signal.SIGKILL))),
    ],
)
def test_another_number_of_processes_resumes_a_run(tmp_path, together, uninterrupted_by_one, first, second, by):
    """The sequences are the same; only rounding differs (and noise, where there is any)."""
    options = SHARED | MODELS["switch loss"]
    ends = together(tmp_path / "cut", count=first, dies=0, at=12, by=by, **options)
    assert ends[0][0] == (143 if by == signal.SIGTERM else -by)
    (code, said), *_ = together(tmp_path / "cut", count=second, init_from="resume", **options)
    assert code == 0 and f"processes {first} there, processes {second} here" in said
    assert_alike(uninterrupted_by_one, tmp_path / "cut")


def test_a_mistake_is_reported_once(tmp_path, together):
    """As under torchrun, which ends the others when one has ended."""
    (code, said), (other_code, other) = together(tmp_path / "run", init_from="resume")
    assert code == other_code == 2
    assert said.count("no ckpt.pt to resume from") == 1 and other.startswith("process 1: ")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_all(tmp_path, together):
    ends = together(tmp_path / "run", learning_rate="1e30", grad_clip=0, warmup_iters=0)
    assert [code for code, _ in ends] == [3, 3]
    assert "not finite" in ends[0][1] and ends[1][1] == ""


def test_a_validation_loss_that_is_not_finite_leaves_the_checkpoint_before_it(tmp_path, together):
    """Which several processes save before they evaluate."""
    ends = together(tmp_path / "run", learning_rate="1e25", grad_clip=0, warmup_iters=0, eval_interval=1)
    assert [code for code, _ in ends] == [3, 3] and "the validation loss at step 1 is not finite" in ends[0][1]
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 0
    (code, said), _ = together(tmp_path / "run", learning_rate="1e-3", grad_clip=0, init_from="resume")
    assert code == 0 and "learning_rate is now 0.001" in said


@pytest.mark.soak
def test_torchrun_starts_a_run(words, tmp_path):
    """The launcher itself, once."""
    options = {**TINY, "dataset": words, "out_dir": tmp_path / "run", "max_iters": 4, "n_expert": 4}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in options.items())],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final validation") == 1
    assert record_of(tmp_path / "run")["machine"]["processes"] == 2


@pytest.mark.soak
def test_shared_batches_compile_without_a_graph_break(tmp_path, together):
    """The exchange within a forward pass, of batches that are shared."""
    (code, said), _ = together(tmp_path / "run", compile=True, max_iters=2, n_expert=4)
    assert code == 0 and "failed" not in said, said
    assert record_of(tmp_path / "run")["machine"]["compile"] is True
