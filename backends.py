"""The ways to multiply tokens with the weights of the experts that they go to; one result, several speeds.

    BACKENDS[name](x, routing, experts) -> Σ_k hidden(x W_in[e_k]ᵀ + b_in[e_k], g_k) W_out[e_k]

The sum is over a token's choices that were kept; x is (N, D), the result (N, D) in the precision of the products.
`experts` (see `moe.Experts`) gives w_in (E, H, D), bias_in (E, H) or None, w_out (E, H, D) or None (then the hidden
sum (N, H) comes back), `hidden(up, gate)`, which must be 0 where the gate is 0, and `is_linear_in_gate`.

A new one is a function, a line in BACKENDS, and its name among the choices of `moe_backend` in `settings.py`; the tests
of `tests/test_moe.py` hold it to the reference: outputs and all gradients, also with empty experts and dropped
choices. What is made for decoding alone stands in `decoding.py`. Letters as in `moe.py`; M = N·K choices, R rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from routing import gates_per_expert


def reference(x_ND, routing, experts):
    """A loop over experts, each on the tokens that it kept: what the others are tested against."""
    width = experts.w_in.size(1) if experts.w_out is None else x_ND.size(1)
    total = 0
    for e in range(experts.w_in.size(0)):
        token, choice = torch.where((routing.experts == e) & routing.kept)
        bias = None if experts.bias_in is None else experts.bias_in[e]
        up = F.linear(x_ND[token], experts.w_in[e], bias)
        y = experts.hidden(up, routing.gates[token, choice, None]).to(up.dtype)
        if experts.w_out is not None:
            y = y @ experts.w_out[e]
        total = total + y.new_zeros(x_ND.size(0), width).index_add(0, token, y)
    return total


def masked(x_ND, routing, experts):
    """All experts as one wide MLP, the unused ones silenced by a gate of 0: no dispatch, but the FLOPs of all E
    experts."""
    E, H, D = experts.w_in.shape
    gates_NE = gates_per_expert(routing)
    bias = None if experts.bias_in is None else experts.bias_in.view(E * H)
    up = F.linear(x_ND, experts.w_in.view(E * H, D), bias)
    hidden_NEH = experts.hidden(up.view(-1, E, H), gates_NE[:, :, None]).to(up.dtype)
    if experts.w_out is None:
        return hidden_NEH.sum(dim=1)
    return F.linear(hidden_NEH.view(-1, E * H), experts.w_out.view(E * H, D).t())


def sliced(x_ND, routing, experts):
    """Choices sorted by expert, then a GEMM for each expert that has any, on a slice of them: for a CPU, since the
    sizes of the slices must be known on the host. Dropped choices cost nothing."""
    rows, sizes = rows_and_sizes(routing, experts.w_in.size(0))
    return dispatched(x_ND, routing, experts, rows, product_of(experts, x_ND, SlicedMM.apply, sizes))


def sorted_by_expert(x_ND, routing, experts):
    """Choices sorted by expert, then one grouped GEMM per weight (torch.nn.functional.grouped_mm); widths multiples of
    8. Dropped choices are computed too, with a gate of 0: the shapes must not depend on the data."""
    expert_M = routing.experts.reshape(-1)
    load = F.one_hot(expert_M, experts.w_in.size(0)).sum(dim=0)
    offsets = load.cumsum(0).to(torch.int32)
    rows = by_expert(expert_M, routing)
    return dispatched(x_ND, routing, experts, rows, product_of(experts, x_ND, grouped_mm, offsets))


def padded(x_ND, routing, experts):
    """Choices in a table with `routing.room` rows per expert, those without a choice 0, then one batched GEMM per
    weight: where capacity limits the rows and shapes must not depend on the data."""
    E, room = experts.w_in.size(0), routing.room
    expert_M, kept_M = routing.experts.reshape(-1), routing.kept.reshape(-1)
    kept_EM = (F.one_hot(expert_M, E) * kept_M[:, None]).t().contiguous()
    rank_M = kept_EM.cumsum(dim=1).gather(0, expert_M[None])[0] - 1
    place = torch.where(kept_M, expert_M * room + rank_M, E * room)
    order = inverse_of(place, E * room + 1)[:-1]
    expert_R = torch.arange(E, device=x_ND.device).repeat_interleave(room, output_size=E * room)
    rows = Rows(order, place, expert_R, False)
    return dispatched(x_ND, routing, experts, rows, product_of(experts, x_ND, padded_mm, room))


BACKENDS: dict[str, Callable] = {
    "reference": reference,
    "masked": masked,
    "sliced": sliced,
    "sorted": sorted_by_expert,
    "padded": padded,
}


def choose_backend(experts, k, device, dtype, has_capacity=False, is_compiled=False):
    """What `moe_backend=auto` means: the name of the fastest backend that runs here, as measured on a CPU and as known
    of CUDA (where this rule is not measured yet). k: experts per token; device, dtype: of matrix products.

    `masked` computes all E·H hidden units, so it wins on a GPU while they are not much more than a dense MLP's 4·D.
    Otherwise `sliced` on a CPU that need not know sizes in advance; `padded` where capacity bounds them; and `sorted`
    where the grouped GEMM has a fast kernel (CUDA, bfloat16, sm90). Elsewhere `masked` is the only one without a
    synchronisation or a graph break.
    """
    E, H, D = experts.w_in.shape
    if E == k:
        return "masked"
    if device.type == "cpu" and not is_compiled:
        return "sliced"
    if E * H <= 1.5 * 4 * D:
        return "masked"
    if has_capacity and device.type == "cuda":
        return "padded"
    is_fast = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return "sorted" if is_fast and D % 8 == H % 8 == 0 else "masked"


# ---------------------------------------------------------------------------------------------------------------------
# Choices as rows that lie expert by expert, and back


class Rows(NamedTuple):
    """How M = N·K choices become R rows that lie expert by expert."""

    order: torch.Tensor  # (R,) int64: the choice in each row, M where there is none
    place: torch.Tensor  # (M,) int64: the row of each choice, R where there is none
    experts: torch.Tensor  # (R,) int64
    is_permutation: bool  # whether each choice has one row and each row one choice


def rows_and_sizes(routing, n_expert):
    """(the Rows that sorting the kept choices by expert makes, those that were dropped at the end; how many choices
    each expert kept). Waits for the device."""
    expert_M = torch.where(routing.kept, routing.experts, n_expert).reshape(-1)
    sizes = torch.bincount(expert_M, minlength=n_expert + 1)[:n_expert].tolist()
    return by_expert(expert_M, routing), sizes


def by_expert(expert_M, routing):
    """The Rows that sorting the choices by expert_M makes."""
    order = torch.argsort(expert_M.to(torch.int16), stable=True)
    return Rows(order, inverse_of(order, order.size(0)), routing.experts.reshape(-1)[order], True)


def inverse_of(place, n_rows):
    """order from place: (n_rows,) int64, M in rows where nothing is placed."""
    M = place.size(0)
    order = torch.full((n_rows,), M, dtype=torch.int64, device=place.device)
    return order.scatter_(0, place, torch.arange(M, device=place.device))


def dispatched(x_ND, routing, experts, rows, product):
    """What `experts` make of x in these Rows; product: see product_of."""
    N, K = routing.experts.shape
    dtype = compute_dtype(x_ND)
    up = product(Gather.apply(x_ND.to(dtype), rows.order, rows.place, K, rows.is_permutation), "w_in")
    if experts.bias_in is not None:
        up = up + experts.bias_in.to(dtype)[rows.experts]
    if experts.is_linear_in_gate:  # then the gate may wait for the output, which is narrower
        y = experts.hidden(up)
    else:
        gates_R1 = Gather.apply(routing.gates.reshape(-1, 1), rows.order, rows.place, 1, rows.is_permutation)
        y = experts.hidden(up, gates_R1).to(dtype)
    if experts.w_out is not None:
        y = product(y, "w_out")
    y_NKD = Gather.apply(y, rows.place, rows.order, 1, rows.is_permutation).view(N, K, -1)
    if experts.is_linear_in_gate:
        y_NKD = y_NKD * routing.gates[:, :, None].to(dtype)
    return y_NKD[:, 0] if K == 1 else y_NKD.sum(dim=1)


def product_of(experts, x_ND, matmul, layout):
    """product(rows (R, in), "w_in" or "w_out") -> (R, out), in x's precision; matmul(rows, weights (E, in, out),
    layout) multiplies each row with the weights of its expert."""

    def product(rows, name):
        weights = getattr(experts, name).to(compute_dtype(x_ND))
        return matmul(rows, weights.transpose(1, 2) if name == "w_in" else weights, layout)

    return product


class Gather(torch.autograd.Function):
    """Row order[i] // K of x for each i, 0 where order[i] is K · len(x). Indexing does that too, but its gradient adds
    up rows one by one; here `place` knows where each of them went."""

    @staticmethod
    def forward(ctx, x, order, place, K, is_permutation):
        ctx.save_for_backward(place)
        ctx.K, ctx.is_permutation = K, is_permutation
        return gathered(x, order if K == 1 else order // K, is_permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (place,) = ctx.saved_tensors
        gradient = gathered(gradient, place, ctx.is_permutation)
        if ctx.K > 1:
            gradient = gradient.view(-1, ctx.K, gradient.size(1)).sum(dim=1)
        return gradient, None, None, None, None


def gathered(x, index, is_permutation):
    return (x if is_permutation else F.pad(x, (0, 0, 0, 1))).index_select(0, index)


# ---------------------------------------------------------------------------------------------------------------------
# Products of such rows: (rows (R, in), weights (E, in, out), how the rows lie) -> (R, out)


def grouped_mm(rows, weights, offsets):
    return F.grouped_mm(rows, weights, offs=offsets)


def padded_mm(rows, weights, room):
    return torch.bmm(rows.view(weights.size(0), room, -1), weights).flatten(0, 1)


class SlicedMM(torch.autograd.Function):
    """x (R, in), weights (E, in, out) -> (R, out): the first sizes[0] rows times weights[0], the next sizes[1] times
    weights[1], …; 0 in the rows that remain."""

    @staticmethod
    def forward(ctx, x, weights, sizes):
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        y = x.new_empty(x.size(0), weights.size(2))
        sliced_mm(slices(x, sizes), weights.unbind(), slices(y, sizes))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weights = ctx.saved_tensors
        x_gradient, weights_gradient = torch.empty_like(x), torch.empty_like(weights)
        gradients = slices(gradient, ctx.sizes)
        sliced_mm(gradients, weights.transpose(1, 2).unbind(), slices(x_gradient, ctx.sizes))
        sliced_mm(slices(x.t(), ctx.sizes, dim=1), gradients, weights_gradient.unbind())
        return x_gradient, weights_gradient, None


def sliced_mm(a, b, out):
    for a_e, b_e, out_e in zip(a, b, out):
        torch.mm(a_e, b_e, out=out_e)  # 0 where no rows are summed over
    for rest in out[len(b) :]:
        rest.zero_()


def slices(x, sizes, dim=0):
    """x cut along dim into these sizes, and what remains."""
    return x.split([*sizes, x.size(dim) - sum(sizes)], dim)


def compute_dtype(x):
    """The dtype that matrix products of x take: autocast's where it is on, for operations that autocast does not
    know."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
