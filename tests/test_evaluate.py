"""The two measures: what they are, by hand, and that taking them changes nothing."""

import copy
import math
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import balance
from data.characters import character_class
from data.common import Dataset, Vocabulary
from model import GPT, IGNORED
from run import cross_fit, evaluate
from support import machines

CPU = machines.choose("cpu", "float32", False)
DENSE = {}
MOE = dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, aux_loss_coef=0.1, z_loss_coef=0.01)

KINDS = {  # the last two route by what comes later in a sequence, which must not be the padding after the split
    "dense": DENSE,
    "moe": MOE,
    "expert_choice": dict(n_expert=4, router="expert_choice", capacity_factor=2.0, aux_loss="none"),
    "sequence": dict(n_expert=4, router_level="sequence"),
}


@pytest.fixture(scope="module")
def dataset(words):
    return Dataset.open(words)


def model_of(config, dataset):
    model = GPT(config, dataset.vocabulary.size)
    for parameter in model.parameters():  # away from the initialisation, where every prediction is nearly uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def characters(dataset, split):
    """The split as one long tensor."""
    size = dataset.sizes[split]
    x, y = next(dataset.windows(split, size - 1, 1))
    return torch.cat((x[0], y[0, -1:]))


@torch.no_grad()
def clean_by_hand(model, text, block_size):
    """Mean cross-entropy in float64, one window and one character at a time."""
    model = copy.deepcopy(model).double().eval()
    total = 0.0
    for start in range(0, len(text) - 1, block_size):
        window = text[start : start + block_size + 1]
        log_probs = F.log_softmax(model(window[None, :-1]).logits[0], dim=-1)
        for position, target in enumerate(window[1:].tolist()):
            total -= log_probs[position, target].item()
    return total / (len(text) - 1)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("split", ["val", "test"])
def test_clean_is_the_cross_entropy_of_the_whole_split(dataset, changes, split):
    config = tiny(**changes)
    model = model_of(config, dataset)
    measured = evaluate.full_loss(model, dataset, split, config, CPU)
    text = characters(dataset, split)
    assert measured.nats == pytest.approx(clean_by_hand(model, text, config.block_size), rel=1e-5)
    assert measured.tokens == len(text) - 1


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_clean_does_not_depend_on_batch_size(dataset, changes):
    """Also where the last batch is mostly, or wholly but for one row, padding."""
    config = tiny(**changes)
    model = model_of(config, dataset)
    losses = [
        evaluate.full_loss(model, dataset, "val", tiny(**changes, batch_size=size), CPU).nats for size in (1, 4, 7, 64)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_the_halves_of_a_split_are_its_even_and_odd_batches(dataset):
    config = tiny(batch_size=4)
    model = model_of(config, dataset)
    measured = evaluate.full_loss(model, dataset, "val", config, CPU)
    windows = list(dataset.windows("val", config.block_size, config.batch_size))
    assert len(windows) > 2
    for first, half in enumerate(measured.halves):
        with torch.no_grad():
            outputs = [(model(x, y).loss.item(), int((y != IGNORED).sum())) for x, y in windows[first::2]]
        assert half["tokens"] == sum(count for _, count in outputs)
        expected = sum(loss * count for loss, count in outputs) / half["tokens"]
        assert half["nats"] == pytest.approx(expected, rel=1e-6)
    assert measured.tokens == sum(half["tokens"] for half in measured.halves)
    assert evaluate.full_loss(model, dataset, "val", tiny(batch_size=4096), CPU).halves is None  # a single batch


def test_the_cross_fitted_best_is_chosen_on_one_half_and_told_on_the_other():
    def line(even, odd):
        return {"halves": [{"nats": even, "tokens": 30}, {"nats": odd, "tokens": 10}]}

    lines = [line(3.0, 3.0), line(1.0, 1.8), line(1.6, 1.1), line(1.0, 0.5 + 1.0)]
    # The even half chooses the first 1.0 and is told 1.8; the odd half chooses 1.1 and is told 1.6.
    assert cross_fit.cross_fitted(lines) == pytest.approx((1.8 * 10 + 1.6 * 30) / 40)
    assert cross_fit.cross_fitted([*lines, {}]) is None
    assert cross_fit.halves([2.0], [4]) is None
    assert cross_fit.halves([2.0, 3.0, 4.0], [4, 2, 1]) == [{"nats": 1.2, "tokens": 5}, {"nats": 1.5, "tokens": 2}]


def test_the_cross_fitted_best_is_not_optimistic():
    """Of evaluations that differ by chance alone, the plain best is too low and the cross-fitted one is not."""
    generator = np.random.default_rng(0)
    plain, crossed = [], []
    for _ in range(400):
        noise = generator.normal(1.5, 0.02, (20, 2))
        lines = [{"halves": [{"nats": a, "tokens": 10}, {"nats": b, "tokens": 10}]} for a, b in noise.tolist()]
        crossed.append(cross_fit.cross_fitted(lines))
        plain.append(min(noise.mean(axis=1)))
    assert np.mean(plain) < 1.5 - 0.02 and np.mean(crossed) == pytest.approx(1.5, abs=0.003)


def test_the_statistics_of_clean_count_each_character_once(dataset):
    config = tiny(**MOE)
    measured = evaluate.full_loss(model_of(config, dataset), dataset, "val", config, CPU)
    assert [int(layer.tokens) for layer in measured.stats] == [dataset.sizes["val"] - 1] * 2
    assert [int(layer.load.sum()) for layer in measured.stats] == [2 * (dataset.sizes["val"] - 1)] * 2


def test_a_dense_model_has_no_statistics(dataset):
    config = tiny()
    assert not evaluate.full_loss(model_of(config, dataset), dataset, "val", config, CPU).stats


def test_measuring_moves_no_global_random_stream_and_drops_nothing(dataset):
    """A model left in train mode is measured without dropout and jitter, and nothing is drawn from a global
    generator."""
    noisy = tiny(**MOE, dropout=0.5, router_jitter=0.5)
    model = model_of(noisy, dataset)

    def states():
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2],
            random.getstate(),
        )

    before = states()
    results = []
    for _ in range(2):
        model.train()
        results.append(
            (
                evaluate.full_loss(model, dataset, "val", noisy, CPU).nats,
                evaluate.sampled_loss(model, dataset, "val", noisy, CPU, 3),
            )
        )
    assert states() == before
    assert results[0] == results[1]


def test_measuring_leaves_no_gradient(dataset):
    config = tiny(**MOE)
    model = model_of(config, dataset)
    evaluate.full_loss(model, dataset, "val", config, CPU)
    evaluate.sampled_loss(model, dataset, "val", config, CPU, 0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_paper_depends_on_seed_and_step_alone(dataset):
    config = tiny()
    model = model_of(config, dataset)

    def measure(seed, step):
        torch.rand(1), np.random.rand(), random.random()  # whatever came before
        return evaluate.sampled_loss(model, dataset, "val", tiny(seed=seed), CPU, step).nats

    assert measure(1, 10) == measure(1, 10)
    assert len({measure(1, 10), measure(1, 20), measure(2, 10), measure(2, 20)}) == 4


def test_paper_is_the_mean_over_its_batches_with_and_without_the_weighted_losses(dataset):
    config = tiny(**MOE, eval_iters=3)
    model = model_of(config, dataset).eval()
    losses, auxiliary = [], []
    for i in range(3):
        x, y = dataset.batch(
            "val", config.seed + evaluate.EVALUATION_STREAM, 5 * 3 + i, config.batch_size, config.block_size
        )
        out = model(x, y)
        losses.append(F.cross_entropy(out.logits.flatten(0, 1), y.flatten()).item())
        auxiliary.append(0.1 * out.aux["switch"].raw.item() + 0.01 * out.aux["z"].raw.item())
    measured = evaluate.sampled_loss(model, dataset, "val", config, CPU, 5)
    assert measured.nats == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert measured.with_aux - measured.nats == pytest.approx(sum(auxiliary) / 3, rel=1e-4)
    assert sum(auxiliary) > 0.1


def test_a_dense_model_has_nothing_to_add_to_paper(dataset):
    config = tiny()
    measured = evaluate.sampled_loss(model_of(config, dataset), dataset, "val", config, CPU, 0)
    assert measured.with_aux == measured.nats


def test_paper_never_sees_the_batches_of_training(dataset, monkeypatch):
    """Not of the same steps and not of any step of a long run, whatever the seed."""
    seen = []
    original = Dataset.batch

    def spy(self, split, seed, step, *shape):
        seen.append((seed, step))
        return original(self, split, seed, step, *shape)

    monkeypatch.setattr(Dataset, "batch", spy)
    for seed in (0, 1337, 2**32 - 1):
        config = tiny(seed=seed)
        evaluate.sampled_loss(model_of(config, dataset), dataset, "train", config, CPU, 0)
    training_seeds = range(2**32)
    assert len(seen) == 3 * config.eval_iters and not any(seed in training_seeds for seed, _ in seen)


def test_the_rows_of_paper_differ_from_those_of_training(dataset):
    config = tiny()
    shape = config.batch_size, config.block_size
    for step in range(4):
        training, _ = dataset.batch("train", config.seed, step, *shape)
        measured, _ = dataset.batch("train", config.seed + evaluate.EVALUATION_STREAM, step, *shape)
        assert not torch.equal(training, measured)


def test_evaluations_of_different_steps_share_no_batch(dataset, monkeypatch):
    steps = []
    original = Dataset.batch

    def spy(self, split, seed, step, *shape):
        steps.append(step)
        return original(self, split, seed, step, *shape)

    monkeypatch.setattr(Dataset, "batch", spy)
    config = tiny(eval_iters=3)
    model = model_of(config, dataset)
    for step in (0, 1, 2, 10):
        evaluate.sampled_loss(model, dataset, "val", config, CPU, step)
    assert len(set(steps)) == len(steps) == 12


def test_bits():
    assert evaluate.bits(math.log(2)) == 1.0
    assert evaluate.bits(math.log(256)) == pytest.approx(8.0)
    assert evaluate.FullLoss(nats=math.log(4), tokens=1, stats=[]).bpc == pytest.approx(2.0)


def test_characters_fall_into_the_classes_that_tables_speak_of():
    classes = {"a": "vowel", "y": "consonant", "A": "capital", "7": "digit", " ": "space", "\n": "newline"}
    classes["!"] = "punctuation"
    assert {symbol: character_class(symbol) for symbol in classes} == classes
    assert character_class(ord("e")) == "vowel" and character_class(200) == character_class("é") == "other"


def test_drops_are_told_by_class():
    """2 of 4 choices of 'a', 1 of 1 of 'e' and none of 2 of 'b' were dropped; '!' never occurred."""
    vocabulary = Vocabulary("character", ("!", "a", "b", "e"))
    by_symbol = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 4.0, 2.0, 1.0]])
    empty = torch.zeros(())
    stats = balance.RoutingStats(empty, empty, empty, empty, empty, empty, torch.zeros(2, 3), by_symbol)
    rates = evaluate.drop_rate_by_class(stats, vocabulary)
    assert rates == {"drop_rate_by_class": {"vowel": 3 / 5, "consonant": 0.0}}
    assert evaluate.drop_rate_by_class(stats._replace(dropped_by_symbol=torch.zeros(2, 0)), vocabulary) == {}


@pytest.mark.parametrize("changes", [DENSE, MOE], ids=["dense", "moe"])
def test_the_papers_inference_reads_the_whole_context_for_each_character(dataset, changes, monkeypatch):
    """Without a cache: passes over 1, 2, … block_size, block_size, … characters; no random stream moves."""
    config = tiny(**changes, inference_samples=2)
    model, before, lengths = model_of(config, dataset), torch.get_rng_state(), []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(tuple(inputs[0].shape)))
    speeds = evaluate.inference_speed(model, config, CPU, characters=20)
    assert lengths == 2 * [(1, min(length, config.block_size)) for length in range(1, 21)]
    assert len(speeds) == 2 and all(0 < speed < 1e6 for speed in speeds)
    assert torch.equal(before, torch.get_rng_state())


def test_the_clock_of_writing_waits_for_the_device(dataset, monkeypatch):
    """Else it would measure how fast a GPU is given its work, and not how fast it does it."""
    events = []

    class Watched:
        device, any_length = CPU.device, CPU.any_length

        def synchronize(self):
            events.append("wait")

    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: events.append("clock") or float(len(events)))
    config = tiny(inference_samples=2)
    evaluate.inference_speed(model_of(config, dataset), config, Watched(), characters=3)
    assert events == 2 * ["wait", "clock", "wait", "clock"]


def test_writing_without_a_cache_keeps_cudnn_out_on_cuda(dataset):
    """Its attention plans anew for each length of the text, a few ms each."""
    config, allowed = tiny(inference_samples=1), []
    model = model_of(config, dataset)
    model.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    for device in ("cuda", "cpu"):
        any_length = CPU._replace(device=torch.device(device)).any_length
        here = types.SimpleNamespace(device=CPU.device, synchronize=CPU.synchronize, any_length=any_length)
        evaluate.inference_speed(model, config, here, characters=2)
    assert allowed == [False, False, True, True]


def test_what_sees_later_characters_cannot_write_and_has_no_speed(dataset):
    config = tiny(**{**MOE, "capacity_group": "batch"}, inference_samples=2)
    assert evaluate.inference_speed(model_of(config, dataset), config, CPU) == []
