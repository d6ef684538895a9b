"""The kernels of a decoding step: the twins against `model.py`, Triton against the twins, and what is compiled.

As in `test_kernels.py`, the checks at the end of this file are a script that one test runs in Triton's interpreter.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils._pytree as pytree
from conftest import soaked, thorough, tiny
from interpreter import assert_no_problems_in_the_interpreter, tell_problems
from test_kernels import TOLERANCES, Compiler, error, needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, Attention, Decoder, LayerCache, sample
from speed import decoding_kernels, fused_decoding, kernels
from speed.decoding_kernels import Stream
from support import capture, machines, triton_here

FREE = (False, "softmax", False, False)  # of routed_case: no bias, softmax, not renormalised, gates last
HEADS = [(1, 8), (3, 5), (6, 4)]  # n_head, width of a head


def attention_case(B, n_head, width, S, at, dtype=torch.float32):
    """qkv, keys, values, position: the cache holds `at` tokens, and garbage after them."""
    D = n_head * width
    keys, values = torch.randn(2, B, n_head, S, width).to(dtype)
    keys[:, :, at:], values[:, :, at:] = 1e4, 1e4
    return torch.randn(B, 3 * D).to(dtype), keys, values, torch.tensor([at])


def stream_case(N, P, D, start=False):
    """A Stream of so many partial sums, or at the first layer, with a text of 11 symbols and 5 positions."""
    if start:
        ids, position = torch.randint(11, (N,)), torch.tensor([3])
        return Stream(torch.randn(11, D), torch.randn(5, D), ids, position)
    return Stream(torch.randn(N, D), torch.randn(P, N, D) if P else None)


def norm_case(D, bias):
    return torch.rand(D) + 0.5, torch.randn(D) if bias else None


def linear_case(N, P, D, R, bias, gelu, dtype=torch.float32, start=False):
    """Arguments of norm_linear."""
    weight = (torch.randn(R, D) * D**-0.5).to(dtype)
    biases = [torch.randn(width).to(dtype) if bias else None for width in (R, D)]
    return stream_case(N, P, D, start), norm_case(D, bias), weight, biases[0], gelu, biases[1]


def routed_case(N, P, D, H, E, k, bias, gate, renormalize, gate_first, dtype=torch.float32):
    """Arguments of norm_route_up. The bias after the experts is each expert's, or with gate_first one for all."""
    w_in, bias_in = (torch.randn(E, H, D) * D**-0.5).to(dtype), torch.randn(E, H).to(dtype)
    bias_out = torch.randn(D).to(dtype) if gate_first else torch.randn(E, D).to(dtype)
    biases = (bias_in, bias_out) if bias else (None, None)
    router, temperature = torch.randn(E, D) * 0.3, torch.tensor(0.7)
    how = k, gate, renormalize, gate_first
    return stream_case(N, P, D), norm_case(D, bias), router, temperature, w_in, *biases, *how


def head_case(N, P, D, V, temperature, top_k, bias=False, dtype=torch.float32):
    """Arguments of norm_head_draw."""
    weight, uniform = torch.randn(V, D).to(dtype) * 0.3, torch.rand(N)
    ends = torch.tensor([4]), torch.zeros(N, dtype=torch.int64)
    return stream_case(N, P, D), norm_case(D, bias), weight, uniform, *ends, temperature, top_k


# ---------------------------------------------------------------------------------------------------------------------
# The twins


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 3, 15])
@pytest.mark.parametrize("n_head, width", HEADS)
def test_attention_of_a_new_token_equals_the_models(n_head, width, at):
    config = tiny(n_embd=n_head * width, n_head=n_head, block_size=16)
    attention = Attention(config).eval()
    block = SimpleNamespace(mlp=None)
    caches = [LayerCache(block, config, 3, torch.device("cpu"), torch.float32) for _ in range(2)]
    x = torch.randn(3, at + 1, n_head * width)
    for cache in caches:
        attention(x[:, :at], cache=cache) if at else None
    expected = attention(x[:, at:], at, caches[0])
    y = decoding_kernels.attend(attention.qkv(x[:, at]), caches[1].keys, caches[1].values, torch.tensor([at]))
    torch.testing.assert_close(attention.proj(y)[:, None], expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_attend_passes_opcheck():
    torch.library.opcheck(decoding_kernels.attend, attention_case(2, 3, 5, 16, 7))


# ---------------------------------------------------------------------------------------------------------------------
# Triton without a GPU


@needs_triton
@thorough(short=0, soak=1)
def test_kernels_in_the_interpreter_equal_the_twins(n):
    assert_no_problems_in_the_interpreter(__file__, n)


def resources(kernel):
    """{"REG": registers of a thread, "STACK": spilled bytes of a thread, "SHARED": bytes of a program}, on an H100."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with open("kernel.cubin", "wb") as file:
        file.write(kernel.asm["cubin"])
    told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = next(line for line in told.splitlines() if "REG:" in line)
    numbers = {name: int(number) for name, _, number in (word.partition(":") for word in line.split())}
    return {"REG": numbers["REG"], "STACK": numbers["STACK"], "SHARED": kernel.metadata.shared}


NAMES = ("attention_kernel", "linear_kernel", "routed_kernel", "head_kernel")


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """{name: Compiler} of all kernels of a step, which stand in for them."""
    pytest.importorskip("triton.backends.nvidia")
    if triton_here.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {}
    for module, names in ((decoding_kernels, NAMES), (kernels, ["down_kernel"])):
        monkeypatch.setattr(module, "uses_triton", lambda x: True)
        for name in names:
            made[name] = Compiler(getattr(module, name))
            monkeypatch.setattr(module, name, made[name])
    return made


@needs_triton
@pytest.mark.parametrize("dtype, batch_size", [(torch.bfloat16, 1), soaked(torch.float32, 4)])
def test_kernels_compile_for_an_h100_without_spilling(dtype, batch_size, compilers):
    """At the papers' size, where they must fill it, but for attention and the end of a step. A block of threads has
    65,536 registers, so more than that would have spilled too."""
    weight = torch.randn(384, 384).to(dtype)
    decoding_kernels.attend_and_project(*attention_case(batch_size, 6, 64, 256, 7, dtype), weight)
    decoding_kernels.attend(*attention_case(batch_size, 6, 64, 256, 7, dtype))
    decoding_kernels.norm_linear(*linear_case(batch_size, 7, 384, 1152, False, False, dtype))
    decoding_kernels.norm_linear(*linear_case(batch_size, 0, 384, 1536, False, True, dtype, start=True))
    decoding_kernels.norm_route_up(*routed_case(batch_size, 6, 384, 1536, 4, 1, *FREE, dtype=dtype))
    decoding_kernels.norm_head_draw(*head_case(batch_size, 6, 384, 65, 0.8, 200, dtype=dtype))
    for name in NAMES:
        assert compilers[name].compiled
        for kernel in compilers[name].compiled:
            found = resources(kernel)
            print(name, found)  # with pytest -s: for results/bench/notes.md
            assert found["STACK"] == 0 and found["SHARED"] <= 48 << 10, (name, found)
    assert min(compilers["linear_kernel"].programs + compilers["routed_kernel"].programs) > 100


@needs_triton
@pytest.mark.parametrize("keys", [{}, dict(n_expert=4), dict(n_expert=4, expert_kind="linear_concat", expert_top_k=2)])
def test_a_character_of_six_layers_takes_25_kernels_and_nothing_else(keys, compilers, monkeypatch):
    """Four a layer and one at the end, at most 30: each more is a microsecond or two that all others wait for."""
    cpu = machines.Machine(torch.device("cpu"), torch.bfloat16, compile=False, reason="")
    monkeypatch.setattr(Compiler, "compile", lambda *_, **__: None)
    with torch.no_grad():
        decoder = fused_decoding.FusedDecoder(GPT(tiny(n_layer=6, **keys), 65).eval(), 1, cpu, 0.8, 200)
        before = sum(len(one.programs) for one in compilers.values())
        ids, uniform = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(8, 1)
        with Listing() as listing:
            decoder.steps(ids, uniform)
    assert sum(len(one.programs) for one in compilers.values()) - before == 8 * 25
    assert listing.operations <= WITHOUT_KERNEL


WITHOUT_KERNEL = {"new_empty", "empty", "view", "select", "unbind", "unsqueeze", "slice", "detach", "alias", "down"}


class Listing(TorchDispatchMode):
    """Collects the names of the operations within."""

    def __enter__(self):
        self.operations = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.add(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# Triton on a GPU


def differences(device, call, twin, *words):
    """A line for each tensor that a call returns, or changes among its words, and that differs from the twin's.

    The twin gets the same numbers as float32, on the CPU. What is written into words is only copied, so it is exact.
    """
    ours = pytree.tree_map_only(torch.Tensor, lambda word: word.to(device, copy=True), words)
    theirs = pytree.tree_map_only(torch.Tensor, lambda word: exactly(word.to("cpu", copy=True)), words)
    is_rounded = any(word.dtype == torch.bfloat16 for word in tensors_in(words))
    limit = TOLERANCES[torch.bfloat16] * 3 if is_rounded else TOLERANCES[torch.float32]
    for i, (a, b) in enumerate(zip(tensors_in(call(*ours)), tensors_in(twin(*theirs)), strict=True)):
        if not (error(a, b) <= limit if a.is_floating_point() else torch.equal(a.cpu(), b)):
            yield f"result {i} is off by {error(a, b):g}"
    for i, (a, b) in enumerate(zip(tensors_in(ours), tensors_in(theirs), strict=True)):
        if not torch.equal(a.cpu().to(b.dtype), b):
            yield f"argument {i} was left with other numbers"


def tensors_in(values):
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def exactly(word):
    return word.float() if word.dtype == torch.bfloat16 else word


ATTENTION = [(1, 1, 8, 1, 0), (4, 3, 5, 16, 15), (3, 6, 4, 16, 9)]  # B, n_head, width, S, at
LINEAR = [(1, 0, 24, 40, False, False), (3, 2, 40, 7, True, True), (4, 7, 16, 33, False, True)]
ROUTED = [  # N, P, D, H, E, k, bias, gate, renormalize, gate_first
    (1, 1, 24, 40, 1, 1, False, "softmax", False, False),
    (4, 3, 40, 33, 4, 1, True, "softmax", False, False),
    (3, 6, 24, 16, 3, 3, False, "softmax", False, True),
    (2, 1, 16, 24, 4, 2, True, "sigmoid", True, True),
    (3, 2, 16, 24, 4, 2, True, "softmax", True, False),
]
HEAD = [  # N, P, D, V, temperature, top_k
    (1, 1, 24, 65, 0.8, 200),
    (4, 2, 40, 11, 1.3, 3),
    (3, 1, 16, 205, 0.8, 200),
    (3, 3, 24, 27, 0, None),
    (4, 1, 16, 1, 1.0, None),
]
PAPER_ATTENTION = [(1, 6, 64, 256, at) for at in (0, 1, 127, 255)] + [(4, 6, 64, 256, 200), (3, 2, 48, 1000, 999)]
PAPER_LINEAR = [(1, 7, 384, 1152, False, False), (4, 6, 384, 1536, True, True)]
PAPER_ROUTED = [
    (1, 6, 384, 1536, 4, 1, False, "softmax", False, False),
    (4, 6, 384, 384, 4, 2, True, "softmax", True, True),
    (4, 6, 384, 1536, 8, 2, True, "sigmoid", True, False),
]
PAPER_HEAD = [(1, 6, 384, 65, 0.8, 200), (4, 6, 384, 205, 0.8, 200), (2, 6, 384, 256, 0.5, 10)]
SMALL, PAPER = (ATTENTION, LINEAR, ROUTED, HEAD), (PAPER_ATTENTION, PAPER_LINEAR, PAPER_ROUTED, PAPER_HEAD)


def draw(*words):
    """norm_head_draw, checked against `model.sample` of its own logits."""
    logits = decoding_kernels.norm_head_draw(*words)
    *_, uniform, _, tokens, temperature, top_k = words
    expected = sample(logits.cpu(), temperature, top_k, uniform.cpu())
    tokens.fill_(0 if torch.equal(tokens.cpu(), expected) else -1)
    return logits


def draw_twin(*words):
    logits = decoding_kernels.norm_head_draw_twin(*words)
    words[5].fill_(0)
    return logits


def calls(cases, dtype):
    """(what, operation, twin, arguments)"""
    attention, linear, routed, head = cases
    for case in attention:
        words = attention_case(*case, dtype)
        yield f"attend {case}", decoding_kernels.attend, decoding_kernels.attend_twin, words
        D = case[1] * case[2]
        words = *words, (torch.randn(D, D) * D**-0.5).to(dtype)
        twin = decoding_kernels.attend_and_project_twin
        yield f"attend and project {case}", decoding_kernels.attend_and_project, twin, words
    for case in linear:
        for start in (False, True):
            words = linear_case(*case, dtype, start)
            yield f"linear {case}", decoding_kernels.norm_linear, decoding_kernels.norm_linear_twin, words
    for case in routed:
        words = routed_case(*case, dtype)
        yield f"routed {case}", decoding_kernels.norm_route_up, decoding_kernels.norm_route_up_twin, words
    for case in head:
        yield f"head {case}", draw, draw_twin, head_case(*case, dtype=dtype)


def wrong_on(device, cases, dtype):
    for what, operation, twin, words in calls(cases, dtype):
        for problem in differences(device, operation, twin, *words):
            yield f"{what} {dtype}: {problem}"


def of_one(word, b):
    """Sequence b of a word of attention or of a Stream."""
    if isinstance(word, Stream):
        return Stream(word.x[b : b + 1], word.added[:, b : b + 1].contiguous())
    return word[b : b + 1].clone()


def changed_in_a_batch(device, dtype):
    """A line for each operation in which a token gets other bits in a batch than alone."""
    project = torch.randn(15, 15).to(dtype)
    for operation, of_tokens, dim, words in (
        # how many words have tokens; where tokens are in what it returns
        (decoding_kernels.attend_and_project, 3, 1, (*attention_case(4, 3, 5, 16, 9, dtype), project)),
        (decoding_kernels.norm_linear, 1, 0, linear_case(4, 3, 24, 40, True, True, dtype)),
        (decoding_kernels.norm_route_up, 1, 0, routed_case(4, 3, 24, 40, 4, 2, True, "softmax", True, False, dtype)),
    ):
        words = pytree.tree_map_only(torch.Tensor, lambda word: word.to(device), words)
        alone = [operation(*(of_one(word, b) for word in words[:of_tokens]), *words[of_tokens:]) for b in range(4)]
        together = operation(*words)
        for parts in zip(tensors_in(together), *map(tensors_in, alone), strict=True):
            if not torch.equal(parts[0], torch.cat(parts[1:], dim)):
                yield f"{operation.__name__}: a token gets other bits in a batch"


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cases", [SMALL, PAPER], ids=["small", "paper"])
def test_kernels_on_cuda_equal_the_twins(cases, dtype):
    assert list(wrong_on("cuda", cases, dtype)) == []


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_token_has_the_same_bits_in_every_batch_on_cuda(dtype):
    assert list(changed_in_a_batch("cuda", dtype)) == []


@pytest.mark.cuda
@needs_triton
def test_greedy_decoding_of_nan_on_cuda_stays_in_the_vocabulary():
    words = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, head_case(3, 1, 16, 65, 0, None))
    decoding_kernels.norm_head_draw(*words[:2], words[2] * torch.nan, *words[3:])
    assert words[5].tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter runs


def problems_in_the_interpreter(is_soak):
    """Differences, a line each. The interpreter is slow, so there are few programs with large blocks."""
    assert triton_here.INTERPRETED
    decoding_kernels.PROGRAMS = kernels.PROGRAMS = 6
    capture.WARM_UPS = 1
    for dtype in TOLERANCES:
        yield from wrong_on("cpu", SMALL, dtype)
        if is_soak:
            yield from wrong_on("cpu", PAPER, dtype)
    decoding_kernels.IN_REGISTERS = 32  # so that the cache is read in several parts
    yield from wrong_on("cpu", (ATTENTION, [], [], []), torch.float32)

    yield from changed_in_a_batch("cpu", torch.float32)

    cpu = machines.Machine(torch.device("cpu"), torch.float32, compile=False, reason="")
    for keys in (dict(), dict(n_expert=3, expert_top_k=2, gate_renormalize=True, bias=True)):
        model = GPT(tiny(n_layer=1, n_embd=24, n_head=3, block_size=10, **keys), 11).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        texts = []
        for decoder in (fused_decoding.FusedDecoder(model, 2, cpu, 0.8, 5), Decoder(model, 2, 0.8, 5)):
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            steps = decoder.write(torch.tensor([[1], [4]]), 14, generators)
            texts.append(torch.stack([step.tokens for step in steps]))
        if not torch.equal(*texts):
            yield f"another text than the plain decoder's with {keys}"


if __name__ == "__main__":
    tell_problems(problems_in_the_interpreter)
