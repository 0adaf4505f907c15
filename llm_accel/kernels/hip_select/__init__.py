"""HiP selection: for each block of queries, the key blocks that its best query matches best.

Three searches with one result. :class:`StageSearch` prunes in stages, cost O(T) with a small quadratic first stage;
:class:`TreeSearch` halves groups of blocks, O(T log T); :class:`ExactSearch` reads everything, O(T^2).

A score is the largest over the queries of a block, the query heads of a KV head and the keys of a block, in fp32, of
q.k less the query's level: the log-sum-exp of its own attention, estimated from a sample of the keys. With the products
alone, as in the paper, queries and heads that have large ones choose for all others (``fair=False``). A soft cap is
left out. Equal scores are settled by the lower position.
"""

from __future__ import annotations

from torch import Tensor

from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.hip_select.candidates import ABSENT as ABSENT
from llm_accel.kernels.hip_select.candidates import Keys as Keys
from llm_accel.kernels.hip_select.candidates import Scope as Scope
from llm_accel.kernels.hip_select.candidates import zero as zero
from llm_accel.kernels.hip_select.exact import ExactSearch as ExactSearch
from llm_accel.kernels.hip_select.op import OP as OP
from llm_accel.kernels.hip_select.pages import paged as paged
from llm_accel.kernels.hip_select.search import Search as Search
from llm_accel.kernels.hip_select.stages import Stage as Stage
from llm_accel.kernels.hip_select.stages import StageSearch as StageSearch
from llm_accel.kernels.hip_select.tree import TreeSearch as TreeSearch


def hip_select(query: Tensor, key: Tensor, search: Search, start: Tensor | None = None) -> BlockList:
    """The sink, the chosen blocks and the window of each query block, for block-sparse attention.

    Args:
        query: the newest T queries, [B, Hq, T, D], post-RoPE; row ``i`` belongs to slot ``S - T + i``.
        key: all keys, [B, H, S, D], post-RoPE; query head ``h`` attends to key head ``h // (Hq // H)``.
        search: how blocks are found, and its budget.
        start: first real slot of each row, int64 [B]; None when no row is padded. A padded row has the lists of
            the same row without padding.

    Returns:
        Lists of H heads. Where the budget covers all candidates, every query sees everything.
    """
    chosen, scope = search.select(query, key, start), search.scope
    begin = scope.window_start(query.shape[2], key.shape[2], start, query.device)
    return listed(chosen, scope, begin)


def listed(chosen: Tensor, scope: Scope, window_start: Tensor) -> BlockList:
    """Chosen blocks, int64 [B, H, n, M], ascending and absent ones last, as a block list."""
    return BlockList.from_selected(
        chosen,
        (chosen < ABSENT).sum(-1),
        block_q=scope.block_q,
        block_k=scope.block_k,
        sink=scope.sink,
        window_start=window_start[:, None],
    )
