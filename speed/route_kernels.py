"""Routing in training: choosing experts, laying tokens out expert by expert, and both backward, in four Triton kernels.

    probs, experts, gates, counts, sums = choose(logits, temperature, real, k, renormalize)
    rows, place, offsets, sums = lay_out(x, experts, counts, sums)
    y_rows_gradient, gates_gradient = spread(gradient, y_rows, gates, place)
    logits_gradient = route_gradients(logits, probs, experts, temperature, real, …)

torch needs some twenty kernels a layer for this: a softmax, a choice, a sort, its inverse, a histogram. Here `choose`
also notes for each block of tokens how often each expert was chosen; `lay_out` turns these counts into a stable sort,
for which each block needs only the counts of those before it, and copies the tokens to their rows. Backward, `spread`
takes the gradient of the output to the rows and to the gates, and `route_gradients` takes that of the gates to the
logits. The router's product is left to the compiler, which computes it where it has x at hand: `fused_routing.py`.

Numbers are those of `MoE.route` and the backend `sorted`, up to the order of sums and, in bfloat16, roundings. Each
kernel is one custom operator, opaque to torch.compile and CUDA graphs, with a twin in PyTorch that runs elsewhere. The
order of all sums is fixed.

Letters as in `moe.py`; M = N·K choices; choice c is choice c % K of token c // K; P blocks of tokens. A layer's sums
over its tokens are W = 3·E + 3 numbers: choices, gates and probabilities of each expert, entropy, squared logsumexp of
the logits, tokens.
"""

import torch
import torch.nn.functional as F

from selection import softmax, softmax_gate, top_k_experts
from speed.kernels import ceil_div, power_of_2_from
from support.triton_here import AVAILABLE, uses_triton

if AVAILABLE:
    import triton
    import triton.language as tl

TOKENS, COLUMNS = 32, 128  # of a block, so that up to MOST_EXPERTS no program needs more registers than there are
MOST_EXPERTS = 64


def operator(name):
    """A custom operator whose inputs the compiler may lay out as it likes: otherwise it computes them twice, once for
    the operator and once for gradients."""
    return torch.library.custom_op(f"charmoe::{name}", mutates_args=(), tags=(torch.Tag.flexible_layout,))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens choose


@operator("choose")
def choose(
    logits_NE: torch.Tensor, temperature: torch.Tensor, real_N: torch.Tensor | None, k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> float32 probs (N, E), int64 experts (N, K), float32 gates (N, K), int32 counts (P, E), float32 sums (P, W)

    The gate is softmax. renormalize: rescale a token's gates to a sum of 1; temperature: 0-d; real_N: False for tokens
    that count in no sum; None = all count. Experts come best first, ties by index, or in expert order if K = E.
    """
    if not uses_triton(logits_NE):
        return choose_twin(logits_NE, temperature, real_N, k, renormalize)
    (N, E), outputs = logits_NE.shape, choose_outputs(logits_NE, k)
    real_N = None if real_N is None else real_N.contiguous()
    with torch.cuda.device_of(logits_NE):
        choose_kernel[(ceil_div(N, TOKENS),)](
            logits_NE.contiguous(), temperature, real_N, *outputs, N,
            E=E, K=k, RENORMALIZE=renormalize, BLOCK_N=TOKENS, BLOCK_E=power_of_2_from(E),
        )  # fmt: skip
    return outputs


@choose.register_fake
def _(logits_NE, temperature, real_N, k, renormalize):
    return choose_outputs(logits_NE, k)


def choose_outputs(logits_NE, k):
    N, E = logits_NE.shape
    P = ceil_div(N, TOKENS)
    shapes = (N, E), (N, k), (N, k), (P, E), (P, 3 * E + 3)
    dtypes = torch.float32, torch.int64, torch.float32, torch.int32, torch.float32
    return tuple(logits_NE.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def choose_twin(logits_NE, temperature, real_N, k, renormalize):
    cooled_NE = logits_NE / temperature
    probs_NE, _ = softmax_gate(cooled_NE)
    experts_NK = top_k_experts(cooled_NE, k).contiguous()
    gates_NK = softmax(cooled_NE.gather(1, experts_NK)) if renormalize else probs_NE.gather(1, experts_NK)
    chosen_NE = torch.zeros_like(logits_NE).scatter(1, experts_NK, 1.0)
    gates_NE = torch.zeros_like(logits_NE).scatter(1, experts_NK, gates_NK)
    entropy_N1 = torch.special.entr(probs_NE).sum(dim=1, keepdim=True)
    z_N1 = torch.logsumexp(logits_NE, dim=1, keepdim=True).square()
    terms = chosen_NE, gates_NE, probs_NE, entropy_N1, z_N1, torch.ones_like(z_N1)
    weight_N1 = 1.0 if real_N is None else real_N[:, None].float()
    counts_PE, sums_PW = sums_of_blocks(chosen_NE), sums_of_blocks(weight_N1 * torch.cat(terms, dim=1))
    return probs_NE.contiguous(), experts_NK, gates_NK.contiguous(), counts_PE.to(torch.int32), sums_PW


def sums_of_blocks(values):
    """(P, …): sums of values (N, …) over blocks of tokens."""
    N = values.size(0)
    return F.pad(values, (0, 0, 0, -N % TOKENS)).unflatten(0, (-1, TOKENS)).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens lie expert by expert


@operator("lay_out")
def lay_out(
    x_BTD: torch.Tensor, experts_NK: torch.Tensor, counts_PE: torch.Tensor, sums_PW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> rows (M, D) of x, one for each choice, expert by expert and in each in the order of tokens;
    place (N, K) int64, the row of each choice; offsets (E,) int32, where each expert's rows end; the sums (W,)"""
    if not uses_triton(x_BTD):
        return lay_out_twin(x_BTD, experts_NK, counts_PE, sums_PW)
    (N, K), (P, E), D, W = experts_NK.shape, counts_PE.shape, x_BTD.size(-1), sums_PW.size(1)
    outputs = lay_out_outputs(x_BTD, experts_NK, counts_PE, sums_PW)
    block_E, block_W = power_of_2_from(E), power_of_2_from(W)
    with torch.cuda.device_of(x_BTD):
        lay_out_kernel[(P + 1,)](
            x_BTD.contiguous(), experts_NK, counts_PE, sums_PW, *outputs, N, P,
            D=D, E=E, K=K, W=W, BLOCK_N=TOKENS, BLOCK_E=block_E, BLOCK_D=min(COLUMNS, power_of_2_from(D)),
            BLOCK_W=block_W, BLOCK_P=max(1, min(4096 // block_E, 8192 // block_W, 1024)),
        )  # fmt: skip
    return outputs


@lay_out.register_fake
def _(x_BTD, experts_NK, counts_PE, sums_PW):
    return lay_out_outputs(x_BTD, experts_NK, counts_PE, sums_PW)


def lay_out_outputs(x_BTD, experts_NK, counts_PE, sums_PW):
    rows = x_BTD.new_empty((experts_NK.numel(), x_BTD.size(-1)))
    offsets = counts_PE.new_empty((counts_PE.size(1),))
    return rows, torch.empty_like(experts_NK), offsets, sums_PW.new_empty((sums_PW.size(1),))


def lay_out_twin(x_BTD, experts_NK, counts_PE, sums_PW):
    order_M = torch.argsort(experts_NK.reshape(-1), stable=True)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=x_BTD.device))
    rows = x_BTD.flatten(0, -2)[order_M // experts_NK.size(1)]
    offsets = counts_PE.sum(dim=0).cumsum(0).to(torch.int32)
    return rows, place_M.view(experts_NK.shape), offsets, sums_PW.sum(dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@operator("spread")
def spread(
    gradient_BTD: torch.Tensor, y_rows: torch.Tensor, gates_NK: torch.Tensor, place_BTK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y_rows (M, D) and of the gates (N, K), from that of Σ_k g_k · y_rows[place_k], (B, T, D)."""
    if not uses_triton(gradient_BTD):
        return spread_twin(gradient_BTD, y_rows, gates_NK, place_BTK)
    (N, K), D, outputs = gates_NK.shape, y_rows.size(1), spread_outputs(y_rows, gates_NK)
    with torch.cuda.device_of(gradient_BTD):
        spread_kernel[(ceil_div(N, TOKENS),)](
            gradient_BTD.contiguous(), y_rows.contiguous(), gates_NK.contiguous(), place_BTK.contiguous(), *outputs, N,
            D=D, K=K, BLOCK_N=TOKENS, BLOCK_D=min(COLUMNS, power_of_2_from(D)),
        )  # fmt: skip
    return outputs


@spread.register_fake
def _(gradient_BTD, y_rows, gates_NK, place_BTK):
    return spread_outputs(y_rows, gates_NK)


def spread_outputs(y_rows, gates_NK):
    return y_rows.new_empty(y_rows.shape), gates_NK.new_empty(gates_NK.shape)


def spread_twin(gradient_BTD, y_rows, gates_NK, place_BTK):
    gradient_N1D = gradient_BTD.to(y_rows.dtype).flatten(0, -2)[:, None]
    y_NKD = y_rows[place_BTK.flatten()].view(*gates_NK.shape, -1)
    gates_gradient = (gradient_N1D.float() * y_NKD.float()).sum(dim=2)
    choices_NKD = gradient_N1D * gates_NK[:, :, None].to(y_rows.dtype)
    y_gradient = torch.empty_like(y_rows)
    y_gradient[place_BTK.flatten()] = choices_NKD.flatten(0, 1)
    return y_gradient, gates_gradient.to(gates_NK.dtype)


@operator("route_gradients")
def route_gradients(
    logits_NE: torch.Tensor,
    probs_NE: torch.Tensor,
    experts_NK: torch.Tensor,
    temperature: torch.Tensor,
    real_N: torch.Tensor | None,
    gates_gradient: torch.Tensor,
    sums_gradient: torch.Tensor,
    renormalize: bool,
) -> torch.Tensor:
    """The gradient of the logits (N, E), from those of the gates (N, K) and the sums (W,). Of the sums, choices and
    entropy have none."""
    words = logits_NE, probs_NE, experts_NK, temperature, real_N, gates_gradient, sums_gradient
    if not uses_triton(logits_NE):
        return route_gradients_twin(*words, renormalize)
    (N, E), logits_gradient = logits_NE.shape, logits_NE.new_empty(logits_NE.shape)
    with torch.cuda.device_of(logits_NE):
        route_gradients_kernel[(ceil_div(N, TOKENS),)](
            *(word if word is None else word.contiguous() for word in words), logits_gradient, N,
            E=E, K=experts_NK.size(1), RENORMALIZE=renormalize, BLOCK_N=TOKENS, BLOCK_E=power_of_2_from(E),
        )  # fmt: skip
    return logits_gradient


@route_gradients.register_fake
def _(logits_NE, probs_NE, experts_NK, temperature, real_N, gates_gradient, sums_gradient, renormalize):
    return logits_NE.new_empty(logits_NE.shape)


def route_gradients_twin(
    logits_NE, probs_NE, experts_NK, temperature, real_N, gates_gradient, sums_gradient, renormalize
):
    weight_N1 = 1.0 if real_N is None else real_N[:, None].float()
    E = logits_NE.size(1)
    _, of_gates_E, of_probs_E, (_, of_z, _) = sums_gradient.split((E, E, E, 3))
    chosen_NE = torch.zeros_like(logits_NE).scatter(1, experts_NK, 1.0)
    of_gates = torch.zeros_like(logits_NE).scatter(1, experts_NK, gates_gradient) + weight_N1 * of_gates_E * chosen_NE
    of_probs = weight_N1 * of_probs_E.expand(logits_NE.shape)
    if renormalize:
        shares_NE = probs_NE * chosen_NE
        of_cooled = through_softmax(shares_NE / shares_NE.sum(dim=1, keepdim=True), of_gates)
        of_cooled = of_cooled + through_softmax(probs_NE, of_probs)
    else:
        of_cooled = through_softmax(probs_NE, of_gates + of_probs)
    lse_N1 = torch.logsumexp(logits_NE, dim=1, keepdim=True)
    return (of_cooled / temperature + weight_N1 * of_z * 2 * lse_N1 * (logits_NE - lse_N1).exp()).contiguous()


def through_softmax(shares, gradient):
    return shares * (gradient - (gradient * shares).sum(dim=1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. Tensors are contiguous; elements beyond a shape are masked.

if AVAILABLE:

    @triton.jit(do_not_specialize=["N"])
    def choose_kernel(
        logits, temperature, real, probs, experts, gates, counts, sums, N,
        E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """One program per block of tokens."""
        block = tl.program_id(0).to(tl.int64)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.arange(0, BLOCK_E)
        is_score = (n < N)[:, None] & (e < E)[None, :]
        divisor = tl.load(temperature).to(tl.float32)
        logit = tl.load(logits + n[:, None] * E + e[None, :], mask=is_score, other=0.0)
        cooled = tl.where((e < E)[None, :], logit / divisor, float("-inf"))
        share = tl.exp(cooled - tl.max(cooled, axis=1)[:, None])
        prob = share / tl.sum(share, axis=1)[:, None]
        tl.store(probs + n[:, None] * E + e[None, :], prob, mask=is_score)

        # NaN ranks last, so that there are always K experts: the next kernels read memory at their numbers.
        if K == E:
            rank = tl.zeros((BLOCK_N, BLOCK_E), tl.int32) + e[None, :]
        else:
            rank = tl.full((BLOCK_N, BLOCK_E), K, tl.int32)
            value = tl.where(cooled > -3.4e38, cooled, -3.4e38)
            value = tl.where((e < E)[None, :], value, float("-inf"))
            for j in tl.static_range(K):
                is_best = e[None, :] == tl.argmax(value, axis=1)[:, None]
                rank = tl.where(is_best, j, rank)
                value = tl.where(is_best, float("-inf"), value)
        is_chosen = (rank < K) & is_score
        gate = tl.where(rank < K, prob, 0.0)
        if RENORMALIZE:
            gate = gate / tl.sum(gate, axis=1)[:, None]
        tl.store(experts + n[:, None] * K + rank, tl.zeros((BLOCK_N, BLOCK_E), tl.int64) + e[None, :], mask=is_chosen)
        tl.store(gates + n[:, None] * K + rank, gate, mask=is_chosen)
        tl.store(counts + block * E + e, tl.sum(is_chosen.to(tl.int32), axis=0), mask=e < E)

        counted = (n < N).to(tl.float32)
        if real is not None:
            counted = tl.load(real + n, mask=n < N, other=0).to(tl.float32)
        log_prob = tl.log(tl.where(prob > 0, prob, 1.0))
        top = tl.max(tl.where((e < E)[None, :], logit, float("-inf")), axis=1)
        exps = tl.where((e < E)[None, :], tl.exp(logit - top[:, None]), 0.0)
        lse = top + tl.log(tl.sum(exps, axis=1))
        own = sums + block * (3 * E + 3)
        is_real = is_score & (counted > 0)[:, None]
        tl.store(own + e, tl.sum((is_chosen & is_real).to(tl.float32), axis=0), mask=e < E)
        tl.store(own + E + e, tl.sum(tl.where(is_chosen & is_real, gate, 0.0), axis=0), mask=e < E)
        tl.store(own + 2 * E + e, tl.sum(tl.where(is_real, prob, 0.0), axis=0), mask=e < E)
        tl.store(own + 3 * E, -tl.sum(tl.sum(tl.where(is_real, prob * log_prob, 0.0), axis=1), axis=0))
        tl.store(own + 3 * E + 1, tl.sum(tl.where(counted > 0, lse * lse, 0.0), axis=0))
        tl.store(own + 3 * E + 2, tl.sum(counted, axis=0))

    @triton.jit(do_not_specialize=["N", "P"])
    def lay_out_kernel(
        x, experts, counts, sums, rows, place, offsets, totals, N, P,
        D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """One program per block of tokens, and one that adds up the blocks' sums."""
        block = tl.program_id(0)
        e = tl.arange(0, BLOCK_E)
        total = tl.zeros((BLOCK_E,), tl.int32)
        before = tl.zeros((BLOCK_E,), tl.int32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            is_count = (p < P)[:, None] & (e < E)[None, :]
            count = tl.load(counts + p[:, None] * E + e[None, :], mask=is_count, other=0)
            total += tl.sum(count, axis=0)
            before += tl.sum(tl.where((p < block)[:, None], count, 0), axis=0)
        end = tl.cumsum(total, axis=0)
        if block == P:
            tl.store(offsets + e, end, mask=e < E)
            w = tl.arange(0, BLOCK_W)
            total_w = tl.zeros((BLOCK_W,), tl.float32)
            for start in range(0, P, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                is_sum = (p < P)[:, None] & (w < W)[None, :]
                total_w += tl.sum(tl.load(sums + p[:, None] * W + w[None, :], mask=is_sum, other=0.0), axis=0)
            tl.store(totals + w, total_w, mask=w < W)
        else:
            n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
            for j in tl.static_range(K):
                expert = tl.load(experts + n * K + j, mask=n < N, other=-1)
                chosen += (e[None, :] == expert[:, None]).to(tl.int32)
            row_ne = (end - total + before)[None, :] + tl.cumsum(chosen, axis=0) - chosen
            for j in tl.static_range(K):
                expert = tl.load(experts + n * K + j, mask=n < N, other=-1)
                row = tl.sum(tl.where(e[None, :] == expert[:, None], row_ne, 0), axis=1).to(tl.int64)
                tl.store(place + n * K + j, row, mask=n < N)
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    is_x = (n < N)[:, None] & (d < D)[None, :]
                    x_nd = tl.load(x + n[:, None] * D + d[None, :], mask=is_x, other=0.0)
                    tl.store(rows + row[:, None] * D + d[None, :], x_nd, mask=is_x)

    @triton.jit(do_not_specialize=["N"])
    def spread_kernel(
        gradient, y, gates, place, y_gradient, gates_gradient, N,
        D: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per block of tokens."""
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        for j in tl.static_range(K):
            row = tl.load(place + n * K + j, mask=n < N, other=0)
            gate = tl.load(gates + n * K + j, mask=n < N, other=0.0).to(y.dtype.element_ty).to(tl.float32)
            of_gate = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                is_y = (n < N)[:, None] & (d < D)[None, :]
                of_y = tl.load(gradient + n[:, None] * D + d[None, :], mask=is_y, other=0.0)
                of_y = of_y.to(y.dtype.element_ty).to(tl.float32)
                y_nd = tl.load(y + row[:, None] * D + d[None, :], mask=is_y, other=0.0).to(tl.float32)
                of_gate += tl.sum(of_y * y_nd, axis=1)
                of_row = (of_y * gate[:, None]).to(y_gradient.dtype.element_ty)
                tl.store(y_gradient + row[:, None] * D + d[None, :], of_row, mask=is_y)
            tl.store(gates_gradient + n * K + j, of_gate, mask=n < N)

    @triton.jit(do_not_specialize=["N"])
    def route_gradients_kernel(
        logits, probs, experts, temperature, real, gates_gradient, sums_gradient, logits_gradient, N,
        E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """One program per block of tokens."""
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.arange(0, BLOCK_E)
        divisor = tl.load(temperature).to(tl.float32)
        of_gate_sum = tl.load(sums_gradient + E + e, mask=e < E, other=0.0)
        of_prob_sum = tl.load(sums_gradient + 2 * E + e, mask=e < E, other=0.0)
        of_z = tl.load(sums_gradient + 3 * E + 1)
        is_score = (n < N)[:, None] & (e < E)[None, :]
        logit = tl.load(logits + n[:, None] * E + e[None, :], mask=is_score, other=float("-inf"))
        prob = tl.load(probs + n[:, None] * E + e[None, :], mask=is_score, other=0.0)
        counted = (n < N).to(tl.float32)
        if real is not None:
            counted = tl.load(real + n, mask=n < N, other=0).to(tl.float32)
        is_chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
        of_gate = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for j in tl.static_range(K):
            is_own = e[None, :] == tl.load(experts + n * K + j, mask=n < N, other=-1)[:, None]
            own = tl.load(gates_gradient + n * K + j, mask=n < N, other=0.0)
            of_gate += tl.where(is_own, own[:, None] + counted[:, None] * of_gate_sum[None, :], 0.0)
            is_chosen += is_own.to(tl.int32)
        of_prob = counted[:, None] * of_prob_sum[None, :]
        if RENORMALIZE:
            share = tl.where(is_chosen > 0, prob, 0.0)
            whole = tl.sum(share, axis=1)
            share = share / tl.where(whole > 0, whole, 1.0)[:, None]
            of_cooled = share * (of_gate - tl.sum(of_gate * share, axis=1)[:, None])
        else:
            of_prob += of_gate
            of_cooled = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        of_cooled += prob * (of_prob - tl.sum(of_prob * prob, axis=1)[:, None])
        top = tl.where(n < N, tl.max(logit, axis=1), 0.0)
        exps = tl.where(is_score, tl.exp(logit - top[:, None]), 0.0)
        whole = tl.where(n < N, tl.sum(exps, axis=1), 1.0)
        of_lse = counted * of_z * 2.0 * (top + tl.log(whole))
        of_logit = of_cooled / divisor + of_lse[:, None] * (exps / whole[:, None])
        tl.store(logits_gradient + n[:, None] * E + e[None, :], of_logit, mask=is_score)
