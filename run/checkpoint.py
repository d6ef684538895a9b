"""Checkpoint files: written atomically, and verified by a checksum before they are used.

    save("out/run/ckpt.pt", state, previous="out/run/ckpt.previous.pt")
    state = load("out/run/ckpt.pt")        # or CheckpointError: missing, cut short, damaged, foreign

A checkpoint is the zip archive that `torch.save` writes, of tensors, numbers, strings, lists and dicts only. The
archive's comment holds its SHA-256, which `torch.load` ignores. The checksum is verified first, and the content is read
with weights_only=True: a file from a stranger runs no code.
"""

import hashlib
import io
import re
from pathlib import Path

import torch

from support.files import FileError, first_line, write_atomically

FORMAT = "charmoe checkpoint 4"
SEAL = re.compile(rb"(charmoe checkpoint [0-9]{1,9}) sha256 ([0-9a-f]{64})\Z")
RUN_FILES = ("config.json", "metrics.jsonl", "ckpt.pt", "ckpt.previous.pt", "best.pt", "summary.json")  # of a run


class CheckpointError(FileError):
    """A checkpoint cannot be written, read or used: which, why, and the way out."""


class Unreadable(CheckpointError):
    """The system cannot read the checkpoint at the moment; it may be good."""


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write a checkpoint. state: nested dicts and lists of tensors, numbers, strings, None; previous: the path under
    which the old file is kept."""
    write_atomically(path, sealed(packed({"format": FORMAT, **state})), previous)


def load(path: Path) -> dict:
    """The saved state, on the CPU. CheckpointError if the file is missing, damaged or not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - 128))
            end = file.read(128)
            seal = SEAL.search(end)
            file.seek(0)
            content = file.read(size) if seal else b""
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    if not seal:
        if end[-22:].startswith(b"PK\5\6"):  # a zip archive without a comment
            raise CheckpointError(f"{path} has no checksum of this program: another, or an older version, wrote it")
        reason = f"it was cut short, or something else wrote it ({size:,} bytes)"
        raise CheckpointError(f"{path} is not a whole checkpoint: {reason}")
    found = seal[1].decode()
    if found != FORMAT:
        raise CheckpointError(f"{path}: its format is {found!r}, expected {FORMAT!r}")
    if hashlib.sha256(memoryview(content)[: -len(seal[0])]).hexdigest().encode() != seal[2]:
        raise CheckpointError(f"{path} is damaged: its content does not have its checksum")
    try:
        return unpacked(content)
    except Exception as error:  # torch.load raises many kinds for what it does not allow
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {first_line(error)}"
        ) from error


def packed(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpacked(content: bytes):
    """The packed state, on the CPU. No code in the bytes is run."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def sealed(archive: bytes) -> bytes:
    """Add format and SHA-256 to a zip archive, as its comment, whose length is in the archive's last two bytes."""
    length = len(FORMAT) + len(" sha256 ") + 64
    body = archive[:-2] + length.to_bytes(2, "little")
    return body + f"{FORMAT} sha256 {hashlib.sha256(body).hexdigest()}".encode()
