"""Tables and claims: every row can be run, claims name rows that exist, and records find their cells."""

import math

import pytest

from papers import CLAIMS, TABLES, planned_runs
from papers.measures import MEASURES
from papers.priorities import PRIORITIES
from papers.table import SCALES, gather
from papers.tuned import CHOSEN_AT_CPU
from papers.tuning import name_at_rate
from report.figures import FIGURES
from run import records
from run.accounting import dense_equal_active, dense_equal_total
from support.files import ROOT

TABLE = TABLES["C"]


def record(row="shakespeare_moe4", seed=1337, scale="cpu", device="a CPU", dirty=False, exclusive=True, nats=1.5):
    """A record with the fields that `gather` and `values` read."""
    config = TABLE.row(row).config_at(scale, seed)
    return {
        "run_id": config.run_id,
        "config": config.to_dict(),
        "machine": {
            "device": device, "device_type": "cpu", "cores": 1, "threads": 1, "torch": "2.13.0", "dtype": "float32",
            "compile": False,
        },
        "git": {"commit": "0" * 40, "dirty": dirty},
        "dataset": {"name": "shakespeare_char", "sha256": "a", "canonical": True},
        "exclusive": exclusive,
        "clean": {"best": {"nats": nats}},
        "paper": {"best_val": nats},
        "leaky": False,
        "seconds": {"train": 100.0},
        "inference": {"samples": 10, "tokens_per_second": 50.0, "exclusive": exclusive},
    }  # fmt: skip


def captured(made):
    """The same record of a run whose updates were CUDA graphs."""
    return made | {"machine": made["machine"] | {"capture": True}}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_valid_and_distinct_experiment(name, scale):
    rows = TABLES[name].rows_at(scale)
    assert len({row.config_at(scale).hash() for row in rows}) == len(rows)
    assert len({row.name for row in rows}) == len(rows) and len({row.label for row in rows}) == len(rows)
    for row in rows:
        assert not row.baseline or row.baseline in [other.name for other in rows]
        assert set(row.published) <= set(MEASURES)
        assert row.config_at(scale, seed=7).seed == 7
    assert all(measure in MEASURES for view in TABLES[name].views for measure in view.measures)
    assert set(TABLES[name].figure_names) <= set(FIGURES)


def test_one_config_has_one_row_name_in_all_tables():
    """Otherwise two tables would keep two records of one run."""
    names = {}
    for table in TABLES.values():
        for scale in SCALES:
            for row in table.rows_at(scale):
                names.setdefault((scale, row.config_at(scale).hash()), set()).add(row.name)
    assert all(len(found) == 1 for found in names.values())


def test_claims_name_existing_rows_and_measures():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.holds[0] < claim.holds[1]
        assert set(claim.measures) <= set(MEASURES)
        for scale in claim.scales:
            names = [row.name for row in TABLES[claim.table].rows_at(scale)]
            for row, against in claim.pairs:
                assert row in names and (against in names or (claim.effect == "value" and not against)), claim.id


@pytest.mark.parametrize("scale", SCALES)
def test_dense_twins_have_equal_flops_or_parameters(scale):
    notes, equal = TABLES["D"], TABLES["equal"]
    for text in {row.name.partition("_notes_")[0] for row in notes.rows_at(scale)}:
        moe = notes.row(f"{text}_notes_moe8").config_at(scale)
        assert notes.row(f"{text}_notes_dense").config_at(scale).mlp_hidden == dense_equal_active(moe)
        assert notes.row(f"{text}_notes_dense_total").config_at(scale).mlp_hidden == dense_equal_total(moe)
    moe = equal.row("shakespeare_moe4").config_at(scale)
    assert equal.row("shakespeare_dense_wide").config_at(scale).mlp_hidden == dense_equal_total(moe)
    assert dense_equal_active(moe) - 4 * moe.n_embd == 2  # the router's share, of which the table's text speaks


@pytest.mark.parametrize("scale", SCALES)
def test_quarter_experts_cost_what_whole_ones_do(scale):
    """At equal width of all experts and of those that a character uses, only the router's share differs."""
    table = TABLES["literature"]
    whole = table.row("shakespeare_moe4").config_at(scale)
    for name in ("shakespeare_moe16_top4", "shakespeare_moe16_sigma"):
        fine = table.row(name).config_at(scale)
        assert fine.expert_hidden == whole.n_embd and fine.expert_top_k * fine.expert_hidden == 4 * whole.n_embd
        assert fine.n_expert * fine.expert_hidden == whole.n_expert * 4 * whole.n_embd
        assert (fine.learning_rate, fine.max_iters) == (whole.learning_rate, whole.max_iters)


def test_a_row_gives_the_arguments_and_the_name_of_a_run():
    row = TABLES["equal"].row("shakespeare_dense_long")
    assert row.cell("cpu", 7) == "shakespeare_dense_long-cpu-s7" and row.cell("paper", 7) == "shakespeare_dense_long-s7"
    assert row.arguments("cpu", 7) == [
        "config/shakespeare_dense.py", "config/cpu.py", "--max_iters=2600", "--title=dense, 1.3 times the steps",
        "--seed=7",
    ]  # fmt: skip
    assert row.config_at("cpu").max_iters == 2600 and row.config_at("paper").max_iters == 6500


def test_records_find_their_row_by_config_hash_and_not_by_title():
    renamed = record("shakespeare_moe4_frozen", seed=2)
    renamed["title"] = renamed["config"]["title"] = "something else"
    other_scale = record(scale="paper")
    (found,) = gather(TABLE, [renamed, other_scale, record(seed=3), record(seed=1)], "cpu")
    seeds = {name: [r["config"]["seed"] for r in records] for name, records in found.cells.items()}
    assert seeds == {"shakespeare_moe4": [1, 3], "shakespeare_moe4_frozen": [2], "shakespeare_moe4_random": []}


def test_machines_are_never_mixed_and_the_one_with_most_runs_comes_first():
    found = gather(TABLE, [record(device="a GPU"), record(seed=1), record(seed=2)], "cpu")
    assert [comparison.machine.split(",")[0] for comparison in found] == ["a CPU", "a GPU"]
    assert [len(comparison.cells["shakespeare_moe4"]) for comparison in found] == [2, 1]


def test_runs_of_uncommitted_code_are_listed_and_not_averaged():
    (found,) = gather(TABLE, [record(seed=1), record(seed=2, dirty=True), record(seed=3, dirty=None)], "cpu")
    assert len(found.cells["shakespeare_moe4"]) == 1
    assert [(r["config"]["seed"], why) for r, why in found.apart["shakespeare_moe4"]] == [
        (2, "the code had uncommitted changes"), (3, "the code had uncommitted changes"),
    ]  # fmt: skip


def test_runs_that_are_not_straight_are_listed_and_not_averaged():
    changed = {"max_iters": [10, 20], "machine": ["a CPU", "a GPU"]}
    extended = record(seed=2) | {"straight": False, "stretches": [{"step": 10, "changed": changed}]}
    (found,) = gather(TABLE, [record(seed=1), extended, record(seed=3) | {"straight": True}], "cpu")
    assert [r["config"]["seed"] for r in found.cells["shakespeare_moe4"]] == [1, 3]
    ((_, why),) = found.apart["shakespeare_moe4"]
    assert why == (
        "not a straight run of its config (max_iters was 10 up to step 10, then 20; machine was a CPU up to step 10, "
        "then a GPU)"
    )


def test_runs_on_another_text_of_the_same_name_are_not_averaged():
    def on(sha256, canonical, **changes):
        return record(**changes) | {"dataset": {"name": "shakespeare_char", "sha256": sha256, "canonical": canonical}}

    (found,) = gather(TABLE, [on("b", False, seed=1), on("a", True, seed=2), on("a", True, seed=3)], "cpu")
    assert [r["config"]["seed"] for r in found.cells["shakespeare_moe4"]] == [2, 3]
    assert [why for _, why in found.apart["shakespeare_moe4"]] == ["another text (shakespeare_char)"]
    (found,) = gather(TABLE, [on("b", False, seed=1), on("a", True, seed=2)], "cpu")
    assert [r["config"]["seed"] for r in found.cells["shakespeare_moe4"]] == [2]  # in doubt, the published one


def test_without_records_there_is_one_empty_comparison():
    (found,) = gather(TABLE, [], "cpu")
    assert found.machine == "" and not any(found.cells.values())


def test_times_count_only_from_exclusive_runs_and_losses_from_all():
    (found,) = gather(TABLE, [record(seed=1), record(seed=2, exclusive=False, nats=1.7)], "cpu")
    assert found.values("shakespeare_moe4", "clean") == {1: 1.5, 2: 1.7}
    assert found.values("shakespeare_moe4", "train_seconds") == {1: 100.0}
    assert found.values("shakespeare_moe4", "inference_speed") == {1: 50.0}
    del found.cells["shakespeare_moe4"][0]["inference"]["exclusive"]  # a record that does not say
    assert found.values("shakespeare_moe4", "inference_speed") == {}


def test_times_of_captured_runs_do_not_mix_with_others():
    """A CUDA graph changes times and not losses."""
    found = [record(seed=1), captured(record(seed=2)), record("shakespeare_moe4_frozen", seed=1)]
    (found,) = gather(TABLE, found, "cpu")
    assert found.values("shakespeare_moe4", "clean") == {1: 1.5, 2: 1.5}
    assert found.values("shakespeare_moe4", "train_seconds") == {2: 100.0}
    assert found.values("shakespeare_moe4_frozen", "train_seconds") == {}


def test_repetition_compares_models_on_four_prefixes_of_one_text():
    table, sizes = TABLES["repetition"], {"cpu": [30_000, 100_000, 300_000, 0], "paper": [5e5, 1e6, 2.5e6, 0]}
    for scale, text, models in (("cpu", "shakespeare_char", 4), ("paper", "text8_head", 2)):
        rows = table.rows_at(scale)
        configs = {row.name: row.config_at(scale) for row in rows}
        assert [row.baseline for row in rows[:models]] == ["", *[rows[0].name] * (models - 1)]
        for row in rows:
            ours, dense = configs[row.name], configs[row.baseline or row.name]
            assert {ours.dataset, dense.dataset} == {text} and (dense.n_expert, dense.mlp_hidden) == (0, 0)
            assert len({(c.train_characters, c.max_iters, c.batch_size) for c in (ours, dense)}) == 1
        for first in range(models):  # dense, 4 experts, hash routing, wide dense
            of_model = [configs[row.name] for row in rows[first::models]]
            assert [config.train_characters for config in of_model] == sizes[scale]
            assert len({(c.n_expert, c.router, c.mlp_hidden, c.learning_rate) for c in of_model}) == 1


def test_the_rates_of_tables_without_a_choice_are_those_that_the_committed_records_choose():
    found = [record for _, record in records.read_all(ROOT / "results")[0]]
    choices = {
        name: of for table in ("tuned", "paths") for name, of in gather(TABLES[table], found, "cpu")[0].choices.items()
    }
    for name, multiple in CHOSEN_AT_CPU.items():
        assert choices[name].name == name_at_rate(name, multiple)


def test_heads_are_read_as_shakespeare_is_and_not_100_times():
    for table, name in (
        ("A_summary", "text8_head_moe4"),
        ("A_summary", "enwik8_head_dense"),
        ("repetition", "text8_head_dense"),
    ):
        config = TABLES[table].row(name).config_at("paper")
        assert (config.max_iters, config.batch_size, config.learning_rate) == (5000, 64, 1e-3)


def test_published_numbers_give_the_effects_that_the_claims_quote():
    rows = {row.name: row.published for row in TABLES["B"].rows if row.published}
    base = rows.pop("shakespeare_dense")
    assert all(abs(row["paper"] / base["paper"] - 1) < 0.002 for row in rows.values())  # B1
    assert rows["shakespeare_top2"]["paper"] < base["paper"]  # B2
    assert all(1.16 < row["final_train"] / base["final_train"] < 1.18 for row in rows.values())  # B3
    assert all(1.5 < row["train_seconds"] / base["train_seconds"] < 1.62 for row in rows.values())  # B4
    assert all(0.44 < row["inference_speed"] / base["inference_speed"] < 0.57 for row in rows.values())  # B5
    published = {row.name: row.published for row in TABLES["A"].rows}
    gap = published["shakespeare_moe4"]["paper"] - published["shakespeare_dense"]["paper"]
    assert math.isclose(gap, 0.07)
    claims = {claim.id: claim for claim in CLAIMS}
    assert math.isclose(claims["A4"].expected, gap) and claims["A4"].holds == pytest.approx((gap / 2, 1.5 * gap))
    assert math.isclose(claims["B2"].expected, rows["shakespeare_top2"]["paper"] / base["paper"])
    soft = rows["shakespeare_soft4"]["paper"]
    assert math.isclose(claims["B6"].expected, rows["shakespeare_top2"]["paper"] - soft)


def test_thresholds_of_papers_that_count_other_tokens_are_read_in_two_ways():
    assert {claim.id for claim in CLAIMS if claim.other_reading} == {"C1", "D2", "D9"}


def test_a_text_with_a_test_split_is_decided_on_it():
    tested = ("A_enwik8", "A_text8", "A_summary", "D")
    assert all((c.measures[0] == "test") == (c.table in tested or c.id == "E11") for c in CLAIMS)


def test_claims_noticed_in_their_own_records_or_at_a_chosen_rate_need_fresh_seeds():
    assert {claim.id: claim.fresh_from for claim in CLAIMS if claim.fresh_from} == dict.fromkeys(
        ("E7", "E8", "E9", "E35", "E37", "E40", "E41", "E42", "E43"), 1340
    )


def test_the_command_of_a_claim_runs_five_fresh_seeds():
    claims = {claim.id: claim for claim in CLAIMS}
    assert TABLES["router"].command("cpu", claims["E7"].seeds).endswith("--seeds=8")
    assert TABLES["C"].command("cpu", claims["C1"].seeds).endswith("--seeds=5")


def test_rows_that_ran_on_another_machine_are_known():
    found = gather(TABLE, [record(device="a GPU"), record("shakespeare_moe4_frozen", seed=1)], "cpu")
    assert {comparison.machine.split(",")[0]: comparison.elsewhere for comparison in found} == {
        "a CPU": {"shakespeare_moe4"}, "a GPU": {"shakespeare_moe4_frozen"},
    }  # fmt: skip


def test_scales_have_different_hashes():
    assert TABLE.rows[0].config_at("cpu").hash() != TABLE.rows[0].config_at("paper").hash()


def test_the_plan_names_rows_of_tables_at_paper_size_and_no_run_twice():
    names = {row.name for table in TABLES.values() for row in table.experiments_at("paper")}
    asked = [(name, seed) for entry in PRIORITIES for seed in entry.seeds for name in entry.rows]
    assert {name for name, _ in asked} <= names and len(set(asked)) == len(asked)
    assert all(entry.decides and entry.decides[0] != " " and "\n" not in entry.decides for entry in PRIORITIES)


def test_the_plan_begins_with_five_pairs_of_four_experts_and_dense_and_then_of_a_table_on_fresh_seeds():
    """On a machine of another kind than that of the committed dense runs, these too are made."""
    asked = [(name, seed) for entry in PRIORITIES for seed in entry.seeds for name in entry.rows]
    assert {*asked[:10]} == {(f"shakespeare_{name}", seed) for name in ("dense", "moe4") for seed in range(1337, 1342)}
    fresh = {("shakespeare_hash4", seed) for seed in range(1340, 1345)}
    assert {*asked[10:18]} == fresh | {("shakespeare_moe4", seed) for seed in range(1342, 1345)}


def test_runs_of_the_plan_are_those_of_the_tables_and_land_in_their_folders(tmp_path):
    setup = planned_runs.Setup(tmp_path / "out", tmp_path / "results", [], {}, record()["machine"])
    runs = planned_runs.by_priority(TABLES, PRIORITIES, "paper", setup)
    homes = {run.config.run_id.split("-")[0]: run.home.name for run in [*runs][:15]}
    assert sorted(homes.values()) == ["A", "B", "router"]
    of_tables = planned_runs.plan(TABLES, ["all"], "paper", 8, setup, planned_runs.read_results(setup.results))
    places = {run.key: (run.home, run.name, run.arguments) for run in of_tables}
    assert all(places[run.key] == (run.home, run.name, run.arguments) for run in runs)


def test_a_protocol_is_accepted_by_three_distances_from_the_baseline_of_b():
    base = TABLES["B"].row("shakespeare_dense").published
    assert (base["final_val"], base["final_train"]) == (1.474, 1.387)

    def distance(val=1.474, train=1.387, best=None, eval_train=1.3):
        paper = {"final_val": val, "best_val": val if best is None else best, "final_train": eval_train}
        found = {"paper": paper, "train_mode": {"loss": train, "objective": train}}
        return [MEASURES[name].read(found) for name in ("from_b", "from_b_in_eval_mode")]

    assert distance() == pytest.approx([0, 4.35])
    assert distance(val=1.479)[0] == pytest.approx(0.5) and distance(val=1.463)[0] > 1
    assert distance(train=1.377)[0] == pytest.approx(0.5) and distance(train=1.408)[0] > 1
    assert distance(best=1.4738)[0] == pytest.approx(0.4) and distance(best=1.473)[0] > 1
    assert MEASURES["from_b"].read({"paper": {"final_val": 1.0, "best_val": 1.0}, "train_mode": None}) is None
    claims = [claim for claim in CLAIMS if claim.table == "B_readings"]
    assert [claim.pairs for claim in claims] == [((row.name, ""),) for row in TABLES["B_readings"].rows]
    assert {claim.holds for claim in claims} == {(-math.inf, 1.0)}


def test_four_times_the_balancing_loss_is_counted_into_the_training_loss():
    read = MEASURES["train_mode_with_aux4"].read
    assert read({"train_mode": {"loss": 1.4, "objective": 1.46}}) == pytest.approx(1.64)
    assert read({"train_mode": None}) is None


def test_capacity_over_the_batch_stands_beside_capacity_in_each_sequence():
    rows = {row.name: row for row in TABLES["B"].rows}
    for name in ("shakespeare_top2_cap05", "shakespeare_top2_cap10"):
        of_sequence, of_batch = (rows[f"{name}{end}"].config_at("paper") for end in ("", "_batch"))
        assert (of_sequence.capacity_group, of_batch.capacity_group) == ("sequence", "batch")
        assert of_sequence.capacity_factor == of_batch.capacity_factor and "batch" in rows[f"{name}_batch"].label
