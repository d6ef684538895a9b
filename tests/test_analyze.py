"""analyze.py and analyses.py: a whole analysis of every kind of run, right where the answer is known; of every mistake
one message."""

import json
import shutil

import numpy as np
import pytest
from analysed import analysed as analysed_by_hand
from conftest import english, prepare_text, train_tiny

import analyze
from analysis import analyses, information
from data.common import DataError
from run import records
from run.checkpoint import CheckpointError
from support.options import ConfigError

EXPERTS = dict(n_expert=4, expert_top_k=1)
FAST = ("--gradient_batches=2", "--sample_characters=40", "--pass_characters=640")


def analysed(words, folder, *options, **changes):
    """The analysis of a tiny run that is made here."""
    assert train_tiny(words, folder, **changes) == 0
    assert analyze.main([str(folder), *FAST, *options]) == 0
    return analyses.read(folder / "analysis.json")


@pytest.fixture(scope="module")
def learned(words, tmp_path_factory):
    """(folder, analysis) of a learned router with snapshots. To be read only."""
    folder = tmp_path_factory.mktemp("learned") / "run-s1337"
    return folder, analysed(words, folder, save_every=5, **EXPERTS)


# ---------------------------------------------------------------------------------------------------------------------
# What is known


def test_the_loss_is_that_of_the_run(learned):
    folder, analysis = learned
    record = records.read(folder / "summary.json")
    assert analysis["nats"] == pytest.approx(record["clean"]["final"]["nats"], abs=1e-5)
    assert analysis["text"] == {"characters": record["dataset"]["splits"]["val"] - 1, "whole": True}
    of_classes = analysis["by_class"].values()
    assert sum(of["characters"] for of in of_classes) == analysis["text"]["characters"]
    total = sum(of["characters"] * of["nats"] for of in of_classes)
    assert total / analysis["text"]["characters"] == pytest.approx(analysis["nats"], abs=1e-4)


def test_the_load_is_that_of_the_record(learned):
    folder, analysis = learned
    for layer, routing in zip(analysis["layers"], records.read(folder / "summary.json")["routing"], strict=True):
        assert layer["load"]["load"] == pytest.approx(routing["load"], abs=1e-5)
        assert layer["load"]["effective"] == pytest.approx(information.effective_number(routing["load"]), abs=1e-4)
        counts = np.array(layer["counts"])
        assert counts.sum(axis=0) / counts.sum() == pytest.approx(routing["load"], abs=1e-5)
        per_batch = layer["tokens_per_batch"]
        assert sum(per_batch["mean"]) == pytest.approx(per_batch["characters"], abs=1e-3)


def test_stability_is_followed_from_the_first_weights_to_those_at_hand(learned):
    stability = learned[1]["stability"]
    assert stability["steps"] == [0, 5, 10, 15, 20]
    for layer in stability["layers"]:
        assert layer["agreement"][-1] == 1 and layer["agreement"][0] < 1
        assert layer["churn"][0] is None
        assert all(0 <= churn <= 1 / 5 for churn in layer["churn"][1:])


def test_evolution_and_load_of_the_last_evaluation_agree(learned):
    _, analysis = learned
    assert analysis["evolution"]["steps"] == [0, 10, 20]
    for shares, layer in zip(analysis["evolution"]["loads"][-1], analysis["layers"], strict=True):
        assert shares == pytest.approx(layer["load"]["load"], abs=1e-5)


def test_the_text_that_is_written_has_an_expert_for_each_character(learned):
    sample = learned[1]["sample"]
    assert len(sample["text"]) == 41 and [len(experts) for experts in sample["experts"]] == [41, 41]
    assert {expert for experts in sample["experts"] for expert in experts} <= {0, 1, 2, 3}


def test_a_table_of_characters_is_known_for_what_it_is(words, tmp_path):
    analysis = analysed(words, tmp_path / "hash", router="hash", aux_loss="none", **EXPERTS)
    for layer in analysis["layers"]:
        assert layer["entropy_given_character"] == 0
        assert layer["about"]["character"]["share"] == pytest.approx(1)
        assert all(found["nats"] == pytest.approx(0, abs=1e-9) for found in layer["about_given_character"].values())
    assert analysis["ablation"]["tabulated_all"]["nats"] == 0
    assert analysis["router_gradients"] == [None, None]
    assert analyses.about("character")(analysis) == pytest.approx(1, abs=0.05)  # less what chance gives
    assert analyses.unexplained(analysis) == 0


def test_a_router_of_the_two_last_characters_is_known_for_what_it_is(words, tmp_path):
    analysis = analysed(words, tmp_path / "ngram", router="ngram_hash", router_ngram=2, aux_loss="none", **EXPERTS)
    for layer in analysis["layers"]:
        left = layer["entropy_given_character"]
        assert 0 < left < layer["entropy"]
        assert layer["about_given_character"]["previous character"]["nats"] == pytest.approx(left, abs=1e-4)


def test_everything_to_one_expert_is_a_collapse(words, tmp_path, capsys):
    analysis = analysed(words, tmp_path / "one", n_expert=2, expert_top_k=1)
    even, one = [0.5, 0.5], [1.0, 0.0]
    loads = [[one, one], [even, one], [[0.99, 0.01], even], [one, one]]  # before the first update nobody collapsed
    evolution = {"steps": [0, 10, 20, 30], "loads": loads}
    config = analyze.records.config_in(analysis["config"], "config")[0]
    assert analyze.collapses(evolution, config) == [
        {"block": 0, "step": 20, "until": None},
        {"block": 1, "step": 10, "until": 20},
        {"block": 1, "step": 30, "until": None},
    ]
    assert analyze.collapses(None, config) == []


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of run


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_expert=1),
        dict(n_expert=4, expert_top_k=0, aux_loss="none"),
        dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", capacity_factor=0.5),
        dict(n_expert=4, expert_top_k=2, expert_kind="linear_sum", gate="sigmoid"),
        dict(n_expert=4, router="frozen", aux_loss="none"),
        dict(n_expert=4, router="random", router_level="segment", segment_size=4, aux_loss="none"),
        dict(n_expert=4, router="two_level", n_expert_group=2, expert_top_k=2),
        dict(n_expert=4, expert_top_k=4, router_top_p=0.5),
        dict(n_expert=4, moe_every=2, n_shared_expert=1),
        dict(n_expert=4, share_experts=True, router_bias_rate=1e-3, aux_loss="none"),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_of_layer_is_analysed(words, tmp_path, changes, capsys):
    analysis = analysed(words, tmp_path / "run", **changes)
    assert len(analysis["layers"]) == (1 if "moe_every" in changes else 2)
    said = capsys.readouterr().out
    assert "No snapshots: train with --save_every=100" in said and " nan" not in said
    if changes["n_expert"] == 1:
        assert analysis["ablation"]["shuffled_all"] is None and analyses.about("character")(analysis) is None


@pytest.mark.parametrize(
    "changes",
    [dict(router="expert_choice", capacity_factor=1.0, aux_loss="none"), dict(router_level="sequence")],
    ids=["choice", "sequence"],
)
def test_routing_that_leaks_is_analysed_with_a_dagger_and_writes_nothing(words, tmp_path, changes, capsys):
    analysis = analysed(words, tmp_path / "run", **EXPERTS, **changes)
    assert analysis["leaky"] and analysis["sample"] is None
    assert "† the routing sees later characters" in capsys.readouterr().out


def test_a_dense_model_says_what_can_be_analysed(words, tmp_path, capsys):
    analysis = analysed(words, tmp_path / "run", save_every=10)
    assert "A dense model: it has no router and no experts. Measured:" in capsys.readouterr().out
    assert (analysis["layers"], analysis["ablation"], analysis["stability"], analysis["sample"]) == (
        [],
        None,
        None,
        None,
    )
    assert [block["kind"] for block in analysis["conflicts"]] == ["dense", "dense"]
    assert analyses.token_cosine(analysis) is not None and analyses.utilisation(analysis) is None


def test_bytes_have_experts_too(byte_words, tmp_path):
    sample = analysed(byte_words, tmp_path / "run", **EXPERTS)["sample"]
    assert [len(experts) for experts in sample["experts"]] == [len(sample["text"])] * 2


def test_parts_can_be_left_out(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert analyze.main([str(folder), "--ablation=False", "--gradient_batches=0", "--sample_characters=0"]) == 0
    analysis = analyses.read(folder / "analysis.json")
    assert (analysis["ablation"], analysis["sample"], analysis["conflicts"]) == (None, None, [])


def test_the_best_weights_can_be_analysed_and_a_part_of_the_text(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert analyze.main([str(folder), *FAST, "--checkpoint=best", "--characters=300", "--ablation=False"]) == 0
    analysis = analyses.read(folder / "analysis.json")
    assert analysis["weights"]["checkpoint"] == "best.pt" and analysis["text"] == {"characters": 256, "whole": False}


def test_the_same_weights_give_the_same_analysis(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert analyze.main([str(folder), *FAST]) == 0
    again = analyses.read(folder / "analysis.json")
    assert {**again, "seconds": 0} == {**learned[1], "seconds": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_no_folder_is_one_message():
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


def test_a_data_set_that_is_gone_is_named(learned, tmp_path):
    data = prepare_text(tmp_path / "data", english(4500, seed=1))
    assert train_tiny(data, tmp_path / "run", **EXPERTS) == 0
    shutil.rmtree(data)
    with pytest.raises(DataError, match="there is no such folder"):
        analyze.main([str(tmp_path / "run")])


def test_snapshots_of_another_experiment_are_refused(learned, words, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert train_tiny(words, tmp_path / "other", save_every=10, n_expert=2) == 0
    shutil.copy(tmp_path / "other" / "snapshots" / "step-000010.pt", folder / "snapshots" / "step-000010.pt")
    with pytest.raises(CheckpointError, match="step-000010.pt is of another experiment than ckpt.pt"):
        analyze.main([str(folder), *FAST])


def test_one_bad_folder_does_not_cost_the_others(learned, tmp_path, capsys):
    folder = shutil.copytree(learned[0], tmp_path / "run-s1337")
    (folder / "analysis.json").unlink()
    assert analyze.main([str(tmp_path / "nowhere"), str(folder), *FAST, f"--results={tmp_path / 'results'}"]) == 1
    assert "left out: " in capsys.readouterr().err
    kept = tmp_path / "results" / "analysis" / "run-s1337.json"
    assert kept.read_bytes() == (folder / "analysis.json").read_bytes()


def test_metrics_that_are_gone_or_torn_cost_the_evolution_alone(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"kind": "eval", "st')
    config = analyze.records.config_in(learned[1]["config"], "config")[0]
    assert analyze.evolution_of(folder, config)["steps"] == [0, 10, 20]
    metrics.unlink()
    assert analyze.evolution_of(folder, config) is None


# ---------------------------------------------------------------------------------------------------------------------
# analyses.py: what is read back


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
        (["format"], "charmoe record 2", "it is a record of train.py"),
        (["format"], "charmoe analysis 9", "newer code made it"),
        (["run_id"], "0000000000-s1337", "run_id is"),
        (["layers", 0, "block"], 1, r"layers are of blocks"),
        (["layers", 0, "entropy"], float("nan"), "entropy is nan"),
        (["layers", 0, "counts", 0, 0], 10**6, "add up to"),
        (["layers", 0, "about", "character"], {}, "missing field"),
        (["router_gradients"], [], "router_gradients is of 0 layers"),
        (["stability", "steps"], [0], "its lengths differ"),
        (["layers", 0, "load"], {}, "cannot be read of it"),
        (["layers", 0, "frozen", "about"], {}, "character above frozen cannot be read of it"),
        (["ablation"], {"removed": [None, None]}, "shuffled_all cannot be read of it"),
        (["config", "n_expert"], 10**9, "n_expert"),
    ],
)
def test_what_contradicts_itself_is_refused(learned, path, value, why):
    assert analyses.problems(learned[1]) == []
    assert any(why in problem for problem in analyses.problems(changed(learned[1], path, value)))


def test_a_folder_of_analyses(learned, tmp_path):
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


def test_what_was_asked_for_otherwise_is_left_out(learned, tmp_path):
    folder = tmp_path / "results" / "analysis"
    folder.mkdir(parents=True)
    for n_layer, asked in ((1, 640), (2, 640), (3, 32_000)):
        one = analysed_by_hand(n_layer=n_layer)
        (folder / f"r{n_layer}-s1.json").write_text(analyses.text_of(changed(one, ["asked", "pass_characters"], asked)))
    found, left_out = analyses.read_all(tmp_path / "results")
    assert [one["config"]["n_layer"] for one in found] == [1, 2]
    assert len(left_out) == 1 and "r3-s1.json: asked for with {" in left_out[0]


def test_numbers_are_kept_to_six_digits():
    assert analyses.rounded({"a": [1 / 3, 5, None, True]}) == {"a": [0.333333, 5, None, True]}
