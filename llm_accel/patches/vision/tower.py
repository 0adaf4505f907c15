"""One pass of images through a vision tower: scores of patches, and patches that leave half-way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import TowerCut, TowerMerge, TowerTokens, TowerView
from llm_accel.methods.selection import select_top
from llm_accel.patches.attention import PREFIX, accel_name
from llm_accel.patches.base_attention import base_function, softmax_of
from llm_accel.patches.vision.rows import gathered
from llm_accel.patches.vision.watch import TowerWatch

_TOWER = PREFIX + "tower_"
_RUNNING: ContextVar[TowerPass | None] = ContextVar("llm_accel_tower", default=None)

Call = tuple[Tensor, Tensor, Tensor, float]
"""Query, key and value of one attention call, [B, h, S, d] each, and its scale."""


def running_pass() -> TowerPass | None:
    """The pass of this thread's call, if there is one."""
    return _RUNNING.get()


class TowerPass:
    """Lives for one call, in the context of its thread: some towers hand no keyword arguments down to their attention.
    Nothing stays on modules, and calls in other threads have passes of their own.

    Args:
        method: what scores, and cuts or merges; None: nothing does.
        class_token: whether row 0 is a class token.
        last: the layer whose output is used.
        inside: whether patches are chosen inside the tower; otherwise they are scored only.
        parts: for each tile, the tiles of its image, which share a budget; None: each tile is an image.
        layers: the layers in which each patch sees the whole image; None: all of them.
        keeps_class: whether the class token becomes a visual token, which it then always stays.
        renumbers: whether tokens that stay are counted without gaps, so that places mean nothing but their order.
        pads: whether smaller images are padded, which the family leaves out of the values; none leave half-way there.
        watcher: name of the method for which attention of two layers is noted, or None.
        units: from the numbers of patches of tiles to the patches of each token, int64 [tokens, u] for each tile, which
            leave half-way together; None: each patch is a token.
    """

    def __init__(
        self,
        method: TowerTokens | None,
        *,
        class_token: bool,
        last: int,
        inside: bool,
        parts: Sequence[int] | None,
        layers: Sequence[int] | None,
        keeps_class: bool,
        renumbers: bool = False,
        pads: bool = False,
        watcher: str | None = None,
        units: Callable[[Sequence[int]], list[Tensor]] | None = None,
    ) -> None:
        self.method = method
        self.class_token = class_token
        self.last = last
        self.inside = inside and (method.inside if isinstance(method, TowerCut) else True)
        self.parts = parts
        whole = [layer for layer in (range(last + 1) if layers is None else layers) if layer <= last]
        self.layers = self._looked_at(whole)
        self.last_cut = self.layers[-1] if self.layers else last
        self.keeps_class = keeps_class
        self._renumbers = renumbers
        self._pads = pads
        self._units_of = units or (lambda sizes: [torch.arange(size)[:, None] for size in sizes])
        self._units: list[Tensor] = []  # of each view, int64 [t, u], the rows under way of each token
        self._moved: list[Tensor] = []  # of each tile, which patch stands in each place, int64; -1: the class token
        self._name = watcher if method is None else method.name
        self.watch = TowerWatch(whole[0], whole[-1], keeps_class) if watcher is not None else None
        self.scores: list[Tensor] = []
        self._metric: list[Tensor] = []
        self._budgets: Tensor | None = None
        self._stayed: Tensor | None = None
        self._calls: list[Call] = []
        self._valid: Tensor | None = None
        self._kept: Tensor | None = None
        self._sizes: Tensor | None = None
        self._patches = 0

    def _looked_at(self, layers: Sequence[int]) -> Sequence[int]:
        if self.method is None:
            return ()
        if isinstance(self.method, TowerCut):
            latest = min(self._latest_cut if self.inside else self.last, self._depth(self.method.depth))
            layers = [layer for layer in layers if layer <= latest] or layers[:1]
        return layers[-1:] if self.method.last_layer_only else layers

    def _depth(self, share: float) -> int:
        """The last of the first ``share`` of the layers."""
        return max(math.ceil(share * (self.last + 1)) - 1, 0)

    @property
    def _latest_cut(self) -> int:
        """The last layer after which patches may be cut: one more layer mixes what is left."""
        return max(self.last - 1, 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The tower's layers find this pass inside."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)

    def attend(
        self, base: str, module: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], given: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attention of one layer, [B, S, h, d]; rows that were cut from some images only are hidden. ``given``: the
        tower's own mask, which must hide nothing, or the same rows from all others where the tower pads."""
        seen = None if given is None else _seen(given)
        if seen is not None and not bool(seen.all()):
            if not self._pads or bool((seen != seen[:, :1]).any()):
                raise UnsupportedCallError(
                    f"{self._name} compares all patches of an image, but the tower hides some of them from others, "
                    "as the padding of smaller images; give whole images, or use fastv, dyvte or stride_tokens."
                )
            self._valid = seen[:, 0]
        query, key, value = tensors
        self.see(query, key, value, softmax_of(kwargs, query.shape[-1])["scaling"])
        mask = self.mask
        if mask is not None and not base.startswith("flash"):
            mask = mask[:, None, None]
            if base == "eager":
                mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
                    ~mask, torch.finfo(query.dtype).min
                )
        output, _ = base_function(module, base)(module, query, key, value, mask, **kwargs)
        return output

    def see(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """What the attention of the layer that runs works on, [B, h, S, d] each: the scores come from it."""
        self._calls.append((query, key, value, scaling))

    @property
    def mask(self) -> Tensor | None:
        """bool [B, S], rows that attention may see; None: all of them."""
        return self._valid

    def after(self, layer: int, hidden: Tensor) -> Tensor:
        """The output of a layer, [B, S, C], without the patches that leave here. What the model reads has all rows
        again: zeros stand where patches left."""
        calls, self._calls = self._calls, []
        watching = self.watch is not None and self.watch.sees(layer)
        if layer in self.layers or watching:
            if not calls:
                raise UnsupportedCallError(
                    f"the attention of layer {layer} of the vision tower never reached llm_accel; call "
                    "llm_accel.remove(model), set its attention implementation, then apply again."
                )
            views = [
                TowerView(*tensors, class_token=self.class_token, valid=self._valid, layer=layer, last=self.last_cut)
                for tensors in self._images(calls)
            ]
            if watching and self.watch is not None:
                self.watch.see(layer, views, self._known(len(views)))
        if layer in self.layers and self.method is not None:
            before: Sequence[Tensor | None] = self.scores or [None] * len(views)
            self.scores = [self.method.score(view, old) for view, old in zip(views, before, strict=True)]
            if isinstance(self.method, TowerMerge):
                self._metric = [self.method.metric(view) for view in views]
            if self.inside:
                hidden = self._chosen(views, hidden)
        return self._restored(hidden) if layer == self.last else hidden

    def _images(self, calls: list[Call]) -> list[Call]:
        """The attention calls of one layer, none of which holds images that do not see each other."""
        return calls

    def _known(self, views: int) -> Sequence[tuple[Tensor, int] | None]:
        """For each of the ``views`` which patches its rows are, int64 [B, n], -1 for padding, and of how many, where
        some have left; None: all are there."""
        return [None if self._kept is None else (self._kept, self._patches)] * views

    def _chosen(self, views: Sequence[TowerView], hidden: Tensor) -> Tensor:
        """The layer's output once the method has chosen among the patches of the only view, which holds all tiles."""
        assert self.method is not None
        view = views[0]
        if self._sizes is None or self._budgets is None:
            tiles, self._patches = view.patches.shape
            self._units = [one.to(hidden.device) for one in self._units_of([self._patches] * tiles)[:1]]
            tokens, unit = self._units[0].shape
            own = int(self.keeps_class)
            parts = self.parts or [1] * tiles
            budgets = [max(1, self.method.first_stage_tokens(tokens + own, part) - own) for part in parts]
            self._budgets = torch.tensor(budgets) * unit
            self._sizes = torch.full_like(self._budgets, self._patches)
        if isinstance(self.method, TowerMerge):
            return self._merge(self.method, self._budgets.tolist(), hidden)
        assert isinstance(self.method, TowerCut)
        return self._cut(view, hidden, self.method.survivors(view, self._sizes, self._budgets))

    def _merge(self, method: TowerMerge, budgets: list[int], hidden: Tensor) -> Tensor:
        offset, rows = int(self.class_token), []
        own = int(method.takes_class and self.class_token and not self.keeps_class)
        self._stayed = torch.ones_like(self.scores[0])
        for tile, kept in enumerate(budgets):
            merged = hidden[tile, offset:]
            moved = torch.arange(self._patches, device=hidden.device)
            if kept < self._patches:
                parts = method.split(self.scores[0][tile], kept, own)
                merged = method.merge(merged, parts, self._metric[0][tile])
                self._stayed[tile] = 0
                self._stayed[tile, torch.cat(parts)] = 1
                spare = (self._stayed[tile] == 0).nonzero()[:own, 0]  # the class token needs a place among the patches
                self._stayed[tile, spare] = 1
                places = torch.cat([spare, *parts])
                if self._renumbers and method.takes_class:
                    places = places.sort().values
                moved = moved.index_copy(0, places, torch.cat([torch.full_like(spare, -1), *parts]))
            self._moved.append(moved)
            full = torch.cat([hidden[tile, :offset], merged])
            rows.append(torch.cat([hidden[tile, :offset], full[moved + offset]]))
        return torch.stack(rows)

    def _cut(self, view: TowerView, hidden: Tensor, sizes: Tensor) -> Tensor:
        """Lets whole tokens leave, so that ``sizes`` patches of each tile stay, part of a token being one."""
        assert self._sizes is not None
        units, unit = self._units[0], self._units[0].shape[1]
        tokens = -(-sizes // unit)
        sizes = tokens * unit
        if torch.equal(sizes, self._sizes):
            return hidden
        width, offset = int(tokens.max()), int(self.class_token)
        means = self.scores[0][:, units].mean(-1)
        best = select_top(means[:, None], tokens.to(hidden.device), width, view.patches[:, units[:, 0]])[:, 0]
        keep = units[best].masked_fill(best[..., None] < 0, -1).flatten(1)
        self._units = [torch.arange(width * unit, device=hidden.device).view(width, unit)]
        self.scores = [gathered(self.scores[0], keep, 0.0)]
        self._kept = keep if self._kept is None else gathered(self._kept, keep, -1)
        self._sizes = sizes
        rows = torch.where(keep < 0, -1, keep + offset)
        rows = F.pad(rows, (offset, 0))
        self._valid = None if bool((tokens == width).all()) else rows >= 0
        return gathered(hidden, rows, 0.0)

    def _restored(self, hidden: Tensor) -> Tensor:
        if self._kept is None:
            return hidden
        offset = int(self.class_token)
        rows = torch.where(self._kept < 0, self._patches, self._kept)[..., None].expand(-1, -1, hidden.shape[-1])
        full = hidden.new_zeros(hidden.shape[0], self._patches + 1, hidden.shape[-1])
        full = full.scatter(1, rows, hidden[:, offset:])[:, : self._patches]
        self._valid = None
        return torch.cat([hidden[:, :offset], full], dim=1)

    def watched(self) -> list[Tensor]:
        """Per tile, what was noted of the patch in each place, fp32 [patches, 3]; of a class token nothing is."""
        assert self.watch is not None
        noted, own = self.watch.values(), int(self.keeps_class)
        if not self._moved:
            return noted
        return [
            torch.cat([one[:own], one[own:][moved.clamp(min=0)].masked_fill(moved[:, None] < 0, 0.0)])
            for one, moved in zip(noted, self._moved, strict=True)
        ]

    def values(self) -> list[Tensor]:
        """Per tile, fp32 [patches, c]: where they were chosen inside, 1 if a patch stayed and 0 if it left; else its
        score and what tells its likeness to others, for methods that merge."""
        if not self.inside:
            if not self._metric:
                return [row[:, None] for scores in self.scores for row in scores]
            known = [torch.cat([one[..., None], more], -1) for one, more in zip(self.scores, self._metric, strict=True)]
            return [row for tiles in known for row in tiles]
        stayed = torch.ones_like(self.scores[0]) if self._stayed is None else self._stayed
        if self._kept is not None:
            stayed = torch.zeros(self._kept.shape[0], self._patches + 1, device=self._kept.device)
            stayed.scatter_(1, torch.where(self._kept < 0, self._patches, self._kept), 1.0)
            stayed = stayed[:, : self._patches]
        return list(F.pad(stayed, (int(self.keeps_class), 0), value=1.0)[..., None])


def _seen(mask: Tensor) -> Tensor:
    """Which rows each row sees by the mask of a tower, bool [B, n, S]."""
    if mask.ndim == 2:  # of flash attention: which rows are real
        return mask.bool()[:, None]
    return (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]


class TowerHook:
    """Forward hook of one layer of the tower; idle in calls without a pass."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replaces the output of the layer."""
        tower = running_pass()
        if tower is None:
            return None
        if isinstance(output, tuple):
            return (tower.after(self.layer, output[0]), *output[1:])
        return tower.after(self.layer, output)


class TowerAttention:
    """The tower's own attention, seen by the running pass, if there is one."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments as the attention functions of transformers."""
        tower = running_pass()
        if tower is None:
            return base_function(module, self.base)(module, query, key, value, attention_mask, **kwargs)
        return tower.attend(self.base, module, (query, key, value), attention_mask, **kwargs), None


def tower_name(base: str) -> str:
    """The name under which the attention of a tower is wrapped."""
    return accel_name(base).replace(PREFIX, _TOWER)


def register_tower(base: str) -> str:
    """Registers the wrapper of one base implementation, with the mask of that; returns its name."""
    AttentionInterface.register(tower_name(base), TowerAttention(base))
    AttentionMaskInterface.register(tower_name(base), ALL_MASK_ATTENTION_FUNCTIONS[base])
    return tower_name(base)
