"""What the literature recommends and A to D leave out: finer experts, σ-MoE, regularisers under repetition."""

import math

from papers.measures import COSTS
from papers.ours import SOURCE
from papers.table import BELOW_0, Claim, Row, Table, View
from papers.tuned import AT_CHOICE, CHOICE, tuned

# At CPU size a quarter of the dense MLP is narrower; at paper size the configs state it.
QUARTER_WIDTH = {"cpu": {"expert_hidden": 128}}

LITERATURE = Table(
    name="literature",
    title="What the literature recommends, each at its best learning rate: finer experts, σ-MoE, regularisers",
    source=SOURCE,
    text="16 experts of a quarter width, top-4, have the active and the total parameters of 4 whole experts, top-1. "
    "σ-MoE has their shape with sigmoid gates, its own initialisation, whole experts dropped and its entropy loss. The "
    "regularisers should pay where a text is read many times: 82 times at paper size, 1.5 times at CPU size.",
    rows=tuple(
        tuned(row, row.baseline)
        for row in (
            Row("shakespeare_dense", "dense"),
            Row(
                "shakespeare_dense_decay10",
                "dense, weight decay × 10",
                "shakespeare_dense",
                options={"weight_decay": 1.0},
                baseline="shakespeare_dense",
            ),
            Row("shakespeare_moe4", "4 experts", baseline="shakespeare_dense"),
            Row("shakespeare_moe4_inner_dropout", "4 experts, dropout inside them", baseline="shakespeare_moe4"),
            Row("shakespeare_moe4_output_masking", "4 experts, outputs masked", baseline="shakespeare_moe4"),
            Row(
                "shakespeare_moe16_top4",
                "16 quarter experts, top-4",
                options_at=QUARTER_WIDTH,
                baseline="shakespeare_moe4",
            ),
            Row(
                "shakespeare_moe16_sigma",
                "σ-MoE, 16 quarter experts, top-4",
                options_at=QUARTER_WIDTH,
                baseline="shakespeare_moe4",
            ),
        )
    ),
    views=(CHOICE, AT_CHOICE, View("Cost and routing", (*COSTS, "load_cv2", "entropy"))),
    figures=("loss_by_rate",),
)

TABLES = (LITERATURE,)

CLAIMS = (
    Claim(
        id="E21",
        sentence="16 experts of a quarter width, top-4, end at a lower loss than 4 whole ones, top-1.",
        table="literature",
        pairs=(("shakespeare_moe16_top4", "shakespeare_moe4"),),
        holds=BELOW_0,
        why="Krajewski et al. 2024: experts as wide as the dense MLP are almost never optimal. Theirs choose tokens, "
        "are 16 and 64 times the MLP's parameters, and see no text twice. Written down before any run",
    ),
    Claim(
        id="E22",
        sentence="σ-MoE ends at a lower loss than 4 experts with the switch loss, and than softmax gates and that loss "
        "with experts of its own shape.",
        table="literature",
        pairs=(
            ("shakespeare_moe16_sigma", "shakespeare_moe4"),
            ("shakespeare_moe16_sigma", "shakespeare_moe16_top4"),
        ),
        holds=BELOW_0,
        why="Csordás et al. 2023 report that σ-MoE beats a Switch layer. Written down before any run",
    ),
    Claim(
        id="E23",
        sentence="Where hardly a character is read twice, expert-output masking does not improve 4 experts.",
        table="literature",
        pairs=(("shakespeare_moe4_output_masking", "shakespeare_moe4"),),
        holds=(-0.005, math.inf),
        why="1.5 epochs leave nothing to regularise; as in A6, an improvement below 0.005 nats counts as none. Written "
        "down before any run",
        scales=("cpu",),
    ),
    Claim(
        id="E24",
        sentence="Where a text is read 82 times, expert-output masking and dropout inside experts improve 4 experts, "
        "and ten times the weight decay improves the dense model.",
        table="literature",
        pairs=(
            ("shakespeare_moe4_output_masking", "shakespeare_moe4"),
            ("shakespeare_moe4_inner_dropout", "shakespeare_moe4"),
            ("shakespeare_dense_decay10", "shakespeare_dense"),
        ),
        holds=BELOW_0,
        why="Elbayad et al. 2023 (masking), Fedus et al. 2022 (dropout inside experts, for fine-tuning) and Kim et al. "
        "2025 (30 times the usual weight decay) say so of few data. Written down before any run of masking or decay",
        scales=("paper",),
    ),
)
