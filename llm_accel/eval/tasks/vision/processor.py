"""Prompts with images to tensors, and ids back to text, through the model's processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.vision.settings import PLACEHOLDER, QUESTION

_PLAIN = f"{PLACEHOLDER} {QUESTION}"
_GREY = 128


class VisionProcessor:
    """A processor and the form of a prompt.

    Args:
        processor: of the model; its tokenizer pads on the left from here on.
        form: text with ``<image>`` and ``{question}``, or None for the chat template (see
            :class:`llm_accel.eval.tasks.vision.settings.VisionSettings`).
    """

    def __init__(self, processor: Any, form: str | None = None) -> None:
        tokenizer: Any = getattr(processor, "tokenizer", None)
        self.processor, self.tokenizer = processor, tokenizer
        self.image_token = getattr(processor, "image_token", None)
        if tokenizer is None or self.image_token is None:
            raise ConfigError(
                f"the processor of this model, {type(processor).__name__}, has no tokenizer or no image token; "
                "give a vision-language model."
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.form = form
        if form is None and getattr(processor, "chat_template", None) is None:
            self.form = _PLAIN

    def text(self, question: str, image: bool = True) -> str:
        """The whole prompt, with one placeholder for the image or without one."""
        if self.form is not None:
            before, _, after = self.form.partition(PLACEHOLDER)
            filled = f"{before}{self.image_token}{after}" if image else f"{before}{after.lstrip()}"
            return filled.replace(QUESTION, question)
        content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        begin = self.tokenizer.bos_token
        doubled = begin and text.startswith(begin) and self.tokenizer("").input_ids == [self.tokenizer.bos_token_id]
        return text.removeprefix(begin) if doubled else text

    def encode(self, texts: Sequence[str], images: Sequence[Any]) -> dict[str, Any]:
        """Tensors of a batch, padded on the left; as many images as texts, or none."""
        given = {"images": list(images)} if images else {}
        batch: dict[str, Any] = dict(self.processor(text=list(texts), **given, padding=True, return_tensors="pt"))
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """An answer as text, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def blank(image: Any) -> Any:
    """A grey image of the size of this one."""
    if isinstance(image, np.ndarray):
        return np.full_like(image, _GREY)
    from PIL import Image

    return Image.new("RGB", image.size, (_GREY,) * 3)
