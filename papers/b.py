"""Paper B: four linear experts, soft, top-2 and with a capacity.

Huang, Chen, Zheng 2025, Information 16, 483. It is the one paper that prints times.
"""

import math

from papers.table import ABOVE_0, ABOVE_1, BELOW_0, BELOW_1, Claim, Row, Table, View, each_against

SOURCE = "B: Huang, Chen, Zheng 2025, Information 16, 483"


def _row(name, label, *, best, seconds, speed, train, val):
    """One row with the numbers that the paper prints for it.

    best, train, val: best validation, final training and final validation loss, nats; seconds of training; speed:
    characters written per second.
    """
    return Row(
        name=name,
        label=label,
        baseline="" if name == "shakespeare_dense" else "shakespeare_dense",
        published={
            "paper": best,
            "train_seconds": seconds,
            "inference_speed": speed,
            "final_train": train,
            "final_val": val,
            "gap": round(val - train, 3),
        },
    )


# fmt: off
ROWS = (
    _row("shakespeare_dense", "Baseline",
         best=1.4739, seconds=287.9, speed=441.3, train=1.387, val=1.474),
    _row("shakespeare_soft4", "MoE Base (4 experts, soft)",
         best=1.4764, seconds=434.0, speed=250.9, train=1.634, val=1.476),
    _row("shakespeare_top2", "MoE Top-2",
         best=1.4718, seconds=460.5, speed=224.7, train=1.612, val=1.472),
    _row("shakespeare_top2_cap05", "MoE Capacity 0.5 (top-2)",
         best=1.4718, seconds=463.3, speed=196.9, train=1.618, val=1.472),
    _row("shakespeare_top2_cap10", "MoE Capacity 1.0 (top-2)",
         best=1.4718, seconds=463.3, speed=195.0, train=1.615, val=1.472),
)
# fmt: on
# B does not say over what it counts a capacity.
PER_BATCH = tuple(
    Row(f"{row.name}_batch", f"{row.label}, counted over the batch", baseline="shakespeare_dense") for row in ROWS[-2:]
)
MOE = each_against([row.name for row in ROWS[1:]], "shakespeare_dense")
CAPACITY, CAPACITY_PER_BATCH = (
    each_against([row.name for row in rows], "shakespeare_top2") for rows in (ROWS[-2:], PER_BATCH)
)

# Protocols that may give B's baseline: its learning rate, length and dropout are lost in our copy of its text.
PROBES = (
    Row("shakespeare_dense", "the template's protocol", scales=("paper",)),
    *(
        Row(
            f"shakespeare_dense_probe_{name}",
            label,
            "shakespeare_dense",
            options=options,
            baseline="shakespeare_dense",
            scales=("paper",),
        )
        for name, label, options in (
            ("1000", "1,000 steps", {"max_iters": 1000}),
            ("1500", "1,500 steps", {"max_iters": 1500}),
            ("rate3e4", "learning rate 3e-4", {"learning_rate": 3e-4, "min_lr": 3e-5}),
            ("rate1e4", "learning rate 1e-4", {"learning_rate": 1e-4, "min_lr": 1e-5}),
            ("dropout", "dropout 0.4", {"dropout": 0.4}),
        )
    ),
)

TABLES = (
    Table(
        name="B",
        title="Soft, top-2 and capacity-limited linear experts",
        source=SOURCE,
        text="Four linear experts share the dense MLP's first layer. Published: one machine, number of runs not given. "
        "A capacity is counted in each sequence, which keeps the model causal, and in two more rows over the batch, as "
        "Fedus et al. 2022 count it. B's MoE rows add 0.225 to 0.247 nats to the baseline's training loss. A balancing "
        "loss counted in would add 0.24 in 6 layers if its weight were 0.04 and loads even; ours is 0.01, and one "
        "column counts it four times.",
        rows=(*ROWS, *PER_BATCH),
        views=(
            View("Loss and cost", ("paper", "clean", "cross_fitted", "train_seconds", "inference_speed")),
            View("Validation and generalisation", ("final_val", "final_train", "gap")),
            View("Training loss", ("final_train", "train_mode", "train_mode_with_aux", "train_mode_with_aux4")),
            View("Relative to the baseline", ("paper", "clean", "train_seconds", "inference_speed"), relative=True),
            View("Routing", ("load_cv2", "drop_rate", "entropy", "total_parameters", "active_parameters")),
        ),
        figures=("loss_curves", "loss_against_cost", "relative_cost", "load_over_training"),
    ),
    Table(
        name="B_readings",
        title="Which protocol gives B's baseline?",
        source=SOURCE,
        text="B's baseline ends at a validation loss of 1.474, which is also its best, and a training loss of 1.387. A "
        "protocol is accepted if it comes within 0.01 of the first and 0.02 of the last, and ends no more than 0.0005 "
        "above its best: if the largest of these distances, each over its margin, is below 1. The training loss is in "
        "train mode, as the AI Scientist's nanoGPT template prints it, or in eval mode. One seed a protocol only "
        "screens.",
        rows=PROBES,
        views=(
            View("Loss", ("paper", "final_val", "above_best", "train_mode", "final_train")),
            View("Distance from B", ("from_b", "from_b_in_eval_mode")),
        ),
        figures=("loss_curves",),
    ),
)


def _capacity_drops_nothing(id, limits, pairs):
    return Claim(
        id=id,
        sentence=f"{limits} drop nothing and leave the validation loss of top-2 unchanged (one value to four digits).",
        table="B",
        pairs=pairs,
        measures=("drop_rate", "paper", "clean"),
        holds=(-0.0005, 0.0005),
        why="limits that never drop a choice leave runs identical, so the share of dropped choices decides. The margin "
        "is that of the share and of the loss in nats",
    )


CLAIMS = (
    Claim(
        id="B1",
        sentence="Every MoE variant keeps the validation loss within 0.2% of the baseline's.",
        table="B",
        pairs=MOE,
        measures=("paper", "clean"),
        is_ratio=True,
        holds=(0.998, 1.002),
        why="B's own figure",
    ),
    Claim(
        id="B2",
        sentence="Top-2 routing slightly improves the validation loss over the baseline.",
        table="B",
        pairs=(("shakespeare_top2", "shakespeare_dense"),),
        is_ratio=True,
        holds=BELOW_1,
        expected=1.4718 / 1.4739,
    ),
    Claim(
        id="B3",
        sentence="MoE variants end with a training loss about 18% above the baseline's.",
        table="B",
        pairs=MOE,
        measures=("final_train", "train_mode", "train_mode_with_aux"),
        is_ratio=True,
        holds=(1.09, 1.27),
        why="half of the published 18% to one and a half times 18%",
        expected=1.18,
    ),
    Claim(
        id="B4",
        sentence="MoE variants take about half as long again to train.",
        table="B",
        pairs=MOE,
        measures=("train_seconds",),
        is_ratio=True,
        holds=(1.25, 1.75),
        why="half of the published overhead of 50% to one and a half times 50%",
        expected=1.5,
    ),
    Claim(
        id="B5",
        sentence="MoE variants write text at about half the baseline's speed.",
        table="B",
        pairs=MOE,
        measures=("inference_speed",),
        is_ratio=True,
        holds=(0.35, 0.75),
        why="B's ratios are 0.44 to 0.57",
        expected=0.5,
    ),
    Claim(
        id="B6",
        sentence="Top-2 routing has a lower validation loss than soft routing.",
        table="B",
        pairs=(("shakespeare_top2", "shakespeare_soft4"),),
        holds=BELOW_0,
        expected=1.4718 - 1.4764,
    ),
    Claim(
        id="B7",
        sentence="Top-2 routing writes text more slowly than soft routing.",
        table="B",
        pairs=(("shakespeare_top2", "shakespeare_soft4"),),
        measures=("inference_speed",),
        is_ratio=True,
        holds=BELOW_1,
        expected=224.7 / 250.9,
    ),
    Claim(
        id="B8",
        sentence="Capacity limits make the router's choices more even.",
        table="B",
        pairs=CAPACITY,
        measures=("load_cv2",),
        holds=BELOW_0,
    ),
    Claim(
        id="B9",
        sentence="Capacity limits cost training time over top-2 without them.",
        table="B",
        pairs=CAPACITY,
        measures=("train_seconds",),
        is_ratio=True,
        holds=ABOVE_1,
    ),
    _capacity_drops_nothing("B10", "Capacity 0.5 and 1.0", CAPACITY),
    Claim(
        id="B11",
        sentence="Experts are used unevenly even with load balancing.",
        table="experts",
        pairs=(("shakespeare_moe4", ""), ("shakespeare_top2", "")),
        measures=("largest_load",),
        holds=(1.2, math.inf),
        why="the busiest expert of a layer has at least a fifth more than an even share; our reading",
    ),
    Claim(
        id="B12",
        sentence="Experts develop specialisation over training.",
        table="experts",
        pairs=(("shakespeare_moe4", "shakespeare_moe4_frozen"),),
        measures=("gain",),
        holds=ABOVE_0,
        why="what the character tells of its expert grows more than it does with a frozen router, whose inputs change "
        "too",
    ),
    Claim(
        id="B13",
        sentence="Capacity limits bring diverse specialisation, beyond the character.",
        table="experts",
        pairs=(("shakespeare_top2_cap05", "shakespeare_top2"),),
        measures=("beyond_character",),
        holds=ABOVE_0,
    ),
    _capacity_drops_nothing(
        "B14", "Counted over the batch, as Fedus et al. do, capacity 0.5 and 1.0", CAPACITY_PER_BATCH
    ),
    *(
        Claim(
            id=f"B{number}",
            sentence=f"A dense model with {row.label} is B's baseline: validation 1.474, training 1.387, final = best.",
            table="B_readings",
            pairs=((row.name, ""),),
            measures=("from_b", "from_b_in_eval_mode"),
            holds=(-math.inf, 1.0),
            why="the largest of three distances from B's numbers, over margins of 0.01 for the validation loss, 0.02 "
            "for the training loss, and 0.0005 for the end above the best, since B's two equal numbers are rounded",
            scales=("paper",),
        )
        for number, row in enumerate(PROBES, 15)
    ),
)
