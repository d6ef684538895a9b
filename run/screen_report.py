"""The last lines that train.py prints: what a person wants to know at the end of a run. Needs no torch."""

import os
import shlex

from run.records import claims_published, is_comparable, is_straight, why_not_straight
from run.settings import Config
from support.console import duration
from support.files import ROOT


def final_report(record, out_dir) -> str:
    """Losses, time, speed and load of a finished run, a line each, and the command that samples from it."""
    config = Config.from_dict(record["config"])
    dagger = "" if is_comparable(record) else " †"
    best, final, sampled = record["clean"]["best"], record["clean"]["final"], record["paper"]
    unit = record["dataset"]["unit"]

    def loss(value):
        return f"{value['nats']:.4f} nats  {value['bpc']:.4f} bits per {unit}{dagger}"

    rows = [
        ("best validation", f"{loss(best)}  (step {best['step']:,}; every {unit} of the split, predicted once)"),
        ("final validation", f"{loss(final)}  (step {final['step']:,})"),
    ]
    if record["test"]:
        rows.append(("test", f"{loss(record['test'])}  (the best checkpoint)"))
    estimates = f"{sampled['best_val']:.4f} nats at best, from {config.eval_iters} random batches an evaluation"
    if config.n_expert:
        estimates += f"; {sampled['best_val_with_aux']:.4f} with the auxiliary losses added"
    rows.append(("sampled validation", estimates))
    seconds, counts = record["seconds"], record["parameters"]
    parts = [("training", "train"), ("evaluation", "eval"), ("saving", "save"), ("compiling", "compile")]
    spent = ", ".join(f"{name} {duration(seconds[key])}" for name, key in parts if seconds[key])
    rows.append(("time", f"{duration(seconds['total'])} ({spent})"))
    speed = f"{record['tokens_per_second']:,.0f} {unit}s/s in training"
    if record["inference"]["tokens_per_second"]:
        speed += f", {record['inference']['tokens_per_second']:,.0f} in sampling without a cache"
    rows.append(("speed", speed))
    rows.append(("parameters", f"{counts['total']:,} total, {counts['active']:,} active per {unit}"))
    for number, (block, layer) in enumerate(zip(config.moe_layers, record["routing"])):
        shares = "  ".join(f"{share:4.0%}" for share in layer["load"])
        dropped = f"   {layer['drop_rate']:.1%} dropped" if config.capacity_factor else ""
        rows.append(("" if number else "load per expert", f"block {block}: {shares}{dropped}"))
    if record["leaky"]:
        rows.append(("†", "routing sees later characters: this loss is not that of a language model"))
    if claims_published(record):
        rows.append(("†", "not the published text"))
    if not is_straight(record):
        rows.append(("enters no mean", why_not_straight(record)))
    rows.append(("checkpoint", f"{out_dir}/best.pt"))
    if not record["leaky"]:
        script = os.path.relpath(ROOT / "sample.py")
        rows.append(("sample from it", f"python {script} --out_dir={shlex.quote(str(out_dir))}"))
    head = f"\n{config.title or 'run'}: {record['dataset']['name']}, seed {config.seed}"
    return "\n".join([head, *(f"  {name:<18} {text}" for name, text in rows)])
