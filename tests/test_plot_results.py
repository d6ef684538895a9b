"""From a folder of records to tables, figures, verdicts and pages, also when records are missing or damaged."""

import csv
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from analysed import analysed
from benches import GPU, bench
from conftest import TINY

import papers
import plot_results
import sweep
import train
from analysis import analyses
from papers.measures import MEASURES, Measure
from papers.ours import SOURCE
from papers.table import ABOVE_0, BELOW_0, Claim, Row, Table, View
from report import figures_of_speed, latest, sections
from report.blocks import Picture
from run.identity import Identity
from run.records import RecordError
from run.settings import Config
from support.files import ROOT

SEEDS = (1, 2)


@pytest.fixture(scope="session")
def table(words):
    """Two rows that were run and one that was not, of models that train in a second."""
    options = {**TINY, "dataset": words, "lr_decay_iters": 0}
    shared = {"options": options, "scales": ("cpu",)}
    return Table(
        name="T",
        title="A table",
        source=SOURCE,
        text="What it is for.",
        rows=(
            Row("dense", "dense", "shakespeare_dense", **shared),
            Row("moe4", "4 experts", "shakespeare_moe4", baseline="dense", published={"paper": 1.53}, **shared),
            Row("moe8", "8 experts", "shakespeare_moe8", baseline="dense", **shared),
        ),
        views=(View("Loss", ("clean", "paper", "train_seconds")),),
    )


def better(id, label, row, **changes):
    """The claim that a row of T has a lower loss than its dense one."""
    return Claim(
        id=id,
        sentence=f"{label} are better.",
        table="T",
        pairs=((row, "dense"),),
        holds=BELOW_0,
        scales=("cpu",),
        **changes,
    )


@pytest.fixture(scope="session")
def made(table, tmp_path_factory):
    """results/ with two seeds of two rows. To be read only."""
    folder = tmp_path_factory.mktemp("made") / "results"
    for row in table.rows[:2]:
        for seed in SEEDS:
            out_dir = folder.parent / row.cell("cpu", seed)
            assert train.main([*row.arguments("cpu", seed), f"--out_dir={out_dir}"]) == 0
            record = json.loads((out_dir / "summary.json").read_text())
            # These tests run on busy machines and on trees with uncommitted changes.
            record |= {"others": {"cpu_share": 0.0, "device_bytes": None}, "exclusive": True}
            record["git"] = {"commit": "0" * 40, "dirty": False}
            path = folder / "T" / f"{row.cell('cpu', seed)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
    return folder


@pytest.fixture
def drawn_results(made, table, tmp_path, monkeypatch):
    """A copy of it, where plot_results.py knows this table and two claims."""
    monkeypatch.setattr(papers, "TABLES", {"T": table})
    monkeypatch.setattr(papers, "CLAIMS", (better("T1", "4 experts", "moe4"), better("T2", "8 experts", "moe8")))
    return Path(shutil.copytree(made, tmp_path / "results"))


@pytest.fixture
def results(drawn_results, monkeypatch):
    """The same with empty pictures, for drawing takes most of the time."""

    def drawings_of(comparison, shown):
        return dict.fromkeys((*comparison.table.figure_names, "differences"), "a drawing")

    monkeypatch.setattr(sections, "drawings_of", drawings_of)
    monkeypatch.setattr(figures_of_speed, "relative_time", lambda bench: "a drawing")
    monkeypatch.setattr(sections, "picture_of", lambda drawing: Picture("<svg/>", "A caption.", "An alt."))
    return drawn_results


def draw(results, *options):
    return plot_results.main(["--results", str(results), *options])


def written(results):
    return {
        path.relative_to(results).as_posix(): path.read_bytes()
        for path in results.rglob("*")
        if path.is_file() and path.parent.name != "T"
    }


def of_cell(results, row="moe4", seed=1):
    return results / "T" / f"{row}-cpu-s{seed}.json"


def benched(results, name, record):
    path = results / "bench" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def changed(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_tables_figures_and_pages_are_drawn_from_the_records(drawn_results, capsys):
    benched(drawn_results, "epyc-cpu", bench())
    assert draw(drawn_results) == 0
    files = written(drawn_results)
    assert set(files) - {"bench/epyc-cpu.json"} == {
        "summary.md", "report.html", "tables/T_cpu.csv", "tables/T_cpu.tex",
        "figures/T_cpu_loss_curves.svg", "figures/T_cpu_loss_against_cost.svg", "figures/T_cpu_differences.svg",
        "figures/speed_cpu.svg", "tables/speed_cpu.csv", "tables/speed_cpu.tex",
    }  # fmt: skip
    for name in ("summary.md", "report.html"):
        page = files[name].decode()
        assert "4 experts are better." in page and "± " in page
        assert "CPU size, AMD EPYC" in page and "Decoding: a step gives each sequence" in page
        assert "180 GFLOP/s and 12.5 GB/s" in page and "commit 0123456" in page and "uncommitted" not in page
    page = files["summary.md"].decode()
    assert "- Not run: 8 experts. `python sweep.py T --scale=cpu --seeds=5`" in page and "| 8 experts |" not in page
    assert "**Loss** (n = 2)" in page and "Regime: " in page
    assert "](figures/speed_cpu.svg)" in page and "| 4 experts, top-1 | 1.22 [1.18, 1.26] | 54.9 [53.3, 56.5] |" in page
    told = capsys.readouterr()
    assert "wrote " in told.out and told.err == ""
    assert draw(drawn_results, "--check") == 0  # drawn again, the same bytes


def test_check_writes_nothing(results, capsys):
    assert draw(results, "--check") == 1 and not (results / "report.html").exists()
    draw(results)
    capsys.readouterr()
    assert draw(results, "--check") == 0 and "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["summary.md", "report.html", "tables/T_cpu.csv", "figures/T_cpu_loss_curves.svg"])
def test_check_names_a_stale_file(results, capsys, name):
    draw(results)
    path = results / name
    for damage in ("out of date", "missing"):
        path.write_bytes(path.read_bytes() + b" ") if damage == "out of date" else path.unlink()
        capsys.readouterr()
        assert draw(results, "--check") == 1
        told = capsys.readouterr().out
        assert f"{name} is {damage}" in told and told.count(" is ") == 1


def test_check_sees_a_record_that_went(results):
    draw(results)
    of_cell(results).unlink()
    assert draw(results, "--check") == 1


def test_files_that_no_record_gives_any_more_are_removed(results, capsys):
    path = benched(results, "epyc-cpu", bench())
    draw(results)
    path.unlink()
    (results / "figures" / "T_paper_loss_curves.svg").write_text("old")
    assert draw(results, "--check") == 1
    told = capsys.readouterr().out
    for name in ("T_paper_loss_curves", "speed_cpu"):
        assert f"figures/{name}.svg is given by no record any more" in told
    draw(results)
    assert draw(results, "--check") == 0 and not [name for name in written(results) if "speed_" in name]


def test_files_of_others_stay_where_they_are(results):
    (results / "figures" / "more").mkdir(parents=True)
    thesis = results / "figures" / "thesis.pdf"
    thesis.write_text("mine")
    draw(results)
    assert thesis.read_text() == "mine" and draw(results, "--check") == 0


def test_the_committed_results_are_what_their_records_give():
    """The --check of CI, for those who only run the tests."""
    done = subprocess.run([sys.executable, "plot_results.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_drawing_needs_no_torch():
    program = "import sys, plot_results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_folder_that_cannot_be_written_is_one_clear_line(made, tmp_path):
    """In another process, for the script tells the message; root may write anywhere, so a folder is in the way."""
    folder = tmp_path / "results"
    (folder / "summary.md").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "plot_results.py", "--results", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "summary.md: Is a directory" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The recipes of docs/extending.md


def test_a_table_of_ones_own_is_one_entry(made, table, tmp_path, monkeypatch, capsys):
    """A Table with its rows and views, and a claim: sweep.py lists its runs, plot_results.py draws and decides it."""
    monkeypatch.setitem(papers.TABLES, "T", table)
    monkeypatch.setattr(papers, "CLAIMS", (*papers.CLAIMS, better("T1", "4 experts", "moe4")))
    folder = Path(shutil.copytree(made, tmp_path / "results"))
    machine = json.loads(of_cell(folder).read_text())["machine"]
    monkeypatch.setattr(sweep, "machine_here", lambda changes: machine)
    sweep.main(["T", "--scale=cpu", "--seeds=1", "--list", f"--out={tmp_path}/out", f"--results={folder}"])
    listed = capsys.readouterr().out
    assert all(row.cell("cpu", 1337) in listed for row in table.rows) and "3 missing" in listed
    assert draw(folder) == 0
    page = (folder / "summary.md").read_text()
    assert "## A table (T)" in page and "| T1 | 4 experts are better. | < 0 | cpu | " in page
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "T_cpu_loss_curves.svg", "T_cpu_loss_against_cost.svg", "T_cpu_differences.svg",
    }  # fmt: skip


def test_a_measure_of_ones_own_is_one_entry(results, table, monkeypatch):
    """A Measure, which a view and a claim then name: it gets a column, a line of the CSV file and a verdict."""
    step_time = Measure("median step", "ms", 2, read=lambda record: record["median_step_ms"], timed=True)
    monkeypatch.setitem(MEASURES, "step_time", step_time)
    own = dataclasses.replace(table, views=(View("Speed", ("step_time",)),))
    monkeypatch.setitem(papers.TABLES, "T", own)
    monkeypatch.setattr(papers, "CLAIMS", (better("T1", "4 experts", "moe4", measures=("step_time",)),))
    for seed in SEEDS:
        changed(of_cell(results, "dense", seed), median_step_ms=2.0 + 0.001 * seed)
        changed(of_cell(results, "moe4", seed), median_step_ms=1.0 + 0.001 * seed)
    assert draw(results) == 0
    page = (results / "summary.md").read_text()
    assert "| row | median step, ms |" in page
    assert "| T1 | 4 experts are better. | < 0 | cpu | held (provisional, n = 2) | -1.00 [" in page
    lines = list(csv.DictReader((results / "tables" / "T_cpu.csv").open()))
    assert {line["row"]: float(line["mean"] or 0) for line in lines} == {"dense": 2.0015, "moe4": 1.0015, "moe8": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Records that do not count


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_text("[]"),
        lambda path: changed(path, epochs=float("nan")),
        lambda path: path.rename(path.with_name("moe4-cpu-s7.json")),
    ],
    ids=["truncated", "a list", "NaN", "another seed's name"],
)
def test_a_damaged_record_is_named_in_a_line_and_the_rest_is_drawn(results, capsys, damage):
    damage(of_cell(results))
    assert draw(results) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("left out: ") and "moe4-cpu-s" in told
    page = (results / "summary.md").read_text()
    assert "(n = 1)" in page and "± " in page and "## Records left out" in page
    assert "Records left out" in (results / "report.html").read_text()


def test_two_different_records_of_one_cell_do_not_count(results, capsys):
    path, copy = of_cell(results), of_cell(results).with_name("again-s1.json")
    shutil.copy(path, copy)
    draw(results)
    assert "the same record" in capsys.readouterr().err and "(n = 1)" not in (results / "summary.md").read_text()
    changed(copy, median_step_ms=1.0)
    draw(results)
    told = capsys.readouterr().err
    assert path.name in told and copy.name in told and "(n = 1)" in (results / "summary.md").read_text()


def test_runs_with_uncommitted_changes_are_shown_and_not_averaged(results):
    changed(of_cell(results), git={"commit": "0" * 40, "dirty": True})
    draw(results)
    page = (results / "summary.md").read_text()
    assert "not counted: 4 experts, seed 1, " in page
    assert "| 4 experts |" in page and "(n = 1)" in page


def test_a_table_without_a_run_that_counts_says_so(results):
    for path in (results / "T").glob("*.json"):
        changed(path, git={"commit": None, "dirty": None})
    draw(results)
    page = (results / "summary.md").read_text()
    assert "Regime: no run that counts." in page and "| dense |" not in page and "4 experts, seed 1, " in page


def test_another_machine_gets_a_section_of_its_own_with_its_name_in_the_heading(results):
    """And where it ran one row alone, a line in the place of grid and figures, which report.html folds."""
    for seed in (1, 2):
        record = json.loads(of_cell(results, seed=seed).read_text())
        changed(of_cell(results, seed=seed), machine=record["machine"] | {"device": "Another CPU"})
    draw(results)
    page, html = (results / "summary.md").read_text(), (results / "report.html").read_text()
    assert page.count("## A table (T)") == 1 and page.count("\n### CPU size, ") == 2
    assert "\n### CPU size, Another CPU\n" in page and "A table (T, CPU size, Another CPU)</h2>" in html
    assert page.count("- Only “dense” was run here. ") == page.count("- Only “4 experts” was run here. ") == 1
    assert "figures/" not in page and "| dense |" not in page and "(2)" in page
    assert html.count("<details><summary>Tables and figures of the one row</summary>") == 2
    assert any("_2.svg" in name for name in written(results))


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "missing"])
def test_without_records_the_page_says_how_to_make_them(results, empty, tmp_path, capsys):
    folder = tmp_path / "nothing"
    if empty:
        folder.mkdir()
    assert draw(folder) == 0
    page = (folder / "report.html").read_text()
    assert "There are no records yet" in page and "python sweep.py T" in (folder / "summary.md").read_text()
    assert str(folder) in capsys.readouterr().err


@pytest.mark.parametrize("place", ["x-s1.json", "T/deeper/x-s1.json", "T/no-s1.json"])
def test_a_record_that_no_table_can_have_is_named(results, capsys, place):
    (results / "T" / "deeper").mkdir()
    record = json.loads(of_cell(results).read_text())
    if place == "T/no-s1.json":  # of a config that is no row's
        config = record["config"] | {"weight_decay": 0.05}
        record |= {"config": config, "run_id": Config.from_dict(config).run_id}
    (results / place).write_text(json.dumps(record))
    draw(results)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and place in told and draw(results, "--check") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Benches


def test_benches_alone_are_results(results, capsys):
    shutil.rmtree(results / "T")
    benched(results, "epyc-cpu", bench())
    assert draw(results) == 0 and capsys.readouterr().err == ""
    assert "## Speed\n" in (results / "summary.md").read_text()


def test_each_machine_and_size_gets_a_section_and_the_papers_size_is_first(results):
    benched(results, "a", bench())
    benched(results, "b", bench("paper", GPU))
    benched(results, "c", bench(machine=GPU))
    draw(results)
    page = (results / "summary.md").read_text()
    titles = [line for line in page.partition("## Speed\n")[2].splitlines() if line.startswith("#")]
    assert titles == ["### Paper size, NVIDIA H200", "### CPU size, AMD EPYC", "### CPU size, NVIDIA H200"]
    pictures = {name for name in written(results) if name.startswith("figures/speed")}
    assert pictures == {f"figures/speed_{name}.svg" for name in ("paper", "cpu", "cpu_2")}
    rows = (results / "tables" / "speed_cpu.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(bench()["measurements"])


def test_doubts_about_a_bench_are_told(results):
    weak = bench() | {
        "git": {"commit": "0" * 40, "dirty": True},
        "others": {"core_seconds": 200.0, "device_bytes": None},
    }
    benched(results, "epyc-cpu", weak)
    draw(results)
    page = (results / "summary.md").read_text()
    assert "**The code had uncommitted changes.** **Others took 25% of the cores' time: " in page
    assert "<b>The code had uncommitted changes.</b>" in (results / "report.html").read_text()


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: changed(path, quick=True), "a quick bench, which is too short to be evidence"),
        (lambda path: path.write_text("{"), "no record: not valid JSON"),
        (
            lambda path: shutil.copy(of_cell(path.parents[1]), path),
            "its format is 'charmoe record 2', expected 'charmoe bench 1'",
        ),
    ],
    ids=["quick", "truncated", "of a run"],
)
def test_a_bench_that_does_not_count_is_named_in_a_line_and_the_rest_is_drawn(results, capsys, damage, why):
    damage(benched(results, "epyc-cpu", bench()))
    assert draw(results) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("left out: results/bench/epyc-cpu.json: ") and why in told
    page = (results / "summary.md").read_text()
    assert "## Speed" not in page and why in page and draw(results, "--check") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Analyses


ROUTED = Table(
    "R", "What the experts do", SOURCE, "Of analyses.",
    (Row("moe4", "4 experts", "shakespeare_moe4"), Row("moe4_aux01", "balance 0.1", "shakespeare_moe4_aux01")),
    (View("What tells", ("about_character", "topic")),), of="analyses",
)  # fmt: skip


def analyse(results, monkeypatch):
    """Puts analyses of two rows beside the records, and a claim about them."""
    claim = Claim(
        id="R1",
        sentence="More is told.",
        table="R",
        pairs=(("moe4", "moe4_aux01"),),
        measures=("about_character",),
        holds=ABOVE_0,
        scales=("cpu",),
    )
    monkeypatch.setitem(papers.TABLES, "R", ROUTED)
    monkeypatch.setattr(papers, "CLAIMS", (*papers.CLAIMS, claim))
    machine = json.loads(of_cell(results).read_text())["machine"]
    for row in ROUTED.rows:
        for seed in (1, 2, 3):
            config = row.config_at("cpu", seed).to_dict()
            told = {"moe4": 0.5, "moe4_aux01": 0.3}[row.name] + 0.001 * seed
            path = results / "analysis" / f"{row.cell('cpu', seed)}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(analyses.text_of(analysed(told=told, machine=machine, **config)))


def test_analyses_get_tables_figures_verdicts_and_a_page(drawn_results, monkeypatch):
    analyse(drawn_results, monkeypatch)
    shutil.rmtree(drawn_results / "T")
    assert draw(drawn_results) == 0
    files = written(drawn_results)
    assert {"figures/R_cpu_load_by_row.svg", "figures/R_cpu_experts.svg", "tables/R_cpu.csv"} <= set(files)
    summary, page = files["summary.md"].decode(), files["report.html"].decode()
    assert "| R1 | More is told. | > 0 | cpu | held (provisional, n = 3) | +0.200 [" in summary
    assert "A Mixture-of-Experts layer has several MLPs" in page
    assert 'class="passage"' in page and '<span class="e0">' in page


def test_tables_of_records_are_the_same_beside_analyses(results, monkeypatch):
    analyse(results, monkeypatch)
    assert draw(results) == 0
    with_analyses = written(results)
    shutil.rmtree(results / "analysis")
    assert draw(results) == 0
    without = written(results)
    assert without["tables/T_cpu.csv"] == with_analyses["tables/T_cpu.csv"]
    assert "tables/R_cpu.csv" in with_analyses and "tables/R_cpu.csv" not in without
    assert "- R1: More is told." in without["summary.md"].decode()


def test_an_analysis_that_belongs_nowhere_or_is_damaged_is_named(results, monkeypatch, capsys):
    analyse(results, monkeypatch)
    folder = results / "analysis"
    (folder / "other-s1.json").write_text(analyses.text_of(analysed(seed=1, n_layer=3, title="three layers")))
    torn = folder / "moe4-cpu-s2.json"
    torn.write_text(torn.read_text()[:-100])
    assert draw(results) == 0
    said = capsys.readouterr().err
    assert "three layers: no table has a row of its config" in said and "moe4-cpu-s2.json: no record" in said


# ---------------------------------------------------------------------------------------------------------------------
# --latest


def local_run(folder, made, tail=""):
    """A run that is still training, with the evaluations of a finished one."""
    record = json.loads(of_cell(made).read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record["config"]))
    lines = [{"kind": "train", "step": 5, "loss": 2.0}, *({"kind": "eval", **line} for line in record["evaluations"])]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + tail)
    return folder


@pytest.mark.parametrize("place", ["a", "my runs/a", "copies/mine/a-s1.json"], ids=["a run", "runs", "records"])
def test_results_of_ones_own_runs_says_what_it_is_for_and_names_latest(results, made, tmp_path, monkeypatch, place):
    """Nothing is written; the command runs as printed."""
    monkeypatch.chdir(tmp_path)
    path, folder = tmp_path / place, tmp_path / Path(place).parts[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:  # the record of a run that is no row's, as copied by hand
        record = json.loads(of_cell(made).read_text())
        config = record["config"] | {"weight_decay": 0.05}
        path.write_text(json.dumps(record | {"config": config, "run_id": Config.from_dict(config).run_id}))
    else:
        local_run(path, made)
    before = sorted(folder.rglob("*"))
    for options in ([], ["--check"]):
        with pytest.raises(RecordError, match="--results draws tables, from a folder of records") as caught:
            draw(folder, *options)
    assert sorted(folder.rglob("*")) == before
    command = str(caught.value).rpartition("your own runs: ")[2]
    if path.suffix:
        assert command.endswith("--latest OUT_DIR …")
        return
    subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_run_among_records_is_named_and_the_records_are_drawn(results, made, capsys):
    local_run(results / "mine", made)
    assert draw(results) == 0
    assert "mine/config.json" in capsys.readouterr().err


def test_a_run_that_still_trains_is_drawn_from_its_whole_lines(made, tmp_path, capsys):
    run = local_run(tmp_path / "run", made, '\n{"kind": "ev')
    picture = tmp_path / "curves.png"
    assert plot_results.main(["--latest", str(run), str(tmp_path), "--output", str(picture)]) == 0
    told = capsys.readouterr().err
    assert "not a whole line" in told and "holds no run" in told and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no run"),
        ({"config.json": "{}", "metrics.jsonl": ""}, "no evaluation yet"),
        ({"config.json": "[1", "metrics.jsonl": ""}, "not the config of a run"),
        ({"config.json": "{}", "metrics.jsonl": "[1]\n"}, "no evaluation yet"),
        (
            {"config.json": "{}", "metrics.jsonl": '{"kind": "eval"}\n{"kind": "eval", "step": NaN}'},
            "no evaluation yet",
        ),
    ],
)
def test_a_folder_without_a_run_is_named(tmp_path, capsys, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match="none of these folders"):
        plot_results.main(["--latest", str(tmp_path), "--output", str(tmp_path / "curves.png")])
    assert message in capsys.readouterr().err


def told_apart(*identities):
    """label -> the seeds that `grouped` gives it, for runs of one title."""
    runs = [{"title": "A", "folder": f"run{i}", "identity": one} for i, one in enumerate(identities)]
    return {label: [run["identity"].config.seed for run in group] for label, group in latest.grouped(runs).items()}


def test_experiments_that_share_a_title_are_told_apart_and_never_averaged():
    """Options on the command line change the experiment, but not the title."""
    runs = [Identity(Config(seed=1)), Identity(Config(seed=2)), Identity(Config(seed=2, learning_rate=0.01))]
    assert told_apart(*runs) == {"A": [1, 2], "A, learning_rate=0.01": [2]}


def test_two_texts_of_one_name_are_never_averaged_and_one_text_of_two_names_is_one_experiment():
    one, other = "a" * 64, "b" * 64
    runs = [Identity(Config(seed=1, dataset="/x/small"), one), Identity(Config(seed=2, dataset="/x/small"), other)]
    runs += [Identity(Config(seed=3, dataset="small"), one), Identity(Config(seed=4, dataset="/x/small"))]
    assert told_apart(*runs) == {"A": [1, 3], "A, text bbbbbbbb": [2], "A, text unknown": [4]}


def test_a_run_that_is_not_straight_has_a_curve_of_its_own():
    runs = [Identity(Config(seed=seed), straight=seed != 2) for seed in (1, 2, 3)]
    assert told_apart(*runs) == {"A": [1, 3], "A, not straight (run1)": [2]}


def test_the_same_folder_twice_counts_once(made, tmp_path):
    run = local_run(tmp_path / "run", made)
    (tmp_path / "link").symlink_to(run)
    runs, left_out = latest.read_runs([str(run), f"{run}/", str(tmp_path / "link")])
    assert len(runs) == 1 and len(left_out) == 2 and "the same folder as" in left_out[0]


def test_a_local_run_has_the_unit_of_its_text(made, tmp_path):
    run = local_run(tmp_path / "run", made)
    config, data = json.loads((run / "config.json").read_text()), tmp_path / "data"
    for meta, unit in ((None, "symbol"), ({"unit": "byte"}, "byte")):
        if meta:
            data.mkdir()
            (data / "meta.json").write_text(json.dumps(meta))
        (run / "config.json").write_text(json.dumps(config | {"dataset": str(data)}))
        ((found,), _) = latest.read_runs([str(run)])
        assert found["unit"] == unit


def test_a_copy_of_a_run_counts_once_and_the_one_that_has_come_farther_counts(made, tmp_path):
    run = local_run(tmp_path / "run", made)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    early, copy = (Path(shutil.copytree(run, tmp_path / name)) for name in ("early", "copy"))
    (early / "metrics.jsonl").write_text("".join(lines[:2]))
    runs, left_out = latest.read_runs(map(str, (early, run, copy)))
    assert [one["folder"] for one in runs] == [str(run)]
    assert left_out == [f"{folder}: the same run as {run}, which counts once" for folder in (early, copy)]


def test_runs_with_other_losses_seed_text_or_config_are_no_copies(made, tmp_path):
    run = local_run(tmp_path / "run", made)
    folders, config = [run], json.loads((run / "config.json").read_text())
    changes = dict(seed=7, text_sha256="a" * 64, learning_rate=0.5, straight=False)
    for name, value in changes.items():
        folders.append(Path(shutil.copytree(run, tmp_path / name)))
        (folders[-1] / "config.json").write_text(json.dumps(config | {name: value}))
    folders.append(Path(shutil.copytree(run, tmp_path / "losses")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["clean"]["nats"] += 1e-9
    (folders[-1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, left_out = latest.read_runs(map(str, folders))
    assert len(runs) == 6 and not left_out


def test_the_text_of_an_older_folder_is_that_of_its_record(made, tmp_path):
    run = local_run(tmp_path / "run", made)
    shutil.copy(of_cell(made), run / "summary.json")
    ((found,), _) = latest.read_runs([str(run)])
    assert found["identity"].text_sha256 == json.loads(of_cell(made).read_text())["dataset"]["sha256"]
