"""Where the difference of two models is 0: by hand, by Student's intervals, by simulation, and as it is told."""

import math

import numpy as np
import pytest
from test_figures import by_size

from papers import CLAIMS
from report import verdicts, wording
from report.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from support.intervals import Crossing, crossing_of_mean, interval_of_mean

CLAIM = next(claim for claim in CLAIMS if claim.id == "E12")
PLACES = [0.0, 1.0, 3.0]


def test_the_crossing_of_the_mean_by_hand():
    assert crossing_of_mean(PLACES, [[2.0, 1.0, -3.0]]) == Crossing(1.5, None, None, 1)
    assert crossing_of_mean(PLACES, [[2.0, 1.0, -3.0]] * 2) == Crossing(1.5, 1.5, 1.5, 2)
    assert crossing_of_mean(PLACES, [[-1.0, 0.0, 3.0]]).place == 1.0  # at a place, and rising
    for none in ([2.0, 1.0, 3.0], [2.0, -1.0, 3.0], [2.0, 0.0, 3.0], [0.0, 0.0, 0.0]):
        assert crossing_of_mean(PLACES, [none]) is None


def test_the_interval_ends_where_students_interval_of_the_mean_touches_0():
    """The middle curve crosses 0 far from the others, and the interval reaches over two segments."""
    curves = [[2.0, 0.3, -3.0], [1.8, -0.4, -2.5], [2.1, 0.1, -3.2]]
    found = crossing_of_mean(PLACES, curves)
    for place, edge in ((found.low, "low"), (found.high, "high")):
        there = interval_of_mean([float(np.interp(place, PLACES, curve)) for curve in curves])
        assert getattr(there, edge) == pytest.approx(0, abs=1e-12)
    assert found.low < 1.0 < found.high and found.low < found.place < found.high


def test_an_interval_is_open_where_even_the_first_place_can_be_the_crossing():
    found = crossing_of_mean(PLACES, [[0.1, -1.0, -3.0], [-0.05, -1.1, -2.9], [0.2, -0.9, -3.0]])
    assert found.low == -math.inf and 0 < found.high < 1


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize(
    "truth", [[0.06, 0.02, -0.03, -0.05], [0.015, 0.008, -0.004, -0.008], [0.004, -0.01, -0.03, -0.03]]
)
def test_the_interval_covers_the_true_crossing(n, truth):
    """Also where it lies near an end, for two seeds, and for seeds that differ in height and in slope."""
    generator, truth = np.random.default_rng(n), np.array(truth)
    places = np.log([500_000, 1_000_000, 2_500_000, 6_100_000])
    true = crossing_of_mean([*places], [truth]).place
    told = covered = 0
    for _ in range(600):
        height, slope = generator.normal(0, 0.01, (n, 1)), generator.normal(0, 0.005, (n, 1))
        curves = truth + height + slope * (places - places.mean()) + generator.normal(0, 0.01, (n, 4))
        found = crossing_of_mean([*places], curves)
        told += found is not None
        covered += found is not None and found.low <= true <= found.high
    assert told > 300 and covered / told > 0.93


def verdict(differences, **keys):
    return verdicts.decide(CLAIM, by_size(differences, **keys))


def test_experts_that_lose_on_few_characters_and_win_on_many_cross_0():
    held = verdict({"_30k": (0.04, 0.05, 0.06), "_100k": (0.01, 0.02, 0.03), "": (-0.06, -0.05, -0.04)})
    assert held.status == HELD and "difference 0 at 193,000 [" in wording.deciding_text(held)
    assert "30,000 characters, dense" in wording.detail_lines(held)[1]
    pays_at_once = verdict({"_30k": (-0.04, -0.05, -0.06), "": (-0.06, -0.05, -0.04)})
    assert pays_at_once.status == NOT_HELD
    told = wording.deciding_text(pays_at_once)
    assert told.endswith("no single crossing of 0 from 30,000 to 1,003,854 unique characters")


def test_seeds_that_one_size_lacks_do_not_count_and_one_seed_has_no_interval():
    some = by_size({"_30k": (0.04, 0.05, 0.06), "": (-0.06, -0.05, -0.04)})
    some.cells["shakespeare_30k_moe4_rate4"].pop()
    assert verdicts.crossing_of(verdicts.differences_by_size(some, "clean", "shakespeare_moe4")).n == 2
    one = verdict({"_30k": (0.05,), "": (-0.05,)}, seeds=(7,))
    assert one.status == UNDECIDED and "difference 0 at 174,000 unique characters, n = 1" in wording.deciding_text(one)


def test_open_ends_are_told_as_the_sizes_that_were_run():
    told = wording.deciding_text(verdict({"_30k": (0.1, -0.05, 0.01), "": (-0.1, 0.05, -0.02)}))
    assert "[≤30,000, ≥1,003,854] unique characters, n = 3" in told


def test_nothing_is_told_where_nothing_was_run():
    nothing = verdict({"": (-0.05, -0.04, -0.06)})
    assert nothing.status == NOT_RUN and "crossing" not in wording.deciding_text(nothing)
