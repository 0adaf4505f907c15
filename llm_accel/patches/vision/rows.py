"""Rows of a call that are taken out of the stream of hidden states, at the decoder's entrance or after a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import EntranceTokens
from llm_accel.methods.selection import slots_of
from llm_accel.patches.vision.tombstones import surplus_of, tombstones

if TYPE_CHECKING:
    from llm_accel.patches.session import Session
    from llm_accel.patches.vision.watch import TowerMarks

PER_TOKEN = ("moe_mm_token_type_ids",)
"""Arguments of single decoders, and of their layers, that have one entry per token: [B, T, ...]."""


class VisualRows:
    """The rows of one forward call that are under way. Rows of a batch that lose different numbers of tokens are
    aligned to the right, padded with zeros.

    Attributes:
        length: tokens T of the call.
        real: bool [B, n], which rows under way are no padding.
        visual: bool [B, n], which of them are visual tokens; None where the call's token ids are unknown.
        index: int64 [B, n], the token of the call that a row under way is, ascending, -1 first where a batch row has
            fewer; None while all T are under way.
        surplus: visual tokens of each batch row beyond its budget, int64 [B]; None where no row has any.
        marks: what a method made of the vision tower's attention to each row, int8 [B, n], or None.
    """

    def __init__(self, real: Tensor, visual: Tensor | None, marks: Tensor | None = None) -> None:
        self.length = real.shape[1]
        self.real = real
        self.visual = None if visual is None else visual & real
        self.index: Tensor | None = None
        self.surplus: Tensor | None = None
        self.marks = marks

    def take(self, keep: Tensor) -> Tensor:
        """Lets only the rows under ``keep``, bool [B, n], go on; padding goes where all rows of the batch can spare it.

        Returns:
            int64 [B, m]: which of the n rows each of the m rows was, ascending, -1 first where there are fewer.
        """
        taken = slots_of((keep & self.real)[:, None])[:, 0]
        if taken.shape[1] == 0:
            raise UnsupportedCallError(
                "every token of this call is a dropped visual token; give longer chunks (prefill_chunk_size)."
            )
        self.index = taken if self.index is None else gathered(self.index, taken, -1)
        self.real = taken >= 0
        self.visual = None if self.visual is None else gathered(self.visual, taken, False)
        self.marks = None if self.marks is None else gathered(self.marks, taken, 0)
        return taken

    @property
    def missing(self) -> int:
        """Tokens of the call that are not under way any more, padding included."""
        return self.length - self.real.shape[1]

    @property
    def padding(self) -> Tensor:
        """Leading padding of each row under way, int64 [B]."""
        return (~self.real).sum(-1)


def gathered(rows: Tensor, index: Tensor, empty: float | bool) -> Tensor:
    """Rows ``index``, int64 [B, m], of [B or 1, n, ...]; ``empty`` where the index is -1."""
    shape = (*index.shape, *rows.shape[2:])
    wide = index.reshape(*index.shape, *[1] * (rows.ndim - 2))
    found = rows.expand(index.shape[0], *rows.shape[1:]).gather(1, wide.clamp(min=0).expand(shape))
    return found.masked_fill(wide < 0, empty)


def columns(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Tokens ``index``, int64 [B, m], of a tensor that has them in dimension ``dim`` (-1 or -2), the batch, B or 1,
    right before it, and any axes before that: position ids [B, n] or [A, B, n], rotary phases [(A,) B, n, D]."""
    index = index.clamp(min=0).to(tensor.device)
    tail = tensor.shape[dim:][1:]
    wide = tensor.expand(*tensor.shape[: dim - 1], index.shape[0], *tensor.shape[dim:])
    index = index.reshape(*index.shape, *[1] * len(tail)).expand(*wide.shape[: dim - 1], *index.shape, *tail)
    return wide.gather(dim, index)


def begin_call(
    session: Session, kwargs: dict[str, Any], visual: Tensor | None, past: int, marks: TowerMarks | None = None
) -> dict[str, Any]:
    """Takes the tombstones out of a call of the decoder and tells the session what is left.

    Args:
        session: state of the cache, its call begun.
        kwargs: arguments of the decoder.
        visual: bool [B, T], which tokens are visual, or None where that is unknown.
        past: tokens seen before.
        marks: what the vision tower said of the visual tokens, where a method asked.

    Returns:
        The arguments with ``inputs_embeds``, ``position_ids`` and all that has a row per token cut to the rows left.
    """
    session.visual.clear()
    embeddings = kwargs.get("inputs_embeds")
    if not session.phase.in_prompt or embeddings is None:
        return _caught_up(session, kwargs, past)
    if visual is None and session.plan.tokens is not None:
        raise UnsupportedCallError(
            f"{session.plan.tokens.name} must know which tokens are visual; give input_ids instead of merged "
            "inputs_embeds, or inputs_embeds with placeholders, together with the pixels."
        )
    real = _real_tokens(embeddings, kwargs.get("attention_mask"))
    rows = VisualRows(real, visual, None if marks is None else marks.placed(real))
    session.visual.begin(rows, past)
    gone = tombstones(embeddings)
    if session.plan.entrance is not None:
        gone = gone | left_out(session, session.plan.entrance, rows, embeddings)
    kwargs = _caught_up(session, kwargs, past)
    if bool(gone.any()):
        index, surplus = rows.take(~gone), surplus_of(embeddings, gone)
        rows.surplus = surplus if bool(surplus.any()) else None
        positions = _positions(kwargs, past, embeddings)
        if session.plan.renumbers:
            skipped = gone.sum(-1)
            positions = positions - gone.cumsum(-1).to(positions.device)
            session.visual.skipped = skipped if session.visual.skipped is None else session.visual.skipped + skipped
        kwargs = kwargs | {
            "inputs_embeds": gathered(embeddings, index, 0.0),
            "position_ids": columns(positions, index, -1),
            "attention_mask": rows.real.long(),  # recurrent layers read it
            **_aligned(kwargs, ~gone, index),
        }
    session.visual.update_layers(session, first_layer=0)
    return kwargs


def left_out(session: Session, method: EntranceTokens, rows: VisualRows, embeddings: Tensor) -> Tensor:
    """Which tokens of the call a method does not let in, bool [B, T].

    Raises:
        UnsupportedCallError: nobody knows which tokens are visual, or the prompt is not there as a whole.
    """
    if rows.visual is None:
        raise UnsupportedCallError(
            f"{method.spec()} must know which tokens are visual; give input_ids, not merged inputs_embeds."
        )
    gone = torch.zeros_like(rows.real)
    for row, visual in enumerate(rows.visual):
        tokens = visual.nonzero()[:, 0]
        kept = method.tokens(len(tokens))
        if kept == len(tokens):
            continue
        if session.prompt_end is not None:
            raise UnsupportedCallError(
                f"{method.spec()} compares all visual tokens of a prompt, and this one comes in chunks; leave out "
                "prefill_chunk_size."
            )
        known = embeddings[row].detach().float()
        chosen = method.pick(known[tokens], known[rows.real[row] & ~visual], kept)
        gone[row, tokens] = True
        gone[row, tokens[chosen]] = False
    return gone


def _positions(kwargs: dict[str, Any], past: int, tokens: Tensor) -> Tensor:
    """Position ids of the call for ``tokens``, [B, T, ...], or those that the decoder would count, int64 [1, T]."""
    given: Tensor | None = kwargs.get("position_ids")
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None] if given is None else given


def _caught_up(session: Session, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
    """The arguments with positions that follow those of the cache, where these were renumbered."""
    skipped, tokens = session.visual.skipped, kwargs.get("inputs_embeds")
    if past == 0 or skipped is None:
        return kwargs
    tokens = kwargs["input_ids"] if tokens is None else tokens
    positions = _positions(kwargs, past, tokens).to(tokens.device)
    rows = skipped.to(tokens.device).repeat_interleave(len(tokens) // len(skipped))  # hypotheses of one prompt
    return kwargs | {"position_ids": positions - rows[:, None]}


def _real_tokens(embeddings: Tensor, mask: Tensor | None) -> Tensor:
    """bool [B, T]: which tokens of the call are no padding."""
    batch, length = embeddings.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=embeddings.device)
    return mask[:, -length:].to(embeddings.device).bool()


def per_token(kwargs: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The arguments :data:`PER_TOKEN` with the tokens ``index`` only, int64 [B, m], -1 for padding."""
    given = {name: kwargs[name] for name in PER_TOKEN if kwargs.get(name) is not None}
    return {name: gathered(value, index.to(value.device), False) for name, value in given.items()}


def _aligned(kwargs: dict[str, Any], kept: Tensor, index: Tensor) -> dict[str, Any]:
    """Arguments of single families that have one row per token or per visual token."""
    mask, extra = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None:
        return per_token(kwargs, index)
    rows = kept[mask]
    return per_token(kwargs, index) | {
        "visual_pos_masks": gathered(mask, index, False),
        "deepstack_visual_embeds": None if extra is None else [features[rows] for features in extra],
    }
