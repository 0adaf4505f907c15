"""The matrix that every method passes. A new method joins with one line in ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llm_accel import H2O, RandomKV, SnapKV, StreamingLLM
from llm_accel.methods import PromptCompression, ScoreAndKeep, StepEviction
from tests.tiny import FAMILIES, left_padded, prompt

BUDGET = 24
LONG = 72
SHORT = 12
NEW = 6

METHODS: dict[str, Callable[..., ScoreAndKeep]] = {
    "snapkv": lambda **changes: SnapKV(**({"budget": BUDGET, "window": 8} | changes)),
    "h2o": lambda **changes: H2O(**({"budget": BUDGET} | changes)),
    "streaming_llm": lambda **changes: StreamingLLM(**({"budget": BUDGET} | changes)),
    "random": lambda **changes: RandomKV(**({"budget": BUDGET, "window": 8} | changes)),
}
# methods with contracts of their own, because heads of one layer hold different numbers of entries
BY_HEAD = ("retrieval_heads",)


@dataclass(frozen=True)
class Batch:
    """Token ids [B, n] and the lengths of their rows; ``mask`` is None when no row is padded."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    lengths: tuple[int, ...]

    def row(self, index: int) -> torch.Tensor:
        """One row alone, without its padding, [1, length]."""
        return self.ids[index : index + 1, self.ids.shape[1] - self.lengths[index] :]


def make_batch(shape: str, long: bool) -> Batch:
    """``single``: one row; ``padded``: three rows of different lengths, padded on the left."""
    length = LONG if long else SHORT
    if shape == "single":
        return Batch(prompt(length), None, (length,))
    lengths = (length, length // 2 + 1, length // 5 + 1)
    return Batch(*left_padded(list(lengths)), lengths)


def generate(model: PreTrainedModel, batch: Batch, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding: new token ids [B, NEW] and logits [B, NEW, vocabulary]."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(batch.ids, attention_mask=batch.mask, **(options | changes))
    return output.sequences[:, batch.ids.shape[1] :], torch.stack(output.logits, dim=1)


def slots_after(method: str, decoded: int, budget: int = BUDGET) -> int:
    """Entries stored per KV head ``decoded`` tokens after a prompt over budget."""
    config = METHODS[method]()
    return budget + (config.vacancies if isinstance(config, StepEviction) else decoded)


STEPWISE = tuple(name for name, make in METHODS.items() if isinstance(make(), StepEviction))
PROMPT_ONLY = tuple(name for name, make in METHODS.items() if isinstance(make(), PromptCompression))

every_method = pytest.mark.parametrize("method", METHODS)
every_prompt_method = pytest.mark.parametrize("method", PROMPT_ONLY)
every_stepwise_method = pytest.mark.parametrize("method", STEPWISE)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_shape = pytest.mark.parametrize("shape", ["single", "padded"])
