"""Turns requests into jobs. Everything is checked here that can be checked without running the model."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from llm_accel.errors import LlmAccelError
from llm_accel.methods import Claim, Dense, MethodConfig
from llm_accel.registry import parse_all
from llm_accel.serve.body import MOST_PARTS
from llm_accel.serve.detokenizer import Detokenizer
from llm_accel.serve.errors import ApiError, BadRequest, ContextExceeded
from llm_accel.serve.loading import Served
from llm_accel.serve.prompts import MOST_IDS, Prompt, PromptReader
from llm_accel.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from llm_accel.serve.responses import ApiResponse, ChatResponse, CompletionResponse
from llm_accel.serve.sampling import Sampling
from llm_accel.serve.sequences import Job
from llm_accel.serve.settings import ServeSettings, context_of

MOST_ANSWERS = 1024  # of a request: prompts times n
_MOST_LOGPROBS = 2**19  # of a response
_DEFAULT_NEW_TOKENS = 1024  # of a request that names no number
_SAMPLING = {field.name for field in fields(Sampling)}


class InputProcessor:
    """What is known about the model and the limits.

    Attributes:
        context: tokens of prompt and answer together that the model takes, if it says so.
        max_values: values that the JSON of a request may need: token ids of every row, and some beside them.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        self._name, self._tokenizer, self._settings = served.name, served.tokenizer, settings
        self._allowed = settings.allowed()
        self.context = context_of(served.model, settings)
        self._reader = PromptReader(served, settings)
        self.max_values = MOST_PARTS + min(MOST_IDS, MOST_ANSWERS * self._reader.limit)
        own = served.model.generation_config
        self._sampling = (
            Sampling(own.temperature or 1.0, own.top_p or 1.0, own.top_k or 0) if own.do_sample else Sampling()
        )

    def check_model(self, name: str) -> None:
        """Refuses the name of another model."""
        if name != self._name:
            message = f"there is no model {name!r} here; this server runs {self._name!r}."
            raise ApiError("not_found", message, code="model_not_found", param="model")

    async def generation(self, body: ChatRequest | CompletionRequest, key: str) -> ApiResponse:
        """The response to a chat or to prompts, not begun yet."""
        self._check(body)
        response: type[ApiResponse] = ChatResponse if isinstance(body, ChatRequest) else CompletionResponse
        if isinstance(body, ChatRequest):
            prompts = [await self._reader.chat(body)]
        else:
            prompts = await self._reader.texts(body.prompts)
        return response(self._job(body, prompts, key), body, self._name, self._reader, prompts)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a prompt."""
        if body.prompt is None:
            prompt = await self._reader.chat(body)
        else:
            [prompt] = await self._reader.texts([body.prompt], body.add_special_tokens)
        return {"count": len(prompt.ids), "max_model_len": self.context, "tokens": list(prompt.ids)}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        return {"prompt": await self._reader.text(body.tokens)}

    def _check(self, body: ChatRequest | CompletionRequest) -> None:
        """What costs nothing to check, before anything is made of the request."""
        answers, limit = len(body.prompts) * body.n, self._settings.max_new_tokens
        wanted = max(body.limit or 0, body.min_tokens)
        if answers > MOST_ANSWERS:
            raise BadRequest(f"{answers} answers in one request; {MOST_ANSWERS} are allowed.", param="n")
        if body.limit == 0 and not body.echo and _prompt_alternatives(body) is None:
            raise BadRequest("max_tokens: give at least 1; 0 is for 'echo' and 'prompt_logprobs'.", param="max_tokens")
        if limit is not None and wanted > limit:
            raise BadRequest(f"max_tokens={wanted}: at most {limit} are allowed.", param="max_tokens")
        if any(int(token) >= self._reader.vocabulary for token in body.logit_bias):
            raise BadRequest(f"logit_bias: token ids are below {self._reader.vocabulary}.", param="logit_bias")
        methods = self._methods(body.llm_accel.method)
        if _prompt_alternatives(body) is not None:
            _check_prompt_logprobs(methods)

    def _job(self, body: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], key: str) -> Job:
        rows = [prompt.ids for prompt in prompts for _ in range(body.n)]
        features, session, top = prompts[0].features, body.llm_accel.session, _prompt_alternatives(body)
        if len(rows) > 1 and (session is not None or features):
            raise BadRequest("a request with a session or images has one prompt and n=1.")
        if session is not None and features:
            raise BadRequest("a session keeps text only; leave the session or the images out.")
        if top is not None and features:
            raise BadRequest("prompt_logprobs: there are none for prompts with images.")
        sampling, most = self._sampling_of(body), self._answer_limit([prompt.ids for prompt in prompts], body)
        entries = len(rows) * most * _entries(sampling.logprobs) + sum(map(len, rows)) * _entries(top)
        if entries > _MOST_LOGPROBS:
            raise BadRequest(f"{entries} log-probabilities in one request; {_MOST_LOGPROBS} are allowed.")
        return Job(
            prompts=rows,
            methods=self._methods(body.llm_accel.method),
            sampling=sampling,
            max_new_tokens=most,
            make_detokenizer=lambda: Detokenizer(self._tokenizer, body.stops, body.skip_special_tokens),
            session=None if session is None else (key, session),
            features=features,
            prompt_logprobs=top,
        )

    def _sampling_of(self, body: ChatRequest | CompletionRequest) -> Sampling:
        """What the request says, and the model's own settings where it says nothing."""
        given = body.model_dump(include=_SAMPLING, exclude_none=True)
        bias = {int(token): value for token, value in body.logit_bias.items()}
        given |= {"logit_bias": bias, "stop_token_ids": frozenset(body.stop_token_ids), "logprobs": body.alternatives}
        return replace(self._sampling, **given)

    def _methods(self, spec: str | None) -> tuple[MethodConfig, ...]:
        try:
            configs = parse_all(self._settings.method if spec is None else spec)
        except LlmAccelError as error:
            raise BadRequest(f"llm_accel.method: {error}") from error
        if spec is not None:
            others = [config.name for config in configs if config.name not in self._allowed]
            if others:
                raise BadRequest(
                    f"llm_accel.method: {', '.join(others)} cannot be chosen by requests to this server, which may use "
                    f"{', '.join(sorted(self._allowed))}; the operator allows others with --allow-methods."
                )
            texts = [key for config in configs for key in config.changed() if str in _kinds(type(config), key)]
            if texts:  # they name files, which are none of a client's business
                raise BadRequest(f"llm_accel.method: {', '.join(texts)} can be set by the operator only.")
            asked = max((config.capacity or 0 for config in configs if isinstance(config, Dense)), default=0)
            if self.context is not None and asked > self.context:  # it is allocated, whatever the request needs
                raise BadRequest(
                    f"llm_accel.method: capacity={asked}; the model's context of {self.context} is allowed."
                )
        return configs

    def _answer_limit(self, prompts: Sequence[tuple[int, ...]], body: ChatRequest | CompletionRequest) -> int:
        """How many tokens to generate at most."""
        longest, most = max(map(len, prompts)), self._settings.max_new_tokens or MOST_IDS
        left = most if self.context is None else min(most, self.context - longest)
        least = max(1 if body.limit is None else body.limit, body.min_tokens)
        if self.context is not None and longest + least > self.context:
            raise ContextExceeded(f"the prompt has {longest} tokens and the answer {least}", self.context)
        wanted = min(left, max(_DEFAULT_NEW_TOKENS, body.min_tokens)) if body.limit is None else body.limit
        if wanted < body.min_tokens:
            raise BadRequest(f"min_tokens={body.min_tokens} is more than max_tokens={wanted}.", param="min_tokens")
        return wanted


def _prompt_alternatives(body: ChatRequest | CompletionRequest) -> int | None:
    """How many alternatives to report for each token of the prompt; None for no log-probabilities."""
    wanted = (body.prompt_logprobs, body.alternatives if body.echo else None)
    return max((count for count in wanted if count is not None), default=None)


def _check_prompt_logprobs(methods: Sequence[MethodConfig]) -> None:
    """The dense model reads the prompt, and methods that leave its attention alone read it like that."""
    read_otherwise = {Claim.ATTENTION, Claim.HEADS}
    others = [it.name for it in methods if read_otherwise & it.claims.keys() and not isinstance(it, Dense)]
    if others:
        raise BadRequest(
            "log-probabilities of the prompt are those of the dense model, and "
            f"{', '.join(others)} reads prompts otherwise; give the method 'dense' in llm_accel.method."
        )


def _entries(alternatives: int | None) -> int:
    """Log-probabilities of each token."""
    return 0 if alternatives is None else 1 + alternatives


def _kinds(config: type[MethodConfig], option: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(config)[option]
    return (hint, *typing.get_args(hint))
