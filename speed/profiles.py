"""Where the time of a unit goes: kernels by class on CUDA, operations elsewhere.

    lines = profile_lines(candidate, "train", unit, folder)

torch's profiler lists each operation with the time of its kernels, each kernel by itself, and annotated stretches with
all that ran in them. On CUDA only the kernels count here, elsewhere only what an operation spent outside of others.
"""

import re
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from speed.bench_records import significant

CLASSES = (  # (class of kernels, pattern of their names): the first that matches
    # Inductor names a kernel by all operations fused into it, attention too, so these come first.
    ("matrix products", "^triton_tem_|^(up|down|route|linear|routed|head)_kernel"),  # the latter are of decoding
    ("norm, dropout, elementwise (Triton)", "^triton_"),
    ("attention", "cudnn|flash|fmha|sdpa|attention"),
    ("optimiser, clipping, totals", "multi_tensor|adam"),
    ("matrix products", "gemm|gemv|nvjet|cublas|cutlass|xmma|split_?k"),
    ("copies", "memcpy|memset|copy"),
    ("elementwise (eager)", "elementwise|reduce|norm|softmax|dropout"),
    ("other", ""),
)
SLOWEST = 10


class Row(NamedTuple):
    """A kernel or an operation, per unit."""

    name: str
    ms: float
    launches: float


def class_of(name):
    """The class of a kernel with this name."""
    return next(kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE))


def rows_of(averages, on_device, repeats=1) -> list[Row]:
    """A Row for each kernel (on_device) or operation in the key_averages() of `repeats` units, slowest first."""
    rows = []
    for one in averages:
        if on_device and one.device_type != DeviceType.CPU and not one.is_user_annotation:
            rows.append(Row(one.key, one.self_device_time_total / 1000 / repeats, one.count / repeats))
        elif not on_device:
            rows.append(Row(one.key, one.self_cpu_time_total / 1000 / repeats, one.count / repeats))
    return sorted(rows, key=lambda row: row.ms, reverse=True)


def by_class(kernels) -> list[Row]:
    """The sums of each class, largest first."""
    found = {}
    for name, ms, launches in kernels:
        kind = class_of(name)
        before = found.get(kind, Row(kind, 0.0, 0.0))
        found[kind] = Row(kind, before.ms + ms, before.launches + launches)
    return sorted(found.values(), key=lambda row: row.ms, reverse=True)


def profile_lines(candidate, task, unit, folder):
    """Traces a unit into the folder; the lines list classes of kernels (on CUDA), and the slowest ten of all."""
    machine, path = candidate.machine, folder / f"{candidate.name}-{task}.json"
    on_device = machine.device.type == "cuda"
    unit.prepare()
    machine.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiler:
        unit.run()
        machine.synchronize()
    profiler.export_chrome_trace(str(path))
    rows = rows_of(profiler.key_averages(), on_device, unit.repeats)
    yield from table_lines(f"{candidate.title}, {task}", rows, on_device)
    yield f"  trace: {path}"


def table_lines(title, rows, on_device):
    """rows: of rows_of, per unit."""
    total, launches = (sum(column) for column in zip(*(row[1:] for row in rows)))
    what = "kernels" if on_device else "operations"
    yield f"{title}: {significant(total)} ms in {launches:,.0f} {what}"
    yield from (line_of(row, total) for row in (by_class(rows) if on_device else []))
    yield f"  The slowest {what}:"
    yield from (line_of(row, total) for row in rows[:SLOWEST])


def line_of(row, total):
    return f"  {row.ms / (total or 1):>6.1%} {row.ms:>9.3f} ms {row.launches:>6,.0f} ×  {row.name[:70]}"
