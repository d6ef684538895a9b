"""Source D: notes on building a small mixture-of-experts from scratch.

8 experts with top-2 against dense models of equal FLOPs and of equal parameters. The notes do not name their text.
"""

import math

from papers.measures import COSTS, LOSSES
from papers.table import ABOVE_0, BELOW_0, Claim, Reading, Row, Table, View
from run.records import COLLAPSED_BELOW

SOURCE = "D: Notes on building a small mixture-of-experts from scratch"


def _models_on_both_texts():
    """The three models on text8 and on its head. At CPU size they get the widths of the smaller model."""
    models = {
        "dense": ("dense, equal FLOPs", {"mlp_hidden": 260}),
        "dense_total": ("dense, equal parameters", {"mlp_hidden": 1028}),
        "moe8": ("8 experts, top-2", {"expert_hidden": 128}),
    }
    return tuple(
        Row(
            name=f"{dataset}_notes_{name}",
            label=f"{dataset.replace('_', ' ')}, {label}",
            config=f"text8_notes_{name}",
            options={} if dataset == "text8" else {"dataset": dataset},
            options_at={} if dataset == "text8" else {"cpu": widths},
            baseline="" if name == "dense" else f"{dataset}_notes_dense",
            scales=("paper",) if dataset == "text8" else ("paper", "cpu"),
        )
        for dataset in ("text8", "text8_head")
        for name, (label, widths) in models.items()
    )


TABLES = (
    Table(
        name="D",
        title="8 experts, top-2, against dense models of equal FLOPs and equal parameters",
        source=SOURCE,
        text="Published: 15% lower perplexity (0.163 nats) than a dense model at the same FLOPs, on a text that "
        "the notes do not name. The head of text8 is its first megabytes: real text, but not that data set.",
        rows=_models_on_both_texts(),
        views=(View("Loss", (*LOSSES, "test_bpc")), View("Cost", COSTS)),
        figures=("loss_curves", "loss_against_cost"),
    ),
)


# The notes count perplexity per token of their own, and do not say which.
PER_WORD = Reading((-math.inf, math.log(0.85) / 5.9), "15% per word, of 5.9 characters in text8 with the space")


def _claims_on(dataset, where, first, scales):
    """The three claims about loss on one text, numbered from `first`."""
    dense, total, moe = (f"{dataset}_notes_{name}" for name in ("dense", "dense_total", "moe8"))
    claims = (  # sentence, pair, bounds, their reason, another reading
        ("8 experts with top-2 have a lower loss than a dense model of equal FLOPs", (moe, dense), BELOW_0, "", None),
        (
            "the perplexity of 8 experts with top-2 is at least 15% lower than that of a dense model of equal FLOPs",
            (moe, dense),
            (-math.inf, math.log(0.85)),
            "ln 0.85, for perplexity per character",
            PER_WORD,
        ),
        (
            "a dense model with as many parameters as 8 experts does no worse, so the gain comes from parameters",
            (total, moe),
            (-math.inf, 0.005),
            "a difference up to 0.005 nats counts as none",
            None,
        ),
    )
    for number, (sentence, pair, holds, why, other_reading) in enumerate(claims, first):
        yield Claim(
            id=f"D{number}",
            sentence=f"{where}, {sentence}.",
            table="D",
            pairs=(pair,),
            measures=("test", "clean", "paper"),
            holds=holds,
            why=why,
            other_reading=other_reading,
            scales=scales,
        )


CLAIMS = (
    *_claims_on("text8", "On text8", first=1, scales=("paper",)),
    Claim(
        id="D4",
        sentence="Without a balancing loss, routing collapses.",
        table="experts",
        pairs=(("shakespeare_moe4_aux0", ""),),
        measures=("lowest_utilisation",),
        holds=(-math.inf, COLLAPSED_BELOW),
        why="a layer uses less than a quarter of what it could, (exp H − k) / (E − k)",
    ),
    Claim(
        id="D5",
        sentence="Too strong a balancing loss makes routing essentially random.",
        table="experts",
        pairs=(("shakespeare_moe4_aux01", ""),),
        measures=("above_frozen",),
        holds=(-math.inf, 0.02),
        why="at ten times the usual weight, the character tells at most 0.02 more about its expert than about a "
        "random router's",
    ),
    Claim(
        id="D6",
        sentence="Experts specialise along frequency.",
        table="experts",
        pairs=(("shakespeare_moe4", ""), ("shakespeare_moe8", "")),
        measures=("frequency_above_frozen",),
        holds=ABOVE_0,
        why="the frequency band tells a larger part of what the character tells than for a random router",
    ),
    Claim(
        id="D7",
        sentence="Specialisation is there within a few hundred steps and stays.",
        table="experts",
        pairs=(("shakespeare_moe4", ""), ("shakespeare_moe8", "")),
        measures=("early_agreement",),
        holds=(0.8, math.inf),
        why="after 15% of the updates four fifths of the characters have their final expert",
    ),
    *_claims_on("text8_head", "On the head of text8 (not the data set)", first=8, scales=("paper", "cpu")),
)
