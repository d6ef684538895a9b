"""How a model is measured: always in eval mode, and without touching a global random stream.

full_loss         full validation: cross-entropy over a whole split, in windows of block_size, each character predicted
                  once. Records call it "clean".
sampled_loss      sampled validation: the mean over random batches, as the papers report it, with and without the
                  weighted auxiliary losses. Records call it "paper".
evaluation        both, with routing statistics: the numbers of an evaluation line in metrics.jsonl
inference_speed   characters a second, timed as the papers time it but for waiting for the device
"""

import math
import time
from collections import Counter
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

import balance
from data.characters import character_class
from model import IGNORED, sample
from run import cross_fit, records
from run.processes import ONE_PROCESS

# The random batches of an evaluation come from another stream than those of training with the same seed.
EVALUATION_STREAM = 2**32


class FullLoss(NamedTuple):
    """Full validation."""

    nats: float  # per character (per byte on enwik8)
    tokens: int  # predicted characters
    stats: list[balance.RoutingStats]  # per MoE layer, over these tokens
    halves: list[dict] | None = None  # see cross_fit.py

    @property
    def bpc(self):
        return bits(self.nats)


class SampledLoss(NamedTuple):
    """Sampled validation."""

    nats: float
    with_aux: float  # nats + the weighted auxiliary losses


def bits(nats):
    """Bits per character from nats per character."""
    return nats / math.log(2)


@torch.no_grad()
def full_loss(model, dataset, split, config, machine, processes=ONE_PROCESS) -> FullLoss:
    """Cross-entropy over the whole split, shared among the processes. model: a GPT or its compiled form."""
    model.eval()
    losses, counts, stats = [], [], None
    for i, (x, y) in enumerate(dataset.windows(split, config.block_size, config.batch_size)):
        count = (y != IGNORED).sum()
        counts.append(count)
        losses.append(torch.zeros((), device=x.device))
        if not processes.owns(i) and i > 0:  # all read the first, which shows the shapes of the statistics
            continue
        with machine.autocast():
            out = model(x, y)
        if processes.owns(i):
            losses[-1] = out.loss.float() * count
            # Copied, since the next call of a captured model overwrites its output.
            stats = balance.add_stats(stats, pytree.tree_map(torch.clone, out.stats))
        else:
            stats = pytree.tree_map(torch.zeros_like, out.stats)
    sums, structure = pytree.tree_flatten(stats)
    total, *sums = processes.all_reduce_sum([torch.stack(losses), *sums])
    stats = pytree.tree_unflatten(sums, structure)
    total, counts = total.cpu().double(), torch.stack(counts).cpu()
    tokens = int(counts.sum())
    return FullLoss(total.sum().item() / tokens, tokens, stats, cross_fit.halves(total.tolist(), counts.tolist()))


@torch.no_grad()
def sampled_loss(model, dataset, split, config, machine, step, processes=ONE_PROCESS) -> SampledLoss:
    """Mean over config.eval_iters random batches, shared among the processes; they depend on seed and step alone."""
    model.eval()
    losses, objectives = torch.zeros(2, config.eval_iters, device=machine.device)
    seed, first, size = config.seed + EVALUATION_STREAM, step * config.eval_iters, config.batch_size
    for i in filter(processes.owns, range(config.eval_iters)):
        x, y = dataset.batch(split, seed, first + i, size, config.block_size)
        with machine.autocast():
            out = model(x, y)
        losses[i], objectives[i] = out.loss, out.objective
    losses, objectives = processes.all_reduce_sum([losses, objectives])
    return SampledLoss(losses.cpu().double().mean().item(), objectives.cpu().double().mean().item())


def evaluation(model, dataset, config, machine, step, processes=ONE_PROCESS) -> dict:
    """The evaluation line of metrics.jsonl at this step: full and sampled validation, and routing statistics."""
    full = full_loss(model, dataset, "val", config, machine, processes)
    train, val = (sampled_loss(model, dataset, split, config, machine, step, processes) for split in ("train", "val"))
    loads = [balance.summarize(layer)["load"] for layer in full.stats]
    return {
        "kind": "eval",
        "step": step,
        "clean": {"nats": full.nats, "bpc": full.bpc},
        **({"halves": full.halves} if full.halves else {}),
        "paper": {"train": train.nats, "val": val.nats, "train_with_aux": train.with_aux, "val_with_aux": val.with_aux},
        "load": loads,
        "collapsed": records.collapsed_blocks(config, loads),
        "routing": [
            balance.summarize(layer, in_detail=True) | drop_rate_by_class(layer, dataset.vocabulary)
            for layer in full.stats
        ],
    }


def drop_rate_by_class(stats: balance.RoutingStats, vocabulary) -> dict:
    """{"drop_rate_by_class": {class: share of its choices that capacity dropped}}; {} where nothing can be dropped."""
    if not stats.dropped_by_symbol.numel():
        return {}
    dropped, made = Counter(), Counter()
    for symbol, counts in zip(vocabulary.symbols, stats.dropped_by_symbol.t().tolist()):
        name = character_class(symbol)
        dropped[name], made[name] = dropped[name] + counts[0], made[name] + counts[1]
    return {"drop_rate_by_class": {name: dropped[name] / count for name, count in made.items() if count}}


@torch.no_grad()
def inference_speed(model, config, machine, characters=500) -> list[float]:
    """Characters a second of each of config.inference_samples texts, written as the papers' scripts do.

    Batch 1, temperature 0.8, top-k 200, eager, no cache: each character costs a pass over the whole context. Unlike the
    papers' scripts, the clock waits for the device, and on CUDA attention is not cuDNN's (`Machine.any_length`). Empty
    where routing looks at later characters.
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
            with machine.any_length():
                logits = model(text[:, -config.block_size :], last_only=True).logits
            uniform = torch.rand(1, generator=generator, device=machine.device)
            token = sample(logits[:, -1].float(), 0.8, 200, uniform)
            text = torch.cat((text, token[:, None]), dim=1)
        machine.synchronize()
        speeds.append(characters / (time.perf_counter() - started))
    return speeds
