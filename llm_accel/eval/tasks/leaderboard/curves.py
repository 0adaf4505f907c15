"""Score against the share of entries kept: a row of panels for each way, a column for each group of tasks."""

from __future__ import annotations

import textwrap
from typing import Any

from llm_accel.eval.plots import INK, MUTED, new_figure, series, strip_axes
from llm_accel.eval.summary import DENSE
from llm_accel.eval.tasks.leaderboard.table import compression


def draw(summary: dict[str, Any], title: str) -> Any:
    """A matplotlib figure. Dense is a line across with its interval as a band, floors are dashed; bars are 95 %
    intervals."""
    ways = summary["ways"]
    groups = list(dict.fromkeys(group for rows in ways.values() for row in rows.values() for group in row["groups"]))
    entries = dict.fromkeys(row["entry"] for rows in ways.values() for row in rows.values() if row["entry"])
    columns, places = max(1, len(groups)), {entry: i for i, entry in enumerate(entries)}
    figure = new_figure(1.4 + 3.2 * columns, 1.4 + 2.6 * len(ways), layout="constrained")
    figure.suptitle(textwrap.fill(title, 30 * columns + 15), fontsize=10, color=INK, weight="bold", x=0.01, ha="left")
    panels = figure.subplots(len(ways), columns, squeeze=False, sharex=True, sharey=True)
    for line, (way, rows) in zip(panels, ways.items(), strict=True):
        for axes, group in zip(line, groups, strict=False):
            _panel(axes, group, rows, places)
            axes.set_title(f"{group}, {way}", fontsize=9, color=INK, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_xticks(summary["ratios"], [compression(ratio) for ratio in summary["ratios"]])
            axes.set_ylim(-0.03, 1.03)
            axes.grid(color="#E6E8EA", linewidth=0.6)
            strip_axes(axes)
    figure.supylabel("score", fontsize=8.5, color=MUTED)
    figure.supxlabel(
        "compression: entries of the prompt to entries kept; bytes held are in the table", fontsize=8, color=MUTED
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def _panel(axes: Any, group: str, rows: dict[str, Any], places: dict[str, int]) -> None:
    if (found := rows[DENSE]["groups"].get(group)) is not None:
        axes.axhline(found["score"], color=INK, linewidth=1.2, label=DENSE)
        axes.axhspan(*found["ci95"], color=INK, alpha=0.08, linewidth=0)
    for entry, place in places.items():
        own = [row for row in rows.values() if row["entry"] == entry and group in row["groups"]]
        scores = [row["groups"][group] for row in own]
        if not own:
            continue
        axes.errorbar(
            [row["ratio"] for row in own],
            [score["score"] for score in scores],
            yerr=[[abs(score["score"] - score["ci95"][end]) for score in scores] for end in (0, 1)],
            label=entry,
            linestyle="--" if own[0]["floor"] else "-",
            **series(place),
            markersize=4.5,
            linewidth=1.3,
            elinewidth=0.6,
            capsize=1.5,
            zorder=20 - place,  # where lines lie on each other, the method that comes first is seen
        )
