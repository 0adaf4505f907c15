"""The summary as text tables: what was right, POPE's splits, captions."""

from __future__ import annotations

from typing import Any

from llm_accel.eval.table import NONE, aligned, interval, missing, number
from llm_accel.eval.tasks.vision.settings import SCENES, VisionSettings

_VOID = 0.1  # a task on which the dense model is no better than this above the blind one says nothing


def title(settings: VisionSettings, model: str) -> str:
    """One line that describes the run."""
    what = f"{settings.split} scenes" if settings.data == SCENES else settings.data
    return f"vision: {model}, {what}"


def render(settings: VisionSettings, summary: dict[str, Any], model: str) -> str:
    """Exact match per task with tokens and cost, then POPE by split, then captions; 95 % intervals in brackets."""
    methods = {name: entry for name, entry in summary["methods"].items() if entry["n"]}
    blocks = [title(settings, model), _answers(methods), _pope(methods), _captions(methods), _footer(summary, methods)]
    return "\n\n".join(block for block in blocks if block)


def void_tasks(methods: dict[str, Any]) -> list[str]:
    """Tasks that can be answered without the image: dense is hardly better than blind."""
    if not {"dense", "blind"} <= methods.keys():
        return []
    dense, blind = methods["dense"]["tasks"], methods["blind"]["tasks"]
    return [task for task in dense if task in blind and dense[task]["exact"] - blind[task]["exact"] < _VOID]


def _answers(methods: dict[str, Any]) -> str:
    tasks = list(dict.fromkeys(task for entry in methods.values() for task in entry["tasks"]))
    header = ["exact match", *tasks, "mean", "tokens", "per layer", "patch recall", "LM FLOPs", "prefill ms"]
    rows = []
    for name, entry in methods.items():
        found = [entry["tasks"].get(task) for task in tasks]
        rows.append(
            [
                name,
                *(NONE if task is None else f"{task['exact']:.2f} [{interval(task['ci95'])}]" for task in found),
                number(entry["exact"]),
                f"{entry['visual_before']:.0f} > {entry['visual_after']:.0f}",
                number(entry["visual_per_layer"], ".0f"),
                number(entry["patch_recall"]),
                number(entry["flops_vs_dense"], ".1%") if entry["flops_vs_dense"] else number(entry["flops"], ".3g"),
                number(entry["prefill_ms"]),
            ]
        )
    return "\n".join(aligned([header, *rows]))


def _pope(methods: dict[str, Any]) -> str:
    header = ["existence (POPE)", "split", "accuracy", "precision", "recall", "F1", "yes", "neither"]
    rows = [
        [
            name if i == 0 else "",
            split or "all",
            f"{part['accuracy']:.2f} [{interval(part['accuracy_ci95'])}]",
            number(part["precision"]),
            number(part["recall"]),
            f"{number(part['f1'])} [{interval(part['f1_ci95'])}]",
            number(part["yes_ratio"]),
            str(part["neither"]),
        ]
        for name, entry in methods.items()
        for i, (split, part) in enumerate(entry["pope"].items())
    ]
    return "\n".join(aligned([header, *rows])) if rows else ""


def _captions(methods: dict[str, Any]) -> str:
    header = ["captions", "CHAIR_i", "CHAIR_s", "recall", "words", "mentions", "repeated", "exact"]
    rows = [
        [
            name,
            *(f"{number(c[key])} [{interval(c[f'{key}_ci95'])}]" for key in ("chair_i", "chair_s", "recall")),
            number(c["words"], ".1f"),
            number(c["mentions"], ".1f"),
            number(c["repeated"]),
            number(c["exact"]),
        ]
        for name, entry in methods.items()
        if (c := entry["chair"]) is not None
    ]
    return "\n".join(aligned([header, *rows])) if rows else ""


def _footer(summary: dict[str, Any], methods: dict[str, Any]) -> str:
    lines = [f"{summary['samples']} images{missing(summary)}"]
    void = void_tasks(methods)
    if void:
        lines.append(f"void: {', '.join(void)}; the model answers as well without the image")
    return "\n".join(lines)
