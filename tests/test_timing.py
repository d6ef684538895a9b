"""speed/timing.py: a bench times train.py's own update and the real decoder, in pairs, and only if they are right."""

import dataclasses

import pytest
import torch
from conftest import tiny, train_tiny

import backends
from data.common import Dataset
from model import Decoder, uniforms
from run import accounting, checkpoint
from run.settings import Config
from speed import decoding, timing, traffic
from support import machines

CPU = machines.choose("cpu", "float32", False)
KINDS = {
    "dense": dict(),
    "moe4": dict(n_expert=4),
    "moe4_top2": dict(n_expert=4, expert_top_k=2),
    "moe4_linear": dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", gate_renormalize=True),
    "reference": dict(),
    "reference_moe4": dict(n_expert=4, moe_backend="reference"),
}
FAST = [name for name in KINDS if not name.startswith("reference")]


@pytest.fixture(scope="module")
def dataset(words):
    return Dataset.open(words)


def candidate(dataset, name, **changes):
    return timing.Candidate(name, name, tiny(**{**KINDS[name], **changes}), dataset, CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Candidates and decodings


@pytest.mark.parametrize("name", ["dense", "moe4"])
def test_a_candidate_trains_bit_for_bit_as_train_py_does(words, dataset, tmp_path, name):
    assert train_tiny(words, tmp_path / "run", max_iters=5, dropout=0.2, **KINDS[name]) == 0
    saved = checkpoint.load(tmp_path / "run" / "ckpt.pt")
    one = timing.Candidate(name, name, Config.from_dict(saved["config"]), dataset, CPU)
    for _ in range(5):
        one.train()
    assert one.steps_made == 5
    for key, weight in one.model.state_dict().items():
        assert torch.equal(weight, saved["model"][key]), key


@pytest.mark.parametrize("name", ["reference", "reference_moe4"])
def test_a_reference_trains_too(dataset, name):
    one = candidate(dataset, name, learning_rate=1e-2)
    x, y = one.batch(0)
    before = one.model(x, y).loss.item()
    for _ in range(20):
        one.train()
    assert one.model(x, y).loss.item() < before - 0.5


def test_a_reference_samples_the_same_text_without_a_cache(dataset):
    one = candidate(dataset, "reference_moe4")
    plain, cached = one.decoder(3), Decoder(one.model, 3, timing.TEMPERATURE, timing.TOP_K)
    assert isinstance(plain, timing.Uncached)
    tokens, other = one.text(3)[:, :5], one.text(3)[:, :5]
    for number in uniforms(9):
        tokens, other = (d.next(t, number.expand(3)).tokens[:, None] for d, t in ((plain, tokens), (cached, other)))
        assert torch.equal(tokens, other)
    assert plain.length == cached.length == 13
    plain.clear()
    assert plain.length == 0


def test_a_reference_reads_texts_of_any_length_as_other_eager_inference_does(dataset, monkeypatch):
    calls = []
    monkeypatch.setattr(machines.Machine, "any_length", lambda machine: calls.append(1) or machine.autocast())
    one = candidate(dataset, "reference")
    one.decoder(1).read(one.text(1)[:, :5])
    one.sample_without_cache(2)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["dense", "reference"])
def test_decoding_steps_see_half_a_block_on_average(dataset, name):
    decodings, lengths = timing.Decoding(candidate(dataset, name), 2), []
    next_ = decodings.decoder.next
    unit = decodings.decode()
    for _ in range(12):
        unit.prepare()
        decodings.decoder.next = lambda ids, uniform: lengths.append(decodings.decoder.length) or next_(ids, uniform)
        unit.run()
        decodings.decoder.next = next_
    assert len(lengths) == 12 * unit.repeats
    assert abs(sum(lengths) / len(lengths) - 16 // 2) <= 1
    assert max(lengths) - min(lengths) < 16 // 4 if name == "dense" else set(lengths) == {8}


def test_prefill_reads_half_a_block_into_an_empty_cache(dataset):
    decodings = timing.Decoding(candidate(dataset, "moe4"), 3)
    for _ in range(2):
        unit = decodings.prefill()
        unit.prepare()
        assert decodings.decoder.length == 0
        unit.run()
        assert decodings.decoder.length == 8 and decodings.tokens_B.shape == (3,)
    decodings.decode().run()  # goes on from there


def test_a_candidate_says_what_ran(dataset):
    ways = candidate(dataset, "moe4", moe_backend="sorted").backends()
    assert ways == {"train": "sorted, eager", "decode": "not measured"}
    one = candidate(dataset, "dense")
    one.decoders_used |= {1: "a graph", 8: "a graph", 32: "eager"}
    assert one.backends() == {"train": "eager", "decode": "batch 1, 8: a graph; batch 32: eager"}
    assert "plain AdamW" in candidate(dataset, "reference").backends()["train"]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


@pytest.mark.parametrize("name", FAST)
def test_a_right_model_passes_the_checks(dataset, name):
    one = candidate(dataset, name, dropout=0.2)
    assert timing.is_right(timing.check_training(one))
    for _ in range(3):
        one.train()
    for batch_size in (1, 3):
        row = timing.check_decoding(one, timing.Decoding(one, batch_size).decoder, batch_size)
        assert timing.is_right(row) and f"batch {batch_size}" in row["what"]
    assert timing.is_right(timing.check_training(one))


@pytest.mark.parametrize("backend", sorted(set(backends.BACKENDS) - {"reference"}))
@pytest.mark.parametrize("name", ["moe4", "moe4_linear"])
def test_every_backend_passes(dataset, backend, name):
    assert timing.is_right(timing.check_training(candidate(dataset, name, moe_backend=backend)))


def test_a_check_does_not_change_training(dataset):
    one, other = candidate(dataset, "moe4", dropout=0.2), candidate(dataset, "moe4", dropout=0.2)
    torch.manual_seed(5)
    timing.check_training(one)
    one.train()
    torch.manual_seed(5)
    other.train()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


def gates_without_gradient(x_ND, routing, *experts):
    """The right output, and a gradient that the router misses."""
    return backends.reference(x_ND, routing._replace(gates=routing.gates.detach()), *experts)


def off_by_a_thousandth(x_ND, routing, *experts):
    return backends.reference(x_ND, routing, *experts) * 1.001


def not_a_number(x_ND, routing, *experts):
    return backends.reference(x_ND, routing, *experts) * float("nan")


@pytest.mark.parametrize("wrong", [gates_without_gradient, off_by_a_thousandth, not_a_number])
def test_a_wrong_backend_is_found(dataset, monkeypatch, wrong):
    monkeypatch.setitem(backends.BACKENDS, "sliced", wrong)
    assert not timing.is_right(timing.check_training(candidate(dataset, "moe4", moe_backend="sliced")))


class Forgetful(Decoder):
    """Sees only half of what it should have kept."""

    def read(self, ids_BT):
        for layer in self.cache.layers:
            layer.keys[:, :, :4] = 0
        return super().read(ids_BT)


def test_a_wrong_decoder_is_found(dataset):
    one = candidate(dataset, "dense")
    for parameter in one.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    one.model.eval()
    assert timing.is_right(timing.check_decoding(one, Decoder(one.model, 2), 2))
    assert not timing.is_right(timing.check_decoding(one, Forgetful(one.model, 2), 2))


def test_errors_are_relative_and_the_worst_tensor_counts():
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([100.0])]
    found = [torch.tensor([3.0, 4.2]), torch.tensor([101.0])]
    plain = [torch.tensor([3.0, 4.1]), torch.tensor([100.0])]
    row = timing.worst_error("it", found, plain, exact, torch.float32)
    assert row == {"what": "it", "error": pytest.approx(0.01), "limit": pytest.approx(1e-5)}  # the second
    assert not timing.is_right(row) and timing.is_right(timing.worst_error("it", plain, plain, exact, torch.float32))


def test_many_models_can_be_compiled_in_one_process(dataset, monkeypatch):
    """They share their code, of which torch would compile only 8 forms; each has 3: to train, evaluate, check."""
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend="eager", **options))
    for _ in range(4):
        config, compiling = tiny(n_layer=1, dropout=0.1), CPU._replace(compile=True)
        one = timing.Candidate("dense", "dense", config, dataset, compiling)
        assert not list(one.make_ready()) and one.is_compiled and one.backends()["train"] == "compiled"
        assert timing.is_right(timing.check_training(one))
        with torch._dynamo.config.patch(error_on_recompile=True):
            one.train()


# ---------------------------------------------------------------------------------------------------------------------
# Timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock(seconds)` moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_units_are_timed_in_turn_and_rounds_start_with_different_ones(clock):
    ran = []

    def unit(name, seconds):
        return timing.Unit(lambda: (ran.append(name), clock(seconds)), lambda: clock(100.0), repeats=4)

    units = {"a": unit("a", 4.0), "b": unit("b", 8.0), "c": unit("c", 12.0)}
    times = timing.timings(units, CPU, seconds=1e6, at_most=3)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}  # of one repeat, without what prepares it
    assert "".join(ran[-9:]) == "abc" + "bca" + "cab" and len(ran) == 9 + 6  # after two rounds to warm up


@pytest.mark.parametrize(
    "seconds, rounds, warm",
    [(100, 101, 2), (7.5, 10, 2), (3, 10, 1), (0.1, 3, 1)],
    ids=["as long as asked", "at least 10", "one to warm up", "rounds that take too long"],
)
def test_number_of_rounds(clock, seconds, rounds, warm):
    ran = []
    unit = timing.Unit(lambda: (ran.append(1), clock(1.0)))
    times = timing.timings({"a": unit}, CPU, seconds, at_least=10, at_most=1000)
    assert len(times["a"]) == rounds and len(ran) == rounds + warm


def test_percentiles_are_the_median_and_the_deciles():
    assert timing.percentiles(list(range(1, 12))) == {"median": 6, "p10": 2, "p90": 10, "n": 11}


# ---------------------------------------------------------------------------------------------------------------------
# The floor


@pytest.fixture
def accounted(monkeypatch):
    """A model whose accounting is easy."""
    for module, name, count in (
        (accounting, "training_flops_per_token", lambda self: 30),
        (accounting, "forward_flops_per_token", lambda self, context: 10 + context),
        (traffic, "training_bytes", lambda self, width: 1000 * width),
        (traffic, "prefill_bytes", lambda self, batch, tokens, width: width * (batch + tokens)),
        (traffic, "decoding_bytes", lambda self, batch, context, width: width * (batch + context)),
    ):
        monkeypatch.setattr(module, name, count)


@pytest.mark.parametrize(
    "task, batch_size, tokens, flops, moved",
    [
        ("train", 4, 64, 64 * 30, 4000),
        ("prefill", 2, 16, 16 * (10 + 7), 4 * (2 + 8)),
        ("decode", 3, 3, 3 * (10 + 8), 4 * (3 + 8)),
        ("papers", 1, 18, 18 * 10 + sum(range(16)) + 2 * 15, 4 * (18 + sum(range(16)) + 2 * 15)),
    ],
)
def test_the_floor_is_the_accounting_over_the_ceilings(dataset, accounted, task, batch_size, tokens, flops, moved):
    """A block has 16 positions: prefill reads 8, decoding has 8 before it, a text of 18 meets a full window twice."""
    one = candidate(dataset, "dense")
    found = timing.floor_of(one, task, batch_size, tokens, {"flops_per_second": 10.0, "bytes_per_second": 1e9})
    assert found == {"flops": flops, "bytes": moved, "seconds": flops / 10}
    found = timing.floor_of(one, task, batch_size, tokens, {"flops_per_second": 1e9, "bytes_per_second": 10.0})
    assert found["seconds"] == moved / 10


def test_ceilings_count_the_operations_and_bytes(dataset, monkeypatch):
    monkeypatch.setattr(timing, "best_rate", lambda call, amount, machine: (call(), amount)[1])
    model = candidate(dataset, "dense").model
    count = sum(parameter.numel() for parameter in model.parameters())
    assert timing.ceilings(CPU, model) == {"flops_per_second": 2 * 1024**3, "bytes_per_second": 2 * 4 * count}


def test_the_best_rate_is_that_of_the_fastest_try(clock):
    durations = iter([9.0, 2.0, 1.0, 4.0, 4.0, 4.0])
    assert timing.best_rate(lambda: clock(next(durations)), 12, CPU, seconds=10) == 12.0


# ---------------------------------------------------------------------------------------------------------------------
# On CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", FAST)
def test_fast_ways_on_cuda_are_right_and_their_memory_is_counted(words, name, is_compiled):
    gpu = machines.choose("cuda", compile=is_compiled, capture="auto")
    config = Config(**{**KINDS[name], "n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 64, "batch_size": 4})
    one = timing.Candidate(name, name, dataclasses.replace(config, dropout=0.1), Dataset.open(words, "cuda"), gpu)
    if is_compiled:
        assert not list(one.make_ready()) and one.is_captured
    assert timing.is_right(timing.check_training(one))
    one.train()
    activations = 4 * config.batch_size * config.block_size * config.n_embd * config.n_layer  # at least, in bytes
    assert timing.peak_bytes(gpu, one.training(), one.bytes_held(True)) > one.bytes_held(True) + activations
    for batch_size in (1, 8):
        decodings = timing.Decoding(one, batch_size)
        assert timing.is_right(timing.check_decoding(one, decodings.decoder, batch_size))
        assert isinstance(decodings.decoder, decoding.CapturedDecoder), decodings.decoder.how


def test_memory_is_that_of_an_update_without_a_graph(dataset):
    """Weights move as in a captured update, and the next one is captured again."""
    one = timing.Candidate("moe4", "moe4", tiny(**KINDS["moe4"]), dataset, CPU._replace(capture=True))
    assert not list(one.make_ready()) and one.is_captured
    assert timing.is_right(timing.check_capture(one)) and one.steps_made == 0
    captured = one.updater.captured
    one.train()
    one.training().uncaptured()
    assert one.steps_made == 2 and one.updater.captured is captured
