"""Calls that the tests of the patches share: one method, one padded batch, and what a model looks like from outside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import Handle
from tests.tiny import left_padded

BUDGET = 24
WINDOW = 8
NEW = 4
IDS, MASK = left_padded([60, 41])


def snapkv(model: PreTrainedModel, **changes: Any) -> Handle:
    """SnapKV with a budget that every prompt here exceeds."""
    keywords = {name: changes.pop(name) for name in ("trace", "strict") if name in changes}
    return llm_accel.apply(model, "snapkv", **keywords, **({"budget": BUDGET, "window": WINDOW} | changes))


def logits_of(
    model: PreTrainedModel, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK, **more: Any
) -> torch.Tensor:
    """Logits [B, NEW, vocabulary] of greedy decoding."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(ids, attention_mask=mask, **(options | more)).logits, dim=1)


@dataclass(frozen=True)
class Outside:
    """Everything of a model that the plug-in could leave traces in."""

    attributes: frozenset[str]
    config: dict[str, Any]
    implementation: str
    hooks: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Outside:
        hooks = [
            len(registry)
            for part in model.modules()
            for registry in (
                part._forward_pre_hooks,
                part._forward_hooks,
                part._forward_pre_hooks_with_kwargs,
                part._forward_hooks_with_kwargs,
            )
        ]
        return cls(
            frozenset(model.__dict__) | frozenset(model.get_decoder().__dict__),
            copy.deepcopy(model.config.to_dict()),
            getattr(model.get_decoder(), "config", model.config)._attn_implementation,
            tuple(hooks),
        )


@contextmanager
def failing_once(layer: torch.nn.Module) -> Iterator[None]:
    """Inside, a call that reaches ``layer`` fails there, and that failure is what comes out."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    hook = layer.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            yield
    finally:
        hook.remove()
