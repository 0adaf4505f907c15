"""The result as a picture: decode time and memory against length, and where the time of one call goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_accel.eval.lengths import length_label
from llm_accel.eval.plots import INK, MUTED, new_figure, series, strip_axes
from llm_accel.eval.tasks.bench.table import title

_GRID = "#E3E6E9"


def draw(result: dict[str, Any]) -> Any:
    """A matplotlib figure of the smallest batch size."""
    batch = min(cell["batch"] for cell in result["cells"])
    cells = [cell for cell in result["cells"] if cell["batch"] == batch]
    names = list(dict.fromkeys(cell["name"] for cell in cells))
    figure = new_figure(13.5, 4.6, dpi=150)
    speed, memory, split = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.79, bottom=0.22, wspace=0.24)
    figure.text(0.055, 0.945, title(result), fontsize=11, color=INK, weight="bold", va="center")
    about = f"batch {batch}, medians over {result['settings']['rounds']} rounds in turns; bands and whiskers: quartiles"
    figure.text(0.055, 0.893, about, fontsize=8.5, color=MUTED, va="center")
    for index, name in enumerate(names):
        own = sorted((cell for cell in cells if cell["name"] == name), key=lambda cell: cell["length"])
        _lines(speed, memory, own, index, result["model"]["weight_bytes"])
    lengths = sorted({cell["length"] for cell in cells})
    _decorate(speed, "decode, ms per token", "dotted: bytes of a step at measured bandwidth", lengths)
    _decorate(memory, "memory, MiB", "solid: KV cache; dashed: peak of the prompt above the weights", lengths)
    memory.set_yscale("log")
    speed.set_ylim(bottom=0)
    _split(split, [cell for cell in cells if cell["length"] == lengths[-1]], result)
    handles, labels = speed.get_legend_handles_labels()
    columns = min(4, len(names))
    figure.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.045, 0.0), ncols=columns, fontsize=8, frameon=False
    )
    return figure


def _lines(speed: Any, memory: Any, cells: Sequence[dict[str, Any]], index: int, weights: int) -> None:
    shape = _shape(index)
    colour = shape["color"]
    lengths, decode = [cell["length"] for cell in cells], [cell["decode_ms"] for cell in cells]
    style = {**shape, "markersize": 5, "linewidth": 1.6}
    speed.plot(lengths, [one["median"] for one in decode], label=cells[0]["name"], **style)
    speed.fill_between(lengths, [one["q1"] for one in decode], [one["q3"] for one in decode], color=colour, alpha=0.15)
    speed.plot(lengths, [cell["decode_bound_ms"] for cell in cells], color=colour, linestyle=":", linewidth=1.1)
    memory.plot(lengths, [cell["kv_bytes"] / 2**20 for cell in cells], **style)
    peaks = {cell["length"]: cell["peak_prefill_bytes"] for cell in cells}
    known = {length: (peak - weights) / 2**20 for length, peak in peaks.items() if peak is not None}
    memory.plot(list(known), list(known.values()), **style | {"linestyle": "--", "linewidth": 1.0, "markersize": 3})


def _shape(index: int) -> dict[str, str]:
    """Dense, which comes first, is black; the others have the colours that they have in other plots."""
    return series(index - 1) if index else series(0) | {"color": INK}


def _decorate(axes: Any, name: str, subtitle: str, lengths: Sequence[int]) -> None:
    strip_axes(axes)
    axes.set_axisbelow(True)
    axes.set_title(name, fontsize=9.5, color=INK, loc="left", pad=16)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=7.5, color=MUTED)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [length_label(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length in tokens", fontsize=8, color=MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)


def _split(axes: Any, cells: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Stacked bars: time to first token, then the decode steps of one call."""
    strip_axes(axes)
    axes.set_axisbelow(True)
    steps = result["settings"]["new_tokens"] - 1
    first = [cell["first_token_ms"]["median"] / 1e3 for cell in cells]
    decode = [steps * cell["decode_ms"]["median"] / 1e3 for cell in cells]
    places = range(len(cells))
    axes.barh(places, first, color="#9AA5B1", label="first token", height=0.62)
    for place in places:
        axes.barh(place, decode[place], left=first[place], color=_shape(place)["color"], height=0.62)
        total = first[place] + decode[place]
        says = f" {total:.2f} s, {decode[place] / total:.0%} decode"
        axes.text(total, place, says, va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, 1.45 * max(a + b for a, b in zip(first, decode, strict=True)))
    axes.set_yticks([])
    axes.invert_yaxis()
    length = length_label(cells[0]["length"])
    axes.set_title(f"one call, prompt {length}, {steps + 1} new tokens", fontsize=9.5, color=INK, loc="left", pad=16)
    grey = "grey: until the first token; colour: the steps after it"
    axes.text(0, 1.02, grey, transform=axes.transAxes, fontsize=7.5, color=MUTED)
    axes.set_xlabel("seconds", fontsize=8, color=MUTED)
