"""From logits to choices: gates, the k best experts, capacity, and the resulting Routing.

Pure functions of tensors, called in order by `MoE.route` in `moe.py`; the logits come from `routing.py`. Letters as in
`moe.py`; G groups of S choices that share a capacity.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Routing(NamedTuple):
    """Where the tokens of one layer go.

    A token's K choices come best first, or in expert order if K = E (soft routing, expert choice).
    """

    logits: torch.Tensor  # (N, E) float32, the router's output
    probs: torch.Tensor  # (N, E) float32, the scores scaled so that each row sums to 1
    experts: torch.Tensor  # (N, K) int64
    gates: torch.Tensor  # (N, K) float32, 0 where the choice was not made, was dropped or its output is masked
    chosen: torch.Tensor  # (N, K) bool, False where the choice was not made (top-p, expert choice, expert dropout)
    kept: torch.Tensor  # (N, K) bool, chosen and not dropped for lack of room
    room: int  # the most choices that one expert can have kept: N, or fewer under a capacity


def top_k_experts(scores_NE, k, best_first=False):
    """(N, k): each token's k best experts, best first; in expert order if k = E and not best_first.

    Ties go to the lower index, on every device and for every N, so that cached and uncached decoding agree.
    """
    n_expert = scores_NE.size(-1)
    if k == n_expert and not best_first:
        return torch.arange(n_expert, device=scores_NE.device).expand_as(scores_NE)
    if k == 1:
        return scores_NE.argmax(dim=-1, keepdim=True)
    return torch.sort(scores_NE, dim=-1, descending=True, stable=True).indices[:, :k]


# ---------------------------------------------------------------------------------------------------------------------
# Gates: logits (N, E) -> (scores, the weights of the experts' outputs; probs, the scores scaled so that rows sum to 1).
# Both grow with the logits, so experts are chosen by the logits, or by score plus balancing bias.


def softmax(logits_NE):
    """Softmax over the experts, moved to the outer dimension: ten times faster on a CPU."""
    return F.softmax(logits_NE.t(), dim=0).t()


def softmax_gate(logits_NE):
    probs_NE = softmax(logits_NE)
    return probs_NE, probs_NE


def sigmoid_gate(logits_NE):
    return torch.sigmoid(logits_NE), softmax(F.logsigmoid(logits_NE))


GATES: dict[str, Callable] = {"softmax": softmax_gate, "sigmoid": sigmoid_gate}


def expert_dropout_mask(shape, rate, device):
    """(N, E) bool: expert masked for a token, with probability `rate` (a 0-d tensor; Csordás et al. 2023). A token that
    would lose all experts keeps all."""
    masked_NE = torch.rand(shape, device=device) < rate
    return masked_NE & ~masked_NE.all(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def capacity(config, n_sequences=1):
    """C = ceil(cf · k · T / E) choices per expert and sequence (Fedus et al. 2022, eq. 3). T is the block size, not the
    current length, so that a later token cannot change an earlier one's room.

    n_sequences: that share a room, an int or a 0-d int64 tensor; C is then of the same kind."""
    share = min(config.capacity_factor * config.expert_top_k * config.block_size / config.n_expert, config.block_size)
    units = max(1, int(share * 2**40))  # in integers: 1.1 · 10 is 11.000000000000002, and not every device has float64
    return (n_sequences * units + (2**40 - 1)) >> 40


def within_capacity(experts_GS, chosen_GS, n_expert, limit, use_GE=None):
    """(G, S) bool: the choices that find room, with a capacity of `limit` choices (an int or a 0-d tensor) per expert
    and group.

    experts_GS: choices token by token, so that no token yields to a later one; chosen_GS: whether each was made; use_GE
    (int64, updated in place): choices of earlier calls.
    """
    wanted_GES = (F.one_hot(experts_GS, n_expert) * chosen_GS[..., None]).transpose(1, 2).contiguous()
    rank_GES = wanted_GES.cumsum(dim=-1)
    if use_GE is not None:
        rank_GES = rank_GES + use_GE[:, :, None]
        use_GE += wanted_GES.sum(dim=-1)
    return chosen_GS & ((rank_GES * wanted_GES).sum(dim=1) <= limit)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a Routing


def main_expert(routing):
    """(N,): the expert with each token's largest gate, -1 where no choice was kept."""
    gate_N, choice_N = routing.gates.masked_fill(~routing.kept, -1).max(dim=-1)
    return torch.where(gate_N < 0, -1, routing.experts.gather(1, choice_N[:, None])[:, 0])


def gates_per_expert(routing):
    """(N, E): each token's gate for every expert, 0 for the experts that it does not use."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.gates)


def choices_per_expert(routing):
    """(N, E): 1 where a token chose an expert, before capacity; else 0."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.chosen.to(routing.logits.dtype))


def mean_over_tokens(values, weight_N, dim=-2):
    """The mean along `dim`, whose tokens have weight 1 if they count, else 0 (… , N); None = all count.

    Bit for bit torch's mean where all count, 0 where none does, and never a synchronisation.
    """
    if weight_N is None:
        return values.mean(dim=dim)
    weight_N = weight_N.to(values.dtype)
    counted = weight_N.sum(dim=-1).clamp_min(1)
    scale = torch.full_like(counted, weight_N.size(-1)) / counted
    weight = weight_N if dim == -1 else weight_N[..., None]
    return (values * weight).mean(dim=dim) * (scale if dim == -1 else scale[..., None])
