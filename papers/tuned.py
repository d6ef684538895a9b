"""Tuned against tuned: models compared at the learning rate that suits each best.

No paper tuned its learning rate, and a rate that suits one model and not another makes a difference that is not the
models'. A claim about losses whose rows are all here is decided here too; `at_best_rate` makes that claim.
"""

from __future__ import annotations

import dataclasses

from papers.measures import COSTS
from papers.ours import EQUAL, ROUTER, SOURCE
from papers.table import Claim, Row, Table, View
from papers.tuning import ALL_MULTIPLES, LEARNING_RATE, MULTIPLES, RESERVE, name_at_rate


def at_rate(row: Row, multiple: int, scales: tuple[str, ...]) -> Row:
    """The same model at a multiple of the papers' learning rate; at 1 the row itself."""
    rate = multiple * LEARNING_RATE
    changes = {"label": f"{row.label}, {rate:g}", "baseline": "", "scales": scales}
    if multiple > 1:
        changes |= {"name": name_at_rate(row.name, multiple), "config": row.config or row.name}
        changes["options"] = {**row.options, "learning_rate": rate, "min_lr": rate / 10}
    return dataclasses.replace(row, **changes)


def tuned(row: Row, baseline: str = "") -> Row:
    """The row with learning rates as candidates."""
    rates = {scale: MULTIPLES[scale] + RESERVE[scale] for scale in row.scales}
    candidates = tuple(
        at_rate(row, multiple, tuple(scale for scale in row.scales if multiple in rates[scale]))
        for multiple in sorted(set().union(*rates.values()))
    )
    reserve = {scale: len(RESERVE[scale]) for scale in row.scales}
    return dataclasses.replace(row, baseline=baseline, candidates=candidates, reserve=reserve)


CHOICE = View(
    "Choice of the learning rate: best full validation loss in nats", tuple(f"rate{m}" for m in ALL_MULTIPLES)
)
AT_CHOICE = View(
    "Loss at the chosen rate", ("chosen_rate", "clean", "cross_fitted", "clean_bpc", "paper", "final_train", "epochs")
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
    dataclasses.replace(ROUTER.row("shakespeare_hash4"), label="4 experts, hash routing"),
)

TUNED = Table(
    name="tuned",
    title="Tuned against tuned: every model at its best learning rate",
    source=SOURCE,
    text="The papers train every model at 1e-3. Here each is tried at multiples of that rate; the cosine always ends "
    "at a tenth of the run's own peak rate. The rate is chosen on three seeds and the loss reported on others.",
    rows=tuple(tuned(row, "" if row.name == "shakespeare_dense" else "shakespeare_dense") for row in MODELS),
    views=(
        CHOICE,
        AT_CHOICE,
        View("Cost", COSTS),
    ),
    figures=("loss_by_rate",),
)

TABLES = (TUNED,)
CLAIMS = ()

# The multiple of the papers' rate that the records of `tuned` and `paths` choose at CPU size, for tables whose rows are
# run at it alone. A test holds it against the records.
CHOSEN_AT_CPU = {
    "shakespeare_dense": 4,
    "shakespeare_dense_wide": 4,
    "shakespeare_moe4": 4,
    "shakespeare_hash4": 2,
    "shakespeare_hash4_shared": 4,
    "shakespeare_hash4_even": 2,
    "shakespeare_hash4_even_shared": 4,
    "shakespeare_hash4_gated": 2,
    "shakespeare_moe4_prior": 2,
    "shakespeare_moe4_prior_shared": 4,
    "shakespeare_moe4_prior_aux": 2,
    "shakespeare_moe4_router_shared": 4,
    "shakespeare_moe4_freeze": 4,
}


def at_best_rate(claim: Claim) -> Claim | None:
    """The same claim about tuned models: of its pairs those whose rows are both in TUNED; None without any."""
    names = {row.name for row in TUNED.rows}
    pairs = tuple(pair for pair in claim.pairs if names.issuperset(pair))
    is_about_losses = claim.measures[0] in ("clean", "paper") and not claim.cost
    if not pairs or not is_about_losses:
        return None
    part = "" if pairs == claim.pairs else f"; {len(pairs)} of {len(claim.pairs)} pairs"
    sentence = f"{claim.sentence.removesuffix('.')} (each model at its best learning rate{part})."
    return dataclasses.replace(claim, table=TUNED.name, sentence=sentence, pairs=pairs, fresh_from=0)
