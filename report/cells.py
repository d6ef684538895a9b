"""Fills the tables of results: for people as Markdown, LaTeX and HTML (`page.py`), for programs as CSV.

    grid = grid_of(comparison, table.views[0])
    markdown(grid); latex(grid)
    csv_of(comparisons)                     # a line for every row and measure

A cell is mean ± sample SD (n) of the records that count. They were made on a committed tree, at one scale, on one kind
of machine; times count only from runs that had their hardware to themselves.
"""

import csv
import io
import re
import statistics

from papers import tuning
from papers.measures import MEASURES
from papers.table import Comparison, View
from report.blocks import Grid
from report.verdicts import NOT_MEASURED, NOT_RUN, ONE_LENGTH, effect_of, problem_of, why_no_number
from run import records

DAGGER = "†"
NOTHING = "–"


def grid_of(comparison: Comparison, view: View) -> Grid:
    """The cells of one view of a table."""
    table, scale = comparison.table, comparison.scale
    rows = table.rows_at(scale)
    columns, cells = ["row"], [[marked_label(comparison, row)] for row in rows]
    for measure in view.measures:
        for heading, cell_of in measure_columns(comparison, measure, view.relative):
            columns.append(heading)
            for cell, row in zip(cells, rows):
                cell.append(cell_of(row))
    return Grid(f"{table.name}. {view.title}", columns, cells, notes_of(comparison, view))


def measure_columns(comparison, measure, relative):
    """(heading, row -> cell) of our numbers and, where the paper prints any, of the published ones."""
    entry = MEASURES[measure]
    heading = f"{entry.heading}, {entry.unit}" if entry.unit else entry.heading
    published = [row for row in comparison.table.rows_at(comparison.scale) if measure in row.published]
    if relative:
        yield f"{entry.heading} ÷ baseline", lambda row: relative_cell(comparison, row, measure)
        if len(published) > 1:
            yield "published ÷ baseline", lambda row: published_ratio_cell(comparison.table, row, measure)
        return
    yield heading, lambda row: value_cell(comparison, row, measure)
    if not published:
        return
    size = "" if comparison.scale == "paper" else " (paper size)"
    yield f"published{size}", lambda row: f"{row.published[measure]:,}" if measure in row.published else NOTHING
    if comparison.scale == "paper":  # another size says nothing about an absolute number
        yield "ours − published", lambda row: distance_cell(comparison, row, measure)


def marked_label(comparison, row):
    """A row's label, with a dagger where its records cannot be compared."""
    found = comparison.cells[row.name] + [record for record, _ in comparison.apart[row.name]]
    return row.label + (f" {DAGGER}" if any(not records.is_comparable(record) for record in found) else "")


def value_cell(comparison, row, measure):
    values, entry = list(comparison.values(row.name, measure).values()), MEASURES[measure]
    if not values:
        return empty_cell(comparison, row, measure)
    mean = f"{statistics.fmean(values):,.{entry.digits}f}"
    if len(values) == 1:
        return f"{mean} (n = 1)"
    spread = statistics.stdev(values)
    if spread == 0:  # a count
        return mean
    return f"{mean} ± {spread:,.{entry.digits}f} ({len(values)})"


def empty_cell(comparison, row, measure):
    """Why a row has no number of a measure."""
    if not comparison.cells[row.name]:
        return NOT_RUN
    problem = why_no_number(comparison, measure, row.name)
    return NOTHING if problem in (NOT_MEASURED, ONE_LENGTH) else problem


def relative_cell(comparison, row, measure):
    """The ratio to the row's baseline, with its 95% interval."""
    if not row.baseline:
        return "1"
    effect = effect_of(comparison, measure, row.name, row.baseline, "ratio")
    if effect is None:
        problem = problem_of(comparison, measure, row.name, row.baseline, "ratio")
        return NOTHING if problem == NOT_MEASURED else problem
    return f"{effect.mean:.3f}" + ("" if effect.low is None else f" [{effect.low:.3f}, {effect.high:.3f}]")


def published_ratio_cell(table, row, measure):
    if not row.baseline:
        return "1"
    pair = table.published_pair(row, measure)
    return f"{pair[0] / pair[1]:.3f}" if pair else NOTHING


def distance_cell(comparison, row, measure):
    values = list(comparison.values(row.name, measure).values())
    if not values or measure not in row.published:
        return NOTHING
    return f"{statistics.fmean(values) - row.published[measure]:+,.{MEASURES[measure].digits}f}"


def notes_of(comparison, view):
    """Notes under a table: daggers, left-out times and runs, rows that were not run."""
    table, scale, notes = comparison.table, comparison.scale, []
    rows = table.rows_at(scale)
    if any(DAGGER in marked_label(comparison, row) for row in rows):
        notes.append(f"{DAGGER} a text that is not the published data set, or routing that sees later characters")
    if view.relative:
        notes.append("ratio of geometric means over the seeds that both rows have, with its 95% interval")
    notes += filter(None, (note_on_times(comparison, measure) for measure in view.measures))
    for row in rows:
        for record, why in comparison.apart[row.name]:
            seed = record["config"]["seed"]
            loss = record["clean"]["best"]["nats"] if "clean" in record else record["nats"]  # of a run or an analysis
            notes.append(f"not counted: {row.label}, seed {seed}, {loss:.4f} nats; {why}")
    notes += notes_on_choices(comparison)
    missing = [row.label for row in rows if not comparison.cells[row.name]]
    if missing:
        names = "; ".join(missing) if len(missing) <= 5 else f"{len(missing)} of {len(rows)} rows"
        notes.append(f"not run: {names}: `{table.command(scale)}`")
    return notes


def notes_on_choices(comparison):
    """How tuned rows were chosen, and which choices are at an end of their candidates."""
    if not comparison.choices:
        return []
    labels = {row.name: row.label for row in comparison.table.rows}
    first, last = tuning.CHOOSING[0], tuning.CHOOSING[-1]
    notes = [
        f"chosen: of the two best candidates on seed {first}, the better on seeds {first} to {last}; the losses at the "
        f"chosen rate are those of seeds from {tuning.FIRST_FRESH} on"
    ]
    at_edge = [labels[name] for name, choice in comparison.choices.items() if choice.name and choice.is_at_edge]
    if at_edge:
        notes.append(
            f"the choice is the first or last that was tried, a better one may lie beyond: {'; '.join(at_edge)}"
        )
    return notes


def note_on_times(comparison, measure):
    """How many runs a column of times leaves out, and why; empty where none."""
    entry = MEASURES[measure]
    if not entry.timed:
        return ""
    runs, alike = (
        [record for row in comparison.cells for record in of(row) if entry.read(record) is not None]
        for of in (comparison.cells.get, comparison.timed_alike)
    )
    shared = sum(not entry.is_exclusive(record) for record in alike)
    counts = {
        "not known to be alone on their hardware": shared,
        "whose steps were not captured": len(runs) - len(alike),
    }
    left = " and ".join(f"{count} of {len(runs)} runs {why}" for why, count in counts.items() if count)
    return f"{entry.heading}: {left} are left out" if left else ""


# ---------------------------------------------------------------------------------------------------------------------
# As text


def markdown(grid: Grid) -> str:
    """A table as Markdown, with the notes as a list below."""

    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "| --- " + "| ---: " * (len(grid.columns) - 1) + "|"
    body = [line(grid.columns), rule, *(line(row) for row in grid.rows)]
    notes = ["", *(f"- {note}" for note in grid.notes)] if grid.notes else []
    return "\n".join([f"**{grid.title}**", "", *body, *notes])


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "÷": r"$\div$", "−": "$-$", "–": "--",
    "†": r"\textsuperscript{\dag}", "×": r"$\times$",
}  # fmt: skip


def latex(grid: Grid) -> str:
    """A table for \\usepackage{booktabs}; the notes as comments."""

    def line(cells):
        cells = (re.sub(r"(?<!\w)-(?=\d)", "−", cell) for cell in cells)  # of a number
        return " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    comments = [f"% {text}" for text in (grid.title, *grid.notes)]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}"
    body = [r"\toprule", line(grid.columns), r"\midrule", *map(line, grid.rows), r"\bottomrule"]
    return "\n".join([*comments, begin, *body, r"\end{tabular}"])


CSV_COLUMNS = (
    "table", "scale", "machine", "row", "label", "measure", "unit", "mean", "sample_sd", "n", "published", "comparable",
)  # fmt: skip


def csv_of(comparisons: list[Comparison]) -> str:
    """Every measure of every row, unrounded; unknown values are empty."""
    lines = []
    for comparison in comparisons:
        table = comparison.table
        place = table.name, comparison.scale, comparison.machine
        measures = dict.fromkeys(measure for view in table.views for measure in view.measures)
        for row in table.rows_at(comparison.scale):
            found = comparison.cells[row.name]
            comparable = all(records.is_comparable(record) for record in found) if found else ""
            for measure in measures:
                values = list(comparison.values(row.name, measure).values())
                mean = f"{statistics.fmean(values):.10g}" if values else ""
                sd = f"{statistics.stdev(values):.10g}" if len(values) > 1 else ""
                subject = *place, row.name, row.label, measure, MEASURES[measure].unit
                lines.append([*subject, mean, sd, len(values), row.published.get(measure, ""), comparable])
    return csv_text(CSV_COLUMNS, lines)


def csv_text(columns, lines):
    """The text of a CSV file."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *lines])
    return out.getvalue()
