"""The compaction oracle: dense attention over everything, hiding what a plain-python eviction loop has evicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_accel import H2O, StreamingLLM
from tests.contracts.plain_attention import attention_output, attention_weights, running


@dataclass
class CompactionOracle:
    """Attention of a stock model with the eviction rule of ``config`` written as sets and loops.

    Attributes:
        config: the method.
        lengths: real tokens of each row of the prompt.
        layers: layers the method acts on.
        kv_heads: heads that decide on their own; None where each key head does.
        kept: layer -> (row, head) -> {column: score}; columns count padding.
    """

    config: H2O | StreamingLLM
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    kv_heads: int | None = None
    kept: dict[int, dict[tuple[int, int], dict[int, float]]] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        heads = self.kv_heads or key.shape[1]
        acts = module.layer_idx in self.layers
        shown = None
        if acts and query.shape[2] == 1:
            self._before_step(module.layer_idx, key.shape[2] - 1)
            shown = self._shown(module.layer_idx, query.shape[0], heads, key.shape[2])
        weights = attention_weights(query, key, attention_mask, shown, kwargs)
        if acts:
            self._after_step(module.layer_idx, weights, heads)
        return attention_output(weights, value), None

    def _padding(self, row: int) -> int:
        return max(self.lengths) - self.lengths[row]

    def _before_step(self, layer: int, column: int) -> None:
        """The new token joins; StreamingLLM makes room first, so that it never sees more than its budget."""
        for (row, _), entries in self.kept[layer].items():
            if isinstance(self.config, StreamingLLM) and len(entries) == self.config.budget:
                del entries[min(c for c in entries if c >= self._padding(row) + self.config.sinks)]
            entries[column] = 0.0

    def _shown(self, layer: int, batch: int, heads: int, columns: int) -> Tensor:
        shown = torch.zeros(batch, heads, 1, columns, dtype=torch.bool)
        for (row, head), entries in self.kept[layer].items():
            shown[row, head, 0, list(entries)] = True
        return shown

    def _after_step(self, layer: int, weights: Tensor, heads: int) -> None:
        batch, query_heads, length, columns = weights.shape
        first = layer not in self.kept
        state = self.kept.setdefault(layer, {})
        for row in range(batch):
            real = range(self._padding(row), columns)
            mass = weights[row, :, self._padding(row) if length > 1 else 0 :].double().sum(1)
            mass = mass.view(heads, query_heads // heads, columns).sum(1)
            for head in range(heads):
                entries = state.setdefault((row, head), dict.fromkeys(real, 0.0) if first else {})
                for column in entries:
                    entries[column] = entries[column] * self._decay(length) + float(mass[head, column])
                self._cut(row, entries, columns)

    def _decay(self, length: int) -> float:
        return self.config.decay if isinstance(self.config, H2O) and length == 1 else 1.0

    def _cut(self, row: int, entries: dict[int, float], columns: int) -> None:
        while len(entries) > self.config.budget:
            recent = self.config.budget - self.config.sinks
            if isinstance(self.config, H2O):
                recent = self.config.budget // 2 if self.config.recent is None else self.config.recent
            fixed_below = self._padding(row) + self.config.sinks
            candidates = [c for c in entries if fixed_below <= c < columns - recent]
            rank = {c: entries[c] if isinstance(self.config, H2O) else float(c) for c in candidates}
            if isinstance(self.config, H2O) and self.config.norm == "mean":
                rank = {c: score / (columns - c) for c, score in rank.items()}
            del entries[min(candidates, key=lambda c: (rank[c], c))]


@contextmanager
def compacted(model: PreTrainedModel, oracle: CompactionOracle) -> Iterator[CompactionOracle]:
    """Runs a stock model with the oracle's attention."""
    with running(model, oracle):
        yield oracle
