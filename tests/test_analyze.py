"""analyze.py and analysis/: numbers are right where the answer is known, every kind of run can be analysed, and each
mistake gives one message."""

import json
import shutil

import numpy as np
import pytest
from analysed import analysed as analysed_by_hand
from conftest import english, prepare_text, tiny, train_tiny

import analyze
from analysis import analyses, information, parts
from data.common import DataError
from run import records
from run.checkpoint import CheckpointError
from support.options import ConfigError

EXPERTS = dict(n_expert=4, expert_top_k=1)
FAST = ("--gradient_batches=2", "--sample_characters=40", "--pass_characters=640")
QUICK = ("--ablation=False", "--gradient_batches=0", "--sample_characters=0", "--characters=300")  # no slow part


def analysed(words, folder, *options, **changes):
    """The analysis of a tiny run that is made here."""
    assert train_tiny(words, folder, **changes) == 0
    assert analyze.main([str(folder), *(options or FAST)]) == 0
    return analyses.read(folder / "analysis.json")


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take longer than a tiny analysis, and have tests of their own."""
    monkeypatch.setattr(analyze.figures_of_run, "of_run", lambda analysis: {})


@pytest.fixture(scope="module")
def learned(words, tmp_path_factory):
    """(folder, analysis) of a learned router with snapshots. To be read only."""
    folder = tmp_path_factory.mktemp("learned") / "run-s1337"
    return folder, analysed(words, folder, save_every=5, **EXPERTS)


# ---------------------------------------------------------------------------------------------------------------------
# Known answers


def test_loss_equals_the_record_of_the_run(learned):
    folder, analysis = learned
    record = records.read(folder / "summary.json")
    assert analysis["nats"] == pytest.approx(record["clean"]["final"]["nats"], abs=1e-5)
    assert analysis["text"] == {"characters": record["dataset"]["splits"]["val"] - 1, "whole": True}
    of_classes = analysis["by_class"].values()
    assert sum(of["characters"] for of in of_classes) == analysis["text"]["characters"]
    total = sum(of["characters"] * of["nats"] for of in of_classes)
    assert total / analysis["text"]["characters"] == pytest.approx(analysis["nats"], abs=1e-4)


def test_load_equals_the_record_of_the_run(learned):
    folder, analysis = learned
    for layer, routing in zip(analysis["layers"], records.read(folder / "summary.json")["routing"], strict=True):
        assert layer["load"]["load"] == pytest.approx(routing["load"], abs=1e-5)
        assert layer["load"]["effective"] == pytest.approx(information.effective_number(routing["load"]), abs=1e-4)
        counts = np.array(layer["counts"])
        assert counts.sum(axis=0) / counts.sum() == pytest.approx(routing["load"], abs=1e-5)
        per_batch = layer["tokens_per_batch"]
        assert sum(per_batch["mean"]) == pytest.approx(per_batch["characters"], abs=1e-3)


def test_paths_agree_with_the_layers(learned):
    _, analysis = learned
    paths, layers = analysis["paths"], analysis["layers"]
    assert max(layer["entropy"] for layer in layers) <= paths["entropy"] <= sum(layer["entropy"] for layer in layers)
    assert [pair["blocks"] for pair in paths["between_layers"]] == [[0, 1]] and 4 <= paths["used"] <= 4**2
    assert set(paths["frozen"]) == set(analyses.OF_PATHS)
    assert all(control["draws"] == parts.DRAWS and control["sd"] > 0 for control in paths["frozen"].values())


def test_stability_goes_from_the_first_snapshot_to_the_analysed_weights(learned):
    stability = learned[1]["stability"]
    assert stability["steps"] == [0, 5, 10, 15, 20]
    for layer in stability["layers"]:
        assert layer["agreement"][-1] == 1 and layer["agreement"][0] < 1
        assert layer["churn"][0] is None
        assert all(0 <= churn <= 1 / 5 for churn in layer["churn"][1:])


def test_an_analysis_says_whether_its_run_is_straight_as_the_record_does(learned):
    folder, analysis = learned
    assert analysis["straight"] is True is records.read(folder / "summary.json")["straight"]
    assert not records.is_straight({**analysis, "straight": False})


def test_load_history_ends_with_the_analysed_load(learned):
    _, analysis = learned
    assert analysis["evolution"]["steps"] == [0, 10, 20]
    for shares, layer in zip(analysis["evolution"]["loads"][-1], analysis["layers"], strict=True):
        assert shares == pytest.approx(layer["load"]["load"], abs=1e-5)


def test_the_sample_has_an_expert_for_each_character(learned):
    sample = learned[1]["sample"]
    assert len(sample["text"]) == 41 and [len(experts) for experts in sample["experts"]] == [41, 41]
    assert {expert for experts in sample["experts"] for expert in experts} <= {0, 1, 2, 3}


def test_a_hash_router_is_fully_explained_by_the_character(words, tmp_path, without_figures):
    analysis = analysed(words, tmp_path / "hash", router="hash", aux_loss="none", **EXPERTS)
    for layer in analysis["layers"]:
        assert layer["entropy_given_character"] == 0
        assert layer["about"]["character"]["share"] == pytest.approx(1)
        assert all(found["nats"] == pytest.approx(0, abs=1e-9) for found in layer["about_given_character"].values())
    paths = analysis["paths"]
    assert paths["entropy_given_character"] == 0 < paths["frozen"]["given_character"]["mean"]
    assert paths["about_character"]["nats"] == pytest.approx(paths["entropy"])
    assert analysis["ablation"]["tabulated_all"]["nats"] == 0
    assert analysis["router_gradients"] == [None, None]
    assert analyses.about("character")(analysis) == pytest.approx(1, abs=0.05)  # less what chance gives
    assert analyses.unexplained(analysis) == 0


def test_a_bigram_hash_router_is_fully_explained_by_two_characters(words, tmp_path, without_figures):
    analysis = analysed(
        words, tmp_path / "ngram", *QUICK[:3], router="ngram_hash", router_ngram=2, aux_loss="none", **EXPERTS
    )
    for layer in analysis["layers"]:
        left = layer["entropy_given_character"]
        assert 0 < left < layer["entropy"]
        assert layer["about_given_character"]["previous character"]["nats"] == pytest.approx(left, abs=1e-4)


def test_all_tokens_to_one_expert_is_a_collapse():
    even, one = [0.5, 0.5], [1.0, 0.0]
    loads = [[one, one], [even, one], [[0.99, 0.01], even], [one, one]]  # before the first update nobody collapsed
    evolution = {"steps": [0, 10, 20, 30], "loads": loads}
    config = tiny(n_expert=2, expert_top_k=1)
    assert parts.find_collapses(evolution, config) == [
        {"block": 0, "step": 20, "until": None},
        {"block": 1, "step": 10, "until": 20},
        {"block": 1, "step": 30, "until": None},
    ]
    assert parts.find_collapses(None, config) == []


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of run


def check_layers(words, folder, changes):
    analysis = analysed(words, folder, *FAST, "--characters=1000", **changes)
    assert len(analysis["layers"]) == (1 if "moe_every" in changes else 2)
    return analysis


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", capacity_factor=0.5),
        dict(n_expert=4, router="random", router_level="segment", segment_size=4, aux_loss="none"),
        dict(n_expert=4, expert_top_k=4, router_top_p=0.5, moe_every=2, n_shared_expert=1),
        dict(n_expert=4, share_experts=True, router_bias_rate=1e-3, aux_loss="none"),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_of_layer_is_analysed(words, tmp_path, changes, capsys, without_figures):
    check_layers(words, tmp_path / "run", changes)
    said = capsys.readouterr().out
    assert "No snapshots: train with --save_every=100" in said and " nan" not in said


@pytest.mark.soak
@pytest.mark.parametrize(
    "changes",
    [
        dict(n_expert=4, expert_top_k=0, aux_loss="none"),
        dict(n_expert=4, expert_top_k=2, expert_kind="linear_sum", gate="sigmoid"),
        dict(n_expert=4, router="frozen", aux_loss="none"),
        dict(n_expert=4, router="two_level", n_expert_group=2, expert_top_k=2),
        dict(n_expert=4, moe_every=2, n_shared_expert=1),
        dict(n_expert=4, expert_top_k=1, router_level="sequence"),
        dict(n_expert=4, expert_top_k=1, router="ngram_hash", router_ngram=3, aux_loss="none"),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_further_kinds_of_layer_are_analysed(words, tmp_path, changes, without_figures):
    check_layers(words, tmp_path / "run", changes)


def test_a_single_expert_has_no_cost_and_no_empty_sentence(words, tmp_path, capsys):
    analysis = analysed(words, tmp_path / "run", *FAST, "--characters=1000", n_expert=1)
    assert analysis["ablation"] is None and analyses.about("character")(analysis) is None
    said = capsys.readouterr().out
    assert "  block   load   effective" in said and "cost in nats" not in said and "topic" not in said


def test_non_causal_routing_is_marked_with_a_dagger_and_writes_no_text(words, tmp_path, capsys, without_figures):
    changes = dict(router="expert_choice", capacity_factor=1.0, aux_loss="none")
    analysis = analysed(words, tmp_path / "run", *FAST, "--characters=1000", **EXPERTS, **changes)
    assert analysis["leaky"] and analysis["sample"] is None
    assert "† the routing sees later characters" in capsys.readouterr().out


def test_a_dense_model_has_loss_by_class_and_gradients(words, tmp_path, capsys):
    analysis = analysed(words, tmp_path / "run", save_every=10)
    assert "A dense model: it has no router and no experts. Measured:" in capsys.readouterr().out
    none = [analysis[name] for name in ("layers", "paths", "ablation", "stability", "sample")]
    assert none == [[], None, None, None, None]
    assert [block["kind"] for block in analysis["conflicts"]] == ["dense", "dense"]
    assert analyses.token_cosine(analysis) is not None and analyses.utilisation(analysis) is None


def test_a_sample_of_bytes_has_an_expert_for_each_character(byte_words, tmp_path, without_figures):
    sample = analysed(byte_words, tmp_path / "run", *QUICK, "--sample_characters=40", **EXPERTS)["sample"]
    assert [len(experts) for experts in sample["experts"]] == [len(sample["text"])] * 2


def test_the_best_weights_can_be_analysed_on_part_of_the_text_without_the_slow_parts(
    learned, tmp_path, without_figures
):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert analyze.main([str(folder), *QUICK, "--checkpoint=best"]) == 0
    analysis = analyses.read(folder / "analysis.json")
    assert analysis["weights"]["checkpoint"] == "best.pt" and analysis["text"] == {"characters": 256, "whole": False}
    assert (analysis["ablation"], analysis["sample"], analysis["conflicts"]) == (None, None, [])


def test_the_same_weights_give_the_same_analysis(learned, tmp_path, without_figures):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert analyze.main([str(folder), *FAST]) == 0
    again = analyses.read(folder / "analysis.json")
    assert {**again, "seconds": 0} == {**learned[1], "seconds": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_missing_folder_argument_is_one_message():
    with pytest.raises(ConfigError, match="which run"):
        analyze.main([])


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_run_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name):
        analyze.main([str(tmp_path / name)])


def test_a_run_of_another_text_is_refused(tmp_path):
    data = prepare_text(tmp_path / "data", english(4500, seed=1))
    assert train_tiny(data, tmp_path / "run", **EXPERTS) == 0
    shutil.rmtree(tmp_path / "data")
    prepare_text(tmp_path / "data", english(4500, seed=2))
    with pytest.raises(CheckpointError, match="was trained on another text than"):
        analyze.main([str(tmp_path / "run")])
    assert not (tmp_path / "run" / "analysis.json").exists()


def test_a_deleted_data_set_is_named(learned, tmp_path):
    data = prepare_text(tmp_path / "data", english(4500, seed=1))
    assert train_tiny(data, tmp_path / "run", **EXPERTS) == 0
    shutil.rmtree(data)
    with pytest.raises(DataError, match="there is no such folder"):
        analyze.main([str(tmp_path / "run")])


def test_snapshots_of_another_experiment_are_refused(learned, words, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert train_tiny(words, tmp_path / "other", save_every=10, max_iters=10, n_expert=2) == 0
    shutil.copy(tmp_path / "other" / "snapshots" / "step-000010.pt", folder / "snapshots" / "step-000010.pt")
    with pytest.raises(CheckpointError, match="step-000010.pt belongs to another experiment than ckpt.pt"):
        analyze.main([str(folder), *QUICK])


def test_a_bad_folder_does_not_stop_the_others(learned, tmp_path, capsys, without_figures):
    folder = shutil.copytree(learned[0], tmp_path / "run-s1337")
    (folder / "analysis.json").unlink()
    assert analyze.main([str(tmp_path / "nowhere"), str(folder), *QUICK, f"--results={tmp_path / 'results'}"]) == 1
    assert "left out: " in capsys.readouterr().err
    kept = tmp_path / "results" / "analysis" / "run-s1337.json"
    assert kept.read_bytes() == (folder / "analysis.json").read_bytes()


def test_missing_or_torn_metrics_leave_out_the_load_history_only(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"kind": "eval", "st')
    config = records.config_in(learned[1]["config"], "config")[0]
    assert parts.read_load_history(folder, config)["steps"] == [0, 10, 20]
    metrics.unlink()
    assert parts.read_load_history(folder, config) is None


# ---------------------------------------------------------------------------------------------------------------------
# analyses.py: checking and reading


def changed(analysis, path, value):
    analysis = json.loads(json.dumps(analysis))
    *way, last = path
    inner = analysis
    for key in way:
        inner = inner[key]
    inner[last] = value
    return analysis


@pytest.mark.parametrize(
    "path, value, why",
    [
        (["format"], "charmoe record 2", "its format is 'charmoe record 2', expected 'charmoe analysis"),
        (["run_id"], "0000000000-s1337", "run_id is"),
        (["layers", 0, "block"], 1, "layers are of blocks"),
        (["layers", 0, "entropy"], float("nan"), "entropy is nan"),
        (["stability", "layers", 0, "churn"], {}, "expected a list"),
        (["config", "n_expert"], 10**9, "n_expert"),
    ],
)
def test_an_analysis_that_contradicts_its_config_or_the_schema_is_refused(learned, path, value, why):
    assert analyses.problems(learned[1]) == []
    assert any(why in problem for problem in analyses.problems(changed(learned[1], path, value)))


def test_reading_a_folder_leaves_out_bad_analyses_with_a_reason(learned, tmp_path):
    clean = changed(learned[1], ["git"], {"commit": "0" * 40, "dirty": False})
    folder = tmp_path / "results" / "analysis"
    folder.mkdir(parents=True)
    for name, analysis in {
        "run-s1337": clean,
        "again-s1337": clean,
        "run-s7": clean,
        "dirty-s1337": changed(clean, ["git", "dirty"], True),
        "best-s1337": changed(clean, ["weights", "checkpoint"], "best.pt"),
    }.items():
        (folder / f"{name}.json").write_text(analyses.text_of(analysis))
    (folder / "torn-s1.json").write_text("{")
    found, left_out = analyses.read_all(tmp_path / "results")
    assert len(found) == 1
    told = "\n".join(left_out)
    for why in (
        "run-s1337.json: of the same run as",
        "expected a name that ends in -s1337.json",
        "uncommitted",
        "torn",
    ):
        assert why in told
    assert len(left_out) == 5


def test_analyses_with_other_settings_than_most_are_left_out(learned, tmp_path):
    folder = tmp_path / "results" / "analysis"
    folder.mkdir(parents=True)
    # No batches leave the gradients out, and make no other number incomparable.
    for n_layer, asked, batches in ((1, 640, 8), (2, 640, 8), (3, 32_000, 8), (4, 640, 0), (5, 640, 0), (6, 640, 0)):
        one = analysed_by_hand(n_layer=n_layer)
        one["asked"] |= {"pass_characters": asked, "gradient_batches": batches}
        (folder / f"r{n_layer}-s1.json").write_text(analyses.text_of(one))
    found, left_out = analyses.read_all(tmp_path / "results")
    assert [one["config"]["n_layer"] for one in found] == [1, 2, 4, 5, 6]
    assert len(left_out) == 1 and "r3-s1.json: asked for with {" in left_out[0]


def test_numbers_are_kept_to_six_digits():
    assert analyses.rounded({"a": [1 / 3, 5, None, True]}) == {"a": [0.333333, 5, None, True]}
