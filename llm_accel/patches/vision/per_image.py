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
    """``features`` in the form that they have, [n, C], [B, n, C] or a sequence of [n, C] or [T, n, C], each image
    changed.

    Args:
        features: rows of all images or frames, in order.
        sizes: rows of each of them.
        change: from its index and its rows [size, C] to new rows.
    """
    elements = [features] if torch.is_tensor(features) and features.ndim == 2 else list(features)
    done, index = [], 0
    for element in elements:
        rows, changed, start = element.flatten(0, -2), [], 0
        while start < len(rows):
            changed.append(change(index, rows[start : start + sizes[index]]))
            start, index = start + sizes[index], index + 1
        done.append(torch.cat(changed).unflatten(0, (*element.shape[:-2], -1)))
    if torch.is_tensor(features):
        return done[0] if features.ndim == 2 else torch.stack(done)
    return type(features)(done)


def thinned_videos(
    features: Any, marks: Sequence[Tensor], lengths: Sequence[int], keep: Callable[[Tensor], Tensor]
) -> Any:
    """``features`` as in :func:`map_images`, with tombstones for the tokens of each video that do not stay.

    Args:
        marks: [n, c] of each frame of all videos, NaN in rows that are no patches; these stay.
        lengths: rows of each video.
        keep: from the patches of the frames of one video, fp32 [T, n, C], to which of them stay, bool [T, n].

    Raises:
        UnsupportedCallError: frames do not add up to videos, or frames of a video differ in size.
    """
    rows = torch.cat([one.flatten(0, -2) for one in features]) if not torch.is_tensor(features) else features
    rows, patch = rows.flatten(0, -2), ~torch.cat([one[:, 0].isnan() for one in marks])
    stay, start, frame = torch.ones_like(patch), 0, 0
    for length in lengths:
        first, end = frame, start
        while end < start + length and frame < len(marks):
            end, frame = end + len(marks[frame]), frame + 1
        sizes = {int((~one[:, 0].isnan()).sum()) for one in marks[first:frame]}
        if end != start + length or len(sizes) != 1:
            raise UnsupportedCallError(
                f"the frames of a video of {length} tokens cannot be told apart, or differ in size; use a method that "
                "looks at each frame alone, such as flowcut."
            )
        own = torch.arange(start, end, device=patch.device)[patch[start:end]]
        stay[own] = keep(rows[own].detach().float().view(frame - first, sizes.pop(), -1)).flatten()
        start = end
    kept = stay.split([len(one) for one in marks])
    return map_images(
        features, [len(one) for one in marks], lambda index, own: own if kept[index].all() else buried(own, kept[index])
    )


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
