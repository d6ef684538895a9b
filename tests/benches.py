"""A plausible record of a bench, made without torch, for several test files to read and change.

bench()                                        CPU size, two cores
bench("paper", {"device": "NVIDIA H200"})      on a GPU
"""

import copy
import dataclasses

from papers import TABLES
from run import records
from speed import bench_records

ROWS = {
    "reference": ("Dense, eager script", "A", "shakespeare_dense", {}),
    "dense": ("Dense", "A", "shakespeare_dense", {}),
    "moe4": ("4 experts, top-1", "A", "shakespeare_moe4", {}),
    "moe4_top2": ("4 experts, top-2", "A", "shakespeare_moe4", {"expert_top_k": 2}),
    "moe4_linear": ("4 linear experts, top-2", "B", "shakespeare_top2", {}),
    "reference_moe4": ("4 experts, eager script", "A", "shakespeare_moe4", {}),
}
# (task, batch size) -> seconds of a unit of the dense model, and the ratios of all models to it, in the order of ROWS
TIMES = {
    ("train", 12): (0.045, (1.08, 1, 1.22, 1.84, 1.07, 1.71)),
    ("prefill", 1): (0.0021, (1.05, 1, 1.3, 1.9, 1.1, 1.6)),
    ("prefill", 8): (0.0095, (1.05, 1, 1.25, 1.85, 1.08, 1.5)),
    ("prefill", 32): (0.037, (1.05, 1, 1.22, 1.8, 1.07, 1.45)),
    ("decode", 1): (0.0006, (6.4, 1, 1.11, 1.24, 1.06, 9.2)),
    ("decode", 8): (0.0011, (19.0, 1, 1.35, 1.6, 1.12, 24.5)),
    ("decode", 32): (0.0021, (36.0, 1, 1.44, 1.9, 1.1, 41.0)),
    ("papers", 1): (2.1, (1.02, 1, 1.45, 1.7, 1.12, 1.9)),
}
CPU = {
    "device": "AMD EPYC", "device_type": "cpu", "cores": 2, "threads": 2, "torch": "2.13.0+cpu", "cuda": None,
    "python": "3.12.3", "dtype": "float32", "compile": False,
}  # fmt: skip
GPU = {
    **CPU, "device": "NVIDIA H200", "device_type": "cuda", "torch": "2.13.0+cu128", "cuda": "12.8", "dtype": "bfloat16",
    "compile": True,
}  # fmt: skip


def bench(size="cpu", machine=CPU, n=40, wide=0.06):
    """n: timings of each measurement; wide: p90 − p10, as a share of the median."""
    configs = {
        name: dataclasses.replace(TABLES[table].row(row).config_at(size), **changes)
        for name, (_, table, row, changes) in ROWS.items()
    }
    record = {
        "format": bench_records.FORMAT,
        "size": size,
        "quick": False,
        "machine": copy.deepcopy(machine),
        "git": {"commit": "0123456789" * 4, "dirty": False},
        "others": {"core_seconds": 4.0, "device_bytes": None if machine["device_type"] == "cpu" else 2**29},
        "seconds": 400.0,
        "ceilings": {"flops_per_second": 1.8e11, "bytes_per_second": 1.25e10},
        "models": {name: model(config, ROWS[name][0]) for name, config in configs.items()},
    }
    record["measurements"] = [
        measurement(record, configs[name], name, task, batch, seconds, ratio, spread(n, wide))
        for (task, batch), (seconds, ratios) in TIMES.items()
        for name, ratio in zip(ROWS, ratios)
    ]
    return record


def spread(n, wide):
    return lambda median: {"median": median, "p10": median * (1 - wide / 2), "p90": median * (1 + wide / 2), "n": n}


def model(config, title):
    """Its counts are round numbers: nothing compares them with the config."""
    counts = dict.fromkeys(("total", "active", *records.KINDS_OF_PARAMETERS), 10**6)
    return {
        "title": title,
        "config": config.to_dict(),
        "parameters": counts,
        "flops_per_token": 6 * 10**6,
        "backend": {"train": "sliced" if config.n_expert else "dense", "decode": "packed weights, eager"},
        "checks": [
            {"what": "training: loss and gradients against the reference backend", "error": 1e-7, "limit": 1e-5}
        ],
        "compile_seconds": {"train": None, "decode": 12.5 if config.n_expert else None},
    }


def measurement(record, config, name, task, batch_size, seconds, ratio, spread):
    batch_size = config.batch_size if task == "train" else batch_size
    length = {"train": config.block_size, "prefill": config.block_size // 2, "decode": 1, "papers": 500}[task]
    tokens = batch_size * length
    flops, bytes_ = 4e6 * tokens, 3.2e6
    ceilings = record["ceilings"]
    return {
        "model": name,
        "task": task,
        "batch_size": batch_size,
        "tokens": tokens,
        "seconds": spread(seconds * ratio),
        "ratio": None if name == bench_records.DENSE else spread(ratio),
        "tokens_per_second": tokens / (seconds * ratio),
        "floor": {
            "flops": flops,
            "bytes": bytes_,
            "seconds": max(flops / ceilings["flops_per_second"], bytes_ / ceilings["bytes_per_second"]),
        },
        "peak_memory_bytes": 3 * 2**28 if record["machine"]["device_type"] == "cuda" else None,
    }


def find(record, model, task="train", batch_size=None):
    """The measurement of a model at a task, to be changed."""
    return next(
        one
        for one in record["measurements"]
        if (one["model"], one["task"]) == (model, task) and batch_size in (None, one["batch_size"])
    )
