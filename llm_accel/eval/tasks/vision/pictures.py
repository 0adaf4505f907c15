"""One picture per method: which patches of a few scenes stay in the language model to its last layer."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_accel.eval.plots import INK, MUTED, new_figure
from llm_accel.eval.records import Record
from llm_accel.eval.tasks.vision.examples import Example

_FRAME = "#D55E00"


def file_name(method: str) -> str:
    """``kept-flowcut-ratio-0.33.png``"""
    return f"kept-{re.sub(r'[^A-Za-z0-9_.]+', '-', method)}.png"


def draw(method: str, shown: Sequence[tuple[Example, Record]]) -> Any:
    """A matplotlib figure: above each scene, below it what is left; patches that left are faded to white, those that
    things cover are framed. Where heads keep different tokens, patches fade by the share of heads that lost them.

    Args:
        shown: examples with ``patches``, and records with as many ``kept`` shares.
    """
    wide, head = 2.1, 0.75
    figure = new_figure(0.3 + wide * len(shown), head + 2 * wide + 0.65)
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.25 / height, method, fontsize=10.5, color=INK, weight="bold", va="center")
    legend = "patches that reach the last layer; framed: a thing is there"
    figure.text(0.15 / width, 1 - 0.5 / height, legend, fontsize=8, color=MUTED, va="center")
    for column, (example, record) in enumerate(shown):
        assert example.patches is not None
        kept = np.asarray(record["kept"]).reshape(example.patches.shape)
        for row in range(2):
            x, y = 0.15 + column * wide + 0.05, head + row * wide
            axes = figure.add_axes(
                (x / width, 1 - (y + wide - 0.1) / height, (wide - 0.1) / width, (wide - 0.1) / height)
            )
            axes.set_axis_off()
            axes.imshow(example.image if row == 0 else faded(example.image, kept), interpolation="nearest")
            if row:
                _frame(axes, example.patches, *np.divide(example.image.shape[:2], example.patches.shape))
        asked = f"{example.question} {record['answer']}"
        recall = "" if record["patch_recall"] is None else f"{record['patch_recall']:.0%} of framed kept"
        text = f"{kept.sum():.0f} of {kept.size} kept, {recall}\n{textwrap.shorten(asked, 60)}"
        figure.text(
            (0.2 + column * wide) / width,
            0.55 / height,
            "\n".join(textwrap.wrap(text.splitlines()[0], 40) + textwrap.wrap(text.splitlines()[1], 34)),
            fontsize=6.5,
            color=MUTED,
            va="top",
        )
    return figure


def faded(image: Any, kept: Any) -> Any:
    """``image``, uint8 [H, W, 3], white where the share ``kept`` of a patch, [rows, columns], is 0."""
    y, x = (np.arange(size) * n // size for size, n in zip(image.shape, kept.shape, strict=False))
    share = kept[np.ix_(y, x)][..., None]
    share = 0.08 + 0.92 * share
    return np.round(image * share + 255 * (1 - share)).astype(np.uint8)


def _frame(axes: Any, covered: Any, height: float, width: float) -> None:
    """A line around the covered patches; the size of one is in pixels."""
    wide = np.pad(covered, 1)
    for row, column in np.argwhere(covered):
        top, left = row * height - 0.5, column * width - 0.5
        sides = {
            (-1, 0): ([left, left + width], [top, top]),
            (1, 0): ([left, left + width], [top + height, top + height]),
            (0, -1): ([left, left], [top, top + height]),
            (0, 1): ([left + width, left + width], [top, top + height]),
        }
        for (down, right), (x, y) in sides.items():
            if not wide[row + 1 + down, column + 1 + right]:
                axes.plot(x, y, color=_FRAME, linewidth=1.0)
