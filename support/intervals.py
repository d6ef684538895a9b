"""Student's t intervals: of a mean, and of the difference of two means. Needs no torch."""

import math
import statistics
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class Effect(NamedTuple):
    """low and high are None where a single seed gives no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int  # seeds of the row
    n_against: int | None  # seeds of the row it is compared with; None for a row's own value, and for n pairs


def interval_of_mean(values: list[float]) -> Effect:
    """The t interval of a mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Effect(mean, None, None, len(values), None)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Effect(mean, mean - half, mean + half, len(values), None)


def interval_of_difference(ours: list[float], theirs: list[float]) -> Effect:
    """Welch's t interval of the difference of two means (Welch 1947)."""
    mean, n, n_against = statistics.fmean(ours) - statistics.fmean(theirs), len(ours), len(theirs)
    if min(n, n_against) < 2:
        return Effect(mean, None, None, n, n_against)
    a, b = statistics.variance(ours) / n, statistics.variance(theirs) / n_against
    if a + b == 0:  # a count, the same in every run
        return Effect(mean, mean, mean, n, n_against)
    degrees = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (n_against - 1))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * math.sqrt(a + b)
    return Effect(mean, mean - half, mean + half, n, n_against)
