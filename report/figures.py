"""Pictures: from the cells of one table to matplotlib Figures, and from any of those to SVG and PNG.

    drawing = loss_curves(comparison)                   # None where there is nothing to draw
    path.write_text(svg(drawing.figure)); drawing.caption; drawing.alt

Rows without records are left out, and named in the caption. What has seconds or a speed in it is drawn only from runs
that had the hardware to themselves. An SVG takes its ink from the reader's colour scheme, so that it is right on light,
dark and paper; the same data give the same bytes.
"""

from __future__ import annotations

import functools
import io
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from papers.measures import MEASURES
from papers.table import SCALES, Comparison, Row
from report.verdicts import effect_of
from support.intervals import Effect

WIDTH = (
    7.5  # inches: a report's column. With letters of 10.5 points it can still be read on a phone, at half that width
)
PAPER, PAPER_ON_DARK = "#ffffff", "#14171a"  # the report's own
INK, INK_ON_DARK = "#1f2328", "#e6e8ea"  # text, axes and the first row. Nothing else may have INK: see svg
# Okabe and Ito (2008): colour-blind readers can tell them apart. Black is the ink; yellow cannot be seen on white.
COLOURS = (INK, "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
SIGNS = BELOW, NEITHER, ABOVE = "#0072B2", "#f4f4f4", "#D55E00"
# As many as make (colour, marker, line) unique for 280 rows: no two of 7, 8 and 5 have a common divisor.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)))
EARLY = 0.1  # of a run's steps: what comes before does not widen the axis of a loss
NO_BREAK = "\N{NO-BREAK SPACE}"
LINES_OF_A_PANEL = 12  # that a legend may have there

STYLE = {
    "figure.dpi": 144,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "font.size": 10.5,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize"), 10.5),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.7),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "legend.handlelength": 2.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",  # the same picture whatever fonts a reader has
    "svg.hashsalt": "charmoe",
}
ERROR_BARS = {"elinewidth": 1.1, "capsize": 2.5}


class Drawing(NamedTuple):
    figure: Figure
    caption: str  # stands alone: what it is, of how many seeds, measured where
    alt: str  # for those who do not see it


class RowStyle(NamedTuple):
    colour: str
    marker: str
    line: str | tuple


class Cell(NamedTuple):
    """A row that has records."""

    row: Row
    label: str  # with its dagger
    style: RowStyle
    runs: list[dict]


class Estimate(NamedTuple):
    mean: float
    sd: float | None  # None where one run tells nothing of it
    n: int


def row_style(index: int) -> RowStyle:
    """By the row's place in its table, so that it looks the same in all pictures of the table; in grey too."""
    return RowStyle(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)])


def styled(draw):
    """In our style, whatever the reader's matplotlibrc says; and laid out once, since a second layout may move things
    by a hair and change the bytes."""

    @functools.wraps(draw)
    def drawn(*arguments, **keys) -> Drawing | None:
        with matplotlib.style.context(STYLE, after_reset=True):
            drawing = draw(*arguments, **keys)
            if drawing is not None:
                drawing.figure.draw_without_rendering()
                drawing.figure.set_layout_engine("none")
        return drawing

    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# What pictures share


def cells_of(comparison: Comparison) -> list[Cell]:
    """The rows that have records, in the table's order."""
    cells = []
    for index, row in enumerate(comparison.table.rows_at(comparison.scale)):
        runs = list({run["config"]["seed"]: run for run in comparison.cells[row.name]}.values())  # as values() counts
        if runs:
            cells.append(Cell(row, row.label + (" †" if daggers(runs) else ""), row_style(index), runs))
    return cells


def daggers(runs) -> set[str]:
    """Why these runs are not comparable, if they are not."""
    reasons = set()
    for run in runs:
        if run["leaky"]:
            reasons.add("routing that sees later characters")
        if not run["dataset"]["canonical"]:
            reasons.add(f"a text that is not the published data set ({run['dataset']['name']})")
    return reasons


def caption_of(comparison, cells, *sentences) -> str:
    """The sentences, then what every caption must tell: seeds, gaps, what † means, and where it was measured."""
    parts = [sentence for sentence in sentences if sentence]
    counts = sorted({len(cell.runs) for cell in cells})
    several = "" if counts[0] == counts[-1] else f"{counts[0]} to "
    parts.append(f"n = {several}{counts[-1]} {'seed' if counts[-1] == 1 else 'seeds'} a row.")
    missing = [row.label for row in comparison.table.rows_at(comparison.scale) if not comparison.cells[row.name]]
    if missing:
        parts.append(f"Not run: {'; '.join(missing)}.")
    reasons = set().union(*(daggers(cell.runs) for cell in cells))
    if reasons:
        parts.append(f"† {'; '.join(sorted(reasons))}.")
    title = SCALES[comparison.scale].title
    return " ".join([*parts, f"{title[0].upper()}{title[1:]}; {comparison.machine}."])


def timed(runs) -> list[dict]:
    """Those whose times count."""
    return [run for run in runs if run["exclusive"]]


def note_of_times(cells) -> str:
    alone, runs = (sum(len(of(cell.runs)) for cell in cells) for of in (timed, list))
    if not alone:
        return "No run is known to have had its cores to itself, so there are no times."
    return f"Training times are those of {alone} of {runs} runs, which had their cores to themselves."


def unit_of(cells, plural="") -> str:
    """What a loss is per; plural="s" for several."""
    units = sorted({run["dataset"]["unit"] for cell in cells for run in cell.runs}, reverse=True)
    return " or ".join(unit + plural for unit in units)


def estimate(values) -> Estimate:
    values = list(values)
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def difference(comparison, row, measure) -> Effect | None:
    return effect_of(comparison, measure, row.name, row.baseline, "difference") if row.baseline else None


def whiskers(effect) -> list | None:
    """Of the 95% interval, as matplotlib wants them; none where one seed gives no interval."""
    return None if effect.low is None else [[effect.mean - effect.low], [effect.high - effect.mean]]


def published(comparison, row, measure) -> tuple[float, float] | None:
    """The paper's numbers for the row and for its baseline, where it has both."""
    pair = tuple(of.published.get(measure) for of in (row, comparison.table.row(row.baseline)))
    return None if None in pair else pair


def baselines_of(comparison, cells) -> str:
    labels = dict.fromkeys(comparison.table.row(cell.row.baseline).label for cell in cells)
    return labels.popitem()[0] if len(labels) == 1 else "its baseline"


def number(value, digits=3, sign="") -> str:
    """With the minus sign of print, and none on a zero; sign="+" for a plus."""
    text = f"{value:{sign}.{digits}f}"
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def told(found: Estimate, digits=3, sign="") -> str:
    return number(found.mean, digits, sign) + ("" if found.sd is None else f" ± {found.sd:.{digits}f}")


def wrapped(label, width=26) -> str:
    return textwrap.fill(label, width, break_long_words=False, break_on_hyphens=False)


def thousands(value, _=None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def label_with_n(cell) -> str:
    n, alone = len(cell.runs), len(timed(cell.runs))
    note = f"(n = {n}{'' if alone == n else f', {alone} timed'})"
    return f"{cell.label} {note.replace(' ', NO_BREAK)}"


def panels_of(count, height=2.7):
    """-> a Figure, that many panels in two columns that share their y axis, and the empty place of a third: the
    legend's, or None."""
    rows = math.ceil(count / 2)
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, min(count, 2), sharey=True, squeeze=False).flat)
    for corner in axes[count:]:
        corner.axis("off")
    return figure, axes[:count], axes[count] if count % 2 and count > 1 else None


def legend(figure, corner, handles, labels) -> None:
    """In the empty corner, or below where it does not fit or there is none."""
    folded = [wrapped(label, 32) for label in labels]
    if corner is not None and "\n".join(folded).count("\n") < LINES_OF_A_PANEL:
        corner.legend(handles, folded, loc="center", borderaxespad=0)
        return
    columns = max(1, min(4, int(WIDTH / (0.073 * max(map(len, labels)) + 0.6))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(labels) / columns))


def bits_axis(axes, unit) -> None:
    axes.secondary_yaxis(
        "right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
    ).set_ylabel(f"bits per {unit}")


def rows_height(labels, least=0.42) -> float:
    """Inches that as many rows need, none less than the least."""
    return len(labels) * max(least, 0.1 + 0.17 * max(wrapped(label).count("\n") + 1 for label in labels))


def row_axis(axes, labels) -> None:
    """A y axis of rows, the first on top."""
    axes.set_yticks(range(len(labels)), [wrapped(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def row_axes(panels, labels) -> None:
    """The same for panels side by side that share it: the labels stand at the first."""
    row_axis(panels[0], labels)
    for panel in panels[1:]:
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.grid(False, axis="y")


def beside(axes, text, y) -> None:
    """A row's text, to the right of the axes."""
    axes.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=10, annotation_clip=False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


class Curve(NamedTuple):
    """A row's losses at the evaluations that all its runs have."""

    steps: list[int]
    seconds: list[float]
    low: list[float]
    mean: list[float]
    high: list[float]
    train: list[float]  # on training batches, in eval mode


def curve_of(runs) -> Curve:
    by_step = [{line["step"]: line for line in run["evaluations"]} for run in runs]
    steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
    losses = [[lines[step]["clean"]["nats"] for lines in by_step] for step in steps]
    return Curve(
        steps,
        [statistics.fmean(lines[step].get("train_seconds", 0.0) for lines in by_step) for step in steps],
        [min(at) for at in losses],
        [statistics.fmean(at) for at in losses],
        [max(at) for at in losses],
        [statistics.fmean(lines[step]["paper"]["train"] for lines in by_step) for step in steps],
    )


def loss_limits(lines: Iterable[tuple[list, list]]) -> tuple[float, float]:
    """Of the y axis for lines of (steps, losses): the first steps' 4 nats would squash all that comes after."""
    late = [loss for steps, losses in lines for step, loss in zip(steps, losses) if step >= EARLY * steps[-1]]
    margin = 0.04 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin


@styled
def loss_curves(comparison: Comparison) -> Drawing | None:
    """Clean validation loss against updates, characters read and seconds of training; without the last panel where no
    run had the machine to itself."""
    cells = cells_of(comparison)
    if not cells:
        return None
    curves = [curve_of(cell.runs) for cell in cells]
    by_clock = [curve_of(timed(cell.runs)) if timed(cell.runs) else None for cell in cells]
    unit = unit_of(cells)
    names = ["updates", f"{unit_of(cells, plural='s')} read, millions", "training time, s"][: 3 if any(by_clock) else 2]
    figure, panels, corner = panels_of(len(names))
    handles = []
    for cell, curve, clocked in zip(cells, curves, by_clock):
        config = cell.runs[0]["config"]
        an_update = config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"] / 1e6
        handles.append(draw_curve(panels[0], curve.steps, curve, cell.style))
        draw_curve(panels[1], [step * an_update for step in curve.steps], curve, cell.style)
        if clocked:
            draw_curve(panels[2], clocked.seconds, clocked, cell.style)
    for panel, name in zip(panels, names):
        panel.set_xlabel(name)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].xaxis.set_major_formatter(thousands)
    panels[0].set_ylim(loss_limits((curve.steps, edge) for curve in curves for edge in (curve.low, curve.high)))
    for panel in panels[::2]:
        panel.set_ylabel(f"validation loss,\nnats per {unit}")
    bits_axis(panels[1], unit)
    legend(figure, corner, handles, [label_with_n(cell) for cell in cells])
    caption = caption_of(
        comparison,
        cells,
        f"{comparison.table.title}: cross-entropy over the whole validation split, during training. Line: mean of the "
        "seeds; band: lowest to highest seed. The axis leaves out the first steps, which begin near "
        f"{max(curve.mean[0] for curve in curves):.1f} nats.",
        note_of_times(cells),
    )
    ends = ", ".join(f"{cell.label} {curve.mean[-1]:.3f}" for cell, curve in zip(cells, curves))
    return Drawing(figure, caption, f"Curves of validation loss in nats during training. Last values: {ends}.")


def draw_curve(axes, x, curve, style) -> Line2D:
    if curve.low != curve.high:
        axes.fill_between(x, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0)
    look = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markersize": 3.5}
    return axes.plot(x, curve.mean, **look, markevery=max(1, len(x) // 8))[0]


@styled
def loss_against_cost(comparison: Comparison) -> Drawing | None:
    """Best clean validation loss against training time, active and total parameters."""
    cells = cells_of(comparison)
    if not cells:
        return None
    names = {
        "active_parameters": "active parameters, millions",
        "total_parameters": "all parameters, millions",
        "train_seconds": "training time, s",
    }
    if not any(timed(cell.runs) for cell in cells):
        del names["train_seconds"]
    figure, panels, corner = panels_of(len(names))
    for panel, (measure, name) in zip(panels, names.items()):
        draw_cost(panel, comparison, cells, measure)
        panel.set_xlabel(name)
        panel.xaxis.set_major_locator(MaxNLocator(5))
    for panel in panels[::2]:
        panel.set_ylabel(f"best validation loss,\nnats per {unit_of(cells)}")
    handles = [Line2D([], [], **look_of(cell), markersize=6) for cell in cells]
    legend(figure, corner, handles, [label_with_n(cell) for cell in cells])
    caption = caption_of(
        comparison,
        cells,
        f"{comparison.table.title}: lowest cross-entropy over the whole validation split against what a model costs. "
        "Small: one seed; large: mean ± sample SD. Lower left is better. Rows of nearly equal parameters stand side by "
        "side.",
        note_of_times(cells),
    )
    losses = [estimate(comparison.values(cell.row.name, "clean").values()) for cell in cells]
    spoken = ", ".join(
        f"{cell.label} {told(loss)} nats with {cell.runs[0]['parameters']['total'] / 1e6:.2f} million parameters"
        for cell, loss in zip(cells, losses)
    )
    return Drawing(figure, caption, f"Dots of best validation loss against cost: {spoken}.")


def look_of(cell) -> dict:
    return {"color": cell.style.colour, "marker": cell.style.marker, "linestyle": ""}


def draw_cost(axes, comparison, cells, measure) -> None:
    is_time = MEASURES[measure].timed
    points, drawn = [], []
    for cell in cells:
        losses, costs = (comparison.values(cell.row.name, key) for key in ("clean", measure))
        pairs = [(costs[seed] / (1 if is_time else 1e6), losses[seed]) for seed in losses if seed in costs]
        if pairs:
            drawn.append(cell)
            points.append(tuple(zip(*pairs)))
    offsets = [0.0] * len(drawn)
    if not is_time:  # times differ by themselves, but parameters may be the same
        places = [statistics.fmean(x) for x, _ in points]
        offsets = side_by_side(places, near=0.04 * max(places))
        axes.set_xlim(0, 1.25 * max(places))
    for cell, (x, y), offset in zip(drawn, points, offsets):
        aside = axes.transData + ScaledTranslation(offset / 72, 0, axes.figure.dpi_scale_trans)
        axes.update_datalim(list(zip(x, y)))  # which matplotlib does not do for what is drawn aside
        if len(x) > 1:
            axes.plot(x, y, **look_of(cell), transform=aside, markersize=3.5, alpha=0.75, markeredgewidth=0)
        cost, loss = estimate(x), estimate(y)
        bars = {"xerr": cost.sd if is_time else None, "yerr": loss.sd}
        axes.errorbar(cost.mean, loss.mean, **bars, **look_of(cell), **ERROR_BARS, transform=aside, markersize=6)
    axes.margins(0.1)
    axes.autoscale_view()


def side_by_side(places, near, gap=8.0, widest=70.0) -> list[float]:
    """Points to the right for each, so that those that are nearer than `near` do not hide each other."""
    groups = []
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        if groups and places[i] - places[groups[-1][0]] <= near:
            groups[-1].append(i)
        else:
            groups.append([i])
    offsets = [0.0] * len(places)
    for group in groups:
        for place, i in enumerate(sorted(group)):  # in the table's order
            offsets[i] = (place - (len(group) - 1) / 2) * min(gap, widest / len(group))
    return offsets


@styled
def curves_of_runs(labelled: Mapping[str, Sequence[dict]]) -> Drawing | None:
    """{label: runs}, which need nothing but evaluations and may still train: a thin line a seed, a thick one for their
    mean, a dotted one for training batches. The caption stands in the picture, which is all that there will be."""
    labelled = {label: [run for run in runs if run["evaluations"]] for label, runs in labelled.items()}
    labelled = {label: runs for label, runs in labelled.items() if runs}
    if not labelled:
        return None
    figure, (axes,), _ = panels_of(1, height=4.3)
    handles, drawn = [], []
    for index, runs in enumerate(labelled.values()):
        style, mean = row_style(index), curve_of(runs)
        for seed in [curve_of([run]) for run in runs]:
            axes.plot(seed.steps, seed.mean, color=style.colour, alpha=0.45, linewidth=0.8)
            drawn.append((seed.steps, seed.mean))
        handles.append(
            draw_curve(axes, mean.steps, mean._replace(low=mean.high), style)
        )  # no band: the seeds are there
        axes.plot(mean.steps, mean.train, color=style.colour, linewidth=1.1, linestyle=(0, (1, 1.6)))
        drawn.append((mean.steps, mean.train))
    axes.set(xlabel="updates", ylabel="validation loss, nats per character", ylim=loss_limits(drawn))
    axes.set_xlim(left=0)
    bits_axis(axes, "character")
    legend(figure, None, handles, [f"{label} (n = {len(runs)})" for label, runs in labelled.items()])
    caption = "Cross-entropy over the whole validation split. Thin: one seed; thick: mean; dotted: on training batches."
    axes.set_title(caption, fontsize=8.5, loc="left")
    return Drawing(figure, caption, "Curves of validation loss against updates.")


# ---------------------------------------------------------------------------------------------------------------------
# Cost

OPEN = {"color": INK, "marker": "D", "linestyle": "", "fillstyle": "none", "markersize": 5.5}  # what was published


@styled
def relative_cost(comparison: Comparison) -> Drawing | None:
    """Training time and inference speed over those of the row's baseline."""
    spoken_of = {
        "train_seconds": "training time",
        "inference_speed": "speed of inference (the papers' way: one sequence at a time, no cache)",
    }
    names = {
        "train_seconds": "training time / baseline's\n(right of 1: slower)",
        "inference_speed": "inference speed / baseline's\n(left of 1: slower)",
    }
    with_baseline = [cell for cell in cells_of(comparison) if cell.row.baseline]
    ratios = {
        cell.row.name: [effect_of(comparison, key, cell.row.name, cell.row.baseline, "ratio") for key in names]
        for cell in with_baseline
    }
    cells = [cell for cell in with_baseline if any(ratios[cell.row.name])]
    if not cells:
        return None
    labels = [label_with_n(cell) for cell in cells]
    figure = Figure(figsize=(WIDTH, 1.2 + rows_height(labels)), layout="constrained")
    shown = [
        (column, measure, name)
        for column, (measure, name) in enumerate(names.items())
        if any(ratios[cell.row.name][column] or published(comparison, cell.row, measure) for cell in cells)
    ]
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    theirs = []
    for panel, (column, measure, name) in zip(panels, shown):
        panel.axvline(1, color=INK, linewidth=0.9)
        for y, cell in enumerate(cells):
            pair, ours = published(comparison, cell.row, measure), ratios[cell.row.name][column]
            if pair:
                theirs += panel.plot(pair[0] / pair[1], y, **OPEN)
            if ours:
                panel.errorbar(ours.mean, y, xerr=whiskers(ours), **look_of(cell), **ERROR_BARS, markersize=6)
                beside(panel, number(ours.mean), y)
        panel.set_xlabel(name)
        panel.margins(x=0.1)
        left, right = panel.get_xlim()
        panel.set_xlim(min(left, 0.9), max(right, 1.1))  # so that a small difference looks small
        panel.xaxis.set_major_locator(MaxNLocator(4))
    row_axes(panels, labels)
    if theirs:
        handles = [Line2D([], [], **OPEN), Line2D([], [], **{**OPEN, "fillstyle": "full"})]
        figure.legend(handles, ["published", "measured (each row its own shape)"], loc="outside upper right", ncols=2)
    caption = caption_of(
        comparison,
        cells,
        f"{comparison.table.title}: {' and '.join(spoken_of[measure] for _, measure, _ in shown)} over that of "
        f"{baselines_of(comparison, cells)}. Filled: ratio of the geometric means with its 95% interval, where both "
        "have several runs.",
        "Open: as published, for the paper's size and machine." if theirs else "",
        note_of_times(cells_of(comparison)),
    )
    spoken = "; ".join(
        f"{cell.label} "
        + ", ".join(
            f"{MEASURES[measure].heading} {number(found.mean)}"
            for measure, found in zip(names, ratios[cell.row.name])
            if found
        )
        for cell in cells
    )
    return Drawing(figure, caption, f"Dots of cost over the baseline's: {spoken}.")


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@styled
def load_over_training(comparison: Comparison) -> Drawing | None:
    """Each expert's share of the choices: a row of panels a row of the table, a panel a MoE layer. Of the first seed,
    since which expert is called the first is chance and a mean over seeds would show them all even."""
    loads = []  # (cell, steps, load by step, layer and expert)
    for cell in cells_of(comparison):
        lines = cell.runs[0]["evaluations"]
        if lines[-1]["load"]:
            loads.append((cell, [line["step"] for line in lines], [line["load"] for line in lines]))
    if not loads:
        return None
    layers = max(len(load[-1]) for _, _, load in loads)
    figure = Figure(figsize=(WIDTH, 1.0 + 1.15 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), layers, sharex=True, sharey=True, squeeze=False)
    for (cell, steps, load), row in zip(loads, panels):
        row[0].set_title(" ")  # room for the label, which may be wider than its panel
        row[0].annotate(
            cell.label, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", in_layout=False
        )
        for panel in row[len(load[-1]) :]:
            panel.axis("off")
        for layer, panel in enumerate(row[: len(load[-1])]):
            experts = len(load[-1][layer])
            panel.axhline(100 / experts, color=INK, linewidth=0.8, alpha=0.5)
            for expert in range(experts):
                shares = [100 * at[layer][expert] for at in load]
                panel.plot(steps, shares, color=row_style(expert + 1).colour, linewidth=1.2)
    for layer, panel in enumerate(panels[-1]):
        panel.set_xlabel(f"layer {layer + 1}")
    panels[0, 0].set(xlim=(0, None), ylim=(0, None))
    last = max(steps[-1] for _, steps, _ in loads)
    panels[0, 0].set_xticks([0, last / 2, last])
    panels[0, 0].xaxis.set_major_formatter(thousands)
    panels[0, 0].yaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("updates", fontsize=10.5)
    figure.supylabel("share of the choices, %", fontsize=10.5)
    counts = " or ".join(map(str, sorted({len(layer) for _, _, load in loads for layer in load[-1]})))
    seeds = ", ".join(map(str, sorted({cell.runs[0]["config"]["seed"] for cell, _, _ in loads})))
    cells = [cell._replace(runs=cell.runs[:1]) for cell, _, _ in loads]
    caption = caption_of(
        comparison,
        cells,
        f"{comparison.table.title}: share of the validation split's choices that goes to each expert (one line each), "
        f"by MoE layer, during training. Horizontal: an even share, 1/E, E = {counts}. Seed {seeds} alone, for an "
        "expert's number means nothing in another seed.",
    )
    spoken = []
    for cell, _, load in loads:
        shares = [100 * share for layer in load[-1] for share in layer]
        spoken.append(f"{cell.label} {min(shares):.0f}% to {max(shares):.0f}%")
    return Drawing(figure, caption, f"Curves of each expert's share of the choices. In the end: {', '.join(spoken)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Differences


@styled
def aux_decomposition(comparison: Comparison) -> Drawing | None:
    """The difference to the baseline when auxiliary losses are counted into the validation loss, in its two parts: the
    model's own, and what was counted in."""
    parts = []
    for cell in cells_of(comparison):
        model, whole = (difference(comparison, cell.row, measure) for measure in ("paper", "paper_with_aux"))
        if model:
            parts.append((cell, model, whole.mean - model.mean))
    if not parts:
        return None
    cells = [cell for cell, _, _ in parts]
    baseline = baselines_of(comparison, cells)
    labels = [cell.label for cell in cells]
    figure = Figure(figsize=(WIDTH, 1.5 + rows_height(labels, least=0.55)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.use_sticky_edges = False  # which would put the longest bar on the edge
    counted = {"facecolor": COLOURS[1], "edgecolor": INK, "hatch": "////", "linewidth": 0.5}
    for y, (_, model, aux) in enumerate(parts):
        axes.barh(y - 0.18, model.mean, height=0.32, color=BELOW)
        axes.errorbar(model.mean, y - 0.18, xerr=whiskers(model), color=INK, **ERROR_BARS)
        axes.barh(y + 0.18, aux, left=model.mean, height=0.32, **counted)
        axes.plot(model.mean + aux, y + 0.18, color=INK, marker="D", markersize=5.5)
        beside(axes, f"{number(model.mean)} + {number(aux)}", y)  # no sum, which rounding would often make wrong
    gaps = {round(pair[0] - pair[1], 6) for cell in cells if (pair := published(comparison, cell.row, "paper"))}
    at_their_size = "" if comparison.scale == "paper" else ", at the paper's size"
    for place, gap in enumerate(sorted(gaps)):
        text = f"published: {gap:g}{at_their_size}".replace("-", "−")
        above = {"xytext": (0, 3 + 13 * place), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
        axes.axvline(gap, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.annotate(text, (gap, 1), ha="center", **above)
    row_axis(axes, labels)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"validation loss minus that of {baseline},\nnats per {unit_of(cells)}")
    handles = [
        Patch(color=BELOW),
        Patch(**counted),
        Line2D([], [], color=INK, marker="D", linestyle="", markersize=5.5),
    ]
    names = ["the model's own", "auxiliary loss counted in", "sum"]
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    caption = caption_of(
        comparison,
        cells,
        f"{comparison.table.title}: how far the validation loss with auxiliary losses counted in is from that of "
        f"{baseline}, and what that consists of. The papers' way: minimum over estimates from random batches. Whisker: "
        "95% interval, paired over the seeds that both have.",
        *(f"Dashed: the published gap of {gap:g} nats".replace("-", "−") + f"{at_their_size}." for gap in sorted(gaps)),
    )
    spoken = "; ".join(
        f"{cell.label}: model {number(model.mean, sign='+')}, auxiliary loss {number(aux, sign='+')}"
        for cell, model, aux in parts
    )
    return Drawing(figure, caption, f"Bars of the difference to {baseline} in nats, in two parts. {spoken}.")


@styled
def boundary_map(comparison: Comparison) -> Drawing | None:
    """Best clean loss of MoE minus dense over width × unique characters; None for a table without these two."""
    rows = {
        (row.options["n_embd"], row.options["train_characters"] or math.inf): row
        for row in comparison.table.rows_at(comparison.scale)
        if row.baseline and {"n_embd", "train_characters"} <= set(row.options)
    }
    effects = {place: difference(comparison, row, "clean") for place, row in rows.items()}
    if not any(effects.values()):
        return None
    widths, sizes = (sorted({place[axis] for place in rows}) for axis in (0, 1))
    limit = max(0.005, *(abs(effect.mean) for effect in effects.values() if effect))
    colours = ScalarMappable(Normalize(-limit, limit), LinearSegmentedColormap.from_list("signs", SIGNS, N=15))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.8 * len(widths)), layout="constrained")
    axes = figure.subplots()
    for (width, size), effect in effects.items():
        place = sizes.index(size), widths.index(width)
        if not effect:
            draw_square(axes, place, "not run", facecolor="none", edgecolor=INK, hatch="///", alpha=0.5)
            continue
        epochs = comparison.cells[rows[width, size].name][0]["epochs"]
        interval = "" if effect.low is None else f"[{number(effect.low)}, {number(effect.high)}]\n"
        text = f"{number(effect.mean, sign='+')}\n{interval}n = {effect.n}, {epochs:.2g} epochs"
        draw_square(axes, place, text, facecolor=colours.to_rgba(effect.mean), edgecolor="none")
    axes.set_xticks(range(len(sizes)), ["all" if size == math.inf else f"{size:,}" for size in sizes])
    axes.set_yticks(range(len(widths)), widths)
    axes.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(widths) - 0.5))
    axes.set(xlabel="unique characters of training text", ylabel="width of the model")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(colours, ax=axes, aspect=25, pad=0.02, label="MoE − dense, nats\n(blue: MoE is better)")
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # no seams
    cells = [cell for cell in cells_of(comparison) if cell.row.baseline]
    caption = caption_of(
        comparison,
        [cell for cell in cells if difference(comparison, cell.row, "clean")],
        f"{comparison.table.title}: best validation loss of 4 experts minus that of the dense model of equal active "
        "FLOPs, over the whole validation split, with its 95% interval. Every run reads equally many characters, so "
        "fewer unique ones are more epochs.",
    )
    spoken = "; ".join(
        f"{width} wide, {'all' if size == math.inf else f'{size:,}'} characters {number(effect.mean, sign='+')}"
        for (width, size), effect in effects.items()
        if effect
    )
    return Drawing(figure, caption, f"Map of the loss difference in nats. {spoken}.")


def draw_square(axes, place, text, **look) -> None:
    x, y = place
    axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, linewidth=0, **look))
    axes.annotate(text, place, ha="center", va="center", color=readable_on(look["facecolor"]))


def readable_on(colour) -> str:
    """Black or white, whichever has more contrast (WCAG); ink on the page itself."""
    if colour == "none":
        return INK
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


@styled
def difference_forest(comparison: Comparison, effects: Sequence[tuple], measure: str = "clean") -> Drawing | None:
    """effects: (label, effect, low, high, n) and, where there is one, the published effect. low and high are None where
    one run gives no interval. A label that is a row's gets its colour."""
    if not effects:
        return None
    entry, by_label = MEASURES[measure], {cell.row.label: cell for cell in cells_of(comparison)}
    labels = [by_label[effect[0]].label if effect[0] in by_label else effect[0] for effect in effects]
    figure = Figure(figsize=(WIDTH, 1.15 + rows_height(labels)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.9)
    spoken, theirs = [], []
    for y, (label, effect, low, high, n, *rest) in enumerate(effects):
        theirs += [axes.plot(value, y, **OPEN)[0] for value in rest if value is not None]
        style = by_label[label].style if label in by_label else row_style(0)
        whiskers = None if low is None else [[effect - low], [high - effect]]
        look = {"color": style.colour, "marker": style.marker}
        axes.errorbar(effect, y, xerr=whiskers, **look, **ERROR_BARS, markersize=6)
        interval = "" if low is None else f" [{number(low)}, {number(high)}]"
        spoken.append(f"{number(effect, sign='+')}{interval}, n = {n}")
        beside(axes, spoken[-1], y)
    row_axis(axes, labels)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    unit = f", {entry.unit}" if entry.unit else ""
    side = "left of 0: better" if entry.lower_is_better else "right of 0: better"
    axes.set_xlabel(f"{entry.heading}, minus baseline's{unit}\n({side})")
    if theirs:
        figure.legend(theirs[:1], ["published"], loc="outside upper right")
    cells = [by_label[effect[0]] for effect in effects if effect[0] in by_label]
    caption = caption_of(
        comparison,
        cells or cells_of(comparison),
        f"{comparison.table.title}: each row's {entry.heading} minus that of its baseline, with the 95% interval over "
        "seeds, where there are several.",
        "Open: as published, at the papers' size and by their measure." if theirs else "",
    )
    lines = "; ".join(f"{label} {text}" for label, text in zip(labels, spoken))
    return Drawing(figure, caption, f"Dots of the difference to the baseline{unit}, with intervals. {lines}.")


# ---------------------------------------------------------------------------------------------------------------------
# Files

SHEET = (
    f".charmoe{{color:{INK};background:{PAPER}}}.charmoe *{{stroke-linejoin:round;stroke-linecap:butt}}"
    f"@media screen and (prefers-color-scheme:dark){{.charmoe{{color:{INK_ON_DARK};background:{PAPER_ON_DARK}}}}}"
)


def svg(figure: Figure) -> str:
    """The text of an SVG file: ink and ground follow the reader's colour scheme (light on paper), nothing outside is
    referred to, and the same figure gives the same text."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.style.context(STYLE, after_reset=True):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue().replace(INK, "currentColor")
    text = text[text.index("<svg ") :]  # what comes before names a DTD on the network
    text = text.replace("<svg ", '<svg class="charmoe" ', 1)
    text = re.sub(r"<style.*?</style>", f"<style>{SHEET}</style>", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that nothing uses
    # Hundredths of a point are enough; scales, which are small, are not touched.
    shorter = functools.partial(re.sub, r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}")
    text = re.sub(r'\b(?:d|x|y)="[^"]*"|translate\([^)]*\)', lambda found: shorter(found[0]), text)
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def png(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """On white, for screens that show no SVG."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure.savefig(path, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
