"""Statistics of a few seeds: Student's t intervals, the pooled SD, crossings, the power of a planned test. No torch."""

import bisect
import functools
import math
import statistics
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
GOOD_POWER = 0.8
MOST_SEEDS = 1000  # where a search for enough seeds ends


class Effect(NamedTuple):
    """A mean with its interval. low and high are None where one value gives no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int  # values: one a seed
    sd: float | None  # that the interval rests on; None for one value


def interval_of_mean(values: list[float], confidence: float = CONFIDENCE, least_sd: float = 0.0) -> Effect:
    """The t interval of a mean. Equal values are their own interval. least_sd: a smaller sample SD counts as this."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Effect(mean, None, None, n, None)
    sd = statistics.stdev(values)
    sd = max(sd, least_sd) if sd else sd
    half = t_quantile(n, confidence) * sd / math.sqrt(n)
    return Effect(mean, mean - half, mean + half, n, sd)


@functools.cache
def t_quantile(n: int, confidence: float) -> float:
    """Half the width of Student's interval of n values, in standard errors."""
    return float(stats.t.ppf((1 + confidence) / 2, n - 1))


def pooled_sd(groups: list[list[float]]) -> float | None:
    """The SD of several small groups together, or None where Bartlett's test finds their SDs unlike (p < 0.05).

    Groups of one value or of equal values (counts) say nothing of a spread and are passed over.
    """
    groups = [group for group in groups if len(group) > 1 and statistics.stdev(group) > 0]
    if len(groups) < 2 or stats.bartlett(*groups).pvalue < 0.05:
        return None
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


class Crossing(NamedTuple):
    """Where the mean of several curves is 0, with its interval."""

    place: float
    low: float | None  # None where one curve gives no interval; infinite where the first place is not excluded
    high: float | None
    n: int  # curves: one a seed


def crossing_of_mean(places: list[float], curves: list[list[float]]) -> Crossing | None:
    """Where the mean of the seeds' curves is 0, or None where it does not cross 0 exactly once.

    places: at least two, rising; curves: of each seed, its values there, joined by straight lines. The interval reaches
    from the first to the last place where Student's interval of the seeds' mean holds 0 (Fieller 1954, of a ratio). It
    has its confidence however few the seeds, for at the true crossing their values have the mean 0. A t interval of the
    seeds' own crossings has not: a seed with a flat curve crosses 0 anywhere or nowhere. No one line is laid through
    all places, since overfitting bends it, and nothing is told beyond the first and the last.
    """
    values = np.array(curves, dtype=float)
    n, means = len(values), values.mean(axis=0)
    within = [i for i, (one, other) in enumerate(pairwise(means)) if one * other < 0 or (other == 0 and one != 0)]
    if len(within) != 1 or means[0] * means[-1] >= 0:
        return None

    def place_at(i, share):
        return float(places[i] + share * (places[i + 1] - places[i]))

    (i,) = within
    place = place_at(i, means[i] / (means[i] - means[i + 1]))
    if n < 2:
        return Crossing(place, None, None, n)
    ends, scale = [place], t_quantile(n, CONFIDENCE) ** 2 / n
    for i in range(len(places) - 1):  # mean² = t² variance / n is quadratic in the share of the way to the next place
        start, way = values[:, i], values[:, i + 1] - values[:, i]
        (of_start, of_both), (_, of_way) = np.cov(start, way)
        a, b, c = way.mean(), start.mean(), scale
        roots = np.roots([a * a - c * of_way, 2 * (a * b - c * of_both), b * b - c * of_start])
        ends += [place_at(i, root.real) for root in roots if abs(root.imag) < 1e-12 and 0 <= root.real <= 1]
    is_open = means**2 < scale * values.var(axis=0, ddof=1)
    return Crossing(place, -math.inf if is_open[0] else min(ends), math.inf if is_open[-1] else max(ends), n)


@functools.cache
def power(true: float, sd: float, n: int, holds: tuple[float, float], confidence: float = CONFIDENCE) -> float:
    """The probability that the t interval of n values, Normal(true, sd), lies within the bounds `holds`.

    A finite and an infinite bound make a one-sided claim, two finite ones a test of equivalence. The mean and the
    sample SD of n values are independent: the mean's part is exact, the SD's is averaged over its distribution.
    """
    if sd == 0:
        return float(holds[0] < true < holds[1])
    steps = 400
    sample_sd = sd * np.sqrt(stats.chi2.ppf((np.arange(steps) + 0.5) / steps, n - 1) / (n - 1))
    half = t_quantile(n, confidence) * sample_sd / sd
    low, high = ((bound - true) * math.sqrt(n) / sd for bound in holds)
    return float(np.clip(stats.norm.cdf(high - half) - stats.norm.cdf(low + half), 0, None).mean())


@functools.cache
def seeds_needed(true: float, sd: float, holds: tuple[float, float]) -> int | None:
    """The smallest number of seeds with a power of GOOD_POWER; None where MOST_SEEDS are too few."""
    counts = range(2, MOST_SEEDS + 1)
    place = bisect.bisect_left(counts, GOOD_POWER, key=lambda n: power(true, sd, n, holds))  # power grows with n
    return counts[place] if place < len(counts) else None
