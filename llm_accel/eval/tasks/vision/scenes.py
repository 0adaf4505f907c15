"""Synthetic images whose content is known: coloured shapes on a jittered grid, drawn with numpy alone.

An image is 80 x 80 pixels, 10 x 10 patches of 8 pixels. The things lie in the cells of a 4 x 4 grid that is itself
moved by up to a patch, so a thing covers parts of several patches; the background is a colour gradient with noise.

What occurs is skewed (:class:`Prior`): some shape-colour pairs are frequent, and every pair has two partners that tend
to be in the same image. A model trained on such scenes can guess, and so it can hallucinate. No pair occurs twice in a
scene, so a shape and a colour name a thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
PAIRS = len(SHAPES) * len(COLOURS)  # pair of a thing: index of its shape times 8 plus index of its colour

SIZE, PATCH, GRID, CELL = 80, 8, 4, 18  # pixels, but for GRID (cells per side)
COVER = 0.12  # a patch belongs to the things in it if they cover more than this share of it

SplitName = Literal["standard", "dense"]
SPLITS: dict[SplitName, tuple[int, int]] = {"standard": (1, 4), "dense": (8, 12)}
"""Lowest and highest number of things in a scene."""

Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

_RGB = np.array(
    [
        (0.90, 0.12, 0.12),
        (0.10, 0.70, 0.15),
        (0.15, 0.25, 0.95),
        (0.95, 0.90, 0.10),
        (0.60, 0.10, 0.75),
        (1.00, 0.52, 0.05),
        (0.10, 0.85, 0.90),
        (0.97, 0.97, 0.97),
    ]
)
_VARIANTS = 200  # drawings of each shape: radius, place in the cell and rotation differ


@dataclass(frozen=True)
class Thing:
    """A coloured shape. ``box`` is (top, left, bottom, right) in pixels, the last two exclusive."""

    shape: str
    colour: str
    row: int  # of the grid, 0 at the top
    column: int  # of the grid, 0 at the left
    box: tuple[int, int, int, int]

    @property
    def pair(self) -> int:
        """Index of its shape and colour, 0 to 39."""
        return SHAPES.index(self.shape) * len(COLOURS) + COLOURS.index(self.colour)


@dataclass(frozen=True, eq=False)
class Scene:
    """Things in reading order (top to bottom, left to right), and their image.

    ``image`` is uint8 [80, 80, 3]. ``owner`` is uint8 [80, 80]: 0 for background, else 1 + index of the thing there.
    """

    things: tuple[Thing, ...]
    image: Bytes
    owner: Bytes

    @cached_property
    def cover(self) -> Floats:
        """The share of each patch that things cover, [10, 10]."""
        n = SIZE // PATCH
        covered: Floats = (self.owner > 0).reshape(n, PATCH, n, PATCH).mean((1, 3))
        return covered

    @cached_property
    def patches(self) -> Bools:
        """Which patches a thing covers, bool [10, 10]."""
        return self.cover > COVER


@dataclass(frozen=True, eq=False)
class Prior:
    """How often pairs occur, and together: ``weights`` [40] sums to one, ``boost`` [40, 40] is 1 where nothing ties."""

    weights: Floats
    boost: Floats

    def following(self, present: Sequence[int]) -> Floats:
        """Probability of each pair to be the next object, given those ``present``, which do not occur again."""
        p: Floats = self.weights * (self.boost[list(present)].mean(0) if present else 1.0)
        p[list(present)] = 0.0
        p /= p.sum()
        return p


def _skewed(boost: float = 12.0) -> Prior:
    pair = np.arange(PAIRS)
    weights = 1.0 / ((16 * (pair // len(COLOURS)) + 7 * (pair % len(COLOURS)) + 3) % PAIRS + 4)
    ties = np.ones((PAIRS, PAIRS))
    for step in (11, -11):  # another shape, another colour
        ties[pair, (pair + step) % PAIRS] = boost
    return Prior(weights / weights.sum(), ties)


SKEWED = _skewed()
"""The most frequent pair has ten times the weight of the rarest, and a partner twelve times the weight it has alone."""


def draw_scene(rng: np.random.Generator, count: int, prior: Prior = SKEWED) -> Scene:
    """A scene of ``count`` things (1 to 16). Raises :class:`ValueError`: ``count`` does not fit into the grid."""
    if not 1 <= count <= GRID * GRID:
        raise ValueError(f"a scene has 1 to {GRID * GRID} things, got {count}")
    pairs: list[int] = []
    for _ in range(count):
        pairs.append(int(rng.choice(PAIRS, p=prior.following(pairs))))
    rng.shuffle(pairs)  # reading order says nothing of what was drawn first
    cells = np.sort(rng.choice(GRID * GRID, count, replace=False)).tolist()
    top, left = rng.integers(0, SIZE - GRID * CELL + 1, 2).tolist()
    image, owner = _background(rng), np.zeros((SIZE, SIZE), np.uint8)
    things = []
    for i, (pair, cell) in enumerate(zip(pairs, cells, strict=True)):
        shape, colour = divmod(pair, len(COLOURS))
        row, column = divmod(cell, GRID)
        mask = _masks()[shape, rng.integers(_VARIANTS)]
        y, x = top + row * CELL, left + column * CELL
        paint = np.clip(_RGB[colour] * rng.uniform(0.85, 1.0) + rng.normal(0, 0.02, 3), 0, 1)
        area = np.s_[y : y + CELL, x : x + CELL]
        image[area] += mask[..., None] * (paint - image[area])
        owner[area][mask > 0.5] = i + 1
        ys, xs = (np.flatnonzero((mask > 0.5).any(axis)) for axis in (1, 0))
        box = (y + int(ys[0]), x + int(xs[0]), y + int(ys[-1]) + 1, x + int(xs[-1]) + 1)
        things.append(Thing(SHAPES[shape], COLOURS[colour], row, column, box))
    image += 0.04 * rng.standard_normal(image.shape)
    return Scene(tuple(things), np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), owner)


def _background(rng: np.random.Generator) -> Floats:
    """A grey-ish colour with a gradient, float [80, 80, 3]."""
    colour = rng.uniform(0.25, 0.6) + rng.uniform(-0.06, 0.06, 3)
    down, across = rng.uniform(-0.08, 0.08, 2)
    line = np.linspace(-1, 1, SIZE)
    image: Floats = colour + (down * line[:, None] + across * line)[..., None]
    return image


@cache
def _masks() -> Floats:
    """Drawings of the shapes, float [5, 200, 18, 18]: the share of each pixel that is inside."""
    rng = np.random.default_rng(123)
    masks = np.empty((len(SHAPES), _VARIANTS, CELL, CELL))
    for shape, name in enumerate(SHAPES):
        for variant in range(_VARIANTS):
            radius = rng.uniform(0.40, 0.47) * CELL
            slack = CELL / 2 - radius - 0.5
            dy, dx, turn = rng.uniform(-1, 1, 3) * (slack, slack, 0.2)
            masks[shape, variant] = _mask(name, radius, dy, dx, turn)
    return masks


def _mask(shape: str, radius: float, dy: float, dx: float, turn: float) -> Floats:
    """One shape in a cell, sampled at 2 x 2 points per pixel, float [18, 18]."""
    line = (np.arange(2 * CELL) + 0.5) / 2 - CELL / 2
    x, y = (line - dx)[None, :] / radius, (line - dy)[:, None] / radius
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.84
    elif shape == "triangle":
        inside = (y <= 0.75) & (abs(x) <= 0.58 * (y + 1))
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1)
    else:  # star: below the line from a tip (radius 1) to the next notch (radius 0.42, 36 degrees on)
        half = np.pi / 5
        angle = abs((np.arctan2(x, -y) + half) % (2 * half) - half)
        along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        notch = 0.42 * np.cos(half), 0.42 * np.sin(half)
        inside = (along - 1) * notch[1] <= across * (notch[0] - 1)
    share: Floats = inside.reshape(CELL, 2, CELL, 2).mean((1, 3))
    return share
