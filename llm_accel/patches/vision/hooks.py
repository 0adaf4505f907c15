"""Forward pre-hooks above the decoder: which tokens are visual, and calls that cannot be right."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.cache_name import named
from llm_accel.patches.hook import DecoderHook
from llm_accel.patches.vision.watch import FEATURES, MARKS, SHOWN, TowerMarks


class VisualMaskHook:
    """Pre-hook of the model above the decoder: tells the decoder which tokens are visual, as ``llm_accel_visual``."""

    def __init__(self, hook: DecoderHook, token_ids: tuple[int, ...]) -> None:
        self.hook = hook
        self.token_ids = token_ids

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Adds bool [B, T] where the call brings token ids, or embeddings among which placeholders stand."""
        call = named(type(model).forward, args, kwargs)
        ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
        if not self.hook.enabled or (ids is None and embeddings is None):
            return args, kwargs
        # number by number: a tensor of them would be copied to the device at each step
        kinds = [_stand_for(token, model, ids, embeddings) for token in self.token_ids]
        visual = reduce(or_, kinds)
        if ids is None and not bool(visual.any()):
            return args, kwargs  # perhaps there are features in their places
        told: dict[str, Any] = {"llm_accel_visual": visual}
        if self.hook.plan.reads_tower:
            told[MARKS] = marks = TowerMarks(dict(zip(FEATURES, kinds, strict=False)))
            marks.add_encoded(call.get("mm_encoder_outputs"))
            SHOWN.set(marks)
        return args, kwargs | told


def _stand_for(token: int, model: Any, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """bool [B, T]: which tokens are this one."""
    if ids is not None:
        return ids == token
    assert embeddings is not None
    embedding = model.get_input_embeddings()
    own = embedding(torch.full((1,), token, device=embedding.weight.device))
    same: Tensor = embeddings == own.to(embeddings.device)
    return same.all(-1)


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
