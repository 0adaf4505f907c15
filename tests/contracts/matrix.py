"""The matrix that every method passes. Methods that decide which KV entries stay join by being known by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llm_accel import list_methods
from llm_accel.methods import Depth, PromptCompression, PromptView, ScoreAndKeep, StepEviction
from llm_accel.methods.base import option_names
from llm_accel.report import LayerReport, Report
from tests.tiny import FAMILIES, distinct, left_padded

BUDGET = 24
LONG = 72
SHORT = 12
NEW = 6

# options of the size of these prompts, for every method that has them
SIZES = {"window": 8, "page": 8}
# KVzip's other divisions do not say what one layer keeps; tests/contracts/test_context.py has them
OWN: dict[str, dict[str, Any]] = {"pyramidkv": {"beta": 2, "kernel": 5}, "kvzip": {"division": "layer"}}


def small(kind: type[ScoreAndKeep], **changes: Any) -> ScoreAndKeep:
    """A method with a budget below :data:`LONG`."""
    sizes = {key: size for key, size in SIZES.items() if key in option_names(kind)} | OWN.get(kind.name, {})
    return kind(**({"budget": BUDGET} | sizes | changes))


METHODS: dict[str, Callable[..., ScoreAndKeep]] = {
    name: partial(small, kind) for name, kind in list_methods().items() if issubclass(kind, ScoreAndKeep)
}
# methods that compute attention, with contracts of their own: the cache stays whole
ATTENDING = ("hip",)
# methods with contracts of their own, because heads of one layer hold different numbers of entries
BY_HEAD = ("retrieval_heads",)
# methods that keep everything
WHOLE = ("dense",)
# methods that stand for others, with contracts of their own in test_auto.py
CHOOSING = ("auto",)
# methods that act on visual tokens, with contracts of their own in tests/patches/vision
VISUAL = (
    "flowcut",
    "visionzip",
    "divprune",
    "cdpruner",
    "prunesid",
    "evs",
    "vidcom2",
    "dart",
    "fastv",
    "dyvte",
    "vasparse",
    "vhr",
    "paint",
    "var",
    "downsample",
    "stride_tokens",
    "random_tokens",
)


@dataclass(frozen=True)
class Batch:
    """Token ids [B, n] and the lengths of their rows; ``mask`` is None when no row is padded."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    lengths: tuple[int, ...]

    def row(self, index: int) -> torch.Tensor:
        """One row alone, without its padding, [1, length]."""
        return self.ids[index : index + 1, self.ids.shape[1] - self.lengths[index] :]


def make_batch(shape: str, long: bool, make: Callable[[int, int], torch.Tensor] = distinct) -> Batch:
    """``single``: one row; ``padded``: three rows of different lengths, padded on the left. ``make`` gives token ids of
    a row from its length and a seed."""
    length = LONG if long else SHORT
    if shape == "single":
        return Batch(make(length, 1), None, (length,))
    lengths = (length, length // 2 + 1, length // 5 + 1)
    return Batch(*left_padded(list(lengths), make=make), lengths)


def generate(model: PreTrainedModel, batch: Batch, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding: new token ids [B, NEW] and logits [B, NEW, vocabulary]."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(batch.ids, attention_mask=batch.mask, **(options | changes))
    return output.sequences[:, batch.ids.shape[1] :], torch.stack(output.logits, dim=1)


def acting(report: Report) -> list[tuple[LayerReport, Depth]]:
    """The layers that a method acts on and where each of them stands among them."""
    layers = [layer for layer in report.layers if layer.skipped_reason is None]
    return [(layer, Depth(rank, len(layers))) for rank, layer in enumerate(layers)]


def stored_after(method: str, decoded: int, depth: Depth, lengths: tuple[int, ...] = (LONG,)) -> int:
    """Entries stored per KV head, on average over the heads of a layer, ``decoded`` tokens after a prompt over budget;
    of the row that stores most."""
    config = METHODS[method]()
    kept = max(config.layer_entries(length, depth) for length in lengths)
    return kept + (config.empty_slots if isinstance(config, StepEviction) else decoded)


def check_stored(method: str, layer: LayerReport, entries: int) -> None:
    """``entries`` per KV head are stored: in every one, or on average where the method shares a layer out."""
    assert layer.evicted == layer.logical_length - entries
    if METHODS[method]().page_size is None:
        assert layer.physical_length == entries
    else:
        assert layer.physical_length >= entries


def check_kept(method: str, kept: torch.Tensor, entries: int) -> list[set[int]]:
    """One row, [Hk, n], keeps ``entries`` per KV head, or as many in total and no head less than what is sure; what
    it keeps in each head."""
    config = METHODS[method]()
    heads = [{position for position in head if position >= 0} for head in kept.tolist()]
    assert sum(map(len, heads)) == len(heads) * entries
    for head in heads:
        sure = min(entries, config.reserved + 1)
        assert len(head) == entries if config.page_size is None else len(head) >= sure
    return heads


def always_kept(config: ScoreAndKeep, seen: int, depth: Depth) -> set[int]:
    """Positions of a row of ``seen`` tokens that a method says it always keeps, in every head."""
    none, key = torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, seen, 4)
    stated = config.always_keep(PromptView(none, key, 1, scaling=1.0, layer=0, layers=1, depth=depth))
    return set() if stated is None else set(stated.reshape(-1, seen).all(0).nonzero()[:, 0].tolist())


def pages_held(kept: torch.Tensor, page: int, decoded: int) -> int:
    """Pages that heads with ``kept`` entries each, [B, Hk], hold after decoding: as many as the entries fill, then one
    for every head whenever there is none left."""

    def filled(step: int) -> int:
        return sum(-(-(entries + step) // page) for entries in kept.flatten().tolist())

    pages = filled(0)
    for step in range(1, decoded + 1):
        pages = pages + kept.numel() if filled(step) > pages else pages
    return pages


STEPWISE = tuple(name for name, make in METHODS.items() if isinstance(make(), StepEviction))
PROMPT_ONLY = tuple(name for name in METHODS if name not in STEPWISE)
# of these, those that may also evict later, or in later turns
AGAIN = tuple(name for name, make in METHODS.items() if isinstance(make(), PromptCompression))

every_method = pytest.mark.parametrize("method", METHODS)
every_prompt_method = pytest.mark.parametrize("method", PROMPT_ONLY)
every_method_that_cuts_again = pytest.mark.parametrize("method", AGAIN)
every_stepwise_method = pytest.mark.parametrize("method", STEPWISE)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_shape = pytest.mark.parametrize("shape", ["single", "padded"])
