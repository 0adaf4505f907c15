"""What a feature function returns, image by image or frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.families import Places
from llm_accel.patches.vision.tombstones import buried


def features_of(output: Any) -> Any:
    """The features in what a feature function returned."""
    features = getattr(output, "pooler_output", None)
    if features is None:
        raise UnsupportedCallError("features were asked for with return_dict=False; leave it out.")
    return features


def map_images(features: Any, sizes: Sequence[int], change: Callable[[int, Tensor], Tensor]) -> Any:
    """``features`` in the form that they have, [n, C], [B, n, C] or a sequence of [n, C], each image changed.

    Args:
        features: rows of all images or frames, in order.
        sizes: rows of each of them.
        change: from its index and its rows [size, C] to new rows.
    """
    elements = [features] if torch.is_tensor(features) and features.ndim == 2 else list(features)
    done, index = [], 0
    for element in elements:
        changed, start = [], 0
        while start < len(element):
            changed.append(change(index, element[start : start + sizes[index]]))
            start, index = start + sizes[index], index + 1
        done.append(torch.cat(changed))
    if torch.is_tensor(features):
        return done[0] if features.ndim == 2 else torch.stack(done)
    return type(features)(done)


def place_features(output: Any, where: Sequence[Places]) -> Any:
    """The output of a call with smaller images, their features in their places and tombstones in all others."""
    sizes = [len(place.rows) for place in where]
    if sizes == [place.total for place in where]:
        return output
    output.pooler_output = map_images(
        features_of(output), sizes, lambda index, rows: _placed(rows, where[index], bury=True)
    )
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [
            map_images(level, sizes, lambda index, rows: _placed(rows, where[index]))
            for level in output.deepstack_features
        ]
    return output


def _placed(features: Tensor, place: Places, bury: bool = False) -> Tensor:
    """Features [n, C] of a smaller image as [total, C]; between them tombstones, or zeros."""
    full = features.new_zeros(place.total, features.shape[1]).index_copy(0, place.rows, features)
    if not bury:
        return full
    kept = torch.zeros(place.total, dtype=torch.bool, device=features.device)
    kept[place.rows] = True
    return buried(full, kept)
