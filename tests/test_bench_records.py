"""speed/bench_records.py: the record of a bench is read back unchanged, an invalid one is refused in one line, and
noise between two benches is not called slower."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from benches import CPU, GPU, ROWS, bench, find
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import VALUES, case, changed, leaves, mutated, without, written

from report import speed_cells
from run.records import RecordError
from speed import bench_records

ROOT = Path(bench_records.__file__).resolve().parents[1]
CPU_BENCH, GPU_BENCH = bench(), bench("paper", GPU)


def at(model, task="train", batch_size=None, record=CPU_BENCH):
    """measurements.<number>: where a measurement lies in the record."""
    return f"measurements.{record['measurements'].index(find(record, model, task, batch_size))}"


def refusal(path):
    """What `read` says against the file, without its path and the way out."""
    with pytest.raises(RecordError) as caught:
        bench_records.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ").removesuffix(f"; {bench_records.WAY_OUT}")


# ---------------------------------------------------------------------------------------------------------------------
# What bench.py writes


@pytest.mark.parametrize("record", [CPU_BENCH, GPU_BENCH], ids=["cpu", "cuda"])
def test_the_records_that_these_tests_change_are_valid(record, tmp_path):
    assert bench_records.read(written(tmp_path, record)) == record


def test_records_are_read_where_torch_is_not_installed():
    code = "import sys; sys.modules['torch'] = None; from speed import bench_records"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_unknown_numbers_may_be_null():
    unknown = {"git": {"commit": None, "dirty": None}, "others": {"core_seconds": None, "device_bytes": None}}
    peaks = {f"measurements.{i}.peak_memory_bytes": None for i in range(len(GPU_BENCH["measurements"]))}
    assert bench_records.problems(changed(GPU_BENCH, {**unknown, **peaks})) == []


def test_a_bench_of_some_models_and_tasks_is_read():
    some = [one for one in CPU_BENCH["measurements"] if one["model"] in ("dense", "moe4") and one["task"] == "decode"]
    models = {name: CPU_BENCH["models"][name] for name in ("dense", "moe4")}
    assert bench_records.problems(changed(CPU_BENCH, {"models": models, "measurements": some})) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_record_of_another_kind_is_refused(tmp_path):
    told = refusal(written(tmp_path, '{"format": "charmoe record 2"}'))
    assert told == "its format is 'charmoe record 2', expected 'charmoe bench 1'"


KINDS = [
    ({"size": "../cpu"}, "size is '../cpu'; expected a name of lower-case letters, digits, - and _"),
    ({"quick": 0}, "quick is 0; expected true or false"),
    ({"seconds": "400"}, "seconds is '400'; expected a finite number above 0"),
    ({"ceilings.bytes_per_second": 0}, "ceilings.bytes_per_second is 0; expected a finite number above 0"),
    ({"machine.cores": 0}, "machine.cores is 0; expected an integer from 1"),
    ({"machine.device": "a CPU\n"}, "machine.device is 'a CPU\\n'; expected a line of text"),
    ({"machine.torch": ""}, "machine.torch is ''; expected a line of text"),
    ({"others.core_seconds": -1}, "others.core_seconds is -1; expected a finite number"),
    ({"models": []}, "models is []; expected an object"),
    ({"models.moe4": None}, "models.moe4 is None; expected an object"),
    ({"models.moe4.title": ""}, "models.moe4.title is ''; expected a line of text"),
    ({"models.moe4.title": "4\nexperts"}, "expected a line of text"),
    ({"models.moe4.backend.train": None}, "models.moe4.backend.train is None; expected a line of text"),
    ({"models.a model": {}}, "models has 'a model'; expected a name of"),
    ({"models.moe4.checks.0.error": "none"}, "models.moe4.checks[0].error is 'none'; expected a finite number"),
    ({"models.moe4.compile_seconds.train": False}, "compile_seconds.train is False; expected a finite number"),
    ({"measurements.0.batch_size": 1.0}, "measurements[0].batch_size is 1.0; expected an integer from 1"),
    ({"measurements.0.seconds.p10": 0}, "measurements[0].seconds.p10 is 0; expected a finite number above 0"),
    ({"measurements.0.seconds": 1.0}, "measurements[0].seconds is 1.0; expected an object"),
    ({"measurements.0.ratio.n": 2.5}, "measurements[0].ratio.n is 2.5; expected an integer from 1"),
]


@pytest.mark.parametrize("changes, message", KINDS, ids=str)
def test_a_field_of_another_kind_is_refused(changes, message):
    assert message in bench_records.problems(changed(CPU_BENCH, changes))[0]


@pytest.mark.parametrize("path", ["size", "git.commit", "models.dense.flops_per_token", "measurements.0.floor"])
def test_a_missing_field_is_refused(path):
    *above, name = path.replace(".0", "[0]").split(".")
    found = bench_records.problems(without(CPU_BENCH, path))
    assert found == [f"missing field {name!r} in {'.'.join(above) or 'the record'}"]


def scaled(factor):
    return lambda spread: {key: value * (factor if key != "n" else 1) for key, value in spread.items()}


MOE4, DENSE, DECODING = at("moe4"), at("dense"), at("moe4", "decode", 8)
CONTRADICTIONS = [
    ({"models.dense": None}, "models.dense is None"),
    ({"models": {}}, "models has no 'dense', which ratios are to"),
    ({"models.moe4.config.n_emdb": 32}, "models.moe4.config: unknown key 'n_emdb'; nearest key: n_embd"),
    ({"models.moe4.config.n_head": 3}, "models.moe4.config: n_embd = 128 is not a multiple of n_head = 3"),
    ({"measurements": []}, "measurements: expected one or more"),
    ({"measurements": lambda all_: [*all_, all_[0]]}, "measurements: expected one or more, no two of them alike"),
    ({f"{MOE4}.model": "moe5"}, "model is 'moe5'; expected reference or dense or"),
    ({f"{MOE4}.task": "trian"}, "task is 'trian'; expected train or prefill or decode or papers"),
    ({f"{MOE4}.ratio": None}, "ratio: expected null for dense, and only for it"),
    ({f"{DENSE}.ratio": {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 40}}, "ratio: expected null for dense"),
    ({f"{DENSE}.batch_size": 11}, "dense was not measured at train, batch 12, so there is no ratio to it"),
]


@pytest.mark.parametrize("changes, message", CONTRADICTIONS, ids=lambda value: case(value)[:60])
def test_a_contradiction_is_refused(changes, message):
    found = bench_records.problems(changed(CPU_BENCH, changes))
    assert any(message in problem for problem in found), found


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_change_is_refused_in_one_line_or_can_be_shown(tmp_path_factory, data):
    record = data.draw(st.sampled_from([CPU_BENCH, GPU_BENCH]))
    path = data.draw(st.sampled_from(list(leaves(record))))
    other = mutated(record, path, data.draw(st.sampled_from(["dropped", "renamed", *VALUES])))
    file = tmp_path_factory.getbasetemp() / "changed.json"
    file.write_text(json.dumps(other))
    try:
        read = bench_records.read(file)
    except RecordError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
    else:
        assert speed_cells.speed_grids(read) and speed_cells.speed_csv([read])
        told = [
            *itertools.chain(*bench_records.compare(record, read)),
            *bench_records.doubts(read),
            speed_cells.bench_headline(read),
        ]
        assert not any("\n" in line for line in told)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of benches


def test_benches_are_sorted_and_those_left_out_are_named(tmp_path):
    folder = tmp_path / "results"
    files = {
        "bench/b-cpu.json": CPU_BENCH,
        "bench/a-paper.json": GPU_BENCH,
        "bench/c-quick.json": changed(CPU_BENCH, {"quick": True}),
        "bench/d-copy.json": CPU_BENCH,
        "bench/e-damaged.json": "{",
        "bench/f-flags.json": changed(CPU_BENCH, {"flags": ["pdl", "gemm"]}),
        "bench/g-no-flags.json": changed(CPU_BENCH, {"flags": [], "seconds": 401.0}),
        "bench/deep/f.json": "{",
        "A/dense-s1.json": "{",
    }
    for name, record in files.items():
        written(folder, record, name)
    pairs, left_out = bench_records.read_all(folder)
    assert [path.name for path, _ in pairs] == ["a-paper.json", "b-cpu.json", "g-no-flags.json"]
    assert [record for _, record in pairs][:2] == [GPU_BENCH, CPU_BENCH]
    assert left_out[:2] == [
        "results/bench/c-quick.json: a quick bench, which is too short to be evidence; make it without --quick",
        "results/bench/d-copy.json: the same bench as results/bench/b-cpu.json; delete one",
    ]
    assert len(left_out) == 4 and left_out[2].startswith("results/bench/e-damaged.json: no record: not valid JSON")
    assert left_out[3].startswith("results/bench/f-flags.json: a bench with --flags=pdl,gemm, which no run has")


def test_without_a_folder_there_are_no_benches(tmp_path):
    assert bench_records.read_all(tmp_path / "absent") == bench_records.read_all(str(tmp_path)) == ([], [])


def test_a_quick_bench_can_be_read_for_a_comparison(tmp_path):
    assert bench_records.read(written(tmp_path, changed(CPU_BENCH, {"quick": True})))["quick"]


# ---------------------------------------------------------------------------------------------------------------------
# What a record says


def test_numbers_have_three_digits_and_a_spread_as_many_as_its_median():
    assert [bench_records.significant(value) for value in (0.01234, 1.2345, 98.76, 1234.5, 0)] == [
        "0.0123", "1.23", "98.8", "1,234", "0",
    ]  # fmt: skip
    assert bench_records.spread_text({"median": 0.98, "p10": 0.9519, "p90": 1.0141}) == "0.980 [0.952, 1.014]"


def test_the_inverse_of_a_ratio_swaps_its_percentiles():
    assert bench_records.inverse_ratio({"median": 2.0, "p10": 1.0, "p90": 4.0, "n": 7}) == {
        "median": 0.5, "p10": 0.25, "p90": 1.0, "n": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    "record, changes, doubts",
    [
        (CPU_BENCH, {}, []),
        (CPU_BENCH, {"git.dirty": True}, ["The code had uncommitted changes."]),
        (CPU_BENCH, {"git.commit": None, "git.dirty": None}, ["No commit says what code ran."]),
        (CPU_BENCH, {"others.core_seconds": 80.0}, ["Others took 10% of the cores' time: times may be too long"]),
        (CPU_BENCH, {"others.core_seconds": None}, ["It is not known whether others used the machine: times may"]),
        (GPU_BENCH, {"others.core_seconds": 80.0}, []),
        (GPU_BENCH, {"others.device_bytes": 2**32}, ["Others held up to 4.0 GiB of the device's memory: times may"]),
    ],
)
def test_reasons_to_doubt_a_bench_are_named(record, changes, doubts):
    found = bench_records.doubts(changed(record, changes))
    assert len(found) == len(doubts) and all(text.startswith(start) for text, start in zip(found, doubts))


# ---------------------------------------------------------------------------------------------------------------------
# What became slower

ELSEWHERE = {"machine": {**CPU, "device": "Another CPU"}}


def slowed(record, factor, *places, also_times=True):
    """A copy in which these measurements take so many times as long: their ratio too."""
    changes = {f"{place}.ratio": scaled(factor) for place in places}
    if also_times:
        changes |= {f"{place}.seconds": scaled(factor) for place in places}
    return changed(record, changes)


def test_a_bench_is_not_slower_than_itself():
    assert bench_records.compare(CPU_BENCH, CPU_BENCH) == ([], [])


def test_a_worse_ratio_is_told_beside_the_old_one():
    old, new = CPU_BENCH, changed(slowed(CPU_BENCH, 1.2, MOE4), ELSEWHERE)
    assert bench_records.compare(old, new).slower == [
        "moe4, training, batch 12: 1.46 [1.42, 1.51] × dense, was 1.22 [1.18, 1.26] × dense"
    ]
    assert bench_records.compare(new, old).slower == []  # faster
    assert bench_records.compare(old, new).not_compared == [
        "times: the machine is Another CPU, 2 cores, 2 threads, torch 2.13.0+cpu, float32, was AMD EPYC, 2 cores, "
        "2 threads, torch 2.13.0+cpu, float32"
    ]


@pytest.mark.parametrize(
    "factor, wide, is_slower",
    [(1.12, 0.06, True), (1.09, 0.02, False), (1.2, 0.3, False), (1.5, 0.3, True)],
    ids=["clear", "within 10%", "ranges overlap", "far apart"],
)
def test_slower_means_over_ten_percent_and_no_overlap(factor, wide, is_slower):
    old = changed(bench(wide=wide), ELSEWHERE)
    new = changed(slowed(bench(wide=wide), factor, DECODING), {})
    assert bool(bench_records.compare(old, new).slower) is is_slower


def test_times_are_compared_only_on_the_same_idle_machine():
    a_little, much = (slowed(CPU_BENCH, factor, MOE4) for factor in (1.2, 1.3))
    assert "ms" not in bench_records.compare(CPU_BENCH, a_little).slower[0]
    assert bench_records.compare(CPU_BENCH, much).slower[0].endswith("; 71.4 [69.2, 73.5] ms, was 54.9 [53.3, 56.5] ms")
    busy = changed(much, {"others.core_seconds": 300.0})
    assert "ms" not in bench_records.compare(CPU_BENCH, busy).slower[0]
    assert bench_records.compare(CPU_BENCH, busy).not_compared == [
        "times: others used the machine during the new bench, or may have"
    ]
    assert "the old and the new bench" in bench_records.compare(busy, busy).not_compared[0]


def test_the_dense_model_is_judged_by_the_reference():
    """Its own ratio would not show that everything became slower."""
    names = [name for name in ROWS if name not in ("dense", "reference")]
    new = changed(CPU_BENCH, {f"{DENSE}.seconds": scaled(1.2), f"{at('reference')}.ratio": scaled(1 / 1.2)})
    new = changed(new, {f"{at(name)}.seconds": scaled(1.2) for name in names})
    assert bench_records.compare(CPU_BENCH, new).slower == [
        "dense, training, batch 12: 1.11 [1.08, 1.15] × the reference, was 0.926 [0.899, 0.955] × the reference"
    ]
    faster = slowed(CPU_BENCH, 1.5, at("reference"), at("reference_moe4"))  # nobody works on it
    assert bench_records.compare(CPU_BENCH, faster).slower == []


def test_without_a_reference_the_dense_model_is_not_judged_on_another_machine():
    def alone(record):
        some = [one for one in record["measurements"] if not one["model"].startswith("reference")]
        return changed(record, {"measurements": some})

    told = bench_records.compare(alone(CPU_BENCH), changed(alone(CPU_BENCH), ELSEWHERE)).not_compared
    assert "training, batch 12: without reference in both, nothing tells of it but times (dense)" in told
    assert bench_records.compare(alone(CPU_BENCH), alone(slowed(CPU_BENCH, 1.2, MOE4))).slower


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"size": "paper"}, "nothing is compared: the size is paper, was cpu"),
        ({"machine": GPU}, "nothing is compared: the device is cuda, was cpu"),
        ({"models.moe4.config.n_layer": 2}, "moe4: n_layer is 2, was 4"),
        ({"models.moe4.config.expert_hidden": 64}, "moe4: expert_hidden is 64, was 0"),
        ({"models.moe4.config.moe_backend": "masked"}, None),  # another way to the same
        ({"models.moe4.config.learning_rate": 0.1}, None),
        ({f"{MOE4}.seconds.n": 9}, "training, batch 12: timed fewer than 10 times (moe4)"),
        ({f"{at('moe4', 'papers')}.tokens": 50}, "the papers' protocol, batch 1: 50 characters, was 500 (moe4)"),
    ],
)
def test_incomparable_measurements_are_named_and_not_called_slower(changes, line):
    new = changed(CPU_BENCH, changes)
    assert bench_records.compare(CPU_BENCH, new).not_compared == ([line] if line else [])
    slow = slowed(new, 2, MOE4, at("moe4", "papers"))
    assert bool(bench_records.compare(CPU_BENCH, slow).slower) is (line is None or "moe4)" in line)
    assert len(bench_records.compare(CPU_BENCH, slow).slower) == (2 if line is None else 1 if "(moe4)" in line else 0)


def test_measurements_of_only_one_bench_are_named():
    models = {name: model for name, model in CPU_BENCH["models"].items() if name != "moe4_top2"}
    some = [one for one in CPU_BENCH["measurements"] if one["model"] != "moe4_top2" and one["batch_size"] != 32]
    part = changed(CPU_BENCH, {"models": models, "measurements": some})
    lines = [f"{task}, batch 32: not measured {{}} (reference, dense, moe4, moe4_linear, reference_moe4)"
             for task in ("reading the prompt", "decoding")]  # fmt: skip
    for old, new, when in ((CPU_BENCH, part, "now"), (part, CPU_BENCH, "before")):
        told = bench_records.compare(old, new).not_compared
        assert told == [f"moe4_top2: not measured {when}", *(line.format(when) for line in lines)]
