"""The loop over images: runs every method on the same prompts and writes a record of each at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llm_accel.common.progress import Progress
from llm_accel.eval.records import Record, RunDir
from llm_accel.eval.tasks.vision.engine import Engine, Outcome
from llm_accel.eval.tasks.vision.examples import Example, Source
from llm_accel.eval.tasks.vision.scoring import Mentions, score
from llm_accel.methods import DyVTE, MethodConfig

PICTURED = 4  # images of which records say which patches stayed, for the pictures

Configs = Mapping[str, Sequence[MethodConfig]]


class VisionDir(RunDir):
    """Records of a vision run: one of each method and question."""

    fields = ("method", "sample", "task", "number")
    plots = ("curves.png", "kept-*.png")


def run_samples(
    engine: Engine,
    source: Source,
    configs: Configs,
    run_dir: RunDir,
    done: Sequence[Record],
    mentions: Mentions,
    batch_size: int,
    shard: tuple[int, int] = (1, 1),
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    shown: bool = True,
) -> None:
    """Runs what ``done`` lacks of a shard of the images, and appends to the directory."""
    keys = {VisionDir.key(record) for record in done}
    samples = range(shard[0] - 1, len(source), shard[1])
    if done:
        say(f"{run_dir.path}: {len(done)} records are there")
    with Progress(len(samples) * len(configs), done, "image", shown) as progress:
        for sample in samples:
            examples = source.examples(sample)
            for method, parts in configs.items():
                lacking = [e for e in examples if (method, e.sample, e.task, e.number) not in keys]
                records: list[Record] = []
                # rows of a batch share the decision of routers, so there each prompt runs alone
                routed = any(isinstance(part, DyVTE) and part.routers is not None for part in parts)
                for batch in _batches(lacking, 1 if routed else batch_size):
                    outcome = engine.run(batch, parts)
                    records += [make_record(method, e, i, outcome, mentions) for i, e in enumerate(batch)]
                if records:
                    run_dir.append(records)
                progress.add(records, 1)


def make_record(method: str, example: Example, row: int, outcome: Outcome, mentions: Mentions) -> Record:
    """The record of one question and method; times and tokens are means over its batch."""
    answer = outcome.answers[row]
    kept = None if outcome.kept is None else outcome.kept[row]
    record: dict[str, Any] = {
        "method": method,
        "sample": example.sample,
        "task": example.task,
        "number": example.number,
        "split": example.split,
        **score(example.task, answer, example.answer, example.objects, mentions),
        "question": example.question,
        "expected": example.answer,
        "answer": answer,
        "patch_recall": patch_recall(kept, example),
        "visual_before": outcome.visual_before,
        "visual_after": round(outcome.visual_after, 3),
        "visual_per_layer": round(outcome.visual_per_layer, 3),
        "flops": outcome.flops,
        "prefill_ms": round(outcome.prefill_ms, 3),
        "batch": len(outcome.answers),
    }
    if example.sample < PICTURED and kept is not None:
        record["kept"] = [round(share, 2) for share in kept]
    return record


def patch_recall(kept: Sequence[float] | None, example: Example) -> float | None:
    """Share of the patches with things on them that are kept; None where either is unknown, or the model does not see
    the image as these patches."""
    if kept is None or example.patches is None or len(kept) != example.patches.size:
        return None
    covered = example.patches.ravel().tolist()
    return round(sum(share for share, own in zip(kept, covered, strict=True) if own) / sum(covered), 4)


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
