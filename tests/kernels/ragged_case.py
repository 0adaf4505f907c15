"""Problems for ragged attention, and their answer by a dense softmax in float64, head by head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_accel.kernels.ragged_decode import ragged_attention, reference


@dataclass
class Case:
    """Random pages in random order. Slots without an entry hold large values that must not be seen, and so do pages
    without an owner."""

    lengths: list[list[int]]
    group: int = 2
    count: int = 1
    dim: int = 8
    width: int = 6
    page: int = 4
    free: int = 2
    softcap: float | None = None
    with_sinks: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    query: Tensor = field(init=False)
    sinks: Tensor | None = field(init=False)
    entries: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        batch, heads = len(self.lengths), len(self.lengths[0])
        self.query = randn(batch, heads * self.group, self.count, self.dim)
        self.sinks = randn(heads * self.group) if self.with_sinks else None
        counts = [-(-length // self.page) for row in self.lengths for length in row]
        order = torch.randperm(sum(counts) + self.free, generator=generator).tolist()
        self.keys = torch.full((len(order), self.page, self.dim), 1e4, dtype=self.dtype)
        self.values = torch.full((len(order), self.page, self.width), 1e4, dtype=self.dtype)
        self.table = torch.full((batch, heads, max(counts)), -1)
        self.entries = {}
        for row in range(batch):
            for head, length in enumerate(self.lengths[row]):
                key, value = randn(length, self.dim), randn(length, self.width)
                self.entries[row, head] = key, value
                for rank in range(-(-length // self.page)):
                    page = order.pop()
                    self.table[row, head, rank] = page
                    part = slice(rank * self.page, min(length, (rank + 1) * self.page))
                    self.keys[page, : part.stop - part.start] = key[part]
                    self.values[page, : part.stop - part.start] = value[part]

    def ours(self) -> Tensor:
        return ragged_attention(
            self.query,
            self.keys,
            self.values,
            self.table,
            torch.tensor(self.lengths),
            scaling=0.4,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def oracle(self) -> Tensor:
        batch, query_heads = self.query.shape[:2]
        result = torch.zeros(batch, self.count, query_heads, self.width, dtype=torch.float64)
        for row in range(batch):
            for head in range(query_heads):
                key, value = (part.double() for part in self.entries[row, head // self.group])
                for index in range(self.count):
                    seen = len(key) - self.count + 1 + index
                    logits = key[:seen] @ self.query[row, head, index].double() * 0.4
                    if self.softcap is not None:
                        logits = torch.tanh(logits / self.softcap) * self.softcap
                    extra = logits.new_zeros(0) if self.sinks is None else self.sinks[head : head + 1].double()
                    result[row, index, head] = torch.cat([logits, extra]).softmax(0)[:seen] @ value[:seen]
        return result


CASES = {
    "one_entry": Case([[1]]),
    "ragged": Case([[5, 17], [9, 4]]),
    "full_pages": Case([[8, 16, 4]]),
    "one_query_head_per_kv_head": Case([[7, 3]], group=1),
    "odd_group": Case([[7, 3]], group=3),
    "odd_page": Case([[7, 30]], page=5),
    "page_of_one": Case([[7, 3]], page=1),
    "page_larger_than_all": Case([[7, 3]], page=64),
    "no_free_pages": Case([[6, 19]], free=0),
    "softcap": Case([[6, 19]], softcap=1.5),
    "learned_sinks": Case([[6, 19], [3, 3]], with_sinks=True),
    "continuation": Case([[6, 19], [11, 5]], count=5),
    "continuation_only": Case([[5, 5]], count=5),
    "continuation_of_several_blocks": Case([[80, 71]], count=2 * reference.QUERY_BLOCK + 3),
    "continuation_softcap_sinks": Case([[9, 14]], count=3, softcap=2.0, with_sinks=True),
}
