"""The kernels of a decoding step: the twins against `model.py`, Triton against the twins, and what is compiled.

As in `test_kernels.py`, the checks at the end of this file are a script that one test runs in Triton's interpreter.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import thorough, tiny
from test_kernels import TOLERANCES, Compiler, error, needs_triton

from model import Attention, LayerCache
from speed import decoding_kernels, kernels

HEADS = [(1, 8), (3, 5), (6, 4)]  # n_head, width of a head


def attention_case(B, n_head, width, S, at, dtype=torch.float32):
    """qkv, keys, values, position: the cache holds `at` tokens, and garbage after them."""
    D = n_head * width
    keys, values = torch.randn(2, B, n_head, S, width).to(dtype)
    keys[:, :, at:], values[:, :, at:] = 1e4, 1e4
    return torch.randn(B, 3 * D).to(dtype), keys, values, torch.tensor([at])


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
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__, str(n)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """{name: Compiler} of all kernels of a step, which stand in for them."""
    pytest.importorskip("triton.backends.nvidia")
    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {}
    for module, name in [(decoding_kernels, "attention_kernel")]:
        monkeypatch.setattr(module, "uses_triton", lambda x: True)
        made[name] = Compiler(getattr(module, name))
        monkeypatch.setattr(module, name, made[name])
    return made


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_compiles_for_an_h100_without_spilling(dtype, compilers):
    decoding_kernels.attend(*attention_case(1, 6, 64, 256, 7, dtype))
    (kernel,) = compilers["attention_kernel"].compiled
    found = resources(kernel)
    assert found["STACK"] == 0 and found["REG"] <= 255 and found["SHARED"] <= 48 << 10, found


# ---------------------------------------------------------------------------------------------------------------------
# Triton on a GPU


def differences(device, call, twin, *words):
    """A line for each tensor that a call returns, or changes among its words, and that differs from the twin's.

    The twin gets the same numbers as float32, on the CPU. What is written into words is only copied, so it is exact.
    """
    ours = [word.to(device, copy=True) if isinstance(word, torch.Tensor) else word for word in words]
    theirs = [word.to("cpu", copy=True) if isinstance(word, torch.Tensor) else word for word in words]
    dtype = next(word.dtype for word in words if isinstance(word, torch.Tensor) and word.is_floating_point())
    theirs = [word.float() if getattr(word, "dtype", None) == torch.bfloat16 else word for word in theirs]
    made, expected = call(*ours), twin(*theirs)
    made, expected = ((one,) if isinstance(one, torch.Tensor) else one for one in (made, expected))
    for i, (a, b) in enumerate(zip(made, expected, strict=True)):
        if not error(a, b) <= TOLERANCES[dtype]:
            yield f"result {i} is off by {error(a, b):g}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(a, torch.Tensor) and not torch.equal(a.cpu().to(b.dtype), b):
            yield f"argument {i} was left with other numbers"


CASES = [(1, 1, 8, 1, 0), (4, 3, 5, 16, 15), (3, 6, 4, 16, 9)]  # B, n_head, width, S, at
PAPER_CASES = [(1, 6, 64, 256, at) for at in (0, 1, 127, 255)] + [(4, 6, 64, 256, 200), (3, 2, 48, 1000, 999)]


def wrong_on(device, case, dtype):
    words = attention_case(*case, dtype)
    for problem in differences(device, decoding_kernels.attend, decoding_kernels.attend_twin, *words):
        yield f"attend {case} {dtype}: {problem}"


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES + PAPER_CASES, ids=str)
def test_kernels_on_cuda_equal_the_twins(case, dtype):
    assert list(wrong_on("cuda", case, dtype)) == []


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter runs


def problems_in_the_interpreter(is_soak):
    """Differences, a line each."""
    assert kernels.INTERPRETED
    for case, dtype in itertools.product([*CASES, *(PAPER_CASES if is_soak else ())], TOLERANCES):
        yield from wrong_on("cpu", case, dtype)
    decoding_kernels.IN_REGISTERS = 32  # so that the cache is read in several parts
    for case in CASES:
        yield from wrong_on("cpu", case, torch.float32)
    qkv, keys, values, position = attention_case(4, 3, 5, 16, 9)
    together = decoding_kernels.attend(qkv, keys.clone(), values.clone(), position)
    alone = [decoding_kernels.attend(*(z[b : b + 1].clone() for z in (qkv, keys, values)), position) for b in range(4)]
    if not torch.equal(together, torch.cat(alone)):
        yield "a sequence gets other bits in a batch"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit("\n".join(problems_in_the_interpreter(sys.argv[1:] == ["1"])) or 0)
