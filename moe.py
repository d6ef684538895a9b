"""The Mixture-of-Experts layer: experts, initialisations, auxiliary losses, statistics. Who goes where: `routing.py`;
the products with the experts' weights: `backends.py`.

    routing -> experts, weighted by their gates (+ shared experts) -> what the router should be told (auxiliary losses)

Each step is an entry of a table (EXPERTS, INITS, AUX_LOSSES), named by a key of the config; a new one is a function or
a small class, a line in its table, and its name among that key's choices in `settings.py`. The grid of
`tests/test_moe.py` is drawn from the tables: what the layer promises (causality, independence of batch neighbours,
equal backends, …) is written there as tests, and runs on a new entry by itself.

Letters in shapes and at the ends of names:
    B sequences, T positions, N = B·T tokens, D model width, H hidden width of one expert, E experts,
    K experts per token, C capacity: choices that one expert accepts, V symbols
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import BACKENDS, choose_backend, compute_dtype
from routing import (
    GATES,
    LEVELS,
    ROUTERS,
    Routing,
    capacity,
    choices_per_expert,
    dropped_experts,
    gates_per_expert,
    within_capacity,
)


class AuxLoss(NamedTuple):
    """An auxiliary loss over all layers, before (`raw`) and after (`weighted`) its coefficient; 0-d float32."""

    raw: torch.Tensor
    weighted: torch.Tensor


class RoutingStats(NamedTuple):
    """Sums over tokens for one layer, left on the device: add them up over calls, read them once with `summarize`.
    Where nothing can be dropped, the counts by position and by symbol are empty."""

    load: torch.Tensor  # (E,) choices per expert, before capacity
    importance: torch.Tensor  # (E,) sum of the gates that were used
    dropped: torch.Tensor  # () choices that found their expert full
    unserved: torch.Tensor  # () tokens that no expert served
    tokens: torch.Tensor  # ()
    entropy: torch.Tensor  # () entropy of the router's distribution, nats
    dropped_by_position: torch.Tensor  # (2, T) of block_size positions: choices dropped, choices made
    dropped_by_symbol: torch.Tensor  # (2, V) the same by the token's symbol


# ---------------------------------------------------------------------------------------------------------------------
# Experts


class Experts(nn.Module):
    """E first layers: W_in (H, D) and b_in (H,) each, stacked. A kind of experts adds what follows them, and tells
    `stacked`: its parameters that have one slice per expert (the others serve every token).

    config.expert_hidden: H; 0 = the kind's own, which has the dense MLP's 4·D units per expert (mlp) or in total
    (linear kinds).
    """

    stacked: tuple[str, ...]
    is_linear_in_gate = False  # whether a gate may as well multiply the expert's output

    @staticmethod
    def default_hidden(config):
        return 4 * config.n_embd // config.n_expert

    def __init__(self, config):
        super().__init__()
        E, D = config.n_expert, config.n_embd
        H = config.expert_hidden or self.default_hidden(config)
        self.w_in = nn.Parameter(torch.empty(E, H, D))
        self.bias_in = nn.Parameter(torch.empty(E, H)) if config.bias else None
        self.w_out = None
        self.dropout = nn.Dropout(config.expert_inner_dropout)

    def inactive_parameters(self, n_used):
        """Parameters of the experts that a token does not touch when it goes through n_used of them."""
        per_expert = sum(getattr(self, name)[0].numel() for name in self.stacked if getattr(self, name) is not None)
        return max(0, self.w_in.size(0) - n_used) * per_expert


class MLPExperts(Experts):
    """E separate MLPs, outputs weighted (Shazeer et al. 2017, eq. 1):  y = Σ_k g_k (GELU(x W_inᵀ + b_in) W_out +
    b_out)."""

    stacked = ("w_in", "bias_in", "w_out", "bias_out")
    is_linear_in_gate = True

    @staticmethod
    def default_hidden(config):
        return 4 * config.n_embd

    def __init__(self, config):
        super().__init__(config)
        self.w_out = nn.Parameter(torch.empty_like(self.w_in))
        self.bias_out = nn.Parameter(torch.empty(config.n_expert, config.n_embd)) if config.bias else None

    def hidden(self, up, gate=None):
        hidden = self.dropout(F.gelu(up))
        return hidden if gate is None else hidden * gate

    def forward(self, x_ND, routing, backend):
        y_ND = backend(x_ND, routing, self)
        return y_ND if self.bias_out is None else y_ND + gates_per_expert(routing) @ self.bias_out

    def flops_per_token(self, k):
        return k * 2 * (self.w_in[0].numel() + self.w_out[0].numel())


class LinearConcatExperts(Experts):
    """E linear experts in place of the MLP's first layer, gated outputs side by side:  y = GELU([g_1 x W_1ᵀ … g_E x
    W_Eᵀ]) W_out + b_out.

    Paper B's layer read literally: with H = 4·D/E it has the dense MLP's parameters, and with all gates at 1 it is
    the dense MLP. Since GELU(0) = 0, the product with W_out is a sum over the chosen experts' rows of it: MLPExperts
    with the gate before the GELU.
    """

    stacked = ("w_in", "bias_in", "w_out")

    def __init__(self, config):
        super().__init__(config)
        self.w_out = nn.Parameter(torch.empty_like(self.w_in))
        self.bias_out = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def hidden(self, up, gate):
        return self.dropout(F.gelu(up * gate))

    def forward(self, x_ND, routing, backend):
        return add_bias_if_kept(backend(x_ND, routing, self), self.bias_out, routing)

    def flops_per_token(self, k):
        return k * 2 * (self.w_in[0].numel() + self.w_out[0].numel())


class LinearSumExperts(Experts):
    """Paper B's layer, the other reading:  y = GELU(Σ_k g_k (x W_kᵀ + b_k)) W_mix + b_out, with one W_mix (H, D) for
    all."""

    stacked = ("w_in", "bias_in")
    is_linear_in_gate = True

    def __init__(self, config):
        super().__init__(config)
        self.w_mix = nn.Parameter(torch.empty(self.w_in.size(1), config.n_embd))
        self.bias_out = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def hidden(self, up, gate=None):
        return up if gate is None else up * gate

    def forward(self, x_ND, routing, backend):
        y_ND = F.linear(self.dropout(F.gelu(backend(x_ND, routing, self))), self.w_mix.t())
        return add_bias_if_kept(y_ND, self.bias_out, routing)

    def flops_per_token(self, k):
        return k * 2 * self.w_in[0].numel() + 2 * self.w_mix.numel()


def add_bias_if_kept(y_ND, bias_D, routing):
    """A bias that all experts share, but not for a token that every expert dropped: that one gets exactly 0."""
    if bias_D is None:
        return y_ND
    return torch.where(routing.kept.any(dim=-1, keepdim=True), y_ND + bias_D, 0.0)


EXPERTS: dict[str, type[Experts]] = {
    "mlp": MLPExperts,
    "linear_concat": LinearConcatExperts,
    "linear_sum": LinearSumExperts,
}


# ---------------------------------------------------------------------------------------------------------------------
# The layer


class SharedExperts(nn.Module):
    """n_shared_expert experts for every token, ungated (Dai et al. 2024): one MLP of their total width."""

    def __init__(self, config):
        super().__init__()
        hidden = config.n_shared_expert * (config.expert_hidden or MLPExperts.default_hidden(config))
        self.fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x_BTD):
        return self.proj(F.gelu(self.fc(x_BTD)))

    def flops_per_token(self):
        return 2 * (self.fc.weight.numel() + self.proj.weight.numel())


class MoE(nn.Module):
    """A Mixture-of-Experts layer in the place of an MLP: (B, T, D) -> (B, T, D), and the Routing that made it.

    config: `Config.of_block(layer)`; layer: the block's index; symbol_counts (V,): occurrences in training; experts:
    those of an earlier layer, when layers share them.
    """

    def __init__(self, config, layer, symbol_counts, experts=None):
        super().__init__()
        self.config = config
        self.router = ROUTERS[config.router](config, layer, symbol_counts)
        self.experts = experts or EXPERTS[config.expert_kind](config)
        self.shared = SharedExperts(config) if config.n_shared_expert else None
        self.dropout = nn.Dropout(config.dropout)
        self.dispatch: Callable | None = None  # a backend to use in place of those below, as decoding.py has them
        # What changes over training is state: a checkpoint evaluates as it was when it was saved.
        self.register_buffer("temperature", torch.tensor(float(config.router_temperature)))
        self.register_buffer("expert_dropout", torch.tensor(float(config.expert_dropout)))
        self.register_buffer("balance_bias", torch.zeros(config.n_expert))
        self.set_step(0)

    def set_step(self, step):
        """Told before update number `step`, and before the evaluation at that point."""
        self.router.set_step(step)
        move(self.temperature, self.config, "router_temperature", step)
        move(self.expert_dropout, self.config, "expert_dropout", step)

    def forward(self, x_BTD, ids_BT, cache=None):
        """ids_BT: the symbols that x came from. cache: the layer's RoutingCache, when x continues a cached sequence."""
        routing = self.route(x_BTD, ids_BT, cache)
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1))
        dispatch = self.dispatch
        if dispatch is None:
            dispatch = BACKENDS[self.backend(x_BTD.device, compute_dtype(x_BTD), torch.compiler.is_compiling())]
        y_BTD = self.experts(x_ND, routing, dispatch).to(x_BTD.dtype).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return self.dropout(y_BTD), routing

    def backend(self, device, dtype, is_compiled):
        """The name of the backend that multiplies matrices of this dtype on this device."""
        config = self.config
        if config.moe_backend != "auto":
            return config.moe_backend
        k = config.n_expert if not self.router.is_causal else config.expert_top_k or config.n_expert
        return choose_backend(self.experts, k, device, dtype, config.capacity_factor > 0, is_compiled)

    def route(self, x_BTD, ids_BT, cache=None):
        config, (B, T, _) = self.config, x_BTD.shape
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
            if self.training and config.router_jitter > 0:
                x_BTD = x_BTD * torch.empty_like(x_BTD).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
            x_BSD, ids_BS = cache.extend(x_BTD, ids_BT) if cache else (x_BTD, ids_BT)
            level_BTD = LEVELS[config.router_level].pool(x_BSD, config)
            if cache:
                level_BTD = level_BTD[:, -T:]
            logits_NE = self.router(level_BTD, ids_BS).reshape(B * T, -1)
            cooled_NE = logits_NE / self.temperature if config.router_temperature_is_used else logits_NE
            gate = GATES[config.gate]
            scores_NE, probs_NE = gate(cooled_NE)
            preference_NE = self.router.preference(cooled_NE)
            if config.router_bias_rate:
                preference_NE = scores_NE + self.balance_bias
            if self.training and config.expert_dropout_is_used:
                masked_NE = dropped_experts(logits_NE.shape, self.expert_dropout, logits_NE.device)
                preference_NE = preference_NE.masked_fill(masked_NE, -math.inf)
            experts_NK, chosen_NK = self.router.select(probs_NE, preference_NE, B)
            kept_NK, room = self.keep(experts_NK, chosen_NK, B, cache)
            if config.gate_renormalize:  # over the chosen ones, whatever stands beside them
                _, gates_NK = gate(cooled_NE.gather(1, experts_NK).masked_fill(~chosen_NK, -math.inf))
            else:
                gates_NK = scores_NE.gather(1, experts_NK)
            if config.gate_straight_through:
                gates_NK = 1 + (gates_NK - gates_NK.detach())
            gates_NK = torch.where(kept_NK, gates_NK, 0.0)
            return Routing(logits_NE, probs_NE, experts_NK, gates_NK, chosen_NK, kept_NK, room)

    def keep(self, experts_NK, chosen_NK, n_sequences, cache):
        """-> (kept (N, K) bool, room: the most choices that one expert can have kept)"""
        config, N = self.config, experts_NK.size(0)
        if config.capacity_factor == 0 or not self.router.is_causal:  # expert choice fills its experts itself
            return chosen_NK, N
        n_groups = n_sequences
        if config.capacity_group == "batch":
            if cache:
                raise ValueError("capacity_group=batch makes sequences share room: it cannot be decoded with a cache")
            n_groups = 1
        limit = capacity(config, n_sequences // n_groups)
        groups = (choices.reshape(n_groups, -1) for choices in (experts_NK, chosen_NK))
        kept = within_capacity(*groups, config.n_expert, limit, cache and cache.use_BE)
        return kept.view(experts_NK.shape), min(N, n_groups * limit)

    @torch.no_grad()
    def balance(self, load_E):
        """Auxiliary-loss-free balancing (Wang et al. 2024): the bias of an expert with less than its even share of
        load_E, the choices of one update, goes up by router_bias_rate, that of the others down. No gradient."""
        self.balance_bias += self.config.router_bias_rate * torch.sign(load_E.mean() - load_E)

    def init_weights(self, std, residual_std):
        INITS[self.config.expert_init](self, std, residual_std)
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[2].startswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def n_active(self):
        """Experts that a token goes through: a whole number, at least the average."""
        return math.ceil(self.router.experts_per_token())

    def flops_per_token(self):
        """Forward FLOPs (a multiply-add is 2) of one token in a full sequence, whatever the backend wastes: k experts,
        or as many as capacity has room for, shared experts, and the router. Top-p is counted with all its k."""
        k = self.router.experts_per_token()
        shared = self.shared.flops_per_token() if self.shared is not None else 0
        return round(self.router.flops_per_token() + self.experts.flops_per_token(k) + shared)


def move(buffer, config, key, step):
    """Put `buffer`, which holds the value of a scheduled key, where it belongs before update number `step`: between
    `key` and `key`_end, as far as `key`_schedule says for this part of the run."""
    schedule = SCHEDULES[getattr(config, f"{key}_schedule")]
    if schedule:
        start, end = getattr(config, key), getattr(config, f"{key}_end")
        buffer.fill_(start + (end - start) * schedule(min(1.0, step / config.max_iters)))


SCHEDULES: dict[str, Callable | None] = {
    "constant": None,
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 - 0.5 * math.cos(math.pi * progress),
}


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation of experts and router: (layer, std, residual_std), those of the rest of the model; biases become 0


def init_gpt2(layer, std, residual_std):
    """Like the dense MLP: one SD whatever the width, smaller for what writes into the residual stream."""
    for name, weight in weights_of(layer):
        nn.init.normal_(weight, std=residual_std if name in ("w_out", "w_mix") else std)


def init_switch(layer, std, residual_std):
    """Truncated normal with variance 0.1 / fan-in (Fedus et al. 2022, section 2.4: a tenth of the usual scale)."""
    for name, weight in weights_of(layer):
        fan_in = weight.size(-2) if name in ("w_out", "w_mix") else weight.size(-1)
        scale = math.sqrt(0.1 / fan_in)
        nn.init.trunc_normal_(weight, std=scale, a=-2 * scale, b=2 * scale)


def init_sigma_moe(layer, std, residual_std):
    """Experts as the dense layer of their total width, router rows of equal norm (Csordás et al. 2023, section 5)."""
    config, experts = layer.config, layer.experts
    E, H, D = experts.w_in.shape
    for name, weight in weights_of(layer):
        fan_in = {"w_out": E * H, "w_mix": H}.get(name, D)
        nn.init.normal_(weight, std=math.sqrt(2 / (fan_in * config.n_layer)))
        if name in ("weight", "group_weight"):
            with torch.no_grad():
                weight.mul_(weight.norm(dim=1).mean() / weight.norm(dim=1, keepdim=True))


def weights_of(layer):
    """(last part of the name, weight) of the experts and the router, biases left out."""
    named = [*layer.router.named_parameters(), *layer.experts.named_parameters()]
    return [(name, weight) for name, weight in named if not name.startswith("bias")]


INITS: dict[str, Callable] = {
    "gpt2": init_gpt2,
    "switch": init_switch,
    "sigma_moe": init_sigma_moe,
}


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary losses: routing -> float32 before the coefficient, 0-d for one layer, (L,) for the Routing of L layers.
# whole(value): of a mean over these tokens, that over the whole batch, where processes share one (see ranks.py).


def these_alone(value):
    return value


def switch_loss(routing, whole=these_alone):
    """E · Σ_i f_i P_i (Fedus et al. 2022, eq. 4): f the share of the choices that went to expert i (before capacity), P
    its mean probability. 1 under uniform routing, at most E."""
    n_expert = routing.probs.size(-1)
    load_E = whole(choices_per_expert(routing).mean(dim=-2))
    share_E = load_E / load_E.sum(dim=-1, keepdim=True)
    return n_expert * (share_E * whole(routing.probs.mean(dim=-2))).sum(dim=-1)


def cv2_loss(routing, whole=these_alone):
    """Var / mean² over experts of their importance, the sum of their gates (Shazeer et al. 2017, eq. 7). Their second
    term, of the load, has a gradient only through noise in the gates, which nothing here adds: it is a statistic."""
    importance_E = whole(gates_per_expert(routing).sum(dim=-2))
    return importance_E.var(dim=-1, correction=0) / importance_E.mean(dim=-1).square().clamp_min(1e-10)


def z_loss(routing, whole=these_alone):
    """mean over tokens of logsumexp(logits)² (Zoph et al. 2022, eq. 5): keeps router logits small."""
    return torch.logsumexp(routing.logits.movedim(-1, 0), dim=0).square().mean(dim=-1)


AUX_LOSSES: dict[str, Callable | None] = {
    "switch": switch_loss,
    "cv2": cv2_loss,
    "none": None,
}


def aux_losses(routings, config, coefficient, whole=these_alone):
    """{name: AuxLoss} over the layers of one forward pass; a loss whose coefficient is 0 is still measured.

    coefficient: of the balancing loss at this point of its schedule, a 0-d tensor."""
    if not routings:
        return {}
    losses = {"z": (z_loss, config.z_loss_coef)}
    if AUX_LOSSES[config.aux_loss] is not None:
        losses[config.aux_loss] = (AUX_LOSSES[config.aux_loss], coefficient if config.balances else 0)
    combined, groups = {}, stacked(routings)
    for name, (function, weight) in losses.items():
        per_layer = torch.cat([function(layers, whole) for _, layers in groups])
        raw = per_layer.sum() if config.aux_loss_reduction == "sum" else per_layer.mean()
        is_weighted = isinstance(weight, torch.Tensor) or weight > 0
        combined[name] = AuxLoss(raw, weight * raw if is_weighted else torch.zeros_like(raw))
    return combined


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def stacked(routings):
    """[(numbers of L layers, their Routing with a first dimension L)]: layers of one shape together, for many small
    operations cost more than what they compute."""
    by_shape = {}
    for number, routing in enumerate(routings):
        by_shape.setdefault((routing.logits.shape, routing.experts.shape, routing.room), []).append(number)
    groups = []
    for (*_, room), numbers in by_shape.items():
        *fields, _ = zip(*(routings[number] for number in numbers))
        groups.append((numbers, Routing(*(torch.stack(field) for field in fields), room)))
    return groups


@torch.no_grad()
def stats_of_layers(routings, *arguments):
    """`routing_stats` of each layer."""
    stats = [None] * len(routings)
    for numbers, layers in stacked(routings):
        for number, fields in zip(numbers, zip(*routing_stats(layers, *arguments))):
            stats[number] = RoutingStats(*fields)
    return stats


@torch.no_grad()
def routing_stats(routing, ids_BT, config, n_symbols, weight_N=None):
    """RoutingStats of one layer, or of all in a stacked Routing, without a synchronisation. weight_N: 1 for a token
    that is counted (default: all), else 0."""
    weight_N = torch.ones_like(routing.logits[..., 0]) if weight_N is None else weight_N
    layers = routing.logits.shape[:-2]
    dropped = unserved = weight_N.new_zeros(layers)
    by_position = by_symbol = weight_N.new_empty(*layers, 2, 0)
    if config.capacity_factor:
        made_N = routing.chosen.sum(dim=-1) * weight_N
        dropped_N = (routing.chosen & ~routing.kept).sum(dim=-1) * weight_N
        dropped, unserved = dropped_N.sum(dim=-1), (~routing.kept.any(dim=-1) * weight_N).sum(dim=-1)
        counts_2N = torch.stack((dropped_N, made_N), dim=-2)
        by_position = counts_2N.unflatten(-1, ids_BT.shape).sum(dim=-2)
        by_position = F.pad(by_position, (0, config.block_size - ids_BT.size(1)))
        by_symbol = weight_N.new_zeros(*layers, 2, n_symbols).index_add(-1, ids_BT.reshape(-1), counts_2N)
    return RoutingStats(
        load=(weight_N[..., None] * choices_per_expert(routing)).sum(dim=-2),
        importance=(weight_N[..., None] * gates_per_expert(routing)).sum(dim=-2),
        dropped=dropped,
        unserved=unserved,
        tokens=weight_N.sum(dim=-1).expand(layers),
        entropy=(weight_N * torch.special.entr(routing.probs).sum(dim=-1)).sum(dim=-1),
        dropped_by_position=by_position,
        dropped_by_symbol=by_symbol,
    )


def add_stats(total, stats):
    """Sums of two lists of per-layer RoutingStats; total may be None."""
    if total is None:
        return stats
    return [RoutingStats(*(a + b for a, b in zip(one, other))) for one, other in zip(total, stats)]


def summarize(stats, in_detail=False):
    """RoutingStats -> numbers: load (share of the choices per expert), load_cv2 and importance_cv2 (variance / mean²
    over experts), dead (experts with no choice), drop_rate (of choices; in detail also by position and symbol id where
    a capacity can drop any, null where no choice was made), unserved (share of tokens without an expert), entropy (nats
    per token), choices and gate_mass (per token), tokens. Synchronises."""
    load, importance = stats.load.tolist(), stats.importance.tolist()
    choices, tokens = sum(load), stats.tokens.item()
    if not choices:
        raise ValueError("no token was routed: there is nothing to summarize")
    summary = {
        "load": [count / choices for count in load],
        "load_cv2": cv2(load),
        "importance_cv2": cv2(importance),
        "dead": sum(count == 0 for count in load),
        "drop_rate": stats.dropped.item() / choices,
        "unserved": stats.unserved.item() / tokens,
        "entropy": stats.entropy.item() / tokens,
        "choices": choices / tokens,
        "gate_mass": sum(importance) / tokens,
        "tokens": int(tokens),
    }
    for name, counts in {"position": stats.dropped_by_position, "symbol": stats.dropped_by_symbol}.items():
        if in_detail and counts.numel():
            summary[f"drop_rate_by_{name}"] = [d / made if made else None for d, made in zip(*counts.tolist())]
    return summary


def cv2(values):
    """Squared coefficient of variation: variance / mean², 0 when all are equal."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2 if mean else 0.0
