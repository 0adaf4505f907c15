"""A benchmark as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llm_accel.eval.lengths import length_label
from llm_accel.eval.table import NONE, aligned, size


def title(result: dict[str, Any]) -> str:
    """One line: what was measured, and where."""
    settings, machine = result["settings"], result["hardware"]
    where = machine.get("gpu") or f"{machine['torch_threads']} CPU thread{'s' if machine['torch_threads'] > 1 else ''}"
    what = settings["model"] or " ".join([f"random weights, shape {settings['shape']}", *settings["changes"]])
    return f"bench: {what}, {settings['dtype']}, {where}"


def render(result: dict[str, Any]) -> str:
    """One block per length and batch, then what the machine can do."""
    lines = [title(result)]
    for length, batch in sorted({(cell["length"], cell["batch"]) for cell in result["cells"]}):
        cells = [cell for cell in result["cells"] if (cell["length"], cell["batch"]) == (length, batch)]
        lines += ["", f"prompt {length_label(length)}, batch {batch}, {result['settings']['new_tokens']} new tokens"]
        lines += aligned([["", *_COLUMNS, *_limit_header(cells)], *(_row(cell) for cell in cells)])
    bounds = result["bounds"]
    lines += [
        "",
        f"bounds measured here: {bounds['bandwidth'] / 1e9:.1f} GB/s (copy {bounds['copy'] / 1e9:.1f}, triad "
        f"{bounds['triad'] / 1e9:.1f}), matrix product {bounds['flop'] / 1e12:.2f} TFLOP/s",
        "decode: median (quartiles) over all steps; speed-ups: dense over method within a round, median over "
        f"{result['settings']['rounds']} rounds",
        "at most: bandwidth bound of the speed-up; of it: fraction reached",
        f"peaks, weights included: {result['memory_source']}",
    ]
    return "\n".join(lines)


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "first token ms": lambda cell: f"{cell['first_token_ms']['median']:.0f}",
    "first token x dense": lambda cell: f"{cell['first_token_speedup']:.2f}",
    "decode ms/token": lambda cell: "{median:.2f} ({q1:.2f}-{q3:.2f})".format(**cell["decode_ms"]),
    "tokens/s": lambda cell: f"{cell['tokens_per_s']:.1f}",
    "x dense": lambda cell: f"{cell['decode_speedup']:.2f}",
    "at most": lambda cell: f"{cell['speedup_bound']:.2f}",
    "of it": lambda cell: f"{cell['speedup_share']:.0%}",
    "of bandwidth": lambda cell: f"{cell['decode_bound_percent']:.0f} %",
    "KV": lambda cell: size(cell["kv_bytes"]),
    "of dense": lambda cell: f"{1 / cell['kv_saving']:.1%}",
    "peak prefill": lambda cell: size(cell["peak_prefill_bytes"]),
    "peak decode": lambda cell: size(cell["peak_decode_bytes"]),
}


def _limit_header(cells: Sequence[dict[str, Any]]) -> list[str]:
    if "largest_batch" not in cells[0]:
        return []
    return ["batch at once", "one by one", *(["probed"] if "probed" in cells[0]["largest_batch"] else [])]


def _row(cell: dict[str, Any]) -> list[str]:
    batch = cell.get("largest_batch", {})
    tried = [NONE if count is None else str(count) for name, count in batch.items() if name != "kv_only"]
    return [cell["name"], *(column(cell) for column in _COLUMNS.values()), *tried]
