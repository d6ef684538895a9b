"""Fixed tables and paths: why does a fixed table of characters beat a learned router, and does it when tuned?

A token's path is the expert that each layer sends it to. Layers with tables of their own divide the characters
differently, so that nearly every character has a path of its own; layers with one table share their few paths. The
claims were written before any run of these rows.
"""

from papers.measures import COSTS
from papers.ours import SOURCE
from papers.table import BELOW_0, Claim, Row, Table, View, each_against
from papers.tuned import AT_CHOICE, CHOICE, tuned
from papers.tuning import RATES

FREEZE_AT = {"cpu": {"router_freeze_step": 400}}  # a fifth of the steps, as the config has at paper size
ALIKE = (-0.01, 0.01)
WHY_ALIKE = "0.01 nats: half of the lead of fixed tables over the learned router that another implementation saw"

TABLES_OF_CHARACTERS = {
    "shakespeare_hash4": "table of each layer's own",
    "shakespeare_hash4_shared": "one table for all layers",
    "shakespeare_hash4_even": "own tables, even and random",
    "shakespeare_hash4_even_shared": "one table, even and random",
}
ROWS = {
    "shakespeare_moe4": "learned router",
    **TABLES_OF_CHARACTERS,
    "shakespeare_hash4_gated": "own tables, learned gate",
    "shakespeare_moe4_prior": "learned, prior of each layer's own",
    "shakespeare_moe4_prior_shared": "learned, one prior for all layers",
    "shakespeare_moe4_prior_aux": "learned, own prior, balanced",
    "shakespeare_moe4_router_shared": "one learned router for all layers",
    "shakespeare_moe4_freeze": "learned, frozen after a fifth of the steps",
    "shakespeare_dense": "dense",
}

PATHS = Table(
    name="paths",
    title="Fixed tables and paths, each at its best learning rate",
    source=SOURCE,
    text="A fixed table sends each character to one expert of a layer. Own: every layer has another table; one: all "
    "layers have the same. Balanced tables spread the characters by frequency, even and random ones by number. A prior "
    "adds 1 to the logit of the table's expert, so that a learned router begins near the table and may leave it.",
    rows=tuple(
        tuned(
            Row(name, label, options_at=FREEZE_AT if name == "shakespeare_moe4_freeze" else {}),
            baseline="" if name == "shakespeare_moe4" else "shakespeare_moe4",
            multiples=RATES,
        )
        for name, label in ROWS.items()
    ),
    views=(CHOICE, AT_CHOICE, View("Cost and routing", (*COSTS, "load_cv2", "entropy"))),
    figures=("loss_by_rate",),
)

TABLES = (PATHS,)


def _claim(number, sentence, pairs, holds, why):
    return Claim(id=f"E{number}", sentence=sentence, table=PATHS.name, pairs=pairs, holds=holds, why=why)


CLAIMS = (
    _claim(
        13,
        "Each at its best rate, every fixed table of characters ends lower than the learned router.",
        each_against(TABLES_OF_CHARACTERS, "shakespeare_moe4"),
        BELOW_0,
        "predicted to hold, by 0.015 to 0.02: the lead that another implementation saw",
    ),
    _claim(
        14,
        "Each at its best rate, one table for all layers is as good as one each.",
        (
            ("shakespeare_hash4_shared", "shakespeare_hash4"),
            ("shakespeare_hash4_even_shared", "shakespeare_hash4_even"),
        ),
        ALIKE,
        f"predicted to hold, which would say that layers which divide the characters differently learn faster, and do "
        f"not end lower. The margin is {WHY_ALIKE}",
    ),
    _claim(
        15,
        "Each at its best rate, a balanced table is as good as an even random one.",
        (
            ("shakespeare_hash4", "shakespeare_hash4_even"),
            ("shakespeare_hash4_shared", "shakespeare_hash4_even_shared"),
        ),
        ALIKE,
        "predicted to hold: balance saves time on parallel machines, and capacity is not limited here",
    ),
    _claim(
        16,
        "Each at its best rate, a table is as good with a learned gate as with a gate of 1.",
        (("shakespeare_hash4_gated", "shakespeare_hash4"),),
        ALIKE,
        "predicted to hold: then the choice makes the table's lead, and not its gate",
    ),
    _claim(
        17,
        "Each at its best rate, a learned router that begins near a fixed table ends lower than one that does not.",
        each_against(("shakespeare_moe4_prior", "shakespeare_moe4_prior_shared"), "shakespeare_moe4"),
        BELOW_0,
        "predicted to hold for own tables, and not to be decided for one table",
    ),
    _claim(
        18,
        "Each at its best rate, a learned router that begins near a fixed table ends as low as the table.",
        (
            ("shakespeare_moe4_prior", "shakespeare_hash4"),
            ("shakespeare_moe4_prior_shared", "shakespeare_hash4_shared"),
        ),
        ALIKE,
        "predicted to hold",
    ),
    _claim(
        19,
        "Each at its best rate, one learned router for all layers is better than one each (PathMoE).",
        (("shakespeare_moe4_router_shared", "shakespeare_moe4"),),
        BELOW_0,
        "PathMoE says so of consecutive layers at 0.9B and 16B parameters. Predicted not to hold",
    ),
    _claim(
        20,
        "Each at its best rate, freezing the learned router after a fifth of the steps costs nothing.",
        (("shakespeare_moe4_freeze", "shakespeare_moe4"),),
        ALIKE,
        "StableMoE (Dai et al. 2022) freezes it and gains. Predicted to hold",
    ),
)
