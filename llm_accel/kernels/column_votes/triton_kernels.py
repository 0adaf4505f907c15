"""Column votes in two passes: the log-sum-exp of each row, then column sums of the probabilities. No [W, S] tensor, no
atomics, the same result every time.

Rows are packed: row ``r`` is query ``r // PACK`` of head ``r % PACK`` among heads that share a key head. Query ``w``
stands at slot ``slots - width + w``. Log-sum-exp is in base-2 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import LOG2E, dot, log2_logits, log_sum, pivot


@triton.jit
def load_rows(query, o_w, o_g, q_h, q_w, width, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries of packed rows, [M, BLOCK_D], 0 where there is none."""
    o_d = tl.arange(0, BLOCK_D)
    offset = o_g.to(tl.int64)[:, None] * q_h + o_w.to(tl.int64)[:, None] * q_w + o_d[None, :]
    return tl.load(query + offset, mask=(o_w < width)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_columns(key, o_n, k_s, slots, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of slots as columns, [BLOCK_D, N], 0 where there is none."""
    o_d = tl.arange(0, BLOCK_D)
    offset = o_n.to(tl.int64)[None, :] * k_s + o_d[:, None]
    return tl.load(key + offset, mask=(o_n < slots)[None, :] & (o_d < D)[:, None], other=0.0)


@triton.jit(do_not_specialize=["width", "slots", "span"])
def row_lse_kernel(
    query, key, start, sinks, lse, scaling, softcap,
    batch, heads, width, slots, span,
    q_b, q_h, q_w, k_b, k_h, k_s, s_b, s_h,
    PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row over one span of slots: lse [spans, B, Hq, width]; -inf where a row sees none of them.
    A learned sink counts in the first span."""
    i_m, i_span, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_w, o_g = o_m // PACK, o_m % PACK
    own = slots - width + o_w
    first = 0
    if start is not None:
        first = tl.load(start + i_b * s_b + i_h * s_h).to(tl.int32)

    b_q = load_rows(query + i_b * q_b + i_h * PACK * q_h, o_w, o_g, q_h, q_w, width, D, BLOCK_D)  # [M, D]
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        b_sink = tl.load(sinks + i_h * PACK + o_g).to(tl.float32) * LOG2E
        b_max = tl.where(i_span == 0, b_sink, b_max)
        b_sum = tl.where(i_span == 0, 1.0, b_sum)

    last_row = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // PACK, width - 1)
    low = tl.maximum(first // BLOCK_N * BLOCK_N, i_span * span)
    high = tl.minimum(slots - width + last_row + 1, (i_span + 1) * span)
    for i_n in range(low, high, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_k = load_columns(key + i_b * k_b + i_h * k_h, o_n, k_s, slots, D, BLOCK_D)  # [D, N]
        b_s = log2_logits(dot(b_q, b_k, UPCAST), scaling, softcap, HAS_SOFTCAP)  # [M, N]
        b_s = tl.where((o_n[None, :] <= own[:, None]) & (o_n >= first)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_pivot = pivot(b_new)
        b_sum = b_sum * tl.exp2(b_max - b_pivot) + tl.sum(tl.exp2(b_s - b_pivot[:, None]), 1)
        b_max = b_new

    b_lse = log_sum(b_max, b_sum)
    row = ((i_span * batch + i_b) * heads + i_h) * PACK + o_g
    tl.store(lse + row * width + o_w, b_lse, mask=o_w < width)


@triton.jit(do_not_specialize=["rows"])
def merge_lse_kernel(parts, lse, rows, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp over the spans: parts [SPANS, rows] to lse [rows]."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    for i_span in tl.static_range(SPANS):
        b_max = tl.maximum(b_max, tl.load(parts + i_span * rows + o_r, mask=o_r < rows, other=float("-inf")))
    b_pivot = pivot(b_max)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_span in tl.static_range(SPANS):
        part = tl.load(parts + i_span * rows + o_r, mask=o_r < rows, other=float("-inf"))
        b_sum += tl.exp2(part - b_pivot)
    tl.store(lse + o_r, log_sum(b_max, b_sum), mask=o_r < rows)


@triton.jit(do_not_specialize=["width", "slots"])
def col_scores_kernel(
    query, key, start, lse, votes, scaling, softcap, weight,
    heads, width, slots,
    q_b, q_h, q_w, k_b, k_h, k_s, s_b, s_h,
    PACK: tl.constexpr, LOOPS: tl.constexpr, PER_KEY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAX: tl.constexpr, ROUND: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Votes for one block of slots: votes [B, heads, slots]. The LOOPS * PACK query heads of a group are taken PACK at
    a time; the results are added up, or with MAX the largest counts."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_votes = tl.zeros([BLOCK_N], tl.float32)
    for i_loop in range(LOOPS):
        i_q = (i_h * LOOPS + i_loop) * PACK  # the first of PACK query heads
        i_k = i_q // PER_KEY
        first = 0
        if start is not None:
            first = tl.load(start + i_b * s_b + i_k * s_h).to(tl.int32)
        b_k = load_columns(key + i_b * k_b + i_k * k_h, o_n, k_s, slots, D, BLOCK_D)  # [D, N]
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        # the first query that sees a slot of this block; queries of padding see none
        earliest = tl.maximum(tl.maximum(i_n * BLOCK_N, first) - (slots - width), 0)
        end = tl.where((i_n + 1) * BLOCK_N > first, width * PACK, 0)
        for i_m in range(earliest * PACK, end, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            o_w, o_g = o_m // PACK, o_m % PACK
            own = slots - width + o_w
            b_q = load_rows(query + i_b * q_b + i_q * q_h, o_w, o_g, q_h, q_w, width, D, BLOCK_D)  # [M, D]
            row = (i_b * heads * LOOPS * PACK + i_q + o_g) * width + o_w
            b_lse = tl.load(lse + row, mask=o_w < width, other=0.0)
            b_s = log2_logits(dot(b_q, b_k, UPCAST), scaling, softcap, HAS_SOFTCAP)  # [M, N]
            visible = (o_n[None, :] <= own[:, None]) & (o_n >= first)[None, :] & (o_w < width)[:, None]
            b_p = tl.where(visible, tl.exp2(b_s - b_lse[:, None]), 0.0)
            if ROUND is not None:
                b_p = b_p.to(ROUND).to(tl.float32)
            b_sum += tl.sum(b_p, 0)
        if MAX:
            b_votes = tl.maximum(b_votes, b_sum)
        else:
            b_votes += b_sum
    tl.store(votes + (i_b * heads + i_h) * slots + o_n, b_votes * weight, mask=o_n < slots)
