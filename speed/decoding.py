"""Fast writing: the same model with its weights laid out for single tokens, and its step as a CUDA graph.

    decoder = fastest(model, batch_size, machine, temperature=0.8, top_k=200)
    for step in decoder.write(prompt, 500, generators): ...

A step of decoding reads every weight once and computes little, so its time goes to memory and, at this size, to
launches of small operations. On a CPU, weight matrices are packed for oneDNN once, and only the chosen experts are
read. On CUDA, weights are cast once, the experts of small batches run as Triton kernels (`kernels.py`), and a step is
one CUDA graph. Elsewhere: `model.Decoder`.

A seed gives the same text with every decoder, up to rounding: sums differ in their last bits, so now and then a draw at
the edge between two characters falls on the other side.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import backends
from model import Decoder, Generated, sample
from routing import LEVELS, is_linear_top_k
from selection import GATES, Routing, top_k_experts
from speed import kernels
from support import machines

PACK = "_reorder_linear_weight"  # of torch.ops.mkldnn; torch.compile uses it too
FEW_TOKENS = 64  # the most for kernels.py
PACKED_FOR = 256  # rows; layouts for 8 to 256 were equally fast at batch 1, 8 and 32, that for 1 was slowest


def fastest(model, batch_size, machine, temperature=1.0, top_k=None) -> Decoder:
    """The fastest Decoder of `model` (a GPT) for this many sequences on this machine, with a copy of its weights."""
    how = batch_size, machine, temperature, top_k
    if machine.device.type == "cpu" and can_pack(machine.dtype):
        return PackedDecoder(model, *how)
    reason = None
    if machine.device.type == "cuda":
        reason = obstacle(model)
        if not reason:
            try:
                return CapturedDecoder(model, *how)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler or a driver raises, writing can go on without it
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return AutocastDecoder(copy.deepcopy(model).eval(), *how, reason)


def obstacle(model):
    """The reason why a step of this model cannot be one CUDA graph, or None."""
    if looks_back(model):
        return "its routers look back, so that shapes change"
    if model.moe_layers() and not kernels.AVAILABLE:
        return "Triton is not installed"
    return None


def looks_back(model):
    """Whether a router needs earlier tokens than the one at hand."""
    layers = model.moe_layers()
    return any(layer.router.needs_history or LEVELS[layer.config.router_level].needs_history for layer in layers)


class AutocastDecoder(Decoder):
    """Decodes in the machine's precision. reason: why no faster decoder was taken."""

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None, reason=None):
        self.machine = machine
        if reason:
            self.how = f"{self.how} (not captured: {reason})"
        with machine.autocast():
            super().__init__(model, batch_size, temperature, top_k)

    def read(self, ids_BT):
        with self.machine.any_length():
            return super().read(ids_BT)


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


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


class CapturedDecoder(AutocastDecoder):
    """Decodes on CUDA: weights cast once, experts by `kernels.py`, a step of one token per sequence as a CUDA graph.

    machine.compile: torch.compile first, to fuse small operations. A step's routing is overwritten by the next step.
    """

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None):
        super().__init__(cast(model, machine.dtype), batch_size, machine, temperature, top_k)
        if machine.compile and kernels.AVAILABLE:
            self.step = machines.compiled(self.step)
        self.position = torch.zeros(1, dtype=torch.int64, device=machine.device)
        self.ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=machine.device)
        self.uniform = torch.zeros(batch_size, device=machine.device)
        with torch.no_grad(), machine.autocast():
            self.made, self.replay = self.capture()
        self.clear()

    @property
    def how(self):
        in_triton = any(layer.experts.w_out is not None for layer in self.model.moe_layers())
        compiled = "compiled, " if self.machine.compile and kernels.AVAILABLE else ""
        return f"{compiled}CUDA graph{', experts in Triton' if in_triton else ''}"

    def step(self):
        """Reads self.ids, draws with self.uniform, advances self.position. -> (logits (B, V), tokens (B,), routing)"""
        self.cache.position = self.position
        out = self.model(self.ids, cache=self.cache, last_only=True)
        self.cache.position = None
        self.position += 1
        logits = out.logits[:, -1].float()
        return logits, sample(logits, self.temperature, self.top_k, self.uniform), out.routing

    def warm_up(self):
        """Compiles and sets up, which a graph must not contain. Each step starts from an empty cache, as the captured
        one does, so that the compiler sees one case."""
        for _ in range(3):
            self.clear()
            self.step()
        self.clear()

    def capture(self):
        """-> (outputs of step, in fixed memory; a function that runs the step again)"""
        with torch.cuda.device(self.machine.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.warm_up()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = self.step()
        return made, graph.replay

    def clear(self):
        super().clear()
        self.position.zero_()

    def read(self, ids_BT):
        if ids_BT.size(1) > 1:
            logits_and_routing = super().read(ids_BT)
            self.position.fill_(self.length)
            return logits_and_routing
        logits, _, routing = self.read_one(ids_BT)
        return logits.clone(), routing

    def next(self, ids_BT, uniform_B):
        if ids_BT.size(1) > 1:
            return super().next(ids_BT, uniform_B)
        self.uniform.copy_(uniform_B)
        _, tokens, routing = self.read_one(ids_BT)
        return Generated(tokens.clone(), routing)

    def read_one(self, ids_B1):
        if self.length == self.model.config.block_size:
            raise ValueError(f"{self.length + 1} positions, but block_size is {self.length}")
        self.ids.copy_(ids_B1)
        self.replay()
        self.cache.length += 1
        return self.made


def cast(model, dtype):
    """A copy of the model for CUDA: matrices cast to `dtype` once, experts by `kernels.py`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)  # else autocast caches casts, and a graph lacks them
    for _, module in model.modules_without_routers():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    for layer in model.moe_layers():
        layer.experts.to(dtype)
        layer.own_backend = by_kernels
        if is_plain(layer):
            layer.route = KernelRoute(layer)
    return model


def by_kernels(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """A backend (see `backends.py`) for few tokens. Many tokens and linear_sum go to a backend of training."""
    if x_ND.size(0) > FEW_TOKENS or w_out is None:
        name = backends.choose_backend(w_in.shape, routing.experts.size(1), x_ND.device, w_in.dtype)
        return backends.BACKENDS[name](x_ND, routing, w_in, bias_in, w_out, activate, gate_after)
    hidden = kernels.up(x_ND.to(w_in.dtype), w_in, bias_in, routing.experts, routing.gates, gate_first=not gate_after)
    return kernels.down(hidden, w_out, routing.experts, routing.gates, gate_last=gate_after)


class KernelRoute:
    """`MoE.route` of a plain layer, in one kernel."""

    def __init__(self, layer):
        config = layer.config
        self.how = config.expert_top_k or config.n_expert, config.gate, config.gate_renormalize, layer.temperature
        self.weight = layer.router.weight

    def __call__(self, x_BTD, ids_BT, cache=None, real_BT=None):
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1)).float()
        routed = kernels.route(x_ND, self.weight, *self.how)
        every = torch.ones_like(routed[2], dtype=torch.bool)
        return Routing(*routed, every, every, x_ND.size(0))


# ---------------------------------------------------------------------------------------------------------------------
# Routing without special cases and training


def is_plain(layer):
    """Whether routing is a linear router and top-k of the token's own vector."""
    config = layer.config
    special = config.capacity_factor, config.router_top_p, config.router_bias_rate, config.gate_straight_through
    return is_linear_top_k(layer.router) and config.router_level == "token" and not any(special)


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
