"""update.py: what one update does, that nothing stays behind of it, and what can be counted of it without a clock."""

import gc
import math

import pytest
import torch
from conftest import soaked, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model import GPT
from routing import ROUTERS
from run import accounting, update
from run.settings import Config
from run.totals import RunningTotals
from support import machines

CPU = machines.choose("cpu", "float32", False)
VOCABULARY = 11
KINDS = {
    "dense": dict(),
    "moe4": dict(n_expert=4),
    "capacity": dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, gate_renormalize=True),
}
# What the compiled graph must survive: everything scheduled, drawn anew, or kept between steps.
CHANGING = {
    **KINDS,
    "linear": dict(
        n_expert=4, expert_top_k=2, expert_kind="linear_concat", gate_renormalize=True, expert_output_masking=0.2
    ),
    "random": dict(n_expert=4, router="random", aux_loss="none"),
    "bias": dict(n_expert=4, router_bias_rate=0.01, gate="sigmoid", aux_loss="none"),
    "annealed": dict(
        n_expert=4, router_temperature=3.0, router_temperature_schedule="linear", aux_loss_coef_end=0.5,
        aux_loss_coef_schedule="linear", expert_dropout=0.2, expert_dropout_schedule="cosine", dropout=0.1,
    ),
    "freeze": dict(n_expert=4, router_freeze_step=2),
    "batch": dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, capacity_group="batch"),
    "shared": dict(n_expert=4, n_shared_expert=1, router_level="segment", segment_size=5),
}  # fmt: skip


def rows(config, n=1, symbols=VOCABULARY, device="cpu"):
    """x, y of n micro-batches."""
    return torch.randint(symbols, (2, n * config.batch_size, config.block_size), device=device)


def stepper(config, machine=CPU, symbols=VOCABULARY):
    """(an Updater of a new model, a function that makes update number i as train.py does)"""
    updater = update.Updater(GPT(config, symbols).to(machine.device), config, machine)
    x, y = rows(config, config.gradient_accumulation_steps, symbols, machine.device)
    totals = RunningTotals()

    def step(i):
        updater.model.set_step(i)
        return updater.update(i, x, y, totals)

    return updater, step


# ---------------------------------------------------------------------------------------------------------------------
# One update


def test_an_update_is_that_of_adamw_by_hand():
    """Two micro-batches, a clipped gradient, and the learning rate of the step."""
    config = tiny(gradient_accumulation_steps=2, grad_clip=0.01, n_expert=4)
    updater, model = update.Updater(GPT(config, VOCABULARY), config, CPU), GPT(config, VOCABULARY)
    model.load_state_dict(updater.model.state_dict())
    x, y = rows(config, 2)
    made = updater.update(3, x, y, RunningTotals())

    groups = update.make_optimizer(model, config).param_groups
    plain = torch.optim.AdamW(groups, lr=update.learning_rate(3, config), betas=(config.beta1, config.beta2))
    for group in plain.param_groups:
        group |= {"lr": made.learning_rate, "fused": False}
    (model(x[:4], y[:4]).objective / 2 + model(x[4:], y[4:]).objective / 2).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for parameter in model.parameters():
        parameter.grad *= 0.01 / norm
    plain.step()
    assert made.learning_rate == update.learning_rate(3, config) != config.learning_rate
    assert made.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-5) and norm > 0.01
    for ours, theirs in zip(updater.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)  # AdamW divides by small roots


def test_what_is_seen_on_the_way_is_summed_and_the_same_tensors_are_kept():
    config = tiny(n_expert=4, gradient_accumulation_steps=2, learning_rate=0.0, min_lr=0.0)
    updater, totals = update.Updater(GPT(config, VOCABULARY), config, CPU), RunningTotals()
    x, y = rows(config, 2)
    updater.update(0, x, y, totals)
    kept = {id(value) for value in totals.terms.values()} | {id(value) for layer in totals.stats for value in layer}
    updater.update(1, x, y, totals)
    assert {id(value) for value in totals.terms.values()} | {
        id(value) for layer in totals.stats for value in layer
    } == kept

    out = updater.model(x, y)  # with a learning rate of 0, the model is still the same
    assert totals.steps == 2 and set(totals.terms) == {"loss", "objective", "aux_switch", "aux_z"}
    assert totals.terms["loss"].item() == pytest.approx(2 * out.loss.item(), rel=1e-5)
    assert [layer.load.tolist() for layer in totals.stats] == [(2 * layer.load).tolist() for layer in out.stats]
    assert not any(value.requires_grad for value in totals.terms.values())


NEEDED = {
    "hash_gated": dict(gate="sigmoid", aux_loss="none"),
    "expert_choice": dict(capacity_factor=1.0, aux_loss="none"),
}


@pytest.mark.parametrize("router", [name for name, kind in ROUTERS.items() if kind.is_trained])
def test_a_router_is_trained_until_its_freeze_step_and_is_then_the_same_bit_for_bit(router):
    """Under weight decay and moments that were not zero; its gradient counts in no norm; the rest trains on."""
    keys = dict(n_expert=4, router=router, weight_decay=0.5, grad_clip=0.0) | NEEDED.get(router, {})
    updater, step = stepper(tiny(router_freeze_step=3, **keys))
    model, seen, gradients = updater.model, [], []
    routers = [layer.router for layer in model.moe_layers()]
    weights = [parameter for one in routers for parameter in one.parameters()]
    for parameter in weights:
        parameter.register_hook(gradients.append)  # called after the freezing one
    for i in range(7):
        model.set_step(i)  # as the loop does before it evaluates or saves
        seen.append(([weight.clone() for weight in weights], model.norm.weight.clone()))
        gradients.clear()
        step(i)
        assert all((gradient == 0).all().item() == (i >= 3) for gradient in gradients) and gradients
    for before, after, is_frozen in zip(seen, seen[1:], [False] * 3 + [True] * 3):
        assert all(torch.equal(one, other) == is_frozen for one, other in zip(before[0], after[0], strict=True))
        assert not torch.equal(before[1], after[1])


def test_a_router_trains_as_any_other_until_its_freeze_step():
    """And its balancing loss ends with it."""
    (frozen, step), (plain, plain_step) = (stepper(tiny(n_expert=4, router_freeze_step=n, seed=3)) for n in (3, 0))
    plain.model.load_state_dict(frozen.model.state_dict(), strict=False)
    x, y = rows(tiny())
    for i in range(5):
        for updater in (frozen, plain):
            updater.model.set_step(i)
            updater.model.zero_grad()
            updater.update(i, x, y, RunningTotals())
        same = [torch.equal(a, b) for a, b in zip(frozen.model.parameters(), plain.model.parameters(), strict=True)]
        assert all(same) == (i < 3)
        assert frozen.model.aux_loss_coef.item() == pytest.approx(0.01 if i < 3 else 0.0)


def test_a_run_that_starts_with_the_weights_of_a_frozen_router_trains_it_again():
    updater, step = stepper(tiny(n_expert=4, router_freeze_step=1))
    for i in range(3):
        step(i)
    state = updater.model.state_dict()
    updater, step = stepper(tiny(n_expert=4, router_freeze_step=2))
    updater.model.load_state_dict(state)
    weight = updater.model.moe_layers()[0].router.weight
    step(0)
    moved = weight.clone()
    assert not torch.equal(moved, state["blocks.0.mlp.router.weight"])
    step(1), updater.model.set_step(2)
    kept = weight.clone()
    step(2), updater.model.set_step(3)
    assert torch.equal(weight, kept) and not torch.equal(kept, moved)


def test_an_update_trains_a_model_that_was_being_evaluated():
    config = tiny(dropout=0.5)
    updater, step = stepper(config)
    updater.model.eval()
    step(0)
    assert all(module.training for module in updater.model.modules())


def test_what_is_undone_leaves_no_gradient_and_no_mark_on_the_random_stream():
    model = GPT(tiny(dropout=0.2), VOCABULARY)
    x, y = rows(model.config)
    expected = torch.get_rng_state()
    with update.without_side_effects(model):
        model(x, y).loss.backward()
        assert not torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(torch.get_rng_state(), expected) and all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Loss or gradient not finite


def bits_of(model, optimizer):
    """Every bit of the model and of the optimiser's memory."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [value.detach().numpy().tobytes() for value in (*model.state_dict().values(), *moments)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_guard_refuses_every_update_from_the_first_bad_one(bad, where):
    config = tiny(n_expert=2, bias=True)
    model = GPT(config, 11)
    optimizer = update.make_optimizer(model, config)
    guard = update.FiniteGuard(optimizer, "cpu")

    def applied(step, bad_here=False):
        """Whether any parameter or any state of the optimiser changed."""
        before = bits_of(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        loss = torch.tensor(1.0)
        if bad_here and where == "loss":
            loss = torch.tensor(bad)
        elif bad_here:
            model.token_embedding.weight.grad[0, 0] = bad
        guard.check(step, loss, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        return bits_of(model, optimizer) != before

    assert applied(0) and applied(1)
    guard.raise_if_skipped()
    assert not applied(2, bad_here=True) and not applied(3) and not applied(4, bad_here=True)
    with pytest.raises(update.NotFinite, match="of step 2"):
        guard.raise_if_skipped()


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and optimiser


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    config = tiny(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109, max_iters=200)
    rates = [update.learning_rate(step, config) for step in range(200)]
    assert rates[0] == pytest.approx(0.1) and rates[8] == pytest.approx(0.9)
    assert rates[9] == 1.0 == max(rates)
    assert rates[59] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1) and rates[150] == rates[199] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_the_cosine_ends_at_max_iters_by_default():
    config = tiny(learning_rate=1.0, min_lr=0.1, warmup_iters=0, lr_decay_iters=0, max_iters=50)
    assert update.learning_rate(0, config) == 1.0
    assert update.learning_rate(25, config) == pytest.approx(0.55)
    assert update.learning_rate(50, config) == pytest.approx(0.1)


@pytest.mark.parametrize("decayed", [100, 99, 40])
def test_a_warm_up_that_lasts_until_lr_decay_iters_is_followed_by_min_lr(decayed):
    config = tiny(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, lr_decay_iters=decayed, max_iters=200)
    rates = [update.learning_rate(step, config) for step in range(200)]
    assert rates[99] == pytest.approx(1e-3 * 100 / 101) and rates[:100] == sorted(rates[:100])
    assert set(rates[100:]) == {1e-4}


def test_without_decay_the_learning_rate_is_constant():
    config = tiny(decay_lr=False, learning_rate=0.5, warmup_iters=100)
    assert {update.learning_rate(step, config) for step in (0, 50, 100, 10_000)} == {0.5}


def test_a_warm_up_beyond_the_end_is_no_error():
    config = tiny(learning_rate=1.0, min_lr=0.1, warmup_iters=100, max_iters=20)
    assert update.learning_rate(19, config) == pytest.approx(20 / 101)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(n_expert=4),
        dict(n_expert=4, expert_kind="linear_concat"),
        dict(n_expert=4, expert_kind="linear_sum"),
    ],
    ids=["dense", "mlp", "concat", "sum"],
)
def test_weights_decay_and_biases_and_norms_do_not(changes):
    """Stacked biases of experts are matrices by shape, and still biases."""
    model = GPT(tiny(bias=True, **changes), 11)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = update.make_optimizer(model, tiny(weight_decay=0.3)).param_groups
    grouped = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert sorted(sum(grouped, [])) == sorted(names.values())
    decayed = {name for group, members in zip(groups, grouped) for name in members if group["weight_decay"] == 0.3}
    rest = {name for group, members in zip(groups, grouped) for name in members if group["weight_decay"] == 0.0}
    assert decayed | rest == set(names.values())
    assert rest == {name for name in names.values() if "bias" in name or "norm" in name}


# ---------------------------------------------------------------------------------------------------------------------
# What can be counted without a clock: see also test_model.py, whose configs compile as one graph, also on CUDA


@pytest.mark.parametrize("kind", ["capacity", soaked("dense"), soaked("moe4")])
def test_a_step_allocates_nothing_that_stays(kind):
    """Every byte that a step takes it gives back, from the second step on (the first makes AdamW's moments)."""
    _, step = stepper(tiny(dropout=0.1, **KINDS[kind]))
    step(0)
    kept = []
    for i in range(1, 4):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(i)
        gc.collect()
        objects = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        kept.append((sum(event.self_cpu_memory_usage for event in profiler.events()), objects))
    # The profiler does not know the sizes of what was there before it: its first step is not counted.
    assert [in_bytes for in_bytes, _ in kept[1:]] == [0, 0]
    assert len({objects for _, objects in kept}) == 1


# The matrix products of E experts go through an operator that the counter does not know: its FLOPs are those of a
# product of the rows with one expert's weights, or (the weights' gradient) of the rows with each other.
GROUPED_MM = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(n_expert=4, expert_top_k=4, moe_backend="masked", aux_loss="none"),
        *(dict(n_expert=4, moe_backend=name) for name in ("reference", "sliced", "sorted")),
        dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, moe_backend="padded"),
    ],
    ids=lambda changes: changes.get("moe_backend", "dense"),
)
def test_forward_and_backward_cost_the_flops_of_the_accounting(changes):
    """torch counts the products of matrices (mm, bmm, grouped mm), in both directions; with attention in plain products
    that is the whole square, as the accounting has it. What it counts beyond is what statistics of the routing cost in
    an MoE layer: two products of (1, N) with (N, E), 4·E FLOPs a token, 0.1% here. What it does not count, and the
    accounting leaves out, is everything elementwise."""
    config = tiny(**changes)
    model = GPT(config, VOCABULARY)
    x, y = rows(config)
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED_MM)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(x, y).objective.backward()
    counted = counter.get_total_flops() / x.numel()
    statistics = 4 * config.n_expert * len(config.moe_layers)
    assert 0 <= counted - accounting.training_flops_per_token(model) <= statistics < 2e-3 * counted


@pytest.mark.parametrize("kind", CHANGING)
def test_compiled_steps_are_one_graph_that_is_made_once(kind):
    """No graph break anywhere (fullgraph), and after the trial step no recompilation, whatever a schedule moves and
    however often evaluations come between. The tracer decides that; no compiler is needed behind it."""
    torch._dynamo.reset()
    updater, step = stepper(tiny(n_layer=1, gradient_accumulation_steps=2, **CHANGING[kind]))
    x, y = rows(updater.config)
    updater.run_model = torch.compile(updater.model, backend="eager", fullgraph=True)

    def train_and_evaluate(i):
        step(i)
        updater.run_model.eval()
        with torch.no_grad():
            updater.run_model(x, y)

    train_and_evaluate(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(1, 4):
            train_and_evaluate(i)


@pytest.mark.cuda
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_cuda_waits_for_nothing_and_keeps_no_memory(kind, is_compiled):
    torch._dynamo.reset()
    config = Config(n_layer=2, batch_size=4, gradient_accumulation_steps=2, **KINDS[kind])
    updater, step = stepper(config, machines.choose("cuda"), symbols=65)
    if is_compiled:
        assert updater.compile(*rows(config, 1, 65, "cuda")).failure is None
    for i in range(3):
        step(i)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3, 6):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    updater.guard.raise_if_skipped()
