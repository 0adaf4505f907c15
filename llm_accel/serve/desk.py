"""Turns requests into jobs. Everything is checked here that can be checked without running the model."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from llm_accel.errors import LlmAccelError
from llm_accel.methods import Dense, MethodConfig
from llm_accel.registry import parse_all
from llm_accel.serve.answers import ChatAnswer, CompletionAnswer
from llm_accel.serve.body import MOST_PARTS
from llm_accel.serve.errors import ApiError
from llm_accel.serve.jobs import Job
from llm_accel.serve.loading import Served
from llm_accel.serve.prompts import Prompt, Reader
from llm_accel.serve.protocol import ChatRequest, CompletionRequest, Request
from llm_accel.serve.sampling import Sampling
from llm_accel.serve.settings import ServeSettings
from llm_accel.serve.text import TextStream

_MOST_IDS = 2**20  # token ids of a request, whatever the model takes


class Desk:
    """What is known about the model and the limits.

    Attributes:
        context: tokens of prompt and answer together that the model takes, if it says so.
        max_values: values that the JSON of a request may need: token ids of every row, and some beside them.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        self._name, self._tokenizer, self._settings = served.name, served.tokenizer, settings
        self._allowed = settings.allowed()
        text_config = served.model.config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        limit = min(self.context or _MOST_IDS, settings.max_prompt_tokens or _MOST_IDS)
        self._reader = Reader(served, settings, limit, int(text_config.vocab_size))
        self.max_values = MOST_PARTS + min(_MOST_IDS, settings.max_batch * limit)
        own = served.model.generation_config
        self._sampling = (
            Sampling(own.temperature or 1.0, own.top_p or 1.0, own.top_k or None) if own.do_sample else Sampling()
        )

    def check_model(self, name: str) -> None:
        """Refuses the name of another model."""
        if name != self._name:
            raise ApiError("not_found", f"there is no model {name!r} here; this server runs {self._name!r}.")

    def seconds(self, body: Request) -> float:
        """How long a request may take, from its arrival to its end."""
        return min(body.llm_accel.deadline_s or self._settings.deadline_s, self._settings.deadline_s)

    async def chat(self, body: ChatRequest, key: str) -> ChatAnswer:
        """The answer to a chat, not begun yet."""
        self._check(body, 1)
        prompts = [await self._reader.chat(body.messages)]
        return ChatAnswer(self._job(body, prompts, key), self._name, self._reader.tokenizer, [prompts[0].ids])

    async def completion(self, body: CompletionRequest, key: str) -> CompletionAnswer:
        """The answer to prompts, not begun yet."""
        self._check(body, len(body.prompts))
        prompts = await self._reader.texts(body.prompts)
        distinct = [prompt.ids for prompt in prompts]
        return CompletionAnswer(self._job(body, prompts, key), self._name, self._reader.tokenizer, distinct)

    def _check(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        """What costs nothing to check, before anything is made of the request."""
        rows = prompts * body.n
        if rows > self._settings.max_batch:
            raise ApiError("bad_request", f"{rows} answers at once; {self._settings.max_batch} are allowed.")
        if body.limit is not None and body.limit > self._settings.max_new_tokens:
            raise ApiError(
                "bad_request", f"max_tokens={body.limit}: at most {self._settings.max_new_tokens} are allowed."
            )
        self._methods(body.llm_accel.method)

    def _job(self, body: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], key: str) -> Job:
        rows = [prompt.ids for prompt in prompts for _ in range(body.n)]
        features, session = prompts[0].features, body.llm_accel.session
        if len(rows) > 1 and (session is not None or features):
            raise ApiError("bad_request", "a request with a session or images has one prompt and n=1.")
        if session is not None and features:
            raise ApiError("bad_request", "a session keeps text only; leave the session or the images out.")
        return Job(
            prompts=rows,
            methods=self._methods(body.llm_accel.method),
            sampling=self._choice(body),
            max_new_tokens=self._room([prompt.ids for prompt in prompts], body.limit),
            deadline_s=self.seconds(body),
            make_text=lambda: TextStream(self._tokenizer, body.stops),
            session=None if session is None else (key, session),
            features=features,
        )

    def _choice(self, body: ChatRequest | CompletionRequest) -> Sampling:
        own = self._sampling
        return Sampling(
            temperature=own.temperature if body.temperature is None else body.temperature,
            top_p=body.top_p or own.top_p,
            top_k=body.top_k or own.top_k,
            seed=body.seed,
            logprobs=body.alternatives,
        )

    def _methods(self, spec: str | None) -> tuple[MethodConfig, ...]:
        try:
            configs = parse_all(self._settings.method if spec is None else spec)
        except LlmAccelError as error:
            raise ApiError("bad_request", f"llm_accel.method: {error}") from error
        if spec is not None:
            others = [config.name for config in configs if config.name not in self._allowed]
            if others:
                raise ApiError(
                    "bad_request",
                    f"llm_accel.method: {', '.join(others)} cannot be chosen by requests to this server, which may use "
                    f"{', '.join(sorted(self._allowed))}; the operator allows others with --allow-methods.",
                )
            texts = [key for config in configs for key in config.changed() if str in _kinds(type(config), key)]
            if texts:  # they name files, which are none of a client's business
                raise ApiError("bad_request", f"llm_accel.method: {', '.join(texts)} can be set by the operator only.")
            self._check_capacity(configs)
        return configs

    def _check_capacity(self, configs: Sequence[MethodConfig]) -> None:
        """Compiled decoding allocates what ``capacity`` says, whatever the request needs."""
        for config in configs:
            if isinstance(config, Dense) and self.context is not None and (config.capacity or 0) > self.context:
                raise ApiError(
                    "bad_request",
                    f"llm_accel.method: capacity={config.capacity}; the model's context of {self.context} is allowed.",
                )

    def _room(self, prompts: Sequence[tuple[int, ...]], wanted: int | None) -> int:
        """How many tokens to generate at most."""
        longest, settings = max(map(len, prompts)), self._settings
        left = settings.max_new_tokens if self.context is None else self.context - longest
        if left < (wanted or 1):
            raise ApiError(
                "bad_request",
                f"the prompt has {longest} tokens and the answer {wanted or 1}; the model's context is {self.context}.",
            )
        return wanted or min(left, settings.max_new_tokens)


def _kinds(config: type[MethodConfig], option: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(config)[option]
    return (hint, *typing.get_args(hint))
