"""Write a text as bins of token ids with their meta.json.

- A symbol's id is its place in the sorted vocabulary; bins are uint16, little-endian, which nanoGPT reads too.
- All new files lie on the disk before an old one is replaced. meta.json is removed first and written last, so that an
  interrupted prepare is never taken for a finished one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.common import BYTE, FORMAT_VERSION, SPLITS, TOKEN, DataError, Vocabulary
from data.download import remove, rename, writing


def write_dataset(
    folder: Path, name: str, canonical: bool, content: bytes, unit: str, splits: Mapping[str, int]
) -> dict:
    """Write the bins and meta.json of a text and return the meta. splits: percent of the text for each split.

    Raises DataError when the text cannot be encoded or is too short, FileError when the folder cannot be written.
    """
    vocabulary, ids = encoded(content, unit)
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


def encoded(content: bytes, unit: str) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of a text, its distinct symbols in order, and the text's ids (symbols,) uint16."""
    if unit == BYTE or content.isascii():
        codes = np.frombuffer(content, dtype=np.uint8)
    else:
        try:
            codes = np.frombuffer(content.decode().encode("utf-32-le"), dtype="<u4")
        except UnicodeDecodeError as error:
            raise DataError(f'not UTF-8 text near byte {error.start:,}; use unit "{BYTE}" in the spec') from error
    table = np.zeros(0x110000, dtype=TOKEN)  # of all code points
    table[codes] = 1
    present = np.flatnonzero(table)
    if len(present) > 1 << 16:
        raise DataError(f'{len(present):,} distinct characters do not fit 16-bit ids; use unit "{BYTE}" in the spec')
    table[present] = np.arange(len(present))
    symbols = present.tolist()
    return Vocabulary(unit, tuple(symbols if unit == BYTE else map(chr, symbols))), table[codes]


def split_sizes(splits: Mapping[str, int], count: int) -> dict[str, int]:
    """Tokens of each split; the last one takes the remainder of the rounding."""
    sizes = {split: count * percent // 100 for split, percent in splits.items()}
    sizes[list(sizes)[-1]] += count - sum(sizes.values())
    return sizes
