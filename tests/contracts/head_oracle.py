"""The dense oracle of split heads: a stock model whose streaming heads hide what they may not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from llm_accel import RetrievalHeads

NAME = "head_oracle"


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
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ keys.transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        if attention_mask is not None:
            logits = logits + attention_mask
        if module.layer_idx in self.layers:
            shown = self._shown(module.layer_idx, query.shape[0], key.shape[1], query.shape[2], key.shape[2])
            logits = logits.masked_fill(~shown.repeat_interleave(groups, 1), torch.finfo(logits.dtype).min)
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        return (weights @ values).transpose(1, 2).contiguous(), None

    def _shown(self, layer: int, batch: int, heads: int, length: int, columns: int) -> Tensor:
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


@contextmanager
def split_heads(model: PreTrainedModel, oracle: HeadOracle) -> Iterator[None]:
    """Runs a stock model with the oracle's attention."""
    config = model.get_decoder().config
    before = config._attn_implementation
    AttentionInterface.register(NAME, oracle)
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
