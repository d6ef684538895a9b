"""capture.py and Updater.capture: captured updates are those made kernel by kernel, in fixed memory, without waiting.

Without CUDA a captured function runs again on the same fixed inputs, so these tests hold the contract on a CPU.
"""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT
from routing import ROUTERS
from run import update
from run.processes import Processes
from run.totals import RunningTotals
from support import machines
from support.capture import Captured, no_collection
from support.options import ConfigError

CPU = machines.choose("cpu", "float32", False, capture=True)
VOCABULARY = 11
STEPS = 20
NO_LOSS = dict(aux_loss="none", z_loss_coef=0.0)
# Every router, loss, kind of capacity and of experts, and all that a schedule moves or a step draws.
KINDS = {
    "dense": dict(dropout=0.1),
    "learned": dict(n_expert=4, dropout=0.1, z_loss_coef=0.001, router_jitter=0.01),
    "frozen": dict(n_expert=4, router="frozen", **NO_LOSS),
    "random": dict(n_expert=4, router="random", **NO_LOSS),
    "hash": dict(n_expert=4, router="hash", **NO_LOSS),
    "hash_shared": dict(n_expert=4, router="hash_shared", **NO_LOSS),
    "ngram_hash": dict(n_expert=4, router="ngram_hash", **NO_LOSS),
    "two_level": dict(n_expert=4, router="two_level", n_expert_group=2),
    "expert_choice": dict(n_expert=4, router="expert_choice", capacity_factor=1.0, aux_loss="none"),
    "top_p": dict(n_expert=4, expert_top_k=3, router_top_p=0.6),
    "hash_gated": dict(n_expert=4, router="hash_gated", gate="sigmoid", **NO_LOSS),
    "prior": dict(n_expert=4, router_prior=1.0),
    "freeze": dict(n_expert=4, router_freeze_step=STEPS // 2),
    "one router": dict(n_expert=4, n_layer=2, blocks_per_router=0),
    "cv2": dict(n_expert=4, expert_top_k=2, aux_loss="cv2", gate_renormalize=True),
    "entropy": dict(n_expert=4, expert_top_k=2, aux_loss="entropy", gate="sigmoid", expert_dropout=0.05),
    "bias": dict(n_expert=4, router_bias_rate=0.01, gate="sigmoid", aux_loss="none"),
    "capacity": dict(n_expert=4, expert_top_k=2, capacity_factor=0.5, gate_renormalize=True),
    "capacity of the batch": dict(n_expert=4, capacity_factor=0.5, capacity_group="batch"),
    "linear": dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", gate_renormalize=True),
    "masked": dict(n_expert=4, expert_top_k=2, expert_output_masking=0.2, expert_inner_dropout=0.2),
    "linear sum": dict(n_expert=4, expert_top_k=0, expert_kind="linear_sum", aux_loss="none"),
    "sequence": dict(n_expert=4, router_level="sequence"),
    "shared": dict(n_expert=4, n_shared_expert=1, router_level="segment", segment_size=5),
    "annealed": dict(
        n_expert=4, router_temperature=3.0, router_temperature_schedule="linear", aux_loss_coef_end=0.5,
        aux_loss_coef_schedule="linear", expert_dropout=0.2, expert_dropout_schedule="cosine", dropout=0.1,
    ),
}  # fmt: skip


class Trained:
    """A model in training, its updates captured or not."""

    def __init__(self, config, is_captured):
        torch.manual_seed(0)
        self.config, self.totals = config, RunningTotals()
        self.updater = update.Updater(GPT(config, VOCABULARY), config, CPU)
        self.step = 0
        if is_captured:
            assert self.updater.capture(*self.batch(0), self.totals).failure is None

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        n = self.config.batch_size * self.config.gradient_accumulation_steps
        return torch.randint(VOCABULARY, (2, n, self.config.block_size), generator=generator)

    def update(self):
        self.updater.model.set_step(self.step)
        made = self.updater.update(self.step, *self.batch(self.step), self.totals)
        self.step += 1
        return made

    def tensors(self):
        """Everything that lasts from update to update."""
        model, optimizer = self.updater.model, self.updater.optimizer
        moments = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
        return [*model.parameters(), *model.buffers(), *moments, *self.totals.tensors(), self.updater.guard.bad_step]

    def numbers(self):
        return [value.detach().clone() for value in self.tensors()] + [torch.get_rng_state()]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_updates_are_bit_identical(kind, accumulation):
    """Weights, moments, biases, totals, gradient norms and random numbers, also when a log line begins new totals."""
    config = tiny(
        **{"n_layer": 1, "max_iters": STEPS, **KINDS[kind]}, gradient_accumulation_steps=accumulation, grad_clip=0.5
    )
    seen = []
    for is_captured in (False, True):
        run, norms = Trained(config, is_captured), []
        for step in range(STEPS):
            norms.append(run.update().gradient_norm.clone())
            if step % 7 == 6:
                run.totals.restart()
        groups = run.updater.optimizer.state_dict()["param_groups"]
        seen.append(([*norms, *run.numbers()], groups))
    (plain, groups), (captured, groups_of_captured) = seen
    assert all(torch.equal(one, other) for one, other in zip(plain, captured, strict=True))
    assert groups == groups_of_captured and isinstance(groups[0]["lr"], float)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_updates_stay_in_the_same_memory_and_never_wait(kind, monkeypatch):
    """On the backends that train on CUDA."""
    monkeypatch.setattr(F, "one_hot", one_hot_of_cuda)
    changes = dict(KINDS[kind])
    if "n_expert" in changes:
        changes["moe_backend"] = "padded" if changes.get("capacity_factor") else "masked"
    run = Trained(tiny(**{"n_layer": 1, **changes}, gradient_accumulation_steps=2), True)
    run.update()
    addresses = [value.data_ptr() for value in run.tensors()]
    with FailingWhereAGraphWould():
        for _ in range(3):
            run.updater.captured.function(*run.updater.captured.inputs)
    run.update()
    run.totals.restart()
    run.update()
    assert [value.data_ptr() for value in run.tensors()] == addresses


def one_hot_of_cuda(index, n):
    """F.one_hot as CUDA has it; on a CPU it reads the smallest and the largest index."""
    return torch.zeros(*index.shape, n, dtype=torch.int64).scatter_(-1, index[..., None], 1)


class FailingWhereAGraphWould(TorchDispatchMode):
    """Refuses operations that wait for the device, copy a number of Python to it, or make shapes of values."""

    REFUSED = (
        *("_local_scalar_dense", "is_nonzero", "equal", "lift_fresh", "nonzero", "masked_select", "bincount"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        assert name not in self.REFUSED, name
        assert name != "repeat_interleave" or kwargs.get("output_size"), name
        if name == "index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), name
        return function(*args, **kwargs)


@pytest.mark.parametrize("bad", [lambda x: x.sum().item(), lambda x: torch.tensor(1.0) + x, lambda x: x[x > 0]])
def test_the_check_finds_what_a_graph_could_not_hold(bad):
    with pytest.raises(AssertionError), FailingWhereAGraphWould():
        bad(torch.ones(3))


def test_every_router_is_captured_here():
    assert set(ROUTERS) == {changes.get("router", "learned") for changes in KINDS.values()}


def test_a_capture_leaves_nothing_behind():
    run = Trained(tiny(n_expert=4, router_bias_rate=0.1, gate="sigmoid", aux_loss="none", dropout=0.2), False)
    for _ in range(3):
        run.update()
    before = run.numbers()
    assert run.updater.capture(*run.batch(0), run.totals).failure is None
    assert all(torch.equal(one, other) for one, other in zip(before, run.numbers(), strict=True))
    assert run.totals.steps == 3 and all(p.grad is None for p in run.updater.model.parameters())


def test_a_captured_guard_refuses_every_update_from_the_first_bad_one():
    run = Trained(tiny(n_expert=4), True)
    for _ in range(2):
        run.update()
    with torch.no_grad():
        run.updater.model.norm.weight[0] = math.nan
    before = run.numbers()[: len(list(run.updater.model.parameters()))]
    for _ in range(3):
        run.update()
    after = run.numbers()[: len(before)]
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(before, after))
    with pytest.raises(update.NotFinite, match="of step 2"):
        run.updater.guard.raise_if_skipped()


def test_a_captured_evaluation_is_that_of_the_model():
    run = Trained(tiny(n_expert=4, dropout=0.5), True)
    outputs = []
    for model in (run.updater.run_model, run.updater.eval_model):
        model.eval()
        with torch.no_grad():
            # Each is copied, for the next call overwrites it.
            outputs.append([copy.deepcopy(model(*run.batch(step))) for step in range(3)])
    for one, other in zip(*outputs):
        assert torch.equal(one.loss, other.loss) and torch.equal(one.stats[0].load, other.stats[0].load)
        assert torch.equal(one.objective, other.objective)
    assert not torch.equal(outputs[0][0].loss, outputs[0][1].loss)


def test_an_update_that_cannot_be_captured_is_made_as_before(monkeypatch):
    def broken(self, *arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nat length")

    monkeypatch.setattr(Captured, "__init__", broken)
    run, plain = Trained(tiny(n_expert=4), False), Trained(tiny(n_expert=4), False)
    attempt = run.updater.capture(*run.batch(0), run.totals)
    assert attempt.failure == "RuntimeError: operation not permitted when stream is capturing"
    assert run.updater.machine.capture is False
    run.update(), plain.update()
    assert all(torch.equal(one, other) for one, other in zip(run.numbers(), plain.numbers(), strict=True))


def test_outputs_lie_in_fixed_memory():
    double = Captured(lambda x, factor: {"y": (x * factor, None)}, (torch.ones(2), 2), torch.device("cpu"))
    first = double(torch.ones(2), 2)
    assert first["y"][0].tolist() == [2.0, 2.0]
    assert double(torch.ones(2), 3) is first and first["y"][0].tolist() == [3.0, 3.0]


def test_several_processes_capture_nothing():
    config = tiny(capture=True)
    with pytest.raises(ConfigError, match="capture=auto"):
        Processes(rank=0, world_size=2).check(config)


# ---------------------------------------------------------------------------------------------------------------------
# On CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_updates_on_cuda_train_as_plain_ones(kind, is_compiled):
    """Losses agree step by step as far as atomics allow, dropout included; and a replay waits for nothing."""
    torch._dynamo.reset()
    machine = machines.choose("cuda", compile=is_compiled, capture=True)
    config = tiny(n_embd=64, block_size=64, max_iters=STEPS, device="cuda", learning_rate=1e-3, **KINDS[kind])
    losses = []
    for is_captured in (False, True):
        torch.manual_seed(0)
        updater = update.Updater(GPT(config, VOCABULARY).to("cuda"), config, machine)
        x, y = torch.randint(VOCABULARY, (2, config.batch_size, config.block_size), device="cuda")
        totals = RunningTotals()
        if is_compiled:
            assert updater.compile(x, y).failure is None
        if is_captured:
            attempt = updater.capture(x, y, totals)
            assert attempt.failure is None, attempt.failure
        losses.append([])
        for step in range(STEPS):
            updater.model.set_step(step)
            torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
            updater.update(step, x, y, totals)
            torch.cuda.set_sync_debug_mode("default")
            losses[-1].append(totals.terms["loss"].item())
            totals.restart()
        updater.guard.raise_if_skipped()
    plain, captured = losses
    assert captured == pytest.approx(plain, rel=2e-2) and captured[-1] < captured[0]


def test_python_collects_no_garbage_while_a_graph_is_recorded():
    class Cycle:
        def __init__(self):
            self.me = self

    before, after = weakref.ref(Cycle()), None
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with no_collection():
            after = weakref.ref(Cycle())
            garbage = [[] for _ in range(1000)]
            assert before() is None and after() is not None and garbage
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.cuda
def test_a_capture_that_fails_on_cuda_leaves_training_possible(monkeypatch):
    """Reading a value is not allowed in a graph. Afterwards dropout must still draw, on the usual stream."""
    config, machine = tiny(dropout=0.2, device="cuda"), machines.choose("cuda", compile=False, capture=True)
    updater = update.Updater(GPT(config, VOCABULARY).to("cuda"), config, machine)
    x, y = torch.randint(VOCABULARY, (2, config.batch_size, config.block_size), device="cuda")
    make_update, stream = updater.make_update, torch.cuda.current_stream()
    monkeypatch.setattr(updater, "make_update", lambda *values, totals: make_update(*values, totals).item())
    assert updater.capture(x, y, RunningTotals()).failure
    monkeypatch.undo()
    for step in range(3):
        updater.update(step, x, y, RunningTotals())
    updater.guard.raise_if_skipped()
    assert torch.cuda.current_stream() == stream
