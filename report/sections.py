"""The sections of the report: one for each table, scale and machine, and one for each bench, with grids and pictures.

    results = results_of(records, analyses, benches, left_out)
    results.sections[0].title, results.verdicts[0].status

`summary.py` writes them as pages; plot_results.py writes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import papers
from papers.table import SCALES, Comparison, Table, gather
from papers.tuned import TUNED
from report import cells, figures_of_run, figures_of_speed, speed_cells, style, wording
from report.blocks import Grid, Picture
from report.figures import FIGURES
from report.style import Drawing
from report.verdicts import NOT_RUN, Verdict, decide
from run import records
from speed import bench_records
from support import console


class Results(NamedTuple):
    """Everything that the pages tell."""

    sections: list[TableSection]
    benches: list[BenchSection]
    verdicts: list[Verdict]  # on every claim at every scale it is made for, in the order of CLAIMS
    n_runs: int
    left_out: list[str]  # a line for each file that does not count

    @property
    def machine_names(self) -> dict[str, str]:
        """The machines on which tables were run -> their short names."""
        return wording.machine_names({section.comparison.machine for section in self.sections})


def results_of(found: list[dict], analysed: list[dict], benches: list[dict], left_out: list[str]) -> Results:
    """The sections and verdicts that these records of runs, analyses and benches give."""
    sections = table_sections({"records": found, "analyses": analysed})
    return Results(sections, bench_sections(benches), verdicts_of(sections), len(found), left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class TableSection(NamedTuple):
    """One table at one scale on one kind of machine."""

    comparison: Comparison
    verdicts: list[Verdict]
    grids: list[Grid]
    pictures: dict[str, Picture]  # by file name
    shown: list[dict]  # at most one analysis, whose own figures and text are shown
    notes: list[str]  # on all grids; the last grid has them too
    machine: str  # its short name
    is_one_of_many: bool  # whether other machines have sections of this table at this scale

    @property
    def heading(self) -> str:
        """The heading that all sections of the table share."""
        return f"{self.comparison.table.title} ({self.comparison.table.name})"

    @property
    def place(self) -> str:
        """Size and machine."""
        return f"{speed_cells.size_title(self.comparison.scale)}, {self.machine}"

    @property
    def title(self) -> str:
        """Heading and size in one line, with the machine where several have a section of this size."""
        table, size = self.comparison.table, speed_cells.size_title(self.comparison.scale)
        return f"{table.title} ({table.name}, {self.place if self.is_one_of_many else size})"

    @property
    def purpose(self) -> str:
        """What the table is for, and its source."""
        return f"{self.comparison.table.text} Source: {self.comparison.table.source}."

    @property
    def regime(self) -> str:
        """Epochs, unique characters and parameters."""
        found = [record for of_row in self.comparison.cells.values() for record in of_row]
        of_records = [record for record in found if self.comparison.table.of == "records"]
        ranges = {
            "epochs": [round(record["epochs"], 2) for record in of_records],
            "unique characters": [record["dataset"]["splits"]["train"] for record in found],
            "parameters": [record["parameters"]["total"] for record in of_records],
        }
        regime = ", ".join(f"{bench_records.from_to(values)} {name}" for name, values in ranges.items() if values)
        return f"Regime: {regime or 'no run that counts'}."

    @property
    def is_thin(self) -> bool:
        """Whether fewer than two rows have numbers: then a line replaces grids and pictures."""
        return len(cells.rows_with_records(self.comparison)) < 2 or not self.grids

    def lines(self, told: Mapping[str, str]) -> list[str]:
        """The text of a thin section. told: measure -> a table that shows it for the same runs."""
        rows = cells.rows_with_records(self.comparison)
        if len(rows) != 1:
            return self.notes
        of_times = cells.notes_on_times(self.comparison)
        return [cells.line_of(self.comparison, *rows, told), *(note for note in self.notes if note not in of_times)]

    def shares_runs_with(self, other: TableSection) -> bool:
        """Whether another section has a row with the same runs as a row of this one."""
        runs = [of_row for of_row in self.comparison.cells.values() if of_row]
        return any(of_row in other.comparison.cells.values() for of_row in runs)


def table_sections(found: dict[str, list[dict]]) -> list[TableSection]:
    """A section for every table, scale and machine with a run that tells more than another machine's.

    found: "records" and "analyses" -> what there is.
    """
    groups = []  # the machines that show a table at a scale
    for scale in SCALES:
        for table in papers.TABLES.values():
            comparisons = [of for of in gather(table, found[table.of], scale) if of.machine and compares_candidates(of)]
            shown = [of for of in comparisons if not any(tells_less(of, other) for other in comparisons)]
            groups.append(shown if any(map(has_cells, shown)) else shown[:1])  # tuned rows that were only chosen
    names = wording.machine_names({of.machine for shown in groups for of in shown})
    sections = []
    for shown in filter(None, groups):
        verdicts = verdicts_of_machines(shown[0].table, shown)
        for number, of in enumerate(shown, 1):
            sections.append(table_section(of, verdicts[of.machine], number, names[of.machine], len(shown) > 1))
    return sections


def compares_candidates(comparison: Comparison) -> bool:
    """Whether a table of tuned rows has losses of several candidates of one row; true of other tables."""
    of_choices = [sum(map(bool, choice.losses.values())) for choice in comparison.choices.values()]
    return not of_choices or max(of_choices) > 1


def has_cells(comparison: Comparison) -> bool:
    return any(comparison.cells.values())


def tells_less(comparison: Comparison, other: Comparison) -> bool:
    """Whether another machine has at least as many records of every row, and of some row more.

    Then its records are those of a few rows that another table needed.
    """
    counts = [(len(comparison.cells[name]), len(other.cells[name])) for name in comparison.cells]
    return all(ours <= theirs for ours, theirs in counts) and any(ours < theirs for ours, theirs in counts)


def verdicts_of_machines(table: Table, comparisons: list[Comparison]) -> dict[str, list[Verdict]]:
    """Machine -> what its records say of the table's claims. A machine that lacks a row of a claim is silent about it
    where another has them all."""
    verdicts: dict[str, list[Verdict]] = {comparison.machine: [] for comparison in comparisons}
    for claim in (*papers.TUNED_CLAIMS, *papers.CLAIMS):
        if claim.table == table.name:
            of_scale = [of for of in comparisons if of.scale in claim.scales]
            found = [verdict for verdict in (decide(claim, of) for of in of_scale) if verdict.status != NOT_RUN]
            whole = [verdict for verdict in found if not verdict.lacks_rows]
            for verdict in whole or found:
                verdicts[verdict.comparison.machine].append(verdict)
    return verdicts


def table_section(
    comparison: Comparison, verdicts: list[Verdict], number: int, machine: str, is_one_of_many: bool
) -> TableSection:
    """number: counts the machines on which this table was run at this scale."""
    table, scale = comparison.table, comparison.scale
    shown = analyses_to_show(comparison)
    pictures = {
        f"{table.name}_{scale}_{name}{numbered(number)}.svg": picture_of(drawing)
        for name, drawing in drawings_of(comparison, shown).items()
        if drawing
    }
    grids = [grid for view in table.views if (grid := cells.grid_of(comparison, view)).rows]
    notes = cells.notes_of(comparison) + (cells.notes_on_missing(comparison) if number == 1 else [])
    if grids:
        grids[-1] = grids[-1]._replace(notes=[*grids[-1].notes, *notes])
    return TableSection(comparison, verdicts, grids, pictures, shown, notes, machine, is_one_of_many)


def drawings_of(comparison: Comparison, shown: list[dict]) -> dict[str, Drawing | None]:
    """Name -> figure of a table; None where it has nothing to show."""
    drawings = {name: FIGURES[name](comparison) for name in (*comparison.table.figure_names, "differences")}
    for analysis in shown:
        drawings |= figures_of_run.of_run(analysis)
    return drawings


def picture_of(drawing: Drawing) -> Picture:
    """A figure as a block of a page."""
    return Picture(style.svg(drawing.figure), drawing.caption, drawing.alt)


def numbered(number: int) -> str:
    """The end of a file's name: none for the first of a kind, then _2, _3."""
    return f"_{number}" if number > 1 else ""


def analyses_to_show(comparison: Comparison) -> list[dict]:
    """The first analysis of a learned router with a text, of the first row that has one; none in a table of runs."""
    if comparison.table.of != "analyses":
        return []
    found = [analysis for of_row in comparison.cells.values() for analysis in of_row]
    return [one for one in found if one["sample"] and one["config"]["router"] == "learned"][:1]


def verdicts_of(sections: list[TableSection]) -> list[Verdict]:
    """Every claim at every scale that it is made for, in the order of CLAIMS; once, where no machine has run it.

    About tuned models first, then by the papers' protocol.
    """
    decided = {}
    for section in sorted(sections, key=lambda section: section.comparison.table.name != TUNED.name):
        for verdict in section.verdicts:
            decided.setdefault((verdict.claim.id, section.comparison.scale), []).append(verdict)
    verdicts = []
    for claim in papers.CLAIMS:
        for scale in claim.scales:
            empty = gather(papers.TABLES[claim.table], [], scale)[0]
            verdicts += decided.get((claim.id, scale)) or [decide(claim, empty)]
    return verdicts


# ---------------------------------------------------------------------------------------------------------------------
# Benches


class BenchSection(NamedTuple):
    """One bench."""

    record: dict
    grids: list[Grid]
    pictures: dict[str, Picture]  # by file name

    @property
    def heading(self) -> str:
        return "Speed"

    @property
    def place(self) -> str:
        return f"{speed_cells.size_title(self.record['size'])}, {self.record['machine']['device']}"

    @property
    def title(self) -> str:
        return f"{self.heading} ({self.place})"

    @property
    def purpose(self) -> str:
        """How a bench is read."""
        return (
            "Every model is timed in turn with the others, in one process. A cell is the median of the timings [10th, "
            "90th percentile]; time ÷ dense's is the median of the ratios of paired timings, above 1 where a model is "
            "slower. Floor ÷ time: the least time in which the necessary numbers can be computed and moved, at the "
            "ceilings measured in the same bench, over the measured time."
        )

    @property
    def regime(self) -> str:
        """What was measured where, and what weakens it."""
        record, ceilings = self.record, self.record["ceilings"]
        doubts = "".join(f"**{sentence}** " for sentence in bench_records.doubts(record))
        limits = f"{rate(ceilings['flops_per_second'], 'FLOP/s')} and {rate(ceilings['bytes_per_second'], 'B/s')}"
        return (
            f"{doubts}{speed_cells.bench_headline(record)}. Ceilings: {limits}. Machine: {records.machine_of(record)}. "
            f"The bench took {console.duration(record['seconds'])}."
        )


def rate(value, unit):
    """'180 GFLOP/s'"""
    prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{bench_records.significant(value / scale)} {prefix}{unit}"


def bench_sections(found: list[dict]) -> list[BenchSection]:
    """Known sizes first; several benches of one size are numbered. found: records that bench_records.py reads."""
    order = [*SCALES, *sorted({record["size"] for record in found} - {*SCALES})]
    benches, counts = [], {}
    for record in sorted(found, key=lambda record: (order.index(record["size"]), records.machine_of(record))):
        size = record["size"]
        counts[size] = counts.get(size, 0) + 1
        drawing = figures_of_speed.relative_time(record)
        pictures = {f"speed_{size}{numbered(counts[size])}.svg": picture_of(drawing)} if drawing else {}
        benches.append(BenchSection(record, speed_cells.speed_grids(record), pictures))
    return benches
