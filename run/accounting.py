"""Parameters and FLOPs of a model, and the dense models of equal cost.

    count_parameters(model)            {"total": …, "active": …, "embedding": …, …}
    training_flops_per_token(model)    forward_flops_per_token(model, context=100)
    dense_equal_active(config)         mlp_hidden of the dense model with as many FLOPs per token

A multiply-add is 2 FLOPs. Layers, routers and experts know their own FLOPs (`flops_per_token`). Letters as in `moe.py`.
"""

import collections

import torch
import torch.nn as nn

from model import GPT, MLP, Attention
from moe import Experts, SharedExperts

# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def count_parameters(model):
    """Parameters by kind. `total` counts each once (the output layer is the token embedding); `active`: used by one
    token; `embedding`: of tokens and positions."""

    def count(*types):
        modules = [module for _, module in model.modules_without_routers() if isinstance(module, types)]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    of_routers = {parameter for layer in model.moe_layers() for parameter in layer.router.parameters()}
    kinds = {
        "embedding": count(nn.Embedding),
        "attention": count(Attention),
        "mlp": count(MLP),
        "router": sum(parameter.numel() for parameter in of_routers),
        "experts": count(Experts, SharedExperts),
        "norm": count(nn.LayerNorm),
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(kinds.values()), "a parameter of no kind, or of two"
    return {"total": total, "active": active_parameters(model, 1), **kinds}


def active_parameters(model, n_tokens):
    """Parameters that n_tokens use together, rounded. Several tokens, and layers that share their experts, use the
    expected number of distinct experts, as if each chose at random."""
    unused = collections.defaultdict(lambda: 1.0)  # by experts: the probability that a token does not use one of them
    for layer in model.moe_layers():
        unused[layer.experts] *= 1 - layer.router.experts_per_token() / layer.config.n_expert
    inactive = 0
    for experts, probability in unused.items():
        weights = [getattr(experts, name) for name in experts.per_expert]
        per_expert = sum(weight[0].numel() for weight in weights if weight is not None)
        inactive += probability**n_tokens * len(experts.w_in) * per_expert
    return round(sum(parameter.numel() for parameter in model.parameters()) - inactive)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


def training_flops_per_token(model):
    """Training FLOPs per token at full block_size: forward, and twice that backward. Only chosen experts count;
    attention counts over the whole block_size × block_size square (Chowdhery et al. 2022, PaLM, appendix B)."""
    return 3 * forward_flops_per_token(model)


def forward_flops_per_token(model, context=None):
    """FLOPs of reading one token, averaged over a full sequence, or of decoding one after `context` cached tokens."""
    D, attended = model.config.n_embd, model.config.block_size if context is None else context + 1
    per_block = 2 * (3 * D * D + D * D) + 4 * attended * D
    mlps = sum(block.mlp.flops_per_token() for block in model.blocks)
    return 2 * model.token_embedding.weight.numel() + len(model.blocks) * per_block + mlps


def dense_equal_active(config):
    """mlp_hidden of the dense model with as many FLOPs per token, routers included: the one to beat if compute is
    scarce."""
    blocks = model_without_memory(config).blocks
    return round(sum(block.mlp.flops_per_token() for block in blocks) / len(blocks) / (2 * 2 * config.n_embd))


def dense_equal_total(config):
    """mlp_hidden of the dense model with as many parameters, routers included: the one to beat if memory is scarce."""
    blocks = model_without_memory(config).blocks
    parameters = {id(p): p.numel() for block in blocks for p in block.mlp.parameters()}  # shared ones once
    biases = len(blocks) * config.n_embd if config.bias else 0
    return round((sum(parameters.values()) - biases) / len(blocks) / (2 * config.n_embd + config.bias))


def model_without_memory(config):
    """The model with weights of shapes only, for counting. Its vocabulary has one symbol."""
    with torch.device("meta"):
        return GPT(config, vocab_size=1)
