"""Keeps the records and metrics of a sweep in one tar, for a machine that may go away at any moment.

    pack = Pack(Path("made.tar"), say=print)
    pack.watch(run)         # of a run that goes on: packed anew after each evaluation
    pack.add(run)           # of a run that has ended, finished or not
    pack.write()            # the file, at most once in PACK_SECONDS

It holds NAME.json, the record, of each finished run; NAME.metrics.jsonl.gz of each run, also of cut ones; and NAME.log
of each failed one. The file is always whole: a new one is written beside it and takes its name. What was in it before
the sweep stays in it.
"""

import gzip
import io
import math
import tarfile
import time
from pathlib import Path

from support.files import FileError, read_whole, write_atomically
from support.options import ConfigError

PACK_SECONDS = 3
LARGEST_LOG = 2**16  # bytes of a failed run's log, from its end
LARGEST_READ = 2**30  # bytes
EVALUATION = b'"kind": "eval"'


class Pack:
    """The tar at `path`. ConfigError where it cannot be one. say: prints a line."""

    def __init__(self, path: Path, say):
        self.path, self.say = path, say
        self.members = members_of(path)  # name -> bytes
        self.sizes, self.evaluations = {}, {}  # run's name -> bytes and evaluations of its metrics, as packed
        self.is_stale, self.last_write, self.has_failed = not path.exists(), -math.inf, False

    def watch(self, run):
        """Look for new evaluations of a run that goes on."""
        metrics = run.folder / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        if size == self.sizes.get(run.name, 0):
            return
        content, self.sizes[run.name] = whole_lines(metrics), size
        evaluations = content.count(EVALUATION)
        if evaluations and evaluations != self.evaluations.get(run.name):
            self.evaluations[run.name] = evaluations
            self.add_metrics(run.name, content)

    def add(self, run, log: Path | None = None):
        """Pack a run that has ended: its metrics, its record where it is complete, and the end of its log if given."""
        if (run.folder / "summary.json").exists():
            self.members[f"{run.name}.json"] = (run.folder / "summary.json").read_bytes()
        if (run.folder / "metrics.jsonl").exists():
            self.add_metrics(run.name, whole_lines(run.folder / "metrics.jsonl"))
        self.members.pop(f"{run.name}.log", None)
        if log:
            self.members[f"{run.name}.log"] = log.read_bytes()[-LARGEST_LOG:]
        self.is_stale = True

    def add_metrics(self, name, content):
        if content:
            self.members[f"{name}.metrics.jsonl.gz"] = gzip.compress(content, mtime=0)
            self.is_stale = True

    def write(self, at_once=False):
        """Write the file where it has become stale. An error is told once, and the next call tries again."""
        if not self.is_stale or (not at_once and time.monotonic() - self.last_write < PACK_SECONDS):
            return
        try:
            write_atomically(self.path, self.content())
            self.is_stale = False
        except FileError as error:
            if not self.has_failed:
                self.say(str(error))
            self.has_failed = True
        self.last_write = time.monotonic()

    def content(self) -> bytes:
        """The tar, records first."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in sorted(self.members, key=lambda name: (not name.endswith(".json"), name)):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(self.members[name]), int(time.time())
                tar.addfile(member, io.BytesIO(self.members[name]))
        return buffer.getvalue()


def members_of(path: Path) -> dict[str, bytes]:
    """The files in a tar, empty where it is not there. ConfigError where no tar can be kept at this path."""
    if not path.parent.is_dir():
        raise ConfigError([f"--pack={path}: there is no folder {path.parent}"])
    if not path.exists():
        return {}
    try:
        content = read_whole(path, LARGEST_READ)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        if content[tar.offset :].strip(b"\0") or tar.offset == len(content):  # tarfile takes damage for the end
            raise tarfile.ReadError
        return members
    except (OSError, tarfile.TarError):
        told = f"--pack={path}: is there and no tar that is whole and uncompressed; give another name"
        raise ConfigError([told]) from None


def whole_lines(path: Path) -> bytes:
    """The complete lines of a file that may be growing, or may be gone."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content[: content.rfind(b"\n") + 1]
