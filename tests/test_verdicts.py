"""Effects, intervals and what they say of a claim: by hand, against scipy, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

import papers
from papers.ours import SOURCE
from papers.table import (
    ABOVE_0,
    ABOVE_1,
    BELOW_0,
    BELOW_1,
    SEEDS_FOR_A_VERDICT,
    Claim,
    Comparison,
    Reading,
    Row,
    Table,
    each_against,
)
from report import verdicts, wording
from report.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from support import intervals
from support.intervals import Effect, interval_of_mean

NEW = ("new", "other", "third", "fourth", "fifth", "sixth")
TABLE = Table(
    "T",
    "a table",
    SOURCE,
    "",
    (Row("base", "base"), *(Row(name, name, baseline="base") for name in NEW)),
    (),
)


def comparison(elsewhere=(), **losses):
    """losses: row -> full validation losses, one per seed or {seed: loss}; sampled validation is 0.1 below them."""

    def record(seed, nats):
        return {
            "config": {"seed": seed},
            "dataset": {"sha256": "a", "canonical": True},
            "leaky": False,
            "exclusive": True,
            "machine": {},
            "clean": {"best": {"nats": nats}},
            "paper": {"best_val": nats - 0.1},
            "seconds": {"train": nats},
        }

    cells = {}
    for row in TABLE.rows:
        of_row = losses.get(row.name, [])
        of_row = of_row if isinstance(of_row, dict) else dict(enumerate(of_row))
        cells[row.name] = [record(seed, nats) for seed, nats in of_row.items()]
    return Comparison(TABLE, "cpu", "a machine", cells, {row.name: [] for row in TABLE.rows}, frozenset(elsewhere))


def claim(holds, pairs=(("new", "base"),), measures=("clean",), **more):
    return Claim(id="X1", sentence="A sentence.", table="T", pairs=pairs, measures=measures, holds=holds, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_the_interval_of_a_mean_is_students():
    values = [1.0, 1.5, 1.2]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    effect = interval_of_mean(values)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))
    assert interval_of_mean([1.0]) == Effect(1.0, None, None, 1, None)


def test_a_small_sd_does_not_narrow_an_interval():
    wide = interval_of_mean([1.0, 1.5, 1.2], least_sd=0.5)
    assert wide.sd == 0.5 and wide.high - wide.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * 0.5 / math.sqrt(3))
    assert interval_of_mean([1.0, 1.5, 1.2], least_sd=0.01) == interval_of_mean([1.0, 1.5, 1.2])


def test_sds_are_pooled_only_where_they_are_alike():
    alike = [[0.0, 0.1, 0.2], [1.0, 1.3, 1.4], [5.0, 5.0, 5.0], [7.0]]  # the last two say nothing of a spread
    assert intervals.pooled_sd(alike) == pytest.approx(math.sqrt((0.01 + 0.13 / 3) / 2))
    assert intervals.pooled_sd([[0.0, 0.001, 0.002], [1.0, 2.0, 4.0]]) is None
    assert intervals.pooled_sd([[0.0, 0.1, 0.2]]) is None


def test_power_is_that_of_the_noncentral_t():
    for true, sd, n in ((0.5, 0.4, 5), (-0.1, 0.3, 3), (0.01, 0.01, 20)):
        expected = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, true / sd * math.sqrt(n))
        assert intervals.power(true, sd, n, ABOVE_0) == pytest.approx(expected, abs=2e-4)
        assert intervals.power(-true, sd, n, BELOW_0) == pytest.approx(expected, abs=2e-4)
    assert intervals.power(0.0, 0.0, 5, (-1.0, 1.0)) == 1 and intervals.power(0.0, 0.0, 5, ABOVE_0) == 0


def test_the_seeds_needed_are_those_of_the_hand_computation():
    """B's difference of 0.0021 nats, for dense models whose SD is 0.0052, needs about 96 seeds by the normal law."""
    needed = intervals.seeds_needed(-0.0021, 0.0052 * math.sqrt(2), BELOW_0)
    assert 96 <= needed <= 100
    assert intervals.power(-0.0021, 0.0052 * math.sqrt(2), needed, BELOW_0) >= 0.8
    assert intervals.power(-0.0021, 0.0052 * math.sqrt(2), needed - 1, BELOW_0) < 0.8
    assert intervals.seeds_needed(1e-6, 1.0, ABOVE_0) is None


# ---------------------------------------------------------------------------------------------------------------------
# Simulation: as often right as promised

RUNS = 1000
MARGIN = 0.02


def simulated(generator, effects, n=5, sd_seed=0.02, sd=0.01):
    """Losses of `base` and of a row for each effect, with a shared effect of the seed."""
    seeds = generator.normal(1.5, sd_seed, n)
    rows = {"base": seeds + generator.normal(0, sd, n)}
    for name, effect in zip(NEW, effects):
        rows[name] = seeds + effect + generator.normal(0, sd, n)
    return comparison(**{name: losses.tolist() for name, losses in rows.items()})


def share(generator, effects, status, a_claim, **options):
    """The share of simulated experiments in which the claim gets this status."""
    found = (verdicts.decide(a_claim, simulated(generator, effects, **options)).status for _ in range(RUNS))
    return sum(one == status for one in found) / RUNS


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_of_a_paired_effect_covers_the_truth(n):
    """At least 95% (a pooled SD only widens), and with five seeds 95%, whatever the seeds have in common."""
    generator = np.random.default_rng(n)
    effects = [
        verdicts.effect_of(simulated(generator, [0.03, 0.0], n=n), "clean", "new", "base", "difference")
        for _ in range(RUNS)
    ]
    covered = sum(effect.low < 0.03 < effect.high for effect in effects) / RUNS
    assert covered > 0.935 and (n < SEEDS_FOR_A_VERDICT or covered < 0.965)


def test_a_true_claim_about_six_rows_is_rarely_refuted():
    """At 95% a pair, six rows that all lie on the edge of a claim would refute it in more than one case of ten."""
    generator, six = np.random.default_rng(1), claim(ABOVE_0, each_against(NEW, "base"))
    assert share(generator, [0.0] * 6, NOT_HELD, six) < 0.045  # one-sided 2.5%
    assert share(generator, [0.05] * 6, HELD, six) > 0.8


def test_a_claim_about_two_rows_is_rarely_held_where_one_contradicts_it():
    generator, two = np.random.default_rng(4), claim(ABOVE_0, each_against(NEW[:2], "base"))
    assert share(generator, [0.0, 0.2], HELD, two) < 0.045


def test_rows_at_the_margin_are_rarely_called_alike_and_equal_rows_mostly():
    generator, alike = np.random.default_rng(2), claim((-MARGIN, MARGIN))
    assert share(generator, [MARGIN], HELD, alike) < 0.04  # one-sided 2.5%
    assert share(generator, [0.0], HELD, alike, sd=0.004) > 0.95


def test_the_power_that_is_told_is_the_share_of_experiments_that_decide():
    generator, sd = np.random.default_rng(3), 0.01 * math.sqrt(2)
    told = intervals.power(0.02, sd, SEEDS_FOR_A_VERDICT, ABOVE_0)
    assert share(generator, [0.02], HELD, claim(ABOVE_0)) == pytest.approx(told, abs=0.04)
    told = intervals.power(0.0, sd, SEEDS_FOR_A_VERDICT, (-MARGIN, MARGIN))
    assert share(generator, [0.0], HELD, claim((-MARGIN, MARGIN))) == pytest.approx(told, abs=0.04)


# ---------------------------------------------------------------------------------------------------------------------
# Effects


def test_effects_are_paired_over_common_seeds():
    """Noise that all rows of a seed share cancels; a seed that one row lacks is told and counts in no effect."""
    noise = [0.0, 0.3, -0.2, 5.0]
    cells = comparison(base=[1.0 + z for z in noise], new=[1.1 + 0.01 * i + z for i, z in enumerate(noise[:3])])
    effect = verdicts.effect_of(cells, "clean", "new", "base", "difference")
    expected = interval_of_mean([0.1, 0.11, 0.12])
    assert effect == pytest.approx(expected)
    verdict = verdicts.decide(claim(ABOVE_0), cells)
    assert verdict.findings["clean"][0].alone == {"base": [3]}
    assert "base alone has seed 3" in wording.detail_lines(verdict)[1]


def test_a_lucky_sd_of_three_seeds_takes_the_pooled_one():
    base = [1.0, 1.1, 0.9]
    new, other = ([b + d for b, d in zip(base, of)] for of in ([0.100, 0.101, 0.102], [0.1, 0.105, 0.1001]))
    own = interval_of_mean([0.100, 0.101, 0.102])
    effect = verdicts.effect_of(comparison(base=base, new=new, other=other), "clean", "new", "base", "difference")
    assert effect.sd > 1.5 * own.sd and effect.low < own.low
    unlike = comparison(base=base, new=new, other=[1.5, 1.1, 2.9])
    assert verdicts.effect_of(unlike, "clean", "new", "base", "difference").sd == pytest.approx(own.sd)
    five = comparison(base=base * 2, new=new + new, other=other * 2)
    assert verdicts.effect_of(five, "clean", "new", "base", "difference").sd < own.sd


def test_ratios_are_of_geometric_means():
    effect = verdicts.effect_of(comparison(base=[1.0, 4.0], new=[2.0, 12.0]), "clean", "new", "base", "ratio")
    logs = interval_of_mean([math.log(2), math.log(3)])
    assert effect.mean == pytest.approx(math.sqrt(6)) and effect.low == pytest.approx(math.exp(logs.low))


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


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
    effect = Effect((low + high) / 2, low, high, 3, 0.1)
    assert verdicts.status_of(effect, effect, holds) == status


def test_a_claim_about_several_rows_needs_all_and_fails_by_one():
    several = claim(ABOVE_0, pairs=(("new", "base"), ("other", "base")))
    base, more, less, vague = [1.0, 1.01, 1.02], [2.0, 2.01, 2.03], [0.5, 0.51, 0.53], [0.0, 1.0, 2.3]
    for new, other, status in (
        (more, more, HELD),
        (more, vague, UNDECIDED),
        (more, [], NOT_RUN),
        (less, [], NOT_HELD),
        (less, vague, NOT_HELD),
        ([], [], NOT_RUN),
    ):
        assert verdicts.decide(several, comparison(base=base, new=new, other=other)).status == status


def test_one_of_several_pairs_refutes_only_with_its_corrected_interval():
    base, new = [0.0] * 5, [-0.02, -0.07, -0.01, -0.05, -0.045]
    cells = comparison(base=[1 + b for b in base], new=[1 + d for d in new], other=[1.1, 1.12, 1.11, 1.13, 1.1])
    assert verdicts.decide(claim(ABOVE_0), cells).status == NOT_HELD
    six = claim(ABOVE_0, pairs=(("new", "base"), *[("other", "base")] * 5))
    verdict = verdicts.decide(six, cells)
    finding = verdict.findings["clean"][0]
    assert verdict.status == finding.status == UNDECIDED and finding.effect.high < 0 < finding.refuting.high
    two = verdicts.decide(claim(ABOVE_0, pairs=(("new", "base"), ("other", "base"))), cells)
    assert two.status == NOT_HELD and "nats at 97.5%, n = 5" in wording.deciding_text(two)


def test_a_claim_noticed_in_some_seeds_is_decided_on_fresh_ones():
    noticed = claim(BELOW_0, fresh_from=1340)
    seen = {1337: 0.9, 1338: 0.91, 1339: 0.9}
    base = dict.fromkeys(range(1337, 1346), 1.0)
    verdict = verdicts.decide(noticed, comparison(base=base, new=seen))
    assert verdict.status == UNDECIDED and not verdict.is_provisional
    assert wording.deciding_text(verdict).startswith("no fresh seeds; in earlier ones -0.0967 [")
    fresh = {seed: 1.0 + 0.01 * (seed % 3) for seed in range(1340, 1346)}
    verdict = verdicts.decide(noticed, comparison(base=base, new=seen | fresh))
    assert verdict.status == NOT_HELD and verdict.seeds == 6
    assert verdicts.decide(claim(BELOW_0), comparison(base=base, new=seen | fresh)).status == UNDECIDED
    lines = wording.detail_lines(verdict)
    assert "Earlier seeds, which do not decide:" in lines and "n = 3" in lines[-1]


def test_a_claim_decided_on_fresh_seeds_takes_their_costs_and_names_only_their_seeds():
    pays = claim(ABOVE_1, is_ratio=True, cost="train_seconds", fresh_from=1340)
    base, new = dict.fromkeys(range(1337, 1345), 1.0), {1337 + i: (4.0, 1.5)[i > 2] + 0.01 * i for i in range(7)}
    cells = comparison(base=base, new=new)
    (finding,) = verdicts.decide(pays, cells).findings["clean"]
    assert finding.cost.n == 4 and finding.cost.high < 1.6 and finding.cost_problem == ""
    assert finding.alone == {"base": [1344]}
    for record in cells.cells["new"][5:]:  # of the four fresh seeds two are timed
        record["exclusive"] = False
    verdict = verdicts.decide(pays, cells)
    assert verdict.findings["clean"][0].cost.n == 2 and verdict.seeds == 2 and verdict.is_provisional
    for record in cells.cells["new"][4:]:  # of the fresh seeds one is timed
        record["exclusive"] = False
    verdict = verdicts.decide(pays, cells)
    (finding,) = verdict.findings["clean"]
    assert finding.cost.n == 4 and finding.cost.mean > 3 and finding.cost_problem == verdicts.ALL_SEEDS
    assert wording.deciding_text(verdict).endswith("n = 4 (of all seeds)")
    for record in cells.cells["new"]:
        record["exclusive"] = False
    (finding,) = verdicts.decide(pays, cells).findings["clean"]
    assert finding.cost is None and finding.cost_problem == verdicts.NOT_ALONE and finding.status == UNDECIDED


def test_two_readings_of_a_claim_are_both_told():
    strict = claim((-math.inf, -0.163), other_reading=Reading((-math.inf, -0.028), "per word"))
    verdict = verdicts.decide(strict, comparison(base=[1.0, 1.01, 1.02], new=[0.9, 0.911, 0.919]))
    assert (verdict.status, verdict.other_status) == (NOT_HELD, HELD)
    assert "; held if read per word" in wording.deciding_text(verdict)


def test_a_claim_says_what_its_planned_seeds_can_decide():
    base, new = [1.0, 1.01, 1.03], [1.0, 1.03, 1.01]
    verdict = verdicts.decide(claim(BELOW_0, expected=-0.002), comparison(base=base, new=new))
    assert verdict.is_weak and verdict.power.is_measured and 700 < verdict.power.needed < 900
    assert "5 seeds have a power of 4% for the reported -0.002 nats" in wording.deciding_text(verdict)
    alike = verdicts.decide(claim((-0.002, 0.002)), comparison(base=base))
    assert alike.status == NOT_RUN and alike.is_weak and not alike.power.is_measured
    assert "if the rows are alike" in wording.power_text(alike)
    assert verdicts.decide(claim(BELOW_0), comparison(base=base, new=new)).power is None
    assert verdicts.decide(claim(BELOW_0, expected=-0.1), comparison(base=base[:2])).power is None


def test_a_claim_that_rows_are_alike_has_a_margin_with_a_reason():
    alike = [one for one in papers.CLAIMS if one.is_equivalence]
    assert {one.id for one in alike} == {"B1", "B10", "B14", "C1", "C5", "E14", "E15", "E16", "E18", "E20", "E27"}
    assert all(one.why for one in alike)
    for one in papers.CLAIMS:
        usual = one.holds in (ABOVE_0, BELOW_0, ABOVE_1, BELOW_1)
        assert usual or one.why, one.id


def test_an_equivalence_that_is_undecided_says_on_which_side_the_effect_lies():
    cells = comparison(base=[1.0, 1.01, 1.0, 1.02, 1.01], new=[1.016, 1.03, 1.017, 1.039, 1.035])
    verdict = verdicts.decide(claim((-0.02, 0.02)), cells)
    assert verdict.status == UNDECIDED and wording.deciding_text(verdict).endswith("; above 0")


def test_a_measure_that_says_something_else_is_told():
    cells = comparison(base=[1.0, 1.01, 1.02], new=[1.05, 1.06, 1.075])
    for record in cells.cells["new"]:
        record["paper"]["best_val"] -= 1
    verdict = verdicts.decide(claim(ABOVE_0, measures=("clean", "paper")), cells)
    assert verdict.status == HELD and verdict.dissent == {"paper": NOT_HELD}
    assert verdict.is_provisional and verdict.seeds == 3
    cells.cells["new"][0]["paper"]["best_val"] = None  # fewer seeds have it, which may be why it differs
    assert verdicts.decide(claim(ABOVE_0, measures=("clean", "paper")), cells).dissent == {}


# ---------------------------------------------------------------------------------------------------------------------
# Records that cannot be compared


def another_text():
    cells = comparison(base=[1.0, 1.1, 1.2], new=[1.0, 1.1, 1.2])
    for record in cells.cells["new"]:
        record["dataset"]["sha256"] = "b"
    return cells


def shared_hardware():
    cells = comparison(base=[1.0, 1.1], new=[1.0, 1.1])
    for record in cells.cells["new"]:
        record["exclusive"] = False
    return cells


@pytest.mark.parametrize(
    "cells, options, word, status",
    [
        (comparison(base=[1.0, 2.0]), {}, NOT_RUN, NOT_RUN),
        (comparison(base={1: 1.0, 2: 1.1}, new={3: 1.0, 4: 1.1}), {}, "no common seeds", UNDECIDED),
        (comparison(base={1: 1.0, 2: 1.1}, new={2: 1.0, 4: 1.1}), {}, "one seed", UNDECIDED),
        (comparison(base=[1.0, 2.0], elsewhere=["new"]), {}, "two machines", UNDECIDED),
        (another_text(), {}, "two texts", UNDECIDED),
        (shared_hardware(), {"measures": ("train_seconds",)}, "not timed alone", UNDECIDED),
        (comparison(base=[0.0, 1.0], new=[1.0, 1.0]), {"is_ratio": True}, "no ratio", UNDECIDED),
        (comparison(base=[1.0, 1.1], new=[1.0, 1.1]), {}, "the same in every seed", NOT_HELD),  # equal is not more
    ],
)
def test_records_that_cannot_be_compared_get_one_word_and_never_nan(cells, options, word, status):
    verdict = verdicts.decide(claim(ABOVE_0, **options), cells)
    (finding,) = verdict.findings[verdict.claim.measures[0]]
    assert (finding.problem, verdict.status) == (word, status)
    text = " ".join([wording.deciding_text(verdict), wording.status_text(verdict), *wording.detail_lines(verdict)])
    assert word in text and "nan" not in text


def test_equal_losses_are_alike():
    cells = comparison(base=[1.0, 1.1, 1.3], new=[1.0, 1.1, 1.3])
    assert verdicts.decide(claim((-0.001, 0.001)), cells).status == HELD


def test_a_verdict_that_lacks_rows_has_no_seeds_and_is_not_provisional():
    verdict = verdicts.decide(claim(ABOVE_0), comparison(base=[1.0, 2.0]))
    assert verdict.status == NOT_RUN and verdict.seeds == 0 and not verdict.is_provisional


def test_a_refuted_claim_has_the_seeds_of_the_pairs_that_refute_it():
    base, new, other = [1.0, 1.01, 1.02, 1.0, 1.03], [0.5, 0.51, 0.53, 0.5, 0.52], [1.0, 1.02, 1.01, 1.02, 1.0]
    pairs = {"pairs": (("new", "base"), ("other", "base"))}
    for refuting, besides, seeds in ((new[:3], [], 3), (new, [], 5), (new, other[:1], 5), (new[:3], other, 3)):
        verdict = verdicts.decide(claim(ABOVE_0, **pairs), comparison(base=base, new=refuting, other=besides))
        assert verdict.status == NOT_HELD and verdict.seeds == seeds
        assert verdict.is_provisional == (seeds < 5)


def test_a_pair_turned_round_counts_once_in_the_pooled_sd():
    base, new, other = [1.0, 1.1, 1.2], [1.1, 1.25, 1.27], [2.0, 2.0, 2.3]
    once = verdicts.shared_sd(comparison(base=base, new=new, other=other), "clean", "new", "base", "difference")
    turned = verdicts.shared_sd(comparison(base=base, new=new, other=other), "clean", "base", "new", "difference")
    assert once == turned > 0


def test_effects_and_rules_are_told_in_words():
    assert wording.effect_text(Effect(0.01234, 0.001, 0.02, 3, 0.1), "clean", "difference") == (
        "+0.0123 [+0.0010, +0.0200] nats, n = 3"
    )
    assert wording.effect_text(Effect(1.5, None, None, 1, None), "train_seconds", "ratio", "one seed") == (
        "1.500, n = 1 (one seed)"
    )
    assert wording.effect_text(None, "clean", "difference") == NOT_RUN
    for one in papers.CLAIMS:
        sentence = wording.rule_text(one)
        assert "Holds where " in sentence and sentence.endswith(".") and "inf" not in sentence
