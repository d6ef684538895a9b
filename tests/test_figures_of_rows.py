"""Pictures of rows side by side: the right numbers, whatever is missing; readable in light and dark."""

import functools
import re
import statistics

import pytest
from analysed import analysed
from pictures import assert_readable, assert_stands_alone, lines_of, marks, panel

from analysis import analyses
from papers import TABLES
from papers.table import Comparison
from report import figures_of_rows, style
from run import records

MACHINE = "AMD EPYC, 1 core, 1 thread, torch 2.13.0+cpu, float32"
BY_ROW = ("information_by_row", "paths_by_row", "stability_by_row", "ablation_by_row", "load_by_row")
ROWS = [row for row in TABLES["A"].rows_at("cpu") if "dense" not in row.name]


def comparison(table="A", seeds=(1, 2), missing=(), change=lambda analysis, row: None):
    """Every row analysed but those missing; no two rows or seeds alike."""
    rows, cells = TABLES[table].rows_at("cpu"), {}
    for i, row in enumerate(rows):
        keys = {"n_expert": 0} if "dense" in row.name else {}
        cells[row.name] = [analysed(seed, told=0.7 - 0.05 * i + 0.03 * seed, **keys) for seed in seeds]
        for analysis in cells[row.name]:
            change(analysis, row.name)
        if row.name in missing:
            cells[row.name] = []
    return Comparison(TABLES[table], "cpu", MACHINE, cells, {row.name: [] for row in rows})


@functools.cache
def drawings(table):
    """{name: Drawing}"""
    of = comparison(table, seeds=(1,) if table == "C" else (1, 2))
    return {name: getattr(figures_of_rows, name)(of) for name in BY_ROW}


@pytest.mark.parametrize("table", ["A", "C"])  # C: one seed
def test_pictures_are_readable_and_stand_alone_in_light_and_dark(table):
    for name, drawing in drawings(table).items():
        assert_readable(name, drawing.figure, points=9.5)
        assert_stands_alone(name, style.svg(drawing.figure))
        assert MACHINE in drawing.caption and "n = " in drawing.caption and "shakespeare_char" in drawing.caption, name
        assert drawing.caption.endswith(".") and drawing.alt.endswith("."), name
        assert not re.search(r"None|nan|\binf\b|  ", drawing.caption + drawing.alt), name


def test_without_analyses_of_experts_there_is_no_picture():
    dense = comparison(missing={row.name for row in ROWS})
    nothing = comparison(missing={row.name for row in TABLES["A"].rows_at("cpu")})
    for of in (dense, nothing):
        assert [getattr(figures_of_rows, name)(of) for name in BY_ROW] == [None] * len(BY_ROW)


def test_missing_and_leaky_rows_are_named_and_dense_ones_left_out():
    def change(analysis, row):
        analysis["leaky"] = row == ROWS[1].name

    of = comparison(missing={ROWS[2].name}, change=change)
    for name in BY_ROW:
        drawing = getattr(figures_of_rows, name)(of)
        assert f"Not analysed: {ROWS[2].label}." in drawing.caption and "Not run" not in drawing.caption, name
        assert "dense" not in drawing.alt and "n = 2 seeds per row" in drawing.caption, name
        assert f"{ROWS[1].label} †" in drawing.alt and f"{ROWS[0].label} †" not in drawing.alt, name
        assert ROWS[0].label in drawing.alt and "† routing that sees later characters." in drawing.caption, name
        read = "1,000" if name in ("stability_by_row", "ablation_by_row") else "3,450"
        assert f"Text: shakespeare_char, {read} characters of validation" in drawing.caption, name


def test_information_is_drawn_for_each_seed_their_mean_and_the_random_router():
    of = comparison()
    drawing = figures_of_rows.information_by_row(of)
    for title, names in figures_of_rows.ASKED.items():
        axes = panel(drawing, title.replace("\n", " "))
        for y, row in enumerate(ROWS):
            runs = of.cells[row.name]
            read = analyses.about("character") if names == ("character",) else analyses.about_given_character(*names)
            values = [100 * read(run) for run in runs]
            drawn = [x for line in lines_of(axes) for x, at in line if at == pytest.approx(y - 0.12)]
            assert drawn == pytest.approx([*values, statistics.fmean(values)]), (title, row.name)
            frozen = 15 if names != ("character",) else statistics.fmean(
                100 * layer["frozen"]["about"]["character"]["mean"] for run in runs for layer in run["layers"]
            )  # fmt: skip
            assert [x for x, at in marks(axes, "o", filled=False) if at == pytest.approx(y + 0.2)] == pytest.approx(
                [frozen]
            )
    assert "topic by the best of speaker and passage" in drawing.caption


def test_paths_are_drawn_for_each_seed_their_mean_and_the_random_router_where_an_analysis_has_them():
    def change(analysis, row):
        if row == ROWS[1].name:
            del analysis["paths"]  # as before they were measured

    of = comparison(change=change)
    drawing = figures_of_rows.paths_by_row(of)
    axes = panel(drawing, "told by the path")
    told = [100 * analyses.of_paths("character")(run) for run in of.cells[ROWS[0].name]]
    drawn = [x for line in lines_of(axes) for x, at in line if at == pytest.approx(-0.12)]
    assert drawn == pytest.approx([*told, statistics.fmean(told)])
    random = [x for x, at in marks(axes, "o", filled=False) if at == pytest.approx(0.2)]
    assert random == pytest.approx([statistics.fmean(told) / 2])
    assert ROWS[1].label not in drawing.alt and ROWS[1].label in figures_of_rows.information_by_row(of).alt


def test_agreement_is_the_mean_over_layers_and_seeds():
    def change(analysis, row):
        for layer in analysis["stability"]["layers"] if analysis["stability"] else ():
            layer["agreement"] = [value - 0.1 * (analysis["config"]["seed"] == 2) for value in layer["agreement"]]

    drawing = figures_of_rows.stability_by_row(comparison(change=change))
    agreement, character = drawing.figure.axes
    first, second, mean, chance = lines_of(agreement)[:4]
    assert [line[0][1] for line in (first, second, mean, chance)] == pytest.approx([37.5, 27.5, 32.5, 25])
    assert [x for x, _ in mean] == [0, 30, 100, 200]
    assert lines_of(character)[2][0] == (0, pytest.approx(79))
    assert len(drawing.figure.legends[0].get_texts()) == len(ROWS)


def test_rows_without_snapshots_are_left_out_of_stability_alone():
    def change(analysis, row):
        if row == ROWS[0].name:
            analysis["stability"] = None

    of = comparison(change=change)
    assert ROWS[0].label not in figures_of_rows.stability_by_row(of).alt
    assert ROWS[0].label in figures_of_rows.ablation_by_row(of).alt


def test_ablation_costs_are_drawn_for_each_seed_and_their_mean():
    def change(analysis, row):
        if analysis["ablation"]:
            analysis["ablation"]["shuffled_all"]["nats"] += 0.1 * analysis["config"]["seed"]
            analysis["ablation"]["merged_all"] = None

    drawing = figures_of_rows.ablation_by_row(comparison(change=change))
    assert [axes.get_title() for axes in drawing.figure.axes] == ["shuffled", "hashed", "commonest", "one removed"]
    drawn = [x for line in lines_of(panel(drawing, "shuffled")) for x, y in line if y == 0 and x > 0]
    assert drawn == pytest.approx([1.35, 1.45, 1.4]) and "shuffled +1.400, hashed +1.200" in drawing.alt


def test_utilisation_is_drawn_for_each_layer_and_seed_beside_the_threshold():
    def change(analysis, row):
        if row == ROWS[1].name:
            analysis["layers"][1]["load"]["load"] = [1.0, 0.0, 0.0, 0.0]

    of = comparison(change=change)
    (axes,) = figures_of_rows.load_by_row(of).figure.axes
    assert [records.COLLAPSED_BELOW] * 2 in [list(line.get_xdata()) for line in axes.get_lines()]
    drawn = [x for line in lines_of(axes) for x, y in line if y == 1 and x != records.COLLAPSED_BELOW]
    used = analyses.utilisation(of.cells[ROWS[0].name][0])
    assert sorted(drawn) == pytest.approx([0, 0, used, used])
    assert [text.get_text() for text in axes.texts][1:3] == [f"{used:.2f} to {used:.2f}", f"0.00 to {used:.2f}"]
