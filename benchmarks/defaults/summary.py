"""What the records of ``python -m benchmarks.defaults`` say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from llm_accel.common.statistics import wilson
from llm_accel.methods import SnapKV
from llm_accel.registry import parse

CLOSE = 0.01  # below which the fixed width wins


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each model, length and half: how often the dense answer was right, and each candidate's share of those."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["model"], record["length"], record["half"]].append(record)
    tables = [
        {"model": model, "dtype": some[0]["dtype"], "length": length, "half": half, **table(some)}
        for (model, length, half), some in sorted(groups.items())
    ]
    chosen = choice(record for record in records if record["half"] == "choose")
    return {"scores": chosen, "chosen": winner(chosen), "tables": tables}


def table(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by kind of prompt, and by candidate the share of right answers over all kinds with its 95 % interval."""
    dense = {family: [r["right"] is not None for r in some] for family, some in by_family(records).items()}
    found = {}
    for spec in specs(records):
        hits = [r["right"][spec] for r in records if r["right"] is not None and spec in r["right"]]
        families = {
            family: [sum(r["right"][spec] for r in some if r["right"]), sum(r["right"] is not None for r in some)]
            for family, some in by_family(records).items()
        }
        interval = [round(end, 3) for end in wilson(sum(hits), len(hits))]
        found[spec] = {"right": sum(hits), "of": len(hits), "ci95": interval, "families": families}
    return {"dense": {family: [sum(some), len(some)] for family, some in dense.items()}, "kept": found}


def by_family(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Records of each kind of prompt."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        found[record["family"]].append(record)
    return found


def specs(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Candidates in the order of the records."""
    return list(dict.fromkeys(spec for record in records for spec in record["right"] or ()))


def choice(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The rule's score of each pooling of SnapKV: the mean over models, lengths, kinds and shares kept."""
    cells: dict[str, dict[tuple[Any, ...], list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for spec, right in (record["right"] or {}).items():
            setting = parse(spec)
            if isinstance(setting, SnapKV):
                cell = (record["model"], record["length"], record["family"], setting.ratio)
                cells[str(setting.kernel)][cell].append(right)
    return {kernel: round(fmean(map(fmean, found.values())), 4) for kernel, found in cells.items()}


def winner(scores: Mapping[str, float]) -> str | None:
    """The kernel with the highest score; a fixed one where it is close."""
    if not scores:
        return None
    fixed = {kernel: score for kernel, score in scores.items() if kernel != "auto"}
    best = max(fixed, key=lambda kernel: fixed[kernel]) if fixed else "auto"
    return "auto" if scores.get("auto", 0.0) > fixed.get(best, 0.0) + CLOSE else best
