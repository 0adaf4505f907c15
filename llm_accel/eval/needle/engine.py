"""Runs one batch of prompts through ``generate`` and measures it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from llm_accel.eval.needle.prompts import Prompt
from llm_accel.methods import MethodConfig


class Report(Protocol):
    """What a run reads from a handle's report, in bytes of the whole batch."""

    @property
    def kv_bytes(self) -> int: ...
    @property
    def dense_kv_bytes(self) -> int: ...


class Handle(Protocol):
    """What a run needs of :class:`llm_accel.Handle`."""

    def report(self) -> Report: ...
    def remove(self) -> None: ...
    def new_cache(self) -> Any: ...


Apply = Callable[[Any, MethodConfig], Handle]


def apply_plugin(model: Any, config: MethodConfig) -> Handle:
    """The real thing; imported late, so that prompts and plots need no plug-in."""
    from llm_accel.api import apply

    handle: Handle = apply(model, method=config)
    return handle


@dataclass(frozen=True)
class Outcome:
    """One batch.

    Attributes:
        answers: generated ids per row, up to the end token.
        kv_bytes: bytes that the cache holds after generation, per row.
        dense_kv_bytes: bytes that the dense model would hold, per row.
        prefill_ms: until the first token, for the batch; query-agnostic: context and question together.
        decode_ms: mean time of a decode step after the first token, for the batch; None without such a step.
    """

    answers: list[list[int]]
    kv_bytes: int
    dense_kv_bytes: int
    prefill_ms: float
    decode_ms: float | None


class _Clock(StoppingCriteria):
    """Notes the time after every token; never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ticks.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Engine:
    """A model with its end tokens, and one method at a time on it."""

    def __init__(
        self, model: Any, tokenizer: Any, max_new_tokens: int, query_agnostic: bool, apply: Apply = apply_plugin
    ) -> None:
        self.model, self.max_new_tokens, self.query_agnostic, self._apply = model, max_new_tokens, query_agnostic, apply
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list | tuple) else [ends]
        self.ends = {int(i) for i in (*ends, getattr(tokenizer, "eos_token_id", None)) if i is not None}
        pad = getattr(tokenizer, "pad_token_id", None)
        self._options: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "num_beams": 1,
            "pad_token_id": pad if pad is not None else min(self.ends, default=0),
            "eos_token_id": sorted(self.ends) or None,
            "return_dict_in_generate": True,
        }

    def run(self, prompts: Sequence[Prompt], config: MethodConfig | None) -> Outcome:
        """Answers of prompts of one length. The method is on the model during this call only."""
        if config is None:
            return self._measure(prompts, None)
        handle = self._apply(self.model, config)
        try:
            return self._measure(prompts, handle)
        finally:
            handle.remove()

    def try_method(self, config: MethodConfig) -> None:
        """Applies and removes, so that what cannot work is known before a run begins."""
        self._apply(self.model, config).remove()

    def _measure(self, prompts: Sequence[Prompt], handle: Handle | None) -> Outcome:
        ids = torch.tensor([prompt.ids for prompt in prompts], device=self.model.device)
        clock = _Clock(ids.device)
        begin = clock.now()
        cache: Any = None
        if self.query_agnostic:  # one new token feeds the context and nothing more
            (context,) = {prompt.context_length for prompt in prompts}
            cache = DynamicCache(config=self.model.config) if handle is None else handle.new_cache()
            self._generate(ids[:, :context], cache, 1)
        output = self._generate(ids, cache, self.max_new_tokens, StoppingCriteriaList([clock]))
        steps = len(clock.ticks) - 1
        if handle is None:
            held = dense = cache_bytes(output.past_key_values)
        else:
            report = handle.report()
            held, dense = report.kv_bytes, report.dense_kv_bytes
        return Outcome(
            answers=[self._cut(row) for row in output.sequences[:, ids.shape[1] :].tolist()],
            kv_bytes=held // len(prompts),
            dense_kv_bytes=dense // len(prompts),
            prefill_ms=1e3 * (clock.ticks[0] - begin),
            decode_ms=1e3 * (clock.ticks[-1] - clock.ticks[0]) / steps if steps else None,
        )

    def _generate(self, ids: Tensor, cache: Any, new_tokens: int, stop: StoppingCriteriaList | None = None) -> Any:
        given = {} if cache is None else {"past_key_values": cache}
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            stopping_criteria=stop,
            **given,
            **self._options,
        )

    def _cut(self, row: list[int]) -> list[int]:
        """Generated ids before the first end token."""
        stop = next((i for i, token in enumerate(row) if token in self.ends), len(row))
        return row[:stop]


def cache_bytes(cache: Any) -> int:
    """Bytes of the storage that a stock cache's keys and values hold, each storage counted once."""
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
