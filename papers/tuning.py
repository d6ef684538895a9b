"""Chooses the best of a row's candidates, such as learning rates, and says which runs that needs.

The first candidates are run with the first seed; further ones are in reserve and follow, one by one, while the last
that was tried is the best. The two best also run with the other seeds of CHOOSING, and the better of these two is the
row's choice. Its loss is reported on seeds from FIRST_FRESH on, which chose nothing: the lowest of several noisy losses
is optimistic on the seeds that it was chosen by.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

CHOOSING = (1337, 1338, 1339)
FIRST_FRESH = 1340
FINALISTS = 2

LEARNING_RATE = 1e-3  # of the papers' protocol; its cosine ends at a tenth of the peak rate, and so do all of these
Multiples = Mapping[str, tuple[int, ...]]  # scale -> multiples of the papers' rate
MULTIPLES: Multiples = {"cpu": (1, 2, 4, 8), "paper": (1, 2, 4)}
RESERVE: Multiples = {"cpu": (16, 32), "paper": (8, 16)}  # tried one by one while the highest rate is the best
ALL_MULTIPLES = sorted({multiple for of in (MULTIPLES, RESERVE) for at in of.values() for multiple in at})

Losses = Mapping[str, Mapping[int, float]]  # name of a candidate -> {seed: best full validation, nats}, in their order


class Choice(NamedTuple):
    """What the records of a row's candidates say."""

    losses: Losses  # on the seeds of CHOOSING
    name: str | None  # of the chosen candidate; None until the finalists have all seeds

    @property
    def is_at_edge(self) -> bool:
        """Whether the choice is the first or the last that was tried, so that a better one may lie beyond."""
        tried = [name for name, of in self.losses.items() if of]
        return self.name in (tried[0], tried[-1])


def name_at_rate(row: str, multiple: int) -> str:
    """The name of a row's candidate at a multiple of the papers' learning rate."""
    return row if multiple == 1 else f"{row}_rate{multiple}"


def choose(losses: Losses, reserve: int = 0) -> Choice:
    """The finalist with the lowest mean loss. losses: in the candidates' order; a candidate without runs has none.

    reserve: how many of the last candidates are not among the first.
    """
    losses = {name: {seed: of[seed] for seed in CHOOSING if seed in of} for name, of in losses.items()}
    means = {name: statistics.fmean(losses[name].values()) for name in finalists(losses, reserve)}
    is_complete = means and all(len(losses[name]) == len(CHOOSING) for name in means)
    return Choice(losses, min(means, key=means.get) if is_complete else None)


def first_losses(losses: Losses, reserve: int) -> dict[str, float | None]:
    """The losses on the first seed of all candidates to be tried; None where one has not run."""
    first = {name: of.get(CHOOSING[0]) for name, of in losses.items()}
    names = [*first]
    tried = names[: len(names) - reserve]
    for following in names[len(tried) :]:
        if any(first[name] is None for name in tried) or min(tried, key=first.get) != tried[-1]:
            break
        tried.append(following)
    return {name: first[name] for name in tried}


def finalists(losses: Losses, reserve: int = 0) -> list[str]:
    """The best candidates on the first seed; none until all that are to be tried have it."""
    first = first_losses(losses, reserve)
    return [] if None in first.values() else sorted(first, key=first.get)[:FINALISTS]


def asked(losses: Losses, reserve: int, fresh_seeds: int) -> Iterator[tuple[str, int]]:
    """(candidate, seed) of every run that is asked for, as far as the losses tell."""
    yield from ((name, CHOOSING[0]) for name in first_losses(losses, reserve))
    yield from ((name, seed) for name in finalists(losses, reserve) for seed in CHOOSING[1:])
    if chosen := choose(losses, reserve).name:
        yield from ((chosen, FIRST_FRESH + number) for number in range(fresh_seeds))
