"""Pictures that compare the analyses of a table's rows, side by side.

    drawing = information_by_row(comparison)            # None where there is nothing to draw

Dense rows are left out, and so are runs without the numbers of a picture. Pictures of one run: figures_of_run.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from analysis import analyses
from analysis.annotation import TOPIC
from report import layout
from report.captions import Cell, caption_of_rows, cells_of, number
from report.figures_of_run import INTERVENTIONS
from report.layout import legend_mark
from report.style import BOUND, CHANCE, CONTROL, INK, ONE_SEED, ZERO, Drawing, styled
from run import records

MEAN_SIZE = 6.5  # points, the mark of a mean over seeds


def with_numbers(comparison, read: Callable) -> list[Cell]:
    """The rows that have analyses of experts for which read(analysis) is not None, with those analyses alone."""
    cells = []
    for cell in cells_of(comparison):
        runs = [run for run in cell.runs if run["layers"] and read(run) is not None]
        if runs:
            cells.append(cell._replace(runs=runs))
    return cells


def panels_of_rows(cells, count):
    """-> a figure and its panels side by side, whose rows are the cells"""
    labels = [cell.label_with_n for cell in cells]
    figure = layout.new_figure(1.15 + layout.rows_height(labels, 0.46))
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    layout.row_axes(panels, labels)
    return figure, panels


def seed_values(cell, read) -> list[float]:
    return [value for value in map(read, cell.runs) if value is not None]


def draw_seeds(axes, cells, read, y_offset=0.0) -> list[float | None]:
    """A small mark for each seed and a large one for their mean, in each cell's row. -> the means"""
    means = []
    for y, cell in enumerate(cells):
        values = seed_values(cell, read)
        means.append(statistics.fmean(values) if values else None)
        if len(values) > 1:
            axes.plot(values, [y + y_offset] * len(values), **cell.style.mark | ONE_SEED)
        if values:
            axes.plot(means[-1], y + y_offset, **cell.style.mark, markersize=MEAN_SIZE)
    return means


def draw_random_routers(axes, cells, read) -> None:
    """A hollow mark below each cell's row: the mean over seeds of a number of random routers."""
    for y, cell in enumerate(cells):
        if values := seed_values(cell, read):
            axes.plot(statistics.fmean(values), y + 0.2, **CONTROL)


def legend_of_random_routers(figure) -> None:
    mark = {"color": INK, "marker": "o", "linestyle": ""}
    handles = [legend_mark(**mark, markersize=MEAN_SIZE), legend_mark(**mark | ONE_SEED), legend_mark(**CONTROL)]
    layout.legend_below(figure, handles, ["mean", "one seed", "random router instead"], grow=True)


def spoken_rows(cells, texts) -> str:
    return "; ".join(f"{cell.label}: {', '.join(of_cell)}" for cell, of_cell in zip(cells, texts))


# ---------------------------------------------------------------------------------------------------------------------
# Information

ASKED = {  # title of a panel -> annotations: of several, the one that explains most
    "the character": ("character",),
    "+ place in\nthe word": ("place in the word",),
    "+ previous\ntwo": ("previous two",),
    "+ topic": TOPIC,
}


def explained_percent(names) -> tuple[Callable, Callable]:
    """Two functions: analysis -> percent of H(expert) that the annotations explain, mean over layers.

    The second one is of a frozen random router instead of the learned one.
    """
    if names == ("character",):
        learned = analyses.about("character")
        frozen = analyses.over_layers(lambda layer: layer["frozen"]["about"]["character"]["mean"])
    else:
        learned = analyses.about_given_character(*names)
        frozen = analyses.over_layers(lambda layer: analyses.most_of_frozen(layer, names))
    return as_percent(learned), as_percent(frozen)


def as_percent(read) -> Callable:
    return lambda analysis: None if (share := read(analysis)) is None else 100 * share


@styled
def information_by_row(comparison) -> Drawing | None:
    """How much of the choice of expert annotations explain, row by row, beside random routers."""
    cells = with_numbers(comparison, analyses.about("character"))
    if not cells:
        return None
    analysed = [run for cell in cells for run in cell.runs]
    asked = {title: explained_percent(names) for title, names in ASKED.items()}
    asked = {title: of for title, of in asked.items() if any(of[0](run) is not None for run in analysed)}
    figure, panels = panels_of_rows(cells, len(asked))
    spoken = [[] for _ in cells]
    for panel, (title, (learned, frozen)) in zip(panels, asked.items()):
        panel.axvline(0, **ZERO)
        for texts, mean in zip(spoken, draw_seeds(panel, cells, learned, -0.12)):
            if mean is not None:
                texts.append(f"{title.replace(chr(10), ' ')} {number(mean, 1)}%")
        draw_random_routers(panel, cells, frozen)
        panel.set_title(title)
        layout.x_axis(panel, "% of H(expert)", ticks=3, margin=0.1, reach=(0, 0))
    legend_of_random_routers(figure)
    annotations = {name for run in analysed for name in run["layers"][0]["about_given_character"]}
    topics = " and ".join(name for name in TOPIC if name in annotations)
    caption = caption_of_rows(
        comparison,
        cells,
        "how much annotations explain of a character's expert, as a share of H(expert), the entropy of the choice, "
        "beyond chance, mean over layers. First panel: the character alone; others (+): what each annotation adds to "
        f"the character{topics and f', topic by the best of {topics}'}.",
        "Large: mean over seeds; small: one seed; hollow: frozen random routers on the same inputs, also beyond "
        "chance. Each panel has its own axis.",
    )
    told = spoken_rows(cells, spoken)
    return Drawing(figure, caption, f"Dots of how much annotations explain of the choice of expert. {told}.")


# ---------------------------------------------------------------------------------------------------------------------
# Paths through the layers

OF_PATHS = {  # title of a panel -> name in analyses.OF_PATHS, unit of its axis, digits
    "told by the path": ("character", "% of H(character)", 0),
    "open given\nthe character": ("given_character", "nats", 2),
    "shared by\ntwo layers": ("between_layers", "nats", 3),
}


@styled
def paths_by_row(comparison) -> Drawing | None:
    """What a character's path and the character tell of each other, and two layers' experts, row by row."""
    cells = with_numbers(comparison, analyses.of_paths("given_character"))
    if not cells:
        return None
    figure, panels = panels_of_rows(cells, len(OF_PATHS))
    spoken = [[] for _ in cells]
    for panel, (title, (name, unit, digits)) in zip(panels, OF_PATHS.items()):
        readers = analyses.of_paths(name), analyses.frozen_paths(name)
        learned, frozen = map(as_percent, readers) if unit.startswith("%") else readers
        panel.axvline(0, **ZERO)
        for texts, mean in zip(spoken, draw_seeds(panel, cells, learned, -0.12)):
            if mean is not None:
                texts.append(f"{title.replace(chr(10), ' ')} {number(mean, digits)} {unit}".replace(" %", "%"))
        draw_random_routers(panel, cells, frozen)
        panel.set_title(title)
        layout.x_axis(panel, unit, ticks=3, margin=0.1, reach=(0, 0))
    legend_of_random_routers(figure)
    caption = caption_of_rows(
        comparison,
        cells,
        "a character's path is its expert in every MoE layer, for top-k the first choice. Left, how much of "
        "H(character) the path tells; middle, H(path | character), what the character leaves open; right, mutual "
        "information of two layers' experts, mean over pairs. Left and right are beyond chance.",
        "Large: mean over seeds; small: one seed; hollow: frozen random routers on the same inputs. Each panel has its "
        "own axis.",
    )
    told = spoken_rows(cells, spoken)
    return Drawing(figure, caption, f"Dots of what paths through the layers tell. {told}.")


# ---------------------------------------------------------------------------------------------------------------------
# Over training


@styled
def stability_by_row(comparison) -> Drawing | None:
    """Agreement with the final weights over training, and how much the character explains, row by row."""
    cells = with_numbers(comparison, lambda run: run["stability"] and run["stability"]["steps"] or None)
    if not cells:
        return None
    figure = layout.new_figure(2.9)
    agreement, character = figure.subplots(1, 2, sharey=True)
    spoken, handles, last = [], {}, 0
    for cell in cells:
        steps = sorted(set.intersection(*(set(run["stability"]["steps"]) for run in cell.runs)))
        if not steps:
            continue
        last = max(last, steps[-1])
        means = {}
        for axes, name in ((agreement, "agreement"), (character, "character")):
            seeds = [[100 * analyses.of_stability(name, step)(run) for step in steps] for run in cell.runs]
            for values in seeds if len(seeds) > 1 else ():
                axes.plot(steps, values, color=cell.style.colour, linewidth=0.7, alpha=0.45)
            means[name] = [statistics.fmean(at) for at in zip(*seeds)]
            every = {"markersize": 4, "markevery": max(1, len(steps) // 6)}
            (handles[cell.label_with_n],) = axes.plot(steps, means[name], **cell.style.curve, **every)
        chance = [[100 * analyses.of_stability("chance", step)(run) for step in steps] for run in cell.runs]
        agreement.plot(steps, [statistics.fmean(at) for at in zip(*chance)], color=cell.style.colour, **CHANCE)
        told = (f"{number(means['agreement'][i], 0)}% at step {steps[i]:,}" for i in (0, len(steps) // 2))
        spoken.append(f"{cell.label} {', '.join(told)}")
    for axes in (agreement, character):
        layout.updates_axis(axes, last)
        axes.set_xlabel("updates")
    agreement.set_ylim(0, 104)
    agreement.set_title("characters that have their final expert, %")
    character.set_title("H(expert) that the character explains, %")
    if not handles:
        return None
    layout.legend_below(figure, list(handles.values()), list(handles), grow=True)
    caption = caption_of_rows(
        comparison,
        cells,
        "left, the share of characters that a snapshot sends to the same expert as the analysed weights, mean over "
        "layers; thin dashed: the agreement that two routers with these loads have by chance. Right, the share of "
        "H(expert), the entropy of the choice, that the character explains. Thick: mean over seeds; thin: one seed.",
        passes=True,
    )
    return Drawing(figure, caption, f"Curves of agreement with the analysed weights: {'; '.join(spoken)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Ablation


@styled
def ablation_by_row(comparison) -> Drawing | None:
    """The loss that an intervention in all layers at once costs, row by row, a panel an intervention."""
    shown = [key for key in INTERVENTIONS if with_numbers(comparison, analyses.ablated(key))]
    cells = with_numbers(comparison, lambda run: any(analyses.ablated(key)(run) is not None for key in shown) or None)
    if not cells:
        return None
    figure, panels = panels_of_rows(cells, len(shown))
    spoken = [[] for _ in cells]
    for panel, key in zip(panels, shown):
        _, name = INTERVENTIONS[key]
        panel.axvline(0, **ZERO)
        for texts, mean in zip(spoken, draw_seeds(panel, cells, analyses.ablated(key))):
            if mean is not None:
                texts.append(f"{name} {number(mean, 3, '+')}")
        panel.set_title(name)
        layout.x_axis(panel, "nats", ticks=2, margin=0.15, reach=(-0.01, 0.01))  # a small cost looks small
    what = "; ".join(f"{short}: {label}" for label, short in (INTERVENTIONS[key] for key in shown))
    caption = caption_of_rows(
        comparison,
        cells,
        "how much a trained model's loss rises when all its MoE layers are changed at once, without further training. "
        f"{what[0].upper()}{what[1:]}. Large: mean over seeds; small: one seed. Each panel has its own axis.",
        passes=True,
    )
    told = spoken_rows(cells, spoken)
    return Drawing(figure, caption, f"Dots of the rise in loss, in nats, after each intervention. {told}.")


# ---------------------------------------------------------------------------------------------------------------------
# Load


@styled
def load_by_row(comparison) -> Drawing | None:
    """How much of its experts each layer of each seed uses, row by row, beside the threshold of a collapse."""
    cells = with_numbers(comparison, analyses.lowest_utilisation)
    if not cells:
        return None
    figure, (axes,) = panels_of_rows(cells, 1)
    axes.axvline(records.COLLAPSED_BELOW, **BOUND)
    layout.text_above(axes, f"left of {records.COLLAPSED_BELOW:g}: collapsed", records.COLLAPSED_BELOW)
    spoken = []
    for y, cell in enumerate(cells):
        layers = [layer for run in cell.runs for layer in run["layers"]]
        used = [records.utilisation(layer["load"]["load"], layer["k"]) for layer in layers]
        used = [value for value in used if value is not None]
        look = cell.style.mark | {"markersize": 5.5, "alpha": 0.6, "markeredgewidth": 0}
        axes.plot(used, [y] * len(used), **look, clip_on=False)
        text = f"{number(min(used), 2)} to {number(max(used), 2)}"
        layout.text_beside(axes, text, y, x=1.03)
        spoken.append(f"{cell.label} {text}")
    axes.set_xlim(0, 1)
    axes.set_xlabel("experts in use (0: all characters go to the same, 1: equal shares)")
    caption = caption_of_rows(
        comparison,
        cells,
        "how much each MoE layer of each seed uses its experts at the end, (exp H(load) − k) / (E − k). Left of the "
        "dashed line a router counts as collapsed.",
    )
    return Drawing(figure, caption, f"Dots of the experts in use, lowest to highest layer: {'; '.join(spoken)}.")
