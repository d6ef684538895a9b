"""Prepare a data set for training: what every data/NAME/prepare.py runs.

    text (file, archive, folder, URL, rebuild) -> canonical? -> vocabulary -> train.bin, val.bin (test.bin), meta.json

- A `TextSpec` says everything about one data set; docs/extending.md adds one.
- The text comes from --source alone if that is given. Otherwise a raw file in the data folder, the published addresses
  and the rebuild are tried in turn; if none works, each is told with its reason.
- Only a text with the spec's SHA-256 is `canonical: true`. With --allow-partial its beginning is prepared too, under a
  name that says so (enwik8-head-4.15M). A spec without a SHA-256 (your own text) keeps its name and is
  `canonical: false`; records tell its versions apart by their own SHA-256. `data/prepare.py` makes such a spec.
- A canonical data set is replaced by the same text alone.
- Two prepares of one folder take turns.
"""

from __future__ import annotations

import argparse
import codecs
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.common import BYTE, CHARACTER, SPLITS, DataError, meta_of, own_text_arguments, own_text_command
from data.download import Say, download, looks_like_html, remove, rename, silent, writing
from data.encode import write_dataset
from data.names import is_kept
from support.files import UserError, lock, read_whole, write_atomically

TRAIN_VAL = {"train": 90, "val": 10}  # percent; nanoGPT's split of Shakespeare
TRAIN_VAL_TEST = {"train": 90, "val": 5, "test": 5}  # percent; of 100 MB: the published 90M/5M/5M
LARGEST_SOURCE = 1 << 34  # bytes of a text, which is held in memory
ARCHIVES = (".gz", ".zip")


@dataclass(frozen=True)
class Remote:
    """A published address. sha256: of the file behind it, which may be an archive; None if not known."""

    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class TextSpec:
    """Everything about one data set."""

    name: str  # and that of its folder in data/
    unit: str  # "character" or "byte": what one id stands for
    filenames: tuple[str, ...]  # of the raw text, each also with .gz or .zip; downloads get the first one
    splits: Mapping[str, int]  # percent of the text for each split, in the order of the text
    remotes: tuple[Remote, ...] = ()  # in the order in which they are tried
    size: int | None = None  # bytes of the published text; None for a text of your own
    sha256: str | None = None  # of the published text
    heads: Mapping[int, str] = field(default_factory=dict)  # SHA-256 of its first bytes, by their number
    rebuild: Callable[[Path, Say], bytes] | None = None  # (out folder, say) -> the text, where no address is reached

    def __post_init__(self) -> None:
        assert self.unit in (CHARACTER, BYTE), self.unit
        assert (self.size is None) == (self.sha256 is None), "size and sha256 are known together"
        assert tuple(self.splits) in (SPLITS, SPLITS[:2]) and sum(self.splits.values()) == 100, self.splits


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(spec: TextSpec, home: Path, arguments: list[str], say: Say) -> None:
    """Prepare a data set as the command line asks; a mistake is one message and exit status 2.

    home: the folder of prepare.py.
    """
    parser = _parser(spec)
    options = parser.parse_args(arguments)

    def prepare() -> tuple[dict, Path]:
        folder = Path(os.path.expanduser(options.out)) if options.out else home
        return prepare_dataset(spec, home, folder, options.source, options.allow_partial, say), folder

    run_script(parser, prepare, say)


def run_script(parser: argparse.ArgumentParser, prepare: Callable[[], tuple[dict, Path]], say: Say) -> None:
    """Call `prepare`, which returns a meta.json and its folder, and report them; a mistake ends the script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    started = time.perf_counter()
    try:
        meta, folder = prepare()
    except UserError as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; run the same command again to go on\n")
    for line in _report(meta, folder, time.perf_counter() - started):
        say(line)


def _parser(spec: TextSpec) -> argparse.ArgumentParser:
    program, about = f"python data/{spec.name}/prepare.py", f"Prepare {spec.name} for training."
    source = "the text: a file, a .gz or .zip, a folder with one of them, or an address"
    partial_text = "accept the beginning of the published text, under a name that says so"
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--source", metavar="PATH_OR_URL", help=source)
    parser.add_argument("--allow-partial", action="store_true", help=partial_text)
    parser.add_argument("--out", metavar="FOLDER", help=f"where the result goes (default: data/{spec.name})")
    return parser


def _report(meta: dict, folder: Path, seconds: float) -> list[str]:
    state = "canonical" if meta["canonical"] else "your own text"
    if not meta["canonical"] and is_kept(meta["name"]):
        state = "not canonical: no result on it is one on the published text"
    tokens = {split: entry["tokens"] for split, entry in meta["splits"].items()}
    about = f"{sum(tokens.values()):,} {meta['unit']}s, vocabulary {meta['vocab_size']}"
    return [
        f"{meta['name']} ({state})",
        f"{about}, SHA-256 {meta['source']['sha256']}",
        ", ".join(f"{split} {count:,}" for split, count in tokens.items()),
        f"in {folder}, {seconds:.1f} s",
    ]


def prepare_dataset(
    spec: TextSpec,
    home: Path | None,
    folder: Path,
    source: str | None = None,
    allow_partial: bool = False,
    say: Say = silent,
) -> dict:
    """Write the data set to `folder` and return its meta.json.

    home: the folder of its prepare.py; None for a text of one's own, which needs a `source`.
    Raises DataError when there is no usable text, FileError when the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    failures, was_read = [], False
    again = None if home else own_text_arguments(source, spec.unit, spec.splits)
    with _lock(folder, say):
        for origin, read, is_published in _sources(spec, home, folder, source, say):
            try:
                content = read()
                was_read = True
                name, canonical = identify(spec, content, allow_partial and not is_published)
            except DataError as error:  # a FileError is passed on: the next source would have the same disk
                failures.append(f"{origin}: {str(error).removeprefix(f'{origin}: ')}")
                if source is None:
                    say(f"no: {failures[-1]}")
                continue
            say(f"read {origin}")
            if spec.sha256 is None and spec.unit == CHARACTER and content.startswith(codecs.BOM_UTF8):
                content = content.removeprefix(codecs.BOM_UTF8)
                say("its byte-order mark is left out; it is no character of the text")
                if not content:
                    raise DataError(f"{origin}: empty but for a byte-order mark")
            _check_replaced(folder, canonical, sha256_of(content), "--out" if home else "--name", say)
            try:
                return write_dataset(folder, name, canonical, content, spec.unit, spec.splits, again)
            except DataError as error:
                raise DataError(f"{origin}: {error}") from None
    failures = failures or ["no raw file in the folder, and the spec names no address"]
    ways_out = [_way_out(spec, home, folder)] if home else []
    if home and source and was_read:
        text = own_text_arguments(source, spec.unit, spec.splits)[0]
        ways_out.append(f"To train on it as a text of your own: {own_text_command([text], 'mine')}")
    raise DataError(f"{spec.name}: no usable text", *(f"- {one}" for one in failures), *ways_out)


def _check_replaced(folder: Path, canonical: bool, sha256: str, option: str, say: Say) -> None:
    """Tells of another text in the folder, which will be replaced. Raises DataError if that is a published one."""
    old = meta_of(folder)
    if old is None or old["source"]["sha256"] == sha256:
        return
    if old["canonical"] and not canonical:
        raise DataError(f"{folder} holds the published {old['name']}, which stays; choose another folder with {option}")
    say(f"this replaces the text in {folder}: {old['name']}, {old['source']['bytes']:,} bytes")


@contextmanager
def _lock(folder: Path, say: Say) -> Iterator[None]:
    """Inside, no other prepare works in the folder. The lock ends with the process, even a killed one."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be opened, as on Windows: checksums still protect
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            if lock(descriptor) is False:
                say(f"another prepare.py is at work in {folder}; waiting until it has ended")
                lock(descriptor, wait=True)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def _way_out(spec: TextSpec, home: Path, folder: Path) -> str:
    command = ["python", str(home / "prepare.py"), *([] if folder == home else ["--out", str(folder)]), "--source"]
    way = f"Give the text yourself: {shlex.join(command)} PATH_OR_URL, or put {spec.filenames[0]} into {home}."
    addresses = " or ".join(remote.url for remote in spec.remotes)
    return way + (f" Without a network here, fetch {addresses} on another machine." if addresses else "")


def _sources(
    spec: TextSpec, home: Path, folder: Path, source: str | None, say: Say
) -> Iterator[tuple[str, Callable[[], bytes], bool]]:
    """(origin, a function that reads the text, whether that must be the published text) of each place to try."""
    if source is not None and source.lower().startswith(("http://", "https://")):
        yield source, partial(_read_address, spec, Remote(source), folder, say), False
        return
    if source is not None:
        yield source, partial(_read_path, spec, Path(os.path.expanduser(source))), False
        return
    for path in [path for place in dict.fromkeys((folder, home)) for path in _raw_files(spec, place)]:
        yield str(path), partial(read_text, spec, path), False
    for remote in spec.remotes:
        yield remote.url, partial(_read_address, spec, remote, folder, say), True
    if spec.rebuild is not None:
        yield "rebuild", partial(_read_rebuild, spec, folder, say), True


def _raw_files(spec: TextSpec, folder: Path) -> list[Path]:
    names = [name + ending for name in spec.filenames for ending in ("", *ARCHIVES)]
    return [folder / name for name in names if os.path.isfile(folder / name)]  # also of paths too long


def _read_path(spec: TextSpec, path: Path) -> bytes:
    try:
        if path.is_file():
            return read_text(spec, path)
        if str(path) == "-" or (path.exists() and not path.is_dir()):
            raise DataError(f"{path}: a pipe or a device, from which no text is read; write it to a file first")
        if not path.is_dir():
            raise DataError(f"{path}: there is no such file or folder")
        found = _raw_files(spec, path)[:1] or [entry for entry in path.iterdir() if entry.is_file()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(found) != 1:
        names = ", ".join(spec.filenames)
        raise DataError(f"{path}: holds none of {names} (or as .gz, .zip) and not just one file; name the file itself")
    return read_text(spec, found[0])


def _read_address(spec: TextSpec, remote: Remote, folder: Path, say: Say) -> bytes:
    """Download and check a text. The published one, or your own, is kept under the raw file's name."""
    ending = Path(re.split("[?#]", remote.url)[0]).suffix
    target = folder / (spec.filenames[0] + (ending if ending in ARCHIVES else ""))
    part = target.with_name(target.name + ".part")
    say(f"downloading {remote.url}")
    download(remote.url, part, remote.sha256, say)
    try:
        content = read_text(spec, part)
    except DataError as error:
        remove(part)
        raise DataError(str(error).replace(str(part), remote.url)) from error
    if sha256_of(content) == spec.sha256 or (spec.sha256 is None and not target.exists()):
        rename(part, target)
    else:
        remove(part)
    return content


def _read_rebuild(spec: TextSpec, folder: Path, say: Say) -> bytes:
    content = spec.rebuild(folder, say)
    if sha256_of(content) == spec.sha256:
        write_atomically(folder / spec.filenames[0], content)
    return content


def read_text(spec: TextSpec, path: Path) -> bytes:
    """Read a text file, or the text in a gzip or zip archive, which is recognised by its first bytes.

    Raises DataError when it cannot be read, is damaged, or is empty.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic.startswith(b"\x1f\x8b"):
            content = gzip.decompress(path.read_bytes())
        elif magic == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                content = archive.read(_member(spec, path, archive))
        else:
            content = read_whole(path, LARGEST_SOURCE)
    except DataError:
        raise
    except Exception as error:  # zipfile and gzip raise many kinds for a damaged archive
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        raise DataError(f"{path}: a damaged, cut or unreadable archive ({error}); fetch it again") from error
    if not content:
        raise DataError(f"{path}: empty")
    return content


def _member(spec: TextSpec, path: Path, archive: zipfile.ZipFile) -> str:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    chosen = [name for name in names if Path(name).name in spec.filenames] or names
    if len(chosen) != 1:
        expected = " or ".join(spec.filenames)
        raise DataError(f"{path}: holds {len(names)} files and not just one named {expected}; unpack it yourself")
    return chosen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which text is it?


def identify(spec: TextSpec, content: bytes, allow_partial: bool) -> tuple[str, bool]:
    """(name, canonical) of a text. Raises DataError for another text than the published one, unless allowed."""
    if spec.sha256 is None:
        return spec.name, False
    found = sha256_of(content)
    if found == spec.sha256:
        return spec.name, True
    is_head = _is_head(spec, content)
    if not (is_head and allow_partial):
        more = "; it is its beginning, which --allow-partial accepts" if is_head else "; nor is it its beginning"
        page = " (it is a web page)" if looks_like_html(content) else ""
        raise DataError(
            f"not the published {spec.name}{page}: {len(content):,} bytes, SHA-256 {found}, "
            f"expected {spec.size:,} bytes, {spec.sha256}{more}"
        )
    return f"{spec.name}-head-{short_size(len(content))}", False


def _is_head(spec: TextSpec, content: bytes) -> bool:
    """Whether the text begins as the published one, as far as the known SHA-256 of its first bytes tell."""
    count = max((count for count in spec.heads if count <= len(content)), default=0)
    return count > 0 and len(content) < spec.size and sha256_of(content[:count]) == spec.heads[count]


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def short_size(count: int) -> str:
    """4150000 -> 4.15M, 6800000 -> 6.8M, 950000 -> 950K, 12 -> 12."""
    for unit, letter in ((1_000_000, "M"), (1_000, "K")):
        if count >= unit:
            return f"{count / unit:.2f}".rstrip("0").rstrip(".") + letter
    return str(count)
