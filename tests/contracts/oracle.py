"""The dense oracle: a stock model that keeps everything and whose attention hides exactly the evicted entries."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.contracts.plain_attention import attention_output, attention_weights, running


class MaskedOracle:
    """Plain softmax attention in the dtype of the model. Once the prompt is complete, prompt columns outside
    ``visible[layer]``, bool [B, Hk, prompt], are hidden; everything after the prompt is seen."""

    def __init__(self, visible: dict[int, Tensor]) -> None:
        self.visible = visible

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        visible = self.visible.get(module.layer_idx)
        shown = None
        if visible is not None and key.shape[2] > visible.shape[2]:
            shown = nn.functional.pad(visible, (0, key.shape[2] - visible.shape[2]), value=True)[:, :, None]
        return attention_output(attention_weights(query, key, attention_mask, shown, kwargs), value), None


def visible_columns(kept: Tensor, prompt: int, lengths: tuple[int, ...]) -> Tensor:
    """bool [B, Hk, prompt] from kept positions [B, Hk, n] that count from the first real token of each row."""
    padding = torch.tensor([prompt - length for length in lengths])[:, None, None]
    columns = (kept + padding).masked_fill(kept < 0, prompt)
    shown = torch.zeros(*kept.shape[:2], prompt + 1, dtype=torch.bool)
    return shown.scatter(2, columns, True)[..., :prompt]


def masked(model: PreTrainedModel, visible: dict[int, Tensor]) -> AbstractContextManager[None]:
    """Runs a stock model with the oracle's attention."""
    return running(model, MaskedOracle(visible))
