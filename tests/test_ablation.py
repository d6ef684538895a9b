"""Interventions whose cost is known: what nobody uses can go, what is equal can be swapped or merged, and every
combination of options gives numbers."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny
from test_moe import GRID, SYMBOLS, covering, name_of
from test_probe import CPU, assert_same, characters, model_of, windows_of

from analysis.ablation import (
    TableRouter,
    ablations,
    cost,
    count,
    favourite_tables,
    hash_tables,
    heir,
    matching,
    merged,
    other_top_ks,
    removed,
    shuffled,
    suffering,
    tabled,
    with_top_k,
)
from analysis.probe import Seen, see
from data.common import Vocabulary
from selection import choices_per_expert, gates_per_expert

VOCABULARY = Vocabulary("character", tuple("abcdefg"))
NAMES = ["even", "odd", "never"]
PLAIN = dict(n_expert=4, aux_loss="none")


def seen_of(nats, experts=()):
    return Seen(np.asarray(nats, dtype=np.float64), list(experts), [], [])


def everything(model, windows, progress=lambda: None, seed=1):
    ids_N = characters(windows)
    seen = see(model, windows, CPU)
    counts_V = np.bincount(ids_N, minlength=SYMBOLS)
    return ablations(model, windows, CPU, seen, ids_N, (ids_N % 2, NAMES), VOCABULARY, counts_V, seed, progress)


def costs_in(value):
    """Every Cost in what `ablations` gives."""
    if isinstance(value, dict):
        own = [value] if "nats" in value else []
        return own + [found for part in value.values() for found in costs_in(part)]
    return [found for part in value for found in costs_in(part)] if isinstance(value, list) else []


def loss_after(context, model, windows):
    with context:
        return see(model, windows, CPU).nats


# ---------------------------------------------------------------------------------------------------------------------
# Costs


def test_a_cost_by_hand():
    """Windows of 2, 2 and 1 characters with sums 3, 3 and 4: mean 2; deviations from 2 per character -1, -1, 2."""
    found = cost(seen_of([0] * 5), seen_of([1, 2, 3, 0, 4]), 2, np.array([0, 1, 0, 0, 1]), NAMES)
    assert found.nats == 2 and found.by_class == {"even": pytest.approx(4 / 3), "odd": 3.0}
    assert found.se == pytest.approx(math.sqrt(3 / 2 * (1 + 1 + 4)) / 5)
    equal = cost(seen_of([1] * 6), seen_of([2, 3, 1, 4, 8, 1]), 2, np.zeros(6, dtype=int), NAMES)
    assert equal.se == pytest.approx(np.std([1.5, 1.5, 3.5], ddof=1) / math.sqrt(3))
    assert cost(seen_of([1, 2]), seen_of([1, 2]), 2, np.zeros(2, dtype=int), NAMES).se is None


def test_the_standard_error_is_that_of_alike_neighbours():
    """A thousand texts of 50 windows whose characters share half of their variance: ± 1.96 SE covers 0 in 95% of them;
    with characters as the unit it would in far fewer."""
    generator = np.random.default_rng(0)
    names, classes_N = ["all"], np.zeros(50 * 8 - 3, dtype=int)
    covered, naive = 0, 0
    for _ in range(1000):
        change_N = (generator.normal(size=(50, 1)) + generator.normal(size=(50, 8))).reshape(-1)[:-3]
        found = cost(seen_of(np.zeros_like(change_N)), seen_of(change_N), 8, classes_N, names)
        covered += abs(found.nats) < 1.96 * found.se
        naive += abs(found.nats) < 1.96 * change_N.std(ddof=1) / math.sqrt(len(change_N))
    assert 925 <= covered <= 970 and naive < 800  # 4 standard errors of the count, less the t distribution's 1%


def test_who_suffers():
    """'a' twice by 3, 'b' once by 5, 'c' gains, 'd' stays."""
    ids_N, change = np.array([0, 1, 0, 2, 3]), seen_of([3, 5, 3, -9, 0])
    before = seen_of([0] * 5)
    assert suffering(before, change, ids_N, VOCABULARY, at_least=1) == [["b", 5.0, 1], ["a", 3.0, 2]]
    assert suffering(before, change, ids_N, VOCABULARY, at_least=2) == [["a", 3.0, 2]]


# ---------------------------------------------------------------------------------------------------------------------
# Removing


def test_removing_an_expert_that_nobody_uses_costs_nothing():
    """One whose probability is 0, for with a softmax even an unused expert has a share of the gates."""
    config = tiny(**PLAIN, router="hash")
    model, windows = model_of(config), windows_of(config)
    for layer in model.moe_layers():
        layer.router.table[layer.router.table == 3] = 0
    before = see(model, windows, CPU)
    assert before.stats[0].load[3] == 0
    with removed(model, {1: [3]}):
        assert_same(see(model, windows, CPU), before)
    with removed(model, {0: [3], 1: [3]}):
        assert_same(see(model, windows, CPU), before)


def test_removing_an_expert_that_nobody_uses_costs_nothing_where_gates_are_each_their_own():
    """Sigmoid gates, of a trained router: its bias keeps the expert out."""
    config = tiny(**PLAIN, gate="sigmoid", router_bias_rate=0.01)
    model, windows = model_of(config), windows_of(config)
    for layer in model.moe_layers():
        layer.balance_bias[3] = -9.0
    before = see(model, windows, CPU)
    with removed(model, {0: [3], 1: [3]}):
        assert_same(see(model, windows, CPU), before)


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_of_a_removed_expert_go_to_the_next_best(k):
    config = tiny(**PLAIN, expert_top_k=k)
    model, windows = model_of(config), windows_of(config)
    x, y = windows[0]
    logits = model(x).routing[0].logits
    with removed(model, {0: [2]}):
        routing = model(x).routing[0]
    order = logits.argsort(dim=1, descending=True)
    expected = torch.stack([row[row != 2][:k] for row in order])
    assert torch.equal(routing.experts, expected)
    left = logits.index_fill(1, torch.tensor([2]), -math.inf).softmax(dim=1)
    torch.testing.assert_close(routing.gates, left.gather(1, expected))


def test_tokens_of_an_expert_that_a_bias_favoured_find_another():
    config = tiny(**PLAIN, router_bias_rate=0.01)
    model, windows = model_of(config), windows_of(config)
    for layer in model.moe_layers():
        layer.balance_bias.copy_(torch.tensor([0.0, 5.0, 9.0, 0.0]))
    with removed(model, {0: [2]}):
        assert (see(model, windows, CPU).experts[0] == 1).all()


@pytest.mark.parametrize(
    "keys", [dict(router="hash"), dict(router="hash_gated", gate="sigmoid"), dict(router="ngram_hash")], ids=str
)
def test_without_a_next_best_a_token_gets_no_expert(keys):
    config = tiny(**PLAIN, **keys)
    model, windows = model_of(config), windows_of(config)
    before = see(model, windows, CPU)
    with removed(model, {0: [1]}):
        after = see(model, windows, CPU)
        out = model(*windows[0])
    assert np.array_equal(after.experts[0], np.where(before.experts[0] == 1, -1, before.experts[0]))
    assert (out.routing[0].gates[~out.routing[0].kept] == 0).all() and torch.isfinite(out.stats[0].entropy)
    least = int(before.stats[0].load[[0, 2, 3]].argmin())
    assert heir(before, after, 0, 1) == [0, 2, 3][least]


def test_the_heir_takes_over_most_tokens():
    before = seen_of([], [np.array([0, 0, 0, 0, 1, 2])])
    after = seen_of([], [np.array([2, 2, 1, -1, 1, 1])])
    assert heir(before, after, 0, 0) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Shuffling


def copies(model):
    """All experts of a layer are its first one."""
    for layer in model.moe_layers():
        for name in layer.experts.per_expert:
            weight = getattr(layer.experts, name)
            if weight is not None:
                with torch.no_grad():
                    weight.copy_(weight[:1].expand_as(weight))
    return model


@pytest.mark.parametrize("kind", ["mlp", "linear_concat", "linear_sum"])
def test_shuffling_equal_experts_with_equal_gates_costs_nothing(kind):
    config = tiny(**PLAIN, gate_straight_through=True, expert_kind=kind, bias=True)
    windows = windows_of(config)
    model = model_of(config)
    for make_equal, is_equal in ((lambda model: model, False), (copies, True)):
        before = see(make_equal(model), windows, CPU)
        with shuffled(model, [0, 1], 0):
            after = see(model, windows, CPU)
        assert (after.experts[0] != before.experts[0]).mean() > 0.2
        assert np.allclose(after.nats_N, before.nats_N, atol=1e-4) == is_equal


def test_shuffling_keeps_load_and_gates_and_nothing_else():
    """Padding keeps its own rows, so that the load of the text's characters is the same to the last one."""
    config = tiny(**PLAIN, expert_top_k=2)
    model, windows = model_of(config), windows_of(config, missing=20)
    before, routing = see(model, windows, CPU), model(*windows[0]).routing[0]
    with shuffled(model, [0], 3):
        after, other = see(model, windows, CPU), model(*windows[0]).routing[0]
    with shuffled(model, [0], 3):
        assert_same(see(model, windows, CPU), after)
    with shuffled(model, [0], 4):
        assert not np.array_equal(see(model, windows, CPU).experts[0], after.experts[0])
    assert torch.equal(before.stats[0].load, after.stats[0].load)
    torch.testing.assert_close(before.stats[0].importance, after.stats[0].importance)
    assert sorted(routing.gates[:, 0].tolist()) == sorted(other.gates[:, 0].tolist())
    assert (before.experts[0] != after.experts[0]).mean() > 0.2
    assert_same(see(model, windows, CPU), before)
    assert not model._forward_pre_hooks


# ---------------------------------------------------------------------------------------------------------------------
# Fixed maps


FEW = covering(GRID)
COOLED = tiny(**PLAIN, router_temperature=9.0, router_bias_rate=0.01)


@pytest.mark.parametrize("config", [*GRID, COOLED], ids=name_of)
def test_a_maps_expert_takes_the_place_and_the_gate_of_the_first_choice(config):
    """Before capacity, whatever ranks the experts. The same choices otherwise."""
    model, windows = model_of(config, std=0.5), windows_of(config)
    x, y = windows[0]
    table = torch.randint(config.n_expert, (SYMBOLS,))
    before, plain = see(model, windows, CPU), model(x, y).routing[0]
    with tabled(model, {0: table}):
        seen, routing = see(model, windows, CPU), model(x, y).routing[0]
    first = before.first[0]
    assert np.array_equal(seen.first[0], table[characters(windows)])
    ids, first = x.reshape(-1), torch.from_numpy(first[: x.numel()])
    assert (choices_per_expert(routing).sum(dim=1) == choices_per_expert(plain).sum(dim=1)).all()
    for probs, own in ((routing.probs, plain.probs), (choices(routing), choices(plain))):
        torch.testing.assert_close(probs.gather(1, table[ids][:, None]), own.gather(1, first[:, None]))
        torch.testing.assert_close(probs.gather(1, first[:, None]), own.gather(1, table[ids][:, None]))
        torch.testing.assert_close(probs.sort(dim=1).values, own.sort(dim=1).values)
    if not config.capacity_factor:
        gates, own = gates_per_expert(routing), gates_per_expert(plain)
        torch.testing.assert_close(gates.gather(1, table[ids][:, None]), own.gather(1, first[:, None]))


def choices(routing):
    return choices_per_expert(routing)


@pytest.mark.parametrize("keys", [dict(router="hash"), dict(router="hash_gated", gate="sigmoid")], ids=str)
def test_the_map_of_a_hash_router_is_its_own(keys):
    config = tiny(**PLAIN, **keys)
    model, windows = model_of(config), windows_of(config)
    seen = see(model, windows, CPU)
    tables = favourite_tables(model, [0, 1], seen, characters(windows), SYMBOLS)
    for layer, table_V in tables.items():
        assert torch.equal(table_V, model.moe_layers()[layer].router.table)
    with tabled(model, tables):
        assert_same(see(model, windows, CPU), seen)
    found = everything(model, windows)
    assert [one["nats"] for one in [*found["tabulated"], found["tabulated_all"]]] == [0, 0, 0]


def test_a_map_knows_nothing_but_the_character():
    """A router that goes by context loses it, and keeps what the character tells: its favourite expert."""
    config = tiny(**PLAIN, router="ngram_hash", router_ngram=2)
    model, windows = model_of(config), windows_of(config, n_batches=8)
    ids_N, seen = characters(windows), see(model, windows, CPU)
    tables = favourite_tables(model, [0], seen, ids_N, SYMBOLS)
    for symbol in range(SYMBOLS):
        assert int(tables[0][symbol]) == np.bincount(seen.first[0][ids_N == symbol]).argmax()
    with tabled(model, tables):
        after = see(model, windows, CPU)
    assert np.array_equal(after.experts[0], tables[0][ids_N]) and after.nats != seen.nats


def test_hash_routing_is_balanced_and_depends_on_seed_and_layer():
    model, counts_V = model_of(tiny(**PLAIN), 40), torch.arange(1, 41)
    tables, others = hash_tables(model, [0, 1], counts_V, 1), hash_tables(model, [0, 1], counts_V, 2)
    loads = torch.bincount(tables[0], weights=counts_V.double(), minlength=4)
    assert loads.max() / loads.min() < 1.1
    drawn = {tuple(table.tolist()) for table in (*tables.values(), *others.values())}
    assert len(drawn) == 4
    assert torch.equal(hash_tables(model, [1], counts_V, 1)[1], tables[1])


def test_the_router_of_a_map_is_made_of_the_layers_own():
    """What ranks experts is the layer's, not the checkpoint's first: temperature and bias at this point of training."""
    config = tiny(**PLAIN, router_temperature=2.0, router_bias_rate=0.01)
    layer = model_of(config).moe_layers()[0]
    router = TableRouter(layer, torch.zeros(SYMBOLS, dtype=torch.int64))
    assert router.score == layer.score


# ---------------------------------------------------------------------------------------------------------------------
# Other numbers of experts


@pytest.mark.parametrize("config", FEW, ids=name_of)
def test_with_the_trained_k_it_is_the_same_model(config):
    model, windows = model_of(config), windows_of(config)
    before = torch.get_rng_state()
    other = with_top_k(model, config.expert_top_k)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(see(other, windows, CPU), see(model, windows, CPU))


@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 1.0}, {"router": "two_level"}, {"router_top_p": 0.5}])
def test_k_experts_are_used(changes):
    config = tiny(**PLAIN | {"expert_top_k": 2} | changes)
    model, windows = model_of(config), windows_of(config)
    limit = 2 if config.router == "two_level" else 4
    for k in (1, 2, 4, 0):
        routing = with_top_k(model, k)(*windows[0]).routing[0]
        used = choices_per_expert(routing).sum(dim=1)
        expected = min(k or limit, limit)
        assert used.max() <= expected if config.router_top_p else (used == expected).all()
        assert routing.kept.any(dim=1).all() or config.capacity_factor
        first = see(with_top_k(model, k), windows[:1], CPU).first[0]
        assert choices_per_expert(routing)[torch.arange(len(first)), torch.from_numpy(first)].all()
    assert model.config.expert_top_k == 2


def test_which_k_can_be_tried():
    assert other_top_ks(tiny(n_expert=8, expert_top_k=2)) == [1, 4, 0]
    assert other_top_ks(tiny(n_expert=6, expert_top_k=0, aux_loss="none")) == [1, 2, 4]
    assert other_top_ks(tiny(n_expert=4, expert_top_k=4, aux_loss="none")) == [1, 2]
    assert other_top_ks(tiny(n_expert=8, router="two_level", expert_top_k=1)) == [2, 0]
    assert other_top_ks(tiny(n_expert=4, n_expert_by_block="2,8")) == [2, 4, 0]
    for changes in ({}, {"n_expert": 1}, PLAIN | {"router": "hash"}, {"n_expert": 4, "gate_straight_through": True}):
        assert other_top_ks(tiny(**changes)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def permuted_twin(model, layer, a, b):
    """Expert b becomes expert a with its hidden units in another order. -> that order"""
    experts = model.moe_layers()[layer].experts
    order = torch.randperm(experts.w_in.size(1))
    with torch.no_grad():
        for name in experts.per_expert:
            weight = getattr(experts, name)
            if weight is not None:
                weight[b] = weight[a] if name == "bias_out" else weight[a][order]
    return order


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "linear_concat"])
def test_merging_experts_that_are_the_same_but_for_the_order_of_their_units_costs_nothing(kind, bias, monkeypatch):
    """Without matching, it would."""
    config = tiny(**PLAIN, expert_kind=kind, bias=bias)
    model, windows = model_of(config), windows_of(config)
    order = permuted_twin(model, 1, 2, 0)
    before = see(model, windows, CPU)
    assert torch.equal(order[matching(model.moe_layers()[1].experts, 2, 0)], torch.arange(len(order)))
    after = see(merged(model, 1, 2, 0, torch.tensor([3.0, 0, 1, 0])), windows, CPU)
    np.testing.assert_allclose(after.nats_N, before.nats_N, atol=1e-4)
    monkeypatch.setattr("analysis.ablation.matching", lambda experts, a, b: torch.arange(len(order)))
    unmatched = see(merged(model, 1, 2, 0, torch.tensor([3.0, 0, 1, 0])), windows, CPU)
    assert np.abs(unmatched.nats_N - before.nats_N).max() > 1e-2
    assert_same(see(model, windows, CPU), before)


def test_equal_experts_of_linear_sum_are_merged_as_they_stand():
    config = tiny(**PLAIN, expert_kind="linear_sum", bias=True)
    model, windows = model_of(config), windows_of(config)
    with torch.no_grad():
        model.moe_layers()[0].experts.w_in[1] = model.moe_layers()[0].experts.w_in[3]
        model.moe_layers()[0].experts.bias_in[1] = model.moe_layers()[0].experts.bias_in[3]
    after = see(merged(model, 0, 1, 3, torch.ones(4)), windows, CPU)
    np.testing.assert_allclose(after.nats_N, see(model, windows, CPU).nats_N, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "linear_concat", "linear_sum"])
def test_what_is_merged_is_the_mean_weighted_by_load(kind):
    model = model_of(tiny(**PLAIN, expert_kind=kind, bias=True))
    before = model.moe_layers()[0].experts
    after = merged(model, 0, 0, 3, torch.tensor([3.0, 5.0, 5.0, 1.0])).moe_layers()[0].experts
    order = matching(before, 0, 3)
    assert sorted(order.tolist()) == list(range(before.w_in.size(1)))
    torch.testing.assert_close(after.w_in[0], 0.75 * before.w_in[0] + 0.25 * before.w_in[3, order])
    for name in before.per_expert:
        assert torch.equal(getattr(after, name)[0], getattr(after, name)[3])
        assert torch.equal(getattr(after, name)[1:3], getattr(before, name)[1:3])
    half = merged(model, 0, 0, 3, torch.zeros(4)).moe_layers()[0].experts
    torch.testing.assert_close(half.w_in[0], 0.5 * before.w_in[0] + 0.5 * before.w_in[3, order])


def test_where_layers_share_their_experts_only_one_merges_them():
    model = model_of(tiny(**PLAIN, share_experts=True))
    other = merged(model, 1, 0, 1, torch.ones(4))
    shared = model.moe_layers()[0].experts.w_in
    assert torch.equal(other.moe_layers()[0].experts.w_in, shared)
    assert not torch.equal(other.moe_layers()[1].experts.w_in, shared)


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.parametrize(
    "config",
    [pytest.param(config, marks=() if config in FEW else pytest.mark.soak) for config in GRID],
    ids=map(name_of, GRID),
)
def test_every_combination_gives_numbers_and_leaves_the_model_as_it_was(config):
    model, windows, passes = model_of(config), windows_of(config, n_batches=1), []
    before, weights = see(model, windows, CPU), {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    if config.n_expert == 1:
        assert count(model) == 0
        return
    found = everything(model, windows, lambda: passes.append(1))
    assert len(passes) == count(model) and torch.equal(torch.get_rng_state(), stream)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(costs_in(found)) == len(passes)
    for one in costs_in(found):
        assert one["se"] >= 0 and set(one["by_class"]) == {"even", "odd"}
    assert_same(see(model, windows, CPU), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for number, (removals, merge) in enumerate(zip(found["removed"], found["merged"], strict=True)):
        assert sum(one["share"] for one in removals) == pytest.approx((before.experts[number] >= 0).mean())
        cheapest = min(range(config.n_expert), key=lambda expert: removals[expert]["nats"])
        assert found["removed_all"]["experts"][number] == merge["expert"] == cheapest != merge["into"]


def test_the_same_seed_gives_the_same_costs():
    config = tiny(**PLAIN)
    model, windows = model_of(config), windows_of(config)
    assert everything(model, windows) == everything(model, windows) != everything(model, windows, seed=2)


def test_layers_of_their_own_size_and_models_without_experts():
    config = tiny(n_layer=4, n_expert=4, n_expert_by_block="1,0,3,4")
    found = everything(model := model_of(config), windows_of(config))
    assert [one and len(one) for one in found["removed"]] == [None, 3, 4]
    assert found["removed_all"]["experts"][0] is None and found["merged"][0] is None
    assert len(costs_in(found)) == count(model) == 7 + 3 * 2 + 5 + 2
    assert count(model_of(tiny())) == 0


def test_the_costs_are_those_of_the_interventions():
    """That `ablations` puts each where it belongs: against each on its own."""
    config = tiny(**PLAIN, expert_top_k=2)
    model, windows = model_of(config), windows_of(config)
    seen, ids_N = see(model, windows, CPU), characters(windows)
    found = everything(model, windows)
    alone = loss_after(removed(model, {1: [2]}), model, windows)
    assert found["removed"][1][2]["nats"] == pytest.approx(alone - seen.nats, abs=1e-12)
    favourites = favourite_tables(model, [0, 1], seen, ids_N, SYMBOLS)
    expected = {
        "shuffled": shuffled(model, [1], 1),
        "tabulated": tabled(model, {1: favourites[1]}),
        "shuffled_all": shuffled(model, [0, 1], 1),
        "tabulated_all": tabled(model, favourites),
        "hashed_all": tabled(model, hash_tables(model, [0, 1], np.bincount(ids_N, minlength=SYMBOLS), 1)),
        "removed_all": removed(model, {i: [e] for i, e in enumerate(found["removed_all"]["experts"])}),
    }
    for name, context in expected.items():
        one = found[name][1] if isinstance(found[name], list) else found[name]
        assert one["nats"] == pytest.approx(loss_after(context, model, windows) - seen.nats, abs=1e-12), name
    assert found["top_k"]["1"]["nats"] == pytest.approx(see(with_top_k(model, 1), windows, CPU).nats - seen.nats)
    assert set(found["top_k"]) == {"1", "0"}
    both = model
    for layer, merge in enumerate(found["merged"]):
        pair, load_E = (merge["into"], merge["expert"]), seen.stats[layer].load
        alone = see(merged(model, layer, *pair, load_E), windows, CPU)
        assert merge["nats"] == pytest.approx(alone.nats - seen.nats)
        both = merged(both, layer, *pair, load_E)
    assert found["merged_all"]["nats"] == pytest.approx(see(both, windows, CPU).nats - seen.nats)
