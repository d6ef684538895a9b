"""Checkpoint files: written atomically, and verified by a checksum before they are used.

    save("out/run/ckpt.pt", state, previous="out/run/ckpt.previous.pt")
    state = load("out/run/ckpt.pt")        # or CheckpointError: missing, cut short, damaged, foreign

A checkpoint is the zip archive that `torch.save` writes, of tensors, numbers, strings, lists and dicts only. The
archive's comment holds its SHA-256, which `torch.load` ignores. The checksum is verified first, and the content is read
with weights_only=True: a file from a stranger runs no code.
"""

import hashlib
import io
import os
import re
from pathlib import Path

import torch

from support.files import FileError, first_line, replace_file

FORMAT = "charmoe checkpoint 4"
SEAL = re.compile(rb"(charmoe checkpoint [0-9]{1,9}) sha256 ([0-9a-f]{64})\Z")
SEAL_LENGTH = len(FORMAT) + len(" sha256 ") + 64
RUN_FILES = (  # of a run
    *("config.json", "metrics.jsonl", "ckpt.pt", "ckpt.previous.pt", "best.pt", "diverged.json", "summary.json"),
)


class CheckpointError(FileError):
    """A checkpoint cannot be written, read or used: which, why, and the way out."""


class Unreadable(CheckpointError):
    """The system cannot read the checkpoint at the moment; it may be good."""


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write a checkpoint. state: nested dicts and lists of tensors, numbers, strings, None; previous: the path under
    which the old file is kept. Takes as much memory as the file has bytes."""
    archive = io.BytesIO()
    torch.save({"format": FORMAT, **state}, archive)
    replace_file(path, *sealed(archive.getbuffer()), previous)


def sealed(archive):
    """A zip archive with format and SHA-256 as its comment, whose length stands before it in two bytes.
    -> (pieces, SHA-256 of them all)"""
    pieces = [archive[:-2], SEAL_LENGTH.to_bytes(2, "little")]
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    pieces.append(f"{FORMAT} sha256 {sha256.hexdigest()}".encode())
    sha256.update(pieces[-1])
    return pieces, sha256


def load(path: Path) -> dict:
    """The saved state, on the CPU. CheckpointError if the file is missing, damaged or not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 128))
            seal = SEAL.search(file.read())
            file.seek(0)
            content = file.read() if seal else b""
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    if not seal:
        reason = f"it was cut short, or something else wrote it ({size:,} bytes)"
        raise CheckpointError(f"{path} has no checksum of this program: {reason}")
    if seal[1].decode() != FORMAT:
        raise CheckpointError(f"{path}: its format is {seal[1].decode()!r}, expected {FORMAT!r}")
    if hashlib.sha256(memoryview(content)[: -len(seal[0])]).hexdigest().encode() != seal[2]:
        raise CheckpointError(f"{path} is damaged: its content does not have its checksum")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for what it does not allow
        why = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {why}") from error
