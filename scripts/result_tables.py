"""Writes the tables of the README and the guides from ``benchmarks/results``; ``--check`` only says which are old.

A table stands between ``<!-- results: KIND DIRECTORY -->`` and ``<!-- results end -->``; KIND is a key of ``KINDS``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_accel.eval.lengths import length_label

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the benchmarks, which are not part of the package
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- results end -->)", re.DOTALL)


def size(count: int, dense: int) -> str:
    """Bytes in words, with the share of the dense cache where it is smaller."""
    words = f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
    return words if count > 0.995 * dense else f"{words} ({count / dense:.1%})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of GitHub's markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def needle(directory: Path) -> str:
    """Exact match by method and length, KV bytes at the longest length, decode time at the shortest and the longest."""
    methods: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["methods"]
    lengths = list(next(iter(methods.values()))["lengths"])
    first, last = lengths[0], lengths[-1]
    labels = [length_label(int(length)) for length in lengths]
    rows = []
    for name, entry in methods.items():
        at = entry["lengths"]
        exact = [f"{at[length]['exact']:.2f}" for length in lengths]
        times = f"{at[first]['decode_ms_per_token']:.1f}, {at[last]['decode_ms_per_token']:.1f}"
        rows.append([f"`{name}`", *exact, size(at[last]["kv_bytes"], at[last]["dense_kv_bytes"]), times])
    return markdown(
        ["exact match", *labels, f"KV cache at {labels[-1]}", f"decode ms/token at {labels[0]}, {labels[-1]}"], rows
    )


def counted(directory: Path) -> str:
    """Exact match with its interval and the prompts that ran, by method and length, and the share of the KV bytes."""
    methods: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["methods"]
    lengths = list(next(iter(methods.values()))["lengths"])
    body = []
    for name, entry in methods.items():
        found = [entry["lengths"][length] for length in lengths]
        cells = [f"{at['exact']:.2f} ({at['ci95'][0]:.2f}-{at['ci95'][1]:.2f}), {at['n']}" for at in found]
        body.append([f"`{name}`", *cells, f"{found[-1]['kv_bytes'] / found[-1]['dense_kv_bytes']:.1%}"])
    labels = [length_label(int(length)) for length in lengths]
    return markdown(["exact match (95 %), prompts", *labels, f"KV held at {labels[-1]}"], body)


def hip_needle(directory: Path) -> str:
    """Exact match of HiP's settings by the share of the context that a query sees, and of the dense model."""
    from benchmarks.hip_needle import ROWS, SHARES, config

    run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    methods: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["methods"]
    (length,) = run["settings"]["lengths"]
    asked = methods["dense"]["n"]
    specs = {row: [config(length, share, **options).spec() for share in SHARES] for row, options in ROWS.items()}
    shares = [i for i in range(len(SHARES)) if any(row[i] in methods for row in specs.values())]
    header = f"{length_label(length)}, {asked} prompts, dense {methods['dense']['exact']:.2f}"
    return markdown(
        [header, *(f"{SHARES[i]:.2%}" for i in shares)],
        [
            [name, *(f"{methods[row[i]]['exact']:.2f}" for i in shares)]
            for name, row in specs.items()
            if row[shares[0]] in methods
        ],
    )


def vision(directory: Path) -> str:
    """Exact match by task, what captions invent and find, tokens and computed operations, of each method."""
    methods: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["methods"]
    tasks = list(next(iter(methods.values()))["tasks"])
    captions = "caption" in tasks
    rows = []
    for name, entry in methods.items():
        chair = [entry["chair"][one] for one in ("chair_i", "recall")] if captions else []
        low, high = entry["exact_ci95"]
        mean = f"{entry['exact']:.2f} ({low:.2f} to {high:.2f})"
        others = [*chair, entry["patch_recall"], entry["flops_vs_dense"]]
        tokens = "" if entry["visual_after"] is None else f"{entry['visual_after']:.0f}"
        exact = [f"{entry['tasks'][task]['exact']:.2f}" for task in tasks]
        rows.append([f"`{name}`", tokens, *exact, mean, *("" if one is None else f"{one:.2f}" for one in others)])
    invented = ["CHAIR_i", "recall"] if captions else []
    return markdown(["", "tokens", *tasks, "mean", *invented, "patch recall", "LM FLOPs of dense"], rows)


def hallucination(file: Path) -> str:
    """CHAIR and POPE of the options that were chosen, under each condition, and what they were measured on."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    splits = ("random", "popular", "adversarial")
    parts = []
    for name, found in result["conditions"].items():
        rows = []
        for method, entry in found["methods"].items():
            chair, pope = entry["chair"], entry["pope"]
            spec = found["chosen"][method].removeprefix(f"{found['beside']}+")
            low, high = chair["chair_s_ci95"]
            shares = [f"{chair['chair_s']:.3f} ({low:.2f} to {high:.2f})", f"{chair['chair_i']:.3f}"]
            asked = [f"{pope[one]['f1']:.3f}" for one in splits]
            yes = sum(pope[one]["yes_ratio"] for one in splits) / len(splits)
            rows.append([f"`{spec}`", *shares, f"{chair['recall']:.3f}", f"{chair['words']:.1f}", *asked, f"{yes:.2f}"])
        header = [name, "CHAIR_S", "CHAIR_I", "recall", "words", *(f"POPE F1 {one}" for one in splits), "yes"]
        parts.append(markdown(header, rows))
    return "\n".join(parts)


def video(file: Path) -> str:
    """Which patches of drawn videos each method keeps, and the time to the first token."""
    from benchmarks.video_tokens import table

    return markdown(*table(json.loads(file.read_text(encoding="utf-8"))))


def device(hardware: dict[str, Any]) -> str:
    """The GPU, or threads and cores, in words."""
    threads = hardware["torch_threads"]
    cpu = f"{threads} thread{'s' if threads > 1 else ''} of {hardware['cpu_count']} {hardware['machine']} cores"
    return str(hardware.get("gpu") or cpu)


def used(run: dict[str, Any]) -> str:
    """Versions in words."""
    return ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))


def leaderboard(directory: Path) -> str:
    """The board as the command prints it, and how it was made."""
    from llm_accel.eval.tasks.leaderboard.table import tables

    run, summary = (json.loads((directory / f"{name}.json").read_text("utf-8")) for name in ("run", "summary"))
    how = f"{summary['model']}, seed {summary['seed']}; {device(run['hardware'])}; {used(run)}:"
    return f"{tables(summary)}\n\n{how}\n`llm-accel {' '.join(run['argv'])}`\n"


def bench(file: Path) -> str:
    """Decode time, ratios to dense, the bandwidth bound, and memory, of one result of ``llm-accel bench``; what it was
    measured on and with underneath."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    cells, settings, machine = result["cells"], result["settings"], result["hardware"]
    several = len({(cell["length"], cell["batch"]) for cell in cells}) > 1
    rows = []
    for cell in cells:
        first, decode, peak = cell["first_token_ms"], cell["decode_ms"], cell["peak_prefill_bytes"]
        where = f", {length_label(cell['length'])} x {cell['batch']}" if several else ""
        rows.append(
            [
                f"`{cell['name']}`{where}",
                f"{decode['median']:.1f} ({decode['q1']:.1f}-{decode['q3']:.1f})",
                f"{cell['decode_speedup']:.2f}",
                f"{cell['speedup_bound']:.2f}",
                f"{first['median'] / 1e3:.1f}",
                size(cell["kv_bytes"], cell["dense_kv_bytes"]),
                "" if peak is None else f"{peak / 2**20:.0f} MiB",
            ]
        )
    lengths, batches = ", ".join(map(length_label, settings["lengths"])), ", ".join(map(str, settings["batches"]))
    header = [f"prompt {lengths}, batch {batches}", "decode ms/token (quartiles)", "x dense", "bandwidth bound"]
    table = markdown([*header, "first token s", "KV cache", "peak of the prompt, weights included"], rows)
    model = settings["model"] or " ".join(["random weights, shape", settings["shape"], *settings["changes"]])
    load = " and ".join(f"{machine[when][0]:.1f}" for when in ("load_before", "load_after"))
    how = f"{settings['rounds']} rounds in turns, {settings['new_tokens']} new tokens"
    return (
        f"{table}\n{model}, {settings['dtype']}; {device(machine)}, load {load}; {used(result)}; {how}:\n"
        f"`llm-accel {' '.join(result['argv'])}` ([all figures]({file.relative_to(ROOT).as_posix()})).\n"
    )


def prefill(file: Path) -> str:
    """Peak memory by way of reading prompts, and its share of the dense model's on as many prompts."""
    peaks: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["peak_mib"]
    dense = {name.count("prompts"): peak for name, peak in peaks.items() if name.startswith("dense")}
    rows = [[name, f"{peak:.0f}", f"{peak / dense[name.count('prompts')]:.0%}"] for name, peak in peaks.items()]
    return markdown(["", "MiB", "of dense"], rows)


def kvpress(file: Path) -> str:
    """Needles found and bytes held by both packages, of each way, task and row."""

    def cell(found: dict[str, Any] | None) -> list[str]:
        if found is None:
            return ["-", "-"]
        low, high = found["ci95"]
        return [f"{found['found']}/{found['of']} ({low:.2f}-{high:.2f})", f"{found['held']:.1%}"]

    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    body = []
    for row in rows:
        asked = f"{row['way']}, {row['task']}, {length_label(row['length'])}"
        body.append([asked, f"`{row['row']}`", *cell(row["llm_accel"]), *cell(row["kvpress"])])
    return markdown(["question, task", "method", "llm_accel", "KV held", "kvpress", "KV held"], body)


KINDS: dict[str, Callable[[Path], str]] = {
    "needle": needle,
    "hip_needle": hip_needle,
    "vision": vision,
    "hallucination": hallucination,
    "video": video,
    "bench": bench,
    "leaderboard": leaderboard,
    "prefill": prefill,
    "kvpress": kvpress,
    "counted": counted,
}


def written(text: str) -> str:
    """The text with all its marked tables as the results have them; ValueError for a kind that is not there."""

    def table(match: re.Match[str]) -> str:
        begin, kind, directory, end = match.groups()
        if kind not in KINDS:
            raise ValueError(f"results: {kind} {directory}: the kind must be one of {', '.join(KINDS)}")
        return f"{begin}{KINDS[kind](RESULTS / directory)}{end}"

    return MARKED.sub(table, text)


def main() -> int:
    """1 when ``--check`` finds an old table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a table is old")
    check = parser.parse_args().check
    old = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := written(text)) != text:
            old.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(new, encoding="utf-8")
    if old:
        print(f"{'old tables' if check else 'tables written'}: {', '.join(old)}", file=sys.stderr)
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
