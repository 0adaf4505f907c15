"""What requests may contain. What would change the answer and is not supported is refused; other unknown fields are
ignored and reported, or refused too where the operator says so (``--strict-fields``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from llm_accel.methods.base import INT64

# What is a large engine's work, and other fields that are not supported: name -> the values that ask for nothing.
LARGE_ENGINE: dict[str, tuple[Any, ...]] = {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = LARGE_ENGINE | {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # on the answer: other values are treated like unknown fields
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
}

MOST_MESSAGES, MOST_PARTS_OF_A_MESSAGE = 4096, 1024
_MOST_FIELDS, _LONGEST_NAME = 64, 100  # of an object
_MOST_METADATA, _MOST_BIASES, _MOST_STOP_IDS, _MOST_CALLS = 16, 1024, 64, 128

Count = Annotated[int, Field(ge=1, le=INT64)]
Id = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Stop = Annotated[str, Field(min_length=1, max_length=500)]
Name = Annotated[str, Field(max_length=512)]


def _form(value: Any) -> str | None:
    """Which alternative of a field is meant: a text, or a list by its first item."""
    if isinstance(value, list):
        first = value[0] if value else ""
        return "id lists" if isinstance(first, list) else "ids" if isinstance(first, int) else "list"
    return "text" if isinstance(value, str) else None


def _text_or_list(value: Any) -> str | None:
    """The same where all lists are of one kind."""
    return "list" if isinstance(value, list) else _form(value)


def _by_form(form: Callable[[Any], str | None], allowed: str) -> Discriminator:
    """Each value is tried for the one alternative that it means, so that there is one complaint."""
    return Discriminator(form, custom_error_type="told_form", custom_error_message=f"give {allowed}")


def _at_most(most: int) -> BeforeValidator:
    """Bounds an object before anything in it is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("told_size", "give at most {most} entries", {"most": most})
        return value

    return BeforeValidator(check)


def _same(value: Any, other: Any) -> bool:
    """As JSON sees it: to Python, false is 0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _tell(neutral: dict[str, tuple[Any, ...]]) -> Callable[[dict[str, Any]], None]:
    """Adds to a JSON schema which values that ask for nothing are taken."""

    def add(schema: dict[str, Any]) -> None:
        required, properties = schema.get("required", ()), schema["properties"]
        for name, one in properties.items():
            if name not in required and {"type": "null"} not in one.get("anyOf", ()):
                properties[name] = {"anyOf": [one, {"type": "null"}]}
        properties |= {name: {"enum": [None, *values]} for name, values in neutral.items()}

    return add


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any, info: ValidationInfo) -> Any:
        """Null is the same as not given, and so is a value that asks for nothing. Where the context has a set for them,
        names of unknown fields go there."""
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise PydanticCustomError("told_size", "give at most {most} fields", {"most": _MOST_FIELDS})
        neutral = cls.without_effect | cls.unsupported
        data = {
            key: value
            for key, value in data.items()
            if value is not None and not any(_same(value, nothing) for nothing in neutral.get(key, ()))
        }
        ignored = (info.context or {}).get("ignored")
        if ignored is not None:
            known = cls.model_fields.keys() | cls.unsupported.keys()
            unknown = {key for key in data.keys() - known if len(key) <= _LONGEST_NAME}
            ignored |= unknown
            data = {key: value for key, value in data.items() if key not in unknown}
        return data


class Extension(_Body):
    """The field ``llm_accel`` of a request.

    Attributes:
        method: the method for this request, as on the command line; ``dense`` for none.
        session: name of a conversation whose cache is kept; the next request with this name, the same key and a longer
            version of the same conversation goes on with it.
        deadline_s: seconds for this request; the server's own limit holds as well.
    """

    method: Annotated[str, Field(max_length=500)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False


class ModelRequest(_Body):
    """A request for a model, by its name or for the one that is served."""

    model: Annotated[str, Field(max_length=500)] | None = None
    llm_accel: Extension = Extension()


class Request(ModelRequest):
    """What chats and completions share."""

    model_config = ConfigDict(json_schema_extra=_tell(_UNSUPPORTED | _WITHOUT_EFFECT))
    unsupported, without_effect = _UNSUPPORTED, _WITHOUT_EFFECT

    model: Annotated[str, Field(max_length=500)]
    n: Count = 1
    max_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    min_p: Share = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        _at_most(_MOST_BIASES),
        Field(max_length=_MOST_BIASES),
    ] = {}
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Annotated[
        Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=16, fail_fast=True), Tag("list")],
        _by_form(_text_or_list, "a text or a list of texts"),
    ] = []
    stop_token_ids: Annotated[list[Id], Field(max_length=_MOST_STOP_IDS, fail_fast=True)] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Alternatives | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Name | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Name],
            _at_most(_MOST_METADATA),
            Field(max_length=_MOST_METADATA),
        ]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _without_unused_tools(cls, data: Any) -> Any:
        """Tools that may not be called are none."""
        unused = {"tools": "tool_choice", "functions": "function_call"}
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if data.get(unused.get(key, "")) != "none"}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    """Where an image is: inside the URL itself. The model's processor decides how much detail it sees."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Function(_Body):
    """A function that was called, and its arguments as JSON."""

    name: Name
    arguments: str = "{}"


class ToolCall(_Body):
    """A call that an earlier answer made."""

    id: Name = ""
    type: Literal["function"] = "function"
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: with the arguments as an object where they are one."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class Message(_Body):
    """One turn of a chat."""

    model_config = ConfigDict(json_schema_extra=_tell({"annotations": ([],)}))
    unsupported = {"annotations": ([],), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=MOST_PARTS_OF_A_MESSAGE, fail_fast=True),
            Tag("list"),
        ],
        _by_form(_text_or_list, "a text or a list of parts"),
    ]
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_CALLS, fail_fast=True)] = []
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, data: Any) -> Any:
        """An answer that only called tools has no content."""
        empty = isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None
        return data | {"content": ""} if empty else data

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.parts if isinstance(part, ImagePart)]

    @property
    def characters(self) -> int:
        """Length of its texts, arguments of calls included."""
        texts = sum(len(part.text) for part in self.parts if isinstance(part, TextPart))
        return texts + sum(len(call.function.arguments) for call in self.tool_calls)

    def plain(self) -> dict[str, Any]:
        """As the chat templates of text models take it."""
        return self._turn("\n".join(part.text for part in self.parts if isinstance(part, TextPart)))

    def mixed(self) -> dict[str, Any]:
        """As the chat templates of vision-language models take it."""
        return self._turn(
            [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in self.parts]
        )

    def _turn(self, content: Any) -> dict[str, Any]:
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        calls = [call.plain() for call in self.tool_calls]
        more = {"name": self.name, "tool_calls": calls or None, "tool_call_id": self.tool_call_id}
        return turn | {key: value for key, value in more.items() if value is not None}


class Chat(_Body):
    """Messages, and how the model's template puts them together."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    chat_template_kwargs: dict[Annotated[str, Field(max_length=64)], Any] = {}

    @property
    def template_options(self) -> dict[str, Any]:
        """What the template is given beside the messages."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | self.chat_template_kwargs


class ChatRequest(Chat, Request):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, where the request names a number."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """``POST /v1/completions``; prompts are texts or token ids."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("list")]
        | Annotated[list[Id], Field(min_length=1, fail_fast=True), Tag("ids")]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, fail_fast=True),
            Tag("id lists"),
        ],
        _by_form(_form, "a text, a list of token ids, or a list of texts or of such lists"),
    ]
    echo: bool = False
    logprobs: Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, where the request names a number."""
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One text or one list of ids for each prompt."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else given


class TokenizeRequest(ModelRequest, Chat):
    """``POST /tokenize``, with a text or a chat."""

    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES, fail_fast=True)] = []
    prompt: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("told_either", "give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(ModelRequest):
    """``POST /detokenize``."""

    tokens: Annotated[list[Id], Field(fail_fast=True)]
