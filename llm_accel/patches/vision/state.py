"""What became of the visual tokens of one cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError

if TYPE_CHECKING:
    from llm_accel.patches.session import Session
    from llm_accel.patches.vision.head_scaling import BlindPass
    from llm_accel.patches.vision.rows import VisualRows


class VisualReport(NamedTuple):
    """Visual tokens of a prompt, all rows and turns together, those that reached the last layer, and the layer after
    which some left; None where that is unknown."""

    before: int | None = None
    after: int | None = None
    exit_layer: int | None = None


class VisualState:
    """Lives on the session of a cache.

    Attributes:
        rows: the rows of the running call that are under way; None while decoding.
        past: tokens seen before that call.
        cut: int64 [B, m], which of the rows that entered the decoder remain after a cut, ascending, -1 first;
            None before it.
        scores: what the method of a cut made of each entry in the layer before it, fp32 [B, S], or None.
        exit_layer: the layer after which visual tokens left last, or None.
        newest: embedding of the newest token of each row, [B, C], where a second path starts from it, else None.
        blind: the pass without the image that goes beside the running call, or None.
        states: hidden states that enter the layer under way, [B, n, C], where its entries are marked by them, or None.
        skipped: how far positions run behind those of the prompt where they are renumbered, int64 [B], or None.
    """

    def __init__(self) -> None:
        self.rows: VisualRows | None = None
        self.past = 0
        self.cut: Tensor | None = None
        self.scores: Tensor | None = None
        self.exit_layer: int | None = None
        self.skipped: Tensor | None = None
        self.newest: Tensor | None = None
        self.blind: BlindPass | None = None
        self.states: Tensor | None = None
        self._pictured: Tensor | None = None
        self._padding: Tensor | None = None
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    def clear(self) -> None:
        """No row is under way, or only decoded tokens."""
        self.rows, self.cut, self.scores, self.blind, self.states = None, None, None, None, None

    def begin(self, rows: VisualRows, past: int) -> None:
        """Starts a call that brings tokens of a prompt; an empty cache starts over."""
        if past == 0:
            self._padding, self._pictured, self.exit_layer, self.skipped = None, None, None, None
            self._before, self._after = [], []
        self.rows, self.past = rows, past
        padding = rows.padding
        self._padding = padding if self._padding is None else self._padding + padding
        if rows.visual is not None:
            pictured = rows.visual.any(-1)
            self._pictured = pictured if self._pictured is None else self._pictured | pictured
            self._before.append(rows.visual.sum())
            self._after.append(self._before[-1])

    def update_layers(self, session: Session, first_layer: int) -> None:
        """Tells the layers from ``first_layer`` on which rows of the running call come to them.

        Raises:
            UnsupportedCallError: rows that already hold entries would get a gap.
        """
        rows = self.rows
        assert rows is not None
        if rows.index is not None:
            padding = rows.padding
            padded = bool((padding > 0).any())
            if self.past == 0:
                session.padding = padding if padded else None
            elif padded:
                raise UnsupportedCallError(
                    "rows of this batch lose different numbers of visual tokens in a later chunk or turn, which would "
                    "leave gaps between their tokens; give the whole prompt at once, or one row."
                )
            if rows.visual is not None:
                self._after[-1] = rows.visual.sum()
        arriving = self.positions(rows) if session.plan.trace else None
        for index, layer in session.ours.items():
            if index >= first_layer:
                layer.missing, layer.arriving = rows.missing, arriving

    def pictured(self) -> Tensor:
        """Which rows have had visual tokens so far, bool [B]."""
        assert self._pictured is not None
        return self._pictured

    def positions(self, rows: VisualRows) -> Tensor:
        """Positions of the rows under way, counted from the first real token of each batch row, -1 for padding."""
        assert self._padding is not None
        index = rows.index
        if index is None:
            index = torch.arange(rows.length, device=rows.real.device).expand(rows.real.shape)
        return (index + self.past - self._padding[:, None]).masked_fill(~rows.real, -1)

    def report(self) -> VisualReport:
        """Counted now, which waits for the device."""
        if not self._before:
            return VisualReport(exit_layer=self.exit_layer)
        return VisualReport(int(torch.stack(self._before).sum()), int(torch.stack(self._after).sum()), self.exit_layer)
