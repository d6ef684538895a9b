"""Checkpoints: what was saved comes back, what was damaged is refused, and no stranger's code runs."""

import errno
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import thorough

from run import checkpoint
from run.checkpoint import CheckpointError
from support import files
from support.files import FileError

STATE = {
    "model": {"weight": torch.arange(5000, dtype=torch.float32), "half": torch.ones(3, dtype=torch.bfloat16)},
    "progress": {"step": 7, "losses": [4.5, 3.25], "best": None, "name": "é"},
    "empty": {},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, STATE)
    return path


def refused(path, *words):
    """The one-line message with which `path` is refused; it names the file and has these words."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return message


def test_what_was_saved_comes_back(saved):
    loaded = checkpoint.load(saved)
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert loaded["model"]["half"].dtype == torch.bfloat16
    assert loaded["progress"] == STATE["progress"] and loaded["empty"] == {}


def test_no_partial_file_stays_behind(saved):
    assert os.listdir(saved.parent) == ["ckpt.pt"]


def test_a_second_save_replaces_the_first(saved):
    checkpoint.save(saved, {"progress": {"step": 8}})
    assert checkpoint.load(saved)["progress"] == {"step": 8}


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(saved, monkeypatch, failing):
    before = saved.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(FileError) as caught:
        patch.setattr(os, failing, full)
        checkpoint.save(saved, {"progress": {"step": 8}})
    for word in (str(saved), "disk is full", "bytes were needed", "saved before is untouched"):
        assert word in str(caught.value)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["ckpt.pt"]
    assert checkpoint.load(saved)["progress"]["step"] == 7


def test_a_first_save_that_fails_claims_no_previous_one(tmp_path, monkeypatch):
    def denied(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(FileError, match="Input/output error") as caught:
        checkpoint.save(tmp_path / "ckpt.pt", STATE)
    assert "previous" not in str(caught.value) and os.listdir(tmp_path) == []


def test_a_process_killed_while_writing_leaves_the_previous_checkpoint(saved, monkeypatch):
    class Killed(BaseException):
        """Like SIGKILL: no handler of the program's own runs."""

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", killed)
        checkpoint.save(saved, {"progress": {"step": 8}})
    assert checkpoint.load(saved)["progress"]["step"] == 7
    checkpoint.save(saved, {"progress": {"step": 9}})  # what is left of the killed write is in nobody's way
    assert checkpoint.load(saved)["progress"]["step"] == 9


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="could not be written"):
        checkpoint.save(tmp_path / "file" / "ckpt.pt", STATE)


def test_json_refuses_nan_and_leaves_the_file(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError):
        files.write_json(path, {"loss": float("nan")})
    assert path.read_text() == '{\n "loss": 1.5\n}\n'


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "ckpt.pt", "no such checkpoint")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_its_size(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    refused(saved, "cut short", f"{int(share * len(whole)):,} bytes")


def test_one_byte_short_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-1])
    refused(saved, "cut short")


@thorough(400, 20_000)
def test_one_flipped_bit_anywhere_is_found(saved, n):
    """In a weight, in the archive's own fields, in the seal."""
    content = saved.read_bytes()
    bits = np.random.default_rng(0).choice(8 * len(content), min(n, 8 * len(content)), replace=False)
    last = 8 * (len(content) - np.arange(1, 120)) + 3  # the seal, and the end of the archive
    for bit in [*bits, *last]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        saved.write_bytes(damaged)
        refused(saved)


def test_a_flipped_bit_in_a_weight_is_told_as_what_it_is(saved):
    content = bytearray(saved.read_bytes())
    position = content.find(STATE["model"]["weight"][1000:1100].numpy().tobytes())
    assert position > 0
    content[position] ^= 1
    saved.write_bytes(content)
    refused(saved, "damaged", "checksum")


def test_a_plain_text_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_text("The of and to in that is was he for it.\n" * 100)
    refused(path, "something else wrote it")


def test_a_foreign_zip_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    refused(path, "has no checksum of this program")


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


def save_in_zip(value, path):
    torch.save(value, path)


def save_in_old_format(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_raw(value, path):
    path.write_bytes(pickle.dumps(value))


def seal(path):
    """Do to the file what `save` does to an archive."""
    path.write_bytes(b"".join(checkpoint.sealed(path.read_bytes())[0]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize("write", [save_in_zip, save_in_old_format, save_raw])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, write, is_sealed):
    """Neither a stranger's, which has no seal, nor that of somebody who knows how to make one."""
    trace, path = tmp_path / "the-code-ran", tmp_path / "ckpt.pt"
    write({"format": checkpoint.FORMAT, "model": Malicious(trace)}, path)
    if is_sealed:
        seal(path)
    assert not trace.exists()
    refused(path)
    assert not trace.exists()


def test_the_malicious_pickle_of_these_tests_is_malicious(tmp_path):
    """Else the test above could not fail."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "the-code-ran"))).close()
    assert (tmp_path / "the-code-ran").exists()


def test_what_another_program_saved_is_refused_unopened(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {}, "iter_num": 5}, path)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was opened"))
    refused(path, "no checksum of this program")


def test_another_format_is_refused_by_name(saved):
    other = saved.read_bytes().replace(checkpoint.FORMAT.encode() + b" sha256", b"charmoe checkpoint 0 sha256")
    saved.write_bytes(other)
    refused(saved, "charmoe checkpoint 0", checkpoint.FORMAT)


def test_torch_reads_a_sealed_file_too(saved):
    """A user may look into a checkpoint without this program."""
    assert torch.equal(torch.load(saved, weights_only=True)["model"]["weight"], STATE["model"]["weight"])


def test_a_disk_without_room_is_told_before_anything_is_written(saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr("builtins.open", lambda *arguments: pytest.fail("something was opened"))
    with pytest.raises(FileError, match="the disk is full .* bytes were needed"):
        checkpoint.save(saved, {"progress": {"step": 8}})


def test_what_the_disk_does_not_give_back_as_it_was_does_not_replace_the_last_one(saved, monkeypatch):
    """A write that is said to have gone well, and did not."""
    fsync = os.fsync

    def damage(descriptor):
        fsync(descriptor)
        os.pwrite(descriptor, b"x", 1000)

    with monkeypatch.context() as patch, pytest.raises(FileError, match="something else than what was written"):
        patch.setattr(os, "fsync", damage)
        checkpoint.save(saved, {**STATE, "progress": {"step": 8}})
    assert checkpoint.load(saved)["progress"]["step"] == 7 and os.listdir(saved.parent) == ["ckpt.pt"]


def test_a_rename_comes_after_the_content_and_before_that_of_the_folder(saved, monkeypatch):
    """So that no order in which a disk may work leaves a name on an empty file."""
    events, originals = [], {name: getattr(os, name) for name in ("fsync", "link", "replace")}

    def noted(name):
        def call(*arguments):
            path = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[0]
            events.append((name, os.path.basename(path)))
            return originals[name](*arguments)

        return call

    for name in originals:
        monkeypatch.setattr(os, name, noted(name))
    checkpoint.save(saved, {"progress": {"step": 8}}, previous=saved.with_name("ckpt.previous.pt"))
    assert events == [
        ("fsync", "ckpt.pt.partial"),
        ("link", "ckpt.pt"),
        ("replace", "ckpt.previous.pt.partial"),
        ("replace", "ckpt.pt.partial"),
        ("fsync", saved.parent.name),
    ]


@pytest.mark.parametrize("has_links", [True, False])
def test_the_one_before_is_kept(saved, monkeypatch, has_links):
    def no_links(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:  # as on some network and memory card file systems
        monkeypatch.setattr(os, "link", no_links)
    previous = saved.with_name("ckpt.previous.pt")
    for step in (8, 9):
        checkpoint.save(saved, {"progress": {"step": step}}, previous)
        assert checkpoint.load(saved)["progress"]["step"] == step
        assert checkpoint.load(previous)["progress"]["step"] == step - 1
        assert sorted(os.listdir(saved.parent)) == ["ckpt.previous.pt", "ckpt.pt"]
