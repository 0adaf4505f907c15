"""What the oracles share: softmax attention written out, and a stock model that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "contract_oracle"


def attention_weights(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, shown: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Probabilities [B, Hq, T, P]; ``shown``, bool [B, H, T or 1, P]: what each group of heads may see."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ keys.transpose(2, 3) * kwargs["scaling"]
    if kwargs.get("softcap") is not None:
        logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
    if attention_mask is not None:
        logits = logits + attention_mask
    if shown is not None:
        shown = shown.repeat_interleave(query.shape[1] // shown.shape[1], 1)
        logits = logits.masked_fill(~shown, torch.finfo(logits.dtype).min)
    if kwargs.get("s_aux") is None:
        return logits.softmax(-1)
    sink = kwargs["s_aux"].view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def attention_output(weights: Tensor, value: Tensor) -> Tensor:
    """[B, T, Hq, Dv], as attention functions of transformers return it."""
    values = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    return (weights @ values).transpose(1, 2).contiguous()


@contextmanager
def running(model: PreTrainedModel, attention: Callable[..., Any]) -> Iterator[None]:
    """A stock model with this attention function and the mask of eager attention."""
    config = model.get_decoder().config
    before = config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
