"""What requests may say. Anything that would change the answer and is not supported is refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llm_accel.methods.base import INT64

# Fields of OpenAI's API that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],)}


MOST_MESSAGES, MOST_PARTS_OF_A_MESSAGE = 4096, 1024
_MOST_FIELDS = 64  # of an object
_MOST_METADATA = 16

Count = Annotated[int, Field(ge=1, le=INT64)]
Id = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=500)]


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


def _few(value: Any) -> Any:
    """Before anything in it is looked at."""
    if isinstance(value, dict) and len(value) > _MOST_METADATA:
        raise PydanticCustomError("told_size", "give at most {most} entries", {"most": _MOST_METADATA})
    return value


def _same(value: Any, other: Any) -> bool:
    """As JSON sees it: to Python, false is 0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _tell(neutral: dict[str, tuple[Any, ...]]) -> Callable[[dict[str, Any]], None]:
    """Adds to a JSON schema what :func:`_without_neutral` takes."""

    def add(schema: dict[str, Any]) -> None:
        required, properties = schema.get("required", ()), schema["properties"]
        for name, one in properties.items():
            if name not in required and {"type": "null"} not in one.get("anyOf", ()):
                properties[name] = {"anyOf": [one, {"type": "null"}]}
        properties |= {name: {"enum": [None, *values]} for name, values in neutral.items()}

    return add


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        """Null is the same as not given, and so is a value that asks for nothing."""
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise PydanticCustomError("told_size", "give at most {most} fields", {"most": _MOST_FIELDS})
        return {
            key: value
            for key, value in data.items()
            if value is not None and not any(_same(value, nothing) for nothing in cls.neutral.get(key, ()))
        }


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


class Request(_Body):
    """What both endpoints share."""

    model_config = ConfigDict(json_schema_extra=_tell(_NEUTRAL))
    neutral = _NEUTRAL

    model: Annotated[str, Field(max_length=500)]
    n: Count = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Annotated[
        Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=16, fail_fast=True), Tag("list")],
        _by_form(_text_or_list, "a text or a list of texts"),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=_MOST_METADATA),
            BeforeValidator(_few),
        ]
        | None
    ) = None
    llm_accel: Extension = Extension()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    """Where an image is: inside the URL itself."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(_Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Body):
    """One turn of a chat."""

    model_config = ConfigDict(json_schema_extra=_tell(_NEUTRAL_IN_MESSAGES))
    neutral = _NEUTRAL_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=MOST_PARTS_OF_A_MESSAGE, fail_fast=True),
            Tag("list"),
        ],
        _by_form(_text_or_list, "a text or a list of parts"),
    ]
    name: Annotated[str, Field(max_length=512)] | None = None

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.parts if isinstance(part, ImagePart)]

    def plain(self) -> dict[str, Any]:
        """As the chat templates of text models take it."""
        return self._turn("\n".join(part.text for part in self.parts if isinstance(part, TextPart)))

    def mixed(self) -> dict[str, Any]:
        """As the chat templates of vision-language models take it."""
        return self._turn(
            [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in self.parts]
        )

    def _turn(self, content: Any) -> dict[str, Any]:
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **named}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, where the request names a number."""
        return self.max_completion_tokens or self.max_tokens


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
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

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
