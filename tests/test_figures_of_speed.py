"""The picture of a bench: the right numbers, whatever is missing; readable in light and dark."""

import functools
import re

import pytest
from benches import CPU, GPU, bench, find
from pictures import assert_readable, assert_stands_alone, lines_of, panel_over

from report import style
from report.figures_of_speed import relative_time

MODELS = ("dense", "moe4", "moe4_linear")
CASES = {
    "all models": lambda: bench(),
    "some models": lambda: some_of(bench(wide=0.5)),
    "paper size": lambda: bench("paper", GPU, n=10, wide=0.3),
}


def some_of(record):
    """A bench of three models, without a batch size and without one model's updates."""
    record["models"] = {name: record["models"][name] for name in MODELS}
    record["measurements"] = [
        one
        for one in record["measurements"]
        if one["model"] in MODELS and one["batch_size"] != 8 and (one["model"], one["task"]) != ("moe4", "train")
    ]
    return record


def only_dense():
    record = bench()
    record["measurements"] = [one for one in record["measurements"] if one["model"] == "dense"]
    return record


@functools.cache
def drawing_of(case):
    return relative_time(CASES[case]())


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_readable_and_stands_alone_in_light_and_dark(case):
    drawing = drawing_of(case)
    assert_readable(case, drawing.figure, points=8)
    assert_stands_alone(case, style.svg(drawing.figure))
    size, machine = ("Paper size: 6 layers", GPU) if case == "paper size" else ("CPU size: 4 layers", CPU)
    assert size in drawing.caption and machine["device"] in drawing.caption and "n = " in drawing.caption
    assert not re.search(r"None|\b(nan|inf)\b", drawing.caption + drawing.alt) and drawing.alt.endswith(".")


def test_ratios_are_medians_of_pairs_with_their_percentiles():
    record = bench()
    drawing = relative_time(record)
    axes = panel_over(drawing, "training")
    marks = [line for line in axes.get_lines() if line.get_marker() not in ("None", "|")]  # a cap is a |
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks]
    rows = [model for model in record["models"] if model != "dense"]
    ratios = [find(record, model)["ratio"] for model in rows]
    assert dots == [(pytest.approx(ratio["median"]), y) for y, ratio in enumerate(ratios)]
    whiskers = [[point[0] for point in path.vertices] for bar in axes.collections for path in bar.get_paths()]
    assert whiskers == [pytest.approx([ratio["p10"], ratio["p90"]]) for ratio in ratios]
    assert [text.get_text() for text in axes.texts] == ["published: 1.51–1.61", *(f"{r['median']:.2f}" for r in ratios)]
    assert [(1, 0), (1, 1)] in lines_of(axes)  # dense
    assert "4 experts, top-1 1.22 (training), 1.11 (decoding, batch 1), 1.35 (decoding, batch 8)" in drawing.alt


def test_a_far_slower_model_gets_an_arrow_and_leaves_the_others_room():
    drawing = drawing_of("all models")
    axes = panel_over(drawing, "decoding, batch 32")
    assert axes.get_xlim()[1] < 3 and [line.get_marker() for line in axes.get_lines()].count(">") == 2
    assert "36.0" in [text.get_text() for text in axes.texts] and "Arrow: beyond the axis." in drawing.caption
    assert "Arrow" not in drawing_of("some models").caption


def test_published_ratios_are_drawn_at_the_papers_batch_size_only():
    drawing = drawing_of("all models")
    published = {
        axes.get_xlabel().partition(":")[0]: text.get_text()
        for axes in drawing.figure.axes
        for text in axes.texts
        if text.get_text().startswith("published")
    }
    assert published == {"training": "published: 1.51–1.61", "decoding, batch 1": "published: 1.76–2.26"}


def test_a_doubtful_bench_says_so_in_the_caption():
    record = bench() | {"git": {"commit": "0" * 40, "dirty": True}}
    assert "The code had uncommitted changes." in relative_time(record).caption
    assert relative_time(only_dense()) is None
