"""Block-sparse attention and its lists against a dense masked softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from llm_accel.kernels.block_list import BlockList, aligned_window, block_positions
from llm_accel.kernels.block_sparse import block_sparse_attention

CLOSE = 3e-6


@dataclass
class Case:
    """Random tensors and random lists; padding slots hold large values that must not be seen."""

    queries: int = 100
    slots: int = 100
    kv_heads: int = 2
    group: int = 2
    lists: str = "kv"
    block_q: int = 16
    block_k: int = 8
    sink: int = 16
    window: int = 20
    budget: int = 3
    kind: str = "selected"
    dim: int = 16
    width: int = 16
    start: list[int] | None = None
    softcap: float | None = None
    with_sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    query: Tensor = field(init=False)
    blocks: BlockList = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        batch = 2 if self.start is None else len(self.start)
        heads = self.kv_heads * self.group
        self.query = self._randn(batch, heads, self.queries, self.dim)
        self.key = self._randn(batch, self.kv_heads, self.slots, self.dim)
        self.value = self._randn(batch, self.kv_heads, self.slots, self.width)
        self.first = None if self.start is None else torch.tensor(self.start)
        for row, first in enumerate(self.start or []):
            self.key[row, :, :first], self.value[row, :, :first] = 1e4, 1e4
        self.sinks = self._randn(heads) if self.with_sinks else None
        positions = block_positions(self.queries, self.slots, self.block_q, self.first, torch.device("cpu"))
        positions = positions.expand(batch, -1)
        list_heads = {"one": 1, "kv": self.kv_heads, "query": heads}[self.lists]
        self.blocks = getattr(self, f"_{self.kind}")(positions, list_heads)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def _selected(self, positions: Tensor, lists: int) -> BlockList:
        """Up to ``budget`` random blocks between sink and window, with nonsense after the last of them."""
        window = aligned_window(positions, window=self.window, sink=self.sink, block_k=self.block_k)[:, None]
        shape = (positions.shape[0], lists, positions.shape[1], -(-self.slots // self.block_k))
        order = torch.rand(shape, generator=self.random)
        starts = torch.arange(shape[-1]).expand(shape) * self.block_k
        order = order.masked_fill((starts < self.sink) | (starts >= window[..., None]), 2.0)
        picked = order.argsort(-1)[..., : self.budget] * self.block_k
        alive = order.gather(-1, picked // self.block_k) < 2
        picked = picked.masked_fill(~alive, 10**6).sort(-1).values
        return BlockList.from_selected(
            picked, alive.sum(-1), block_q=self.block_q, block_k=self.block_k, sink=self.sink, window_start=window
        )

    def _everything(self, positions: Tensor, lists: int) -> BlockList:
        self.budget = self.slots
        return self._selected(positions, lists)

    def _sink_window(self, positions: Tensor, lists: int) -> BlockList:
        return BlockList.sink_window(
            positions, block_q=self.block_q, block_k=self.block_k, sink=self.sink, window=self.window
        )

    def _dense_mask(self, positions: Tensor, lists: int) -> BlockList:
        shape = (positions.shape[0], lists, positions.shape[1], -(-self.slots // self.block_k))
        listed = torch.rand(shape, generator=self.random) < 0.4
        return BlockList.from_dense_mask(listed, positions, block_q=self.block_q, block_k=self.block_k)

    def _dense(self, positions: Tensor, lists: int) -> BlockList:
        blocks = self._sink_window(positions, lists)
        return replace(blocks, window=None, window_start=torch.zeros_like(blocks.window_start))

    def ours(self, blocks: BlockList | None = None) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            self.query,
            self.key,
            self.value,
            self.blocks if blocks is None else blocks,
            scaling=0.3,
            start=self.first,
            softcap=self.softcap,
            sinks=self.sinks,
            return_lse=True,
        )

    def mask(self) -> Tensor:
        """bool [B, Hq, T, S]."""
        mask = self.blocks.to_dense_mask(self.queries, self.slots, self.first)
        return mask.repeat_interleave(self.query.shape[1] // mask.shape[1], 1)

    def oracle(self) -> tuple[Tensor, Tensor]:
        mask = self.mask()
        query, key, value = self.query.double(), self.key.double(), self.value.double()
        logits = query @ key.repeat_interleave(self.group, 1).transpose(2, 3) * 0.3
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.masked_fill(~mask, float("-inf"))
        lse = logits.logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.double()[:, None])
        lse = lse.masked_fill(~mask.any(-1), float("-inf"))
        weights = torch.exp(logits - lse[..., None]).masked_fill(~mask, 0.0)
        return (weights @ value.repeat_interleave(self.group, 1)).transpose(1, 2), lse


CASES = {
    "selected": Case(),
    "one_list": Case(lists="one"),
    "list_per_query_head": Case(lists="query"),
    "one_query_head_per_kv_head": Case(group=1),
    "odd_group": Case(group=3, kv_heads=1),
    "odd_lengths": Case(queries=111, slots=111, block_k=16, block_q=32),
    "chunk": Case(queries=37, slots=143),
    "one_query": Case(queries=1, slots=143),
    "shorter_than_sink": Case(queries=9, slots=9),
    "shorter_than_window": Case(queries=30, slots=30),
    "no_sink": Case(sink=0),
    "window_of_one": Case(window=1),
    "nothing_selected": Case(budget=0),
    "padded": Case(start=[0, 37, 99, 100]),
    "padded_chunk": Case(queries=37, slots=143, start=[0, 50, 106, 130]),
    "padded_list_per_query_head": Case(lists="query", start=[13, 50]),
    "softcap": Case(softcap=1.5),
    "learned_sinks": Case(with_sinks=True, start=[3, 100]),
    "wide_values": Case(width=24),
    "narrow_values": Case(width=8),
    "streaming": Case(kind="sink_window"),
    "streaming_odd": Case(kind="sink_window", sink=5, window=13, queries=111, slots=111),
    "streaming_padded": Case(kind="sink_window", sink=5, window=13, start=[7, 61, 98]),
    "streaming_chunk": Case(kind="sink_window", sink=3, window=30, queries=50, slots=91, start=[0, 45]),
    "streaming_no_sink": Case(kind="sink_window", sink=0, window=11),
    "dense": Case(kind="dense", start=[0, 33]),
    "any_blocks": Case(kind="dense_mask"),
    "any_blocks_padded": Case(kind="dense_mask", start=[0, 21], block_k=16),
    "large_blocks": Case(queries=300, slots=300, block_q=128, block_k=64, sink=64, window=70),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64(case: Case) -> None:
    output, lse = case.ours()
    expected, expected_lse = case.oracle()
    assert (output.double() - expected).abs().max() <= CLOSE
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert (lse.double() - expected_lse).nan_to_num().abs().max() <= CLOSE


@pytest.mark.parametrize("name", ["padded", "learned_sinks", "any_blocks"])
def test_rows_that_see_nothing_are_zero(name: str) -> None:
    case = CASES[name]
    empty = ~case.mask().any(-1)
    assert empty.any()
    output, lse = case.ours()
    assert (output.transpose(1, 2)[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()


@pytest.mark.parametrize("kind", ["everything", "dense"])
@pytest.mark.parametrize("start", [None, [0, 37, 80]])
def test_all_blocks_are_dense_attention(kind: str, start: list[int] | None) -> None:
    case = Case(kind=kind, start=start, queries=80, slots=123)
    mask = torch.ones(80, 123, dtype=torch.bool).tril(43)[None, None]
    if case.first is not None:
        mask = mask & (torch.arange(123) >= case.first[:, None])[:, None, None]
    assert torch.equal(case.mask(), mask.expand(case.mask().shape))


def test_sink_and_window_to_the_token() -> None:
    case = Case(kind="sink_window", sink=5, window=13, start=[7, 0])
    query, slot = torch.arange(100)[:, None] - 7, torch.arange(100) - 7
    visible = (slot >= 0) & (slot <= query) & ((slot < 5) | (query - slot < 13))
    assert torch.equal(case.mask()[0, 0], visible)


def test_every_query_sees_its_window_and_the_sink() -> None:
    for case in (Case(), Case(block_q=64, block_k=32, sink=32), Case(start=[0, 30])):
        mask = case.mask()[0, 0]
        query, slot = torch.arange(100)[:, None], torch.arange(100)
        near = (slot <= query) & ((slot < case.sink) | (query - slot < case.window))
        assert mask[near].all()


@pytest.mark.parametrize("name", ["selected", "streaming_odd", "any_blocks"])
def test_a_padded_row_is_the_row_without_padding(name: str) -> None:
    plain = CASES[name]
    assert plain.start is None
    pad = 21
    wider = [torch.nn.functional.pad(part, (0, 0, pad, 0), value=1e4) for part in (plain.query, plain.key, plain.value)]
    count = -(-(plain.queries + pad) // plain.block_q) - plain.blocks.count
    longer = {
        field: torch.nn.functional.pad(getattr(plain.blocks, field), (0, count))
        for field in ("ptr", "n_full", "n_listed", "window_start")
    }
    output = block_sparse_attention(
        *wider, replace(plain.blocks, **longer), scaling=0.3, start=torch.tensor([pad, pad])
    )
    assert torch.equal(output[:, pad:], plain.ours()[0])
    assert (output[:, :pad] == 0).all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_16_bits_are_added_up_in_fp32(dtype: torch.dtype, close: float) -> None:
    case = Case(dtype=dtype)
    output, lse = case.ours()
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert (output.double() - case.oracle()[0]).abs().max() <= close


def test_float64_stays_float64() -> None:
    case = Case(dtype=torch.float64)
    output, lse = case.ours()
    assert output.dtype == lse.dtype == torch.float64
    assert (output - case.oracle()[0]).abs().max() <= 1e-14


def test_large_logits_do_not_overflow() -> None:
    case = Case()
    case.query *= 1e4
    output, _ = case.ours()
    assert torch.isfinite(output).all()
    assert (output.double() - case.oracle()[0]).abs().max() <= 1e-3


def test_lists_that_do_not_fit_are_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match=r"block_k=12: allowed are 8"):
        replace(case.blocks, block_k=12)
    with pytest.raises(ValueError, match=r"sink=17 is no multiple of block_k=8"):
        replace(case.blocks, sink=17)
    with pytest.raises(ValueError, match="share one shape"):
        replace(case.blocks, n_full=case.blocks.n_full[:1])
    with pytest.raises(ValueError, match="a block list with 4 heads: allowed are 1, 3"):
        wrong = (torch.zeros(2, heads, 100, 16) for heads in (3, 3, 3))
        block_sparse_attention(*wrong, Case(lists="query").blocks, scaling=0.3)
    with pytest.raises(ValueError, match="2 rows of 7 query blocks; 2 rows of 50 queries are 4 blocks"):
        block_sparse_attention(case.query[:, :, :50], case.key, case.value, case.blocks, scaling=0.3)
    with pytest.raises(ValueError, match="do not fit: batch and slots"):
        block_sparse_attention(case.query, case.key, case.value[:, :, :50], case.blocks, scaling=0.3)
