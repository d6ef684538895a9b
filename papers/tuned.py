"""Tuned against tuned: models compared at each one's best learning rate.

No paper tuned its learning rate. Table "rates" has every model at several multiples of it.
"""

import dataclasses

from papers.measures import COSTS, LOSSES
from papers.ours import EQUAL, ROUTER, SOURCE
from papers.table import Row, Table, View

LEARNING_RATE = 1e-3  # of the papers' protocol; its cosine ends at a tenth of the first rate, and so do all of these
MULTIPLES = {"cpu": (1, 2, 4, 8), "paper": (1, 2, 4)}


def at_rate(row: Row, multiple: int) -> Row:
    """The same model at a multiple of the papers' learning rate; at 1 the row itself."""
    scales = tuple(scale for scale in row.scales if multiple in MULTIPLES[scale])
    rate = multiple * LEARNING_RATE
    label = f"{row.label}, {rate:.0e}".replace("e-0", "e-")
    if multiple == 1:
        return dataclasses.replace(row, label=label, baseline="", scales=scales)
    return Row(
        name=f"{row.name}_rate{multiple}",
        label=label,
        config=row.config or row.name,
        options={**row.options, "learning_rate": rate, "min_lr": rate / 10},
        options_at=row.options_at,
        baseline=row.name,
        scales=scales,
    )


MODELS = (
    Row("shakespeare_dense", "dense"),
    dataclasses.replace(EQUAL.row("shakespeare_dense_wide"), label="dense, equal total parameters"),
    Row("shakespeare_moe2", "2 experts"),
    Row("shakespeare_moe4", "4 experts"),
    Row("shakespeare_moe8", "8 experts"),
    Row("shakespeare_soft4", "4 linear experts, soft"),
    Row("shakespeare_top2", "4 linear experts, top-2"),
    Row("shakespeare_moe4_frozen", "4 experts, frozen router"),
    dataclasses.replace(ROUTER.row("shakespeare_hash4"), label="table of characters"),
)

RATES = Table(
    name="rates",
    title="Learning rates: every model at multiples of the papers' rate",
    source=SOURCE,
    text="The final rate of the cosine is a tenth of the first, as in the papers' protocol. One seed a rate screens; "
    "the two best rates of a model have three.",
    rows=tuple(at_rate(row, multiple) for row in MODELS for multiple in MULTIPLES["cpu"]),
    views=(View("Loss", (*LOSSES, "final_train")), View("Cost", COSTS)),
    figures=("loss_curves",),
)

TABLES = (RATES,)
CLAIMS = ()
