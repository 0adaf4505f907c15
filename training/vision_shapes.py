"""Shapes and colours as different authors would draw them: other proportions, turns, edges, hues, the same words."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from llm_accel.eval.tasks.vision.scenes import COLOURS, Bools, Floats

_HUES = {  # degrees, then saturation and value
    "red": ((348, 369), (0.72, 1.0), (0.55, 1.0)),
    "green": ((95, 150), (0.55, 1.0), (0.40, 1.0)),
    "blue": ((204, 246), (0.60, 1.0), (0.50, 1.0)),
    "yellow": ((48, 62), (0.65, 1.0), (0.78, 1.0)),
    "purple": ((266, 306), (0.42, 1.0), (0.42, 1.0)),
    "orange": ((19, 40), (0.75, 1.0), (0.80, 1.0)),
    "cyan": ((173, 191), (0.60, 1.0), (0.60, 1.0)),
    "white": ((0, 360), (0.0, 0.06), (0.88, 1.0)),
}
_NAMED = {  # what graphics libraries and style sheets call so
    "red": ((255, 0, 0), (220, 20, 60), (214, 39, 40), (231, 76, 60), (200, 30, 30)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34), (44, 160, 44), (46, 204, 113), (50, 205, 50)),
    "blue": ((0, 0, 255), (31, 119, 180), (65, 105, 225), (52, 152, 219), (30, 144, 255), (0, 0, 200)),
    "yellow": ((255, 255, 0), (255, 215, 0), (241, 196, 15), (255, 235, 59), (240, 230, 40)),
    "purple": ((128, 0, 128), (148, 103, 189), (155, 89, 182), (160, 32, 240), (102, 51, 153), (147, 112, 219)),
    "orange": ((255, 165, 0), (255, 127, 14), (255, 140, 0), (230, 126, 34), (243, 156, 18)),
    "cyan": ((0, 255, 255), (23, 190, 207), (0, 188, 212), (64, 224, 208), (0, 206, 209)),
    "white": ((255, 255, 255), (245, 245, 245), (236, 240, 241), (240, 240, 240)),
}
NAMED_SHARE = 0.4  # of things that have one of these colours to the bit
_FIVE = 5


def paint(rng: np.random.Generator, colour: int) -> Floats:
    """An RGB colour that goes by this name, [3] in 0..1."""
    name = COLOURS[colour]
    if rng.random() < NAMED_SHARE:
        named: Floats = np.array(_NAMED[name][rng.integers(len(_NAMED[name]))]) / 255
        return named
    hue, saturation, value = (rng.uniform(*span) for span in _HUES[name])
    return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


@dataclass(frozen=True)
class Form:
    """A shape's proportions, in units of its radius."""

    shape: str
    turn: float  # radians
    stretch: float  # width over height
    proportion: float  # of a cross: half the width of an arm; of a star: the notches' radius; of others see inside()
    detail: float  # of a cross: length of the level arm; of a square: radius of its corners; of a triangle: lean
    points: int = _FIVE

    def inside(self, x: Floats, y: Floats) -> Bools:
        """Whether points lie in the shape; the axes point right and down."""
        x = x / self.stretch
        x, y = np.cos(self.turn) * x + np.sin(self.turn) * y, np.cos(self.turn) * y - np.sin(self.turn) * x
        found: Bools
        if self.shape == "circle":
            found = x**2 + y**2 <= 1
        elif self.shape == "square":
            side, corner = self.proportion, self.detail
            out = np.hypot(np.maximum(abs(x) - side + corner, 0), np.maximum(abs(y) - side + corner, 0))
            found = out <= max(corner, 1e-6)
        elif self.shape == "triangle":  # tip at -1, base at proportion
            rise = (y + 1) / (1 + self.proportion)
            found = (y <= self.proportion) & (abs(x - self.detail * (1 - rise)) <= 0.9 * rise) & (rise >= 0)
        elif self.shape == "cross":
            upright = (abs(x) <= self.proportion) & (abs(y) <= 1)
            found = upright | (abs(y) <= self.proportion) & (abs(x) <= self.detail)
        else:  # star: below the line from a tip (radius 1) to the next notch
            half = np.pi / self.points
            angle = abs((np.arctan2(x, -y) + half) % (2 * half) - half)
            along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
            notch = self.proportion * np.cos(half), self.proportion * np.sin(half)
            found = (along - 1) * notch[1] <= across * (notch[0] - 1)
        return found


def form(rng: np.random.Generator, shape: str, plain: bool, stretch: float) -> Form:
    """A drawing of a shape; ``plain`` ones stand upright. ``stretch`` is that of the whole image."""
    kind = rng.random()
    turn = 0.0 if plain or kind < 0.4 else rng.normal(0, 0.25) if kind < 0.85 else rng.uniform(-np.pi, np.pi)
    proportion, detail, points = 1.0, 0.0, _FIVE
    if shape == "circle":
        stretch *= rng.uniform(0.92, 1.09)
    elif shape == "square":
        stretch *= rng.uniform(0.92, 1.09)
        proportion = rng.uniform(0.78, 0.95)
        detail = rng.uniform(0, 0.3) * (rng.random() < 0.3)
    elif shape == "triangle":
        stretch *= rng.uniform(0.85, 1.1)
        proportion = rng.uniform(0.5, 1.0)
        detail = rng.uniform(-0.9, 0.9) * (rng.random() < 0.12)
        turn += np.pi * (rng.random() < 0.1)
    elif shape == "cross":
        proportion = rng.uniform(0.18, 0.42)
        detail = rng.uniform(0.75, 1.0) if rng.random() < 0.2 else 1.0
        turn += np.pi / 4 * (rng.random() < 0.2)
    else:
        proportion = rng.uniform(0.36, 0.56)
        points = _FIVE + (rng.random() < 0.08)
    return Form(shape, turn, stretch, proportion, detail, points)
