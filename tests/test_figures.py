"""Pictures: the right numbers, the same bytes, whatever is missing; readable in light and dark."""

import functools
import hashlib
import math
import re

import matplotlib
import pytest
import test_figures_of_rows
import test_figures_of_speed
from analysed import analysed
from matplotlib.collections import PolyCollection
from pictures import assert_readable, assert_stands_alone, in_a_fresh_process, lines_of, panel_over

from papers import TABLES
from papers.table import Comparison
from papers.tuning import choose
from report import captions, figures_of_differences, figures_of_rows, figures_of_run, figures_of_table, style
from report.figures import FIGURES
from support.intervals import interval_of_mean

DENSE, MOE4 = "shakespeare_dense", "shakespeare_moe4"
MACHINE = "AMD EPYC, 2 cores, 2 threads, torch 2.13.0+cpu, float32"


def record(seed, nats=1.9, experts=0, aux=0.0, seconds=100.0, exclusive=True, **changes):
    """The part of a record that pictures need; the loss falls from 4.2 to `nats` in 2,000 steps."""
    evaluations = [
        {
            "step": step,
            "clean": {"nats": nats + (4.2 - nats) * math.exp(-step / 200), "bpc": 0.0},
            "paper": {"train": nats - 0.1, "val": nats, "train_with_aux": nats - 0.1 + aux, "val_with_aux": nats + aux},
            "train_mode": None,
            "train_seconds": seconds * step / 2000,
            "load": [[(0.5 + i) / (experts**2 / 2) for i in range(experts)]] * 2 if experts else [],
        }
        for step in range(0, 2001, 500)
    ]
    evaluations[-1]["clean"]["nats"] = nats
    return {
        "config": {"seed": seed, "batch_size": 12, "block_size": 64, "gradient_accumulation_steps": 1},
        "dataset": text_of(1_003_854),
        "leaky": False,
        "exclusive": exclusive,
        "machine": {},
        "evaluations": evaluations,
        "clean": {"best": {"nats": nats, "bpc": nats / math.log(2)}},
        "test": None,
        "paper": {"best_val": nats, "best_val_with_aux": nats + aux},
        "parameters": {"active": 800_000 + 500 * experts, "total": 800_000 + 500_000 * max(0, experts - 1)},
        "seconds": {"train": seconds},
        "inference": {"tokens_per_second": 30_000.0 / seconds, "exclusive": exclusive},
        "epochs": 1.53,
        "training_flops_per_token": 5_000_000,
        "tokens": 1_536_000,
        **changes,
    }


def text_of(size):
    splits = {"train": size, "val": 111_540}
    return {"name": "shakespeare_char", "sha256": "a", "canonical": True, "unit": "character", "splits": splits}


def comparison(table, cells, scale="cpu"):
    rows = TABLES[table].rows_at(scale)
    found, apart = {row.name: cells.get(row.name, []) for row in rows}, {row.name: [] for row in rows}
    choices = {row.name: choice(row, 1.9 - 0.01 * i) for i, row in enumerate(rows) if row.candidates}
    return Comparison(TABLES[table], scale, MACHINE, found, apart, choices=choices)


def choice(row, nats):
    """Of a tuned row, whose loss is lowest at the third of four rates."""
    names = [candidate.name for candidate in row.experiments_at("cpu")][:4]
    losses = zip(names, (nats + 0.1, nats + 0.03, nats, nats + 0.02))
    return choose({name: {1337: loss, 1338: loss + 0.01, 1339: loss - 0.01} for name, loss in losses})


def filled(table, seeds, scale="cpu", only=lambda name: True):
    """A comparison in which no two rows, and no two seeds, are alike."""
    cells = {}
    for i, row in enumerate(TABLES[table].rows_at(scale)):
        experts = 0 if "dense" in row.name else 8 if "moe8" in row.name else 4
        aux = 0.0 if not experts else 0.4 if "aux01" in row.name else 0.04
        cells[row.name] = [
            record(1337 + k, 1.9 - 0.01 * i + 0.004 * k, experts, aux, 100 + 9 * i + k)
            for k in range(seeds if only(row.name) else 0)
        ]
        for one in cells[row.name]:
            one["dataset"] = text_of(row.options.get("train_characters") or 1_003_854)
    return comparison(table, cells, scale)


PICTURES = {  # figure -> a table and its seeds
    "loss_curves": ("A", 3),
    "loss_against_cost": ("A", 3),
    "loss_by_length": ("equal", 3),
    "relative_cost": ("B", 3),
    "load_over_training": ("C", 2),
    "aux_decomposition": ("A", 3),
    "difference_by_size": ("repetition", 3),
    "differences": ("A", 3),
    "loss_by_rate": ("tuned", 3),
}
RUNS = {"one": [{"evaluations": record(1)["evaluations"]}], "two": [record(1, 1.8), record(2, 1.7)]}


@functools.cache
def drawings():
    """{name: Drawing} of one instance of each figure."""
    found = {name: FIGURES[name](filled(*of)) for name, of in PICTURES.items()}
    return found | {"curves_of_runs": figures_of_table.curves_of_runs(RUNS)}


@functools.cache
def sparse_drawings(case):
    """{name: Drawing or None} of a comparison from which much is missing."""
    only = {"one seed": {DENSE, MOE4, "shakespeare_moe4_inner_dropout"}, "no baseline": {MOE4}}[case]
    return {name: FIGURES[name](filled("A", 1, only=lambda row: row in only)) for name in PICTURES}


def digest():
    """Of one picture of each kind: a table's, its rows', a run's and a bench's."""
    chosen = [
        figures_of_table.loss_against_cost(filled("C", 2)),
        figures_of_rows.information_by_row(test_figures_of_rows.comparison("C", seeds=(1,))),
        figures_of_run.gradient_cosines(analysed()),
        test_figures_of_speed.drawing_of("some models"),
    ]
    return hashlib.sha256("".join(style.svg(drawing.figure) for drawing in chosen).encode()).hexdigest()


def assert_caption_stands_alone(name, drawing, size="CPU size: 4 layers"):
    assert size in drawing.caption and MACHINE in drawing.caption and "n = " in drawing.caption, name
    assert drawing.alt.endswith(".") and not re.search(r"None|\b(nan|inf)\b", drawing.caption + drawing.alt), name


def test_every_figure_of_a_table_is_drawn_here_or_with_the_rows():
    assert FIGURES.keys() - PICTURES.keys() == set(test_figures_of_rows.BY_ROW)


def test_a_fresh_process_draws_the_same_bytes_without_torch():
    code = "import sys, test_figures as t; print(t.digest(), 'torch' in sys.modules)"
    assert in_a_fresh_process(code) == [digest(), "False"]


def test_bytes_depend_neither_on_earlier_pictures_nor_on_matplotlibrc(tmp_path, monkeypatch):
    drawing = figures_of_table.loss_curves(filled("C", 2))
    first = style.svg(drawing.figure)
    style.png(drawing.figure, tmp_path / "a.png")
    assert style.svg(drawing.figure) == first and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    for key, value in {"font.size": 20, "axes.grid": False, "lines.linewidth": 9, "svg.fonttype": "none"}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    assert style.svg(figures_of_table.loss_curves(filled("C", 2)).figure) == first
    assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.parametrize("name", [*PICTURES, "curves_of_runs"])
def test_a_picture_is_readable_and_stands_alone_in_light_and_dark(name):
    drawing = drawings()[name]
    assert_readable(name, drawing.figure, points=8)
    assert_stands_alone(name, style.svg(drawing.figure))
    if name != "curves_of_runs":
        assert_caption_stands_alone(name, drawing)


def test_missing_rows_leave_the_rest_readable():
    found = {name: drawing for name, drawing in sparse_drawings("one seed").items() if drawing}
    assert set(found) == PICTURES.keys() - {"difference_by_size", "loss_by_rate"}
    for name, drawing in found.items():
        assert_readable(name, drawing.figure, points=8)
        assert_caption_stands_alone(name, drawing)


def test_without_the_baseline_nothing_is_compared_with_it():
    found = {name for name, drawing in sparse_drawings("no baseline").items() if drawing}
    assert found == {"loss_curves", "loss_against_cost", "loss_by_length", "load_over_training"}


def test_without_records_there_is_no_picture():
    empty = comparison("A", {})._replace(machine="")
    assert [draw(empty) for draw in FIGURES.values()] == [None] * len(FIGURES)


def test_curves_are_means_with_a_band_from_lowest_to_highest_seed():
    runs = [record(1, 1.8), record(2, 1.9), record(3, 2.0)]
    drawing = figures_of_table.loss_curves(comparison("A", {DENSE: runs}))
    (line,) = lines_of(panel_over(drawing, "updates"))
    assert line[-1] == (2000, pytest.approx(1.9)) and line[0] == (0, pytest.approx(4.2))
    (read,) = lines_of(panel_over(drawing, "characters read, millions"))
    assert read[-1] == (pytest.approx(2000 * 12 * 64 / 1e6), pytest.approx(1.9))
    (band,) = [c for c in panel_over(drawing, "updates").collections if isinstance(c, PolyCollection)]
    edges = [y for x, y in band.get_paths()[0].vertices if x == 2000]
    assert (min(edges), max(edges)) == (pytest.approx(1.8), pytest.approx(2.0))
    low, high = panel_over(drawing, "updates").get_ylim()
    assert 1.7 < low < 1.8 and 2.0 < high < 2.5  # 4.2 nats of the first step do not squash the rest


def test_times_of_runs_that_shared_the_machine_are_not_drawn():
    alone, shared = record(1, 1.8, seconds=100.0), record(2, 1.9, seconds=900.0, exclusive=False)
    of = comparison("A", {DENSE: [alone, shared], MOE4: [record(1, 1.7, 4, seconds=120.0), shared]})
    curves = figures_of_table.loss_curves(of)
    assert [line[-1] for line in lines_of(panel_over(curves, "training time, s"))] == [(100.0, 1.8), (120.0, 1.7)]
    assert [line[-1][1] for line in lines_of(panel_over(curves, "updates"))] == pytest.approx([1.85, 1.8])
    assert "2 of 4 runs" in curves.caption
    cost = panel_over(figures_of_table.loss_against_cost(of), "training time, s")
    assert {x for line in lines_of(cost) for x, _ in line} == {100.0, 120.0}
    relative = panel_over(figures_of_differences.relative_cost(of), "training time")
    assert pytest.approx(1.2) in [line[0][0] for line in lines_of(relative)]


def test_without_exclusive_runs_no_time_is_drawn():
    of = comparison("A", {DENSE: [record(1, exclusive=False)], MOE4: [record(1, 1.8, 4, exclusive=False)]})
    for drawing in (figures_of_table.loss_curves(of), figures_of_table.loss_against_cost(of)):
        assert not [axes for axes in drawing.figure.axes if "time" in axes.get_xlabel()]
        assert "no run is known to have had its hardware to itself" in drawing.caption
    assert figures_of_differences.relative_cost(of) is None


def test_two_runs_of_one_seed_count_once():
    drawing = figures_of_table.loss_curves(comparison("A", {DENSE: [record(1, 1.8), record(1, 1.8)]}))
    assert "n = 1 seed per row" in drawing.caption


def test_cost_shows_every_seed_and_their_mean():
    drawing = figures_of_table.loss_against_cost(comparison("A", {MOE4: [record(1, 1.8, 4), record(2, 1.9, 4)]}))
    points = [point for line in lines_of(panel_over(drawing, "all parameters")) for point in line]
    assert points[:3] == [(2.3, 1.8), (2.3, 1.9), (2.3, pytest.approx(1.85))]
    low, high = panel_over(drawing, "all parameters").get_ylim()
    assert low < 1.8 and high > 1.9
    assert "1.850 ± 0.071 nats with 2.30 million parameters" in drawing.alt


def test_equal_parameters_stand_side_by_side_in_the_tables_order():
    assert figures_of_table.side_by_side([5.0, 1.0, 5.1, 5.05], near=0.2, gap=8) == [-8.0, 0.0, 0.0, 8.0]


def test_relative_cost_is_a_ratio_with_its_spread_beside_the_published_one():
    base = [record(seed, seconds=seconds) for seed, seconds in ((1, 100.0), (2, 104.0))]
    ours = [record(seed, 1.9, 4, seconds=seconds) for seed, seconds in ((1, 150.0), (2, 160.0))]
    of = comparison("B", {DENSE: base, "shakespeare_top2": ours})
    mean = math.sqrt(150 * 160 / (100 * 104))
    drawing = figures_of_differences.relative_cost(of)
    drawn = [line[0][0] for line in lines_of(panel_over(drawing, "training time"))]
    assert pytest.approx(mean) in drawn and pytest.approx(460.5 / 287.9) in drawn
    speeds = [line[0][0] for line in lines_of(panel_over(drawing, "inference speed"))]
    assert pytest.approx(1 / mean) in speeds and pytest.approx(224.7 / 441.3) in speeds
    assert "Open: published" in drawing.caption


def test_load_is_the_first_seeds_beside_an_even_share():
    runs = [record(1337, 1.9, 4), record(1338, 1.9, 4)]
    runs[1]["evaluations"][-1]["load"] = [[1.0, 0.0, 0.0, 0.0]] * 2
    drawing = figures_of_table.load_over_training(comparison("A", {DENSE: [record(1337)], MOE4: runs}))
    first = drawing.figure.axes[0]
    even, *experts = lines_of(first)
    assert even[0][1] == 25 and [line[-1][1] for line in experts] == pytest.approx([6.25, 18.75, 31.25, 43.75])
    assert len(drawing.figure.axes) == 2 and "Only seed 1337 is shown" in drawing.caption and "dense" not in drawing.alt


def test_auxiliary_loss_is_drawn_apart_from_the_models_own():
    dense = [record(1, 1.90), record(2, 1.92)]
    moe = [record(1, 1.88, 4, 0.04), record(2, 1.90, 4, 0.04)]
    drawing = figures_of_differences.aux_decomposition(comparison("A", {DENSE: dense, MOE4: moe}))
    model, aux = drawing.figure.axes[0].patches
    assert (model.get_x(), model.get_width()) == (0, pytest.approx(-0.02))
    assert (aux.get_x(), aux.get_width()) == (pytest.approx(-0.02), pytest.approx(0.04))
    texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert texts == ["−0.020 + 0.040", "published: 0.07, at the paper's size"]
    assert "model −0.020, auxiliary loss +0.040" in drawing.alt
    paper = figures_of_differences.aux_decomposition(comparison("A", {DENSE: dense, MOE4: moe}, "paper"))
    assert "the published gap of 0.07 nats." in paper.caption


def by_size(differences, seeds=(1, 2, 3)):
    """A comparison with this difference at each size: {"_30k": nats of each seed, …}."""
    cells, sizes = {}, {"_30k": 30_000, "_100k": 100_000, "_300k": 300_000, "": 1_003_854}
    for tag, of_seeds in differences.items():
        text = {"dataset": text_of(sizes[tag]), "epochs": 1_536_000 / sizes[tag]}
        cells[f"shakespeare{tag}_dense_rate4"] = [record(s, 1.9 + 0.01 * s, **text) for s in seeds]
        cells[f"shakespeare{tag}_moe4_rate4"] = [
            record(s, 1.9 + 0.01 * s + nats, 4, **text) for s, nats in zip(seeds, of_seeds)
        ]
    return comparison("repetition", cells)


def test_the_difference_by_size_has_each_seed_the_mean_and_the_crossing():
    drawing = figures_of_differences.difference_by_size(
        by_size({"_100k": (0.04, 0.05, 0.06), "": (-0.06, -0.05, -0.04)})
    )
    axes = drawing.figure.axes[0]
    seeds = [line for line in lines_of(axes) if [x for x, _ in line] == [100_000, 1_003_854]]
    assert [line[0][1] for line in seeds] == pytest.approx([0.04, 0.05, 0.06, 0.05])  # the mean last
    crossing = math.sqrt(100_000 * 1_003_854)
    assert pytest.approx([crossing, crossing]) in [[x for x, _ in line] for line in lines_of(axes) if len(line) == 2]
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "100,000\n(15.4 epochs)",
        "1,003,854\n(1.53 epochs)",
    ]
    assert "difference 0 at 317,000 [" in drawing.caption and "n = 3." in drawing.caption
    assert drawing.alt.endswith("characters. 4 experts, 0.004: 100,000 +0.050; 1,003,854 −0.050.")


def test_without_two_sizes_or_a_crossing_none_is_told():
    assert figures_of_differences.difference_by_size(by_size({"": (-0.06, -0.05, -0.04)})) is None
    assert figures_of_differences.difference_by_size(filled("A", 1)) is None
    drawing = figures_of_differences.difference_by_size(by_size({"_30k": (0.2, 0.3, 0.1), "_300k": (0.1, 0.1, 0.2)}))
    assert "no single crossing of 0 from 30,000 to 300,000 unique characters." in drawing.caption


def test_losses_by_rate_are_means_over_seeds_and_the_chosen_rate_is_ringed():
    drawing = FIGURES["loss_by_rate"](filled("tuned", 3))
    lines = lines_of(drawing.figure.axes[0])
    assert [(0.001, 2.0), (0.002, 1.93), (0.004, 1.9), (0.008, 1.92)] == [
        (x, pytest.approx(y)) for x, y in next(line for line in lines if len(line) == 4)
    ]
    assert "dense 0.004 with 1.9000" in drawing.alt and "on seeds 1337 to 1339" in drawing.caption
    assert FIGURES["loss_by_rate"](filled("A", 1)) is None


def test_differences_have_intervals_beside_the_published_ones():
    cells = {
        DENSE: [record(1, 1.90), record(2, 1.92)],
        MOE4: [record(1, 1.88, 4), record(2, 1.91, 4)],
        "shakespeare_moe2": [record(1, 1.93, 4)],
    }
    drawing = figures_of_differences.differences(comparison("A", cells))
    axes = drawing.figure.axes[0]
    effect = interval_of_mean([-0.02, -0.01])
    interval = f"[{effect.low:.3f}, {effect.high:.3f}]".replace("-", "−")
    assert [text.get_text() for text in axes.texts] == ["+0.030, n = 1", f"−0.015 {interval}, n = 2"]
    whiskers = [[point[0] for point in path.vertices] for bar in axes.collections for path in bar.get_paths()]
    assert whiskers == [pytest.approx([effect.low, effect.high])]
    assert (pytest.approx(0.07), 1) in [line[0] for line in lines_of(axes)] and "Open: published" in drawing.caption
    styles = [line.get_color() for line in axes.get_lines() if line.get_marker() in ("s", "^")]
    assert styles == [style.row_style(1).colour, style.row_style(2).colour]


def test_daggers_are_explained_in_the_caption():
    odd = record(
        1, leaky=True, dataset={"name": "enwik8-head-4.15M", "sha256": "b", "canonical": False, "unit": "byte"}
    )
    drawing = figures_of_table.loss_curves(comparison("A", {DENSE: [record(1)], MOE4: [odd]}))
    assert "4 experts, aux 0.01 †" in drawing.alt and "dense †" not in drawing.alt
    assert "† a text that is not the published data set (enwik8-head-4.15M); routing that sees" in drawing.caption
    assert panel_over(drawing, "characters or bytes read") and "Not run: 2 experts" in drawing.caption


def test_280_rows_have_distinct_styles_that_do_not_depend_on_missing_rows():
    styles = [style.row_style(i) for i in range(280)]
    assert len(set(styles)) == 280 and len({style.colour for style in styles[:7]}) == 7
    full, part = (filled("A", 1, only=only) for only in (lambda name: True, lambda name: name == MOE4))
    assert captions.cells_of(part)[0].style == captions.cells_of(full)[2].style


def test_local_runs_are_drawn_with_seeds_mean_and_training_loss():
    drawing = figures_of_table.curves_of_runs(RUNS)
    ends = [line[-1][1] for line in lines_of(drawing.figure.axes[0])]
    assert ends == pytest.approx([1.9, 1.9, 1.8, 1.8, 1.7, 1.75, 1.65])  # seeds, mean, train: of each label
    assert drawing.figure.legends[0].get_texts()[1].get_text() == "two (n = 2)"
