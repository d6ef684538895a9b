"""GPT as in nanoGPT, with a dense MLP or a Mixture of Experts in each block.

    model = GPT(config, vocab_size)
    out = model(idx, targets)         # out.loss: cross-entropy, nats; out.objective: what to minimise
    for step in model.generate(prompt, 500, temperature=0.8, top_k=200): ...

Pre-norm blocks, learned positions, tied embeddings, GELU, fused causal attention, GPT-2's initialisation (Radford et
al. 2019). Letters: B sequences, T positions, D model width, V vocabulary; see `moe.py` for the rest.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import compute_dtype
from balance import AuxLoss, RoutingStats, aux_losses, own_mean, stats_of_layers
from moe import MoE, apply_schedule
from routing import RoutingCache
from selection import Routing, main_expert

IGNORED = -1  # a target that is not predicted


class Output(NamedTuple):
    logits: torch.Tensor  # (B, T, V), or (B, 1, V) with last_only
    loss: torch.Tensor | None  # mean cross-entropy over the targets, nats; nothing else is ever added to it
    aux: dict[str, AuxLoss]  # auxiliary losses by name, raw and weighted; empty without targets
    stats: list[RoutingStats]  # one per MoE layer; empty without targets
    routing: list[Routing]  # one per MoE layer

    @property
    def objective(self):
        """What training minimises: the cross-entropy and the weighted auxiliary losses."""
        return self.loss + sum(term.weighted for term in self.aux.values())


class Generated(NamedTuple):
    tokens: torch.Tensor  # (B,) the next token of each sequence
    routing: list[Routing]  # one per MoE layer, of the B·T tokens read for this step

    def experts(self, layer):
        """(B, T): the expert with the largest gate for each token read, in this MoE layer; -1 for a dropped token."""
        return main_expert(self.routing[layer]).view(self.tokens.size(0), -1)


class LayerCache:
    """One block's keys, values and RoutingCache of the tokens read so far."""

    def __init__(self, block, config, batch_size, device, dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.routing = None
        if isinstance(block.mlp, MoE):
            router_dtype = torch.promote_types(block.norm_mlp.weight.dtype, torch.float32)
            self.routing = RoutingCache(block.mlp.config, batch_size, device, router_dtype)

    def extend(self, k, v, past):
        """Adds k and v from position `past` on. -> keys, values (B, n_head, S, D // n_head)

        S = past + T; with `past` as a tensor (1,), for T = 1, S is block_size."""
        if isinstance(past, torch.Tensor):
            return self.keys.index_copy_(2, past, k), self.values.index_copy_(2, past, v)
        end = past + k.size(2)
        self.keys[:, :, past:end], self.values[:, :, past:end] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """A LayerCache per block, for batch_size sequences of the same length.

    position: a tensor (1,) int64 that replaces `length` in steps of one token with fixed shapes. Its owner advances it.
    """

    def __init__(self, model, batch_size):
        weight = model.token_embedding.weight
        dtype = compute_dtype(weight)
        self.layers = [LayerCache(block, model.config, batch_size, weight.device, dtype) for block in model.blocks]
        self.length, self.position = 0, None

    def clear(self):
        self.length = 0
        for layer in self.layers:
            if layer.routing:
                layer.routing.clear()


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD, past=0, cache=None, visible=None):
        """cache: a LayerCache, to which the keys and values of x are added from position `past` on. visible (T, S)
        bool: the positions that each position attends to; None = causal."""
        B, T, D = x_BTD.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.qkv(x_BTD).chunk(3, dim=-1))
        if cache:
            k, v = cache.extend(k, v, past)
        is_causal, dropout = visible is None and T > 1, self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal, dropout_p=dropout)
        return self.proj_dropout(self.proj(y.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.mlp_hidden or 4 * config.n_embd
        self.fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD):
        return self.dropout(self.proj(F.gelu(self.fc(x_BTD))))

    def flops_per_token(self):
        return 2 * (self.fc.weight.numel() + self.proj.weight.numel())


class Block(nn.Module):
    """Attention, then an MLP or an MoE layer (`mlp`), each added to the residual stream."""

    def __init__(self, config, mlp):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = mlp

    def forward(self, x_BTD, ids_BT, past=0, cache=None, visible=None, real_BT=None):
        """-> (x, routing), routing None in a dense block. real_BT: see `MoE.forward`."""
        x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD), past, cache, visible)
        y_BTD = self.norm_mlp(x_BTD)
        if not isinstance(self.mlp, MoE):
            return x_BTD + self.mlp(y_BTD), None
        y_BTD, routing = self.mlp(y_BTD, ids_BT, cache.routing if cache else None, real_BT)
        return x_BTD + y_BTD, routing


class GPT(nn.Module):
    """The whole model: ids -> Output.

    config: a `settings.Config`; vocab_size: V; symbol_counts (V,): occurrences in the training text, for hash routers.
    """

    def __init__(self, config, vocab_size, symbol_counts=None):
        super().__init__()
        counts = torch.ones(vocab_size, device="cpu") if symbol_counts is None else torch.as_tensor(symbol_counts)
        self.config, self.is_causal = config, config.is_causal
        self.batch_mean = own_mean  # in training; Updater replaces it for processes that share a batch
        self.own_measures: Callable | None = None  # replaces stats_of_layers and aux_losses, where layers made the sums
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList()
        experts = router = None
        for i in range(config.n_layer):
            if i not in config.moe_layers:
                self.blocks.append(Block(config, MLP(config)))
                continue
            if config.moe_layers.index(i) % (config.blocks_per_router or config.n_layer) == 0:
                router = None
            mlp = MoE(config.of_block(i), i, counts, experts, router)
            router, experts = mlp.router, mlp.experts if config.share_experts else None
            self.blocks.append(Block(config, mlp))
        self.register_buffer("aux_loss_coef", torch.tensor(float(config.aux_loss_coef)))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.init_weights()

    def init_weights(self):
        """Normal with SD 0.02, or 0.02/√(2·layers) for projections into the residual stream; biases 0, norms 1. Routers
        keep their own values except `initialised_by_layer`."""
        std = 0.02
        residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, module in self.modules_without_routers():
            if isinstance(module, MoE):
                module.init_weights(std, residual_std)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(".proj") else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, last_only=False) -> Output:
        """idx, targets: (B, T) int64; tokens whose target is IGNORED count in no loss and no statistics, and routing
        that looks at other tokens does not see them. cache: a KVCache that idx continues. last_only: logits of the last
        position only."""
        T, past, visible = idx.size(1), cache.length if cache else 0, None
        if cache and cache.position is not None:
            past = cache.position
            positions = self.position_embedding(past)
            visible = (torch.arange(self.config.block_size, device=idx.device) <= past)[None]
        elif past + T > self.config.block_size:
            raise ValueError(f"{past + T} positions, but block_size is {self.config.block_size}")
        else:
            positions = self.position_embedding.weight[past : past + T]
            if past and T > 1:
                visible = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(diagonal=past)
        x = self.dropout(self.token_embedding(idx) + positions)
        asks_for_real = self.own_measures or not self.is_causal
        routings, real_BT = [], targets != IGNORED if asks_for_real and targets is not None else None
        for i, block in enumerate(self.blocks):
            x, routing = block(x, idx, past, cache.layers[i] if cache else None, visible, real_BT)
            if routing is not None:
                routings.append(routing)
        if cache and cache.position is None:
            cache.length += T
        x = self.norm(x[:, -1:] if last_only else x)
        logits = F.linear(x, self.token_embedding.weight)
        if targets is None:
            return Output(logits, None, {}, [], routings)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=IGNORED)
        batch_mean = self.batch_mean if self.training else own_mean
        if self.own_measures:
            stats, aux, routings = self.own_measures(routings, batch_mean)
            return Output(logits, loss, aux, stats, routings)
        counted_N = (targets.reshape(-1) != IGNORED).to(loss.dtype)
        stats = stats_of_layers(routings, idx, self.config, self.token_embedding.num_embeddings, counted_N)
        aux = aux_losses(routings, self.config, self.aux_loss_coef, batch_mean, counted_N)
        return Output(logits, loss, aux, stats, routings)

    def set_step(self, step):
        """Sets scheduled values and redraws random routers, before update number `step`."""
        for layer in self.moe_layers():
            layer.set_step(step)
        apply_schedule(self.aux_loss_coef, self.config, "aux_loss_coef", step)
        if 0 < self.config.router_freeze_step <= step:  # it would train only the layers below the router
            self.aux_loss_coef.zero_()

    def update_biases(self, loads):
        """After an update: `MoE.update_bias` of each layer. loads: (E,) choices per expert of each layer."""
        if self.config.router_bias_rate:
            for layer, load_E in zip(self.moe_layers(), loads, strict=True):
                layer.update_bias(load_E)

    def moe_layers(self):
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def modules_without_routers(self):
        """[(name, module)] of all modules that belong to no router."""
        of_routers = {module for layer in self.moe_layers() for module in layer.router.modules()}
        return [(name, module) for name, module in self.named_modules() if module not in of_routers]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generators=None) -> Iterator[Generated]:
        """Continues idx (B, T) by max_new_tokens, one Generated a step. `speed/decoding.py` has faster Decoders."""
        return Decoder(self, idx.size(0), temperature, top_k).write(idx, max_new_tokens, generators)


class Decoder:
    """Writes text: reads new tokens of batch_size sequences into a cache, and draws the next token of each.

    temperature: logits are divided by it; 0 = the most likely token. top_k: sample among the k most likely.
    """

    how = "eager, cached"  # for tables of speed

    def __init__(self, model, batch_size, temperature=1.0, top_k=None):
        if not model.config.is_causal:
            raise ValueError("this model's routing looks at later tokens, so it cannot be sampled from")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or above")
        self.model, self.temperature, self.top_k = model, temperature, top_k
        self.cache = KVCache(model, batch_size)

    @property
    def length(self):
        """Tokens read of each sequence."""
        return self.cache.length

    def clear(self):
        """Forgets all tokens read."""
        self.cache.clear()

    @torch.no_grad()
    def read(self, ids_BT):
        """-> (logits (B, V) float32 of the next token, routing)"""
        out = self.model(ids_BT, cache=self.cache, last_only=True)
        return out.logits[:, -1].float(), out.routing

    def next(self, ids_BT, uniform_B) -> Generated:
        """Reads, and draws the next token of each sequence with its uniform number in [0, 1)."""
        logits_BV, routing = self.read(ids_BT)
        return Generated(sample(logits_BV, self.temperature, self.top_k, uniform_B), routing)

    def continued(self, ids_BT, uniform_SB) -> Iterator[Generated]:
        """Reads ids, then each token drawn but the last: one Generated for each of the S rows of uniform_SB. There must
        be room in the cache. A step's routing is valid until the next one is asked for."""
        for uniform_B in uniform_SB:
            step = self.next(ids_BT, uniform_B)
            yield step
            ids_BT = step.tokens[:, None]

    def write(self, idx, max_new_tokens, generators=None) -> Iterator[Generated]:
        """Continues idx (B, T) by max_new_tokens, one Generated a step, from an empty cache.

        generators: a CPU torch.Generator per sequence; a sample depends on its own seed alone, on every device.
        Positions are learned, so the cache cannot slide: at block_size tokens it is rebuilt from the last half.
        """
        if idx.size(1) == 0:
            raise ValueError("an empty prompt: at least one token is needed to start from")
        block_size = self.model.config.block_size
        uniform = torch.stack([uniforms(max_new_tokens, g) for g in generators or [None] * idx.size(0)], dim=1)
        uniform = uniform.to(idx.device)
        window = idx[:, -block_size:]
        while len(uniform):
            self.clear()
            fit = block_size + 1 - window.size(1)  # the last one is not read
            written = [window]
            for step in self.continued(window, uniform[:fit]):
                yield step
                written.append(step.tokens[:, None])
            uniform = uniform[fit:]
            window = torch.cat(written, dim=1)[:, -max(1, block_size // 2) :]


def uniforms(count, generator=None):
    """(count,) float32 in [0, 1), on the CPU. A larger count begins with the same numbers."""
    return torch.rand(count, generator=generator, device="cpu")


def sample(logits_BV, temperature, top_k, uniform_B):
    """The next token (B,) of each sequence: the first whose cumulative probability exceeds uniform_B, in [0, 1)."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    if top_k and top_k < logits_BV.size(-1):
        kth_best = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_best, -math.inf)
    cumulative_BV = F.softmax(logits_BV, dim=-1).cumsum(dim=-1)
    return (cumulative_BV <= uniform_B[:, None] * cumulative_BV[:, -1:]).sum(dim=-1)
