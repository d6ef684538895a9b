"""The loss when experts are removed, merged, shuffled, replaced by a fixed map, or used in other numbers. No training.

    with removed(model, {0: [2]}):
        after = see(model, windows, machine)
    cost(before, after, block_size, classes_N, names)         # nats per character, with a standard error

Every cost is a difference to the intact model on the same characters, so the difficulty of the text cancels.
`ablations` runs them all. Layers are counted among the MoE layers. Letters as in `moe.py` and `probe.py`.
"""

import contextlib
import copy
import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from analysis.annotation import name_of
from analysis.probe import Wrapper, altered, choices_by_symbol, first_choice, rerouted, see
from hashing import hash_table
from model import GPT, IGNORED
from routing import ROUTERS, mix_seeds
from selection import Routing

SHUFFLE_STREAM, TABLE_STREAM = 2, 3  # random streams of one seed


class Cost(NamedTuple):
    """The increase of the loss by an intervention, nats per character; negative where it helps."""

    nats: float
    se: float | None  # of nats, over windows; None with fewer than two
    by_class: dict[str, float]  # the same over the characters of a class, without the classes that do not occur


def cost(before, after, block_size, classes_N, names) -> Cost:
    """The mean of after - before (both a Seen) over all characters, and over those of each class.

    classes_N (N,): each character's class, an index into `names`. The unit of the standard error is a window of
    block_size characters, since neighbouring characters are alike: it is that of a ratio of sums over windows, of which
    the last may be shorter (Cochran 1977, equation 2.47; SD / √windows for equal ones). Windows count as independent.
    """
    change_N = after.nats_N - before.nats_N
    starts = np.arange(0, len(change_N), block_size)
    sums_W, sizes_W = np.add.reduceat(change_N, starts), np.diff([*starts, len(change_N)])
    mean, W = float(change_N.mean()), len(starts)
    spread = ((sums_W - mean * sizes_W) ** 2).sum()
    by_class = {name: change_N[classes_N == i].mean() for i, name in enumerate(names) if (classes_N == i).any()}
    return Cost(
        nats=mean,
        se=math.sqrt(W / (W - 1) * spread) / len(change_N) if W > 1 else None,
        by_class={name: float(value) for name, value in by_class.items()},
    )


def suffering(before, after, ids_N, vocabulary, most=5, at_least=100):
    """[[symbol, added nats per occurrence, occurrences], …]: the `most` symbols after which prediction suffers most,
    among those with at_least so many occurrences; none that gains."""
    change_V = np.bincount(ids_N, after.nats_N - before.nats_N, minlength=vocabulary.size)
    count_V = np.bincount(ids_N, minlength=vocabulary.size)
    mean_V = change_V / np.maximum(count_V, 1)
    rank_V = np.where(count_V >= at_least, mean_V, 0.0)
    order = [i for i in np.argsort(-rank_V, kind="stable")[:most] if rank_V[i] > 0]
    return [[name_of(vocabulary.symbols[i]), float(mean_V[i]), int(count_V[i])] for i in order]


# ---------------------------------------------------------------------------------------------------------------------
# Other logits


def removed(model, experts):
    """A context without some experts: {layer: [experts]}, not all of a layer. Their logits are -inf, so their tokens go
    to the next best expert and softmax gates are shared out among those left (sigmoid gates stay as they are).

    A router by symbol has no next best: tokens of a removed expert get none and pass the layer by.
    """

    def without(gone):
        return lambda logits_BTE, ids_BT: logits_BTE.index_fill(
            -1, torch.tensor(gone, device=logits_BTE.device), -math.inf
        )

    return altered(model, {layer: without(gone) for layer, gone in experts.items()})


@contextlib.contextmanager
def shuffled(model, layers, seed):
    """A context that permutes the rows of logits of these layers among a batch's characters: the same load and gates
    (before capacity) without any relation to the text. A control and no model, since it looks into the future. Padding
    at the end of the text keeps its own rows."""
    is_real = {}

    def note_targets(model, arguments):
        is_real["N"] = (arguments[1] != IGNORED).reshape(-1) if len(arguments) > 1 else None

    def change_of(layer):
        generator = torch.Generator().manual_seed(mix_seeds(seed, layer, SHUFFLE_STREAM))

        def change(logits_BTE, ids_BT):
            logits_NE, real_N = logits_BTE.flatten(0, 1).clone(), is_real["N"]
            rows = torch.arange(len(logits_NE)) if real_N is None else torch.where(real_N)[0].cpu()
            dealt = rows[torch.randperm(len(rows), generator=generator)]
            logits_NE[rows.to(logits_NE.device)] = logits_NE[dealt.to(logits_NE.device)]
            return logits_NE.view_as(logits_BTE)

        return change

    hook = model.register_forward_pre_hook(note_targets)
    try:
        with altered(model, {layer: change_of(layer) for layer in layers}):
            yield model
    finally:
        hook.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Experts by a fixed map


class TableRouter(Wrapper):
    """The inner router with its first choice swapped for the expert in a fixed map (V,) of the token's symbol: the two
    experts change logit, gate and place among the choices. The sizes of the gates stay the router's.

    layer: the router's MoE, which turns logits into choices.
    """

    def __init__(self, layer, table_V):
        super().__init__(layer.router)
        self.score = layer.score
        self.register_buffer("table", table_V.to(layer.temperature.device))

    def forward(self, x_BTD, ids_BS):
        logits_BTE = self.inner(x_BTD, ids_BS)
        own = self.choices(logits_BTE)
        first_N1 = first_choice(own, self)[:, None]
        table_N1 = self.table[ids_BS[:, -x_BTD.size(1) :]].reshape(-1, 1)
        places_NE = torch.arange(own.logits.size(1), device=first_N1.device).repeat(len(first_N1), 1)
        places_NE.scatter_(1, first_N1, table_N1).scatter_(1, table_N1, first_N1)  # its own inverse
        self.chosen = places_NE.gather(1, own.experts), own.chosen
        return own.logits.gather(1, places_NE).view_as(logits_BTE)

    def choices(self, logits_BTE):
        """The layer's Routing of these logits in eval mode, before capacity and without gates."""
        logits_NE = logits_BTE.flatten(0, 1)
        _, _, probs_NE, preference_NE = self.score(logits_NE)
        experts_NK, chosen_NK = self.inner.select(probs_NE, preference_NE, len(logits_BTE))
        return Routing(logits_NE, probs_NE, experts_NK, None, chosen_NK, None, len(logits_NE))

    def select(self, probs_NE, preference_NE, n_sequences):
        return self.chosen


def tabled(model, tables):
    """A context that takes first choices from fixed maps {layer: (V,) int64}: see TableRouter."""
    return rerouted(
        model, {number: lambda layer, t=table_V: TableRouter(layer, t) for number, table_V in tables.items()}
    )


def hash_tables(model, layers, counts_V, seed):
    """{layer: (V,)}: a `hash_table` for each layer, balanced over counts_V, the symbols' counts in training."""
    counts_V, sizes = torch.as_tensor(counts_V), [layer.config.n_expert for layer in model.moe_layers()]
    return {layer: hash_table(counts_V, sizes[layer], mix_seeds(seed, layer, TABLE_STREAM)) for layer in layers}


def favourite_tables(model, layers, seen, ids_N, vocab_size):
    """{layer: (V,)}: each symbol's most frequent first choice in the intact model (`seen`); the lowest of several, 0
    for a symbol that does not occur."""
    sizes = [layer.config.n_expert for layer in model.moe_layers()]
    counts = {layer: choices_by_symbol(ids_N, seen.first[layer], vocab_size, sizes[layer]) for layer in layers}
    return {layer: torch.from_numpy(counts_VE.argmax(axis=1)) for layer, counts_VE in counts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Other models


def with_top_k(model, k):
    """A copy of the model that uses k experts a token (0 = all that its router allows).

    Gates follow the config: without gate_renormalize they no longer add up to the sum of training. Under a capacity
    each expert's room grows with k.
    """
    config, largest = model.config, max(model.config.expert_counts())
    k = k or (largest if config.capacity_factor else 0)  # a capacity is so many times k
    weight = model.token_embedding.weight
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and then overwritten
        other = GPT(dataclasses.replace(config, expert_top_k=k), len(weight))
    other.to(weight.device, weight.dtype).load_state_dict(model.state_dict())
    return other.eval()


def other_top_ks(config):
    """The powers of two below the largest possible k, and 0 for all, without the trained k; [] where the router or the
    gate is made for one expert a token."""
    router = ROUTERS[config.router]
    largest = max((router.largest_top_k(config.of_block(i)) for i in config.moe_layers), default=0)
    if largest <= 1 or config.gate_straight_through:
        return []
    trained = 0 if config.expert_top_k >= largest else config.expert_top_k
    return [k for k in (*(2**i for i in range(15) if 2**i < largest), 0) if k != trained]


def merged(model, layer, a, b, loads_E):
    """A copy of the model in which experts a and b of a layer both have the mean of their weights, by load. Each keeps
    its own logit, gate and capacity.

    The order of hidden units is arbitrary, so b's are first matched to a's (weights in, bias and weights out; Ainsworth
    et al. 2023, "Git Re-Basin", section 3.2). Units of linear_sum already have the order of the shared output layer.
    Where layers share their experts, only this layer's are merged.
    """
    model = copy.deepcopy(model)
    moe_layer = model.moe_layers()[layer]
    moe_layer.experts = experts = copy.deepcopy(moe_layer.experts)
    share_a = float(loads_E[a] / (loads_E[a] + loads_E[b])) if loads_E[a] + loads_E[b] else 0.5
    order = matching(experts, a, b)
    with torch.no_grad():
        for name in experts.per_expert:
            weight = getattr(experts, name)
            if weight is not None:
                of_b = weight[b] if name == "bias_out" else weight[b, order]
                weight[[a, b]] = share_a * weight[a] + (1 - share_a) * of_b
    return model


def matching(experts, a, b):
    """(H,) int64: the hidden unit of expert b that is matched to each unit of expert a."""
    if experts.w_out is None:
        return torch.arange(experts.w_in.size(1), device=experts.w_in.device)
    units_EHX = torch.cat((experts.w_in, experts.w_out), dim=2)
    if experts.bias_in is not None:
        units_EHX = torch.cat((units_EHX, experts.bias_in[:, :, None]), dim=2)
    likeness_HH = units_EHX[a].double() @ units_EHX[b].double().t()
    _, order = linear_sum_assignment(likeness_HH.detach().cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(experts.w_in.device)


def heir(before, after, layer, expert):
    """The expert that takes over most of a removed one's tokens; where none does (routers by symbol), the one with
    the least load."""
    moved = after.experts[layer][before.experts[layer] == expert]
    moved = moved[moved >= 0]
    if len(moved):
        return int(np.bincount(moved).argmax())
    load_E = before.stats[layer].load.clone()
    load_E[expert] = math.inf
    return int(load_E.argmin())


# ---------------------------------------------------------------------------------------------------------------------
# All interventions


def count(model):
    """The number of passes over the text that `ablations` makes; 0 where no layer has several experts."""
    sizes = [layer.config.n_expert for layer in model.moe_layers() if layer.config.n_expert > 1]
    return sum(sizes) + 3 * len(sizes) + 5 + len(other_top_ks(model.config)) if sizes else 0


def ablations(model, windows, machine, seen, ids_N, classes, vocabulary, counts_V, seed, progress) -> dict:
    """Every intervention on every layer, as plain JSON values.

    seen: see(model, windows, machine); ids_N: the N characters; classes: (classes_N, names), as `cost` takes them;
    counts_V: the symbols' counts in training; progress() is called after each pass, `count(model)` > 0 times.

    A Cost is {"nats", "se", "by_class"}. A list has an entry per MoE layer, None where an intervention makes no sense:
    layers with one expert, other k for a router by symbol.
      removed       [[a Cost + "share" of the tokens with this main expert + "suffer" (see `suffering`), per expert]]
      removed_all   a Cost + "experts": the cheapest of each layer, all at once; chosen on the same text and therefore a
                    little too cheap, as is `merged`
      merged        [a Cost + "expert", the layer's cheapest, + "into", its heir], merged_all all at once
      shuffled, tabulated   [Cost]; shuffled_all, tabulated_all, hashed_all: in all layers at once
      top_k         {k: Cost}, "0" for all
    """
    block_size, (classes_N, names) = windows[0][0].size(1), classes
    layers = model.moe_layers()
    several = [number for number, layer in enumerate(layers) if layer.config.n_expert > 1]

    def passed(model):
        after = see(model, windows, machine)
        progress()
        return after

    def cost_of(after):
        return cost(seen, after, block_size, classes_N, names)._asdict()

    def cost_within(context):
        with context:
            return cost_of(passed(model))

    def per_layer(cost_of_layer):
        return [cost_of_layer(number) if number in several else None for number in range(len(layers))]

    heirs = {}

    def removal(layer, expert):
        with removed(model, {layer: [expert]}):
            after = passed(model)
        heirs[layer, expert] = heir(seen, after, layer, expert)
        share = float((seen.experts[layer] == expert).mean())
        return cost_of(after) | {"share": share, "suffer": suffering(seen, after, ids_N, vocabulary)}

    removals = per_layer(lambda layer: [removal(layer, expert) for expert in range(layers[layer].config.n_expert)])
    cheapest = per_layer(lambda layer: int(np.argmin([one["nats"] for one in removals[layer]])))
    merges = per_layer(lambda layer: {"into": heirs[layer, cheapest[layer]], "expert": cheapest[layer]})
    favourites = favourite_tables(model, several, seen, ids_N, vocabulary.size)

    def merge(model, layer):
        return merged(model, layer, merges[layer]["into"], merges[layer]["expert"], seen.stats[layer].load)

    removed_all = removed(model, {layer: [cheapest[layer]] for layer in several})
    return {
        "removed": removals,
        "removed_all": {"experts": cheapest} | cost_within(removed_all),
        "merged": per_layer(lambda layer: merges[layer] | cost_of(passed(merge(model, layer)))),
        "merged_all": cost_of(passed(functools.reduce(merge, several, model))),
        "shuffled": per_layer(lambda layer: cost_within(shuffled(model, [layer], seed))),
        "shuffled_all": cost_within(shuffled(model, several, seed)),
        "hashed_all": cost_within(tabled(model, hash_tables(model, several, counts_V, seed))),
        "tabulated": per_layer(lambda layer: cost_within(tabled(model, {layer: favourites[layer]}))),
        "tabulated_all": cost_within(tabled(model, favourites)),
        "top_k": {str(k): cost_of(passed(with_top_k(model, k))) for k in other_top_ks(model.config)} or None,
    }
