"""Watches the attention of a stock model: post-RoPE queries and keys of every layer, for any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from llm_accel.errors import AlreadyAppliedError, UnsupportedModelError
from llm_accel.patches.base_attention import SUPPORTED, base_function, softmax_of
from llm_accel.patches.wiring import wiring_of

_PREFIX = "llm_accel_probe_"


@dataclass(frozen=True)
class Observed:
    """One attention call, before it is computed.

    Attributes:
        layer: index of the layer.
        query: [B, Hq, T, D], post-RoPE.
        key: [B, H, S, D], post-RoPE, the newest T entries last.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits [Hq], or None.
        sliding_window: tokens that the layer sees, or None where it sees everything.
    """

    layer: int
    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    sliding_window: int | None


Callback = Callable[[Observed], None]


class _ProbeAttention:
    """Calls the callback that came down with the call, then the base implementation."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        llm_accel_probe: Callback | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments as the attention functions of transformers."""
        index = getattr(module, "layer_idx", None)
        if llm_accel_probe is not None and index is not None:
            softmax = softmax_of(kwargs, query.shape[-1])
            llm_accel_probe(Observed(index, query, key, sliding_window=kwargs.get("sliding_window"), **softmax))
        return base_function(module, self.base)(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def observe_attention(model: Any, callback: Callback) -> Iterator[None]:
    """Calls ``callback`` before each attention of ``model`` inside; outputs and masks are those of the stock model. A
    model on FlashAttention runs SDPA meanwhile, whose mask function builds what a probe can pass on.

    Raises:
        AlreadyAppliedError: a plug-in is on the model.
        UnsupportedModelError: its attention cannot be watched.
    """
    decoder = model.get_decoder()
    config, before = decoder.config, decoder.config._attn_implementation
    if before.startswith("llm_accel"):
        raise AlreadyAppliedError(f"{type(model).__name__} runs a plug-in; call llm_accel.remove(model) first.")
    if before not in SUPPORTED:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs attn_implementation={before!r}, which cannot be watched; "
            f"supported: {', '.join(SUPPORTED)}."
        )
    problem = wiring_of(decoder).problem
    if problem is not None:
        raise UnsupportedModelError(f"the attention of {type(model).__name__} cannot be watched: {problem}.")
    base = "sdpa" if before.startswith("flash") else before
    AttentionInterface.register(_PREFIX + base, _ProbeAttention(base))
    AttentionMaskInterface.register(_PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])

    def hand_down(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"llm_accel_probe": callback}

    hook = decoder.register_forward_pre_hook(hand_down, with_kwargs=True)
    config._attn_implementation_internal = _PREFIX + base
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        hook.remove()
