"""Decoding with four kernels a layer and eight characters a CUDA graph, for few sequences of models without extras.

    if obstacle(model, batch_size) is None:
        decoder = FusedDecoder(model, batch_size, machine, temperature, top_k)

At batch 1 a step reads 21 MB, which the GPU's cache holds, in about 85 kernels that each wait for the last one. So time
is saved by fewer kernels, not by fewer bytes: `decoding_kernels.py` has them. Each token drawn is read by the next step
on the device.
"""

import math

import torch

from model import MLP, Generated
from moe import LinearConcatExperts, MLPExperts
from selection import Routing
from speed import decoding_kernels, kernels
from speed.captured_decoding import CapturedDecoder, has_gelu_between, is_plain
from speed.decoding_kernels import Stream

MOST_SEQUENCES = 4  # beyond, weights would be read several times, or products belong on tensor cores
LARGEST_ROUTER = 8192  # numbers of a router's weights, which every program reads, with both sides powers of 2
STEPS = 8  # characters of one graph


def obstacle(model, batch_size):
    """The reason why these kernels do not do what this model does, or None."""
    if batch_size > MOST_SEQUENCES:
        return f"more than {MOST_SEQUENCES} sequences"
    if model.token_embedding.num_embeddings > decoding_kernels.LARGEST_VOCABULARY:
        return f"more than {decoding_kernels.LARGEST_VOCABULARY} symbols"
    for block in model.blocks:
        layer = block.mlp
        if type(layer) is MLP:
            continue
        if not is_plain(layer):
            return "its routing is more than a linear router and the k best"
        if layer.shared is not None:
            return "it has shared experts"
        if not has_known_experts(layer.experts):
            return f"experts of another kind ({layer.config.expert_kind})"
        if math.prod(map(kernels.power_of_2_from, layer.router.weight.shape)) > LARGEST_ROUTER:
            return "its routers have too many weights"
    return None


def has_known_experts(experts):
    """Whether they are two layers with GELU between, and their biases are added in one of these two ways."""
    return has_gelu_between(experts) and type(experts).forward in (MLPExperts.forward, LinearConcatExperts.forward)


class FusedDecoder(CapturedDecoder):
    """Decodes on CUDA: a step is four kernels a layer and one at the end; eight steps are one CUDA graph.

    A prompt is read as by any other decoder.
    """

    def lay_out(self):
        self.blocks = [FusedBlock(block, self.batch_size) for block in self.model.blocks]
        self.head = self.model.token_embedding.weight.to(self.machine.dtype)
        self.at_once = min(STEPS, self.model.config.block_size)
        self.replay_several = self.captured(self.steps, self.at_once, self.batch_size)
        return f"CUDA graph of {self.at_once} steps, four Triton kernels a layer"

    def steps(self, ids_B1, uniform_SB):
        """-> (tokens (S, B), the routing of each step)"""
        tokens_SB, routing = ids_B1.new_empty(uniform_SB.shape), []
        for uniform_B, tokens_B in zip(uniform_SB, tokens_SB):
            routing.append(self.step(ids_B1, uniform_B, tokens_B)[2])
            ids_B1 = tokens_B
        return tokens_SB, routing

    def step(self, ids_B1, uniform_B, tokens_B=None):
        """As of CapturedDecoder; the tokens are written into tokens_B, if given."""
        model, routing = self.model, []
        tokens_B = ids_B1.new_empty(self.batch_size) if tokens_B is None else tokens_B
        stream = Stream(model.token_embedding.weight, model.position_embedding.weight, ids_B1.view(-1), self.position)
        with torch.autocast(self.machine.device.type, enabled=False):
            for block, cache in zip(self.blocks, self.cache.layers):
                stream, routed = block(stream, cache, self.position)
                routing += [routed] if routed else []
            norm, how = (model.norm.weight, model.norm.bias), (self.temperature, self.top_k)
            logits = decoding_kernels.norm_head_draw(stream, norm, self.head, uniform_B, self.position, tokens_B, *how)
        return logits, tokens_B, routing

    def continued(self, ids_BT, uniform_SB):
        while len(uniform_SB):
            count = self.at_once if ids_BT.size(1) == 1 and len(uniform_SB) >= self.at_once else 1
            if count == 1:
                made = [self.next(ids_BT, uniform_SB[0])]
            else:
                tokens_SB, routing = self.run(self.replay_several, count, ids_BT, uniform_SB[:count])
                made = [Generated(*step) for step in zip(tokens_SB.clone(), routing)]
            yield from made
            ids_BT, uniform_SB = made[-1].tokens[:, None], uniform_SB[count:]


class FusedBlock:
    """One block's weights as the kernels read them: (Stream, its LayerCache, position) -> (Stream, Routing or None)."""

    def __init__(self, block, batch_size):
        layer, attention, device = block.mlp, block.attention, block.norm_mlp.weight.device
        self.norms = [(norm.weight, norm.bias) for norm in (block.norm_attention, block.norm_mlp)]
        self.qkv, self.proj = attention.qkv, attention.proj
        self.layer, self.every = layer, None
        if isinstance(layer, MLP):
            self.w_out = layer.proj.weight.t().contiguous()[None]
            self.experts = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
            self.gates = torch.ones(batch_size, 1, device=device)
        else:
            config, experts = layer.config, layer.experts
            k = config.expert_top_k or config.n_expert
            self.weights = layer.router.weight, layer.temperature, experts.w_in, experts.bias_in, experts.bias_out
            self.how = k, config.gate, config.gate_renormalize, not experts.gate_after
            self.w_out, self.every = experts.w_out, torch.ones(batch_size, k, dtype=torch.bool, device=device)

    def __call__(self, stream, cache, position):
        norm_attention, norm_mlp = self.norms
        stream, qkv_BO = decoding_kernels.norm_linear(
            stream, norm_attention, self.qkv.weight, self.qkv.bias, gelu=False, carry=self.proj.bias
        )
        added = decoding_kernels.attend_and_project(qkv_BO, cache.keys, cache.values, position, self.proj.weight)
        stream, routing = stream._replace(added=added), None
        if self.every is None:
            fc, proj = self.layer.fc, self.layer.proj
            stream, hidden = decoding_kernels.norm_linear(
                stream, norm_mlp, fc.weight, fc.bias, gelu=True, carry=proj.bias
            )
            choices = hidden[:, None], self.w_out, self.experts, self.gates, False
        else:
            stream, *routed, hidden = decoding_kernels.norm_route_up(stream, norm_mlp, *self.weights, *self.how)
            routing = Routing(*routed, self.every, self.every, len(hidden))
            choices = hidden, self.w_out, routing.experts, routing.gates, self.layer.experts.gate_after
        return stream._replace(added=kernels.partial_down(*choices)), routing
