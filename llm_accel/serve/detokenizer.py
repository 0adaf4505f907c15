"""Text of one answer, token by token: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of a character whose other bytes are still to come


class Detokenizer:
    """Turns tokens into pieces of text whose concatenation is the decoded answer.

    Attributes:
        stopped: whether a stop string was found; it is no part of the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self.stopped = False
        self._skip = skip_special_tokens
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._context = self._read = 0  # decoding begins at _context, text is out up to _read
        self._held = ""

    def push(self, token: int, may_stop: bool = True) -> str:
        """The text that is certain after one more token; stop strings are looked for from ``may_stop`` on."""
        self._ids.append(token)
        known, text = self._decode(self._read), self._decode(None)
        if text == known or text.endswith(_INCOMPLETE):  # decoders drop the space of a first word: keep a word before
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :], ended=False) if may_stop else text[len(known) :]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._decode(None)[len(self._decode(self._read)) :]
        self._context = self._read = len(self._ids)
        return self._release(text, ended=True)

    def _decode(self, end: int | None) -> str:
        ids = self._ids[self._context : end]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text

    def _release(self, text: str, ended: bool) -> str:
        held = self._held + text
        found = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = 0 if ended else max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
