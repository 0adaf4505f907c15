"""PyramidKV: budgets that shrink from the first layer to the last, for any score (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.kv.division import Division
from llm_accel.methods.prompt_view import Depth, PromptView


@dataclass(frozen=True)
class PyramidKV(Division):
    """Early layers, whose attention is broad, keep more entries and late ones fewer: the budget is their average."""

    beta: int = option(
        "steepness: the last layer keeps 1/beta of the average, not counting the window; 1 is uniform",
        20,
        most=10_000,
        least=1,
    )

    name: ClassVar[str] = "pyramidkv"
    info: ClassVar[MethodInfo] = MethodInfo(
        "PyramidKV, arXiv 2406.02069", "KV cache after the prompt, late layers most", needs_query=True
    )

    divides: ClassVar[Literal["layers", "heads"]] = "layers"

    def layer_entries_per_row(self, lengths: Tensor, depth: Depth) -> Tensor:
        return pyramid_entries(lengths, self.entries_per_row(lengths), self.reserved, self.beta, depth)

    def widest(self, counts: Tensor, view: PromptView) -> int:
        """A short row may keep all it has in a late layer, where a long one keeps less."""
        return super().widest(counts, view) if view.start is None else int(counts.max())


def pyramid_entries(lengths: Tensor, average: Tensor, window: int, beta: int, depth: Depth) -> Tensor:
    """Entries per KV head that one layer keeps, so that all layers together keep ``layers * average`` exactly.

    Without the window, the budgets lie on a line from the first layer to the last, rounded down; what rounding leaves
    over goes one by one to the first layers. No layer keeps more than there is, none more than a layer before it. Rows
    shorter than twice the average without the window keep the average everywhere, as in the published code.

    Args:
        lengths: real tokens of each row, int64 [B].
        average: entries per KV head of each row, averaged over the layers, window included, int64 [B].
        window: entries that every layer keeps whatever their scores.
        beta: the last layer keeps ``1 / beta`` of the average without the window.
        depth: the layer. A ``later`` one is cut to the line of a prompt without end, whatever it has stored.

    Returns:
        int64 [B].
    """
    layers = depth.layers
    if layers == 1:
        return average
    chosen = (average - window).clamp(min=0)[:, None]
    free = 2 * chosen if depth.later else (lengths - window)[:, None]
    steps = torch.arange(layers, device=lengths.device)
    # the line in units of 1 / beta, so that everything stays an integer
    first = torch.minimum((2 * beta - 1) * chosen, beta * free)
    last = 2 * beta * chosen - first
    line = (first * (layers - 1) - (first - last) * steps) // (beta * (layers - 1))
    left = layers * chosen - line.sum(-1, keepdim=True)
    open_layers = line < free
    line = line + (open_layers & (open_layers.cumsum(-1) <= left))
    if not depth.later:
        line = torch.where(lengths[:, None] < 2 * chosen, chosen, line)
    entries = torch.minimum(lengths, window + line[:, depth.index])
    return entries if depth.later else torch.where(lengths <= average, lengths, entries)
