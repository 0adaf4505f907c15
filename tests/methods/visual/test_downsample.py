"""How much smaller an image becomes, and where its tokens go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_accel import Downsample
from llm_accel.patches.families.resizing import places, smaller_patches


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 2000))
def test_grids_fit_the_target_and_the_image(rows: int, columns: int, budget: int) -> None:
    height, width = Downsample(budget=budget).grid(rows, columns)
    assert 1 <= height <= rows and 1 <= width <= columns and height * width <= budget
    if budget >= rows * columns:
        assert (height, width) == (rows, columns)
    if rows == columns:
        assert height == width == min(rows, int(budget**0.5))


@pytest.mark.parametrize(("budget", "side"), [(64, 8), (128, 11), (192, 13), (576, 24)])
def test_clip_at_336_pixels(budget: int, side: int) -> None:
    assert Downsample(budget=budget).grid(24, 24) == (side, side)


def test_places_are_spread_in_both_directions() -> None:
    place = places((4, 6), (2, 3), torch.device("cpu"), leading=1)
    assert place.total == 25
    assert place.rows.tolist() == [0, *(1 + 6 * row + column for row in (1, 3) for column in (1, 3, 5))]


def patchify(image: torch.Tensor, patch: int = 2, merge: int = 2) -> torch.Tensor:
    """Patches of an image [c, H, W] in the order of Qwen's processors: blocks by row, in each its patches by row."""
    height, width = (size // patch for size in image.shape[1:])
    rows = []
    for block_row in range(0, height, merge):
        for block_column in range(0, width, merge):
            for row in range(block_row, block_row + merge):
                for column in range(block_column, block_column + merge):
                    down, across = row * patch, column * patch
                    rows.append(image[:, down : down + patch, across : across + patch].flatten())
    return torch.stack(rows)


def test_patches_of_all_images_in_one_row() -> None:
    """Images of different sizes, one of them with two frames, one small enough to stay."""
    method, draw = Downsample(budget=4), torch.Generator().manual_seed(0)
    shapes = [(16, 24), (8, 8), (16, 16), (16, 16)]
    images = [torch.randn(3, *shape, generator=draw) for shape in shapes]
    grids = torch.tensor([[1, 8, 12], [1, 4, 4], [2, 8, 8]])
    got, sizes, where = smaller_patches(method, torch.cat([patchify(one) for one in images]), grids, patch=2, merge=2)
    assert sizes.tolist() == [[1, 2, 4], [1, 4, 4], [2, 4, 4]]
    smaller = [(4, 8), (8, 8), (8, 8), (8, 8)]
    wanted = [method.resize(one[None], *size)[0] for one, size in zip(images, smaller, strict=True)]
    assert torch.equal(wanted[1], method.resize(images[1][None], 8, 8)[0])
    wanted[1] = images[1]
    assert torch.allclose(got, torch.cat([patchify(one) for one in wanted]))
    assert [(len(place.rows), place.total) for place in where] == [(2, 24), (4, 4), (4, 16), (4, 16)]
