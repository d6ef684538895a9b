"""Effects, intervals and what they say of a claim, by hand and against scipy."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

import papers
from papers.ours import SOURCE
from papers.table import ABOVE_0, ABOVE_1, BELOW_0, BELOW_1, Claim, Comparison, Row, Table
from report import verdicts, wording
from report.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from support import intervals
from support.intervals import Effect

TABLE = Table(
    "T", "a table", SOURCE, "", (Row("base", "base", ""), Row("new", "new", ""), Row("other", "other", "")), ()
)


def comparison(**losses):
    """losses: row -> full validation losses, one per seed; sampled validation is 0.1 below them."""

    def record(seed, nats):
        return {
            "config": {"seed": seed},
            "exclusive": True,
            "clean": {"best": {"nats": nats}},
            "paper": {"best_val": nats - 0.1 * (-1) ** (seed == 99)},
        }

    cells = {row.name: [record(seed, nats) for seed, nats in enumerate(losses.get(row.name, []))] for row in TABLE.rows}
    return Comparison(TABLE, "cpu", "a machine", cells, {row.name: [] for row in TABLE.rows})


def claim(holds, is_ratio=False, pairs=(("new", "base"),), measures=("clean",)):
    return Claim(
        id="X1",
        sentence="A sentence.",
        table="T",
        pairs=pairs,
        measures=measures,
        is_ratio=is_ratio,
        holds=holds,
    )


@pytest.mark.parametrize("n, n_against", [(2, 2), (3, 3), (5, 3)])
def test_the_interval_of_a_difference_is_welchs(n, n_against):
    generator = np.random.default_rng(n)
    ours, theirs = generator.normal(1, 0.1, n).tolist(), generator.normal(1.2, 0.5, n_against).tolist()
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    effect = intervals.interval_of_difference(ours, theirs)
    assert effect.mean == pytest.approx(statistics.mean(ours) - statistics.mean(theirs))
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))
    assert (effect.n, effect.n_against) == (n, n_against)


def test_the_interval_of_a_mean_is_students():
    values = [1.0, 1.5, 1.2]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    effect = intervals.interval_of_mean(values)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = (generator.normal([[0.0], [1.0]], 0.3, (2, 3)).tolist() for _ in range(2000))
    effects = [intervals.interval_of_difference(*draw) for draw in draws]
    assert 0.93 < sum(effect.low < -1 < effect.high for effect in effects) / len(effects) < 0.98


def test_one_seed_gives_no_interval_and_no_verdict():
    for effect in (intervals.interval_of_mean([1.0]), intervals.interval_of_difference([1.0], [2.0, 3.0])):
        assert effect.low is None and effect.high is None
        assert verdicts.status_of(effect, BELOW_0) == UNDECIDED


def test_a_count_that_never_varies_is_its_own_interval():
    effect = intervals.interval_of_difference([3.0, 3.0], [3.0, 3.0])
    assert (effect.mean, effect.low, effect.high) == (0, 0, 0)
    assert verdicts.status_of(effect, ABOVE_0) == NOT_HELD  # equal is not more


@pytest.mark.parametrize(
    "low, high, holds, status",
    [
        (0.1, 0.2, ABOVE_0, HELD),
        (-0.1, 0.2, ABOVE_0, UNDECIDED),
        (-0.2, -0.1, ABOVE_0, NOT_HELD),
        (-0.2, -0.1, BELOW_0, HELD),
        (-0.01, 0.01, (-0.02, 0.02), HELD),
        (-0.01, 0.03, (-0.02, 0.02), UNDECIDED),
        (-0.3, 0.3, (-0.02, 0.02), UNDECIDED),
        (0.021, 0.03, (-0.02, 0.02), NOT_HELD),
        (0.6, 0.7, BELOW_1, HELD),
        (0.6, 1.7, ABOVE_1, UNDECIDED),
    ],
)
def test_a_claim_holds_where_the_whole_interval_lies_within_its_bounds(low, high, holds, status):
    assert verdicts.status_of(Effect((low + high) / 2, low, high, 3, 3), holds) == status


def test_a_claim_about_several_rows_needs_all_and_fails_by_one():
    several = claim(ABOVE_0, pairs=(("new", "base"), ("other", "base")))
    base, more, less, vague = [1.0, 1.01, 1.02], [2.0, 2.01, 2.02], [0.5, 0.51, 0.52], [0.0, 1.0, 2.3]
    for new, other, status in (
        (more, more, HELD),
        (more, vague, UNDECIDED),
        (more, [], NOT_RUN),
        (less, [], NOT_HELD),
        (less, vague, NOT_HELD),
        ([], [], NOT_RUN),
    ):
        assert verdicts.decide(several, comparison(base=base, new=new, other=other)).status == status


def test_measures_from_batches_that_a_seed_shares_are_paired_over_common_seeds():
    """Noise that all rows of a seed share cancels; a seed that one row lacks does not count."""
    noise = [0.0, 0.3, -0.2, 5.0]
    cells = comparison(base=[1.0 + z for z in noise], new=[1.1 + z for z in noise[:3]])
    for record in cells.cells["new"]:
        record["paper"]["best_val"] += 0.01 * record["config"]["seed"]
    effect = verdicts.effect_of(cells, "paper", "new", "base", "difference")
    expected = intervals.interval_of_mean([0.1, 0.11, 0.12])
    assert effect[:4] == pytest.approx(expected[:4]) and effect.n == 3
    welch = verdicts.effect_of(cells, "clean", "new", "base", "difference")
    assert welch.high - welch.low > 5 * (effect.high - effect.low) and welch.n_against == 4


def test_ratios_are_of_geometric_means():
    effect = verdicts.effect_of(comparison(base=[1.0, 4.0], new=[2.0, 8.0]), "clean", "new", "base", "ratio")
    logs = intervals.interval_of_difference([math.log(2), math.log(8)], [0.0, math.log(4)])
    assert effect.mean == pytest.approx(2) and effect.low == pytest.approx(math.exp(logs.low))
    assert verdicts.effect_of(comparison(base=[0.0, 1.0], new=[1.0, 1.0]), "clean", "new", "base", "ratio") is None


def test_a_measure_that_says_something_else_is_told():
    cells = comparison(base=[1.0, 1.01, 1.02], new=[1.05, 1.06, 1.07])
    for record in cells.cells["new"]:
        record["paper"]["best_val"] -= 1
    verdict = verdicts.decide(claim(ABOVE_0, measures=("clean", "paper")), cells)
    assert verdict.status == HELD and verdict.dissent == {"paper": NOT_HELD}
    assert verdict.is_provisional and verdict.seeds == 3


def test_a_verdict_that_lacks_rows_has_no_seeds_and_is_not_provisional():
    verdict = verdicts.decide(claim(ABOVE_0), comparison(base=[1.0, 2.0]))
    assert verdict.status == NOT_RUN and verdict.seeds == 0 and not verdict.is_provisional


def test_effects_and_rules_are_told_in_words():
    assert wording.effect_text(Effect(0.01234, 0.001, 0.02, 3, 3), "clean", "difference") == (
        "+0.0123 [+0.0010, +0.0200] nats, n = 3"
    )
    assert wording.effect_text(Effect(1.5, None, None, 1, 2), "train_seconds", "ratio") == (
        "1.500, n = 1 and 2 (no interval from one seed)"
    )
    assert wording.effect_text(None, "clean", "difference") == NOT_RUN
    for one in papers.CLAIMS:
        sentence = wording.rule_text(one)
        assert sentence.startswith("Holds where ") and sentence.endswith(".") and "inf" not in sentence
