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
MOE = each_against([row.name for row in ROWS[1:]], "shakespeare_dense")
CAPACITY = each_against(("shakespeare_top2_cap05", "shakespeare_top2_cap10"), "shakespeare_top2")

TABLES = (
    Table(
        name="B",
        title="Soft, top-2 and capacity-limited linear experts",
        source=SOURCE,
        text="Four linear experts share the dense MLP's first layer. Published: one machine, number of runs not given.",
        rows=ROWS,
        views=(
            View("Loss and cost", ("paper", "clean", "cross_fitted", "train_seconds", "inference_speed")),
            View("Training loss and generalisation", ("final_train", "train_mode", "final_val", "gap")),
            View("Relative to the baseline", ("paper", "clean", "train_seconds", "inference_speed"), relative=True),
            View("Routing", ("load_cv2", "drop_rate", "entropy", "total_parameters", "active_parameters")),
        ),
        figures=("loss_curves", "loss_against_cost", "relative_cost", "load_over_training"),
    ),
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
    Claim(
        id="B10",
        sentence="Capacity 0.5 and 1.0 drop nothing and leave the validation loss of top-2 unchanged (one value to "
        "four digits).",
        table="B",
        pairs=CAPACITY,
        measures=("drop_rate", "paper", "clean"),
        holds=(-0.0005, 0.0005),
        why="limits that never drop a choice leave runs identical, so the share of dropped choices decides. The margin "
        "is that of the share and of the loss in nats",
    ),
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
)
