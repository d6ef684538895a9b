"""How well counting alone predicts a text: a yardstick for models that learn.

    python data/ngrams.py --dataset=shakespeare_char
    python data/ngrams.py --dataset=shakespeare_char --longest=7 --block_size=256 --train_characters=30000

An n-gram model counts which symbols follow each context of up to `longest` symbols in the training split. Its
probabilities are interpolated as Witten and Bell do (1991, "The zero-frequency problem", method C): a context that was
seen n times, before d different symbols, trusts its own counts with n / (n + d) and the next shorter context with the
rest. Below the empty context all V symbols are alike.

The loss is that of full validation: every symbol of a split but its first is predicted once, from the symbols before it
in its own window of block_size. Nothing is drawn at random, and the result is the same on every machine.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # first, so that `data` is ours

from data.common import DataError, Dataset, find_dataset  # noqa: E402
from support import configurator, console  # noqa: E402
from support.options import ConfigError, option  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Keys on the command line."""

    dataset: str = option("shakespeare_char", "a prepared data set, as for train.py")
    longest: int = option(6, "symbols of the longest context", at_least=0)
    block_size: int = option(64, "symbols of a window; no context reaches out of it", at_least=1)
    train_characters: int = option(0, "count only the first of the training split; 0: all", at_least=0)


def windowed_losses(train_N, split_M, vocab_size, longest, block_size):
    """Nats per symbol of a split, from contexts of at most 0, 1, …, `longest` symbols (as many as train has): a list.

    train_N, split_M: ids below vocab_size, (N,) and (M,), M >= 2; vocab_size ** (longest + 1) <= 2 ** 63.
    """
    targets_M = np.arange(1, len(split_M))
    available_M = (targets_M - 1) % block_size + 1  # symbols before each in its window
    probability_M = np.full(len(targets_M), 1 / vocab_size)
    losses = []
    for length in range(min(longest, len(train_N) - 1) + 1):
        at = np.flatnonzero(available_M >= length)
        seen_M = ngrams(split_M, length + 1, vocab_size)[targets_M[at] - length]
        grams, counts = np.unique(ngrams(train_N, length + 1, vocab_size), return_counts=True)
        contexts, starts, followers = np.unique(grams // vocab_size, return_index=True, return_counts=True)
        n = looked_up(contexts, np.add.reduceat(counts, starts), seen_M // vocab_size)
        d = looked_up(contexts, followers, seen_M // vocab_size)
        known = n > 0
        own = looked_up(grams, counts, seen_M) + d * probability_M[at]
        probability_M[at[known]] = own[known] / (n + d)[known]
        losses.append(-float(np.log(probability_M).mean()))
    return losses


def ngrams(ids_N, length, vocab_size):
    """A number for each run of `length` symbols, (N - length + 1,) int64: its digits in base vocab_size are the ids."""
    count = max(0, len(ids_N) - length + 1)
    codes_N = np.zeros(count, dtype=np.int64)
    for i in range(length):
        codes_N = codes_N * vocab_size + ids_N[i : i + count]
    return codes_N


def looked_up(keys, values, wanted_M):
    """The value of each wanted key, 0 where there is none. keys: sorted."""
    at_M = np.searchsorted(keys, wanted_M).clip(max=len(keys) - 1)
    return np.where(keys[at_M] == wanted_M, values[at_M], 0)


def main(argv):
    options = configurator.parse(
        Options, argv, usage="python data/ngrams.py [--key=value …]", description=__doc__.splitlines()[0]
    )
    dataset = Dataset.open(find_dataset(options.dataset)).train_on_first(options.train_characters)
    size, unit = dataset.vocabulary.size, dataset.unit
    most = int(63 / math.log2(max(size, 2))) - 1
    if options.longest > most:
        raise ConfigError([f"--longest={options.longest}: expected at most {most} for {size} symbols, in 64 bits"])
    if short := [split for split, count in dataset.sizes.items() if count < 2]:
        raise DataError(f"the {short[0]} split of {dataset.name} has one {unit}: nothing to predict")
    train_N = dataset.tokens("train")
    losses = {
        split: windowed_losses(train_N, dataset.tokens(split), size, options.longest, options.block_size)
        for split in dataset.sizes
        if split != "train"
    }
    print(
        f"{dataset.name}: {len(train_N):,} {unit}s counted. Nats (bits) per {unit}, in windows of {options.block_size}"
    )
    print("longest context" + "".join(f"{split:>18}" for split in losses))
    for length, row in enumerate(zip(*losses.values())):
        print(f"{length:>15}" + "".join(f"{f'{nats:.4f} ({nats / math.log(2):.4f})':>18}" for nats in row))
    return 0


if __name__ == "__main__":
    console.run(main)
