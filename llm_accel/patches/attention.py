"""Our attention and mask functions, registered once per base implementation under a neutral name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.base_attention import base_function
from llm_accel.patches.compiled.cache import FixedCache
from llm_accel.patches.eviction import Eviction
from llm_accel.patches.head_groups import GroupedAttention
from llm_accel.patches.head_mask import attend_window, attend_without, masked_rows
from llm_accel.patches.layers import GroupedLayer, ReplyLayer
from llm_accel.patches.ranks import check_heads
from llm_accel.patches.replay import Replay
from llm_accel.patches.reply import ReplyStep
from llm_accel.patches.session import Session
from llm_accel.patches.vision.cuts import watch

PREFIX = "llm_accel_"
_NEUTRAL = {"flash_attention_2": "fa2", "flash_attention_3": "fa3"}


def accel_name(base: str) -> str:
    """The name under which a base implementation is wrapped; transformers reads meaning into "flash" in a name."""
    return PREFIX + _NEUTRAL.get(base, base)


def register(base: str) -> str:
    """Registers attention and mask function for one base implementation; returns their common name."""
    name = accel_name(base)
    AttentionInterface.register(name, AccelAttention(base))
    AttentionMaskInterface.register(name, AccelMask(base))
    return name


class AccelAttention:
    """Attention of one layer: dense through the base implementation, eviction before or after it."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.__name__ = accel_name(base)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        llm_accel: Session | FixedCache | Replay | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, Hq, T, D], key and value [B, H, P, D] post-RoPE -> [B, T, Hq, Dv]."""
        index: int | None = getattr(module, "layer_idx", None)
        if isinstance(llm_accel, FixedCache | Replay):
            assert index is not None
            return llm_accel.attend(index, self.base, module, query, key, value, **kwargs), None
        if llm_accel is not None:
            check_heads(llm_accel.plan.heads, query)
        mask = None if llm_accel is None else llm_accel.plan.mask
        if llm_accel is None or index is None or mask is None or not mask.heads[index]:
            return self._unmasked(module, query, key, value, attention_mask, llm_accel, index, **kwargs)
        heads, rows = mask.heads[index], masked_rows(mask, llm_accel, query.shape[2])

        def attention(query: Tensor) -> Tensor:
            return self._unmasked(module, query, key, value, attention_mask, llm_accel, index, **kwargs)[0]

        if rows == 0:
            return attention(query), None
        if mask.mode != "window":
            return attend_without(mask, heads, rows, query, attention), None
        output, layer = attention(query), llm_accel.ours.get(index)
        if layer is not None:  # other layers have windows of their own
            tensors = (query, key, value)
            output = attend_window(mask, heads, rows, self.base, module, tensors, layer, output, kwargs)
        return output, None

    def _unmasked(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        llm_accel: Session | None,
        index: int | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = llm_accel.ours.get(index) if llm_accel is not None and index is not None else None
        if llm_accel is None or index is None or layer is None:
            return base_function(module, self.base)(module, query, key, value, attention_mask, **kwargs)
        layer.attended = True
        if llm_accel.padding is not None:
            layer.pad(llm_accel.padding.to(key.device), query.shape[2])
        split = llm_accel.plan.split
        if split is not None and isinstance(layer, GroupedLayer):
            return GroupedAttention(llm_accel, split, layer, index, self.base)(module, query, key, value, kwargs), None
        key = layer.turned_keys(llm_accel.rotary, key, llm_accel.arrived_at)
        watch(llm_accel, index, (query, key, value), layer.start, kwargs)
        reply = llm_accel.plan.reply
        if reply is not None and isinstance(layer, ReplyLayer):
            return ReplyStep(llm_accel, reply, layer, kwargs).attend(self.base, module, query, key, value), None
        keeper = llm_accel.plan.keeper if index not in llm_accel.plan.skipped else None
        if keeper is None:
            if llm_accel.closing:
                layer.own_storage()
            return layer.attend(self.base, module, query, key, value, **kwargs), None
        eviction = Eviction(llm_accel, keeper, layer, index, kwargs)
        if llm_accel.flushing:
            key, value = eviction.before_attention(query, key, value)
        output = eviction.attended(query, key, value)
        if output is None:
            output = layer.attend(self.base, module, query, key, value, **kwargs)
            eviction.after_attention(query, key)
        return output, None


class AccelMask:
    """Builds no mask for our layers (their sentinel length is 0) and the base mask for everything else."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments as the mask functions of transformers."""
        length = kwargs.get("kv_length")
        if not (isinstance(length, int) and length == 0):
            return ALL_MASK_ATTENTION_FUNCTIONS[self.base](*args, **kwargs)
        if kwargs.get("use_vmap") or not kwargs.get("allow_is_causal_skip", True):
            raise UnsupportedCallError(
                "this call adds something to the causal mask (packed sequences, bidirectional image blocks); "
                "KV compression works with plain causal masks only."
            )
        return None
