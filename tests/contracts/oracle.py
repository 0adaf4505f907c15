"""The dense oracle: a stock model that keeps everything and whose attention hides exactly the evicted entries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "masked_oracle"


class MaskedOracle:
    """Plain softmax attention in the dtype of the model. Once the prompt is complete, prompt columns outside
    ``visible[layer]``, bool [B, Hk, prompt], are hidden; everything after the prompt is seen."""

    def __init__(self, visible: dict[int, Tensor]) -> None:
        self.visible = visible

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
        visible = self.visible.get(module.layer_idx)
        if visible is not None and key.shape[2] > visible.shape[2]:
            rest = key.shape[2] - visible.shape[2]
            shown = nn.functional.pad(visible, (0, rest), value=True)
            shown = shown.repeat_interleave(query.shape[1] // shown.shape[1], 1)
            logits = logits.masked_fill(~shown[:, :, None], float("-inf"))
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        return (weights @ values).transpose(1, 2).contiguous(), None


def visible_columns(kept: Tensor, prompt: int, lengths: tuple[int, ...]) -> Tensor:
    """bool [B, Hk, prompt] from kept positions [B, Hk, n] that count from the first real token of each row."""
    padding = torch.tensor([prompt - length for length in lengths])[:, None, None]
    columns = (kept + padding).masked_fill(kept < 0, prompt)
    shown = torch.zeros(*kept.shape[:2], prompt + 1, dtype=torch.bool)
    return shown.scatter(2, columns, True)[..., :prompt]


@contextmanager
def masked(model: PreTrainedModel, visible: dict[int, Tensor]) -> Iterator[None]:
    """Runs a stock model with the oracle's attention."""
    config = model.get_decoder().config
    before = config._attn_implementation
    AttentionInterface.register(NAME, MaskedOracle(visible))
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
