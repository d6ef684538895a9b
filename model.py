"""GPT as in nanoGPT, with a dense MLP or a Mixture of Experts in each block.

    model = GPT(config, vocab_size)
    out = model(idx, targets)         # out.loss: cross-entropy, nats; out.objective: what to minimise
    for step in model.generate(prompt, 500, temperature=0.8, top_k=200): ...

Pre-norm blocks, learned positions, tied embeddings, GELU, fused causal attention, GPT-2's initialisation (Radford et
al. 2019). Letters: B sequences, T positions, D model width, V vocabulary; see `moe.py` for the rest.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import moe

IGNORED = -1  # a target that is not predicted


class Output(NamedTuple):
    logits: torch.Tensor  # (B, T, V), or (B, 1, V) with last_only
    loss: torch.Tensor | None  # mean cross-entropy over the targets, nats; nothing else is ever added to it
    aux: dict[str, moe.AuxLoss]  # auxiliary losses by name, raw and weighted
    stats: list[moe.RoutingStats]  # one per MoE layer
    routing: list[moe.Routing]  # one per MoE layer

    @property
    def objective(self):
        """What training minimises: the cross-entropy and the weighted auxiliary losses."""
        return self.loss + sum(term.weighted for term in self.aux.values())


class Generated(NamedTuple):
    tokens: torch.Tensor  # (B,) the next token of each sequence
    experts: list[torch.Tensor]  # per MoE layer (B, T): the expert with the largest gate of each of the T tokens read
    # since the last step; -1 for a token that every expert dropped


class KVCache:
    """Keys and values of the tokens read so far, and how often each sequence has used each expert."""

    def __init__(self, model, batch_size):
        config, weight = model.config, model.token_embedding.weight
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        options = dict(device=weight.device, dtype=moe.compute_dtype(weight))
        self.keys = [torch.zeros(shape, **options) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, **options) for _ in range(config.n_layer)]
        self.expert_use = [
            torch.zeros(batch_size, config.n_expert, dtype=torch.int64, device=weight.device)
            for _ in range(config.n_layer)
        ]
        self.length = 0


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD, past=0, keys=None, values=None):
        """With a cache, x holds the positions from `past` on; their keys and values are written into it."""
        B, T, D = x_BTD.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.qkv(x_BTD).chunk(3, dim=-1))
        if keys is not None:
            keys[:, :, past : past + T], values[:, :, past : past + T] = k, v
            k, v = keys[:, :, : past + T], values[:, :, : past + T]
        visible = None
        if past and T > 1:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=x_BTD.device).tril(diagonal=past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=not past and T > 1, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj_dropout(self.proj(y.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD):
        return self.dropout(self.proj(F.gelu(self.fc(x_BTD))))


class Block(nn.Module):
    def __init__(self, config, is_moe):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = moe.MoE(config) if is_moe else MLP(config)

    def forward(self, x_BTD, past=0, keys=None, values=None, expert_use=None):
        """-> (x, routing), routing None in a dense block"""
        x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD), past, keys, values)
        y_BTD = self.norm_mlp(x_BTD)
        y_BTD, routing = self.mlp(y_BTD, expert_use) if isinstance(self.mlp, moe.MoE) else (self.mlp(y_BTD), None)
        return x_BTD + y_BTD, routing


class GPT(nn.Module):
    """config: a `configurator.Config` (or anything with its model and MoE keys and `moe_layers`); vocab_size: V."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i in config.moe_layers) for i in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.init_weights()

    def init_weights(self):
        """Normal with SD 0.02; 0.02/√(2·layers) for the 2 projections a layer that write into the residual stream;
        biases 0, norms 1."""
        std = 0.02
        residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, moe.MoE):
                module.init_weights(std, residual_std)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(".proj") else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, last_only=False) -> Output:
        """idx, targets: (B, T) int64; a target of IGNORED is not predicted, and its token not counted in the
        statistics. cache: a KVCache, which idx continues. last_only: logits of the last position alone."""
        T, past = idx.size(1), cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} positions, but block_size is {self.config.block_size}")
        x = self.token_embedding(idx) + self.position_embedding.weight[past : past + T]
        x = self.dropout(x)
        routings = []
        for i, block in enumerate(self.blocks):
            state = (past, cache.keys[i], cache.values[i], cache.expert_use[i]) if cache else ()
            x, routing = block(x, *state)
            if routing is not None:
                routings.append(routing)
        if cache:
            cache.length += T
        x = self.norm(x[:, -1:] if last_only else x)
        logits = F.linear(x, self.token_embedding.weight)
        loss, counted = None, None
        if targets is not None:
            counted = targets.reshape(-1) != IGNORED
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=IGNORED)
        stats = [moe.routing_stats(routing, counted) for routing in routings]
        return Output(logits, loss, moe.aux_losses(routings, self.config), stats, routings)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generators=None) -> Iterator[Generated]:
        """Continue idx (B, T) by max_new_tokens, one Generated a step.

        temperature: logits are divided by it; 0 takes the most likely token. top_k: sample among the k most likely.
        generators: a torch.Generator per sequence, on the model's device, so that a sample depends on its own seed
        alone.

        Positions are learned, so a cache cannot slide: when it holds block_size tokens, it is rebuilt from the last
        block_size // 2.
        """
        if not self.config.is_causal:
            raise ValueError("this model's routing looks at later tokens, so it cannot be sampled from")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or above")
        if idx.size(1) == 0:
            raise ValueError("an empty prompt: at least one token is needed to start from")
        window = idx[:, -self.config.block_size :]
        cache, unread = KVCache(self, idx.size(0)), window
        for _ in range(max_new_tokens):
            if cache.length + unread.size(1) > self.config.block_size:
                window = window[:, -max(1, self.config.block_size // 2) :]
                cache, unread = KVCache(self, idx.size(0)), window
            out = self(unread, cache=cache, last_only=True)
            experts = [moe.main_expert(routing).view(unread.shape) for routing in out.routing]
            tokens = sample(out.logits[:, -1].float(), temperature, top_k, generators)
            yield Generated(tokens, experts)
            unread = tokens[:, None]
            window = torch.cat((window, unread), dim=1)

    def count_parameters(self):
        """Parameters by kind; `total` counts each once (the output layer is the token embedding), `active` are those
        that one token uses, `embedding` are tokens and positions."""
        kinds = {
            "embedding": (nn.Embedding,),
            "attention": (Attention,),
            "mlp": (MLP,),
            "router": tuple(moe.ROUTERS.values()),
            "experts": (moe.Experts,),
            "norm": (nn.LayerNorm,),
        }
        counts = {
            kind: sum(p.numel() for m in self.modules() if isinstance(m, types) for p in m.parameters())
            for kind, types in kinds.items()
        }
        total = sum(p.numel() for p in self.parameters())
        assert total == sum(counts.values()), "a parameter of no kind, or of two"
        inactive = sum(m.inactive_parameters() for m in self.modules() if isinstance(m, moe.MoE))
        return {"total": total, "active": total - inactive, **counts}

    def flops_per_token(self):
        """Training FLOPs (forward, and twice that backward) per token at full block_size; a multiply-add is 2.
        Attention is counted over the whole block_size × block_size square, as Chowdhery et al. 2022 (PaLM, appendix
        B) do; only chosen experts count."""
        D, T = self.config.n_embd, self.config.block_size
        forward = 2 * self.token_embedding.weight.numel()
        for block in self.blocks:
            forward += 2 * (3 * D * D + D * D) + 4 * T * D
            forward += block.mlp.flops_per_token() if isinstance(block.mlp, moe.MoE) else 2 * 8 * D * D
        return 3 * forward


def sample(logits_BV, temperature, top_k=None, generators=None):
    """The next token (B,) of each sequence."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    if top_k and top_k < logits_BV.size(-1):
        kth_best = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_best, -math.inf)
    probs_BV = F.softmax(logits_BV, dim=-1)
    if generators is None:
        return torch.multinomial(probs_BV, 1)[:, 0]
    return torch.cat(
        [
            torch.multinomial(probs, 1, generator=generator)
            for probs, generator in zip(probs_BV, generators, strict=True)
        ]
    )
