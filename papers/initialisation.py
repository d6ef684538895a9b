"""Is a lead of σ-MoE one of its initialisation, which a dense model can have too?"""

import dataclasses

from papers.literature import LITERATURE
from papers.measures import COSTS
from papers.ours import SOURCE
from papers.table import BELOW_0, Claim, Row, Table, View
from papers.tuned import at_rate
from papers.tuning import FIRST_FRESH

MULTIPLE = 4  # of the papers' learning rate: the best of the dense model, of 4 experts and of σ-MoE

_ROWS = (
    dataclasses.replace(LITERATURE.row("shakespeare_dense"), candidates=()),
    Row(
        "shakespeare_moe1_sigma_init",
        "dense, σ-MoE's initialisation",
        config="shakespeare_moe4_sigma_init",
        options={"n_expert": 1, "aux_loss": "none"},
    ),
    dataclasses.replace(LITERATURE.row("shakespeare_moe4"), candidates=()),
    Row("shakespeare_moe4_sigma_init", "4 experts, σ-MoE's initialisation"),
    dataclasses.replace(LITERATURE.row("shakespeare_moe16_sigma"), candidates=()),
)
DENSE, DENSE_INIT, MOE, MOE_INIT, SIGMA = (f"{row.name}_rate{MULTIPLE}" for row in _ROWS)
BASELINE = {DENSE_INIT: DENSE, MOE: DENSE, MOE_INIT: MOE, SIGMA: MOE_INIT}


def _at_the_rate(row):
    row = dataclasses.replace(at_rate(row, MULTIPLE, ("cpu",)), label=row.label, reserve={})
    return dataclasses.replace(row, baseline=BASELINE.get(row.name, ""))


INITIALISATION = Table(
    name="initialisation",
    title="σ-MoE's initialisation in other models, all at learning rate 0.004",
    source=SOURCE,
    text="σ-MoE draws the first layers of its experts with three times the SD of the models here, which have GPT-2's, "
    "and the second layers with two to four times. The dense model with that initialisation is an MoE of one expert.",
    rows=tuple(map(_at_the_rate, _ROWS)),
    views=(View("Loss", ("clean", "cross_fitted", "clean_bpc", "paper", "final_train")), View("Cost", COSTS)),
    figures=("loss_curves",),
)

TABLES = (INITIALISATION,)


def _claim(number, sentence, pair, why):
    return Claim(
        id=f"E{number}",
        sentence=sentence,
        table=INITIALISATION.name,
        pairs=(pair,),
        measures=("clean", "cross_fitted"),
        holds=BELOW_0,
        why=f"{why}; written down before any run of a new row",
        fresh_from=FIRST_FRESH,
        scales=("cpu",),
    )


CLAIMS = (
    _claim(
        40,
        "At learning rate 0.004, 4 experts end lower with σ-MoE's initialisation than with GPT-2's.",
        (MOE_INIT, MOE),
        "in two fresh seeds σ-MoE was 0.02 below 4 experts, and at the papers' rate, one seed, 0.1. Predicted to hold",
    ),
    _claim(
        41,
        "At learning rate 0.004, the dense model ends lower with σ-MoE's initialisation than with GPT-2's.",
        (DENSE_INIT, DENSE),
        "what σ-MoE gains might be nothing of experts. Predicted to hold",
    ),
    _claim(
        42,
        "At learning rate 0.004, with σ-MoE's initialisation in both, 4 experts end lower than the dense model.",
        (MOE_INIT, DENSE_INIT),
        "with GPT-2's it is 0.016. Predicted to hold",
    ),
    _claim(
        43,
        "At learning rate 0.004, σ-MoE ends lower than 4 whole experts with its initialisation.",
        (SIGMA, MOE_INIT),
        "what is left to its gates, its finer experts and its losses. Predicted not to be decided",
    ),
)
