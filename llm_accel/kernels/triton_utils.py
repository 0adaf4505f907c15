"""What several Triton kernels share. Only modules of kernels import it at their top: it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """[M, K] x [K, N] with an fp32 sum. fp32 operands are multiplied as they are, never as TF32. The interpreter would
    multiply the bits of bf16 operands, so there, and only there, UPCAST makes them fp32 first."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def log2_logits(raw, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in base-2 units, so that exp2 gives the softmax; tanh as a sigmoid, which the interpreter knows too."""
    logits = raw * scaling
    if HAS_SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * (logits / softcap)) - 1.0)
    return logits * LOG2E


@triton.jit
def pivot(largest):
    """What to subtract before exp2: the largest logit, or 0 where nothing is visible, so that no NaN arises."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def log_sum(largest, total):
    """Log-sum-exp in base-2 units of what was added up as ``total`` relative to ``largest``; -inf of nothing."""
    return tl.where(total > 0.0, pivot(largest) + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["count", "rows", "splits"])
def combine_kernel(
    mixed, lse, sinks, output, total,
    unit, query_heads, count, rows, splits,
    o_b, o_t, o_h,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The splits of one row together, and the log-sum-exp of all times ``unit`` if there is a ``total``; a learned sink
    takes part in the sum of the weights alone. Where a row sees nothing of a split, only its log-sum-exp is read."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h, i_t = i_row // (query_heads * count), i_row // count % query_heads, i_row % count
    o_s, o_dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    b_lse = tl.load(lse + o_s.to(tl.int64) * rows + i_row, mask=o_s < splits, other=float("-inf"))
    m_s = b_lse > float("-inf")
    largest = tl.max(b_lse, 0)
    top = pivot(largest)
    if sinks is not None:
        sink = tl.load(sinks + i_h).to(tl.float32) * LOG2E
        top = tl.maximum(largest, sink)
    weights = tl.exp2(b_lse - top)
    whole = tl.sum(weights, 0)
    if sinks is not None:
        whole += tl.exp2(sink - top)
    at = (o_s.to(tl.int64)[:, None] * rows + i_row) * DV + o_dv[None, :]
    b_o = tl.load(mixed + at, mask=m_s[:, None] & (o_dv < DV)[None, :], other=0.0)
    b_o = tl.sum(b_o * weights[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    at = i_b * o_b + i_t * o_t + i_h * o_h + o_dv
    tl.store(output + at, b_o.to(output.dtype.element_ty), mask=o_dv < DV)
    if total is not None:
        b_total = top + tl.log2(tl.where(whole > 0.0, whole, 1.0))
        tl.store(total + i_row, tl.where(largest == float("-inf"), float("-inf"), b_total * unit))
