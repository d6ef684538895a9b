"""run/start.py: a run may start with another run's weights, and says so; any weights are evaluated on any text that
they can read."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from alike import lines_of, record_of
from conftest import contents, english, interrupt, prepare_text, train_tiny

import train
from analysis.analysed_run import AnalysedRun
from data.common import DataError, Dataset, Vocabulary
from report import latest
from run import checkpoint, records
from run.checkpoint import CheckpointError
from run.evaluate import full_loss
from run.trained import read_weights
from support import machines
from support.files import ROOT
from support.options import ConfigError


@pytest.fixture(scope="module")
def other_words(tmp_path_factory):
    """Another text of the same symbols but for two, whose ids therefore differ."""
    text = english(4500, seed=2).replace("x", "y").replace("T", "M")
    return prepare_text(tmp_path_factory.mktemp("data") / "other", text)


def evaluated(capsys, *arguments):
    """What train.py --eval_only prints, and the loss in it."""
    capsys.readouterr()
    assert train.main(["--eval_only", "--device=cpu", *map(str, arguments)]) == 0
    told = capsys.readouterr().out
    return told, float(told.partition("validation ")[2].partition("; train")[0].split("validation")[-1].split()[0])


def losses(run):
    return {line["step"]: round(line["clean"]["nats"], 4) for line in lines_of(run, "eval")}


@pytest.fixture(scope="module")
def worse_at_the_end(words, tmp_path_factory):
    """A run whose best weights are not its last: the learning rate is far too high."""
    run = tmp_path_factory.mktemp("runs") / "worse"
    assert train_tiny(words, run, learning_rate=1.0, min_lr=1.0, n_expert=4, expert_top_k=2, eval_interval=4) == 0
    assert record_of(run)["clean"]["best"]["step"] < 20
    return run


def test_the_weights_that_are_evaluated_are_told_and_are_those(words, worse_at_the_end, capsys):
    """Without a config file the settings are the run's own; with them it is as before."""
    run, before = worse_at_the_end, contents(worse_at_the_end)
    best = record_of(run)["clean"]["best"]["step"]
    for place, name, step in ((run, "best.pt", best), (run / "ckpt.pt", "ckpt.pt", 20), (f"{run}/", "best.pt", best)):
        told, nats = evaluated(capsys, f"--init_from={place}")
        assert f"evaluating {run / name} (step {step} of run " in told and "another text" not in told
        assert nats == losses(run)[step]
    assert contents(run) == before


def test_a_snapshot_is_evaluated_with_the_settings_of_its_run(words, tmp_path, capsys):
    assert train_tiny(words, tmp_path / "run", save_every=10) == 0
    told, nats = evaluated(capsys, f"--init_from={tmp_path}/run/snapshots/step-000010.pt")
    assert "step-000010.pt (step 10 of run " in told and nats == losses(tmp_path / "run")[10]


def test_another_text_is_evaluated_in_the_ids_of_the_model(words, other_words, dense_run, capsys):
    mine, other = (Dataset.open(folder) for folder in (words, other_words))
    assert other.vocabulary != mine.vocabulary
    shown = f"on words ({other.sizes['val']:,} characters of validation), another text"
    told, nats = evaluated(capsys, f"--init_from={dense_run}", f"--dataset={other_words}")
    assert shown in told
    best = read_weights(dense_run, "best.pt").model_on("cpu")
    x, y = next(other.windows("val", other.sizes["val"] - 1, 1))
    text = other.vocabulary.decode([*x[0].tolist(), y[0, -1].item()])
    ids, total = torch.from_numpy(mine.vocabulary.encode(text)), 0.0
    with torch.no_grad():
        for window in ids.unfold(0, 17, 16):
            total += best(window[None, :-1], window[None, 1:]).loss.item() * 16
        left = ids[(len(ids) - 1) // 16 * 16 :]
        total += best(left[None, :-1], left[None, 1:]).loss.item() * (len(left) - 1) if len(left) > 1 else 0.0
    assert nats == round(total / (len(ids) - 1), 4)
    assert train_tiny(other_words, dense_run, eval_only=True, init_from="resume") == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("resident", [True, False])
def test_a_text_in_another_vocabulary_stays_the_same_text(other_words, resident):
    other = Dataset.open(other_words, resident=resident)
    wider = Vocabulary("character", tuple(sorted({*other.vocabulary.symbols, "é", "§", *map(chr, range(600, 900))})))
    for vocabulary in (wider, other.vocabulary):
        found = other.in_vocabulary(vocabulary)
        assert found.vocabulary == vocabulary and found.sizes == other.sizes
        for split in other.sizes:
            (x, y), (x2, y2) = (next(data.windows(split, 50, 2)) for data in (other, found))
            assert other.vocabulary.decode(x.flatten().tolist()) == vocabulary.decode(x2.flatten().tolist())
            batches = [data.batch(split, 1, 2, 3, 4) for data in (other, found)]
            assert all(batch[0].dtype == torch.int64 for batch in batches)
            assert vocabulary.decode(batches[1][1].flatten().tolist()) == other.vocabulary.decode(
                batches[0][1].flatten().tolist()
            )
        assert found.symbol_counts("val").sum() == other.sizes["val"]


def test_a_run_starts_with_the_best_weights_of_another_and_says_so(words, worse_at_the_end, tmp_path, capsys):
    """With its own settings and schedules, from step 0, and an optimiser of its own; never as a straight run."""
    source, run = worse_at_the_end, tmp_path / "run"
    before, best = contents(source), record_of(source)["clean"]["best"]["step"]
    changes = dict(n_expert=4, expert_top_k=2, aux_loss_coef=0.5, router_temperature=2.0, expert_dropout=0.25)
    assert train_tiny(words, run, init_from=source, **changes) == 0
    told = capsys.readouterr().out
    assert f"The weights are those of {source / 'best.pt'} (step {best} of run " in told and "enter no mean" in told
    assert f"began with the weights of run {record_of(source)['run_id']} at step {best}" in told
    assert contents(source) == before
    record = records.read(run / "summary.json")
    assert record["start"]["run_id"] == record_of(source)["run_id"] and record["start"]["step"] == best
    assert record["straight"] is False and not records.is_straight(record) and str(source) not in json.dumps(record)
    state = checkpoint.load(run / "ckpt.pt")["model"]
    buffers = [state[f"blocks.0.mlp.{name}"].item() for name in ("temperature", "expert_dropout")]
    assert [state["aux_loss_coef"].item(), *buffers] == [0.5, 2.0, 0.25]
    ((found,), _) = latest.read_runs([str(run)])
    assert not found["identity"].straight


def test_the_first_evaluation_is_that_of_the_weights(words, other_words, dense_run, tmp_path):
    """On its own text too, in whose ids the model goes on to read; a resumed run is the uninterrupted one."""
    assert train_tiny(words, tmp_path / "same", init_from=dense_run, learning_rate=1e-3) == 0
    best = record_of(dense_run)["clean"]["best"]["nats"]
    assert (
        losses(tmp_path / "same")[0] == round(best, 4) and record_of(tmp_path / "same")["clean"]["best"]["nats"] < best
    )
    assert train_tiny(other_words, tmp_path / "other", init_from=dense_run) == 0
    vocabulary = Dataset.open(words).vocabulary
    assert checkpoint.load(tmp_path / "other" / "best.pt")["vocabulary"] == vocabulary.to_dict()
    assert record_of(tmp_path / "other")["dataset"]["vocab_size"] == vocabulary.size
    assert losses(tmp_path / "other")[0] < losses(dense_run)[0] - 0.3


def test_a_started_run_on_another_text_is_analysed(other_words, moe_run, tmp_path):
    options = dict(n_expert=4, expert_top_k=2, capacity_factor=0.5)
    assert train_tiny(other_words, tmp_path / "run", init_from=moe_run, **options) == 0
    quick = SimpleNamespace(checkpoint="last", characters=0, pass_characters=0, seed=1)
    analysed = AnalysedRun(tmp_path / "run", quick, machines.choose("cpu"))
    measured = full_loss(analysed.model, analysed.dataset, "val", analysed.config, analysed.machine)
    assert round(measured.nats, 4) == losses(tmp_path / "run")[20]


def test_a_started_run_resumes_exactly_and_stays_not_straight(other_words, dense_run, tmp_path, at_step):
    assert train_tiny(other_words, tmp_path / "whole", init_from=dense_run) == 0
    at_step(interrupt(), 13)
    assert train_tiny(other_words, tmp_path / "run", init_from=dense_run) == 130
    assert train_tiny(other_words, tmp_path / "run", init_from="resume") == 0
    whole, run = (checkpoint.load(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "run"))
    assert all(torch.equal(value, run[name]) for name, value in whole.items())
    record = records.read(tmp_path / "run" / "summary.json")
    assert record["straight"] is False and record["start"] == record_of(tmp_path / "whole")["start"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(n_embd=32), "is of another model: n_embd=16 there, 32 here"),
        (dict(n_layer=3, block_size=8), "is of another model: .*n_layer=2 there, 3 here"),
        (dict(n_head=1), "is of another model: n_head=2 there, 1 here"),
        (dict(n_expert=4), "is of another model: n_expert=0 there, 4 here"),
    ],
)
def test_weights_of_another_model_are_refused(words, dense_run, tmp_path, changes, expected):
    with pytest.raises(CheckpointError, match=expected):
        train_tiny(words, tmp_path / "run", init_from=dense_run, **changes)
    with pytest.raises(CheckpointError, match=expected):
        train_tiny(words, tmp_path / "run", init_from=dense_run, eval_only=True, **changes)
    assert not (tmp_path / "run").exists()


def test_settings_that_leave_the_model_as_it_is_may_change_in_a_new_run_but_not_in_an_evaluation(
    words, moe_run, tmp_path
):
    model = dict(n_expert=4, expert_top_k=1, capacity_factor=0.0)
    assert train_tiny(words, tmp_path / "run", init_from=moe_run, max_iters=1, **model) == 0
    with pytest.raises(CheckpointError, match="expert_top_k=2 there, 1 here; capacity_factor=0.5 there, 0.0 here"):
        train_tiny(words, tmp_path / "run", init_from=moe_run, eval_only=True, **model)


HASH = dict(n_expert=4, router="hash", aux_loss="none")
NGRAM = HASH | dict(router="ngram_hash", router_ngram=2)


@pytest.mark.parametrize(
    "there, here",
    [
        (dict(n_expert=4), dict(n_expert=4, share_experts=True)),
        (dict(n_expert=4), dict(n_expert=4, blocks_per_router=0)),
        (HASH, HASH | dict(router="hash_shared")),
        (HASH, HASH | dict(router_table="even")),
        (dict(n_expert=4, router_prior=1.0), dict(n_expert=4, router_prior=1.0, router_prior_table="shared")),
        (NGRAM, NGRAM | dict(router_ngram=3)),
    ],
)
def test_weights_that_would_mean_something_else_are_refused_though_they_fit(words, tmp_path, there, here):
    assert train_tiny(words, tmp_path / "there", max_iters=1, **there) == 0
    (key,) = (key for key in here if here[key] != there.get(key))
    with pytest.raises(CheckpointError, match=f"is of another model: {key}=.* there, '?{here[key]}"):
        train_tiny(words, tmp_path / "run", init_from=tmp_path / "there", **here)


@pytest.mark.parametrize("router", ["hash", "ngram_hash"])
def test_weights_bring_their_map_whatever_the_seed(words, tmp_path, capsys, router):
    model = dict(n_expert=4, router=router, aux_loss="none")
    assert train_tiny(words, tmp_path / "there", seed=2, **model) == 0
    told, nats = evaluated(capsys, f"--init_from={tmp_path / 'there'}", "--seed=3")
    assert nats == round(record_of(tmp_path / "there")["clean"]["best"]["nats"], 4)


def test_a_text_that_the_model_cannot_read_is_refused(words, byte_words, dense_run, tmp_path):
    text = prepare_text(tmp_path / "data", english(900, seed=1) + "é§")
    with pytest.raises(DataError, match="words has 2 characters that are not among the model's .*: '§', 'é'"):
        train_tiny(text, tmp_path / "run", init_from=dense_run)
    with pytest.raises(DataError, match="words is prepared as bytes, the model knows characters"):
        train_tiny(byte_words, tmp_path / "run", init_from=dense_run)


def test_what_is_no_run_is_refused_in_one_line(words, dense_run, tmp_path):
    def told(init_from, **changes):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            train_tiny(words, tmp_path / "run", init_from=init_from, **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "and there is no such folder or file; expected scratch, resume, auto, or the" in told(tmp_path / "nothing")
    for name in ("", "a" * 5000, "gpt2"):
        assert "there is no such folder or file" in told(name)
    assert told("resum").endswith("; nearest: resume")
    assert told(tmp_path) == f"{tmp_path}: holds no best.pt; is it the out_dir of a run?"
    assert "has no checksum of this program" in told(ROOT / "README.md")
    shutil.copytree(dense_run, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert "are one folder" in told(tmp_path / "link", overwrite=True)
    with pytest.raises(ConfigError, match="holds a complete run; nothing was changed"):
        train_tiny(words, tmp_path / "run", init_from=dense_run)
    assert contents(tmp_path / "run") == contents(dense_run)


def test_a_record_of_a_started_run_cannot_call_itself_straight(words, dense_run, tmp_path):
    assert train_tiny(words, tmp_path / "run", init_from=dense_run, max_iters=1) == 0
    record = record_of(tmp_path / "run")
    assert not records.problems(record)
    assert records.problems(record | {"straight": True}) == [
        "straight is true, but start tells of another run's weights"
    ]
