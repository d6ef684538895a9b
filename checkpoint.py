"""Files that a run must not lose: written whole or not at all, and checked before they are believed.

A checkpoint is what `torch.save` writes (a zip archive with a CRC per tensor), of tensors, numbers, strings, lists
and dicts only; it is read with weights_only=True, so that reading a stranger's file runs none of its code.
"""

import contextlib
import errno
import io
import json
import os
import zipfile
from pathlib import Path

import torch

FORMAT = "charmoe checkpoint 3"
RUN_FILES = ("config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "summary.json")  # of a run's folder


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used: which, why, and the way out."""


@contextlib.contextmanager
def writing(path, size=None):
    """Writing to `path` (size: bytes) inside: a full or read-only disk becomes one CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        needed = f" ({size:,} bytes were needed)" if size else ""
        reason = f"the disk is full{needed}" if error.errno == errno.ENOSPC else error.strerror
        raise CheckpointError(f"{path} could not be written: {reason}; what was saved before is untouched") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by content in one step: a reader, or a machine that loses power, finds the old file or the new
    one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with writing(path, len(content)):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _sync_folder(folder):
    """Make a rename durable, where the file system knows how: it has happened in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value) -> None:
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def save(path: Path, state: dict) -> None:
    """state: nested dicts and lists of tensors, numbers, strings, None."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path) -> dict:
    """What `save` was given, on the CPU. CheckpointError if the file is missing, damaged or not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged ({damaged} fails its checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: it was cut short, or something else wrote it "
            f"({path.stat().st_size:,} bytes)"
        ) from None
    except Exception as error:  # torch.load raises many kinds for files that are not its own
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint of this program: its format is {found!r}, expected {FORMAT!r}"
        )
    return state
