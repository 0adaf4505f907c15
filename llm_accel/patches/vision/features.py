"""Feature functions on a patched instance: features of dropped visual tokens come back as tombstones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llm_accel.methods import (
    Downsample,
    TowerCut,
    TowerMerge,
    TowerTokens,
    VideoTokens,
    VisualInput,
    VisualTokens,
)
from llm_accel.patches.cache_name import named
from llm_accel.patches.families import VisionFamily, attribute, video_lengths
from llm_accel.patches.hook import DecoderHook
from llm_accel.patches.vision.packed import PackedPass
from llm_accel.patches.vision.per_image import features_of, map_images, place_features, thinned_videos
from llm_accel.patches.vision.tombstones import buried
from llm_accel.patches.vision.tower import TowerPass
from llm_accel.patches.vision.watch import MARKS, SHOWN

# some models' functions for videos call those for images
_ENTERED: ContextVar[bool] = ContextVar("llm_accel_features", default=False)


class FeatureProxy:
    """Instance attribute ``name``, one of :data:`FEATURES`, of the model that holds the vision tower. An object rather
    than a closure: deepcopy and pickle carry it to the copy. Its signature is that of the original, which generate
    reads."""

    def __init__(self, model: Any, hook: DecoderHook, name: str) -> None:
        self.model = model
        self.hook = hook
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the original, with as many features."""
        original = getattr(type(self.model), self.name)
        call = named(original, args, kwargs)
        method = self.hook.plan.tokens
        idle = method is None and not self.hook.plan.reads_tower
        if idle or not self.hook.enabled or self.model.training or _ENTERED.get():
            return original(self.model, **call)
        token = _ENTERED.set(True)
        try:
            return self._reduced(method, original, call)
        finally:
            _ENTERED.reset(token)

    def _reduced(self, method: VisualInput | None, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        family = self.hook.plan.family
        assert family is not None
        if isinstance(method, Downsample):
            call, where = family.smaller(self.model, call, method)
            return place_features(original(self.model, **call), where)
        reads = isinstance(method, TowerTokens) or self.hook.plan.reads_tower
        tower = self._tower(method if isinstance(method, TowerTokens) else None, family, call) if reads else None
        with nullcontext() if tower is None else tower.running():
            output = original(self.model, **call)
        if tower is not None and tower.watch is not None:
            self._mark(family, call, tower.watched(), output)
        if method is None:
            return output
        if isinstance(method, VideoTokens):
            self._thin(method, family, call, output)
            return output
        assert isinstance(method, VisualTokens)
        tower = tower if isinstance(method, TowerTokens) else None
        features = features_of(output)
        values = self._nothing_known(family, call, features) if tower is None else tower.values()
        marks = family.packed(self.model, call, values)
        tiles = map(len, family.units(self.model, call, [len(one) for one in values]))
        totals = [sum(islice(tiles, count)) for count in family.tiles(self.model, call) or [1] * len(marks)]

        def pruned(index: int, rows: Tensor) -> Tensor:
            return _pruned(method, tower, rows, marks[index], totals[index])

        output.pooler_output = map_images(features, [len(mark) for mark in marks], pruned)
        return output

    def _nothing_known(self, family: VisionFamily, call: dict[str, Any], features: Any) -> list[Tensor]:
        """Values for the patches of each tile or frame where no tower was looked at, fp32 [patches, 1]."""
        counts = family.patches(self.model, call, features)
        return [torch.zeros(count, 1, device=features[0].device) for count in counts]

    def _thin(self, method: VideoTokens, family: VisionFamily, call: dict[str, Any], output: Any) -> None:
        """Takes tokens out of the videos in ``output``; images stay as they are."""
        if self.name != "get_video_features":
            return
        features = features_of(output)
        marks = family.packed(self.model, call, self._nothing_known(family, call, features))
        lengths = video_lengths(call, features, sum(map(len, marks)))
        output.pooler_output = thinned_videos(features, marks, lengths, method.keep)

    def _mark(self, family: VisionFamily, call: dict[str, Any], values: list[Tensor], output: Any) -> None:
        """Tells the running call of the model what the tower attended to, or a later one by what lies beside the
        features in ``output``."""
        shown, method = SHOWN.get(), self.hook.plan.weight_shift
        assert method is not None
        marks = []
        for one in family.packed(self.model, call, values):
            own = one.isfinite().all(-1)  # rows that end a line of tiles are no patches
            known = one[own]
            found = torch.zeros(len(one), dtype=torch.int8, device=one.device)
            found[own] = method.tower_marks(known[:, 0], known[:, 1], known[:, 2] > 0)
            marks.append(found)
        if shown is not None:
            shown.add(self.name, marks)
        output[MARKS] = tuple(marks)

    def _tower(self, method: TowerTokens | None, family: VisionFamily, call: dict[str, Any]) -> TowerPass:
        """The pass that this call takes through the tower."""
        config, plan = self.model.config, self.hook.plan
        given: int | list[int] | None = call.get("vision_feature_layer")
        if given is None:
            given = getattr(config, "vision_feature_layer", -1)
        chosen = [given] if isinstance(given, int) else list(given or ())
        depth = len(attribute(attribute(self.model, family.tower), family.blocks))
        last = max(layer + depth if layer < 0 else layer - 1 for layer in chosen)
        tiles = family.tiles(self.model, call)
        kind: type[TowerPass] = PackedPass if family.packed_rows else TowerPass
        prunable = family.cuttable(call) if isinstance(method, TowerCut) else family.prunable
        return kind(
            method,
            class_token=family.class_token,
            last=last,
            inside=prunable and len(chosen) == 1,
            parts=None if tiles is None else [count for count in tiles for _ in range(count)],
            layers=family.full_blocks(self.model),
            keeps_class=family.keeps_class(self.model, call),
            renumbers=plan.renumbers,
            pads=family.pads,
            units=partial(family.units, self.model, call),
            watcher=plan.weight_shift.name if plan.weight_shift is not None and plan.reads_tower else None,
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.model), self.name))


def _pruned(method: VisualTokens, tower: TowerPass | None, features: Tensor, marks: Tensor, total: int) -> Tensor:
    """Features [n, C] of one image or frame with tombstones for what the method does not keep. ``marks``, fp32 [n, c],
    is NaN for rows that are no patch; else it says what the tower has kept, or what it knows of each. ``total``:
    tokens of all tiles of the image, which shared its budget where the tower has chosen."""
    newline = marks[:, 0].isnan()
    patches = (~newline).nonzero()[:, 0]
    if tower is not None and tower.inside:
        chosen = (marks[:, 0] > 0.5).nonzero()[:, 0]
    else:
        total = len(patches)
        scores = None if tower is None else marks[patches, 0]
        chosen = patches[method.choose(len(patches), scores, features.device)]
    two_stages = method.first_stage_tokens(total) > method.tokens(total)
    surplus = max(0, len(chosen) - method.tokens(len(patches))) if two_stages else 0
    if surplus and len(chosen) == len(patches):  # all that left was padding: one token leaves to tell of the others
        chosen, surplus = chosen[:-1], surplus - 1
    if len(chosen) == len(patches):
        return features
    if isinstance(method, TowerMerge) and tower is not None and not tower.inside:
        parts = method.split(marks[patches, 0], len(chosen))
        features = features.index_copy(0, patches, method.merge(features[patches], parts, marks[patches, 1:]))
    kept = newline if method.newline == "keep" else torch.zeros_like(newline)
    kept[chosen] = True
    return buried(features, kept, surplus)
