"""From texts, chats and images to token ids, in a thread of its own: the event loop goes on meanwhile. A text that
cannot fit is refused by its length, before anything is made of it."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jinja2 import TemplateError
from torch import Tensor

from llm_accel.serve.errors import BadRequest, ContextExceeded
from llm_accel.serve.images import decode
from llm_accel.serve.loading import Served
from llm_accel.serve.messages import Chat, Message
from llm_accel.serve.settings import ServeSettings, context_of

Result = TypeVar("Result")

MOST_IDS = 2**20  # token ids of a request, whatever the model takes
CHARACTERS = 16  # of a token, on average over a prompt, at most: several times what texts and code have
# what messages and options that a template does not expect make of it
_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")


@dataclass(frozen=True)
class Prompt:
    """Token ids, the text that they stand for, and for images what the model needs beside them."""

    ids: tuple[int, ...]
    text: str = ""
    features: Mapping[str, Tensor] = field(default_factory=dict)


class PromptReader:
    """Reads prompts with its own copy of the tokenizer, one at a time: tokenizers do not like several threads.

    Attributes:
        limit: tokens of a prompt at most.
        vocabulary: token ids are below it.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        self._processor = copy.deepcopy(served.processor)
        self.tokenizer: Any = copy.deepcopy(served.tokenizer) if self._processor is None else self._processor.tokenizer
        self._settings, self._context = settings, context_of(served.model, settings) or MOST_IDS
        self.limit = min(self._context, settings.max_prompt_tokens or MOST_IDS)
        self.vocabulary = int(served.model.config.get_text_config().vocab_size)
        ids = {getattr(served.model.config, name, None) for name in _PLACEHOLDERS}
        self._placeholders = {number for number in ids if isinstance(number, int)}
        self._thread = ThreadPoolExecutor(1, "llm-accel-read")

    async def texts(self, prompts: Sequence[str | list[int]], special: bool = True) -> list[Prompt]:
        """Prompts as they are; ``special``: with the special tokens that the tokenizer puts around texts."""
        for prompt in prompts:
            self._check_size(len(prompt), CHARACTERS if isinstance(prompt, str) else 1)
        return await self._apart(lambda: [self._prompt(one, special) for one in prompts])

    async def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        self._check_ids(ids)
        return await self._apart(lambda: self._decode(ids))

    async def chat(self, chat: Chat) -> Prompt:
        """A chat in the model's template.

        Raises:
            ApiError: no template, a chat that it does not take, or images that cannot be used.
        """
        template = getattr(self._processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise BadRequest("this model has no chat template; use /v1/completions.")
        self._check_size(sum(message.characters for message in chat.messages), CHARACTERS)
        return await self._apart(lambda: self._chat(chat))

    def _check_size(self, size: int, per_token: int = 1) -> None:
        """Refuses a prompt of more tokens than are allowed, or more characters than so many tokens can have."""
        if size <= self.limit * per_token:
            return
        unit = "tokens" if per_token == 1 else f"characters, which is over {per_token} for each token that may be"
        raise ContextExceeded(f"the prompt has {size} {unit}; {self.limit} are allowed", self._context)

    def _prompt(self, prompt: str | list[int], special: bool) -> Prompt:
        if not isinstance(prompt, str):
            return Prompt(self._checked(prompt), self._decode(prompt))
        return Prompt(self._checked(self.tokenizer(prompt, add_special_tokens=special)["input_ids"]), prompt)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _check_ids(self, ids: Sequence[int]) -> None:
        self._check_size(len(ids))
        if max(ids, default=0) >= self.vocabulary:
            raise BadRequest(f"token ids are below {self.vocabulary}.")

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt without images that the model can read."""
        if len(ids) == 0:
            raise BadRequest("the prompt is empty.")
        self._check_ids(ids)
        if not self._placeholders.isdisjoint(ids):
            raise BadRequest("a token of the prompt stands for an image or the like; send images in a chat.")
        return tuple(ids)

    async def _apart(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _chat(self, chat: Chat) -> Prompt:
        urls = [url for message in chat.messages for url in message.images]
        if len(urls) > self._settings.max_images:
            raise BadRequest(f"{len(urls)} images; {self._settings.max_images} are allowed in a request.")
        if self._processor is None:
            if urls:
                raise BadRequest("this model reads text only; leave the images out.")
            text = self._render(self.tokenizer, [message.plain() for message in chat.messages], chat)
        else:
            self._check_placeholders(chat.messages)
            text = self._render(self._processor, [message.mixed() for message in chat.messages], chat)
        self._check_size(len(text), CHARACTERS)
        if not urls:
            return Prompt(self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"]), text)
        images = [decode(url, self._settings.max_image_pixels) for url in urls]
        try:
            made = dict(self._processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False))
        except ValueError as error:
            raise BadRequest("the model's processor does not take these images.") from error
        made.pop("attention_mask", None)
        ids = tuple(made.pop("input_ids")[0].tolist())
        self._check_size(len(ids))
        return Prompt(ids, text, made)

    def _check_placeholders(self, messages: Sequence[Message]) -> None:
        """A placeholder in a text would be taken for an image that is not there."""
        mark = getattr(self._processor, "image_token", None)
        if mark and any(mark in part.text for message in messages for part in message.parts if part.type == "text"):
            raise BadRequest(f"a text holds {mark!r}, which stands for an image; send images as parts.")

    def _render(self, reader: Any, messages: list[dict[str, Any]], chat: Chat) -> str:
        effort = {} if chat.reasoning_effort is None else {"reasoning_effort": chat.reasoning_effort}
        options, known = effort | chat.chat_template_kwargs, inspect.signature(reader.apply_chat_template).parameters
        taken = [name for name in options if name in known or name == "messages"]
        if taken:
            raise BadRequest(f"chat_template_kwargs: {', '.join(taken)} cannot be set there.")

        def render(turns: list[dict[str, Any]]) -> str:
            text: str = reader.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **options,
            )
            return text

        try:
            text = render(messages)
            for other in _other_tool_turns(messages):
                if render(other) == text:
                    raise BadRequest("the model's chat template leaves turns with tools out; send none.")
        except _OF_TEMPLATES as error:
            # what a template says itself is meant for whoever sent the messages; other errors speak of its insides
            told = f": {error}" if type(error) is TemplateError else "."
            raise BadRequest(f"the model's chat template does not take these messages{told}") from error
        return text


def _other_tool_turns(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages with other names of called tools, and with other results: a template that reads them differs."""

    def renamed(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [call | {"function": call["function"] | {"name": "another"}} for call in calls]

    others = (
        [one | {"tool_calls": renamed(one["tool_calls"])} if "tool_calls" in one else one for one in messages],
        [one | {"content": "another result"} if one["role"] == "tool" else one for one in messages],
    )
    return [other for other in others if other != messages]
