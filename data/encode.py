"""Write a text as bins of token ids with their meta.json.

- A symbol's id is its place in the sorted vocabulary; bins are uint16, little-endian, which nanoGPT reads too.
- All new files lie on the disk before an old one is replaced. meta.json is removed first and written last, so that an
  interrupted prepare is never taken for a finished one.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.common import BYTE, CHARACTER, FORMAT_VERSION, SPLITS, TOKEN, DataError, Vocabulary
from data.download import remove, rename, writing

AS_BYTES = 'take its bytes: --unit=byte (in a prepare.py of your own: unit="byte")'


def write_dataset(
    folder: Path,
    name: str,
    canonical: bool,
    content: bytes,
    unit: str,
    splits: Mapping[str, int],
    again: list[str] | None = None,
) -> dict:
    """Write the bins and meta.json of a text and return the meta. splits: percent of the text for each split.

    again: the words after data/prepare.py that make the same data set again.

    Raises DataError when the text cannot be encoded or is too short, FileError when the folder cannot be written.
    """
    vocabulary, ids = encoded(content, unit, again[0] if again else "TEXT")
    sizes = split_sizes(splits, len(ids))
    short = [split for split, size in sizes.items() if size < 2]
    if short:
        raise DataError(f"{len(ids):,} {unit}s are too few: {', '.join(short)} would have fewer than 2")
    bins = dict(zip(sizes, np.split(ids, np.cumsum(list(sizes.values()))[:-1])))
    meta = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "canonical": canonical,
        **vocabulary.to_dict(),
        **({"again": again} if again else {}),
        "source": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "splits": {
            split: {"tokens": size, "sha256": hashlib.sha256(bins[split]).hexdigest()} for split, size in sizes.items()
        },
    }
    files = {f"{split}.bin": part for split, part in bins.items()}
    _replace_files(folder, {**files, "meta.json": json.dumps(meta, indent=1).encode() + b"\n"})
    return meta


def _replace_files(folder: Path, files: dict[str, bytes | np.ndarray]) -> None:
    """Put the files, meta.json last, in the place of those of an earlier prepare."""
    names = [*(f"{split}.bin" for split in SPLITS), "meta.json"]
    try:
        for name, content in files.items():
            part = folder / f"{name}.part"
            with writing(part), open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # after a crash, a name must not stand for an empty file
        remove(folder / "meta.json")  # a folder without it counts as unprepared
        for name in names:
            rename(folder / f"{name}.part", folder / name) if name in files else remove(folder / name)
    finally:
        for name in names:  # also those of an earlier prepare that was killed
            remove(folder / f"{name}.part")


def encoded(content: bytes, unit: str, origin: str = "TEXT") -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of a text, its distinct symbols in order, and the text's ids (symbols,) uint16.

    origin: the path of the text, for advice. Raises DataError when it is not UTF-8 or has too many characters.
    """
    if unit == BYTE or content.isascii():
        codes = np.frombuffer(content, dtype=np.uint8)
    else:
        try:
            codes = np.frombuffer(content.decode().encode("utf-32-le"), dtype="<u4")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text near byte {error.start:,}; {_way_to_utf8(content, origin)}") from error
    if unit == CHARACTER and _has_zeros(content):
        raise DataError(f"{content.count(0):,} zero bytes, so not UTF-8 text; {_way_to_utf8(content, origin)}")
    table = np.zeros(0x110000, dtype=TOKEN)  # of all code points
    table[codes] = 1
    present = np.flatnonzero(table)
    if len(present) > 1 << 16:
        raise DataError(f"{len(present):,} distinct characters do not fit 16-bit ids; {AS_BYTES}")
    table[present] = np.arange(len(present))
    symbols = present.tolist()
    return Vocabulary(unit, tuple(symbols if unit == BYTE else map(chr, symbols))), table[codes]


def _has_zeros(content: bytes) -> bool:
    """Whether an eighth of the bytes are zero, as in UTF-16."""
    return content.count(0) > len(content) // 8


def _way_to_utf8(content: bytes, origin: str) -> str:
    """Advice for a text in another encoding, which is guessed from its first bytes and its zeros."""
    marks = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    encoding = next((name for name, starts in marks.items() if content.startswith(starts)), None)
    if encoding is None and _has_zeros(content):
        encoding = "UTF-16LE" if content[1::2].count(0) > content[::2].count(0) else "UTF-16BE"
    old, new = shlex.quote(origin), shlex.quote(f"{origin}.utf8")
    if not encoding and (damaged := _damaged_bytes(content)):
        way = f"leave them out: iconv -c -f UTF-8 -t UTF-8 {old} > {new}"
        return f"it seems to be UTF-8 with {damaged:,} damaged bytes, as where a text was cut; {way}; or {AS_BYTES}"
    guess = f"it seems to be {encoding}; " if encoding else "if it is Latin-1, "
    return f"{guess}convert it: iconv -f {encoding or 'ISO-8859-1'} -t UTF-8 {old} > {new}; or {AS_BYTES}"


def _damaged_bytes(content: bytes) -> int:
    """How many bytes of a text are not UTF-8, if more of its characters beyond ASCII are, or if these are halves of
    surrogate pairs; else 0."""
    good = content.decode(errors="ignore")
    damaged = len(content) - len(good.encode())
    try:
        content.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return damaged if damaged < len(good) - len(good.encode("ascii", errors="ignore")) else 0
    return damaged


def split_sizes(splits: Mapping[str, int], count: int) -> dict[str, int]:
    """Tokens of each split; the last one takes the remainder of the rounding."""
    sizes = {split: count * percent // 100 for split, percent in splits.items()}
    sizes[list(sizes)[-1]] += count - sum(sizes.values())
    return sizes
