"""Our attention and mask functions, registered once per base implementation under a neutral name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import PromptView, ScoreAndKeep
from llm_accel.patches.base_attention import attend, base_function
from llm_accel.patches.cache import AccelLayer
from llm_accel.patches.session import Session

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
        llm_accel: Session | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, Hq, T, D], key and value [B, H, P, D] post-RoPE -> [B, T, Hq, Dv]."""
        index = getattr(module, "layer_idx", None)
        layer = llm_accel.layers[index] if llm_accel is not None and index is not None else None
        if llm_accel is None or not isinstance(layer, AccelLayer):
            return base_function(module, self.base)(module, query, key, value, attention_mask, **kwargs)
        layer.attended = True
        if not layer.compressed and llm_accel.padding is not None:
            layer.start = llm_accel.padding.to(key.device)
        keeper = llm_accel.plan.keeper if index not in llm_accel.plan.skipped else None
        if keeper is None:
            if llm_accel.closing:
                layer.own_storage()
            return attend(self.base, module, query, key, value, layer.start, **kwargs), None
        eviction = _Eviction(llm_accel, keeper, layer, int(module.layer_idx), kwargs)
        if llm_accel.flushing:
            key, value = eviction.before_attention(query, key, value)
        output = attend(self.base, module, query, key, value, layer.start, **kwargs)
        eviction.after_attention(query, key)
        return output, None


class _Eviction:
    """Scores and evicts the entries of one layer within one attention call."""

    def __init__(
        self, session: Session, keeper: ScoreAndKeep, layer: AccelLayer, index: int, kwargs: dict[str, Any]
    ) -> None:
        self.session, self.keeper, self.layer, self.index, self.kwargs = session, keeper, layer, index, kwargs

    def before_attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Deferred compression: evicts from the prompt, keeps the new token, returns what attention may see."""
        prompt = key.shape[2] - query.shape[2]
        if not self._over_budget(prompt):
            self.layer.window = None
            return key, value
        kept = self._select(self.layer.window, key[:, :, :prompt])
        newest = torch.arange(prompt, key.shape[2], device=kept.device).expand(*kept.shape[:2], -1)
        kept = torch.cat([kept, newest], dim=-1)
        slots = kept.clamp(min=0).repeat_interleave(key.shape[1] // kept.shape[1], dim=1)[..., None]
        key = key.gather(2, slots.expand(-1, -1, -1, key.shape[-1]))
        value = value.gather(2, slots.expand(-1, -1, -1, value.shape[-1]))
        self.layer.keep(kept, self.session.plan.trace)
        return key, value

    def after_attention(self, query: Tensor, key: Tensor) -> None:
        """Eager compression when the prompt is complete; until then remembers the queries that will score."""
        width = self.keeper.observed_queries
        if not self.session.closing:
            if width and self.session.observing:
                self.layer.observe(query, width)
            return
        if not self._over_budget(key.shape[2]):
            self.layer.window = None
            self.layer.own_storage()
            return
        if width and self.layer.window is not None:
            self.layer.observe(query, width)
            query = self.layer.window
        self.layer.keep(self._select(query, key), self.session.plan.trace)

    def _over_budget(self, slots: int) -> bool:
        if self.layer.compressed and self.keeper.multi_turn == "append":
            return False
        return self.keeper.entries(slots) < slots

    @torch.no_grad()
    def _select(self, query: Tensor | None, key: Tensor) -> Tensor:
        width = self.keeper.observed_queries
        observed = key[:, :, :0] if query is None else query[:, :, -width:] if width else query[:, :, :0]
        scaling = self.kwargs.get("scaling")
        return self.keeper.select(
            PromptView(
                query=observed,
                key=key,
                kv_heads=self.layer.keys.shape[1],
                start=self.layer.start,
                scaling=key.shape[-1] ** -0.5 if scaling is None else scaling,
                softcap=self.kwargs.get("softcap"),
                sinks=self.kwargs.get("s_aux"),
                layer=self.index,
                layers=self.session.plan.layers,
                protected=self.session.protected_slots(self.layer, key.shape[2]),
            )
        )


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
