"""The two pages of results/: summary.md for GitHub and report.html for a browser."""

import itertools
import re

import papers
from papers.measures import MEASURES
from report import cells, wording
from report.blocks import Folded, Paragraph, Passage, Ruling, Section
from report.captions import first_sentence
from report.page import page
from report.sections import Results
from report.verdicts import NOT_RUN
from report.wording import CLAIMS_BY_SOURCE, HOW_EXPERTS_ARE_READ, HOW_TO_READ

FIGURES_IN_SHORT = (
    "A figure has the first sentence of its caption here. The whole caption, with the number of seeds and the meaning "
    "of every mark, is in `report.html` beside this file."
)
LEGEND = "Sizes and machines"
ONE_ROW = "Tables and figures of the one row"


def summary_markdown(results: Results) -> str:
    """summary.md: a table of all verdicts, then a section a table, and in it one a size and machine."""
    lines = ["# Measured results", "", "Written by `plot_results.py` from the records beside it.", ""]
    lines += [line for text in lead_of(results) for line in (text, "")]
    legend = bullets(wording.legend_lines(results.machine_names))
    lines += [f"{LEGEND}:", "", *legend, FIGURES_IN_SHORT, ""] if legend else []
    lines += ["## Verdicts", "", wording.verdict_counts(results.verdicts), ""]
    decided, missing = by_whether_run(results.verdicts)
    if decided:
        lines += [*verdict_lines(decided, results.machine_names), ""]
    if missing:
        lines += ["<details>", f"<summary>{len(missing)} {NOT_RUN}</summary>", "", *not_run_lines(missing, decided)]
        lines += ["", "</details>", ""]
    names = list(papers.TABLES)
    sections = sorted(results.sections, key=lambda section: names.index(section.comparison.table.name))
    for heading, of in itertools.groupby([*sections, *results.benches], key=lambda section: section.heading):
        of = list(of)
        lines += [f"## {heading}", "", of[0].purpose, ""]
        for section in of:
            lines += [f"### {section.place[0].upper()}{section.place[1:]}", "", section.regime, ""]
            if section in results.benches or not section.is_thin:
                lines += [*grid_lines(section), *picture_lines(section)]
            else:
                lines += bullets(section.lines(told_elsewhere(section, sections)))
    if results.left_out:
        lines += ["## Records left out", "", *bullets(results.left_out)]
    return "\n".join(lines).rstrip() + "\n"


def lead_of(results):
    return wording.headline(results.n_runs), HOW_TO_READ, CLAIMS_BY_SOURCE


def bullets(texts):
    return [*(f"- {text}" for text in texts), ""] if texts else []


def by_whether_run(verdicts):
    """(those on claims of which something was run, the others)"""
    return [[verdict for verdict in verdicts if (verdict.status == NOT_RUN) == missing] for missing in (False, True)]


def verdict_lines(verdicts, machine_names):
    lines = ["| | claim | holds if | scale | verdict | effect |", f"|{' --- |' * 6}"]
    machines = {verdict.comparison.machine for verdict in verdicts}
    for verdict in verdicts:
        claim, comparison = verdict.claim, verdict.comparison
        where = comparison.scale + (f", {machine_names[comparison.machine]}" if len(machines) > 1 else "")
        bounds, status = wording.short_bounds(claim), wording.status_text(verdict)
        cells_of_line = claim.id, claim.sentence, bounds, where, status, wording.deciding_text(verdict)
        lines.append(f"| {' | '.join(cells_of_line)} |")
    return lines


def not_run_lines(missing, decided):
    """The claims of which nothing was run, under the commands that run them.

    missing, decided: verdicts. A claim that was decided elsewhere is told by its id alone.
    """
    claims, commands, groups = {}, {}, {}
    for verdict in missing:
        claims[verdict.claim.id] = verdict.claim
        commands.setdefault(verdict.claim.id, []).append(wording.deciding_text(verdict))
    for id, of in commands.items():
        groups.setdefault(" or ".join(of), []).append(claims[id])
    known = {verdict.claim.id for verdict in decided}
    lines = []
    for command, of in groups.items():
        told = [claim.id for claim in of if claim.id in known]
        texts = [f"{', '.join(told)}: see the table above"] if told else []
        texts += [f"{claim.id}: {claim.sentence}" for claim in of if claim.id not in known]
        lines += [f"{command}:", "", *bullets(texts)]
    return lines[:-1]


def told_elsewhere(section, sections):
    """Measure -> a table that shows it for the same runs as a thin section: one with grids, or an earlier thin one."""
    place = next(i for i, other in enumerate(sections) if other is section)
    others = [other for i, other in enumerate(sections) if i != place and (i < place or not other.is_thin)]
    tables = [other.comparison.table for other in others if section.shares_runs_with(other)]
    return {m: table.name for table in reversed(tables) for m in cells.measures_of(table) if not MEASURES[m].of_table}


def grid_lines(section):
    """The grids, without the name of their table, which is in the section's heading."""
    grids = [grid._replace(title=grid.title.partition(". ")[2]) for grid in section.grids]
    return [line for grid in grids for line in (cells.markdown(grid), "")]


def picture_lines(section):
    """Pictures, each with the kind of picture, "Curves" or "Dots", and the first sentence of its caption."""
    lines, title = [], section.heading.rpartition(" (")[0]
    for name, picture in section.pictures.items():
        kind = re.match(r".*?(?= of |\W*$)", picture.alt)[0]
        lines += [f"![{kind}](figures/{name})", "", first_sentence(picture.caption.removeprefix(f"{title}: ")), ""]
    return lines


def report_html(results: Results) -> str:
    """report.html: the same with every effect behind a verdict, and text on the colours of its experts."""
    sections = []
    for section in results.sections:
        texts = (
            f"{section.purpose} {section.regime} Machine: {section.machine}.",
            *(HOW_EXPERTS_ARE_READ if section.comparison.table.of == "analyses" else ()),
        )
        blocks = [*section.grids, *section.pictures.values()]
        blocks += [passage for analysis in section.shown for passage in passages_of(analysis)]
        if section.is_thin:
            texts, blocks = (*texts, *section.lines({})), [Folded(ONE_ROW, blocks)] if blocks else []
        sections.append(Section(section.title, [*map(Paragraph, texts), *blocks, *ruling_blocks(section.verdicts)]))
    for bench in results.benches:
        text = Paragraph(f"{bench.purpose} {bench.regime}")
        sections.append(Section(bench.title, [text, *bench.pictures.values(), *bench.grids]))
    _, not_run = by_whether_run(results.verdicts)
    if not_run:
        sections.append(Section("Not run yet", ruling_blocks(not_run)))
    if results.left_out:
        sections.append(Section("Records left out", [Paragraph(why) for why in results.left_out]))
    legend = list(map(Paragraph, wording.legend_lines(results.machine_names)))
    lead = [*map(Paragraph, lead_of(results)), *([Folded(LEGEND, legend)] if legend else [])]
    return page("charmoe: what was measured", lead, sections)


def passages_of(analysis):
    """The text that the model wrote, on the colours of its experts, once for every layer with experts."""
    blocks = []
    for layer, experts in zip(analysis["layers"], analysis["sample"]["experts"]):
        title = f"Block {layer['block']}: text written by the model, each character on the colour of its expert"
        blocks.append(Passage(title, analysis["sample"]["text"], experts, layer["n_expert"]))
    label = f"Written by {analysis['title']}, seed {analysis['config']['seed']}"
    return [Paragraph(f"**{label}**, as `python sample.py --show_experts` shows it."), *blocks] if blocks else []


def ruling_blocks(verdicts):
    """The verdicts as blocks of the page; those on claims that were not run are folded."""
    decided, missing = (list(map(ruling_of, of)) for of in by_whether_run(verdicts))
    return [*decided, Folded(f"{len(missing)} {NOT_RUN}", missing)] if missing else decided


def ruling_of(verdict):
    """A verdict as a block of the page."""
    claim, table = verdict.claim, verdict.comparison.table
    source, was_run = papers.SOURCES.get(claim.id[0], table.source), verdict.comparison.machine
    return Ruling(
        claim.id,
        verdict.status,
        claim.sentence,
        wording.deciding_text(verdict),
        wording.short_bounds(claim),
        source="" if source == table.source and was_run else source,
        details=wording.detail_lines(verdict) if was_run else [],
        notes=[wording.rule_text(claim), *wording.power_lines(verdict)],
        provisional=verdict.is_provisional,
    )
