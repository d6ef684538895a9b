"""The promises of `moe.py` and `backends.py`, over every router, gate, kind of experts, capacity and backend that the
tables hold."""

import dataclasses
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
import balance
import moe
import selection
from hashing import HASH_TABLES
from model import MLP
from routing import LEVELS, ROUTERS, RoutingCache
from run.settings import Config
from support.options import choices_of, options_of

CHOICES = {
    "router": list(ROUTERS),
    "router_level": list(LEVELS),
    "gate": list(selection.GATES),
    "expert_kind": list(moe.EXPERTS),
    "experts": [(2, 1), (3, 2), (4, 0), (4, 2), (4, 4), (1, 1), (4, 1)],  # (n_expert, expert_top_k)
    "capacity_factor": [0.0, 0.5, 1.25],
    "capacity_group": ["sequence", "batch"],
    "gate_renormalize": [False, True],
    "gate_straight_through": [False, True],
    "router_top_p": [0.0, 0.6],
    "router_bias_rate": [0.0, 0.01],
    "router_prior": [0.0, 1.0],
    "n_shared_expert": [0, 1],
    "bias": [False, True],
}
SYMBOLS = 7


def grid():
    """Configs that the configurator allows, drawn until every pair of choices that they show has been seen."""
    draw, covered, chosen = random.Random(0), set(), []
    for _ in range(20_000):
        values = [draw.choice(choices) for choices in CHOICES.values()]
        keys = dict(zip(CHOICES, values))
        n_expert, k = keys.pop("experts")
        config = Config(
            n_layer=2, n_head=2, n_embd=8, block_size=11, dropout=0.0, expert_hidden=8, segment_size=3, router_ngram=2,
            n_expert=n_expert, expert_top_k=k, aux_loss="none", **keys,
        )  # fmt: skip
        pairs = set(itertools.combinations(zip(CHOICES, values), 2))
        if pairs <= covered or (config.capacity_group == "batch" and not config.capacity_factor):
            continue
        if next(config.problems(), None) is None:
            covered |= pairs
            chosen.append(config)
    return chosen


def covering(configs):
    """A few of these configs in which each value of each key occurs that occurs in any of them."""
    left = {config: set(dataclasses.asdict(config).items()) for config in configs}
    chosen, missing = [], set().union(*left.values())
    while missing:
        chosen.append(max(left, key=lambda config: len(left[config] & missing)))
        missing -= left[chosen[-1]]
    return chosen


GRID = grid()
CAUSAL = [config for config in GRID if config.is_causal]


def name_of(config):
    capacity = f"-cap{config.capacity_factor}-{config.capacity_group}" if config.capacity_factor else ""
    flags = {"renorm": config.gate_renormalize, "st": config.gate_straight_through, "topp": config.router_top_p,
             "biasrate": config.router_bias_rate, "prior": config.router_prior,
             "shared": config.n_shared_expert, "bias": config.bias}  # fmt: skip
    return (
        f"{config.router}-{config.router_level}-{config.gate}-{config.expert_kind}-{config.n_expert}x{config.expert_top_k}"
        + capacity + "".join(f"-{flag}" for flag, on in flags.items() if on)
    )  # fmt: skip


def new_layer(config):
    return moe.MoE(config, layer=0, symbol_counts=torch.ones(SYMBOLS))


def layer_of(config, std=0.5, **changes):
    """An MoE layer with weights large enough that routing is decided and a wrong path shows."""
    layer = new_layer(dataclasses.replace(config, **changes) if changes else config)
    for name, tensor in layer.state_dict().items():
        if name not in ("temperature", "expert_dropout", "router.table", "router.salt"):
            torch.nn.init.normal_(tensor, std=0.05 if name == "balance_bias" else std)
    return layer


def symbols(*shape):
    return torch.randint(SYMBOLS, shape)


def run(layer, x, ids=None, cache=None):
    """layer(x), with symbols where the test has none of its own."""
    return layer(x, symbols(*x.shape[:2]) if ids is None else ids, cache)


def routing_of(experts, gates, n_expert, kept=None, logits=None):
    experts, gates = torch.tensor(experts), torch.tensor(gates, dtype=torch.float32)
    logits = torch.zeros(len(experts), n_expert) if logits is None else torch.as_tensor(logits, dtype=torch.float32)
    kept = torch.ones_like(experts, dtype=torch.bool) if kept is None else torch.tensor(kept)
    chosen = torch.ones_like(experts, dtype=torch.bool)
    return selection.Routing(logits, logits.softmax(-1), experts, gates, chosen, kept, len(experts))


def test_grid_covers_every_entry_of_every_table():
    for key, table in {
        "router": ROUTERS,
        "router_level": LEVELS,
        "gate": selection.GATES,
        "expert_kind": moe.EXPERTS,
    }.items():
        assert {getattr(config, key) for config in GRID} == set(table)
    assert {(c.router, c.router_level) for c in GRID} >= {("learned", level) for level in LEVELS}
    assert len(GRID) > 50 and len(CAUSAL) > 30


@pytest.mark.parametrize(
    "key, table",
    [
        ("router", ROUTERS),
        ("gate", selection.GATES),
        ("expert_kind", moe.EXPERTS),
        ("aux_loss", balance.AUX_LOSSES),
        ("router_level", LEVELS),
        ("router_table", HASH_TABLES),
        ("expert_init", moe.INITS),
        ("router_temperature_schedule", moe.SCHEDULES),
        ("aux_loss_coef_schedule", moe.SCHEDULES),
        ("expert_dropout_schedule", moe.SCHEDULES),
        ("moe_backend", {"auto": None, **backends.BACKENDS}),
    ],
)
def test_choices_of_a_key_are_the_entries_of_its_table(key, table):
    assert choices_of(options_of(Config)[key]) == list(table)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Every backend gives the reference's outputs and gradients


@pytest.mark.parametrize("backend", sorted(set(backends.BACKENDS) - {"reference"}))
@pytest.mark.parametrize("config", GRID, ids=name_of)
def test_backend_equals_reference_in_outputs_and_gradients(config, backend):
    results = {}
    weights = layer_of(config).state_dict()
    x0, upstream, ids = torch.randn(3, 11, 8), torch.randn(3, 11, 8), symbols(3, 11)
    for name in ("reference", backend):
        layer = new_layer(dataclasses.replace(config, moe_backend=name))
        layer.load_state_dict(weights)
        x = x0.clone().requires_grad_()
        y, _ = run(layer, x, ids)
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


@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_experts_without_tokens_get_zero_gradients(backend):
    layer = layer_of(GRID_TOP1, moe_backend=backend)
    with torch.no_grad():
        layer.router.weight.zero_()  # a tie: every token goes to expert 0
    y, routing = run(layer, torch.randn(2, 11, 8))
    y.square().sum().backward()
    assert (routing.experts == 0).all()
    assert layer.experts.w_in.grad[0].abs().max() > 0 and layer.experts.w_in.grad[1:].abs().max() == 0
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


GRID_TOP1 = Config(n_layer=2, n_head=2, n_embd=8, block_size=11, dropout=0.0, expert_hidden=8, n_expert=2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 11)),
    widths=st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 40])),
    experts=st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    factor=st.sampled_from([0.0, 0.3, 1.0, 2.7]),
    kind=st.sampled_from(sorted(moe.EXPERTS)),
    seed=st.integers(0, 10_000),
)
def test_backends_and_cached_pieces_equal_reference_for_any_shape(shape, widths, experts, factor, kind, seed):
    torch.manual_seed(seed)
    config = Config(
        n_layer=2, n_head=2, n_embd=widths[0], block_size=11, dropout=0.0, expert_hidden=widths[1], n_expert=experts[0],
        expert_top_k=experts[1], capacity_factor=factor, expert_kind=kind, aux_loss="none", moe_backend="reference",
    )  # fmt: skip
    layer = layer_of(config)
    x, ids = torch.randn(*shape, widths[0]), symbols(*shape)
    expected, routing = layer(x, ids)
    for name in sorted(set(backends.BACKENDS) - {"reference"}):
        found = layer.experts(x.view(-1, widths[0]), routing, backends.BACKENDS[name]).view_as(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    cache = RoutingCache(config, shape[0], x.device, x.dtype)
    cut = seed % shape[1]
    pieces = [
        layer(x[:, part], ids[:, part], cache)[0] for part in (slice(0, cut), slice(cut, None)) if x[:, part].numel()
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_backends_accept_any_number_of_tokens(backend, tokens):
    layer = layer_of(tiny(n_expert=4, expert_top_k=2, expert_hidden=8, moe_backend=backend))
    assert run(layer, torch.randn(1, tokens, 16))[0].shape == (1, tokens, 16)


def test_auto_chooses_the_fastest_measured_backend(monkeypatch):
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def chosen(device, dtype=torch.bfloat16, is_compiled=True, **keys):
        return new_layer(tiny(**keys)).backend_name(device, dtype, is_compiled)

    capability = (9, 0)
    top1, top2 = dict(n_expert=4, expert_top_k=1), dict(n_expert=4, expert_top_k=2)
    narrow, soft = dict(**top2, expert_kind="linear_concat"), dict(n_expert=4, expert_top_k=0, aux_loss="none")
    for keys in (top1, top2, narrow):
        assert chosen(cpu, torch.float32, is_compiled=False, **keys) == "sliced"
        assert chosen(cpu, torch.float32, **keys) == "masked", "the sizes of the slices are not known to a compiler"
    assert chosen(cpu, torch.float32, is_compiled=False, **soft) == "masked", "every expert is needed"
    for compiled in (False, True):
        assert chosen(cuda, is_compiled=compiled, **top1) == "sorted"
        assert chosen(cuda, is_compiled=compiled, **narrow) == "masked"
        assert chosen(cuda, is_compiled=compiled, **top1, capacity_factor=1.0) == "padded"
    assert chosen(cuda, torch.float32, **top1) == "masked", "the grouped GEMM waits for the device unless bfloat16"
    assert chosen(cuda, **top1, expert_hidden=60) == "masked", "grouped_mm needs widths in multiples of 8"
    assert chosen(mps, torch.float32, is_compiled=False, **top1) == "masked"
    capability = (8, 0)
    assert chosen(cuda, **top1) == "masked", "before sm90 the grouped GEMM waits for the device"
    assert chosen(cuda, **top1, moe_backend="reference") == "reference"


# ---------------------------------------------------------------------------------------------------------------------
# 2. The dense MLP as a special case


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_one_expert_equals_the_dense_mlp(backend, bias):
    config = tiny(n_expert=1, expert_top_k=1, bias=bias, moe_backend=backend, aux_loss="none")
    layer, mlp = layer_of(config), MLP(config)
    with torch.no_grad():
        mlp.fc.weight.copy_(layer.experts.w_in[0])
        mlp.proj.weight.copy_(layer.experts.w_out[0].t())
        if bias:
            mlp.fc.bias.copy_(layer.experts.bias_in[0])
            mlp.proj.bias.copy_(layer.experts.bias_out[0])
    x = torch.randn(2, 16, 16)
    torch.testing.assert_close(run(layer, x)[0], mlp(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_linear_concat_with_gates_of_one_equals_the_dense_mlp(backend, bias):
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
    torch.testing.assert_close(layer.experts(x, routing, backends.BACKENDS[backend]), mlp(x))


def test_linear_sum_equals_one_hidden_layer_of_mixed_weights():
    layer = layer_of(tiny(n_expert=4, expert_top_k=0, expert_kind="linear_sum", aux_loss="none"))
    x = torch.randn(2, 16, 16)
    y, routing = run(layer, x)
    mixed = torch.einsum("ne,ehd->nhd", routing.probs, layer.experts.w_in)
    expected = F.gelu(torch.einsum("nhd,nd->nh", mixed, x.view(32, 16))) @ layer.experts.w_mix
    torch.testing.assert_close(y.view(32, 16), expected)


# ---------------------------------------------------------------------------------------------------------------------
# 3. to 5. Causality, independence, caching: of the layer, over the grid (the whole model: test_model.py)


def inputs(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64), symbols(*shape)


@pytest.mark.parametrize("config", CAUSAL, ids=name_of)
def test_later_tokens_do_not_change_earlier_outputs(config):
    layer = layer_of(config).double()
    x, ids = inputs(2, 11)
    y, _ = layer(x, ids)
    for t in range(0, 11, 3):
        other_x, other_ids = inputs(2, 11)
        other_x[:, : t + 1], other_ids[:, : t + 1] = x[:, : t + 1], ids[:, : t + 1]
        torch.testing.assert_close(layer(other_x, other_ids)[0][:, : t + 1], y[:, : t + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CAUSAL, ids=name_of)
def test_earlier_outputs_have_no_gradient_from_later_tokens(config):
    layer = layer_of(config).double()
    x, ids = inputs(2, 11)
    x.requires_grad_()
    layer(x, ids)[0][:, :5].square().sum().backward()
    assert x.grad[:, 5:].abs().max() == 0 and x.grad[:, :5].abs().max() > 0


@pytest.mark.parametrize("config", CAUSAL, ids=name_of)
def test_cached_pieces_equal_the_uncached_sequence(config):
    layer = layer_of(config).double()
    x, ids = inputs(2, 11)
    cache = RoutingCache(config, 2, x.device, x.dtype)
    pieces = [
        layer(*piece, cache)[0] for piece in zip(x.split([4, 1, 1, 3, 2], dim=1), ids.split([4, 1, 1, 3, 2], dim=1))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x, ids)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [c for c in GRID if c.capacity_group == "sequence"], ids=name_of)
def test_output_is_independent_of_other_sequences_in_the_batch(config):
    layer = layer_of(config).double()
    x, ids = inputs(4, 11)
    y, _ = layer(x, ids)
    torch.testing.assert_close(layer(x[2:3], ids[2:3])[0], y[2:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x.flip(0), ids.flip(0))[0].flip(0), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "keys",
    [
        dict(capacity_factor=0.5, capacity_group="batch"),
        dict(router_level="sequence"),
        dict(router="expert_choice", capacity_factor=1.0, aux_loss="none"),
    ],
    ids=lambda keys: next(iter(keys.values())),
)
def test_configs_marked_not_causal_depend_on_later_tokens_or_other_sequences(keys):
    """Some later token, or another sequence, changes an output: were it not so, the flag would be wrong."""
    config = dataclasses.replace(GRID_TOP1, **keys)
    layer = layer_of(config).double()
    assert not config.is_causal
    x, ids = inputs(2, 11)
    other_x, other_ids = inputs(2, 11)
    other_x[1, :6], other_ids[1, :6] = x[1, :6], ids[1, :6]
    assert not torch.allclose(layer(x, ids)[0][1, :6], layer(other_x, other_ids)[0][1, :6])


def test_capacity_shared_by_the_batch_refuses_a_cache():
    config = dataclasses.replace(GRID_TOP1, capacity_factor=0.5, capacity_group="batch")
    x, ids = inputs(2, 11)
    with pytest.raises(ValueError, match="cannot be decoded with a cache"):
        layer_of(config).double()(x, ids, RoutingCache(config, 2, x.device, x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def test_second_choice_of_an_earlier_token_precedes_first_choice_of_a_later_one():
    """Ranking all first choices before any second one would let a later token change an earlier one's fate."""
    experts = torch.tensor([[0, 1, 1, 0]])  # token 0 chooses 0 then 1, token 1 chooses 1 then 0
    assert selection.within_capacity(experts, experts >= 0, 2, limit=1).tolist() == [[True, True, False, False]]


def test_full_expert_stays_full_for_the_rest_of_a_cached_sequence():
    used = torch.tensor([[2, 0]])
    experts = torch.tensor([[0, 1, 1]])
    assert selection.within_capacity(experts, experts >= 0, 2, limit=2, use_GE=used).tolist() == [[False, True, True]]
    assert used.tolist() == [[3, 2]]


@pytest.mark.parametrize(
    "factor, k, T, E, expected", [(1.0, 2, 256, 4, 128), (0.5, 2, 256, 4, 64), (1.0, 1, 10, 4, 3), (0.01, 1, 10, 4, 1)]
)
def test_capacity_is_rounded_up(factor, k, T, E, expected):
    assert selection.capacity(tiny(n_expert=E, expert_top_k=k, capacity_factor=factor, block_size=T)) == expected


def test_the_capacity_of_a_number_on_the_device_is_that_of_the_number():
    """And both are ceil(cf · k · T · B / E), where rounding errors do not count."""
    for factor, k, T, E in itertools.product(
        (0.01, 0.1, 1 / 3, 0.5, 1.0, 1.1, 1.25, 2.0, 1e6), (1, 2), (10, 256), (2, 3, 7)
    ):
        config = tiny(n_expert=E, expert_top_k=k, capacity_factor=factor, block_size=T, aux_loss="none")
        for B in (1, 2, 3, 10, 64, 1000):
            exact = Fraction(str(factor) if factor != 1 / 3 else "1/3") * k * T * B / E
            expected = max(1, min(B * T, math.ceil(exact)))
            assert selection.capacity(config, B) == expected
            on_device = selection.capacity(config, torch.tensor(B))
            assert on_device.dtype == torch.int64 and on_device == expected


def test_capacity_depends_on_block_size_and_not_on_current_length():
    layer = layer_of(tiny(n_expert=2, expert_top_k=1, capacity_factor=1.0, block_size=16))
    with torch.no_grad():
        layer.router.weight.zero_()
    assert run(layer, torch.randn(1, 8, 16))[1].kept.all() and run(layer, torch.randn(1, 16, 16))[1].kept.sum() == 8


def test_choices_not_made_take_no_room():
    chosen = torch.tensor([[False, True, True]])
    assert selection.within_capacity(torch.zeros(1, 3, dtype=torch.int64), chosen, 2, limit=1).tolist() == [
        [False, True, False]
    ]


@pytest.mark.parametrize("config", [c for c in GRID if c.capacity_factor == 0.5 and not c.n_shared_expert], ids=name_of)
def test_dropped_tokens_get_an_output_of_exactly_zero(config):
    y, routing = run(layer_of(config), torch.randn(3, 11, 8))
    used = routing.kept.any(dim=-1)
    assert (y.view(33, 8)[~used] == 0).all() and (y.view(33, 8)[used].abs().sum(-1) > 0).all()
    assert not used.all() or config.expert_top_k > 1


# ---------------------------------------------------------------------------------------------------------------------
# 7. Router arithmetic


def test_top_1_router_gets_a_gradient_from_the_output():
    """One gate that is renormalised to 1 would leave the router without a gradient."""
    layer = layer_of(GRID_TOP1)
    run(layer, torch.randn(2, 11, 8))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-6


def test_router_computes_in_float32_under_autocast():
    layer = layer_of(tiny(n_expert=4, expert_top_k=2))
    x = torch.randn(2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, routing = run(layer, x)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.view(32, 16) @ layer.router.weight.t())


@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_bfloat16_autocast_stays_near_float32(backend):
    layer = layer_of(tiny(n_expert=4, expert_top_k=2, moe_backend=backend), std=0.2)
    x = torch.randn(2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(layer, x)
    torch.testing.assert_close(y, run(layer, x)[0], rtol=0.05, atol=0.02)


def test_jitter_changes_only_router_input_in_training():
    config = tiny(n_expert=4, expert_top_k=0, router_jitter=0.5, aux_loss="none")
    layer = layer_of(config)
    seen = []
    layer.experts.activate = lambda up: seen.append(up) or up
    x = torch.randn(2, 16, 16)
    _, quiet = run(layer.eval(), x)
    _, noisy = run(layer.train(), x)
    assert not torch.allclose(quiet.logits, noisy.logits) and torch.equal(seen[0], seen[1])
    assert torch.equal(run(layer.eval(), x)[1].logits, quiet.logits)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_between_experts_go_to_the_lower_index(k):
    assert selection.top_k_experts(torch.full((3, 4), 0.25), k).tolist() == [list(range(k))] * 3


@pytest.mark.parametrize("gate", sorted(selection.GATES))
@pytest.mark.parametrize("k", [1, 2])
def test_expert_dropout_keeps_losses_and_gradients_finite(k, gate):
    """Expert dropout masks most experts: losses, statistics, gates and gradients stay finite."""
    layer = layer_of(tiny(n_expert=3, expert_top_k=k, gate=gate, expert_dropout=0.9, gate_renormalize=k > 1)).train()
    y, routing = run(layer, torch.randn(4, 16, 16))
    assert routing.chosen.any(dim=-1).all() and (k == 1 or not routing.chosen.all())
    loss = y.square().sum() + sum(
        function(routing) for function in (*filter(None, balance.AUX_LOSSES.values()), balance.z_loss)
    )
    loss.backward()
    gradients = [p.grad for p in layer.parameters()]
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert math.isfinite(summary_of(routing, layer.config)["entropy"])


def test_expert_dropout_has_its_rate_in_training_and_is_off_in_evaluation():
    """Soft routing shows what is left: nothing else keeps an expert from being chosen."""
    layer = layer_of(tiny(n_expert=8, expert_top_k=0, expert_dropout=0.25, aux_loss="none"))
    x, ids = torch.randn(64, 16, 16), symbols(64, 16)
    trained, evaluated = layer.train()(x, ids)[1], layer.eval()(x, ids)[1]
    assert 1 - trained.chosen.float().mean().item() == pytest.approx(0.25, abs=0.02) and evaluated.chosen.all()
    torch.testing.assert_close(trained.gates, evaluated.gates * trained.chosen, msg="the others keep their scores")


def test_balancing_bias_does_not_restore_a_masked_expert():
    layer = layer_of(tiny(n_expert=4, expert_dropout=0.5, router_bias_rate=0.1, aux_loss="none"))
    layer.balance_bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    _, routing = run(layer.train(), torch.randn(64, 16, 16))
    assert (routing.experts == 0).float().mean().item() == pytest.approx(0.5 + 0.5**4, abs=0.05)
    assert (routing.gates > 0).all()


def test_underflowing_scores_keep_gates_and_gradients_finite():
    layer = layer_of(tiny(n_expert=4, expert_top_k=2, gate="sigmoid", router_temperature=1e-3, gate_renormalize=True))
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight.abs())
    y, routing = run(layer, -torch.rand(4, 16, 16))
    y.sum().backward()
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(64))
    assert torch.isfinite(layer.router.weight.grad).all() and math.isfinite(
        summary_of(routing, layer.config)["entropy"]
    )


# ---------------------------------------------------------------------------------------------------------------------
# 9. Auxiliary losses


def test_switch_loss_is_one_under_uniform_routing():
    experts = [[i % 4] for i in range(16)]
    assert balance.switch_loss(routing_of(experts, [[1.0]] * 16, 4)).item() == pytest.approx(1.0)


def test_switch_loss_of_a_collapsed_router_is_the_number_of_experts():
    logits = [[50.0, 0, 0, 0]] * 8
    assert balance.switch_loss(routing_of([[0]] * 8, [[1.0]] * 8, 4, logits=logits)).item() == pytest.approx(4.0)


def test_switch_loss_equals_hand_computation():
    """f = (3/4, 1/4), P = (0.6, 0.4): 2 · (0.45 + 0.1) = 1.1"""
    logits = [[math.log(0.6), math.log(0.4)]] * 4
    assert balance.switch_loss(routing_of([[0], [0], [0], [1]], [[1.0]] * 4, 2, logits=logits)).item() == pytest.approx(
        1.1
    )


def test_switch_loss_counts_choices_before_capacity():
    logits = [[1.0, 0.0]] * 4
    full = routing_of([[0]] * 4, [[1.0]] * 4, 2, logits=logits)
    dropped = routing_of([[0]] * 4, [[0.0]] * 4, 2, logits=logits, kept=[[False]] * 4)
    assert balance.switch_loss(full) == balance.switch_loss(dropped)


def test_entropy_loss_equals_hand_computation():
    """P is (3/4, 1/4), the mean of (1/2, 1/2) and (1, 0): log 2 minus its entropy. Choices and gates do not count."""
    logits = [[0.0, 0.0], [200.0, 0.0]]
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    for experts, gates in (([[0], [0]], [[1.0], [1.0]]), ([[1], [0]], [[0.2], [0.0]])):
        loss = balance.entropy_loss(routing_of(experts, gates, 2, logits=logits))
        assert loss.item() == pytest.approx(expected)


def test_entropy_loss_is_0_when_sure_tokens_are_spread_evenly():
    sure = [[50.0 * (e == i % 4) for e in range(4)] for i in range(8)]
    assert balance.entropy_loss(routing_of([[0]] * 8, [[1.0]] * 8, 4, logits=sure)).item() == pytest.approx(0, abs=1e-6)


def test_entropy_loss_of_a_collapsed_router_is_log_e_with_finite_gradients():
    logits = torch.tensor([[500.0, 0, 0, 0]] * 8, requires_grad=True)
    loss = balance.entropy_loss(routing_of([[0]] * 8, [[1.0]] * 8, 4, logits=logits))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4)) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", [name for name, function in balance.AUX_LOSSES.items() if function])
def test_balancing_loss_of_two_processes_is_that_of_their_whole_batch(name):
    """Not the mean of their losses. Tokens that do not count change nothing."""
    routing = run(layer_of(tiny(n_expert=4, expert_top_k=2)), torch.randn(2, 16, 16))[1]
    *fields, room = routing
    first, second = (selection.Routing(*(field[part] for field in fields), room) for part in (slice(16), slice(16, 32)))
    function, seen = balance.AUX_LOSSES[name], []
    function(second, lambda value: seen.append(value) or value)
    whole = function(first, lambda value: (value + seen.pop(0)) / 2)
    torch.testing.assert_close(whole, function(routing))
    torch.testing.assert_close(function(routing, weight_N=(torch.arange(32) < 16).float()), function(first))


def test_z_loss_equals_hand_computation():
    logits = [[0.0, 0.0], [math.log(3.0), 0.0]]  # logsumexp: log 2, log 4
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert balance.z_loss(routing_of([[0], [0]], [[1.0]] * 2, 2, logits=logits)).item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction, factor", [("sum", 2), ("mean", 1)])
def test_aux_losses_of_layers_are_summed_or_averaged_by_config(reduction, factor):
    routing = routing_of([[i % 4] for i in range(8)], [[1.0]] * 8, 4)
    config = tiny(n_expert=4, aux_loss_reduction=reduction, aux_loss_coef=0.5, z_loss_coef=0.0)
    losses = balance.aux_losses([routing, routing], config, torch.tensor(0.5))
    assert losses["switch"].raw.item() == pytest.approx(factor) and losses["switch"].weighted.item() == pytest.approx(
        0.5 * factor
    )
    assert losses["z"].raw > 0 and losses["z"].weighted == 0, "measured though it counts for nothing"


def test_aux_loss_with_coefficient_zero_gives_no_gradient():
    layer = layer_of(tiny(n_expert=4, aux_loss_coef=0.0))
    losses = balance.aux_losses([run(layer, torch.randn(1, 16, 16))[1]], layer.config, torch.tensor(0.0))
    assert not any(loss.weighted.requires_grad for loss in losses.values())


# ---------------------------------------------------------------------------------------------------------------------
# 8. Statistics


def stats_of(routing, config=None, symbols=None, counted=None):
    ids = torch.tensor(symbols or [[0] * len(routing.experts)])
    config = config or tiny(n_expert=routing.probs.size(1), expert_top_k=1, aux_loss="none")
    return balance.routing_stats(routing, ids, config, max(3, int(ids.max()) + 1), counted)


def summary_of(routing, config, symbols=None):
    n_tokens = len(routing.experts)
    if symbols is None:
        symbols = [[0] * config.block_size] * (n_tokens // config.block_size)
    return balance.summarize(stats_of(routing, config, symbols), in_detail=True)


def test_routing_statistics_equal_hand_computation():
    routing = routing_of(
        [[0, 1], [0, 2], [0, 1]],
        [[0.5, 0.25], [0.5, 0.0], [0.0, 0.0]],
        4,
        kept=[[True, True], [True, False], [False, False]],
    )
    summary = summary_of(routing, tiny(n_expert=4, capacity_factor=1.0, block_size=4), symbols=[[0, 2, 2]])
    assert summary["drop_rate_by_position"] == [0, 0.5, 1, None] and summary["drop_rate_by_symbol"] == [0, None, 0.75]
    assert summary["load"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert summary["dead"] == 1 and summary["tokens"] == 3
    assert summary["drop_rate"] == pytest.approx(3 / 6) and summary["gate_mass"] == pytest.approx(1.25 / 3)
    assert summary["entropy"] == pytest.approx(math.log(4))


def test_routing_statistics_skip_uncounted_tokens_and_add_up():
    routing = routing_of([[0], [1], [1]], [[1.0]] * 3, 2)
    some = stats_of(routing, counted=torch.tensor([1.0, 1.0, 0.0]))
    total = balance.add_stats(balance.add_stats(None, [some]), [stats_of(routing)])
    assert balance.summarize(some)["load"] == [0.5, 0.5] and balance.summarize(total[0])["tokens"] == 5
    assert balance.summarize(total[0])["load"] == pytest.approx([2 / 5, 3 / 5])


def test_routing_statistics_without_tokens_are_refused():
    routing = routing_of([[0]], [[1.0]], 2)
    with pytest.raises(ValueError, match="no token"):
        balance.summarize(stats_of(routing, counted=torch.tensor([0.0])))


@pytest.mark.parametrize("config", [c for c in GRID if c.capacity_factor == 0.5], ids=name_of)
def test_drop_rate_is_the_share_of_dropped_choices(config):
    _, routing = run(layer_of(config), torch.randn(3, 11, 8))
    summary = summary_of(routing, config, symbols=symbols(3, 11).tolist())
    assert summary["drop_rate"] == pytest.approx(1 - (routing.kept.sum() / routing.chosen.sum()).item(), abs=1e-6)
    assert summary["choices"] == pytest.approx(routing.chosen.sum().item() / 33)


@pytest.mark.parametrize("backend", sorted(set(backends.BACKENDS) - {"reference"}))
def test_backends_handle_more_than_255_experts(backend):
    config = tiny(n_expert=300, expert_top_k=1, expert_hidden=8, n_embd=8)
    layer = layer_of(config, moe_backend=backend)
    x = torch.randn(2, 16, 8)
    y, routing = run(layer, x)
    assert routing.experts.max() > 255
    expected = layer.experts(x.view(32, 8), routing, backends.reference).view(2, 16, 8)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The other balancing loss, initialisation, shared experts


def test_cv2_loss_equals_hand_computation():
    """Importance (3, 1): mean 2, variance 1."""
    routing = routing_of([[0], [0], [1]], [[1.0], [2.0], [1.0]], 2)
    assert balance.cv2_loss(routing).item() == pytest.approx(1 / 4)
    assert balance.cv2_loss(routing_of([[0], [1]], [[0.5], [0.5]], 2)).item() == 0


@pytest.mark.parametrize(
    "init, key, fan_in_out, fan_in_in",
    [
        ("switch", lambda fan: math.sqrt(0.1 / fan) * 0.88, 256, 64),
        ("sigma_moe", lambda fan: math.sqrt(2 / (fan * 2)), 1024, 64),
    ],
)
def test_initial_scales_follow_the_papers(init, key, fan_in_out, fan_in_in):
    """0.88 is the SD of a normal truncated at 2 of its SDs."""
    layer = new_layer(tiny(n_expert=4, n_embd=64, expert_hidden=256, expert_init=init))
    layer.init_weights(9.0, 9.0)
    assert layer.experts.w_out.std().item() == pytest.approx(key(fan_in_out), rel=0.03)
    assert layer.experts.w_in.std().item() == pytest.approx(key(fan_in_in), rel=0.03)
    if init == "sigma_moe":
        norms = layer.router.weight.norm(dim=1)
        torch.testing.assert_close(norms, norms.mean().expand(4))


def test_shared_expert_serves_dropped_tokens():
    layer = layer_of(tiny(n_expert=2, capacity_factor=0.1, n_shared_expert=1, expert_hidden=8))
    x = torch.randn(1, 16, 16)
    y, routing = run(layer, x)
    dropped = ~routing.kept.any(dim=-1)
    assert dropped.sum() >= 14
    torch.testing.assert_close(y.view(16, 16)[dropped], layer.shared(x).view(16, 16)[dropped])


def test_inner_dropout_is_off_in_evaluation():
    layer = layer_of(tiny(n_expert=4, expert_inner_dropout=0.5))
    x, ids = torch.randn(2, 16, 16), symbols(2, 16)
    assert not torch.equal(layer.train()(x, ids)[0], layer(x, ids)[0])
    assert torch.equal(layer.eval()(x, ids)[0], layer(x, ids)[0])


def test_output_masking_drops_each_choice_by_itself_and_keeps_the_mean():
    """In training, and of gates alone: loads, capacity and balancing losses see the choices as made."""
    layer = layer_of(tiny(n_expert=4, expert_top_k=2, capacity_factor=0.75, expert_output_masking=0.25))
    x, ids = torch.randn(256, 16, 16), symbols(256, 16)
    trained, evaluated = layer.train()(x, ids)[1], layer.eval()(x, ids)[1]
    masked = (trained.gates == 0) & trained.kept
    assert (masked.sum(dim=0) / trained.kept.sum(dim=0)).tolist() == pytest.approx([0.25, 0.25], abs=0.03)
    both = masked.all(dim=1).sum() / trained.kept.all(dim=1).sum()
    assert both.item() == pytest.approx(0.25**2, abs=0.015)
    torch.testing.assert_close(trained.gates, (evaluated.gates / 0.75).masked_fill(masked, 0.0))
    for field in ("logits", "probs", "experts", "chosen", "kept"):
        assert torch.equal(getattr(trained, field), getattr(evaluated, field))
    assert balance.switch_loss(trained) == balance.switch_loss(evaluated)


@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_a_masked_token_gets_exactly_the_residual_and_teaches_no_expert(backend):
    layer = layer_of(tiny(n_expert=4, expert_hidden=8, expert_output_masking=0.5, moe_backend=backend)).train()
    x = torch.randn(4, 16, 16, requires_grad=True)
    y, routing = run(layer, x)
    y.square().sum().backward()
    is_masked = (routing.gates == 0).view(4, 16)
    assert 0 < is_masked.sum() < 64
    assert torch.equal(y.any(dim=-1), ~is_masked) and torch.equal(x.grad.any(dim=-1), ~is_masked)


# ---------------------------------------------------------------------------------------------------------------------
# Collapse and balance, as the sources describe them, on a toy task


def train_toy(steps=150, seed=0, **keys):
    """One layer learns to map 8 clusters of similar vectors to random targets. -> means of the last steps' summaries.

    What the vectors have in common sends nearly all of them to one expert at first, from where collapse may begin."""
    torch.manual_seed(seed)
    config = tiny(**{"n_expert": 4, "expert_hidden": 8, "n_embd": 8, "aux_loss_coef": 0.0, **keys})
    layer = new_layer(config)
    layer.init_weights(0.3, 0.3)
    centres, targets = torch.randn(8) + 0.3 * torch.randn(8, 8), torch.randn(8, 8) * 2
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    last = []
    for step in range(steps):
        which = torch.randint(8, (4, 16))
        y, routing = layer(centres[which] + 0.1 * torch.randn(4, 16, 8), which % SYMBOLS)
        aux = balance.aux_losses([routing], config, torch.tensor(config.aux_loss_coef))
        loss = F.mse_loss(y, targets[which]) + sum(term.weighted for term in aux.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stats = balance.routing_stats(routing, which, config, 8)
        layer.update_bias(stats.load)
        if step >= steps - 20:
            last.append(balance.summarize(stats))
    return {key: sum(summary[key] for summary in last) / len(last) for key in ("load_cv2", "entropy", "dead")}


SEEDS = (0, 1, 2)


def mean_of(key, **keys):
    return sum(train_toy(seed=seed, **keys)[key] for seed in SEEDS) / len(SEEDS)


@pytest.mark.parametrize(
    "balance, most",
    [
        (dict(aux_loss_coef=1.0), 0.3),
        (dict(aux_loss="none", router_bias_rate=0.02), 0.3),
        # The gates of experts that nobody chose have no gradient, so this loss cannot bring the dead back.
        (dict(aux_loss="cv2", aux_loss_coef=1.0), 1.2),
        (dict(aux_loss="entropy", aux_loss_coef=1.0), 0.3),
    ],
    ids=["switch", "bias", "cv2", "entropy"],
)
def test_balancing_prevents_collapse_of_the_load(balance, most):
    """D: without balancing one expert gets everything (CV² = E - 1 = 3); every way of balancing brings it down."""
    assert mean_of("load_cv2") > 2 and mean_of("load_cv2", **balance) < most


def test_excessive_balancing_makes_routing_random():
    """D: too strong a loss and the router becomes essentially random. Its entropy goes to its maximum, log 4."""
    assert mean_of("entropy") < 0.3 * math.log(4) and mean_of("entropy", aux_loss_coef=10.0) > 0.95 * math.log(4)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_our_grouped_product_has_the_gradients_of_torch(is_transposed):
    """Bit for bit, and a weight's gradient lies in memory as the weight does."""
    rows = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(4, 16, 24, dtype=torch.bfloat16)
    if is_transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    weights.requires_grad_()
    offsets, gradient = torch.tensor([10, 10, 40, 64], dtype=torch.int32), torch.randn(64, 24, dtype=torch.bfloat16)
    results = []
    for product in (backends.torch_grouped_mm, backends.our_grouped_mm):
        y = product(rows, weights, offsets)
        results.append([y, *torch.autograd.grad(y, (rows, weights), gradient)])
    for theirs, ours in zip(*results):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
