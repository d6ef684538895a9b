"""Resume is bit-identical: after stops, signals and kills. And what a resumed, extended or repeated run refuses."""

import os
import shlex
import shutil
import signal

import pytest
import torch
from alike import (
    FILES,
    HARD,
    STATEFUL,
    assert_same_run,
    essence,
    lines_of,
    optimizer_steps,
    record_of,
    steps_of,
    weights_of,
)
from conftest import TINY, as_script, contents, english, interrupt, prepare_text, soaked, train_tiny

import routing
import train
from data.common import DataError, Dataset
from run import checkpoint, evaluate, identity, records, run_folder
from run import dataset as dataset_of_run
from run.checkpoint import CheckpointError
from support import machines
from support.options import ConfigError

# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize(
    "stops",  # after the first step, at an evaluation, between log points, at a log point, twice, twice in a row
    [(9,), (11, 12), *map(soaked, [(0,), (13,), (14,), (3, 16)])],
)
def test_resume_after_a_stop_is_bit_identical(words, tmp_path, uninterrupted, at_step, stops):
    at_step(interrupt(), *stops)
    out_dir = tmp_path / "run"
    assert train_tiny(words, out_dir, **HARD) == 130
    assert not (out_dir / "summary.json").exists()
    for stop in stops[1:]:
        assert train_tiny(words, out_dir, init_from="resume", **HARD) == 130
        assert checkpoint.load(out_dir / "ckpt.pt")["progress"]["step"] == stop + 1
    assert train_tiny(words, out_dir, init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, out_dir)
    record = record_of(out_dir)
    assert record["resumed"] == len(stops) and record_of(uninterrupted)["resumed"] == 0
    assert record["straight"] and record["stretches"] == []


@pytest.mark.parametrize("first, second", [(True, True), (False, True), (True, False)])
def test_captured_updates_may_begin_and_end_anywhere_in_a_run(words, tmp_path, uninterrupted, at_step, first, second):
    """Between two log lines, with running totals, moments and random numbers in midstream."""
    at_step(interrupt(), 12)
    assert train_tiny(words, tmp_path / "run", capture=first, **HARD) == 130
    assert train_tiny(words, tmp_path / "run", capture=second, init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")
    assert record_of(tmp_path / "run")["machine"].get("capture", False) is second


def test_a_stop_saves_the_finished_step_and_prints_how_to_go_on(words, tmp_path, at_step, capsys):
    at_step(interrupt(), 12)
    out_dir = tmp_path / "a run's folder"  # needs quoting
    assert train_tiny(words, out_dir, "--overwrite=True") == 130
    assert checkpoint.load(out_dir / "ckpt.pt")["progress"]["step"] == 13
    out = capsys.readouterr().out
    assert "stopped by SIGINT after step 13" in out and "saved" in out
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:2] == ["python", "train.py"] and "--overwrite=True" not in command
    assert train.main(command[2:]) == 0
    assert record_of(out_dir)["iterations"] == 20


def test_resume_with_fewer_steps_logs_the_steps_before_the_stop(words, tmp_path, at_step):
    """Stopped before the first log line and resumed with a shorter max_iters, so that the run ends at once."""
    at_step(interrupt(), 2)
    assert train_tiny(words, tmp_path / "run") == 130
    assert train_tiny(words, tmp_path / "run", init_from="resume", max_iters=3) == 0
    (line,) = lines_of(tmp_path / "run", "train")
    assert line["step"] == 3 and line["gradient_norm"] is None
    record = record_of(tmp_path / "run")
    assert record["seconds"]["train"] > 0 and record["train_mode"]["loss"] == line["loss"]


@pytest.mark.parametrize(
    "kind", ["bias", "annealed", "freeze", *map(soaked, sorted({*STATEFUL} - {"bias", "annealed", "freeze"}))]
)
def test_resume_of_a_router_with_state_is_bit_identical(words, tmp_path, at_step, kind):
    options = dict(n_expert=4, dropout=0.1, max_iters=12, eval_interval=6) | STATEFUL[kind]
    assert train_tiny(words, tmp_path / "whole", **options) == 0
    at_step(interrupt(), 7)
    assert train_tiny(words, tmp_path / "cut", **options) == 130
    assert train_tiny(words, tmp_path / "cut", init_from="resume", **options) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_stops_like_sigint_with_its_own_exit_code(words, tmp_path, uninterrupted, at_step, capsys):
    at_step(interrupt(signal.SIGTERM), 13)
    assert train_tiny(words, tmp_path / "run", **HARD) == 143
    assert "SIGTERM" in capsys.readouterr().out
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_signal_in_the_last_step_loses_neither_the_step_nor_its_evaluation(words, tmp_path, uninterrupted, at_step):
    at_step(interrupt(), 19)
    assert train_tiny(words, tmp_path / "run", **HARD) == 130
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("call", [soaked(0), 1, 3])  # the first, in the middle, the test split
def test_a_signal_during_an_evaluation_stops_at_once_and_resume_is_bit_identical(
    words, tmp_path, uninterrupted, monkeypatch, call
):
    """A run of 20 steps calls evaluate.full_loss at 0, 10 and 20, and for the test split."""
    original, calls = evaluate.full_loss, []

    def clean(*arguments):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(evaluate, "full_loss", clean)
    assert train_tiny(words, tmp_path / "run", **HARD) == 130
    assert len(calls) == call + 1 and not (tmp_path / "run" / "summary.json").exists()
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("fails", ["evaluation", "save_snapshot"])
def test_a_crash_between_two_updates_loses_none(words, tmp_path, uninterrupted, at_step, monkeypatch, capsys, fails):
    """Out of memory in the evaluation after step 10, or in the snapshot after step 13: the run was saved at step 0."""
    owner, step = {"evaluation": (evaluate, 10), "save_snapshot": (run_folder.RunFolder, 13)}[fails]

    def crash(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        at_step(lambda: patch.setattr(owner, fails, crash), step - 1)
        with pytest.raises(torch.OutOfMemoryError):
            train_tiny(words, tmp_path / "run", save_every=13, **HARD)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == step
    told = capsys.readouterr().out
    assert f"failed after step {step}; saved" in told and "--init_from=resume" in told
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_signal_handlers_are_given_back(words, tmp_path, at_step):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    at_step(interrupt(), 1)
    assert train_tiny(words, tmp_path / "run") == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_resume_after_a_kill_begins_at_the_last_checkpoint(words, tmp_path, uninterrupted, at_step):
    """As after a power cut: metrics.jsonl has lines that the checkpoint does not know."""

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    at_step(kill, 17)
    with pytest.raises(Killed):
        train_tiny(words, tmp_path / "run", **HARD)
    assert steps_of(tmp_path / "run", "train")[-1] == 15
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 10
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_resume_is_refused_where_metrics_lost_lines(words, tmp_path, at_step):
    at_step(interrupt(), 13)
    train_tiny(words, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-50])
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match="metrics.jsonl is shorter"):
        train_tiny(words, tmp_path / "run", init_from="resume")
    assert contents(tmp_path / "run")["ckpt.pt"] == before["ckpt.pt"]
    assert contents(tmp_path / "run")["metrics.jsonl"] == before["metrics.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# What analyze.py reads later


def snapshot_steps(folder):
    return [step for step, _ in run_folder.snapshots_in(folder)]


def test_snapshots_are_the_weights_of_their_steps(words, tmp_path):
    assert train_tiny(words, tmp_path / "run", save_every=8, **HARD) == 0
    assert snapshot_steps(tmp_path / "run") == [0, 8, 16, 20]
    assert train_tiny(words, tmp_path / "short", max_iters=8, lr_decay_iters=20, **HARD) == 0
    eighth = checkpoint.load(tmp_path / "run" / "snapshots" / "step-000008.pt")
    assert eighth["step"] == 8
    assert essence(eighth["model"]) == essence(weights_of(tmp_path / "short"))
    last = checkpoint.load(tmp_path / "run" / "snapshots" / "step-000020.pt")
    assert essence(last["model"]) == essence(weights_of(tmp_path / "run"))


def test_resume_and_overwrite_remove_snapshots_of_later_steps(words, tmp_path, at_step):
    at_step(interrupt(), 13)
    train_tiny(words, tmp_path / "run", save_every=5)
    later = tmp_path / "run" / "snapshots" / "step-000018.pt"
    later.write_bytes(b"of a longer run")
    assert train_tiny(words, tmp_path / "run", save_every=5, init_from="resume") == 0
    assert snapshot_steps(tmp_path / "run") == [0, 5, 10, 15, 20]
    assert train_tiny(words, tmp_path / "run", overwrite=True) == 0
    assert snapshot_steps(tmp_path / "run") == []


def test_a_collapsed_router_is_warned_of_once_and_recorded(words, tmp_path, capsys, at_step, monkeypatch):
    logits_of, bias_E = routing.LearnedRouter.forward, torch.zeros(4)

    def biased(self, x_BTD, ids_BS):
        return logits_of(self, x_BTD, ids_BS) + bias_E * self.layer

    monkeypatch.setattr(routing.LearnedRouter, "forward", biased)
    at_step(lambda: bias_E[2].fill_(50), 3)  # from here on, all that block 1 routes goes to its third expert
    assert train_tiny(words, tmp_path / "run", n_expert=4, expert_top_k=1) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "the router of block 1 has collapsed: of its 4 experts, one gets 100% of the choices" in warnings[0]
    assert [line["collapsed"] for line in lines_of(tmp_path / "run", "eval")] == [[], [1], [1]]
    assert [line["collapsed"] for line in record_of(tmp_path / "run")["evaluations"]] == [[], [1], [1]]
    records.read(tmp_path / "run" / "summary.json")


@pytest.mark.parametrize(
    "load, k, used",
    [
        ([0.25] * 4, 1, 1.0),
        ([1.0, 0.0, 0.0, 0.0], 1, 0.0),
        ([0.5, 0.5, 0.0, 0.0], 1, 1 / 3),
        ([0.5, 0.5, 0.0, 0.0], 2, 0.0),
        ([0.25] * 4, 4, None),  # all are used, whatever the load
        ([0.25] * 4, 0, None),
        ([1.0], 1, None),
    ],
)
def test_utilisation_by_hand(load, k, used):
    assert records.utilisation(load, k) == pytest.approx(used)


def test_resume_with_more_iterations_extends_the_run(words, dense_run, tmp_path, capsys):
    shutil.copytree(dense_run, tmp_path / "run")
    assert train_tiny(words, tmp_path / "run", init_from="resume", max_iters=25) == 0
    assert "max_iters is now 25 (was 20)" in capsys.readouterr().out
    assert optimizer_steps(tmp_path / "run") == {25}
    record = record_of(tmp_path / "run")
    assert record["iterations"] == 25 and record["config"]["max_iters"] == 25
    assert [line["step"] for line in record["evaluations"]] == [0, 10, 20, 25]
    assert essence(lines_of(tmp_path / "run"))[: len(lines_of(dense_run))] == essence(lines_of(dense_run))


EXTENDED = {"max_iters": [10, 20]}


@pytest.mark.parametrize(
    "first, second, straight, changed",
    [
        (dict(max_iters=10), dict(max_iters=20), False, EXTENDED),
        (dict(max_iters=10, lr_decay_iters=20), dict(max_iters=20, lr_decay_iters=20), True, EXTENDED),
        (dict(max_iters=10, decay_lr=False), dict(max_iters=20, decay_lr=False), True, EXTENDED),
        (dict(max_iters=10, eval_interval=4, decay_lr=False), dict(eval_interval=4, decay_lr=False), False, EXTENDED),
        (dict(max_iters=20), dict(lr_decay_iters=30), False, {"lr_decay_iters": [0, 30]}),
        (dict(max_iters=20), dict(eval_iters=3), False, {"eval_iters": [2, 3]}),
        (dict(max_iters=20), dict(eval_interval=5), False, {"eval_interval": [10, 5]}),
    ],
    ids=["extended", "its decay was set", "no decay", "one evaluation more", "decay", "eval_iters", "eval_interval"],
)
def test_a_record_tells_whether_the_run_is_that_of_its_config(
    words, tmp_path, at_step, capsys, first, second, straight, changed
):
    """Compared with the learning rates and evaluations that an uninterrupted run of the last config has."""
    if first["max_iters"] == 20:
        at_step(interrupt(), 9)
    train_tiny(words, tmp_path / "run", **first)
    assert train_tiny(words, tmp_path / "run", init_from="resume", **second) == 0
    record = record_of(tmp_path / "run")
    assert record["straight"] is straight is records.is_straight(record)
    assert record["stretches"] == [{"step": 10, "changed": changed}]
    assert identity.read(tmp_path / "run" / "config.json").straight is straight
    told = capsys.readouterr().out
    assert told.count("enters no mean  ") == told.count("will enter no mean") == (not straight)
    if straight:
        options = {key: value for key, value in second.items() if key != "max_iters"}
        assert train_tiny(words, tmp_path / "whole", **options) == 0
        assert essence(record["evaluations"]) == essence(record_of(tmp_path / "whole")["evaluations"])


def test_a_change_that_was_taken_back_before_any_update_leaves_the_run_straight(words, tmp_path, at_step):
    at_step(interrupt(), 9)
    train_tiny(words, tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "ckpt.pt")
    saved["config"]["max_iters"] = 30
    saved["progress"]["stretches"] = [{"step": 10, "changed": {"max_iters": [20, 30]}}]
    checkpoint.save(tmp_path / "run" / "ckpt.pt", saved)
    assert train_tiny(words, tmp_path / "run", init_from="resume") == 0
    assert record_of(tmp_path / "run")["straight"] and len(record_of(tmp_path / "run")["stretches"]) == 2


def test_a_run_made_partly_on_another_kind_of_machine_is_not_straight(words, tmp_path, at_step):
    at_step(interrupt(), 2)
    train_tiny(words, tmp_path / "run", max_iters=4)
    assert train_tiny(words, tmp_path / "run", max_iters=4, init_from="resume", dtype="bfloat16") == 0
    record = record_of(tmp_path / "run")
    (stretch,) = record["stretches"]
    before, after = stretch["changed"]["machine"]
    assert not record["straight"] and "float32" in before and after == records.machine_of(record)


def test_resume_with_fewer_iterations_than_were_made_is_refused(words, dense_run, tmp_path):
    """Else the record would claim 10 iterations for weights that saw 20."""
    shutil.copytree(dense_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises((ConfigError, CheckpointError), match="max_iters"):
        train_tiny(words, tmp_path / "run", init_from="resume", max_iters=10)
    assert contents(tmp_path / "run") == before


def test_a_complete_run_that_is_extended_has_no_record_until_it_ends(words, dense_run, tmp_path, at_step):
    """Else summary.json would be the record of another, shorter run than config.json and ckpt.pt."""
    shutil.copytree(dense_run, tmp_path / "run")
    at_step(interrupt(), 23)
    assert train_tiny(words, tmp_path / "run", init_from="resume", max_iters=30) == 130
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_complete_run_with_a_damaged_record_exits_2_and_names_the_way_out(
    words, dense_run, tmp_path, monkeypatch, capsys, content
):
    shutil.copytree(dense_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(content)
    options = {**TINY, "dataset": words, "out_dir": tmp_path / "run", "init_from": "resume"}
    command = [f"--{key}={value}" for key, value in options.items()]
    assert as_script(monkeypatch, *command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "summary.json" in message and "delete it, and the same command" in message
    (tmp_path / "run" / "summary.json").unlink()
    assert as_script(monkeypatch, *command) == 0
    assert record_of(tmp_path / "run")["clean"] == record_of(dense_run)["clean"]


@pytest.mark.parametrize("changes", [dict(n_embd=32), dict(learning_rate=0.005), dict(n_embd=32, seed=5)])
def test_resume_as_another_experiment_is_refused_naming_each_key(words, dense_run, tmp_path, changes):
    shutil.copytree(dense_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        train_tiny(words, tmp_path / "run", init_from="resume", **changes)
    for key, value in changes.items():
        assert f"{key}=" in str(caught.value) and f"{value!r} here" in str(caught.value)
    assert "--out_dir" in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_resume_on_another_text_is_refused_and_shows_how_they_differ(words, dense_run, tmp_path, monkeypatch):
    """The same name and vocabulary, but other words: only the SHA-256 can tell the two apart."""
    dataset = prepare_text(tmp_path / "other", english(4500, seed=99))
    original = dataset_of_run.find_dataset
    monkeypatch.setattr(dataset_of_run, "find_dataset", lambda name: dataset if name == str(words) else original(name))
    shutil.copytree(dense_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another text") as caught:
        train_tiny(words, tmp_path / "run", init_from="resume")
    assert contents(tmp_path / "run") == before
    for folder in (words, dataset):
        assert Dataset.open(folder).source_sha256[:8] in str(caught.value)


@pytest.mark.parametrize(
    "again, expected",
    [
        (dict(splits={"train": 80, "val": 10, "test": 10}), "'val': 481, .* there, .*'val': 962, .* here"),
        (dict(unit="byte"), "46 characters, .* there, .*46 bytes, .* here"),
    ],
    ids=["splits", "unit"],
)
def test_resume_on_the_text_prepared_otherwise_is_refused_and_shows_how(tmp_path, at_step, again, expected):
    data, text = tmp_path / "data", english(2000, seed=1)
    at_step(interrupt(), 3)
    assert train_tiny(prepare_text(data, text), tmp_path / "run") == 130
    shutil.rmtree(data)
    with pytest.raises(CheckpointError, match=f"another preparation of its text: .*{expected}; prepare it as"):
        train_tiny(prepare_text(data, text, **again), tmp_path / "run", init_from="resume")


def test_resume_with_the_experts_of_each_block_spelled_otherwise(words, tmp_path, at_step):
    """Also where an older version kept the spelling."""
    at_step(interrupt(), 3)
    assert train_tiny(words, tmp_path / "run", n_expert=4, n_expert_by_block="4, 2") == 130
    state = checkpoint.load(tmp_path / "run" / "ckpt.pt")
    assert state["config"]["n_expert_by_block"] == "4,2"
    state["config"]["n_expert_by_block"] = " 4, 02"
    checkpoint.save(tmp_path / "run" / "ckpt.pt", {key: value for key, value in state.items() if key != "format"})
    options = dict(init_from="resume", n_expert=4, n_expert_by_block="4 ,2")
    assert train_tiny(words, tmp_path / "run", **options) == 0 and record_of(tmp_path / "run")["straight"]


def test_a_link_to_a_folder_is_that_folder_and_one_to_nothing_is_refused(words, tmp_path, at_step):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    at_step(interrupt(), 3)
    assert train_tiny(words, tmp_path / "link") == 130
    assert train_tiny(words, f"{tmp_path}/real/", init_from="resume") == 0 and (tmp_path / "link").is_symlink()
    (tmp_path / "lost").symlink_to("nothing")
    with pytest.raises(ConfigError, match="lost is a link to nothing, which is not there"):
        train_tiny(words, tmp_path / "lost")


def test_resume_without_a_checkpoint_is_refused(words, tmp_path):
    with pytest.raises(CheckpointError, match="no ckpt.pt to resume from") as caught:
        train_tiny(words, tmp_path / "run", init_from="resume")
    assert "--init_from=scratch" in str(caught.value) and not (tmp_path / "run").exists()


def test_resume_from_a_truncated_checkpoint_is_refused_and_changes_nothing(words, dense_run, tmp_path):
    shutil.copytree(dense_run, tmp_path / "run")
    path = tmp_path / "run" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match="ckpt.pt has no checksum of this program"):
        train_tiny(words, tmp_path / "run", init_from="resume")
    assert contents(tmp_path / "run") == before


A, B = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    "before, now, same, found",
    [
        ((A, False), (A, False), True, (A, False)),
        ((A, False), (B, False), True, (B, False)),
        ((A, False), (B, False), False, (B, True)),
        ((A, True), (A, False), True, (A, True)),
        ((A, False), (A, True), True, (A, True)),
        ((None, None), (A, False), False, (A, True)),
    ],
    ids=["same commit", "same code", "other code", "dirty before", "dirty now", "unknown before"],
)  # fmt: skip
def test_a_resumed_run_is_clean_where_one_code_made_it_all(
    words, tmp_path, at_step, monkeypatch, capsys, before, now, same, found
):
    """The record is of the last session's commit, whose code must be that of all sessions; a change is told."""
    compared = []
    monkeypatch.setattr(machines, "same_code", lambda *commits: compared.append(commits) or same)
    at_step(interrupt(), 2)
    for (commit, dirty), options in ((before, {}), (now, dict(init_from="resume"))):
        monkeypatch.setattr(
            machines, "git_state", lambda commit=commit, dirty=dirty: {"commit": commit, "dirty": dirty}
        )
        train_tiny(words, tmp_path / "run", max_iters=4, **options)
    is_told = "resumed with other code (" in capsys.readouterr().out
    assert is_told == (before[1] is False and found[1] is not False)
    record = record_of(tmp_path / "run")
    assert record["resumed"] == 1 and record["git"] == {"commit": found[0], "dirty": found[1]}
    assert set(compared) <= {(before[0], now[0])}


@pytest.fixture
def others(monkeypatch):
    """{"core_seconds": what others have taken so far}, in place of what they really did."""
    clock = {"core_seconds": 0.0}
    monkeypatch.setattr(machines, "_busy_seconds", lambda: clock["core_seconds"])
    monkeypatch.setattr(machines, "_own_seconds", lambda: 0.0)
    return clock


@pytest.mark.parametrize("where", ["this", "another", "an unknown"])
def test_times_of_a_run_that_changed_machines_do_not_count(words, tmp_path, at_step, others, capsys, where):
    at_step(interrupt(), 2)
    assert train_tiny(words, tmp_path / "run", max_iters=4) == 130
    state = checkpoint.load(tmp_path / "run" / "ckpt.pt")
    here = {**machines.describe(machines.choose("cpu")), "processes": 1}
    assert state["progress"]["machine"] == here
    if where == "another":
        state["progress"]["machine"] |= {"cores": 999, "python": "2.7", "capture": True}
    elif where == "an unknown":  # as in checkpoints that are older
        del state["progress"]["machine"]
    checkpoint.save(tmp_path / "run" / "ckpt.pt", state)
    capsys.readouterr()
    assert train_tiny(words, tmp_path / "run", max_iters=4, init_from="resume") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "another machine" in line]
    both = f"cores 999, python 2.7, capture True there, cores {here['cores']}, python {here['python']}, no capture here"
    between = {"another": both, "an unknown": f"which one is not known, {here['device']} here"}.get(where)
    assert told == ([f"resumed on another machine ({between}): its times will not count"] if between else [])
    record = record_of(tmp_path / "run")
    assert record["exclusive"] is (where == "this") and (record["others"]["cpu_share"] is None) is (where != "this")
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["machine"] == here


@pytest.mark.parametrize("when", ["never", "training", "writing"])
def test_the_time_of_writing_is_watched_apart_from_that_of_training(
    words, tmp_path, at_step, others, monkeypatch, when
):
    def come():
        others["core_seconds"] += 1000.0

    original = evaluate.inference_speed

    def inference_speed(*arguments):
        if when == "writing":
            come()
        return original(*arguments, characters=2)

    monkeypatch.setattr(evaluate, "inference_speed", inference_speed)
    if when == "training":
        at_step(come, 1)
    assert train_tiny(words, tmp_path / "run", max_iters=2, inference_samples=1) == 0
    record = record_of(tmp_path / "run")
    assert record["exclusive"] is (when != "training")
    assert record["inference"]["exclusive"] is (when != "writing")


# ---------------------------------------------------------------------------------------------------------------------
# The same folder again


@pytest.mark.parametrize("state", ["complete", "unfinished"])
def test_the_same_command_twice_is_refused_and_loses_nothing(words, tmp_path, at_step, state):
    if state == "unfinished":
        at_step(interrupt(), 13)
    train_tiny(words, tmp_path / "run", title="my run")
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        train_tiny(words, tmp_path / "run", title="my run")
    article = "a" if state == "complete" else "an"
    for word in (
        f"holds {article} {state} run;",
        "nothing was changed",
        "--init_from=resume",
        "--out_dir",
        "--seed",
        "--overwrite=True",
    ):
        assert word in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_overwrite_starts_again(words, moe_run, dense_run, tmp_path):
    shutil.copytree(moe_run, tmp_path / "run")
    assert train_tiny(words, tmp_path / "run", "--overwrite=True") == 0
    assert_same_run(dense_run, tmp_path / "run")


def test_an_overwritten_run_that_is_stopped_is_not_complete(words, moe_run, tmp_path, at_step):
    shutil.copytree(moe_run, tmp_path / "run")
    at_step(interrupt(), 3)
    assert train_tiny(words, tmp_path / "run", overwrite=True) == 130
    unfinished = FILES - {"summary.json"} | {"ckpt.previous.pt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == unfinished


def test_overwrite_leaves_files_that_are_not_the_runs(words, dense_run, tmp_path):
    shutil.copytree(dense_run, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train_tiny(words, tmp_path / "run", overwrite=True, max_iters=1) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_refused_data_set_does_not_cost_the_run_that_was_to_be_overwritten(dense_run, tmp_path):
    shutil.copytree(dense_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(DataError):
        train_tiny(tmp_path / "absent", tmp_path / "run", overwrite=True)
    assert contents(tmp_path / "run") == before


def test_eval_only_writes_nothing(words, tmp_path, capsys):
    assert train_tiny(words, tmp_path / "run", eval_only=True) == 0
    assert "validation" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_eval_only_of_a_run_gives_its_last_loss_and_leaves_it(words, dense_run, capsys):
    before = contents(dense_run)
    assert train_tiny(words, dense_run, eval_only=True, init_from="resume") == 0
    out = capsys.readouterr().out
    assert "step 20 " in out and f"{record_of(dense_run)['clean']['final']['nats']:.4f} nats" in out
    assert contents(dense_run) == before
