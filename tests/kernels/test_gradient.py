"""Operations with a gradient and without: computed alike, and refused only when somebody goes backward."""

from __future__ import annotations

import pytest
import torch

from llm_accel import UnsupportedCallError
from llm_accel.kernels.block_list import BlockList, block_positions
from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.compaction import gather_entries
from llm_accel.kernels.gradient import without_gradient
from llm_accel.kernels.ragged_decode import ragged_attention


def numbers(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("who", [0, 1, 2])
def test_block_sparse_attention_refuses_whoever_asks(who: int) -> None:
    given = [numbers(1, 4, 70, 8), numbers(1, 2, 70, 8), numbers(1, 2, 70, 8)]
    positions = block_positions(70, 70, 64, None, torch.device("cpu"))
    blocks = BlockList.sink_window(positions, block_q=64, block_k=64, sink=4, window=16)
    plain = block_sparse_attention(*given, blocks, scaling=0.3)
    given[who].requires_grad_()
    output, lse = block_sparse_attention(*given, blocks, scaling=0.3)
    assert torch.equal(output, plain[0]) and torch.equal(lse, plain[1])
    for result in (output, lse):
        with pytest.raises(UnsupportedCallError, match="block-sparse attention has no gradient"):
            result.sum().backward()


@pytest.mark.parametrize("steps", [1, 3])
def test_ragged_attention_refuses(steps: int) -> None:
    pools = numbers(4, 8, 8), numbers(4, 8, 6)
    table, lengths = torch.tensor([[[0, 1], [2, -1]]]), torch.tensor([[11, 5]])
    query = numbers(1, 4, steps, 8)
    plain = ragged_attention(query, *pools, table, lengths, scaling=0.3)
    output = ragged_attention(query.requires_grad_(), *pools, table, lengths, scaling=0.3)
    assert torch.equal(output, plain)
    with pytest.raises(UnsupportedCallError, match="ragged attention has no gradient"):
        output.sum().backward()


def test_what_is_gathered_has_its_gradient() -> None:
    keys, values = numbers(1, 2, 5, 3).requires_grad_(), numbers(1, 2, 5, 4)
    copies = gather_entries(torch.tensor([[[0, 3], [1, 4]]]), keys, values)
    copies[0].sum().backward()
    assert keys.grad is not None
    assert keys.grad[..., 0].tolist() == [[[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]]


def test_nothing_is_added_where_nothing_is_recorded() -> None:
    (output,) = without_gradient("this", lambda: (torch.ones(2),), torch.ones(2))
    with torch.no_grad():
        (quiet,) = without_gradient("this", lambda: (torch.ones(2),), torch.ones(2).requires_grad_())
    assert output.grad_fn is None and quiet.grad_fn is None
