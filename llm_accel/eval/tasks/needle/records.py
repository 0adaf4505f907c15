"""The run directory of the needle grid."""

from __future__ import annotations

from llm_accel.eval.records import RunDir


class NeedleDir(RunDir):
    """Records of a grid: one of each method and prompt."""

    fields = ("method", "length", "depth", "sample")
    plots = ("heatmap.png",)
