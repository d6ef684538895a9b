"""Writing fast: the same model with its weights laid out for one token at a time, and with the step captured.

    decoder = fastest(model, batch_size, machine, temperature=0.8, top_k=200)
    for step in decoder.write(prompt, 500, generators): ...

A step of decoding reads every weight once and does next to nothing with it, so it is limited by memory, and at this
size by the launches of small operations. On a CPU each weight matrix is put once into the order in which oneDNN reads
it fastest, and of the experts only those of the token are read. On CUDA the weights are cast once, the experts at
small batch run as Triton kernels (`kernels.py`), and the step is one CUDA graph. Elsewhere: `model.Decoder` as it is.

A text for a given seed does not depend on the decoder, beyond rounding: products are summed in another order, so logits
differ in their last bits, and now and then a draw at the edge between two characters falls on the other side.
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

PACK = "_reorder_linear_weight"  # of torch.ops.mkldnn: how torch.compile, too, lays out weights for oneDNN
FEW_TOKENS = 64  # for which kernels.py is made
PACKED_FOR = 256  # rows: at batch 1, 8 and 32 the layouts for 8 to 256 rows were alike, that for 1 the slowest


def fastest(model, batch_size, machine, temperature=1.0, top_k=None) -> Decoder:
    """The fastest Decoder of `model` (a GPT) for this many sequences on this machine. It has a copy of the weights as
    they are now."""
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
    """In the machine's precision. reason: why nothing faster was taken."""

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None, reason=None):
        self.machine = machine
        if reason:
            self.how = f"{self.how} (not captured: {reason})"
        with machine.autocast():
            super().__init__(model, batch_size, temperature, top_k)

    def read(self, ids_BT):
        with self.machine.autocast():
            return super().read(ids_BT)


# ---------------------------------------------------------------------------------------------------------------------
# CPU


class PackedDecoder(AutocastDecoder):
    """Of a float32 model on a CPU: the weights of every linear map and expert in the layout that oneDNN reads fastest,
    and of the experts only those that a token chose."""

    how = "eager, cached, packed weights"

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None):
        super().__init__(packed(model), batch_size, machine, temperature, top_k)


def can_pack(dtype):
    return dtype == torch.float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, PACK)


def packed(model):
    """A copy of the model with packed weights, but for its routers'."""
    model = copy.deepcopy(model).eval()
    for module in modules_without_routers(model):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    for layer in model.moe_layers():
        layer.own_backend = PackedExperts(layer.experts)
        if is_plain(layer):
            layer.route = PlainRoute(layer)
    return model


def modules_without_routers(model):
    of_routers = {module for layer in model.moe_layers() for module in layer.router.modules()}
    return [module for module in model.modules() if module not in of_routers]


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
    """A backend (see `backends.py`) with one layer's weights packed, in place of those that it is given."""

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
        """The same for one token, without sorting."""
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
    """On CUDA: weights cast once, the experts of few tokens by `kernels.py`, and a step of one token a sequence is the
    replay of a CUDA graph. machine.compile: torch.compile first, which fuses what lies between the matrix products.

    What a step says of its routing holds until the next step."""

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
        """Read self.ids, draw by self.uniform. -> (logits (B, V), tokens (B,), routing); moves self.position."""
        self.cache.position = self.position
        out = self.model(self.ids, cache=self.cache, last_only=True)
        self.cache.position = None
        self.position += 1
        logits = out.logits[:, -1].float()
        return logits, sample(logits, self.temperature, self.top_k, self.uniform), out.routing

    def warm_up(self):
        """The first steps compile and set up, which may not happen within a graph. Each begins with nothing read, so
        that all are the same to a compiler, and so is the step that is captured."""
        for _ in range(3):
            self.clear()
            self.step()
        self.clear()

    def capture(self):
        """-> (what step returns, in memory that stays; a function that runs the step again)"""
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
    """A copy of the model for CUDA: matrices in `dtype`, which are else cast at every use; experts by `kernels.py`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)  # else autocast keeps casts that a graph must make anew
    for module in modules_without_routers(model):
        if isinstance(module, nn.Linear):
            module.to(dtype)
    for layer in model.moe_layers():
        layer.experts.to(dtype)
        layer.own_backend = by_kernels
        if is_plain(layer):
            layer.route = KernelRoute(layer)
    return model


def by_kernels(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """A backend (see `backends.py`) for few tokens and GELU experts. Many tokens, and linear_sum, go to a backend of
    training."""
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

    def __call__(self, x_BTD, ids_BT, cache=None):
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1)).float()
        routed = kernels.route(x_ND, self.weight, *self.how)
        every = torch.ones_like(routed[2], dtype=torch.bool)
        return Routing(*routed, every, every, x_ND.size(0))


# ---------------------------------------------------------------------------------------------------------------------
# Routing without the steps of training and of special cases


def is_plain(layer):
    """Whether a token's experts depend on its own vector alone, by a linear router and top-k."""
    config = layer.config
    special = config.capacity_factor, config.router_top_p, config.router_bias_rate, config.gate_straight_through
    return is_linear_top_k(layer.router) and config.router_level == "token" and not any(special)


class PlainRoute:
    """`MoE.route` of a plain layer, in few operations. Its logits are those after the temperature."""

    def __init__(self, layer):
        self.weight = layer.router.weight.detach() / layer.temperature
        self.gate, self.renormalizes = GATES[layer.config.gate], layer.config.gate_renormalize
        self.k = layer.config.expert_top_k or layer.config.n_expert
        self.every = torch.ones(1, self.k, dtype=torch.bool, device=self.weight.device)

    def __call__(self, x_BTD, ids_BT, cache=None):
        logits_NE = F.linear(x_BTD.reshape(-1, x_BTD.size(-1)), self.weight)
        scores_NE, probs_NE = self.gate(logits_NE)
        experts_NK = top_k_experts(logits_NE, self.k)
        gates_NK = scores_NE.gather(1, experts_NK)
        if self.renormalizes:
            _, gates_NK = self.gate(logits_NE.gather(1, experts_NK))
        every_NK = self.every.expand_as(experts_NK)
        return Routing(logits_NE, probs_NE, experts_NK, gates_NK, every_NK, every_NK, len(logits_NE))
