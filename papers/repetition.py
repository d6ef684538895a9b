"""Repetition: what experts are worth where a text has few unique characters, each read many times."""

import dataclasses

from papers.ours import SOURCE
from papers.table import ABOVE_0, BELOW_0, Claim, Table, View
from papers.tuned import CHOSEN_AT_CPU, TUNED, at_rate

MODELS = {"dense": "dense", "moe4": "4 experts", "hash4": "hash routing", "dense_wide": "dense, as large as 4 experts"}
MODELS_AT = {"paper": ("dense", "moe4"), "cpu": tuple(MODELS)}
PREFIXES = {
    "paper": ("text8_head", {"_500k": 500_000, "_1m": 1_000_000, "_2500k": 2_500_000, "": 0}),
    "cpu": ("shakespeare", {"_30k": 30_000, "_100k": 100_000, "_300k": 300_000, "": 0}),
}


def _name(text, model, scale):
    """Of the row of a model: at CPU size the rate chosen for it on the whole text."""
    return f"{text}_{model}_rate{CHOSEN_AT_CPU[f'shakespeare_{model}']}" if scale == "cpu" else f"{text}_{model}"


def _rows(scale):
    """Each model on longer and longer prefixes of one text, the whole last."""
    text, sizes = PREFIXES[scale]
    dataset = {} if text == "shakespeare" else {"dataset": text}
    for tag, size in sizes.items():
        for model in MODELS_AT[scale]:
            of = TUNED.row(f"shakespeare_{model}")
            row = dataclasses.replace(
                of,
                name=f"{text}{tag}_{model}",
                label=f"{f'{size:,}' if size else 'all'} characters, {MODELS[model]}",
                config=of.config or of.name,
                options=dataset | ({"train_characters": size} if size else {}),
                candidates=(),
                reserve={},
            )
            row = at_rate(row, CHOSEN_AT_CPU[of.name] if scale == "cpu" else 1, (scale,))
            yield dataclasses.replace(row, baseline="" if model == "dense" else _name(text + tag, "dense", scale))


REPETITION = Table(
    name="repetition",
    title="Repetition: dense and 4 experts on more and more unique characters",
    source=SOURCE,
    text="Prefixes of one text: of text8's first megabytes at paper size (not that data set), of Shakespeare at CPU "
    "size. Every run reads as many characters as any other of its scale, so fewer unique ones mean more epochs. At CPU "
    "size each model has the learning rate that table `tuned` chose for it on the whole text; at paper size, the "
    "papers'. Paper A says that there is a scale below which sparsity harms.",
    rows=(*_rows("cpu"), *_rows("paper")),
    views=(View("Loss", ("clean", "cross_fitted", "overfit", "test", "paper", "paper_with_aux", "epochs")),),
    figures=("difference_by_size",),
    by_size=True,
)

TABLES = (REPETITION,)


def _crossing(id, text, model, few, many, scale, why=""):
    """A model loses to the dense one where the text is short, and wins where it is long; few, many: prefixes."""
    (short, dense_short), (long, dense_long) = ([_name(of, m, scale) for m in (model, "dense")] for of in (few, many))
    return Claim(
        id=id,
        sentence=f"On {text}, the dense model beats {MODELS[model]} on the fewest unique characters and loses on the "
        "most: in between, the difference crosses 0.",
        table=REPETITION.name,
        # The second pair is turned round, so that both effects must lie above 0.
        pairs=((short, dense_short), (dense_long, long)),
        measures=("clean", "cross_fitted") if scale == "cpu" else ("test", "clean", "cross_fitted"),
        holds=ABOVE_0,
        why="A's “scale below which sparsity harms”, read as unique characters; the crossing is given with its interval"
        + why,
        scales=(scale,),
    )


BEFORE = ". Written down before any run on a prefix; on the whole text, seeds 1337 to 1339 had chosen the rates"
SHAKESPEARE = "Shakespeare, at the rates chosen on the whole text"

CLAIMS = (
    _crossing("E11", "the head of text8 (not the data set)", "moe4", "text8_head_500k", "text8_head", "paper"),
    _crossing("E12", SHAKESPEARE, "moe4", "shakespeare_30k", "shakespeare", "cpu", BEFORE),
    _crossing("E25", SHAKESPEARE, "hash4", "shakespeare_30k", "shakespeare", "cpu", BEFORE),
    Claim(
        id="E31",
        sentence="Where 30,000 characters of Shakespeare are read 51 times, at the rates chosen on the whole text, 4 "
        "experts with a learned router overfit less than a dense model of their total parameters.",
        table=REPETITION.name,
        pairs=((_name("shakespeare_30k", "moe4", "cpu"), _name("shakespeare_30k", "dense_wide", "cpu")),),
        measures=("overfit",),
        holds=BELOW_0,
        why="predicted to hold, for each character trains a third of their parameters. Hash routing is left out: its "
        "rate is half of theirs, and that alone can make a model overfit less. Written down before any run of the wide "
        "model on a prefix",
        scales=("cpu",),
    ),
)
