"""Attention that is shifted between marked entries: what the model's own attention gave is corrected with the rows'
log-sum-exp and the marked columns alone, so that any backend computes the rest."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_accel.cache import MarkedLayer
from llm_accel.cache.attention import Softmax
from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.column_votes.reference import QUERY_BLOCK, row_logsumexp, soft_capped
from llm_accel.methods import Columns, WeightShift
from llm_accel.methods.selection import slots_of
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.vision.arguments import layers_of

if TYPE_CHECKING:
    from llm_accel.patches.session import Session


class StatesHook:
    """Forward pre-hook of a decoder layer: the hidden states that enter it are kept until its entries are marked."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing is changed."""
        session, visual = kwargs.get("llm_accel"), getattr(kwargs.get("llm_accel"), "visual", None)
        if session is not None and visual is not None and visual.rows is not None:
            visual.states = args[0] if args else kwargs["hidden_states"]


class ShiftedAttention(ModelAttention):
    """The attention of one layer in the running call, corrected.

    Args:
        attention: what the model would have computed.
        session: state of the cache.
        layer: the layer's entries, the new ones included and marked.
    """

    def __init__(self, attention: ModelAttention, session: Session, layer: MarkedLayer) -> None:
        super().__init__(attention.base, attention.module, attention.kwargs)
        self.session, self.layer = session, layer

    def dense(self, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
        """As in the base."""
        output = super().dense(query, key, value, start)
        method = self.session.plan.weight_shift
        assert method is not None
        if self.layer.marks is None:
            return output
        asked = _asked(method, self.session, query)
        if asked is None:
            return output
        if self.layer.columns is None:
            self.layer.columns = slots_of(self.layer.marks != 0)
        columns = self.layer.columns
        if columns.shape[-1] == 0:
            return output
        return self._corrected(method, output, (query, key, value), start, columns, asked)

    def _corrected(
        self,
        method: WeightShift,
        output: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor],
        start: Tensor | None,
        columns: Tensor,
        asked: Tensor,
    ) -> Tensor:
        """``output`` [B, T, Hq, Dv] for the queries ``asked``, bool [B, T]."""
        query, key, value = tensors
        softmax = self.softmax(key.shape[-1])
        copies = key.shape[1] // columns.shape[1]
        slots = columns.repeat_interleave(copies, 1)
        taken = slots.clamp(min=0)[..., None]
        keys = key.gather(2, taken.expand(*slots.shape, key.shape[-1])).float()
        values = value.gather(2, taken.expand(*slots.shape, value.shape[-1])).float()
        assert self.layer.marks is not None
        marks = self.layer.marks.repeat_interleave(copies, 1).gather(2, slots.clamp(min=0)).masked_fill(slots < 0, 0)
        group = query.shape[1] // key.shape[1]
        marks, slots = (one.repeat_interleave(group, 1)[:, :, None] for one in (marks, slots))
        first = int(asked.any(0).long().argmax()) if asked.shape[1] > 1 else 0
        parts, past = [output[:, :first]], key.shape[2] - query.shape[2]
        for rows in torch.arange(first, query.shape[2], device=query.device).split(QUERY_BLOCK):
            part, last = query[:, :, rows], past + int(rows[-1]) + 1
            total = row_logsumexp(
                part, key[:, :, :last], start, softmax["scaling"], softmax["softcap"], softmax["sinks"]
            )
            logits = _products(part, keys, softmax)
            seen = (slots >= 0) & (slots <= (past + rows)[:, None])
            factor, weights = method.shift(Columns(logits.masked_fill(~seen, float("-inf")), total, marks))
            wanted = asked[:, None, rows]
            factor = torch.where(wanted, factor, 1.0)
            weights = torch.where(wanted[..., None], weights, 0.0)
            self.layer.count((weights != 0).any(-1).sum(), wanted.sum() * query.shape[1])
            added = weights.view(*keys.shape[:2], -1, weights.shape[-1]) @ values
            added = added.view(*weights.shape[:3], -1).transpose(1, 2)
            shifted = output[:, rows].float() * factor.transpose(1, 2)[..., None] + added
            parts.append(shifted.to(output.dtype))
        return torch.cat(parts, dim=1)


def _products(query: Tensor, keys: Tensor, softmax: Softmax) -> Tensor:
    """Logits [B, Hq, T, n] of queries with the keys of some entries, fp32 [B, H, n, D]."""
    batch, heads, count, dim = query.shape
    packed = query.reshape(batch, keys.shape[1], -1, dim).float() @ keys.mT
    return soft_capped(packed.view(batch, heads, count, -1) * softmax["scaling"], softmax["softcap"])


def _asked(method: WeightShift, session: Session, query: Tensor) -> Tensor | None:
    """Which queries of the running call are corrected, bool [B, T]; None: none of them."""
    batch, _, count, _ = query.shape
    asked = torch.ones(batch, count, dtype=torch.bool, device=query.device)
    if not session.phase.in_prompt:
        return asked
    if method.last_query_only:
        if session.prompt_end is not None:
            return None
        asked[:, :-1] = False
        return asked
    rows = session.visual.rows
    if rows is None or rows.visual is None:
        return asked
    asked = (rows.real & ~rows.visual).to(query.device)
    return asked if bool(asked.any()) else None


def mark_entries(session: Session, layer: MarkedLayer) -> None:
    """Marks what the running call has brought to a layer."""
    method, visual = session.plan.weight_shift, session.visual
    states, visual.states = visual.states, None
    if method is None or visual.rows is None:
        return
    rows = visual.rows
    assert rows.visual is not None
    given = rows.marks if method.reads_tower else None
    if method.reads_tower and given is None:
        given = torch.zeros_like(rows.visual, dtype=torch.int8)  # no image came with this call
    marks = method.marks(rows.visual, given, states)
    layer.mark(marks.masked_fill(~rows.real.to(marks.device), 0))


def check_marks(session: Session) -> None:
    """Before a call that brings tokens of a prompt.

    Raises:
        UnsupportedCallError: nobody knows which of them are visual.
    """
    method, rows = session.plan.weight_shift, session.visual.rows
    if method is not None and rows is not None and rows.visual is None:
        raise UnsupportedCallError(
            f"{method.spec()} must know which tokens are visual; give input_ids, not inputs_embeds."
        )


def install_states(decoder: Any, layers: Collection[int]) -> None:
    """Hooks the layers whose hidden states are asked for."""
    blocks = layers_of(decoder)
    for index in layers:
        blocks[index].register_forward_pre_hook(StatesHook(), with_kwargs=True)
