"""The needle heat map: lengths on x, depth (or tasks) on y, one panel per method, one colour scale from 0 to 1."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.eval.lengths import length_label
from llm_accel.eval.plots import INK, MUTED, new_figure, strip_axes

PALETTES: dict[str, tuple[str, ...]] = {
    "classic": ("#F0496E", "#EBB839", "#0CD79F"),  # the colours that needle plots have had since 2023
    "safe": (
        "#440154",
        "#3B528B",
        "#21918C",
        "#5EC962",
        "#FDE725",
    ),  # viridis: lightness alone shows the score
}
_EMPTY = "#ECEEF0"


@dataclass(frozen=True)
class Panel:
    """One method."""

    name: str  # title of the panel
    cells: list[list[float | None]]  # mean score by row and length; None where nothing ran
    mean: float | None  # number for the title, or None


def draw(
    panels: Sequence[Panel],
    lengths: Sequence[int],
    rows: Sequence[float | str],
    title: str,
    subtitle: str = "",
    trained_length: int | None = None,
    palette: str = "classic",
    row_label: str = "needle depth in %",
    score: str = "exact match",
) -> Any:
    """A matplotlib figure.

    Args:
        rows: depths in percent, or names; the longest one sets the margin.
        trained_length: longest length the model was trained for; a dashed line stands there if the grid goes beyond.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("needle", PALETTES[palette]).with_extremes(bad=_EMPTY)
    columns = min(len(panels), 4 if len(lengths) <= 6 else 2)
    lines = math.ceil(len(panels) / columns)
    ticks = [row if isinstance(row, str) else f"{row:g}" for row in rows]
    wide = min(7.0, max(2.5, 0.42 * len(lengths)))  # inches, as all sizes here
    high = min(4.0, max(2.3, 0.27 * len(rows)))
    names = [_fitted(panel.name, round(11 * wide) - 2) for panel in panels]
    more = 0.17 * max(0, max(name.count("\n") for name in names) - 1)  # for names of three lines
    left = 0.55 + 0.065 * max(map(len, ticks))
    right, bottom, gap_x, gap_y = 0.95, 0.62, 0.3, 0.75 + more
    width = left + columns * wide + (columns - 1) * gap_x + right
    heading = textwrap.wrap(title, max(20, round((width - left) * 11)))
    top = 0.62 + 0.2 * len(heading) + (0.2 if subtitle else 0) + more
    height = top + lines * high + (lines - 1) * gap_y + bottom
    figure = new_figure(width, height)

    def box(x: float, y: float, w: float, h: float) -> Any:
        """Axes at inches from the upper left corner."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    def line(text: str, y: float, **style: Any) -> None:
        figure.text(left / width, 1 - y / height, text, va="center", **style)

    for i, text in enumerate(heading):
        line(text, 0.28 + 0.2 * i, fontsize=10.5, color=INK, weight="bold")
    if subtitle:
        line(subtitle, 0.28 + 0.2 * len(heading), fontsize=8.5, color=MUTED)
    for i, (name, panel) in enumerate(zip(names, panels, strict=True)):
        row, column = divmod(i, columns)
        axes = box(left + column * (wide + gap_x), top + row * (high + gap_y), wide, high)
        cells = [[math.nan if value is None else value for value in line] for line in panel.cells]
        image = axes.imshow(cells, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9.5, color=INK, loc="left", pad=5)
        mean = "no data" if panel.mean is None else f"{panel.mean:.3f}"
        axes.set_title(mean, fontsize=9.5, color=INK, loc="right", pad=5, weight="bold")
        _decorate(axes, lengths, ticks, row_label, bottom=i + columns >= len(panels), left=column == 0)
        _write_scores(axes, panel.cells, len(lengths), colours)
        _trained_line(axes, lengths, trained_length)
    bar = box(width - right + 0.18, top, 0.13, high)
    scale = figure.colorbar(image, cax=bar, ticks=[0, 0.25, 0.5, 0.75, 1])
    scale.outline.set_visible(False)
    bar.tick_params(labelsize=7.5, length=0, colors=MUTED)
    bar.set_ylabel(score, fontsize=8, color=MUTED)
    return figure


def _fitted(name: str, width: int) -> str:
    """A name in at most three lines of ``width`` characters, broken after its colon and commas where that fits."""
    if len(name) <= width:
        return name
    return textwrap.fill(name.replace(":", ": ").replace(",", ", "), width, max_lines=3, placeholder=" ...")


def _decorate(axes: Any, lengths: Sequence[int], rows: Sequence[str], row_label: str, bottom: bool, left: bool) -> None:
    every_x, every_y = math.ceil(len(lengths) / 16), math.ceil(len(rows) / 13)
    at_x, at_y = range(0, len(lengths), every_x), range(0, len(rows), every_y)
    axes.set_xticks(list(at_x), [length_label(lengths[i]) for i in at_x])
    axes.set_yticks(list(at_y), [rows[i] for i in at_y])
    strip_axes(axes, pad=4, labelleft=left)
    if bottom:
        axes.set_xlabel("prompt length in tokens", fontsize=8, color=MUTED)
    if left:
        axes.set_ylabel(row_label, fontsize=8, color=MUTED)
    axes.set_xticks([i + 0.5 for i in range(len(lengths) - 1)], minor=True)  # white lines between the cells
    axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if len(lengths) <= 16 else 0.5)
    axes.tick_params(which="minor", length=0)


def _write_scores(axes: Any, cells: Sequence[Sequence[float | None]], columns: int, colours: Any) -> None:
    """Percentages in the cells between 0 and 1, where they are large enough for it."""
    if columns > 12 or len(cells) > 15:
        return
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if value is not None and 0 < value < 1:
                red, green, blue, _ = colours(value)
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.45
                text = f"{100 * value:.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white" if dark else INK, alpha=0.8)


def _trained_line(axes: Any, lengths: Sequence[int], trained: int | None) -> None:
    inside = [length for length in lengths if trained is not None and length <= trained]
    if inside and len(inside) < len(lengths):
        axes.axvline(len(inside) - 0.5, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
