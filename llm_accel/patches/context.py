"""A context that the model reads a second time, so that its entries can be scored, before all layers evict together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from llm_accel.cache import AccelLayer
from llm_accel.cache.attention import Softmax
from llm_accel.cache.linear import beside_state, restore_states, states_of
from llm_accel.cache.stock import has_linear_state
from llm_accel.errors import EvictionError, UnsupportedCallError
from llm_accel.methods import ContextCompression, Lead, PassView
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.pass_attention import attend_in_pieces

if TYPE_CHECKING:
    from llm_accel.patches.session import Session

Scores = tuple[dict[int, Tensor], dict[int, Softmax]]

_PER_CALL = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")


class Context:
    """The tokens of a prompt, kept until its entries have been scored.

    Attributes:
        parts: of each call token ids, int64 [B, T], or what stands for them, [B, T, hidden].
        position: position of the last token, as the model was given it, [..., B, 1]; None: it counts them itself.
        scores: what reading it again has shown, by the method without its budget and what leads to each part.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.scores: dict[tuple[ContextCompression, Lead], Scores] = {}
        self.position: Tensor | None = None

    def add(self, tokens: Tensor, kwargs: dict[str, Any]) -> None:
        """The tokens of one call of the decoder and its arguments.

        Raises:
            UnsupportedCallError: the decoder is told more of each token than can be told again.
        """
        for name, content in kwargs.items():
            told = isinstance(content, Tensor) and content.ndim > 1 and content.shape[:2] == tokens.shape[:2]
            if told and name not in _PER_CALL:
                raise UnsupportedCallError(
                    f"{name} tells the decoder something about each token of the prompt, which it would lack when the "
                    "prompt is read again; use a method that reads it once, such as snapkv."
                )
        position = kwargs.get("position_ids")
        self.parts.append(tokens)
        self.position = None if position is None else position[..., -1:]

    def tokens(self, decoder: Any) -> Tensor:
        """All of them, [B, n] or [B, n, hidden]."""
        if len({part.ndim for part in self.parts}) > 1:
            embed = decoder.get_input_embeddings()
            return torch.cat([part if part.ndim == 3 else embed(part) for part in self.parts], dim=1)
        return torch.cat(self.parts, dim=1)


class ContextLayer(AccelLayer):
    """Some rows of a layer, without their padding: attention sees them and the entries of a pass, which go nowhere."""

    def __init__(self, layer: AccelLayer, rows: Tensor, padding: int) -> None:
        super().__init__()
        self.cumulative_length, self.removed = layer.cumulative_length, layer.removed
        rows = rows.to(layer.keys.device)
        whole = len(rows) == layer.rows
        self.keys, self.values = (
            (entries if whole else entries[rows])[:, :, padding:] for entries in (layer.keys, layer.values)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The stored entries and behind them the new ones, [B, Hk, n + T, D], which are not stored."""
        self.given = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        return self.given


class Rereading(DynamicCache):
    """What the decoder is given in place of cache and session while it reads a part of the context again. Nothing that
    it does to this cache reaches the real one.

    Attributes:
        rows: rows of the real cache that take part, int64 [b]; all have ``padding`` tokens of padding.
        first, last: the part, counted from the first real token.
        scores: of each layer what is known of its entries so far, fp32 [B, kv_heads, S], slots as in the real cache.
        softmax: how each layer turned logits into probabilities.
    """

    def __init__(self, session: Session, rows: Tensor, padding: int, scores: dict[int, Tensor]) -> None:
        super().__init__()
        self.layers = [_beside(layer, rows, padding) for layer in session.layers]
        self.plan, self.rows, self.padding, self.scores = session.plan, rows, padding, scores
        self.first = self.last = 0
        self.softmax: dict[int, Softmax] = {}

    def attend(
        self, attention: ModelAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer, [B, T, Hq, Dv], which is scored on the way."""
        index = self._source(attention.module, key)
        if index is None:
            return attention.plain(query, key, value, mask)
        layer: Any = self.layers[index]
        if not self.plan.reader_count(index):
            layer.given = None  # nobody else reads what was joined for this call
        if index not in self.scores:
            return attention.dense(query, key, value, None)
        found = attend_in_pieces(attention, query, key, value, self._seen())
        output, lse = (attention.dense(query, key, value, None), None) if found is None else found
        self._score(index, layer.kv_heads, query, key, attention.softmax(key.shape[-1]), lse)
        return output

    def _seen(self) -> list[slice]:
        """The entries of the context that a pass is scored over."""
        sinks = min(self.kv_method.pass_sinks, self.first)
        if sinks in (0, self.first):
            return [slice(self.first - sinks, self.last)]
        return [slice(0, sinks), slice(self.first, self.last)]

    def _source(self, module: nn.Module, key: Tensor) -> int | None:
        """The layer whose entries an attention call was given: its own or an earlier one's; None where it is none of
        those that keep every entry."""
        own: int | None = getattr(module, "layer_idx", None)
        given = {index: layer.given for index, layer in enumerate(self.layers) if isinstance(layer, ContextLayer)}
        if own in self.plan.derived and given.get(own) is not None:
            return own
        return next((index for index, pair in given.items() if pair is not None and pair[0] is key), None)

    @property
    def kv_method(self) -> ContextCompression:
        """The method that scores."""
        kv_method = self.plan.kv_method
        assert isinstance(kv_method, ContextCompression)
        return kv_method

    def _score(
        self, index: int, kv_heads: int, query: Tensor, key: Tensor, softmax: Softmax, lse: Tensor | None
    ) -> None:
        view = PassView(
            query,
            key,
            kv_heads,
            self.first,
            self.last,
            scaling=softmax["scaling"],
            softcap=softmax["softcap"],
            learned_sinks=softmax["sinks"],
            lse=lse,
        )
        scores, rows = self.scores[index], self.rows.to(key.device)
        part = slice(self.padding + self.first, self.padding + self.last)
        scores[rows, :, part] = torch.maximum(scores[rows, :, part], self.kv_method.pass_score(view))
        self.softmax[index] = softmax


def compress_context(session: Session, decoder: Any) -> None:
    """Scores the entries of a complete prompt by letting the model read it again, for all layers to evict together;
    does nothing where the prompt fits into the budget."""
    kv_method, context = session.plan.kv_method, session.context
    assert isinstance(kv_method, ContextCompression)
    if context is None or not context.parts:
        return
    acting = {index: layer for index, layer in session.ours.items() if index not in session.plan.skipped}
    session.context = None
    if not acting:
        return
    session.torn = True  # until all entries are scored: the context is not told twice
    groups = _rows_alike(next(iter(acting.values())))
    if _over_budget(session, kv_method, groups, acting):
        reading = replace(kv_method, budget=None, ratio=None), session.plan.lead
        with torch.no_grad():
            if reading not in context.scores:
                context.scores[reading] = _scores(session, decoder, context, kv_method, groups, acting)
        scores, softmax = context.scores[reading]
        for index, layer in acting.items():
            session.views[index] = session.prompt_view(
                index, layer, layer.keys, softmax[index], query=layer.keys[:, :, :0], scores=scores[index]
            )
    session.torn = False


def _scores(
    session: Session,
    decoder: Any,
    context: Context,
    kv_method: ContextCompression,
    groups: Sequence[tuple[int, Tensor]],
    acting: dict[int, AccelLayer],
) -> Scores:
    """Scores of all entries by layer, fp32 [B, kv_heads, S], and how each layer turns logits into probabilities."""
    tokens = context.tokens(decoder)
    scores = {index: torch.zeros(layer.keys.shape[:3], device=layer.keys.device) for index, layer in acting.items()}
    softmax: dict[int, Softmax] = {}
    for padding, rows in groups:
        context_rows = tokens[rows.to(tokens.device), padding:]
        head = _head(decoder, context_rows, session.plan.lead)
        for first, last in kv_method.parts(head, context_rows.shape[1]):
            reading = Rereading(session, rows, padding, scores)
            reading.first, reading.last = first, last
            told = _told(decoder, context_rows, session.plan.lead, first, last, head)
            given = _arguments(context, told, tokens.shape[1], padding, rows)
            given |= {CACHE: reading, "llm_accel": reading}
            decoder.forward(**given)  # the hooks on it are meant for calls of its user
            softmax |= reading.softmax
    missing = sorted(acting.keys() - softmax.keys())
    if missing:
        raise EvictionError(
            f"the attention of layers {missing} never reached llm_accel when the prompt was read again."
        )
    return scores, softmax


def _rows_alike(layer: AccelLayer) -> list[tuple[int, Tensor]]:
    """Padding and the rows that have it, so that a pass needs none."""
    if layer.start is None:
        return [(0, torch.arange(layer.rows))]
    start = layer.start.cpu()
    return [(int(padding), (start == padding).nonzero()[:, 0]) for padding in start.unique()]


def _over_budget(
    session: Session,
    kv_method: ContextCompression,
    groups: Sequence[tuple[int, Tensor]],
    acting: dict[int, AccelLayer],
) -> bool:
    return any(
        kv_method.layer_entries(layer.physical_length() - padding, session.plan.depth(index, later=False))
        < layer.physical_length() - padding
        for index, layer in acting.items()
        for padding, _ in groups
    )


def _head(decoder: Any, tokens: Tensor, lead: Lead) -> int:
    """How many tokens the head of the chat template takes, with which these rows begin; 0 where they do not."""
    count = len(lead.head)
    if not 0 < count < tokens.shape[1]:
        return 0
    return count if torch.equal(tokens[:, :count], _given(decoder, tokens, lead.head)) else 0


def _given(decoder: Any, tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """``ids`` in each row, in the form of ``tokens``."""
    rows = torch.tensor([ids], dtype=torch.long, device=tokens.device).expand(tokens.shape[0], -1)
    return rows if tokens.ndim == 2 else decoder.get_input_embeddings()(rows).to(tokens.dtype)


def _told(decoder: Any, tokens: Tensor, lead: Lead, first: int, last: int, head: int) -> Tensor:
    """What a pass is given, [b, q] or [b, q, hidden]: what leads to the part, and the part."""
    pieces = [
        _given(decoder, tokens, lead.first if first == head else lead.later),
        tokens[:, max(head, first - lead.repeated) : first],
        _given(decoder, tokens, lead.behind),
        tokens[:, first:last],
    ]
    return torch.cat([piece for piece in pieces if piece.shape[1]], dim=1)


def _arguments(context: Context, told: Tensor, length: int, padding: int, rows: Tensor) -> dict[str, Any]:
    """Arguments of the decoder beside the cache; positions go on from the end of the context."""
    count = told.shape[1]
    given: dict[str, Any] = {"input_ids" if told.ndim == 2 else "inputs_embeds": told, "use_cache": True}
    if context.position is not None:
        last = context.position
        last = last.index_select(-2, rows.to(last.device)) if last.shape[-2] > 1 else last
        given["position_ids"] = last + torch.arange(1, count + 1, device=last.device)
    if padding:
        mask = torch.ones(told.shape[0], length + count, dtype=torch.long, device=told.device)
        mask[:, :padding] = 0
        given["attention_mask"] = mask
    return given


def _beside(layer: Any, rows: Tensor, padding: int) -> Any:
    """What stands for one layer of the real cache in a pass."""
    if not isinstance(layer, AccelLayer):
        other = copy.deepcopy(layer)
        if hasattr(other, "batch_select_indices"):
            other.batch_select_indices(rows)
        return other
    if not layer.physical_length():
        return copy.deepcopy(layer)
    beside = beside_state(ContextLayer(layer, rows, padding), layer)
    if has_linear_state(layer):
        restore_states(beside, {name: state[rows.to(state.device)] for name, state in states_of(layer).items()})
    return beside
