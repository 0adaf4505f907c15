"""Attention that sees the first tokens and a window of recent ones: O(n (S + R)), never n x n."""

from __future__ import annotations

from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.kernels.block_list import BlockList, block_positions
from llm_accel.kernels.block_sparse import block_sparse_attention

BLOCK_Q = 64
BLOCK_K = 64  # nothing is listed


def sink_window_attention(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    sinks: int,
    recent: int,
) -> Tensor:
    """The newest T queries; the one at entry ``i`` of its row sees ``j <= i`` with ``j < sinks`` or ``i - j < recent``.
    Entries stand for positions here: what a streaming head has lost lies between its sinks and its window.

    Args:
        query: [B, Hq, T, D]; the last T slots belong to these queries.
        key, value: [B, H, P, D], oldest first.
        start: first real slot of each row, int64 [B], or None.

    Returns:
        [B, T, Hq, Dv]
    """
    if key.shape[2] <= sinks + recent:
        return attention.dense(query, key, value, start)
    start = None if start is None else start.to(key.device)
    positions = block_positions(query.shape[2], key.shape[2], BLOCK_Q, start, key.device)
    blocks = BlockList.sink_window(
        positions.expand(query.shape[0], -1), block_q=BLOCK_Q, block_k=BLOCK_K, sink=sinks, window=recent
    )
    softmax = attention.softmax(query.shape[-1])
    return block_sparse_attention(query, key, value, blocks, start=start, **softmax)[0]
