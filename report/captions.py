"""Whose numbers a picture shows: the rows of a table that have runs, their labels, and the text under the picture.

Every caption stands alone: it names the number of seeds, the missing rows, the meaning of †, the size of the model and
the machine. A dagger (†) marks numbers that cannot be compared with the others.
"""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from papers.table import SCALES, Comparison, Row, is_captured
from report.style import Style, row_style
from run import records
from speed.bench_records import from_to

NO_BREAK = "\N{NO-BREAK SPACE}"


class Cell(NamedTuple):
    """A row that has runs."""

    row: Row
    label: str  # with its dagger
    style: Style
    runs: list[dict]  # records or analyses, one a seed
    timed: list[dict]  # those whose times count; all analyses, which have none

    @property
    def label_with_n(self) -> str:
        """The label with the number of seeds, and of those whose times count."""
        n, timed = len(self.runs), len(self.timed)
        note = f"(n = {n}{'' if timed == n else f', {timed} timed'})"
        return f"{self.label} {note.replace(' ', NO_BREAK)}"


def cells_of(comparison: Comparison) -> list[Cell]:
    """The rows that have runs, in the table's order; of two runs of one seed the last counts."""
    cells = []
    for index, row in enumerate(comparison.table.rows_at(comparison.scale)):
        runs = list({run["config"]["seed"]: run for run in comparison.cells[row.name]}.values())
        if runs:
            timed = comparison.timed(row.name) if "exclusive" in runs[0] else runs
            label = row.label + (" †" if dagger_reasons(runs) else "")
            cells.append(Cell(row, label, row_style(index), runs, [run for run in runs if run in timed]))
    return cells


def dagger_reasons(runs) -> list[str]:
    """Why these runs cannot be compared with others; empty where they can."""
    reasons = set()
    for run in runs:
        if run["leaky"]:
            reasons.add("routing that sees later characters")
        if records.claims_published(run):
            reasons.add(f"a text that is not the published data set ({run['dataset']['name']})")
    return sorted(reasons)


def note_of_times(cells) -> str:
    runs, timed = [run for cell in cells for run in cell.runs], sum(len(cell.timed) for cell in cells)
    is_mixed = len({is_captured(run) for run in runs}) > 1
    if not timed:
        kind = "captured run" if is_mixed else "run"
        return f"No times are shown: no {kind} is known to have had its hardware to itself."
    which = "had their hardware to themselves" + (" and whose steps were captured" if is_mixed else "")
    return f"Training times come from the {timed} of {len(runs)} runs that {which}."


def unit_of(cells, plural="") -> str:
    """The unit of text that a loss is per: character or byte; plural="s" for several."""
    units = sorted({run["dataset"]["unit"] for cell in cells for run in cell.runs}, reverse=True)
    return " or ".join(unit + plural for unit in units)


def baseline_label(comparison, cells) -> str:
    """The label of the cells' common baseline, or 'its baseline'."""
    labels = {comparison.table.row(cell.row.baseline).label for cell in cells}
    return labels.pop() if len(labels) == 1 else "its baseline"


def caption_of_table(comparison, cells, *sentences, missing="Not run") -> str:
    """The table's title before the first sentence; after the last: seeds, missing rows, daggers, size and machine."""
    counts = [len(cell.runs) for cell in cells]
    parts = [f"n = {from_to(counts)} {'seed' if max(counts) == 1 else 'seeds'} per row."] if counts else []
    absent = [row.label for row in comparison.table.rows_at(comparison.scale) if not comparison.cells[row.name]]
    if absent:
        parts.append(f"{missing}: {'; '.join(absent)}.")
    reasons = dagger_reasons([run for cell in cells for run in cell.runs])
    if reasons:
        parts.append(f"† {'; '.join(reasons)}.")
    size = SCALES[comparison.scale]
    parts.append(f"{size[0].upper()}{size[1:]}; {comparison.machine}.")
    return f"{comparison.table.title}: {' '.join([*filter(None, sentences), *parts])}"


def caption_of_rows(comparison, cells, *sentences, passes=False) -> str:
    """caption_of_table for analyses, with the text that was read.

    passes: of the text that ablation and stability read, which is shorter.
    """
    read = [run["passes"] if passes else run["text"]["characters"] for cell in cells for run in cell.runs]
    names = ", ".join(sorted({run["dataset"]["name"] for cell in cells for run in cell.runs}))
    text = f"Text: {names}, {from_to(read)} characters of validation, from its start."
    return caption_of_table(comparison, cells, *sentences, text, missing="Not analysed")


def caption_of_run(analysis, *sentences, characters=None) -> str:
    """The sentences, then run, text, daggers, size and machine.

    characters: of the validation split, where the picture's numbers come from fewer than the analysis read; 0 where
    they come from another text.
    """
    config, text = analysis["config"], analysis["text"]
    n = text["characters"] if characters is None else characters
    whole = text["whole"] and n == text["characters"]
    part = f", {'all' if whole else 'the first'} {n:,} characters of validation" if n else ""
    step = analysis["weights"]["step"]
    parts = [f"{run_title(analysis)} (n = 1), after step {step:,}; {analysis['dataset']['name']}{part}."]
    reasons = dagger_reasons([analysis])
    parts += [f"† {'; '.join(reasons)}."] if reasons else []
    size = f"{config['n_layer']} layers, {config['n_embd']} wide, context {config['block_size']}"
    return " ".join([*filter(None, sentences), *parts, f"{size}; {records.machine_of(analysis)}."])


def first_sentence(text: str) -> str:
    """The first sentence of a caption, with a capital letter."""
    sentence = re.match(r".*?[.?](?= |$)|.*", text)[0]
    return sentence[:1].upper() + sentence[1:]


def run_title(analysis) -> str:
    return f"{analysis['title'] or analysis['run_id']}, seed {analysis['config']['seed']}"


def add_heading(figure, analysis) -> None:
    """Writes the run's title into the picture, since a picture in a run's folder has no caption beside it."""
    reasons = dagger_reasons([analysis])
    letters = int(12 * figure.get_figwidth())
    lines = textwrap.wrap(run_title(analysis) + (" †" if reasons else ""), letters)
    lines += textwrap.wrap(f"† {'; '.join(reasons)}" if reasons else "", letters)
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=10.5, parse_math=False)
    figure.set_figheight(figure.get_figheight() + 0.17 * len(lines))


def block_name(layer) -> str:
    return f"block {layer['block']}"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def number(value, digits=3, sign="") -> str:
    """A number with the minus sign of print, and none on a zero; sign="+" for a plus."""
    text = f"{value:{sign}.{digits}f}"
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def percent(share) -> str:
    return f"{number(100 * share, 0)}%"


def interval_text(low, high, digits=3, sign="") -> str:
    """' [0.010, 0.030]'; empty where one seed gives no interval."""
    return "" if low is None else f" [{number(low, digits, sign)}, {number(high, digits, sign)}]"
