"""What runs share that call ``generate``: greedy decoding, its times, and what the cache holds afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from llm_accel.api import Handle
from llm_accel.patches.cache_name import CACHE


class Clock(StoppingCriteria):
    """Notes the time after every token.

    Args:
        stop_after: tokens after which generation stops; None: never.
        lap: called after the first token, once its time is noted.

    Attributes:
        ticks: seconds at each token.
        lap_s: seconds that ``lap`` took, which lie between the first two ticks.
    """

    def __init__(
        self, device: torch.device, stop_after: int | None = None, lap: Callable[[], object] | None = None
    ) -> None:
        self.device, self.stop_after, self._lap = device, stop_after, lap
        self.ticks: list[float] = []
        self.lap_s = 0.0

    def now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ticks.append(self.now())
        if self._lap is not None and len(self.ticks) == 1:
            self._lap()
            self.lap_s = self.now() - self.ticks[0]
        return torch.full(input_ids.shape[:1], len(self.ticks) == self.stop_after, device=input_ids.device)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return {int(i) for i in (*ends, getattr(tokenizer, "eos_token_id", None)) if i is not None}


def greedy(ends: Collection[int], tokenizer: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for greedy decoding, whatever the model's own generation settings are."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "num_beams": 1,
        "pad_token_id": pad if pad is not None else min(ends, default=0),
        "eos_token_id": sorted(ends) or None,
        "return_dict_in_generate": True,
    }


def cut(row: Sequence[int], ends: Collection[int]) -> list[int]:
    """Generated ids before the first end token."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])


def held_bytes(output: Any, handle: Handle | None) -> tuple[int, int]:
    """Bytes that the cache of a ``generate`` call holds, and those of a dense cache of the same length; for the whole
    batch. ``handle``: of the plug-in on the model, if any."""
    if handle is None:
        held = cache_bytes(getattr(output, CACHE))
        return held, held
    return reported_bytes(handle)


def reported_bytes(handle: Handle) -> tuple[int, int]:
    """Bytes that the cache of the last call holds now, and those of a dense cache of the same length."""
    report = handle.report()
    return report.kv_bytes, report.dense_kv_bytes


def cache_bytes(cache: Any) -> int:
    """Bytes of the storage that a stock cache's keys and values hold, each storage counted once."""
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
