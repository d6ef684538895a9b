"""The picture of a bench: each model's time divided by the dense model's, beside the published ratios.

    drawing = relative_time(bench)                      # of a record that bench_records.py reads; None without a ratio
    path.write_text(style.svg(drawing.figure))

Nothing here needs torch.
"""

from __future__ import annotations

import math

from report import layout
from report.captions import number
from report.speed_cells import PUBLISHED, PUBLISHED_ROWS, bench_headline
from report.style import ERROR_BARS, INK, ZERO, Drawing, row_style, styled
from run import records
from speed import bench_records

BAND = {"color": INK, "alpha": 0.13, "linewidth": 0}  # from the lowest published ratio to the highest
RATIO_TICKS = (  # from near together to far apart; each has 1 in it
    [tick / 20 for tick in range(10, 40)],
    [tick / 10 for tick in range(3, 50)],
    [0.4, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4],
    [0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10],
    [digit * 10.0**power for power in range(-2, 4) for digit in (1, 2, 5)],
    [10.0**power for power in range(-2, 7)],
)
MOST_TICKS = 6


@styled
def relative_time(bench: dict) -> Drawing | None:
    """Time divided by the dense model's in the same bench: for an update, and for a step of decoding by batch size."""
    places = [(task, batch) for task in ("train", "decode") for batch in bench_records.batch_sizes(bench, task)]
    timed = bench_records.measurements_of(bench)
    found = {key: one["ratio"] for key, one in timed.items() if one["ratio"] and key[1:] in places}
    names = [name for name in bench["models"] if name in {key[0] for key in found}]
    if not names:
        return None
    labels = [bench["models"][name]["title"] for name in names]
    figure, panels, _ = layout.panels_of(len(places), height=1.1 + layout.rows_height(labels, least=0.32))
    beyond = False
    for panel, (task, batch) in zip(panels, places):
        ratio_axis(panel, [*edges_of(found, task), *published_times(task)])
        if task == "train" or batch == 1:  # as the paper has it
            draw_published(panel, published_times(task))
        for y, name in enumerate(names):
            if (name, task, batch) in found:
                style = row_style(list(bench["models"]).index(name))
                beyond |= draw_ratio(panel, y, found[name, task, batch], style)
        panel.set_xlabel(f"{place_of(task, batch)}: time / dense's\n(right of 1: slower)")
        layout.row_axis(panel, labels)
    n = bench_records.from_to(ratio["n"] for ratio in found.values())
    sentences = [
        f"Time divided by that of {bench['models'][bench_records.DENSE]['title']} (the line at 1) in the same bench: "
        "for one update, and for one step of decoding, which adds a character to each sequence. Logarithmic axes.",
        f"Mark: median of n = {n} pairs timed in turn; whisker: their 10th to 90th "
        "percentile." + (" Arrow: beyond the axis." if beyond else ""),
        f"Grey: the MoE variants of {PUBLISHED.source}, at the papers' size, on their machine; their "
        "inference is eager, one text at a time, without a cache.",
        *bench_records.note_of_references(bench),
        *bench_records.doubts(bench),
        f"{bench_headline(bench)}; {records.machine_of(bench)}.",
    ]
    spoken = []
    for label, name in zip(labels, names):
        here = [(found[name, *place]["median"], place_of(*place)) for place in places if (name, *place) in found]
        spoken.append(f"{label} " + ", ".join(f"{bench_records.significant(ratio)} ({place})" for ratio, place in here))
    return Drawing(figure, " ".join(sentences), f"Marks of time divided by the dense model's. {'; '.join(spoken)}.")


def place_of(task, batch) -> str:
    return "training" if task == "train" else f"decoding, batch {batch}"


def edges_of(found, task) -> list[float]:
    """Ratios that the panels of one task have room for. References may be far slower and get an arrow instead."""
    keys = [key for key in found if key[1] == task and not key[0].startswith(bench_records.REFERENCE)]
    return [found[key][end] for key in keys for end in ("p10", "p90")]


def published_times(task) -> list[float]:
    """MoE divided by baseline, from the paper that prints times."""
    measure = "train_seconds" if task == "train" else "inference_speed"
    pairs = [PUBLISHED.published_pair(row, measure) for row in PUBLISHED_ROWS if row.baseline]
    return [ours / theirs if task == "train" else theirs / ours for ours, theirs in pairs]


def draw_published(axes, ratios) -> None:
    low, high = min(ratios), max(ratios)
    axes.axvspan(low, high, **BAND)
    layout.text_above(axes, f"published: {number(low, 2)}–{number(high, 2)}", math.sqrt(low * high))


def draw_ratio(axes, y, ratio, style) -> bool:
    """Draws a ratio with its percentiles. -> whether it is beyond the axis"""
    low, high = axes.get_xlim()
    beyond = not low < ratio["median"] < high
    if beyond:
        edge, marker = (0.03, "<") if ratio["median"] < low else (0.97, ">")
        axes.plot(edge, y, color=style.colour, marker=marker, markersize=7, transform=axes.get_yaxis_transform())
    else:
        bars = {"xerr": layout.whiskers(ratio["median"], ratio["p10"], ratio["p90"]), **ERROR_BARS}
        axes.errorbar(ratio["median"], y, color=style.colour, marker=style.marker, markersize=6, **bars)
    layout.text_beside(axes, bench_records.significant(ratio["median"]), y)
    return beyond


def ratio_axis(axes, ratios) -> None:
    """A logarithmic x axis with a few ticks that includes 1 and these ratios."""
    low, high = min(*ratios, 0.9), max(*ratios, 1.1)  # so that a small difference looks small
    margin = (high / low) ** 0.06
    low, high = low / margin, high * margin
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in RATIO_TICKS]
    ticks = next((ticks for ticks in inside if len(ticks) <= MOST_TICKS), inside[-1])
    axes.axvline(1, **ZERO)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
