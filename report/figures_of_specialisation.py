"""Pictures of one run's experts: which characters go to which, and how much each annotation explains.

    drawing = expert_map(analysis)                      # None where the analysis lacks the numbers

Blocks and experts are counted from 0, as in analysis.json and in sample.py's text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.transforms import ScaledTranslation

from analysis.analyses import net
from analysis.annotation import TOPIC
from report import layout
from report.captions import add_heading, block_name, caption_of_run, number, percent
from report.layout import legend_mark
from report.style import CONTROL, INK, SMALL, Drawing, styled
from run import records
from support.palette import SKY, VERMILION

AT_LEAST, MOST_CHARACTERS = 50, 60  # occurrences of a drawn character; number of drawn characters
LEVELS = 20  # shares are drawn in steps of 5%, as opacity of the ink: that suits light and dark mode
TABLE = {"color": VERMILION, "marker": "D", "linestyle": "", "fillstyle": "none", "markersize": 5}
DOTTED = {"color": INK, "linewidth": 0.9, "linestyle": (0, (1.5, 1.5))}

# annotation -> its label in the picture
ALONE = {"character": "the character", "class": "its class", "frequency band": "its frequency"}
ADDED = {  # to the character
    name: f"+ {name}"
    for name in ("place in the word", "place in the line", "previous character", "previous two", *TOPIC)
}


# ---------------------------------------------------------------------------------------------------------------------
# Character × expert


def class_of_name(name: str) -> str:
    """The character_class of a symbol, from the name that annotation.name_of gave it."""
    if name in ("newline", "space"):
        return name
    if len(name) > 1 or not name.isascii():  # tab, byte 0xC3, U+0301
        return "other"
    if name.isalpha():
        return "capital" if name.isupper() else "vowel" if name in "aeiou" else "consonant"
    return "digit" if name.isdigit() else "punctuation"


class Order(NamedTuple):
    symbols: list[int]  # rows of the picture from the top, as places in analysis["symbols"]
    classes: list[tuple[str, int, int]]  # name, first row, number of rows
    by: dict  # the layer whose experts give the order


def order_of(analysis) -> Order | None:
    """The order of the characters: by class, then by expert, then by the expert's share.

    The experts are those of the layer whose choice the character explains best. None where all characters are rare.
    """
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
def expert_map(analysis) -> Drawing | None:
    """A heat map of character × expert, a panel a layer; all layers have the same order of characters."""
    layers = analysis["layers"]
    order = order_of(analysis) if layers else None
    if not order:
        return None
    rows, columns = len(order.symbols), sum(layer["n_expert"] for layer in layers)
    gap = 0.5  # rows, between classes
    places = [row + gap * i for i, (_, first, n) in enumerate(order.classes) for row in range(first, first + n)]
    width = min(layout.WIDTH, max(4.2, 2.0 + 0.36 * columns))
    figure = layout.new_figure(max(2.6, 1.1 + 0.165 * (places[-1] + 1)), width)
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
        share = net(layer["about"]["character"], layer)
        told.append("–" if share is None else percent(share))
        name = block_name(layer) if len(layers) <= 8 else str(layer["block"])
        panel.set_title(f"{name}\n{told[-1]}", fontsize=10)
    panels[0].set_ylim(places[-1] + 0.5, -0.5)
    panels[0].set_yticks(places, [analysis["symbols"][i] for i in order.symbols], parse_math=False)
    mark_classes(panels[0], analysis, order, places)
    steps = (0.05, 0.25, 0.5, 0.75, 1)
    patches = [Patch(facecolor=INK, alpha=step, linewidth=0) for step in steps]
    compact = {"ncols": 5, "columnspacing": 1, "handlelength": 1.6}
    figure.legend(patches, [percent(step) for step in steps], loc="outside lower center", **compact)
    add_heading(figure, analysis)
    caption = caption_of_run(
        analysis,
        "Which expert does each character go to? Opacity: the share of a character's occurrences whose first choice is "
        "the expert, in steps of 5%; a row adds up to 100%. Under each block's name: the share of H(expert), the "
        "entropy of the choice, that the character explains beyond chance; with hash routing it is 100%. "
        f"All blocks show the same order of rows: by class, then by the commonest expert in {block_name(order.by)}, "
        f"then by its share. Shown are {rows} characters that occur at least {AT_LEAST} times"
        + (", the most frequent." if rows == MOST_CHARACTERS else "."),
    )
    spoken = ", ".join(f"{block_name(layer)} {share}" for layer, share in zip(layers, told))
    counts_RE = np.array([order.by["counts"][i] for i in order.symbols])
    alone = int((counts_RE.max(axis=1) >= 0.9 * counts_RE.sum(axis=1)).sum())
    alt = (
        f"Heat map of {rows} characters by expert. The character explains of the choice of expert: {spoken}. In "
        f"{block_name(order.by)} {alone} of the characters go to one expert at least nine times out of ten."
    )
    return Drawing(figure, caption, alt)


def draw_tiles(axes, shares_RE, places) -> None:
    """Draws each share as a tile; tiles of equal opacity are one path, which keeps the file small."""
    levels_RE = np.rint(shares_RE * LEVELS).astype(int)
    corners = np.array([(-0.47, -0.45), (0.47, -0.45), (0.47, 0.45), (-0.47, 0.45), (-0.47, -0.45)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for level in range(1, LEVELS + 1):
        centres = [(expert, places[row]) for row, expert in np.argwhere(levels_RE == level)]
        if centres:
            path = Path(np.concatenate([corners + centre for centre in centres]), codes * len(centres))
            axes.add_patch(PathPatch(path, facecolor=INK, alpha=level / LEVELS, linewidth=0))


def mark_classes(axes, analysis, order, places) -> None:
    """A line along the rows of each class, and its name; not for a class whose only character has that name."""
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
# Information


class Explained(NamedTuple):
    """Shares of H(expert) that one annotation explains, beyond chance."""

    label: str
    learned: float
    random: float  # by a frozen random router
    hashed: float | None  # by balanced hash routing; None where the annotation is more than the character


def explained_by(layer) -> list[Explained]:
    """One entry for each annotation; none for a layer whose router always chooses the same expert."""
    found = []
    for kind, names in (("about", ALONE), ("about_given_character", ADDED)) if layer["entropy"] else ():
        for name, label in names.items():
            if name in layer[kind]:
                random = layer["frozen"][kind][name]["mean"]
                hashed = layer["hash"][name]["mean"] if kind == "about" and name in layer["hash"] else None
                found.append(Explained(label, net(layer[kind][name], layer), random, hashed))
    return found


@styled
def information_bars(analysis) -> Drawing | None:
    """How much of the choice of expert each annotation explains, a panel a layer, beside two controls."""
    explained = [(layer, explained_by(layer)) for layer in analysis["layers"] if explained_by(layer)]
    if not explained:
        return None
    labels = list(dict.fromkeys(one.label for _, entries in explained for one in entries))
    alone = sum(label in ALONE.values() for label in labels)
    handles = [Patch(color=SKY), legend_mark(**CONTROL), legend_mark(**TABLE), legend_mark(**DOTTED)]
    names = ["learned router", "random router", "hash routing", "left open"]
    panel_heights = (0.55 + 0.24 * len(labels)) * layout.rows_of_panels(len(explained))
    figure = layout.new_figure(0.5 + panel_heights + layout.legend_height(names))
    panels = layout.block_panels(figure, len(explained), "% of H(expert)", sharex=True, sharey=True)
    for panel, (layer, entries) in zip(panels, explained):
        panel.axhline(alone - 0.5, color=INK, linewidth=0.7)
        left = 100 * layer["entropy_given_character"] / layer["entropy"]
        panel.plot([left, left], [alone - 0.5, len(labels) - 0.5], **DOTTED)
        for one in entries:
            y = labels.index(one.label)
            panel.barh(y, 100 * one.learned, height=0.62, color=SKY)
            if one.hashed is not None:
                panel.plot(100 * one.hashed, y, **TABLE, zorder=4, clip_on=False)
            panel.plot(100 * one.random, y, **CONTROL, zorder=4, clip_on=False)
            text = number(100 * one.learned, 0 if one.learned >= 0.0995 else 1)
            aside = {"xytext": (33, 0), "textcoords": "offset points", "xycoords": ("axes fraction", "data")}
            panel.annotate(text, (1, y), **aside, ha="right", va="center", fontsize=SMALL)
        panel.set_title(block_name(layer))
        layout.row_axis(panel, labels)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.tick_params(axis="y", labelsize=10)
    panels[0].set_xlim(min(0, *(100 * one.learned for _, entries in explained for one in entries)), 100)
    panels[0].set_xticks([0, 50, 100])
    layout.legend_below(figure, handles, names)
    add_heading(figure, analysis)
    draws = [control["draws"] for layer, _ in explained for control in layer["frozen"]["about"].values()]
    caption = caption_of_run(
        analysis,
        "What explains a character's expert? Bar and number: mutual information between an annotation and the learned "
        "router's first choice, as a share of the choice's entropy H(expert), corrected for bias, minus the same for "
        "relabelled text. Above the line: the character alone. Below (+): what an annotation adds to the character, at "
        "most the part that the character leaves open (dotted). Hollow circle: a frozen random router on the same "
        "inputs; diamond: balanced hash routing (both also beyond chance, mean of "
        f"{draws[0] if draws else 0} draws).",
    )
    spoken = "; ".join(
        f"{block_name(layer)}: "
        + ", ".join(f"{one.label} {percent(one.learned)} (random {percent(one.random)})" for one in entries)
        for layer, entries in explained
    )
    what = "Bars of how much annotations explain of the choice of expert, as a share of its entropy"
    return Drawing(figure, caption, f"{what}. {spoken}.")
