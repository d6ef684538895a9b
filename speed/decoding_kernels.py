"""A step of decoding in few kernels: each as a Triton kernel and in PyTorch.

    y = attend(qkv, keys, values, position)              # today's step: splits, writes the cache, attends

`speed/kernels.py` says what is common to all of these: twins, fixed order of sums, no gradients. A token's sums do not
depend on the other sequences of the batch. Nothing here waits for the device.

Letters as in `moe.py`; S positions of the cache.
"""

import torch
import torch.nn.functional as F

from speed import kernels
from speed.kernels import power_of_2_from, power_of_2_to, uses_triton

if kernels.AVAILABLE:
    import triton
    import triton.language as tl

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


def launch_attention(qkv, keys, values, position, weight):
    B, n_head, S, width = keys.shape
    D = n_head * width
    block_W = power_of_2_from(width)
    block_S = min(power_of_2_from(S), power_of_2_to(max(1, IN_REGISTERS // block_W)))
    with torch.cuda.device_of(qkv):
        if weight is None:
            out, parts, block_D = qkv.new_empty(B, D), 1, 1
        attention_kernel[(n_head, B, parts)](
            qkv.contiguous(), keys, values, position, weight, out,
            HEADS=n_head, S=S, WIDTH=width, BLOCK_S=block_S, BLOCK_W=block_W, BLOCK_D=block_D, num_warps=8,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. Tensors are contiguous; elements beyond a shape are masked.

if kernels.AVAILABLE:

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
        new = qkv + (3 * b * HEADS + h) * WIDTH + w
        q_w = tl.load(new, mask=is_w, other=0.0).to(tl.float32)
        k_w = tl.load(new + HEADS * WIDTH, mask=is_w, other=0.0)
        v_w = tl.load(new + 2 * HEADS * WIDTH, mask=is_w, other=0.0)
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
        y_w = (y_w / total).to(out.dtype.element_ty)
        tl.store(out + (b * HEADS + h) * WIDTH + w, y_w, mask=is_w)
