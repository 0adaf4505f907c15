"""A vision tower in which the patches of all images stand in one row: tokens, which are several patches, leave half-way
as wholes, and the layers behind get the rows that are left and where images and windows end among them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from llm_accel.methods import TowerCut, TowerTokens, TowerView
from llm_accel.methods.selection import top_tokens
from llm_accel.patches.vision.tower import Call, TowerPass, running_pass


class PackedPass(TowerPass):
    """The pass of images, or pairs of frames of videos, whose patches are the rows of one [S, C].

    Args:
        method, given: as for :class:`TowerPass`.
    """

    def __init__(self, method: TowerTokens | None, **given: Any) -> None:
        super().__init__(method, **given)
        self._bounds: Tensor | None = None  # where images or windows begin and end in the running layer
        self._sizes_before: list[int] = []  # patches of each image
        self._tokens: list[int] = []  # how many of an image's tokens stay
        self._left: Tensor | None = None  # int64 [m], ascending, which of the S rows are under way; None: all

    @property
    def _latest_cut(self) -> int:
        """The last layer: the released code for such a tower makes its last cut there."""
        return self.last

    def entering(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer, of which those with one entry per row, or that count rows, fit what is left."""
        bounds: Tensor = given["cu_seqlens"]
        if self._left is not None:
            before = torch.searchsorted(self._left.to(bounds.device), bounds.long())
            bounds = before.unique_consecutive().to(bounds.dtype)  # of a window that is empty nothing is left
            given = given | {"cu_seqlens": bounds}
            if given.get("max_seqlen") is not None:
                given["max_seqlen"] = int(bounds.diff().max())
            phases = given["position_embeddings"]
            given["position_embeddings"] = tuple(phase[self._left.to(phase.device)] for phase in phases)
        self._bounds = bounds
        return given

    def narrowed(self, hidden: Tensor) -> Tensor:
        """The rows that a merger must look at, of all S or of those that are left."""
        return hidden if self._left is None or len(hidden) == len(self._left) else hidden[self._left]

    def widened(self, merged: Tensor) -> Tensor:
        """What a merger made of the tokens that are left, each of u rows that follow one another, among those of all,
        [S / u, C]; the others are zeros."""
        if self._left is None:
            return merged
        unit = len(self._left) // len(merged)
        tokens = self._left[::unit] // unit
        full = merged.new_zeros(sum(self._sizes_before) // unit, *merged.shape[1:])
        return full.index_copy(0, tokens, merged)

    def _images(self, calls: list[Call]) -> list[Call]:
        """Varlen attention sees all images in one call."""
        if len(calls) != 1 or self._bounds is None or len(self._bounds) <= 2:
            return calls
        query, key, value, scaling = calls[0]
        sizes = self._bounds.diff().tolist()
        parts = zip(*(one.split(sizes, dim=2) for one in (query, key, value)), strict=True)
        return [(*part, scaling) for part in parts]

    def _known(self, views: int) -> Sequence[tuple[Tensor, int] | None]:
        if self._left is None:
            return [None] * views
        stayed = self._stayed_rows().split(self._sizes_before)
        return [(one.nonzero()[:, 0][None], len(one)) for one in stayed]

    def _chosen(self, views: Sequence[TowerView], hidden: Tensor) -> Tensor:
        method = self.method
        assert isinstance(method, TowerCut)
        if not self._sizes_before:
            self._sizes_before = [view.query.shape[2] for view in views]
            self._units = [one.to(hidden.device) for one in self._units_of(self._sizes_before)]
            self._tokens = [max(1, method.first_stage_tokens(len(one))) for one in self._units]
        sizes = [scores.shape[1] for scores in self.scores]
        chosen = [
            self._rows(method, view, scores[0], units, tokens)
            for view, scores, units, tokens in zip(views, self.scores, self._units, self._tokens, strict=True)
        ]
        if [len(rows) for rows in chosen] == sizes:
            return hidden
        self.scores = [scores[:, rows] for scores, rows in zip(self.scores, chosen, strict=True)]
        self._units = [_still(units, rows) for units, rows in zip(self._units, chosen, strict=True)]
        begins = accumulate(sizes, initial=0)
        rows = torch.cat([one + begin for one, begin in zip(chosen, begins, strict=False)])
        self._left = rows if self._left is None else self._left[rows]
        return hidden[rows]

    def _rows(self, method: TowerCut, view: TowerView, scores: Tensor, units: Tensor, tokens: int) -> Tensor:
        """Which rows of one image go on, int64, ascending: whole tokens, at least ``tokens``, by the mean score of
        their patches. A method counts in patches; part of a token is one."""
        unit = units.shape[1]
        size, budget = torch.tensor([len(scores)]), torch.tensor([min(len(scores), tokens * unit)])
        patches = int(method.survivors(view, size, budget))
        best = top_tokens(scores[units].mean(1), -(-patches // unit))
        return units[best].flatten().sort().values

    def _stayed_rows(self) -> Tensor:
        """fp32 [S]: 1 where a row is under way, 0 where it has left."""
        stayed = torch.ones(sum(self._sizes_before), device=self.scores[0].device)
        return stayed if self._left is None else torch.zeros_like(stayed).index_fill(0, self._left, 1.0)

    def _restored(self, hidden: Tensor) -> Tensor:
        if self._left is None:
            return hidden
        full = hidden.new_zeros(sum(self._sizes_before), hidden.shape[1])
        return full.index_copy(0, self._left, hidden)

    def values(self) -> list[Tensor]:
        if not self.inside:
            return super().values()
        return list(self._stayed_rows()[:, None].split(self._sizes_before))


def _still(units: Tensor, rows: Tensor) -> Tensor:
    """The ``units``, int64 [t, u], that are left where only ``rows`` are, int64 [m], ascending: int64 [m / u, u]."""
    return torch.searchsorted(rows, units[torch.isin(units[:, 0], rows)])


def running_packed() -> PackedPass | None:
    """The pass of this thread's call, if it goes through such a tower."""
    tower = running_pass()
    return tower if isinstance(tower, PackedPass) else None


class LayerEntry:
    """Forward pre-hook of one layer of such a tower; idle in calls without a pass."""

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fits the arguments to the rows that are left."""
        tower = running_packed()
        return args, kwargs if tower is None else tower.entering(kwargs)


class MergerEntry:
    """Forward pre-hook of a module that merges patches: rows that have left are none of its work."""

    def __call__(self, merger: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Takes them out."""
        tower = running_packed()
        return args if tower is None else (tower.narrowed(args[0]), *args[1:])


class MergerExit:
    """Forward hook of the same module: the model finds as many tokens as it gave."""

    def __call__(self, merger: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Zeros stand for tokens that have left; tombstones take their places later."""
        tower = running_packed()
        return output if tower is None else tower.widened(output)


def install_packed(blocks: Sequence[nn.Module], mergers: Sequence[nn.Module]) -> None:
    """Hooks on the layers of such a tower, and on what merges their patches."""
    for block in blocks:
        block.register_forward_pre_hook(LayerEntry(), with_kwargs=True)
    for merger in mergers:
        merger.register_forward_pre_hook(MergerEntry())
        merger.register_forward_hook(MergerExit(), prepend=True)


PACKED_HOOKS: tuple[type, ...] = (LayerEntry, MergerEntry, MergerExit)
