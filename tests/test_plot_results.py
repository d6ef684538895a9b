"""Tables and curves from records, whole or not."""

import json

import pytest

import plot_results
import records
from settings import Config


def record(seed=1, nats=1.5, step=10, **changes):
    evaluations = [
        {"step": at, "clean": {"nats": nats + 2 - at / 5, "bpc": 1.0}, "paper": {"train": nats, "val": nats}}
        for at in (0, step)
    ]
    return {
        "format": "charmoe record 2",
        "run_id": f"abc-s{seed}",
        "title": "A title",
        "leaky": False,
        "config": Config(seed=seed).to_dict(),
        "dataset": {"name": "shakespeare_char", "canonical": True},
        "parameters": {"total": 2000, "active": 1000},
        "clean": {"best": {"nats": nats, "bpc": nats * 1.4427}},
        "paper": {"best_val": nats, "best_val_with_aux": nats + 0.04},
        "seconds": {"train": 100.0},
        "tokens_per_second": 15000.0,
        "git": {"commit": "0", "dirty": False},
        "machine": {"device": "a CPU", "threads": 2, "torch": "2.13.0", "dtype": "float32"},
        "evaluations": evaluations,
        **changes,
    }


def results_with(monkeypatch, tmp_path, *records):
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    for number, one in enumerate(records):
        (folder / f"{number}.json").write_text(one if isinstance(one, str) else json.dumps(one))
    monkeypatch.setattr(plot_results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot_results, "ROOT", tmp_path)


def test_seeds_of_one_config_become_a_row_with_mean_and_sample_sd(monkeypatch, tmp_path):
    results_with(
        monkeypatch,
        tmp_path,
        record(1, 1.0),
        record(2, 2.0),
        record(3, 3.0, config=Config(n_layer=2).to_dict(), title="Another"),
    )
    plot_results.main([])
    page = (tmp_path / "results" / "summary.md").read_text()
    assert (
        "| A title, shakespeare_char | 2 | 1.5000 ± 0.7071 |" in page
        and "| Another, shakespeare_char | 1 | 3.0000 |" in page
    )
    assert (tmp_path / "results" / "cpu_curves.png").stat().st_size > 10_000


def test_the_same_records_give_the_same_bytes(monkeypatch, tmp_path):
    results_with(monkeypatch, tmp_path, record(1), record(2, 1.6))
    outputs = []
    for _ in range(2):
        plot_results.main([])
        outputs.append([(tmp_path / "results" / name).read_bytes() for name in ("summary.md", "cpu_curves.png")])
    assert outputs[0] == outputs[1]


def test_what_cannot_be_compared_is_marked(monkeypatch, tmp_path):
    results_with(
        monkeypatch,
        tmp_path,
        record(1, dataset={"name": "enwik8-head-4.15M", "canonical": False}, git={"commit": "0", "dirty": True}),
    )
    plot_results.main([])
    page = (tmp_path / "results" / "summary.md").read_text()
    assert "enwik8-head-4.15M †" in page and "1 of the runs were made with uncommitted changes" in page


def test_a_damaged_record_is_named_and_the_rest_is_drawn(monkeypatch, tmp_path, capsys):
    results_with(monkeypatch, tmp_path, record(1), '{"format": "charm', "[1, 2]")
    plot_results.main([])
    told = capsys.readouterr().err
    assert "1.json: cannot be read" in told and "2.json: not a record" in told
    assert "| 1 | 1.5000 |" in (tmp_path / "results" / "summary.md").read_text()


@pytest.mark.parametrize(
    "seconds, text", [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.9, "1 min 0 s"), (119.6, "2 min 0 s"), (3599.7, "1.0 h")]
)
def test_durations_never_have_sixty_seconds(seconds, text):
    assert records.duration(seconds) == text


def test_no_records_is_one_message(monkeypatch, tmp_path):
    results_with(monkeypatch, tmp_path)
    with pytest.raises(plot_results.RecordError, match="holds no records yet"):
        plot_results.main([])


def test_a_run_that_still_trains_is_drawn_from_its_whole_lines(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(Config().to_dict()))
    lines = [{"kind": "train", "step": 5, "loss": 2.0}, *({"kind": "eval", **line} for line in record()["evaluations"])]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "ev')
    plot_results.main(["--latest", str(run), "--output", str(tmp_path / "curves.png")])
    assert "not a whole line" in capsys.readouterr().err and (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no run"),
        ({"config.json": "{}", "metrics.jsonl": ""}, "no evaluation yet"),
        ({"config.json": "[1", "metrics.jsonl": ""}, "not the config of a run"),
    ],
)
def test_a_folder_without_a_run_is_one_message(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(plot_results.RecordError, match=message):
        plot_results.main(["--latest", str(tmp_path)])


def test_experiments_that_share_a_title_are_told_apart_and_never_averaged(monkeypatch, tmp_path):
    """Options on the command line change the experiment, but not the title."""
    results_with(monkeypatch, tmp_path, record(1), record(2, 1.7, config=Config(seed=2, learning_rate=0.01).to_dict()))
    drawn = []
    monkeypatch.setattr(plot_results, "draw_curves", lambda rows, path, caption: drawn.append(list(rows)))
    plot_results.main([])
    page = (tmp_path / "results" / "summary.md").read_text()
    assert (
        "| A title, shakespeare_char | 1 |" in page and "| A title, learning_rate=0.01, shakespeare_char | 1 |" in page
    )
    assert drawn == [["A title", "A title, learning_rate=0.01"]]


def test_more_rows_than_colours_are_all_drawn(tmp_path):
    rows = {f"row {i}": [record()] for i in range(len(plot_results.COLOURS) + 2)}
    shown = []
    figure_legend = plot_results.plt.Axes.legend
    try:
        plot_results.plt.Axes.legend = lambda axes, **keys: shown.extend(axes.get_legend_handles_labels()[1])
        plot_results.draw_curves(rows, tmp_path / "curves.png", "")
    finally:
        plot_results.plt.Axes.legend = figure_legend
    assert len(shown) == len(rows) + 1
