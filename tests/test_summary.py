"""results/summary.md: short, and without the loss of a number that was measured."""

import dataclasses
import math

import pytest
from test_papers import record as skeleton

import papers
from papers import TABLES
from papers.table import View
from report import sections, summary, wording
from report.blocks import Picture
from report.captions import first_sentence
from report.sections import results_of

CPU = "AMD EPYC, 1 core, 1 thread, torch 2, float32"
H200 = "NVIDIA H200, torch 2, bfloat16"


def record(row="shakespeare_moe4", seed=1, device="AMD EPYC", **changes):
    made = skeleton(row, seed, device=device, **changes)
    made["dataset"] |= {"splits": {"train": 1_003_854}}
    return made | {"epochs": 1.53, "parameters": {"total": 2_379_008}}


@pytest.fixture
def summary_of(monkeypatch):
    """Records -> summary.md of two tables with the rows of C, and one picture each."""
    view = View("Loss", ("clean", "paper"))
    tables = {
        name: dataclasses.replace(TABLES["C"], name=name, title=f"Is {name} worth it?", views=(view,), rows=rows)
        for name, rows in {"C": TABLES["C"].rows, "C2": TABLES["C"].rows[:1]}.items()
    }
    claims = tuple(claim for claim in papers.CLAIMS if claim.table == "C")
    monkeypatch.setattr(papers, "TABLES", tables)
    monkeypatch.setattr(papers, "CLAIMS", claims)
    monkeypatch.setattr(papers, "TUNED_CLAIMS", ())
    caption = "Is C worth it?: loss, 1.5 nats at best. Line: mean. n = 5 seeds per row. AMD EPYC."
    picture = Picture("<svg/>", caption, "Curves of loss: learned 1.5.")
    monkeypatch.setattr(sections, "drawings_of", lambda comparison, shown: {"loss": "a drawing"})
    monkeypatch.setattr(sections, "picture_of", lambda drawing: picture)
    return lambda *found: summary.summary_markdown(results_of(list(found), [], [], []))


@pytest.mark.parametrize(
    "machines, names",
    [
        ([CPU], ["AMD EPYC"]),
        ([CPU, H200], ["AMD EPYC", "NVIDIA H200"]),
        ([H200, f"{H200}, compiled"], ["NVIDIA H200", "NVIDIA H200, compiled"]),
        ([CPU, CPU.replace("1 core", "2 cores")], ["AMD EPYC, 1 core", "AMD EPYC, 2 cores"]),
        (["Intel(R) Xeon(R) Processor, 1 core"], ["Intel Xeon"]),
    ],
)
def test_a_machine_is_called_by_what_distinguishes_it(machines, names):
    assert list(wording.machine_names(machines).values()) == names


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"holds": (-math.inf, 0.0)}, "< 0"),
        ({"holds": (-0.005, math.inf)}, "> -0.005 nats"),
        ({"holds": (-0.02, 0.02)}, "in ±0.02 nats"),
        ({"holds": (0.035, 0.105)}, "0.035 to 0.105 nats"),
        ({"holds": (0.0, 0.85), "is_ratio": True}, "< 0.85 ×"),
        ({"holds": (1.2, math.inf), "is_ratio": True}, "> 1.2 ×"),
        ({"holds": (1.2, math.inf), "measures": ("load_cv2",), "pairs": (("a", ""),)}, "> 1.2"),
        ({"is_ratio": True, "cost": "train_seconds"}, "steps × above training ×"),
    ],
)
def test_the_bounds_of_a_claim_fit_a_column(changes, text):
    assert wording.short_bounds(dataclasses.replace(papers.CLAIMS[0], **changes)) == text


def test_every_claim_has_bounds_that_fit_a_column():
    assert all(1 < len(wording.short_bounds(claim)) < 40 for claim in papers.CLAIMS)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("loss of 0.07 nats. Line: mean.", "Loss of 0.07 nats."),
        ("Which expert? Opacity: share.", "Which expert?"),
        ("no full stop", "No full stop"),
    ],
)
def test_the_first_sentence_of_a_caption(text, sentence):
    assert first_sentence(text) == sentence


def test_the_table_of_verdicts_says_where_a_claim_holds(summary_of):
    page = summary_of(*(record(row.name, seed) for row in TABLES["C"].rows for seed in (1, 2)))
    assert "| | claim | holds if | scale | verdict | effect |" in page
    assert "| C1 | A frozen random router is about as good as a learned one. | in ±0.02 nats | cpu | " in page


def test_machines_are_explained_once_and_named_in_short(summary_of):
    page = summary_of(record(), record("shakespeare_moe4_frozen", device="Another CPU"))
    assert page.count("1 core, 1 thread") == 2
    assert "- **AMD EPYC**: 1 core, 1 thread, torch 2.13.0, float32" in page and "### CPU size, Another CPU" in page


def test_a_figure_has_one_short_caption_and_the_regime_is_told_once(summary_of):
    page = summary_of(*(record(row.name) for row in TABLES["C"].rows))
    section = page.partition("### ")[2].partition("## ")[0]
    assert "\n![Curves](figures/C_cpu_loss.svg)\n\nLoss, 1.5 nats at best.\n" in section
    assert "Line: mean" not in page and "seeds per row" not in page and section.count("AMD EPYC") == 1


def test_rows_that_were_not_run_are_one_line(summary_of):
    page = summary_of(record(), record("shakespeare_moe4_frozen"))
    assert "- Not run: random. `python sweep.py C --scale=cpu --seeds=5`" in page
    assert "| not run |" not in page.partition("## Is C")[2] and page.count("random") < 8


def test_numbers_of_the_same_runs_are_told_once_where_a_table_has_no_other_row(summary_of):
    page = summary_of(record(), record("shakespeare_moe4_frozen"))
    assert page.partition("(C2)\n")[2].endswith("- Only “learned” was run here. Its numbers stand in table C.\n")
    alone = summary_of(record(nats=1.5))
    assert alone.count("best full validation, nats: 1.5000 (n = 1)") == 1 and "figures/" not in alone
    assert alone.count("`python sweep.py C --scale=cpu --seeds=5`") > 1  # for verdicts and rows


def test_claims_that_were_not_run_stand_under_their_command_and_only_once(summary_of):
    page = summary_of(record(), record("shakespeare_moe4_frozen"))
    folded = page.partition("<details>")[2].partition("</details>")[0]
    assert folded.startswith("\n<summary>3 not run</summary>\n")
    assert "`python sweep.py C --scale=paper --seeds=5`:\n\n- C1: see the table above\n" in folded
    command = "`python sweep.py C --scale=paper --seeds=5` or `python sweep.py C --scale=cpu --seeds=5`:"
    assert f"{command}\n\n- C2: A router drawn anew each step is worse than a learned one.\n" in folded
