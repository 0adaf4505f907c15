"""Runs one batch of text prompts through ``generate`` and measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from llm_accel.api import Handle, apply
from llm_accel.common.generation import Clock, cut, end_tokens, greedy, held_bytes, reported_bytes
from llm_accel.methods import Dense, MethodConfig
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.recording import Recording


class TokenPrompt(Protocol):
    """What the engine needs of a prompt: its ids, how many of them precede the question, how many may follow."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def context_length(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...


@dataclass(frozen=True)
class TextOutcome:
    """One batch."""

    answers: list[list[int]]  # generated ids per row, up to the end token
    kv_bytes: int  # bytes that the cache holds after generation, per row
    dense_kv_bytes: int  # bytes that the dense model would hold, per row
    # until the first token, for the batch; query-agnostic: context and question together. Of a shared prefill, each
    # method's own: the reading that they share counts whole for each of them; None where the engine does not say
    prefill_ms: float | None
    decode_ms: float | None  # mean time of a decode step of the batch; None without a step after the first token
    prompt_bytes: tuple[int, int] | None = None  # held once the answer begins, and by the dense model then, per row


class TextEngine:
    """A text model with its end tokens, and one method at a time applied to it.

    Args:
        shared: methods that evict at the end of the prompt, and the dense model, get prompts that one prefill has read
            for all of them. The latest batch is remembered, with its whole cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        query_agnostic: bool,
        apply: Callable[..., Handle] = apply,
        shared: bool = False,
    ) -> None:
        self.model, self.query_agnostic, self._apply, self._shared = model, query_agnostic, apply, shared
        self.ends = end_tokens(model, tokenizer)
        self._options = greedy(self.ends, tokenizer)
        self._recording: tuple[Recording, float] | None = None

    def run(self, prompts: Sequence[TokenPrompt], configs: Sequence[MethodConfig]) -> TextOutcome:
        """Answers to prompts of equal length and new tokens. The methods stay on the model for this call only."""
        if not configs and self._shared:
            configs = (Dense(),)
        with self._apply(self.model, list(configs)) if configs else nullcontext() as handle:
            return self._measure(prompts, handle, any(not isinstance(config, Dense) for config in configs))

    def try_method(self, configs: Sequence[MethodConfig]) -> None:
        """Applies and removes, so that what cannot work is known before a run begins."""
        self._apply(self.model, list(configs)).remove()

    def _measure(self, prompts: Sequence[TokenPrompt], handle: Handle | None, compressed: bool) -> TextOutcome:
        ids = torch.tensor([prompt.ids for prompt in prompts], device=self.model.device)
        begun: list[tuple[int, int]] = []
        lap = (lambda: begun.append(reported_bytes(handle))) if handle is not None and compressed else None
        clock = Clock(ids.device, lap=lap)
        (context,) = {prompt.context_length if self.query_agnostic else len(prompt.ids) for prompt in prompts}
        recorded = self._recorded(ids[:, :context], handle, clock)
        begin = clock.now()
        cache: Any = None
        if recorded is not None and handle is not None:
            cache = handle.resume(recorded[0])
            begin -= recorded[1]
        if self.query_agnostic:  # one new token feeds the context and nothing more
            if cache is None:
                cache = DynamicCache(config=self.model.config) if handle is None else handle.new_cache()
            self._generate(ids[:, :context], cache, 1)
        output = self._generate(ids, cache, prompts[0].new_tokens, StoppingCriteriaList([clock]))
        steps = len(clock.ticks) - 1
        held, dense = held_bytes(output, handle)
        at_answer = (begun[0][0] // len(prompts), begun[0][1] // len(prompts)) if begun else None
        return TextOutcome(
            answers=[cut(row, self.ends) for row in output.sequences[:, ids.shape[1] :].tolist()],
            kv_bytes=held // len(prompts),
            dense_kv_bytes=dense // len(prompts),
            prefill_ms=1e3 * (clock.ticks[0] - begin),
            decode_ms=1e3 * (clock.ticks[-1] - clock.ticks[0] - clock.lap_s) / steps if steps else None,
            prompt_bytes=at_answer,
        )

    def _recorded(self, ids: Tensor, handle: Handle | None, clock: Clock) -> tuple[Recording, float] | None:
        """What one prefill of these prompts has left and the seconds that it took; None where the method reads them
        itself."""
        if not self._shared or handle is None or not handle.can_resume:
            return None
        if self._recording is None or not torch.equal(self._recording[0].ids, ids):
            self._recording, begin = None, clock.now()  # memory is free before the next prompt is read
            recording = handle.record(ids)
            self._recording = recording, clock.now() - begin
        return self._recording

    def _generate(self, ids: Tensor, cache: Any, new_tokens: int, stop: StoppingCriteriaList | None = None) -> Any:
        given = {} if cache is None else {CACHE: cache}
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            stopping_criteria=stop,
            **given,
            **self._options,
        )
