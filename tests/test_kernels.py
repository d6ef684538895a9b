"""The kernels for a few tokens: the twins against float64 and `moe.py`, Triton against the twins.

Without a GPU, Triton runs in its interpreter, which must be asked for before it is imported: the checks at the end of
this file are a script that one test runs. That the kernels compile is shown without a GPU too.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import thorough, tiny
from interpreter import assert_no_problems_in_the_interpreter, tell_problems

import backends
import moe
from speed import kernels
from support import triton_here

GATES = ["softmax", "sigmoid"]
SHAPES = [  # N, E, K, D, H: K of 1, 2 and E; no more choices than experts, and more; widths that fill no block
    (1, 4, 1, 24, 40),
    (1, 8, 2, 40, 100),
    (1, 5, 5, 24, 40),
    (3, 4, 1, 100, 24),
    (3, 3, 3, 40, 40),
    (33, 4, 1, 24, 100),
    (33, 4, 2, 100, 40),
    (2, 1, 1, 24, 24),
]
needs_triton = pytest.mark.skipif(not triton_here.AVAILABLE, reason="needs Triton")


def tokens_of(N, E, K, D, H, dtype=torch.float32):
    """x, w_in, bias_in, w_out, experts, gates: every third choice is dropped."""
    x, w_in, bias, w_out = (
        (torch.randn(shape) * size).to(dtype)
        for shape, size in [((N, D), 1), ((E, H, D), D**-0.5), ((E, H), 1), ((E, H, D), (H * K) ** -0.5)]
    )
    experts = torch.rand(N, E).argsort(dim=1)[:, :K].contiguous()
    gates = torch.rand(N, K) + 0.1
    gates.view(-1)[1::3] = 0
    return x, w_in, bias, w_out, experts, gates


def exact_up(x, w_in, bias, experts, gates, gate_first):
    hidden = torch.zeros(*experts.shape, w_in.size(1), dtype=torch.float64)
    for n, k in itertools.product(*map(range, experts.shape)):
        e, gate = experts[n, k].item(), gates[n, k].double()
        if gate:
            y = w_in[e].double() @ x[n].double() + (0 if bias is None else bias[e].double())
            y = y * gate if gate_first else y
            hidden[n, k] = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    return hidden


def exact_down(hidden, w_out, experts, gates, gate_last):
    y = torch.zeros(len(experts), w_out.size(2), dtype=torch.float64)
    for n, k in itertools.product(*map(range, experts.shape)):
        gate = gates[n, k].double()
        if gate:
            y[n] += hidden[n, k].double() @ w_out[experts[n, k].item()].double() * (gate if gate_last else 1)
    return y


def exact_route(x, weight, k, gate, renormalize, temperature):
    logits = x.double() @ weight.double().t()
    cooled = logits / temperature.double()
    scores = cooled.exp() / cooled.exp().sum(1, keepdim=True) if gate == "softmax" else 1 / (1 + (-cooled).exp())
    order = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k] for row in cooled.tolist()]
    experts = torch.tensor([sorted(row) if k == logits.size(1) else row for row in order])
    gates = scores.gather(1, experts)
    gates = gates / gates.sum(1, keepdim=True) if renormalize else gates
    return logits, scores / scores.sum(1, keepdim=True), experts, gates


def error(found, expected):
    """The largest error, relative to the largest number that was expected."""
    found, expected = found.cpu().double(), expected.cpu().double()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_same_routing(found, expected, tolerance=2e-6):
    assert torch.equal(found[2], expected[2])
    for name, i in (("logits", 0), ("probs", 1), ("gates", 3)):
        assert found[i].dtype == torch.float32 and found[i].is_contiguous()
        assert error(found[i], expected[i]) < tolerance, name


# ---------------------------------------------------------------------------------------------------------------------
# The twins


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_twin_of_route_equals_float64_computation(shape, gate, renormalize):
    N, E, K, D, _ = shape
    words = torch.randn(N, D), torch.randn(E, D) * 0.3, K, gate, renormalize, torch.tensor(0.7)
    assert_same_routing([z.contiguous() for z in kernels.route_twin(*words)], exact_route(*words))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twins_of_up_and_down_equal_float64_computation(shape, bias):
    x, w_in, bias_in, w_out, experts, gates = tokens_of(*shape)
    bias_in = bias_in if bias else None
    for flag in (False, True):
        words = x, w_in, bias_in, experts, gates, flag
        hidden = kernels.up_twin(*words)
        assert error(hidden, exact_up(*words)) < 2e-6
        hidden[gates == 0] = math.nan
        words = hidden, w_out, experts, gates, flag
        assert error(kernels.down_twin(*words), exact_down(*words)) < 2e-6


def test_twins_in_bfloat16_are_within_its_rounding():
    x, w_in, bias_in, w_out, experts, gates = tokens_of(33, 4, 2, 100, 40, torch.bfloat16)
    for flag in (False, True):
        hidden = kernels.up_twin(x, w_in, bias_in, experts, gates, flag)
        y = kernels.down_twin(hidden, w_out, experts, gates, flag)
        assert hidden.dtype == y.dtype == torch.bfloat16
        assert error(hidden, exact_up(x, w_in, bias_in, experts, gates, flag)) < 2**-7
        assert error(y, exact_down(hidden, w_out, experts, gates, flag)) < 2**-7


def layer_of(**keys):
    layer = moe.MoE(tiny(aux_loss="none", **keys).of_block(0), layer=0, symbol_counts=torch.ones(7)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n_expert, k", [(4, 1), (4, 2), (4, 0), (3, 3), (1, 1)])
@pytest.mark.parametrize("router", ["learned", "frozen"])
def test_route_equals_the_layers_routing(router, n_expert, k, gate, renormalize):
    if k == 1 and renormalize:
        pytest.skip("cannot be configured: the gate would always be 1")
    keys = dict(router=router, n_expert=n_expert, expert_top_k=k, gate=gate, gate_renormalize=renormalize)
    layer = layer_of(router_temperature=0.7, **keys)
    x = torch.randn(3, 11, 16)
    expected = layer.route(x, torch.zeros(3, 11, dtype=torch.int64))
    weight = layer.router.weight
    found = kernels.route(x.view(33, 16), weight, k or n_expert, gate, renormalize, layer.temperature)
    assert_same_routing(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_go_to_the_lower_index(k):
    layer = layer_of(n_expert=4, expert_top_k=k)
    x, weight = torch.randint(-3, 4, (33, 16)).float(), torch.randint(-3, 4, (1, 16)).float().repeat(4, 1)
    weight[2] += 1  # experts 0, 1 and 3 are tied, to the last bit
    layer.router.weight.copy_(weight)
    expected = layer.route(x[None], torch.zeros(1, 33, dtype=torch.int64))
    experts = kernels.route(x, weight, k, "softmax", False, torch.tensor(1.0))[2]
    assert torch.equal(experts, expected.experts)
    assert k == 4 or {tuple(row) for row in experts.tolist()} >= {(0, 1, 3)[:k], (2, 0, 1)[:k]}


@torch.no_grad()
@pytest.mark.parametrize("n_expert, k", [(4, 1), (4, 2), (4, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "linear_concat"])
def test_up_and_down_equal_the_experts(kind, bias, n_expert, k):
    keys = dict(capacity_factor=0.5) if k else {}
    layer = layer_of(n_expert=n_expert, expert_top_k=k, expert_kind=kind, bias=bias, expert_hidden=40, **keys)
    x = torch.randn(3, 11, 16)
    routing, experts = layer.route(x, torch.zeros(3, 11, dtype=torch.int64)), layer.experts
    assert not k or not routing.kept.all()
    is_mlp = kind == "mlp"
    x = x.view(33, 16)
    hidden = kernels.up(x, experts.w_in, experts.bias_in, routing.experts, routing.gates, not is_mlp)
    y = kernels.down(hidden, experts.w_out, routing.experts, routing.gates, is_mlp)
    assert error(y, experts.run_backend(backends.reference, x, routing)) < 2e-6


def test_dropped_choices_are_independent_of_weights():
    x, w_in, bias_in, w_out, experts, gates = tokens_of(3, 4, 2, 24, 40)
    gates[experts == 2] = 0
    w_in[2] = bias_in[2] = w_out[2] = math.nan
    hidden = kernels.up(x, w_in, bias_in, experts, gates, False)
    assert (hidden[gates == 0] == 0).all() and torch.isfinite(kernels.down(hidden, w_out, experts, gates, False)).all()


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def operator_calls(device="cpu", dtype=torch.float32):
    """(operator, arguments) of a layer of 4 experts, 2 a token."""
    x, w_in, bias_in, w_out, experts, gates = (z.to(device) for z in tokens_of(3, 4, 2, 24, 40, dtype))
    router, hidden = torch.randn(4, 24, device=device), torch.randn(3, 2, 40, device=device).to(dtype)
    temperature = torch.tensor(0.7, device=device)
    return [
        (kernels.route, (x, router, 2, "softmax", True, temperature)),
        (kernels.route, (x, router, 4, "sigmoid", False, temperature)),
        (kernels.up, (x, w_in, bias_in, experts, gates, False)),
        (kernels.up, (x, w_in, None, experts, gates, True)),
        (kernels.partial_down, (hidden, w_out, experts, gates, True)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype):
    for operator, words in operator_calls(dtype=dtype):
        torch.library.opcheck(operator, words)


@pytest.mark.cuda
@needs_triton
def test_operators_pass_opcheck_on_cuda():
    for operator, words in operator_calls("cuda", torch.bfloat16):
        torch.library.opcheck(operator, words)


def mlp(x, router, temperature, w_in, bias_in, w_out, k):
    """A layer in three operations."""
    _, _, experts, gates = kernels.route(x, router, k, "softmax", False, temperature)
    return kernels.down(kernels.up(x, w_in, bias_in, experts, gates, False), w_out, experts, gates, True)


def mlp_twin(x, router, temperature, w_in, bias_in, w_out, k):
    _, _, experts, gates = kernels.route_twin(x, router, k, "softmax", False, temperature)
    hidden = kernels.up_twin(x, w_in, bias_in, experts, gates, False)
    return kernels.down_twin(hidden, w_out, experts, gates, True)


def mlp_arguments(N):
    x, w_in, bias_in, w_out, _, _ = tokens_of(N, 4, 1, 96, 200)
    return [x, torch.randn(4, 96), torch.tensor(0.7), w_in, bias_in, w_out]


def test_torch_compile_makes_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    words = mlp_arguments(3)
    assert error(compiled(*words, 2), mlp_twin(*words, 2)) < 2e-6


def test_operators_ignore_autocast():
    words = mlp_arguments(3)
    expected = mlp(*words, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlp(*words, 2), expected) and torch.equal(mlp_twin(*words, 2), expected)


def test_operators_work_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import test_kernels as t; assert not t.triton_here.AVAILABLE; "
        "words = t.mlp_arguments(3); assert t.torch.equal(t.mlp(*words, 2), t.mlp_twin(*words, 2))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Triton without a GPU


@needs_triton
@thorough(short=0, soak=1)
def test_kernels_in_the_interpreter_equal_the_twins(n):
    assert_no_problems_in_the_interpreter(__file__, n)


class Compiler:
    """Stands in for a kernel: compiles for an H100 what would be launched, and counts its programs."""

    def __init__(self, kernel):
        self.kernel, self.programs, self.compiled = kernel, [], []

    def __getitem__(self, grid):
        self.programs.append(math.prod(grid))
        return self.compile

    def compile(self, *arguments, num_warps=4, **constants):
        import triton
        from triton.backends.compiler import GPUTarget

        pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
        pointers[torch.bool] = "*i1"
        numbers = {int: "i32", float: "fp32"}
        values = {**dict(zip(self.kernel.arg_names, arguments)), **constants}
        signature = {
            name: "constexpr" if name in constants or value is None
            else pointers[value.dtype] if isinstance(value, torch.Tensor) else numbers[type(value)]
            for name, value in values.items()
        }  # fmt: skip
        fixed = {name: value for name, value in values.items() if signature[name] == "constexpr"}
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, parameter in enumerate(self.kernel.params)
            if signature[parameter.name].startswith("*") and not parameter.do_not_specialize
        }
        source = triton.compiler.ASTSource(self.kernel, signature, fixed, attributes)
        options = {"num_warps": num_warps}
        self.compiled.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))


@needs_triton
@pytest.mark.skipif(triton_here.INTERPRETED, reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize("dtype, N", [(torch.bfloat16, 1), (torch.float32, 33)])
def test_kernels_compile_for_an_h100(dtype, N, monkeypatch, tmp_path):
    """At the papers' size, where one token must keep all of it busy."""
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "uses_triton", lambda x: True)
    names = ["route_kernel", "up_kernel", "down_kernel"]
    compilers = {name: Compiler(getattr(kernels, name)) for name in names}
    for name, compiler in compilers.items():
        monkeypatch.setattr(kernels, name, compiler)
    x, w_in, bias_in, w_out, experts, gates = tokens_of(N, 4, 1, 384, 1536, dtype)
    for gate, renormalize in zip(GATES, (False, True)):
        kernels.route(x, torch.randn(4, 384), 1, gate, renormalize, torch.tensor(1.0))
    hidden = kernels.up(x, w_in, bias_in, experts, gates, False)
    kernels.up(x, w_in, None, experts, gates, True)
    for gate_last in (False, True):
        kernels.down(hidden, w_out, experts, gates, gate_last)
    assert [len(compilers[name].programs) for name in names] == [2, 2, 2]
    assert min(compilers["up_kernel"].programs + compilers["down_kernel"].programs) > 100


# ---------------------------------------------------------------------------------------------------------------------
# Triton on a GPU

PAPER_SHAPES = [(1, 4, 1, 384, 1536), (8, 4, 2, 384, 384), (64, 8, 2, 384, 1536), (2, 64, 64, 384, 64)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # the interpreter does not round to bfloat16 but cuts off


def errors_on(device, shape, dtype):
    """Triton against the twins on the CPU, which are given the same numbers as float32: (what, error, tolerance)."""

    def launched(operation, *words):
        words = [word.to(device) if isinstance(word, torch.Tensor) else word for word in words]
        assert kernels.uses_triton(words[0])
        return operation(*words)

    def exact(twin, *words):
        return twin(*(word.float() if getattr(word, "dtype", None) == torch.bfloat16 else word for word in words))

    x, w_in, bias_in, w_out, experts, gates = tokens_of(*shape, dtype)
    router = torch.randn(shape[1], shape[3]) * 0.3
    for gate, renormalize in itertools.product(GATES, (False, True)):
        words = x, router, shape[2], gate, renormalize, torch.tensor(0.7)
        found, expected = launched(kernels.route, *words), exact(kernels.route_twin, *words)
        name = f"route {gate}, renormalize={renormalize}"
        yield f"{name}: experts", (found[2].cpu() != expected[2]).sum().item(), 0
        for part, i in (("logits", 0), ("probs", 1), ("gates", 3)):
            yield f"{name}: {part}", error(found[i], expected[i]), 1e-5

    for bias, flag in itertools.product((None, bias_in), (False, True)):
        words = x, w_in, bias, experts, gates, flag
        found = launched(kernels.up, *words)
        name = f"up bias={bias is not None}, gate_first={flag}"
        yield name, error(found, exact(kernels.up_twin, *words)), TOLERANCES[dtype]
        yield f"{name}: dropped choices", found.cpu()[gates == 0].abs().sum().item(), 0
        yield f"{name}: dtype", found.dtype != dtype, 0

    hidden = found.cpu()
    hidden[gates == 0] = math.nan  # not to be looked at
    for flag in (False, True):
        words = hidden, w_out, experts, gates, flag
        found = launched(kernels.down, *words)
        name = f"down gate_last={flag}"
        yield name, error(found, exact(kernels.down_twin, *words)), TOLERANCES[dtype]
        yield f"{name}: other bits the second time", not torch.equal(found, launched(kernels.down, *words)), 0
        yield f"{name}: dtype", found.dtype != dtype, 0


def wrong_on(device, shape, dtype):
    return [f"{shape} {dtype} {what}: {by:g}" for what, by, limit in errors_on(device, shape, dtype) if not by <= limit]


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES + PAPER_SHAPES, ids=str)
def test_kernels_on_cuda_equal_the_twins(shape, dtype):
    assert wrong_on("cuda", shape, dtype) == []


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("N", [1, 9])
def test_cuda_graph_of_all_kernels_follows_its_inputs(N):
    words = [word.cuda() for word in mlp_arguments(N)]
    mlp(*words, 2)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mlp(*words, 2)
    for seed in range(3):
        torch.manual_seed(seed)
        news = mlp_arguments(N)
        news[2].fill_(0.5 + seed)  # the temperature
        for word, new in zip(words, news):
            word.copy_(new)
        graph.replay()
        assert error(y, mlp_twin(*news, 2)) < 1e-5


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("N", [1, 9])
def test_torch_compile_on_cuda_makes_one_graph_without_synchronisation(N):
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True)
    words = [word.cuda() for word in mlp_arguments(N)]
    compiled(*words, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = compiled(*words, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(y, mlp_twin(*(word.cpu() for word in words), 2)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter runs


def problems_in_the_interpreter(is_soak):
    """Differences, a line each. The interpreter is slow, so there are few programs with large blocks."""
    assert triton_here.INTERPRETED
    yield from wrong_on("cpu", (1, 4, 1, 40, 24), torch.float32)
    kernels.PROGRAMS = 6
    others = [(1, 5, 5, 24, 40), (3, 4, 1, 100, 24), (2, 1, 1, 24, 24)]
    for shape in [(1, 8, 2, 40, 100), (7, 4, 2, 100, 40), *(others if is_soak else ())]:
        yield from wrong_on("cpu", shape, torch.float32)
    for shape in [(7, 4, 2, 24, 40), *([(1, 8, 2, 40, 100)] if is_soak else ())]:
        yield from wrong_on("cpu", shape, torch.bfloat16)

    x, weight = torch.randint(-3, 4, (9, 24)).float(), torch.randint(-3, 4, (1, 24)).float().repeat(6, 1)
    weight[2] += 1
    for k in (1, 2, 3, 6):
        words = x, weight, k, "softmax", False, torch.tensor(1.0)
        if not torch.equal(kernels.route(*words)[2], kernels.route_twin(*words)[2]):
            yield f"ties, k={k}"
    experts = kernels.route(x * math.nan, weight, 2, "softmax", False, torch.tensor(1.0))[2]
    if not torch.equal(experts, torch.tensor([[0, 1]]).expand(9, 2)):
        yield "NaN: experts that are none"

    words = mlp_arguments(5)
    together, alone = mlp(*words, 1), [mlp(words[0][n : n + 1], *words[1:], 1) for n in range(5)]
    if not torch.equal(together, torch.cat(alone)):
        yield "a token gets other bits in a batch"
    for operator, words in operator_calls():
        torch.library.opcheck(operator, words)


if __name__ == "__main__":
    tell_problems(problems_in_the_interpreter)
