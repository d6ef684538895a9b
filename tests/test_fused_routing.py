"""Routing in few kernels trains as the general way: twins against the model, Triton against the twins.

Without a GPU, Triton runs in its interpreter: see test_kernels.py, whose script does the same.
"""

import copy
import dataclasses
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, soaked, thorough, tiny
from interpreter import assert_no_problems_in_the_interpreter, tell_problems
from test_kernels import Compiler, error, needs_triton

import backends
from model import GPT
from run.settings import Config
from speed import fused_routing, kernels, route_kernels
from support import configurator, machines, triton_here
from support.machines import Machine

CPU = Machine(torch.device("cpu"), torch.float32, False, "")
KERNELS = ("choose_kernel", "lay_out_kernel", "spread_kernel", "route_gradients_kernel")
SHAPES = [  # N, E, K, D: one token, blocks that are not full, 1 to 64 experts, all of them, a width of two blocks
    (1, 1, 1, 8),
    (1, 4, 1, 24),
    (33, 5, 1, 24),
    (37, 2, 1, 600),
    (70, 3, 2, 40),
    (64, 8, 2, 16),
    (5, 5, 5, 8),
    (40, 64, 2, 24),
]
WAYS = [(False, False, torch.float32), (True, True, torch.float32), (False, True, torch.bfloat16)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # the interpreter does not round to bfloat16 but cuts off


# ---------------------------------------------------------------------------------------------------------------------
# The model


def sorted_config(**keys):
    return tiny(**{"n_expert": 4, "moe_backend": "sorted", **keys})


def two_ways(config, machine=CPU):
    """(a model, the same by kernels)"""
    model = GPT(config, 7)
    for layer in model.moe_layers():
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    twin = copy.deepcopy(model)
    assert fused_routing.obstacle(twin.moe_layers(), machine) is None
    fused_routing.put_kernels(twin, machine)
    return model, twin


def batch(is_padded=True):
    x, y = torch.randint(0, 7, (2, 4, 16))
    if is_padded:
        y[1, 5:] = y[2] = -1
    return x, y


def assert_same_training(model, run_twin, twin, tolerance=2e-6):
    x, y = batch()
    found = []
    for run, one in ((model, model), (run_twin, twin)):
        torch.manual_seed(1)
        out = run(x, y)
        out.objective.backward()
        terms = [out.loss, out.objective, *(value for term in out.aux.values() for value in term)]
        stats = [value for layer in out.stats for value in layer if value.numel()]
        gradients = [parameter.grad for parameter in one.parameters() if parameter.grad is not None]
        gates = [value for layer in out.routing for value in (layer.logits, layer.probs, layer.gates)]
        choices = [value for layer in out.routing for value in layer[2:7] if value is not layer.gates]
        found.append((list(out.aux), choices, terms + stats + gradients + gates))
    (names, choices, numbers), (twin_names, twin_choices, twin_numbers) = found
    assert names == twin_names
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(choices, twin_choices, strict=True))
    for a, b in zip(twin_numbers, numbers, strict=True):
        assert a.shape == b.shape and error(a.detach(), b.detach()) < tolerance


FITTING = {
    "top-1": {},
    "top-2": {"expert_top_k": 2},
    "renormalised": {"expert_top_k": 2, "gate_renormalize": True},
    "all": {"expert_top_k": 0, "aux_loss": "none"},
    "one expert": {"n_expert": 1, "aux_loss": "none"},
    "z-loss": {"z_loss_coef": 0.1, "aux_loss_reduction": "mean"},
    "temperature": {"router_temperature": 0.5, "n_expert": 5},
    "frozen": {"router": "frozen", "aux_loss": "none"},
    "dropout": {"dropout": 0.2, "expert_inner_dropout": 0.2},
    "shared": {"n_shared_expert": 1, "share_experts": True},
}


@pytest.mark.parametrize("name", FITTING)
def test_losses_statistics_and_gradients_equal_the_general_way(name):
    model, twin = two_ways(sorted_config(**FITTING[name]))
    assert_same_training(model, twin, twin)
    assert_same_training(model.eval(), twin.eval(), twin)


def test_balancing_losses_reach_the_routers_alone():
    """Their gradient comes from the sums, not through the gates."""
    model, twin = two_ways(sorted_config(z_loss_coef=0.3))
    x, y = batch()
    for one in (model, twin):
        sum(term.weighted for term in one(x, y).aux.values()).backward()
    for layer, other in zip(model.moe_layers(), twin.moe_layers()):
        assert error(other.router.weight.grad, layer.router.weight.grad) < 2e-6


def test_balancing_loss_of_several_processes_equals_the_general_way():
    """Its value is from means over all processes, its gradient from this process's tokens."""
    others_E = torch.tensor([0.4, 0.0, 0.9, 0.7])

    def batch_mean(mean):
        assert mean.is_contiguous()  # as a sum over processes needs it
        return mean + (others_E - mean).detach() / 2

    model, twin = two_ways(sorted_config(aux_loss_reduction="mean", expert_top_k=2))
    model.batch_mean = twin.batch_mean = batch_mean
    assert_same_training(model, twin, twin)


def product_with_own(rows, weights, offsets):
    """A grouped product that compiles in float32 on a CPU, which torch's does not."""
    expert_R = torch.searchsorted(offsets, torch.arange(len(rows), dtype=offsets.dtype), right=True)
    return torch.einsum("rd,re,edh->rh", rows, F.one_hot(expert_R, len(weights)).to(rows.dtype), weights)


@pytest.mark.parametrize("name", ["top-1", soaked("renormalised")])
def test_torch_compile_makes_one_graph_each_way(name, monkeypatch):
    monkeypatch.setattr(backends, "grouped_mm", product_with_own)
    torch._dynamo.reset()
    model, twin = two_ways(sorted_config(**FITTING[name]))
    assert_same_training(model, torch.compile(twin, backend="aot_eager", fullgraph=True), twin)


def test_decoding_with_a_cache_goes_the_general_way():
    model, twin = two_ways(sorted_config())
    ids = torch.randint(0, 7, (2, 5))
    steps = [list(one.eval().generate(ids, 8, temperature=0)) for one in (model, twin)]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*steps))


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"capacity_factor": 1.0}, "more than a linear"),
        ({"router": "hash", "aux_loss": "none"}, "more than a linear"),
        ({"router_level": "prefix"}, "more than a linear"),
        ({"router_bias_rate": 0.1}, "more than a linear"),
        ({"n_expert": 65}, "more than 64 experts"),
        ({"gate": "sigmoid"}, "not softmax"),
        ({"router_jitter": 0.1}, "noisy"),
        ({"expert_dropout": 0.1}, "noisy"),
        ({"expert_output_masking": 0.1}, "noisy"),
        ({"aux_loss": "cv2"}, "more than sums"),
        ({"bias": True}, "biases"),
        ({"expert_kind": "linear_concat", "expert_hidden": 16}, "not MLPs"),
        ({"moe_backend": "masked"}, "sorted rows"),
        ({"n_expert_by_block": "4,2"}, "differ in their number"),
        ({"n_expert": 0}, "no experts"),
    ],
)
def test_what_does_not_fit_keeps_the_general_way_and_says_why(keys, reason):
    model = GPT(sorted_config(**keys), 7)
    assert reason in fused_routing.obstacle(model.moe_layers(), CPU)
    assert fused_routing.use_kernels(model, CPU) == "the kernels are for CUDA"
    assert model.own_measures is None and all(layer.own_backend is None for layer in model.moe_layers())


def test_every_config_that_fits_trains_as_without_kernels():
    """Guards keys of routing to come: one that `MoE.route` knows and `obstacle` does not would differ here."""
    fitting = 0
    for path in sorted((ROOT / "config").glob("*.py")):
        if path.stem == "cpu":
            continue
        config = configurator.parse(Config, [str(path)])
        config = dataclasses.replace(config, **TINY, moe_backend="sorted", expert_hidden=0, n_expert_by_block="")
        model = GPT(config, 7)
        if not list(config.problems()) and not fused_routing.obstacle(model.moe_layers(), CPU):
            model, twin = two_ways(config)
            assert_same_training(model, twin, twin)
            fitting += 1
    assert fitting > 5


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def operator_calls(shape, way, device="cpu"):
    """(name, operator, twin, arguments) of each operator; the arguments are the twins' outputs."""
    (N, E, K, D), (renormalize, is_padded, dtype) = shape, way
    x, logits, temperature = torch.randn(1, N, D).to(dtype), torch.randn(N, E) * 0.3 * D**0.5, torch.tensor(0.7)
    real = torch.rand(N) < 0.7 if is_padded else None
    words = logits, temperature, real, K, renormalize
    probs, experts, gates, counts, sums = route_kernels.choose_twin(*words)
    yield "choose", *on(device, words)
    words = x, experts, counts, sums
    _, place, _, _ = route_kernels.lay_out_twin(*words)
    yield "lay_out", *on(device, words)
    gradient, y_rows = torch.randn(1, N, D).to(dtype), torch.randn(N * K, D).to(dtype)
    yield "spread", *on(device, (gradient, y_rows, gates, place.view(1, N, K)))
    of_gates, of_sums = torch.randn(N, K), torch.randn(3 * E + 3)
    words = logits, probs, experts, temperature, real, of_gates, of_sums, renormalize
    yield "route_gradients", *on(device, words)


def on(device, words):
    return words, [word.to(device) if isinstance(word, torch.Tensor) else word for word in words]


def wrong_on(device, shape, way):
    """Triton against the twins on the CPU, a line each."""
    for name, words, moved in operator_calls(shape, way, device):
        assert triton_here.uses_triton(moved[0])
        found, expected = getattr(route_kernels, name)(*moved), getattr(route_kernels, f"{name}_twin")(*words)
        if name == "route_gradients":
            found, expected = [found], [expected]
        for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
            limit = TOLERANCES.get(ours.dtype, 0)
            if ours.dtype != exact.dtype or not error(ours, exact) <= limit:
                yield f"{shape} {way} {name}, output {i}: {error(ours, exact):g}"


def test_operators_pass_opcheck():
    for name, words, _ in operator_calls((70, 3, 2, 40), WAYS[2]):
        torch.library.opcheck(getattr(route_kernels, name), words)


@needs_triton
@thorough(short=0, soak=1)
def test_kernels_in_the_interpreter_equal_the_twins(n):
    assert_no_problems_in_the_interpreter(__file__, n)


@needs_triton
@pytest.mark.skipif(triton_here.INTERPRETED, reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize("experts, k", [(4, 1), (route_kernels.MOST_EXPERTS, 2)])
def test_each_operator_is_one_kernel_that_compiles_for_an_h100(experts, k, monkeypatch, tmp_path):
    """At the papers' size, and with the most experts. test_count_kernels.py counts an operator as one kernel."""
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    calls = list(operator_calls((16384, experts, k, 384), (False, True, torch.bfloat16)))
    monkeypatch.setattr(route_kernels, "uses_triton", lambda x: True)
    compilers = [Compiler(getattr(route_kernels, name)) for name in KERNELS]
    for name, compiler in zip(KERNELS, compilers):
        monkeypatch.setattr(route_kernels, name, compiler)
    for name, words, _ in calls:
        getattr(route_kernels, name)(*words)
    assert [len(compiler.programs) for compiler in compilers] == [1, 1, 1, 1]
    assert [spilled(compiler.compiled[0], tmp_path / "kernel.cubin") for compiler in compilers] == [0, 0, 0, 0]
    assert min(compiler.programs[0] for compiler in compilers) >= 132  # an H100's SMs


def spilled(compiled, path):
    """Bytes of local memory of a thread, which hold what found no register."""
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (16384, 4, 1, 384)], ids=str)
def test_kernels_on_cuda_equal_the_twins(shape, way):
    assert list(wrong_on("cuda", shape, way)) == []


@pytest.mark.cuda
@needs_triton
def test_compiled_training_on_cuda_equals_the_general_way():
    machine = machines.choose("cuda", "bfloat16", True)
    config = sorted_config(device="cuda", n_embd=64, n_head=2, expert_top_k=2)
    model, twin = two_ways(config, machine)
    model, twin = model.cuda(), twin.cuda()
    x, y = (rows.cuda() for rows in batch())
    found = []
    for one in (model, twin):
        run = machines.compiled(one)
        with machine.autocast():
            out = run(x, y)
        out.objective.backward()
        found.append([out.objective, *(parameter.grad for parameter in one.parameters())])
    assert max(error(a.detach(), b.detach()) for a, b in zip(*found)) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter runs


def problems_in_the_interpreter(is_soak):
    """Differences, a line each. In short, each shape goes one way."""
    assert triton_here.INTERPRETED
    cases = itertools.product(SHAPES, WAYS) if is_soak else zip(SHAPES, itertools.cycle(WAYS[::-1]))
    for shape, way in cases:
        if not (way[0] and shape[2] == 1):  # a single gate renormalised cannot be configured
            torch.manual_seed(0)
            yield from wrong_on("cpu", shape, way)

    # Ties go to the lower index; all tokens to one expert; NaN gives experts that are there.
    for K in (1, 2, 3):
        words = torch.zeros(40, 5), torch.tensor(1.0), None, K, False
        _, experts, _, counts, sums = route_kernels.choose(*words)
        if not torch.equal(experts, torch.arange(K).expand(40, K)):
            yield f"ties, k={K}"
        _, place, offsets, _ = route_kernels.lay_out(torch.zeros(1, 40, 8), experts, counts, sums)
        if offsets.tolist() != [40 * min(e + 1, K) for e in range(5)]:
            yield f"offsets, k={K}"
        if not torch.equal(place, torch.arange(40)[:, None] + 40 * torch.arange(K)):
            yield f"place, k={K}"
    experts = route_kernels.choose(words[0] * torch.nan, *words[1:])[1]
    if not torch.equal(experts, torch.arange(3).expand(40, 3)):
        yield "NaN: experts that are none"


if __name__ == "__main__":
    tell_problems(problems_in_the_interpreter)
