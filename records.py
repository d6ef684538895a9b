"""The record of a complete run: what summary.json holds, what results/ keeps, and the last lines on the screen.

Every number is a number; what is not known is null. Losses are nats and bits per character (per byte on enwik8).
"""

import os
import shlex
import statistics

import machine as machines
from settings import Config

FORMAT = "charmoe record 2"
# Times of a run count only when others left the hardware to it: at most this share of the cores' time on a CPU; on CUDA
# no more memory than the context of the run's own process takes.
OTHERS_CPU_SHARE = 0.05
OTHERS_DEVICE_BYTES = 2**30
# load: per MoE layer, each expert's share of the choices on the validation split
EVALUATION_KEYS = ("step", "clean", "paper", "train_mode", "train_seconds", "load")


def record_of(config, dataset, model, machine, progress, test, speeds) -> dict:
    """progress: train.py's, at the end of the run; test: an `evaluate.Clean`, or None without a test split; speeds: of
    `evaluate.inference_speed`."""
    evaluations = progress["evaluations"]
    best = min(evaluations, key=lambda line: line["clean"]["nats"])  # the first, if several
    final = evaluations[-1]
    tokens = config.max_iters * config.batch_size * config.block_size * config.gradient_accumulation_steps
    seconds, others, description = progress["seconds"], progress["others"], machines.describe(machine)
    core_seconds = others["core_seconds"]
    cpu_share = None if core_seconds is None else core_seconds / (seconds["total"] * description["cores"])
    return {
        "format": FORMAT,
        "run_id": config.run_id,
        "title": config.title,
        "config": config.to_dict(),
        "dataset": dataset.describe(),
        "leaky": not config.is_causal,
        "parameters": model.count_parameters(),
        "training_flops_per_token": model.flops_per_token(),
        "git": progress["git"],
        "machine": description,
        "others": {"cpu_share": cpu_share, "device_bytes": others["device_bytes"]},
        "exclusive": is_exclusive(description["device_type"], cpu_share, others["device_bytes"]),
        "iterations": config.max_iters,
        "resumed": progress["resumed"],  # times
        "tokens": tokens,
        "epochs": tokens / dataset.sizes["train"],
        "clean": {"best": {**best["clean"], "step": best["step"]}, "final": {**final["clean"], "step": final["step"]}},
        "paper": {
            "best_val": min(line["paper"]["val"] for line in evaluations),
            "best_val_with_aux": min(line["paper"]["val_with_aux"] for line in evaluations),
            **{f"final_{key}": value for key, value in final["paper"].items()},
        },
        "train_mode": final["train_mode"],  # the loss that training saw: with dropout, over the last steps
        "test": None if test is None else {"nats": test.nats, "bpc": test.bpc, "step": best["step"]},
        "seconds": seconds,  # train, eval, save, compile, total
        "median_step_ms": statistics.median(progress["step_ms"]),  # of the means over log intervals
        "tokens_per_second": tokens / seconds["train"],
        "inference": {  # the papers' way: batch 1, eager, no cache
            "samples": len(speeds),
            "tokens_per_second": statistics.mean(speeds) if speeds else None,
        },
        "peak_memory_bytes": machines.peak_memory(machine),
        "routing": final["routing"],  # per MoE layer, over the validation split, at the last step
        "evaluations": [{key: line[key] for key in EVALUATION_KEYS} for line in evaluations],
    }


def is_exclusive(device_type, cpu_share, device_bytes) -> bool:
    """Whether others left the hardware to the run; not known counts as no."""
    if device_type == "cuda":
        return device_bytes is not None and device_bytes <= OTHERS_DEVICE_BYTES
    return cpu_share is not None and cpu_share <= OTHERS_CPU_SHARE


def is_comparable(record) -> bool:
    """False where a dagger belongs: a text that is not the published one, or routing that sees later characters."""
    return record["dataset"]["canonical"] and not record["leaky"]


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
    script = os.path.relpath(machines.ROOT / "sample.py")
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
