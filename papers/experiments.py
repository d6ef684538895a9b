"""The papers' tables and claims as data: which runs make a row, what was published, and when a claim holds.

    table = TABLES["B"]
    table.rows_at("cpu")[1].config_at("cpu", seed=1337)     # the Config of one run
    gather(table, records)                                  # the table's cells, filled with the records that are there

A row is a config file and what is set on top of it; its runs are found by their config's hash, so that one run serves
every table in which its row stands. A claim is an interval in which an effect must lie. `sweep.py` runs what is
missing, `verdicts.py` decides, `plot_results.py` shows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from analysis import analyses
from run import records
from run.settings import Config
from support import configurator
from support.files import ROOT

FIRST_SEED = 1337
SEEDS_FOR_A_VERDICT = 5  # a verdict from fewer is called provisional


@dataclass(frozen=True)
class Scale:
    """A size at which everything can be run; numbers of two scales never share a table."""

    name: str
    overlay: str  # a file in config/ that comes after the row's own; "" for none
    title: str


SCALES = {
    "paper": Scale("paper", "", "paper size: 6 layers, 384 wide, context 256, where no row says otherwise"),
    "cpu": Scale(
        "cpu",
        "cpu",
        "CPU size: 4 layers, 128 wide, context 64, 2,000 steps of 768 characters, where no row says otherwise",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# What a number in a table is


def _at(*path):
    def read(record):
        for key in path:
            if record is None:
                return None
            record = record[key]
        return record

    return read


def _mean_over_layers(key):
    def read(record):
        layers = record["routing"]
        return sum(layer[key] for layer in layers) / len(layers) if layers else None

    return read


@dataclass(frozen=True)
class Measure:
    """read: record -> number, or None where the record has none.

    Some are estimates from random batches, which depend on seed and step alone: rows of one seed share them, and with
    them most of the noise, so their differences are paired over seeds.
    """

    heading: str
    unit: str
    digits: int
    read: Callable[[dict], float | None]
    lower_is_better: bool = True
    timed: bool = False  # counts only where the hardware was the run's alone
    shares_batches: bool = False
    is_exclusive: Callable[[dict], bool] = _at("exclusive")  # of a time: whether it was


def _aux_per_layer(record):
    paper, layers = record["paper"], len(record["routing"])
    return (paper["best_val_with_aux"] - paper["best_val"]) / layers if layers else None


_SHARE = "of H(expert)"
MEASURES = {
    "clean": Measure("best validation, clean", "nats", 4, _at("clean", "best", "nats")),
    "clean_bpc": Measure("best validation, clean", "bits per character", 4, _at("clean", "best", "bpc")),
    "paper": Measure("best validation, the papers' way", "nats", 4, _at("paper", "best_val"), shares_batches=True),
    "paper_with_aux": Measure(
        "the papers' way + auxiliary losses", "nats", 4, _at("paper", "best_val_with_aux"), shares_batches=True
    ),
    "aux_per_layer": Measure("what auxiliary losses add, per MoE layer", "nats", 4, _aux_per_layer),
    "test_bpc": Measure("test, clean", "bits per character", 4, _at("test", "bpc")),
    "final_train": Measure("final train, eval mode", "nats", 4, _at("paper", "final_train"), shares_batches=True),
    "final_val": Measure(
        "final validation, the papers' way", "nats", 4, _at("paper", "final_val"), shares_batches=True
    ),
    "gap": Measure(
        "final validation − final train",
        "nats",
        4,
        lambda record: record["paper"]["final_val"] - record["paper"]["final_train"],
        shares_batches=True,
    ),
    "train_mode": Measure("final train, train mode", "nats", 4, _at("train_mode", "loss"), shares_batches=True),
    "train_mode_with_aux": Measure(
        "final train, train mode + auxiliary losses", "nats", 4, _at("train_mode", "objective"), shares_batches=True
    ),
    "train_seconds": Measure("training", "s", 1, _at("seconds", "train"), timed=True),
    "tokens_per_second": Measure(
        "training speed", "characters/s", 0, _at("tokens_per_second"), lower_is_better=False, timed=True
    ),
    "inference_speed": Measure(
        "inference, the papers' way",
        "characters/s",
        1,
        _at("inference", "tokens_per_second"),
        lower_is_better=False,
        timed=True,
        # Records made before inference had a watch of its own do not say.
        is_exclusive=lambda record: record["inference"].get("exclusive", False),
    ),
    "total_parameters": Measure("parameters", "", 0, _at("parameters", "total")),
    "active_parameters": Measure("active per character", "", 0, _at("parameters", "active")),
    "training_flops": Measure("training FLOPs per character", "", 0, _at("training_flops_per_token")),
    "epochs": Measure("epochs", "", 2, _at("epochs")),
    "load_cv2": Measure("squared CV of the router's choices", "", 3, _mean_over_layers("load_cv2")),
    "drop_rate": Measure("choices dropped", "", 4, _mean_over_layers("drop_rate")),
    "entropy": Measure("router entropy", "nats", 3, _mean_over_layers("entropy"), lower_is_better=False),
    # Of an analysis.
    "analysed_nats": Measure("last weights, clean", "nats", 4, _at("nats")),
    "utilisation": Measure("experts used (0 to 1)", "", 3, analyses.utilisation, lower_is_better=False),
    "lowest_utilisation": Measure("the same, worst layer", "", 3, analyses.lowest_utilisation, lower_is_better=False),
    "largest_load": Measure("E × largest load", "", 2, analyses.largest_load),
    "about_character": Measure("the character tells", _SHARE, 3, analyses.about("character")),
    "above_frozen": Measure("the same − a random router's", _SHARE, 3, analyses.character_above_frozen),
    "beyond_character": Measure("+ two characters before it", _SHARE, 3, analyses.context_given_character),
    "syntax": Measure("+ place in word or line", _SHARE, 3, analyses.syntax_given_character),
    "syntax_above_frozen": Measure("place, less a random router's", _SHARE, 3, analyses.syntax_above_frozen),
    "topic": Measure("+ speaker, play or passage", _SHARE, 3, analyses.topic_given_character),
    "topic_of_rest": Measure("the same", "of what the character leaves open", 3, analyses.topic_of_rest),
    "topic_above_frozen": Measure("topic, less a random router's", _SHARE, 3, analyses.topic_above_frozen),
    "syntax_over_topic": Measure("place − topic", _SHARE, 3, analyses.syntax_over_topic),
    "unexplained": Measure("left open by the three", _SHARE, 3, analyses.unexplained),
    "frequency_above_frozen": Measure(
        "frequency band ÷ character, − a random router's", "", 3, analyses.frequency_above_frozen, lower_is_better=False
    ),
    "gain": Measure("what the character tells, end − start", _SHARE, 3, analyses.gain_of_specialisation),
    "early_agreement": Measure("final expert at 15% of the run", "of characters", 3, analyses.early_agreement),
    "router_cosine": Measure("cosine of cross-entropy and balance", "", 3, analyses.router_cosine),
    "token_cosine": Measure("cosine of two characters' gradients", "", 5, analyses.token_cosine),
    "shuffled": Measure("routing shuffled", "nats", 4, analyses.ablated("shuffled_all")),
    "tabulated": Measure("a table of the character", "nats", 4, analyses.ablated("tabulated_all")),
    "hashed": Measure("a hash table", "nats", 4, analyses.ablated("hashed_all")),
    "removed": Measure("cheapest experts removed", "nats", 4, analyses.ablated("removed_all")),
    "merged": Measure("cheapest experts merged", "nats", 4, analyses.ablated("merged_all")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows and tables


@dataclass(frozen=True)
class Row:
    """One setting, run with several seeds."""

    name: str  # of its records: <name>[-cpu]-s<seed>.json
    label: str
    config: str  # a file in config/
    options: Mapping[str, Any] = field(default_factory=dict)  # on top of it and of the scale's overlay
    options_at: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # scale -> further ones
    baseline: str = ""  # the row that it is compared with; "" where it is one itself
    published: Mapping[str, float] = field(default_factory=dict)  # measure -> as the paper prints it
    scales: tuple[str, ...] = ("paper", "cpu")

    def stem(self, scale: str) -> str:
        overlay = SCALES[scale].overlay
        return f"{self.name}-{overlay}" if overlay else self.name

    def cell(self, scale: str, seed: int) -> str:
        """The name of one run: of its folder under out/, and of its record."""
        return f"{self.stem(scale)}-s{seed}"

    def arguments(self, scale: str, seed: int) -> list[str]:
        """What train.py is called with, from the root of the project, less the seed's and machine's own."""
        files = [f"config/{name}.py" for name in (self.config, SCALES[scale].overlay) if name]
        options = {**self.options, **self.options_at.get(scale, {})}
        if options:
            options["title"] = self.label
        return [*files, *(f"--{key}={value}" for key, value in options.items()), f"--seed={seed}"]

    def config_at(self, scale: str, seed: int = FIRST_SEED) -> Config:
        return _config(tuple(self.arguments(scale, seed)))


@functools.cache
def _config(arguments):
    here = [str(ROOT / word) if word.startswith("config/") else word for word in arguments]
    return configurator.parse(Config, here, problems_of=Config.problems_of_any_router)  # without torch


class View(NamedTuple):
    """One way to print a table's rows: measures as columns; relative ones are divided by the row's baseline."""

    title: str
    measures: tuple[str, ...]
    relative: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    source: str
    text: str  # what it is for, and what its published numbers are
    rows: tuple[Row, ...]
    views: tuple[View, ...]
    of: str = "records"  # what its cells hold: records of train.py, or analyses of analyze.py

    def rows_at(self, scale: str) -> list[Row]:
        return [row for row in self.rows if scale in row.scales]

    def command(self, scale: str) -> str:
        """What makes its cells."""
        command = f"python sweep.py {self.name} --scale={scale} --seeds={SEEDS_FOR_A_VERDICT}"
        if self.of == "analyses":  # of runs that are there: records elsewhere, for those of results/ have no weights
            command += " --save_every=100 --results=out/records; python analyze.py out/*-s*/ --results=results"
        return command

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


A = "A: Xu, Hou, Liang 2026"
B = "B: Huang, Chen, Zheng 2025, Information 16, 483"
C = "C: Fan, Messmer, Jaggi 2024, arXiv 2402.13089"
D = "D: Notes on building a small mixture-of-experts from scratch"
OURS = "this project"

SHOWN_LOSSES = ("clean", "clean_bpc", "paper", "paper_with_aux")
COSTS = ("total_parameters", "active_parameters", "train_seconds", "tokens_per_second", "inference_speed")


_PUBLISHED_BY_A = {"dense": {"paper": 1.46}, "moe4": {"paper": 1.53}}  # on shakespeare_char, "bits" that are nats


def _rows_of_a(dataset, published):
    """A's rows on one data set; published: those of them for which A's abstract has a number."""
    labels = {
        "dense": "dense",
        "moe2": "2 experts, aux 0.01",
        "moe4": "4 experts, aux 0.01",
        "moe8": "8 experts, aux 0.01",
        "moe4_aux01": "4 experts, aux 0.1",
        "moe4_expert_dropout": "4 experts, whole experts dropped",
        "moe4_inner_dropout": "4 experts, dropout inside them",
    }
    return tuple(
        Row(
            name=f"{dataset}_{name}",
            label=label,
            config=f"{dataset}_{name}",
            baseline="" if name == "dense" else f"{dataset}_dense",
            published=published.get(name, {}),
        )
        for name, label in labels.items()
    )


def _rows_of_summary():
    rows = []
    for dataset, folder in {
        "shakespeare": "",
        "enwik8": "",
        "text8": "",
        "enwik8_head": "enwik8_head",
        "text8_head": "text8_head",
    }.items():
        base = dataset.removesuffix("_head")
        title = {"shakespeare": "Shakespeare"}.get(dataset, dataset.replace("_", " "))
        published = _PUBLISHED_BY_A if dataset == "shakespeare" else {}
        for name, label in {"dense": "dense", "moe4": "4 experts"}.items():
            rows.append(
                Row(
                    name=f"{dataset}_{name}",
                    label=f"{title}, {label}",
                    config=f"{base}_{name}",
                    options={"dataset": folder} if folder else {},
                    baseline="" if name == "dense" else f"{dataset}_dense",
                    published=published.get(name, {}),
                    scales=("paper",) if dataset in ("enwik8", "text8") else ("paper", "cpu"),
                )
            )
    return tuple(rows)


def _row_of_b(name, label, best, seconds, speed, train, val):
    return Row(
        name=name,
        label=label,
        config=name,
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


def _rows_of_boundary():
    """Dense and 4 experts over width × unique characters; epochs follow, for every run reads equally many."""
    grid = {
        "cpu": ((64, 128, 256), (30_000, 100_000, 300_000, 0)),
        "paper": ((96, 192, 384), (30_000, 100_000, 300_000, 0)),
    }
    rows = []
    for scale, (widths, sizes) in grid.items():
        for width in widths:
            for size in sizes:
                tag = f"w{width}_{f'{size // 1000}k' if size else 'all'}"
                options = {"n_embd": width, "train_characters": size}
                for name, label in {"dense": "dense", "moe4": "4 experts"}.items():
                    rows.append(
                        Row(
                            name=f"{tag}_{name}",
                            label=f"{width} wide, {f'{size:,}' if size else 'all'} characters, {label}",
                            config=f"shakespeare_{name}",
                            options=options,
                            baseline="" if name == "dense" else f"{tag}_dense",
                            scales=(scale,),
                        )
                    )
    return tuple(rows)


def _rows_of_experts():
    """Runs of the other tables that differ in how they route, and segments and whole sequences."""
    rows = {
        "shakespeare_dense": ("dense", "shakespeare_dense", {}),
        "shakespeare_moe4": ("4 experts", "shakespeare_moe4", {}),
        "shakespeare_moe4_aux0": ("4 experts, no balance", "shakespeare_moe4", {"aux_loss_coef": 0.0}),
        "shakespeare_moe4_aux01": ("4 experts, balance 0.1", "shakespeare_moe4_aux01", {}),
        "shakespeare_moe8": ("8 experts", "shakespeare_moe8", {}),
        "shakespeare_moe4_frozen": ("4 experts, frozen router", "shakespeare_moe4_frozen", {}),
        "shakespeare_hash4": ("4 experts, table of characters", "shakespeare_hash4", {}),
        "shakespeare_moe4_segment": ("4 experts, by segment", "shakespeare_moe4_segment", {}),
        "shakespeare_moe4_sequence": ("4 experts, by sequence", "shakespeare_moe4_sequence", {}),
        "shakespeare_top2": ("4 linear experts, top-2", "shakespeare_top2", {}),
        "shakespeare_top2_cap05": ("the same, capacity 0.5", "shakespeare_top2_cap05", {}),
    }
    return tuple(Row(name, label, config, options) for name, (label, config, options) in rows.items())


def _rows_of_notes():
    """D's three models on text8 and on its head. At CPU size widths are those of the smaller model."""
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


TABLES = {
    table.name: table
    for table in (
        Table(
            name="B",
            title="Soft, top-2 and capacity-limited linear experts",
            source=B,
            text="Four linear experts share the dense MLP's first layer. Published: one machine, n not told.",
            rows=(
                _row_of_b("shakespeare_dense", "Baseline", 1.4739, 287.9, 441.3, 1.387, 1.474),
                _row_of_b("shakespeare_soft4", "MoE Base (4 experts, soft)", 1.4764, 434.0, 250.9, 1.634, 1.476),
                _row_of_b("shakespeare_top2", "MoE Top-2", 1.4718, 460.5, 224.7, 1.612, 1.472),
                _row_of_b("shakespeare_top2_cap05", "MoE Capacity 0.5 (top-2)", 1.4718, 463.3, 196.9, 1.618, 1.472),
                _row_of_b("shakespeare_top2_cap10", "MoE Capacity 1.0 (top-2)", 1.4718, 463.3, 195.0, 1.615, 1.472),
            ),
            views=(
                View("Loss and cost", ("paper", "clean", "train_seconds", "inference_speed")),
                View("Training loss and generalisation", ("final_train", "train_mode", "final_val", "gap")),
                View("Relative to the baseline", ("paper", "clean", "train_seconds", "inference_speed"), relative=True),
                View("Routing", ("load_cv2", "drop_rate", "entropy", "total_parameters", "active_parameters")),
            ),
        ),
        *(
            Table(
                name=name,
                title=f"Switch-style experts on {title}",
                source=A,
                text="Top-1 of full-width experts; number of experts, weight of the balancing loss, expert dropout "
                "(two readings). Published: the abstract's two losses, called bits there, but nats by their size.",
                rows=_rows_of_a(dataset, _PUBLISHED_BY_A if dataset == "shakespeare" else {}),
                views=(
                    View("Loss", SHOWN_LOSSES),
                    View("Cost", COSTS),
                    View("Routing", ("aux_per_layer", "load_cv2", "entropy")),
                ),
            )
            for name, dataset, title in (
                ("A", "shakespeare", "shakespeare_char"),
                ("A_enwik8", "enwik8", "enwik8"),
                ("A_text8", "text8", "text8"),
            )
        ),
        Table(
            name="A_summary",
            title="Dense against 4 experts, by data set",
            source=A,
            text="The heads are the first megabytes of enwik8 and text8: real text, but not those data sets.",
            rows=_rows_of_summary(),
            views=(
                View("Loss", ("clean", "clean_bpc", "paper", "paper_with_aux", "test_bpc")),
                View("Cost", ("train_seconds", "inference_speed", "epochs")),
            ),
        ),
        Table(
            name="C",
            title="Learned, frozen and random routers",
            source=C,
            text="4 experts, top-1, routed by token. C's own perplexities (frozen / learned / drawn anew each step) "
            "are 9.810 / 9.907 / 11.752 on multilingual text and 22.687 / 22.632 / 26.879 on OpenWebText: other models "
            "on other data, so only the direction compares.",
            rows=(
                Row("shakespeare_moe4", "learned", "shakespeare_moe4"),
                Row("shakespeare_moe4_frozen", "frozen", "shakespeare_moe4_frozen", baseline="shakespeare_moe4"),
                Row("shakespeare_moe4_random", "random", "shakespeare_moe4_random", baseline="shakespeare_moe4"),
            ),
            views=(View("Loss", SHOWN_LOSSES), View("Routing", ("load_cv2", "entropy", "train_seconds"))),
        ),
        Table(
            name="D",
            title="8 experts, top-2, against dense models of equal FLOPs and equal parameters",
            source=D,
            text="Published: 15% lower perplexity (0.163 nats) than a dense model at the same FLOPs, on a text that is "
            "not named. The head of text8 is its first megabytes: real text, but not that data set.",
            rows=_rows_of_notes(),
            views=(View("Loss", (*SHOWN_LOSSES, "test_bpc")), View("Cost", COSTS)),
        ),
        Table(
            name="router",
            title="Is a router worth learning? 4 experts filled by one, or by a table",
            source=OURS,
            text="A table gives each character its expert once and for all, balanced by frequency: it learns nothing. "
            "Its gate is 1 and no loss balances it, where a learned router's gate is its probability and a balancing "
            "loss pulls at it; so two rows have a gate of 1, and two no balance.",
            rows=(
                Row("shakespeare_moe4", "learned", "shakespeare_moe4"),
                Row(
                    "shakespeare_moe4_aux0",
                    "learned, no balance",
                    "shakespeare_moe4",
                    {"aux_loss_coef": 0.0},
                    baseline="shakespeare_moe4",
                ),
                Row(
                    "shakespeare_moe4_straight_through",
                    "learned, gate 1",
                    "shakespeare_moe4_straight_through",
                    baseline="shakespeare_moe4",
                ),
                Row(
                    "shakespeare_moe4_straight_through_aux0",
                    "learned, gate 1, no balance",
                    "shakespeare_moe4_straight_through",
                    {"aux_loss_coef": 0.0},
                    baseline="shakespeare_moe4",
                ),
                Row("shakespeare_hash4", "table of characters", "shakespeare_hash4", baseline="shakespeare_moe4"),
                Row("shakespeare_dense", "dense", "shakespeare_dense", baseline="shakespeare_moe4"),
            ),
            views=(View("Loss", SHOWN_LOSSES), View("Cost", COSTS), View("Routing", ("load_cv2", "entropy"))),
        ),
        Table(
            name="equal",
            title="Equal what? 4 experts against dense models that cost the same in one respect",
            source=OURS,
            text="The dense model has the active FLOPs of 4 experts, but for the router's share of under 0.3%; the "
            "wide one has their total parameters; the long one makes 1.3 times as many steps, which is about as long "
            "by the clock on a CPU: the times beside it say how nearly.",
            rows=(
                Row("shakespeare_dense", "dense, equal active FLOPs", "shakespeare_dense", baseline="shakespeare_moe4"),
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
                Row("shakespeare_moe4", "4 experts, top-1", "shakespeare_moe4"),
            ),
            views=(View("Loss", SHOWN_LOSSES), View("Cost", (*COSTS, "training_flops"))),
        ),
        Table(
            name="boundary",
            title="The scale boundary: width × unique characters",
            source=OURS,
            text="Every run reads as many characters as any other of its scale, so fewer unique ones are more epochs. "
            "A says that there is a scale below which sparsity harms.",
            rows=_rows_of_boundary(),
            views=(View("Loss", ("clean", "paper", "epochs", "total_parameters")),),
        ),
        Table(
            name="experts",
            title="What the experts do",
            source=OURS,
            of="analyses",
            text="What `analyze.py` finds in the last weights of a run: how the load is spread, what tells a "
            "character's expert, when routing settles, what pulls the router, and what experts are worth. Numbers are "
            "means over the layers of a model; information is beyond chance.",
            rows=_rows_of_experts(),
            views=(
                View("Load", ("analysed_nats", "utilisation", "lowest_utilisation", "largest_load")),
                View("What tells the expert", ("about_character", "above_frozen", "beyond_character", "unexplained")),
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
                View("What it costs", ("shuffled", "hashed", "tabulated", "removed", "merged")),
            ),
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Claims


@dataclass(frozen=True)
class Claim:
    """A sentence that records can contradict.

    Each (row, against) of `pairs` has an effect: of `measure`, row minus against ("difference"), row over against
    ("ratio"), or the row's own value ("value", against ""). The claim holds where every effect's 95% interval lies
    within `holds`, does not where one lies outside of it altogether, and is within noise otherwise. The first measure
    decides; the others are told where they disagree.
    """

    id: str
    sentence: str
    source: str
    table: str
    pairs: tuple[tuple[str, str], ...]
    measures: tuple[str, ...]
    effect: str  # difference, ratio or value
    holds: tuple[float, float]
    why: str = ""  # where the bounds come from
    scales: tuple[str, ...] = ("paper", "cpu")


def _each(rows, against):
    return tuple((row, against) for row in rows)


ABOVE, BELOW = (0.0, math.inf), (-math.inf, 0.0)
MORE, LESS = (1.0, math.inf), (0.0, 1.0)
_MOE_OF_A = ("moe2", "moe4", "moe8", "moe4_aux01", "moe4_expert_dropout", "moe4_inner_dropout")
_MOE_OF_B = ("shakespeare_soft4", "shakespeare_top2", "shakespeare_top2_cap05", "shakespeare_top2_cap10")
_CAPACITY_OF_B = _MOE_OF_B[2:]
CLAIM_LOSSES = ("clean", "paper", "paper_with_aux")  # the first decides


def _claims_of_a():
    for number, (table, dataset) in enumerate(
        {"A": "shakespeare", "A_enwik8": "enwik8", "A_text8": "text8"}.items(), start=1
    ):
        pairs = _each([f"{dataset}_{name}" for name in _MOE_OF_A], f"{dataset}_dense")
        scales = ("paper", "cpu") if dataset == "shakespeare" else ("paper",)
        title = "shakespeare_char" if dataset == "shakespeare" else dataset
        yield Claim(
            f"A{number}",
            f"On {title}, every MoE configuration has a higher best validation loss than the dense model.",
            A, table, pairs, CLAIM_LOSSES, "difference", ABOVE, scales=scales,
        )  # fmt: skip
    shakespeare = _each([f"shakespeare_{name}" for name in _MOE_OF_A], "shakespeare_dense")
    yield Claim(
        "A4", "On shakespeare_char, 4 experts lose about 0.07 nats to the dense model (1.53 against 1.46).", A, "A",
        (("shakespeare_moe4", "shakespeare_dense"),), CLAIM_LOSSES, "difference",
        (0.035, 0.105), "half of the published gap to one and a half of it", ("paper",),
    )  # fmt: skip
    yield Claim(
        "A5", "A balancing loss of weight 0.1 instead of 0.01 raises the validation loss (“destabilises training”).",
        A, "A",
        (("shakespeare_moe4_aux01", "shakespeare_moe4"),), CLAIM_LOSSES, "difference", ABOVE,
    )  # fmt: skip
    yield Claim(
        "A6", "Expert dropout does not improve the validation loss.", A, "A",
        _each(("shakespeare_moe4_expert_dropout", "shakespeare_moe4_inner_dropout"), "shakespeare_moe4"),
        CLAIM_LOSSES, "difference", (-0.005, math.inf),
        "an improvement below 0.005 nats, about two standard deviations of the template's seeds, is none",
    )  # fmt: skip
    yield Claim(
        "A7", "Every MoE configuration has more parameters than the dense model.", A, "A",
        shakespeare, ("total_parameters",), "ratio", MORE,
    )  # fmt: skip
    yield Claim(
        "A8", "Every MoE configuration takes longer to train.", A, "A", shakespeare, ("train_seconds",), "ratio", MORE
    )
    yield Claim(
        "A9", "Every MoE configuration is slower at inference.", A, "A",
        shakespeare, ("inference_speed",), "ratio", LESS,
    )  # fmt: skip
    for number, dataset in enumerate(("enwik8_head", "text8_head"), start=10):
        yield Claim(
            f"A{number}",
            f"On the head of {dataset.removesuffix('_head')} (not the data set), 4 experts have a higher best "
            "validation loss than the dense model.",
            A, "A_summary", ((f"{dataset}_moe4", f"{dataset}_dense"),), CLAIM_LOSSES, "difference", ABOVE,
        )  # fmt: skip


def _claims_of_notes(dataset, numbers, scales):
    """D's three claims on one text: the notes name none."""
    where = "On text8" if dataset == "text8" else "On the head of text8 (not the data set)"
    dense, total, moe = (f"{dataset}_notes_{name}" for name in ("dense", "dense_total", "moe8"))
    claims = (
        ("8 experts with top-2 have a lower loss than a dense model of equal FLOPs", moe, dense, BELOW, ""),
        (
            "the perplexity of 8 experts with top-2 is at least 15% lower than that of a dense model of equal FLOPs",
            moe, dense, (-math.inf, math.log(0.85)), "ln 0.85",
        ),
        (
            "a dense model with as many parameters as 8 experts does no worse, so the gain is theirs",
            total, moe, (-math.inf, 0.005), "0.005 nats count as no difference",
        ),
    )  # fmt: skip
    for number, (sentence, row, against, holds, why) in zip(numbers, claims, strict=True):
        measures = ("clean", "paper")
        yield Claim(
            f"D{number}", f"{where}, {sentence}.", D, "D", ((row, against),), measures, "difference", holds, why, scales
        )


CLAIMS = (
    *_claims_of_a(),
    Claim(
        "A12", "The balancing loss pulls the router against cross-entropy (“gradient conflict”).", A, "experts",
        (("shakespeare_moe4", ""), ("shakespeare_moe4_aux01", "")), ("router_cosine",), "value", BELOW,
        "the mean cosine of the two gradients at the router; A's abstract only names the mechanism. Where training has "
        "settled the two are opposed by construction, so this says more of convergence than of harm",
    ),
    Claim(
        "A13", "Experts hardly specialise (“specialisation entropy”).", A, "experts",
        (("shakespeare_moe4", ""), ("shakespeare_moe8", "")), ("unexplained",), "value", (0.5, math.inf),
        "knowing a character and the two before it leaves more than half of the uncertainty about its expert; our "
        "reading",
    ),
    Claim(
        "B1", "Every MoE variant keeps the validation loss within 0.2% of the baseline's.", B, "B",
        _each(_MOE_OF_B, "shakespeare_dense"), ("paper", "clean"), "ratio", (0.998, 1.002), "B's own figure",
    ),
    Claim(
        "B2", "Top-2 routing slightly improves the validation loss over the baseline.", B, "B",
        (("shakespeare_top2", "shakespeare_dense"),), ("clean", "paper"), "ratio", LESS,
    ),
    Claim(
        "B3", "MoE variants end with a training loss about 18% above the baseline's.", B, "B",
        _each(_MOE_OF_B, "shakespeare_dense"), ("final_train", "train_mode", "train_mode_with_aux"), "ratio",
        (1.09, 1.27), "half of the published 18% to one and a half of it",
    ),
    Claim(
        "B4", "MoE variants take about half as long again to train.", B, "B",
        _each(_MOE_OF_B, "shakespeare_dense"), ("train_seconds",), "ratio", (1.25, 1.75),
        "half of the overhead of 50% to one and a half of it",
    ),
    Claim(
        "B5", "MoE variants write text at about half the baseline's speed.", B, "B",
        _each(_MOE_OF_B, "shakespeare_dense"), ("inference_speed",), "ratio", (0.35, 0.75),
        "B's ratios are 0.44 to 0.57",
    ),
    Claim(
        "B6", "Top-2 routing has a lower validation loss than soft routing.", B, "B",
        (("shakespeare_top2", "shakespeare_soft4"),), ("clean", "paper"), "difference", BELOW,
    ),
    Claim(
        "B7", "Top-2 routing writes text more slowly than soft routing.", B, "B",
        (("shakespeare_top2", "shakespeare_soft4"),), ("inference_speed",), "ratio", LESS,
    ),
    Claim(
        "B8", "Capacity limits make the router's choices more even.", B, "B",
        _each(_CAPACITY_OF_B, "shakespeare_top2"), ("load_cv2",), "difference", BELOW,
    ),
    Claim(
        "B9", "Capacity limits cost training time over top-2 without them.", B, "B",
        _each(_CAPACITY_OF_B, "shakespeare_top2"), ("train_seconds",), "ratio", MORE,
    ),
    Claim(
        "B10", "Capacity 0.5 and 1.0 leave the validation loss of top-2 unchanged (one value to four digits).", B, "B",
        _each(_CAPACITY_OF_B, "shakespeare_top2"), ("paper", "clean"), "difference", (-0.0005, 0.0005),
        "limits that never drop a choice leave runs identical",
    ),
    Claim(
        "B11", "Experts are used unevenly even with load balancing.", B, "experts",
        (("shakespeare_moe4", ""), ("shakespeare_top2", "")), ("largest_load",), "value", (1.2, math.inf),
        "the busiest expert of a layer has a fifth more than its even share; our reading",
    ),
    Claim(
        "B12", "Experts develop specialisation over training.", B, "experts",
        (("shakespeare_moe4", "shakespeare_moe4_frozen"),), ("gain",), "difference", ABOVE,
        "what the character tells of its expert grows more than it does with a frozen router, whose inputs change too",
    ),
    Claim(
        "B13", "Capacity limits bring diverse specialisation, beyond the character.", B, "experts",
        (("shakespeare_top2_cap05", "shakespeare_top2"),), ("beyond_character",), "difference", ABOVE,
    ),
    Claim(
        "C1", "A frozen random router is about as good as a learned one.", C, "C",
        (("shakespeare_moe4_frozen", "shakespeare_moe4"),), ("clean", "paper"), "difference", (-0.02, 0.02),
        "twice the larger of C's two differences, 0.0098 nats per token; a reading, for our tokens are characters",
    ),
    Claim(
        "C2", "A router drawn anew each step is worse than a learned one.", C, "C",
        (("shakespeare_moe4_random", "shakespeare_moe4"),), ("clean", "paper"), "difference", ABOVE,
    ),
    Claim(
        "C3", "Routed by token, experts specialise by syntax and not by topic.", C, "experts",
        (("shakespeare_moe4", ""),), ("syntax_over_topic", "syntax_above_frozen"), "value", ABOVE,
        "given the character, its place in the word or line tells more of the expert than speaker, play or passage, "
        "and, by the second measure, more than of a random router's",
    ),
    Claim(
        "C4", "Routed by sequence, experts specialise by topic more than routed by token.", C, "experts",
        (("shakespeare_moe4_sequence", "shakespeare_moe4"),), ("topic_of_rest", "topic", "topic_above_frozen"),
        "difference", ABOVE, "speaker, play or passage tell a larger share of what the character leaves open",
    ),
    Claim(
        "C5", "A frozen router specialises as much as a learned one.", C, "experts",
        (("shakespeare_moe4_frozen", "shakespeare_moe4"),), ("about_character",), "difference", (-0.1, 0.1),
        "a tenth of H(expert); our reading of “learned routing may not be essential”",
    ),
    *_claims_of_notes("text8", (1, 2, 3), ("paper",)),
    Claim(
        "D4", "Without a balancing loss, routing collapses.", D, "experts",
        (("shakespeare_moe4_aux0", ""),), ("lowest_utilisation",), "value", (-math.inf, records.COLLAPSED_BELOW),
        "a layer uses less than a quarter of what it could, (exp H − k) / (E − k)",
    ),
    Claim(
        "D5", "Too strong a balancing loss makes routing essentially random.", D, "experts",
        (("shakespeare_moe4_aux01", ""),), ("above_frozen",), "value", (-math.inf, 0.02),
        "at ten times the usual weight, the character tells no more of its expert than of a random router's, by 0.02",
    ),
    Claim(
        "D6", "Experts specialise along frequency.", D, "experts",
        (("shakespeare_moe4", ""), ("shakespeare_moe8", "")), ("frequency_above_frozen",), "value", ABOVE,
        "of what the character tells, the frequency band tells a larger part than it does of a random router's",
    ),
    Claim(
        "D7", "Specialisation is there within a few hundred steps and stays.", D, "experts",
        (("shakespeare_moe4", ""), ("shakespeare_moe8", "")), ("early_agreement",), "value", (0.8, math.inf),
        "after 15% of the updates four fifths of the characters have their final expert",
    ),
    *_claims_of_notes("text8_head", (8, 9, 10), ("paper", "cpu")),
    Claim(
        "E1", "At equal active FLOPs, 4 experts beat the dense model.", OURS, "equal",
        (("shakespeare_moe4", "shakespeare_dense"),), ("clean", "paper"), "difference", BELOW,
    ),
    Claim(
        "E2", "At equal total parameters, the dense model beats 4 experts.", OURS, "equal",
        (("shakespeare_dense_wide", "shakespeare_moe4"),), ("clean", "paper"), "difference", BELOW,
    ),
    Claim(
        "E3", "4 experts beat a dense model that makes 1.3 times as many steps.", OURS, "equal",
        (("shakespeare_moe4", "shakespeare_dense_long"),), ("clean", "paper"), "difference", BELOW,
    ),
    Claim(
        "E4", "At weight 0.01, the auxiliary loss, if it is counted in, raises the validation loss of a 6-layer model "
        "by half of A's gap or more.",
        OURS, "A", (("shakespeare_moe4", ""),), ("aux_per_layer",), "value", (0.035 / 6, math.inf),
        "half of 1.53 − 1.46, over 6 layers; from fewer layers that is an extrapolation",
    ),
    Claim(
        "E5", "At weight 0.1, if it is counted in, it raises it by five times A's gap or more.",
        OURS, "A", (("shakespeare_moe4_aux01", ""),), ("aux_per_layer",), "value", (0.35 / 6, math.inf),
        "five times 1.53 − 1.46, over 6 layers",
    ),
    Claim(
        "E6", "The characters of one expert agree more on its weights than all characters do on a dense MLP's.",
        OURS, "experts", (("shakespeare_moe4", "shakespeare_dense"),), ("token_cosine",), "difference", ABOVE,
        "the mean cosine of two characters' gradients, of different sequences",
    ),
    Claim(
        "E7", "4 experts filled by a fixed table of characters end at a lower loss than with a learned router.",
        OURS, "router", (("shakespeare_hash4", "shakespeare_moe4"),), ("clean", "paper"), "difference", BELOW,
        "noticed at CPU size with seeds 1337 to 1339, which also decide it there, before it was written down",
    ),
    Claim(
        "E8", "… and lower than with routers that have the table's gate of 1, its lack of a balancing loss, or both.",
        OURS, "router",
        (
            ("shakespeare_hash4", "shakespeare_moe4_aux0"),
            ("shakespeare_hash4", "shakespeare_moe4_straight_through"),
            ("shakespeare_hash4", "shakespeare_moe4_straight_through_aux0"),
        ),
        ("clean", "paper"), "difference", BELOW,
        "the pairs with a gate of 1 were written down before their runs, the other after its first three seeds",
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# From records to cells


class Comparison(NamedTuple):
    """One table at one scale on one kind of machine: what may be set side by side."""

    table: Table
    scale: str
    machine: str  # records.machine_of; "" where nothing was run
    cells: dict[str, list[dict]]  # row name -> its records by seed
    apart: dict[str, list[tuple[dict, str]]]  # row name -> (record, why it is shown and never averaged)

    def values(self, row: str, measure: str) -> dict[int, float]:
        """seed -> value, of the records that have one and whose times count if it is a time."""
        entry, values = MEASURES[measure], {}
        for record in self.cells[row]:
            value = entry.read(record)
            if value is not None and (not entry.timed or entry.is_exclusive(record)):
                values[record["config"]["seed"]] = value
        return values


def in_cells(table: Table, found: Iterable[dict], analysed: Iterable[dict]) -> Iterable[dict]:
    """What can fill this table: the records or the analyses."""
    return {"records": found, "analyses": analysed}[table.of]


def gather(table: Table, found: Iterable[dict], scale: str) -> list[Comparison]:
    """One Comparison a kind of machine, the one with most records first; a single empty one where there are none."""
    row_of = {row.config_at(scale).hash(): row.name for row in table.rows_at(scale)}
    machines: dict[str, list[dict]] = {}
    for record in found:
        if hash_of(record) in row_of:
            machines.setdefault(records.machine_of(record), []).append(record)
    comparisons = []
    for machine, here in sorted(machines.items(), key=lambda item: (-len(item[1]), item[0])) or [("", [])]:
        cells: dict[str, list[dict]] = {row.name: [] for row in table.rows_at(scale)}
        apart: dict[str, list[tuple[dict, str]]] = {row.name: [] for row in table.rows_at(scale)}
        text_of = {name: usual_text(here, hash) for hash, name in row_of.items()}
        for record in sorted(here, key=lambda record: record["config"]["seed"]):
            name = row_of[hash_of(record)]
            if not records.is_clean(record):
                apart[name].append((record, "the code had uncommitted changes"))
            elif record["dataset"]["sha256"] != text_of[name]:
                apart[name].append((record, f"another text ({record['dataset']['name']})"))
            else:
                cells[name].append(record)
        comparisons.append(Comparison(table, scale, machine, cells, apart))
    return comparisons


def hash_of(record: dict) -> str:
    return record["run_id"].rpartition("-s")[0]


def usual_text(found, hash):
    """The SHA-256 of the text that most of a row's records were trained on; of the published one in doubt."""
    counts: dict[str, tuple[int, bool, str]] = {}
    for record in found:
        if hash_of(record) == hash and records.is_clean(record):
            data = record["dataset"]
            number = counts.get(data["sha256"], (0, False, ""))[0] + 1
            counts[data["sha256"]] = (number, data["canonical"], data["sha256"])
    return max(counts.values(), default=(0, False, ""))[2]
