"""Routers, levels and selection by hand: what each of them is, beside the promises of all of them in test_moe.py."""

import itertools
import math

import pytest
import torch
from conftest import tiny

import moe
import routing
from hashing import HASH_TABLES
from run.settings import Config

SYMBOLS = 7


def router_of(name, layer=0, counts=None, **keys):
    keys = {"n_expert": 4, "router": name, "aux_loss": "none", "n_embd": 8, **keys}
    counts = torch.ones(SYMBOLS) if counts is None else torch.tensor(counts)
    router = routing.ROUTERS[name](tiny(**keys), layer, counts)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def layer_of(**keys):
    layer = moe.MoE(tiny(**{"n_expert": 4, **keys}), 0, torch.ones(SYMBOLS))
    layer.init_weights(0.5, 0.5)
    return layer.eval()


def route(layer, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, layer.config.n_embd, generator=generator)
    return layer.route(x, torch.randint(SYMBOLS, shape, generator=generator))


# ---------------------------------------------------------------------------------------------------------------------
# Routers


def test_frozen_router_is_saved_but_not_trained():
    layer = layer_of(router="frozen", aux_loss="none")
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["router.weight"]
    assert "router.weight" in layer.state_dict()


def test_random_router_is_a_pure_function_of_seed_layer_and_step():
    one, other = router_of("random"), router_of("random")
    drawn = {}
    for step in (3, 4, 3):
        one.set_step(step)
        drawn.setdefault(step, []).append(one.weight.clone())
    other.set_step(3)
    assert torch.equal(drawn[3][0], drawn[3][1]) and torch.equal(drawn[3][0], other.weight)
    assert not torch.equal(drawn[3][0], drawn[4][0])
    assert not torch.equal(one.weight, router_of("random", layer=1).weight)
    assert not torch.equal(router_of("random").weight, router_of("random", seed=2).weight)


def test_hash_routing_gives_a_symbol_the_same_expert_everywhere():
    router = router_of("hash")
    ids = torch.tensor([[0, 3, 0, 5], [3, 3, 0, 1]])
    experts = router(torch.zeros(2, 4, 8), ids).argmax(-1)
    assert torch.equal(experts, router.table[ids]) and torch.equal(router.table, router_of("hash").table)


def test_hash_routing_balances_load_rather_than_number_of_symbols():
    counts = [500, 100, 100, 100, 100, 50, 50]
    table = router_of("hash", counts=counts, n_expert=2).table
    loads = torch.zeros(2).index_add(0, table, torch.tensor(counts, dtype=torch.float32))
    assert loads.tolist() == [500, 500] and sorted(table.bincount().tolist()) == [1, 6]


def test_hash_routing_differs_between_layers_and_seeds():
    """With counts as different as those of a text; and each of them balances."""
    counts = [round(1e6 / (rank + 2)) for rank in range(60)]
    tables = [router_of("hash", layer=i, seed=s, counts=counts).table for i, s in ((0, 1), (1, 1), (0, 2))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tables, 2))
    for table in tables:
        loads = torch.zeros(4).index_add(0, table, torch.tensor(counts, dtype=torch.float32))
        assert (loads / loads.mean() - 1).abs().max() < 0.03


def test_a_shared_map_is_that_of_the_first_layer_in_every_layer():
    counts = [round(1e6 / (rank + 2)) for rank in range(60)]
    first, *others = (router_of("hash_shared", layer=layer, counts=counts).table for layer in range(3))
    assert torch.equal(first, router_of("hash", layer=0, counts=counts).table)
    assert all(torch.equal(first, other) for other in others)
    other_seed = router_of("hash_shared", seed=2, counts=counts).table
    assert not torch.equal(first, other_seed)


def test_gated_hash_routing_chooses_and_a_learned_probability_is_the_gate():
    """Cross-entropy, which comes through the gate, reaches the router's weight as that of a switch layer."""
    keys = dict(aux_loss="none", router="hash_gated", gate="sigmoid")
    layer, switch = layer_of(**keys), layer_of(aux_loss="none")
    switch.router.weight.data.copy_(layer.router.weight)
    x, ids = torch.randn(4, 16, 16), torch.randint(SYMBOLS, (4, 16))
    routed = layer.route(x, ids)
    assert torch.equal(routed.experts[:, 0], layer.router.table[ids].view(-1))
    assert torch.equal(layer.router.table, router_of("hash").table), "the same as without a gate"
    expected = switch.route(x, ids).probs.gather(1, routed.experts)
    torch.testing.assert_close(routed.gates, expected)
    upstream = torch.randn(64, 1)
    for gates in (routed.gates, expected):
        (gates * upstream).sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(layer.router.weight.grad, switch.router.weight.grad)


@pytest.mark.parametrize(
    "keys, told",
    [
        (dict(aux_loss="switch"), "no loss can balance"),
        (dict(z_loss_coef=0.1), "no loss can balance"),
        (dict(gate="softmax"), "set gate='sigmoid'"),
        (dict(n_expert_by_block="4,1"), "nothing to learn"),
        (dict(router_prior=1.0), "set router_prior=0"),
        (dict(router_bias_rate=0.1), "set router_bias_rate=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gated_hash_routing_refuses_what_has_no_effect(keys, told):
    config = Config(
        **{"n_layer": 2, "n_expert": 4, "router": "hash_gated", "gate": "sigmoid", "aux_loss": "none", **keys}
    )
    assert [told in message for _, message in config.problems()] == [True]


@pytest.mark.parametrize(
    "keys",
    [
        *({"router": name, "aux_loss": "none"} for name, kind in routing.ROUTERS.items() if not kind.is_trained),
        dict(z_loss_coef=0.1),
        dict(router_bias_rate=0.1, aux_loss="none"),
    ],
    ids=str,
)
def test_a_freeze_step_is_refused_where_it_would_freeze_nothing_or_half(keys):
    config = Config(**{"n_expert": 4, **keys}, router_freeze_step=5)
    assert any("router_freeze_step=0" in message for _, message in config.problems())


def test_an_even_map_gives_each_expert_as_many_symbols():
    """Within one, whatever their frequencies; and each layer and seed has another."""
    counts = [10**6, *[1] * 61]
    tables = [
        router_of("hash", layer=i, seed=s, counts=counts, router_table="even").table
        for i, s in ((0, 1), (1, 1), (0, 2))
    ]
    assert all(sorted(table.bincount(minlength=4).tolist()) == [15, 15, 16, 16] for table in tables)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tables, 2))
    shared = [router_of("hash_shared", layer=i, seed=1, counts=counts, router_table="even").table for i in (0, 1)]
    assert all(torch.equal(table, tables[0]) for table in shared)


@pytest.mark.parametrize("table", HASH_TABLES)
@pytest.mark.parametrize("name", [name for name, kind in routing.ROUTERS.items() if kind.takes_prior])
def test_a_prior_adds_its_strength_to_the_logit_of_the_maps_expert(name, table):
    """The map is that of a hash router: of this layer, or of the first; without a prior there is none."""
    keys = {"router_table": table, **(dict(capacity_factor=1.0) if name == "expert_choice" else {})}
    x, ids = torch.randn(2, 3, 8), torch.randint(SYMBOLS, (2, 5))  # two symbols before x
    plain = router_of(name, layer=1, **keys)
    assert not hasattr(plain, "table")
    for of, layer in (("own", 1), ("shared", 0)):
        router = router_of(name, layer=1, router_prior=2.5, router_prior_table=of, **keys)
        router.load_state_dict(plain.state_dict() | {"table": router.table})
        assert torch.equal(router.table, router_of("hash", layer=layer, router_table=table).table)
        expected = plain(x, ids)
        expected[torch.arange(2)[:, None], torch.arange(3), router.table[ids[:, 2:]]] += 2.5
        assert torch.equal(router(x, ids), expected) and router.state_problem() is None
        router.table[0] = 4
        assert "experts that are not there" in router.state_problem()


def test_priors_of_layers_differ_unless_shared():
    counts = [round(1e6 / (rank + 2)) for rank in range(60)]
    own, shared = (
        [router_of("learned", layer=i, counts=counts, router_prior=1.0, router_prior_table=of).table for i in range(3)]
        for of in ("own", "shared")
    )
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(own, 2))
    assert all(torch.equal(table, own[0]) for table in shared)


def test_a_strong_prior_makes_the_maps_choice_and_a_prior_of_0_is_the_learned_router():
    layers = [layer_of(router_prior=strength, aux_loss="none") for strength in (0.0, 1e6)]
    layers[1].load_state_dict(layers[0].state_dict(), strict=False)
    x, ids = torch.randn(4, 16, 16), torch.randint(SYMBOLS, (4, 16))
    none, strong = (layer.route(x, ids) for layer in layers)
    assert torch.equal(none.logits, torch.nn.functional.linear(x, layers[0].router.weight).view(64, 4))
    assert torch.equal(strong.experts[:, 0], layers[1].router.table[ids].view(-1))
    assert not torch.equal(none.experts, strong.experts)


def test_ngram_hash_depends_on_the_last_n_symbols_only():
    router = router_of("ngram_hash", router_ngram=3, n_expert=64)
    ids = torch.randint(SYMBOLS, (200, 8))
    experts = router.experts_of(ids)
    older, newer = ids.clone(), ids.clone()
    older[:, :5] = torch.randint(SYMBOLS, (200, 5))
    newer[:, 5] = (newer[:, 5] + 1) % SYMBOLS
    assert torch.equal(router.experts_of(older)[:, 7], experts[:, 7])
    assert (router.experts_of(newer)[:, 7] != experts[:, 7]).float().mean() > 0.9
    assert len(experts.unique()) == 64, "all experts are used"


def test_two_level_probability_is_group_times_expert_in_group():
    layer = layer_of(router="two_level", n_expert=6, n_expert_group=3, expert_top_k=2)
    x = torch.randn(1, 5, 16)
    routed = layer.route(x, torch.zeros(1, 5, dtype=torch.int64))
    group = (x[0] @ layer.router.group_weight.t()).softmax(-1)
    within = (x[0] @ layer.router.weight.t()).view(5, 3, 2).softmax(-1)
    torch.testing.assert_close(routed.probs, (group[:, :, None] * within).view(5, 6))
    assert torch.equal(routed.experts // 2, group.argmax(-1, keepdim=True).expand(5, 2)), "both from the best group"


def test_expert_choice_leaves_room_free_where_expert_dropout_leaves_few_tokens():
    """C = 12 of 16 tokens an expert, of which dropout leaves about 8."""
    torch.manual_seed(0)
    layer = layer_of(router="expert_choice", capacity_factor=3.0, aux_loss="none", n_expert=4, expert_dropout=0.5)
    routing = layer.train().route(torch.randn(8, 16, 16), torch.zeros(8, 16, dtype=torch.long))
    assert 0.4 < routing.chosen.float().mean() < 0.6 and not routing.gates[~routing.chosen].any()


def test_expert_choice_gives_every_expert_its_best_tokens():
    layer = layer_of(router="expert_choice", capacity_factor=1.0, aux_loss="none", n_expert=4)
    routed = route(layer, 3, 16)
    assert routed.chosen.view(3, 16, 4).sum(dim=1).eq(4).all()  # C = 1.0 · 1 · 16 / 4
    probs, chosen = routed.probs.view(3, 16, 4), routed.chosen.view(3, 16, 4)
    assert (probs.masked_fill(~chosen, 2).amin(1) >= probs.masked_fill(chosen, -1).amax(1)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Levels


def test_levels_equal_hand_computation():
    x = torch.arange(1.0, 8.0)[None, :, None]  # 1 … 7
    config = Config(segment_size=3)

    def pooled(level):
        return routing.LEVELS[level].pool(x, config, None)[0, :, 0].tolist()

    assert pooled("token") == [1, 2, 3, 4, 5, 6, 7]
    assert pooled("prefix") == [1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert pooled("segment") == [1, 1, 1, 2, 2, 2, 5]
    assert pooled("sequence") == [4] * 7


# ---------------------------------------------------------------------------------------------------------------------
# Gates and selection


def test_sigmoid_gate_scores_independently_and_its_probabilities_sum_to_one():
    routed = route(layer_of(gate="sigmoid", expert_top_k=2), 1, 5)
    torch.testing.assert_close(routed.gates, routed.logits.sigmoid().gather(1, routed.experts))
    torch.testing.assert_close(routed.probs.sum(-1), torch.ones(5))


def test_renormalised_softmax_equals_softmax_over_chosen_logits():
    routed = route(layer_of(expert_top_k=2, gate_renormalize=True), 1, 5)
    torch.testing.assert_close(routed.gates, routed.logits.gather(1, routed.experts).softmax(-1))


def test_straight_through_gate_is_one_with_the_gradient_of_the_probability():
    layer = layer_of(gate_straight_through=True)
    routed = route(layer, 1, 5)
    assert torch.equal(route(layer, 8, 16).gates, torch.ones(128, 1)) and torch.equal(routed.gates, torch.ones(5, 1))
    routed.gates.sum().backward()
    through = layer.router.weight.grad.clone()
    layer.zero_grad()
    route(layer, 1, 5).probs.max(dim=-1).values.sum().backward()
    torch.testing.assert_close(through, layer.router.weight.grad)


def test_top_p_uses_the_fewest_experts_that_reach_p():
    scores = torch.tensor([[0.04, 0.15, 0.06, 0.75], [0.4, 0.35, 0.2, 0.05], [0.2, 0.3, 0.3, 0.2]])
    for k in (3, 4):  # as many as there are, too
        experts, chosen = layer_of(expert_top_k=k, router_top_p=0.7).router.select(scores, scores, 1)
        assert chosen.sum(dim=1).tolist() == [1, 2, 3]
        assert [experts[i][chosen[i]].tolist() for i in range(3)] == [[3], [0, 1], [1, 2, 0]]


def test_temperature_divides_the_logits():
    hot, cold = (layer_of(router_temperature=temperature) for temperature in (4.0, 1.0))
    hot.load_state_dict({**cold.state_dict(), "temperature": hot.temperature})
    torch.testing.assert_close(route(hot, 1, 5).probs, (route(cold, 1, 5).logits / 4).softmax(-1))
    assert torch.equal(route(hot, 1, 5).logits, route(cold, 1, 5).logits), "the z-loss sees them as they are"


@pytest.mark.parametrize(
    "kind, halfway, quarter", [("constant", 2.0, 2.0), ("linear", 1.25, 1.625), ("cosine", 1.25, None)]
)
def test_schedules_go_from_start_to_end(kind, halfway, quarter):
    keys = dict(router_temperature=2.0, router_temperature_end=0.5, router_temperature_schedule=kind, max_iters=100)
    layer = layer_of(**keys)
    seen = {}
    for step in (0, 25, 50, 100, 500):
        layer.set_step(step)
        seen[step] = layer.temperature.item()
    end = 2.0 if kind == "constant" else 0.5
    assert seen[0] == 2.0 and seen[50] == pytest.approx(halfway) and seen[100] == seen[500] == pytest.approx(end)
    assert seen[25] == pytest.approx(2.0 - 1.5 * (0.5 - 0.5 * math.cos(math.pi / 4)) if quarter is None else quarter)


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary-loss-free balancing


def test_balancing_bias_of_an_underused_expert_rises():
    layer = layer_of(router_bias_rate=0.1, aux_loss="none")
    layer.update_bias(torch.tensor([10.0, 2.0, 4.0, 4.0]))
    torch.testing.assert_close(layer.balance_bias, torch.tensor([-0.1, 0.1, 0.1, 0.1]))
    assert "balance_bias" in layer.state_dict() and not layer.balance_bias.requires_grad


def test_balancing_bias_changes_choices_but_not_gates():
    layer = layer_of(router_bias_rate=0.1, aux_loss="none")
    layer.balance_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    routed = route(layer, 1, 5)
    assert (routed.experts == 2).all()
    torch.testing.assert_close(routed.gates[:, 0], routed.probs[:, 2])
