"""saving.py: what is saved in the background is what a save within the loop writes, and no failure is lost."""

import errno
import shutil
import threading
import time

import pytest
import torch
from alike import HARD, assert_same_run, essence, record_of
from conftest import TINY, as_script, interrupt, tiny, train_tiny

from run import checkpoint, update
from run.saving import HostMemory, Saver, saves_in_background
from support import files
from support.files import FileError

CPU = torch.device("cpu")
BACKGROUND = dict(save_in_background=True)


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def tensors():
    weight = torch.randn(3, 5)
    return {
        "weight": weight,
        "tied": weight.t(),
        "half": torch.arange(6, dtype=torch.float16)[2:],
        "empty": [torch.empty(0), torch.empty(0, dtype=torch.int64)],
        "betas": (0.9, 0.99),
        "steps": {0: torch.tensor(7.0), "lines": [[1, None]]},
    }


def test_a_copy_equals_and_shares_no_memory(tmp_path):
    value = tensors()
    before = essence(value)
    copy = HostMemory(CPU).copy(value)
    value["weight"].zero_()
    value["half"].zero_()
    value["steps"]["lines"][0].append(2)
    assert essence(copy) == before and isinstance(copy["betas"], tuple)
    checkpoint.save(tmp_path / "file.pt", copy)
    assert essence(checkpoint.load(tmp_path / "file.pt")) == {**before, "format": checkpoint.FORMAT}


def test_tensors_that_share_memory_are_copied_once():
    copy = HostMemory(CPU).copy(tensors())
    assert copy["weight"].data_ptr() == copy["tied"].data_ptr()
    assert copy["weight"].untyped_storage().nbytes() == 60  # not that of all copies, which a file would then hold


def test_a_second_copy_uses_the_memory_of_the_first():
    memory, value = HostMemory(CPU), tensors()
    first = memory.copy(value)["weight"].data_ptr()
    assert memory.copy(value)["weight"].data_ptr() == first


@pytest.mark.parametrize("is_background", [True, False])
def test_best_weights_stay_while_others_are_saved(is_background):
    saver, weight = Saver(is_background, CPU), torch.zeros(5)
    content = {"model": {"weight": weight}, "best": None, "progress": {"step": 0}}
    best = known = None
    for step, is_best in enumerate([True, False, False, True, False, True, True, False]):
        weight.fill_(step)
        frozen = saver.frozen({**content, "best": best, "progress": {"step": step}}, is_best)
        best = frozen["best"]
        known = step if is_best else known
        assert frozen["model"]["weight"].eq(step).all() and best["model"]["weight"].eq(known).all()
        assert best["step"] == known


@pytest.mark.cuda
def test_a_copy_of_what_is_on_a_gpu_is_pinned_and_equal():
    value = {"a": torch.randn(1000, device="cuda"), "b": [torch.tensor(3.0, device="cuda"), torch.ones(2)]}
    before = essence({"a": value["a"].cpu(), "b": [torch.tensor(3.0), torch.ones(2)]})
    memory = HostMemory(value["a"].device)
    copy = memory.copy(value)
    value["a"].zero_()
    assert essence(copy) == before and memory.memory.is_pinned()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture
def slow(monkeypatch):
    """A function: saves take so many seconds, before they write anything, and are noted. -> what they wrote, by the
    file's name and step"""
    original, written = checkpoint.save, {}

    def after(seconds):
        def save(path, content, previous=None):
            time.sleep(seconds)
            original(path, content, previous)
            saved = checkpoint.load(path)
            step = saved["step"] if "step" in saved else saved["progress"]["step"]
            written[path.name, step] = essence({key: value for key, value in saved.items() if key != "config"})

        monkeypatch.setattr(checkpoint, "save", save)
        return written

    return after


def test_each_file_is_that_of_a_save_within_the_loop(words, tmp_path, slow):
    """Also where the loop is many steps ahead before a save begins to read what it writes."""
    options = dict(save_every=7, save_minutes=1e-9, max_iters=10, **HARD)
    written = slow(0)
    assert train_tiny(words, tmp_path / "run", **options) == 0
    expected = dict(written)
    written.clear()
    slow(0.05)
    assert train_tiny(words, tmp_path / "other", **BACKGROUND, **options) == 0
    assert {("ckpt.pt", 3), ("best.pt", 0), ("step-000007.pt", 7)} < written.keys() == expected.keys()
    assert all(written[key] == expected[key] for key in expected)
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_weights_that_are_the_best_are_in_a_checkpoint_once(dense_run):
    saved = checkpoint.load(dense_run / "ckpt.pt")
    assert saved["best"]["step"] == 20
    for name, value in saved["model"].items():
        assert value.data_ptr() == saved["best"]["model"][name].data_ptr()


@pytest.mark.parametrize(
    "asked, device, expected", [("auto", "cpu", False), ("auto", "cuda", True), (False, "cuda", False)]
)
def test_auto_saves_in_the_background_on_cuda_only(asked, device, expected):
    assert saves_in_background(tiny(save_in_background=asked), torch.device(device)) is expected


def test_the_loop_goes_on_while_a_save_is_written(words, tmp_path, monkeypatch, at_step):
    original, is_later = checkpoint.save, threading.Event()

    def save(*arguments, **options):
        assert is_later.wait(60)
        original(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    at_step(is_later.set, 9)
    started = time.perf_counter()
    assert train_tiny(words, tmp_path / "run", **BACKGROUND) == 0
    seconds = record_of(tmp_path / "run")["seconds"]
    assert 0 < seconds["save"] < seconds["total"] <= time.perf_counter() - started
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saving")]


def test_a_stop_waits_for_the_save_and_the_rest_is_bit_identical(words, tmp_path, slow, at_step, uninterrupted):
    slow(0.1)
    at_step(interrupt(), 12)
    assert train_tiny(words, tmp_path / "run", **BACKGROUND, **HARD) == 130
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == 13
    assert not list((tmp_path / "run").glob("*.partial"))
    assert train_tiny(words, tmp_path / "run", init_from="resume", capture=True, **BACKGROUND, **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.cuda
def test_a_run_on_a_gpu_is_saved_in_the_background_and_goes_on_anywhere(words, tmp_path, at_step):
    """Saves are under way at nearly every step. The last one has the weights with which the run goes on."""
    options = dict(device="cuda", compile=False, save_minutes=1e-9, **HARD)
    for i, device in enumerate(["cuda", "cpu"]):
        out_dir = tmp_path / device
        at_step(interrupt(), 12 + i)  # each step is interrupted once
        assert train_tiny(words, out_dir, **options) == 130
        stopped = checkpoint.load(out_dir / "ckpt.pt")
        assert all(value.device.type == "cpu" and value.isfinite().all() for value in stopped["model"].values())
        assert {int(entry["step"]) for entry in stopped["optimizer"]["state"].values()} == {13 + i}
        assert train_tiny(words, out_dir, init_from="resume", **{**options, "device": device}) == 0
        assert record_of(out_dir)["clean"]["best"]["step"] == 20


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def told(monkeypatch, capsys, dataset, out_dir, **options):
    """Run train.py with saves in the background, and wait for one wherever the loop asks after it. -> (exit code, the
    message on stderr)"""
    monkeypatch.setattr(Saver, "has_failed", property(lambda self: bool(self.job and self.job.exception())))
    options = {**TINY, "dataset": dataset, "out_dir": out_dir, **BACKGROUND, **options}
    code = as_script(monkeypatch, *(f"--{key}={value}" for key, value in options.items()))
    return code, capsys.readouterr().err


@pytest.fixture
def disk(monkeypatch):
    """A function: from now on the disk is full, for `times` files of this name."""

    def full(name, times):
        failed = []

        def opened(path, mode):
            if mode == "wb" and path.name == f"{name}.partial" and len(failed) < times:
                failed.append(path)
                raise OSError(errno.ENOSPC, "No space left on device")
            return open(path, mode)

        monkeypatch.setattr(files, "open", opened, raising=False)

    return full


def assert_disk_is_full(message, out_dir, name):
    assert message.count("\n") == 1 and message.startswith("train.py: ")
    assert f"{out_dir / name} could not be written: the disk is full" in message and "bytes were needed" in message


@pytest.mark.parametrize(
    "when, full_from, last_update, options",
    [
        ("at the next log line", 0, [4], {}),
        ("at the next log line", 9, [14], {}),
        ("at the next save", 11, [11, 12], dict(save_minutes=1e-9)),  # the one under way may fail, or the next
        ("at a stop", 12, [12], {}),
        ("at the end", 19, [19], {}),
    ],
)
def test_a_full_disk_is_told_once_with_code_2(
    words, tmp_path, monkeypatch, capsys, disk, at_step, uninterrupted, when, full_from, last_update, options
):
    updates, rate = [], update.learning_rate
    monkeypatch.setattr(update, "learning_rate", lambda step, config: (updates.append(step), rate(step, config))[1])
    if full_from:
        at_step(lambda: disk("ckpt.pt", times=100), full_from)
    else:
        disk("ckpt.pt", times=100)
    if when == "at a stop":
        at_step(interrupt(), 12)
    code, message = told(monkeypatch, capsys, words, tmp_path / "run", **options, **HARD)
    assert code == 2
    assert_disk_is_full(message, tmp_path / "run", "ckpt.pt")
    assert max(updates) in last_update and not (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").glob("*.partial"))
    monkeypatch.undo()
    assert train_tiny(words, tmp_path / "run", init_from="auto", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("name, step", [("ckpt.pt", 15), ("best.pt", 15), ("step-000007.pt", 10)])
def test_after_a_failure_that_passes_nothing_is_lost(
    words, tmp_path, monkeypatch, capsys, disk, at_step, uninterrupted, name, step
):
    """The run is saved once more before the failure ends it."""
    at_step(lambda: disk(name, times=1), 6)
    save_every = 7 if name.startswith("step") else 0
    code, message = told(monkeypatch, capsys, words, tmp_path / "run", save_every=save_every, **HARD)
    assert code == 2
    assert_disk_is_full(message, tmp_path / "run", name if name in ("ckpt.pt", "best.pt") else f"snapshots/{name}")
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["progress"]["step"] == step
    assert train_tiny(words, tmp_path / "run", init_from="resume", **HARD) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_folder_deleted_under_a_run_is_told_and_nothing_is_written(words, tmp_path, monkeypatch, capsys, at_step):
    at_step(lambda: shutil.rmtree(tmp_path / "run"), 9)
    code, message = told(monkeypatch, capsys, words, tmp_path / "run", **HARD)
    assert code == 2 and message.count("\n") == 1
    assert "was deleted or replaced while this run went on" in message
    assert not (tmp_path / "run").exists()


def test_a_failure_of_saving_is_told_before_a_later_error(words, tmp_path, monkeypatch, capsys, disk, at_step):
    """As in a run that saves within the loop, which does not get to the later one."""

    def fail():
        raise ZeroDivisionError

    at_step(lambda: disk("ckpt.pt", times=100), 9)
    at_step(fail, 12)
    code, message = told(monkeypatch, capsys, words, tmp_path / "run")
    assert code == 2
    assert_disk_is_full(message, tmp_path / "run", "ckpt.pt")


def test_a_saver_raises_a_failure_once():
    def fail():
        raise FileError("full")

    with Saver(True, CPU) as saver:
        saver.start(fail)
        with pytest.raises(FileError, match="full"):
            saver.finish()
        saver.finish()
        saver.start(list)
        assert saver.wait() is None and not saver.has_failed
    with pytest.raises(FileError), Saver(True, CPU) as saver:
        saver.start(fail)
