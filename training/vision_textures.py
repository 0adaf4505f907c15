"""Backgrounds of training scenes: gradients, textures and clutter without a name."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from llm_accel.eval.tasks.vision.scenes import SIZE, Floats

_SCALES = ((4, 1.0), (9, 0.7), (20, 0.5), (44, 0.35))  # of a photo: cells per side, strength
_LINE = (np.arange(SIZE) + 0.5) / SIZE
_X, _Y = np.broadcast_arrays(_LINE[None, :], _LINE[:, None])


def background(rng: np.random.Generator) -> Floats:
    """A base of one colour or two in a gradient, and a texture on most of them, float [80, 80, 3]."""
    kind = rng.random()
    if kind < 0.25:
        share = np.zeros((SIZE, SIZE))
    elif kind < 0.7:
        turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else np.pi / 2 * rng.integers(4)
        share = _spread(np.cos(turn) * _X + np.sin(turn) * _Y)
    else:
        y, x = rng.uniform(0, 1, 2) if rng.random() < 0.5 else (0.5, 0.5)
        share = _spread(np.hypot(_X - x, _Y - y))
    first = _colour(rng)
    second = _colour(rng) if rng.random() < 0.5 else np.clip(first + rng.uniform(-0.4, 0.4), 0, 1)
    image = first + share[..., None] * (second - first)
    if rng.random() < 0.7:
        image = image + _texture(rng)
    return np.clip(image, 0, 1)


def clutter(rng: np.random.Generator, image: Floats) -> None:
    """Thin lines and dots, in place."""
    for _ in range(int(rng.integers(2, 14))):
        colour = _colour(rng) if rng.random() < 0.6 else rng.uniform(0, 1, 3)
        opacity = rng.uniform(0.3, 1.0)
        if rng.random() < 0.5:
            y, x = rng.integers(0, SIZE - 1, 2)
            size = int(rng.integers(1, 3))
            spot = image[y : y + size, x : x + size]
        else:
            y, x = rng.uniform(0, SIZE, 2)
            turn, length = rng.uniform(0, np.pi), rng.uniform(5, 60)
            along = np.arange(0, length, 0.5)
            ys, xs = (y + np.sin(turn) * along).astype(int), (x + np.cos(turn) * along).astype(int)
            kept = (ys >= 0) & (ys < SIZE) & (xs >= 0) & (xs < SIZE)
            image[ys[kept], xs[kept]] = (1 - opacity) * image[ys[kept], xs[kept]] + opacity * colour
            continue
        spot += opacity * (colour - spot)


def _spread(values: Floats) -> Floats:
    low, high = values.min(), values.max()
    found: Floats = (values - low) / (high - low)
    return found


def _colour(rng: np.random.Generator) -> Floats:
    """Grey, dark, light or muted; few are strong."""
    kind = rng.random()
    if kind < 0.4:
        return np.clip(rng.uniform(0.02, 0.98) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    saturation = rng.uniform(0.05, 0.45) if kind < 0.85 else rng.uniform(0.4, 0.9)
    return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.1, 0.98)))


def _smooth(rng: np.random.Generator, cells: int, channels: int) -> Floats:
    """Noise of so many cells per side, blown up smoothly, float [80, 80, channels]."""
    small = rng.standard_normal((cells, cells, channels)).astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(small[..., i]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for i in range(channels)
    ]
    return np.stack(planes, -1).astype(np.float64)


def _texture(rng: np.random.Generator) -> Floats:
    """Noise, a photo's mixture of scales, stripes, checks, blobs or dots, float [80, 80, 3] around 0."""
    kind = rng.choice(6, p=[0.2, 0.3, 0.17, 0.15, 0.1, 0.08])
    strength = rng.uniform(0.02, 0.2)
    tint = rng.uniform(0.5, 1.0, 3) if rng.random() < 0.4 else np.ones(3)
    if kind == 0:
        channels = 3 if rng.random() < 0.5 else 1
        cells = int(rng.choice([SIZE, SIZE // 2, SIZE // 4]))
        return np.asarray(strength * 0.7 * tint * _smooth(rng, cells, channels))
    if kind == 1:
        channels = 3 if rng.random() < 0.4 else 1
        total = sum(
            _smooth(rng, cells, channels) * scale for cells, scale in ((4, 1.0), (9, 0.7), (20, 0.5), (44, 0.35))
        )
        return np.asarray(strength * 0.8 * tint * total)
    if kind == 2:
        turn = rng.uniform(0, np.pi) if rng.random() < 0.5 else np.pi / 2 * rng.integers(2)
        wave = np.sin(2 * np.pi * ((np.cos(turn) * _X + np.sin(turn) * _Y) * rng.uniform(2, 20) + rng.random()))
        if rng.random() < 0.5:
            wave = np.sign(wave)
    elif kind == 3:
        cell = int(rng.integers(3, 21))
        dy, dx = rng.integers(0, cell, 2)
        line = np.arange(SIZE)
        wave = 1.0 - 2.0 * (((line[:, None] + dy) // cell + (line[None, :] + dx) // cell) % 2)
    elif kind == 4:
        wave = np.tanh(2 * _smooth(rng, int(rng.integers(4, 14)), 1)[..., 0])
    else:
        step = int(rng.integers(4, 14))
        line = np.arange(SIZE) % step
        wave = 2.0 * (np.hypot(line[:, None] - step / 2, line[None, :] - step / 2) < rng.uniform(0.8, step / 3)) - 1
    return np.asarray(strength * 0.8 * tint * wave[..., None])
