"""Prompts as JSON lines, for other harnesses: RULER's own fields, and the whole prompt as one text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.ruler.prompts import Place, PromptMaker
from llm_accel.eval.tasks.ruler.tasks import TASKS


def sample_of(maker: PromptMaker, place: Place) -> dict[str, Any]:
    """One line.

    ``index``, ``input``, ``outputs``, ``length`` and ``answer_prefix`` are RULER's, without the chat template;
    ``prompt`` is the whole text with it. ``same_tokens``: the tokenizer makes the very ids of ``prompt`` that were
    measured; a tokenizer that merges across the seams of the pieces does not always.
    """
    prompt, tokenizer = maker.make(place), maker.encoder.tokenizer
    text = str(tokenizer.decode(list(prompt.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    inside = slice(len(maker.frame.prefix), prompt.answer_start - len(maker.frame.suffix))
    return {
        "index": place.sample,
        "task": place.task,
        "input": maker.encoder.decode(prompt.ids[inside]),
        "outputs": list(prompt.expected),
        "length": place.length,
        "answer_prefix": maker.encoder.decode(prompt.ids[prompt.answer_start :]),
        "prompt": text,
        "max_new_tokens": TASKS[place.task].new_tokens,
        "same_tokens": tokenizer.encode(text, add_special_tokens=False) == list(prompt.ids),
        "prompt_hash": prompt.digest(),
    }


def write_samples(path: Path, maker: PromptMaker, wanted: Sequence[Place]) -> dict[str, Any]:
    """Writes one line per place; returns what was written.

    Raises:
        ConfigError: the file cannot be written.
    """
    same = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for place in wanted:
                sample = sample_of(maker, place)
                same += sample["same_tokens"]
                file.write(json.dumps(sample) + "\n")
    except OSError as error:
        raise ConfigError(f"--write-samples {str(path)!r} cannot be written: {error.strerror or error}.") from error
    return {"command": "ruler", "samples": len(wanted), "same_tokens": same, "file": str(path)}
