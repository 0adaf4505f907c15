"""Prompts as JSON lines, for other harnesses: RULER's own fields, and the whole prompt as one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_accel.eval.grid import GridPoint, points
from llm_accel.eval.records import reported_errors
from llm_accel.eval.tasks.ruler.task import RulerMaker


def sample_of(maker: RulerMaker, point: GridPoint) -> dict[str, Any]:
    """One line.

    ``index``, ``input``, ``outputs``, ``length`` and ``answer_prefix`` are RULER's, without the chat template;
    ``prompt`` is the whole text with it. ``same_tokens``: the tokenizer makes the very ids of ``prompt`` that were
    measured; a tokenizer that merges across the seams of the segments does not always.
    """
    prompt, tokenizer = maker.make(point), maker.encoder.tokenizer
    text = str(tokenizer.decode(list(prompt.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    inside = slice(len(maker.frame.prefix), prompt.answer_start - len(maker.frame.suffix))
    return {
        "index": point.sample,
        "task": point.row,
        "input": maker.encoder.decode(prompt.ids[inside]),
        "outputs": list(prompt.expected),
        "length": point.length,
        "answer_prefix": maker.encoder.decode(prompt.ids[prompt.answer_start :]),
        "prompt": text,
        "max_new_tokens": prompt.new_tokens,
        "same_tokens": tokenizer.encode(text, add_special_tokens=False) == list(prompt.ids),
        "prompt_hash": prompt.digest(),
    }


def write_samples(path: Path, maker: RulerMaker, shard: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    """Writes one line for each point of a shard; returns what was written. Raises :class:`ConfigError`: the file cannot
    be written."""
    settings, same = maker.settings, 0
    wanted = points(settings.lengths, settings.rows, settings.samples)[shard[0] - 1 :: shard[1]]
    with reported_errors(path, "--write-samples"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for point in wanted:
                sample = sample_of(maker, point)
                same += sample["same_tokens"]
                file.write(json.dumps(sample) + "\n")
    return {"command": "ruler", "samples": len(wanted), "same_tokens": same, "file": str(path)}
