"""Where a script runs: the choice, its reason, and a description that gives nothing away."""

import getpass
import json
import os
import platform
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from run.records import is_exclusive
from support import machines
from support.options import ConfigError

CPU = machines.choose("cpu", "float32", False)
GIB = 2**30
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends to have one GPU of a compute capability."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.fixture
def bare(monkeypatch):
    """A machine without a GPU of any kind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def refused(*arguments):
    with pytest.raises(ConfigError) as caught:
        machines.choose(*arguments)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_auto_without_a_gpu_is_the_cpu_and_says_why(bare):
    chosen = machines.choose()
    assert (chosen.device.type, chosen.dtype, chosen.compile) == ("cpu", torch.float32, False)
    assert chosen.reason == (
        "device cpu (auto: no GPU found), dtype float32 (auto: on cpu), not compiled (auto compiles on CUDA only)"
    )


def test_auto_on_a_new_gpu_is_bfloat16_and_compiled(gpu):
    gpu((9, 0))
    chosen = machines.choose()
    assert (chosen.device.type, chosen.dtype, chosen.compile) == ("cuda", torch.bfloat16, True)
    assert chosen.reason == "device cuda (auto: found), dtype bfloat16 (auto: on CUDA), compiled (pays on CUDA)"


def test_an_old_gpu_gets_float32_even_when_bfloat16_is_asked_for(gpu):
    gpu((7, 5))
    assert machines.choose().dtype == torch.float32
    chosen = machines.choose(dtype="bfloat16")
    assert chosen.dtype == torch.float32
    assert "bfloat16: this GPU has no bfloat16 units" in chosen.reason


def test_what_is_asked_for_is_what_one_gets(bare):
    chosen = machines.choose("cpu", "bfloat16", True)
    assert (chosen.device.type, chosen.dtype, chosen.compile) == ("cpu", torch.bfloat16, True)
    assert chosen.reason.count("asked for") == 3
    assert machines.choose("cpu", "bfloat16", False).compile is False


def test_compile_false_is_kept_on_a_gpu(gpu):
    gpu((9, 0))
    chosen = machines.choose(compile=False)
    assert chosen.compile is False and "not compiled (asked for)" in chosen.reason


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"], ids=lambda device: f"ask-{device}")
def test_an_absent_device_is_refused_with_what_there_is(bare, device):
    message = refused(device)
    for word in (f"device={device!r}", "has no", "it has cpu", "device=auto"):
        assert word in message


@no_cuda
def test_cuda_is_really_refused_here():
    assert "no cuda device" in refused("cuda")


def test_a_gpu_beyond_the_last_is_refused(gpu):
    gpu((9, 0))
    message = refused("cuda:1")
    assert "cuda:1" in message and "1 CUDA device" in message


def test_a_device_that_is_none_is_refused_with_the_choices(bare):
    message = refused("toaster")
    for word in ("toaster", "auto", "cpu", "cuda", "mps"):
        assert word in message


def test_autocast_changes_matrix_products_only_where_it_was_chosen():
    square = torch.ones(2, 2)
    with machines.choose("cpu", "float32").autocast():
        assert (square @ square).dtype == torch.float32
    with machines.choose("cpu", "bfloat16").autocast():
        assert (square @ square).dtype == torch.bfloat16


def test_inference_at_any_length_leaves_out_cudnn_on_cuda_alone():
    """Its attention plans anew for each length. A CPU's choice of kernels stays torch's, bit for bit."""
    allowed = torch.nn.attention._cur_sdpa_kernel_backends
    before, cpu = allowed(), machines.choose("cpu", "bfloat16")
    with cpu.any_length():
        assert allowed() == before and torch.is_autocast_enabled("cpu")
    cuda = cpu._replace(device=torch.device("cuda"), dtype=torch.float32)
    with cuda.any_length():
        assert set(allowed()) == set(machines.WITHOUT_CUDNN)
    assert allowed() == before
    assert (cpu.attention_of_any_length, cuda.attention_of_any_length) == (None, "flash, efficient or math")


def test_describe_is_numbers_and_names_that_records_need():
    described = machines.describe(machines.choose("cpu", "float32", False))
    assert set(described) == {
        "device",
        "device_type",
        "cores",
        "threads",
        "torch",
        "cuda",
        "python",
        "dtype",
        "compile",
    }
    assert described["device"] and described["device_type"] == "cpu" and described["cuda"] is None
    assert type(described["cores"]) is int and described["cores"] >= 1 and type(described["threads"]) is int
    assert described["dtype"] == "float32" and described["compile"] is False
    assert described["torch"] == torch.__version__ and type(described["torch"]) is str  # checkpoints hold no other
    assert described["python"] == platform.python_version()


def test_describe_gives_away_no_path_host_or_user(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "secrethost")
    monkeypatch.setenv("HOSTNAME", "secrethost")
    values = [value for value in machines.describe(machines.choose("cpu")).values() if isinstance(value, str)]
    everything = json.dumps(values)
    for secret in (
        platform.node(),
        os.uname().nodename,
        str(machines.ROOT),
        os.path.expanduser("~"),
        getpass.getuser(),
    ):
        assert secret not in values and (len(secret) < 5 or secret not in everything)


def test_a_cpu_without_proc_still_has_a_name(monkeypatch):
    def absent(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(machines.Path, "read_text", absent)
    assert machines._cpu_name()


def test_peak_memory_is_bytes():
    peak = machines.peak_memory(machines.choose("cpu"))
    if platform.system() == "Linux":
        assert 50e6 < peak < 1e12  # torch alone takes more than 50 MB; kB taken for bytes would not
    else:
        assert peak is None


def git(folder, *arguments):
    """What git prints, in a folder whose commits need nobody's configuration."""
    options = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *options, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A function that writes {path: text} into the repository that is the code's, and commits it all. -> the commit"""
    monkeypatch.setattr(machines, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")

    def commit(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-q", "-m", "one more")
        return git(tmp_path, "rev-parse", "HEAD")

    return commit


CODE = ["model.py", "run/update.py"]


def test_code_is_dirty_where_a_file_that_trains_differs_and_clean_where_another_one_does(tmp_path, committed):
    commit = committed({"model.py": "1\n", "run/update.py": "1\n", "report/page.py": "1\n", "tests/test_a.py": "1\n"})
    assert machines.git_state(CODE) == {"commit": commit, "dirty": False}
    for name in ("report/page.py", "tests/test_a.py", "notes.py"):
        (tmp_path / name).write_text("2\n")
    assert machines.git_state(CODE) == {"commit": commit, "dirty": False}
    assert machines.git_state([*CODE, "notes.py"]) == {"commit": commit, "dirty": True}  # not tracked
    (tmp_path / "model.py").write_text("2\n")
    assert machines.git_state(CODE) == {"commit": commit, "dirty": True}


def test_two_commits_are_the_same_code_where_no_file_that_trains_differs(committed):
    first = committed({"model.py": "1\n", "run/update.py": "1\n", "report/page.py": "1\n"})
    drawn = committed({"report/page.py": "2\n"})
    other = committed({"run/update.py": "2\n"})
    assert machines.same_code(first, drawn, CODE) and machines.same_code(first, first, CODE)
    assert not machines.same_code(first, other, CODE) and not machines.same_code(drawn, other, CODE)


def test_unknown_commits_are_not_the_same_code(tmp_path, committed, monkeypatch):
    commit = committed({"model.py": "1\n"})
    for unknown in (None, "", "0" * 40, f"--output={tmp_path / 'made'}"):  # the last one may be a stranger's
        assert not machines.same_code(unknown, commit, CODE) and not machines.same_code(commit, unknown, CODE)
    assert not machines.same_code(None, None, CODE) and not (tmp_path / "made").exists()
    monkeypatch.setenv("PATH", "")
    assert not machines.same_code(commit, commit, CODE)


def test_the_code_of_a_run_is_what_train_imports():
    """Neither tables, papers and figures, nor the tests, nor packages that are installed inside of the project."""
    program = "import json, train; from support import machines; print(json.dumps(machines.loaded_code()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=machines.ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    assert {"train.py", "model.py", "moe.py", "routing.py", "run/update.py", "data/common.py"} <= set(loaded)
    assert not [path for path in loaded if path.startswith(("report", "papers", "analysis", "speed", "tests"))]


def test_installed_packages_are_not_the_code_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "ROOT", tmp_path)
    for name in ("ours.py", ".venv/lib/site-packages/theirs.py"):
        module = types.ModuleType(Path(name).stem)
        module.__file__ = str(tmp_path / name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert machines.loaded_code() == ["ours.py"]


def test_without_a_repository_or_without_git_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(machines, "ROOT", tmp_path)
    assert machines.git_state(CODE) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert machines.git_state(CODE) == {"commit": None, "dirty": None}


def test_other_load_is_the_time_of_others_on_the_same_cores(monkeypatch):
    """0.5 core-seconds of somebody else's beside 2 of our own; an earlier session's are added."""
    clock = {"busy": 100.0, "own": 10.0}
    monkeypatch.setattr(machines, "_busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(machines, "_own_seconds", lambda: clock["own"])
    other_load = machines.OtherLoad(CPU)
    clock |= {"busy": 102.5, "own": 12.0}
    assert other_load.so_far() == {"core_seconds": 0.5, "device_bytes": None}
    assert machines.OtherLoad(CPU, other_load.so_far()).so_far()["core_seconds"] == 0.5
    clock["own"] = 12.6  # the two clocks tick apart
    assert other_load.so_far()["core_seconds"] == 0
    clock["own"] = 12.7  # the system's clock is not that of our cores
    assert other_load.so_far()["core_seconds"] is None
    monkeypatch.setattr(machines, "_busy_seconds", lambda: None)
    assert other_load.so_far()["core_seconds"] is None
    assert machines.OtherLoad(CPU).so_far()["core_seconds"] is None


def test_on_a_gpu_the_memory_of_another_run_is_the_load_of_others(monkeypatch):
    """5 GiB in use, 4 of them ours with the context; then another run takes 3 GiB and leaves again."""
    free = [75 * GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GIB)
    gpu = CPU._replace(device=torch.device("cuda", 0))
    other_load = machines.OtherLoad(gpu)
    assert is_exclusive("cuda", None, other_load.so_far()["device_bytes"])
    free[0] = 72 * GIB
    with_another = other_load.so_far()
    free[0] = 75 * GIB
    assert machines.OtherLoad(gpu, with_another).so_far()["device_bytes"] == 4 * GIB
    assert not is_exclusive("cuda", None, 4 * GIB)


def test_what_an_earlier_session_could_not_tell_stays_unknown(monkeypatch):
    monkeypatch.setattr(machines, "_busy_seconds", lambda: 100.0)
    monkeypatch.setattr(machines, "_own_seconds", lambda: 10.0)
    assert machines.OtherLoad(CPU).so_far()["core_seconds"] == 0
    assert machines.OtherLoad(CPU, machines.UNKNOWN_LOAD).so_far() == machines.UNKNOWN_LOAD


def test_busy_cores_are_known_only_where_the_system_tells_of_each(monkeypatch):
    """A container may show another machine's /proc/stat, or a part of it."""
    shown = "cpu  9 0 0 9 0 0 0 0 0 0\ncpu0 100 20 30 999 999 0 0 50 7 7\ncpu2 100 0 0 999 0 0 0 0 0 0\nintr 5\n"
    monkeypatch.setattr(machines.Path, "read_text", lambda path: shown)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    for cores, seconds in (({0}, 2.0), ({0, 2}, 3.0), ({0, 1}, None), ({1}, None)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: cores, raising=False)
        assert machines._busy_seconds() == seconds


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_a_busy_process_on_our_core_is_other_load():
    """Both on one core, so that what the rest of the machine does has no say."""
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        other_load, started = machines.OtherLoad(CPU), time.perf_counter()
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"])
        # Waited for, it became a child whose time is ours, so it is no other load; one that still runs is.
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        while time.perf_counter() - started < 2.5:
            pass
        seen = other_load.so_far()["core_seconds"]
        elapsed = time.perf_counter() - started
        other.kill()
        other.wait()
    finally:
        os.sched_setaffinity(0, cores)
    assert 0.3 < seen < elapsed


FAULTS = """
import resource
import sys
import torch
sys.path.insert(0, {root!r})
from support import machines
assert machines.keep_freed_memory()
def step():
    return [torch.ones(6_000_000) for _ in range(8)]
for _ in range(5):
    step()  # until the heap has found its size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.soak
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_kept_is_not_asked_for_again():
    """192 MB a step are 46,875 pages of 4 kB. Without keep_freed_memory some processes ask for all of them in each of
    20 steps, and some, by the chance of what lies where, for none: hence two."""
    for _ in range(2):
        program = FAULTS.format(root=str(machines.ROOT))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 10_000
