"""Block-sparse attention and its lists against a dense masked softmax in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llm_accel.kernels.block_sparse import block_sparse_attention
from tests.kernels.block_sparse_cases import CASES, Case

CLOSE = 3e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64(case: Case) -> None:
    output, lse = case.ours()
    expected, expected_lse = case.oracle()
    assert (output.double() - expected).abs().max() <= CLOSE
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert (lse.double() - expected_lse).nan_to_num().abs().max() <= CLOSE


@pytest.mark.parametrize("name", ["selected", "padded", "odd_group"])
def test_memory_layout_does_not_matter(name: str) -> None:
    """Models hand in views of [B, T, H, D]."""
    case = CASES[name]
    query, key, value = (
        part.transpose(1, 2).contiguous().transpose(1, 2) for part in (case.query, case.key, case.value)
    )
    output, _ = block_sparse_attention(query, key, value, case.blocks, scaling=0.3, start=case.first)
    assert torch.equal(output, case.ours()[0])


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
    output, _ = block_sparse_attention(
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
