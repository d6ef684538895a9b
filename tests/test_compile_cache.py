"""What torch.compile made is kept for the next process, and no fault of the file stops a run."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from support import compile_cache, files, machines
from support.files import ROOT, FileError

CPU = machines.choose("cpu", "float32", True)


class Compiler:
    """Stands in for torch's: what was compiled or loaded in this process, by key."""

    def __init__(self, monkeypatch):
        self.made, self.loaded = {}, []
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", self.save)
        monkeypatch.setattr(torch.compiler, "load_cache_artifacts", self.load)

    def info(self, keys):
        return types.SimpleNamespace(artifacts={"inductor": list(keys)})

    def save(self):
        return (json.dumps(self.made).encode(), self.info(self.made)) if self.made else None

    def load(self, content):
        self.loaded.append(json.loads(content))
        return self.info(self.loaded[-1])


@pytest.fixture
def compiler(monkeypatch):
    return Compiler(monkeypatch)


def use(folder, key="dense"):
    """Compile as a process would. -> the lines that were said"""
    said = []
    with compile_cache.reused(str(folder), CPU, key, said.append):
        pass
    return said


def the_file(folder):
    (path,) = folder.glob("*.cache")
    return path


def test_a_file_is_written_read_and_written_again_only_where_it_lacks_something(compiler, tmp_path):
    folder = tmp_path / "new" / "cache"
    assert use(folder) == [] and not folder.exists(), "nothing was compiled"
    compiler.made = {"a": "code"}
    assert use(folder) == [] and compiler.loaded == []
    path = the_file(folder)
    assert path.name.endswith(f"-torch-{torch.__version__}-float32-dense.cache") and " " not in path.name
    before = path.stat().st_mtime_ns
    assert use(folder) == [f"compiled before: using {path}"] and compiler.loaded == [{"a": "code"}]
    assert path.stat().st_mtime_ns == before
    compiler.made = {"a": "code", "b": "more"}
    use(folder)
    use(folder)
    assert compiler.loaded[-1] == compiler.made
    use(folder, key="moe4")
    assert len([*folder.glob("*.cache")]) == 2, "each config has a file of its own"


def test_without_a_folder_nothing_is_asked_of_torch(monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: pytest.fail("was asked"))
    assert use("") == []


def damaged(content):
    return content[:-3] + b"xyz"


FAULTS = {
    "damaged": damaged,
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another program's": lambda content: b"\x80\x02}q\x00.",
    "of another device": lambda content: content.replace(b'"device": "', b'"device": "other '),
    "of another version of torch": lambda content: content.replace(b'"torch": "', b'"torch": "9'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_file_is_named_never_loaded_and_made_anew(compiler, tmp_path, fault):
    compiler.made = {"a": "code"}
    use(tmp_path)
    path = the_file(tmp_path)
    good = path.read_bytes()
    path.write_bytes(FAULTS[fault](good))
    (line,) = use(tmp_path)
    assert line.startswith(f"{path} is not used, and this run compiles anew: ") and "\n" not in line
    assert compiler.loaded == [] and path.read_bytes() == good


def test_a_fault_of_torch_or_of_the_disk_is_one_line(compiler, tmp_path, monkeypatch):
    compiler.made = {"a": "code"}
    use(tmp_path)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: None)
    assert "torch cannot read it" in use(tmp_path)[0]

    def breaks(*_):
        raise RuntimeError("an inner error\nwith a second line")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", breaks)
    assert use(tmp_path)[0].endswith("this run compiles anew: an inner error")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", breaks)
    assert use(tmp_path)[1].endswith("could not be made: an inner error")
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"x", compiler.info("x")))
    assert use(tmp_path / "file")[0].startswith(f"{tmp_path / 'file'} could not be written: ")


def test_two_runs_with_the_same_settings_do_not_write_at_once(compiler, tmp_path):
    compiler.made = {"a": "code"}
    use(tmp_path)
    path = the_file(tmp_path)
    path.unlink()
    with open(f"{path}.lock", "ab") as lock:
        assert files.lock(lock)
        assert use(tmp_path) == [] and not path.exists()
    use(tmp_path)
    assert path.exists()


def test_a_failure_inside_writes_nothing(compiler, tmp_path):
    compiler.made = {"a": "code"}
    with pytest.raises(FileError), compile_cache.reused(str(tmp_path), CPU, "dense", print):
        raise FileError("out of memory, say")
    assert not [*tmp_path.iterdir()]


def test_a_change_of_our_kernels_compiles_anew(tmp_path, monkeypatch):
    """torch's key has not the shapes that our operators return, so a graph of other block sizes would be used."""
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    monkeypatch.setattr(machines, "ROOT", tmp_path)
    tags = []
    for size in (16, 32):
        (tmp_path / "speed").mkdir(exist_ok=True)
        (tmp_path / "speed" / "some_kernels.py").write_text(f"TOKENS = {size}")
        machines.compiled(torch.relu)
        tags.append(torch.compiler.config.cache_key_tag)
    assert len({"", *tags}) == 3


PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
from support import compile_cache, machines

machine = machines.choose("cpu", "float32", True)
with compile_cache.reused(sys.argv[1], machine, "twice", print):
    compiled = machines.compiled(lambda x, w: x @ w)  # one call of a library: no C++ to compile
    compiled(torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)).sum().backward()
print(dict(counters["aot_autograd"]))
"""


@pytest.mark.soak
def test_torch_compiles_from_the_file_in_a_second_process(tmp_path):
    """With an empty cache of inductor's own, as on a new machine."""
    said = []
    for number in (1, 2):
        own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor{number}"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "compiled before" not in said[0] and "'autograd_cache_miss': 1" in said[0]
    assert "compiled before: using " in said[1] and "'autograd_cache_hit': 1" in said[1] and "miss" not in said[1]
