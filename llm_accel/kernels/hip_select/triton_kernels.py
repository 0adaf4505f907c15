"""Triton kernel of the stage scores: one program per query block, run of chunks and key head.

Names: ``i_`` program indices, ``o_`` offsets, ``m_`` masks, ``b_`` tiles; upper case for compile-time constants.
"""

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import dot


@triton.jit
def _match(
    representative,
    level,
    keys,
    o_key,
    m_chunk,
    FAIR: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The best product of one key per chunk, [BC], with the R queries that stand for the block, their levels taken off
    where it is FAIR."""
    o_d = tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    m_key = (o_d < D)[:, None] & m_chunk[None, :]
    b_k = tl.load(keys + o_key[None, :] * D + o_d[:, None], mask=m_key, other=0.0)  # [BD, BC]
    b_best = tl.full([BC], float("-inf"), tl.float32)
    for first in range(0, R, BR):
        m_q = (first + o_r < R)[:, None] & (o_d < D)[None, :]
        b_q = tl.load(representative + (first + o_r)[:, None] * D + o_d[None, :], mask=m_q, other=0.0)  # [BR, BD]
        b_s = dot(b_q, b_k, UPCAST)  # [BR, BC]
        if FAIR:
            b_s -= tl.load(level + first + o_r, mask=first + o_r < R, other=0.0)[:, None]
        b_s = tl.where((first + o_r < R)[:, None], b_s, float("-inf"))
        b_best = tl.maximum(b_best, tl.max(b_s, axis=0))
    return b_best


@triton.jit(do_not_specialize=["blocks", "chunks"])
def stage_score_kernel(
    representative,
    keys,
    origin,
    last,
    starts,
    end,
    level,
    score,
    blocks,
    chunks,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    FAIR: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``score`` of each chunk: of all its keys, or of those on the way down to its best half, best quarter, ..."""
    i_block = tl.program_id(0)
    i_head = tl.program_id(2).to(tl.int64)
    o_chunk = tl.program_id(1) * BC + tl.arange(0, BC)
    m_chunk = o_chunk < chunks
    o_row = i_head * blocks + i_block
    b_origin = tl.load(origin + i_head)
    b_last = tl.load(last + i_head)
    b_end = tl.load(end + o_row)
    b_low = tl.load(starts + o_row * chunks + o_chunk, mask=m_chunk, other=0)  # [BC] int64
    m_chunk = m_chunk & (b_low < b_end)
    queries = representative + o_row * R * D
    standing = level + o_row * R
    b_best = tl.full([BC], float("-inf"), tl.float32)
    if EXACT:
        for i in range(CHUNK):
            o_key = tl.minimum(b_origin + b_low + i, b_last)
            b_best = tl.maximum(b_best, _match(queries, standing, keys, o_key, m_chunk, FAIR, R, D, BD, BR, BC, UPCAST))
    else:
        b_high = tl.minimum(b_low + CHUNK, b_end)
        for _ in range(LEVELS):
            b_middle = (b_low + b_high) // 2
            o_left = tl.minimum(b_origin + (b_low + b_middle) // 2, b_last)
            o_right = tl.minimum(b_origin + (b_middle + b_high) // 2, b_last)
            b_left = _match(queries, standing, keys, o_left, m_chunk, FAIR, R, D, BD, BR, BC, UPCAST)
            b_right = _match(queries, standing, keys, o_right, m_chunk, FAIR, R, D, BD, BR, BC, UPCAST)
            m_left = b_left >= b_right
            b_low, b_high = tl.where(m_left, b_low, b_middle), tl.where(m_left, b_middle, b_high)
            b_best = tl.maximum(b_best, tl.maximum(b_left, b_right))
    b_best = tl.where(m_chunk, b_best, float("-inf"))
    tl.store(score + o_row * chunks + o_chunk, b_best, mask=o_chunk < chunks)
