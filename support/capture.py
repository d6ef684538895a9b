"""A function of fixed shapes, recorded once as a CUDA graph and replayed.

    step = Captured(function, inputs, device)
    outputs = step(*inputs)

A small model spends its time on launching kernels one by one; a replay launches all of them at once. Inputs are copied
into memory of their own. What the function changes in place keeps its address, and its outputs lie in fixed memory,
which the next call overwrites.

Without CUDA the function runs again at each call, on the same fixed inputs and into the same fixed outputs. That is not
faster, but it keeps the contract, so a CPU can test it.
"""

import contextlib
import gc

import torch
from torch.utils import _pytree as pytree

WARM_UPS = 3  # calls before the capture: libraries set up their workspaces, kernels are chosen


class Captured:
    """function(*inputs) -> tensors in nested tuples, lists and dicts (or None).

    inputs: tensors, or numbers, which the function gets as 0-d tensors: float64 on a CPU, float32 elsewhere. The
    function runs WARM_UPS times first, so the caller undoes its side effects. It must not wait for the device, nor copy
    from it, nor make shapes depend on values. stream: the torch.cuda.Stream on which it was compiled (see `aside`).
    reset: called before each of these runs and before the capture, where the function may not run on from the last.
    """

    def __init__(self, function, inputs, device, stream=None, reset=lambda: None):
        number = torch.float64 if device.type == "cpu" else torch.float32  # what fused optimisers read a rate as
        self.function, self.outputs, self.graph = function, None, None
        self.inputs = [
            value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=number, device=device)
            for value in inputs
        ]
        with aside(stream):
            for later in reversed(range(WARM_UPS)):
                reset()
                with contextlib.nullcontext() if later else never_waiting(device):
                    function(*self.inputs)
        reset()
        if device.type == "cuda":
            self.graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with no_collection(), torch.cuda.graph(self.graph, stream=stream):
                    self.outputs = function(*self.inputs)
            finally:
                torch.cuda.set_stream(current)  # which torch forgets where a capture fails

    def __call__(self, *inputs):
        for fixed, value in zip(self.inputs, inputs, strict=True):
            fixed.copy_(value) if isinstance(value, torch.Tensor) else fixed.fill_(value)
        if self.graph:
            self.graph.replay()
        elif self.outputs is None:
            self.outputs = pytree.tree_map_only(torch.Tensor, own, self.function(*self.inputs))
        else:
            pytree.tree_map_(copy_in_place, self.outputs, self.function(*self.inputs))
        return self.outputs


@contextlib.contextmanager
def never_waiting(device):
    """A RuntimeError where the block waits for the GPU. What waits cannot be recorded, and after a failed recording
    torch before 2.13 can neither draw random numbers nor record again."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def no_collection():
    """Python collects its garbage before the block and not in it: freeing one CUDA graph ends the recording of
    another."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def own(value):
    """A copy in memory of its own, which no view shares."""
    return value.detach().clone()


def copy_in_place(fixed, value):
    if isinstance(fixed, torch.Tensor):
        fixed.detach().copy_(value.detach())


def side_stream(device):
    """A torch.cuda.Stream for compiling and capturing; None where there is no CUDA."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextlib.contextmanager
def aside(stream):
    """Run the block on this stream, ordered after earlier and before later work. None: on the current one.

    A gradient is accumulated on the stream on which its parameter was first used, so a model that will be captured
    has to be compiled and warmed up on the stream of the capture.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)
