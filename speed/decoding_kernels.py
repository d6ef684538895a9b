"""A step of decoding in few kernels: each as a Triton kernel and in PyTorch.

    y = attend(qkv, keys, values, position)                       # alone, within a step of other operations

    stream, qkv = norm_linear(stream, …)                          # four kernels a layer
    added = attend_and_project(qkv, keys, values, position, weight)
    stream, …, experts, gates, hidden = norm_route_up(stream, …)  # or norm_linear, in a dense layer
    added = kernels.partial_down(hidden, …)
    logits = norm_head_draw(stream, …, tokens, …)                 # the end: the next token is in `tokens`

What a kernel adds to the residual stream are partial sums, which the next kernel adds up in a fixed order: each of its
programs for itself, for that costs less than a kernel. So there is nothing to wait for within one, and no atomic.

`speed/kernels.py` says what is common to all of these: twins, fixed order of sums, no gradients. A token's sums do not
depend on the other sequences of the batch. Nothing here waits for the device.

Letters as in `moe.py`; S positions of the cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import sample
from speed import kernels
from speed.kernels import PROGRAMS, TILE, ceil_div, power_of_2_from, power_of_2_to
from support.triton_here import AVAILABLE, uses_triton

if AVAILABLE:
    import triton
    import triton.language as tl

LARGEST_VOCABULARY = 256  # of norm_head_draw: each symbol is compared with each other
IN_REGISTERS = 16384  # numbers of a tile of keys, or of values, in a program of 8 warps

# ---------------------------------------------------------------------------------------------------------------------
# Attention


@torch.library.custom_op("charmoe::attend", mutates_args=("keys", "values"))
def attend(qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Attention (B, D) of one new token per sequence, whose key and value are written into the cache.

    qkv: (B, 3·D), as `model.Attention` lays it out; keys, values: (B, n_head, S, D / n_head); position: (1,) int64.
    """
    if not uses_triton(qkv):
        return attend_twin(qkv, keys, values, position)
    return launch_attention(qkv, keys, values, position, None)


@attend.register_fake
def _(qkv, keys, values, position):
    return qkv.new_empty(qkv.size(0), qkv.size(1) // 3)


def attend_twin(qkv, keys, values, position):
    B, n_head, S, width = keys.shape
    q, k, v = qkv.view(B, 3, n_head, 1, width).unbind(1)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    visible_1S = (torch.arange(S, device=qkv.device) <= position)[None]
    with torch.autocast(qkv.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible_1S).reshape(B, -1)


def attend_and_project(qkv, keys, values, position, weight):
    """The partial sums (n_head, B, D) of the projection of `attend`, one for each head. weight: (D, D)."""
    if not uses_triton(qkv):
        return attend_and_project_twin(qkv, keys, values, position, weight)
    return launch_attention(qkv, keys, values, position, weight)


def attend_and_project_twin(qkv, keys, values, position, weight):
    y_BHW = attend_twin(qkv, keys, values, position).unflatten(1, (keys.size(1), -1))
    return torch.einsum("bhw,dhw->hbd", y_BHW.float(), weight.unflatten(1, y_BHW.shape[1:]).float())


def launch_attention(qkv, keys, values, position, weight):
    B, n_head, S, width = keys.shape
    D = n_head * width
    block_W = power_of_2_from(width)
    block_S = min(power_of_2_from(S), power_of_2_to(max(1, IN_REGISTERS // block_W)))
    block_D = min(power_of_2_from(D), power_of_2_to(max(1, TILE // block_W))) if weight is not None else 1
    out = qkv.new_empty(B, D) if weight is None else qkv.new_empty((n_head, B, D), dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        attention_kernel[(n_head, B, 1 if weight is None else ceil_div(D, block_D))](
            qkv.contiguous(), keys, values, position, weight, out,
            HEADS=n_head, S=S, WIDTH=width, BLOCK_S=block_S, BLOCK_W=block_W, BLOCK_D=block_D, num_warps=8,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# A norm and the product that follows


class Stream(NamedTuple):
    """The residual stream (N, D) float32 as the next kernel adds it up: x, and the P sums in `added` (P, N, D).

    At the first layer, ids (N,) and position (1,) are set, and x (V, D) and added (S, D) are the embeddings.
    """

    x: torch.Tensor
    added: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    position: torch.Tensor | None = None

    @property
    def shape(self):
        """(N, P, D)"""
        N, D = (self.x if self.ids is None else self.ids).size(0), self.x.size(1)
        return N, 0 if self.added is None or self.ids is not None else self.added.size(0), D

    def rows(self):
        if self.ids is not None:
            return self.x[self.ids] + self.added[self.position]
        return self.x if self.added is None else self.x + self.added.sum(dim=0)


def norm_linear(stream, norm, weight, bias, gelu, carry):
    """-> (Stream of its sum, with `carry` added for later; y (N, R) = LayerNorm(stream) Wᵀ + b, in W's dtype)

    norm: its weight and bias (D,); weight: (R, D); bias (R,), carry (D,): or None; gelu: whether y goes through GELU.
    """
    if not uses_triton(weight):
        return norm_linear_twin(stream, norm, weight, bias, gelu, carry)
    (N, P, D), R = stream.shape, weight.size(0)
    x, y = weight.new_empty((N, D), dtype=torch.float32), weight.new_empty(N, R)
    block_D = power_of_2_from(D)
    block_R = power_of_2_to(max(1, min(TILE // block_D, R // PROGRAMS)))
    with torch.cuda.device_of(weight):
        linear_kernel[(ceil_div(R, block_R),)](
            *stream, *norm, weight, bias, carry, x, y,
            N=N, P=P, D=D, R=R, GELU=gelu, BLOCK_R=block_R, BLOCK_D=block_D,
        )  # fmt: skip
    return Stream(x), y


def norm_linear_twin(stream, norm, weight, bias, gelu, carry):
    x = stream.rows()
    y = F.linear(normalised(x, norm).to(weight.dtype).float(), weight.float(), None if bias is None else bias.float())
    return Stream(x if carry is None else x + carry), (F.gelu(y) if gelu else y).to(weight.dtype)


def normalised(x, norm):
    return F.layer_norm(x, x.shape[1:], *norm)


def norm_route_up(stream, norm, router, temperature, w_in, bias_in, bias_out, k, gate, renormalize, gate_first):
    """Routes LayerNorm(stream) as `kernels.route` does, and gives hidden units as `kernels.up`.

    -> (Stream of its sum, with the experts' bias_out added for later; logits; probs; experts; gates; hidden units)

    bias_out: (E, D), each by its gate; (D,), as it is; or None.
    """
    if not uses_triton(w_in):
        return norm_route_up_twin(
            stream, norm, router, temperature, w_in, bias_in, bias_out, k, gate, renormalize, gate_first
        )
    (N, P, D), (E, H, _) = stream.shape, w_in.shape
    x = w_in.new_empty((N, D), dtype=torch.float32)
    routed, hidden = kernels.route_outputs(x, router, k), w_in.new_empty(N, k, H)
    block_D = power_of_2_from(D)
    block_H = power_of_2_to(max(1, min(TILE // block_D, k * H // PROGRAMS)))
    with torch.cuda.device_of(w_in):
        routed_kernel[(ceil_div(H, block_H), N * k)](
            *stream[:2], *norm, router, temperature, w_in, bias_in, bias_out, x, *routed, hidden,
            N=N, P=P, D=D, E=E, H=H, K=k, GATE=gate, RENORMALIZE=renormalize, GATE_FIRST=gate_first,
            BIAS_BY_GATE=bias_out is not None and bias_out.dim() == 2,
            BLOCK_E=power_of_2_from(E), BLOCK_H=block_H, BLOCK_D=block_D,
        )  # fmt: skip
    return Stream(x), *routed, hidden


def norm_route_up_twin(stream, norm, router, temperature, w_in, bias_in, bias_out, k, gate, renormalize, gate_first):
    x = stream.rows()
    y = normalised(x, norm)
    routed = kernels.route_twin(y, router, k, gate, renormalize, temperature)
    hidden = kernels.up_twin(y.to(w_in.dtype), w_in, bias_in, *routed[2:], gate_first)
    if bias_out is not None:
        by_gate = bias_out.dim() == 2
        x = x + (torch.einsum("nk,nkd->nd", routed[3], bias_out[routed[2]].float()) if by_gate else bias_out)
    return Stream(x), *routed, hidden


# ---------------------------------------------------------------------------------------------------------------------
# The end of a step


def norm_head_draw(stream, norm, weight, uniform, position, tokens, temperature, top_k):
    """Writes the next tokens (N,) as `model.sample` draws them, and advances position. -> logits (N, V), float32

    weight: (V, D), of at most LARGEST_VOCABULARY symbols; temperature and top_k: as of `model.Decoder`.
    """
    V = weight.size(0)
    top_k = top_k if top_k and top_k < V else 0
    if not uses_triton(weight):
        return norm_head_draw_twin(stream, norm, weight, uniform, position, tokens, temperature, top_k)
    N, P, D = stream.shape
    logits = weight.new_empty((N, V), dtype=torch.float32)
    block_D = power_of_2_from(D)
    with torch.cuda.device_of(weight):
        head_kernel[(N,)](
            *stream[:2], *norm, weight, uniform, position, tokens, logits, float(temperature or 1),
            N=N, P=P, D=D, V=V, GREEDY=temperature == 0, TOP_K=top_k, BLOCK_V=power_of_2_from(V),
            ROWS=power_of_2_to(max(1, min(8 * TILE // block_D, power_of_2_from(V)))), BLOCK_D=block_D, num_warps=16,
        )  # fmt: skip
    return logits


def norm_head_draw_twin(stream, norm, weight, uniform, position, tokens, temperature, top_k):
    y = normalised(stream.rows(), norm).to(weight.dtype).float()
    logits = F.linear(y, weight.float()).to(weight.dtype).float()
    tokens.copy_(sample(logits, temperature, top_k, uniform))
    position.add_(1)
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. Tensors are contiguous; elements beyond a shape are masked.

if AVAILABLE:

    @triton.jit
    def attention_kernel(
        qkv, keys, values, position, weight, out,
        HEADS: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per head and sequence; with a weight, also per BLOCK_D columns of the projection, each of which
        attends by itself."""
        h, b = tl.program_id(0), tl.program_id(1)
        w = tl.arange(0, BLOCK_W)
        is_w = w < WIDTH
        D: tl.constexpr = HEADS * WIDTH
        if weight is not None:  # early, so that nothing waits for it
            d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
            is_weight = (d < D)[:, None] & is_w[None, :]
            w_dw = tl.load(weight + d[:, None] * D + h * WIDTH + w[None, :], mask=is_weight, other=0.0)
        new = qkv + 3 * b * D + h * WIDTH + w
        q_w = tl.load(new, mask=is_w, other=0.0).to(tl.float32)
        k_w = tl.load(new + D, mask=is_w, other=0.0)
        v_w = tl.load(new + 2 * D, mask=is_w, other=0.0)
        at = tl.load(position)
        first = (b * HEADS + h).to(tl.int64) * S * WIDTH
        if tl.program_id(2) == 0:
            tl.store(keys + first + at * WIDTH + w, k_w, mask=is_w)
            tl.store(values + first + at * WIDTH + w, v_w, mask=is_w)

        # The new token from registers, since another program may be writing it; then the cache, with a running maximum.
        scale = 1.0 / tl.sqrt(tl.full((), WIDTH, tl.float32))
        best = tl.sum(q_w * k_w.to(tl.float32), axis=0) * scale
        total = tl.full((), 1.0, tl.float32)
        y_w = v_w.to(tl.float32)
        for start in range(0, at, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            is_old = (s < at)[:, None] & is_w[None, :]
            place = first + s[:, None] * WIDTH + w[None, :]
            k_sw = tl.load(keys + place, mask=is_old, other=0.0)
            v_sw = tl.load(values + place, mask=is_old, other=0.0)
            score = tl.sum(k_sw.to(tl.float32) * q_w[None, :], axis=1) * scale
            score = tl.where(s < at, score, float("-inf"))
            higher = tl.maximum(best, tl.max(score, axis=0))
            shrink = tl.exp(best - higher)
            share = tl.exp(score - higher)
            total = total * shrink + tl.sum(share, axis=0)
            y_w = y_w * shrink + tl.sum(v_sw.to(tl.float32) * share[:, None], axis=0)
            best = higher
        y_w = (y_w / total).to(qkv.dtype.element_ty)
        if weight is None:
            tl.store(out + (b * HEADS + h) * WIDTH + w, y_w, mask=is_w)
        else:
            part_d = tl.sum(w_dw.to(tl.float32) * y_w.to(tl.float32)[None, :], axis=1)
            tl.store(out + (h * tl.num_programs(1) + b) * D + d, part_d, mask=d < D)

    @triton.jit
    def stream_row(
        x, added, ids, position, n, N: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Row n of a Stream."""
        d = tl.arange(0, BLOCK_D)
        if ids is not None:
            row = tl.load(x + tl.load(ids + n) * D + d, mask=d < D, other=0.0)
            row += tl.load(added + tl.load(position) * D + d, mask=d < D, other=0.0)
        else:
            row = tl.load(x + n * D + d, mask=d < D, other=0.0)
            for p in tl.static_range(P):
                row += tl.load(added + (p * N + n) * D + d, mask=d < D, other=0.0)
        return row

    @triton.jit
    def normalise(row, weight, bias, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """torch's LayerNorm of a row, with its default epsilon."""
        d = tl.arange(0, BLOCK_D)
        centred = tl.where(d < D, row - tl.sum(row, axis=0) / D, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + 1e-5)
        y = centred * scale * tl.load(weight + d, mask=d < D, other=0.0)
        if bias is not None:
            y += tl.load(bias + d, mask=d < D, other=0.0)
        return y

    @triton.jit(do_not_specialize=["ids"])  # a row of tokens: compiled once, wherever it lies
    def linear_kernel(
        x, added, ids, position, norm_weight, norm_bias, weight, bias, carry, summed, out,
        N: tl.constexpr, P: tl.constexpr, D: tl.constexpr, R: tl.constexpr, GELU: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per BLOCK_R outputs, for all tokens. Each adds up the stream; the first writes it."""
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        d = tl.arange(0, BLOCK_D)
        w_rd = tl.load(weight + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        bias_r = tl.zeros((BLOCK_R,), tl.float32)
        if bias is not None:
            bias_r += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)
        for n in tl.static_range(N):
            row = stream_row(x, added, ids, position, n, N, P, D, BLOCK_D)
            y_d = normalise(row, norm_weight, norm_bias, D, BLOCK_D).to(weight.dtype.element_ty).to(tl.float32)
            y_r = tl.sum(w_rd.to(tl.float32) * y_d[None, :], axis=1) + bias_r
            tl.store(out + n * R + r, kernels.gelu(y_r) if GELU else y_r, mask=r < R)
            if tl.program_id(0) == 0:
                if carry is not None:
                    row += tl.load(carry + d, mask=d < D, other=0.0).to(tl.float32)
                tl.store(summed + n * D + d, row, mask=d < D)

    @triton.jit
    def routed_kernel(
        x, added, norm_weight, norm_bias, router, temperature, w_in, bias_in, bias_out,
        summed, logits, probs, experts, gates, hidden,
        N: tl.constexpr, P: tl.constexpr, D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
        GATE: tl.constexpr, RENORMALIZE: tl.constexpr, GATE_FIRST: tl.constexpr, BIAS_BY_GATE: tl.constexpr,
        BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per BLOCK_H hidden units and choice. Each routes its token; one of each token writes that."""
        n, k = tl.program_id(1) // K, tl.program_id(1) % K
        e = tl.arange(0, BLOCK_E)
        d = tl.arange(0, BLOCK_D)
        divisor = tl.load(temperature).to(tl.float32)
        is_weight = (e < E)[:, None] & (d < D)[None, :]
        w_ed = tl.load(router + e[:, None] * D + d[None, :], mask=is_weight, other=0.0).to(tl.float32)
        row = stream_row(x, added, None, None, n, N, P, D, BLOCK_D)
        y_d = normalise(row, norm_weight, norm_bias, D, BLOCK_D)
        logit = tl.sum(w_ed * y_d[None, :], axis=1)
        score, rank, gate = kernels.choose(logit, divisor, E, K, GATE, RENORMALIZE, BLOCK_E)

        is_own = rank == k
        own = tl.sum(tl.where(is_own, e, 0), axis=0).to(tl.int64)
        own_gate = tl.sum(tl.where(is_own, gate, 0.0), axis=0)
        h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        is_weight = (h < H)[:, None] & (d < D)[None, :]
        w_hd = tl.load(w_in + (own * H + h)[:, None] * D + d[None, :], mask=is_weight, other=0.0)
        y_d = y_d.to(w_in.dtype.element_ty).to(tl.float32)
        y_h = tl.sum(w_hd.to(tl.float32) * y_d[None, :], axis=1)
        if bias_in is not None:
            y_h += tl.load(bias_in + own * H + h, mask=h < H, other=0.0).to(tl.float32)
        if GATE_FIRST:
            y_h = y_h * own_gate
        tl.store(hidden + (n * K + k) * H + h, tl.where(own_gate != 0, kernels.gelu(y_h), 0.0), mask=h < H)

        if (tl.program_id(0) == 0) & (k == 0):
            tl.store(logits + n * E + e, logit, mask=e < E)
            tl.store(probs + n * E + e, score, mask=e < E)
            tl.store(experts + n * K + rank, e.to(tl.int64), mask=rank < K)
            tl.store(gates + n * K + rank, gate, mask=rank < K)
            if bias_out is not None:
                if BIAS_BY_GATE:
                    is_used = (rank < K)[:, None] & (d < D)[None, :]
                    bias_ed = tl.load(bias_out + e[:, None] * D + d[None, :], mask=is_used, other=0.0).to(tl.float32)
                    row += tl.sum(bias_ed * gate[:, None], axis=0)
                else:
                    row += tl.load(bias_out + d, mask=d < D, other=0.0).to(tl.float32)
            tl.store(summed + n * D + d, row, mask=d < D)

    @triton.jit(do_not_specialize=["uniform", "tokens"])
    def head_kernel(
        x, added, norm_weight, norm_bias, weight, uniform, position, tokens, logits, temperature,
        N: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr,
        BLOCK_V: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program per token. Logits go through memory, from ROWS symbols at a time to all."""
        n = tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        row = stream_row(x, added, None, None, n, N, P, D, BLOCK_D)
        dtype = weight.dtype.element_ty
        y_d = normalise(row, norm_weight, norm_bias, D, BLOCK_D).to(dtype).to(tl.float32)
        for start in tl.static_range(0, V, ROWS):
            r = start + tl.arange(0, ROWS)
            w_rd = tl.load(weight + r[:, None] * D + d[None, :], mask=(r < V)[:, None] & (d < D)[None, :], other=0.0)
            y_r = tl.sum(w_rd.to(tl.float32) * y_d[None, :], axis=1)
            tl.store(logits + n * V + r, y_r.to(dtype).to(tl.float32), mask=r < V)
        tl.debug_barrier()
        v = tl.arange(0, BLOCK_V)
        logit = tl.load(logits + n * V + v, mask=v < V, other=float("-inf"))
        if GREEDY:
            token = tl.argmax(tl.where(logit == logit, logit, float("inf")), axis=0)  # NaN is the largest, as in torch
        else:
            best = tl.max(logit, axis=0)
            logit = (logit - best) / temperature
            if TOP_K:
                better = tl.zeros((BLOCK_V,), tl.int32)
                for start in range(0, V, 32):
                    rival = start + tl.arange(0, 32)
                    other = tl.load(logits + n * V + rival, mask=rival < V, other=float("-inf"))
                    other = (other - best) / temperature
                    better += tl.sum((other[None, :] > logit[:, None]).to(tl.int32), axis=1)
                logit = tl.where(better < TOP_K, logit, float("-inf"))
            share = tl.exp(logit)
            cumulative = tl.cumsum(share / tl.sum(share, axis=0), axis=0)
            whole = tl.sum(tl.where(v == V - 1, cumulative, 0.0), axis=0)
            is_below = (cumulative <= tl.load(uniform + n) * whole) & (v < V)
            token = tl.sum(is_below.to(tl.int32), axis=0)
        tl.store(tokens + n, token.to(tl.int64))
        if n == 0:
            tl.store(position, tl.load(position) + 1)
