"""Pictures of a table's rows side by side, of which the cells hold analyses.

    drawing = information_by_row(comparison)            # None where there is nothing to draw
    path.write_text(figures.svg(drawing.figure))

Dense rows, and runs that lack the numbers of a picture, are left out of it. Pictures of one run:
`figures_of_experts.py`. Nothing here needs torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis import analyses
from analysis.annotation import TOPIC
from report.figures import (
    INK,
    NO_BREAK,
    WIDTH,
    Drawing,
    caption_of,
    cells_of,
    look_of,
    number,
    row_axes,
    rows_height,
    styled,
)
from report.figures_of_run import HOLLOW, TOGETHER, legend_below, legend_height, updates
from run import records

# ---------------------------------------------------------------------------------------------------------------------
# What pictures share


def caption_across(comparison, cells, *sentences, passes=False) -> str:
    """As figures.caption_of, with the text that was read: that of ablation and stability where passes."""
    read = sorted({run["passes"] if passes else run["text"]["characters"] for cell in cells for run in cell.runs})
    names = ", ".join(sorted({run["dataset"]["name"] for cell in cells for run in cell.runs}))
    several = "" if read[0] == read[-1] else f"{read[0]:,} to "
    text = f"Text: {names}, {several}{read[-1]:,} characters of validation, from its start."
    # What has no analysis may well have been trained.
    return caption_of(comparison, cells, *sentences, text).replace(" Not run: ", " Not analysed: ")


def with_numbers(comparison, read: Callable) -> list:
    """The cells that have an analysis for which read(analysis) is not None, with those alone."""
    cells = []
    for cell in cells_of(comparison):
        runs = [run for run in cell.runs if run["layers"] and read(run) is not None]
        if runs:
            cells.append(cell._replace(runs=runs))
    return cells


def label_of(cell) -> str:
    return f"{cell.label} {f'(n = {len(cell.runs)})'.replace(' ', NO_BREAK)}"


def columns_of(cells, count, least=0.46):
    """-> a Figure and its panels, side by side, whose rows are the cells."""
    labels = [label_of(cell) for cell in cells]
    figure = Figure(figsize=(WIDTH, 1.15 + rows_height(labels, least)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    row_axes(panels, labels)
    return figure, panels


def dots(axes, cells, read, y_offset=0.0) -> list[float | None]:
    """A row a cell: a small mark a seed, a large one for their mean. -> the means"""
    means = []
    for y, cell in enumerate(cells):
        values = [value for value in map(read, cell.runs) if value is not None]
        means.append(statistics.fmean(values) if values else None)
        if len(values) > 1:
            small = {"markersize": 3.5, "alpha": 0.75, "markeredgewidth": 0}
            axes.plot(values, [y + y_offset] * len(values), **look_of(cell), **small)
        if values:
            axes.plot(means[-1], y + y_offset, **look_of(cell), markersize=6.5)
    return means


# ---------------------------------------------------------------------------------------------------------------------
# What tells the expert

ASKED = {  # heading of a panel -> annotations
    "the character": ("character",),
    "+ place in\nthe word": ("place in the word",),
    "+ previous\ntwo": ("previous two",),
    "+ topic": TOPIC,
}


def share_told(names) -> Callable:
    return analyses.about("character") if names == ("character",) else analyses.about_given_character(*names)


def frozen_share(names) -> Callable:
    """analysis -> what a frozen random router would let the annotation tell, mean over layers: of the character, or
    of the one among several that tells most beyond it."""
    if names == ("character",):
        return analyses.over_layers(lambda layer: layer["frozen"]["about"]["character"]["mean"])
    return analyses.over_layers(lambda layer: analyses.most_of_frozen(layer, names))


@styled
def information_by_row(comparison) -> Drawing | None:
    """What tells the expert, of each row: a mark a seed, their mean, and the frozen control beside."""
    cells = with_numbers(comparison, analyses.about("character"))
    if not cells:
        return None
    analysed = [run for cell in cells for run in cell.runs]
    asked = {name: of for name, of in ASKED.items() if any(share_told(of)(run) is not None for run in analysed)}
    figure, panels = columns_of(cells, len(asked))
    spoken = [[] for _ in cells]
    for panel, (name, names) in zip(panels, asked.items()):
        panel.axvline(0, color=INK, linewidth=0.9)
        ours, frozen = percent_of(share_told(names)), percent_of(frozen_share(names))
        for of_cell, mean in zip(spoken, dots(panel, cells, ours, -0.12)):
            if mean is not None:
                of_cell.append(f"{name.replace(chr(10), ' ')} {number(mean, 1)}%")
        for y, cell in enumerate(cells):
            values = [value for value in map(frozen, cell.runs) if value is not None]
            if values:
                panel.plot(statistics.fmean(values), y + 0.2, **HOLLOW)
        panel.set_title(name)
        panel.set_xlabel("% of H(expert)")
        panel.margins(x=0.1)
        left, right = panel.get_xlim()
        panel.set_xlim(min(0, left), right)
        panel.xaxis.set_major_locator(MaxNLocator(3))
    large = Line2D([], [], color=INK, marker="o", linestyle="", markersize=6.5)
    small = Line2D([], [], color=INK, marker="o", linestyle="", markersize=3.5, alpha=0.75, markeredgewidth=0)
    names = ["mean", "one seed", "random router instead"]
    figure.set_figheight(figure.get_figheight() + legend_height(names))
    legend_below(figure, [large, small, Line2D([], [], **HOLLOW)], names)
    topics = f", topic by the best of {' and '.join(told_topics(cells))}" if told_topics(cells) else ""
    caption = caption_across(
        comparison,
        cells,
        f"{comparison.table.title}: what tells a character's expert, as a share of H(expert), beyond chance, mean over "
        f"layers. First panel: the character; others (+): what is added to it{topics}.",
        "Large: mean of the seeds; small: one seed; hollow: frozen random routers on the same inputs, beyond "
        "chance too. Each panel has its own axis.",
    )  # fmt: skip
    rows = "; ".join(f"{cell.label}: {', '.join(of)}" for cell, of in zip(cells, spoken))
    return Drawing(figure, caption, f"Dots of what tells the expert. {rows}.")


def percent_of(read) -> Callable:
    def percent(analysis):
        value = read(analysis)
        return None if value is None else 100 * value

    return percent


def told_topics(cells) -> list[str]:
    there = {name for cell in cells for run in cell.runs for name in run["layers"][0]["about_given_character"]}
    return [name for name in TOPIC if name in there]


# ---------------------------------------------------------------------------------------------------------------------
# Over training


@styled
def stability_by_row(comparison) -> Drawing | None:
    """Agreement with the analysed weights over training, and what the character tells: a thin line a seed, a thick one
    for their mean."""
    cells = with_numbers(comparison, lambda run: run["stability"] and run["stability"]["steps"] or None)
    if not cells:
        return None
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    agreement, character = figure.subplots(1, 2, sharey=True)
    spoken, handles, last = [], [], 0
    for cell in cells:
        steps = sorted(set.intersection(*(set(run["stability"]["steps"]) for run in cell.runs)))
        if not steps:
            continue
        last = max(last, steps[-1])
        for axes, name in ((agreement, "agreement"), (character, "character")):
            seeds = [[100 * analyses.of_stability(name, step)(run) for step in steps] for run in cell.runs]
            for values in seeds if len(seeds) > 1 else ():
                axes.plot(steps, values, color=cell.style.colour, linewidth=0.7, alpha=0.45)
            means = [statistics.fmean(at) for at in zip(*seeds)]
            look = {"color": cell.style.colour, "linestyle": cell.style.line, "marker": cell.style.marker}
            (handle,) = axes.plot(steps, means, **look, markersize=4, markevery=max(1, len(steps) // 6))
            if name == "agreement":
                spoken.append(f"{cell.label} {number(means[0], 0)}% at step {steps[0]:,}, ")
                spoken[-1] += f"{number(means[len(steps) // 2], 0)}% at step {steps[len(steps) // 2]:,}"
                handles.append((handle, label_of(cell)))
        chance = [[100 * analyses.of_stability("chance", step)(run) for step in steps] for run in cell.runs]
        means = [statistics.fmean(at) for at in zip(*chance)]
        agreement.plot(steps, means, color=cell.style.colour, linewidth=0.8, dashes=(3, 2))
    for axes in (agreement, character):
        updates(axes, last)
        axes.set_xlabel("updates")
    agreement.set_ylim(0, 104)
    agreement.set_title("characters that have their final expert, %")
    character.set_title("H(expert) that the character tells, %")
    if not handles:
        return None
    handles, names = map(list, zip(*handles))
    figure.set_figheight(figure.get_figheight() + legend_height(names))
    legend_below(figure, handles, names)
    caption = caption_across(
        comparison,
        cells,
        f"{comparison.table.title}: left, the share of characters whose expert in a snapshot is the one that they have "
        "in the analysed weights, mean over layers; thin dashed: the agreement of two routers of these loads by "
        "chance. Right, the share of H(expert) that the character tells. Thick: mean of the seeds; thin: one seed.",
        passes=True,
    )
    return Drawing(figure, caption, f"Curves of agreement with the analysed weights: {'; '.join(spoken)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Without experts


@styled
def ablation_by_row(comparison) -> Drawing | None:
    """What it costs to change all layers at once, of each row."""
    shown = [key for key in TOGETHER if with_numbers(comparison, analyses.ablated(key))]
    cells = with_numbers(comparison, lambda run: first_of(analyses.ablated(key)(run) for key in shown))
    if not cells:
        return None
    figure, panels = columns_of(cells, len(shown))
    spoken = [[] for _ in cells]
    for panel, key in zip(panels, shown):
        panel.axvline(0, color=INK, linewidth=0.9)
        for of_cell, mean in zip(spoken, dots(panel, cells, analyses.ablated(key))):
            if mean is not None:
                of_cell.append(f"{TOGETHER[key][1]} {number(mean, 3, '+')}")
        panel.set_title(TOGETHER[key][1])
        panel.set_xlabel("nats")
        panel.margins(x=0.15)
        left, right = panel.get_xlim()
        panel.set_xlim(min(left, -0.01), max(right, 0.01))  # so that a small cost looks small
        panel.xaxis.set_major_locator(MaxNLocator(2))
    what = "; ".join(f"{short}: {label}" for label, short in (TOGETHER[key] for key in shown))
    caption = caption_across(
        comparison,
        cells,
        f"{comparison.table.title}: what a trained model's loss becomes, less what it was, when something is done to "
        f"all its MoE layers at once, without training. {what[0].upper()}{what[1:]}. Large: mean of the seeds; small: "
        "one seed. Each panel has its own axis.",
        passes=True,
    )
    rows = "; ".join(f"{cell.label}: {', '.join(of)}" for cell, of in zip(cells, spoken))
    return Drawing(figure, caption, f"Dots of the nats that an intervention costs. {rows}.")


def first_of(values):
    return next((value for value in values if value is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Load


@styled
def load_by_row(comparison) -> Drawing | None:
    """How much of its experts each layer uses, of each row: a mark a layer and seed, with the bound of a collapse."""
    cells = with_numbers(comparison, analyses.lowest_utilisation)
    if not cells:
        return None
    figure, (axes,) = columns_of(cells, 1)
    bound = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 2))}
    axes.axvline(records.COLLAPSED_BELOW, **bound)
    above = {"xytext": (0, 3), "textcoords": "offset points", "xycoords": ("data", "axes fraction"), "ha": "center"}
    axes.annotate(f"left of {records.COLLAPSED_BELOW:g}: collapsed", (records.COLLAPSED_BELOW, 1), **above)
    spoken = []
    for y, cell in enumerate(cells):
        used = [records.utilisation(layer["load"]["load"], layer["k"]) for run in cell.runs for layer in run["layers"]]
        used = [value for value in used if value is not None]
        axes.plot(used, [y] * len(used), **look_of(cell), markersize=5.5, alpha=0.6, markeredgewidth=0, clip_on=False)
        spoken.append(f"{cell.label} {number(min(used), 2)} to {number(max(used), 2)}")
        text = f"{number(min(used), 2)} to {number(max(used), 2)}"
        axes.annotate(text, (1.03, y), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_xlabel("experts in use (0: all characters to the same, 1: all experts have as much)")
    caption = caption_across(
        comparison,
        cells,
        f"{comparison.table.title}: how much of its experts each MoE layer of each seed uses at the end, "
        "(exp H(load) − k) / (E − k). Dashed: below it a router counts as collapsed.",
    )
    return Drawing(figure, caption, f"Dots of the experts in use, lowest to highest layer: {'; '.join(spoken)}.")
