"""A router of one's own: the recipe of docs/extending.md followed literally, and what a router's class may hold."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TINY, tiny

import routing
from model import GPT, Decoder
from run import accounting, trained
from run.settings import Config
from speed import decoding
from support import machines

CPU = machines.Machine(torch.device("cpu"), torch.float32, compile=False, reason="")
RECIPE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("## A router", 1)[1].split("\n## ", 1)[0]
CLASS, LINE, CONFIG = re.findall(r"```python\n(.*?)```", RECIPE, re.DOTALL)

# Run in the copy: train straight, train with an interruption, sample, analyse, read the record.
STORY = """
import os, signal, sys
import analyze, routing, sample, train
from run import checkpoint, records, update

options, rate = sys.argv[1:], update.learning_rate
assert train.main([*options, "--out_dir=straight"]) == 0

def interrupted(step, config):
    if step == 12:
        update.learning_rate = rate
        os.kill(os.getpid(), signal.SIGINT)
    return rate(step, config)

update.learning_rate = interrupted
assert train.main([*options, "--out_dir=resumed"]) == 130
assert train.main([*options, "--out_dir=resumed", "--init_from=resume"]) == 0
one, other = (checkpoint.load(f"{folder}/ckpt.pt")["model"] for folder in ("straight", "resumed"))
assert all((one[name] == other[name]).all() for name in one)
for block in (0, 1):
    assert one[f"blocks.{block}.mlp.router.seen"] == 20 * 4 * 16
    scale = one[f"blocks.{block}.mlp.router.scale"]
    assert 9 < scale < 11 and scale != 10

assert sample.main(["--out_dir=straight", "--num_samples=1", "--max_new_tokens=30"]) == 0
few = ["--characters=500", "--pass_characters=200", "--gradient_batches=2", "--sample_characters=20"]
assert analyze.main(["straight", *few]) == 0
record = records.read("straight/summary.json")
assert record["config"]["router"] == "scaled" and not record["leaky"]
assert record["parameters"]["router"] == 2 * (4 * 16 + 1)
assert os.path.exists("straight/analysis.json")
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the code in which the recipe was followed."""
    copy = tmp_path_factory.mktemp("copy") / "charmoe"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "results", "out", "docs", "tests", "*.bin", "*.txt", "*.zip")
    shutil.copytree(ROOT, copy, ignore=skipped)
    routers, settings = copy / "routing.py", copy / "run" / "settings.py"
    routers.write_text(routers.read_text() + "\n\n" + CLASS + "\n\n" + LINE)
    text = settings.read_text()
    assert text.count('"expert_choice"') == 1
    settings.write_text(text.replace('"expert_choice"', '"expert_choice", "scaled"'))
    (copy / "config" / "shakespeare_scaled.py").write_text(CONFIG)
    return copy


def run(copy, code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def test_the_recipe_gives_a_router_that_trains_resumes_samples_is_analysed_and_recorded(extended, words):
    options = {**TINY, "dataset": words, "n_expert": 4}
    done = run(extended, STORY, "config/shakespeare_scaled.py", *(f"--{key}={value}" for key, value in options.items()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_what_its_class_refuses_is_told_with_all_other_problems_before_training(extended):
    code = "import sys, train\nfrom support.console import *\ntrain.main(sys.argv[1:])"
    arguments = ["config/shakespeare_scaled.py", "--router_bias_rate=0.1", "--router_temperature=2", "--n_head=5"]
    done = run(extended, code, *arguments)
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert all(word in told for word in ("n_head = 5", "router_bias_rate=0", "scaled has a temperature of its own"))


# ---------------------------------------------------------------------------------------------------------------------
# What a class may hold


class Holder(routing.LearnedRouter):
    """Parameters and buffers of many kinds, none of which is anyone else's business."""

    def __init__(self, config, layer, symbol_counts):
        super().__init__(config, layer, symbol_counts)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.full((config.n_expert,), 0.5))
        self.inner = nn.Sequential(nn.Linear(config.n_embd, config.n_embd), nn.LayerNorm(config.n_embd))
        nn.init.constant_(self.inner[0].weight, 0.25)
        self.register_buffer("counter", torch.tensor(2**40))
        self.register_buffer("blocked", torch.tensor([-torch.inf] + [0.0] * (config.n_expert - 1)))

    def forward(self, x_BTD, ids_BS):
        logits = super().forward(x_BTD + self.inner(x_BTD), ids_BS)
        return self.scale * logits + self.bias + self.blocked


@pytest.fixture
def holder(monkeypatch):
    """A model with the Holder in each of its layers."""
    monkeypatch.setitem(routing.ROUTERS, "holder", Holder)
    return GPT(tiny(n_expert=4, router="holder", expert_top_k=2), 11).eval()


def test_its_parameters_keep_the_values_of_its_constructor(holder):
    for layer in holder.moe_layers():
        router = layer.router
        assert router.scale == 10 and (router.bias == 0.5).all() and (router.inner[0].weight == 0.25).all()
        assert router.weight.std().item() == pytest.approx(0.02, rel=0.5), "left to the layer, which fills it"


def test_its_parameters_are_counted_as_the_routers(holder):
    own = sum(parameter.numel() for layer in holder.moe_layers() for parameter in layer.router.parameters())
    assert accounting.count_parameters(holder)["router"] == own


def test_its_buffers_are_loaded_whatever_their_type_and_values(holder):
    again = trained.model_of(holder.config, trained.Vocabulary("character", tuple("abcdefghijk")), holder.state_dict())
    for name, value in holder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_no_shortcut_of_decoding_passes_it_by(holder):
    """It inherits from a router that has one."""
    ids = torch.randint(11, (2, 16))
    fast, plain = decoding.fastest(holder, 2, CPU), Decoder(holder, 2)
    for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
        torch.testing.assert_close(fast.read(part)[0], plain.read(part)[0], rtol=1e-4, atol=1e-4)
    assert type(decoding.pack_weights(holder).moe_layers()[0].router.inner[0]) is nn.Linear


def test_its_traits_are_those_that_a_config_is_checked_by(monkeypatch):
    class Leaky(routing.LearnedRouter):
        is_causal, causal_twin, is_trained = False, "router=hash", False

    monkeypatch.setitem(routing.ROUTERS, "leaky", Leaky)
    config = Config(n_expert=4, router="leaky")
    assert config.leaks == {"router=leaky": "router=hash"} and not config.is_causal
    (problem,) = config.problems()
    assert "router=leaky is not trained" in problem[1]
