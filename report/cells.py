"""Fills the tables of results: for people as Markdown, LaTeX and HTML (`page.py`), for programs as CSV.

    grid = grid_of(comparison, table.views[0])      # rows and columns that hold a number
    markdown(grid); latex(grid); notes_of(comparison)
    csv_of(comparisons)                     # a line for every row and measure

A cell is mean ± sample SD (n) of the records that count. They were made on a committed tree, at one scale, on one kind
of machine; times count only from runs that had their hardware to themselves.
"""

import csv
import io
import re
import statistics
from collections.abc import Mapping

from papers import tuning
from papers.measures import MEASURES
from papers.table import Comparison, Row, View
from report.blocks import Grid
from report.verdicts import NOT_MEASURED, NOT_RUN, ONE_LENGTH, effect_of, problem_of, why_no_number
from run import records

DAGGER = "†"
NOTHING = "–"


def grid_of(comparison: Comparison, view: View) -> Grid:
    """The cells of one view of a table, without rows and columns that hold no measured number.

    A grid without rows: no row has a number in this view.
    """
    rows, relative = comparison.table.rows_at(comparison.scale), view.relative
    numbers = {(r.name, m) for r in rows for m in view.measures if has_number(own_cell(comparison, r, m, relative))}
    telling = [row for row in rows if row.baseline or not relative]  # a baseline is 1 times itself
    measures = [m for m in view.measures if any((row.name, m) in numbers for row in telling)]
    rows = [row for row in rows if any((row.name, m) in numbers for m in measures)]
    columns, cells = ["row"], [[marked_label(comparison, row)] for row in rows]
    for measure in measures:
        for heading, cell_of in measure_columns(comparison, measure, relative):
            column = [cell_of(row) for row in rows]
            if set(column) != {NOTHING}:
                columns.append(heading)
                cells = [[*before, cell] for before, cell in zip(cells, column)]
    notes = ["ratio of geometric means over the seeds that both rows have, with its 95% interval"] if relative else []
    return Grid(f"{comparison.table.name}. {view.title}", columns, cells, notes)


def own_cell(comparison, row, measure, relative) -> str:
    """What was measured of a row, or its ratio to its baseline."""
    return (relative_cell if relative else value_cell)(comparison, row, measure)


def has_number(cell: str) -> bool:
    """Whether a cell holds a number, not a dash or the reason why there is none."""
    return any(letter.isdigit() for letter in cell)


def measure_columns(comparison, measure, relative):
    """(heading, row -> cell) of our numbers and, where the paper prints any, of the published ones."""
    entry = MEASURES[measure]
    published = [row for row in comparison.table.rows_at(comparison.scale) if measure in row.published]
    yield heading_of(entry, relative), lambda row: own_cell(comparison, row, measure, relative)
    if relative:
        if len(published) > 1:
            yield "published ÷ baseline", lambda row: published_ratio_cell(comparison.table, row, measure)
        return
    if not published:
        return
    size = "" if comparison.scale == "paper" else " (paper size)"
    yield f"published{size}", lambda row: f"{row.published[measure]:,}" if measure in row.published else NOTHING
    if comparison.scale == "paper":  # another size says nothing about an absolute number
        yield "ours − published", lambda row: distance_cell(comparison, row, measure)


def heading_of(entry, relative=False) -> str:
    if relative:
        return f"{entry.heading} ÷ baseline"
    return f"{entry.heading}, {entry.unit}" if entry.unit else entry.heading


def rows_with_records(comparison: Comparison) -> list[Row]:
    """The rows with a record that counts, or with losses from which a learning rate is chosen."""
    choices = comparison.choices
    chosen = {name for name, choice in choices.items() if any(choice.losses.values())}
    rows = comparison.table.rows_at(comparison.scale)
    return [row for row in rows if comparison.cells[row.name] or row.name in chosen]


def line_of(comparison: Comparison, row: Row, told: Mapping[str, str]) -> str:
    """All numbers of a row in a line, for a table that has no other row with records.

    told: measure -> another table, which shows that measure of the same runs.
    """
    parts, shown, elsewhere = [], set(), set()
    for view in comparison.table.views:
        found = []
        for measure in view.measures:
            cell = value_cell(comparison, row, measure)
            if not has_number(cell) or measure in shown:
                continue
            shown.add(measure)
            if measure in told:
                elsewhere.add(told[measure])
                continue
            beside = ""
            if comparison.scale == "paper" and measure in row.published:
                distance = distance_cell(comparison, row, measure)
                beside = f" (published {row.published[measure]:,}, ours − published {distance})"
            found.append(f"{heading_of(MEASURES[measure])}: {cell}{beside}")
        parts += [f"**{view.title}:** {'; '.join(found)}."] if found else []
    if elsewhere:
        tables = f"table{'' if len(elsewhere) == 1 else 's'} {' and '.join(sorted(elsewhere))}"
        parts.append(f"Its {'other ' if parts else ''}numbers stand in {tables}.")
    return f"Only “{marked_label(comparison, row)}” was run here. {' '.join(parts)}".rstrip()


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
        return "1" if comparison.cells[row.name] else NOT_RUN
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


def notes_of(comparison: Comparison) -> list[str]:
    """Notes that stand once, below a table's last grid: daggers, left-out times and runs, choices."""
    rows, notes = comparison.table.rows_at(comparison.scale), []
    if any(DAGGER in marked_label(comparison, row) for row in rows):
        notes.append(f"{DAGGER} a text that is not the published data set, or routing that sees later characters")
    notes += notes_on_times(comparison)
    for row in rows:
        for record, why in comparison.apart[row.name]:
            seed = record["config"]["seed"]
            loss = record["clean"]["best"]["nats"] if "clean" in record else record["nats"]  # of a run or an analysis
            notes.append(f"not counted: {row.label}, seed {seed}, {loss:.4f} nats; {why}")
    return notes + notes_on_choices(comparison)


def notes_on_missing(comparison: Comparison) -> list[str]:
    """The rows that were run on no machine, by name where others were run, with the command that runs them."""
    begun, table, scale = rows_with_records(comparison), comparison.table, comparison.scale
    here = [row.label for row in begun if not comparison.cells[row.name] and row.name not in comparison.elsewhere]
    seen = {row.name for row in begun} | comparison.elsewhere | {name for name, of in comparison.apart.items() if of}
    nowhere = [row.label for row in table.rows_at(scale) if row.name not in seen]
    if nowhere and len(begun) == 1:
        return [f"To run what is missing: `{table.command(scale)}`"]
    notes = [f"Not run on seeds from {tuning.FIRST_FRESH} on: {'; '.join(here)}."] if here else []
    notes += [f"Not run: {'; '.join(nowhere)}."] if nowhere else []
    return [*notes[:-1], f"{notes[-1]} `{table.command(scale)}`"] if notes else []


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


def notes_on_times(comparison):
    """How many runs the columns of times leave out, a note a reason."""
    found = {}  # reason -> (left out, of how many) -> headings
    for entry in (MEASURES[measure] for measure in measures_of(comparison.table) if MEASURES[measure].timed):
        runs, alike = (
            [record for row in comparison.cells for record in of(row) if entry.read(record) is not None]
            for of in (comparison.cells.get, comparison.timed_alike)
        )
        shared = sum(not entry.is_exclusive(record) for record in alike)
        reasons = {"not known to be alone on their hardware": shared, "without captured steps": len(runs) - len(alike)}
        for reason, left in reasons.items():
            if left:
                found.setdefault(reason, {}).setdefault((left, len(runs)), []).append(entry.heading)
    counts = {
        reason: "; ".join(f"{left} of {n} ({', '.join(of)})" for (left, n), of in counted.items())
        for reason, counted in found.items()
    }
    return [f"times left out, of runs {reason}: {text}" for reason, text in counts.items()]


def measures_of(table) -> list[str]:
    """The measures of all of a table's views, each once."""
    return list(dict.fromkeys(measure for view in table.views for measure in view.measures))


# ---------------------------------------------------------------------------------------------------------------------
# As text


SEEDS = re.compile(r" \((?:n = )?(\d+)\)$")  # at the end of a cell, see value_cell


def markdown(grid: Grid) -> str:
    """A table as Markdown, with the notes as a list below; a number of seeds that all cells share is told once."""
    title, rows = f"**{grid.title}**", grid.rows
    counts = {found[1] for _, *cells in rows for cell in cells if (found := SEEDS.search(cell))}
    if len(counts) == 1:
        title += f" (n = {counts.pop()})"
        rows = [[label, *(SEEDS.sub("", cell) for cell in cells)] for label, *cells in rows]

    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|-|" + "-:|" * (len(grid.columns) - 1)  # labels to the left, numbers to the right
    body = [line(grid.columns), rule, *(line(row) for row in rows)]
    notes = ["", *(f"- {note}" for note in grid.notes)] if grid.notes else []
    return "\n".join([title, "", *body, *notes])


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
        for row in table.rows_at(comparison.scale):
            found = comparison.cells[row.name]
            comparable = all(records.is_comparable(record) for record in found) if found else ""
            for measure in measures_of(table):
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
