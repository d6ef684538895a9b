"""Puts verdicts into sentences, and explains to a reader how the results are to be read."""

import math

import papers
from papers.measures import MEASURES
from papers.table import SEEDS_FOR_A_VERDICT, Claim
from report.cells import DAGGER, marked_label
from report.verdicts import NOT_RUN, STATUSES, Verdict
from support.intervals import Effect

HOW_TO_READ = (
    "Losses are cross-entropy in nats per character (per byte on enwik8), in eval mode unless stated otherwise. **Full "
    "validation** covers the whole validation split and predicts each character once. **Sampled validation** is the "
    "papers' protocol: the lowest mean loss on random batches among the evaluations of a run; auxiliary losses are "
    "added only where stated. A cell is mean ± sample SD (n seeds). An effect comes with its 95% interval: Welch's "
    "over seeds, or the paired one over common seeds for measures from random batches, which are the same in all rows "
    "of a seed. A claim held if the whole interval lies within its bounds, did not hold if the interval lies wholly "
    "outside, and is undecided otherwise; of several pairs of rows, one that contradicts the claim is enough. "
    "Intervals are not corrected for the number of claims. Times count only from runs that had their GPU, or 95% of "
    "their cores' time, to themselves."
)
*_PAPERS, _OURS = papers.SOURCES.values()
CLAIMS_BY_SOURCE = f"The letter of a claim names its source. {'. '.join(_PAPERS)}. E: {_OURS}."

HOW_EXPERTS_ARE_READ = (
    "A Mixture-of-Experts layer has several MLPs, its experts, and a router that sends each character to one or a few "
    "of them. **Load** says how evenly the experts are used: 0 where one expert gets all characters (the layer has "
    "collapsed), 1 where all experts get equal shares.",
    "**Information** says how well one thing known about a character predicts its expert, as a share of H(expert), "
    "the entropy of the load. If each character always goes to the same expert, its share is 1. A share means "
    "little by itself: a random, never trained router also sends similar inputs to the same expert, and anything "
    "predicts a little by chance. So chance is subtracted, and a random router is drawn beside the trained one. The "
    "shares of the characters before, the place in the word and the speaker are counted beyond that of the "
    "character.",
    "**Cost** is the rise of the validation loss, in nats, when the routing of the trained model is changed or an "
    "expert is removed. **Gradients** are compared by their cosine: 1 if two losses or two characters would change the "
    "weights alike, −1 if they are opposed, 0 if they are unrelated.",
)


def rule_text(claim: Claim) -> str:
    """The bounds of a claim as a sentence."""
    lowest, highest = claim.holds
    unit = "" if claim.is_ratio else MEASURES[claim.measures[0]].unit
    if highest == math.inf:
        bounds = f"is above {lowest:g}"
    elif lowest == -math.inf or (claim.is_ratio and lowest == 0):
        bounds = f"is below {highest:.4g}"
    else:
        bounds = f"lies between {lowest:g} and {highest:g}"
    every = "every interval" if len(claim.pairs) > 1 else "the interval"
    reason = f" ({claim.why})" if claim.why else ""
    return f"Holds where {every} of the {claim.effect} {bounds}{f' {unit}' if unit else ''}{reason}."


def effect_text(effect: Effect | None, measure: str, kind: str) -> str:
    """An effect with its interval: '+0.0123 [+0.0045, +0.0201] nats, n = 3'."""
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


def effect_lines(verdict: Verdict, measure: str) -> list[str]:
    """The effects on one measure, a line per pair of rows."""
    kind, comparison, lines = verdict.claim.effect, verdict.comparison, []
    for finding in verdict.findings[measure]:
        rows = [comparison.table.row(name) for name in (finding.row, finding.against) if name]
        names = (" ÷ " if kind == "ratio" else " − ").join(marked_label(comparison, row) for row in rows)
        lines.append(f"{names}: {effect_text(finding.effect, measure, kind)}")
    return lines


def detail_lines(verdict: Verdict) -> list[str]:
    """All effects on the measure that decides, and those of measures that disagree."""
    first = verdict.claim.measures[0]
    lines = [f"{MEASURES[first].heading}:", *effect_lines(verdict, first)]
    for measure, status in verdict.dissent.items():
        lines += [f"but {status} by {MEASURES[measure].heading}:", *effect_lines(verdict, measure)]
    return lines


def deciding_text(verdict: Verdict) -> str:
    """The effect that decided, in a line: the only one, or the one that contradicts the claim most."""
    first, (lowest, highest) = verdict.claim.measures[0], verdict.claim.holds

    def contradiction(finding):
        mean = finding.effect.mean if finding.effect else 0
        return max(lowest - mean, mean - highest)

    deciding = [finding for finding in verdict.findings[first] if finding.status == verdict.status]
    finding = max(deciding, key=contradiction)
    text = effect_text(finding.effect, first, verdict.claim.effect)
    label = marked_label(verdict.comparison, verdict.comparison.table.row(finding.row))
    if finding.effect and (len(verdict.findings[first]) > 1 or DAGGER in label):
        text = f"{label}: {text}"
    if verdict.status == NOT_RUN:
        text = f"`{verdict.comparison.table.command(verdict.comparison.scale)}`"
        if all(verdict.comparison.cells[name] for pair in verdict.claim.pairs for name in pair if name):
            text = "run, but no run is known to have had its cores to itself"
    dissent = [f"{status} by {MEASURES[measure].heading}" for measure, status in verdict.dissent.items()]
    return "; but ".join([text, *dissent])


def status_text(verdict: Verdict) -> str:
    """The verdict in two or three words, and whether it is provisional."""
    return verdict.status + (f" (provisional, n = {verdict.seeds})" if verdict.is_provisional else "")


def headline(n_runs: int, machines: list[str]) -> str:
    """How many runs there are, and on which machines they were made."""
    if not n_runs:
        return "There are no records yet; each line below says how to make them."
    return (
        f"Records of {n_runs} runs, made on {' and on '.join(machines)}. A verdict from fewer than "
        f"{SEEDS_FOR_A_VERDICT} seeds is provisional."
    )


def verdict_counts(verdicts: list[Verdict]) -> str:
    """How many claims got each verdict."""
    count = {status: sum(verdict.status == status for verdict in verdicts) for status in STATUSES}
    return f"Of {len(verdicts)} verdicts: " + ", ".join(f"{number} {status}" for status, number in count.items()) + "."
