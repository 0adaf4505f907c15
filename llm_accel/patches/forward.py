"""Calls of the model, prepared as ``generate`` prepares them, but one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from llm_accel.patches.cache_name import CACHE

Given = dict[str, Any]  # what goes with the ids of a batch: cache, mask, positions, features of images

# Bytes of weights that lie in a processor's cache: a decode step that reads no more of them is over sooner than several
# threads have shared it out, and each waits at every operation for a core that the event loop or a client may hold.
_LIGHT = 64 * 2**20

# What the model's own generation settings may hold beside sampling, which is each request's own.
_PLAIN = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "max_length": None,
    "min_length": 0,
    "use_cache": True,
    "eos_token_id": None,  # which tokens end a row is the row's own affair
}


class Forward:
    """The calls of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        taken = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in taken
        self._constant = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in taken else {})
        self._ruled = bool(self.rules(1, always=True))
        weights = sum(weight.nbytes for weight in model.parameters())
        self._light = model.device.type == "cpu" and weights <= _LIGHT

    def rules(self, length: int, always: bool = False) -> LogitsProcessorList:
        """What the model's own generation settings do to the logits after a prompt of ``length`` tokens."""
        if not always and not self._ruled:
            return LogitsProcessorList()
        config, _ = self.model._prepare_generation_config(None, **_PLAIN)
        self.model._prepare_special_tokens(config, True, device=self.model.device)
        rules: LogitsProcessorList = self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=length,
            logits_processor=LogitsProcessorList(),
            device=self.model.device,
            model_kwargs={},
        )
        return rules

    def begin(self, ids: Tensor, mask: Tensor, cache: Any, features: Given) -> Given:
        """What goes with prompts, int64 [B, n], padded on the left where ``mask`` is 0."""
        for holder in (self.model, self.model.base_model):
            if getattr(holder, "rope_deltas", None) is not None:
                holder.rope_deltas = None  # those of another request's image
        given = {"attention_mask": mask, CACHE: cache, **self._constant, **features}
        if self._positions:
            given["position_ids"] = self.model._prepare_position_ids_for_generation(ids, given)
        return given

    def read(self, ids: Tensor, given: Given, begin: int, end: int) -> Any:
        """The model's output for tokens ``begin`` to ``end`` of the prompts."""
        given = given | {"attention_mask": given["attention_mask"][:, :end]}
        if self._positions:
            given["position_ids"] = given["position_ids"][..., begin:end]
        return self._call(ids[:, begin:end], given, is_first_iteration=True)

    def step(self, tokens: Tensor, given: Given) -> Any:
        """The model's output for the newest token of each row, int64 [B, 1]."""
        with _one_thread(self._light):
            return self._call(tokens, given, next_sequence_length=1)

    def next_given(self, output: Any, given: Given) -> Given:
        """What goes with the next tokens, after a call that has brought this output."""
        given = self.model._update_model_kwargs_for_generation(output, given)
        if self._positions:
            given["position_ids"] = given["position_ids"][..., -1:]
        return given

    @torch.no_grad()
    def _call(self, ids: Tensor, given: Given, **how: Any) -> Any:
        inputs = self.model.prepare_inputs_for_generation(ids, **how, **given)
        return self.model(**inputs, return_dict=True)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
