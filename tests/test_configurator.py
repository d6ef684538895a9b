"""The configuration: each test is named for what would break. No network, no GPU, no torch."""

import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Literal

import pytest

import routing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import names  # noqa: E402
from run.identity import Identity  # noqa: E402
from run.settings import Config  # noqa: E402
from support.configurator import Message, parse  # noqa: E402
from support.options import EXPERIMENT, SCHEDULE, ConfigError, option, options_of  # noqa: E402

CONFIG_FILES = sorted((ROOT / "config").glob("*.py"))

# What nanoGPT's config/train_shakespeare_char.py assigns, key for key.
NANOGPT_SHAKESPEARE = """
# comments first, no docstring
out_dir = 'out-shakespeare-char'
eval_interval = 250 # frequent
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'
# compile = False
"""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A small option class, as a script other than train.py would have."""

    prompt: str = option("\n", "where the text starts")
    temperature: float = option(0.8, "softness", at_least=0)
    top_k: int | Literal["all"] = option(200, "characters to choose from", at_least=1)
    cache: bool = option(True, "keys and values are kept")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config file into an empty current folder and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file


def problems(*argv: str, cls: type = Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(cls, list(argv))
    return caught.value.problems


def only_problem(*argv: str, cls: type = Config) -> str:
    found = problems(*argv, cls=cls)
    assert len(found) == 1, found
    return found[0]


def page(*argv: str) -> str:
    with pytest.raises(Message) as caught:
        parse(Config, list(argv), usage="python train.py [config/FILE.py ...] [--key=value ...]")
    return caught.value.text


# ---------------------------------------------------------------------------------------------------------------------
# The files in config/


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_shipped_config_parses_alone_and_on_a_cpu(path):
    alone = parse(Config, [str(path)])
    small = parse(Config, [str(path), str(ROOT / "config" / "cpu.py")])
    assert alone.title and alone.out_dir == f"out/{path.stem}-s1337"
    assert (small.n_layer, small.n_embd, small.block_size, small.max_iters, small.device) == (4, 128, 64, 2000, "cpu")
    assert small.eval_interval <= small.max_iters and small.warmup_iters < small.max_iters
    kept = [name for name, about in options_of(Config).items() if about.group == "Mixture of experts"]
    kept += ["dataset", "learning_rate", "min_lr", "weight_decay", "beta2"]
    assert [getattr(small, key) for key in kept] == [getattr(alone, key) for key in kept]


def test_shipped_configs_are_all_different_experiments():
    hashes = [parse(Config, [str(path)]).hash() for path in CONFIG_FILES]
    assert len(set(hashes)) == len(hashes)


def test_shipped_configs_hold_the_papers_protocol():
    def shipped(name):
        return parse(Config, [str(ROOT / "config" / f"{name}.py")])

    dense, large, soft, top2, half = map(
        shipped, ("shakespeare_dense", "text8_moe4", "shakespeare_soft4", "shakespeare_top2", "shakespeare_top2_cap05")
    )
    assert (dense.batch_size, dense.learning_rate, dense.min_lr, dense.warmup_iters, dense.max_iters) == (
        64, 1e-3, 1e-4, 100, 5000,
    )  # fmt: skip
    assert (large.batch_size, large.learning_rate, large.min_lr, large.warmup_iters, large.max_iters) == (
        32, 5e-4, 5e-5, 200, 100_000,
    )  # fmt: skip
    assert (large.dataset, large.eval_interval, large.n_expert, large.expert_kind) == ("text8", 1000, 4, "mlp")
    assert (soft.expert_top_k, soft.expert_kind, soft.aux_loss) == (0, "linear_concat", "none")
    assert [d[0] for d in soft.differences(top2, [EXPERIMENT])] == ["expert_top_k", "gate_renormalize", "aux_loss"]
    assert [d[0] for d in top2.differences(half, [EXPERIMENT])] == ["capacity_factor"]


def test_the_shakespeare_baseline_is_the_default_config():
    shipped = parse(Config, [str(ROOT / "config" / "shakespeare_dense.py")])
    assert shipped.differences(Config(), [EXPERIMENT, SCHEDULE]) == []


def test_nanogpts_own_shakespeare_config_runs_unchanged(write):
    name = write("train_shakespeare_char.py", NANOGPT_SHAKESPEARE)
    config = parse(Config, [name, "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"])
    assert (config.out_dir, config.beta2, config.lr_decay_iters) == ("out-shakespeare-char", 0.99, 5000)
    assert (config.device, config.compile, config.eval_iters, config.log_interval) == ("cpu", False, 20, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-3", 0.001),
        ("--max_iters=1e3", 1000),
        ("--max_iters=1_000", 1000),
        ("--compile=no", False),
        ("--compile=1", True),
        ("--compile", True),
        ("--compile=auto", "auto"),
        ("--bias", True),
        ("--bias=True", True),
        ("--bias=false", False),
        ("--bias=0", False),
        ("--dataset='text8'", "text8"),
        ('--dataset="text8"', "text8"),
        ("--dataset=a=b", "a=b"),
        ("--title=", ""),
        ("--device=cuda:1", "cuda:1"),
    ],
)
def test_command_line_values_take_their_keys_type(argument, expected):
    value = getattr(parse(Config, [argument]), argument[2:].partition("=")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--n_layer=six", "an integer from 1, up to 1000"),
        ("--n_layer=6.5", "an integer from 1, up to 1000"),
        ("--n_layer=0", "an integer from 1, up to 1000"),
        ("--n_layer=-1", "an integer from 1, up to 1000"),
        ("--n_layer=", "an integer from 1, up to 1000"),
        ("--n_layer=1e999", "an integer from 1, up to 1000"),
        ("--max_iters=1e30", "an integer from 1, and one that 64 bits can hold"),
        ("--router_top_p=1e-300", "a number from 0, up to 1, and one that 32 bits can hold"),
        ("--seed=True", "an integer from 0, up to 4294967295"),
        ("--learning_rate=nan", "a number from 0"),
        ("--learning_rate=inf", "a number from 0"),
        ("--learning_rate=fast", "a number from 0"),
        ("--dropout=1", "a number from 0, below 1"),
        ("--beta1=1.0", "a number from 0, below 1"),
        ("--capacity_factor=-1", "a number from 0, up to 1000000"),
        ("--bias=maybe", "True or False"),
        ("--compile=2", "True or False or 'auto'"),
        ("--compile=atuo", "True or False or 'auto'; nearest: 'auto'"),
        ("--device=CPU", "auto, cpu, cuda, cuda:N or mps; nearest: cpu"),
        ("--dtype=FLOAT32", "'auto', 'float32' or 'bfloat16'; nearest: 'float32'"),
        ("--aux_loss=swich", "'switch', 'cv2', 'entropy' or 'none'; nearest: 'switch'"),
        ("--dtype=float16", "'auto', 'float32' or 'bfloat16'; nearest: 'bfloat16'"),
    ],
)
def test_a_bad_value_on_the_line_is_told_with_what_was_expected(argument, expected):
    key, _, text = argument[2:].partition("=")
    assert only_problem(argument) == f"{argument}: {key} is {text!r}; expected {expected}"


@pytest.mark.parametrize(
    "assignment",
    [
        "n_layer = True",
        "n_layer = '6'",
        "n_layer = 6.5",
        "n_layer = None",
        "bias = 1",
        "dropout = False",
        "dropout = '0.1'",
        "dropout = float('nan')",
        "learning_rate = float('inf')",
        "learning_rate = 10**400",
        "dataset = 8",
        "aux_loss = 0",
        "compile = 1",
        "seed = max",
        "n_layer = [6]",
    ],
)
def test_a_wrong_type_in_a_file_is_told_with_its_line(write, assignment):
    problem = only_problem(write("wrong.py", f'"""Wrong"""\n\n{assignment}\n'))
    assert problem.startswith(f"wrong.py:3: {assignment.split()[0]} is ") and "; expected " in problem


def test_an_int_for_a_float_becomes_a_float(write):
    config = parse(Config, [write("ints.py", "weight_decay = 1\nmax_iters = 1e3\n")])
    assert type(config.weight_decay) is float and type(config.max_iters) is int
    assert config.hash() == parse(Config, ["--weight_decay=1.0", "--max_iters=1000"]).hash()


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_the_last_word_counts_between_files_and_options(write):
    first = write("first.py", "n_layer = 2\nn_head = 2\n")
    second = write("second.py", "n_layer = 3\n")
    config = parse(Config, [first, "--n_layer=9", "--n_head=3", second])
    assert (config.n_layer, config.n_head) == (3, 3)
    assert parse(Config, [first, second, "--n_layer=9"]).n_layer == 9


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--n_haed=5"], "--n_haed=5: unknown key 'n_haed'; nearest key: n_head"),
        (["--n-head=5"], "--n-head=5: unknown key 'n-head'; nearest key: n_head"),
        (["--top_k=2"], "--top_k=2: unknown key 'top_k'; nearest key: expert_top_k"),
        (["--zzz"], "--zzz: unknown key 'zzz'; --help lists the keys"),
        (["--n_layer", "5"], "--n_layer 5: expected --n_layer=5"),
        (["--seed", "-1"], "--seed -1: expected --seed=-1"),
        (["--compile", "False"], "--compile False: expected --compile=False"),
        (["--n_layer"], "--n_layer: has no value; expected --n_layer=VALUE, an integer from 1, up to 1000"),
        (["n_layer=5"], "n_layer=5: expected --n_layer=5"),
        (["-n_layer=5"], "-n_layer=5: expected --n_layer=5"),
        (["-v"], "-v: expected --key=value"),
    ],
)
def test_bad_grammar_is_answered_with_the_right_one(argv, expected):
    assert only_problem(*argv) == expected


def test_a_flag_before_a_config_file_takes_no_value(write):
    config = parse(Config, ["--overwrite", write("one.py", "n_layer = 1\n")])
    assert config.overwrite and config.n_layer == 1


def test_all_problems_are_told_at_once(write):
    name = write("bad.py", "n_haed = 5\nn_layer = 'six'\n\ndropout = 2\n")
    found = problems(name, "missing.py", "--aux_loss=swich", "--seed", "3", "--bias=maybe")
    assert [problem.split(": ")[0] for problem in found] == [
        "bad.py:1", "bad.py:2", "bad.py:4", "missing.py", "--aux_loss=swich", "--seed 3", "--bias=maybe",
    ]  # fmt: skip


def test_combinations_are_checked_beside_broken_keys_but_not_with_them():
    found = problems("--n_head=five", "--n_embd=7", "--n_expert=4", "--expert_top_k=5")
    assert len(found) == 2 and found[0].startswith("--n_head=five") and "expert_top_k = 5" in found[1]
    assert problems("--n_haed=7", "--n_embd=7") == ["--n_haed=7: unknown key 'n_haed'; nearest key: n_head"]


def test_a_broken_value_is_told_even_when_a_later_one_overrides_it():
    assert len(problems("--n_layer=six", "--n_layer=6")) == 1


def test_options_classes_of_other_scripts_reuse_the_parser():
    assert parse(Sampling, []) == Sampling()
    assert parse(Sampling, ["--top_k=all", "--temperature=1", "--cache=no"]) == Sampling("\n", 1.0, "all", False)
    assert only_problem("--top_k=0", cls=Sampling).endswith("expected an integer from 1 or 'all'")
    assert only_problem("foo.py", cls=Sampling) == "foo.py: expected --key=value; no config files are taken here"


# ---------------------------------------------------------------------------------------------------------------------
# Config files


def test_a_key_set_by_an_imported_base_is_traced_to_its_line_there(write):
    write("base.py", "n_layer = 2\nn_head = 5\n")
    name = write("child.py", "from base import *\n\nn_layer = 3\n")
    assert only_problem(name) == "base.py:2: n_embd = 384 is not a multiple of n_head = 5"
    assert parse(Config, [name, "--n_head=6"]).n_layer == 3


def test_shipped_bases_can_be_imported_from_any_folder(write):
    name = write("deep/mine.py", "from config.shakespeare_moe4 import *\nn_layer = 2\n")
    config = parse(Config, [name])
    assert (config.n_expert, config.n_layer, config.out_dir) == (4, 2, "out/mine-s1337")


def test_a_second_parse_sees_the_changed_base(write):
    name = write("child.py", "from base import *\n")
    for n_layer in (2, 3):  # same size, same second: a cached module or bytecode would hide the change
        write("base.py", f"n_layer = {n_layer}\n")
        assert parse(Config, [name]).n_layer == n_layer


def test_helpers_of_a_config_file_are_not_keys(write):
    text = "import math\nfrom math import sqrt\n_half = 3\ndef double(x):\n    return 2 * x\nclass Tool: pass\n"
    assert parse(Config, [write("helped.py", text + "n_layer = double(_half)\n")]).n_layer == 6


def test_an_unknown_key_in_a_file_is_not_ignored(write):
    name = write("typo.py", "\nn_experts = 4\n")
    assert only_problem(name) == "typo.py:2: unknown key 'n_experts'; nearest key: n_expert"


def test_the_line_of_the_last_assignment_is_told_wherever_it_stands(write):
    text = "n_haed: int = 1\nif True:\n    n_haed += 1\n\n(n_layer, n_embd) = 'ab'\n"
    assert [p.split(": ")[0] for p in problems(write("deep.py", text))] == ["deep.py:3", "deep.py:5", "deep.py:5"]


@pytest.mark.parametrize(
    "text, told",
    [
        ("n_layer = (6\n", "bad.py:1: syntax error, '(' was never closed: n_layer = (6"),
        ("x = 1\nreturn x\n", "bad.py:2: syntax error, 'return' outside function"),
        ("\nn_layer = 1 / 0\n", "bad.py:2: ZeroDivisionError: division by zero"),
        ("def f():\n    return nothing\n\nn_layer = f()\n", "bad.py:2: NameError: name 'nothing' is not defined"),
        ("import sys\nsys.exit(3)\n", "bad.py:2: SystemExit: 3"),
        ("from bad import *\n", "bad.py: imports itself by way of bad.py"),
        ("from config.shakespeare_dens import *\n", "bad.py:1: ImportError: expected `from config.NAME import *`"),
        ("import config.shakespeare_dense\n", "bad.py:1: ImportError: expected `from config.NAME import *`"),
        ("from no_such_package import *\n", "bad.py:1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("n_layer = 1\0\n", "bad.py: syntax error, source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_cannot_run_is_one_problem_with_its_line(write, text, told):
    assert only_problem(write("bad.py", text), "--n_head=5").startswith(told)


def test_a_failing_base_is_told_by_its_own_line(write):
    write("base.py", "\n\nn_layer = oops\n")
    assert only_problem(write("child.py", "from base import *\n")).startswith("base.py:3: NameError")


def test_a_misspelt_base_is_told_with_the_nearest_one(write):
    problem = only_problem(write("child.py", "from config.shakespeare_dens import *\n"))
    assert problem.endswith(f"nearest: {ROOT / 'config' / 'shakespeare_dense.py'}")


def test_a_missing_config_file_is_told_with_the_nearest_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    for wrong in ("shakespeare_moe4", "config/shakespeare_moe4", "config/shakespere_moe4.py", "shakespeare_moe_4.py"):
        problem = only_problem(wrong)
        assert problem.startswith(f"{wrong}: No such file or directory; expected the path of a config file")
        assert problem.endswith("; nearest: config/shakespeare_moe4.py")


def test_a_folder_or_an_unreadable_path_is_no_config_file(write):
    write("folder/one.py", "")
    assert only_problem("folder").startswith("folder: Is a directory; expected the path of a config file")
    assert only_problem("folder/one.py/two.py").startswith("folder/one.py/two.py: Not a directory; expected")


def test_parsing_leaves_the_process_as_it_was(write, capfd):
    name = write("mine.py", "from config.shakespeare_moe4 import *\nfrom base import *\n")
    write("base.py", "n_layer = 2\n")

    def state():
        return list(sys.path), list(sys.argv), dict(os.environ), os.getcwd(), set(sys.modules), list(sys.meta_path)

    before = state()
    parse(Config, [name])
    problems(name, "--n_head=5")
    page("--help")
    assert state() == before
    assert not [*Path.cwd().rglob("__pycache__"), *(ROOT / "config").rglob("__pycache__")]
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Impossible combinations


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--n_head=5"], "n_embd = 384 is not a multiple of n_head = 5"),
        (["--learning_rate=1e-5"], "min_lr = 0.0001 is more than learning_rate = 1e-05"),
        (["--dataset="], "dataset is empty"),
        (["--device=cdua"], "nearest: cuda"),
        (["--device=cuda:x"], "expected auto, cpu, cuda, cuda:N or mps"),
        (["--n_expert=4", "--expert_top_k=5"], "expert_top_k = 5 is more than n_expert = 4"),
        (["--n_expert=4", "--gate_renormalize"], "cross-entropy never reaches the router; set gate_renormalize=False"),
        (["--n_expert=4", "--expert_top_k=0", "--aux_loss=none", "--capacity_factor=1"], "set capacity_factor=0"),
        (["--n_expert=4", "--expert_top_k=0"], "the constant 1 and balances nothing; set aux_loss='none'"),
        (["--n_expert=4", "--expert_top_k=4"], "the constant 1 and balances nothing; set aux_loss='none'"),
        (["--n_expert=5", "--expert_kind=linear_sum"], "4 n_embd = 1536 cannot be shared evenly by n_expert = 5"),
        (["--n_expert=4", "--moe_every=7"], "no block would be MoE"),
    ],
)
def test_an_impossible_combination_is_refused_with_its_origin(argv, told):
    problem = only_problem(*argv)
    assert told in problem and any(problem.startswith(argument) for argument in argv)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--max_iters=20"],  # shorter than the warm-up
        ["--learning_rate=1e-5", "--decay_lr=False"],
        ["--n_expert=1"],  # the dense MLP
        ["--n_expert=1", "--gate_renormalize"],
        ["--n_expert=1", "--expert_top_k=0"],
        ["--n_expert=4", "--expert_top_k=0", "--aux_loss_coef=0"],
        ["--n_expert=4", "--expert_top_k=4", "--aux_loss=none", "--capacity_factor=1"],
        ["--n_expert=5", "--expert_kind=linear_sum", "--expert_hidden=64"],
        ["--n_expert=4", "--moe_every=6"],
        ["--expert_top_k=3", "--gate_renormalize", "--moe_every=9", "--capacity_factor=1"],  # idle without experts
    ],
)
def test_a_possible_combination_is_not_refused(argv):
    parse(Config, argv)


def test_the_problem_of_two_keys_names_both_origins(write):
    name = write("heads.py", "\nn_head = 5\n")
    assert only_problem(name, "--n_embd=384").startswith("--n_embd=384, heads.py:2: ")


def test_a_key_of_nanogpt_that_is_absent_is_answered_by_one_helpful_line(write):
    answer = "leave it out, processes use NCCL on GPUs, gloo on CPUs (how experts are computed: moe_backend)"
    assert only_problem("--backend=nccl") == f"--backend=nccl: {answer}"
    assert only_problem("--backend") == f"--backend: {answer}"
    assert only_problem(write("ddp.py", "backend = 'nccl'\n")) == f"ddp.py:1: {answer}"


# ---------------------------------------------------------------------------------------------------------------------
# Title, folder, hash, records


def test_the_title_is_the_files_first_lines(write):
    first, second = write("first.py", '"""One\n\nMore."""\n'), write("second.py", '"""Two"""\n')
    assert parse(Config, [first, second]).title == "One, Two"
    assert parse(Config, [first, "--title=Mine"]).title == "Mine"
    assert parse(Config, []).title == ""


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("mine", "mine, MoE 4 top-1, on a CPU"),
        ("./texts/mine", "mine, MoE 4 top-1, on a CPU"),
        ("/texts/my shakespeare/", "my shakespeare, MoE 4 top-1, on a CPU"),
        ("text8", "text8, MoE 4 top-1, on a CPU"),
        ("shakespeare_char", "Shakespeare, MoE 4 top-1, on a CPU"),
        (r"a\1b", r"a\1b, MoE 4 top-1, on a CPU"),
    ],
)
def test_a_title_names_no_text_but_that_of_the_run(dataset, expected):
    files = ["config/shakespeare_moe4.py", "config/cpu.py"]
    assert parse(Config, [*files, f"--dataset={dataset}"]).title == expected
    assert parse(Config, [*files, f"--dataset={dataset}", "--title=Shakespeare"]).title == "Shakespeare"


def test_a_title_names_no_text_of_another_config_file(write):
    mine = write("mine.py", '"""My novel, wide"""\ndataset = "novel"')
    plain = write("train_shakespeare_char.py", "n_layer = 2")
    assert parse(Config, [mine]).title == "My novel, wide"
    assert parse(Config, [mine, "--dataset=./letters"]).title == "My letters, wide"
    assert parse(Config, [str(ROOT / "config/text8_dense.py"), mine]).title == "novel, dense, My novel, wide"
    assert parse(Config, [plain, "--dataset=poems"]).title == "train_poems"
    assert parse(Config, [plain]).title == "train_shakespeare_char"


def test_the_settings_that_a_run_keeps_are_no_config_file(write):
    kept = write("config.json", '{"compile": false}')
    assert only_problem(kept) == "config.json: JSON, as a run keeps its settings; expected the config file in Python"


@pytest.mark.parametrize("docstring", ["# no docstring", '""""""', '"""\n\n"""', "from base import *"])
def test_a_file_without_a_docstring_is_titled_by_its_name(write, docstring):
    write("base.py", '"""Base"""\n')
    first, plain = write("first.py", '"""One"""\n'), write("my_sweep.py", f"{docstring}\n")
    assert parse(Config, [first, plain]).title == "One, my_sweep"
    assert parse(Config, [plain, "--title=Mine"]).title == "Mine"


def test_the_folder_is_named_for_files_and_seed(write):
    first, second = write("first.py", ""), write("deep/second.py", "")
    assert parse(Config, [first, second, "--seed=2"]).out_dir == "out/first-second-s2"
    assert parse(Config, []).out_dir == "out/default-s1337"
    assert parse(Config, [first, "--out_dir=here"]).out_dir == "here"


def test_the_hash_counts_what_defines_the_result_and_nothing_else():
    base = Config()
    samples = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x"}
    for name, about in options_of(Config).items():
        value = getattr(base, name)
        changed = dataclasses.replace(base, **{name: samples[type(value)](value)})
        counts = about.scope in (EXPERIMENT, SCHEDULE) and name != "seed"
        assert (changed.hash() != base.hash()) == counts, name


def test_the_hash_is_of_what_differs_from_the_defaults():
    """So a key that is added later changes no hash of an old record."""

    def digits(values):
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    assert Config().hash() == digits({})
    assert Config(seed=7, n_layer=2, device="cpu", max_iters=9).run_id == digits({"max_iters": 9, "n_layer": 2}) + "-s7"


def test_only_the_length_and_rhythm_of_a_run_may_change_on_resume():
    assert {name for name, about in options_of(Config).items() if about.scope == SCHEDULE} == {
        "max_iters", "lr_decay_iters", "eval_interval", "eval_iters",
    }  # fmt: skip


def test_a_config_survives_its_record():
    config = parse(Config, [str(ROOT / "config" / "shakespeare_top2_cap05.py"), "--seed=3", "--compile=False"])
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_damaged_record_is_refused_with_all_that_is_wrong():
    values = Config().to_dict() | {"n_layer": "6", "n_exprt": 4, "bias": 0}
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values, origin="out/config.json")
    assert caught.value.problems == [
        "out/config.json: n_layer is '6'; expected an integer from 1, up to 1000",
        "out/config.json: bias is 0; expected True or False",
        "out/config.json: unknown key 'n_exprt'; nearest key: n_expert",
    ]
    assert str(caught.value) == "\n".join(caught.value.problems)
    with pytest.raises(ConfigError, match="expected a mapping"):
        Config.from_dict([1])


def test_a_key_younger_than_a_record_takes_its_default():
    values = Config(n_layer=2).to_dict()
    del values["z_loss_coef"]
    assert Config.from_dict(values) == Config(n_layer=2)


def test_differences_are_told_by_scope():
    ours, theirs = Config(), Config(n_layer=2, max_iters=9, device="cpu")
    assert ours.differences(theirs, [EXPERIMENT]) == [("n_layer", 6, 2)]
    assert ours.differences(theirs, [SCHEDULE]) == [("max_iters", 5000, 9)]
    assert len(ours.differences(theirs, [EXPERIMENT, SCHEDULE])) == 2


def test_moe_layers_and_causality_follow_the_keys():
    assert Config().moe_layers == [] and Config(n_expert=2, moe_every=2).moe_layers == [1, 3, 5]
    assert Config(n_expert=2).moe_layers == [0, 1, 2, 3, 4, 5]
    shared = Config(n_expert=2, capacity_factor=1.0, capacity_group="batch")
    assert not shared.is_causal
    for change in ({"n_expert": 0}, {"capacity_factor": 0.0}, {"capacity_group": "sequence"}):
        assert dataclasses.replace(shared, **change).is_causal


def test_every_leak_names_its_causal_twin():
    leaky = Config(
        n_expert=4, router="expert_choice", router_level="sequence", capacity_factor=1, capacity_group="batch"
    )
    assert list(leaky.leaks) == ["router=expert_choice", "router_level=sequence", "capacity_group=batch"]
    assert all(leaky.leaks.values()) and not dataclasses.replace(leaky, n_expert=0).leaks


def test_experts_by_block_without_n_expert_are_not_silently_dense():
    with pytest.raises(ConfigError, match="n_expert = 0 means a dense model"):
        parse(Config, ["--n_expert_by_block=8,8,8,8,8,8"])


def test_initials_are_understood():
    with pytest.raises(ConfigError, match="nearest key: learning_rate"):
        parse(Config, ["--lr=0.1"])


def test_leaks_are_those_of_the_tables():
    for name, router in routing.ROUTERS.items():
        assert Config(n_expert=4, router=name).is_causal == router.is_causal
    for name, level in routing.LEVELS.items():
        assert Config(n_expert=4, router_level=name).is_causal == level.is_causal


def test_blocks_may_have_different_numbers_of_experts():
    config = Config(n_layer=4, n_expert=8, n_expert_by_block="8, 0,4,2", expert_top_k=2)
    assert config.moe_layers == [0, 2, 3] and [config.of_block(i).n_expert for i in config.moe_layers] == [8, 4, 2]
    assert list(config.problems()) == [], "one block that uses all of its experts is no reason to refuse the others"
    pruned = dataclasses.replace(config, n_expert_by_block="8,0,4,1")
    assert list(pruned.problems()) == [] and pruned.of_block(3).expert_top_k == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--expert_top_k=0", "--aux_loss=none", "--capacity_factor=1"],
            ["no capacity can limit", "capacity_factor=0"],
        ),
        (["--expert_top_k=5"], ["more than n_expert = 4"]),
        (["--gate_renormalize"], ["always 1", "expert_top_k to 2 or more"]),
        (["--gate_straight_through", "--expert_top_k=2"], ["one expert a character", "expert_top_k=1"]),
        (["--expert_top_k=0", "--router_top_p=0.5", "--aux_loss=none"], ["between 2 and n_expert = 4"]),
        (["--router_top_p=0.5"], ["between 2 and n_expert = 4"]),
        (["--router_top_p=0.5", "--expert_top_k=2", "--gate_renormalize"], ["gate_renormalize=False"]),
        (["--router=hash"], ["not trained", "aux_loss='none'"]),
        (["--router=random"], ["not trained", "aux_loss='none'"]),
        (["--router=frozen", "--aux_loss=none", "--z_loss_coef=0.1"], ["not trained", "z_loss_coef=0"]),
        (["--router=two_level", "--z_loss_coef=0.1"], ["whose z-loss is 0"]),
        (["--router=two_level", "--router_bias_rate=0.1"], ["router_bias_rate=0"]),
        (["--router=two_level", "--router_top_p=0.5", "--expert_top_k=2"], ["router_top_p=0"]),
        (["--router_bias_rate=0.1", "--aux_loss=none", "--expert_top_k=0"], ["no choice that a bias could change"]),
        (["--aux_loss=cv2", "--capacity_factor=1"], ["after capacity", "aux_loss='switch'"]),
        (["--router_level=segment", "--segment_size=256"], ["segment_size = 256", "set it lower"]),
        (
            ["--router=expert_choice", "--aux_loss=none", "--capacity_factor=1", "--router_level=sequence"],
            ["router_level='token'"],
        ),
        (["--expert_kind=linear_sum", "--n_expert_by_block=4,4,2,2,2,2"], ["differs from block to block"]),
        (["--router=ngram_hash", "--aux_loss=none", "--expert_top_k=2"], ["one expert", "expert_top_k=1"]),
        (["--router=hash", "--aux_loss=none", "--router_level=segment"], ["router_level='token'"]),
        (["--router=hash", "--aux_loss=none", "--gate=sigmoid"], ["gate='softmax'"]),
        (["--router=hash", "--aux_loss=none", "--expert_dropout=0.1"], ["expert_dropout=0"]),
        (["--router=two_level", "--n_expert_group=3"], ["n_expert_group = 3", "divisor of n_expert"]),
        (["--router=two_level", "--expert_top_k=3"], ["equal groups", "= 3 or more"]),
        (["--router=expert_choice", "--aux_loss=none"], ["capacity_factor=1"]),
        (["--router=expert_choice", "--capacity_factor=1"], ["balanced by construction", "aux_loss='none'"]),
        (["--expert_kind=linear_sum", "--n_shared_expert=1"], ["expert_kind='mlp'"]),
        (["--n_expert_by_block=4,4"], ["n_layer = 6 numbers", "4,4,4,4,4,4"]),
        (["--n_expert_by_block=4,4,4,4,4,x"], ["n_layer = 6 numbers"]),
        (["--n_expert_by_block=0,0,0,0,0,0"], ["no block with experts"]),
        (["--n_expert_by_block=4,4,2,2,2,2", "--share_experts"], ["equally many", "share_experts=False"]),
        (["--moe_backend=sorted", "--expert_hidden=30"], ["multiples of 8", "moe_backend='auto'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_what_cannot_route_is_refused_with_the_way_out(options, words):
    with pytest.raises(ConfigError) as caught:
        parse(Config, ["--n_expert=4", *options])
    assert len(caught.value.problems) == 1, caught.value.problems
    assert all(word in str(caught.value) for word in words) and options[0].split("=")[0] in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# --help and --print-config


def test_help_lists_every_key_once_with_type_default_and_help():
    text = page("--help")
    assert re.findall(r"^  --(\w+)=", text, re.MULTILINE) == list_in_help_order()
    assert sorted(list_in_help_order()) == sorted(field.name for field in dataclasses.fields(Config))
    assert re.search(r"^  --n_layer=6 +int +\w", text, re.MULTILINE)
    assert re.search(r"^  --compile=auto +bool\|auto +\w", text, re.MULTILINE)
    assert "{auto, float32, bfloat16}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    assert all(about.help for about in options_of(Config).values())


def list_in_help_order() -> list[str]:
    options = list(options_of(Config).values())
    groups = list(dict.fromkeys(about.group for about in options))
    return [about.name for about in sorted(options, key=lambda about: groups.index(about.group))]


def test_help_answers_whatever_else_is_on_the_line():
    assert page("--n_layer=six", "no_such_file", "-h") == page("--help")


def test_a_printed_config_shows_origins_and_is_itself_a_config_file(write):
    mine = write("mine.py", "from config.shakespeare_moe4 import *\n\nn_layer = 2\n")
    text = page(mine, "--n_head=4", "--print-config")
    assert re.search(r"^n_layer = 2 +# mine\.py:3$", text, re.MULTILINE)
    assert re.search(r"^n_head = 4 +# --n_head=4$", text, re.MULTILINE)
    assert re.search(r"^n_expert = 4 +# .*shakespeare_moe4\.py:\d+$", text, re.MULTILINE)
    assert re.search(r"^bias = False +# .*shakespeare_dense\.py:\d+$", text, re.MULTILINE)
    assert re.search(r"^dtype = 'auto' +# default$", text, re.MULTILINE)
    assert re.search(r"^out_dir = 'out/mine-s1337' +# derived$", text, re.MULTILINE)
    assert parse(Config, [write("printed.py", text)]) == parse(Config, [mine, "--n_head=4"])


def test_a_config_with_problems_is_not_printed():
    assert len(problems("--print-config", "--n_head=5")) == 1


def test_the_defaults_are_valid_and_of_their_types():
    assert Config.from_dict(Config().to_dict()) == Config()


@pytest.mark.parametrize("spelled", ["4,2", "4, 2", " 4 ,2 ", "04,002"])
def test_the_experts_of_each_block_spelled_in_several_ways_are_one_experiment(spelled):
    config = parse(Config, ["--n_layer=2", "--n_expert=4", f"--n_expert_by_block={spelled}"])
    assert config.n_expert_by_block == "4,2"
    assert config.run_id == Config(n_layer=2, n_expert=4, n_expert_by_block="4,2").run_id


@pytest.mark.parametrize("spelled", ["runs/a", "runs/a/", "./runs//a", "runs/./a/."])
def test_a_folder_spelled_in_several_ways_is_shown_in_one(spelled):
    assert parse(Config, [f"--out_dir={spelled}"]).out_dir == "runs/a"
    assert parse(Config, ["--out_dir=../a/"]).out_dir == "../a"


@pytest.mark.parametrize(
    "changes, same",
    [
        (dict(lr_decay_iters=5000), True),
        (dict(lr_decay_iters=4999), False),
        (dict(mlp_hidden=4 * 384), True),
        (dict(mlp_hidden=384), False),
        (dict(n_expert=4, expert_hidden=4 * 384), True),
        (dict(n_expert=4, n_expert_by_block="4,4,4,4,4,4"), True),
        (dict(n_expert=4, n_expert_by_block="0,4,0,4,0,4"), False),
        (dict(n_expert=4, n_expert_by_block="0,4,0,4,0,4", moe_every=2), True),
        (dict(n_expert=4, expert_kind="linear_sum", expert_hidden=4 * 384), False),
    ],
)
def test_a_0_and_the_number_for_which_it_stands_are_one_experiment(changes, same):
    """--latest averages them; the hashes of records stay as they are."""
    short = {key: changes[key] for key in ("n_expert", "expert_kind") if key in changes}
    one, other = Config(**changes), Config(**short, moe_every=changes.get("moe_every", 1))
    assert (Identity(one).experiment == Identity(other).experiment) is same
    assert (Identity(one, "a" * 64).experiment == Identity(other, "a" * 64).experiment) is same
    assert one.hash() != other.hash()


def test_one_router_for_all_blocks_may_be_said_in_numbers():
    every, all_three, one = (
        Identity(Config(n_expert=4, moe_every=2, blocks_per_router=n)).experiment for n in (0, 3, 1)
    )
    assert every == all_three != one


def test_one_text_spelled_in_several_ways_is_one_experiment(tmp_path, monkeypatch):
    (tmp_path / "project" / "data" / "small").mkdir(parents=True)
    (tmp_path / "project" / "data" / "small" / "train.bin").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.setattr(names, "ROOT", tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "project")
    inside = ("small", "./data/small", "data/small/", "data//small", str(tmp_path / "project/data/small"))
    outside = ("../elsewhere", "~/elsewhere/", "../link", str(tmp_path / "elsewhere"))
    for spellings, expected in ((inside, "small"), (outside, str((tmp_path / "elsewhere").resolve()))):
        configs = [parse(Config, [f"--dataset={spelling}"]) for spelling in spellings]
        assert {config.dataset for config in configs} == {expected} and len({config.run_id for config in configs}) == 1
    assert parse(Config, ["--dataset=./absent"]).dataset == "./absent"  # the message about it names what was typed
