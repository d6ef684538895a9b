"""data/ngrams.py: n-gram losses against a model of dictionaries, by hand, and as a command."""

import math
from collections import Counter

import numpy as np
import pytest
from conftest import as_script

from data.ngrams import windowed_losses


def by_dictionaries(train, split, vocab_size, longest, block_size):
    """The loss from contexts of at most `longest` symbols: method C of Witten and Bell, one symbol at a time."""
    counts = Counter(
        (tuple(train[i:j]), train[j]) for j in range(len(train)) for i in range(max(0, j - longest), j + 1)
    )

    def probability(context, symbol):
        of_context = [counts[context, other] for other in range(vocab_size)]
        shorter = probability(context[1:], symbol) if context else 1 / vocab_size
        different = sum(count > 0 for count in of_context)
        if not different:
            return shorter
        return (of_context[symbol] + different * shorter) / (sum(of_context) + different)

    nats = []
    for i in range(1, len(split)):
        start = (i - 1) // block_size * block_size  # of its window
        nats.append(-math.log(probability(tuple(split[max(start, i - longest) : i]), split[i])))
    return float(np.mean(nats))


@pytest.mark.parametrize("vocab_size, block_size", [(2, 100), (3, 7), (5, 1), (9, 4)])
def test_losses_equal_those_of_dictionaries(vocab_size, block_size):
    generator = np.random.default_rng(vocab_size)
    train, split = (generator.integers(0, generator.integers(1, vocab_size, n, endpoint=True)) for n in (300, 40))
    losses = windowed_losses(train, split, vocab_size, 3, block_size)
    expected = [by_dictionaries(train.tolist(), split.tolist(), vocab_size, n, block_size) for n in range(4)]
    assert losses == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_all_symbols_sum_to_1():
    train = np.random.default_rng(0).integers(0, 6, 200)
    for context in range(7):  # 6 never occurs
        nats = [windowed_losses(train, np.array([context, symbol]), 7, 1, 64)[-1] for symbol in range(7)]
        assert sum(math.exp(-loss) for loss in nats) == pytest.approx(1)


def test_a_cycle_is_learned_and_contexts_longer_than_a_text_change_nothing():
    cycle = np.arange(1000) % 4
    empty, *_, longest = windowed_losses(cycle, cycle, 4, 2, 1000)
    assert empty == pytest.approx(math.log(4), abs=1e-3) and longest < 0.02
    assert len(windowed_losses(cycle[:3], cycle, 4, 9, 64)) == 3
    assert len(set(windowed_losses(cycle, cycle[:3], 4, 9, 64)[2:])) == 1


def test_the_command_prints_a_row_for_each_context(words, monkeypatch, capsys):
    assert as_script(monkeypatch, f"--dataset={words}", "--longest=2", script="data/ngrams.py") == 0
    first, heads, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("words: ") and "characters counted" in first and heads.split()[2:] == ["val", "test"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert float(rows[2].split()[1]) < float(rows[1].split()[1]) < float(rows[0].split()[1])


def test_contexts_that_cannot_be_numbered_are_refused(words, monkeypatch, capsys):
    assert as_script(monkeypatch, f"--dataset={words}", "--longest=40", script="data/ngrams.py") == 2
    assert "--longest=40" in capsys.readouterr().err
