"""The record of a complete run (summary.json): what it holds, how it is made, checked and read.

    record = read("out/shakespeare_moe4-cpu-s1337/summary.json")    # RecordError where it is not a valid record
    pairs, left_out = read_all("results")                           # results/TABLE/ROW-sSEED.json

A record is refused where it cannot be what its row says: another format, a field that tables read missing or of the
wrong kind, a run id that is not its config's, or a summary that its own evaluations contradict.

Every number is a number; an unknown one is null. Losses are nats and bits per character (per byte on enwik8).
Needs no torch, so that tables can be drawn where it is not installed.
"""

import math
import os
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from data.characters import CLASSES
from data.names import is_kept
from run import cross_fit
from run.settings import Config
from support.files import UserError, read_json, shown
from support.options import ConfigError
from support.schema import (
    COMMIT,
    COUNT,
    FLAG,
    LINE,
    LOSS_NUMBER,
    NUMBER,
    OBJECT,
    POSITIVE,
    SHA256,
    SHARE,
    TEXT,
    mismatches,
)

FORMAT = "charmoe record 2"
BENCH, ANALYSIS = "bench", "analysis"  # folders of results/ that hold no records of runs
# Times of a run count only if other programs took at most this share of the cores' time on a CPU, or at most this much
# memory on CUDA, which is more than the run's own process takes outside of torch: its CUDA context, its libraries'
# kernels and its CUDA graphs, in all 0.9 GB on an H200.
OTHERS_CPU_SHARE = 0.05
OTHERS_DEVICE_BYTES = 2**30
# A layer whose utilisation is lower has collapsed. With 4 experts and top-1: one expert gets 86% of the tokens, the
# others share the rest evenly. Learned routers by token start above two thirds.
COLLAPSED_BELOW = 0.25
WAY_OUT = "copy the run's summary.json again, or make the run again"


class RecordError(UserError):
    """An invalid record."""


# ---------------------------------------------------------------------------------------------------------------------
# What a record holds: see support/schema.py for how to read this

KINDS_OF_PARAMETERS = ("embedding", "attention", "mlp", "router", "experts", "norm")
LOSS = {"nats": LOSS_NUMBER, "bpc": LOSS_NUMBER}
LOSS_AT_STEP = {**LOSS, "step": COUNT}
TRAIN_MODE = {"loss": LOSS_NUMBER, "objective": LOSS_NUMBER}  # objective: with the weighted auxiliary losses
ROUTING = {  # of one MoE layer: see balance.summarize
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
    "drop_rate_by_position?": [(SHARE, None)],  # these three only with a capacity
    "drop_rate_by_symbol?": [(SHARE, None)],
    "drop_rate_by_class?": dict.fromkeys((f"{name}?" for name in CLASSES), SHARE),
}
EVALUATION = {
    "step": COUNT,
    "clean": LOSS,
    "halves?": [{"nats": LOSS_NUMBER, "tokens": POSITIVE}],  # of the full validation; missing in older records
    "paper": dict.fromkeys(("train", "val", "train_with_aux", "val_with_aux"), LOSS_NUMBER),
    "train_mode": (TRAIN_MODE, None),
    "train_seconds": NUMBER,
    "load": [[SHARE]],  # per MoE layer, each expert's share of the choices on the validation split
    "collapsed?": [COUNT],  # blocks whose router has collapsed; missing in older records
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
        "unit": {"character", "byte"},
        "vocab_size": COUNT,
        "splits": {"train": COUNT, "val": COUNT, "test?": COUNT},
    },
    "leaky": FLAG,
    "parameters": dict.fromkeys(("total", "active", *KINDS_OF_PARAMETERS), COUNT),
    "training_flops_per_token": COUNT,
    "git": {"commit": (COMMIT, None), "dirty": (FLAG, None)},
    "machine": {
        "device": LINE,
        "device_type": {"cpu", "cuda", "mps"},
        "cores": POSITIVE,
        "threads": POSITIVE,
        "torch": LINE,
        "cuda": (LINE, None),
        "python": LINE,
        "dtype": {"float32", "bfloat16"},
        "compile": FLAG,
        "capture?": FLAG,  # whether an update was one CUDA graph; false where it is missing
        "processes?": POSITIVE,  # that trained together; 1 where it is missing
        "kernels?": [LINE],  # kernels of our own that took part in updates; none where it is missing
    },
    "others": {"cpu_share": (NUMBER, None), "device_bytes": (COUNT, None)},
    "exclusive": FLAG,
    "iterations": COUNT,
    "resumed": COUNT,  # times
    "straight?": FLAG,  # made as an uninterrupted run of this config; see is_straight where it is missing
    "start?": ({"run_id": TEXT, "step": COUNT, "text": TEXT, "text_sha256": SHA256}, None),  # weights: see start.py
    "stretches?": [{"step": COUNT, "changed": OBJECT}],  # where it resumed with something changed: see straight.py
    "tokens": COUNT,
    "epochs": NUMBER,
    "clean": {"best": LOSS_AT_STEP, "final": LOSS_AT_STEP},
    "cross_fitted?": (LOSS, None),  # the best loss, chosen on one half of the split and told on the other
    "paper": dict.fromkeys(
        ("best_val", "best_val_with_aux", "final_train", "final_val", "final_train_with_aux", "final_val_with_aux"),
        LOSS_NUMBER,
    ),
    "train_mode": (TRAIN_MODE, None),  # the loss during training, with dropout, over the last steps
    "test": (LOSS_AT_STEP, None),
    "seconds": dict.fromkeys(("train", "eval", "save", "compile", "total"), NUMBER),
    "median_step_ms": NUMBER,  # of the means over log intervals
    "tokens_per_second": NUMBER,  # in training
    "inference": {  # uncached sampling, as the papers time it: batch 1, eager
        "samples": COUNT,
        "tokens_per_second": (NUMBER, None),
        "exclusive?": FLAG,  # while these samples were written; false where it is missing
        "attention?": (TEXT, None),  # the kernels that it could use; null or missing: torch's choice
    },
    "peak_memory_bytes": (COUNT, None),
    "routing": [ROUTING],  # per MoE layer, over the validation split, at the last step
    "evaluations": [EVALUATION],  # the first at step 0, the last after the last update
}


def record_of(config, dataset, model, state, is_straight, test, writing, peak_memory) -> dict:
    """The record of a complete run.

    state: its `state.TrainingState`; is_straight: see straight.py; test: an `evaluate.FullLoss`, or None without a test
    split; writing: {"speeds": of `evaluate.inference_speed`, "seconds": that it took, "others": `machines.OtherLoad`
    meanwhile, "attention": its kernels}; peak_memory: bytes, None where it is not known.
    """
    from run import accounting  # needs torch, without which records are read

    evaluations, description = state.evaluations, state.machine
    said = derived(config, evaluations)
    seconds, others, kept = state.seconds, state.others, [key.removesuffix("?") for key in EVALUATION]
    device_type, speeds, others_then = description["device_type"], writing["speeds"], writing["others"]
    share = cpu_share(others, seconds["total"], description)
    share_then = cpu_share(others_then, writing["seconds"], description)
    return {
        "format": FORMAT,
        **said,
        "leaky": not config.is_causal,
        "config": config.to_record(),
        "dataset": dataset.describe(),
        "parameters": accounting.count_parameters(model),
        "training_flops_per_token": accounting.training_flops_per_token(model),
        "git": state.git,
        "machine": description,
        "others": {"cpu_share": share, "device_bytes": others["device_bytes"]},
        "exclusive": is_exclusive(device_type, share, others["device_bytes"]),
        "resumed": state.resumed,
        "straight": is_straight,
        "start": state.start,
        "stretches": state.stretches,
        "epochs": said["tokens"] / dataset.sizes["train"],
        "test": None if test is None else {"nats": test.nats, "bpc": test.bpc, "step": said["clean"]["best"]["step"]},
        "seconds": seconds,
        "median_step_ms": statistics.median(state.step_ms),
        "tokens_per_second": said["tokens"] / seconds["train"],
        "inference": {
            "samples": len(speeds),
            "tokens_per_second": statistics.mean(speeds) if speeds else None,
            "exclusive": bool(speeds) and is_exclusive(device_type, share_then, others_then["device_bytes"]),
            "attention": writing["attention"],
        },
        "peak_memory_bytes": peak_memory,
        "routing": evaluations[-1]["routing"],
        "evaluations": [{key: line[key] for key in kept if key in line} for line in evaluations],
    }


def derived(config, evaluations) -> dict:
    """The fields of a record that its config and its evaluations determine."""
    best = min(evaluations, key=lambda line: line["clean"]["nats"])  # the first, if several
    final = evaluations[-1]
    tokens = config.max_iters * config.sequences_per_update * config.block_size
    crossed = cross_fit.cross_fitted(evaluations)
    return {
        "run_id": config.run_id,
        "title": config.title,
        "iterations": config.max_iters,
        "tokens": tokens,
        "clean": {"best": {**best["clean"], "step": best["step"]}, "final": {**final["clean"], "step": final["step"]}},
        "cross_fitted": None if crossed is None else {"nats": crossed, "bpc": crossed / math.log(2)},
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
    """Share of all cores' time that other programs took in so many seconds; None where it is unknown."""
    core_seconds = others["core_seconds"]
    return None if core_seconds is None else core_seconds / (seconds * machine["cores"])


def is_exclusive(device_type, cpu_share, device_bytes) -> bool:
    """Whether other programs left the hardware to the run; false where it is unknown."""
    if device_type == "cuda":
        return device_bytes is not None and device_bytes <= OTHERS_DEVICE_BYTES
    return cpu_share is not None and cpu_share <= OTHERS_CPU_SHARE


def utilisation(load, k):
    """Share of its experts that a layer makes use of: (exp H(load) − k) / (E − k).

    From 0, where all tokens go to the same k experts, to 1, where all experts get equally many. exp H is the effective
    number of experts. None unless each token chooses k of E experts, k < E. load: each expert's share of the choices.
    """
    if not 0 < k < len(load):
        return None
    effective = math.exp(-sum(share * math.log(share) for share in load if share > 0))
    return max(0.0, (effective - k) / (len(load) - k))


def collapsed_blocks(config, loads) -> list[int]:
    """Blocks whose `utilisation` is below COLLAPSED_BELOW. loads: of each MoE layer."""
    k = 1 if config.router_top_p else config.expert_top_k
    used = [utilisation(load, k) for load in loads]
    return [block for block, part in zip(config.moe_layers, used) if part is not None and part < COLLAPSED_BELOW]


def is_comparable(record) -> bool:
    """False where tables put a dagger: not the published text, or routing that sees later characters."""
    return not claims_published(record) and not record["leaky"]


def claims_published(run: dict) -> bool:
    """Whether another text than a published one stands under the name of one, or of a part of one.

    A text of one's own has a name of its own and claims nothing.
    """
    if run["dataset"]["canonical"]:
        return False
    return is_kept(run["dataset"]["name"]) or is_kept(os.path.basename(run["config"]["dataset"].rstrip("/")))


def is_clean(record) -> bool:
    """Whether a commit identifies the code that made the run; false where it is unknown."""
    return record["git"]["commit"] is not None and record["git"]["dirty"] is False


def evaluation_steps(config) -> list[int]:
    """The steps at which an uninterrupted run evaluates."""
    return [*range(0, config.max_iters, config.eval_interval), config.max_iters]


def is_straight(record) -> bool:
    """Whether a record, or an analysis, is of a run that was made as an uninterrupted run of its config is made.

    Older records do not say so: a resumed one counts where its evaluations are those of its config.
    """
    if "straight" in record or not record.get("resumed"):
        return record.get("straight", True)
    config = Config.from_dict(record["config"])
    return [line["step"] for line in record["evaluations"]] == evaluation_steps(config)


def why_not_straight(record) -> str:
    """What was changed while a run was made, of which `is_straight` is false."""
    changes = [
        f"{key} was {was} up to step {stretch['step']:,}, then {then}"
        for stretch in record.get("stretches", ())
        for key, (was, then) in stretch["changed"].items()
    ]
    if start := record.get("start"):
        changes.insert(0, f"it began with the weights of run {start['run_id']} at step {start['step']:,}")
    return f"not a straight run of its config ({'; '.join(changes) or 'resumed with something changed'})"


def machine_of(record) -> str:
    """Hardware and software, in one line. Only runs with the same line are compared.

    "AMD EPYC, 1 core, 1 thread, torch 2.13.0+cpu, float32", or "NVIDIA H200, torch 2.11.0+cu128, bfloat16, compiled,
    masked backend, routing kernels". An MoE model's backend is named unless it was chosen automatically. Also for
    records without a config (of benches).
    """
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
    parts += [] if backend == "auto" else [f"{backend} backend"]
    return ", ".join(parts + machine.get("kernels", []))


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def problems(record) -> list[str]:
    """Everything that is wrong with a record, a line each. Contradictions are looked for only where all fields are of
    the right kind and the config is valid."""
    wrong = kind_problems(record, FORMAT, SCHEMA)
    if wrong:
        return wrong
    config, wrong = config_in(record["config"], "config")
    return wrong or list(contradictions(record, config))


def kind_problems(record, expected, schema) -> list[str]:
    """Why a value read from a file is no record of the expected format and schema, a line each."""
    if not isinstance(record, dict):
        return [f"{shown(record)} is no record; expected {OBJECT}"]
    if record.get("format") != expected:
        return [f"its format is {shown(record.get('format'))}, expected {expected!r}"]
    return list(mismatches(record, schema))


def config_in(values, origin) -> tuple[Config | None, list[str]]:
    """(Config, []) of the config in a record, or (None, what is wrong with it). origin: its place in the record."""
    try:
        return Config.from_dict(values, origin), []
    except ConfigError as error:
        return None, error.problems


def contradictions(record, config) -> Iterator[str]:
    """Where a record's summary is not what its config and its evaluations make it, a line each."""
    evaluations, test, resumed = record["evaluations"], record["test"], record["resumed"]
    steps = [line["step"] for line in evaluations]
    if [*steps[:1], *steps[-1:]] != [0, config.max_iters] or not all(a < b for a, b in pairwise(steps)):
        yield f"steps of the evaluations are {shown(steps)}; expected them to rise from 0 to {config.max_iters}"
        return
    if not resumed and any(step % config.eval_interval for step in steps[:-1]):
        yield f"steps of the evaluations are {shown(steps)}; expected multiples of {config.eval_interval}"
    if record.get("straight") and steps != evaluation_steps(config):
        yield f"straight is true, but the steps of the evaluations are {shown(steps)}"
    if record.get("straight") and record.get("start"):
        yield "straight is true, but start tells of another run's weights"
    if (config.init_from == "resume") != (resumed > 0):
        yield f"resumed is {resumed}, but config.init_from is {config.init_from!r}"
    experts = [config.expert_counts()[block] for block in config.moe_layers]
    for name, loads in {
        "routing": [layer["load"] for layer in record["routing"]],
        **{f"evaluations[{i}].load": line["load"] for i, line in enumerate(evaluations)},
    }.items():
        if [len(load) for load in loads] != experts:
            yield f"{name} is of {shown([len(load) for load in loads])} experts; the MoE layers have {shown(experts)}"
    splits, counts, seconds = record["dataset"]["splits"], record["parameters"], record["seconds"]["train"]
    if (test is None) != ("test" not in splits):
        yield f"test is {shown(test)}, but the splits of the text are {', '.join(splits)}"
    summary = derived(config, evaluations)
    others = record["others"]
    summary |= {
        "exclusive": is_exclusive(record["machine"]["device_type"], others["cpu_share"], others["device_bytes"]),
        "test": test and {"bpc": test["nats"] / math.log(2), "step": summary["clean"]["best"]["step"]},
        "parameters": {"total": sum(counts[kind] for kind in KINDS_OF_PARAMETERS)},
        "epochs": summary["tokens"] / max(1, splits["train"]),
        "tokens_per_second": summary["tokens"] / (seconds or math.inf),
    }
    if not config.n_expert or config.leaks_of_any_router:  # else it is up to the router's class, which needs torch
        summary["leaky"] = bool(config.leaks_of_any_router)
    yield from deviations(record, summary)
    for i, line in enumerate(evaluations):
        expected = {"bpc": line["clean"]["nats"] / math.log(2)}
        if halves := line.get("halves"):
            tokens = sum(half["tokens"] for half in halves)
            expected["nats"] = sum(half["nats"] * half["tokens"] for half in halves) / tokens
        yield from deviations(line["clean"], expected, f"evaluations[{i}].clean")


def deviations(found, expected, where="") -> Iterator[str]:
    """Yields each field in which `found` is not `expected`, floats within 1e-9."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, inner in expected.items():
            yield from deviations(found.get(name), inner, f"{where}.{name}" if where else name)
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        if not math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{where} is {found}, but the rest of the record makes it {expected}"
    elif found != expected:
        yield f"{where} is {shown(found)}, but the rest of the record makes it {shown(expected)}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path, name=None, problems_of=problems, way_out=WAY_OUT) -> dict:
    """The record in a file, which messages call `name`.

    RecordError: the first of the problems that `problems_of` finds, how many more there are, and the way out.
    """
    name = name or path
    try:
        record = read_json(path)
    except OSError as error:
        raise RecordError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{name}: no record: not valid JSON: {error}; {way_out}") from None
    wrong = problems_of(record)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RecordError(f"{name}: {wrong[0]}{more}; {way_out}")
    if "config" in record:  # with keys that are newer than the record
        record["config"] = Config.from_dict(record["config"]).to_dict()
    return record


def read_each(paths, parent, read, left_out) -> Iterator[tuple[Path, Path, dict]]:
    """Yields (path, its name from `parent`, record) of each valid file, and appends to left_out why others are not."""
    for path in paths:
        name = path.relative_to(parent)
        try:
            yield path, name, read(path, name)
        except RecordError as error:
            left_out.append(str(error))


def read_all(folder) -> tuple[list[tuple[Path, dict]], list[str]]:
    """(path, record) of each record in folder/*/*.json, sorted by path; and a line for each that is left out.

    Left out are invalid records, files not named …-s<seed>.json after their record's seed, and records of one run on
    one machine that differ, for nothing says which of them counts. Of equal ones the first counts. Records of two
    texts, and a clean or straight one beside one that is not, may stand side by side, since tables show them apart.
    folder/bench/ and folder/analysis/ are passed over.
    """
    folder = Path(folder)
    cells, left_out = {}, []
    paths = (path for path in folder.glob("*/*.json") if path.parent.name not in (BENCH, ANALYSIS))
    for path, name, record in read_each(sorted(paths), folder.parent, read, left_out):
        ending = f"-s{record['config']['seed']}.json"
        if path.name.endswith(ending):
            text = record["dataset"]["sha256"]
            cell = record["run_id"], machine_of(record), text, is_clean(record), is_straight(record)
            cells.setdefault(cell, []).append((path, name, record))
        else:
            left_out.append(f"{name}: its record has another seed; rename it, to a name that ends in {ending}")
    pairs = []
    for (run_id, machine, *_), ((path, name, record), *others) in cells.items():
        names = [str(other) for _, other, _ in others]
        if all(other == record for _, _, other in others):
            pairs.append((path, record))
            left_out += [f"{copy}: the same record as {name}; delete one" for copy in names]
        else:
            why = f"different records of one run ({run_id}, {machine}); none counts, keep one"
            left_out.append(f"{', '.join([str(name), *names])}: {why}")
    return pairs, left_out
