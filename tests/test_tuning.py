"""Tuned rows: which candidate is chosen, which runs that needs, and what tables, verdicts and pages make of it."""

import pytest
from test_papers import record

import papers
from papers import TABLES, tuning
from papers.measures import MEASURES
from papers.table import SCALES, gather
from papers.tuned import TUNED, at_best_rate
from report.cells import notes_on_choices
from report.sections import compares_candidates, tells_less, verdicts_of_machines
from report.verdicts import HELD, decide

LOSSES = {"low": {1337: 1.9}, "middle": {1337: 1.7}, "high": {1337: 1.8}}
ALL = {
    **LOSSES,
    "middle": {1337: 1.7, 1338: 1.9, 1339: 1.9, 1340: 1.0},
    "high": {1337: 1.8, 1338: 1.8, 1339: 1.8},
}


def test_the_better_of_two_finalists_is_chosen_on_three_seeds_and_no_fresh_one():
    choice = tuning.choose(ALL)
    assert choice.name == "high" and 1340 not in choice.losses["middle"]
    assert choice.is_at_edge and not choice._replace(name="middle").is_at_edge


def test_nothing_is_chosen_before_all_seeds_are_there():
    assert tuning.choose(LOSSES).name is None
    assert tuning.choose({**ALL, "low": {}}).name is None
    assert tuning.choose({**ALL, "high": {1337: 1.8, 1338: 1.8}}).name is None


def test_runs_are_asked_for_in_stages():
    first = [("low", 1337), ("middle", 1337), ("high", 1337)]
    finalists = [(name, seed) for name in ("middle", "high") for seed in (1338, 1339)]
    assert list(tuning.asked({**LOSSES, "high": {}}, 0, 2)) == first
    assert list(tuning.asked(LOSSES, 0, 2)) == [*first, *finalists]
    assert list(tuning.asked(ALL, 0, 2)) == [*first, *finalists, ("high", 1340), ("high", 1341)]


def test_candidates_in_reserve_follow_while_the_last_that_was_tried_is_the_best():
    losses = {"a": {1337: 1.9}, "b": {1337: 1.8}, "c": {}, "d": {}}
    assert [name for name, _ in tuning.asked(losses, 2, 1)] == ["a", "b", "c"]
    losses["c"] = {1337: 1.7}
    assert [name for name, _ in tuning.asked(losses, 2, 1)] == ["a", "b", "c", "d"]
    losses["c"] = {1337: 1.85}
    assert {name for name, _ in tuning.asked(losses, 2, 1)} == {"a", "b", "c"}
    assert tuning.finalists(losses, 2) == ["b", "c"]
    losses["a"] = {1337: 1.7}
    assert tuning.finalists({**losses, "c": {}}, 2) == ["a", "b"]


def records_of(model, losses, device="a CPU", fresh=()):
    """losses: of the candidate rates, on the seeds of the choice; fresh: of the best one on fresh seeds."""
    row = TUNED.row(model)
    named = list(zip(row.experiments_at("cpu"), losses))
    made = [(candidate, seed, nats) for candidate, nats in named for seed in tuning.CHOOSING]
    best = min(named, key=lambda pair: pair[1])[0]
    made += [(best, tuning.FIRST_FRESH + number, nats) for number, nats in enumerate(fresh)]
    return [made_record(candidate, seed, nats, device) for candidate, seed, nats in made]


def made_record(candidate, seed, nats, device):
    found, config = record(seed=seed, device=device, nats=nats), candidate.config_at("cpu", seed)
    return found | {"run_id": config.run_id, "config": config.to_dict()}


DENSE = records_of("shakespeare_dense", (1.91, 1.82, 1.78, 1.79), fresh=(1.80, 1.81, 1.82, 1.83, 1.84))
MOE4 = records_of("shakespeare_moe4", (1.86, 1.78, 1.79, 1.99), fresh=(1.79, 1.80, 1.81, 1.82, 1.83))


def test_a_tuned_row_has_the_records_of_its_best_rate_on_fresh_seeds_only():
    (comparison,) = gather(TUNED, DENSE + MOE4, "cpu")
    values = comparison.values("shakespeare_dense", "clean")
    assert values == dict(zip(range(1340, 1345), (1.80, 1.81, 1.82, 1.83, 1.84)))
    assert {*comparison.values("shakespeare_dense", "chosen_rate").values()} == {4e-3}
    assert {*comparison.values("shakespeare_moe4", "chosen_rate").values()} == {2e-3}
    assert comparison.values("shakespeare_dense", "rate8") == dict.fromkeys(tuning.CHOOSING, 1.79)
    assert not comparison.cells["shakespeare_moe8"]


def test_every_rate_that_may_be_tried_has_a_column():
    for table in (table for table in TABLES.values() if any(row.candidates for row in table.rows)):
        columns = {MEASURES[measure].heading for measure in table.views[0].measures}
        tried = [(of, scale) for scale in SCALES for of in table.experiments_at(scale)]
        assert {f"{of.config_at(scale).learning_rate:g}" for of, scale in tried} <= columns, table.name


def test_a_choice_may_come_from_another_machine_and_means_may_not():
    """Then the fresh seeds alone need one machine."""
    fresh = [record for record in DENSE if record["config"]["seed"] >= tuning.FIRST_FRESH]
    moved = [{**record, "machine": record["machine"] | {"device": "a GPU"}} for record in fresh]
    found = {of.machine.split(",")[0]: of for of in gather(TUNED, DENSE + moved[:2], "cpu")}
    assert [len(found[name].cells["shakespeare_dense"]) for name in ("a CPU", "a GPU")] == [5, 2]
    assert found["a GPU"].choices == found["a CPU"].choices
    assert {*found["a GPU"].values("shakespeare_dense", "chosen_rate").values()} == {4e-3}


def test_only_fresh_seeds_of_the_choice_count_as_runs_on_another_machine():
    """Not a candidate's: the row at the papers' rate has the name of the tuned one."""
    at_papers_rate = records_of("shakespeare_dense", (1.91,), "a GPU")
    one, other = gather(TUNED, DENSE + MOE4 + at_papers_rate, "cpu")
    assert one.elsewhere == frozenset() and other.elsewhere == {"shakespeare_dense", "shakespeare_moe4"}


def test_claims_about_losses_are_repeated_for_the_tuned_rows_among_theirs():
    repeated = {claim.id: claim for claim in papers.TUNED_CLAIMS}
    assert {"A1", "B2", "C1", "E1", "E2", "E7"} <= repeated.keys() and not {"A8", "B4", "E3", "E12"} & repeated.keys()
    a1 = next(claim for claim in papers.CLAIMS if claim.id == "A1")
    assert len(a1.pairs) == 6 and repeated["A1"].pairs == a1.pairs[:3] and "3 of 6 pairs" in repeated["A1"].sentence
    assert at_best_rate(repeated["E1"]).pairs == repeated["E1"].pairs


def test_a_tuned_claim_is_decided_on_the_fresh_seeds():
    (comparison,) = gather(TUNED, DENSE + MOE4, "cpu")
    claim = next(claim for claim in papers.TUNED_CLAIMS if claim.id == "E1")
    verdict = decide(claim, comparison)
    (finding,) = verdict.findings["clean"]
    assert verdict.status == HELD and finding.effect.n == 5 and finding.effect.mean == pytest.approx(-0.01)


def test_the_table_tells_how_rates_were_chosen_and_which_lie_at_an_end():
    first = records_of("shakespeare_moe2", (1.7, 1.8, 1.9, 2.0))
    (comparison,) = gather(TUNED, DENSE + first, "cpu")
    text = " ".join(notes_on_choices(comparison))
    assert "seeds 1337 to 1339" in text and "a better one may lie beyond: 2 experts" in text


def test_a_machine_with_a_part_of_anothers_runs_has_no_section():
    found = [record(seed=seed) for seed in (1337, 1338)] + [record("shakespeare_moe4_frozen", seed=1337)]
    one, other = gather(TABLES["C"], found + [record(device="a GPU")], "cpu")
    assert tells_less(other, one) and not tells_less(one, other)
    one, other = gather(TABLES["C"], found + [record("shakespeare_moe4_random", device="a GPU")], "cpu")
    assert not tells_less(other, one)


def test_a_machine_that_lacks_a_row_of_a_claim_is_silent_where_another_has_all():
    learned, frozen = record(seed=1337), record("shakespeare_moe4_frozen", seed=1337)
    others = record("shakespeare_moe4_random", device="a GPU"), record("shakespeare_moe4_frozen", device="a GPU")
    found = verdicts_of_machines(TABLES["C"], gather(TABLES["C"], [learned, frozen, *others], "cpu"))
    claims = {machine.split(",")[0]: [verdict.claim.id for verdict in of] for machine, of in found.items()}
    assert claims == {"a CPU": ["C1", "C2"], "a GPU": ["C2"]}  # neither has both rows of C2


def test_a_table_of_tuned_rows_is_shown_where_candidates_can_be_compared():
    assert [compares_candidates(gather(TUNED, DENSE[:n], "cpu")[0]) for n in (3, 6)] == [False, True]
    assert compares_candidates(gather(TABLES["C"], [record()], "cpu")[0])
