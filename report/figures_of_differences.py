"""Pictures of a table's rows against their baselines: differences of losses, ratios of costs.

    drawing = differences(comparison)                   # None where there is nothing to draw

Published differences and ratios stand beside the measured ones.
"""

from __future__ import annotations

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from papers.measures import MEASURES
from papers.table import Comparison
from report import layout, wording
from report.captions import baseline_label, caption_of_table, cells_of, interval_text, note_of_times, number, unit_of
from report.layout import legend_mark
from report.style import BOUND, ERROR_BARS, INK, ZERO, Drawing, row_style, styled
from report.verdicts import crossing_of, differences_by_size, effect_of
from support.intervals import Effect
from support.palette import BLUE, ORANGE

PUBLISHED = {"color": INK, "marker": "D", "linestyle": "", "fillstyle": "none", "markersize": 5.5}
MEASURED = PUBLISHED | {"fillstyle": "full"}


def difference_to_baseline(comparison, row, measure) -> Effect | None:
    """The row minus its baseline; None for a baseline, and where one of them has no run."""
    return effect_of(comparison, measure, row.name, row.baseline, "difference") if row.baseline else None


NEAR_1 = (0.9, 1.1)  # which axes of ratios include, so that a small difference looks small
RATIOS = {  # measure -> label of its axis, name in the caption
    "train_seconds": ("training time / baseline's\n(right of 1: slower)", "training time"),
    "inference_speed": (
        "inference speed / baseline's\n(left of 1: slower)",
        "inference speed (one sequence at a time, without a cache)",
    ),
}


@styled
def relative_cost(comparison: Comparison) -> Drawing | None:
    """Training time and inference speed over those of the row's baseline, beside the published ratios."""
    ours, theirs = {}, {}  # (row, measure) -> ratio
    for row in comparison.table.rows_at(comparison.scale):
        for measure in RATIOS if row.baseline else ():
            if effect := effect_of(comparison, measure, row.name, row.baseline, "ratio"):
                ours[row.name, measure] = effect
            if pair := comparison.table.published_pair(row, measure):
                theirs[row.name, measure] = pair[0] / pair[1]
    cells = [cell for cell in cells_of(comparison) if any((cell.row.name, measure) in ours for measure in RATIOS)]
    if not cells:
        return None
    shown = [m for m in RATIOS if any((cell.row.name, m) in {**ours, **theirs} for cell in cells)]
    labels = [cell.label_with_n for cell in cells]
    figure = layout.new_figure(1.2 + layout.rows_height(labels))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, measure in zip(panels, shown):
        panel.axvline(1, **ZERO)
        for y, cell in enumerate(cells):
            key = cell.row.name, measure
            if key in theirs:
                panel.plot(theirs[key], y, **PUBLISHED)
            if effect := ours.get(key):
                bars = {"xerr": layout.whiskers(*effect[:3]), **ERROR_BARS}
                panel.errorbar(effect.mean, y, **bars, **cell.style.mark, markersize=6)
                layout.text_beside(panel, number(effect.mean), y)
        layout.x_axis(panel, RATIOS[measure][0], ticks=4, margin=0.1, reach=NEAR_1)
    layout.row_axes(panels, labels)
    has_published = any((cell.row.name, measure) in theirs for cell in cells for measure in shown)
    if has_published:
        handles = [legend_mark(**PUBLISHED), legend_mark(**MEASURED)]
        figure.legend(handles, ["published", "measured (each row its own shape)"], loc="outside upper right", ncols=2)
    caption = caption_of_table(
        comparison,
        cells,
        f"{' and '.join(RATIOS[measure][1] for measure in shown)} divided by that of "
        f"{baseline_label(comparison, cells)}. Filled: ratio of the geometric means, with its 95% "
        "interval, paired by seed, where both have several runs.",
        "Open: published, for the paper's size and machine." if has_published else "",
        note_of_times(cells_of(comparison)),
    )
    spoken = []
    for cell in cells:
        found = {MEASURES[m].heading: ours[cell.row.name, m] for m in RATIOS if (cell.row.name, m) in ours}
        spoken.append(f"{cell.label} {', '.join(f'{name} {number(effect.mean)}' for name, effect in found.items())}")
    return Drawing(figure, caption, f"Dots of cost over the baseline's: {'; '.join(spoken)}.")


@styled
def aux_decomposition(comparison: Comparison) -> Drawing | None:
    """The difference to the baseline with auxiliary losses counted in, split into the model's and theirs."""
    parts = []
    for cell in cells_of(comparison):
        model, whole = (
            difference_to_baseline(comparison, cell.row, measure) for measure in ("paper", "paper_with_aux")
        )
        if model:
            parts.append((cell, model, whole.mean - model.mean))
    if not parts:
        return None
    cells = [cell for cell, _, _ in parts]
    baseline = baseline_label(comparison, cells)
    labels = [cell.label for cell in cells]
    figure = layout.new_figure(1.5 + layout.rows_height(labels, least=0.55))
    axes = figure.subplots()
    axes.axvline(0, **ZERO)
    axes.use_sticky_edges = False  # which would put the longest bar on the edge
    counted = {"facecolor": ORANGE, "edgecolor": INK, "hatch": "////", "linewidth": 0.5}
    for y, (_, model, aux) in enumerate(parts):
        axes.barh(y - 0.18, model.mean, height=0.32, color=BLUE)
        axes.errorbar(model.mean, y - 0.18, xerr=layout.whiskers(*model[:3]), color=INK, **ERROR_BARS)
        axes.barh(y + 0.18, aux, left=model.mean, height=0.32, **counted)
        axes.plot(model.mean + aux, y + 0.18, **MEASURED)
        # No sum: rounding would often make it wrong.
        layout.text_beside(axes, f"{number(model.mean)} + {number(aux)}", y)
    pairs = [pair for cell in cells if (pair := comparison.table.published_pair(cell.row, "paper"))]
    gaps = sorted({round(ours - theirs, 6) for ours, theirs in pairs})
    minus = [f"{gap:g}".replace("-", "−") for gap in gaps]
    at_their_size = "" if comparison.scale == "paper" else ", at the paper's size"
    for place, (gap, text) in enumerate(zip(gaps, minus)):
        axes.axvline(gap, **BOUND)
        layout.text_above(axes, f"published: {text}{at_their_size}".replace("-", "−"), gap, offset=3 + 13 * place)
    layout.row_axis(axes, labels)
    layout.x_axis(axes, f"validation loss minus that of {baseline},\nnats per {unit_of(cells)}", ticks=6)
    handles = [Patch(color=BLUE), Patch(**counted), legend_mark(**MEASURED)]
    names = ["the model's own", "auxiliary loss counted in", "sum"]
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    caption = caption_of_table(
        comparison,
        cells,
        f"validation loss with auxiliary losses counted in, minus the loss of {baseline}, split into the model's own "
        "difference and the auxiliary losses. Sampled validation: minimum over estimates from random batches. Whisker: "
        "95% interval, paired over the seeds that both have. What a balancing loss adds is no finding: with even loads "
        "it is its weight in every MoE layer, by construction.",
        *(f"Dashed: the published gap of {gap} nats{at_their_size}." for gap in minus),
    )
    spoken = "; ".join(
        f"{cell.label}: model {number(model.mean, sign='+')}, auxiliary loss {number(aux, sign='+')}"
        for cell, model, aux in parts
    )
    return Drawing(figure, caption, f"Bars of the difference to {baseline} in nats, in two parts. {spoken}.")


@styled
def difference_by_size(comparison: Comparison) -> Drawing | None:
    """Each model's loss minus the dense one's against unique characters; None where fewer than two sizes were run."""
    rows = {row.name: row for row in comparison.table.rows_at(comparison.scale)}
    # Models by their config file, called as in the label of a row: "30,000 characters, 4 experts".
    models = {row.config: row.label.partition(" characters, ")[2] for row in rows.values() if row.baseline}
    for measure in ("test", "clean"):
        of_models = {config: differences_by_size(comparison, measure, config) for config in models}
        if of_models := {config: by_size for config, by_size in of_models.items() if len(by_size) > 1}:
            break
    else:
        return None
    figure = layout.new_figure(3.9)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.axhline(0, **ZERO)
    handles, spoken = [], []
    for index, (config, by_size) in enumerate(of_models.items(), 1):
        effects = {size: difference_to_baseline(comparison, rows[name], measure) for size, (name, _) in by_size.items()}
        handles.append(draw_by_size(axes, by_size, effects, row_style(index)))
        words = "; ".join(f"{size:,} {number(effect.mean, sign='+')}" for size, effect in effects.items())
        spoken.append(f"{models[config]}: {words}")
    names = {size: name for by_size in of_models.values() for size, (name, _) in by_size.items()}
    epochs = {size: comparison.cells[names[size]][0]["epochs"] for size in sorted(names)}
    axes.set_xticks([*epochs], [f"{size:,}\n({count:.3g} epochs)" for size, count in epochs.items()], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("unique characters of training text")
    unit = unit_of(cells_of(comparison))
    axes.set_ylabel(f"{MEASURES[measure].heading},\nminus baseline's, nats per {unit}\n(below 0: better than dense)")
    if len(handles) > 1:
        layout.legend_below(figure, handles, [models[config] for config in of_models], grow=True)
    shown = {name for by_size in of_models.values() for name, _ in by_size.values()}
    crossings = (f"{models[config]}: {wording.crossing_text(by_size)}" for config, by_size in of_models.items())
    caption = caption_of_table(
        comparison,
        [cell for cell in cells_of(comparison) if cell.row.name in shown],
        f"{MEASURES[measure].heading} minus that of the dense model with equal active FLOPs. Large: mean with its 95% "
        "interval, paired by seed; small: one seed. Every run reads equally many characters, so fewer unique ones mean "
        "more epochs. Dashed where the difference is 0, with its 95% interval as a band, by the seeds that all sizes "
        f"have: {'; '.join(crossings)}.",
    )
    return Drawing(figure, caption, f"The loss difference in nats by unique characters. {'. '.join(spoken)}.")


def draw_by_size(axes, by_size, effects, style) -> Line2D:
    """One model's differences: a thin line a seed, the mean with intervals, and where it crosses 0."""
    for seed in sorted(set().union(*(values for _, values in by_size.values()))):
        line = [(size, values[seed]) for size, (_, values) in by_size.items() if seed in values]
        axes.plot(*zip(*line), color=style.colour, marker=".", linewidth=0.7, alpha=0.45)
    (mean,) = axes.plot([*effects], [effect.mean for effect in effects.values()], **style.curve, markersize=6)
    for size, effect in effects.items():
        axes.errorbar(size, effect.mean, yerr=layout.whiskers(*effect[:3]), color=style.colour, **ERROR_BARS)
    if crossing := crossing_of(by_size):
        axes.axvline(crossing.place, **BOUND | {"color": style.colour})
        if crossing.low is not None:
            reach = max(crossing.low, min(effects)), min(crossing.high, max(effects))
            axes.axvspan(*reach, color=style.colour, alpha=0.1, lw=0)
    return mean


@styled
def differences(comparison: Comparison) -> Drawing | None:
    """Each row's best loss on the full validation split minus its baseline's, with the published difference."""
    if comparison.table.of != "records":
        return None
    effects = {
        row.name: difference_to_baseline(comparison, row, "clean") for row in comparison.table.rows_at(comparison.scale)
    }
    cells = [cell for cell in cells_of(comparison) if effects[cell.row.name]]
    if not cells:
        return None
    measure, labels = MEASURES["clean"], [cell.label for cell in cells]
    figure = layout.new_figure(1.15 + layout.rows_height(labels))
    axes = figure.subplots()
    axes.axvline(0, **ZERO)
    spoken, handles = [], []
    for y, cell in enumerate(cells):
        if pair := comparison.table.published_pair(cell.row, "paper"):
            handles = axes.plot(pair[0] - pair[1], y, **PUBLISHED)
        mean, low, high, n, _ = effects[cell.row.name]
        look = {"color": cell.style.colour, "marker": cell.style.marker}
        axes.errorbar(mean, y, xerr=layout.whiskers(mean, low, high), **look, **ERROR_BARS, markersize=6)
        text = f"{number(mean, sign='+')}{interval_text(low, high)}, n = {n}"
        layout.text_beside(axes, text, y)
        spoken.append(f"{cell.label} {text}")
    layout.row_axis(axes, labels)
    name = f"{measure.heading}, minus baseline's, {measure.unit}\n(left of 0: better)"
    layout.x_axis(axes, name, ticks=5, margin=0.08)
    if handles:
        figure.legend(handles, ["published"], loc="outside upper right")
    caption = caption_of_table(
        comparison,
        cells,
        f"each row's {measure.heading} minus that of its baseline. Whisker: 95% interval of the differences paired by "
        "seed, where both have several.",
        "Open: published difference, at the paper's size and by the paper's own measure." if handles else "",
    )
    how = f"Dots of the difference to the baseline, {measure.unit}, with intervals."
    return Drawing(figure, caption, f"{how} {'; '.join(spoken)}.")
