"""The record of a complete run: what it holds, how it is made, checked and read, and the last lines on the screen.

    record = read("out/shakespeare_moe4-cpu-s1337/summary.json")    # or RecordError, if damaged or in contradiction
    pairs, left_out = read_all("results")                           # results/TABLE/ROW-sSEED.json

The records of benches are speed.py's, which checks and reads them with what is here.

Every number is a number; what is not known is null. Losses are nats and bits per character (per byte on enwik8).
Nothing here needs torch: tables are made where it is not installed.
"""

import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from run.settings import Config
from support.files import ROOT, is_utf8, one_line, read_json, shown
from support.options import ConfigError, nearest

FORMAT = "charmoe record 2"
MAKERS = {
    "charmoe record": "train.py",
    "charmoe bench": "bench.py",
    "charmoe analysis": "analyze.py",
}  # of records, by their format less its number
# Folders of results/ that are no table's: of speed.py, and of analyses.py.
BENCH, ANALYSIS = "bench", "analysis"
# Times of a run count only when others left the hardware to it: at most this share of the cores' time on a CPU; on CUDA
# no more memory than the context of the run's own process takes.
OTHERS_CPU_SHARE = 0.05
OTHERS_DEVICE_BYTES = 2**30
# A layer that uses less of its experts has collapsed: with 4 experts, top-1, when one gets 86% of the tokens and the
# others evenly the rest. Learned routers by token start above two thirds.
COLLAPSED_BELOW = 0.25
WAY_OUT = "copy the run's summary.json again, or make the run again"


class RecordError(ValueError):
    """What is no record of a complete run, or contradicts itself: which, why, and the way out, in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


# ---------------------------------------------------------------------------------------------------------------------
# What a record holds

# Kinds of values, each named by the words in which a problem asks for it.
TEXT, FLAG, OBJECT, LIST = "text that UTF-8 can encode", "true or false", "an object", "a list"
LINE, NAME = "a line of text", "a name of lower-case letters, digits, - and _"  # NAME is good for files
COUNT, NUMBER, SHARE = "an integer from 0", "a finite number from 0", "a number from 0 to 1"
SIGNED = "a finite number"
LOSS_NUMBER = "a loss from 0 and below 10,000"  # one that tables have room for
UNIT, DEVICE, DTYPE = "'character' or 'byte'", "'cpu', 'cuda' or 'mps'", "'float32' or 'bfloat16'"
SHA256, COMMIT = "64 hexadecimal digits", "40 to 64 hexadecimal digits"
FITS = {
    TEXT: lambda value: type(value) is str and is_utf8(value),
    LINE: lambda value: type(value) is str and value.isprintable() and value.strip(),
    NAME: lambda value: type(value) is str and re.fullmatch("[a-z0-9][a-z0-9_-]{0,39}", value),
    FLAG: lambda value: type(value) is bool,
    OBJECT: lambda value: type(value) is dict,
    LIST: lambda value: type(value) is list,
    COUNT: lambda value: type(value) is int and 0 <= value < 2**63,  # type(), because True is an int as well
    NUMBER: lambda value: type(value) in (int, float) and 0 <= value <= sys.float_info.max,
    SIGNED: lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    SHARE: lambda value: type(value) in (int, float) and 0 <= value <= 1,
    LOSS_NUMBER: lambda value: type(value) in (int, float) and 0 <= value < 1e4,
    UNIT: lambda value: value in ("character", "byte"),
    DEVICE: lambda value: value in ("cpu", "cuda", "mps"),
    DTYPE: lambda value: value in ("float32", "bfloat16"),
    SHA256: lambda value: type(value) is str and re.fullmatch("[0-9a-f]{64}", value),
    COMMIT: lambda value: type(value) is str and re.fullmatch("[0-9a-f]{40,64}", value),
}
KINDS_OF_PARAMETERS = ("embedding", "attention", "mlp", "router", "experts", "norm")
CLASSES = ("vowel", "consonant", "capital", "digit", "space", "newline", "punctuation", "other")  # of characters
# {name: kind} is an object, where "name?" may be missing; [kind] is a list of it; (kind, None) is it or null.
LOSS = {"nats": LOSS_NUMBER, "bpc": LOSS_NUMBER}
LOSS_AT_STEP = {**LOSS, "step": COUNT}
TRAIN_MODE = {"loss": LOSS_NUMBER, "objective": LOSS_NUMBER}  # the objective has the weighted auxiliary losses in it
ROUTING = {  # of one MoE layer: see moe.summarize
    "load": [SHARE],
    "load_cv2": NUMBER,
    "importance_cv2": NUMBER,
    "dead": COUNT,
    "drop_rate": SHARE,
    "unserved": SHARE,
    "entropy": NUMBER,
    "choices": NUMBER,
    "gate_mass": NUMBER,
    "tokens": COUNT,
    "drop_rate_by_position?": [(SHARE, None)],  # these three with a capacity only
    "drop_rate_by_symbol?": [(SHARE, None)],
    "drop_rate_by_class?": dict.fromkeys((f"{name}?" for name in CLASSES), SHARE),
}
EVALUATION = {
    "step": COUNT,
    "clean": LOSS,
    "paper": dict.fromkeys(("train", "val", "train_with_aux", "val_with_aux"), LOSS_NUMBER),
    "train_mode": (TRAIN_MODE, None),
    "train_seconds": NUMBER,
    "load": [[SHARE]],  # per MoE layer, each expert's share of the choices on the validation split
    "collapsed?": [COUNT],  # blocks whose router has collapsed: see collapsed_blocks; younger than some records
}
SCHEMA = {
    "format": TEXT,
    "run_id": TEXT,
    "title": TEXT,
    "config": OBJECT,  # settings.Config knows its keys
    "dataset": {
        "name": TEXT,
        "canonical": FLAG,
        "sha256": SHA256,
        "unit": UNIT,
        "vocab_size": COUNT,
        "splits": {"train": COUNT, "val": COUNT, "test?": COUNT},
    },
    "leaky": FLAG,
    "parameters": dict.fromkeys(("total", "active", *KINDS_OF_PARAMETERS), COUNT),
    "training_flops_per_token": COUNT,
    "git": {"commit": (COMMIT, None), "dirty": (FLAG, None)},
    "machine": {
        "device": TEXT,
        "device_type": DEVICE,
        "cores": COUNT,
        "threads": COUNT,
        "torch": TEXT,
        "cuda": (TEXT, None),
        "python": TEXT,
        "dtype": DTYPE,
        "compile": FLAG,
        "processes?": COUNT,  # that trained together; a record that lacks it is of one
    },
    "others": {"cpu_share": (NUMBER, None), "device_bytes": (COUNT, None)},
    "exclusive": FLAG,
    "iterations": COUNT,
    "resumed": COUNT,  # times
    "tokens": COUNT,
    "epochs": NUMBER,
    "clean": {"best": LOSS_AT_STEP, "final": LOSS_AT_STEP},
    "paper": dict.fromkeys(
        ("best_val", "best_val_with_aux", "final_train", "final_val", "final_train_with_aux", "final_val_with_aux"),
        LOSS_NUMBER,
    ),
    "train_mode": (TRAIN_MODE, None),  # the loss that training saw: with dropout, over the last steps
    "test": (LOSS_AT_STEP, None),
    "seconds": dict.fromkeys(("train", "eval", "save", "compile", "total"), NUMBER),
    "median_step_ms": NUMBER,  # of the means over log intervals
    "tokens_per_second": NUMBER,  # in training
    "inference": {  # the papers' way: batch 1, eager, no cache
        "samples": COUNT,
        "tokens_per_second": (NUMBER, None),
        "exclusive?": FLAG,  # of the time that writing took; a record that lacks it does not know, which counts as no
    },
    "peak_memory_bytes": (COUNT, None),
    "routing": [ROUTING],  # per MoE layer, over the validation split, at the last step
    "evaluations": [EVALUATION],
}


def record_of(config, dataset, model, description, progress, test, writing, peak_memory) -> dict:
    """description: of `machine.describe`; progress: train.py's, at the end of the run; test: an `evaluate.Clean`, or
    None without a test split; writing: {"speeds": of `evaluate.inference_speed`, "seconds": that it took, "others": of
    `machine.Neighbours` meanwhile}; peak_memory: bytes, None where it is not known."""
    from run import accounting  # needs torch, without which records are read

    evaluations = progress["evaluations"]
    said = derived(config, evaluations)
    seconds, others = progress["seconds"], progress["others"]
    share = cpu_share(others, seconds["total"], description)
    speeds, share_of_writing = writing["speeds"], cpu_share(writing["others"], writing["seconds"], description)
    device_type = description["device_type"]
    return {
        "format": FORMAT,
        **said,
        "leaky": not config.is_causal,
        "config": config.to_dict(),
        "dataset": dataset.describe(),
        "parameters": accounting.count_parameters(model),
        "training_flops_per_token": accounting.training_flops_per_token(model),
        "git": progress["git"],
        "machine": description,
        "others": {"cpu_share": share, "device_bytes": others["device_bytes"]},
        "exclusive": is_exclusive(device_type, share, others["device_bytes"]),
        "resumed": progress["resumed"],
        "epochs": said["tokens"] / dataset.sizes["train"],
        "test": None if test is None else {"nats": test.nats, "bpc": test.bpc, "step": said["clean"]["best"]["step"]},
        "seconds": seconds,
        "median_step_ms": statistics.median(progress["step_ms"]),
        "tokens_per_second": said["tokens"] / seconds["train"],
        "inference": {
            "samples": len(speeds),
            "tokens_per_second": statistics.mean(speeds) if speeds else None,
            "exclusive": bool(speeds)
            and is_exclusive(device_type, share_of_writing, writing["others"]["device_bytes"]),
        },
        "peak_memory_bytes": peak_memory,
        "routing": evaluations[-1]["routing"],
        "evaluations": [
            {key: line[key] for key in (key.removesuffix("?") for key in EVALUATION) if key in line}
            for line in evaluations
        ],
    }


def derived(config, evaluations) -> dict:
    """The fields of a record that follow from its config and its evaluations."""
    best = min(evaluations, key=lambda line: line["clean"]["nats"])  # the first, if several
    final = evaluations[-1]
    tokens = config.max_iters * config.batch_size * config.block_size * config.gradient_accumulation_steps
    return {
        "run_id": config.run_id,
        "title": config.title,
        "iterations": config.max_iters,
        "tokens": tokens,
        "clean": {"best": {**best["clean"], "step": best["step"]}, "final": {**final["clean"], "step": final["step"]}},
        "paper": {
            "best_val": min(line["paper"]["val"] for line in evaluations),
            "best_val_with_aux": min(line["paper"]["val_with_aux"] for line in evaluations),
            **{f"final_{key}": value for key, value in final["paper"].items()},
        },
        "train_mode": final["train_mode"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a record says


def cpu_share(others, seconds, machine):
    """Of the time of all cores in so many seconds, the share that others took; None where it is not known."""
    core_seconds = others["core_seconds"]
    return None if core_seconds is None else core_seconds / (seconds * machine["cores"])


def is_exclusive(device_type, cpu_share, device_bytes) -> bool:
    """Whether others left the hardware to the run; not known counts as no."""
    if device_type == "cuda":
        return device_bytes is not None and device_bytes <= OTHERS_DEVICE_BYTES
    return cpu_share is not None and cpu_share <= OTHERS_CPU_SHARE


def utilisation(load, k):
    """How much of its experts a layer uses: (exp H(load) − k) / (E − k), from 0, where all tokens go to the same k
    experts, to 1, where all have as much. exp H, the perplexity of the load, is the effective number of experts. None
    where it is not k of E, k below E, that a token chooses. load: each expert's share of the choices."""
    if not 0 < k < len(load):
        return None
    effective = math.exp(-sum(share * math.log(share) for share in load if share > 0))
    return max(0.0, (effective - k) / (len(load) - k))


def collapsed_blocks(config, loads) -> list[int]:
    """Blocks that use less of their experts than COLLAPSED_BELOW, by `utilisation`. loads: of each MoE layer."""
    k = 1 if config.router_top_p else config.expert_top_k
    used = [utilisation(load, k) for load in loads]
    return [block for block, part in zip(config.moe_layers, used) if part is not None and part < COLLAPSED_BELOW]


def is_comparable(record) -> bool:
    """False where a dagger belongs: a text that is not the published one, or routing that sees later characters."""
    return record["dataset"]["canonical"] and not record["leaky"]


def is_clean(record) -> bool:
    """Whether a commit says what code made the run; not known counts as no."""
    return record["git"]["commit"] is not None and record["git"]["dirty"] is False


def machine_of(record) -> str:
    """The hardware and software that must agree within a comparison of times: "AMD EPYC, 1 core, 1 thread,
    torch 2.13.0+cpu, float32", or "NVIDIA H200, torch 2.11.0+cu128, bfloat16, compiled, masked backend". The backend of
    an MoE model is named where it was not chosen automatically; a record without a config is of no model."""
    machine, config = record["machine"], record.get("config", {})
    parts = [machine["device"]]
    if machine["device_type"] == "cpu":
        counts = {"core": machine["cores"], "thread": machine["threads"]}
        parts += [f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()]
    parts += [f"torch {machine['torch']}", machine["dtype"]]
    parts += ["compiled"] if machine["compile"] else []
    processes = machine.get("processes", 1)
    parts += [f"{processes} processes"] if processes > 1 else []
    backend = config.get("moe_backend", "auto") if config.get("n_expert") else "auto"
    return ", ".join(parts if backend == "auto" else [*parts, f"{backend} backend"])


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def problems(record) -> list[str]:
    """All that is wrong with a record, a line each: with the fields and their kinds; where these are right, with the
    config; where that is right too, with what the rest of the record contradicts."""
    if not isinstance(record, dict):
        return [f"{shown(record)} is no record of train.py; expected {OBJECT}"]
    if record.get("format") != FORMAT:
        return [format_problem(record.get("format"))]
    wrong = list(mismatches(record, SCHEMA))
    if wrong:
        return wrong
    config, wrong = config_in(record["config"], "config")
    if wrong:
        return wrong
    if not record["evaluations"]:
        return ["evaluations is empty; expected one at step 0, and one after the last update"]
    rules = [rule for rules_of in RULES for rule in rules_of(record, config)]
    return [*differences(record, recomputed(record, config)), *(message for holds, message in rules if not holds)]


def format_problem(found, expected=FORMAT) -> str:
    """Why a record of another format than the expected one is not read."""
    told = f"has no format {expected!r}" if found is None else f"its format is {shown(found)}, expected {expected!r}"
    kind, version = expected.rsplit(" ", 1)
    match = re.fullmatch(r"(.+) (\d{1,9})", found) if isinstance(found, str) else None
    if match and match[1] == kind:
        return f"{told}: {'older' if int(match[2]) < int(version) else 'newer'} code made it"
    maker = MAKERS.get(match[1]) if match else None
    return f"{told}: it is {f'a record of {maker}, and ' if maker else ''}no record of {MAKERS[kind]}"


def config_in(values, origin) -> tuple[Config | None, list[str]]:
    """The Config that an object of a record makes; and where there is none, why. origin: the object's place."""
    try:
        return Config.from_dict(values, origin), []
    except ConfigError as error:
        return None, error.problems


def mismatches(value, kind, where="") -> Iterator[str]:
    """Where `value` is not of its kind in SCHEMA; where: its place in the record, as clean.best.nats."""
    if isinstance(kind, tuple):
        if value is None:
            return
        kind = kind[0]
    if isinstance(kind, dict) and isinstance(value, dict):
        kinds = {name.removesuffix("?"): inner for name, inner in kind.items()}
        there = f"in {where}" if where else "in the record"
        for name in value:
            if name not in kinds:
                guess = nearest(str(name), kinds)
                yield f"unknown field {shown(name)} {there}" + (f"; nearest: {guess}" if guess else "")
        for name in kind:
            if name not in value and not name.endswith("?"):
                yield f"missing field {name!r} {there}"
        for name, inner in kinds.items():
            if name in value:
                yield from mismatches(value[name], inner, f"{where}.{name}" if where else name)
    elif isinstance(kind, list) and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from mismatches(inner, kind[0], f"{where}[{i}]")
    else:
        expected = OBJECT if isinstance(kind, dict) else LIST if isinstance(kind, list) else kind
        if not FITS[expected](value):
            yield f"{where} is {shown(value)}; expected {expected}"


def differences(found, expected, where="") -> Iterator[str]:
    """Where `found` is not as the rest of its record makes it: equal to `expected`, floats within 1e-9."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, inner in expected.items():
            yield from differences(found[name], inner, f"{where}.{name}" if where else name)
    elif isinstance(expected, list) and len(found) == len(expected):
        for i, inner in enumerate(expected):
            yield from differences(found[i], inner, f"{where}[{i}]")
    elif isinstance(expected, float) and found is not None:
        if not math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{where} is {found}, but the rest of the record makes it {expected}"
    elif found != expected:
        yield f"{where} is {shown(found)}, but the rest of the record makes it {shown(expected)}"


def recomputed(record, config) -> dict:
    """What the rest of a record makes of some of its fields, in the record's own shape."""
    evaluations, splits, test = record["evaluations"], record["dataset"]["splits"], record["test"]
    said = derived(config, evaluations)
    return {
        **said,
        "dataset": {"splits": {"train": config.train_characters or splits["train"]}},
        **recomputed_size(record["parameters"], record["dataset"]["vocab_size"], config),
        "exclusive": is_exclusive(record["machine"]["device_type"], **record["others"]),
        "epochs": record["tokens"] / max(1, splits["train"]),
        "test": test and {"bpc": test["nats"] / math.log(2), "step": said["clean"]["best"]["step"]},
        "seconds": {"train": evaluations[-1]["train_seconds"]},
        "tokens_per_second": record["tokens"] / (record["seconds"]["train"] or math.inf),
        "inference": {"samples": 0 if record["leaky"] else config.inference_samples},
        "routing": [recomputed_routing(load, splits["val"], config) for load in evaluations[-1]["load"]],
        "evaluations": [recomputed_evaluation(line, i, record, config) for i, line in enumerate(evaluations)],
    }


def recomputed_size(counts, vocab_size, config) -> dict:
    """Parameters and training FLOPs per token; the sizes of routers and experts are model.py's to know. counts: the
    record's parameters."""
    L, D, T, V = config.n_layer, config.n_embd, config.block_size, vocab_size
    dense_layers, hidden = L - len(config.moe_layers), config.mlp_hidden or 4 * D
    kinds = {
        "embedding": (V + T) * D,
        "attention": L * (4 * D * D + 4 * D * config.bias),
        "mlp": dense_layers * (2 * D * hidden + (D + hidden) * config.bias),
        "norm": (2 * L + 1) * D * (1 + config.bias),
    }
    if not config.n_expert:
        kinds |= {"router": 0, "experts": 0}
    size = {"parameters": {**kinds, "total": sum(counts[kind] for kind in KINDS_OF_PARAMETERS)}}
    # Each weight of the router and of a token's experts costs 2 FLOPs; but a bias none, an expert that several layers
    # share as many times, and what capacity leaves of an expert on average less.
    if not config.n_expert or not (config.bias or config.share_experts or config.capacity_factor):
        weights = counts["router"] + counts["experts"] - (counts["total"] - counts["active"])
        if config.router == "random":  # which is drawn, and no parameter
            weights += sum(config.expert_counts()[block] for block in config.moe_layers) * D
        forward = 2 * V * D + L * (8 * D * D + 4 * T * D) + dense_layers * 4 * D * hidden + 2 * weights
        size["training_flops_per_token"] = 3 * forward
    return size


def recomputed_routing(load, val_size, config) -> dict:
    """load: each expert's share of the choices in the last evaluation of one MoE layer."""
    mean = sum(load) / max(1, len(load))
    variance = sum((share - mean) ** 2 for share in load) / max(1, len(load))
    routing = {
        "load": load,
        "load_cv2": variance / mean**2 if mean else 0.0,
        "dead": load.count(0),
        "tokens": val_size - 1,  # nothing predicts the first one
    }
    if not config.router_top_p and config.router != "expert_choice":
        routing["choices"] = float(min(config.expert_top_k or len(load), len(load)))
    if not config.capacity_factor:
        routing |= {"drop_rate": 0.0, "unserved": 0.0}
    return routing


def recomputed_evaluation(line, i, record, config) -> dict:
    """line: evaluation i of the record."""
    paper, train_mode = line["paper"], line["train_mode"]
    evaluation = {"clean": {"bpc": line["clean"]["nats"] / math.log(2)}}
    if "collapsed" in line:
        evaluation["collapsed"] = collapsed_blocks(config, line["load"])
    if not record["resumed"]:  # else eval_interval and max_iters may have been others before
        evaluation["step"] = min(i * config.eval_interval, config.max_iters)
    if not (config.n_expert and (config.balances or config.z_loss_coef)):
        evaluation["paper"] = {"train_with_aux": paper["train"], "val_with_aux": paper["val"]}
        evaluation["train_mode"] = train_mode and {"objective": train_mode["loss"]}
    return evaluation


# What must hold besides: (record, config) -> (whether it does, what to say if not)


def run_rules(record, config):
    splits, test, resumed = record["dataset"]["splits"], record["test"], record["resumed"]
    for split in ("train", "val"):
        message = f"dataset.splits.{split} is {splits[split]}, too few characters for block_size = {config.block_size}"
        yield splits[split] > config.block_size, message
    yield test is None or "test" in splits, "test is there, but dataset.splits has none"
    yield test is not None or "test" not in splits, "test is null, but dataset.splits has one"
    is_resumed = config.init_from == "resume"
    yield is_resumed == (resumed > 0), f"resumed is {resumed}, but config.init_from is {config.init_from!r}"
    yield not (is_resumed and config.overwrite), "config.overwrite is true, but the run was resumed"
    yield not config.eval_only, "config.eval_only is true, but that trains nothing and leaves no record"


def time_rules(record, config):
    seconds, inference = record["seconds"], record["inference"]
    # Saving the best checkpoint of a resumed run falls into its first log interval, and so into two of the parts.
    longest = max(seconds["train"] + seconds["eval"] + seconds["compile"], seconds["save"])
    yield longest <= 1.01 * seconds["total"], f"seconds.total is {seconds['total']}, less than the parts of it"
    speed, samples = inference["tokens_per_second"], inference["samples"]
    yield bool(speed) == bool(samples), f"inference.tokens_per_second is {speed}, of {samples} samples"
    yield samples or not inference.get("exclusive"), "inference.exclusive is true, of 0 samples"
    clock = [line["train_seconds"] for line in record["evaluations"]]
    yield clock[0] == 0, f"evaluations[0].train_seconds is {clock[0]}; expected 0 before the first update"
    yield clock == sorted(clock), f"train_seconds of the evaluations are {shown(clock)}; expected them not to fall"


def evaluation_rules(record, config):
    evaluations = record["evaluations"]
    steps = [line["step"] for line in evaluations]
    is_whole = steps[0] == 0 and steps[-1] == config.max_iters and all(a < b for a, b in pairwise(steps))
    yield is_whole, f"steps of the evaluations are {shown(steps)}; expected them to rise from 0 to {config.max_iters}"
    for i, line in enumerate(evaluations):
        where, paper, train_mode = f"evaluations[{i}]", line["paper"], line["train_mode"]
        yield i > 0 or train_mode is None, f"{where}.train_mode is there; expected null before the first update"
        # A resumed run may be evaluated where it was stopped, with nothing logged since the last evaluation.
        yield i == 0 or train_mode or record["resumed"], f"{where}.train_mode is null; expected the losses of updates"
        for split in ("train", "val"):
            plain, with_aux = paper[split], paper[f"{split}_with_aux"]
            message = f"{where}.paper.{split}_with_aux is {with_aux}, less than {plain} without auxiliary losses"
            yield with_aux >= plain * (1 - 1e-9), message
        if train_mode:
            loss, objective = train_mode["loss"], train_mode["objective"]
            message = f"{where}.train_mode.objective is {objective}, less than the loss, {loss}"
            yield objective >= loss * (1 - 1e-9), message


def machine_rules(record, config):
    machine, others = record["machine"], record["others"]
    device = machine["device_type"]
    asked = config.device.partition(":")[0]
    yield asked in ("auto", device), f"machine.device_type is {device!r}, but config.device is {config.device!r}"
    may_be_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device == "cuda")
    message = f"machine.dtype is {machine['dtype']!r}, but config.dtype is {config.dtype!r} on {device}"
    yield machine["dtype"] == "float32" or may_be_bfloat16, message
    may_compile = config.compile is True or (config.compile == "auto" and device == "cuda")
    message = f"machine.compile is true, but config.compile is {config.compile!r} on {device}"
    yield may_compile or not machine["compile"], message
    seconds = record["seconds"]["compile"]
    yield seconds > 0 or not machine["compile"], f"seconds.compile is {seconds}, but machine.compile is true"
    yield from hardware_rules(machine, others)


def hardware_rules(machine, others):
    """What must hold of a machine, whatever ran on it."""
    device = machine["device_type"]
    for name in ("cores", "threads", "processes"):
        yield machine.get(name, 1) > 0, f"machine.{name} is 0"
    for name, value in (("machine.cuda", machine["cuda"]), ("others.device_bytes", others["device_bytes"])):
        yield device == "cuda" or value is None, f"{name} is {shown(value)}, but machine.device_type is {device!r}"


def active_rule(counts, where="parameters"):
    """counts: a model's parameters by kind, at that place in a record."""
    least = counts["total"] - counts["experts"]
    message = f"{where}.active is {counts['active']}; expected from {least} (no experts) to {counts['total']} (all)"
    return least <= counts["active"] <= counts["total"], message


def model_rules(record, config):
    n_symbols = record["dataset"]["vocab_size"]
    yield active_rule(record["parameters"])
    experts = [config.expert_counts()[block] for block in config.moe_layers]
    for i, line in enumerate(record["evaluations"]):
        found = [len(load) for load in line["load"]]
        message = f"evaluations[{i}].load is of {shown(found)} experts; the MoE blocks have {shown(experts)}"
        yield found == experts, message
        for j, load in enumerate(line["load"]):
            message = f"evaluations[{i}].load[{j}] adds up to {sum(load)}; expected 1"
            yield abs(sum(load) - 1) <= 1e-6, message
    names = {f"drop_rate_by_{name}" for name in ("position", "symbol", "class")} if config.capacity_factor else set()
    for i, layer in enumerate(record["routing"]):
        found = {name for name in layer if name.startswith("drop_rate_by_")}
        message = f"routing[{i}] has {shown(sorted(found))}; expected {sorted(names)} of capacity_factor = "
        yield found == names, f"{message}{config.capacity_factor}"
        for name, length in (("drop_rate_by_position", config.block_size), ("drop_rate_by_symbol", n_symbols)):
            rates = layer.get(name, ())
            yield name not in layer or len(rates) == length, f"routing[{i}].{name} has {len(rates)} rates, not {length}"
        # The router's sums over tokens are float32.
        entropy, even = layer["entropy"], math.log(max(1, len(layer["load"])))
        yield (
            entropy <= 1.001 * even + 1e-6,
            f"routing[{i}].entropy is {entropy}; expected at most {even}, the log of E",
        )
        mass, choices = layer["gate_mass"], layer["choices"]
        yield mass <= 1.001 * choices, f"routing[{i}].gate_mass is {mass}; expected at most 1 of {choices} choices each"


RULES = (run_rules, time_rules, evaluation_rules, machine_rules, model_rules)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path, name=None, problems_of=problems, way_out=WAY_OUT) -> dict:
    """The record in the file at `path`, which messages call `name`. RecordError: the first thing that is wrong with it
    (of what `problems_of` finds), how many more, and the way out."""
    name = name or path
    try:
        record = read_json(path)
    except OSError as error:
        raise RecordError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{name}: no record, or not all of one: {error}; {way_out}") from None
    wrong = problems_of(record)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RecordError(f"{name}: {wrong[0]}{more}; {way_out}")
    if "config" in record:  # with the keys that are younger than it, and integers that are integers
        record["config"] = Config.from_dict(record["config"]).to_dict()
    return record


def read_each(paths, parent, read, left_out) -> Iterator[tuple[Path, Path, dict]]:
    """(path, its name from `parent`, record) of each file that `read` takes; why it refuses one goes to left_out."""
    for path in paths:
        name = path.relative_to(parent)
        try:
            yield path, name, read(path, name)
        except RecordError as error:
            left_out.append(str(error))


def read_all(folder, skip=()) -> tuple[list[tuple[Path, dict]], list[str]]:
    """(path, record) of the records in folder/*/*.json, sorted by path; and what is left out of them, a line each, with
    paths from the folder's parent. skip: how the names of files begin that are no records (a string, or a tuple).
    folder/bench/ and folder/analysis/ are passed over: speed.py and analyses.py read them.

    Left out are files that `read` refuses; those not named …-s<seed>.json after their record's seed; and records of one
    config, seed and machine that differ, for nothing says which of them counts. Where they are equal, the first counts.
    One that is_clean and one that is not may stand side by side, for tables show them apart.
    """
    folder = Path(folder)
    cells, left_out = {}, []
    paths = [
        path
        for path in folder.glob("*/*.json")
        if path.parent.name not in (BENCH, ANALYSIS) and not path.name.startswith(skip)
    ]
    for path, name, record in read_each(sorted(paths), folder.parent, read, left_out):
        ending = f"-s{Config.from_dict(record['config']).seed}.json"
        if path.name.endswith(ending):
            cell = record["run_id"], machine_of(record), is_clean(record)
            cells.setdefault(cell, []).append((path, name, record))
        else:
            left_out.append(f"{name}: expected a name that ends in {ending}, for that is its record's seed; rename it")
    pairs = []
    for (run_id, machine, _), ((path, name, record), *others) in cells.items():
        if all(other == record for _, _, other in others):
            pairs.append((path, record))
            left_out += [f"{copy}: the same record as {name}, which counts; delete one" for _, copy, _ in others]
        else:
            names = ", ".join(str(name) for _, name, _ in others)
            left_out.append(
                f"{name}, {names}: records that differ, of one run ({run_id}, {machine}); none counts, keep one"
            )
    return pairs, left_out


# ---------------------------------------------------------------------------------------------------------------------
# The last lines on the screen


def report(record) -> str:
    """What a person wants to know at the end of a run."""
    config = Config.from_dict(record["config"])
    dagger = "" if is_comparable(record) else " †"
    best, final, paper = record["clean"]["best"], record["clean"]["final"], record["paper"]
    unit = record["dataset"]["unit"]

    def loss(value):
        return f"{value['nats']:.4f} nats  {value['bpc']:.4f} bits per {unit}{dagger}"

    rows = [
        ("best validation", f"{loss(best)}  (step {best['step']:,}; every {unit} of the split, predicted once)"),
        ("final validation", f"{loss(final)}  (step {final['step']:,})"),
    ]
    if record["test"]:
        rows.append(("test", f"{loss(record['test'])}  (the best checkpoint)"))
    estimates = f"{paper['best_val']:.4f} nats best validation, minimum over {config.eval_iters}-batch estimates"
    if config.n_expert:
        estimates += f"; {paper['best_val_with_aux']:.4f} with the auxiliary losses in it"
    rows.append(("the papers' way", estimates))
    seconds, counts = record["seconds"], record["parameters"]
    parts = [("training", "train"), ("evaluation", "eval"), ("saving", "save"), ("compiling", "compile")]
    spent = ", ".join(f"{name} {duration(seconds[key])}" for name, key in parts if seconds[key])
    rows.append(("time", f"{duration(seconds['total'])} ({spent})"))
    speed = f"{record['tokens_per_second']:,.0f} {unit}s/s in training"
    if record["inference"]["samples"]:
        speed += f", {record['inference']['tokens_per_second']:,.0f} in writing without a cache"
    rows.append(("speed", speed))
    rows.append(("parameters", f"{counts['total']:,} total, {counts['active']:,} active per {unit}"))
    for number, (block, layer) in enumerate(zip(config.moe_layers, record["routing"])):
        shares = "  ".join(f"{share:4.0%}" for share in layer["load"])
        dropped = f"   {layer['drop_rate']:.1%} dropped" if config.capacity_factor else ""
        rows.append(("" if number else "load per expert", f"block {block}: {shares}{dropped}"))
    if record["leaky"]:
        rows.append(("†", "routing sees later characters: this loss is not that of a language model"))
    if not record["dataset"]["canonical"]:
        rows.append(("†", "not the published text"))
    rows.append(("checkpoint", f"{config.out_dir}/best.pt"))
    script = os.path.relpath(ROOT / "sample.py")
    if not record["leaky"]:
        rows.append(("sample from it", f"python {script} --out_dir={shlex.quote(config.out_dir)}"))
    head = f"\n{config.title or 'run'}: {record['dataset']['name']}, seed {config.seed}"
    return "\n".join([head, *(f"  {name:<17} {text}" for name, text in rows)])


def duration(seconds: float) -> str:
    """'12.3 s', '4 min 5 s', '1.2 h'"""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds / 3600:.1f} h"
