"""Every number that a table or a claim can ask for: where it stands in a record, its unit, how it is printed.

    MEASURES["clean"].read(record)      # the number, or None where the record has none

A new measure is one entry here; a `View` or a `Claim` then names it. Most read the record of a run; the last ones read
an analysis, which analyze.py makes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from analysis import analyses
from papers.break_even import equivalent_steps
from papers.tuning import ALL_MULTIPLES, LEARNING_RATE, name_at_rate


def _field(*path):
    """A reader of one field of a record: None where it, or what holds it, is null."""

    def read(record):
        for key in path:
            record = None if record is None else record[key]
        return record

    return read


def _mean_over_layers(key):
    """A reader of a routing statistic, averaged over the MoE layers; None for a dense model."""

    def read(record):
        layers = record["routing"]
        return sum(layer[key] for layer in layers) / len(layers) if layers else None

    return read


@dataclass(frozen=True)
class Measure:
    """One number of a record, and how it is printed and compared."""

    heading: str  # of its column
    unit: str
    digits: int  # after the point
    read: Callable[[dict], float | None]  # record -> the number; None where it has none
    timed: bool = False  # counts only where the run had its hardware to itself
    is_exclusive: Callable[[dict], bool] = _field("exclusive")  # of a timed one: whether the run was alone
    # For a measure computed from several rows: (comparison, row) -> {seed: number}; its `read` finds nothing.
    of_table: Callable[..., dict[int, float]] | None = None


def _aux_per_layer(record):
    """The auxiliary losses' share of the loss with them, nats per MoE layer; None for a dense model."""
    paper, layers = record["paper"], len(record["routing"])
    return (paper["best_val_with_aux"] - paper["best_val"]) / layers if layers else None


def _with_aux4(record):
    """The training loss with four times the auxiliary losses, which are then weighted by 0.04 where it was 0.01."""
    if record["train_mode"] is None:
        return None
    loss, objective = (record["train_mode"][key] for key in ("loss", "objective"))
    return loss + 4 * (objective - loss)


def _above_best(record):
    return record["paper"]["final_val"] - record["paper"]["best_val"]


def _overfit(record):
    return record["clean"]["final"]["nats"] - record["clean"]["best"]["nats"]


def _from_b(read_train):
    """A reader of the largest distance from the baseline that paper B prints, each over its margin: papers/b.py."""

    def read(record):
        train = read_train(record)
        if train is None:
            return None
        val = record["paper"]["final_val"]
        return max(abs(val - 1.474) / 0.01, abs(train - 1.387) / 0.02, _above_best(record) / 0.0005)

    return read


def _cross_fitted(record):
    """The cross-fitted best; None in records from before it was kept."""
    return (record.get("cross_fitted") or {}).get("nats")


def _at_rate(multiple):
    """A reader of a tuned row's losses at a multiple of the papers' learning rate: {seed: nats}."""
    return lambda comparison, row: comparison.choices[row].losses.get(name_at_rate(row, multiple), {})


_SHARE, _CHARACTER = "of H(expert)", "of H(character)"
MEASURES = {
    "clean": Measure("best full validation", "nats", 4, _field("clean", "best", "nats")),
    "cross_fitted": Measure("best full validation, cross-fitted", "nats", 4, _cross_fitted),
    "clean_bpc": Measure("best full validation", "bits per character", 4, _field("clean", "best", "bpc")),
    "paper": Measure("best sampled validation", "nats", 4, _field("paper", "best_val")),
    "paper_with_aux": Measure(
        "best sampled validation + auxiliary losses",
        "nats",
        4,
        _field("paper", "best_val_with_aux"),
    ),
    "aux_per_layer": Measure("loss added by auxiliary losses, per MoE layer", "nats", 4, _aux_per_layer),
    "test": Measure("test, whole split", "nats", 4, _field("test", "nats")),
    "test_bpc": Measure("test, whole split", "bits per character", 4, _field("test", "bpc")),
    "final_train": Measure("final train, eval mode", "nats", 4, _field("paper", "final_train")),
    "final_val": Measure("final sampled validation", "nats", 4, _field("paper", "final_val")),
    "gap": Measure(
        "final validation − final train",
        "nats",
        4,
        lambda record: record["paper"]["final_val"] - record["paper"]["final_train"],
    ),
    "train_mode": Measure("final train, train mode", "nats", 4, _field("train_mode", "loss")),
    "train_mode_with_aux": Measure(
        "final train, train mode + auxiliary losses", "nats", 4, _field("train_mode", "objective")
    ),
    "train_mode_with_aux4": Measure("final train, train mode + 4 × auxiliary losses", "nats", 4, _with_aux4),
    "above_best": Measure("final − best sampled validation", "nats", 4, _above_best),
    "overfit": Measure("final − best full validation", "nats", 4, _overfit),
    "from_b": Measure("largest distance from B, train mode", "margins", 2, _from_b(_field("train_mode", "loss"))),
    "from_b_in_eval_mode": Measure(
        "largest distance from B, eval mode", "margins", 2, _from_b(_field("paper", "final_train"))
    ),
    "train_seconds": Measure("training", "s", 1, _field("seconds", "train"), timed=True),
    "tokens_per_second": Measure("training speed", "characters/s", 0, _field("tokens_per_second"), timed=True),
    "equivalent_steps": Measure(
        "dense steps to the same loss ÷ own steps", "", 3, lambda record: None, of_table=equivalent_steps
    ),
    "inference_speed": Measure(
        "inference, the papers' protocol",
        "characters/s",
        1,
        _field("inference", "tokens_per_second"),
        timed=True,
        # Records made before inference had a watch of its own do not say.
        is_exclusive=lambda record: record["inference"].get("exclusive", False),
    ),
    "chosen_rate": Measure("learning rate", "", 3, _field("config", "learning_rate")),
    **{
        f"rate{of}": Measure(f"{of * LEARNING_RATE:g}", "", 4, lambda record: None, of_table=_at_rate(of))
        for of in ALL_MULTIPLES
    },
    "total_parameters": Measure("parameters", "", 0, _field("parameters", "total")),
    "active_parameters": Measure("active per character", "", 0, _field("parameters", "active")),
    "training_flops": Measure("training FLOPs per character", "", 0, _field("training_flops_per_token")),
    "iterations": Measure("steps", "", 0, _field("iterations")),
    "epochs": Measure("epochs", "", 2, _field("epochs")),
    "load_cv2": Measure("squared CV of the router's choices", "", 3, _mean_over_layers("load_cv2")),
    "drop_rate": Measure("dropped", "of choices", 4, _mean_over_layers("drop_rate")),
    "entropy": Measure("router entropy", "nats", 3, _mean_over_layers("entropy")),
    # Read from an analysis.
    "analysed_nats": Measure("full validation of the last weights", "nats", 4, _field("nats")),
    "utilisation": Measure("experts used (0 to 1)", "", 3, analyses.utilisation),
    "lowest_utilisation": Measure("experts used, worst layer", "", 3, analyses.lowest_utilisation),
    "largest_load": Measure("E × largest load", "", 2, analyses.largest_load),
    "about_character": Measure("information from the character", _SHARE, 3, analyses.about("character")),
    "above_frozen": Measure(
        "information from the character − a random router's", _SHARE, 3, analyses.character_above_frozen
    ),
    "beyond_character": Measure(
        "information added by the two characters before", _SHARE, 3, analyses.context_given_character
    ),
    "syntax": Measure("information added by place in word or line", _SHARE, 3, analyses.syntax_given_character),
    "syntax_above_frozen": Measure(
        "information added by place − a random router's", _SHARE, 3, analyses.syntax_above_frozen
    ),
    "topic": Measure("information added by speaker, play or passage", _SHARE, 3, analyses.topic_given_character),
    "topic_of_rest": Measure(
        "information added by speaker, play or passage", "of what the character leaves open", 3, analyses.topic_of_rest
    ),
    "topic_above_frozen": Measure(
        "information added by topic − a random router's", _SHARE, 3, analyses.topic_above_frozen
    ),
    "syntax_over_topic": Measure("information added by place − by topic", _SHARE, 3, analyses.syntax_over_topic),
    "unexplained": Measure("uncertainty left by three characters", _SHARE, 3, analyses.unexplained),
    "frequency_above_frozen": Measure(
        "information from the frequency band ÷ from the character, − a random router's",
        "",
        3,
        analyses.frequency_above_frozen,
    ),
    "path_given_character": Measure(
        "entropy of the path given the character", "nats", 3, analyses.of_paths("given_character")
    ),
    "character_in_path": Measure("information from the path", _CHARACTER, 3, analyses.of_paths("character")),
    "path_above_frozen": Measure(
        "information from the path − a random router's", _CHARACTER, 3, analyses.path_above_frozen
    ),
    "layer_information": Measure(
        "information between two layers' experts", "nats", 3, analyses.of_paths("between_layers")
    ),
    "paths": Measure("effective number of paths", "", 1, analyses.of_paths("effective")),
    "distinct_paths": Measure("distinct paths", "", 0, analyses.of_paths("used")),
    "gain": Measure(
        "information from the character, end − start of training", _SHARE, 3, analyses.gain_of_specialisation
    ),
    "early_agreement": Measure("final expert reached by 15% of the run", "of characters", 3, analyses.early_agreement),
    "router_cosine": Measure(
        "cosine of the gradients of cross-entropy and balancing loss", "", 3, analyses.router_cosine
    ),
    "token_cosine": Measure("cosine of two characters' gradients", "", 5, analyses.token_cosine),
    "shuffled": Measure("routing shuffled", "nats", 4, analyses.ablated("shuffled_all")),
    "tabulated": Measure("each character to its commonest expert", "nats", 4, analyses.ablated("tabulated_all")),
    "hashed": Measure("hash routing", "nats", 4, analyses.ablated("hashed_all")),
    "removed": Measure("cheapest experts removed", "nats", 4, analyses.ablated("removed_all")),
    "merged": Measure("cheapest experts merged", "nats", 4, analyses.ablated("merged_all")),
}

# Measures that several tables show together.
LOSSES = ("clean", "cross_fitted", "clean_bpc", "paper", "paper_with_aux")
COSTS = ("total_parameters", "active_parameters", "train_seconds", "tokens_per_second", "inference_speed")
