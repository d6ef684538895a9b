"""This project's own tables: equal costs, the value of a router, what the experts do.

Table "experts" is here too, though claims of every source are decided on it.
"""

from papers.measures import COSTS, LOSSES
from papers.table import ABOVE_0, ABOVE_1, BELOW_0, Claim, Row, Table, View

SOURCE = "this project"


ROUTER = Table(
    name="router",
    title="Is a router worth learning? 4 experts with one, or with hash routing",
    source=SOURCE,
    text="Hash routing gives each character a fixed expert, balanced by frequency, and learns nothing. Its gate is 1 "
    "and it has no balancing loss. A learned router's gate is its probability, and it has a balancing loss; so two "
    "more rows have a gate of 1, and two no balancing loss. Each layer has a map of its own from characters to "
    "experts; one more row has the same map in every layer.",
    rows=(
        Row("shakespeare_moe4", "learned"),
        Row(
            "shakespeare_moe4_aux0",
            "learned, no balance",
            "shakespeare_moe4",
            options={"aux_loss_coef": 0.0},
            baseline="shakespeare_moe4",
        ),
        Row("shakespeare_moe4_straight_through", "learned, gate 1", baseline="shakespeare_moe4"),
        Row(
            "shakespeare_moe4_straight_through_aux0",
            "learned, gate 1, no balance",
            "shakespeare_moe4_straight_through",
            options={"aux_loss_coef": 0.0},
            baseline="shakespeare_moe4",
        ),
        Row("shakespeare_hash4", "hash routing", baseline="shakespeare_moe4"),
        Row("shakespeare_hash4_shared", "hash routing, one map for all layers", baseline="shakespeare_moe4"),
        Row("shakespeare_dense", "dense", baseline="shakespeare_moe4"),
    ),
    views=(View("Loss", LOSSES), View("Cost", COSTS), View("Routing", ("load_cv2", "entropy"))),
    figures=("loss_curves",),
)


def _lengths_of(model, label):
    """The rows of a model with half, all and twice the steps; their learning rate falls to the end of each."""
    lengths = {"half": ("half the steps", 2500, 1000), "double": ("twice the steps", 10_000, 4000)}
    for name, (times, paper, cpu) in lengths.items():
        yield Row(
            f"shakespeare_{model}_{name}",
            f"{label}, {times}",
            f"shakespeare_{model}",
            options_at={"paper": {"max_iters": paper}, "cpu": {"max_iters": cpu}},
            baseline="shakespeare_moe4",
        )


EQUAL = Table(
    name="equal",
    title="Equal what? 4 experts against dense models that cost the same in one respect",
    source=SOURCE,
    text="The dense model has the active FLOPs of 4 experts, except for the router's share of under 0.3%. The wide "
    "one has their total parameters. Equal time is no single factor: rows with several schedule lengths tell how many "
    "times its own steps the dense model needs to reach another's loss (the break-even), to be held against the ratio "
    "of their training times.",
    rows=(
        Row("shakespeare_dense", "dense, equal active FLOPs", baseline="shakespeare_moe4"),
        Row(
            "shakespeare_dense_wide",
            "dense, equal total parameters",
            "shakespeare_dense",
            options_at={"paper": {"mlp_hidden": 6146}, "cpu": {"mlp_hidden": 2050}},
            baseline="shakespeare_moe4",
        ),
        Row(
            "shakespeare_dense_long",
            "dense, 1.3 times the steps",
            "shakespeare_dense",
            options_at={"paper": {"max_iters": 6500}, "cpu": {"max_iters": 2600}},
            baseline="shakespeare_moe4",
        ),
        Row("shakespeare_moe4", "4 experts, top-1"),
        Row("shakespeare_hash4", "hash routing", baseline="shakespeare_moe4"),
        *_lengths_of("dense", "dense"),
        *_lengths_of("moe4", "4 experts"),
    ),
    views=(
        View("Loss", LOSSES),
        View("Cost", (*COSTS, "training_flops")),
        View("Equal time", ("equivalent_steps", "train_seconds", "iterations")),
    ),
    figures=("loss_curves", "loss_by_length"),
    lengths=(
        ("shakespeare_dense_half", "shakespeare_dense", "shakespeare_dense_long", "shakespeare_dense_double"),
        ("shakespeare_moe4_half", "shakespeare_moe4", "shakespeare_moe4_double"),
    ),
)


EXPERTS = Table(
    name="experts",
    title="What the experts do",
    source=SOURCE,
    of="analyses",
    text="Measured by `analyze.py` on the last weights of a run: how the load is spread, what predicts the expert of a "
    "character, when routing settles, which gradients pull at the router, and what experts are worth. Numbers are "
    "means over the layers of a model; information is beyond chance.",
    rows=(  # those of the other tables that differ in how they route, and segments and whole sequences
        Row("shakespeare_dense", "dense"),
        Row("shakespeare_moe4", "4 experts"),
        Row("shakespeare_moe4_aux0", "4 experts, no balance", "shakespeare_moe4", options={"aux_loss_coef": 0.0}),
        Row("shakespeare_moe4_aux01", "4 experts, balance 0.1"),
        Row("shakespeare_moe8", "8 experts"),
        Row("shakespeare_moe4_frozen", "4 experts, frozen router"),
        Row("shakespeare_hash4", "4 experts, hash routing"),
        Row("shakespeare_moe4_segment", "4 experts, by segment"),
        Row("shakespeare_moe4_sequence", "4 experts, by sequence"),
        Row("shakespeare_top2", "4 linear experts, top-2"),
        Row("shakespeare_top2_cap05", "the same, capacity 0.5"),
    ),
    views=(
        View("Load", ("analysed_nats", "utilisation", "lowest_utilisation", "largest_load")),
        View("What predicts the expert", ("about_character", "above_frozen", "beyond_character", "unexplained")),
        View(
            "Syntax, topic, frequency",
            (
                "syntax",
                "syntax_above_frozen",
                "topic",
                "topic_of_rest",
                "topic_above_frozen",
                "frequency_above_frozen",
            ),
        ),
        View("Over training", ("early_agreement", "gain")),
        View("Gradients", ("router_cosine", "token_cosine")),
        View("Cost of changing the routing or the experts", ("shuffled", "hashed", "tabulated", "removed", "merged")),
    ),
    figures=("load_by_row", "information_by_row", "stability_by_row", "ablation_by_row"),
)

TABLES = (ROUTER, EQUAL, EXPERTS)

# The break-even in steps against the ratio of the training times.
EQUAL_TIME = {
    "table": "equal",
    "measures": ("equivalent_steps",),
    "is_ratio": True,
    "holds": ABOVE_1,
    "cost": "train_seconds",
}


CLAIMS = (
    Claim(
        id="E1",
        sentence="At equal active FLOPs, 4 experts beat the dense model.",
        table="equal",
        pairs=(("shakespeare_moe4", "shakespeare_dense"),),
        holds=BELOW_0,
    ),
    Claim(
        id="E2",
        sentence="At equal total parameters, the dense model beats 4 experts.",
        table="equal",
        pairs=(("shakespeare_dense_wide", "shakespeare_moe4"),),
        holds=BELOW_0,
    ),
    Claim(
        id="E3",
        sentence="At equal time, 4 experts beat the dense model: to reach their loss it would train for longer.",
        pairs=(("shakespeare_moe4", "shakespeare_dense"),),
        **EQUAL_TIME,
    ),
    Claim(
        id="E6",
        sentence="The gradients of two characters agree more within one expert than within a dense MLP.",
        table="experts",
        pairs=(("shakespeare_moe4", "shakespeare_dense"),),
        measures=("token_cosine",),
        holds=ABOVE_0,
        why="the mean cosine of two characters' gradients, of different sequences",
    ),
    Claim(
        id="E7",
        sentence="With hash routing, 4 experts end at a lower loss than with a learned router.",
        table="router",
        pairs=(("shakespeare_hash4", "shakespeare_moe4"),),
        holds=BELOW_0,
        why="noticed at CPU size with seeds 1337 to 1339 before it was written down. Roller et al. 2021 said it first "
        "of fixed hashing at a larger scale",
        fresh_from=1340,
    ),
    Claim(
        id="E8",
        sentence="Hash routing also ends lower than learned routers with a gate of 1, without a balancing loss, or "
        "with both changes.",
        table="router",
        pairs=(
            ("shakespeare_hash4", "shakespeare_moe4_aux0"),
            ("shakespeare_hash4", "shakespeare_moe4_straight_through"),
            ("shakespeare_hash4", "shakespeare_moe4_straight_through_aux0"),
        ),
        holds=BELOW_0,
        why="seeds 1337 to 1339 were run before all three pairs were written down",
        fresh_from=1340,
    ),
    Claim(
        id="E9",
        sentence="At equal time, 4 experts with hash routing beat the dense model.",
        pairs=(("shakespeare_hash4", "shakespeare_dense"),),
        why="noticed at CPU size with seeds 1337 to 1339",
        fresh_from=1340,
        **EQUAL_TIME,
    ),
    Claim(
        id="E10",
        sentence="Hash routing with a map of each layer's own ends at a lower loss than with one map for all layers.",
        table="router",
        pairs=(("shakespeare_hash4", "shakespeare_hash4_shared"),),
        holds=BELOW_0,
        why="if it holds, layers that divide the characters differently explain a part of its lead over the learned "
        "router. Another implementation saw 0.025 nats at this learning rate, and less than 0.007 at each row's best "
        "rate; no run of this one had been made when the claim was written down",
    ),
)
