"""Decides claims: takes the effects with their 95% intervals, and compares them with the bounds of the claim.

    for comparison in gather(TABLES[claim.table], records, "cpu"):
        verdict = decide(claim, comparison)      # verdict.status is one of STATUSES

Two rows are compared by Welch's t interval over their seeds. Measures from random batches, which rows of one seed
share, use the paired t interval over the seeds that both rows have. Ratios are taken on the logarithms, so they are
ratios of geometric means. Intervals are not corrected for the number of claims.
"""

import itertools
import math
from typing import NamedTuple

from papers.measures import MEASURES
from papers.table import SEEDS_FOR_A_VERDICT, Claim, Comparison
from support.intervals import Effect, interval_of_difference, interval_of_mean

STATUSES = HELD, NOT_HELD, UNDECIDED, NOT_RUN = "held", "did not hold", "undecided", "not run"


class Finding(NamedTuple):
    """What one measure of one pair of rows says of a claim."""

    row: str
    against: str  # the other row; "" for a value
    effect: Effect | None  # None where a row has no record that counts
    status: str


class Verdict(NamedTuple):
    """What the records of one comparison say of a claim."""

    claim: Claim
    comparison: Comparison
    status: str
    findings: dict[str, list[Finding]]  # measure -> one finding per pair; the first measure decides
    statuses: dict[str, str]  # measure -> the status that it would give

    @property
    def seeds(self) -> int:
        """The smallest number of seeds among the rows that decide; 0 where a row has none."""
        effects = [finding.effect for finding in self.findings[self.claim.measures[0]]]
        return min(min(e.n, e.n_against or e.n) if e else 0 for e in effects)

    @property
    def is_provisional(self) -> bool:
        return self.status != NOT_RUN and self.seeds < SEEDS_FOR_A_VERDICT

    @property
    def dissent(self) -> dict[str, str]:
        """measure -> status, for the measures that contradict the one that decides."""
        return {m: s for m, s in self.statuses.items() if s not in (self.status, NOT_RUN)}


def decide(claim: Claim, comparison: Comparison) -> Verdict:
    """The verdict on a claim from the records of its table at one scale on one kind of machine."""
    findings = {measure: [] for measure in claim.measures}
    for measure, pair in itertools.product(claim.measures, claim.pairs):
        effect = effect_of(comparison, measure, *pair, claim.effect)
        findings[measure].append(Finding(*pair, effect, status_of(effect, claim.holds)))
    statuses = {measure: joint_status([finding.status for finding in of]) for measure, of in findings.items()}
    return Verdict(claim, comparison, statuses[claim.measures[0]], findings, statuses)


def effect_of(comparison: Comparison, measure: str, row: str, against: str, kind: str) -> Effect | None:
    """The effect that a claim's bounds are about; None where a row has no value that counts.

    kind: difference (row - against), ratio (row / against) or value (of the row alone).
    """
    ours = comparison.values(row, measure)
    if kind == "value":
        return interval_of_mean(list(ours.values())) if ours else None
    theirs = comparison.values(against, measure)
    if kind == "ratio":
        if min([*ours.values(), *theirs.values()], default=0) <= 0:
            return None  # a ratio to nothing
        ours, theirs = ({seed: math.log(value) for seed, value in of.items()} for of in (ours, theirs))
    if MEASURES[measure].shares_batches:
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        effect = interval_of_mean(differences) if differences else None
    else:
        effect = interval_of_difference(list(ours.values()), list(theirs.values())) if ours and theirs else None
    if effect is None or kind == "difference":
        return effect
    mean, low, high = (None if value is None else math.exp(value) for value in effect[:3])
    return Effect(mean, low, high, effect.n, effect.n_against)


def status_of(effect: Effect | None, holds: tuple[float, float]) -> str:
    """The status of the claim that an effect lies between two bounds."""
    lowest, highest = holds
    if effect is None:
        return NOT_RUN
    if effect.low is None:
        return UNDECIDED  # one seed shows nothing
    if effect.low > lowest and (effect.high < highest or highest == math.inf):
        return HELD
    if effect.high <= lowest or effect.low >= highest:
        return NOT_HELD
    return UNDECIDED


def joint_status(statuses: list[str]) -> str:
    """The status of a claim about several pairs: all must hold, and one that contradicts it is enough."""
    return next((status for status in (NOT_HELD, NOT_RUN, UNDECIDED) if status in statuses), HELD)
