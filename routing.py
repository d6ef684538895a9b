"""Routers, which score the experts for a token, and levels, the vector that a token is routed by.

    x -> level -> router (logits) -> temperature -> gate (scores) -> balancing bias, expert dropout
      -> selection (k experts per token) -> capacity (the choices that find room)

`MoE.route` in `moe.py` takes these steps in order; gates, top-k and capacity are in `selection.py`. LEVELS and ROUTERS
are tables named by keys of the config; docs/moe-options.md lists them with formula and source.

A new router is a subclass of Router with its traits, a line in ROUTERS, and its name among the choices of `router` in
`run/settings.py`. Everything else (checks of a config, decoding, analysis, accounting) asks its class.

Letters as in `moe.py`; S: positions of a sequence seen so far, of which the last T are new.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from hashing import fixed_table, table_problem
from selection import capacity, mean_over_tokens, top_k_experts
from support.seeds import mix_seeds


class RoutingCache:
    """One layer's memory of the tokens already read, for decoding with a key-value cache."""

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
        """-> (x (B, S, D), ids (B, S)): the new tokens, after the history if it is needed."""
        past, self.length = self.length, self.length + x_BTD.size(1)
        if self.x.size(-1):
            self.x[:, past : self.length] = x_BTD
            x_BTD = self.x[:, : self.length]
        if self.ids.size(-1):
            self.ids[:, past : self.length] = ids_BT
            ids_BT = self.ids[:, : self.length]
        return x_BTD, ids_BT


# ---------------------------------------------------------------------------------------------------------------------
# Levels: (x (B, S, D), config, real (B, S) bool or None) -> (B, S, D), the vectors that tokens are routed by. Padding,
# where real is False, comes last, so only a level that is not causal needs to look.


class Level(NamedTuple):
    pool: Callable
    is_causal: bool
    needs_history: bool


def pool_prefix(x_BSD, config, real_BS):
    """The mean of the sequence up to this token: the causal twin of `sequence`."""
    count = torch.arange(1, x_BSD.size(1) + 1, device=x_BSD.device, dtype=x_BSD.dtype)
    return x_BSD.cumsum(dim=1) / count[:, None]


def pool_segment(x_BSD, config, real_BS):
    """The mean of the previous segment (Lory, Zhong et al. 2024). The first segment is routed by its first token."""
    S, size = x_BSD.size(1), config.segment_size
    means = x_BSD[:, : S // size * size].unflatten(1, (S // size, size)).mean(dim=2)
    by_segment = torch.cat((x_BSD[:, :1], means), dim=1)  # entry s routes segment s
    return by_segment.repeat_interleave(size, dim=1)[:, :S]


def pool_sequence(x_BSD, config, real_BS):
    """The mean of the whole sequence, later tokens included (Fan et al. 2024)."""
    return mean_over_tokens(x_BSD, real_BS)[:, None].expand_as(x_BSD)


LEVELS: dict[str, Level] = {
    "token": Level(lambda x_BSD, config, real_BS: x_BSD, is_causal=True, needs_history=False),
    "segment": Level(pool_segment, is_causal=True, needs_history=True),
    "prefix": Level(pool_prefix, is_causal=True, needs_history=True),
    "sequence": Level(pool_sequence, is_causal=False, needs_history=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Routers


class Router(nn.Module):
    """Scores experts: (x (B, T, D) float32, ids (B, S) of which the last T belong to x) -> logits (B, T, E) float32.

    layer: index of the block, so that layers differ; symbol_counts (V,): occurrences in the training text.

    A subclass states its traits below. Its parameters and buffers keep the values of its constructor, except those
    named in `initialised_by_layer`.
    """

    is_causal = True  # whether a token's choice is independent of later tokens and other sequences
    causal_twin = "router=learned"  # suggested to the user if the router is not causal
    is_trained = True  # whether a loss can change it
    needs_history = False  # whether `ids` must reach back before x
    tokens_choose = True  # False: experts choose tokens, at most `capacity` of each sequence, and all have a place
    takes_bias = True  # whether a balancing bias can change its choices
    takes_prior = False  # whether a fixed map can be added to its logits
    gives_log_probs = False  # whether softmax leaves its logits as they are
    initialised_by_layer: tuple[str, ...] = ()  # weights made with torch.empty, filled by the key expert_init

    def __init__(self, config, layer, symbol_counts):
        super().__init__()
        self.config, self.layer = config, layer

    @classmethod
    def problems(cls, config):
        """Yields (keys, message) for each invalid combination of keys. A subclass adds its own."""
        name = config.router
        if not cls.is_trained and (config.balances or config.z_loss_coef):
            message = f"router={name} is not trained, so no loss can balance it"
            yield ("router", *BALANCING, "z_loss_coef"), f"{message}; set aux_loss='none' and z_loss_coef=0"
        if cls.is_trained and cls.gives_log_probs and config.z_loss_coef:
            message = f"{name} gives log-probabilities, whose z-loss is 0"
            yield ("router", "z_loss_coef"), f"{message}; set z_loss_coef=0"
        if not cls.takes_bias and config.router_bias_rate:
            message = f"router={name} does not choose by what a bias could change"
            yield ("router", "router_bias_rate"), f"{message}; set router_bias_rate=0"
        if cls.gives_log_probs and config.gate != "softmax":
            yield ("router", "gate"), f"{name} gives log-probabilities; set gate='softmax'"
        if not cls.is_trained and config.router_freeze_step:
            message = f"router={name} is not trained, so it cannot be frozen at a step"
            yield ("router", "router_freeze_step"), f"{message}; set router_freeze_step=0"
        if not cls.takes_prior and config.router_prior:
            message = f"router={name} takes no fixed map into its logits"
            yield ("router", "router_prior"), f"{message}; set router_prior=0"

    @classmethod
    def largest_top_k(cls, config):
        """The most experts per token in a block with this config."""
        return config.n_expert

    def set_step(self, step):
        """Called before update number `step`, and before the evaluation at that point."""

    def preference(self, logits_NE):
        """(N, E): the order in which a token's experts are chosen."""
        return logits_NE

    def select(self, probs_NE, preference_NE, n_sequences):
        """(experts (N, K), chosen (N, K)). preference: -inf for an expert that cannot be chosen."""
        config = self.config
        k = config.expert_top_k or config.n_expert
        experts_NK = top_k_experts(preference_NE, k, best_first=config.router_top_p > 0)
        chosen_NK = preference_NE.gather(1, experts_NK) != -math.inf
        if config.router_top_p:
            share_NK = probs_NE.gather(1, experts_NK)
            chosen_NK = chosen_NK & (share_NK.cumsum(dim=-1) - share_NK < config.router_top_p)
        return experts_NK, chosen_NK

    def experts_per_token(self):
        """The average over a full sequence: k, or as many as capacity allows. With top-p, the maximum."""
        config = self.config
        k = config.expert_top_k or config.n_expert
        return min(k, config.n_expert * capacity(config) / config.block_size) if config.capacity_factor else k

    def flops_per_token(self):
        """Forward FLOPs (a multiply-add is 2) of one token's logits."""
        return 0

    def state_problem(self):
        """The reason why loaded buffers are invalid, or None."""


BALANCING = ("aux_loss", "aux_loss_coef", "aux_loss_coef_end")  # the keys of the balancing loss


class LinearRouter(Router):
    """Logits x Wᵀ with `weight` (E, D), plus router_prior for the expert in a fixed map, `table` (V,)."""

    takes_prior = True

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        if config.router_prior:
            of_layer = 0 if config.router_prior_table == "shared" else layer
            self.register_buffer("table", fixed_table(config, of_layer, symbol_counts))

    def forward(self, x_BTD, ids_BS):
        logits_BTE = F.linear(x_BTD, self.weight.to(x_BTD.dtype))
        if self.config.router_prior:
            experts_BT = self.table[ids_BS[:, -x_BTD.size(1) :]]
            logits_BTE = logits_BTE + self.config.router_prior * F.one_hot(experts_BT, self.config.n_expert)
        return logits_BTE

    def flops_per_token(self):
        return 2 * self.config.n_expert * self.config.n_embd

    def state_problem(self):
        return table_problem(self) if self.config.router_prior else None


def is_linear_top_k(router):
    """Whether a token's experts are simply the k largest of x Wᵀ, which decoding computes by a shortcut."""
    steps = ((LinearRouter, "forward"), (Router, "preference"), (Router, "select"))
    is_plain = all(getattr(type(router), name) is getattr(owner, name) for owner, name in steps)
    return is_plain and not router.config.router_prior


class LearnedRouter(LinearRouter):
    """Trained with the rest of the model (Shazeer et al. 2017; Fedus et al. 2022, eq. 1)."""

    initialised_by_layer = ("weight",)

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))


class FrozenRouter(LearnedRouter):
    """A learned router that stays as initialised (Fan et al. 2024)."""

    is_trained = False

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.weight.requires_grad_(False)


class RandomRouter(LinearRouter):
    """Redrawn before every update, as a pure function of seed, layer and step (Fan et al. 2024)."""

    is_trained = False

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.register_buffer("weight", torch.empty(config.n_expert, config.n_embd))
        self.set_step(0)

    @torch.no_grad()
    def set_step(self, step):
        generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, self.layer, step))
        drawn = torch.randn(self.weight.shape, generator=generator, device="cpu") * 0.02
        if self.weight.is_cuda:  # pinned, so that the copy does not wait for the device
            drawn = drawn.pin_memory()
        self.weight.copy_(drawn, non_blocking=True)


class FixedRouter(Router):
    """One expert per token, by a fixed rule of the symbols: logit 0 for that expert, -inf for the others."""

    is_trained = False
    takes_bias = False
    gives_log_probs = True

    @classmethod
    def problems(cls, config):
        yield from super().problems(config)
        name = config.router
        if config.expert_top_k != 1:
            yield ("router", "expert_top_k"), f"{name} gives every character one expert; set expert_top_k=1"
        if config.router_level != "token":
            message = f"{name} routes by characters, not by vectors that could be averaged"
            yield ("router", "router_level"), f"{message}; set router_level='token'"
        if config.expert_dropout_is_used:
            message = f"a character has no other expert to go to under {name}"
            yield ("router", "expert_dropout", "expert_dropout_end"), f"{message}; set expert_dropout=0"

    @classmethod
    def largest_top_k(cls, config):
        return 1

    def experts_of(self, ids_BS):
        """(B, S) int64: each token's expert."""
        raise NotImplementedError

    def forward(self, x_BTD, ids_BS):
        experts_BT = self.experts_of(ids_BS)[:, -x_BTD.size(1) :]
        is_other = F.one_hot(experts_BT, self.config.n_expert) == 0
        return torch.zeros(is_other.shape, dtype=x_BTD.dtype, device=x_BTD.device).masked_fill(is_other, -math.inf)


class HashRouter(FixedRouter):
    """Hash routing: a fixed map, symbol -> expert, by default balanced over the training text (Roller et al. 2021,
    balanced hash). Each layer and seed has its own; see fixed_table."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.register_buffer("table", fixed_table(config, layer, symbol_counts))

    def experts_of(self, ids_BS):
        return self.table[ids_BS]

    def state_problem(self):
        return table_problem(self)


class SharedHashRouter(HashRouter):
    """The same table in every layer: the one that HashRouter gives the first."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, 0, symbol_counts)


class GatedHashRouter(HashRouter, LearnedRouter):
    """HashRouter's choice with a learned gate: the chosen expert's probability in softmax(x Wᵀ), as in a switch layer.

    The control that tells a fixed choice from a fixed gate. The logit is the log-odds of that probability, so that the
    sigmoid gives it back; -inf for the other experts.
    """

    is_trained = True
    takes_prior = False
    gives_log_probs = False

    @classmethod
    def problems(cls, config):
        yield from super().problems(config)
        name = config.router
        if config.balances or config.z_loss_coef:
            message = f"{name} chooses by a fixed map, which no loss can balance"
            yield ("router", *BALANCING, "z_loss_coef"), f"{message}; set aux_loss='none' and z_loss_coef=0"
        if config.gate != "sigmoid":
            yield ("router", "gate"), f"{name} gives the log-odds of a gate; set gate='sigmoid'"
        if 1 in config.expert_counts():
            message = f"the gate of a single expert is always 1, so {name} has nothing to learn"
            yield ("router", "n_expert", "n_expert_by_block"), f"{message}; set n_expert to 2 or more"

    def forward(self, x_BTD, ids_BS):
        logits_BTE = LinearRouter.forward(self, x_BTD, ids_BS)
        choice_BTE = super().forward(x_BTD, ids_BS)  # 0, or -inf
        others_BT1 = logits_BTE.masked_fill(choice_BTE == 0, -math.inf).logsumexp(dim=-1, keepdim=True)
        return logits_BTE - others_BT1 + choice_BTE


class NgramHashRouter(FixedRouter):
    """A hash of the last `router_ngram` symbols, this token's included. Balanced only by chance."""

    needs_history = True

    @classmethod
    def problems(cls, config):
        yield from super().problems(config)
        if config.router_ngram > config.block_size:
            message = f"router_ngram = {config.router_ngram} is more characters than block_size = {config.block_size}"
            yield ("router", "router_ngram", "block_size"), f"{message} has; set router_ngram lower"

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.register_buffer("salt", torch.tensor(mix_seeds(config.seed, layer, 1) % 2**31))

    def experts_of(self, ids_BS):
        key_BS = self.salt.expand_as(ids_BS)
        for age in range(self.config.router_ngram):
            older = F.pad(ids_BS, (age, 0), value=-1)[:, : ids_BS.size(1)]  # -1: before the sequence
            key_BS = ((key_BS ^ (older + 2)) * 2654435761) % 2**31  # Knuth's multiplicative hashing
        return (key_BS >> 8) % self.config.n_expert


class TwoLevelRouter(Router):
    """A group of experts, then experts within it (Jordan and Jacobs 1994): p(expert) = p(group) p(expert | group).
    Only experts of the most likely group can be chosen."""

    takes_bias = False
    gives_log_probs = True
    initialised_by_layer = ("group_weight", "weight")

    @classmethod
    def problems(cls, config):
        yield from super().problems(config)
        groups, top_k = config.n_expert_group, config.expert_top_k
        numbers = sorted({count for count in config.expert_counts() if count})
        if top_k == 0 or any(n % groups or top_k > n // groups for n in numbers):
            message = f"n_expert = {numbers[0]} must make n_expert_group = {groups} equal groups of expert_top_k"
            keys = ("router", "n_expert_group", "n_expert", "n_expert_by_block", "expert_top_k")
            yield keys, f"{message} = {top_k} or more (0 is not all); set n_expert_group to a divisor of n_expert"
        if config.router_top_p:
            message = f"top-p counts the probability of all groups, of which {config.router} uses one"
            yield ("router", "router_top_p"), f"{message}; set router_top_p=0"

    @classmethod
    def largest_top_k(cls, config):
        return config.n_expert // config.n_expert_group

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
        best_group_N = top_k_experts(available_NE.unflatten(-1, (groups, -1)).sum(dim=-1), 1)
        group_E = torch.arange(self.config.n_expert, device=probs_NE.device) // (self.config.n_expert // groups)
        return super().select(probs_NE, preference_NE.masked_fill(group_E != best_group_N, -math.inf), n_sequences)

    def flops_per_token(self):
        return 2 * (self.config.n_expert + self.config.n_expert_group) * self.config.n_embd


SINGLE_GATE = "a character that gets a single expert has a renormalised gate of 1, which teaches the router nothing"


class ExpertChoiceRouter(LearnedRouter):
    """Each expert takes its C best tokens of a sequence (Zhou et al. 2022). Balanced by construction, but not causal: a
    later token can take an earlier one's place."""

    is_causal = False
    causal_twin = "router=learned with a capacity_factor"
    tokens_choose = False
    takes_bias = False

    @classmethod
    def problems(cls, config):
        yield from super().problems(config)
        name = config.router
        if config.balances:
            yield ("router", *BALANCING), f"{name} is balanced by construction; set aux_loss='none'"
        if config.gate_renormalize and not config.router_top_p:
            yield ("gate_renormalize", "router_top_p", "router"), f"{SINGLE_GATE}; set gate_renormalize=False"
        if not (config.capacity_factor > 0 and config.expert_top_k > 0 and config.capacity_group == "sequence"):
            message = f"{name} needs to know how many characters of a sequence an expert takes"
            keys = ("router", "capacity_factor", "expert_top_k", "capacity_group")
            yield keys, f"{message}; set expert_top_k=1, capacity_factor=1 and capacity_group='sequence'"
        if config.router_top_p or config.gate_straight_through or config.router_level == "sequence":
            message = f"{name} chooses by itself, among characters that must differ"
            keys = ("router", "router_top_p", "gate_straight_through", "router_level")
            yield keys, f"{message}; set router_top_p=0, gate_straight_through=False, router_level='token'"

    def preference(self, logits_NE):
        # Row by row: tokens of a segment are alike and must stay so to the last bit, since ties go to the first.
        return F.log_softmax(logits_NE, dim=-1) if self.config.gate == "softmax" else logits_NE

    def select(self, probs_NE, preference_NE, n_sequences):
        N, E = probs_NE.shape
        by_expert = preference_NE.view(n_sequences, N // n_sequences, E).transpose(1, 2)
        taken = torch.argsort(by_expert, dim=-1, descending=True, stable=True)[..., : capacity(self.config)]
        chosen = torch.zeros_like(by_expert, dtype=torch.bool).scatter(2, taken, True)
        every = torch.arange(E, device=probs_NE.device).expand(N, E)
        chosen &= by_expert != -math.inf
        return every, chosen.transpose(1, 2).reshape(N, E)

    def experts_per_token(self):
        config = self.config
        return config.n_expert * min(capacity(config), config.block_size) / config.block_size


ROUTERS: dict[str, type[Router]] = {
    "learned": LearnedRouter,
    "frozen": FrozenRouter,
    "random": RandomRouter,
    "hash": HashRouter,
    "hash_shared": SharedHashRouter,
    "hash_gated": GatedHashRouter,
    "ngram_hash": NgramHashRouter,
    "two_level": TwoLevelRouter,
    "expert_choice": ExpertChoiceRouter,
}
