"""One update of the weights: the step that train.py repeats and bench.py times.

    updater = Updater(model, config, machine)
    totals = RunningTotals()
    model.set_step(step)
    update = updater.update(step, x, y, totals)     # nothing in here waits for the device

An update is a forward and a backward pass over each micro-batch, gradient clipping, AdamW, and balancing of experts.
The learning rate, the guard against non-finite numbers and compilation are here too.
"""

import contextlib
import math
import time
from typing import NamedTuple

import torch

import balance
from run.processes import ONE_PROCESS
from support import files, machines


class Update(NamedTuple):
    """How one update was made."""

    learning_rate: float
    gradient_norm: torch.Tensor  # () before clipping, on the device


class Compiled(NamedTuple):
    """The outcome of torch.compile."""

    seconds: float
    failure: str | None  # why it is not compiled, in one line


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message names the step."""


class Updater:
    """Trains a model (GPT) as its config says, one update at a time.

    run_model is the callable that computes: the model, or its compiled form.
    """

    def __init__(self, model, config, machine, processes=ONE_PROCESS):
        self.model, self.run_model, self.config, self.machine, self.processes = model, model, config, machine, processes
        self.parallel = None  # run_model as several processes train it; made at the first update
        if processes.splits_batches(config):
            model.batch_mean = processes.batch_mean
        self.optimizer = make_optimizer(model, config)
        self.guard = FiniteGuard(self.optimizer, machine.device)

    def update(self, step, x, y, totals) -> Update:
        """Make update number `step`, counted from 0, after model.set_step(step).

        x, y: all sequences of the update (batch_size · gradient_accumulation_steps, T), of which this process trains on
        its own part. totals: a RunningTotals, to which the losses and routing statistics of this part are added.
        """
        config, model, processes = self.config, self.model, self.processes
        rate = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not model.training:
            self.run_model.train()
        batches = list(zip(processes.own_batches(x, config), processes.own_batches(y, config)))
        if self.parallel is None and processes.world_size > 1:
            self.parallel = self.make_parallel(*batches[0])
        run_model, objective, stats = self.parallel or self.run_model, 0.0, None
        for i, (x_part, y_part) in enumerate(batches):
            is_last = i == len(batches) - 1  # its backward pass averages the gradients over processes
            with contextlib.nullcontext() if is_last or not self.parallel else self.parallel.no_sync():
                with self.machine.autocast():
                    out = run_model(x_part, y_part)
                part = out.objective / len(batches)
                part.backward()
            objective = objective + part.detach()
            totals.add(out, 1 / (len(batches) * processes.world_size))
            stats = balance.add_stats(stats, out.stats)
        loads = [layer.load for layer in stats] if config.router_bias_rate else []
        # The sum over processes is finite only where each process's objective is.
        objective, *loads = processes.all_reduce_sum([objective, *loads])
        gradient_norm = clip_gradients(model.parameters(), config.grad_clip or math.inf)
        self.guard.check(step, objective, gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        model.update_biases(loads)
        totals.steps += 1
        return Update(rate, gradient_norm)

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

    def compile(self, x, y) -> Compiled:
        """Run the compiled model from now on, where it compiles. x, y: all sequences of an update.

        Training and evaluation are each run once, without side effects.
        """
        machine, size, failure, started = self.machine, self.config.batch_size, None, time.perf_counter()
        own = (self.processes.own_batches(rows, self.config)[0] for rows in (x, y))
        compiled = machines.compiled(self.model)
        with without_side_effects(self.model):
            try:
                with machine.autocast():
                    objective = compiled.train()(*own).objective
                objective.backward()
                with machine.autocast(), torch.no_grad():
                    compiled.eval()(x[:size], y[:size])
            except torch.OutOfMemoryError:
                raise  # would not fit without compiling either
            except Exception as error:  # whatever a compiler raises, training can go on without it
                compiled, failure = self.model, f"{type(error).__name__}: {files.first_line(error)}"
        machine.synchronize()
        self.run_model, self.machine = compiled, machine._replace(compile=failure is None)
        return Compiled(time.perf_counter() - started, failure)


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


def clip_gradients(parameters, max_norm):
    """Clip the global gradient norm. -> the norm before, ()

    As torch.nn.utils.clip_grad_norm_, but on a CPU, where reading the norm is free, short gradients are left alone.
    """
    parameters = list(parameters)
    gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not gradient_norm.is_cpu or not gradient_norm <= max_norm:
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


class FiniteGuard:
    """After the first loss or gradient that is not finite, skips that update and all later ones; never waits for the
    device.

    Fused optimisers skip their update where `found_inf` is 1, an interface made for torch.amp.GradScaler.
    """

    def __init__(self, optimizer, device):
        self.optimizer = optimizer
        self.bad_step = torch.full((), -1.0, device=device)

    def check(self, step, loss, gradient_norm):
        bad = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        self.bad_step = torch.where((self.bad_step < 0) & bad, float(step), self.bad_step)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (self.bad_step >= 0).float()

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
