"""``get_image_features`` on a patched instance: features of dropped visual tokens come back as tombstones."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import TowerTokens, VisualTokens
from llm_accel.patches.families import VisionFamily, attribute
from llm_accel.patches.hook import DecoderHook, named
from llm_accel.patches.vision.tombstones import buried
from llm_accel.patches.vision.tower import TowerPass


class FeatureProxy:
    """Instance attribute ``get_image_features`` of the model that holds the vision tower. An object rather than a
    closure: deepcopy and pickle carry it to the copy. Its signature is that of the original, which generate reads."""

    def __init__(self, model: Any, hook: DecoderHook) -> None:
        self.model = model
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the original, with as many features."""
        original = type(self.model).get_image_features
        call = named(original, args, kwargs)
        method = self.hook.plan.tokens
        if method is None or not self.hook.enabled or self.model.training:
            return original(self.model, **call)
        family = self.hook.plan.family
        assert family is not None
        tower = self._tower(method, family, call) if isinstance(method, TowerTokens) else None
        with nullcontext() if tower is None else tower.running():
            output = original(self.model, **call)
        features = getattr(output, "pooler_output", None)
        if features is None:
            raise UnsupportedCallError("get_image_features was called with return_dict=False; leave it out.")
        if tower is None:
            device = features[0].device
            values = [torch.zeros(count, device=device) for count in family.patches(self.model, call, features)]
        else:
            values = tower.values()
        marks = family.packed(self.model, call, values)
        pruned = [_pruned(method, tower, one, mark) for one, mark in zip(features, marks, strict=True)]
        output.pooler_output = torch.stack(pruned) if torch.is_tensor(features) else type(features)(pruned)
        return output

    def _tower(self, method: TowerTokens, family: VisionFamily, call: dict[str, Any]) -> TowerPass:
        """The pass that this call takes through the tower."""
        config = self.model.config
        given: int | list[int] | None = call.get("vision_feature_layer")
        if given is None:
            given = getattr(config, "vision_feature_layer", -1)
        chosen = [given] if isinstance(given, int) else list(given or ())
        depth = len(attribute(attribute(self.model, family.tower), family.blocks))
        last = max(layer + depth if layer < 0 else layer - 1 for layer in chosen)
        strategy = call.get("vision_feature_select_strategy") or getattr(config, "vision_feature_select_strategy", None)
        tiles = family.tiles(self.model, call)
        return TowerPass(
            method,
            class_token=family.class_token,
            last=last,
            inside=family.prunable and len(chosen) == 1,
            parts=None if tiles is None else [count for count in tiles for _ in range(count)],
            layers=family.full_blocks(self.model),
            keeps_class=family.class_token and strategy == "full",
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).get_image_features)


class VideoProxy:
    """Instance attribute ``get_video_features``: videos are not pruned, and no answer should look so."""

    def __init__(self, model: Any, hook: DecoderHook) -> None:
        self.model = model
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises :class:`UnsupportedCallError`; the original inside ``Handle.disabled()``."""
        if self.hook.enabled and not self.model.training:
            raise UnsupportedCallError(
                f"{self.hook.plan.title} acts on images only; call on videos inside handle.disabled()."
            )
        return type(self.model).get_video_features(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).get_video_features)


def _pruned(method: VisualTokens, tower: TowerPass | None, features: Tensor, marks: Tensor) -> Tensor:
    """Features [n, C] of one image with tombstones for what the method does not keep. ``marks``, fp32 [n], is NaN for
    rows that are no patch; else it says what the tower has kept, or how it scored."""
    patches = (~marks.isnan()).nonzero()[:, 0]
    if tower is not None and tower.inside:
        chosen = (marks > 0.5).nonzero()[:, 0]
    else:
        scores = None if tower is None else marks[patches]
        chosen = patches[method.choose(len(patches), scores, features.device)]
    kept = marks.isnan() if method.newline == "keep" else torch.zeros_like(marks, dtype=torch.bool)
    kept[chosen] = True
    return features if len(chosen) == len(patches) else buried(features, kept)
