"""Counts the kernels and bytes of a training step and an evaluation batch on an H100, on a machine without a GPU.

    python tests/count_kernels.py config/shakespeare_moe4.py --n_layer=2
    {"update": {"kernels": …, "bytes": …}, "evaluation": {…}}

The model is compiled as for CUDA, with tensors that have shapes and a device but no memory, up to Inductor's schedule:
its kernels, and the bytes that they read and write if each buffer is moved once a kernel. An update is the forward and
backward pass over a micro-batch, without clipping, AdamW and totals. Attention counts as cuDNN's; padding of products,
which torch chooses by timing, is off. Needs torch 2.13, Triton and a C++ compiler: torch's CPU build asks C++ for the
device and its streams, so a small library pretends to be CUDA.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
STUB = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device only() { return {c10::DeviceType::CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  c10::Device getDevice() const override { return only(); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""


def pretend_cuda():
    """Registers the stub with torch's libraries, before torch is imported and asks for it."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stub.cpp"), Path(folder, "stub.so")
        source.write_text(STUB)
        paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, *paths, "-o", library], check=True)
        ctypes.CDLL(str(library))


pretend_cuda()
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo.device_interface as interfaces  # noqa: E402
from torch._inductor import ir  # noqa: E402
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.scheduler import NopKernelSchedulerNode  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from model import GPT  # noqa: E402
from run.settings import Config  # noqa: E402
from run.update import cast_weights  # noqa: E402
from speed import fused_routing  # noqa: E402
from support import configurator, machines  # noqa: E402
from support.fused_update import WeightCopies  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# An H100 as Inductor asks for it

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, gcnArchName="",
)  # fmt: skip


def give(value):
    return staticmethod(lambda *_, **__: value)


class Worker(interfaces.CudaInterface.Worker):
    current_device, get_device_properties = give(0), give(H100)


class Cuda(interfaces.CudaInterface):
    current_device, device_count, get_device_properties, get_compute_capability = give(0), give(1), give(H100), give(90)
    is_available = is_bf16_supported = is_triton_capable = give(True)
    raise_if_triton_unavailable = give(None)


Cuda.Worker = Worker


class OnCpu(TorchDispatchMode):
    """Makes new tensors on the CPU, whatever device they are asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))


fold = UniformValueConstantFolder.run


def fold_on_cpu(folder):
    """Inductor folds constants by computing with tensors of one number."""
    with OnCpu():
        return fold(folder)


def attention(q, k, v, attn_mask, is_causal, dropout_p):
    """Torch's choice on an H100."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operator(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Counting


class Counted(Exception):
    """All was counted that can be: nothing runs here."""


def counted(*_):
    raise Counted


@contextlib.contextmanager
def counting(totals):
    """Compiles for an H100 inside, adds what that gives to `totals`, and ends where it would run."""

    def schedule(graph):
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = [node for node in graph.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        totals["kernels"] += sum(not isinstance(node.node, ir.MultiOutput) for node in nodes)
        totals["bytes"] += graph.count_bytes()[0]
        return SimpleNamespace(call=counted, runner=None)

    with (
        mock.patch.dict(interfaces.device_interfaces, {"cuda": Cuda, "cuda:0": Cuda}),
        mock.patch.multiple(torch.cuda, current_device=lambda: 0, get_device_capability=lambda *_: (9, 0)),
        mock.patch.multiple(torch.cuda, is_bf16_supported=lambda *_: True, get_device_properties=lambda *_: H100),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch.object(UniformValueConstantFolder, "run", fold_on_cpu),
        mock.patch.object(GraphLowering, "compile_to_module", schedule),
        torch._inductor.config.patch(shape_padding=False, force_disable_caches=True),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        contextlib.suppress(Counted),
    ):
        yield


def without_memory(model):
    """Moves a model to CUDA in place, inside of a FakeTensorMode."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            like = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            module._parameters[name] = torch.nn.Parameter(like, value.requires_grad)
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


def count(config) -> dict:
    """{"update": {"kernels", "bytes"}, "evaluation": the same} with this Config, on a text of 65 symbols."""
    machine = machines.Machine(torch.device("cuda"), torch.bfloat16, compile=True, reason="")
    model, found = GPT(config, 65), {}
    interfaces.get_interface_for_device("cpu")  # fills the table that `counting` changes
    with FakeTensorMode():
        without_memory(model)
        copies = WeightCopies(cast_weights(model) if config.fused_update else [])
        x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device="cuda")
        for name, is_training in (("update", True), ("evaluation", False)):
            found[name] = {"kernels": 0, "bytes": 0}
            weights = copies.standing_in() if is_training else contextlib.nullcontext()
            with counting(found[name]), torch.set_grad_enabled(is_training), machine.autocast(), weights:
                if config.routing_kernels:
                    assert fused_routing.use_kernels(model, machine) is None
                machines.compiled(model).train(is_training)(x, x)
    return found


if __name__ == "__main__":
    print(json.dumps(count(configurator.parse(Config, sys.argv[1:]))))
