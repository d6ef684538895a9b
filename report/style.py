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
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

from support.palette import BLUE, GREEN, ORANGE, PAPER, PAPER_ON_DARK, PURPLE, SKY, VERMILION

INK, INK_ON_DARK = "#1f2328", "#e6e8ea"  # text, axes and the first row; svg() makes INK follow the reader's scheme
COLOURS = (INK, ORANGE, SKY, GREEN, VERMILION, PURPLE, BLUE)  # Okabe and Ito's yellow cannot be seen on white
# No two of 7 colours, 8 markers and 5 lines have a common divisor, so 280 rows have styles of their own.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)))

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
ZERO = {"color": INK, "linewidth": 0.9}  # the line where nothing differs: at 0, or at 1 for ratios
ONE_SEED = {"linestyle": "", "markersize": 3.5, "alpha": 0.75, "markeredgewidth": 0}  # small beside a mean's mark
# A random router, or chance.
CONTROL = {"color": INK, "marker": "o", "linestyle": "", "fillstyle": "none", "markersize": 5.5}
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
