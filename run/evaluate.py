"""How a model is measured, always in eval mode, never touching a global random stream.

clean   cross-entropy over the whole split, in windows of block_size, each character predicted once
paper   as the papers do it: mean over random batches; also with the weighted auxiliary losses added in, as some of
        them seem to have done
inference_speed   the papers' way, but for a clock that waits for the device: no cache, one text at a time
"""

import math
import time
from typing import NamedTuple

import torch

import balance
from data.common import character_class
from model import IGNORED, sample
from run.processes import ALONE

# The random batches of an evaluation come from another stream than those of training with the same seed.
EVALUATION_STREAM = 2**32


class Clean(NamedTuple):
    nats: float  # per character (per byte on enwik8)
    tokens: int  # how many were predicted
    stats: list[balance.RoutingStats]  # per MoE layer, over these tokens

    @property
    def bpc(self):
        return bits(self.nats)


class Paper(NamedTuple):
    nats: float
    with_aux: float  # nats + the weighted auxiliary losses


def bits(nats):
    """Bits per character from nats per character."""
    return nats / math.log(2)


def drop_rate_by_class(stats: balance.RoutingStats, vocabulary) -> dict:
    """{"drop_rate_by_class": {class: share of its choices that capacity dropped}}; {} where nothing can be dropped."""
    if not stats.dropped_by_symbol.numel():
        return {}
    totals = {}
    for symbol, counts in zip(vocabulary.symbols, stats.dropped_by_symbol.t().tolist()):
        total = totals.setdefault(character_class(symbol), [0.0, 0.0])
        total[:] = (a + b for a, b in zip(total, counts))
    return {"drop_rate_by_class": {name: dropped / made for name, (dropped, made) in totals.items() if made}}


@torch.no_grad()
def clean(model, dataset, split, config, machine, ranks=ALONE) -> Clean:
    """model: a GPT or its compiled form; it is put in eval mode. ranks: the processes that share the windows."""
    model.eval()
    losses, counts, stats = [], [], None
    for i, (x, y) in enumerate(dataset.windows(split, config.block_size, config.batch_size)):
        count = (y != IGNORED).sum()
        counts.append(count)
        losses.append(torch.zeros((), device=x.device))
        if not ranks.takes(i) and i > 0:  # all read the first, which shows the shapes of the statistics
            continue
        with machine.autocast():
            out = model(x, y)
        if ranks.takes(i):
            losses[-1] = out.loss.float() * count
            stats = balance.add_stats(stats, out.stats)
        else:
            stats = [balance.RoutingStats(*(torch.zeros_like(value) for value in layer)) for layer in out.stats]
    total, *sums = ranks.total([torch.stack(losses), *(value for layer in stats for value in layer)])
    width = len(balance.RoutingStats._fields)
    stats = [balance.RoutingStats(*sums[i : i + width]) for i in range(0, len(sums), width)]
    tokens = int(torch.stack(counts).sum())
    return Clean(total.cpu().double().sum().item() / tokens, tokens, stats)


@torch.no_grad()
def paper(model, dataset, split, config, machine, step, ranks=ALONE) -> Paper:
    """Mean over config.eval_iters random batches, which depend on the seed and the step alone. ranks: the processes
    that share them."""
    model.eval()
    losses, objectives = torch.zeros(2, config.eval_iters, device=machine.device)
    for i in filter(ranks.takes, range(config.eval_iters)):
        x, y = dataset.batch(
            split, config.seed + EVALUATION_STREAM, step * config.eval_iters + i, config.batch_size, config.block_size
        )
        with machine.autocast():
            out = model(x, y)
        losses[i], objectives[i] = out.loss, out.objective
    losses, objectives = ranks.total([losses, objectives])
    return Paper(losses.cpu().double().mean().item(), objectives.cpu().double().mean().item())


@torch.no_grad()
def inference_speed(model, config, machine, characters=500) -> list[float]:
    """Characters a second of each of config.inference_samples texts, written as the papers' template does: batch 1,
    temperature 0.8, top-k 200, eager, and without a cache, so that each character costs a pass over the whole context.
    One thing differs: the template reads its clock without waiting for the device, ours waits, before and after.

    Empty where the routing looks at later characters, so that nothing can be written.
    """
    if not config.is_causal:
        return []
    model.eval()
    generator = torch.Generator(machine.device).manual_seed(config.seed)
    speeds = []
    for _ in range(config.inference_samples):
        text = torch.zeros((1, 1), dtype=torch.int64, device=machine.device)
        machine.synchronize()
        started = time.perf_counter()
        for _ in range(characters):
            with machine.autocast():
                logits = model(text[:, -config.block_size :], last_only=True).logits
            uniform = torch.rand(1, generator=generator, device=machine.device)
            token = sample(logits[:, -1].float(), 0.8, 200, uniform)
            text = torch.cat((text, token[:, None]), dim=1)
        machine.synchronize()
        speeds.append(characters / (time.perf_counter() - started))
    return speeds
