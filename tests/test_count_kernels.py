"""Kernels and bytes of a training step and an evaluation batch, counted without a GPU, do not grow."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import soaked

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]

pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith(PINNED), reason=f"counted with torch {PINNED}"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="counted with a CPU build of torch"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


COUNTED = [  # config and options, layers; kernels and bytes of an update, then of an evaluation batch
    ("shakespeare_moe4_every2", 2, [114, 3_673_707_772, 61, 1_079_166_556]),  # a dense block and one with experts
    soaked("shakespeare_dense", 6, [202, 9_465_522_608, 78, 3_038_211_124]),
    soaked("shakespeare_moe4", 6, [349, 11_627_825_672, 184, 3_662_415_308]),
    soaked("shakespeare_dense --fused_update=True", 6, [154, 9_338_120_624, 78, 3_038_211_124]),
    soaked("shakespeare_moe4 --fused_update=True", 6, [301, 11_245_619_720, 184, 3_662_415_308]),
    soaked("shakespeare_moe4 --routing_kernels=True", 6, [266, 10_545_410_792, 92, 3_318_014_748]),
    soaked("shakespeare_moe4 --fused_update=True --routing_kernels=True", 6, [218, 10_163_204_840, 92, 3_318_014_748]),
]


@pytest.mark.parametrize("what, n_layer, counted", COUNTED)
def test_kernels_and_bytes_only_fall(what, n_layer, counted, tmp_path, monkeypatch):
    """More is slower on every GPU. Fewer is an improvement, and belongs into COUNTED, so that it stays one."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stem, *options = what.split()
    command = [sys.executable, "tests/count_kernels.py", f"config/{stem}.py", f"--n_layer={n_layer}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [found[part][of] for part in ("update", "evaluation") for of in ("kernels", "bytes")] == counted
