"""speed.py: what a bench records is read back; what is damaged, foreign or contradicts itself is refused; noise is not
called slower."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from benches import CPU, GPU, ROWS, SYMBOLS, bench, find
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import VALUES, case, changed, doubled, leaves, mutated, without, written

from papers.experiments import TABLES
from report import cells
from run import accounting, records
from run.records import RecordError
from speed import bench_records

ROOT = Path(bench_records.__file__).resolve().parents[1]
CPU_BENCH, GPU_BENCH = bench(), bench("paper", GPU)


def at(model, task="train", batch_size=None, record=CPU_BENCH):
    """measurements.<number> of that measurement."""
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
def test_the_records_that_these_tests_change_are_whole(record, tmp_path):
    assert bench_records.read(written(tmp_path, record)) == record


@pytest.mark.parametrize("size", ["cpu", "paper"])
def test_they_count_what_a_model_counts(size):
    from model import GPT

    for name, (_, table, row, changes) in ROWS.items():
        model = GPT(dataclasses.replace(TABLES[table].row(row).config_at(size), **changes), SYMBOLS)
        entry = bench(size)["models"][name]
        assert entry["parameters"] == accounting.count_parameters(model) and entry[
            "flops_per_token"
        ] == accounting.training_flops_per_token(model)


def test_records_are_read_where_torch_is_not_installed():
    code = "import sys; sys.modules['torch'] = None; from speed import bench_records"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_is_not_known_may_be_null():
    unknown = {"git": {"commit": None, "dirty": None}, "others": {"core_seconds": None, "device_bytes": None}}
    peaks = {f"measurements.{i}.peak_memory_bytes": None for i in range(len(GPU_BENCH["measurements"]))}
    assert bench_records.problems(changed(GPU_BENCH, {**unknown, **peaks})) == []


def test_a_part_of_a_bench_is_a_bench(tmp_path):
    """Some tasks of some models; the dense one is always there."""
    some = [one for one in CPU_BENCH["measurements"] if one["model"] in ("dense", "moe4") and one["task"] == "decode"]
    models = {name: CPU_BENCH["models"][name] for name in ("dense", "moe4")}
    assert bench_records.problems(changed(CPU_BENCH, {"models": models, "measurements": some})) == []


def test_numbers_may_be_rounded():
    place = at("moe4")
    rounded = {f"{place}.tokens_per_second": lambda value: float(f"{value:.4g}")}
    assert bench_records.problems(changed(CPU_BENCH, rounded)) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

FILES = {
    "empty": ("", "no record, or not all of one: Expecting value"),
    "list": ("[1, 2]", "[1, 2] is no record of bench.py; expected an object"),
    "NaN": ('{"a": NaN}', "NaN is in it, which is no number"),
    "no format": ("{}", "has no format 'charmoe bench 1': it is no record of bench.py"),
    "bench 0": ('{"format": "charmoe bench 0"}', "'charmoe bench 0', expected 'charmoe bench 1': older code made it"),
    "bench 2": ('{"format": "charmoe bench 2"}', "'charmoe bench 2', expected 'charmoe bench 1': newer code made it"),
    "a run's summary.json": (
        '{"format": "charmoe record 2"}',
        "expected 'charmoe bench 1': it is a record of train.py, and no record of bench.py",
    ),
    "another tool's": ('{"format": "pytest-benchmark"}', "it is no record of bench.py"),
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    text, message = FILES[content]
    assert message in refusal(written(tmp_path, text))


def test_a_run_is_told_from_a_bench_the_other_way_round_as_well(tmp_path):
    with pytest.raises(RecordError, match="it is a record of bench.py, and no record of train.py"):
        records.read(written(tmp_path, CPU_BENCH))


def test_a_record_that_was_cut_short_is_refused(tmp_path):
    text = json.dumps(CPU_BENCH)
    for length in range(0, len(text), len(text) // 20):
        assert "no record, or not all of one" in refusal(written(tmp_path, text[:length]))


KINDS = [
    ({"sice": "cpu"}, "unknown field 'sice' in the record; nearest: size"),
    ({"size": "../cpu"}, "size is '../cpu'; expected a name of lower-case letters, digits, - and _"),
    ({"quick": 0}, "quick is 0; expected true or false"),
    ({"seconds": "400"}, "seconds is '400'; expected a finite number from 0"),
    ({"ceilings.bytes_per_second": None}, "ceilings.bytes_per_second is None; expected a finite number"),
    ({"others.core_seconds": -1}, "others.core_seconds is -1; expected a finite number"),
    ({"models": []}, "models is []; expected an object"),
    ({"models.moe4": None}, "models.moe4 is None; expected an object"),
    ({"models.moe4.title": ""}, "models.moe4.title is ''; expected a line of text"),
    ({"models.moe4.title": "4\nexperts"}, "expected a line of text"),
    ({"models.moe4.backend.train": None}, "models.moe4.backend.train is None; expected a line of text"),
    ({"models.a model": {}}, "models has 'a model'; expected a name of"),
    ({"models.moe4.checks.0.error": "none"}, "models.moe4.checks[0].error is 'none'; expected a finite number"),
    ({"models.moe4.compile_seconds.train": False}, "compile_seconds.train is False; expected a finite number"),
    ({"measurements.0.batch_size": 1.0}, "measurements[0].batch_size is 1.0; expected an integer from 0"),
    ({"measurements.0.seconds": 1.0}, "measurements[0].seconds is 1.0; expected an object"),
    ({"measurements.0.ratio.n": 2.5}, "measurements[0].ratio.n is 2.5; expected an integer from 0"),
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


MOE4, DENSE, WRITING = at("moe4"), at("dense"), at("moe4", "decode", 8)
CONTRADICTIONS = [
    ({"machine.cores": 0}, "machine.cores is 0"),
    ({"machine.cuda": "12.8"}, "machine.cuda is '12.8', but machine.device_type is 'cpu'"),
    ({"others.device_bytes": 5}, "others.device_bytes is 5, but machine.device_type is 'cpu'"),
    ({"ceilings.flops_per_second": 0}, "ceilings.flops_per_second is 0"),
    ({"seconds": 1.0}, "seconds is 1.0, less than the measurements took"),
    ({"measurements": []}, "measurements is empty"),
    # models
    ({"models": {}}, "models has no 'dense', which ratios are to"),
    ({"models.dense": CPU_BENCH["models"]["moe4"]}, "models.dense.config.n_expert is 4, but the model is called dense"),
    ({"models.moe4.config.n_emdb": 32}, "models.moe4.config: unknown key 'n_emdb'; nearest key: n_embd"),
    ({"models.moe4.config.n_head": 3}, "models.moe4.config: n_embd = 128 is not a multiple of n_head = 3"),
    ({"models.moe4.config.n_layer": 3}, "models.moe4.parameters.attention is 262144, but the rest of the record"),
    ({"models.moe4.parameters.total": doubled}, "models.moe4.parameters.total is"),
    ({"models.moe4.parameters.active": doubled}, "models.moe4.flops_per_token is"),
    ({"models.moe4.parameters.active": 10**9}, "models.moe4.parameters.active is 1000000000; expected from"),
    ({"models.dense.flops_per_token": doubled}, "models.dense.flops_per_token is"),
    ({"models.moe4.checks.0.error": 2e-5}, "models.moe4.checks[0].error is 2e-05, above its limit, 1e-05: training"),
    # measurements
    ({f"{MOE4}.model": "moe5"}, "model is 'moe5'; expected reference or dense or"),
    ({f"{MOE4}.task": "trian"}, "task is 'trian'; expected train or prefill or decode or papers; nearest: train"),
    ({f"{MOE4}.batch_size": 0}, "batch_size is 0"),
    ({f"{MOE4}.tokens": 767}, "tokens is 767; expected 768 of train"),
    ({f"{WRITING}.tokens": 1}, "tokens is 1; expected 8 of decode"),
    ({f"{at('moe4', 'prefill', 8)}.tokens": 8}, "tokens is 8; expected 256 of prefill"),
    ({f"{at('moe4', 'papers')}.batch_size": 2}, "batch_size is 2; expected 1 of the papers' protocol"),
    ({"measurements": lambda all_: [*all_, all_[0]]}, "is of reference, train, batch 12, as one before it"),
    ({f"{MOE4}.peak_memory_bytes": 5}, "peak_memory_bytes is 5, but the device is not CUDA"),
    # times
    ({f"{MOE4}.seconds.p10": 1.0}, "seconds has p10 1.0, median 0.0549, p90 0.056547; expected them to rise from 0"),
    ({f"{MOE4}.seconds.p90": 0.01}, "expected them to rise from 0"),
    ({f"{MOE4}.seconds.p10": 0}, "expected them to rise from 0"),
    ({f"{MOE4}.seconds.n": 0}, "seconds.n is 0"),
    ({f"{MOE4}.ratio.p90": 0.5}, "ratio has p10"),
    ({f"{MOE4}.tokens_per_second": doubled}, "but tokens / seconds.median is 13989"),
    ({f"{MOE4}.floor.seconds": doubled}, "but its flops, bytes and the ceilings make it 0.017"),
    ({f"{MOE4}.floor.bytes": 1e12}, "but its flops, bytes and the ceilings make it 80.0"),
    ({f"{MOE4}.ratio": None}, "ratio is null; expected that of moe4 to dense"),
    ({f"{DENSE}.ratio": {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 40}}, "ratio is there; expected null, for dense"),
    ({f"{MOE4}.ratio": scaled(1 / 1.22**2)}, "but the seconds of both make it 0.919 to 1.62"),  # of speeds
    ({f"{DENSE}.task": "prefill"}, "ratio is there, but dense was not measured at train, batch 12"),
]


@pytest.mark.parametrize("changes, message", CONTRADICTIONS, ids=lambda value: case(value)[:60])
def test_a_contradiction_is_refused(changes, message):
    found = bench_records.problems(changed(CPU_BENCH, changes))
    assert any(message in problem for problem in found), found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_is_refused_in_a_line_or_can_be_shown(tmp_path_factory, data):
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
        assert cells.speed_grids(read) and cells.speed_csv([read])
        told = [
            *bench_records.slower(record, read),
            *bench_records.not_compared(record, read),
            *bench_records.doubts(read),
            bench_records.about(read),
        ]
        assert not any("\n" in line for line in told)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of benches


def test_benches_come_sorted_and_what_is_no_evidence_is_named(tmp_path):
    folder = tmp_path / "results"
    files = {
        "bench/b-cpu.json": CPU_BENCH,
        "bench/a-paper.json": GPU_BENCH,
        "bench/c-quick.json": changed(CPU_BENCH, {"quick": True}),
        "bench/d-copy.json": CPU_BENCH,
        "bench/e-damaged.json": "{",
        "bench/deep/f.json": "{",
        "A/dense-s1.json": "{",
    }
    for name, record in files.items():
        written(folder, record, name)
    pairs, left_out = bench_records.read_all(folder)
    assert [path.name for path, _ in pairs] == ["a-paper.json", "b-cpu.json"]
    assert [record for _, record in pairs] == [GPU_BENCH, CPU_BENCH]
    assert left_out[:2] == [
        "results/bench/c-quick.json: a quick bench, which is too short to be evidence; make it without --quick",
        "results/bench/d-copy.json: the same bench as results/bench/b-cpu.json; delete one",
    ]
    assert len(left_out) == 3 and left_out[2].startswith("results/bench/e-damaged.json: no record, or not all of one")


def test_without_a_folder_there_are_no_benches(tmp_path):
    assert bench_records.read_all(tmp_path / "absent") == bench_records.read_all(str(tmp_path)) == ([], [])


def test_a_quick_bench_can_be_read_to_be_compared(tmp_path):
    assert bench_records.read(written(tmp_path, changed(CPU_BENCH, {"quick": True})))["quick"]


# ---------------------------------------------------------------------------------------------------------------------
# What a record says


def test_numbers_have_three_digits_and_a_spread_as_many_as_its_median():
    assert [bench_records.significant(value) for value in (0.01234, 1.2345, 98.76, 1234.5, 0)] == [
        "0.0123", "1.23", "98.8", "1,234", "0",
    ]  # fmt: skip
    assert bench_records.spread_text({"median": 0.98, "p10": 0.9519, "p90": 1.0141}) == "0.980 [0.952, 1.014]"


def test_the_inverse_of_a_ratio_turns_its_ends_round():
    assert bench_records.inverse({"median": 2.0, "p10": 1.0, "p90": 4.0, "n": 7}) == {
        "median": 0.5, "p10": 0.25, "p90": 1.0, "n": 7,
    }  # fmt: skip


def test_a_model_finds_the_published_row_of_its_kind():
    rows = {name: bench_records.published_row(model) for name, model in CPU_BENCH["models"].items()}
    assert {name: row.label for name, row in rows.items() if row} == {
        "reference": "Baseline", "dense": "Baseline", "moe4_linear": "MoE Top-2",
    }  # fmt: skip
    ratios = {
        measure: bench_records.published_ratios(measure).values() for measure in ("train_seconds", "inference_speed")
    }
    assert [round(value, 2) for value in ratios["train_seconds"]] == [1.51, 1.60, 1.61, 1.61]
    assert [round(value, 2) for value in ratios["inference_speed"]] == [0.57, 0.51, 0.45, 0.44]


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
def test_what_makes_a_bench_weaker_evidence_is_told(record, changes, doubts):
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


def test_the_same_bench_is_not_slower_and_all_of_it_can_be_compared():
    assert bench_records.slower(CPU_BENCH, CPU_BENCH) == bench_records.not_compared(CPU_BENCH, CPU_BENCH) == []


def test_a_ratio_that_became_worse_is_told_with_what_it_was():
    old, new = CPU_BENCH, changed(slowed(CPU_BENCH, 1.2, MOE4), ELSEWHERE)
    assert bench_records.slower(old, new) == [
        "moe4, training, batch 12: 1.46 [1.42, 1.51] × dense, was 1.22 [1.18, 1.26] × dense"
    ]
    assert bench_records.slower(new, old) == []  # faster
    assert bench_records.not_compared(old, new) == [
        "times: the machine is Another CPU, 2 cores, 2 threads, torch 2.13.0+cpu, float32, was AMD EPYC, 2 cores, "
        "2 threads, torch 2.13.0+cpu, float32"
    ]


@pytest.mark.parametrize(
    "factor, wide, is_slower",
    [(1.12, 0.06, True), (1.09, 0.02, False), (1.2, 0.3, False), (1.5, 0.3, True)],
    ids=["clear", "within 10%", "ranges overlap", "far apart"],
)
def test_slower_is_more_than_a_tenth_with_ranges_that_do_not_overlap(factor, wide, is_slower):
    old = changed(bench(wide=wide), ELSEWHERE)
    new = changed(slowed(bench(wide=wide), factor, WRITING), {})
    assert bool(bench_records.slower(old, new)) is is_slower


def test_times_count_on_the_same_machine_left_alone_and_by_a_wider_margin():
    a_little, much = (slowed(CPU_BENCH, factor, MOE4) for factor in (1.2, 1.3))
    assert "ms" not in bench_records.slower(CPU_BENCH, a_little)[0]
    assert bench_records.slower(CPU_BENCH, much)[0].endswith("; 71.4 [69.2, 73.5] ms, was 54.9 [53.3, 56.5] ms")
    busy = changed(much, {"others.core_seconds": 300.0})
    assert "ms" not in bench_records.slower(CPU_BENCH, busy)[0]
    assert bench_records.not_compared(CPU_BENCH, busy) == [
        "times: others used the machine during the new bench, or may have"
    ]
    assert "the old and the new bench" in bench_records.not_compared(busy, busy)[0]


def test_a_dense_model_is_judged_by_the_reference():
    """Its own ratio would not show that everything became slower."""
    names = [name for name in ROWS if name not in ("dense", "reference")]
    new = changed(CPU_BENCH, {f"{DENSE}.seconds": scaled(1.2), f"{at('reference')}.ratio": scaled(1 / 1.2)})
    new = changed(new, {f"{at(name)}.seconds": scaled(1.2) for name in names})
    assert bench_records.slower(CPU_BENCH, new) == [
        "dense, training, batch 12: 1.11 [1.08, 1.15] × the reference, was 0.926 [0.899, 0.955] × the reference"
    ]
    faster = slowed(CPU_BENCH, 1.5, at("reference"), at("reference_moe4"))  # nobody works on it
    assert bench_records.slower(CPU_BENCH, faster) == []


def test_without_a_reference_a_dense_model_cannot_be_judged_elsewhere():
    def alone(record):
        some = [one for one in record["measurements"] if not one["model"].startswith("reference")]
        return changed(record, {"measurements": some})

    told = bench_records.not_compared(alone(CPU_BENCH), changed(alone(CPU_BENCH), ELSEWHERE))
    assert "training, batch 12: without reference in both, nothing tells of it but times (dense)" in told
    assert bench_records.slower(alone(CPU_BENCH), alone(slowed(CPU_BENCH, 1.2, MOE4)))


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
def test_what_cannot_be_compared_is_told_and_not_called_slower(changes, line):
    new = changed(CPU_BENCH, changes)
    assert bench_records.not_compared(CPU_BENCH, new) == ([line] if line else [])
    slow = slowed(new, 2, MOE4, at("moe4", "papers"))
    assert bool(bench_records.slower(CPU_BENCH, slow)) is (line is None or "moe4)" in line)
    assert len(bench_records.slower(CPU_BENCH, slow)) == (2 if line is None else 1 if "(moe4)" in line else 0)


def test_what_only_one_bench_has_is_told():
    models = {name: model for name, model in CPU_BENCH["models"].items() if name != "moe4_top2"}
    some = [one for one in CPU_BENCH["measurements"] if one["model"] != "moe4_top2" and one["batch_size"] != 32]
    part = changed(CPU_BENCH, {"models": models, "measurements": some})
    lines = [f"{task}, batch 32: not measured {{}} (reference, dense, moe4, moe4_linear, reference_moe4)"
             for task in ("reading the prompt", "decoding")]  # fmt: skip
    for old, new, when in ((CPU_BENCH, part, "now"), (part, CPU_BENCH, "before")):
        told = bench_records.not_compared(old, new)
        assert told == [f"moe4_top2: not measured {when}", *(line.format(when) for line in lines)]
