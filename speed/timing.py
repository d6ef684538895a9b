"""What bench.py times, how, and whether it is right.

    subject = Subject("moe4", "4 experts, top-1", config, dataset, machine)
    row = check_training(subject)                                # is_right(row), or it is not timed
    times = timings({"dense": unit, "moe4": other}, machine, seconds=10)

- Subject: a model with what trains it; Writing: with what writes B texts at once; Unit: what is timed in one go.
- A check compares what is fast with the plain way, and both with the exact result.
- `timings` interleaves units, so that what disturbs the machine disturbs all of them alike.
- `floor_of`: what a unit must compute and move by the model's accounting, over ceilings that are measured here.

Letters: B sequences, T positions, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import GPT, Decoder
from run import accounting, evaluate, update
from speed import bench_records, decoding

TEMPERATURE, TOP_K = 0.8, 200  # of writing, as sample.py's and the papers'
STEPS_IN_A_ROW = 8  # of decoding, timed as one


class Unit(NamedTuple):
    """What is timed in one go."""

    run: Callable
    prepare: Callable = lambda: None  # before it, off the clock
    repeats: int = 1  # units of the task that one run makes


class Subject:
    """One model of a bench, and what trains it: train.py's own update, or for a reference that of an eager script."""

    def __init__(self, name, title, config, dataset, machine):
        self.name, self.title, self.config, self.dataset, self.machine = name, title, config, dataset, machine
        torch.manual_seed(config.seed)
        self.model = GPT(config, dataset.vocabulary.size, dataset.symbol_counts("train")).to(machine.device)
        self.is_reference = name.startswith(bench_records.REFERENCE)
        if self.is_reference:
            options = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2))
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **options, fused=machine.device.type == "cuda")
        else:
            self.updater, self.sums = update.Updater(self.model, config, machine), update.Sums()
            self.optimizer = self.updater.optimizer
        self.steps_made, self.checks, self.ways_to_write = 0, [], {}
        self.compile_seconds = {"train": None, "decode": None}

    @property
    def is_compiled(self):
        return self.compile_seconds["train"] is not None

    def compile(self):
        """-> why it failed, or None"""
        compiled = update.compile_model(self.model, *self.batch(0), self.machine)
        if not compiled.failure:
            self.updater.run_model, self.compile_seconds["train"] = compiled.model, compiled.seconds
        return compiled.failure

    def batch(self, step):
        config = self.config
        rows = config.batch_size * config.gradient_accumulation_steps
        return self.dataset.batch("train", config.seed, step, rows, config.block_size)

    def train(self):
        """One update on a real batch."""
        x, y = self.batch(self.steps_made)
        if self.is_reference:
            self._train_plainly(x, y)
        else:
            self.model.set_step(self.steps_made)
            self.updater.update(self.steps_made, x, y, self.sums)
        self.steps_made += 1

    def _train_plainly(self, x, y):
        self.model.train()
        with self.machine.autocast():
            objective = self.model(x, y).objective
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def decoder(self, batch_size):
        """What writes batch_size texts at once."""
        self.model.eval()
        if self.is_reference:
            return Uncached(self.model, self.machine)
        return decoding.fastest(self.model, batch_size, self.machine, TEMPERATURE, TOP_K)

    def text(self, batch_size):
        """(B, T) of the validation split."""
        return self.dataset.batch("val", self.config.seed, 0, batch_size, self.config.block_size)[0]

    def write_as_the_papers_do(self, characters):
        config = dataclasses.replace(self.config, inference_samples=1)
        evaluate.inference_speed(self.model, config, self.machine, characters)

    def backends(self):
        """In words: what trains, and what writes at which batch sizes."""
        train = "eager, plain AdamW" if self.is_reference else "compiled" if self.is_compiled else "eager"
        for layer in self.model.moe_layers()[:1]:
            train = f"{layer.backend_name(self.machine.device, self.machine.dtype, self.is_compiled)}, {train}"
        sizes = {}
        for batch_size, how in self.ways_to_write.items():
            sizes.setdefault(how, []).append(str(batch_size))
        ways = [how if len(sizes) == 1 else f"batch {', '.join(these)}: {how}" for how, these in sizes.items()]
        return {"train": train, "decode": "; ".join(ways) or "not measured"}

    def bytes_held(self, is_training):
        """By weights and buffers, in training also by the optimiser."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if is_training:
            tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Uncached(Decoder):
    """Writing as an eager script does: the whole window is read again for each character."""

    how = "the whole window again for each character"

    def __init__(self, model, machine):
        self.model, self.machine, self.temperature, self.top_k = model, machine, TEMPERATURE, TOP_K
        self.clear()

    def clear(self):
        self.ids_BT = None

    @property
    def length(self):
        return 0 if self.ids_BT is None else self.ids_BT.size(1)

    @torch.no_grad()
    def read(self, ids_BT):
        self.ids_BT = ids_BT if self.ids_BT is None else torch.cat((self.ids_BT, ids_BT), dim=1)
        with self.machine.autocast():
            out = self.model(self.ids_BT[:, -self.model.config.block_size :], last_only=True)
        return out.logits[:, -1].float(), out.routing


class Writing:
    """One subject's decoder at one batch size, and its units."""

    def __init__(self, subject, batch_size):
        block_size, machine = subject.config.block_size, subject.machine
        self.text = subject.text(batch_size)
        self.prompt = self.text[:, : block_size // 2]
        # Some steps in a row, as in a text; a reference, to which each is a text to read, is timed for one.
        self.steps = 1 if subject.is_reference else min(STEPS_IN_A_ROW, max(1, block_size // 4))
        self.span = 1 if subject.is_reference else max(self.steps, block_size // 4)
        self.uniforms = lambda n: torch.rand(n, batch_size, device=machine.device)
        held, started = allocated(machine), time.perf_counter()
        self.decoder = subject.decoder(batch_size)
        self._rewind()
        self._write()
        machine.synchronize()
        self.bytes_held = allocated(machine) - held
        subject.ways_to_write[batch_size] = self.decoder.how
        if re.search("compiled|graph", self.decoder.how):
            subject.compile_seconds["decode"] = (subject.compile_seconds["decode"] or 0) + time.perf_counter() - started

    def prefill(self):
        return Unit(lambda: self._read(self.prompt), self.decoder.clear)

    def decode(self):
        return Unit(self._write, self._rewind, self.steps)

    def _rewind(self):
        """To where the steps that follow have half a block before them, on average."""
        start = self.prompt.size(1) - self.span // 2
        if not start <= self.decoder.length <= start + self.span - self.steps:
            self.decoder.clear()
            self._read(self.text[:, :start])

    def _read(self, ids_BT):
        self.tokens_B = self.decoder.next(ids_BT, self.uniforms(1)[0]).tokens

    def _write(self):
        for uniform_B in self.uniforms(self.steps):
            self.tokens_B = self.decoder.next(self.tokens_B[:, None], uniform_B).tokens


# ---------------------------------------------------------------------------------------------------------------------
# Is the fast way right? It must come as close to the exact result (the reference backend in twice the precision) as the
# plain way does at its own precision, give or take; a router's close calls may fall another way in each of them.

SLACK = 3.0
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative errors that are always granted


def is_right(row):
    return row["error"] <= row["limit"]  # what is not a number is not right


def check(what, found, plain, exact, dtype):
    """found, plain, exact: equally long lists of tensors -> {what, error, limit} of the tensor that is worst off. An
    error is the norm of a difference over that of the exact tensor."""
    rows = []
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        ours, theirs, truth = (value.detach().cpu().double() for value in (ours, theirs, truth))
        error, allowed = ((value - truth).norm().item() / (truth.norm().item() or 1.0) for value in (ours, theirs))
        rows.append({"what": what, "error": error, "limit": SLACK * allowed + ROUNDING[dtype]})
    return max(rows, key=lambda row: row["error"] / row["limit"] if is_right(row) else math.inf)


def twins(subject):
    """(the subject's model on the reference backend, the same in twice the precision), in eval mode"""
    config, machine = dataclasses.replace(subject.config, moe_backend="reference"), subject.machine
    with update.undone(subject.model):  # initial weights, drawn and thrown away
        plain = GPT(config, subject.dataset.vocabulary.size)
    plain.load_state_dict(subject.model.state_dict())
    exact = copy.deepcopy(plain).to(torch.float64 if machine.dtype == torch.float32 else torch.float32)
    has_doubles = machine.device.type != "mps"
    return plain.to(machine.device).eval(), exact.to(machine.device if has_doubles else "cpu").eval()


def check_training(subject):
    """Of the loss and every gradient. In eval mode, for dropout would be another in each; on a few rows, unless a graph
    was compiled for all."""
    machine = subject.machine
    x, y = subject.batch(0) if subject.is_compiled else (rows[:4] for rows in subject.batch(0))

    def gradients(run_model, model, context):
        ids, targets = (rows.to(model.token_embedding.weight.device) for rows in (x, y))
        with update.undone(model):
            with context:
                objective = run_model.eval()(ids, targets).objective
            objective.backward()
            return [objective, *(parameter.grad for parameter in model.parameters())]

    plain, exact = twins(subject)
    results = [
        gradients(subject.updater.run_model, subject.model, machine.autocast()),
        gradients(plain, plain, machine.autocast()),
        gradients(exact, exact, contextlib.nullcontext()),
    ]
    return check("training, loss and gradients against the reference backend", *results, machine.dtype)


@torch.no_grad()
def check_decoding(subject, decoder, batch_size):
    """Of the logits after half a block that is read at once, and after each of some further characters."""
    half, machine = subject.config.block_size // 2, subject.machine
    text = subject.text(batch_size)[:, : half + 16]
    decoder.clear()
    found = [decoder.read(text[:, :half])[0], *(decoder.read(ids[:, None])[0] for ids in text[:, half:].t())]
    decoder.clear()
    plain, exact = twins(subject)
    with machine.autocast():
        plainly = plain(text).logits[:, half - 1 :]
    exactly = exact(text.to(exact.token_embedding.weight.device)).logits[:, half - 1 :]
    results = [[logits] for logits in (torch.stack(found, dim=1), plainly, exactly)]
    return check(f"decoding at batch {batch_size}, logits against the model without a cache", *results, machine.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Timing

PATIENCE = 5  # where rounds are long, there are fewer than `at_least` after so many times the seconds


def timings(units, machine, seconds, at_least=bench_records.FEWEST, at_most=100, label=""):
    """{name: seconds of each of the {name: Unit}}, equally many: round by round, after one or two to warm up."""
    began = time.perf_counter()
    one_round(units, machine, 0)
    if time.perf_counter() - began < seconds / 4:
        one_round(units, machine, 1)
    began, rounds = time.perf_counter(), []
    with tqdm(total=round(seconds), desc=label, unit="s", leave=False, disable=not sys.stderr.isatty()) as bar:
        while len(rounds) < at_most:
            rounds.append(one_round(units, machine, len(rounds)))
            spent = time.perf_counter() - began
            bar.update(min(round(spent), bar.total) - bar.n)
            if spent > seconds and len(rounds) >= (at_least if spent < PATIENCE * seconds else min(3, at_least)):
                break
    return {name: [times[name] for times in rounds] for name in units}


def one_round(units, machine, number):
    """{name: seconds} of each unit once; each round starts with another."""
    names = list(units)
    shift = number % len(names)
    return {name: seconds_of(units[name], machine) for name in names[shift:] + names[:shift]}


def seconds_of(unit, machine):
    """Of one run, over its repeats."""
    unit.prepare()
    machine.synchronize()
    started = time.perf_counter()
    unit.run()
    machine.synchronize()
    return (time.perf_counter() - started) / unit.repeats


def spread(values):
    low, median, high = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": low, "p90": high, "n": len(values)}


def allocated(machine):
    """Bytes of device memory; 0 where it is not CUDA."""
    return torch.cuda.memory_allocated(machine.device) if machine.device.type == "cuda" else 0


def peak_bytes(machine, unit, held):
    """Device memory of one run: what is held for it, and what comes on top. None where it is not CUDA."""
    if machine.device.type != "cuda":
        return None
    unit.prepare()
    before = allocated(machine)
    torch.cuda.reset_peak_memory_stats(machine.device)
    unit.run()
    machine.synchronize()
    return held + torch.cuda.max_memory_allocated(machine.device) - before


# ---------------------------------------------------------------------------------------------------------------------
# The floor


def ceilings(machine, model):
    """The best that is reached here: FLOP/s of a large product of matrices in the compute dtype, and bytes/s of reading
    or copying as much as the weights of `model`, which a cache may hold."""
    flops = []
    for side in {"cpu": (512, 1024), "cuda": (4096, 8192)}.get(machine.device.type, (1024, 2048)):
        a, b = torch.randn(2, side, side, device=machine.device).to(machine.dtype)
        flops.append(best_rate(lambda a=a, b=b: a @ b, 2 * side**3, machine))
    x = torch.ones(sum(p.numel() for p in model.parameters()), device=machine.device, dtype=machine.dtype)
    y, moved = torch.empty_like(x), x.numel() * x.element_size()
    copying = best_rate(lambda: y.copy_(x), 2 * moved, machine)
    return {
        "flops_per_second": max(flops),
        "bytes_per_second": max(copying, best_rate(lambda: x.sum(), moved, machine)),
    }


def best_rate(call, amount, machine, seconds=0.5):
    """Amount per second in the best of many tries."""
    calls = 1 if machine.device.type == "cpu" else 20  # so many that launching them hides behind running them
    call()
    machine.synchronize()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        machine.synchronize()
        best = max(best, calls * amount / (time.perf_counter() - started))
    return best


def floor_of(subject, task, batch_size, tokens, ceilings):
    """{flops, bytes} that one unit of the task must compute and move, and the seconds that this takes at the ceilings.
    tokens: of the unit, over all sequences."""
    model, block_size, width = subject.model, subject.config.block_size, subject.machine.dtype.itemsize
    if task == "train":
        flops, moved = tokens * accounting.training_flops_per_token(model), accounting.training_bytes(model, width)
    elif task == "prefill":
        length = tokens // batch_size
        flops = tokens * accounting.forward_flops_per_token(model, context=length - 1)
        moved = accounting.prefill_bytes(model, batch_size, length, width)
    else:  # with a cache, whatever the protocol: that much is needed to write a character
        contexts = [block_size // 2] if task == "decode" else [min(i, block_size - 1) for i in range(tokens)]
        flops = batch_size * sum(accounting.forward_flops_per_token(model, context) for context in contexts)
        moved = sum(accounting.decoding_bytes(model, batch_size, context, width) for context in contexts)
    seconds = max(flops / ceilings["flops_per_second"], moved / ceilings["bytes_per_second"])
    return {"flops": flops, "bytes": moved, "seconds": seconds}
