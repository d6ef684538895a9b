"""The gradients of a trained model: what pulls its routers, and whether the tokens of an expert pull the same way.

    router_gradients(model, batches, machine)      cross-entropy against the balancing loss, per MoE layer
    conflicts(model, batches, machine, classes_V, class_names)      between the tokens of an MLP or expert, per block

`batches`: [(x, y)], (B, T) int64 each, of the training split. The model is measured in eval mode (no dropout, jitter or
masked experts), and left as it was: nothing is trained, no `.grad` written, no random stream of others read.

The gradient of token t is its own contribution, through this one application of the MLP or expert, to the gradient of
the summed cross-entropy of the batch: what it does to its own loss, and through attention to those of later tokens.
Added up over tokens (and over the layers that share a set of experts) they are the parameter's gradient. For a linear
layer W a it is δ aᵀ, with δ the gradient of the sum at the layer's output, so that  ⟨g_t, g_s⟩ = (a_t·a_s)(δ_t·δ_s):
the gradients themselves are never made. A bias is a weight of an input that is always 1, or the gate.

Letters as in `moe.py`; n tokens of a group, S sequences.
"""

import contextlib
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


def cosine(a, b):
    """Of two tensors of one shape, taken as vectors; None where one of them is 0."""
    a, b = (tensor.detach().cpu().double().flatten() for tensor in (a, b))
    norms = (a.norm() * b.norm()).item()
    return max(-1.0, min(1.0, (a @ b).item() / norms)) if norms else None


@contextlib.contextmanager
def measured(model):
    """In eval mode and with gradients, until the end; then each module in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---------------------------------------------------------------------------------------------------------------------
# Routers


def router_gradients(model, batches, machine, draws=200, seed=0):
    """A dict per MoE layer of how cross-entropy and the balancing loss pull its router's weight (E, D); None where a
    router has no weight that is trained (frozen, random, hash), or one of the two has no gradient (one expert; a switch
    loss that is constant, because every expert is always chosen equally often).

    The balancing loss is the model's own, over all layers, before its coefficient; `aux_loss=none` is measured by the
    switch loss, with a coefficient of 0. two_level: the weight of the experts, not that of the groups.

        block, loss     the block's index; switch or cv2
        n               batches in which both gradients are there
        cosines         of the two gradients, one a batch
        cosine, sd, low, high   their mean, sample SD and the 95% t interval of the mean (None from one batch)
        negative        the share of batches in which they point away from each other
        norm_cross_entropy, norm_balance    mean norms
        coefficient, ratio      coefficient · norm_balance / norm_cross_entropy: how much of the pull is balancing

    chance: each {mean, sd, low, high (95% quantiles), n values}, or None where there is nothing to draw from.
        features        of the mean cosine, with the balancing gradient's D columns in random order, the same one in all
                        batches. It keeps norms and what each expert gets, and says what two gradients give that have
                        no direction in common. Its mean is D · Σ_e (mean of row e of the one)(of the other) / norms:
                        near 0 behind a LayerNorm. It is too narrow for a claim of conflict: both gradients are sums
                        over the same tokens of (a number per expert) × (the router's input), so they share the mean
                        input's direction, and two that have nothing else in common lie outside it, on either side.
        experts         the same with the rows in random order: the shared inputs stay, and what is destroyed is which
                        expert each loss favours. This one bears on conflict. Its mean is 0 for a softmax, whose rows
                        add up to 0; of E! orders, with 2 experts it says nothing beyond the sign, which flips.
        other_batches   cosines of the cross-entropy's gradient in one batch and the balancing gradient in another. No
                        chance in the strict sense: what holds in every batch, a lasting conflict too, is still in it.
                        Where `cosine` differs from it, the tokens of the batch itself make the difference.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, moe.MoE)]
    weights = [getattr(layer.router, "weight", None) for layer in model.moe_layers()]
    trained = [i for i, weight in enumerate(weights) if weight is not None and weight.requires_grad]
    pulls = [[] for _ in weights]  # of each layer: [(gradient of the cross-entropy, of the balancing loss)]
    with measured(model):
        for x, y in batches if trained else ():
            with machine.autocast():
                out = model(x, y)
            balance = balancing_loss(out, model.config)
            of_layers = [weights[i] for i in trained]
            gradients = (
                torch.autograd.grad(loss, of_layers, retain_graph=True, materialize_grads=True)
                for loss in (out.loss, balance)
            )
            for i, ours, theirs in zip(trained, *gradients):
                if has_balance(out.routing[i:], model.config) and ours.any() and theirs.any():
                    pulls[i].append((ours.cpu().double(), theirs.cpu().double()))
    coefficient = model.aux_loss_coef.item() if model.config.balances else 0.0
    loss = {"none": "switch"}.get(model.config.aux_loss, model.config.aux_loss)
    return [
        {"block": block, "loss": loss, **compared(pairs, coefficient, draws, generator)} if pairs else None
        for block, pairs in zip(blocks, pulls)
    ]


def balancing_loss(out, config):
    """As the model's objective has it, before its coefficient; the switch loss where it has none."""
    if config.aux_loss != "none":
        return out.aux[config.aux_loss].raw
    layers = torch.stack([balance.switch_loss(routing) for routing in out.routing])
    return layers.sum() if config.aux_loss_reduction == "sum" else layers.mean()


def has_balance(routings, config):
    """Whether the balancing loss of these layers (one, and those after it) depends on their routers: a switch loss does
    not where all loads are equal, though rounding gives it a gradient."""
    loads = [choices_per_expert(routing).sum(dim=0) for routing in routings]
    return config.aux_loss == "cv2" or any((load_E != load_E[0]).any().item() for load_E in loads)


def compared(pairs, coefficient, draws, generator):
    """What router_gradients says of one layer. pairs: (gradient of the cross-entropy, of the balancing loss), (E, D)
    each, one pair a batch."""
    ours, theirs = (torch.stack(gradients) for gradients in zip(*pairs))
    norms = [gradients.flatten(1).norm(dim=1) for gradients in (ours, theirs)]
    ours, theirs = (gradients / norm[:, None, None] for gradients, norm in zip((ours, theirs), norms))
    across = ours.flatten(1) @ theirs.flatten(1).t()
    cosines = across.diagonal().clamp(-1, 1).tolist()
    n, E, D = ours.shape
    features, experts = ([torch.randperm(size, generator=generator) for _ in range(draws)] for size in (D, E))
    mean_norms = [norm.mean().item() for norm in norms]
    interval = interval_of_mean(cosines)
    return {
        "n": n,
        "cosines": cosines,
        "cosine": interval.mean,
        "sd": statistics.stdev(cosines) if n > 1 else None,
        "low": interval.low,
        "high": interval.high,
        "negative": sum(value < 0 for value in cosines) / n,
        "norm_cross_entropy": mean_norms[0],
        "norm_balance": mean_norms[1],
        "coefficient": coefficient,
        "ratio": coefficient * mean_norms[1] / mean_norms[0],
        "chance": {
            "features": spread([(ours * theirs[:, :, order]).sum().item() / n for order in features]),
            "experts": spread([(ours * theirs[:, order]).sum().item() / n for order in experts]),
            "other_batches": spread(across[~torch.eye(n, dtype=torch.bool)].tolist()),
        },
    }


def spread(values):
    """{mean, sd, low, high, n} with the 2.5% and 97.5% quantiles; None of fewer than 2 values."""
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

    x_ND: torch.Tensor  # what went into it
    slope_ND: torch.Tensor  # the gradient of the summed cross-entropy where its output is added to the others'
    gate_N: torch.Tensor  # 1 where nothing gates it
    sequence_N: torch.Tensor  # int64, counted over all batches
    class_N: torch.Tensor  # int64
    label_N: torch.Tensor  # int64


class Layer(NamedTuple):
    """A linear map in which token t's gradient is δ_t a_tᵀ."""

    a: torch.Tensor  # (n, in) its inputs
    delta: torch.Tensor  # (n, out) the gradient at its outputs


class Likeness(NamedTuple):
    """Of the gradients of one group's tokens."""

    group: dict  # as `conflicts` gives it
    without_S: torch.Tensor  # cosine_between_sequences when one sequence is left out; NaN where no pair is left
    size_S: torch.Tensor  # int64, tokens of each sequence
    classes: torch.Tensor  # (3, classes, classes): of pairs of different sequences the cosines' sum and how many they
    # are; each class's tokens on the diagonal


def conflicts(model, batches, machine, classes_V, class_names, limit=1024, draws=20, seed=0, labels=None):
    """A dict per block of how alike the gradients are that the tokens of its MLP, or of each of its experts, send to
    the weights (and biases) of that MLP or expert, both layers together.

    classes_V: each symbol's class, an index of class_names. limit: tokens of a group that are compared, drawn at random
    and evenly from the batches. labels: (N,) int64 of the tokens with a target, in order, or (blocks, N): another way
    to split up a dense MLP's tokens, as by class, by a hash or by the routing of another model.

        block, kind     dense or experts
        groups          one an expert, or one for a dense MLP with `expert` None
        shared          the same of the shared experts, that every token goes through; None where there are none
        mean            over the groups, each weighted by the tokens that it served: what a token meets on average
        classes         mean cosine between and within classes (pairs within an expert, pooled over experts; the current
                        token's class), None where a class has fewer than 20 tokens; a dense MLP's or the experts'
        labelled        dense, with labels: {cosine of pairs with one label, pairs, chance: the same of shuffled labels}

    A group, None where it has fewer than 2 tokens:
        expert, tokens  its index; the tokens with a target that it served (kept, with whatever gate)
        compared        how many of them are in the numbers below; those whose gradient is exactly 0 are not
        cosine          mean over pairs of tokens of the cosine of their gradients
        negative        the share of pairs whose gradients point away from each other: conflict
        signal          mean ⟨g_t, g_s⟩ over pairs / mean |g|²: the part of a gradient that survives averaging over very
                        many tokens, |E g|² / E |g|² estimated without bias. |mean g|² / mean |g|² is larger by about
                        1/n, so that an expert would beat a dense MLP only for having fewer tokens.
        cosine_between_sequences, error   the same over pairs of different sequences, which alone are nearly
                        independent; its standard error from leaving out one sequence at a time (jackknife; None from
                        fewer than 3). `classes` and `labelled` are of these pairs too.
        chance          {mean, sd} of `cosine` when the errors δ go to other tokens of the group, at random, in both
                        layers alike: what the inputs' likeness and the errors' likeness give by themselves. What
                        `cosine` has beyond it comes from tokens with like inputs that have like errors.

    Where training has converged on these tokens their gradients add up to about 0: `cosine` and `signal` are then near
    0 and about half of the pairs conflict, whatever the model. What can be read is how models differ at equal loss.

    Random groups of a dense MLP's tokens have its mean cosine, whatever their size, for it is a mean over pairs: the
    dense number is what the experts' is compared with, and it needs no null of its own. Between tokens of different
    experts there is no cosine: their gradients are of different parameters. The gradient that passes through a gate
    into the router is not an expert's, and auxiliary losses are left out. linear_sum has no groups: an expert is one
    matrix there, before a GELU and a second layer that all share, so its number would not be of the same thing.
    """
    generator = torch.Generator().manual_seed(seed)
    with measured(model):
        served, groups = collect(model, batches, machine, torch.as_tensor(classes_V), labels, limit, generator)
        n_sequences = sum(len(x) for x, _ in batches)
        found = []
        for i, block in enumerate(model.blocks):
            of_block, on_labels = {}, None
            for name, tokens in groups[i].items():
                layers, tokens = moving(layers_of(block.mlp, name, tokens), tokens)
                cosines = cosines_of(layers)
                of_block[name] = likeness(
                    name, served[i][name], layers, cosines, tokens, n_sequences, len(class_names), draws, generator
                )
                if name is None and labels is not None:
                    on_labels = labelled(cosines, tokens, draws, generator)
            shared = of_block.pop(SHARED, None)
            found.append(
                {
                    "block": i,
                    "kind": "experts" if isinstance(block.mlp, moe.MoE) else "dense",
                    "groups": [one.group for one in of_block.values()],
                    "shared": shared and shared.group,
                    "mean": mean_of(list(of_block.values())),
                    "classes": class_means(list(of_block.values())),
                    "labelled": on_labels,
                }
            )
    return found


def collect(model, batches, machine, classes_V, labels, limit, generator):
    """-> ([{group: how many tokens it served}], [{group: Tokens, about `limit` of them at most}]), one of each a
    block."""
    served, pieces = ([defaultdict(list) for _ in model.blocks] for _ in range(2))
    quota, n_sequences, n_tokens = max(1, limit // max(1, len(batches))), 0, 0
    for x, y in batches:
        is_counted = y.flatten() != IGNORED
        sequence_N = torch.arange(n_sequences, n_sequences + len(x), device=x.device).repeat_interleave(x.size(1))
        label_LN = x.new_zeros(len(model.blocks), x.numel())
        n_sequences, begin, n_tokens = n_sequences + len(x), n_tokens, n_tokens + int(is_counted.sum())
        if labels is not None:
            label_LN[:, is_counted] = torch.as_tensor(labels).to(x)[..., begin:n_tokens]
        about = sequence_N, classes_V.to(x.device)[x.flatten()]
        for i, (x_ND, slope_ND, routing) in enumerate(applications(model, x, y, machine)):
            for name, gate_N, is_served in groups_of(model.blocks[i].mlp, x_ND, routing):
                tokens = torch.where(is_served & is_counted)[0]
                drawn = tokens[torch.randperm(len(tokens), generator=generator)[:quota].to(x.device)]
                columns = x_ND, slope_ND, gate_N, *about, label_LN[i]
                served[i][name].append(len(tokens))
                pieces[i][name].append(Tokens(*(column[drawn] for column in columns)))
    counts = [{name: sum(of) for name, of in groups.items()} for groups in served]
    return counts, [
        {name: Tokens(*(torch.cat(column) for column in zip(*of))) for name, of in groups.items()} for groups in pieces
    ]


def applications(model, x, y, machine):
    """[(its input (N, D), the gradient of the summed cross-entropy at its output (N, D), Routing or None)], one a
    block's MLP."""
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
    """(name, gate (N,), whether it serves a token (N,)) of each expert, or of the dense MLP, whose name is None."""
    every, whole = torch.ones_like(x_ND[:, 0]), torch.ones_like(x_ND[:, 0], dtype=torch.bool)
    if routing is None:
        return [(None, every, whole)]
    groups = []
    if not isinstance(mlp.experts, moe.LinearSumExperts):
        gates_NE = gates_per_expert(routing).detach()
        kept_NE = torch.zeros_like(gates_NE, dtype=torch.bool).scatter(1, routing.experts, routing.kept)
        groups = list(zip(range(gates_NE.size(1)), gates_NE.t(), kept_NE.t()))
    return groups + ([(SHARED, every, whole)] if mlp.shared is not None else [])


def layers_of(mlp, name, tokens):
    """The two Layers of a group, from what went in and the gradient at what came out."""
    if name in (None, SHARED):
        dense = mlp.shared if name == SHARED else mlp
        fc, proj = dense.fc, dense.proj
        return two_layers(tokens, fc.weight, fc.bias, proj.weight.t(), proj.bias is not None, activate=F.gelu)
    experts, gate_N1 = mlp.experts, tokens.gate_N[:, None]
    bias_in = None if experts.bias_in is None else experts.bias_in[name]
    has_bias_out = "bias_out" in experts.per_expert and experts.bias_out is not None
    return two_layers(
        tokens,
        experts.w_in[name],
        bias_in,
        experts.w_out[name],
        has_bias_out,
        lambda up: hidden_units(up, gate_N1, experts.activate, experts.gate_after),
    )


def two_layers(tokens, w_in_HD, bias_in, w_out_HD, has_bias_out, activate):
    up_NH = F.linear(tokens.x_ND, w_in_HD, bias_in).detach().requires_grad_()
    hidden_NH = activate(up_NH)
    (delta_NH,) = torch.autograd.grad(hidden_NH, up_NH, tokens.slope_ND @ w_out_HD.detach().t())
    first, second = tokens.x_ND, hidden_NH.detach()
    if bias_in is not None:
        first = F.pad(first, (0, 1), value=1)
    if has_bias_out:
        second = torch.cat((second, tokens.gate_N[:, None]), dim=1)
    return [Layer(first, delta_NH), Layer(second, tokens.slope_ND)]


# ---------------------------------------------------------------------------------------------------------------------
# How alike their gradients are


def moving(layers, tokens):
    """Without the tokens whose gradient is 0, which has no direction."""
    moves = norms_of(layers) > 0
    return [Layer(*(column[moves] for column in layer)) for layer in layers], Tokens(*(c[moves] for c in tokens))


def norms_of(layers):
    """(n,): of each token's gradient of all these weights."""
    return sum((a.norm(dim=1) * delta.norm(dim=1)).square() for a, delta in layers).sqrt()


def cosines_of(layers):
    """(n, n): of the tokens' gradients of all these weights together."""
    norm_N1 = norms_of(layers)[:, None]
    return sum((a @ a.t()) * ((delta / norm_N1) @ (delta / norm_N1).t()) for a, delta in layers)


def likeness(name, served, layers, cosines_NN, tokens, n_sequences, n_classes, draws, generator) -> Likeness:
    n, norm_N = len(cosines_NN), norms_of(layers)
    is_between = tokens.sequence_N[:, None] != tokens.sequence_N
    between_NN = cosines_NN * is_between
    size_S = torch.bincount(tokens.sequence_N, minlength=n_sequences)
    of_S = cosines_NN.new_zeros(n_sequences).index_add(0, tokens.sequence_N, between_NN.sum(dim=1))
    pairs_S = size_S * (n - size_S)
    without_S = (of_S.sum() - 2 * of_S) / (pairs_S.sum() - 2 * pairs_S)  # both orders of each pair are in all of these
    classes = [summed(values, tokens.class_N, n_classes) for values in (between_NN, is_between.to(cosines_NN.dtype))]
    classes.append(torch.bincount(tokens.class_N, minlength=n_classes).to(cosines_NN.dtype).diag())
    group = None
    if n > 1:
        pairs = n * (n - 1)
        product = norm_N @ cosines_NN @ norm_N - norm_N.square().sum()
        group = {
            "expert": name if isinstance(name, int) else None,
            "tokens": served,
            "compared": n,
            "cosine": (cosines_NN.sum() - cosines_NN.trace()).item() / pairs,
            "negative": ((cosines_NN < 0).sum() - (cosines_NN.diagonal() < 0).sum()).item() / pairs,
            "signal": (product / pairs / norm_N.square().mean()).item(),
            "cosine_between_sequences": of_S.sum().item() / pairs_S.sum().item() if pairs_S.any() else None,
            "error": jackknife(without_S, size_S),
            "chance": chance(layers, draws, generator),
        }
    return Likeness(group, without_S, size_S, torch.stack(classes))


def summed(values_NN, class_N, n_classes):
    """(classes, classes): values added up by the classes of row and column."""
    rows = values_NN.new_zeros(n_classes, len(class_N)).index_add(0, class_N, values_NN)
    return values_NN.new_zeros(n_classes, n_classes).index_add(1, class_N, rows)


def jackknife(without_S, size_S):
    """The standard error of a mean from its values without one sequence each (Efron 1982); size_S: tokens of each."""
    values = without_S[size_S > 0]
    if len(values) < 3 or not values.isfinite().all():
        return None
    return ((len(values) - 1) * values.var(correction=0)).sqrt().item()


def chance(layers, draws, generator):
    """{mean, sd} of the mean cosine when the tokens' δ are in random order, the same one in both layers."""
    n, means = len(layers[0].a), []
    grams = [(a @ a.t(), delta @ delta.t()) for a, delta in layers]
    for _ in range(draws):
        order = torch.randperm(n, generator=generator).to(layers[0].a.device)
        product_NN = sum(a_NN * delta_NN[order][:, order] for a_NN, delta_NN in grams)
        scale_N = product_NN.diagonal().rsqrt()
        means.append(((scale_N @ product_NN @ scale_N).item() - n) / (n * (n - 1)))
    return {"mean": statistics.fmean(means), "sd": statistics.stdev(means)}


def mean_of(found):
    """The groups' numbers, each weighted by the tokens that it served, without those that have no such number; None
    without a group of 2 tokens."""
    found = [one for one in found if one.group]
    if not found:
        return None
    served = [one.group["tokens"] for one in found]

    def mean(values):
        pairs = [(weight, value) for weight, value in zip(served, values) if value is not None]
        return sum(w * value for w, value in pairs) / sum(w for w, _ in pairs) if pairs else None

    names = ("cosine", "negative", "signal", "cosine_between_sequences")
    numbers = {name: mean([one.group[name] for one in found]) for name in names}
    chances = [one.group["chance"] for one in found]
    sd = math.hypot(*(w * of["sd"] for w, of in zip(served, chances))) / sum(served)  # each has its own draws
    return {
        "tokens": sum(served),
        **numbers,
        "error": jackknife(mean([one.without_S for one in found]), sum(one.size_S for one in found)),
        "chance": {"mean": mean([of["mean"] for of in chances]), "sd": sd},
    }


def class_means(found):
    """The classes' matrix as nested lists, from the sums of all groups; None where there are no groups."""
    if not found:
        return None
    sums, pairs, tokens = torch.stack([one.classes for one in found]).sum(dim=0)
    enough = tokens.diagonal() >= FEWEST_TOKENS
    shown = (enough[:, None] & enough & (pairs > 0)).tolist()
    means = (sums / pairs).tolist()
    return [[value if there else None for value, there in zip(*row)] for row in zip(means, shown)]


def labelled(cosines_NN, tokens, draws, generator):
    """What `conflicts` says of the labels of a dense MLP's tokens; None where no pair shares one."""
    is_between = tokens.sequence_N[:, None] != tokens.sequence_N

    def alike(label_N):
        same = (label_N[:, None] == label_N) & is_between
        pairs = int(same.sum())
        return (cosines_NN * same).sum().item() / pairs if pairs else None, pairs // 2

    cosine, pairs = alike(tokens.label_N)
    orders = [torch.randperm(len(cosines_NN), generator=generator).to(cosines_NN.device) for _ in range(draws)]
    shuffled = [value for value, _ in (alike(tokens.label_N[order]) for order in orders) if value is not None]
    return {"cosine": cosine, "pairs": pairs, "chance": spread(shuffled)} if pairs else None
