"""Calls of generate whose new tokens are given, so that two models are asked the same whatever they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tests.tiny import left_padded, prompt

LENGTH = 60
LENGTHS = (LENGTH, 41, 13)
NEW = 4
QUESTION = 7
ANSWER = 2


@dataclass(frozen=True)
class Prompt:
    """Rows to ask.

    Attributes:
        ids: token ids [B, n], padded on the left.
        mask: int [B, n], None for rows without padding.
        lengths: real tokens of each row.
        extra: what else the first call gets, such as the images.
        rows: the rows alone; empty where there is nothing else to them than their tokens.
    """

    ids: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Prompt, ...] = ()

    def row(self, index: int) -> Prompt:
        """One row alone, without its padding."""
        if self.rows:
            return self.rows[index]
        length = self.lengths[index]
        return Prompt(self.ids[index : index + 1, self.width - length :], None, (length,))

    def more_padded(self, count: int) -> Prompt:
        """The same rows behind ``count`` more tokens of padding."""
        padded = {
            name: F.pad(value, (count, 0)) if isinstance(value, Tensor) and value.shape == self.ids.shape else value
            for name, value in self.extra.items()
        }
        mask = torch.ones_like(self.ids) if self.mask is None else self.mask
        return replace(self, ids=F.pad(self.ids, (count, 0)), mask=F.pad(mask, (count, 0)), extra=padded)

    @property
    def width(self) -> int:
        return self.ids.shape[1]


def padded() -> Prompt:
    """Three rows, the first the longest."""
    return Prompt(*left_padded(list(LENGTHS), seed=3), LENGTHS)


class Forced(LogitsProcessor):
    """Makes generate go on with the given tokens [B, n]; ``after`` runs after each call of the model."""

    def __init__(self, tokens: Tensor, after: Callable[[int], None] | None) -> None:
        self.tokens = tokens
        self.after = after
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.after is not None:
            self.after(self.step)
        forced = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return forced


def forced(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, new: int, after: Callable[[int], None] | None, **more: Any
) -> tuple[Tensor, Any, Tensor]:
    """Logits [B, new, vocabulary], the cache and all ids so far."""
    tokens = prompt(new, seed=77).expand(ids.shape[0], new)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        logits_processor=LogitsProcessorList([Forced(tokens, after)]),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )
    return torch.stack(output.logits, 1), output.past_key_values, output.sequences


def two_turns(
    model: PreTrainedModel, batch: Prompt, after: Callable[[int], None] | None = None, turns: int = 2, **more: Any
) -> Tensor:
    """Logits [B, NEW + ANSWER, vocabulary] of an answer, and of an answer to a question on the same cache. ``after``
    gets the number of the call, which goes on counting in the second turn."""
    logits, cache, ids = forced(model, batch.ids, batch.mask, NEW, after, **batch.extra, **more)
    if turns == 1:
        return logits
    question = prompt(QUESTION, seed=7, batch=ids.shape[0])
    history = torch.cat([ids, question], 1)
    mask = None
    if batch.mask is not None:
        mask = torch.nn.functional.pad(batch.mask, (0, history.shape[1] - batch.width), value=1)

    def later(step: int) -> None:
        if after is not None:
            after(NEW + step)

    second, _, _ = forced(model, history, mask, ANSWER, later, past_key_values=cache)
    return torch.cat([logits, second], 1)


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference of two logits, relative to the largest reference logit; infinite where ours is not finite."""
    if ours.shape != reference.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-6))
