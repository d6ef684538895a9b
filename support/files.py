"""Files and messages: the project's root, atomic writes, safe reads, and text that any terminal can show."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]  # of the project
LONGEST_LINE = 1900  # characters of a message, whatever it quotes
# Bytes at most: of a file that a person writes (a config, a prompt), and of one that a program writes (a record).
LARGEST_TEXT, LARGEST_JSON = 1 << 20, 1 << 26
DISK_FAULTS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


class UserError(ValueError):
    """Something that the user can set right: what, where, and the way out, a line each. Scripts show no traceback."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(map(one_line, lines)))


class FileError(UserError):
    """A file that cannot be written or used."""


# ---------------------------------------------------------------------------------------------------------------------
# Text for messages


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode the text; other bytes on a command line become lone surrogates, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value as a message quotes it: on one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of thousands of digits, a list nested a thousand times, an object of the user
        return f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(text: str) -> str:
    """`text` on one line that every terminal can show: with \\n, \\x1b or \\udcff for unprintable characters.

    The middle of a text of more than LONGEST_LINE characters is left out.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def first_line(error):
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def shown_path(path: Path) -> str:
    """The path relative to the current folder if it lies there, else the full path."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def expanded(path: str) -> Path:
    """A path as a person types it, with the home folder for ~ (which a shell leaves in `--key=~/a` and in quotes)."""
    return Path(os.path.expanduser(path))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_whole(path: str | Path, largest: int = LARGEST_TEXT) -> bytes:
    """The bytes of the file at `path`.

    Raises OSError, also for pipes and devices, which may never end, and for a file of more than `largest` bytes.
    """
    try:
        size = os.stat(path).st_size
    except ValueError:  # the name has NUL or a lone surrogate
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    if size > largest:
        raise OSError(errno.EINVAL, f"it has {size:,} bytes; at most {largest:,} are read", str(path))
    return Path(path).read_bytes()  # IsADirectoryError for a folder


def read_json(path: str | Path) -> Any:
    """The value in the JSON file at `path`.

    Raises OSError when it cannot be read; ValueError when it is no JSON, repeats a field, or has NaN or Infinity.
    """
    try:
        text = read_whole(path, LARGEST_JSON).decode()
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twins)
    except RecursionError:
        raise ValueError("its objects and lists are nested too deep") from None


def read_json_lines(path: str | Path) -> tuple[list, list[int]]:
    """The values in a file with one JSON value a line, and the numbers of lines that hold none: the file may be
    growing. Raises OSError when it cannot be read."""
    values, broken = [], []
    for number, line in enumerate(read_whole(path, LARGEST_JSON).decode(errors="replace").splitlines(), 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            broken.append(number)
    return values, broken


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is in it, which is no number")


def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        twin = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the field {shown(twin)} is in one object twice")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def writing(path, size=None, way_out="what was saved before is untouched"):
    """A context that turns an OSError while writing `path` (size: bytes) into one FileError."""
    try:
        yield
    except OSError as error:
        reason = DISK_FAULTS.get(error.errno, error.strerror)
        if size and error.errno in DISK_FAULTS:
            reason += f" ({size:,} bytes were needed)"
        raise FileError(f"{path} could not be written: {reason}; {way_out}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` by content in one step: see replace_file."""
    replace_file(path, [content], hashlib.sha256(content))


def replace_file(path: Path, pieces: list, sha256, previous: Path | None = None) -> None:
    """Replace the file at `path` in one step. pieces: the new content, bytes or the like; sha256: a hashlib object that
    has seen them; previous: where the old file is kept.

    A reader, also after a power failure, finds the old file or the new one. Raises FileError.
    """
    path, size = Path(path), sum(map(len, pieces))
    partial = path.with_name(path.name + ".partial")
    with writing(path, size):
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with open(partial, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            if _sha256_on_disk(partial) != sha256.digest():
                raise OSError(errno.EIO, "the disk gives back something else than what was written")
            if previous and path.exists():
                _keep(path, Path(previous))
            os.replace(partial, path)
            sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _sha256_on_disk(path):
    """The SHA-256 of a file, read from the disk itself where the system can drop its cached copy."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").digest()


def _keep(path, previous):
    """Give the file at `path` the name `previous` as well, so that it always has a name."""
    link = previous.with_name(previous.name + ".partial")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
        link.unlink(missing_ok=True)  # renaming does nothing where both are names of one file
    except OSError:  # no hard links on this file system
        os.replace(path, previous)


def sync_folder(folder):
    """Make a rename durable where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value) -> None:
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def lock(file, is_shared=False, wait=False) -> bool | None:
    """Lock an open file, or a descriptor, until it is closed. wait: until another process has let it go.
    -> False where another process holds it, None without locks"""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (AttributeError, OSError):  # a system, or a file system, without locks
        return None
    return True
