"""bench.py: all tasks are measured and recorded, wrong models are not timed, mistakes are one message.

Tiny models on a tiny text, in this process.
"""

import contextlib
import copy
import dataclasses
import io
import json
import runpy
import sys

import pytest
import torch
from conftest import tiny

import backends
import bench
from data.common import DataError
from model import Decoder
from run.records import RecordError
from speed import bench_records, decoding
from support import configurator, console, machines
from support.configurator import Message
from support.options import ConfigError

CPU = machines.choose("cpu", "float32", False)
ROUNDS = 3
SHORT = bench.Effort(dict.fromkeys(bench_records.TASKS, 0.01), characters=20, at_least=ROUNDS)
TINY = {key: getattr(tiny(), key) for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
TASKS = [("train", 4)] + [(task, size) for size in (1, 8, 32) for task in ("prefill", "decode")] + [("papers", 1)]
MODELS = [name for name in bench.MODELS if not name.endswith(("kernels", "fused"))]  # which are for CUDA
model_config = bench.model_config


def make_small(patch, words):
    """Makes the models of a bench tiny, on a tiny text, timed for a moment each."""
    patch.setattr(bench, "model_config", lambda *about: dataclasses.replace(model_config(*about), **TINY))
    patch.setattr(bench, "find_dataset", lambda name: words)
    patch.setattr(bench, "FULL", SHORT)
    patch.setattr(bench, "QUICK", SHORT)
    patch.setattr(bench.timing, "PATIENCE", 1e9)  # always ROUNDS
    patch.setattr(bench_records, "FEWEST", ROUNDS)
    patch.setattr(bench.timing, "best_rate", lambda call, amount, machine: 1e11)


@pytest.fixture(autouse=True)
def small(monkeypatch, words):
    make_small(monkeypatch, words)


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """(what a bench of everything prints, the path of its record)"""
    path, out = tmp_path_factory.mktemp("bench") / "deeper" / "record.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        make_small(patch, words)
        assert bench.main(["--device=cpu", "--models=all", f"--json={path}"]) == 0
    return out.getvalue(), path


@pytest.fixture
def run(capsys):
    """A function that runs bench.py in process: -> (exit code, what it printed, what it printed as errors)"""

    def call(*options):
        capsys.readouterr()
        code = bench.main(["--device=cpu", *options])
        return code, *capsys.readouterr()

    return call


def refused(kind, *options):
    """The message with which bench.py refuses."""
    with pytest.raises(kind) as caught:
        bench.main(["--device=cpu", *options])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# A bench


def test_everything_is_measured_and_recorded(whole):
    _, path = whole
    record = bench_records.read(path)
    assert bench_records.problems(record) == [] and record["size"] == "cpu" and record["quick"] is False
    assert list(record["models"]) == MODELS
    found = [(row["task"], row["batch_size"], row["model"]) for row in record["measurements"]]
    assert found == [(*task, name) for task in TASKS for name in MODELS]
    assert all(row["seconds"]["n"] >= ROUNDS for row in record["measurements"])
    assert [row["model"] for row in record["measurements"] if row["ratio"] is None] == ["dense"] * len(TASKS)


def test_fast_models_are_checked_at_every_batch_size(whole):
    _, path = whole
    for name, model in bench_records.read(path)["models"].items():
        assert len(model["checks"]) == (0 if name.startswith("reference") else 4)


def test_the_page_has_a_table_for_each_task_and_says_what_ran(whole):
    page, path = whole
    for model in bench_records.read(path)["models"].values():
        assert model["title"] in page and model["backend"]["train"] in page and model["backend"]["decode"] in page
    assert page.count("× dense") == page.count("of floor") == len(TASKS)
    assert "4 × 16 characters" in page and "GFLOP/s" in page and "Other programs meanwhile" in page
    assert max(map(len, page.splitlines())) < 200 and f"written to {path}" in page


def test_a_model_whose_kernels_have_no_effect_is_told_and_not_measured(whole):
    """Else the row of a plain model would bear their name."""
    page, _ = whole
    for name in set(bench.MODELS) - set(MODELS):
        assert page.count(f"{bench.MODELS[name][0]}: not measured, since ") == page.count(bench.MODELS[name][0]) == 1


def test_columns_are_aligned(whole):
    page, _ = whole
    for block in page.split("\n\n")[1 : len(TASKS) + 1]:
        head, *rows = block.splitlines()
        assert len(rows[: len(MODELS)]) == len(MODELS)
        assert {len(row) for row in rows[: len(MODELS)]} == {len(head)}


def test_the_usual_models_are_measured_by_default():
    usual = ["reference", "dense", "moe4", "moe4_top2", "moe4_linear", "reference_moe4"]
    for words, names in {
        (): usual,
        ("--models=all",): list(bench.MODELS),
        ("--models=moe8",): ["dense", "moe8"],
    }.items():
        config = configurator.parse(bench.BenchConfig, list(words))
        assert config.chosen_models() == names and config.chosen_tasks() == list(bench_records.TASKS)


def test_the_dense_model_is_always_measured_and_tasks_can_be_chosen(run, tmp_path):
    code, _, _ = run("--models=moe4", "--tasks=decode", f"--json={tmp_path / 'r.json'}")
    record = bench_records.read(tmp_path / "r.json")
    assert code == 0 and list(record["models"]) == ["dense", "moe4"]
    assert {row["task"] for row in record["measurements"]} == {"decode"}


def test_a_quick_bench_says_so_and_writes_no_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, page, error = run("--quick", "--models=dense", "--tasks=train")
    assert code == 0 and error == "" and "not for quoting" in page and list(tmp_path.iterdir()) == []
    assert "results/bench/" not in page
    _, page, _ = run("--models=dense", "--tasks=train")
    assert "--json=results/bench/NAME.json" in page


def test_the_sizes_are_those_of_the_config_files():
    paper, cpu = (model_config("moe4_linear", size, CPU, 7) for size in ("paper", "cpu"))
    assert (paper.n_layer, paper.n_embd, paper.block_size, paper.batch_size, paper.dropout) == (6, 384, 256, 64, 0.2)
    assert (cpu.n_layer, cpu.n_embd, cpu.block_size, cpu.batch_size, cpu.dropout) == (4, 128, 64, 12, 0.0)
    assert paper.seed == cpu.seed == 7 and paper.device == cpu.device == "cpu"
    kinds = {name: model_config(name, "cpu", CPU, 1) for name in bench.MODELS}
    assert [config.n_expert for config in kinds.values()] == [0, 0, 4, 4, 4, 4, 4, 8, 4, 4, 4, 0, 4]
    assert kinds["moe4_top2"].expert_top_k == 2 and kinds["moe4_linear"].expert_kind == "linear_concat"
    assert kinds["reference_moe4"].moe_backend == "reference" and kinds["reference"] == kinds["dense"]


def test_a_profile_names_the_slowest_operations_and_leaves_traces(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, page, _ = run("--quick", "--models=reference", "--tasks=train", "--profile")
    traces = sorted(path.name for path in (tmp_path / "out" / "bench-cpu").iterdir())
    assert code == 0 and traces == ["dense-decode.json", "dense-train.json"]
    for name in traces:
        assert json.loads((tmp_path / "out" / "bench-cpu" / name).read_text())["traceEvents"]
        assert f"trace: out/bench-cpu/{name}" in page
    assert page.count("×  aten::") >= 10


def test_flags_are_switched_on_first_and_told(run, tmp_path, monkeypatch):
    on = []
    monkeypatch.setattr(bench.flags, "switch_on", on.extend)
    monkeypatch.setattr(bench.flags, "switched_on", lambda: sorted(on))
    path, options = tmp_path / "r.json", ("--models=dense", "--tasks=train")
    run(*options, f"--json={path}")
    _, page, _ = run(*options, "--flags=pdl,cudnn", f"--compare={path}", f"--json={tmp_path / 'flags.json'}")
    assert bench_records.read(path)["flags"] == [] and bench_records.read(tmp_path / "flags.json")["flags"] == on[::-1]
    assert on == ["pdl", "cudnn"] and "Flags: cudnn, pdl\n" in page and "Flags: cudnn, pdl, was none." in page


# ---------------------------------------------------------------------------------------------------------------------
# Compared with an older record


def faster(record, name, task, factor):
    """The record, as if a model had been faster at a task by a factor."""
    record = copy.deepcopy(record)
    for row in record["measurements"]:
        if (row["model"], row["task"]) == (name, task):
            for spread in filter(None, (row["seconds"], row["ratio"])):  # dense has no ratio
                spread |= {key: spread[key] / factor for key in ("median", "p10", "p90")}
            row["tokens_per_second"] *= factor
    return record


def test_slowdowns_are_named_and_the_exit_code_is_0(run, whole, tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(faster(json.loads(whole[1].read_text()), "moe4", "train", 1000)))
    code, page, _ = run("--models=moe4,reference", "--tasks=train", f"--compare={old}")
    told = page.partition(f"Slower than {old}:")[2]
    assert code == 0 and "moe4, training, batch 4" in told.partition("Not compared")[0]
    assert "not measured now" in told.partition("Not compared")[2]


def test_a_bench_without_slowdowns_says_so(run, whole, tmp_path):
    slow = json.loads(whole[1].read_text())
    for name in ("dense", "moe4"):  # both: on a quiet machine dense's own times are compared too
        slow = faster(slow, name, "train", 1e-3)
    (tmp_path / "old.json").write_text(json.dumps(slow))
    _, page, _ = run("--models=moe4", "--tasks=train", f"--compare={tmp_path / 'old.json'}")
    assert f"Nothing became slower than in {tmp_path / 'old.json'}" in page


@pytest.mark.parametrize("text", ['{"format": "charmoe record 2"}', "[]", "not JSON", None])
def test_a_comparison_with_another_file_is_refused(tmp_path, text):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    assert str(path) in refused(RecordError, f"--compare={path}")


# ---------------------------------------------------------------------------------------------------------------------
# Wrong models are not timed


def test_a_model_with_wrong_gradients_is_named_and_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "sliced", lambda *about: backends.reference(*about) * 1.01)
    code, page, error = run("--quick", "--models=moe4,reference_moe4", "--tasks=train", f"--json={tmp_path / 'r.json'}")
    assert code == 3 and "4 experts, top-1 is wrong and was not timed: training" in error
    assert "4 experts, top-1" not in page and "4 experts, eager script" in page
    assert list(bench_records.read(tmp_path / "r.json")["models"]) == ["dense", "reference_moe4"]


class Shifted(Decoder):
    """Slightly wrong for MoE models, and only for them."""

    def read(self, ids_BT):
        logits, routing = super().read(ids_BT)
        return logits * (1.01 if routing else 1.0), routing


def test_another_decoder_is_timed_beside_the_usual_one_and_trains_nothing(run, tmp_path):
    options = ["--tasks=train,decode", "--models=dense", "--decoders=attention", f"--json={tmp_path}/record.json"]
    code, page, _ = run(*options)
    record = bench_records.read(tmp_path / "record.json")
    found = [(row["task"], row["model"]) for row in record["measurements"] if row["batch_size"] in (1, 4)]
    assert code == 0 and found == [("train", "dense"), ("decode", "dense"), ("decode", "dense_by_attention")]
    assert record["models"]["dense_by_attention"]["backend"]["decode"].endswith("(not attention: it needs CUDA)")
    assert "decoder=attention" in page
    assert "'quick' is none of" in refused(ConfigError, "--decoders=quick")


def test_a_model_that_decodes_wrongly_keeps_its_training_times(run, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "fastest", lambda model, batch, machine, *about, **_: Shifted(model, batch, *about))
    code, _, error = run("--models=moe4", "--tasks=train,decode", f"--json={tmp_path / 'r.json'}")
    assert code == 3 and "4 experts, top-1 is wrong and was not timed: decoding at batch 1" in error
    assert "batch 8" not in error  # it was left out by then
    rows = bench_records.read(tmp_path / "r.json")["measurements"]
    assert [row["task"] for row in rows if row["model"] == "moe4"] == ["train"]
    assert sum(row["task"] == "decode" for row in rows) == 3


def test_a_wrong_dense_model_ends_the_bench(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench.timing, "check_training", lambda subject: {"what": "it", "error": float("nan"), "limit": 1}
    )
    code, page, error = run("--models=moe4", f"--json={tmp_path / 'r.json'}")
    assert code == 3 and "Dense is wrong" in error and "nothing to compare with" in error
    assert "× dense" not in page and not (tmp_path / "r.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, and notes on the machine


@pytest.mark.parametrize(
    "option, words",
    [
        ("--size=pper", "size is 'pper'; expected 'auto', 'paper' or 'cpu'"),
        ("--models=moe4,mo4_top2", "'mo4_top2' is none of reference, dense, moe4, moe4_top2, moe4_linear, "),
        ("--tasks=decoding", "'decoding' is none of train, prefill, decode, papers"),
        ("--flags=pdl,gem", "'gem' is none of pdl, split, cudnn, gemm"),
        ("--sise=cpu", "nearest key: size"),
        ("--device=cpuu", "not a device"),
        ("--json=.", ". is a folder"),
    ],
)
def test_a_mistake_is_one_clear_message(option, words):
    assert words in refused(ConfigError, option)


def test_an_unprepared_text_names_the_command(monkeypatch, tmp_path):
    (tmp_path / "shakespeare_char").mkdir()
    monkeypatch.setattr(bench, "find_dataset", lambda name: tmp_path / name)
    assert "not prepared yet" in refused(DataError) and "prepare" in refused(DataError)


def test_the_text_is_shakespeare(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "find_dataset", lambda name: asked.append(name) or exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--device=cpu"])
    assert asked == ["shakespeare_char"]


def test_running_out_of_memory_is_one_clear_message(monkeypatch, capsys, words):
    def too_large(*about):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    monkeypatch.setattr(bench.timing.Candidate, "train", too_large)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device=cpu", "--models=dense", "--tasks=train"])
    with pytest.raises(SystemExit) as caught:
        console.run(bench.main, "--size=cpu, or fewer --models, takes less")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert error.startswith("bench.py: out of memory (CUDA out of memory. Tried") and "--size=cpu" in error


@pytest.mark.parametrize(
    "device, capability, has_triton, words",
    [
        ("cuda", (9, 0), True, []),
        ("cuda", (8, 0), True, ["Below sm90"]),
        ("cuda", (9, 0), False, ["Triton is not installed"]),
        ("cuda", (7, 5), False, ["Below sm90", "Triton is not installed"]),
        ("mps", None, True, ["On MPS", "not measured"]),
        ("cpu", None, False, []),
    ],
)
def test_a_machine_says_what_it_lacks(monkeypatch, device, capability, has_triton, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(bench.triton_here, "AVAILABLE", has_triton)
    said = " ".join(bench.machine_notes(CPU._replace(device=torch.device(device))))
    assert all(word in said for word in words) and bool(said) == bool(words)


def test_help_names_every_key_and_model():
    with pytest.raises(Message) as caught:
        bench.main(["--help"])
    page = caught.value.text
    assert all(f"--{field.name}=" in page for field in dataclasses.fields(bench.BenchConfig))
    assert all(name in page for name in bench.MODELS)


@pytest.mark.parametrize("option, code", [("--size=nothing", 2), ("--compare=nothing.json", 2), ("--help", 0)])
def test_exit_codes(monkeypatch, capsys, tmp_path, option, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", option])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(bench.__file__, run_name="__main__")
        raise SystemExit(0)
    out, error = capsys.readouterr()
    assert caught.value.code == code
    assert error.startswith("bench.py: ") and error.count("\n") == 1 if code else out.startswith("usage: ")
