"""From text to token ids. A prompt is assembled from segments that are encoded once, never decoded and re-encoded.

A tokenizer may split the joined text differently at the seams; that is accepted, since each segment is still a natural
encoding of its own text, and it is what makes token-exact lengths possible. Seams lie between sentences only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.errors import ConfigError

PLACEHOLDER = "LLMACCELPROMPTPLACEHOLDER"


class Encoder:
    """Encodes the start of a text and its continuations with any HuggingFace tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def start(self, text: str) -> list[int]:
        """Ids of a text that begins a message; no special tokens are added, those in the text are recognised."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def behind(self, anchor: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that each follow directly after ``anchor``.

        They are encoded after it, and it is then cut off, so that tokenizers that prepend a space to every text
        (SentencePiece) do not add one.
        """
        if not texts:
            return []
        head = self.start(anchor)
        rows = self.tokenizer([anchor + text for text in texts], add_special_tokens=False)["input_ids"]
        return [
            list(row[len(head) :]) if list(row[: len(head)]) == head else self.start(text)
            for row, text in zip(rows, texts, strict=True)
        ]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that each follow a sentence and one space."""
        return self.behind(".", [f" {text}" for text in texts])

    def lines(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that each begin a line."""
        return self.behind("\n", texts)

    def continuation(self, text: str) -> list[int]:
        """Ids of one text that follows a sentence and one space."""
        return self.continuations([text])[0]

    def answer_prefix(self, text: str, begins: bool) -> list[int]:
        """Ids of the answer prefix; ``begins``: it is the first text of a message.

        A last space stays only where the tokenizer keeps it apart from a number that follows.
        """
        encode = self.start if begins else self.continuation
        ids = encode(text)
        if text.endswith(" ") and encode(text + "1234567")[: len(ids)] != ids:
            ids = encode(text.rstrip())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens dropped."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Frame:
    """The text around the user's message, as ids."""

    prefix: tuple[int, ...]  # ids before the haystack (template and bos)
    suffix: tuple[int, ...]  # ids between the question and the answer prefix
    chat: bool  # whether a chat template made them


def make_frame(encoder: Encoder, chat_template: bool | None) -> Frame:
    """The frame of a tokenizer: its chat template rendered once around a placeholder and split there, or bos alone.

    Args:
        chat_template: None for on if the tokenizer has one.

    Raises:
        ConfigError: a template was asked for and there is none, or it does not contain the user's text exactly once.
    """
    tokenizer = encoder.tokenizer
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template and not has_template:
        raise ConfigError("--chat-template: this tokenizer has no chat template; use --no-chat-template.")
    if not (has_template if chat_template is None else chat_template):
        probe = "a"
        plain = list(tokenizer.encode(probe, add_special_tokens=False))
        full = list(tokenizer.encode(probe))
        size = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return Frame(tuple(full[:size]), (), chat=False)
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": PLACEHOLDER}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise whatever they like
        raise ConfigError(f"the chat template failed ({error}); use --no-chat-template.") from error
    parts = str(rendered).split(PLACEHOLDER)
    if len(parts) != 2:
        raise ConfigError(
            f"the chat template shows the user's text {len(parts) - 1} times instead of once; use --no-chat-template."
        )
    return Frame(tuple(encoder.start(parts[0])), tuple(encoder.start(parts[1])), chat=True)
