"""One update of the weights: the step that train.py makes some thousand times and bench.py times.

    updater = Updater(model, config, machine)
    sums = Sums()
    model.set_step(step)
    made = updater.update(step, x, y, sums)     # nothing in here waits for the device

Forward and backward over the micro-batches, clipping, AdamW, balancing; and what belongs to a step: the learning rate,
the guard against numbers that are not finite, compilation, and undoing what a trial step did.
"""

import contextlib
import math
import time
from typing import NamedTuple

import torch

import balance
from run.processes import ALONE
from support import files, machines


class Update(NamedTuple):
    """What one update was made with."""

    learning_rate: float
    gradient_norm: torch.Tensor  # () before clipping, on the device


class Compiled(NamedTuple):
    model: torch.nn.Module  # the compiled form, or the model itself where that failed
    seconds: float
    failure: str | None  # why it is not compiled, in one line


class Sums:
    """What training watches, summed over forward passes: on the device, in the same tensors all along, to be read now
    and then."""

    def __init__(self):
        self.steps = 0  # updates
        self.terms: dict[str, torch.Tensor] = {}  # loss, objective, aux_NAME (raw): 0-d float32, nats; sums over steps
        self.stats: list[balance.RoutingStats] = []  # a layer each

    def tensors(self):
        return [*self.terms.values(), *(value for layer in self.stats for value in layer)]

    def totals(self, ranks):
        """(terms, stats), each summed over the processes."""
        tensors = iter(ranks.total(self.tensors()))
        terms = {name: next(tensors) for name in self.terms}
        return terms, [balance.RoutingStats(*(next(tensors) for _ in layer)) for layer in self.stats]

    def add(self, out, share):
        """out: a forward pass's Output; share: its part of one update."""
        terms = {
            "loss": out.loss,
            "objective": out.objective,
            **{f"aux_{name}": term.raw for name, term in out.aux.items()},
        }
        terms = {name: value.detach().float() * share for name, value in terms.items()}
        if not self.terms:
            self.terms = terms
            self.stats = [balance.RoutingStats(*(value.clone() for value in layer)) for layer in out.stats]
            return
        # One call for all of them: tensors of a few numbers each cost what their launches cost.
        torch._foreach_add_(
            self.tensors(),
            [*(terms[name] for name in self.terms), *(value for layer in out.stats for value in layer)],
        )


class Updater:
    """Makes the updates of `model` (a GPT) as `config` says; `run_model` is what runs: the model, or its compiled
    form. ranks: the processes that make them together."""

    def __init__(self, model, config, machine, ranks=ALONE):
        self.model, self.run_model, self.config, self.machine, self.ranks = model, model, config, machine, ranks
        self.parallel = None  # run_model as several processes train it
        if ranks.splits_batches(config):
            model.batch_mean = ranks.mean_of_batch
        self.optimizer = make_optimizer(model, config)
        self.guard = FiniteGuard(self.optimizer, machine.device)

    def update(self, step, x, y, sums) -> Update:
        """Update number `step`, counted from 0, from all its rows x, y (batch_size · gradient_accumulation_steps, T);
        what is seen of this process's part is added to `sums` (a Sums). model.set_step(step) comes before it."""
        config, model = self.config, self.model
        rate = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not model.training:
            self.run_model.train()
        batches = list(zip(self.ranks.own(x, config), self.ranks.own(y, config)))
        if self.parallel is None and self.ranks.count > 1:
            self.parallel = self.make_parallel(*batches[0])
        objective, stats = 0.0, None
        for i, (x_part, y_part) in enumerate(batches):
            with self.exchange(is_last=i == len(batches) - 1) as run_model:
                with self.machine.autocast():
                    out = run_model(x_part, y_part)
                part = out.objective / len(batches)
                part.backward()
            objective = objective + part.detach()
            sums.add(out, 1 / (len(batches) * self.ranks.count))
            stats = balance.add_stats(stats, out.stats)
        loads = [layer.load for layer in stats] if config.router_bias_rate else []
        objective, *loads = self.ranks.total([objective, *loads])  # a sum that is finite where that of each process is
        gradient_norm = clip_gradients(list(model.parameters()), config.grad_clip or math.inf)
        self.guard.check(step, objective, gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        model.update_biases(loads)
        sums.steps += 1
        return Update(rate, gradient_norm)

    def make_parallel(self, x, y):
        """run_model as several processes train it. It lays out anew what it exchanges after its first pass, and sums of
        more than two numbers depend on that: two passes, undone, make a resumed run the uninterrupted one."""
        parallel = self.ranks.parallel(self.run_model, self.machine.device)
        with undone(self.model):
            for _ in range(2):
                with self.machine.autocast():
                    objective = parallel(x, y).objective
                objective.backward()
        return parallel

    @contextlib.contextmanager
    def exchange(self, is_last):
        """Inside it, what it gives runs a micro-batch; after the last one's backward pass gradients are averaged over
        the processes."""
        if self.ranks.count == 1:
            yield self.run_model
            return
        with contextlib.nullcontext() if is_last else self.parallel.no_sync():
            yield self.parallel


def learning_rate(step, config):
    """Of update number `step`, counted from 0: linear warm-up, cosine to min_lr at lr_decay_iters, min_lr from there;
    constant without decay_lr, as in nanoGPT."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def clip_gradients(parameters, max_norm):
    """torch.nn.utils.clip_grad_norm_, but a CPU, which may look at the norm, does not multiply gradients that are short
    enough by 1. -> the norm before, ()"""
    gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not gradient_norm.is_cpu or not gradient_norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, gradient_norm)
    return gradient_norm


def make_optimizer(model, config):
    """AdamW, with decay on matrices and embeddings only; expert biases are stacked to matrices, but stay biases."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.dim() >= 2 and not name.rpartition(".")[2].startswith("bias")]
    taken = {id(p) for p in decayed}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class FiniteGuard:
    """Refuses, on the device and without waiting for it, every update from the first whose loss or gradient is not
    finite.

    Fused optimisers skip their update where `found_inf` is 1; it is how torch.amp.GradScaler talks to them.
    """

    def __init__(self, optimizer, device):
        self.optimizer = optimizer
        self.bad_step = torch.full((), -1.0, device=device)

    def check(self, step, loss, gradient_norm):
        bad = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        self.bad_step = torch.where((self.bad_step < 0) & bad, float(step), self.bad_step)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (self.bad_step >= 0).float()

    def first_bad_step(self):
        """The step that was refused, or None. Waits for the device."""
        step = int(self.bad_step.item())
        return step if step >= 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Trial steps


def compile_model(model, x, y, machine, evaluated=None) -> Compiled:
    """The compiled form of the model after one step and one evaluation on x, y (B, T), both undone. evaluated: (x, y)
    to evaluate on, if they have another shape."""
    started = time.perf_counter()
    compiled, failure = machines.compiled(model), None
    with undone(model):
        try:
            with machine.autocast():
                objective = compiled.train()(x, y).objective
            objective.backward()
            with machine.autocast(), torch.no_grad():
                compiled.eval()(*(evaluated or (x, y)))
        except torch.OutOfMemoryError:
            raise  # would not fit without compiling either
        except Exception as error:  # whatever a compiler raises, training can go on without it
            compiled, failure = model, f"{type(error).__name__}: {files.first_line(error)}"
    machine.synchronize()
    return Compiled(compiled, time.perf_counter() - started, failure)


@contextlib.contextmanager
def undone(model):
    """What is computed inside leaves no gradient behind and no mark on buffers and the random streams."""
    state, buffers = random_state(), [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
        model.zero_grad(set_to_none=True)
        set_random_state(state)


def random_state():
    """Of the CPU and of the current GPU, if there is one."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
