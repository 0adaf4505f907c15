"""The model's own attention, called with a mask that fits a right-aligned cache."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_accel.cache.attention import Softmax

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def stores_latents(decoder: Any) -> bool:
    """Whether the cache holds one latent for all heads (DeepSeek's MLA) rather than a key and a value per KV head."""
    return bool(getattr(decoder.config, "kv_lora_rank", None))


def softmax_of(kwargs: dict[str, Any], head_dim: int) -> Softmax:
    """Read from what the model passes to its attention function; ``head_dim`` sets the scale where it passes none."""
    scaling = kwargs.get("scaling")
    return Softmax(
        scaling=head_dim**-0.5 if scaling is None else scaling, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux")
    )


def base_function(module: nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model would have called; eager lives in the model's own file."""
    if base == "eager":
        found: Any = sys.modules[type(module).__module__].eager_attention_forward
    else:
        found = ALL_ATTENTION_FUNCTIONS[base]
    return found  # type: ignore[no-any-return]


def visibility(start: Tensor | None, length: int, slots: int, device: torch.device) -> Tensor | None:
    """bool [B or 1, 1, T, P]: which slots each of the newest T queries sees; None when it is all of them."""
    if length == 1 and start is None:
        return None
    slot = torch.arange(slots, device=device)
    visible = (slot[None] <= torch.arange(slots - length, slots, device=device)[:, None])[None]
    if start is not None:
        visible = visible & (slot[None] >= start.to(device)[:, None])[:, None]
    return visible[:, None]


def additive(visible: Tensor, query: Tensor) -> Tensor:
    """A bool mask as one that is added to logits in the dtype of ``query``."""
    lowest = torch.finfo(query.dtype).min
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~visible, lowest)


class ModelAttention:
    """The attention of one layer in the running call, as the model would have computed it; an
    :class:`~llm_accel.cache.attention.Attention`.

    Args:
        base: name of the model's own attention implementation.
        module: the attention module of the layer.
        kwargs: what the model passed to its attention function (scaling, softcap, learned sinks, ...).
    """

    def __init__(self, base: str, module: nn.Module, kwargs: dict[str, Any]) -> None:
        self.base, self.module, self.kwargs = base, module, kwargs

    def plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """What the model would have called, [B, T, Hq, Dv]."""
        output, _ = base_function(self.module, self.base)(self.module, query, key, value, mask, **self.kwargs)
        return output

    def softmax(self, head_dim: int) -> Softmax:
        """How logits become probabilities; ``head_dim`` sets the scale where the model passes none."""
        return softmax_of(self.kwargs, head_dim)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
        """Dense attention of the newest T queries over all entries, [B, T, Hq, Dv]."""
        if self.base.startswith("flash"):
            return self._flash(query, key, value, start)
        whole_prompt = query.shape[2] == key.shape[2] and start is None
        mask = None
        if self.base == "eager" or not whole_prompt:  # SDPA knows the causal mask of a whole prompt without one
            mask = visibility(start, query.shape[2], key.shape[2], key.device)
        if self.base == "eager" and mask is not None:
            mask = additive(mask, query)
        return self.plain(query, key, value, mask)

    def visible(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Dense attention of one query per row over the slots under ``visible``, [B, 1, Hq, Dv]."""
        kwargs = self.kwargs
        if self.base == "sdpa" and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
            # the query heads of a group as rows of one head: keys and values are read once and never repeated
            packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
            output = F.scaled_dot_product_attention(packed, key, value, attn_mask=visible, scale=kwargs.get("scaling"))
            return output.reshape(query.shape[0], 1, query.shape[1], -1)
        return self.plain(query, key, value, additive(visible, query) if self.base == "eager" else visible)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
        """FlashAttention with the base name spelled out and without ``position_ids``: for a single row it would take a
        gap in the positions for packed sequences, and evicted entries leave gaps."""
        from transformers.modeling_flash_attention_utils import _flash_attention_forward

        mask, kwargs = None, self.kwargs
        if start is not None:
            mask = (torch.arange(key.shape[2], device=key.device)[None] >= start.to(key.device)[:, None]).long()
        return _flash_attention_forward(  # type: ignore[no-any-return]
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            query_length=query.shape[2],
            is_causal=True,
            dropout=kwargs.get("dropout", 0.0),
            softmax_scale=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            s_aux=kwargs.get("s_aux"),
            attn_implementation=self.base,
        )

    def of_heads(self, heads: Tensor) -> ModelAttention:
        """An attention that computes only the query heads ``heads``, int64 [n]: learned sinks are one number per head,
        which eager attention reads from the module."""
        module, kwargs = self.module, self.kwargs
        if kwargs.get("s_aux") is not None:
            kwargs = kwargs | {"s_aux": kwargs["s_aux"][heads]}
        sinks = module._parameters.get("sinks")
        if sinks is not None:
            module = copy.copy(module)
            module.__dict__["_parameters"] = {**module._parameters, "sinks": sinks[heads]}
        return ModelAttention(self.base, module, kwargs)
