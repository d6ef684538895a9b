"""Decoding on CUDA: weights cast once, experts and attention by Triton kernels, a step as one CUDA graph.

`speed/decoding.py` chooses among the decoders here, and says what they have in common.
"""

import copy

import torch
import torch.nn as nn

import backends
from model import Decoder, Generated, sample
from moe import Experts
from routing import is_linear_top_k
from selection import Routing
from speed import decoding_kernels, kernels
from support import machines, triton_here
from support.capture import Captured, side_stream

FEW_TOKENS = 64  # the most for kernels.py


class AutocastDecoder(Decoder):
    """Decodes in the machine's precision."""

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None):
        self.machine = machine
        with machine.autocast():
            super().__init__(model, batch_size, temperature, top_k)

    def read(self, ids_BT):
        with self.machine.any_length():
            return super().read(ids_BT)


class CapturedDecoder(AutocastDecoder):
    """Decodes on CUDA: weights cast once, experts by `kernels.py`, a step of one token per sequence as a CUDA graph.

    machine.compile: torch.compile first, to fuse small operations. A step's routing is overwritten by the next step.
    """

    def __init__(self, model, batch_size, machine, temperature=1.0, top_k=None):
        super().__init__(cast(model, machine.dtype), batch_size, machine, temperature, top_k)
        self.batch_size = batch_size
        self.position = torch.zeros(1, dtype=torch.int64, device=machine.device)
        self.how = self.lay_out()
        self.replay = self.captured(self.step, batch_size)

    def lay_out(self):
        """Makes self.step ready to be captured. -> how, in words"""
        if is_compiled := self.machine.compile and triton_here.AVAILABLE:
            self.step = machines.compiled(self.step)
        in_triton = any(layer.own_backend is by_kernels for layer in self.model.moe_layers())
        return f"{'compiled, ' if is_compiled else ''}CUDA graph{', experts in Triton' if in_triton else ''}"

    def captured(self, function, *shape):
        """function(ids (B, 1), uniform of this shape) as a CUDA graph. Each run before the capture starts from an empty
        cache, so that the compiler sees one case."""
        device = self.machine.device
        ids = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=device)
        with torch.no_grad(), self.machine.autocast():
            uniform = torch.zeros(shape, device=device)
            return Captured(function, [ids, uniform], device, side_stream(device), reset=self.clear)

    def step(self, ids_B1, uniform_B):
        """Reads, draws, and advances self.position. -> (logits (B, V), tokens (B,), routing)"""
        self.cache.position = self.position
        out = self.model(ids_B1, cache=self.cache, last_only=True)
        self.cache.position = None
        self.position += 1
        logits = out.logits[:, -1].float()
        return logits, sample(logits, self.temperature, self.top_k, uniform_B), out.routing

    def clear(self):
        super().clear()
        self.position.zero_()

    def read(self, ids_BT):
        if ids_BT.size(1) > 1:
            logits_and_routing = super().read(ids_BT)
            self.position.fill_(self.length)
            return logits_and_routing
        logits, _, routing = self.read_one(ids_BT, 0.0)
        return logits.clone(), routing

    def next(self, ids_BT, uniform_B):
        if ids_BT.size(1) > 1:
            return super().next(ids_BT, uniform_B)
        _, tokens, routing = self.read_one(ids_BT, uniform_B)
        return Generated(tokens.clone(), routing)

    def read_one(self, ids_B1, uniform_B):
        return self.run(self.replay, 1, ids_B1, uniform_B)

    @torch.no_grad()
    def run(self, replay, count, ids_B1, uniform):
        """Replays so many steps, if the cache has room for them."""
        if self.length + count > self.model.config.block_size:
            raise ValueError(f"{self.length + count} positions, but block_size is {self.model.config.block_size}")
        with self.machine.autocast():
            made = replay(ids_B1, uniform)
        self.cache.length += count
        return made


class AttentionDecoder(CapturedDecoder):
    """The same with one kernel for all that lies between the two products of attention."""

    def lay_out(self):
        for block in self.model.blocks:
            block.attention.forward = KernelAttention(block.attention)
        return f"{super().lay_out()}, attention in Triton"


def cast(model, dtype):
    """A copy of the model for CUDA: matrices cast to `dtype` once, experts by `kernels.py`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)  # else autocast caches casts, and a graph lacks them
    for _, module in model.modules_without_routers():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    for layer in model.moe_layers():
        layer.experts.to(dtype)
        layer.own_backend = by_kernels if has_gelu_between(layer.experts) else by_training
        if is_plain(layer):
            layer.route = KernelRoute(layer)
    return model


class KernelAttention:
    """`Attention.forward` with one kernel between its two products, for one new token per sequence."""

    def __init__(self, attention):
        self.attention, self.many = attention, attention.forward

    def __call__(self, x_BTD, past=0, cache=None, visible=None):
        if not isinstance(past, torch.Tensor):
            return self.many(x_BTD, past, cache, visible)
        y_BD = decoding_kernels.attend(self.attention.qkv(x_BTD[:, 0]), cache.keys, cache.values, past)
        return self.attention.proj(y_BD)[:, None]


def has_gelu_between(experts):
    """Whether each expert has two layers with GELU between them, as `kernels.py` computes."""
    return experts.w_out is not None and type(experts).activate is Experts.activate


def by_training(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """A backend (see `backends.py`): one of training's, which a step can be captured with."""
    name = backends.choose_backend(w_in.shape, routing.experts.size(1), x_ND.device, w_in.dtype)
    return backends.BACKENDS[name](x_ND, routing, w_in, bias_in, w_out, activate, gate_after)


def by_kernels(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """A backend for few tokens; many go to a backend of training."""
    if x_ND.size(0) > FEW_TOKENS:
        return by_training(x_ND, routing, w_in, bias_in, w_out, activate, gate_after)
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


def is_plain(layer):
    """Whether routing is a linear router and top-k of the token's own vector."""
    config = layer.config
    special = config.capacity_factor, config.router_top_p, config.router_bias_rate, config.gate_straight_through
    return is_linear_top_k(layer.router) and config.router_level == "token" and not any(special)
