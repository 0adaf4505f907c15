"""What a method that contrasts two views of an image does in one attention call, and to the logits of ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from llm_accel.cache import GeneratedLayer
from llm_accel.cache.attention import Attention
from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.column_votes import column_votes
from llm_accel.kernels.column_votes.reference import soft_capped
from llm_accel.kernels.gradient import without_gradient
from llm_accel.methods import VASparse
from llm_accel.methods.selection import real_slots
from llm_accel.patches.phase import Phase
from llm_accel.patches.session import Session


def note_call(session: Session, method: VASparse, kwargs: dict[str, Any]) -> None:
    """Notes what the running call of the decoder shows, before its layers: whether there is an image, and the embedding
    of the newest token for the second path.

    Raises:
        UnsupportedCallError: nobody knows which tokens are visual, or only some rows have an image.
    """
    state, embeddings = session.visual, kwargs.get("inputs_embeds")
    if state.rows is not None:
        if state.rows.visual is None:
            raise UnsupportedCallError(
                f"{method.spec()} must know which tokens are visual; give input_ids instead of inputs_embeds."
            )
        if session.prompt_end is None and not session.pictured:
            pictured = state.pictured()
            if bool(pictured.any()) and not bool(pictured.all()):
                raise UnsupportedCallError(
                    f"{method.spec()} leaves prompts without an image alone, and this batch has rows with and without "
                    "one; give them in separate calls."
                )
            for layer in session.ours.values():
                layer.pictured = bool(pictured.any())
    if method.contrasts and embeddings is not None:
        newest = embeddings[:, -1]
        if state.rows is not None and state.rows.visual is not None:
            hidden = state.rows.visual[:, -1:] & method.unseen(state.positions(state.rows)[:, -1:])
            newest = newest.masked_fill(hidden.to(newest.device), 0.0)
        state.newest = newest


class ContrastStep:
    """The work on one layer in the running call.

    Args:
        session: state of the cache.
        method: the method that contrasts.
        layer: the layer's entries, the new ones included.
        attention: what the model would have computed.
    """

    def __init__(self, session: Session, method: VASparse, layer: GeneratedLayer, attention: Attention) -> None:
        self.session, self.method, self.layer, self.attention = session, method, layer, attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the newest queries, [B, T, Hq, Dv]: the model's own but for the penalty in decode steps."""
        decoding = self.layer.pictured and not self.session.phase.in_prompt
        weights = self._weights(query, key) if decoding else None
        if weights is not None and self.method.penalises:
            # the attention received until now counts as a constant in the penalty, which it is not
            mixed = self._mixed(weights, value).to(query.dtype)
            (output,) = without_gradient(f"the penalty of {self.method.name}", lambda: (mixed,), mixed)
        else:
            output = self.layer.attend(self.attention, query, key, value)
        if weights is not None:
            with torch.no_grad():
                into = self._spoke(weights, query, key)
            if into is not None:
                self.layer.prune(into, self.session.plan.trace)
        elif self.session.phase.in_prompt:
            self._heard(query, key)
        return output

    def _heard(self, query: Tensor, key: Tensor) -> None:
        """Tokens of a prompt: which of them are visual, and the attention that its last queries pay."""
        layer, rows, width = self.layer, self.session.visual.rows, self.method.sink_window
        if rows is not None and rows.visual is not None:
            layer.mark(rows.visual)
        if self.method.penalises and width is not None:
            layer.observe(query, width)
        if self.session.phase is Phase.PREFILL_END:
            layer.own_storage()
            layer.begin_generated()
        if self.method.penalises and (width is None or (self.session.phase is Phase.PREFILL_END and layer.pictured)):
            watched = query if layer.window is None else layer.window
            softmax = self.attention.softmax(key.shape[-1])
            with torch.no_grad():
                layer.receive(column_votes(watched, key, layer.start, heads=query.shape[1], **softmax))
        if self.session.phase is Phase.PREFILL_END:
            layer.window = None
            layer.received = layer.received if layer.pictured else None

    def _spoke(self, weights: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        """A generated token: what it looked at, and every so often where the entries of the generated tokens go, int64
        [B, Hk, held]."""
        layer, method = self.layer, self.method
        if method.penalises:
            layer.receive(weights)
        if not method.prunes:
            return None
        assert layer.visual is not None
        layer.spoke(method.saliency(weights, layer.visual, self.session.plan.heads))
        count = method.entries(layer.held, layer.generated)
        if count == layer.held:
            return None
        assert layer.saliency is not None
        products = self._products(query, layer.part_generated(layer.all_keys(key)))
        saliency, keys = layer.part_generated(layer.saliency), layer.part_generated(layer.keys)
        return method.destinations(products, saliency, keys, count)

    def _products(self, query: Tensor, key: Tensor) -> Tensor:
        """Inner products of one query per row with keys [B, H, n, D], fp32 [B, Hq, n]."""
        batch, heads, stored, dim = key.shape
        precision = torch.promote_types(query.dtype, torch.float32)
        return (query.reshape(batch, heads, -1, dim).to(precision) @ key.to(precision).mT).view(batch, -1, stored)

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention weights of one query per row after the penalty, fp32 [B, Hq, P]."""
        softmax = self.attention.softmax(key.shape[-1])
        logits = soft_capped(self._products(query, key) * softmax["scaling"], softmax["softcap"])
        real = real_slots(self.layer.start, key.shape[2], key.device)[:, None]
        if self.method.penalises:
            assert self.layer.received is not None
            logits = self.method.penalised(logits, self.layer.received, real)
        logits = logits.masked_fill(~real, float("-inf"))
        if softmax["sinks"] is None:
            return logits.softmax(-1)
        sinks = softmax["sinks"].to(logits.dtype)[None, :, None].expand(*logits.shape[:2], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]

    def _mixed(self, weights: Tensor, value: Tensor) -> Tensor:
        """[B, 1, Hq, Dv]."""
        batch, heads, slots, dim = value.shape
        mixed = weights.view(batch, heads, -1, slots) @ value.to(weights.dtype)
        return mixed.view(batch, 1, -1, dim)


class ContrastProcessor(LogitsProcessor):
    """Contrasts the scores of each step with the language model head on the embedding of the newest token."""

    def __init__(self, session: Session, method: VASparse, head: nn.Module) -> None:
        self.session, self.method, self.head = session, method, head

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities [B, V]; the scores themselves after a prompt without an image."""
        newest = self.session.visual.newest
        if newest is None or not self.session.pictured:
            return scores
        return self.method.contrasted(scores, self.head(newest).to(scores.device, scores.dtype))
