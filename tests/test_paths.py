"""Paths through the layers: routers whose numbers are known, the remaining bias, and what tables read."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from analysed import analysed
from test_information import EXPERTS, VALIDATION, plugin_entropy, text

from analysis import analyses, parts
from analysis.information import conditional_entropy, entropy, information, joined
from papers.measures import MEASURES

LAYERS = 4


def run_of(character_N, layers, level="token"):
    """A run of a model whose blocks 1, 2, … are MoE layers, with what parts.measure_paths reads."""
    config = SimpleNamespace(moe_layers=[*range(1, layers + 1)], router_level=level, block_size=64)
    return SimpleNamespace(annotations={"character": character_N}, seed=0, config=config)


def paths(first, character_N, level="token"):
    return parts.paths_of(run_of(character_N, len(first), level), first)


def read(name, found):
    return analyses.OF_PATHS[name](found)


def own_maps(generator, layers=LAYERS, size=60):
    """An expert for each character in each layer, drawn at random."""
    return generator.integers(0, EXPERTS, (layers, size))


# ---------------------------------------------------------------------------------------------------------------------
# Routers whose paths are known


def test_layers_that_choose_alike_have_as_many_paths_as_experts():
    character_N, generator = text()
    expert_N = np.where(generator.random(VALIDATION) < 0.5, character_N, generator.integers(0, 9, VALIDATION)) % EXPERTS
    found = paths([expert_N] * LAYERS, character_N)
    assert found["used"] == EXPERTS and read("effective", found) == pytest.approx(math.exp(entropy(expert_N)))
    assert found["entropy_given_character"] == conditional_entropy(expert_N, character_N) > 0.3
    assert found["about_character"]["nats"] == information(expert_N, character_N) > 0.1
    assert [pair["nats"] for pair in found["between_layers"]] == [entropy(expert_N)] * 6
    assert [pair["blocks"] for pair in found["between_layers"]] == [[1, 2], [1, 3], [1, 4], [2, 3], [2, 4], [3, 4]]
    assert read("between_layers", found) == pytest.approx(entropy(expert_N), abs=1e-4)


def test_hash_routing_leaves_nothing_open_and_the_path_tells_which_part_a_character_is_in():
    character_N, generator = text()
    maps = own_maps(generator, layers=2)
    found = paths(list(maps[:, character_N]), character_N)
    part_N = (maps[0] * EXPERTS + maps[1])[character_N]
    assert found["entropy_given_character"] == 0.0 and found["used"] == len(set(part_N.tolist())) <= EXPERTS**2
    assert found["about_character"]["nats"] == found["entropy"] == pytest.approx(plugin_entropy(part_N), abs=1e-4)
    shares = np.bincount(character_N, minlength=60) / VALIDATION
    by_hand = [
        shares[(maps[0] == one) & (maps[1] == other)].sum() for one in range(EXPERTS) for other in range(EXPERTS)
    ]
    assert read("effective", found) == pytest.approx(math.exp(-sum(p * math.log(p) for p in by_hand if p)), rel=1e-3)


def test_the_path_is_the_character_where_every_character_has_its_own():
    character_N, _ = text()
    digits = [character_N // EXPERTS**layer % EXPERTS for layer in range(LAYERS)]  # 60 of 256 paths
    found = paths(digits, character_N)
    assert found["used"] == 60 and found["about_character"]["nats"] == pytest.approx(found["entropy_of_character"])
    assert read("character", found) == pytest.approx(1, abs=0.002)


def test_independent_choices_tell_nothing_and_leave_all_open():
    character_N, generator = text()
    found = paths(list(generator.integers(0, EXPERTS, (LAYERS, VALIDATION))), character_N)
    assert found["used"] == EXPERTS**LAYERS and read("effective", found) == pytest.approx(EXPERTS**LAYERS, rel=1e-3)
    assert found["entropy_given_character"] == pytest.approx(LAYERS * math.log(EXPERTS), abs=0.02)
    about = found["about_character"]
    assert about["nats"] > 0.005  # all of it chance: see the bias below
    assert abs(about["nats"] - about["chance_mean"]) < 5 * about["chance_sd"] and abs(read("character", found)) < 1e-3
    assert all(abs(pair["nats"] - pair["chance_mean"]) < 1e-4 for pair in found["between_layers"])


def test_noise_in_one_layer_adds_its_entropy_to_the_path_and_takes_nothing_from_the_others():
    character_N, generator = text()
    maps = own_maps(generator, layers=3)[:, character_N]
    noise_N = generator.integers(0, EXPERTS, VALIDATION)
    found = paths([*maps, noise_N], character_N)
    assert found["entropy_given_character"] == pytest.approx(math.log(EXPERTS), abs=1e-3)
    assert analyses.net_nats(found["about_character"]) == pytest.approx(entropy(joined(*maps)), abs=0.02)
    for pair in found["between_layers"]:
        one, other = pair["blocks"]
        expected = 0 if other == 4 else information(maps[one - 1], maps[other - 1])
        assert analyses.net_nats(pair) == pytest.approx(expected, abs=1e-4)


def test_the_path_of_one_layer_is_its_expert():
    character_N, generator = text(length=3000)
    expert_N = generator.integers(0, EXPERTS, 3000)
    found = paths([expert_N], character_N)
    assert found["entropy"] == entropy(expert_N) and found["between_layers"] == []
    assert read("between_layers", found) is None


def test_the_control_is_the_mean_over_draws_of_random_routers_of_all_layers():
    character_N, generator = text(length=5000)
    maps = own_maps(generator)[:, character_N]
    constant = np.zeros_like(character_N)
    seen = SimpleNamespace(first=[character_N % EXPERTS] * LAYERS)
    found = parts.measure_paths(run_of(character_N, LAYERS), seen, [[map_N, constant] for map_N in maps])
    own = paths(list(maps), character_N)
    assert found["used"] == EXPERTS and found["frozen"]["used"]["mean"] == (own["used"] + 1) / 2
    assert found["frozen"]["character"]["mean"] == pytest.approx(read("character", own) / 2, rel=1e-2)
    assert found["frozen"]["between_layers"]["mean"] == pytest.approx(read("between_layers", own) / 2, rel=1e-2)
    assert {control["draws"] for control in found["frozen"].values()} == {2}


def test_layers_that_keep_their_expert_for_a_window_share_nothing_beyond_chance():
    """Both draw an expert a window of 64: shuffled characters take the 1,700 windows for 108,800 choices."""
    generator = np.random.default_rng(0)
    beyond = {"token": [], "sequence": []}
    for _ in range(8):
        first = np.repeat(generator.integers(0, EXPERTS, (2, 1700)), 64, axis=1)
        for level, nats in beyond.items():
            nats.append(read("between_layers", paths(list(first), generator.integers(0, 60, 108_800), level)))
    assert abs(np.mean(beyond["sequence"])) < 0.001 < np.mean(beyond["token"])


# ---------------------------------------------------------------------------------------------------------------------
# Bias


@pytest.mark.parametrize(
    "experts, concentration, low, high, chance",
    [  # concentration of the Dirichlet distribution of a character's experts in each layer; None: all equally likely
        (4, None, -0.02, 0, 0.02),  # 256 paths
        (4, 1.0, -0.03, 0, 0.03),
        (4, 0.2, -0.01, 0, 0.03),
        (8, None, -0.6, -0.4, 0.6),  # 4,096 paths
        (8, 1.0, -0.4, -0.2, 0.6),
        (8, 0.2, -0.1, -0.02, 0.4),
    ],
)
def test_the_bias_of_the_path_is_small_for_256_paths_and_lies_within_chance_for_more(
    experts, concentration, low, high, chance
):
    """Layers that are independent given the character. Truth: as in test_information.biases."""
    character_N, generator = text()
    first, truth = [], 0
    for _ in range(LAYERS):
        shares = np.full((60, experts), 1 / experts)
        if concentration:
            shares = generator.dirichlet(np.full(experts, concentration), 60)
        first.append((generator.random((VALIDATION, 1)) > shares.cumsum(1)[character_N, :-1]).sum(1))
        truth -= np.log(shares[character_N, first[-1]]).mean()
    found = paths(first, character_N)
    error = found["entropy_given_character"] - truth
    assert low < error < high and 0 < found["about_character"]["chance_mean"] < chance
    # H(path) has nearly no bias, so that the information has the error turned round: never beyond chance by more
    assert -error < found["about_character"]["chance_mean"] + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# What tables read

OF_PATHS = ("path_given_character", "character_in_path", "path_above_frozen", "layer_information", "paths",
            "distinct_paths")  # fmt: skip


def test_measures_of_paths_by_hand():
    analysis = analysed(n_layer=3, told=0.5)
    found = {name: MEASURES[name].read(analysis) for name in OF_PATHS}
    assert found == pytest.approx(
        {
            "path_given_character": 2.5 * (1 - 0.5),
            "character_in_path": 0.5,
            "path_above_frozen": 0.25,
            "layer_information": (0.1 + 0.2 + 0.3) / 3,
            "paths": math.exp(2.51),
            "distinct_paths": 12,
        }
    )


def test_one_layer_has_no_pairs():
    analysis = analysed(n_layer=1)
    assert analyses.problems(analysis) == []
    assert [name for name in OF_PATHS if MEASURES[name].read(analysis) is None] == ["layer_information"]


@pytest.mark.parametrize("kind", ["made before paths were measured", "dense"])
def test_analyses_without_paths_are_valid_and_their_measures_are_unknown(kind):
    analysis = analysed(n_expert=0 if kind == "dense" else 4)
    if kind != "dense":
        del analysis["paths"]
    assert analyses.problems(analysis) == []
    assert [MEASURES[name].read(analysis) for name in OF_PATHS] == [None] * 6


def test_the_committed_analyses_stay_readable():
    found, _ = analyses.read_all(parts.files.ROOT / "results")
    assert found and all("layers" in analysis for analysis in found)


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda analysis: analysis.update(paths=None), "expected every pair of [0, 1]"),
        (lambda analysis: analysis["paths"]["between_layers"].clear(), "expected every pair of [0, 1]"),
        (lambda analysis: analysis["paths"].pop("entropy"), "missing field 'entropy' in paths"),
        (lambda analysis: analysis["paths"]["about_character"].update(nats=None), "paths.about_character.nats is None"),
    ],
)
def test_paths_that_contradict_the_layers_or_the_schema_are_refused(change, why):
    analysis = analysed()
    change(analysis)
    assert any(why in problem for problem in analyses.problems(analysis))
