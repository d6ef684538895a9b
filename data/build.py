"""Prepare a data set for training: what every data/NAME/prepare.py runs.

    text (file, archive, folder, URL, rebuild) -> canonical? -> vocabulary -> train.bin, val.bin (test.bin), meta.json

- A `TextSpec` says everything about one data set. To add your own text, make a folder data/NAME with a prepare.py like
  data/text8/prepare.py, put the text beside it as input.txt, and run it.
- The text comes from --source alone if that is given. Otherwise a raw file in the data folder, the published addresses
  and the rebuild are tried in turn; if none works, each is told with its reason.
- `canonical: true` is written only when the text's SHA-256 is the one in the spec. Another text is refused, or with
  --allow-partial prepared under a name that says so (enwik8-head-4.15M, enwik8-altered-99M). A spec without a SHA-256
  (your own text) keeps its name and is `canonical: false`; records tell its versions apart by their own SHA-256. Put
  that SHA-256 and the size into the spec to make it canonical.
- Two prepares of one folder take turns.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import re
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from data.common import BYTE, CHARACTER, SPLITS, DataError
from data.download import Say, download, looks_like_html, remove, rename, silent, writing
from data.encode import write_dataset
from support.files import FileError, read_whole, write_atomically

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two prepares apart
    fcntl = None

TRAIN_VAL = {"train": 90, "val": 10}  # percent; nanoGPT's split of Shakespeare
TRAIN_VAL_TEST = {"train": 90, "val": 5, "test": 5}  # percent; of 100 MB: the published 90M/5M/5M
HEAD = 65_536  # bytes by which the beginning of a published text is recognised
LARGEST_SOURCE = 1 << 34  # bytes of a text, which is held in memory
ARCHIVES = (".gz", ".zip")


@dataclass(frozen=True)
class Remote:
    """A published address. sha256: of the file behind it, which may be an archive; None if not known."""

    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class TextSpec:
    """Everything about one data set.

    name          of the data set and of its folder in data/
    unit          "character" or "byte": what one id stands for
    filenames     names of the raw text, each also with .gz or .zip; downloads get the first one
    splits        percent of the text for each split, in the order of the text
    remotes       published addresses, in the order in which they are tried
    size, sha256  bytes and SHA-256 of the published text; None for a text of your own
    head_sha256   SHA-256 of its first 65,536 bytes
    rebuild       makes the published text where no address can be reached: (out folder, say) -> text
    """

    name: str
    unit: str
    filenames: tuple[str, ...]
    splits: Mapping[str, int]
    remotes: tuple[Remote, ...] = ()
    size: int | None = None
    sha256: str | None = None
    head_sha256: str | None = None
    rebuild: Callable[[Path, Say], bytes] | None = None

    def __post_init__(self) -> None:
        assert self.unit in (CHARACTER, BYTE), self.unit
        assert (self.size is None) == (self.sha256 is None), "size and sha256 are known together"
        assert tuple(self.splits) in (SPLITS, SPLITS[:2]) and sum(self.splits.values()) == 100, self.splits


@dataclass(frozen=True)
class RawText:
    """A raw text and the file or address that it came from."""

    content: bytes
    origin: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Source:
    """A place where the text may be found."""

    label: str
    read: Callable[[], RawText]  # raises DataError
    published: bool = False  # must be the published text, whatever --allow-partial says


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(spec: TextSpec, home: Path, arguments: list[str], say: Say) -> None:
    """Prepare a data set as the command line asks; a mistake is one message and exit status 2.

    home: the folder of prepare.py.
    """
    parser = _parser(spec)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    started = time.perf_counter()
    try:
        folder = Path(os.path.expanduser(options.out)) if options.out else home
        meta = prepare(spec, home, folder, options.source, options.allow_partial, say)
    except (DataError, FileError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; run the same command again to go on\n")
    for line in _report(spec, meta, folder, time.perf_counter() - started):
        say(line)


def _parser(spec: TextSpec) -> argparse.ArgumentParser:
    program, about = f"python data/{spec.name}/prepare.py", f"Prepare {spec.name} for training."
    source = "the text: a file, a .gz or .zip, a folder with one of them, or an address"
    partial_text = "accept a text that is not the published one, under a name that says so"
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--source", metavar="PATH_OR_URL", help=source)
    parser.add_argument("--allow-partial", action="store_true", help=partial_text)
    parser.add_argument("--out", metavar="FOLDER", help=f"where the result goes (default: data/{spec.name})")
    return parser


def _report(spec: TextSpec, meta: dict, folder: Path, seconds: float) -> list[str]:
    state = "canonical" if meta["canonical"] else "not canonical: no result on it is one on the published text"
    if spec.sha256 is None:
        state = "your own text: the spec names no SHA-256 to check it against"
    splits = ", ".join(f"{split} {entry['tokens']:,}" for split, entry in meta["splits"].items())
    tokens = sum(entry["tokens"] for entry in meta["splits"].values())
    return [
        f"{meta['name']} ({state})",
        f"{tokens:,} {meta['unit']}s, vocabulary {meta['vocab_size']}, SHA-256 {meta['source']['sha256']}",
        splits,
        f"in {folder}, {seconds:.1f} s",
    ]


def prepare(
    spec: TextSpec, home: Path, folder: Path, source: str | None = None, allow_partial: bool = False, say: Say = silent
) -> dict:
    """Write the data set to `folder` and return its meta.json.

    Raises DataError when there is no usable text, FileError when the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, say):
        text, name, canonical = obtain_text(spec, home, folder, source, allow_partial, say)
        say(f"read {text.origin}")
        try:
            return write_dataset(folder, name, canonical, text.content, spec.unit, spec.splits)
        except DataError as error:
            raise DataError(f"{text.origin}: {error}") from None


@contextmanager
def _lock(folder: Path, say: Say) -> Iterator[None]:
    """Inside, no other prepare works in the folder. The lock ends with the process, even a killed one."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be opened, a file system without locks: checksums still protect
            if fcntl:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say(f"another prepare.py is at work in {folder}; waiting until it has ended")
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def obtain_text(
    spec: TextSpec, home: Path, folder: Path, source: str | None, allow_partial: bool, say: Say
) -> tuple[RawText, str, bool]:
    """(text, name, canonical) from the first source that works.

    Raises one DataError that lists why each source failed.
    """
    failures = []
    for candidate in _sources(spec, home, folder, source, say):
        try:
            text = candidate.read()
            return text, *identify(spec, text, allow_partial and not candidate.published)
        except DataError as error:  # a FileError is passed on: the next source would have the same disk
            failures.append(f"{candidate.label}: {str(error).removeprefix(f'{candidate.label}: ')}")
            if source is None:
                say(f"no: {failures[-1]}")
    failures = failures or ["no raw file in the folder, and the spec names no address"]
    listed = [f"- {failure}" for failure in failures]
    raise DataError(f"{spec.name}: no usable text", *listed, _way_out(spec, home, folder))


def _way_out(spec: TextSpec, home: Path, folder: Path) -> str:
    command = ["python", str(home / "prepare.py"), *([] if folder == home else ["--out", str(folder)]), "--source"]
    way = f"Give the text yourself: {shlex.join(command)} PATH_OR_URL, or put {spec.filenames[0]} into {home}."
    addresses = " or ".join(remote.url for remote in spec.remotes)
    return way + (f" Without a network here, fetch {addresses} on another machine." if addresses else "")


def _sources(spec: TextSpec, home: Path, folder: Path, source: str | None, say: Say) -> list[Source]:
    if source is not None:
        if source.lower().startswith(("http://", "https://")):
            return [Source(source, partial(_read_address, spec, Remote(source), folder, say))]
        return [Source(source, partial(_read_path, spec, Path(os.path.expanduser(source))))]
    local = [path for place in dict.fromkeys((folder, home)) for path in _raw_files(spec, place)]
    sources = [Source(str(path), partial(read_text, spec, path)) for path in local]
    sources += [Source(remote.url, partial(_read_address, spec, remote, folder, say), True) for remote in spec.remotes]
    if spec.rebuild is not None:
        sources.append(Source("rebuild", partial(_read_rebuild, spec, folder, say), True))
    return sources


def _raw_files(spec: TextSpec, folder: Path) -> list[Path]:
    names = [name + ending for name in spec.filenames for ending in ("", *ARCHIVES)]
    return [folder / name for name in names if os.path.isfile(folder / name)]  # also of paths too long


def _read_path(spec: TextSpec, path: Path) -> RawText:
    try:
        if path.is_file():
            return read_text(spec, path)
        if not path.is_dir():
            raise DataError(f"{path}: there is no such file or folder")
        found = _raw_files(spec, path) or _only_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        names = ", ".join(spec.filenames)
        problem = f"holds none of {names} (or these as .gz, .zip), nor just one text"
        raise DataError(f"{path}: {problem}; name the file itself")
    return read_text(spec, found[0])


def _only_file(folder: Path) -> list[Path]:
    """The one file in the folder that may be a text or a packed text; none if there are several."""
    endings, no_texts = ("", ".txt", ".xml", *ARCHIVES), (".", "README", "LICENSE")
    found = [path for path in folder.iterdir() if path.suffix in endings and not path.name.startswith(no_texts)]
    found = [path for path in found if path.is_file()]
    return found if len(found) == 1 else []


def _read_address(spec: TextSpec, remote: Remote, folder: Path, say: Say) -> RawText:
    """Download and check a text. The published one, or your own, is kept under the raw file's name."""
    ending = Path(re.split("[?#]", remote.url)[0]).suffix
    target = folder / (spec.filenames[0] + (ending if ending in ARCHIVES else ""))
    part = target.with_name(target.name + ".part")
    say(f"downloading {remote.url}")
    download(remote.url, part, remote.sha256, say)
    try:
        content = read_text(spec, part).content
    except DataError as error:
        remove(part)
        raise DataError(str(error).replace(str(part), remote.url)) from error
    text = RawText(content, remote.url)
    if text.sha256 == spec.sha256 or (spec.sha256 is None and not target.exists()):
        rename(part, target)
    else:
        remove(part)
    return text


def _read_rebuild(spec: TextSpec, folder: Path, say: Say) -> RawText:
    text = RawText(spec.rebuild(folder, say), "rebuild")
    if text.sha256 == spec.sha256:
        write_atomically(folder / spec.filenames[0], text.content)
    return text


def read_text(spec: TextSpec, path: Path) -> RawText:
    """Read a text file, or the text in a gzip or zip archive, which is recognised by its first bytes.

    Raises DataError when it cannot be read, is damaged, or is empty.
    """
    try:
        content = _unpack(spec, path)
    except DataError:
        raise
    except Exception as error:  # zipfile and gzip raise many kinds for a damaged archive
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        raise DataError(f"{path}: a damaged, cut or unreadable archive ({error}); fetch it again") from error
    if not content:
        raise DataError(f"{path}: empty")
    return RawText(content, str(path))


def _unpack(spec: TextSpec, path: Path) -> bytes:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic.startswith(b"\x1f\x8b"):
        with gzip.open(path) as packed:
            return packed.read()
    if magic != b"PK\x03\x04":
        return read_whole(path, LARGEST_SOURCE)
    with zipfile.ZipFile(path) as archive:
        return archive.read(_member(spec, path, archive))


def _member(spec: TextSpec, path: Path, archive: zipfile.ZipFile) -> str:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    known = [name for name in names if Path(name).name in spec.filenames]
    chosen = known or names
    if len(chosen) != 1:
        expected = " or ".join(spec.filenames)
        raise DataError(f"{path}: holds {len(names)} files and not just one named {expected}; unpack it yourself")
    return chosen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which text is it?


def identify(spec: TextSpec, text: RawText, allow_partial: bool) -> tuple[str, bool]:
    """(name, canonical) of a text. Raises DataError for another text than the published one, unless allowed."""
    if spec.sha256 is None:
        return spec.name, False
    if text.sha256 == spec.sha256:
        return spec.name, True
    if not allow_partial:
        page = " (it is a web page)" if looks_like_html(text.content[:512]) else ""
        raise DataError(
            f"not the published {spec.name}{page}: {len(text.content):,} bytes, SHA-256 {text.sha256}, "
            f"expected {spec.size:,} bytes, {spec.sha256}; a part of it is accepted with --allow-partial"
        )
    kind = "head" if _is_head(spec, text.content) else "altered"
    return f"{spec.name}-{kind}-{short_size(len(text.content))}", False


def _is_head(spec: TextSpec, content: bytes) -> bool:
    return HEAD <= len(content) < spec.size and hashlib.sha256(content[:HEAD]).hexdigest() == spec.head_sha256


def short_size(count: int) -> str:
    """4150000 -> 4.15M, 6800000 -> 6.8M, 950000 -> 950K, 12 -> 12."""
    for unit, letter in ((1_000_000, "M"), (1_000, "K")):
        if count >= unit:
            return f"{count / unit:.2f}".rstrip("0").rstrip(".") + letter
    return str(count)
