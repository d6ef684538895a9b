"""Fast writing: the same model with its weights laid out for single tokens, and its step as a CUDA graph.

    decoder = fastest(model, batch_size, machine, temperature=0.8, top_k=200)
    for step in decoder.write(prompt, 500, generators): ...

A step of decoding reads every weight once and computes little, so its time goes to memory and, at this size, to
launches of small operations. On a CPU, weight matrices are packed for oneDNN once, and only the chosen experts are
read. On CUDA: `captured_decoding.py`, and `fused_decoding.py` if asked for. Elsewhere: `model.Decoder`.

A seed gives the same text with every decoder, up to rounding: sums differ in their last bits, so now and then a draw at
the edge between two characters falls on the other side.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import backends
from model import Decoder
from routing import LEVELS
from selection import GATES, Routing, top_k_experts
from speed import fused_decoding
from speed.captured_decoding import AttentionDecoder, AutocastDecoder, CapturedDecoder, is_plain
from support import triton_here

PACK = "_reorder_linear_weight"  # of torch.ops.mkldnn; torch.compile uses it too
PACKED_FOR = 256  # rows; layouts for 8 to 256 were equally fast at batch 1, 8 and 32, that for 1 was slowest
DECODERS = {  # asked for -> what is tried on CUDA, in this order
    "auto": ("captured",),
    "attention": ("attention", "captured"),
    "fused": ("fused", "captured"),
}


def fastest(model, batch_size, machine, temperature=1.0, top_k=None, decoder="auto") -> Decoder:
    """The fastest Decoder of `model` (a GPT) for this many sequences on this machine, with a copy of its weights.

    decoder: one of DECODERS. `how` of the Decoder says why one that was tried was not taken."""
    how, made, reasons = (batch_size, machine, temperature, top_k), None, {}
    ways = {
        "fused": (lambda: needs_triton() or fused_decoding.obstacle(model, batch_size), fused_decoding.FusedDecoder),
        "attention": (needs_triton, AttentionDecoder),
        "captured": (lambda: None, CapturedDecoder),
    }
    if machine.device.type == "cuda":
        for way in DECODERS[decoder]:
            find_obstacle, make = ways[way]
            reasons[way] = obstacle(model) or find_obstacle()
            if not reasons[way]:
                try:
                    made = make(model, *how)
                    break
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever a compiler or a driver raises, writing can go on without it
                    reasons[way] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    elif decoder != "auto":
        reasons[decoder] = "it needs CUDA"
    if made is None and machine.device.type == "cpu" and can_pack(machine.dtype):
        made = PackedDecoder(model, *how)
    made = made or AutocastDecoder(copy.deepcopy(model).eval(), *how)
    made.how += "".join(f" (not {way}: {reason})" for way, reason in reasons.items() if reason)
    return made


def obstacle(model):
    """The reason why a step of this model cannot be one CUDA graph, or None."""
    if looks_back(model):
        return "its routers look back, so that shapes change"
    return needs_triton() if model.moe_layers() else None


def needs_triton():
    return None if triton_here.AVAILABLE else "Triton is not installed"


def looks_back(model):
    """Whether a router needs earlier tokens than the one at hand."""
    layers = model.moe_layers()
    return any(layer.router.needs_history or LEVELS[layer.config.router_level].needs_history for layer in layers)


# ---------------------------------------------------------------------------------------------------------------------
# CPU


class PackedDecoder(AutocastDecoder):
    """Decodes float32 on a CPU: weights in oneDNN's fastest layout; only the chosen experts are read."""

    how = "eager, cached, packed weights"

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None):
        super().__init__(pack_weights(model), batch_size, machine, temperature, top_k)


def can_pack(dtype):
    return dtype == torch.float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, PACK)


def pack_weights(model):
    """A copy of the model with packed weights, except its routers'."""
    model = copy.deepcopy(model).eval()
    for _, module in model.modules_without_routers():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    for layer in model.moe_layers():
        layer.own_backend = PackedExperts(layer.experts)
        if is_plain(layer):
            layer.route = PlainRoute(layer)
    return model


class PackedLinear(nn.Module):
    """x Wᵀ + b, for a weight (out, in) that does not change."""

    @torch.no_grad()
    def __init__(self, weight, bias=None):
        super().__init__()
        self.width = len(weight)
        self.weight = getattr(torch.ops.mkldnn, PACK)(weight.contiguous(), PACKED_FOR)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedExperts:
    """A backend (see `backends.py`) with packed weights of one layer, used instead of its arguments."""

    def __init__(self, experts):
        self.w_in = [PackedLinear(weight) for weight in experts.w_in]
        self.w_out = None if experts.w_out is None else [PackedLinear(weight.t()) for weight in experts.w_out]

    def __call__(self, x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
        if len(x_ND) == 1:
            return self.of_one_token(x_ND, routing, bias_in, activate, gate_after)
        rows, sizes = backends.rows_and_sizes(routing, len(self.w_in))

        def product_with(linears):
            def product(rows):
                *parts, rest = backends.slices(rows, sizes)
                products = [linear(part) for linear, part in zip(linears, parts) if len(part)]
                return torch.cat([*products, rest.new_zeros(len(rest), linears[0].width)])

            return product

        second = self.w_out and product_with(self.w_out)
        return backends.dispatch(x_ND, routing, rows, product_with(self.w_in), bias_in, activate, gate_after, second)

    def of_one_token(self, x_1D, routing, bias_in, activate, gate_after):
        """For one token, without sorting."""
        y = None
        for choice, (expert, kept) in enumerate(zip(routing.experts[0].tolist(), routing.kept[0].tolist())):
            if kept:
                up = self.w_in[expert](x_1D)
                up = up if bias_in is None else up + bias_in[expert]
                one = backends.hidden_units(up, routing.gates[:, choice : choice + 1], activate, gate_after)
                one = self.w_out[expert](one) if self.w_out else one
                y = one if y is None else y + one
        return x_1D.new_zeros(1, (self.w_out or self.w_in)[0].width) if y is None else y


class PlainRoute:
    """`MoE.route` of a plain layer, in few operations. Its logits are divided by the temperature."""

    def __init__(self, layer):
        self.weight = layer.router.weight.detach() / layer.temperature
        self.gate, self.renormalizes = GATES[layer.config.gate], layer.config.gate_renormalize
        self.k = layer.config.expert_top_k or layer.config.n_expert
        self.every = torch.ones(1, self.k, dtype=torch.bool, device=self.weight.device)

    def __call__(self, x_BTD, ids_BT, cache=None, real_BT=None):
        logits_NE = F.linear(x_BTD.reshape(-1, x_BTD.size(-1)), self.weight)
        scores_NE, probs_NE = self.gate(logits_NE)
        experts_NK = top_k_experts(logits_NE, self.k)
        gates_NK = scores_NE.gather(1, experts_NK)
        if self.renormalizes:
            _, gates_NK = self.gate(logits_NE.gather(1, experts_NK))
        every_NK = self.every.expand_as(experts_NK)
        return Routing(logits_NE, probs_NE, experts_NK, gates_NK, every_NK, every_NK, len(logits_NE))
