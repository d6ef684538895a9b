"""run_folder.py: a run's folder loses nothing, whatever happens: damaged files, full and read-only disks, two runs at
once, clocks and names of all kinds."""

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from alike import HARD, assert_same_run, essence, lines_of, record_of, steps_of, weights_of
from conftest import ROOT, TINY, as_script, contents, english, interrupt, prepare_text, soaked, train_tiny

import train
from run import checkpoint, run_folder, update
from run.checkpoint import CheckpointError
from support.options import ConfigError


@pytest.fixture(scope="module")
def stopped_run(words, tmp_path_factory):
    """The out_dir of a HARD run that was stopped after step 15; its checkpoint before that is of step 10."""
    out_dir, rate = tmp_path_factory.mktemp("runs") / "stopped", update.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            update, "learning_rate", lambda step, config: (step == 14 and interrupt()(), rate(step, config))[1]
        )
        assert train_tiny(words, out_dir, **HARD) == 130
    assert checkpoint.load(out_dir / "ckpt.previous.pt")["progress"]["step"] == 10
    return out_dir


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(stopped_run, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1000])


def forge(path):
    torch.save({"model": torch.nn.Linear(2, 2)}, path)


def empty(path):
    checkpoint.save(path, {"model": {}})


DAMAGES = {
    "a flipped bit": (flip, "is damaged: its content does not have its checksum"),
    "cut short": (shorten, "has no checksum of this program"),
    "gone": (os.unlink, "there is no such checkpoint"),
    "a stranger's": (forge, "has no checksum of this program"),
    "a text": (lambda path: path.write_text("no"), "has no checksum of this program"),
    "not of a run": (empty, "it lacks config, dataset"),
}


@pytest.mark.parametrize("damage, told", DAMAGES.values(), ids=DAMAGES)
def test_resume_from_the_checkpoint_before_a_damaged_one_is_bit_identical(
    words, stopped, uninterrupted, capsys, damage, told
):
    damage(stopped / "ckpt.pt")
    capsys.readouterr()
    assert train_tiny(words, stopped, init_from="resume", **HARD) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "Going on from the checkpoint before it" in line]
    assert len(said) == 1 and f"{stopped / 'ckpt.pt'}" in said[0] and "ckpt.previous.pt, of step 10" in said[0]
    assert told in said[0]
    assert_same_run(uninterrupted, stopped)
    assert (stopped / "ckpt.refused.pt").exists() is (told != DAMAGES["gone"][1])


def test_a_checkpoint_that_cannot_be_read_now_is_refused_and_kept(words, stopped, monkeypatch):
    """It may be good: a network disk that stumbles, permissions."""
    before, original = contents(stopped), open

    def unreadable(path, mode="r", *arguments, **options):
        if str(path).endswith("ckpt.pt") and mode == "rb":
            raise OSError(5, "Input/output error", str(path))
        return original(path, mode, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        patch.setattr("builtins.open", unreadable)
        train_tiny(words, stopped, init_from="resume", **HARD)
    assert contents(stopped) == before


def test_when_both_are_damaged_both_are_named_and_nothing_is_changed(words, stopped):
    flip(stopped / "ckpt.pt")
    shorten(stopped / "ckpt.previous.pt")
    before = contents(stopped)
    with pytest.raises(CheckpointError) as caught:
        train_tiny(words, stopped, init_from="resume", **HARD)
    for word in ("ckpt.pt is damaged", "ckpt.previous.pt has no checksum", "--init_from=scratch --overwrite=True"):
        assert word in str(caught.value)
    assert contents(stopped) == before


def test_a_failed_save_keeps_the_last_good_checkpoint(words, stopped, uninterrupted, monkeypatch):
    """The damaged file must not take the place of the good one."""
    flip(stopped / "ckpt.pt")

    def full(*arguments, **options):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="disk is full"):
        patch.setattr(checkpoint, "save", full)
        train_tiny(words, stopped, init_from="resume", **HARD)
    assert train_tiny(words, stopped, init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, stopped)


def test_resume_with_shortened_metrics_takes_the_checkpoint_that_fits(words, stopped, uninterrupted, capsys):
    known = checkpoint.load(stopped / "ckpt.previous.pt")["progress"]["metrics_bytes"]
    content = (stopped / "metrics.jsonl").read_bytes()
    assert len(content) > known
    (stopped / "metrics.jsonl").write_bytes(content[: known + 3])
    assert train_tiny(words, stopped, init_from="resume", **HARD) == 0
    assert "metrics.jsonl is shorter than it was" in capsys.readouterr().out
    assert_same_run(uninterrupted, stopped)


def test_weights_of_another_shape_are_one_message(words, stopped):
    state = checkpoint.load(stopped / "ckpt.pt")
    state["model"]["norm.weight"] = torch.ones(3)
    checkpoint.save(stopped / "ckpt.pt", state)
    with pytest.raises(CheckpointError, match="does not fit its own config"):
        train_tiny(words, stopped, init_from="resume", **HARD)


# ---------------------------------------------------------------------------------------------------------------------
# Going on, or not


def test_auto_starts_resumes_and_ends_a_run_by_one_command(words, tmp_path, uninterrupted, at_step, capsys):
    """One command line for a queue that starts a job again and again."""
    at_step(interrupt(signal.SIGTERM), 12)
    codes = [train_tiny(words, tmp_path / "run", init_from="auto", **HARD) for _ in range(3)]
    assert codes == [143, 0, 0] and "there is nothing to resume" in capsys.readouterr().out
    assert_same_run(uninterrupted, tmp_path / "run")
    assert record_of(tmp_path / "run")["config"]["init_from"] == "resume"
    before = contents(tmp_path / "run")
    assert train_tiny(words, tmp_path / "run", init_from="auto", **HARD, eval_iters=3, log_interval=2) == 0
    assert contents(tmp_path / "run") == before, "nothing is left to make by other settings"


def test_auto_begins_again_without_a_checkpoint(words, tmp_path, dense_run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train"')
    (tmp_path / "run" / "ckpt.pt.partial").write_bytes(b"PK")
    assert train_tiny(words, tmp_path / "run", init_from="auto") == 0
    assert_same_run(dense_run, tmp_path / "run")
    assert "ckpt.pt.partial" not in contents(tmp_path / "run")


def test_auto_does_not_overwrite_a_record(words, tmp_path):
    """A folder that somebody has emptied of checkpoints, to save room."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="a complete run"):
        train_tiny(words, tmp_path / "run", init_from="auto")
    assert contents(tmp_path / "run") == {"summary.json": b"{}"}


@pytest.mark.parametrize("init_from", ["auto", "resume"])
def test_resume_and_overwrite_together_are_refused(words, stopped, init_from):
    with pytest.raises(ConfigError, match="choose one"):
        train_tiny(words, stopped, init_from=init_from, overwrite=True, **HARD)


# ---------------------------------------------------------------------------------------------------------------------
# Saving now and then


def saves(monkeypatch):
    """The steps of the checkpoints that are written from now on."""
    steps, original = [], checkpoint.save

    def save(path, state, previous=None):
        if path.name == "ckpt.pt":
            steps.append(state["progress"]["step"])
        original(path, state, previous)

    monkeypatch.setattr(checkpoint, "save", save)
    return steps


def test_saves_between_evaluations_change_no_number(words, tmp_path, monkeypatch, uninterrupted):
    steps = saves(monkeypatch)
    assert train_tiny(words, tmp_path / "run", save_minutes=1e-9, **HARD) == 0
    assert sorted(set(steps)) == list(range(21))
    for name in ("metrics.jsonl", "ckpt.pt"):
        one, other = uninterrupted / name, tmp_path / "run" / name
        if name == "ckpt.pt":
            assert essence(weights_of(uninterrupted)) == essence(weights_of(tmp_path / "run"))
        else:
            assert essence(lines_of(one.parent)) == essence(lines_of(other.parent))


@pytest.mark.parametrize("minutes", [0, 60])
def test_without_them_only_evaluations_save(words, tmp_path, monkeypatch, minutes):
    steps = saves(monkeypatch)
    assert train_tiny(words, tmp_path / "run", save_minutes=minutes) == 0
    assert steps == [0, 10, 20]


def test_time_of_saving_does_not_count_as_training(words, tmp_path, monkeypatch):
    original = checkpoint.save

    def slow(*arguments, **options):
        time.sleep(0.1)
        original(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    assert train_tiny(words, tmp_path / "run", save_minutes=1e-9, max_iters=10) == 0
    seconds = record_of(tmp_path / "run")["seconds"]
    assert seconds["save"] > 1 and seconds["train"] < seconds["save"] / 2 and seconds["total"] > seconds["save"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes, where this machine lets us make one. -> a function that mounts it otherwise"""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here (that needs root); patched disks are tested in any case")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def sizes(uninterrupted):
    """Of the files of a HARD run."""
    return {path.name: path.stat().st_size for path in uninterrupted.iterdir()}


@pytest.mark.parametrize("room", [soaked(0.5), 1.4, soaked(2.6), 3.2], ids="room for {} checkpoints".format)
def test_resume_after_a_full_disk_is_bit_identical(words, tmp_path, sizes, uninterrupted, monkeypatch, capsys, room):
    """Whatever file it is that does not fit: the first checkpoint, the second, the best weights, the metrics."""
    with small_disk(tmp_path / "disk", int(room * sizes["ckpt.pt"]) // 4096 * 4096) as remount:
        out_dir = tmp_path / "disk" / "run"
        options = {**TINY, "dataset": words, "out_dir": out_dir, "init_from": "auto", **HARD}
        words_of = [f"--{key}={value}" for key, value in options.items()]
        code = as_script(monkeypatch, *words_of)
        message = capsys.readouterr().err
        if code == 0:  # there was room enough after all
            assert room > 3
        else:
            assert code == 2 and message.count("\n") == 1, message
            assert "the disk is full" in message and "saved before is untouched" in message and str(out_dir) in message
            assert not [path for path in out_dir.iterdir() if path.suffix == ".partial"]
            for name in ("ckpt.pt", "best.pt"):
                if (out_dir / name).exists():
                    checkpoint.load(out_dir / name)
            remount("size=50m")
            assert train_tiny(words, out_dir, **{**HARD, "init_from": "auto"}) == 0
        assert_same_run(uninterrupted, out_dir)


@pytest.mark.parametrize("when", ["before", "during"])
def test_resume_after_a_read_only_disk_is_bit_identical(
    words, tmp_path, uninterrupted, at_step, monkeypatch, capsys, when
):
    with small_disk(tmp_path / "disk", "50m") as remount:
        out_dir = tmp_path / "disk" / "run"
        options = {**TINY, "dataset": words, "out_dir": out_dir, "init_from": "auto", **HARD}
        if when == "before":
            remount("ro")
        else:  # as an ext4 that has met an error makes itself; an open file would keep it from being remounted
            original = os.replace

            def refuse(source, target):
                if str(target).endswith("ckpt.pt") and os.path.exists(target):
                    raise OSError(30, "Read-only file system")
                original(source, target)

            monkeypatch.setattr(os, "replace", refuse)
        assert as_script(monkeypatch, *(f"--{key}={value}" for key, value in options.items())) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Read-only file system" in message and str(out_dir) in message
        monkeypatch.undo()
        remount("rw")
        assert train_tiny(words, out_dir, **{**HARD, "init_from": "auto"}) == 0
        assert_same_run(uninterrupted, out_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Two at once


def child(options, log):
    import train

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w")
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in options.items())]
    train.console.run(train.main)


@pytest.mark.parametrize("init_from", ["auto", soaked("scratch")])
def test_of_runs_started_at_once_in_one_folder_one_is_made(words, tmp_path, forkserver, uninterrupted, init_from):
    options = {**TINY, "dataset": words, "out_dir": tmp_path / "run", "init_from": init_from, **HARD}
    logs = [tmp_path / f"log{i}" for i in range(4)]
    rivals = [forkserver.Process(target=child, args=(options, log)) for log in logs]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
    told = [log.read_text() for log in logs]
    codes = [rival.exitcode for rival in rivals]
    assert codes.count(0) >= 1 and set(codes) <= {0, 2}, told
    for code, text in zip(codes, told):
        assert "Traceback" not in text
        if code == 2:
            assert any(
                words in text
                for words in ("in use by another run", "another run has been at work", "holds a", "holds another run")
            ), text
    assert sum("writing to" in text for text in told) == 1
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("end", ["complete", "stopped"])
def test_resume_is_refused_where_another_run_wrote_meanwhile(words, stopped, monkeypatch, at_step, end):
    """As when a job is started again while the old one still saves: the checkpoint that was read is not the last."""
    original = train.GPT

    def meanwhile(*arguments):
        monkeypatch.setattr(train, "GPT", original)
        if end == "stopped":
            at_step(interrupt(), 17)
        assert train_tiny(words, stopped, init_from="resume", **HARD) == (0 if end == "complete" else 130)
        return original(*arguments)

    monkeypatch.setattr(train, "GPT", meanwhile)
    with pytest.raises(CheckpointError, match="another run has been at work in .* meanwhile; nothing was changed"):
        train_tiny(words, stopped, init_from="resume", **HARD)
    assert checkpoint.load(stopped / "ckpt.pt")["progress"]["step"] == (20 if end == "complete" else 18)
    assert (stopped / "summary.json").exists() is (end == "complete")


def test_a_replaced_folder_is_not_written_to(words, tmp_path, at_step):
    """Deleted by hand while the run goes on, and another one begun there."""

    def replace():
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("another's")

    at_step(replace, 12)
    with pytest.raises(CheckpointError, match="was deleted or replaced while this run went on"):
        train_tiny(words, tmp_path / "run")
    assert contents(tmp_path / "run") == {"metrics.jsonl": b"another's"}


def test_a_file_system_without_locks_is_reported_and_used(words, tmp_path, monkeypatch, capsys, dense_run):
    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.files.fcntl, "flock", no_locks)
    assert train_tiny(words, tmp_path / "run") == 0
    assert capsys.readouterr().out.count("has no locks") == 1
    assert_same_run(dense_run, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Clocks and names


@pytest.mark.parametrize("jump", [-1e7, soaked(1e7)])
def test_setting_the_clock_changes_no_time(words, tmp_path, monkeypatch, jump):
    """Summer time, NTP, somebody's hand."""
    original, jumps = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: original() + jump * next(jumps))
    started = time.perf_counter()
    assert train_tiny(words, tmp_path / "run", inference_samples=1) == 0
    elapsed = time.perf_counter() - started
    record = record_of(tmp_path / "run")
    assert all(0 <= value <= elapsed for value in record["seconds"].values())
    assert all(0 < line["step_ms"] < 1000 * elapsed for line in lines_of(tmp_path / "run", "train"))
    assert steps_of(tmp_path / "run", "train") == [5, 10, 15, 20]


NAMES = {
    "spaces and quotes": 'a run\'s "own" folder $HOME *',
    "umlauts": "Größe-äöü-ñ",
    "not Latin": "実験-Ωμέγα-опыт-🧪",
    "a line break": "two\nlines",
    "as long as can be": "x" * 255,
    "deep": "/".join(["deep" * 20] * 20),
    "like an option": "--seed=3",
}


@pytest.mark.parametrize("kind", ["spaces and quotes", "not Latin", *map(soaked, [*NAMES][3:]), soaked("umlauts")])
def test_a_folder_may_have_any_name(tmp_path, at_step, monkeypatch, capfd, kind):
    """The folder of the run, and that of the data. The command that resumes can be pasted into a shell."""
    name = NAMES[kind]
    dataset = prepare_text(tmp_path / name / "data", english(1500, seed=4))
    at_step(interrupt(), 3)
    assert train_tiny(dataset, tmp_path / name / "run", max_iters=6, n_expert=4) == 130
    told = capfd.readouterr().out
    command = told[told.rindex("  python ") :].strip()
    if kind in ("spaces and quotes", "a line break"):  # a real shell, for what a shell could spoil
        done = subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
    else:
        assert as_script(monkeypatch, *shlex.split(command)[2:]) == 0
    assert record_of(tmp_path / name / "run")["iterations"] == 6
    assert as_script(monkeypatch, f"--out_dir={tmp_path / name / 'run'}", "--max_new_tokens=5", script="sample.py") == 0


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["deep" * 20] * 60), "a\0b"], ids=["name", "path", "NUL"])
def test_an_impossible_folder_name_is_one_message(words, tmp_path, monkeypatch, capsys, name):
    options = {**TINY, "dataset": words, "out_dir": tmp_path / name}
    assert as_script(monkeypatch, *(f"--{key}={value}" for key, value in options.items())) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and len(message) < 12_000 and "Traceback" not in message


def test_config_json_is_ascii(words, tmp_path):
    assert train_tiny(words, tmp_path / "Ü", title="Größe 🧪") == 0
    assert json.loads((tmp_path / "Ü" / "config.json").read_text(encoding="ascii"))["title"] == "Größe 🧪"
    shutil.rmtree(tmp_path / "Ü")
