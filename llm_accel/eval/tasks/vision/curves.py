"""Accuracy against visual tokens: a panel per task, a line per method."""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
from typing import Any

from llm_accel.eval.plots import INK, MUTED, new_figure, series, strip_axes
from llm_accel.eval.tasks.vision.settings import parse_method
from llm_accel.methods.visual.base import VisualBudget
from llm_accel.registry import spec_of

_FLAT = {"dense": ("-", INK), "blind": (":", MUTED), "blank": ("-.", MUTED)}


def family(spec: str) -> str:
    """A method without its budget: one line of the plot."""
    open_ = [
        replace(config, budget=None, ratio=None) if isinstance(config, VisualBudget) else config
        for config in parse_method(spec)
    ]
    return spec_of(open_)


def draw(summary: dict[str, Any], title: str) -> Any:
    """A matplotlib figure. Dense, blind and blank are lines across, which have no choice of tokens; bars and the band
    around dense are 95 % intervals."""
    methods = {spec: entry for spec, entry in summary["methods"].items() if entry["n"]}
    tasks = list(dict.fromkeys(task for entry in methods.values() for task in entry["tasks"]))
    lines: dict[str, list[dict[str, Any]]] = {}
    for spec, entry in methods.items():
        if spec not in _FLAT:
            lines.setdefault(family(spec), []).append(entry)
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(1.2 + 3.3 * columns, 1.6 + 2.6 * rows, layout="constrained")
    width = 30 * columns
    figure.suptitle(textwrap.fill(title, width), fontsize=10.5, color=INK, weight="bold", x=0.01, ha="left")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(panels.flat):
        if place < len(tasks):
            _panel(axes, tasks[place], methods, lines)
            if place + columns >= len(tasks):
                axes.set_xlabel("visual tokens per decoder layer, mean", fontsize=8, color=MUTED)
                axes.tick_params(labelbottom=True)
        else:
            axes.set_visible(False)
    figure.supylabel("exact match", fontsize=8.5, color=MUTED)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=7.5, frameon=False)
    return figure


def _panel(axes: Any, task: str, methods: dict[str, Any], lines: dict[str, list[dict[str, Any]]]) -> None:
    axes.set_title(task, fontsize=9.5, color=INK, loc="left")
    for spec, (style, colour) in _FLAT.items():
        found = methods.get(spec, {"tasks": {}})["tasks"].get(task)
        if found:
            axes.axhline(found["exact"], linestyle=style, color=colour, linewidth=1.2, label=spec)
            if spec == "dense":
                axes.axhspan(*found["ci95"], color=colour, alpha=0.08, linewidth=0)
    for i, (name, entries) in enumerate(lines.items()):
        points = sorted((e["visual_per_layer"], e["tasks"][task]) for e in entries if task in e["tasks"])
        if not points:
            continue
        height = [point["exact"] for _, point in points]
        low, high = zip(*(point["ci95"] for _, point in points), strict=True)
        bars = [[h - x for h, x in zip(height, low, strict=True)], [x - h for h, x in zip(height, high, strict=True)]]
        axes.errorbar(
            [tokens for tokens, _ in points],
            height,
            yerr=bars,
            label=name,
            **series(i),
            markersize=4.5,
            linewidth=1.3,
            zorder=20 - i,  # where lines lie on each other, the method that was named first is seen
            elinewidth=0.7,
            capsize=1.5,
        )
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(0, 1.04 * max(entry["visual_before"] for entry in methods.values()) or 1)
    axes.grid(color="#E6E8EA", linewidth=0.6)
    strip_axes(axes)
