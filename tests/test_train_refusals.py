"""train.py refuses what it cannot train on: losses that are not finite, and data sets that are missing or damaged."""

import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from alike import HARD, assert_same_run, lines_of, numbers_in, record_of, steps_of, weights_of
from conftest import contents, interrupt, soaked, train_tiny

import train
from data.common import DataError, Dataset
from model import GPT
from run import checkpoint
from run import dataset as dataset_of_run
from run.checkpoint import CheckpointError
from run.update import Updater
from support.options import ConfigError

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


def test_a_diverged_run_goes_on_from_its_last_checkpoint_by_the_command_that_it_prints(words, tmp_path, capsys):
    out_dir = tmp_path / "run"
    assert train_tiny(words, out_dir, **DIVERGE) == 3
    command = shlex.split(assert_stopped_not_finite(out_dir, capsys).strip().splitlines()[-1].partition(": python ")[2])
    assert "--learning_rate=5e+29" in command and command[-1] == "--init_from=resume"
    words_after = [*command[1:], "--learning_rate=0.01", "--grad_clip=1.0", "--max_iters=12"]
    assert train.main(words_after) == 0
    told = capsys.readouterr().out
    assert "learning_rate is now 0.01 (was 1e+30)" in told and "grad_clip is now 1.0 (was 0.0)" in told
    assert record_of(out_dir)["config"]["learning_rate"] == 0.01 and record_of(out_dir)["resumed"] == 1
    with pytest.raises(CheckpointError, match="another experiment"):  # complete: no longer
        train.main([*words_after, "--learning_rate=0.005", "--max_iters=20"])


def test_what_is_no_remedy_may_not_change_after_a_divergence(words, tmp_path, capsys):
    assert train_tiny(words, tmp_path / "run", **DIVERGE) == 3
    with pytest.raises(CheckpointError, match="another experiment") as caught:
        train_tiny(words, tmp_path / "run", learning_rate=0.01, n_embd=32, init_from="resume")
    assert "n_embd=" in str(caught.value) and "learning_rate" not in str(caught.value)


def test_auto_does_not_run_into_the_same_nan_again(words, tmp_path, capsys, poisoned):
    """But goes on with a lower learning rate, also where that is killed before its first save."""
    poisoned(12)
    assert train_tiny(words, tmp_path / "run", init_from="auto") == 3
    before = contents(tmp_path / "run")
    for _ in range(2):
        assert train_tiny(words, tmp_path / "run", init_from="auto") == 3
        assert "step 12" in assert_stopped_not_finite(tmp_path / "run", capsys)
    assert contents(tmp_path / "run") == before
    lower = dict(init_from="auto", learning_rate=5e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_tiny(words, tmp_path / "run", **lower)
    assert train_tiny(words, tmp_path / "run", **lower) == 0
    assert "learning_rate is now 0.005 (was 0.01)" in capsys.readouterr().out
    assert not (tmp_path / "run" / "diverged.json").exists()
    assert record_of(tmp_path / "run")["straight"] is False  # 10 updates were made at the higher rate


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"reason": 5, "config": {}}', '{"reason": "step 1", "config": {"x": 1}}']
)
def test_auto_refuses_a_damaged_diverged_json_by_name(words, dense_run, tmp_path, content):
    shutil.copytree(dense_run, tmp_path / "run")
    (tmp_path / "run" / "diverged.json").write_text(content)
    with pytest.raises(CheckpointError, match="diverged.json cannot be used: .*; delete it to try"):
        train_tiny(words, tmp_path / "run", init_from="auto")


def test_resume_tries_unchanged_settings_again(words, tmp_path, capsys, poisoned):
    poisoned(12)
    assert train_tiny(words, tmp_path / "run") == 3
    assert train_tiny(words, tmp_path / "run", init_from="resume") == 0


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
