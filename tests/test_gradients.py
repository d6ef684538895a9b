"""gradients.py: angles by hand; Gram matrices against the gradients themselves; nulls centred; nothing touched."""

import json
import math
import statistics
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import balance
import moe
from analysis import gradients
from analysis.gradients import SHARED, Layer, Tokens
from model import GPT, IGNORED
from selection import gates_per_expert
from support import machines

SYMBOLS = 5
CLASSES = [0, 1, 0, 1, 2]  # even, odd, the last symbol
CPU = machines.choose("cpu", "float32", False)
EXACT = dict(rel=1e-9, abs=1e-12)


def model_of(**changes):
    """In float64, with weights large enough that gradients differ, in one block unless told otherwise."""
    config = tiny(**{"n_layer": 1, "n_embd": 8, "block_size": 6, **changes})
    model = GPT(config, SYMBOLS).double()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def batches_of(count=2, sequences=3, length=6):
    text = torch.randint(SYMBOLS, (count, sequences, length + 1))
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in text]


def conflicts(model, batches, **options):
    return gradients.conflicts(model, batches, CPU, CLASSES, 3, **options)


def group_of(a, delta, sequences=None):
    """What `conflicts` says of tokens with these inputs and errors of one linear layer."""
    layers = [Layer(torch.tensor(a, dtype=torch.float64), torch.tensor(delta, dtype=torch.float64))]
    n = len(a)
    sequences = torch.arange(n) if sequences is None else torch.tensor(sequences)
    tokens = Tokens(None, None, None, sequences, torch.zeros(n, dtype=torch.int64))
    return gradients.similarity(0, n, layers, tokens, n, 1, 20, torch.Generator().manual_seed(0)).group


# ---------------------------------------------------------------------------------------------------------------------
# Angles by hand


@pytest.mark.parametrize(
    "a, delta, expected",
    [
        ([[1, 2], [2, 4]], [[3], [1]], 1),  # one direction, whatever the sizes
        ([[1, 2], [-2, 1]], [[3], [1]], 0),  # inputs at a right angle
        ([[1, 2], [1, 2]], [[3, 0], [0, 1]], 0),  # errors at a right angle
        ([[1, 2], [1, 2]], [[3], [-1]], -1),  # one input, opposite errors
        ([[1, 2], [-1, -2]], [[3], [-1]], 1),  # both opposite: one gradient again
        ([[1, 0], [1, 1]], [[1, 0], [1, 1]], 0.5),
    ],
)
def test_two_tokens_of_a_linear_layer(a, delta, expected):
    group = group_of(a, delta)
    assert (group["cosine"], group["cosine_between_sequences"]) == pytest.approx((expected, expected), abs=1e-15)
    assert group["error"] is None  # two sequences tell none


def test_cosine_between_sequences_uses_pairs_of_different_sequences_only():
    group = group_of([[1.0]] * 4, [[1.0], [1.0], [-1.0], [-1.0]], sequences=[0, 0, 1, 1])
    assert group["cosine"] == pytest.approx(-1 / 3)
    assert group["cosine_between_sequences"] == pytest.approx(-1)
    assert group_of([[1.0]] * 2, [[1.0]] * 2, sequences=[1, 1])["cosine_between_sequences"] is None


def test_chance_is_the_cosine_with_shuffled_errors():
    inputs = torch.randn(30, 4).tolist()
    same_error = group_of(inputs, [[1.0, 2.0]] * 30)
    assert same_error["chance"]["mean"] == pytest.approx(same_error["cosine"], **EXACT)
    assert same_error["chance"]["sd"] < 1e-12
    kinds = [[1.0, 0.0], [0.0, 1.0]] * 30  # like inputs have like errors: half of the pairs agree, not a quarter
    together = group_of(kinds, kinds)
    assert together["cosine"] == pytest.approx(29 / 59)
    assert together["chance"]["mean"] == pytest.approx((29 / 59) ** 2, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Against the gradients themselves

MODELS = {
    "dense": {},
    "dense, biases": {"bias": True},
    "top-1": {"n_expert": 3, "expert_top_k": 1},
    "top-1, biases": {"n_expert": 3, "expert_top_k": 1, "bias": True},
    "top-2": {"n_expert": 3, "expert_top_k": 2},
    "top-2, capacity": {"n_expert": 3, "expert_top_k": 2, "capacity_factor": 0.5, "bias": True},
    "sigmoid": {"n_expert": 3, "expert_top_k": 2, "gate": "sigmoid", "bias": True},
    "soft": {"n_expert": 3, "expert_top_k": 0, "aux_loss": "none"},
    "one expert": {"n_expert": 1, "expert_top_k": 1},
    "expert choice": {"n_expert": 3, "router": "expert_choice", "capacity_factor": 1.0, "aux_loss": "none"},
    "linear_concat": {"n_expert": 2, "expert_top_k": 1, "expert_kind": "linear_concat", "bias": True},
    "shared": {"n_expert": 3, "expert_top_k": 1, "n_shared_expert": 1, "bias": True},
    "hash": {"n_expert": 2, "expert_top_k": 1, "router": "hash", "aux_loss": "none"},
    "two blocks": {"n_layer": 2, "n_expert": 2, "expert_top_k": 1},
}
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def explicit(model, batches):
    """[{group: (n, P) each token's gradient}] of the blocks' MLPs, and its sequence: every token has its own copy of
    the weights, and autograd does the rest."""
    found = [{} for _ in model.blocks]
    for number, (x, y) in enumerate(batches):
        copies = [own_weights(block.mlp, x.numel()) for block in model.blocks]
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")
        of_all = torch.autograd.grad(loss, [copy for groups in copies for copy in groups.values()])
        sequence = number * len(x) + torch.arange(len(x)).repeat_interleave(x.size(1))
        of_all = iter(of_all)
        for block, groups in zip(found, copies):
            for name in groups:
                block.setdefault(name, []).append((next(of_all), sequence))
    for block in model.blocks:  # as they were
        for module in block.mlp.modules():
            module.__dict__.pop("forward", None)
    return [{name: tuple(torch.cat(parts) for parts in zip(*of)) for name, of in groups.items()} for groups in found]


def own_weights(mlp, n):
    """{group: (n, P) a copy of its parameters for each token}; the layer computes with these from now on."""
    if not isinstance(mlp, moe.MoE):
        return {None: give_own_weights(mlp, n)}
    experts, copies = mlp.experts, {}
    shapes = {
        name: getattr(experts, name)[0].shape for name in experts.per_expert if getattr(experts, name) is not None
    }
    for e in range(experts.w_in.size(0)):
        flat = torch.cat([getattr(experts, name)[e].detach().flatten() for name in shapes])
        copies[e] = flat.repeat(n, 1).requires_grad_()

    def forward(self, x_ND, routing, backend):
        gates, y = gates_per_expert(routing), 0
        for e, flat in copies.items():
            if isinstance(e, int):
                parts = flat.split([shape.numel() for shape in shapes.values()], dim=1)
                own = {name: part.view(n, *shape) for (name, shape), part in zip(shapes.items(), parts)}
                up = torch.einsum("nhd,nd->nh", own["w_in"], x_ND) + own.get("bias_in", 0)
                gate = gates[:, e, None]
                if isinstance(self, moe.LinearConcatExperts):
                    y = y + torch.einsum("nhd,nh->nd", own["w_out"], F.gelu(gate * up))
                else:
                    out = torch.einsum("nhd,nh->nd", own["w_out"], F.gelu(up)) + own.get("bias_out", 0)
                    y = y + gate * out
        if isinstance(self, moe.LinearConcatExperts) and self.bias_out is not None:
            y = y + self.bias_out
        return y

    experts.forward = types.MethodType(forward, experts)
    if mlp.shared is not None:
        copies[SHARED] = give_own_weights(mlp.shared, n)
    return copies


def give_own_weights(mlp, n):
    parameters = dict(mlp.named_parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    copy = flat.repeat(n, 1).requires_grad_()

    def forward(x_BTD):
        parts = copy.split([parameter.numel() for parameter in parameters.values()], dim=1)
        own = {name: part.view(n, *p.shape) for (name, p), part in zip(parameters.items(), parts)}
        hidden = torch.einsum("nhd,nd->nh", own["fc.weight"], x_BTD.flatten(0, 1)) + own.get("fc.bias", 0)
        y = torch.einsum("ndh,nh->nd", own["proj.weight"], F.gelu(hidden)) + own.get("proj.bias", 0)
        return y.view_as(x_BTD)

    mlp.forward = forward
    return copy


@every_model
def test_gram_matrices_equal_per_token_gradients_of_autograd(changes):
    model, batches = model_of(**changes), batches_of()
    expected = explicit(model, batches)
    found = conflicts(model, batches, limit=1000)
    for block, of in zip(found, expected):
        shared = of.pop(SHARED, None)
        assert (block["shared"] is None) == (shared is None)
        groups = [(block["shared"], shared)] if shared else []
        assert [group and group["expert"] for group in block["groups"]] == [
            None if len(rows[rows.any(dim=1)]) < 2 else name for name, (rows, _) in of.items()
        ]
        groups += [(group, rows) for group, rows in zip(block["groups"], of.values()) if group]
        assert groups
        for group, (rows, sequence) in groups:
            moves = rows.any(dim=1)
            rows, sequence = rows[moves], sequence[moves]
            n, cosines = len(rows), F.normalize(rows) @ F.normalize(rows).t()
            pairs = ~torch.eye(n, dtype=torch.bool)
            between = sequence[:, None] != sequence
            assert group["compared"] == group["tokens"] == n
            assert group["cosine"] == pytest.approx(cosines[pairs].mean().item(), **EXACT)
            assert group["cosine_between_sequences"] == pytest.approx(cosines[between].mean().item(), **EXACT)


SHARING = {"share_experts": {"n_layer": 2, "n_expert": 2, "expert_top_k": 1, "share_experts": True, "bias": True}}


@pytest.mark.parametrize("changes", [*MODELS.values(), *SHARING.values()], ids=[*MODELS, *SHARING])
def test_token_gradients_sum_to_the_parameter_gradient(changes):
    model, batches = model_of(**changes), batches_of(count=2)
    if model.config.is_causal:  # the last batch is padded, as at the end of a split
        batches[1][1][-1, 2:] = IGNORED
        batches[1][0][-1, 3:] = 0
    for x, y in batches:
        (model(x, y).loss * (y != IGNORED).sum()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if ".mlp." in name}
    _, groups = gradients.collect_tokens(model, batches, CPU, torch.tensor(CLASSES), 1000, torch.Generator())
    found = {}
    for i, (block, of) in enumerate(zip(model.blocks, groups)):
        for name, tokens in of.items():
            is_expert = isinstance(name, int)
            places = ("w_in", "bias_in", "w_out", "bias_out") if is_expert else (
                "fc.weight", "fc.bias", "proj.weight", "proj.bias",
            )  # fmt: skip
            first, second = gradients.linear_layers(block.mlp, name, tokens)
            D, H = tokens.x_ND.size(1), first.delta.size(1)
            sums = [first.delta.t() @ first.a, second.delta.t() @ second.a]
            parts = [sums[0][:, :D], sums[0][:, D:].flatten(), sums[1][:, :H], sums[1][:, H:].flatten()]
            if is_expert:
                parts[2] = parts[2].t()
            where = "experts." if is_expert else "shared." if name == SHARED else ""
            owner = 0 if is_expert and model.config.share_experts else i
            for place, part in zip(places, parts):
                key = f"blocks.{owner}.mlp.{where}{place}", name if is_expert else None
                if part.numel():
                    found[key] = found.get(key, 0) + part
    assert found
    for (name, e), value in found.items():
        torch.testing.assert_close(value, expected[name] if e is None else expected[name][e], rtol=1e-9, atol=1e-12)
    left_out = set(expected) - {name for name, _ in found}
    assert all("router" in name or name.endswith("experts.bias_out") for name in left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Groups, classes, errors


def test_error_is_the_jackknife_over_sequences():
    model, batches = model_of(), batches_of(count=2)
    ((rows, sequence),) = explicit(model, batches)[0].values()
    cosines = F.normalize(rows) @ F.normalize(rows).t()

    def without(s):
        kept = sequence != s
        return cosines[kept][:, kept][(sequence[:, None] != sequence)[kept][:, kept]].mean().item()

    values = [without(s) for s in range(6)]
    expected = math.sqrt(5 / 6 * sum((value - statistics.fmean(values)) ** 2 for value in values))
    (block,) = conflicts(model, batches, limit=1000)
    assert block["groups"][0]["error"] == pytest.approx(expected, rel=1e-9)
    for key in ("cosine", "cosine_between_sequences", "error", "chance", "tokens"):
        assert block["mean"][key] == pytest.approx(block["groups"][0][key])


def test_mean_weighs_experts_by_tokens_served():
    (block,) = conflicts(model_of(n_expert=3, expert_top_k=1), batches_of(count=4), limit=1000)
    groups = [group for group in block["groups"] if group]
    assert len(groups) > 1 and block["mean"]["tokens"] == sum(group["tokens"] for group in groups)
    mean = sum(group["tokens"] * group["cosine"] for group in groups) / block["mean"]["tokens"]
    assert block["mean"]["cosine"] == pytest.approx(mean)
    sd = math.hypot(*(group["tokens"] * group["chance"]["sd"] for group in groups)) / block["mean"]["tokens"]
    assert block["mean"]["chance"]["sd"] == pytest.approx(sd)


def test_cosines_within_and_between_classes():
    model, batches = model_of(), batches_of(count=4)
    batches = [(x.where(x != 4, 0), y) for x, y in batches]
    batches[0][0][0, :3] = 4  # three tokens of the last class: too few
    ((rows, sequence),) = explicit(model, batches)[0].values()
    cosines = F.normalize(rows) @ F.normalize(rows).t()
    kind = torch.tensor(CLASSES)[torch.cat([x.flatten() for x, _ in batches])]
    (block,) = conflicts(model, batches, limit=1000)
    for i in range(3):
        for j in range(3):
            value = block["classes"][i][j]
            pairs = (kind[:, None] == i) & (kind == j) & (sequence[:, None] != sequence)
            expected = None if 2 in (i, j) else cosines[pairs].mean().item()
            assert value == (expected if expected is None else pytest.approx(expected, **EXACT))


def test_tokens_beyond_the_limit_are_sampled_from_all_batches_by_seed():
    model, batches = model_of(n_expert=2, expert_top_k=1), batches_of(count=4)
    batches[3][1][:] = IGNORED
    (block,) = conflicts(model, batches, limit=20)
    assert all(group["compared"] <= 20 < group["tokens"] for group in block["groups"])
    assert sum(group["tokens"] for group in block["groups"]) == 54
    torch.manual_seed(5)
    assert conflicts(model, batches, limit=20) == [block]
    assert conflicts(model, batches, limit=20, seed=1) != [block]


def test_linear_sum_has_no_groups():
    (block,) = conflicts(model_of(n_expert=2, expert_top_k=1, expert_kind="linear_sum"), batches_of())
    assert block["kind"] == "experts"
    assert (block["groups"], block["shared"], block["mean"], block["classes"]) == ([], None, None, None)


def test_an_expert_without_tokens_is_none():
    model = model_of(n_expert=4, expert_top_k=1, router="hash", aux_loss="none")
    model.blocks[0].mlp.router.table.clamp_(max=1)
    (block,) = conflicts(model, batches_of(), limit=1000)
    assert [group is None for group in block["groups"]] == [False, False, True, True]
    assert block["mean"]["tokens"] == 36


# ---------------------------------------------------------------------------------------------------------------------
# Routers


def test_switch_loss_gradient_by_hand():
    model, batches = model_of(n_expert=3, expert_top_k=1, aux_loss_coef=0.02), batches_of(count=3)
    (layer,) = gradients.router_gradients(model, batches, CPU)
    cosines, norms = [], []
    for x, y in batches:
        inputs = []
        hook = model.blocks[0].norm_mlp.register_forward_hook(lambda module, x, out, to=inputs: to.append(out))
        out = model(x, y)
        hook.remove()
        probs, share = out.routing[0].probs, out.stats[0].load / 18
        slope = 3 / 18 * probs * (share - (probs @ share)[:, None])  # d(E Σ f P) / d logits
        by_hand = slope.t() @ inputs[0].flatten(0, 1)
        model.zero_grad()
        out.loss.backward()
        ours = model.blocks[0].mlp.router.weight.grad
        cosines.append(((ours * by_hand).sum() / ours.norm() / by_hand.norm()).item())
        norms.append((ours.norm().item(), by_hand.norm().item()))
    assert layer["cosines"] == pytest.approx(cosines, **EXACT)
    assert (layer["block"], layer["loss"], layer["n"]) == (0, "switch", 3)
    assert layer["cosine"] == pytest.approx(statistics.fmean(cosines))
    half = 4.302652729911275 * statistics.stdev(cosines) / math.sqrt(3)  # t, 2 degrees of freedom
    assert layer["high"] - layer["cosine"] == pytest.approx(half)
    means = [statistics.fmean(norm) for norm in zip(*norms)]
    assert (layer["norm_cross_entropy"], layer["norm_balance"]) == pytest.approx(tuple(means), rel=1e-9)
    assert layer["ratio"] == pytest.approx(0.02 * means[1] / means[0], rel=1e-6)  # the coefficient is float32


@pytest.mark.parametrize("reduction, per_router", [("sum", 1), ("mean", 1), ("sum", 2)])
@pytest.mark.parametrize("aux_loss", ["switch", "cv2", "entropy", "none"])
def test_balancing_loss_is_the_models_own_over_all_layers(aux_loss, reduction, per_router):
    keys = dict(aux_loss=aux_loss, aux_loss_reduction=reduction, blocks_per_router=per_router)
    model = model_of(n_layer=2, n_expert=3, expert_top_k=1, **keys)
    ((x, y),) = batches = batches_of(count=1)
    found = gradients.router_gradients(model, batches, CPU)
    out = model(x, y)
    raw = sum(map(balance.switch_loss, out.routing)) / (2 if reduction == "mean" else 1)
    (raw if aux_loss == "none" else out.aux[aux_loss].raw).backward()
    for layer, block in zip(found, model.blocks):
        assert layer["norm_balance"] == pytest.approx(block.mlp.router.weight.grad.norm().item(), **EXACT)
        assert layer["loss"] == ("switch" if aux_loss == "none" else aux_loss)
        assert (layer["coefficient"] == 0) == (layer["ratio"] == 0) == (aux_loss == "none")
        assert layer["low"] is layer["high"] is None  # one batch


@pytest.mark.parametrize("angle", [0, 90, 180])
def test_angles_between_a_routers_gradients(angle):
    ours = torch.randn(4, 3, 10, dtype=torch.float64)
    turned = {0: 2 * ours, 90: ours @ quarter_turn(10), 180: -3 * ours}[angle]
    found = gradients.compare_pulls(list(zip(ours, turned)), 0.5, 50, torch.Generator().manual_seed(0))
    assert found["cosines"] == pytest.approx([math.cos(math.radians(angle))] * 4, abs=1e-12)
    assert found["ratio"] == pytest.approx({0: 1.0, 90: 0.5, 180: 1.5}[angle])
    if angle != 90:
        assert found["low"] == pytest.approx(found["high"], abs=1e-9)


def quarter_turn(size):
    """An orthogonal, antisymmetric matrix: at a right angle to whatever it turns."""
    turn = torch.zeros(size, size, dtype=torch.float64)
    for i in range(0, size, 2):
        turn[i, i + 1], turn[i + 1, i] = 1, -1
    return turn


def test_controls_are_centred_and_cover_unrelated_gradients():
    generator = torch.Generator().manual_seed(0)
    inside = {"features": 0, "experts": 0}
    for _ in range(200):
        pairs = [(centred(torch.randn(6, 40)), centred(torch.randn(6, 40))) for _ in range(2)]
        found = gradients.compare_pulls(pairs, 1.0, 100, generator)
        for name, of in inside.items():
            null = found["chance"][name]
            assert abs(null["mean"]) < 5 * null["sd"] / math.sqrt(100) + 1e-3
            inside[name] = of + (null["low"] <= found["cosine"] <= null["high"])
    assert all(0.88 <= count / 200 <= 0.99 for count in inside.values()), inside


def centred(gradient):
    """As behind a LayerNorm and a softmax: rows and columns add up to 0."""
    gradient = gradient.double() - gradient.double().mean(dim=0)
    return gradient - gradient.mean(dim=1, keepdim=True)


def test_a_common_direction_is_outside_the_features_control_and_inside_the_experts_control():
    """Why the first null is too narrow for a claim: two losses that share no more than the mean input."""
    generator = torch.Generator().manual_seed(0)
    inside = {"features": 0, "experts": 0}
    for _ in range(100):
        mean_input = torch.randn(1, 40)
        pairs = [(centred(torch.randn(6, 1) * mean_input), centred(torch.randn(6, 1) * mean_input))]
        found = gradients.compare_pulls(pairs, 1.0, 200, generator)
        for name in inside:
            null = found["chance"][name]
            inside[name] += null["low"] <= found["cosine"] <= null["high"]
    assert inside["features"] < 10 and 88 <= inside["experts"] <= 99, inside


@pytest.mark.parametrize(
    "changes",
    [
        {"n_expert": 3, "router": "frozen", "aux_loss": "none"},
        {"n_expert": 3, "router": "random", "aux_loss": "none"},
        {"n_expert": 3, "router": "hash", "aux_loss": "none"},
        {"n_expert": 1},
        {"n_expert": 3, "expert_top_k": 0, "aux_loss": "none"},
        {"n_expert": 3, "router": "expert_choice", "capacity_factor": 1.0, "aux_loss": "none"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_router_without_a_gradient_has_no_cosine(changes):
    model = GPT(tiny(**{"expert_top_k": 1, **changes}), SYMBOLS)
    assert gradients.router_gradients(model, batches_of(length=16), CPU) == [None, None]


def test_two_level_and_uneven_blocks_have_one():
    two_level = model_of(n_expert=4, expert_top_k=1, router="two_level")
    assert -1 <= gradients.router_gradients(two_level, batches_of(), CPU)[0]["cosine"] <= 1
    uneven = model_of(n_layer=3, n_expert=3, n_expert_by_block="0,1,3", expert_top_k=1)
    found = gradients.router_gradients(uneven, batches_of(), CPU)
    assert found[0] is None and found[1]["block"] == 2


def test_a_dense_model_has_no_routers():
    assert gradients.router_gradients(model_of(), batches_of(), CPU) == []


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is touched


def both(model, batches):
    return gradients.router_gradients(model, batches, CPU, draws=5), conflicts(model, batches, draws=3)


@pytest.mark.parametrize(
    "changes", [{}, {"n_expert": 3, "expert_top_k": 2, "n_shared_expert": 1}], ids=["dense", "moe"]
)
def test_the_model_is_left_unchanged(changes):
    model, batches = model_of(n_layer=2, dropout=0.3, **changes), batches_of()
    model.train()
    model.position_embedding.weight.requires_grad_(False)
    model.norm.weight.grad = torch.full_like(model.norm.weight, 7)

    def state():
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
            {name: p.requires_grad for name, p in model.named_parameters()},
            {name: len(module._forward_hooks) for name, module in model.named_modules()},
            torch.random.get_rng_state(),
        )

    before = state()
    with torch.no_grad():  # as a caller may have it
        both(model, batches)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


def test_hooks_are_removed_after_an_error():
    model = model_of()
    with pytest.raises(ValueError, match="positions"):
        conflicts(model, batches_of(length=99))
    assert not model.blocks[0].mlp._forward_hooks


def test_no_dropout_jitter_or_masked_expert_is_measured():
    model, batches = model_of(n_expert=3, expert_top_k=2), batches_of()
    noisy = {"dropout": 0.5, "expert_inner_dropout": 0.5, "router_jitter": 0.5, "expert_dropout": 0.5}
    other = model_of(n_expert=3, expert_top_k=2, **noisy)
    other.load_state_dict(model.state_dict())
    assert both(other.train(), batches) == both(model, batches)


@every_model
def test_results_are_plain_json_values(changes):
    model, batches = model_of(**changes), batches_of()
    found = both(model, batches)
    assert json.loads(json.dumps(found, allow_nan=False)) == list(found)
    assert both(model, []) is not None


@pytest.mark.cuda
@every_model
def test_cuda_agrees_and_bfloat16_works(changes):
    model, batches = model_of(**changes), batches_of()
    expected = conflicts(model, batches, limit=1000)
    model.cuda()
    on_gpu = [(x.cuda(), y.cuda()) for x, y in batches]
    found = conflicts(model, on_gpu, limit=1000)
    for ours, theirs in zip(found, expected):
        for key in ("cosine", "cosine_between_sequences", "error"):
            assert ours["mean"][key] == pytest.approx(theirs["mean"][key], rel=1e-6)
    half = machines.choose("cuda", "auto", False)
    model.float()
    gradients.router_gradients(model, on_gpu, half)
    assert json.dumps(gradients.conflicts(model, on_gpu, half, CLASSES, 3), allow_nan=False)
