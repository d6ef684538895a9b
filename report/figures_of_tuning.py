"""Picture of tuned rows: the loss of every candidate learning rate.

drawing = loss_by_rate(comparison)              # None where no row of the table is tuned
"""

from __future__ import annotations

import statistics

from matplotlib.ticker import NullLocator

from papers import tuning
from papers.measures import MEASURES
from papers.table import Comparison
from report import layout
from report.captions import caption_of_table, cells_of, number, unit_of
from report.style import INK, ONE_SEED, Drawing, row_style, styled

CHOSEN = {"color": INK, "marker": "o", "linestyle": "", "fillstyle": "none", "markersize": 11, "markeredgewidth": 1.1}


@styled
def loss_by_rate(comparison: Comparison) -> Drawing | None:
    """Best full validation loss against the learning rate, a line a row; the chosen rates are ringed."""
    rows = [row for row in comparison.table.rows_at(comparison.scale) if row.name in comparison.choices]
    figure = layout.new_figure(4.2)
    axes = figure.subplots()
    handles, labels, spoken, rates = [], [], [], set()
    for row in rows:
        choice, style = comparison.choices[row.name], row_style(len(handles))
        rate_of = {of.name: of.config_at(comparison.scale).learning_rate for of in row.experiments_at(comparison.scale)}
        means = {name: statistics.fmean(of.values()) for name, of in choice.losses.items() if of}
        if not means:
            continue
        xs = [rate_of[name] for name in means]
        rates |= {*xs}
        handles += axes.plot(xs, [*means.values()], **style.curve, markersize=4.5)
        labels.append(row.label)
        for name in means:
            seeds = choice.losses[name]
            axes.plot(
                [rate_of[name]] * len(seeds), [*seeds.values()], color=style.colour, marker=style.marker, **ONE_SEED
            )
        if choice.name:
            axes.plot(rate_of[choice.name], means[choice.name], **CHOSEN)
            spoken.append(f"{row.label} {rate_of[choice.name]:g} with {number(means[choice.name], 4)}")
    if not handles:
        return None
    axes.set_xscale("log")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    unit = f"nats per {unit_of(cells)}" if (cells := cells_of(comparison)) else "nats"
    axes.set_ylabel(f"{MEASURES['clean'].heading} loss, {unit}")
    layout.legend_below(figure, handles, labels, grow=True)
    first, last = tuning.CHOOSING[0], tuning.CHOOSING[-1]
    caption = caption_of_table(
        comparison,
        cells,
        f"best full validation loss at each learning rate, on seeds {first} to {last}. Line: mean over the seeds that "
        f"were run; small marks: one seed. Ring: the chosen rate, the better on these seeds of the two that were best "
        f"on seed {first}. Losses of the chosen rates are told on other seeds.",
    )
    chosen = f"Chosen: {'; '.join(spoken)}." if spoken else "None is chosen yet."
    return Drawing(figure, caption, f"Lines of validation loss against the learning rate. {chosen}")
