"""The two ways to measure a model on a data set, always in eval mode, never touching a global random stream.

clean   cross-entropy over the whole split, in windows of block_size, each character predicted once
paper   as the papers do it: mean over random batches; also with the weighted auxiliary losses added in, as some of
        them seem to have done
"""

import math
from typing import NamedTuple

import torch

import moe
from data.common import character_class
from model import IGNORED

# The random batches of an evaluation come from another stream than those of training with the same seed.
EVALUATION_STREAM = 2**32


class Clean(NamedTuple):
    nats: float  # per character (per byte on enwik8)
    tokens: int  # how many were predicted
    stats: list[moe.RoutingStats]  # per MoE layer, over these tokens

    @property
    def bpc(self):
        return bits(self.nats)


class Paper(NamedTuple):
    nats: float
    with_aux: float  # nats + the weighted auxiliary losses


def bits(nats):
    """Bits per character from nats per character."""
    return nats / math.log(2)


def drop_rate_by_class(stats: moe.RoutingStats, vocabulary) -> dict:
    """{"drop_rate_by_class": {class: share of its choices that capacity dropped}}; {} where nothing can be dropped."""
    if not stats.dropped_by_symbol.numel():
        return {}
    totals = {}
    for symbol, counts in zip(vocabulary.symbols, stats.dropped_by_symbol.t().tolist()):
        total = totals.setdefault(character_class(symbol), [0.0, 0.0])
        total[:] = (a + b for a, b in zip(total, counts))
    return {"drop_rate_by_class": {name: dropped / made for name, (dropped, made) in totals.items() if made}}


@torch.no_grad()
def clean(model, dataset, split, config, machine) -> Clean:
    """model: a GPT or its compiled form; it is put in eval mode."""
    model.eval()
    losses, counts, stats = [], [], None
    for x, y in dataset.windows(split, config.block_size, config.batch_size):
        with machine.autocast():
            out = model(x, y)
        count = (y != IGNORED).sum()
        losses.append(out.loss.float() * count)
        counts.append(count)
        stats = moe.add_stats(stats, out.stats)
    tokens = int(torch.stack(counts).sum())
    return Clean(torch.stack(losses).cpu().double().sum().item() / tokens, tokens, stats)


@torch.no_grad()
def paper(model, dataset, split, config, machine, step) -> Paper:
    """Mean over config.eval_iters random batches, which depend on the seed and the step alone."""
    model.eval()
    losses, objectives = [], []
    for i in range(config.eval_iters):
        x, y = dataset.batch(
            split, config.seed + EVALUATION_STREAM, step * config.eval_iters + i, config.batch_size, config.block_size
        )
        with machine.autocast():
            out = model(x, y)
        losses.append(out.loss.float())
        objectives.append(out.objective.float())
    return Paper(torch.stack(losses).cpu().double().mean().item(), torch.stack(objectives).cpu().double().mean().item())
