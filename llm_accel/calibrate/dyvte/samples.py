"""Images with prompts from a JSON Lines file, made into what a model takes by its processor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_accel.calibrate.dyvte.runs import Sample
from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.vision.reader import Reader
from llm_accel.eval.tasks.vision.sources import opened

_FORM = 'one object per line: {"image": PATH, "prompt": TEXT, "answer": TEXT}, the answer may be left out'


@dataclass(frozen=True)
class Pair:
    """One image (a path, a PIL image or uint8 [H, W, 3]) and prompt; ``answer`` None asks for the model's own."""

    image: Any
    prompt: str
    answer: str | None = None


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file; images are looked for beside it.

    Raises:
        ConfigError: no such file, or a line that is no pair.
    """
    file, pairs = Path(path).expanduser(), []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data {str(path)!r} cannot be read ({error}); give {_FORM}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, prompt, answer = row["image"], row["prompt"], row.get("answer")
            if not (isinstance(image, str) and isinstance(prompt, str) and isinstance(answer, str | None)):
                raise TypeError("image, prompt and answer are texts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--data {str(path)!r}, line {number}: {error!r}; give {_FORM}.") from error
        pairs.append(Pair(str(file.parent / image), prompt, answer))
    if not pairs:
        raise ConfigError(f"--data {str(path)!r} is empty; give {_FORM}.")
    return pairs


def processed(processor: Any, pairs: Iterable[Pair]) -> Iterator[Sample]:
    """Pairs as :func:`llm_accel.calibrate.dyvte.calibrate_dyvte` takes them. A prompt that holds the processor's image
    token is used as it is, any other one becomes a user's turn of the chat template, or follows the image where there
    is no template.

    Raises:
        ConfigError: an image cannot be read, or the processor takes none.
    """
    reader = Reader(processor)
    for pair in pairs:
        text = pair.prompt if str(reader.image_token) in pair.prompt else reader.text(pair.prompt)
        image = opened(pair.image, Path()) if isinstance(pair.image, str) else pair.image
        answer = None
        if pair.answer is not None:
            answer = reader.tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
        yield reader.encode([text], [image]), answer
