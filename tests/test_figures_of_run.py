"""Pictures of a run's analysis: the right numbers, whatever is missing; readable in light and dark."""

import functools
import math
import re

import pytest
from analysed import COUNTS, SYMBOLS, analysed
from pictures import assert_readable, assert_stands_alone, lines_of, marks, panel

from analysis import analyses, annotation
from analysis.analyses import net
from data.characters import character_class
from report import figures_of_run, figures_of_specialisation, style
from report.figures_of_run import FIGURES_OF_RUN, of_run
from run import records

MACHINE = "AMD EPYC, 1 core, 1 thread, torch 2.13.0+cpu, float32"
RUN = ("experts", "load", "stability", "information", "ablation", "gradients")
LONG = "A title that cannot stand in one line of a picture, and that has $money$ in it, for whatever that is worth"
CASES = {
    "two": {},
    "dense": {"n_expert": 0},
    "one block": {"n_layer": 1, "n_expert": 8},
    "two experts": {"n_expert": 2, "expert_top_k": 2, "aux_loss": "none"},
    "unequal, leaky": {
        "n_layer": 5,
        "n_expert": 16,
        "n_expert_by_block": "16,0,2,4,8",
        "router_level": "sequence",
        "title": LONG,
    },
    "one expert": {"n_expert": 1, "aux_loss": "none"},
}


@functools.cache
def drawings(case):
    """{name: Drawing}"""
    return of_run(analysed(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_missing_numbers_leave_the_rest_readable(case):
    assert analyses.problems(analysed(**CASES[case])) == []
    expected = {"dense": ("gradients",), "one expert": tuple(name for name in RUN if name != "information")}
    assert tuple(drawings(case)) == expected.get(case, RUN)
    for name, drawing in drawings(case).items():
        assert_readable(name, drawing.figure, points=9.5)
        assert MACHINE in drawing.caption and "n = " in drawing.caption and "shakespeare_char" in drawing.caption, name
        assert drawing.caption.endswith(".") and drawing.alt.endswith("."), name
        assert not re.search(r"None|nan|\binf\b|  ", drawing.caption + drawing.alt), name
        if name in ("experts", "information"):
            assert "all 3,450 characters of validation" in drawing.caption, name
        if name in ("stability", "ablation"):
            assert "the first 1,000 characters of validation" in drawing.caption, name


@pytest.mark.parametrize("name", RUN)
def test_an_svg_stands_alone_in_light_and_dark(name):
    assert_stands_alone(name, style.svg(drawings("two")[name].figure))


def test_without_its_numbers_there_is_no_picture():
    for part, name in {"stability": "stability", "ablation": "ablation", "evolution": "load"}.items():
        assert FIGURES_OF_RUN[name](analysed() | {part: None}) is None
    assert figures_of_run.gradient_cosines(analysed() | {"router_gradients": [None, None], "conflicts": []}) is None
    rare = analysed()
    for layer in rare["layers"]:
        layer["counts"] = [[min(49, sum(of))] + [0] * 3 for of in layer["counts"]]
    assert figures_of_specialisation.expert_map(rare) is None


def test_incomparable_runs_have_a_dagger_and_its_reason():
    leaky = [(drawing, "† routing that sees later characters") for drawing in drawings("unequal, leaky").values()]
    other_text = figures_of_run.load_curves(analysed(canonical=False))
    for drawing, reason in (*leaky, (other_text, "† a text that is not the published data set (shakespeare_char)")):
        title = drawing.figure.get_suptitle().replace("\n", " ")
        assert f"{reason}." in drawing.caption and ", seed 1 †" in title and title.endswith(reason)
    assert all("†" not in of.caption + of.figure.get_suptitle() for of in drawings("two").values())


def tiles_of(axes):
    """{(expert, y): opacity}"""
    found = {}
    for patch in axes.patches:
        corners = patch.get_path().vertices.reshape(-1, 5, 2)
        for x, y in (corners.min(axis=1) + corners.max(axis=1)) / 2:
            found[round(x), round(y, 3)] = patch.get_alpha()
    return found


def test_a_tile_is_an_experts_share_of_a_characters_occurrences():
    analysis = analysed()
    drawing = figures_of_specialisation.expert_map(analysis)
    names = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
    places = drawing.figure.axes[0].get_yticks()
    for block, layer in enumerate(analysis["layers"]):
        found = tiles_of(panel(drawing, f"block {block}"))
        for name, y in zip(names, places):
            counts = layer["counts"][SYMBOLS.index(name)]
            for expert, count in enumerate(counts):
                opacity = found.pop((expert, round(y, 3)), 0)
                assert abs(opacity - count / sum(counts)) <= 0.025 + 1e-9, (block, name, expert)
        assert not found
    assert panel(drawing, "block 1").get_title() == "block 1\n45%"  # explained by the character


def test_characters_are_ordered_by_class_and_then_by_expert():
    """In block 1, whose choice the character explains better here, so that all blocks have its order."""
    analysis = analysed()
    layers = analysis["layers"]
    layers[0]["about"]["character"]["nats"] = 0.1 * layers[0]["entropy"]
    counts = layers[1]["counts"]
    for name, of in {"a": (0, 0, 200, 100), "e": (0, 0, 700, 100), "i": (500, 0, 0, 0), "c": (0, 9, 0, 291)}.items():
        counts[SYMBOLS.index(name)] = list(of)
    counts[SYMBOLS.index("d")] = [0, 400, 0, 0]
    drawing = figures_of_specialisation.expert_map(analysis)
    names = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
    # i goes to expert 0; e and a go to 2, e more so; d to 1, c to 3. o, with 49 occurrences, is not there.
    assert names == ["i", "e", "a", "d", "c", "A", "B", "space", "newline", "!"]
    assert COUNTS[SYMBOLS.index("o")] == 49
    groups = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert groups == ["vowel", "consonant", "capital", "punctuation"]  # space and newline say it themselves
    y = drawing.figure.axes[0].get_yticks()
    assert y[1] - y[0] == 1 and y[3] - y[2] == 1.5  # a gap between classes
    assert "the commonest expert in block 1" in drawing.caption and "10 characters" in drawing.caption


def test_only_the_commonest_characters_are_drawn(monkeypatch):
    monkeypatch.setattr(figures_of_specialisation, "MOST_CHARACTERS", 3)
    drawing = figures_of_specialisation.expert_map(analysed())
    names = {label.get_text() for label in drawing.figure.axes[0].get_yticklabels()}
    assert names == {"space", "e", "a"} and "the most frequent" in drawing.caption


def test_a_symbols_name_gives_its_class():
    symbols = [*map(chr, range(0x20, 0x7F)), "\n", "\t", "é", "世", "\u0301", "\x07"]
    for kind, values in (("characters", symbols), ("bytes", range(256))):
        for symbol in values:
            expected = character_class(symbol)
            assert figures_of_specialisation.class_of_name(annotation.name_of(symbol)) == expected, (kind, symbol)


def test_load_is_every_experts_share_beside_the_utilisation():
    analysis = analysed(n_expert=2)
    analysis["collapsed"] = [{"block": 1, "step": 200, "until": None}]
    analysis["evolution"] = {
        "steps": [0, 100, 200],
        "loads": [[[0.5, 0.5]] * 2, [[0.75, 0.25]] * 2, [[0.99, 0.01]] * 2],
    }
    drawing = figures_of_run.load_curves(analysis)
    assert "The router of block 1 had collapsed at step 200, and was at the end." in drawing.caption
    even, first, second = lines_of(panel(drawing, "block 0"))
    assert even[0][1] == 50 and first == [(0, 50), (100, 75), (200, 99)] and second[2] == (200, pytest.approx(1))
    bound, *used = lines_of(drawing.figure.axes[-1])
    assert bound[0][1] == records.COLLAPSED_BELOW
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert used[0][0] == (0, pytest.approx(1)) and used[1][1] == (100, pytest.approx(math.exp(entropy) - 1))
    assert used[0][2][1] < 0.1 and "1% to 99% (uses 6%)" in drawing.alt


def test_without_a_choice_no_utilisation_is_drawn():
    drawing = drawings("two experts")["load"]
    assert "collapsed" not in drawing.caption and {axes.get_title() for axes in drawing.figure.axes} == {
        "block 0",
        "block 1",
    }


def test_stability_is_agreement_chance_and_churn():
    analysis = analysed()
    drawing = figures_of_run.stability_curves(analysis)
    agreement, churn, character, _ = drawing.figure.axes
    of = analysis["stability"]["layers"][1]
    _, _, ours, chance = lines_of(agreement)
    assert ours == [(step, pytest.approx(100 * value)) for step, value in zip((0, 30, 100, 200), of["agreement"])]
    assert [y for _, y in chance] == [25] * 4 and agreement.get_lines()[3].get_linewidth() < 1
    assert lines_of(churn)[1] == [
        (step, pytest.approx(100 * value)) for step, value in zip((30, 100, 200), of["churn"][1:])
    ]
    assert [y for _, y in lines_of(character)[1]] == pytest.approx([100 * value for value in of["character"]])
    assert "block 0 from 50% at step 0 over 83% at step 100" in drawing.alt


def test_information_is_beyond_chance_beside_both_controls():
    analysis = analysed()
    drawing = figures_of_specialisation.information_bars(analysis)
    labels = [label.get_text() for label in panel(drawing, "block 0").get_yticklabels()]
    for block, layer in enumerate(analysis["layers"]):
        axes = panel(drawing, f"block {block}")
        widths = {labels[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axes.patches}
        for name, label in (("character", "the character"), ("frequency band", "its frequency")):
            assert widths[label] == pytest.approx(100 * net(layer["about"][name], layer))
        for name, told in {
            "place in the word": 20,
            "previous two": 11,
            "speaker": 8,
        }.items():  # and 0.01 nats by chance
            assert widths[f"+ {name}"] == pytest.approx(told)
        assert len(widths) == len(labels) == 9
        hollow = {labels[y]: x for x, y in marks(axes, "o", filled=False)}
        assert hollow["the character"] == pytest.approx(100 * layer["frozen"]["about"]["character"]["mean"])
        assert hollow["+ previous two"] == 15 and hollow.keys() == widths.keys()
        tables = {labels[y]: x for x, y in marks(axes, "D", filled=False)}
        assert set(tables) == {"the character", "its class", "its frequency"} and tables["the character"] == 100
        left = next(line for line in lines_of(axes) if len(line) == 2 and line[0][0] == line[1][0])
        assert left[0][0] == pytest.approx(100 * layer["entropy_given_character"] / layer["entropy"])
        assert [text.get_text() for text in axes.texts][:3] == [f"{50 - 5 * block}", "30", "10"]


def test_ablation_draws_single_experts_and_all_layers_at_once():
    analysis = analysed()
    drawing = figures_of_run.ablation_costs(analysis)
    for block in (0, 1):
        axes = panel(drawing, f"block {block}")
        points = [line[0] for line in lines_of(axes) if len(line) == 1]
        removed = analysis["ablation"]["removed"][block]
        assert points == [(pytest.approx(100 * of["share"]), of["nats"]) for of in removed]
        bars = [[y for _, y in path.vertices] for bar in axes.collections for path in bar.get_paths()]
        assert bars == [pytest.approx([of["nats"] - 0.003, of["nats"] + 0.003]) for of in removed]
    together = drawing.figure.axes[-1]
    labels = [label.get_text().replace("\n", " ") for label in together.get_yticklabels()]
    costs = {labels[y]: x for x, y in marks(together, "o")}
    assert costs["routing shuffled"] == 1.25 and costs["each character to its commonest expert"] == 0.2
    assert costs["k = 2"] == -0.04 and list(costs)[-1] == "all experts for each character"
    assert "−0.040 ± 0.003" in [text.get_text() for text in together.texts]
    analysis["ablation"] |= {"top_k": None, "hashed_all": None}
    fewer = figures_of_run.ablation_costs(analysis).figure.axes[-1].get_yticklabels()
    assert len(fewer) == len(labels) - 3


def test_a_single_expert_is_not_removed():
    assert not any(axes.get_title() for axes in drawings("one expert")["ablation"].figure.axes)


def test_cosines_are_drawn_beside_their_nulls():
    analysis = analysed()
    pulls, tokens = figures_of_run.gradient_cosines(analysis).figure.axes
    assert marks(pulls, "o") == [(0.1, 0), (pytest.approx(0.05), 1)]
    nulls = {(round(bar.get_x(), 6), round(bar.get_x() + bar.get_width(), 6)) for bar in pulls.patches}
    assert nulls == {(-0.09, 0.11), (-0.04, 0.05)}
    bars = [[x for x, _ in path.vertices] for bar in pulls.collections for path in bar.get_paths()]
    assert bars == [pytest.approx([0.02, 0.18]), pytest.approx([-0.03, 0.13])]
    assert marks(tokens, "s") == [(0.001, 0), (0.002, 1)] and marks(tokens, "o", filled=False) == [
        (0.0004, 0),
        (0.0004, 1),
    ]


def test_gradients_of_a_dense_model_are_labelled_dense():
    drawing = drawings("dense")["gradients"]
    (axes,) = drawing.figure.axes
    assert marks(axes, "^") == [(0.001, 0), (0.002, 1)] and not marks(axes, "s")
    assert [text.get_text() for text in drawing.figure.legends[0].get_texts()] == [
        "characters of a dense MLP",
        "chance, errors",
    ]
    assert "router" not in drawing.caption


def test_a_frozen_router_has_only_gradients_of_tokens():
    drawing = figures_of_run.gradient_cosines(analysed() | {"router_gradients": [None, None]})
    assert len(drawing.figure.axes) == 1 and "balancing" not in drawing.caption
