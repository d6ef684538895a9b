"""How fast a dense model and its mixtures of experts train and write: side by side, in one process.

    python bench.py                               the paper size on CUDA, the CPU size elsewhere
    python bench.py --quick --compare=results/bench/NAME.json    in a minute: what became slower
    python bench.py --size=paper --tasks=decode --models=moe4    dense is always beside it
    python bench.py --models=all                  8 experts and paper B's other variants, too
    python bench.py --profile --models=dense      traces, and what takes the time of a step
    python bench.py --json=results/bench/NAME.json     the record that plot_results.py reads

First the outputs of all that is fast are checked against the plain ones; what fails is not timed. Then each round times
one unit of every model (A B C, B C A, …), so that what disturbs the machine disturbs all alike; ratios are of pairs of
one round. Tasks: `train` (an update on real text), `prefill` (reading half a block), `decode` (a step of writing, the
cache half full), `papers` (a text of 500 characters, eager, without a cache: the protocol of the papers).

The floor of a unit is the time in which this machine could do what must be computed and moved, by the model's own
accounting and two ceilings that are measured here. Exit codes: 0 done, 2 a mistake in what was asked, 3 a model's
output was wrong, so that it was not timed.
"""

import functools
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from data.common import DataError, Dataset, find
from model import GPT
from moe import MoE
from run import accounting
from run.records import RecordError
from run.settings import Config
from speed import bench_records, kernels, timing
from speed.timing import Subject, Unit, Writing, is_right, spread
from support import configurator, console, files, machines
from support.files import FileError
from support.options import ConfigError, nearest, option

SIZES = {"paper": (), "cpu": ("cpu",)}  # what comes over a model's own config file
MODELS = {  # name -> title, config file, what is changed in it
    "reference": ("Dense, eager script", "shakespeare_dense", {}),
    "dense": ("Dense", "shakespeare_dense", {}),
    "moe4": ("4 experts, top-1", "shakespeare_moe4", {}),
    "moe4_top2": ("4 experts, top-2", "shakespeare_moe4", {"expert_top_k": 2}),
    "moe4_linear": ("4 linear experts, top-2", "shakespeare_top2", {}),
    "reference_moe4": ("4 experts, eager script", "shakespeare_moe4", {"moe_backend": "reference"}),
    "moe8": ("8 experts, top-1", "shakespeare_moe8", {}),
    "moe4_linear_soft": ("4 linear experts, soft", "shakespeare_soft4", {}),
    "moe4_linear_cap05": ("4 linear experts, capacity 0.5", "shakespeare_top2_cap05", {}),
    "moe4_linear_cap10": ("4 linear experts, capacity 1.0", "shakespeare_top2_cap10", {}),
}
USUAL = 6  # so many of them are measured where nobody asks for others
ALL = "all"
BATCH_SIZES = (1, 8, 32)  # of prefill and decode


class Effort(NamedTuple):
    """How long each task is measured."""

    seconds: dict[str, float]  # of a task, at one batch size, for all models together
    characters: int  # of a text of the papers' protocol
    texts: int = 10  # of that protocol, at most
    rounds: int = 100  # of the other tasks, at most
    at_least: int = bench_records.FEWEST  # rounds: from fewer nothing is compared


FULL = Effort({"train": 45, "prefill": 6, "decode": 10, "papers": 45}, characters=500)
QUICK = Effort({"train": 8, "prefill": 1, "decode": 2, "papers": 5}, characters=50)


@dataclass(frozen=True)
class BenchConfig:
    size: str = option("auto", "paper, cpu, or auto: paper on CUDA, cpu elsewhere", group="What")
    models: str = option(
        "", f"some of {', '.join(MODELS)}, with commas between, or {ALL}; empty = the first {USUAL}", group="What"
    )
    tasks: str = option("", f"some of {', '.join(bench_records.TASKS)}; empty = all", group="What")
    quick: bool = option(False, "fewer rounds and shorter texts: to look, not to quote", group="What")
    seed: int = option(1337, "of weights, batches and samples", group="What", at_least=0, at_most=2**32 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of matrix products", group="Machine")
    compile: bool | Literal["auto"] = option("auto", "torch.compile in training: auto = where it pays", group="Machine")
    json: str = option("", "write the record to this file", group="Output")
    compare: str = option("", "say what became slower than in this record", group="Output")
    profile: bool = option(False, "trace a training and a decode step, and list what is slow in them", group="Output")

    def problems(self):
        if self.size not in ("auto", *SIZES):
            yield ("size",), _size_problem(self.size)
        for key, known in (("models", (*MODELS, ALL)), ("tasks", bench_records.TASKS)):
            for word in _words(getattr(self, key)):
                if word not in known:
                    guess = nearest(word, known)
                    hint = f"; nearest: {guess}" if guess else ""
                    yield (key,), f"{word!r} is none of {', '.join(known)}{hint}"
        if self.json and Path(self.json).is_dir():
            yield ("json",), f"{self.json} is a folder; expected a file, as {os.path.join(self.json, 'bench.json')}"

    def chosen_models(self):
        """In the order of MODELS, with the dense one, to which ratios are."""
        words = [*_words(self.models), bench_records.DENSE] if self.models else list(MODELS)[:USUAL]
        return [name for name in MODELS if name in words or ALL in words]

    def chosen_tasks(self):
        """In the order of bench_records.TASKS."""
        words = _words(self.tasks)
        return [name for name in bench_records.TASKS if name in words or not words]


def _words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def _size_problem(size):
    if size.endswith(".pt") or Path(size).exists():
        return (
            f"{size!r} is no size: bench.py measures sizes and not runs, with weights of its own; expected paper or cpu"
        )
    guess = nearest(size, SIZES)
    return f"size is {size!r}; expected {', '.join(SIZES)} or auto" + (f"; nearest: {guess}" if guess else "")


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is timed


def config_of(name, size, machine, seed) -> Config:
    _, stem, changes = MODELS[name]
    files = [str(machines.ROOT / "config" / f"{part}.py") for part in (stem, *SIZES[size])]
    options = {**changes, "seed": seed, "device": machine.device, "dtype": str(machine.dtype).removeprefix("torch.")}
    return configurator.parse(Config, [*files, *(f"--{key}={value}" for key, value in options.items())])


def notes(machine):
    """What a reader must know of this machine, a line each."""
    device = machine.device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (9, 0):
            name = "sm{}{}".format(*capability)
            yield f"This GPU is {name}: below sm90 there is no fast grouped product, and experts train by another way."
        if not kernels.AVAILABLE:
            yield "Triton is not installed: nothing is compiled, and experts are not decoded by kernels (see the end)."
    if device.type == "mps":
        compiled = "" if machine.compile else "nothing is compiled, "
        yield f"On MPS {compiled}decoding has no path of its own, and peak memory is not measured."


def bytes_needed(configs, symbols, machine, tasks):
    """About how much memory the tasks take, with these models in it at once: measured on a CPU, in float32."""
    trains, writes, held, working = "train" in tasks, {"prefill", "decode"} & set(tasks), 0, 0
    for config in configs:
        with torch.device("meta"):
            model = GPT(config, symbols)
        count = accounting.count_parameters(model)["total"]
        cache = 2 * 4 * max(BATCH_SIZES) * config.block_size * config.n_layer * config.n_embd
        held += count * (16 if trains else 4) + (4 * count + cache if writes else 0)  # a decoder copies the weights
        hidden = max(computed_hidden(block.mlp, config, machine) for block in model.blocks)
        activations = config.n_layer * (32 * config.n_embd + 2 * hidden) + 3 * symbols  # a token
        activations *= 4 * config.batch_size * config.block_size * (2 if machine.compile else 1)  # checked in float64
        working = max(working, 24 * count + (activations if trains else 0))
    return held + working


def computed_hidden(mlp, config, machine):
    """Hidden units that are computed for a token, in an MLP or a MoE."""
    if not isinstance(mlp, MoE):
        return config.mlp_hidden or 4 * config.n_embd
    E, H, _ = mlp.experts.w_in.shape
    return H * (E if mlp.backend_name(machine.device, machine.dtype, machine.compile) == "masked" else mlp.n_active)


def check_memory(names, size, machine, config, tasks, symbols):
    """ConfigError where the models do not fit, with what would."""

    def needed(names, size):
        configs = [config_of(name, size, machine, config.seed) for name in names]
        return bytes_needed(configs, symbols, machine, tasks)

    free = machines.free_memory(machine)
    if free is None or needed(names, size) <= free:
        return
    others = [(names, other) for other in SIZES if other != size] + [([bench_records.DENSE], size)]
    fitting = [
        f"--size={other}" + ("" if some == names else f" --models={','.join(some)}") + f" ({gb(needed(some, other))})"
        for some, other in others
        if needed(some, other) <= free
    ]
    message = f"size={size} needs about {gb(needed(names, size))} for {len(names)} models at once, and "
    message += f"{machine.device} has {gb(free)} free; what fits: {' or '.join(fitting) or 'nothing of this bench'}"
    raise ConfigError([message])


def gb(count):
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


class NothingToCompare(Exception):
    """The dense model is wrong."""


class Bench:
    """What is measured of some subjects, task by task; a subject that is wrong is told, and left out from there on."""

    def __init__(self, subjects, machine, effort, ceilings):
        self.subjects, self.machine, self.effort, self.ceilings = subjects, machine, effort, ceilings
        self.measurements, self.wrong = [], []

    def run(self, tasks):
        if "train" in tasks:
            self.train()
        for batch_size in BATCH_SIZES if {"prefill", "decode"} & set(tasks) else ():
            self.write(batch_size, tasks)
        if "papers" in tasks:
            count = self.effort.characters
            units = {s: Unit(functools.partial(s.write_as_the_papers_do, count)) for s in self.subjects}
            self.measure("papers", 1, count, units)

    def train(self):
        for subject in self.subjects:
            failure = subject.compile() if self.machine.compile and not subject.is_reference else None
            if failure:
                print(f"{subject.title} is not compiled, for torch.compile failed: {failure}")
        self.keep_right(timing.check_training)
        config = self.subjects[0].config
        units = {subject: Unit(subject.train) for subject in self.subjects}
        self.measure("train", config.batch_size, config.batch_size * config.block_size, units)

    def write(self, batch_size, tasks):
        writings = {subject: Writing(subject, batch_size) for subject in self.subjects}
        self.keep_right(lambda subject: timing.check_decoding(subject, writings[subject].decoder, batch_size))
        half = self.subjects[0].config.block_size // 2
        for task, tokens in (("prefill", batch_size * half), ("decode", batch_size)):
            if task in tasks:
                units = {subject: getattr(writings[subject], task)() for subject in self.subjects}
                held = {subject: writings[subject].bytes_held for subject in self.subjects}
                self.measure(task, batch_size, tokens, units, held)

    def keep_right(self, check):
        """check: of a subject, whose result it keeps. A reference is what the others are checked against."""
        for subject in [subject for subject in self.subjects if not subject.is_reference]:
            row = check(subject)
            if is_right(row):
                subject.checks.append(row)
                continue
            said = f"{row['what']}: off by {row['error']:.2g}, expected at most {row['limit']:.2g}"
            self.wrong.append(f"{subject.title} is wrong and was not timed: {said}")
            print(self.wrong[-1], file=sys.stderr, flush=True)
            self.subjects = [other for other in self.subjects if other is not subject]
            if subject.name == bench_records.DENSE:
                raise NothingToCompare

    def measure(self, task, batch_size, tokens, units, held=None):
        """units: {subject: Unit}; tokens: of one unit; held: device memory of each subject beside its weights."""
        effort, by_name = self.effort, {subject.name: unit for subject, unit in units.items()}
        at_most = effort.texts if task == "papers" else effort.rounds
        times = timing.timings(by_name, self.machine, effort.seconds[task], effort.at_least, at_most, task)
        rows = []
        for subject, unit in units.items():
            mine, dense = times[subject.name], times[bench_records.DENSE]
            seconds, holds = spread(mine), subject.bytes_held(task == "train") + (held[subject] if held else 0)
            rows.append(
                {
                    "model": subject.name,
                    "task": task,
                    "batch_size": batch_size,
                    "tokens": tokens,
                    "seconds": seconds,
                    "ratio": None if mine is dense else spread([a / b for a, b in zip(mine, dense)]),
                    "tokens_per_second": tokens / seconds["median"],
                    "floor": timing.floor_of(subject, task, batch_size, tokens, self.ceilings),
                    "peak_memory_bytes": timing.peak_bytes(self.machine, unit, holds),
                }
            )
        self.measurements += rows
        print("\n" + "\n".join(table(rows)), flush=True)


def record_of(bench, subjects, config, size, machine, neighbours, seconds):
    """What bench_records.py reads, of those subjects of which anything was measured."""
    measured = {row["model"] for row in bench.measurements}
    return {
        "format": bench_records.FORMAT,
        "size": size,
        "quick": config.quick,
        "machine": machines.describe(machine._replace(compile=any(subject.is_compiled for subject in subjects))),
        "git": machines.git_state(),
        "others": neighbours.so_far(),
        "seconds": seconds,
        "ceilings": bench.ceilings,
        "models": {
            subject.name: {
                "title": subject.title,
                "config": subject.config.to_dict(),
                "parameters": accounting.count_parameters(subject.model),
                "flops_per_token": accounting.training_flops_per_token(subject.model),
                "backend": subject.backends(),
                "checks": list(subject.checks),
                "compile_seconds": dict(subject.compile_seconds),
            }
            for subject in subjects
            if subject.name in measured
        },
        "measurements": bench.measurements,
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is told

HEADINGS = {
    "train": "training step, {B} × {T} characters",
    "prefill": "prefill, {B} × {T} characters",
    "decode": "decode step, batch {B}",
    "papers": "papers' protocol, {T} characters",
}


def table(rows):
    """The lines of one task's measurements, in a unit that suits the dense model."""
    first, median = rows[0], next(row for row in rows if row["model"] == bench_records.DENSE)["seconds"]["median"]
    unit, scale = ("µs", 1e6) if median < 1e-3 else ("ms", 1e3) if median < 1 else ("s", 1)
    heading = HEADINGS[first["task"]].format(B=first["batch_size"], T=first["tokens"] // first["batch_size"])
    memory = "  memory" if first["peak_memory_bytes"] is not None else ""
    yield (
        f"{heading:<36}{unit:>8} {'p10–p90':>15}  {'× dense':>7} {'p10–p90':>11}  {'tokens/s':>9} {'in total':>9}"
        f"  {'of floor':>8}  {'n':>3}{memory}"
    )
    for row in rows:
        seconds, ratio, total = row["seconds"], row["ratio"], row["tokens_per_second"]
        median, *ends = (bench_records.significant(scale * seconds[key]) for key in ("median", "p10", "p90"))
        speeds, reached = (total / row["batch_size"], total), row["floor"]["seconds"] / seconds["median"]
        ratio, *ratio_ends = (f"{ratio[key]:.2f}" for key in ("median", "p10", "p90")) if ratio else ("1", "")
        yield (
            f"  {MODELS[row['model']][0]:<34}{median:>8} {'–'.join(ends):>15}  {ratio:>7} {'–'.join(ratio_ends):>11}"
            f"  {bench_records.significant(speeds[0]):>9} {bench_records.significant(speeds[1]):>9}  {reached:>8.1%}"
            f"  {seconds['n']:>3}" + (f" {gb(row['peak_memory_bytes']):>7}" if memory else "")
        )


def legend(record):
    """The lines under the tables."""
    yield "What ran, and how far off it was:"
    for model in record["models"].values():
        ways, row = model["backend"], max(model["checks"], key=lambda row: row["error"] / row["limit"], default=None)
        seconds = model["compile_seconds"].items()
        compiling = [f"{value:,.0f} s for {task}" for task, value in seconds if value is not None]
        yield f"  {model['title']:<26}training: {ways['train']}; decoding: {ways['decode']}"
        if compiling:
            yield f"  {'':<26}compiled in {', '.join(compiling)}"
        if row:
            yield f"  {'':<26}{row['what']}: {row['error']:.1g}, at most {row['limit']:.1g} expected"
    ceilings, machine = record["ceilings"], record["machine"]
    yield (
        f"Floor: {ceilings['flops_per_second'] / 1e9:,.0f} GFLOP/s of matrix products in {machine['dtype']}, and "
        f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s of reading or copying as much as the dense model's weights"
    )
    yield f"Others meanwhile: {others(record)}"


def others(record):
    share, held = bench_records.cpu_share(record), record["others"]["device_bytes"]
    if record["machine"]["device_type"] == "cuda":
        found = "not known" if held is None else f"held up to {gb(held)} of the device's memory"
    else:
        found = "not known" if share is None else f"took {share:.1%} of the cores' time"
    return found + (
        "" if bench_records.is_exclusive(record) else "; the ratios are paired, but the times are no evidence"
    )


def profiled(subject, task, unit, folder):
    """The lines of the ten operations (on CUDA, kernels) in which a unit spends most; the trace goes to the folder."""
    machine, path = subject.machine, folder / f"{subject.name}-{task}.json"
    on_device = machine.device.type == "cuda"
    unit.prepare()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiler:
        unit.run()
        machine.synchronize()
    profiler.export_chrome_trace(str(path))
    own = "self_device_time_total" if on_device else "self_cpu_time_total"
    spent = {row: getattr(row, own) / 1000 / unit.repeats for row in profiler.key_averages()}  # ms
    total = sum(spent.values()) or 1
    where = "kernels" if on_device else "operations"
    yield f"{subject.title}, {task}: {bench_records.significant(total)} ms in {where}; trace: {path}"
    for row in sorted(spent, key=spent.get, reverse=True)[:10]:
        calls = f"{row.count / unit.repeats:,.0f}"
        yield f"  {spent[row] / total:>6.1%} {spent[row]:>9.3f} ms {calls:>6} ×  {row.key[:70]}"


def profile_all(subjects, size):
    folder = Path("out", f"bench-{size}")
    folder.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        if not subject.is_reference:
            for task, unit in {"train": Unit(subject.train), "decode": Writing(subject, 1).decode()}.items():
                print("\n" + "\n".join(profiled(subject, task, unit, folder)), flush=True)


def compared(path, old, new):
    slower = bench_records.slower(old, new)
    yield f"Slower than {path}:" if slower else f"Nothing became slower than in {path}, as far as it can be compared."
    yield from (f"  {line}" for line in slower)
    missing = bench_records.not_compared(old, new)
    if missing:
        yield "Not compared:"
        yield from (f"  {line}" for line in missing)


def main(argv):
    started = time.perf_counter()
    config = configurator.parse(BenchConfig, argv, usage="python bench.py [--key=value …]", description=__doc__)
    machine = machines.choose(config.device, config.dtype, config.compile)
    machines.keep_freed_memory()
    size = config.size if config.size != "auto" else "paper" if machine.device.type == "cuda" else "cpu"
    old = bench_records.read(config.compare) if config.compare else None
    print(f"{size} size; {machine.reason}")
    for note in notes(machine):
        print(note)
    names = config.chosen_models()
    dataset = Dataset.open(find("shakespeare_char"), machine.device)
    tasks = config.chosen_tasks()
    check_memory(names, size, machine, config, tasks, dataset.vocabulary.size)
    if config.json:  # before minutes are spent on what could not be written
        with files.writing(config.json):
            Path(config.json).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(config.json).parent).close()

    neighbours = machines.Neighbours(machine)
    configs = {name: config_of(name, size, machine, config.seed) for name in names}
    subjects = [Subject(name, MODELS[name][0], configs[name], dataset, machine) for name in names]
    dense = subjects[names.index(bench_records.DENSE)]
    bench = Bench(subjects, machine, QUICK if config.quick else FULL, timing.ceilings(machine, dense.model))
    try:
        bench.run(tasks)
    except NothingToCompare:
        print("Without the dense model there is nothing to compare with.", file=sys.stderr)
        return 3
    record = record_of(bench, subjects, config, size, machine, neighbours, time.perf_counter() - started)
    print("\n" + "\n".join(legend(record)))
    if config.quick:
        print(
            f"Quick: few rounds, and the papers' texts cut to {QUICK.characters} characters. To look at, not to quote."
        )
    if config.profile:
        profile_all(bench.subjects, size)
    if old:
        print("\n" + "\n".join(compared(config.compare, old, record)))
    if config.json:
        files.write_json(Path(config.json), record)
        print(f"written to {config.json}")
    elif not config.quick:
        name = re.sub("[^a-z0-9]+", "-", f"{record['machine']['device']}-{record['machine']['threads']}-{size}".lower())
        print(
            f"plot_results.py draws what lies in results/bench: --json=results/bench/{name}.json would write it there"
        )
    for message in bench.wrong:
        print(message, file=sys.stderr)
    return 3 if bench.wrong else 0


if __name__ == "__main__":
    mistakes = (ConfigError, DataError, FileError, RecordError)
    console.run(main, mistakes, "--size=cpu, or fewer --models, takes less")
