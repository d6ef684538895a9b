"""The two pages of results/: summary.md for GitHub and report.html for a browser."""

import papers
from report import cells, wording
from report.blocks import Folded, Paragraph, Passage, Ruling, Section
from report.page import page
from report.sections import Results
from report.verdicts import NOT_RUN
from report.wording import CLAIMS_BY_SOURCE, HOW_EXPERTS_ARE_READ, HOW_TO_READ


def summary_markdown(results: Results) -> str:
    """summary.md: a table of all verdicts, then the sections."""
    lines = ["# Measured results", "", "Written by `plot_results.py` from the records beside it.", ""]
    lines += [wording.headline(results.n_runs, results.machines), "", HOW_TO_READ, "", CLAIMS_BY_SOURCE, ""]
    lines += ["## Verdicts", "", wording.verdict_counts(results.verdicts), ""]
    decided, missing = by_whether_run(results.verdicts)
    if decided:
        lines += [*verdict_lines(decided), ""]
    if missing:
        lines += ["<details>", f"<summary>{len(missing)} {NOT_RUN}</summary>", "", *verdict_lines(missing)]
        lines += ["", "</details>", ""]
    for section in results.sections:
        lines += [f"## {section.title}", "", section.description, "", *grid_lines(section), *picture_lines(section)]
    for bench in results.benches:
        lines += [f"## {bench.title}", "", bench.description, "", *picture_lines(bench), *grid_lines(bench)]
    if results.left_out:
        lines += ["## Records left out", "", *(f"- {why}" for why in results.left_out)]
    return "\n".join(lines).rstrip() + "\n"


def by_whether_run(verdicts):
    """(those on claims of which something was run, the others)"""
    return [[verdict for verdict in verdicts if (verdict.status == NOT_RUN) == missing] for missing in (False, True)]


def verdict_lines(verdicts):
    lines = ["| | claim | scale | verdict | effect |", "| --- | --- | --- | --- | --- |"]
    machines = {verdict.comparison.machine for verdict in verdicts if verdict.comparison.machine}
    for verdict in verdicts:
        claim, comparison = verdict.claim, verdict.comparison
        where = comparison.scale + (f", {comparison.machine}" if len(machines) > 1 and comparison.machine else "")
        status, effect = wording.status_text(verdict), wording.deciding_text(verdict)
        lines.append(f"| {claim.id} | {claim.sentence} | {where} | {status} | {effect} |")
    return lines


def grid_lines(section):
    return [line for grid in section.grids for line in (cells.markdown(grid), "")]


def picture_lines(section):
    lines = []
    for name, picture in section.pictures.items():
        lines += [f"![{picture.alt}](figures/{name})", "", picture.caption, ""]
    return lines


def report_html(results: Results) -> str:
    """report.html: the same with every effect behind a verdict, and text on the colours of its experts."""
    sections = []
    for section in results.sections:
        texts = section.description, *(HOW_EXPERTS_ARE_READ if section.comparison.table.of == "analyses" else ())
        blocks = [*map(Paragraph, texts), *section.grids, *section.pictures.values()]
        blocks += [passage for analysis in section.shown for passage in passages_of(analysis)]
        blocks += ruling_blocks(section.verdicts)
        sections.append(Section(section.title, blocks))
    for bench in results.benches:
        sections.append(Section(bench.title, [Paragraph(bench.description), *bench.pictures.values(), *bench.grids]))
    _, not_run = by_whether_run(results.verdicts)
    if not_run:
        sections.append(Section("Not run yet", ruling_blocks(not_run)))
    if results.left_out:
        sections.append(Section("Records left out", [Paragraph(why) for why in results.left_out]))
    lead = wording.headline(results.n_runs, results.machines), HOW_TO_READ, CLAIMS_BY_SOURCE
    return page("charmoe: what was measured", list(map(Paragraph, lead)), sections)


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
        source="" if source == table.source and was_run else source,
        details=wording.detail_lines(verdict) if was_run else [],
        notes=[wording.rule_text(claim), *wording.power_lines(verdict)],
        provisional=verdict.is_provisional,
    )
