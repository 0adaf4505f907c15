"""Cache compaction in one launch. Entries are copied as integers of their size, so that no bit changes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows(source, target, slot, o_n, m_n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row ``slot[i]`` of the source becomes row ``o_n[i]`` of the contiguous target."""
    o_d = tl.arange(0, BLOCK_D)
    mask = m_n[:, None] & (o_d < D)[None, :]
    rows = tl.load(source + slot[:, None] * stride + o_d[None, :], mask=mask)
    tl.store(target + o_n.to(tl.int64)[:, None] * D + o_d[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=["count", "i_b", "i_h", "s_b", "s_h"])
def gather_kernel(
    indices, keys, values, scores, new_keys, new_values, new_scores,
    heads, count,
    i_b, i_h, k_b, k_h, k_s, v_b, v_h, v_s, s_b, s_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys, values and scores of one block of chosen slots of one row and head."""
    pid_n, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid_bh // heads, pid_bh % heads
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < count
    slot = tl.load(indices + b * i_b + h * i_h + o_n, mask=m_n, other=0).to(tl.int64)
    slot = tl.maximum(slot, 0)
    copy_rows(keys + b * k_b + h * k_h, new_keys + pid_bh * count * D, slot, o_n, m_n, k_s, D, BLOCK_D)
    copy_rows(values + b * v_b + h * v_h, new_values + pid_bh * count * DV, slot, o_n, m_n, v_s, DV, BLOCK_DV)
    if scores is not None:
        copied = tl.load(scores + b * s_b + h * s_h + slot, mask=m_n)
        tl.store(new_scores + pid_bh * count + o_n, copied, mask=m_n)
