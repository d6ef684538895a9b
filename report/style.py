"""The look that all pictures share, and the way from a matplotlib figure to SVG and PNG.

    @styled                                             # draw with our settings, whatever the reader's matplotlibrc
    def some_curves(...) -> Drawing | None: ...

    path.write_text(svg(drawing.figure)); drawing.caption; drawing.alt

An SVG takes the colour of its text and axes from the reader's colour scheme, so that it suits light mode, dark mode
and paper. The same data give the same bytes.
"""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from support.palette import BLUE, GREEN, ORANGE, PAPER, PAPER_ON_DARK, PURPLE, SKY, VERMILION

WIDTH = 7.5  # inches, the report's column; text of 10.5 points stays readable on a phone, at half that width
INK, INK_ON_DARK = "#1f2328", "#e6e8ea"  # text, axes and the first row; svg() makes INK follow the reader's scheme
COLOURS = (INK, ORANGE, SKY, GREEN, VERMILION, PURPLE, BLUE)  # Okabe and Ito's yellow cannot be seen on white
# No two of 7 colours, 8 markers and 5 lines have a common divisor, so 280 rows have styles of their own.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)))
NO_BREAK = "\N{NO-BREAK SPACE}"
LINES_OF_A_PANEL = 12  # of a legend that stands in an empty panel
PANELS_A_ROW = 4

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
SMALL = 9.5  # points
ONE_SEED = {"linestyle": "", "markersize": 3.5, "alpha": 0.75, "markeredgewidth": 0}  # small beside a mean's mark
CONTROL = {
    "color": INK,
    "marker": "o",
    "linestyle": "",
    "fillstyle": "none",
    "markersize": 5.5,
}  # random router, chance
CHANCE = {"linewidth": 0.8, "dashes": (3, 2)}  # agreement by chance, beside a curve
BOUND = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 2))}  # a published gap, the threshold of a collapse


class Drawing(NamedTuple):
    figure: Figure
    caption: str  # stands alone: subject, number of seeds, machine
    alt: str  # the main numbers as text, for readers who do not see the picture


class Style(NamedTuple):
    colour: str
    marker: str
    line: str | tuple

    @property
    def mark(self) -> dict:
        return {"color": self.colour, "marker": self.marker, "linestyle": ""}

    @property
    def curve(self) -> dict:
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


def row_style(index: int) -> Style:
    """The style of a row by its place in its table: the same in all pictures of the table, and distinct in grey."""
    return Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)])


def expert_styles(count) -> list[Style]:
    """Styles of a layer's experts, none in ink."""
    colours = COLOURS[1:]
    return [row_style(i)._replace(colour=colours[i % len(colours)]) for i in range(count)]


def styled(draw):
    """Decorates a function that returns a Drawing or None: our settings, and a layout that is computed once.

    A second layout could move things by a hair and change the bytes of the SVG.
    """

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
# Numbers and labels


def number(value, digits=3, sign="") -> str:
    """A number with the minus sign of print, and none on a zero; sign="+" for a plus."""
    text = f"{value:{sign}.{digits}f}"
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def percent(share, digits=0) -> str:
    return f"{number(100 * share, digits)}%"


def interval_text(low, high, digits=3, sign="") -> str:
    """' [0.010, 0.030]'; empty where one seed gives no interval."""
    return "" if low is None else f" [{number(low, digits, sign)}, {number(high, digits, sign)}]"


def whiskers(mean, low, high) -> list | None:
    """Error bars for an interval, as matplotlib wants them; None where one seed gives no interval."""
    return None if low is None else [[mean - low], [high - mean]]


def wrapped(label, width=26) -> str:
    return textwrap.fill(label, width, break_long_words=False, break_on_hyphens=False)


def thousands(value, _=None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures, axes and legends


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


def reference_line(axes, x=0) -> None:
    """A vertical line where nothing differs: at 0 for differences, at 1 for ratios."""
    axes.axvline(x, color=INK, linewidth=0.9)


def text_above(axes, text, x, offset=3) -> None:
    """A text above the axes, centred on x; offset in points."""
    place = {"xytext": (0, offset), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
    axes.annotate(text, (x, 1), ha="center", **place)


def text_beside(axes, text, y, x=1.02) -> None:
    """A row's text to the right of the axes."""
    axes.annotate(text, (x, y), xycoords=("axes fraction", "data"), va="center", fontsize=10, annotation_clip=False)


def include(axes, low, high) -> None:
    """Widens the x axis so that it reaches from low to high: small differences then look small."""
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, low), max(right, high))


def updates_axis(axes, last) -> None:
    """An x axis of updates from 0 to last, with three ticks."""
    axes.set_xlim(0, last or 1)
    axes.set_xticks([0, last / 2, last] if last else [0])
    axes.xaxis.set_major_formatter(thousands)


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


def legend_mark(**look) -> Line2D:
    """A mark or a line that stands in a legend alone."""
    return Line2D([], [], **look)


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


# ---------------------------------------------------------------------------------------------------------------------
# Files

SHEET = (
    f".charmoe{{color:{INK};background:{PAPER}}}.charmoe *{{stroke-linejoin:round;stroke-linecap:butt}}"
    f"@media screen and (prefers-color-scheme:dark){{.charmoe{{color:{INK_ON_DARK};background:{PAPER_ON_DARK}}}}}"
)


def svg(figure: Figure) -> str:
    """The text of an SVG file that needs no other file and follows the reader's colour scheme (light on paper)."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.style.context(STYLE, after_reset=True):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue().replace(INK, "currentColor")
    text = text[text.index("<svg ") :]  # the lines before name a DTD on the network
    text = text.replace("<svg ", '<svg class="charmoe" ', 1)
    text = re.sub(r"<style.*?</style>", f"<style>{SHEET}</style>", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that nothing uses
    # Hundredths of a point are enough; scales are small numbers and keep their digits.
    shorter = functools.partial(re.sub, r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}")
    text = re.sub(r'\b(?:d|x|y)="[^"]*"|translate\([^)]*\)', lambda found: shorter(found[0]), text)
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def png(figure: Figure, path: str | Path) -> None:
    """A PNG on white, for screens that show no SVG."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
