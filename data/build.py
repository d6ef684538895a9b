"""From a text to a prepared data set: what every data/NAME/prepare.py runs.

    text (file, archive, folder, URL, rebuild) -> canonical? -> vocabulary -> train.bin, val.bin (test.bin), meta.json

- A `TextSpec` says everything about one data set. To add your own text, make a folder data/NAME with a prepare.py like
  data/text8/prepare.py, put the text beside it as input.txt, and run it.
- Sources in order: --source alone; else a raw file in the data folder, the published addresses, the rebuild. Each
  failure is remembered and told if nothing works.
- `canonical: true` is written only when the text's SHA-256 is the one the spec names. Another text is refused, or with
  --allow-partial prepared under a name that says so (enwik8-head-4.15M, enwik8-altered-99M). A spec without a SHA-256
  (your own text) keeps its name and is `canonical: false`: nothing published vouches for it, and its own SHA-256, which
  every record carries, tells its versions apart. Put that SHA-256 and the size into the spec to make it canonical.
- Nothing is touched before everything that is to be written lies on the disk; then meta.json goes first and comes
  last, so that an interrupted prepare is never taken for a finished one.
- Two at once in a folder take turns.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import hashlib
import io
import json
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

import numpy as np

from data.common import BYTE, CHARACTER, FORMAT_VERSION, SPLITS, TOKEN, DataError, Vocabulary
from data.download import (
    DiskError,
    Say,
    disk_faults,
    download,
    looks_like_html,
    move,
    read_faults,
    remove,
    silent,
    sync,
    write,
    write_whole,
)
from support.files import read_whole

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two of us apart
    fcntl = None

TRAIN_VAL = {"train": 90, "val": 10}  # percent; nanoGPT's split of Shakespeare
TRAIN_VAL_TEST = {"train": 90, "val": 5, "test": 5}  # percent; of 100 MB: the published 90M/5M/5M
HEAD = 65_536  # bytes that tell the beginning of a published text from another text
PIECE = 1 << 22  # bytes of text encoded at a time
LARGEST = 1 << 34  # bytes of a text, which is held in memory
ARCHIVES = (".gz", ".zip")
FILES = (*(f"{split}.bin" for split in SPLITS), "meta.json")  # of a prepared folder


@dataclass(frozen=True)
class Remote:
    """A published address. `sha256` is that of the file behind it, which may be an archive; None if not known."""

    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class TextSpec:
    """One data set.

    filenames     names of the raw text, the first being the one that downloads get; each also with .gz or .zip
    splits        percent of the text, in the order of the text
    size, sha256  bytes and SHA-256 of the published text; None for a text of your own
    head_sha256   SHA-256 of its first 65,536 bytes
    vocab_size    of the published text
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
    vocab_size: int | None = None
    rebuild: Callable[[Path, Say], bytes] | None = None

    def __post_init__(self) -> None:
        assert self.unit in (CHARACTER, BYTE), self.unit
        assert (self.size is None) == (self.sha256 is None), "size and sha256 are known together"
        assert tuple(self.splits) in (SPLITS, SPLITS[:2]) and sum(self.splits.values()) == 100, self.splits


@dataclass(frozen=True)
class Text:
    content: bytes
    origin: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Source:
    label: str
    read: Callable[[], Text]  # raises DataError
    published: bool = False  # must be the published text, whatever --allow-partial says


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def run(spec: TextSpec, home: Path, arguments: list[str], say: Say) -> None:
    """Prepare as the command line asks. `home` is the folder of prepare.py. DataError: one message, exit status 2."""
    parser = _parser(spec)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    started = time.perf_counter()
    try:
        folder = Path(os.path.expanduser(options.out)) if options.out else home
        meta = prepare(spec, home, folder, options.source, options.allow_partial, say)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; run the same command again to go on\n")
    for line in summary(spec, meta, folder, time.perf_counter() - started):
        say(line)


def _parser(spec: TextSpec) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python data/{spec.name}/prepare.py", description=f"Prepare {spec.name} for training."
    )
    parser.add_argument(
        "--source",
        metavar="PATH_OR_URL",
        help="the text: a file, a .gz or .zip, a folder with one of them, or an address",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="accept a text that is not the published one, under a name that says so",
    )
    parser.add_argument("--out", metavar="FOLDER", help=f"where the result goes (default: data/{spec.name})")
    return parser


def summary(spec: TextSpec, meta: dict, folder: Path, seconds: float) -> list[str]:
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
    """Write the data set to `folder` and return its meta.json. After a DataError nothing half-made counts as done."""
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder, say):
        text = obtain(spec, home, folder, source, allow_partial, say)
        say(f"read {text.origin}")
        return encode(spec, text, folder)


@contextmanager
def _alone_in(folder: Path, say: Say) -> Iterator[None]:
    """One prepare at a time in a folder, by a lock that ends with the process, however that ends."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be opened, a file system without locks: the checksums have to do
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


def obtain(spec: TextSpec, home: Path, folder: Path, source: str | None, allow_partial: bool, say: Say) -> Text:
    """The text of the first source that works. Raises one DataError that lists every source with its reason."""
    failures = []
    for candidate in _sources(spec, home, folder, source, say):
        try:
            text = candidate.read()
            identify(spec, text, allow_partial and not candidate.published)
            return text
        except DiskError:  # no other source would help
            raise
        except DataError as error:
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


def _read_path(spec: TextSpec, path: Path) -> Text:
    with read_faults(path):
        if path.is_file():
            return read_text(spec, path)
        if not path.is_dir():
            raise DataError(f"{path}: there is no such file or folder")
        found = _raw_files(spec, path) or _only_file(path)
    if not found:
        looked_for = ", ".join(spec.filenames)
        raise DataError(
            f"{path}: holds none of {looked_for} (or these as .gz, .zip), nor just one other text; name the file itself"
        )
    return read_text(spec, found[0])


def _only_file(folder: Path) -> list[Path]:
    """The folder's one file that could be a text or an archive of it, if there is just one."""
    files = [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in ("", ".txt", ".xml", *ARCHIVES)
    ]
    files = [path for path in files if not path.name.startswith((".", "README", "LICENSE"))]
    return files if len(files) == 1 else []


def _read_address(spec: TextSpec, remote: Remote, folder: Path, say: Say) -> Text:
    """Download, check, and keep under the raw file's name, for the next prepare, unless it is another text."""
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
    text = Text(content, remote.url)
    if text.sha256 == spec.sha256 or (spec.sha256 is None and not target.exists()):
        move(part, target)
    else:
        remove(part)
    return text


def _read_rebuild(spec: TextSpec, folder: Path, say: Say) -> Text:
    text = Text(spec.rebuild(folder, say), "rebuild")
    if text.sha256 == spec.sha256:
        write_whole(folder / spec.filenames[0], text.content)
    return text


def read_text(spec: TextSpec, path: Path) -> Text:
    """A text file, or the text in a gzip or zip archive (known by its first bytes, whatever its name)."""
    try:
        content = _unpack(spec, path)
    except DataError:
        raise
    except Exception as error:  # zipfile and gzip raise many kinds for what is damaged
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        raise DataError(f"{path}: a damaged, cut or unreadable archive ({error}); fetch it again") from error
    if not content:
        raise DataError(f"{path}: empty")
    return Text(content, str(path))


def _unpack(spec: TextSpec, path: Path) -> bytes:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic.startswith(b"\x1f\x8b"):
        with gzip.open(path) as packed:
            return packed.read()
    if magic != b"PK\x03\x04":
        return read_whole(path, LARGEST)
    with zipfile.ZipFile(path) as archive:
        return archive.read(_member(spec, path, archive))


def _member(spec: TextSpec, path: Path, archive: zipfile.ZipFile) -> str:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    known = [name for name in names if Path(name).name in spec.filenames]
    chosen = known or names
    if len(chosen) != 1:
        raise DataError(
            f"{path}: holds {len(names)} files and not just one named {' or '.join(spec.filenames)}; unpack it yourself"
        )
    return chosen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which text is it?


def identify(spec: TextSpec, text: Text, allow_partial: bool) -> tuple[str, bool]:
    """(name, canonical) of a text. Raises DataError for one that is not the published one, unless that is allowed."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and writing


def encode(spec: TextSpec, text: Text, folder: Path) -> dict:
    """Write the bins and meta.json of an identified text and return the meta."""
    name, canonical = identify(spec, text, allow_partial=True)
    try:
        vocabulary, count = vocabulary_of(text.content, spec.unit)
    except DataError as error:
        raise DataError(f"{text.origin}: {error}") from None
    assert not canonical or spec.vocab_size in (None, vocabulary.size), f"{vocabulary.size} symbols in {spec.name}"
    sizes = split_sizes(spec.splits, count)
    short = [split for split, size in sizes.items() if size < 2]
    if short:
        raise DataError(
            f"{text.origin}: {count:,} {spec.unit}s are too few: {', '.join(short)} would have fewer than 2"
        )
    try:
        digests = _write_parts(text.content, vocabulary, sizes, folder)
        meta = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "canonical": canonical,
            **vocabulary.to_dict(),
            "source": {"bytes": len(text.content), "sha256": text.sha256},
            "splits": {split: {"tokens": sizes[split], "sha256": digests[split]} for split in sizes},
        }
        write(folder / "meta.json.part", json.dumps(meta, indent=1).encode() + b"\n")
        _publish(folder, sizes)
    finally:
        for name in FILES:  # all of them, for an earlier prepare may have been killed
            remove(folder / f"{name}.part")
    return meta


def _publish(folder: Path, sizes: dict[str, int]) -> None:
    """Move everything into place. Without meta.json a folder counts as unprepared, so it goes first and comes last."""
    remove(folder / "meta.json")
    for split in SPLITS:
        if split in sizes:
            move(folder / f"{split}.bin.part", folder / f"{split}.bin")
        else:
            remove(folder / f"{split}.bin")  # of the data set that was here before
    move(folder / "meta.json.part", folder / "meta.json")


def vocabulary_of(content: bytes, unit: str) -> tuple[Vocabulary, int]:
    """The distinct symbols of a text, sorted, and how many symbols it has in all."""
    seen, count = np.zeros(_code_space(unit), dtype=bool), 0
    for codes in _codes(content, unit):
        seen[codes] = True
        count += len(codes)
    present = np.flatnonzero(seen).tolist()
    if len(present) > 1 << 16:
        raise DataError(f'{len(present):,} distinct characters do not fit 16-bit ids; use unit "{BYTE}" in the spec')
    return Vocabulary(unit, tuple(present if unit == BYTE else map(chr, present))), count


def split_sizes(splits: Mapping[str, int], count: int) -> dict[str, int]:
    """Tokens of each split. The last one takes what rounding leaves, so nothing of the text is lost."""
    sizes = {split: count * percent // 100 for split, percent in splits.items()}
    last = list(sizes)[-1]
    sizes[last] += count - sum(sizes.values())
    return sizes


def _write_parts(content: bytes, vocabulary: Vocabulary, sizes: dict[str, int], folder: Path) -> dict[str, str]:
    """Encode the text into one file a split; the SHA-256 of each."""
    parts = {split: folder / f"{split}.bin.part" for split in sizes}
    digests = {split: hashlib.sha256() for split in sizes}
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())).tolist()))
    position = 0
    with ExitStack() as stack:
        files = {}
        for split, part in parts.items():
            stack.enter_context(disk_faults(part))  # closing a file may fail, too
            files[split] = stack.enter_context(open(part, "wb"))
        for ids in _ids(content, vocabulary):
            for split, file in files.items():
                start = ends[split] - sizes[split] - position
                piece = ids[max(start, 0) : max(start + sizes[split], 0)]  # what of this chunk lies in this split
                digests[split].update(piece)
                with disk_faults(parts[split]):
                    file.write(piece)
            position += len(ids)
        for split, file in files.items():
            with disk_faults(parts[split]):
                sync(file)
    return {split: digest.hexdigest() for split, digest in digests.items()}


def _ids(content: bytes, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    symbols = vocabulary.symbols if vocabulary.unit == BYTE else [ord(symbol) for symbol in vocabulary.symbols]
    table = np.zeros(_code_space(vocabulary.unit), dtype=TOKEN)
    table[list(symbols)] = np.arange(vocabulary.size)
    for codes in _codes(content, vocabulary.unit):
        yield table[codes]


def _code_space(unit: str) -> int:
    return 256 if unit == BYTE else 0x110000


def _codes(content: bytes, unit: str) -> Iterator[np.ndarray]:
    """The text's bytes or code points, a piece at a time."""
    utf8 = codecs.getincrementaldecoder("utf-8")()  # keeps a character that a piece's end cuts in two
    for start in range(0, len(content), PIECE):
        piece = content[start : start + PIECE]
        if unit == BYTE:
            yield np.frombuffer(piece, dtype=np.uint8)
            continue
        try:
            characters = utf8.decode(piece, final=start + PIECE >= len(content))
        except UnicodeDecodeError as error:
            raise DataError(
                f'not UTF-8 text near byte {start + error.start:,}; use unit "{BYTE}" in the spec'
            ) from error
        yield np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
