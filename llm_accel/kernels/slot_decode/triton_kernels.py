"""Slot decode: each split takes a share of the slots and leaves the logits, from which, once the splits are combined,
the scores and the lowest slot follow without reading a key again.

Rows are packed: row ``r`` is query head ``r`` among those of one key head. Logits and log-sum-exp are in base-2 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import dot, log2_logits, log_sum, pivot

MOST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit(do_not_specialize=["slots", "span"])
def slot_split_kernel(
    query, key, value, start, mixed, lse, logits, scaling, softcap,
    heads, slots, span,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention over one span of slots: mixed [splits, B * Hq, DV], its log-sum-exp [splits, B * Hq], and logits
    [B * Hq, P], which are not written left of ``start``."""
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_g = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_g = o_g < GROUP
    first = 0
    if start is not None:
        first = tl.load(start + i_b).to(tl.int32)

    base = query + i_b * q_b + (i_h * GROUP + o_g) * q_h
    b_q = tl.load(base[:, None] + o_d[None, :], mask=m_g[:, None] & (o_d < D)[None, :], other=0.0)  # [M, D]
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    row = i_bh * GROUP + o_g
    key += i_b * k_b + i_h * k_h
    value += i_b * v_b + i_h * v_h
    low = tl.maximum(tl.program_id(1) * span, first // BLOCK_N * BLOCK_N)
    high = tl.minimum((tl.program_id(1) + 1) * span, slots)
    for i_n in range(low, high, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n >= first) & (o_n < slots)
        at = o_n.to(tl.int64) * k_s
        b_k = tl.load(key + at[None, :] + o_d[:, None], mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)
        b_s = log2_logits(dot(b_q, b_k, UPCAST), scaling, softcap, HAS_SOFTCAP)  # [M, N]
        tl.store(logits + row[:, None] * slots + o_n[None, :], b_s, mask=m_g[:, None] & m_n[None, :])
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_pivot = pivot(b_new)
        b_p = tl.exp2(b_s - b_pivot[:, None])
        shrink = tl.exp2(b_max - b_pivot)
        at = o_n.to(tl.int64) * v_s
        b_v = tl.load(value + at[:, None] + o_dv[None, :], mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_o = b_o * shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)  # [M, DV]
        b_sum = b_sum * shrink + tl.sum(b_p, 1)
        b_max = b_new

    b_o = b_o / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    row += i_split * tl.num_programs(2) * GROUP
    tl.store(lse + row, log_sum(b_max, b_sum), mask=m_g)
    tl.store(mixed + row[:, None] * DV + o_dv[None, :], b_o, mask=m_g[:, None] & (o_dv < DV)[None, :])


@triton.jit(do_not_specialize=["slots", "keep_first", "keep_recent", "s_b", "s_h", "p_b", "p_h"])
def score_kernel(
    logits, lse, scores, positions, start, updated, victims, decay,
    heads, slots, keep_first, keep_recent,
    s_b, s_h, p_b, p_h,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """Scores of one row and head, updated [B, heads, P], from the logits of its GROUP query heads, and the lowest slot
    [B, heads]: the least score, then position, then slot, those that must stay at infinity."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    first = 0
    if start is not None:
        first = tl.load(start + i_b).to(tl.int32)
    scores += i_b * s_b + i_h * s_h
    positions += i_b * p_b + i_h * p_h

    newest = tl.full([], -1, tl.int64)
    for i_n in range(0, slots, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        newest = tl.maximum(newest, tl.max(tl.load(positions + o_n, mask=o_n < slots, other=-1), 0))

    lowest = tl.full([], float("inf"), tl.float32)
    oldest = tl.full([], MOST, tl.int64)
    victim = tl.full([], 0, tl.int64)
    for i_n in range(0, slots, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < slots
        seen = m_n & (o_n >= first)
        b_votes = tl.zeros([BLOCK_N], tl.float32)
        for i_g in range(GROUP):
            row = i_bh * GROUP + i_g
            b_lse = pivot(tl.load(lse + row))
            b_s = tl.load(logits + row * slots + o_n, mask=seen, other=float("-inf"))
            b_votes += tl.exp2(b_s - b_lse)
        b_scores = tl.load(scores + o_n, mask=m_n, other=0.0) * decay + b_votes
        tl.store(updated + i_bh * slots + o_n, b_scores, mask=m_n)

        b_position = tl.load(positions + o_n, mask=m_n, other=MOST)
        fixed = (b_position < keep_first) | (b_position > newest - keep_recent)
        if PER_QUERY:
            b_scores = b_scores / (newest - b_position + 1).to(tl.float32)
        b_scores = tl.where(fixed, float("inf"), b_scores)
        least = tl.min(b_scores, 0)
        b_position = tl.where(b_scores == least, b_position, MOST)
        first_of = tl.min(b_position, 0)
        slot = tl.min(tl.where(b_position == first_of, o_n, slots), 0).to(tl.int64)
        better = (least < lowest) | ((least == lowest) & (first_of < oldest))
        lowest = tl.where(better, least, lowest)
        oldest = tl.where(better, first_of, oldest)
        victim = tl.where(better, slot, victim)
    tl.store(victims + i_bh, victim)
