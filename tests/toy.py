"""What the tests of data/ share: a toy text, its spec, and faults of disks and processes."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import build, download
from data.build import TRAIN_VAL, TRAIN_VAL_TEST, TextSpec, prepare_dataset
from support.files import ROOT

CONTENT = bytes(np.random.default_rng(0).integers(97, 123, 100_000, dtype=np.uint8))
TOY = TextSpec(
    name="toy",
    unit="character",
    filenames=("toy.txt", "toy_head"),
    splits=TRAIN_VAL_TEST,
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    heads={count: hashlib.sha256(CONTENT[:count]).hexdigest() for count in (1_024, 65_536)},
)
OWN = TextSpec(name="own", unit="character", filenames=("input.txt",), splits=TRAIN_VAL)
OTHER = CONTENT[::-1]
OTHER_TOY = replace(TOY, sha256=hashlib.sha256(OTHER).hexdigest())


def prepared(folder: Path, content: bytes = CONTENT, spec: TextSpec = TOY, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / spec.filenames[0]).write_bytes(content)
    prepare_dataset(spec, folder, folder, **options)
    return folder


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def own_script(home: Path) -> Path:
    """A prepare.py of the spec OWN, in a folder of its own."""
    home.mkdir()
    spec = 'TextSpec(name="own", unit="character", filenames=("input.txt",), splits=TRAIN_VAL)'
    (home / "prepare.py").write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from data.build import TRAIN_VAL, TextSpec, main\n"
        f"main({spec}, Path(__file__).parent, sys.argv[1:], say=print)\n"
    )
    return home / "prepare.py"


def told(spec: TextSpec, home: Path, *arguments: object) -> str:
    """The message with which prepare.py ends."""
    with pytest.raises(SystemExit) as caught, redirect_stderr(io.StringIO()) as stderr:
        build.main(spec, home, [str(argument) for argument in arguments], say=download.silent)
    assert caught.value.code == 2
    return stderr.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_child(function: Callable[[], object]) -> multiprocessing.Process:
    """A process of its own that is already at work; without torch's second of starting up."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    return child


def change(path: Path) -> None:
    path.write_bytes(
        b"\1\0" + path.read_bytes()[2:] if path.read_bytes()[:2] != b"\1\0" else b"\2\0" + path.read_bytes()[2:]
    )
