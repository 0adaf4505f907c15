"""Smaller images for a vision tower, and where their tokens stand among those of the full images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_accel.methods import Downsample
from llm_accel.methods.selection import evenly_spaced


class Places(NamedTuple):
    """Where the tokens of one smaller image stand.

    Attributes:
        rows: int64 [n], ascending, among the tokens of the full image.
        total: tokens of the full image.
    """

    rows: Tensor
    total: int


def places(full: tuple[int, int], smaller: tuple[int, int], device: torch.device, leading: int = 0) -> Places:
    """Tokens of a grid (rows, columns), evenly spaced in each direction among those of the ``full`` grid, behind
    ``leading`` tokens that are no patches."""
    down, across = (evenly_spaced(count, kept, device) for count, kept in zip(full, smaller, strict=True))
    index = (down[:, None] * full[1] + across).flatten() + leading
    return Places(torch.cat([torch.arange(leading, device=device), index]), leading + full[0] * full[1])


def smaller_pixels(
    method: Downsample, pixels: Tensor, side: tuple[int, int], leading: int
) -> tuple[Tensor, list[Places]]:
    """For towers that take whole images.

    Args:
        method: what decides the size.
        pixels: [B, 3, H, W].
        side: pixels of a token, down and across.
        leading: tokens before those of the patches.

    Returns:
        The smaller images, and their places.
    """
    full = pixels.shape[2] // side[0], pixels.shape[3] // side[1]
    grid = method.grid(*full)
    if grid != full:
        pixels = method.resize(pixels, grid[0] * side[0], grid[1] * side[1])
    return pixels, [places(full, grid, pixels.device, leading)] * len(pixels)


def smaller_patches(
    method: Downsample, patches: Tensor, grids: Tensor, patch: int, merge: int
) -> tuple[Tensor, Tensor, list[Places]]:
    """For towers that take the patches of all images in one row, those of a token next to each other.

    Args:
        method: what decides the size.
        patches: [sum of T * H * W, c * patch * patch].
        grids: int64 [images, 3]: T, H and W of each image, counted in patches.
        patch: pixels of a patch in each direction.
        merge: patches of a token in each direction.

    Returns:
        The patches of the smaller images, their grids, and the places of each frame.
    """
    rows, sizes, where = [], [], []
    for one, grid in zip(patches.split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
        frames, full = grid[0], (grid[1] // merge, grid[2] // merge)
        small = method.grid(*full)
        if small != full:
            blocks = one.view(frames, *full, merge, merge, -1, patch, patch)
            images = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, -1, grid[1] * patch, grid[2] * patch)
            images = method.resize(images, small[0] * merge * patch, small[1] * merge * patch)
            blocks = images.view(frames, -1, small[0], merge, patch, small[1], merge, patch)
            one = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, patches.shape[1])
        rows.append(one)
        sizes.append([frames, small[0] * merge, small[1] * merge])
        where += [places(full, small, patches.device)] * frames
    return torch.cat(rows), grids.new_tensor(sizes), where
