"""GPT: sizes, initialisation, causality, the cache, generation, accounting; every shipped config built and run."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import backends
import balance
from model import GPT, IGNORED, KVCache, sample, uniforms
from run import accounting, checkpoint, update
from run.accounting import dense_equal_active, dense_equal_total
from run.settings import Config
from speed import traffic
from support import configurator, machines
from support.options import options_of

ROOT = Path(configurator.__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "config").glob("*.py") if path.name != "cpu.py")
VOCABULARY = 11

KINDS = {
    "dense": dict(),
    "top1": dict(n_expert=4, expert_top_k=1),
    "top1_capacity": dict(n_expert=4, expert_top_k=1, capacity_factor=0.75),
    "top2_capacity": dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, gate_renormalize=True),
    "soft_concat": dict(n_expert=4, expert_top_k=0, expert_kind="linear_concat", aux_loss="none"),
    "concat_capacity": dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", capacity_factor=0.5),
    "sum_every_second": dict(n_expert=2, expert_top_k=1, expert_kind="linear_sum", moe_every=2, bias=True),
    "hash": dict(n_expert=4, router="hash", aux_loss="none"),
    "ngram_capacity": dict(n_expert=4, router="ngram_hash", aux_loss="none", capacity_factor=0.75),
    "random": dict(n_expert=4, router="random", aux_loss="none"),
    "expert_choice": dict(n_expert=4, router="expert_choice", capacity_factor=2.0, aux_loss="none"),
    "shared": dict(n_expert=4, expert_top_k=2, n_shared_expert=2, expert_hidden=24, z_loss_coef=0.001),
    "two_level": dict(n_expert=4, expert_top_k=2, router="two_level", gate_renormalize=True),
    "segment": dict(n_expert=4, router_level="segment", segment_size=5, capacity_factor=0.75),
    "prefix_sigmoid": dict(n_expert=4, router_level="prefix", gate="sigmoid", aux_loss="cv2", z_loss_coef=0.001),
    "shared_top_p": dict(n_expert=4, expert_top_k=3, router_top_p=0.5, n_shared_expert=1, expert_hidden=16),
    "one_set": dict(n_expert=4, share_experts=True, router_bias_rate=0.001, aux_loss="none"),
    "prior": dict(n_expert=4, router_prior=1.0, aux_loss="none"),
    "freeze": dict(n_expert=4, router_freeze_step=5),
    "one_router": dict(n_expert=4, blocks_per_router=0),
    "gated": dict(n_expert=4, router="hash_gated", gate="sigmoid", aux_loss="none"),
    "by_block": dict(n_expert=4, n_expert_by_block="4,2", expert_init="sigma_moe", gate_straight_through=True),
}


# Where a capacity or top-p decides, the accounting is an upper bound; expert choice fills its capacity.
EXACT_FLOPS = [k for k, keys in KINDS.items() if not {"capacity_factor", "router_top_p"} & keys.keys()] + [
    "expert_choice"
]
CAUSAL = [kind for kind, keys in KINDS.items() if tiny(**keys).is_causal]


def gpt(std=None, **changes):
    """A tiny GPT in eval mode, float64; std: of all its weights, large where routing should be decided."""
    model = GPT(tiny(**changes), VOCABULARY).double().eval()
    if std:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model


def tokens(*shape):
    return torch.randint(VOCABULARY, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and accounting


def test_paper_size_model_has_nanogpts_10_65_million_parameters():
    """nanoGPT counts without the 256 position embeddings."""
    counts = accounting.count_parameters(GPT(Config(), 65))
    assert (
        counts["total"] - 256 * 384 == 10_646_784
        and counts["active"] == counts["total"]
        and counts["router"] == counts["experts"] == 0
    )


def test_linear_experts_of_paper_b_add_only_router_parameters():
    dense = accounting.count_parameters(GPT(Config(), 65))["total"]
    counts = accounting.count_parameters(
        GPT(configurator.parse(Config, [str(ROOT / "config/shakespeare_top2.py")]), 65)
    )
    assert counts["total"] == dense + counts["router"] == dense + 6 * 4 * 384


def test_active_parameters_exclude_unused_experts():
    dense, counts = (
        accounting.count_parameters(GPT(tiny(), VOCABULARY)),
        accounting.count_parameters(GPT(tiny(n_expert=4, expert_top_k=1), VOCABULARY)),
    )
    assert counts["active"] == dense["total"] + counts["router"]
    assert counts["total"] == dense["total"] + counts["router"] + 3 * dense["mlp"]


@pytest.mark.parametrize("kind", EXACT_FLOPS)
def test_flops_equal_torchs_count_on_the_reference_backend(kind):
    """Backward at twice the forward, and attention over the whole square, are conventions; the forward count is
    checked."""
    model = gpt(moe_backend="reference", **KINDS[kind]).float()
    # The counter knows the matrix products of plain attention, not the fused kernel of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens(3, 16))
    assert counter.get_total_flops() * 3 == accounting.training_flops_per_token(model) * 3 * 16


@pytest.mark.parametrize("kind", ["top1", "top1_capacity", "shared_top_p", "one_set", "by_block", "soft_concat"])
def test_dense_twins_match_flops_and_parameters(kind):
    """Within half a unit of width a block, which is what rounding can leave."""
    config = tiny(**KINDS[kind])
    sizes = {"active": dense_equal_active(config), "total": dense_equal_total(config)}
    twins = {equal: GPT(tiny(mlp_hidden=hidden), VOCABULARY) for equal, hidden in sizes.items()}
    model, unit = GPT(config, VOCABULARY), 2 * 16 * config.n_layer / 2
    assert (
        abs(accounting.forward_flops_per_token(twins["active"]) - accounting.forward_flops_per_token(model)) <= 2 * unit
    )
    assert (
        abs(accounting.count_parameters(twins["total"])["total"] - accounting.count_parameters(model)["total"]) <= unit
    )


def test_flops_are_bounded_by_capacity():
    half, whole = (GPT(tiny(n_expert=4, expert_top_k=2, **keys), 9) for keys in (dict(capacity_factor=0.5), {}))
    router = 2 * 4 * 16
    mlps = [model.blocks[0].mlp.flops_per_token() - router for model in (half, whole)]
    assert mlps[0] * 2 == mlps[1]


def test_decoding_flops_grow_with_context():
    model = GPT(tiny(), 9)
    assert (
        accounting.forward_flops_per_token(model, context=10) - accounting.forward_flops_per_token(model, context=0)
        == 2 * 4 * 10 * 16
    )
    assert accounting.forward_flops_per_token(model, context=15) == accounting.forward_flops_per_token(model)


def test_experts_shared_by_layers_are_counted_once():
    own, shared = (
        accounting.count_parameters(GPT(tiny(n_expert=4, share_experts=share), 9)) for share in (False, True)
    )
    assert shared["experts"] * 2 == own["experts"] and shared["router"] == own["router"]
    assert own["total"] - own["active"] == 2 * 3 * own["experts"] // 8
    assert shared["total"] - shared["active"] == round(shared["experts"] * (3 / 4) ** 2), "each layer chooses its own"


def test_active_parameters_are_those_of_the_expected_number_of_experts():
    """Expert choice: 3 experts take 6 of 16 characters each, so that a character has 18/16 experts."""
    keys = dict(n_expert=3, router="expert_choice", aux_loss="none", expert_top_k=1, capacity_factor=1.0, block_size=16)
    counts = accounting.count_parameters(GPT(tiny(**keys), 9))
    assert counts["total"] - counts["active"] == round(counts["experts"] * (1 - 6 / 16))


@pytest.mark.parametrize("per_router, owners", [(1, [0, 1, 3, 4]), (2, [0, 0, 3, 3]), (3, [0, 0, 0, 4]), (0, [0] * 4)])
def test_consecutive_moe_blocks_share_a_router(per_router, owners):
    """Dense blocks do not count. Shared weights are counted, trained and decayed once, and computed in every block."""
    config = tiny(n_layer=5, n_expert=4, n_expert_by_block="4,4,0,4,4", blocks_per_router=per_router)
    model, own = GPT(config, VOCABULARY), GPT(dataclasses.replace(config, blocks_per_router=1), VOCABULARY)
    assert [layer.router.layer for layer in model.moe_layers()] == owners
    counts, n_routers = accounting.count_parameters(model), len(set(owners))
    assert counts["router"] == n_routers * 4 * 16
    assert accounting.forward_flops_per_token(model) == accounting.forward_flops_per_token(own)
    trained = [p for group in update.make_optimizer(model, config).param_groups for p in group["params"]]
    assert sum(any(p is layer.router.weight for layer in own_routers(model)) for p in trained) == n_routers
    assert sum(p.numel() for p in trained) == counts["total"]


def own_routers(model):
    """MoE layers with the router that they made."""
    return [layer for layer, i in zip(model.moe_layers(), model.config.moe_layers) if layer.router.layer == i]


@pytest.mark.parametrize("aux_loss", ["switch", "none"])
def test_the_gradient_of_a_shared_router_is_the_sum_over_its_blocks(aux_loss):
    """Those of routers of their own with the same weights."""
    keys = dict(n_expert=4, aux_loss=aux_loss)
    shared, own = gpt(std=0.5, **keys, blocks_per_router=0), gpt(**keys)
    own.load_state_dict(shared.state_dict())
    x, y = tokens(4, 16), tokens(4, 16)
    for model in (shared, own):
        model(x, y).objective.backward()
    parts = [layer.router.weight.grad for layer in own.moe_layers()]
    assert all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(shared.moe_layers()[0].router.weight.grad, sum(parts))


def test_a_shared_router_is_saved_once_and_restored(tmp_path):
    model, own = (gpt(std=0.5, n_expert=4, n_layer=4, blocks_per_router=n) for n in (0, 1))
    for name, one in (("shared", model), ("own", own)):
        checkpoint.save(tmp_path / name, {"model": one.state_dict()})
    saved = 3 * 4 * 16 * 8  # of three routers, float64
    assert (tmp_path / "own").stat().st_size - (tmp_path / "shared").stat().st_size > saved
    again = gpt(n_expert=4, n_layer=4, blocks_per_router=0)
    again.load_state_dict(checkpoint.load(tmp_path / "shared")["model"])
    x = tokens(2, 16)
    assert torch.equal(again(x).logits, model(x).logits)
    assert len({id(layer.router.weight) for layer in again.moe_layers()}) == 1


def test_notes_dense_configs_are_the_stated_twins():
    moe8, active, total = (
        configurator.parse(Config, [str(ROOT / f"config/text8_notes_{name}.py")])
        for name in ("moe8", "dense", "dense_total")
    )
    assert (active.mlp_hidden, total.mlp_hidden) == (dense_equal_active(moe8), dense_equal_total(moe8))
    assert not active.n_expert and not total.n_expert


def test_checkpoint_restores_scheduled_values_and_biases():
    """Temperature, coefficient, random router and balancing bias are as they were, not as at the start."""
    keys = dict(
        n_expert=4, expert_top_k=2, router_temperature_end=3.0, router_temperature_schedule="linear",
        aux_loss_coef_end=0.5, aux_loss_coef_schedule="linear", router_bias_rate=0.1,
    )  # fmt: skip
    model, again = gpt(**keys), gpt(**keys)
    model.set_step(10)
    x = tokens(2, 16)
    model.update_biases([layer.load for layer in model(x, x).stats])
    again.load_state_dict(model.state_dict())
    x = tokens(2, 16)
    ours, theirs = model(x, x), again(x, x)
    assert torch.equal(ours.logits, theirs.logits) and ours.aux["switch"] == theirs.aux["switch"]
    assert again.blocks[1].mlp.temperature == 2 and again.aux_loss_coef == pytest.approx(0.255)
    assert again.blocks[1].mlp.balance_bias.abs().max() == pytest.approx(0.1)


def test_initialisation_follows_gpt2():
    model = GPT(Config(n_layer=2, n_embd=128, n_head=4, n_expert=4), 65)
    for name, parameter in model.named_parameters():
        if "norm" in name and "embedding" not in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(4) if name.endswith(("proj.weight", "w_out", "w_mix")) else 0.02
            assert (
                parameter.std().item() == pytest.approx(expected, rel=0.1) and abs(parameter.mean().item()) < 0.003
            ), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = GPT(tiny(**KINDS[kind]), VOCABULARY)
    model(tokens(4, 16), tokens(4, 16)).loss.backward()  # cross-entropy alone must reach them all
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if not torch.isfinite(gradient).all()] == []
    assert [name for name, gradient in trained.items() if gradient.abs().max() == 0] == []


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def test_loss_is_cross_entropy_and_objective_adds_auxiliary_losses():
    model = gpt(n_expert=4, aux_loss_coef=0.5, z_loss_coef=0.25)
    x, y = tokens(3, 16), tokens(3, 16)
    out = model(x, y)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.view(-1, VOCABULARY), y.view(-1)))
    added = 0.5 * out.aux["switch"].raw + 0.25 * out.aux["z"].raw
    torch.testing.assert_close((out.objective - out.loss).float(), added.float())
    assert added > 0.9


def test_forward_calls_do_not_affect_each_other():
    model = gpt(n_expert=4, capacity_factor=1.0)
    x, y = tokens(3, 16), tokens(3, 16)
    first = model(x, y)
    model(tokens(2, 16), tokens(2, 16))
    again = model(x, y)
    assert first.objective == again.objective and torch.equal(first.stats[0].load, again.stats[0].load)


def test_ignored_targets_count_in_neither_loss_nor_statistics():
    model = gpt(n_expert=4)
    x, y = tokens(2, 16), tokens(2, 16)
    short = model(x[:1, :10], y[:1, :10])
    y[0, 10:] = y[1] = IGNORED
    padded = model(x, y)
    torch.testing.assert_close(padded.loss, short.loss)
    torch.testing.assert_close(padded.stats[1].load, short.stats[1].load)
    assert padded.stats[0].tokens == 10


LEAKY = {
    "expert_choice": KINDS["expert_choice"] | dict(z_loss_coef=0.1),
    "expert_choice, most taken": KINDS["expert_choice"] | dict(capacity_factor=4.0, z_loss_coef=0.1),
    "sequence": dict(n_expert=4, router_level="sequence", expert_top_k=2, gate_renormalize=True, z_loss_coef=0.1),
    "batch": dict(n_expert=4, capacity_factor=0.5, capacity_group="batch", z_loss_coef=0.1),
}
PADDED = [kind for kind in KINDS | LEAKY if kind != "dense"]


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", PADDED)
def test_padding_counts_in_no_loss_and_changes_no_routing(kind, is_training):
    """The loss, the auxiliary losses, the statistics and the gradients are those of the text without its padding."""
    model = gpt(std=0.5, **{**KINDS, **LEAKY}[kind], dropout=0.0).train(is_training)
    x, y = tokens(3, 16), tokens(3, 16)
    short = model(x[:1, :10], y[:1, :10])
    y[0, 10:] = y[1:] = IGNORED  # two rows of nothing else
    found = []
    for filler in (0, 7):  # as different symbols
        x[0, 10:] = x[1:] = filler
        model.zero_grad()
        padded = model(x, y)
        padded.objective.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(padded.loss, short.loss)
        torch.testing.assert_close(padded.aux, short.aux)
        for one, other in zip(padded.stats, short.stats, strict=True):
            torch.testing.assert_close(one[:6], other[:6])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", PADDED)
def test_without_padding_losses_and_gradients_are_bit_for_bit_plain_means(kind):
    """Also for a number of tokens that is no power of two, in float32."""
    model = gpt(std=0.5, **{**KINDS, **LEAKY}[kind], dropout=0.0).float()
    x, y = tokens(7, 15), tokens(7, 15)
    weighted, plain = model(x, y), model(x)
    assert torch.equal(weighted.logits, plain.logits)
    aux = balance.aux_losses(plain.routing, model.config, model.aux_loss_coef)
    assert [term.raw.item() for term in weighted.aux.values()] == [term.raw.item() for term in aux.values()]
    gradients = []
    for terms in (weighted.aux, aux):
        model.zero_grad()
        total = sum(term.raw for term in terms.values())
        if total.requires_grad:
            total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Causality and the cache


@pytest.mark.parametrize("kind", CAUSAL)
def test_later_tokens_do_not_change_earlier_logits(kind):
    model = gpt(std=0.5, **KINDS[kind])
    x = tokens(2, 16)
    logits = model(x).logits
    for t in range(15):
        changed = x.clone()
        changed[:, t + 1 :] = tokens(2, 15 - t)
        torch.testing.assert_close(model(changed).logits[:, : t + 1], logits[:, : t + 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_independent_of_other_sequences_in_the_batch(kind):
    model = gpt(std=0.5, **KINDS[kind])
    x = tokens(5, 16)
    torch.testing.assert_close(model(x[3:4]).logits, model(x).logits[3:4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", [[1] * 16, [16], [7, 1, 1, 5, 2]], ids=str)
@pytest.mark.parametrize("kind", CAUSAL)
def test_cached_logits_equal_uncached_logits(kind, pieces):
    model = gpt(std=0.5, **KINDS[kind])
    x = tokens(3, 16)
    cache = KVCache(model, 3)
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache).logits for piece in x.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(x).logits, rtol=0, atol=1e-10)


def test_more_positions_than_block_size_are_refused():
    model = gpt()
    with pytest.raises(ValueError, match="block_size is 16"):
        model(tokens(1, 17))
    cache = KVCache(model, 1)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 positions"):
        model(tokens(1, 1), cache=cache)


def test_expected_active_parameters_grow_with_tokens_up_to_all():
    model = gpt(**KINDS["top1"])
    counts = accounting.count_parameters(model)
    used = [accounting.active_parameters(model, n) for n in (1, 2, 8, 10_000)]
    assert used[0] == counts["active"] < used[1] < used[2] < used[3] == counts["total"]
    inactive = counts["total"] - counts["active"]
    assert counts["total"] - used[1] == pytest.approx(inactive * 3 / 4, abs=1), "a second token leaves 3 of 4 untouched"
    dense = gpt()
    assert (
        accounting.active_parameters(dense, 1)
        == accounting.active_parameters(dense, 99)
        == accounting.count_parameters(dense)["total"]
    )


def test_bytes_of_a_step_equal_hand_computation():
    """Dense, 2 blocks of width 16: a token caches 2 · 2 · 16 numbers."""
    model = gpt()
    total = accounting.count_parameters(model)["total"]
    assert traffic.training_bytes(model, 2) == total * (2 + 2 + 4 + 4 + 12 + 12)
    assert traffic.decoding_bytes(model, 3, 10, 4) == 4 * (total - 15 * 16 + 3 * 10 * 64), "one position's vector of 16"
    assert traffic.prefill_bytes(model, 3, 10, 2) == 2 * (total - 6 * 16 + 3 * 10 * 64)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def generated(model, prompt, count, **options):
    return torch.stack([step.tokens for step in model.generate(prompt, count, **options)], dim=1)


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_text_equals_argmax_of_the_uncached_model(kind):
    model = gpt(std=0.5, **KINDS[kind])
    x = tokens(2, 3)
    text = torch.cat((x, generated(model, x, 13, temperature=0)), dim=1)
    assert torch.equal(model(text[:, :-1]).logits[:, 2:].argmax(-1), text[:, 3:])


def test_generation_past_block_size_continues_from_the_last_half_window():
    model = gpt(std=0.5, **KINDS["top2_capacity"])
    x = tokens(1, 16)
    text = torch.cat((x, generated(model, x, 30, temperature=0)), dim=1)
    assert text.size(1) == 46
    # 16 read, then rebuilt from 8 (positions 9..16), full again after 8 more: each window starts at 9, 18, 27, ...
    start = 9
    for t in range(17, 46):
        if t - start > 16:
            start = t - 8
        assert model(text[:, start:t]).logits[0, -1].argmax() == text[0, t]


def test_prompt_longer_than_block_size_is_cut_to_its_end():
    model = gpt(std=0.5)
    x = tokens(1, 40)
    assert torch.equal(generated(model, x, 5, temperature=0), generated(model, x[:, -16:], 5, temperature=0))


def test_sample_depends_on_its_own_generator_only():
    model = gpt(std=0.3, **KINDS["top1"])
    prompt = tokens(1, 3).expand(3, -1)
    together = generated(model, prompt, 40, generators=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = generated(model, prompt[:1], 40, generators=[torch.Generator().manual_seed(6)])
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])


def test_top_k_and_temperature_narrow_the_choice():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(2000, -1)
    uniform = torch.rand(2000)

    def drawn(temperature, top_k=None):
        return sample(logits, temperature, top_k, uniform)

    assert set(drawn(1.0, top_k=2).tolist()) == {1, 2}
    assert all((drawn(*how) == 1).all() for how in ((1.0, 1), (0,), (1e-30,)))
    share = (drawn(2.0) == 1).float().mean().item()
    assert share == pytest.approx((logits[0] / 2).softmax(0)[1].item(), abs=0.05)


def test_sampling_draws_every_token_with_probability_and_no_other():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    uniform = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 2**-24])
    assert sample(logits.expand(6, -1), 1.0, None, uniform).tolist() == [1, 1, 1, 3, 3, 3]


def test_longer_text_begins_with_the_shorter_one():
    model, seed = gpt(std=0.3), torch.Generator
    short, long = (generated(model, tokens(1, 1) * 0, n, generators=[seed().manual_seed(3)]) for n in (5, 33))
    assert torch.equal(short, long[:, :5])
    assert torch.equal(uniforms(7, seed().manual_seed(3)), uniforms(1000, seed().manual_seed(3))[:7])


def test_generation_reports_the_expert_of_every_token_read():
    model = gpt(std=0.5, **KINDS["top2_capacity"])
    x = tokens(2, 5)
    steps = list(model.generate(x, 4, temperature=0))
    read = torch.cat([step.experts(1) for step in steps], dim=1)
    text = torch.cat([x] + [step.tokens[:, None] for step in steps[:-1]], dim=1)
    routing = model(text).routing[1]
    expected = [
        [int(experts[gates.argmax()]) if kept.any() else -1 for experts, gates, kept in zip(*token)]
        for token in zip(*(field.view(2, 8, 2) for field in (routing.experts, routing.gates, routing.kept)))
    ]
    assert read.tolist() == expected and (read == -1).any()


def test_soft_routing_reports_the_expert_with_the_largest_gate():
    model = gpt(std=0.5, **KINDS["soft_concat"])
    (step,) = model.generate(tokens(2, 12), 1, temperature=0)
    assert len(step.experts(0).unique()) > 1


def test_generation_refuses_invalid_requests():
    model = gpt()
    with pytest.raises(ValueError, match="temperature is -1"):
        next(model.generate(tokens(1, 2), 1, temperature=-1.0))
    with pytest.raises(ValueError, match="empty prompt"):
        next(model.generate(tokens(1, 0), 1))
    leaky = gpt(n_expert=2, capacity_factor=1.0, capacity_group="batch")
    with pytest.raises(ValueError, match="later tokens"):
        next(leaky.generate(tokens(1, 2), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Every shipped config


def structure(config):
    """{(key, value)} of what can change the code that a config runs: of numbers, whether they are 0, 1 or more."""
    keys = [name for name, option in options_of(Config).items() if option.group in ("Model", "Mixture of experts")]
    values = {key: getattr(config, key) for key in keys if key != "n_expert_by_block"}
    return {(key, min(value, 2) if isinstance(value, int) else value or 0.0) for key, value in values.items()}


SHIPPED = {path: structure(configurator.parse(Config, [str(path)])) for path in CONFIGS}
DISTINCT = list({frozenset(values): path for path, values in reversed(SHIPPED.items())}.values())[::-1]
# Few configs with every value of every key that a shipped one has.
TRACED = [
    tiny(dropout=0.2, **{"n_layer": 1, **keys})
    for keys in (
        dict(mlp_hidden=24),
        dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", capacity_factor=1.0),
        dict(n_expert=4, expert_top_k=0, expert_kind="linear_sum", aux_loss="none"),
        dict(n_expert=4, router="hash", aux_loss="none", expert_inner_dropout=0.1),
        dict(n_expert=4, router="hash_shared", router_table="even", aux_loss="none"),
        dict(n_expert=4, router_prior=1.0, router_prior_table="shared", blocks_per_router=0, router_freeze_step=5),
        dict(n_expert=4, router="hash_gated", gate="sigmoid", aux_loss="none"),
        dict(n_expert=4, router="ngram_hash", aux_loss="none", n_shared_expert=1, expert_hidden=8),
        dict(n_expert=4, router="random", router_level="sequence", aux_loss="none"),
        dict(n_expert=4, router="expert_choice", capacity_factor=1.0, aux_loss="none"),
        dict(
            n_expert=4, router="two_level", share_experts=True, n_layer=2, expert_dropout=0.1,
            aux_loss_coef_schedule="linear", router_temperature_schedule="linear",
        ),
        dict(n_expert=4, router="frozen", router_level="segment", segment_size=5, aux_loss="none"),
        dict(
            n_expert=4, expert_top_k=2, router_bias_rate=0.001, gate="sigmoid", aux_loss="none", gate_renormalize=True
        ),
        dict(n_expert=4, router_level="prefix", aux_loss="cv2", expert_init="switch", gate_straight_through=True),
        dict(
            n_expert=16, expert_top_k=4, expert_hidden=8, aux_loss="entropy", gate="sigmoid", expert_output_masking=0.1
        ),
        dict(
            n_expert=4, expert_top_k=4, router_top_p=0.5, capacity_factor=0.5, capacity_group="batch", moe_every=2,
            n_layer=2, expert_init="sigma_moe", router_jitter=0.1, z_loss_coef=0.001, bias=True, aux_loss_coef=0.001,
        ),
    )
]  # fmt: skip


def test_traced_configs_cover_every_value_of_shipped_configs():
    sizes = {"n_layer", "n_head", "n_embd", "segment_size", "aux_loss_coef"}
    missing = set().union(*SHIPPED.values()) - set().union(*map(structure, TRACED))
    assert {(key, value) for key, value in missing if key not in sizes and not isinstance(value, float)} == set()


@pytest.mark.parametrize("path", DISTINCT, ids=lambda path: path.stem)
def test_config_of_each_structure_builds_and_trains_a_step(path):
    config = configurator.parse(
        Config, [str(path), str(ROOT / "config/cpu.py"), "--n_layer=2", "--n_embd=32", "--batch_size=2"]
    )
    model = GPT(config, VOCABULARY)
    out = model(tokens(2, 64), tokens(2, 64))
    out.objective.backward()
    assert torch.isfinite(out.objective) and len(out.stats) == len(config.moe_layers)


def trace(config):
    """No graph break anywhere, forward and backward; the compiler behind the tracer is not needed for that."""
    torch._dynamo.reset()
    model, shape = GPT(config, VOCABULARY), (2, config.block_size)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens(*shape), tokens(*shape))
    out.objective.backward()
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("config", TRACED, ids=range(len(TRACED)))
def test_every_option_traces_as_one_graph(config):
    trace(config)


@pytest.mark.soak
@pytest.mark.parametrize("path", DISTINCT, ids=lambda path: path.stem)
def test_shipped_config_traces_as_one_graph(path):
    options = ["--n_layer=2", "--n_embd=32", "--batch_size=2", "--dropout=0.1", "--moe_every=2"]
    trace(configurator.parse(Config, [str(path), str(ROOT / "config/cpu.py"), *options]))


TOP1, ROOMY, TIGHT = dict(expert_top_k=1), *(dict(expert_top_k=2, capacity_factor=f) for f in (1.0, 0.5))


@pytest.mark.parametrize(
    "backend, models",
    [("masked", [TOP1]), ("sorted", [ROOMY]), ("padded", [TIGHT, ROOMY])],
    ids=["masked", "sorted", "padded"],
)
def test_compiled_cuda_backends_are_one_graph_with_eager_gradients(backend, models, monkeypatch):
    """Those of the router in float32, though the rest is bfloat16; and in one process models that differ in a number,
    a capacity too, on which shapes depend."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for keys in models:
        model = GPT(tiny(n_expert=4, moe_backend=backend, **keys), VOCABULARY)
        x, y = tokens(2, 16), tokens(2, 16)
        gradients = []
        for run_model in (model, machines.compiled(model)):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                objective = run_model(x, y).objective
            objective.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for theirs, ours in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_compiles_on_cuda_without_breaks_or_synchronisations(path):
    """At the shipped batch: Inductor chooses other kernels for other shapes, and not all of them compile."""
    torch._dynamo.reset()
    config = dataclasses.replace(configurator.parse(Config, [str(path)]), n_layer=2)
    model = GPT(config, 65).cuda()
    compiled = machines.compiled(model)
    x, y = torch.randint(65, (2, config.batch_size, config.block_size), device="cuda")

    def step(number):
        model.set_step(number)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = compiled.train()(x, y)
            out.objective.backward()
            with torch.no_grad():
                compiled.eval()(x, y)
        model.update_biases([layer.load for layer in out.stats])
        return out

    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out.loss)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", sorted(set(backends.BACKENDS) - {"reference"}))
def test_backends_equal_reference_on_cuda(backend):
    config = Config(n_layer=1, n_expert=4, expert_top_k=2, dropout=0.0)
    x, y = torch.randint(65, (2, 4, 256), device="cuda")
    results = {}
    for name in ("reference", backend):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(config, moe_backend=name), 65).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(x, y)
        out.objective.backward()
        results[name] = [out.loss.detach(), *(p.grad for p in model.parameters())]
    for ours, theirs in zip(results[backend], results["reference"]):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 1e-6
