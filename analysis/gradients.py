"""Gradients of a trained model: what moves its routers, and whether tokens of one expert agree.

    router_gradients(model, batches, machine)      cross-entropy against the balancing loss, for each MoE layer
    conflicts(model, batches, machine, classes_V, n_classes)      between tokens of an MLP or expert, for each block

`batches`: [(x, y)], (B, T) int64 each, of the training split. The model is measured in eval mode: no dropout, jitter or
masked experts. Nothing is trained, no `.grad` is written, no random stream of others is read.

A token's gradient is its own contribution to the gradient of the batch's summed cross-entropy, through this one
application of the MLP or expert. It acts on the token's own loss, and through attention on those of later tokens.
Summed over tokens (and over layers that share a set of experts) it is the parameter's gradient. For a linear layer W a
it is δ aᵀ, with δ the gradient of the sum at the layer's output, so  ⟨g_t, g_s⟩ = (a_t·a_s)(δ_t·δ_s)  and the gradients
themselves are never computed. A bias is a weight whose input is always 1, or the gate.

Letters as in `moe.py`; n tokens of a group, S sequences.
"""

import math
import statistics
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import balance
import moe
from backends import hidden_units
from model import IGNORED
from selection import choices_per_expert, gates_per_expert
from support.intervals import interval_of_mean

FEWEST_TOKENS = 20  # of a class, for a mean over its pairs


# ---------------------------------------------------------------------------------------------------------------------
# Routers


@torch.enable_grad()
def router_gradients(model, batches, machine, draws=200, seed=0):
    """How cross-entropy and the balancing loss pull each MoE layer's router weight (E, D): one dict for each layer.

    None for a router without a trained weight, and where one of the losses has no gradient: with one expert, or a
    switch loss that is constant because all experts are always chosen equally often. The balancing loss is the model's
    own over all layers, before its coefficient; for `aux_loss=none` the switch loss, with a coefficient of 0. With
    groups of experts, the weight is that of the experts.

        block, loss     the block's index; switch, cv2 or entropy
        n               batches in which both gradients exist
        cosines         of the two gradients, one for each batch
        cosine, low, high       their mean and its 95% t interval (None from one batch)
        norm_cross_entropy, norm_balance    mean norms
        coefficient, ratio      ratio = coefficient · norm_balance / norm_cross_entropy: the pull of balancing

    chance: two controls, each {mean, sd, low, high (95% quantiles), n values}, or None without values.
        features        the mean cosine with the D columns of the balancing gradient in random order, the same order in
                        all batches. Too narrow for a claim of conflict: both gradients share the direction of the mean
                        input, and so lie outside this interval even where they have nothing else in common.
        experts         the same with the rows in random order: shared inputs stay, and which expert each loss favours
                        is lost. This is the control for conflict. There are E! orders, so with 2 experts it shows only
                        the sign, which flips.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    blocks = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, moe.MoE)]
    weights = [getattr(layer.router, "weight", None) for layer in model.moe_layers()]
    trained = [i for i, weight in enumerate(weights) if weight is not None and weight.requires_grad]
    pulls = [[] for _ in weights]  # of each layer: [(gradient of the cross-entropy, of the balancing loss)]
    for x, y in batches if trained else ():
        with machine.autocast():
            out = model(x, y)
        of_layers = [weights[i] for i in trained]
        gradients = (
            torch.autograd.grad(loss, of_layers, retain_graph=True, materialize_grads=True)
            for loss in (out.loss, balancing_loss(out, model.config))
        )
        for i, ours, theirs in zip(trained, *gradients):
            if has_balance(out.routing[i:], model.config) and ours.any() and theirs.any():
                pulls[i].append((ours.cpu().double(), theirs.cpu().double()))
    coefficient = model.aux_loss_coef.item() if model.config.balances else 0.0
    loss = {"none": "switch"}.get(model.config.aux_loss, model.config.aux_loss)
    return [
        {"block": block, "loss": loss, **compare_pulls(pairs, coefficient, draws, generator)} if pairs else None
        for block, pairs in zip(blocks, pulls)
    ]


def balancing_loss(out, config):
    """The balancing loss of the model's objective before its coefficient; the switch loss where it has none."""
    if config.aux_loss != "none":
        return out.aux[config.aux_loss].raw
    layers = torch.stack([balance.switch_loss(routing) for routing in out.routing])
    return layers.sum() if config.aux_loss_reduction == "sum" else layers.mean()


def has_balance(routings, config):
    """Whether the balancing loss of these layers depends on their routers.

    A switch loss does not where all loads are equal, though rounding gives it a gradient. routings: of one layer and
    those after it.
    """
    loads = [choices_per_expert(routing).sum(dim=0) for routing in routings]
    return config.aux_loss in ("cv2", "entropy") or any((load_E != load_E[0]).any().item() for load_E in loads)


def compare_pulls(pairs, coefficient, draws, generator):
    """The entry of one layer in router_gradients.

    pairs: (gradient of cross-entropy, gradient of the balancing loss), (E, D) each, one pair for each batch.
    """
    ours, theirs = (torch.stack(gradients) for gradients in zip(*pairs))
    norms = [gradients.flatten(1).norm(dim=1) for gradients in (ours, theirs)]
    ours, theirs = (gradients / norm[:, None, None] for gradients, norm in zip((ours, theirs), norms))
    cosines = (ours * theirs).sum(dim=(1, 2)).clamp(-1, 1).tolist()
    n, E, D = ours.shape
    features, experts = ([torch.randperm(size, generator=generator) for _ in range(draws)] for size in (D, E))
    mean_norms = [norm.mean().item() for norm in norms]
    interval = interval_of_mean(cosines)
    return {
        "n": n,
        "cosines": cosines,
        "cosine": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "norm_cross_entropy": mean_norms[0],
        "norm_balance": mean_norms[1],
        "coefficient": coefficient,
        "ratio": coefficient * mean_norms[1] / mean_norms[0],
        "chance": {
            "features": distribution([(ours * theirs[:, :, order]).sum().item() / n for order in features]),
            "experts": distribution([(ours * theirs[:, order]).sum().item() / n for order in experts]),
        },
    }


def distribution(values):
    """{mean, sd, low, high, n}, low and high the 2.5% and 97.5% quantiles; None for fewer than 2 values."""
    if len(values) < 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "low": low,
        "high": high,
        "n": len(values),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tokens of an expert


class Tokens(NamedTuple):
    """n tokens that one MLP or expert served."""

    x_ND: torch.Tensor  # inputs
    slope_ND: torch.Tensor  # the gradient of the summed cross-entropy where its output is added to the others'
    gate_N: torch.Tensor  # 1 where nothing gates it
    sequence_N: torch.Tensor  # int64, counted over all batches
    class_N: torch.Tensor  # int64


class Layer(NamedTuple):
    """A linear layer, in which token t's gradient is δ_t a_tᵀ."""

    a: torch.Tensor  # (n, in) its inputs
    delta: torch.Tensor  # (n, out) the gradient at its outputs


class Similarity(NamedTuple):
    """How similar the gradients of one group's tokens are."""

    group: dict | None  # its entry in `conflicts`
    without_S: torch.Tensor  # cosine_between_sequences when one sequence is left out; NaN where no pair is left
    size_S: torch.Tensor  # int64, tokens of each sequence
    # (3, classes, classes): sum and number of cosines between sequences; tokens of a class, on the diagonal
    classes: torch.Tensor


@torch.enable_grad()
def conflicts(model, batches, machine, classes_V, n_classes, limit=1024, draws=20, seed=0):
    """How similar the gradients are that the tokens of an MLP, or of an expert, send to its weights.

    One dict for each block; weights and biases of both layers together.

    classes_V: each symbol's class, below n_classes. limit: tokens of a group that are compared, drawn at random and
    evenly from the batches.

        block, kind     dense or experts
        groups          one for each expert, or one for a dense MLP with `expert` None
        shared          the same for the shared experts, which every token goes through; None without any
        mean            over the groups, weighted by the tokens that each served: what a token meets on average
        classes         mean cosine between and within classes of the current token (pairs within an expert, pooled over
                        experts); None where a class has fewer than 20 tokens

    A group, or None where it has fewer than 2 tokens:
        expert, tokens  its index; the tokens with a target that it served (kept, with whatever gate)
        compared        how many of them are in the numbers below; tokens whose gradient is exactly 0 are not
        cosine          mean over pairs of tokens of the cosine of their gradients
        cosine_between_sequences, error   the same over pairs of different sequences, which alone are nearly
                        independent; its standard error by leaving out one sequence at a time (jackknife; None from
                        fewer than 3). `classes` uses these pairs too.
        chance          {mean, sd} of `cosine` when the errors δ go to other tokens of the group at random, in both
                        layers alike: the part due to similar inputs, and similar errors, by themselves. The rest of
                        `cosine` comes from tokens with similar inputs that have similar errors.

    After convergence on these tokens their gradients add up to about 0: `cosine` is then near 0, in any model. Compare
    models at equal loss.

    The experts' cosine is compared with the dense MLP's. That needs no null of its own, for a random group of a dense
    MLP's tokens has its mean cosine, whatever the group's size. Tokens of different experts have no cosine: their
    gradients are of different parameters. The gradient through a gate into the router is not an expert's, and auxiliary
    losses are left out. linear_sum has no groups: there an expert is one matrix before a GELU and a second layer that
    all share, so its number would not be comparable.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    served, groups = collect_tokens(model, batches, machine, torch.as_tensor(classes_V), limit, generator)
    n_sequences, found = sum(len(x) for x, _ in batches), []
    for i, block in enumerate(model.blocks):
        of_block = {}
        for name, tokens in groups[i].items():
            layers, tokens = without_zero_gradients(linear_layers(block.mlp, name, tokens), tokens)
            of_block[name] = similarity(name, served[i][name], layers, tokens, n_sequences, n_classes, draws, generator)
        shared, of_groups = of_block.pop(SHARED, None), list(of_block.values())
        found.append(
            {
                "block": i,
                "kind": "experts" if isinstance(block.mlp, moe.MoE) else "dense",
                "groups": [one.group for one in of_groups],
                "shared": shared and shared.group,
                "mean": weighted_mean(of_groups),
                "classes": class_means(of_groups),
            }
        )
    return found


def collect_tokens(model, batches, machine, classes_V, limit, generator):
    """Two lists over blocks: [{group: number of tokens served}], [{group: Tokens, about `limit` at most}]."""
    served, pieces = [defaultdict(int) for _ in model.blocks], [defaultdict(list) for _ in model.blocks]
    quota, n_sequences = max(1, limit // max(1, len(batches))), 0
    for x, y in batches:
        is_counted = y.flatten() != IGNORED
        sequence_N = torch.arange(n_sequences, n_sequences + len(x), device=x.device).repeat_interleave(x.size(1))
        class_N = classes_V.to(x.device)[x.flatten()]
        n_sequences += len(x)
        for i, (x_ND, slope_ND, routing) in enumerate(applications(model, x, y, machine)):
            for name, gate_N, is_served in groups_of(model.blocks[i].mlp, x_ND, routing):
                tokens = torch.where(is_served & is_counted)[0]
                drawn = tokens[torch.randperm(len(tokens), generator=generator)[:quota].to(x.device)]
                served[i][name] += len(tokens)
                columns = x_ND, slope_ND, gate_N, sequence_N, class_N
                pieces[i][name].append(Tokens(*(column[drawn] for column in columns)))
    return served, [{name: Tokens(*map(torch.cat, zip(*of))) for name, of in groups.items()} for groups in pieces]


def applications(model, x, y, machine):
    """[(input (N, D), gradient of the summed cross-entropy at the output (N, D), Routing or None)] of all MLPs."""
    seen = []

    def see(module, inputs, output):
        y_BTD, routing = output if isinstance(module, moe.MoE) else (output, None)
        seen.append((inputs[0].detach(), y_BTD, routing))

    hooks = [block.mlp.register_forward_hook(see) for block in model.blocks]
    try:
        with machine.autocast():
            loss = model(x, y).loss * (y != IGNORED).sum()
    finally:
        for hook in hooks:
            hook.remove()
    slopes = torch.autograd.grad(loss, [y_BTD for _, y_BTD, _ in seen])
    dtype = torch.promote_types(loss.dtype, torch.float32)
    return [
        (x_BTD.flatten(0, 1).to(dtype), slope_BTD.flatten(0, 1).to(dtype), routing)
        for (x_BTD, _, routing), slope_BTD in zip(seen, slopes)
    ]


SHARED = "shared"


def groups_of(mlp, x_ND, routing):
    """[(name, gate (N,), whether it serves a token (N,))] of each expert, or of the dense MLP, whose name is None."""
    every, whole = torch.ones_like(x_ND[:, 0]), torch.ones_like(x_ND[:, 0], dtype=torch.bool)
    if routing is None:
        return [(None, every, whole)]
    groups = []
    if not isinstance(mlp.experts, moe.LinearSumExperts):
        gates_NE = gates_per_expert(routing).detach()
        kept_NE = torch.zeros_like(gates_NE, dtype=torch.bool).scatter(1, routing.experts, routing.kept)
        groups = list(zip(range(gates_NE.size(1)), gates_NE.t(), kept_NE.t()))
    return groups + ([(SHARED, every, whole)] if mlp.shared is not None else [])


def linear_layers(mlp, name, tokens):
    """The two Layers of a group, from its inputs and the gradient at its outputs."""
    gate_N1 = tokens.gate_N[:, None]
    if name in (None, SHARED):
        dense, activate = (mlp.shared if name == SHARED else mlp), F.gelu
        w_in_HD, bias_in, w_out_HD = dense.fc.weight, dense.fc.bias, dense.proj.weight.t()
        has_bias_out = dense.proj.bias is not None
    else:
        experts = mlp.experts
        w_in_HD, w_out_HD = experts.w_in[name], experts.w_out[name]
        bias_in = None if experts.bias_in is None else experts.bias_in[name]
        has_bias_out = "bias_out" in experts.per_expert and experts.bias_out is not None

        def activate(up_NH):
            return hidden_units(up_NH, gate_N1, experts.activate, experts.gate_after)

    up_NH = F.linear(tokens.x_ND, w_in_HD, bias_in).detach().requires_grad_()
    hidden_NH = activate(up_NH)
    (delta_NH,) = torch.autograd.grad(hidden_NH, up_NH, tokens.slope_ND @ w_out_HD.detach().t())
    first, second = tokens.x_ND, hidden_NH.detach()
    if bias_in is not None:
        first = F.pad(first, (0, 1), value=1)
    if has_bias_out:
        second = torch.cat((second, gate_N1), dim=1)
    return [Layer(first, delta_NH), Layer(second, tokens.slope_ND)]


# ---------------------------------------------------------------------------------------------------------------------
# Similarity of their gradients


def without_zero_gradients(layers, tokens):
    """The layers and tokens without those tokens whose gradient is 0 and has no direction."""
    moves = norms_of(layers) > 0
    return [Layer(*(column[moves] for column in layer)) for layer in layers], Tokens(*(c[moves] for c in tokens))


def norms_of(layers):
    """(n,): the norm of each token's gradient of all these weights."""
    return sum((a.norm(dim=1) * delta.norm(dim=1)).square() for a, delta in layers).sqrt()


def cosines_of(layers):
    """(n, n): cosines of the tokens' gradients of all these weights together."""
    norm_N1 = norms_of(layers)[:, None]
    return sum((a @ a.t()) * ((delta / norm_N1) @ (delta / norm_N1).t()) for a, delta in layers)


def similarity(name, served, layers, tokens, n_sequences, n_classes, draws, generator) -> Similarity:
    cosines_NN = cosines_of(layers)
    n = len(cosines_NN)
    is_between = tokens.sequence_N[:, None] != tokens.sequence_N
    between_NN = cosines_NN * is_between
    size_S = torch.bincount(tokens.sequence_N, minlength=n_sequences)
    of_S = cosines_NN.new_zeros(n_sequences).index_add(0, tokens.sequence_N, between_NN.sum(dim=1))
    pairs_S = size_S * (n - size_S)
    without_S = (of_S.sum() - 2 * of_S) / (pairs_S.sum() - 2 * pairs_S)  # both orders of each pair are in all of these
    classes = [
        sum_by_class(values, tokens.class_N, n_classes) for values in (between_NN, is_between.to(cosines_NN.dtype))
    ]
    classes.append(torch.bincount(tokens.class_N, minlength=n_classes).to(cosines_NN.dtype).diag())
    group = None
    if n > 1:
        group = {
            "expert": name if isinstance(name, int) else None,
            "tokens": served,
            "compared": n,
            "cosine": (cosines_NN.sum() - cosines_NN.trace()).item() / (n * (n - 1)),
            "cosine_between_sequences": of_S.sum().item() / pairs_S.sum().item() if pairs_S.any() else None,
            "error": jackknife(without_S, size_S),
            "chance": chance_cosine(layers, draws, generator),
        }
    return Similarity(group, without_S, size_S, torch.stack(classes))


def sum_by_class(values_NN, class_N, n_classes):
    """(classes, classes): sums of values by the classes of row and column."""
    rows = values_NN.new_zeros(n_classes, len(class_N)).index_add(0, class_N, values_NN)
    return values_NN.new_zeros(n_classes, n_classes).index_add(1, class_N, rows)


def jackknife(without_S, size_S):
    """The standard error of a mean from its values without one sequence each (Efron 1982); size_S: tokens of each."""
    values = without_S[size_S > 0]
    if len(values) < 3 or not values.isfinite().all():
        return None
    return ((len(values) - 1) * values.var(correction=0)).sqrt().item()


def chance_cosine(layers, draws, generator):
    """{mean, sd} of the mean cosine with the tokens' δ in random order, the same order in both layers."""
    n, means = len(layers[0].a), []
    grams = [(a @ a.t(), delta @ delta.t()) for a, delta in layers]
    for _ in range(draws):
        order = torch.randperm(n, generator=generator).to(layers[0].a.device)
        product_NN = sum(a_NN * delta_NN[order][:, order] for a_NN, delta_NN in grams)
        scale_N = product_NN.diagonal().rsqrt()
        means.append(((scale_N @ product_NN @ scale_N).item() - n) / (n * (n - 1)))
    return {"mean": statistics.fmean(means), "sd": statistics.stdev(means)}


def weighted_mean(found):
    """The groups' mean numbers, weighted by the tokens that each served; None without a group of 2 tokens.

    A group that lacks a number is left out of its mean.
    """
    found = [one for one in found if one.group]
    if not found:
        return None
    served = [one.group["tokens"] for one in found]

    def mean(values):
        pairs = [(weight, value) for weight, value in zip(served, values) if value is not None]
        return sum(w * value for w, value in pairs) / sum(w for w, _ in pairs) if pairs else None

    chances = [one.group["chance"] for one in found]
    sd = math.hypot(*(w * of["sd"] for w, of in zip(served, chances))) / sum(served)  # each has its own draws
    return {
        "tokens": sum(served),
        **{name: mean([one.group[name] for one in found]) for name in ("cosine", "cosine_between_sequences")},
        "error": jackknife(mean([one.without_S for one in found]), sum(one.size_S for one in found)),
        "chance": {"mean": mean([of["mean"] for of in chances]), "sd": sd},
    }


def class_means(found):
    """The matrix of mean cosines between classes as nested lists, pooled over groups; None without groups."""
    if not found:
        return None
    sums, pairs, tokens = torch.stack([one.classes for one in found]).sum(dim=0)
    enough = tokens.diagonal() >= FEWEST_TOKENS
    shown = (enough[:, None] & enough & (pairs > 0)).tolist()
    means = (sums / pairs).tolist()
    return [[value if there else None for value, there in zip(*row)] for row in zip(means, shown)]
