"""A prompt that is read once for several methods: what each of them chooses from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from llm_accel.cache.stock import is_full
from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.context import Context


class Recalled(ModelAttention):
    """The attention of a layer whose output has been computed before, by a model that goes on from there."""

    def dense(self, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
        """Nothing, [B, 0, Hq, Dv]."""
        return value.new_empty(query.shape[0], 0, query.shape[1], value.shape[-1])


class Recording(DynamicCache):
    """The whole cache of a prompt, and what the methods of :func:`~llm_accel.patches.shared_prefill.resume` look at.

    Attributes:
        ids, mask: the prompt, int64 [B, n], padded on the left.
        decoder: the decoder that reads it.
        queries: of each layer with full attention all queries, post-RoPE, [B, Hq, n, D].
        attentions: how each of these layers computed its attention.
        context: the tokens as the decoder was given them.
        outcome: the decoder's output for the last token, [B, 1, hidden]; None until the prompt has been read.
    """

    def __init__(self, ids: Tensor, mask: Tensor, decoder: Any) -> None:
        super().__init__(config=decoder.config)
        self.ids, self.mask, self.decoder = ids, mask, decoder
        padding = (mask == 0).sum(-1)
        self.start = padding if bool(padding.any()) else None
        self.queries: dict[int, Tensor] = {}
        self.attentions: dict[int, Recalled] = {}
        self.context = Context()
        self.outcome: Tensor | None = None

    def begin(self, tokens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments with which the decoder reads the prompt.

        Raises:
            UnsupportedCallError: it comes in chunks.
        """
        if tokens.shape[1] != self.ids.shape[1]:
            raise UnsupportedCallError(
                f"{tokens.shape[1]} tokens of a prompt of {self.ids.shape[1]} come alone, and a recording takes a "
                "prompt in one call; leave prefill_chunk_size out."
            )
        self.context.add(tokens, kwargs)
        return kwargs | {"llm_accel": self}

    def attend(
        self, attention: ModelAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Dense attention of one layer, [B, T, Hq, Dv]."""
        index: Any = getattr(attention.module, "layer_idx", None)
        if not is_full(self.layers[index]):
            return attention.plain(query, key, value, mask)
        self.queries[index] = query
        self.attentions[index] = Recalled(attention.base, attention.module, attention.kwargs)
        return attention.dense(query, key, value, self.start)
