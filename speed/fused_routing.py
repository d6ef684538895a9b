"""Training with the routing of MoE layers in few kernels: `route_kernels.py`, put in the place of what they compute.

    reason = use_kernels(model, machine)      # None, or why the model stays as it is

Off unless the key `routing_kernels` asks for it. It replaces three things, which can be replaced for this purpose:
`route` and `own_backend` of each layer, and the model's `own_measures`. Numbers are the same up to the order of sums
and, in bfloat16, roundings, and the choices of experts up to ties that these break. A layer takes part where its
routing is a linear router's top-k of the token's own vector, with softmax and without noise, and its experts are at
most 64 MLPs on sorted rows; a balancing loss takes part where it needs no more than sums over tokens. Decoding with a
cache goes the general way.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import backends
import balance
from moe import MoE
from selection import GATES, Routing, softmax_gate
from speed.decoding import is_plain
from speed.route_kernels import MOST_EXPERTS, choose, lay_out, route_gradients, spread
from support import triton_here

LOSSES = (None, balance.switch_loss)  # balancing losses that sums give
FEW = 8  # experts, at most, whose logits are written as sums


class RoutedRows(NamedTuple):
    """A Routing, by the same names, with the tokens' rows and sums: see route_kernels.py."""

    logits: torch.Tensor
    probs: torch.Tensor
    experts: torch.Tensor
    gates: torch.Tensor
    chosen: torch.Tensor
    kept: torch.Tensor
    room: int
    sums: torch.Tensor  # (3·E + 3,)
    rows: torch.Tensor  # (M, D)
    place: torch.Tensor  # (B, T, K)
    offsets: torch.Tensor  # (E,)


def use_kernels(model, machine):
    """Let a GPT route by kernels on this machine, in place. -> the reason why it cannot, or None"""
    reason = triton_here.obstacle_to_training(machine.device) or obstacle(model.moe_layers(), machine)
    if not reason:
        put_kernels(model, machine)
    return reason


def put_kernels(model, machine):
    """Let a GPT without obstacles route by kernels, in place; where Triton does not run, by their PyTorch twins."""
    for layer in model.moe_layers():
        layer.route, layer.own_backend = KernelRoute(layer, machine), sorted_by_kernels
    model.own_measures = KernelMeasures(model, machine)


def obstacle(layers, machine):
    if not layers:
        return "the model has no experts"
    if len({layer.config.n_expert for layer in layers}) > 1:
        return "blocks differ in their number of experts"
    return next(filter(None, (obstacle_of_layer(layer, machine) for layer in layers)), None)


def obstacle_of_layer(layer, machine):
    config, experts = layer.config, layer.experts
    if not is_plain(layer):
        return "routing is more than a linear router's top-k of the token's own vector"
    if config.n_expert > MOST_EXPERTS:
        return f"there are more than {MOST_EXPERTS} experts"
    if GATES[config.gate] is not softmax_gate:
        return "the gate is not softmax"
    if config.router_jitter or config.expert_dropout_is_used or config.expert_output_masking:
        return "routing is noisy in training"
    if balance.AUX_LOSSES[config.aux_loss] not in LOSSES:
        return "the balancing loss needs more than sums over tokens"
    if not experts.gate_after or experts.w_out is None or experts.bias_in is not None:
        return "experts are not MLPs without biases"
    if layer.backend_name(machine.device, machine.dtype, machine.compile) != "sorted":
        return "experts do not run on sorted rows"
    return None


class KernelRoute:
    """`MoE.route` by kernels."""

    def __init__(self, layer, machine):
        config = layer.config
        self.layer, self.dtype = layer, machine.dtype
        self.k, self.renormalize = config.expert_top_k or config.n_expert, config.gate_renormalize

    def __call__(self, x_BTD, ids_BT, cache=None, real_BT=None):
        layer = self.layer
        if cache is not None:
            return MoE.route(layer, x_BTD, ids_BT, cache, real_BT)
        real_N = None if real_BT is None else real_BT.reshape(-1)
        logits = product(x_BTD, layer.router.weight).flatten(0, -2)
        words = logits, layer.temperature, real_N, self.k, self.renormalize
        probs, experts, gates, sums, rows, place, offsets = Dispatch.apply(x_BTD.to(self.dtype), *words)
        every = torch.ones_like(experts, dtype=torch.bool)
        return RoutedRows(logits, probs, experts, gates, every, every, len(experts), sums, rows, place, offsets)


def product(x_BTD, weight_ED):
    """The logits x Wᵀ (B, T, E) in float32.

    Those of few experts are written as sums: the compiler puts them into the kernel that makes x, and their gradients
    into the one that makes x again for its own, so that x is never written in float32.
    """
    x_BTD, weight_ED = x_BTD.float(), weight_ED.float()
    if len(weight_ED) <= FEW and torch.compiler.is_compiling():
        return torch.stack([(x_BTD * weight_D).sum(dim=-1) for weight_D in weight_ED], dim=-1)
    with torch.autocast(x_BTD.device.type, enabled=False):
        return F.linear(x_BTD, weight_ED)


def sorted_by_kernels(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """The backend `sorted` (see `backends.py`) for choices that were laid out with their routing."""
    if not isinstance(routing, RoutedRows):
        return backends.sorted_by_expert(x_ND, routing, w_in, bias_in, w_out, activate, gate_after)
    first, second = backends.products(backends.grouped_mm, routing.offsets, w_in, w_out, routing.rows.dtype)
    return Combine.apply(second(activate(first(routing.rows))), routing.gates, routing.place)


class KernelMeasures:
    """A model's routing statistics and auxiliary losses, from the sums that its layers made.

    The compiler makes two kernels of this forward and one backward. Constants are made once, since each that is made
    anew is a kernel.
    """

    def __init__(self, model, machine):
        self.model = model
        self.zero = torch.zeros((), device=machine.device)
        self.true = torch.ones((), dtype=torch.bool, device=machine.device)

    def __call__(self, routings, batch_mean):
        """-> (stats, aux, routings) as in `model.Output`"""
        config, E = self.model.config, routings[0].probs.size(1)
        sums_LW = torch.stack([routing.sums for routing in routings])
        load_LE, importance_LE, _, entropy_L1, _, tokens_L1 = sums_LW.detach().split((E, E, E, 1, 1, 1), dim=1)
        # Each loss is one sum over (L, E), and what gradients need has that shape, so that they share a kernel.
        counted_LE = tokens_L1.expand_as(load_LE).clamp_min(1)
        terms = {"z": sums_LW[:, -2:-1] / E / counted_LE}
        if balance.AUX_LOSSES[config.aux_loss]:
            sums_L3E = sums_LW[:, : 3 * E].unflatten(1, (3, E))
            mean_load_LE, _, mean_probs_LE = batch_mean(sums_L3E / counted_LE[:, None]).unbind(1)
            share_LE = mean_load_LE.detach() / mean_load_LE.detach().sum(dim=1, keepdim=True)
            terms[config.aux_loss] = E * share_LE * mean_probs_LE
        divisor = 1 if config.aux_loss_reduction == "sum" else len(routings)
        losses = {name: terms_LE.sum() / divisor for name, terms_LE in terms.items()}
        aux = balance.with_coefficients(losses, config, self.model.aux_loss_coef, self.zero)
        empty = sums_LW.new_empty(2, 0)
        stats = [
            balance.RoutingStats(load, importance, self.zero, self.zero, tokens, entropy, empty, empty)
            for load, importance, tokens, entropy in zip(load_LE, importance_LE, tokens_L1[:, 0], entropy_L1[:, 0])
        ]
        every = self.true.expand_as(routings[0].experts)
        plain = [
            Routing(one.logits.detach(), one.probs, one.experts, one.gates.detach(), every, every, one.room)
            for one in routings
        ]
        return stats, {name: term._replace(raw=term.raw.detach()) for name, term in aux.items()}, plain


# ---------------------------------------------------------------------------------------------------------------------
# With gradients


class Dispatch(torch.autograd.Function):
    """`choose` and `lay_out`. Gradients flow to x from the rows, and to the logits from gates and sums (but choices and
    entropy). place is given as (B, T, K)."""

    @staticmethod
    def forward(ctx, x_BTD, logits, temperature, real_N, k, renormalize):
        probs, experts, gates, counts, sums = choose(logits, temperature, real_N, k, renormalize)
        rows, place, offsets, sums = lay_out(x_BTD, experts, counts, sums)
        place = place.view(*x_BTD.shape[:-1], k)
        ctx.save_for_backward(logits, probs, experts, temperature, real_N, place)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(probs, experts, place, offsets)
        return probs, experts, gates, sums, rows, place, offsets

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _probs, _experts, of_gates, of_sums, of_rows, _place, _offsets):
        *words, place = ctx.saved_tensors
        of_logits = route_gradients(*words, of_gates, of_sums, ctx.renormalize)
        return sum_of_choices(rows_of(of_rows, place)), of_logits, None, None, None, None


def rows_of(rows, place_BTK):
    """(B, T, K, D)"""
    return rows.index_select(0, place_BTK.reshape(-1)).view(*place_BTK.shape, -1)


def sum_of_choices(y_BTKD):
    return y_BTKD[..., 0, :] if y_BTKD.size(-2) == 1 else y_BTKD.sum(dim=-2)


class Combine(torch.autograd.Function):
    """The layer's output (B, T, D): Σ_k g_k · y_rows[place_k], in the precision of y_rows. gates (N, K)."""

    @staticmethod
    def forward(ctx, y_rows, gates_NK, place_BTK):
        ctx.save_for_backward(y_rows, gates_NK, place_BTK)
        gates_BTK1 = gates_NK.view(*place_BTK.shape, 1).to(y_rows.dtype)
        return sum_of_choices(rows_of(y_rows, place_BTK) * gates_BTK1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_BTD):
        return *spread(gradient_BTD, *ctx.saved_tensors), None
