"""The Mixture-of-Experts layer: route each token, run its experts, add up their outputs weighted by the gates.

`routing.py` scores the experts, `selection.py` chooses among them, `backends.py` multiplies with their weights and
`balance.py` measures how evenly they are used.

EXPERTS, SCHEDULES and INITS are tables named by keys of the config. A new entry is a function or a small class, a line
in its table, and its name among the key's choices in `run/settings.py`; `tests/test_moe.py` then tests it.

Letters in shapes and at the ends of names:
    B sequences, T positions, N = B·T tokens, D model width, H hidden width of one expert, E experts,
    K experts per token, C capacity: choices that one expert accepts, V symbols
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import BACKENDS, choose_backend, compute_dtype
from routing import LEVELS, ROUTERS
from selection import GATES, Routing, capacity, expert_dropout_mask, gates_per_expert, within_capacity

# ---------------------------------------------------------------------------------------------------------------------
# The layer


class MoE(nn.Module):
    """A Mixture-of-Experts layer in place of an MLP: (B, T, D) -> (B, T, D) and its Routing.

    config: `Config.of_block(layer)`; layer: the block's index; symbol_counts (V,): occurrences in the training text;
    experts, router: those of an earlier layer, to share them.
    """

    def __init__(self, config, layer, symbol_counts, experts=None, router=None):
        super().__init__()
        self.config = config
        self.router = router or ROUTERS[config.router](config, layer, symbol_counts)
        if config.router_freeze_step and router is None:
            make_freezable(self.router)
        self.experts = experts or EXPERTS[config.expert_kind](config)
        self.shared = SharedExperts(config) if config.n_shared_expert else None
        self.dropout = nn.Dropout(config.dropout)
        self.own_backend: Callable | None = None  # replaces the config's, for decoding and in speed/fused_routing.py
        # Scheduled values are buffers, so that a checkpoint evaluates as the model did when it was saved.
        self.register_buffer("temperature", torch.tensor(float(config.router_temperature)))
        self.register_buffer("expert_dropout", torch.tensor(float(config.expert_dropout)))
        self.register_buffer("balance_bias", torch.zeros(config.n_expert))
        self.set_step(0)

    def set_step(self, step):
        """Called before update number `step`, and before the evaluation at that point."""
        self.router.set_step(step)
        if self.config.router_freeze_step:
            if step >= self.config.router_freeze_step:
                freeze(self.router)
            else:
                self.router.is_frozen.fill_(False)  # also where a run starts with the weights of a frozen one
        apply_schedule(self.temperature, self.config, "router_temperature", step)
        apply_schedule(self.expert_dropout, self.config, "expert_dropout", step)

    def forward(self, x_BTD, ids_BT, cache=None, real_BT=None):
        """ids_BT: the symbols of x. cache: the layer's RoutingCache, if x continues a cached sequence. real_BT: False
        for padding, which cannot affect the routing of other tokens; None = no padding, or causal routing."""
        routing = self.route(x_BTD, ids_BT, cache, real_BT)
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1))
        backend = self.own_backend
        if backend is None:
            backend = BACKENDS[self.backend_name(x_BTD.device, compute_dtype(x_BTD), torch.compiler.is_compiling())]
        y_BTD = self.experts(x_ND, routing, backend).to(x_BTD.dtype).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return self.dropout(y_BTD), routing

    def backend_name(self, device, dtype, is_compiled):
        """The backend for matrix products of this dtype on this device."""
        config = self.config
        if config.moe_backend != "auto":
            return config.moe_backend
        k = (config.expert_top_k if self.router.tokens_choose else 0) or config.n_expert
        return choose_backend(self.experts.w_in.shape, k, device, dtype, config.capacity_factor > 0, is_compiled)

    def route(self, x_BTD, ids_BT, cache=None, real_BT=None):
        """-> Routing of the N = B·T tokens, in float32 also under autocast."""
        config, (B, T, _) = self.config, x_BTD.shape
        with torch.autocast(x_BTD.device.type, enabled=False):
            # Scores: level, router, temperature, gate.
            x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
            if self.training and config.router_jitter > 0:
                x_BTD = x_BTD * torch.empty_like(x_BTD).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
            x_BSD, ids_BS = cache.extend(x_BTD, ids_BT) if cache else (x_BTD, ids_BT)
            level_BTD = LEVELS[config.router_level].pool(x_BSD, config, real_BT)
            if cache:
                level_BTD = level_BTD[:, -T:]
            logits_NE = self.router(level_BTD, ids_BS).reshape(B * T, -1)
            scaled_NE, scores_NE, probs_NE, preference_NE = self.score(logits_NE)

            # Choices: expert dropout, selection, capacity.
            if self.training and config.expert_dropout_is_used:
                masked_NE = expert_dropout_mask(logits_NE.shape, self.expert_dropout, logits_NE.device)
                preference_NE = preference_NE.masked_fill(masked_NE, -math.inf)
            real_N1 = None if real_BT is None else real_BT.reshape(-1, 1)
            if real_N1 is not None and not self.router.tokens_choose:
                preference_NE = preference_NE.masked_fill(~real_N1, -math.inf)
            experts_NK, chosen_NK = self.router.select(probs_NE, preference_NE, B)
            placed_NK = chosen_NK if real_N1 is None else chosen_NK & real_N1  # padding takes no room
            kept_NK, room = self.limit_to_capacity(experts_NK, placed_NK, B, cache, real_BT)

            # Gates of the chosen experts.
            if config.gate_renormalize:
                _, gates_NK = GATES[config.gate](scaled_NE.gather(1, experts_NK).masked_fill(~chosen_NK, -math.inf))
            else:
                gates_NK = scores_NE.gather(1, experts_NK)
            if config.gate_straight_through:
                gates_NK = 1 + (gates_NK - gates_NK.detach())
            gates_NK = torch.where(kept_NK, gates_NK, 0.0)
            if self.training and config.expert_output_masking > 0:
                gates_NK = F.dropout(gates_NK, config.expert_output_masking)
            return Routing(logits_NE, probs_NE, experts_NK, gates_NK, chosen_NK, kept_NK, room)

    def score(self, logits_NE):
        """-> (logits / temperature, scores, probs, preference: experts are chosen by the largest), (N, E) each."""
        config = self.config
        scaled_NE = logits_NE / self.temperature if config.router_temperature_is_used else logits_NE
        scores_NE, probs_NE = GATES[config.gate](scaled_NE)
        biased = config.router_bias_rate > 0
        preference_NE = scores_NE + self.balance_bias if biased else self.router.preference(scaled_NE)
        return scaled_NE, scores_NE, probs_NE, preference_NE

    def limit_to_capacity(self, experts_NK, chosen_NK, n_sequences, cache, real_BT=None):
        """-> (kept (N, K) bool, room: the most choices that one expert can have kept, without regard to padding)"""
        config, N = self.config, experts_NK.size(0)
        if config.capacity_factor == 0 or not self.router.tokens_choose:
            return chosen_NK, N
        is_shared = config.capacity_group == "batch"
        if is_shared and cache:
            raise ValueError("capacity_group=batch makes sequences share room: it cannot be decoded with a cache")
        n_groups = 1 if is_shared else n_sequences
        limit = capacity(config, n_sequences // n_groups)
        groups = (choices.reshape(n_groups, -1) for choices in (experts_NK, chosen_NK))
        room = min(N, n_groups * limit)
        if is_shared and real_BT is not None:  # a sequence of nothing but padding adds no room
            limit = capacity(config, real_BT.any(dim=1).sum())
        kept = within_capacity(*groups, config.n_expert, limit, cache and cache.use_BE)
        return kept.view(experts_NK.shape), room

    @torch.no_grad()
    def update_bias(self, load_E):
        """Balancing without a loss (Wang et al. 2024): raises the bias of an expert with less than an even share of
        load_E, the choices of one update, by router_bias_rate, and lowers that of the others. No gradient."""
        self.balance_bias += self.config.router_bias_rate * torch.sign(load_E.mean() - load_E)

    def init_weights(self, std, residual_std):
        """Fills the experts' parameters and the router's `initialised_by_layer`."""
        INITS[self.config.expert_init](self, std, residual_std)
        for name, parameter in self.experts.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)

    def flops_per_token(self):
        """Forward FLOPs (a multiply-add is 2) of one token in a full sequence: router, chosen experts within capacity,
        shared experts. Padding by a backend is not counted; top-p counts all k."""
        experts = self.experts.flops_per_token(self.router.experts_per_token())
        return round(self.router.flops_per_token() + experts + (self.shared.flops_per_token() if self.shared else 0))


def make_freezable(router):
    """Adds buffers that `freeze` fills, and hooks that keep gradients from frozen parameters."""
    router.register_buffer("is_frozen", torch.tensor(False))
    router.register_buffer("frozen_values", torch.zeros(sum(p.numel() for p in router.parameters())))
    for parameter in router.parameters():
        parameter.register_hook(lambda gradient: gradient.masked_fill(router.is_frozen, 0.0))


@torch.no_grad()
def freeze(router):
    """Keeps the router's parameters as they are: the first call copies them, and each later one undoes what moments and
    weight decay have changed since. Nothing waits for the device."""
    parameters = list(router.parameters())
    values = torch.cat([parameter.flatten() for parameter in parameters])
    router.frozen_values.copy_(torch.where(router.is_frozen, router.frozen_values, values))
    router.is_frozen.fill_(True)
    for parameter, kept in zip(parameters, router.frozen_values.split([p.numel() for p in parameters])):
        parameter.copy_(kept.view_as(parameter))


def apply_schedule(buffer, config, key, step):
    """Sets `buffer` to a scheduled key's value before update `step`: from `key` to `key`_end over the run."""
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
# Experts


class Experts(nn.Module):
    """E first layers, W_in (H, D) and b_in (H,) each. A subclass adds the layers that follow.

    H is config.expert_hidden; 0 = 4·D units per expert (mlp) or in total (linear kinds), as in the dense MLP.
    """

    per_expert: tuple[str, ...]  # the parameters with one slice per expert; the others serve every token
    gate_after = True  # whether the gate multiplies the activated hidden units; else it multiplies their input

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

    def activate(self, up):
        """Hidden units from the first layer's output, any shape."""
        return self.dropout(F.gelu(up))

    def run_backend(self, backend, x_ND, routing):
        """Σ_k g_k · (hidden units of expert e_k) W_out, see `backends.py`."""
        return backend(x_ND, routing, self.w_in, self.bias_in, self.w_out, self.activate, self.gate_after)

    def flops_per_token(self, k):
        return k * 2 * sum(weight[0].numel() for weight in (self.w_in, self.w_out) if weight is not None)


class MLPExperts(Experts):
    """E separate MLPs with weighted outputs (Shazeer et al. 2017, eq. 1):
    y = Σ_k g_k (GELU(x W_inᵀ + b_in) W_out + b_out)."""

    per_expert = ("w_in", "bias_in", "w_out", "bias_out")

    @staticmethod
    def default_hidden(config):
        return 4 * config.n_embd

    def __init__(self, config):
        super().__init__(config)
        self.w_out = nn.Parameter(torch.empty_like(self.w_in))
        self.bias_out = nn.Parameter(torch.empty(config.n_expert, config.n_embd)) if config.bias else None

    def forward(self, x_ND, routing, backend):
        y_ND = self.run_backend(backend, x_ND, routing)
        return y_ND if self.bias_out is None else y_ND + gates_per_expert(routing) @ self.bias_out


class LinearConcatExperts(Experts):
    """E linear experts in place of the MLP's first layer, gated outputs side by side:
    y = GELU([g_1 x W_1ᵀ … g_E x W_Eᵀ]) W_out + b_out.

    Paper B's layer read literally: with H = 4·D/E it has the dense MLP's parameters, and with all gates at 1 it is
    the dense MLP. Since GELU(0) = 0, this is MLPExperts with the gate before the GELU.
    """

    per_expert = ("w_in", "bias_in", "w_out")
    gate_after = False

    def __init__(self, config):
        super().__init__(config)
        self.w_out = nn.Parameter(torch.empty_like(self.w_in))
        self.bias_out = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def forward(self, x_ND, routing, backend):
        return add_bias_if_kept(self.run_backend(backend, x_ND, routing), self.bias_out, routing)


class LinearSumExperts(Experts):
    """Paper B's layer, the other reading: y = GELU(Σ_k g_k (x W_kᵀ + b_k)) W_mix + b_out, one W_mix (H, D) for all."""

    per_expert = ("w_in", "bias_in")

    def __init__(self, config):
        super().__init__(config)
        self.w_mix = nn.Parameter(torch.empty(self.w_in.size(1), config.n_embd))
        self.bias_out = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def activate(self, up):
        return up

    def forward(self, x_ND, routing, backend):
        mixed_NH = self.run_backend(backend, x_ND, routing)
        y_ND = F.linear(self.dropout(F.gelu(mixed_NH)), self.w_mix.t())
        return add_bias_if_kept(y_ND, self.bias_out, routing)

    def flops_per_token(self, k):
        return super().flops_per_token(k) + 2 * self.w_mix.numel()


def add_bias_if_kept(y_ND, bias_D, routing):
    """Adds the bias that all experts share. A token that every expert dropped gets exactly 0."""
    if bias_D is None:
        return y_ND
    return torch.where(routing.kept.any(dim=-1, keepdim=True), y_ND + bias_D, 0.0)


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


EXPERTS: dict[str, type[Experts]] = {
    "mlp": MLPExperts,
    "linear_concat": LinearConcatExperts,
    "linear_sum": LinearSumExperts,
}


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation of experts and router: (layer, std, residual_std), the SDs of the rest of the model


def init_gpt2(layer, std, residual_std):
    """As the dense MLP: one SD for all widths, a smaller one for weights that write into the residual stream."""
    for name, weight in weights_of(layer):
        nn.init.normal_(weight, std=residual_std if name in ("w_out", "w_mix") else std)


def init_switch(layer, std, residual_std):
    """Normal with variance 0.1 / fan-in, cut at two SDs (Fedus et al. 2022, section 2.4: a tenth of the usual)."""
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
    """(name, weight) of the router's `initialised_by_layer` and of the experts' weights."""
    of_router = [(name, getattr(layer.router, name)) for name in layer.router.initialised_by_layer]
    return of_router + [(n, weight) for n, weight in layer.experts.named_parameters() if not n.startswith("bias")]


INITS: dict[str, Callable] = {"gpt2": init_gpt2, "switch": init_switch, "sigma_moe": init_sigma_moe}
