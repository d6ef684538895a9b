"""Routers whose informations are known, and how far the estimates are from the truth at the sizes that are used."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import information
from analysis.information import (
    BLOCKS,
    SHIFTED,
    SHUFFLED,
    agreement,
    chance_agreement,
    conditional_entropy,
    dense,
    effective_number,
    entropy,
    joined,
    measured,
)

VALIDATION = 111_540  # characters of shakespeare_char's validation split
EXPERTS = 4


def plugin_entropy(labels_N):
    return float(stats.entropy(np.unique(labels_N, return_counts=True)[1]))


def zipf(size):
    shares = 1 / np.arange(1, size + 1)
    return shares / shares.sum()


def text(size=60, length=VALIDATION, seed=0):
    """Characters (N,) drawn by Zipf's law, and the generator that drew them."""
    generator = np.random.default_rng(seed)
    return generator.choice(size, length, p=zipf(size)), generator


labels_of = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=60).map(lambda rows: np.array(rows).T)


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_entropies_by_hand():
    labels_N = np.array([0, 0, 0, 5])
    plugin = math.log(4) - 3 / 4 * math.log(3)
    assert plugin_entropy(labels_N) == pytest.approx(plugin)
    assert entropy(labels_N) == pytest.approx(plugin + 1 / 8) and plugin + 1 / 8 < math.log(2)
    assert entropy(np.array([0, 1])) == math.log(2)  # not ln 2 + 1/4: two values have no more
    assert entropy(np.zeros(9, dtype=np.int64)) == plugin_entropy(np.zeros(9, dtype=np.int64)) == 0.0


def test_a_conditional_entropy_is_corrected_within_each_value():
    labels_N = np.array([0, 0, 0, 0, 1, 0, 1, 2, 2, 2])
    given_N = np.array([9, 9, 9, 9, 9, 4, 4, 7, 7, 7])
    of_nine = math.log(5) - 4 / 5 * math.log(4) + 1 / 10
    of_four = math.log(2) + 1 / 4  # below ln 3, the most that three values have
    assert conditional_entropy(labels_N, given_N) == pytest.approx((5 * of_nine + 2 * of_four) / 10)
    assert conditional_entropy(labels_N[:7], given_N[:7]) == pytest.approx((5 * of_nine + 2 * math.log(2)) / 7)


def test_effective_number_of_experts_by_hand():
    assert effective_number([5, 5, 5, 5]) == pytest.approx(4)
    assert effective_number([7, 0, 0]) == 1 and effective_number([0, 0]) == 0
    assert effective_number([1, 1, 0]) == pytest.approx(2)


def test_agreement_by_hand():
    a, b = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 5])
    assert agreement(a, b) == 0.5
    assert chance_agreement(a, b) == pytest.approx(1 / 2 * 1 / 4 + 1 / 4 * 1 / 2)
    assert chance_agreement(a, a) == pytest.approx(1 / 4 + 1 / 16 + 1 / 16) and agreement(a, a) == 1


@pytest.mark.parametrize("largest", [3, 10**15])  # counted in a table, and sorted
def test_dense_labels_keep_their_order(largest):
    codes, count = dense(np.array([2, largest, 0, 2]))
    assert (codes.tolist(), count) == ([1, 2, 0, 1], 3) and codes.dtype == np.int64
    assert dense(np.array([], dtype=np.int64))[1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Routers whose information is known


def test_a_router_of_the_character_is_fully_explained_by_it():
    character_N, _ = text()
    expert_N = (np.arange(60) * 7 % EXPERTS)[character_N]
    assert conditional_entropy(expert_N, character_N) == 0.0
    found = measured(expert_N, character_N)
    assert found.nats == entropy(expert_N) > 0.9 and found.share == 1.0
    assert (found.values, found.draws) == (60, 5) and abs(found.chance_mean) < 4e-4
    assert information.information(expert_N, character_N, character_N) == 0.0


def test_nothing_adds_to_the_character_for_a_router_of_characters():
    character_N, generator = text()
    expert_N = (np.arange(60) % EXPERTS)[character_N]
    assert information.information(expert_N, generator.integers(0, 9, VALIDATION), character_N) == 0.0


@pytest.mark.parametrize("size", [8, 60, 10_000])
def test_an_independent_router_has_no_information_beyond_chance(size):
    about_N, generator = text(size)
    found = measured(generator.integers(0, EXPERTS, VALIDATION), about_N, draws=10)
    assert abs(found.nats - found.chance_mean) < 5 * found.chance_sd
    assert found.nats < {8: 1e-4, 60: 5e-4, 10_000: 0.12}[size]  # the last is all bias: see below
    assert found.share == pytest.approx(found.nats / math.log(EXPERTS), rel=1e-3)


def test_a_router_of_the_place_in_the_window():
    character_N, _ = text()
    expert_N = np.arange(VALIDATION) // 32 % EXPERTS
    place_N = np.arange(VALIDATION) % 128
    assert measured(expert_N, place_N).share == 1.0
    assert abs(information.information(expert_N, character_N)) < 5e-4
    found = information.information(expert_N, place_N, character_N)
    assert found == conditional_entropy(expert_N, character_N) and found == pytest.approx(math.log(EXPERTS), abs=5e-4)


def test_a_router_of_the_previous_character():
    character_N, _ = text(12)
    expert_N = np.roll(character_N, 1) % 3
    left = conditional_entropy(expert_N, character_N)
    assert information.information(expert_N, np.roll(character_N, 1), character_N) == left > 0.9
    assert abs(information.information(expert_N, character_N)) < 3e-4


def test_two_features_can_be_informative_together_and_not_alone():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 2, (2, VALIDATION))
    for known, other in ((a, b), (b, a)):
        assert abs(information.information(a ^ b, known)) < 1e-4
        found = measured(a ^ b, other, known)
        assert found.nats == pytest.approx(math.log(2), abs=1e-4) and abs(found.chance_mean) < 1e-4


def test_a_single_expert_has_no_entropy():
    character_N, _ = text(length=1000)
    assert measured(np.zeros(1000, dtype=np.int64), character_N) == (0.0, 0.0, 0.0, 0.0, len(set(character_N)), 5)


def test_a_character_that_is_always_the_same_tells_nothing():
    _, generator = text()
    assert information.information(generator.integers(0, EXPERTS, 1000), np.full(1000, 3)) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Laws


@settings(deadline=None)
@given(labels_of)
def test_chain_rule_of_the_plugin(labels):
    """The corrected ones have none: each is corrected for its own counts."""
    a, b, c = labels
    given_b = sum(np.mean(b == value) * plugin_entropy(a[b == value]) for value in set(b.tolist()))
    assert plugin_entropy(joined(a, b)) == pytest.approx(plugin_entropy(b) + given_b, abs=1e-12)
    whole = plugin_entropy(joined(a, b, c))
    assert whole <= plugin_entropy(joined(a, b)) + plugin_entropy(c) + 1e-12


@settings(deadline=None)
@given(labels_of)
def test_conditional_entropy_equals_its_formula(labels):
    a, b, _ = labels
    most = math.log(len(set(a.tolist())))
    expected = 0
    for value in set(b.tolist()):
        of = a[b == value]
        expected += len(of) * min(plugin_entropy(of) + (len(set(of.tolist())) - 1) / (2 * len(of)), most)
    assert conditional_entropy(a, b) == pytest.approx(expected / len(a), abs=1e-12)
    assert conditional_entropy(a, b) <= most + 1e-12
    assert conditional_entropy(a, joined(a, b)) == 0.0


@settings(deadline=None)
@given(labels_of, st.permutations(range(5)), st.sampled_from([1, 3, 10**12]), st.randoms())
def test_estimates_are_invariant_to_relabelling_and_order(labels, names, apart, random):
    a, b, c = labels
    before = [entropy(a), conditional_entropy(a, b), information.information(a, b), information.information(a, b, c)]
    order = list(range(len(a)))
    random.shuffle(order)
    a, b, c = ((np.array(names) * apart)[of][order] for of in labels)
    after = [entropy(a), conditional_entropy(a, b), information.information(a, b), information.information(a, b, c)]
    assert after == pytest.approx(before, abs=1e-12)


@settings(deadline=None)
@given(labels_of)
def test_joined_labels_are_equal_where_all_labels_are(labels):
    a, b, _ = labels
    codes = joined(a, b * 10**12)
    pairs = list(zip(a.tolist(), b.tolist()))
    assert sorted(set(zip(codes.tolist(), pairs))) == list(enumerate(sorted(set(pairs))))


# ---------------------------------------------------------------------------------------------------------------------
# Controls


def test_a_shift_is_at_least_a_tenth_of_the_text_either_way():
    generator = np.random.default_rng(0)
    starts = [int(np.argmax(information.shifted(np.arange(50) == 0, generator))) for _ in range(2000)]
    assert (min(starts), max(starts), len(set(starts))) == (5, 45, 41)
    turned = information.shifted(np.arange(50), generator)
    assert ((np.diff(turned) - 1) % 50 == 0).all()


@pytest.mark.parametrize("has_given", [False, True])
def test_shuffling_keeps_the_frequencies_only(has_given):
    character_N, generator = text(5, 4000)
    labels_N = np.arange(4000)
    out_N = information.shuffled(labels_N, generator, character_N if has_given else None)
    assert sorted(out_N) == list(range(4000)) and np.mean(out_N == labels_N) < 0.01
    kept = np.mean(character_N[out_N] == character_N)
    assert kept == 1 if has_given else kept == pytest.approx((zipf(5) ** 2).sum(), abs=0.05)


def test_chance_is_the_mean_and_sample_sd_of_the_draws():
    character_N, generator = text(length=2000)
    expert_N = generator.integers(0, EXPERTS, 2000)
    found = measured(expert_N, character_N, draws=2, seed=3, null=SHUFFLED)
    generator = np.random.Generator(np.random.PCG64(3))
    one, two = (information.information(information.shuffled(expert_N, generator), character_N) for _ in range(2))
    assert found.chance_mean == pytest.approx((one + two) / 2)
    assert found.chance_sd == pytest.approx(abs(one - two) / math.sqrt(2))


def test_shuffling_given_a_character_leaves_a_router_of_characters_as_it_is():
    character_N, generator = text(length=2000)
    found = measured(character_N % EXPERTS, generator.integers(0, 9, 2000), character_N, null=SHUFFLED)
    assert (found.nats, found.chance_mean, found.chance_sd) == (0, 0, 0)


def test_draws_depend_on_the_seed_alone():
    character_N, generator = text(length=2000)
    expert_N = generator.integers(0, EXPERTS, 2000)
    for null in information.NULLS:
        same = [measured(expert_N, character_N, seed=seed, null=null) for seed in (1, 1, 2)]
        assert same[0] == same[1] != same[2] and same[0].chance_sd > 0


def test_slow_drift_needs_shifting():
    """Expert and speaker both go on for long, and know nothing of each other: only the shifted null says so."""
    length, stretch = 40_000, 400
    beyond = {SHUFFLED: 0, SHIFTED: 0}
    for seed, null in product(range(10), beyond):
        generator = np.random.default_rng(seed)
        expert_N = np.repeat(generator.integers(0, EXPERTS, length // stretch), stretch)
        speaker_N = np.repeat(generator.integers(0, 5, length // 250), 250)
        found = measured(expert_N, speaker_N, draws=20, null=null)
        beyond[null] += abs(found.nats - found.chance_mean) > 4 * found.chance_sd
    assert beyond == {SHUFFLED: 10, SHIFTED: 0}


def test_related_about_and_given_need_shuffling():
    """Pairs of previous and present character: shifted ones are more, and so is their bias."""
    generator = np.random.default_rng(0)
    steps = generator.integers(1, 4, 20_000)
    character_N = np.cumsum(steps) % 60  # each is followed by one of three
    expert_N = generator.integers(0, EXPERTS, len(character_N))
    by = {
        null: measured(expert_N, np.roll(character_N, 1), character_N, draws=10, null=null)
        for null in information.NULLS
    }
    assert abs(by[SHUFFLED].nats - by[SHUFFLED].chance_mean) < 4 * by[SHUFFLED].chance_sd
    assert by[SHIFTED].chance_mean - by[SHIFTED].nats > 10 * by[SHIFTED].chance_sd


def test_blocks_keep_each_character_and_its_neighbours():
    out_N = information.rearranged(np.arange(10), 4, np.random.default_rng(1))
    assert sorted(out_N) == list(range(10))
    assert (np.diff(out_N) == 1).sum() >= 3 + 3 + 1
    assert len({tuple(information.rearranged(np.arange(10), 4, np.random.default_rng(i))) for i in range(60)}) == 6


def test_routing_by_window_needs_blocks():
    """One expert a window of 64, drawn at random: shuffling takes the windows for 64 independent characters."""
    beyond = {SHUFFLED: 0, BLOCKS: 0}
    for seed, null in product(range(10), beyond):
        generator = np.random.default_rng(seed)
        expert_N = np.repeat(generator.integers(0, EXPERTS, 1700), 64)
        passage_N = np.arange(len(expert_N)) * 16 // len(expert_N)
        found = measured(expert_N, passage_N, draws=20, null=null, block=64)
        beyond[null] += abs(found.nats - found.chance_mean) > 4 * found.chance_sd
    assert beyond == {SHUFFLED: 10, BLOCKS: 0}


def test_few_long_pieces_need_blocks():
    expert_N = np.arange(8000) // 500 % EXPERTS  # a router that is the passage
    by = {null: measured(expert_N, np.arange(8000) // 500, null=null) for null in information.NULLS}
    assert by[SHUFFLED].chance_mean < 0.01 and by[SHIFTED].chance_mean > by[SHIFTED].nats / 2
    assert by[BLOCKS].chance_mean < by[BLOCKS].nats / 3


# ---------------------------------------------------------------------------------------------------------------------
# Bias


def biases(contexts, router, seeds=4):
    """Mean errors of the corrected and of the plug-in H(expert | context) of text(contexts), in nats.

    router: "independent", experts in balance that know nothing; else the concentration of the Dirichlet distribution
    that each context's experts are drawn from, 1.0 for any, 0.2 for mostly one expert a context.

    The truth is taken as the mean of -ln P(expert | context) over what was drawn. Its expectation is that entropy, and
    it has the sampling error of the estimates, which so cancels.
    """
    errors = []
    for seed in range(seeds):
        context_N, generator = text(contexts, seed=seed)
        if router == "independent":
            shares = np.full((contexts, EXPERTS), 1 / EXPERTS)
        else:
            shares = generator.dirichlet(np.full(EXPERTS, router), contexts)
        expert_N = (generator.random((VALIDATION, 1)) > shares.cumsum(1)[context_N, :-1]).sum(1)
        truth = -np.log(shares[context_N, expert_N]).mean()
        plugin = plugin_entropy(joined(expert_N, context_N)) - plugin_entropy(context_N)
        errors.append((conditional_entropy(expert_N, context_N) - truth, plugin - truth))
    return np.mean(errors, axis=0)


def test_the_bias_of_sixty_characters_is_what_theory_says():
    """Independent and in balance, where the limit ln K matters most: the plug-in's bias is that of chi2 / (2N) with
    K - 1 degrees of freedom a character, and the limit leaves what of the correction would go beyond it."""
    corrected, plugin = biases(60, "independent")
    degrees = EXPERTS - 1
    beyond = stats.chi2(degrees).expect(lambda value: degrees - value, lb=0, ub=degrees)
    standard_error = math.sqrt(60 * 2 * degrees) / (2 * VALIDATION) / math.sqrt(4)
    assert plugin == pytest.approx(-60 * degrees / (2 * VALIDATION), abs=4 * standard_error)
    assert corrected == pytest.approx(-60 * beyond / (2 * VALIDATION), abs=4 * standard_error)
    assert beyond / degrees == pytest.approx(0.31, abs=0.005)  # the share that conditional_entropy tells of


@pytest.mark.parametrize(
    "contexts, router, most, share",
    [  # nats, and of the plug-in's bias
        (60, "independent", 3e-4, 0.4),
        (60, 1.0, 2e-4, 0.3),
        (60, 0.2, 2e-4, 0.3),
        (1000, "independent", 5e-3, 0.4),
        (1000, 1.0, 3e-3, 0.25),
        (1000, 0.2, 4e-3, 0.4),
    ],
)
def test_little_is_left_of_the_bias_up_to_a_thousand_contexts(contexts, router, most, share):
    corrected, plugin = biases(contexts, router)
    assert abs(corrected) < most and abs(corrected) < share * -plugin


@pytest.mark.parametrize("router, low, high", [("independent", -0.10, -0.08), (1.0, -0.08, -0.06), (0.2, -0.05, -0.03)])
def test_much_is_left_of_the_bias_of_ten_thousand_contexts(router, low, high):
    """What information.py's first lines say, so that nobody reads such a number without its chance."""
    corrected, plugin = biases(10_000, router)
    assert low < corrected < high and 0.6 < corrected / plugin < 0.75


def test_chance_is_the_bias_of_ten_thousand_contexts_where_there_is_no_relation():
    context_N, generator = text(10_000)
    found = measured(generator.integers(0, EXPERTS, VALIDATION), context_N)
    corrected, _ = biases(10_000, "independent")
    assert found.chance_mean == pytest.approx(-corrected, abs=0.002)
