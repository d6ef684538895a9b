"""A model run over a text: each character's loss and expert, the routers' inputs, and runs with other routers.

    seen = see(model, windows, machine)                   # seen.nats, seen.experts[layer], …
    with altered(model, {0: change}):                     # change(logits (B, T, E), ids (B, T)) -> logits (B, T, E)
        seen = see(model, windows, machine)

Always in eval mode, without gradients and without the global random streams. `windows`: from Dataset.windows; the N
characters are those with a next one to predict, x[y != IGNORED], in order. Layers are counted among the MoE layers; a
dense model's lists are empty.

Letters as in `moe.py`; here N counts characters, not the tokens of a batch.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import balance
from model import IGNORED
from routing import LEVELS, Router
from selection import choices_per_expert, main_expert
from support.seeds import mix_seeds


class Seen(NamedTuple):
    nats_N: np.ndarray  # (N,) float64: -ln p of the symbol that follows each character
    experts: list[np.ndarray]  # per MoE layer (N,) int64: the expert with the largest gate, -1 where none serves it
    first: list[np.ndarray]  # per MoE layer (N,) int64: the router's first choice, before capacity
    stats: list[balance.RoutingStats]  # per MoE layer, over these characters

    @property
    def nats(self):
        """Per character."""
        return float(self.nats_N.mean())


@torch.no_grad()
def see(model, windows, machine) -> Seen:
    model.eval()
    nats, experts, first, stats = [], [], [], None
    for x, y in windows:
        with machine.autocast():
            out = model(x, y)
        real = (y != IGNORED).reshape(-1)
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), y.reshape(-1), ignore_index=IGNORED, reduction="none")
        nats.append(loss[real].cpu())
        experts.append([main_expert(routing)[real].cpu() for routing in out.routing])
        first.append([first_choice(r, layer.router)[real].cpu() for r, layer in zip(out.routing, model.moe_layers())])
        stats = balance.add_stats(stats, out.stats)
    return Seen(
        nats_N=torch.cat(nats).double().numpy(),
        experts=[torch.cat(batches).numpy() for batches in zip(*experts)],
        first=[torch.cat(batches).numpy() for batches in zip(*first)],
        stats=stats,
    )


def first_choice(routing, router):
    """(tokens,): the expert that this router ranks first for each token, before capacity. Where choices come in expert
    order it is the most probable chosen one (soft routing) or the most probable of all (tokens do not choose)."""
    if routing.experts.size(1) < routing.logits.size(1) or router.config.router_top_p:
        return routing.experts[:, 0]
    if not router.tokens_choose:
        return routing.probs.argmax(dim=1)
    return routing.probs.masked_fill(choices_per_expert(routing) == 0, -1).argmax(dim=1)


def choices_by_symbol(ids_N, first_N, vocab_size, n_expert) -> np.ndarray:
    """(V, E): how often the expert is the symbol's first choice."""
    return np.bincount(ids_N * n_expert + first_N, minlength=vocab_size * n_expert).reshape(vocab_size, n_expert)


# ---------------------------------------------------------------------------------------------------------------------
# The routers' inputs


def random_routers(model, windows, machine, draws, seed) -> list[list[np.ndarray]]:
    """Per MoE layer, per draw, (N,) int64: the first choices of a new untrained linear router for the inputs of the
    layer's own router. A control: how much untrained routing knows of a text.

    Weights are normal with SD 0.02, from seed, layer and draw alone; the first choice does not depend on the SD.
    """
    weights = []
    for number, layer in enumerate(model.moe_layers()):
        E, D = layer.config.n_expert, layer.config.n_embd
        generators = [torch.Generator().manual_seed(mix_seeds(seed, number, draw)) for draw in range(draws)]
        weights.append([(torch.randn(E, D, generator=generator) * 0.02).to(machine.device) for generator in generators])
    labels = [[[] for _ in layer] for layer in weights]
    for inputs in router_inputs(model, windows, machine):
        for x_ND, layer_weights, layer_labels in zip(inputs, weights, labels):
            for weight, batches in zip(layer_weights, layer_labels):
                batches.append(F.linear(x_ND, weight).argmax(dim=1).cpu())
    return [[torch.cat(batches).numpy() for batches in layer] for layer in labels]


@torch.no_grad()
def router_inputs(model, windows, machine):
    """Yields, for each batch of windows, per MoE layer (characters of the batch, D) float32."""
    model.eval()
    inputs = []

    def note(layer, arguments):
        with torch.autocast(arguments[0].device.type, enabled=False):
            x_BTD, _, _, real_BT = arguments
            inputs.append(LEVELS[layer.config.router_level].pool(x_BTD.float(), layer.config, real_BT))

    for x, y in windows:
        hooks = [layer.register_forward_pre_hook(note) for layer in model.moe_layers()]
        try:
            with machine.autocast():
                model(x, y)
        finally:
            for hook in hooks:
                hook.remove()
        yield [layer_BTD[y != IGNORED] for layer_BTD in inputs]
        inputs.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Other routers


class Wrapper(Router):
    """A router around another one, `inner`, that ranks and chooses as it does. A subclass has the logits."""

    def __init__(self, inner):
        super().__init__(inner.config, inner.layer, None)
        self.inner, self.tokens_choose, self.needs_history = inner, inner.tokens_choose, inner.needs_history

    def preference(self, logits_NE):
        return self.inner.preference(logits_NE)

    def select(self, probs_NE, preference_NE, n_sequences):
        return self.inner.select(probs_NE, preference_NE, n_sequences)


class AlteredRouter(Wrapper):
    """The inner router with changed logits. An expert with logit -inf is not chosen. A token with all logits at -inf
    gets no expert and uniform probabilities, since a softmax over nothing would be NaN."""

    def __init__(self, inner, change):
        super().__init__(inner)
        self.change = change

    def forward(self, x_BTD, ids_BS):
        logits_BTE = self.change(self.inner(x_BTD, ids_BS), ids_BS[:, -x_BTD.size(1) :])
        self.excluded_NE = logits_BTE.flatten(0, 1) == -math.inf
        return logits_BTE.masked_fill((logits_BTE == -math.inf).all(dim=-1, keepdim=True), 0.0)

    def select(self, probs_NE, preference_NE, n_sequences):
        # A balancing bias ranks by scores instead of logits, and expert choice fills its places in any case.
        preference_NE = preference_NE.masked_fill(self.excluded_NE, -math.inf)
        experts_NK, chosen_NK = self.inner.select(probs_NE, preference_NE, n_sequences)
        return experts_NK, chosen_NK & ~self.excluded_NE.gather(1, experts_NK)


def altered(model, changes):
    """A context that changes the logits of some MoE layers: {layer: change(logits (B, T, E), ids (B, T)) ->
    logits (B, T, E)}. The model is restored at its end, also after an error."""
    return rerouted(model, {number: lambda layer, f=f: AlteredRouter(layer.router, f) for number, f in changes.items()})


@contextlib.contextmanager
def rerouted(model, makers):
    """A context that gives some MoE layers other routers: {layer: maker(MoE) -> Router}."""
    layers = model.moe_layers()
    routers = {number: layers[number].router for number in makers}
    try:
        for number, maker in makers.items():
            layers[number].router = maker(layers[number])
        yield model
    finally:
        for number, router in routers.items():
            layers[number].router = router
