"""Ways to multiply tokens with the weights of their experts: same result, different speed.

    y = backend(x, routing, w_in, bias_in, w_out, activate, gate_after)

    y = Σ_k g_k · activate(x W_in[e_k]ᵀ + b_in[e_k]) W_out[e_k]      with gate_after
    y = Σ_k activate(g_k · (x W_in[e_k]ᵀ + b_in[e_k])) W_out[e_k]    without

The sum is over a token's kept choices. x (N, D), w_in (E, H, D), bias_in (E, H) or None, w_out (E, H, D), or None for
the sum of hidden units (N, H). activate: elementwise, 0 at 0. The result has the precision of the products.

A new backend is a function, a line in BACKENDS, and its name among the choices of `moe_backend` in `run/settings.py`;
`tests/test_moe.py` then compares its outputs and gradients with the reference. Backends for decoding only are in
`speed/decoding.py`. Letters as in `moe.py`; M = N·K choices, R rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from selection import gates_per_expert


def reference(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """A loop over the experts, each on its kept tokens. The other backends are tested against it."""
    width = w_in.size(1) if w_out is None else x_ND.size(1)
    total = 0
    for e in range(w_in.size(0)):
        token, choice = torch.where((routing.experts == e) & routing.kept)
        up = F.linear(x_ND[token], w_in[e], None if bias_in is None else bias_in[e])
        y = hidden_units(up, routing.gates[token, choice, None], activate, gate_after)
        if w_out is not None:
            y = y @ w_out[e]
        total = total + y.new_zeros(x_ND.size(0), width).index_add(0, token, y)
    return total


def masked(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """All experts as one wide MLP, with a gate of 0 for experts not chosen: no dispatch, but the FLOPs of all."""
    E, H, D = w_in.shape
    gates_NE = gates_per_expert(routing)
    up = F.linear(x_ND, w_in.view(E * H, D), None if bias_in is None else bias_in.view(E * H))
    hidden_NEH = hidden_units(up.view(-1, E, H), gates_NE[:, :, None], activate, gate_after)
    if w_out is None:
        return hidden_NEH.sum(dim=1)
    return F.linear(hidden_NEH.view(-1, E * H), w_out.view(E * H, D).t())


def sliced(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """Choices sorted by expert, then one GEMM per expert: for a CPU, since the host must know the sizes. Dropped
    choices cost nothing."""
    rows, sizes = rows_and_sizes(routing, w_in.size(0))
    first, second = products(SlicedMM.apply, sizes, w_in, w_out, compute_dtype(x_ND))
    return dispatch(x_ND, routing, rows, first, bias_in, activate, gate_after, second)


def sorted_by_expert(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """Choices sorted by expert, then one grouped GEMM per weight (torch.nn.functional.grouped_mm); widths must be
    multiples of 8. Dropped choices are computed with a gate of 0, since shapes must not depend on the data."""
    expert_M = routing.experts.reshape(-1)
    load = F.one_hot(expert_M, w_in.size(0)).sum(dim=0)
    offsets = load.cumsum(0).to(torch.int32)
    first, second = products(grouped_mm, offsets, w_in, w_out, compute_dtype(x_ND))
    return dispatch(x_ND, routing, by_expert(expert_M, routing), first, bias_in, activate, gate_after, second)


def padded(x_ND, routing, w_in, bias_in, w_out, activate, gate_after):
    """A table of `routing.room` rows per expert, unused rows 0, then one batched GEMM per weight: for a capacity, which
    bounds the rows, where shapes must not depend on the data."""
    E, room = w_in.size(0), routing.room
    expert_M, kept_M = routing.experts.reshape(-1), routing.kept.reshape(-1)
    kept_EM = (F.one_hot(expert_M, E) * kept_M[:, None]).t().contiguous()
    rank_M = kept_EM.cumsum(dim=1).gather(0, expert_M[None])[0] - 1
    place = torch.where(kept_M, expert_M * room + rank_M, E * room)
    order = inverse_of(place, E * room + 1)[:-1]
    expert_R = torch.arange(E, device=x_ND.device).repeat_interleave(room, output_size=E * room)
    first, second = products(padded_mm, room, w_in, w_out, compute_dtype(x_ND))
    return dispatch(x_ND, routing, Rows(order, place, expert_R, False), first, bias_in, activate, gate_after, second)


BACKENDS: dict[str, Callable] = {
    "reference": reference,
    "masked": masked,
    "sliced": sliced,
    "sorted": sorted_by_expert,
    "padded": padded,
}


def choose_backend(shape, k, device, dtype, has_capacity=False, is_compiled=False):
    """The name of the fastest backend, for `moe_backend=auto`. Measured on a CPU, not on CUDA.

    shape: (E, H, D); k: experts per token; device, dtype: of the matrix products. `masked` computes all E·H hidden
    units, so on a GPU it wins while they are not much more than a dense MLP's 4·D. Otherwise `sliced` on a CPU without
    a compiler; `padded` on CUDA where capacity bounds the sizes; `sorted` where the grouped GEMM has a fast kernel
    (CUDA, bfloat16, sm90). Elsewhere only `masked` runs without a synchronisation or a graph break.
    """
    E, H, D = shape
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
    """(Rows of the choices sorted by expert, dropped ones last; kept choices per expert). Waits for the device."""
    expert_M = torch.where(routing.kept, routing.experts, n_expert).reshape(-1)
    sizes = torch.bincount(expert_M, minlength=n_expert + 1)[:n_expert].tolist()
    return by_expert(expert_M, routing), sizes


def by_expert(expert_M, routing):
    """Rows of the choices sorted by expert_M."""
    order = torch.argsort(expert_M.to(torch.int16), stable=True)
    return Rows(order, inverse_of(order, order.size(0)), routing.experts.reshape(-1)[order], True)


def inverse_of(place, n_rows):
    """The `order` of Rows from their `place`: (n_rows,) int64, M in rows without a choice."""
    M = place.size(0)
    order = torch.full((n_rows,), M, dtype=torch.int64, device=place.device)
    return order.scatter_(0, place, torch.arange(M, device=place.device))


def dispatch(x_ND, routing, rows, first, bias_in, activate, gate_after, second):
    """The backend's result by way of these Rows. first, second: rows (R, in) -> (R, out), the products with w_in and
    w_out in x's precision; second is None without a w_out."""
    N, K = routing.experts.shape
    dtype = compute_dtype(x_ND)
    up = first(Gather.apply(x_ND.to(dtype), rows.order, rows.place, K, rows.is_permutation))
    if bias_in is not None:
        up = up + bias_in.to(dtype)[rows.experts]
    if gate_after:  # the gate is applied to the output, which is narrower
        y = activate(up)
    else:
        gates_R1 = Gather.apply(routing.gates.reshape(-1, 1), rows.order, rows.place, 1, rows.is_permutation)
        y = hidden_units(up, gates_R1, activate, gate_after)
    if second is not None:
        y = second(y)
    y_NKD = Gather.apply(y, rows.place, rows.order, 1, rows.is_permutation).view(N, K, -1)
    if gate_after:
        y_NKD = y_NKD * routing.gates[:, :, None].to(dtype)
    return y_NKD[:, 0] if K == 1 else y_NKD.sum(dim=1)


def hidden_units(up, gates, activate, gate_after):
    """Gated hidden units, in the precision of `up`, the first layer's output."""
    return (activate(up) * gates if gate_after else activate(up * gates)).to(up.dtype)


def products(matmul, layout, w_in, w_out, dtype):
    """(first, second) for `dispatch`. matmul(rows, weights (E, in, out), layout) multiplies each row with the weights
    of its expert."""

    def first(rows):
        return matmul(rows, w_in.to(dtype).transpose(1, 2), layout)

    def second(rows):
        return matmul(rows, w_out.to(dtype), layout)

    return first, None if w_out is None else second


class Gather(torch.autograd.Function):
    """Row order[i] // K of x for each i, 0 where order[i] = K · len(x). `place` makes the gradient a gather too, where
    plain indexing would add up row by row."""

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
# Products of rows that lie expert by expert: (rows (R, in), weights (E, in, out), layout) -> (R, out)


def grouped_mm(rows, weights, offsets):
    return our_grouped_mm(rows, weights, offsets) if rows.is_cuda else torch_grouped_mm(rows, weights, offsets)


def torch_grouped_mm(rows, weights, offsets):
    return F.grouped_mm(rows, weights, offs=offsets)


# On CUDA an operator of our own. For F.grouped_mm the compiler demands a layout, and therefore computes the GELUs and
# casts that make its inputs twice: once for the product and once for the gradient. With flexible_layout it does not.
our_grouped_mm = torch.library.custom_op(
    "charmoe::grouped_mm",
    torch_grouped_mm,
    mutates_args=(),
    schema="(Tensor rows, Tensor weights, Tensor offsets) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
our_grouped_mm.register_fake(torch_grouped_mm)


def save_for_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def gradients_of_grouped_mm(ctx, gradient):
    """A weight's gradient is laid out as the weight is: (E, in, out), or its transpose."""
    rows, weights, offsets = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_rows = our_grouped_mm(gradient, weights.transpose(1, 2), offsets)
    if weights.stride(1) == 1:
        of_weights = our_grouped_mm(gradient.t(), rows, offsets).transpose(1, 2)
    else:
        of_weights = our_grouped_mm(rows.t(), gradient, offsets)
    return of_rows, of_weights, None


our_grouped_mm.register_autograd(gradients_of_grouped_mm, setup_context=save_for_gradients)


def padded_mm(rows, weights, room):
    return torch.bmm(rows.view(weights.size(0), room, -1), weights).flatten(0, 1)


class SlicedMM(torch.autograd.Function):
    """x (R, in), weights (E, in, out) -> (R, out): the first sizes[0] rows times weights[0], the next sizes[1] times
    weights[1], …; 0 in the remaining rows."""

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
    """x cut along dim into these sizes and the rest."""
    return x.split([*sizes, x.size(dim) - sum(sizes)], dim)


def compute_dtype(x):
    """The dtype of matrix products of x: autocast's where it is on, for operations that autocast does not know."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
