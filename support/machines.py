"""Where a script runs: which device, which precision, compiled or not, and why; and the description of it that
records carry."""

import contextlib
import ctypes
import inspect
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config  # torch itself imports it late

from support.files import ROOT
from support.options import ConfigError

CODE = "*.py"  # what git's state is told of: results that are drawn or committed change no run
UNKNOWN = {"core_seconds": None, "device_bytes": None}  # what Neighbours say where nobody can tell


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters are always float32
    compile: bool
    reason: str  # one line that says what was chosen and why

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self):
        """Wait until the device has done what it was given, so that a clock can be read."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


def choose(device="auto", dtype="auto", compile="auto", number=None) -> Machine:
    """Resolve the keys device, dtype and compile. Raises ConfigError where what was asked for is not there.

    number: of this process among several on this machine, each of which takes a GPU of its own.
    """
    device, why_device = _device(device)
    if device.type == "cuda" and number is not None:
        device, _ = _device(f"cuda:{number}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for what asks for the current one: graphs, streams, waiting
    dtype, why_dtype = _dtype(dtype, device)
    compiled = device.type == "cuda" if compile == "auto" else compile
    why_compiled = "asked for" if compile != "auto" else "pays on CUDA" if compiled else "auto compiles on CUDA only"
    reason = (
        f"device {device} ({why_device}), dtype {str(dtype).removeprefix('torch.')} ({why_dtype}), "
        f"{'compiled' if compiled else 'not compiled'} ({why_compiled})"
    )
    return Machine(device, dtype, compiled, reason)


def _device(asked):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        name = next(name for name in there if there[name])
        return torch.device(name), "auto: no GPU found" if name == "cpu" else "auto: found"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError([f"device={asked!r}: not a device; expected auto, cpu, cuda, cuda:N or mps"]) from None
    if not there.get(device.type, False):
        found = [name for name in there if there[name]]
        raise ConfigError(
            [
                f"device={asked!r}: this machine has no {device.type} device that torch {torch.__version__} can use; "
                f"it has {' and '.join(found)} (device=auto takes the best)"
            ]
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            [f"device={asked!r}: this machine has {torch.cuda.device_count()} CUDA device(s), counted from 0"]
        )
    return device, "asked for"


def _dtype(asked, device):
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked == "auto":
        if device.type == "cuda" and not native:
            return torch.float32, "auto: this GPU has no bfloat16 units"
        return (torch.bfloat16, "auto: on CUDA") if native else (torch.float32, f"auto: on {device.type}")
    if asked == "bfloat16" and device.type == "cuda" and not native:
        return torch.float32, "bfloat16 was asked for, but this GPU has no units for it"
    return getattr(torch, asked), "asked for"


def describe(machine: Machine) -> dict:
    """The machine as records name it; never a host name or a path."""
    device = machine.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "device_type": device.type,
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a plain string, which checkpoints may hold
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compile": machine.compile,
    }


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Neighbours:
    """What others do on the hardware of this process: a time counts only where they do little.

    On a CPU their processor time (and what a hypervisor withheld) on the cores that this process may use; on CUDA the
    memory that they hold. CUDA does not tell whose memory it is, so that device_bytes includes the context of this
    process itself, some hundred MB: records.OTHERS_DEVICE_BYTES, up to which times count, allows for it.
    """

    def __init__(self, machine: Machine, before: dict | None = None):
        """before: what `so_far` said when an earlier session of the same run ended."""
        self.machine, self.before = machine, before or {"core_seconds": 0.0, "device_bytes": 0}
        self.busy, self.own = _busy_seconds(), _own_seconds()

    def so_far(self) -> dict:
        """core_seconds that others took; device_bytes of the GPU that are in use and not torch's here, the context of
        this process included, at most. None for what the system does not tell, or this device does not have."""
        return {
            "core_seconds": _after(self._core_seconds(), self.before["core_seconds"], sum),
            "device_bytes": _after(self._device_bytes(), self.before["device_bytes"], max),
        }

    def _core_seconds(self):
        busy, own = _busy_seconds(), _own_seconds() - self.own
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - own
        if others < -(0.02 * own + 0.1):  # more than clocks that tick apart: the system speaks of other cores
            return None
        return max(0.0, others)

    def _device_bytes(self):
        if self.machine.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.machine.device)
        return total - free - torch.cuda.memory_reserved(self.machine.device)


def _after(now, before, combine):
    return None if now is None or before is None else combine((before, now))


def _busy_seconds():
    """Of the cores that this process may use, since the machine started; None where the system does not tell of all."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    counts = [[int(word) for word in line.split()[1:]] for line in lines if line.split()[0] in cores]
    # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice; the last two are in the first two
    busy = sum(sum(count[:3]) + sum(count[5:8]) for count in counts)
    return busy / os.sysconf("SC_CLK_TCK") if len(counts) == len(cores) else None


def _own_seconds():
    return sum(os.times()[:4])


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_memory(machine: Machine) -> int | None:
    """Bytes at the highest point so far: of the device on CUDA, of the process on a CPU, None where it is not known."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device)
    if machine.device.type == "cpu" and platform.system() == "Linux":
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None


def compiled(function):
    """torch.compile, into one graph or not at all; the gradients are those of the same without compilation.

    Models share their code, and torch compiles one piece of code only so often: several models in a process must not
    count as one. Nor must a number in which they differ, such as a capacity, become an unknown of the graph: shapes
    that depend on it cannot be compiled. A backward pass is computed outside of autocast, as it is called: inside, the
    router's would be in the precision of the matrix products. torch has that setting for a process, not for a function.
    """
    torch._functorch.config.backward_pass_autocast = "off"
    options = dict(fullgraph=True, dynamic=False)
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13 has it, 2.11 has not
        return torch.compile(function, isolate_recompiles=True, **options)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, **options)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends: the tensors of a step are as large as those of the
    step before, and pages that come anew from the system are zeroed first. -> whether the C library (glibc) does so

    On one CPU core the system took 2 of 80 ms of a training step with 4 experts for it, and 6 of 124 with two experts a
    token.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, 32 << 20)) and bool(mallopt(trim_threshold, 1 << 30))


def git_state() -> dict:
    """The commit of this code, and whether tracked code differs from it; None where git cannot tell."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", CODE)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def same_code(before: str | None, now: str | None) -> bool:
    """Whether the code of two commits is the same; not known counts as no."""
    if not all(re.fullmatch("[0-9a-f]{40,64}", commit or "") for commit in (before, now)):
        return False
    return git("diff", "--quiet", before, now, "--", CODE) is not None


def git(*arguments):
    """What git prints about this code, without the last line's end; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
