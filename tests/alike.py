"""Runs that have everything random and everything stateful in them, and whether two of them are the same run."""

import json

import torch

from run import checkpoint

# Everything random, and everything that is summed up between two log lines, at once.
HARD = dict(
    n_expert=4, expert_top_k=2, capacity_factor=0.5, dropout=0.2, router_jitter=0.1, gradient_accumulation_steps=2
)
# Routers and schedules that have a state of their own.
STATEFUL = {
    "random": dict(
        router="random", aux_loss="none", expert_dropout=0.2, expert_dropout_end=0.1, expert_dropout_schedule="cosine"
    ),
    "bias": dict(router_bias_rate=0.01, gate="sigmoid", aux_loss="none", gradient_accumulation_steps=2),
    "annealed": dict(
        router_temperature=3.0, router_temperature_schedule="linear", aux_loss="cv2", aux_loss_coef_end=0.5,
        aux_loss_coef_schedule="linear", router_level="segment", segment_size=5,
    ),
    "hash": dict(router="hash", aux_loss="none", n_shared_expert=1),
    "by block": dict(n_expert_by_block="4,2", share_experts=False, expert_inner_dropout=0.1),
    "freeze": dict(router_freeze_step=6, router="two_level", weight_decay=0.5),
    "one set": dict(share_experts=True, blocks_per_router=0, router="two_level", capacity_factor=0.75),
}  # fmt: skip
# What may differ between a run and the same run again: clocks, and where and how it was made.
INCIDENTAL = {
    "train_seconds",
    "others",
    "exclusive",
    "step_ms",
    "tokens_per_second",
    "seconds",
    "median_step_ms",
    "peak_memory_bytes",
    "git",
    "resumed",
    "metrics_bytes",
    "out_dir",
    "init_from",
    "overwrite",
    "save_in_background",
    "save_every",
    "capture",
}


FILES = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "summary.json"}  # of a complete run


def record_of(out_dir):
    return json.loads((out_dir / "summary.json").read_text())


def lines_of(out_dir, kind=None):
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def steps_of(out_dir, kind):
    return [line["step"] for line in lines_of(out_dir, kind)]


def weights_of(out_dir, name="ckpt.pt"):
    return checkpoint.load(out_dir / name)["model"]


def essence(value):
    """value without what is incidental; tensors as bytes, so that == compares every bit."""
    if isinstance(value, dict):
        return {key: essence(inner) for key, inner in value.items() if key not in INCIDENTAL}
    if isinstance(value, (list, tuple)):
        return [essence(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    return value


def assert_same_run(one, other):
    """Bit for bit: weights, optimiser, best weights, sums, random state, metrics, record."""
    for name, keys in (
        ("ckpt.pt", ("model", "optimizer", "best", "progress", "processes")),
        ("best.pt", ("model", "step")),
    ):
        a, b = checkpoint.load(one / name), checkpoint.load(other / name)
        for key in keys:
            assert essence(a[key]) == essence(b[key]), (name, key)
    assert essence(lines_of(one)) == essence(lines_of(other))
    assert essence(record_of(one)) == essence(record_of(other))


def numbers_in(value, where=""):
    """(where, number) for every leaf of a record that is no text, truth value or null."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in numbers_in(inner, f"{where}/{key}")]
    if isinstance(value, list):
        return [leaf for i, inner in enumerate(value) for leaf in numbers_in(inner, f"{where}/{i}")]
    return [(where, value)]


def optimizer_steps(out_dir):
    state = checkpoint.load(out_dir / "ckpt.pt")["optimizer"]["state"]
    return {int(entry["step"]) for entry in state.values()}
