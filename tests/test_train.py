"""train.py: a run that can be trusted, stopped, and gone on with. Tiny models, in process, everything under
tmp_path."""

import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alike import HARD, STATEFUL, assert_same_run, essence, lines_of, record_of, steps_of, weights_of
from conftest import TINY, as_script, contents, english, interrupt, prepare_text, soaked, tiny, train_tiny

import routing
import train
from data.common import DataError, Dataset
from model import GPT
from run import checkpoint, evaluate, progress, records, run_folder, update
from run import dataset as dataset_of_run
from run.checkpoint import CheckpointError
from run.settings import Config
from support import machines
from support.files import FileError
from support.options import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FILES = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "summary.json"}


def numbers_in(value, where=""):
    """(where, number) for every leaf of a record that is no text, truth value or null."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in numbers_in(inner, f"{where}/{key}")]
    if isinstance(value, list):
        return [leaf for i, inner in enumerate(value) for leaf in numbers_in(inner, f"{where}/{i}")]
    return [(where, value)]


# ---------------------------------------------------------------------------------------------------------------------
# A complete run


def test_a_run_leaves_its_five_files_and_nothing_else(dense_run):
    assert {path.name for path in dense_run.iterdir()} == FILES


def test_the_config_file_holds_every_key(dense_run):
    saved = json.loads((dense_run / "config.json").read_text())
    assert set(saved) == set(Config().to_dict())
    assert {key: saved[key] for key in TINY} == TINY


def optimizer_steps(out_dir):
    state = checkpoint.load(out_dir / "ckpt.pt")["optimizer"]["state"]
    return {int(entry["step"]) for entry in state.values()}


@pytest.mark.parametrize("max_iters, evaluated", [(20, [0, 10, 20]), (23, [0, 10, 20, 23]), (7, [0, 7]), (1, [0, 1])])
def test_exactly_max_iters_updates_are_made_and_the_last_is_evaluated(words, tmp_path, max_iters, evaluated):
    assert train_tiny(words, tmp_path / "run", max_iters=max_iters) == 0
    assert optimizer_steps(tmp_path / "run") == {max_iters}
    assert steps_of(tmp_path / "run", "eval") == evaluated
    assert [line["step"] for line in record_of(tmp_path / "run")["evaluations"]] == evaluated
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == max_iters


def test_training_is_logged_every_log_interval_and_before_each_evaluation(words, tmp_path):
    assert train_tiny(words, tmp_path / "run", max_iters=13, log_interval=4, eval_interval=6) == 0
    assert steps_of(tmp_path / "run", "train") == [4, 6, 8, 12, 13]


def test_the_logged_learning_rate_is_that_of_the_last_update(dense_run):
    config = tiny()
    assert [line["learning_rate"] for line in lines_of(dense_run, "train")] == [
        update.learning_rate(s - 1, config) for s in (5, 10, 15, 20)
    ]


def test_a_log_line_is_the_mean_of_its_own_steps(words, tmp_path):
    train_tiny(words, tmp_path / "each", log_interval=1)
    train_tiny(words, tmp_path / "fives", log_interval=5)
    each = [line["loss"] for line in lines_of(tmp_path / "each", "train")]
    fives = [line["loss"] for line in lines_of(tmp_path / "fives", "train")]
    assert fives == pytest.approx([sum(each[i : i + 5]) / 5 for i in (0, 5, 10, 15)], rel=1e-6)


@pytest.mark.parametrize("run", ["dense_run", "moe_run"])
def test_every_number_of_the_record_is_a_number(run, request):
    leaves = numbers_in(record_of(request.getfixturevalue(run)))
    assert len(leaves) > 100
    for where, value in leaves:
        assert value is None or isinstance(value, (bool, int, float, str)), where
        if isinstance(value, float):
            assert math.isfinite(value), where
        if isinstance(value, str):
            with pytest.raises(ValueError):
                float(value)


def test_the_record_counts_what_was_done(words, tmp_path):
    assert train_tiny(words, tmp_path / "run", batch_size=3, gradient_accumulation_steps=2, max_iters=6) == 0
    record = record_of(tmp_path / "run")
    config = Config.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    dataset = Dataset.open(words)
    model = GPT(config, dataset.vocabulary.size)
    assert record["iterations"] == 6
    assert record["tokens"] == 6 * 3 * 2 * 16
    assert record["epochs"] == record["tokens"] / dataset.sizes["train"]
    assert record["parameters"]["total"] == sum(p.numel() for p in model.parameters()) == record["parameters"]["active"]
    assert record["training_flops_per_token"] == model.flops_per_token()
    assert record["run_id"] == config.run_id
    assert record["config"] == config.to_dict()
    assert record["dataset"] == dataset.describe() and set(dataset.sizes) == {"train", "val", "test"}
    assert record["resumed"] == 0 and record["leaky"] is False and record["seconds"]["compile"] == 0


def test_flops_of_a_dense_model_by_hand(dense_run):
    """Per token: 6 FLOPs a weight of every matrix (attention 4 D², MLP 8 D², output V·D), and 12·T·D for attention in
    each layer."""
    record = record_of(dense_run)
    layers, width, positions, symbols = 2, 16, 16, record["dataset"]["vocab_size"]
    assert (
        record["training_flops_per_token"]
        == 6 * (layers * 12 * width**2 + symbols * width) + 12 * layers * positions * width
    )


def test_the_best_is_the_minimum_of_the_evaluations_and_test_is_read_from_it(words, tmp_path, monkeypatch):
    """The last 10 steps are so large that they spoil the model: the best is in the middle."""
    monkeypatch.setattr(update, "learning_rate", lambda step, config: 0.01 if step < 20 else 0.5)
    assert train_tiny(words, tmp_path / "run", max_iters=30) == 0
    record = record_of(tmp_path / "run")
    best = min(record["evaluations"], key=lambda line: line["clean"]["nats"])
    assert best["step"] == 20
    assert record["clean"]["best"] == {**best["clean"], "step": best["step"]}
    assert record["clean"]["final"]["nats"] == record["evaluations"][-1]["clean"]["nats"]
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == best["step"] == record["test"]["step"]
    assert record["paper"]["best_val"] == min(line["paper"]["val"] for line in record["evaluations"])

    config, dataset = Config.from_dict(record["config"]), Dataset.open(words)
    model = GPT(config, dataset.vocabulary.size)
    model.load_state_dict(weights_of(tmp_path / "run", "best.pt"))
    assert record["test"]["nats"] == evaluate.full_loss(model, dataset, "test", config, machines.choose("cpu")).nats
    assert record["test"]["nats"] < record["clean"]["final"]["nats"] - 0.1


def test_a_text_without_a_test_split_has_a_null_test(tmp_path):
    dataset = prepare_text(tmp_path / "data", english(1500, seed=4), splits={"train": 90, "val": 10})
    assert train_tiny(dataset, tmp_path / "run", max_iters=1) == 0
    assert record_of(tmp_path / "run")["test"] is None


def test_sampled_validation_with_aux_exceeds_the_plain_one_by_the_weighted_losses(dense_run, words, tmp_path):
    assert train_tiny(words, tmp_path / "run", n_expert=4, aux_loss_coef=0.5, max_iters=1) == 0
    for line in lines_of(tmp_path / "run", "eval"):
        assert (
            0.5 * 2 * 0.9 < line["paper"]["val_with_aux"] - line["paper"]["val"] < 0.5 * 2 * 4
        )  # 2 layers, each from 1 to 4
    for line in lines_of(dense_run, "eval"):
        assert (
            line["paper"]["val_with_aux"] == line["paper"]["val"]
            and line["paper"]["train_with_aux"] == line["paper"]["train"]
        )


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(n_expert=4, expert_top_k=2, capacity_factor=0.5),
        soaked(dict(n_expert=4)),
        soaked(dict(n_expert=4, expert_top_k=0, expert_kind="linear_concat", aux_loss="none")),
    ],
)
def test_a_run_learns(words, tmp_path, changes):
    options = dict(max_iters=120, batch_size=16, n_embd=32, eval_interval=120, log_interval=120)
    assert train_tiny(words, tmp_path / "run", **options, **changes) == 0
    first, *_, last = [line["clean"]["nats"] for line in lines_of(tmp_path / "run", "eval")]
    assert last < first - 1.0
    assert record_of(tmp_path / "run")["test"]["nats"] < first - 1.0


def test_the_screen_shows_machine_size_losses_and_the_next_command(words, tmp_path, capsys):
    train_tiny(words, tmp_path / "run", n_expert=4, expert_top_k=2, capacity_factor=0.5)
    out = capsys.readouterr().out
    for word in (
        "device cpu",
        "parameters",
        "best validation",
        "test",
        "bits per character",
        "dropped",
        f"python sample.py --out_dir={tmp_path / 'run'}",
    ):
        assert word in out


# ---------------------------------------------------------------------------------------------------------------------
# What must never change training


@pytest.mark.parametrize(
    "changes",
    [
        dict(eval_interval=3, eval_iters=5, log_interval=1, save_every=3),
        dict(eval_interval=1000),
        *map(soaked, [dict(eval_interval=3), dict(eval_iters=5), dict(log_interval=1), dict(save_every=3)]),
    ],
)
def test_evaluating_logging_and_saving_do_not_change_training(words, tmp_path, uninterrupted, changes):
    train_tiny(words, tmp_path / "run", **HARD, **changes)
    assert essence(weights_of(tmp_path / "run")) == essence(weights_of(uninterrupted))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(words, tmp_path, uninterrupted):
    torch.rand(5)  # whatever was drawn before
    for name, seed in (("again", Config().seed), ("other", 2)):
        train_tiny(words, tmp_path / name, seed=seed, **HARD)
    assert_same_run(uninterrupted, tmp_path / "again")
    assert essence(weights_of(uninterrupted)) != essence(weights_of(tmp_path / "other"))


def test_accumulation_sees_the_same_rows_and_gives_the_same_weights(words, tmp_path, monkeypatch):
    """4 batches of 3 rows and 1 of 12: the mean gradient is the same but for rounding."""
    rows = {}
    original = Dataset.batch

    def spy(self, split, seed, step, *shape):
        x, y = original(self, split, seed, step, *shape)
        if seed == Config().seed:
            rows.setdefault(name, {})[step] = x
        return x, y

    monkeypatch.setattr(Dataset, "batch", spy)
    for name, shape in {
        "whole": dict(batch_size=12),
        "parts": dict(batch_size=3, gradient_accumulation_steps=4),
    }.items():
        assert train_tiny(words, tmp_path / name, max_iters=5, **shape) == 0
    assert set(rows["whole"]) == set(rows["parts"]) == set(range(5))
    assert all(torch.equal(rows["whole"][step], rows["parts"][step]) for step in range(5))
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-4)
    whole, parts = lines_of(tmp_path / "whole", "train")[0], lines_of(tmp_path / "parts", "train")[0]
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)
    assert whole["gradient_norm"] == pytest.approx(parts["gradient_norm"], rel=1e-3)


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
    assert record_of(out_dir)["resumed"] == len(stops) and record_of(uninterrupted)["resumed"] == 0


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


@pytest.mark.parametrize("kind", ["bias", "annealed", *(soaked(kind) for kind in STATEFUL)])  # all: test_kills.py
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
    words, tmp_path, at_step, monkeypatch, before, now, same, found
):
    """The record is of the last session's commit, whose code must be that of all sessions."""
    compared = []
    monkeypatch.setattr(machines, "same_code", lambda *commits: compared.append(commits) or same)
    at_step(interrupt(), 2)
    for (commit, dirty), options in ((before, {}), (now, dict(init_from="resume"))):
        monkeypatch.setattr(
            machines, "git_state", lambda commit=commit, dirty=dirty: {"commit": commit, "dirty": dirty}
        )
        train_tiny(words, tmp_path / "run", max_iters=4, **options)
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
        state["progress"]["machine"] |= {"cores": 999, "python": "2.7"}
    elif where == "an unknown":  # as in checkpoints that are older
        del state["progress"]["machine"]
    checkpoint.save(tmp_path / "run" / "ckpt.pt", state)
    capsys.readouterr()
    assert train_tiny(words, tmp_path / "run", max_iters=4, init_from="resume") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "another machine" in line]
    both = f"cores 999, python 2.7 there, cores {here['cores']}, python {here['python']} here"
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


# ---------------------------------------------------------------------------------------------------------------------
# Loss or gradient not finite

DIVERGE = dict(learning_rate="1e30", grad_clip=0, warmup_iters=0)


def assert_stopped_not_finite(out_dir, capsys):
    """The last good checkpoint is named, whole, finite; and there is no record."""
    message = capsys.readouterr().err
    assert "not finite" in message and str(out_dir / "ckpt.pt") in message and "Traceback" not in message
    assert all(torch.isfinite(weight).all() for weight in weights_of(out_dir).values())
    assert not (out_dir / "summary.json").exists()
    for line in lines_of(out_dir):
        assert all(math.isfinite(value) for _, value in numbers_in(line) if isinstance(value, float))
    return message


CAPACITY = dict(n_expert=4, expert_top_k=2, capacity_factor=0.5)


@pytest.mark.parametrize(
    "experts, eval_interval",
    [
        (dict(), 1),
        (CAPACITY, 10),
        soaked(dict(), 10),
        soaked(CAPACITY, 1),
        *(soaked(dict(n_expert=4), n) for n in (1, 10)),
    ],
)
def test_a_run_that_diverges_stops_with_3_and_a_good_checkpoint(words, tmp_path, capsys, experts, eval_interval):
    assert train_tiny(words, tmp_path / "run", **DIVERGE, **experts, eval_interval=eval_interval) == 3
    assert_stopped_not_finite(tmp_path / "run", capsys)


@pytest.mark.parametrize("rate", [soaked("1e5"), "1e10", soaked("1e19")])
@pytest.mark.parametrize("experts", [dict(), dict(n_expert=4)], ids=["dense", "moe"])
def test_metrics_of_a_run_that_nearly_diverges_are_finite(words, tmp_path, capsys, experts, rate):
    """Huge but finite weights: every sum and mean of a log line can overflow on its own."""
    code = train_tiny(
        words,
        tmp_path / "run",
        **{**DIVERGE, "learning_rate": rate},
        **experts,
        eval_interval=1,
        log_interval=1,
        max_iters=6,
    )
    assert code in (0, 3)
    for line in lines_of(tmp_path / "run"):
        assert all(math.isfinite(value) for _, value in numbers_in(line) if isinstance(value, float))


@pytest.fixture
def poisoned(monkeypatch, at_step):
    """A function that makes the loss NaN in one update."""

    def poison(bad_step):
        bad = []

        class Poisoned(GPT):
            def forward(self, *arguments, **options):
                out = super().forward(*arguments, **options)
                return out._replace(loss=out.loss * bad.pop()) if bad else out

        monkeypatch.setattr(train, "GPT", Poisoned)
        at_step(lambda: bad.append(math.nan), bad_step)

    return poison


def test_one_bad_step_is_named_and_never_applied(words, tmp_path, capsys, poisoned):
    poisoned(12)
    assert train_tiny(words, tmp_path / "run") == 3
    assert "step 12" in assert_stopped_not_finite(tmp_path / "run", capsys)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 10
    assert steps_of(tmp_path / "run", "train") == [5, 10]


def test_a_signal_right_after_a_bad_step_saves_no_bad_state(words, tmp_path, capsys, poisoned, at_step):
    """The guard is read at log points only; a stop between them must not save steps that were refused as if they were
    made."""
    poisoned(12)
    at_step(interrupt(), 13)
    assert train_tiny(words, tmp_path / "run") == 3
    assert_stopped_not_finite(tmp_path / "run", capsys)
    saved = checkpoint.load(tmp_path / "run" / "ckpt.pt")
    assert saved["progress"]["step"] <= 12
    assert all(torch.isfinite(value) for value in saved["processes"][0]["interval"]["sums"].values())


def test_a_save_between_log_points_saves_no_bad_state(words, tmp_path, capsys, poisoned):
    poisoned(12)
    assert train_tiny(words, tmp_path / "run", save_minutes=1e-9) == 3
    assert "step 12" in assert_stopped_not_finite(tmp_path / "run", capsys)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# The data set


@pytest.fixture
def unprepared(tmp_path, monkeypatch):
    """A function that makes an unprepared data folder of the project, whose prepare.py is `script`."""
    monkeypatch.setattr(dataset_of_run, "ROOT", tmp_path)

    def make(script):
        folder = tmp_path / "data" / "unprepared"
        folder.mkdir(parents=True)
        (folder / "prepare.py").write_text(script)
        return folder

    return make


def test_prepare_false_refuses_and_names_the_command(unprepared, tmp_path):
    folder = unprepared(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    with pytest.raises(DataError) as caught:
        train_tiny(folder, tmp_path / "run", prepare=False)
    message = str(caught.value)
    assert "not prepared" in message and "--prepare=False" in message and "python" in message
    assert (Path.cwd() / message.rpartition("python ")[2]).resolve() == folder / "prepare.py"
    assert not (tmp_path / "it-ran").exists() and not (tmp_path / "run").exists()


def test_a_missing_data_set_is_prepared(unprepared, words, tmp_path, capsys):
    folder = unprepared(
        f"import shutil; shutil.copytree({str(words)!r}, __file__.removesuffix('prepare.py'), dirs_exist_ok=True)"
    )
    assert train_tiny(folder, tmp_path / "run", max_iters=1) == 0
    assert "not prepared yet: running python" in capsys.readouterr().out


def test_a_prepare_script_outside_of_the_project_is_not_run(unprepared, tmp_path, monkeypatch):
    """A path may lead to somebody else's prepare.py, which may do anything."""
    folder = unprepared(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    monkeypatch.undo()
    with pytest.raises(DataError, match="not prepared yet"):
        train_tiny(folder, tmp_path / "run")
    assert not (tmp_path / "it-ran").exists()


def test_a_folder_in_use_by_another_run_is_refused(words, tmp_path, at_step):
    refused = []

    def intrude():
        for options in (dict(overwrite=True), dict(init_from="resume")):
            with pytest.raises(CheckpointError) as caught:
                train_tiny(words, tmp_path / "run", **options)
            refused.append(str(caught.value))

    at_step(intrude, 12)
    assert train_tiny(words, tmp_path / "run") == 0
    assert len(refused) == 2 and all("in use by another run" in message for message in refused)
    assert record_of(tmp_path / "run")["iterations"] == 20


def test_resume_writes_best_weights_that_a_power_cut_prevented(words, tmp_path, monkeypatch, at_step, uninterrupted):
    """ckpt.pt is written first, and has them."""
    original = checkpoint.save

    def save(path, state, previous=None):
        if path.name == "best.pt" and state["step"] == 10:
            raise KeyboardInterrupt
        original(path, state, previous)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(words, tmp_path / "run", **HARD)
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == 0
    monkeypatch.undo()
    at_step(interrupt(), 11)
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 130
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == 10
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_prepare_that_fails_is_one_error(unprepared, tmp_path):
    folder = unprepared("import sys; sys.exit('no network')")
    with pytest.raises(DataError, match="could not be prepared"):
        train_tiny(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_block_longer_than_a_split_is_refused(words, tmp_path):
    size = Dataset.open(words).sizes["val"]
    with pytest.raises(DataError) as caught:
        train_tiny(words, tmp_path / "run", block_size=size)
    for word in ("val split", f"{size:,}", f"block_size={size}"):
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_truncated_bin_is_refused_by_name(words, tmp_path):
    shutil.copytree(words, tmp_path / "data")
    path = tmp_path / "data" / "val.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"val\.bin: cut short"):
        train_tiny(tmp_path / "data", tmp_path / "run")


def test_a_folder_without_meta_json_is_refused_with_the_way_out(words, tmp_path):
    shutil.copytree(words, tmp_path / "data")
    (tmp_path / "data" / "meta.json").unlink()
    with pytest.raises(DataError, match="without meta.json") as caught:
        train_tiny(tmp_path / "data", tmp_path / "run")
    assert "prepare.py" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train_tiny(words, tmp_path / "run", device="cuda")
    assert len(caught.value.problems) == 1 and "no cuda device" in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Disks, clocks and loggers


def test_a_disk_that_fills_up_costs_no_checkpoint(words, tmp_path, at_step, monkeypatch):
    """From step 7 on, nothing can be made durable any more."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(lambda: monkeypatch.setattr(os, "fsync", full), 7)
    with pytest.raises(FileError) as caught:
        train_tiny(words, tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value) and "disk is full" in str(caught.value)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 0


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(words, tmp_path, at_step, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(lambda: monkeypatch.setattr(os, "replace", full), 7)
    with pytest.raises(FileError, match="disk is full") as caught:
        train_tiny(words, tmp_path / "run")
    assert "saved before is untouched" in str(caught.value) and ".pt" in str(caught.value)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 0
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == 0
    monkeypatch.undo()
    assert train_tiny(words, tmp_path / "run", init_from="resume") == 0


@pytest.mark.parametrize("is_small", [False, True], ids=["without cpu.py", "with cpu.py"])
def test_a_long_run_on_a_cpu_names_the_command_for_cpu_size_once(words, tmp_path, monkeypatch, capsys, is_small):
    monkeypatch.setattr(progress, "SLOW_SECONDS", 0.0)
    overlay = [str(ROOT / "config" / "cpu.py")] if is_small else []
    train_tiny(words, tmp_path / "run", *overlay, max_iters=30)
    out = capsys.readouterr().out
    assert out.count("At this speed the run needs") == 1
    assert out.count("config/cpu.py") == (0 if is_small else 1)


def test_a_config_file_after_cpu_py_that_changes_its_sizes_is_warned_of(monkeypatch):
    monkeypatch.chdir(ROOT)
    cpu, large = "config/cpu.py", "config/shakespeare_moe4.py"
    told = progress.overridden_cpu_size(ROOT / "train.py", [cpu, "--seed=2", large])
    assert f"{large} comes after {cpu}" in told and "n_layer=6" in told and f"train.py {large} {cpu}" in told
    for words in ([large, cpu], [large], [cpu], [cpu, "--n_layer=6"], []):
        assert progress.overridden_cpu_size(ROOT / "train.py", words) == ""


def test_a_run_without_wandb_installed_says_so_and_goes_on(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_tiny(words, tmp_path / "run", wandb_log=True, max_iters=1) == 0
    assert "wandb cannot be used" in capsys.readouterr().out


def test_wandb_gets_every_line(words, tmp_path, monkeypatch):
    logged = []

    class FakeWandb:
        init = staticmethod(lambda **about: logged.append(about))
        log = staticmethod(lambda numbers, step: logged.append((step, numbers)))

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    assert train_tiny(words, tmp_path / "run", wandb_log=True, title="mine") == 0
    about, *lines = logged
    assert about["project"] == "charmoe" and about["name"] == "mine" and about["config"]["n_embd"] == 16
    assert [step for step, _ in lines] == [line["step"] for line in lines_of(tmp_path / "run")]
    assert lines[0][1]["eval/clean/nats"] == lines_of(tmp_path / "run")[0]["clean"]["nats"]


@pytest.mark.parametrize("stops", [(), (13,)], ids=["whole", "resumed"])
def test_compilation_changes_no_weight_and_no_random_state(words, tmp_path, uninterrupted, monkeypatch, at_step, stops):
    """torch.compile without the compiler: its trial step must move no weight, no gradient and no random state."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    at_step(interrupt(), *stops)
    assert train_tiny(words, tmp_path / "run", compile=True, **HARD) == (130 if stops else 0)
    if stops:
        assert train_tiny(words, tmp_path / "run", init_from="resume", compile=True, **HARD) == 0
    assert essence(weights_of(tmp_path / "run")) == essence(weights_of(uninterrupted))
    assert essence(lines_of(tmp_path / "run")) == essence(lines_of(uninterrupted))


@pytest.mark.parametrize("message", ["no C++ compiler\nand a page more", ""], ids=["with a reason", "without words"])
def test_a_model_that_does_not_compile_is_trained_without(words, tmp_path, uninterrupted, monkeypatch, capsys, message):
    class Broken:
        def train(self):
            raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", lambda model, **options: Broken())
    assert train_tiny(words, tmp_path / "run", compile=True, **HARD) == 0
    out = capsys.readouterr().out
    assert "torch.compile failed" in out and "RuntimeError" in out and "a page more" not in out
    assert essence(weights_of(tmp_path / "run")) == essence(weights_of(uninterrupted))
    assert record_of(tmp_path / "run")["machine"]["compile"] is False


# ---------------------------------------------------------------------------------------------------------------------
# As a script


def test_an_unknown_key_exits_2_with_one_message(tmp_path, monkeypatch, capsys):
    assert as_script(monkeypatch, "--n_emdb=32", f"--out_dir={tmp_path / 'run'}") == 2
    assert capsys.readouterr() == ("", "train.py: --n_emdb=32: unknown key 'n_emdb'; nearest key: n_embd\n")
    assert not (tmp_path / "run").exists()


def test_help_exits_0_and_lists_every_key(monkeypatch, capsys):
    assert as_script(monkeypatch, "--help") == 0
    out, error = capsys.readouterr()
    assert error == "" and all(f"--{key}=" in out for key in Config().to_dict())


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_out_dir_that_is_a_file_exits_2_with_one_line(words, tmp_path, monkeypatch, capsys, below):
    (tmp_path / "file").write_text("mine")
    options = {**TINY, "dataset": words, "out_dir": tmp_path / "file" / below}
    assert as_script(monkeypatch, *[f"--{key}={value}" for key, value in options.items()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("train.py: ") and message.count("\n") == 1 and str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "mine"


def test_ctrl_c_before_the_first_step_exits_130_without_a_traceback(monkeypatch):
    """While the text is prepared or the model compiled there is nothing to save yet."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(machines, "choose", interrupted)
    assert as_script(monkeypatch) == 130


def test_a_script_interrupted_for_real_exits_130_and_can_be_resumed(words, tmp_path):
    """The whole way once: a process of its own, Ctrl-C from outside, its exit code and its message."""
    options = [
        f"--{key}={value}"
        for key, value in {**TINY, "dataset": words, "out_dir": tmp_path / "run", "max_iters": 1_000_000}.items()
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 10 "):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == ""
    assert "stopped by SIGINT" in out and "--init_from=resume" in out
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] >= 10


def test_the_test_loss_is_of_the_best_weights_even_if_best_pt_is_damaged(words, tmp_path, at_step, dense_run):
    best = tmp_path / "run" / "best.pt"
    at_step(lambda: best.write_bytes(b"gone"), 12)
    assert train_tiny(words, tmp_path / "run") == 0
    assert record_of(tmp_path / "run")["test"] == record_of(dense_run)["test"]


def test_the_line_of_an_evaluation_names_both_losses():
    line = {"step": 250, "clean": {"nats": 1.5, "bpc": 2.164}, "paper": {"train": 1.25, "val": 1.75}}
    told = progress.evaluation_text(line, tiny(max_iters=2000, eval_iters=7), is_best=True)
    assert told == (
        "step 250 of 2,000: validation 1.5000 nats, 2.1640 bpc (best so far); 7 batches of train 1.2500 nats"
    )
