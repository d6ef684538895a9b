"""Pictures of one run's analysis. Those of a table's rows, side by side: `figures_of_experts_by_row.py`.

    for name, drawing in of_run(analysis).items():      # what analyses.read gives
        path.write_text(figures.svg(drawing.figure))

What an analysis lacks is not drawn: a dense model has gradients alone, a run without snapshots no stability. Blocks
and experts are counted from 0, as in analysis.json and in sample.py's text. Nothing here needs torch.
"""

from __future__ import annotations

import math
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from analysis import analyses
from analysis.analyses import net
from analysis.annotation import TOPIC
from report.figures import (
    COLOURS,
    ERROR_BARS,
    INK,
    LINES,
    MARKERS,
    WIDTH,
    Drawing,
    RowStyle,
    beside,
    daggers,
    number,
    row_axis,
    row_style,
    rows_height,
    styled,
    thousands,
)
from run import records

AT_LEAST, MOST_CHARACTERS = 50, 60  # occurrences of a character that is drawn; characters
TILE, LEVELS = INK, 20  # shares are drawn in steps of 5%: as opacity of the ink, which is right on light and on dark
SMALL = 9.5  # points
PANELS_A_ROW = 4
MOST_NAMED = 16  # experts or blocks that a legend names

ALONE = {"character": "the character", "class": "its class", "frequency band": "its frequency"}
BEYOND = {  # the character
    name: f"+ {name}"
    for name in ("place in the word", "place in the line", "previous character", "previous two", *TOPIC)
}
HOLLOW = {"color": INK, "marker": "o", "linestyle": "", "fillstyle": "none", "markersize": 5.5}
HASHED = {"color": COLOURS[4], "marker": "D", "linestyle": "", "fillstyle": "none", "markersize": 5}
TOGETHER = {  # key of an ablation -> (what it is, its short name)
    "shuffled_all": ("routing shuffled", "shuffled"),
    "hashed_all": ("a hash of the character routes", "hashed"),
    "tabulated_all": ("each character to its commonest expert", "by table"),
    "removed_all": ("each layer's cheapest expert removed", "one removed"),
    "merged_all": ("each layer's cheapest expert merged", "one merged"),
}


def of_run(analysis) -> dict[str, Drawing]:
    """All pictures of an analysis for which it has the numbers, by name."""
    draw = {
        "experts": experts,
        "load": load,
        "stability": stability,
        "information": information,
        "ablation": ablation,
        "gradients": gradients,
    }
    drawings = {name: of(analysis) for name, of in draw.items()}
    return {name: drawing for name, drawing in drawings.items() if drawing}


# ---------------------------------------------------------------------------------------------------------------------
# What pictures share


def heading(figure, analysis) -> None:
    """Whose picture it is, in the picture: beside a run there is no caption."""
    reasons = sorted(daggers([analysis]))
    title = f"{analysis['title'] or analysis['run_id']}, seed {analysis['config']['seed']}{' †' if reasons else ''}"
    letters = int(12 * figure.get_figwidth())
    lines = textwrap.wrap(title, letters) + textwrap.wrap(f"† {'; '.join(reasons)}" if reasons else "", letters)
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=10.5, parse_math=False)
    figure.set_figheight(figure.get_figheight() + 0.17 * len(lines))


def caption_of_run(analysis, *sentences, characters=None) -> str:
    """The sentences, then whose numbers they are, of which text, and where it was measured. characters: of the
    validation split, where they are not all that was read; 0 where another text was."""
    config, text = analysis["config"], analysis["text"]
    n = text["characters"] if characters is None else characters
    whole = text["whole"] and n == text["characters"]
    part = f"all {n:,} characters of validation" if whole else f"the first {n:,} characters of validation"
    where = f"{analysis['dataset']['name']}{f', {part}' if n else ''}"
    reasons = sorted(daggers([analysis]))
    parts = [sentence for sentence in sentences if sentence]
    run, step = analysis["title"] or analysis["run_id"], analysis["weights"]["step"]
    parts.append(f"{run}, seed {config['seed']} (n = 1), after step {step:,}; {where}.")
    parts += [f"† {'; '.join(reasons)}."] if reasons else []
    size = f"{config['n_layer']} layers, {config['n_embd']} wide, context {config['block_size']}"
    return " ".join([*parts, f"{size}; {records.machine_of(analysis)}."])


def name_of(layer) -> str:
    return f"block {layer['block']}"


def grid(figure, count, xlabel="", **keys):
    """-> that many panels, at most four a row. No supxlabel: a legend below would be on it."""
    columns = min(count, PANELS_A_ROW)
    axes = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **keys)
    panels = list(axes.flat)[:count]
    for empty in list(axes.flat)[count:]:
        empty.axis("off")
    for panel in panels[-columns:]:  # the lowest of their columns, above an empty place too
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(xlabel)
    return panels


def rows_of(count) -> int:
    return math.ceil(count / PANELS_A_ROW)


def share(value, digits=0) -> str:
    return f"{number(100 * value, digits)}%"


def columns_for(labels) -> int:
    """Of a legend: as few rows as there is room for, evenly filled."""
    fit = max(1, int(WIDTH / (0.08 * max(map(len, labels)) + 0.75)))
    return math.ceil(len(labels) / math.ceil(len(labels) / fit))


def legend_height(labels) -> float:
    return 0.22 * math.ceil(len(labels) / columns_for(labels)) if labels else 0.0


def legend_below(figure, handles, labels) -> None:
    """The figure, or part of one, must have legend_height for it."""
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns_for(labels))


def lines_of(styles) -> list[Line2D]:
    return [Line2D([], [], color=style.colour, linestyle=style.line) for style in styles]


def updates(axes, last) -> None:
    """An x axis of updates from 0, with few ticks."""
    axes.set_xlim(0, last or 1)
    axes.set_xticks([0, last / 2, last] if last else [0])
    axes.xaxis.set_major_formatter(thousands)


# ---------------------------------------------------------------------------------------------------------------------
# Character × expert


def class_of_name(name: str) -> str:
    """The class of a symbol that annotation.name_of called so, as data.characters.character_class has it."""
    if name in ("newline", "space"):
        return name
    if len(name) > 1 or not name.isascii():  # tab, byte 0xC3, U+0301
        return "other"
    if name.isalpha():
        return "capital" if name.isupper() else "vowel" if name in "aeiou" else "consonant"
    return "digit" if name.isdigit() else "punctuation"


class Order(NamedTuple):
    symbols: list[int]  # rows of the picture, from the top: places in analysis["symbols"]
    classes: list[tuple[str, int, int]]  # name, first row, rows
    by: dict  # the layer that the order is of


def order_of(analysis) -> Order | None:
    """By class; in a class by the commonest expert in the layer whose expert the character tells most of; then by its
    share. None where no character is common enough."""
    by = max(analysis["layers"], key=lambda layer: net(layer["about"]["character"], layer) or 0)
    counts_VE = np.array(by["counts"])
    totals_V = counts_VE.sum(axis=1)
    common = [int(i) for i in np.argsort(-totals_V, kind="stable")[:MOST_CHARACTERS] if totals_V[i] >= AT_LEAST]
    if not common:
        return None
    class_of = {i: class_of_name(analysis["symbols"][i]) for i in common}
    favourite_V = counts_VE.argmax(axis=1)
    shares_V = counts_VE.max(axis=1) / np.maximum(totals_V, 1)
    symbols = sorted(common, key=lambda i: (records.CLASSES.index(class_of[i]), favourite_V[i], -shares_V[i], i))
    of_row = [class_of[i] for i in symbols]
    return Order(symbols, [(name, of_row.index(name), of_row.count(name)) for name in dict.fromkeys(of_row)], by)


@styled
def experts(analysis) -> Drawing | None:
    """A heat map of character × expert, a panel a layer, its rows in one order for all."""
    layers = analysis["layers"]
    order = order_of(analysis) if layers else None
    if not order:
        return None
    rows, columns = len(order.symbols), sum(layer["n_expert"] for layer in layers)
    gap = 0.5  # rows, between classes
    places = [row + gap * i for i, (_, first, n) in enumerate(order.classes) for row in range(first, first + n)]
    width = min(WIDTH, max(4.2, 2.0 + 0.36 * columns))
    figure = Figure(figsize=(width, max(2.6, 1.1 + 0.165 * (places[-1] + 1))), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    told = []
    for panel, layer in zip(panels, layers):
        counts_RE = np.array([layer["counts"][i] for i in order.symbols], dtype=float)
        draw_tiles(panel, counts_RE / counts_RE.sum(axis=1, keepdims=True), places)
        E = layer["n_expert"]
        wide = (width - 2.0) / len(layers) / E > 0.1 + 0.05 * (E > 10)
        panel.set_xticks(range(E) if wide else [0, E - 1] if E > 1 else [0])
        panel.tick_params(length=0, labelsize=SMALL, pad=2)
        panel.set_xlim(-0.5, E - 0.5)
        panel.set_xlabel("expert" if len(layers) <= 8 else "")
        panel.grid(False)
        panel.spines[:].set_visible(False)
        of = net(layer["about"]["character"], layer)
        told.append("–" if of is None else share(of))
        name = name_of(layer) if len(layers) <= 8 else str(layer["block"])
        panel.set_title(f"{name}\n{told[-1]}", fontsize=10)
    panels[0].set_ylim(places[-1] + 0.5, -0.5)
    panels[0].set_yticks(places, [analysis["symbols"][i] for i in order.symbols], parse_math=False)
    mark_classes(panels[0], analysis, order, places)
    steps = (0.05, 0.25, 0.5, 0.75, 1)
    patches = [Patch(facecolor=TILE, alpha=step, linewidth=0) for step in steps]
    figure.legend(
        patches, [share(step) for step in steps], loc="outside lower center", ncols=5, columnspacing=1, handlelength=1.6
    )
    heading(figure, analysis)
    caption = caption_of_run(
        analysis,
        "Which expert is a character's? Opacity: the share of a character's occurrences whose first choice the expert "
        "is, in steps of 5%; a row adds up to 100%. Under a block's name: the share of H(expert) that the character "
        "tells, beyond chance; a fixed table of characters would have 100%. All blocks have the same order of rows: "
        f"classes, in a class the commonest expert in {name_of(order.by)}, then its share. Shown are "
        f"{rows} characters that occur at least {AT_LEAST} times"
        + (", the most frequent." if rows == MOST_CHARACTERS else "."),
    )
    spoken = ", ".join(f"{name_of(layer)} {of}" for layer, of in zip(layers, told))
    counts_RE = np.array([order.by["counts"][i] for i in order.symbols])
    alone = int((counts_RE.max(axis=1) >= 0.9 * counts_RE.sum(axis=1)).sum())
    alt = (
        f"Heat map of {rows} characters by expert. The character tells of the expert: {spoken}. In "
        f"{name_of(order.by)} {alone} of the characters go to one expert at least nine times out of ten."
    )
    return Drawing(figure, caption, alt)


def draw_tiles(axes, shares_RE, places) -> None:
    """A tile a share; those of equal opacity are one path, which keeps the file small."""
    levels_RE = np.rint(shares_RE * LEVELS).astype(int)
    corners = np.array([(-0.47, -0.45), (0.47, -0.45), (0.47, 0.45), (-0.47, 0.45), (-0.47, -0.45)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for level in range(1, LEVELS + 1):
        centres = [(expert, places[row]) for row, expert in np.argwhere(levels_RE == level)]
        if centres:
            path = Path(np.concatenate([corners + centre for centre in centres]), codes * len(centres))
            axes.add_patch(PathPatch(path, facecolor=TILE, alpha=level / LEVELS, linewidth=0))


def mark_classes(axes, analysis, order, places) -> None:
    """A line along the rows of each class, and its name; none where the only character has that name itself."""
    widest = max(len(analysis["symbols"][i]) for i in order.symbols)
    x = -(14 + 5.6 * widest)  # points, left of the names
    for name, first, n in order.classes:
        if n == 1 and analysis["symbols"][order.symbols[first]] == name:
            continue
        top, bottom = places[first] - 0.35, places[first + n - 1] + 0.35
        at_edge = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(name, (0, (top + bottom) / 2), (x - 5, 0), **at_edge, ha="right", va="center", fontsize=SMALL)
        aside = axes.get_yaxis_transform() + ScaledTranslation(x / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot([0, 0], [top, bottom], color=INK, linewidth=1.2, transform=aside, clip_on=False, in_layout=False)


# ---------------------------------------------------------------------------------------------------------------------
# Over training


def utilisations(layer, loads) -> list[float] | None:
    """Of a layer at each evaluation; None where it has no choice to make."""
    used = [records.utilisation(at, layer["k"]) for at in loads]
    return None if None in used else used


@styled
def load(analysis) -> Drawing | None:
    """Each expert's share of the choices in every evaluation, and how much of its experts a layer uses."""
    evolution, layers = analysis["evolution"], analysis["layers"]
    if not evolution or not layers:
        return None
    steps, loads = evolution["steps"], list(zip(*evolution["loads"]))  # of each layer, by step
    used = [utilisations(layer, of) for layer, of in zip(layers, loads)]
    has_choice = any(of is not None for of in used)
    styles = expert_styles(max(layer["n_expert"] for layer in layers))
    names = names_of_experts(len(styles))
    upper = 0.65 + 1.35 * rows_of(len(layers)) + legend_height(names)
    figure = Figure(figsize=(WIDTH, upper + 2.0 * has_choice), layout="constrained")
    parts = figure.subfigures(1 + has_choice, 1, height_ratios=[upper, 2.0][: 1 + has_choice], squeeze=False)[:, 0]
    panels = grid(parts[0], len(layers), "" if has_choice else "updates", sharex=True, sharey=True)
    for panel, layer, of in zip(panels, layers, loads):
        panel.axhline(100 / layer["n_expert"], color=INK, linewidth=0.8, alpha=0.5)
        for expert, style in enumerate(expert_styles(layer["n_expert"])):
            panel.plot(steps, [100 * at[expert] for at in of], color=style.colour, linestyle=style.line, linewidth=1.3)
        panel.set_title(name_of(layer))
    panels[0].set_ylim(bottom=0)
    updates(panels[0], steps[-1])
    panels[0].yaxis.set_major_locator(MaxNLocator(3))
    parts[0].supylabel("share of the choices, %", fontsize=10.5)
    legend_below(parts[0], lines_of(styles), names)
    if has_choice:
        draw_utilisation(parts[1], layers, steps, used)
    heading(figure, analysis)
    counts = " or ".join(map(str, sorted({layer["n_expert"] for layer in layers})))
    caption = caption_of_run(
        analysis,
        f"{'Above: the' if has_choice else 'The'} share of the choices that goes to each expert, in every evaluation "
        f"during training; horizontal: an even share, 1/E, E = {counts}.",
        "Below: how much of its experts a block uses, (exp H(load) − k) / (E − k), from 0, where all characters go to "
        f"the same, to 1, where all experts have as much; below {records.COLLAPSED_BELOW:g} the router counts as "
        "collapsed." if has_choice else "",
        *map(analyses.collapse_text, analysis["collapsed"]),
        f"{evaluations(steps)}.",
        characters=0,
    )  # fmt: skip
    last = ", ".join(
        f"{name_of(layer)} {share(min(of[-1]))} to {share(max(of[-1]))}"
        + ("" if use is None else f" (uses {share(use[-1])})")
        for layer, of, use in zip(layers, loads, used)
    )
    return Drawing(figure, caption, f"Curves of each expert's share of the choices. In the end: {last}.")


def evaluations(steps) -> str:
    return f"{len(steps)} evaluation{'' if len(steps) == 1 else 's'} on the validation split"


def expert_styles(count) -> list[RowStyle]:
    """Without ink, which is for what is no expert's."""
    colours = COLOURS[1:]
    return [RowStyle(colours[i % len(colours)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]) for i in range(count)]


def names_of_experts(count) -> list[str]:
    """For a legend; none where it would be too long to be of use."""
    return [f"expert {i}" for i in range(count)] if count <= MOST_NAMED else []


def draw_utilisation(figure, layers, steps, used) -> None:
    axes = figure.subplots()
    axes.axhline(records.COLLAPSED_BELOW, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    low = {"xytext": (4, 3), "textcoords": "offset points", "xycoords": ("axes fraction", "data"), "va": "bottom"}
    axes.annotate(f"below {records.COLLAPSED_BELOW:g}: collapsed", (0, records.COLLAPSED_BELOW), **low, fontsize=SMALL)
    handles = []
    for index, (layer, of) in enumerate(zip(layers, used)):
        if of is not None:
            style = row_style(index)
            look = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markersize": 3.5}
            handles += axes.plot(steps, of, **look, label=name_of(layer))
    axes.set_ylim(0, 1.04)
    updates(axes, steps[-1])
    axes.set(xlabel="updates", ylabel="experts in use\n(1: all, equally)")
    labels = [handle.get_label() for handle in handles]
    columns = math.ceil(len(handles) / 8)
    if len(handles) <= MOST_NAMED:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=columns, labelspacing=0.25)


@styled
def stability(analysis) -> Drawing | None:
    """When routing settles: agreement with the weights that are analysed, churn, and what the character tells."""
    found, layers = analysis["stability"], analysis["layers"]
    if not found or not found["steps"] or not layers:
        return None
    steps = found["steps"]
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    agreement, churn, character, corner = figure.subplots(2, 2).flat
    styles = [row_style(index) for index in range(len(layers))]
    for of, style in zip(found["layers"], styles):
        look = {"color": style.colour, "linestyle": style.line, "linewidth": 1.4}
        mark = {"marker": style.marker, "markersize": 3.5, "markevery": max(1, len(steps) // 6)}
        agreement.plot(steps, [100 * value for value in of["agreement"]], **look, **mark)
        agreement.plot(steps, [100 * value for value in of["chance"]], color=style.colour, linewidth=0.8, dashes=(3, 2))
        changed = [(step, 100 * value) for step, value in zip(steps, of["churn"]) if value is not None]
        if changed:
            churn.plot(*zip(*changed), **look, **mark)
        character.plot(steps, [100 * value for value in of["character"]], **look, **mark)
    for axes in (agreement, churn, character):
        updates(axes, steps[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    agreement.set_ylim(0, 104)
    agreement.set_ylabel("characters that have\ntheir final expert, %")
    churn.set_ylabel("characters that change\nexpert, % per update")
    character.set_ylabel("share of H(expert) that\nthe character tells, %")
    churn.set_xlabel("updates")
    character.set_xlabel("updates")
    corner.axis("off")
    handles, labels = lines_of(styles), [name_of(layer) for layer in layers]
    for handle, style in zip(handles, styles):
        handle.set(marker=style.marker, markersize=3.5)
    if len(layers) > MOST_NAMED:
        handles, labels = [], []
    handles.append(Line2D([], [], color=INK, linewidth=0.8, dashes=(3, 2)))
    corner.legend(handles, [*labels, "agreement by chance"], loc="center", ncols=math.ceil(len(handles) / 9))
    heading(figure, analysis)
    apart = sorted({later - step for step, later in zip(steps, steps[1:])})
    caption = caption_of_run(
        analysis,
        "When does the routing settle? Above left: the share of characters whose expert in a snapshot is the one that "
        "they have in the analysed weights; thin dashed: what two routers of these loads would agree in by chance. "
        "Right: the share whose expert differs from the one in the snapshot before, per update in between, so that a "
        "character that changes twice counts at most once. Below: the share of H(expert) that the character tells.",
        f"{len(steps)} snapshots" + (f", {apart[0]} updates apart." if len(apart) == 1 else "."),
        characters=analysis["passes"],
    )
    spoken = ", ".join(
        f"{name_of(layer)} from {share(of['agreement'][0])} at step {steps[0]:,}"
        + (f" over {share(of['agreement'][len(steps) // 2])} at step {steps[len(steps) // 2]:,}" if steps[2:] else "")
        + f" (chance {share(of['chance'][-1])})"
        for layer, of in zip(layers, found["layers"])
    )
    return Drawing(figure, caption, f"Curves of agreement with the analysed weights: {spoken}.")


# ---------------------------------------------------------------------------------------------------------------------
# What tells the expert


class Telling(NamedTuple):
    """What an annotation tells, as shares of H(expert)."""

    label: str
    ours: float  # beyond chance
    frozen: float
    hash: float | None  # None where the control knows nothing but the character


def tellings(layer) -> list[Telling]:
    found = []
    if not layer["entropy"]:
        return found
    for kind, names in (("about", ALONE), ("about_given_character", BEYOND)):
        for name, label in names.items():
            if name in layer[kind]:
                ours = net(layer[kind][name], layer)
                hashed = layer["hash"][name]["mean"] if kind == "about" and name in layer["hash"] else None
                found.append(Telling(label, ours, layer["frozen"][kind][name]["mean"], hashed))
    return found


@styled
def information(analysis) -> Drawing | None:
    """Bars of what tells the expert, a panel a layer, with the frozen and the hash control."""
    told = [(layer, tellings(layer)) for layer in analysis["layers"] if tellings(layer)]
    if not told:
        return None
    labels = list(dict.fromkeys(one.label for _, of in told for one in of))
    alone = sum(label in ALONE.values() for label in labels)
    height = 0.55 + 0.24 * len(labels)
    handles = [Patch(color=COLOURS[2]), Line2D([], [], **HOLLOW), Line2D([], [], **HASHED)]
    handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (1.5, 1.5))))
    names = ["learned router", "random router", "table of characters", "all that is left"]
    size = WIDTH, 0.5 + height * rows_of(len(told)) + legend_height(names)
    figure = Figure(figsize=size, layout="constrained")
    panels = grid(figure, len(told), "% of H(expert)", sharex=True, sharey=True)
    for panel, (layer, of) in zip(panels, told):
        panel.axhline(alone - 0.5, color=INK, linewidth=0.7)
        left = 100 * layer["entropy_given_character"] / layer["entropy"]
        panel.plot([left, left], [alone - 0.5, len(labels) - 0.5], color=INK, linewidth=0.9, linestyle=(0, (1.5, 1.5)))
        for one in of:
            y = labels.index(one.label)
            panel.barh(y, 100 * one.ours, height=0.62, color=COLOURS[2])
            if one.hash is not None:
                panel.plot(100 * one.hash, y, **HASHED, zorder=4, clip_on=False)
            panel.plot(100 * one.frozen, y, **HOLLOW, zorder=4, clip_on=False)
            text = number(100 * one.ours, 0 if one.ours >= 0.0995 else 1)
            aside = {"xytext": (33, 0), "textcoords": "offset points", "xycoords": ("axes fraction", "data")}
            panel.annotate(text, (1, y), **aside, ha="right", va="center", fontsize=SMALL)
        panel.set_title(name_of(layer))
        row_axis(panel, labels)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.tick_params(axis="y", labelsize=10)
    panels[0].set_xlim(min(0, *(100 * one.ours for _, of in told for one in of)), 100)
    panels[0].set_xticks([0, 50, 100])
    legend_below(figure, handles, names)
    heading(figure, analysis)
    draws = [of["draws"] for layer, _ in told for of in layer["frozen"]["about"].values()]
    caption = caption_of_run(
        analysis,
        "What tells a character's expert? Bar and number: mutual information with the learned router's first choice as "
        "a share of its entropy H(expert), corrected for bias, less what relabelled text gives. Above the line: the "
        "character alone; below (+): what is added to it, at most what it leaves open of the learned router (dotted). "
        "Hollow circle: a frozen random router on the same inputs; diamond: a balanced table of the characters (mean "
        f"of {draws[0] if draws else 0} draws each, beyond chance too).",
    )
    spoken = "; ".join(
        f"{name_of(layer)}: " + ", ".join(f"{one.label} {share(one.ours)} (random {share(one.frozen)})" for one in of)
        for layer, of in told
    )
    return Drawing(figure, caption, f"Bars of what tells the expert, as a share of its entropy. {spoken}.")


# ---------------------------------------------------------------------------------------------------------------------
# Without experts


def together_of(ablations) -> list[tuple[str, dict]]:
    """(what was done to all layers at once, its cost)"""
    found = [(label, ablations[key]) for key, (label, _) in TOGETHER.items() if ablations[key]]
    for k, cost in sorted((ablations["top_k"] or {}).items(), key=lambda item: int(item[0]) or math.inf):
        found.append(("all experts for each character" if k == "0" else f"k = {k}", cost))
    return found


@styled
def ablation(analysis) -> Drawing | None:
    """What it costs to remove an expert, against the share of characters that it had; and to change all layers."""
    ablations = analysis["ablation"]
    removed = [(layer, of) for layer, of in zip(analysis["layers"], ablations["removed"]) if of] if ablations else []
    together = together_of(ablations) if ablations else []
    if not removed and not together:
        return None
    names = names_of_experts(max(len(of) for _, of in removed)) if removed else []
    heights = ([0.75 + 1.5 * rows_of(len(removed)) + legend_height(names)] if removed else []) + (
        [0.75 + rows_height([label for label, _ in together], least=0.3)] if together else []
    )
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if removed:
        draw_removals(parts[0], removed, names)
    if together:
        draw_together(parts[-1], together)
    heading(figure, analysis)
    caption = caption_of_run(
        analysis,
        "What it costs, in nats per character, to take a trained model's experts away. Above: each expert alone, "
        "against the share of characters whose main expert it was; they go to their next best one; horizontal: no cost."
        if removed
        else "",
        "Below: all layers at once. Shuffled: choices and gates are dealt out anew among a batch's characters, without "
        "relation to the text; hash: a balanced table of the character that was never trained; commonest: a table of "
        "the trained router's own favourites; k: so many experts for each character, by a model trained with "
        f"{trained_with(analysis)}." if together else "",
        "Whisker: standard error over windows.",
        characters=analysis["passes"],
    )  # fmt: skip
    spoken = [f"{label} {number(cost['nats'], 3, '+')}" for label, cost in together]
    for layer, of in removed:
        costs = [one["nats"] for one in of]
        spoken.append(f"one expert of {name_of(layer)} {number(min(costs), 3, '+')} to {number(max(costs), 3, '+')}")
    return Drawing(figure, caption, f"Dots of the nats that an intervention costs: {', '.join(spoken)}.")


def trained_with(analysis) -> str:
    return " or ".join(map(str, sorted({layer["k"] for layer in analysis["layers"]})))


def draw_removals(figure, removed, names) -> None:
    panels = grid(figure, len(removed), "its share, %", sharex=True, sharey=True)
    for panel, (layer, of) in zip(panels, removed):
        panel.axhline(0, color=INK, linewidth=0.9)
        for style, one in zip(expert_styles(layer["n_expert"]), of):
            look = {"color": style.colour, "marker": style.marker, "linestyle": "", "markersize": 6}
            panel.errorbar(100 * one["share"], one["nats"], yerr=one["se"], **look, elinewidth=1.1)
        panel.set_title(name_of(layer))
    panels[0].set_xlim(0, 108 * max(one["share"] for _, of in removed for one in of) or 1)
    panels[0].margins(y=0.12)
    panels[0].xaxis.set_major_locator(MaxNLocator(3))
    panels[0].yaxis.set_major_locator(MaxNLocator(4))
    figure.supylabel("cost of removal, nats", fontsize=10.5)
    styles = expert_styles(len(names))
    handles = [Line2D([], [], color=of.colour, marker=of.marker, linestyle="", markersize=6) for of in styles]
    legend_below(figure, handles, names)


def draw_together(figure, together) -> None:
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.9)
    for y, (_, cost) in enumerate(together):
        axes.errorbar(cost["nats"], y, xerr=cost["se"], color=COLOURS[6], marker="o", markersize=6, **ERROR_BARS)
        text = number(cost["nats"], 3, "+") + ("" if cost["se"] is None else f" ± {cost['se']:.3f}")
        beside(axes, text, y)
    row_axis(axes, [label for label, _ in together])
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("cost in all layers at once, nats per character")


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

NULLS = {"experts": (0.62, 0.3), "features": (0.3, 0.45)}  # height of the bar and opacity


@styled
def gradients(analysis) -> Drawing | None:
    """The cosine of the router's two gradients with its nulls, a row a layer; that of tokens' gradients, a row a
    block."""
    pulls = [one for one in analysis["router_gradients"] if one and one["cosine"] is not None]
    blocks = [
        one for one in analysis["conflicts"] if one["mean"] and one["mean"]["cosine_between_sequences"] is not None
    ]
    if not pulls and not blocks:
        return None
    rows = max(len(pulls), len(blocks))
    figure = Figure(figsize=(WIDTH, 1.25 + 0.4 * max(rows, 2)), layout="constrained")
    panels = list(figure.subplots(1, bool(pulls) + bool(blocks), squeeze=False)[0])
    handles = {}
    if pulls:
        handles |= draw_pulls(panels[0], pulls)
    if blocks:
        handles |= draw_conflicts(panels[-1], blocks)
    figure.set_figheight(figure.get_figheight() + legend_height(list(handles)))
    legend_below(figure, list(handles.values()), list(handles))
    heading(figure, analysis)
    where = "Left: the" if pulls and blocks else "The"
    caption = caption_of_run(
        analysis,
        f"{where} cosine between the router's gradients of cross-entropy and of the balancing loss, mean of "
        f"{pulls[0]['n']} training batches with its 95% interval; left of 0 the two pull against each other. Grey: "
        "95% of the cosines by chance, with the balancing gradient's experts in random order (wide bar) and with its "
        "features (narrow bar)." if pulls else "",
        f"{'Right: the' if pulls and blocks else 'The'} mean cosine of the gradients that two characters of different "
        "sequences send to the weights of the MLP or expert that serves both, ± standard error; hollow: chance, with "
        "errors dealt out anew among all characters there. The lower, the more they conflict." if blocks else "",
        "Batches of the training text.",
        characters=0,
    )  # fmt: skip
    spoken = []
    if pulls:
        of = ", ".join(f"{name_of(one)} {number(one['cosine'], 2, '+')}{interval_of(one)}" for one in pulls)
        spoken.append(f"Router's cosine: {of}.")
    if blocks:
        means = ((one, one["mean"]["cosine_between_sequences"]) for one in blocks)
        spoken.append(
            "Tokens' cosine: " + ", ".join(f"{name_of(one)} {number(mean, 4, '+')}" for one, mean in means) + "."
        )
    return Drawing(figure, caption, f"Dots of cosines of gradients. {' '.join(spoken)}")


def interval_of(one) -> str:
    return "" if one["low"] is None else f" [{number(one['low'], 2, '+')}, {number(one['high'], 2, '+')}]"


def draw_pulls(axes, pulls) -> dict:
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.use_sticky_edges = False  # which would put the widest bar on the edge
    handles = {}
    for y, one in enumerate(pulls):
        for name, (height, alpha) in NULLS.items():
            if null := one["chance"][name]:
                look = {"color": INK, "alpha": alpha, "linewidth": 0}
                axes.barh(y, null["high"] - null["low"], left=null["low"], height=height, **look)
                handles[f"chance, {name}"] = Patch(**look)
        whisker = None if one["low"] is None else [[one["cosine"] - one["low"]], [one["high"] - one["cosine"]]]
        axes.errorbar(one["cosine"], y, xerr=whisker, color=COLOURS[4], marker="o", markersize=6, **ERROR_BARS)
    row_axis(axes, [name_of(one) for one in pulls])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("router's cosine: cross-entropy\nand balancing loss")
    return {"router": Line2D([], [], color=COLOURS[4], marker="o", linestyle="", markersize=6), **handles}


def draw_conflicts(axes, blocks) -> dict:
    axes.axvline(0, color=INK, linewidth=0.9)
    looks = {"experts": {"color": COLOURS[6], "marker": "s"}, "dense": {"color": COLOURS[3], "marker": "^"}}
    names = {"experts": "characters of one expert", "dense": "characters of a dense MLP"}
    handles = {}
    for y, one in enumerate(blocks):
        mean, look = one["mean"], looks[one["kind"]] | {"linestyle": "", "markersize": 6}
        axes.errorbar(mean["cosine_between_sequences"], y, xerr=mean["error"], **look, **ERROR_BARS)
        handles[names[one["kind"]]] = Line2D([], [], **look)
        if mean["chance"]:
            axes.plot(mean["chance"]["mean"], y, **HOLLOW)
            handles["chance, errors"] = Line2D([], [], **HOLLOW)
    row_axis(axes, [name_of(one) for one in blocks])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    axes.set_xlabel("cosine of two characters' gradients")
    return handles
