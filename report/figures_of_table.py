"""Pictures of a table's rows, each by itself: losses during training, losses against costs, loads of the experts.

    drawing = loss_curves(comparison)                   # None where there is nothing to draw

Rows without records are left out and named in the caption. Seconds come only from runs that had the hardware to
themselves. Rows against their baselines: figures_of_differences.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from papers.measures import MEASURES
from papers.table import Comparison
from report import layout
from report.captions import caption_of_table, cells_of, note_of_times, number, unit_of
from report.style import ERROR_BARS, INK, ONE_SEED, Drawing, row_style, styled

EARLY = 0.1  # of a run's steps: losses before do not widen the axis


# ---------------------------------------------------------------------------------------------------------------------
# Loss


class Curve(NamedTuple):
    """The losses of one row's seeds, at the evaluations that all of them have; in nats."""

    steps: list[int]
    seconds: list[float]
    low: list[float]
    mean: list[float]
    high: list[float]
    train: list[float]  # on training batches, in eval mode


def curve_of(runs) -> Curve:
    by_step = [{line["step"]: line for line in run["evaluations"]} for run in runs]
    steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
    losses = [[lines[step]["clean"]["nats"] for lines in by_step] for step in steps]
    return Curve(
        steps,
        [statistics.fmean(lines[step].get("train_seconds", 0.0) for lines in by_step) for step in steps],
        [min(at) for at in losses],
        [statistics.fmean(at) for at in losses],
        [max(at) for at in losses],
        [statistics.fmean(lines[step]["paper"]["train"] for lines in by_step) for step in steps],
    )


def loss_limits(lines: Iterable[tuple[list, list]]) -> tuple[float, float]:
    """Limits of the y axis for lines of (steps, losses), without the first steps, which would squash the rest."""
    late = [loss for steps, losses in lines for step, loss in zip(steps, losses) if step >= EARLY * steps[-1]]
    margin = 0.04 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin


def draw_curve(axes, x, curve, style) -> Line2D:
    if curve.low != curve.high:
        axes.fill_between(x, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0)
    return axes.plot(x, curve.mean, **style.curve, markersize=3.5, markevery=max(1, len(x) // 8))[0]


@styled
def loss_curves(comparison: Comparison) -> Drawing | None:
    """Loss on the full validation split against updates, characters read and, where known, seconds of training."""
    cells = cells_of(comparison)
    if not cells:
        return None
    curves = [curve_of(cell.runs) for cell in cells]
    timed = [curve_of(cell.timed) if cell.timed else None for cell in cells]
    unit = unit_of(cells)
    names = ["updates", f"{unit_of(cells, plural='s')} read, millions", "training time, s"][: 3 if any(timed) else 2]
    figure, panels, corner = layout.panels_of(len(names))
    handles = []
    for cell, curve, by_clock in zip(cells, curves, timed):
        config = cell.runs[0]["config"]
        an_update = config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"] / 1e6
        handles.append(draw_curve(panels[0], curve.steps, curve, cell.style))
        draw_curve(panels[1], [step * an_update for step in curve.steps], curve, cell.style)
        if by_clock:
            draw_curve(panels[2], by_clock.seconds, by_clock, cell.style)
    for panel, name in zip(panels, names):
        layout.x_axis(panel, name, ticks=5)
        panel.set_xlim(left=0)
    panels[0].xaxis.set_major_formatter(layout.thousands)
    panels[0].set_ylim(loss_limits((curve.steps, edge) for curve in curves for edge in (curve.low, curve.high)))
    for panel in panels[::2]:
        panel.set_ylabel(f"validation loss,\nnats per {unit}")
    layout.bits_axis(panels[1], unit)
    layout.legend_in(figure, corner, handles, [cell.label_with_n for cell in cells])
    caption = caption_of_table(
        comparison,
        cells,
        "cross-entropy on the full validation split during training. Line: mean over seeds; band: lowest to highest "
        "seed. The axis leaves out the first steps, where the loss starts near "
        f"{max(curve.mean[0] for curve in curves):.1f} nats.",
        note_of_times(cells),
    )
    ends = ", ".join(f"{cell.label} {curve.mean[-1]:.3f}" for cell, curve in zip(cells, curves))
    return Drawing(figure, caption, f"Curves of validation loss in nats during training. Last values: {ends}.")


@styled
def curves_of_runs(labelled: Mapping[str, Sequence[dict]]) -> Drawing:
    """Loss curves of local runs, which may still train. {label: runs}, of which only unit and evaluations are read.

    Thin: one seed; thick: mean; dotted: training batches. The caption stands in the picture: nothing else shows it.
    """
    figure, (axes,), _ = layout.panels_of(1, height=4.3)
    handles, drawn = [], []
    for index, runs in enumerate(labelled.values()):
        style, mean = row_style(index), curve_of(runs)
        for seed in [curve_of([run]) for run in runs]:
            axes.plot(seed.steps, seed.mean, color=style.colour, alpha=0.45, linewidth=0.8)
            drawn.append((seed.steps, seed.mean))
        handles.append(draw_curve(axes, mean.steps, mean._replace(low=mean.high), style))  # without a band
        axes.plot(mean.steps, mean.train, color=style.colour, linewidth=1.1, linestyle=(0, (1, 1.6)))
        drawn.append((mean.steps, mean.train))
    unit = " or ".join(sorted({run["unit"] for runs in labelled.values() for run in runs}))
    axes.set(xlabel="updates", ylabel=f"validation loss, nats per {unit}", ylim=loss_limits(drawn))
    axes.set_xlim(left=0)
    layout.bits_axis(axes, unit)
    layout.legend_in(figure, None, handles, [f"{label} (n = {len(runs)})" for label, runs in labelled.items()])
    caption = "Cross-entropy on the full validation split. Thin: one seed; thick: mean; dotted: on training batches."
    axes.set_title(caption, fontsize=8.5, loc="left")
    return Drawing(figure, caption, "Curves of validation loss against updates.")


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def mean_and_sd(values) -> tuple[float, float | None]:
    """The mean and the sample SD, which is None for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@styled
def loss_against_cost(comparison: Comparison) -> Drawing | None:
    """Best loss on the full validation split against active parameters, all parameters and training time."""
    cells = cells_of(comparison)
    if not cells:
        return None
    names = {
        "active_parameters": "active parameters, millions",
        "total_parameters": "all parameters, millions",
        "train_seconds": "training time, s",
    }
    if not any(cell.timed for cell in cells):
        del names["train_seconds"]
    figure, panels, corner = layout.panels_of(len(names))
    for panel, (measure, name) in zip(panels, names.items()):
        draw_cost(panel, comparison, cells, measure)
        layout.x_axis(panel, name, ticks=5)
    for panel in panels[::2]:
        panel.set_ylabel(f"best validation loss,\nnats per {unit_of(cells)}")
    handles = [layout.legend_mark(**cell.style.mark, markersize=6) for cell in cells]
    layout.legend_in(figure, corner, handles, [cell.label_with_n for cell in cells])
    caption = caption_of_table(
        comparison,
        cells,
        "best cross-entropy on the full validation split against parameters and training time. Small: one seed; large: "
        "mean ± sample SD. Lower left is better. Rows with nearly equal parameters are drawn side by side.",
        note_of_times(cells),
    )
    spoken = []
    for cell in cells:
        mean, sd = mean_and_sd(list(comparison.values(cell.row.name, "clean").values()))
        loss = number(mean) + ("" if sd is None else f" ± {sd:.3f}")
        millions = cell.runs[0]["parameters"]["total"] / 1e6
        spoken.append(f"{cell.label} {loss} nats with {millions:.2f} million parameters")
    return Drawing(figure, caption, f"Dots of best validation loss against cost: {', '.join(spoken)}.")


def draw_cost(axes, comparison, cells, measure) -> None:
    is_time = MEASURES[measure].timed
    points, drawn = [], []
    for cell in cells:
        losses, costs = (comparison.values(cell.row.name, key) for key in ("clean", measure))
        pairs = [(costs[seed] / (1 if is_time else 1e6), losses[seed]) for seed in losses if seed in costs]
        if pairs:
            drawn.append(cell)
            points.append(tuple(zip(*pairs)))
    offsets = [0.0] * len(drawn)
    if not is_time:  # times differ by themselves, but parameters may be the same
        places = [statistics.fmean(x) for x, _ in points]
        offsets = side_by_side(places, near=0.04 * max(places))
        axes.set_xlim(0, 1.25 * max(places))
    for cell, (x, y), offset in zip(drawn, points, offsets):
        aside = axes.transData + ScaledTranslation(offset / 72, 0, axes.figure.dpi_scale_trans)
        axes.update_datalim(list(zip(x, y)))  # matplotlib does not count points that have another transform
        if len(x) > 1:
            axes.plot(x, y, **cell.style.mark | ONE_SEED, transform=aside)
        (cost, cost_sd), (loss, loss_sd) = mean_and_sd(x), mean_and_sd(y)
        bars = {"xerr": cost_sd if is_time else None, "yerr": loss_sd}
        axes.errorbar(cost, loss, **bars, **cell.style.mark, **ERROR_BARS, transform=aside, markersize=6)
    axes.margins(0.1)
    axes.autoscale_view()


@styled
def loss_by_length(comparison: Comparison) -> Drawing | None:
    """Best loss of complete runs against the FLOPs and the seconds of their training, one line a model.

    A line joins the schedule lengths of a model (`Table.lengths`).
    """
    cells = cells_of(comparison)
    if not cells:
        return None
    names = {"training_flops": "training FLOPs, 10¹²", "train_seconds": "training time, s"}
    if not any(cell.timed for cell in cells):
        del names["train_seconds"]
    figure, panels, corner = layout.panels_of(len(names), height=3.0)
    for panel, (measure, name) in zip(panels, names.items()):
        means = {cell.row.name: draw_run(panel, comparison, cell, measure) for cell in cells}
        for model in comparison.table.lengths:
            line = sorted(means[row] for row in model if means.get(row))
            style = next((cell.style for cell in cells if cell.row.name in model), None)
            if len(line) > 1:
                panel.plot(*zip(*line), color=style.colour, linewidth=1.1, zorder=1)
        layout.x_axis(panel, name, ticks=5, margin=0.1)
    panels[0].set_ylabel(f"best validation loss,\nnats per {unit_of(cells)}")
    handles = [layout.legend_mark(**cell.style.mark, markersize=6) for cell in cells]
    layout.legend_in(figure, corner, handles, [cell.label_with_n for cell in cells])
    ratios = {cell.label: comparison.values(cell.row.name, "equivalent_steps") for cell in cells}
    even = "; ".join(
        f"{label} {number(statistics.geometric_mean(of.values()), 2)}" for label, of in ratios.items() if of
    )
    caption = caption_of_table(
        comparison,
        cells,
        "best cross-entropy on the full validation split of complete runs, against the FLOPs and the time of their "
        "training. Small: one seed; large: mean ± sample SD. Lower left is better. A line joins the schedule lengths "
        "of a model.",
        f"Steps that the dense model needs to the same loss, over the row's own: {even}." if even else "",
        note_of_times(cells),
    )
    return Drawing(figure, caption, f"Dots of best validation loss against FLOPs and seconds of training. {caption}")


def draw_run(axes, comparison, cell, measure) -> tuple[float, float] | None:
    """Draws each seed of a row, and their mean (cost, loss), which is returned; None where no cost counts."""
    losses = comparison.values(cell.row.name, "clean")
    if measure == "training_flops":
        costs = {run["config"]["seed"]: run["training_flops_per_token"] * run["tokens"] / 1e12 for run in cell.runs}
    else:
        costs = comparison.values(cell.row.name, measure)
    x, y = zip(*[(costs[seed], losses[seed]) for seed in losses if seed in costs]) if costs else ((), ())
    if not x:
        return None
    if len(x) > 1:
        axes.plot(x, y, **cell.style.mark | ONE_SEED)
    (cost, cost_sd), (loss, loss_sd) = mean_and_sd(x), mean_and_sd(y)
    axes.errorbar(cost, loss, xerr=cost_sd, yerr=loss_sd, **cell.style.mark, **ERROR_BARS, markersize=6)
    return cost, loss


def side_by_side(places, near) -> list[float]:
    """An offset in points for each place, so that places nearer than `near` do not hide each other."""
    groups = []
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        if groups and places[i] - places[groups[-1][0]] <= near:
            groups[-1].append(i)
        else:
            groups.append([i])
    offsets = [0.0] * len(places)
    for group in groups:
        for place, i in enumerate(sorted(group)):  # in the table's order
            offsets[i] = (place - (len(group) - 1) / 2) * min(8, 70 / len(group))
    return offsets


# ---------------------------------------------------------------------------------------------------------------------
# Load


@styled
def load_over_training(comparison: Comparison) -> Drawing | None:
    """Each expert's share of the choices during training: a row of panels a row of the table, a panel a MoE layer.

    Only the first seed is drawn: which expert is number 0 is chance, and a mean over seeds would look even.
    """
    cells = [cell._replace(runs=cell.runs[:1]) for cell in cells_of(comparison)]
    cells = [cell for cell in cells if cell.runs[0]["evaluations"][-1]["load"]]
    if not cells:
        return None
    evaluations = [cell.runs[0]["evaluations"] for cell in cells]
    ends = [lines[-1]["load"] for lines in evaluations]  # [row][layer][expert]
    figure = layout.new_figure(1.0 + 1.15 * len(cells))
    panels = figure.subplots(len(cells), max(map(len, ends)), sharex=True, sharey=True, squeeze=False)
    for cell, lines, end, of_row in zip(cells, evaluations, ends, panels):
        of_row[0].set_title(" ")  # room for the label, which may be wider than its panel
        above = {"xycoords": "axes fraction", "textcoords": "offset points", "in_layout": False}
        of_row[0].annotate(cell.label, (0, 1), (0, 5), **above)
        for panel in of_row[len(end) :]:
            panel.axis("off")
        for layer, panel in enumerate(of_row[: len(end)]):
            experts = len(end[layer])
            panel.axhline(100 / experts, color=INK, linewidth=0.8, alpha=0.5)
            for expert in range(experts):
                shares = [100 * line["load"][layer][expert] for line in lines]
                panel.plot([line["step"] for line in lines], shares, color=row_style(expert + 1).colour, linewidth=1.2)
    for layer, panel in enumerate(panels[-1]):
        panel.set_xlabel(f"layer {layer + 1}")
    panels[0, 0].set(xlim=(0, None), ylim=(0, None))
    last = max(lines[-1]["step"] for lines in evaluations)
    panels[0, 0].set_xticks([0, last / 2, last])
    panels[0, 0].xaxis.set_major_formatter(layout.thousands)
    panels[0, 0].yaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("updates", fontsize=10.5)
    figure.supylabel("share of choices, %", fontsize=10.5)
    counts = " or ".join(map(str, sorted({len(layer) for end in ends for layer in end})))
    seeds = ", ".join(map(str, sorted({cell.runs[0]["config"]["seed"] for cell in cells})))
    caption = caption_of_table(
        comparison,
        cells,
        "share of the router's choices that goes to each expert (one line each) on the validation split, by MoE layer, "
        f"during training. Horizontal line: equal shares, 1/E, E = {counts}. Only seed {seeds} is shown, because "
        "expert numbers do not correspond between seeds.",
    )
    shares = [[100 * share for layer in end for share in layer] for end in ends]
    spoken = ", ".join(f"{cell.label} {min(of):.0f}% to {max(of):.0f}%" for cell, of in zip(cells, shares))
    return Drawing(figure, caption, f"Curves of each expert's share of the choices. At the end: {spoken}.")
