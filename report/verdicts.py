"""Decides claims. The rules, which docs/results-and-verdicts.md explains:

1. Rows of one seed share batches, so an effect is the mean of per-seed differences (or of log ratios) over the seeds
   that both rows have, with Student's t interval. Seeds that one row lacks count in no effect.
2. A claim about several pairs held where every 95% interval lies within its bounds (an intersection-union test, which
   needs no correction). One pair refutes it where its interval at 1 - 0.05 / pairs lies wholly outside (Bonferroni).
3. A claim that two rows are alike is an equivalence test: its bounds are a margin, written beside it with its reason.
   What is neither held nor refuted is undecided; where the planned seeds could hardly decide, the power says so.
4. A claim noticed in some seeds is decided on fresh ones, and so is its cost where two of them were timed.
5. An SD of fewer than SEEDS_FOR_A_VERDICT seeds never narrows an interval: where the SDs of a table's pairs are alike,
   the pooled one is taken if it is larger. The degrees of freedom stay those of the pair.
6. Equal time: the interval of the break-even in steps (papers/break_even.py) against that of the ratio of times.

    for comparison in gather(TABLES[claim.table], records, "cpu"):
        verdict = decide(claim, comparison)      # verdict.status is one of STATUSES
"""

import math
import statistics
from typing import NamedTuple

from papers.measures import MEASURES
from papers.table import SEEDS_FOR_A_VERDICT, Claim, Comparison
from support.intervals import (
    CONFIDENCE,
    Crossing,
    Effect,
    crossing_of_mean,
    interval_of_mean,
    pooled_sd,
    power,
    seeds_needed,
)

STATUSES = HELD, NOT_HELD, UNDECIDED, NOT_RUN = "held", "did not hold", "undecided", "not run"
# Why a pair has no effect, or no interval.
NOT_ALONE, NOT_CAPTURED = "not timed alone", "not timed in captured steps"
NOT_MEASURED, ONE_LENGTH = "not measured", "one schedule length"
NO_COMMON_SEEDS, NO_FRESH_SEEDS, ONE_SEED = "no common seeds", "no fresh seeds", "one seed"
TWO_MACHINES, TWO_TEXTS, NO_RATIO = "two machines", "two texts", "no ratio"
ALL_SEEDS = "of all seeds"  # a cost that fresh seeds do not tell
NO_SPREAD = "the same in every seed"  # then the effect is its own interval
WEAK = 0.5  # power with which a claim is called one that the planned seeds can hardly decide


class Finding(NamedTuple):
    """What one measure of one pair of rows says of a claim."""

    row: str
    against: str  # the other row; "" for a value
    effect: Effect | None  # with its 95% interval, which confirms; None where `problem` says why
    refuting: Effect | None  # the same with the interval that refutes
    status: str
    problem: str  # "" where the effect has an interval from several seeds
    alone: dict[str, list[int]]  # row -> those of the seeds that the other lacks
    cost: Effect | None  # the ratio of costs with which a break-even is compared
    cost_problem: str


class Power(NamedTuple):
    """What the planned seeds can decide."""

    power: float  # of the weakest pair to show what the claim says, with SEEDS_FOR_A_VERDICT seeds
    needed: int | None  # seeds for a power of 80%; None: more than a thousand
    sd: float  # of the per-seed effects; of logarithms for a ratio
    is_measured: bool  # else it is that of one row, times the square root of 2


class Verdict(NamedTuple):
    """What the records of one comparison say of a claim."""

    claim: Claim
    comparison: Comparison
    status: str
    findings: dict[str, list[Finding]]  # measure -> one finding per pair; the first measure decides
    statuses: dict[str, str]  # measure -> the status that it would give
    other_status: str  # by the claim's other reading; "" where it has none
    seen: list[Finding]  # on the first measure, in the seeds before the fresh ones; they decide nothing

    @property
    def seeds(self) -> int:
        """The smallest number of seeds among the pairs that decide: where one refutes, of those that do, else of all; 0
        where one has none."""
        return fewest_seeds(deciding(self.findings[self.claim.measures[0]]))

    @property
    def is_provisional(self) -> bool:
        return self.status != NOT_RUN and 0 < self.seeds < SEEDS_FOR_A_VERDICT

    @property
    def dissent(self) -> dict[str, str]:
        """measure -> status, for the measures that contradict the one that decides, and that as many seeds have."""
        others = {m: s for m, s in self.statuses.items() if s not in (self.status, NOT_RUN)}
        return {m: s for m, s in others.items() if fewest_seeds(deciding(self.findings[m])) >= self.seeds}

    @property
    def lacks_rows(self) -> bool:
        """Whether a row that decides has runs on another machine only."""
        return any(finding.problem == TWO_MACHINES for finding in self.findings[self.claim.measures[0]])

    @property
    def power(self) -> Power | None:
        return power_of(self.claim, self.comparison, self.findings[self.claim.measures[0]])

    @property
    def is_weak(self) -> bool:
        """Whether the planned seeds can hardly decide it."""
        planned = self.power if self.status in (UNDECIDED, NOT_RUN) else None
        return planned is not None and planned.power < WEAK


def decide(claim: Claim, comparison: Comparison) -> Verdict:
    """The verdict on a claim from the records of its table at one scale on one kind of machine."""
    fresh, seen = range(claim.fresh_from, 2**63), range(claim.fresh_from)
    findings = {m: [finding_of(claim, comparison, m, *pair, fresh) for pair in claim.pairs] for m in claim.measures}
    first = claim.measures[0]
    earlier = [finding_of(claim, comparison, first, *pair, seen) for pair in claim.pairs] if claim.fresh_from else []
    statuses = {measure: joint_status([finding.status for finding in of]) for measure, of in findings.items()}
    other = ""
    if claim.other_reading:
        holds = claim.other_reading.holds
        other = joint_status([NOT_RUN if f.status == NOT_RUN else status_of(*f[2:4], holds) for f in findings[first]])
    return Verdict(claim, comparison, statuses[first], findings, statuses, other, earlier)


def finding_of(claim: Claim, comparison: Comparison, measure: str, row: str, against: str, seeds: range) -> Finding:
    """What these seeds of one pair say of a claim."""
    kind, pair = claim.effect, (row, against)
    confidences = CONFIDENCE, 1 - (1 - CONFIDENCE) / len(claim.pairs)
    effect, refuting = (effect_of(comparison, measure, *pair, kind, confidence, seeds) for confidence in confidences)
    problem = problem_of(comparison, measure, *pair, kind, seeds)
    cost, cost_problem, bounds = None, "", (claim.holds, claim.holds)
    if claim.cost:  # the interval must lie above that of the cost to confirm, and below it to refute
        cost, cost_problem = cost_of(comparison, claim.cost, *pair, seeds)
        edges = (math.inf, 0.0) if cost is None or cost.low is None else (cost.high, cost.low)
        bounds = [(edge, math.inf) for edge in edges]
    status = NOT_RUN if problem == NOT_RUN else status_of(effect, refuting, *bounds)
    values = (comparison.values(name, measure) if name else () for name in pair)
    ours, theirs = ({seed for seed in of if seed in seeds} for of in values)
    alone = {row: sorted(ours - theirs), against: sorted(theirs - ours)} if against else {}
    alone = {name: of for name, of in alone.items() if of}
    return Finding(*pair, effect, refuting, status, problem, alone, cost, cost_problem)


def cost_of(comparison, cost, row, against, seeds) -> tuple[Effect | None, str]:
    """The ratio of a cost in these seeds, or in all where these give no interval; and its problem, in a word."""
    of_pair = comparison, cost, row, against, "ratio"
    effect = effect_of(*of_pair, seeds=seeds)
    if effect and effect.low is not None:
        return effect, problem_of(*of_pair, seeds)
    return effect_of(*of_pair), problem_of(*of_pair) or ALL_SEEDS


# ---------------------------------------------------------------------------------------------------------------------
# Effects


def effect_of(
    comparison: Comparison, measure: str, row: str, against: str, kind: str, confidence=CONFIDENCE, seeds=None
) -> Effect | None:
    """The effect that a claim's bounds are about, paired by seed; None where `problem_of` says why.

    kind: difference (row - against), ratio (row / against, of geometric means) or value (of the row alone). seeds: of
    which seeds; None for all.
    """
    values = values_by_seed(comparison, measure, row, against, kind, seeds)
    if not values:
        return None
    least = 0.0 if len(values) >= SEEDS_FOR_A_VERDICT else shared_sd(comparison, measure, row, against, kind)
    effect = interval_of_mean(list(values.values()), confidence, least)
    if kind != "ratio":
        return effect
    mean, low, high = (None if value is None else math.exp(value) for value in effect[:3])
    return effect._replace(mean=mean, low=low, high=high)


def values_by_seed(comparison, measure, row, against, kind, seeds=None) -> dict[int, float]:
    """seed -> difference, log ratio, or value. Empty where rows were trained on two texts, or have no ratio."""
    ours = comparison.values(row, measure)
    if kind != "value":
        theirs = comparison.values(against, measure)
        if len(comparison.texts(row, against)) > 1:
            return {}
        if kind == "ratio":
            if min([*ours.values(), *theirs.values()], default=0) <= 0:
                return {}
            ours, theirs = ({seed: math.log(value) for seed, value in of.items()} for of in (ours, theirs))
        ours = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
    return {seed: value for seed, value in ours.items() if seeds is None or seed in seeds}


def shared_sd(comparison, measure, row, against, kind) -> float:
    """The SD of per-seed effects, pooled over this pair and the table's rows against their baselines; 0 if unlike."""
    rows = comparison.table.rows_at(comparison.scale)
    pairs = {(other.name, other.baseline) for other in rows if other.baseline} | {(row, against)}
    if kind == "value":
        pairs = {(other.name, "") for other in rows}
    of_pairs = [tuple(values_by_seed(comparison, measure, *pair, kind).values()) for pair in sorted(pairs)]
    # A pair turned round, or a row that has a number with another one, says nothing more of the spread.
    groups = {max(values, tuple(-value for value in values)) for values in of_pairs}
    return pooled_sd([list(group) for group in sorted(groups)]) or 0.0


def problem_of(comparison, measure, row, against, kind, seeds=None) -> str:
    """Why a pair has no effect, or no interval, in a word; NOT_RUN where a row has no record; "" where all is well."""
    names = [name for name in (row, against) if name]
    for name in names:
        if not comparison.cells[name]:
            return TWO_MACHINES if name in comparison.elsewhere and len(names) > 1 else NOT_RUN
    for name in names:
        if not comparison.values(name, measure):
            return why_no_number(comparison, measure, name)
    if len(comparison.texts(*names)) > 1 and len(names) > 1:
        return TWO_TEXTS
    if kind == "ratio" and min(min(comparison.values(name, measure).values()) for name in names) <= 0:
        return NO_RATIO
    values = values_by_seed(comparison, measure, row, against, kind, seeds)
    if not values:
        earlier = seeds is not None and values_by_seed(comparison, measure, row, against, kind)
        return NO_FRESH_SEEDS if earlier else NO_COMMON_SEEDS
    if len(values) == 1:
        return ONE_SEED
    return NO_SPREAD if statistics.stdev(values.values()) == 0 else ""


def why_no_number(comparison, measure, row) -> str:
    """Why no record of a row that was run has a number of the measure, in a word."""
    entry = MEASURES[measure]
    if entry.of_table:
        return ONE_LENGTH
    if all(entry.read(record) is None for record in comparison.cells[row]):
        return NOT_MEASURED
    return NOT_ALONE if any(entry.read(of) is not None for of in comparison.timed_alike(row)) else NOT_CAPTURED


def differences_by_size(comparison: Comparison, measure: str, config: str) -> dict[int, tuple[str, dict[int, float]]]:
    """Unique characters, rising -> (row, {seed: row - its baseline}) of the rows with this config file."""
    found = {}
    for row in comparison.table.rows_at(comparison.scale):
        values = {}
        if row.baseline and row.config == config:
            values = values_by_seed(comparison, measure, row.name, row.baseline, "difference")
        if values:
            found[comparison.cells[row.name][0]["dataset"]["splits"]["train"]] = row.name, values
    return dict(sorted(found.items()))


def crossing_of(by_size: dict[int, tuple[str, dict[int, float]]]) -> Crossing | None:
    """At how many unique characters the difference is 0; None where it does not cross 0 once.

    by_size: from differences_by_size. By the seeds that all sizes have; between two sizes the difference is linear in
    the logarithm of the characters.
    """
    seeds = set.intersection(*(set(values) for _, values in by_size.values())) if len(by_size) > 1 else ()
    if not seeds:
        return None
    curves = [[values[seed] for _, values in by_size.values()] for seed in sorted(seeds)]
    crossing = crossing_of_mean([math.log(size) for size in by_size], curves)
    return crossing and Crossing(*(place if place is None else math.exp(place) for place in crossing[:3]), crossing.n)


def deciding(findings: list[Finding]) -> list[Finding]:
    """The findings that decide together: where some refute, these."""
    return [finding for finding in findings if finding.status == NOT_HELD] or findings


def fewest_seeds(findings: list[Finding]) -> int:
    """Of their effects, and of the costs with which these are compared."""
    return min(min(f.effect.n, f.cost.n if f.cost else f.effect.n) if f.effect else 0 for f in findings)


# ---------------------------------------------------------------------------------------------------------------------
# From effects to statuses


def status_of(effect: Effect | None, refuting: Effect | None, holds, refuted_outside=None) -> str:
    """The status of the claim that an effect lies between two bounds.

    refuted_outside: the bounds outside which it is refuted, where they are others than those that confirm it.
    """
    (lowest, highest), (below, above) = holds, refuted_outside or holds
    if effect is None or effect.low is None:
        return UNDECIDED
    if effect.low > lowest and (effect.high < highest or highest == math.inf):
        return HELD
    if refuting.high <= below or refuting.low >= above:
        return NOT_HELD
    return UNDECIDED


def joint_status(statuses: list[str]) -> str:
    """The status of a claim about several pairs: all must hold, and one that contradicts it is enough."""
    return next((status for status in (NOT_HELD, NOT_RUN, UNDECIDED) if status in statuses), HELD)


def power_of(claim: Claim, comparison: Comparison, findings: list[Finding]) -> Power | None:
    """The power of SEEDS_FOR_A_VERDICT seeds, if the effect has the size that the source reports.

    A claim that two rows are alike is tried on rows that are. None without such a size, or without any spread.
    """
    true = claim.no_effect if claim.expected is None and claim.is_equivalence else claim.expected
    spreads = [spread_of(comparison, claim.measures[0], claim.effect, finding) for finding in findings]
    if true is None or None in spreads:
        return None
    sd, is_measured = max(spreads)
    holds = claim.holds
    if claim.effect == "ratio":
        true, *holds = (math.log(value) if value > 0 else -math.inf for value in (true, *holds))
    case = true, sd, SEEDS_FOR_A_VERDICT, tuple(holds)
    return Power(power(*case), seeds_needed(true, sd, tuple(holds)), sd, is_measured)


def spread_of(comparison, measure, kind, finding) -> tuple[float, bool] | None:
    """(SD of a pair's per-seed effects, whether it is measured); None where neither row has three seeds."""
    if finding.effect and finding.effect.n > 2:
        return finding.effect.sd, True
    for name in (finding.row, finding.against):
        values = list(comparison.values(name, measure).values()) if name else []
        if len(values) > 2 and kind != "value" and min(values) > 0:
            values = [math.log(value) for value in values] if kind == "ratio" else values
            return math.sqrt(2) * statistics.stdev(values), False
    return None
