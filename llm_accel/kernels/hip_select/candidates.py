"""What all selectors share: which blocks may be chosen, the queries that stand for a block, and the order of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.block_list import aligned_window, block_positions
from llm_accel.kernels.dispatch import Problem

ABSENT = 2**40  # a start that no choice has: sorts last, and no region grows far enough to revive it
TILE = 2**21  # elements of the keys of the query blocks that are searched together
FIRST, SAMPLED = 8, 64  # keys that a level is taken from: the first ones, and as many more, evenly spaced
CACHED = 2**17  # elements of the keys, and of their logits, that are at work at once in the cache of a processor


@dataclass(frozen=True)
class Scope:
    """The keys that a selection chooses from: after the sink and before the window of the query block.

    Args:
        sink: positions at the start that all queries see; a multiple of ``block_k``.
        window: positions that every query sees back, its own included, and up to ``block_q + block_k`` more.
        block_q: queries that share a choice.
        block_k: keys of a chosen block.
    """

    sink: int
    window: int
    block_q: int
    block_k: int

    def blocks(self, queries: int) -> int:
        """Query blocks of ``queries`` rows."""
        return -(-queries // self.block_q)

    def window_start(self, queries: int, slots: int, start: Tensor | None, device: torch.device) -> Tensor:
        """First position of the window of each query block, int64 [B or 1, n]."""
        positions = block_positions(queries, slots, self.block_q, start, device)
        return aligned_window(positions, window=self.window, sink=self.sink, block_k=self.block_k)

    def end_at(self, position: Tensor) -> Tensor:
        """Where the candidates of one query at ``position``, int64 [B or 1], end: int64 [B or 1, 1, 1, 1]."""
        return aligned_window(position, window=self.window, sink=self.sink, block_k=self.block_k)[:, None, None, None]

    def end_of(self, slots: int, start: Tensor | None, device: torch.device) -> Tensor:
        """Where the candidates end for the last of ``slots`` entries, as :meth:`end_at`; rows begin at ``start``."""
        if start is not None:
            return self.end_at(slots - 1 - start.to(device))
        end = (slots - self.window) // self.block_k * self.block_k  # the host knows it
        return torch.full((1, 1, 1, 1), max(end, self.sink), device=device)

    def most(self, queries: int, slots: int, block: int) -> int:
        """Candidate keys of query block ``block`` in the longest row."""
        first = slots - queries + block * self.block_q
        return max(0, (first - self.window + 1) // self.block_k * self.block_k - self.sink)


@dataclass(frozen=True)
class Keys:
    """Keys [B, H, S, D] that are read by position, counted from the first real slot of each row."""

    rows: Tensor
    origin: Tensor
    last: Tensor

    @property
    def problem(self) -> Problem:
        """What decides between backends."""
        return Problem(self.rows.device, self.rows.dtype, self.rows.shape[-1])

    @classmethod
    def of(cls, key: Tensor, start: Tensor | None) -> Keys:
        """Keys of rows that begin at slot ``start``, int64 [B], or at 0."""
        rows, begin = _in_place(key)
        origin = begin if start is None else begin + start.to(key.device)[:, None, None, None]
        return cls(rows, origin, begin + (key.shape[2] - 1))

    @classmethod
    def first(cls, key: Tensor, lengths: Tensor) -> Keys:
        """Keys of rows that hold their first ``lengths``, int64 [B], slots; the rest are free."""
        rows, begin = _in_place(key)
        return cls(rows, begin, begin + lengths[:, None, None, None] - 1)

    def at(self, positions: Tensor) -> Tensor:
        """Rows of the keys at ``positions``, int64 [B, H, n, m]; the last key where there is none."""
        return torch.minimum(self.origin + positions, self.last)


def _in_place(key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, S, D] as rows [N, D], without a copy where the distances of heads and batch rows are whole numbers of
    slots, as in a buffer with room for more; and the row of the first slot of each head, int64 [B, H, 1, 1]."""
    batch, heads, slots, dim = key.shape
    far, near, step, unit = key.stride()
    if key.is_contiguous() or unit != 1 or step < dim or far % step or near % step:
        begin = torch.arange(0, batch * heads * slots, slots, device=key.device)
        return key.reshape(-1, dim), begin.view(batch, heads, 1, 1)
    distances = far // step, near // step
    count = (batch - 1) * distances[0] + (heads - 1) * distances[1] + slots
    first, second = (
        torch.arange(size, device=key.device) * apart for size, apart in zip((batch, heads), distances, strict=True)
    )
    return key.as_strided((count, dim), (step, 1)), (first[:, None] + second)[:, :, None, None]


def first_real(queries: int, slots: int, start: Tensor | None, device: torch.device) -> Tensor:
    """First real query of each row among the last ``queries`` of ``slots``, int64 [B or 1]."""
    if start is None:
        return zero(device)
    return (start.to(device) - (slots - queries)).clamp(min=0)


def zero(device: torch.device) -> Tensor:
    """The first real query, or slot, of rows without padding, int64 [1]."""
    return torch.zeros(1, dtype=torch.long, device=device)


def representatives(
    query: Tensor, key_heads: int, first: Tensor, blocks: range, block_q: int, stride: int, last: bool = False
) -> Tensor:
    """The queries that stand for each of the query ``blocks``, [B, H, n, G * block_q / stride, D]: means in fp32, a
    lone query as it is.

    Args:
        query: [B, Hq, T, D].
        key_heads: H; the G query heads of a group stand side by side.
        first: first real query of each row, int64 [B or 1]; block 0 begins there.
        stride: rows that one query stands for: their mean, or with ``last`` the last of them. Blocks that the rows do
            not fill repeat the last row.
    """
    batch, _, queries, dim = query.shape
    if stride == queries == len(blocks) == 1:
        return query.reshape(batch, key_heads, 1, -1, dim)
    if stride == 1:
        block_q = min(block_q, queries)  # a lone block that the rows do not fill needs no repeated ones
    rows = torch.arange(blocks.start * block_q, blocks.stop * block_q, device=query.device)
    rows = (first[:, None] + rows).clamp(max=queries - 1)
    if last:
        rows = rows[:, stride - 1 :: stride]
    if rows.shape[0] == 1:
        chosen = query[:, :, rows[0]].float()
    else:
        chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, dim)).float()
    if not last and stride > 1:
        chosen = chosen.unflatten(2, (-1, stride)).mean(3)
    packed = chosen.view(batch, key_heads, -1, len(blocks), block_q // stride, dim)
    return packed.transpose(2, 3).flatten(3, 4)


def key_scores(representative: Tensor, keys: Keys, positions: Tensor, level: Tensor | None = None) -> Tensor:
    """How well the keys at ``positions``, int64 [B, H, n, m], answer the best of the queries [B, H, n, R, D]: fp32
    [B, H, n, m]. ``level``: what is taken off the products of each query, fp32 [B, H, n, R]."""
    index, queries = keys.at(positions).flatten(0, 2), representative.float().flatten(0, 2)
    below = None if level is None else level.flatten(0, 2).neg()[..., None]  # [B * H * n, R, 1]
    blocks, count, dim = *index.shape, queries.shape[-1]
    at_once = (CACHED if index.device.type == "cpu" else TILE) // max(queries.shape[1:])
    columns = max(1, min(count, at_once))
    rows = max(1, at_once // columns)
    score = torch.empty(index.shape, dtype=torch.float32, device=index.device)
    for row in range(0, blocks, rows):
        for column in range(0, count, columns):
            part = index[row : row + rows, column : column + columns]
            read = keys.rows.index_select(0, part.flatten()).float().view(*part.shape, dim)
            some = slice(row, row + rows)
            if below is None:
                logits = queries[some] @ read.transpose(1, 2)
            else:
                logits = torch.baddbmm(below[some], queries[some], read.transpose(1, 2))
            score[some, column : column + columns] = logits.amax(1)
    return score.view(positions.shape)


def best_key(representative: Tensor, keys: Keys, starts: Tensor, count: int, level: Tensor | None = None) -> Tensor:
    """The best :func:`key_scores` of the ``count`` keys from each of ``starts`` on: int64 to fp32, [B, H, n, m]."""
    positions = (starts[..., None] + torch.arange(count, device=starts.device)).flatten(-2)
    return key_scores(representative, keys, positions, level).view(*starts.shape, count).amax(-1)


def levels(chunk: int) -> int:
    """Halvings of a chunk of ``chunk`` keys, a power of two, after which every key on the way down has been read: the
    two keys of a half are the two that it has left when it is two wide."""
    return max(1, chunk.bit_length() - 1)


def best_places(score: Tensor, present: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best, int64 [..., count], ascending; the lower place where scores are equal, those that
    are not ``present`` after all others."""
    ranked = torch.where(present, score, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    return ranked[..., :count].sort(dim=-1).values


def tiles(count: int, cost: int) -> list[range]:
    """``count`` query blocks in runs whose gathered keys, ``cost`` elements for each, stay within :data:`TILE`."""
    width = max(1, TILE // max(1, cost))
    return [range(begin, min(begin + width, count)) for begin in range(0, count, width)]
