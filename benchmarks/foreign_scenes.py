"""Scenes that share no drawing code with the package or its training: a look at the bundled vision model from outside.

    llm-accel vision --data scenes:benchmarks.foreign_scenes:draw --samples 240 --method dense --out DIR

The same words, drawn by Pillow's ``ImageDraw`` in the colours that CSS calls so, on a canvas of 80, 160 or 320 pixels,
with a gradient, a texture or both behind them, small or of usual size, upright or turned a little, and saved as a JPEG
of quality 40. Asked are existence, colour, shape, count and what is left of or above what; no caption, since things lie
anywhere. The look was settled before a model saw any of it, and training uses none of it.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from llm_accel.eval.tasks.vision.generators import GeneratedScene, Question, covered

NAMES = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
FORMS = ("circle", "square", "triangle", "cross", "star")
COUNTS = ("one", "two", "three", "four", "five", "six")
CANVASES = (80, 160, 320)
QUALITY = 40
SIDE = 10  # patches of the bundled model
BESIDE = 0.1  # of the canvas: two centres differ by more where left, right, above or below is asked


@dataclass(frozen=True)
class Mark:
    """One shape; position and radius as shares of the canvas."""

    form: str
    name: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        """As questions name it."""
        return f"{self.name} {self.form}"


def draw(rng: np.random.Generator) -> GeneratedScene:
    """A scene of one to six marks, all different, with the questions of five tasks."""
    marks = place(rng, int(rng.integers(1, 7)), small=bool(rng.random() < 0.4))
    size = int(rng.choice(CANVASES))
    image = behind(rng, size)
    pen, mask = ImageDraw.Draw(image), Image.new("L", (size, size))
    inked = ImageDraw.Draw(mask)
    edge = (20, 20, 20) if rng.random() < 0.25 else None
    for mark in marks:
        corners = outline(mark, float(rng.uniform(-0.25, 0.25)) if rng.random() < 0.5 else 0.0, size)
        fill = tuple(int(v) for v in COLOURS[mark.name])
        wide = max(1, size // 80)
        for corner in corners:
            pen.polygon(corner, fill=fill)
            inked.polygon(corner, fill=255)
            if edge and mark.form != "cross":
                pen.line([*corner, corner[0]], fill=edge, width=wide)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return GeneratedScene(
        Image.open(file),
        asked(rng, marks),
        objects=frozenset(mark.words for mark in marks),
        names=[f"{name} {form}" for name in NAMES for form in FORMS],
        patches=covered(np.asarray(mask), SIDE, SIDE),
    )


COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "orange": (255, 165, 0),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}


def place(rng: np.random.Generator, number: int, small: bool) -> list[Mark]:
    """Marks that do not touch; small ones are 7 to 10 of 80 pixels across, the others 12 to 20."""
    kinds = rng.permutation(len(NAMES) * len(FORMS))[:number]
    low, high = (0.044, 0.0625) if small else (0.075, 0.125)
    marks: list[Mark] = []
    for kind in kinds:
        while True:
            radius = float(rng.uniform(low, high))
            x, y = (float(v) for v in rng.uniform(radius + 0.01, 0.99 - radius, 2))
            if all(math.dist((x, y), (m.x, m.y)) > 1.1 * (radius + m.radius) for m in marks):
                break
        name, form = divmod(int(kind), len(FORMS))
        marks.append(Mark(FORMS[form], NAMES[name], x, y, radius))
    return marks


def outline(mark: Mark, turn: float, size: int) -> list[list[tuple[float, float]]]:
    """The polygons of a mark in pixels."""
    x, y, r = mark.x * size, mark.y * size, mark.radius * size
    if mark.form == "circle":
        corners = [[(math.cos(k * math.pi / 24), math.sin(k * math.pi / 24)) for k in range(48)]]
    elif mark.form == "square":
        corners = [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]]
    elif mark.form == "triangle":
        corners = [[(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]]
    elif mark.form == "cross":
        corners = [
            [(-0.3, -1.0), (0.3, -1.0), (0.3, 1.0), (-0.3, 1.0)],
            [(-1.0, -0.3), (1.0, -0.3), (1.0, 0.3), (-1.0, 0.3)],
        ]
    else:
        radii = (1.1, 0.45)
        corners = [
            [(radii[k % 2] * math.sin(k * math.pi / 5), -radii[k % 2] * math.cos(k * math.pi / 5)) for k in range(10)]
        ]
    c, s = math.cos(turn), math.sin(turn)
    return [[(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in polygon] for polygon in corners]


def behind(rng: np.random.Generator, size: int) -> Image.Image:
    """A gradient between two muted colours, a texture on one, or both."""
    first, second = (tuple(int(v) for v in rng.integers(40, 191, 3)) for _ in range(2))
    kind = rng.integers(3)
    image = Image.new("RGB", (size, size), first)
    if kind != 1:
        ramp = Image.radial_gradient("L") if rng.random() < 0.4 else Image.linear_gradient("L")
        ramp = ramp.rotate(90 * int(rng.integers(4))).resize((size, size))
        image = Image.composite(Image.new("RGB", (size, size), second), image, ramp)
    return image if kind == 0 else textured(rng, image)


def textured(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Grain, soft clouds, lines across, or tiles on an image."""
    size, kind = image.width, rng.integers(4)
    unit = size // 80
    strength = float(rng.uniform(0.1, 0.35))
    if kind < 2:
        coarse = size // unit if kind == 0 else 10
        grain = Image.fromarray(rng.integers(0, 256, (coarse, coarse)).astype(np.uint8))
        layer = grain.resize((size, size), Image.Resampling.BILINEAR)
        layer = layer.filter(ImageFilter.GaussianBlur(unit)) if kind == 1 else layer
    else:
        layer = Image.new("L", (size, size), 90)
        pen, step = ImageDraw.Draw(layer), unit * int(rng.integers(4, 12))
        for k in range(0, 2 * size, step):
            if kind == 2:
                pen.line([(k, 0), (k - size, size)], fill=200, width=max(1, step // 3))
                continue
            for j in range(k // step % 2 * step, size, 2 * step):
                pen.rectangle([j, k, j + step - 1, k + step - 1], fill=170)
    return Image.blend(image, layer.convert("RGB"), strength)


def asked(rng: np.random.Generator, marks: list[Mark]) -> tuple[Question, ...]:
    """One question of each task where there is a clear one; two of existence, with yes and no."""
    there = [mark.words for mark in marks]
    absent = [f"{name} {form}" for name in NAMES for form in FORMS if f"{name} {form}" not in there]
    found = [
        Question("existence", f"is there a {rng.choice(there)}?", "yes", "random"),
        Question("existence", f"is there a {rng.choice(absent)}?", "no", "random"),
        Question("count", "how many things are there?", COUNTS[len(marks) - 1]),
    ]
    forms, names = [mark.form for mark in marks], [mark.name for mark in marks]
    alone = [mark for mark in marks if forms.count(mark.form) == 1]
    if alone:
        mark = alone[rng.integers(len(alone))]
        found.append(Question("colour", f"what colour is the {mark.form}?", mark.name))
    alone = [mark for mark in marks if names.count(mark.name) == 1]
    if alone:
        mark = alone[rng.integers(len(alone))]
        found.append(Question("shape", f"what shape is the {mark.name} thing?", mark.form))
    return (*found, *beside(rng, marks))


def beside(rng: np.random.Generator, marks: list[Mark]) -> list[Question]:
    """Where one mark is, seen from another; none where no two are far enough apart."""
    clear = []
    for a in marks:
        for b in marks:
            if abs(a.x - b.x) > BESIDE:
                side = "left" if a.x < b.x else "right"
                clear.append(Question("spatial", f"is the {a.words} left or right of the {b.words}?", side))
            if abs(a.y - b.y) > BESIDE:
                side = "above" if a.y < b.y else "below"
                clear.append(Question("spatial", f"is the {a.words} above or below the {b.words}?", side))
    return [clear[rng.integers(len(clear))]] if clear else []
