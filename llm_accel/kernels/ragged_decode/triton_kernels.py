"""Ragged attention: each split takes a share of the entries of one row and head, and what they leave is combined
afterwards. A split takes its share of the length that it finds on the device, so the host never waits.

Rows are packed: row ``r`` is query ``r // GROUP`` of head ``r % GROUP`` among those of one KV head. Log-sum-exp is in
base-2 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import dot, log2_logits, log_sum, pivot


@triton.jit(do_not_specialize=["count", "rows", "t_b", "t_h"])  # what changes while decoding
def split_kernel(
    query, keys, values, table, lengths, mixed, lse, scaling, softcap,
    heads, count, rows,
    q_b, q_h, q_t, k_p, k_e, v_p, v_e, t_b, t_h, l_b, l_h,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention over one split: mixed [splits, rows, DV] and its log-sum-exp [splits, rows], rows of all heads and
    queries in the order of ``query``; 0 and -inf where a row sees nothing of the split."""
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_t, o_g = o_m // GROUP, o_m % GROUP
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_m = o_t < count
    length = tl.load(lengths + i_b * l_b + i_h * l_h).to(tl.int32)
    seen = length - count + 1 + o_t  # entries that each row sees

    offset = o_g.to(tl.int64)[:, None] * q_h + o_t.to(tl.int64)[:, None] * q_t + o_d[None, :]
    base = query + i_b * q_b + i_h * GROUP * q_h
    b_q = tl.load(base + offset, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)  # [M, D]
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    share = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    last_row = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // GROUP, count - 1)
    high = tl.minimum(length - count + 1 + last_row, (i_split + 1) * share)
    # Pages are looked up a tile ahead: what waits for no other load can be pipelined.
    table += i_b * t_b + i_h * t_h
    first = i_split * share + tl.arange(0, BLOCK_N)
    next_page = tl.load(table + first // PAGE, mask=first < length, other=0).to(tl.int64)
    for i_n in range(i_split * share, high, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < length
        page = next_page
        next_page = tl.load(table + (o_n + BLOCK_N) // PAGE, mask=o_n + BLOCK_N < length, other=0).to(tl.int64)
        entry = (o_n % PAGE).to(tl.int64)
        at_key = page * k_p + entry * k_e
        b_k = tl.load(keys + at_key[None, :] + o_d[:, None], mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)
        b_s = log2_logits(dot(b_q, b_k, UPCAST), scaling, softcap, HAS_SOFTCAP)  # [M, N]
        b_s = tl.where(o_n[None, :] < seen[:, None], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_pivot = pivot(b_new)
        b_p = tl.exp2(b_s - b_pivot[:, None])
        shrink = tl.exp2(b_max - b_pivot)
        at_value = page * v_p + entry * v_e
        b_v = tl.load(values + at_value[:, None] + o_dv[None, :], mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_o = b_o * shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)  # [M, DV]
        b_sum = b_sum * shrink + tl.sum(b_p, 1)
        b_max = b_new

    b_lse = log_sum(b_max, b_sum)
    b_o = b_o / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    row = i_split.to(tl.int64) * rows + (i_bh * GROUP + o_g) * count + o_t
    tl.store(lse + row, b_lse, mask=m_m)
    tl.store(mixed + row[:, None] * DV + o_dv[None, :], b_o, mask=m_m[:, None] & (o_dv < DV)[None, :])
