"""Forward pre-hooks above the decoder: which tokens are visual, and calls that cannot be right."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.hook import DecoderHook, named


class VisualMaskHook:
    """Pre-hook of the model above the decoder: tells the decoder which tokens are visual, as ``llm_accel_visual``."""

    def __init__(self, hook: DecoderHook, token_ids: tuple[int, ...]) -> None:
        self.hook = hook
        self.token_ids = token_ids

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Adds bool [B, T] where the call brings token ids."""
        ids = named(type(model).forward, args, kwargs).get("input_ids")
        if ids is None or not self.hook.enabled:
            return args, kwargs
        # number by number: a tensor of them would be copied to the device at each step
        visual = reduce(or_, (ids == token for token in self.token_ids))
        return args, kwargs | {"llm_accel_visual": visual}


class LabelsHook:
    """Pre-hook of the whole model: refuses what dropped tokens would make wrong."""

    def __init__(self, hook: DecoderHook) -> None:
        self.hook = hook

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises :class:`UnsupportedCallError` for labels."""
        labels = named(type(model).forward, args, kwargs).get("labels")
        if labels is not None and self.hook.enabled and not model.training:
            raise UnsupportedCallError(
                f"labels have one entry per token, but {self.hook.plan.title} takes visual tokens out; compute the "
                "loss inside handle.disabled()."
            )
