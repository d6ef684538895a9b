"""Statistics of a few seeds: Student's t intervals, the pooled SD, and the power of a planned test. Needs no torch."""

import bisect
import functools
import math
import statistics
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


def pooled_sd(groups: list[list[float]], unlike: float = 0.05) -> float | None:
    """The SD of several small groups together, or None where Bartlett's test finds their SDs unlike (p < `unlike`).

    Groups of one value or of equal values (counts) say nothing of a spread and are passed over.
    """
    groups = [group for group in groups if len(group) > 1 and statistics.stdev(group) > 0]
    if len(groups) < 2 or stats.bartlett(*groups).pvalue < unlike:
        return None
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


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
