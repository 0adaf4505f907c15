"""Answers in the shapes of OpenAI's API: whole, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from llm_accel.serve.sequences import Delta, Job, TokenLogprob

Json = dict[str, Any]


class ApiResponse:
    """What the answers to chats and completions share.

    Args:
        job: the request.
        model: the name of the model.
        tokenizer: turns single tokens into text, for log-probabilities.
        distinct: prompts that count in the usage: one for all ``n`` answers to it.
    """

    prefix = object_name = chunk_name = ""

    def __init__(self, job: Job, model: str, tokenizer: Any, distinct: Sequence[Sequence[int]]) -> None:
        self.job, self._tokenizer = job, tokenizer
        self._prompt_tokens = sum(map(len, distinct))
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Delta]) -> Json:
        """The body of a response that is not streamed."""
        choices = []
        for index in range(len(self.job.sequences)):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            logprobs = [logprob for piece in own for logprob in piece.logprobs]
            choices.append(self.choice(index, text, logprobs, own[-1].finish))
        return self._head | {"object": self.object_name, "choices": choices, "usage": self.usage()} | self._extension()

    def opening(self) -> list[Json]:
        """Chunks before the first text."""
        return []

    def chunk(self, piece: Delta) -> Json:
        """One chunk of a stream."""
        return self._wrap([self.delta(piece)])

    def last(self) -> Json:
        """The chunk with the usage, for clients that ask for it."""
        return self._wrap([]) | {"usage": self.usage()} | self._extension()

    def usage(self) -> Json:
        """Tokens of the request; ``cached_tokens`` are those that a kept cache held already."""
        generated = self.job.generated_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": self.job.reused_tokens},
        }

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None) -> Json:
        """One answer of a whole response."""
        raise NotImplementedError

    def delta(self, piece: Delta) -> Json:
        """One answer of a chunk."""
        raise NotImplementedError

    def _wrap(self, choices: list[Json]) -> Json:
        return self._head | {"object": self.chunk_name, "choices": choices}

    def _extension(self) -> Json:
        return {"llm_accel": {"method": self.job.method_name}}

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


class ChatResponse(ApiResponse):
    """``/v1/chat/completions``."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """The role of every answer, before its text."""
        delta = {"role": "assistant", "content": ""}
        return [self._wrap([self._chunk_choice(row.index, delta, (), None)]) for row in self.job.sequences]

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None) -> Json:
        """One answer of a whole response."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def delta(self, piece: Delta) -> Json:
        """One answer of a chunk."""
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk_choice(piece.index, delta, piece.logprobs, piece.finish)

    def _chunk_choice(self, index: int, delta: Json, logprobs: Sequence[TokenLogprob], finish: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if self.job.sampling.logprobs is None:
            return None
        return {"content": [self._entry(one.token, one.logprob) | self._top(one) for one in logprobs]}

    def _top(self, logprob: TokenLogprob) -> Json:
        return {"top_logprobs": [self._entry(token, logprob) for token, logprob in logprob.top]}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionResponse(ApiResponse):
    """``/v1/completions``."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None) -> Json:
        """One answer of a whole response, and of a chunk too."""
        return {"index": index, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def delta(self, piece: Delta) -> Json:
        """One answer of a chunk."""
        return self.choice(piece.index, piece.text, piece.logprobs, piece.finish)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if self.job.sampling.logprobs is None:
            return None
        return {
            "tokens": [self._text(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._text(token): logprob for token, logprob in one.top} for one in logprobs],
        }
