"""A cache whose prompt has been read before ``generate`` begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llm_accel.cache.attention import Attention
from llm_accel.cache.autograd_modes import thawed
from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.vision.state import VisualState


class ReadCache(DynamicCache):
    """A cache that holds a prompt, and what the decoder said after its last token.

    ``generate`` always computes at least one token of the prompt itself. So the cache counts one token less until it
    has been given the last one, for which the decoder then returns what it had returned when the prompt was read.

    Attributes:
        ids: token ids of the prompt, padded on the left, int64 [B, n].
        mask: 1 for tokens and 0 for padding, int64 [B, n].
        outcome: the decoder's output for the last token, [B, 1, hidden]; None once it has been handed over.
    """

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.ids, self.mask = ids, mask
        self.outcome: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What ``model.generate(**cache.inputs)`` continues from."""
        return {"input_ids": thawed(self.ids), "attention_mask": thawed(self.mask), CACHE: self}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length, without the token that is still to be given."""
        return int(super().get_seq_length(layer_idx)) - (self.outcome is not None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders rows, for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the given rows."""
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def reset(self) -> None:
        """Forgets everything; the cache can be filled again."""
        DynamicCache.reset(self)
        self.outcome = None

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.ids, self.mask = change(self.ids), change(self.mask)
        self.outcome = None if self.outcome is None else change(self.outcome)


class Replay(DynamicCache):
    """What the decoder is given in place of cache and session for the last token of a prompt that was read before: it
    computes something on an empty cache, which :meth:`hand_over` replaces."""

    def __init__(self, cache: ReadCache, config: Any) -> None:
        super().__init__(config=config)
        self.cache = cache
        self.visual = VisualState()

    def attend(self, index: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one token to itself, [B, 1, Hq, Dv]."""
        return attention.dense(query, key, value, None)

    def hand_over(self, output: Any) -> None:
        """Puts what was remembered in place of what was computed."""
        assert self.cache.outcome is not None
        output.last_hidden_state, self.cache.outcome = thawed(self.cache.outcome), None
        setattr(output, CACHE, self.cache)


def replayed(cache: ReadCache, decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which the decoder computes the last token of a prompt that ``cache`` holds already.

    Raises:
        UnsupportedCallError: the call brings anything but that token, or asks for more than its output.
    """
    _check(cache, decoder, kwargs)
    replay = Replay(cache, decoder.config)
    return kwargs | {CACHE: replay, "llm_accel": replay, "attention_mask": None}


def _check(cache: ReadCache, decoder: Any, kwargs: dict[str, Any]) -> None:
    ids: Any = kwargs.get("input_ids")
    mask, embedded, (rows, length) = kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), cache.ids.shape
    given = (ids if embedded is None else embedded).shape
    if given[0] != rows:
        raise UnsupportedCallError(
            f"this cache holds {rows} prompts, the call has {given[0]} rows; for several rows per prompt call "
            "cache.batch_repeat_interleave(n) first."
        )
    last = None if ids is None or ids.shape[1] != 1 else ids.to(cache.ids.device)
    same = last is not None and torch.equal(last, cache.ids[:, -1:])
    if not same or (mask is not None and mask.shape[1] != length):
        raise UnsupportedCallError(
            f"this cache holds prompts that were read up to their last token ({length} tokens, padding included), and "
            "this call continues with something else; call model.generate(**cache.inputs, ...) first."
        )
    for name in ("output_hidden_states", "output_router_logits"):
        if wants(kwargs, decoder, name):
            raise UnsupportedCallError(
                f"{name} needs what the layers computed for the prompt, which handle.prefill does not keep; leave it "
                "out, or read the prompt with model.generate."
            )


def wants(kwargs: dict[str, Any], decoder: Any, name: str) -> bool:
    """Whether a call of the decoder asks for an output, itself or through the configuration."""
    wanted = kwargs.get(name)
    return bool(getattr(decoder.config, name, False) if wanted is None else wanted)


def is_waiting(cache: Any) -> TypeGuard[ReadCache]:
    """Whether this cache holds a prompt whose last output has not been handed over."""
    return isinstance(cache, ReadCache) and cache.outcome is not None
