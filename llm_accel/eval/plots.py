"""What all plots share. matplotlib is imported where something is drawn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError

INK, MUTED = "#22252A", "#6B7178"
# Okabe and Ito's colours, told apart by colour-blind readers; the marker repeats what the colour says
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A900")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FILLS = ("full", "none", "left", "bottom")  # for series that take a colour again


def series(index: int) -> dict[str, str]:
    """Colour and marker of a line of a plot; 32 of them differ."""
    turn, place = divmod(index, len(COLOURS))
    return {"color": COLOURS[place], "marker": _MARKERS[place], "fillstyle": _FILLS[turn % len(_FILLS)]}


def new_figure(width: float, height: float, **options: Any) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look: dict[str, Any] = {"dpi": 160, "facecolor": "white"} | options
    figure = Figure(figsize=(width, height), **look)
    FigureCanvasAgg(figure)
    return figure


def strip_axes(axes: Any, **ticks: Any) -> None:
    """Axes without lines around them, with small grey labels; ``ticks``: of ``tick_params``."""
    axes.tick_params(**{"labelsize": 7.5, "length": 0, "colors": MUTED} | ticks)
    for spine in axes.spines.values():
        spine.set_visible(False)


def require_matplotlib() -> None:
    """Raises :class:`ConfigError` if nothing can be drawn here."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'llm_accel[eval]', or give --no-plot.") from error


def save(path: Path, figure: Any) -> None:
    """Writes the figure as PNG."""
    figure.savefig(path, format="png", metadata={"Software": "llm_accel"})
