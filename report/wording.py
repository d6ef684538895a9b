"""Puts verdicts into sentences, and explains to a reader how the results are to be read."""

import math

from papers.measures import MEASURES
from papers.table import SEEDS_FOR_A_VERDICT, Claim
from report.cells import DAGGER, marked_label
from report.verdicts import NOT_RUN, STATUSES, Verdict
from support.intervals import Effect

HOW_TO_READ = (
    "Losses are nats per character, in eval mode where nothing else is said. **Clean**: the whole validation split, "
    "each character predicted once. **The papers' way**: the minimum over evaluations of the mean of random "
    "batches; auxiliary losses are added only where that is said. A cell is mean ± sample SD (n seeds). An effect "
    "comes with its 95% interval: Welch's over seeds, or the paired one over common seeds for what is estimated "
    "from random batches, which rows of one seed share. A claim held where the whole interval lies where its rule "
    "says, did not hold where none of it does, and is within noise otherwise; of several pairs, one that "
    "contradicts is enough. Intervals are not corrected for the number of claims. Times count only from runs that "
    "had their cores, or their GPU, to themselves, up to 5% of the cores' time."
)

HOW_EXPERTS_ARE_READ = (
    "A Mixture-of-Experts layer has several MLPs, its experts, and a router that sends each character to one or a few "
    "of them. **Load** is how evenly they are used: a layer whose characters all go to one expert has collapsed, and "
    "uses 0 of what it could; one whose experts have equal shares uses 1.",
    "**Information** is what knowing something of a character tells of its expert, as a share of all there is to know "
    "(H(expert), the entropy of the load). If each character always goes to the same expert, the character tells 1. A "
    "share means nothing by itself: a random, never trained router also sends like to like, and any table tells "
    "something of anything by chance. So chance is subtracted, and the random router is drawn beside it. What the "
    "characters before, the place in the word, or the speaker add is counted beyond the character.",
    "**Cost** is what the validation loss rises by, in nats, when the routing of the trained model is spoilt or an "
    "expert is taken away. **Gradients**: a cosine of 1 means that two wishes to change the weights agree, −1 that "
    "they are opposed, 0 that they have nothing to do with each other.",
)


def rule_text(claim: Claim) -> str:
    """The bounds of a claim as a sentence."""
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
    claim, comparison = verdict.claim, verdict.comparison
    table, lines = comparison.table, []
    for finding in verdict.findings[measure]:
        names = marked_label(comparison, table.row(finding.row))
        if finding.against:
            sign = {"difference": "−", "ratio": "÷"}[claim.effect]
            names += f" {sign} {marked_label(comparison, table.row(finding.against))}"
        lines.append(f"{names}: {effect_text(finding.effect, measure, claim.effect)}")
    return lines


def detail_lines(verdict: Verdict) -> list[str]:
    """All effects on the measure that decides, and those of measures that disagree."""
    headings = {measure: MEASURES[measure].heading for measure in verdict.findings}
    first = verdict.claim.measures[0]
    lines = [f"{headings[first]}:", *effect_lines(verdict, first)]
    for measure, status in verdict.dissent.items():
        lines += [f"but {status} by {headings[measure]}:", *effect_lines(verdict, measure)]
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
            text = "run, but none is known to have been alone on its cores"
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
