"""train.py: what a complete run leaves, that watching it changes nothing, loggers, and the script itself."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from alike import (
    FILES,
    HARD,
    assert_same_run,
    essence,
    lines_of,
    numbers_in,
    optimizer_steps,
    record_of,
    steps_of,
    weights_of,
)
from conftest import ROOT, TINY, as_script, english, interrupt, prepare_text, soaked, tiny, train_tiny

from data.common import Dataset
from model import GPT
from run import accounting, checkpoint, evaluate, identity, progress, records, update
from run.settings import Config
from support import machines, triton_here
from support.files import FileError
from support.options import ConfigError

# ---------------------------------------------------------------------------------------------------------------------
# A complete run


def test_a_run_leaves_its_five_files_and_nothing_else(dense_run):
    assert {path.name for path in dense_run.iterdir()} == FILES


def test_the_config_file_holds_every_key_and_the_hash_of_the_text(words, dense_run):
    saved = json.loads((dense_run / "config.json").read_text())
    assert set(saved) == {*Config().to_dict(), "text_sha256", "machine", "straight"}
    assert saved["text_sha256"] == Dataset.open(words).source_sha256
    assert saved["straight"] is True and saved["machine"] == records.machine_of(record_of(dense_run))
    assert {key: saved[key] for key in TINY} == TINY


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
    config = identity.read(tmp_path / "run" / "config.json").config
    dataset = Dataset.open(words)
    model = GPT(config, dataset.vocabulary.size)
    assert record["iterations"] == 6
    assert record["tokens"] == 6 * 3 * 2 * 16
    assert record["epochs"] == record["tokens"] / dataset.sizes["train"]
    assert record["parameters"]["total"] == sum(p.numel() for p in model.parameters()) == record["parameters"]["active"]
    assert record["training_flops_per_token"] == accounting.training_flops_per_token(model)
    assert record["run_id"] == config.run_id
    assert record["config"] == config.to_record()
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


def test_kernels_without_effect_are_told_and_not_recorded(words, tmp_path, capsys):
    """A CPU trains without them, whatever is asked for."""
    experts = dict(n_expert=4, moe_backend="sorted")
    assert train_tiny(words, tmp_path / "plain", **experts) == 0
    assert train_tiny(words, tmp_path / "asked", **experts, fused_update=True, routing_kernels=True) == 0
    out = capsys.readouterr().out
    for key in ("fused_update", "routing_kernels"):
        assert out.count(f"{key}=True has no effect: the kernels are for CUDA") == 1
    plain, asked = (record_of(tmp_path / name) for name in ("plain", "asked"))
    assert plain["machine"] == asked["machine"] and "kernels" not in asked["machine"]
    ours, theirs = (weights_of(tmp_path / name) for name in ("plain", "asked"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kernels_that_took_part_are_recorded(words, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_here, "obstacle_to_training", lambda device: None)  # the twins then stand in for Triton
    assert train_tiny(words, tmp_path / "run", n_expert=4, moe_backend="sorted", routing_kernels=True) == 0
    record = records.read(tmp_path / "run" / "summary.json")
    assert record["machine"]["kernels"] == ["routing kernels"]
    assert records.machine_of(record).endswith(", sorted backend, routing kernels")


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


def test_the_command_for_a_cpu_makes_a_run_of_its_own():
    """Whatever the weights and the folder of the run that is too slow: they are of another size."""
    words = ["config/shakespeare_moe4.py", "--seed=2", "--out_dir=out/mine", "--init_from=resume", "--overwrite=True"]
    told = progress.cpu_size_hint(ROOT / "train.py", words)
    assert told.endswith("train.py config/shakespeare_moe4.py --seed=2 config/cpu.py")


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


def test_a_resumed_run_goes_on_in_the_same_wandb_run(words, tmp_path, monkeypatch, at_step):
    """A stub that keeps runs by id, as wandb does with resume="allow"; without an id each init begins another run."""
    runs = {}

    class FakeWandb:
        @classmethod
        def init(cls, id=None, resume=None, **about):
            assert resume in (None, "allow")
            cls.lines = runs.setdefault(id or len(runs), [])

        @classmethod
        def log(cls, numbers, step):
            cls.lines.append(step)

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    at_step(interrupt(), 12)
    assert train_tiny(words, tmp_path / "run", wandb_log=True) == 130
    assert train_tiny(words, tmp_path / "run", wandb_log=True, init_from="resume") == 0
    ((run_id, steps),) = runs.items()
    assert steps == [line["step"] for line in lines_of(tmp_path / "run")]
    assert train_tiny(words, tmp_path / "other", wandb_log=True) == 0
    assert train_tiny(words, tmp_path / "run", wandb_log=True, overwrite=True) == 0
    assert len(runs) == 3  # another run, and the same one made anew


def test_wandb_can_begin_with_a_resumed_run(words, dense_run, tmp_path, monkeypatch):
    """Also that of a checkpoint from before there was an id."""
    shutil.copytree(dense_run, tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "ckpt.pt")
    del saved["progress"]["wandb_id"], saved["format"]
    checkpoint.save(tmp_path / "run" / "ckpt.pt", saved)
    begun = []
    wandb = types.SimpleNamespace(init=lambda **about: begun.append(about["id"]), log=lambda numbers, step: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train_tiny(words, tmp_path / "run", wandb_log=True, init_from="resume", max_iters=25) == 0
    assert begun == [checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["wandb_id"]] != [None]


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
    with pytest.raises(ConfigError, match="--compile=True, but it failed: RuntimeError"):
        train_tiny(words, tmp_path / "asked for", compile=True, **HARD)
    assert not (tmp_path / "asked for").exists()
    compiling = machines.choose("cpu", compile=True)
    monkeypatch.setattr(machines, "choose", lambda *_: compiling)  # as compile=auto chooses on CUDA
    assert train_tiny(words, tmp_path / "run", **HARD) == 0
    out = capsys.readouterr().out
    assert "goes on without compile, which failed" in out and "RuntimeError" in out and "a page more" not in out
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
        "step 250 of 2,000: validation 1.5000 nats, 2.1640 bpc (best so far); train 1.2500 nats (7 batches)"
    )
    assert progress.evaluation_text(line, tiny(max_iters=20, eval_only=True)).startswith("step 250: validation")
