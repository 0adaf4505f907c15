"""Responses in the shapes of OpenAI's API: whole, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llm_accel.serve.logprobs import TokenLogprob
from llm_accel.serve.prompts import Prompt, PromptReader
from llm_accel.serve.protocol import ChatRequest, CompletionRequest
from llm_accel.serve.sequences import Delta, Job

Json = dict[str, Any]


class ApiResponse:
    """What the responses to chats and completions share.

    Args:
        job: the request, on its way.
        model: the name of the model.
        reader: turns single tokens into text, for log-probabilities.
        prompts: each one once, whatever ``n`` is.
    """

    prefix = object_name = chunk_name = ""

    def __init__(
        self,
        job: Job,
        body: ChatRequest | CompletionRequest,
        model: str,
        reader: PromptReader,
        prompts: Sequence[Prompt],
    ) -> None:
        self.job, self.body, self._tokenizer, self._prompts = job, body, reader.tokenizer, prompts
        self._begun: set[int] = set()
        self._characters = defaultdict[int, int](int)  # that the log-probabilities of each answer have covered
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, deltas: Sequence[Delta]) -> Json:
        """The body of a response that is not streamed."""
        choices, answers = [], defaultdict[int, list[Delta]](list)
        for delta in deltas:
            answers[delta.index].append(delta)
        for index, own in sorted(answers.items()):
            logprobs = tuple(logprob for delta in own for logprob in delta.logprobs)
            text = "".join(delta.text for delta in own)
            choices.append(self._choice(Delta(index, text, logprobs, own[-1].finish), whole=True))
        return self._head | {"object": self.object_name, "choices": choices} | self._usage()

    def opening(self) -> list[Json]:
        """Chunks before the first text."""
        return []

    def chunk(self, delta: Delta) -> Json:
        """One chunk of a stream."""
        return self._wrap([self._choice(delta, whole=False)])

    def last(self) -> Json:
        """The chunk with the usage, for clients that ask for it."""
        return self._wrap([]) | self._usage()

    def _content(self, delta: Delta, whole: bool) -> tuple[Json, Json]:
        """Text and log-probabilities of a whole answer, or of its next part."""
        raise NotImplementedError

    def _usage(self) -> Json:
        """Tokens of the request, ``cached_tokens`` those that a kept cache held already; and our extension."""
        generated = sum(len(row.tokens) for row in self.job.sequences)  # end tokens included
        usage = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": self.job.reused_tokens},
        }
        return {"usage": usage, "llm_accel": {"method": self.job.method_name}}

    def _wrap(self, choices: list[Json]) -> Json:
        return self._head | {"object": self.chunk_name, "choices": choices}

    def _choice(self, delta: Delta, whole: bool) -> Json:
        """With the log-probabilities, where the request asked for any, and at its beginning those of the prompt."""
        (content, logprobs), wanted = self._content(delta, whole), self.job.sampling.logprobs is not None
        choice = {"index": delta.index, **content, "logprobs": logprobs if wanted else None}
        if self.body.prompt_logprobs is not None and delta.index not in self._begun:
            known = self.job.sequences[delta.index].prompt_logprobs
            choice["prompt_logprobs"] = [one and self._by_id(one) for one in known]
        self._begun.add(delta.index)
        return choice | {"finish_reason": delta.finish}

    def _by_id(self, one: TokenLogprob) -> Json:
        """As vLLM writes it."""
        pairs = {one.token: one.logprob} | dict(one.top[: self.body.prompt_logprobs])
        return {str(token): {"logprob": value, "decoded_token": self._text(token)} for token, value in pairs.items()}

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


class ChatResponse(ApiResponse):
    """``/v1/chat/completions``."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """The role of every answer, before its text."""
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._wrap([{"index": sequence.index, **role}]) for sequence in self.job.sequences]

    def _content(self, delta: Delta, whole: bool) -> tuple[Json, Json]:
        entries = [
            self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in delta.logprobs
        ]
        said = {"content": delta.text} if whole or delta.text else {}
        return {"message": {"role": "assistant"} | said} if whole else {"delta": said}, {"content": entries}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionResponse(ApiResponse):
    """``/v1/completions``, with the prompt before the answer where ``echo`` asks for it."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def _content(self, delta: Delta, whole: bool) -> tuple[Json, Json]:
        text, logprobs = delta.text, list[TokenLogprob | None](delta.logprobs)
        if self.body.echo and delta.index not in self._begun:
            sequence, prompt = self.job.sequences[delta.index], self._prompts[delta.index // self.body.n]
            text, logprobs = prompt.text + text, [*sequence.prompt_logprobs, *logprobs]
        return {"text": text}, self._logprobs(delta.index, logprobs)

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob | None]) -> Json:
        """In columns; the first token of a prompt has no probability."""
        tokens, offsets = [], []
        for place, one in enumerate(logprobs):
            token = self.job.sequences[index].prompt[place] if one is None else one.token
            tokens.append(self._text(token))
            offsets.append(self._characters[index])
            self._characters[index] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [one and one.logprob for one in logprobs],
            "top_logprobs": [one and self._by_text(one) for one in logprobs],
            "text_offset": offsets,
        }

    def _by_text(self, one: TokenLogprob) -> Json:
        """Of several tokens that decode to the same text, the likeliest."""
        known: Json = {}
        for token, logprob in one.top[: self.job.sampling.logprobs]:
            known.setdefault(self._text(token), logprob)
        return known
