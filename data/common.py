"""Read a prepared data set: its vocabulary, random batches, and whole splits in order.

    data = Dataset.open(find_dataset("shakespeare_char"), device="cuda")    # verified before the first batch
    x, y = data.batch("train", seed=1337, step=0, batch_size=64, block_size=256)

Shapes: B batch_size, T block_size. `data/encode.py` writes the folders that are read here.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from support.files import ROOT, UserError, is_utf8, read_json, shown
from support.options import nearest
from support.schema import FITS, FLAG, LINE, LIST, POSITIVE, SHA256, mismatches

FORMAT_VERSION = 1
CHARACTER, BYTE = "character", "byte"
SPLITS = ("train", "val", "test")
TOKEN = np.dtype("<u2")  # what nanoGPT reads too
CHUNK = 1 << 22  # tokens handled at a time, so that a large split never needs its size in memory
CPU_RESIDENT_LIMIT = 1 << 30  # bytes
CUDA_RESIDENT_SHARE = 0.25  # of the free memory; the model needs the rest
VOCABULARY = {"unit": {CHARACTER, BYTE}, "vocabulary": LIST, "vocab_size": POSITIVE}
SPLIT = {"tokens": POSITIVE, "sha256": SHA256}
META = {"format_version": POSITIVE, "name": LINE, "canonical": FLAG, "source": {"bytes": POSITIVE, "sha256": SHA256},
        "splits": {"train": SPLIT, "val": SPLIT, "test?": SPLIT}}  # fmt: skip


class DataError(UserError):
    """A data set that cannot be used."""


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """The distinct symbols of a text, sorted; a symbol's id is its place among them.

    unit "character": symbols are strings of length 1. unit "byte": symbols are ints 0..255, and text is UTF-8.
    """

    unit: str
    symbols: tuple[str, ...] | tuple[int, ...]

    def __post_init__(self) -> None:
        for symbol in self.symbols:
            if not _is_symbol(symbol, self.unit):
                raise DataError(f"vocabulary: {shown(symbol)} is not a single {self.unit}")
        if not self.symbols or list(self.symbols) != sorted(set(self.symbols)):
            raise DataError("vocabulary: symbols are not sorted and distinct, or there are none")

    @property
    def size(self) -> int:
        return len(self.symbols)

    def to_dict(self) -> dict:
        """As plain JSON values, under the keys of meta.json."""
        return {"unit": self.unit, "vocabulary": list(self.symbols), "vocab_size": self.size}

    @classmethod
    def from_dict(cls, values: Mapping) -> Vocabulary:
        """Inverse of `to_dict`; a whole meta.json will do too. Raises DataError if the values are no vocabulary."""
        for problem in mismatches(values, VOCABULARY, "vocabulary"):
            raise DataError(problem)
        vocabulary = cls(values["unit"], tuple(values["vocabulary"]))
        if values["vocab_size"] != vocabulary.size:
            raise DataError(f"vocab_size is {values['vocab_size']}, but the vocabulary has {vocabulary.size} symbols")
        return vocabulary

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int64. Raises DataError naming the symbols that the vocabulary does not have."""
        codes = _codes_of(text, self.unit)
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ids, self.size - 1)] == codes
        if not known.all():
            raise DataError(self._unknown_message(codes, np.flatnonzero(~known)))
        return ids.astype(np.int64)

    def has(self, text: str) -> bool:
        """Whether `encode` knows every symbol of the text."""
        return bool(np.isin(_codes_of(text, self.unit), self._codes).all())

    @property
    def start(self) -> int:
        """The id that a text without a prompt begins with: a newline, else a space, else the first symbol.

        Of bytes, the first that does not continue a UTF-8 character, if there is one.
        """
        codes = self._codes.tolist()
        begins = [code for code in codes if self.unit == CHARACTER or code & 0xC0 != 0x80]
        return codes.index(next(code for code in (ord("\n"), ord(" "), *begins, *codes) if code in codes))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decoder()(ids, final=True)

    def decoder(self) -> Callable[..., str]:
        """A streaming `decode(ids, final=False)`, which holds back the bytes of an unfinished character.

        The last call passes `final=True` (ids may be empty) to release the rest.
        """
        if self.unit == CHARACTER:
            return lambda ids, final=False: "".join([self.symbols[i] for i in ids])
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids, final=False: utf8.decode(bytes([self.symbols[i] for i in ids]), final)

    @cached_property
    def _codes(self) -> np.ndarray:
        codes = self.symbols if self.unit == BYTE else [ord(symbol) for symbol in self.symbols]
        return np.array(codes, dtype=np.uint32)

    def _unknown_message(self, codes: np.ndarray, positions: np.ndarray) -> str:
        _, first = np.unique(codes[positions], return_index=True)
        first = positions[np.sort(first)]  # each unknown symbol once, in the order of the text
        quoted = [chr(code) if self.unit == CHARACTER else bytes([code]) for code in codes[first[:8]]]
        unknown = ", ".join(f"{symbol!r} at {position}" for symbol, position in zip(quoted, first))
        more = f" and {len(first) - 8} more" if len(first) > 8 else ""
        known = "".join(self.symbols) if self.unit == CHARACTER else bytes(self.symbols)
        return f"not in the vocabulary: {unknown}{more}; it has {self.size} {self.unit}s: {known[:256]!r}"


def _is_symbol(symbol: object, unit: str) -> bool:
    if unit == CHARACTER:  # half a surrogate pair occurs in no text
        return isinstance(symbol, str) and len(symbol) == 1 and is_utf8(symbol)
    return type(symbol) is int and 0 <= symbol <= 255  # type(), because True is an int as well


def _codes_of(text: str, unit: str) -> np.ndarray:
    """The text's code points or UTF-8 bytes; the lone surrogates in a command line stand for bytes."""
    if unit == CHARACTER:
        return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    try:
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise DataError(f"{text[error.start]!r} at {error.start} has no UTF-8 bytes") from error


# ---------------------------------------------------------------------------------------------------------------------
# Dataset


@dataclass(frozen=True, eq=False)
class Dataset:
    """A verified data set. Make one with `Dataset.open`."""

    name: str  # as in records and tables; a partial text has another name than the published one
    canonical: bool  # whether the text's SHA-256 is the published one
    vocabulary: Vocabulary
    sizes: dict[str, int]  # tokens of each split
    source_sha256: str
    resident: bool  # whether the tokens lie in the device's memory (else they are read from disk)
    device: torch.device
    _tokens: dict[str, torch.Tensor | np.ndarray] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, device: str | torch.device = "cpu", resident: bool | None = None) -> Dataset:
        """Read and verify a prepared folder. `resident=None`: the tokens lie on the device when they fit well.

        Raises DataError naming the file, what was found, what was expected, and the command that makes it again.
        """
        folder, device = Path(folder), torch.device(device)
        meta, vocabulary = _read_meta(folder)
        entries = {split: meta["splits"][split] for split in SPLITS if split in meta["splits"]}
        tokens = {split: _read_bin(folder, split, entry, vocabulary.size) for split, entry in entries.items()}
        _check_text(folder, meta["source"], vocabulary, tokens.values())
        sizes = {split: len(array) for split, array in tokens.items()}
        dtype = np.dtype(np.uint8 if vocabulary.size <= 256 else np.int32)
        if resident is None:
            on_cuda = device.type == "cuda"
            limit = CUDA_RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0] if on_cuda else CPU_RESIDENT_LIMIT
            resident = sum(sizes.values()) * dtype.itemsize <= limit
        if resident:
            tokens = {split: torch.from_numpy(array.astype(dtype)).to(device) for split, array in tokens.items()}
        sha256 = meta["source"]["sha256"]
        return cls(meta["name"], meta["canonical"], vocabulary, sizes, sha256, resident, device, tokens)

    @property
    def unit(self) -> str:
        return self.vocabulary.unit

    def train_on_first(self, count: int) -> Dataset:
        """The same data set with only the first `count` tokens for training; 0 leaves it as it is."""
        if count > self.sizes["train"]:
            have = self.sizes["train"]
            raise DataError(f"{self.name}: train has {have:,} tokens, fewer than train_characters={count:,}")
        if count == 0:
            return self
        sizes, tokens = self.sizes | {"train": count}, self._tokens | {"train": self._tokens["train"][:count]}
        return dataclasses.replace(self, sizes=sizes, _tokens=tokens)

    def in_vocabulary(self, vocabulary: Vocabulary) -> Dataset:
        """The same text in the ids of another vocabulary. Raises DataError naming the symbols which that one lacks."""
        if vocabulary == self.vocabulary:
            return self
        if vocabulary.unit != self.unit:
            raise DataError(f"{self.name} is prepared as {self.unit}s, the model knows {vocabulary.unit}s")
        if lacking := sorted({*self.vocabulary.symbols} - {*vocabulary.symbols}):
            some = ", ".join(map(repr, lacking[:8])) + (", …" if len(lacking) > 8 else "")
            lack = f"{self.name} has {len(lacking)} {self.unit}s that are not among the model's {vocabulary.size}"
            raise DataError(f"{lack}: {some}; prepare the text without them")
        ids = {symbol: i for i, symbol in enumerate(vocabulary.symbols)}
        table = np.array([ids[symbol] for symbol in self.vocabulary.symbols])
        tokens = {}
        for split, old in self._tokens.items():
            if self.resident:
                dtype = torch.uint8 if vocabulary.size <= 256 else torch.int32
                new = torch.from_numpy(table).to(self.device, dtype)
                tokens[split] = torch.cat([new[piece.long()] for piece in old.split(CHUNK)])
            else:
                tokens[split] = table.astype(TOKEN)[old]
        return dataclasses.replace(self, vocabulary=vocabulary, _tokens=tokens)

    def batch(
        self, split: str, seed: int, step: int, batch_size: int, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows x, and y with the symbol after each of theirs; both (B, T) int64 on the device.

        A pure function of its arguments. The rows of a smaller batch are the first rows of a larger one, so that
        gradient accumulation may slice one draw. Raises DataError if the split has fewer than T + 1 tokens.
        """
        size = self._size(split)
        positions = size - block_size
        if positions < 1:
            few = f"{self.name}: {split} has {size:,} tokens, too few for block_size {block_size}"
            raise DataError(f"{few}; choose a block_size up to {size - 1}")
        starts = window_starts(split, seed, step, batch_size, positions)
        rows = self._rows(split, starts, block_size + 1)  # (B, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def windows(self, split: str, block_size: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The split in order, in windows (x, y) that predict every symbol but the first exactly once.

        Each (B, T) int64 on the device; after the end of the split x is 0 and y is -1, which the loss ignores.
        """
        per_batch = batch_size * block_size
        for start in range(0, self._size(split) - 1, per_batch):
            stretch = self._stretch(split, start, start + per_batch + 1)
            count = len(stretch) - 1
            x = torch.zeros(per_batch, dtype=torch.int64, device=self.device)
            y = torch.full_like(x, -1)
            x[:count], y[:count] = stretch[:-1], stretch[1:]
            yield x.view(batch_size, block_size), y.view(batch_size, block_size)

    def tokens(self, split: str) -> np.ndarray:
        """All ids of a split in order, (N,), on the CPU."""
        tokens = self._tokens[split]
        return tokens.cpu().numpy() if self.resident else tokens

    def symbol_counts(self, split: str) -> torch.Tensor:
        """How often each symbol occurs in the split: (vocabulary size,) int64, on the CPU."""
        counts = torch.zeros(self.vocabulary.size, dtype=torch.int64)
        for start in range(0, self._size(split), CHUNK):
            piece = self._stretch(split, start, start + CHUNK)
            counts += torch.bincount(piece, minlength=self.vocabulary.size).cpu()
        return counts

    def describe(self) -> dict:
        """The data set as a record describes it."""
        return dict(name=self.name, canonical=self.canonical, sha256=self.source_sha256, unit=self.unit,
                    vocab_size=self.vocabulary.size, splits=dict(self.sizes))  # fmt: skip

    def _size(self, split: str) -> int:
        if split not in self.sizes:
            raise DataError(f"{self.name} has no {split!r} split; it has {', '.join(self.sizes)}")
        return self.sizes[split]

    def _rows(self, split: str, starts: np.ndarray, length: int) -> torch.Tensor:
        tokens = self._tokens[split]
        if self.resident:
            return tokens.unfold(0, length, 1)[self._send(torch.from_numpy(starts))].long()
        rows = np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]
        return self._send(torch.from_numpy(rows.astype(np.int64)))

    def _stretch(self, split: str, start: int, stop: int) -> torch.Tensor:
        tokens = self._tokens[split][start:stop]
        return tokens.long() if self.resident else self._send(torch.from_numpy(tokens.astype(np.int64)))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":  # pinned, so that the copy does not wait for the device
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def window_starts(split: str, seed: int, step: int, batch_size: int, positions: int) -> np.ndarray:
    """Start offsets (B,) int64 in [0, positions) of a batch's windows.

    Philox's raw output is fixed by its definition (Salmon et al. 2011), whereas numpy's distributions may change
    between versions; the bias of the modulo is below positions / 2**64.
    """
    key = np.array([seed % (1 << 64), SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, step, 0], dtype=np.uint64)  # the words below `step` count within one step's stream
    raw = np.random.Philox(key=key, counter=counter).random_raw(batch_size)
    return (raw % np.uint64(positions)).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and verifying a prepared folder


def _read_meta(folder: Path) -> tuple[dict, Vocabulary]:
    path = folder / "meta.json"
    try:
        meta = read_json(path)
        for problem in mismatches(meta, META):
            raise DataError(problem)
        if meta["format_version"] != FORMAT_VERSION:
            raise DataError(f"format_version is {meta['format_version']}, expected {FORMAT_VERSION}")
        return meta, Vocabulary.from_dict(meta)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{_why_no_meta(folder)}; run {prepare_command(folder)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a DataError, or not JSON
        raise DataError(f"{path}: {error}; make it again with {prepare_command(folder)}") from error


def _why_no_meta(folder: Path) -> str:
    if not os.path.isdir(folder):
        return f"{folder}: there is no such folder"
    if (folder / "meta.pkl").exists():
        return f"{folder}: has nanoGPT's meta.pkl but no meta.json (pickles are never opened here)"
    if (folder / "train.bin").exists():
        return f"{folder}: train.bin without meta.json, so prepare.py was interrupted or another program wrote it"
    return f"{folder}: not prepared yet (no meta.json)"


def _read_bin(folder: Path, split: str, entry: dict, vocab_size: int) -> np.ndarray:
    """The split's tokens, mapped from disk. Raises DataError when they are not those that meta.json describes."""
    path, expected = folder / f"{split}.bin", entry["tokens"] * TOKEN.itemsize
    try:
        size = path.stat().st_size
        tokens = np.memmap(path, dtype=TOKEN, mode="r") if size == expected else None
    except OSError as error:
        problem = f"missing or unreadable ({error.strerror})"
    else:
        if tokens is None:
            problem = f"cut short or too long: {size:,} bytes, meta.json expects {expected:,}"
        elif (digest := hashlib.sha256(tokens).hexdigest()) != entry["sha256"]:
            problem = f"its SHA-256 is {digest}, meta.json expects {entry['sha256']}: changed, or of another data set"
        elif tokens.max() >= vocab_size:
            problem = f"holds id {tokens.max()}, the vocabulary has {vocab_size} symbols (0 to {vocab_size - 1})"
        else:
            return tokens
    raise DataError(f"{path}: {problem}; make it again with {prepare_command(folder)}")


def _check_text(folder: Path, source: dict, vocabulary: Vocabulary, splits: Iterable[np.ndarray]) -> None:
    """Raises DataError unless the bins, decoded with the vocabulary, are the text that was prepared."""
    digest = hashlib.sha256()
    is_bytewise = vocabulary.unit == BYTE or vocabulary._codes[-1] < 128
    table = vocabulary._codes.astype(np.uint8 if is_bytewise else "<u4")
    for tokens in splits:
        for start in range(0, len(tokens), CHUNK):
            piece = table[tokens[start : start + CHUNK]].tobytes()
            digest.update(piece if is_bytewise else piece.decode("utf-32-le").encode())
    if digest.hexdigest() != source["sha256"]:
        raise DataError(
            f"{folder / 'meta.json'}: its vocabulary and the bins make a text with SHA-256 {digest.hexdigest()}, its "
            f"source has {source['sha256']}: one of them was changed; make them again with {prepare_command(folder)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Finding data sets


def find_dataset(dataset: str) -> Path:
    """The folder of a config's `dataset`: a name in data/, or (with a separator in it) the path of a folder.

    Raises DataError with the nearest names when there is no such folder. The folder may still be unprepared.
    """
    if os.sep in dataset or "/" in dataset:
        folder = Path(os.path.expanduser(dataset))
        if os.path.isfile(folder):
            raise DataError(f"dataset {shown(dataset)}: {_way_from_file(folder)}")
        if not os.path.isdir(folder):
            there = f"dataset {shown(dataset)}: there is no such folder"
            raise DataError(f"{there}; prepare one with {prepare_command(folder)}")
        return folder
    known = known_datasets()
    if dataset in known:
        return ROOT / "data" / dataset
    if dataset and os.path.exists(dataset):
        path = Path(os.curdir, dataset)
        way_out = _way_from_file(path) if path.is_file() else f"the folder that is here is --dataset=./{dataset}"
        raise DataError(f"dataset {shown(dataset)}: unknown under {ROOT / 'data'}; {way_out}")
    near = nearest(dataset, known)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(known)};"
    way_out = f"{hint} A path needs a '/' in it. To prepare it: {prepare_command(ROOT / 'data' / (dataset or 'mine'))}"
    raise DataError(f"dataset {shown(dataset)}: unknown under {ROOT / 'data'}; {way_out}")


def _way_from_file(path: Path) -> str:
    """What to do with a file that was taken for a data set."""
    if path.suffix in (".bin", ".json"):
        return f"a file; the data set is its folder: --dataset={shlex.quote(os.path.join(path.parent, ''))}"
    use = f"--dataset={shlex.quote(path.stem)}"
    return f"a file; prepare it: {own_text_command([str(path)], path.stem)} and then use {use}"


def is_prepared(folder: Path) -> bool:
    """Whether the bins that training reads are there; Dataset.open checks them."""
    return all((folder / name).exists() for name in ("train.bin", "val.bin"))


def known_datasets() -> list[str]:
    """The folders in data/ that can be prepared, or are."""
    files = ("prepare.py", "train.bin", "meta.json")
    return sorted({path.parent.name for name in files for path in (ROOT / "data").glob(f"*/{name}")})


def prepare_command(folder: Path) -> str:
    """The shell command that prepares `folder`, as it can be typed in the working directory.

    It runs the folder's prepare.py, or that of the text of which it holds a copy or a part, or else data/prepare.py.
    """
    folder = Path(os.path.abspath(folder))
    if os.path.isfile(folder / "prepare.py"):
        return shlex.join(["python", here(folder / "prepare.py")])
    meta = meta_of(folder) or {}
    name = meta.get("name", folder.name)
    base = re.sub("(-head-|_head$).*", "", name)
    if base in {path.parent.name for path in (ROOT / "data").glob("*/prepare.py")}:
        part = [] if base == name else ["--source", "FILE", "--allow-partial"]
        return shlex.join(["python", here(ROOT / "data" / base / "prepare.py"), *part, "--out", here(folder)])
    again = meta.get("again")
    is_usable = isinstance(again, list) and again and all(map(FITS[LINE], again))
    name = folder.name if folder.parent == ROOT / "data" else str(folder)
    return own_text_command(again if is_usable else ["TEXT"], name)


def own_text_command(arguments: list[str], name: str) -> str:
    """The shell command that prepares a text of one's own as the data set of this name."""
    return shlex.join(["python", here(ROOT / "data" / "prepare.py"), *arguments, f"--name={name}"])


def own_text_arguments(source: str, unit: str, splits: Mapping[str, int]) -> list[str]:
    """The words of `own_text_command` that make a data set again, from any working directory."""
    is_address = source.lower().startswith(("http://", "https://"))
    text = source if is_address else os.path.abspath(os.path.expanduser(source))
    return [text, f"--unit={unit}", f"--splits={','.join(map(str, splits.values()))}"]


def here(path: Path) -> str:
    """A path as it can be typed in the working directory: relative for the files of the project."""
    return os.path.relpath(path) if path.is_relative_to(ROOT) else str(path)


def meta_of(folder: Path) -> dict | None:
    """The meta.json of a prepared folder; None where there is none or it cannot be used."""
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError):
        return None
    return None if list(mismatches(meta, META)) else meta
