"""The record of a bench: what it holds, how it is checked and read, and what became slower between two benches.

    pairs, left_out = read_all("results")                   # results/bench/*.json
    record = read("bench.json")                             # RecordError where it is not a valid record
    compare(read("results/bench/epyc-cpu.json"), record)    # what became slower, and what cannot be compared

A unit of a task is one update, one prompt read, one decoding step or one text. Every number is a number; an unknown one
is null. `ratio` is a model's time over the dense model's, in pairs timed one after the other: above 1 is slower.
Needs no torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from run import records
from run.records import machine_of
from run.settings import Config
from support.files import shown
from support.options import EXPERIMENT, options_of
from support.schema import ABOVE_ZERO, COMMIT, COUNT, FITS, FLAG, LINE, NAME, NUMBER, OBJECT, POSITIVE, TEXT, mismatches

FORMAT = "charmoe bench 1"
WAY_OUT = "make it again with bench.py"
DENSE = "dense"  # the model that ratios are to
REFERENCE = "reference"  # begins the names of models that run as in a plain eager script
TASKS = {"train": "training", "prefill": "reading the prompt", "decode": "decoding", "papers": "the papers' protocol"}
WORSE_RATIO, WORSE_TIME = 1.10, 1.25  # a median that grew by such a factor may count as slower: see compare
FEWEST = 10  # timings of a measurement that can be compared
SIZE_OF_A_BATCH = ("batch_size", "block_size", "gradient_accumulation_steps")

# ---------------------------------------------------------------------------------------------------------------------
# What a record holds: see support/schema.py for how to read this

SPREAD = {"median": ABOVE_ZERO, "p10": ABOVE_ZERO, "p90": ABOVE_ZERO, "n": POSITIVE}
MODEL = {
    "title": LINE,
    "config": OBJECT,  # settings.Config knows its keys
    "parameters": dict.fromkeys(("total", "active", *records.KINDS_OF_PARAMETERS), COUNT),
    "flops_per_token": COUNT,  # in training
    "backend": {"train": LINE, "decode": LINE},  # that ran
    "checks": [{"what": LINE, "error": NUMBER, "limit": NUMBER}],
    "compile_seconds": {"train": (NUMBER, None), "decode": (NUMBER, None)},  # null where nothing was compiled
}
SCHEMA = {
    "format": TEXT,
    "size": NAME,
    "quick": FLAG,
    "flags?": [LINE],  # of speed/flags.py that were on; none where it is missing
    "machine": records.SCHEMA["machine"],
    "git": {"commit": (COMMIT, None), "dirty": (FLAG, None)},
    "attention?": (LINE, None),  # kernels of prefill and of sampling without a cache; null or missing: torch's choice
    "others": {"core_seconds": (NUMBER, None), "device_bytes": (COUNT, None)},  # over the whole bench
    "seconds": ABOVE_ZERO,  # of the whole bench
    "ceilings": {"flops_per_second": ABOVE_ZERO, "bytes_per_second": ABOVE_ZERO},  # measured in the same bench
    "models": OBJECT,  # name -> MODEL, in the order of the tables
    "measurements": [
        {
            "model": TEXT,
            "task": TEXT,
            "batch_size": POSITIVE,
            "tokens": POSITIVE,  # of one unit, over all sequences
            "seconds": SPREAD,  # of one unit
            "ratio": (SPREAD, None),  # null for dense itself
            "tokens_per_second": NUMBER,  # in total, from the median
            "floor": {"flops": NUMBER, "bytes": NUMBER, "seconds": NUMBER},  # the least that a unit can take
            "peak_memory_bytes": (COUNT, None),
        }
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# What a record says


def measurements_of(record) -> dict[tuple[str, str, int], dict]:
    """(model, task, batch size) -> its measurement."""
    return {(one["model"], one["task"], one["batch_size"]): one for one in record["measurements"]}


def batch_sizes(record, task) -> list[int]:
    return sorted({one["batch_size"] for one in record["measurements"] if one["task"] == task})


def inverse_ratio(ratio) -> dict:
    """The ratio of speeds, from a ratio of times."""
    return {"median": 1 / ratio["median"], "p10": 1 / ratio["p90"], "p90": 1 / ratio["p10"], "n": ratio["n"]}


def doubts(record) -> list[str]:
    """Reasons to trust a bench less, a sentence each."""
    found, held = [], record["others"]["device_bytes"]
    if not records.is_clean(record):
        found.append("The code had uncommitted changes." if record["git"]["dirty"] else "No commit says what code ran.")
    if not is_undisturbed(record):
        share, why = others_share(record), "It is not known whether others used the machine"
        if record["machine"]["device_type"] != "cuda" and share is not None:
            why = f"Others took {share:.0%} of the cores' time"
        elif held is not None:
            why = f"Others held up to {held / 2**30:.1f} GiB of the device's memory"
        found.append(f"{why}: times may be too long; ratios, which are of pairs, suffer less.")
    return found


def note_of_references(record) -> list[str]:
    """A sentence on the references, which decode without a cache, if any were measured."""
    names = {name for name, task, _ in measurements_of(record) if task == "decode" and name.startswith(REFERENCE)}
    titles = "; ".join(model["title"] for name, model in record["models"].items() if name in names)
    return [f"Without a cache, the whole window again for each character: {titles}."] if titles else []


def from_to(numbers) -> str:
    """'40', or '10 to 40'"""
    numbers = set(numbers)
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def spread_text(spread, scale=1) -> str:
    """'1.22 [1.18, 1.26]': the median, the 10th and the 90th percentile."""
    digits = digits_of(scale * spread["median"])
    median, low, high = (f"{scale * spread[key]:,.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} [{low}, {high}]"


def significant(value) -> str:
    """'0.0123', '1.23', '1,235': three significant digits, or a whole number."""
    return f"{value:,.{digits_of(value)}f}"


def digits_of(value):
    """Digits after the point of a number with three significant ones."""
    return max(0, 2 - math.floor(math.log10(value))) if value else 0


def is_undisturbed(record) -> bool:
    """Whether other programs left the hardware to the bench; false where it is unknown."""
    machine, others = record["machine"], record["others"]
    return records.is_exclusive(machine["device_type"], others_share(record), others["device_bytes"])


def others_share(record):
    """Share of all cores' time that other programs took; None where it is unknown."""
    return records.cpu_share(record["others"], record["seconds"], record["machine"])


def config_of(model) -> Config:
    return Config.from_dict(model["config"])


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def problems(record) -> list[str]:
    """Everything that is wrong with a record, a line each. Contradictions are looked for only where all fields are of
    the right kind and the configs are valid."""
    wrong = records.kind_problems(record, FORMAT, SCHEMA)
    models = record["models"].items() if not wrong else ()
    for name, model in models:
        wrong += [] if FITS[NAME](name) else [f"models has {shown(name)}; expected {NAME}"]
        wrong += mismatches(model, MODEL, f"models.{name}")
    for name, model in models if not wrong else ():
        wrong += records.config_in(model["config"], f"models.{name}.config")[1]
    return wrong or [message for holds, message in rules(record) if not holds]


def rules(record):
    """(whether it holds, what to say if not) of each rule that the tables and comparisons rely on."""
    found = measurements_of(record)
    yield DENSE in record["models"], f"models has no {DENSE!r}, which ratios are to"
    yield len(found) == len(record["measurements"]) > 0, "measurements: expected one or more, no two of them alike"
    for number, one in enumerate(record["measurements"]):
        where, name, task = f"measurements[{number}]", one["model"], one["task"]
        for key, value, known in (("model", name, record["models"]), ("task", task, TASKS)):
            yield value in known, f"{where}.{key} is {shown(value)}; expected {' or '.join(known)}"
        yield (name == DENSE) == (one["ratio"] is None), f"{where}.ratio: expected null for {DENSE}, and only for it"
        missing = f"{where}: {DENSE} was not measured at {task}, batch {one['batch_size']}, so there is no ratio to it"
        yield (DENSE, task, one["batch_size"]) in found, missing


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path, name=None) -> dict:
    """The record in a file, which messages call `name`. RecordError: what is wrong with it, in a line."""
    return records.read(path, name, problems, WAY_OUT)


def read_all(folder) -> tuple[list[tuple[Path, dict]], list[str]]:
    """(path, record) of each bench in folder/bench/*.json, sorted by path; and a line for each that is left out: an
    invalid record, a quick bench, or a copy."""
    folder = Path(folder)
    pairs, left_out = [], []
    paths = sorted((folder / records.BENCH).glob("*.json"))
    for path, name, record in records.read_each(paths, folder.parent, read, left_out):
        twins = [other for other, found in pairs if found == record]
        if record["quick"]:
            left_out.append(f"{name}: a quick bench, which is too short to be evidence; make it without --quick")
        elif record.get("flags"):
            tried = ",".join(record["flags"])
            left_out.append(f"{name}: a bench with --flags={tried}, which no run has by itself; make it without flags")
        elif twins:
            left_out.append(f"{name}: the same bench as {twins[0].relative_to(folder.parent)}; delete one")
        else:
            pairs.append((path, record))
    return pairs, left_out


# ---------------------------------------------------------------------------------------------------------------------
# What became slower


class Compared(NamedTuple):
    """An older and a newer bench, a line each."""

    slower: list[str]  # in the newer one
    not_compared: list[str]  # and why


def compare(old, new) -> Compared:
    """What became slower in the new bench, and what this cannot tell.

    A number is worse if its two p10–p90 ranges do not overlap and its median grew by more than 10% (ratios) or 25%
    (times), each from at least 10 timings. A model is judged by its ratio to the dense model, and the dense model by
    its ratio to the eager reference, since a disturbance of the machine reaches both of a pair. A slowdown that all
    models share shows only in times, which are compared only if both benches had the same machine to themselves.

    Why these limits: 16 processes timed unchanged code on a core that others used too. Of their 240 ordered pairs, this
    rule calls no ratio slower from 20 timings, at most 2% from 10, and up to 8% from 5; without the ranges, up to 24%.
    Medians of seconds differed fourfold. The price: a slowdown smaller than the spread, 12% to 41%, is not seen.
    """
    for what, before, after in (
        ("size", old["size"], new["size"]),
        ("device", old["machine"]["device_type"], new["machine"]["device_type"]),
    ):
        if before != after:
            return Compared([], [f"nothing is compared: the {what} is {after}, was {before}"])
    was, now, why_no_times = measurements_of(old), measurements_of(new), why_times_are_not_compared(old, new)
    changes = {name: config_changes(old, new, name) for name in {**old["models"], **new["models"]}}
    slower, models = [], {}  # a reason -> the models that are not compared for it
    for name, task, batch_size in [key for key in {**was, **now} if not changes[key[0]]]:
        key, where = (name, task, batch_size), f"{TASKS[task]}, batch {batch_size}"
        why = why_not_compared(was.get(key), now.get(key))
        numbers = [] if why else ratios_of(was, now, key)
        if not (why or why_no_times):
            numbers.append((was[key]["seconds"], now[key]["seconds"], "ms", 1000, WORSE_TIME))
        if not numbers:
            why = why or f"without {REFERENCE} in both, nothing tells of it but times"
            models.setdefault(f"{where}: {why}", []).append(name)
        worse = [
            f"{spread_text(after, scale)} {unit}, was {spread_text(before, scale)} {unit}"
            for before, after, unit, scale, margin in numbers
            if after["p10"] > before["p90"] and after["median"] > margin * before["median"]
        ]
        if worse and not name.startswith(REFERENCE):  # nobody makes those faster
            slower.append(f"{name}, {where}: {'; '.join(worse)}")
    missing = [f"{name}: {'; '.join(lines)}" for name, lines in changes.items() if lines]
    missing += [f"{why} ({', '.join(names)})" for why, names in models.items()]
    return Compared(slower, missing + ([f"times: {why_no_times}"] if why_no_times else []))


def ratios_of(was, now, key):
    """[(ratio before, ratio after, unit, scale, factor from which it is worse)] of a measurement, or [] without one."""
    name, *where = key
    reference = (REFERENCE, *where)
    if name != DENSE:
        return [(was[key]["ratio"], now[key]["ratio"], "× dense", 1, WORSE_RATIO)]
    if reference not in was or reference not in now:
        return []
    return [(*(inverse_ratio(found[reference]["ratio"]) for found in (was, now)), "× the reference", 1, WORSE_RATIO)]


def why_times_are_not_compared(old, new) -> str:
    """Why the times of two benches cannot be compared; "" where they can."""
    if machine_of(old) != machine_of(new):
        return f"the machine is {machine_of(new)}, was {machine_of(old)}"
    busy = [which for which, record in (("old", old), ("new", new)) if not is_undisturbed(record)]
    return f"others used the machine during the {' and the '.join(busy)} bench, or may have" if busy else ""


def config_changes(old, new, name) -> list[str]:
    """Why a name stands for different models in two benches, a line each; [] where it is the same."""
    missing = [when for when, record in (("before", old), ("now", new)) if name not in record["models"]]
    if missing:
        return [f"not measured {missing[0]}"]
    options, (ours, theirs) = options_of(Config), (config_of(record["models"][name]) for record in (new, old))
    return [
        f"{key} is {shown(now)}, was {shown(before)}"
        for key, now, before in ours.differences(theirs, (EXPERIMENT,))
        if options[key].group in ("Model", "Mixture of experts") or key in SIZE_OF_A_BATCH
    ]


def why_not_compared(before, now) -> str:
    """Why two measurements cannot be compared, None where there is none; "" where they can."""
    if before is None or now is None:
        return f"not measured {'now' if before else 'before'}"
    if before["tokens"] != now["tokens"]:
        return f"{now['tokens']} characters, was {before['tokens']}"
    return f"timed fewer than {FEWEST} times" if min(one["seconds"]["n"] for one in (before, now)) < FEWEST else ""
