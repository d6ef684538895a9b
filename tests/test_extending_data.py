"""The recipes of docs/extending.md for a config and a data set, followed literally in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import english

from support.files import ROOT

RECIPES = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
CONFIG = '''"""My text, two small experts"""

from config.shakespeare_moe4 import *

dataset = "mytext"
n_expert = 2
n_layer, n_head, n_embd, block_size, batch_size = 1, 1, 8, 8, 2
max_iters, warmup_iters, eval_interval, log_interval, eval_iters = 2, 1, 1, 1, 1
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the code, without results and prepared data."""
    left_out = shutil.ignore_patterns(".*", "results", "tests", "out", "docs", "*.bin", "meta.json", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "project", ignore=left_out)
    return tmp_path / "project"


def test_a_config_and_a_data_set_made_by_the_recipes_are_trained_on(project):
    """train.py prepares the new data set by itself; the record names both."""
    prepare = re.search(r"## A data set\n.*?```python\n(.*?)```", RECIPES, re.DOTALL)[1]
    (project / "data" / "mytext").mkdir()
    (project / "data" / "mytext" / "prepare.py").write_text(prepare)
    (project / "data" / "mytext" / "input.txt").write_text(english(300, seed=1))
    (project / "config" / "mytext.py").write_text(CONFIG)

    command = [sys.executable, "train.py", "config/mytext.py", "--device=cpu", "--inference_samples=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    record = json.loads((project / "out" / "mytext-s1337" / "summary.json").read_text())
    assert record["config"]["title"] == "My text, two small experts" and record["config"]["n_expert"] == 2
    assert (record["dataset"]["name"], record["dataset"]["canonical"]) == ("mytext", False)
    assert set(record["dataset"]["splits"]) == {"train", "val"}
