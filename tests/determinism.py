"""How far two runs of one experiment end apart: with the same bits, or in the rounding of so and so many updates.

    python tests/determinism.py --json=tests/determinism/moe4.json       # some 20 minutes on two cores
    python tests/determinism.py --config=config/shakespeare_dense.py --skip="backend|parts|again"

Each variant is trained like the baseline (4 experts, top-1, config/cpu.py, in one process with one thread) but for one
thing that should not matter, for each of some seeds. The table says how far the weights and the validation loss are
from the baseline's at the end. docs/determinism.md has the table.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from run import checkpoint  # noqa: E402
from support import files, machines  # noqa: E402

STEPS = 500
BASE = ["config/cpu.py", f"--max_iters={STEPS}", "--eval_interval=250", "--eval_iters=20", "--inference_samples=0"]
TOGETHER = ["-m", "torch.distributed.run", "--standalone"]
SMALL = ["--gradient_accumulation_steps=2", "--batch_size=6"]
# name: (options of train.py, threads, processes, what it is compared with)
VARIANTS = {
    "the same command again": ([], 1, 1, None),
    "killed (SIGKILL) in the middle, and resumed": ([], 1, 1, None),
    "2 threads": ([], 2, 1, None),
    "2 processes (gloo), half of each batch": ([], 1, 2, None),
    "moe_backend=reference": (["--moe_backend=reference"], 1, 1, None),
    "moe_backend=masked": (["--moe_backend=masked"], 1, 1, None),
    "compile=True": (["--compile=True"], 1, 1, None),
    "batches in two parts": (SMALL, 1, 1, None),
    "batches in two parts, by 2 processes": (SMALL, 1, 2, "batches in two parts"),
}


def train(config, out_dir, seed, options=(), threads=1, processes=1, is_killed=False):
    """The out_dir of a complete run."""
    starter = [*TOGETHER, f"--nproc_per_node={processes}"] if processes > 1 else []
    arguments = [config, *BASE, *options, f"--seed={seed}", f"--out_dir={out_dir}", "--init_from=auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    about = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [sys.executable, *starter, "train.py", *arguments]
    if is_killed:
        process = subprocess.Popen(command, **about)
        while not (out_dir / "metrics.jsonl").exists() or '"step": 350' not in (out_dir / "metrics.jsonl").read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, **about)
    if done.returncode:
        sys.exit(done.stdout)
    return out_dir


def apart(one, other):
    """How far two runs end apart."""
    (a, nats_a), (b, nats_b) = ((saved["model"], last_loss(saved)) for saved in map(last_of, (one, other)))
    weight = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
    return {
        "is_equal": all(torch.equal(a[name], b[name]) for name in a),
        "weight": weight,
        "nats": abs(nats_a - nats_b),
    }


def last_of(out_dir):
    return checkpoint.load(out_dir / "ckpt.pt")


def last_loss(saved):
    return saved["progress"]["evaluations"][-1]["clean"]["nats"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured there")
    parser.add_argument("--config", default="config/shakespeare_moe4.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--skip", default="^$", help="no variants whose names have this regular expression in them")
    options = parser.parse_args()
    seeds = range(1337, 1337 + options.seeds)
    variants = {name: about for name, about in VARIANTS.items() if not re.search(options.skip, name)}
    found = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            made = {None: train(options.config, Path(folder) / f"base{seed}", seed)}
            for i, (name, (changes, threads, processes, other)) in enumerate(variants.items()):
                out_dir = Path(folder) / f"{i}-{seed}"
                made[name] = train(options.config, out_dir, seed, changes, threads, processes, "SIGKILL" in name)
                found[name].append(apart(made[other], made[name]))
                print(f"seed {seed}: {name}: {found[name][-1]}", flush=True)
        losses = [last_loss(last_of(Path(folder) / f"base{seed}")) for seed in seeds]
    about = machines.describe(machines.choose("cpu"))
    said = {
        "machine": {name: about[name] for name in ("device", "cores", "torch", "python", "dtype")},
        "git": machines.git_state(),
        "command": [options.config, *BASE],
        "seeds": list(seeds),
        "final_nats": losses,
        "variants": found,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(options.json, said)
    print(
        "\n| against one process with one thread | weights | largest difference of a weight | of the final loss, nats |"
    )
    print("| --- | --- | --- | --- |")
    for name, rows in found.items():
        name += f" (against {VARIANTS[name][3]})" if VARIANTS[name][3] else ""
        equal = sum(row["is_equal"] for row in rows)
        weight, nats = (max(row[key] for row in rows) for key in ("weight", "nats"))
        print(f"| {name} | {equal} of {len(rows)} equal, bit for bit | {weight:.1e} | {nats:.1e} |")
    print(f"\nBetween seeds the final loss spreads over {max(losses) - min(losses):.3f} nats.")


if __name__ == "__main__":
    main()
