"""The machine and the code of a run: device, precision, compilation, memory, load of others, and git's commit."""

import contextlib
import ctypes
import hashlib
import inspect
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config  # torch itself imports it late
import torch.compiler.config
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.files import ROOT, one_line
from support.options import ConfigError

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
UNKNOWN_LOAD = {"core_seconds": None, "device_bytes": None}  # of OtherLoad, where it cannot be measured


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters are always float32
    compile: bool
    reason: str  # one line that says what was chosen and why
    capture: bool = False  # updates and evaluations as CUDA graphs: see capture.py

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextlib.contextmanager
    def any_length(self):
        """`autocast` for eager inference on sequences of ever other lengths: cuDNN's attention plans anew for each."""
        with self.autocast(), sdpa_kernel(WITHOUT_CUDNN) if self.device.type == "cuda" else contextlib.nullcontext():
            yield

    @property
    def attention_of_any_length(self):
        """The kernels of attention that `any_length` allows, in words, for records; None = torch's choice."""
        return "flash, efficient or math" if self.device.type == "cuda" else None

    def synchronize(self):
        """Wait until the device has done what it was given, so that a clock can be read."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


def choose(device="auto", dtype="auto", compile="auto", number=None, capture=False) -> Machine:
    """Resolve the keys device, dtype, compile and capture. ConfigError where the device is not there.

    number: this process's number among several on this machine, each of which takes a GPU of its own.
    """
    device, why_device = _device(device)
    if device.type == "cuda" and number is not None:
        device, _ = _device(f"cuda:{number}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for what asks for the current one: graphs, streams, waiting
    dtype, why_dtype = _dtype(dtype, device)
    compiled = device.type == "cuda" if compile == "auto" else compile
    why_compiled = "asked for" if compile != "auto" else "pays on CUDA" if compiled else "auto compiles on CUDA only"
    captured = compiled and device.type == "cuda" and number is None if capture == "auto" else capture
    reason = (
        f"device {device} ({why_device}), dtype {str(dtype).removeprefix('torch.')} ({why_dtype}), "
        f"{'compiled' if compiled else 'not compiled'} ({why_compiled})"
        f"{', captured' if captured else ''}"
    )
    return Machine(device, dtype, compiled, reason, captured)


def _device(asked):
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name in found if found[name]]
    if asked == "auto":
        return torch.device(there[0]), "auto: no GPU found" if there == ["cpu"] else "auto: found"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError([f"device={asked!r}: not a device; expected auto, cpu, cuda, cuda:N or mps"]) from None
    problem = None
    if device.type not in there:
        problem = f"no {device.type} device that torch {torch.__version__} can use; it has {' and '.join(there)}"
        problem += " (device=auto takes the best)"
    elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"{torch.cuda.device_count()} CUDA device(s), counted from 0"
    if problem:
        raise ConfigError([f"device={asked!r}: this machine has {problem}"])
    return device, "asked for"


def _dtype(asked, device):
    is_cuda = device.type == "cuda"
    if is_cuda and asked != "float32" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float32, f"{asked}: this GPU has no bfloat16 units"
    if asked == "auto":
        return (torch.bfloat16, "auto: on CUDA") if is_cuda else (torch.float32, f"auto: on {device.type}")
    return getattr(torch, asked), "asked for"


def describe(machine: Machine) -> dict:
    """The machine as records name it: no host name, no path."""
    device = machine.device
    cuda = device.type == "cuda"
    return {
        "device": one_line(torch.cuda.get_device_name(device) if cuda else _cpu_name()),
        "device_type": device.type,
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a plain string, which checkpoints may hold
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compile": machine.compile,
        **({"capture": True} if machine.capture else {}),
    }


def _cpu_name():
    with contextlib.suppress(OSError):
        if name := re.search(r"^model name.*?: *(\S.*?) *$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return name[1]
    return platform.processor() or platform.machine()


class OtherLoad:
    """How much other processes use the hardware of this one: a time counts only where they use little.

    On a CPU: processor time, theirs and a hypervisor's, on the cores that this process may use. On CUDA: memory in use
    outside of torch here, which includes this process's own context of some hundred MB (records.OTHERS_DEVICE_BYTES).
    """

    def __init__(self, machine: Machine, before: dict | None = None):
        """before: `so_far` at the end of an earlier session of the same run."""
        self.machine, self.before = machine, before or {"core_seconds": 0.0, "device_bytes": 0}
        self.busy, self.own = _busy_seconds(), _own_seconds()

    def so_far(self) -> dict:
        """{"core_seconds": of other processes, "device_bytes": the most in use}; None for what cannot be measured."""
        return {
            "core_seconds": _after(self._core_seconds(), self.before["core_seconds"], sum),
            "device_bytes": _after(self._device_bytes(), self.before["device_bytes"], max),
        }

    def _core_seconds(self):
        busy, own = _busy_seconds(), _own_seconds() - self.own
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - own
        # Below 0 by more than rounding, the system counts other cores.
        return max(0.0, others) if others >= -(0.02 * own + 0.1) else None

    def _device_bytes(self):
        if self.machine.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.machine.device)
        return total - free - torch.cuda.memory_reserved(self.machine.device)


def _after(now, before, combine):
    return None if now is None or before is None else combine((before, now))


def _busy_seconds():
    """Busy time since the machine started, of the cores that this process may use; None where one is not listed."""
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
    """The most memory used so far, in bytes: of the device on CUDA, of the process on a CPU, else None."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device)
    if machine.device.type == "cpu" and platform.system() == "Linux":
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None


def compiled(function):
    """torch.compile into a single graph, or an error; gradients are those of the function without compilation.

    The limit on recompilations counts for each model apart, since several models share their code. Numbers in which
    they differ, such as a capacity, stay constants of the graph (dynamic=False). The backward pass runs outside of
    autocast, as in eager mode, else the router's gradients would be in bfloat16; torch sets that for a whole process.
    What torch compiled before is used only where our kernels are the same: it has their shapes, and its key has not.
    """
    torch.compiler.config.cache_key_tag = digest_of_kernels()
    torch._functorch.config.backward_pass_autocast = "off"
    options = dict(fullgraph=True, dynamic=False)
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13 has it, 2.11 has not
        return torch.compile(function, isolate_recompiles=True, **options)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, **options)


def digest_of_kernels() -> str:
    """SHA-256 of the modules that define operators of our own."""
    paths = sorted((ROOT / "speed").glob("*kernels.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next step needs as much. -> whether glibc does so

    Pages that come anew from the system are zeroed first: on one CPU core 2 of 80 ms of a training step with 4 experts.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, 32 << 20)) and bool(mallopt(trim_threshold, 1 << 30))


def loaded_code() -> list[str]:
    """The files of this project that this process has imported; not config files, which are no modules."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file).resolve() for file in files if file and os.path.isabs(file)}  # torch has modules of no file
    ours = (path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT))
    return sorted(str(path) for path in ours if not {"site-packages", "dist-packages"} & set(path.parts))


def git_state(paths: list[str] | None = None) -> dict:
    """{"commit": git's, "dirty": whether one of these files differs from it or is not in it}; None where git fails.

    paths: from ROOT; by default loaded_code(), so that a change to another part of the project makes no run dirty.
    """
    options = ("--porcelain", "--untracked-files=all", "--ignored")
    changes = git("--literal-pathspecs", "status", *options, "--", *(loaded_code() if paths is None else paths))
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def same_code(before: str | None, now: str | None, paths: list[str] | None = None) -> bool:
    """Whether these files, by default loaded_code(), are the same in two commits; an unknown commit counts as no."""
    are_known = all(re.fullmatch("[0-9a-f]{40,64}", commit or "") for commit in (before, now))
    paths = loaded_code() if paths is None else paths
    return are_known and git("--literal-pathspecs", "diff", "--quiet", before, now, "--", *paths) is not None


def git(*arguments):
    """The output of a git command on this project, stripped; None where git fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
