"""Puts verdicts into sentences, and explains to a reader how the results are to be read."""

import math
import re
from collections.abc import Iterable

import papers
from papers.measures import MEASURES
from papers.table import SCALES, SEEDS_FOR_A_VERDICT, Claim
from report.cells import DAGGER, marked_label
from report.verdicts import (
    HELD,
    NO_FRESH_SEEDS,
    NO_SPREAD,
    NOT_HELD,
    NOT_RUN,
    STATUSES,
    UNDECIDED,
    Finding,
    Verdict,
    crossing_of,
    differences_by_size,
)
from support.intervals import CONFIDENCE, MOST_SEEDS, Effect

HOW_TO_READ = (
    "Losses are cross-entropy in nats per character (per byte on enwik8), in eval mode unless stated otherwise. **Full "
    "validation** covers the whole validation split and predicts each character once. **Sampled validation** is the "
    "papers' protocol: the lowest mean loss on random batches among the evaluations of a run; auxiliary losses are "
    "added only where stated. A cell is mean ± sample SD (n seeds). An effect is paired by seed: the mean of the "
    "differences, or of the log ratios, over the seeds that both rows have, with its 95% interval (Student's t). A "
    "claim **held** if every interval lies within its bounds (“holds if”), and **did not hold** if one lies wholly "
    "outside; of m pairs of rows, one refutes a claim only with its interval at 1 − 0.05/m. Otherwise it is "
    "**undecided**. A claim that two rows are alike has a margin. Intervals are not corrected for the number of "
    "claims. Times count only from runs that had their GPU, or 95% of their cores' time, to themselves."
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
    unit = "" if claim.is_ratio else MEASURES[claim.measures[0]].unit
    every = "every interval" if len(claim.pairs) > 1 else "the interval"
    reason = f" ({claim.why})" if claim.why else ""
    test = "An equivalence test. " if claim.is_equivalence else ""
    bounds = f"{bounds_text(claim, claim.holds)}{f' {unit}' if unit else ''}"
    text = f"{test}Holds where {every} of the {claim.effect} {bounds}{reason}."
    if claim.cost:
        text = f"Holds where {every} of the ratio lies above that of the ratio of {MEASURES[claim.cost].heading}"
        text += f" times, did not hold where it lies below{reason}."
    if claim.other_reading:
        text += f" Read otherwise, it {bounds_text(claim, claim.other_reading.holds)} ({claim.other_reading.why})."
    if claim.fresh_from:
        text += f" Decided on seeds from {claim.fresh_from} on."
    return text


def bounds_text(claim: Claim, holds: tuple[float, float]) -> str:
    """'is below 0.02'"""
    lowest, highest = holds
    if highest == math.inf:
        return f"is above {lowest:g}"
    if lowest == -math.inf or (claim.is_ratio and lowest == 0):
        return f"is below {highest:.4g}"
    return f"lies between {lowest:g} and {highest:g}"


def short_bounds(claim: Claim) -> str:
    """The bounds of a claim for a column: '< 0', 'in ±0.02 nats', '> 1.2 ×'; × stands for a ratio."""
    if claim.cost:
        return f"steps × above {MEASURES[claim.cost].heading} ×"
    lowest, highest = claim.holds
    unit = "×" if claim.is_ratio else MEASURES[claim.measures[0]].unit
    unit = "" if not unit or set(claim.holds) <= {0, math.inf, -math.inf} else f" {unit}"  # 0 needs none
    if highest == math.inf:
        return f"> {lowest:g}{unit}"
    if lowest == -math.inf or (claim.is_ratio and lowest == 0):
        return f"< {highest:.4g}{unit}"
    if lowest == -highest:
        return f"in ±{highest:g}{unit}"
    return f"{lowest:g} to {highest:g}{unit}"


def effect_text(effect: Effect | None, measure: str, kind: str, problem="", confidence=CONFIDENCE) -> str:
    """An effect with its interval: '+0.0123 [+0.0045, +0.0201] nats, n = 3'.

    problem: why there is no effect or no interval, in a word. confidence: told where it is not the usual one.
    """
    if effect is None:
        return problem or NOT_RUN
    entry = MEASURES[measure]
    digits = 3 if kind == "ratio" else entry.digits
    sign = "+" if kind == "difference" else ""
    text = f"{effect.mean:{sign}z.{digits}f}"
    if effect.low is not None and problem != NO_SPREAD:
        text += f" [{effect.low:{sign}z.{digits}f}, {effect.high:{sign}z.{digits}f}]"
    text += "" if kind == "ratio" or not entry.unit else f" {entry.unit}"
    text += "" if confidence == CONFIDENCE else f" at {100 * confidence:.3g}%"
    return f"{text}, n = {effect.n}" + (f" ({problem})" if problem else "")


def finding_text(verdict: Verdict, finding: Finding, measure: str) -> str:
    """A pair's effect with the interval that decides, and the cost with which it is compared, if any."""
    claim, text = verdict.claim, deciding_effect_text(finding, verdict.claim, measure)
    if not claim.cost or not finding.effect:
        return text
    cost = effect_text(finding.cost, claim.cost, "ratio", finding.cost_problem)
    return f"steps × {text}; {MEASURES[claim.cost].heading} × {cost}"


def deciding_effect_text(finding: Finding, claim: Claim, measure: str) -> str:
    """A pair's effect, with the interval that decides: where it refutes the claim, the corrected one."""
    if finding.status == NOT_HELD and len(claim.pairs) > 1:
        confidence = 1 - (1 - CONFIDENCE) / len(claim.pairs)
        return effect_text(finding.refuting, measure, claim.effect, finding.problem, confidence)
    return effect_text(finding.effect, measure, claim.effect, finding.problem)


def effect_lines(verdict: Verdict, measure: str, findings: list[Finding]) -> list[str]:
    """The effects on one measure, a line per pair of rows, with the seeds that count in none."""
    claim, comparison, lines = verdict.claim, verdict.comparison, []
    for finding in findings:
        labels = {name: marked_label(comparison, comparison.table.row(name)) for name in finding[:2] if name}
        names = (" ÷ " if claim.effect == "ratio" else " − ").join(labels.values())
        alone = "; ".join(f"{labels[name]} alone has {numbers(seeds)}" for name, seeds in finding.alone.items())
        lines.append(f"{names}: {finding_text(verdict, finding, measure)}{f'; {alone}' if alone else ''}")
    return lines


def numbers(seeds: list[int]) -> str:
    """'seeds 1340, 1341'"""
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def detail_lines(verdict: Verdict) -> list[str]:
    """All effects on the measure that decides, and those of measures that disagree."""
    first = verdict.claim.measures[0]
    lines = [f"{MEASURES[first].heading}:", *effect_lines(verdict, first, verdict.findings[first])]
    if verdict.seen:
        lines += ["Earlier seeds, which do not decide:", *effect_lines(verdict, first, verdict.seen)]
    for measure, status in verdict.dissent.items():
        lines.append(f"but {status} by {MEASURES[measure].heading}:")
        lines += effect_lines(verdict, measure, verdict.findings[measure])
    return lines


def deciding_text(verdict: Verdict) -> str:
    """The effect that decided, in a line: the only one, or the one that contradicts the claim most."""
    claim, comparison = verdict.claim, verdict.comparison
    first = claim.measures[0]
    finding = most_contrary(claim, [finding for finding in verdict.findings[first] if finding.status == verdict.status])
    text = with_label(verdict, finding, finding_text(verdict, finding, first))
    if verdict.status == NOT_RUN:
        text = f"`{comparison.table.command(comparison.scale, claim.seeds)}`"
    parts = [text]
    if verdict.status == UNDECIDED and claim.is_equivalence and finding.effect and finding.effect.low is not None:
        if not finding.effect.low <= claim.no_effect <= finding.effect.high:
            parts.append(f"{'above' if finding.effect.low > claim.no_effect else 'below'} {claim.no_effect:g}")
    if verdict.seen and finding.problem == NO_FRESH_SEEDS:
        seen = most_contrary(claim, verdict.seen)
        parts.append(f"in earlier ones {with_label(verdict, seen, finding_text(verdict, seen, first))}")
    if verdict.other_status not in ("", NOT_RUN, verdict.status):
        parts.append(f"{verdict.other_status} if read {claim.other_reading.why}")
    parts += [f"but {status} by {MEASURES[measure].heading}" for measure, status in verdict.dissent.items()]
    if comparison.table.by_size and verdict.status != NOT_RUN:
        config = comparison.table.row(claim.pairs[0][0]).config
        parts.append(crossing_text(differences_by_size(comparison, first, config)))
    if verdict.is_weak:
        parts.append(power_text(verdict))
    return "; ".join(parts)


def crossing_text(by_size: dict[int, tuple]) -> str:
    """Where the difference of two models is 0: 'difference 0 at 1,200,000 [900,000, 1,700,000] unique characters'."""
    crossing, sizes = crossing_of(by_size), [*by_size]
    if crossing is None:
        return "no single crossing of 0" + (f" from {sizes[0]:,} to {sizes[-1]:,} unique characters" if sizes else "")
    text = f"difference 0 at {rounded(crossing.place)}"
    if crossing.low is not None:
        low = rounded(crossing.low) if crossing.low else f"≤{sizes[0]:,}"
        high = rounded(crossing.high) if crossing.high < math.inf else f"≥{sizes[-1]:,}"
        text += f" [{low}, {high}]"
    return f"{text} unique characters, n = {crossing.n}"


def rounded(count: float) -> str:
    """'1,230,000': three digits that count."""
    return f"{float(f'{count:.3g}'):,.0f}"


def most_contrary(claim: Claim, findings: list[Finding]) -> Finding:
    """One without an interval, since it keeps a claim undecided; else that of the effect nearest to a contradiction."""
    lowest, highest = claim.holds

    def contradiction(finding):
        mean = finding.effect.mean if finding.effect else 0
        has_interval = finding.effect is not None and finding.effect.low is not None
        return not has_interval, max(lowest - mean, mean - highest)

    return max(findings, key=contradiction)


def with_label(verdict: Verdict, finding: Finding, text: str) -> str:
    """The text after its row's label, where a claim is about several pairs or the row has a dagger."""
    pairs, comparison = verdict.claim.pairs, verdict.comparison
    label = marked_label(comparison, comparison.table.row(finding.row))
    if len(pairs) > 1 and len({row for row, _ in pairs}) == 1:
        label = f"against {marked_label(comparison, comparison.table.row(finding.against))}"
    return f"{label}: {text}" if finding.effect and (len(pairs) > 1 or DAGGER in label) else text


def power_text(verdict: Verdict) -> str:
    """What the planned seeds can decide."""
    claim, planned = verdict.claim, verdict.power
    unit = "" if claim.effect == "ratio" else f" {MEASURES[claim.measures[0]].unit}"
    case = "if the rows are alike" if claim.expected is None else f"for the reported {claim.expected:.4g}{unit}"
    enough = f"more than {MOST_SEEDS:,}" if planned.needed is None else f"{planned.needed:,}"
    return f"{SEEDS_FOR_A_VERDICT} seeds have a power of {100 * planned.power:.0f}% {case}; 80% needs {enough}"


def power_lines(verdict: Verdict) -> list[str]:
    """The power with the SD that it rests on; nothing where it is not known, or where the claim is decided."""
    if not verdict.power or verdict.status in (HELD, NOT_HELD):
        return []
    of = "logarithms" if verdict.claim.effect == "ratio" else "effects"
    basis = "" if verdict.power.is_measured else ", assumed from the seeds of one row"
    return [f"{power_text(verdict)} (SD of the per-seed {of} {verdict.power.sd:.2g}{basis})."]


def status_text(verdict: Verdict) -> str:
    """The verdict in two or three words, and whether it is provisional."""
    return verdict.status + (f" (provisional, n = {verdict.seeds})" if verdict.is_provisional else "")


def headline(n_runs: int) -> str:
    """How many runs there are."""
    if not n_runs:
        return "There are no records yet; each line below says how to make them."
    return f"Records of {n_runs} runs. A verdict from fewer than {SEEDS_FOR_A_VERDICT} seeds is provisional."


def machine_names(machines: Iterable[str]) -> dict[str, str]:
    """Kind of machine, as records.machine_of names it -> a short name.

    That is the device, with what not all kinds with the same device have: "AMD EPYC", "NVIDIA H200, compiled".
    """
    devices, names = {}, {}  # device -> [(machine, its other parts)]
    for machine in sorted(machines):
        device, *parts = machine.split(", ")
        devices.setdefault(device, []).append((machine, parts))
    for device, kinds in devices.items():
        shared = set.intersection(*(set(parts) for _, parts in kinds))
        for machine, parts in kinds:
            name = re.sub(r"\((R|TM)\)| Processor$", "", device)
            names[machine] = ", ".join([name, *(part for part in parts if part not in shared)])
    return names


def legend_lines(names: dict[str, str]) -> list[str]:
    """What the short names of sizes and machines stand for. names: from machine_names."""
    sizes = [f"**{name}**: {text.partition(': ')[2]}" for name, text in SCALES.items()]
    machines = [f"**{short}**: {machine.partition(', ')[2]}" for machine, short in names.items()]
    return [*sizes, *machines] if names else []


def verdict_counts(verdicts: list[Verdict]) -> str:
    """How many claims got each verdict."""
    count = {status: sum(verdict.status == status for verdict in verdicts) for status in STATUSES}
    counts = ", ".join(f"{number} {status}" for status, number in count.items())
    return (
        f"Of {len(verdicts)} verdicts: {counts}. A claim has one for each size and kind of machine, and one more tuned."
    )
