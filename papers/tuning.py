"""Chooses the best of a row's candidates, such as learning rates, and says which runs would tell.

Every candidate is run with the first seed, and the two best also with the other seeds of CHOOSING. The better of these
two is the row's choice. It is told on seeds from FIRST_FRESH on, which chose nothing: the lowest of several noisy
losses is optimistic on the seeds that it was chosen by.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

CHOOSING = (1337, 1338, 1339)
FIRST_FRESH = 1340
FINALISTS = 2

Losses = Mapping[str, Mapping[int, float]]  # name of a candidate -> {seed: best full validation, nats}, in their order


class Choice(NamedTuple):
    """What the records of a row's candidates say."""

    losses: Losses  # on the seeds of CHOOSING
    name: str | None  # of the chosen candidate; None until the finalists have all seeds

    @property
    def is_at_edge(self) -> bool:
        """Whether the choice is the first or the last candidate, so that a better one may lie beyond."""
        return self.name in (next(iter(self.losses)), next(reversed(self.losses)))


def name_at_rate(row: str, multiple: int) -> str:
    """The name of a row's candidate at a multiple of the papers' learning rate."""
    return row if multiple == 1 else f"{row}_rate{multiple}"


def choose(losses: Losses) -> Choice:
    """The finalist with the lowest mean loss. losses: in the candidates' order; a candidate without runs has none."""
    losses = {name: {seed: of[seed] for seed in CHOOSING if seed in of} for name, of in losses.items()}
    means = {name: statistics.fmean(losses[name].values()) for name in finalists(losses)}
    is_complete = means and all(len(losses[name]) == len(CHOOSING) for name in means)
    return Choice(losses, min(means, key=means.get) if is_complete else None)


def finalists(losses: Losses) -> list[str]:
    """The best candidates on the first seed; none until all have it."""
    first = {name: of.get(CHOOSING[0]) for name, of in losses.items()}
    return [] if None in first.values() else sorted(first, key=first.get)[:FINALISTS]


def asked(losses: Losses, fresh_seeds: int) -> Iterator[tuple[str, int]]:
    """(candidate, seed) of every run that is asked for, as far as the losses tell."""
    yield from ((name, CHOOSING[0]) for name in losses)
    yield from ((name, seed) for name in finalists(losses) for seed in CHOOSING[1:])
    if chosen := choose(losses).name:
        yield from ((chosen, FIRST_FRESH + number) for number in range(fresh_seeds))
