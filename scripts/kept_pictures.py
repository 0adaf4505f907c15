"""Draws which KV entries each method keeps on one needle prompt of the bundled model: ``docs/assets/kept_*.png``.

One row per layer and KV head, one column per position of the prompt. The needle that the question asks for lies between
the two lines; the question is at the end.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

import llm_accel
from llm_accel.common.loading import load_text_model
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleMaker
from llm_accel.registry import parse

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
LENGTH, BUDGET, NEEDLE_TOKENS = 768, 96, 18
METHODS = {
    "snapkv": f"snapkv:budget={BUDGET}",
    "pyramidkv": f"pyramidkv:budget={BUDGET}",
    "adakv": f"adakv:budget={BUDGET}",
    "kvzip": f"kvzip:budget={BUDGET}",
    "h2o": f"h2o:budget={BUDGET}",
    "streaming_llm": f"streaming_llm:budget={BUDGET}",
    "retrieval_heads": f"retrieval_heads:sinks=4,recent={BUDGET - 4}",
    "random": f"random:budget={BUDGET}",
}


def stored(kept: list[Tensor]) -> Tensor:
    """bool [layers * KV heads, LENGTH] from the kept positions of each layer, [1, Hk, n]."""
    table = torch.zeros(sum(layer.shape[1] for layer in kept), LENGTH + 1, dtype=torch.bool)
    row = 0
    for layer in kept:
        for head in layer[0]:
            table[row, head] = True  # -1, for nothing, falls into the last column
            row += 1
    return table[:, :LENGTH]


def draw(table: Tensor, heads: int, needle: int, title: str, path: Path) -> None:
    """One picture, dark where an entry stays."""
    figure, axes = plt.subplots(figsize=(8, 2.1), dpi=150)
    axes.imshow(table, aspect="auto", cmap=ListedColormap(["#ECEEF0", "#3B528B"]), interpolation="nearest")
    for edge in (needle, needle + NEEDLE_TOKENS):
        axes.axvline(edge, color="#D55E00", linewidth=1)
    for layer in range(1, len(table) // heads):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=2)
    axes.set_yticks([heads * layer + (heads - 1) / 2 for layer in range(len(table) // heads)])
    axes.set_yticklabels([f"layer {layer}" for layer in range(len(table) // heads)], fontsize=7)
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("position in the prompt", fontsize=7)
    axes.set_title(title, fontsize=8, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """One picture per method."""
    model, tokenizer, settings = load_text_model(NeedleSettings(lengths=(LENGTH,)))
    maker = NeedleMaker.load(settings, tokenizer)
    prompt = maker.make(GridPoint(LENGTH, 40.0, 0))
    ids = torch.tensor([prompt.ids])
    for name, spec in METHODS.items():
        with llm_accel.apply(model, parse(spec), trace=True) as handle:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
            layers = handle.report().layers
        kept = [torch.arange(LENGTH).expand(1, 4, -1) if layer.kept is None else layer.kept for layer in layers]
        share = sum(layer.kv_bytes for layer in layers) / sum(layer.dense_kv_bytes for layer in layers)
        title = f"{spec}: entries that stay of {LENGTH} ({share:.0%} of the bytes); the asked needle between the lines"
        draw(stored(kept), kept[0].shape[1], prompt.needles[0], title, ASSETS / f"kept_{name}.png")


if __name__ == "__main__":
    main()
