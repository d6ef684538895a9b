"""`~` is the home folder wherever a path is taken, also where no shell expands it: in `--key=~/a`, quotes and files."""

import pytest
from conftest import prepare_text, train_tiny

import analyze
import bench
import plot_results
import sample
import sweep
from run import progress
from run.settings import Config
from support.configurator import parse

PATHS = {
    Config: ["out_dir", "compile_cache"],
    sample.SampleConfig: ["out_dir"],
    analyze.Options: ["results"],
    bench.BenchConfig: ["json", "compare"],
    sweep.SweepOptions: ["out", "results", "pack"],
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home folder, in which nothing else works: a folder named ~ would be made in another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("cls, key", [(cls, key) for cls, keys in PATHS.items() for key in keys])
def test_a_key_that_is_a_path(home, cls, key):
    assert getattr(parse(cls, [f"--{key}=~/a/"]), key) == f"{home}/a/"
    assert getattr(parse(cls, [f"--{key}=a~"]), key) == "a~"


def test_config_files_and_the_paths_in_them(home):
    (home / "mine.py").write_text('out_dir = "~/runs/a"\nn_layer = 7\n')
    config = parse(Config, ["~/mine.py"])
    assert (config.out_dir, config.n_layer) == (f"{home}/runs/a", 7)
    assert "~/mine.py comes after" in progress.overridden_cpu_size("train.py", [str(progress.CPU_OVERLAY), "~/mine.py"])


def test_a_record_keeps_its_own_words():
    assert Config.from_dict({"out_dir": "~/a", "dataset": "~/data/b"}).out_dir == "~/a"


def test_a_run_is_trained_sampled_analysed_and_drawn(home, capsys):
    prepare_text(home / "data", "to be or not\n" * 400)
    assert train_tiny("~/data/words", "~/runs/a", max_iters=2, n_expert=2) == 0
    assert (home / "runs" / "a" / "summary.json").is_file()
    (home / "prompt.txt").write_text("to be")
    capsys.readouterr()
    assert sample.main(["--out_dir=~/runs/a", "--start=FILE:~/prompt.txt", "--device=cpu", "--max_new_tokens=1"]) == 0
    assert capsys.readouterr().out.startswith("to be")
    short = ["--ablation=False", "--gradient_batches=0", "--characters=64", "--sample_characters=0"]
    assert analyze.main(["~/runs/a", "--results=~/results", "--device=cpu", *short]) == 0
    assert (home / "results" / "analysis" / "a.json").is_file()
    assert plot_results.main(["--latest", "~/runs/a", "--output=~/curves.png"]) == 0
    assert (home / "curves.png").is_file()
    assert plot_results.main(["--results=~/results"]) == 0
    assert (home / "results" / "report.html").is_file()
