"""Triton kernel of the stage scores: one program per query block, run of chunks and key head.

Names: ``i_`` program indices, ``o_`` offsets, ``m_`` masks, ``b_`` tiles; upper case for compile-time constants.
"""

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import dot


@triton.jit
def _queries(
    representative, level, first,
    FAIR: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The queries from ``first`` on that stand for the block, [BR, BD], and what is taken off their products, [BR]:
    their levels where it is FAIR, everything where there is no query."""
    o_d = tl.arange(0, BD)
    o_r = first + tl.arange(0, BR)
    b_q = tl.load(
        representative + o_r[:, None] * D + o_d[None, :], mask=(o_r < R)[:, None] & (o_d < D)[None, :], other=0.0
    )
    b_off = tl.zeros([BR], tl.float32)
    if FAIR:
        b_off = tl.load(level + o_r, mask=o_r < R, other=0.0)
    return b_q, tl.where(o_r < R, b_off, float("inf"))


@triton.jit
def _match(
    b_q, b_off, representative, level, keys, o_key, m_chunk, k_s,
    FAIR: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The best product of one key per chunk, [BC], with the queries that stand for the block: b_q, where these are
    all."""
    o_d = tl.arange(0, BD)
    b_k = tl.load(keys + o_key[None, :] * k_s + o_d[:, None], mask=(o_d < D)[:, None] & m_chunk[None, :], other=0.0)
    if R <= BR:
        return tl.max(dot(b_q, b_k, UPCAST) - b_off[:, None], axis=0)  # [BR, BC] to [BC]
    b_best = tl.max(tl.full([BR, b_k.shape[1]], float("-inf"), tl.float32), axis=0)
    for first in range(0, R, BR):
        b_more, b_less = _queries(representative, level, first, FAIR, R, D, BD, BR)
        b_best = tl.maximum(b_best, tl.max(dot(b_more, b_k, UPCAST) - b_less[:, None], axis=0))
    return b_best


@triton.jit(do_not_specialize=["blocks", "chunks", "s_b", "s_h", "s_n", "e_b", "e_n"])
def stage_score_kernel(
    representative, keys, origin, last, starts, end, level, score,
    heads, blocks, chunks, k_s, s_b, s_h, s_n, e_b, e_n,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr, FAIR: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``score`` of each chunk: of all its keys, or of those on the way down to its best half, best quarter, ... The
    queries stay in place while keys come and go: all keys of a chunk are known from the start, so that their loads are
    pipelined, and those on the way down are not."""
    i_block = tl.program_id(0)
    i_head = tl.program_id(2).to(tl.int64)
    o_chunk = tl.program_id(1) * BC + tl.arange(0, BC)
    m_chunk = o_chunk < chunks
    o_row = i_head * blocks + i_block
    b_origin = tl.load(origin + i_head)
    b_last = tl.load(last + i_head)
    i_b, i_h = i_head // heads, i_head % heads
    b_end = tl.load(end + i_b * e_b + i_block * e_n)
    b_low = tl.load(starts + i_b * s_b + i_h * s_h + i_block * s_n + o_chunk, mask=m_chunk, other=0)  # [BC] int64
    m_chunk = m_chunk & (b_low < b_end)
    queries = representative + o_row * R * D
    standing = level + o_row * R
    b_best = tl.full([BC], float("-inf"), tl.float32)
    if EXACT:
        o_d = tl.arange(0, BD)
        m_key = (o_d < D)[:, None] & m_chunk[None, :]
        for first in range(0, R, BR):
            b_q, b_off = _queries(queries, standing, first, FAIR, R, D, BD, BR)
            for i in range(CHUNK):
                o_key = tl.minimum(b_origin + b_low + i, b_last)
                b_k = tl.load(keys + o_key[None, :] * k_s + o_d[:, None], mask=m_key, other=0.0)  # [BD, BC]
                b_best = tl.maximum(b_best, tl.max(dot(b_q, b_k, UPCAST) - b_off[:, None], axis=0))
    else:
        b_q, b_off = _queries(queries, standing, 0, FAIR, R, D, BD, BR)
        b_high = tl.minimum(b_low + CHUNK, b_end)
        for _ in range(LEVELS):
            b_middle = (b_low + b_high) // 2
            o_left = tl.minimum(b_origin + (b_low + b_middle) // 2, b_last)
            o_right = tl.minimum(b_origin + (b_middle + b_high) // 2, b_last)
            b_left = _match(b_q, b_off, queries, standing, keys, o_left, m_chunk, k_s, FAIR, R, D, BD, BR, UPCAST)
            b_right = _match(b_q, b_off, queries, standing, keys, o_right, m_chunk, k_s, FAIR, R, D, BD, BR, UPCAST)
            m_left = b_left >= b_right
            b_low, b_high = tl.where(m_left, b_low, b_middle), tl.where(m_left, b_middle, b_high)
            b_best = tl.maximum(b_best, tl.maximum(b_left, b_right))
    b_best = tl.where(m_chunk, b_best, float("-inf"))
    tl.store(score + o_row * chunks + o_chunk, b_best, mask=o_chunk < chunks)
