"""One request on its way through the server: rows that generate, and the events they send back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from llm_accel.methods import MethodConfig
from llm_accel.registry import spec_of
from llm_accel.serve.detokenizer import Detokenizer
from llm_accel.serve.errors import ApiError
from llm_accel.serve.logprobs import TokenLogprob
from llm_accel.serve.sampling import Sampling


@dataclass(frozen=True)
class Delta:
    """A part of one answer.

    Attributes:
        index: number of the answer within the request.
        text: new text, maybe none.
        logprobs: log-probabilities of the tokens since the last delta, where they were asked for.
        finish: "stop" or "length" with the last delta, else None.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None


class TokenSequence:
    """One answer in the making; lives in the inference thread.

    Attributes:
        prompt_logprobs: of the tokens of the prompt, None for the first one, once they are known and where wanted.
        begun_at: when the prompt's turn came.
        reserved: bytes that are set aside for it.
        rules: what the model's own generation settings do to the logits.
        ends: the tokens that end the answer.
    """

    def __init__(self, job: Job, index: int, prompt: tuple[int, ...], text: Detokenizer) -> None:
        self.job, self.index, self.prompt = job, index, prompt
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.begun_at = self.first_at = self.last_at = 0.0
        self.reserved = 0
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.rules: LogitsProcessorList | None = None
        self.ends: frozenset[int] = frozenset()
        self._text, self._random = text, job.sampling.source(index)
        self._logprobs: list[TokenLogprob] = []

    def begin(self, rules: LogitsProcessorList, model_ends: set[int]) -> None:
        """Its turn has come; ``model_ends``: the model's own end tokens."""
        sampling, self.begun_at, self.rules = self.job.sampling, time.monotonic(), rules
        self.ends = sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids | model_ends

    def adjusted(self, scores: Tensor) -> Tensor:
        """The model's scores, float [V], as the request wants them changed."""
        return self.job.sampling.adjusted(scores, self.prompt, self.tokens, self.ends)

    def draw(self) -> float:
        """The next random number of this row, if it needs one."""
        return self._random.random() if self.job.sampling.temperature > 0 and not self.over else 0.0

    @property
    def over(self) -> bool:
        """Whether it needs no further token."""
        return self.finish is not None or self.job.cancelled

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """Takes the next token and tells the client what is new."""
        if self.over:
            return
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        ended = token in self.ends
        text = "" if ended else self._text.push(token, len(self.tokens) > self.job.sampling.min_tokens)
        if ended or self._text.stopped:
            self.finish = "stop"
        elif len(self.tokens) >= self.job.max_new_tokens:
            self.finish = "length"
        if self.finish:
            text += self._text.flush()
            self.finish = "stop" if self._text.stopped else self.finish
        self._tell(text)

    def end_unsaid(self) -> None:
        """Ends an answer of no tokens: only the prompt was of interest."""
        self.finish = "length"
        self._tell("")

    def _tell(self, text: str) -> None:
        if text or self.finish:
            self.job.send(Delta(self.index, text, tuple(self._logprobs), self.finish))
            self._logprobs.clear()


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        prompts: token ids, one prompt for each answer.
        methods: the methods to run together, none for dense.
        sampling: how tokens are chosen.
        max_new_tokens: at most, for each answer; 0 where only the prompt's log-probabilities are wanted.
        features: what a vision-language model needs beside the ids, as its processor made it.
        session: API key and name of the conversation whose cache to keep, or None.
        make_detokenizer: a new decoder of text for each answer.
        prompt_logprobs: how many alternatives to report for each token of the prompt; None for no log-probabilities.
        reused_tokens: tokens of the prompt that the conversation's cache held already.
        cancelled: nobody waits for the answer any more.
        started: how many of its sequences have run.
    """

    prompts: Sequence[tuple[int, ...]]
    methods: tuple[MethodConfig, ...]
    sampling: Sampling
    max_new_tokens: int
    make_detokenizer: Callable[[], Detokenizer]
    session: tuple[str, str] | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    prompt_logprobs: int | None = None
    reused_tokens: int = 0
    cancelled: bool = False
    started: int = 0
    accepted_at: float = field(default_factory=time.monotonic)
    sequences: list[TokenSequence] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = [
            TokenSequence(self, index, prompt, self.make_detokenizer()) for index, prompt in enumerate(self.prompts)
        ]
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Delta | ApiError] = asyncio.Queue()

    @property
    def method_name(self) -> str:
        """The methods in the form of the command line."""
        return spec_of(self.methods)

    @property
    def apart(self) -> bool:
        """Whether its prompts are read in calls of their own; families lay out images differently."""
        return bool(self.features) or self.session is not None or self.prompt_logprobs is not None

    @property
    def waiting(self) -> list[TokenSequence]:
        """The sequences that have not run yet."""
        return [] if self.cancelled else self.sequences[self.started :]

    def send(self, event: Delta | ApiError) -> None:
        """Hands an event to the waiting client; from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def fail(self, error: ApiError) -> None:
        """Ends the request without an answer; from any thread."""
        self.cancelled = True
        self.send(error)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the client gets, in order, until every answer is finished; raises the error that ended the request."""
        unfinished = len(self.sequences)
        while unfinished:
            event: Any = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            unfinished -= event.finish is not None
            yield event
