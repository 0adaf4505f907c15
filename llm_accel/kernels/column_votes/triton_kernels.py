"""Column votes: column sums of the probabilities, after a pass for the log-sum-exp of each row where attention has not
given it. No [W, S] tensor, no atomics, the same result every time.

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


@triton.jit(do_not_specialize=["rows", "spans"])
def merge_lse_kernel(parts, lse, rows, spans, BLOCK: tl.constexpr):
    """Log-sum-exp over the spans: parts [spans, rows] to lse [rows]."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    for i_span in range(spans):
        b_max = tl.maximum(b_max, tl.load(parts + i_span * rows + o_r, mask=o_r < rows, other=float("-inf")))
    b_pivot = pivot(b_max)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_span in range(spans):
        part = tl.load(parts + i_span * rows + o_r, mask=o_r < rows, other=float("-inf"))
        b_sum += tl.exp2(part - b_pivot)
    tl.store(lse + o_r, log_sum(b_max, b_sum), mask=o_r < rows)


@triton.jit
def column_sums(
    query, lse, o_m, o_n, b_k, first, own_of_first, scaling, softcap, unit, width,
    q_h, q_w,
    PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    ROUND: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Probabilities of the slots ``o_n``, whose keys are b_k [D, N], summed over the packed rows ``o_m``: [N]. Without
    MASKED every row is there and sees every slot."""
    o_w, o_g = o_m // PACK, o_m % PACK
    b_q = load_rows(query, o_w, o_g, q_h, q_w, width, D, BLOCK_D)  # [M, D]
    b_lse = tl.load(lse + o_g * width + o_w, mask=o_w < width, other=0.0) * unit
    b_p = tl.exp2(log2_logits(dot(b_q, b_k, UPCAST), scaling, softcap, HAS_SOFTCAP) - b_lse[:, None])  # [M, N]
    if MASKED:
        visible = (o_n[None, :] <= own_of_first + o_w[:, None]) & (o_n >= first)[None, :] & (o_w < width)[:, None]
        b_p = tl.where(visible, b_p, 0.0)
    if ROUND is not None:
        b_p = b_p.to(ROUND).to(tl.float32)
    return tl.sum(b_p, 0)


@triton.jit(do_not_specialize=["width", "slots"])
def col_scores_kernel(
    query, key, start, lse, votes, scaling, softcap, weight, unit,
    heads, width, slots,
    q_b, q_h, q_w, k_b, k_h, k_s, s_b, s_h,
    PACK: tl.constexpr, LOOPS: tl.constexpr, PER_KEY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAX: tl.constexpr, ROUND: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Votes for one block of slots: votes [B, heads, slots]; ``unit``: base-2 units in one unit of ``lse``. The
    LOOPS * PACK query heads of a group are taken PACK at a time; the results are added up, or with MAX the largest
    counts. Tiles whose rows all see all slots come in a loop without masks."""
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
        rows = query + i_b * q_b + i_q * q_h
        norms = lse + (i_b * heads * LOOPS * PACK + i_q) * width
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        # the first query that sees a slot of this block; queries of padding see none
        own = slots - width  # slot of the first query
        low = tl.maximum(tl.maximum(i_n * BLOCK_N, first) - own, 0) * PACK
        end = tl.where((i_n + 1) * BLOCK_N > first, width * PACK, 0)
        # rows from ``whole`` to before ``rest``, in whole tiles, see every slot of the block
        whole = low + tl.cdiv(tl.maximum(((i_n + 1) * BLOCK_N - 1 - own) * PACK - low, 0), BLOCK_M) * BLOCK_M
        whole = tl.where((i_n * BLOCK_N < first) | ((i_n + 1) * BLOCK_N > slots), end, tl.minimum(whole, end))
        rest = whole + tl.maximum(end - whole, 0) // BLOCK_M * BLOCK_M
        for i_m in range(whole, rest, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            b_sum += column_sums(
                rows, norms, o_m, o_n, b_k, first, own, scaling, softcap, unit, width, q_h, q_w,
                PACK, D, BLOCK_D, False, ROUND, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
        diagonal = tl.cdiv(tl.maximum(tl.minimum(whole, end) - low, 0), BLOCK_M)
        for i_edge in range(diagonal + tl.cdiv(tl.maximum(end - rest, 0), BLOCK_M)):
            i_m = tl.where(i_edge < diagonal, low + i_edge * BLOCK_M, rest + (i_edge - diagonal) * BLOCK_M)
            o_m = i_m + tl.arange(0, BLOCK_M)
            b_sum += column_sums(
                rows, norms, o_m, o_n, b_k, first, own, scaling, softcap, unit, width, q_h, q_w,
                PACK, D, BLOCK_D, True, ROUND, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
        if MAX:
            b_votes = tl.maximum(b_votes, b_sum)
        else:
            b_votes += b_sum
    tl.store(votes + (i_b * heads + i_h) * slots + o_n, b_votes * weight, mask=o_n < slots)
