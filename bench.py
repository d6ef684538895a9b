"""How fast dense and mixture-of-experts models train and decode, side by side in one process.

    python bench.py                               the paper size on CUDA, the CPU size elsewhere
    python bench.py --quick --compare=results/bench/NAME.json    in a minute: what became slower
    python bench.py --size=paper --tasks=decode --models=moe4    the dense model is always measured too
    python bench.py --models=all                  also 8 experts, the variants of paper B, routing in kernels
    python bench.py --profile --models=dense      traces, and what a step's time goes into
    python bench.py --tasks=decode --decoders=attention,fused     other ways of writing, beside the usual one
    python bench.py --json=results/bench/NAME.json     the record that plot_results.py reads
    python bench.py --flags=pdl --tasks=train --compare=FILE     a switch of torch tried out (FILE: without it)

First, the outputs of each fast model are checked against the reference backend; a wrong model is not timed. Then each
round times one unit of every model (A B C, then B C A, …), so that a disturbance of the machine reaches all of them,
and ratios are taken within a round. Tasks: `train` (an update on real text), `prefill` (reading half a block),
`decode` (one decoding step, the cache half full), `papers` (sampling 500 characters eagerly, without a cache, as the
papers do).

Flags, on CUDA: `pdl` starts a kernel while the one before it ends; `split` and `gemm` try out sizes of the norms'
backward reductions and kernels of matrix products; `cudnn` takes flash attention rather than cuDNN's. A record names
its flags, and plot_results.py draws none that has any.

The floor of a unit is the least time in which this machine could compute and move what the unit needs, at the FLOP/s
and bytes/s measured here. Exit codes: 0 done, 2 a mistake in the options, 3 a model's output was wrong.
"""

import functools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from data.common import Dataset, find_dataset
from run import accounting
from run.settings import Config
from speed import bench_records, bench_screen, decoding, flags, profiles, timing
from speed.timing import Candidate, Decoding, Unit, is_right, percentiles
from support import configurator, console, files, machines, triton_here
from support.options import option

SIZES = {"paper": (), "cpu": ("cpu",)}  # size -> config files applied after the model's own
MODELS = {  # name -> title, config file, changes to it
    "reference": ("Dense, eager script", "shakespeare_dense", {}),
    "dense": ("Dense", "shakespeare_dense", {}),
    "moe4": ("4 experts, top-1", "shakespeare_moe4", {}),
    "moe4_top2": ("4 experts, top-2", "shakespeare_moe4", {"expert_top_k": 2}),
    "moe4_linear": ("4 linear experts, top-2", "shakespeare_top2", {}),
    "reference_moe4": ("4 experts, eager script", "shakespeare_moe4", {"moe_backend": "reference"}),
    "moe4_kernels": ("4 experts, routing in kernels", "shakespeare_moe4", {"routing_kernels": True}),
    "moe8": ("8 experts, top-1", "shakespeare_moe8", {}),
    "moe4_linear_soft": ("4 linear experts, soft", "shakespeare_soft4", {}),
    "moe4_linear_cap05": ("4 linear experts, capacity 0.5", "shakespeare_top2_cap05", {}),
    "moe4_linear_cap10": ("4 linear experts, capacity 1.0", "shakespeare_top2_cap10", {}),
    "dense_fused": ("Dense, fused update", "shakespeare_dense", {"fused_update": True}),
    "moe4_fused": ("4 experts, fused update", "shakespeare_moe4", {"fused_update": True}),
}
OTHER_DECODERS = [name for name in decoding.DECODERS if name != "auto"]
USUAL = 6  # the first so many of MODELS are measured by default
ALL = "all"
BATCH_SIZES = (1, 8, 32)  # of prefill and decode
MOST_ROUNDS, MOST_TEXTS = 100, 10  # the latter of the task `papers`


class Effort(NamedTuple):
    """How long each task is measured."""

    seconds: dict[str, float]  # of a task at one batch size, all models together
    characters: int  # of a text of the task `papers`
    at_least: int = bench_records.FEWEST  # rounds


FULL = Effort({"train": 45, "prefill": 6, "decode": 10, "papers": 45}, characters=500)
QUICK = Effort({"train": 8, "prefill": 1, "decode": 2, "papers": 5}, characters=50)


@dataclass(frozen=True)
class BenchConfig:
    size: Literal["auto", "paper", "cpu"] = option("auto", "auto = paper on CUDA, cpu elsewhere", group="What")
    models: str = option(
        "", f"some of {', '.join(MODELS)}, with commas between, or {ALL}; empty = the first {USUAL}", group="What"
    )
    tasks: str = option("", f"some of {', '.join(bench_records.TASKS)}; empty = all", group="What")
    decoders: str = option(
        "", f"also {', '.join(OTHER_DECODERS)}: ways of writing on CUDA, beside the usual one", group="What"
    )
    quick: bool = option(False, "fewer rounds and shorter texts: a first look, not for quoting", group="What")
    seed: int = option(1337, "of weights, batches and samples", group="What", at_least=0, at_most=2**32 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of matrix products", group="Machine")
    compile: bool | Literal["auto"] = option("auto", "torch.compile in training: auto = where it pays", group="Machine")
    capture: bool | Literal["auto"] = option(
        "auto", "each update as one CUDA graph: auto = where it is compiled for CUDA", group="Machine"
    )
    flags: str = option("", f"some of {', '.join(flags.FLAGS)}: switches of torch on CUDA, see above", group="Machine")
    json: str = option("", "write the record to this file", group="Output", is_path=True)
    compare: str = option("", "say what became slower than in this record", group="Output", is_path=True)
    profile: bool = option(False, "trace a training and a decoding step; say what their time goes into", group="Output")

    def problems(self):
        known_words = {"models": (*MODELS, ALL), "tasks": bench_records.TASKS, "flags": flags.FLAGS}
        for key, known in {**known_words, "decoders": OTHER_DECODERS}.items():
            for word in words_in(getattr(self, key)):
                if word not in known:
                    yield (key,), f"{word!r} is none of {', '.join(known)}"
        if self.json and Path(self.json).is_dir():
            yield ("json",), f"{self.json} is a folder; expected a file, as {os.path.join(self.json, 'bench.json')}"

    def chosen_models(self):
        """Names in the order of MODELS, the dense model's always among them."""
        words = [*words_in(self.models), bench_records.DENSE] if self.models else list(MODELS)[:USUAL]
        return [name for name in MODELS if name in words or ALL in words]

    def chosen_tasks(self):
        """Names in the order of bench_records.TASKS."""
        words = words_in(self.tasks)
        return [name for name in bench_records.TASKS if name in words or not words]


def words_in(text):
    return [word.strip() for word in text.split(",") if word.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is timed


def model_config(name, size, machine, seed) -> Config:
    """The config of one of MODELS at one of SIZES."""
    _, stem, changes = MODELS[name]
    files = [str(machines.ROOT / "config" / f"{part}.py") for part in (stem, *SIZES[size])]
    options = {**changes, "seed": seed, "device": machine.device, "dtype": str(machine.dtype).removeprefix("torch.")}
    return configurator.parse(Config, [*files, *(f"--{key}={value}" for key, value in options.items())])


def machine_notes(machine):
    """What this machine lacks, a line each."""
    device = machine.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        yield "Below sm90, as on this GPU, there is no fast grouped product, and experts use a slower backend."
    if device.type == "cuda" and not triton_here.AVAILABLE:
        yield "Triton is not installed: nothing is compiled, and no kernels decode experts."
    if device.type == "mps":
        yield "On MPS decoding has no fast path, and peak memory is not measured."


# ---------------------------------------------------------------------------------------------------------------------
# The measurements


class NothingToCompare(Exception):
    """The dense model's output is wrong, so that there are no ratios."""


class Bench:
    """Measures models, task by task. A candidate whose output is wrong is reported, and left out from then on.

    Candidates with a decoder of their own only read and write."""

    def __init__(self, candidates, machine, effort, ceilings):
        self.candidates, self.machine, self.effort, self.ceilings = candidates, machine, effort, ceilings
        self.measurements, self.wrong = [], []

    def run(self, tasks):
        if "train" in tasks:
            self.train()
        for batch_size in BATCH_SIZES if {"prefill", "decode"} & set(tasks) else ():
            self.decode(batch_size, tasks)
        if "papers" in tasks:
            count = self.effort.characters
            texts = {one: functools.partial(one.sample_without_cache, count) for one in self.trained}
            self.measure("papers", 1, count, {candidate: Unit(text) for candidate, text in texts.items()})

    @property
    def trained(self):
        return [candidate for candidate in self.candidates if candidate.way == "auto"]

    def train(self):
        for candidate in self.trained:
            for failure in candidate.make_ready():
                print(f"{candidate.title}: {failure}")
        self.keep_right(timing.check_training, self.trained)
        if self.machine.capture:
            self.keep_right(timing.check_capture, self.trained)
        config, units = self.candidates[0].config, {candidate: candidate.training() for candidate in self.trained}
        self.measure("train", config.batch_size, config.batch_size * config.block_size, units)

    def decode(self, batch_size, tasks):
        decodings = {candidate: Decoding(candidate, batch_size) for candidate in self.candidates}
        check = timing.check_decoding
        self.keep_right(lambda one: check(one, decodings[one].decoder, batch_size), self.candidates)
        half = self.candidates[0].config.block_size // 2
        for task, tokens in (("prefill", batch_size * half), ("decode", batch_size)):
            if task in tasks:
                units = {candidate: getattr(decodings[candidate], task)() for candidate in self.candidates}
                held = {candidate: decodings[candidate].bytes_held for candidate in self.candidates}
                self.measure(task, batch_size, tokens, units, held)

    def keep_right(self, check, candidates):
        """Checks these candidates and drops wrong ones. References are what the others are checked against.

        check: candidate -> {what, error, limit}, which is kept for the record.
        """
        for candidate in [one for one in candidates if not one.is_reference]:
            row = check(candidate)
            if is_right(row):
                candidate.checks.append(row)
                continue
            told = f"{row['what']}: off by {row['error']:.2g}, expected at most {row['limit']:.2g}"
            self.wrong.append(f"{candidate.title} is wrong and was not timed: {told}")
            print(self.wrong[-1], file=sys.stderr, flush=True)
            self.candidates = [other for other in self.candidates if other is not candidate]
            if candidate.name == bench_records.DENSE:
                raise NothingToCompare

    def measure(self, task, batch_size, tokens, units, held=None):
        """Times a task and prints its table.

        units: {candidate: Unit}; tokens: of one unit; held: {candidate: bytes of device memory besides its weights}.
        """
        effort, by_name = self.effort, {candidate.name: unit for candidate, unit in units.items()}
        at_most = MOST_TEXTS if task == "papers" else MOST_ROUNDS
        times = timing.timings(by_name, self.machine, effort.seconds[task], effort.at_least, at_most, task)
        rows = []
        for candidate, unit in units.items():
            mine, dense = times[candidate.name], times[bench_records.DENSE]
            seconds, holds = percentiles(mine), candidate.bytes_held(task == "train") + (held[candidate] if held else 0)
            rows.append(
                {
                    "model": candidate.name,
                    "task": task,
                    "batch_size": batch_size,
                    "tokens": tokens,
                    "seconds": seconds,
                    "ratio": None if mine is dense else percentiles([a / b for a, b in zip(mine, dense)]),
                    "tokens_per_second": tokens / seconds["median"],
                    "floor": timing.floor_of(candidate, task, batch_size, tokens, self.ceilings),
                    "peak_memory_bytes": timing.peak_bytes(self.machine, unit, holds),
                }
            )
        self.measurements += rows
        titles = {candidate.name: candidate.title for candidate in units}
        print("\n" + "\n".join(bench_screen.table_lines(rows, titles)), flush=True)


def bench_record(bench, candidates, config, size, machine, other_load, seconds):
    """The record that bench_records.py reads, with the models of which anything was measured."""
    measured = {row["model"] for row in bench.measurements}
    return {
        "format": bench_records.FORMAT,
        "size": size,
        "quick": config.quick,
        "flags": flags.switched_on(),
        "machine": machines.describe(
            machine._replace(
                compile=any(candidate.is_compiled for candidate in candidates),
                capture=any(candidate.is_captured for candidate in candidates),
            )
        ),
        "git": machines.git_state(),
        "attention": machine.attention_of_any_length,
        "others": other_load.so_far(),
        "seconds": seconds,
        "ceilings": bench.ceilings,
        "models": {
            candidate.name: {
                "title": candidate.title,
                "config": candidate.config.to_dict(),
                "parameters": accounting.count_parameters(candidate.model),
                "flops_per_token": accounting.training_flops_per_token(candidate.model),
                "backend": candidate.backends(),
                "checks": candidate.checks,
                "compile_seconds": candidate.compile_seconds,
            }
            for candidate in candidates
            if candidate.name in measured
        },
        "measurements": bench.measurements,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Profiles


def profile_all(candidates, size):
    folder = Path("out", f"bench-{size}")
    folder.mkdir(parents=True, exist_ok=True)
    for candidate in candidates:
        if not candidate.is_reference:
            units = {"train": candidate.training()} if candidate.way == "auto" else {}
            for task, unit in {**units, "decode": Decoding(candidate, 1).decode()}.items():
                print("\n" + "\n".join(profiles.profile_lines(candidate, task, unit, folder)), flush=True)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    started = time.perf_counter()
    config = configurator.parse(BenchConfig, argv, usage="python bench.py [--key=value …]", description=__doc__)
    machine = machines.choose(config.device, config.dtype, config.compile, capture=config.capture)
    flags.switch_on(words_in(config.flags))
    machines.keep_freed_memory()
    size = config.size if config.size != "auto" else "paper" if machine.device.type == "cuda" else "cpu"
    old = bench_records.read(config.compare) if config.compare else None
    print("\n".join([f"{size} size; {machine.reason}", *machine_notes(machine)]))
    dataset = Dataset.open(find_dataset("shakespeare_char"), machine.device)
    if config.json:
        with files.writing(config.json):  # before minutes are spent on measuring
            Path(config.json).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(config.json).parent).close()

    other_load = machines.OtherLoad(machine)
    names = config.chosen_models()
    configs = {name: model_config(name, size, machine, config.seed) for name in names}
    candidates = [Candidate(name, MODELS[name][0], configs[name], dataset, machine) for name in names]
    for candidate in candidates:
        for obstacle in candidate.obstacles:
            print(f"{candidate.title}: not measured, since {obstacle}")
    candidates = [candidate for candidate in candidates if not candidate.obstacles]
    dense = next(candidate for candidate in candidates if candidate.name == bench_records.DENSE)
    usual = [candidate for candidate in candidates if not candidate.is_reference]
    candidates += [candidate.written_by(way) for way in words_in(config.decoders) for candidate in usual]
    bench = Bench(candidates, machine, QUICK if config.quick else FULL, timing.ceilings(machine, dense.model))
    try:
        bench.run(config.chosen_tasks())
    except NothingToCompare:
        print("Without the dense model there is nothing to compare with.", file=sys.stderr)
        return 3

    record = bench_record(bench, candidates, config, size, machine, other_load, time.perf_counter() - started)
    print("\n" + "\n".join(bench_screen.legend_lines(record)))
    if config.quick:
        print(f"Quick: few rounds, and only {QUICK.characters} characters a sample. For a first look, not for quoting.")
    if config.profile:
        profile_all(bench.candidates, size)
    if old:
        print("\n" + "\n".join(bench_screen.comparison_lines(config.compare, old, record)))
    if config.json:
        files.write_json(Path(config.json), record)
        print(f"written to {config.json}")
    elif not config.quick:
        print("To have plot_results.py draw this bench, write it with --json=results/bench/NAME.json.")
    for message in bench.wrong:
        print(message, file=sys.stderr)
    return 3 if bench.wrong else 0


if __name__ == "__main__":
    console.run(main, "--size=cpu, or fewer --models, takes less")
