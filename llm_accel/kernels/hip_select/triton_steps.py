"""Triton kernels of the steps around the scores of a stage: what enters it, what its queries are compared by, and what
it keeps. Names as in :mod:`llm_accel.kernels.hip_select.triton_kernels`.
"""

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import dot

ABSENT: tl.constexpr = tl.constexpr(2**40)


@triton.jit(do_not_specialize=["blocks", "old", "total", "sink", "e_b", "e_n", "t_b", "t_n"])
def enter_kernel(
    kept, then, end, starts,
    heads, blocks, old, total, sink, e_b, e_n, t_b, t_n,
    CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of the ``old`` chunks of a row, and after them those that came since ``then``."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_n = i_row // (heads * blocks), i_row % blocks
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_end = tl.load(end + i_b * e_b + i_n * e_n)
    begin = b_end * 0 + sink
    limit = b_end
    if then is not None:
        begin = sink + (tl.load(then + i_b * t_b + i_n * t_n) - sink) // PART * PART
        limit = tl.minimum(begin, b_end)
    m_old = o < old
    b_low = tl.load(kept + i_row * (old // (CHUNK // PART)) + o // (CHUNK // PART), mask=m_old, other=0)
    b_low = tl.where(m_old, b_low + o % (CHUNK // PART) * PART, begin + (o - old).to(tl.int64) * PART)
    b_low = tl.where(b_low < tl.where(m_old, limit, b_end), b_low, ABSENT)
    tl.store(starts + i_row * total + o, b_low, mask=o < total)


@triton.jit(do_not_specialize=["blocks", "e_b", "e_n"])
def level_kernel(
    representative, keys, origin, last, end, level, scaling,
    heads, blocks, k_s, e_b, e_n,
    FIRST: tl.constexpr, SAMPLED: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Levels of the queries of one block: the log-sum-exp over the first keys and a sample of the others, in which each
    of these stands for as many as it was drawn from."""
    i_block = tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    row = i_head * blocks + i_block
    b_origin = tl.load(origin + i_head)
    b_last = tl.load(last + i_head)
    b_end = tl.load(end + i_head // heads * e_b + i_block * e_n)
    beyond = tl.maximum(b_end - FIRST, 1)
    share = tl.log(beyond.to(tl.float32) / SAMPLED)
    o_d = tl.arange(0, BD)
    for first in range(0, R, BR):
        o_r = first + tl.arange(0, BR)
        m_r = o_r < R
        b_q = tl.load(
            representative + (row * R + o_r)[:, None] * D + o_d[None, :],
            mask=m_r[:, None] & (o_d < D)[None, :],
            other=0.0,
        ).to(keys.dtype.element_ty)
        b_max = tl.full([BR], float("-inf"), tl.float32)
        b_sum = tl.zeros([BR], tl.float32)
        for i_s in range(0, FIRST + SAMPLED, BS):
            o_s = i_s + tl.arange(0, BS)
            drawn = o_s >= FIRST
            at = tl.where(drawn, FIRST + (o_s - FIRST) * beyond // SAMPLED, o_s)
            seen = (o_s < FIRST + SAMPLED) & ((at < b_end) | (at == 0))
            o_key = tl.minimum(b_origin + at, b_last)
            b_k = tl.load(
                keys + o_key[None, :] * k_s + o_d[:, None], mask=seen[None, :] & (o_d < D)[:, None], other=0.0
            )
            b_s = dot(b_q, b_k, UPCAST) * scaling + tl.where(drawn, share, 0.0)[None, :]
            b_s = tl.where(seen[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))  # the first key is always seen
            b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_s - b_new[:, None]), 1)
            b_max = b_new
        tl.store(level + row * R + o_r, (b_max + tl.log(b_sum)) / scaling, mask=m_r)


@triton.jit(do_not_specialize=["blocks", "chunks", "count", "c_b", "c_h", "c_n", "s_b", "s_h", "s_n"])
def keep_kernel(
    score, starts, kept,
    heads, blocks, chunks, count, c_b, c_h, c_n, s_b, s_h, s_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The ``count`` best chunks of one row, in order. Scores become whole numbers in the same order, absent chunks the
    lowest, and the bits of the lowest score that stays are found from the highest on."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h, i_n = i_row // (heads * blocks), i_row // blocks % heads, i_row % blocks
    o = tl.arange(0, BLOCK)
    m = o < chunks
    b_start = tl.load(starts + i_b * s_b + i_h * s_h + i_n * s_n + o, mask=m, other=ABSENT)
    b_score = tl.load(score + i_b * c_b + i_h * c_h + i_n * c_n + o, mask=m, other=0.0)
    b_score = tl.where(b_score == 0.0, 0.0, b_score)  # both zeros are one
    bits = b_score.to(tl.int32, bitcast=True).to(tl.int64)
    b_key = tl.where(bits < 0, -bits, bits + 2**31 + 1)  # a negative number's bits grow as it falls
    b_key = tl.where(b_start < ABSENT, b_key, 0)
    b_key = tl.where(m, b_key, -1)

    least = tl.full([], 0, tl.int64)
    step = tl.full([], 2**32, tl.int64)
    for _ in range(33):
        enough = tl.sum((b_key >= least + step).to(tl.int32), 0) >= count
        least = tl.where(enough, least + step, least)
        step = step // 2

    above, equal = b_key > least, (b_key == least).to(tl.int32)
    left = count - tl.sum(above.to(tl.int32), 0)
    chosen = above | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
    chosen = (chosen & (b_key > 0)).to(tl.int32)
    place = tl.cumsum(chosen, 0) - 1
    kept += i_row * count
    tl.store(kept + place, b_start, mask=chosen > 0)
    tl.store(kept + o, b_start * 0 + ABSENT, mask=(o >= tl.sum(chosen, 0)) & (o < count))
