"""Which claims held: effects with 95% intervals, and what they say of a claim.

    for comparison in gather(TABLES[claim.table], records, "cpu"):
        verdict = decide(claim, comparison)      # verdict.status: held, did not hold, within noise, not run

Two rows are compared by Welch's t interval over their seeds, or, for measures from random batches that rows of one seed
share, by the paired t interval over the seeds that both have. Ratios are taken on the logarithms, so they are ratios of
geometric means. Intervals are not corrected for the number of claims.
"""

import math
from typing import NamedTuple

from papers.experiments import MEASURES, SEEDS_FOR_A_VERDICT, Claim, Comparison
from support.intervals import Effect, interval_of_difference, interval_of_mean

STATUSES = HELD, NOT_HELD, NOISE, NOT_RUN = "held", "did not hold", "within noise", "not run"


class Finding(NamedTuple):
    row: str
    against: str
    effect: Effect | None  # None where a row has no record that counts
    status: str


class Verdict(NamedTuple):
    claim: Claim
    comparison: Comparison
    status: str
    findings: dict[str, list[Finding]]  # measure -> one a pair; the first measure decides
    statuses: dict[str, str]  # measure -> what it says

    @property
    def seeds(self) -> int:
        """The smallest number of seeds of a row that decides; 0 where one is missing."""
        effects = [finding.effect for finding in self.findings[self.claim.measures[0]]]
        return min(min(e.n, e.n_against or e.n) if e else 0 for e in effects)

    @property
    def is_provisional(self) -> bool:
        return self.status != NOT_RUN and self.seeds < SEEDS_FOR_A_VERDICT

    @property
    def dissent(self) -> dict[str, str]:
        """measure -> status, for those that were taken and say something else than the one that decides."""
        return {m: s for m, s in self.statuses.items() if s not in (self.status, NOT_RUN)}


def decide(claim: Claim, comparison: Comparison) -> Verdict:
    findings = {
        measure: [find(claim, comparison, measure, *pair) for pair in claim.pairs] for measure in claim.measures
    }
    statuses = {measure: together([finding.status for finding in of]) for measure, of in findings.items()}
    return Verdict(claim, comparison, statuses[claim.measures[0]], findings, statuses)


def find(claim: Claim, comparison: Comparison, measure: str, row: str, against: str) -> Finding:
    effect = effect_of(comparison, measure, row, against, claim.effect)
    return Finding(row, against, effect, status_of(effect, claim.holds))


def effect_of(comparison: Comparison, measure: str, row: str, against: str, kind: str) -> Effect | None:
    """kind: difference (row - against), ratio (row / against) or value (of the row alone)."""
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
    """What an effect says of a claim that it lies between two bounds."""
    lowest, highest = holds
    if effect is None:
        return NOT_RUN
    if effect.low is None:
        return NOISE  # one seed shows nothing
    if effect.low > lowest and (effect.high < highest or highest == math.inf):
        return HELD
    if effect.high <= lowest or effect.low >= highest:
        return NOT_HELD
    return NOISE


def together(statuses: list[str]) -> str:
    """Of a claim about several pairs: one that contradicts it is enough; all must hold for it to hold."""
    for status in (NOT_HELD, NOT_RUN, NOISE):
        if status in statuses:
            return status
    return HELD


# ---------------------------------------------------------------------------------------------------------------------
# In words


def rule(claim: Claim) -> str:
    """When the claim holds, as a sentence."""
    lowest, highest = claim.holds
    what = {"difference": "the difference", "ratio": "the ratio", "value": "the value"}[claim.effect]
    unit = MEASURES[claim.measures[0]].unit if claim.effect != "ratio" else ""
    if highest == math.inf:
        bounds = f"is above {lowest:g}"
    elif lowest == -math.inf or (claim.effect == "ratio" and lowest == 0):
        bounds = f"is below {highest:.4g}"
    else:
        bounds = f"lies between {lowest:g} and {highest:g}"
    every = "every interval" if len(claim.pairs) > 1 else "the interval"
    reason = f" ({claim.why})" if claim.why else ""
    return f"Holds where {every} of {what} {bounds}{f' {unit}' if unit else ''}{reason}."


def shown(effect: Effect | None, measure: str, kind: str) -> str:
    """'+0.0123 [+0.0045, +0.0201] nats, n = 3', or 'n = 5 and 3' where the rows differ in it"""
    if effect is None:
        return NOT_RUN
    entry = MEASURES[measure]
    digits = 3 if kind == "ratio" else entry.digits
    sign = "+" if kind == "difference" else ""
    unit = "" if kind == "ratio" or not entry.unit else f" {entry.unit}"
    numbers = f"{effect.mean:{sign}z.{digits}f}"
    if effect.low is not None:
        numbers += f" [{effect.low:{sign}z.{digits}f}, {effect.high:{sign}z.{digits}f}]"
    counts = f"{effect.n}" if effect.n_against in (None, effect.n) else f"{effect.n} and {effect.n_against}"
    return f"{numbers}{unit}, n = {counts}" + (" (no interval from one seed)" if effect.low is None else "")
