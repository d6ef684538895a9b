"""The record that analyze.py writes of a run: its schema, how it is checked and read, and the numbers for tables.

    analysis = read("out/shakespeare_moe4-cpu-s1337/analysis.json")    # or RecordError
    analyses, left_out = read_all("results")                           # results/analysis/ROW-sSEED.json

An analysis names its run, machine and code as a record of train.py does, so that tables find its row. Losses, costs and
informations are in nats. A share is a fraction of H(expert), the entropy of the layer's load. Needs no torch.
"""

import functools
import itertools
import json
import math
from collections import Counter
from pathlib import Path

from analysis.annotation import CONTEXT, SYNTAX, TOPIC
from run import records
from support.schema import COMMIT, COUNT, FLAG, LINE, LOSS_NUMBER, NUMBER, OBJECT, SHARE, SIGNED, TEXT

FORMAT = "charmoe analysis 1"
WAY_OUT = "run analyze.py on the run again"

LAYER = {
    "block": COUNT,
    "n_expert": COUNT,
    "k": COUNT,  # the most experts that a character goes to
    "load": OBJECT,  # balance.summarize in detail, and "effective": the effective number of experts
    "tokens_per_batch": {  # for each expert, in batches drawn as for training
        "batches": COUNT,
        "characters": COUNT,
        "mean": [NUMBER],
        "sd": [NUMBER],
        "none": SHARE,  # of all pairs of an expert and a batch, those without a token
    },
    "counts": [[COUNT]],  # for each symbol and expert: how often it is the router's first choice
    "entropy": NUMBER,  # H(expert)
    "entropy_given_character": NUMBER,
    "about": OBJECT,  # annotation -> information.Measured: I(annotation; expert)
    "about_given_character": OBJECT,  # annotation -> information.Measured: I(annotation; expert | character)
    # annotation -> {"mean", "sd", "draws"} of the share beyond chance, for random routers on the same inputs
    "frozen": {"about": OBJECT, "about_given_character": OBJECT},
    "hash": OBJECT,  # the same for balanced hash routing
    "by_class": OBJECT,  # class -> {"characters", "entropy", "load"}
}
MEASURED = {  # information.Measured
    **dict.fromkeys(("nats", "share", "chance_mean"), SIGNED),
    "chance_sd": NUMBER,
    "values": COUNT,
    "draws": COUNT,
}
PATHS = {  # a character's path is the router's first choice in every MoE layer
    "used": COUNT,  # distinct paths
    "entropy": NUMBER,  # H(path)
    "entropy_of_character": NUMBER,
    "entropy_given_character": NUMBER,  # H(path | character)
    "about_character": MEASURED,  # I(character; path)
    "between_layers": [{"blocks": [COUNT], **MEASURED}],  # I(expert; expert), for each pair of MoE layers
    "frozen": OBJECT,  # name in OF_PATHS -> {"mean", "sd", "draws"}, for random routers on the same inputs
}
STABILITY = {
    "steps": [COUNT],
    "layers": [
        {
            "agreement": [SHARE],  # with the weights that are analysed
            "chance": [SHARE],  # agreement by chance of routers with these two loads
            "churn": [(NUMBER, None)],  # characters that changed their expert since the last snapshot, per update
            "character": [SIGNED],  # share of H(expert) that the character tells
            "frequency band": [SIGNED],
        }
    ],
}
SCHEMA = {
    "format": TEXT,
    "run_id": TEXT,
    "title": TEXT,
    "config": OBJECT,
    "dataset": records.SCHEMA["dataset"],
    "leaky": FLAG,
    "straight?": FLAG,  # the run: see records.is_straight; only of ckpt.pt
    "git": {"commit": (COMMIT, None), "dirty": (FLAG, None)},  # of the code that analysed
    "machine": records.SCHEMA["machine"],
    "weights": {"checkpoint": LINE, "step": COUNT},
    "text": {"characters": COUNT, "whole": FLAG},  # read from the start of the validation split
    "asked": {"characters": COUNT, "pass_characters": COUNT, "gradient_batches": COUNT, "seed": COUNT},
    "passes": COUNT,  # characters for ablation and stability, which read them many times
    "nats": LOSS_NUMBER,
    "by_class": OBJECT,  # class -> {"characters", "nats"}
    "symbols": [LINE],
    "layers": [LAYER],
    "paths?": (PATHS, None),  # null without MoE layers; missing in older analyses
    "ablation": (OBJECT, None),  # ablation.ablations
    "router_gradients": [(OBJECT, None)],  # gradients.router_gradients, for each MoE layer
    "conflicts": [OBJECT],  # gradients.conflicts, for each block
    "evolution": ({"steps": [COUNT], "loads": [[[SHARE]]]}, None),  # from metrics.jsonl: step, MoE layer, expert
    "collapsed": [{"block": COUNT, "step": COUNT, "until": (COUNT, None)}],  # from one evaluation to another
    "stability": (STABILITY, None),  # where the run kept snapshots
    "sample": ({"text": TEXT, "experts": [[(COUNT, None)]]}, None),  # each character's expert, for each MoE layer
    "seconds": NUMBER,
}


# ---------------------------------------------------------------------------------------------------------------------
# Checking and reading


def problems(analysis) -> list[str]:
    """Why this is no valid analysis, one line for each reason; [] for a valid one."""
    wrong = records.kind_problems(analysis, FORMAT, SCHEMA)
    if wrong:
        return wrong
    config, wrong = records.config_in(analysis["config"], "config")
    if wrong:
        return wrong
    blocks = [layer["block"] for layer in analysis["layers"]]
    if analysis["run_id"] != config.run_id:
        wrong.append(f"run_id is {analysis['run_id']!r}, but its config's is {config.run_id}")
    if blocks != list(config.moe_layers):
        wrong.append(f"layers are of blocks {blocks}; expected {list(config.moe_layers)}")
    paths = analysis.get("paths")
    pairs = [pair["blocks"] for pair in paths["between_layers"]] if paths else []
    if "paths" in analysis and (
        bool(paths) != bool(blocks) or pairs != [*map(list, itertools.combinations(blocks, 2))]
    ):
        wrong.append(f"paths are null, or of the pairs of blocks {pairs}; expected every pair of {blocks}")
    return wrong


def read(path, name=None) -> dict:
    return records.read(path, name, problems, WAY_OUT)


def read_all(folder) -> tuple[list[dict], list[str]]:
    """The analyses in folder/analysis/*.json by name, and a line for each one that is left out.

    Left out are those that `read` refuses, that are not named …-s<seed>.json, a second one of a run, those of
    uncommitted code or of other weights than the last, and those with other settings than most, whose numbers do not
    compare.
    """
    folder, left_out, found = Path(folder), [], {}
    paths = sorted((folder / records.ANALYSIS).glob("*.json"))
    for path, name, analysis in records.read_each(paths, folder.parent, read, left_out):
        ending = f"-s{analysis['config']['seed']}.json"
        if not path.name.endswith(ending):
            left_out.append(f"{name}: expected a name that ends in {ending}, for that is its run's seed; rename it")
            continue
        key = analysis["run_id"], records.machine_of(analysis)
        weights, last = analysis["weights"], analysis["config"]["max_iters"]
        if not records.is_clean(analysis):
            left_out.append(f"{name}: by code with uncommitted changes; commit them, and {WAY_OUT}")
        elif weights != {"checkpoint": "ckpt.pt", "step": last}:
            found_weights = f"{weights['checkpoint']}, step {weights['step']:,}"
            left_out.append(f"{name}: of {found_weights}; tables are of the last weights")
        elif key in found:
            left_out.append(f"{name}: of the same run as {found[key][0]}, which counts; delete one")
        else:
            found[key] = name, analysis
    count = Counter(item for _, analysis in found.values() for item in asked_of(analysis).items())
    usual = dict(sorted(count, key=lambda item: (count[item], item)))  # the last value of a setting stays
    kept = []
    for name, analysis in found.values():
        if asked_of(analysis).items() <= usual.items():
            kept.append(analysis)
        else:
            left_out.append(f"{name}: asked for with {analysis['asked']}, most with {usual}; {WAY_OUT}")
    return kept, left_out


def asked_of(analysis) -> dict:
    """The settings that its numbers depend on: no batches mean that there are no gradients."""
    return {name: value for name, value in analysis["asked"].items() if (name, value) != ("gradient_batches", 0)}


def collapse_text(found) -> str:
    """A sentence on an entry of "collapsed"."""
    end = "and was at the end" if found["until"] is None else f"and no longer at step {found['until']:,}"
    return f"The router of block {found['block']} had collapsed at step {found['step']:,}, {end}."


def text_of(analysis) -> str:
    """The text of its file: one line for each field, numbers with 6 significant digits."""
    lines = (f"{json.dumps(name)}:{json.dumps(rounded(value), allow_nan=False)}" for name, value in analysis.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Numbers for tables: analysis -> number (the mean over MoE layers), or None where it has none.


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def over_layers(read_layer):
    """A function of an analysis: the mean of read_layer(layer) over MoE layers, without those that give None."""
    return lambda analysis: mean(map(read_layer, analysis["layers"]))


def net_nats(found):
    """The part of an information (a Measured) that is beyond chance."""
    return found["nats"] - found["chance_mean"]


def net(found, layer):
    """net_nats as a share of the layer's H(expert)."""
    return net_nats(found) / layer["entropy"] if layer["entropy"] else None


def utilisation_of(layer):
    return records.utilisation(layer["load"]["load"], layer["k"])


utilisation = over_layers(utilisation_of)


@over_layers
def largest_load(layer):
    """E times the largest expert's share of the load: 1 in perfect balance."""
    return layer["n_expert"] * max(layer["load"]["load"])


def lowest_utilisation(analysis):
    """The utilisation of the layer that uses the least of its experts."""
    return min((used for layer in analysis["layers"] if (used := utilisation_of(layer)) is not None), default=None)


@functools.cache
def about(name):
    """The share of H(expert) that an annotation tells, beyond chance."""
    return over_layers(lambda layer: net(layer["about"][name], layer) if name in layer["about"] else None)


def most_given_character(layer, names):
    """The largest share that any of these annotations tells beyond the character and chance."""
    shares = [net(layer["about_given_character"][name], layer) for name in names if name in layer["about"]]
    return max((share for share in shares if share is not None), default=None)


@functools.cache
def about_given_character(*names):
    return over_layers(lambda layer: most_given_character(layer, names))


syntax_given_character = about_given_character(*SYNTAX[1:])
topic_given_character = about_given_character(*TOPIC)
context_given_character = about_given_character("previous two")


def syntax_over_topic(analysis):
    syntax, topic = syntax_given_character(analysis), topic_given_character(analysis)
    return None if syntax is None or topic is None else syntax - topic


@over_layers
def unexplained(layer):
    """The share of H(expert) that the character and the two before it leave open."""
    if not layer["entropy"]:
        return None
    return layer["entropy_given_character"] / layer["entropy"] - most_given_character(layer, CONTEXT[1:2])


@over_layers
def character_above_frozen(layer):
    """The share that the character tells, less the same for a random router on the same inputs."""
    ours = net(layer["about"]["character"], layer)
    return None if ours is None else ours - layer["frozen"]["about"]["character"]["mean"]


@over_layers
def frequency_above_frozen(layer):
    """How much of what the character tells its frequency band tells, less the same for a random router."""
    character, frozen = net(layer["about"]["character"], layer), layer["frozen"]["about"]
    if not character or character <= 0 or frozen["character"]["mean"] <= 0:
        return None
    ours = net(layer["about"]["frequency band"], layer) / character
    return ours - frozen["frequency band"]["mean"] / frozen["character"]["mean"]


@over_layers
def topic_of_rest(layer):
    """What the topic tells beyond the character, as a share of what the character leaves open."""
    topic = most_given_character(layer, TOPIC)
    rest = layer["entropy_given_character"] / layer["entropy"] if layer["entropy"] else 0
    return topic / rest if topic is not None and rest > 0.01 else None


def most_of_frozen(layer, names):
    """most_given_character for a random router on the same inputs."""
    found = layer["frozen"]["about_given_character"]
    return max((found[name]["mean"] for name in names if name in found), default=None)


def given_character_above_frozen(*names):
    """What these annotations tell beyond the character, less the same for a random router."""

    @over_layers
    def of_layer(layer):
        ours, theirs = most_given_character(layer, names), most_of_frozen(layer, names)
        return None if ours is None or theirs is None else ours - theirs

    return of_layer


syntax_above_frozen = given_character_above_frozen(*SYNTAX[1:])
topic_above_frozen = given_character_above_frozen(*TOPIC)


def character_in_path(paths):
    """The share of H(character) that the path tells, beyond chance."""
    total = paths["entropy_of_character"]
    return net_nats(paths["about_character"]) / total if total else None


OF_PATHS = {  # paths of an analysis -> number, or None; of random routers too
    "used": lambda paths: paths["used"],
    "effective": lambda paths: math.exp(paths["entropy"]),
    "given_character": lambda paths: paths["entropy_given_character"],
    "character": character_in_path,
    "between_layers": lambda paths: mean(map(net_nats, paths["between_layers"])),
}


def of_paths(name):
    """A function of an analysis: a number in OF_PATHS; None for a dense model, and in analyses made before paths."""
    return lambda analysis: OF_PATHS[name](analysis["paths"]) if analysis.get("paths") else None


def frozen_paths(name):
    """of_paths(name) for random routers on the same inputs: the mean over draws."""

    def read_analysis(analysis):
        paths = analysis.get("paths")
        return paths["frozen"][name]["mean"] if paths and name in paths["frozen"] else None

    return read_analysis


def path_above_frozen(analysis):
    """The share of H(character) that the path tells, less the same for random routers on the same inputs."""
    ours, theirs = of_paths("character")(analysis), frozen_paths("character")(analysis)
    return None if ours is None or theirs is None else ours - theirs


def of_stability(name, step=None):
    """A function of an analysis: the mean over layers of a number in STABILITY, at a step or (None) at the end."""

    def read_analysis(analysis):
        found = analysis["stability"]
        if not found or (step is not None and step not in found["steps"]):
            return None
        place = -1 if step is None else found["steps"].index(step)
        return mean(layer[name][place] for layer in found["layers"])

    return read_analysis


def gain_of_specialisation(analysis):
    """The share that the character tells at the end of training, less at the first snapshot."""
    first, last = (of_stability("character", step)(analysis) for step in (0, None))
    return None if first is None or last is None else last - first


def early_agreement(analysis):
    """The share of characters with their final expert at the early step: paper D's "first few hundred steps"."""
    step = early_step(analysis)
    return None if step is None else of_stability("agreement", step)(analysis)


def early_step(analysis):
    """The step of the first snapshot at or after 15% of the updates; None without one."""
    steps = (analysis["stability"] or {"steps": []})["steps"]
    return next((step for step in steps if step >= 0.15 * analysis["config"]["max_iters"]), None)


def router_cosine(analysis):
    """Cosine of the gradients of cross-entropy and the balancing loss at the router's weight."""
    return mean(layer["cosine"] for layer in analysis["router_gradients"] if layer)


def token_cosine(analysis):
    """Mean cosine of the gradients of two characters of different sequences at weights that both use."""
    return mean(block["mean"]["cosine_between_sequences"] for block in analysis["conflicts"] if block["mean"])


def ablated(name):
    """A function of an analysis: the cost in nats of an intervention in all layers at once; name: of the ablation."""

    def read_analysis(analysis):
        cost = analysis["ablation"] and analysis["ablation"][name]
        return cost["nats"] if cost else None

    return read_analysis
