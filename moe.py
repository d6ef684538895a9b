"""The Mixture-of-Experts layer: routing, capacity, dispatch, experts, auxiliary losses, statistics.

    router logits -> gate -> top-k -> capacity -> experts, weighted by their gates

Each of those steps is an entry of a table (ROUTERS, GATES, EXPERTS, BACKENDS, AUX_LOSSES), named by a key of the
config; a new one is a function or a small class, a line in its table, and its name among that key's choices in
`configurator.py`. Every test of `tests/test_moe.py` then runs on it. What the layer promises (causality, independence
of batch neighbours, equal backends, …) is written there as tests.

Letters in shapes and at the ends of names:
    B sequences, T positions, N = B·T tokens, D model width, H hidden width of one expert, E experts,
    K experts per token, S = T·K choices of one sequence, C capacity: choices that one expert accepts
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Routing(NamedTuple):
    """Where the tokens go. `experts` and `gates` belong together; the K choices of a token come best first (in soft
    routing, in expert order)."""

    logits: torch.Tensor  # (N, E) float32
    probs: torch.Tensor  # (N, E) float32, rows sum to 1
    experts: torch.Tensor  # (N, K) int64
    gates: torch.Tensor  # (N, K) float32, 0 where the choice was dropped
    kept: torch.Tensor  # (N, K) bool, False where the expert was full


class AuxLoss(NamedTuple):
    """An auxiliary loss over all layers, before (`raw`) and after (`weighted`) its coefficient; 0-d float32."""

    raw: torch.Tensor
    weighted: torch.Tensor


class RoutingStats(NamedTuple):
    """Sums over tokens for one layer, left on the device: add them up over calls, read them once with `summarize`."""

    load: torch.Tensor  # (E,) choices per expert, before capacity
    dropped: torch.Tensor  # () choices that found their expert full
    tokens: torch.Tensor  # ()
    entropy: torch.Tensor  # () entropy of the router's distribution, nats
    gate_mass: torch.Tensor  # () sum of the gates that were used


# ---------------------------------------------------------------------------------------------------------------------
# Routers: (B, T, D) float32 -> logits (B, T, E)


class LearnedRouter(nn.Module):
    """One linear map, trained with the rest (Shazeer et al. 2017; Fedus et al. 2022, eq. 1)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))

    def forward(self, x_BTD):
        return F.linear(x_BTD, self.weight.to(x_BTD.dtype))

    def flops_per_token(self):
        return 2 * self.weight.numel()


ROUTERS: dict[str, type[nn.Module]] = {
    "learned": LearnedRouter,
}

# ---------------------------------------------------------------------------------------------------------------------
# Gates: logits (N, E) -> scores (N, E), by which experts are chosen and weighted

GATES: dict[str, Callable] = {
    "softmax": lambda logits_NE: F.softmax(logits_NE, dim=-1),
}


def choose(scores_NE, k):
    """The k best experts of each token, as (gates (N, k), experts (N, k)); ties go to the lower index, on every
    device and for every N, so that cached and uncached decoding agree."""
    n_expert = scores_NE.size(-1)
    if k == n_expert:
        return scores_NE, torch.arange(n_expert, device=scores_NE.device).expand_as(scores_NE)
    if k == 1:
        gates_N, experts_N = scores_NE.max(dim=-1)
        return gates_N[:, None], experts_N[:, None]
    gates_NE, experts_NE = torch.sort(scores_NE, dim=-1, descending=True, stable=True)
    return gates_NE[:, :k], experts_NE[:, :k]


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def capacity(config, n_sequences=1):
    """C = ceil(cf · k · T / E) choices per expert and sequence (Fedus et al. 2022, eq. 3), with T the block size and
    not the length at hand: a later token must not change what an earlier one was given."""
    share = config.capacity_factor * config.expert_top_k * config.block_size * n_sequences / config.n_expert
    return max(1, math.ceil(share - 1e-9))  # 1.1 · 10 is 11.000000000000002


def within_capacity(experts_GS, n_expert, limit, used_GE=None):
    """Which choices find room: (G, S) bool, for G groups that share a capacity of `limit` choices per expert.

    experts_GS lists the choices in order of priority: token by token, so that no token yields to a later one.
    used_GE (int64, updated in place) counts the choices of earlier calls, for decoding with a cache.
    """
    chosen_GES = F.one_hot(experts_GS, n_expert).transpose(1, 2).contiguous()
    rank_GES = chosen_GES.cumsum(dim=-1)
    if used_GE is not None:
        rank_GES = rank_GES + used_GE[:, :, None]
        used_GE += chosen_GES.sum(dim=-1)
    return (rank_GES * chosen_GES).sum(dim=1) <= limit


# ---------------------------------------------------------------------------------------------------------------------
# Backends: (x (N, D), routing, experts) -> Σ_k hidden(x W_in[e_k]ᵀ + b_in[e_k], g_k) W_out[e_k], the sum over a
# token's choices. `experts` gives w_in (E, H, D), bias_in (E, H) or None, w_out (E, H, D) or None (then the hidden
# sum (N, H) comes back), `hidden(up, gate)`, which must be 0 where the gate is 0, and `is_linear_in_gate`.


def reference(x_ND, routing, experts):
    """A loop over experts, each on the tokens that it kept: what the others are tested against."""
    width = experts.w_in.size(1) if experts.w_out is None else x_ND.size(1)
    total = 0
    for e in range(experts.w_in.size(0)):
        token, choice = torch.where((routing.experts == e) & routing.kept)
        bias = None if experts.bias_in is None else experts.bias_in[e]
        up = F.linear(x_ND[token], experts.w_in[e], bias)
        y = experts.hidden(up, routing.gates[token, choice, None]).to(up.dtype)
        if experts.w_out is not None:
            y = y @ experts.w_out[e]
        total = total + y.new_zeros(x_ND.size(0), width).index_add(0, token, y)
    return total


def masked(x_ND, routing, experts):
    """All experts as one wide MLP, the unused ones silenced by a gate of 0: no dispatch, but the FLOPs of all E
    experts."""
    E, H, D = experts.w_in.shape
    gates_NE = gates_per_expert(routing)
    bias = None if experts.bias_in is None else experts.bias_in.view(E * H)
    up = F.linear(x_ND, experts.w_in.view(E * H, D), bias)
    hidden_NEH = experts.hidden(up.view(-1, E, H), gates_NE[:, :, None]).to(up.dtype)
    if experts.w_out is None:
        return hidden_NEH.sum(dim=1)
    return F.linear(hidden_NEH.view(-1, E * H), experts.w_out.view(E * H, D).t())


def sorted_by_expert(x_ND, routing, experts):
    """Choices sorted by expert, then one grouped GEMM per weight (torch.nn.functional.grouped_mm); widths multiples of
    8. M = N·K choices.

    Dropped choices are computed too, with a gate of 0: the shapes must not depend on the data.
    """
    N, K = routing.experts.shape
    expert_M = routing.experts.reshape(-1)
    order = torch.argsort(expert_M.to(torch.int16), stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=order.device))
    load = F.one_hot(expert_M, experts.w_in.size(0)).sum(dim=0)
    offsets = load.cumsum(0).to(torch.int32)

    dtype = compute_dtype(x_ND)
    x_MD = x_ND.to(dtype)[:, None].expand(N, K, -1).reshape(N * K, -1)
    up = F.grouped_mm(Permute.apply(x_MD, order, place), experts.w_in.to(dtype).transpose(1, 2), offs=offsets)
    if experts.bias_in is not None:
        up = up + experts.bias_in.to(dtype)[expert_M[order]]
    if experts.is_linear_in_gate:  # then the gate may wait for the output, which is narrower
        y = experts.hidden(up)
    else:
        y = experts.hidden(up, routing.gates.reshape(-1)[order, None]).to(dtype)
    if experts.w_out is not None:
        y = F.grouped_mm(y, experts.w_out.to(dtype), offs=offsets)
    y_NKD = Permute.apply(y, place, order).view(N, K, -1)
    if experts.is_linear_in_gate:
        y_NKD = y_NKD * routing.gates[:, :, None].to(dtype)
    return y_NKD.sum(dim=1)


class Permute(torch.autograd.Function):
    """Rows in another order. Indexing does that too, but its gradient adds up rows that could repeat; these do not."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


BACKENDS: dict[str, Callable] = {
    "reference": reference,
    "masked": masked,
    "sorted": sorted_by_expert,
}


def choose_backend(x_ND, experts, k):
    """What `moe_backend=auto` means: the name of the fastest backend that runs here.

    `masked` computes all E·H hidden units, so it wins while they are not much more than the k·H that are needed, or
    than a dense MLP's 4·D; where the grouped GEMM has no fast kernel (CUDA without bf16 or below sm90) or does not
    compile (float32), it is also the only one without a synchronisation or a graph break.
    """
    E, H, D = experts.w_in.shape
    if E == k or E * H <= 1.5 * 4 * D or D % 8 or H % 8:
        return "masked"
    bf16 = compute_dtype(x_ND) == torch.bfloat16
    if x_ND.is_cuda:
        return "sorted" if bf16 and torch.cuda.get_device_capability(x_ND.device) >= (9, 0) else "masked"
    if (
        x_ND.device.type != "cpu"
        or compute_dtype(x_ND) == torch.float64
        or (torch.compiler.is_compiling() and not bf16)
    ):
        return "masked"
    return "sorted"


def compute_dtype(x):
    """The dtype that matrix products of x take: autocast's where it is on, for operations that autocast does not
    know."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def main_expert(routing):
    """(N,): the expert with each token's largest gate, -1 where no choice was kept."""
    gate_N, choice_N = routing.gates.masked_fill(~routing.kept, -1).max(dim=-1)
    return torch.where(gate_N < 0, -1, routing.experts.gather(1, choice_N[:, None])[:, 0])


def gates_per_expert(routing):
    """(N, E): each token's gate for every expert, 0 for those that it does not use."""
    return torch.zeros_like(routing.probs).scatter(1, routing.experts, routing.gates)


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

    def parameters_per_expert(self):
        return sum(getattr(self, name)[0].numel() for name in self.stacked if getattr(self, name) is not None)


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
        return F.gelu(up) if gate is None else F.gelu(up) * gate

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
        return F.gelu(up * gate)

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
        y_ND = F.linear(F.gelu(backend(x_ND, routing, self)), self.w_mix.t())
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


class MoE(nn.Module):
    """A Mixture-of-Experts layer in the place of an MLP: (B, T, D) -> (B, T, D), and the Routing that made it.

    config: anything with the MoE keys of `configurator.Config`, n_embd, block_size, bias and dropout.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.k = config.expert_top_k or config.n_expert
        self.router = ROUTERS[config.router](config)
        self.experts = EXPERTS[config.expert_kind](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD, used_BE=None):
        """used_BE (B, E) int64, updated in place: the choices that each sequence has already made, when x continues a
        cached sequence."""
        routing = self.route(x_BTD, used_BE)
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1))
        name = self.config.moe_backend
        backend = BACKENDS[choose_backend(x_ND, self.experts, self.k) if name == "auto" else name]
        y_ND = self.experts(x_ND, routing, backend)
        return self.dropout(y_ND.to(x_BTD.dtype).view_as(x_BTD)), routing

    def route(self, x_BTD, used_BE=None):
        config, E, K = self.config, self.config.n_expert, self.k
        B, T, _ = x_BTD.shape
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
            if self.training and config.router_jitter > 0:
                x_BTD = x_BTD * torch.empty_like(x_BTD).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
            logits_NE = self.router(x_BTD).view(B * T, E)
            scores_NE = GATES[config.gate](logits_NE)
            gates_NK, experts_NK = choose(scores_NE, K)
            if config.gate_renormalize:
                gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True)
            kept_NK = self.keep(experts_NK, B, used_BE)
            return Routing(logits_NE, scores_NE, experts_NK, torch.where(kept_NK, gates_NK, 0.0), kept_NK)

    def keep(self, experts_NK, n_sequences, used_BE):
        config = self.config
        if config.capacity_factor == 0:
            return torch.ones_like(experts_NK, dtype=torch.bool)
        if config.capacity_group == "batch":
            if used_BE is not None:
                raise ValueError("capacity_group=batch makes sequences share room: it cannot be decoded with a cache")
            kept = within_capacity(experts_NK.reshape(1, -1), config.n_expert, capacity(config, n_sequences))
        else:
            kept = within_capacity(experts_NK.reshape(n_sequences, -1), config.n_expert, capacity(config), used_BE)
        return kept.view(experts_NK.shape)

    def init_weights(self, std, residual_std):
        """Normal initialisation as in GPT-2: residual_std for what writes into the residual stream, std for the rest;
        biases 0."""
        for name, parameter in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=residual_std if kind in ("w_out", "w_mix") else std)

    def inactive_parameters(self):
        """Parameters that one token does not touch: those of the experts that it did not choose."""
        return (self.config.n_expert - self.k) * self.experts.parameters_per_expert()

    def flops_per_token(self):
        """Forward FLOPs (a multiply-add is 2) of one token, without capacity drops and whatever the backend wastes."""
        return self.router.flops_per_token() + self.experts.flops_per_token(self.k)


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary losses: routing -> 0-d float32, before the coefficient, for one layer


def switch_loss(routing):
    """E · Σ_i f_i P_i (Fedus et al. 2022, eq. 4): f the share of the choices that went to expert i (before capacity),
    P its mean probability. 1 under uniform routing, at most E."""
    n_expert = routing.probs.size(-1)
    share_E = F.one_hot(routing.experts, n_expert).to(routing.probs.dtype).mean(dim=(0, 1))
    return n_expert * (share_E * routing.probs.mean(dim=0)).sum()


def z_loss(routing):
    """mean over tokens of logsumexp(logits)² (Zoph et al. 2022, eq. 5): keeps router logits small."""
    return torch.logsumexp(routing.logits, dim=-1).square().mean()


AUX_LOSSES: dict[str, Callable | None] = {
    "switch": switch_loss,
    "none": None,
}


def aux_losses(routings, config):
    """{name: AuxLoss} over the layers of one forward pass; a loss whose coefficient is 0 is still measured."""
    if not routings:
        return {}
    losses = {"z": (z_loss, config.z_loss_coef)}
    if AUX_LOSSES[config.aux_loss] is not None:
        losses[config.aux_loss] = (AUX_LOSSES[config.aux_loss], config.aux_loss_coef)
    combined = {}
    for name, (function, coefficient) in losses.items():
        per_layer = torch.stack([function(routing) for routing in routings])
        raw = per_layer.sum() if config.aux_loss_reduction == "sum" else per_layer.mean()
        combined[name] = AuxLoss(raw, coefficient * raw if coefficient else torch.zeros_like(raw))
    return combined


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@torch.no_grad()
def routing_stats(routing, counted_N=None):
    """One layer's RoutingStats, without a synchronisation. counted_N (N,) bool: tokens to count (default: all)."""
    n_expert = routing.probs.size(-1)
    weight_N = torch.ones_like(routing.probs[:, 0]) if counted_N is None else counted_N.to(routing.probs.dtype)
    chosen_NE = F.one_hot(routing.experts, n_expert).sum(dim=1)
    return RoutingStats(
        load=(chosen_NE * weight_N[:, None]).sum(dim=0),
        dropped=((~routing.kept).sum(dim=1) * weight_N).sum(),
        tokens=weight_N.sum(),
        entropy=(torch.special.entr(routing.probs).sum(dim=-1) * weight_N).sum(),
        gate_mass=(routing.gates.sum(dim=-1) * weight_N).sum(),
    )


def add_stats(total, stats):
    """Sums of two lists of per-layer RoutingStats; total may be None."""
    if total is None:
        return stats
    return [RoutingStats(*(a + b for a, b in zip(one, other))) for one, other in zip(total, stats)]


def summarize(stats):
    """RoutingStats -> numbers: load (share of the choices per expert), drop_rate (of choices), entropy (nats per
    token), gate_mass (per token), dead (experts with no choice), tokens. Synchronises."""
    load = stats.load.tolist()
    choices, tokens = sum(load), stats.tokens.item()
    if not tokens:
        raise ValueError("no token was routed: there is nothing to summarize")
    return {
        "load": [count / choices for count in load],
        "drop_rate": stats.dropped.item() / choices,
        "entropy": stats.entropy.item() / tokens,
        "gate_mass": stats.gate_mass.item() / tokens,
        "dead": sum(count == 0 for count in load),
        "tokens": int(tokens),
    }
