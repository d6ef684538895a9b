"""The record of a bench: what it holds, checked and read, and what became slower from one bench to the next.

    pairs, left_out = read_all("results")                   # results/bench/*.json
    record = read("bench.json")                             # or RecordError, if damaged or in contradiction
    slower(read("results/bench/epyc-cpu.json"), record)     # a line each; not_compared says what could not be told

A unit of a task is one update, one reading of a prompt, one step of decoding, one text. Every number is a number; what
is not known is null. `ratio` is a model's time over the dense model's, pair by pair: above 1 is slower. Nothing here
needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from run import records
from run.records import COMMIT, COUNT, FLAG, LINE, NAME, NUMBER, OBJECT, TEXT, machine_of
from run.settings import Config
from support.files import shown
from support.options import EXPERIMENT, nearest, options_of

FORMAT = "charmoe bench 1"
WAY_OUT = "make it again with bench.py"
DENSE = "dense"  # what ratios are to
REFERENCE = "reference"  # dense without what makes it fast, as an eager script runs it; so begin all such models' names
TASKS = {"train": "training", "prefill": "reading the prompt", "decode": "decoding", "papers": "the papers' protocol"}
SLACK = 1.25  # between the ratio of a middling pair and what the times of both models leave room for
# When a number became worse: see slower.
WORSE_RATIO, WORSE_TIME = 1.10, 1.25
FEWEST = 10
SIZE_OF_A_BATCH = ("batch_size", "block_size", "gradient_accumulation_steps")

# ---------------------------------------------------------------------------------------------------------------------
# What a record holds, in the words of records.py

SPREAD = {"median": NUMBER, "p10": NUMBER, "p90": NUMBER, "n": COUNT}
MODEL = {
    "title": LINE,
    "config": OBJECT,  # settings.Config knows its keys
    "parameters": dict.fromkeys(("total", "active", *records.KINDS_OF_PARAMETERS), COUNT),
    "flops_per_token": COUNT,  # in training
    "backend": {"train": LINE, "decode": LINE},  # which ran
    "checks": [{"what": LINE, "error": NUMBER, "limit": NUMBER}],
    "compile_seconds": {"train": (NUMBER, None), "decode": (NUMBER, None)},  # null where nothing was compiled
}
SCHEMA = {
    "format": TEXT,
    "size": NAME,
    "quick": FLAG,
    "machine": records.SCHEMA["machine"],
    "git": {"commit": (COMMIT, None), "dirty": (FLAG, None)},
    "others": {"core_seconds": (NUMBER, None), "device_bytes": (COUNT, None)},  # over the whole bench
    "seconds": NUMBER,  # of the whole bench
    "ceilings": {"flops_per_second": NUMBER, "bytes_per_second": NUMBER},  # measured on the spot
    "models": OBJECT,  # name -> MODEL, in the order of the tables
    "measurements": [
        {
            "model": TEXT,
            "task": TEXT,
            "batch_size": COUNT,
            "tokens": COUNT,  # of one unit, over all sequences
            "seconds": SPREAD,  # of one unit
            "ratio": (SPREAD, None),  # null for dense itself
            "tokens_per_second": NUMBER,  # in total, from the median
            "floor": {"flops": NUMBER, "bytes": NUMBER, "seconds": NUMBER},  # what must be computed and moved
            "peak_memory_bytes": (COUNT, None),
        }
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# What a record says


def measured(record) -> dict[tuple[str, str, int], dict]:
    """(model, task, batch size) -> its measurement."""
    return {(one["model"], one["task"], one["batch_size"]): one for one in record["measurements"]}


def batch_sizes(record, task) -> list[int]:
    return sorted({one["batch_size"] for one in record["measurements"] if one["task"] == task})


def inverse(ratio) -> dict:
    """Of speeds, where `ratio` is of times."""
    return {"median": 1 / ratio["median"], "p10": 1 / ratio["p90"], "p90": 1 / ratio["p10"], "n": ratio["n"]}


def doubts(record) -> list[str]:
    """Sentences on what makes a bench weaker evidence; none where nothing does."""
    found, machine, held = [], record["machine"], record["others"]["device_bytes"]
    if not records.is_clean(record):
        found.append("The code had uncommitted changes." if record["git"]["dirty"] else "No commit says what code ran.")
    if not is_exclusive(record):
        share = None if machine["device_type"] == "cuda" else cpu_share(record)
        why = "It is not known whether others used the machine"
        if share is not None:
            why = f"Others took {share:.0%} of the cores' time"
        elif held is not None:
            why = f"Others held up to {held / 2**30:.1f} GiB of the device's memory"
        found.append(f"{why}: times may be too long; ratios, which are of pairs, suffer less.")
    return found


def note_of_references(record) -> list[str]:
    """A sentence on those that decode another way, where there are any."""
    measured_too = {one["model"] for one in record["measurements"] if one["task"] == "decode"}
    titles = [
        model["title"]
        for name, model in record["models"].items()
        if name.startswith(REFERENCE) and name in measured_too
    ]
    return [f"Without a cache, the whole window again for each character: {'; '.join(titles)}."] if titles else []


def from_to(numbers) -> str:
    """'40', or '10 to 40'"""
    numbers = set(numbers)
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def spread_text(spread, scale=1) -> str:
    """'1.22 [1.18, 1.26]': the median, the 10th and the 90th percentile"""
    digits = digits_of(scale * spread["median"])
    median, low, high = (f"{scale * spread[key]:,.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} [{low}, {high}]"


def significant(value) -> str:
    """'0.0123', '1.23', '1,235': to three digits, or to whole numbers"""
    return f"{value:,.{digits_of(value)}f}"


def digits_of(value):
    """After the point, for three that count."""
    return max(0, 2 - math.floor(math.log10(value))) if value else 0


def is_exclusive(record) -> bool:
    """Whether others left the hardware to the bench; not known counts as no."""
    machine, others = record["machine"], record["others"]
    return records.is_exclusive(machine["device_type"], cpu_share(record), others["device_bytes"])


def cpu_share(record):
    """Of the time of all cores, the share that others took; None where it is not known."""
    return records.cpu_share(record["others"], record["seconds"], record["machine"])


def config_of(model) -> Config:
    return Config.from_dict(model["config"])


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def problems(record) -> list[str]:
    """All that is wrong with a record, a line each: with the fields and their kinds; where these are right, with the
    configs; where they are right too, with what else contradicts itself."""
    if not isinstance(record, dict):
        return [f"{shown(record)} is no record of bench.py; expected {OBJECT}"]
    if record.get("format") != FORMAT:
        return [records.format_problem(record.get("format"), FORMAT)]
    wrong = list(records.mismatches(record, SCHEMA))
    models = record["models"].items() if not wrong else ()
    for name, model in models:
        wrong += [] if records.FITS[NAME](name) else [f"models has {shown(name)}; expected {NAME}"]
        wrong += records.mismatches(model, MODEL, f"models.{name}")
    if wrong:
        return wrong
    configs = {}
    for name, model in models:
        configs[name], why = records.config_in(model["config"], f"models.{name}.config")
        wrong += why
    if wrong:
        return wrong
    rules = [rule for rules_of in RULES for rule in rules_of(record, configs)]
    return [message for holds, message in rules if not holds]


# What must hold: (record, {model: its Config}) -> (whether it does, what to say if not)


def bench_rules(record, configs):
    yield from records.hardware_rules(record["machine"], record["others"])
    for name, value in record["ceilings"].items():
        yield value > 0, f"ceilings.{name} is 0"
    # Half of the timings of each measurement took its median or longer.
    least = sum(one["seconds"]["n"] * one["seconds"]["median"] / 2 for one in record["measurements"])
    yield record["seconds"] >= least, f"seconds is {record['seconds']}, less than the measurements took"
    yield record["measurements"], "measurements is empty"
    yield DENSE in configs, f"models has no {DENSE!r}, which ratios are to"


def model_rules(record, configs):
    for name, config in configs.items():
        where, model = f"models.{name}", record["models"][name]
        counts, is_dense = model["parameters"], name in (DENSE, REFERENCE)
        message = f"{where}.config.n_expert is {config.n_expert}, but the model is called {name}"
        yield not (is_dense and config.n_expert), message
        yield records.active_rule(counts, f"{where}.parameters")
        # What was counted with is not in the record: as many symbols as the embedding has room for.
        size = records.recomputed_size(counts, counts["embedding"] // config.n_embd - config.block_size, config)
        expected = {"parameters": size["parameters"]}
        if "training_flops_per_token" in size:
            expected["flops_per_token"] = size["training_flops_per_token"]
        yield from ((False, message) for message in records.differences(model, expected, where))
        for number, check in enumerate(model["checks"]):
            message = f"{where}.checks[{number}].error is {check['error']}, above its limit, {check['limit']}"
            yield check["error"] <= check["limit"], f"{message}: {check['what']}"


def measurement_rules(record, configs):
    seen, is_cuda = set(), record["machine"]["device_type"] == "cuda"
    for number, one in enumerate(record["measurements"]):
        where, name, task = f"measurements[{number}]", one["model"], one["task"]
        for key, value, known in (("model", name, configs), ("task", task, TASKS)):
            guess = nearest(value, known)
            hint = f"; nearest: {guess}" if guess else ""
            yield value in known, f"{where}.{key} is {shown(value)}; expected {' or '.join(known)}{hint}"
        yield one["batch_size"] > 0, f"{where}.batch_size is 0"
        key = name, task, one["batch_size"]
        yield key not in seen, f"{where} is of {name}, {task}, batch {one['batch_size']}, as one before it"
        seen.add(key)
        if name in configs and task in TASKS:
            tokens = tokens_of(one, configs[name])
            yield one["tokens"] == tokens, f"{where}.tokens is {one['tokens']}; expected {tokens} of {task}"
        message = f"{where}.batch_size is {one['batch_size']}; expected 1 of the papers' protocol"
        yield task != "papers" or one["batch_size"] == 1, message
        message = f"{where}.peak_memory_bytes is {one['peak_memory_bytes']}, but the device is not CUDA"
        yield is_cuda or one["peak_memory_bytes"] is None, message


def tokens_of(measurement, config):
    """Characters of one unit of the task, over all sequences."""
    return {
        "train": measurement["batch_size"] * config.block_size * config.gradient_accumulation_steps,
        "prefill": measurement["batch_size"] * (config.block_size // 2),
        "decode": measurement["batch_size"],
        "papers": max(1, measurement["tokens"]),  # a text, as long as it was asked for
    }[measurement["task"]]


def time_rules(record, configs):
    found = measured(record)
    for number, one in enumerate(record["measurements"]):
        where, seconds, ratio, floor = f"measurements[{number}]", one["seconds"], one["ratio"], one["floor"]
        yield from spread_rules(seconds, f"{where}.seconds")
        rate = one["tokens"] / (seconds["median"] or math.inf)
        message = f"{where}.tokens_per_second is {one['tokens_per_second']}, but tokens / seconds.median is {rate}"
        yield close(one["tokens_per_second"], rate), message
        ceilings = record["ceilings"]
        least = max(
            floor["flops"] / (ceilings["flops_per_second"] or math.inf),
            floor["bytes"] / (ceilings["bytes_per_second"] or math.inf),
        )
        message = f"{where}.floor.seconds is {floor['seconds']}, but its flops, bytes and the ceilings make it {least}"
        yield close(floor["seconds"], least), message
        is_dense = one["model"] == DENSE
        yield is_dense or ratio, f"{where}.ratio is null; expected that of {one['model']} to {DENSE}"
        yield not (is_dense and ratio), f"{where}.ratio is there; expected null, for {DENSE} is what ratios are to"
        if ratio and not is_dense:
            yield from spread_rules(ratio, f"{where}.ratio")
            yield from ratio_rules(one, found.get((DENSE, one["task"], one["batch_size"])), where)


def spread_rules(spread, where):
    low, median, high = spread["p10"], spread["median"], spread["p90"]
    yield 0 < low <= median <= high, f"{where} has p10 {low}, median {median}, p90 {high}; expected them to rise from 0"
    yield spread["n"] > 0, f"{where}.n is 0"


def ratio_rules(one, dense, where):
    """dense: the measurement that the ratio of this one is to; None where there is none."""
    yield dense, f"{where}.ratio is there, but {DENSE} was not measured at {one['task']}, batch {one['batch_size']}"
    if dense:
        # Where a middling pair's ratio must lie. The slack is for what drifts between pairs, and for few of them.
        ours, theirs, ratio = one["seconds"], dense["seconds"], one["ratio"]["median"]
        low = ours["p10"] / (theirs["p90"] or math.inf) / SLACK
        high = ours["p90"] / (theirs["p10"] or math.inf) * SLACK
        message = f"{where}.ratio.median is {ratio}, but the seconds of both make it {low:.3g} to {high:.3g}"
        yield low <= ratio <= high, message


RULES = (bench_rules, model_rules, measurement_rules, time_rules)


def close(a, b):
    """Equal but for rounding to 4 digits."""
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path, name=None) -> dict:
    """The record in the file at `path`, which messages call `name`. RecordError: what is wrong with it, in a line."""
    return records.read(path, name, problems, WAY_OUT)


def read_all(folder) -> tuple[list[tuple[Path, dict]], list[str]]:
    """(path, record) of the benches in folder/bench/*.json, sorted by path; and what is left out of them, a line each,
    with paths from the folder's parent. Left out are files that `read` refuses, quick benches, and copies."""
    folder = Path(folder)
    pairs, left_out = [], []
    paths = sorted((folder / records.BENCH).glob("*.json"))
    for path, name, record in records.read_each(paths, folder.parent, read, left_out):
        twins = [other for other, found in pairs if found == record]
        if record["quick"]:
            left_out.append(f"{name}: a quick bench, which is too short to be evidence; make it without --quick")
        elif twins:
            left_out.append(f"{name}: the same bench as {twins[0].relative_to(folder.parent)}; delete one")
        else:
            pairs.append((path, record))
    return pairs, left_out


# ---------------------------------------------------------------------------------------------------------------------
# What became slower


def slower(old, new) -> list[str]:
    """What is slower in the new bench than in the old one, a line each; what cannot be told is not_compared's.

    A number is worse where the two p10–p90 ranges do not overlap and the median is worse by more than 10% (ratios) or
    25% (times), from at least 10 timings each. A model is judged by its ratio to dense, and dense by its ratio to the
    eager reference, for what disturbs the machine disturbs both of a pair. What dense and the reference share shows in
    times alone. Those are judged only where both benches had the same machine to themselves, and by the wider margin.

    Why: 16 processes timed unchanged code (train and decode, one thread) on a core that others used as well. Of their
    240 ordered pairs, this rule calls no ratio slower from 40 or 20 timings, at most 2% from 10, and up to 8% from 5;
    without the ranges, the 10% alone would call up to 9% slower from 40 and 24% from 5. Medians of seconds differed
    fourfold: a quarter of the pairs would be called slower, whatever the margin. The price is that a slowdown smaller
    than the spread is not seen; ranges of ratios were 12% to 22% wide in training, and 24% to 41% in decoding.
    """
    lines = []
    for key in shared(old, new):
        name, task, batch_size = key
        worse = [
            f"{written(after, unit)}, was {written(before, unit)}"
            for before, after, unit, margin in judged(old, new, key)
            if after["p10"] > before["p90"] and after["median"] > margin * before["median"]
        ]
        if worse:
            lines.append(f"{name}, {TASKS[task]}, batch {batch_size}: {'; '.join(worse)}")
    return lines


def not_compared(old, new) -> list[str]:
    """What of two benches cannot be compared, and why, a line each."""
    whole = whole_reason(old, new)
    if whole:
        return [f"nothing is compared: {whole}"]
    reason, lines = times_reason(old, new), []
    for name in dict.fromkeys([*old["models"], *new["models"]]):
        changes = unlike(old, new, name)
        lines += [f"{name}: {'; '.join(changes)}"] if changes else []
    models = {}  # (task, batch size, why) -> of which
    for key in dict.fromkeys([*measured(old), *measured(new)]):
        name, task, batch_size = key
        why = "" if unlike(old, new, name) else key_reason(old, new, key)
        if why:
            models.setdefault((TASKS[task], batch_size, why), []).append(name)
    lines += [f"{task}, batch {batch}: {why} ({', '.join(names)})" for (task, batch, why), names in models.items()]
    return [*lines, f"times: {reason}"] if reason else lines


def shared(old, new) -> list[tuple[str, str, int]]:
    """(model, task, batch size) of all that can be compared, but for the references, which nobody works on."""
    if whole_reason(old, new):
        return []
    return [
        key
        for key in measured(old)
        if not key[0].startswith(REFERENCE) and not unlike(old, new, key[0]) and not key_reason(old, new, key)
    ]


def judged(old, new, key) -> Iterator[tuple[dict, dict, str, float]]:
    """(spread before, spread after, unit, how many times as much is worse) of each number that tells of a model."""
    name, *where = key
    was, now, reference = measured(old), measured(new), (REFERENCE, *where)
    if name != DENSE:
        yield was[key]["ratio"], now[key]["ratio"], "× dense", WORSE_RATIO
    elif reference in was and reference in now:
        yield inverse(was[reference]["ratio"]), inverse(now[reference]["ratio"]), "× the reference", WORSE_RATIO
    if not times_reason(old, new):
        yield was[key]["seconds"], now[key]["seconds"], "ms", WORSE_TIME


def written(spread, unit):
    return f"{spread_text(spread, 1000 if unit == 'ms' else 1)} {unit}"


def whole_reason(old, new) -> str:
    """Why nothing of two benches can be compared; empty where something can."""
    for what, before, after in (
        ("size", old["size"], new["size"]),
        ("device", old["machine"]["device_type"], new["machine"]["device_type"]),
    ):
        if before != after:
            return f"the {what} is {after}, was {before}"
    return ""


def times_reason(old, new) -> str:
    """Why times of two benches cannot be compared; empty where they can."""
    if machine_of(old) != machine_of(new):
        return f"the machine is {machine_of(new)}, was {machine_of(old)}"
    busy = [which for which, record in (("old", old), ("new", new)) if not is_exclusive(record)]
    return f"others used the machine during the {' and the '.join(busy)} bench, or may have" if busy else ""


def unlike(old, new, name) -> list[str]:
    """Why what both call by this name is not one model; empty where it is."""
    missing = [when for when, record in (("before", old), ("now", new)) if name not in record["models"]]
    if missing:
        return [f"not measured {missing[0]}"]
    options, (ours, theirs) = options_of(Config), (config_of(record["models"][name]) for record in (new, old))
    return [
        f"{key} is {shown(now)}, was {shown(before)}"
        for key, now, before in ours.differences(theirs, (EXPERIMENT,))
        if options[key].group in ("Model", "Mixture of experts") or key in SIZE_OF_A_BATCH
    ]


def key_reason(old, new, key) -> str:
    """Why a measurement of one model cannot be compared; empty where it can."""
    was, now = measured(old), measured(new)
    if key not in was or key not in now:
        return f"not measured {'before' if key not in was else 'now'}"
    if was[key]["tokens"] != now[key]["tokens"]:
        return f"{now[key]['tokens']} characters, was {was[key]['tokens']}"
    if min(found[key]["seconds"]["n"] for found in (was, now)) < FEWEST:
        return f"timed fewer than {FEWEST} times"
    return "" if any(judged(old, new, key)) else f"without {REFERENCE} in both, nothing tells of it but times"
