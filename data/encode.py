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
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data.common import BYTE, FORMAT_VERSION, SPLITS, TOKEN, DataError, Vocabulary
from data.download import remove, rename, writing

PIECE = 1 << 22  # bytes of text encoded at a time
FILES = (*(f"{split}.bin" for split in SPLITS), "meta.json")  # of a prepared folder


def write_dataset(
    folder: Path, name: str, canonical: bool, content: bytes, unit: str, splits: Mapping[str, int]
) -> dict:
    """Write the bins and meta.json of a text and return the meta. splits: percent of the text for each split.

    Raises DataError when the text cannot be encoded or is too short, FileError when the folder cannot be written.
    """
    vocabulary, count = vocabulary_of(content, unit)
    sizes = split_sizes(splits, count)
    short = [split for split, size in sizes.items() if size < 2]
    if short:
        raise DataError(f"{count:,} {unit}s are too few: {', '.join(short)} would have fewer than 2")
    try:
        digests = _write_parts(content, vocabulary, sizes, folder)
        meta = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "canonical": canonical,
            **vocabulary.to_dict(),
            "source": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
            "splits": {split: {"tokens": sizes[split], "sha256": digests[split]} for split in sizes},
        }
        part = folder / "meta.json.part"
        with writing(part), open(part, "wb") as file:
            file.write(json.dumps(meta, indent=1).encode() + b"\n")
            _sync(file)
        _put_in_place(folder, sizes)
    finally:
        for file_name in FILES:  # also those of an earlier prepare that was killed
            remove(folder / f"{file_name}.part")
    return meta


def _put_in_place(folder: Path, sizes: dict[str, int]) -> None:
    """Rename the finished parts. A folder without meta.json counts as unprepared, so it goes first and comes last."""
    remove(folder / "meta.json")
    for split in SPLITS:
        if split in sizes:
            rename(folder / f"{split}.bin.part", folder / f"{split}.bin")
        else:
            remove(folder / f"{split}.bin")  # of the data set that was here before
    rename(folder / "meta.json.part", folder / "meta.json")


def _sync(file) -> None:
    """Put an open file's bytes on the disk, so that after a crash its name does not stand for an empty file."""
    file.flush()
    os.fsync(file.fileno())


def vocabulary_of(content: bytes, unit: str) -> tuple[Vocabulary, int]:
    """The distinct symbols of a text, sorted, and how many symbols it has in all."""
    seen, count = np.zeros(_code_space(unit), dtype=bool), 0
    for codes in _code_pieces(content, unit):
        seen[codes] = True
        count += len(codes)
    present = np.flatnonzero(seen).tolist()
    if len(present) > 1 << 16:
        raise DataError(f'{len(present):,} distinct characters do not fit 16-bit ids; use unit "{BYTE}" in the spec')
    return Vocabulary(unit, tuple(present if unit == BYTE else map(chr, present))), count


def split_sizes(splits: Mapping[str, int], count: int) -> dict[str, int]:
    """Tokens of each split; the last one takes the remainder of the rounding."""
    sizes = {split: count * percent // 100 for split, percent in splits.items()}
    last = list(sizes)[-1]
    sizes[last] += count - sum(sizes.values())
    return sizes


def _write_parts(content: bytes, vocabulary: Vocabulary, sizes: dict[str, int], folder: Path) -> dict[str, str]:
    """Encode the text into one file a split and return the SHA-256 of each."""
    digests, ids, rest = {}, _id_pieces(content, vocabulary), np.zeros(0, dtype=TOKEN)
    for split, missing in sizes.items():
        part, digest = folder / f"{split}.bin.part", hashlib.sha256()
        with writing(part), open(part, "wb") as file:
            while missing:
                rest = rest if len(rest) else next(ids)
                piece, rest = rest[:missing], rest[missing:]
                digest.update(piece)
                file.write(piece)
                missing -= len(piece)
            _sync(file)
        digests[split] = digest.hexdigest()
    return digests


def _id_pieces(content: bytes, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """The ids of the text, a piece at a time."""
    symbols = vocabulary.symbols if vocabulary.unit == BYTE else [ord(symbol) for symbol in vocabulary.symbols]
    table = np.zeros(_code_space(vocabulary.unit), dtype=TOKEN)
    table[list(symbols)] = np.arange(vocabulary.size)
    for codes in _code_pieces(content, vocabulary.unit):
        yield table[codes]


def _code_space(unit: str) -> int:
    return 256 if unit == BYTE else 0x110000


def _code_pieces(content: bytes, unit: str) -> Iterator[np.ndarray]:
    """The bytes or code points of the text, a piece at a time."""
    utf8 = codecs.getincrementaldecoder("utf-8")()  # holds back a character that the end of a piece cuts in two
    for start in range(0, len(content), PIECE):
        piece = content[start : start + PIECE]
        if unit == BYTE:
            yield np.frombuffer(piece, dtype=np.uint8)
            continue
        try:
            characters = utf8.decode(piece, final=start + PIECE >= len(content))
        except UnicodeDecodeError as error:
            place = f"near byte {start + error.start:,}"
            raise DataError(f'not UTF-8 text {place}; use unit "{BYTE}" in the spec') from error
        yield np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
