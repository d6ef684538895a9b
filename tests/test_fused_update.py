"""The fused update: its kernels against torch's clipping, guard and AdamW, and its weight copies against autocast.

Without a GPU, Triton runs in its interpreter, which must be asked for before it is imported: the checks at the end of
this file are a script that one test runs. That the kernels compile for an H100 is shown without a GPU too.
"""

import copy
import itertools
import math
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import thorough, tiny
from interpreter import assert_no_problems_in_the_interpreter, tell_problems
from test_capture import KINDS, STEPS
from torch import nn

from model import GPT
from moe import EXPERTS
from run import update
from run.processes import Processes
from run.totals import RunningTotals
from support import fused_update, machines, triton_here
from support.fused_update import FusedUpdate, WeightCopies
from support.options import ConfigError

VOCABULARY = 11
BFLOAT16 = machines.choose("cpu", "bfloat16", False)
# One number, a block, less and more than one, several; sizes that fill no row of 16.
AWKWARD = [(3, 5), (1,), (4096,), (4097,), (90, 50), (7,), (2, 3, 4)]
EVEN = [(16,), (64, 80), (4, 32, 16), (64, 17)]
needs_triton = pytest.mark.skipif(not triton_here.AVAILABLE, reason="needs Triton")


# ---------------------------------------------------------------------------------------------------------------------
# The kernels against torch, in the interpreter and on CUDA


class Tail:
    """Parameters with an optimiser, and an update of them by torch or by FusedUpdate. Every second one has a copy."""

    def __init__(self, shapes, device, max_norm, is_fused, has_copies):
        torch.manual_seed(0)
        self.module, self.device, self.max_norm, n = nn.Module(), device, max_norm, len(shapes)
        for i, shape in enumerate(shapes):
            self.module.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape).to(device)))
        self.weights = list(self.module.parameters())
        groups = [
            {"params": self.weights[: n // 2], "weight_decay": 0.1},
            {"params": self.weights[n // 2 :], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), fused=True)
        self.guard = update.FiniteGuard(self.optimizer, device)
        self.copies = WeightCopies([(self.module, f"w{i}") for i in range(0, n, 2)] if has_copies else [])
        self.fused = FusedUpdate(self.optimizer, self.guard, max_norm, self.copies) if is_fused else None

    def give(self, gradients):
        """gradients: float32 or None of each weight; a copy gets it in bfloat16. -> the tensors given"""
        leaves = [self.copies.of.get(weight, weight) for weight in self.weights]
        for leaf, gradient in zip(leaves, gradients):
            leaf.grad = None if gradient is None else gradient.to(self.device, leaf.dtype, copy=True)
        return [leaf.grad for leaf in leaves]

    def update(self, step, gradients, objective=1.0):
        """-> the gradient norm"""
        objective, rate = torch.tensor(objective, device=self.device), 0.001 * (1 + step)
        self.give(gradients)
        if self.fused:
            return self.fused(step, rate, objective)
        self.copies.hand_over()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        self.guard.check(step, objective, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.copies.refresh()
        self.optimizer.zero_grad()
        return norm

    def state(self):
        """{what: tensor} of all that an update changes."""
        moments = {
            f"{key} {i}": value
            for i, weight in enumerate(self.weights)
            for key, value in self.optimizer.state.get(weight, {}).items()
        }
        weights = {f"weight {i}": weight for i, weight in enumerate(self.weights)}
        copies = {f"copy {i}": value for i, value in enumerate(self.copies.of.values())}
        return {
            name: value.detach().clone()
            for name, value in {**weights, **moments, **copies, "bad step": self.guard.bad_step}.items()
        }


def gradients_of(shapes, step):
    """One is missing in the first two updates. In every third update they are short."""
    torch.manual_seed(step)
    gradients = [torch.randn(shape) * (1e-3 if step % 3 == 2 else 1.0) for shape in shapes]
    return [None if i == 3 and step < 2 else gradient for i, gradient in enumerate(gradients)]


def differences(shapes, device, max_norm, has_copies, steps=4):
    """(what, error, tolerance) of updates by FusedUpdate against those by torch, which end with refused ones."""
    ours, theirs = (Tail(shapes, device, max_norm, is_fused, has_copies) for is_fused in (True, False))
    for step in range(steps):
        norms = [tail.update(step, gradients_of(shapes, step)).item() for tail in (ours, theirs)]
        yield f"norm {step}", abs(norms[0] / norms[1] - 1), 2e-6
    found, expected = ours.state(), theirs.state()
    yield "names of the state", found.keys() != expected.keys(), 0
    for name, value in expected.items():
        yield f"{name}: kind", (found[name].dtype, found[name].shape) != (value.dtype, value.shape), 0
        if value.numel() and not name.startswith("copy"):
            error = (found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
            yield name, error.item(), 0 if name.startswith(("step", "bad")) else 5e-6
    for i, (weight, value) in enumerate(ours.copies.of.items()):
        # The interpreter does not round to bfloat16 but cuts off.
        error = (value.float() - weight.bfloat16().float()).abs() / weight.abs().clamp(min=1e-30)
        yield f"copy {i}", error.max().item(), 2**-7 if device == "cpu" else 0
    yield "gradients that are left", sum(leaf.grad is not None for leaf in ours.fused.leaves), 0

    # The optimiser's state goes on with torch, as in a checkpoint.
    theirs.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    theirs.update(steps, gradients_of(shapes, steps)), ours.update(steps, gradients_of(shapes, steps))
    counts = [tail.state()["step 0"].item() for tail in (ours, theirs)]
    yield "step of a run that goes on with torch", counts != [steps + 1, steps + 1], 0


BAD = list(itertools.product(("objective", 0, 4), (math.nan, math.inf, -math.inf)))


def changed_by_bad_numbers(shapes, device, cases=BAD):
    """(what, error, tolerance): nothing but the guard's step may change from the first bad number on."""
    for where, bad in cases:
        tail = Tail(shapes, device, 1.0, True, has_copies=True)  # tensor 0 has a copy, and 4 too
        tail.copies = WeightCopies([(tail.module, "w0")])
        tail.fused = FusedUpdate(tail.optimizer, tail.guard, 1.0, tail.copies)
        tail.update(0, gradients_of(shapes, 5)), tail.update(1, gradients_of(shapes, 5))
        before, gradients = tail.state(), gradients_of(shapes, 5)
        if where == "objective":
            tail.update(2, gradients, bad)
        else:
            gradients[where].view(-1)[-1] = bad
            tail.update(2, gradients)
        tail.update(3, gradients_of(shapes, 5)), tail.update(4, gradients_of(shapes, 5), math.nan)
        after = tail.state()
        yield f"{bad} in {where}: bad step", (before.pop("bad step"), after.pop("bad step")) != (-1, 2), 0
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        yield f"{bad} in {where}: {changed}", len(changed), 0


def wrong_on(device, cases):
    for shapes, max_norm, has_copies in cases:
        for what, error, limit in differences(shapes, device, max_norm, has_copies):
            if not error <= limit:
                yield f"{len(shapes)} tensors, max_norm {max_norm}, copies {has_copies}: {what}: {error:g}"


CASES = [
    (AWKWARD, 1.0, False),
    (AWKWARD, math.inf, True),
    (EVEN, 1.0, True),
    ([(5,)] * 150, 1000.0, False),  # never clipped
    ([(1,)], 1.0, True),
]


@needs_triton
@thorough(short=0, soak=1)
def test_kernels_in_the_interpreter_equal_torch(n):
    assert_no_problems_in_the_interpreter(__file__, n)


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_cuda_equal_torch(case):
    assert list(wrong_on("cuda", [case])) == []


@pytest.mark.cuda
@needs_triton
def test_bad_numbers_change_nothing_on_cuda():
    assert [what for what, error, _ in changed_by_bad_numbers(EVEN + AWKWARD[-2:], "cuda") if error] == []


# ---------------------------------------------------------------------------------------------------------------------
# Kernels for an H100, compiled without one

SIGNATURE = dict.fromkeys(("gradients", "weights", "means", "squares", "copies", "steps", "sizes", "blocks"), "*i64")
LARGEST_MODEL = dict(P=200, B=16_000)  # 8 experts in each of 6 blocks


def compiled_for_h100(kernel, num_warps, **constants):
    """(PTX, registers of a thread or None, bytes of shared memory)"""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else SIGNATURE.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return made.asm["ptx"], registers_of(made.asm["cubin"]), made.metadata.shared


def registers_of(cubin):
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists():
        return None
    path = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    path.write_bytes(cubin)
    done = subprocess.run([program, "--dump-resource-usage", path], capture_output=True, text=True)
    found = re.search(r"REG:(\d+)", done.stdout)
    return int(found[1]) if found else None


@needs_triton
@pytest.mark.skipif(triton_here.INTERPRETED, reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize("alignment", [16, 1])
def test_kernels_compile_for_an_h100_with_room_for_two_programs_on_each_sm(alignment, monkeypatch, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks, betas = dict(BLOCK=fused_update.BLOCK, ALIGNMENT=alignment), dict(BETA1=0.9, BETA2=0.99, EPS=1e-8)
    logs = dict(LOG_BETA1=math.log(0.9), LOG_BETA2=math.log(0.99), MAX_NORM=math.inf, BLOCK_P=256, BLOCK_B=4096)
    made = {
        "sum": (8, compiled_for_h100(fused_update.sum_of_squares_kernel, 8, **blocks)),
        "verdict": (8, compiled_for_h100(fused_update.verdict_kernel, 8, **LARGEST_MODEL, **logs)),
        "adamw": (16, compiled_for_h100(fused_update.adamw_kernel, 16, P=200, **blocks, **betas)),
    }
    for name, (warps, (_, registers, shared)) in made.items():
        assert shared <= 16384, name
        assert registers is None or 2 * 32 * warps * registers <= 65536 or alignment == 1, (name, registers)
    ptx = made["adamw"][1][0]
    assert "cvt.rn.bf16" in ptx  # to the nearest, as torch rounds
    vectors = [len(re.findall(rf"{way}\.global\S*\.v4", ptx)) for way in ("ld", "st")]
    assert vectors[0] >= 9 and vectors[1] >= 7 if alignment == 16 else vectors == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Copies of weights: on a CPU, an update with them is the one of autocast, bit for bit

COPIED = {
    **KINDS,
    **{f"experts {kind}": dict(n_expert=4, expert_top_k=2, expert_kind=kind) for kind in EXPERTS},
    "biases": dict(n_expert=4, expert_top_k=2, bias=True),
    "experts of all blocks": dict(n_layer=2, n_expert=4, share_experts=True),
    **{f"backend {name}": dict(n_expert=4, moe_backend=name) for name in ("reference", "masked", "sorted")},
    "backend padded": dict(n_expert=4, capacity_factor=0.5, moe_backend="padded"),
}


class Trained:
    """A model and its updates with bfloat16 products."""

    def __init__(self, config, is_fused, machine=BFLOAT16):
        torch.manual_seed(0)
        self.updater = update.Updater(GPT(config, VOCABULARY).to(machine.device), config, machine)
        if is_fused:
            self.updater.fuse()
        self.x, self.y = torch.randint(VOCABULARY, (2, config.batch_size, config.block_size), device=machine.device)
        self.totals, self.step = RunningTotals(), 0

    def update(self):
        torch.manual_seed(self.step)
        self.updater.model.set_step(self.step)
        norm = self.updater.update(self.step, self.x, self.y, self.totals).gradient_norm.clone()
        self.step += 1
        return norm

    def numbers(self):
        optimizer, weights = self.updater.optimizer, list(self.updater.model.parameters())
        moments = [value for weight in weights for value in optimizer.state[weight].values()]
        return [value.detach().clone() for value in (*weights, *moments, *self.totals.tensors())]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("kind", COPIED)
def test_updates_with_copies_are_bit_identical_to_autocast(kind):
    config = tiny(**{"n_layer": 1, "grad_clip": 0.5, **COPIED[kind]})
    plain, fused = Trained(config, False), Trained(config, True)
    assert equal([plain.update() for _ in range(4)], [fused.update() for _ in range(4)])
    assert equal(plain.numbers(), fused.numbers())
    assert len(fused.updater.copies.of) >= 2


def test_captured_updates_with_copies_are_bit_identical_to_autocast():
    config = tiny(n_layer=1, n_expert=4, dropout=0.1)
    plain, fused = Trained(config, False), Trained(config, True)
    assert fused.updater.capture(fused.x, fused.y, fused.totals).failure is None
    assert equal([plain.update() for _ in range(4)], [fused.update() for _ in range(4)])
    assert equal(plain.numbers(), fused.numbers())


def test_a_trial_of_compiling_leaves_no_gradients_to_copies(monkeypatch):
    monkeypatch.setattr(machines, "compiled", lambda model: model)
    plain, fused = (Trained(tiny(n_layer=1), is_fused) for is_fused in (False, True))
    for run in (plain, fused):
        assert run.updater.compile(run.x, run.y).failure is None
    assert equal([plain.update(), *plain.numbers()], [fused.update(), *fused.numbers()])


def test_copies_follow_weights_that_are_loaded():
    plain, fused = (Trained(tiny(n_layer=1), is_fused) for is_fused in (False, True))
    others = {name: value * 1.5 for name, value in plain.updater.model.state_dict().items()}
    for run in (plain, fused):
        run.update()
        run.updater.model.load_state_dict(others)
    assert equal([plain.update(), *plain.numbers()], [fused.update(), *fused.numbers()])


@pytest.mark.parametrize("kind", ["dense", "learned", "linear sum", "shared"])
def test_every_matrix_that_is_cast_has_a_copy(kind):
    """All but embeddings, of which one is also the head: they are read in float32."""
    model = GPT(tiny(n_layer=2, bias=True, **KINDS[kind]), VOCABULARY)
    names = {id(weight): name for name, weight in model.named_parameters()}
    copied = {names[id(getattr(module, name))] for module, name in update.cast_weights(model)}
    assert copied == {
        name for name, weight in model.named_parameters()
        if weight.dim() > 1 and not re.search(r"router|embedding|bias", name)
    }  # fmt: skip


def test_compiled_training_and_evaluation_in_turns_make_one_graph_each():
    """The tracer sees copies in training and weights in evaluation, each time the same."""
    torch._dynamo.reset()
    run = Trained(tiny(n_layer=1, n_expert=4), True)
    updater = run.updater
    updater.run_model = torch.compile(updater.model, backend="eager", fullgraph=True)

    def train_and_evaluate():
        run.update()
        with torch.no_grad(), BFLOAT16.autocast():
            loss = updater.run_model.eval()(run.x, run.y).loss.item()
            assert loss == pytest.approx(updater.model(run.x, run.y).loss.item(), rel=1e-3)

    train_and_evaluate()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train_and_evaluate()
        train_and_evaluate()


def test_gradients_of_several_micro_batches_are_summed_in_float32():
    run = Trained(tiny(n_layer=1, gradient_accumulation_steps=2), True)
    assert run.updater.copies.of == {}


def test_a_cpu_ignores_the_key_and_several_processes_refuse_it():
    config = tiny(fused_update=True)
    assert Trained(config, False).updater.fused is None
    with pytest.raises(ConfigError, match="fused_update"):
        Processes(rank=0, world_size=2).check(config)


# ---------------------------------------------------------------------------------------------------------------------
# On CUDA


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["dense", "learned", "cv2", "bias", "capacity", "linear", "linear sum", "shared"])
def test_captured_fused_updates_on_cuda_train_as_plain_ones(kind, is_compiled):
    """20 updates: losses, gradient norms and weights, as far as atomics allow; updates without the graph in between
    leave it right; a replay waits for nothing; the copies are the rounded weights."""
    torch._dynamo.reset()
    machine, runs = machines.choose("cuda", compile=is_compiled, capture=True), []
    shape = dict(n_layer=2, n_embd=64, block_size=64, learning_rate=1e-3, max_iters=STEPS, device="cuda")
    config = tiny(**{**shape, **KINDS[kind], "dropout": 0.0})
    for is_fused in (False, True):
        run = Trained(config, is_fused, machine)
        if is_compiled:
            assert run.updater.compile(run.x, run.y).failure is None
        attempt = run.updater.capture(run.x, run.y, run.totals)
        assert attempt.failure is None, attempt.failure
        norms, losses = [], []
        for step in range(STEPS):
            graph = run.updater.captured
            if step == 5:
                run.updater.captured = None
            torch.cuda.set_sync_debug_mode("error" if step in (5, 9) else "default")
            norms.append(run.update())
            torch.cuda.set_sync_debug_mode("default")
            run.updater.captured = graph
            losses.append(run.totals.terms["loss"].item())
            run.totals.restart()
        run.updater.guard.raise_if_skipped()
        runs.append((run, torch.stack(norms).tolist(), losses))
    (plain, norms, losses), (fused, norms_of_fused, losses_of_fused) = runs
    assert fused.updater.fused and fused.updater.copies.of and not plain.updater.copies.of
    assert losses_of_fused == pytest.approx(losses, rel=2e-2) and losses[-1] < losses[0]
    assert norms_of_fused[:3] == pytest.approx(norms[:3], rel=5e-2)
    for weight, value in fused.updater.copies.of.items():
        assert torch.equal(value, weight.bfloat16())
    assert {value.item() for state in fused.updater.optimizer.state.values() for value in [state["step"]]} == {STEPS}


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter runs


def problems_of_a_graph():
    """A capture and a replay, by hand. Where a graph would be recorded, the table is empty; then it is filled."""
    ours, theirs = (Tail(EVEN, "cpu", 1.0, is_fused, True) for is_fused in (True, False))
    first, then = gradients_of(EVEN, 4), gradients_of(EVEN, 3)
    ours.update(0, first), theirs.update(0, first)
    before, fixed = ours.state(), ours.give(then)
    with mock.patch.object(fused_update, "is_capturing", lambda device: True):
        ours.fused(1, 0.002, torch.tensor(1.0))
        if not all(torch.equal(value, before[name]) for name, value in ours.state().items()):
            yield "a graph without addresses changes something"
    ours.fused.fill_table_of_graph()
    ours.update(1, first), theirs.update(1, first)  # outside of the graph, with other gradients
    for leaf, gradient in zip(ours.fused.leaves, fixed):
        leaf.grad = gradient
    with mock.patch.object(fused_update, "is_capturing", lambda device: True):
        ours.fused(2, 0.003, torch.tensor(1.0))
    theirs.update(2, then)
    for one, other in zip(ours.weights, theirs.weights):
        if not torch.allclose(one, other, rtol=2e-6, atol=2e-6):
            yield "a replay is not an update"


def problems_in_the_interpreter(is_soak):
    """Differences, a line each. The interpreter takes milliseconds for a program."""
    assert triton_here.INTERPRETED
    yield from wrong_on("cpu", CASES if is_soak else CASES[1:3])
    for what, error, _ in changed_by_bad_numbers(
        [(16,), (3,), (5,), (7,), (2, 9)], "cpu", BAD if is_soak else BAD[::4]
    ):
        if error:
            yield what
    yield from problems_of_a_graph()
    for machine in (machines.choose("cpu", "float32", False, capture=True), BFLOAT16):
        config = tiny(n_layer=1, n_expert=4, grad_clip=0.5)
        plain, fused = (Trained(config, is_fused, machine) for is_fused in (False, True))
        assert fused.updater.fused and bool(fused.updater.copies.of) == (machine is BFLOAT16)
        if machine.capture:
            assert fused.updater.capture(fused.x, fused.y, fused.totals).failure is None
        tolerance = 1e-4 if machine.dtype == torch.float32 else 2e-2
        for _ in range(4):
            norms = [run.update().item() for run in (plain, fused)]
            fused.updater.copies.refresh()  # the interpreter cuts off
            if not abs(norms[1] / norms[0] - 1) < tolerance:
                yield f"{machine.reason}: norms {norms}"


if __name__ == "__main__":
    tell_problems(problems_in_the_interpreter)
