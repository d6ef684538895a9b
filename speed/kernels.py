"""The MoE layer for a few tokens, as in decoding: three operations, each as a Triton kernel and in PyTorch.

    logits, probs, experts, gates = route(x, router_weight, k, "softmax", renormalize, temperature)
    hidden = up(x, w_in, bias_in, experts, gates, gate_first=False)
    y = down(hidden, w_out, experts, gates, gate_last=True)

`route`, `up` and `down` run as Triton kernels on CUDA, and as their PyTorch twins elsewhere, for tests. Each is one
custom operator, opaque to torch.compile and CUDA graphs. No gradients.

With few tokens, time goes to reading the experts' weights and to kernel launches. So each program loads one tile of
weights at once and keeps it. With at most as many choices as experts, each choice has its own programs; otherwise each
expert has, and they loop over its choices, so that no weight is read twice. The order of all sums is fixed: the same
input gives the same bits.

Letters as in `moe.py`; M = N·K choices; choice c is choice c % K of token c // K; P partial sums. A token's experts
are distinct.
"""

import torch
import torch.nn.functional as F

from selection import top_k_experts
from support.triton_here import AVAILABLE, uses_triton

if AVAILABLE:
    import triton
    import triton.language as tl

PROGRAMS = 128  # least number per launch: about the SMs of an H100
TILE = 4096  # weights per program, about 32 per thread
PARTIAL_SUMS = 7  # of `down`, at most, where K allows: torch.compile fuses a sum over so many into what follows


# ---------------------------------------------------------------------------------------------------------------------
# The router


@torch.library.custom_op("charmoe::route", mutates_args=())
def route(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, k: int, gate: str, renormalize: bool, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes tokens as `moe.MoE.route` does in evaluation, for a linear router at level token without capacity, top-p
    and balancing bias. -> float32 logits (N, E), probs (N, E), int64 experts (N, K), float32 gates (N, K)

    gate: "softmax" or "sigmoid"; renormalize: rescale a token's gates to a sum of 1; temperature: 0-d, on x's device.
    The K experts come best first, ties by index, or in expert order if K = E.
    """
    if not uses_triton(x_ND):
        outputs = route_twin(x_ND, weight_ED, k, gate, renormalize, temperature)
        return tuple(output.contiguous() for output in outputs)  # the strides of route_outputs
    (N, D), E = x_ND.shape, weight_ED.size(0)
    logits, probs, experts, gates = route_outputs(x_ND, weight_ED, k)
    block_E = power_of_2_from(E)
    with torch.cuda.device_of(x_ND):
        route_kernel[(N,)](
            x_ND.contiguous(), weight_ED.contiguous(), temperature, logits, probs, experts, gates,
            D=D, E=E, K=k, GATE=gate, RENORMALIZE=renormalize,
            BLOCK_E=block_E, BLOCK_D=min(power_of_2_from(D), max(16, TILE // block_E)),
        )  # fmt: skip
    return logits, probs, experts, gates


@route.register_fake
def _(x_ND, weight_ED, k, gate, renormalize, temperature):
    return route_outputs(x_ND, weight_ED, k)


def route_outputs(x_ND, weight_ED, k):
    N, E = x_ND.size(0), weight_ED.size(0)
    scores = [x_ND.new_empty((N, E), dtype=torch.float32) for _ in range(2)]
    experts_NK = x_ND.new_empty((N, k), dtype=torch.int64)
    return *scores, experts_NK, x_ND.new_empty((N, k), dtype=torch.float32)


def route_twin(x_ND, weight_ED, k, gate, renormalize, temperature):
    with torch.autocast(x_ND.device.type, enabled=False):
        logits_NE = F.linear(x_ND.float(), weight_ED.float())
        scaled_NE = logits_NE / temperature
        log_scores_NE = F.log_softmax(scaled_NE, dim=-1) if gate == "softmax" else F.logsigmoid(scaled_NE)
        experts_NK = top_k_experts(scaled_NE, k)
        chosen_NK = log_scores_NE.gather(1, experts_NK)
        gates_NK = F.softmax(chosen_NK, dim=-1) if renormalize else chosen_NK.exp()
        return logits_NE, F.softmax(log_scores_NE, dim=-1), experts_NK, gates_NK


# ---------------------------------------------------------------------------------------------------------------------
# The experts' first layer


@torch.library.custom_op("charmoe::up", mutates_args=())
def up(
    x_ND: torch.Tensor,
    w_in: torch.Tensor,
    bias_in: torch.Tensor | None,
    experts_NK: torch.Tensor,
    gates_NK: torch.Tensor,
    gate_first: bool,
) -> torch.Tensor:
    """Hidden units (N, K, H) of each choice, in x's dtype: GELU(x W_in[e]ᵀ + b_in[e]), or with gate_first
    (linear_concat) GELU(g · (x W_in[e]ᵀ + b_in[e])); 0 where the gate is 0.

    w_in: (E, H, D); bias_in: (E, H). GELU by the error function.
    """
    if not uses_triton(x_ND):
        return up_twin(x_ND, w_in, bias_in, experts_NK, gates_NK, gate_first)
    (N, K), (E, H, D) = experts_NK.shape, w_in.shape
    hidden = x_ND.new_empty((N, K, H))
    block_D = power_of_2_from(D)
    block_H = power_of_2_to(max(1, min(TILE // block_D, K * H // PROGRAMS)))
    by_expert, groups = grouping(N * K, E)
    with torch.cuda.device_of(x_ND):
        up_kernel[(ceil_div(H, block_H), groups)](
            x_ND.contiguous(), w_in.contiguous(), bias_in, experts_NK.contiguous(), gates_NK.contiguous(), hidden,
            N * K, D=D, H=H, K=K, GATE_FIRST=gate_first, BY_EXPERT=by_expert,
            BLOCK_M=power_of_2_from(N * K) if by_expert else 1, BLOCK_H=block_H, BLOCK_D=block_D,
        )  # fmt: skip
    return hidden


@up.register_fake
def _(x_ND, w_in, bias_in, experts_NK, gates_NK, gate_first):
    return x_ND.new_empty((*experts_NK.shape, w_in.size(1)))


def up_twin(x_ND, w_in, bias_in, experts_NK, gates_NK, gate_first):
    gates_NK1 = gates_NK[..., None]
    with torch.autocast(x_ND.device.type, enabled=False):
        y_NKH = torch.einsum("nd,nkhd->nkh", x_ND.to(w_in.dtype), w_in[experts_NK])
        if bias_in is not None:
            y_NKH = y_NKH + bias_in[experts_NK]
        y_NKH = F.gelu(y_NKH * gates_NK1 if gate_first else y_NKH)
        return torch.where(gates_NK1 != 0, y_NKH, 0).to(x_ND.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The experts' second layer


def down(hidden_NKH, w_out, experts_NK, gates_NK, gate_last):
    """Output (N, D) of the experts, in hidden's dtype: Σ_k g_k · (hidden_k W_out[e_k]) with gate_last (mlp), else
    Σ_k hidden_k W_out[e_k] (linear_concat). Choices with a gate of 0 add nothing. w_out: (E, H, D).

    Partial sums are added outside the operator, so that torch.compile can fuse that with the next operation.
    """
    return partial_down(hidden_NKH, w_out, experts_NK, gates_NK, gate_last).sum(dim=0).to(hidden_NKH.dtype)


@torch.library.custom_op("charmoe::down", mutates_args=())
def partial_down(
    hidden_NKH: torch.Tensor, w_out: torch.Tensor, experts_NK: torch.Tensor, gates_NK: torch.Tensor, gate_last: bool
) -> torch.Tensor:
    """The (P, N, D) float32 partial sums of `down`."""
    if not uses_triton(hidden_NKH):
        return down_twin(hidden_NKH, w_out, experts_NK, gates_NK, gate_last).float()[None]
    (N, K), (E, H, D) = experts_NK.shape, w_out.shape
    block_H, block_D = down_blocks(K, H, D)
    splits = ceil_div(H, block_H)
    partial = hidden_NKH.new_empty((K * splits, N, D), dtype=torch.float32)
    by_expert, groups = grouping(N * K, E)
    with torch.cuda.device_of(hidden_NKH):
        down_kernel[(ceil_div(D, block_D), groups, splits)](
            hidden_NKH.contiguous(), w_out.contiguous(), experts_NK.contiguous(), gates_NK.contiguous(), partial,
            N * K, D=D, H=H, K=K, GATE_LAST=gate_last, BY_EXPERT=by_expert,
            BLOCK_M=power_of_2_from(N * K) if by_expert else 1, BLOCK_H=block_H, BLOCK_D=block_D,
        )  # fmt: skip
    return partial


@partial_down.register_fake
def _(hidden_NKH, w_out, experts_NK, gates_NK, gate_last):
    (N, K, H), D = hidden_NKH.shape, w_out.size(2)
    sums = K * ceil_div(H, down_blocks(K, H, D)[0]) if uses_triton(hidden_NKH) else 1
    return hidden_NKH.new_empty((sums, N, D), dtype=torch.float32)


def down_blocks(K, H, D):
    """(BLOCK_H, BLOCK_D): the tile of weights of a program of `down`. Independent of N, so that a token's sums are the
    same in every batch."""
    block_H = 16
    while block_H < min(512, H) and K * ceil_div(H, block_H) > PARTIAL_SUMS:
        block_H *= 2
    block_D = 64
    while block_D > 16 and (block_H * block_D > TILE or K * ceil_div(H, block_H) * ceil_div(D, block_D) < PROGRAMS):
        block_D //= 2  # not below 32 bytes of bf16, the smallest read
    return block_H, block_D


def down_twin(hidden_NKH, w_out, experts_NK, gates_NK, gate_last):
    gates_NK1 = gates_NK[..., None]
    with torch.autocast(hidden_NKH.device.type, enabled=False):
        y_NKD = torch.einsum("nkh,nkhd->nkd", hidden_NKH.to(w_out.dtype), w_out[experts_NK]).float()
        y_NKD = y_NKD * gates_NK1 if gate_last else y_NKD
        return torch.where(gates_NK1 != 0, y_NKD, 0).sum(dim=1).to(hidden_NKH.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes of a launch


def grouping(M, E):
    """(whether programs go by expert, number of groups): by expert as soon as choices must share one."""
    return (True, E) if M > E else (False, M)


def ceil_div(a, b):
    return -(-a // b)


def power_of_2_from(n):
    """The smallest power of 2 ≥ n."""
    return 1 << (n - 1).bit_length()


def power_of_2_to(n):
    """The largest power of 2 ≤ n."""
    return 1 << (n.bit_length() - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. Tensors are contiguous; elements beyond a shape, or of a choice with a gate of 0, are masked.

if AVAILABLE:

    @triton.jit
    def gelu(y):
        return 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))

    @triton.jit
    def choose(
        logit, divisor,
        E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """(probs, rank, gate) of each expert for one token, whose choice number i is the expert of rank i < K."""
        e = tl.arange(0, BLOCK_E)
        cooled = tl.where(e < E, logit / divisor, float("-inf"))
        if GATE == "softmax":
            above = cooled - tl.max(cooled, axis=0)
            log_score = above - tl.log(tl.sum(tl.exp(above), axis=0))
        else:
            tl.static_assert(GATE == "sigmoid")
            log_score = tl.minimum(cooled, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(cooled)))
        score = tl.exp(log_score - tl.max(log_score, axis=0))

        # NaN ranks last, so that there are always K experts: the next kernels read memory at their numbers.
        if K == E:
            rank = e
        else:
            value = tl.where(cooled == cooled, cooled, float("-inf"))
            is_tie = (value[None, :] == value[:, None]) & (e[None, :] < e[:, None])
            is_before = (value[None, :] > value[:, None]) | is_tie
            rank = tl.sum(is_before.to(tl.int32), axis=1)
        if RENORMALIZE:
            best_score = tl.max(tl.where(rank < K, log_score, float("-inf")), axis=0)
            share = tl.where(rank < K, tl.exp(log_score - best_score), 0.0)
            gate = share / tl.sum(share, axis=0)
        else:
            gate = tl.exp(log_score)
        return score / tl.sum(score, axis=0), rank, gate

    @triton.jit
    def route_kernel(
        x, weight, temperature, logits, probs, experts, gates,
        D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, RENORMALIZE: tl.constexpr,
        BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per token."""
        n = tl.program_id(0)
        e = tl.arange(0, BLOCK_E)
        divisor = tl.load(temperature).to(tl.float32)  # early, so that nothing waits for it
        products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x_d = tl.load(x + n * D + d, mask=d < D, other=0.0).to(tl.float32)
            is_weight = (e < E)[:, None] & (d < D)[None, :]
            w_ed = tl.load(weight + e[:, None] * D + d[None, :], mask=is_weight, other=0.0).to(tl.float32)
            products += w_ed * x_d[None, :]
        logit = tl.sum(products, axis=1)
        tl.store(logits + n * E + e, logit, mask=e < E)

        score, rank, gate = choose(logit, divisor, E, K, GATE, RENORMALIZE, BLOCK_E)
        tl.store(probs + n * E + e, score, mask=e < E)
        tl.store(experts + n * K + rank, e.to(tl.int64), mask=rank < K)
        tl.store(gates + n * K + rank, gate, mask=rank < K)

    @triton.jit
    def group_of(group, experts, gates, M, H: tl.constexpr, BY_EXPERT: tl.constexpr, BLOCK_M: tl.constexpr):
        """(expert of a group of choices, rows of its weights to load: H, or 0 if all gates are 0)"""
        if BY_EXPERT:
            c = tl.arange(0, BLOCK_M)
            expert = group.to(tl.int64)
            is_own = tl.load(experts + c, mask=c < M, other=-1) == expert
            is_used = is_own & (tl.load(gates + c, mask=c < M, other=0.0) != 0)
            rows = tl.max(is_used.to(tl.int32), axis=0) * H
        else:
            expert = tl.load(experts + group)
            rows = tl.where(tl.load(gates + group) != 0, H, 0)
        return expert, rows

    @triton.jit(do_not_specialize=["M"])
    def up_kernel(
        x, w_in, bias_in, experts, gates, hidden, M,
        D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, GATE_FIRST: tl.constexpr, BY_EXPERT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per BLOCK_H hidden units and group of choices."""
        group = tl.program_id(1)
        expert, rows = group_of(group, experts, gates, M, H, BY_EXPERT, BLOCK_M)
        h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.arange(0, BLOCK_D)
        is_weight = (h < rows)[:, None] & (d < D)[None, :]
        w_hd = tl.load(w_in + (expert * H + h)[:, None] * D + d[None, :], mask=is_weight, other=0.0)
        bias_h = tl.zeros((BLOCK_H,), tl.float32)
        if bias_in is not None:
            bias_h += tl.load(bias_in + expert * H + h, mask=h < rows, other=0.0).to(tl.float32)
        for i in range(0, BLOCK_M):
            c = i if BY_EXPERT else group
            if tl.load(experts + c, mask=c < M, other=-1) == expert:
                gate = tl.load(gates + c)
                x_d = tl.load(x + c // K * D + d, mask=d < D, other=0.0).to(tl.float32)
                y = tl.sum(w_hd.to(tl.float32) * x_d[None, :], axis=1) + bias_h
                if GATE_FIRST:
                    y = y * gate
                tl.store(hidden + c * H + h, tl.where(gate != 0, gelu(y), 0.0), mask=h < H)

    @triton.jit(do_not_specialize=["M"])
    def down_kernel(
        hidden, w_out, experts, gates, partial, M,
        D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, GATE_LAST: tl.constexpr, BY_EXPERT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per BLOCK_D columns, group of choices and BLOCK_H hidden units. partial: (K · splits, N, D)."""
        group = tl.program_id(1)
        expert, rows = group_of(group, experts, gates, M, H, BY_EXPERT, BLOCK_M)
        split = tl.program_id(2)
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        h = split * BLOCK_H + tl.arange(0, BLOCK_H)
        is_weight = (h < rows)[:, None] & (d < D)[None, :]
        w_hd = tl.load(w_out + (expert * H + h)[:, None] * D + d[None, :], mask=is_weight, other=0.0)
        for i in range(0, BLOCK_M):
            c = i if BY_EXPERT else group
            if tl.load(experts + c, mask=c < M, other=-1) == expert:
                gate = tl.load(gates + c)
                hidden_h = tl.load(hidden + c * H + h, mask=h < H, other=0.0).to(tl.float32)
                y = tl.sum(w_hd.to(tl.float32) * hidden_h[:, None], axis=0)
                if GATE_LAST:
                    y = y * gate
                row = (c % K * tl.num_programs(2) + split) * (M // K) + c // K
                tl.store(partial + row * D + d, tl.where(gate != 0, y, 0.0), mask=d < D)
