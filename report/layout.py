"""Panels, axes and legends that several pictures share. Heights and widths are in inches."""

from __future__ import annotations

import functools
import math
import textwrap

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

WIDTH = 7.5  # the report's column; text of 10.5 points stays readable on a phone, at half that width
LINES_OF_A_PANEL = 12  # of a legend that stands in an empty panel
PANELS_A_ROW = 4

legend_mark = functools.partial(Line2D, [], [])  # a mark or a line that stands in a legend alone


def whiskers(mean, low, high) -> list | None:
    """Error bars for an interval, as matplotlib wants them; None where one seed gives no interval."""
    return None if low is None else [[mean - low], [high - mean]]


def wrapped(label, width=26) -> str:
    return textwrap.fill(label, width, break_long_words=False, break_on_hyphens=False)


def thousands(value, _=None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def new_figure(height, width=WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def panels_of(count, height=2.7):
    """That many panels in two columns with a common y axis.

    -> the figure, its panels, and the empty place after an odd number of panels (for the legend) or None
    """
    rows = math.ceil(count / 2)
    figure = new_figure(rows * height)
    axes = list(figure.subplots(rows, min(count, 2), sharey=True, squeeze=False).flat)
    for corner in axes[count:]:
        corner.axis("off")
    return figure, axes[:count], axes[count] if count % 2 and count > 1 else None


def block_panels(figure, count, xlabel="", **keys) -> list:
    """A panel a block, at most four a row, with xlabel below the lowest of each column."""
    columns = min(count, PANELS_A_ROW)
    axes = figure.subplots(rows_of_panels(count), columns, squeeze=False, **keys)
    panels = list(axes.flat)[:count]
    for empty in list(axes.flat)[count:]:
        empty.axis("off")
    for panel in panels[-columns:]:  # no supxlabel: a legend below would cover it
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(xlabel)
    return panels


def rows_of_panels(count) -> int:
    return math.ceil(count / PANELS_A_ROW)


def text_above(axes, text, x, offset=3) -> None:
    """A text above the axes, centred on x; offset in points."""
    place = {"xytext": (0, offset), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
    axes.annotate(text, (x, 1), ha="center", **place)


def text_beside(axes, text, y, x=1.02) -> None:
    """A row's text to the right of the axes."""
    axes.annotate(text, (x, y), xycoords=("axes fraction", "data"), va="center", fontsize=10, annotation_clip=False)


def updates_axis(axes, last) -> None:
    """An x axis of updates from 0 to last, with three ticks."""
    axes.set_xlim(0, last or 1)
    axes.set_xticks([0, last / 2, last] if last else [0])
    axes.xaxis.set_major_formatter(thousands)


def x_axis(axes, label, ticks=None, margin=None, reach=None) -> None:
    """Label, number of intervals between ticks, and room at both ends; reach: (low, high) that the axis includes."""
    axes.set_xlabel(label)
    if margin is not None:
        axes.margins(x=margin)
    if reach:
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, reach[0]), max(right, reach[1]))
    if ticks:
        axes.xaxis.set_major_locator(MaxNLocator(ticks))


def bits_axis(axes, unit) -> None:
    """A second y axis at the right: nats as bits."""
    axes.secondary_yaxis(
        "right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
    ).set_ylabel(f"bits per {unit}")


def rows_height(labels, least=0.42) -> float:
    """Inches for rows with these labels, all as high as the highest and at least `least`."""
    return len(labels) * max(least, 0.1 + 0.17 * max(wrapped(label).count("\n") + 1 for label in labels))


def row_axis(axes, labels) -> None:
    """A y axis of rows, the first on top."""
    axes.set_yticks(range(len(labels)), [wrapped(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def row_axes(panels, labels) -> None:
    """A y axis of rows for panels side by side; its labels stand at the first panel."""
    row_axis(panels[0], labels)
    for panel in panels[1:]:
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.grid(False, axis="y")


def legend_in(figure, corner, handles, labels) -> None:
    """A legend in an empty panel, or below the panels where it does not fit or corner is None."""
    folded = [wrapped(label, 32) for label in labels]
    if corner is not None and "\n".join(folded).count("\n") < LINES_OF_A_PANEL:
        corner.legend(handles, folded, loc="center", borderaxespad=0)
        return
    columns = max(1, min(4, int(WIDTH / (0.073 * max(map(len, labels)) + 0.6))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(labels) / columns))


def legend_columns(labels) -> int:
    """As few rows as the width allows, evenly filled."""
    fit = max(1, int(WIDTH / (0.08 * max(map(len, labels)) + 0.75)))
    return math.ceil(len(labels) / math.ceil(len(labels) / fit))


def legend_height(labels) -> float:
    """Inches of legend_below."""
    return 0.22 * math.ceil(len(labels) / legend_columns(labels)) if labels else 0.0


def legend_below(figure, handles, labels, grow=False) -> None:
    """A legend below all panels. Reserve legend_height for it, or let the figure grow by that."""
    if grow:
        figure.set_figheight(figure.get_figheight() + legend_height(labels))
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels))
