"""A model looked at over a text: what is seen is what the model does, by hand, and looking changes nothing."""

import random

import numpy as np
import pytest
import torch
from conftest import tiny
from test_moe import GRID, SYMBOLS, covering, name_of

from analysis.probe import altered, random_routers, router_inputs, see
from data.common import Dataset
from model import GPT, IGNORED
from routing import LEVELS
from run import evaluate
from selection import main_expert
from support import machines
from support.seeds import mix_seeds

CPU = machines.choose("cpu", "float32", False)
MOE = dict(n_expert=4, expert_top_k=2, capacity_factor=0.5)


def layer_inputs(model, windows, machine, limit):
    """Per MoE layer (n, D) float32: what its router is given (the normalised stream, pooled as config.router_level
    says) for the first n = min(limit, N) characters."""
    batches = list(router_inputs(model, windows, machine))
    return [torch.cat(layer)[:limit].cpu().numpy() for layer in zip(*batches)]


def model_of(config, vocab_size=SYMBOLS, std=0.3):
    """Away from the initialisation, where every prediction is nearly uniform; but a norm's scale stays near 1 and its
    bias near 0, else all tokens would go to one expert."""
    model = GPT(config, vocab_size)
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith("balance_bias"):
            torch.nn.init.normal_(tensor, mean=float("norm" in name and name.endswith("weight")), std=0.05)
        elif not name.endswith(("temperature", "expert_dropout", "router.table", "router.salt", "aux_loss_coef")):
            torch.nn.init.normal_(tensor, std=std)
    return model.eval()


def windows_of(config, n_batches=2, batch_size=3, missing=4):
    """Random text in windows, the last `missing` characters of it padding."""
    windows = []
    for _ in range(n_batches):
        text = torch.randint(SYMBOLS, (batch_size, config.block_size + 1))
        windows.append((text[:, :-1].clone(), text[:, 1:].clone()))
    x, y = windows[-1]
    x.view(-1)[x.numel() - missing :], y.view(-1)[y.numel() - missing :] = 0, IGNORED
    return windows


def characters(windows):
    return np.concatenate([x[y != IGNORED].numpy() for x, y in windows])


def assert_same(a, b):
    assert np.array_equal(a.nats_N, b.nats_N)
    for one, other in ((a.experts, b.experts), (a.first, b.first)):
        assert len(one) == len(other) and all(map(np.array_equal, one, other))


# ---------------------------------------------------------------------------------------------------------------------
# What is seen


@pytest.mark.parametrize(
    "changes",
    [{}, MOE, MOE | {"capacity_group": "batch"}, MOE | {"router": "expert_choice", "aux_loss": "none"}],
    ids=["dense", "moe", "leaky capacity", "expert choice"],
)
def test_its_mean_is_the_validation_loss(words, changes):
    config, dataset = tiny(**changes), Dataset.open(words)
    model = model_of(config, dataset.vocabulary.size)
    windows = list(dataset.windows("val", config.block_size, config.batch_size))
    seen, measured = see(model, windows, CPU), evaluate.full_loss(model, dataset, "val", config, CPU)
    assert seen.nats == pytest.approx(measured.nats, rel=1e-6)
    assert len(seen.nats_N) == measured.tokens == dataset.sizes["val"] - 1 and seen.nats_N.dtype == np.float64
    for mine, theirs in zip(seen.stats, measured.stats, strict=True):
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", GRID, ids=name_of)
def test_what_is_seen_of_each_layer_is_its_routing(config):
    model, windows = model_of(config), windows_of(config)
    seen = see(model, windows, CPU)
    outs = [model(x, y) for x, y in windows]
    real = [(y != IGNORED).reshape(-1) for _, y in windows]
    assert len(seen.experts) == len(seen.first) == len(seen.stats) == 2
    assert np.isfinite(seen.nats_N).all()
    for number, (experts, first) in enumerate(zip(seen.experts, seen.first)):
        routings = [out.routing[number] for out in outs]
        expected = torch.cat([main_expert(routing)[kept] for routing, kept in zip(routings, real)])
        assert np.array_equal(experts, expected.numpy())
        assert first.shape == experts.shape and first.dtype == np.int64
        served = experts >= 0
        if not config.capacity_factor and not config.router_bias_rate:
            assert served.all() and np.array_equal(experts, first), "the first choice has the largest gate"
        if config.router == "expert_choice":
            probs = torch.cat([routing.probs[kept] for routing, kept in zip(routings, real)])
            assert np.array_equal(first, probs.argmax(dim=1))


@pytest.mark.parametrize("changes", [{"expert_top_k": 2}, {"expert_top_k": 4, "router_top_p": 0.9}])
def test_the_first_choice_under_a_balancing_bias_is_the_one_that_it_makes(changes):
    config = tiny(n_expert=4, router_bias_rate=0.01, aux_loss="none", **changes)
    model = model_of(config)
    for layer in model.moe_layers():
        layer.balance_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    seen = see(model, windows_of(config), CPU)
    assert all((first == 2).all() for first in seen.first)
    assert any((experts != 2).any() for experts in seen.experts), "its gate need not be the largest"


def test_what_capacity_drops_still_has_a_first_choice():
    config = tiny(n_expert=4, expert_top_k=1, capacity_factor=0.25)
    seen = see(model_of(config), windows_of(config), CPU)
    assert all((experts == -1).any() for experts in seen.experts) and all((first >= 0).all() for first in seen.first)
    assert all((first == experts)[experts >= 0].all() for experts, first in zip(seen.experts, seen.first))


def test_a_dense_model_has_no_experts_and_mixed_blocks_have_their_own_number():
    config = tiny(n_layer=3)
    seen = see(model_of(config), windows_of(config), CPU)
    assert seen.experts == seen.first == seen.stats == [] and np.isfinite(seen.nats)
    assert random_routers(model_of(config), windows_of(config), CPU, 3, 0) == []
    assert layer_inputs(model_of(config), windows_of(config), CPU, 10) == []
    config = tiny(n_layer=3, n_expert=4, n_expert_by_block="2,0,4")
    seen = see(model_of(config), windows_of(config), CPU)
    assert [len(stats.load) for stats in seen.stats] == [2, 4]
    assert len(see(model_of(tiny(n_expert=2, moe_every=2)), windows_of(config), CPU).experts) == 1


def test_looking_moves_no_random_stream_and_drops_nothing():
    config = tiny(**MOE, dropout=0.5, router_jitter=0.5, expert_dropout=0.5)
    model, windows = model_of(config), windows_of(config)

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    seen = see(model.train(), windows, CPU)
    assert_same(seen, see(model.train(), windows, CPU))
    random_routers(model.train(), windows, CPU, 2, 0)
    layer_inputs(model.train(), windows, CPU, 9)
    assert states() == before
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What routers are given


@pytest.mark.parametrize("level", LEVELS)
def test_the_inputs_of_a_layer_make_its_own_logits(level):
    config = tiny(n_expert=4, router_level=level, segment_size=3)
    model, windows = model_of(config), windows_of(config)
    inputs = layer_inputs(model, windows, CPU, 10**6)
    for number, (layer, x_ND) in enumerate(zip(model.moe_layers(), inputs, strict=True)):
        expected = [model(x, y).routing[number].logits[(y != IGNORED).reshape(-1)] for x, y in windows]
        assert x_ND.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(x_ND) @ layer.router.weight.t(), torch.cat(expected))
    some = layer_inputs(model, windows, CPU, 50)
    assert all(np.array_equal(part, whole[:50]) and len(part) == 50 for part, whole in zip(some, inputs))


def test_a_random_router_is_the_argmax_of_a_new_map_and_each_draw_another():
    config = tiny(n_expert=4, router_level="prefix")
    model, windows = model_of(config), windows_of(config, n_batches=3)
    drawn = random_routers(model, windows, CPU, 3, seed=1)
    assert [len(layer) for layer in drawn] == [3, 3]
    assert all(label.shape == characters(windows).shape and set(label) <= set(range(4)) for label in sum(drawn, []))
    assert len({label.tobytes() for label in sum(drawn, [])}) == 6
    again, other = random_routers(model, windows, CPU, 2, seed=1), random_routers(model, windows, CPU, 2, seed=2)
    assert all(np.array_equal(drawn[layer][draw], again[layer][draw]) for layer in range(2) for draw in range(2))
    assert not np.array_equal(other[0][0], again[0][0])


def test_a_random_router_is_what_a_frozen_one_does():
    """The first layer sees the same with any router behind it: with the drawn weights in place, a frozen router
    chooses the same."""
    config = tiny(n_expert=4, router="frozen", aux_loss="none")
    model, windows = model_of(config), windows_of(config)
    (labels,), _ = random_routers(model, windows, CPU, 1, 5)
    generator = torch.Generator().manual_seed(mix_seeds(5, 0, 0))
    model.moe_layers()[0].router.weight.copy_(torch.randn(4, config.n_embd, generator=generator))
    assert np.array_equal(see(model, windows, CPU).first[0], labels)


# ---------------------------------------------------------------------------------------------------------------------
# Other routers


@pytest.mark.parametrize("config", covering(GRID), ids=name_of)
def test_an_alteration_that_changes_nothing_changes_nothing(config):
    model, windows = model_of(config), windows_of(config)
    plain = see(model, windows, CPU)
    with altered(model, {0: lambda logits, ids: logits, 1: lambda logits, ids: logits}) as inside:
        assert_same(see(inside, windows, CPU), plain)


@pytest.mark.parametrize("config", [config for config in GRID if config.n_expert > 1], ids=name_of)
@pytest.mark.parametrize("left", [0, 1], ids=["no expert", "one expert"])
def test_experts_without_a_logit_are_not_chosen_and_nothing_is_nan(config, left):
    """Whatever ranks them: also under a balancing bias, in groups, and where an expert fills its places."""
    model, windows = model_of(config), windows_of(config)
    for layer in model.moe_layers():
        layer.balance_bias[left:] += 9.0

    def change(logits_BTE, ids_BT):
        assert logits_BTE.shape[:2] == ids_BT.shape
        return torch.cat((logits_BTE[..., :left], torch.full_like(logits_BTE[..., left:], -torch.inf)), dim=-1)

    with altered(model, {0: change, 1: change}):
        seen = see(model, windows, CPU)
        outs = [model(x, y) for x, y in windows]
    for experts, stats in zip(seen.experts, seen.stats):
        assert set(experts) <= {-1, *range(left)}
        assert stats.load[left:].sum() == stats.importance[left:].sum() == 0
        assert all(torch.isfinite(value).all() for value in stats)
    assert np.isfinite(seen.nats_N).all()
    assert all(torch.isfinite(routing.probs).all() for out in outs for routing in out.routing)


def test_the_change_of_a_layer_is_given_its_logits_and_the_characters():
    config = tiny(n_expert=4, router="ngram_hash", aux_loss="none")
    model, windows, given = model_of(config), windows_of(config), []
    with altered(model, {1: lambda logits, ids: given.append((logits, ids)) or logits.roll(1, -1)}):
        seen = see(model, windows, CPU)
    plain = see(model, windows, CPU)
    assert all(torch.equal(ids, x) for (_, ids), (x, _) in zip(given, windows, strict=True))
    assert np.array_equal(seen.first[0], plain.first[0])
    assert np.array_equal(seen.first[1], (plain.first[1] + 1) % 4)


def test_the_routers_are_put_back_even_after_an_error():
    config = tiny(n_expert=4)
    model, windows = model_of(config), windows_of(config)
    plain, names = see(model, windows, CPU), list(model.state_dict())
    routers = [layer.router for layer in model.moe_layers()]

    def fail(logits, ids):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), altered(model, {0: fail, 1: fail}):
        see(model, windows, CPU)
    assert all(layer.router is router for layer, router in zip(model.moe_layers(), routers))
    assert list(model.state_dict()) == names
    assert_same(see(model, windows, CPU), plain)


def test_alterations_may_be_nested():
    config = tiny(n_expert=4)
    model, windows = model_of(config), windows_of(config)
    without = [lambda logits, ids, e=e: logits.index_fill(-1, torch.tensor([e]), -torch.inf) for e in range(4)]
    with altered(model, {0: without[0]}), altered(model, {0: without[1]}):
        assert set(see(model, windows, CPU).experts[0]) <= {2, 3}
    with altered(model, {0: without[0]}):
        assert 0 not in see(model, windows, CPU).experts[0]
