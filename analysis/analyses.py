"""What analyze.py writes of a run: what it holds, how it is checked and read, and the numbers that tables take of it.

    analysis = read("out/shakespeare_moe4-cpu-s1337/analysis.json")    # or RecordError
    analyses, left_out = read_all("results")                           # results/analysis/ROW-sSEED.json

An analysis names its run, its machine and its code like a record does, so that experiments.gather finds its cell.
Losses, costs and informations are nats; a share is one of H(expert), the entropy of the layer's own load. Nothing here
needs torch.
"""

import functools
import json
from collections import Counter
from pathlib import Path

from run import records
from support import schema
from support.schema import COMMIT, COUNT, FLAG, LINE, LOSS_NUMBER, NUMBER, OBJECT, SHARE, SIGNED, TEXT

FORMAT = "charmoe analysis 1"
WAY_OUT = "run analyze.py on the run again"

# Annotations, see annotation.py: what a character is in its word and line, what stands before it, what the text is
# about there.
SYNTAX = ("class", "place in the word", "place in the line")
CONTEXT = ("previous character", "previous two", "previous three")
TOPIC = ("speaker", "play", "article", "passage")

MEASURED = {  # of information.measured
    "nats": SIGNED,
    "share": SIGNED,
    "chance_mean": SIGNED,
    "chance_sd": NUMBER,
    "values": COUNT,
    "draws": COUNT,
}
DRAWN = {"mean": SIGNED, "sd": NUMBER, "draws": COUNT}  # a share beyond chance, over routers that were drawn
LAYER = {
    "block": COUNT,
    "n_expert": COUNT,
    "k": COUNT,  # experts that a character goes to, at most
    "load": OBJECT,  # of balance.summarize in detail, and what load_of adds
    "tokens_per_batch": {  # per expert, in batches as training draws them
        "batches": COUNT,
        "characters": COUNT,
        "mean": [NUMBER],
        "sd": [NUMBER],
        "none": SHARE,  # of all pairs of expert and batch, those without a character
    },
    "counts": [[COUNT]],  # per symbol, per expert: how often it is the router's first choice
    "entropy": NUMBER,  # H(expert)
    "entropy_given_character": NUMBER,
    "about": OBJECT,  # annotation -> MEASURED: I(annotation; expert)
    "about_given_character": OBJECT,  # annotation -> MEASURED: I(annotation; expert | character)
    "frozen": {"about": OBJECT, "about_given_character": OBJECT},  # annotation -> DRAWN, of random routers in its place
    "hash": OBJECT,  # annotation -> DRAWN, of balanced tables of the character
    "by_class": OBJECT,  # class -> {"characters", "entropy", "load"}
}
STABILITY = {
    "steps": [COUNT],
    "layers": [
        {
            "agreement": [SHARE],  # with the weights that are analysed
            "chance": [SHARE],  # that routers of these two loads agree by chance
            "churn": [
                (NUMBER, None)
            ],  # share of characters that changed their expert since the step before, per update
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
    "git": {"commit": (COMMIT, None), "dirty": (FLAG, None)},  # of the code that analysed
    "machine": records.SCHEMA["machine"],
    "weights": {"checkpoint": LINE, "step": COUNT},
    "text": {"characters": COUNT, "whole": FLAG},  # of the validation split, from its start
    "asked": {"characters": COUNT, "pass_characters": COUNT, "gradient_batches": COUNT, "seed": COUNT},
    "passes": COUNT,  # characters of it that ablation and stability are of, which read it many times
    "nats": LOSS_NUMBER,
    "by_class": OBJECT,  # class -> {"characters", "nats"}
    "symbols": [LINE],
    "layers": [LAYER],
    "ablation": (OBJECT, None),  # of ablation.ablations
    "router_gradients": [(OBJECT, None)],  # of gradients.router_gradients, per MoE layer
    "conflicts": [OBJECT],  # of gradients.conflicts, per block
    "evolution": ({"steps": [COUNT], "loads": [[[SHARE]]]}, None),  # of metrics.jsonl: steps × MoE layers × experts
    "collapsed": [{"block": COUNT, "step": COUNT, "until": (COUNT, None)}],  # from one evaluation to another
    "stability": (STABILITY, None),  # where the run kept snapshots
    "sample": ({"text": TEXT, "experts": [[(COUNT, None)]]}, None),  # per MoE layer, each character's expert
    "seconds": NUMBER,
}


# ---------------------------------------------------------------------------------------------------------------------
# Checking and reading


def problems(analysis) -> list[str]:
    """All that is wrong with an analysis, a line each."""
    if not isinstance(analysis, dict):
        return [f"expected {OBJECT}"]
    if analysis.get("format") != FORMAT:
        return [records.format_problem(analysis.get("format"), FORMAT)]
    wrong = list(schema.mismatches(analysis, SCHEMA))
    if wrong:
        return wrong
    config, wrong = records.config_in(analysis["config"], "config")
    if wrong:
        return wrong
    wrong = [message for holds, message in rules(analysis, config) if not holds]
    return wrong or list(unread(analysis))


def unread(analysis):
    """What of the tables' numbers an analysis lacks the parts for."""
    for name, read_number in NUMBERS.items():
        try:
            read_number(analysis)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            yield f"{name} cannot be read of it: {type(error).__name__} {error}"


def rules(analysis, config):
    """(whether it holds, what to say if not)"""
    yield analysis["run_id"] == config.run_id, f"run_id is {analysis['run_id']!r}, but its config's is {config.run_id}"
    blocks = [layer["block"] for layer in analysis["layers"]]
    yield blocks == list(config.moe_layers), f"layers are of blocks {blocks}; expected {list(config.moe_layers)}"
    V, n = len(analysis["symbols"]), analysis["text"]["characters"]
    for layer in analysis["layers"]:
        where = f"of block {layer['block']}"
        E = layer["n_expert"]
        yield (
            len(layer["counts"]) == V and all(len(row) == E for row in layer["counts"]),
            f"counts {where}: their shape",
        )
        total = sum(map(sum, layer["counts"]))
        yield total == n, f"counts {where} add up to {total}; expected {n}, the characters of the text"
        for name, found in measured_in(layer):
            wrong = [*schema.mismatches(found, MEASURED, f"{name} {where}")]
            yield not wrong, wrong and wrong[0]
    for name in ("router_gradients", *(["ablation"] if analysis["ablation"] else [])):
        length = len(analysis[name]["removed"] if name == "ablation" else analysis[name])
        yield length == len(blocks), f"{name} is of {length} layers; expected {len(blocks)}"
    if analysis["stability"]:
        steps, layers = analysis["stability"]["steps"], analysis["stability"]["layers"]
        yield len(layers) == len(blocks), f"stability is of {len(layers)} layers; expected {len(blocks)}"
        yield all(len(of) == len(steps) for layer in layers for of in layer.values()), "stability: its lengths differ"


def measured_in(layer):
    """(name, MEASURED) of all informations of a layer."""
    for kind in ("about", "about_given_character"):
        for name, found in layer[kind].items():
            yield f"{kind}.{name}", found


def read(path, name=None) -> dict:
    return records.read(path, name, problems, WAY_OUT)


def read_all(folder) -> tuple[list[dict], list[str]]:
    """The analyses in folder/analysis/*.json, by name; and what is left out of them, a line each: what `read` refuses,
    what is not named …-s<seed>.json, a second one of a run, one by code that no commit has, one of other weights than
    the last, and one that was asked for otherwise than most are, for their numbers do not compare."""
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
    asked = Counter(asked_of(analysis) for _, analysis in found.values())
    usual = max(asked, key=lambda one: (asked[one], one), default=None)
    for name, analysis in found.values():
        if asked_of(analysis) != usual:
            left_out.append(f"{name}: asked for with {dict(asked_of(analysis))}, most with {dict(usual)}; {WAY_OUT}")
    return [analysis for _, analysis in found.values() if asked_of(analysis) == usual], left_out


def asked_of(analysis):
    return tuple(sorted(analysis["asked"].items()))


def collapse_text(found) -> str:
    """found: an entry of "collapsed"."""
    end = "and was at the end" if found["until"] is None else f"and no longer at step {found['until']:,}"
    return f"The router of block {found['block']} had collapsed at step {found['step']:,}, {end}."


def text_of(analysis) -> str:
    """As the file holds it: a line a field, numbers to 6 digits, which is more than any of them is worth."""
    lines = (f"{json.dumps(name)}:{json.dumps(rounded(value), allow_nan=False)}" for name, value in analysis.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that tables take: analysis -> number, or None where it has none. Of several layers the mean.


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def over_layers(read_layer):
    """read_layer: a layer of the analysis -> number or None"""
    return lambda analysis: mean(map(read_layer, analysis["layers"]))


def net(found, layer):
    """What a MEASURED says beyond chance, as a share of the layer's H(expert)."""
    return (found["nats"] - found["chance_mean"]) / layer["entropy"] if layer["entropy"] else None


@over_layers
def utilisation(layer):
    return records.utilisation(layer["load"]["load"], layer["k"])


@over_layers
def largest_load(layer):
    """E times the largest share: 1 where all have as much."""
    return layer["n_expert"] * max(layer["load"]["load"])


@over_layers
def effective_experts(layer):
    return layer["load"]["effective"]


def lowest_utilisation(analysis):
    """Of the layer that uses least of its experts."""
    used = [records.utilisation(layer["load"]["load"], layer["k"]) for layer in analysis["layers"]]
    return min((value for value in used if value is not None), default=None)


@functools.cache
def about(name):
    """The share of H(expert) that an annotation tells."""
    return over_layers(lambda layer: net(layer["about"][name], layer) if name in layer["about"] else None)


def most_given_character(layer, names):
    """The same of the one among these annotations that tells most, beyond the character."""
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
    """What the character and the two before it leave open of the expert, as a share of H(expert)."""
    if not layer["entropy"]:
        return None
    return layer["entropy_given_character"] / layer["entropy"] - most_given_character(layer, CONTEXT[1:2])


@over_layers
def character_above_frozen(layer):
    """What the character tells of the expert, less what it tells of a random router's on the same inputs."""
    ours = net(layer["about"]["character"], layer)
    return None if ours is None else ours - layer["frozen"]["about"]["character"]["mean"]


@over_layers
def frequency_above_frozen(layer):
    """What the frequency band tells of the expert, as a part of what the character tells; less the same of a random
    router's on the same inputs."""
    character, frozen = net(layer["about"]["character"], layer), layer["frozen"]["about"]
    if not character or character <= 0 or frozen["character"]["mean"] <= 0:
        return None
    ours = net(layer["about"]["frequency band"], layer) / character
    return ours - frozen["frequency band"]["mean"] / frozen["character"]["mean"]


@over_layers
def topic_of_rest(layer):
    """What the topic tells beyond the character, as a share of what that leaves open: a router of which the character
    tells little has more to be told of."""
    topic = most_given_character(layer, TOPIC)
    rest = layer["entropy_given_character"] / layer["entropy"] if layer["entropy"] else 0
    return topic / rest if topic is not None and rest > 0.01 else None


def most_of_frozen(layer, names):
    """The same of a random router's expert on the same inputs."""
    found = layer["frozen"]["about_given_character"]
    return max((found[name]["mean"] for name in names if name in found), default=None)


def given_character_above_frozen(*names):
    """What these annotations tell beyond the character, less what they tell of a random router's expert."""

    @over_layers
    def of_layer(layer):
        ours, theirs = most_given_character(layer, names), most_of_frozen(layer, names)
        return None if ours is None or theirs is None else ours - theirs

    return of_layer


syntax_above_frozen = given_character_above_frozen(*SYNTAX[1:])
topic_above_frozen = given_character_above_frozen(*TOPIC)


def of_stability(name, step=None):
    """Of the mean over layers at a step, or at the end; name: of STABILITY."""

    def read_analysis(analysis):
        found = analysis["stability"]
        if not found or (step is not None and step not in found["steps"]):
            return None
        place = -1 if step is None else found["steps"].index(step)
        return mean(layer[name][place] for layer in found["layers"])

    return read_analysis


def gain_of_specialisation(analysis):
    """The share that the character tells, at the end less at the first step."""
    first, last = (of_stability("character", step)(analysis) for step in (0, None))
    return None if first is None or last is None else last - first


def early_agreement(analysis):
    """Characters that have their final expert already at the early step: D's "first few hundred steps"."""
    step = early_step(analysis)
    return None if step is None else of_stability("agreement", step)(analysis)


def early_step(analysis):
    """The step of the first snapshot after 15% of the updates or more; None without one."""
    steps = (analysis["stability"] or {"steps": []})["steps"]
    return next((step for step in steps if step >= 0.15 * analysis["config"]["max_iters"]), None)


def router_cosine(analysis):
    """Between the gradients of cross-entropy and of the balancing loss at the router."""
    return mean(layer["cosine"] for layer in analysis["router_gradients"] if layer)


def token_cosine(analysis):
    """Between the gradients of two characters of different sequences at the weights that both use."""
    return mean(block["mean"]["cosine_between_sequences"] for block in analysis["conflicts"] if block["mean"])


def ablated(name):
    """What it costs to do this to all layers at once, nats."""

    def read_analysis(analysis):
        cost = analysis["ablation"] and analysis["ablation"][name]
        return cost["nats"] if cost else None

    return read_analysis


NUMBERS = {  # all of them, by name
    "character": about("character"),
    "utilisation": utilisation,
    "lowest utilisation": lowest_utilisation,
    "largest load": largest_load,
    "effective experts": effective_experts,
    "syntax": syntax_given_character,
    "topic": topic_given_character,
    "context": context_given_character,
    "syntax over topic": syntax_over_topic,
    "syntax above frozen": syntax_above_frozen,
    "unexplained": unexplained,
    "character above frozen": character_above_frozen,
    "frequency above frozen": frequency_above_frozen,
    "topic of rest": topic_of_rest,
    "topic above frozen": topic_above_frozen,
    "gain": gain_of_specialisation,
    "early agreement": early_agreement,
    "router cosine": router_cosine,
    "token cosine": token_cosine,
    **{name: ablated(name) for name in ("shuffled_all", "hashed_all", "tabulated_all", "removed_all", "merged_all")},
}
