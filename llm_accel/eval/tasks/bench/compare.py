"""Two results side by side, and a result checked against an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError, LlmAccelError
from llm_accel.eval.lengths import length_label
from llm_accel.eval.table import aligned

RATIOS = ("decode_speedup", "first_token_speedup", "kv_saving")  # of dense over candidate: higher is better
TOLERANCE = 0.15


class SlowerError(LlmAccelError):
    """A ratio dropped by more than the tolerance."""


def load(path: str | Path) -> dict[str, Any]:
    """A result as ``llm-accel bench`` wrote it; ConfigError for anything else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("command") != "bench":
        raise ConfigError(f"{str(path)!r} is not a result of llm-accel bench.")
    return result


def by_cell(result: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Its records by candidate, length and batch."""
    return {(cell["name"], cell["length"], cell["batch"]): cell for cell in result["cells"]}


def render_comparison(first: dict[str, Any], second: dict[str, Any]) -> str:
    """What both results measured, figures of the second over those of the first, and how their conditions differ.
    Raises :class:`ConfigError`: they have no cell in common."""
    ours, others = by_cell(first), by_cell(second)
    shared = [key for key in ours if key in others]
    if not shared:
        raise ConfigError("the two results have no candidate, length and batch in common.")
    header = ["", "prompt", "batch", "first token ms", "ratio", "decode ms/token", "ratio", "x dense", "KV ratio"]
    rows = [header]
    for name, length, batch in shared:
        a, b = ours[name, length, batch], others[name, length, batch]
        rows.append(
            [
                name,
                length_label(length),
                str(batch),
                *_both(a["first_token_ms"]["median"], b["first_token_ms"]["median"], ".0f"),
                *_both(a["decode_ms"]["median"], b["decode_ms"]["median"], ".2f"),
                f"{a['decode_speedup']:.2f} -> {b['decode_speedup']:.2f}",
                f"{b['kv_bytes'] / a['kv_bytes']:.2f}",
            ]
        )
    return "\n".join([*aligned(rows), *differences(first, second)])


def _both(first: float, second: float, form: str) -> list[str]:
    return [f"{first:{form}} -> {second:{form}}", f"{second / first:.2f}"]


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Lines that name every version, piece of hardware and setting that differs."""
    lines = []
    for part in ("versions", "hardware", "settings"):
        for key in sorted(first[part].keys() | second[part].keys()):
            a, b = first[part].get(key), second[part].get(key)
            if a != b:
                lines.append(f"differs: {part}.{key}: {a} -> {b}")
    return lines


def check(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per ratio of the earlier result that fell by more than the tolerance, or that is not there any more."""
    found, failures = by_cell(now), []
    for key, cell in by_cell(kept).items():
        name, length, batch = key
        where = f"{name}, prompt {length_label(length)}, batch {batch}"
        if key not in found:
            failures.append(f"{where}: not measured")
            continue
        for ratio in RATIOS:
            before, after = cell[ratio], found[key][ratio]
            if after < (1 - TOLERANCE) * before:
                failures.append(f"{where}: {ratio} fell from {before:.2f} to {after:.2f} ({after / before - 1:.0%})")
    return failures
