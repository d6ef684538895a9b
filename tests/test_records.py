"""run/records.py: the record of a run is read back unchanged, and an invalid one is refused in one line.

Also the last lines on the screen (run/screen_report.py), which are made from a record.
"""

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import english, prepare_text, train_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.measures import MEASURES
from run import records
from run.records import RecordError
from run.screen_report import final_report
from run.settings import Config

ROOT = Path(__file__).resolve().parents[1]


def record_in(out_dir):
    """The record of a run, on a machine that others left to it."""
    record = json.loads((out_dir / "summary.json").read_text())
    return changed(record, {"others.cpu_share": 0.01, "exclusive": True, "git": {"commit": "0" * 40, "dirty": False}})


@pytest.fixture(scope="session")
def dense(dense_run):
    return record_in(dense_run)


@pytest.fixture(scope="session")
def moe(moe_run):
    return record_in(moe_run)


@pytest.fixture(scope="session")
def cuda(dense):
    """The dense record, as if made on CUDA and resumed once."""
    return changed(
        dense,
        {
            "machine": {
                **dense["machine"],
                "device_type": "cuda",
                "cuda": "12.8",
                "compile": True,
                "dtype": "bfloat16",
            },
            "others.device_bytes": 2**20,
            "seconds": {**dense["seconds"], "compile": 30.0, "total": 100.0},
            "config.device": "cuda:0",
            "config.init_from": "resume",
            "resumed": 1,
        },
    )


def changed(record, changes):
    """A copy with changes {"evaluations.0.step": 3, …}; a function is called with what is there."""
    record = copy.deepcopy(record)
    for path, value in changes.items():
        parent, key = parent_of(record, path)
        parent[key] = value(parent[key]) if callable(value) else value
    return record


def without(record, path):
    record = copy.deepcopy(record)
    parent, key = parent_of(record, path)
    del parent[key]
    return record


def parent_of(record, path):
    """(the object or list that holds it, its name or number there)"""
    *above, last = [int(part) if part.lstrip("-").isdigit() else part for part in path.split(".")]
    for part in above:
        record = record[part]
    return record, last


def written(folder, record, name="summary.json"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def refusal(path):
    """What `read` says against the file, without its path and the way out."""
    with pytest.raises(RecordError) as caught:
        records.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ").removesuffix(f"; {records.WAY_OUT}")


# ---------------------------------------------------------------------------------------------------------------------
# What train.py writes


def test_records_are_read_where_torch_is_not_installed():
    code = "import sys; sys.modules['torch'] = None; from run import records"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


RUNS = {
    "expert choice": dict(n_expert=4, router="expert_choice", capacity_factor=0.75, aux_loss="none", max_iters=3),
    "one set, bfloat16": dict(
        n_expert=4, expert_top_k=2, n_layer=3, router="two_level", share_experts=True, dtype="bfloat16", max_iters=3
    ),
    "top-p, by block": dict(
        n_expert=4,
        n_expert_by_block="4,2",
        expert_top_k=2,
        router_top_p=0.5,
        aux_loss="none",
        z_loss_coef=1e-3,
        max_iters=3,
    ),
    "biases, accumulated": dict(bias=True, gradient_accumulation_steps=2, max_iters=3, train_characters=5000),
    "samples": dict(max_iters=1, inference_samples=1),
    "samples of a leaky model": dict(max_iters=1, inference_samples=1, n_expert=4, router_level="sequence"),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_record_of_a_run_is_read_back_unchanged(words, tmp_path, run):
    assert train_tiny(words, tmp_path, **RUNS[run]) == 0
    assert records.read(tmp_path / "summary.json") == json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize(
    "path, kept",
    [
        (str(ROOT / "out" / "a" / "b"), "out/a/b"),
        ("/home/somebody/runs/a-s1", "a-s1"),
        (f"{ROOT}-2/out/a/", "a"),
        ("out/a", "out/a"),
        ("", ""),
    ],
)
def test_a_record_names_no_folder_of_the_machine_outside_the_project(path, kept):
    values = Config(out_dir=path, compile_cache=path).to_record()
    assert (values["out_dir"], values["compile_cache"]) == (kept, kept)
    assert values == Config(out_dir=kept, compile_cache=kept).to_dict()


def test_the_record_of_a_run_in_an_absolute_folder_names_only_its_last_part(words, tmp_path):
    assert train_tiny(words, tmp_path / "run", max_iters=1, compile_cache=tmp_path / "cache") == 0
    record = records.read(tmp_path / "run" / "summary.json")
    assert (record["config"]["out_dir"], record["config"]["compile_cache"]) == ("run", "cache")


@pytest.mark.parametrize("name", ["dense", "moe", "cuda"])
def test_the_records_that_these_tests_change_are_valid(name, request, tmp_path):
    record = request.getfixturevalue(name)
    assert records.read(written(tmp_path, record)) == record


def test_a_run_without_a_test_split_is_read(tmp_path):
    dataset = prepare_text(tmp_path / "data", english(1500, seed=4), splits={"train": 90, "val": 10})
    assert train_tiny(dataset, tmp_path / "run", max_iters=1) == 0
    assert records.read(tmp_path / "run" / "summary.json")["test"] is None


def test_a_run_resumed_with_another_schedule_is_read(words, tmp_path):
    assert train_tiny(words, tmp_path / "run", max_iters=10) == 0
    assert train_tiny(words, tmp_path / "run", max_iters=20, eval_interval=7, init_from="resume") == 0
    record = records.read(tmp_path / "run" / "summary.json")
    assert record["resumed"] == 1 and [line["step"] for line in record["evaluations"]] == [0, 10, 14, 20]


def test_text_may_be_of_any_characters(dense):
    """Each of them one that JSON writes as two escapes."""
    assert records.problems(changed(dense, {"dataset.name": "𝕏 \U0010ffff \ue000 \ud7ff"})) == []


def test_a_record_without_newer_fields_is_read(dense):
    """Some records in results/ are older than these."""
    assert dense["inference"] == {"samples": 0, "tokens_per_second": None, "exclusive": False, "attention": None}
    old = without(without(dense, "inference.exclusive"), "config.router_jitter")
    old = without(old, "inference.attention")
    assert dense["config"]["router_jitter"] == Config.router_jitter and records.problems(old) == []


def test_fields_that_tables_do_not_know_are_left_alone(dense):
    """A router may record statistics of its own."""
    assert records.problems(changed(dense, {"surprise": 1, "clean.best.bits": None})) == []


def test_another_count_of_parameters_or_flops_is_no_mistake(moe):
    """Only the model knows how many a new router has."""
    changes = {"parameters.router": more, "parameters.total": more, "training_flops_per_token": more}
    assert records.problems(changed(moe, changes)) == []


def test_a_record_is_read_with_every_key_of_its_config(dense, tmp_path):
    """Tables and figures ask for the seed by name."""
    read = records.read(written(tmp_path, changed(without(dense, "config.seed"), {"config.n_head": 2.0})))
    assert read == dense and type(read["config"]["n_head"]) is int


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no records

FILES = {
    "empty": ("", "no record: not valid JSON: Expecting value"),
    "text": ("a summary", "no record: not valid JSON: Expecting value"),
    "list": ("[1, 2]", "[1, 2] is no record; expected an object"),
    "NaN": ('{"a": NaN}', "NaN is in it, which is no number"),
    "Infinity": ('{"a": [Infinity]}', "Infinity is in it"),
    "-Infinity": ('{"a": -Infinity}', "-Infinity is in it"),
    "twice": ('{"a": {"b": 1, "c": 2, "b": 1}}', "the field 'b' is in one object twice"),
    "deep": ("[" * 100_000, "nested too deep"),
    "many digits": ("9" * 10_000, "digits"),
    "no format": ("{}", "its format is None, expected 'charmoe record 2'"),
    "an older record": ('{"format": "charmoe record 1"}', "'charmoe record 1', expected 'charmoe record 2'"),
    "a bench's": ('{"format": "charmoe bench 1"}', "'charmoe bench 1', expected 'charmoe record 2'"),
    "no name": ('{"format": 2}', "its format is 2, expected 'charmoe record 2'"),
}


@pytest.mark.parametrize("content", FILES)
def test_another_file_is_refused(tmp_path, content):
    text, message = FILES[content]
    assert message in refusal(written(tmp_path, text))


def test_an_unreadable_file_is_refused(tmp_path):
    assert "cannot be read: No such file" in refusal(tmp_path / "absent.json")
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    (tmp_path / "latin1.json").write_bytes('{"title": "Bücher"}'.encode("latin-1"))
    assert "no record: not valid JSON: 'utf-8' codec" in refusal(tmp_path / "latin1.json")


def test_a_record_that_was_cut_short_is_refused(moe, tmp_path):
    text = json.dumps(moe)
    for length in range(0, len(text), len(text) // 10):
        assert "no record: not valid JSON" in refusal(written(tmp_path, text[:length]))


def test_a_message_has_the_first_problem_and_how_many_more(dense, tmp_path):
    assert refusal(written(tmp_path, changed(dense, {"leaky": True}))).endswith("makes it False")
    record = without(changed(dense, {"iterations": -1, "tokens": "many"}), "epochs")
    assert refusal(written(tmp_path, record)) == "iterations is -1; expected an integer from 0 (and 2 more)"
    with pytest.raises(RecordError, match=f"{records.WAY_OUT}$"):
        records.read(tmp_path / "summary.json")


# ---------------------------------------------------------------------------------------------------------------------
# Fields and their kinds

KINDS = [
    ("dense", {"tokens": True}, "tokens is True; expected an integer from 0"),
    ("dense", {"tokens": 1280.0}, "tokens is 1280.0; expected an integer from 0"),
    ("dense", {"tokens": 2**63}, "tokens is 9223372036854775808; expected an integer"),
    ("dense", {"resumed": -1}, "resumed is -1; expected an integer from 0"),
    ("dense", {"machine.cores": 0}, "machine.cores is 0; expected an integer from 1"),
    ("dense", {"epochs": True}, "epochs is True; expected a finite number from 0"),
    ("dense", {"epochs": "1.5"}, "epochs is '1.5'; expected a finite number"),
    ("dense", {"epochs": 10**400}, "; expected a finite number"),
    ("dense", {"epochs": None}, "epochs is None; expected a finite number"),
    ("dense", {"evaluations.1.clean.nats": -0.5}, "evaluations[1].clean.nats is -0.5; expected a loss from 0"),
    ("dense", {"test.nats": 1e4}, "test.nats is 10000.0; expected a loss from 0 and below 10,000"),
    ("dense", {"inference.exclusive": None}, "inference.exclusive is None; expected true or false"),
    ("dense", {"inference.attention": 3}, "inference.attention is 3; expected text that UTF-8 can encode"),
    ("moe", {"evaluations.2.load.1.3": 1.5}, "evaluations[2].load[1][3] is 1.5; expected a number from 0 to 1"),
    ("dense", {"evaluations": {}}, "evaluations is {}; expected a list"),
    ("dense", {"evaluations.1": 5}, "evaluations[1] is 5; expected an object"),
    ("dense", {"seconds": [1.0]}, "seconds is [1.0]; expected an object"),
    ("dense", {"title": 5}, "title is 5; expected text"),
    ("dense", {"title": "\ud800"}, r"title is '\ud800'; expected text that UTF-8 can encode"),
    ("dense", {"config.out_dir": "\udcff"}, r"config: out_dir is '\udcff'; expected text that UTF-8 can encode"),
    ("dense", {"leaky": 0}, "leaky is 0; expected true or false"),
    ("dense", {"git.commit": "main"}, "git.commit is 'main'; expected 40 to 64 hexadecimal digits"),
    ("dense", {"dataset.sha256": "86c4"}, "dataset.sha256 is '86c4'; expected 64 hexadecimal digits"),
    ("dense", {"dataset.unit": "word"}, "dataset.unit is 'word'; expected 'byte' or 'character'"),
    ("dense", {"machine.device_type": "tpu"}, "machine.device_type is 'tpu'; expected 'cpu' or 'cuda' or 'mps'"),
    ("dense", {"machine.dtype": []}, "machine.dtype is []; expected 'bfloat16' or 'float32'"),
]


@pytest.mark.parametrize("name, changes, message", KINDS, ids=str)
def test_a_field_of_another_kind_is_refused(name, changes, message, request):
    found = records.problems(changed(request.getfixturevalue(name), changes))
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize("path", ["title", "git.dirty", "evaluations.1.paper.val", "dataset.splits.val"])
def test_a_missing_field_is_refused(dense, path):
    *above, name = path.replace(".1", "[1]").split(".")
    assert records.problems(without(dense, path)) == [f"missing field {name!r} in {'.'.join(above) or 'the record'}"]


def test_a_number_too_large_for_a_float_is_refused(dense, tmp_path):
    text = re.sub(r'"epochs": [\d.e-]+', '"epochs": 1e999', json.dumps(dense))
    assert refusal(written(tmp_path, text)) == "epochs is inf; expected a finite number from 0"


def test_unknown_numbers_may_be_null(dense):
    unknown = {"git": {"commit": None, "dirty": None}, "others.cpu_share": None, "peak_memory_bytes": None}
    assert records.problems(changed(dense, {**unknown, "exclusive": False})) == []


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions


def case(value):
    """The name of a test's case: its text without addresses, so that every process has the same names."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def more(value):
    return value + 1000


def doubled(value):
    return 2 * value


CONTRADICTIONS = [
    # the config
    ("dense", {"config.n_emdb": 32}, "config: unknown key 'n_emdb'; nearest key: n_embd"),
    ("dense", {"config.n_embd": "wide"}, "config: n_embd is 'wide'; expected an integer from 1"),
    ("dense", {"config.n_head": 3}, "config: n_embd = 16 is not a multiple of n_head = 3"),
    ("dense", {"config.seed": 5}, "run_id is"),
    ("dense", {"config.learning_rate": 0.02}, "run_id is"),
    ("dense", {"run_id": "0123456789-s1337"}, "run_id is '0123456789-s1337', but the rest of the record makes it"),
    ("dense", {"title": "Another"}, "title is 'Another'"),
    ("dense", {"leaky": True}, "leaky is True"),
    ("dense", {"iterations": 21}, "iterations is 21, but the rest of the record makes it 20"),
    ("dense", {"tokens": 1281}, "tokens is 1281, but the rest of the record makes it 1280"),
    ("moe", {"routing": lambda layers: layers[:1]}, "routing is of [4] experts; the MoE layers have [4, 4]"),
    ("moe", {"evaluations.0.load": [[], []]}, "evaluations[0].load is of [0, 0] experts"),
    ("dense", {"evaluations.0.load": [[0.5, 0.5]]}, "evaluations[0].load is of [2] experts"),
    ("dense", {"resumed": 1}, "resumed is 1, but config.init_from is 'scratch'"),
    ("dense", {"evaluations.1.step": 9}, "expected multiples of 10"),
    ("dense", {"test": None}, "test is None, but the splits of the text are train, val, test"),
    ("dense", {"parameters.total": 0}, "parameters.total is 0"),
    ("dense", {"tokens_per_second": doubled}, "tokens_per_second is"),
    ("dense", {"epochs": doubled}, "epochs is"),
    # the evaluations
    ("dense", {"evaluations": []}, "steps of the evaluations are []; expected them to rise from 0 to 20"),
    ("dense", {"evaluations.1.step": 0}, "steps of the evaluations are [0, 0, 20]"),
    ("dense", {"evaluations.0.step": 1}, "steps of the evaluations are [1, 10, 20]"),
    ("dense", {"evaluations.2.step": 19}, "steps of the evaluations are [0, 10, 19]"),
    ("dense", {"evaluations.1.clean.nats": 3.0}, "evaluations[1].clean.bpc is"),
    ("dense", {"clean.best.nats": doubled}, "clean.best.nats is"),
    ("dense", {"clean.best.step": 0}, "clean.best.step is 0"),
    ("dense", {"clean.final.step": 10}, "clean.final.step is 10, but the rest of the record makes it 20"),
    ("dense", {"evaluations.1.clean": {"nats": 0.1, "bpc": 0.1 / math.log(2)}}, "clean.best.nats is"),
    ("dense", {"evaluations.1.halves.0.nats": doubled}, "evaluations[1].clean.nats is"),
    ("dense", {"evaluations.1.halves": []}, "cross_fitted is"),
    ("dense", {"cross_fitted.nats": doubled}, "cross_fitted.nats is"),
    ("dense", {"cross_fitted": None}, "cross_fitted is None"),
    ("dense", {"test.bpc": doubled}, "test.bpc is"),
    ("dense", {"test.step": 10}, "test.step is 10, but the rest of the record makes it 20"),
    ("moe", {"paper.best_val": doubled}, "paper.best_val is"),
    ("moe", {"paper.final_train_with_aux": doubled}, "paper.final_train_with_aux is"),
    ("dense", {"train_mode": {"loss": 9.0, "objective": 9.0}}, "train_mode.loss is 9.0"),
    ("dense", {"train_mode": None}, "train_mode is None"),
    # whether its times count
    ("dense", {"exclusive": False}, "exclusive is False, but the rest of the record makes it True"),
    ("dense", {"others.cpu_share": 0.5}, "exclusive is True, but the rest of the record makes it False"),
    ("cuda", {"others.device_bytes": 2**34}, "exclusive is True, but the rest of the record makes it False"),
]


@pytest.mark.parametrize("name, changes, message", CONTRADICTIONS, ids=case)
def test_a_contradiction_is_refused(name, changes, message, request):
    found = records.problems(changed(request.getfixturevalue(name), changes))
    assert any(message in problem for problem in found), found


def test_the_first_of_equally_good_evaluations_is_the_best(dense):
    """best.pt holds its weights."""
    least = {f"evaluations.1.{key}": dense["evaluations"][2][key] for key in ("clean", "halves")}
    record = changed(dense, {**least, "clean.best.step": 10, "test.step": 10})
    assert records.problems(record) == []
    assert records.problems(changed(record, {"clean.best.step": 20}))


def test_a_record_from_before_halves_were_kept_is_read_and_has_no_cross_fitted_loss(dense):
    older = copy.deepcopy(dense)
    for line in [older, *older["evaluations"]]:
        line.pop("cross_fitted", None), line.pop("halves", None)
    assert records.problems(older) == [] and MEASURES["cross_fitted"].read(older) is None
    assert MEASURES["cross_fitted"].read(dense) == dense["cross_fitted"]["nats"] >= dense["clean"]["best"]["nats"]


def test_floats_may_differ_by_rounding_only(dense):
    for factor, is_refused in ((1 + 1e-12, False), (1 - 1e-12, False), (1 + 1e-7, True)):
        record = changed(dense, {"clean.best.bpc": lambda bpc: bpc * factor})  # noqa: B023, called at once
        assert bool(records.problems(record)) == is_refused


# ---------------------------------------------------------------------------------------------------------------------
# Any change at all


def leaves(value, path=()):
    """{path: leaf}; a path is a tuple of names and numbers."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {below: leaf for key, inner in items for below, leaf in leaves(inner, (*path, key)).items()}
    return {path: value}


def other_kind(value):
    return {bool: int, str: lambda text: [text], type(None): lambda _: "none"}.get(type(value), str)(value)


def scaled(factor):
    def scale(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, str):
            return value[1:] + value[:1] if re.fullmatch("[0-9a-f]{40,}", value) else value + "x"
        if isinstance(value, (dict, list)):
            return [value]
        return 1 if value is None else type(value)(value * factor)

    return scale


VALUES = {
    "another kind": other_kind,
    "null": lambda value: None if value is not None else {},
    "NaN": lambda value: math.nan,
    "infinite": lambda value: math.inf,
    "negative": lambda value: -1 if not value or isinstance(value, (str, list)) else -value,
    **{f"times {factor}": scaled(factor) for factor in (2, 0.5, 1.001, 1000)},
}


def mutated(record, path, how):
    """A copy in which the leaf at `path` is gone, has another name, or another value."""
    record = copy.deepcopy(record)
    parent = record
    for part in path[:-1]:
        parent = parent[part]
    if how == "dropped":
        del parent[path[-1]]
    elif how == "renamed" and isinstance(parent, dict):
        parent[path[-1] + "s"] = parent.pop(path[-1])
    elif how == "renamed":  # an entry of a list has no name: one more of it
        parent.append(parent[path[-1]])
    else:
        parent[path[-1]] = VALUES[how](parent[path[-1]])
    return record


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_is_refused_in_one_line_or_changes_no_result(dense, moe, tmp_path_factory, data):
    record = data.draw(st.sampled_from([dense, moe]))
    path = data.draw(st.sampled_from(list(leaves(record))))
    other = mutated(record, path, data.draw(st.sampled_from(["dropped", "renamed", *VALUES])))
    file = tmp_path_factory.getbasetemp() / "changed.json"
    file.write_text(json.dumps(other))
    try:
        read = records.read(file)
    except RecordError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
    else:
        assert final_report(read, "out") and records.machine_of(read)
        for name in ("run_id", "tokens", "clean", "paper", "train_mode", "test", "exclusive"):
            assert read[name] == record[name]


# ---------------------------------------------------------------------------------------------------------------------
# A folder of records


@pytest.fixture
def results(tmp_path):
    """A function that writes {path under results/: record} and reads it all: (names of what counts, what does not)."""

    def read_all(files, **options):
        for name, record in files.items():
            written(tmp_path / "results", record, name)
        pairs, left_out = records.read_all(tmp_path / "results", **options)
        assert all(record == records.read(path) for path, record in pairs)
        assert all("\n" not in line and str(tmp_path) not in line for line in left_out)
        return [path.relative_to(tmp_path / "results").as_posix() for path, _ in pairs], left_out

    return read_all


def of_seed(record, seed):
    config = Config.from_dict({**record["config"], "seed": seed})
    return changed(record, {"config.seed": seed, "run_id": config.run_id})


def test_records_are_sorted_by_path_and_other_files_passed_over(results, dense, moe):
    files = {"b/dense-s7.json": of_seed(dense, 7), "b/dense-s1337.json": dense, "a/moe-s1337.json": moe}
    others = {"a/times.json": "{}", "a/timing-1.json": "{}", "top.json": "{}", "a/deep/x.json": "{}", "a/x.txt": "no"}
    others["bench/epyc-cpu.json"] = "{}"  # a bench
    kept, left_out = results({**files, **others}, skip=("times", "timing"))
    assert kept == ["a/moe-s1337.json", "b/dense-s1337.json", "b/dense-s7.json"] and left_out == []


def test_a_damaged_record_is_named_and_the_rest_counts(results, dense):
    kept, left_out = results({"a/cut-s1.json": '{"format"', "a/dense-s1337.json": dense})
    assert kept == ["a/dense-s1337.json"]
    assert len(left_out) == 1 and left_out[0].startswith("results/a/cut-s1.json: no record: not valid JSON")


@pytest.mark.parametrize("name", ["dense-s7.json", "dense-s11337.json", "dense.json", "s1337.json", "summary.json"])
def test_a_file_must_be_named_after_its_seed(results, dense, name):
    kept, left_out = results({f"a/{name}": dense})
    assert kept == [] and left_out == [
        f"results/a/{name}: its record has another seed; rename it, to a name that ends in -s1337.json"
    ]


def test_a_copy_counts_once(results, dense):
    kept, left_out = results({"a/dense-s1337.json": dense, "b/twin-s1337.json": dense})
    assert kept == ["a/dense-s1337.json"]
    assert left_out == ["results/b/twin-s1337.json: the same record as results/a/dense-s1337.json; delete one"]


def test_two_different_records_of_one_run_do_not_count(results, dense, moe):
    """A seed that is counted twice makes n and the spread of its row wrong."""
    again = changed(dense, {"median_step_ms": doubled})
    kept, left_out = results({"a/dense-s1337.json": dense, "a/moe-s1337.json": moe, "b/dense-s1337.json": again})
    assert kept == ["a/moe-s1337.json"]
    assert len(left_out) == 1 and left_out[0].endswith("none counts, keep one")
    assert left_out[0].startswith(
        "results/a/dense-s1337.json, results/b/dense-s1337.json: different records of one run"
    )
    assert dense["run_id"] in left_out[0]


def test_a_run_repeated_on_another_machine_or_with_uncommitted_changes_counts_apart(results, dense):
    elsewhere = changed(dense, {"machine.device": "another CPU"})
    dirty = changed(dense, {"git.dirty": True})
    kept, left_out = results({"a/1-s1337.json": dense, "a/2-s1337.json": elsewhere, "a/3-s1337.json": dirty})
    assert kept == ["a/1-s1337.json", "a/2-s1337.json", "a/3-s1337.json"] and left_out == []


def test_a_run_on_another_text_or_that_is_not_straight_counts_apart(results, dense):
    other = changed(dense, {"dataset.sha256": "0" * 64})
    extended = changed(dense, {"straight": False, "resumed": 1, "config.init_from": "resume"})
    kept, left_out = results({"a/1-s1337.json": dense, "a/2-s1337.json": other, "a/3-s1337.json": extended})
    assert kept == ["a/1-s1337.json", "a/2-s1337.json", "a/3-s1337.json"] and left_out == []


def test_an_older_record_is_straight_where_its_evaluations_are_those_of_its_config(dense):
    older = without(without(dense, "straight"), "stretches")
    resumed = changed(older, {"resumed": 1, "config.init_from": "resume"})
    assert records.problems(resumed) == [] and records.is_straight(older) and records.is_straight(resumed)
    assert not records.is_straight(without(resumed, "evaluations.1"))


def test_a_missing_or_empty_folder_has_no_records(tmp_path):
    assert records.read_all(tmp_path / "absent") == records.read_all(str(tmp_path)) == ([], [])


# ---------------------------------------------------------------------------------------------------------------------
# What a record says


def test_a_machine_is_told_in_one_line(dense, cuda):
    machine = {"device": "AMD EPYC", "cores": 1, "threads": 1, "torch": "2.13.0+cpu"}
    dense = changed(dense, {"machine": {**dense["machine"], **machine}})
    assert records.machine_of(dense) == "AMD EPYC, 1 core, 1 thread, torch 2.13.0+cpu, float32"
    dense = changed(dense, {"machine.cores": 2, "machine.threads": 4, "machine.compile": True})
    assert records.machine_of(dense) == "AMD EPYC, 2 cores, 4 threads, torch 2.13.0+cpu, float32, compiled"
    cuda = changed(cuda, {"machine.device": "NVIDIA H200", "machine.torch": "2.11.0+cu128"})
    h200 = "NVIDIA H200, torch 2.11.0+cu128, bfloat16, compiled"
    assert records.machine_of(cuda) == h200
    for key, name in (("fused_update", "fused update"), ("routing_kernels", "routing kernels")):
        assert records.machine_of(changed(cuda, {f"config.{key}": True})) == f"{h200}, {name}"
        assert records.machine_of(changed(dense, {f"config.{key}": True})) == records.machine_of(dense)  # no effect


def test_a_backend_chosen_by_hand_counts_as_another_machine(dense, moe):
    auto, by_hand = records.machine_of(moe), changed(moe, {"config.moe_backend": "reference"})
    assert records.machine_of(by_hand) == f"{auto}, reference backend"
    assert records.machine_of(without(moe, "config.moe_backend")) == auto
    assert records.machine_of({"machine": moe["machine"]}) == auto
    assert records.machine_of(changed(dense, {"config.moe_backend": "reference"})) == records.machine_of(dense)


@pytest.mark.parametrize(
    "commit, dirty, clean", [("0", False, True), ("0", True, False), ("0", None, False), (None, False, False)]
)
def test_a_run_is_clean_if_a_commit_identifies_its_code(commit, dirty, clean):
    assert records.is_clean({"git": {"commit": commit, "dirty": dirty}}) is clean


@pytest.mark.parametrize(
    "device, cpu_share, device_bytes, exclusive",
    [
        ("cpu", 0.05, None, True), ("cpu", 0.06, None, False), ("cpu", None, None, False), ("mps", 0.0, None, True),
        ("cuda", 0.9, 2**30, True), ("cuda", 0.0, 5 * 2**28 + 1, False), ("cuda", 0.0, None, False),
    ],
)  # fmt: skip
def test_times_count_if_other_programs_left_the_hardware_alone(device, cpu_share, device_bytes, exclusive):
    assert records.is_exclusive(device, cpu_share, device_bytes) is exclusive
