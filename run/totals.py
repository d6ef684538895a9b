"""Running totals since the last log line: losses and routing statistics, summed on the device.

    totals = RunningTotals()
    totals.add(model(x, y), share=1 / len(batches))    # nothing here waits for the device
    totals.steps += 1
    line = totals.line(tokens_per_step, processes)     # means over the steps, read once
    totals.restart()

Checkpoints hold them, so that a run resumed between two log lines writes the line of the uninterrupted run.
"""

import time

import torch

import balance


class RunningTotals:
    """Sums over the updates since the last log line. Their clock starts with them."""

    def __init__(self):
        self.steps = 0  # updates
        self.terms: dict[str, torch.Tensor] = {}  # loss, objective, aux_NAME (raw): 0-d float32, nats
        self.stats: list[balance.RoutingStats] = []  # one per MoE layer
        self.started = time.perf_counter()

    def tensors(self):
        """The summed tensors; they stay the same objects from the first update on."""
        return [*self.terms.values(), *(value for layer in self.stats for value in layer)]

    def add(self, out, share):
        """Add a forward pass. out: its model.Output; share: its part of one update."""
        terms = {f"aux_{name}": term.raw for name, term in out.aux.items()}
        terms = {"loss": out.loss, "objective": out.objective} | terms
        terms = {name: value.detach().float() * share for name, value in terms.items()}
        if not self.terms:
            self.terms = terms
            self.stats = [balance.RoutingStats(*(value.clone() for value in layer)) for layer in out.stats]
            return
        # One call for all of them: adding tensors of a few numbers costs its launch.
        added = [*(terms[name] for name in self.terms), *(value for layer in out.stats for value in layer)]
        torch._foreach_add_(self.tensors(), added)

    def restart(self):
        """Begin anew, in the same tensors."""
        self.steps, self.started = 0, time.perf_counter()
        self.set([])

    def set(self, values):
        """Set all sums; [] = to 0."""
        if values:
            torch._foreach_copy_(self.tensors(), values)
        elif self.terms:
            torch._foreach_zero_(self.tensors())

    def exclude(self, seconds):
        """Do not count this time, which went into something else than training."""
        self.started += seconds

    def line(self, tokens_per_step, processes):
        """The numbers of a log line: means over the steps and the processes, in train mode. Waits for the device."""
        tensors = iter(read_together(processes.all_reduce_sum(self.tensors())))
        means = {name: next(tensors).item() / self.steps for name in self.terms}
        stats = [balance.RoutingStats(*(next(tensors) for _ in layer)) for layer in self.stats]
        seconds = time.perf_counter() - self.started  # reading has waited for the device
        return {
            **means,
            "step_ms": 1000 * seconds / self.steps,
            "tokens_per_second": tokens_per_step * self.steps / seconds,
            "routing": [balance.summarize(layer) for layer in stats],
        }

    # -----------------------------------------------------------------------------------------------------------------
    # In checkpoints

    def to_dict(self):
        values, width = read_together(self.tensors()), len(balance.RoutingStats._fields)
        return {
            "steps": self.steps,
            "seconds": time.perf_counter() - self.started,
            "sums": dict(zip(self.terms, values)),
            "stats": [values[i : i + width] for i in range(len(self.terms), len(values), width)],
        }

    @classmethod
    def from_dict(cls, saved, device):
        totals = cls()
        totals.steps, totals.started = saved["steps"], totals.started - saved["seconds"]
        totals.terms = {name: value.to(device) for name, value in saved["sums"].items()}
        totals.stats = [balance.RoutingStats(*(value.to(device) for value in layer)) for layer in saved["stats"]]
        return totals


def read_together(tensors):
    """Copies on the CPU of float32 tensors, which wait for the device once."""
    if not tensors:
        return []
    flat = torch.cat([value.reshape(-1) for value in tensors]).cpu()
    parts = flat.split([value.numel() for value in tensors])
    return [part.view(value.shape) for part, value in zip(parts, tensors)]
