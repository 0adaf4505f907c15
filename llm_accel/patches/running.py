"""Rows between two tokens: a cache, and what ``generate`` would carry from call to call beside it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_accel.cache.fixed import round_up
from llm_accel.cache.linear import state_bytes
from llm_accel.cache.stock import has_linear_state
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.contrast import ContrastProcessor
from llm_accel.patches.forward import Forward, Given
from llm_accel.patches.hook import session_of
from llm_accel.patches.prefill import padded
from llm_accel.patches.rows import join_running, keep_rows, keeps_turns, kind_of
from llm_accel.report import LayerReport


class Reading:
    """Prompts on their way into a cache of their own, in one call or in chunks.

    Args:
        prompts: token ids; several only where the rows of caches can be joined.
        cache: a new one, or for one prompt a filled one that has seen the beginning of it.
        features: what a vision-language model needs beside the ids.
        joins: whether prompts may be read in chunks and caches be joined.
    """

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int]],
        cache: Any,
        features: Mapping[str, Tensor],
        joins: bool,
    ) -> None:
        model, session = forward.model, session_of(cache)
        self._forward, self._begin = forward, int(cache.get_seq_length())
        self._ids, mask = padded([torch.tensor(prompt) for prompt in prompts], None, model.device)
        self._whole = not joins or bool(features) or any(map(has_linear_state, cache.layers))
        split = None if session is None else session.plan.split
        self._steady = split is not None and split.prefill == "chunk"  # what it keeps depends on them
        if session is not None:
            session.announce(self._ids.shape[1], None)
        given = {
            name: one.to(model.device, model.dtype if one.is_floating_point() else one.dtype)
            for name, one in features.items()
        }
        self._given = forward.begin(self._ids, mask, cache, given)

    def step(self, chunk: int, most: int) -> tuple[RunningRows, Tensor] | None:
        """Reads the next chunk; after the last one the rows, and logits [B, V] for what comes next.

        Args:
            chunk: tokens of a chunk.
            most: tokens that may be read now; fewer are where the size of chunks means something to the method.
        """
        length = self._ids.shape[1]
        end = length if self._whole else min(length, self._begin + (chunk if self._steady else most))
        output = self._forward.read(self._ids, self._given, self._begin, end)
        self._begin = end
        if end < length:
            return None
        given = self._forward.next_given(output, self._given)
        return RunningRows(self._forward, given), output.logits[:, -1].float()


class RunningRows:
    """Rows that share a cache and its decode steps.

    Attributes:
        cache: keys and values of all of them.
    """

    def __init__(self, forward: Forward, given: Given) -> None:
        self._forward, self._given = forward, given

    @property
    def cache(self) -> Any:
        """Keys and values of all rows."""
        return self._given[CACHE]

    @property
    def width(self) -> int:
        """Rows of the cache."""
        return int(self._given["attention_mask"].shape[0])

    def kind(self, turns: bool) -> Hashable:
        """What must be equal in rows of one method that are to be joined; ``turns``: they are taken out again for later
        turns. None where that cannot be."""
        session = session_of(self.cache)
        if session is not None and turns and not keeps_turns(session.plan):
            return None
        return turns, kind_of(self.cache, turns)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token for each row; logits [B, V] for the next ones. A cache whose steps are compiled has rows
        beyond these, which get the last of the tokens as well."""
        filled = [*tokens, *[tokens[-1]] * (self.width - len(tokens))]
        ids = torch.tensor(filled, device=self._forward.model.device)[:, None]
        output = self._forward.step(ids, self._given)
        self._given = self._forward.next_given(output, self._given)
        logits: Tensor = output.logits[: len(tokens), -1].float()
        return logits

    @property
    def contrast(self) -> Callable[[Any, Any], Tensor] | None:
        """What a method does to the logits, if it does anything."""
        session = session_of(self.cache)
        if session is None or session.plan.decoding is None or not session.plan.decoding.contrasts:
            return None
        return ContrastProcessor(session, session.plan.decoding, self._forward.model.get_output_embeddings())

    def join(self, other: RunningRows) -> None:
        """Takes in the rows of ``other``, behind its own; nothing is left of ``other``."""
        length = max(self._length, other._length)
        own, more = self._given, other._given
        mask = own["attention_mask"]
        begins = [length + 1 - int(row.sum()) for row in (*mask, *more["attention_mask"])]
        slots = torch.arange(length + 1, device=mask.device)
        own["attention_mask"] = (slots >= slots.new_tensor(begins)[:, None]).to(mask.dtype)
        if "position_ids" in own:
            own["position_ids"] = torch.cat([own["position_ids"], more["position_ids"]], dim=-2)
        own[CACHE] = join_running(self._forward.model.get_decoder().config, [self.cache, other.cache], length)

    def keep(self, places: Sequence[int]) -> None:
        """Keeps these rows alone, which may be repeated; a compiled step sees as many as the next power of two."""
        session, wanted = session_of(self.cache), list(places)
        if session is not None and session.plan.compiles:
            wanted += wanted[-1:] * ((1 << (len(wanted) - 1).bit_length()) - len(wanted))
        if wanted == list(range(self.width)):
            return
        given = self._given
        index = torch.tensor(wanted, device=given["attention_mask"].device)
        mask = given["attention_mask"][index]
        padding = int((mask == 0).sum(-1).min())
        given["attention_mask"] = mask[:, padding:]
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"].index_select(-2, index)
        keep_rows(self.cache, wanted, padding)

    def reports(self) -> list[LayerReport]:
        """What each layer holds; empty for the model without a plug-in."""
        session = session_of(self.cache)
        return [] if session is None else session.layer_reports()

    def announce(self, tokens: int) -> None:
        """At most so many tokens will be decoded before rows come or leave, for which there will be headroom."""
        session = session_of(self.cache)
        if session is not None:
            session.headroom = round_up(max(1, tokens))
            for layer in session.ours.values():
                layer.expect(tokens)

    def taken_out(self, place: int) -> Any:
        """A cache with one row alone, for another turn; the cache itself where there is no other row."""
        if self.width == 1:
            return self.cache
        cache = join_running(self._forward.model.get_decoder().config, [self.cache], self._length, spend=False)
        keep_rows(cache, [place], int((self._given["attention_mask"][place] == 0).sum()))
        return cache

    @property
    def _length(self) -> int:
        """Tokens that the cache has seen, padding included."""
        return int(self._given["attention_mask"].shape[1]) - 1


def bytes_of(cache: Any) -> int:
    """Bytes of keys, values and linear-attention states of a cache."""
    session = session_of(cache)
    if session is not None:
        return sum(report.kv_bytes + report.state_bytes for report in session.layer_reports())
    tensors = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    kept = sum(one.untyped_storage().nbytes() for one in tensors if isinstance(one, Tensor))
    return kept + sum(map(state_bytes, cache.layers))
