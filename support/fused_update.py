"""Gradient clipping, the guard against numbers that are not finite, and AdamW: all parameters in three kernels.

    copies = WeightCopies([(model.head, "weight")])    # of float32 weights, in bfloat16
    fused = FusedUpdate(optimizer, guard, max_norm, copies)
    with torch.autocast("cuda", torch.bfloat16), copies.standing_in():
        objective = model(x)
    objective.backward()
    gradient_norm = fused(step, rate, objective)       # clips, checks, updates; gradients are gone afterwards

torch needs a launch for each of these steps, some dozens in all, reads and writes every gradient once more to clip it,
and autocast rounds every weight to bfloat16 in each forward pass and each gradient to float32 in each backward pass.
Here the kernels find all tensors by a table of their addresses, AdamW scales the gradients that it reads, and it writes
each new weight twice: in float32, and in bfloat16 to a copy that stands in for the weight in the forward pass. Then no
weight is cast, and the gradient of a copy is left in bfloat16, in which autocast computes it too.

So the numbers are those of autocast, torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW, up to the order of the sums
in the norm and the last bit of AdamW. Its state stays where torch keeps it. Needs CUDA and Triton, without which a run
makes plain updates. In tests, `hand_over` gives the gradients of copies to their weights for torch's own optimiser.
"""

import contextlib
import math

import torch

from support.triton_here import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

BLOCK = 4096  # weights per program
ALIGNMENT = 16  # bytes of an address, elements of a size: kernels then read 16 bytes at once


class WeightCopies:
    """bfloat16 copies of float32 weights that autocast would cast, each in one place of a model.

    places: [(module, name of its parameter)]; a weight must be used once in a forward pass, and cast there.
    """

    def __init__(self, places):
        self.places = [(module, name, getattr(module, name)) for module, name in places]
        self.of = {weight: torch.nn.Parameter(weight.detach().bfloat16()) for _, _, weight in self.places}
        self.refresh()

    @contextlib.contextmanager
    def standing_in(self):
        """A forward pass inside uses the copies, which have no gradients before it."""
        for module, name, weight in self.places:
            module._parameters[name], self.of[weight].grad = self.of[weight], None
        try:
            yield
        finally:
            for module, name, weight in self.places:
                module._parameters[name] = weight

    def refresh(self):
        """Round the weights anew."""
        if self.of:
            with torch.no_grad():
                torch._foreach_copy_(list(self.of.values()), list(self.of))
        self.versions = [weight._version for weight in self.of]

    def follow(self):
        """`refresh` where a weight was changed, as by loading a checkpoint. A fused optimiser does not count."""
        if self.versions != [weight._version for weight in self.of]:
            self.refresh()

    def hand_over(self):
        """Give the copies' gradients to their weights, in float32."""
        for weight, copy in self.of.items():
            weight.grad, copy.grad = None if copy.grad is None else copy.grad.float(), None


class FusedUpdate:
    """Clips gradients by their norm, checks that they are finite, and makes the step of a torch.optim.AdamW.

    optimizer: keeps its state and its format; guard: a FiniteGuard; max_norm: of all gradients, infinite = no clipping;
    copies: WeightCopies, whose gradients count as the weights', and which follow them.
    """

    def __init__(self, optimizer, guard, max_norm, copies):
        self.optimizer, self.guard, self.max_norm, self.copies = optimizer, guard, max_norm, copies
        groups = optimizer.param_groups
        self.weights = [weight for group in groups for weight in group["params"]]
        self.leaves = [copies.of.get(weight, weight) for weight in self.weights]  # those that get gradients
        self.betas, self.eps = groups[0]["betas"], groups[0]["eps"]
        self.device = self.weights[0].device
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        blocks = [
            (t, start) for t, weight in enumerate(self.weights) for start in range(0, weight.numel(), BLOCK)
        ]  # (tensor, its first weight) of each program
        self.decays = torch.tensor(decays, dtype=torch.float32, device=self.device)
        self.sizes = torch.tensor([weight.numel() for weight in self.weights], device=self.device)
        self.blocks = torch.tensor(blocks, device=self.device).view(-1, 2)
        # Addresses of gradients, weights, both moments, copies and steps; one table for a graph, one for all else.
        tables = torch.zeros(2, 6, len(self.weights), dtype=torch.int64, device=self.device)
        self.table, self.table_of_graph = tables.unbind()
        self.addresses, self.addresses_in_graph = None, None

    @torch.no_grad()
    def __call__(self, step, rate, objective):
        """step: the update's number, for the guard; rate: the learning rate; numbers, or 0-d float32 tensors.
        objective: 0-d, which must be finite too. -> the gradient norm before clipping, ()

        A refused update changes neither weights nor moments, steps or copies.
        """
        device, P, B = self.device, len(self.weights), len(self.blocks)
        step, rate = (
            value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.float32, device=device)
            for value in (step, rate)
        )
        table, alignment = self.look_up()
        gradients, weights, means, squares, copies, steps = table
        norms = torch.empty(B, dtype=torch.float32, device=device)
        verdict = torch.empty(3, dtype=torch.float32, device=device)  # norm, factor of the gradients, 1 = refused
        corrections = torch.empty(2, P, dtype=torch.float32, device=device)
        logs = [math.log(beta) if beta else -math.inf for beta in self.betas]
        with torch.cuda.device_of(objective):
            sum_of_squares_kernel[(B,)](
                gradients, copies, self.sizes, self.blocks, norms, BLOCK=BLOCK, ALIGNMENT=alignment, num_warps=8
            )
            verdict_kernel[(1,)](
                gradients, steps, norms, step, rate, objective, self.guard.bad_step, verdict, corrections,
                P=P, B=B, MAX_NORM=self.max_norm, LOG_BETA1=logs[0], LOG_BETA2=logs[1],
                BLOCK_P=triton.next_power_of_2(P), BLOCK_B=min(4096, triton.next_power_of_2(B)),
                num_warps=8,
            )  # fmt: skip
            adamw_kernel[(B,)](
                gradients, weights, means, squares, copies, self.sizes, self.blocks, self.decays, rate, verdict,
                corrections, P=P, BETA1=self.betas[0], BETA2=self.betas[1], EPS=self.eps, BLOCK=BLOCK,
                ALIGNMENT=alignment, num_warps=16,
            )  # fmt: skip
        for leaf in self.leaves:
            leaf.grad = None
        return verdict[0]

    def look_up(self):
        """(the table of addresses, by what each of them and each size can be divided)"""
        addresses = [[] for _ in self.table]
        for weight, leaf in zip(self.weights, self.leaves):
            state, copy = {}, None if leaf is weight else leaf
            if leaf.grad is not None:
                assert leaf.grad.is_contiguous() and weight.is_contiguous()
                state = self.state_of(weight)
            tensors = leaf.grad, weight, state.get("exp_avg"), state.get("exp_avg_sq"), copy, state.get("step")
            for row, tensor in zip(addresses, tensors):
                row.append(0 if tensor is None else tensor.data_ptr())
        is_even = all(address % ALIGNMENT == 0 for row in addresses[:-1] for address in row)
        is_even = is_even and all(weight.numel() % ALIGNMENT == 0 for weight in self.weights)
        alignment = ALIGNMENT if is_even else 1
        if is_capturing(self.device):
            self.addresses_in_graph = addresses
            return self.table_of_graph, alignment
        if addresses != self.addresses:
            self.table.copy_(torch.tensor(addresses), non_blocking=True)
            self.addresses = addresses
        return self.table, alignment

    def state_of(self, weight):
        """AdamW's state of a weight, made at its first gradient, as torch makes it."""
        state = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state

    def fill_table_of_graph(self):
        """After a capture and before the first replay: a graph cannot contain a copy from the host."""
        if self.addresses_in_graph:
            self.table_of_graph.copy_(torch.tensor(self.addresses_in_graph))


def is_capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. Letters: P tensors, B blocks of their weights. An address of 0: there is none.

if AVAILABLE:

    @triton.jit
    def read(addresses, t, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):
        """Pointer to tensor t."""
        return tl.multiple_of(tl.load(addresses + t).to(tl.pointer_type(dtype)), ALIGNMENT)

    @triton.jit
    def part_of(sizes, blocks, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
        """(tensor, first weight, mask of the weights) of this program"""
        t = tl.load(blocks + 2 * tl.program_id(0))
        first = tl.multiple_of(tl.load(blocks + 2 * tl.program_id(0) + 1), BLOCK)
        left = tl.multiple_of(tl.load(sizes + t) - first, ALIGNMENT)
        return t, first, tl.arange(0, BLOCK) < left

    @triton.jit
    def read_gradient(gradients, copies, t, first, mask, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
        """In float32. The gradient of a copy is in bfloat16."""
        i = tl.arange(0, BLOCK)
        if tl.load(copies + t) != 0:
            gradient = tl.load(read(gradients, t, tl.bfloat16, ALIGNMENT) + first + i, mask=mask, other=0.0)
            gradient = gradient.to(tl.float32)
        else:
            gradient = tl.load(read(gradients, t, tl.float32, ALIGNMENT) + first + i, mask=mask, other=0.0)
        return gradient

    @triton.jit
    def sum_of_squares_kernel(
        gradients, copies, sizes, blocks, norms, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr
    ):  # fmt: skip
        """norms (B,): the sum of squares of each block's gradients."""
        t, first, mask = part_of(sizes, blocks, BLOCK, ALIGNMENT)
        total = 0.0
        if tl.load(gradients + t) != 0:
            gradient = read_gradient(gradients, copies, t, first, mask, BLOCK, ALIGNMENT)
            total = tl.sum(gradient * gradient, axis=0)
        tl.store(norms + tl.program_id(0), total)

    @triton.jit
    def verdict_kernel(
        gradients, steps, norms, step, rate, objective, bad_step, verdict, corrections,
        P: tl.constexpr, B: tl.constexpr, MAX_NORM: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr,
    ):  # fmt: skip
        """One program: the norm, the guard, and for each tensor its step and AdamW's corrections (2, P): the step size,
        and the root of the second moment's correction."""
        total = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            total += tl.load(norms + b, mask=b < B, other=0.0)
        norm = tl.sqrt(tl.sum(total, axis=0))
        loss = tl.load(objective).to(tl.float32)
        is_finite = (tl.abs(norm) < float("inf")) & (tl.abs(loss) < float("inf"))  # false for NaN
        first_bad = tl.load(bad_step)  # -1 before there is one
        first_bad = tl.where(is_finite | (first_bad >= 0), first_bad, tl.load(step).to(tl.float32))
        tl.store(verdict, norm)
        tl.store(verdict + 1, tl.minimum(MAX_NORM / (norm + 1e-6), 1.0))
        tl.store(verdict + 2, (first_bad >= 0).to(tl.float32))

        t = tl.arange(0, BLOCK_P)
        used = tl.where(first_bad < 0, P, 0)  # a scalar, since the interpreter cannot spread a condition over a block
        is_used = tl.load(gradients + t, mask=t < used, other=0) != 0
        steps_t = tl.load(steps + t, mask=t < P, other=0).to(tl.pointer_type(tl.float32))
        taken = tl.load(steps_t, mask=is_used, other=0.0) + 1.0
        tl.debug_barrier()  # several threads may read the same number: none writes before all have read
        tl.store(bad_step, first_bad)
        tl.store(steps_t, taken, mask=is_used)
        correction1 = 1.0 - tl.exp(taken.to(tl.float64) * LOG_BETA1)
        correction2 = 1.0 - tl.exp(taken.to(tl.float64) * LOG_BETA2)
        step_size = tl.load(rate).to(tl.float64) / correction1
        tl.store(corrections + t, step_size.to(tl.float32), mask=t < P)
        tl.store(corrections + P + t, tl.sqrt(correction2).to(tl.float32), mask=t < P)

    @triton.jit
    def adamw_kernel(
        gradients, weights, means, squares, copies, sizes, blocks, decays, rate, verdict, corrections,
        P: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
        ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        """AdamW on a block of weights, with gradients times the verdict's factor, and the block of its copy."""
        t, first, mask = part_of(sizes, blocks, BLOCK, ALIGNMENT)
        i = tl.arange(0, BLOCK)
        if (tl.load(verdict + 2) == 0.0) & (tl.load(gradients + t) != 0):
            gradient = read_gradient(gradients, copies, t, first, mask, BLOCK, ALIGNMENT) * tl.load(verdict + 1)
            weight_i = read(weights, t, tl.float32, ALIGNMENT) + first + i
            mean_i = read(means, t, tl.float32, ALIGNMENT) + first + i
            square_i = read(squares, t, tl.float32, ALIGNMENT) + first + i
            weight = tl.load(weight_i, mask=mask, other=0.0)
            mean = tl.load(mean_i, mask=mask, other=0.0)
            square = tl.load(square_i, mask=mask, other=0.0)
            weight -= tl.load(rate).to(tl.float32) * tl.load(decays + t) * weight
            mean = BETA1 * mean + (1 - BETA1) * gradient
            square = BETA2 * square + (1 - BETA2) * gradient * gradient
            root = tl.sqrt(square) / tl.load(corrections + P + t)
            weight -= tl.load(corrections + t) * mean / (root + EPS)
            tl.store(weight_i, weight, mask=mask)
            tl.store(mean_i, mean, mask=mask)
            tl.store(square_i, square, mask=mask)
            if tl.load(copies + t) != 0:
                copy_i = read(copies, t, tl.bfloat16, ALIGNMENT) + first + i
                tl.store(copy_i, weight.to(tl.bfloat16), mask=mask)
