"""The analysis of a run that several test files read and change: plausible, valid, and made without torch.

analysed()                                          two blocks of four experts, two snapshots, all there
analysed(seed=2, n_layer=1, n_expert=8)             other keys of its config
analysed(n_expert=0)                                a dense model's
"""

import numpy as np

from analysis import analyses
from run.settings import Config

SYMBOLS = ["newline", "space", "!", *"ABcdeaio"]
COUNTS = [120, 900, 60, 70, 51, 300, 400, 800, 500, 200, 49]  # the last is too rare to be drawn
PLACES = ("place in the word", "place in the line", "previous character", "previous two", "speaker", "passage")


def analysed(seed=1, machine=None, commit="0" * 40, canonical=True, told=0.5, **changes):
    """told: the share of H(expert) that the character tells in the first layer; each later layer has 0.05 less."""
    config = Config(
        **{
            "dataset": "shakespeare_char",
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "block_size": 32,
            "batch_size": 4,
            "n_expert": 4,
            "seed": seed,
            "max_iters": 200,
            "title": "4 experts",
            **changes,
        }
    )
    layers = [layer_of(config, block, told - 0.05 * i) for i, block in enumerate(config.moe_layers)]
    steps = [0, 30, 100, 200]
    return {
        "format": analyses.FORMAT,
        "run_id": config.run_id,
        "title": config.title,
        "config": config.to_dict(),
        "dataset": {
            "name": config.dataset,
            "canonical": canonical,
            "sha256": "a" * 64,
            "unit": "character",
            "vocab_size": len(SYMBOLS),
            "splits": {"train": 100_000, "val": sum(COUNTS) + 1},
        },
        "leaky": bool(config.leaks_of_any_router),
        "git": {"commit": commit, "dirty": False},
        "machine": machine
        or {
            "device": "AMD EPYC",
            "device_type": "cpu",
            "cores": 1,
            "threads": 1,
            "torch": "2.13.0+cpu",
            "cuda": None,
            "python": "3.12.3",
            "dtype": "float32",
            "compile": False,
        },
        "weights": {"checkpoint": "ckpt.pt", "step": config.max_iters},
        "text": {"characters": sum(COUNTS), "whole": True},
        "asked": {"characters": 200_000, "pass_characters": 1000, "gradient_batches": 8, "seed": 0},
        "passes": 1000,
        "nats": 1.9,
        "by_class": {"vowel": {"characters": 1549, "nats": 2.0}, "space": {"characters": 900, "nats": 2.8}},
        "symbols": SYMBOLS,
        "layers": layers,
        "paths": paths_of([layer["block"] for layer in layers], told) if layers else None,
        "ablation": ablation_of(config, layers) if layers else None,
        "router_gradients": [pull_of(layer["block"]) for layer in layers],
        "conflicts": [conflict_of(config, block) for block in range(config.n_layer)],
        "evolution": {"steps": [0, 100, 200], "loads": [[of["load"]["load"] for of in layers]] * 3} if layers else None,
        "collapsed": [],
        "stability": {"steps": steps, "layers": [stable(i, len(steps)) for i in range(len(layers))]}
        if layers
        else None,
        "sample": {"text": "ab", "experts": [[0, None] for _ in layers]} if layers else None,
        "seconds": 1.5,
    }


def layer_of(config, block, told):
    E = config.expert_counts()[block]
    counts = [[0] * E for _ in SYMBOLS]
    for symbol, count in enumerate(COUNTS):  # nine tenths go to one expert, the rest to the next
        counts[symbol][(symbol + block) % E] += count - count // 10
        counts[symbol][(symbol + block + 1) % E] += count // 10
    load = (np.sum(counts, axis=0) / sum(COUNTS)).tolist()
    entropy = float(-sum(share * np.log(share) for share in load if share))
    k = 1 if config.router_top_p else config.expert_top_k or E
    measured = {"share": 0.0, "chance_mean": 0.0, "chance_sd": 0.001, "values": 9, "draws": 5}
    of_character = {"character": told, "class": 0.3, "frequency band": 0.1}
    beyond = {name: 0.2 - 0.03 * i for i, name in enumerate(PLACES)}
    about = {
        name: {**measured, "nats": share * entropy, "share": share}
        for name, share in {**of_character, **beyond}.items()
    }
    given = {
        name: {
            **measured,
            "nats": share * entropy + 0.01,
            "share": share + 0.01 / entropy if entropy else 0.0,
            "chance_mean": 0.01,
        }
        for name, share in beyond.items()
    }
    drawn = {name: {"mean": of["share"] / 2, "sd": 0.01, "draws": 5} for name, of in about.items()}
    return {
        "block": block,
        "n_expert": E,
        "k": k,
        "load": {"load": load, "effective": float(np.exp(entropy))},
        "tokens_per_batch": {"batches": 8, "characters": 128, "mean": [128 / E] * E, "sd": [3.0] * E, "none": 0.0},
        "counts": counts,
        "entropy": entropy,
        "entropy_given_character": entropy * (1 - told),
        "about": about,
        "about_given_character": given,
        "frozen": {
            "about": drawn,
            "about_given_character": {name: {"mean": 0.15, "sd": 0.01, "draws": 5} for name in given},
        },
        "hash": {**drawn, "character": {"mean": 1.0, "sd": 0.0, "draws": 5}},
        "by_class": {"vowel": {"characters": 1549, "entropy": 1.0, "load": load}},
    }


def paths_of(blocks, told):
    """told: the share of H(character) that the path tells beyond chance."""

    def measured(nats, share):
        return {"nats": nats + 0.01, "share": share, "chance_mean": 0.01, "chance_sd": 0.001, "values": 9, "draws": 5}

    pairs = [[one, other] for one in blocks for other in blocks if one < other]
    drawn = {"used": 14.2, "effective": 9.5, "given_character": 1.6, "character": told / 2}
    return {
        "used": 12,
        "entropy": 2.51,
        "entropy_of_character": 2.5,
        "entropy_given_character": 2.5 * (1 - told),
        "about_character": measured(2.5 * told, told),
        "between_layers": [{"blocks": pair, **measured(0.1 * sum(pair), 0.1)} for pair in pairs],
        "frozen": {
            name: {"mean": mean, "sd": 0.1, "draws": 5}
            for name, mean in {**drawn, **({"between_layers": 0.06} if pairs else {})}.items()
        },
    }


def pull_of(block):
    chance = {"mean": 0.0, "sd": 0.02, "low": -0.04, "high": 0.05, "n": 200}
    return {
        "block": block,
        "loss": "switch",
        "n": 8,
        "cosine": 0.1 - 0.05 * block,
        "low": 0.02 - 0.05 * block,
        "high": 0.18 - 0.05 * block,
        "chance": {"features": chance, "experts": {**chance, "low": -0.09, "high": 0.11}, "other_batches": None},
    }


def conflict_of(config, block):
    chance = {"mean": 0.0004, "sd": 0.0001}
    mean = {"cosine": 0.002, "cosine_between_sequences": 0.001 + 0.001 * block, "error": 0.0002, "chance": chance}
    return {"block": block, "kind": "experts" if block in config.moe_layers else "dense", "mean": mean}


def ablation_of(config, layers):
    def cost(nats, **more):
        return {"nats": nats, "se": 0.003, "by_class": {"vowel": nats}, **more}

    removed = [
        [cost(0.2 / (1 + i) + 0.01 * expert, share=share, suffer=[]) for expert, share in enumerate(of["load"]["load"])]
        if of["n_expert"] > 1
        else None
        for i, of in enumerate(layers)
    ]
    return {
        "removed": removed,
        "removed_all": cost(0.25, experts=[0] * len(layers)),
        "merged": [cost(0.1, into=1, expert=0) for _ in layers],
        "merged_all": cost(0.17),
        "shuffled": [cost(0.9) for _ in layers],
        "shuffled_all": cost(1.25),
        "hashed_all": cost(1.2),
        "tabulated": [cost(0.1) for _ in layers],
        "tabulated_all": cost(0.2),
        "top_k": {"2": cost(-0.04), "0": cost(0.12)},
    }


def stable(layer, steps):
    """Half of the way to the analysed weights at the first snapshot, all of it at the last."""
    at = np.linspace(0.5 / (1 + layer), 1.0, steps).tolist()
    return {
        "agreement": at,
        "chance": [0.25] * steps,
        "churn": [None, *(0.004 / (1 + i) for i in range(steps - 1))],
        "character": [0.8 - 0.1 * i - 0.02 * layer for i in range(steps)],
        "frequency band": [0.2] * steps,
    }
