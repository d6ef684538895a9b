"""What bench.py times, how it times it, and the check that comes first.

    candidate = Candidate("moe4", "4 experts, top-1", config, dataset, machine)
    row = check_training(candidate)                              # not timed unless is_right(row)
    times = timings({"dense": unit, "moe4": other}, machine, seconds=10)

- A Candidate is a model with its training; a Decoding decodes B of its texts at once; a Unit is timed in one go.
- A check compares the fast way and the plain way, each with the exact result.
- `timings` interleaves units, so that a disturbance of the machine reaches all of them alike.
- `floor_of` says what a unit must compute and move at least, and how long that takes at the measured `ceilings`.

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
from run.totals import RunningTotals
from speed import bench_records, decoding, fused_routing, traffic
from support import triton_here

TEMPERATURE, TOP_K = 0.8, 200  # of sampling, as in sample.py and the papers
STEPS_IN_A_ROW = 8  # of decoding, timed in one go
UPDATES_IN_A_ROW = 8  # on CUDA


class Unit(NamedTuple):
    """One run that is timed, and what comes before it."""

    run: Callable
    prepare: Callable = lambda: None  # called before each run, not timed
    repeats: int = 1  # units of the task in one run
    uncaptured: Callable | None = None  # the same without a graph, whose memory torch does not count as in use


class Candidate:
    """One model of a bench, trained by train.py's own update, or as an eager script does if it is a reference."""

    def __init__(self, name, title, config, dataset, machine):
        self.name, self.title, self.config, self.dataset, self.machine = name, title, config, dataset, machine
        torch.manual_seed(config.seed)
        self.model = GPT(config, dataset.vocabulary.size, dataset.symbol_counts("train")).to(machine.device)
        self.is_reference = name.startswith(bench_records.REFERENCE)
        obstacles = {
            "fused_update": config.fused_update and triton_here.obstacle_to_training(machine.device),
            "routing_kernels": config.routing_kernels and fused_routing.use_kernels(self.model, machine),
        }
        self.obstacles = [f"{key}=True has no effect: {why}" for key, why in obstacles.items() if why]
        if self.is_reference:
            options = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2))
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **options, fused=machine.device.type == "cuda")
        else:
            self.updater, self.totals = update.Updater(self.model, config, machine), RunningTotals()
            self.optimizer = self.updater.optimizer
        self.steps_made, self.way = 0, "auto"
        self.forget()

    def forget(self):
        """Starts what is noted down for the record."""
        self.checks, self.decoders_used, self.compile_seconds = [], {}, {"train": None, "decode": None}

    def written_by(self, way):
        """The same model with another one of decoding.DECODERS."""
        other = copy.copy(self)
        other.name, other.title, other.way = f"{self.name}_by_{way}", f"{self.title}, decoder={way}", way
        other.forget()
        return other

    @property
    def is_compiled(self):
        return self.compile_seconds["train"] is not None

    @property
    def is_captured(self):
        return not self.is_reference and self.updater.captured is not None

    def make_ready(self):
        """Compiles and captures training, where the machine says so. Yields why one of them failed."""
        if self.is_reference:
            return
        for key, attempt in self.updater.make_ready(*self.batch(0), self.totals).items():
            if attempt.failure:
                yield f"{key} failed: {attempt.failure}"
            elif key == "compile":
                self.compile_seconds["train"] = attempt.seconds

    def batch(self, step):
        config = self.config
        return self.dataset.batch("train", config.seed, step, config.sequences_per_update, config.block_size)

    def train(self):
        """One update on a real batch."""
        x, y = self.batch(self.steps_made)
        if self.is_reference:
            self.model.train()
            with self.machine.autocast():
                objective = self.model(x, y).objective
            objective.backward()
            if self.config.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.model.set_step(self.steps_made)
            self.updater.update(self.steps_made, x, y, self.totals)
        self.steps_made += 1

    def train_uncaptured(self):
        """One update, kernel by kernel."""
        if self.is_reference:
            return self.train()
        captured, self.updater.captured = self.updater.captured, None
        self.train()
        self.updater.captured = captured

    def training(self):
        """A Unit of updates: on CUDA several in a row, as in training, where one batch is read while another trains."""
        repeats = UPDATES_IN_A_ROW if self.machine.device.type == "cuda" else 1
        return Unit(lambda: [self.train() for _ in range(repeats)], repeats=repeats, uncaptured=self.train_uncaptured)

    def decoder(self, batch_size):
        """The fastest decoder of batch_size texts at once; for a reference, one without a cache."""
        self.model.eval()
        if self.is_reference:
            return Uncached(self.model, self.machine)
        return decoding.fastest(self.model, batch_size, self.machine, TEMPERATURE, TOP_K, decoder=self.way)

    def text(self, batch_size):
        """(B, T) tokens of the validation split."""
        return self.dataset.batch("val", self.config.seed, 0, batch_size, self.config.block_size)[0]

    def sample_without_cache(self, characters):
        """Samples one text as the papers time it: batch 1, eager."""
        config = dataclasses.replace(self.config, inference_samples=1)
        evaluate.inference_speed(self.model, config, self.machine, characters)

    def backends(self):
        """In words: what the updates ran on, and which decoder ran at which batch sizes."""
        train = "eager, plain AdamW" if self.is_reference else "compiled" if self.is_compiled else "eager"
        train += ", captured" if self.is_captured else ""
        train += "" if self.is_reference else "".join(f", {name}" for name in self.updater.kernels)
        for layer in self.model.moe_layers()[:1]:
            train = f"{layer.backend_name(self.machine.device, self.machine.dtype, self.is_compiled)}, {train}"
        sizes = {}
        for batch_size, how in self.decoders_used.items():
            sizes.setdefault(how, []).append(str(batch_size))
        ways = [how if len(sizes) == 1 else f"batch {', '.join(these)}: {how}" for how, these in sizes.items()]
        return {"train": train, "decode": "; ".join(ways) or "not measured"}

    def bytes_held(self, is_training):
        """Bytes of weights and buffers, in training also of the optimiser's state and of weights in bfloat16."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if is_training:
            tensors += [value for state in self.optimizer.state.values() for value in state.values()]
            tensors += [] if self.is_reference else self.updater.copies.of.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Uncached(Decoder):
    """Decodes as an eager script does: the whole window is read again for each character."""

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
        with self.machine.any_length():
            out = self.model(self.ids_BT[:, -self.model.config.block_size :], last_only=True)
        return out.logits[:, -1].float(), out.routing


class Decoding:
    """One candidate's decoder at one batch size, and the units to time."""

    def __init__(self, candidate, batch_size):
        block_size, machine = candidate.config.block_size, candidate.machine
        self.text = candidate.text(batch_size)
        self.prompt = self.text[:, : block_size // 2]
        # Several steps in a row, as in a text. For a reference one step is as long as reading a text, so one is enough.
        self.steps = 1 if candidate.is_reference else min(STEPS_IN_A_ROW, max(1, block_size // 4))
        self.span = 1 if candidate.is_reference else max(self.steps, block_size // 4)
        self.uniforms = lambda n: torch.rand(n, batch_size, device=machine.device)
        held, started = allocated(machine), time.perf_counter()
        self.decoder = candidate.decoder(batch_size)
        self._rewind()
        self._decode()
        machine.synchronize()
        self.bytes_held = allocated(machine) - held
        candidate.decoders_used[batch_size] = self.decoder.how
        if re.search("compiled|graph", self.decoder.how):
            seconds = time.perf_counter() - started
            candidate.compile_seconds["decode"] = (candidate.compile_seconds["decode"] or 0) + seconds

    def prefill(self):
        return Unit(lambda: self._read(self.prompt), self.decoder.clear)

    def decode(self):
        return Unit(self._decode, self._rewind, self.steps)

    def _rewind(self):
        """Back to a length at which the steps that follow see half a block, on average."""
        start = self.prompt.size(1) - self.span // 2
        if not start <= self.decoder.length <= start + self.span - self.steps:
            self.decoder.clear()
            self._read(self.text[:, :start])

    def _read(self, ids_BT):
        self.tokens_B = self.decoder.next(ids_BT, self.uniforms(1)[0]).tokens

    def _decode(self):
        for step in self.decoder.continued(self.tokens_B[:, None], self.uniforms(self.steps)):
            self.tokens_B = step.tokens


# ---------------------------------------------------------------------------------------------------------------------
# Checks. The fast way must come about as close to the exact result (the reference backend in twice the precision) as
# the plain way does (the same backend at its own precision). A router's close calls may fall differently in each.

SLACK = 3.0
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative errors that are always allowed


def is_right(row):
    return row["error"] <= row["limit"]  # false for NaN


def worst_error(what, found, plain, exact, dtype):
    """{what, error, limit} of the tensor with the largest error for its limit.

    found, plain, exact: equally long lists of tensors. An error is the norm of a difference over the exact norm.
    """
    rows = []
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        ours, theirs, truth = (value.detach().cpu().double() for value in (ours, theirs, truth))
        error, allowed = ((value - truth).norm().item() / (truth.norm().item() or 1.0) for value in (ours, theirs))
        rows.append({"what": what, "error": error, "limit": SLACK * allowed + ROUNDING[dtype]})
    return max(rows, key=lambda row: row["error"] / row["limit"] if is_right(row) else math.inf)


def plain_and_exact(candidate):
    """(its model on the reference backend, the same in twice the precision), both in eval mode."""
    config, machine = dataclasses.replace(candidate.config, moe_backend="reference"), candidate.machine
    with update.without_side_effects(candidate.model):  # initial weights, drawn and thrown away
        plain = GPT(config, candidate.dataset.vocabulary.size)
    plain.load_state_dict(candidate.model.state_dict())
    exact = copy.deepcopy(plain).to(torch.float64 if machine.dtype == torch.float32 else torch.float32)
    has_doubles = machine.device.type != "mps"
    return plain.to(machine.device).eval(), exact.to(machine.device if has_doubles else "cpu").eval()


def check_training(candidate):
    """{what, error, limit} of the loss and every gradient.

    In eval mode, since dropout differs between the models; on four rows, unless a graph was compiled for all rows.
    """
    machine = candidate.machine
    x, y = candidate.batch(0) if candidate.is_compiled else (rows[:4] for rows in candidate.batch(0))

    def gradients(run_model, model, context):
        ids, targets = (rows.to(model.token_embedding.weight.device) for rows in (x, y))
        with update.without_side_effects(model):
            with context:
                objective = run_model.eval()(ids, targets).objective
            objective.backward()
            return [objective, *(parameter.grad for parameter in model.parameters())]

    plain, exact = plain_and_exact(candidate)
    results = [
        gradients(candidate.updater.run_model, candidate.model, machine.autocast()),
        gradients(plain, plain, machine.autocast()),
        gradients(exact, exact, contextlib.nullcontext()),
    ]
    return worst_error("training, loss and gradients against the reference backend", *results, machine.dtype)


def check_capture(candidate):
    """{what, error, limit} of a captured update's gradient norm, against the same update kernel by kernel, not fused.

    With the same random numbers; nothing moves, for the guard refuses both.
    """
    updater, norms = candidate.updater, []
    fast = updater.captured, updater.fused
    for way in (fast, (None, None)):
        with update.without_side_effects(candidate.model), updater.guard.closed():
            torch.manual_seed(0)
            updater.captured, updater.fused = way
            norms.append(updater.update(0, *candidate.batch(0), candidate.totals).gradient_norm.clone())
    updater.captured, updater.fused = fast
    what = "a captured update, its gradient norm against that without a graph"
    found, plain = ([norm] for norm in norms)
    return worst_error(what, found, plain, plain, candidate.machine.dtype)


@torch.no_grad()
def check_decoding(candidate, decoder, batch_size):
    """{what, error, limit} of the logits after half a block is read at once, after each of 16 more characters, and
    after some that the decoder draws in a row, as when it is timed."""
    half, machine = candidate.config.block_size // 2, candidate.machine
    text = candidate.text(batch_size)[:, : half + 16]
    decoder.clear()
    found = [decoder.read(text[:, :half])[0], *(decoder.read(ids[:, None])[0] for ids in text[:, half:].t())]
    decoder.clear()
    decoder.read(text[:, : half - 1])
    uniform_SB = torch.rand(min(STEPS_IN_A_ROW, half), batch_size, device=machine.device)
    drawn = [step.tokens.clone() for step in decoder.continued(text[:, half - 1 : half], uniform_SB)]
    own_text = torch.cat((text[:, :half], torch.stack(drawn, dim=1)), dim=1)
    found.append(decoder.read(own_text[:, -1:])[0])
    decoder.clear()

    def logits_of(model):
        texts = (ids.to(model.token_embedding.weight.device) for ids in (text, own_text))
        of_text, of_own_text = (model(ids).logits for ids in texts)
        return [torch.cat((of_text[:, half - 1 :], of_own_text[:, -1:]), dim=1)]

    plain, exact = plain_and_exact(candidate)
    with machine.autocast():
        plainly = logits_of(plain)
    what = f"decoding at batch {batch_size}, logits against the model without a cache"
    return worst_error(what, [torch.stack(found, dim=1)], plainly, logits_of(exact), machine.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Timing

PATIENCE = 5  # after so many times the seconds, three rounds are enough


def timings(units, machine, seconds, at_least=bench_records.FEWEST, at_most=100, label=""):
    """{name: [seconds of each round]} of units = {name: Unit}, after one or two rounds to warm up."""
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
    """{name: seconds} of each unit once; the round's number says which comes first."""
    names = list(units)
    shift = number % len(names)
    return {name: seconds_of(units[name], machine) for name in names[shift:] + names[:shift]}


def seconds_of(unit, machine):
    """Seconds of one run, over its repeats."""
    unit.prepare()
    machine.synchronize()
    started = time.perf_counter()
    unit.run()
    machine.synchronize()
    return (time.perf_counter() - started) / unit.repeats


def percentiles(values):
    """{median, p10, p90, n}"""
    low, median, high = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": low, "p90": high, "n": len(values)}


def allocated(machine):
    """Bytes of CUDA memory in use; 0 on other devices."""
    return torch.cuda.memory_allocated(machine.device) if machine.device.type == "cuda" else 0


def peak_bytes(machine, unit, held):
    """Bytes of CUDA memory that one run needs: held before it, plus its own peak. None on other devices."""
    if machine.device.type != "cuda":
        return None
    unit.prepare()
    before = allocated(machine)
    torch.cuda.reset_peak_memory_stats(machine.device)
    (unit.uncaptured or unit.run)()
    machine.synchronize()
    return held + torch.cuda.max_memory_allocated(machine.device) - before


# ---------------------------------------------------------------------------------------------------------------------
# The floor


def ceilings(machine, model):
    """The highest measured rates of this machine.

    flops_per_second: of a large matrix product in the compute dtype; bytes_per_second: of reading or copying as much as
    the weights of `model`, which may fit into a cache.
    """
    flops = []
    for side in {"cpu": (512, 1024), "cuda": (4096, 8192)}.get(machine.device.type, (1024, 2048)):
        a, b = torch.randn(2, side, side, device=machine.device).to(machine.dtype)
        flops.append(best_rate(lambda a=a, b=b: a @ b, 2 * side**3, machine))
    x = torch.ones(sum(p.numel() for p in model.parameters()), device=machine.device, dtype=machine.dtype)
    y, moved = torch.empty_like(x), x.numel() * x.element_size()
    rates = best_rate(lambda: y.copy_(x), 2 * moved, machine), best_rate(lambda: x.sum(), moved, machine)
    return {"flops_per_second": max(flops), "bytes_per_second": max(rates)}


def best_rate(call, amount, machine, seconds=0.5):
    """The amount per second of the fastest call in so many seconds."""
    calls = 1 if machine.device.type == "cpu" else 20  # in a row, so that launching one overlaps with running another
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


def floor_of(candidate, task, batch_size, tokens, ceilings):
    """{flops, bytes} that a unit of the task must compute and move, and the least seconds, at the ceilings.

    tokens: of the unit, over all sequences.
    """
    model, block_size, width = candidate.model, candidate.config.block_size, candidate.machine.dtype.itemsize
    if task == "train":
        flops, moved = tokens * accounting.training_flops_per_token(model), traffic.training_bytes(model, width)
    elif task == "prefill":
        length = tokens // batch_size
        flops = tokens * accounting.forward_flops_per_token(model, context=length - 1)
        moved = traffic.prefill_bytes(model, batch_size, length, width)
    else:  # with a cache even for `papers`: that much is enough to sample a character
        contexts = [block_size // 2] if task == "decode" else [min(i, block_size - 1) for i in range(tokens)]
        flops = batch_size * sum(accounting.forward_flops_per_token(model, context) for context in contexts)
        moved = sum(traffic.decoding_bytes(model, batch_size, context, width) for context in contexts)
    seconds = max(flops / ceilings["flops_per_second"], moved / ceilings["bytes_per_second"])
    return {"flops": flops, "bytes": moved, "seconds": seconds}
