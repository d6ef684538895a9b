"""Picture of tuned rows: the loss of every candidate learning rate.

drawing = loss_by_rate(comparison)              # None where no row of the table is tuned
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from matplotlib.ticker import NullLocator

from papers import tuning
from papers.measures import MEASURES
from papers.table import Comparison
from report import layout
from report.captions import caption_of_table, cells_of, number, unit_of
from report.style import INK, ONE_SEED, Drawing, Style, row_style, styled

CHOSEN = {"color": INK, "marker": "o", "linestyle": "", "fillstyle": "none", "markersize": 11, "markeredgewidth": 1.1}


class Tried(NamedTuple):
    """A row's losses at each learning rate that was tried."""

    label: str
    style: Style
    losses: dict[float, list[float]]  # rate, rising -> nats of each seed
    chosen: float | None  # the rate

    @property
    def means(self) -> dict[float, float]:
        return {rate: statistics.fmean(nats) for rate, nats in self.losses.items()}


def tried_rates(comparison: Comparison) -> list[Tried]:
    """Of each tuned row with records."""
    found = []
    for row in comparison.table.rows_at(comparison.scale):
        if choice := comparison.choices.get(row.name):
            experiments = row.experiments_at(comparison.scale)
            rate_of = {of.name: of.config_at(comparison.scale).learning_rate for of in experiments}
            losses = {rate_of[name]: [*seeds.values()] for name, seeds in choice.losses.items() if seeds}
            found.append(Tried(row.label, row_style(len(found)), losses, rate_of.get(choice.name)))
    return [tried for tried in found if tried.losses]


@styled
def loss_by_rate(comparison: Comparison) -> Drawing | None:
    """Best full validation loss against the learning rate, a line a row; the chosen rates are ringed."""
    found = tried_rates(comparison)
    if not found:
        return None
    figure = layout.new_figure(4.2)
    axes = figure.subplots()
    handles = []
    for tried in found:
        handles += axes.plot(*zip(*tried.means.items()), **tried.style.curve, markersize=4.5)
        for rate, nats in tried.losses.items():
            axes.plot([rate] * len(nats), nats, color=tried.style.colour, marker=tried.style.marker, **ONE_SEED)
        if tried.chosen:
            axes.plot(tried.chosen, tried.means[tried.chosen], **CHOSEN)
    # Runs that a high rate spoilt would squash the rest: the axis ends above the losses at the lowest rate.
    lowest = min(min(nats) for tried in found for nats in tried.losses.values())
    highest = max(max(next(iter(tried.losses.values()))) for tried in found)
    margin = 0.05 * (highest - lowest) or 0.05
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xscale("log")
    rates = sorted({rate for tried in found for rate in tried.losses})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    cells = cells_of(comparison)
    axes.set_ylabel(f"{MEASURES['clean'].heading} loss, nats{f' per {unit_of(cells)}' if cells else ''}")
    layout.legend_below(figure, handles, [tried.label for tried in found], grow=True)
    above = [
        f"{tried.label} at {rate:g}, {' and '.join(number(one, 2) for one in high)}"
        for tried in found
        for rate, nats in tried.losses.items()
        if (high := [one for one in nats if one > highest + margin])
    ]
    first, last = tuning.CHOOSING[0], tuning.CHOOSING[-1]
    caption = caption_of_table(
        comparison,
        cells,
        f"best full validation loss at each learning rate, on seeds {first} to {last}. Line: mean over the seeds that "
        f"were run; small marks: one seed. Ring: the chosen rate, the better on these seeds of the two that were best "
        f"on seed {first}. Losses at the chosen rates are reported on other seeds.",
        f"Above the axis: {'; '.join(above)}." if above else "",
    )
    chosen = [f"{of.label} {of.chosen:g} with {number(of.means[of.chosen], 4)}" for of in found if of.chosen]
    spoken = f"Chosen: {'; '.join(chosen)}." if chosen else "None is chosen yet."
    return Drawing(figure, caption, f"Lines of validation loss against the learning rate. {spoken}")
