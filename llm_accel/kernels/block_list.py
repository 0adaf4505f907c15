"""Which keys each block of queries sees: the first tokens, a list of chosen blocks and a window, for block-sparse
attention (HiP, streaming heads).

Positions count from the first real slot of a row, and query blocks from its first real query, so that a left-padded row
has the lists of the same row without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_Q = (16, 32, 64, 128)
BLOCK_K = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class BlockList:
    """Visible keys of n query blocks for each row and list head. A query at position ``p`` sees ``j <= p`` when

    - ``j < sink``, or
    - ``j // block_k`` is listed for the query's block, or
    - ``j >= window_start`` of the query's block and, if ``window`` is given, ``j > p - window``.

    The three segments do not overlap: listed blocks lie at or after ``sink`` and before ``window_start``; where
    ``window_start < sink`` the window begins first and the sink segment ends there.

    Args:
        block_q: queries of a block, one of ``BLOCK_Q``. Block ``m`` holds real queries ``m * block_q`` and following.
        block_k: keys of a listed block, one of ``BLOCK_K``.
        ptr: place in ``idx`` of the first listed block, int64 [B, HL, n]. HL is 1 for all heads, or the number of KV
            heads, or the number of query heads.
        n_full: listed blocks that every query of the block sees whole, int32 [B, HL, n]; they come first.
        n_listed: all listed blocks, int32 [B, HL, n].
        idx: listed block numbers, int32 [nnz]; ascending among the whole ones and among the others. Entries that no
            list reaches are never read.
        sink: positions at the start that all see; a multiple of ``block_k`` unless nothing is listed.
        window_start: first position of the window segment, int32 [B, HL, n].
        window: positions that a query sees back in the window segment, its own included; None for all of them.

    Raises:
        ValueError: for block sizes without a kernel, a sink that cuts a block, or tensors that do not fit together.
    """

    block_q: int
    block_k: int
    ptr: Tensor
    n_full: Tensor
    n_listed: Tensor
    idx: Tensor
    sink: int
    window_start: Tensor
    window: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("block_q", BLOCK_Q), ("block_k", BLOCK_K)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are {', '.join(map(str, allowed))}.")
        if self.sink < 0 or (self.idx.numel() and self.sink % self.block_k):
            raise ValueError(f"sink={self.sink} is no multiple of block_k={self.block_k}: round it up.")
        shapes = {name: tuple(getattr(self, name).shape) for name in ("ptr", "n_full", "n_listed", "window_start")}
        if self.ptr.ndim != 3 or len(set(shapes.values())) > 1:
            raise ValueError(f"the tensors of a block list share one shape [B, HL, n]; given are {shapes}.")

    @property
    def heads(self) -> int:
        """Number of list heads, HL."""
        return self.ptr.shape[1]

    @property
    def count(self) -> int:
        """Number of query blocks, n."""
        return self.ptr.shape[2]

    @classmethod
    def from_selected(
        cls, starts: Tensor, counts: Tensor, *, block_q: int, block_k: int, sink: int, window_start: Tensor
    ) -> BlockList:
        """From the chosen blocks of a selection.

        Args:
            starts: position of the first key of each chosen block, a multiple of ``block_k`` in
                ``[sink, window_start)``, ascending; int [B, HL, n, M].
            counts: how many of the M are chosen, int [B, HL, n]; what follows them is ignored.
            window_start: int [B, HL, n] or what broadcasts to it; see :func:`aligned_window`.
        """
        counts = counts.int().contiguous()
        most = starts.shape[-1]
        first = torch.arange(0, counts.numel() * max(1, most), max(1, most), device=counts.device)
        blocks = (starts // block_k).int().flatten()
        begin = window_start.int().expand(counts.shape).contiguous()
        return cls(block_q, block_k, first.view(counts.shape), counts, counts, blocks, sink, begin)

    @classmethod
    def sink_window(cls, positions: Tensor, *, block_q: int, block_k: int, sink: int, window: int) -> BlockList:
        """Token-exact: position ``p`` sees ``j < sink`` and ``p - window < j <= p``, for all heads alike.

        Args:
            positions: first position of each query block, int64 [B, n]; see :func:`block_positions`.
        """
        begin = (positions - window + 1).clamp(min=sink).int()[:, None].contiguous()
        none = torch.zeros_like(begin)
        return cls(block_q, block_k, none.long(), none, none, none.new_empty(0), sink, begin, window)


def block_positions(queries: int, slots: int, block_q: int, start: Tensor | None, device: torch.device) -> Tensor:
    """First position of each query block, int64 [B, n] ([1, n] without ``start``), for rows right-aligned in ``slots``
    whose last T slots are the queries. Blocks past the last real query of a padded row are empty."""
    blocks = torch.arange(0, queries, block_q, device=device)
    if start is None:
        return (blocks + slots - queries)[None]
    return (slots - queries - start.to(device)).clamp(min=0)[:, None] + blocks


def aligned_window(positions: Tensor, *, window: int, sink: int, block_k: int) -> Tensor:
    """First position of the window segment for query blocks that begin at ``positions``, any shape: a multiple of
    ``block_k`` (as ``sink`` is), at least ``sink``, and early enough that every query sees its last ``window``."""
    begin = torch.div(positions - window + 1, block_k, rounding_mode="floor") * block_k
    return begin.clamp(min=sink)
