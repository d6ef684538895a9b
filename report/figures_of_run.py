"""Pictures of one run's analysis: load and stability over training, ablation, gradients, specialisation.

    for name, drawing in of_run(analysis).items():      # an analysis that analyze.py wrote
        path.write_text(style.svg(drawing.figure))

A picture whose numbers the analysis lacks is not drawn: a dense model has gradients alone, a run without snapshots no
stability. Blocks and experts are counted from 0. Rows of a table side by side: figures_of_rows.py. No torch.
"""

from __future__ import annotations

import math

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis import analyses
from report import layout
from report.captions import add_heading, block_name, caption_of_run, interval_text, number, percent
from report.figures_of_specialisation import expert_map, information_bars
from report.layout import legend_mark
from report.style import BOUND, CHANCE, CONTROL, ERROR_BARS, INK, SMALL, ZERO, Drawing, expert_styles, row_style, styled
from run import records
from support.palette import BLUE, GREEN, VERMILION

MOST_NAMED = 16  # experts or blocks that a legend names

INTERVENTIONS = {  # key of an ablation -> (its label, a short one)
    "shuffled_all": ("routing shuffled", "shuffled"),
    "hashed_all": ("hash routing", "hashed"),
    "tabulated_all": ("each character to its commonest expert", "commonest"),
    "removed_all": ("each layer's cheapest expert removed", "one removed"),
    "merged_all": ("each layer's cheapest expert merged", "one merged"),
}


def of_run(analysis) -> dict[str, Drawing]:
    """{name: picture} of all pictures for which the analysis has the numbers."""
    drawings = {name: draw(analysis) for name, draw in FIGURES_OF_RUN.items()}
    return {name: drawing for name, drawing in drawings.items() if drawing}


# ---------------------------------------------------------------------------------------------------------------------
# Over training


@styled
def load_curves(analysis) -> Drawing | None:
    """Each expert's share of the choices at every evaluation, and how much of its experts each block uses."""
    evolution, layers = analysis["evolution"], analysis["layers"]
    if not evolution or not layers:
        return None
    steps, loads = evolution["steps"], list(zip(*evolution["loads"]))  # loads: [layer][evaluation][expert]
    used = [utilisations(layer, of_layer) for layer, of_layer in zip(layers, loads)]
    has_choice = any(values is not None for values in used)
    styles = expert_styles(max(layer["n_expert"] for layer in layers))
    names = expert_names(len(styles))
    heights = [0.65 + 1.35 * layout.rows_of_panels(len(layers)) + layout.legend_height(names), *[2.0] * has_choice]
    figure = layout.new_figure(sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = layout.block_panels(parts[0], len(layers), "" if has_choice else "updates", sharex=True, sharey=True)
    for panel, layer, of_layer in zip(panels, layers, loads):
        panel.axhline(100 / layer["n_expert"], color=INK, linewidth=0.8, alpha=0.5)
        for expert, style in enumerate(expert_styles(layer["n_expert"])):
            look = {"color": style.colour, "linestyle": style.line}
            panel.plot(steps, [100 * at[expert] for at in of_layer], **look, linewidth=1.3)
        panel.set_title(block_name(layer))
    panels[0].set_ylim(bottom=0)
    layout.updates_axis(panels[0], steps[-1])
    panels[0].yaxis.set_major_locator(MaxNLocator(3))
    parts[0].supylabel("share of choices, %", fontsize=10.5)
    layout.legend_below(parts[0], [legend_mark(color=style.colour, linestyle=style.line) for style in styles], names)
    if has_choice:
        draw_utilisation(parts[1], layers, steps, used)
    add_heading(figure, analysis)
    counts = " or ".join(map(str, sorted({layer["n_expert"] for layer in layers})))
    caption = caption_of_run(
        analysis,
        f"{'Above: the' if has_choice else 'The'} share of choices that goes to each expert, at every evaluation "
        f"during training. Horizontal line: equal shares, 1/E, E = {counts}.",
        "Below: how much each block uses its experts, (exp H(load) − k) / (E − k): 0 when all characters go to the "
        f"same, 1 when all experts get equally many. Below {records.COLLAPSED_BELOW:g} the router counts as collapsed."
        if has_choice else "",
        *map(analyses.collapse_text, analysis["collapsed"]),
        f"{len(steps)} evaluation{'' if len(steps) == 1 else 's'} on the validation split.",
        characters=0,
    )  # fmt: skip
    last = ", ".join(
        f"{block_name(layer)} {percent(min(of_layer[-1]))} to {percent(max(of_layer[-1]))}"
        + ("" if values is None else f" (uses {percent(values[-1])})")
        for layer, of_layer, values in zip(layers, loads, used)
    )
    return Drawing(figure, caption, f"Curves of each expert's share of the choices. At the end: {last}.")


def utilisations(layer, loads) -> list[float] | None:
    """A layer's utilisation at each evaluation; None where its router has no choice to make."""
    used = [records.utilisation(at, layer["k"]) for at in loads]
    return None if None in used else used


def expert_names(count) -> list[str]:
    """Labels of a legend; none where it would be too long to be of use."""
    return [f"expert {i}" for i in range(count)] if count <= MOST_NAMED else []


def draw_utilisation(figure, layers, steps, used) -> None:
    axes = figure.subplots()
    axes.axhline(records.COLLAPSED_BELOW, **BOUND)
    low = {"xytext": (4, 3), "textcoords": "offset points", "xycoords": ("axes fraction", "data"), "va": "bottom"}
    axes.annotate(f"below {records.COLLAPSED_BELOW:g}: collapsed", (0, records.COLLAPSED_BELOW), **low, fontsize=SMALL)
    handles = []
    for index, (layer, values) in enumerate(zip(layers, used)):
        if values is not None:
            handles += axes.plot(steps, values, **row_style(index).curve, markersize=3.5, label=block_name(layer))
    axes.set_ylim(0, 1.04)
    layout.updates_axis(axes, steps[-1])
    axes.set(xlabel="updates", ylabel="experts in use\n(1: equal shares)")
    if len(handles) <= MOST_NAMED:
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "labelspacing": 0.25}
        axes.legend(handles=handles, ncols=math.ceil(len(handles) / 8), **place)


@styled
def stability_curves(analysis) -> Drawing | None:
    """When routing settles: agreement with the final weights, changes per update, and what the character explains."""
    found, layers = analysis["stability"], analysis["layers"]
    if not found or not found["steps"] or not layers:
        return None
    steps = found["steps"]
    figure = layout.new_figure(5.0)
    agreement, churn, character, corner = figure.subplots(2, 2).flat
    styles = [row_style(index) for index in range(len(layers))]
    for values, style in zip(found["layers"], styles):
        look = style.curve | {"linewidth": 1.4, "markersize": 3.5, "markevery": max(1, len(steps) // 6)}
        agreement.plot(steps, [100 * value for value in values["agreement"]], **look)
        agreement.plot(steps, [100 * value for value in values["chance"]], color=style.colour, **CHANCE)
        changed = [(step, 100 * value) for step, value in zip(steps, values["churn"]) if value is not None]
        if changed:
            churn.plot(*zip(*changed), **look)
        character.plot(steps, [100 * value for value in values["character"]], **look)
    for axes in (agreement, churn, character):
        layout.updates_axis(axes, steps[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    agreement.set_ylim(0, 104)
    agreement.set_ylabel("characters that have\ntheir final expert, %")
    churn.set_ylabel("characters that change\nexpert, % per update")
    character.set_ylabel("share of H(expert) that\nthe character explains, %")
    churn.set_xlabel("updates")
    character.set_xlabel("updates")
    corner.axis("off")
    named = list(zip(styles, layers)) if len(layers) <= MOST_NAMED else []
    handles = [legend_mark(**style.curve, markersize=3.5, label=block_name(layer)) for style, layer in named]
    handles.append(legend_mark(color=INK, **CHANCE, label="agreement by chance"))
    corner.legend(handles=handles, loc="center", ncols=math.ceil(len(handles) / 9))
    add_heading(figure, analysis)
    apart = sorted({later - step for step, later in zip(steps, steps[1:])})
    caption = caption_of_run(
        analysis,
        "When does the routing settle? Above left: the share of characters that a snapshot sends to the same expert as "
        "the analysed weights; thin dashed: the agreement that two routers with these loads have by chance. Right: the "
        "share of characters that changed expert since the previous snapshot, divided by the updates in between; a "
        "character that changes twice counts at most once. Below: the share of H(expert), the entropy of the choice, "
        "that the character explains.",
        f"{len(steps)} snapshots" + (f", {apart[0]} updates apart." if len(apart) == 1 else "."),
        characters=analysis["passes"],
    )
    middle = len(steps) // 2
    spoken = ", ".join(
        f"{block_name(layer)} from {percent(values['agreement'][0])} at step {steps[0]:,}"
        + (f" over {percent(values['agreement'][middle])} at step {steps[middle]:,}" if steps[2:] else "")
        + f" (chance {percent(values['chance'][-1])})"
        for layer, values in zip(layers, found["layers"])
    )
    return Drawing(figure, caption, f"Curves of agreement with the analysed weights: {spoken}.")


# ---------------------------------------------------------------------------------------------------------------------
# Ablation


@styled
def ablation_costs(analysis) -> Drawing | None:
    """The loss that removing one expert costs, against its share of the characters; and that of changing all layers."""
    ablations = analysis["ablation"]
    removed = [(layer, of) for layer, of in zip(analysis["layers"], ablations["removed"]) if of] if ablations else []
    everywhere = in_all_layers(ablations) if ablations else {}
    if not removed and not everywhere:
        return None
    names = expert_names(max(len(of) for _, of in removed)) if removed else []
    heights = [0.75 + 1.5 * layout.rows_of_panels(len(removed)) + layout.legend_height(names)] if removed else []
    heights += [0.75 + layout.rows_height(everywhere, least=0.3)] if everywhere else []
    figure = layout.new_figure(sum(heights))
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if removed:
        draw_removals(parts[0], removed, names)
    if everywhere:
        draw_interventions(parts[-1], everywhere)
    add_heading(figure, analysis)
    trained_with = " or ".join(map(str, sorted({layer["k"] for layer in analysis["layers"]})))
    caption = caption_of_run(
        analysis,
        "How much a trained model's loss rises, in nats per character, when its routing is changed. Above: one expert "
        "is removed, against the share of characters whose main expert it was; they go to their next best one."
        if removed
        else "",
        "Below: all layers at once. Shuffled: choices and gates are permuted among a batch's characters. Hash: a "
        "balanced map from characters to experts that was never trained. Commonest: each character's expert is the "
        "trained router's most frequent choice for it. k: this many experts for each character; the model was trained "
        f"with {trained_with}."
        if everywhere else "",
        "Whisker: standard error over windows.",
        characters=analysis["passes"],
    )  # fmt: skip
    spoken = [f"{label} {number(cost['nats'], 3, '+')}" for label, cost in everywhere.items()]
    for layer, of in removed:
        costs = [one["nats"] for one in of]
        low, high = (number(value, 3, "+") for value in (min(costs), max(costs)))
        spoken.append(f"one expert of {block_name(layer)} {low} to {high}")
    return Drawing(figure, caption, f"Dots of the rise in loss, in nats, after each intervention: {', '.join(spoken)}.")


def in_all_layers(ablations) -> dict[str, dict]:
    """{label: cost} of the interventions in all layers at once."""
    found = {label: ablations[key] for key, (label, _) in INTERVENTIONS.items() if ablations[key]}
    for k, cost in sorted((ablations["top_k"] or {}).items(), key=lambda item: int(item[0]) or math.inf):
        found["all experts for each character" if k == "0" else f"k = {k}"] = cost
    return found


def draw_removals(figure, removed, names) -> None:
    panels = layout.block_panels(figure, len(removed), "its share, %", sharex=True, sharey=True)
    for panel, (layer, of) in zip(panels, removed):
        panel.axhline(0, color=INK, linewidth=0.9)
        for style, one in zip(expert_styles(layer["n_expert"]), of):
            bars = {"yerr": one["se"], "elinewidth": 1.1}
            panel.errorbar(100 * one["share"], one["nats"], **style.mark, markersize=6, **bars)
        panel.set_title(block_name(layer))
    panels[0].set_xlim(0, 108 * max(one["share"] for _, of in removed for one in of) or 1)
    panels[0].margins(y=0.12)
    panels[0].xaxis.set_major_locator(MaxNLocator(3))
    panels[0].yaxis.set_major_locator(MaxNLocator(4))
    figure.supylabel("cost of removal, nats", fontsize=10.5)
    layout.legend_below(figure, [legend_mark(**style.mark, markersize=6) for style in expert_styles(len(names))], names)


def draw_interventions(figure, costs) -> None:
    axes = figure.subplots()
    axes.axvline(0, **ZERO)
    for y, cost in enumerate(costs.values()):
        axes.errorbar(cost["nats"], y, xerr=cost["se"], color=BLUE, marker="o", markersize=6, **ERROR_BARS)
        error = "" if cost["se"] is None else f" ± {cost['se']:.3f}"
        layout.text_beside(axes, number(cost["nats"], 3, "+") + error, y)
    layout.row_axis(axes, list(costs))
    layout.x_axis(axes, "cost in all layers at once, nats per character", ticks=5, margin=0.06)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

NULLS = {"experts": (0.62, 0.3), "features": (0.3, 0.45)}  # permuted in the null -> height and opacity of its bar
ROUTER = {"color": VERMILION, "marker": "o", "markersize": 6}
TOKENS = {  # kind of MLP -> its label, its mark
    "experts": ("characters of one expert", {"color": BLUE, "marker": "s", "linestyle": "", "markersize": 6}),
    "dense": ("characters of a dense MLP", {"color": GREEN, "marker": "^", "linestyle": "", "markersize": 6}),
}


@styled
def gradient_cosines(analysis) -> Drawing | None:
    """The cosine of the router's two gradients, a row a layer, and that of two tokens' gradients, a row a block."""
    pulls = [one for one in analysis["router_gradients"] if one and one["cosine"] is not None]
    blocks = [
        one for one in analysis["conflicts"] if one["mean"] and one["mean"]["cosine_between_sequences"] is not None
    ]
    if not pulls and not blocks:
        return None
    figure = layout.new_figure(1.25 + 0.4 * max(len(pulls), len(blocks), 2))
    panels = figure.subplots(1, bool(pulls) + bool(blocks), squeeze=False)[0]
    handles = {}  # by label
    if pulls:
        handles |= draw_router_cosines(panels[0], pulls)
    if blocks:
        handles |= draw_token_cosines(panels[-1], blocks)
    layout.legend_below(figure, list(handles.values()), list(handles), grow=True)
    add_heading(figure, analysis)
    left, right = ("Left: the", "Right: the") if pulls and blocks else ("The", "The")
    caption = caption_of_run(
        analysis,
        f"{left} cosine between the router's gradients of cross-entropy and of the balancing loss, mean of "
        f"{pulls[0]['n']} training batches with its 95% interval; left of 0 the two pull against each other. Grey: "
        "95% of the cosines by chance, with the balancing gradient's experts in random order (wide bar) and with its "
        "features (narrow bar)." if pulls else "",
        f"{right} mean cosine of the gradients that two characters of different "
        "sequences send to the weights of the MLP or expert that serves both, ± standard error; hollow: chance, with "
        "errors permuted among all characters there. A lower cosine is more conflict." if blocks else "",
        "Batches of the training text.",
        characters=0,
    )  # fmt: skip
    spoken = []
    if pulls:
        cosines = (
            f"{block_name(one)} {number(one['cosine'], 2, '+')}{interval_text(one['low'], one['high'], 2, '+')}"
            for one in pulls
        )
        spoken.append(f"Router's cosine: {', '.join(cosines)}.")
    if blocks:
        cosines = (f"{block_name(one)} {number(one['mean']['cosine_between_sequences'], 4, '+')}" for one in blocks)
        spoken.append(f"Tokens' cosine: {', '.join(cosines)}.")
    return Drawing(figure, caption, f"Dots of cosines of gradients. {' '.join(spoken)}")


def draw_router_cosines(axes, pulls) -> dict:
    """-> {label: handle}"""
    axes.axvline(0, **ZERO)
    axes.use_sticky_edges = False  # which would put the widest bar on the edge
    handles = {"router": legend_mark(**ROUTER, linestyle="")}
    for y, one in enumerate(pulls):
        for name, (height, alpha) in NULLS.items():
            if null := one["chance"][name]:
                look = {"color": INK, "alpha": alpha, "linewidth": 0}
                axes.barh(y, null["high"] - null["low"], left=null["low"], height=height, **look)
                handles[f"chance, {name}"] = Patch(**look)
        whiskers = layout.whiskers(one["cosine"], one["low"], one["high"])
        axes.errorbar(one["cosine"], y, xerr=whiskers, **ROUTER, **ERROR_BARS)
    layout.row_axis(axes, [block_name(one) for one in pulls])
    layout.x_axis(axes, "router's cosine: cross-entropy\nand balancing loss", ticks=5, margin=0.08)
    return handles


def draw_token_cosines(axes, blocks) -> dict:
    """-> {label: handle}"""
    axes.axvline(0, **ZERO)
    handles = {}
    for y, one in enumerate(blocks):
        mean, (name, look) = one["mean"], TOKENS[one["kind"]]
        axes.errorbar(mean["cosine_between_sequences"], y, xerr=mean["error"], **look, **ERROR_BARS)
        handles[name] = legend_mark(**look)
        if mean["chance"]:
            axes.plot(mean["chance"]["mean"], y, **CONTROL)
            handles["chance, errors"] = legend_mark(**CONTROL)
    layout.row_axis(axes, [block_name(one) for one in blocks])
    layout.x_axis(axes, "cosine of two characters' gradients", ticks=4, margin=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    return handles


# ---------------------------------------------------------------------------------------------------------------------

FIGURES_OF_RUN = {
    "experts": expert_map,
    "load": load_curves,
    "stability": stability_curves,
    "information": information_bars,
    "ablation": ablation_costs,
    "gradients": gradient_cosines,
}
