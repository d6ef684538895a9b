"""The parts of an analysis, each as plain JSON values: layers, stability, load over training, gradients, a sample.

    seen = probe.see(run.model, run.windows, run.machine)
    layers, paths = measure_routing(run, seen)

analyses.SCHEMA describes what they return; ablation.py has the largest part. Shapes: N characters of the text; E
experts; B batches.
"""

import contextlib
import itertools

import numpy as np
import torch

import balance
from analysis import analyses, gradients, information, probe
from analysis.annotation import CONTEXT, SYNTAX, TOPIC, class_of
from data.characters import CLASSES
from hashing import hash_table
from run import records
from run.checkpoint import CheckpointError
from run.evaluate import drop_rate_by_class
from run.trained import read_weights
from speed import decoding
from support import files
from support.seeds import mix_seeds

LOAD_BATCHES = 64  # in which each expert's tokens are counted
DRAWS = 5  # of every control
OF_THE_SYMBOL = ("character", "class", "frequency band")
# How an annotation's share by chance is estimated, see information.measured; others: by shuffling. Routing by the whole
# sequence keeps its expert for a window of block_size, which shuffled blocks preserve.
NULLS = {
    "speaker": information.SHIFTED,
    "article": information.SHIFTED,
    "play": information.BLOCKS,
    "passage": information.BLOCKS,
}


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def losses_by_class(run, seen):
    """{class of a character: how many there are, and the mean loss of the character that follows}"""
    labels_N, names = run.classes
    return {
        name: {"characters": int((labels_N == i).sum()), "nats": float(seen.nats_N[labels_N == i].mean())}
        for i, name in enumerate(names)
        if (labels_N == i).any()
    }


def measure_routing(run, seen):
    """(measure_layers, measure_paths), beside the same random routers."""
    frozen = probe.random_routers(run.model, run.windows, run.machine, DRAWS, run.seed)
    return measure_layers(run, seen, frozen), measure_paths(run, seen, frozen)


def measure_layers(run, seen, frozen):
    """Load and specialisation of each MoE layer: analyses.LAYER. frozen: probe.random_routers."""
    model, config, layers = run.model, run.config, []
    per_batch = tokens_per_batch(run)
    for number, (block, layer) in enumerate(zip(config.moe_layers, model.moe_layers())):
        n_expert = layer.config.n_expert
        chosen_N, character_N = seen.first[number], run.annotations["character"]
        seeds = [mix_seeds(run.seed, block, draw) for draw in range(DRAWS)]
        hashed = [hash_table(run.counts_V, n_expert, seed).numpy()[run.ids_N] for seed in seeds]
        load = balance.summarize(seen.stats[number], in_detail=True)
        load |= drop_rate_by_class(seen.stats[number], run.vocabulary)
        load |= {"effective": float(information.effective_number(np.array(load["load"])))}
        layers.append(
            {
                "block": block,
                "n_expert": n_expert,
                "k": 1 if config.router_top_p else layer.config.expert_top_k or n_expert,
                "load": load,
                "tokens_per_batch": per_batch[number],
                "counts": probe.choices_by_symbol(run.ids_N, chosen_N, run.vocabulary.size, n_expert).tolist(),
                "entropy": information.entropy(chosen_N),
                "entropy_given_character": information.conditional_entropy(chosen_N, character_N),
                "about": informations(run, chosen_N),
                "about_given_character": informations(run, chosen_N, given_N=character_N),
                "frozen": {
                    "about": mean_shares(run, frozen[number]),
                    "about_given_character": mean_shares(run, frozen[number], given_N=character_N),
                },
                "hash": mean_shares(run, hashed),
                "by_class": load_by_class(run, chosen_N, n_expert),
            }
        )
    return layers


def informations(run, labels_N, given_N=None, draws=DRAWS):
    """{annotation: information.Measured as a dict}, about the expert labels_N of each character.

    Given the character, annotations of the character itself are left out, for they add nothing.
    """
    names = (*(OF_THE_SYMBOL if given_N is None else ()), *SYNTAX[1:], *CONTEXT, *TOPIC)
    found, seed, size = run.annotations, run.seed, run.config.block_size
    return {
        name: information.measured(
            labels_N, found[name], given_N, draws, seed, NULLS.get(name, information.SHUFFLED), size
        )._asdict()
        for name in names
        if name in found
    }


def mean_shares(run, routers, given_N=None):
    """{annotation: the share of H(expert) that it tells beyond chance, as mean and SD over random routers}

    routers: the expert of each character, (N,), from each router.
    """
    shares = {}
    for labels_N in routers:
        layer = {"entropy": information.entropy(labels_N)}
        for name, found in informations(run, labels_N, given_N, draws=2).items():
            shares.setdefault(name, []).append(analyses.net(found, layer) or 0.0)
    return {
        name: {"mean": float(np.mean(of)), "sd": float(np.std(of, ddof=1)), "draws": len(of)}
        for name, of in shares.items()
    }


def load_by_class(run, labels_N, n_expert):
    """{class: how many characters it has, the entropy of their experts, their load}"""
    classes_N, names = run.classes
    found = {}
    for i, name in enumerate(names):
        of_class = labels_N[classes_N == i]
        if len(of_class):
            load = np.bincount(of_class, minlength=n_expert) / len(of_class)
            entropy = information.entropy(of_class)
            found[name] = {"characters": len(of_class), "entropy": entropy, "load": load.tolist()}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Paths through the layers


def measure_paths(run, seen, frozen):
    """The paths of the characters, beside those of random routers: analyses.PATHS; None for a dense model."""
    if not seen.first:
        return None
    drawn = [paths_of(run, first, draws=2) for first in zip(*frozen)]
    values = {name: [read(paths) for paths in drawn] for name, read in analyses.OF_PATHS.items()}
    return {
        **paths_of(run, seen.first),
        "frozen": {
            name: {"mean": float(np.mean(of)), "sd": float(np.std(of, ddof=1)), "draws": len(of)}
            for name, of in values.items()
            if None not in of
        },
    }


def paths_of(run, first, draws=DRAWS):
    """analyses.PATHS without the random routers. first: for each MoE layer (N,), the router's first choice.

    A character's path is its first choice in every MoE layer, so for top-k its other choices do not count. Remaining
    bias of H(path | character) for 60 characters in a text of 111,540, measured in tests/test_paths.py: 0 to -0.02 nats
    with 256 possible paths, 0 to -0.6 with 4,096, of at most 8.3. The information of independent paths is too large by
    as much, which its chance_mean shows; the information of paths that depend on the character by less, so that it lies
    between nats - chance_mean and nats.
    """
    character_N, path_N, blocks = run.annotations["character"], information.joined(*first), run.config.moe_layers
    # Routing by segment or sequence keeps its expert for long, which blocks preserve.
    null = information.SHUFFLED if run.config.router_level == "token" else information.BLOCKS

    def about(labels_N, about_N):
        found = information.measured(labels_N, about_N, None, draws, run.seed, null, run.config.block_size)
        return found._asdict()

    return {
        "used": int(path_N.max()) + 1,
        "entropy": information.entropy(path_N),
        "entropy_of_character": information.entropy(character_N),
        "entropy_given_character": information.conditional_entropy(path_N, character_N),
        "about_character": about(path_N, character_N),
        "between_layers": [
            {"blocks": [blocks[i], blocks[j]], **about(first[i], first[j])}
            for i, j in itertools.combinations(range(len(blocks)), 2)
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Batches and gradients


@torch.no_grad()
def tokens_per_batch(run):
    """How many tokens of a training batch each expert gets, before capacity: one entry for each MoE layer."""
    config, loads = run.config, []
    for x, y in run.training_batches(LOAD_BATCHES):
        with run.machine.autocast():
            loads.append([layer.load.cpu().numpy() for layer in run.model(x, y).stats])
    size = config.batch_size * config.block_size
    return [
        {
            "batches": len(loads_BE),
            "characters": size,
            "mean": loads_BE.mean(axis=0).tolist(),
            "sd": loads_BE.std(axis=0, ddof=1).tolist(),
            "none": float((loads_BE == 0).mean()),
        }
        for loads_BE in map(np.stack, zip(*loads))
    ]


def measure_gradients(run, n_batches):
    """(gradients.router_gradients, gradients.conflicts)"""
    model = run.model
    if not n_batches:
        return [None] * len(model.moe_layers()), []
    batches = run.training_batches(n_batches)
    pulls = gradients.router_gradients(model, batches, run.machine, seed=run.seed)
    return pulls, gradients.conflicts(
        model, batches, run.machine, class_of(run.vocabulary), len(CLASSES), seed=run.seed
    )


# ---------------------------------------------------------------------------------------------------------------------
# Over training


def measure_stability(run, seen, snapshots, progress):
    """Agreement of each snapshot's routing with the analysed weights': analyses.STABILITY; None without snapshots.

    seen: see(model, run.pass_windows, machine); snapshots: [(step, path)]; progress() is called after each one.
    """
    if not snapshots:
        return None
    told = {name: run.annotations[name][: len(seen.nats_N)] for name in ("character", "frequency band")}
    layers = [{name: [] for name in ("agreement", "chance", "churn", *told)} for _ in seen.first]
    steps, before = [], None
    for step, path in snapshots:
        saved = read_weights(run.folder, path.relative_to(run.folder))
        if saved.config.run_id != run.config.run_id:
            raise CheckpointError(f"{path} belongs to another experiment than {run.checkpoint}")
        model = saved.model_on(run.machine.device)
        model.set_step(step)
        now = probe.see(model, run.pass_windows, run.machine).first
        for i, layer in enumerate(layers):
            total = information.entropy(now[i])
            layer["agreement"].append(information.agreement(now[i], seen.first[i]))
            layer["chance"].append(information.chance_agreement(now[i], seen.first[i]))
            changed = None if before is None else 1 - information.agreement(now[i], before[i])
            layer["churn"].append(None if before is None else changed / (step - steps[-1]))
            for name, labels_N in told.items():
                layer[name].append(information.information(now[i], labels_N) / total if total else 0.0)
        steps.append(step)
        before = now
        progress()
    return {"steps": steps, "layers": layers}


def read_load_history(folder, config):
    """Each evaluation's load, {"steps", "loads"}, from metrics.jsonl; None where there is none."""
    found = {}
    try:
        lines, _ = files.read_json_lines(folder / "metrics.jsonl")
    except OSError:
        return None
    for values in lines:
        with contextlib.suppress(KeyError, TypeError):
            if values["kind"] == "eval" and len(values["load"]) == len(config.moe_layers):
                found[values["step"]] = values["load"]
    return {"steps": list(found), "loads": list(found.values())} if found and config.n_expert else None


def find_collapses(history, config):
    """[{"block", "step", "until"}]: the evaluations from which, and until which, a router had collapsed.

    The evaluation before the first update is left out. until: None where the router is collapsed at the end.
    """
    found, since = [], {}
    for step, loads in zip(history["steps"], history["loads"]) if history else ():
        now = set(records.collapsed_blocks(config, loads)) if step else set()
        found += [{"block": block, "step": since.pop(block), "until": step} for block in set(since) - now]
        since |= {block: step for block in now - set(since)}
    found += [{"block": block, "step": step, "until": None} for block, step in since.items()]
    return sorted(found, key=lambda one: (one["block"], one["step"]))


# ---------------------------------------------------------------------------------------------------------------------


def write_sample(run, n_characters):
    """A text that the model writes, with each character's expert in every MoE layer; None where it cannot write."""
    model = run.model
    if not n_characters or not run.config.is_causal or not model.moe_layers():
        return None
    decoder = decoding.fastest(model, 1, run.machine, 0.8, 200)
    generator = torch.Generator().manual_seed(run.seed)
    unread, tokens, experts = [run.vocabulary.start], [], []
    for step in decoder.write(torch.tensor([unread], device=run.machine.device), n_characters + 1, [generator]):
        # the last token read; where the window moved, half of it was read again before
        experts.append([int(step.experts(layer)[0, -1]) for layer in range(len(model.moe_layers()))])
        tokens += unread
        unread = step.tokens.tolist()
    decode, text, of_text = run.vocabulary.decoder(), "", [[] for _ in model.moe_layers()]
    for token, chosen in zip(tokens, experts):
        piece = decode([token])
        text += piece
        for of_layer, expert in zip(of_text, chosen):
            of_layer += [None if expert < 0 else expert] * len(piece)
    return {"text": text, "experts": of_text}
