"""The promises of `moe.py`, over every router, gate, kind of experts, capacity and backend that its tables hold."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import moe
from configurator import Config, choices_of, options_of
from model import MLP


def grid():
    """Every combination of the tables' entries, with shapes chosen to be awkward, that the config allows."""
    cases = itertools.product(
        moe.ROUTERS,
        moe.GATES,
        moe.EXPERTS,
        [(2, 1), (3, 2), (4, 0), (4, 4), (1, 1)],
        [0.0, 0.5, 1.25],
        ["sequence", "batch"],
        [False, True],
        [False, True],
    )
    for router, gate, kind, (n_expert, k), factor, group, renormalize, bias in cases:
        config = dataclasses.replace(
            Config(),
            n_layer=2,
            n_head=2,
            n_embd=8,
            block_size=11,
            dropout=0.0,
            bias=bias,
            expert_hidden=8,
            n_expert=n_expert,
            expert_top_k=k,
            router=router,
            gate=gate,
            expert_kind=kind,
            gate_renormalize=renormalize,
            capacity_factor=factor,
            capacity_group=group,
            aux_loss="none",
        )
        if not list(config.problems()) and (factor or group == "sequence"):
            yield config


GRID = list(grid())


def name_of(config):
    factor = f"-cap{config.capacity_factor}-{config.capacity_group}" if config.capacity_factor else ""
    return (
        f"{config.router}-{config.gate}-{config.expert_kind}-{config.n_expert}x{config.expert_top_k}{factor}"
        f"{'-renorm' * config.gate_renormalize}{'-bias' * config.bias}"
    )


def layer_of(config, std=0.5, **changes):
    """An MoE layer with weights large enough that routing is decided and a wrong path shows."""
    layer = moe.MoE(dataclasses.replace(config, **changes) if changes else config)
    layer.init_weights(std, std)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=std)
    return layer


def routing_of(experts, gates, n_expert, kept=None, logits=None):
    experts, gates = torch.tensor(experts), torch.tensor(gates, dtype=torch.float32)
    logits = torch.zeros(len(experts), n_expert) if logits is None else torch.as_tensor(logits, dtype=torch.float32)
    kept = torch.ones_like(experts, dtype=torch.bool) if kept is None else torch.tensor(kept)
    return moe.Routing(logits, logits.softmax(-1), experts, gates, kept)


def test_the_grid_covers_every_entry_of_every_table():
    assert {c.router for c in GRID} == set(moe.ROUTERS) and {c.gate for c in GRID} == set(moe.GATES)
    assert {c.expert_kind for c in GRID} == set(moe.EXPERTS) and len(GRID) > 100


@pytest.mark.parametrize(
    "key, table",
    [
        ("router", moe.ROUTERS),
        ("gate", moe.GATES),
        ("expert_kind", moe.EXPERTS),
        ("aux_loss", moe.AUX_LOSSES),
        ("moe_backend", {"auto": None, **moe.BACKENDS}),
    ],
)
def test_the_config_offers_what_the_tables_hold(key, table):
    assert choices_of(options_of(Config)[key]) == list(table)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Every backend gives the reference's outputs and gradients


@pytest.mark.parametrize("backend", sorted(set(moe.BACKENDS) - {"reference"}))
@pytest.mark.parametrize("config", GRID, ids=name_of)
def test_a_backend_gives_the_outputs_and_gradients_of_the_reference(config, backend):
    results = {}
    weights = layer_of(config).state_dict()
    x0, upstream = torch.randn(3, 11, 8), torch.randn(3, 11, 8)
    for name in ("reference", backend):
        layer = moe.MoE(dataclasses.replace(config, moe_backend=name))
        layer.load_state_dict(weights)
        x = x0.clone().requires_grad_()
        y, _ = layer(x)
        (y * upstream).sum().backward()
        results[name] = {
            "y": y,
            "x": x.grad,
            **{n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()},
        }
    for key, expected in results["reference"].items():
        torch.testing.assert_close(
            results[backend][key], expected, rtol=1e-4, atol=1e-4 * max(1.0, expected.abs().max().item()), msg=key
        )


@pytest.mark.parametrize("backend", sorted(moe.BACKENDS))
def test_experts_without_tokens_get_a_gradient_of_zero(backend):
    layer = layer_of(GRID_TOP1, moe_backend=backend)
    with torch.no_grad():
        layer.router.weight.zero_()  # a tie: every token goes to expert 0
    y, routing = layer(torch.randn(2, 11, 8))
    y.square().sum().backward()
    assert (routing.experts == 0).all()
    assert layer.experts.w_in.grad[0].abs().max() > 0 and layer.experts.w_in.grad[1:].abs().max() == 0
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


GRID_TOP1 = next(
    c
    for c in GRID
    if c.expert_kind == "mlp" and (c.n_expert, c.expert_top_k) == (2, 1) and not c.capacity_factor and not c.bias
)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("backend", sorted(moe.BACKENDS))
def test_a_backend_takes_any_number_of_tokens(backend, tokens):
    layer = layer_of(tiny(n_expert=4, expert_top_k=2, expert_hidden=8, moe_backend=backend))
    assert layer(torch.randn(1, tokens, 16))[0].shape == (1, tokens, 16)


def test_auto_picks_a_backend_by_how_much_the_experts_would_waste():
    def chosen(**keys):
        layer = moe.MoE(tiny(**keys))
        return moe.choose_backend(torch.randn(5, 16), layer.experts, layer.k)

    assert chosen(n_expert=4, expert_top_k=1) == "sorted"
    assert chosen(n_expert=4, expert_top_k=2, expert_kind="linear_concat") == "masked"
    assert chosen(n_expert=4, expert_top_k=0, aux_loss="none") == "masked"
    assert chosen(n_expert=4, expert_top_k=1, expert_hidden=30) == "masked", "grouped_mm needs widths in multiples of 8"


# ---------------------------------------------------------------------------------------------------------------------
# 2. The dense MLP as a special case


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", sorted(moe.BACKENDS))
def test_one_expert_is_the_dense_mlp(backend, bias):
    config = tiny(n_expert=1, expert_top_k=1, bias=bias, moe_backend=backend, aux_loss="none")
    layer, mlp = layer_of(config), MLP(config)
    with torch.no_grad():
        mlp.fc.weight.copy_(layer.experts.w_in[0])
        mlp.proj.weight.copy_(layer.experts.w_out[0].t())
        if bias:
            mlp.fc.bias.copy_(layer.experts.bias_in[0])
            mlp.proj.bias.copy_(layer.experts.bias_out[0])
    x = torch.randn(2, 16, 16)
    torch.testing.assert_close(layer(x)[0], mlp(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", sorted(moe.BACKENDS))
def test_linear_concat_with_all_gates_at_one_is_the_dense_mlp(backend, bias):
    config = tiny(n_expert=4, expert_top_k=0, expert_kind="linear_concat", bias=bias, aux_loss="none")
    layer, mlp = layer_of(config), MLP(config)
    with torch.no_grad():
        mlp.fc.weight.copy_(layer.experts.w_in.view(64, 16))
        mlp.proj.weight.copy_(layer.experts.w_out.view(64, 16).t())
        if bias:
            mlp.fc.bias.copy_(layer.experts.bias_in.view(64))
            mlp.proj.bias.copy_(layer.experts.bias_out)
    x = torch.randn(5, 16)
    routing = routing_of([[0, 1, 2, 3]] * 5, [[1.0] * 4] * 5, 4)
    torch.testing.assert_close(layer.experts(x, routing, moe.BACKENDS[backend]), mlp(x))


def test_linear_sum_is_one_hidden_layer_of_mixed_weights():
    layer = layer_of(tiny(n_expert=4, expert_top_k=0, expert_kind="linear_sum", aux_loss="none"))
    x = torch.randn(2, 16, 16)
    y, routing = layer(x)
    mixed = torch.einsum("ne,ehd->nhd", routing.probs, layer.experts.w_in)
    expected = F.gelu(torch.einsum("nhd,nd->nh", mixed, x.view(32, 16))) @ layer.experts.w_mix
    torch.testing.assert_close(y.view(32, 16), expected)


# ---------------------------------------------------------------------------------------------------------------------
# 3. to 5. Causality, independence, caching: of the layer, over the grid (the whole model: test_model.py)


@pytest.mark.parametrize("config", [c for c in GRID if c.is_causal], ids=name_of)
def test_a_later_token_changes_nothing_before_it(config):
    layer = layer_of(config).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    y, _ = layer(x)
    for t in range(0, 11, 3):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randn_like(changed[:, t + 1 :])
        torch.testing.assert_close(layer(changed)[0][:, : t + 1], y[:, : t + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [c for c in GRID if c.is_causal], ids=name_of)
def test_a_later_token_has_no_gradient_into_an_earlier_output(config):
    layer = layer_of(config).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    layer(x)[0][:, :5].square().sum().backward()
    assert x.grad[:, 5:].abs().max() == 0 and x.grad[:, :5].abs().max() > 0


@pytest.mark.parametrize("config", [c for c in GRID if c.is_causal], ids=name_of)
def test_a_sequence_does_not_depend_on_its_neighbours_in_the_batch(config):
    layer = layer_of(config).double()
    x = torch.randn(4, 11, 8, dtype=torch.float64)
    y, _ = layer(x)
    torch.testing.assert_close(layer(x[2:3])[0], y[2:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x.flip(0))[0].flip(0), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [c for c in GRID if c.is_causal], ids=name_of)
def test_a_sequence_in_pieces_gets_what_it_gets_whole(config):
    layer = layer_of(config).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    used = torch.zeros(2, config.n_expert, dtype=torch.int64)
    pieces = [layer(piece, used)[0] for piece in x.split([4, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x)[0], rtol=0, atol=1e-12)


def test_a_capacity_shared_by_the_batch_is_not_causal_and_says_so():
    """A neighbour's tokens take the room: were this not so, the flag would be wrong."""
    config = next(c for c in GRID if c.capacity_group == "batch" and c.capacity_factor == 0.5 and c.n_expert == 2)
    layer = layer_of(config)
    x = torch.randn(2, 11, 8)
    crowded = x.clone()
    crowded[0] = torch.randn(11, 8)
    assert not config.is_causal
    assert not torch.equal(layer(x)[0][1], layer(crowded)[0][1])
    with pytest.raises(ValueError, match="cannot be decoded with a cache"):
        layer(x, torch.zeros(2, 2, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def test_an_earlier_second_choice_is_served_before_a_later_first_choice():
    """Ranking all first choices before any second one would let a later token change an earlier one's fate."""
    experts = torch.tensor([[0, 1, 1, 0]])  # token 0 chooses 0 then 1, token 1 chooses 1 then 0
    assert moe.within_capacity(experts, 2, limit=1).tolist() == [[True, True, False, False]]


def test_a_used_up_expert_stays_full_for_the_rest_of_a_cached_sequence():
    used = torch.tensor([[2, 0]])
    assert moe.within_capacity(torch.tensor([[0, 1, 1]]), 2, limit=2, used_GE=used).tolist() == [[False, True, True]]
    assert used.tolist() == [[3, 2]]


@pytest.mark.parametrize(
    "factor, k, T, E, expected", [(1.0, 2, 256, 4, 128), (0.5, 2, 256, 4, 64), (1.0, 1, 10, 4, 3), (0.01, 1, 10, 4, 1)]
)
def test_capacity_is_rounded_up(factor, k, T, E, expected):
    assert moe.capacity(tiny(n_expert=E, expert_top_k=k, capacity_factor=factor, block_size=T)) == expected


def test_capacity_comes_from_block_size_and_not_from_the_length_at_hand():
    layer = layer_of(tiny(n_expert=2, expert_top_k=1, capacity_factor=1.0, block_size=16))
    with torch.no_grad():
        layer.router.weight.zero_()
    assert layer(torch.randn(1, 8, 16))[1].kept.all() and layer(torch.randn(1, 16, 16))[1].kept.sum() == 8


@pytest.mark.parametrize("config", [c for c in GRID if c.capacity_factor == 0.5], ids=name_of)
def test_a_dropped_token_gets_exactly_nothing_from_the_layer(config):
    y, routing = layer_of(config)(torch.randn(3, 11, 8))
    dropped = ~routing.kept.any(dim=-1)
    assert dropped.any() or config.n_expert == config.expert_top_k
    assert (y.view(33, 8)[dropped] == 0).all() and (y.view(33, 8)[~dropped].abs().sum(-1) > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# 7. Router arithmetic


def test_cross_entropy_reaches_a_top_1_router():
    """One gate that is renormalised to 1 would leave the router without a gradient."""
    layer = layer_of(GRID_TOP1)
    layer(torch.randn(2, 11, 8))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-6


def test_the_router_computes_in_float32_under_autocast():
    layer = layer_of(tiny(n_expert=4, expert_top_k=2))
    x = torch.randn(2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, routing = layer(x)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.view(32, 16) @ layer.router.weight.t())


@pytest.mark.parametrize("backend", sorted(moe.BACKENDS))
def test_bfloat16_autocast_stays_near_float32(backend):
    layer = layer_of(tiny(n_expert=4, expert_top_k=2, moe_backend=backend), std=0.2)
    x = torch.randn(2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    torch.testing.assert_close(y, layer(x)[0], rtol=0.05, atol=0.02)


def test_jitter_reaches_the_router_only_and_only_in_training():
    config = tiny(n_expert=4, expert_top_k=0, router_jitter=0.5, aux_loss="none", expert_kind="linear_concat")
    layer = layer_of(config)
    seen = []
    hidden = layer.experts.hidden
    layer.experts.hidden = lambda up, gate: seen.append(up) or hidden(up, gate)
    x = torch.randn(2, 16, 16)
    _, quiet = layer.eval()(x)
    _, noisy = layer.train()(x)
    assert not torch.allclose(quiet.logits, noisy.logits) and torch.equal(seen[0], seen[1])
    assert torch.equal(layer.eval()(x)[1].logits, quiet.logits)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_go_to_the_lower_expert(k):
    gates, experts = moe.choose(torch.full((3, 4), 0.25), k)
    assert experts.tolist() == [list(range(k))] * 3 and (gates == 0.25).all()


@pytest.mark.parametrize("k", [1, 2])
def test_masked_experts_make_no_nan(k):
    """-inf logits, as of experts that are switched off: losses, statistics and gradients stay finite."""
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, -math.inf, 2.0]], requires_grad=True)
    probs = moe.GATES["softmax"](logits)
    gates, experts = moe.choose(probs, k)
    routing = moe.Routing(logits, probs, experts, gates, torch.ones_like(experts, dtype=torch.bool))
    loss = moe.switch_loss(routing) + moe.z_loss(routing) + gates.sum()
    loss.backward()
    summary = moe.summarize(moe.routing_stats(routing))
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and math.isfinite(summary["entropy"])


# ---------------------------------------------------------------------------------------------------------------------
# 9. Auxiliary losses


def test_the_switch_loss_is_one_under_uniform_routing():
    experts = [[i % 4] for i in range(16)]
    assert moe.switch_loss(routing_of(experts, [[1.0]] * 16, 4)).item() == pytest.approx(1.0)


def test_the_switch_loss_of_a_collapsed_router_is_the_number_of_experts():
    logits = [[50.0, 0, 0, 0]] * 8
    assert moe.switch_loss(routing_of([[0]] * 8, [[1.0]] * 8, 4, logits=logits)).item() == pytest.approx(4.0)


def test_the_switch_loss_by_hand():
    """f = (3/4, 1/4), P = (0.6, 0.4): 2 · (0.45 + 0.1) = 1.1"""
    logits = [[math.log(0.6), math.log(0.4)]] * 4
    assert moe.switch_loss(routing_of([[0], [0], [0], [1]], [[1.0]] * 4, 2, logits=logits)).item() == pytest.approx(1.1)


def test_the_switch_loss_counts_choices_before_capacity():
    logits = [[1.0, 0.0]] * 4
    full = routing_of([[0]] * 4, [[1.0]] * 4, 2, logits=logits)
    dropped = routing_of([[0]] * 4, [[0.0]] * 4, 2, logits=logits, kept=[[False]] * 4)
    assert moe.switch_loss(full) == moe.switch_loss(dropped)


def test_the_z_loss_by_hand():
    logits = [[0.0, 0.0], [math.log(3.0), 0.0]]  # logsumexp: log 2, log 4
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert moe.z_loss(routing_of([[0], [0]], [[1.0]] * 2, 2, logits=logits)).item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction, factor", [("sum", 2), ("mean", 1)])
def test_layers_combine_as_the_config_says(reduction, factor):
    routing = routing_of([[i % 4] for i in range(8)], [[1.0]] * 8, 4)
    config = tiny(n_expert=4, aux_loss_reduction=reduction, aux_loss_coef=0.5, z_loss_coef=0.0)
    losses = moe.aux_losses([routing, routing], config)
    assert losses["switch"].raw.item() == pytest.approx(factor) and losses["switch"].weighted.item() == pytest.approx(
        0.5 * factor
    )
    assert losses["z"].raw > 0 and losses["z"].weighted == 0, "measured though it counts for nothing"


def test_a_coefficient_of_zero_leaves_no_gradient():
    layer = layer_of(tiny(n_expert=4, aux_loss_coef=0.0))
    losses = moe.aux_losses([layer(torch.randn(1, 16, 16))[1]], layer.config)
    assert not any(loss.weighted.requires_grad for loss in losses.values())


# ---------------------------------------------------------------------------------------------------------------------
# 8. Statistics


def test_statistics_by_hand():
    routing = routing_of(
        [[0, 1], [0, 2], [0, 1]],
        [[0.5, 0.25], [0.5, 0.0], [0.0, 0.0]],
        4,
        kept=[[True, True], [True, False], [False, False]],
    )
    summary = moe.summarize(moe.routing_stats(routing))
    assert (
        summary["load"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0]) and summary["dead"] == 1 and summary["tokens"] == 3
    )
    assert summary["drop_rate"] == pytest.approx(3 / 6) and summary["gate_mass"] == pytest.approx(1.25 / 3)
    assert summary["entropy"] == pytest.approx(math.log(4))


def test_statistics_leave_out_tokens_that_do_not_count_and_add_up():
    routing = routing_of([[0], [1], [1]], [[1.0]] * 3, 2)
    some = moe.routing_stats(routing, torch.tensor([True, True, False]))
    total = moe.add_stats(moe.add_stats(None, [some]), [moe.routing_stats(routing)])
    assert moe.summarize(some)["load"] == [0.5, 0.5] and moe.summarize(total[0])["tokens"] == 5
    assert moe.summarize(total[0])["load"] == pytest.approx([2 / 5, 3 / 5])


def test_statistics_of_nothing_are_refused():
    routing = routing_of([[0]], [[1.0]], 2)
    with pytest.raises(ValueError, match="no token"):
        moe.summarize(moe.routing_stats(routing, torch.tensor([False])))


@pytest.mark.parametrize("config", [c for c in GRID if c.capacity_factor == 0.5], ids=name_of)
def test_the_drop_rate_counts_the_dropped_choices(config):
    _, routing = layer_of(config)(torch.randn(3, 11, 8))
    assert moe.summarize(moe.routing_stats(routing))["drop_rate"] == pytest.approx(
        1 - routing.kept.float().mean().item()
    )


@pytest.mark.parametrize("backend", sorted(set(moe.BACKENDS) - {"reference"}))
def test_more_experts_than_a_byte_can_number(backend):
    config = tiny(n_expert=300, expert_top_k=1, expert_hidden=8, n_embd=8)
    layer = layer_of(config, moe_backend=backend)
    x = torch.randn(2, 16, 8)
    y, routing = layer(x)
    assert routing.experts.max() > 255
    expected = layer.experts(x.view(32, 8), routing, moe.reference).view(2, 16, 8)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
