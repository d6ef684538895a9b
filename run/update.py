"""One update of the weights: the step that train.py repeats and bench.py times.

    updater = Updater(model, config, machine)
    totals = RunningTotals()
    updater.make_ready(x, y, totals)                # torch.compile, and a CUDA graph, where the machine says so
    model.set_step(step)
    update = updater.update(step, x, y, totals)     # nothing in here waits for the device

An update is a forward and a backward pass over each micro-batch, gradient clipping, AdamW, and balancing of experts.
The learning rate and the guard against non-finite numbers are here too.
"""

import contextlib
import functools
import math
import time
from typing import NamedTuple

import torch
import torch.nn as nn

import balance
from moe import Experts
from run.processes import ONE_PROCESS
from support import files, machines, triton_here
from support.capture import Captured, aside, side_stream
from support.fused_update import FusedUpdate, WeightCopies, is_capturing


class Update(NamedTuple):
    """How one update was made."""

    learning_rate: float
    gradient_norm: torch.Tensor  # () before clipping, on the device


class Attempt(NamedTuple):
    """The outcome of compiling or of capturing."""

    seconds: float
    failure: str | None  # in one line


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message names the step."""


class Updater:
    """Trains a model (GPT) as its config says, one update at a time.

    run_model is the callable that computes: the model, or its compiled form; eval_model is the one to evaluate.
    """

    def __init__(self, model, config, machine, processes=ONE_PROCESS):
        self.model, self.config, self.machine, self.processes = model, config, machine, processes
        self.run_model = self.eval_model = model
        self.parallel = None  # run_model as several processes train it; made at the first update
        if processes.splits_batches(config):
            model.batch_mean = processes.batch_mean
        self.optimizer = make_optimizer(model, config)
        self.guard = FiniteGuard(self.optimizer, machine.device)
        self.fused, self.copies = None, WeightCopies([])
        if config.fused_update and not triton_here.obstacle_to_training(machine.device):
            self.fuse()
        self.stream = side_stream(machine.device)
        self.captured, self.captured_totals = None, None  # the update as a CUDA graph, and the totals to which it adds

    @property
    def kernels(self):
        """The kernels of our own that take part in updates, in words."""
        parts = {"fused update": self.fused, "routing kernels": self.model.own_measures}
        return [name for name, part in parts.items() if part]

    def update(self, step, x, y, totals) -> Update:
        """Make update number `step`, counted from 0, after model.set_step(step).

        x, y: all sequences of the update (batch_size · gradient_accumulation_steps, T), of which this process trains on
        its own part. totals: a RunningTotals, to which the losses and routing statistics of this part are added; after
        `capture` it is the one given there.
        """
        rate = learning_rate(step, self.config)
        if not self.model.training:
            self.run_model.train()
        self.copies.follow()
        if self.captured:
            assert totals is self.captured_totals, "a captured update adds to the totals that it was captured with"
            gradient_norm = self.captured(step, rate, x, y)
        else:
            gradient_norm = self.make_update(step, rate, x, y, totals)
        for group in self.optimizer.param_groups:  # as a checkpoint keeps it
            group |= {"lr": rate, "capturable": False}
        totals.steps += 1
        return Update(rate, gradient_norm)

    def make_update(self, step, rate, x, y, totals):
        """The part of an update that can be captured. step, rate: numbers, or 0-d tensors on the device. -> the
        gradient norm before clipping, ()"""
        config, model, processes = self.config, self.model, self.processes
        batches = list(zip(processes.own_batches(x, config), processes.own_batches(y, config)))
        if self.parallel is None and processes.world_size > 1:
            self.parallel = self.make_parallel(*batches[0])
        run_model, objective, stats = self.parallel or self.run_model, 0.0, None
        for i, (x_part, y_part) in enumerate(batches):
            is_last = i == len(batches) - 1  # its backward pass averages the gradients over processes
            with contextlib.nullcontext() if is_last or not self.parallel else self.parallel.no_sync():
                with self.forward_pass():
                    out = run_model(x_part, y_part)
                part = out.objective / len(batches)
                part.backward()
            objective = objective + part.detach()
            totals.add(out, 1 / (len(batches) * processes.world_size))
            if config.router_bias_rate:
                stats = balance.add_stats(stats, out.stats)
        loads = [layer.load for layer in stats or ()]
        # The sum over processes is finite only where each process's objective is.
        objective, *loads = processes.all_reduce_sum([objective, *loads])
        gradient_norm = (self.fused or self.apply_gradients)(step, rate, objective)
        model.update_biases(loads)
        return gradient_norm

    def apply_gradients(self, step, rate, objective):
        """Clip the gradients, let the guard look, and make AdamW's step; `fused` does the same. -> the norm, ()"""
        self.copies.hand_over()
        max_norm = self.config.grad_clip or math.inf
        gradient_norm = clip_gradients(self.model.parameters(), max_norm, self.captured is None)
        self.guard.check(step, objective, gradient_norm)
        for group in self.optimizer.param_groups:
            group |= {"lr": rate, "capturable": is_capturing(self.machine.device)}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copies.refresh()
        return gradient_norm

    def fuse(self):
        """From now on, clip, check and step in three kernels, and multiply with bfloat16 copies of the weights."""
        # Of several micro-batches, gradients are summed in float32.
        if self.machine.dtype == torch.bfloat16 and self.config.gradient_accumulation_steps == 1:
            self.copies = WeightCopies(cast_weights(self.model))
        if triton_here.uses_triton(self.guard.bad_step):
            self.fused = FusedUpdate(self.optimizer, self.guard, self.config.grad_clip or math.inf, self.copies)

    @contextlib.contextmanager
    def forward_pass(self):
        """Around the forward pass of an update: precision of the products, and the weights that are used."""
        with self.machine.autocast(), self.copies.standing_in():
            yield

    def make_parallel(self, x, y):
        """run_model with gradients averaged over the processes.

        DDP rebuilds its buckets after one pass, which changes the order of sums over three or more processes. Two
        warm-up passes make a resumed run bit-identical.
        """
        parallel = self.processes.data_parallel(self.run_model, self.machine.device)
        with without_side_effects(self.model):
            for _ in range(2):
                with self.machine.autocast():
                    objective = parallel(x, y).objective
                objective.backward()
        return parallel

    def make_ready(self, x, y, totals) -> dict[str, Attempt]:
        """Compile and capture, where the machine says so. -> {"compile": …, "capture": …}, an Attempt for each tried

        x, y: all sequences of an update; totals: the RunningTotals of all updates to come; None: there will be none,
        and only evaluation is captured.
        """
        attempts = {}
        if self.machine.compile:
            attempts["compile"] = self.compile(x, y)
        if self.machine.capture:
            attempts["capture"] = self.capture(x, y, totals)
        return attempts

    def compile(self, x, y) -> Attempt:
        """Run the compiled model from now on, where it compiles. x, y: all sequences of an update.

        Training and evaluation are each run once, without side effects.
        """
        machine, size, failure, started = self.machine, self.config.batch_size, None, time.perf_counter()
        own = (self.processes.own_batches(rows, self.config)[0] for rows in (x, y))
        compiled = machines.compiled(self.model)
        with without_side_effects(self.model), aside(self.stream):
            try:
                with self.forward_pass():
                    objective = compiled.train()(*own).objective
                objective.backward()
                with machine.autocast(), torch.no_grad():
                    compiled.eval()(x[:size], y[:size])
            except torch.OutOfMemoryError:
                raise  # would not fit without compiling either
            except Exception as error:  # whatever a compiler raises, training can go on without it
                compiled, failure = self.model, f"{type(error).__name__}: {files.first_line(error)}"
        machine.synchronize()
        self.run_model, self.eval_model = compiled, compiled
        self.machine = machine._replace(compile=failure is None)
        return Attempt(time.perf_counter() - started, failure)

    def capture(self, x, y, totals) -> Attempt:
        """Make each update, and the forward pass of evaluations, one CUDA graph from now on, where that is possible.

        x, y, totals: see make_ready. Comes after a checkpoint is restored, since the graphs keep the addresses of
        weights, moments and totals. Without CUDA they run step by step under the same rules. The trial updates leave
        nothing behind: the guard refuses them.
        """
        size, failure, started = self.config.batch_size, None, time.perf_counter()
        held = [value.clone() for value in totals.tensors()] if totals else []
        self.run_model.train()
        with without_side_effects(self.model), self.guard.closed():
            try:
                if totals:
                    inputs = (0, self.config.learning_rate, x, y)
                    function = functools.partial(self.make_update, totals=totals)
                    captured = Captured(function, inputs, self.machine.device, self.stream)
                    if self.fused:
                        self.fused.fill_table_of_graph()
                eval_model = CapturedEvaluation(self.run_model, self.machine, x[:size], y[:size], self.stream)
                self.captured, self.captured_totals = (captured, totals) if totals else (None, None)
                self.eval_model = eval_model
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a driver raises, training can go on without it
                failure = f"{type(error).__name__}: {files.first_line(error)}"
        for group in self.optimizer.param_groups:
            group |= {"lr": self.config.learning_rate, "capturable": False}
        if totals:
            totals.set(held)
        self.machine.synchronize()
        self.machine = self.machine._replace(capture=failure is None)
        return Attempt(time.perf_counter() - started, failure)


class CapturedEvaluation(Captured):
    """run_model's forward pass in eval mode as one CUDA graph. Its Output is overwritten by the next call."""

    def __init__(self, run_model, machine, x, y, stream):
        def forward(x, y):
            with machine.autocast(), torch.no_grad():
                return run_model(x, y)

        self.eval = run_model.eval
        self.eval()
        super().__init__(forward, (x, y), machine.device, stream)


def learning_rate(step, config):
    """The learning rate of update number `step`, counted from 0, as in nanoGPT.

    Linear warm-up, a cosine down to min_lr at lr_decay_iters, and min_lr after that; constant without decay_lr. A
    warm-up that lasts until lr_decay_iters or longer is made in full, and min_lr follows at once.
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    progress = 1.0 if step >= end else (step - config.warmup_iters) / (end - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def clip_gradients(parameters, max_norm, may_read=True):
    """Clip the global gradient norm. -> the norm before, ()

    As torch.nn.utils.clip_grad_norm_, but on a CPU, where reading the norm is free, short gradients are left alone.
    """
    parameters = list(parameters)
    gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not (may_read and gradient_norm.is_cpu and gradient_norm <= max_norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, gradient_norm)
    return gradient_norm


def make_optimizer(model, config):
    """AdamW with weight decay on matrices and embeddings only; expert biases are stored as matrices, but are not
    decayed."""
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        is_decayed = parameter.dim() >= 2 and not name.rpartition(".")[2].startswith("bias")
        (decayed if is_decayed else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def cast_weights(model):
    """[(module, name)] of the weights that a forward pass casts for the products of matrices, and uses nowhere else.

    Experts that blocks share are used several times: their gradients are summed in float32.
    """
    places = []
    for _, module in model.modules_without_routers():
        if isinstance(module, nn.Linear):
            places.append((module, "weight"))
        elif isinstance(module, Experts) and not model.config.share_experts:
            places += [(module, name) for name, _ in module.named_parameters() if name.startswith("w_")]
    return places


class FiniteGuard:
    """After the first loss or gradient that is not finite, skips that update and all later ones; never waits for the
    device.

    Fused optimisers skip their update where `found_inf` is 1, an interface made for torch.amp.GradScaler.
    """

    def __init__(self, optimizer, device):
        self.optimizer = optimizer
        self.bad_step = torch.full((), -1.0, device=device)

    def check(self, step, loss, gradient_norm):
        """step: a number, or a 0-d tensor."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        step = step.float() if isinstance(step, torch.Tensor) else float(step)
        self.bad_step.copy_(torch.where((self.bad_step < 0) & bad, step, self.bad_step))
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (self.bad_step >= 0).float()

    @contextlib.contextmanager
    def closed(self):
        """Every update inside is skipped, and changes neither weights nor moments. None has been skipped before."""
        self.bad_step.fill_(0.0)
        try:
            yield
        finally:
            self.bad_step.fill_(-1.0)

    def raise_if_skipped(self):
        """NotFinite where an update was skipped. Waits for the device."""
        step = int(self.bad_step.item())
        if step >= 0:
            raise NotFinite(f"the loss or a gradient of step {step:,}")


@contextlib.contextmanager
def without_side_effects(model):
    """Restores gradients (to none), buffers and random streams afterwards."""
    state, buffers = random_state(), [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
        set_random_state(state)


def random_state():
    """The states of torch's random generators: the CPU's, and the current GPU's where there is one."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
