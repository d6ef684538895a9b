"""Triton's interpreter, which runs kernels on a CPU. A process chooses it when it starts, so a test file runs itself.

def test_kernels_in_the_interpreter_equal_the_twins(n):
    assert_no_problems_in_the_interpreter(__file__, n)

if __name__ == "__main__":
    tell_problems(problems_in_the_interpreter)      # of (whether in the long form) -> a line for each
"""

import os
import subprocess
import sys

import torch


def assert_no_problems_in_the_interpreter(path, n):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, path, str(n)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def tell_problems(problems_in_the_interpreter):
    torch.set_num_threads(1)
    sys.exit("\n".join(problems_in_the_interpreter(sys.argv[1:] == ["1"])) or 0)
