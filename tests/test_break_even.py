"""The break-even in steps, by hand, and its comparison with a ratio of costs."""

import math

import pytest

from papers import CLAIMS, TABLES
from papers.break_even import log_steps_to
from papers.table import Comparison
from report import verdicts, wording
from report.verdicts import HELD, NOT_HELD, UNDECIDED

DENSE, LONG, DOUBLE, MOE4 = (f"shakespeare_{name}" for name in ("dense", "dense_long", "dense_double", "moe4"))
CLAIM = next(claim for claim in CLAIMS if claim.id == "E3")
SLOPE = 0.25  # nats that the dense model gains when its steps grow e times


def comparison(losses, seconds=None):
    """losses: row -> {seed: nats}; seconds: row -> {seed: s}, of which others count as not timed alone."""

    def record(row, seed):
        taken = (seconds or {}).get(row, {}).get(seed)
        return {
            "config": {"seed": seed},
            "dataset": {"sha256": "a", "canonical": True},
            "leaky": False,
            "clean": {"best": {"nats": losses[row][seed]}},
            "seconds": {"train": taken or 1.0},
            "exclusive": taken is not None,
            "machine": {},
        }

    table = TABLES["equal"]
    cells = {row.name: [record(row.name, seed) for seed in losses.get(row.name, {})] for row in table.rows}
    return Comparison(table, "cpu", "a machine", cells, {row.name: [] for row in table.rows})


def dense_curves(seeds=5, **longer):
    """Dense models whose loss falls by SLOPE per factor e of steps; seed k is 0.01 k higher at every length."""
    lengths = {DENSE: 1.0, LONG: 1.3} | longer
    return {row: {k: 1.9 + 0.01 * k - SLOPE * math.log(times) for k in range(seeds)} for row, times in lengths.items()}


def with_moe(factors, **options):
    """The dense curves, and 4 experts whose loss seed k of the dense model reaches with factors[k] times the steps."""
    losses = dense_curves(len(factors), **options)
    losses[MOE4] = {k: losses[DENSE][k] - SLOPE * math.log(factor) for k, factor in enumerate(factors)}
    return losses


def test_a_loss_between_two_lengths_is_reached_in_between():
    curve = [(0.0, 2.0), (1.0, 1.8), (2.0, 1.7)]
    assert [log_steps_to(loss, curve) for loss in (1.9, 1.8, 1.75)] == pytest.approx([0.5, 1.0, 1.5])
    assert log_steps_to(1.65, curve) == pytest.approx(2.5) and log_steps_to(2.1, curve) == pytest.approx(-0.5)
    assert log_steps_to(1.9, curve[:1]) is None  # one length says nothing of the slope
    assert log_steps_to(1.9, [(0.0, 1.8), (1.0, 1.8)]) is None  # more steps do not help


def test_the_break_even_is_paired_by_seed_and_1_for_the_dense_model():
    of = comparison(with_moe([1.1, 1.2, 1.3, 1.2, 1.5], **{DOUBLE: 2.0}))
    assert of.values(MOE4, "equivalent_steps") == pytest.approx({0: 1.1, 1: 1.2, 2: 1.3, 3: 1.2, 4: 1.5})
    assert of.values(DENSE, "equivalent_steps") == pytest.approx(dict.fromkeys(range(5), 1.0))
    assert of.values(DOUBLE, "equivalent_steps") == pytest.approx(dict.fromkeys(range(5), 1.0))  # over its own steps
    lacking = with_moe([1.1, 1.2, 1.3])
    del lacking[LONG][2]
    assert set(comparison(lacking).values(MOE4, "equivalent_steps")) == {0, 1}


def times(ratio, seeds=5):
    """Of 4 experts and of the dense model, with a little spread."""
    dense = {k: 100.0 + k for k in range(seeds)}
    return {DENSE: dense, MOE4: {k: ratio * second * (1 + 0.01 * (k % 2)) for k, second in dense.items()}}


@pytest.mark.parametrize("ratio, status", [(1.05, HELD), (1.3, UNDECIDED), (1.6, NOT_HELD)])
def test_at_equal_time_the_break_even_must_lie_above_the_ratio_of_times(ratio, status):
    verdict = verdicts.decide(CLAIM, comparison(with_moe([1.25, 1.3, 1.35, 1.28, 1.33]), times(ratio)))
    assert verdict.status == status
    told = wording.deciding_text(verdict)
    assert told.startswith("steps × 1.302 [") and f"; training × {ratio * 1.01**0.4:.3f} [" in told


@pytest.mark.parametrize("seconds, word", [(None, "not timed alone"), (times(1.05, seeds=1), "one seed")])
def test_without_an_interval_of_the_cost_nothing_is_decided(seconds, word):
    verdict = verdicts.decide(CLAIM, comparison(with_moe([1.25, 1.3, 1.35, 1.28, 1.33]), seconds))
    assert verdict.status == UNDECIDED and word in wording.deciding_text(verdict)


def test_lengths_are_rows_of_one_model():
    for table in TABLES.values():
        for model in table.lengths:
            for scale in ("paper", "cpu"):
                configs = [table.row(name).config_at(scale).to_dict() for name in model]
                steps = [config.pop("max_iters") for config in configs]
                for config in configs:
                    config.pop("title")
                assert all(config == configs[0] for config in configs) and steps == sorted(set(steps))
