"""From a folder of records to tables, figures, verdicts and one page, also when records are missing or damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from analysed import analysed
from benches import GPU, bench
from conftest import TINY

import plot_results
import train
from analysis import analyses
from papers.experiments import ABOVE, BELOW, OURS, Claim, Row, Table, View
from run.settings import Config

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2)


@pytest.fixture(scope="session")
def table(words):
    """Two rows that were run and one that was not, of models that train in a second."""
    options = {**TINY, "dataset": words, "lr_decay_iters": 0}
    rows = (
        Row("dense", "dense", "shakespeare_dense", options, scales=("cpu",)),
        Row(
            "moe4",
            "4 experts",
            "shakespeare_moe4",
            options,
            baseline="dense",
            published={"paper": 1.53},
            scales=("cpu",),
        ),
        Row("moe8", "8 experts", "shakespeare_moe8", options, baseline="dense", scales=("cpu",)),
    )
    return Table("T", "A table", OURS, "What it is for.", rows, (View("Loss", ("clean", "paper", "train_seconds")),))


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
def results(made, table, tmp_path, monkeypatch):
    """A copy of it, where plot_results.py knows this table and two claims."""
    claims = [
        Claim(name, f"{label} are better.", OURS, "T", ((row, "dense"),), ("clean", "paper"), "difference", BELOW,
              scales=("cpu",))
        for name, label, row in (("T1", "4 experts", "moe4"), ("T2", "8 experts", "moe8"))
    ]  # fmt: skip
    monkeypatch.setattr(plot_results, "TABLES", {"T": table})
    monkeypatch.setattr(plot_results, "CLAIMS", claims)
    monkeypatch.setattr(plot_results, "FIGURES", {"T": ("loss_curves", "loss_against_cost")})
    return Path(shutil.copytree(made, tmp_path / "results"))


def draw(results, *options):
    return plot_results.main(["--results", str(results), *options])


def drawn(results):
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


def test_everything_is_drawn_from_the_records(results, capsys):
    assert draw(results) == 0
    files = drawn(results)
    assert set(files) == {
        "summary.md", "report.html", "tables/T_cpu.csv", "tables/T_cpu.tex",
        "figures/T_cpu_loss_curves.svg", "figures/T_cpu_loss_against_cost.svg", "figures/T_cpu_differences.svg",
    }  # fmt: skip
    for name in ("summary.md", "report.html"):
        page = files[name].decode()
        assert "4 experts are better." in page and "± " in page and "(2)" in page
    assert "`python sweep.py T --scale=cpu --seeds=5`" in files["summary.md"].decode()
    assert "Regime: " in files["summary.md"].decode()
    assert "| 8 experts | not run |" in files["summary.md"].decode()
    assert "wrote " in capsys.readouterr().out


def test_the_same_records_give_the_same_bytes_in_another_process(results):
    draw(results)
    before = drawn(results)
    draw(results)
    assert drawn(results) == before


def test_check_is_content_with_what_was_drawn_and_writes_nothing(results, capsys):
    assert draw(results, "--check") == 1 and not (results / "report.html").exists()
    draw(results)
    capsys.readouterr()
    assert draw(results, "--check") == 0 and "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["summary.md", "report.html", "tables/T_cpu.csv", "figures/T_cpu_loss_curves.svg"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_check_names_what_is_stale(results, capsys, name, damage):
    draw(results)
    path = results / name
    path.write_bytes(path.read_bytes() + b" ") if damage == "changed" else path.unlink()
    capsys.readouterr()
    assert draw(results, "--check") == 1
    told = capsys.readouterr().out
    assert f"{name} is {'out of date' if damage == 'changed' else 'missing'}" in told and told.count(" is ") == 1


def test_check_sees_a_record_that_came_or_went(results, capsys):
    draw(results)
    of_cell(results).unlink()
    assert draw(results, "--check") == 1


def test_what_no_record_gives_any_more_is_removed(results, capsys):
    draw(results)
    (results / "figures" / "T_paper_loss_curves.svg").write_text("old")
    assert draw(results, "--check") == 1
    assert "T_paper_loss_curves.svg is drawn from nothing any more" in capsys.readouterr().out
    draw(results)
    assert draw(results, "--check") == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_text("[]"),
        lambda path: changed(path, iterations=1),
        lambda path: changed(path, epochs=float("nan")),
        lambda path: path.rename(path.with_name("moe4-cpu-s7.json")),
    ],
    ids=["truncated", "a list", "contradiction", "NaN", "another seed's name"],
)
def test_a_record_that_does_not_count_is_named_in_a_line_and_the_rest_is_drawn(results, capsys, damage):
    damage(of_cell(results))
    assert draw(results) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("left out: ") and "moe4-cpu-s" in told
    page = (results / "summary.md").read_text()
    assert "(n = 1)" in page and "± " in page and "## Records left out" in page
    assert "Records left out" in (results / "report.html").read_text()


def test_of_two_records_of_one_cell_neither_counts_unless_they_are_the_same(results, capsys):
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
    assert "| 4 experts † |" in page and "(n = 1)" in page


def test_a_table_of_which_no_run_counts_is_shown_as_such(results):
    for path in (results / "T").glob("*.json"):
        changed(path, git={"commit": None, "dirty": None})
    draw(results)
    page = (results / "summary.md").read_text()
    assert "Regime: no run that counts." in page and "| dense † | not run |" in page and "4 experts, seed 1, " in page


def test_another_machine_gets_tables_of_its_own(results):
    record = json.loads(of_cell(results).read_text())
    changed(of_cell(results), machine=record["machine"] | {"device": "Another CPU"})
    draw(results)
    page = (results / "summary.md").read_text()
    assert page.count("## A table (T, CPU size)") == 2 and "Machine: Another CPU, " in page
    assert page.count("(2)") == 3  # dense on the first machine: clean, the papers' way, time
    assert any("_2.svg" in name for name in drawn(results))


def test_benches_are_drawn_beside_the_runs(results, capsys):
    benched(results, "epyc-cpu", bench())
    assert draw(results) == 0 and draw(results, "--check") == 0
    assert capsys.readouterr().err == ""
    files = drawn(results)
    assert {name for name in files if "speed" in name} == {
        "figures/speed_cpu.svg", "tables/speed_cpu.csv", "tables/speed_cpu.tex",
    }  # fmt: skip
    for name in ("summary.md", "report.html"):
        page = files[name].decode()
        assert "Speed (CPU size, AMD EPYC)" in page and "Speed. Decoding: a step gives each sequence" in page
        assert "180 GFLOP/s and 12.5 GB/s" in page and "commit 0123456" in page and "uncommitted" not in page
        assert "4 experts are better." in page  # what was there is still there
    page = files["summary.md"].decode()
    assert "](figures/speed_cpu.svg)" in page and "| 4 experts, top-1 | 1.22 [1.18, 1.26] | 54.9 [53.3, 56.5] |" in page


def test_benches_alone_are_results(results, capsys):
    shutil.rmtree(results / "T")
    benched(results, "epyc-cpu", bench())
    assert draw(results) == 0 and capsys.readouterr().err == ""
    assert "## Speed (CPU size" in (results / "summary.md").read_text()


def test_each_machine_and_size_gets_a_section_and_the_papers_size_is_first(results):
    benched(results, "a", bench())
    benched(results, "b", bench("paper", GPU))
    benched(results, "c", bench(machine=GPU))
    draw(results)
    page = (results / "summary.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("## Speed")]
    assert titles == [f"## Speed ({of})" for of in ("paper size, NVIDIA H200", "CPU size, AMD EPYC",
                                                    "CPU size, NVIDIA H200")]  # fmt: skip
    pictures = {name for name in drawn(results) if name.startswith("figures/speed")}
    assert pictures == {f"figures/speed_{name}.svg" for name in ("paper", "cpu", "cpu_2")}
    rows = (results / "tables" / "speed_cpu.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(bench()["measurements"])


def test_a_bench_that_is_weak_evidence_is_marked(results):
    weak = bench() | {
        "git": {"commit": "0" * 40, "dirty": True},
        "others": {"core_seconds": 200.0, "device_bytes": None},
    }
    benched(results, "epyc-cpu", weak)
    draw(results)
    page = (results / "summary.md").read_text()
    assert "**The code had uncommitted changes.** **Others took 25% of the cores' time: " in page
    assert "<b>The code had uncommitted changes.</b>" in (results / "report.html").read_text()
    assert page.count("Others took 25% of the cores' time") == 2  # above the tables, and under the picture


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: changed(path, quick=True), "a quick bench, which is too short to be evidence"),
        (lambda path: changed(path, measurements=[]), "measurements: expected one or more"),
        (lambda path: path.write_text("{"), "no record: not valid JSON"),
        (lambda path: shutil.copy(of_cell(path.parents[1]), path), "it is a record of train.py"),
    ],
    ids=["quick", "contradiction", "truncated", "of a run"],
)
def test_a_bench_that_does_not_count_is_named_in_a_line_and_the_rest_is_drawn(results, capsys, damage, why):
    damage(benched(results, "epyc-cpu", bench()))
    assert draw(results) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("left out: results/bench/epyc-cpu.json: ") and why in told
    page = (results / "summary.md").read_text()
    assert "## Speed" not in page and why in page and draw(results, "--check") == 1


def test_what_a_bench_left_is_removed_with_it(results, capsys):
    path = benched(results, "epyc-cpu", bench())
    draw(results)
    path.unlink()
    assert draw(results, "--check") == 1
    assert "figures/speed_cpu.svg is drawn from nothing any more" in capsys.readouterr().out
    draw(results)
    assert not [name for name in drawn(results) if "speed_" in name]


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "missing"])
def test_no_records_at_all_is_a_page_that_says_how_to_make_them(results, empty, tmp_path, capsys):
    folder = tmp_path / "nothing"
    if empty:
        folder.mkdir()
    assert draw(folder) == 0
    page = (folder / "report.html").read_text()
    assert "There are no records yet" in page and "python sweep.py T" in (folder / "summary.md").read_text()
    assert str(folder) in capsys.readouterr().err


def test_files_of_others_stay_where_they_are(results):
    (results / "figures" / "more").mkdir(parents=True)
    thesis = results / "figures" / "thesis.pdf"
    thesis.write_text("mine")
    draw(results)
    assert thesis.read_text() == "mine" and draw(results, "--check") == 0


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


def test_a_read_only_folder_is_one_clear_line(made, table, tmp_path):
    """In another process, for a message is told by the script; root may write anywhere, so a file is in the way."""
    folder = Path(shutil.copytree(made, tmp_path / "results"))
    (folder / "summary.md").mkdir()
    done = subprocess.run(
        [sys.executable, "plot_results.py", "--results", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "summary.md: Is a directory" in done.stderr.splitlines()[-1]


def test_the_committed_results_are_what_their_records_give():
    """What --check does in CI, for those who only run the tests."""
    done = subprocess.run([sys.executable, "plot_results.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_that_draws_needs_torch():
    program = "import sys, plot_results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


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


def test_a_run_that_still_trains_is_drawn_from_its_whole_lines(made, tmp_path, capsys):
    run = local_run(tmp_path / "run", made, '\n{"kind": "ev')
    picture = tmp_path / "curves.png"
    assert plot_results.main(["--latest", str(run), "--output", str(picture)]) == 0
    assert "not a whole line" in capsys.readouterr().err and picture.stat().st_size > 10_000


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
def test_a_folder_without_a_run_is_named_and_the_others_are_drawn(made, tmp_path, capsys, files, message):
    bad, picture = tmp_path / "bad", tmp_path / "curves.png"
    bad.mkdir()
    for name, content in files.items():
        (bad / name).write_text(content)
    with pytest.raises(plot_results.RecordError, match="none of these folders"):
        plot_results.main(["--latest", str(bad), "--output", str(picture)])
    run = local_run(tmp_path / "run", made)
    plot_results.main(["--latest", str(bad), str(run), "--output", str(picture)])
    assert message in capsys.readouterr().err and picture.exists()


def test_experiments_that_share_a_title_are_told_apart_and_never_averaged():
    """Options on the command line change the experiment, but not the title."""
    runs = [{"title": "A", "config": Config(seed=1).to_dict()}, {"title": "A", "config": Config(seed=2).to_dict()}]
    runs.append({"title": "A", "config": Config(seed=2, learning_rate=0.01).to_dict()})
    assert plot_results.labelled(runs) == {"A": runs[:2], "A, learning_rate=0.01": runs[2:]}


# ---------------------------------------------------------------------------------------------------------------------
# Analyses


ROUTED = Table(
    "R", "What the experts do", OURS, "Of analyses.",
    (Row("moe4", "4 experts", "shakespeare_moe4"), Row("moe4_aux01", "balance 0.1", "shakespeare_moe4_aux01")),
    (View("What tells", ("about_character", "topic")),), of="analyses",
)  # fmt: skip


@pytest.fixture
def routed(results, monkeypatch):
    """results/ with analyses of two rows beside the records, and a claim about them."""
    claim = Claim("R1", "More is told.", OURS, "R", (("moe4", "moe4_aux01"),), ("about_character",), "difference",
                  ABOVE, scales=("cpu",))  # fmt: skip
    monkeypatch.setattr(plot_results, "TABLES", {**plot_results.TABLES, "R": ROUTED})
    monkeypatch.setattr(plot_results, "CLAIMS", [*plot_results.CLAIMS, claim])
    monkeypatch.setattr(plot_results, "FIGURES", {**plot_results.FIGURES, "R": ("load_by_row", "information_by_row")})
    machine = json.loads(of_cell(results).read_text())["machine"]
    for row in ROUTED.rows:
        for seed in (1, 2, 3):
            config = row.config_at("cpu", seed).to_dict()
            told = {"moe4": 0.5, "moe4_aux01": 0.3}[row.name] + 0.001 * seed
            path = results / "analysis" / f"{row.cell('cpu', seed)}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(analyses.text_of(analysed(told=told, machine=machine, **config)))
    return results


def test_analyses_get_tables_figures_verdicts_and_a_page(routed, capsys):
    assert draw(routed) == 0
    files = drawn(routed)
    assert {"figures/R_cpu_load_by_row.svg", "figures/R_cpu_experts.svg", "tables/R_cpu.csv"} <= set(files)
    summary, page = files["summary.md"].decode(), files["report.html"].decode()
    assert "| R1 | More is told. | cpu | held (provisional, n = 3) | +0.200 [" in summary
    assert "A Mixture-of-Experts layer has several MLPs" in page
    assert 'class="passage"' in page and '<span class="e0">' in page
    assert draw(routed, "--check") == 0


def test_tables_of_records_are_the_same_beside_analyses(routed, results):
    assert draw(routed) == 0
    with_analyses = drawn(routed)
    shutil.rmtree(routed / "analysis")
    assert draw(routed) == 0
    without = drawn(routed)
    assert without["tables/T_cpu.csv"] == with_analyses["tables/T_cpu.csv"]
    assert "figures/R_cpu_load_by_row.svg" not in without
    assert "| R1 | More is told. | cpu | not run |" in without["summary.md"].decode()


def test_an_analysis_that_belongs_nowhere_or_is_damaged_is_named(routed, capsys):
    folder = routed / "analysis"
    (folder / "other-s1.json").write_text(analyses.text_of(analysed(seed=1, n_layer=3, title="three layers")))
    torn = folder / "moe4-cpu-s2.json"
    torn.write_text(torn.read_text()[:-100])
    assert draw(routed) == 0
    said = capsys.readouterr().err
    assert "three layers: its config is that of no row of a table" in said and "moe4-cpu-s2.json: no record" in said
