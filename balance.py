"""How evenly experts are used: auxiliary losses, which training minimises, and statistics, which people read.

    aux_losses(routings, config, coefficient)      {name: AuxLoss} over the layers of one forward pass
    stats_of_layers(routings, idx, config, V)      a RoutingStats per layer, left on the device
    summarize(stats)                               its numbers

For balancing without a loss see `MoE.update_bias` in `moe.py`. Letters as in `moe.py`; L layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from selection import Routing, choices_per_expert, gates_per_expert, mean_over_tokens


class AuxLoss(NamedTuple):
    """An auxiliary loss over all layers, without (`raw`) and with (`weighted`) its coefficient; 0-d float32."""

    raw: torch.Tensor
    weighted: torch.Tensor


class RoutingStats(NamedTuple):
    """Sums over the tokens of one layer, left on the device: `add_stats` over calls, `summarize` once. Without a
    capacity the counts by position and by symbol are empty."""

    load: torch.Tensor  # (E,) choices per expert, before capacity
    importance: torch.Tensor  # (E,) sum of the gates of kept choices
    dropped: torch.Tensor  # () choices dropped for lack of room
    unserved: torch.Tensor  # () tokens without an expert
    tokens: torch.Tensor  # ()
    entropy: torch.Tensor  # () entropy of the router's distribution, nats
    dropped_by_position: torch.Tensor  # (2, T) of block_size positions: choices dropped, choices made
    dropped_by_symbol: torch.Tensor  # (2, V) the same by the token's symbol


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary losses: routing -> float32 before the coefficient, 0-d for one layer, (L,) for L stacked layers.
# batch_mean(value) turns this process's mean into the global one; weight_N: 1 for tokens that count, else 0; None = all
# count.


def own_mean(value):
    """The batch_mean of a single process."""
    return value


def switch_loss(routing, batch_mean=own_mean, weight_N=None):
    """E · Σ_i f_i P_i (Fedus et al. 2022, eq. 4): f_i is expert i's share of the choices before capacity, P_i its mean
    probability. 1 under uniform routing, at most E."""
    load_E = batch_mean(mean_over_tokens(choices_per_expert(routing), weight_N))
    probs_E = batch_mean(mean_over_tokens(routing.probs, weight_N))
    share_E = load_E / load_E.sum(dim=-1, keepdim=True)
    return load_E.size(-1) * (share_E * probs_E).sum(dim=-1)


def cv2_loss(routing, batch_mean=own_mean, weight_N=None):
    """Var / mean² over experts of their importance, the sum of their gates (Shazeer et al. 2017, eq. 7). The paper's
    second term, for load, needs noisy gates: here it is a statistic (load_cv2)."""
    gates_NE = gates_per_expert(routing)
    importance_E = batch_mean((gates_NE if weight_N is None else gates_NE * weight_N[:, None]).sum(dim=-2))
    return importance_E.var(dim=-1, correction=0) / importance_E.mean(dim=-1).square().clamp_min(1e-10)


def entropy_loss(routing, batch_mean=own_mean, weight_N=None):
    """log E - H(P), where P is the mean over tokens of softmax(logits) and H its entropy in nats. 0 if P is even, log E
    if all tokens agree on one expert. Csordás et al. 2023 (section 5) minimise -H(P), which has the same gradient."""
    probs_NE = F.softmax(routing.logits.movedim(-1, 0), dim=0).movedim(0, -1)
    mean_E = batch_mean(mean_over_tokens(probs_NE, weight_N))
    # The gradient of p log p would be infinite where p underflows to 0.
    negative_entropy = (mean_E * mean_E.clamp_min(torch.finfo(mean_E.dtype).tiny).log()).sum(dim=-1)
    return math.log(mean_E.size(-1)) + negative_entropy


def z_loss(routing, batch_mean=own_mean, weight_N=None):
    """mean over tokens of logsumexp(logits)² (Zoph et al. 2022, eq. 5): keeps router logits small."""
    return mean_over_tokens(torch.logsumexp(routing.logits.movedim(-1, 0), dim=0).square(), weight_N, dim=-1)


AUX_LOSSES: dict[str, Callable | None] = {
    "switch": switch_loss,
    "cv2": cv2_loss,
    "entropy": entropy_loss,
    "none": None,
}


def aux_losses(routings, config, coefficient, batch_mean=own_mean, weight_N=None):
    """{name: AuxLoss} over the layers of one forward pass. A loss with coefficient 0 is still measured.

    coefficient: current weight of the balancing loss, a 0-d tensor.
    """
    if not routings:
        return {}
    functions, groups = {"z": z_loss}, stacked_by_shape(routings)
    if balancing := AUX_LOSSES[config.aux_loss]:
        functions[config.aux_loss] = balancing
    over_layers = torch.sum if config.aux_loss_reduction == "sum" else torch.mean
    losses = {
        name: over_layers(torch.cat([function(layers, batch_mean, weight_N) for _, layers in groups]))
        for name, function in functions.items()
    }
    return with_coefficients(losses, config, coefficient, losses["z"].new_zeros(()))


def with_coefficients(losses, config, coefficient, zero):
    """{name: AuxLoss} from the losses over all layers, 0-d; zero: `weighted` of a loss that is only measured."""
    terms = {}
    for name, raw in losses.items():
        weight = config.z_loss_coef if name == "z" else coefficient if config.balances else 0
        is_weighted = isinstance(weight, torch.Tensor) or weight > 0
        terms[name] = AuxLoss(raw, weight * raw if is_weighted else zero)
    return terms


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def stacked_by_shape(routings):
    """[(numbers of L layers, their Routing with a first dimension L)]: layers of one shape are computed together, which
    saves many small operations."""
    by_shape = {}
    for number, routing in enumerate(routings):
        by_shape.setdefault((routing.logits.shape, routing.experts.shape, routing.room), []).append(number)
    groups = []
    for (*_, room), numbers in by_shape.items():
        *fields, _ = zip(*(routings[number] for number in numbers))
        groups.append((numbers, Routing(*(torch.stack(field) for field in fields), room)))
    return groups


@torch.no_grad()
def stats_of_layers(routings, *arguments):
    """`routing_stats` of each layer."""
    stats = [None] * len(routings)
    for numbers, layers in stacked_by_shape(routings):
        for number, fields in zip(numbers, zip(*routing_stats(layers, *arguments))):
            stats[number] = RoutingStats(*fields)
    return stats


@torch.no_grad()
def routing_stats(routing, ids_BT, config, n_symbols, weight_N=None):
    """RoutingStats of one layer, or of L stacked ones, without a synchronisation. weight_N: 1 for tokens that count,
    else 0; None = all count."""
    weight_N = torch.ones_like(routing.logits[..., 0]) if weight_N is None else weight_N
    layers = routing.logits.shape[:-2]
    dropped = unserved = weight_N.new_zeros(layers)
    by_position = by_symbol = weight_N.new_empty(*layers, 2, 0)
    if config.capacity_factor:
        made_N = routing.chosen.sum(dim=-1) * weight_N
        dropped_N = (routing.chosen & ~routing.kept).sum(dim=-1) * weight_N
        dropped, unserved = dropped_N.sum(dim=-1), (~routing.kept.any(dim=-1) * weight_N).sum(dim=-1)
        counts_2N = torch.stack((dropped_N, made_N), dim=-2)
        by_position = counts_2N.unflatten(-1, ids_BT.shape).sum(dim=-2)
        by_position = F.pad(by_position, (0, config.block_size - ids_BT.size(1)))
        by_symbol = weight_N.new_zeros(*layers, 2, n_symbols).index_add(-1, ids_BT.reshape(-1), counts_2N)
    return RoutingStats(
        load=(weight_N[..., None] * choices_per_expert(routing)).sum(dim=-2),
        importance=(weight_N[..., None] * gates_per_expert(routing)).sum(dim=-2),
        dropped=dropped,
        unserved=unserved,
        tokens=weight_N.sum(dim=-1).expand(layers),
        entropy=(weight_N * torch.special.entr(routing.probs).sum(dim=-1)).sum(dim=-1),
        dropped_by_position=by_position,
        dropped_by_symbol=by_symbol,
    )


def add_stats(total, stats):
    """Sums of two lists of per-layer RoutingStats; total may be None."""
    if total is None:
        return stats
    return [RoutingStats(*(a + b for a, b in zip(one, other))) for one, other in zip(total, stats)]


def summarize(stats, in_detail=False):
    """RoutingStats -> numbers. Waits for the device. ValueError where no token was routed.

    load: each expert's share of the choices; load_cv2, importance_cv2: variance / mean² over experts; dead: experts
    without a choice; drop_rate: share of the choices; unserved: share of the tokens without an expert; entropy: nats
    per token; choices, gate_mass: per token; tokens. In detail, under a capacity: drop_rate_by_position and _by_symbol,
    null where no choice was made.
    """
    load, importance = stats.load.tolist(), stats.importance.tolist()
    choices, tokens = sum(load), stats.tokens.item()
    if not choices:
        raise ValueError("no token was routed: there is nothing to summarize")
    summary = {
        "load": [count / choices for count in load],
        "load_cv2": cv2(load),
        "importance_cv2": cv2(importance),
        "dead": sum(count == 0 for count in load),
        "drop_rate": stats.dropped.item() / choices,
        "unserved": stats.unserved.item() / tokens,
        "entropy": stats.entropy.item() / tokens,
        "choices": choices / tokens,
        "gate_mass": sum(importance) / tokens,
        "tokens": int(tokens),
    }
    for name, counts in {"position": stats.dropped_by_position, "symbol": stats.dropped_by_symbol}.items():
        if in_detail and counts.numel():
            summary[f"drop_rate_by_{name}"] = [d / made if made else None for d, made in zip(*counts.tolist())]
    return summary


def cv2(values):
    """Squared coefficient of variation: variance / mean², 0 when all are equal."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2 if mean else 0.0
