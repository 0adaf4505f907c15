"""The dense oracle of split heads: a stock model whose streaming heads hide what they may not see."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_accel import RetrievalHeads
from tests.contracts.plain_attention import attention_output, attention_weights, running


@dataclass
class HeadOracle:
    """Plain softmax attention. A query head hides columns by a rule written over positions alone.

    Attributes:
        config: the method; its ``head_list`` names the KV heads that see everything.
        lengths: real tokens of each row of the prompt, padded on the left to the longest.
        layers: layers the method acts on.
        prompt: columns of the prompt; queries after it decode.
    """

    config: RetrievalHeads
    lengths: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def prompt(self) -> int:
        return max(self.lengths)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        shown = None
        if module.layer_idx in self.layers:
            shown = self.shown(module.layer_idx, query.shape[0], key.shape[1], query.shape[2], key.shape[2])
        return attention_output(attention_weights(query, key, attention_mask, shown, kwargs), value), None

    def shown(self, layer: int, batch: int, heads: int, length: int, columns: int) -> Tensor:
        """bool [B, Hk, T, P]: what each query may see, causality aside."""
        shown = torch.ones(batch, heads, length, columns, dtype=torch.bool)
        streaming = [head for head in range(heads) if f"{layer}.{head}" not in self.config.head_list]
        column, own = torch.arange(columns), torch.arange(columns - length, columns)[:, None]
        rows = batch // len(self.lengths)
        for row in range(batch):
            padding = self.prompt - self.lengths[row // rows]
            narrow = (column - padding < self.config.sinks) | (own - column < self.config.recent)
            if self.config.prefill == "dense":
                narrow = narrow | (own < self.prompt)
            shown[row, streaming] = narrow
        return shown


def split_heads(model: PreTrainedModel, oracle: HeadOracle) -> AbstractContextManager[None]:
    """Runs a stock model with the oracle's attention."""
    return running(model, oracle)
