"""The heat map of a profile: layers from top to bottom, query heads from left to right, KV heads as groups."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from llm_accel.eval.heatmap import PALETTES
from llm_accel.eval.plots import INK, MUTED, new_figure, strip_axes
from llm_accel.methods.kv.head_profile import HeadProfile

_DETECTED = "#F0496E"
_MEANING = {
    "copy_paste": "share of the needle's tokens that a head copied",
    "induction": "attention on the token after earlier occurrences",
    "gates": "gate",
}


def draw(profile: HeadProfile) -> Any:
    """A matplotlib figure; detected retrieval heads are framed, heads of the circuit carry a dot."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    layers, heads, kv_heads = profile.shape
    scores = profile.q_head_scores
    top = max(max(row) for row in scores)
    wide, high = min(9.0, max(3.6, 0.34 * heads)), min(9.0, max(1.6, 0.34 * layers))  # inches, as all sizes here
    left, right, bottom = 0.7, 1.0, 0.6
    width = left + wide + right
    legend = "framed: retrieval heads" + (" · dot: answering rests on it" if profile.circuit else "")
    subtitle = textwrap.wrap(f"{_MEANING.get(profile.method, profile.method)}; {legend}", round((width - left) * 13))
    head_room = 0.55 + 0.17 * len(subtitle)
    height = head_room + high + bottom
    figure = new_figure(width, height)
    title = f"{profile.model}: {profile.method.replace('_', '-')} scores"
    figure.text(left / width, 1 - 0.25 / height, title, va="center", fontsize=10.5, color=INK, weight="bold")
    for i, text in enumerate(subtitle):
        figure.text(left / width, 1 - (0.47 + 0.17 * i) / height, text, va="center", fontsize=8, color=MUTED)
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    colours = LinearSegmentedColormap.from_list("heads", PALETTES["safe"])
    limit = max(0.1, math.ceil(top * 10 - 1e-9) / 10)
    image = axes.imshow(scores, cmap=colours, vmin=0, vmax=limit, aspect="auto", interpolation="nearest")
    for layer, head in profile.detected():
        axes.add_patch(
            Rectangle((head - 0.44, layer - 0.44), 0.88, 0.88, fill=False, edgecolor=_DETECTED, linewidth=1.6)
        )
    if profile.circuit:
        axes.plot([h for _, h in profile.circuit], [at for at, _ in profile.circuit], "o", color="white", markersize=3)
    for group in range(1, kv_heads):
        if kv_heads < heads:
            axes.axvline(group * heads // kv_heads - 0.5, color="white", linewidth=1.4)
    every_x, every_y = math.ceil(heads / 16), math.ceil(layers / 16)
    axes.set_xticks(range(0, heads, every_x))
    axes.set_yticks(range(0, layers, every_y))
    strip_axes(axes, pad=4)
    grouped = f", in groups of one KV head ({kv_heads})" if kv_heads < heads else ""
    axes.set_xlabel(f"query head{grouped}", fontsize=8, color=MUTED)
    axes.set_ylabel("layer", fontsize=8, color=MUTED)
    bar = figure.add_axes(((left + wide + 0.15) / width, bottom / height, 0.13 / width, high / height))
    scale = figure.colorbar(image, cax=bar, ticks=[0, limit / 2, limit])
    scale.outline.set_visible(False)
    bar.tick_params(labelsize=7.5, length=0, colors=MUTED)
    bar.set_ylabel("score", fontsize=8, color=MUTED)
    return figure
