"""Slot write in one launch. Entries are copied as integers of their size, so that no bit changes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy(source, target, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    tl.store(target + o_d, tl.load(source + o_d, mask=o_d < D), mask=o_d < D)


@triton.jit(do_not_specialize=["slots", "k_b", "k_h", "v_b", "v_h", "p_b", "p_h", "s_b", "s_h"])
def write_kernel(
    keys, values, new_key, new_value, spare, positions, scores, new_positions, new_scores,
    heads, slots,
    k_b, k_h, k_s, v_b, v_h, v_s, nk_b, nk_h, nv_b, nv_h, p_b, p_h, s_b, s_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The entry of one row and head, and the positions and scores of its slots."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    slot = tl.load(spare + i_bh)
    _copy(new_key + i_b * nk_b + i_h * nk_h, keys + i_b * k_b + i_h * k_h + slot * k_s, D, BLOCK_D)
    _copy(new_value + i_b * nv_b + i_h * nv_h, values + i_b * v_b + i_h * v_h + slot * v_s, DV, BLOCK_DV)

    positions += i_b * p_b + i_h * p_h
    newest = tl.full([], -1, tl.int64)
    for i_n in range(0, slots, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        newest = tl.maximum(newest, tl.max(tl.load(positions + o_n, mask=o_n < slots, other=-1), 0))
    for i_n in range(0, slots, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < slots
        b_position = tl.load(positions + o_n, mask=m_n)
        tl.store(new_positions + i_bh * slots + o_n, tl.where(o_n == slot, newest + 1, b_position), mask=m_n)
        if scores is not None:
            b_score = tl.load(scores + i_b * s_b + i_h * s_h + o_n, mask=m_n)
            tl.store(new_scores + i_bh * slots + o_n, tl.where(o_n == slot, 0.0, b_score), mask=m_n)
