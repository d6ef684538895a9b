"""Comparisons -> tables: for people as Markdown, LaTeX and HTML (`report.py`), for programs as CSV.

    grid = grid_of(comparison, table.views[0])
    markdown(grid); latex(grid)
    csv_of(comparisons)                     # every measure of every view, a line each
    speed_grids(bench); speed_csv(benches)  # the same of benches: records that bench_records.py reads

A cell is mean ± sample SD (n) of the records that count: made on a committed tree, at one scale, on one kind of
machine, and for times on hardware that others left alone. In the tables of a bench it is the median of its timings,
with their 10th and 90th percentile.
"""

import csv
import io
import statistics

from papers.experiments import MEASURES, Comparison, View
from report.page import Grid
from report.verdicts import effect_of
from run import records
from speed import bench_records

DAGGER = "†"
NOT_RUN, NOT_ALONE, NOTHING = "not run", "not timed alone", "–"


def grid_of(comparison: Comparison, view: View) -> Grid:
    table, scale = comparison.table, comparison.scale
    rows = table.rows_at(scale)
    columns, cells = ["row"], [[labelled(comparison, row)] for row in rows]
    for measure in view.measures:
        for heading, cell_of in columns_of(comparison, measure, view.relative):
            columns.append(heading)
            for cell, row in zip(cells, rows):
                cell.append(cell_of(row))
    return Grid(f"{table.name}. {view.title}", columns, cells, notes_of(comparison, view))


def columns_of(comparison, measure, relative):
    """(heading, row -> cell): ours, and beside it what was published, where anything was."""
    entry = MEASURES[measure]
    heading = f"{entry.heading}, {entry.unit}" if entry.unit else entry.heading
    published = [row for row in comparison.table.rows_at(comparison.scale) if measure in row.published]
    if relative:
        yield f"{entry.heading} ÷ baseline", lambda row: relative_cell(comparison, row, measure)
        if len(published) > 1:
            yield "the same, published", lambda row: published_ratio(comparison.table, row, measure)
        return
    yield heading, lambda row: value_cell(comparison, row, measure)
    if not published:
        return
    size = "" if comparison.scale == "paper" else " (paper size)"
    yield f"published{size}", lambda row: f"{row.published[measure]:,}" if measure in row.published else NOTHING
    if comparison.scale == "paper":  # another size says nothing about an absolute number
        yield "ours − published", lambda row: distance_cell(comparison, row, measure)


def labelled(comparison, row):
    found = comparison.cells[row.name] + [record for record, _ in comparison.apart[row.name]]
    return row.label + (f" {DAGGER}" if any(not records.is_comparable(record) for record in found) else "")


def value_cell(comparison, row, measure):
    values, entry = list(comparison.values(row.name, measure).values()), MEASURES[measure]
    if not values:
        return nothing_because(comparison, row, entry)
    mean = f"{statistics.fmean(values):,.{entry.digits}f}"
    if len(values) == 1:
        return f"{mean} (n = 1)"
    spread = statistics.stdev(values)
    if spread == 0:  # a count
        return mean
    return f"{mean} ± {spread:,.{entry.digits}f} ({len(values)})"


def nothing_because(comparison, row, entry):
    if not comparison.cells[row.name]:
        return NOT_RUN
    has_any = any(entry.read(record) is not None for record in comparison.cells[row.name])
    return NOT_ALONE if has_any else NOTHING


def relative_cell(comparison, row, measure):
    """The ratio to the row's baseline, with its 95% interval."""
    if not row.baseline:
        return "1"
    effect = effect_of(comparison, measure, row.name, row.baseline, "ratio")
    if effect is None:
        return nothing_because(comparison, row, MEASURES[measure])
    return f"{effect.mean:.3f}" + ("" if effect.low is None else f" [{effect.low:.3f}, {effect.high:.3f}]")


def published_ratio(table, row, measure):
    if not row.baseline:
        return "1"
    if measure not in row.published:
        return NOTHING
    return f"{row.published[measure] / table.row(row.baseline).published[measure]:.3f}"


def distance_cell(comparison, row, measure):
    values = list(comparison.values(row.name, measure).values())
    if not values or measure not in row.published:
        return NOTHING
    return f"{statistics.fmean(values) - row.published[measure]:+,.{MEASURES[measure].digits}f}"


def notes_of(comparison, view):
    """What a reader of the table must know."""
    table, scale, notes = comparison.table, comparison.scale, []
    rows = table.rows_at(scale)
    if any(DAGGER in labelled(comparison, row) for row in rows):
        notes.append(f"{DAGGER} a text that is not the published data set, or routing that sees later characters")
    if view.relative:
        notes.append("ratio of geometric means, with its 95% interval")
    for measure in view.measures:
        note = note_of_times(comparison, MEASURES[measure])
        notes += [note] if note else []
    for row in rows:
        for record, why in comparison.apart[row.name]:
            seed, loss = (
                record["config"]["seed"],
                record["clean"]["best"]["nats"] if "clean" in record else record["nats"],
            )
            notes.append(f"not counted: {row.label}, seed {seed}, {loss:.4f} nats; {why}")
    missing = [row.label for row in rows if not comparison.cells[row.name]]
    if missing:
        names = "; ".join(missing) if len(missing) <= 5 else f"{len(missing)} of {len(rows)} rows"
        notes.append(f"not run: {names}: `{table.command(scale)}`")
    return notes


def note_of_times(comparison, entry):
    """How many runs' times are left out of a column, if any are."""
    if not entry.timed:
        return ""
    runs = [record for of_row in comparison.cells.values() for record in of_row if entry.read(record) is not None]
    left = sum(not entry.is_exclusive(record) for record in runs)
    return (
        f"{entry.heading}: {left} of {len(runs)} runs not known to be alone on their cores are left out" if left else ""
    )


# ---------------------------------------------------------------------------------------------------------------------
# Speed

TASKS = {  # task -> (title, heading of its time)
    "train": ("Training: one update", "ms an update"),
    "prefill": ("Reading a prompt of half the context", "ms a batch"),
    "decode": ("Decoding: a step gives each sequence a character", "ms a step"),
}


def speed_grids(bench: dict) -> list[Grid]:
    """Of a bench: a table a task that it measured, and one of what ran."""
    grids = [task_grid(bench, task) for task in TASKS if bench_records.batch_sizes(bench, task)]
    grids += [papers_grid(bench)] if bench_records.batch_sizes(bench, "papers") else []
    return [*grids, what_ran_grid(bench)]


def task_grid(bench, task):
    """A row a batch size and model: time, ratio to dense, speed, how near the floor."""
    title, time = TASKS[task]
    found, batches = bench_records.measurements_of(bench), bench_records.batch_sizes(bench, task)
    columns = ["time ÷ dense's", time]
    columns += ["characters/s"] if batches == [1] or task == "train" else ["characters/s a sequence", "in total"]
    columns.append("of the floor")
    has_memory = any(one["peak_memory_bytes"] is not None for one in found.values())
    columns += ["peak memory, MiB"] if has_memory else []
    rows = []
    for batch in batches:
        for name, model in bench["models"].items():
            if (name, task, batch) in found:
                label = model["title"] + (f", batch {batch}" if len(batches) > 1 else "")
                cells = speed_cells(found[name, task, batch])
                rows.append([label, *(cells[column] for column in columns)])
    counts = [one["seconds"]["n"] for one in found.values() if one["task"] == task]
    notes = [f"n = {bench_records.from_to(counts)} timings each"]
    notes += bench_records.note_of_references(bench) if task == "decode" else []
    return Grid(f"Speed. {title}", ["model", *columns], rows, notes)


def speed_cells(one):
    """Heading -> cell, of one measurement."""
    total, seconds, peak = one["tokens_per_second"], one["seconds"], one["peak_memory_bytes"]
    return {
        **{heading: bench_records.spread_text(seconds, 1000) for _, heading in TASKS.values()},
        "time ÷ dense's": ratio_cell(one),
        **dict.fromkeys(("characters/s", "in total"), f"{total:,.0f}"),
        "characters/s a sequence": f"{total / one['batch_size']:,.0f}",
        "of the floor": f"{one['floor']['seconds'] / seconds['median']:.1%}",
        "peak memory, MiB": NOTHING if peak is None else f"{peak / 2**20:,.0f}",
    }


def papers_grid(bench):
    """What the papers print, measured their way, beside theirs; last, their rows that the bench has no model for."""
    found, table, size = (
        bench_records.measurements_of(bench),
        bench_records.PUBLISHED,
        "" if bench["size"] == "paper" else " (paper size)",
    )
    columns = ["characters/s", "speed ÷ dense's", "training time ÷ dense's"]
    theirs = ("characters/s", "speed ÷ baseline's", "training time ÷ baseline's")
    columns += [f"published: {column}{size}" for column in theirs]
    row_of = {name: bench_records.published_row(model) for name, model in bench["models"].items()}
    rows = [
        [model["title"], *papers_cells(found, name), *published_cells(row_of[name])]
        for name, model in bench["models"].items()
    ]
    there = [row.name for row in row_of.values() if row]
    alone = [row for row in table.rows if row.name not in there]
    rows += [[f"{row.label}, published", *[NOTHING] * 3, *published_cells(row)] for row in alone]
    counts = [one["seconds"]["n"] for one in found.values() if one["task"] == "papers"]
    lengths = [one["tokens"] for one in found.values() if one["task"] == "papers"]
    notes = [
        f"n = {bench_records.from_to(counts)} texts of {bench_records.from_to(lengths)} characters; "
        "training time: of the updates"
    ]
    notes += [f"published: {table.source}, one machine, n not told"]
    notes += [f"{bench['models'][name]['title']}: published as {row.label}" for name, row in row_of.items() if row]
    title = "Speed. The papers' way to write: eagerly, without a cache, one text at a time"
    return Grid(title, ["model", *columns], rows, notes)


def papers_cells(found, name):
    """Of one model: speed of inference their way, the same over dense's, training time over dense's."""
    wrote = found.get((name, "papers", 1))
    trained = next((one for key, one in found.items() if key[:2] == (name, "train")), None)
    total = f"{wrote['tokens_per_second']:,.1f}" if wrote else NOTHING
    return [total, ratio_cell(wrote, bench_records.inverse_ratio), ratio_cell(trained)]


def ratio_cell(one, turned=dict):
    """The ratio of a measurement to dense's, which is 1 of itself."""
    if one is None:
        return NOTHING
    return bench_records.spread_text(turned(one["ratio"])) if one["ratio"] else "1"


def published_cells(row):
    """Speed of inference, the same over the baseline's, and training time over the baseline's."""
    if row is None:
        return [NOTHING] * 3
    ratios = [
        published_ratio(bench_records.PUBLISHED, row, measure) for measure in ("inference_speed", "train_seconds")
    ]
    return [f"{row.published['inference_speed']:,.1f}", *ratios]


def what_ran_grid(bench):
    rows, checks = [], {}
    for model in bench["models"].values():
        counts, backend = model["parameters"], model["backend"]
        seconds = [model["compile_seconds"][task] for task in ("train", "decode")]
        compiling = " / ".join(NOTHING if value is None else f"{value:.1f}" for value in seconds)
        cells = [f"{counts['total']:,}", f"{counts['active']:,}", backend["train"], backend["decode"], compiling]
        rows.append([model["title"], *cells, str(len(model["checks"]))])
        for check in model["checks"]:
            checks.setdefault(check["what"], []).append(check)
    notes = []
    for what, of in checks.items():
        worst = max(of, key=lambda check: check["error"] / check["limit"] if check["limit"] else 0)
        notes.append(
            f"checked, {what}: largest error {worst['error']:.1e}, allowed {worst['limit']:.0e} (n = {len(of)})"
        )
    columns = ["model", "parameters", "active per character", "training ran on", "decoding ran on"]
    return Grid("Speed. What ran", [*columns, "compiling: training / decoding, s", "checks passed"], rows, notes)


SPEED_COLUMNS = (
    "size", "machine", "commit", "uncommitted_changes", "alone", "model", "title", "task", "batch_size", "characters",
    "seconds", "seconds_p10", "seconds_p90", "n", "ratio", "ratio_p10", "ratio_p90", "ratio_n",
    "characters_per_second", "floor_seconds", "peak_memory_bytes",
)  # fmt: skip


def speed_csv(benches: list[dict]) -> str:
    """Every measurement, unrounded; what is not known is empty."""
    lines = []
    for bench in benches:
        git, machine = bench["git"], records.machine_of(bench)
        for one in bench["measurements"]:
            ratio = one["ratio"] or dict.fromkeys(("median", "p10", "p90", "n"))
            lines.append(
                [
                    bench["size"],
                    machine,
                    git["commit"],
                    git["dirty"],
                    bench_records.is_exclusive(bench),
                    one["model"],
                    bench["models"][one["model"]]["title"],
                    one["task"],
                    one["batch_size"],
                    one["tokens"],
                    *(one["seconds"][key] for key in ("median", "p10", "p90", "n")),
                    *(ratio[key] for key in ("median", "p10", "p90", "n")),
                    one["tokens_per_second"],
                    one["floor"]["seconds"],
                    one["peak_memory_bytes"],
                ]
            )
    return written(SPEED_COLUMNS, lines)


# ---------------------------------------------------------------------------------------------------------------------
# As text


def markdown(grid: Grid) -> str:
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
        return " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    return "\n".join(
        [
            f"% {grid.title}",
            *(f"% {note}" for note in grid.notes),
            rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}",
            r"\toprule",
            line(grid.columns),
            r"\midrule",
            *(line(row) for row in grid.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


CSV_COLUMNS = (
    "table", "scale", "machine", "row", "label", "measure", "unit", "mean", "sample_sd", "n", "published", "comparable",
)  # fmt: skip


def csv_of(comparisons: list[Comparison]) -> str:
    """Every measure of every row, unrounded; what is not known is empty."""
    lines = []
    for comparison in comparisons:
        table = comparison.table
        measures = dict.fromkeys(measure for view in table.views for measure in view.measures)
        for row in table.rows_at(comparison.scale):
            found = comparison.cells[row.name]
            comparable = all(records.is_comparable(record) for record in found) if found else ""
            for measure in measures:
                values = list(comparison.values(row.name, measure).values())
                lines.append(
                    [
                        table.name,
                        comparison.scale,
                        comparison.machine,
                        row.name,
                        row.label,
                        measure,
                        MEASURES[measure].unit,
                        f"{statistics.fmean(values):.10g}" if values else "",
                        f"{statistics.stdev(values):.10g}" if len(values) > 1 else "",
                        len(values),
                        row.published.get(measure, ""),
                        comparable,
                    ]
                )
    return written(CSV_COLUMNS, lines)


def written(columns, lines):
    """The text of a CSV file."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *lines])
    return out.getvalue()
