"""data/build.py, encode.py: full disks, kills and concurrent prepares leave the old data set or the new one."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import thorough
from toy import (
    CONTENT,
    OTHER,
    OTHER_TOY,
    OWN,
    TOY,
    file_size_limit,
    files,
    in_child,
    own_script,
    prepared,
    tmpfs,
    told,
)

import support.files
from data import build, download
from data.build import TextSpec, prepare_dataset
from data.common import DataError, Dataset, find_dataset, prepare_command
from support.files import FileError


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return prepared(tmp_path / "toy")


# ---------------------------------------------------------------------------------------------------------------------
# Full and read-only disks


def from_a_file(place: Path) -> tuple[TextSpec, tuple[object, ...]]:
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "toy.txt").write_bytes(CONTENT)
    return TOY, ("--source", place / "elsewhere")


def from_the_rebuild(place: Path) -> tuple[TextSpec, tuple[object, ...]]:
    return replace(TOY, rebuild=lambda folder, say: CONTENT), ()


@thorough(short=5, soak=100)
@pytest.mark.parametrize("old", [True, False], ids=["old data", "new folder"])
@pytest.mark.parametrize("source, needed", [(from_a_file, 200_000), (from_the_rebuild, 300_000)])
def test_a_full_disk_is_one_message_and_old_data_stays(tmp_path, n, source, needed, old):
    """And with room again the same command goes on."""
    spec, arguments = source(tmp_path)
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        for room in np.linspace(0, needed, n).astype(int):
            folder = disk / str(room)
            prepared(folder, OTHER, OTHER_TOY) if old else folder.mkdir()
            (folder / "toy.txt").unlink(missing_ok=True)
            before = files(folder)
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room // 4096 * 4096))
            message = told(spec, folder, *arguments)
            assert re.fullmatch(
                f"{folder}/.* could not be written: the disk is full.*\n",
                message,
            )
            after = files(folder)
            assert after.pop("toy.txt", CONTENT) == CONTENT and after == before
            (disk / "filler").unlink()
            build.main(spec, folder, [str(argument) for argument in arguments], say=download.silent)
            assert Dataset.open(folder).source_sha256 == TOY.sha256 and not list(folder.glob("*.part"))
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "at, number, reason",
    [(at, errno.ENOSPC, "the disk is full") for at in range(4)] + [(0, errno.EDQUOT, "the disk quota is used")],
)
def test_a_disk_that_is_full_at_fsync_is_one_message_and_old_data_stays(toy, monkeypatch, number, reason, at):
    """A stand-in where no disk can be mounted."""
    (toy.parent / "other.txt").write_bytes(OTHER)
    before, real, calls = files(toy), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == at + 1:
            raise OSError(number, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=f"could not be written: {reason}.*; free some space or choose another --out"):
        prepare_dataset(OTHER_TOY, toy, toy, source=str(toy.parent / "other.txt"))
    assert files(toy) == before


@pytest.mark.parametrize("limit", [0, 500, 50_000, 179_999])
@pytest.mark.parametrize("source", [from_a_file, from_the_rebuild])
def test_a_file_size_limit_is_one_message_and_old_data_stays(tmp_path, limit, source):
    """As on a full disk, where a write comes through in part. It needs no disk of its own."""
    spec, arguments = source(tmp_path)
    folder = prepared(tmp_path / "toy", OTHER, OTHER_TOY)
    (folder / "toy.txt").unlink()
    before = files(folder)
    source_path = arguments and str(arguments[1]) or None
    with file_size_limit(limit), pytest.raises(FileError, match="could not be written: File too large; "):
        prepare_dataset(spec, folder, folder, source_path)
    after = files(folder)
    assert after.pop("toy.txt", CONTENT) == CONTENT and after == before
    assert prepare_dataset(spec, folder, folder, source_path)["canonical"] and not list(folder.glob("*.part"))


def test_a_read_only_disk_is_one_message(tmp_path):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        home = prepared(disk / "toy")
        (home / "train.bin.part").write_bytes(b"of a killed prepare")
        before = files(home)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for spec in (TOY, replace(OTHER_TOY, rebuild=lambda folder, say: OTHER)):
            message = told(spec, home)
            assert "could not be written: Read-only file system; " in message
            assert message.count("\n") == 1 and str(home) in message and files(home) == before
        message = told(TOY, home, "--out", disk / "new")
        assert message.startswith(f"{disk}/new could not be written: Read-only file system; ")
        build.main(TOY, home, ["--out", str(tmp_path / "out")], say=download.silent)
    assert Dataset.open(tmp_path / "out").canonical


def result_of(function: Callable[[], object]) -> object:
    """What the function returns when a child calls it."""
    here, there = multiprocessing.Pipe()
    child = in_child(lambda: there.send(function()))
    there.close()
    result = here.recv()
    child.join()
    return result


def test_a_folder_without_permissions_is_one_message():
    def message_of(action: Callable[[], object]) -> str:
        try:
            action()
        except (DataError, FileError) as error:
            return str(error)
        return "no error"

    def as_somebody_else() -> list[str]:
        if os.getuid() == 0:
            os.setgroups([])
            os.setuid(65_534)
        return [
            message_of(lambda: prepare_dataset(TOY, closed, closed / "out")),
            message_of(lambda: prepare_dataset(TOY, unwritable, unwritable)),
            message_of(lambda: prepare_dataset(replace(TOY, rebuild=lambda *_: CONTENT), closed, unwritable)),
            message_of(lambda: prepare_dataset(TOY, unwritable, unwritable / "out")),
            message_of(lambda: prepare_dataset(TOY, unwritable, place / "own", source=str(closed))),
            message_of(lambda: prepare_dataset(TOY, unwritable, place / "own", source=str(closed / "toy.txt"))),
            message_of(lambda: Dataset.open(closed)),
            message_of(lambda: find_dataset(f"{closed}/toy")),
        ]

    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others themselves
        place = Path(name)
        place.chmod(0o777)
        unwritable, closed = place / "unwritable", place / "closed"
        prepared(unwritable).chmod(0o555)
        prepared(closed).chmod(0o000)
        messages = result_of(as_somebody_else)
        unwritable.chmod(0o755)
        closed.chmod(0o755)
    refused = "could not be written: Permission denied; "
    refused += "free some space or choose another --out, then run the same command again"
    assert messages == [
        f"{closed}/out {refused}",
        f"{unwritable}/train.bin.part {refused}",
        f"{unwritable}/train.bin.part {refused}",
        f"{unwritable}/out {refused}",
        f"toy: no usable text\n- {closed}: cannot be read (Permission denied)\n"
        f"{build._way_out(TOY, unwritable, place / 'own')}",
        f"toy: no usable text\n- {closed}/toy.txt: cannot be read (Permission denied)\n"
        f"{build._way_out(TOY, unwritable, place / 'own')}",
        f"{closed}/meta.json: cannot be read (Permission denied)",
        f"dataset '{closed}/toy': there is no such folder; prepare one with {prepare_command(closed / 'toy')}",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Two at once, and killed


LONG = "".join(map(chr, range(200, 900))).encode() * 300
TEXTS = {  # two data sets that differ in everything, each made anew by a rebuild
    spec.name: (
        replace(spec, size=len(text), sha256=hashlib.sha256(text).hexdigest(), rebuild=lambda *_, t=text: t),
        text,
    )
    for spec, text in ((TOY, CONTENT * 5), (OWN, LONG))
}


def check(folder: Path, *names: str) -> str:
    """Which of these data sets the folder holds: wholly, and nothing else."""
    data = Dataset.open(folder)
    spec, text = TEXTS[data.name]
    assert data.name in names and data.canonical and list(data.sizes) == list(spec.splits)
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", "<u2") for split in data.sizes])
    assert np.array_equal(ids, data.vocabulary.encode(text.decode()))
    return data.name


def check_raw_files(folder: Path) -> None:
    for spec, text in TEXTS.values():
        raw = folder / spec.filenames[0]
        assert not raw.exists() or raw.read_bytes() == text


def make(name: str, folder: Path) -> None:
    spec = TEXTS[name][0]
    (folder / spec.filenames[0]).unlink(missing_ok=True)
    build.main(spec, folder, [], say=download.silent)


@thorough(short=2, soak=200)
def test_concurrent_prepares_of_one_folder_mix_nothing(tmp_path, n):
    for _ in range(n):
        children = [in_child(partial(make, name, tmp_path)) for name in ("toy", "own", "toy", "own")]
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        check(tmp_path, "toy", "own")
        check_raw_files(tmp_path)
        assert not list(tmp_path.glob("*.part"))


def test_a_second_prepare_waits_and_says_so(toy):
    here, there = multiprocessing.Pipe()

    def hold() -> None:
        with build._lock(toy, download.silent):
            there.send("held")
            there.recv()

    first = in_child(hold)
    assert here.recv() == "held"
    second_here, second_there = multiprocessing.Pipe()
    second = in_child(lambda: prepare_dataset(TOY, toy, toy, say=second_there.send))
    assert second_here.recv() == f"another prepare.py is at work in {toy}; waiting until it has ended"
    assert not second_here.poll(0.05) and second.is_alive()
    here.send("go")
    assert second_here.recv().startswith("read ")
    for child in (first, second):
        child.join()
        assert child.exitcode == 0


def test_prepare_works_without_file_locks(toy, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(support.files.fcntl, "flock", unknown)
    assert prepare_dataset(TOY, toy, toy)["canonical"]
    monkeypatch.setattr(support.files, "fcntl", None)
    assert prepare_dataset(TOY, toy, toy)["canonical"]


def mend(folder: Path, old: str | None, new: str) -> None:
    """After a kill while `new` was to replace `old`: the folder holds one of them or says that it holds none, and the
    same command prepares `new`."""
    try:
        check(folder, new, *filter(None, [old]))
    except DataError as error:
        assert "prepare.py" in str(error)
    check_raw_files(folder)
    make(new, folder)
    assert check(folder, new) and not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    "old, new", [("toy", "own"), *(pytest.param(old, "toy", marks=pytest.mark.soak) for old in (None, "own"))]
)
def test_prepare_recovers_from_a_kill_before_any_file_operation(tmp_path, old, new):
    """A kill before each file that is opened, renamed or removed, one after the other."""

    def killed_at(at: int) -> None:
        left, uses = iter(range(at)), {"open", "os.mkdir", "os.rename", "os.remove", "fcntl.flock"}
        sys.addaudithook(lambda event, _: event in uses and next(left, None) is None and os.kill(os.getpid(), 9))
        make(new, tmp_path)

    for at in range(1000):
        if old:
            make(old, tmp_path)
        child = in_child(partial(killed_at, at))
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        mend(tmp_path, old, new)
        if not old:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert at >= 18


@thorough(short=6, soak=150)
def test_prepare_recovers_from_a_kill_at_any_time(tmp_path, n):
    make("own", tmp_path)
    started = time.monotonic()
    in_child(partial(make, "toy", tmp_path)).join()
    seconds, killed, times = time.monotonic() - started, 0, random.Random(n)
    old, new = "toy", "own"
    for _ in range(20 * n):
        child = in_child(partial(make, new, tmp_path))
        child.join(times.random() * seconds)  # where the machine is slower by now, all the more are killed at work
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        mend(tmp_path, old, new)
        old, new = new, old
        if killed == n:
            return
    pytest.fail(f"only {killed} of {20 * n} were killed at work")


@pytest.mark.soak
def test_a_script_recovers_from_a_kill(tmp_path, n=40):
    (tmp_path / "text").write_bytes(CONTENT)
    folder, environment = tmp_path / "out", {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(own_script(tmp_path / "home"))]
    command += ["--out", str(folder), "--source", str(tmp_path / "text")]
    for case in range(n):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as running:
            assert running.stdout.readline().startswith(b"read ")
            time.sleep(random.Random(case).uniform(0, 0.02))
            running.kill()
        try:
            assert Dataset.open(folder).name == "own"
        except DataError:
            assert subprocess.run(command, capture_output=True).returncode == 0
            assert Dataset.open(folder).name == "own"
        shutil.rmtree(folder)
