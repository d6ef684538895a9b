"""Who goes to which expert: routers, levels, gates, selection, capacity.

    x -> level (what a token is routed by) -> router (logits) -> temperature -> gate (scores)
      -> balancing bias, expert dropout -> selection (k experts a token) -> capacity (which choices find room)

Levels, routers and gates are entries of a table (LEVELS, ROUTERS, GATES) named by a key of the config; MoE.route in
`moe.py` takes the steps one after the other. docs/moe-options.md
lists them with formula, source, and whether they are causal. Letters as in `moe.py`; S positions of a
sequence seen so far, of which the last T are new.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Routing(NamedTuple):
    """Where the tokens go. `experts`, `gates`, `chosen` and `kept` belong together; the K choices of a token come best
    first, or in expert order where every expert has a place (soft routing, expert choice)."""

    logits: torch.Tensor  # (N, E) float32, as the router gives them
    probs: torch.Tensor  # (N, E) float32: the scores, scaled so that rows sum to 1
    experts: torch.Tensor  # (N, K) int64
    gates: torch.Tensor  # (N, K) float32, 0 where the choice was not made or was dropped
    chosen: torch.Tensor  # (N, K) bool, False where the choice was not made (top-p, expert choice, expert dropout)
    kept: torch.Tensor  # (N, K) bool, chosen and not dropped for lack of room
    room: int  # the most choices that one expert can have kept: N, or fewer under a capacity


class RoutingCache:
    """What one layer must remember of the tokens already read, for decoding with a key-value cache."""

    def __init__(self, config, batch_size, device, dtype):
        level, router = LEVELS[config.router_level], ROUTERS[config.router]
        self.length = 0
        self.use_BE = torch.zeros(batch_size, config.n_expert, dtype=torch.int64, device=device)  # choices made so far
        width = config.n_embd if level.needs_history else 0
        self.x = torch.zeros(batch_size, config.block_size, width, device=device, dtype=dtype)
        window = config.block_size if router.needs_history else 0
        self.ids = torch.zeros(batch_size, window, dtype=torch.int64, device=device)

    def clear(self):
        self.length = 0
        self.use_BE.zero_()

    def extend(self, x_BTD, ids_BT):
        """-> (x (B, S, D), ids (B, S)) with what is new at the end; no more than x, ids where no history is needed."""
        past, self.length = self.length, self.length + x_BTD.size(1)
        if self.x.size(-1):
            self.x[:, past : self.length] = x_BTD
            x_BTD = self.x[:, : self.length]
        if self.ids.size(-1):
            self.ids[:, past : self.length] = ids_BT
            ids_BT = self.ids[:, : self.length]
        return x_BTD, ids_BT


# ---------------------------------------------------------------------------------------------------------------------
# Levels: what a token is routed by. (x (B, S, D), config) -> (B, S, D)


class Level(NamedTuple):
    pool: Callable
    is_causal: bool
    needs_history: bool


def pool_prefix(x_BSD, config):
    """The mean of the sequence up to and with the token: the causal twin of `sequence`."""
    count = torch.arange(1, x_BSD.size(1) + 1, device=x_BSD.device, dtype=x_BSD.dtype)
    return x_BSD.cumsum(dim=1) / count[:, None]


def pool_segment(x_BSD, config):
    """The mean of the segment before the token's own (Lory, Zhong et al. 2024); the first segment, which has none
    before it, is routed by its first token."""
    B, S, D = x_BSD.shape
    size = config.segment_size
    whole = S // size
    means = x_BSD[:, : whole * size].view(B, whole, size, D).mean(dim=2)
    by_segment = torch.cat((x_BSD[:, :1], means), dim=1)  # entry s routes segment s
    return by_segment.repeat_interleave(size, dim=1)[:, :S]


def pool_sequence(x_BSD, config):
    """The mean of the whole sequence, later tokens included (Fan et al. 2024)."""
    return x_BSD.mean(dim=1, keepdim=True).expand_as(x_BSD)


LEVELS: dict[str, Level] = {
    "token": Level(lambda x_BSD, config: x_BSD, is_causal=True, needs_history=False),
    "segment": Level(pool_segment, is_causal=True, needs_history=True),
    "prefix": Level(pool_prefix, is_causal=True, needs_history=True),
    "sequence": Level(pool_sequence, is_causal=False, needs_history=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Routers


class Router(nn.Module):
    """Scores experts: (x (B, T, D) float32, ids (B, S) of which the last T belong to x) -> logits (B, T, E) float32.

    layer: index of the block, so that layers differ; symbol_counts (V,): how often each symbol occurs in training.
    """

    is_causal = True
    needs_history = False  # whether `ids` must reach back before x

    def __init__(self, config, layer, symbol_counts):
        super().__init__()
        self.config, self.layer = config, layer

    def set_step(self, step):
        """Told before update number `step`, and before the evaluation at that point."""

    def preference(self, logits_NE):
        """(N, E): what a token's experts are ranked by."""
        return logits_NE

    def select(self, probs_NE, preference_NE, n_sequences):
        """(experts (N, K), chosen (N, K)). preference: what they are ranked by, -inf for what cannot be chosen."""
        config = self.config
        k = config.expert_top_k or config.n_expert
        experts_NK = best(preference_NE, k, in_order=config.router_top_p > 0)
        chosen_NK = preference_NE.gather(1, experts_NK) != -math.inf
        if config.router_top_p:
            share_NK = probs_NE.gather(1, experts_NK)
            chosen_NK = chosen_NK & (share_NK.cumsum(dim=-1) - share_NK < config.router_top_p)
        return experts_NK, chosen_NK

    def experts_per_token(self):
        """On average over a full sequence: k, or what capacity leaves room for; at most, with top-p."""
        config = self.config
        k = config.expert_top_k or config.n_expert
        return min(k, config.n_expert * capacity(config) / config.block_size) if config.capacity_factor else k

    def flops_per_token(self):
        return 0


class LinearRouter(Router):
    """One linear map: `weight` (E, D)."""

    def forward(self, x_BTD, ids_BS):
        return F.linear(x_BTD, self.weight.to(x_BTD.dtype))

    def flops_per_token(self):
        return 2 * self.config.n_expert * self.config.n_embd


class LearnedRouter(LinearRouter):
    """Trained with the rest (Shazeer et al. 2017; Fedus et al. 2022, eq. 1)."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))


class FrozenRouter(LearnedRouter):
    """As at initialisation, never trained (Fan et al. 2024)."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.weight.requires_grad_(False)


class RandomRouter(LinearRouter):
    """Drawn anew before every update, a pure function of seed, layer and step (Fan et al. 2024)."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.register_buffer("weight", torch.empty(config.n_expert, config.n_embd))
        self.set_step(0)

    @torch.no_grad()
    def set_step(self, step):
        generator = torch.Generator().manual_seed(mix(self.config.seed, self.layer, step))
        drawn = torch.randn(self.weight.shape, generator=generator, device="cpu") * 0.02
        if self.weight.is_cuda:  # pinned, so that the copy does not wait for the device
            drawn = drawn.pin_memory()
        self.weight.copy_(drawn, non_blocking=True)


class FixedRouter(Router):
    """One expert a token, by a rule of its symbols: logit 0 for that one, -inf for the others."""

    def experts_of(self, ids_BS):
        """(B, S) int64: each token's expert."""
        raise NotImplementedError

    def forward(self, x_BTD, ids_BS):
        experts_BT = self.experts_of(ids_BS)[:, -x_BTD.size(1) :]
        is_other = F.one_hot(experts_BT, self.config.n_expert) == 0
        return torch.zeros(is_other.shape, dtype=x_BTD.dtype, device=x_BTD.device).masked_fill(is_other, -math.inf)


class HashRouter(FixedRouter):
    """A fixed table, symbol -> expert, that balances the experts' load over the training text as well as whole symbols
    can (Roller et al. 2021, balanced hash): symbols by falling frequency, each to the expert with the least so far.
    Frequencies are blurred by up to a fifth, so that layers and seeds get different tables."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        seed = mix(config.seed, layer, 0)
        self.register_buffer("table", hash_table(symbol_counts, config.n_expert, seed))

    def experts_of(self, ids_BS):
        return self.table[ids_BS]


class NgramHashRouter(FixedRouter):
    """A hash of the last `router_ngram` symbols, the token's own among them: causal, and balanced only by chance."""

    needs_history = True

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.salt = mix(config.seed, layer, 1) % 2**31

    def experts_of(self, ids_BS):
        key_BS = torch.full_like(ids_BS, self.salt)
        for age in range(self.config.router_ngram):
            older = F.pad(ids_BS, (age, 0), value=-1)[:, : ids_BS.size(1)]  # -1 stands before the sequence
            key_BS = ((key_BS ^ (older + 2)) * 2654435761) % 2**31  # Knuth's multiplicative hashing
        return (key_BS >> 8) % self.config.n_expert


class TwoLevelRouter(Router):
    """A group of experts, then experts within it (Jordan and Jacobs 1994): p(expert) = p(group) p(expert | group), and
    only experts of the most likely group can be chosen."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.group_weight = nn.Parameter(torch.empty(config.n_expert_group, config.n_embd))
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))

    def forward(self, x_BTD, ids_BS):
        groups = self.config.n_expert_group
        group = F.log_softmax(F.linear(x_BTD, self.group_weight.to(x_BTD.dtype)), dim=-1)
        within = F.linear(x_BTD, self.weight.to(x_BTD.dtype)).unflatten(-1, (groups, -1))
        return (group[..., None] + F.log_softmax(within, dim=-1)).flatten(-2)

    def select(self, probs_NE, preference_NE, n_sequences):
        groups = self.config.n_expert_group
        available_NE = probs_NE.masked_fill(preference_NE == -math.inf, 0)
        best_group_N = best(available_NE.unflatten(-1, (groups, -1)).sum(dim=-1), 1)
        group_E = torch.arange(self.config.n_expert, device=probs_NE.device) // (self.config.n_expert // groups)
        return super().select(probs_NE, preference_NE.masked_fill(group_E != best_group_N, -math.inf), n_sequences)

    def flops_per_token(self):
        return 2 * (self.config.n_expert + self.config.n_expert_group) * self.config.n_embd


class ExpertChoiceRouter(LearnedRouter):
    """Each expert takes the C tokens of a sequence that suit it best (Zhou et al. 2022): balanced by construction, and
    not causal, for a later token can take an earlier one's place. Its causal twin is `learned` with a capacity."""

    is_causal = False

    def preference(self, logits_NE):
        # Row by row: the tokens of a segment are alike, and must stay alike to the last bit, for ties go to the first.
        return F.log_softmax(logits_NE, dim=-1) if self.config.gate == "softmax" else logits_NE

    def select(self, probs_NE, preference_NE, n_sequences):
        N, E = probs_NE.shape
        by_expert = preference_NE.view(n_sequences, N // n_sequences, E).transpose(1, 2)
        taken = torch.argsort(by_expert, dim=-1, descending=True, stable=True)[..., : capacity(self.config)]
        chosen = torch.zeros_like(by_expert, dtype=torch.bool).scatter(2, taken, True)
        every = torch.arange(E, device=probs_NE.device).expand(N, E)
        return every, chosen.transpose(1, 2).reshape(N, E)

    def experts_per_token(self):
        config = self.config
        return config.n_expert * min(capacity(config), config.block_size) / config.block_size


ROUTERS: dict[str, type[Router]] = {
    "learned": LearnedRouter,
    "frozen": FrozenRouter,
    "random": RandomRouter,
    "hash": HashRouter,
    "ngram_hash": NgramHashRouter,
    "two_level": TwoLevelRouter,
    "expert_choice": ExpertChoiceRouter,
}


def mix(*numbers):
    """One seed from several numbers, so that neighbouring ones give unrelated streams (FNV-1a, 63 bits)."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for byte in int(number).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63


def hash_table(counts_V, n_expert, seed):
    """(V,) int64: each symbol's expert, so that loads are as even as whole symbols allow.

    Symbols by falling count, each to the expert with the least load so far. Counts are blurred by up to a fifth, so
    that each seed gives another table.
    """
    counts_V, load = counts_V.cpu(), [0.0] * n_expert
    generator = torch.Generator().manual_seed(seed)
    blur_V = 1 + 0.2 * torch.rand(len(counts_V), generator=generator, dtype=torch.float64, device="cpu")
    table = torch.zeros(len(counts_V), dtype=torch.int64, device="cpu")
    for symbol in torch.argsort(counts_V * blur_V, descending=True).tolist():
        table[symbol] = load.index(min(load))
        load[table[symbol]] += counts_V[symbol].item()
    return table


def best(scores_NE, k, in_order=False):
    """(N, k): the k best experts of each token, best first; all of them in expert order if k = E, unless in_order. Ties
    go to the lower index, on every device and for every N, so that cached and uncached decoding agree."""
    n_expert = scores_NE.size(-1)
    if k == n_expert and not in_order:
        return torch.arange(n_expert, device=scores_NE.device).expand_as(scores_NE)
    if k == 1:
        return scores_NE.argmax(dim=-1, keepdim=True)
    return torch.sort(scores_NE, dim=-1, descending=True, stable=True).indices[:, :k]


# ---------------------------------------------------------------------------------------------------------------------
# Gates: logits (N, E) -> (scores, by which an expert's output is weighted; probs: the scores, scaled so that rows sum
# to 1). Experts are chosen by the logits, with which both grow, or by score plus balancing bias.


def softmax(logits_NE):
    """Over the experts. As the outer dimension, a CPU takes many tokens at once, which is ten times faster."""
    return F.softmax(logits_NE.t(), dim=0).t()


def softmax_gate(logits_NE):
    probs_NE = softmax(logits_NE)
    return probs_NE, probs_NE


def sigmoid_gate(logits_NE):
    return torch.sigmoid(logits_NE), softmax(F.logsigmoid(logits_NE))


GATES: dict[str, Callable] = {"softmax": softmax_gate, "sigmoid": sigmoid_gate}


def dropped_experts(shape, rate, device):
    """(N, E) bool: each expert masked for each token with probability `rate` (a 0-d tensor), as Csordás et al. 2023 do
    before top-k; a token that would lose all of them keeps all."""
    masked_NE = torch.rand(shape, device=device) < rate
    return masked_NE & ~masked_NE.all(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def capacity(config, n_sequences=1):
    """C = ceil(cf · k · T / E) choices per expert and sequence (Fedus et al. 2022, eq. 3), with T the block size and
    not the length at hand: a later token must not change what an earlier one was given."""
    share = config.capacity_factor * config.expert_top_k * config.block_size * n_sequences / config.n_expert
    return max(1, math.ceil(share - 1e-9))  # 1.1 · 10 is 11.000000000000002


def within_capacity(experts_GS, chosen_GS, n_expert, limit, use_GE=None):
    """Which choices find room: (G, S) bool, for G groups that share a capacity of `limit` choices per expert.

    experts_GS lists the choices in order of priority: token by token, so that no token yields to a later one. Those
    not in chosen_GS were not made. use_GE (int64, updated in place) counts the choices of earlier calls.
    """
    wanted_GES = (F.one_hot(experts_GS, n_expert) * chosen_GS[..., None]).transpose(1, 2).contiguous()
    rank_GES = wanted_GES.cumsum(dim=-1)
    if use_GE is not None:
        rank_GES = rank_GES + use_GE[:, :, None]
        use_GE += wanted_GES.sum(dim=-1)
    return chosen_GS & ((rank_GES * wanted_GES).sum(dim=1) <= limit)


# ---------------------------------------------------------------------------------------------------------------------
# What a Routing says


def main_expert(routing):
    """(N,): the expert with each token's largest gate, -1 where no choice was kept."""
    gate_N, choice_N = routing.gates.masked_fill(~routing.kept, -1).max(dim=-1)
    return torch.where(gate_N < 0, -1, routing.experts.gather(1, choice_N[:, None])[:, 0])


def gates_per_expert(routing):
    """(N, E): each token's gate for every expert, 0 for those that it does not use."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.gates)


def choices_per_expert(routing):
    """(N, E): 1 where a token chose an expert, before capacity; else 0."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.chosen.to(routing.logits.dtype))
