"""Tables of results and of benches, as people read them and as CSV."""

import csv
import dataclasses
import io
import math

import pytest
from benches import GPU, bench
from test_papers import captured
from test_papers import record as skeleton

from papers import TABLES
from papers.table import View, gather
from report import cells, figures_of_speed, speed_cells
from report.blocks import Grid
from report.verdicts import problem_of

TABLE = TABLES["C"]
LOSS = View("Loss", ("clean",))


def record(row="shakespeare_moe4", seed=1, leaky=False, **changes):
    made = skeleton(row, seed, **changes)
    nats = made["clean"]["best"]["nats"]
    return made | {
        "leaky": leaky,
        "dataset": {"name": "a text", "sha256": "a", "canonical": True},
        "parameters": {"total": 1234567, "active": 1000},
        "clean": {"best": {"nats": nats, "bpc": nats / math.log(2)}},
        "paper": {"best_val": nats, "best_val_with_aux": nats + 0.04},
        "routing": [],
    }


def gathered(*found, table=TABLE, scale="cpu"):
    return gather(table, found, scale)[0]


def cells_by_row(comparison, view=LOSS):
    return {row[0]: row[1:] for row in cells.grid_of(comparison, view).rows}


def test_a_cell_is_mean_sample_sd_and_n():
    found = [record(seed=seed, nats=nats) for seed, nats in enumerate((1.5, 1.6, 1.8))]
    assert cells_by_row(gathered(*found))["learned"] == ["1.6333 ± 0.1528 (3)"]


def test_rows_that_were_not_run_are_named_once_with_the_command():
    comparison = gathered(record(nats=1.5), record("shakespeare_moe4_frozen", nats=1.6))
    assert cells_by_row(comparison) == {"learned": ["1.5000 (n = 1)"], "frozen": ["1.6000 (n = 1)"]}
    assert cells.notes_on_missing(comparison) == ["Not run: random. `python sweep.py C --scale=cpu --seeds=5`"]


def test_rows_that_another_machine_ran_are_not_called_missing():
    elsewhere = record("shakespeare_moe4_frozen")
    elsewhere["machine"] = elsewhere["machine"] | {"device": "Another CPU"}
    here = gathered(record(seed=1), record(seed=2), record("shakespeare_moe4_random"), elsewhere)
    assert list(cells_by_row(here)) == ["learned", "random"] and not cells.notes_on_missing(here)


def test_rows_and_columns_without_a_number_are_left_out():
    """A row that was run but not timed alone stays where it has another number."""
    comparison = gathered(record(seed=1), record("shakespeare_moe4_frozen", exclusive=False))
    assert list(cells_by_row(comparison, View("Time", ("train_seconds",)))) == ["learned"]
    grid = cells.grid_of(comparison, View("Cost", ("cross_fitted", "train_seconds", "total_parameters")))
    assert grid.columns == ["row", "training, s", "parameters"] and [row[0] for row in grid.rows] == [
        "learned",
        "frozen",
    ]
    assert cells.grid_of(comparison, View("Loss", ("cross_fitted",))).rows == []
    alone = gathered(record())  # a baseline is no ratio
    assert cells.grid_of(alone, View("Ratio", ("clean",), relative=True)).rows == []


def test_a_row_in_a_line_has_each_number_once_or_the_table_that_has_it():
    views = View("Loss", ("clean", "paper")), View("Both", ("paper", "train_seconds"))
    table = dataclasses.replace(TABLES["A"], views=views)
    comparison, row = gathered(paper_a(), table=table, scale="paper"), table.row("shakespeare_moe4")
    line = cells.line_of(comparison, row, {"train_seconds": "B", "clean": "B"})
    assert line == (
        "Only “4 experts, aux 0.01” was run here. **Loss:** best sampled validation, nats: 1.5000 (n = 1) (published "
        "1.53, ours − published -0.0300). Its other numbers stand in table B."
    )


def test_a_number_of_seeds_that_all_cells_share_is_told_once_in_markdown():
    grid = Grid("Loss", ["row", "a", "b"], [["x (3)", "1.5 ± 0.1 (3)", "7"], ["y", "1.6 ± 0.2 (3)", "–"]])
    text = cells.markdown(grid)
    assert text.startswith("**Loss** (n = 3)\n") and "| x (3) | 1.5 ± 0.1 | 7 |" in text
    other = cells.markdown(grid._replace(rows=[*grid.rows, ["z", "1.7 (n = 1)", "–"]]))
    assert other.startswith("**Loss**\n") and "| 1.5 ± 0.1 (3) |" in other and "| 1.7 (n = 1) |" in other


def test_times_of_busy_machines_are_left_out_with_a_note():
    comparison = gathered(
        record(seed=1), record(seed=2, exclusive=False), record("shakespeare_moe4_frozen", exclusive=False)
    )
    view = View("Cost", ("train_seconds", "total_parameters"))
    assert cells_by_row(comparison, view)["learned"] == ["100.0 (n = 1)", "1,234,567"]
    assert cells_by_row(comparison, view)["frozen"][0] == "not timed alone"
    note = "times left out, of runs not known to be alone on their hardware: 2 of 3 (training)"
    assert note in cells.notes_of(comparison)
    assert not any("left out" in note for note in cells.notes_of(gathered(record())))


def test_times_of_runs_that_were_not_captured_are_left_out_with_a_note():
    frozen = "shakespeare_moe4_frozen"
    comparison = gathered(
        captured(record(seed=1)),
        record(seed=2),
        record(frozen),
        captured(record("shakespeare_moe4_random", exclusive=False)),
    )
    rows = cells_by_row(comparison, View("Cost", ("train_seconds", "total_parameters")))
    assert [row[0] for row in rows.values()] == ["100.0 (n = 1)", "not timed in captured steps", "not timed alone"]
    assert {
        "times left out, of runs not known to be alone on their hardware: 1 of 4 (training)",
        "times left out, of runs without captured steps: 2 of 4 (training)",
    } <= {*cells.notes_of(comparison)}
    problem = problem_of(comparison, "train_seconds", frozen, "shakespeare_moe4", "ratio")
    assert problem == "not timed in captured steps"


def test_a_dagger_marks_rows_that_cannot_be_compared():
    comparison = gathered(record(leaky=True), record("shakespeare_moe4_frozen"))
    assert list(cells_by_row(comparison)) == ["learned †", "frozen"]
    assert cells.notes_of(comparison)[0].startswith("† ")


def test_runs_with_uncommitted_changes_are_listed_and_not_averaged():
    comparison = gathered(record(seed=1, nats=1.5), record(seed=2, nats=9.0, dirty=True))
    assert cells_by_row(comparison)["learned"] == ["1.5000 (n = 1)"]
    assert any("learned, seed 2, 9.0000 nats" in note for note in cells.notes_of(comparison))


def paper_a(**changes):
    config = TABLES["A"].row("shakespeare_moe4").config_at("paper", 1)
    return record(**changes) | {"run_id": config.run_id, "config": config.to_dict(), "paper": {"best_val": 1.5}}


def test_the_published_number_stands_beside_ours_with_the_difference():
    grid = cells.grid_of(gathered(paper_a(), table=TABLES["A"], scale="paper"), View("Loss", ("paper",)))
    assert grid.columns == ["row", "best sampled validation, nats", "published", "ours − published"]
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows == {"4 experts, aux 0.01": ["1.5000 (n = 1)", "1.53", "-0.0300"]}


def test_another_size_is_not_subtracted_from_a_published_number():
    of_dense = TABLES["A"].row("shakespeare_dense").config_at("cpu", 1)
    found = record() | {"run_id": of_dense.run_id, "config": of_dense.to_dict()}
    grid = cells.grid_of(gathered(found, table=TABLES["A"]), View("Loss", ("paper",)))
    assert grid.columns[1:] == ["best sampled validation, nats", "published (paper size)"]


def test_relative_cells_are_ratios_with_intervals_beside_the_published_ratio():
    table = TABLES["B"]
    found = []
    for name, seconds in {"shakespeare_dense": (100.0, 102.0), "shakespeare_top2": (150.0, 151.0)}.items():
        for seed, value in enumerate(seconds):
            config = table.row(name).config_at("cpu", seed)
            made = record(seed=seed) | {"run_id": config.run_id, "config": config.to_dict()}
            found.append(made | {"seconds": {"train": value}})
    view = View("Relative", ("train_seconds",), relative=True)
    grid = cells.grid_of(gathered(*found, table=table), view)
    rows = {row[0]: row[1:] for row in grid.rows}
    assert grid.columns[1:] == ["training ÷ baseline", "published ÷ baseline"]
    assert rows["Baseline"] == ["1", "1"]
    ratio, published = rows["MoE Top-2"]
    assert ratio.startswith("1.490 [") and published == "1.600"
    assert len(rows) == 2


@pytest.mark.parametrize("write", [cells.markdown, cells.latex])
def test_markdown_and_latex_keep_every_cell_in_its_column(write):
    grid = Grid("T. 5% & more", ["row", "a|b"], [["x_1 & 2", "1 ± 2"], ["†", "3"]], ["a note"])
    text = write(grid)
    assert text.count("a note") == 1 and "5% & more" in text
    lines = [line for line in text.splitlines() if line.startswith("|") or line.endswith("\\\\")]
    separators = [
        line.replace("\\|", "").count("|") - 1 if write is cells.markdown else line.replace(r"\&", "").count("&") + 1
        for line in lines
    ]
    assert set(separators) == {2} and len(lines) == (4 if write is cells.markdown else 3)


def test_latex_escapes_special_characters():
    text = cells.latex(Grid("T", ["row"], [["50% of $x_1 ± {2}"]], []))
    assert r"50\% of \$x\_1 $\pm$ \{2\} \\" in text


def test_latex_sets_the_minus_of_a_number_and_keeps_hyphens():
    text = cells.latex(Grid("T", ["row"], [["top-2, 1e-3: -0.03 [-0.1, 0.2]"]], []))
    assert r"top-2, 1e-3: $-$0.03 [$-$0.1, 0.2] \\" in text


def test_csv_has_a_line_per_row_and_measure_with_unknown_values_empty():
    text = cells.csv_of([gathered(record(seed=1, nats=1.5), record(seed=2, nats=1.7))])
    lines = list(csv.DictReader(io.StringIO(text)))
    measures = {measure for view in TABLE.views for measure in view.measures}
    assert len(lines) == len(TABLE.rows) * len(measures)
    (clean,) = (line for line in lines if line["row"] == "shakespeare_moe4" and line["measure"] == "clean")
    assert (clean["mean"], clean["n"], clean["unit"], clean["comparable"]) == ("1.6", "2", "nats", "True")
    assert float(clean["sample_sd"]) == pytest.approx(0.1414213562)
    (missing,) = (line for line in lines if line["row"] == "shakespeare_moe4_frozen" and line["measure"] == "clean")
    assert missing["mean"] == missing["sample_sd"] == missing["comparable"] == "" and missing["n"] == "0"


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def speed_grid(record, title):
    """(columns, {label: cells}, notes) of the grid whose title goes on so."""
    grid = next(grid for grid in speed_cells.speed_grids(record) if grid.title.startswith(f"Speed. {title}"))
    rows = {row[0]: row[1:] for row in grid.rows}
    assert len(rows) == len(grid.rows) and {len(row) for row in grid.rows} == {len(grid.columns)}
    return grid.columns, rows, grid.notes


def test_training_is_a_ratio_a_time_a_speed_and_how_near_the_floor():
    columns, rows, notes = speed_grid(bench(), "Training")
    assert columns == ["model", "time ÷ dense's", "ms an update", "characters/s", "floor ÷ time"]
    assert rows["Dense"] == ["1", "45.0 [43.6, 46.4]", "17,067", "37.9%"]
    assert rows["4 experts, top-1"] == ["1.22 [1.18, 1.26]", "54.9 [53.3, 56.5]", "13,989", "31.1%"]
    assert notes == ["n = 40 timings each"]


def test_decoding_has_the_speed_of_a_sequence_and_of_all_and_memory_where_it_is_known():
    columns, rows, notes = speed_grid(bench("paper", GPU), "Decoding")
    assert notes[1].endswith("the whole window again for each character: Dense, eager script; 4 experts, eager script.")
    assert columns[3:] == ["characters/s a sequence", "in total", "floor ÷ time", "peak memory, MiB"]
    assert rows["Dense, batch 8"] == ["1", "1.10 [1.07, 1.13]", "909", "7,273", "23.3%", "768"]
    assert len(rows) == 6 * 3 and len(speed_grid(bench(), "Reading a prompt")[1]) == 6 * 3


def test_the_papers_protocol_stands_beside_the_published_numbers():
    columns, rows, notes = speed_grid(bench(), "Inference by the papers' protocol")
    assert columns[1:4] == ["characters/s", "speed ÷ dense's", "training time ÷ dense's"]
    assert columns[4] == "published: characters/s (paper size)"
    assert rows["Dense"] == ["238.1", "1", "1", "441.3", "1", "1"]
    assert rows["4 linear experts, top-2"][3:] == ["224.7", "0.509", "1.600"]
    assert rows["4 experts, top-1"] == ["164.2", "0.690 [0.670, 0.711]", "1.22 [1.18, 1.26]", "–", "–", "–"]
    assert rows["MoE Capacity 0.5 (top-2), published"] == ["–", "–", "–", "196.9", "0.446", "1.609"]
    assert "n = 40 texts of 500 characters; training time is that of the updates" in notes
    assert speed_grid(bench("paper", GPU), "Inference by the papers' protocol")[0][4] == "published: characters/s"


def test_models_and_backends_are_listed_with_the_worst_check():
    record = bench()
    record["models"]["moe4"]["checks"][0]["error"] = 5e-6
    _, rows, notes = speed_grid(record, "Models, backends")
    assert rows["4 experts, top-1"] == ["1,000,000", "1,000,000", "sliced", "packed weights, eager", "– / 12.5", "1"]
    what = "training: loss and gradients against the reference backend"
    assert notes == [f"checked, {what}: largest error 5.0e-06, allowed 1e-05 (n = 6)"]


def test_only_measured_tasks_have_tables():
    record = bench()
    record["measurements"] = [one for one in record["measurements"] if one["task"] == "decode"]
    titles = [grid.title for grid in speed_cells.speed_grids(record)]
    assert titles == ["Speed. Decoding: a step gives each sequence a character", "Speed. Models, backends and checks"]


def test_csv_of_benches_has_a_line_per_measurement():
    record = bench()
    lines = list(csv.DictReader(io.StringIO(speed_cells.speed_csv([record, bench("paper", GPU)]))))
    assert len(lines) == 2 * len(record["measurements"])
    line = next(line for line in lines if (line["model"], line["task"]) == ("moe4", "train"))
    assert float(line["seconds"]) == pytest.approx(0.0549) and float(line["ratio"]) == pytest.approx(1.22)
    assert (line["machine"], line["alone"], line["uncommitted_changes"]) == (
        "AMD EPYC, 2 cores, 2 threads, torch 2.13.0+cpu, float32", "True", "False",
    )  # fmt: skip
    assert lines[1]["model"] == "dense" and lines[1]["ratio"] == "" and line["peak_memory_bytes"] == ""


def test_a_model_finds_the_published_row_of_its_kind():
    rows = {name: speed_cells.published_row(model) for name, model in bench()["models"].items()}
    assert {name: row.label for name, row in rows.items() if row} == {
        "reference": "Baseline", "dense": "Baseline", "moe4_linear": "MoE Top-2",
    }  # fmt: skip
    assert [round(time, 2) for time in figures_of_speed.published_times("train")] == [1.51, 1.60, 1.61, 1.61]
    assert [round(time, 2) for time in figures_of_speed.published_times("decode")] == [1.76, 1.96, 2.24, 2.26]
