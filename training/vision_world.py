"""Scenes of many styles for training: the same words, drawn the way many different authors and cameras would.

Things lie anywhere, not only in the cells of one grid, are 7 to 36 pixels across, turned, outlined, shaded, overlap a
little; backgrounds have gradients, textures and colours of their own; the image is blurred, noisy, pale or a JPEG. What
a scene holds stays known: its owner per pixel, and where each thing lies. The things are in reading order where rows
are clear (:attr:`World.clear`); elsewhere captions are not asked.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageFilter

from llm_accel.eval.tasks.vision.scenes import (
    COLOURS,
    COVER,
    PAIRS,
    PATCH,
    SHAPES,
    SIZE,
    SKEWED,
    Bools,
    Floats,
    Prior,
    Scene,
    Thing,
)
from training.vision_shapes import Form, form, paint
from training.vision_textures import background, clutter

ROW, APART = 6.0, 9.0  # pixels: most between centres within a row, least between neighbours of different rows
OWN = 0.2  # a patch also belongs to a thing if this share of the thing lies in it
CONTRAST = 0.25  # by which some channel of a thing differs from what is behind it; else it gets an outline
SMALLEST = 7.0  # pixels across
LEVEL = Prior(np.full(PAIRS, 1 / PAIRS), np.ones((PAIRS, PAIRS)))
"""Every pair is as frequent as any other."""


@dataclass(frozen=True, eq=False)
class World(Scene):
    """A scene of any style. ``row`` of its things is the one they read in, ``column`` their place in that row."""

    clear: bool

    @cached_property
    def patches(self) -> Bools:
        """Also patches that hold much of a thing that is small, so that each thing has one at least."""
        n = SIZE // PATCH
        found: Bools = self.cover > COVER
        for i in range(len(self.things)):
            own = (self.owner == i + 1).reshape(n, PATCH, n, PATCH).sum((1, 3))
            found = found | (own > OWN * max(1, own.sum()))
        return found


@dataclass(frozen=True)
class _Place:
    x: float
    y: float
    radius: float


def draw_world(rng: np.random.Generator, count: int) -> World:
    """A scene of ``count`` things (1 to 12) of a random style."""
    places = _grid(rng, count) if rng.random() < 0.5 else _free(rng, count)
    rows, clear = _rows(places)
    places = [places[i] for row in rows for i in row]
    pairs = _pairs(rng, count)
    image, owner = background(rng), np.zeros((SIZE, SIZE), np.uint8)
    if rng.random() < 0.25:
        clutter(rng, image)
    style = _Style.draw(rng)
    things = []
    columns = [(r, c) for r, row in enumerate(rows) for c in range(len(row))]
    for i, (pair, place, (row, column)) in enumerate(zip(pairs, places, columns, strict=True)):
        shape, colour = divmod(pair, len(COLOURS))
        own = _draw(rng, image, style, form(rng, SHAPES[shape], style.plain, style.stretch), colour, place)
        owner[own] = i + 1
        ys, xs = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        box = (int(ys[0]), int(xs[0]), int(ys[-1]) + 1, int(xs[-1]) + 1)
        things.append(Thing(SHAPES[shape], COLOURS[colour], row, column, box))
    if rng.random() < 0.08:
        clutter(rng, image)
    seen = len(np.unique(owner[owner > 0]))
    if seen < count:  # one lies wholly under another
        return draw_world(rng, count)
    return World(tuple(things), _camera(rng, image), owner, clear)


def _pairs(rng: np.random.Generator, count: int) -> list[int]:
    """What a scene holds: as skewed as the other scenes or level; a pair may occur twice in few of them."""
    prior = SKEWED if rng.random() < 0.5 else LEVEL
    again = rng.random() < 0.12
    pairs: list[int] = []
    for _ in range(count):
        if again and pairs and rng.random() < 0.3:
            pairs.append(pairs[int(rng.integers(len(pairs)))])
        else:
            pairs.append(int(rng.choice(PAIRS, p=prior.following(pairs))))
    rng.shuffle(pairs)
    return pairs


def _size(rng: np.random.Generator, count: int) -> float:
    """The usual diameter of the things of a scene, in pixels."""
    most = 34.0 if count <= 3 else 26.0 if count <= 6 else 18.0
    return float(np.exp(rng.uniform(np.log(8.0), np.log(most))))


def _grid(rng: np.random.Generator, count: int) -> list[_Place]:
    """Places in the cells of a grid of 1 to 5 rows and columns, moved by up to 3 pixels each."""
    fitting = [(r, c) for r in range(1, 6) for c in range(1, 6) if r * c >= count and max(r, c) >= 2]
    rows, columns = fitting[rng.integers(len(fitting))]
    margin = rng.uniform(0, 6)
    high, wide = (SIZE - 2 * margin) / rows, (SIZE - 2 * margin) / columns
    size = min(_size(rng, count), 0.98 * min(high, wide))
    places = []
    for cell in rng.permutation(rows * columns)[:count].tolist():
        radius = max(SMALLEST, min(size * rng.uniform(0.8, 1.2), min(high, wide))) / 2
        slack = [min(3.0, max(0.0, pitch / 2 - radius)) for pitch in (high, wide)]
        y, x = (rng.uniform(-s, s) for s in slack)
        down, across = cell // columns + 0.5, cell % columns + 0.5
        places.append(_Place(margin + across * wide + x, margin + down * high + y, radius))
    return places


def _free(rng: np.random.Generator, count: int) -> list[_Place]:
    """Places anywhere, at most a little overlapping; things get smaller where they do not fit."""
    near = 1.0 if rng.random() < 0.7 else 0.82
    size = _size(rng, count)
    places: list[_Place] = []
    while len(places) < count:
        for _ in range(20):
            radius = max(SMALLEST, size * rng.uniform(0.75, 1.3)) / 2
            x, y = rng.uniform(radius - 0.5, SIZE - radius + 0.5, 2)
            if all(np.hypot(x - p.x, y - p.y) >= near * (radius + p.radius) for p in places):
                places.append(_Place(float(x), float(y), radius))
                break
        else:
            size *= 0.85
    return places


def _rows(places: Sequence[_Place]) -> tuple[list[list[int]], bool]:
    """The places in reading order, row by row, and whether the rows are clear."""
    order = sorted(range(len(places)), key=lambda i: places[i].y)
    rows = [[order[0]]]
    clear = True
    for before, i in itertools.pairwise(order):
        gap = places[i].y - places[before].y
        if gap > ROW:
            rows.append([])
            clear &= gap >= APART
        rows[-1].append(i)
    clear &= all(places[row[-1]].y - places[row[0]].y <= ROW for row in rows)
    return [sorted(row, key=lambda i: places[i].x) for row in rows], clear


@dataclass(frozen=True)
class _Style:
    """What the things of a scene have in common."""

    plain: bool  # upright
    stretch: float  # of the whole image
    samples: int  # per side of a pixel; one gives hard edges
    outline: float  # pixels
    line: Floats  # colour of outlines
    shading: float
    shadow: float
    blend: float  # opacity

    @staticmethod
    def draw(rng: np.random.Generator) -> _Style:
        def some(p: float, low: float, high: float) -> float:
            return float(rng.uniform(low, high)) if rng.random() < p else 0.0

        dark = rng.random() < 0.75
        return _Style(
            plain=bool(rng.random() < 0.4),
            stretch=float(np.exp(some(0.2, -0.28, 0.28))),
            samples=1 if rng.random() < 0.35 else 3,
            outline=some(0.3, 0.7, 2.0),
            line=np.full(3, rng.uniform(0, 0.25) if dark else rng.uniform(0.75, 1)),
            shading=some(0.35, 0.05, 0.3),
            shadow=some(0.2, 0.15, 0.6),
            blend=1.0 - some(0.15, 0.0, 0.15),
        )


def _draw(rng: np.random.Generator, image: Floats, style: _Style, drawn: Form, colour: int, place: _Place) -> Bools:
    """Paint one thing; returns the pixels that are its own, bool [80, 80]."""
    reach = place.radius * 1.5 + 4
    top, left = (max(0, int(c - reach)) for c in (place.y, place.x))
    bottom, right = (min(SIZE, int(c + reach) + 1) for c in (place.y, place.x))
    area = image[top:bottom, left:right]
    n = style.samples
    wide = max(drawn.stretch, 1.0)
    y = ((np.arange((bottom - top) * n) + 0.5) / n + top - place.y)[:, None] * (wide / place.radius)
    x = ((np.arange((right - left) * n) + 0.5) / n + left - place.x)[None, :] * (wide / place.radius)

    def share(x: Floats, y: Floats) -> Floats:
        inside = drawn.inside(*np.broadcast_arrays(x, y))
        found: Floats = inside.reshape(bottom - top, n, right - left, n).mean((1, 3))
        return found

    mask = share(x, y)
    if style.shadow:
        step = 2.0 * wide / place.radius
        fall = np.array(Image.fromarray((share(x - step, y - step) * 255).astype(np.uint8)).filter(_SOFT)) / 255
        area *= 1 - style.shadow * fall[..., None]
    behind = (area * mask[..., None]).sum((0, 1)) / max(mask.sum(), 1e-6)
    fill = paint(rng, colour)
    for _ in range(6):
        if abs(fill - behind).max() >= CONTRAST:
            break
        fill = paint(rng, colour)
    outline, line = style.outline if place.radius > 5 else min(style.outline, 1.0), style.line
    if abs(fill - behind).max() < CONTRAST:
        outline, line = max(outline, 1.0), np.zeros(3)
    tone = np.ones(mask.shape)
    if style.shading:
        turn = rng.uniform(0, 2 * np.pi)
        slope = (np.cos(turn) * x[:, n // 2 :: n] + np.sin(turn) * y[n // 2 :: n]) / wide
        tone = 1 - style.shading * np.clip(0.5 + 0.5 * slope, 0, 1)
    inner = fill * tone[..., None]
    if outline:
        smaller = 1 / max(0.4, 1 - outline / place.radius)
        core = share(x * smaller, y * smaller)[..., None]
        inner = core * inner + (1 - core) * line
    area += (style.blend * mask)[..., None] * (inner - area)
    own = np.zeros((SIZE, SIZE), bool)
    own[top:bottom, left:right] = mask > 0.5 if (mask > 0.5).any() else mask == mask.max()
    return own


_SOFT = ImageFilter.GaussianBlur(1.2)


def _camera(rng: np.random.Generator, image: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """What happens to an image between an author and a model: uint8 [80, 80, 3]."""
    if rng.random() < 0.3:
        image = 0.5 + (image - 0.5) * rng.uniform(0.7, 1.15) + rng.uniform(-0.08, 0.08) + rng.uniform(-0.03, 0.03, 3)
    if rng.random() < 0.5:
        image = image + rng.uniform(0.005, 0.09) * rng.standard_normal(image.shape)
    drawn = Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.2:
        drawn = drawn.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    if rng.random() < 0.6:
        file = io.BytesIO()
        drawn.save(file, "JPEG", quality=int(rng.integers(30, 96)))
        drawn = Image.open(file)
    return np.asarray(drawn.convert("RGB"))
