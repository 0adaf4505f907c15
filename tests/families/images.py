"""One image for any vision-language model, made without its processor: the forms that processors give are tried until
the model takes one and answers differently for another image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tests.families.calls import Prompt, difference, two_turns
from tests.families.shrink import VOCABULARY
from tests.tiny import prompt

TEXT_AROUND = ((5, 40), (3, 23))
IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id")


class NoImage(Exception):
    """No form of an image was taken."""


def with_image(model: PreTrainedModel) -> Prompt:
    """Two rows with an image each, padded on the left; :class:`NoImage` where no form is taken."""
    tried: list[str] = []
    for name, make in _forms(model.config):
        try:
            rows = tuple(_row(model, make, index) for index in range(len(TEXT_AROUND)))
            other = _row(model, make, 0, seed=9)
            if difference(two_turns(model, rows[0], turns=1), two_turns(model, other, turns=1)) < 1e-4:
                raise ValueError("the answer does not depend on the image")
        except Exception as error:  # another form may fit
            tried.append(f"{name}: {error}")
            continue
        return _batch(rows)
    if not tried:
        raise NoImage("the configuration names no token that stands for an image")
    raise NoImage(f"none of {len(tried)} forms of an image that the tests know is taken")


def image_token(config: PretrainedConfig) -> int | None:
    """The placeholder of visual tokens, if the configuration names one."""
    found = (getattr(config, name, None) for name in IMAGE_TOKENS)
    return next((token for token in found if isinstance(token, int)), None)


def _forms(config: PretrainedConfig) -> Iterator[tuple[str, Callable[[int], dict[str, Any]]]]:
    if image_token(config) is None:
        return
    vision = next(
        (part for name in ("vision_config", "vision_tower_config") if (part := getattr(config, name, None))), config
    )
    side, patch = _number(vision, "image_size", 28), _number(vision, "patch_size", 7)
    channels = (
        _number(vision, "in_channels", 3) if hasattr(vision, "in_channels") else _number(vision, "num_channels", 3)
    )
    frames = _number(vision, "temporal_patch_size", 1)
    merge = _number(vision, "spatial_merge_size", 2)

    def noise(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    yield "image", lambda seed: {"pixel_values": noise(seed, 1, channels, side, side)}
    yield (
        "patches",
        lambda seed: {
            "pixel_values": noise(seed, 8 * merge**2, channels * frames * patch**2),
            "image_grid_thw": torch.tensor([[1, 2 * merge, 4 * merge]]),
        },
    )
    yield (
        "tiles",
        lambda seed: {
            "pixel_values": noise(seed, 1, 5, channels, side, side),
            "image_sizes": torch.tensor([[2 * side, side + 12]]),
        },
    )
    yield (
        "images of a row",
        lambda seed: {
            "pixel_values": noise(seed, 1, 1, channels, side, side),
            "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool),
        },
    )
    yield (
        "image with its size",
        lambda seed: {
            "pixel_values": noise(seed, 1, channels, side, side),
            "image_sizes": torch.tensor([[side, side]]),
        },
    )
    yield (
        "patches with shapes",
        lambda seed: {
            "pixel_values": noise(seed, 1, 16, channels * patch**2),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    )
    yield (
        "image twice",
        lambda seed: {"pixel_values": (image := noise(seed, 1, channels, side, side)), "high_res_pixel_values": image},
    )


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, default)
    value = value[0] if isinstance(value, list | tuple) else value
    return value if isinstance(value, int) else default


def _row(model: PreTrainedModel, make: Callable[[int], dict[str, Any]], index: int, seed: int | None = None) -> Prompt:
    image = make(index + 1 if seed is None else seed)
    holder = model if hasattr(model, "get_image_features") else model.base_model
    taken = inspect.signature(holder.get_image_features).parameters
    features = holder.get_image_features(**{name: value for name, value in image.items() if name in taken})
    count = sum(one.shape[-2] if one.ndim > 1 else 1 for one in _rows(features))
    before, after = TEXT_AROUND[index]
    text = prompt(before + after, seed=20 + index)[0] % (VOCABULARY // 2) + 3
    marks = torch.full((count,), image_token(model.config))
    ids = torch.cat([text[:before], marks, text[before:]])[None]
    return Prompt(ids, None, (ids.shape[1],), image | _types(model, ids))


def _rows(features: Any) -> list[Tensor]:
    """Visual tokens of each image, [tokens, C] each."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        return list(features) if features.ndim == 3 else [features]
    return [part for one in features for part in (one if isinstance(one, Tensor) and one.ndim == 3 else [one])]


def _types(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    names = inspect.signature(model.forward).parameters
    return {"mm_token_type_ids": (ids == image_token(model.config)).int()} if "mm_token_type_ids" in names else {}


def _batch(rows: tuple[Prompt, ...]) -> Prompt:
    """The rows padded on the left, their images one after another."""
    longest = max(row.width for row in rows)
    pads = [(longest - row.width, 0) for row in rows]
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(row.ids, one) for row, one in zip(rows, pads, strict=True)])
    mask = torch.cat([pad(torch.ones_like(row.ids), one) for row, one in zip(rows, pads, strict=True)])
    extra = {
        name: torch.cat([row.extra[name] for row in rows]) for name in rows[0].extra if name != "mm_token_type_ids"
    }
    if "mm_token_type_ids" in rows[0].extra:
        types = [pad(row.extra["mm_token_type_ids"], one) for row, one in zip(rows, pads, strict=True)]
        extra["mm_token_type_ids"] = torch.cat(types)
    return Prompt(ids, mask, tuple(row.width for row in rows), extra, rows)
